"""Backward on Hopper: lse and δ side by side, then the kernel of backward_kernel.py, then dq from its sums in fp32.

Five products a tile where the portable kernels do seven, for fp32 memory the size of q in return. It makes all three gradients;
where fewer are needed the portable kernels do.
"""

import math
from importlib import import_module

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels_triton.attention.hopper.api import TensorDescriptor, gl
from kernels_triton.attention.hopper.backward_kernel import _attention_bwd_kernel
from kernels_triton.attention.hopper.forward import aligned, box
from kernels_triton.attention.tiles import document_bounds
from kernels_triton.launch import ceil_div, launch, launch_with_descriptors, n_processors

portable = import_module("kernels_triton.attention.backward")

BT, BS = 64, 128  # queries and keys of a tile: their sums, dk and dv, take half of all registers
REGISTERS = 24  # a thread of the warps that only load and wait; the others have 240

# TFLOP/s on an H200, bf16, and in brackets cuDNN's in the same turns, by the copy engine / from registers:
#   D 128   B32 T2048 H6    437 / 430 (429)    window 768     350 / 339
#           B4 T8192 H16    526 / 510 (517)    window 2048    452 / 432
#           B1 T32768 H16   556 / 517 (554)    Hkv 4          481 / 473 (482) and 492 / 493 (501), two runs
#   D 64    B32 T2048 H12   320 / 333 (332)
# Heads going up, by the copy engine: B32 T2048 H6 14 / 28 / 40 / 60: 439 / 443 / 433 / 408; B4 T8192 H16 2 / 4 / 8 / 12:
# 505 / 512 / 521 / 511, window 2048 0 / 4 / 8 / 14 / 21 / 32: 469 / 432 / 450 / 472 / 471 / 441; B1 T32768 H16 0 / 1 / 2 / 3:
# 538 / 547 / 546 / 545.
# Without adding to dq at all it would be 534 at T 2048 and 669 at T 8192.


def by_copy_engine(BD: int) -> bool:
    """Who adds to dq (STAGED in the kernel)."""
    return BD == 128


def heads_going_up(B: int, Tq: int, Tk: int, H: int, Hkv: int, window: int | None, device: torch.device) -> int:
    """How many heads, of the Hkv of all rows, have their first keys go first.

    Programs that start together on neighbouring tiles of such a head wait for each other, three tiles a neighbour, unless
    others come between them: so many heads go together that those of one tile of keys fill the GPU for as long. With grouped
    heads twice as many, where there are: B4 T8192 H16 Hkv4 D128, 0 / 1 / 2 / 4 / 6 up, 449 / 460 / 485 / 493 / 485 TFLOP/s
    (cuDNN 501).
    """
    pairs = Tq * (min(Tk, window + 1) if window is not None else Tk - Tq // 2)
    tiles = H // Hkv * (pairs / (BT * BS * ceil_div(Tk, BS)) + 1)  # of queries, a program
    for processors in (3.5,) if Hkv == H else (7, 3.5):
        heads = math.ceil(processors * n_processors(device) / tiles)
        if 2 * heads <= B * Hkv:
            return heads
    return 0


@triton.jit(do_not_specialize=["T", "Tp"])
def _rows_kernel(
    out, dout, lse, rows, turns, stride_ob, stride_ot, stride_oh, stride_db, stride_dt, stride_dh, T, Tp,
    H: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):
    """rows [B, H, tiles, 2, BT]: lse, infinite from T on so that p is 0 there, and δ = Σ_d out · dout. turns [B, H, tiles]: 0."""
    i_p, n_t = tl.program_id(0), tl.cdiv(T, BT)
    i_t, i_bh = i_p % n_t, (i_p // n_t).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    o_t, o_d = i_t * BT + tl.arange(0, BT), tl.arange(0, BD)
    o_wide = o_t.to(tl.int64)[:, None]
    m = (o_t < T)[:, None] & (o_d < D)[None, :]
    p_o = out + i_b * stride_ob + i_h * stride_oh + o_wide * stride_ot + o_d[None, :]
    p_do = dout + i_b * stride_db + i_h * stride_dh + o_wide * stride_dt + o_d[None, :]
    b_o = tl.load(p_o, mask=m, other=0.0).to(tl.float32)                                                # [BT, BD]
    b_do = tl.load(p_do, mask=m, other=0.0).to(tl.float32)                                              # [BT, BD]
    b_lse = tl.load(lse + i_bh * Tp + o_t, mask=o_t < T, other=float("inf"))                            # [BT]
    p_rows = rows + i_p.to(tl.int64) * (2 * BT) + tl.arange(0, BT)
    tl.store(p_rows, b_lse)
    tl.store(p_rows + BT, tl.sum(b_o * b_do, 1))
    tl.store(turns + i_p, 0)


@triton.jit(do_not_specialize=["T"])
def _dq_kernel(
    sums, dq, T, scale,
    H: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):
    """dq [B, T, H, D], with the factor `scale`: a tile of sums is in the order in which 4 × 2 warps of threads hold products."""
    i_p, n_t = tl.program_id(0), tl.cdiv(T, BT)
    i_t, i_bh = i_p % n_t, (i_p // n_t).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    b_x = tl.load(sums + i_p.to(tl.int64) * (BT * BD) + tl.arange(0, BT * BD)) * scale
    b_x = tl.reshape(b_x, [BD // 16, 2, 4, 8, 4, 2, 2])  # columns by 8, halves, rows by 16, rows, columns by 2, rows by 8, columns
    b_x = tl.reshape(tl.permute(b_x, [2, 5, 3, 1, 0, 4, 6]), [BT, BD])
    o_t, o_d = i_t * BT + tl.arange(0, BT), tl.arange(0, BD)
    p_dq = dq + ((i_b * T + o_t.to(tl.int64)) * H + i_h)[:, None] * D + o_d[None, :]
    tl.store(p_dq, b_x.to(dq.dtype.element_ty), mask=(o_t < T)[:, None] & (o_d < D)[None, :])


def _attention_bwd(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, window: int | None, doc_ids: Tensor | None,
    scale: float, needs_dq: bool, needs_dk: bool, needs_dv: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As the portable one, for what forward.supports. torch.compile sees an operator: it cannot trace a kernel not of tl."""
    if q.numel() == 0 or k.shape[1] == 1 or not (needs_dq and needs_dk and needs_dv):
        return portable._attention_bwd(
            q, k, v, out, lse, dout, window, doc_ids, scale, needs_dq, needs_dk, needs_dv,
        )
    if torch.compiler.is_compiling():
        return attention_backward(q, k, v, out, lse, dout, window, doc_ids, scale)
    return backward(q, k, v, out, lse, dout, window, doc_ids, scale)


def backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, window: int | None, doc_ids: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv."""
    (B, Tq, H, D), (Tk, Hkv), BD = q.shape, k.shape[1:3], 64 if q.shape[3] <= 64 else 128
    q, k, v, dout = aligned(q), aligned(k), aligned(v), aligned(dout)
    dq, dk, dv = empty_results(q, k)
    staged, n_tiles = by_copy_engine(BD), B * H * ceil_div(Tq, BT)
    rows = torch.empty((n_tiles, 2 * BT), dtype=torch.float32, device=q.device)
    turns = torch.empty(n_tiles, dtype=torch.int32, device=q.device)
    sums = torch.empty((n_tiles * BT * BD // 256, 256), dtype=torch.float32, device=q.device)
    (ob, ot, oh), (db, dt, dh) = out.stride()[:3], dout.stride()[:3]
    launch(
        _rows_kernel, (n_tiles,), out=out, dout=dout, lse=lse, rows=rows, turns=turns,
        stride_ob=ob, stride_ot=ot, stride_oh=oh, stride_db=db, stride_dt=dt, stride_dh=dh, T=Tq, Tp=lse.shape[2],
        H=H, D=D, BT=BT, BD=BD,
    )
    up = heads_going_up(B, Tq, Tk, H, Hkv, window, q.device) if doc_ids is None else 0
    launch_with_descriptors(
        _attention_bwd_kernel, (ceil_div(Tk, BS) * B * Hkv,), q.device,
        **tiles_of(BT, BD, q=q, dout=dout), **tiles_of(BS, BD, k=k, v=v, dk=dk, dv=dv), rows=rows_of(rows, 1),
        dq=rows_of(sums, BT * BD // 256) if staged else sums, turns=turns, **bounds_of(doc_ids),
        C=max(scale * math.log2(math.e), 1e-30), scale=scale,  # 0 would make NaN of -inf
        Tq=Tq, Tk=Tk, n_heads=B * Hkv, n_down=B * Hkv - up,
        window=window, Hkv=Hkv, GROUP=H // Hkv, BT=BT, BS=BS, BD=BD, STAGES=2 if staged and BD == 128 else 3,
        STAGED=staged, REGISTERS=REGISTERS, num_warps=8, num_stages=3,
    )
    launch(_dq_kernel, (n_tiles,), sums=sums, dq=dq, T=Tq, scale=scale, H=H, D=D, BT=BT, BD=BD)
    return dq, dk, dv


def empty_results(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, k))


def tiles_of(n: int, BD: int, **tensors: Tensor) -> dict[str, TensorDescriptor]:
    """Tensors [B, T, H, D] as the copy engine takes them: by n tokens of a head, zeros beyond T and D."""
    layout = gl.NVMMASharedLayout(min(128, 2 * BD), 16, 4)
    boxes = {name: box(x, n, BD) for name, x in tensors.items()}
    return {name: TensorDescriptor(x.base, x.shape, x.strides, x.block_shape, layout) for name, x in boxes.items()}


def rows_of(x: Tensor, n: int) -> TensorDescriptor:
    """x by n whole rows."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [n, x.shape[1]], gl.NVMMASharedLayout(0, 32, rank=2))


def bounds_of(doc_ids: Tensor | None) -> dict[str, Tensor | int | None]:
    """document_bounds, but no tile of keys is seen up to an earlier query than the one before it: whoever adds to a tile of
    queries are then neighbours. For rows of packed documents that is so anyway."""
    arguments = document_bounds(doc_ids if doc_ids is None else doc_ids.contiguous(), BS)
    if doc_ids is not None:
        seen_to = arguments["bounds"][:, :, 1]
        seen_to.copy_(seen_to.cummax(1).values)
    return arguments


@torch.library.custom_op("kestrel::hopper_attention_backward", mutates_args=())
def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, window: int | None, doc_ids: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return backward(q, k, v, out, lse, dout, window, doc_ids, scale)


@attention_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, window: int | None, doc_ids: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_results(q, k)
