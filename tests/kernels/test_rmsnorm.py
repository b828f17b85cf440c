"""RMS norm: the formula itself, widths from 1 to beyond one block, many rows, and dw without atomics."""

import pytest
import torch
import torch.nn.functional as F

from kernels_torch.cases import CASES
from tests.conftest import HAS_GPU
from tests.kernels.test_contract import BACKENDS, MODULES, judge, run

CASE = CASES["rmsnorm"]


def formula(x, weight=None, *, eps=1e-6):
    """As the docstring states it, one row at a time."""
    rows = [row / torch.sqrt((row * row).sum() / row.numel() + eps) for row in x.flatten(0, -2)]
    y = torch.stack(rows).view(x.shape)
    return y if weight is None else y * weight


@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_formula_and_pytorch(backend, weight, device):
    """Forward and gradients in fp64; so the reference is held to something too."""
    inputs = CASE.make(dict(M=5, D=33, weight=weight, eps=1e-3), torch.float64, device)
    got = run("rmsnorm", MODULES[backend].rmsnorm, CASE.cast(inputs, torch.float64))
    ours = run("rmsnorm", formula, CASE.cast(inputs, torch.float64))
    theirs = run("rmsnorm", lambda x, weight, eps: F.rms_norm(x, (33,), weight, eps), CASE.cast(inputs, torch.float64))
    for name, value in got.items():
        torch.testing.assert_close(value, ours[name], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(value, theirs[name], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("D", [1, 2, 3, 31, 127, 2049, 8191, 16384, 16385, 32768 if HAS_GPU else 20480])
def test_any_width(backend, D, device):
    """One block up to 16384, a loop over columns beyond; a width of two rows and one that is alone."""
    for M in (1, 3) if HAS_GPU or D < 8191 or D == 16385 else (3,):  # dw takes the interpreter long
        inputs = CASE.make(dict(M=M, D=D, weight=True), torch.float32, device)
        judge("rmsnorm", run("rmsnorm", MODULES[backend].rmsnorm, CASE.cast(inputs, torch.float32)), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("M", "D"), [(4099, 7), (130, 257), (19, 16390)])
def test_many_more_rows_than_programs(backend, M, D, device):
    """Programs that go over several tiles, the last of which is not full, sum dw over all of their rows."""
    inputs = CASE.make(dict(M=M, D=D, weight=True), torch.float32, device)
    judge("rmsnorm", run("rmsnorm", MODULES[backend].rmsnorm, CASE.cast(inputs, torch.float32)), inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("M", "D"), [(1000, 2176), (65536, 384), (4096, 768), (777, 20000)])
def test_sizes_of_real_models_twice_with_the_same_bits(backend, dtype, M, D, device):
    inputs = CASE.make(dict(M=M, D=D, weight=True), dtype, device)
    first, second = (run("rmsnorm", MODULES[backend].rmsnorm, CASE.cast(inputs, dtype)) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    judge("rmsnorm", first, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, *([torch.bfloat16] if HAS_GPU else [])])
def test_gain_may_stay_fp32_beside_half_precision(backend, dtype, device):
    """The output is rounded once, to the dtype of x; the gain's gradient stays fp32."""
    inputs = CASE.make(dict(M=9, D=65, weight=True), torch.float32, device)
    x, weight = inputs["x"].to(dtype).requires_grad_(), inputs["weight"].requires_grad_()
    y = MODULES[backend].rmsnorm(x, weight)
    dx, dw = torch.autograd.grad(y, (x, weight), torch.ones_like(y))
    assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, torch.float32)
    exact = formula(x.detach().double(), weight.detach().double())
    assert ((y - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() * 1.001).all()  # half a unit: rounded once


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_zeros_stay_zero_and_large_values_do_not_overflow(backend, device):
    """Squares are summed in fp32: 300² is already beyond fp16."""
    x = torch.full((3, 50), 300.0, device=device, dtype=torch.float16)
    x[1] = 0
    x.requires_grad_()
    y = MODULES[backend].rmsnorm(x)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(y[1], torch.zeros_like(y[1]))
    assert torch.equal(y[0], torch.ones_like(y[0]))
    assert dx.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_dimensions_are_rows(backend, device):
    """One to four dimensions, and a dimension of size zero."""
    x = torch.randn(2, 3, 4, 5, device=device)
    y = MODULES[backend].rmsnorm(x)
    assert torch.equal(MODULES[backend].rmsnorm(x[1, 2, 3]), y[1, 2, 3])
    assert torch.equal(MODULES[backend].rmsnorm(x[1].mT).mT.mT, MODULES[backend].rmsnorm(x[1].mT.contiguous()))
    assert MODULES[backend].rmsnorm(x[:, :0]).shape == (2, 0, 4, 5)


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
@pytest.mark.parametrize("D", [1, 2, 3, 64, 100, 128, 768, 1000, 1536, 2176, 4096, 8192, 16384])
def test_tiles_cover_the_row_and_fit_the_hardware(D):
    from kernels_triton import launch

    backward = {size: [launch.rmsnorm_bwd_tile(D, size, needs_dw) for needs_dw in (False, True)] for size in (2, 4, 8)}
    for tile in (launch.rmsnorm_fwd_tile(D), *backward[2], *backward[4], *backward[8]):
        assert launch.next_power_of_two(D) == tile.BD
        assert tile.BD // 2 < D <= tile.BD
        assert 128 * 32 * tile.warps >= tile.BT * tile.BD  # values a thread, threads a warp
        assert tile.warps <= 16
        assert tile.warps & (tile.warps - 1) == 0
    for itemsize, tiles in backward.items():
        for tile in tiles:
            assert 2 * (tile.stages - 1) * tile.BT * tile.BD * itemsize <= launch.STAGE_BYTES
