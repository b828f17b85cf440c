"""All of attention between the projections for one token a row: rotation and norm of q and k, cache, softmax, values.

In a small cache most of a step is launching kernels and waiting for the first bytes. So here is no kernel before the one
that reads the cache (kernels_triton/attention_decode.py has the maths, and the division into splits): each of its
programs rotates and normalises the query that it needs itself, 256 bytes and two rows of the tables. One program more
for each head does the same with the new key, writes it and the new value to their page, and leaves them as a split of
their own, of one key: nobody reads from the cache what is written in this launch. A second kernel joins the splits.

Where query heads share key heads, or the cache is large, the two ops are launched one after the other: there the cache
is read by products, and what a launch costs hardly counts.

Nothing is shared by programs but what they read, so two runs give the same bits, and rows know nothing of each other.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels_torch.attention_step import check_attention_step_paged
from kernels_triton.attention_decode import _blocks_seen, _rows_of_block, attention_decode_paged, lanes, tile_for
from kernels_triton.launch import can_overlap, ceil_div, check_gpu, launch, n_processors, next_power_of_two
from kernels_triton.qk_norm_rope import qk_norm_rope_append_paged, table_of
from kernels_triton.quantised_cache import as_read, codes_of, numbers_of, scale_and_inverse, scale_arguments
from kernels_triton.rows import values_side_by_side

# As attention_decode's for one query to a key head; right on an H200, not timed there yet.
MOST_SPLITS = 128  # the new key's among them
JOINED = 4096      # values of the partial results that a program of the second kernel holds


@triton.jit
def _rotated(x, o_d, m_d, b_cos, b_sin, D: tl.constexpr, eps: tl.constexpr, scale: tl.constexpr):
    """One vector [BD] at x, rotated, normalised, scaled, and rounded as it would be in memory."""
    b_x = tl.load(x + o_d, mask=m_d, other=0.0).to(b_cos.dtype)                                         # [BD]
    b_other = tl.load(x + (o_d + D // 2) % D, mask=m_d, other=0.0).to(b_cos.dtype)                      # [BD]
    b_y = b_x * b_cos + b_other * b_sin
    if eps is None:
        b_y = b_y * scale
    else:
        b_y = b_y * (tl.rsqrt(tl.sum(b_y * b_y, 0) / D + eps) * scale)
    return b_y.to(x.dtype.element_ty).to(b_cos.dtype)


@triton.jit
def _store_codes(p_codes, p_scale, b_x, m_d):
    """One vector [BD] as codes and their scale → what they stand for."""
    b_scale, b_inverse = scale_and_inverse(tl.max(tl.abs(b_x), 0), tl.sum(b_x * 0.0, 0), p_codes.dtype.element_ty)
    b_codes = codes_of(b_x * b_inverse, p_codes.dtype.element_ty)                                                          # [BD]
    tl.store(p_codes, b_codes, mask=m_d)
    tl.store(p_scale, b_scale)
    return numbers_of(b_codes).to(b_x.dtype) * b_scale.to(p_scale.dtype.element_ty).to(b_x.dtype)


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
    """parts [B · Hkv, n_splits + 1, D] and stats [B · Hkv, n_splits + 1, 2], the last split being the new key's."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    i_p = tl.program_id(0)
    i_h, i_s, i_b = i_p % Hkv, (i_p // Hkv) % (n_splits + 1), (i_p // (Hkv * (n_splits + 1))).to(tl.int64)
    length = tl.minimum(tl.load(lengths + i_b * stride_lengths), S - 1).to(tl.int32)
    first, n_blocks, per_split, end = _blocks_seen(0, length, None if window is None else window - 1, 1, n_splits, 1, 1, BS, 1)
    i_first = first + i_s * per_split
    i_end = tl.minimum(i_first + per_split, first + n_blocks)
    if (i_s < n_splits) & (i_first >= i_end):
        return
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    i_h = i_h.to(tl.int64)
    b_cos = tl.load(cos + length.to(tl.int64) * stride_cos + o_d % (D // 2), mask=m_d, other=0.0)       # [BD]
    b_sin = tl.load(sin + length.to(tl.int64) * stride_sin + o_d % (D // 2), mask=m_d, other=0.0)       # [BD]
    b_sin = tl.where(o_d < D // 2, b_sin, -b_sin)
    b_q = _rotated(q + i_b * stride_qb + i_h * stride_qh, o_d, m_d, b_cos, b_sin, D, eps, qk_scale)     # [BD]
    b_q = b_q * (scale * 1.4426950408889634)
    i_part = (i_b * Hkv + i_h) * (n_splits + 1) + i_s
    if i_s == n_splits:  # the new key and value
        b_k = _rotated(k + i_b * stride_kb + i_h * stride_kh, o_d, m_d, b_cos, b_sin, D, eps, qk_scale)  # [BD]
        b_v = tl.load(v + i_b * stride_vb + i_h * stride_vh + o_d, mask=m_d, other=0.0)                 # [BD]
        i_page = tl.load(table + i_b * stride_tb + length // PAGE * stride_tn).to(tl.int64)
        i_row = (length % PAGE).to(tl.int64)
        p_k = k_pages + i_page * stride_kp + i_row * stride_ks + i_h * stride_kph
        p_v = v_pages + i_page * stride_vp + i_row * stride_vs + i_h * stride_vph
        if k_scales is None:
            tl.store(p_k + o_d, b_k.to(k_pages.dtype.element_ty), mask=m_d)
            tl.store(p_v + o_d, b_v, mask=m_d)
            b_v = b_v.to(b_q.dtype)
        else:
            p_ku = k_scales + i_page * stride_ksp + i_row * stride_kss + i_h * stride_ksh
            p_vu = v_scales + i_page * stride_vsp + i_row * stride_vss + i_h * stride_vsh
            b_k = _store_codes(p_k + o_d, p_ku, b_k, m_d)
            b_v = _store_codes(p_v + o_d, p_vu, b_v.to(b_q.dtype), m_d)
        tl.store(parts + i_part * D + o_d, b_v, mask=m_d)
        tl.store(stats + i_part * 2, tl.sum(b_k * b_q, 0))
        tl.store(stats + i_part * 2 + 1, 1.0)
    else:
        o_l = tl.arange(0, BL)[:, None] + tl.arange(0, BS // BL)[None, :] * BL  # neighbours in neighbouring lanes
        b_max = tl.full([BL], float("-inf"), dtype=b_q.dtype)                                           # [BL]
        b_sum = tl.zeros([BL], dtype=b_q.dtype)                                                         # [BL]
        b_acc = tl.zeros([BL, BD], dtype=b_q.dtype)                                                     # [BL, BD]
        for i in range(i_first, i_end):
            o_s = i * BS + o_l                                                                          # [BL, BS / BL]
            m_s = o_s < end
            if window is not None:
                m_s = m_s & (o_s >= length - window)
            i_page, o_row = _rows_of_block(table, i, o_s, m_s, i_b, stride_tb, stride_tn, PAGE, BS)
            m_sd = m_s[:, :, None] & m_d[None, None, :]
            o_k = i_page * stride_kp + o_row * stride_ks + i_h * stride_kph
            o_v = i_page * stride_vp + o_row * stride_vs + i_h * stride_vph
            b_k = tl.load(k_pages + o_k[:, :, None] + o_d[None, None, :], mask=m_sd, other=0.0)         # [BL, BS / BL, BD]
            b_v = tl.load(v_pages + o_v[:, :, None] + o_d[None, None, :], mask=m_sd, other=0.0)         # [BL, BS / BL, BD]
            if k_scales is not None:
                o_k = i_page * stride_ksp + o_row * stride_kss + i_h * stride_ksh
                o_v = i_page * stride_vsp + o_row * stride_vss + i_h * stride_vsh
                b_ku = tl.load(k_scales + o_k, mask=m_s, other=0.0).to(b_q.dtype)                       # [BL, BS / BL]
                b_vu = tl.load(v_scales + o_v, mask=m_s, other=0.0).to(b_q.dtype)                       # [BL, BS / BL]
                b_k, b_v = numbers_of(b_k), numbers_of(b_v)
            b_s = tl.sum(b_k.to(b_q.dtype) * b_q[None, None, :], 2)                                     # [BL, BS / BL]
            if k_scales is not None:
                b_s *= b_ku
            b_s = tl.where(m_s, b_s, float("-inf"))
            b_new = tl.maximum(b_max, tl.max(b_s, 1))                                                   # [BL]
            b_ref = tl.where(b_new == float("-inf"), 0.0, b_new)  # nothing seen yet: exp2 of −inf, not of NaN
            b_e = tl.exp2(b_s - b_ref[:, None])                                                         # [BL, BS / BL]
            b_shrink = tl.exp2(b_max - b_ref)                                                           # [BL]
            b_sum = b_sum * b_shrink + tl.sum(b_e, 1)
            if k_scales is not None:
                b_e *= b_vu
            b_acc = b_acc * b_shrink[:, None] + tl.sum(b_e[:, :, None] * b_v.to(b_q.dtype), 1)
            b_max = b_new
        b_top = tl.max(b_max, 0)
        b_weight = tl.exp2(b_max - tl.where(b_top == float("-inf"), 0.0, b_top))                        # [BL]
        tl.store(parts + i_part * D + o_d, tl.sum(b_acc * b_weight[:, None], 0), mask=m_d)
        tl.store(stats + i_part * 2, b_top)
        tl.store(stats + i_part * 2 + 1, tl.sum(b_sum * b_weight, 0))


@triton.jit(do_not_specialize=["S", "Hkv", "n_splits"])
def _join_step_kernel(
    parts, stats, lengths, out, stride_lengths, window, S, Hkv, n_splits,
    D: tl.constexpr, BS: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr, OVERLAP: tl.constexpr,
):
    """The splits of a row's head → BD columns of out [B · Hkv, D]."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    i_r = tl.program_id(0).to(tl.int64)
    o_p, o_d = tl.arange(0, BP), tl.program_id(1) * BD + tl.arange(0, BD)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    length = tl.minimum(tl.load(lengths + i_r // Hkv * stride_lengths), S - 1).to(tl.int32)
    _, n_blocks, per_split, _ = _blocks_seen(0, length, None if window is None else window - 1, 1, n_splits, 1, 1, BS, 1)
    m_p, m_d = ((o_p * per_split < n_blocks) & (o_p < n_splits)) | (o_p == n_splits), o_d < D
    o_part = i_r * (n_splits + 1) + o_p
    b_max = tl.load(stats + o_part * 2, mask=m_p, other=float("-inf"))                                  # [BP]
    b_sum = tl.load(stats + o_part * 2 + 1, mask=m_p, other=0.0)                                        # [BP]
    b_acc = tl.load(parts + o_part[:, None] * D + o_d[None, :], mask=m_p[:, None] & m_d[None, :], other=0.0)  # [BP, BD]
    b_weight = tl.exp2(b_max - tl.max(b_max, 0))                                                        # [BP]
    b_out = tl.sum(b_weight[:, None] * b_acc, 0) / tl.sum(b_weight * b_sum, 0)                          # [BD]
    tl.store(out + i_r * D + o_d, b_out.to(out.dtype.element_ty), mask=m_d)


def _attention_step(
    q: Tensor, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, cos: Tensor, sin: Tensor,
    lengths: Tensor, eps: float | None, qk_scale: float, window: int | None, scale: float,
    k_scales: Tensor | None, v_scales: Tensor | None,
) -> Tensor:
    """q, k, v [B, 1, H, D] → out [B, 1, H, D]."""
    (B, _, H, D), (_, page, _, _) = q.shape, k_pages.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    S = table.shape[1] * page
    window = None if window is None or window >= S - 1 else window
    tile = tile_for(1, D, q.element_size(), 0)
    n_blocks = ceil_div(S if window is None else min(S, window + tile.BS), tile.BS)
    splits = max(1, min(tile.fill * n_processors(q.device) // (B * H), n_blocks, MOST_SPLITS - 1))
    parts = torch.empty((B * H, splits + 1, D), dtype=cos.dtype, device=q.device)
    stats = torch.empty((B * H, splits + 1, 2), dtype=cos.dtype, device=q.device)
    overlap = can_overlap(q.device)
    BD = max(16, next_power_of_two(D))
    (kp, ks, kph, _), (vp, vs, vph, _) = k_pages.stride(), v_pages.stride()
    shared = dict(
        lengths=lengths, parts=parts, stats=stats, stride_lengths=lengths.stride(0), window=window, S=S, Hkv=H,
        n_splits=splits, D=D, BS=tile.BS, OVERLAP=overlap, launch_pdl=overlap,
    )
    launch(
        _attention_step_kernel, (B * H * (splits + 1),), q=q, k=k, v=v, k_pages=as_read(k_pages, k_scales),
        v_pages=as_read(v_pages, v_scales), table=table, cos=cos, sin=sin, stride_qb=q.stride(0), stride_qh=q.stride(2),
        stride_kb=k.stride(0), stride_kh=k.stride(2),
        stride_vb=v.stride(0), stride_vh=v.stride(2), stride_kp=kp, stride_ks=ks, stride_kph=kph, stride_vp=vp,
        stride_vs=vs, stride_vph=vph, stride_tb=table.stride(0), stride_tn=table.stride(1), stride_cos=cos.stride(0),
        stride_sin=sin.stride(0), PAGE=page, eps=eps, qk_scale=qk_scale, scale=scale,
        BL=lanes(tile, BD * k_pages.element_size()), BD=BD, num_warps=tile.warps, num_stages=tile.stages, **shared,
        **scale_arguments(k_scales, v_scales),
    )
    BP = next_power_of_two(splits + 1)
    BJ = min(next_power_of_two(D), max(16, JOINED // BP))
    launch(
        _join_step_kernel, (B * H, ceil_div(D, BJ)), out=out, BP=BP, BD=BJ, num_warps=4 if BP * BJ >= 2048 else 1, **shared
    )
    return out


def attention_step_paged(
    q: Tensor, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, cos: Tensor, sin: Tensor,
    lengths: Tensor, *, eps: float | None = 1e-6, qk_scale: float = 1.0, window: int | None = None,
    scale: float | None = None, k_scales: Tensor | None = None, v_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """kernels_torch.attention_step_paged, in two launches or three. Arguments: see there."""
    places, scales = (block_table, cos, sin, lengths), dict(k_scales=k_scales, v_scales=v_scales)
    check_attention_step_paged(q, k, v, k_pages, v_pages, *places, eps, window, **scales)
    check_gpu(q=q)
    (B, _, H, D), page = q.shape, k_pages.shape[1]
    cache_bytes = 2 * B * block_table.shape[1] * page * H * D * k_pages.element_size()
    side_by_side = k_pages.stride(3) == v_pages.stride(3) == 1
    if k.shape[2] != H or tile_for(1, D, q.element_size(), cache_bytes).BM > 1 or not side_by_side:
        q, *_ = qk_norm_rope_append_paged(q, k, v, k_pages, v_pages, *places, eps=eps, scale=qk_scale, **scales)
        seen = (block_table, lengths + 1)
        return attention_decode_paged(q, k_pages, v_pages, *seen, window=window, scale=scale, **scales), k_pages, v_pages
    with torch.no_grad():
        q, k, v = values_side_by_side(q), values_side_by_side(k), values_side_by_side(v)
        cos, sin = table_of(cos, q), table_of(sin, q)
        eps, scale = eps if eps is None else float(eps), D**-0.5 if scale is None else float(scale)
        places = (k_pages, v_pages, block_table, cos, sin, lengths)
        out = _attention_step(q, k, v, *places, eps, float(qk_scale), window, scale, **scales)
        return out, k_pages, v_pages
