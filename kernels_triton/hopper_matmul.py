"""Matrix products on Hopper whose result becomes something else while the tensor cores are already at the next one.

    capped_logits        e = exp(ẑ) · (1 − (ẑ / C)²) and sums of exp(ẑ), where ẑ = C · tanh(x wᵀ / C)    linear_cross_entropy.py
    relu2_grad_product   dz = 2 √y · (dy w)                                                              matmul.py

One program a processor goes from tile to tile. Its warps have roles. One has the copy engine bring blocks of both factors,
BK terms of the sum at a time, into a ring in shared memory. Two groups of four warps multiply, and what they have to do with
their sums is to fall into the time in which the other group has the tensor cores:

    in turns    each group has every second tile for its own, and passes the turn on when its last product is issued
    LAG > 0     each group has half of the rows of every tile, so that one block of columns serves both, and the second
                group starts LAG blocks after the first: it still has some to multiply when the first is through

In turns the tensor cores hardly notice the exponentials; with LAG, whatever it is, most of them is still seen. relu2_grad_product
needs room for y and was tried with LAG only.

Results leave in pieces of 64 columns, through shared memory and by the copy engine. Each value has one writer and each sum
one order, whoever is done first.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels_triton.attention.hopper.api import TensorDescriptor, gl, gluon, mbarrier, new_barriers
from kernels_triton.launch import ceil_div, launch_with_descriptors, n_processors
from kernels_triton.primitives import relu2_grad, tanh

from kernels_triton.attention.hopper.api import (  # isort: skip
    fence_async_shared, threads_meet, tma_load, tma_store, tma_store_wait, warpgroup_mma, warpgroup_mma_wait,
)


class Product(NamedTuple):
    """Tiles of BM × BN, BK terms of the sum at a time, `stages` blocks in the ring; `group` tiles of rows go over the columns
    together. LAG: see above, 0 is in turns."""

    BM: int
    BN: int
    BK: int
    stages: int
    LAG: int
    group: int


# H200, bf16, µs beside the kernel of linear_cross_entropy.py and cuBLAS alone, in the same turns; 4096 × D × 32768:
#     D = 384     180    128 × 256 with LAG 1, 2, 3: 231, 229, 233, BK 32 with LAG 5: 216, without LAG 220     259    174
#     D = 768     296    384, 383, 384, 369, 378                                                               395    314
#     D = 1280    506    553, 555, 553, 547, 547                                                               564    478
# Half of the exponentials from a polynomial, with LAG 2: 229, 377, 546.
CAPPED_LOGITS = Product(BM=128, BN=128, BK=64, stages=6, LAG=0, group=32)

# µs beside the kernel of matmul.py and cuBLAS alone:
#     65536 × 768 × 3072     493    LAG 2 498, group 16 497, BK 64 with 3 stages 527    581    432
#     32768 × 1280 × 5120    679    677, 677, 732                                       791    624
#     65536 × 384 × 1536     182    188, 184, 208                                       236    157
RELU2_GRAD = Product(BM=128, BN=256, BK=32, stages=6, LAG=3, group=8)

REGISTERS = 240  # a thread of a group, 24 one of the warps that load: together all that a processor has


@gluon.jit
def _place(i, n_m, n_n, group):
    """Row and column of the i-th tile: down a column for `group` tiles, then the next, so that what is read again is in L2."""
    i_g, i_r = i // (group * n_n), i % (group * n_n)
    n_g = gl.minimum(n_m - i_g * group, group)
    return i_g * group + i_r % n_g, i_r // n_g


@gluon.jit
def _next(slot, phase, n: gl.constexpr):
    """The slot after this one in a ring of n, and its phase, which changes each time around."""
    slot += 1
    return gl.where(slot == n, 0, slot), gl.where(slot == n, phase ^ 1, phase)


@gluon.jit
def _quarters(b):
    """[64, BN] → four pieces [64, BN / 4], in the registers in which they are."""
    left, right = _halves(b)
    b_0, b_1 = _halves(left)
    b_2, b_3 = _halves(right)
    return b_0, b_1, b_2, b_3


@gluon.jit
def _halves(b):
    BM: gl.constexpr = b.shape[0]
    BN: gl.constexpr = b.shape[1]
    return gl.split(gl.permute(gl.reshape(b, [BM, 2, BN // 2]), [0, 2, 1]))


@gluon.jit
def _load(
    a, b, a_s, b_s, full, empty, n_m, n_n, n_k, group,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, B_IS_KN: gl.constexpr,
):
    """One warp: a [M, K], in PARTS for as many groups, and b, [N, K] or [K, N], block by block."""
    PM: gl.constexpr = BM // PARTS
    slot, phase = 0, 1
    for i in range(gl.program_id(0), n_m * n_n, gl.num_programs(0)):
        i_m, i_n = _place(i, n_m, n_n, group)
        for k in range(n_k):
            mbarrier.wait(empty.index(slot), phase)
            arrived = full.index(slot)
            mbarrier.expect(arrived, (BM + BN) * BK * 2)
            if B_IS_KN:
                tma_load(b, [k * BK, i_n * BN], arrived, b_s.index(slot))
            else:
                tma_load(b, [i_n * BN, k * BK], arrived, b_s.index(slot))
            for w in gl.static_range(PARTS):
                tma_load(a, [i_m * BM + w * PM, k * BK], arrived, a_s.index(slot * PARTS + w))
            slot, phase = _next(slot, phase, STAGES)


@gluon.jit
def _product(
    W: gl.constexpr, a_s, b_s, full, empty, turn, taken, slot, phase, n_k, turn_phase,
    BN: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, LAG: gl.constexpr, B_IS_KN: gl.constexpr,
):
    """The W-th group's sums, and where the ring is after them. In PARTS of a tile the second group starts LAG blocks after the
    first, else they take turns. `taken` is told when the tile before has left."""
    PM: gl.constexpr = a_s.shape[1]
    P: gl.constexpr = W if PARTS == 2 else 0
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    if PARTS == 1:
        mbarrier.wait(turn.index(W), turn_phase)
    elif W == 1:
        mbarrier.wait(turn.index(0), turn_phase)
    b_c = gl.zeros([PM, BN], gl.float32, layout)                                                        # [PM, BN]
    mbarrier.wait(full.index(slot), phase)
    b_b = b_s.index(slot) if B_IS_KN else b_s.index(slot).permute((1, 0))
    b_c = warpgroup_mma(a_s.index(slot * PARTS + P), b_b, b_c, use_acc=False, is_async=True)
    if taken is not None:
        tma_store_wait(0)
        mbarrier.arrive(taken.index(W), count=1)
    b_c = warpgroup_mma_wait(1, deps=[b_c])
    before = slot
    slot, phase = _next(slot, phase, STAGES)
    for k in range(1, n_k):
        mbarrier.wait(full.index(slot), phase)
        b_b = b_s.index(slot) if B_IS_KN else b_s.index(slot).permute((1, 0))
        b_c = warpgroup_mma(a_s.index(slot * PARTS + P), b_b, b_c, is_async=True)
        if PARTS == 2 and W == 0:
            mbarrier.arrive(turn.index(0), count=1, pred=k == LAG)
        b_c = warpgroup_mma_wait(1, deps=[b_c])
        mbarrier.arrive(empty.index(before), count=1)
        before = slot
        slot, phase = _next(slot, phase, STAGES)
    if PARTS == 1:
        mbarrier.arrive(turn.index(1 - W), count=1)
    b_c = warpgroup_mma_wait(0, deps=[b_c])
    mbarrier.arrive(empty.index(before), count=1)
    return b_c, slot, phase


@gluon.jit
def _store(y, row, col, b_y, buffer):
    """A piece by way of the buffer, which nothing uses any more."""
    buffer.store(b_y.to(y.dtype))
    fence_async_shared()
    threads_meet()
    tma_store(y, [row, col], buffer)


@gluon.jit
def _exp2(x):
    """gl.exp2, opaque to the compiler: what was measured."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _capped_piece(
    b_z, e, e_s, row, col, inverse_cap, cap_in_bits, V,
    MASKED: gl.constexpr,
):
    """[BM, BN / 2] of logits → the sums of their exponentials, [BM]; e, if it is wanted, is on its way."""
    b_t = tanh(b_z * inverse_cap, True)
    b_e = _exp2(b_t * cap_in_bits)
    if MASKED:
        o_v = col + gl.arange(0, b_z.shape[1], gl.SliceLayout(0, b_z.type.layout))
        b_e = gl.where((o_v < V)[None, :], b_e, 0.0)
    b_sum = gl.sum(b_e, 1)                                                                              # [BM]
    if e is not None:
        tma_store_wait(0)  # the piece before has left the buffer
        threads_meet()
        _store(e, row, col, b_e * (1 - b_t * b_t), e_s)
    return b_sum


@gluon.jit
def _capped_tiles(
    W: gl.constexpr, x_s, w_s, e, e_s, sums, full, empty, turn, N, V, n_m, n_n, n_k, group, inverse_cap, cap_in_bits,
    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr,
):
    """Four warps: every second tile, beginning with the W-th, whose blocks lie in the ring behind those of the tile before."""
    slot, phase, turn_phase = 0, 0, 0
    first, step = gl.program_id(0), gl.num_programs(0)
    if W == 1:
        slot = n_k % STAGES
        phase = (n_k // STAGES) & 1
        first += step
    if W == 0:
        turn_phase = 1
    step *= 2
    for i in range(first, n_m * n_n, step):
        i_m, i_n = _place(i, n_m, n_n, group)
        b_z, slot, phase = _product(
            W, x_s, w_s, full, empty, turn, None, slot, phase, n_k, turn_phase, BN, STAGES, 1, 0, False,
        )
        turn_phase ^= 1
        slot += n_k % STAGES
        phase ^= (n_k // STAGES) & 1
        phase = gl.where(slot >= STAGES, phase ^ 1, phase)
        slot = gl.where(slot >= STAGES, slot - STAGES, slot)
        row, col = i_m * BM, i_n * BN
        b_left, b_right = _halves(b_z)                                                                  # [BM, BN / 2]
        b_sum = _capped_piece(b_left, e, e_s.index(W), row, col, inverse_cap, cap_in_bits, V, MASKED)
        b_sum += _capped_piece(b_right, e, e_s.index(W), row, col + BN // 2, inverse_cap, cap_in_bits, V, MASKED)
        o_t = row + gl.arange(0, BM, b_sum.type.layout)
        gl.store(sums + o_t.to(gl.int64) * n_n + i_n, b_sum, mask=o_t < N)
    tma_store_wait(0)


@gluon.jit(do_not_specialize=["N", "V", "n_m", "n_n", "n_k", "group"])
def _capped_logits_kernel(
    x, w, e, sums, N, V, n_m, n_n, n_k, group, inverse_cap, cap_in_bits,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr, REGISTERS: gl.constexpr,
):
    """x [N, D], w [Vp, D] and e [N, Vp] or None are descriptors; sums [N, n_n]."""
    x_s = gl.allocate_shared_memory(x.dtype, [STAGES, BM, BK], x.layout)
    w_s = gl.allocate_shared_memory(x.dtype, [STAGES, BN, BK], w.layout)
    e_s = gl.allocate_shared_memory(x.dtype, [2, BM, BN // 2], gl.NVMMASharedLayout(128, 16, 2))
    full, empty, turn = new_barriers(STAGES, 1), new_barriers(STAGES, 1), new_barriers(2, 1)
    fence_async_shared()
    threads_meet()
    gl.warp_specialize([
        (_capped_tiles, (
            0, x_s, w_s, e, e_s, sums, full, empty, turn, N, V, n_m, n_n, n_k, group, inverse_cap, cap_in_bits,
            BM, BN, STAGES, MASKED,
        )),
        (_capped_tiles, (
            1, x_s, w_s, e, e_s, sums, full, empty, turn, N, V, n_m, n_n, n_k, group, inverse_cap, cap_in_bits,
            BM, BN, STAGES, MASKED,
        )),
        (_load, (x, w, x_s, w_s, full, empty, n_m, n_n, n_k, group, BM, BN, BK, STAGES, 1, False)),
    ], [4, 1], [REGISTERS, 24])  # fmt: skip


@gluon.jit
def _load_y(
    y, y_s, full, taken, n_m, n_n, group,
    BM: gl.constexpr, BN: gl.constexpr,
):
    """One warp: y [BM, BN] of each tile in eight pieces, each half when what was there before has left."""
    phase = 0
    for i in range(gl.program_id(0), n_m * n_n, gl.num_programs(0)):
        i_m, i_n = _place(i, n_m, n_n, group)
        for w in gl.static_range(2):
            mbarrier.wait(taken.index(w), phase)
            mbarrier.expect(full.index(w), BM // 2 * BN * 2)
            for j in gl.static_range(4):
                tma_load(y, [i_m * BM + w * (BM // 2), i_n * BN + j * (BN // 4)], full.index(w), y_s.index(4 * w + j))
        phase ^= 1


@gluon.jit
def _grad_piece(b_dy, dz, y_s, row, col):
    """[BM / 2, PIECE] of dy w, where y_s has y: dz takes its place and is on its way."""
    b_dz = relu2_grad(b_dy, y_s.load(b_dy.type.layout).to(gl.float32))
    threads_meet()
    _store(dz, row, col, b_dz, y_s)


@gluon.jit
def _grad_tiles(
    W: gl.constexpr, a_s, b_s, dz, y_s, full, empty, turn, y_full, y_taken, n_m, n_n, n_k, group,
    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, LAG: gl.constexpr,
):
    """Four warps: half of each tile."""
    P: gl.constexpr = BN // 4
    slot, phase, i_phase = 0, 0, 0
    for i in range(gl.program_id(0), n_m * n_n, gl.num_programs(0)):
        i_m, i_n = _place(i, n_m, n_n, group)
        b_dy, slot, phase = _product(
            W, a_s, b_s, full, empty, turn, y_taken, slot, phase, n_k, i_phase, BN, STAGES, 2, LAG, True,
        )
        row, col = i_m * BM + W * (BM // 2), i_n * BN
        b_0, b_1, b_2, b_3 = _quarters(b_dy)                                                            # [BM / 2, P]
        mbarrier.wait(y_full.index(W), i_phase)
        i_phase ^= 1
        _grad_piece(b_0, dz, y_s.index(4 * W), row, col)
        _grad_piece(b_1, dz, y_s.index(4 * W + 1), row, col + P)
        _grad_piece(b_2, dz, y_s.index(4 * W + 2), row, col + 2 * P)
        _grad_piece(b_3, dz, y_s.index(4 * W + 3), row, col + 3 * P)
    tma_store_wait(0)


@gluon.jit(do_not_specialize=["n_m", "n_n", "n_k", "group"])
def _relu2_grad_kernel(
    dy, w, y, dz, n_m, n_n, n_k, group,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, LAG: gl.constexpr, REGISTERS: gl.constexpr,
):
    """dy [N, D], w [D, F], y and dz [N, F], all descriptors."""
    dy_s = gl.allocate_shared_memory(dy.dtype, [2 * STAGES, BM // 2, BK], dy.layout)
    w_s = gl.allocate_shared_memory(dy.dtype, [STAGES, BK, BN], w.layout)
    y_s = gl.allocate_shared_memory(dy.dtype, [8, BM // 2, BN // 4], y.layout)
    full, empty, turn = new_barriers(STAGES, 1), new_barriers(STAGES, 2), new_barriers(1, 1)
    y_full, y_taken = new_barriers(2, 1), new_barriers(2, 1)
    fence_async_shared()
    threads_meet()
    gl.warp_specialize([
        (_grad_tiles, (
            0, dy_s, w_s, dz, y_s, full, empty, turn, y_full, y_taken, n_m, n_n, n_k, group, BM, BN, STAGES, LAG,
        )),
        (_grad_tiles, (
            1, dy_s, w_s, dz, y_s, full, empty, turn, y_full, y_taken, n_m, n_n, n_k, group, BM, BN, STAGES, LAG,
        )),
        (_load, (dy, w, dy_s, w_s, full, empty, n_m, n_n, n_k, group, BM, BN, BK, STAGES, 2, True)),
        (_load_y, (y, y_s, y_full, y_taken, n_m, n_n, group, BM, BN)),
    ], [4, 1, 1], [REGISTERS, 24, 24])  # fmt: skip


def takes(D: int, tile: Product) -> bool:
    """Whether a sum of D terms fills the ring: with fewer blocks the first group could tell the second twice before it looks,
    and in turns it was not tried."""
    return ceil_div(D, tile.BK) >= tile.stages


def capped_logits(x: Tensor, w: Tensor, e: Tensor | None, V: int, C: float) -> Tensor:
    """x [N, D], w [Vp, D] → sums of exp(ẑ) over BN columns each, those before V: [N, tiles]; e [N, Vp] is filled if there is one."""
    (N, D), t = x.shape, CAPPED_LOGITS
    n_m, n_n = ceil_div(N, t.BM), ceil_div(w.shape[0], t.BN)
    sums = torch.empty((N, n_n), dtype=torch.float32, device=x.device)
    launch_with_descriptors(
        _capped_logits_kernel, _programs(n_m * n_n, x), x.device,
        x=_blocks(x, t.BM, t.BK), w=_blocks(w, t.BN, t.BK), e=e if e is None else _blocks(e, t.BM, t.BN // 2), sums=sums,
        N=N, V=V, n_m=n_m, n_n=n_n, n_k=ceil_div(D, t.BK), group=t.group, inverse_cap=1 / C, cap_in_bits=C * math.log2(math.e),
        BM=t.BM, BN=t.BN, BK=t.BK, STAGES=t.stages, MASKED=V % t.BN != 0, REGISTERS=REGISTERS, num_warps=4, num_stages=t.stages,
    )
    return sums


def relu2_grad_product(dy: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """dy [N, D], w [D, F], y [N, F] → dz [N, F]. torch.compile sees an operator: it cannot trace a kernel that is not tl's."""
    return _relu2_grad_operator(dy, w, y) if torch.compiler.is_compiling() else _relu2_grad(dy, w, y)


def _relu2_grad(dy: Tensor, w: Tensor, y: Tensor) -> Tensor:
    (N, D), F, t = dy.shape, w.shape[1], RELU2_GRAD
    n_m, n_n = ceil_div(N, t.BM), ceil_div(F, t.BN)
    dz = torch.empty_like(y)
    launch_with_descriptors(
        _relu2_grad_kernel, _programs(n_m * n_n, dy), dy.device,
        dy=_blocks(dy, t.BM // 2, t.BK), w=_blocks(w, t.BK, t.BN), y=_blocks(y, t.BM // 2, t.BN // 4),
        dz=_blocks(dz, t.BM // 2, t.BN // 4), n_m=n_m, n_n=n_n, n_k=ceil_div(D, t.BK), group=t.group,
        BM=t.BM, BN=t.BN, BK=t.BK, STAGES=t.stages, LAG=t.LAG, REGISTERS=REGISTERS, num_warps=4, num_stages=t.stages,
    )
    return dz


@torch.library.custom_op("kestrel::hopper_relu2_grad", mutates_args=())
def _relu2_grad_operator(dy: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return _relu2_grad(dy, w, y)


@_relu2_grad_operator.register_fake
def _(dy: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return torch.empty_like(y)


def _programs(tiles: int, x: Tensor) -> tuple[int]:
    return (min(tiles, n_processors(x.device)),)


def _blocks(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """x by blocks as the copy engine takes them, zeros beyond its ends."""
    layout = gl.NVMMASharedLayout(min(128, 2 * columns), 16, 2)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns], layout)
