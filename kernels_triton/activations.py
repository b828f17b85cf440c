"""GELU, softmax, and the k largest values of each row.

GELU:  y = x · Φ(x) = max(x, 0) − |x| · h(|x|),   dx = dy · (Φ(x) + x · φ(x)),   h(t) = erfc(t / √2) / 2 = 1 − Φ(t),
φ(x) = exp(−x² / 2) / √(2π). Φ(x) is h(−x) left of 0 and 1 − h(x) right of it. In fp32 h is 2 to the power of a polynomial
in t, 3e-8 off at most (what rounding does) and 4e-4 of itself (up to t = 8). That is 18 instructions a value on sm_90, where
the usual erf takes 36, which in bf16 is about all there is time for; and it is closer in the left tail, where 1 + erf(x)
cancels. Backward reads x again.

Softmax:  y = e / Σ e with e = exp(x − max(x)),   dx = y · (dy − Σ dy · y). Backward reads y. Rows too wide for registers
take the `_wide_` kernels, which go over the row twice; there forward keeps maximum and sum of each column of its blocks
and joins them at the end.

Top-k sorts keys: a value's bits turned into an integer of the same order (NaN above everything, −0 equal to 0), the
complement of its index in the lower bits. All keys of a row are different, and the largest has the largest value or, of
equals, the lowest index. The few largest are found one after the other, many by a bitonic network that sorts runs of K
keys and keeps the larger half of two runs until one is left (Shanbhag, Pirk and Madden,
https://dl.acm.org/doi/10.1145/3183713.3183735). A row wider than a block is cut into blocks, and the best of each go into
one more round. An fp64 value leaves no bits for an index, so fp64, which is for tests, is searched k times. Backward
writes zeros and then the k gradients of a row over them.

None of it depends on timing: no row is shared by programs, and no program adds to what another wrote.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from kernels_torch.activations import check_float, check_rows

from kernels_triton.launch import (  # isort: skip
    STAGE_BYTES, Tile, ceil_div, check_gpu, launch, next_power_of_two, resident_programs, row_tile,
)
from kernels_triton.primitives import upcast
from kernels_triton.rmsnorm import count_rows, row_stride, with_rows


@triton.jit
def _upper_tail(b_t):
    """erfc(t / √2) / 2 for t ≥ 0; the polynomial is log2 of it, fitted by minimax of |error| · h / (h + 1e-5) up to t = 8."""
    if b_t.dtype == tl.float64:
        b_h = 0.5 - 0.5 * tl.erf(b_t * 0.7071067811865476)
    else:
        b_h = b_t * -1.9733183728231502e-08 + 6.644807110885814e-07
        b_h = b_h * b_t - 9.313975038370929e-06
        b_h = b_h * b_t + 6.914012853548646e-05
        b_h = b_h * b_t - 0.0002609260213345585
        b_h = b_h * b_t - 2.9257609154024692e-05
        b_h = b_h * b_t + 0.006975056308093757
        b_h = b_h * b_t - 0.052457217901159134
        b_h = b_h * b_t - 0.4592162270716235
        b_h = b_h * b_t - 1.151104660620094
        b_h = tl.exp2(b_h * b_t - 1.0)
    return b_h


@triton.jit
def _gelu_fwd_kernel(x, y, stride_x, D, N, BD: tl.constexpr):
    i_t, i_d = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_d = i_d * BD + tl.arange(0, BD)
    m = (o_d < D) & (i_t * D + o_d < N)
    b_x = upcast(tl.load(x + i_t * stride_x + o_d, mask=m, other=0.0))                                  # [BD]
    b_t = tl.abs(b_x)
    b_y = tl.maximum(b_x, 0.0) - b_t * _upper_tail(b_t)                                                 # [BD]
    tl.store(y + i_t * D + o_d, b_y.to(y.dtype.element_ty), mask=m)


@triton.jit
def _gelu_bwd_kernel(x, dy, dx, stride_x, stride_dy, D, N, BD: tl.constexpr):
    i_t, i_d = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_d = i_d * BD + tl.arange(0, BD)
    m = (o_d < D) & (i_t * D + o_d < N)
    b_x = upcast(tl.load(x + i_t * stride_x + o_d, mask=m, other=0.0))                                  # [BD]
    b_dy = upcast(tl.load(dy + i_t * stride_dy + o_d, mask=m, other=0.0))                               # [BD]
    b_h = _upper_tail(tl.abs(b_x))
    b_phi = tl.exp2(b_x * b_x * -0.7213475204444817) * 0.3989422804014327
    b_dx = b_dy * (tl.where(b_x < 0, b_h, 1.0 - b_h) + b_x * b_phi)                                     # [BD]
    tl.store(dx + i_t * D + o_d, b_dx.to(dx.dtype.element_ty), mask=m)


@triton.jit
def _softmax_fwd_kernel(
    x, y, stride_x, T,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):
    o_d = tl.arange(0, BD).to(tl.int64)
    for i_t in tl.range(tl.program_id(0).to(tl.int64), tl.cdiv(T, BT), tl.num_programs(0), num_stages=STAGES):
        o_t = i_t * BT + tl.arange(0, BT)
        m = (o_t < T)[:, None] & (o_d < D)[None, :]
        b_x = upcast(tl.load(x + o_t[:, None] * stride_x + o_d[None, :], mask=m, other=-float("inf")))  # [BT, BD]
        b_e = tl.exp(b_x - tl.max(b_x, 1)[:, None])                                                     # [BT, BD]
        b_y = b_e * (1.0 / tl.sum(b_e, 1))[:, None]                                                     # [BT, BD]
        tl.store(y + o_t[:, None] * D + o_d[None, :], b_y.to(y.dtype.element_ty), mask=m)


@triton.jit
def _softmax_bwd_kernel(
    y, dy, dx, stride_dy, T,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):
    o_d = tl.arange(0, BD).to(tl.int64)
    for i_t in tl.range(tl.program_id(0).to(tl.int64), tl.cdiv(T, BT), tl.num_programs(0), num_stages=STAGES):
        o_t = i_t * BT + tl.arange(0, BT)
        m = (o_t < T)[:, None] & (o_d < D)[None, :]
        o_y = o_t[:, None] * D + o_d[None, :]
        b_y = upcast(tl.load(y + o_y, mask=m, other=0.0))                                               # [BT, BD]
        b_dy = upcast(tl.load(dy + o_t[:, None] * stride_dy + o_d[None, :], mask=m, other=0.0))         # [BT, BD]
        b_dx = b_y * (b_dy - tl.sum(b_dy * b_y, 1)[:, None])                                            # [BT, BD]
        tl.store(dx + o_y, b_dx.to(dx.dtype.element_ty), mask=m)


@triton.jit
def _softmax_wide_fwd_kernel(x, y, stride_x, D, BD: tl.constexpr):
    i_t = tl.program_id(0).to(tl.int64)
    acc = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    lowest = -1.7976931348623157e308 if acc == tl.float64 else -3.4028234663852886e38
    b_max = tl.full([BD], lowest, dtype=acc)  # finite, so that −inf less it is −inf                    # [BD]
    b_sum = tl.zeros([BD], dtype=acc)                                                                   # [BD]
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD).to(tl.int64)
        p_x = x + i_t * stride_x + o_d
        b_x = tl.load(p_x, mask=o_d < D, other=-float("inf"), eviction_policy="evict_last").to(acc)     # [BD]
        b_e = tl.exp(-tl.abs(b_x - b_max))  # of the two factors that bring sum and value to the new maximum, one is 1
        b_sum = tl.where(b_x > b_max, b_sum * b_e + 1.0, b_sum + b_e)
        b_max = tl.maximum(b_max, b_x)
    b_top = tl.max(b_max, 0)
    b_scale = 1.0 / tl.sum(b_sum * tl.exp(b_max - b_top), 0)
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD).to(tl.int64)
        p_x = x + i_t * stride_x + o_d
        b_x = tl.load(p_x, mask=o_d < D, other=-float("inf"), eviction_policy="evict_first").to(acc)    # [BD]
        tl.store(y + i_t * D + o_d, (tl.exp(b_x - b_top) * b_scale).to(y.dtype.element_ty), mask=o_d < D)


@triton.jit
def _softmax_wide_bwd_kernel(y, dy, dx, stride_dy, D, BD: tl.constexpr):
    i_t = tl.program_id(0).to(tl.int64)
    acc = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    b_sum = tl.zeros([BD], dtype=acc)                                                                   # [BD]
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD).to(tl.int64)
        b_y = tl.load(y + i_t * D + o_d, mask=o_d < D, other=0.0, eviction_policy="evict_last").to(acc)  # [BD]
        p_dy = dy + i_t * stride_dy + o_d
        b_sum += b_y * tl.load(p_dy, mask=o_d < D, other=0.0, eviction_policy="evict_last").to(acc)
    b_c = tl.sum(b_sum, 0)
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD).to(tl.int64)
        b_y = tl.load(y + i_t * D + o_d, mask=o_d < D, other=0.0, eviction_policy="evict_first").to(acc)  # [BD]
        p_dy = dy + i_t * stride_dy + o_d
        b_dy = tl.load(p_dy, mask=o_d < D, other=0.0, eviction_policy="evict_first").to(acc)            # [BD]
        tl.store(dx + i_t * D + o_d, (b_y * (b_dy - b_c)).to(dx.dtype.element_ty), mask=o_d < D)


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


# None of the tiles in this file has been measured yet. Compiled for sm_90 none of their kernels spills in bf16.
GELU_FORWARD = Tile(BT=1, BD=2048, warps=4)   # 16 values a thread, two 16-byte loads on their way
GELU_BACKWARD = Tile(BT=1, BD=1024, warps=4)  # 8 of x and 8 of dy


def rows_of(BD: int, *tensors: Tensor) -> tuple[int, int, list[int]]:
    """Number and length of rows, and how far they lie apart in each tensor. All in one piece: rows of BD, the last short."""
    x = tensors[0]
    if all(t.is_contiguous() for t in tensors):
        return ceil_div(x.numel(), BD), BD, [BD for _ in tensors]
    return count_rows(x), x.shape[-1], [row_stride(t) for t in tensors]


def _gelu_fwd(x: Tensor) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() > 0:
        BD = GELU_FORWARD.BD
        T, D, (stride_x,) = rows_of(BD, x)
        launch(
            _gelu_fwd_kernel, (T, ceil_div(D, BD)), x=x, y=y, stride_x=stride_x, D=D, N=x.numel(), BD=BD,
            num_warps=GELU_FORWARD.warps,
        )
    return y


def _gelu_bwd(x: Tensor, dy: Tensor) -> Tensor:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() > 0:
        BD = GELU_BACKWARD.BD
        T, D, (stride_x, stride_dy) = rows_of(BD, x, dy)
        launch(
            _gelu_bwd_kernel, (T, ceil_div(D, BD)), x=x, dy=dy, dx=dx, stride_x=stride_x, stride_dy=stride_dy, D=D,
            N=x.numel(), BD=BD, num_warps=GELU_BACKWARD.warps,
        )
    return dx


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        rows = with_rows(x)
        ctx.save_for_backward(rows)
        y = _gelu_fwd(rows)
        return y if rows is x else y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        dx = _gelu_bwd(rows, with_rows(dy))
        return dx if rows.shape == dy.shape else dx.view(dy.shape)


def gelu(x: Tensor) -> Tensor:
    """kernels_torch.gelu, in one pass."""
    check_float("gelu", x)
    check_gpu(x=x)
    return _GELU.apply(x)


# Rows of softmax up to a width: values a thread, warps[, stages, programs that stay on a processor], as in launch.py.
FORWARD = {
    2048: (32, 4),
    4096: (32, 8),
    16384: (32, 16),
    32768: (32, 32, 2, 1),  # one row fills the registers of a processor, so the next one is fetched meanwhile
}
BACKWARD = {
    4096: (16, 4),
    16384: (32, 16),
}
WIDE = Tile(BT=1, BD=8192, warps=16)  # columns at a time; few programs a processor, so that L2 holds the rows they go over


def softmax_tile(D: int, itemsize: int, table: dict[int, tuple]) -> Tile | None:
    """None: too wide for registers. Fewer stages than in the table where values are larger than bf16."""
    for width, row in table.items():
        if width >= D:
            tile = row_tile(D, *row)
            return tile._replace(stages=min(tile.stages, 1 + STAGE_BYTES // (tile.BT * tile.BD * itemsize)))
    return None


def _softmax_fwd(x: Tensor) -> Tensor:
    D, T = x.shape[-1], count_rows(x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    tile = softmax_tile(D, x.element_size(), FORWARD)
    if T == 0:
        return y
    if tile is None:
        launch(
            _softmax_wide_fwd_kernel, (T,), x=x, y=y, stride_x=row_stride(x), D=D, BD=WIDE.BD, num_warps=WIDE.warps
        )
    else:
        launch(
            _softmax_fwd_kernel, (n_programs(T, tile, x.device),), x=x, y=y, stride_x=row_stride(x), T=T, D=D,
            BT=tile.BT, BD=tile.BD, STAGES=tile.stages, num_warps=tile.warps,
        )
    return y


def _softmax_bwd(y: Tensor, dy: Tensor) -> Tensor:
    """y contiguous."""
    D, T = y.shape[-1], count_rows(y)
    dx = torch.empty_like(y)
    tile = softmax_tile(D, y.element_size(), BACKWARD)
    if T == 0:
        return dx
    if tile is None:
        launch(
            _softmax_wide_bwd_kernel, (T,), y=y, dy=dy, dx=dx, stride_dy=row_stride(dy), D=D, BD=WIDE.BD,
            num_warps=WIDE.warps,
        )
    else:
        launch(
            _softmax_bwd_kernel, (n_programs(T, tile, y.device),), y=y, dy=dy, dx=dx, stride_dy=row_stride(dy), T=T,
            D=D, BT=tile.BT, BD=tile.BD, STAGES=tile.stages, num_warps=tile.warps,
        )
    return dx


def n_programs(T: int, tile: Tile, device: torch.device) -> int:
    programs = ceil_div(T, tile.BT)
    return programs if tile.stay is None else min(programs, resident_programs(device, tile.stay))


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        rows = with_rows(x)
        y = _softmax_fwd(rows)
        y = y if rows is x else y.view(x.shape)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return _softmax_bwd(y, with_rows(dy))


def softmax(x: Tensor) -> Tensor:
    """kernels_torch.softmax, in one pass over rows of up to 16384 values, in two over wider ones."""
    check_rows("softmax", x)
    check_gpu(x=x)
    return _Softmax.apply(x)


FEW = 8       # as many are found one after the other; more by the network
BLOCK = 4096  # keys that one program sorts at most
MOST = 1024   # of a row wider than that, as many are found at once


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
    @once_differentiable
    def backward(ctx: FunctionCtx, dvalues: Tensor, _: None) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        return _top_k_bwd(indices, with_rows(dvalues), ctx.D), None


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """kernels_torch.top_k, without sorting the rest."""
    check_rows("top_k", x)
    if not 0 < k <= x.shape[-1]:
        raise ValueError(f"top_k needs k between 1 and the row's {x.shape[-1]} values, got {k}")
    check_gpu(x=x)
    return _TopK.apply(x, k)
