"""The matrix product of decoding:  y = act(norm(x) Wᵀ) + residual  for few rows x [N, C] and all of W [F, C].

Nothing but reading W takes time, so all is about how many of its bytes are on their way at once. Four kernels:

N ≤ 4, W as it is or of bytes   each thread multiplies 8 columns at a time and sums in registers; the threads of a row
                                of W meet at the end
N ≤ 4, W in int4                the same on words of 8 nibbles
N ≤ 16, W in codes              tiles of W on the tensor cores
N ≤ 32, W in half precision     16 or 32 rows of W on the tensor cores, a part of the columns for each warp

A program asks for its first tiles of W before it waits for the kernel before it (on Hopper and newer), since W does not
depend on that; and it lets the kernel after it start at once, which does the same. So the memory is not idle while
kernels change. It follows that the kernel launched just before must not write W, and that everything else is read and
written after the wait only.

The norm is a factor of each row, r = 1 / sqrt(mean(x²) + eps): every program sums the squares of the x it reads anyhow,
and multiplies its results with r; only a gain has to meet x before. Codes become fp32 in registers: bytes and nibbles
are put into the mantissa of 2²³ and 2²³ is taken off, since conversions have a fraction of the throughput.

Sums are in fp32 (fp64 for fp64), rounded once. There are no atomics and each value has one writer; rows do not know of
each other, so a row has the same bits whatever the others hold. But the kernels add up in different orders. Beyond those
numbers of rows, where W is larger than it was measured with, and in fp32 and fp64 beyond 4 rows, W is dequantised by one
pass if need be, and cuBLAS does the product: tensor cores have no fp32, and a chain of sums over all columns would be less
exact.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels_torch.linear_decode import check_linear_decode
from kernels_torch.quantised_weight import group_of
from kernels_triton.launch import INTERPRETED, can_overlap, ceil_div, check_gpu, is_hopper, launch, next_power_of_two
from kernels_triton.primitives import relu2, silu, upcast
from kernels_triton.rmsnorm import rmsnorm

MOST_SUMMED = 4    # rows by multiply and sum
MOST_CODED = 16    # rows on the tensor cores, W in codes
FINISHED = 1024    # values of a program that does what follows cuBLAS
IN_ASSEMBLY = tl.constexpr(not INTERPRETED)


class SumTile(NamedTuple):
    """Of a program that multiplies and sums: R times BF rows of W, BC columns (words of int4) at a time.

    ahead     how many of those are on their way
    """

    BF: int
    BC: int
    R: int
    warps: int
    ahead: int


class DotTile(NamedTuple):
    """Of a program on the tensor cores: BF rows of codes, BC columns (words of int4) at a time."""

    BF: int
    BC: int
    warps: int
    stages: int


class RowsTile(NamedTuple):
    """Of a program for BF rows of W in half precision and all of x; each warp takes BC columns at a time.

    ahead     how many of those of W are on their way; x_ahead: of x
    """

    BF: int
    BC: int
    warps: int
    ahead: int
    x_ahead: int


# One row, on an H200 whose copy moves 4.20 TB/s: µs a call, one after the other in a CUDA graph, each with another weight
# so that L2 has none of it, TB/s, and in brackets cuBLAS. By the width of a row of W and how many rows W has at least.
SUMS = {  # W as it is, and codes of a byte
    (1024, 1): SumTile(BF=2, BC=256, R=1, warps=2, ahead=16),    # 384 → 1152: 1.2 (3.0), 768 → 2304: 2.0, 1.78 (4.1)
    (4096, 2048): SumTile(BF=4, BC=256, R=1, warps=4, ahead=4),  # 2176 → 2176: 4.1, 2.29 (6.5), → 6528: 8.7, 3.25 (10.2),
                                                                 # → 8704: 10.2, 3.72 (11.5); a row ahead: 4.4, 9.1, 10.7
    (4096, 1): SumTile(BF=4, BC=256, R=1, warps=4, ahead=16),    # 1536 → 384: 1.3 (5.1), 3072 → 768: 2.6, 1.82 (6.6)
    (2**62, 1): SumTile(BF=1, BC=1024, R=1, warps=4, ahead=10),  # 8704 → 2176: 10.6, 3.58 (14.4); 4 × 256: 12.0
}
# int8: rows that share what is made of x gain nothing: R=2 and 4 at 2176 → 8704 8.9 (R=1 7.6), → 6528 6.2, 6.1 (6.0), → 2176
# 4.4 (3.8); at 8704 → 2176 7.7, 12.2 (8.1). Nor with int4: R=4 and R=1 at 2176 → 8704 9.6 and 10.0 (R=2 8.1).
SUMS_INT4 = {
    (1024, 1): SumTile(BF=4, BC=128, R=2, warps=4, ahead=3),      # 768 → 2304: 3.0
    (4096, 1): SumTile(BF=4, BC=128, R=2, warps=4, ahead=3),      # 2176 → 2176: 4.0, → 8704: 8.2, 1.23
    (2**62, 1): SumTile(BF=2, BC=256, R=2, warps=4, ahead=3),     # 8704 → 2176: 8.2; BF=1 with 2 warps, 5 ahead 7.9, R=4 10.4
}


def sum_tile(rows: int, C: int, N: int, dtype: torch.dtype, gated: bool) -> SumTile:
    """For several rows, and gate and up, less of each: their sums take registers, too."""
    table = SUMS_INT4 if dtype == torch.int32 else SUMS
    tile = next(tile for (widest, fewest), tile in table.items() if widest >= C and rows >= fewest)
    if N > 1 or gated:
        tile = tile._replace(R=1, ahead=min(tile.ahead, 4))
    return tile


def dot_tile(dtype: torch.dtype, gated: bool) -> DotTile:
    """16 rows, µs: int8 at 2176 → 8704 23.4, int4 43.5."""
    if dtype == torch.int32:
        return DotTile(BF=16, BC=32, warps=1, stages=4)
    return DotTile(BF=16, BC=256, warps=1, stages=2 if gated else 4)


# µs a call as above, in brackets cuBLAS with the kernels for the norm before it and for what follows. By the most rows of x,
# the widest row of W, and the fewest and most rows of W; elsewhere cuBLAS.
ROWS = {
    (8, 1024, 1, 1024): RowsTile(BF=16, BC=128, warps=4, ahead=3, x_ahead=4),     # 8 rows 768 → 768: 1.9 (4.9)
    (8, 1024, 1025, 4096): RowsTile(BF=32, BC=64, warps=4, ahead=3, x_ahead=4),   # 768 → 2304: 2.6 (6.3), → 3072: 3.1 (6.6);
                                                                                  # 16 rows of W 2.8, 3.2; 8 warps 5.6, 6.5
    (8, 4096, 1, 1024): RowsTile(BF=16, BC=128, warps=8, ahead=3, x_ahead=4),     # 3072 → 768: 3.8 (6.9); 4 warps 5.5
    (32, 1024, 1025, 4096): RowsTile(BF=32, BC=64, warps=4, ahead=3, x_ahead=3),  # 32 rows → 2304: 5.0 (6.5), → 3072: 5.2
                                                                                  # (6.8); 8 warps 9.5, 9.7. 3072 → 768: 7.8
                                                                                  # (7.2). → 768: 3.1 (4.9), but behind
                                                                                  # attention in a step 6.2 (5.2)
}


def rows_tile(N: int, C: int, rows: int, gated: bool) -> RowsTile | None:
    """None: cuBLAS. Gate and up take twice the registers."""
    for (most_n, widest, fewest, most), tile in ROWS.items():
        if most_n >= N and widest >= C and fewest <= rows <= most:
            return tile._replace(BF=16, ahead=3 if tile.BF == 32 else max(1, tile.ahead // 2)) if gated else tile
    return None


@triton.jit
def _values(b):
    """A tile of weights, inputs or codes as numbers to compute with: fp32, fp64 as it is."""
    if b.dtype == tl.bfloat16 and IN_ASSEMBLY:  # two at a time, and not through a byte permutation each
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=r,=r,r", [b], dtype=tl.float32, is_pure=True, pack=2,
        )
    elif b.dtype == tl.int8 and IN_ASSEMBLY:  # code + 128 as the last bits of 2²³, four at a time
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 t;
            xor.b32 t, $4, 0x80808080;
            prmt.b32 $0, t, 0x4B000000, 0x7440;
            prmt.b32 $1, t, 0x4B000000, 0x7441;
            prmt.b32 $2, t, 0x4B000000, 0x7442;
            prmt.b32 $3, t, 0x4B000000, 0x7443;
            sub.f32 $0, $0, 0f4B000080;
            sub.f32 $1, $1, 0f4B000080;
            sub.f32 $2, $2, 0f4B000080;
            sub.f32 $3, $3, 0f4B000080;
            }""",
            "=r,=r,=r,=r,r", [b], dtype=tl.float32, is_pure=True, pack=4,
        )
    elif b.dtype == tl.uint8:  # e4m3: sign, exponent and mantissa where fp32 has them, whose exponents begin 120 lower
        i = b.to(tl.int32)
        return (((i & 0x7F) << 20) | ((i & 0x80) << 24)).to(tl.float32, bitcast=True) * 1.329227995784916e36
    else:
        return upcast(b)


@triton.jit
def _nibble(b, j: tl.constexpr):
    """Nibble j of words, less 8. As bits 4k and on of 2²³ it is worth 16ᵏ, so for the first five nothing is shifted."""
    k: tl.constexpr = j % 5
    b = b >> (20 * (j // 5))
    if IN_ASSEMBLY:  # and, or in one instruction
        b_q = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, 0x4B000000, 0xEA;",
            "=r,r,r", [b, 15 << (4 * k)], dtype=tl.float32, is_pure=True, pack=1,
        )
    else:
        b_q = ((b & (15 << (4 * k))) | 0x4B000000).to(tl.float32, bitcast=True)
    return b_q * (1.0 / 16**k) - (8388608.0 / 16**k + 8.0)


@triton.jit
def _scale(p):
    """The scale of each word. Neighbours of a thread have the same: like this it is loaded once for all of them."""
    if IN_ASSEMBLY and p.dtype.element_ty == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "{.reg .b16 t, z; mov.b16 z, 0; ld.global.nc.b16 t, [$1]; mov.b32 $0, {z, t};}",
            "=r,l", [p.to(tl.int64, bitcast=True)], dtype=tl.float32, is_pure=True, pack=1,
        )
    else:
        return upcast(tl.load(p))


@triton.jit
def _load(p, o, i: tl.constexpr, n: tl.constexpr, B: tl.constexpr):
    """Block i of B of the n elements behind p; beyond them 0."""
    if (i + 1) * B <= n:
        return tl.load(p + (i * B + o))
    else:
        return tl.load(p + (i * B + o), mask=i * B + o < n, other=0)


@triton.jit
def _prefetch(p):
    """Have the lines at p brought into the L2 cache; nothing waits for them."""
    if IN_ASSEMBLY:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l", [p.to(tl.int64, bitcast=True)], dtype=tl.int32, is_pure=False, pack=1,
        )


@triton.jit
def _end(b_z, b_up, residual, b_residual, ACTIVATION: tl.constexpr, softcap: tl.constexpr):
    """What follows the product, and of swiglu the other one."""
    if ACTIVATION == "relu2":
        b_z = relu2(b_z)
    elif ACTIVATION == "silu":
        b_z = silu(b_z)
    elif ACTIVATION == "swiglu":
        b_z = silu(b_z) * b_up
    if residual is not None:
        b_z += upcast(b_residual)
    if softcap is not None:  # tanh of what is not negative, by what cannot overflow
        b_e = tl.exp(-2.0 / softcap * tl.abs(b_z))
        b_t = softcap * (1.0 - b_e) / (1.0 + b_e)
        b_z = tl.where(b_z < 0, -b_t, b_t)
    return b_z


@triton.jit
def _linear_sum_kernel(
    x, weight, scales, gain, residual, y, stride_x, stride_r, F,
    N: tl.constexpr, C: tl.constexpr, eps: tl.constexpr, ACTIVATION: tl.constexpr, softcap: tl.constexpr,
    BF: tl.constexpr, BC: tl.constexpr, R: tl.constexpr, AHEAD: tl.constexpr, OVERLAP: tl.constexpr,
):
    """F counts the values of a result; of swiglu, gate and up are two sets of tiles, one after the other."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    NC: tl.constexpr = (C + BC - 1) // BC
    T: tl.constexpr = 2 * R if ACTIVATION == "swiglu" else R
    XA: tl.constexpr = 8 // N  # tiles of x on their way
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    i_f = tl.program_id(0).to(tl.int64)
    o_b, o_c = tl.arange(0, BF), tl.arange(0, BC)[None, :]
    p_ws = ()
    for t in tl.static_range(T):
        o_f = tl.minimum((i_f * R + t % R) * BF + o_b, F - 1) + t // R * F
        p_ws += (weight + o_f[:, None] * C,)
    b_ws, b_xs, b_sums, b_squares = (), (), (), ()
    for i in tl.static_range(min(AHEAD, NC)):
        for t in tl.static_range(T):
            b_ws += (_load(p_ws[t], o_c, i, C, BC),)                                                    # [BF, BC]
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    p_x = x + tl.zeros([BF, 1], dtype=tl.int32)  # as wide as a tile of weights, so that every thread reads its own
    for i in tl.static_range(min(XA, NC)):
        for n in tl.static_range(N):
            b_xs += (_load(p_x + n * stride_x, o_c, i, C, BC),)                                         # [BF, BC]
    b_rs = ()
    for n in tl.static_range(N):  # asked for with x: at the end nothing would be left to wait with
        for r in tl.static_range(R):
            o_f = (i_f * R + r) * BF + o_b
            if residual is not None:
                b_rs += (tl.load(residual + n * stride_r + o_f, mask=o_f < F, other=0.0),)              # [BF]
            else:
                b_rs += (0.0,)
    for _ in tl.static_range(N):
        b_squares += (tl.zeros([BF, BC], dtype=ACC),)                                                   # [BF, BC]
        for _ in tl.static_range(T):
            b_sums += (tl.zeros([BF, BC], dtype=ACC),)                                                  # [BF, BC]
    for i in tl.static_range(NC):
        if gain is not None:
            b_g = upcast(_load(gain + tl.zeros([BF, 1], dtype=tl.int32), o_c, i, C, BC))                # [BF, BC]
        b_vs, more_squares, more_sums = (), (), ()
        for t in tl.static_range(T):
            b_vs += (_values(b_ws[i * T + t]),)
        for n in tl.static_range(N):
            b_x = _values(b_xs[i * N + n])
            more_squares += (b_squares[n] + b_x * b_x,)
            if gain is not None:
                b_x *= b_g
            for t in tl.static_range(T):
                more_sums += (b_sums[n * T + t] + b_vs[t] * b_x,)
        b_sums, b_squares = more_sums, more_squares
        if i + AHEAD < NC:
            for t in tl.static_range(T):
                b_ws += (_load(p_ws[t], o_c, i + AHEAD, C, BC),)
        if i + XA < NC:
            for n in tl.static_range(N):
                b_xs += (_load(p_x + n * stride_x, o_c, i + XA, C, BC),)
    for n in tl.static_range(N):
        b_r = 1.0
        if eps is not None:
            b_r = tl.rsqrt(tl.sum(b_squares[n], 1) / C + eps)                                           # [BF]
        for r in tl.static_range(R):
            o_f = (i_f * R + r) * BF + o_b
            m = o_f < F
            b_z = tl.sum(b_sums[n * T + r], 1) * b_r                                                    # [BF]
            b_up = b_z
            if ACTIVATION == "swiglu":
                b_up = tl.sum(b_sums[n * T + R + r], 1) * b_r                                           # [BF]
            if scales is not None:
                b_z *= tl.load(scales + o_f, mask=m, other=0.0).to(ACC)
                b_up *= tl.load(scales + o_f + (T // R - 1) * F, mask=m, other=0.0).to(ACC)
            b_y = _end(b_z, b_up, residual, b_rs[n * R + r], ACTIVATION, softcap)
            tl.store(y + n * F + o_f, b_y.to(y.dtype.element_ty), mask=m)


@triton.jit
def _linear_sum_int4_kernel(
    x, weight, scales, gain, residual, y, stride_x, stride_r, F,
    N: tl.constexpr, C: tl.constexpr, P: tl.constexpr, eps: tl.constexpr, ACTIVATION: tl.constexpr, softcap: tl.constexpr,
    BF: tl.constexpr, BC: tl.constexpr, R: tl.constexpr, AHEAD: tl.constexpr, OVERLAP: tl.constexpr,
):
    """Groups of P words; nibble j of word w is column (w // P) · 8P + j · P + w % P."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    G: tl.constexpr = (C + 8 * P - 1) // (8 * P)  # groups of a row
    W: tl.constexpr = G * P
    NC: tl.constexpr = (W + BC - 1) // BC
    T: tl.constexpr = 2 * R if ACTIVATION == "swiglu" else R
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    i_f = tl.program_id(0).to(tl.int64)
    o_b, o_w = tl.arange(0, BF), tl.arange(0, BC)[None, :]
    o_g = o_w // P
    o_c = o_g * (8 * P) + o_w % P
    p_ws, p_ss = (), ()
    for t in tl.static_range(T):
        o_f = (tl.minimum((i_f * R + t % R) * BF + o_b, F - 1) + t // R * F)[:, None]
        p_ws += (weight + o_f * W,)
        p_ss += (scales + o_f * G,)
    b_ws, b_ss, b_sums, b_squares = (), (), (), ()
    for i in tl.static_range(min(AHEAD, NC)):
        for t in tl.static_range(T):
            b_ws += (_load(p_ws[t], o_w, i, W, BC),)                                                    # [BF, BC]
            b_ss += (_scale(p_ss[t] + tl.minimum(i * BC // P + o_g, G - 1)),)                           # [BF, BC]
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    p_x = x + tl.zeros([BF, 1], dtype=tl.int32)
    b_rs = ()
    for n in tl.static_range(N):  # asked for with x: at the end nothing would be left to wait with
        for r in tl.static_range(R):
            o_f = (i_f * R + r) * BF + o_b
            if residual is not None:
                b_rs += (tl.load(residual + n * stride_r + o_f, mask=o_f < F, other=0.0),)              # [BF]
            else:
                b_rs += (0.0,)
    for _ in tl.static_range(N):
        b_squares += (tl.zeros([BF, BC], dtype=ACC),)                                                   # [BF, BC]
        for _ in tl.static_range(T):
            b_sums += (tl.zeros([BF, BC], dtype=ACC),)                                                  # [BF, BC]
    for i in tl.static_range(NC):
        b_parts = ()
        for _ in tl.static_range(N * T):
            b_parts += (tl.zeros([BF, BC], dtype=ACC),)                                                 # [BF, BC]
        for j in tl.static_range(8):
            o_x = i * 8 * BC + j * P + o_c
            b_vs, more_squares, more_parts = (), (), ()
            for t in tl.static_range(T):
                b_vs += (_nibble(b_ws[i * T + t], j),)
            if gain is not None:
                b_g = upcast(tl.load(gain + tl.zeros([BF, 1], dtype=tl.int32) + o_x, mask=o_x < C, other=0.0))
            for n in tl.static_range(N):
                if (i + 1) * 8 * BC <= C:
                    b_x = _values(tl.load(p_x + n * stride_x + o_x))                                    # [BF, BC]
                else:
                    b_x = _values(tl.load(p_x + n * stride_x + o_x, mask=o_x < C, other=0.0))
                more_squares += (b_squares[n] + b_x * b_x,)
                if gain is not None:
                    b_x *= b_g
                for t in tl.static_range(T):
                    more_parts += (b_parts[n * T + t] + b_vs[t] * b_x,)
            b_parts, b_squares = more_parts, more_squares
        more_sums = ()
        for k in tl.static_range(N * T):
            more_sums += (b_sums[k] + b_parts[k] * b_ss[i * T + k % T],)
        b_sums = more_sums
        if i + AHEAD < NC:
            for t in tl.static_range(T):
                b_ws += (_load(p_ws[t], o_w, i + AHEAD, W, BC),)
                b_ss += (_scale(p_ss[t] + tl.minimum((i + AHEAD) * BC // P + o_g, G - 1)),)
    for n in tl.static_range(N):
        b_r = 1.0
        if eps is not None:
            b_r = tl.rsqrt(tl.sum(b_squares[n], 1) / C + eps)                                           # [BF]
        for r in tl.static_range(R):
            o_f = (i_f * R + r) * BF + o_b
            m = o_f < F
            b_z, b_up = tl.sum(b_sums[n * T + r], 1) * b_r, tl.sum(b_sums[n * T + T - R + r], 1) * b_r  # [BF]
            b_y = _end(b_z, b_up, residual, b_rs[n * R + r], ACTIVATION, softcap)
            tl.store(y + n * F + o_f, b_y.to(y.dtype.element_ty), mask=m)


@triton.jit
def _part(weight, o_r, o_c, b_x, C: tl.constexpr, BC: tl.constexpr):
    """Values of rows o_r and columns o_c of W, in the dtype of x; the scale of a row comes last."""
    p = weight + o_r[:, None] * C + o_c[None, :]
    b_w = tl.load(p) if C % BC == 0 else tl.load(p, mask=(o_c < C)[None, :], other=0)                   # [BF, BC]
    return _values(b_w).to(b_x.dtype)


@triton.jit(do_not_specialize=["N"])
def _linear_dot_kernel(
    x, weight, scales, gain, residual, y, stride_x, stride_r, N, F,
    C: tl.constexpr, P: tl.constexpr, eps: tl.constexpr, ACTIVATION: tl.constexpr, softcap: tl.constexpr,
    BN: tl.constexpr, BF: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr, FETCH: tl.constexpr, OVERLAP: tl.constexpr,
):
    """Codes, on the left: their rows fill a tensor core's tile however few x has. FETCH lines of them are asked for ahead."""
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    WIDTH: tl.constexpr = C if P is None else (C + 8 * P - 1) // (8 * P) * P  # values or words of a row of W
    LINE: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    i_f = tl.program_id(0).to(tl.int64)
    o_f, o_n = i_f * BF + tl.arange(0, BF), tl.arange(0, BN)
    o_r, o_x = tl.minimum(o_f, F - 1), tl.minimum(o_n, N - 1)[:, None] * stride_x
    if OVERLAP:
        _prefetch(weight + tl.minimum(i_f * BF * WIDTH + tl.arange(0, FETCH) * LINE, F * WIDTH - 1))
        if GATED:
            _prefetch(weight + F * WIDTH + tl.minimum(i_f * BF * WIDTH + tl.arange(0, FETCH) * LINE, F * WIDTH - 1))
        tl.extra.cuda.gdc_wait()
    b_z = tl.zeros([BF, BN], dtype=tl.float32)                                                          # [BF, BN]
    b_up = tl.zeros([BF, BN], dtype=tl.float32)                                                         # [BF, BN]
    b_squares = tl.zeros([BN], dtype=tl.float32)                                                        # [BN]
    if P is None:
        for i_c in tl.range(0, C, BC, num_stages=STAGES):
            o_c = i_c + tl.arange(0, BC)
            m_c = (o_c < C)[None, :]
            p_x = x + o_x + o_c[None, :]
            b_x = tl.load(p_x) if C % BC == 0 else tl.load(p_x, mask=m_c, other=0.0)                    # [BN, BC]
            b_v = _part(weight, o_r, o_c, b_x, C, BC)                                                   # [BF, BC]
            if eps is not None:
                b_squares += tl.sum(_values(b_x) * _values(b_x), 1)
            if gain is not None:
                b_g = tl.load(gain + o_c[None, :], mask=m_c, other=0.0)                                 # [1, BC]
                b_x = (_values(b_x) * upcast(b_g)).to(b_x.dtype)
            b_z = tl.dot(b_v, b_x.T, b_z)
            if GATED:
                b_v = _part(weight, o_r + F, o_c, b_x, C, BC)                                           # [BF, BC]
                b_up = tl.dot(b_v, b_x.T, b_up)
        b_z *= upcast(tl.load(scales + o_r))[:, None]
        if GATED:
            b_up *= upcast(tl.load(scales + o_r + F))[:, None]
    else:
        for i_w in tl.range(0, WIDTH, BC, num_stages=STAGES):
            o_w = i_w + tl.arange(0, BC)
            m_w = (o_w < WIDTH)[None, :]
            o_g = tl.minimum(o_w // P, WIDTH // P - 1)[None, :]
            b_w = tl.load(weight + o_r[:, None] * WIDTH + o_w[None, :], mask=m_w, other=0)              # [BF, BC]
            b_s = _scale(scales + o_r[:, None] * (WIDTH // P) + o_g)                                    # [BF, BC]
            if GATED:
                b_w2 = tl.load(weight + (o_r + F)[:, None] * WIDTH + o_w[None, :], mask=m_w, other=0)   # [BF, BC]
                b_s2 = _scale(scales + (o_r + F)[:, None] * (WIDTH // P) + o_g)                         # [BF, BC]
            for j in tl.static_range(8):
                o_c = o_w // P * (8 * P) + j * P + o_w % P
                m_c = (o_c < C)[None, :]
                b_x = tl.load(x + o_x + o_c[None, :], mask=m_c, other=0.0)                              # [BN, BC]
                if eps is not None:
                    b_squares += tl.sum(_values(b_x) * _values(b_x), 1)
                if gain is not None:
                    b_g = tl.load(gain + o_c[None, :], mask=m_c, other=0.0)                             # [1, BC]
                    b_x = (_values(b_x) * upcast(b_g)).to(b_x.dtype)
                b_v = (_nibble(b_w, j) * b_s).to(b_x.dtype)                                             # [BF, BC]
                b_z = tl.dot(b_v, b_x.T, b_z)
                if GATED:
                    b_v = (_nibble(b_w2, j) * b_s2).to(b_x.dtype)                                       # [BF, BC]
                    b_up = tl.dot(b_v, b_x.T, b_up)
    if eps is not None:
        b_r = tl.rsqrt(b_squares / C + eps)[None, :]                                                    # [1, BN]
        b_z, b_up = b_z * b_r, b_up * b_r
    m = (o_f < F)[:, None] & (o_n < N)[None, :]
    b_residual = 0.0
    if residual is not None:
        b_residual = tl.load(residual + o_n[None, :] * stride_r + o_f[:, None], mask=m, other=0.0)      # [BF, BN]
    b_y = _end(b_z, b_up, residual, b_residual, ACTIVATION, softcap)
    tl.store(y + o_n[None, :] * F + o_f[:, None], b_y.to(y.dtype.element_ty), mask=m)


@triton.jit
def _load3(p, o_c, i: tl.constexpr, C: tl.constexpr, B: tl.constexpr):
    """As _load, of three dimensions."""
    if (i + 1) * B <= C:
        return tl.load(p + (i * B + o_c))
    else:
        return tl.load(p + (i * B + o_c), mask=i * B + o_c < C, other=0)

@triton.jit(do_not_specialize=["N"])
def _linear_rows_kernel(
    x, weight, gain, residual, y, stride_x, stride_r, N, F,
    C: tl.constexpr, eps: tl.constexpr, ACTIVATION: tl.constexpr, softcap: tl.constexpr,
    S: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr, BC: tl.constexpr, AHEAD: tl.constexpr, XAHEAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A program takes BF rows of W, in half precision; of S · BC columns each of its S warps takes BC."""
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    T: tl.constexpr = 2 if GATED else 1
    NC: tl.constexpr = (C + S * BC - 1) // (S * BC)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    i_f = tl.program_id(0).to(tl.int64)
    o_f, o_n = i_f * BF + tl.arange(0, BF), tl.arange(0, BN)
    o_c = tl.arange(0, S)[:, None, None] * BC + tl.arange(0, BC)[None, None, :]                         # [S, 1, BC]
    p_w = weight + tl.minimum(o_f, F - 1)[None, :, None] * C                                            # [1, BF, 1]
    b_ws = ()
    for i in tl.static_range(min(AHEAD, NC)):
        for t in tl.static_range(T):
            b_ws += (_load3(p_w + t * F * C, o_c, i, C, S * BC),)                                       # [S, BF, BC]
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    p_x = x + tl.minimum(o_n, N - 1)[None, :, None] * stride_x                                          # [1, BN, 1]
    b_xs = ()
    for i in tl.static_range(min(XAHEAD, NC)):
        b_xs += (_load3(p_x, o_c, i, C, S * BC),)                                                       # [S, BN, BC]
    m = (o_f < F)[:, None] & (o_n < N)[None, :]
    b_residual = 0.0
    if residual is not None:
        b_residual = tl.load(residual + o_n[None, :] * stride_r + o_f[:, None], mask=m, other=0.0)      # [BF, BN]
    b_squares = tl.zeros([S, BN], dtype=tl.float32)                                                     # [S, BN]
    b_z = tl.zeros([S, BF, BN], dtype=tl.float32)                                                       # [S, BF, BN]
    b_up = tl.zeros([S, BF, BN], dtype=tl.float32)                                                      # [S, BF, BN]
    for i in tl.static_range(NC):
        b_x = b_xs[i]
        if eps is not None:
            b_squares += tl.sum(_values(b_x) * _values(b_x), 2)
        if gain is not None:
            b_g = _load3(gain + tl.zeros([1, 1, 1], dtype=tl.int32), o_c, i, C, S * BC)
            b_x = (_values(b_x) * upcast(b_g)).to(b_x.dtype)
        b_x = tl.trans(b_x, (0, 2, 1))                                                                  # [S, BC, BN]
        b_z = tl.dot(b_ws[i * T], b_x, b_z)
        if GATED:
            b_up = tl.dot(b_ws[i * T + 1], b_x, b_up)
        if i + AHEAD < NC:
            for t in tl.static_range(T):
                b_ws += (_load3(p_w + t * F * C, o_c, i + AHEAD, C, S * BC),)
        if i + XAHEAD < NC:
            b_xs += (_load3(p_x, o_c, i + XAHEAD, C, S * BC),)
    b_all, b_all_up = tl.sum(b_z, 0), tl.sum(b_up, 0)                                                   # [BF, BN]
    if eps is not None:
        b_r = tl.rsqrt(tl.sum(b_squares, 0) / C + eps)[None, :]                                         # [1, BN]
        b_all, b_all_up = b_all * b_r, b_all_up * b_r
    b_y = _end(b_all, b_all_up, residual, b_residual, ACTIVATION, softcap)
    tl.store(y + o_n[None, :] * F + o_f[:, None], b_y.to(y.dtype.element_ty), mask=m)


@triton.jit
def _finish_kernel(
    z, residual, y, stride_r, n, F: tl.constexpr, ACTIVATION: tl.constexpr, softcap: tl.constexpr, BT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """What follows a product that somebody else did: z [N, F], or [N, 2F] of swiglu, → y [N, F], n values."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    o = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m = o < n
    T: tl.constexpr = 2 if ACTIVATION == "swiglu" else 1
    p_z = z + o // F * (T * F) + o % F
    b_z = upcast(tl.load(p_z, mask=m, other=0.0))                                                       # [BT]
    b_up, b_residual = b_z, 0.0
    if ACTIVATION == "swiglu":
        b_up = upcast(tl.load(p_z + F, mask=m, other=0.0))                                              # [BT]
    if residual is not None:
        b_residual = tl.load(residual + o // F * stride_r + o % F, mask=m, other=0.0)                   # [BT]
    b_y = _end(b_z, b_up, residual, b_residual, ACTIVATION, softcap)
    tl.store(y + o, b_y.to(y.dtype.element_ty), mask=m)


@triton.jit
def _dequantise_kernel(
    codes, scales, w,
    C: tl.constexpr, P: tl.constexpr, BC: tl.constexpr,
):
    """A row of W [F, C], computed in fp64 for fp64."""
    ACC: tl.constexpr = tl.float64 if w.dtype.element_ty == tl.float64 else tl.float32
    i_f = tl.program_id(0).to(tl.int64)
    for i in range(0, C, BC):
        o_c = i + tl.arange(0, BC)
        m = o_c < C
        if P is None:
            b_w = _values(tl.load(codes + i_f * C + o_c, mask=m, other=0)).to(ACC)                      # [BC]
            b_w *= tl.load(scales + i_f).to(ACC)
        else:
            G: tl.constexpr = (C + 8 * P - 1) // (8 * P)
            o_g, o_j = o_c // (8 * P), o_c % (8 * P)
            b_word = tl.load(codes + i_f * G * P + o_g * P + o_j % P, mask=m, other=0)                  # [BC]
            b_w = (((b_word >> (4 * (o_j // P))) & 15) - 8).to(ACC)                                     # [BC]
            b_w *= tl.load(scales + i_f * G + o_g, mask=m, other=0.0).to(ACC)
        tl.store(w + i_f * C + o_c, b_w.to(w.dtype.element_ty), mask=m)


def _dequantise(codes: Tensor, scales: Tensor, C: int, dtype: torch.dtype) -> Tensor:
    """Contiguous codes and scales → W [F, C]."""
    F = codes.shape[0]
    w = torch.empty((F, C), dtype=dtype, device=codes.device)
    if F > 0:
        P = group_of(codes, scales) // 8 if codes.dtype == torch.int32 else None
        BC = min(1024, next_power_of_two(C))
        launch(_dequantise_kernel, (F,), codes=as_bytes(codes), scales=scales, w=w, C=C, P=P, BC=BC)
    return w


def as_bytes(codes: Tensor) -> Tensor:
    """fp8 as its bits: not every GPU has instructions for it."""
    return codes.view(torch.uint8) if codes.dtype == torch.float8_e4m3fn else codes


def _linear_few(
    x: Tensor, weight: Tensor, scales: Tensor | None, norm_weight: Tensor | None, eps: float | None, activation: str | None,
    residual: Tensor | None, softcap: float | None, y: Tensor,
) -> None:
    """Fill y [N, F] for few rows of x [N, C]."""
    (N, C), F = x.shape, y.shape[1]
    P = group_of(weight, scales) // 8 if weight.dtype == torch.int32 else None
    overlap, gated = can_overlap(x.device), activation == "swiglu"
    shared = dict(
        x=x, weight=as_bytes(weight), gain=norm_weight, residual=residual, y=y, stride_x=x.stride(0),
        stride_r=0 if residual is None else residual.stride(0), N=N, F=F, C=C, eps=eps, ACTIVATION=activation,
        softcap=softcap, OVERLAP=overlap, launch_pdl=overlap,
    )
    if N <= MOST_SUMMED:
        tile = sum_tile(weight.shape[0], C, N, weight.dtype, gated)
        kernel, words = (_linear_sum_kernel, {}) if P is None else (_linear_sum_int4_kernel, dict(P=P))
        launch(
            kernel, (ceil_div(F, tile.BF * tile.R),), **shared, **words, scales=scales, BF=tile.BF, BC=tile.BC, R=tile.R,
            AHEAD=tile.ahead, num_warps=tile.warps,
        )
    elif scales is None:
        tile = rows_tile(N, C, weight.shape[0], gated)
        launch(
            _linear_rows_kernel, (ceil_div(F, tile.BF),), **shared, S=tile.warps, BN=max(8, next_power_of_two(N)), BF=tile.BF,
            BC=tile.BC, AHEAD=tile.ahead, XAHEAD=tile.x_ahead, num_warps=tile.warps,
        )
    else:
        tile = dot_tile(weight.dtype, gated)
        line = min(1024, next_power_of_two(ceil_div(tile.BF * weight.shape[1] * weight.element_size(), 128)))
        launch(
            _linear_dot_kernel, (ceil_div(F, tile.BF),), **shared, scales=scales, P=P, BN=max(16, next_power_of_two(N)),
            BF=tile.BF, BC=tile.BC, STAGES=tile.stages, FETCH=line, num_warps=tile.warps,
        )


def _linear_many(
    x: Tensor, weight: Tensor, scales: Tensor | None, norm_weight: Tensor | None, eps: float | None, activation: str | None,
    residual: Tensor | None, softcap: float | None, y: Tensor,
) -> None:
    """Fill y [N, F] for more rows, as of a prompt: the product is cuBLAS's."""
    if eps is not None:
        x = rmsnorm(x, norm_weight, eps=eps)
    z = F.linear(x, weight if scales is None else _dequantise(weight, scales, x.shape[1], x.dtype))
    overlap = can_overlap(x.device)
    launch(
        _finish_kernel, (ceil_div(y.numel(), FINISHED),), z=z, residual=residual, y=y,
        stride_r=0 if residual is None else residual.stride(0), n=y.numel(), F=y.shape[1], ACTIVATION=activation,
        softcap=softcap, BT=FINISHED, OVERLAP=overlap, launch_pdl=overlap,
    )


def are_few(x: Tensor, weight: Tensor, scales: Tensor | None, activation: str | None) -> bool:
    """Whether the kernels here take rows x [N, C]."""
    N, C = x.shape
    if N <= MOST_SUMMED:
        return True
    if x.element_size() > 2:
        return False
    if scales is not None:
        return N <= MOST_CODED
    # Up to 112 KiB of shared memory, which other GPUs may not have.
    return (INTERPRETED or is_hopper(x.device)) and rows_tile(N, C, weight.shape[0], activation == "swiglu") is not None


def linear_decode(
    x: Tensor, weight: Tensor, scales: Tensor | None = None, *, norm_weight: Tensor | None = None, eps: float | None = None,
    activation: str | None = None, residual: Tensor | None = None, softcap: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """kernels_torch.linear_decode, at the speed at which the weight can be read. A weight that is not contiguous is
    copied first."""
    check_linear_decode(x, weight, scales, norm_weight, eps, activation, residual, softcap, out_dtype)
    check_gpu(x=x)
    with torch.no_grad():
        weight, scales = weight.contiguous(), None if scales is None else scales.contiguous()
        norm_weight = None if norm_weight is None else norm_weight.contiguous()
        F = weight.shape[0] // 2 if activation == "swiglu" else weight.shape[0]
        shape, dtype = (*x.shape[:-1], F), x.dtype if out_dtype is None else out_dtype
        x = rows_of(x)
        residual = None if residual is None else rows_of(residual) if F > 0 else residual.new_empty(x.shape[0], 0)
        y = torch.empty((x.shape[0], F), dtype=dtype, device=x.device)
        if y.numel() > 0:
            fill = _linear_few if are_few(x, weight, scales, activation) else _linear_many
            fill(x, weight, scales, norm_weight, eps, activation, residual, softcap, y)
        return y.view(shape)


def rows_of(x: Tensor) -> Tensor:
    """[..., D] as [N, D], copied when the values of a row do not lie side by side."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()
