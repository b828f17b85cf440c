"""Rotary positions, RMS norm and scale of queries and keys together, and the same straight into a key-value cache or pages.

With a head split into halves [x1; x2], θ = position · frequency and R the rotation by −θ:

    y = R x:   y1 = x1 · cos θ + x2 · sin θ,   y2 = x2 · cos θ − x1 · sin θ
    z = scale · r · y,   r = 1 / sqrt(mean(y²) + eps)          (eps None: z = scale · y)

Backward, with the gradient dz of z:

    dy = scale · r · (dz − y · r² · mean(dz · y))              (eps None: dy = scale · dz)
    dx = Rᵀ dy:   dx1 = dy1 · cos θ − dy2 · sin θ,   dx2 = dy2 · cos θ + dy1 · sin θ

Forward reads x and writes z; backward reads x and dz and writes dx, or dz and dx alone where there is no norm. That
traffic is all the time either takes, so backward computes r once more instead of reading it, and forward saves nothing
but its inputs. r is taken after rotating, as the reference does: that costs nothing, and holds for fp64 and for tables
that scale as well as rotate.

To a program q and k are long lists of vectors, one for each token and head. It takes BN of them, so no number of heads
leaves a thread idle, and each thread holds 16 bytes of both halves of a vector: what it needs to rotate is its own, and
only the mean is summed over threads. The programs of q come first, then those of k, in one launch. Nobody writes what
another reads, so two runs give the same bits, and a token's result depends on nothing but the token. A program for all
heads of a token, which reads its row of the tables once, was no faster: tables come from the L2 cache, and what counts
is that a program asks for all it needs at once and that its neighbours read next to it.

Inputs and incoming gradients may have any strides; those whose last dimension is not contiguous are copied first.
Strides are plain integers, since torch.compile takes no tuples as arguments of a kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kernels_torch.qk_norm_rope import (
    check_qk_norm_rope,
    check_qk_norm_rope_append,
    check_qk_norm_rope_append_paged,
)
from kernels_triton.autograd import differentiable_once
from kernels_triton.launch import can_overlap, ceil_div, check_gpu, launch, next_power_of_two
from kernels_triton.primitives import upcast
from kernels_triton.quantised_cache import as_read, codes_of, scale_and_inverse, scale_arguments
from kernels_triton.rows import stride_of, values_side_by_side

# Warps a program. On an H200 (copy 4.25 TB/s; µs between events, L2 flushed, bf16; in brackets a plain copy of as many
# bytes), forward and backward: B32 T2048 H6 D128 100.8 (99.2) and 145.6 (144.4), B16 T2048 H16 D128 134.1 (130.3) and
# 192.6 (193.5). 2 warps: 101.5 and 146.2, 133.2 and 193.2; 8 warps: 103.3 and 145.2, 135.8 and 192.4; 4 warps and twice
# the bytes a thread: 101.5 and 153.4, 138.3 and 198.7. D96 leaves a quarter of the threads idle: B16 T2048 H16 106.8
# (98.7) and 155.1 (146.3).
WARPS = 4


@triton.jit
def _place(i_p, T, H: tl.constexpr, BN: tl.constexpr):
    """Row of the batch, and tokens and heads [BN], of the i_p-th block of vectors; tokens past the end are ≥ T."""
    n = tl.cdiv(T * H, BN)
    i_b, i_n = (i_p // n).to(tl.int64), (i_p % n).to(tl.int64)
    o_n = i_n * BN + tl.arange(0, BN)
    o_t = o_n // H
    return i_b, o_t, o_n - o_t * H


@triton.jit
def _load_halves(x, o_x, m_x, D: tl.constexpr, BD: tl.constexpr):
    """Both halves [BN, BD] of the vectors that begin o_x [BN] values behind x."""
    o_d = tl.arange(0, BD)
    m = m_x[:, None] & (o_d < D // 2)[None, :]
    p_x = x + o_x[:, None] + o_d[None, :]
    return tl.load(p_x, mask=m, other=0.0), tl.load(p_x + D // 2, mask=m, other=0.0)


@triton.jit
def _store_halves(z, b_z1, b_z2, o_z, stride_d, m_z, D: tl.constexpr, BD: tl.constexpr):
    o_d = tl.arange(0, BD).to(tl.int64)
    m = m_z[:, None] & (o_d < D // 2)[None, :]
    p_z = z + o_z[:, None] + o_d[None, :] * stride_d
    tl.store(p_z, b_z1.to(z.dtype.element_ty), mask=m)
    tl.store(p_z + D // 2 * stride_d, b_z2.to(z.dtype.element_ty), mask=m)


@triton.jit
def _load_angles(cos, sin, o_p, m_x, stride_cos, stride_sin, S, D: tl.constexpr, BD: tl.constexpr):
    """Rows o_p [BN] of both tables, NaN where a table has no such row: a start on the device was checked by nobody."""
    o_d = tl.arange(0, BD)
    m_p = (o_p >= 0) & (o_p < S)
    m = (m_x & m_p)[:, None] & (o_d < D // 2)[None, :]
    b_cos = tl.load(cos + o_p[:, None] * stride_cos + o_d[None, :], mask=m, other=0.0)                  # [BN, BD]
    b_sin = tl.load(sin + o_p[:, None] * stride_sin + o_d[None, :], mask=m, other=0.0)                  # [BN, BD]
    return tl.where(m_p[:, None], b_cos, float("nan")), tl.where(m_p[:, None], b_sin, float("nan"))


@triton.jit
def _rotate(b_x1, b_x2, b_cos, b_sin):
    """R x."""
    return b_x1 * b_cos + b_x2 * b_sin, b_x2 * b_cos - b_x1 * b_sin


@triton.jit
def _rotate_back(b_y1, b_y2, b_cos, b_sin):
    """Rᵀ y, the gradient of R x."""
    return b_y1 * b_cos - b_y2 * b_sin, b_y2 * b_cos + b_y1 * b_sin


@triton.jit
def _norm_rope(b_x1, b_x2, b_cos, b_sin, D: tl.constexpr, eps: tl.constexpr, scale: tl.constexpr):
    b_y1, b_y2 = _rotate(b_x1.to(b_cos.dtype), b_x2.to(b_cos.dtype), b_cos, b_sin)                      # [BN, BD]
    if eps is None:
        return b_y1 * scale, b_y2 * scale
    else:
        b_r = tl.rsqrt(tl.sum(b_y1 * b_y1 + b_y2 * b_y2, 1) / D + eps) * scale                          # [BN]
        return b_y1 * b_r[:, None], b_y2 * b_r[:, None]


@triton.jit
def _norm_grad(b_y1, b_y2, b_dz1, b_dz2, D: tl.constexpr, eps: tl.constexpr):
    """The gradient of y · r."""
    b_r = tl.rsqrt(tl.sum(b_y1 * b_y1 + b_y2 * b_y2, 1) / D + eps)                                      # [BN]
    b_c = b_r * b_r * tl.sum(b_dz1 * b_y1 + b_dz2 * b_y2, 1) / D                                        # [BN]
    return (b_dz1 - b_y1 * b_c[:, None]) * b_r[:, None], (b_dz2 - b_y2 * b_c[:, None]) * b_r[:, None]


@triton.jit
def _forward_of_block(
    i_p, x, z, cos, sin, start, starts, stride_xb, stride_xt, stride_xh, stride_cos, stride_sin, stride_starts, T, S,
    H: tl.constexpr, D: tl.constexpr, eps: tl.constexpr, scale: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):
    i_b, o_t, o_h = _place(i_p, T, H, BN)
    m_x = o_t < T
    b_x1, b_x2 = _load_halves(x, i_b * stride_xb + o_t * stride_xt + o_h * stride_xh, m_x, D, BD)       # [BN, BD]
    if starts is not None:
        start = tl.load(starts + i_b * stride_starts).to(tl.int64)
    b_cos, b_sin = _load_angles(cos, sin, start + o_t, m_x, stride_cos, stride_sin, S, D, BD)           # [BN, BD]
    b_z1, b_z2 = _norm_rope(b_x1, b_x2, b_cos, b_sin, D, eps, scale)                                    # [BN, BD]
    _store_halves(z, b_z1, b_z2, ((i_b * T + o_t) * H + o_h) * D, 1, m_x, D, BD)


@triton.jit
def _backward_of_block(
    i_p, x, dz, dx, cos, sin, start, starts, stride_xb, stride_xt, stride_xh, stride_zb, stride_zt, stride_zh,
    stride_cos, stride_sin, stride_starts, T, S,
    H: tl.constexpr, D: tl.constexpr, eps: tl.constexpr, scale: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):
    i_b, o_t, o_h = _place(i_p, T, H, BN)
    m_x = o_t < T
    b_dz1, b_dz2 = _load_halves(dz, i_b * stride_zb + o_t * stride_zt + o_h * stride_zh, m_x, D, BD)    # [BN, BD]
    if eps is not None:
        b_x1, b_x2 = _load_halves(x, i_b * stride_xb + o_t * stride_xt + o_h * stride_xh, m_x, D, BD)   # [BN, BD]
    if starts is not None:
        start = tl.load(starts + i_b * stride_starts).to(tl.int64)
    b_cos, b_sin = _load_angles(cos, sin, start + o_t, m_x, stride_cos, stride_sin, S, D, BD)           # [BN, BD]
    b_dy1, b_dy2 = b_dz1.to(b_cos.dtype), b_dz2.to(b_cos.dtype)                                         # [BN, BD]
    if eps is not None:
        b_y1, b_y2 = _rotate(b_x1.to(b_cos.dtype), b_x2.to(b_cos.dtype), b_cos, b_sin)                  # [BN, BD]
        b_dy1, b_dy2 = _norm_grad(b_y1, b_y2, b_dy1, b_dy2, D, eps)                                     # [BN, BD]
    b_dx1, b_dx2 = _rotate_back(b_dy1 * scale, b_dy2 * scale, b_cos, b_sin)                             # [BN, BD]
    _store_halves(dx, b_dx1, b_dx2, ((i_b * T + o_t) * H + o_h) * D, 1, m_x, D, BD)


@triton.jit(do_not_specialize=["start", "n_q"])
def _qk_norm_rope_fwd_kernel(
    q, k, zq, zk, cos, sin, start, starts, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_cos, stride_sin, stride_starts, T, S, n_q,
    H: tl.constexpr, Hkv: tl.constexpr, D: tl.constexpr, eps: tl.constexpr, scale: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr,
):
    """The first n_q programs are those of q."""
    i_p = tl.program_id(0)
    if i_p < n_q:
        _forward_of_block(
            i_p, q, zq, cos, sin, start, starts, stride_qb, stride_qt, stride_qh,
            stride_cos, stride_sin, stride_starts, T, S, H, D, eps, scale, BN, BD,
        )
    else:
        _forward_of_block(
            i_p - n_q, k, zk, cos, sin, start, starts, stride_kb, stride_kt, stride_kh,
            stride_cos, stride_sin, stride_starts, T, S, Hkv, D, eps, scale, BN, BD,
        )


@triton.jit(do_not_specialize=["start", "n_q"])
def _qk_norm_rope_bwd_kernel(
    q, k, dzq, dzk, dq, dk, cos, sin, start, starts,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_dqb, stride_dqt, stride_dqh, stride_dkb, stride_dkt, stride_dkh,
    stride_cos, stride_sin, stride_starts, T, S, n_q,
    H: tl.constexpr, Hkv: tl.constexpr, D: tl.constexpr, eps: tl.constexpr, scale: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr,
):
    """The first n_q programs are those of q; where dq is None there are none of them, and likewise for dk."""
    i_p = tl.program_id(0)
    if i_p < n_q:
        if dq is not None:
            _backward_of_block(
                i_p, q, dzq, dq, cos, sin, start, starts,
                stride_qb, stride_qt, stride_qh, stride_dqb, stride_dqt, stride_dqh,
                stride_cos, stride_sin, stride_starts, T, S, H, D, eps, scale, BN, BD,
            )
    else:
        if dk is not None:
            _backward_of_block(
                i_p - n_q, k, dzk, dk, cos, sin, start, starts,
                stride_kb, stride_kt, stride_kh, stride_dkb, stride_dkt, stride_dkh,
                stride_cos, stride_sin, stride_starts, T, S, Hkv, D, eps, scale, BN, BD,
            )


@triton.jit
def _append(
    i_p, x, z, scales, table, cos, sin, lengths, stride_xb, stride_xt, stride_xh,
    stride_zb, stride_zs, stride_zh, stride_zd, stride_sp, stride_ss, stride_sh, stride_tb, stride_tn, stride_cos,
    stride_sin, stride_lengths, T, S,
    H: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, eps: tl.constexpr, scale: tl.constexpr,
    ROTATED: tl.constexpr, CACHED: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):
    """x, rotated or as it is, to the same tokens of z or, if that is a cache, behind what it holds."""
    i_b, o_t, o_h = _place(i_p, T, H, BN)
    m_x = o_t < T
    b_z1, b_z2 = _load_halves(x, i_b * stride_xb + o_t * stride_xt + o_h * stride_xh, m_x, D, BD)       # [BN, BD]
    o_p = tl.load(lengths + i_b * stride_lengths).to(tl.int64) + o_t
    if ROTATED:  # what has no room in the cache is rotated by the last position that has
        o_c = tl.minimum(o_p, S - 1)
        b_cos, b_sin = _load_angles(cos, sin, o_c, m_x, stride_cos, stride_sin, S, D, BD)               # [BN, BD]
        b_z1, b_z2 = _norm_rope(b_z1, b_z2, b_cos, b_sin, D, eps, scale)                                # [BN, BD]
    if CACHED:
        m_z = m_x & (o_p >= 0) & (o_p < S)
        if table is None:
            o_z = i_b * stride_zb + o_p * stride_zs
        else:
            b_page = tl.load(table + i_b * stride_tb + o_p // PAGE * stride_tn, mask=m_z, other=0).to(tl.int64)
            o_z = b_page * stride_zb + o_p % PAGE * stride_zs
        if scales is not None:
            kind: tl.constexpr = z.dtype.element_ty
            b_z1, b_z2 = upcast(b_z1.to(x.dtype.element_ty)), upcast(b_z2.to(x.dtype.element_ty))
            b_top = tl.max(tl.maximum(tl.abs(b_z1), tl.abs(b_z2)), 1)                                   # [BN]
            b_scale, b_inverse = scale_and_inverse(b_top, tl.sum(b_z1 * 0.0 + b_z2 * 0.0, 1), kind)     # [BN]
            tl.store(scales + b_page * stride_sp + o_p % PAGE * stride_ss + o_h * stride_sh, b_scale, mask=m_z)
            b_z1, b_z2 = codes_of(b_z1 * b_inverse[:, None], kind), codes_of(b_z2 * b_inverse[:, None], kind)
        _store_halves(z, b_z1, b_z2, o_z + o_h * stride_zh, stride_zd, m_z, D, BD)
    else:
        _store_halves(z, b_z1, b_z2, ((i_b * T + o_t) * H + o_h) * D, 1, m_x, D, BD)


@triton.jit(do_not_specialize=["n_q", "n_k"])
def _qk_norm_rope_append_kernel(
    q, k, v, zq, k_cache, v_cache, k_scales, v_scales, table, cos, sin, lengths,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_kcb, stride_kcs, stride_kch, stride_kcd, stride_vcb, stride_vcs, stride_vch, stride_vcd,
    stride_ksp, stride_kss, stride_ksh, stride_vsp, stride_vss, stride_vsh,
    stride_tb, stride_tn, stride_cos, stride_sin, stride_lengths, T, S, n_q, n_k,
    H: tl.constexpr, Hkv: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, eps: tl.constexpr, scale: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, OVERLAP: tl.constexpr,
):
    """n_q programs for q, then n_k for k, then as many for v. Without a table rows of the cache lie in one piece."""
    if OVERLAP:  # a step of decoding is many small kernels: each is started before the one it waits for has ended
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    i_p = tl.program_id(0)
    if i_p < n_q:
        _append(
            i_p, q, zq, None, None, cos, sin, lengths, stride_qb, stride_qt, stride_qh,
            None, None, None, None, None, None, None, None, None, stride_cos, stride_sin, stride_lengths,
            T, S, H, D, PAGE, eps, scale, True, False, BN, BD,
        )
    elif i_p < n_q + n_k:
        _append(
            i_p - n_q, k, k_cache, k_scales, table, cos, sin, lengths, stride_kb, stride_kt, stride_kh,
            stride_kcb, stride_kcs, stride_kch, stride_kcd, stride_ksp, stride_kss, stride_ksh, stride_tb, stride_tn,
            stride_cos, stride_sin, stride_lengths, T, S, Hkv, D, PAGE, eps, scale, True, True, BN, BD,
        )
    else:
        _append(
            i_p - n_q - n_k, v, v_cache, v_scales, table, cos, sin, lengths, stride_vb, stride_vt, stride_vh,
            stride_vcb, stride_vcs, stride_vch, stride_vcd, stride_vsp, stride_vss, stride_vsh, stride_tb, stride_tn,
            stride_cos, stride_sin, stride_lengths, T, S, Hkv, D, PAGE, eps, scale, False, True, BN, BD,
        )


def block(x: Tensor) -> tuple[int, int]:
    """Vectors a program takes, and half their width rounded up: 16 bytes of either half for each thread."""
    BD = next_power_of_two(x.shape[3] // 2)
    return max(1, 32 * WARPS * (16 // x.element_size()) // BD), BD


def blocks_of(x: Tensor | None, BN: int) -> int:
    """How many programs the vectors of x [B, T, H, D] take; none take none."""
    return 0 if x is None else x.shape[0] * ceil_div(x.shape[1] * x.shape[2], BN)


def strides(x: Tensor | None) -> tuple[int, int, int]:
    """Of rows, tokens and heads."""
    return (0, 0, 0) if x is None else x.stride()[:3]


def start_arguments(start: int | Tensor) -> tuple[int, Tensor | None, int]:
    """As a number, or as a tensor and its stride."""
    return (0, start, start.stride(0)) if isinstance(start, Tensor) else (start, None, 0)


def _qk_norm_rope_fwd(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, start: int | Tensor, eps: float | None, scale: float
) -> tuple[Tensor, Tensor]:
    """q [B, T, H, D], k [B, T, Hkv, D] → the same, rotated, normalised and scaled."""
    zq, zk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    BN, BD = block(q)
    n_q, n_k = blocks_of(q, BN), blocks_of(k, BN)
    if n_q + n_k == 0:
        return zq, zk
    (qb, qt, qh), (kb, kt, kh) = strides(q), strides(k)
    start, starts, stride_starts = start_arguments(start)
    launch(
        _qk_norm_rope_fwd_kernel, (n_q + n_k,), q=q, k=k, zq=zq, zk=zk, cos=cos, sin=sin, start=start, starts=starts,
        stride_qb=qb, stride_qt=qt, stride_qh=qh, stride_kb=kb, stride_kt=kt, stride_kh=kh,
        stride_cos=cos.stride(0), stride_sin=sin.stride(0), stride_starts=stride_starts,
        T=q.shape[1], S=cos.shape[0], n_q=n_q, H=q.shape[2], Hkv=k.shape[2], D=q.shape[3], eps=eps, scale=scale,
        BN=BN, BD=BD, num_warps=WARPS,
    )
    return zq, zk


def _qk_norm_rope_bwd(
    q: Tensor | None, k: Tensor | None, dzq: Tensor | None, dzk: Tensor | None, cos: Tensor, sin: Tensor,
    start: int | Tensor, eps: float | None, scale: float,
) -> tuple[Tensor | None, Tensor | None]:
    """dzq, dzk in the shapes of q and k → dq, dk, each None where there is no incoming gradient."""
    some = dzk if dzq is None else dzq
    if some is None:
        return None, None
    dq, dk = (dz if dz is None else torch.empty(dz.shape, dtype=dz.dtype, device=dz.device) for dz in (dzq, dzk))
    BN, BD = block(some)
    n_q, n_k = blocks_of(dq, BN), blocks_of(dk, BN)
    if n_q + n_k == 0:
        return dq, dk
    (qb, qt, qh), (kb, kt, kh), (dqb, dqt, dqh), (dkb, dkt, dkh) = (strides(x) for x in (q, k, dzq, dzk))
    start, starts, stride_starts = start_arguments(start)
    launch(
        _qk_norm_rope_bwd_kernel, (n_q + n_k,), q=q, k=k, dzq=dzq, dzk=dzk, dq=dq, dk=dk, cos=cos, sin=sin,
        start=start, starts=starts,
        stride_qb=qb, stride_qt=qt, stride_qh=qh, stride_kb=kb, stride_kt=kt, stride_kh=kh,
        stride_dqb=dqb, stride_dqt=dqt, stride_dqh=dqh, stride_dkb=dkb, stride_dkt=dkt, stride_dkh=dkh,
        stride_cos=cos.stride(0), stride_sin=sin.stride(0), stride_starts=stride_starts,
        T=some.shape[1], S=cos.shape[0], n_q=n_q, H=0 if dq is None else dq.shape[2],
        Hkv=0 if dk is None else dk.shape[2], D=some.shape[3], eps=eps, scale=scale, BN=BN, BD=BD, num_warps=WARPS,
    )
    return dq, dk


def _qk_norm_rope_append(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor | None, cos: Tensor, sin: Tensor,
    lengths: Tensor, eps: float | None, scale: float, k_scales: Tensor | None, v_scales: Tensor | None,
) -> Tensor:
    """Fill the caches, or with a table [B, n] the pages; → q rotated, normalised and scaled."""
    zq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    BN, BD = block(q)
    n_q, n_k = blocks_of(q, BN), blocks_of(k, BN)
    if n_q + n_k == 0:
        return zq
    (qb, qt, qh), (kb, kt, kh), (vb, vt, vh) = strides(q), strides(k), strides(v)
    (kcb, kcs, kch, kcd), (vcb, vcs, vch, vcd) = k_cache.stride(), v_cache.stride()
    page = k_cache.shape[1]
    S = page if table is None else min(table.shape[1] * page, cos.shape[0])
    overlap = can_overlap(q.device)
    launch(
        _qk_norm_rope_append_kernel, (n_q + 2 * n_k,), q=q, k=k, v=v, zq=zq, k_cache=as_read(k_cache, k_scales),
        v_cache=as_read(v_cache, v_scales), table=table, cos=cos, sin=sin, lengths=lengths,
        stride_qb=qb, stride_qt=qt, stride_qh=qh, stride_kb=kb, stride_kt=kt, stride_kh=kh,
        stride_vb=vb, stride_vt=vt, stride_vh=vh,
        stride_kcb=kcb, stride_kcs=kcs, stride_kch=kch, stride_kcd=kcd,
        stride_vcb=vcb, stride_vcs=vcs, stride_vch=vch, stride_vcd=vcd,
        stride_tb=stride_of(table, 0), stride_tn=stride_of(table, 1), stride_cos=cos.stride(0),
        stride_sin=sin.stride(0), stride_lengths=lengths.stride(0),
        T=q.shape[1], S=S, n_q=n_q, n_k=n_k, H=q.shape[2], Hkv=k.shape[2], D=q.shape[3],
        PAGE=None if table is None else page, eps=eps, scale=scale, BN=BN, BD=BD, OVERLAP=overlap, num_warps=WARPS,
        launch_pdl=overlap, **scale_arguments(k_scales, v_scales),
    )
    return zq


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, start: int | Tensor, eps: float | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        q, k = values_side_by_side(q), values_side_by_side(k)
        kept_q = q if eps is not None and ctx.needs_input_grad[0] else None
        kept_k = k if eps is not None and ctx.needs_input_grad[1] else None
        ctx.start, starts, _ = start_arguments(start)
        ctx.save_for_backward(kept_q, kept_k, cos, sin, starts)
        ctx.eps, ctx.scale = eps, scale
        return _qk_norm_rope_fwd(q, k, cos, sin, start, eps, scale)

    @staticmethod
    @differentiable_once
    def backward(ctx: FunctionCtx, dzq: Tensor | None, dzk: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, cos, sin, starts = ctx.saved_tensors
        dzq = values_side_by_side(dzq) if ctx.needs_input_grad[0] and dzq is not None else None
        dzk = values_side_by_side(dzk) if ctx.needs_input_grad[1] and dzk is not None else None
        start = ctx.start if starts is None else starts
        dq, dk = _qk_norm_rope_bwd(q, k, dzq, dzk, cos, sin, start, ctx.eps, ctx.scale)
        return dq, dk, None, None, None, None, None


def table_of(table: Tensor, like: Tensor) -> Tensor:
    """In the dtype that `like` is computed in, with the values of a row side by side: as a rule, the table itself."""
    return values_side_by_side(table.to(torch.promote_types(like.dtype, torch.float32)))


def qk_norm_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, start: int | Tensor = 0, eps: float | None = 1e-6,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """kernels_torch.qk_norm_rope, in one pass over q and k together. Arguments: see kernels_torch.qk_norm_rope."""
    check_qk_norm_rope(q, k, cos, sin, start, eps)
    check_gpu(q=q)
    cos, sin = table_of(cos, q), table_of(sin, q)
    return _QKNormRope.apply(q, k, cos, sin, start, eps if eps is None else float(eps), float(scale))


def qk_norm_rope_append(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor, *,
    eps: float | None = 1e-6, scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """kernels_torch.qk_norm_rope_append, in one launch. Arguments: see kernels_torch.qk_norm_rope_append."""
    check_qk_norm_rope_append(q, k, v, k_cache, v_cache, cos, sin, lengths, eps)
    check_gpu(q=q)
    with torch.no_grad():
        q = _appended(q, k, v, k_cache, v_cache, None, cos, sin, lengths, eps, scale)
    return q, k_cache, v_cache


def qk_norm_rope_append_paged(
    q: Tensor, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, cos: Tensor, sin: Tensor,
    lengths: Tensor, *, eps: float | None = 1e-6, scale: float = 1.0, k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """kernels_torch.qk_norm_rope_append_paged, in one launch. Arguments: see there."""
    check_qk_norm_rope_append_paged(q, k, v, k_pages, v_pages, block_table, cos, sin, lengths, eps, k_scales, v_scales)
    check_gpu(q=q)
    with torch.no_grad():
        q = _appended(q, k, v, k_pages, v_pages, block_table, cos, sin, lengths, eps, scale, k_scales, v_scales)
    return q, k_pages, v_pages


def _appended(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor | None, cos: Tensor, sin: Tensor,
    lengths: Tensor, eps: float | None, scale: float, k_scales: Tensor | None = None, v_scales: Tensor | None = None,
) -> Tensor:
    q, k, v = values_side_by_side(q), values_side_by_side(k), values_side_by_side(v)
    cos, sin = table_of(cos, q), table_of(sin, q)
    eps = eps if eps is None else float(eps)
    places = (k_cache, v_cache, table, cos, sin, lengths)
    return _qk_norm_rope_append(q, k, v, *places, eps, float(scale), k_scales, v_scales)
