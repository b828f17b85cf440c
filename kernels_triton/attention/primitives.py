"""What the kernels of attention share: which tile a program takes, which tiles it meets there, and who sees whom in them."""

import triton
import triton.language as tl

from kernels_triton.primitives import tanh


@triton.jit
def place(i_p, n_tiles, n_heads, n_together):
    """The i_p-th program → its tile, from 0, and its head among those of all rows of the batch.

    Programs take n_together heads at a time: all their first tiles, then all second ones and so on. Where the first tiles
    are the longest, short ones are left to fill the gaps at the end, and what so many heads read over and over is in L2.
    """
    i_group = i_p // (n_together * n_tiles)
    first = i_group * n_together
    i_in = i_p - first * n_tiles
    heads = tl.minimum(n_heads - first, n_together)
    return i_in // heads, (first + i_in % heads).to(tl.int64)


@triton.jit
def load_rows(p, stride, n, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr):
    """The BT rows of D values, `stride` apart, that begin at p → [BT, BD]; where MASKED, zeros from the n-th on."""
    o_t, o_d = tl.arange(0, BT), tl.arange(0, BD)
    p_x = p + o_t.to(tl.int64)[:, None] * stride + o_d[None, :]
    if MASKED:
        return tl.load(p_x, mask=(o_t < n)[:, None] & (o_d < D)[None, :], other=0.0)
    elif D < BD:
        return tl.load(p_x, mask=(o_d < D)[None, :], other=0.0)
    else:
        return tl.load(p_x)


@triton.jit
def store_rows(p, b, stride, n, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """The first n rows of b [BT, BD] to where load_rows would read them."""
    o_t, o_d = tl.arange(0, BT), tl.arange(0, BD)
    p_x = p + o_t.to(tl.int64)[:, None] * stride + o_d[None, :]
    tl.store(p_x, b.to(p.dtype.element_ty), mask=(o_t < n)[:, None] & (o_d < D)[None, :])


@triton.jit
def add_product(a, b, b_sum):
    """b_sum + a · b. Tensor cores add up within themselves; other products are first summed alone, tile by tile, so that
    the roundings of a sum over thousands of tokens stay few. (max_num_imprecise_acc keeps the compiler from undoing it.)"""
    if b_sum.dtype == tl.float64 or a.dtype == tl.float32:
        return b_sum + tl.dot(a, b, input_precision="ieee", out_dtype=b_sum.dtype, max_num_imprecise_acc=1)
    else:
        return tl.dot(a, b, b_sum, out_dtype=b_sum.dtype)


@triton.jit
def nothing_lost(b_sum, like):
    """What a sum of no terms has lost to rounding: a tensor where `add_long` keeps it, else a mere number."""
    if b_sum.dtype == tl.float64 or like.dtype == tl.float32:
        return tl.zeros_like(b_sum)
    else:
        return 0.0


@triton.jit
def add_long(a, b, b_sum, b_lost):
    """`add_product` for sums over all queries of a group: in fp32 and fp64 what each addition loses is added to the next
    term (Kahan), as hundreds of tiles in turn lose four times as much as plain PyTorch does."""
    if b_sum.dtype == tl.float64 or a.dtype == tl.float32:
        b_term = tl.dot(a, b, input_precision="ieee", out_dtype=b_sum.dtype, max_num_imprecise_acc=1) - b_lost
        b_new = b_sum + b_term
        return b_new, (b_new - b_sum) - b_term
    else:
        return tl.dot(a, b, b_sum, out_dtype=b_sum.dtype), b_lost


@triton.jit
def load_ids(p, stride, n, BT: tl.constexpr):
    """The document ids of BT tokens from p on; from the n-th on, the last one's again."""
    o_t = tl.minimum(tl.arange(0, BT), n - 1)
    return tl.load(p + o_t.to(tl.int64) * stride)


@triton.jit
def capped(b_s, scale: tl.constexpr, SOFTCAP: tl.constexpr, FAST: tl.constexpr):
    """Products of queries and keys as they are or, where there is a soft-cap, their share of it: tanh(scale · s / softcap)."""
    if SOFTCAP is None:
        return b_s
    else:
        return tanh(b_s * (scale / SOFTCAP), FAST)


@triton.jit
def visible(o_p, o_s, Tk, window, CAUSAL: tl.constexpr):
    """Whether queries at the positions o_p see keys at o_s, documents aside."""
    m = o_s <= o_p if CAUSAL else o_s < Tk
    if window is not None:
        m &= o_p - o_s <= window
        if not CAUSAL:
            m &= o_s - o_p <= window
    return m


@triton.jit
def keys_of(t0, Tq, Tk, window, p_bounds, BT: tl.constexpr, BS: tl.constexpr, CAUSAL: tl.constexpr = True):
    """The tiles of keys of the queries t0 … t0 + BT: those before a and from end on are out of sight; every query sees every
    key in those from b to c; in the others, from a to b and from c to end, some pairs are hidden."""
    first = Tk - Tq + t0
    last = tl.minimum(first + BT, Tk) - 1
    lowest, seen_from = 0, 0
    if window is not None:
        lowest, seen_from = tl.maximum(first - window, 0), tl.maximum(last - window, 0)
    if p_bounds is not None:
        lowest, seen_from = tl.maximum(lowest, tl.load(p_bounds)), tl.maximum(seen_from, tl.load(p_bounds + 2))
    if CAUSAL:
        highest, seen_to = last + 1, first + 1
    else:
        highest, seen_to = Tk, Tk
        if window is not None:
            highest, seen_to = tl.minimum(last + 1 + window, Tk), tl.minimum(first + 1 + window, Tk)
        if p_bounds is not None:
            highest, seen_to = tl.minimum(highest, tl.load(p_bounds + 1)), tl.minimum(seen_to, tl.load(p_bounds + 3))
    end = tl.cdiv(highest, BS)
    b = tl.minimum(tl.cdiv(seen_from, BS), end)
    return lowest // BS, b, tl.maximum(b, seen_to // BS), end


@triton.jit
def queries_of(s0, Tq, Tk, window, p_bounds, BT: tl.constexpr, BS: tl.constexpr, CAUSAL: tl.constexpr = True):
    """The tiles of queries of the keys s0 … s0 + BS, as keys_of has them."""
    first = s0 - (Tk - Tq)
    lowest, seen_from = 0, 0
    if CAUSAL:
        lowest, seen_from = tl.maximum(first, 0), tl.maximum(first + BS - 1, 0)
    elif window is not None:
        lowest, seen_from = tl.maximum(first - window, 0), tl.maximum(first + BS - 1 - window, 0)
    highest, seen_to = Tq, Tq
    if window is not None:
        highest = tl.minimum(highest, tl.maximum(tl.minimum(first + BS, Tq) + window, 0))
        seen_to = tl.minimum(seen_to, tl.maximum(first + window + 1, 0))
    if p_bounds is not None:
        highest, seen_to = tl.minimum(highest, tl.load(p_bounds + 1)), tl.minimum(seen_to, tl.load(p_bounds + 3))
        if not CAUSAL:
            lowest, seen_from = tl.maximum(lowest, tl.load(p_bounds)), tl.maximum(seen_from, tl.load(p_bounds + 2))
    a = lowest // BT
    end = tl.maximum(tl.cdiv(highest, BT), a)
    b = tl.minimum(tl.cdiv(seen_from, BT), end)
    return a, b, tl.minimum(tl.maximum(b, seen_to // BT), end), end


@triton.jit
def edge(i, a, b, c, end):
    """The i-th of the tiles with hidden pairs: from c to end, and then from a to b."""
    return tl.where(i < end - c, c + i, a + i - (end - c))


@triton.jit
def head_of(i, n, GROUP: tl.constexpr):
    """Which head of the group the i-th of n · GROUP tiles is of."""
    if GROUP == 1:
        return tl.full((), 0, tl.int64)
    else:
        return (i // n).to(tl.int64)


@triton.jit
def _bounds_kernel(
    doc_ids, bounds, stride_b, stride_t, T, n_tiles,
    BT: tl.constexpr, BLOCK: tl.constexpr,
):
    """Four positions for each tile of BT tokens: whoever may be of one document with one of them lies in [0] … [1]. Where
    they are all of one, nobody else's tokens are among them and those next to them in [2] … [3]."""
    i_t, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    t0 = i_t * BT
    t1 = tl.minimum(t0 + BT, T)
    p_ids = doc_ids + i_b * stride_b
    b_ids = load_ids(p_ids + t0.to(tl.int64) * stride_t, stride_t, T - t0, BT)                          # [BT]
    low, high = tl.min(b_ids, 0), tl.max(b_ids, 0)
    b_first, b_to = tl.full([BLOCK], 2147483647, tl.int32), tl.full([BLOCK], 2147483647, tl.int32)      # [BLOCK]
    b_end, b_from = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)                            # [BLOCK]
    for s0 in range(0, T, BLOCK):
        o_s = s0 + tl.arange(0, BLOCK)
        b_id = tl.load(p_ids + o_s.to(tl.int64) * stride_t, mask=o_s < T, other=0)                      # [BLOCK]
        m_near = (b_id >= low) & (b_id <= high) & (o_s < T)
        m_far = (b_id < low) | (b_id > high)
        b_first = tl.minimum(b_first, tl.where(m_near, o_s, b_first))
        b_end = tl.maximum(b_end, tl.where(m_near, o_s + 1, 0))
        b_from = tl.maximum(b_from, tl.where(m_far & (o_s < t1), o_s + 1, 0))
        b_to = tl.minimum(b_to, tl.where(m_far & (o_s >= t0), o_s, b_to))
    p_bounds = bounds + (i_b * n_tiles + i_t) * 4
    tl.store(p_bounds, tl.min(b_first, 0))
    tl.store(p_bounds + 1, tl.max(b_end, 0))
    tl.store(p_bounds + 2, tl.where(low == high, tl.max(b_from, 0), t1))
    tl.store(p_bounds + 3, tl.where(low == high, tl.min(b_to, 0), t0))
