"""What this machine is: its peak speeds, to hold ours against, and a record of it, so that a result can be repeated."""

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parent.parent


class Chip(NamedTuple):
    """Peak speeds of an accelerator, from its maker's data sheet."""

    words: str  # all of them are words of the device's name
    tflops: float  # dense bf16 with fp32 accumulation (fp16 where the chip has no bf16)
    terabytes_per_s: float  # memory bandwidth


# The first row whose words are all in the name counts, so the more specific row comes first.
CHIPS = (
    Chip("GB300", 2500, 8.0),
    Chip("GB200", 2500, 8.0),
    Chip("B300", 2250, 8.0),
    Chip("B200", 2250, 8.0),
    Chip("B100", 1800, 8.0),
    Chip("GH200", 989, 4.0),
    Chip("H200 NVL", 835, 4.8),
    Chip("H200", 989, 4.8),
    Chip("H100 NVL", 835, 3.9),
    Chip("H100 PCIe", 756, 2.0),
    Chip("H100", 989, 3.35),
    Chip("H800 PCIe", 756, 2.0),
    Chip("H800", 989, 3.35),
    Chip("H20", 148, 4.0),
    Chip("A100 PCIe 80GB", 312, 1.935),
    Chip("A100 80GB", 312, 2.039),
    Chip("A100", 312, 1.555),
    Chip("A800", 312, 2.039),
    Chip("RTX A6000", 154.8, 0.768),
    Chip("RTX 6000 Ada", 364, 0.96),
    Chip("A40", 149.7, 0.696),
    Chip("A30", 165, 0.933),
    Chip("A10G", 70, 0.6),
    Chip("A10", 125, 0.6),
    Chip("L40S", 362, 0.864),
    Chip("L40", 181, 0.864),
    Chip("L4", 121, 0.3),
    Chip("T4", 65, 0.32),
    Chip("V100", 125, 0.9),
    Chip("RTX 5090", 209.5, 1.792),
    Chip("RTX 4090 D", 147, 1.008),
    Chip("RTX 4090", 165.2, 1.008),
    Chip("RTX 3090 Ti", 80, 1.008),
    Chip("RTX 3090", 71, 0.936),
    Chip("MI355X", 2500, 8.0),
    Chip("MI325X", 1307.4, 6.0),
    Chip("MI300X", 1307.4, 5.3),
    Chip("MI250X", 383, 3.277),
)


def find_chip(name: str) -> Chip | None:
    """The row for a device's name; None for one we do not know, for a slice of one (MIG) and for a laptop's version."""
    words = set(re.split(r"[\s_-]+", name.lower()))
    if words & {"mig", "laptop"}:
        return None
    return next((chip for chip in CHIPS if words.issuperset(chip.words.lower().split())), None)


def peak_flops(device: torch.device) -> float | None:
    """Peak bf16 FLOP/s of a GPU; None when unknown, and on a CPU."""
    chip = find_chip(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return chip.tflops * 1e12 if chip else None


def peak_bandwidth(device: torch.device) -> float | None:
    """Peak memory bandwidth of a GPU in bytes per second; None when unknown, and on a CPU."""
    chip = find_chip(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return chip.terabytes_per_s * 1e12 if chip else None


def memory_bytes(device: torch.device) -> int | None:
    """Memory of a GPU, or of the machine for a CPU; None where that cannot be asked."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Versions, device, commit and command line, as plain data; nothing that names the machine or its user."""
    commit = _git("rev-parse", "HEAD")
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]).replace(str(Path.home()), "~"),
        "commit": commit,
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")) if commit else None,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        **{name: _version(name) for name in ("torch", "triton", "numpy")},
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        **(_describe_gpu(device) if device.type == "cuda" else {}),
    }


def _describe_gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "gpu_memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda or torch.version.hip,
        "driver": _driver_version(),
    }


def _driver_version() -> str | None:
    try:
        return _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def _git(*arguments: str) -> str | None:
    """What git says about the folder this code lies in; None without git or outside a repository."""
    try:
        return _output(["git", "-C", str(ROOT), *arguments])
    except (OSError, subprocess.SubprocessError):
        return None


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def _version(package: str) -> str | None:
    """The installed version, without importing the package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
