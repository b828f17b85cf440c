"""From hidden states to the loss:  z = x Wᵀ,  ẑ = softcap · tanh(z / softcap),  nll = logsumexp(ẑ) − ẑ[target].

With p = softmax(ẑ), for a row with weight w (the token's weight times the gradient that comes in, 0 where ignored):

    dz = w · (p − onehot) · (1 − (ẑ / softcap)²),   dx = dz W,   dW = Σ_rows dzᵀ x

A chunk of rows at a time: three products of N·D·V and, in the plain form, passes over the logits between them. cuBLAS does
the two products with dz, but what a chunk's logits become is E, where dz = scale · E and a row's `scale` is one number. It
never touches E: it goes into x for dW (x · scale is [rows, D]) and into dx at the very end. So

- `_capped_`: |ẑ| ≤ softcap, so E = (e − S · onehot) · (1 − (ẑ / softcap)²) with e = exp(ẑ) needs no maximum, and the sum
  S = Σ e goes into scale = w / S. E is therefore made where the product of a tile ends, before anything is stored; only
  the sum of each tile is kept beside it, and a small kernel finishes each row: S, the loss, and the element at the target.
- `_softmax_` (no soft-cap, or one too large for e, or another dtype or GPU than bf16 on Hopper): cuBLAS stores the logits, one
  pass over a row finds the log-sum-exp, a second one writes E = (p − onehot) · (1 − (ẑ / softcap)²), scale = w.

Without gradients the first stores no logits at all and the second stops after one pass.

"mean" and "sum" make both gradients already in forward, while the logits are there, with w = token_weights; backward only
multiplies them by the number that comes in (and divides by the count, which stays on the device). For "none" each token has
its own number, known in backward only: forward keeps nothing, backward makes the logits again.

What is stored of logits has the dtype of x, as in plain PyTorch; sums, losses and dW are fp32 (fp64 for fp64), dW over all
chunks. Chunks depend on shapes only and nothing is added by atomics: two runs give the same bits, and a row does not depend
on the others. A target outside the vocabulary makes its loss NaN: to raise would wait for the device.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels_torch.linear_cross_entropy import check_linear_cross_entropy
from kernels_torch.masters import add_product, check_masters, take_gradient, values_and_owners
from kernels_triton.autograd import differentiable_once
from kernels_triton.primitives import tanh

from kernels_triton.launch import (  # isort: skip
    Tile, ceil_div, check_gpu, is_hopper, launch, launch_with_descriptors, next_power_of_two,
)

try:
    from kernels_triton import hopper_matmul
except (ImportError, AttributeError):  # a Triton whose Gluon has other names
    hopper_matmul = None

LARGEST_FUSED_SOFTCAP = 40.0  # V · exp(ẑ) must stay a number in fp32 and bf16, which end at exp(88)

# Logits of one chunk. Each chunk reads and writes the fp32 dW once, and too few rows do not fill the GPU. Milliseconds over all
# chunks on an H200, bf16, each product alone: x Wᵀ / dz W / dW += dzᵀ x; the same over all rows at once, dW in bf16:
#     65536 × 768 × 32768    128 MiB  5.4 / 4.9 / 5.8    256 MiB  4.7 / 4.2 / 4.6    512 MiB  5.3 / 4.6 / 4.7    5.2 / 4.5 / 4.5
#     32768 × 1536 × 65536   128 MiB  9.7 / 9.0 / 14.6   256 MiB  9.4 / 8.8 / 11.0   512 MiB  10.0 / 9.4 / 10.0  10.0 / 9.4 / 9.3
# Both products with dz at once, on two streams: 8.8 and 19.2 at 256 MiB, 0 and 3 % less than one after the other.
CHUNK_BYTES = 256 * 2**20

# 4096 × 32768 logits without a cap 193 µs (4096 columns, 8 warps: 204; 8192, 16: 215; 2048, 4: 238), a copy of as much 131.
SOFTMAX = Tile(BT=1, BD=4096, warps=16)
TIMES = Tile(BT=4, BD=1024, warps=4)  # not measured yet


class Product(NamedTuple):
    """A tile of a matrix product: BT × BV of the result, BD of the sum at a time, GROUP tiles of rows together."""

    BT: int
    BV: int
    BD: int
    GROUP: int
    warps: int
    stages: int


# 4096 × 768 × 32768 and 2048 × 1536 × 65536 with the rows finished: 375 and 657 µs (GROUP 8: 403, 668; 16: 389, 660; 64: 376,
# 660). With GROUP 16: 8 warps 385, 659; 2 stages 384, 654; BD 32 in 4 stages 392, 712; 128 × 256 in 8 warps 418, 706; 256 ×
# 128 in 8 warps 437, 740; 128 × 64 486, 949. Two programs a processor, one of which multiplies while the other takes exp.
# cuBLAS and `_softmax_kernel` take 514 and 804, cuBLAS alone 294 and 562. Without gradients 333 and 625. From 321 terms of the
# sum on hopper_matmul.py does it, in three quarters of the time.
CAPPED_LOGITS = Product(BT=128, BV=128, BD=64, GROUP=32, warps=4, stages=3)


@triton.jit
def _finish_row(
    i_t, b_target, b_nll, b_scale, x, nll, scale, xs, stride_x, ignore_index, V,
    D: tl.constexpr, BD: tl.constexpr,
):
    """Store a row's loss and scale, and x · scale: all zero where the target is ignored."""
    b_counted = b_target != ignore_index
    b_known = (b_target >= 0) & (b_target < V)
    b_nll = tl.where(b_known, b_nll, float("nan"))
    tl.store(nll + i_t, tl.where(b_counted, b_nll, 0.0))
    if scale is not None:
        b_scale = tl.where(b_counted, b_scale, 0.0)
        tl.store(scale + i_t, b_scale)
    if xs is not None:
        for i_d in range(0, D, BD):
            o_d = i_d + tl.arange(0, BD)
            b_x = tl.load(x + i_t * stride_x + o_d, mask=o_d < D, other=0.0).to(nll.dtype.element_ty)     # [BD]
            tl.store(xs + i_t * D + o_d, (b_x * b_scale).to(xs.dtype.element_ty), mask=o_d < D)


@triton.jit
def _capped_logits_kernel(
    x, w, e, sums, N,
    V: tl.constexpr, Vp: tl.constexpr, D: tl.constexpr, C: tl.constexpr, FAST: tl.constexpr,
    BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr,
):
    """x [N, D] and w [Vp, D] → e [N, Vp] but for the targets, all three by descriptor, and sums [N, tiles of BV columns].

    GROUP tiles of rows go over the vocabulary together, so that w comes from memory once for all of them.
    """
    i_p, n_t, n_v = tl.program_id(0), tl.cdiv(N, BT), tl.cdiv(Vp, BV)
    i_g, i_r = i_p // (GROUP * n_v), i_p % (GROUP * n_v)
    n_g = tl.minimum(n_t - i_g * GROUP, GROUP)
    i_t, i_v = i_g * GROUP + i_r % n_g, i_r // n_g
    b_z = tl.zeros([BT, BV], dtype=tl.float32)                                                          # [BT, BV]
    for i_d in range(0, D, BD):
        b_x, b_w = x.load([i_t * BT, i_d]), w.load([i_v * BV, i_d])                                     # [BT, BD], [BV, BD]
        b_z = tl.dot(b_x, b_w.T, b_z, input_precision="ieee")
    b_t = tanh(b_z * (1 / C), FAST)
    b_e = tl.exp2((C * 1.4426950408889634) * b_t)                                                                   # [BT, BV]
    if Vp != V or Vp % BV != 0:
        b_e = tl.where((i_v * BV + tl.arange(0, BV) < V)[None, :], b_e, 0.0)
    o_t = i_t * BT + tl.arange(0, BT).to(tl.int64)
    tl.store(sums + o_t * n_v + i_v, tl.sum(b_e, 1), mask=o_t < N)
    if e is not None:
        e.store([i_t * BT, i_v * BV], (b_e * (1 - b_t * b_t)).to(e.dtype))


@triton.jit
def _capped_finish_kernel(
    e, sums, x, weight, targets, w, nll, scale, xs, stride_x, stride_weight, ignore_index,
    V: tl.constexpr, Vp: tl.constexpr, D: tl.constexpr, C: tl.constexpr, FAST: tl.constexpr,
    TILES: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):
    """What a row's end is needed for: its loss, its scale and its element of e at the target, whose logit is made again."""
    i_t = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, BS)
    b_s = tl.sum(tl.load(sums + i_t * TILES + o_s, mask=o_s < TILES, other=0.0), 0)
    b_target = tl.load(targets + i_t).to(tl.int64)
    b_known = (b_target >= 0) & (b_target < V)
    p_w = weight + tl.where(b_known, b_target, 0) * stride_weight
    b_z = tl.zeros([BD], dtype=nll.dtype.element_ty)                                                    # [BD]
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        b_x = tl.load(x + i_t * stride_x + o_d, mask=o_d < D, other=0.0).to(b_z.dtype)                  # [BD]
        b_z += b_x * tl.load(p_w + o_d, mask=o_d < D, other=0.0).to(b_z.dtype)
    b_t = tanh(tl.sum(b_z, 0) * (1 / C), FAST)
    if e is not None:
        b_e = (tl.exp2((C * 1.4426950408889634) * b_t) - b_s) * (1 - b_t * b_t)
        tl.store(e + i_t * Vp + b_target, b_e.to(e.dtype.element_ty), mask=b_known)
    b_w = 1.0
    if w is not None:
        b_w = tl.load(w + i_t)
    _finish_row(i_t, b_target, tl.log(b_s) - C * b_t, b_w / b_s, x, nll, scale, xs, stride_x, ignore_index, V, D, BD)


@triton.jit
def _softmax_kernel(
    z, x, targets, w, nll, scale, xs, stride_x, ignore_index,
    V: tl.constexpr, Vp: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
):
    """z [row, Vp] → its loss and, with `scale`, E in place. Each lane keeps a maximum and a sum of its own columns."""
    i_t = tl.program_id(0).to(tl.int64)
    FAST: tl.constexpr = z.dtype.element_ty == tl.bfloat16
    p_z = z + i_t * Vp
    b_target = tl.load(targets + i_t).to(tl.int64)
    b_known = (b_target >= 0) & (b_target < V)
    b_zt = tl.load(p_z + b_target, mask=b_known, other=0.0).to(nll.dtype.element_ty)
    if C is not None:
        b_zt = C * tanh(b_zt / C, FAST)
    b_max = tl.full([BV], -3e38, dtype=nll.dtype.element_ty)                                            # [BV]
    b_sum = tl.zeros([BV], dtype=nll.dtype.element_ty)                                                  # [BV]
    for i_v in range(0, Vp, BV):
        o_v = i_v + tl.arange(0, BV)
        b_z = tl.load(p_z + o_v, mask=o_v < Vp, other=0.0).to(b_sum.dtype)                              # [BV]
        if C is not None:
            b_z = C * tanh(b_z / C, FAST)
        b_z = tl.where(o_v < V, b_z, -float("inf"))
        b_d = b_z - b_max
        b_e = tl.exp(-tl.abs(b_d))  # of the smaller of the two, so that one exponential does
        b_sum = tl.where(b_d > 0, b_sum * b_e + 1, b_sum + b_e)
        b_max = tl.maximum(b_max, b_z)
    b_m = tl.max(b_max, 0)
    b_lse = b_m + tl.log(tl.sum(b_sum * tl.exp(b_max - b_m), 0))
    b_w = 1.0
    if scale is not None:
        if w is not None:
            b_w = tl.load(w + i_t)
        tl.debug_barrier()  # all warps have read the target's logit before one of them writes over it
        for i_v in range(0, Vp, BV):
            o_v = i_v + tl.arange(0, BV)
            b_z = tl.load(p_z + o_v, mask=o_v < Vp, other=0.0).to(b_sum.dtype)                          # [BV]
            if C is not None:
                b_t = tanh(b_z / C, FAST)
                b_z = C * b_t
            b_e = tl.exp(b_z - b_lse)                                                                   # [BV]
            b_e = tl.where(o_v == b_target, b_e - 1, b_e)
            if C is not None:
                b_e *= 1 - b_t * b_t
            tl.store(p_z + o_v, tl.where(o_v < V, b_e, 0.0).to(z.dtype.element_ty), mask=o_v < Vp)
    _finish_row(i_t, b_target, b_lse - b_zt, b_w, x, nll, scale, xs, stride_x, ignore_index, V, D, BD)


@triton.jit
def _times_kernel(
    x, rows, factor, y, T,
    D: tl.constexpr, ADD: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):
    """y = x · rows · factor; with ADD, y + that."""
    i_t, i_d = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_t, o_d = i_t * BT + tl.arange(0, BT), i_d * BD + tl.arange(0, BD)
    m = (o_t < T)[:, None] & (o_d < D)[None, :]
    b_f = 1.0
    if factor is not None:
        b_f = tl.load(factor)
    if rows is not None:
        b_f = (tl.load(rows + o_t, mask=o_t < T, other=0.0) * b_f)[:, None]                             # [BT, 1]
    b_x = tl.load(x + o_t[:, None] * D + o_d[None, :], mask=m, other=0.0).to(b_f.dtype)                 # [BT, BD]
    b_y = b_x * b_f                                                                                     # [BT, BD]
    if ADD:
        b_y += tl.load(y + o_t[:, None] * D + o_d[None, :], mask=m, other=0.0).to(b_y.dtype)
    tl.store(y + o_t[:, None] * D + o_d[None, :], b_y.to(y.dtype.element_ty), mask=m)


@torch.library.custom_op("kestrel::linear_cross_entropy", mutates_args=())
def loss_and_gradients(
    x: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor | None, vocab_size: int, softcap: float | None,
    ignore_index: int, needs_dx: bool, needs_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [N, D], weight [Vp, D], targets [N], row_weights [N] → nll [N], scale [N], dx / scale [N, D], dw [Vp, D] in fp32.

    What is not needed is empty. An operator of its own, because torch.compile would unroll the loop over chunks.
    """
    N, D = x.shape
    nll, scale, dx, dw = empty_results(x, weight, needs_dx, needs_dw)
    x, weight = as_matrix(x), as_matrix(weight)
    targets, row_weights = targets.contiguous(), row_weights if row_weights is None else row_weights.contiguous()
    fuse, needs_e = can_fuse(x, weight, softcap), needs_dx or needs_dw
    fill_losses = _losses_by_epilogue if fuse else _losses_by_passes
    rows = chunk_rows(N, weight.shape[0], x.element_size())
    z = x.new_empty(rows if needs_e or not fuse else 0, weight.shape[0])
    xs = x.new_empty(rows if needs_dw else 0, D)
    for i in range(0, N, rows):
        chunk = slice(i, min(i + rows, N))
        b_z, b_xs = z[: chunk.stop - i], xs[: chunk.stop - i]
        fill_losses(
            b_z, b_xs if needs_dw else None, x[chunk], weight, nll[chunk], scale[chunk] if needs_e else None,
            targets=targets[chunk], w=row_weights if row_weights is None else row_weights[chunk],
            V=vocab_size, C=softcap, ignore_index=ignore_index,
        )
        if needs_dx:
            torch.mm(b_z, weight, out=dx[chunk])
        if needs_dw:
            add_product(dw, b_z, b_xs, beta=int(i > 0))
    return nll, scale, dx, dw.zero_() if N == 0 else dw


@loss_and_gradients.register_fake
def empty_results(x: Tensor, weight: Tensor, *options: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs_dx, needs_dw = options[-2:]
    fp32 = torch.promote_types(x.dtype, torch.float32)
    nll = x.new_empty(x.shape[0], dtype=fp32)
    scale = torch.empty_like(nll if needs_dx or needs_dw else nll[:0])
    dx = x.new_empty(x.shape if needs_dx else 0)
    return nll, scale, dx, weight.new_empty(weight.shape if needs_dw else 0, dtype=fp32)


def _losses_by_passes(
    z: Tensor, xs: Tensor | None, x: Tensor, weight: Tensor, nll: Tensor, scale: Tensor | None, **row: object
) -> None:
    """Fill nll, and if there is a scale: scale, z with E, and xs with x · scale."""
    (N, D), Vp = x.shape, weight.shape[0]
    torch.mm(x, weight.mT, out=z)
    launch(
        _softmax_kernel, (N,), z=z, x=x, nll=nll, scale=scale, xs=xs, stride_x=x.stride(0), **row, Vp=Vp, D=D,
        BV=min(SOFTMAX.BD, next_power_of_two(Vp)), BD=row_block(D), num_warps=SOFTMAX.warps,
    )


def _losses_by_epilogue(
    z: Tensor, xs: Tensor | None, x: Tensor, weight: Tensor, nll: Tensor, scale: Tensor | None, *, V: int, C: float,
    **row: object,
) -> None:
    """The same, the logits being soft-capped and put into exp before they are stored. Without gradients nothing is."""
    (N, D), Vp = x.shape, weight.shape[0]
    vocabulary = dict(V=V, Vp=Vp, D=D, C=C, FAST=x.dtype == torch.bfloat16)
    e = None if scale is None else z
    if hopper_matmul is not None and hopper_matmul.takes(D, hopper_matmul.CAPPED_LOGITS):
        sums = hopper_matmul.capped_logits(x, weight, e, V, C)
    else:
        sums = _capped_logits(x, weight, e, **vocabulary)
    tiles = sums.shape[1]
    launch(
        _capped_finish_kernel, (N,), e=e, sums=sums, x=x, weight=weight, nll=nll,
        scale=scale, xs=xs, stride_x=x.stride(0), stride_weight=weight.stride(0), **row, **vocabulary,
        TILES=tiles, BS=next_power_of_two(tiles), BD=row_block(D), num_warps=4,
    )


def _capped_logits(x: Tensor, weight: Tensor, e: Tensor | None, **vocabulary: object) -> Tensor:
    """Fill e, if there is one, but for the targets → the sums of each tile's columns [N, tiles]."""
    tile = CAPPED_LOGITS
    n_t, n_v = ceil_div(x.shape[0], tile.BT), ceil_div(weight.shape[0], tile.BV)
    sums = x.new_empty(x.shape[0], n_v, dtype=torch.float32)
    launch_with_descriptors(
        _capped_logits_kernel, (n_t * n_v,), x.device,
        x=TensorDescriptor.from_tensor(x, [tile.BT, tile.BD]), w=TensorDescriptor.from_tensor(weight, [tile.BV, tile.BD]),
        e=e if e is None else TensorDescriptor.from_tensor(e, [tile.BT, tile.BV]), sums=sums, N=x.shape[0], **vocabulary,
        BT=tile.BT, BV=tile.BV, BD=tile.BD, GROUP=tile.GROUP, num_warps=tile.warps, num_stages=tile.stages,
    )
    return sums


def as_matrix(x: Tensor) -> Tensor:
    """With the values of each row next to each other, and rows that do not overlap."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def row_block(D: int) -> int:
    return min(1024, next_power_of_two(D))


def can_fuse(x: Tensor, weight: Tensor, softcap: float | None) -> bool:
    """bf16 on Hopper, soft-capped, every row beginning at a multiple of 16 bytes: what the copy engine needs."""
    if softcap is None or softcap > LARGEST_FUSED_SOFTCAP or x.dtype != torch.bfloat16:
        return False
    if not is_hopper(x.device):
        return False
    return all(n % 8 == 0 for n in (x.stride(0), weight.stride(0), *weight.shape, x.data_ptr() // 2, weight.data_ptr() // 2))


def chunk_rows(N: int, V: int, itemsize: int) -> int:
    """How many of N rows are worked on at a time: chunks of about one size, multiples of 128 where they are larger."""
    rows = max(CHUNK_BYTES // (V * itemsize), 1)
    if rows >= 128:
        even = ceil_div(N, ceil_div(N, rows // 128 * 128)) if N else 1
        rows = ceil_div(even, 128) * 128
    return min(rows, max(N, 1))


def times(
    x: Tensor, rows: Tensor | None, factor: Tensor | None, dtype: torch.dtype, total: Tensor | None = None
) -> Tensor:
    """x [T, D] · rows [T] · factor, rounded once, or `total` and that added to it. PyTorch's own product of two dtypes is far
    from the speed of memory."""
    T, D = x.shape
    if torch.compiler.is_compiling():  # which makes one kernel of it, too
        rows = 1 if rows is None else rows[:, None]
        return (x * (rows if factor is None else rows * factor)).to(dtype)
    y = torch.empty_like(x, dtype=dtype) if total is None else total
    if y.numel() > 0:
        launch(
            _times_kernel, (ceil_div(T, TIMES.BT), ceil_div(D, TIMES.BD)), x=x, rows=rows, factor=factor, y=y, T=T, D=D,
            ADD=total is not None, BT=TIMES.BT, BD=TIMES.BD, num_warps=TIMES.warps,
        )
    return y


class _PerToken(torch.autograd.Function):
    """nll [N]. Backward makes the logits again."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, owner: Tensor, targets: Tensor, *options: object
    ) -> Tensor:
        """options: vocab_size, softcap, ignore_index"""
        ctx.save_for_backward(x, weight, targets)
        ctx.owner, ctx.options = owner, options
        return loss_and_gradients(x, weight, targets, None, *options, False, False)[0]

    @staticmethod
    @differentiable_once
    def backward(ctx: FunctionCtx, d_nll: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, targets = ctx.saved_tensors
        needs_dx, _, needs_dw = ctx.needs_input_grad[:3]
        _, scale, dx, dw = loss_and_gradients(x, weight, targets, d_nll, *ctx.options, needs_dx, needs_dw)
        dx = times(dx, scale, None, x.dtype) if needs_dx else None
        return dx, None, in_owner(dw, None, ctx.owner) if needs_dw else None, None, None, None, None


class _Reduced(torch.autograd.Function):
    """Σ w · nll, divided by the number of targets that count if `mean`. Gradients are made in forward."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, owner: Tensor, targets: Tensor, token_weights: Tensor | None,
        mean: bool, vocab_size: int, softcap: float | None, ignore_index: int,
    ) -> Tensor:
        needs_dx, _, needs_dw, _, needs_d_token_weights = ctx.needs_input_grad[:5]
        counted = targets != ignore_index
        w = weights_that_count(token_weights, counted, x.dtype)
        nll, scale, dx, dw = loss_and_gradients(
            x, weight, targets, w, vocab_size, softcap, ignore_index, needs_dx, needs_dw,
        )
        loss, count = (nll if w is None else nll * w).sum(), counted.sum().clamp(min=1) if mean else None
        ctx.save_for_backward(scale, dx, dw, nll if needs_d_token_weights else None, count)
        ctx.owner, ctx.dtype = owner, x.dtype
        ctx.weights_dtype = None if token_weights is None else token_weights.dtype
        return loss / count if mean else loss

    @staticmethod
    @differentiable_once
    def backward(ctx: FunctionCtx, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        scale, dx, dw, nll, count = ctx.saved_tensors
        needs_dx, _, needs_dw, _, needs_d_token_weights = ctx.needs_input_grad[:5]
        factor = d_loss if count is None else d_loss / count
        return (
            times(dx, scale, factor, ctx.dtype) if needs_dx else None,
            None,
            in_owner(dw, factor, ctx.owner) if needs_dw else None,
            None,
            (nll * factor).to(ctx.weights_dtype) if needs_d_token_weights else None,
            None, None, None, None,
        )


def in_owner(dw: Tensor, factor: Tensor | None, owner: Tensor) -> Tensor:
    """dw · factor in the dtype of its owner, perhaps with what that one had before."""
    total = take_gradient(owner)
    if factor is None and total is None:
        return dw.to(owner.dtype)
    return times(dw, None, factor, owner.dtype, total)


def weights_that_count(token_weights: Tensor | None, counted: Tensor, dtype: torch.dtype) -> Tensor | None:
    """0 where the target is ignored, whatever stands there; at least fp32."""
    if token_weights is None:
        return None
    return torch.where(counted, token_weights, 0).to(torch.promote_types(dtype, torch.float32))


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    token_weights: Tensor | None = None,
    vocab_size: int | None = None,
    softcap: float | None = None,
    ignore_index: int = -1,
    reduction: str = "mean",
    master: Tensor | None = None,
) -> Tensor:
    """kernels_torch.linear_cross_entropy, with the gradients made while the logits are there.

    A target outside the vocabulary makes its loss NaN. Arguments: see kernels_torch.linear_cross_entropy.
    """
    vocab_size = weight.shape[0] if vocab_size is None else vocab_size
    check_linear_cross_entropy(x, weight, targets, token_weights, vocab_size, softcap, reduction)
    masters = None if master is None else (master,)
    check_masters((weight,), masters)
    check_gpu(x=x)
    options = (vocab_size, softcap if softcap is None else float(softcap), ignore_index)
    value, owner = values_and_owners((weight,), masters)
    differentiable = [tensor for tensor in (x, owner, token_weights) if tensor is not None]
    if reduction != "none" and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiable):
        return _Reduced.apply(x, value, owner, targets, token_weights, reduction == "mean", *options)
    nll, counted = _PerToken.apply(x, value, owner, targets, *options), targets != ignore_index
    loss = nll if token_weights is None else nll * weights_that_count(token_weights, counted, x.dtype)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / counted.sum().clamp(min=1)
