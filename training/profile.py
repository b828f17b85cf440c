"""Where the time of a step goes (`hardware.profile=true`): one step under PyTorch's profiler, for everyone to see.

    profile.json.gz   every operation and kernel on a time line: open it in https://ui.perfetto.dev
    profile.txt       the device's time by operation, longest first; the beginning of it is printed

On a GPU the table lists kernels, since that is what takes its time, and captured steps have nothing else. On a CPU it
lists PyTorch's operations without those they call. The profiled step itself takes longer than the others.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from training.journal import naming_the_disk, replace_text

PROFILED = 5  # how many steps come before: some are eager, and the first ones compile
PRINTED = 12  # rows


class StepProfile:
    """Profiles one step and leaves the others alone.

    at_step    counted as the loop does: the first step of a run is 0
    say        prints a line
    """

    def __init__(self, folder: Path, device: torch.device, at_step: int, say: Callable[[str], None] = print) -> None:
        self.folder, self.device, self.at_step, self.say = folder, device, at_step, say

    @contextlib.contextmanager
    def of(self, step: int) -> Iterator[None]:
        """Run the step `step` in here."""
        if step != self.at_step:
            yield
            return
        is_gpu = self.device.type == "cuda"
        wait = torch.cuda.synchronize if is_gpu else lambda: None
        if is_gpu:  # as PyTorch does for graphs of its own: CUPTI, ended and begun again, does not get on with them
            os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
            os.environ.setdefault("TEARDOWN_CUPTI", "0")
        wait()
        with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * is_gpu) as profiler:
            began = time.perf_counter()
            yield
            wait()
            wall_ms = 1e3 * (time.perf_counter() - began)
        with naming_the_disk(self.folder / "profile.json.gz"):
            profiler.export_chrome_trace(str(self.folder / "profile.json.gz"))
        heading, *lines = table(times(profiler, is_gpu), wall_ms, "GPU" if is_gpu else "CPU")
        replace_text(self.folder / "profile.txt", [f"step {step + 1}: {heading}\n", *(line + "\n" for line in lines)])
        self.say("\n".join([f"profile of step {step + 1}: {heading}", *lines[: PRINTED + 1]]))
        self.say(f"all of it: {self.folder / 'profile.txt'}, time line: {self.folder / 'profile.json.gz'}")


def times(profiler: profile, is_gpu: bool) -> dict[str, tuple[float, int]]:
    """Milliseconds and calls of every kernel (GPU) or operation (CPU)."""
    found = {}
    for event in profiler.key_averages():
        if is_gpu and event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            found[event.key] = (event.self_device_time_total / 1e3, event.count)
        if not is_gpu and event.device_type == DeviceType.CPU:
            found[event.key] = (event.self_cpu_time_total / 1e3, event.count)
    return found


def table(found: dict[str, tuple[float, int]], wall_ms: float, device: str) -> list[str]:
    """A heading and one line for each, longest first."""
    total_ms = sum(ms for ms, _ in found.values())
    lines = [f"{total_ms:.2f} ms of {device} time in {wall_ms:.2f} ms", f"{'ms':>10} {'share':>6} {'calls':>6}  what"]
    for name, (ms, calls) in sorted(found.items(), key=lambda item: -item[1][0]):
        lines.append(f"{ms:10.3f} {ms / max(total_ms, 1e-9):6.1%} {calls:6d}  {name[:100]}")
    return lines


def no_profile() -> StepProfile:
    """Profiles no step at all."""
    return StepProfile(Path(), torch.device("cpu"), at_step=-1)
