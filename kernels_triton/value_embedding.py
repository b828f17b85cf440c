"""Value embedding, with e = table[token], σ the logistic function and one gate for each head:

    y = v + g · e,   g = gate_range · σ(z),   z = gate_weight · gate_input

Backward, with d the incoming gradient:

    dv = d                                   dtable[r] = Σ over the tokens that are r of g · d
    dgate_input = gate_weightᵀ · dz          dz = gate_range · σ(z) · (1 − σ(z)) · Σ over a head's channels of d · e
    dgate_weight = Σ over tokens of dz · gate_input

Forward keeps σ(z), one value a token and head. The gradient of the table is embedding.py's, whose pass over d and the
table leaves d · e as well. The sum for the gate's weight is that of a fixed number of programs, added in a second kernel:
nothing depends on timing.

Table and gate_weight are rounded to the dtype of v as they are read, and computed with in fp32 from there.

A token outside the table is an IndexError on a CPU, and NaN on a GPU, which would have to be waited for.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kernels_torch.masters import take_gradient
from kernels_torch.value_embedding import check_value_embedding
from kernels_triton.autograd import differentiable_once
from kernels_triton.embedding import _table_bwd, heads_and_columns, refuse_tokens_outside

from kernels_triton.launch import (  # isort: skip
    Tile, can_overlap, ceil_div, check_gpu, launch, next_power_of_two, resident_programs,
)
from kernels_triton.rows import sum_lines, values_side_by_side

# Rows × columns at a time, and warps for the widest block of columns; measured as in embedding.py.
VALUES = Tile(BT=4, BD=1024, warps=4)         # 72.2; (2, 1024, 4) 78.2, (4, 256, 1) 77.6, (8, 1024, 8) 72.4
GATES = Tile(BT=128, BD=32, warps=4, stay=4)  # rows × (heads × channels) of what one program multiplies at a time; no number


@triton.jit
def _value_embedding_fwd_kernel(
    v, tokens, table, gate_input, gate_weight, y, sigma,
    stride_vn, stride_vh, stride_token, stride_tv, stride_td, stride_in, stride_ig, stride_wh, stride_wg, N, V,
    H: tl.constexpr, D: tl.constexpr, G: tl.constexpr, gate_range: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, BG: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o_h = tl.program_id(1).to(tl.int64) * BH + tl.arange(0, BH)
    o_d = tl.program_id(2).to(tl.int64) * BD + tl.arange(0, BD)
    m_n, m_h = o_n < N, o_h < H
    m_nh = m_n[:, None] & m_h[None, :]
    m = m_nh[:, :, None] & (o_d < D)[None, None, :]
    b_token = tl.load(tokens + o_n * stride_token, mask=m_n, other=0).to(tl.int64)                      # [BT]
    inside = (b_token >= 0) & (b_token < V)
    p_e = table + b_token[:, None, None] * stride_tv + (o_h[:, None] * D + o_d[None, :])[None, :, :] * stride_td
    b_e = tl.load(p_e, mask=m & inside[:, None, None], other=float("nan"))                              # [BT, BH, BD]
    b_e = b_e.to(v.dtype.element_ty).to(sigma.dtype.element_ty)  # rounded as every layer rounds its fp32 masters
    p_v = v + o_n[:, None, None] * stride_vn + o_h[None, :, None] * stride_vh + o_d[None, None, :]
    b_v = tl.load(p_v, mask=m, other=0.0).to(b_e.dtype)                                                 # [BT, BH, BD]
    b_z = tl.zeros([BT, BH], dtype=b_e.dtype)                                                           # [BT, BH]
    for i_g in range(0, G, BG):
        o_g = i_g + tl.arange(0, BG).to(tl.int64)
        p_in = gate_input + o_n[:, None] * stride_in + o_g[None, :] * stride_ig
        p_w = gate_weight + o_h[:, None] * stride_wh + o_g[None, :] * stride_wg
        b_in = tl.load(p_in, mask=m_n[:, None] & (o_g < G)[None, :], other=0.0).to(b_e.dtype)           # [BT, BG]
        b_w = tl.load(p_w, mask=m_h[:, None] & (o_g < G)[None, :], other=0.0).to(v.dtype.element_ty)    # [BH, BG]
        b_z += tl.sum(b_in[:, None, :] * b_w.to(b_e.dtype)[None, :, :], 2)
    b_sigma = tl.sigmoid(b_z)                                                                           # [BT, BH]
    b_y = b_v + (gate_range * b_sigma)[:, :, None] * b_e                                                # [BT, BH, BD]
    p_y = y + (o_n[:, None, None] * H + o_h[None, :, None]) * D + o_d[None, None, :]
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m)
    if tl.program_id(2) == 0:
        tl.store(sigma + o_n[:, None] * H + o_h[None, :], b_sigma, mask=m_nh)


@triton.jit
def _gate_bwd_kernel(
    tokens, sigma, dots, gate_input, gate_weight, dgate_input, lines,
    stride_token, stride_in, stride_ig, stride_wh, stride_wg, N, V,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, gate_range: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr, BG: tl.constexpr, OVERLAP: tl.constexpr,
):
    """From d · e, the sum of C blocks of columns: dgate_input, and a line [H, G] of dgate_weight for each program."""
    i_p, n_p = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    o_h, o_g = tl.arange(0, BH), tl.program_id(1).to(tl.int64) * BG + tl.arange(0, BG)
    m_h, m_g = o_h < H, o_g < G
    if dgate_input is not None:
        p_w = gate_weight + o_g[:, None] * stride_wg + o_h[None, :].to(tl.int64) * stride_wh
        b_w = tl.load(p_w, mask=m_g[:, None] & m_h[None, :], other=0.0)                                 # [BG, BH]
        b_w = b_w.to(gate_input.dtype.element_ty).to(sigma.dtype.element_ty)
    b_dw = tl.zeros([BH, BG], dtype=sigma.dtype.element_ty)                                             # [BH, BG]
    for i_n in range(i_p, tl.cdiv(N, BT), n_p):
        o_n = i_n * BT + tl.arange(0, BT)
        m_n = o_n < N
        o_nh, m_nh = o_n[:, None] * H + o_h[None, :], m_n[:, None] & m_h[None, :]
        b_token = tl.load(tokens + o_n * stride_token, mask=m_n, other=0)                               # [BT]
        b_sigma = tl.load(sigma + o_nh, mask=m_nh, other=0.0)                                           # [BT, BH]
        b_dot = tl.zeros([BT, BH], dtype=b_sigma.dtype)                                                 # [BT, BH]
        o_c = o_n
        for _ in range(C):
            b_dot += tl.load(dots + o_c[:, None] * H + o_h[None, :], mask=m_nh, other=0.0)
            o_c += N
        inside = (b_token >= 0) & (b_token < V)
        b_dz = gate_range * b_sigma * (1 - b_sigma) * tl.where(inside[:, None], b_dot, float("nan"))    # [BT, BH]
        if dgate_input is not None:  # summed over the last dimension: over the middle one, Triton makes it a tf32 product
            b_din = tl.sum(b_dz[:, None, :] * b_w[None, :, :], 2)                                       # [BT, BG]
            p_din = dgate_input + o_n[:, None] * G + o_g[None, :]
            tl.store(p_din, b_din.to(dgate_input.dtype.element_ty), mask=m_n[:, None] & m_g[None, :])
        if lines is not None:
            p_in = gate_input + o_n[:, None] * stride_in + o_g[None, :] * stride_ig
            b_in = tl.load(p_in, mask=m_n[:, None] & m_g[None, :], other=0.0).to(b_dz.dtype)            # [BT, BG]
            b_dw += tl.sum(b_dz[:, :, None] * b_in[:, None, :], 0)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    if lines is not None:
        tl.store(lines + i_p * H * G + o_h[:, None] * G + o_g[None, :], b_dw, mask=m_h[:, None] & m_g[None, :])


def _value_embedding_fwd(
    v: Tensor, tokens: Tensor, table: Tensor, gate_input: Tensor, gate_weight: Tensor, gate_range: float
) -> tuple[Tensor, Tensor]:
    """v [N, H, D], tokens [N], table [V, H · D], gate_input [N, G], gate_weight [H, G] → y [N, H, D], σ [N, H]."""
    (N, H, D), G = v.shape, gate_input.shape[1]
    y = torch.empty((N, H, D), dtype=v.dtype, device=v.device)
    sigma = torch.empty((N, H), dtype=torch.promote_types(v.dtype, torch.float32), device=v.device)
    if y.numel() > 0:
        BH, BD, warps = heads_and_columns(H, D, VALUES)
        launch(
            _value_embedding_fwd_kernel, (ceil_div(N, VALUES.BT), ceil_div(H, BH), ceil_div(D, BD)),
            v=v, tokens=tokens, table=table, gate_input=gate_input, gate_weight=gate_weight, y=y, sigma=sigma,
            stride_vn=v.stride(0), stride_vh=v.stride(1), stride_token=tokens.stride(0), stride_tv=table.stride(0),
            stride_td=table.stride(1), stride_in=gate_input.stride(0), stride_ig=gate_input.stride(1),
            stride_wh=gate_weight.stride(0), stride_wg=gate_weight.stride(1), N=N, V=table.shape[0],
            H=H, D=D, G=G, gate_range=gate_range, BT=VALUES.BT, BH=BH, BD=BD, BG=min(next_power_of_two(G), 32),
            num_warps=warps,
        )
    return y, sigma


def _gate_bwd(
    tokens: Tensor, sigma: Tensor, dots: Tensor, gate_input: Tensor, gate_weight: Tensor, V: int, gate_range: float,
    needs_dinput: bool, needs_dweight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """→ dgate_input [N, G], dgate_weight [H, G], each None when not needed."""
    (C, N, H), G = dots.shape, gate_input.shape[1]
    BH, BG = next_power_of_two(H), min(next_power_of_two(G), GATES.BD)
    BT = max(1, min(GATES.BT * GATES.BD // (BH * BG), GATES.BT))
    programs = min(ceil_div(N, BT), resident_programs(dots.device, GATES.stay))
    dinput = torch.empty((N, G), dtype=gate_input.dtype, device=dots.device) if needs_dinput else None
    lines = torch.empty((programs, H * G), dtype=sigma.dtype, device=dots.device) if needs_dweight else None
    overlap = needs_dweight and can_overlap(dots.device)
    if N > 0:
        launch(
            _gate_bwd_kernel, (programs, ceil_div(G, BG)), tokens=tokens, sigma=sigma, dots=dots,
            gate_input=gate_input, gate_weight=gate_weight, dgate_input=dinput, lines=lines,
            stride_token=tokens.stride(0), stride_in=gate_input.stride(0), stride_ig=gate_input.stride(1),
            stride_wh=gate_weight.stride(0), stride_wg=gate_weight.stride(1), N=N, V=V, H=H, G=G, C=C,
            gate_range=gate_range, BT=BT, BH=BH, BG=BG, OVERLAP=overlap, num_warps=GATES.warps,
        )
    return dinput, sum_lines(lines, gate_weight.dtype, overlap).view(H, G) if needs_dweight else None


class _ValueEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, v: Tensor, tokens: Tensor, table: Tensor, gate_input: Tensor, gate_weight: Tensor,
        gate_range: float,
    ) -> Tensor:
        B, T, H, D = v.shape
        values = values_side_by_side(v.reshape(B * T, H, D))
        gate_rows = gate_input.reshape(B * T, gate_input.shape[2])
        y, sigma = _value_embedding_fwd(values, tokens.reshape(-1), table, gate_rows, gate_weight, gate_range)
        ctx.save_for_backward(tokens, table, gate_input, gate_weight, sigma)
        ctx.gate_range, ctx.owner = gate_range, table
        return y.view(v.shape)

    @staticmethod
    @differentiable_once
    def backward(ctx: FunctionCtx, d: Tensor) -> tuple[Tensor | None, ...]:
        tokens, table, gate_input, gate_weight, sigma = ctx.saved_tensors
        needs_dv, _, needs_dtable, needs_dinput, needs_dweight, _ = ctx.needs_input_grad
        dtable = dinput = dweight = None
        if needs_dtable or needs_dinput or needs_dweight:
            B, T, H, D = d.shape
            ids, rows = tokens.reshape(-1), gate_input.reshape(B * T, gate_input.shape[2])
            total = take_gradient(ctx.owner) if needs_dtable else None
            dtable, dots = _table_bwd(
                values_side_by_side(d.reshape(B * T, H, D)), ids, table.shape[0], table.dtype if needs_dtable else None,
                table if needs_dinput or needs_dweight else None, sigma, ctx.gate_range, sigma.dtype, total,
            )
            if dots is not None:
                dinput, dweight = _gate_bwd(
                    ids, sigma, dots, rows, gate_weight, table.shape[0], ctx.gate_range, needs_dinput, needs_dweight
                )
                dinput = dinput if dinput is None else dinput.view(gate_input.shape)
        return d if needs_dv else None, None, dtable, dinput, dweight, None


def value_embedding(
    v: Tensor, tokens: Tensor, table: Tensor, gate_input: Tensor, gate_weight: Tensor, *, gate_range: float = 3.0
) -> Tensor:
    """kernels_torch.value_embedding, in one pass over v. Arguments: see kernels_torch.value_embedding."""
    check_value_embedding(v, tokens, table, gate_input, gate_weight)
    check_gpu(v=v)
    refuse_tokens_outside(tokens, table.shape[0])
    return _ValueEmbedding.apply(v, tokens, table, gate_input, gate_weight, float(gate_range))
