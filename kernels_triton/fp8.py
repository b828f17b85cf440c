"""kernels_torch.fp8 with as few passes over memory as it takes. For the arithmetic and its bounds see there.

How often a value of each tensor moves through memory, in bytes, beside what the products read and write themselves:

    x after a norm             2 read, values and transpose written                      4
    x of elsewhere, dy         2 read to measure, then the same                          6
    relu² and its gradient     rounded where they are made (fp8_matmul.py), both ways    0
                               or by passes after cuBLAS, which turn relu² once more     5 and 8

Measuring takes the largest value and the largest row norm as the bits of non-negative floats, whose order is that of
integers, by integer atomics: exact whatever the order, and NaN, whose bits are above all others, is not lost.

A pass that turns a tile has its rows 4i, 4i + 1, 4i + 2 and 4i + 3 in four registers. The four bytes of a column are put
together to one word before the tile is turned: so the transposition goes by words and its rows are stored in words. Where
values are rounded, a word is made from four fp32 numbers and not from the bytes that are stored: ptxas 12.8 loses bytes
that are taken out of what it converts and stores in pairs.

Weights are measured and rounded all in two launches, by a table of their addresses (tables.py).
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kernels_torch.fp8 import E4M3, E5M2, TOP, Fp8, as_rows, check_linear, empty_weight, product
from kernels_triton.autograd import differentiable_once

from kernels_triton.fp8_matmul import (  # isort: skip
    bits_of, fuses_fp8, gradient_bound, matmul_relu2_fp8, matmul_relu2_grad_fp8, note, unit_of,
)
from kernels_triton.launch import INTERPRETED, Tile, ceil_div, check_gpu, launch, n_processors, next_power_of_two
from kernels_triton.primitives import relu2, relu2_grad
from kernels_triton.rows import values_side_by_side
from kernels_triton.tables import table_of

__all__ = ["Fp8", "empty_weight", "fp8_linear", "fp8_relu2_mlp", "fp8_weights"]

# Warps, values at a time, programs a processor. H200, bf16, 65536 × 768 and 32768 × 1280 with the zeros before: 39 and 35 µs,
# where reading takes 24 and 20; (4, 2048, 16) 42 and 37, (2, 4096, 16) 40 and 35, (4, 4096, 8) 46 and 42, (8, 4096, 8) 62 and 42.
MEASURE, MEASURE_VALUES, STAY = 4, 4096, 16
# BT: words of four rows. H200, bf16, 65536 × 768: 56 µs (a copy of as many bytes 52); (32, 64, 4) 58, (32, 128, 8) 57.
# 32768 × 1280: 49 (43). Turning 65536 × 3072 bytes: 114 µs, 32768 × 5120: 95; (32, 128, 4) 112 and 94.
PASS = Tile(BT=16, BD=128, warps=4)
BLOCK, WARPS = 2048, 4  # values at a time where nothing is turned


@triton.jit
def _word(b_0, b_1, b_2, b_3, dtype: tl.constexpr, ASM: tl.constexpr):
    """Four fp32 numbers as 8-bit ones in a word, the first in its lowest byte. The interpreter knows no assembly."""
    if not ASM:
        b_01 = _byte(b_0.to(dtype), 0) | _byte(b_1.to(dtype), 1)
        b_word = b_01 | _byte(b_2.to(dtype), 2) | _byte(b_3.to(dtype), 3)
    elif dtype == tl.float8e4nv:
        b_word = tl.inline_asm_elementwise(
            """{
            .reg .b16 low, high;
            cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
            cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
            mov.b32 $0, {low, high};
            }""",
            "=r,r,r,r,r", [b_0, b_1, b_2, b_3], dtype=tl.int32, is_pure=True, pack=1,
        )
    else:
        b_word = tl.inline_asm_elementwise(
            """{
            .reg .b16 low, high;
            cvt.rn.satfinite.e5m2x2.f32 low, $2, $1;
            cvt.rn.satfinite.e5m2x2.f32 high, $4, $3;
            mov.b32 $0, {low, high};
            }""",
            "=r,r,r,r,r", [b_0, b_1, b_2, b_3], dtype=tl.int32, is_pure=True, pack=1,
        )
    return b_word


@triton.jit
def _byte(b_q, j: tl.constexpr):
    """8-bit numbers as byte j of words."""
    return b_q.to(tl.uint8, bitcast=True).to(tl.int32) << (8 * j)


@triton.jit
def _measure_rows(x, peaks, i_first, n_step, stride_x, N, D, BT: tl.constexpr, BD: tl.constexpr):
    """peaks [2]: bits of the largest value and of the largest sum of squares of a row, of tiles i_first, i_first + n_step, …"""
    o_d = tl.arange(0, BD)
    b_largest = tl.zeros([BT], dtype=tl.int32)                                                          # [BT]
    b_rows = tl.zeros([BT], dtype=tl.int32)                                                             # [BT]
    for i_t in range(i_first, tl.cdiv(N, BT), n_step):
        o_t = i_t * BT + tl.arange(0, BT).to(tl.int64)
        b_squares = tl.zeros([BT], dtype=tl.float32)                                                    # [BT]
        for i_d in range(0, D, BD):
            m = (o_t < N)[:, None] & (i_d + o_d < D)[None, :]
            b_x = tl.load(x + o_t[:, None] * stride_x + (i_d + o_d)[None, :], mask=m, other=0.0).to(tl.float32)
            b_largest = tl.maximum(b_largest, tl.max(bits_of(b_x), 1))
            b_squares += tl.sum(b_x * b_x, 1)
        b_rows = tl.maximum(b_rows, bits_of(b_squares))
    tl.atomic_max(peaks, tl.max(b_largest, 0), sem="relaxed")
    tl.atomic_max(peaks + 1, tl.max(b_rows, 0), sem="relaxed")


@triton.jit
def _norm_of(peaks, D):
    """The largest row norm; squares of tiny values are zero, so for those by the largest value."""
    b_largest = tl.load(peaks).to(tl.float32, bitcast=True)
    b_norm = tl.sqrt_rn(tl.load(peaks + 1).to(tl.float32, bitcast=True))
    return tl.where(b_largest < 1e-15, b_largest * tl.sqrt_rn(D.to(tl.float32)), b_norm)


@triton.jit
def _measure_kernel(x, peaks, stride_x, N, D, BT: tl.constexpr, BD: tl.constexpr):
    _measure_rows(x, peaks, tl.program_id(0), tl.num_programs(0), stride_x, N, D, BT, BD)


@triton.jit
def _quantize_rows(x, values, scale, stride_x, stride_values, o_t, o_d, m):
    """Rows o_t of a tile, stored, and in units [BT, BD]; NaN for what is not finite: conversion would make it the largest."""
    b_x = tl.load(x + o_t[:, None] * stride_x + o_d[None, :], mask=m, other=0.0).to(tl.float32)         # [BT, BD]
    b_x = tl.where(tl.abs(b_x) < float("inf"), b_x * scale, float("nan"))
    tl.store(values + o_t[:, None] * stride_values + o_d[None, :], b_x.to(values.dtype.element_ty), mask=m)
    return b_x


@triton.jit
def _quantize_tile(
    x, values, turned, scale, stride_x, stride_values, stride_turned, i_t, i_d, W, D,
    ASM: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):
    """4 BT rows and BD columns of a matrix of W rows of words; turned and its stride as words, too.

    Masks by words, whose number the compiler knows to be round where it is: it stores four at once.
    """
    o_w, o_d = i_t * BT + tl.arange(0, BT), i_d * BD + tl.arange(0, BD)
    m_w, m_d = o_w < W, o_d < D
    m = m_w[:, None] & m_d[None, :]
    b_0 = _quantize_rows(x, values, scale, stride_x, stride_values, 4 * o_w, o_d, m)                    # [BT, BD]
    b_1 = _quantize_rows(x, values, scale, stride_x, stride_values, 4 * o_w + 1, o_d, m)                # [BT, BD]
    b_2 = _quantize_rows(x, values, scale, stride_x, stride_values, 4 * o_w + 2, o_d, m)                # [BT, BD]
    b_3 = _quantize_rows(x, values, scale, stride_x, stride_values, 4 * o_w + 3, o_d, m)                # [BT, BD]
    if turned is not None:
        b_words = _word(b_0, b_1, b_2, b_3, values.dtype.element_ty, ASM)                               # [BT, BD]
        p_turned = turned + o_d[:, None].to(tl.int64) * stride_turned + o_w[None, :]
        tl.store(p_turned, tl.trans(b_words), mask=m_w[None, :] & m_d[:, None])


@triton.jit
def _quantize_kernel(
    x, values, turned, facts, peaks, stride_x, stride_values, stride_turned, W, D, width,
    UNIT: tl.constexpr, NORM: tl.constexpr, TOP: tl.constexpr, ASM: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):
    """facts [2] as well: from what was measured of rows of `width` values, or as given."""
    n_d = tl.cdiv(D, BD)
    i_t, i_d = tl.program_id(0).to(tl.int64) // n_d, tl.program_id(0) % n_d
    if peaks is not None:
        unit, norm = unit_of(tl.load(peaks), TOP), _norm_of(peaks, width)
    else:
        unit, norm = tl.full([], UNIT, tl.float32), tl.full([], NORM, tl.float32)
    _quantize_tile(x, values, turned, 1.0 / unit, stride_x, stride_values, stride_turned, i_t, i_d, W, D, ASM, BT, BD)
    if facts is not None:
        note(facts, unit, norm)


@triton.jit
def _turn_kernel(x, turned, W, D, BT: tl.constexpr, BD: tl.constexpr):
    """Bytes x [4 W, D] → words [D, W]."""
    n_d = tl.cdiv(D, BD)
    i_t, i_d = tl.program_id(0).to(tl.int64) // n_d, tl.program_id(0) % n_d
    o_w, o_d = i_t * BT + tl.arange(0, BT), i_d * BD + tl.arange(0, BD)
    m_w, m_d = o_w < W, o_d < D
    m = m_w[:, None] & m_d[None, :]
    b_words = tl.zeros([BT, BD], dtype=tl.int32)                                                        # [BT, BD]
    for j in tl.static_range(4):
        b_x = tl.load(x + (4 * o_w + j)[:, None] * D + o_d[None, :], mask=m, other=0)                   # [BT, BD]
        b_words |= b_x.to(tl.int32) << (8 * j)
    p_turned = turned + o_d[:, None].to(tl.int64) * W + o_w[None, :]
    tl.store(p_turned, tl.trans(b_words), mask=m_w[None, :] & m_d[:, None])


@triton.jit
def _relu2_kernel(z, a, facts, x_facts, up_facts, n, TOP: tl.constexpr, BLOCK: tl.constexpr):
    """a = relu(z)². facts [2]: the unit of a, and the bound of z."""
    bound = tl.load(x_facts + 1) * tl.load(up_facts + 1)
    unit = unit_of(bits_of(bound * bound), TOP)
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_a = relu2(tl.load(z + o, mask=o < n, other=0.0).to(tl.float32))                                   # [BLOCK]
    tl.store(a + o, (b_a * (1.0 / unit)).to(a.dtype.element_ty), mask=o < n)
    note(facts, unit, bound)


@triton.jit
def _relu2_grad_kernel(
    dh, a, dz, facts, a_facts, dy_facts, down_facts, n, D, TOP: tl.constexpr, DOWN_TOP: tl.constexpr, BLOCK: tl.constexpr,
):
    """dz = 2 √a dh. facts [2]: the unit of dz, and its bound."""
    bound = gradient_bound(a_facts, dy_facts, down_facts, D, DOWN_TOP)
    unit = unit_of(bits_of(bound), TOP)
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_dh = tl.load(dh + o, mask=o < n, other=0.0).to(tl.float32)                                        # [BLOCK]
    b_a = tl.load(a + o, mask=o < n, other=0.0).to(tl.float32) * tl.load(a_facts)                       # [BLOCK]
    tl.store(dz + o, (relu2_grad(b_dh, b_a) * (1.0 / unit)).to(dz.dtype.element_ty), mask=o < n)
    note(facts, unit, bound)


@triton.jit
def _row_of(table, n, COLUMN: tl.constexpr, BN: tl.constexpr):
    """The row of the weight that this program works on, by the column that says which program is each weight's first."""
    o_n = tl.arange(0, BN)
    b_first = tl.load(table + o_n * 11 + COLUMN, mask=o_n < n, other=2**62)                             # [BN]
    return table + (tl.sum((b_first <= tl.program_id(0)).to(tl.int32), 0) - 1) * 11


@triton.jit
def _measure_weights_kernel(table, x, peaks, n, BN: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """x and peaks give their types only."""
    row = _row_of(table, n, 9, BN)
    x, peaks = tl.load(row).to(x.dtype), tl.load(row + 3).to(peaks.dtype)
    N, D = tl.load(row + 5), tl.multiple_of(tl.load(row + 6), 16)
    i = tl.program_id(0) - tl.load(row + 9)
    _measure_rows(tl.multiple_of(x, 16), peaks, i, N, D, N, D, BT, BD)  # one tile: the step leads past the end


@triton.jit
def _quantize_weights_kernel(
    table, x, values, turned, peaks, facts, n,
    TOP: tl.constexpr, ASM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):
    """x, values, turned, peaks and facts give their types only."""
    row = _row_of(table, n, 10, BN)
    x, peaks, facts = tl.load(row).to(x.dtype), tl.load(row + 3).to(peaks.dtype), tl.load(row + 4).to(facts.dtype)
    values, turned = tl.load(row + 1).to(values.dtype), tl.load(row + 2).to(turned.dtype)
    x, values, turned = tl.multiple_of(x, 16), tl.multiple_of(values, 16), tl.multiple_of(turned, 16)
    W, stride_turned = tl.multiple_of(tl.load(row + 7), 4), tl.multiple_of(tl.load(row + 8), 4)
    D = tl.multiple_of(tl.load(row + 6), 16)
    i = tl.program_id(0) - tl.load(row + 10)
    i_t, i_d = i // tl.cdiv(D, BD), i % tl.cdiv(D, BD)
    unit, norm = unit_of(tl.load(peaks), TOP), _norm_of(peaks, D)
    _quantize_tile(x, values, turned, 1.0 / unit, D, D, stride_turned, i_t, i_d, W, D, ASM, BT, BD)
    if i == 0:  # matrices of a group write the same
        tl.store(facts, unit)
        tl.store(facts + 1, norm)


def _words(turned: Tensor | None) -> Tensor | None:
    return None if turned is None else turned.view(torch.int32)


def _empty_fp8(N: int, D: int, dtype: torch.dtype, device: torch.device, turned: bool) -> Fp8:
    values = torch.empty((N, D), dtype=dtype, device=device)
    across = torch.empty((D, N), dtype=dtype, device=device) if turned else None
    return Fp8(values, across, torch.empty(2, dtype=torch.float32, device=device))


def _measure_tile(D: int) -> tuple[int, int]:
    """Rows and columns at a time."""
    BD = min(next_power_of_two(D), 2048)
    return max(1, MEASURE_VALUES // BD), BD


def quantize(
    parts: Sequence[Tensor], dtype: torch.dtype, row_norm: float | None = None, turned: bool = True
) -> Fp8:
    """Matrices [N, D] side by side, in a unit that they share, with the largest row norm of one of them.

    row_norm   as in kernels_torch.fp8, for one alone
    """
    parts = [values_side_by_side(part) for part in parts]
    N, widths, device = parts[0].shape[0], [part.shape[1] for part in parts], parts[0].device
    q = _empty_fp8(N, sum(widths), dtype, device, turned)
    peaks = None if row_norm is not None else torch.zeros(2, dtype=torch.int32, device=device)
    if N == 0:
        q.facts.zero_()
        return q
    if peaks is not None:
        for part, D in zip(parts, widths):
            BT, BD = _measure_tile(D)
            programs = min(ceil_div(N, BT), STAY * n_processors(device))
            launch(
                _measure_kernel, (programs,), x=part, peaks=peaks, stride_x=part.stride(0), N=N, D=D, BT=BT, BD=BD,
                num_warps=MEASURE,
            )
    norm = None if row_norm is None else float(row_norm)
    unit = None if row_norm is None else 2.0 ** (math.frexp(norm)[1] - 1 - TOP[dtype])
    first = 0
    for part, D in zip(parts, widths):
        values, across = q.values[:, first:], _words(None if q.turned is None else q.turned[first:])
        grid = (ceil_div(N, 4 * PASS.BT) * ceil_div(D, PASS.BD),)
        launch(
            _quantize_kernel, grid, x=part, values=values, turned=across, facts=q.facts if first == 0 else None,
            peaks=peaks, stride_x=part.stride(0), stride_values=sum(widths), stride_turned=N // 4, W=N // 4, D=D,
            width=sum(widths), UNIT=unit, NORM=norm, TOP=TOP[dtype], ASM=not INTERPRETED, BT=PASS.BT, BD=PASS.BD,
            num_warps=PASS.warps,
        )
        first += D
    return q


def turn(values: Tensor) -> Tensor:
    """[N, D] in 8 bits → its transpose in one piece."""
    N, D = values.shape
    turned = torch.empty((D, N), dtype=values.dtype, device=values.device)
    if N > 0:
        launch(
            _turn_kernel, (ceil_div(N, 4 * PASS.BT) * ceil_div(D, PASS.BD),), x=values.view(torch.uint8),
            turned=_words(turned), W=N // 4, D=D, BT=PASS.BT, BD=PASS.BD, num_warps=PASS.warps,
        )
    return turned


def _relu2(q: Fp8, up: Tensor, up_facts: Tensor, dtype: torch.dtype, turned: bool = True) -> Fp8:
    """relu(x W_upᵀ)² [N, F] in e4m3; with it the bound of x W_upᵀ in the place of a norm."""
    if fuses_fp8(q.values, up):
        return Fp8(*matmul_relu2_fp8(q.values, up, q.facts, up_facts, turned))
    z = product(q.values, up, q.facts, up_facts, dtype, fast=True)
    a = _empty_fp8(*z.shape, E4M3, z.device, turned=False)
    if z.numel() > 0:
        launch(
            _relu2_kernel, (ceil_div(z.numel(), BLOCK),), z=z, a=a.values, facts=a.facts, x_facts=q.facts,
            up_facts=up_facts, n=z.numel(), TOP=TOP[E4M3], BLOCK=BLOCK, num_warps=WARPS,
        )
    return a._replace(turned=turn(a.values)) if turned else a


def _relu2_grad(
    d: Fp8, down_turned: Tensor, down_facts: Tensor, a_turned: Tensor, a_facts: Tensor, dtype: torch.dtype, turned: bool = True
) -> Fp8:
    """dz = 2 √a · (dy W_down) [N, F] in e5m2."""
    if fuses_fp8(d.values, down_turned):
        return Fp8(*matmul_relu2_grad_fp8(d.values, down_turned, a_turned, d.facts, down_facts, a_facts, turned))
    dh = product(d.values, down_turned, d.facts, down_facts, dtype, fast=False)
    dz = _empty_fp8(*dh.shape, E5M2, dh.device, turned=False)
    if dh.numel() > 0:
        launch(
            _relu2_grad_kernel, (ceil_div(dh.numel(), BLOCK),), dh=dh, a=turn(a_turned), dz=dz.values, facts=dz.facts, a_facts=a_facts,
            dy_facts=d.facts, down_facts=down_facts, n=dh.numel(), D=d.values.shape[1], TOP=TOP[E5M2],
            DOWN_TOP=2.0 ** TOP[E4M3], BLOCK=BLOCK, num_warps=WARPS,
        )
    return dz._replace(turned=turn(dz.values)) if turned else dz


def fp8_weights(sources: Sequence[Sequence[Tensor]], weights: Sequence[Fp8]) -> None:
    """kernels_torch.fp8.fp8_weights in two launches, for matrices of one dtype."""
    device, rows, measuring, rounding = weights[0].values.device, [], 0, 0
    peaks = [weight.facts[2:].view(torch.int32) for weight in weights]
    torch._foreach_zero_(peaks)
    widest = max(weight.values.shape[1] for weight in weights)
    BT, BD = _measure_tile(widest)
    for i, (matrices, weight) in enumerate(zip(sources, weights, strict=True)):
        first = 0
        for matrix in matrices:
            (N, D), total = matrix.shape, len(weight.values)
            rows.append((
                matrix.data_ptr(), weight.values.data_ptr() + first * D, weight.turned.data_ptr() + first,
                peaks[i].data_ptr(), weight.facts.data_ptr(), N, D, N // 4, total // 4, measuring, rounding,
            ))  # fmt: skip
            first += N
            measuring += ceil_div(N, BT)
            rounding += ceil_div(N, 4 * PASS.BT) * ceil_div(D, PASS.BD)
    one, first = sources[0][0], weights[0]
    table, BN = table_of(rows, device), next_power_of_two(len(rows))
    launch(
        _measure_weights_kernel, (measuring,), table=table, x=one, peaks=peaks[0], n=len(rows), BN=BN, BT=BT, BD=BD,
        num_warps=MEASURE,
    )
    launch(
        _quantize_weights_kernel, (rounding,), table=table, x=one, values=first.values, turned=_words(first.turned),
        peaks=peaks[0], facts=first.facts, n=len(rows), TOP=TOP[E4M3], ASM=not INTERPRETED, BN=BN, BT=PASS.BT, BD=PASS.BD,
        num_warps=PASS.warps,
    )


class _Linear(torch.autograd.Function):
    """Keeps the transpose of x in 8 bits."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, row_norm: float | None, n_first: int, w: Tensor, w_turned: Tensor, w_facts: Tensor,
        *masters: Tensor,
    ) -> tuple[Tensor, ...]:
        q = quantize([as_rows(x)], E4M3, row_norm, turned=any(ctx.needs_input_grad[6:]))
        ctx.save_for_backward(q.turned, q.facts, w_turned, w_facts)
        ctx.sizes = [len(master) for master in masters]
        ys = [product(q.values, part, q.facts, w_facts, x.dtype, fast=True) for part in w.split(ctx.sizes)]
        return x[..., :n_first].contiguous(), *(y.view(*x.shape[:-1], y.shape[1]) for y in ys)

    @staticmethod
    @differentiable_once
    def backward(ctx: FunctionCtx, d_first: Tensor, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x_turned, x_facts, w_turned, w_facts = ctx.saved_tensors
        needs_dw = any(ctx.needs_input_grad[6:])
        d = quantize([as_rows(dy) for dy in dys], E5M2, turned=needs_dw)
        dx, dws = None, [None] * len(dys)
        if ctx.needs_input_grad[0]:
            dx = product(d.values, w_turned, d.facts, w_facts, dys[0].dtype, fast=False)
            dx = dx.view(*dys[0].shape[:-1], dx.shape[1])
            if d_first.shape[-1] > 0:
                dx[..., : d_first.shape[-1]] += d_first
        if needs_dw:
            dws = product(d.turned, x_turned, d.facts, x_facts, torch.float32, fast=False).split(ctx.sizes)
        return dx, None, None, None, None, None, *dws


class _Relu2MLP(torch.autograd.Function):
    """Keeps the transposes of x and of relu² in 8 bits."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, row_norm: float | None, up: Tensor, up_turned: Tensor, up_facts: Tensor,
        down: Tensor, down_turned: Tensor, down_facts: Tensor, w_up: Tensor, w_down: Tensor,
    ) -> Tensor:
        q = quantize([as_rows(x)], E4M3, row_norm, turned=ctx.needs_input_grad[8])
        a = _relu2(q, up, up_facts, x.dtype, turned=any(ctx.needs_input_grad))
        ctx.save_for_backward(q.turned, q.facts, a.turned, a.facts, up_turned, up_facts, down_turned, down_facts)
        return product(a.values, down, a.facts, down_facts, x.dtype, fast=True).view(x.shape)

    @staticmethod
    @differentiable_once
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_turned, x_facts, a_turned, a_facts, up_turned, up_facts, down_turned, down_facts = ctx.saved_tensors
        needs_x, needs_up, needs_down = ctx.needs_input_grad[0], *ctx.needs_input_grad[8:]
        d = quantize([as_rows(dy)], E5M2, turned=needs_down)
        dx = dw_up = dw_down = None
        if needs_x or needs_up:
            g = _relu2_grad(d, down_turned, down_facts, a_turned, a_facts, dy.dtype, turned=needs_up)
            if needs_x:
                dx = product(g.values, up_turned, g.facts, up_facts, dy.dtype, fast=False).view(dy.shape)
            if needs_up:
                dw_up = product(g.turned, x_turned, g.facts, x_facts, torch.float32, fast=False)
        if needs_down:
            dw_down = product(d.turned, a_turned, d.facts, a_facts, torch.float32, fast=False)
        return dx, *[None] * 7, dw_up, dw_down


def fp8_linear(
    x: Tensor, masters: Sequence[Tensor], weight: Fp8, *, row_norm: float | None = None, n_first: int = 0
) -> tuple[Tensor, ...]:
    """kernels_torch.fp8.fp8_linear. Arguments: see there."""
    check_linear(x, masters, weight)
    check_gpu(x=x)
    return _Linear.apply(x, row_norm, n_first, *weight, *masters)


def fp8_relu2_mlp(
    x: Tensor, w_up: Tensor, w_down: Tensor, up: Fp8, down: Fp8, *, row_norm: float | None = None
) -> Tensor:
    """kernels_torch.fp8.fp8_relu2_mlp. Arguments: see there."""
    check_linear(x, (w_up,), up)
    check_linear(x.new_empty(0, w_down.shape[1]), (w_down,), down)
    check_gpu(x=x)
    return _Relu2MLP.apply(x, row_norm, *up, *down, w_up, w_down)
