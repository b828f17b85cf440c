"""Smear:  y_t = x_t + g_t · x_{t−1},   g_t = scale · a_t,   a_t = σ(gate_weight · x_t[:G])   (0: nothing before t)

Backward, with d the incoming gradient and s_t = Σ over the channels of d_t · x_{t−1}:

    dx_t = d_t + g_{t+1} · d_{t+1} + dz_t · gate_weight, the last of them for the first G channels only
    dz_t = scale · a_t · (1 − a_t) · s_t             dprevious = g_0 · d_0
    dgate_weight = Σ over tokens of dz_t · x_t[:G]   dscale = Σ over tokens of a_t · s_t

Forward keeps a, one value a token. Sums over all tokens are those of a fixed number of programs, added in a second kernel:
nothing depends on timing.

gate_weight is rounded to the dtype of x as it is read, and computed with in fp32 from there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kernels_torch.smear import check_smear

from kernels_triton.launch import (  # isort: skip
    Tile, as_staged, block_of, can_overlap, ceil_div, check_gpu, launch, n_programs, next_power_of_two,
)
from kernels_triton.autograd import differentiable_once
from kernels_triton.rows import stride_of, sum_lines, values_side_by_side

# Rows × columns at a time, and warps; measured as in embedding.py.
FORWARD = Tile(BT=4, BD=256, warps=2)  # 59.7; (4, 256, 1) 60.3, (2, 1024, 4) 63.0, (4, 1024, 4) 70.8
BACKWARD = Tile(BT=2, BD=1024, warps=4, stages=3, stay=4)  # not measured
WIDEST_BLOCK = 8192                    # of a row that backward holds at a time


@triton.jit
def _smear_fwd_kernel(
    x, gate_weight, scale, previous, doc_ids, y, a,
    stride_xb, stride_xt, stride_w, stride_pb, stride_pd, stride_docb, stride_doct, N, T,
    D: tl.constexpr, G: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BG: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o_d = tl.program_id(1).to(tl.int64) * BD + tl.arange(0, BD)
    o_b, o_t = o_n // T, o_n % T
    m_n, m_d = o_n < N, o_d < D
    m = m_n[:, None] & m_d[None, :]
    later = m_n & (o_t > 0)
    p_x = x + o_b * stride_xb + o_t * stride_xt
    b_x = tl.load(p_x[:, None] + o_d[None, :], mask=m, other=0.0).to(a.dtype.element_ty)                # [BT, BD]
    b_before = tl.load((p_x - stride_xt)[:, None] + o_d[None, :], mask=later[:, None] & m_d[None, :], other=0.0)
    b_before = b_before.to(b_x.dtype)                                                                   # [BT, BD]
    goes_on = later
    if doc_ids is not None:
        p_doc = doc_ids + o_b * stride_docb + o_t * stride_doct
        goes_on = later & (tl.load(p_doc, mask=later, other=0) == tl.load(p_doc - stride_doct, mask=later, other=0))
        b_before = tl.where(goes_on[:, None], b_before, 0.0)
    elif previous is not None:
        p_previous = previous + o_b[:, None] * stride_pb + o_d[None, :] * stride_pd
        b_before += tl.load(p_previous, mask=m & (o_t == 0)[:, None], other=0.0).to(b_x.dtype)
        goes_on = m_n
    b_z = tl.zeros([BT], dtype=b_x.dtype)                                                               # [BT]
    for i_g in range(0, G, BG):
        o_g = i_g + tl.arange(0, BG).to(tl.int64)
        b_in = tl.load(p_x[:, None] + o_g[None, :], mask=m_n[:, None] & (o_g < G)[None, :], other=0.0)  # [BT, BG]
        b_w = tl.load(gate_weight + o_g * stride_w, mask=o_g < G, other=0.0).to(x.dtype.element_ty)     # [BG]
        b_z += tl.sum(b_in.to(b_x.dtype) * b_w.to(b_x.dtype)[None, :], 1)
    b_a = tl.where(goes_on, tl.sigmoid(b_z), 0.0)                                                       # [BT]
    b_y = b_x + (tl.load(scale).to(b_x.dtype) * b_a)[:, None] * b_before                                # [BT, BD]
    tl.store(y + o_n[:, None] * D + o_d[None, :], b_y.to(y.dtype.element_ty), mask=m)
    if tl.program_id(1) == 0:
        tl.store(a + o_n, b_a, mask=m_n)


@triton.jit
def _smear_bwd_kernel(
    x, gate_weight, scale, previous, a, d, dx, dprevious, lines,
    stride_xb, stride_xt, stride_w, stride_pb, stride_pd, stride_db, stride_dt, N, T,
    D: tl.constexpr, G: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BG: tl.constexpr,
    STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):
    """Of each row the first block of columns comes last: by then s is complete, of which the gate's channels need all.

    A program's line [G + 1] has its share of dgate_weight, and of dscale behind it.
    """
    i_p, n_p = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    b_scale = tl.load(scale).to(a.dtype.element_ty)
    o_g = tl.arange(0, BG).to(tl.int64)
    b_dw = tl.zeros([BT, BG], dtype=a.dtype.element_ty)                                                 # [BT, BG]
    b_dscale = tl.zeros([BT], dtype=a.dtype.element_ty)                                                 # [BT]
    for i_n in tl.range(i_p, tl.cdiv(N, BT), n_p, num_stages=STAGES):
        o_n = i_n * BT + tl.arange(0, BT)
        o_b, o_t = o_n // T, o_n % T
        m_n = o_n < N
        later, earlier = m_n & (o_t > 0), m_n & (o_t + 1 < T)
        b_a = tl.load(a + o_n, mask=m_n, other=0.0)                                                     # [BT]
        b_next = tl.load(a + o_n + 1, mask=earlier, other=0.0)                                          # [BT]
        p_x = x + o_b * stride_xb + o_t * stride_xt
        p_d = d + o_b * stride_db + o_t * stride_dt
        b_s = tl.zeros([BT], dtype=a.dtype.element_ty)                                                  # [BT]
        for i_d in tl.static_range((D + BD - 1) // BD):
            o_d = ((D + BD - 1) // BD - 1 - i_d) * BD + tl.arange(0, BD).to(tl.int64)
            m_d = o_d < D
            m = m_n[:, None] & m_d[None, :]
            b_d = tl.load(p_d[:, None] + o_d[None, :], mask=m, other=0.0).to(b_s.dtype)                 # [BT, BD]
            if dx is not None or lines is not None:
                p_before = (p_x - stride_xt)[:, None] + o_d[None, :]
                b_before = tl.load(p_before, mask=later[:, None] & m_d[None, :], other=0.0).to(b_s.dtype)  # [BT, BD]
                if previous is not None:
                    p_previous = previous + o_b[:, None] * stride_pb + o_d[None, :] * stride_pd
                    b_before += tl.load(p_previous, mask=m & (o_t == 0)[:, None], other=0.0).to(b_s.dtype)
                b_s += tl.sum(b_d * tl.where((b_a != 0)[:, None], b_before, 0.0), 1)
            if dx is not None:
                p_after = (p_d + stride_dt)[:, None] + o_d[None, :]
                b_after = tl.load(p_after, mask=earlier[:, None] & m_d[None, :], other=0.0).to(b_s.dtype)  # [BT, BD]
                b_after = tl.where((b_next != 0)[:, None], (b_scale * b_next)[:, None] * b_after, 0.0)
                b_w = tl.load(gate_weight + o_d * stride_w, mask=o_d < G, other=0.0)                    # [BD]
                b_w = b_w.to(x.dtype.element_ty).to(b_s.dtype)
                b_dz = b_scale * b_a * (1 - b_a) * b_s                                                  # [BT]
                b_dx = b_d + b_after + b_dz[:, None] * b_w[None, :]                                     # [BT, BD]
                tl.store(dx + o_n[:, None] * D + o_d[None, :], b_dx.to(dx.dtype.element_ty), mask=m)
            if dprevious is not None:
                b_dprevious = tl.where((b_a != 0)[:, None], (b_scale * b_a)[:, None] * b_d, 0.0)        # [BT, BD]
                p_dprevious = dprevious + o_b[:, None] * D + o_d[None, :]
                tl.store(p_dprevious, b_dprevious.to(dprevious.dtype.element_ty), mask=m & (o_t == 0)[:, None])
        if lines is not None:
            b_in = tl.load(p_x[:, None] + o_g[None, :], mask=m_n[:, None] & (o_g < G)[None, :], other=0.0)  # [BT, BG]
            b_dw += (b_scale * b_a * (1 - b_a) * b_s)[:, None] * b_in.to(b_dw.dtype)
            b_dscale += b_a * b_s
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    if lines is not None:
        tl.store(lines + i_p * (G + 1) + o_g, tl.sum(b_dw, 0), mask=o_g < G)
        tl.store(lines + i_p * (G + 1) + G, tl.sum(b_dscale, 0))


def _smear_fwd(
    x: Tensor, gate_weight: Tensor, scale: Tensor, previous: Tensor | None, doc_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """→ y [B, T, D], a [B, T]."""
    (B, T, D), G = x.shape, gate_weight.shape[1]
    y = torch.empty((B, T, D), dtype=x.dtype, device=x.device)
    a = torch.empty((B, T), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    if y.numel() > 0:
        BD = block_of(D, FORWARD.BD)
        launch(
            _smear_fwd_kernel, (ceil_div(B * T, FORWARD.BT), ceil_div(D, BD)),
            x=x, gate_weight=gate_weight, scale=scale, previous=previous, doc_ids=doc_ids, y=y, a=a,
            stride_xb=x.stride(0), stride_xt=x.stride(1), stride_w=gate_weight.stride(1),
            stride_pb=stride_of(previous, 0), stride_pd=stride_of(previous, 2),
            stride_docb=stride_of(doc_ids, 0), stride_doct=stride_of(doc_ids, 1), N=B * T, T=T, D=D, G=G,
            BT=FORWARD.BT, BD=BD, BG=min(next_power_of_two(G), 32), num_warps=FORWARD.warps,
        )
    return y, a


def _smear_bwd(
    x: Tensor, gate_weight: Tensor, scale: Tensor, previous: Tensor | None, a: Tensor, d: Tensor,
    needs_dx: bool, needs_dgate: bool, needs_dprevious: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """→ dx [B, T, D], dgate_weight and dscale in one [G + 1], dprevious [B, 1, D], each None when not needed."""
    (B, T, D), G = x.shape, gate_weight.shape[1]
    tile = bwd_tile(D, G, x.element_size())
    programs = n_programs(B * T, tile, x.device)
    dx = torch.empty((B, T, D), dtype=x.dtype, device=x.device) if needs_dx else None
    lines = torch.empty((programs, G + 1), dtype=a.dtype, device=x.device) if needs_dgate else None
    dprevious = torch.empty((B, 1, D), dtype=x.dtype, device=x.device) if needs_dprevious else None
    overlap = needs_dgate and can_overlap(x.device)
    if x.numel() > 0:
        launch(
            _smear_bwd_kernel, (programs,), x=x, gate_weight=gate_weight, scale=scale, previous=previous, a=a, d=d,
            dx=dx, dprevious=dprevious, lines=lines, stride_xb=x.stride(0), stride_xt=x.stride(1),
            stride_w=gate_weight.stride(1), stride_pb=stride_of(previous, 0), stride_pd=stride_of(previous, 2),
            stride_db=d.stride(0), stride_dt=d.stride(1), N=B * T, T=T, D=D, G=G, BT=tile.BT, BD=tile.BD,
            BG=next_power_of_two(G), STAGES=tile.stages, OVERLAP=overlap, num_warps=tile.warps,
        )
    elif dprevious is not None:
        dprevious.zero_()  # no tokens, but rows
    return dx, sum_lines(lines, a.dtype, overlap) if needs_dgate else None, dprevious


def bwd_tile(D: int, G: int, itemsize: int) -> Tile:
    """One block of columns holds all of the gate's channels. Up to four tiles are on their way at a time."""
    BT, columns, warps, stages, stay = BACKWARD
    BD = max(next_power_of_two(G), min(next_power_of_two(D), WIDEST_BLOCK))
    BT = max(1, BT * columns // BD)
    return as_staged(Tile(BT, BD, min(max(warps, BD // 512), 16), stages, stay), itemsize, tensors=4)


class _Smear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, gate_weight: Tensor, scale: Tensor, previous: Tensor | None,
        doc_ids: Tensor | None,
    ) -> Tensor:
        x = values_side_by_side(x)
        y, a = _smear_fwd(x, gate_weight, scale, previous, doc_ids)
        ctx.save_for_backward(x, gate_weight, scale, previous, a)
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: FunctionCtx, d: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_weight, scale, previous, a = ctx.saved_tensors
        needs_dx, needs_dweight, needs_dscale, needs_dprevious, _ = ctx.needs_input_grad
        dx, dgate, dprevious = _smear_bwd(
            x, gate_weight, scale, previous, a, values_side_by_side(d), needs_dx, needs_dweight or needs_dscale,
            needs_dprevious,
        )
        dweight = dgate[:-1].view(gate_weight.shape).to(gate_weight.dtype) if needs_dweight else None
        dscale = dgate[-1:].view(scale.shape).to(scale.dtype) if needs_dscale else None
        return dx, dweight, dscale, dprevious, None


def smear(
    x: Tensor,
    gate_weight: Tensor,
    scale: Tensor,
    *,
    previous: Tensor | None = None,
    doc_ids: Tensor | None = None,
) -> Tensor:
    """kernels_torch.smear, in one pass over x. Arguments: see kernels_torch.smear."""
    check_smear(x, gate_weight, scale, previous, doc_ids)
    check_gpu(x=x)
    return _Smear.apply(x, gate_weight, scale, previous, doc_ids)
