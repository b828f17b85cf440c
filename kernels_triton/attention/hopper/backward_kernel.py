"""The kernel of backward on Hopper: a program takes BS keys of a head and goes over the queries that see them, BT at a time.

One warp has the copy engine bring tiles of queries and of dout into a ring, with lse and δ. Eight warps do the products:

    s = k qᵀ,   dp = v doᵀ,   dv += pᵀ do,   dk += dsᵀ q,   dq = ds k    (s, p and ds are held transposed)

in an order in which the tensor cores always have one to do: ds of one tile becomes dq and dk while s of the next is made, p is
made while dp is, ds while dv is. dk and dv stay in registers until the end.

dq is summed in fp32 in memory, by one program after the other: tiles of queries have a count of those that have added, and
the next waits for it. Programs go down from the last keys to the first, and each goes up from the first queries that see
it, so that those that work at the same time are always at different tiles, each two behind the one it follows. The last
heads go the other way round: from the first keys, which have the most queries, to the last, so that short programs are
left to fill the gaps at the end. The order is fixed by the shapes, so that a sum has the same bits every time. No program
waits for one that starts after it: all end.

The adding is left to the copy engine (STAGED: products go on at once, but all of dq passes through shared memory), or done
from registers by the warps that made it.
"""

from kernels_triton.attention.hopper.api import as_box, gl, gluon, mbarrier, new_barriers, threads_meet
from kernels_triton.attention.primitives import queries_of

from kernels_triton.attention.hopper.api import (  # isort: skip
    fence_async_shared, tma_add, tma_load, tma_store, tma_store_wait, warpgroup_mma, warpgroup_mma_wait,
)

THREADS = 256  # that do the products


def four_by_four(instruction: str, n: int) -> str:
    """PTX: of n values of each thread, four to [p], the next four to [p + 16 THREADS] and so on.

    Operands: n results that nobody reads, n times p, the values.
    """
    groups = [", ".join(f"${2 * n + i + j}" for j in range(4)) for i in range(0, n, 4)]
    return " ".join(f"{instruction} [${n}+{16 * THREADS * i}], {{{values}}};" for i, values in enumerate(groups))


ADD = {n: four_by_four("red.relaxed.gpu.global.add.v4.f32", n) for n in (16, 32)}
SET = {n: four_by_four("st.global.v4.f32", n) for n in (16, 32)}
OPERANDS = {n: ",".join(["=r"] * n + ["l"] * n + ["f"] * n) for n in (16, 32)}
ADD_16, ADD_32, SET_16, SET_32 = (gl.constexpr(asm) for asm in (ADD[16], ADD[32], SET[16], SET[32]))
OPERANDS_16, OPERANDS_32 = gl.constexpr(OPERANDS[16]), gl.constexpr(OPERANDS[32])


@gluon.jit
def _add(p, x, first, N: gl.constexpr):
    """x, N values of each thread, to the fp32 sums at p, an address of this thread's own; `first`: nothing is there yet."""
    if N == 16:
        if first:
            gl.inline_asm_elementwise(SET_16, OPERANDS_16, [p, x], dtype=gl.int32, is_pure=False, pack=16)
        else:
            gl.inline_asm_elementwise(ADD_16, OPERANDS_16, [p, x], dtype=gl.int32, is_pure=False, pack=16)
    else:
        if first:
            gl.inline_asm_elementwise(SET_32, OPERANDS_32, [p, x], dtype=gl.int32, is_pure=False, pack=32)
        else:
            gl.inline_asm_elementwise(ADD_32, OPERANDS_32, [p, x], dtype=gl.int32, is_pure=False, pack=32)


@gluon.jit
def _thread():
    """Which thread this is: unlike other scalars, not the same in all."""
    return gl.inline_asm_elementwise("mov.u32 $0, %tid.x;", "=r", [], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _zero():
    """0, but the compiler cannot know: what is made of it in a loop is made there, and not kept in registers throughout."""
    return gl.inline_asm_elementwise("mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _read(p):
    """What another program wrote at p with _write, and with it all it had written before."""
    asm: gl.constexpr = "ld.acquire.gpu.global.s32 $0, [$1]; fence.proxy.async.global;"
    return gl.inline_asm_elementwise(asm, "=r,l", [p], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _write(p, x):
    """For a single warp."""
    asm: gl.constexpr = """{
        .reg .pred one; .reg .u32 lane;
        mov.u32 lane, %laneid;
        setp.eq.u32 one, lane, 0;
        @one st.release.gpu.global.s32 [$1], $2;
    }"""
    gl.inline_asm_elementwise(asm, "=r,l,r", [p.to(gl.int64), x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _finish(p, x):
    """_write, when all that this warp had the copy engine write is there."""
    asm: gl.constexpr = """{
        .reg .pred one; .reg .u32 lane;
        cp.async.bulk.wait_group 0;
        fence.proxy.async.global;
        bar.warp.sync 0xffffffff;
        mov.u32 lane, %laneid;
        setp.eq.u32 one, lane, 0;
        @one st.release.gpu.global.s32 [$1], $2;
    }"""
    gl.inline_asm_elementwise(asm, "=r,l,r", [p.to(gl.int64), x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _program(bounds, Tq, Tk, n_heads, n_down, window, Hkv, BT: gl.constexpr, BS: gl.constexpr):
    """Which tile of keys of which head, the tiles of queries as queries_of has them, and whether this head goes down."""
    n_s = (Tk + BS - 1) // BS
    i_p = gl.program_id(0)
    i_up = i_p - n_down * n_s
    n_up = gl.maximum(n_heads - n_down, 1)
    down = i_up < 0
    i_bh = gl.where(down, i_p // n_s, n_down + i_up % n_up)
    i_s = gl.where(down, n_s - 1 - i_p % n_s, i_up // n_up)
    i_b = i_bh // Hkv
    p_bounds = None
    if bounds is not None:
        p_bounds = bounds + (i_b.to(gl.int64) * n_s + i_s) * 4
    a, b, c, end = queries_of(i_s * BS, Tq, Tk, window, p_bounds, BT, BS)
    return i_s, i_b, i_bh % Hkv, a, b, c, end, down


@gluon.jit
def _turn(i_t, i_s, down, Tq, Tk, window, BT: gl.constexpr, BS: gl.constexpr):
    """How many programs add to the i_t-th tile of queries before that of the i_s-th tile of keys."""
    first = Tk - Tq + i_t * BT
    highest, lowest = gl.minimum(first + BT - 1, Tk - 1) // BS, 0
    if window is not None:
        lowest = gl.maximum(first - window, 0) // BS
    return gl.where(down, highest - i_s, i_s - lowest)


@gluon.jit
def _next(slot, phase, n: gl.constexpr):
    """The slot after this one in a ring of n, and its phase, which changes each time around."""
    slot += 1
    return gl.where(slot == n, 0, slot), gl.where(slot == n, phase ^ 1, phase)


@gluon.jit
def _load(
    q, k, v, dout, rows, q_s, k_s, v_s, do_s, rows_s, kv_full, full, empty, bounds,
    Tq, Tk, n_heads, n_down, window, Hkv, GROUP,
    BT: gl.constexpr, BS: gl.constexpr, BD: gl.constexpr, STAGES: gl.constexpr,
):
    """One warp: keys and values, then tile after tile of queries."""
    i_s, i_b, i_h, a, _b, _c, end, _down = _program(bounds, Tq, Tk, n_heads, n_down, window, Hkv, BT, BS)
    n_t = (Tq + BT - 1) // BT
    slot, phase = 0, 1
    if end > a:
        mbarrier.expect(kv_full.index(0), 2 * BS * BD * 2)
        tma_load(k, [i_b, i_s * BS, i_h, 0], kv_full.index(0), as_box(k_s.index(0), k))
        tma_load(v, [i_b, i_s * BS, i_h, 0], kv_full.index(0), as_box(v_s.index(0), v))
    for i_g in range(GROUP):
        i_hq = i_h * GROUP + i_g
        for i_t in range(a, end):
            arrived = full.index(slot)
            mbarrier.wait(empty.index(slot), phase)
            mbarrier.expect(arrived, 2 * BT * BD * 2 + 2 * BT * 4)
            tma_load(q, [i_b, i_t * BT, i_hq, 0], arrived, as_box(q_s.index(slot), q))
            tma_load(rows, [(i_b * Hkv * GROUP + i_hq) * n_t + i_t, 0], arrived, rows_s.index(slot))
            tma_load(dout, [i_b, i_t * BT, i_hq, 0], arrived, as_box(do_s.index(slot), dout))
            slot, phase = _next(slot, phase, STAGES)


@gluon.jit
def _await_turns(
    turns, mine, taken, bounds, Tq, Tk, n_heads, n_down, window, Hkv, GROUP, BT: gl.constexpr, BS: gl.constexpr,
):
    """One warp: for each tile waits until it is this program's turn to add to it, and says so."""
    i_s, i_b, i_h, a, _b, _c, end, down = _program(bounds, Tq, Tk, n_heads, n_down, window, Hkv, BT, BS)
    n_t = (Tq + BT - 1) // BT
    phase = 1
    for i_g in range(GROUP):
        p_turns = turns + ((i_b * Hkv + i_h) * GROUP + i_g).to(gl.int64) * n_t
        for i_t in range(a, end):
            turn = _turn(i_t, i_s, down, Tq, Tk, window, BT, BS)
            while _read(p_turns + i_t) < turn:
                pass
            mbarrier.wait(taken.index(0), phase)
            mbarrier.arrive(mine.index(0), count=1)
            phase ^= 1


@gluon.jit
def _pass_turns(
    dq, dq_s, turns, mine, taken, empty, dq_free, bounds, Tq, Tk, n_heads, n_down, window, Hkv, GROUP,
    BT: gl.constexpr, BS: gl.constexpr, BD: gl.constexpr, STAGES: gl.constexpr,
):
    """One warp, where not STAGED: when this program has added to a tile and left its slot, it is the next one's turn."""
    i_s, i_b, i_h, a, _b, _c, end, down = _program(bounds, Tq, Tk, n_heads, n_down, window, Hkv, BT, BS)
    n_t = (Tq + BT - 1) // BT
    slot, phase = 0, 0
    for i_g in range(GROUP):
        p_turns = turns + ((i_b * Hkv + i_h) * GROUP + i_g).to(gl.int64) * n_t
        for i_t in range(a, end):
            mbarrier.wait(empty.index(slot), phase)
            mbarrier.arrive(taken.index(0), count=1)
            _write(p_turns + i_t, _turn(i_t, i_s, down, Tq, Tk, window, BT, BS) + 1)
            slot, phase = _next(slot, phase, STAGES)


@gluon.jit
def _add_tiles(
    dq, dq_s, turns, mine, taken, empty, dq_free, bounds, Tq, Tk, n_heads, n_down, window, Hkv, GROUP,
    BT: gl.constexpr, BS: gl.constexpr, BD: gl.constexpr, STAGES: gl.constexpr,
):
    """One warp, where STAGED: has the copy engine add tile after tile to dq, each in its turn. While one is on its way the next
    is made, in another buffer."""
    i_s, i_b, i_h, a, _b, _c, end, down = _program(bounds, Tq, Tk, n_heads, n_down, window, Hkv, BT, BS)
    n_t = (Tq + BT - 1) // BT
    slot, phase, turn_phase, buffer = 0, 0, 0, 0
    for i_g in range(GROUP):
        i_row = ((i_b * Hkv + i_h) * GROUP + i_g) * n_t
        p_turns = turns + i_row.to(gl.int64)
        for i_t in range(a, end):
            mbarrier.wait(empty.index(slot), phase)
            if i_t > a:
                _finish(p_turns + i_t - 1, _turn(i_t - 1, i_s, down, Tq, Tk, window, BT, BS) + 1)
                mbarrier.arrive(dq_free.index(buffer ^ 1), count=1)
            mbarrier.wait(mine.index(0), turn_phase)
            mbarrier.arrive(taken.index(0), count=1)
            row = (i_row + i_t) * (BT * BD // 256)
            if _turn(i_t, i_s, down, Tq, Tk, window, BT, BS) == 0:
                tma_store(dq, [row, 0], dq_s.index(buffer))
            else:
                tma_add(dq, [row, 0], dq_s.index(buffer))
            slot, phase = _next(slot, phase, STAGES)
            turn_phase ^= 1
            buffer ^= 1
        if end > a:
            _finish(p_turns + end - 1, _turn(end - 1, i_s, down, Tq, Tk, window, BT, BS) + 1)
            mbarrier.arrive(dq_free.index(buffer ^ 1), count=1)


@gluon.jit
def _by_thread(x, BT: gl.constexpr, BD: gl.constexpr):
    """x [BT, BD] as eight warps hold it, in the order _add has: nothing moves."""
    x = gl.permute(gl.reshape(x, [4, 2, 8, 2, BD // 16, 4, 2]), [4, 3, 0, 2, 5, 1, 6])
    return gl.reshape(x, [BT * BD // 256, 256])


@gluon.jit
def _p(b_s, b_lse, C, i_t, b, c, o_s, o_t_s, b_id, p_ids, stride_it, Tq, Tk, window, BT: gl.constexpr):
    """b_s [BS, BT] → p; only tiles before b and from c on know of masks."""
    if (i_t < b) | (i_t >= c):
        o_t = o_t_s.load(gl.SliceLayout(0, b_s.type.layout))
        o_first = o_s - (i_t * BT + Tk - Tq)  # counted from the tile's first query: which one is the first to see the key
        m = o_first[:, None] <= o_t[None, :]
        if window is not None:
            m = m & ((o_first + window)[:, None] >= o_t[None, :])
        if p_ids is not None:
            o_q = gl.minimum(i_t * BT + o_t, Tq - 1)
            m = m & (b_id[:, None] == gl.load(p_ids + o_q.to(gl.int64) * stride_it)[None, :])
        b_s = gl.where(m, b_s, -float("inf"))
    return gl.exp2(b_s * C - b_lse[None, :])


@gluon.jit
def _multiply(
    dk, dv, dq, q_s, k_s, v_s, do_s, rows_s, ds_s, dq_s, o_t_s, kv_full, full, empty, mine, dq_free, doc_ids, bounds,
    stride_ib, stride_it, C, scale, Tq, Tk, n_heads, n_down, window, Hkv, GROUP,
    BT: gl.constexpr, BS: gl.constexpr, BD: gl.constexpr, STAGES: gl.constexpr, STAGED: gl.constexpr,
):
    """Eight warps: all products, p and ds, and their sums."""
    dtype: gl.constexpr = k_s.dtype
    layout_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BT, 16])
    layout_k: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BD, 16])
    layout_q: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BD // 2, 16])
    layout_p: gl.constexpr = gl.DotOperandLayout(0, layout_k, 2)
    of_queries: gl.constexpr = gl.SliceLayout(0, layout_s)
    N: gl.constexpr = BT * BD // 256
    i_s, i_b, i_h, a, b, c, end, down = _program(bounds, Tq, Tk, n_heads, n_down, window, Hkv, BT, BS)
    n, n_t = (end - a) * GROUP, (Tq + BT - 1) // BT
    o_s = i_s * BS + gl.arange(0, BS, gl.SliceLayout(1, layout_s))
    p_ids, b_id = None, None
    if doc_ids is not None:
        p_ids = doc_ids + i_b.to(gl.int64) * stride_ib
        b_id = gl.load(p_ids + gl.minimum(o_s, Tk - 1).to(gl.int64) * stride_it)                        # [BS]
    b_dk = gl.zeros([BS, BD], gl.float32, layout_k)
    b_dv = gl.zeros([BS, BD], gl.float32, layout_k)
    b_z = gl.zeros([BS, BT], gl.float32, layout_s)
    b_zq = gl.zeros([BT, BD], gl.float32, layout_q)
    if n > 0:
        mbarrier.wait(kv_full.index(0), 0)
        mbarrier.wait(full.index(0), 0)
        b_s = warpgroup_mma(k_s.index(0), q_s.index(0).permute((1, 0)), b_z, use_acc=False, is_async=True)
        b_lse = rows_s.index(0).reshape([2 * BT]).slice(0, BT).load(of_queries)                         # [BT]
        b_s = warpgroup_mma_wait(0, deps=[b_s])
        b_p = _p(b_s, b_lse, C, a, b, c, o_s, o_t_s, b_id, p_ids, stride_it, Tq, Tk, window, BT)        # [BS, BT]
        b_dp = warpgroup_mma(v_s.index(0), do_s.index(0).permute((1, 0)), b_z, use_acc=False, is_async=True)
        b_pa = gl.convert_layout(b_p.to(dtype), layout_p)
        b_dv = warpgroup_mma(b_pa, do_s.index(0), b_dv, is_async=True)
        b_delta = rows_s.index(0).reshape([2 * BT]).slice(BT, BT).load(of_queries)                      # [BT]
        b_dp = warpgroup_mma_wait(1, deps=[b_dp])
        b_ds = (b_p * (b_dp - b_delta[None, :])).to(dtype)                                              # [BS, BT]
        ds_s.index(0).store(b_ds)
        fence_async_shared()
        threads_meet()
        i_t, slot, phase, turn_phase, free_phase, buffer = a, 0, 0, 0, 1, 0
        if not STAGED:
            p_dq = dq.to(gl.int64) + (((i_b * Hkv + i_h) * GROUP).to(gl.int64) * n_t + a) * (BT * BD * 4) + _thread() * 16
        for _i in range(1, n):
            zero = _zero()
            k, v, ds = k_s.index(zero), v_s.index(zero), ds_s.index(zero)
            before = slot
            slot, phase = _next(slot, phase, STAGES)
            # dq and dk of the tile before, s of this one
            b_dq = warpgroup_mma(ds.permute((1, 0)), k, b_zq, use_acc=False, is_async=True)             # [BT, BD]
            b_dk = warpgroup_mma(ds, q_s.index(before), b_dk, is_async=True)
            if STAGED:
                b_dq, b_dv = warpgroup_mma_wait(1, deps=[b_dq, b_dv])
                mbarrier.wait(dq_free.index(buffer), free_phase)
                dq_s.index(buffer).store(_by_thread(b_dq, BT, BD))
                buffer, free_phase = _next(buffer, free_phase, 2)
            mbarrier.wait(full.index(slot), phase)
            b_s = warpgroup_mma(k, q_s.index(slot).permute((1, 0)), b_z, use_acc=False, is_async=True)
            last = i_t == end - 1
            if not STAGED:
                first = _turn(i_t, i_s, down, Tq, Tk, window, BT, BS) == 0
                b_dq, b_dv = warpgroup_mma_wait(2, deps=[b_dq, b_dv])
                mbarrier.wait(mine.index(0), turn_phase)
                _add(p_dq, b_dq, first, N)
                p_dq += gl.where(last, n_t - (end - a) + 1, 1).to(gl.int64) * (BT * BD * 4)
                turn_phase ^= 1
            b_dp = warpgroup_mma(v, do_s.index(slot).permute((1, 0)), b_z, use_acc=False, is_async=True)
            i_t = gl.where(last, a, i_t + 1)
            b_lse = rows_s.index(slot).reshape([2 * BT]).slice(0, BT).load(of_queries)                  # [BT]
            b_s, b_dk = warpgroup_mma_wait(1, deps=[b_s, b_dk])
            b_p = _p(b_s, b_lse, C, i_t, b, c, o_s, o_t_s, b_id, p_ids, stride_it, Tq, Tk, window, BT)  # [BS, BT]
            b_pa = gl.convert_layout(b_p.to(dtype), layout_p)
            b_dv = warpgroup_mma(b_pa, do_s.index(slot), b_dv, is_async=True)
            b_delta = rows_s.index(slot).reshape([2 * BT]).slice(BT, BT).load(of_queries)               # [BT]
            b_dp = warpgroup_mma_wait(1, deps=[b_dp])
            b_ds = (b_p * (b_dp - b_delta[None, :])).to(dtype)                                          # [BS, BT]
            if STAGED:
                fence_async_shared()
            threads_meet()
            mbarrier.arrive(empty.index(before), count=1)
            ds.store(b_ds)
            fence_async_shared()
            threads_meet()
        b_dv = warpgroup_mma_wait(0, deps=[b_dv])
        b_dq = warpgroup_mma(ds_s.index(0).permute((1, 0)), k_s.index(0), b_zq, use_acc=False, is_async=True)
        b_dk = warpgroup_mma(ds_s.index(0), q_s.index(slot), b_dk, is_async=True)
        b_dq = warpgroup_mma_wait(1, deps=[b_dq])
        if STAGED:
            mbarrier.wait(dq_free.index(buffer), free_phase)
            dq_s.index(buffer).store(_by_thread(b_dq, BT, BD))
            fence_async_shared()
        else:
            mbarrier.wait(mine.index(0), turn_phase)
            _add(p_dq, b_dq, _turn(i_t, i_s, down, Tq, Tk, window, BT, BS) == 0, N)
        b_dk = warpgroup_mma_wait(0, deps=[b_dk])
        threads_meet()
        mbarrier.arrive(empty.index(slot), count=1)
    k_s.index(0).store((b_dk * scale).to(dtype))
    v_s.index(0).store(b_dv.to(dtype))
    fence_async_shared()
    threads_meet()
    tma_store(dk, [i_b, i_s * BS, i_h, 0], as_box(k_s.index(0), dk))
    tma_store(dv, [i_b, i_s * BS, i_h, 0], as_box(v_s.index(0), dv))
    tma_store_wait(0)


@gluon.jit(do_not_specialize=["stride_ib", "stride_it", "Tq", "Tk", "n_heads", "n_down", "window", "Hkv", "GROUP"])
def _attention_bwd_kernel(
    q, k, v, dout, rows, dk, dv, dq, turns, doc_ids, bounds, stride_ib, stride_it, C, scale,
    Tq, Tk, n_heads, n_down, window, Hkv, GROUP,
    BT: gl.constexpr, BS: gl.constexpr, BD: gl.constexpr, STAGES: gl.constexpr, STAGED: gl.constexpr, REGISTERS: gl.constexpr,
):
    """dk and dv, and the fp32 sums of dq: [B, H, tiles of BT], of each the values in the order _add has them; where STAGED a
    descriptor of rows of 256."""
    gl.static_assert(BT == 64)
    layout: gl.constexpr = gl.NVMMASharedLayout(min(128, BD * 2), 16, rank=2)
    k_s = gl.allocate_shared_memory(q.dtype, [1, BS, BD], layout)
    v_s = gl.allocate_shared_memory(q.dtype, [1, BS, BD], layout)
    q_s = gl.allocate_shared_memory(q.dtype, [STAGES, BT, BD], layout)
    do_s = gl.allocate_shared_memory(q.dtype, [STAGES, BT, BD], layout)
    ds_s = gl.allocate_shared_memory(q.dtype, [1, BS, BT], gl.NVMMASharedLayout(min(128, BT * 2), 16, rank=2))
    rows_s = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 2 * BT], gl.NVMMASharedLayout(0, 32, rank=2))
    o_t_s = gl.allocate_shared_memory(gl.int32, [BT], gl.SwizzledSharedLayout(1, 1, 1, [0]))  # 0 … BT: spares registers
    o_t_s.store(gl.arange(0, BT, gl.BlockedLayout([1], [32], [8], [0])))
    kv_full, mine, taken = new_barriers(1, 1), new_barriers(1, 1), new_barriers(1, 1)
    full, empty = new_barriers(STAGES, 1), new_barriers(STAGES, 1)
    dq_s, dq_free = None, None
    if STAGED:
        dq_s = gl.allocate_shared_memory(gl.float32, [2, BT * BD // 256, 256], gl.NVMMASharedLayout(0, 32, rank=2))
        dq_free = new_barriers(2, 1)
    fence_async_shared()
    threads_meet()
    gl.warp_specialize([
        (_multiply, (
            dk, dv, dq, q_s, k_s, v_s, do_s, rows_s, ds_s, dq_s, o_t_s, kv_full, full, empty, mine, dq_free, doc_ids, bounds,
            stride_ib, stride_it, C, scale, Tq, Tk, n_heads, n_down, window, Hkv, GROUP, BT, BS, BD, STAGES, STAGED,
        )),
        (_load, (
            q, k, v, dout, rows, q_s, k_s, v_s, do_s, rows_s, kv_full, full, empty, bounds,
            Tq, Tk, n_heads, n_down, window, Hkv, GROUP, BT, BS, BD, STAGES,
        )),
        (_await_turns, (turns, mine, taken, bounds, Tq, Tk, n_heads, n_down, window, Hkv, GROUP, BT, BS)),
        (_add_tiles if STAGED else _pass_turns, (
            dq, dq_s, turns, mine, taken, empty, dq_free, bounds, Tq, Tk, n_heads, n_down, window, Hkv, GROUP,
            BT, BS, BD, STAGES,
        )),
    ], [1, 1, 1], [REGISTERS, REGISTERS, REGISTERS])  # fmt: skip
