"""How kernels are cut into tiles and how many programs are started: plain arithmetic with its reasons, never a search.

All of it is Python on integers, so that torch.compile traces through it and the same shape always launches the same way.
"""

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """What one program works on at a time: BT rows of BD columns, by `warps` warps of 32 threads."""

    BT: int
    BD: int
    warps: int


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n: Triton's blocks come in no other size."""
    power = 1
    while power < n:
        power *= 2
    return power


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def n_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; the interpreter runs programs one after the other, so few keep it quick."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


# A row up to this width is held in registers by one program, so it is read once. At 16 warps, 16,384 fp32 values are 32
# registers a thread, and backward holds three such blocks (x, dy and the sum for dw) in the 128 a thread then has.
WIDEST_BLOCK = 16384

# Values a warp holds of one block: 32 a thread, that is four 16-byte loads of bf16 in flight. Not measured yet.
VALUES_PER_WARP = 1024


def row_tile(D: int) -> Tile:
    """Tile of a kernel that goes over whole rows of D ≤ WIDEST_BLOCK values.

    Narrow rows share a program, about 4 warps' worth of them, so that a program has enough to load at once.
    """
    BD = next_power_of_two(D)
    BT = max(1, 4 * VALUES_PER_WARP // BD)
    return Tile(BT, BD, warps=max(4, BD // VALUES_PER_WARP))


def resident_programs(device: torch.device, warps: int) -> int:
    """How many programs fill the GPU when each thread takes 128 registers: 16 warps a processor. Not measured yet."""
    return n_processors(device) * max(1, 16 // warps)
