"""Forward on Hopper: out and lse as the portable kernel makes them, one program a processor that stays until all is done.

Its warps have roles. One warp has the copy engine bring queries, and keys and values tile by tile, into rings in shared
memory. Two groups of four warps take 64 queries each and do the products, whose scores, p and sums stay in registers:

    s_j = q k_jᵀ    issued first,
    o += p_{j−1} v_{j−1}    right behind it, so that it runs while
    p_j, m, l    are made of s_j.

While one group makes its p the other has the tensor cores; where that is faster they take turns, each handing over once it
has issued its two products. A ring's slot is full when the copy engine has brought all its bytes, and empty again when both groups say so.

Programs take tiles of queries in an order fixed by the shapes, the longest first and back and forth (0 … n − 1, n − 1 … 0), so
that each gets as much work as the others within a percent. Nothing depends on who is faster; no two write the same value.
"""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kernels_triton import ahead
from kernels_triton.attention.hopper.api import TensorDescriptor, as_box, gl, gluon, mbarrier, new_barriers
from kernels_triton.attention.primitives import edge, keys_of, place
from kernels_triton.attention.tiles import LSE, document_bounds, padded
from kernels_triton.launch import FORGET_AFTER, ceil_div, compile_only, n_processors

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


# Up to a width of head. TFLOP/s on an H200, bf16, in turns / each at its own pace, and in brackets cuDNN's in the same run
# (its clock differs by 15 % from one run to the next). Between 2048 and 8192 keys was not measured.
TILES = {
    64: Tile(BT=128, BS=128, stages=3, turns_up_to=0),      # B32 T2048 H12: 372 / 376 (395)
    128: Tile(BT=128, BS=128, stages=2, turns_up_to=4096),  # B32 T2048 H6: 548 / 544 (527), window 768: 441 / 421
                                                            # B16 T2048 H16: 551 / 547 (535)
                                                            # B4 T8192 H16: 599 / 606 (545), window 2048: 512 / 508
                                                            # B4 T8192 H16 on 4 heads of keys: 622 / 634 (622)
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
def _item(
    i, bounds, Tq, Tk, n_heads, n_together, window, H,
    BT: gl.constexpr, BS: gl.constexpr,
):
    """The i-th tile: its first query, row and head; and its keys' a, b, c, end of keys_of, the last tile among those masked."""
    n_t = (Tq + BT - 1) // BT
    i_p, i_bh = place(i, n_t, n_heads, n_together)
    i_bh = i_bh.to(gl.int32)
    i_t, i_b = n_t - 1 - i_p, i_bh // H
    p_bounds = None
    if bounds is not None:
        p_bounds = bounds + (i_b.to(gl.int64) * n_t + i_t) * 4
    a, b, c, end = keys_of(i_t * BT, Tq, Tk, window, p_bounds, BT, BS)
    c = gl.minimum(c, end - 1)
    return i_t * BT, i_b, i_bh % H, a, gl.minimum(b, c), c, end


@gluon.jit
def _bring(x, i_b, t0, i_h, full, s):
    """The tokens of a head from t0 on to s [rows, BD]; `full` is told."""
    BYTES: gl.constexpr = s.shape[0] * s.shape[1] * 2
    mbarrier.expect(full, BYTES)
    tma_load(x, [i_b, t0, i_h, 0], full, as_box(s, x))


@gluon.jit
def _load(
    q, k, v, q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, bounds,
    Tq, Tk, n_items, n_heads, n_together, window, H, GROUP,
    BT: gl.constexpr, BS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
):
    """The warp that loads, in the order in which the groups of warps compute."""
    BQ: gl.constexpr = BT // N
    n_programs, n = gl.num_programs(0), 0
    for r in range((n_items + n_programs - 1) // n_programs):
        i = _program(r, n_programs)
        if i < n_items:
            t0, i_b, i_h, a, b, c, end = _item(i, bounds, Tq, Tk, n_heads, n_together, window, H, BT, BS)
            for w in gl.static_range(N):
                mbarrier.wait(q_empty.index(w), (r & 1) ^ 1)
                _bring(q, i_b, t0 + w * BQ, i_h, q_full.index(w), q_s.index(w))
            n_edge = end - c + b - a
            for j in range(end - a):
                s0 = BS * gl.where(j < n_edge, edge(j, a, b, c, end), b + j - n_edge)
                slot, lap = n % STAGES, (n // STAGES) & 1
                mbarrier.wait(k_empty.index(slot), lap ^ 1)
                _bring(k, i_b, s0, i_h // GROUP, k_full.index(slot), k_s.index(slot))
                mbarrier.wait(v_empty.index(slot), lap ^ 1)
                _bring(v, i_b, s0, i_h // GROUP, v_full.index(slot), v_s.index(slot))
                n += 1


@gluon.jit
def _softmax(
    i_s, b_s, b_m, C, o_p, b_id, p_ids, stride_it, Tk, window,
    BS: gl.constexpr, MASKED: gl.constexpr,
):
    """Scores of the i_s-th tile of keys → p before it is divided by l, the new maximum, and by what l and o shrink."""
    if MASKED:
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
    i_s, n, n_turn, b_p, b_r, b_o, b_m, b_l, q_s, k_s, v_s, k_full, k_empty, v_full, v_empty, turn,
    C, o_p, b_id, p_ids, stride_it, Tk, window,
    W: gl.constexpr, N: gl.constexpr, BS: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr, MASKED: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """The n-th tile of keys in the ring, i_s-th of them all, is scored; the tile before it joins b_o.

    b_p is of that one, in fp32, and b_o still lacks the factor b_r: neither holds up the product of queries and keys.
    """
    BQ: gl.constexpr = q_s.shape[0]
    slot, before, lap = n % STAGES, (n - 1) % STAGES, ((n - 1) // STAGES) & 1
    mbarrier.wait(k_full.index(slot), (n // STAGES) & 1)
    if TURNS:
        mbarrier.wait(turn.index(W), (n_turn + 1 - W) & 1)
    b_s = gl.zeros([BQ, BS], gl.float32, LAYOUT)
    b_s = warpgroup_mma(q_s, k_s.index(slot).permute((1, 0)), b_s, use_acc=False, is_async=True)        # [BQ, BS]
    mbarrier.wait(v_full.index(before), lap)
    b_o = b_o * gl.convert_layout(b_r, gl.SliceLayout(1, b_o.type.layout))[:, None]                     # [BQ, BD]
    b_a = gl.convert_layout(b_p.to(q_s.dtype), gl.DotOperandLayout(0, b_o.type.layout, 2))              # [BQ, BS]
    b_o = warpgroup_mma(b_a, v_s.index(before), b_o, is_async=True)                                     # [BQ, BD]
    if TURNS:
        mbarrier.arrive(turn.index((W + 1) % N), count=1)
    b_s = warpgroup_mma_wait(1, deps=[b_s])
    b_p, b_max, b_r = _softmax(i_s, b_s, b_m, C, o_p, b_id, p_ids, stride_it, Tk, window, BS, MASKED)
    b_l = b_l * b_r + gl.sum(b_p, 1)                                                                    # [BQ]
    # Long since over: a branch, across which ptxas moves no instruction. Without it b_o is awaited before the softmax.
    mbarrier.wait(v_full.index(before), lap)
    b_o, b_a = warpgroup_mma_wait(0, deps=[b_o, b_a])
    mbarrier.arrive(v_empty.index(before), count=1)
    mbarrier.arrive(k_empty.index(slot), count=1)
    return b_p, b_r, b_o, b_max, b_l


@gluon.jit
def _compute(
    W: gl.constexpr, out, q_s, k_s, v_s, o_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, turn,
    lse, doc_ids, bounds, stride_ib, stride_it, C, Tq, Tp, Tk, n_items, n_heads, n_together, window, H,
    BT: gl.constexpr, BS: gl.constexpr, BD: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
):
    """The W-th of N groups of four warps: the W-th part of the queries of each tile."""
    BQ: gl.constexpr = BT // N
    dtype: gl.constexpr = q_s.dtype
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BS, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BD, 16])
    q_s, o_s = q_s.index(W), o_s.index(W)
    n_programs, n, n_turn = gl.num_programs(0), 0, 0
    for r in range((n_items + n_programs - 1) // n_programs):
        i = _program(r, n_programs)
        if i < n_items:
            t0, i_b, i_h, a, b, c, end = _item(i, bounds, Tq, Tk, n_heads, n_together, window, H, BT, BS)
            t0 += W * BQ
            o_t = t0 + gl.arange(0, BQ, gl.SliceLayout(1, S))                                           # [BQ]
            o_p = gl.minimum(Tk - Tq + o_t, Tk - 1)  # rows beyond the last query see what it sees
            p_ids, b_id = None, None
            if doc_ids is not None:
                p_ids = doc_ids + i_b.to(gl.int64) * stride_ib
                b_id = gl.load(p_ids + gl.minimum(o_t, Tq - 1).to(gl.int64) * stride_it)                # [BQ]
            b_o = gl.zeros([BQ, BD], gl.float32, O)                                                     # [BQ, BD]
            b_m = gl.full([BQ], -3e38, gl.float32, gl.SliceLayout(1, S))  # not -inf, lest a difference be NaN
            slot = n % STAGES
            mbarrier.wait(q_full.index(W), r & 1)
            mbarrier.wait(k_full.index(slot), (n // STAGES) & 1)
            b_s = gl.zeros([BQ, BS], gl.float32, S)
            b_s = warpgroup_mma(q_s, k_s.index(slot).permute((1, 0)), b_s, use_acc=False, is_async=True)
            b_s = warpgroup_mma_wait(0, deps=[b_s])                                                     # [BQ, BS]
            mbarrier.arrive(k_empty.index(slot), count=1)
            b_p, b_m, b_r = _softmax(c, b_s, b_m, C, o_p, b_id, p_ids, stride_it, Tk, window, BS, True)
            b_l = gl.sum(b_p, 1)                                                                        # [BQ]
            n += 1
            for j in range(1, end - c + b - a):
                b_p, b_r, b_o, b_m, b_l = _step(
                    edge(j, a, b, c, end), n, n_turn, b_p, b_r, b_o, b_m, b_l, q_s, k_s, v_s,
                    k_full, k_empty, v_full, v_empty, turn, C, o_p, b_id, p_ids, stride_it, Tk, window,
                    W, N, BS, STAGES, TURNS, True, S,
                )
                n += 1
                n_turn += 1
            for j in range(c - b):
                b_p, b_r, b_o, b_m, b_l = _step(
                    b + j, n, n_turn, b_p, b_r, b_o, b_m, b_l, q_s, k_s, v_s,
                    k_full, k_empty, v_full, v_empty, turn, C, o_p, b_id, p_ids, stride_it, Tk, window,
                    W, N, BS, STAGES, TURNS, False, S,
                )
                n += 1
                n_turn += 1
            mbarrier.arrive(q_empty.index(W), count=1)
            slot = (n - 1) % STAGES
            b_o = b_o * gl.convert_layout(b_r, gl.SliceLayout(1, O))[:, None]
            b_a = gl.convert_layout(b_p.to(dtype), gl.DotOperandLayout(0, O, 2))                        # [BQ, BS]
            mbarrier.wait(v_full.index(slot), ((n - 1) // STAGES) & 1)
            b_o = warpgroup_mma(b_a, v_s.index(slot), b_o, is_async=True)
            gl.store(lse + (i_b.to(gl.int64) * H + i_h) * Tp + o_t, b_m + gl.log2(b_l), mask=o_t < Tp)
            b_r = gl.convert_layout(1.0 / b_l, gl.SliceLayout(1, O))                                    # [BQ]
            b_o, b_a = warpgroup_mma_wait(0, deps=[b_o, b_a])
            mbarrier.arrive(v_empty.index(slot), count=1)
            tma_store_wait(0)  # the tile before has left o_s
            threads_meet()
            o_s.store((b_o * b_r[:, None]).to(dtype))
            fence_async_shared()
            threads_meet()
            tma_store(out, [i_b, t0, i_h, 0], as_box(o_s, out))
    tma_store_wait(0)


@gluon.jit
def _compute_first(
    out, q_s, k_s, v_s, o_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, turn,
    lse, doc_ids, bounds, stride_ib, stride_it, C, Tq, Tp, Tk, n_items, n_heads, n_together, window, H,
    BT: gl.constexpr, BS: gl.constexpr, BD: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
):
    _compute(
        0, out, q_s, k_s, v_s, o_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, turn,
        lse, doc_ids, bounds, stride_ib, stride_it, C, Tq, Tp, Tk, n_items, n_heads, n_together, window, H,
        BT, BS, BD, N, STAGES, TURNS,
    )


@gluon.jit
def _compute_second(
    out, q_s, k_s, v_s, o_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, turn,
    lse, doc_ids, bounds, stride_ib, stride_it, C, Tq, Tp, Tk, n_items, n_heads, n_together, window, H,
    BT: gl.constexpr, BS: gl.constexpr, BD: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
):
    _compute(
        1, out, q_s, k_s, v_s, o_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, turn,
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
    q_s = gl.allocate_shared_memory(dtype, [N, BT // N, BD], tile)
    o_s = gl.allocate_shared_memory(dtype, [N, BT // N, BD], tile)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, BS, BD], tile)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, BS, BD], tile)
    q_full, q_empty, turn = new_barriers(N, 1), new_barriers(N, 1), new_barriers(N, 1)
    k_full, k_empty = new_barriers(STAGES, 1), new_barriers(STAGES, N)
    v_full, v_empty = new_barriers(STAGES, 1), new_barriers(STAGES, N)
    fence_async_shared()
    threads_meet()
    gl.warp_specialize([
        (_compute_first, (
            out, q_s, k_s, v_s, o_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, turn,
            lse, doc_ids, bounds, stride_ib, stride_it, C, Tq, Tp, Tk, n_items, n_heads, n_together, window, H,
            BT, BS, BD, N, STAGES, TURNS,
        )),
        (_compute_second, (
            out, q_s, k_s, v_s, o_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, turn,
            lse, doc_ids, bounds, stride_ib, stride_it, C, Tq, Tp, Tk, n_items, n_heads, n_together, window, H,
            BT, BS, BD, N, STAGES, TURNS,
        )),
        (_load, (
            q, k, v, q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, bounds,
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
        compiled = None if ahead.rehearsing else COMPILED.get(key)
        if compiled is None or triton.knobs.runtime.launch_enter_hook.calls:
            layout = gl.NVMMASharedLayout(min(128, 2 * options["BD"]), 16, 4)
            descriptors = {
                name: TensorDescriptor(x.base, x.shape, x.strides, x.block_shape, layout) for name, x in boxes.items()
            }
            if ahead.rehearsing:
                compile_only(_attention_fwd_kernel, (grid,), device, descriptors | args | options | dict(num_warps=4))
                return
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
    launch_with_boxes(
        n_programs, q.device, options_of(tile, BD, Tk, window), boxes, lse=lse, C=max(scale * math.log2(math.e), 1e-30),  # 0 would make NaN of -inf
        Tq=Tq, Tp=lse.shape[2], Tk=Tk, n_items=n_items, n_heads=B * H, n_together=heads_at_once(B * H, n_programs),
        window=window, H=H, GROUP=H // Hkv, **document_bounds(doc_ids, tile.BT),
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
