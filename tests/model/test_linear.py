"""Several products of one input, with one gradient: the same as each alone."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from model.layers.linear import Linear, products

N_FIRST = 3


def three(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    layers = [Linear(5, n) for n in (7, 2, 2)]
    for layer in layers:
        layer.weight.data = torch.randn(layer.weight.shape, generator=generator, dtype=dtype)
    x = torch.randn(2, 4, 5, generator=generator, dtype=dtype).requires_grad_()
    return x, layers


@pytest.mark.parametrize("used", [(0, 1, 2, 3), (1, 3), (0,), (2,), (0, 2)])
def test_gradients_are_those_of_separate_products(used):
    x, layers = three()
    leaves = [x, *(layer.weight for layer in layers)]
    together = products(x, *layers, n_first=N_FIRST)
    alone = [x[..., :N_FIRST], *(layer(x) for layer in layers)]
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one, other)
    got, expected = (
        torch.autograd.grad([outs[i].sin().sum() for i in used], leaves, allow_unused=True)
        for outs in (together, alone)
    )
    for one, other in zip(got, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=1e-12)


def test_a_frozen_input_and_a_frozen_weight_get_no_gradient():
    x, layers = three()
    layers[1].weight.requires_grad_(False)
    torch.stack([y.sum() for y in products(x.detach(), *layers)[1:]]).sum().backward()
    assert layers[0].weight.grad is not None
    assert layers[1].weight.grad is None
    assert x.grad is None


def test_derivatives_and_their_derivatives():
    x, layers = three()

    def of(x):
        return products(x, *layers, n_first=N_FIRST)

    assert gradcheck(of, x)
    assert gradgradcheck(of, x)


def test_without_gradients_nothing_is_kept():
    x, layers = three()
    with torch.no_grad():
        assert all(y.grad_fn is None for y in products(x, *layers, n_first=N_FIRST))


def test_traced_whole():
    x, layers = three(torch.float32)
    traced = torch.compile(
        lambda x: sum(y.sum() for y in products(x, *layers, n_first=1)), fullgraph=True, backend="aot_eager"
    )
    expected = torch.autograd.grad(sum(y.sum() for y in products(x, *layers, n_first=1)), x)
    torch.testing.assert_close(torch.autograd.grad(traced(x), x), expected)
