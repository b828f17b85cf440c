"""GELU in its tails, softmax of infinities and of wide rows, top-k among equals, zeros and NaN."""

import math

import pytest
import torch

import kernels_torch
from kernels_torch.cases import CASES
from tests.conftest import HAS_GPU
from tests.kernels.test_contract import BACKENDS, MODULES
from tests.numerics import judge, run

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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("D", [1, 2, 3, 31, 127, 2049, 16384, 16385, 32768, 32769, 70000])
def test_softmax_of_any_width(backend, D, device):
    """Forward in one block up to 32768, backward up to 16384; twice over the row in blocks of columns beyond."""
    inputs = CASES["softmax"].make(dict(M=3, D=D), torch.float32, device)
    judge("softmax", run("softmax", MODULES[backend].softmax, CASES["softmax"].cast(inputs, torch.float32)), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("D", [7, 40000])
def test_softmax_of_infinities(backend, dtype, D, device):
    """−inf gives 0 and gets no gradient; nothing but −inf gives NaN, as +inf does; the lowest number is a number."""
    x = torch.randn(6, D, device=device).to(dtype)
    x[0, ::2] = -INF
    x[1] = -INF
    x[1, 3] = 2
    x[2] = -INF
    x[3, 4] = INF
    x[4] = torch.finfo(dtype).min
    x[5] = torch.finfo(dtype).min
    x[5, 1] = torch.finfo(dtype).max
    x.requires_grad_()
    y = MODULES[backend].softmax(x)
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    torch.testing.assert_close(y, torch.softmax(x.detach().double(), -1).to(dtype), equal_nan=True)
    assert (y[0, ::2] == 0).all()
    assert (dx[0, ::2] == 0).all()
    assert y[1].nonzero().tolist() == [[3]]
    assert y[2:4].isnan().all()
    assert (y[4] == y[4, 0]).all()
    assert y[5].nonzero().tolist() == [[1]]
    assert dx[[0, 1, 4, 5]].isfinite().all()


def difficult_rows(M, D, dtype, device):
    """Few different numbers, so that most have equals, with both zeros, both infinities and NaN of both signs."""
    x = (4 * torch.randn(M, D, device=device)).round().div(4).to(dtype)
    for value in (0.0, -0.0, INF, -INF, NAN, -NAN):
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


@needs_triton
@pytest.mark.parametrize("op", ["gelu", "softmax", "top_k"])
def test_second_derivatives_are_refused(op, device):
    """The kernels' backward is not itself differentiable, and must not pretend that they are zero."""
    x = torch.randn(2, 5, device=device, requires_grad=True)
    out = MODULES["triton"].top_k(x, 2)[0] if op == "top_k" else getattr(MODULES["triton"], op)(x)
    (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@needs_triton
@pytest.mark.parametrize("D", [1, 2, 64, 100, 1024, 4096, 16384, 32768])
def test_softmax_tiles_cover_the_row_and_fit_the_hardware(D):
    from kernels_triton import launch
    from kernels_triton.activations import BACKWARD, FORWARD, softmax_tile

    for itemsize in (2, 4, 8):
        for table in (FORWARD, BACKWARD):
            tile = softmax_tile(D, itemsize, table)
            if tile is None:
                assert max(table) < D
                continue
            assert launch.next_power_of_two(D) == tile.BD
            assert tile.warps in (1, 2, 4, 8, 16, 32)
            assert (tile.stages - 1) * tile.BT * tile.BD * itemsize <= launch.STAGE_BYTES
