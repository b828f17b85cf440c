"""Softmax:  y = e / Σ e with e = exp(x − max(x)),   dx = y · (dy − Σ dy · y). Backward reads y.

Forward holds rows of up to 32768 values in registers, backward of up to 16384. Wider ones take the `_wide_` kernels, which
go over the row twice; there forward keeps maximum and sum of each column of its blocks and joins them at the end.

No row is shared by programs, so nothing depends on timing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kernels_torch.checks import check_rows
from kernels_triton.autograd import differentiable_once
from kernels_triton.launch import Tile, as_staged, check_gpu, launch, n_programs, tile_for
from kernels_triton.primitives import upcast
from kernels_triton.rows import count_rows, row_stride, with_rows

# Rows up to a width: values a thread, warps[, stages, programs that stay on a processor], as in launch.py. Not measured yet.
# Compiled for sm_90 none of the kernels spills in bf16.
FORWARD = {
    2048: (32, 4),
    4096: (32, 8),
    16384: (32, 16),
    32768: (32, 32, 2, 1),  # one row fills the registers of a processor, so the next one is fetched meanwhile
}
BACKWARD = {
    4096: (16, 4),
    16384: (32, 16),
}
WIDE = Tile(BT=1, BD=8192, warps=16)  # columns at a time; few programs a processor, so that L2 holds the rows they go over


@triton.jit
def _softmax_fwd_kernel(
    x, y, stride_x, T,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):
    o_d = tl.arange(0, BD).to(tl.int64)
    for i_t in tl.range(tl.program_id(0).to(tl.int64), tl.cdiv(T, BT), tl.num_programs(0), num_stages=STAGES):
        o_t = i_t * BT + tl.arange(0, BT)
        m = (o_t < T)[:, None] & (o_d < D)[None, :]
        b_x = upcast(tl.load(x + o_t[:, None] * stride_x + o_d[None, :], mask=m, other=-float("inf")))  # [BT, BD]
        b_e = tl.exp(b_x - tl.max(b_x, 1)[:, None])                                                     # [BT, BD]
        b_y = b_e * (1.0 / tl.sum(b_e, 1))[:, None]                                                     # [BT, BD]
        tl.store(y + o_t[:, None] * D + o_d[None, :], b_y.to(y.dtype.element_ty), mask=m)


@triton.jit
def _softmax_bwd_kernel(
    y, dy, dx, stride_dy, T,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):
    o_d = tl.arange(0, BD).to(tl.int64)
    for i_t in tl.range(tl.program_id(0).to(tl.int64), tl.cdiv(T, BT), tl.num_programs(0), num_stages=STAGES):
        o_t = i_t * BT + tl.arange(0, BT)
        m = (o_t < T)[:, None] & (o_d < D)[None, :]
        o_y = o_t[:, None] * D + o_d[None, :]
        b_y = upcast(tl.load(y + o_y, mask=m, other=0.0))                                               # [BT, BD]
        b_dy = upcast(tl.load(dy + o_t[:, None] * stride_dy + o_d[None, :], mask=m, other=0.0))         # [BT, BD]
        b_dx = b_y * (b_dy - tl.sum(b_dy * b_y, 1)[:, None])                                            # [BT, BD]
        tl.store(dx + o_y, b_dx.to(dx.dtype.element_ty), mask=m)


@triton.jit
def _softmax_wide_fwd_kernel(x, y, stride_x, D, BD: tl.constexpr):
    i_t = tl.program_id(0).to(tl.int64)
    acc = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    lowest = -1.7976931348623157e308 if acc == tl.float64 else -3.4028234663852886e38
    b_max = tl.full([BD], lowest, dtype=acc)  # finite, so that −inf less it is −inf                    # [BD]
    b_sum = tl.zeros([BD], dtype=acc)                                                                   # [BD]
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD).to(tl.int64)
        p_x = x + i_t * stride_x + o_d
        b_x = tl.load(p_x, mask=o_d < D, other=-float("inf"), eviction_policy="evict_last").to(acc)     # [BD]
        b_e = tl.exp(-tl.abs(b_x - b_max))  # of the two factors that bring sum and value to the new maximum, one is 1
        b_sum = tl.where(b_x > b_max, b_sum * b_e + 1.0, b_sum + b_e)
        b_max = tl.maximum(b_max, b_x)
    b_top = tl.max(b_max, 0)
    b_scale = 1.0 / tl.sum(b_sum * tl.exp(b_max - b_top), 0)
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD).to(tl.int64)
        p_x = x + i_t * stride_x + o_d
        b_x = tl.load(p_x, mask=o_d < D, other=-float("inf"), eviction_policy="evict_first").to(acc)    # [BD]
        tl.store(y + i_t * D + o_d, (tl.exp(b_x - b_top) * b_scale).to(y.dtype.element_ty), mask=o_d < D)


@triton.jit
def _softmax_wide_bwd_kernel(y, dy, dx, stride_dy, D, BD: tl.constexpr):
    i_t = tl.program_id(0).to(tl.int64)
    acc = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    b_sum = tl.zeros([BD], dtype=acc)                                                                   # [BD]
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD).to(tl.int64)
        b_y = tl.load(y + i_t * D + o_d, mask=o_d < D, other=0.0, eviction_policy="evict_last").to(acc)  # [BD]
        p_dy = dy + i_t * stride_dy + o_d
        b_sum += b_y * tl.load(p_dy, mask=o_d < D, other=0.0, eviction_policy="evict_last").to(acc)
    b_c = tl.sum(b_sum, 0)
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD).to(tl.int64)
        b_y = tl.load(y + i_t * D + o_d, mask=o_d < D, other=0.0, eviction_policy="evict_first").to(acc)  # [BD]
        p_dy = dy + i_t * stride_dy + o_d
        b_dy = tl.load(p_dy, mask=o_d < D, other=0.0, eviction_policy="evict_first").to(acc)            # [BD]
        tl.store(dx + i_t * D + o_d, (b_y * (b_dy - b_c)).to(dx.dtype.element_ty), mask=o_d < D)


def tile_of(D: int, itemsize: int, table: dict[int, tuple]) -> Tile | None:
    """None: too wide for registers."""
    return as_staged(tile_for(D, table, values=32), itemsize, tensors=1) if max(table) >= D else None


def _softmax_fwd(x: Tensor) -> Tensor:
    D, T = x.shape[-1], count_rows(x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    tile = tile_of(D, x.element_size(), FORWARD)
    if T == 0:
        return y
    if tile is None:
        launch(
            _softmax_wide_fwd_kernel, (T,), x=x, y=y, stride_x=row_stride(x), D=D, BD=WIDE.BD, num_warps=WIDE.warps
        )
    else:
        launch(
            _softmax_fwd_kernel, (n_programs(T, tile, x.device),), x=x, y=y, stride_x=row_stride(x), T=T, D=D,
            BT=tile.BT, BD=tile.BD, STAGES=tile.stages, num_warps=tile.warps,
        )
    return y


def _softmax_bwd(y: Tensor, dy: Tensor) -> Tensor:
    """y contiguous."""
    D, T = y.shape[-1], count_rows(y)
    dx = torch.empty_like(y)
    tile = tile_of(D, y.element_size(), BACKWARD)
    if T == 0:
        return dx
    if tile is None:
        launch(
            _softmax_wide_bwd_kernel, (T,), y=y, dy=dy, dx=dx, stride_dy=row_stride(dy), D=D, BD=WIDE.BD,
            num_warps=WIDE.warps,
        )
    else:
        launch(
            _softmax_bwd_kernel, (n_programs(T, tile, y.device),), y=y, dy=dy, dx=dx, stride_dy=row_stride(dy), T=T,
            D=D, BT=tile.BT, BD=tile.BD, STAGES=tile.stages, num_warps=tile.warps,
        )
    return dx


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        rows = with_rows(x)
        y = _softmax_fwd(rows)
        y = y if rows is x else y.view(x.shape)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: FunctionCtx, dy: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return _softmax_bwd(y, with_rows(dy))


def softmax(x: Tensor) -> Tensor:
    """kernels_torch.softmax, in one pass over all but very wide rows. Arguments: see kernels_torch.softmax."""
    check_rows("softmax", x)
    check_gpu(x=x)
    return _Softmax.apply(x)
