"""RMS norm:  y = x · r · w,   r = 1 / sqrt(mean(x²) + eps).

Backward, with g = dy · w:   dx = r · (g − x · r² · mean(g · x)),   dw = Σ_rows dy · x · r.

Forward reads x and writes y, and keeps r [T] in fp32 (fp64 for fp64 input) for backward, which reads x and dy and writes
dx: 2 and 3 passes over memory, which is all the time either takes. For dw each program adds up its own rows in registers
and stores the sum in its own line of a [programs, D] buffer; a second kernel sums the lines, and starts while the first
ends where the GPU can do that. There are no atomics, so two runs give the same bits. Nothing asks the L2 cache to let x
go early (`evict_first`): on an H200 that cost forward 1 to 3 %.

Rows too wide for the registers of one program take the `_wide_` kernels at the end: they go over each row twice in blocks
of columns, and sum dw in a pass of its own.

Rows may lie any distance apart; rows whose own values do not lie side by side are copied first, so that every load is
one of whole 16-byte words. Strides are plain integers, since torch.compile takes no tuples as arguments of a kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from kernels_triton.launch import (  # isort: skip
    SUM_LINES, WIDEST_BLOCK, Tile, can_overlap, ceil_div, resident_programs, rmsnorm_bwd_tile, rmsnorm_fwd_tile,
)

WIDE = Tile(BT=1, BD=4096, warps=8)       # columns at a time of a wide row; not measured yet
WIDE_DW = Tile(BT=16, BD=256, warps=4, stay=4)  # rows × columns at a time of dw; not measured yet


@triton.jit
def _rmsnorm_fwd_kernel(
    x, w, y, r, stride_x, T,
    D: tl.constexpr, eps: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    o_t, o_d = i_t * BT + tl.arange(0, BT), tl.arange(0, BD).to(tl.int64)
    m_t, m_d = o_t < T, o_d < D
    m = m_t[:, None] & m_d[None, :]
    p_x = x + o_t[:, None] * stride_x + o_d[None, :]
    b_x = tl.load(p_x, mask=m, other=0.0).to(r.dtype.element_ty)                                        # [BT, BD]
    if w is not None:  # asked for before the sum, so that it comes meanwhile
        b_w = tl.load(w + o_d, mask=m_d, other=0.0, eviction_policy="evict_last").to(r.dtype.element_ty)  # [BD]
    b_r = tl.rsqrt(tl.sum(b_x * b_x, 1) / D + eps)                                                      # [BT]
    b_y = b_x * b_r[:, None]                                                                            # [BT, BD]
    if w is not None:
        b_y *= b_w[None, :]
    tl.store(y + o_t[:, None] * D + o_d[None, :], b_y.to(y.dtype.element_ty), mask=m)
    tl.store(r + o_t, b_r, mask=m_t)


@triton.jit
def _rmsnorm_bwd_kernel(
    x, w, r, dy, dx, dw, stride_x, stride_dy, T,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):
    i_p, n_p = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    o_d = tl.arange(0, BD).to(tl.int64)
    m_d = o_d < D
    if w is not None:
        b_w = tl.load(w + o_d, mask=m_d, other=0.0).to(r.dtype.element_ty)                              # [BD]
    if dw is not None:
        b_dw = tl.zeros([BT, BD], dtype=r.dtype.element_ty)                                             # [BT, BD]
    for i_t in tl.range(i_p, tl.cdiv(T, BT), n_p, num_stages=STAGES):
        o_t = i_t * BT + tl.arange(0, BT)
        m_t = o_t < T
        m = m_t[:, None] & m_d[None, :]
        p_x = x + o_t[:, None] * stride_x + o_d[None, :]
        p_dy = dy + o_t[:, None] * stride_dy + o_d[None, :]
        b_x = tl.load(p_x, mask=m, other=0.0).to(r.dtype.element_ty)                                    # [BT, BD]
        b_dy = tl.load(p_dy, mask=m, other=0.0).to(r.dtype.element_ty)                                  # [BT, BD]
        b_r = tl.load(r + o_t, mask=m_t, other=0.0)                                                     # [BT]
        b_xr = b_x * b_r[:, None]                                                                       # [BT, BD]
        if dw is not None:
            b_dw += b_dy * b_xr
        if dx is not None:
            b_g = b_dy
            if w is not None:
                b_g = b_dy * b_w[None, :]
            b_c = tl.sum(b_g * b_xr, 1) / D                                                             # [BT]
            b_dx = (b_g - b_xr * b_c[:, None]) * b_r[:, None]                                           # [BT, BD]
            tl.store(dx + o_t[:, None] * D + o_d[None, :], b_dx.to(dx.dtype.element_ty), mask=m)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    if dw is not None:
        tl.store(dw + i_p * D + o_d, tl.sum(b_dw, 0), mask=m_d)


@triton.jit
def _sum_lines_kernel(
    lines, dw, T,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, OVERLAP: tl.constexpr,
):
    """dw [D] = Σ of lines [T, D], in one order whatever the timing."""
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    b_dw = tl.zeros([BT, BD], dtype=lines.dtype.element_ty)                                             # [BT, BD]
    if OVERLAP:  # this kernel may have been started early: what it reads is there only now
        tl.extra.cuda.gdc_wait()
    for i_t in range(0, T, BT):
        o_t = i_t + tl.arange(0, BT)
        m = (o_t < T)[:, None] & (o_d < D)[None, :]
        b_dw += tl.load(lines + o_t[:, None] * D + o_d[None, :], mask=m, other=0.0)
    tl.store(dw + o_d, tl.sum(b_dw, 0).to(dw.dtype.element_ty), mask=o_d < D)


@triton.jit
def _rmsnorm_wide_fwd_kernel(
    x, w, y, r, stride_x,
    D: tl.constexpr, eps: tl.constexpr, BD: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    b_sum = tl.zeros([BD], dtype=r.dtype.element_ty)                                                    # [BD]
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD).to(tl.int64)
        p_x = x + i_t * stride_x + o_d
        b_x = tl.load(p_x, mask=o_d < D, other=0.0, eviction_policy="evict_last").to(b_sum.dtype)       # [BD]
        b_sum += b_x * b_x
    b_r = tl.rsqrt(tl.sum(b_sum, 0) / D + eps)
    tl.store(r + i_t, b_r)
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD).to(tl.int64)
        m_d = o_d < D
        p_x = x + i_t * stride_x + o_d
        b_y = tl.load(p_x, mask=m_d, other=0.0, eviction_policy="evict_first").to(b_sum.dtype) * b_r    # [BD]
        if w is not None:
            b_y *= tl.load(w + o_d, mask=m_d, other=0.0).to(b_y.dtype)
        tl.store(y + i_t * D + o_d, b_y.to(y.dtype.element_ty), mask=m_d)


@triton.jit
def _rmsnorm_wide_dx_kernel(
    x, w, r, dy, dx, stride_x, stride_dy,
    D: tl.constexpr, BD: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    b_r = tl.load(r + i_t)
    b_sum = tl.zeros([BD], dtype=r.dtype.element_ty)                                                    # [BD]
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD).to(tl.int64)
        m_d = o_d < D
        b_x = tl.load(x + i_t * stride_x + o_d, mask=m_d, other=0.0).to(b_sum.dtype)                    # [BD]
        b_g = tl.load(dy + i_t * stride_dy + o_d, mask=m_d, other=0.0).to(b_sum.dtype)                  # [BD]
        if w is not None:
            b_g *= tl.load(w + o_d, mask=m_d, other=0.0).to(b_g.dtype)
        b_sum += b_g * (b_x * b_r)
    b_c = tl.sum(b_sum, 0) / D
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD).to(tl.int64)
        m_d = o_d < D
        b_x = tl.load(x + i_t * stride_x + o_d, mask=m_d, other=0.0).to(b_sum.dtype)                    # [BD]
        b_g = tl.load(dy + i_t * stride_dy + o_d, mask=m_d, other=0.0).to(b_sum.dtype)                  # [BD]
        if w is not None:
            b_g *= tl.load(w + o_d, mask=m_d, other=0.0).to(b_g.dtype)
        b_dx = (b_g - b_x * b_r * b_c) * b_r                                                            # [BD]
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


def _rmsnorm_fwd(x: Tensor, w: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """x [T, D] → y [T, D], r [T]."""
    T, D = x.shape
    y = torch.empty((T, D), dtype=x.dtype, device=x.device)
    r = torch.empty((T,), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    if T == 0:
        return y, r
    inputs = dict(x=x, w=w, y=y, r=r, stride_x=x.stride(0), D=D, eps=eps)
    if D > WIDEST_BLOCK:
        _rmsnorm_wide_fwd_kernel[(T,)](**inputs, BD=WIDE.BD, num_warps=WIDE.warps)
    else:
        tile = rmsnorm_fwd_tile(D)
        grid = (ceil_div(T, tile.BT),)
        _rmsnorm_fwd_kernel[grid](**inputs, T=T, BT=tile.BT, BD=tile.BD, num_warps=tile.warps)
    return y, r


def _rmsnorm_bwd(
    x: Tensor, w: Tensor | None, r: Tensor, dy: Tensor, needs_dx: bool, needs_dw: bool
) -> tuple[Tensor | None, Tensor | None]:
    """x, dy [T, D], r [T] → dx [T, D], dw [D], each None when not needed."""
    T, D = x.shape
    dx = torch.empty((T, D), dtype=x.dtype, device=x.device) if needs_dx else None
    if D > WIDEST_BLOCK:
        return dx, _rmsnorm_wide_bwd(x, w, r, dy, dx, needs_dw)
    tile = rmsnorm_bwd_tile(D, x.element_size(), needs_dw)
    programs = ceil_div(T, tile.BT)
    if tile.stay is not None:
        programs = min(programs, resident_programs(x.device, tile.stay))
    lines = torch.empty((programs, D), dtype=r.dtype, device=x.device) if needs_dw else None
    overlap = needs_dw and can_overlap(x.device)
    if T > 0:
        _rmsnorm_bwd_kernel[(programs,)](
            x=x, w=w, r=r, dy=dy, dx=dx, dw=lines, stride_x=x.stride(0), stride_dy=dy.stride(0), T=T, D=D,
            BT=tile.BT, BD=tile.BD, STAGES=tile.stages, OVERLAP=overlap, num_warps=tile.warps,
        )
    return dx, sum_lines(lines, w.dtype, overlap) if needs_dw else None


def sum_lines(lines: Tensor, dtype: torch.dtype, overlap: bool = False) -> Tensor:
    """lines [T, D], one of each program, → their sum [D]. `overlap`: the kernel that writes them lets this one start."""
    T, D = lines.shape
    dw = torch.empty((D,), dtype=dtype, device=lines.device)
    early = dict(launch_pdl=True) if overlap else {}
    _sum_lines_kernel[(ceil_div(D, SUM_LINES.BD),)](
        lines=lines, dw=dw, T=T, D=D, BT=SUM_LINES.BT, BD=SUM_LINES.BD, OVERLAP=overlap,
        num_warps=SUM_LINES.warps, **early,
    )
    return dw


def _rmsnorm_wide_bwd(
    x: Tensor, w: Tensor | None, r: Tensor, dy: Tensor, dx: Tensor | None, needs_dw: bool
) -> Tensor | None:
    """Fill dx if there is one; → dw [D] or None."""
    T, D = x.shape
    inputs = dict(x=x, r=r, dy=dy, stride_x=x.stride(0), stride_dy=dy.stride(0), D=D)
    if dx is not None and T > 0:
        _rmsnorm_wide_dx_kernel[(T,)](**inputs, w=w, dx=dx, BD=WIDE.BD, num_warps=WIDE.warps)
    if not needs_dw:
        return None
    columns = ceil_div(D, WIDE_DW.BD)
    n_lines = min(ceil_div(resident_programs(x.device, WIDE_DW.stay), columns), ceil_div(T, WIDE_DW.BT))
    lines = torch.empty((n_lines, D), dtype=r.dtype, device=x.device)
    if T > 0:
        _rmsnorm_wide_dw_kernel[(columns, n_lines)](
            **inputs, dw=lines, T=T, BT=WIDE_DW.BT, BD=WIDE_DW.BD, num_warps=WIDE_DW.warps
        )
    return sum_lines(lines, w.dtype)


def as_rows(x: Tensor) -> Tensor:
    """[..., D] → [T, D] with the values of each row next to each other; rows may be far apart."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


class _RMSNorm(torch.autograd.Function):
    """Reshapes inside, where autograd does not have to record it."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, w: Tensor | None, eps: float) -> Tensor:
        rows = as_rows(x)
        y, r = _rmsnorm_fwd(rows, w, eps)
        ctx.save_for_backward(rows, w, r)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, w, r = ctx.saved_tensors
        dx, dw = _rmsnorm_bwd(rows, w, r, as_rows(dy), *ctx.needs_input_grad[:2])
        return dx if dx is None else dx.view(dy.shape), dw, None


def rmsnorm(x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """kernels_torch.rmsnorm, in one pass over x."""
    if not x.is_floating_point():
        raise ValueError(f"rmsnorm takes floating-point x, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"rmsnorm needs at least one value in the last dimension of x, got shape {tuple(x.shape)}")
    if weight is not None and tuple(weight.shape) != (x.shape[-1],):
        raise ValueError(f"rmsnorm weight must have shape ({x.shape[-1]},), got {tuple(weight.shape)}")
    if not eps >= 0:
        raise ValueError(f"rmsnorm eps must not be negative, got {eps}")
    weight = weight if weight is None else weight.contiguous()
    return _RMSNorm.apply(x, weight, float(eps))
