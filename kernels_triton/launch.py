"""How kernels are cut into tiles and how many programs are started: plain arithmetic with its reasons, never a search.

All of it is Python on integers, so that torch.compile traces through it and the same shape always launches the same way.
"""

from functools import cache
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """What one program works on at a time: BT rows of BD columns, by `warps` warps of 32 threads.

    stages    how many tiles of a loop are on their way from memory at once; 1: each is awaited as it is needed
    stay      programs a processor that stay and go from tile to tile; None: a program for each tile
    """

    BT: int
    BD: int
    warps: int
    stages: int = 1
    stay: int | None = None


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n: Triton's blocks come in no other size."""
    power = 1
    while power < n:
        power *= 2
    return power


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def n_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; the interpreter runs programs one after the other, so few keep it quick."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


# A row up to this width is held in registers by one program and so read once. Compiled for sm_90, backward with a weight
# takes 128 registers at 16384 and spills 22 of them; at 8192 it spills none.
WIDEST_BLOCK = 16384

# Shared memory that the tiles on their way to one program may take: the smallest GPUs we mean to run on (sm_86 and
# sm_89) have 100 KiB a processor.
STAGE_BYTES = 64 * 1024


def row_tile(D: int, values: int, warps: int, stages: int = 1, stay: int | None = None) -> Tile:
    """Tile of a kernel that goes over whole rows of D ≤ WIDEST_BLOCK values, `values` of each tile for each thread.

    Narrow rows share a program, so that each thread still has several 16-byte loads on their way.
    """
    BD = next_power_of_two(D)
    return Tile(max(1, 32 * warps * values // BD), BD, warps, stages, stay)


def wide_row_tile(D: int, values: int) -> Tile:
    """Tile for rows wider than those measured: one row, enough warps for `values` a thread."""
    warps = min(max(next_power_of_two(D) // (32 * values), 4), 16)
    return row_tile(D, values, warps, stay=max(1, 16 // warps))


# Rows up to a width: values a thread, warps[, stages, programs that stay on a processor]. Each was the fastest, or within
# one percent of it, in a search over rows × warps × stages × programs on an H200 (copy 4.25 TB/s; µs between events, L2
# flushed, bf16; in brackets a plain copy of as many bytes; all of it in bench/results/rmsnorm.csv).
FORWARD = {
    3072: (32, 4),    # 65536 × 768: 53.9 µs (52.9), × 1536: 101.5 (98.7), 32768 × 2176: 72.6 (72.2)
    4096: (32, 16),   # 32768 × 4096: 133.3 (131.4); 4 warps 135.8: too few bytes on their way
}
BACKWARD = {          # dx alone: dealt out by the GPU; programs that stay, with a pipeline, take 3 % longer
    4096: (16, 4),    # 65536 × 768: 76.5 (75.7), × 1536: 142.8 (146.2), 32768 × 2176: 104.0 (105.0), × 4096: 190.5 (194.2)
}
BACKWARD_WITH_DW = {  # the sum over programs included, 3 to 5 µs of each
    2048: (16, 4, 4, 3),      # 65536 × 768: 81.7 (75.5), × 1536: 150.6 (146.6); 3 stages and 4 programs 82.2, 152.2
    3072: (32, 4, 3, 4),      # 32768 × 2176: 112.2 (105.2); 16 values 112.5
    4096: (32, 8, 3, 1),      # 32768 × 4096: 201.2 (193.1); 2 stages and 2 programs 202.6
}


def rmsnorm_fwd_tile(D: int) -> Tile:
    for width, row in FORWARD.items():
        if width >= D:
            return row_tile(D, *row)
    return wide_row_tile(D, values=32)


def rmsnorm_bwd_tile(D: int, itemsize: int, needs_dw: bool) -> Tile:
    """Fewer stages than in the table where values are larger than the bf16 it was measured with."""
    for width, row in (BACKWARD_WITH_DW if needs_dw else BACKWARD).items():
        if width >= D:
            tile = row_tile(D, *row)
            return tile._replace(stages=min(tile.stages, stages_that_fit(tile, itemsize)))
    tile = wide_row_tile(D, values=16)
    return tile if needs_dw else tile._replace(stay=None)


def stages_that_fit(tile: Tile, itemsize: int) -> int:
    """Of x and of dy, Triton keeps one buffer fewer than there are stages."""
    return 1 + STAGE_BYTES // (2 * tile.BT * tile.BD * itemsize)


# Rows × columns at a time, and warps, of the sum of dw over programs. It adds 3 to 5 µs to backward; that the GPU may start
# it while the kernel before ends saves 1.4 of them.
SUM_LINES = Tile(BT=128, BD=16, warps=8)


def can_overlap(device: torch.device) -> bool:
    """Whether a kernel may be started before the one it waits for has ended: Hopper and newer.

    PyTorch's compiler does not pass the request on, so there kernels follow one another.
    """
    return device.type == "cuda" and not torch.compiler.is_compiling() and is_hopper_or_newer(device)


@cache  # asked at every backward pass
def is_hopper_or_newer(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


def resident_programs(device: torch.device, stay: int) -> int:
    """How many programs are started when `stay` of them share a processor until the work is done."""
    return n_processors(device) * stay
