"""What the tests of attention's Hopper kernels share: where they run, and compiling where they do not."""

import os
import subprocess

import pytest
import torch

from tests import warm
from tests.conftest import HAS_GPU

IS_HOPPER = HAS_GPU and torch.cuda.get_device_capability()[0] == 9
on_hopper = pytest.mark.skipif(not IS_HOPPER, reason="needs a Hopper GPU")


def run_without_interpreter(code: str, *arguments: str) -> list[int]:
    """Run code in a process of its own, as here kernels are the interpreter's → the numbers it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*warm.python(), "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [int(number) for number in done.stdout.split()]
