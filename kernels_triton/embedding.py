"""What tokens look up and how it is mixed in, with e = table[token], σ the logistic function and one gate for each head:

    embedding         y = e
    value_embedding   y = v + g · e,           g = gate_range · σ(z),   z = gate_weight · gate_input
    smear             y_t = x_t + g_t · x_t−1,  g_t = scale · a_t,       a_t = σ(gate_weight · x_t[:G]) (0: nothing before t)

Backward, with d the incoming gradient:

    dtable[r] = Σ over the tokens that are r of g · d       dv = d
    dz = gate_range · σ(z) · (1 − σ(z)) · Σ_d d · e         dx_t = d_t + g_t+1 · d_t+1 + dz_t · gate_weight
    dgate_input = dz · gate_weight                          dz_t = scale · a_t · (1 − a_t) · s_t,   s_t = Σ d_t · x_t−1
    dgate_weight = Σ over tokens of dz · gate_input         dscale = Σ_t a_t · s_t

The gradient of a table is summed without atomics. Tokens are sorted, so that those of one row of the table lie together
(`order` says where each came from), and then each row is written once, zeros too, by the program that sums its
entries. So that a frequent token does not keep one program busy while the others have gone home, the sorted list is cut
into chunks of equal length, and a kernel before sums those chunks that are of one token throughout: a row is then the sum
of such chunks and of what sticks out at both ends. That kernel also marks where in the list each row begins and ends.
Which values are added in which order follows from the tokens alone. The same pass over d and the table gives Σ_d d · e.

Forward keeps σ(z), or a, which is one value a token and head. Sums over all tokens for the gate's weight are those of a
fixed number of programs, added in a second kernel.

Table and gate_weight are rounded to the dtype of v (x) as they are read, and computed with in fp32 from there.

A token outside the table is an IndexError on a CPU. A GPU would have to be waited for: there its values are NaN, and so
is all that is computed from them. Nothing is read or written outside of the table.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from kernels_torch.embedding import check_embedding, check_smear, check_value_embedding

from kernels_triton.launch import (  # isort: skip
    STAGE_BYTES, Tile, can_overlap, ceil_div, check_gpu, launch, next_power_of_two, resident_programs,
)
from kernels_triton.rmsnorm import sum_lines

# Rows × columns at a time, and warps for the widest block of columns. µs between two events on an H200, L2 flushed, bf16,
# of 65536 tokens × 768 and a vocabulary of 32768, distributed as words are; a plain copy of 201 MB takes 52.9. What has no
# number has not been measured.
GATHER = Tile(BT=4, BD=256, warps=1)      # 43.1; (2, 1024, 4) 45.5, (8, 1024, 8) 45.5, all with ordinary stores
VALUES = Tile(BT=4, BD=1024, warps=4)     # 72.2; (2, 1024, 4) 78.2, (4, 256, 1) 77.6, (8, 1024, 8) 72.4
SMEAR_FWD = Tile(BT=4, BD=256, warps=2)   # 59.7; (4, 256, 1) 60.3, (2, 1024, 4) 63.0, (4, 1024, 4) 70.8
SMEAR_BWD = Tile(BT=2, BD=1024, warps=4, stages=3, stay=4)
WIDEST_BLOCK = 8192                       # of a row that smear's backward holds at a time
GATES = Tile(BT=128, BD=32, warps=4, stay=4)  # rows × (heads × channels) of what one program multiplies at a time

# The gradient of the table, with tokens sorted as int32, took 129 µs; with chunks of 64 entries 138 (of which 2 entries at
# a time made 156, and 8 made 150), with 128 168: in a chunk one program goes from entry to entry.
CHUNK = 32                                # sorted entries that are summed ahead when they are all of one token
CHUNKS = Tile(BT=8, BD=1024, warps=4)     # 4 in the numbers above
ENTRIES = Tile(BT=4, BD=1024, warps=4)
GATED_ENTRIES = Tile(BT=2, BD=1024, warps=4)  # compiled for sm_90, 4 entries at a time take 96 registers and spill
SHORT = 2**16  # rows that 16 bits tell apart: 65536 tokens are sorted as int16 in 36 µs, as int32 in 51, as int64 in 80


@triton.jit
def _embedding_fwd_kernel(
    tokens, table, y, stride_token, stride_v, stride_d, N, V,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o_d = tl.program_id(1).to(tl.int64) * BD + tl.arange(0, BD)
    m = (o_n < N)[:, None] & (o_d < D)[None, :]
    b_token = tl.load(tokens + o_n * stride_token, mask=o_n < N, other=0).to(tl.int64)                  # [BT]
    inside = (b_token >= 0) & (b_token < V)
    p_e = table + b_token[:, None] * stride_v + o_d[None, :] * stride_d
    b_e = tl.load(p_e, mask=m & inside[:, None], other=float("nan"))                                    # [BT, BD]
    # What is written makes way in the L2 cache for the table, whose rows are asked for again: 45.5 → 42.2 µs at (8, 1024, 8).
    tl.store(y + o_n[:, None] * D + o_d[None, :], b_e.to(y.dtype.element_ty), mask=m, cache_modifier=".cs")


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
def _add_entries(
    b_sum, b_e, d, order, sigma, dots, begin, n_head, tail, n, stride_n, o_h, o_hd, m,
    H: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr,
):
    """b_sum [BH · BD] + Σ of d, times its gate, over n sorted entries: n_head from `begin` on, the others from `tail` on.

    With `dots`, leaves d · e there for each of them, e being the row of the table that they all name, b_e.
    """
    for i_n in range(0, n, BT):
        o_i = i_n + tl.arange(0, BT)
        m_i = o_i < n
        o_i = tl.where(o_i < n_head, begin + o_i, tail - n_head + o_i)
        b_n = tl.load(order + o_i, mask=m_i, other=0)                                                   # [BT]
        p_d = d + b_n[:, None] * stride_n + o_hd[None, :]
        b_d = tl.load(p_d, mask=m_i[:, None] & m[None, :], other=0.0).to(b_sum.dtype)                   # [BT, BH · BD]
        if sigma is not None:
            o_nh = b_n[:, None] * H + o_h[None, :]
            m_nh = m_i[:, None] & (o_h < H)[None, :]
            if dots is not None:
                b_dot = tl.sum(tl.reshape(b_d * b_e[None, :], [BT, BH, BD]), 2)                         # [BT, BH]
                tl.store(dots + o_nh, b_dot, mask=m_nh)
            b_sigma = tl.load(sigma + o_nh, mask=m_nh, other=0.0)                                       # [BT, BH]
            b_d *= tl.reshape(tl.broadcast_to(b_sigma[:, :, None], [BT, BH, BD]), [BT, BH * BD])
        b_sum += tl.sum(b_d, 0)
    return b_sum


@triton.jit
def _chunks_kernel(
    d, tokens, order, bounds, chunks, table, sigma, dots, stride_n, stride_h, stride_tv, stride_td, N, V,
    H: tl.constexpr, D: tl.constexpr, L: tl.constexpr, BITS: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr,
):
    """Where each row begins and ends in the sorted list, and the sum of each chunk of L entries that are of one row.

    BITS undoes the sign that tokens beyond 2¹⁵ have when they are sorted as int16.
    """
    i_l = tl.program_id(0).to(tl.int64)
    if (tl.program_id(1) == 0) & (tl.program_id(2) == 0):
        o_i = i_l * L + tl.arange(0, L)
        m_i = o_i < N
        b_token = tl.load(tokens + o_i, mask=m_i, other=0).to(tl.int32) & BITS                          # [L]
        b_before = tl.load(tokens + o_i - 1, mask=m_i & (o_i > 0), other=0).to(tl.int32) & BITS         # [L]
        b_after = tl.load(tokens + o_i + 1, mask=o_i + 1 < N, other=0).to(tl.int32) & BITS              # [L]
        m_i &= (b_token >= 0) & (b_token < V)
        tl.store(bounds + b_token, o_i, mask=m_i & ((o_i == 0) | (b_token != b_before)))
        tl.store(bounds + V + b_token, o_i + 1, mask=m_i & ((o_i + 1 == N) | (b_token != b_after)))
    i_last = tl.minimum((i_l + 1) * L, N) - 1
    token = tl.load(tokens + i_l * L).to(tl.int32) & BITS
    same = token == tl.load(tokens + i_last).to(tl.int32) & BITS
    if same & ((i_l + 1) * L <= N) & (token >= 0) & (token < V):
        i_d = tl.program_id(2).to(tl.int64)
        o_h = tl.program_id(1).to(tl.int64) * BH + tl.arange(0, BH)
        o_ch = tl.program_id(1).to(tl.int64) * BH + tl.arange(0, BH * BD) // BD
        o_cd = i_d * BD + tl.arange(0, BH * BD) % BD
        m = (o_ch < H) & (o_cd < D)
        b_sum = tl.zeros([BH * BD], dtype=chunks.dtype.element_ty)                                      # [BH · BD]
        b_e = b_sum
        if dots is not None:
            dots += i_d * N * H
            p_e = table + token.to(tl.int64) * stride_tv + (o_ch * D + o_cd) * stride_td
            b_e = tl.load(p_e, mask=m, other=0.0).to(d.dtype.element_ty).to(b_sum.dtype)                # [BH · BD]
        b_sum = _add_entries(
            b_sum, b_e, d, order, sigma, dots, i_l * L, L, 0, L, stride_n, o_h, o_ch * stride_h + o_cd, m, H, BT, BH, BD
        )
        tl.store(chunks + i_l * H * D + o_ch * D + o_cd, b_sum, mask=m)


@triton.jit
def _table_bwd_kernel(
    d, order, bounds, chunks, table, sigma, dots, dtable, stride_n, stride_h, stride_tv, stride_td, N, V,
    H: tl.constexpr, D: tl.constexpr, gate_range: tl.constexpr, L: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr,
):
    """A row of dtable: the sum of its whole chunks and of its entries before and behind them."""
    i_v, i_d = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_h = tl.program_id(1).to(tl.int64) * BH + tl.arange(0, BH)
    o_ch = tl.program_id(1).to(tl.int64) * BH + tl.arange(0, BH * BD) // BD
    o_cd = i_d * BD + tl.arange(0, BH * BD) % BD
    o_c = o_ch * D + o_cd
    m = (o_ch < H) & (o_cd < D)
    begin, end = tl.load(bounds + i_v), tl.load(bounds + V + i_v)
    first, last = tl.cdiv(begin, L), end // L
    some = first < last
    n_head = tl.where(some, first * L, end) - begin
    tail = tl.where(some, last * L, end)
    b_sum = tl.zeros([BH * BD], dtype=chunks.dtype.element_ty)                                          # [BH · BD]
    b_e = b_sum
    if dots is not None:
        dots += i_d * N * H
        p_e = table + i_v * stride_tv + o_c * stride_td
        b_e = tl.load(p_e, mask=m & (o_c < tl.where(begin < end, H * D, 0)), other=0.0)                 # [BH · BD]
        b_e = b_e.to(d.dtype.element_ty).to(b_sum.dtype)
    b_sum = _add_entries(
        b_sum, b_e, d, order, sigma, dots, begin, n_head, tail, n_head + end - tail,
        stride_n, o_h, o_ch * stride_h + o_cd, m, H, BT, BH, BD,
    )
    if dtable is not None:
        for i_l in range(first, last, BT):
            o_l = i_l + tl.arange(0, BT)
            p_l = chunks + o_l[:, None] * (H * D) + o_c[None, :]
            b_sum += tl.sum(tl.load(p_l, mask=(o_l < last)[:, None] & m[None, :], other=0.0), 0)
        tl.store(dtable + i_v * H * D + o_c, (gate_range * b_sum).to(dtable.dtype.element_ty), mask=m)


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


@triton.jit
def _smear_fwd_kernel(
    x, gate_weight, scale, previous, doc_ids, y, a,
    stride_xb, stride_xt, stride_w, stride_pb, stride_pd, stride_db, stride_dt, N, T,
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
        p_doc = doc_ids + o_b * stride_db + o_t * stride_dt
        goes_on = later & (tl.load(p_doc, mask=later, other=0) == tl.load(p_doc - stride_dt, mask=later, other=0))
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


def _embedding_fwd(tokens: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """tokens [N], table [V, D] → y [N, D]."""
    N, (V, D) = tokens.shape[0], table.shape
    y = torch.empty((N, D), dtype=dtype, device=table.device)
    if y.numel() > 0:
        BD = block_of(D, GATHER.BD)
        launch(
            _embedding_fwd_kernel, (ceil_div(N, GATHER.BT), ceil_div(D, BD)),
            tokens=tokens, table=table, y=y, stride_token=tokens.stride(0), stride_v=table.stride(0),
            stride_d=table.stride(1), N=N, V=V, D=D, BT=GATHER.BT, BD=BD, num_warps=GATHER.warps,
        )
    return y


def block_of(n: int, widest: int, narrowest: int = 256) -> int:
    """The widest power of two of which whole blocks cover n with at most a third of them to spare."""
    block = min(next_power_of_two(n), widest)
    while block > narrowest and 2 * block * ceil_div(n, block) > 3 * n:
        block //= 2
    return block


def heads_and_columns(H: int, D: int, tile: Tile) -> tuple[int, int, int]:
    """Blocks of BH heads and BD columns of each, and warps: several heads where one has few columns."""
    BD = block_of(D, tile.BD)
    BH = block_of(H, tile.BD // BD, max(1, 256 // BD))
    return BH, BD, max(1, tile.warps * BH * BD // tile.BD)


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


def _table_bwd(
    d: Tensor, tokens: Tensor, V: int, dtype: torch.dtype | None, table: Tensor | None, sigma: Tensor | None,
    gate_range: float, wide: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """d [N, H, D], tokens [N], table [V, H · D], σ [N, H] → dtable [V, H · D] and d · e [C, N, H] for C blocks of columns.

    The first in `dtype`, or None without; the second where the table is given. Both are summed in `wide`.
    """
    N, H, D = d.shape
    tile = ENTRIES if sigma is None else GATED_ENTRIES
    BH, BD, warps = heads_and_columns(H, D, tile)
    blocks = (ceil_div(H, BH), ceil_div(D, BD))
    dtable = None if dtype is None else torch.empty((V, H * D), dtype=dtype, device=d.device)
    dots = None if table is None else torch.empty((blocks[1], N, H), dtype=wide, device=d.device)
    if V * H * D == 0:
        return dtable, dots
    short = V <= SHORT
    tokens, order = torch.sort(tokens.to(torch.int16 if short else torch.int32), stable=True)
    bounds = torch.zeros((2, V), dtype=torch.int64, device=d.device)
    n_chunks = ceil_div(N, CHUNK)
    chunks = torch.empty((n_chunks, H * D), dtype=wide, device=d.device)
    inputs = dict(
        d=d, order=order, bounds=bounds, chunks=chunks, table=table, sigma=sigma, dots=dots, stride_n=d.stride(0),
        stride_h=d.stride(1), stride_tv=stride_of(table, 0), stride_td=stride_of(table, 1), N=N, V=V, H=H, D=D,
        L=CHUNK, BH=BH, BD=BD, num_warps=warps,
    )
    if N > 0:
        bits = 2**16 - 1 if short else -1
        launch(_chunks_kernel, (n_chunks, *blocks), **inputs, tokens=tokens, BITS=bits, BT=CHUNKS.BT)
    launch(_table_bwd_kernel, (V, *blocks), **inputs, dtable=dtable, gate_range=gate_range, BT=tile.BT)
    return dtable, dots


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


def _smear_fwd(
    x: Tensor, gate_weight: Tensor, scale: Tensor, previous: Tensor | None, doc_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """→ y [B, T, D], a [B, T]."""
    (B, T, D), G = x.shape, gate_weight.shape[1]
    y = torch.empty((B, T, D), dtype=x.dtype, device=x.device)
    a = torch.empty((B, T), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    if y.numel() > 0:
        BD = block_of(D, SMEAR_FWD.BD)
        launch(
            _smear_fwd_kernel, (ceil_div(B * T, SMEAR_FWD.BT), ceil_div(D, BD)),
            x=x, gate_weight=gate_weight, scale=scale, previous=previous, doc_ids=doc_ids, y=y, a=a,
            stride_xb=x.stride(0), stride_xt=x.stride(1), stride_w=gate_weight.stride(1),
            stride_pb=stride_of(previous, 0), stride_pd=stride_of(previous, 2),
            stride_db=stride_of(doc_ids, 0), stride_dt=stride_of(doc_ids, 1), N=B * T, T=T, D=D, G=G,
            BT=SMEAR_FWD.BT, BD=BD, BG=min(next_power_of_two(G), 32), num_warps=SMEAR_FWD.warps,
        )
    return y, a


def stride_of(x: Tensor | None, dim: int) -> int:
    """Of a tensor that may not be there."""
    return 0 if x is None else x.stride(dim)


def _smear_bwd(
    x: Tensor, gate_weight: Tensor, scale: Tensor, previous: Tensor | None, a: Tensor, d: Tensor,
    needs_dx: bool, needs_dgate: bool, needs_dprevious: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """→ dx [B, T, D], dgate_weight and dscale in one [G + 1], dprevious [B, 1, D], each None when not needed."""
    (B, T, D), G = x.shape, gate_weight.shape[1]
    tile = smear_bwd_tile(D, G, x.element_size())
    programs = min(ceil_div(B * T, tile.BT), resident_programs(x.device, tile.stay))
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


def smear_bwd_tile(D: int, G: int, itemsize: int) -> Tile:
    """One block of columns holds all of the gate's channels. Up to four tiles are on their way at a time."""
    BT, columns, warps, stages, stay = SMEAR_BWD
    BD = max(next_power_of_two(G), min(next_power_of_two(D), WIDEST_BLOCK))
    BT = max(1, BT * columns // BD)
    stages = min(stages, 1 + STAGE_BYTES // (4 * BT * BD * itemsize))
    return Tile(BT, BD, min(max(warps, BD // 512), 16), stages, stay)


def values_side_by_side(x: Tensor) -> Tensor:
    """x, copied when the values of its last dimension do not lie next to each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def refuse_tokens_outside(tokens: Tensor, V: int) -> None:
    """F.embedding's error, where asking costs nothing."""
    if tokens.device.type == "cpu" and tokens.numel() > 0 and not torch.compiler.is_compiling():
        low, high = (int(value) for value in tokens.aminmax())
        if low < 0 or high >= V:
            raise IndexError(f"token {low if low < 0 else high} is outside the table of {V} rows")


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, tokens: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.rows, ctx.dtype = table.shape[0], table.dtype
        return _embedding_fwd(tokens.reshape(-1), table, dtype).view(*tokens.shape, table.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d: Tensor) -> tuple[None, Tensor | None, None]:
        (tokens,) = ctx.saved_tensors
        rows = values_side_by_side(d.reshape(tokens.numel(), 1, d.shape[-1]))
        wide = torch.promote_types(ctx.dtype, torch.float32)
        dtable, _ = _table_bwd(rows, tokens.reshape(-1), ctx.rows, ctx.dtype, None, None, 1.0, wide)
        return None, dtable, None


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
        ctx.gate_range = gate_range
        return y.view(v.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d: Tensor) -> tuple[Tensor | None, ...]:
        tokens, table, gate_input, gate_weight, sigma = ctx.saved_tensors
        needs_dv, _, needs_dtable, needs_dinput, needs_dweight, _ = ctx.needs_input_grad
        dtable = dinput = dweight = None
        if needs_dtable or needs_dinput or needs_dweight:
            B, T, H, D = d.shape
            ids, rows = tokens.reshape(-1), gate_input.reshape(B * T, gate_input.shape[2])
            dtable, dots = _table_bwd(
                values_side_by_side(d.reshape(B * T, H, D)), ids, table.shape[0], table.dtype if needs_dtable else None,
                table if needs_dinput or needs_dweight else None, sigma, ctx.gate_range, sigma.dtype,
            )
            if dots is not None:
                dinput, dweight = _gate_bwd(
                    ids, sigma, dots, rows, gate_weight, table.shape[0], ctx.gate_range, needs_dinput, needs_dweight
                )
                dinput = dinput if dinput is None else dinput.view(gate_input.shape)
        return d if needs_dv else None, None, dtable, dinput, dweight, None


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
    @once_differentiable
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


def embedding(tokens: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """kernels_torch.embedding, gathered and cast in one pass."""
    check_embedding(tokens, table, dtype)
    check_gpu(tokens=tokens)
    refuse_tokens_outside(tokens, table.shape[0])
    return _Embedding.apply(tokens, table, dtype)


def value_embedding(
    v: Tensor, tokens: Tensor, table: Tensor, gate_input: Tensor, gate_weight: Tensor, *, gate_range: float = 3.0
) -> Tensor:
    """kernels_torch.value_embedding, in one pass over v."""
    check_value_embedding(v, tokens, table, gate_input, gate_weight)
    check_gpu(v=v)
    refuse_tokens_outside(tokens, table.shape[0])
    return _ValueEmbedding.apply(v, tokens, table, gate_input, gate_weight, float(gate_range))


def smear(
    x: Tensor,
    gate_weight: Tensor,
    scale: Tensor,
    *,
    previous: Tensor | None = None,
    doc_ids: Tensor | None = None,
) -> Tensor:
    """kernels_torch.smear, in one pass over x."""
    check_smear(x, gate_weight, scale, previous, doc_ids)
    check_gpu(x=x)
    return _Smear.apply(x, gate_weight, scale, previous, doc_ids)
