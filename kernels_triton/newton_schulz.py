"""Newton-Schulz by Polar Express, of a stack of matrices at once: see kernels_torch.newton_schulz for the coefficients.

    A = X Xᵀ (wide), XᵀX (tall)        n × n, n the shorter side
    S = a I + b A + c A²
    X ← S X (wide), X S (tall)

A and S are symmetric, so only the tiles on and below the diagonal are computed, and each is stored twice; a I + b A is
added where A A leaves the tensor cores. That is 2 n²c + n³ operations a step instead of 4 n²c + 2 n³, and no pass over
memory besides the products. What is added first at a place and at its mirror place is the same, so that S is symmetric
to the last bit.

In bf16, where one side is at least GRAM_FROM times the other, X takes part in four products instead of ten. All that the
steps multiply with commutes, so they are taken on A alone, n × n products of half the work each:

    S = a I + b A + c A²,   Q ← S Q,   A ← S A S               and in the end X ← Q X

A squares what X holds: rounding may push its small eigenvalues below zero, from where the iteration leads away from one.
It is therefore made anew from X ← Q X once, after two steps, before which such an error cannot grow: the restart of Gram
Newton-Schulz (https://tridao.me/blog/2026/gram-newton-schulz). With it the result errs as little as that of the steps
on X for every spectrum tried, without it up to a hundred times as much. In fp32 it costs two bits, so there and in fp16 the
steps are taken on X.

For bf16 nearly all between the first product and the last is kept in fp16: no number is larger than 70, and three more bits
bring the result closer to the exact one than an iteration in bf16 comes. Sums run in fp32 (fp64 for fp64).

Small matrices, up to 64 × 64, take all five steps in one program each. Programs write their own tiles and nothing else,
and what they do does not depend on how many matrices there are, so neither timing nor neighbours change a bit.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels_torch.newton_schulz import POLAR_EXPRESS, check_newton_schulz
from kernels_triton.launch import (
    ceil_div,
    check_gpu,
    is_hopper,
    launch,
    launch_with_descriptors,
    n_processors,
    next_power_of_two,
)
from kernels_triton.matmul import _halves
from kernels_triton.primitives import upcast

STEPS = tl.constexpr(POLAR_EXPRESS)
N_STEPS = len(POLAR_EXPRESS)

SMALL = 64        # sides up to this: one program does it all
GRAM_FROM = 1.5   # products of n³: 7.5 ρ + 2.5 for the steps on X, 3 ρ + 7 on A, for sides of n and ρ n
RESTART = 2       # steps before A is made anew
SQUARES = 4096    # values that are squared and added at a time
MOST_LINES = 64   # parts of one matrix that are summed by a program each


class Tile(NamedTuple):
    """BM × BN values of the result, BD terms of the sum at a time, by `warps` warps, `stages` blocks on their way.

    stay    programs a processor that go from tile to tile; None: a program for each tile
    """

    BM: int
    BN: int
    BD: int
    warps: int
    stages: int
    stay: int | None


@triton.jit
def _squares_kernel(g, lines, N, SPAN, P: tl.constexpr, BT: tl.constexpr):
    """lines [K, P]: the sum of squares of a P-th of each matrix."""
    i_k, i_p = tl.program_id(0).to(tl.int64), tl.program_id(1)
    g += i_k * N
    if g.dtype.element_ty == tl.float64:
        b_sum = tl.zeros([BT], dtype=tl.float64)                                                        # [BT]
    else:
        b_sum = tl.zeros([BT], dtype=tl.float32)
    for i in range(tl.cdiv(SPAN, BT)):
        o = i_p.to(tl.int64) * SPAN + i * BT + tl.arange(0, BT)
        b_g = upcast(tl.load(g + o, mask=o < N, other=0.0))                                             # [BT]
        b_sum += b_g * b_g
    tl.store(lines + i_k * P + i_p, tl.sum(b_sum, 0))


@triton.jit
def _scale_of(lines, i_k, P: tl.constexpr, BP: tl.constexpr):
    """1 / (1.01 ‖g‖ + 1e-6) of matrix i_k."""
    o_p = tl.arange(0, BP)
    b_squares = tl.load(lines + i_k * P + o_p, mask=o_p < P, other=0.0)                                 # [BP]
    return 1.0 / (1.01 * tl.sqrt(tl.sum(b_squares, 0)) + 1e-6)


@triton.jit
def _below_diagonal(i_tile):
    """Row ≥ column of the tiles of a triangle, counted row by row."""
    i_r = ((tl.sqrt(8.0 * i_tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i_r = tl.where(i_r * (i_r + 1) // 2 > i_tile, i_r - 1, i_r)
    i_r = tl.where((i_r + 1) * (i_r + 2) // 2 <= i_tile, i_r + 1, i_r)
    return i_r, i_tile - i_r * (i_r + 1) // 2


@triton.jit
def _zeros(BM: tl.constexpr, BN: tl.constexpr, dtype: tl.constexpr):
    """What sums of such values are kept in."""
    if dtype == tl.float64:
        return tl.zeros([BM, BN], dtype=tl.float64)
    else:
        return tl.zeros([BM, BN], dtype=tl.float32)


@triton.jit
def _rows(x, i_k, r, d, o_r, o_d, R, D, TMA: tl.constexpr, EVEN: tl.constexpr):
    """[BR, BD] of x [K, R, D], from row r and column d on."""
    if TMA:
        return tl.reshape(x.load([i_k, r, d]), (o_r.shape[0], o_d.shape[0]))
    else:
        p_x = x + (i_k.to(tl.int64) * R + r) * D + d + o_r[:, None] * D + o_d[None, :]
        if EVEN:
            return tl.load(p_x)
        else:
            return tl.load(p_x, mask=(r + o_r < R)[:, None] & (d + o_d < D)[None, :], other=0.0)


@triton.jit
def _times(b_x, number, STEP: tl.constexpr, I: tl.constexpr):
    """b_x times a number, or times the one of a step: a variable would hold it in fp32."""
    if STEP is None:
        return b_x * number
    else:
        return b_x * STEPS[STEP][I]


@triton.jit
def _store_twice(
    b_out, z, out, mirror, beta, i_k, r, c, n, TMA: tl.constexpr, EVEN: tl.constexpr, STEP: tl.constexpr,
):
    """b_out + β z at row r and column c of out [K, n, n], and its transpose at column r and row c."""
    o_r, o_c = tl.arange(0, b_out.shape[0]), tl.arange(0, b_out.shape[1])
    if z is not None:
        b_out += _times(_rows(z, i_k, r, c, o_r, o_c, n, n, TMA, EVEN).to(b_out.dtype), beta, STEP, 1)
    b_out = b_out.to(out.dtype if TMA else out.dtype.element_ty)
    if TMA:
        out.store([i_k, r, c], tl.reshape(b_out, (1, b_out.shape[0], b_out.shape[1])))
        # A tile on the diagonal is its own mirror to the last bit, since both halves were added in one order.
        mirror.store([i_k, c, r], tl.reshape(tl.trans(b_out), (1, b_out.shape[1], b_out.shape[0])))
    else:  # of a tile on the diagonal the lower half is stored twice, and the upper not at all
        p_out = out + (i_k.to(tl.int64) * n + r) * n + c + o_r[:, None] * n + o_c[None, :]
        m = (r + o_r < n)[:, None] & (c + o_c < n)[None, :] & ((r + o_r)[:, None] >= (c + o_c)[None, :])
        tl.store(p_out, b_out, mask=m)
        p_out = out + (i_k.to(tl.int64) * n + c) * n + r + o_c[:, None] * n + o_r[None, :]
        m = (c + o_c < n)[:, None] & (r + o_r < n)[None, :] & ((r + o_r)[None, :] > (c + o_c)[:, None])
        tl.store(p_out, tl.trans(b_out), mask=m)


@triton.jit
def _symmetric_kernel(
    x, y, z, out, mirror, lines, alpha, beta, gamma, n, d, n_tiles, n_all,
    TALL: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr, STAY: tl.constexpr, P: tl.constexpr, BP: tl.constexpr,
    STEP: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):
    """out [n, n] = α s² x yᵀ + β z + γ I  (TALL: xᵀ y), known to be symmetric; s is 1 without lines.

    mirror is out, seen through other blocks. STEP: whose γ, β and α are meant, in more digits than Triton hands over.
    """
    dtype: tl.constexpr = out.dtype if TMA else out.dtype.element_ty
    o_n, o_d = tl.arange(0, BN), tl.arange(0, BD)
    for i_tile in tl.range(tl.program_id(0), n_all, tl.num_programs(0), flatten=STAY):
        i_k = i_tile // n_tiles
        i_r, i_c = _below_diagonal(i_tile % n_tiles)
        r, c = i_r * BN, i_c * BN
        b_out = _zeros(BN, BN, dtype)                                                                   # [BN, BN]
        for i_d in range(tl.cdiv(d, BD)):
            if TALL:
                b_x = _rows(x, i_k, i_d * BD, r, o_d, o_n, d, n, TMA, EVEN)                             # [BD, BN]
                b_y = _rows(y, i_k, i_d * BD, c, o_d, o_n, d, n, TMA, EVEN)
                b_out = tl.dot(tl.trans(b_x), b_y, b_out, input_precision="ieee", out_dtype=b_out.dtype)
            else:
                b_x = _rows(x, i_k, r, i_d * BD, o_n, o_d, n, d, TMA, EVEN)                             # [BN, BD]
                b_y = _rows(y, i_k, c, i_d * BD, o_n, o_d, n, d, TMA, EVEN)
                b_out = tl.dot(b_x, tl.trans(b_y), b_out, input_precision="ieee", out_dtype=b_out.dtype)
        b_out = _times(b_out, alpha, STEP, 2)
        if lines is not None:
            scale = _scale_of(lines, i_k, P, BP)
            b_out *= scale * scale
        if z is not None:
            on_diagonal = (r + o_n)[:, None] == (c + o_n)[None, :]
            if STEP is None:
                b_out = tl.where(on_diagonal, b_out + gamma, b_out)
            else:
                b_out = tl.where(on_diagonal, b_out + STEPS[STEP][0], b_out)
        if TMA:  # in two pieces: room for one more stage, or one more program
            b_left, b_right = _halves(b_out)                                                            # [BN, BN / 2]
            _store_twice(b_left, z, out, mirror, beta, i_k, r, c, n, TMA, EVEN, STEP)
            _store_twice(b_right, z, out, mirror, beta, i_k, r, c + BN // 2, n, TMA, EVEN, STEP)
        else:
            _store_twice(b_out, z, out, mirror, beta, i_k, r, c, n, TMA, EVEN, STEP)


@triton.jit
def _product_kernel(
    s, x, out, lines, r, c, n_c, n_tiles, n_all,
    TALL: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr, STAY: tl.constexpr, P: tl.constexpr, BP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):
    """out [r, c] = scale · s x  (TALL: scale · x s) for a symmetric s; the scale is 1 without lines."""
    dtype: tl.constexpr = out.dtype if TMA else out.dtype.element_ty
    o_m, o_n, o_d = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD)
    d = c if TALL else r
    for i_tile in tl.range(tl.program_id(0), n_all, tl.num_programs(0), flatten=STAY):
        i_k, i_in = i_tile // n_tiles, i_tile % n_tiles
        m, n = (i_in // n_c) * BM, (i_in % n_c) * BN
        b_out = _zeros(BM, BN, dtype)                                                                   # [BM, BN]
        for i_d in range(tl.cdiv(d, BD)):
            if TALL:
                b_x = _rows(x, i_k, m, i_d * BD, o_m, o_d, r, c, TMA, EVEN)                             # [BM, BD]
                b_s = _rows(s, i_k, n, i_d * BD, o_n, o_d, c, c, TMA, EVEN)                             # [BN, BD]
                b_out = tl.dot(b_x, tl.trans(b_s), b_out, input_precision="ieee", out_dtype=b_out.dtype)
            else:
                b_s = _rows(s, i_k, m, i_d * BD, o_m, o_d, r, r, TMA, EVEN)                             # [BM, BD]
                b_x = _rows(x, i_k, i_d * BD, n, o_d, o_n, r, c, TMA, EVEN)                             # [BD, BN]
                b_out = tl.dot(b_s, b_x, b_out, input_precision="ieee", out_dtype=b_out.dtype)
        if lines is not None:
            b_out *= _scale_of(lines, i_k, P, BP)
        if TMA:
            b_left, b_right = _halves(b_out.to(dtype))                                                  # [BM, BN / 2]
            out.store([i_k, m, n], tl.reshape(b_left, (1, BM, BN // 2)))
            out.store([i_k, m, n + BN // 2], tl.reshape(b_right, (1, BM, BN // 2)))
        else:
            p_out = out + (i_k.to(tl.int64) * r + m) * c + n + o_m[:, None] * c + o_n[None, :]
            tl.store(p_out, b_out.to(dtype), mask=(m + o_m < r)[:, None] & (n + o_n < c)[None, :])


@triton.jit
def _small_step(b_x, a: tl.constexpr, b: tl.constexpr, c: tl.constexpr):
    """[BN, BC] → a X + (b A + c A²) X"""
    b_a = tl.dot(b_x, tl.trans(b_x), input_precision="ieee", out_dtype=b_x.dtype)                       # [BN, BN]
    b_s = b * b_a + c * tl.dot(b_a, b_a, input_precision="ieee", out_dtype=b_x.dtype)                   # [BN, BN]
    return a * b_x + tl.dot(b_s, b_x, input_precision="ieee", out_dtype=b_x.dtype)


@triton.jit
def _small_kernel(
    g, out, stride_k, stride_n, stride_c, stride_out_n, stride_out_c, n, c,
    BN: tl.constexpr, BC: tl.constexpr,
):
    """All steps on one matrix seen as wide: n ≤ c, whichever of them counts the rows."""
    i_k = tl.program_id(0).to(tl.int64)
    o_n, o_c = tl.arange(0, BN), tl.arange(0, BC)
    m = (o_n < n)[:, None] & (o_c < c)[None, :]
    p_g = g + i_k * stride_k + o_n.to(tl.int64)[:, None] * stride_n + o_c.to(tl.int64)[None, :] * stride_c
    b_x = upcast(tl.load(p_g, mask=m, other=0.0))                                                       # [BN, BC]
    b_x /= 1.01 * tl.sqrt(tl.sum(tl.sum(b_x * b_x, 1), 0)) + 1e-6
    b_x = _small_step(b_x, STEPS[0][0], STEPS[0][1], STEPS[0][2])
    b_x = _small_step(b_x, STEPS[1][0], STEPS[1][1], STEPS[1][2])
    b_x = _small_step(b_x, STEPS[2][0], STEPS[2][1], STEPS[2][2])
    b_x = _small_step(b_x, STEPS[3][0], STEPS[3][1], STEPS[3][2])
    b_x = _small_step(b_x, STEPS[4][0], STEPS[4][1], STEPS[4][2])
    p_out = out + i_k * n * c + o_n[:, None] * stride_out_n + o_c[None, :] * stride_out_c
    tl.store(p_out, b_x.to(out.dtype.element_ty), mask=m)


# By TMA, H200 in bf16, all steps between events: 80 × 1280 × 1280 7.19 ms (the reference 10.62), 20 × 1280 × 5120 3.71 (7.94;
# by the steps on X 5.16), 20 × 5120 × 1280 3.67 (7.90), 48 × 768 × 768 1.17 (1.71), 12 × 768 × 3072 0.69 (1.30). The GPU was
# shared with tests, and other tiles are not measured yet.
SYMMETRIC = Tile(128, 128, 64, 4, 3, None)
PRODUCT = Tile(128, 256, 64, 8, 4, 1)
# Up to this the GPU is done before the host has described its tensors to TMA (24 × 384 × 384: 13 µs a product and 100 µs a
# launch, 2.1 ms in all where the reference took 0.73): there it is left out. Without it nothing was measured.
NARROW = 512
PORTABLE = Tile(64, 64, 32, 4, 3, None)  # there, on other GPUs, for other dtypes and for sizes that TMA cannot read
INTERPRETER = Tile(64, 64, 64, 4, 1, None)


class Stack:
    """What the products of one call have in common: K matrices whose shorter side is n and longer side c."""

    def __init__(self, x: Tensor, inner: torch.dtype) -> None:
        (self.K, self.r, self.c), self.inner, self.device = x.shape, inner, x.device
        self.n, self.d, self.tall = min(self.r, self.c), max(self.r, self.c), self.r > self.c
        halves = x.dtype in (torch.bfloat16, torch.float16)
        self.tma = halves and self.n > NARROW and self.n % 8 == 0 and self.d % 8 == 0 and is_hopper(x.device)

    def tile(self, hopper: Tile) -> Tile:
        if self.tma:
            return hopper
        return PORTABLE if self.device.type == "cuda" else INTERPRETER

    def symmetric(
        self, x: Tensor, y: Tensor, z: Tensor | None = None, step: int | None = None, lines: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """α s² x yᵀ + β z + γ I [K, n, n], and of the tall X itself xᵀ y; γ, β and α are those of a step, else 0, 0, 1."""
        tile, tall = self.tile(SYMMETRIC), self.tall and x.shape[1] != x.shape[2]
        out = torch.empty((self.K, self.n, self.n), dtype=dtype or self.inner, device=self.device)
        d = self.n if x.shape[1] == x.shape[2] else self.d
        side = ceil_div(self.n, tile.BM)
        n_tiles = side * (side + 1) // 2
        block = [1, tile.BD, tile.BM] if tall else [1, tile.BM, tile.BD]
        half, other = [1, tile.BM, tile.BM // 2], [1, tile.BM // 2, tile.BM]
        even = self.n % tile.BM == 0 and d % tile.BD == 0
        gamma, beta, alpha = (0.0, 0.0, 1.0) if step is None else POLAR_EXPRESS[step]
        self.launch(
            _symmetric_kernel, tile, self.K * n_tiles,
            dict(x=(x, block), y=(y, block), z=z if z is None else (z, half), out=(out, half), mirror=(out, other)), lines,
            alpha=alpha, beta=beta, gamma=gamma, n=self.n, d=d, n_tiles=n_tiles, TALL=tall, EVEN=even, BN=tile.BM,
            STEP=step if self.inner == torch.float64 else None,
        )
        return out

    def product(self, s: Tensor, x: Tensor, lines: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """scale · s x, of a tall x: scale · x s."""
        tile = self.tile(PRODUCT)
        out = torch.empty(x.shape, dtype=dtype or self.inner, device=self.device)
        n_c = ceil_div(self.c, tile.BN)
        n_tiles = ceil_div(self.r, tile.BM) * n_c
        right = [1, tile.BN, tile.BD] if self.tall else [1, tile.BD, tile.BN]
        left = [1, tile.BM, tile.BD]
        blocks = dict(s=(s, right), x=(x, left)) if self.tall else dict(s=(s, left), x=(x, right))
        blocks["out"] = (out, [1, tile.BM, tile.BN // 2])
        even = self.r % tile.BM == 0 and self.c % tile.BN == 0 and self.n % tile.BD == 0
        self.launch(
            _product_kernel, tile, self.K * n_tiles, blocks, lines, r=self.r, c=self.c, n_c=n_c, n_tiles=n_tiles,
            TALL=self.tall, EVEN=even, BM=tile.BM, BN=tile.BN,
        )
        return out

    def launch(
        self, kernel: JITFunction, tile: Tile, n_all: int, blocks: dict[str, tuple], lines: Tensor | None, **args
    ) -> None:
        """blocks: name of an argument → tensor, and the block that TMA moves at a time."""
        P = 1 if lines is None else lines.shape[1]
        args |= dict(lines=lines, n_all=n_all, P=P, BP=next_power_of_two(P), BD=tile.BD, TMA=self.tma)
        args |= dict(STAY=tile.stay is not None, num_warps=tile.warps, num_stages=tile.stages)
        if self.tma:
            programs = n_all if tile.stay is None else min(n_all, tile.stay * n_processors(self.device))
            blocks = {name: TensorDescriptor.from_tensor(*block) if block else None for name, block in blocks.items()}
            launch_with_descriptors(kernel, (programs,), self.device, **blocks, **args)
        else:
            launch(kernel, (n_all,), **{name: block and block[0] for name, block in blocks.items()}, **args)


def sums_of_squares(g: Tensor) -> Tensor:
    """Contiguous g [K, r, c] → [K, P], P parts of the squared norm of each matrix."""
    K, N = g.shape[0], g.shape[1] * g.shape[2]
    span = ceil_div(N, min(MOST_LINES, ceil_div(N, SQUARES)))
    span = SQUARES * ceil_div(span, SQUARES)
    P = ceil_div(N, span)
    lines = torch.empty((K, P), dtype=torch.promote_types(g.dtype, torch.float32), device=g.device)
    launch(_squares_kernel, (K, P), g=g, lines=lines, N=N, SPAN=span, P=P, BT=SQUARES, num_warps=8)
    return lines


def _newton_schulz_small(g: Tensor, dtype: torch.dtype) -> Tensor:
    """One launch, for sides up to SMALL."""
    (K, r, c), (stride_k, stride_r, stride_c) = g.shape, g.stride()
    out = torch.empty((K, r, c), dtype=dtype, device=g.device)
    strides = dict(stride_n=stride_r, stride_c=stride_c, stride_out_n=c, stride_out_c=1, n=r, c=c)
    if r > c:
        strides = dict(stride_n=stride_c, stride_c=stride_r, stride_out_n=1, stride_out_c=c, n=c, c=r)
    blocks = dict(BN=max(16, next_power_of_two(min(r, c))), BC=max(16, next_power_of_two(max(r, c))))
    launch(_small_kernel, (K,), g=g, out=out, stride_k=stride_k, **strides, **blocks, num_warps=4)
    return out


def _newton_schulz_steps(stack: Stack, x: Tensor, lines: Tensor | None, dtype: torch.dtype) -> Tensor:
    """All steps on X: three products each."""
    for i in range(N_STEPS):
        last = i + 1 == N_STEPS
        A = stack.symmetric(x, x, lines=lines)
        S = stack.symmetric(A, A, A, i, dtype=x.dtype)
        x, lines = stack.product(S, x, lines=lines, dtype=dtype if last else None), None
    return x


def _newton_schulz_gram(stack: Stack, x: Tensor, lines: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Some steps on A = X Xᵀ, the product with X, the others in the same way."""
    for first, end in ((0, RESTART), (RESTART, N_STEPS)):
        A, Q = stack.symmetric(x, x, lines=lines), None
        for i in range(first, end):
            last = i + 1 == end
            S = stack.symmetric(A, A, A, i)
            Q = S if Q is None else stack.symmetric(S, Q, dtype=x.dtype if last else None)
            if not last:
                A = stack.symmetric(stack.symmetric(S, A), S)
        x, lines = stack.product(Q, x, lines=lines, dtype=dtype if end == N_STEPS else None), None
    return x


def _newton_schulz(g: Tensor, dtype: torch.dtype) -> Tensor:
    _, r, c = g.shape
    if g.numel() == 0:
        return torch.empty(g.shape, dtype=dtype, device=g.device)
    if max(r, c) <= SMALL:
        return _newton_schulz_small(g, dtype)
    wide = torch.promote_types(g.dtype, torch.float32)
    if dtype not in (torch.bfloat16, wide):  # what fits g might not fit dtype before it is divided by the norm
        norm = torch.linalg.vector_norm(g.to(wide), dim=(1, 2), keepdim=True)
        x, lines = (g / (1.01 * norm + 1e-6)).to(dtype).contiguous(), None
    else:
        x = g.to(dtype).contiguous()
        lines = sums_of_squares(x)
    if not torch.compiler.is_compiling() and x.data_ptr() % 16 != 0:
        x = x.clone()
    stack = Stack(x, torch.float16 if dtype == torch.bfloat16 else dtype)
    by_gram = max(r, c) >= GRAM_FROM * min(r, c) and dtype == torch.bfloat16  # others have no bits to spare
    steps = _newton_schulz_gram if by_gram else _newton_schulz_steps
    return steps(stack, x, lines, dtype)


def newton_schulz(g: Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """kernels_torch.newton_schulz, symmetric products by half. Arguments: see kernels_torch.newton_schulz.

    Not differentiable, as no optimizer asks for it.
    """
    check_newton_schulz(g)
    check_gpu(g=g)
    return _newton_schulz(g.detach(), dtype)
