"""GELU in its tails, of infinity and NaN, and of any shape."""

import math

import pytest
import torch

import kernels_torch
from tests.conftest import HAS_GPU
from tests.kernels.test_contract import BACKENDS, MODULES

HALVES = [torch.float16, *([torch.bfloat16] if HAS_GPU else [])]
INF, NAN = math.inf, math.nan
needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")


def exact_gelu(x):
    """In fp64, without the cancellation of 1 + erf in the left tail."""
    return x.double() * torch.special.erfc(-x.double() / 2**0.5) / 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALVES)
def test_gelu_of_every_number_of_16_bits(backend, dtype, device):
    """Rounded once: half a unit of the last place, and what fp32 loses before."""
    x = torch.arange(-(2**15), 2**15, device=device).to(torch.int16).view(dtype)
    x = x[x.isfinite()]
    y, exact = MODULES[backend].gelu(x), exact_gelu(x)
    unit = torch.exp2(torch.floor(torch.log2(exact.abs().clamp_min(torch.finfo(dtype).tiny)))) * torch.finfo(dtype).eps
    assert ((y.double() - exact).abs() <= 0.5 * unit + 1e-7 * x.double().abs().clamp(1e-3, 8)).all()


@needs_triton
def test_gelu_keeps_its_digits_in_the_left_tail(device):
    """Three digits down to −8, where plain PyTorch in fp32 has none left: 1 + erf cancels."""
    x = torch.linspace(-8, -1, 1000, device=device)
    error = (MODULES["triton"].gelu(x).double() / exact_gelu(x) - 1).abs()
    assert error.max() < 1e-3
    assert (kernels_torch.gelu(x).double() / exact_gelu(x) - 1).abs().max() > 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_gelu_of_huge_values_and_nan(backend, device):
    x = torch.tensor([1e30, -1e30, 60.0, -60.0, 0.0, NAN], device=device, requires_grad=True)
    y = MODULES[backend].gelu(x)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert y[:5].tolist() == [x[0].item(), 0, 60, 0, 0]
    assert dx[:5].tolist() == [1, 0, 1, 0, 0.5]
    assert y[5].isnan()
    assert dx[5].isnan()


@needs_triton
def test_gelu_of_infinities_is_the_limit(device):
    """Where plain PyTorch gives NaN for −∞, and on some CPUs for ∞."""
    x = torch.tensor([INF, -INF, 1.0], device=device)
    assert MODULES["triton"].gelu(x)[:2].tolist() == [INF, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gelu_of_any_shape_and_of_half_a_wider_tensor(backend, device):
    """No dimension, a dimension of size zero, and rows that do not follow one another, longer than a block too."""
    gelu = MODULES[backend].gelu
    for D in (3, 5000):
        wide = torch.randn(2, 3, 2 * D, device=device)
        for part in wide.chunk(2, dim=-1):
            leaf = part.detach().requires_grad_()
            y = gelu(leaf)
            torch.testing.assert_close(y, gelu(part.contiguous()))
            (dx,) = torch.autograd.grad(y, leaf, wide[..., D:])
            again = part.contiguous().requires_grad_()
            torch.testing.assert_close(dx, torch.autograd.grad(gelu(again), again, wide[..., D:].contiguous())[0])
    torch.testing.assert_close(gelu(wide[0, 0, 0]), gelu(wide)[0, 0, 0])
    assert gelu(wide[:, :0]).shape == (2, 0, 10000)
