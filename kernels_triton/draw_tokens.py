"""The draw of the next token of every row, in one or two launches, and none of them sorts the vocabulary.

    argmax over the top_k highest logits z of:  z + temperature · g,   g = −log(−log(1 − u)),   u = hash / 2³²

First each program takes a chunk of a row and leaves what may be among the row's best: one token where all of the row
may be drawn or the likeliest is wanted, else the top_k highest of the chunk. Then one program a row chooses among those.
For a top_k beyond MOST that one program reads the row itself, several times.

The n-th highest of a set is found by halving an interval of integers in the order of the values: 32 times, how many are
at or above its middle. Of equals at that height those with the lowest indices are taken, which a running sum counts.
A token's noise follows from its id and the row's numbers alone, so nothing depends on how a row is cut, on timing, or on
other rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels_torch.draw_tokens import check_draw_tokens
from kernels_triton.launch import can_overlap, ceil_div, check_gpu, launch, next_power_of_two
from kernels_triton.rows import values_side_by_side

# Not measured yet.
CHUNK = 2048  # tokens a program looks at; 1024 and fewer need more programs than the second kernel has patience for
MOST = 256    # up to this top_k chunks are sifted first
BLOCK = 4096  # candidates that a program of the second kernel looks at at a time


@triton.jit
def _mix(x):
    """kernels_torch.draw_tokens.mix"""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _key_of_row(seed, sample, step, i_b):
    """What the hashes of a row's tokens begin with."""
    b = tl.load(sample + i_b).to(tl.int64) * -0x61C8864680B583EB + tl.load(seed + i_b).to(tl.int64)
    return _mix(_mix(b) + tl.load(step + i_b).to(tl.int64))


@triton.jit
def _gumbel(key, o_v):
    """Noise for the tokens o_v: log(1 − u) by its series where 1 − u would round u away, which is where noise is large."""
    b_bits = (_mix(key + _mix(o_v.to(tl.int64) + 1)) >> 32) & 0xFFFFFFFF
    b_u = tl.minimum((b_bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.999999940395355)
    b_small = b_u * (1 + b_u * (0.5 + b_u * (0.3333333333 + b_u * (0.25 + b_u * (0.2 + b_u * 0.1666666667)))))
    b_e = tl.where(b_u < 0.03, b_small, -tl.log(1 - b_u))
    return -tl.log(b_e)


@triton.jit
def _order(b_x):
    """Integers in the order of fp32 values, −0 equal to 0."""
    b = b_x.to(tl.int32, bitcast=True)
    return tl.where(b < 0, -2147483648 - b, b)


@triton.jit
def _middle(low, high):
    """(low + high) / 2 rounded up, without overflow."""
    return (low & high) + ((low ^ high) >> 1) + ((low ^ high) & 1)


@triton.jit
def _best_of_chunk_kernel(
    logits, temperature, top_k, seed, sample, step, values, indices, stride_b, V,
    DRAWS: tl.constexpr, K: tl.constexpr, BV: tl.constexpr, OVERLAP: tl.constexpr,
):
    """values, indices [B, chunks, K]: the best of the i_v-th chunk of BV tokens, in their order; −inf behind them."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    i_v, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_v = i_v * BV + tl.arange(0, BV)
    m_v = o_v < V
    b_x = tl.load(logits + i_b * stride_b + o_v, mask=m_v, other=float("-inf")).to(tl.float32)          # [BV]
    i_out = (i_b * tl.num_programs(0) + i_v) * K
    n = 0
    if DRAWS:
        b_t = tl.load(temperature + i_b).to(tl.float32)
        n = tl.load(top_k + i_b).to(tl.int32)
        n = tl.where(b_t == 0, 1, tl.minimum(n, K))
    if (n == 0) | (K == 1):
        if DRAWS:
            if n == 0:
                b_x = tl.fma(_gumbel(_key_of_row(seed, sample, step, i_b), o_v), b_t, b_x)
            b_x = tl.where(m_v, b_x, float("-inf"))
        b_best, i_best = tl.max(b_x, 0, return_indices=True, return_indices_tie_break_left=True)
        o_k = tl.arange(0, K)
        tl.store(values + i_out + o_k, tl.where(o_k == 0, b_best, float("-inf")))
        tl.store(indices + i_out + o_k, tl.where(o_k == 0, i_v * BV + i_best, V))
    else:
        b_o = tl.where(m_v, _order(b_x), -2147483648)  # below −inf
        low, high = tl.min(b_o, 0), tl.max(b_o, 0)
        n = tl.minimum(n, tl.minimum(BV, V - i_v * BV))
        while low < high:  # the highest number that n values reach
            middle = _middle(low, high)
            enough = tl.sum((b_o >= middle).to(tl.int32), 0) >= n
            low, high = tl.where(enough, middle, low), tl.where(enough, high, middle - 1)
        above, equal = b_o > low, b_o == low
        room = n - tl.sum(above.to(tl.int32), 0)
        kept = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))
        o_out = i_out + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(values + o_out, b_x, mask=kept)
        tl.store(indices + o_out, o_v, mask=kept)
        o_k = tl.arange(0, K)
        tl.store(values + i_out + o_k, tl.full([K], float("-inf"), tl.float32), mask=o_k >= n)
        tl.store(indices + i_out + o_k, tl.full([K], 0, tl.int32) + V, mask=o_k >= n)


@triton.jit
def _draw_kernel(
    values, indices, temperature, top_k, seed, sample, step, ids, stride_b, N, V,
    DRAWS: tl.constexpr, SIFTED: tl.constexpr, ONE_BLOCK: tl.constexpr, BN: tl.constexpr, OVERLAP: tl.constexpr,
):
    """ids [B] from N candidates of each row, or without `indices` from all tokens.

    SIFTED   rows without a top_k brought the best of each chunk, noise added
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    i_b = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BN)
    b_t, n, key = 0.0, N, tl.full([], 0, tl.int64)
    if DRAWS:
        b_t = tl.load(temperature + i_b).to(tl.float32)
        n = tl.load(top_k + i_b).to(tl.int32)
        if SIFTED:
            b_t = tl.where(n == 0, 0.0, b_t)
        n = tl.where((n == 0) | (b_t == 0), N, n)  # of how many it is the highest: all
        key = _key_of_row(seed, sample, step, i_b)
    low = tl.full([], -2147483648, tl.int32)
    room = tl.full([], 0, tl.int32) + N
    if n < N:
        high = tl.full([], 2147483647, tl.int32)
        if ONE_BLOCK:
            b_x = tl.load(values + i_b * stride_b + o_n, mask=o_n < N, other=float("-inf")).to(tl.float32)
            b_o = tl.where(o_n < N, _order(b_x), -2147483648)
            low, high = tl.min(b_o, 0), tl.max(b_o, 0)
        while low < high:
            middle = _middle(low, high)
            count = tl.full([], 0, tl.int32)
            if ONE_BLOCK:
                count += tl.sum((b_o >= middle).to(tl.int32), 0)
            else:
                for i in range(0, N, BN):
                    m_n = i + o_n < N
                    b_x = tl.load(values + i_b * stride_b + i + o_n, mask=m_n, other=float("-inf")).to(tl.float32)
                    count += tl.sum((m_n & (_order(b_x) >= middle)).to(tl.int32), 0)
            low, high = tl.where(count >= n, middle, low), tl.where(count >= n, high, middle - 1)
        count = tl.full([], 0, tl.int32)
        for i in range(0, N, BN):
            m_n = i + o_n < N
            b_x = tl.load(values + i_b * stride_b + i + o_n, mask=m_n, other=float("-inf")).to(tl.float32)
            count += tl.sum((m_n & (_order(b_x) > low)).to(tl.int32), 0)
        room = n - count

    best, i_best = tl.full([], float("-inf"), tl.float32), tl.full([], 0, tl.int32) + V
    for i in range(0, N, BN):
        m_n = i + o_n < N
        b_x = tl.load(values + i_b * stride_b + i + o_n, mask=m_n, other=float("-inf")).to(tl.float32)  # [BN]
        if indices is None:
            b_i = i + o_n
        else:
            b_i = tl.load(indices + i_b * N + i + o_n, mask=m_n, other=0)                               # [BN]
        b_o = _order(b_x)
        equal = m_n & (b_o == low)
        kept = m_n & ((b_o > low) | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room)))
        room -= tl.sum(equal.to(tl.int32), 0)
        b_y = b_x
        if DRAWS:  # noqa: SIM102  known when compiled, the next is not
            if b_t > 0:
                b_y = tl.fma(_gumbel(key, b_i), b_t, b_x)
        b_y = tl.where(kept, b_y, float("-inf"))
        b_top = tl.max(b_y, 0)
        i_top = tl.min(tl.where(kept & (b_y == b_top), b_i, V), 0)
        i_best = tl.where(b_top > best, i_top, i_best)
        best = tl.maximum(b_top, best)
    tl.store(ids + i_b, tl.where(i_best >= V, 0, i_best))  # nothing above −inf: the first


def _draw_tokens(
    logits: Tensor, temperature: Tensor, top_k: Tensor, seed: Tensor, sample: Tensor, step: Tensor, draws: bool, most: int
) -> Tensor:
    """logits [B, V] with values side by side → ids [B]."""
    B, V = logits.shape
    ids = torch.empty(B, dtype=torch.int64, device=logits.device)
    if B == 0:
        return ids
    values, indices, N, K = logits, None, V, 1 if most == 0 or not draws else next_power_of_two(most)
    overlap = can_overlap(logits.device)
    of_rows = dict(temperature=temperature, top_k=top_k, seed=seed, sample=sample, step=step)
    sifted = K <= MOST and V > K
    if sifted:
        chunks = ceil_div(V, CHUNK)
        N = chunks * K
        values = torch.empty((B, N), dtype=torch.float32, device=logits.device)
        indices = torch.empty((B, N), dtype=torch.int32, device=logits.device)
        launch(
            _best_of_chunk_kernel, (chunks, B), logits=logits, **of_rows, values=values, indices=indices,
            stride_b=logits.stride(0), V=V, DRAWS=draws, K=K, BV=CHUNK, OVERLAP=overlap, launch_pdl=overlap,
            num_warps=8 if K > 1 else 4,
        )
    BN = min(max(16, next_power_of_two(N)), BLOCK)
    launch(
        _draw_kernel, (B,), values=values, indices=indices, **of_rows, ids=ids, stride_b=values.stride(0), N=N, V=V,
        DRAWS=draws, SIFTED=sifted, ONE_BLOCK=N <= BN, BN=BN, OVERLAP=overlap, launch_pdl=overlap,
        num_warps=max(1, min(8, BN // 256)),
    )
    return ids


def draw_tokens(
    logits: Tensor, temperature: Tensor, top_k: Tensor, seed: Tensor, sample: Tensor, step: Tensor, *, draws: bool = True,
    most: int = 0,
) -> Tensor:
    """kernels_torch.draw_tokens, without a sort. Arguments: see there."""
    check_draw_tokens(logits, temperature, top_k, seed, sample, step, most)
    check_gpu(logits=logits)
    with torch.no_grad():
        of_rows = (x.contiguous() for x in (temperature, top_k, seed, sample, step))
        return _draw_tokens(values_side_by_side(logits), *of_rows, draws, most)
