"""Top-k among equals, both zeros, infinities and NaN, and of rows wider than a block."""

import math

import pytest
import torch

import kernels_torch
from tests.conftest import HAS_GPU
from tests.kernels.test_contract import BACKENDS, MODULES

HALVES = [torch.float16, *([torch.bfloat16] if HAS_GPU else [])]
INF, NAN = math.inf, math.nan
needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")


def difficult_rows(M, D, dtype, device):
    """Few different numbers, so that most have equals, with both zeros, both infinities and NaN of both signs.

    On a GPU torch.sort takes a NaN whose sign bit is set for the least of all, so there it is no reference.
    """
    x = (4 * torch.randn(M, D, device=device)).round().div(4).to(dtype)
    for value in (0.0, -0.0, INF, -INF, NAN, *([] if x.is_cuda else [-NAN])):
        x[torch.rand(M, D, device=device) < 0.05] = value
    return x


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize(
    ("M", "D", "k"),
    [
        (3, 1, 1),
        (300, 2, 2),
        (130, 9, 8),
        (5, 9, 9),
        (3, 64, 64),
        (7, 127, 100),
        (2, 4096, 50),
        (2, 4097, 3),
        (2, 9000, 20),
    ],
)
def test_top_k_among_equals_is_a_stable_sort(backend, dtype, M, D, k, device):
    """Indices are the reference's; values are those that stand there, to the bit; only they get gradients."""
    x = difficult_rows(M, D, dtype, device)
    values, indices = MODULES[backend].top_k(x.requires_grad_(), k)
    x = x.detach()
    assert torch.equal(indices, torch.sort(x, dim=-1, descending=True, stable=True).indices[:, :k].int())
    as_bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(values.detach().view(as_bits), x.gather(-1, indices.long()).view(as_bits))


@needs_triton
@pytest.mark.parametrize(("D", "k"), [(4096, 4096), (5000, 2100), (70000, 1), (70000, 1000)])
def test_top_k_of_wide_rows_and_many(D, k, device):
    """Rows wider than a block, than 16 bits can count, and more to find than one round does."""
    x = difficult_rows(2, D, torch.float16, device)
    expected, got = kernels_torch.top_k(x, k), MODULES["triton"].top_k(x, k)
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("D", "k"), [(5, 2), (60, 60), (9000, 20)])
def test_top_k_gives_gradients_to_what_it_chose(backend, D, k, device):
    """And none to its indices; a gradient that comes in expanded is read right."""
    x = torch.randn(2, 3, D, device=device, requires_grad=True)
    values, indices = MODULES[backend].top_k(x, k)
    assert not indices.requires_grad
    upstream = torch.randn(2, 1, k, device=device).expand(2, 3, k)
    (dx,) = torch.autograd.grad(values, x, upstream)
    assert torch.equal(dx, torch.zeros_like(x).scatter(-1, indices.long(), upstream))
