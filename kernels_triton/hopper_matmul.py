"""Matrix products on Hopper whose result becomes something else while the tensor cores are already at the next one.

    capped_logits        e = exp(ẑ) · (1 − (ẑ / C)²) and sums of exp(ẑ), where ẑ = C · tanh(x wᵀ / C)    linear_cross_entropy.py
    relu2_product        y = relu(x wᵀ)²                                                                 matmul.py
    relu2_grad_product   dz = 2 √y · (dy w)                                                              matmul.py

One program a processor goes from tile to tile. Its warps have roles. One has the copy engine bring blocks of both factors,
BK terms of the sum at a time, into a ring in shared memory. Two groups of four warps take turns: each has every second tile
for its own, multiplies, and passes the turn on when its last product is issued. What it has to do with its sums falls into
the time in which the other group has the tensor cores, which hardly notice. To have each group multiply half of the rows of
every tile, the second some blocks behind the first, left most of that time to be seen.

Results leave in pieces of 64 columns, through shared memory and by the copy engine. Each value has one writer and each sum
one order, whoever is done first.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels_triton.attention.hopper.api import TensorDescriptor, gl, gluon, mbarrier, new_barriers
from kernels_triton.launch import ceil_div, launch_with_descriptors, n_processors
from kernels_triton.primitives import relu2, relu2_grad, tanh

from kernels_triton.attention.hopper.api import (  # isort: skip
    fence_async_shared, threads_meet, tma_load, tma_store, tma_store_wait, warpgroup_mma, warpgroup_mma_wait,
)


class Product(NamedTuple):
    """Tiles of BM × BN, BK terms of the sum at a time, `stages` blocks in the ring; `group` tiles of rows go over the columns
    together."""

    BM: int
    BN: int
    BK: int
    stages: int
    group: int


# H200, bf16, µs beside the kernel of linear_cross_entropy.py and cuBLAS alone, in the same turns; 4096 × D × 32768:
#     D = 384     180    259    174
#     D = 768     296    395    314
#     D = 1280    506    564    478
CAPPED_LOGITS = Product(BM=128, BN=128, BK=64, stages=6, group=32)

# µs, with group 32, with five stages and two buffers a group for what leaves; the kernel of matmul.py and cuBLAS alone:
#     65536 × 768 × 3072     401    421    434    438    422
#     32768 × 1280 × 5120    614    612    628    682    663
#     65536 × 384 × 1536     132    132    137    166    156
RELU2 = Product(BM=128, BN=128, BK=64, stages=6, group=8)

# µs, with group 16 and 32; half of the rows for each group (128 × 256, BK 32), the kernel of matmul.py (of another run) and
# cuBLAS alone:
#     65536 × 768 × 3072     470    475, 467    502    (591)    463
#     32768 × 1280 × 5120    633    647, 660    716    (791)    662
#     65536 × 384 × 1536     153    154, 155    180    (236)    150
RELU2_GRAD = Product(BM=128, BN=128, BK=64, stages=5, group=8)

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
def _behind(slot, phase, n_k, n: gl.constexpr):
    """The slot behind n_k blocks from this one on, and its phase."""
    slot += n_k % n
    phase ^= (n_k // n) & 1
    phase = gl.where(slot >= n, phase ^ 1, phase)
    return gl.where(slot >= n, slot - n, slot), phase


@gluon.jit
def _halves(b):
    BM: gl.constexpr = b.shape[0]
    BN: gl.constexpr = b.shape[1]
    return gl.split(gl.permute(gl.reshape(b, [BM, 2, BN // 2]), [0, 2, 1]))


@gluon.jit
def _load(
    a, b, a_s, b_s, full, empty, n_m, n_n, n_k, group,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, B_IS_KN: gl.constexpr,
):
    """One warp: a [M, K] and b, [N, K] or [K, N], block by block."""
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
            tma_load(a, [i_m * BM, k * BK], arrived, a_s.index(slot))
            slot, phase = _next(slot, phase, STAGES)


@gluon.jit
def _begin(W: gl.constexpr, n_k, STAGES: gl.constexpr):
    """Of the W-th group: its first tile, where in the ring that lies, and the phase of its first turn."""
    tile, slot, phase = gl.program_id(0), 0, 0
    if W == 1:
        tile += gl.num_programs(0)
        slot, phase = _behind(slot, phase, n_k, STAGES)
    return tile, slot, phase, 1 - W


@gluon.jit
def _product(
    W: gl.constexpr, a_s, b_s, full, empty, turn, taken, slot, phase, n_k, turn_phase,
    BN: gl.constexpr, STAGES: gl.constexpr, B_IS_KN: gl.constexpr,
):
    """The W-th group's sums, and where in the ring its next tile lies: the one after this is the other group's.
    `taken` is told when the tile before has left."""
    BM: gl.constexpr = a_s.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    mbarrier.wait(turn.index(W), turn_phase)
    b_c = gl.zeros([BM, BN], gl.float32, layout)                                                        # [BM, BN]
    mbarrier.wait(full.index(slot), phase)
    b_b = b_s.index(slot) if B_IS_KN else b_s.index(slot).permute((1, 0))
    b_c = warpgroup_mma(a_s.index(slot), b_b, b_c, use_acc=False, is_async=True)
    if taken is not None:
        tma_store_wait(0)
        mbarrier.arrive(taken.index(W), count=1)
    b_c = warpgroup_mma_wait(1, deps=[b_c])
    before = slot
    slot, phase = _next(slot, phase, STAGES)
    for _ in range(1, n_k):
        mbarrier.wait(full.index(slot), phase)
        b_b = b_s.index(slot) if B_IS_KN else b_s.index(slot).permute((1, 0))
        b_c = warpgroup_mma(a_s.index(slot), b_b, b_c, is_async=True)
        b_c = warpgroup_mma_wait(1, deps=[b_c])
        mbarrier.arrive(empty.index(before), count=1)
        before = slot
        slot, phase = _next(slot, phase, STAGES)
    mbarrier.arrive(turn.index(1 - W), count=1)
    b_c = warpgroup_mma_wait(0, deps=[b_c])
    mbarrier.arrive(empty.index(before), count=1)
    slot, phase = _behind(slot, phase, n_k, STAGES)
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
    """Four warps: every second tile."""
    first, slot, phase, turn_phase = _begin(W, n_k, STAGES)
    for i in range(first, n_m * n_n, 2 * gl.num_programs(0)):
        i_m, i_n = _place(i, n_m, n_n, group)
        b_z, slot, phase = _product(
            W, x_s, w_s, full, empty, turn, None, slot, phase, n_k, turn_phase, BN, STAGES, False,
        )
        turn_phase ^= 1
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
        (_load, (x, w, x_s, w_s, full, empty, n_m, n_n, n_k, group, BM, BN, BK, STAGES, False)),
    ], [4, 1], [REGISTERS, 24])  # fmt: skip


@gluon.jit
def _relu2_piece(b_z, y, y_s, row, col):
    """[BM, BN / 2] of x wᵀ: y is on its way."""
    b_y = relu2(b_z)
    tma_store_wait(0)  # the piece before has left the buffer
    threads_meet()
    _store(y, row, col, b_y, y_s)


@gluon.jit
def _relu2_tiles(
    W: gl.constexpr, x_s, w_s, y, y_s, full, empty, turn, n_m, n_n, n_k, group,
    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):
    """Four warps: every second tile."""
    first, slot, phase, turn_phase = _begin(W, n_k, STAGES)
    for i in range(first, n_m * n_n, 2 * gl.num_programs(0)):
        i_m, i_n = _place(i, n_m, n_n, group)
        b_z, slot, phase = _product(
            W, x_s, w_s, full, empty, turn, None, slot, phase, n_k, turn_phase, BN, STAGES, False,
        )
        turn_phase ^= 1
        b_left, b_right = _halves(b_z)                                                                  # [BM, BN / 2]
        _relu2_piece(b_left, y, y_s.index(W), i_m * BM, i_n * BN)
        _relu2_piece(b_right, y, y_s.index(W), i_m * BM, i_n * BN + BN // 2)
    tma_store_wait(0)


@gluon.jit(do_not_specialize=["n_m", "n_n", "n_k", "group"])
def _relu2_kernel(
    x, w, y, n_m, n_n, n_k, group,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):
    """x [N, D], w [F, D] and y [N, F] are descriptors."""
    x_s = gl.allocate_shared_memory(x.dtype, [STAGES, BM, BK], x.layout)
    w_s = gl.allocate_shared_memory(x.dtype, [STAGES, BN, BK], w.layout)
    y_s = gl.allocate_shared_memory(x.dtype, [2, BM, BN // 2], y.layout)
    full, empty, turn = new_barriers(STAGES, 1), new_barriers(STAGES, 1), new_barriers(2, 1)
    fence_async_shared()
    threads_meet()
    gl.warp_specialize([
        (_relu2_tiles, (0, x_s, w_s, y, y_s, full, empty, turn, n_m, n_n, n_k, group, BM, BN, STAGES)),
        (_relu2_tiles, (1, x_s, w_s, y, y_s, full, empty, turn, n_m, n_n, n_k, group, BM, BN, STAGES)),
        (_load, (x, w, x_s, w_s, full, empty, n_m, n_n, n_k, group, BM, BN, BK, STAGES, False)),
    ], [4, 1], [REGISTERS, 24])  # fmt: skip


@gluon.jit
def _load_y(
    y, y_s, full, taken, n_m, n_n, group,
    BM: gl.constexpr, BN: gl.constexpr,
):
    """One warp: y [BM, BN] of each tile in two pieces, when what was there before has left."""
    w, phase = 0, 0
    for i in range(gl.program_id(0), n_m * n_n, gl.num_programs(0)):
        i_m, i_n = _place(i, n_m, n_n, group)
        mbarrier.wait(taken.index(w), phase)
        mbarrier.expect(full.index(w), BM * BN * 2)
        tma_load(y, [i_m * BM, i_n * BN], full.index(w), y_s.index(2 * w))
        tma_load(y, [i_m * BM, i_n * BN + BN // 2], full.index(w), y_s.index(2 * w + 1))
        phase ^= w
        w ^= 1


@gluon.jit
def _grad_piece(b_dy, dz, y_s, row, col):
    """[BM, BN / 2] of dy w, where y_s has y: dz takes its place and is on its way."""
    b_dz = relu2_grad(b_dy, y_s.load(b_dy.type.layout).to(gl.float32))
    threads_meet()
    _store(dz, row, col, b_dz, y_s)


@gluon.jit
def _grad_tiles(
    W: gl.constexpr, dy_s, w_s, dz, y_s, full, empty, turn, y_full, y_taken, n_m, n_n, n_k, group,
    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):
    """Four warps: every second tile."""
    first, slot, phase, turn_phase = _begin(W, n_k, STAGES)
    y_phase = 0
    for i in range(first, n_m * n_n, 2 * gl.num_programs(0)):
        i_m, i_n = _place(i, n_m, n_n, group)
        b_dy, slot, phase = _product(
            W, dy_s, w_s, full, empty, turn, y_taken, slot, phase, n_k, turn_phase, BN, STAGES, True,
        )
        turn_phase ^= 1
        b_left, b_right = _halves(b_dy)                                                                 # [BM, BN / 2]
        mbarrier.wait(y_full.index(W), y_phase)
        y_phase ^= 1
        _grad_piece(b_left, dz, y_s.index(2 * W), i_m * BM, i_n * BN)
        _grad_piece(b_right, dz, y_s.index(2 * W + 1), i_m * BM, i_n * BN + BN // 2)
    tma_store_wait(0)


@gluon.jit(do_not_specialize=["n_m", "n_n", "n_k", "group"])
def _relu2_grad_kernel(
    dy, w, y, dz, n_m, n_n, n_k, group,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):
    """dy [N, D], w [D, F], y and dz [N, F], all descriptors."""
    dy_s = gl.allocate_shared_memory(dy.dtype, [STAGES, BM, BK], dy.layout)
    w_s = gl.allocate_shared_memory(dy.dtype, [STAGES, BK, BN], w.layout)
    y_s = gl.allocate_shared_memory(dy.dtype, [4, BM, BN // 2], y.layout)
    full, empty, turn = new_barriers(STAGES, 1), new_barriers(STAGES, 1), new_barriers(2, 1)
    y_full, y_taken = new_barriers(2, 1), new_barriers(2, 1)
    fence_async_shared()
    threads_meet()
    gl.warp_specialize([
        (_grad_tiles, (0, dy_s, w_s, dz, y_s, full, empty, turn, y_full, y_taken, n_m, n_n, n_k, group, BM, BN, STAGES)),
        (_grad_tiles, (1, dy_s, w_s, dz, y_s, full, empty, turn, y_full, y_taken, n_m, n_n, n_k, group, BM, BN, STAGES)),
        (_load, (dy, w, dy_s, w_s, full, empty, n_m, n_n, n_k, group, BM, BN, BK, STAGES, True)),
        (_load_y, (y, y_s, y_full, y_taken, n_m, n_n, group, BM, BN)),
    ], [4, 1, 1], [REGISTERS, 24, 24])  # fmt: skip


def takes(D: int, tile: Product) -> bool:
    """Whether a sum of D terms fills the ring: with fewer blocks it was not timed."""
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


def relu2_product(x: Tensor, w: Tensor) -> Tensor:
    """x [N, D], w [F, D] → relu(x wᵀ)² [N, F]. torch.compile sees an operator: it cannot trace a kernel that is not tl's."""
    return _relu2_operator(x, w) if torch.compiler.is_compiling() else _relu2(x, w)


def _relu2(x: Tensor, w: Tensor) -> Tensor:
    (N, D), F, t = x.shape, w.shape[0], RELU2
    n_m, n_n = ceil_div(N, t.BM), ceil_div(F, t.BN)
    y = torch.empty((N, F), dtype=x.dtype, device=x.device)
    launch_with_descriptors(
        _relu2_kernel, _programs(n_m * n_n, x), x.device,
        x=_blocks(x, t.BM, t.BK), w=_blocks(w, t.BN, t.BK), y=_blocks(y, t.BM, t.BN // 2),
        n_m=n_m, n_n=n_n, n_k=ceil_div(D, t.BK), group=t.group,
        BM=t.BM, BN=t.BN, BK=t.BK, STAGES=t.stages, REGISTERS=REGISTERS, num_warps=4, num_stages=t.stages,
    )
    return y


@torch.library.custom_op("kestrel::hopper_relu2", mutates_args=())
def _relu2_operator(x: Tensor, w: Tensor) -> Tensor:
    return _relu2(x, w)


@_relu2_operator.register_fake
def _(x: Tensor, w: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[0])


def relu2_grad_product(dy: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """dy [N, D], w [D, F], y [N, F] → dz [N, F]. As an operator for torch.compile, too."""
    return _relu2_grad_operator(dy, w, y) if torch.compiler.is_compiling() else _relu2_grad(dy, w, y)


def _relu2_grad(dy: Tensor, w: Tensor, y: Tensor) -> Tensor:
    (N, D), F, t = dy.shape, w.shape[1], RELU2_GRAD
    n_m, n_n = ceil_div(N, t.BM), ceil_div(F, t.BN)
    dz = torch.empty_like(y)
    launch_with_descriptors(
        _relu2_grad_kernel, _programs(n_m * n_n, dy), dy.device,
        dy=_blocks(dy, t.BM, t.BK), w=_blocks(w, t.BK, t.BN), y=_blocks(y, t.BM, t.BN // 2),
        dz=_blocks(dz, t.BM, t.BN // 2), n_m=n_m, n_n=n_n, n_k=ceil_div(D, t.BK), group=t.group,
        BM=t.BM, BN=t.BN, BK=t.BK, STAGES=t.stages, REGISTERS=REGISTERS, num_warps=4, num_stages=t.stages,
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
