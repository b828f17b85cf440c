"""Top-k: the k largest values of each row, largest first; of equals the one with the lowest index.

What is sorted are keys: a value's bits turned into an integer of the same order (NaN above everything, −0 equal to 0), the
complement of its index in the lower bits. All keys of a row are different, and the largest has the largest value or, of
equals, the lowest index. The few largest are found one after the other, many by a bitonic network that sorts runs of K
keys and keeps the larger half of two runs until one is left (Shanbhag, Pirk and Madden,
https://dl.acm.org/doi/10.1145/3183713.3183735). A row wider than a block is cut into blocks, and the best of each go into
one more round. An fp64 value leaves no bits for an index, so fp64, which is for tests, is searched k times. Forward keeps
the indices; backward writes zeros and then the k gradients of a row over them.

No row is shared by programs, so nothing depends on timing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kernels_torch.top_k import check_top_k
from kernels_triton.autograd import differentiable_once
from kernels_triton.launch import Tile, ceil_div, check_gpu, launch, next_power_of_two
from kernels_triton.rows import count_rows, row_stride, with_rows

# Not measured yet. Compiled for sm_90 none of the kernels spills in bf16.
FEW = 8       # as many are found one after the other; more by the network
BLOCK = 4096  # keys that one program sorts at most
MOST = 1024   # of a row wider than that, as many are found at once


@triton.jit
def _order(b_x):
    """Integers in the order of the values: NaN above everything, −0 equal to 0, and the lowest integer left over."""
    BITS: tl.constexpr = b_x.dtype.primitive_bitwidth
    LOWEST: tl.constexpr = -(2 ** (BITS - 1))
    b = b_x.to(tl.int16 if BITS == 16 else (tl.int32 if BITS == 32 else tl.int64), bitcast=True)
    b = b.to(tl.int32) if BITS == 16 else b
    b = tl.where(b < 0, LOWEST - b, b)  # sign and magnitude → two's complement
    return tl.where(b_x == b_x, b, -LOWEST - 1)


@triton.jit
def _keys(b_x, o_d, HALF: tl.constexpr):
    """Order of the value in the upper half, of the index in the lower: an earlier one counts for more."""
    KEY: tl.constexpr = tl.int32 if HALF == 16 else tl.int64
    return (_order(b_x).to(KEY) << HALF) + ((2**HALF - 1) - o_d.to(KEY))


@triton.jit
def _swapped(h, flip, i: tl.constexpr):
    """h [2, …, 2] with each pair along the i-th last axis in descending order, ascending where flip is 0."""
    n: tl.constexpr = len(h.shape)
    partner = tl.sum(h, n - 1 - i, keep_dims=True) - h  # exact in integers, wrapped around or not
    right = tl.arange(0, 2).reshape([1] * (n - 1 - i) + [2] + [1] * i)
    return tl.where((h > partner) != (flip ^ right).to(tl.int1), partner, h)


@triton.jit
def _merged(h, LOG_RUN: tl.constexpr, LAST: tl.constexpr):
    """Each run of 2^LOG_RUN keys, which rises and then falls, sorted: in descending order if LAST, else in turns."""
    n: tl.constexpr = len(h.shape)
    if LAST:
        flip = 1
    else:
        flip = tl.arange(0, 2).reshape([1] * (n - 1 - LOG_RUN) + [2] + [1] * LOG_RUN)
    for i in tl.static_range(LOG_RUN):
        h = _swapped(h, flip, LOG_RUN - 1 - i)
    return h


@triton.jit
def _largest_by_network(b_key, LOG_N: tl.constexpr, LOG_BD: tl.constexpr, LOG_K: tl.constexpr):
    """[BT, BD] → [BT, K], sorted; LOG_N is log2 of BT · BD."""
    h = b_key.reshape([2] * LOG_N)
    for i in tl.static_range(1, LOG_K + 1):
        h = _merged(h, i, i == LOG_BD)
    for i in tl.static_range(LOG_K + 1, LOG_BD + 1):
        h = tl.max(h, len(h.shape) - 1 - LOG_K)  # of two sorted runs, one turned around, the K larger
        h = _merged(h, LOG_K, i == LOG_BD)
    return h.reshape([2 ** (LOG_N - LOG_BD), 2**LOG_K])


@triton.jit
def _largest_in_turn(b_key, k, LOWEST: tl.constexpr, BT: tl.constexpr, K: tl.constexpr):
    """[BT, BD] → [BT, K], the first k of them filled."""
    o_k = tl.arange(0, K)
    b_top = tl.full([BT, K], LOWEST, b_key.dtype)                                                       # [BT, K]
    for i_k in range(k):
        b_max = tl.max(b_key, 1)                                                                        # [BT]
        b_key = tl.where(b_key == b_max[:, None], LOWEST, b_key)                                        # [BT, BD]
        b_top = tl.where(o_k[None, :] == i_k, b_max[:, None], b_top)
    return b_top


@triton.jit
def _top_k_kernel(
    x, keys, best, values, indices, stride_x, T, k, first,
    D: tl.constexpr, LOG_BT: tl.constexpr, LOG_BD: tl.constexpr, LOG_K: tl.constexpr, HALF: tl.constexpr,
    NETWORK: tl.constexpr,
):
    """The K best of each block of a row of D values x, or of D keys: to `best` as keys, or as what the caller asked for.

    HALF      bits of a key for the value, and as many for the index
    first     how many of a row's k are known already, and not to be found again; None: none
    stride_x  None where rows of x follow one another
    """
    BT: tl.constexpr = 2**LOG_BT
    BD: tl.constexpr = 2**LOG_BD
    K: tl.constexpr = 2**LOG_K
    LOWEST: tl.constexpr = -(2 ** (2 * HALF - 1))
    i_t, i_d = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_t, o_d, o_k = i_t * BT + tl.arange(0, BT), i_d * BD + tl.arange(0, BD), tl.arange(0, K)
    m_t = o_t < T
    m = m_t[:, None] & (o_d < D)[None, :]
    p_x = x + (o_t * D if stride_x is None else o_t * stride_x)                                         # [BT]
    if keys is None:
        b_x = tl.load(p_x[:, None] + o_d[None, :], mask=m, other=0.0)                                   # [BT, BD]
        b_key = tl.where(m, _keys(b_x, o_d[None, :], HALF), LOWEST)                                     # [BT, BD]
        if first is not None:
            b_i = tl.load(indices + o_t * k + first - 1, mask=m_t, other=0)                             # [BT]
            b_last = _keys(tl.load(p_x + b_i, mask=m_t, other=0.0), b_i, HALF)                          # [BT]
            b_key = tl.where(b_key < b_last[:, None], b_key, LOWEST)
    else:
        b_key = tl.load(keys + o_t[:, None] * D + o_d[None, :], mask=m, other=LOWEST)                   # [BT, BD]
    if NETWORK:
        b_top = _largest_by_network(b_key, LOG_BT + LOG_BD, LOG_BD, LOG_K)                              # [BT, K]
    else:
        b_top = _largest_in_turn(b_key, k, LOWEST, BT, K)                                               # [BT, K]
    if best is not None:
        p_best = best + (o_t * tl.num_programs(1) + i_d)[:, None] * K + o_k[None, :]
        tl.store(p_best, b_top, mask=m_t[:, None])
    else:
        o_k = o_k if first is None else first + o_k
        m_k = m_t[:, None] & (o_k < k)[None, :]
        b_i = (2**HALF - 1 - (b_top & (2**HALF - 1))).to(tl.int32)                                      # [BT, K]
        o_out = o_t[:, None] * k + o_k[None, :]
        tl.store(indices + o_out, b_i, mask=m_k)
        tl.store(values + o_out, tl.load(p_x[:, None] + b_i, mask=m_k), mask=m_k)


@triton.jit
def _top_k_scan_kernel(x, values, indices, stride_x, D, k, BD: tl.constexpr):
    """For fp64: the row is searched for the next one k times."""
    i_t = tl.program_id(0).to(tl.int64)
    LOWEST: tl.constexpr = -(2**63)
    i_last = -1
    b_last = tl.full([], 2**63 - 1, tl.int64)
    for i_k in range(k):
        i_best = D
        b_best = tl.full([], LOWEST, tl.int64)
        for i_d in range(0, D, BD):
            o_d = i_d + tl.arange(0, BD)
            b_x = tl.load(x + i_t * stride_x + o_d, mask=o_d < D, other=0.0)                            # [BD]
            b_key = _order(b_x)                                                                         # [BD]
            m = (o_d < D) & ((b_key < b_last) | ((b_key == b_last) & (o_d > i_last)))
            b_key = tl.where(m, b_key, LOWEST)
            b_top = tl.max(b_key, 0)
            i_top = tl.min(tl.where(b_key == b_top, o_d, D), 0)
            i_best = tl.where(b_top > b_best, i_top, i_best)
            b_best = tl.maximum(b_top, b_best)
        tl.store(indices + i_t * k + i_k, i_best)
        tl.store(values + i_t * k + i_k, tl.load(x + i_t * stride_x + i_best))
        i_last, b_last = i_best, b_best


@triton.jit
def _top_k_bwd_kernel(
    indices, dvalues, dx, stride_dvalues, T, D, k,
    BT: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):
    i_t, i_d = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_t, o_d = i_t * BT + tl.arange(0, BT), i_d * BD + tl.arange(0, BD)
    m_t = o_t < T
    p_dx = dx + o_t[:, None] * D
    zeros = tl.zeros([BT, BD], dtype=dx.dtype.element_ty)                                               # [BT, BD]
    tl.store(p_dx + o_d[None, :], zeros, mask=m_t[:, None] & (o_d < D)[None, :])
    tl.debug_barrier()  # what follows is written over them by other threads of this program
    for i_k in range(0, k, BK):
        o_k = i_k + tl.arange(0, BK)
        m = m_t[:, None] & (o_k < k)[None, :]
        b_i = tl.load(indices + o_t[:, None] * k + o_k[None, :], mask=m, other=-1)                      # [BT, BK]
        b_dv = tl.load(dvalues + o_t[:, None] * stride_dvalues + o_k[None, :], mask=m, other=0.0)       # [BT, BK]
        tl.store(p_dx + b_i, b_dv, mask=(b_i >= i_d * BD) & (b_i < i_d * BD + BD))


def log2(power: int) -> int:
    return power.bit_length() - 1


def top_k_tile(N: int, K: int) -> Tile:
    """Tile for rows of N keys of which K are kept. Wider rows are cut into smaller blocks, to occupy more processors."""
    BD = next_power_of_two(N) if N <= BLOCK else max(BLOCK // 4, 4 * K)
    warps = 4 if BD <= 1024 else 8
    return Tile(max(1, 32 * warps * 8 // BD), BD, warps)


def _top_k_fwd(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """x [..., D] → values and indices [..., k]."""
    D, T = x.shape[-1], count_rows(x)
    values = torch.empty((*x.shape[:-1], k), dtype=x.dtype, device=x.device)
    indices = torch.empty((*x.shape[:-1], k), dtype=torch.int32, device=x.device)
    if T == 0:
        return values, indices
    if x.dtype == torch.float64:
        launch(
            _top_k_scan_kernel, (T,), x=x, values=values, indices=indices, stride_x=row_stride(x), D=D, k=k,
            BD=min(next_power_of_two(D), 1024),
        )
        return values, indices
    half, key = (16, torch.int32) if x.element_size() == 2 and D <= 2**16 else (32, torch.int64)
    at_once = k if D <= BLOCK else MOST
    for first in range(0, k, at_once):
        K, N, keys, found = next_power_of_two(min(k - first, at_once)), D, None, False
        while not found:
            tile = top_k_tile(N, K)
            blocks = ceil_div(N, tile.BD)
            found = blocks == 1
            best = None if found else torch.empty((T, blocks * K), dtype=key, device=x.device)
            launch(
                _top_k_kernel, (ceil_div(T, tile.BT), blocks), x=x, keys=keys, best=best, values=values,
                indices=indices, stride_x=None if keys is None and x.is_contiguous() else row_stride(x), T=T, k=k,
                first=first or None, D=N,
                LOG_BT=log2(tile.BT), LOG_BD=log2(tile.BD), LOG_K=log2(K), HALF=half, NETWORK=k > FEW,
                num_warps=tile.warps,
            )
            keys, N = best, blocks * K
    return values, indices


def _top_k_bwd(indices: Tensor, dvalues: Tensor, D: int) -> Tensor:
    k, T = indices.shape[-1], count_rows(indices)
    dx = torch.empty((*indices.shape[:-1], D), dtype=dvalues.dtype, device=dvalues.device)
    if T > 0:
        BD = min(next_power_of_two(D), 4096)
        BT = max(1, 4096 // BD)
        launch(
            _top_k_bwd_kernel, (ceil_div(T, BT), ceil_div(D, BD)), indices=indices, dvalues=dvalues, dx=dx,
            stride_dvalues=row_stride(dvalues), T=T, D=D, k=k, BT=BT, BD=BD, BK=min(next_power_of_two(k), BD),
        )
    return dx


class _TopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        rows = with_rows(x)
        values, indices = _top_k_fwd(rows, k)
        if rows is not x:
            values, indices = (out.view(*x.shape[:-1], k) for out in (values, indices))
        ctx.save_for_backward(indices)
        ctx.mark_non_differentiable(indices)
        ctx.D = x.shape[-1]
        return values, indices

    @staticmethod
    @differentiable_once
    def backward(ctx: FunctionCtx, dvalues: Tensor, _: None) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        return _top_k_bwd(indices, with_rows(dvalues), ctx.D), None


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """kernels_torch.top_k, without sorting the rest. Arguments: see kernels_torch.top_k."""
    check_top_k(x, k)
    check_gpu(x=x)
    return _TopK.apply(x, k)
