"""The residual stream and the norm that follows it:  s = x + branch,  y = s · r · w,  r = 1 / sqrt(mean(s²) + eps);
and nanochat's mix of 2026:  s = x_scale · (x + branch) + anchor_scale · anchor,  y = s · r.

s is rounded before it is normalised. Backward, with d the gradient of s, the norm's (kernels_triton/rmsnorm.py) plus ds:

    add    dx = dbranch = d
    mix    dx = dbranch = x_scale · d,  danchor = anchor_scale · d,
           dx_scale = Σ d · (x + branch),  danchor_scale = Σ d · anchor

add keeps s, and r where rmsnorm does; its backward is rmsnorm's with ds added before the one rounding: 4 passes over
memory forward, 4 backward. mix keeps its inputs, and makes s and r again: 5 passes forward, 7 backward. The gradient of x
is that of branch too, the same tensor. An output that nothing uses has no incoming gradient, and none is read.

All layers mix in the same anchor. Each passes it on to the next, so its gradient comes from there: danchor is added to that
in the same pass, one more to read, where autograd would read both and write the sum.

For the sums each program adds up its own rows and stores one line; the lines are summed as rmsnorm's dw, in an order that
does not depend on timing. Rows too wide for one program are added and mixed by PyTorch and normalised by rmsnorm's kernels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kernels_torch.add_rmsnorm import check_add_rmsnorm, check_mix_rmsnorm

from kernels_triton.launch import (  # isort: skip
    WIDEST_BLOCK, add_rmsnorm_fwd_tile, can_overlap, ceil_div, check_gpu, launch, mix_rmsnorm_bwd_tile,
    mix_rmsnorm_fwd_tile, n_programs,
)
from kernels_triton.autograd import differentiable_once
from kernels_triton.rmsnorm import _rmsnorm_bwd, _rmsnorm_fwd, kept_r
from kernels_triton.rows import accumulated_in, count_rows, row_stride, sum_lines, with_rows


@triton.jit
def _add_rmsnorm_fwd_kernel(
    x, branch, w, s, y, r, stride_x, stride_branch, T,
    D: tl.constexpr, eps: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    i_t = tl.program_id(0).to(tl.int64)
    o_t, o_d = i_t * BT + tl.arange(0, BT), tl.arange(0, BD)
    m_t, m_d = o_t < T, o_d < D
    m = m_t[:, None] & m_d[None, :]
    b_x = tl.load(x + o_t[:, None] * stride_x + o_d[None, :], mask=m, other=0.0).to(ACC)                # [BT, BD]
    b_branch = tl.load(branch + o_t[:, None] * stride_branch + o_d[None, :], mask=m, other=0.0).to(ACC)  # [BT, BD]
    if w is not None:
        b_w = tl.load(w + o_d, mask=m_d, other=0.0, eviction_policy="evict_last").to(ACC)               # [BD]
    b_s = (b_x + b_branch).to(s.dtype.element_ty)                                                       # [BT, BD]
    tl.store(s + o_t[:, None] * D + o_d[None, :], b_s, mask=m)
    b_s = b_s.to(ACC)
    b_r = tl.rsqrt(tl.sum(b_s * b_s, 1) / D + eps)                                                      # [BT]
    b_y = b_s * b_r[:, None]                                                                            # [BT, BD]
    if w is not None:
        b_y *= b_w[None, :]
    tl.store(y + o_t[:, None] * D + o_d[None, :], b_y.to(y.dtype.element_ty), mask=m)
    if r is not None:
        tl.store(r + o_t, b_r, mask=m_t)


@triton.jit
def _mixed(
    x, anchor, branch, b_x_scale, b_anchor_scale, stride_x, stride_anchor, stride_branch, o_t, o_d, m, ACC: tl.constexpr,
):
    """stream = x + branch, anchor and s of a tile, rounded as they are kept and then in ACC; in forward and backward."""
    b_stream = tl.load(x + o_t[:, None] * stride_x + o_d[None, :], mask=m, other=0.0).to(ACC)
    b_anchor = tl.load(anchor + o_t[:, None] * stride_anchor + o_d[None, :], mask=m, other=0.0).to(ACC)
    if branch is not None:
        b_branch = tl.load(branch + o_t[:, None] * stride_branch + o_d[None, :], mask=m, other=0.0).to(ACC)
        b_stream = (b_stream + b_branch).to(x.dtype.element_ty).to(ACC)
    b_s = b_x_scale * b_stream + b_anchor_scale * b_anchor
    return b_stream, b_anchor, b_s.to(x.dtype.element_ty).to(ACC)


# The scales are elements of a vector of parameters: a kernel for each way they can be aligned would be compiled for nothing.
@triton.jit(do_not_specialize_on_alignment=["x_scale", "anchor_scale"])
def _mix_rmsnorm_fwd_kernel(
    x, anchor, branch, x_scale, anchor_scale, s, y, stride_x, stride_anchor, stride_branch, T,
    D: tl.constexpr, eps: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    i_t = tl.program_id(0).to(tl.int64)
    o_t, o_d = i_t * BT + tl.arange(0, BT), tl.arange(0, BD)
    m = (o_t < T)[:, None] & (o_d < D)[None, :]
    b_anchor_scale = tl.load(anchor_scale).to(ACC)
    b_x_scale = 1.0
    if x_scale is not None:
        b_x_scale = tl.load(x_scale).to(ACC)
    _, _, b_s = _mixed(  # [BT, BD]
        x, anchor, branch, b_x_scale, b_anchor_scale, stride_x, stride_anchor, stride_branch, o_t, o_d, m, ACC,
    )
    tl.store(s + o_t[:, None] * D + o_d[None, :], b_s.to(s.dtype.element_ty), mask=m)
    b_r = tl.rsqrt(tl.sum(b_s * b_s, 1) / D + eps)                                                      # [BT]
    b_y = b_s * b_r[:, None]                                                                            # [BT, BD]
    tl.store(y + o_t[:, None] * D + o_d[None, :], b_y.to(y.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize_on_alignment=["x_scale", "anchor_scale"])
def _mix_rmsnorm_bwd_kernel(
    x, anchor, branch, x_scale, anchor_scale, dy, ds, dpassed, dx, danchor, sums,
    stride_x, stride_anchor, stride_branch, stride_dy, stride_ds, stride_dpassed, T,
    D: tl.constexpr, eps: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):
    """sums [programs, 2]: of d · (x + branch) and of d · anchor."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    i_p, n_p = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    o_d = tl.arange(0, BD)
    b_anchor_scale = tl.load(anchor_scale).to(ACC)
    b_x_scale = 1.0
    if x_scale is not None:
        b_x_scale = tl.load(x_scale).to(ACC)
    if sums is not None:
        b_dx_scale = tl.zeros([BT, BD], dtype=ACC)                                                      # [BT, BD]
        b_danchor_scale = tl.zeros([BT, BD], dtype=ACC)                                                 # [BT, BD]
    for i_t in tl.range(i_p, tl.cdiv(T, BT), n_p, num_stages=STAGES):
        o_t = i_t * BT + tl.arange(0, BT)
        m = (o_t < T)[:, None] & (o_d < D)[None, :]
        b_stream, b_anchor, b_s = _mixed(  # [BT, BD] each
            x, anchor, branch, b_x_scale, b_anchor_scale, stride_x, stride_anchor, stride_branch, o_t, o_d, m, ACC,
        )
        if ds is not None:
            b_d = tl.load(ds + o_t[:, None] * stride_ds + o_d[None, :], mask=m, other=0.0).to(ACC)      # [BT, BD]
        if dy is not None:
            b_dy = tl.load(dy + o_t[:, None] * stride_dy + o_d[None, :], mask=m, other=0.0).to(ACC)     # [BT, BD]
            b_r = tl.rsqrt(tl.sum(b_s * b_s, 1) / D + eps)                                              # [BT]
            b_n = b_s * b_r[:, None]                                                                    # [BT, BD]
            b_c = tl.sum(b_dy * b_n, 1) / D                                                             # [BT]
            b_g = (b_dy - b_n * b_c[:, None]) * b_r[:, None]                                            # [BT, BD]
            if ds is not None:
                b_d += b_g
            else:
                b_d = b_g
        if dx is not None:
            p_dx = dx + o_t[:, None] * D + o_d[None, :]
            tl.store(p_dx, (b_x_scale * b_d).to(dx.dtype.element_ty), mask=m)
        if danchor is not None:
            b_danchor = b_anchor_scale * b_d                                                            # [BT, BD]
            if dpassed is not None:
                p_dpassed = dpassed + o_t[:, None] * stride_dpassed + o_d[None, :]
                b_danchor += tl.load(p_dpassed, mask=m, other=0.0).to(ACC)
            p_danchor = danchor + o_t[:, None] * D + o_d[None, :]
            tl.store(p_danchor, b_danchor.to(danchor.dtype.element_ty), mask=m)
        if sums is not None:
            b_dx_scale += b_d * b_stream
            b_danchor_scale += b_d * b_anchor
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    if sums is not None:
        tl.store(sums + 2 * i_p, tl.sum(b_dx_scale))
        tl.store(sums + 2 * i_p + 1, tl.sum(b_danchor_scale))


def _add_rmsnorm_fwd(
    x: Tensor, branch: Tensor, w: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, branch [..., D] → y, s of their shape, and r [T] where backward wants it."""
    D, T = x.shape[-1], count_rows(x)
    if D > WIDEST_BLOCK:
        s = (x + branch).contiguous()
        y, r = _rmsnorm_fwd(s, w, eps)
        return y, s, r
    y, s = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    r = kept_r(x, w)
    x, branch, tile = with_rows(x), with_rows(branch), add_rmsnorm_fwd_tile(D)
    if T > 0:
        launch(
            _add_rmsnorm_fwd_kernel, (ceil_div(T, tile.BT),), x=x, branch=branch, w=w, s=s, y=y, r=r,
            stride_x=row_stride(x), stride_branch=row_stride(branch), T=T, D=D, eps=eps, BT=tile.BT, BD=tile.BD,
            num_warps=tile.warps,
        )
    return y, s, r


def _mix_rmsnorm_fwd(
    x: Tensor, anchor: Tensor, branch: Tensor | None, x_scale: Tensor | None, anchor_scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x, anchor, branch as `with_rows` gives them → y, s of the shape of x."""
    D, T = x.shape[-1], count_rows(x)
    if D > WIDEST_BLOCK:
        s = _mixed_wide(x, anchor, branch, x_scale, anchor_scale)[1]
        return _rmsnorm_fwd(s, None, eps)[0], s
    y, s = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    tile = mix_rmsnorm_fwd_tile(D)
    if T > 0:
        launch(
            _mix_rmsnorm_fwd_kernel, (ceil_div(T, tile.BT),), x=x, anchor=anchor, branch=branch, x_scale=x_scale,
            anchor_scale=anchor_scale, s=s, y=y, stride_x=row_stride(x), stride_anchor=row_stride(anchor),
            stride_branch=row_stride(branch), T=T, D=D, eps=eps, BT=tile.BT, BD=tile.BD, num_warps=tile.warps,
        )
    return y, s


def _mix_rmsnorm_bwd(
    x: Tensor, anchor: Tensor, branch: Tensor | None, x_scale: Tensor | None, anchor_scale: Tensor, dy: Tensor | None,
    ds: Tensor | None, dpassed: Tensor | None, eps: float, needs_dx: bool, needs_danchor: bool, needs_sums: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """All but the scales as `with_rows` gives them → dx, danchor of the shape of x and the two sums [2]."""
    D, T = x.shape[-1], count_rows(x)
    dpassed = dpassed if needs_danchor else None
    if D > WIDEST_BLOCK:
        return _mix_rmsnorm_wide_bwd(x, anchor, branch, x_scale, anchor_scale, dy, ds, dpassed, eps)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_dx else None
    danchor = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_danchor else None
    tile = mix_rmsnorm_bwd_tile(D, x.element_size(), needs_sums, tensors=5 if dpassed is None else 6)
    programs = n_programs(T, tile, x.device)
    sums = torch.empty((programs, 2), dtype=accumulated_in(x), device=x.device) if needs_sums else None
    overlap = needs_sums and can_overlap(x.device)
    if T > 0:
        launch(
            _mix_rmsnorm_bwd_kernel, (programs,), x=x, anchor=anchor, branch=branch, x_scale=x_scale,
            anchor_scale=anchor_scale, dy=dy, ds=ds, dpassed=dpassed, dx=dx, danchor=danchor, sums=sums,
            stride_x=row_stride(x), stride_anchor=row_stride(anchor), stride_branch=row_stride(branch),
            stride_dy=row_stride(dy), stride_ds=row_stride(ds), stride_dpassed=row_stride(dpassed), T=T, D=D, eps=eps,
            BT=tile.BT, BD=tile.BD, STAGES=tile.stages, OVERLAP=overlap, num_warps=tile.warps,
        )
    return dx, danchor, sum_lines(sums, sums.dtype, overlap) if needs_sums else None


def _mixed_wide(
    x: Tensor, anchor: Tensor, branch: Tensor | None, x_scale: Tensor | None, anchor_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """`_mixed` by PyTorch: stream in the dtype of sums, s contiguous in that of x."""
    dtype = accumulated_in(x)
    stream = (x if branch is None else x + branch.view(x.shape)).to(dtype)
    scaled = stream if x_scale is None else x_scale.reshape(()).to(dtype) * stream
    s = scaled + anchor_scale.reshape(()).to(dtype) * anchor.view(x.shape).to(dtype)
    return stream, s.to(x.dtype).contiguous()


def _mix_rmsnorm_wide_bwd(
    x: Tensor, anchor: Tensor, branch: Tensor | None, x_scale: Tensor | None, anchor_scale: Tensor, dy: Tensor | None,
    ds: Tensor | None, dpassed: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """All gradients, whoever asked."""
    stream, s = _mixed_wide(x, anchor, branch, x_scale, anchor_scale)
    d = ds.view(x.shape) if dy is None else _rmsnorm_bwd(s, None, None, dy, ds, eps, True, False)[0]
    d = d.to(stream.dtype)
    dx = d if x_scale is None else x_scale.reshape(()).to(d.dtype) * d
    danchor = anchor_scale.reshape(()).to(d.dtype) * d
    if dpassed is not None:
        danchor += dpassed.view(x.shape)
    sums = torch.stack([(d * stream).sum(), (d * anchor.view(x.shape)).sum()])
    return dx.to(x.dtype), danchor.to(x.dtype), sums


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, branch: Tensor, w: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        y, s, r = _add_rmsnorm_fwd(x, branch, w, eps)
        leave_unused_gradients_out(ctx)
        ctx.save_for_backward(s, w, r)
        ctx.eps = eps
        return y, s

    @staticmethod
    @differentiable_once
    def backward(
        ctx: FunctionCtx, dy: Tensor | None, ds: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        s, w, r = ctx.saved_tensors
        needs_x, needs_branch, needs_w = ctx.needs_input_grad[:3]
        if dy is None:
            d, dw = ds, None
        else:
            ds = ds if ds is None else with_rows(ds)
            d, dw = _rmsnorm_bwd(s, w, r, with_rows(dy), ds, ctx.eps, needs_x or needs_branch, needs_w)
        return d if needs_x else None, d if needs_branch else None, dw, None


class _MixRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, anchor: Tensor, x_scale: Tensor | None, anchor_scale: Tensor, branch: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = [value if value is None else with_rows(value) for value in (x, anchor, branch)]
        y, s = _mix_rmsnorm_fwd(*rows, x_scale, anchor_scale, eps)
        leave_unused_gradients_out(ctx)
        ctx.save_for_backward(*rows, x_scale, anchor_scale)
        ctx.eps = eps
        return y.view(x.shape), s.view(x.shape), anchor.view_as(anchor)

    @staticmethod
    @differentiable_once
    def backward(
        ctx: FunctionCtx, dy: Tensor | None, ds: Tensor | None, dpassed: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if dy is None and ds is None:
            return None, dpassed, None, None, None, None
        x, anchor, branch, x_scale, anchor_scale = ctx.saved_tensors
        needs_x, needs_anchor, needs_x_scale, needs_anchor_scale, needs_branch, _ = ctx.needs_input_grad
        rows = [value if value is None else with_rows(value) for value in (dy, ds, dpassed)]
        dx, danchor, sums = _mix_rmsnorm_bwd(
            x, anchor, branch, x_scale, anchor_scale, *rows, ctx.eps, needs_x or needs_branch, needs_anchor,
            needs_x_scale or needs_anchor_scale,
        )
        shape = (ds if dy is None else dy).shape
        dx, danchor = (d if d is None else d.view(shape) for d in (dx, danchor))
        dx_scale = sums[0].view(x_scale.shape).to(x_scale.dtype) if needs_x_scale else None
        danchor_scale = sums[1].view(anchor_scale.shape).to(anchor_scale.dtype) if needs_anchor_scale else None
        return (
            dx if needs_x else None, danchor if needs_anchor else None, dx_scale, danchor_scale,
            dx if needs_branch else None, None,
        )


def leave_unused_gradients_out(ctx: FunctionCtx) -> None:
    """None instead of zeros for an output that nothing uses; torch.compile knows zeros only."""
    if not torch.compiler.is_compiling():
        ctx.set_materialize_grads(False)


def add_rmsnorm(x: Tensor, branch: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """kernels_torch.add_rmsnorm, in one pass over x and branch. Arguments: see kernels_torch.add_rmsnorm."""
    check_add_rmsnorm(x, branch, weight, eps)
    check_gpu(x=x)
    return _AddRMSNorm.apply(x, branch, weight if weight is None else weight.contiguous(), float(eps))


def mix_rmsnorm(
    x: Tensor,
    anchor: Tensor,
    x_scale: Tensor | None,
    anchor_scale: Tensor,
    branch: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """kernels_torch.mix_rmsnorm, in one pass over x, anchor and branch; the scales stay on the device.

    Arguments: see kernels_torch.mix_rmsnorm.
    """
    check_mix_rmsnorm(x, anchor, x_scale, anchor_scale, branch, eps)
    check_gpu(x=x)
    return _MixRMSNorm.apply(x, anchor, x_scale, anchor_scale, branch, float(eps))
