"""How kernels are cut into tiles, how many programs are started, and how a kernel is launched on the GPU of its tensors.

Tiles are plain arithmetic on integers with its reasons, no search: torch.compile traces through it, and the same shape
always launches the same way.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime import JITFunction

from kernels_triton import ahead


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


def block_of(n: int, widest: int, narrowest: int = 256) -> int:
    """The widest power of two of which whole blocks cover n with at most a third of them to spare."""
    block = min(next_power_of_two(n), widest)
    while block > narrowest and 2 * block * ceil_div(n, block) > 3 * n:
        block //= 2
    return block


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
# one percent of it, in searches over rows × warps × stages × programs on an H200 (copy 4.23 TB/s; µs between events, L2
# flushed, bf16, without a weight where not said; in brackets a plain copy of as many bytes in the same turns).
FORWARD = {
    1024: (16, 4),    # 65536 × 768: 52.0 (52.6); 32 values 53.4, 1 warp 52.9; .cg, .cs and .wt stores within 1 %
    2048: (32, 2),    # 65536 × 1536: 99.1 (98.6), with an fp32 weight 99.1; 4 warps 100.1 and 100.6
    3072: (64, 1),    # 32768 × 2176: 72.2 (72.2), with an fp32 weight 73.3; 4 warps 72.8 and 79.2
    4096: (32, 16),   # 32768 × 4096: 133.2 (130.7), with an fp32 weight 131.8; 1 warp of 64 values 132.6 and 134.8
}
BACKWARD = {          # dx alone: dealt out by the GPU; programs that stay, with a pipeline, take 3 % longer
    2048: (16, 2),    # 65536 × 768: 75.4 (75.6), × 1536: 144.5 (146.1); 4 warps 76.8, 143.6
                      # with ds, 65536 × 768: 99.0 (99.8), 32768 × 1280: 84.0 (84.5), 65536 × 1536: 188.4 (194.3);
                      # 4 warps 99.5, 86.3, 188.7
    4096: (16, 4),    # 32768 × 2176: 104.3 (106.1), × 4096: 190.1 (194.3)
}
BACKWARD_WITH_DW = {  # the sum over programs included, at 1536 and more a slower one; r made again: 0 to 4 % more
    2048: (16, 4, 4, 3),      # 65536 × 768: 81.2 (76.4); × 1536: 150.6 (146.6); 1 warp, 8 programs 81.2 and 156.3
    3072: (32, 4, 3, 4),      # 32768 × 2176: 112.2 (105.2); 16 values 112.5
    4096: (32, 8, 3, 1),      # 32768 × 4096: 201.2 (193.1); 2 stages and 2 programs 202.6
}
ADD_FORWARD = {
    4096: (16, 4),    # 65536 × 768: 99.8 (99.4), 32768 × 1280: 84.2 (83.7), 65536 × 1536: 194.4 (194.2)
}
MIX_FORWARD = {
    4096: (16, 2),    # 65536 × 768: 123.7 (123.6), 32768 × 1280: 103.7 (104.1), 65536 × 1536: 237.7 (242.3)
}
MIX_BACKWARD = {      # with the sums
    2048: (16, 4, 3, 2),      # 65536 × 768: 173.8 (170.7), 32768 × 1280: 150.8 (142.3), 65536 × 1536: 336.8 (333.6);
                              # 3 programs 175.6, 147.0, 342.9; no stages, 4 programs 182.4, 164.0, 353.1
}


def rmsnorm_fwd_tile(D: int) -> Tile:
    return tile_for(D, FORWARD, values=32)._replace(stay=None)


def rmsnorm_bwd_tile(D: int, itemsize: int, needs_dw: bool) -> Tile:
    tile = tile_for(D, BACKWARD_WITH_DW if needs_dw else BACKWARD, values=16)
    return as_staged(tile, itemsize, tensors=2) if needs_dw else tile._replace(stay=None)


def add_rmsnorm_fwd_tile(D: int) -> Tile:
    return tile_for(D, ADD_FORWARD, values=16)._replace(stay=None)


def mix_rmsnorm_fwd_tile(D: int) -> Tile:
    return tile_for(D, MIX_FORWARD, values=16)._replace(stay=None)


def mix_rmsnorm_bwd_tile(D: int, itemsize: int, needs_sums: bool, tensors: int = 5) -> Tile:
    """Programs stay for the sake of the sums only. tensors: so many are read"""
    tile = as_staged(tile_for(D, MIX_BACKWARD, values=16), itemsize, tensors)
    return tile if needs_sums else tile._replace(stages=1, stay=None)


def tile_for(D: int, table: dict[int, tuple], values: int) -> Tile:
    """The row of a table for width D, or beyond it one row of x at a time."""
    for width, row in table.items():
        if width >= D:
            return row_tile(D, *row)
    return wide_row_tile(D, values)


def as_staged(tile: Tile, itemsize: int, tensors: int) -> Tile:
    """Fewer stages where the tiles of so many tensors, of values larger than the bf16 that was measured, do not fit."""
    return tile._replace(stages=min(tile.stages, stages_that_fit(tile, itemsize, tensors)))


def stages_that_fit(tile: Tile, itemsize: int, tensors: int = 2) -> int:
    """Of each tensor that is read in a loop, Triton keeps one buffer fewer than there are stages."""
    return 1 + STAGE_BYTES // (tensors * tile.BT * tile.BD * itemsize)


# Rows × columns at a time, and warps, of the sum of dw over programs: all lines at once where there are no more than that.
# It adds 2 µs to backward (128 × 16: 0.5 more); that the GPU may start it while the kernel before ends saves 1.4.
SUM_LINES = Tile(BT=512, BD=8, warps=8)


# Whether kernels run in Triton's interpreter, on any device: decided when they are defined.
INTERPRETED = triton.knobs.runtime.interpret


def check_gpu(**tensors: Tensor) -> None:
    """Refuse a tensor that no kernel can read. Public functions ask for one: the reference's checks see to the others."""
    for name, tensor in tensors.items():
        if tensor.device.type != "cuda" and not INTERPRETED:
            raise ValueError(
                f"Triton kernels need tensors on an NVIDIA GPU, got {name} on {tensor.device}: "
                "use kernels_torch, or set TRITON_INTERPRET=1 before Triton is imported"
            )


def is_hopper(device: torch.device) -> bool:
    """Compute capability 9.x. Newer ones have other tensor cores, and those of consumers less shared memory."""
    return device.type == "cuda" and torch.cuda.get_device_properties(device).major == 9


def can_overlap(device: torch.device) -> bool:
    """Whether a kernel may be started before the one it waits for has ended: Hopper and newer.

    PyTorch's compiler does not pass the request on, so there kernels follow one another.
    """
    return device.type == "cuda" and not torch.compiler.is_compiling() and is_hopper_or_newer(device)


@cache  # asked at every backward pass
def is_hopper_or_newer(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


def n_programs(T: int, tile: Tile, device: torch.device) -> int:
    """For T rows: one for each tile, or as many as stay until all are done."""
    programs = ceil_div(T, tile.BT)
    return programs if tile.stay is None else min(programs, resident_programs(device, tile.stay))


def resident_programs(device: torch.device, stay: int) -> int:
    """How many programs are started when `stay` of them share a processor until the work is done."""
    return n_processors(device) * stay


# What was launched before: kernel, options and arguments → the compiled kernel and its device.
COMPILED: dict[tuple, tuple] = {}
FORGET_AFTER = 10_000  # entries; sizes that change with every call must not fill the memory


def launch(
    kernel: JITFunction, grid: tuple[int, ...], *, num_warps: int = 4, num_stages: int = 3, launch_pdl: bool = False, **args
) -> None:
    """kernel[grid](**args), and quicker on the host once the same was launched before on tensors like these.

    Triton asks what it compiles for of every argument at every launch: the dtype of a tensor and whether it begins at a
    multiple of 16 bytes, and of an integer whether it is 1 or such a multiple. Here that, each tensor's device, and all
    else by its value are the key to what was compiled. Tensors that are not all on one GPU are refused.

    Inside torch.compile, in the interpreter and while a profiler listens to launches it is Triton's own launch.
    """
    if ahead.rehearsing:
        compile_only(kernel, grid, device_of(args), args | options_of(num_warps, num_stages, launch_pdl))
        return
    if torch.compiler.is_compiling() or type(kernel) is not JITFunction or triton.knobs.runtime.launch_enter_hook.calls:
        kernel[grid](**args, **options_of(num_warps, num_stages, launch_pdl))
        return
    key, values = [kernel.fn, num_warps, num_stages, launch_pdl], []
    for name in kernel.arg_names:
        value = args[name]
        if isinstance(value, Tensor):
            pointer = value.data_ptr()
            key.append((value.dtype, value.get_device(), pointer % 16 == 0))
            values.append(pointer)
        else:
            key.append(value)
            values.append(value)
    found = COMPILED.get(tuple(key))
    if found is None:
        device = device_of(args)
        with torch.cuda.device(device):
            compiled = kernel[grid](**args, **options_of(num_warps, num_stages, launch_pdl))
        remember(tuple(key), (compiled, device.index))
        return
    compiled, device = found
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, num_warps=num_warps, num_stages=num_stages, launch_pdl=launch_pdl, **args)
    stream = triton.runtime.driver.active.get_current_stream(device)
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    run(*grid, *(1, 1, 1)[len(grid):], stream, function, metadata, None, None, None, *values)


def launch_with_descriptors(
    kernel: JITFunction, grid: tuple[int, ...], device: torch.device, *, num_warps: int, num_stages: int, **args
) -> None:
    """kernel[grid](**args) on `device`, whichever is current: by Triton alone, which makes descriptors anew each time."""
    options = options_of(num_warps, num_stages, launch_pdl=False)
    if ahead.rehearsing:
        compile_only(kernel, grid, device, args | options)
        return
    if torch.compiler.is_compiling() or device.type != "cuda":
        kernel[grid](**args, **options)
    else:
        with torch.cuda.device(device):
            kernel[grid](**args, **options)


def compile_only(kernel: JITFunction, grid: tuple[int, ...], device: torch.device, args: dict[str, object]) -> None:
    """What ahead.py makes of a launch."""
    with torch.cuda.device(device):
        kernel.run(grid=grid, warmup=True, **args)


def options_of(num_warps: int, num_stages: int, launch_pdl: bool) -> dict[str, int | bool]:
    """As Triton takes them; torch.compile knows the first two only."""
    options = dict(num_warps=num_warps, num_stages=num_stages)
    return options | dict(launch_pdl=True) if launch_pdl else options


def remember(key: tuple, found: tuple) -> None:
    if len(COMPILED) >= FORGET_AFTER:
        COMPILED.clear()
    COMPILED[key] = found


def device_of(args: dict[str, object]) -> torch.device:
    """The one GPU that all tensors are on."""
    tensors = {name: value for name, value in args.items() if isinstance(value, Tensor)}
    check_gpu(**tensors)
    first, *others = tensors
    device = tensors[first].device
    for name in others:
        if tensors[name].device != device:
            raise ValueError(f"{name} must be on {device} like {first}, got {tensors[name].device}")
    return device
