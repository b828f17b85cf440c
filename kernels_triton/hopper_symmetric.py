"""Products of stacks of matrices on Hopper, of symmetric ones half: what newton_schulz.py is made of.

    symmetric_product    [n, n] = α s² x yᵀ + β x + γ I, or α s² xᵀ y: tiles on and below the diagonal, each stored twice
    product              [r, c] = s · x y

One program a processor goes from tile to tile. Its warps have roles: one has the copy engine bring blocks of both factors
into a ring in shared memory; two groups of four warps have every second tile each and take turns on the tensor cores, so
that what one does with its sums falls into the time in which the other multiplies (hopper_matmul.py).

β x is read from the ring: the blocks of x that lie under the tile are made the last ones of its sum.

A program takes 48 Ki of a processor's 64 Ki registers, and shared memory but for 3 KiB: room beside it for 128 threads of a
kernel that moves data. The next product may be started before this one ends and waits inside.

Each value has one writer and each sum one order, whoever is done first. Of a tile on the diagonal nothing is stored twice.
"""

from torch import Tensor

from kernels_triton.attention.hopper.api import TensorDescriptor, as_box, gl, gluon, mbarrier, new_barriers
from kernels_triton.hopper_matmul import _halves, _next
from kernels_triton.launch import ceil_div, launch_with_descriptors, n_processors

from kernels_triton.attention.hopper.api import (  # isort: skip
    fence_async_shared, gdc_launch_dependents, gdc_wait, threads_meet, tma_load, tma_store, tma_store_wait, warpgroup_mma,
    warpgroup_mma_wait,
)

# H200, fp16, µs (TFLOP/s that count, so a symmetric product's half) beside Triton's pipeline of tiles of 128 × 128, and for s x
# of 128 × 256, and cuBLAS; measured with β x read while tiles were stored, 176 registers a thread or 240 alike:
#                          80 × 1280 × 1280        48 × 768 × 768       20 × 1280 × 5120     12 × 768 × 3072
#     x y, symmetric       275 (611)               49 (442)
#     a I + b A + c A²     331 (506), 447          61 (359), 90
#     x xᵀ                                                              279 (602), 378       43 (507), 61
#     s x                  455 (738), 461, 460     77 (564), 75, 77     453 (740), 480, 474  72 (607), 71, 71
# With four stages: 282, 330, 288 and 471 at width 1280, 53, 61, 47 and 82 at width 768.
BM, BK = 128, 64   # tiles of BM × BM, BK terms of the sum at a time
STAGES = 5         # blocks in the ring: all that fits beside half a tile and its mirror image for each group
REGISTERS = 176    # a thread of the second group; the first has 8 more, the warp that loads 24
AT_START = 128     # registers a thread has before roles are taken
LINES = 64         # parts of a squared norm, at most


@gluon.jit
def _place(i, n_tiles, n_fast, ALONG_ROWS: gl.constexpr, SYMMETRIC: gl.constexpr):
    """Matrix, row and column of the i-th tile: of a triangle row by row, else along the side that has n_fast tiles."""
    i_k, i_in = i // n_tiles, i % n_tiles
    if SYMMETRIC:
        i_r = ((gl.sqrt(8.0 * i_in.to(gl.float32) + 1.0) - 1.0) * 0.5).to(gl.int32)
        i_r = gl.where(i_r * (i_r + 1) // 2 > i_in, i_r - 1, i_r)
        i_r = gl.where((i_r + 1) * (i_r + 2) // 2 <= i_in, i_r + 1, i_r)
        return i_k, i_r, i_in - i_r * (i_r + 1) // 2
    elif ALONG_ROWS:
        return i_k, i_in // n_fast, i_in % n_fast
    else:
        return i_k, i_in % n_fast, i_in // n_fast


@gluon.jit
def _load(
    x, y, x_s, y_s, full, empty, n_all, n_tiles, n_fast, n_k,
    BM: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, X_IS_KM: gl.constexpr, Y_IS_KN: gl.constexpr,
    ALONG_ROWS: gl.constexpr, SYMMETRIC: gl.constexpr, HAS_Z: gl.constexpr,
):
    """One warp: x, [M, K] or [K, M], and y, [N, K] or [K, N], block by block."""
    slot, phase = 0, 1
    for i in range(gl.program_id(0), n_all, gl.num_programs(0)):
        i_k, i_r, i_c = _place(i, n_tiles, n_fast, ALONG_ROWS, SYMMETRIC)
        k = 0
        if HAS_Z:  # the blocks under the tile come last
            k = (i_c + 1) * (BM // BK)
            k = gl.where(k == n_k, 0, k)
        for _ in range(n_k):
            mbarrier.wait(empty.index(slot), phase)
            arrived = full.index(slot)
            mbarrier.expect(arrived, 2 * BM * BK * 2)
            if X_IS_KM:
                tma_load(x, [i_k, k * BK, i_r * BM], arrived, as_box(x_s.index(slot), x))
            else:
                tma_load(x, [i_k, i_r * BM, k * BK], arrived, as_box(x_s.index(slot), x))
            if Y_IS_KN:
                tma_load(y, [i_k, k * BK, i_c * BM], arrived, as_box(y_s.index(slot), y))
            else:
                tma_load(y, [i_k, i_c * BM, k * BK], arrived, as_box(y_s.index(slot), y))
            slot, phase = _next(slot, phase, STAGES)
            k += 1
            if HAS_Z:
                k = gl.where(k == n_k, 0, k)


@gluon.jit
def _block(s, slot, TRANSPOSED: gl.constexpr):
    if TRANSPOSED:
        return s.index(slot).permute((1, 0))
    else:
        return s.index(slot)


@gluon.jit
def _plus(b_y, z_s, row, col, alpha, beta, gamma):
    """α b_y + β z + γ I, for the part of a matrix from row and col on that z_s has a block of."""
    layout: gl.constexpr = b_y.type.layout
    b_y = b_y * alpha + beta * z_s.load(layout).to(gl.float32)
    o_r = row + gl.arange(0, b_y.shape[0], gl.SliceLayout(1, layout))
    o_c = col + gl.arange(0, b_y.shape[1], gl.SliceLayout(0, layout))
    return gl.where(o_r[:, None] == o_c[None, :], b_y + gamma, b_y)


@gluon.jit
def _store(b_y, out, mirror, p_s, m_s, i_k, row, col, SYMMETRIC: gl.constexpr):
    """Half a tile, [BM, BM / 2], is on its way from p_s, and unless it is on the diagonal its mirror image from m_s."""
    b_out = b_y.to(out.dtype)
    p_s.store(b_out)
    if SYMMETRIC:
        m_s.permute((1, 0)).store(b_out)
    fence_async_shared()
    threads_meet()
    tma_store(out, [i_k, row, col], as_box(p_s, out))
    if SYMMETRIC:  # noqa: SIM102 – the one is known when the kernel is compiled, the other is not
        if row // b_y.shape[0] != col // b_y.shape[0]:
            tma_store(mirror, [i_k, col, row], as_box(m_s, mirror))


@gluon.jit
def _multiply(
    W: gl.constexpr, x_s, y_s, out, mirror, p_s, m_s, full, empty, turn, lines, n_all, n_tiles, n_fast, n_k, alpha, beta, gamma, P,
    BM: gl.constexpr, STAGES: gl.constexpr, X_IS_KM: gl.constexpr, Y_IS_KN: gl.constexpr,
    ALONG_ROWS: gl.constexpr, SYMMETRIC: gl.constexpr, HAS_Z: gl.constexpr, LINES: gl.constexpr,
):
    """Four warps: every second tile, beginning with the W-th, whose blocks lie in the ring behind those of the tile before."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    slot, phase, turn_phase = 0, 0, 1 - W
    first, step = gl.program_id(0), gl.num_programs(0)
    if W == 1:
        slot = n_k % STAGES
        phase = (n_k // STAGES) & 1
        first += step
    step *= 2
    for i in range(first, n_all, step):
        i_k, i_r, i_c = _place(i, n_tiles, n_fast, ALONG_ROWS, SYMMETRIC)
        row, col = i_r * BM, i_c * BM
        factor = alpha
        if lines is not None:  # s = 1 / (1.01 ‖x‖ + 1e-6)
            o_p = gl.arange(0, LINES, gl.SliceLayout(0, layout))
            scale = 1.0 / (1.01 * gl.sqrt(gl.sum(gl.load(lines + i_k * P + o_p, mask=o_p < P, other=0.0), 0)) + 1e-6)
            factor *= scale
            if SYMMETRIC:
                factor *= scale
        mbarrier.wait(turn.index(W), turn_phase)
        turn_phase ^= 1
        b_c = gl.zeros([BM, BM], gl.float32, layout)                                                    # [BM, BM]
        mbarrier.wait(full.index(slot), phase)
        b_c = warpgroup_mma(_block(x_s, slot, X_IS_KM), _block(y_s, slot, not Y_IS_KN), b_c, use_acc=False, is_async=True)
        b_c = warpgroup_mma_wait(1, deps=[b_c])
        last = slot
        slot, phase = _next(slot, phase, STAGES)
        for k in range(1, n_k):
            mbarrier.wait(full.index(slot), phase)
            b_c = warpgroup_mma(_block(x_s, slot, X_IS_KM), _block(y_s, slot, not Y_IS_KN), b_c, is_async=True)
            b_c = warpgroup_mma_wait(1, deps=[b_c])
            if HAS_Z:  # the last two are read once more
                mbarrier.arrive(empty.index(last), count=1, pred=k < n_k - 1)
            else:
                mbarrier.arrive(empty.index(last), count=1)
            last = slot
            slot, phase = _next(slot, phase, STAGES)
        mbarrier.arrive(turn.index(1 - W), count=1)
        b_c = warpgroup_mma_wait(0, deps=[b_c])
        b_left, b_right = _halves(b_c)                                                                  # [BM, BM / 2]
        if HAS_Z:
            before = gl.where(last == 0, STAGES - 1, last - 1)
            b_left = _plus(b_left, x_s.index(before), row, col, factor, beta, gamma)
            b_right = _plus(b_right, x_s.index(last), row, col + BM // 2, factor, beta, gamma)
            threads_meet()  # every warp has read them
            mbarrier.arrive(empty.index(before), count=1)
            mbarrier.arrive(empty.index(last), count=1)
        else:
            mbarrier.arrive(empty.index(last), count=1)
            b_left *= factor
            b_right *= factor
        tma_store_wait(0)
        threads_meet()  # what was in the buffers has left
        _store(b_left, out, mirror, p_s.index(W if SYMMETRIC else 2 * W), m_s.index(W), i_k, row, col, SYMMETRIC)
        if SYMMETRIC:  # else each half has a buffer
            tma_store_wait(0)
            threads_meet()
        _store(
            b_right, out, mirror, p_s.index(W if SYMMETRIC else 2 * W + 1), m_s.index(W), i_k, row, col + BM // 2, SYMMETRIC,
        )
        slot += n_k % STAGES
        phase ^= (n_k // STAGES) & 1
        phase = gl.where(slot >= STAGES, phase ^ 1, phase)
        slot = gl.where(slot >= STAGES, slot - STAGES, slot)
    tma_store_wait(0)


@gluon.jit(do_not_specialize=["n_all", "n_tiles", "n_fast", "n_k", "P"])
def _products_kernel(
    x, y, out, mirror, lines, alpha, beta, gamma, n_all, n_tiles, n_fast, n_k, P,
    BM: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, X_IS_KM: gl.constexpr, Y_IS_KN: gl.constexpr,
    ALONG_ROWS: gl.constexpr, SYMMETRIC: gl.constexpr, HAS_Z: gl.constexpr, LINES: gl.constexpr, REGISTERS: gl.constexpr,
):
    """x, y, out and mirror, which is out by other blocks, are descriptors of stacks; lines [K, P]; n_tiles a matrix."""
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    x_s = gl.allocate_shared_memory(x.dtype, [STAGES, BK, BM] if X_IS_KM else [STAGES, BM, BK], layout)
    y_s = gl.allocate_shared_memory(x.dtype, [STAGES, BK, BM] if Y_IS_KN else [STAGES, BM, BK], layout)
    p_s = gl.allocate_shared_memory(out.dtype, [2 if SYMMETRIC else 4, BM, BM // 2], layout)
    m_s = p_s
    if SYMMETRIC:
        m_s = gl.allocate_shared_memory(out.dtype, [2, BM // 2, BM], layout)
    full, empty, turn = new_barriers(STAGES, 1), new_barriers(STAGES, 1), new_barriers(2, 1)
    fence_async_shared()
    threads_meet()
    gdc_launch_dependents()
    gdc_wait()
    gl.warp_specialize([
        (_multiply, (
            0, x_s, y_s, out, mirror, p_s, m_s, full, empty, turn, lines, n_all, n_tiles, n_fast, n_k, alpha, beta, gamma, P,
            BM, STAGES, X_IS_KM, Y_IS_KN, ALONG_ROWS, SYMMETRIC, HAS_Z, LINES,
        )),
        (_multiply, (
            1, x_s, y_s, out, mirror, p_s, m_s, full, empty, turn, lines, n_all, n_tiles, n_fast, n_k, alpha, beta, gamma, P,
            BM, STAGES, X_IS_KM, Y_IS_KN, ALONG_ROWS, SYMMETRIC, HAS_Z, LINES,
        )),
        (_load, (
            x, y, x_s, y_s, full, empty, n_all, n_tiles, n_fast, n_k,
            BM, BK, STAGES, X_IS_KM, Y_IS_KN, ALONG_ROWS, SYMMETRIC, HAS_Z,
        )),
    ], [4, 1], [REGISTERS, 24])  # fmt: skip


def symmetric_product(
    x: Tensor, y: Tensor, out: Tensor, *, tall: bool = False, numbers: tuple[float, float, float] | None = None,
    lines: Tensor | None = None,
) -> None:
    """out [K, n, n] = α s² x yᵀ + β x + γ I, tall: α s² xᵀ y. numbers: γ, β, α, for a symmetric x; lines: parts of ‖·‖² for s."""
    gamma, beta, alpha = (0.0, 0.0, 1.0) if numbers is None else numbers
    side, n_k = ceil_div(out.shape[1], BM), ceil_div(x.shape[1] if tall else x.shape[2], BK)
    if numbers is not None:
        n_k = side * (BM // BK)  # whole tiles of x, with zeros at the end
    _launch(
        x, y, out, lines, n_tiles=side * (side + 1) // 2, n_fast=1, n_k=n_k, alpha=alpha, beta=beta, gamma=gamma,
        X_IS_KM=tall, Y_IS_KN=tall, ALONG_ROWS=True, SYMMETRIC=True, HAS_Z=numbers is not None,
    )


def product(x: Tensor, y: Tensor, out: Tensor, *, right_is_symmetric: bool, lines: Tensor | None = None) -> None:
    """out [K, r, c] = s · x y. The symmetric factor is the smaller one, and stays in L2 while the other one goes by."""
    n_r, n_c = ceil_div(out.shape[1], BM), ceil_div(out.shape[2], BM)
    _launch(
        x, y, out, lines, n_tiles=n_r * n_c, n_fast=n_c if right_is_symmetric else n_r, n_k=ceil_div(x.shape[2], BK),
        alpha=1.0, beta=0.0, gamma=0.0, X_IS_KM=False, Y_IS_KN=not right_is_symmetric, ALONG_ROWS=right_is_symmetric,
        SYMMETRIC=False, HAS_Z=False,
    )


def _launch(x: Tensor, y: Tensor, out: Tensor, lines: Tensor | None, *, n_tiles: int, **args: object) -> None:
    n_all = out.shape[0] * n_tiles
    launch_with_descriptors(
        _products_kernel, (min(n_all, n_processors(x.device)),), x.device,
        x=_blocks(x, args["X_IS_KM"]), y=_blocks(y, args["Y_IS_KN"]), out=_halves_of_tiles(out, False),
        mirror=_halves_of_tiles(out, True) if args["SYMMETRIC"] else None, lines=lines, n_all=n_all, n_tiles=n_tiles,
        P=1 if lines is None else lines.shape[1], BM=BM, BK=BK, STAGES=STAGES, LINES=LINES, REGISTERS=REGISTERS, **args,
        num_warps=4, num_stages=STAGES, maxnreg=AT_START, launch_pdl=True,
    )


def _blocks(x: Tensor, along_columns: bool) -> TensorDescriptor:
    return _descriptor(x, *((BK, BM) if along_columns else (BM, BK)))


def _halves_of_tiles(out: Tensor, mirrored: bool) -> TensorDescriptor:
    return _descriptor(out, *((BM // 2, BM) if mirrored else (BM, BM // 2)))


def _descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A stack by blocks as the copy engine takes them, zeros beyond the ends of each matrix."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, columns], gl.NVMMASharedLayout(128, 16, 3))
