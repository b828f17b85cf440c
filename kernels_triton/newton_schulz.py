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

On Hopper the products of large matrices are those of hopper_symmetric.py. Small ones, up to 64 × 64, take all five steps in
one program each. Programs write their own tiles and nothing else, and what they do does not depend on how many matrices
there are, so neither timing nor neighbours change a bit.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import JITFunction

from kernels_torch.newton_schulz import POLAR_EXPRESS, check_newton_schulz
from kernels_triton.launch import ceil_div, check_gpu, is_hopper, launch, next_power_of_two
from kernels_triton.primitives import upcast

try:
    from kernels_triton import hopper_symmetric
except (ImportError, AttributeError):  # a Triton whose Gluon has other names
    hopper_symmetric = None

STEPS = tl.constexpr(POLAR_EXPRESS)
N_STEPS = len(POLAR_EXPRESS)

SMALL = 64        # sides up to this: one program does it all
GRAM_FROM = 1.5   # products of n³: 7.5 ρ + 2.5 for the steps on X, 3 ρ + 7 on A, for sides of n and ρ n
RESTART = 2       # steps before A is made anew
SQUARES = 4096    # values that are squared and added at a time
MOST_LINES = 64   # parts of one matrix that are summed by a program each


class Tile(NamedTuple):
    """BM × BN values of the result, BD terms of the sum at a time, by `warps` warps, `stages` blocks on their way."""

    BM: int
    BN: int
    BD: int
    warps: int
    stages: int


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
def _rows(x, i_k, r, d, o_r, o_d, R, D, EVEN: tl.constexpr):
    """[BR, BD] of x [K, R, D], from row r and column d on."""
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
def _symmetric_kernel(
    x, y, z, out, lines, alpha, beta, gamma, n, d, n_tiles,
    TALL: tl.constexpr, EVEN: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, STEP: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr,
):
    """out [n, n] = α s² x yᵀ + β z + γ I  (TALL: xᵀ y), known to be symmetric; s is 1 without lines.

    STEP: whose γ, β and α are meant, in more digits than Triton hands over.
    """
    i_k = tl.program_id(0) // n_tiles
    i_r, i_c = _below_diagonal(tl.program_id(0) % n_tiles)
    r, c, o_n, o_d = i_r * BN, i_c * BN, tl.arange(0, BN), tl.arange(0, BD)
    b_out = _zeros(BN, BN, out.dtype.element_ty)                                                        # [BN, BN]
    for i_d in range(tl.cdiv(d, BD)):
        if TALL:
            b_x = _rows(x, i_k, i_d * BD, r, o_d, o_n, d, n, EVEN)                                      # [BD, BN]
            b_y = _rows(y, i_k, i_d * BD, c, o_d, o_n, d, n, EVEN)
            b_out = tl.dot(tl.trans(b_x), b_y, b_out, input_precision="ieee", out_dtype=b_out.dtype)
        else:
            b_x = _rows(x, i_k, r, i_d * BD, o_n, o_d, n, d, EVEN)                                      # [BN, BD]
            b_y = _rows(y, i_k, c, i_d * BD, o_n, o_d, n, d, EVEN)
            b_out = tl.dot(b_x, tl.trans(b_y), b_out, input_precision="ieee", out_dtype=b_out.dtype)
    b_out = _times(b_out, alpha, STEP, 2)
    if lines is not None:
        scale = _scale_of(lines, i_k, P, BP)
        b_out *= scale * scale
    if z is not None:
        b_out += _times(_rows(z, i_k, r, c, o_n, o_n, n, n, EVEN).to(b_out.dtype), beta, STEP, 1)
        on_diagonal = (r + o_n)[:, None] == (c + o_n)[None, :]
        if STEP is None:
            b_out = tl.where(on_diagonal, b_out + gamma, b_out)
        else:
            b_out = tl.where(on_diagonal, b_out + STEPS[STEP][0], b_out)
    b_out = b_out.to(out.dtype.element_ty)
    # Of a tile on the diagonal the lower half is stored twice, and the upper not at all.
    o_r, o_c = r + o_n, c + o_n
    out += i_k.to(tl.int64) * n * n
    m = (o_r < n)[:, None] & (o_c < n)[None, :]
    tl.store(out + o_r[:, None] * n + o_c[None, :], b_out, mask=m & (o_r[:, None] >= o_c[None, :]))
    m = (o_c < n)[:, None] & (o_r < n)[None, :]
    tl.store(out + o_c[:, None] * n + o_r[None, :], tl.trans(b_out), mask=m & (o_r[None, :] > o_c[:, None]))


@triton.jit
def _product_kernel(
    s, x, out, lines, r, c, n_c, n_tiles,
    TALL: tl.constexpr, EVEN: tl.constexpr, P: tl.constexpr, BP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):
    """out [r, c] = scale · s x  (TALL: scale · x s) for a symmetric s; the scale is 1 without lines."""
    i_k, i_in = tl.program_id(0) // n_tiles, tl.program_id(0) % n_tiles
    m, n = (i_in // n_c) * BM, (i_in % n_c) * BN
    o_m, o_n, o_d = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD)
    d = c if TALL else r
    b_out = _zeros(BM, BN, out.dtype.element_ty)                                                        # [BM, BN]
    for i_d in range(tl.cdiv(d, BD)):
        if TALL:
            b_x = _rows(x, i_k, m, i_d * BD, o_m, o_d, r, c, EVEN)                                      # [BM, BD]
            b_s = _rows(s, i_k, n, i_d * BD, o_n, o_d, c, c, EVEN)                                      # [BN, BD]
            b_out = tl.dot(b_x, tl.trans(b_s), b_out, input_precision="ieee", out_dtype=b_out.dtype)
        else:
            b_s = _rows(s, i_k, m, i_d * BD, o_m, o_d, r, r, EVEN)                                      # [BM, BD]
            b_x = _rows(x, i_k, i_d * BD, n, o_d, o_n, r, c, EVEN)                                      # [BD, BN]
            b_out = tl.dot(b_s, b_x, b_out, input_precision="ieee", out_dtype=b_out.dtype)
    if lines is not None:
        b_out *= _scale_of(lines, i_k, P, BP)
    p_out = out + (i_k.to(tl.int64) * r + m) * c + n + o_m[:, None] * c + o_n[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=(m + o_m < r)[:, None] & (n + o_n < c)[None, :])


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


# Up to this the GPU is done before the host has described its tensors to the copy engine: there Triton's kernels do it.
NARROW = 512
PORTABLE = Tile(64, 64, 32, 4, 3)  # there, on other GPUs, for other dtypes and for sizes that the copy engine cannot read
INTERPRETER = Tile(64, 64, 64, 4, 1)


class Stack:
    """What the products of one call have in common: K matrices whose shorter side is n and longer side c."""

    def __init__(self, x: Tensor, inner: torch.dtype) -> None:
        (self.K, self.r, self.c), self.inner, self.device = x.shape, inner, x.device
        self.n, self.d, self.tall = min(self.r, self.c), max(self.r, self.c), self.r > self.c
        self.on_hopper = goes_by_hopper(x, x.dtype)
        self.tile = PORTABLE if x.is_cuda else INTERPRETER

    def symmetric(
        self, x: Tensor, y: Tensor, z: Tensor | None = None, step: int | None = None, lines: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """α s² x yᵀ + β z + γ I [K, n, n], and of the tall X itself xᵀ y; γ, β and α are those of a step, else 0, 0, 1."""
        square, t = x.shape[1] == x.shape[2], self.tile
        tall, d = self.tall and not square, self.n if square else self.d
        out = torch.empty((self.K, self.n, self.n), dtype=dtype or self.inner, device=self.device)
        if self.on_hopper:
            assert z is None or z is x
            numbers = None if step is None else POLAR_EXPRESS[step]
            hopper_symmetric.symmetric_product(x, y, out, tall=tall, numbers=numbers, lines=lines)
            return out
        side = ceil_div(self.n, t.BM)
        n_tiles = side * (side + 1) // 2
        gamma, beta, alpha = (0.0, 0.0, 1.0) if step is None else POLAR_EXPRESS[step]
        self.launch(
            _symmetric_kernel, n_tiles, x=x, y=y, z=z, out=out, lines=lines, alpha=alpha, beta=beta, gamma=gamma, n=self.n, d=d,
            TALL=tall, EVEN=self.n % t.BM == 0 and d % t.BD == 0, STEP=step if self.inner == torch.float64 else None, BN=t.BM,
        )
        return out

    def product(self, s: Tensor, x: Tensor, lines: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """scale · s x, of a tall x: scale · x s."""
        t, out = self.tile, torch.empty(x.shape, dtype=dtype or self.inner, device=self.device)
        if self.on_hopper:
            left, right = (x, s) if self.tall else (s, x)
            hopper_symmetric.product(left, right, out, right_is_symmetric=self.tall, lines=lines)
            return out
        n_c = ceil_div(self.c, t.BN)
        self.launch(
            _product_kernel, ceil_div(self.r, t.BM) * n_c, s=s, x=x, out=out, lines=lines, r=self.r, c=self.c, n_c=n_c,
            TALL=self.tall, EVEN=self.r % t.BM == 0 and self.c % t.BN == 0 and self.n % t.BD == 0, BM=t.BM, BN=t.BN,
        )
        return out

    def launch(self, kernel: JITFunction, n_tiles: int, *, lines: Tensor | None, **args) -> None:
        P, t = 1 if lines is None else lines.shape[1], self.tile
        launch(
            kernel, (self.K * n_tiles,), lines=lines, n_tiles=n_tiles, P=P, BP=next_power_of_two(P), BD=t.BD,
            num_warps=t.warps, num_stages=t.stages, **args,
        )


def goes_by_hopper(g: Tensor, dtype: torch.dtype) -> bool:
    """Whether the steps on a stack like g are taken in `dtype` by hopper_symmetric.py."""
    n, d = min(g.shape[1:]), max(g.shape[1:])
    halves = dtype in (torch.bfloat16, torch.float16)
    return hopper_symmetric is not None and halves and n > NARROW and n % 8 == 0 and d % 8 == 0 and is_hopper(g.device)


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
    if torch.compiler.is_compiling() and goes_by_hopper(g, dtype):
        return _operator(g.detach(), dtype)
    return _newton_schulz(g.detach(), dtype)


@torch.library.custom_op("kestrel::newton_schulz", mutates_args=())
def _operator(g: Tensor, dtype: torch.dtype) -> Tensor:
    """For torch.compile, which cannot trace a kernel that is not tl's."""
    return _newton_schulz(g, dtype)


@_operator.register_fake
def _(g: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(g.shape, dtype=dtype, device=g.device)
