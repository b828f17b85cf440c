"""Each step of a Muon update against its formula, one matrix at a time in fp64, and the property it exists for."""

import pytest
import torch

from optim import orthogonalise as ortho
from tests.numerics import assert_close

SHAPES = [(5, 13), (13, 5), (8, 8), (1, 7), (7, 1)]


@pytest.fixture(params=SHAPES, ids=str)
def stack(request):
    return torch.randn(3, *request.param) * torch.tensor([1e-3, 1.0, 50.0]).view(3, 1, 1)


def check(function, formula, stack):
    exact = torch.stack([formula(x) for x in stack.double()])
    plain = torch.stack([formula(x) for x in stack])
    assert_close(function(stack), exact, plain)


def test_equilibrate_rows_formula(stack):
    def formula(x):
        mean = x.norm() / len(x) ** 0.5
        return torch.stack([row * mean / max(row.norm(), 1e-6) for row in x])

    check(ortho.equilibrate_rows, formula, stack)


def test_equilibrated_rows_have_one_norm_and_the_same_total(stack):
    y = ortho.equilibrate_rows(stack)
    row_norms = y.norm(dim=-1)
    torch.testing.assert_close(row_norms, row_norms[:, :1].expand_as(row_norms))
    torch.testing.assert_close(y.norm(dim=(1, 2)), stack.norm(dim=(1, 2)))


def test_snapped_matrix_has_the_norm_of_an_orthogonal_one(stack):
    y = ortho.snap_frobenius(stack)
    torch.testing.assert_close(y.norm(dim=(1, 2)), torch.full((3,), min(stack.shape[1:]) ** 0.5))
    check(ortho.snap_frobenius, lambda x: x * min(x.shape) ** 0.5 / x.norm(), stack)


def test_reduce_variance_formula_over_several_steps(stack):
    K, r, c = stack.shape
    axis = 1 if r >= c else 0

    def formula(x, S, beta2=0.9):
        mean_square = (x * x).mean(axis, keepdim=True)
        S.copy_(beta2 * S + (1 - beta2) * mean_square)
        q = S.clamp_min(1e-10) ** -0.5
        n0 = (mean_square.sum() * x.shape[axis]).sqrt()
        n1 = ((mean_square * q * q).sum() * x.shape[axis]).sqrt()
        return x * q * n0 / max(n1, 1e-10)

    state = torch.zeros(K, *ortho.variance_shape(r, c))
    states = {dtype: [torch.zeros_like(s, dtype=dtype) for s in state] for dtype in (torch.float32, torch.float64)}
    for step in range(4):
        x = stack * (1 + step) + step
        exact = torch.stack([formula(m, s) for m, s in zip(x.double(), states[torch.float64])])
        plain = torch.stack([formula(m, s) for m, s in zip(x, states[torch.float32])])
        assert_close(ortho.reduce_variance(x, state, 0.9), exact, plain)
        assert_close(state, torch.stack(states[torch.float64]), torch.stack(states[torch.float32]))


def test_reduce_variance_keeps_the_frobenius_norm_and_evens_out_the_rest(stack):
    state = torch.zeros(3, *ortho.variance_shape(*stack.shape[1:]))
    y = ortho.reduce_variance(stack, state, 0.9)
    torch.testing.assert_close(y.norm(dim=(1, 2)), stack.norm(dim=(1, 2)), rtol=1e-5, atol=0)
    axis = -1 if stack.size(1) >= stack.size(2) else -2
    rms = y.square().mean(axis)[1:]  # the first matrix is so small that the floor under S acts
    torch.testing.assert_close(rms, rms[:, :1].expand_as(rms), rtol=1e-4, atol=0)


def test_zero_matrices_stay_zero():
    x = torch.zeros(2, 5, 3)
    state = torch.zeros(2, 5, 1)
    y = ortho.reduce_variance(ortho.snap_frobenius(ortho.equilibrate_rows(x)), state, 0.9)
    assert torch.equal(y, x)
    assert torch.equal(state, torch.zeros(2, 5, 1))


def test_decay_touches_only_entries_whose_update_points_to_zero():
    x, p = torch.randn(2, 7, 5), torch.randn(2, 7, 5)
    p[0, 0], x[0, 1] = 0.0, 0.0
    plain, decayed = p.clone(), p.clone()
    ortho.descend_(plain, x, lr=0.1, weight_decay=0.0)
    ortho.descend_(decayed, x, lr=0.1, weight_decay=0.5)
    torch.testing.assert_close(plain, p - 0.1 * x)
    agree = x * p >= 0
    assert torch.equal(plain[~agree], decayed[~agree])
    torch.testing.assert_close(decayed[agree], (p - 0.1 * x - 0.1 * 0.5 * p)[agree])
    assert not torch.equal(plain[agree], decayed[agree])


def test_only_tall_matrices_take_longer_steps():
    assert ortho.shape_factor(12, 3) == 2
    assert ortho.shape_factor(3, 12) == ortho.shape_factor(5, 5) == 1
