"""How attention is cut into tiles.

Measured on Hopper only. For other GPUs: of what Triton 3.6 compiles for sm_80 and sm_86 without spills, or next to none,
those with the most products for each value they read.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels_triton.attention.primitives import _bounds_kernel
from kernels_triton.launch import ceil_div, launch, next_power_of_two


class Tile(NamedTuple):
    """BT queries by BS keys at a time, by `warps` warps, `stages` tiles of the loop on their way at once."""

    BT: int
    BS: int
    warps: int
    stages: int


Table = dict[str, dict[int, Tile]]  # of a kernel, up to a width of head

# 227 KiB of shared memory a processor, products by groups of four warps: Hopper. The fastest on an H200, bf16, µs of
# B8 T2048 H16 and B2 T8192 H16 at D 128, B16 T2048 H12 at D 64 (in brackets the runner-up):
#     D 128   forward 336 and 1075 (128 × 32, 4 warps: 363, 1198); dq 412 and 1307 (64 × 64, 4 warps: 412, 1399);
#             dk and dv 574 and 1854 (64 × 64, 4 warps: 600, 2023)
#     D 64    forward 299 (128 × 64, 4 warps: 302), dq 304 (64 × 128, 4 warps: 334), dk and dv 507 (32 × 128, 4 warps: 531)
# At 256, not measured: those with the most products for each value read that spill next to nothing.
LARGE: Table = {
    "forward": {64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 4, 3), 256: Tile(128, 64, 8, 2)},
    "dq": {64: Tile(64, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 32, 8, 2)},
    "dk_dv": {64: Tile(64, 64, 4, 3), 128: Tile(64, 128, 8, 3), 256: Tile(32, 64, 8, 2)},
}
# 99 KiB, products by single warps: all others from Ampere on. For sm_80: forward 255, 255, 224; dq 197, 255, 176; dk and dv
# 255, 220, 171.
SMALL: Table = {
    "forward": {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 32, 8, 2)},
    "dq": {64: Tile(128, 64, 8, 3), 128: Tile(64, 64, 4, 2), 256: Tile(32, 32, 4, 2)},
    "dk_dv": {64: Tile(64, 128, 8, 3), 128: Tile(64, 64, 8, 2), 256: Tile(32, 32, 8, 2)},
}
# No tensor cores: a product is unrolled over the width of a head, and larger tiles compile for minutes, and spill.
FP32: Table = {
    "forward": {128: Tile(32, 32, 8, 1), 256: Tile(32, 16, 8, 1)},
    "dq": {64: Tile(32, 32, 8, 1), 256: Tile(32, 16, 8, 1)},
    "dk_dv": {128: Tile(32, 32, 8, 1), 256: Tile(16, 16, 8, 1)},
}
FP64: Table = {kernel: {256: Tile(16, 16, 4, 1)} for kernel in LARGE}
# Small, so that short rows have tiles of every kind; of different shapes, so that none is taken for another.
IN_INTERPRETER: Table = {
    "forward": {256: Tile(32, 16, 4, 1)},
    "dq": {256: Tile(16, 32, 4, 1)},
    "dk_dv": {256: Tile(16, 32, 4, 1)},
}
WIDEST_HEAD = 256

LARGE_BYTES = 200 * 1024
L2_BYTES = 16 * 2**20  # what heads that are worked on at once may read; not measured yet
LSE = 128  # lse has whole multiples of it: all tiles of queries divide it, so that none reads beyond
DELTA = Tile(BT=16, BS=0, warps=4, stages=1)
BOUNDS = 1024  # document ids at a time


def tile_for(kernel: str, q: Tensor) -> Tile:
    """The row of the table for this GPU and dtype that is wide enough for the heads of q."""
    for width, tile in table_for(q)[kernel].items():
        if width >= q.shape[-1]:
            return tile
    raise AssertionError(f"heads of {q.shape[-1]} ought to have been refused")


def table_for(q: Tensor) -> Table:
    if q.device.type != "cuda":
        return IN_INTERPRETER
    if q.element_size() > 2:
        return FP32 if q.element_size() == 4 else FP64
    return LARGE if torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin >= LARGE_BYTES else SMALL


def padded(D: int) -> int:
    """The width of a head in registers: products take powers of two from 16 on."""
    return max(16, next_power_of_two(D))


def heads_in_l2(x: Tensor, tensors: int) -> int:
    """How many times `tensors` tensors of one head of x [B, T, H, D] fit into the L2 cache; at least once."""
    return max(1, L2_BYTES // (tensors * x.shape[1] * x.shape[3] * x.element_size()))


def document_bounds(doc_ids: Tensor | None, BT: int) -> dict[str, Tensor | int | None]:
    """Arguments of a kernel whose programs take BT tokens: the ids, their strides, and bounds [B, tiles, 4]."""
    if doc_ids is None:
        return dict(doc_ids=None, bounds=None, stride_ib=0, stride_it=0)
    B, T = doc_ids.shape
    n, (stride_b, stride_t) = ceil_div(T, BT), doc_ids.stride()
    bounds = torch.empty((B, n, 4), dtype=torch.int32, device=doc_ids.device)
    launch(
        _bounds_kernel, (n, B), doc_ids=doc_ids, bounds=bounds, stride_b=stride_b, stride_t=stride_t, T=T, n_tiles=n,
        BT=BT, BLOCK=BOUNDS,
    )
    return dict(doc_ids=doc_ids, bounds=bounds, stride_ib=stride_b, stride_it=stride_t)
