"""Tables of addresses: how one launch reaches many tensors that lie apart.

A table is an int64 tensor on the device, one row for each tensor or matrix. It is made once for the same addresses and
kept; parameters never move, and gradients that are added up in place do not either. Making one copies from the host
without waiting. While a CUDA graph is captured that is forbidden: it reads the table that was made before for the same
addresses, which then lasts as long as the program, and without one a kernel writes what it was told at every replay.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TABLES: dict[tuple, Tensor] = {}
CAPTURED: list[Tensor] = []  # tables that graphs read
FORGET_AFTER = 256  # tables: gradients that are at another place at every step must not fill the memory
AT_ONCE = 16


@triton.jit(do_not_specialize=[f"x{i}" for i in range(AT_ONCE)])
def _write_kernel(
    out, x0: tl.int64, x1: tl.int64, x2: tl.int64, x3: tl.int64, x4: tl.int64, x5: tl.int64, x6: tl.int64, x7: tl.int64,
    x8: tl.int64, x9: tl.int64, x10: tl.int64, x11: tl.int64, x12: tl.int64, x13: tl.int64, x14: tl.int64, x15: tl.int64,
):
    """Sixteen numbers, in order."""
    tl.store(out, x0)
    tl.store(out + 1, x1)
    tl.store(out + 2, x2)
    tl.store(out + 3, x3)
    tl.store(out + 4, x4)
    tl.store(out + 5, x5)
    tl.store(out + 6, x6)
    tl.store(out + 7, x7)
    tl.store(out + 8, x8)
    tl.store(out + 9, x9)
    tl.store(out + 10, x10)
    tl.store(out + 11, x11)
    tl.store(out + 12, x12)
    tl.store(out + 13, x13)
    tl.store(out + 14, x14)
    tl.store(out + 15, x15)


def table_of(rows: list[tuple[int, ...]], device: torch.device) -> Tensor:
    """rows on the device [len(rows), columns], int64."""
    key = (device, tuple(rows))
    found = TABLES.get(key)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        if found is None:
            return write_table(rows, device)  # not kept: it holds nothing before the graph is replayed
        CAPTURED.append(found)
    elif found is None:
        if len(TABLES) >= FORGET_AFTER:
            TABLES.clear()
        if device.type == "cuda" and all(other != device for other, _ in TABLES):
            write_table([(0,)], device)  # so that the kernel is there when a graph is captured
        host = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
        found = TABLES[key] = host.to(device, non_blocking=True)
    return found


def write_table(rows: list[tuple[int, ...]], device: torch.device) -> Tensor:
    values = [value for row in rows for value in row]
    values += [0] * (-len(values) % AT_ONCE)
    table = torch.empty(len(values), dtype=torch.int64, device=device)
    with torch.cuda.device(device):
        for i in range(0, len(values), AT_ONCE):
            _write_kernel[(1,)](table[i:], *values[i : i + AT_ONCE])
    return table[: len(rows) * len(rows[0])].view(len(rows), len(rows[0]))


def aligned(*tensors: Tensor) -> bool:
    """Whether all begin at multiples of 16 bytes."""
    return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
