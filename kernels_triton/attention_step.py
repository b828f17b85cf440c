"""All of attention between the projections for one token a row: rotation and norm of q and k, cache, softmax, values.

In a small cache most of a step is launching kernels and waiting for the first bytes. So here is no kernel before the one
that reads the cache (kernels_triton/attention_decode.py has the maths, and the division into splits): each of its
programs rotates and normalises the queries that it needs itself, 256 bytes each and two rows of the tables. One program
more for each head of the cache does the same with the new key, writes it and the new value to their page, and leaves them
as a split of their own, of one key: nobody reads from the cache what is written in this launch. A second kernel joins the
splits.

A lone query to a key head is multiplied and summed in lanes where the cache is small; queries that share a key head, and
large caches, take products.

Nor need anybody wait for the kernel before to read what earlier steps left: lengths, tables, and the first keys and values
of each split are asked for before that, and only then q, k and v are awaited. It follows that no kernel of the same step
may write lengths, tables, or pages of this layer at earlier positions before this one. (A kernel that asks for no early
start, as PyTorch's all are, waits for everything before it: one between two steps is enough.)

Nothing is shared by programs but what they read, so two runs give the same bits, and rows know nothing of each other.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels_torch.attention_step import check_attention_step_paged, held_and_seen, room_of
from kernels_triton.attention_decode import (
    MOST_KEYS,
    Tile,
    _blocks_seen,
    _rows_of_block,
    attention_decode_paged,
    lanes,
    tile_for,
)
from kernels_triton.launch import can_overlap, ceil_div, check_gpu, launch, n_processors, next_power_of_two
from kernels_triton.linear_decode import _prefetch
from kernels_triton.qk_norm_rope import qk_norm_rope_append_paged, table_of
from kernels_triton.quantised_cache import as_read, codes_of, numbers_of, scale_and_inverse, scale_arguments
from kernels_triton.rows import values_side_by_side

# Tiles are attention_decode's. µs on an H200 in a d12's step at 1,104 tokens (table for 2,048), the joining kernel in brackets:
# 1 row in lanes 3.7 (2.2), where all waited before they read lengths 5.8 (1.8); 32 rows by products 33.3 (1.3), where they were
# four launches 39.0 together.
MOST_SPLITS = 128  # the new key's among them
JOINED = 4096      # values of the partial results that a program of the second kernel holds
FETCHED = 2        # blocks of keys and values that a split by products has brought to L2 before it waits


@triton.jit
def _rotated(p, o_d, m, b_cos, b_sin, D: tl.constexpr, eps: tl.constexpr, scale: tl.constexpr):
    """Vectors [..., BD] at p, rotated, normalised, scaled, and rounded as they would be in memory."""
    b_x = tl.load(p + o_d, mask=m, other=0.0).to(b_cos.dtype)                                           # [..., BD]
    b_other = tl.load(p + (o_d + D // 2) % D, mask=m, other=0.0).to(b_cos.dtype)                        # [..., BD]
    b_y = b_x * b_cos + b_other * b_sin
    if eps is None:
        b_y = b_y * scale
    else:
        b_y = b_y * (tl.rsqrt(tl.sum(b_y * b_y, len(b_y.shape) - 1, keep_dims=True) / D + eps) * scale)
    return b_y.to(p.dtype.element_ty).to(b_cos.dtype)


@triton.jit
def _angles(cos, sin, length, stride_cos, stride_sin, o_d, m_d, D: tl.constexpr):
    """Of the position `length`: cosines, and sines with the sign that the half of a vector asks for, [BD] each."""
    b_cos = tl.load(cos + length.to(tl.int64) * stride_cos + o_d % (D // 2), mask=m_d, other=0.0)       # [BD]
    b_sin = tl.load(sin + length.to(tl.int64) * stride_sin + o_d % (D // 2), mask=m_d, other=0.0)       # [BD]
    return b_cos, tl.where(o_d < D // 2, b_sin, -b_sin)


@triton.jit
def _store_codes(p_codes, p_scale, b_x, m_d, has_room):
    """One vector [BD] as codes and their scale → what they stand for."""
    b_scale, b_inverse = scale_and_inverse(tl.max(tl.abs(b_x), 0), tl.sum(b_x * 0.0, 0), p_codes.dtype.element_ty)
    b_codes = codes_of(b_x * b_inverse, p_codes.dtype.element_ty)                                       # [BD]
    tl.store(p_codes, b_codes, mask=m_d)
    tl.store(p_scale, b_scale, mask=has_room)
    return numbers_of(b_codes).to(b_x.dtype) * b_scale.to(p_scale.dtype.element_ty).to(b_x.dtype)


@triton.jit
def _store(p, scales, o_scale, b_x, m_d, has_room):
    """One vector [BD] into a page → what counts of it."""
    if scales is None:
        tl.store(p, b_x.to(p.dtype.element_ty), mask=m_d)
        return b_x
    else:
        return _store_codes(p, scales + o_scale, b_x, m_d, has_room)


@triton.jit
def _held(lengths, i_b, stride_lengths, S):
    """How many tokens a row held before, and whether there is room for one more: where there is none, it counts as empty."""
    length = tl.load(lengths + i_b * stride_lengths)
    has_room = (length >= 0) & (length < S)
    return tl.where(has_room, length, 0).to(tl.int32), has_room


@triton.jit
def _places(i_page, o_row, i_h, stride_p, stride_s, stride_h, stride_sp, stride_ss, stride_sh):
    """Of rows of pages where they begin, and where their scales lie."""
    return i_page * stride_p + o_row * stride_s + i_h * stride_h, i_page * stride_sp + o_row * stride_ss + i_h * stride_sh


@triton.jit
def _append(
    k, v, k_pages, v_pages, k_scales, v_scales, i_b, i_h, i_page, i_row, o_d, has_room, b_cos, b_sin,
    stride_kb, stride_kh, stride_vb, stride_vh, stride_kp, stride_ks, stride_kph, stride_vp, stride_vs, stride_vph,
    stride_ksp, stride_kss, stride_ksh, stride_vsp, stride_vss, stride_vsh,
    D: tl.constexpr, eps: tl.constexpr, qk_scale: tl.constexpr,
):
    """The new key and value of a head to their row of a page → what counts of them, [BD] each: zeros without room."""
    m_d = o_d < tl.where(has_room, D, 0)
    o_k, o_ku = _places(i_page, i_row, i_h, stride_kp, stride_ks, stride_kph, stride_ksp, stride_kss, stride_ksh)
    o_v, o_vu = _places(i_page, i_row, i_h, stride_vp, stride_vs, stride_vph, stride_vsp, stride_vss, stride_vsh)
    b_v = tl.load(v + i_b * stride_vb + i_h * stride_vh + o_d, mask=m_d, other=0.0).to(b_cos.dtype)     # [BD]
    b_k = _rotated(k + i_b * stride_kb + i_h * stride_kh, o_d, m_d, b_cos, b_sin, D, eps, qk_scale)     # [BD]
    b_k = _store(k_pages + o_k + o_d, k_scales, o_ku, b_k, m_d, has_room)
    b_v = _store(v_pages + o_v + o_d, v_scales, o_vu, b_v, m_d, has_room)
    return b_k, b_v


@triton.jit(do_not_specialize=["S", "Hkv", "n_splits"])
def _attention_step_kernel(
    q, k, v, k_pages, v_pages, k_scales, v_scales, table, cos, sin, lengths, parts, stats,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh,
    stride_kp, stride_ks, stride_kph, stride_vp, stride_vs, stride_vph,
    stride_ksp, stride_kss, stride_ksh, stride_vsp, stride_vss, stride_vsh,
    stride_tb, stride_tn, stride_cos, stride_sin, stride_lengths, window, S, Hkv, n_splits,
    D: tl.constexpr, PAGE: tl.constexpr, eps: tl.constexpr, qk_scale: tl.constexpr, scale: tl.constexpr,
    BS: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr, OVERLAP: tl.constexpr,
):
    """One query to a key head. parts [B · H, n_splits + 1, D], stats [B · H, n_splits + 1, 2]; the last is the new key's."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    i_p = tl.program_id(0)
    i_h, i_s, i_b = (i_p % Hkv).to(tl.int64), (i_p // Hkv) % (n_splits + 1), (i_p // (Hkv * (n_splits + 1))).to(tl.int64)
    length, has_room = _held(lengths, i_b, stride_lengths, S)
    reach = None if window is None else window - 1
    first, n_blocks, per_split, end = _blocks_seen(0, length, reach, 1, n_splits, 1, 1, BS, 1)
    i_first = first + i_s * per_split
    i_end = tl.minimum(i_first + per_split, first + n_blocks)
    if (i_s < n_splits) & (i_first >= i_end):
        return
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_cos, b_sin = _angles(cos, sin, length, stride_cos, stride_sin, o_d, m_d, D)                       # [BD]
    i_part = (i_b * Hkv + i_h) * (n_splits + 1) + i_s
    p_q = q + i_b * stride_qb + i_h * stride_qh
    i_new = tl.load(table + i_b * stride_tb + length // PAGE * stride_tn).to(tl.int64)  # the page of the new key
    if i_s == n_splits:
        if OVERLAP:
            tl.extra.cuda.gdc_wait()
        b_q = _rotated(p_q, o_d, m_d, b_cos, b_sin, D, eps, qk_scale) * (scale * 1.4426950408889634)    # [BD]
        b_new_k, b_new_v = _append(
            k, v, k_pages, v_pages, k_scales, v_scales, i_b, i_h, i_new, length % PAGE, o_d, has_room, b_cos, b_sin,
            stride_kb, stride_kh, stride_vb, stride_vh, stride_kp, stride_ks, stride_kph, stride_vp, stride_vs, stride_vph,
            stride_ksp, stride_kss, stride_ksh, stride_vsp, stride_vss, stride_vsh, D, eps, qk_scale,
        )
        tl.store(parts + i_part * D + o_d, b_new_v, mask=m_d)
        tl.store(stats + i_part * 2, tl.where(has_room, tl.sum(b_new_k * b_q, 0), 0.0))
        tl.store(stats + i_part * 2 + 1, 1.0)
    else:
        o_l = tl.arange(0, BL)[:, None] + tl.arange(0, BS // BL)[None, :] * BL  # neighbours in neighbouring lanes
        o_s = i_first * BS + o_l                                                                        # [BL, BS / BL]
        m_s = o_s < end
        if window is not None:
            m_s = m_s & (o_s >= length - window)
        i_page, o_row = _rows_of_block(table, i_first, o_s, m_s, i_b, stride_tb, stride_tn, PAGE, BS)
        o_k, o_ku = _places(i_page, o_row, i_h, stride_kp, stride_ks, stride_kph, stride_ksp, stride_kss, stride_ksh)
        o_v, o_vu = _places(i_page, o_row, i_h, stride_vp, stride_vs, stride_vph, stride_vsp, stride_vss, stride_vsh)
        m_sd = m_s[:, :, None] & m_d[None, None, :]
        b_k = tl.load(k_pages + o_k[:, :, None] + o_d[None, None, :], mask=m_sd, other=0.0)                       # [BL, BS / BL, BD]
        b_v = tl.load(v_pages + o_v[:, :, None] + o_d[None, None, :], mask=m_sd, other=0.0)                       # [BL, BS / BL, BD]
        b_ku, b_vu = m_s, m_s
        if k_scales is not None:
            b_ku, b_vu = tl.load(k_scales + o_ku, mask=m_s, other=0.0), tl.load(v_scales + o_vu, mask=m_s, other=0.0)         # [BL, BS / BL]
        if OVERLAP:
            tl.extra.cuda.gdc_wait()
        b_q = _rotated(p_q, o_d, m_d, b_cos, b_sin, D, eps, qk_scale) * (scale * 1.4426950408889634)    # [BD]
        b_max = tl.full([BL], float("-inf"), dtype=b_q.dtype)                                           # [BL]
        b_sum = tl.zeros([BL], dtype=b_q.dtype)                                                         # [BL]
        b_acc = tl.zeros([BL, BD], dtype=b_q.dtype)                                                     # [BL, BD]
        for i in range(i_first, i_end):
            o_s = (i + 1) * BS + o_l  # the next block comes while this one is summed
            m_next = (o_s < end) & (o_s < i_end * BS)                                                   # [BL, BS / BL]
            i_next = tl.minimum(i + 1, i_end - 1)
            i_page, o_row = _rows_of_block(table, i_next, o_s, m_next, i_b, stride_tb, stride_tn, PAGE, BS)
            o_k, o_ku = _places(i_page, o_row, i_h, stride_kp, stride_ks, stride_kph, stride_ksp, stride_kss, stride_ksh)
            o_v, o_vu = _places(i_page, o_row, i_h, stride_vp, stride_vs, stride_vph, stride_vsp, stride_vss, stride_vsh)
            m_sd = m_next[:, :, None] & m_d[None, None, :]
            b_next_k = tl.load(k_pages + o_k[:, :, None] + o_d[None, None, :], mask=m_sd, other=0.0)              # [BL, BS / BL, BD]
            b_next_v = tl.load(v_pages + o_v[:, :, None] + o_d[None, None, :], mask=m_sd, other=0.0)              # [BL, BS / BL, BD]
            b_next_ku, b_next_vu = m_next, m_next
            if k_scales is not None:
                b_next_ku = tl.load(k_scales + o_ku, mask=m_next, other=0.0)                                       # [BL, BS / BL]
                b_next_vu = tl.load(v_scales + o_vu, mask=m_next, other=0.0)                                       # [BL, BS / BL]
                b_k, b_v = numbers_of(b_k), numbers_of(b_v)
            b_s = tl.sum(b_k.to(b_q.dtype) * b_q[None, None, :], 2)                                     # [BL, BS / BL]
            if k_scales is not None:
                b_s *= b_ku.to(b_q.dtype)
            b_s = tl.where(m_s, b_s, float("-inf"))
            b_new = tl.maximum(b_max, tl.max(b_s, 1))                                                   # [BL]
            b_ref = tl.where(b_new == float("-inf"), 0.0, b_new)  # nothing seen yet: exp2 of −inf, not of NaN
            b_e = tl.exp2(b_s - b_ref[:, None])                                                         # [BL, BS / BL]
            b_shrink = tl.exp2(b_max - b_ref)                                                           # [BL]
            b_sum = b_sum * b_shrink + tl.sum(b_e, 1)
            if k_scales is not None:
                b_e *= b_vu.to(b_q.dtype)
            b_acc = b_acc * b_shrink[:, None] + tl.sum(b_e[:, :, None] * b_v.to(b_q.dtype), 1)
            b_max = b_new
            b_k, b_v, b_ku, b_vu, m_s = b_next_k, b_next_v, b_next_ku, b_next_vu, m_next
        b_top = tl.max(b_max, 0)
        b_weight = tl.exp2(b_max - tl.where(b_top == float("-inf"), 0.0, b_top))                        # [BL]
        tl.store(parts + i_part * D + o_d, tl.sum(b_acc * b_weight[:, None], 0), mask=m_d)
        tl.store(stats + i_part * 2, b_top)
        tl.store(stats + i_part * 2 + 1, tl.sum(b_sum * b_weight, 0))


@triton.jit(do_not_specialize=["S", "Hkv", "n_splits"])
def _attention_step_by_products_kernel(
    q, k, v, k_pages, v_pages, k_scales, v_scales, table, cos, sin, lengths, out, parts, stats,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh,
    stride_kp, stride_ks, stride_kph, stride_vp, stride_vs, stride_vph,
    stride_ksp, stride_kss, stride_ksh, stride_vsp, stride_vss, stride_vsh,
    stride_tb, stride_tn, stride_cos, stride_sin, stride_lengths, window, S, Hkv, n_splits,
    G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, eps: tl.constexpr, qk_scale: tl.constexpr, scale: tl.constexpr,
    BM: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, FETCH: tl.constexpr, OVERLAP: tl.constexpr,
):
    """G ≤ BM queries to a key head, the rows of a product with a block of keys. The last split begins with the new key.

    parts [B · H, n_splits, D] and stats [B · H, n_splits, 2]; without them out [B · H, D]
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    i_p = tl.program_id(0)
    i_h, i_s, i_b = (i_p % Hkv).to(tl.int64), (i_p // Hkv) % n_splits, (i_p // (Hkv * n_splits)).to(tl.int64)
    length, has_room = _held(lengths, i_b, stride_lengths, S)
    reach = None if window is None else window - 1
    first, n_blocks, per_split, end = _blocks_seen(0, length, reach, 1, n_splits, 1, 1, BS, 1)
    i_first = first + i_s * per_split
    i_end = tl.minimum(i_first + per_split, first + n_blocks)
    is_last = i_s == n_splits - 1
    if (i_first >= i_end) & (not is_last):
        return
    o_m, o_d = tl.arange(0, BM), tl.arange(0, BD)
    m_m, m_d = o_m < G, o_d < D
    m_md = m_m[:, None] & m_d[None, :]
    b_cos, b_sin = _angles(cos, sin, length, stride_cos, stride_sin, o_d, m_d, D)                       # [BD]
    p_q = q + i_b * stride_qb + (i_h * G + o_m)[:, None] * stride_qh                                    # [BM, 1]
    i_new = tl.load(table + i_b * stride_tb + length // PAGE * stride_tn).to(tl.int64)  # the page of the new key
    if OVERLAP:
        if i_first < i_end:
            LINE: tl.constexpr = 1024 // k_pages.dtype.element_ty.primitive_bitwidth
            o_line = tl.arange(0, BD // LINE if BD > LINE else 1)[None, :] * LINE
            for i in tl.static_range(FETCH):
                o_s = tl.minimum((i_first + i) * BS + tl.arange(0, BS), end - 1)                        # [BS]
                i_page, o_row = _rows_of_block(
                    table, tl.minimum(i_first + i, i_end - 1), o_s, o_s < end, i_b, stride_tb, stride_tn, PAGE, BS
                )
                _prefetch(k_pages + (i_page * stride_kp + o_row * stride_ks + i_h * stride_kph)[:, None] + o_line)
                _prefetch(v_pages + (i_page * stride_vp + o_row * stride_vs + i_h * stride_vph)[:, None] + o_line)
        tl.extra.cuda.gdc_wait()
    b_q = _rotated(p_q, o_d[None, :], m_md, b_cos[None, :], b_sin[None, :], D, eps, qk_scale)           # [BM, BD]
    b_max = tl.full([BM], float("-inf"), dtype=b_cos.dtype)                                             # [BM]
    b_sum = tl.zeros([BM], dtype=b_cos.dtype)                                                           # [BM]
    b_acc = tl.zeros([BM, BD], dtype=b_cos.dtype)                                                       # [BM, BD]
    if is_last:
        b_new_k, b_new_v = _append(
            k, v, k_pages, v_pages, k_scales, v_scales, i_b, i_h, i_new, length % PAGE, o_d, has_room, b_cos, b_sin,
            stride_kb, stride_kh, stride_vb, stride_vh, stride_kp, stride_ks, stride_kph, stride_vp, stride_vs, stride_vph,
            stride_ksp, stride_kss, stride_ksh, stride_vsp, stride_vss, stride_vsh, D, eps, qk_scale,
        )
        b_max = tl.where(has_room, tl.sum(b_q * b_new_k[None, :], 1) * (scale * 1.4426950408889634), 0.0)  # [BM]
        b_sum = b_sum + 1.0
        b_acc = b_acc + b_new_v[None, :]
    b_q = b_q.to(q.dtype.element_ty)
    for i in range(i_first, i_end):
        o_s = i * BS + tl.arange(0, BS)
        m_s = o_s < end                                                                             # [BS]
        if window is not None:
            m_s = m_s & (o_s >= length - window)
        i_page, o_row = _rows_of_block(table, i, o_s, m_s, i_b, stride_tb, stride_tn, PAGE, BS)
        o_k, o_ku = _places(i_page, o_row, i_h, stride_kp, stride_ks, stride_kph, stride_ksp, stride_kss, stride_ksh)
        o_v, o_vu = _places(i_page, o_row, i_h, stride_vp, stride_vs, stride_vph, stride_vsp, stride_vss, stride_vsh)
        m_sd = m_s[:, None] & m_d[None, :]
        b_k = tl.load(k_pages + o_k[:, None] + o_d[None, :], mask=m_sd, other=0.0)                            # [BS, BD]
        if k_scales is not None:
            b_k = numbers_of(b_k).to(b_q.dtype)
        b_s = tl.dot(b_q, b_k.T, input_precision="ieee", out_dtype=b_cos.dtype) * (scale * 1.4426950408889634)  # [BM, BS]
        if k_scales is not None:
            b_s *= tl.load(k_scales + o_ku, mask=m_s, other=0.0).to(b_cos.dtype)[None, :]
        b_s = tl.where(m_s[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))                                                   # [BM]
        b_ref = tl.where(b_new == float("-inf"), 0.0, b_new)  # nothing seen yet: exp2 of −inf, not of NaN
        b_e = tl.exp2(b_s - b_ref[:, None])                                                         # [BM, BS]
        b_shrink = tl.exp2(b_max - b_ref)                                                           # [BM]
        b_sum = b_sum * b_shrink + tl.sum(b_e, 1)
        b_v = tl.load(v_pages + o_v[:, None] + o_d[None, :], mask=m_sd, other=0.0)                            # [BS, BD]
        if v_scales is not None:  # as numbers of their size: weights times scales may be too small for fp16
            b_u = tl.load(v_scales + o_vu, mask=m_s, other=0.0).to(b_cos.dtype)                                # [BS]
            b_v = (numbers_of(b_v).to(b_cos.dtype) * b_u[:, None]).to(b_q.dtype)
        b_acc = tl.dot(b_e.to(b_v.dtype), b_v, b_acc * b_shrink[:, None], input_precision="ieee", out_dtype=b_cos.dtype)
        b_max = b_new
    i_r = (i_b * Hkv + i_h) * G + o_m                                                                   # [BM]
    if parts is None:
        b_out = b_acc / b_sum[:, None]                                                                  # [BM, BD]
        tl.store(out + i_r[:, None] * D + o_d[None, :], b_out.to(out.dtype.element_ty), mask=m_md)
    else:
        i_part = i_r * n_splits + i_s                                                                   # [BM]
        tl.store(parts + i_part[:, None] * D + o_d[None, :], b_acc, mask=m_md)
        tl.store(stats + i_part * 2, b_max, mask=m_m)
        tl.store(stats + i_part * 2 + 1, b_sum, mask=m_m)


@triton.jit(do_not_specialize=["S", "H", "n_splits", "n_parts"])
def _join_step_kernel(
    parts, stats, lengths, out, stride_lengths, window, S, H, n_splits, n_parts,
    D: tl.constexpr, BS: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr, OVERLAP: tl.constexpr,
):
    """The parts of a row's head → BD columns of out [B · H, D]. The last part, which holds the new key, is always there."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    i_r = tl.program_id(0).to(tl.int64)
    o_p, o_d = tl.arange(0, BP), tl.program_id(1) * BD + tl.arange(0, BD)
    length, _ = _held(lengths, i_r // H, stride_lengths, S)
    reach = None if window is None else window - 1
    _, n_blocks, per_split, _ = _blocks_seen(0, length, reach, 1, n_splits, 1, 1, BS, 1)
    m_p, m_d = ((o_p * per_split < n_blocks) & (o_p < n_splits)) | (o_p == n_parts - 1), o_d < D
    o_part = i_r * n_parts + o_p
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    b_max = tl.load(stats + o_part * 2, mask=m_p, other=float("-inf"))                                  # [BP]
    b_sum = tl.load(stats + o_part * 2 + 1, mask=m_p, other=0.0)                                        # [BP]
    b_acc = tl.load(parts + o_part[:, None] * D + o_d[None, :], mask=m_p[:, None] & m_d[None, :], other=0.0)  # [BP, BD]
    b_weight = tl.exp2(b_max - tl.max(b_max, 0))                                                        # [BP]
    b_out = tl.sum(b_weight[:, None] * b_acc, 0) / tl.sum(b_weight * b_sum, 0)                          # [BD]
    tl.store(out + i_r * D + o_d, b_out.to(out.dtype.element_ty), mask=m_d)


def _attention_step(
    q: Tensor, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, cos: Tensor, sin: Tensor,
    lengths: Tensor, eps: float | None, qk_scale: float, window: int | None, scale: float,
    k_scales: Tensor | None, v_scales: Tensor | None, tile: Tile,
) -> Tensor:
    """q [B, 1, H, D], k and v [B, 1, Hkv, D] → out [B, 1, H, D]."""
    (B, _, H, D), (_, page, Hkv, _) = q.shape, k_pages.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    S, in_lanes = room_of(k_pages, table, cos), tile.BM == 1
    window = None if window is None or window >= S - 1 else window
    n_blocks = ceil_div(S if window is None else min(S, window + tile.BS), tile.BS)
    splits = step_splits(B * Hkv, n_blocks, tile, n_processors(q.device))
    n_parts = splits + in_lanes
    parts = stats = None
    if n_parts > 1:
        parts = torch.empty((B * H, n_parts, D), dtype=cos.dtype, device=q.device)
        stats = torch.empty((B * H, n_parts, 2), dtype=cos.dtype, device=q.device)
    overlap = can_overlap(q.device)
    BD = max(16, next_power_of_two(D))
    (kp, ks, kph, _), (vp, vs, vph, _) = k_pages.stride(), v_pages.stride()
    shared = dict(
        lengths=lengths, parts=parts, stats=stats, stride_lengths=lengths.stride(0), window=window, S=S, n_splits=splits,
        D=D, BS=tile.BS, OVERLAP=overlap, launch_pdl=overlap,
    )
    of_cache = dict(
        q=q, k=k, v=v, k_pages=as_read(k_pages, k_scales), v_pages=as_read(v_pages, v_scales), table=table, cos=cos, sin=sin,
        stride_qb=q.stride(0), stride_qh=q.stride(2), stride_kb=k.stride(0), stride_kh=k.stride(2), stride_vb=v.stride(0),
        stride_vh=v.stride(2), stride_kp=kp, stride_ks=ks, stride_kph=kph, stride_vp=vp, stride_vs=vs, stride_vph=vph,
        stride_tb=table.stride(0), stride_tn=table.stride(1), stride_cos=cos.stride(0), stride_sin=sin.stride(0),
        Hkv=Hkv, PAGE=page, eps=eps, qk_scale=qk_scale, scale=scale, BD=BD, num_warps=tile.warps,
        **scale_arguments(k_scales, v_scales), **shared,
    )
    if in_lanes:
        BL = lanes(tile, BD * k_pages.element_size())
        launch(_attention_step_kernel, (B * H * n_parts,), BL=BL, num_stages=tile.stages, **of_cache)
    else:
        launch(
            _attention_step_by_products_kernel, (B * Hkv * splits,), out=out if parts is None else None, G=H // Hkv, BM=tile.BM,
            FETCH=FETCHED, num_stages=tile.stages + 2, **of_cache,
        )
    if parts is not None:
        BP = next_power_of_two(n_parts)
        BJ = min(next_power_of_two(D), max(16, JOINED // BP))
        launch(
            _join_step_kernel, (B * H, ceil_div(D, BJ)), out=out, H=H, n_parts=n_parts, BP=BP, BD=BJ,
            num_warps=4 if BP * BJ >= 2048 else 1, **shared,
        )
    return out


def step_splits(programs: int, n_blocks: int, tile: Tile, processors: int) -> int:
    """As attention_decode's n_splits, but that small caches have a part more, for the new key."""
    splits = tile.fill * processors // programs
    if tile.BM > 1:
        splits = max(splits, ceil_div(n_blocks * tile.BS, MOST_KEYS))
    return max(1, min(splits, ceil_div(n_blocks, tile.least), MOST_SPLITS - 1))


def attention_step_paged(
    q: Tensor, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, cos: Tensor, sin: Tensor,
    lengths: Tensor, *, eps: float | None = 1e-6, qk_scale: float = 1.0, window: int | None = None,
    scale: float | None = None, k_scales: Tensor | None = None, v_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """kernels_torch.attention_step_paged, in two launches or three. Arguments: see there."""
    places, scales = (block_table, cos, sin, lengths), dict(k_scales=k_scales, v_scales=v_scales)
    check_attention_step_paged(q, k, v, k_pages, v_pages, *places, eps, qk_scale, window, scale, **scales)
    check_gpu(q=q)
    (B, _, H, D), (_, page, Hkv, _) = q.shape, k_pages.shape
    cache_bytes = 2 * B * block_table.shape[1] * page * Hkv * D * k_pages.element_size()
    tile = tile_for(H // Hkv, D, q.element_size(), cache_bytes)
    side_by_side = k_pages.stride(3) == v_pages.stride(3) == 1
    if not side_by_side or (tile.BM > 1 and H // Hkv > tile.BM):
        held, seen = held_and_seen(lengths, room_of(k_pages, block_table, cos))
        places = (block_table, cos, sin, held)
        q, *_ = qk_norm_rope_append_paged(q, k, v, k_pages, v_pages, *places, eps=eps, scale=qk_scale, **scales)
        seen = (block_table, seen)
        return attention_decode_paged(q, k_pages, v_pages, *seen, window=window, scale=scale, **scales), k_pages, v_pages
    with torch.no_grad():
        q, k, v = values_side_by_side(q), values_side_by_side(k), values_side_by_side(v)
        cos, sin = table_of(cos, q), table_of(sin, q)
        eps, scale = eps if eps is None else float(eps), D**-0.5 if scale is None else float(scale)
        places = (k_pages, v_pages, block_table, cos, sin, lengths)
        out = _attention_step(q, k, v, *places, eps, float(qk_scale), window, scale, **scales, tile=tile)
        return out, k_pages, v_pages
