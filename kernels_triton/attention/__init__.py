"""Causal attention of whole rows, without a matrix of scores in memory.

    s = scale · q kᵀ where the query sees the key,   lse = log Σ exp(s),   p = exp(s − lse),   out = p v

Backward, with the gradient do of out:

    δ = Σ_d do · out,   dv = pᵀ do,   ds = p ∘ (do vᵀ − δ),   dq = scale · ds k,   dk = scale · dsᵀ q

    forward.py      out and lse, a program for each tile of queries
    backward.py     δ; dq, a program for each tile of queries; dk and dv, a program for each tile of keys
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
from torch.autograd.function import FunctionCtx, once_differentiable

from kernels_torch.attention import check_attention
from kernels_triton.attention.backward import _attention_bwd
from kernels_triton.attention.forward import _attention_fwd
from kernels_triton.attention.tiles import WIDEST_HEAD


def heads_side_by_side(x: Tensor) -> Tensor:
    """The values of a head next to each other; heads, tokens and rows may be far apart."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, window: int | None, doc_ids: Tensor | None, scale: float
    ) -> Tensor:
        q, k, v = heads_side_by_side(q), heads_side_by_side(k), heads_side_by_side(v)
        out, lse = _attention_fwd(q, k, v, window, doc_ids, scale)
        ctx.save_for_backward(q, k, v, out, lse, doc_ids)
        ctx.window, ctx.scale = window, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, doc_ids = ctx.saved_tensors
        dout = heads_side_by_side(dout)
        grads = _attention_bwd(q, k, v, out, lse, dout, ctx.window, doc_ids, ctx.scale, *ctx.needs_input_grad[:3])
        return *grads, None, None, None


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, doc_ids: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """kernels_torch.attention, tile by tile."""
    check_attention(q, k, v, window, doc_ids)
    D = q.shape[-1]
    if D > WIDEST_HEAD:
        raise ValueError(f"heads may be at most {WIDEST_HEAD} wide, got {D}")
    if window is not None and window >= k.shape[1] - 1:
        window = None
    scale = max(D, 1) ** -0.5 if scale is None else float(scale)
    return _Attention.apply(q if scale >= 0 else -q, k, v, window, doc_ids, abs(scale))  # kernels know no negative scale
