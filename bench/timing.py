"""The one clock of all benches: warm up, take turns, report medians, and say on which machine.

Variants are timed in turns, a round of each, so that a clock that drifts or a neighbour that wakes up meets all of them
alike. On a GPU the L2 cache is flushed before each call, because in a model the data does not wait there either; the
flush also keeps the GPU busy while the host queues the call, so that the events around it time the kernels and not the
queueing. Calls too short for that are better captured once in a CUDA graph and timed as its replay.
"""

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

Call = Callable[[], object]
RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).parent / "figures"


def folder_for(folder: Path, device: str, small: bool = False) -> Path:
    """Where numbers go that say something about kernels; those that do not, away from them and out of git."""
    return folder if device.startswith("cuda") and not small else folder / "local"


class Timing(NamedTuple):
    """Microseconds a call: the median and the 20th and 80th percentile of `rounds`."""

    median_us: float
    p20_us: float
    p80_us: float
    rounds: int


def time_in_turns(
    calls: dict[str, Call], device: torch.device, *, rounds: int = 50, warmup: int = 5
) -> dict[str, Timing]:
    """Time every call `rounds` times, a round of each in turn."""
    for call in calls.values():
        for _ in range(warmup):
            call()
    measure = measure_gpu if device.type == "cuda" else measure_cpu
    samples = measure(calls, device, rounds)
    return {name: summary(values) for name, values in samples.items()}


def measure_gpu(calls: dict[str, Call], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Microseconds of each call between two events, the L2 cache flushed before."""
    cache = torch.empty(512 * 2**20, dtype=torch.int8, device=device)  # larger than any L2, and over 100 µs of work
    pairs = {name: [] for name in calls}
    torch.cuda.synchronize(device)
    for _ in range(rounds):
        for name, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            cache.zero_()
            begin.record()
            call()
            end.record()
            pairs[name].append((begin, end))
    torch.cuda.synchronize(device)
    return {name: [1e3 * begin.elapsed_time(end) for begin, end in each] for name, each in pairs.items()}


def measure_cpu(calls: dict[str, Call], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Microseconds of each call by the host's clock."""
    samples = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            samples[name].append(1e6 * (time.perf_counter() - begin))
    return samples


def host_us(call: Call, rounds: int = 30, calls: int = 20) -> float:
    """Microseconds the host needs to queue a call, one after the other: what an eager loop of small calls costs."""
    samples = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        samples.append(1e6 * (time.perf_counter() - begin) / calls)
    return statistics.median(samples)


def summary(samples: list[float]) -> Timing:
    ordered = sorted(samples)
    return Timing(statistics.median(ordered), ordered[len(ordered) // 5], ordered[len(ordered) * 4 // 5], len(ordered))


def capture(call: Call, stream: torch.cuda.Stream) -> Call:
    """The call as a CUDA graph: what it costs without the host. What it depends on must have run on `stream`."""
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    torch.cuda.synchronize()
    return graph.replay


def copy_gbps(device: torch.device) -> float:
    """This machine's roof for kernels that only move data: GB/s of a large copy, bytes read plus bytes written."""
    n_bytes = 2**30 if device.type == "cuda" else 2**26
    source = torch.randint(0, 100, (n_bytes,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    timing = time_in_turns({"copy": lambda: target.copy_(source)}, device, rounds=20)["copy"]
    return 2 * n_bytes / timing.median_us / 1e3


def machine_card(device: torch.device) -> dict[str, str]:
    """What a number depends on besides the code: it stands in every row of every CSV."""
    card = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "triton": "",
        "python": platform.python_version(),
        "commit": commit(),
    }
    if find_spec("triton"):
        import triton

        card["triton"] = triton.__version__
    return card


def commit() -> str:
    """The commit that is checked out, with a + when files differ from it; empty outside of git."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
