"""Layer norm: the formula, rows far from zero, widths from 1 to beyond one block, dw and db over many rows."""

import pytest
import torch
import torch.nn.functional as F

from kernels_torch.cases import CASES
from tests.conftest import HAS_GPU
from tests.kernels.test_contract import BACKENDS, MODULES
from tests.numerics import judge, run, upstream_of

CASE = CASES["layer_norm"]
needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")


def formula(x, weight=None, bias=None, *, eps=1e-5):
    """As the docstring states it, one row at a time."""
    means = [row.sum() / row.numel() for row in x.flatten(0, -2)]
    rows = [row - mean for row, mean in zip(x.flatten(0, -2), means, strict=True)]
    y = torch.stack([row / torch.sqrt((row * row).sum() / row.numel() + eps) for row in rows]).view(x.shape)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


@pytest.mark.parametrize(("weight", "bias"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_formula_and_pytorch(backend, weight, bias, device):
    """Forward and gradients in fp64; so the reference is held to something too."""
    inputs = CASE.make(dict(M=5, D=33, weight=weight, bias=bias, eps=1e-3), torch.float64, device)
    got = run("layer_norm", MODULES[backend].layer_norm, CASE.cast(inputs, torch.float64))
    ours = run("layer_norm", formula, CASE.cast(inputs, torch.float64))
    plain = lambda x, weight, bias, eps: F.layer_norm(x, (33,), weight, bias, eps)
    theirs = run("layer_norm", plain, CASE.cast(inputs, torch.float64))
    for name, value in got.items():
        torch.testing.assert_close(value, ours[name], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(value, theirs[name], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("M", "D"), [(9, 100), (2, 16384), (2, 16385), (1, 33000)])
def test_rows_far_from_zero_keep_their_variance(backend, M, D, device):
    """E[x²] − E[x]² would be noise at a mean of 10⁴. Plain PyTorch errs by a rounding of the mean, ours does not."""
    x = 1e4 + torch.randn(M, D, device=device)
    y = MODULES[backend].layer_norm(x)
    limit = 2 * torch.finfo(torch.float32).eps * 1e4 if backend == "torch" else 1e-5
    assert (y - formula(x.double())).abs().max() < limit


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("D", [1, 2, 3, 31, 127, 2049, 8192, 8193, 16385])
def test_any_width(backend, D, device):
    """Forward in one block up to 16384, backward up to 8192; a loop over columns beyond."""
    inputs = CASE.make(dict(M=3, D=D), torch.float32, device)
    got = run("layer_norm", MODULES[backend].layer_norm, CASE.cast(inputs, torch.float32))
    if D == 1:  # dx is zero, or what a product rounded in one place and not in the other leaves: one rounding times r
        product = upstream_of((got["output 0"],))[0] * inputs["weight"]
        rounding = torch.finfo(torch.float32).eps * product.abs().max()
        assert got["gradient of x"].abs().max() <= rounding * inputs["eps"] ** -0.5
        got["gradient of x"].zero_()
    judge("layer_norm", got, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("M", "D"), [(4099, 7), (130, 257), (35, 8200)])
def test_many_more_rows_than_programs(backend, M, D, device):
    """Programs that go over several tiles, the last of which is not full, sum dw and db over all of their rows."""
    inputs = CASE.make(dict(M=M, D=D), torch.float32, device)
    judge("layer_norm", run("layer_norm", MODULES[backend].layer_norm, CASE.cast(inputs, torch.float32)), inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("M", "D"), [(1000, 1600), (65536, 768), (777, 20000)])
def test_sizes_of_real_models_twice_with_the_same_bits(backend, dtype, M, D, device):
    inputs = CASE.make(dict(M=M, D=D), dtype, device)
    first, second = (run("layer_norm", MODULES[backend].layer_norm, CASE.cast(inputs, dtype)) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    judge("layer_norm", first, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, *([torch.bfloat16] if HAS_GPU else [])])
@pytest.mark.parametrize("D", [65, 8200])
def test_parameters_may_have_dtypes_of_their_own(backend, dtype, D, device):
    """The output is rounded once, to the dtype of x; each parameter's gradient has that of the parameter."""
    inputs = CASE.make(dict(M=9, D=D), torch.float32, device)
    x, weight, bias = inputs["x"].to(dtype), inputs["weight"], inputs["bias"].double()
    y = MODULES[backend].layer_norm(x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_())
    dx, dw, db = torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))
    assert (y.dtype, dx.dtype, dw.dtype, db.dtype) == (dtype, dtype, torch.float32, torch.float64)
    exact = formula(x.detach().double(), weight.detach().double(), bias.detach())
    half_unit = torch.finfo(dtype).eps / 2 * exact.abs() * 1.001
    assert ((y - exact).abs() <= half_unit + 1e-5).all()  # a small sum of larger terms carries their fp32 rounding
    assert torch.equal(db, torch.full_like(db, 9))


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_rows_give_the_bias_and_large_values_do_not_overflow(backend, device):
    """Squares are summed in fp32: 300² is already beyond fp16, and so is the sum of the row itself."""
    x = torch.full((3, 50), 60000.0, device=device, dtype=torch.float16)
    x[1] = 0
    x[2, ::2] = -60000
    x.requires_grad_()
    bias = torch.randn(50, device=device, dtype=torch.float16)
    y = MODULES[backend].layer_norm(x, bias=bias)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(y[0], bias)
    assert torch.equal(y[1], bias)
    signs = torch.tensor([-1.0, 1.0], device=device).repeat(25)
    torch.testing.assert_close(y[2], (signs + bias.float()).half())
    assert dx.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_dimensions_are_rows(backend, device):
    """One to four dimensions, and a dimension of size zero, whose parameters get gradients of zero."""
    x = torch.randn(2, 3, 4, 5, device=device)
    weight, bias = torch.randn(5, device=device, requires_grad=True), torch.randn(5, device=device, requires_grad=True)
    layer_norm = MODULES[backend].layer_norm
    y = layer_norm(x, weight, bias)
    assert torch.equal(layer_norm(x[1, 2, 3], weight, bias), y[1, 2, 3])
    assert torch.equal(layer_norm(x[1].mT).mT.mT, layer_norm(x[1].mT.contiguous()))
    empty = layer_norm(x[:, :0], weight, bias)
    assert empty.shape == (2, 0, 4, 5)
    for grad in torch.autograd.grad(empty.sum(), (weight, bias)):
        assert torch.equal(grad, torch.zeros_like(grad))


@needs_triton
@pytest.mark.parametrize("D", [1, 2, 3, 64, 100, 128, 768, 1000, 1600, 4096, 8192, 16384])
def test_tiles_cover_the_row_and_fit_the_hardware(D):
    from kernels_triton import launch
    from kernels_triton.layer_norm import WIDEST_BACKWARD, bwd_tile, fwd_tile

    backward = {size: [bwd_tile(D, size, sums) for sums in (False, True)] for size in (2, 4, 8)}
    tiles = [*backward[2], *backward[4], *backward[8]] if D <= WIDEST_BACKWARD else []
    for tile in (fwd_tile(D), *tiles):
        assert launch.next_power_of_two(D) == tile.BD
        assert 32 * 32 * tile.warps >= tile.BT * tile.BD  # values a thread, threads a warp
        assert tile.warps in (1, 2, 4, 8, 16)
    for itemsize, both in backward.items():
        for tile in both:
            assert 2 * (tile.stages - 1) * tile.BT * tile.BD * itemsize <= launch.STAGE_BYTES
