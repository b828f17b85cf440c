"""The interpreter that tests hasten computes what Triton's own does, and leaves the language as it found it."""

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

import kernels_triton
from kernels_torch.cases import CASES
from tests import interpreter as hastened
from tests.conftest import HAS_GPU
from tests.numerics import run

pytestmark = pytest.mark.skipif(HAS_GPU, reason="kernels are compiled")
if not HAS_GPU:
    import triton.runtime.interpreter as interpreter


@triton.jit
def _overflow_kernel(p_out, n):
    largest = n * n - 1 + n * n
    tl.store(p_out, largest + 1)
    tl.store(p_out + 1, largest * 2)
    tl.store(p_out + 2, -largest - n)


def overflow() -> torch.Tensor:
    out = torch.empty(3, dtype=torch.int32)
    _overflow_kernel[(1,)](out, 2**15)
    return out


@pytest.fixture
def triton_alone(monkeypatch):
    """Its own interpreter, as if no test had touched it."""
    monkeypatch.setattr(interpreter, "_patch_lang", hastened._patch_lang)
    monkeypatch.setattr(interpreter, "_get_np_dtype", hastened._get_np_dtype)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions())


def test_this_run_is_hastened():
    assert interpreter._patch_lang != hastened._patch_lang
    assert not interpreter.interpreter_builder.options.sanitize_overflow


@pytest.mark.parametrize("op", ["rmsnorm", "attention", "linear_decode", "draw_tokens"])
def test_the_hastened_interpreter_gives_the_same_bits(op, request):
    case, function = CASES[op], getattr(kernels_triton, op)
    inputs = case.make(case.check[0], torch.float32, "cpu")
    ours = run(op, function, case.cast(inputs, torch.float32))
    request.getfixturevalue("triton_alone")
    theirs = run(op, function, case.cast(inputs, torch.float32))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_integers_overflow_as_before(request):
    ours = overflow()
    request.getfixturevalue("triton_alone")
    assert ours.tolist() == overflow().tolist() == [-(2**31), -2, 2**31 - 2**15 + 1]


@triton.jit
def _failing_kernel(p_out):
    tl.store(p_out, tl.zeros((3,), tl.float32))


@pytest.mark.parametrize("launch", [overflow, lambda: _failing_kernel[(1,)](torch.empty(3))])
def test_the_language_is_itself_again_after_a_launch(launch):
    def language() -> list:
        return [getattr(owner, name) for owner in (tl, tl.core, tl.math, tl.tensor) for name in sorted(vars(owner))]

    overflow()
    before = language()
    assert tl.core.is_builtin(tl.load)
    try:
        launch()
    except interpreter.InterpreterError:
        assert launch is not overflow
    assert language() == before
