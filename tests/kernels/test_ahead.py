"""Kernels compiled side by side before they are needed: by children, once, and nothing else of theirs remains."""

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
import triton

from kernels_triton import ahead
from tests.kernels.hopper import run_without_interpreter


class Kernel:
    """Compiles by writing a file; as triton.runtime.JITFunction, as far as it is asked."""

    def __init__(self, folder: Path, name: str, seconds: float = 0.0, fails: bool = False) -> None:
        self.file, self.seconds, self.fails = folder / name, seconds, fails

    def compile(self) -> None:
        began = time.monotonic()
        time.sleep(self.seconds)
        if self.fails:
            raise RuntimeError("does not compile")
        self.file.write_text(f"{os.getpid()} {began} {time.monotonic()}")

    def launch(self, key: str = "a") -> bool:
        """→ whether it would have been launched here. What comes after compiling must not happen in the child."""
        hook = triton.knobs.runtime.jit_cache_hook
        if hook is not None and hook(key=key, fn=SimpleNamespace(jit_function=self), repr="", compile={}):
            return False
        self.compile()
        self.file.with_suffix(".launched").write_text("")
        return True


@pytest.fixture(autouse=True)
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setattr(triton.knobs.cache, "dir", str(folder))
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", None)
    return folder


def test_kernels_are_compiled_by_children_side_by_side(tmp_path: Path):
    kernels, said = [Kernel(tmp_path, str(i), seconds=0.5) for i in range(6)], []
    with ahead.compiling_ahead(said.append, at_once=3):
        assert ahead.rehearsing
        assert not any(kernel.launch() for kernel in kernels for _ in range(2))
    assert not ahead.rehearsing
    pids, *spans = zip(*(map(float, kernel.file.read_text().split()) for kernel in kernels))
    assert len({*pids} - {os.getpid()}) == 6
    at_once = [sum(begun <= moment < ended for begun, ended in zip(*spans)) for moment in spans[0]]
    assert 1 < max(at_once) <= 3
    assert not any(kernel.file.with_suffix(".launched").exists() for kernel in kernels)
    assert said[-1].startswith("compiled 6 kernels in ")
    assert kernels[0].launch(), "and now it is launched as ever"


def test_a_kernel_for_two_kinds_of_arguments_is_compiled_twice(tmp_path: Path):
    kernel = Kernel(tmp_path, "k")
    with ahead.compiling_ahead(print) as compilers:
        assert not any(kernel.launch(key) for key in ("a", "b", "a"))
    assert len(compilers.seen) == 2


def test_what_does_not_compile_is_left_to_its_launch(tmp_path: Path):
    kernel, said = Kernel(tmp_path, "k", fails=True), []
    ahead.compile_once("what", kernel.launch, said.append)
    assert not ahead.note_of("what").exists()
    with pytest.raises(RuntimeError, match="does not compile"):
        kernel.launch()


def test_a_note_spares_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    kernel, rehearsals = Kernel(tmp_path, "k"), []

    def work() -> None:
        rehearsals.append(kernel.launch())

    for what in ("one", "one", "other"):
        ahead.compile_once(what, work, lambda text: None)
    assert rehearsals == [False, False]
    monkeypatch.setattr(triton, "__version__", "another")
    ahead.compile_once("one", work, lambda text: None)
    assert len(rehearsals) == 3


def test_work_that_cannot_be_rehearsed_is_said_and_is_no_error():
    said = []

    def work() -> None:
        raise ValueError("not without numbers\nand more")

    ahead.compile_once("what", work, said.append)
    assert said == ["kernels are compiled one by one, as they are needed (not without numbers)"]
    assert triton.knobs.runtime.jit_cache_hook is None
    assert not ahead.rehearsing


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(triton.knobs.cache, "dir", "/proc/nowhere")
    ahead.compile_once("what", Kernel(tmp_path, "k").launch, lambda text: None)


def test_other_ranks_do_not_wait_for_one_that_gave_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ahead.compile_once("what", Kernel(tmp_path, "k", fails=True).launch, lambda text: None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    began = time.monotonic()
    ahead.compile_once("what", lambda: pytest.fail("not its work"), print)
    assert time.monotonic() - began < 5


def test_a_full_memory_is_an_error():
    def work() -> None:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        ahead.compile_once("what", work, print)


def test_other_ranks_wait_for_the_first(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(ahead, "WAIT_S", 0.3)
    began = time.monotonic()
    ahead.compile_once("what", lambda: pytest.fail("not its work"), print)
    assert time.monotonic() - began >= 0.3
    ahead.note_of("what").parent.mkdir(parents=True)
    ahead.note_of("what").touch()
    began = time.monotonic()
    ahead.compile_once("what", lambda: pytest.fail("not its work"), print)
    assert time.monotonic() - began < 0.2


def test_a_child_compiles_for_the_cache_of_its_parent():
    """A kernel of Triton, for a GPU that need not be there."""
    code = """
import os, tempfile, triton
from types import SimpleNamespace
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels_triton import ahead
from kernels_triton.rows import _sum_lines_kernel as kernel
triton.knobs.cache.dir = folder = tempfile.mkdtemp()
constants = {name: 16 for name in kernel.arg_names if name.isupper() and len(name) > 1}
constants |= {"OVERLAP": False}
constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
signature = {name: "constexpr" if name in constants else "i32" for name in kernel.arg_names}
signature |= {kernel.arg_names[0]: "*fp32", kernel.arg_names[1]: "*fp32"}
kernel.compile = lambda: triton.compile(
    ASTSource(kernel, signature, constexprs=constants), target=GPUTarget("cuda", 90, 32)
)
with ahead.compiling_ahead(lambda text: None) as compilers:
    if not triton.knobs.runtime.jit_cache_hook(key="k", fn=SimpleNamespace(jit_function=kernel)):
        kernel.compile()
files = [file for _, _, files in os.walk(folder) for file in files]
print(compilers.failed, sum(file.endswith(".cubin") for file in files))
"""
    assert run_without_interpreter(code) == [0, 1]
