"""Backward: one kernel goes over the keys of BT queries for dq, the other over the queries of BS keys for dk and dv.

Either makes the scores again, and p from them and lse, so that every gradient is summed in the registers of one program.
One kernel for all three would save two of seven products, but have programs add to dq in memory, in whatever order they
come. A program for dk and dv goes over the queries of all heads of its group.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels_triton.attention.tiles import DELTA, document_bounds, heads_in_l2, padded, tile_for
from kernels_triton.launch import ceil_div, launch
from kernels_triton.primitives import tanh_grad

from kernels_triton.attention.primitives import (  # isort: skip
    add_long, add_product, capped, edge, head_of, keys_of, load_ids, load_rows, nothing_lost, place, queries_of,
    store_rows, visible,
)


@triton.jit
def _delta_kernel(
    out, dout, delta, stride_ob, stride_ot, stride_oh, stride_db, stride_dt, stride_dh, T, Tp,
    H: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):
    """delta [B, H, Tp] = Σ_d out · dout, 0 from T on."""
    i_p, n_t = tl.program_id(0), Tp // BT
    t0, i_bh = i_p % n_t * BT, (i_p // n_t).to(tl.int64)
    t0_wide, i_b, i_h = t0.to(tl.int64), i_bh // H, i_bh % H
    p_o = out + i_b * stride_ob + t0_wide * stride_ot + i_h * stride_oh
    p_do = dout + i_b * stride_db + t0_wide * stride_dt + i_h * stride_dh
    b_o = load_rows(p_o, stride_ot, T - t0, D, BT, BD, True).to(delta.dtype.element_ty)                 # [BT, BD]
    b_do = load_rows(p_do, stride_dt, T - t0, D, BT, BD, True).to(delta.dtype.element_ty)               # [BT, BD]
    tl.store(delta + i_bh * Tp + t0 + tl.arange(0, BT), tl.sum(b_o * b_do, 1))


@triton.jit
def _dq_step(
    i_s, b_q, b_do, b_dq, b_lse, b_delta, b_id, o_p, p_k, p_v, p_ids, stride_kt, stride_vt, stride_it, Tk, window,
    D: tl.constexpr, scale: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The i_s-th tile of keys adds to b_dq [BT, BD], which still lacks the factor `scale`."""
    C: tl.constexpr = (scale if SOFTCAP is None else SOFTCAP) * 1.4426950408889634
    s0 = i_s * BS
    s0_wide = s0.to(tl.int64)
    b_k = load_rows(p_k + s0_wide * stride_kt, stride_kt, Tk - s0, D, BS, BD, MASKED)                   # [BS, BD]
    b_v = load_rows(p_v + s0_wide * stride_vt, stride_vt, Tk - s0, D, BS, BD, MASKED)                   # [BS, BD]
    b_c = capped(tl.dot(b_q, b_k.T, input_precision="ieee"), scale, SOFTCAP, b_k.dtype == tl.bfloat16)  # [BT, BS]
    b_s = b_c * C                                                                                       # [BT, BS]
    if MASKED:
        m = visible(o_p[:, None], (s0 + tl.arange(0, BS))[None, :], Tk, window, CAUSAL)                 # [BT, BS]
        if p_ids is not None:
            m &= b_id[:, None] == load_ids(p_ids + s0_wide * stride_it, stride_it, Tk - s0, BS)[None, :]
        b_s = tl.where(m, b_s, -float("inf"))                                                           # [BT, BS]
    b_p = tl.exp2(b_s - b_lse[:, None])                                                                 # [BT, BS]
    b_dp = tl.dot(b_do, b_v.T, input_precision="ieee")                                                  # [BT, BS]
    b_ds = b_p * (b_dp - b_delta[:, None])                                                              # [BT, BS]
    if SOFTCAP is not None:
        b_ds = tanh_grad(b_ds, b_c)                                                                     # [BT, BS]
    return add_product(b_ds.to(b_k.dtype), b_k, b_dq)                                                   # [BT, BD]


@triton.jit(do_not_specialize=["Tq", "Tk", "n_heads", "n_together", "window"])
def _attention_dq_kernel(
    q, k, v, dout, dq, lse, delta, doc_ids, bounds, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, stride_db, stride_dt, stride_dh, stride_ib, stride_it,
    Tq, Tp, Tk, n_heads, n_together, window,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, scale: tl.constexpr, SOFTCAP: tl.constexpr,
    CAUSAL: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):
    """As forward, the last queries first."""
    n_t = tl.cdiv(Tq, BT)
    i_p, i_bh = place(tl.program_id(0), n_t, n_heads, n_together)
    i_t, i_b, i_h = n_t - 1 - i_p, i_bh // H, i_bh % H
    t0 = i_t * BT
    t0_wide = t0.to(tl.int64)
    p_q = q + i_b * stride_qb + i_h * stride_qh + t0_wide * stride_qt
    p_do = dout + i_b * stride_db + i_h * stride_dh + t0_wide * stride_dt
    p_k = k + i_b * stride_kb + i_h // GROUP * stride_kh
    p_v = v + i_b * stride_vb + i_h // GROUP * stride_vh
    p_ids, p_bounds, b_id = None, None, None
    if doc_ids is not None:
        p_ids, p_bounds = doc_ids + i_b * stride_ib, bounds + (i_b * n_t + i_t) * 4
        b_id = load_ids(p_ids + t0_wide * stride_it, stride_it, Tq - t0, BT)                            # [BT]
    b_q = load_rows(p_q, stride_qt, Tq - t0, D, BT, BD, True)                                           # [BT, BD]
    b_do = load_rows(p_do, stride_dt, Tq - t0, D, BT, BD, True)                                         # [BT, BD]
    o_t = t0 + tl.arange(0, BT)
    o_p = Tk - Tq + o_t
    b_lse, b_delta = tl.load(lse + i_bh * Tp + o_t), tl.load(delta + i_bh * Tp + o_t)                   # [BT], [BT]
    b_dq = tl.zeros([BT, BD], dtype=lse.dtype.element_ty)                                               # [BT, BD]
    a, b, c, end = keys_of(t0, Tq, Tk, window, p_bounds, BT, BS, CAUSAL)
    for i in range(end - c + b - a):
        b_dq = _dq_step(
            edge(i, a, b, c, end), b_q, b_do, b_dq, b_lse, b_delta, b_id, o_p, p_k, p_v, p_ids,
            stride_kt, stride_vt, stride_it, Tk, window, D, scale, SOFTCAP, CAUSAL, BS, BD, True,
        )
    for i in range(c - b):
        b_dq = _dq_step(
            b + i, b_q, b_do, b_dq, b_lse, b_delta, b_id, o_p, p_k, p_v, p_ids,
            stride_kt, stride_vt, stride_it, Tk, window, D, scale, SOFTCAP, CAUSAL, BS, BD, False,
        )
    store_rows(dq + ((i_b * Tq + t0) * H + i_h) * D, b_dq * scale, H * D, Tq - t0, D, BT, BD)


@triton.jit
def _dk_dv_step(
    i_t, b_k, b_v, b_dk, b_dv, b_lost_k, b_lost_v, b_id, o_s, p_q, p_do, lse, delta, i_row, p_ids, stride_qt, stride_dt, stride_it, Tq, Tk, window,
    D: tl.constexpr, scale: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    MASKED: tl.constexpr, NEEDS_DK: tl.constexpr, NEEDS_DV: tl.constexpr,
):
    """The i_t-th tile of queries adds to b_dv and to b_dk [BS, BD], which still lacks the factor `scale`.

    Scores are made transposed, so that they are multiplied from the registers they come in.
    """
    C: tl.constexpr = (scale if SOFTCAP is None else SOFTCAP) * 1.4426950408889634
    t0 = i_t * BT
    t0_wide = t0.to(tl.int64)
    o_t = t0 + tl.arange(0, BT)
    b_q = load_rows(p_q + t0_wide * stride_qt, stride_qt, Tq - t0, D, BT, BD, MASKED)                   # [BT, BD]
    b_do = load_rows(p_do + t0_wide * stride_dt, stride_dt, Tq - t0, D, BT, BD, MASKED)                 # [BT, BD]
    b_c = capped(tl.dot(b_k, b_q.T, input_precision="ieee"), scale, SOFTCAP, b_k.dtype == tl.bfloat16)  # [BS, BT]
    b_s = b_c * C                                                                                       # [BS, BT]
    if MASKED:
        m = visible(Tk - Tq + o_t[None, :], o_s[:, None], Tk, window, CAUSAL)                           # [BS, BT]
        if p_ids is not None:
            m &= load_ids(p_ids + t0_wide * stride_it, stride_it, Tq - t0, BT)[None, :] == b_id[:, None]
        b_s = tl.where(m, b_s, -float("inf"))                                                           # [BS, BT]
    b_p = tl.exp2(b_s - tl.load(lse + i_row + o_t)[None, :])                                            # [BS, BT]
    if NEEDS_DV:
        b_dv, b_lost_v = add_long(b_p.to(b_do.dtype), b_do, b_dv, b_lost_v)                             # [BS, BD]
    if NEEDS_DK:
        b_dp = tl.dot(b_v, b_do.T, input_precision="ieee")                                              # [BS, BT]
        b_ds = b_p * (b_dp - tl.load(delta + i_row + o_t)[None, :])                                     # [BS, BT]
        if SOFTCAP is not None:
            b_ds = tanh_grad(b_ds, b_c)                                                                 # [BS, BT]
        b_dk, b_lost_k = add_long(b_ds.to(b_q.dtype), b_q, b_dk, b_lost_k)                              # [BS, BD]
    return b_dk, b_dv, b_lost_k, b_lost_v


@triton.jit(do_not_specialize=["Tq", "Tk", "n_heads", "n_together", "window"])
def _attention_dk_dv_kernel(
    q, k, v, dout, dk, dv, lse, delta, doc_ids, bounds, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, stride_db, stride_dt, stride_dh, stride_ib, stride_it,
    Tq, Tp, Tk, n_heads, n_together, window,
    Hkv: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, scale: tl.constexpr, SOFTCAP: tl.constexpr,
    CAUSAL: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):
    """The first keys have the most queries. One loop goes over the tiles of all heads of the group, so that when one head
    ends the next one's tiles are on their way."""
    n_s = tl.cdiv(Tk, BS)
    i_s, i_bh = place(tl.program_id(0), n_s, n_heads, n_together)
    i_b, i_h = i_bh // Hkv, i_bh % Hkv
    s0 = i_s * BS
    s0_wide = s0.to(tl.int64)
    p_q = q + i_b * stride_qb + i_h * GROUP * stride_qh
    p_do = dout + i_b * stride_db + i_h * GROUP * stride_dh
    p_k = k + i_b * stride_kb + i_h * stride_kh + s0_wide * stride_kt
    p_v = v + i_b * stride_vb + i_h * stride_vh + s0_wide * stride_vt
    p_ids, p_bounds, b_id = None, None, None
    if doc_ids is not None:
        p_ids, p_bounds = doc_ids + i_b * stride_ib, bounds + (i_b * n_s + i_s) * 4
        b_id = load_ids(p_ids + s0_wide * stride_it, stride_it, Tk - s0, BS)                            # [BS]
    b_k = load_rows(p_k, stride_kt, Tk - s0, D, BS, BD, True)                                           # [BS, BD]
    b_v = load_rows(p_v, stride_vt, Tk - s0, D, BS, BD, True)                                           # [BS, BD]
    o_s = s0 + tl.arange(0, BS)
    b_dk = tl.zeros([BS, BD], dtype=lse.dtype.element_ty)                                               # [BS, BD]
    b_dv = tl.zeros([BS, BD], dtype=lse.dtype.element_ty)                                               # [BS, BD]
    b_lost_k, b_lost_v = nothing_lost(b_dk, b_k), nothing_lost(b_dv, b_v)
    a, b, c, end = queries_of(s0, Tq, Tk, window, p_bounds, BT, BS, CAUSAL)
    n = end - c + b - a
    for i in range(n * GROUP):
        i_g = head_of(i, n, GROUP)
        b_dk, b_dv, b_lost_k, b_lost_v = _dk_dv_step(
            edge(i - (i_g * n).to(tl.int32), a, b, c, end), b_k, b_v, b_dk, b_dv, b_lost_k, b_lost_v, b_id, o_s,
            p_q + i_g * stride_qh, p_do + i_g * stride_dh, lse, delta, (i_bh * GROUP + i_g) * Tp, p_ids,
            stride_qt, stride_dt, stride_it, Tq, Tk, window, D, scale, SOFTCAP, CAUSAL, BT, BD, True,
            dk is not None, dv is not None,
        )
    n = c - b
    for i in range(n * GROUP):
        i_g = head_of(i, n, GROUP)
        b_dk, b_dv, b_lost_k, b_lost_v = _dk_dv_step(
            b + i - (i_g * n).to(tl.int32), b_k, b_v, b_dk, b_dv, b_lost_k, b_lost_v, b_id, o_s,
            p_q + i_g * stride_qh, p_do + i_g * stride_dh, lse, delta, (i_bh * GROUP + i_g) * Tp, p_ids,
            stride_qt, stride_dt, stride_it, Tq, Tk, window, D, scale, SOFTCAP, CAUSAL, BT, BD, False,
            dk is not None, dv is not None,
        )
    o_kv = ((i_b * Tk + s0) * Hkv + i_h) * D
    if dk is not None:
        store_rows(dk + o_kv, b_dk * scale, Hkv * D, Tk - s0, D, BS, BD)
    if dv is not None:
        store_rows(dv + o_kv, b_dv, Hkv * D, Tk - s0, D, BS, BD)


def _attention_bwd(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, window: int | None, doc_ids: Tensor | None,
    scale: float, needs_dq: bool, needs_dk: bool, needs_dv: bool, causal: bool = True, softcap: float | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dout as q → dq, dk and dv, each None when not needed."""
    needs = ((q, needs_dq), (k, needs_dk), (v, needs_dv))
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) if needed else None for x, needed in needs)
    if q.numel() == 0:
        return dq, zeroed(dk), zeroed(dv)
    if k.shape[1] == 1:  # one key for each query, whatever its score: no rounding of lse gets into dq and dk
        dq, dk, needs_dq, needs_dk = zeroed(dq), zeroed(dk), False, False
    delta = _delta(out, dout, lse) if needs_dq or needs_dk else None
    given = dict(q=q, k=k, v=v, dout=dout, lse=lse, delta=delta)
    given |= dict(window=window, doc_ids=doc_ids, scale=scale, causal=causal, softcap=softcap)
    if needs_dq:
        _dq(**given, dq=dq)
    if needs_dk or needs_dv:
        _dk_dv(**given, dk=dk if needs_dk else None, dv=dv)
    return dq, dk, dv


def _delta(out: Tensor, dout: Tensor, lse: Tensor) -> Tensor:
    """Σ_d out · dout in the shape of lse."""
    (B, T, H, D), Tp, delta = out.shape, lse.shape[2], torch.empty_like(lse)
    (ob, ot, oh), (db, dt, dh) = out.stride()[:3], dout.stride()[:3]
    launch(
        _delta_kernel, (Tp // DELTA.BT * B * H,), out=out, dout=dout, delta=delta,
        stride_ob=ob, stride_ot=ot, stride_oh=oh, stride_db=db, stride_dt=dt, stride_dh=dh, T=T, Tp=Tp, H=H, D=D,
        BT=DELTA.BT, BD=padded(D), num_warps=DELTA.warps,
    )
    return delta


def _dq(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, dq: Tensor, window: int | None,
    doc_ids: Tensor | None, scale: float, causal: bool, softcap: float | None,
) -> None:
    """Fill dq."""
    (B, Tq, H, D), (Tk, Hkv), tile = q.shape, k.shape[1:3], tile_for("dq", q)
    assert lse.shape[2] % tile.BT == 0
    launch(
        _attention_dq_kernel, (ceil_div(Tq, tile.BT) * B * H,), q=q, k=k, v=v, dout=dout, dq=dq, lse=lse, delta=delta,
        **strides(q, k, v, dout), Tq=Tq, Tp=lse.shape[2], Tk=Tk, n_heads=B * H, n_together=heads_in_l2(k, 2) * (H // Hkv),
        window=window, H=H, GROUP=H // Hkv, D=D, scale=scale, SOFTCAP=softcap, CAUSAL=causal, BT=tile.BT,
        BS=tile.BS, BD=padded(D), num_warps=tile.warps, num_stages=tile.stages, **document_bounds(doc_ids, tile.BT),
    )


def _dk_dv(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor | None, dk: Tensor | None, dv: Tensor | None,
    window: int | None, doc_ids: Tensor | None, scale: float, causal: bool, softcap: float | None,
) -> None:
    """Fill dk and dv, of which one may be None."""
    (B, Tq, H, D), (Tk, Hkv), tile = q.shape, k.shape[1:3], tile_for("dk_dv", q)
    assert lse.shape[2] % tile.BT == 0
    launch(
        _attention_dk_dv_kernel, (ceil_div(Tk, tile.BS) * B * Hkv,), q=q, k=k, v=v, dout=dout, dk=dk, dv=dv, lse=lse,
        delta=delta, **strides(q, k, v, dout), Tq=Tq, Tp=lse.shape[2], Tk=Tk, n_heads=B * Hkv,
        n_together=heads_in_l2(q, 2 * (H // Hkv)), window=window, Hkv=Hkv, GROUP=H // Hkv, D=D, scale=scale,
        SOFTCAP=softcap, CAUSAL=causal, BT=tile.BT, BS=tile.BS, BD=padded(D),
        num_warps=tile.warps, num_stages=tile.stages, **document_bounds(doc_ids, tile.BS),
    )


def strides(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> dict[str, int]:
    """Of rows, tokens and heads, by the names both kernels have for them."""
    (qb, qt, qh), (kb, kt, kh), (vb, vt, vh), (db, dt, dh) = (x.stride()[:3] for x in (q, k, v, dout))
    return dict(
        stride_qb=qb, stride_qt=qt, stride_qh=qh, stride_kb=kb, stride_kt=kt, stride_kh=kh,
        stride_vb=vb, stride_vt=vt, stride_vh=vh, stride_db=db, stride_dt=dt, stride_dh=dh,
    )


def zeroed(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.zero_()
