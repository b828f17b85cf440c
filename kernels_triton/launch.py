"""How kernels are cut into tiles and how many programs are started: plain arithmetic with its reasons, never a search.

All of it is Python on integers, so that torch.compile traces through it and the same shape always launches the same way.
"""

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """What one program works on at a time: BT rows of BD columns, by `warps` warps of 32 threads.

    stages    how many tiles of a loop are on their way from memory at once; 1: each is awaited as it is needed
    """

    BT: int
    BD: int
    warps: int
    stages: int = 1


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

# Shared memory that the stages of one program may take: two programs must fit beside each other on the smallest GPUs we
# mean to run on (100 KiB a processor on sm_86 and sm_89).
STAGE_BYTES = 48 * 1024


def row_tile(D: int, values_per_warp: int) -> Tile:
    """Tile of a kernel that goes over whole rows of D ≤ WIDEST_BLOCK values.

    Narrow rows share a program, four warps' worth of them, so that each thread has several 16-byte loads in flight.
    """
    BD = next_power_of_two(D)
    warps = min(max(BD // values_per_warp, 4), 16)
    return Tile(BT=max(1, warps * values_per_warp // BD), BD=BD, warps=warps)


def rmsnorm_fwd_tile(D: int) -> Tile:
    """32 values a thread, that is four loads of bf16: 40 to 80 registers. Not measured yet."""
    return row_tile(D, values_per_warp=1024)


def rmsnorm_bwd_tile(D: int, itemsize: int) -> Tile:
    """16 values a thread of x and of dy, and as many fp32 sums for dw. Not measured yet.

    The next two tiles are fetched while one is worked on, as far as shared memory goes.
    """
    tile = row_tile(D, values_per_warp=512)
    fits = 2 * 2 * tile.BT * tile.BD * itemsize <= STAGE_BYTES  # x and dy, and one buffer fewer than stages
    return tile._replace(stages=3 if fits else 1)


def resident_programs(device: torch.device, warps: int) -> int:
    """How many programs fill the GPU when each thread takes 128 registers: 16 warps a processor. Not measured yet."""
    return n_processors(device) * max(1, 16 // warps)
