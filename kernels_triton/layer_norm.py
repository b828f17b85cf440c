"""Layer norm:  y = (x − mean) · r · w + b,   r = 1 / sqrt(mean((x − mean)²) + eps).

Backward, with n = (x − mean) · r and g = dy · w:   dx = r · (g − mean(g) − n · mean(g · n)),   dw = Σ_rows dy · n,
db = Σ_rows dy.

Forward reads x and writes y; the row stays in registers meanwhile, so that the variance can be taken around the mean
(E[x²] − E[x]² would lose its digits where the mean is large), and the mean, too, a second time: what rounding took from
it is the mean of what is left. Forward keeps mean and r [T] in fp32 (fp64 for fp64 input) for backward, which reads x and
dy and writes dx. dw and db are summed as rows.py says: each program adds up its own rows and stores the two sums in its
own lines, a second kernel sums the lines in one order, so two runs give the same bits.

Rows too wide for the registers of one program take the `_wide_` kernels: they go over each row twice in blocks of
columns and sum dw and db in a pass of their own. Forward joins the means and squares of the blocks by Chan, Golub and
LeVeque's formula, http://i.stanford.edu/pub/cstr/reports/cs/tr/79/773/CS-TR-79-773.pdf.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kernels_torch.layer_norm import check_layer_norm

from kernels_triton.launch import (  # isort: skip
    SUM_LINES, Tile, as_staged, can_overlap, ceil_div, check_gpu, launch, n_programs, resident_programs, tile_for,
)
from kernels_triton.autograd import differentiable_once
from kernels_triton.rows import accumulated_in, count_rows, row_stride, sum_of_lines, with_rows

# Rows up to a width: values a thread, warps[, stages, programs that stay on a processor]. Not measured yet: the rows that
# were fastest for rmsnorm (launch.py), narrower ones where a second sum takes more registers. Compiled for sm_90 backward
# takes 96 registers at 768 columns, 114 at 1600 and 109 at 4096, and spills none.
FORWARD = {
    3072: (32, 4),
    4096: (32, 16),
}
BACKWARD = {          # dx alone: dealt out by the GPU
    4096: (16, 4),
}
BACKWARD_WITH_SUMS = {  # dw, db or both as well
    2048: (16, 4, 4, 3),
    4096: (16, 8, 4, 2),
}
WIDEST_FORWARD = 16384   # x of a row in registers
WIDEST_BACKWARD = 8192   # x, dy, w, dw and db
WIDE = Tile(BT=1, BD=4096, warps=8)               # columns at a time of a wide row; not measured yet
WIDE_SUMS = Tile(BT=16, BD=256, warps=4, stay=4)  # rows × columns at a time of dw and db; not measured yet


@triton.jit
def _layer_norm_fwd_kernel(
    x, w, b, y, mean, r, stride_x, T,
    D: tl.constexpr, eps: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    o_t, o_d = i_t * BT + tl.arange(0, BT), tl.arange(0, BD).to(tl.int64)
    m_t, m_d = o_t < T, o_d < D
    m = m_t[:, None] & m_d[None, :]
    p_x = x + o_t[:, None] * stride_x + o_d[None, :]
    b_x = tl.load(p_x, mask=m, other=0.0).to(r.dtype.element_ty)                                        # [BT, BD]
    if w is not None:  # asked for before the sums, so that they come meanwhile
        b_w = tl.load(w + o_d, mask=m_d, other=0.0, eviction_policy="evict_last").to(r.dtype.element_ty)  # [BD]
    if b is not None:
        b_b = tl.load(b + o_d, mask=m_d, other=0.0, eviction_policy="evict_last").to(r.dtype.element_ty)  # [BD]
    b_mean = tl.sum(b_x, 1) / D                                                                         # [BT]
    b_x = tl.where(m_d[None, :], b_x - b_mean[:, None], 0.0)                                            # [BT, BD]
    b_rest = tl.sum(b_x, 1) / D  # what rounding has taken from the mean                                # [BT]
    b_r = tl.rsqrt(tl.sum(b_x * b_x, 1) / D - b_rest * b_rest + eps)                                    # [BT]
    b_y = (b_x - b_rest[:, None]) * b_r[:, None]                                                        # [BT, BD]
    if w is not None:
        b_y *= b_w[None, :]
    if b is not None:
        b_y += b_b[None, :]
    tl.store(y + o_t[:, None] * D + o_d[None, :], b_y.to(y.dtype.element_ty), mask=m)
    tl.store(mean + o_t, b_mean + b_rest, mask=m_t)
    tl.store(r + o_t, b_r, mask=m_t)


@triton.jit
def _layer_norm_bwd_kernel(
    x, w, mean, r, dy, dx, dw, db, stride_x, stride_dy, T,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):
    i_p, n_p = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    o_d = tl.arange(0, BD).to(tl.int64)
    m_d = o_d < D
    if w is not None:
        b_w = tl.load(w + o_d, mask=m_d, other=0.0).to(r.dtype.element_ty)                              # [BD]
    if dw is not None:
        b_dw = tl.zeros([BT, BD], dtype=r.dtype.element_ty)                                             # [BT, BD]
    if db is not None:
        b_db = tl.zeros([BT, BD], dtype=r.dtype.element_ty)                                             # [BT, BD]
    for i_t in tl.range(i_p, tl.cdiv(T, BT), n_p, num_stages=STAGES):
        o_t = i_t * BT + tl.arange(0, BT)
        m_t = o_t < T
        m = m_t[:, None] & m_d[None, :]
        p_x = x + o_t[:, None] * stride_x + o_d[None, :]
        p_dy = dy + o_t[:, None] * stride_dy + o_d[None, :]
        b_x = tl.load(p_x, mask=m, other=0.0).to(r.dtype.element_ty)                                    # [BT, BD]
        b_dy = tl.load(p_dy, mask=m, other=0.0).to(r.dtype.element_ty)                                  # [BT, BD]
        b_mean = tl.load(mean + o_t, mask=m_t, other=0.0)                                               # [BT]
        b_r = tl.load(r + o_t, mask=m_t, other=0.0)                                                     # [BT]
        b_n = (b_x - b_mean[:, None]) * b_r[:, None]  # where there is no column, dy is 0               # [BT, BD]
        if dw is not None:
            b_dw += b_dy * b_n
        if db is not None:
            b_db += b_dy
        if dx is not None:
            b_g = b_dy
            if w is not None:
                b_g = b_dy * b_w[None, :]
            b_c = tl.sum(b_g * b_n, 1) / D                                                              # [BT]
            b_dx = (b_g - (tl.sum(b_g, 1) / D)[:, None] - b_n * b_c[:, None]) * b_r[:, None]            # [BT, BD]
            tl.store(dx + o_t[:, None] * D + o_d[None, :], b_dx.to(dx.dtype.element_ty), mask=m)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    if dw is not None:
        tl.store(dw + i_p * D + o_d, tl.sum(b_dw, 0), mask=m_d)
    if db is not None:
        tl.store(db + i_p * D + o_d, tl.sum(b_db, 0), mask=m_d)


@triton.jit
def _sum_both_kernel(
    dw_lines, db_lines, dw, db, T,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, OVERLAP: tl.constexpr,
):
    """dw and db [D] = Σ of their lines [T, D], in one order whatever the timing; axis 1 of the grid says which of them."""
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    if OVERLAP:  # this kernel may have been started early: what it reads is there only now
        tl.extra.cuda.gdc_wait()
    if dw is not None:  # noqa: SIM102  this is known when compiling, what follows is not
        if tl.program_id(1) == 0:
            b_dw = sum_of_lines(dw_lines, o_d, T, D, BT, BD)                                            # [BD]
            tl.store(dw + o_d, b_dw.to(dw.dtype.element_ty), mask=o_d < D)
    if db is not None:  # noqa: SIM102
        if tl.program_id(1) == tl.num_programs(1) - 1:
            b_db = sum_of_lines(db_lines, o_d, T, D, BT, BD)                                            # [BD]
            tl.store(db + o_d, b_db.to(db.dtype.element_ty), mask=o_d < D)


@triton.jit
def _layer_norm_wide_fwd_kernel(
    x, w, b, y, mean, r, stride_x,
    D: tl.constexpr, eps: tl.constexpr, BD: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    b_mean = tl.zeros([], dtype=r.dtype.element_ty)
    b_rest = tl.zeros([], dtype=r.dtype.element_ty)    # what rounding has taken from the mean
    b_square = tl.zeros([], dtype=r.dtype.element_ty)  # Σ (x − mean)² of the columns so far
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD).to(tl.int64)
        m_d = o_d < D
        p_x = x + i_t * stride_x + o_d
        b_x = tl.load(p_x, mask=m_d, other=0.0, eviction_policy="evict_last").to(b_mean.dtype)          # [BD]
        n = tl.sum(m_d.to(b_mean.dtype), 0)
        b_share = n / (i_d + n)  # of this block in the columns so far
        b_block_mean = tl.sum(b_x, 0) / n
        b_x = tl.where(m_d, b_x - b_block_mean, 0.0)                                                    # [BD]
        b_block_rest = tl.sum(b_x, 0) / n
        b_ahead, b_rest_ahead = b_block_mean - b_mean, b_block_rest - b_rest
        b_square += tl.sum(b_x * b_x, 0) - n * b_block_rest * b_block_rest
        b_square += (b_ahead + b_rest_ahead) * (b_ahead + b_rest_ahead) * (i_d * b_share)
        b_step = b_ahead * b_share
        b_next = b_mean + b_step
        b_rest += b_rest_ahead * b_share + (b_step - (b_next - b_mean))
        b_mean = b_next
    b_r = tl.rsqrt(b_square / D + eps)
    tl.store(mean + i_t, b_mean + b_rest)
    tl.store(r + i_t, b_r)
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD).to(tl.int64)
        m_d = o_d < D
        p_x = x + i_t * stride_x + o_d
        b_x = tl.load(p_x, mask=m_d, other=0.0, eviction_policy="evict_first").to(b_mean.dtype)         # [BD]
        b_y = (b_x - b_mean - b_rest) * b_r                                                             # [BD]
        if w is not None:
            b_y *= tl.load(w + o_d, mask=m_d, other=0.0).to(b_y.dtype)
        if b is not None:
            b_y += tl.load(b + o_d, mask=m_d, other=0.0).to(b_y.dtype)
        tl.store(y + i_t * D + o_d, b_y.to(y.dtype.element_ty), mask=m_d)


@triton.jit
def _layer_norm_wide_dx_kernel(
    x, w, mean, r, dy, dx, stride_x, stride_dy,
    D: tl.constexpr, BD: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    b_mean, b_r = tl.load(mean + i_t), tl.load(r + i_t)
    b_g_sum = tl.zeros([BD], dtype=r.dtype.element_ty)                                                  # [BD]
    b_gn_sum = tl.zeros([BD], dtype=r.dtype.element_ty)                                                 # [BD]
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD).to(tl.int64)
        m_d = o_d < D
        b_x = tl.load(x + i_t * stride_x + o_d, mask=m_d, other=0.0).to(b_g_sum.dtype)                  # [BD]
        b_g = tl.load(dy + i_t * stride_dy + o_d, mask=m_d, other=0.0).to(b_g_sum.dtype)                # [BD]
        if w is not None:
            b_g *= tl.load(w + o_d, mask=m_d, other=0.0).to(b_g.dtype)
        b_g_sum += b_g
        b_gn_sum += b_g * ((b_x - b_mean) * b_r)
    b_g_mean, b_c = tl.sum(b_g_sum, 0) / D, tl.sum(b_gn_sum, 0) / D
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD).to(tl.int64)
        m_d = o_d < D
        b_x = tl.load(x + i_t * stride_x + o_d, mask=m_d, other=0.0).to(b_g_sum.dtype)                  # [BD]
        b_g = tl.load(dy + i_t * stride_dy + o_d, mask=m_d, other=0.0).to(b_g_sum.dtype)                # [BD]
        if w is not None:
            b_g *= tl.load(w + o_d, mask=m_d, other=0.0).to(b_g.dtype)
        b_dx = (b_g - b_g_mean - (b_x - b_mean) * b_r * b_c) * b_r                                      # [BD]
        tl.store(dx + i_t * D + o_d, b_dx.to(dx.dtype.element_ty), mask=m_d)


@triton.jit
def _layer_norm_wide_sums_kernel(
    x, mean, r, dy, dw, db, stride_x, stride_dy, T,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):
    i_d, i_p, n_p = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    o_d = i_d * BD + tl.arange(0, BD)
    m_d = o_d < D
    b_dw = tl.zeros([BT, BD], dtype=r.dtype.element_ty)                                                 # [BT, BD]
    b_db = tl.zeros([BT, BD], dtype=r.dtype.element_ty)                                                 # [BT, BD]
    for i_t in range(i_p, tl.cdiv(T, BT), n_p):
        o_t = i_t * BT + tl.arange(0, BT)
        m = (o_t < T)[:, None] & m_d[None, :]
        p_dy = dy + o_t[:, None] * stride_dy + o_d[None, :]
        b_dy = tl.load(p_dy, mask=m, other=0.0).to(b_dw.dtype)                                          # [BT, BD]
        b_db += b_dy
        if dw is not None:
            b_x = tl.load(x + o_t[:, None] * stride_x + o_d[None, :], mask=m, other=0.0)                # [BT, BD]
            b_mean = tl.load(mean + o_t, mask=o_t < T, other=0.0)                                       # [BT]
            b_r = tl.load(r + o_t, mask=o_t < T, other=0.0)                                             # [BT]
            b_dw += b_dy * ((b_x.to(b_dw.dtype) - b_mean[:, None]) * b_r[:, None])
    if dw is not None:
        tl.store(dw + i_p * D + o_d, tl.sum(b_dw, 0), mask=m_d)
    if db is not None:
        tl.store(db + i_p * D + o_d, tl.sum(b_db, 0), mask=m_d)


def fwd_tile(D: int) -> Tile:
    return tile_for(D, FORWARD, values=32)._replace(stay=None)


def bwd_tile(D: int, itemsize: int, needs_sums: bool) -> Tile:
    tile = as_staged(tile_for(D, BACKWARD_WITH_SUMS if needs_sums else BACKWARD, values=16), itemsize, tensors=2)
    return tile if needs_sums else tile._replace(stay=None)


def _layer_norm_fwd(x: Tensor, w: Tensor | None, b: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., D] → y of its shape, mean and r [T]."""
    D, T, stride_x = x.shape[-1], count_rows(x), row_stride(x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    mean = torch.empty(T, dtype=accumulated_in(x), device=x.device)
    r = torch.empty_like(mean)
    if T == 0:
        return y, mean, r
    if D > WIDEST_FORWARD:
        launch(
            _layer_norm_wide_fwd_kernel, (T,), x=x, w=w, b=b, y=y, mean=mean, r=r, stride_x=stride_x, D=D, eps=eps,
            BD=WIDE.BD, num_warps=WIDE.warps,
        )
    else:
        tile = fwd_tile(D)
        launch(
            _layer_norm_fwd_kernel, (ceil_div(T, tile.BT),), x=x, w=w, b=b, y=y, mean=mean, r=r, stride_x=stride_x, T=T,
            D=D, eps=eps, BT=tile.BT, BD=tile.BD, num_warps=tile.warps,
        )
    return y, mean, r


def _layer_norm_bwd(
    x: Tensor, w: Tensor | None, mean: Tensor, r: Tensor, dy: Tensor, needs_dx: bool,
    dw_dtype: torch.dtype | None, db_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """x, dy [..., D], mean, r [T] → dx of x's shape, dw and db [D] in the dtypes given, each None when not needed."""
    D, T = x.shape[-1], count_rows(x)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_dx else None
    if D > WIDEST_BACKWARD:
        return dx, *_layer_norm_wide_bwd(x, w, mean, r, dy, dx, dw_dtype, db_dtype)
    needs_sums = dw_dtype is not None or db_dtype is not None
    tile = bwd_tile(D, x.element_size(), needs_sums)
    programs = n_programs(T, tile, x.device)
    dw, db = (None if dtype is None else r.new_empty((programs, D)) for dtype in (dw_dtype, db_dtype))
    overlap = needs_sums and can_overlap(x.device)
    if T > 0:
        launch(
            _layer_norm_bwd_kernel, (programs,), x=x, w=w, mean=mean, r=r, dy=dy, dx=dx, dw=dw, db=db,
            stride_x=row_stride(x), stride_dy=row_stride(dy), T=T, D=D, BT=tile.BT, BD=tile.BD, STAGES=tile.stages,
            OVERLAP=overlap, num_warps=tile.warps,
        )
    return dx, *_sum_both(dw, db, dw_dtype, db_dtype, overlap)


def _layer_norm_wide_bwd(
    x: Tensor, w: Tensor | None, mean: Tensor, r: Tensor, dy: Tensor, dx: Tensor | None,
    dw_dtype: torch.dtype | None, db_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Fill dx if there is one; → dw and db [D] in the dtypes given, each None when not needed."""
    D, T = x.shape[-1], count_rows(x)
    inputs = dict(x=x, mean=mean, r=r, dy=dy, stride_x=row_stride(x), stride_dy=row_stride(dy), D=D)
    if dx is not None and T > 0:
        launch(_layer_norm_wide_dx_kernel, (T,), **inputs, w=w, dx=dx, BD=WIDE.BD, num_warps=WIDE.warps)
    columns = ceil_div(D, WIDE_SUMS.BD)
    programs = min(ceil_div(resident_programs(x.device, WIDE_SUMS.stay), columns), ceil_div(T, WIDE_SUMS.BT))
    dw, db = (None if dtype is None else r.new_empty((programs, D)) for dtype in (dw_dtype, db_dtype))
    if (dw is not None or db is not None) and T > 0:
        launch(
            _layer_norm_wide_sums_kernel, (columns, programs), **inputs, dw=dw, db=db, T=T, BT=WIDE_SUMS.BT,
            BD=WIDE_SUMS.BD, num_warps=WIDE_SUMS.warps,
        )
    return _sum_both(dw, db, dw_dtype, db_dtype)


def _sum_both(
    dw_lines: Tensor | None, db_lines: Tensor | None, dw_dtype: torch.dtype | None, db_dtype: torch.dtype | None,
    overlap: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Lines [programs, D] → their sums [D]. `overlap`: the kernel that writes the lines lets this one start."""
    lines = dw_lines if db_lines is None else db_lines
    if lines is None:
        return None, None
    T, D = lines.shape
    dw = None if dw_lines is None else torch.empty(D, dtype=dw_dtype, device=lines.device)
    db = None if db_lines is None else torch.empty(D, dtype=db_dtype, device=lines.device)
    grid = (ceil_div(D, SUM_LINES.BD), 1 if dw is None or db is None else 2)
    launch(
        _sum_both_kernel, grid, dw_lines=dw_lines, db_lines=db_lines, dw=dw, db=db, T=T, D=D, BT=SUM_LINES.BT,
        BD=SUM_LINES.BD, OVERLAP=overlap, num_warps=SUM_LINES.warps, launch_pdl=overlap,
    )
    return dw, db


class _LayerNorm(torch.autograd.Function):
    """Reshapes inside, where autograd does not have to record it."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, w: Tensor | None, b: Tensor | None, eps: float) -> Tensor:
        rows = with_rows(x)
        y, mean, r = _layer_norm_fwd(rows, w, b, eps)
        ctx.save_for_backward(rows, w, mean, r)
        ctx.b_dtype = None if b is None else b.dtype
        return y if rows is x else y.view(x.shape)

    @staticmethod
    @differentiable_once
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        rows, w, mean, r = ctx.saved_tensors
        needs_dx, needs_dw, needs_db = ctx.needs_input_grad[:3]
        dtypes = (w.dtype if needs_dw else None, ctx.b_dtype if needs_db else None)
        dx, dw, db = _layer_norm_bwd(rows, w, mean, r, with_rows(dy), needs_dx, *dtypes)
        return dx if dx is None or rows.shape == dy.shape else dx.view(dy.shape), dw, db, None


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """kernels_torch.layer_norm, in one pass over x. Arguments: see kernels_torch.layer_norm."""
    check_layer_norm(x, weight, bias, eps)
    check_gpu(x=x)
    weight = weight if weight is None else weight.contiguous()
    bias = bias if bias is None else bias.contiguous()
    return _LayerNorm.apply(x, weight, bias, float(eps))
