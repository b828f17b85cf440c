"""RMS norm:  y = x · r · w,   r = 1 / sqrt(mean(x²) + eps).

Backward, with g = dy · w:   dx = r · (g − x · r² · mean(g · x)),   dw = Σ_rows dy · x · r.

Forward reads x and writes y; backward reads x and dy and writes dx: 2 and 3 passes over memory, which is all the time
either takes. With a weight, forward keeps r [T] in fp32 (fp64 for fp64 input) for backward, which has enough to hold in its
registers; without, backward makes it again, and forward saves 0.6 µs on the GPU and a buffer on the host.

For dw each program adds up its own rows in registers and stores the sum in its own line of a [programs, D] buffer; a
second kernel sums the lines, and starts while the first ends where the GPU can do that. There are no atomics, so two runs
give the same bits. What of x, y and dx is to stay in the L2 cache is left to the GPU: `evict_first` on x cost forward 1 to
3 % on an H200, and what `evict_last` on y saved was paid by the next kernel.

Rows too wide for the registers of one program take the `_wide_` kernels at the end: they go over each row twice in blocks
of columns, and sum dw in a pass of its own.

Rows may lie any distance apart; rows whose own values do not lie side by side are copied first, so that every load is
one of whole 16-byte words. Strides are plain integers, since torch.compile takes no tuples as arguments of a kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kernels_torch.rmsnorm import check_rmsnorm

from kernels_triton.launch import (  # isort: skip
    WIDEST_BLOCK, Tile, as_staged, can_overlap, ceil_div, check_gpu, launch, n_programs, resident_programs,
    rmsnorm_bwd_tile, rmsnorm_fwd_tile,
)
from kernels_triton.autograd import differentiable_once
from kernels_triton.rows import accumulated_in, count_rows, row_stride, sum_lines, with_rows

WIDE = Tile(BT=1, BD=4096, warps=8)       # columns at a time of a wide row; not measured yet
WIDE_DW = Tile(BT=16, BD=256, warps=4, stay=4)  # rows × columns at a time of dw; not measured yet


@triton.jit
def _rmsnorm_fwd_kernel(
    x, w, y, r, stride_x, T,
    D: tl.constexpr, eps: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    i_t = tl.program_id(0).to(tl.int64)
    o_t, o_d = i_t * BT + tl.arange(0, BT), tl.arange(0, BD)
    m_t, m_d = o_t < T, o_d < D
    m = m_t[:, None] & m_d[None, :]
    b_x = tl.load(x + o_t[:, None] * stride_x + o_d[None, :], mask=m, other=0.0).to(ACC)                # [BT, BD]
    if w is not None:  # asked for before the sum, so that it comes meanwhile
        b_w = tl.load(w + o_d, mask=m_d, other=0.0, eviction_policy="evict_last").to(ACC)               # [BD]
    b_r = tl.rsqrt(tl.sum(b_x * b_x, 1) / D + eps)                                                      # [BT]
    b_y = b_x * b_r[:, None]                                                                            # [BT, BD]
    if w is not None:
        b_y *= b_w[None, :]
    tl.store(y + o_t[:, None] * D + o_d[None, :], b_y.to(y.dtype.element_ty), mask=m)
    if r is not None:
        tl.store(r + o_t, b_r, mask=m_t)


@triton.jit
def _rmsnorm_bwd_kernel(
    x, w, r, dy, ds, dx, dw, stride_x, stride_dy, stride_ds, T,
    D: tl.constexpr, eps: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):
    """ds [T, D] is added to dx: the gradient that x has from elsewhere."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    i_p, n_p = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    if w is not None:
        b_w = tl.load(w + o_d, mask=m_d, other=0.0).to(ACC)                                             # [BD]
    if dw is not None:
        b_dw = tl.zeros([BT, BD], dtype=ACC)                                                            # [BT, BD]
    for i_t in tl.range(i_p, tl.cdiv(T, BT), n_p, num_stages=STAGES):
        o_t = i_t * BT + tl.arange(0, BT)
        m_t = o_t < T
        m = m_t[:, None] & m_d[None, :]
        b_x = tl.load(x + o_t[:, None] * stride_x + o_d[None, :], mask=m, other=0.0).to(ACC)            # [BT, BD]
        b_dy = tl.load(dy + o_t[:, None] * stride_dy + o_d[None, :], mask=m, other=0.0).to(ACC)         # [BT, BD]
        if ds is not None:
            b_ds = tl.load(ds + o_t[:, None] * stride_ds + o_d[None, :], mask=m, other=0.0).to(ACC)     # [BT, BD]
        if r is not None:
            b_r = tl.load(r + o_t, mask=m_t, other=0.0)                                                 # [BT]
        else:
            b_r = tl.rsqrt(tl.sum(b_x * b_x, 1) / D + eps)                                              # [BT]
        b_xr = b_x * b_r[:, None]                                                                       # [BT, BD]
        if dw is not None:
            b_dw += b_dy * b_xr
        if dx is not None:
            b_g = b_dy
            if w is not None:
                b_g = b_dy * b_w[None, :]
            b_c = tl.sum(b_g * b_x, 1) * b_r / D                                                        # [BT]
            b_dx = (b_g - b_xr * b_c[:, None]) * b_r[:, None]                                           # [BT, BD]
            if ds is not None:
                b_dx += b_ds
            tl.store(dx + o_t[:, None] * D + o_d[None, :], b_dx.to(dx.dtype.element_ty), mask=m)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    if dw is not None:
        tl.store(dw + i_p * D + o_d, tl.sum(b_dw, 0), mask=m_d)


@triton.jit
def _rmsnorm_wide_fwd_kernel(
    x, w, y, stride_x,
    D: tl.constexpr, eps: tl.constexpr, BD: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    i_t = tl.program_id(0).to(tl.int64)
    b_sum = tl.zeros([BD], dtype=ACC)                                                                   # [BD]
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        b_x = tl.load(x + i_t * stride_x + o_d, mask=o_d < D, other=0.0, eviction_policy="evict_last").to(ACC)  # [BD]
        b_sum += b_x * b_x
    b_r = tl.rsqrt(tl.sum(b_sum, 0) / D + eps)
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        m_d = o_d < D
        b_x = tl.load(x + i_t * stride_x + o_d, mask=m_d, other=0.0, eviction_policy="evict_first")     # [BD]
        b_y = b_x.to(ACC) * b_r                                                                         # [BD]
        if w is not None:
            b_y *= tl.load(w + o_d, mask=m_d, other=0.0).to(ACC)
        tl.store(y + i_t * D + o_d, b_y.to(y.dtype.element_ty), mask=m_d)


@triton.jit
def _rmsnorm_wide_dx_kernel(
    x, w, r, dy, ds, dx, stride_x, stride_dy, stride_ds,
    D: tl.constexpr, eps: tl.constexpr, BD: tl.constexpr,
):
    """dx where it is needed, and r [T] for dw."""
    i_t = tl.program_id(0).to(tl.int64)
    b_xx = tl.zeros([BD], dtype=r.dtype.element_ty)                                                     # [BD]
    b_gx = tl.zeros([BD], dtype=r.dtype.element_ty)                                                     # [BD]
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        m_d = o_d < D
        b_x = tl.load(x + i_t * stride_x + o_d, mask=m_d, other=0.0).to(b_xx.dtype)                     # [BD]
        b_xx += b_x * b_x
        if dx is not None:
            b_g = tl.load(dy + i_t * stride_dy + o_d, mask=m_d, other=0.0).to(b_gx.dtype)               # [BD]
            if w is not None:
                b_g *= tl.load(w + o_d, mask=m_d, other=0.0).to(b_g.dtype)
            b_gx += b_g * b_x
    b_r = tl.rsqrt(tl.sum(b_xx, 0) / D + eps)
    tl.store(r + i_t, b_r)
    if dx is not None:
        b_c = tl.sum(b_gx, 0) * b_r / D
        for i_d in range(0, D, BD):
            o_d = i_d + tl.arange(0, BD)
            m_d = o_d < D
            b_x = tl.load(x + i_t * stride_x + o_d, mask=m_d, other=0.0).to(b_xx.dtype)                 # [BD]
            b_g = tl.load(dy + i_t * stride_dy + o_d, mask=m_d, other=0.0).to(b_gx.dtype)               # [BD]
            if w is not None:
                b_g *= tl.load(w + o_d, mask=m_d, other=0.0).to(b_g.dtype)
            b_dx = (b_g - b_x * b_r * b_c) * b_r                                                        # [BD]
            if ds is not None:
                b_dx += tl.load(ds + i_t * stride_ds + o_d, mask=m_d, other=0.0).to(b_dx.dtype)
            tl.store(dx + i_t * D + o_d, b_dx.to(dx.dtype.element_ty), mask=m_d)


@triton.jit
def _rmsnorm_wide_dw_kernel(
    x, r, dy, dw, stride_x, stride_dy, T,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):
    i_d, i_p, n_p = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    o_d = i_d * BD + tl.arange(0, BD)
    m_d = o_d < D
    b_dw = tl.zeros([BT, BD], dtype=r.dtype.element_ty)                                                 # [BT, BD]
    for i_t in range(i_p, tl.cdiv(T, BT), n_p):
        o_t = i_t * BT + tl.arange(0, BT)
        m = (o_t < T)[:, None] & m_d[None, :]
        b_x = tl.load(x + o_t[:, None] * stride_x + o_d[None, :], mask=m, other=0.0)                    # [BT, BD]
        b_dy = tl.load(dy + o_t[:, None] * stride_dy + o_d[None, :], mask=m, other=0.0)                 # [BT, BD]
        b_r = tl.load(r + o_t, mask=o_t < T, other=0.0)                                                 # [BT]
        b_dw += b_dy.to(b_dw.dtype) * (b_x.to(b_dw.dtype) * b_r[:, None])
    tl.store(dw + i_p * D + o_d, tl.sum(b_dw, 0), mask=m_d)


def _rmsnorm_fwd(x: Tensor, w: Tensor | None, eps: float) -> tuple[Tensor, Tensor | None]:
    """x [..., D] → y of its shape, and r [T] where backward wants it."""
    D, T = x.shape[-1], count_rows(x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    r = kept_r(x, w)
    if T == 0:
        return y, r
    if D > WIDEST_BLOCK:
        launch(
            _rmsnorm_wide_fwd_kernel, (T,), x=x, w=w, y=y, stride_x=row_stride(x), D=D, eps=eps, BD=WIDE.BD,
            num_warps=WIDE.warps,
        )
    else:
        tile = rmsnorm_fwd_tile(D)
        launch(
            _rmsnorm_fwd_kernel, (ceil_div(T, tile.BT),), x=x, w=w, y=y, r=r, stride_x=row_stride(x), T=T, D=D, eps=eps,
            BT=tile.BT, BD=tile.BD, num_warps=tile.warps,
        )
    return y, r


def kept_r(x: Tensor, w: Tensor | None) -> Tensor | None:
    """An empty r [T] to keep for backward; None where backward makes it again."""
    if w is None or x.shape[-1] > WIDEST_BLOCK:
        return None
    return torch.empty(count_rows(x), dtype=accumulated_in(x), device=x.device)


def _rmsnorm_bwd(
    x: Tensor, w: Tensor | None, r: Tensor | None, dy: Tensor, ds: Tensor | None, eps: float, needs_dx: bool, needs_dw: bool
) -> tuple[Tensor | None, Tensor | None]:
    """x, dy, ds [..., D] → dx of the shape of x, with ds added where there is one, and dw [D]; None when not needed."""
    D, T = x.shape[-1], count_rows(x)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_dx else None
    if D > WIDEST_BLOCK:
        return dx, _rmsnorm_wide_bwd(x, w, dy, ds, eps, dx, needs_dw)
    tile = rmsnorm_bwd_tile(D, x.element_size(), needs_dw)
    if ds is not None:
        tile = as_staged(tile, x.element_size(), tensors=3)
    programs = n_programs(T, tile, x.device)
    lines = torch.empty((programs, D), dtype=accumulated_in(x), device=x.device) if needs_dw else None
    overlap = needs_dw and can_overlap(x.device)
    if T > 0:
        launch(
            _rmsnorm_bwd_kernel, (programs,), x=x, w=w, r=r, dy=dy, ds=ds, dx=dx, dw=lines, stride_x=row_stride(x),
            stride_dy=row_stride(dy), stride_ds=row_stride(ds), T=T, D=D, eps=eps, BT=tile.BT, BD=tile.BD,
            STAGES=tile.stages, OVERLAP=overlap, num_warps=tile.warps,
        )
    return dx, sum_lines(lines, w.dtype, overlap) if needs_dw else None


def _rmsnorm_wide_bwd(
    x: Tensor, w: Tensor | None, dy: Tensor, ds: Tensor | None, eps: float, dx: Tensor | None, needs_dw: bool
) -> Tensor | None:
    """Fill dx if there is one; → dw [D] or None."""
    D, T = x.shape[-1], count_rows(x)
    r = torch.empty(T, dtype=accumulated_in(x), device=x.device)
    strides = dict(stride_x=row_stride(x), stride_dy=row_stride(dy))
    if T > 0:
        launch(
            _rmsnorm_wide_dx_kernel, (T,), x=x, w=w, r=r, dy=dy, ds=ds, dx=dx, **strides, stride_ds=row_stride(ds),
            D=D, eps=eps, BD=WIDE.BD, num_warps=WIDE.warps,
        )
    if not needs_dw:
        return None
    columns = ceil_div(D, WIDE_DW.BD)
    n_lines = min(ceil_div(resident_programs(x.device, WIDE_DW.stay), columns), ceil_div(T, WIDE_DW.BT))
    lines = torch.empty((n_lines, D), dtype=r.dtype, device=x.device)
    if T > 0:
        launch(
            _rmsnorm_wide_dw_kernel, (columns, n_lines), x=x, r=r, dy=dy, dw=lines, **strides, T=T, D=D,
            BT=WIDE_DW.BT, BD=WIDE_DW.BD, num_warps=WIDE_DW.warps,
        )
    return sum_lines(lines, w.dtype)


class _RMSNorm(torch.autograd.Function):
    """Reshapes inside, where autograd does not have to record it."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, w: Tensor | None, eps: float) -> Tensor:
        rows = with_rows(x)
        y, r = _rmsnorm_fwd(rows, w, eps)
        ctx.save_for_backward(rows, w, r)
        ctx.eps = eps
        return y if rows is x else y.view(x.shape)

    @staticmethod
    @differentiable_once
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, w, r = ctx.saved_tensors
        dx, dw = _rmsnorm_bwd(rows, w, r, with_rows(dy), None, ctx.eps, *ctx.needs_input_grad[:2])
        return dx if dx is None else dx.view(dy.shape), dw, None


def rmsnorm(x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """kernels_torch.rmsnorm, in one pass over x. Arguments: see kernels_torch.rmsnorm."""
    check_rmsnorm(x, weight, eps)
    check_gpu(x=x)
    return _RMSNorm.apply(x, weight if weight is None else weight.contiguous(), float(eps))
