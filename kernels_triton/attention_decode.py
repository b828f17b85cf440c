"""Attention of new tokens against a cache whose rows have lengths of their own: decoding, speculation, chunked prefill.

With p = length − Tn + t the position of query t, over the keys s that it sees, s ≤ p and p − s ≤ window:

    out[t] = Σ_s exp(scale · q[t]·k[s] − m) v[s] / Σ_s exp(scale · q[t]·k[s] − m),   m = max_s scale · q[t]·k[s]

A step of decoding reads the cache once and does little else, so what counts is that every byte of it comes once and that
all processors ask for some at all times:

- The G query heads that share a key head, of all new tokens, are the rows of one product with a block of keys: in half
  precision up to 128 of them (64 where heads are wider than 128) read each key and value once.
- A single query to a key head would leave 15 of 16 rows of such a product empty. In small caches, where the start and the
  end of a program count, it is multiplied and summed by plain arithmetic.
- The keys that a row's queries see are split into `n_splits` runs of blocks, a program for each. It leaves the maximum,
  the sum and the weighted values of its run, and a second kernel joins those of a row. Where there are programs enough
  without, there is one run, and no second kernel.

The grid follows from shapes alone, and how a row's keys are split from its own length, which is read on the device: a CUDA
graph holds for all lengths, short rows are split as finely as long ones, and no row changes a bit of another. Splits for
which nothing is left end at once. Those of a row are joined in one order, so two runs give the same bits.

Pages may hold codes of 8 bits (quantised_cache.py). They become numbers in registers; scales of keys multiply scores.

What lies beyond a row's length is not read. Weights of zero would not do, as 0 · NaN is NaN.

q, the cache, lengths and the block table may have any strides; nothing is copied. Strides are plain integers, since
torch.compile takes no tuples as arguments of a kernel.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels_torch.attention_decode import check_attention_decode, check_attention_decode_paged
from kernels_triton.launch import can_overlap, ceil_div, launch, n_processors, next_power_of_two
from kernels_triton.quantised_cache import as_read, numbers_of, scale_arguments


class Tile(NamedTuple):
    """BM queries (tokens × heads of a group) against BS keys at a time, by `warps` warps, `stages` blocks on their way.

    fill    programs a processor to aim for in splitting
    least   blocks of keys that a split takes at least, where there are so many

    BM 1 is the kernel for one query to a key head, which has no products for tensor cores.
    """

    BM: int
    BS: int
    warps: int
    stages: int
    fill: int
    least: int = 2


# Up to this many bytes of keys and values, one query to a key head goes without tensor cores. µs a call on an H200 (copy
# 4.25 TB/s; a CUDA graph of calls over rotating caches, bf16, D128, by a forerunner with these tiles; in brackets by
# products): B1 S1024 H6 5.5 (6.2), B1 S2048 H17 10.1 (11.2), B1 S32768 H6 (100 MB) 32.0 (30.4), B32 S2048 H6 (200 MB)
# 62.4 (58.5). Four warps that take 32 keys 7.2 and 12.5. Not timed in pages, nor between 18 and 100 MB.
SMALL_CACHE = 32 * 2**20


def tile_for(M: int, D: int, itemsize: int, cache_bytes: int) -> Tile:
    """For M queries that share a key head. Timed on an H200 in bf16 at D128 with 1, 4 and 16 queries only.

    More than three programs a processor, or blocks of 32 or 128 keys, or a product for each warp, are no faster or up to
    20 % slower; share of the copy bandwidth as now, measured as above: B1 S32768 H6 .78, B8 S8192 H16 .99, B64 S1024 H12
    .91 to .99, B1 S131072 H16 Hkv4 .84 to .91, Hkv1 (67 MB) .68, B64 S8192 H16 Hkv1 .82 to .89. Of the smallest the start, the
    end and the second kernel take 6 to 8 µs, and a copy of as many bytes reaches no more than .79.

    The others are what compiles for sm_80 and sm_90 with nothing or little spilled.
    Registers and shared memory on sm_90, bf16 D128: 120 and 70 KiB with 16 queries, so that three programs share a
    processor, with 64 KiB each on their way; 230 and 128 KiB with 128. On sm_80 to sm_89 all fit in the 99 KiB of the
    smallest. Products of fp32 are no work of tensor cores, and with more than 16 queries or 8 KiB of keys they spill.
    """
    BD = max(16, next_power_of_two(D))
    if M == 1 and cache_bytes <= SMALL_CACHE:
        return Tile(1, BS=min(max(4, 4096 // (BD * itemsize)), 128), warps=2, stages=1, fill=16, least=1)
    if itemsize == 8:
        return Tile(16, BS=block_of_keys(8192, BD * itemsize), warps=8 if BD > 128 else 4, stages=2, fill=3)
    if itemsize == 4:
        return Tile(16, BS=block_of_keys(8192, BD * itemsize), warps=4, stages=3, fill=3)
    BS = block_of_keys(16384, BD * itemsize)
    if M <= 16:
        return Tile(16, BS, warps=4, stages=3, fill=3)
    if BD <= 128:
        BM = min(next_power_of_two(M), 128)
        return Tile(BM, BS, warps=8 if BM == 128 else 4, stages=3, fill=2)
    return Tile(32, BS, warps=4, stages=3, fill=2) if M <= 32 else Tile(64, BS, warps=8, stages=2, fill=2)


def lanes(tile: Tile, row_bytes: int) -> int:
    """How many keys at once the threads of a program with BM 1 hold, with 16 bytes each."""
    return min(tile.BS, max(1, 32 * tile.warps * 16 // row_bytes))


def block_of_keys(n_bytes: int, row_bytes: int) -> int:
    """As many keys as fit, though no fewer than a product on tensor cores takes and no more than hold its scores."""
    return min(max(16, n_bytes // row_bytes), 128)


# One program joins the splits of a row and holds a weight for each. As long as that allows it, none gets more keys than
# these: the rows of a batch may have very different lengths, and all would wait for the longest.
MOST_SPLITS = 256
MOST_KEYS = 8192

# Values of the partial results that a program of the second kernel holds.
JOINED = 4096


def n_splits(programs: int, n_blocks: int, tile: Tile, processors: int, n_tiles: int) -> int:
    """Into how many runs at most n_blocks blocks of keys are split, where there are `programs` programs without.

    Rounded down: a program a processor is almost enough to use all bandwidth, and one split needs no second kernel.
    n_tiles of queries that share a key head make up for long rows by themselves.
    """
    splits = tile.fill * processors // programs
    if n_tiles == 1:
        splits = max(splits, ceil_div(n_blocks * tile.BS, MOST_KEYS))
    return max(1, min(splits, ceil_div(n_blocks, tile.least), MOST_SPLITS))


@triton.jit
def _blocks_seen(
    i_m, length, window, Tn, n_splits,
    G: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr, LEAST: tl.constexpr,
):
    """Of the keys that some query of the i_m-th tile sees: the first block, how many blocks, blocks of a split, the end."""
    t_last = tl.minimum((i_m * BM + BM - 1) // G, Tn - 1)
    end = tl.maximum(length - Tn + t_last + 1, 0)
    first = 0
    if window is not None:
        first = tl.maximum(length - Tn + i_m * BM // G - window, 0) // BS
    n_blocks = tl.maximum(tl.cdiv(end, BS) - first, 0)
    return first, n_blocks, tl.maximum(tl.cdiv(n_blocks, n_splits), LEAST), end


@triton.jit
def _rows_of_block(table, i, o_s, m_s, i_b, stride_tb, stride_tn, PAGE: tl.constexpr, BS: tl.constexpr):
    """Where the keys o_s of the i-th block lie: the row of the cache or the page, and the rows of that."""
    if table is None:
        i_page, o_row = i_b, o_s.to(tl.int64)
    elif PAGE % BS == 0:  # the block lies in one page
        i_page = tl.load(table + i_b * stride_tb + i * BS // PAGE * stride_tn).to(tl.int64)
        o_row = (o_s % PAGE).to(tl.int64)
    else:
        p_page = table + i_b * stride_tb + (o_s // PAGE).to(tl.int64) * stride_tn
        i_page = tl.load(p_page, mask=m_s, other=0).to(tl.int64)
        o_row = (o_s % PAGE).to(tl.int64)
    return i_page, o_row


@triton.jit(do_not_specialize=["S", "Hkv", "n_m", "n_splits"])
def _attention_decode_kernel(
    q, k, v, k_scales, v_scales, table, lengths, out, parts, stats,
    stride_qb, stride_qt, stride_qh, stride_qd, stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd,
    stride_ksp, stride_kss, stride_ksh, stride_vsp, stride_vss, stride_vsh,
    stride_tb, stride_tn, stride_lengths, window, Tn, S, Hkv, n_m, n_splits,
    G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, scale: tl.constexpr,
    BM: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, LEAST: tl.constexpr, OVERLAP: tl.constexpr,
):
    """Programs of one part of the cache, its tiles of queries and then its heads, follow one another."""
    ACC: tl.constexpr = tl.float64 if q.dtype.element_ty == tl.float64 else tl.float32
    if OVERLAP:  # who comes next waits for the end of this one by itself: started first, it saves 0.7 µs
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    i_p = tl.program_id(0)
    i_m = n_m - 1 - i_p % n_m  # those that see most come first
    i_h = (i_p // n_m) % Hkv
    i_s = (i_p // (n_m * Hkv)) % n_splits
    i_b = (i_p // (n_m * Hkv * n_splits)).to(tl.int64)
    length = tl.load(lengths + i_b * stride_lengths)
    o_m, o_d = i_m * BM + tl.arange(0, BM), tl.arange(0, BD).to(tl.int64)
    o_t = o_m // G
    m_m, m_d = o_t < Tn, o_d < D
    o_h = i_h.to(tl.int64) * G + o_m % G
    o_q = i_b * stride_qb + o_t.to(tl.int64) * stride_qt + o_h * stride_qh
    b_q = tl.load(q + o_q[:, None] + o_d[None, :] * stride_qd, mask=m_m[:, None] & m_d[None, :], other=0.0)  # [BM, BD]
    length = tl.minimum(length, S).to(tl.int32)  # awaited only now, so that it and q come together
    first, n_blocks, per_split, end = _blocks_seen(i_m, length, window, Tn, n_splits, G, BM, BS, LEAST)
    if parts is not None:  # noqa: SIM102  known when compiled, the next is not
        if i_s * per_split >= n_blocks:
            return
    i_first = first + i_s * per_split
    i_end = tl.minimum(i_first + per_split, first + n_blocks)

    b_pos = length - Tn + o_t                                                                           # [BM]
    b_max = tl.full([BM], float("-inf"), dtype=ACC)                                                     # [BM]
    b_sum = tl.zeros([BM], dtype=ACC)                                                                   # [BM]
    b_acc = tl.zeros([BM, BD], dtype=ACC)                                                               # [BM, BD]
    for i in range(i_first, i_end):
        o_s = i * BS + tl.arange(0, BS)
        m_s = o_s < end
        i_page, o_row = _rows_of_block(table, i, o_s, m_s, i_b, stride_tb, stride_tn, PAGE, BS)
        m_sd = m_s[:, None] & m_d[None, :]
        o_k = i_page * stride_kb + o_row * stride_ks + i_h.to(tl.int64) * stride_kh
        o_v = i_page * stride_vb + o_row * stride_vs + i_h.to(tl.int64) * stride_vh
        b_k = tl.load(k + o_k[:, None] + o_d[None, :] * stride_kd, mask=m_sd, other=0.0)                # [BS, BD]
        if k_scales is not None:
            b_k = numbers_of(b_k).to(b_q.dtype)
        b_s = tl.dot(b_q, b_k.T, input_precision="ieee", out_dtype=ACC) * (scale * 1.4426950408889634)                 # [BM, BS]
        if k_scales is not None:
            o_u = i_page * stride_ksp + o_row * stride_kss + i_h.to(tl.int64) * stride_ksh
            b_s *= tl.load(k_scales + o_u, mask=m_s, other=0.0).to(ACC)[None, :]
        seen = o_s[None, :] <= b_pos[:, None]
        if window is not None:
            seen = seen & (o_s[None, :] >= b_pos[:, None] - window)
        b_s = tl.where(seen, b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))                                                       # [BM]
        b_ref = tl.where(b_new == float("-inf"), 0.0, b_new)  # nothing seen yet: exp2 of −inf, not of NaN
        b_e = tl.exp2(b_s - b_ref[:, None])                                                             # [BM, BS]
        b_shrink = tl.exp2(b_max - b_ref)                                                               # [BM]
        b_sum = b_sum * b_shrink + tl.sum(b_e, 1)
        b_v = tl.load(v + o_v[:, None] + o_d[None, :] * stride_vd, mask=m_sd, other=0.0)                # [BS, BD]
        if v_scales is not None:  # as numbers of their size: weights times scales may be too small for fp16
            o_u = i_page * stride_vsp + o_row * stride_vss + i_h.to(tl.int64) * stride_vsh
            b_u = tl.load(v_scales + o_u, mask=m_s, other=0.0).to(ACC)                                  # [BS]
            b_v = (numbers_of(b_v).to(ACC) * b_u[:, None]).to(b_q.dtype)
        b_acc = tl.dot(b_e.to(b_v.dtype), b_v, b_acc * b_shrink[:, None], input_precision="ieee", out_dtype=ACC)
        b_max = b_new

    o_r = (i_b * Tn + o_t) * (Hkv * G) + o_h  # rows of out, as if [B · Tn · H, D]
    m = m_m[:, None] & m_d[None, :]
    if parts is None:
        b_out = b_acc / tl.where(b_sum == 0, 1.0, b_sum)[:, None]                                       # [BM, BD]
        tl.store(out + o_r[:, None] * D + o_d[None, :], b_out.to(out.dtype.element_ty), mask=m)
    else:
        o_part = o_r * n_splits + i_s
        tl.store(parts + o_part[:, None] * D + o_d[None, :], b_acc, mask=m)
        tl.store(stats + o_part * 2, b_max, mask=m_m)
        tl.store(stats + o_part * 2 + 1, b_sum, mask=m_m)


@triton.jit(do_not_specialize=["S", "Hkv", "n_splits"])
def _attention_decode_one_kernel(
    q, k, v, k_scales, v_scales, table, lengths, out, parts, stats,
    stride_qb, stride_qh, stride_qd, stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd,
    stride_ksp, stride_kss, stride_ksh, stride_vsp, stride_vss, stride_vsh,
    stride_tb, stride_tn, stride_lengths, window, S, Hkv, n_splits,
    D: tl.constexpr, PAGE: tl.constexpr, scale: tl.constexpr,
    BS: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr, LEAST: tl.constexpr, OVERLAP: tl.constexpr,
):
    """One query to a key head. Each of BL lanes of threads goes over BS / BL keys of a block and keeps sums of its own.

    Lanes meet at the end only: the loop needs neither shared memory nor barriers. Lanes come first in a block, since the
    compiler gives threads to the first of equal dimensions, and what is summed in the loop belongs inside a thread.
    """
    ACC: tl.constexpr = tl.float64 if q.dtype.element_ty == tl.float64 else tl.float32
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    i_p = tl.program_id(0)
    i_h, i_s, i_b = i_p % Hkv, (i_p // Hkv) % n_splits, (i_p // (Hkv * n_splits)).to(tl.int64)
    length = tl.load(lengths + i_b * stride_lengths)
    o_d = tl.arange(0, BD).to(tl.int64)
    m_d = o_d < D
    b_q = tl.load(q + i_b * stride_qb + i_h.to(tl.int64) * stride_qh + o_d * stride_qd, mask=m_d, other=0.0)  # [BD]
    length = tl.minimum(length, S).to(tl.int32)
    first, n_blocks, per_split, end = _blocks_seen(0, length, window, 1, n_splits, 1, 1, BS, LEAST)
    if parts is not None:  # noqa: SIM102  known when compiled, the next is not
        if i_s * per_split >= n_blocks:
            return
    i_first = first + i_s * per_split
    i_end = tl.minimum(i_first + per_split, first + n_blocks)

    b_q = b_q.to(ACC) * (scale * 1.4426950408889634)
    o_l = tl.arange(0, BL)[:, None] + tl.arange(0, BS // BL)[None, :] * BL  # neighbours in neighbouring lanes
    b_max = tl.full([BL], float("-inf"), dtype=ACC)                                                     # [BL]
    b_sum = tl.zeros([BL], dtype=ACC)                                                                   # [BL]
    b_acc = tl.zeros([BL, BD], dtype=ACC)                                                               # [BL, BD]
    for i in range(i_first, i_end):
        o_s = i * BS + o_l                                                                              # [BL, BS / BL]
        m_s = o_s < end
        i_page, o_row = _rows_of_block(table, i, o_s, m_s, i_b, stride_tb, stride_tn, PAGE, BS)
        m_sd = m_s[:, :, None] & m_d[None, None, :]
        o_k = i_page * stride_kb + o_row * stride_ks + i_h.to(tl.int64) * stride_kh
        o_v = i_page * stride_vb + o_row * stride_vs + i_h.to(tl.int64) * stride_vh
        b_k = tl.load(k + o_k[:, :, None] + o_d[None, None, :] * stride_kd, mask=m_sd, other=0.0)       # [BL, BS / BL, BD]
        b_v = tl.load(v + o_v[:, :, None] + o_d[None, None, :] * stride_vd, mask=m_sd, other=0.0)       # [BL, BS / BL, BD]
        if k_scales is not None:
            o_k = i_page * stride_ksp + o_row * stride_kss + i_h.to(tl.int64) * stride_ksh
            o_v = i_page * stride_vsp + o_row * stride_vss + i_h.to(tl.int64) * stride_vsh
            b_ku = tl.load(k_scales + o_k, mask=m_s, other=0.0).to(ACC)                                 # [BL, BS / BL]
            b_vu = tl.load(v_scales + o_v, mask=m_s, other=0.0).to(ACC)                                 # [BL, BS / BL]
            b_k, b_v = numbers_of(b_k), numbers_of(b_v)
        seen = m_s
        if window is not None:
            seen = seen & (o_s >= end - 1 - window)
        b_s = tl.sum(b_k.to(ACC) * b_q[None, None, :], 2)                                               # [BL, BS / BL]
        if k_scales is not None:
            b_s *= b_ku
        b_s = tl.where(seen, b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))                                                       # [BL]
        b_ref = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_e = tl.exp2(b_s - b_ref[:, None])                                                             # [BL, BS / BL]
        b_shrink = tl.exp2(b_max - b_ref)                                                               # [BL]
        b_sum = b_sum * b_shrink + tl.sum(b_e, 1)
        if k_scales is not None:
            b_e *= b_vu
        b_acc = b_acc * b_shrink[:, None] + tl.sum(b_e[:, :, None] * b_v.to(ACC), 1)
        b_max = b_new
    b_top = tl.max(b_max, 0)
    b_weight = tl.exp2(b_max - tl.where(b_top == float("-inf"), 0.0, b_top))                            # [BL]
    b_all = tl.sum(b_sum * b_weight, 0)
    b_out = tl.sum(b_acc * b_weight[:, None], 0)                                                        # [BD]

    i_r = i_b * Hkv + i_h
    if parts is None:
        tl.store(out + i_r * D + o_d, (b_out / tl.where(b_all == 0, 1.0, b_all)).to(out.dtype.element_ty), mask=m_d)
    else:
        i_part = i_r * n_splits + i_s
        tl.store(parts + i_part * D + o_d, b_out, mask=m_d)
        tl.store(stats + i_part * 2, b_top)
        tl.store(stats + i_part * 2 + 1, b_all)


@triton.jit(do_not_specialize=["S", "H", "n_splits"])
def _join_splits_kernel(
    parts, stats, lengths, out, stride_lengths, window, Tn, S, H, n_splits,
    G: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
    LEAST: tl.constexpr, OVERLAP: tl.constexpr,
):
    """parts [B · Tn · H, n_splits, D] and stats [B · Tn · H, n_splits, 2] → BD columns of one row of out."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    i_r = tl.program_id(0).to(tl.int64)
    i_b, i_t, i_g = i_r // (Tn * H), (i_r // H % Tn).to(tl.int32), (i_r % G).to(tl.int32)
    length = tl.minimum(tl.load(lengths + i_b * stride_lengths), S).to(tl.int32)
    _, n_blocks, per_split, _ = _blocks_seen((i_t * G + i_g) // BM, length, window, Tn, n_splits, G, BM, BS, LEAST)
    o_p, o_d = tl.arange(0, BP), tl.program_id(1) * BD + tl.arange(0, BD)
    m_p, m_d = o_p * per_split < n_blocks, o_d < D
    o_part = i_r * n_splits + o_p
    if OVERLAP:  # this kernel was started early: what it reads is there only now
        tl.extra.cuda.gdc_wait()
    b_max = tl.load(stats + o_part * 2, mask=m_p, other=float("-inf"))                                  # [BP]
    b_sum = tl.load(stats + o_part * 2 + 1, mask=m_p, other=0.0)                                        # [BP]
    b_acc = tl.load(parts + o_part[:, None] * D + o_d[None, :], mask=m_p[:, None] & m_d[None, :], other=0.0)  # [BP, BD]
    b_top = tl.max(b_max, 0)
    b_weight = tl.exp2(b_max - tl.where(b_top == float("-inf"), 0.0, b_top))                            # [BP]
    b_all = tl.sum(b_weight * b_sum, 0)
    b_out = tl.sum(b_weight[:, None] * b_acc, 0) / tl.where(b_all == 0, 1.0, b_all)                     # [BD]
    tl.store(out + i_r * D + o_d, b_out.to(out.dtype.element_ty), mask=m_d)


def _attention_decode(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, lengths: Tensor, window: int | None, scale: float,
    k_scales: Tensor | None = None, v_scales: Tensor | None = None,
) -> Tensor:
    """q [B, Tn, H, D], k and v [B, S, Hkv, D], or [P, page, Hkv, D] with table [B, n] → out [B, Tn, H, D]."""
    (B, Tn, H, D), (_, page, Hkv, _) = q.shape, k.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    S = page if table is None else table.shape[1] * page
    window = None if window is None or window >= S - 1 else window
    G = H // Hkv
    tile = tile_for(Tn * G, D, q.element_size(), 2 * B * S * Hkv * D * k.element_size())
    n_m = ceil_div(Tn * G, tile.BM)
    reach = S if window is None else min(S, window + ceil_div(tile.BM, G) + tile.BS)
    splits = n_splits(B * Hkv * n_m, ceil_div(reach, tile.BS), tile, n_processors(q.device), n_m)
    accumulated_in = torch.promote_types(q.dtype, torch.float32)
    parts = stats = None
    if splits > 1:
        parts = torch.empty((B * Tn * H, splits, D), dtype=accumulated_in, device=q.device)
        stats = torch.empty((B * Tn * H, splits, 2), dtype=accumulated_in, device=q.device)
    overlap = can_overlap(q.device)
    (qb, qt, qh, qd), (kb, ks, kh, kd), (vb, vs, vh, vd) = q.stride(), k.stride(), v.stride()
    tb, tn = (0, 0) if table is None else table.stride()
    BD = max(16, next_power_of_two(D))
    shared = dict(
        q=q, k=as_read(k, k_scales), v=as_read(v, v_scales), table=table, lengths=lengths,
        out=out if parts is None else None, parts=parts, stats=stats,
        stride_qb=qb, stride_qh=qh, stride_qd=qd, stride_kb=kb, stride_ks=ks, stride_kh=kh, stride_kd=kd,
        stride_vb=vb, stride_vs=vs, stride_vh=vh, stride_vd=vd, stride_tb=tb, stride_tn=tn,
        stride_lengths=lengths.stride(0), window=window, S=S, Hkv=Hkv, n_splits=splits, D=D,
        PAGE=None if table is None else page, scale=scale, BS=tile.BS, BD=BD, LEAST=tile.least, OVERLAP=overlap,
        **scale_arguments(k_scales, v_scales),
    )
    if tile.BM == 1:
        launch(
            _attention_decode_one_kernel, (B * Hkv * splits,), **shared, BL=lanes(tile, BD * k.element_size()),
            num_warps=tile.warps, num_stages=tile.stages, launch_pdl=overlap,
        )
    else:
        launch(
            _attention_decode_kernel, (B * Hkv * n_m * splits,), **shared, stride_qt=qt, Tn=Tn, n_m=n_m, G=G, BM=tile.BM,
            num_warps=tile.warps, num_stages=tile.stages if table is None else tile.stages + 2, launch_pdl=overlap,
        )
    if parts is not None:
        BP = next_power_of_two(splits)
        BD = min(next_power_of_two(D), max(16, JOINED // BP))
        launch(
            _join_splits_kernel, (B * Tn * H, ceil_div(D, BD)), parts=parts, stats=stats, lengths=lengths, out=out,
            stride_lengths=lengths.stride(0), window=window, Tn=Tn, S=S, H=H, n_splits=splits,
            G=G, D=D, BM=tile.BM, BS=tile.BS, BP=BP, BD=BD, LEAST=tile.least, OVERLAP=overlap,
            num_warps=4 if BP * BD >= 2048 else 1, launch_pdl=overlap,
        )
    return out


def attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, *, window: int | None = None, scale: float | None = None
) -> Tensor:
    """kernels_torch.attention_decode, in one pass over the keys and values that are seen."""
    check_attention_decode(q, k_cache, v_cache, lengths, window, scale)
    with torch.no_grad():
        return _attention_decode(q, k_cache, v_cache, None, lengths, window, scale_of(q, scale))


def attention_decode_paged(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, lengths: Tensor, *, window: int | None = None,
    scale: float | None = None, k_scales: Tensor | None = None, v_scales: Tensor | None = None,
) -> Tensor:
    """kernels_torch.attention_decode_paged, in one pass over the pages that are seen."""
    check_attention_decode_paged(q, k_pages, v_pages, block_table, lengths, window, scale, k_scales, v_scales)
    with torch.no_grad():
        options = (window, scale_of(q, scale), k_scales, v_scales)
        return _attention_decode(q, k_pages, v_pages, block_table, lengths, *options)


def scale_of(q: Tensor, scale: float | None) -> float:
    return max(q.shape[3], 1) ** -0.5 if scale is None else float(scale)
