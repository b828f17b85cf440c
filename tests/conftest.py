"""What every test starts from: known seeds, uninitialised memory filled with NaN, one device for the whole run.

Without a GPU, Triton kernels run in Triton's interpreter, which must be chosen before Triton is first imported; that
is why it happens here, at import. The interpreter is right for fp32, fp16 and fp64 and silently wrong for bfloat16, so
bf16 kernels are tested on a GPU only. `TRITON_INTERPRET=1 pytest` keeps to the CPU on a machine that has a GPU.
"""

import ctypes
import fcntl
import os
import random
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

HAS_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
if HAS_GPU:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic cuBLAS, read when CUDA starts
else:
    os.environ["TRITON_INTERPRET"] = "1"
    if find_spec("triton"):
        from tests.interpreter import hasten

        hasten()
torch.set_num_threads(1)  # tests are too small to share among threads
if "PYTEST_XDIST_WORKER" in os.environ:  # and with one worker a core, so are the processes they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, and say so."""
    for item in items:
        if not HAS_GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def known_state() -> Iterator[None]:
    """Seed every generator, and have PyTorch fill torch.empty with NaN (integers with their maximum).

    Memory that somebody forgot to write then shows in the result instead of being zero by luck. On a GPU some
    operations have no deterministic form; they warn instead of raising, and the filling happens all the same.
    """
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=HAS_GPU)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def no_privileges() -> Iterator[None]:
    """Root may read and write everything, whatever its mode; here it may not."""
    if os.geteuid() != 0:
        yield
        return
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        header, before = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert libc.capget(header, before) == 0
        less = (ctypes.c_uint32 * 6)(*before)
        less[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, of the effective ones
        assert libc.capset(header, less) == 0
    except (AttributeError, AssertionError):
        pytest.skip("root here cannot give up its privileges")
    yield
    assert libc.capset(header, before) == 0


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where this run tests: the GPU if there is one, else the CPU."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture
def much_memory() -> Iterator[None]:
    """One test at a time that needs a large part of the GPU's memory, however many processes test at once."""
    with (Path(tempfile.gettempdir()) / "kestrel-tests-much-memory.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        if HAS_GPU:
            torch.cuda.empty_cache()
