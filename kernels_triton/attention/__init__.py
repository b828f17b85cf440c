"""Attention of whole rows, without a matrix of scores in memory.

    s = scale · q kᵀ where the query sees the key,   lse = log Σ exp(s),   p = exp(s − lse),   out = p v

Backward, with the gradient do of out:

    δ = Σ_d do · out,   dv = pᵀ do,   ds = p ∘ (do vᵀ − δ),   dq = scale · ds k,   dk = scale · dsᵀ q

With a soft-cap c, c · tanh(s / c) takes the place of s, and ds is multiplied by 1 − tanh².

    forward.py      out and lse, a program for each tile of queries
    backward.py     δ; dq, a program for each tile of queries; dk and dv, a program for each tile of keys
    hopper/         both for Hopper GPUs, in Gluon: half precision, causal, no soft-cap, heads of 8, 16 … 128
    primitives.py   tiles and who sees whom in them
    tiles.py        how large they are

Forward saves its inputs, out and lse [B, H, T] in fp32 (fp64 for fp64), from which backward makes p again: memory grows
with T and not with its square. Sums are fp32 and products of fp32 are real ones, without TF32.

Which kernels run is decided by the GPU and the kind of inputs alone. `kernels.attention=triton_portable` takes those for every
GPU on Hopper, too; nothing else does, not even a failure of the others.

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
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kernels_torch.attention import blind_queries, check_attention
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
        causal: bool, softcap: float | None, on_hopper: bool,
    ) -> Tensor:
        q, k, v = heads_side_by_side(q), heads_side_by_side(k), heads_side_by_side(v)
        if on_hopper:
            out, lse = _hopper_fwd(q, k, v, window, doc_ids, scale)
        else:
            out, lse = _attention_fwd(q, k, v, window, doc_ids, scale, causal, softcap)
        ctx.save_for_backward(q, k, v, out, lse, doc_ids)
        ctx.window, ctx.scale, ctx.causal, ctx.softcap, ctx.on_hopper = window, scale, causal, softcap, on_hopper
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: FunctionCtx, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, doc_ids = ctx.saved_tensors
        given = (q, k, v, out, lse, heads_side_by_side(dout), ctx.window, doc_ids, ctx.scale, *ctx.needs_input_grad[:3])
        grads = _hopper_bwd(*given) if ctx.on_hopper else _attention_bwd(*given, ctx.causal, ctx.softcap)
        return *grads, None, None, None, None, None, None


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, window: int | None = None, doc_ids: Tensor | None = None,
    scale: float | None = None, softcap: float | None = None,
) -> Tensor:
    """kernels_torch.attention, tile by tile: by the kernels for Hopper GPUs where they know how, else by those for every GPU."""
    check(q, k, v, causal, window, doc_ids, scale, softcap)
    return attend(q, k, v, causal, window, doc_ids, scale, softcap, takes_hopper(q, causal, softcap))


def attention_portable(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, window: int | None = None, doc_ids: Tensor | None = None,
    scale: float | None = None, softcap: float | None = None,
) -> Tensor:
    """kernels_torch.attention by the kernels for every GPU from Ampere on, on Hopper too."""
    check(q, k, v, causal, window, doc_ids, scale, softcap)
    return attend(q, k, v, causal, window, doc_ids, scale, softcap, False)


def check(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, doc_ids: Tensor | None, scale: float | None,
    softcap: float | None,
) -> None:
    """What no backend takes, and what these kernels do not."""
    check_attention(q, k, v, causal, window, doc_ids, scale, softcap)
    if q.shape[-1] > WIDEST_HEAD:
        raise ValueError(f"heads may be at most {WIDEST_HEAD} wide, got {q.shape[-1]}")


def takes_hopper(q: Tensor, causal: bool, softcap: float | None) -> bool:
    """Whether the kernels for Hopper GPUs do it: the same for the same kind of inputs, on one GPU."""
    if INTERPRETED or not is_hopper(q.device):
        return False
    if supports is None:
        raise ValueError(f"attention on a Hopper GPU needs another Triton ({NO_GLUON}): take kernels.attention=triton_portable")
    return causal and softcap is None and supports(q)


def which_attention(device: torch.device, dtype: torch.dtype) -> str:
    """The rule of `takes_hopper` for people: it is printed when a run starts."""
    if takes_hopper(torch.empty((1, 1, 1, 64), dtype=dtype, device=device), True, None):
        return "its kernels for Hopper (heads of 8, 16 … 128, causal, no soft-cap; for the rest those for every GPU)"
    return "its kernels for every GPU"


def attend(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, doc_ids: Tensor | None, scale: float | None,
    softcap: float | None, on_hopper: bool,
) -> Tensor:
    blind = blind_queries(q.shape[1], k.shape[1], causal, window)
    if blind > 0:
        seeing = attend(q[:, blind:], k, v, causal, window, None, scale, softcap, on_hopper)
        return F.pad(seeing, (0, 0, 0, 0, blind, 0))
    if window is not None and window >= max(q.shape[1], k.shape[1]) - 1:
        window = None
    scale = max(q.shape[-1], 1) ** -0.5 if scale is None else float(scale)
    if scale < 0:  # the kernels know no negative one
        q, scale = -q, -scale
    softcap = softcap if softcap is None else float(softcap)
    return _Attention.apply(q, k, v, window, doc_ids, scale, causal, softcap, on_hopper)
