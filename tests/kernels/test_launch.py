"""Starting a kernel: the quick way gives what Triton's own gives, whatever changes from one call to the next."""

import inspect
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

import kernels_triton  # noqa: E402  (mends the interpreter)
from kernels_triton import launch as launching  # noqa: E402
from kernels_triton.launch import launch  # noqa: E402
from tests import warm  # noqa: E402

ROOT = Path(__file__).parents[2]


@triton.jit
def _scaled_kernel(x, bias, y, stride_x, T, scale, D: tl.constexpr, BD: tl.constexpr):
    """y [T, D] = scale · x + bias."""
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    b_x = tl.load(x + i_t * stride_x + o_d, mask=o_d < D, other=0.0)
    if bias is not None:
        b_x = scale * b_x + tl.load(bias + o_d, mask=o_d < D, other=0.0)
    else:
        b_x = scale * b_x
    if i_t < T:
        tl.store(y + i_t * D + o_d, b_x, mask=o_d < D)


def check(x, bias=None, scale=2):
    """Launch on the rows of x and compare."""
    T, D = x.shape
    y = torch.full((T, D), torch.nan, dtype=x.dtype, device=x.device)
    block = launching.next_power_of_two(D)
    launch(
        _scaled_kernel, (T,), x=x, bias=bias, y=y, stride_x=x.stride(0), T=T, scale=scale, D=D, BD=block, num_warps=1
    )
    assert torch.equal(y, scale * x if bias is None else scale * x + bias)


def test_sizes_strides_and_alignments_in_any_order(device):
    """Each is compiled for as if it were the only one: 1 and multiples of 16 are special to Triton, and so is where a
    tensor begins."""
    memory = torch.randn(70, 128, device=device)
    bias = torch.randn(200, device=device)
    for _ in range(3):
        for D in (1, 16, 33):
            for T in (1, 2, 16, 17):
                for begin in (0, 1, 4):
                    x = memory[:T, begin : begin + D]
                    check(x)
                    check(x, bias[begin : begin + D])
                    check(x.contiguous(), bias[1 : 1 + D])


def test_arguments_of_other_types(device):
    memory = torch.randn(4, 16, device=device)
    for _ in range(2):
        for dtype in (torch.float32, torch.float16, torch.float64):
            for scale in (1, 2, 16, 0.5):
                check(memory.to(dtype), scale=scale)


def test_sizes_without_end_do_not_fill_the_memory(device, monkeypatch):
    monkeypatch.setattr(launching, "COMPILED", {})
    monkeypatch.setattr(launching, "FORGET_AFTER", 5)
    for T in range(1, 20):
        check(torch.randn(T, 8, device=device))
        assert len(launching.COMPILED) <= 5


@pytest.mark.gpu
def test_a_launch_like_an_earlier_one_does_not_go_through_triton_again(device, monkeypatch):
    x, y = torch.randn(5, 48, device=device), torch.randn(5, 48, device=device)
    check(x)
    monkeypatch.setattr(triton.runtime.JITFunction, "run", None)
    check(y)
    with pytest.raises(TypeError):
        check(y[:, 1:])


@pytest.mark.gpu
def test_it_runs_on_the_current_stream(device):
    x = torch.randn(4, 32, device=device)
    check(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # what is launched on this stream comes after this
        late = x.clone()
        check(late)
    graph = torch.cuda.CUDAGraph()
    y = torch.empty_like(x)
    arguments = dict(bias=None, y=y, stride_x=32, T=4, scale=2, D=32, BD=32)
    with torch.cuda.graph(graph):
        launch(_scaled_kernel, (4,), x=x, **arguments, num_warps=1)
    x.add_(1)
    graph.replay()
    assert torch.equal(y, 2 * x)


@pytest.mark.gpu
def test_tensors_on_other_devices_are_refused(device):
    x = torch.randn(4, 32, device=device)
    for _ in range(2):
        with pytest.raises(ValueError, match="NVIDIA GPU, got bias on cpu"):
            check(x, torch.randn(32))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_each_gpu_runs_what_lies_on_it():
    """Whichever is current."""
    for _ in range(2):
        for current in (0, 1):
            with torch.cuda.device(current):
                for index in (0, 1):
                    check(torch.randn(4, 40, device=f"cuda:{index}"))


def test_without_a_gpu_or_the_interpreter_every_op_says_so_in_the_same_words():
    """Named after an argument of the user's, before anything is computed."""
    program = """
import torch
import kernels_triton
from kernels_torch.cases import CASES
for op in kernels_triton.__all__:
    try:
        getattr(kernels_triton, op)(**CASES[op].make(CASES[op].check[0], torch.float32, "cpu"))
        print(op, "ran")
    except Exception as error:
        print(op, type(error).__name__, error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    run = subprocess.run(
        [*warm.python(), "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr[-2000:]
    words = (
        r"(\w+) ValueError Triton kernels need tensors on an NVIDIA GPU, got (\w+) on cpu: "
        "use kernels_torch, or set TRITON_INTERPRET=1 before Triton is imported"
    )
    said = [re.fullmatch(words, line) for line in run.stdout.splitlines()]
    assert all(said), run.stdout
    assert [match[1] for match in said] == kernels_triton.__all__
    for op, name in (match.groups() for match in said):
        assert name in inspect.signature(getattr(kernels_triton, op)).parameters
