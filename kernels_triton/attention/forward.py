"""Forward: a program takes BT queries of a head and goes over the keys they see, BS at a time.

Of the keys so far it holds, for each query, the maximum m of the scores, l = Σ 2^(s − m) and o = Σ 2^(s − m) v, the scores s
in units of log 2; when the maximum grows, l and o shrink by 2^(m − m'). In the end out = o / l and lse = m + log₂ l.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels_triton.attention.primitives import (  # isort: skip
    add_product, capped, edge, keys_of, load_ids, load_rows, place, store_rows, visible,
)
from kernels_triton.attention.tiles import LSE, document_bounds, heads_in_l2, padded, tile_for
from kernels_triton.launch import ceil_div, launch


@triton.jit
def _forward_step(
    i_s, b_q, b_o, b_m, b_l, b_id, o_p, p_k, p_v, p_ids, stride_kt, stride_vt, stride_it, Tk, window,
    D: tl.constexpr, scale: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The i_s-th tile of keys joins b_o [BT, BD], b_m [BT] and b_l [BT]."""
    C: tl.constexpr = (scale if SOFTCAP is None else SOFTCAP) * 1.4426950408889634  # log₂ e: 2^x is an instruction, exp is not
    s0 = i_s * BS
    s0_wide = s0.to(tl.int64)
    b_k = load_rows(p_k + s0_wide * stride_kt, stride_kt, Tk - s0, D, BS, BD, MASKED)                   # [BS, BD]
    b_s = capped(tl.dot(b_q, b_k.T, input_precision="ieee"), scale, SOFTCAP, b_k.dtype == tl.bfloat16)  # [BT, BS]
    if MASKED:
        m = visible(o_p[:, None], (s0 + tl.arange(0, BS))[None, :], Tk, window, CAUSAL)                 # [BT, BS]
        if p_ids is not None:
            m &= b_id[:, None] == load_ids(p_ids + s0_wide * stride_it, stride_it, Tk - s0, BS)[None, :]
        b_s = tl.where(m, b_s * C, -float("inf"))                                                       # [BT, BS]
        b_max = tl.maximum(b_m, tl.max(b_s, 1))                                                         # [BT]
        b_p = tl.exp2(b_s - b_max[:, None])                                                             # [BT, BS]
    else:  # multiplied and subtracted at once; C is positive or 0
        b_max = tl.maximum(b_m, tl.max(b_s, 1) * C)                                                     # [BT]
        b_p = tl.exp2(b_s * C - b_max[:, None])                                                         # [BT, BS]
    b_r = tl.exp2(b_m - b_max)                                                                          # [BT]
    b_v = load_rows(p_v + s0_wide * stride_vt, stride_vt, Tk - s0, D, BS, BD, MASKED)                   # [BS, BD]
    b_o = add_product(b_p.to(b_v.dtype), b_v, b_o * b_r[:, None])                                       # [BT, BD]
    return b_o, b_max, b_l * b_r + tl.sum(b_p, 1)


@triton.jit(do_not_specialize=["Tq", "Tk", "n_heads", "n_together", "window"])
def _attention_fwd_kernel(
    q, k, v, out, lse, doc_ids, bounds, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, stride_ib, stride_it, Tq, Tp, Tk, n_heads, n_together, window,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, scale: tl.constexpr, SOFTCAP: tl.constexpr,
    CAUSAL: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):
    """The last queries have the most keys and so come first."""
    n_t = tl.cdiv(Tq, BT)
    i_p, i_bh = place(tl.program_id(0), n_t, n_heads, n_together)
    i_t, i_b, i_h = n_t - 1 - i_p, i_bh // H, i_bh % H
    t0 = i_t * BT
    t0_wide = t0.to(tl.int64)
    p_q = q + i_b * stride_qb + i_h * stride_qh + t0_wide * stride_qt
    p_k = k + i_b * stride_kb + i_h // GROUP * stride_kh
    p_v = v + i_b * stride_vb + i_h // GROUP * stride_vh
    p_ids, p_bounds, b_id = None, None, None
    if doc_ids is not None:
        p_ids, p_bounds = doc_ids + i_b * stride_ib, bounds + (i_b * n_t + i_t) * 4
        b_id = load_ids(p_ids + t0_wide * stride_it, stride_it, Tq - t0, BT)                            # [BT]
    b_q = load_rows(p_q, stride_qt, Tq - t0, D, BT, BD, True)                                           # [BT, BD]
    o_p = tl.minimum(Tk - Tq + t0 + tl.arange(0, BT), Tk - 1)  # rows beyond the last query see what it sees
    b_o = tl.zeros([BT, BD], dtype=lse.dtype.element_ty)                                                # [BT, BD]
    LOWEST: tl.constexpr = -1.7e308 if lse.dtype.element_ty == tl.float64 else -3e38
    b_m = tl.full([BT], LOWEST, dtype=lse.dtype.element_ty)  # not -inf, so that no difference with it is NaN
    b_l = tl.zeros([BT], dtype=lse.dtype.element_ty)                                                    # [BT]
    a, b, c, end = keys_of(t0, Tq, Tk, window, p_bounds, BT, BS, CAUSAL)
    for i in range(end - c + b - a):
        b_o, b_m, b_l = _forward_step(
            edge(i, a, b, c, end), b_q, b_o, b_m, b_l, b_id, o_p, p_k, p_v, p_ids, stride_kt, stride_vt, stride_it,
            Tk, window, D, scale, SOFTCAP, CAUSAL, BS, BD, True,
        )
    for i in range(c - b):
        b_o, b_m, b_l = _forward_step(
            b + i, b_q, b_o, b_m, b_l, b_id, o_p, p_k, p_v, p_ids, stride_kt, stride_vt, stride_it,
            Tk, window, D, scale, SOFTCAP, CAUSAL, BS, BD, False,
        )
    tl.store(lse + i_bh * Tp + t0 + tl.arange(0, BT), b_m + tl.log2(b_l))
    if i_p == 0:  # the rest, that backward's tiles may read
        for t in range(n_t * BT, Tp, BT):
            tl.store(lse + i_bh * Tp + t + tl.arange(0, BT), tl.zeros([BT], dtype=lse.dtype.element_ty))
    store_rows(out + ((i_b * Tq + t0) * H + i_h) * D, b_o / b_l[:, None], H * D, Tq - t0, D, BT, BD)


def _attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, doc_ids: Tensor | None, scale: float, causal: bool = True,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """q [B, Tq, H, D], k and v [B, Tk, Hkv, D] → out as q, and lse [B, H, Tp], Tp being Tq up to a multiple of LSE."""
    (B, Tq, H, D), (Tk, Hkv) = q.shape, k.shape[1:3]
    tile = tile_for("forward", q)
    n_t = ceil_div(Tq, tile.BT)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, ceil_div(Tq, LSE) * LSE), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    if out.numel() == 0:
        return out, lse
    (qb, qt, qh), (kb, kt, kh), (vb, vt, vh) = (x.stride()[:3] for x in (q, k, v))
    launch(
        _attention_fwd_kernel, (n_t * B * H,), q=q, k=k, v=v, out=out, lse=lse,
        stride_qb=qb, stride_qt=qt, stride_qh=qh, stride_kb=kb, stride_kt=kt, stride_kh=kh,
        stride_vb=vb, stride_vt=vt, stride_vh=vh, Tq=Tq, Tp=lse.shape[2], Tk=Tk, n_heads=B * H,
        n_together=heads_in_l2(k, 2) * (H // Hkv), window=window, H=H, GROUP=H // Hkv, D=D, scale=scale,
        SOFTCAP=softcap, CAUSAL=causal, BT=tile.BT, BS=tile.BS, BD=padded(D), num_warps=tile.warps, num_stages=tile.stages,
        **document_bounds(doc_ids, tile.BT),
    )
    return out, lse
