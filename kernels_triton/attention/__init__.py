"""Causal attention of whole rows, without a matrix of scores in memory.

    s = scale · q kᵀ where the query sees the key,   lse = log Σ exp(s),   p = exp(s − lse),   out = p v

Backward, with the gradient do of out:

    δ = Σ_d do · out,   dv = pᵀ do,   ds = p ∘ (do vᵀ − δ),   dq = scale · ds k,   dk = scale · dsᵀ q

    forward.py      out and lse, a program for each tile of queries
    backward.py     δ; dq, a program for each tile of queries; dk and dv, a program for each tile of keys
    hopper/         both for Hopper GPUs, in Gluon: kernels.attention=triton_hopper
    primitives.py   tiles and who sees whom in them
    tiles.py        how large they are

Forward saves its inputs, out and lse [B, H, T] in fp32 (fp64 for fp64), from which backward makes p again: memory grows
with T and not with its square. Sums are fp32 and products of fp32 are real ones, without TF32.

Each tile of keys (of queries, for dk and dv) is of one of three kinds. Those that nobody sees, beyond the diagonal, the
window or the documents, are not read. Those in which some pairs are hidden, at the edges, are masked. All others go
through a loop of their own that knows no masks. For documents a small kernel finds, for each tile, between which positions
its ids occur at all and how far around it there is no other: ids in any order are right, those of packed rows are fast.

A value has one writer and every sum one order, without atomics, so two runs give the same bits, and a row's results depend
on no other row. Grouped heads read their keys where they lie; dk and dv are summed over the group in registers.

Queries, keys, values and incoming gradients may have any strides; those whose heads are not contiguous are copied first.
Heads may be up to 256 wide, and are padded in registers to a power of two: a width of 96 costs what 128 does.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kernels_torch.attention import check_attention
from kernels_triton.attention.backward import _attention_bwd
from kernels_triton.attention.forward import _attention_fwd
from kernels_triton.attention.tiles import WIDEST_HEAD
from kernels_triton.autograd import differentiable_once
from kernels_triton.launch import INTERPRETED, is_hopper

try:
    from kernels_triton.attention.hopper.backward import _attention_bwd as _hopper_bwd
    from kernels_triton.attention.hopper.forward import _attention_fwd as _hopper_fwd
    from kernels_triton.attention.hopper.forward import supports
except (ImportError, AttributeError) as error:  # a Triton whose Gluon has other names
    supports, NO_GLUON = None, error


def heads_side_by_side(x: Tensor) -> Tensor:
    """The values of a head next to each other; heads, tokens and rows may be far apart."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, window: int | None, doc_ids: Tensor | None, scale: float,
        on_hopper: bool,
    ) -> Tensor:
        q, k, v = heads_side_by_side(q), heads_side_by_side(k), heads_side_by_side(v)
        forward = _hopper_fwd if on_hopper else _attention_fwd
        out, lse = forward(q, k, v, window, doc_ids, scale)
        ctx.save_for_backward(q, k, v, out, lse, doc_ids)
        ctx.window, ctx.scale, ctx.on_hopper = window, scale, on_hopper
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: FunctionCtx, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, doc_ids = ctx.saved_tensors
        dout = heads_side_by_side(dout)
        backward = _hopper_bwd if ctx.on_hopper else _attention_bwd
        grads = backward(q, k, v, out, lse, dout, ctx.window, doc_ids, ctx.scale, *ctx.needs_input_grad[:3])
        return *grads, None, None, None, None


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, doc_ids: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """kernels_torch.attention, tile by tile, by the kernels for every GPU from Ampere on."""
    check_attention(q, k, v, window, doc_ids)
    if q.shape[-1] > WIDEST_HEAD:
        raise ValueError(f"heads may be at most {WIDEST_HEAD} wide, got {q.shape[-1]}")
    return attend(q, k, v, window, doc_ids, scale, False)


def attention_hopper(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, doc_ids: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """kernels_torch.attention by the kernels for Hopper GPUs: heads of up to 128 values, a multiple of 8, in half precision."""
    check_attention(q, k, v, window, doc_ids)
    if supports is None:
        raise ValueError(f"attention_hopper needs another Triton, {NO_GLUON}: take kernels.attention=triton")
    if INTERPRETED or not is_hopper(q.device) or not supports(q, window, doc_ids):
        raise ValueError(
            "attention_hopper needs a Hopper GPU, bfloat16 or float16 and heads of 8, 16 … 128 values, got "
            f"{q.dtype} and heads of {q.shape[-1]} on {q.device}: take kernels.attention=triton"
        )
    return attend(q, k, v, window, doc_ids, scale, True)


def attend(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, doc_ids: Tensor | None, scale: float | None, on_hopper: bool
) -> Tensor:
    if window is not None and window >= k.shape[1] - 1:
        window = None
    scale = max(q.shape[-1], 1) ** -0.5 if scale is None else float(scale)
    if scale < 0:  # the kernels know no negative one
        q, scale = -q, -scale
    return _Attention.apply(q, k, v, window, doc_ids, scale, on_hopper)
