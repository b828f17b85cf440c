"""Forward on Hopper: out and lse as the portable kernel makes them, one program a processor that stays until all is done.

Its warps have roles. One warp has the copy engine bring queries, and keys and values tile by tile, into rings in shared
memory. Two groups of four warps take 64 queries each and do the products, whose scores, p and sums stay in registers:

    s_j = q k_jᵀ    issued first,
    o += p_{j−1} v_{j−1}    right behind it, so that it runs while
    p_j, m, l    are made of s_j.

The tiles of queries a program takes follow one another without a gap: the first scores of the next are made beside the last
product of this one, as if they were tiles of keys of one row. While one group makes its p the other has the tensor cores; where
that is faster they take turns, each handing over once it has issued its two products. A ring's slot holds a tile of keys and the
values of the one before; it is full when the copy engine has brought all its bytes, and empty again when both groups say so.

Programs take tiles of queries in an order fixed by the shapes, the longest first and back and forth (0 … n − 1, n − 1 … 0), so
that each gets as much work as the others within a percent. Nothing depends on who is faster; no two write the same value.
"""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kernels_triton.attention.hopper.api import TensorDescriptor, as_box, gl, gluon, mbarrier, new_barriers
from kernels_triton.attention.primitives import edge, keys_of, place
from kernels_triton.attention.tiles import LSE, document_bounds, padded
from kernels_triton.launch import FORGET_AFTER, ceil_div, n_processors

from kernels_triton.attention.hopper.api import (  # isort: skip
    fence_async_shared, threads_meet, tma_load, tma_store, tma_store_wait, warpgroup_mma, warpgroup_mma_wait,
)


class Tile(NamedTuple):
    """BT queries, half of them for each group, by BS keys at a time, `stages` tiles of keys and as many of values on their
    way. The groups take turns with a window, and without one up to so many keys; beyond, each goes its own pace."""

    BT: int
    BS: int
    stages: int
    turns_up_to: int


# Up to a width of head. TFLOP/s on an H200, bf16, in brackets cuDNN's in the same turns (clocks differ from run to run):
TILES = {
    64: Tile(BT=128, BS=128, stages=3, turns_up_to=0),      # B32 T2048 H12: 412 (404), taking turns 410
    128: Tile(BT=128, BS=128, stages=2, turns_up_to=4096),  # B32 T2048 H6: 578 (539), window 768: 440
                                                            # B16 T2048 H16: 581 (546)
                                                            # B4 T8192 H16: 644 (541), taking turns 636, window 2048: 592
                                                            # B4 T8192 H16 on 4 heads of keys: 687 (592)
                                                            # B1 T32768 H16: 661 (561)
}
WIDEST_HEAD = 128
GROUPS = 2

REGISTERS = 240  # a thread of a group, 24 one of the warp that loads: together all that a processor has


@gluon.jit
def _program(r, n_programs):
    """Which tile this program takes r-th."""
    i_p = gl.program_id(0)
    return r * n_programs + gl.where(r % 2 == 0, i_p, n_programs - 1 - i_p)


@gluon.jit
def _rounds(n_items):
    """How many tiles this program takes."""
    n_programs = gl.num_programs(0)
    n = (n_items + n_programs - 1) // n_programs
    return n - gl.where(_program(n - 1, n_programs) < n_items, 0, 1)


@gluon.jit
def _item(
    r, bounds, Tq, Tk, n_heads, n_together, window, H,
    BT: gl.constexpr, BS: gl.constexpr,
):
    """The r-th tile: its first query, row and head; and its keys' a, b, c, end of keys_of, the last tile among those masked."""
    n_t = (Tq + BT - 1) // BT
    i_p, i_bh = place(_program(r, gl.num_programs(0)), n_t, n_heads, n_together)
    i_bh = i_bh.to(gl.int32)
    i_t, i_b = n_t - 1 - i_p, i_bh // H
    p_bounds = None
    if bounds is not None:
        p_bounds = bounds + (i_b.to(gl.int64) * n_t + i_t) * 4
    a, b, c, end = keys_of(i_t * BT, Tq, Tk, window, p_bounds, BT, BS)
    c = gl.minimum(c, end - 1)
    return i_t * BT, i_b, i_bh % H, a, gl.minimum(b, c), c, end


@gluon.jit
def _keys(j, a, b, c, end):
    """The j-th tile of keys of an item: those masked first."""
    n_edge = end - c + b - a
    return gl.where(j < n_edge, edge(j, a, b, c, end), b + j - n_edge)


@gluon.jit
def _bring(x, i_b, t0, i_h, full, s):
    """The tokens of a head from t0 on to s [rows, BD]; `full` is told."""
    BYTES: gl.constexpr = s.shape[0] * s.shape[1] * 2
    mbarrier.expect(full, BYTES)
    tma_load(x, [i_b, t0, i_h, 0], full, as_box(s, x))


@gluon.jit
def _load(
    q, k, v, q_s, k_s, v_s, q_full, q_empty, k_full, v_full, empty, bounds,
    Tq, Tk, n_items, n_heads, n_together, window, H, GROUP,
    BT: gl.constexpr, BS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
):
    """The warp that loads, in the order in which the groups of warps compute: with a tile of keys the values of the one before."""
    BQ: gl.constexpr = BT // N
    n, v_b, v_t, v_h = 0, 0, 0, 0
    for r in range(_rounds(n_items)):
        t0, i_b, i_h, a, b, c, end = _item(r, bounds, Tq, Tk, n_heads, n_together, window, H, BT, BS)
        for w in gl.static_range(N):
            slot = r % 2 * N + w
            mbarrier.wait(q_empty.index(slot), ((r // 2) & 1) ^ 1)
            _bring(q, i_b, t0 + w * BQ, i_h, q_full.index(slot), q_s.index(slot))
        for j in range(end - a):
            slot = n % STAGES
            mbarrier.wait(empty.index(slot), ((n // STAGES) & 1) ^ 1)
            s0 = BS * _keys(j, a, b, c, end)
            _bring(k, i_b, s0, i_h // GROUP, k_full.index(slot), k_s.index(slot))
            if n > 0:
                _bring(v, v_b, v_t, v_h, v_full.index(slot), v_s.index(slot))
            else:
                mbarrier.arrive(v_full.index(slot), count=1)
            v_b, v_t, v_h = i_b, s0, i_h // GROUP
            n += 1
    slot = n % STAGES
    mbarrier.wait(empty.index(slot), ((n // STAGES) & 1) ^ 1)
    mbarrier.arrive(k_full.index(slot), count=1)
    _bring(v, v_b, v_t, v_h, v_full.index(slot), v_s.index(slot))


@gluon.jit
def _softmax(
    i_s, b_s, b_m, C, o_p, b_id, p_ids, stride_it, Tk, window, masked,
    BS: gl.constexpr,
):
    """Scores of the i_s-th tile of keys → p before it is divided by l, the new maximum, and by what l and o shrink."""
    if masked:
        o_s = gl.arange(0, BS, gl.SliceLayout(0, b_s.type.layout))                                      # [BS]
        o_r = o_p - i_s * BS  # as seen from the first key
        m = o_s[None, :] <= o_r[:, None]                                                                # [BQ, BS]
        if window is not None:
            m = m & (o_s[None, :] >= (o_r - window)[:, None])
        if p_ids is not None:
            b_ids = gl.load(p_ids + gl.minimum(i_s * BS + o_s, Tk - 1).to(gl.int64) * stride_it)        # [BS]
            m = m & (b_id[:, None] == b_ids[None, :])
        b_s = gl.where(m, b_s, -float("inf"))                                                           # [BQ, BS]
    b_max = gl.maximum(b_m, gl.max(b_s, 1) * C)                                                         # [BQ]
    return gl.exp2(b_s * C - b_max[:, None]), b_max, gl.exp2(b_m - b_max)


@gluon.jit
def _step(
    i_s, n, b_p, b_r, b_o, b_m, b_l, q_s, k_s, v_s, k_full, v_full, empty, turn,
    C, o_p, b_id, p_ids, stride_it, Tk, window, masked,
    W: gl.constexpr, N: gl.constexpr, BS: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr, LAYOUT: gl.constexpr,
):
    """The n-th tile of keys of all, i_s-th of its item, is scored; the tile before it joins b_o.

    b_p is of that one, in fp32, and b_o still lacks the factor b_r: neither holds up the product of queries and keys.
    """
    BQ: gl.constexpr = q_s.shape[0]
    slot, after = n % STAGES, (n + 1) % STAGES
    b_s = gl.zeros([BQ, BS], gl.float32, LAYOUT)
    if TURNS:
        mbarrier.wait(turn.index(W), (n - W) & 1)
    b_s = warpgroup_mma(q_s, k_s.index(slot).permute((1, 0)), b_s, use_acc=False, is_async=True)        # [BQ, BS]
    mbarrier.wait(v_full.index(slot), (n // STAGES) & 1)
    b_o = b_o * gl.convert_layout(b_r, gl.SliceLayout(1, b_o.type.layout))[:, None]                     # [BQ, BD]
    b_a = gl.convert_layout(b_p.to(q_s.dtype), gl.DotOperandLayout(0, b_o.type.layout, 2))              # [BQ, BS]
    b_o = warpgroup_mma(b_a, v_s.index(slot), b_o, is_async=True)                                       # [BQ, BD]
    if TURNS:
        mbarrier.arrive(turn.index((W + 1) % N), count=1)
    b_s = warpgroup_mma_wait(1, deps=[b_s])
    b_p, b_max, b_r = _softmax(i_s, b_s, b_m, C, o_p, b_id, p_ids, stride_it, Tk, window, masked, BS)
    b_l = b_l * b_r + gl.sum(b_p, 1)                                                                    # [BQ]
    # Here, because ptxas moves no instruction across a branch: else b_o would be awaited before the softmax.
    mbarrier.wait(k_full.index(after), ((n + 1) // STAGES) & 1)
    b_o, b_a = warpgroup_mma_wait(0, deps=[b_o, b_a])
    mbarrier.arrive(empty.index(slot), count=1)
    return b_p, b_r, b_o, b_max, b_l


@gluon.jit
def _queries(
    t0, Tq, Tk,
    BQ: gl.constexpr, LAYOUT: gl.constexpr,
):
    """The BQ queries from t0 on, and their positions."""
    o_t = t0 + gl.arange(0, BQ, gl.SliceLayout(1, LAYOUT))                                              # [BQ]
    return o_t, gl.minimum(Tk - Tq + o_t, Tk - 1)  # rows beyond the last query see what it sees


@gluon.jit
def _ids(doc_ids, i_b, o_t, stride_ib, stride_it, Tq):
    """Where the ids of a row are, and those of its tokens o_t."""
    p_ids = doc_ids + i_b.to(gl.int64) * stride_ib
    return p_ids, gl.load(p_ids + gl.minimum(o_t, Tq - 1).to(gl.int64) * stride_it)                     # [BQ]


@gluon.jit
def _compute(
    W: gl.constexpr, out, q_s, k_s, v_s, o_s, q_full, q_empty, k_full, v_full, empty, turn,
    lse, doc_ids, bounds, stride_ib, stride_it, C, Tq, Tp, Tk, n_items, n_heads, n_together, window, H,
    BT: gl.constexpr, BS: gl.constexpr, BD: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
):
    """The W-th of N groups of four warps: the W-th part of the queries of each tile.

    One loop for all tiles of keys, masked or not: ptxas 12.8 computes what it needs of a slot of queries before the first
    of two loops, and where that one has no turn the second finds the slot before.
    """
    BQ: gl.constexpr = BT // N
    dtype: gl.constexpr = q_s.dtype
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BS, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BD, 16])
    o_s, rounds = o_s.index(W), _rounds(n_items)
    t0, i_b, i_h, a, b, c, end = _item(0, bounds, Tq, Tk, n_heads, n_together, window, H, BT, BS)
    t0 += W * BQ
    o_t, o_p = _queries(t0, Tq, Tk, BQ, S)
    p_ids, b_id = None, None
    if doc_ids is not None:
        p_ids, b_id = _ids(doc_ids, i_b, o_t, stride_ib, stride_it, Tq)
    b_o = gl.zeros([BQ, BD], gl.float32, O)                                                             # [BQ, BD]
    b_m = gl.full([BQ], -3e38, gl.float32, gl.SliceLayout(1, S))  # not -inf, lest a difference be NaN
    mbarrier.wait(q_full.index(W), 0)
    mbarrier.wait(k_full.index(0), 0)
    b_s = gl.zeros([BQ, BS], gl.float32, S)
    b_s = warpgroup_mma(q_s.index(W), k_s.index(0).permute((1, 0)), b_s, use_acc=False, is_async=True)
    b_s = warpgroup_mma_wait(0, deps=[b_s])                                                             # [BQ, BS]
    mbarrier.arrive(empty.index(0), count=1)
    b_p, b_m, b_r = _softmax(c, b_s, b_m, C, o_p, b_id, p_ids, stride_it, Tk, window, True, BS)
    b_l = gl.sum(b_p, 1)                                                                                # [BQ]
    mbarrier.wait(k_full.index(1 % STAGES), (1 // STAGES) & 1)
    n = 1
    for r in range(rounds):
        slot = r % 2 * N + W
        for j in range(1, end - a):
            b_p, b_r, b_o, b_m, b_l = _step(
                _keys(j, a, b, c, end), n, b_p, b_r, b_o, b_m, b_l, q_s.index(slot), k_s, v_s, k_full, v_full, empty, turn,
                C, o_p, b_id, p_ids, stride_it, Tk, window, j < end - c + b - a, W, N, BS, STAGES, TURNS, S,
            )
            n += 1
        mbarrier.arrive(q_empty.index(slot), count=1)
        gl.store(lse + (i_b.to(gl.int64) * H + i_h) * Tp + o_t, b_m + gl.log2(b_l), mask=o_t < Tp)
        t_done, b_done, h_done, b_n = t0, i_b, i_h, 1.0 / b_l
        if r + 1 < rounds:  # the first tile of keys of the next item is scored while the last of this one joins b_o
            slot = (r + 1) % 2 * N + W
            t0, i_b, i_h, a, b, c, end = _item(r + 1, bounds, Tq, Tk, n_heads, n_together, window, H, BT, BS)
            t0 += W * BQ
            o_t, o_p = _queries(t0, Tq, Tk, BQ, S)
            if doc_ids is not None:
                p_ids, b_id = _ids(doc_ids, i_b, o_t, stride_ib, stride_it, Tq)
            b_m = gl.full([BQ], -3e38, gl.float32, gl.SliceLayout(1, S))
            b_l = gl.zeros([BQ], gl.float32, gl.SliceLayout(1, S))
            mbarrier.wait(q_full.index(slot), ((r + 1) // 2) & 1)
            b_p, b_r, b_o, b_m, b_l = _step(
                c, n, b_p, b_r, b_o, b_m, b_l, q_s.index(slot), k_s, v_s, k_full, v_full, empty, turn,
                C, o_p, b_id, p_ids, stride_it, Tk, window, True, W, N, BS, STAGES, TURNS, S,
            )
            n += 1
        else:
            slot = n % STAGES
            mbarrier.wait(v_full.index(slot), (n // STAGES) & 1)
            b_o = b_o * gl.convert_layout(b_r, gl.SliceLayout(1, O))[:, None]
            b_a = gl.convert_layout(b_p.to(dtype), gl.DotOperandLayout(0, O, 2))                        # [BQ, BS]
            b_o = warpgroup_mma(b_a, v_s.index(slot), b_o, is_async=True)
            b_o, b_a = warpgroup_mma_wait(0, deps=[b_o, b_a])
        b_o = b_o * gl.convert_layout(b_n, gl.SliceLayout(1, O))[:, None]
        tma_store_wait(0)  # the tile before has left o_s
        threads_meet()
        o_s.store(b_o.to(dtype))
        fence_async_shared()
        threads_meet()
        tma_store(out, [b_done, t_done, h_done, 0], as_box(o_s, out))
        b_o = gl.zeros([BQ, BD], gl.float32, O)
    tma_store_wait(0)


@gluon.jit
def _compute_first(
    out, q_s, k_s, v_s, o_s, q_full, q_empty, k_full, v_full, empty, turn,
    lse, doc_ids, bounds, stride_ib, stride_it, C, Tq, Tp, Tk, n_items, n_heads, n_together, window, H,
    BT: gl.constexpr, BS: gl.constexpr, BD: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
):
    _compute(
        0, out, q_s, k_s, v_s, o_s, q_full, q_empty, k_full, v_full, empty, turn,
        lse, doc_ids, bounds, stride_ib, stride_it, C, Tq, Tp, Tk, n_items, n_heads, n_together, window, H,
        BT, BS, BD, N, STAGES, TURNS,
    )


@gluon.jit
def _compute_second(
    out, q_s, k_s, v_s, o_s, q_full, q_empty, k_full, v_full, empty, turn,
    lse, doc_ids, bounds, stride_ib, stride_it, C, Tq, Tp, Tk, n_items, n_heads, n_together, window, H,
    BT: gl.constexpr, BS: gl.constexpr, BD: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
):
    _compute(
        1, out, q_s, k_s, v_s, o_s, q_full, q_empty, k_full, v_full, empty, turn,
        lse, doc_ids, bounds, stride_ib, stride_it, C, Tq, Tp, Tk, n_items, n_heads, n_together, window, H,
        BT, BS, BD, N, STAGES, TURNS,
    )


@gluon.jit(do_not_specialize=[
    "doc_ids", "stride_ib", "stride_it", "Tq", "Tp", "Tk", "n_items", "n_heads", "n_together", "window", "H", "GROUP",
])  # fmt: skip
def _attention_fwd_kernel(
    q, k, v, out, lse, doc_ids, bounds, stride_ib, stride_it, C,
    Tq, Tp, Tk, n_items, n_heads, n_together, window, H, GROUP,
    BT: gl.constexpr, BS: gl.constexpr, BD: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """q, k, v and out are descriptors [B, T, H, D], by the box of a tile; nothing beyond their ends is read or written."""
    dtype: gl.constexpr = q.dtype
    tile: gl.constexpr = gl.NVMMASharedLayout(min(128, BD * 2), 16, 2)
    q_s = gl.allocate_shared_memory(dtype, [2 * N, BT // N, BD], tile)
    o_s = gl.allocate_shared_memory(dtype, [N, BT // N, BD], tile)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, BS, BD], tile)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, BS, BD], tile)
    q_full, q_empty, turn = new_barriers(2 * N, 1), new_barriers(2 * N, 1), new_barriers(N, 1)
    k_full, v_full, empty = new_barriers(STAGES, 1), new_barriers(STAGES, 1), new_barriers(STAGES, N)
    fence_async_shared()
    threads_meet()
    gl.warp_specialize([
        (_compute_first, (
            out, q_s, k_s, v_s, o_s, q_full, q_empty, k_full, v_full, empty, turn,
            lse, doc_ids, bounds, stride_ib, stride_it, C, Tq, Tp, Tk, n_items, n_heads, n_together, window, H,
            BT, BS, BD, N, STAGES, TURNS,
        )),
        (_compute_second, (
            out, q_s, k_s, v_s, o_s, q_full, q_empty, k_full, v_full, empty, turn,
            lse, doc_ids, bounds, stride_ib, stride_it, C, Tq, Tp, Tk, n_items, n_heads, n_together, window, H,
            BT, BS, BD, N, STAGES, TURNS,
        )),
        (_load, (
            q, k, v, q_s, k_s, v_s, q_full, q_empty, k_full, v_full, empty, bounds,
            Tq, Tk, n_items, n_heads, n_together, window, H, GROUP, BT, BS, N, STAGES,
        )),
    ], [4, 1], [REGISTERS, 24])  # fmt: skip


def supports(q: Tensor) -> bool:
    """Whether these kernels take such queries (keys and values have their dtype and width), whatever the window and documents."""
    return q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= WIDEST_HEAD


def tile_for(D: int) -> Tile:
    for width, tile in TILES.items():
        if width >= D:
            return tile
    raise AssertionError(f"heads of {D} ought to have gone elsewhere")


def options_of(tile: Tile, BD: int, Tk: int, window: int | None) -> dict[str, int | bool]:
    """What the kernel is compiled for, heads of BD ≥ D values."""
    turns = Tk <= tile.turns_up_to or (window is not None and tile.turns_up_to > 0)
    return dict(BT=tile.BT, BS=tile.BS, BD=BD, N=GROUPS, STAGES=tile.stages, TURNS=turns, REGISTERS=REGISTERS)


def heads_at_once(n_heads: int, n_programs: int) -> int:
    """Heads whose tiles are dealt out together: each round gives four tiles of each to the programs, which so read the same
    keys at the same time. A number that divides the programs: with 16 heads of 16 tiles on 132 of them, two rounds of which
    are nearly those 256 tiles, the same ones get long tiles again and again, and the last is done after 1.5 times the mean."""
    return min(n_heads, max(1, n_programs // 4))


def aligned(x: Tensor) -> Tensor:
    """As the copy engine takes it: everything at multiples of 16 bytes, heads side by side, nothing expanded."""
    strides = [stride for stride, n in zip(x.stride()[:3], x.shape[:3], strict=True) if n > 1]
    fits = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(stride > 0 and stride % 8 == 0 for stride in strides)
    return x if fits else x.clone(memory_format=torch.contiguous_format)


class Box(NamedTuple):
    """What a launch reads of a TensorDescriptor, without the checks that making one takes each time."""

    base: Tensor
    shape: list[int]
    strides: list[int]
    block_shape: list[int]
    padding: str = "zero"
    round_f32_to_tf32: bool = False


def box(x: Tensor, rows: int, BD: int) -> Box:
    """x [B, T, H, D] by tiles of `rows` tokens of one head; strides of dimensions of one entry may be any and are not used."""
    strides = [stride if n > 1 else 8 * ceil_div(x.shape[3], 8) for stride, n in zip(x.stride(), x.shape, strict=True)]
    return Box(x, list(x.shape), [*strides[:3], 1], [1, rows, 1, BD])


# What was launched before: the kernel's options → compiled. Everything else is an argument like any other.
COMPILED: dict[tuple, object] = {}


def launch_with_boxes(grid: int, device: torch.device, options: dict, boxes: dict[str, Box], **args: object) -> None:
    """The kernel on `device`, whichever is current; Triton's own launch is asked once for each combination of `options`."""
    present = tuple(name for name in ("doc_ids", "window") if args[name] is not None)
    ids_dtype = None if args["doc_ids"] is None else args["doc_ids"].dtype
    key = (device.index, boxes["q"].base.dtype, ids_dtype, present, *options.values())
    with torch.cuda.device(device):
        compiled = COMPILED.get(key)
        if compiled is None or triton.knobs.runtime.launch_enter_hook.calls:
            layout = gl.NVMMASharedLayout(min(128, 2 * options["BD"]), 16, 4)
            descriptors = {
                name: TensorDescriptor(x.base, x.shape, x.strides, x.block_shape, layout) for name, x in boxes.items()
            }
            compiled = _attention_fwd_kernel[(grid,)](**descriptors, **args, **options, num_warps=4)
            if len(COMPILED) >= FORGET_AFTER:
                COMPILED.clear()
            COMPILED[key] = compiled
            return
        values = [(boxes | args | options)[name] for name in _attention_fwd_kernel.arg_names]
        stream = triton.runtime.driver.active.get_current_stream(device.index)
        compiled.run(grid, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *values)


def empty_results(q: Tensor) -> tuple[Tensor, Tensor]:
    B, Tq, H = q.shape[:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.empty((B, H, ceil_div(Tq, LSE) * LSE), dtype=torch.float32, device=q.device)


def _attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, doc_ids: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """q [B, Tq, H, D], k and v [B, Tk, Hkv, D] → out as q, and lse [B, H, Tp] in units of log 2, Tp a multiple of 128.

    torch.compile sees an operator: it cannot trace a kernel that is not tl's.
    """
    if torch.compiler.is_compiling():
        return attention_forward(q, k, v, window, doc_ids, scale)
    return forward(q, k, v, window, doc_ids, scale)


def forward(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, doc_ids: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    (B, Tq, H, D), (Tk, Hkv) = q.shape, k.shape[1:3]
    out, lse = empty_results(q)
    if out.numel() == 0:
        return out, lse
    tile, BD = tile_for(D), padded(D)
    q, k, v, doc_ids = aligned(q), aligned(k), aligned(v), doc_ids if doc_ids is None else doc_ids.contiguous()
    n_items = ceil_div(Tq, tile.BT) * B * H
    n_programs = min(n_items, n_processors(q.device))
    rows = tile.BT // GROUPS
    boxes = dict(q=box(q, rows, BD), k=box(k, tile.BS, BD), v=box(v, tile.BS, BD), out=box(out, rows, BD))
    C = max(scale * math.log2(math.e), 1e-30)  # 0 would make NaN of -inf
    launch_with_boxes(
        n_programs, q.device, options_of(tile, BD, Tk, window), boxes, lse=lse, C=C, Tq=Tq, Tp=lse.shape[2], Tk=Tk,
        n_items=n_items, n_heads=B * H, n_together=heads_at_once(B * H, n_programs), window=window, H=H, GROUP=H // Hkv,
        **document_bounds(doc_ids, tile.BT),
    )
    return out, lse


@torch.library.custom_op("kestrel::hopper_attention_forward", mutates_args=())
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, doc_ids: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, window, doc_ids, scale)


@attention_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, doc_ids: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return empty_results(q)
