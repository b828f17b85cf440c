"""Muon around its orthogonalisation: each step against its formula, the properties it exists for, and matrices that lie
apart, updated where they are."""

import pytest
import torch

from kernels_torch.muon import reduce_variance, snap_frobenius, variance_shape
from tests.conftest import HAS_GPU
from tests.kernels.test_contract import BACKENDS, MODULES
from tests.numerics import assert_close

SHAPES = [(5, 13), (13, 5), (8, 8), (1, 7), (7, 1)]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(params=SHAPES, ids=str)
def stack(request, device):
    return torch.randn(3, *request.param, device=device) * torch.tensor([1e-3, 1.0, 50.0], device=device).view(3, 1, 1)


def momentum_of(backend, grads, **options):
    """U after a first step with μ = 0: the gradients themselves, equilibrated."""
    zeros = torch.zeros_like(grads, dtype=torch.promote_types(grads.dtype, torch.float32))
    return MODULES[backend].muon_momentum(grads, zeros, 0.0, dtype=grads.dtype, **options)[0]


@each_backend
def test_rows_have_one_norm_and_their_direction(backend, stack):
    U = momentum_of(backend, stack)
    torch.testing.assert_close(U.norm(dim=-1), torch.ones_like(U[..., 0]))
    torch.testing.assert_close(U * stack.norm(dim=-1, keepdim=True), stack)
    assert torch.equal(momentum_of(backend, stack, equilibrate=False), stack)


@each_backend
def test_zero_matrices_stay_zero(backend, device):
    zeros, params = torch.zeros(2, 5, 3, device=device), torch.randn(2, 5, 3, device=device)
    U = momentum_of(backend, zeros)
    P, S = MODULES[backend].muon_update(params, U, torch.zeros(2, 5, 1, device=device), 0.1, 0.0)
    assert torch.equal(U, zeros)
    assert torch.equal(P, params)
    assert torch.equal(S, torch.zeros_like(S))


def test_snapped_matrix_has_the_norm_of_an_orthogonal_one(stack):
    norms = snap_frobenius(stack).norm(dim=(1, 2))
    torch.testing.assert_close(norms, torch.full_like(norms, min(stack.shape[1:]) ** 0.5))


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

    state = torch.zeros(K, *variance_shape(r, c), device=stack.device)
    states = {dtype: [torch.zeros_like(s, dtype=dtype) for s in state] for dtype in (torch.float32, torch.float64)}
    for step in range(4):
        x = stack * (1 + step) + step
        exact = torch.stack([formula(m, s) for m, s in zip(x.double(), states[torch.float64])])
        plain = torch.stack([formula(m, s) for m, s in zip(x, states[torch.float32])])
        assert_close(reduce_variance(x, state, 0.9), exact, plain)
        assert_close(state, torch.stack(states[torch.float64]), torch.stack(states[torch.float32]))


@each_backend
def test_the_step_is_that_of_an_orthogonal_matrix_and_longer_for_a_tall_one(backend, stack):
    """From nowhere, with nothing to decay: rows (columns, if wide) of one size, with the norm it should have."""
    K, r, c = stack.shape
    S = torch.zeros(K, *variance_shape(r, c), device=stack.device)
    P, _ = MODULES[backend].muon_update(torch.zeros_like(stack), stack, S, 1.0, 0.5)
    norms = P.norm(dim=(1, 2))
    torch.testing.assert_close(norms, torch.full_like(norms, min(r, c) ** 0.5 * max(1, r / c) ** 0.5))
    rms = P.square().mean(-1 if r >= c else -2)
    torch.testing.assert_close(rms, rms[:, :1].expand_as(rms), rtol=1e-4, atol=0)


@each_backend
def test_decay_touches_only_entries_whose_update_points_to_zero(backend, device):
    x, p = torch.randn(2, 7, 5, device=device), torch.randn(2, 7, 5, device=device)
    p[0, 0], x[0, 1] = 0.0, 0.0
    muon_update = MODULES[backend].muon_update
    S = torch.ones(2, 7, 1, device=device)
    plain, _ = muon_update(p, x, S, 0.1, 0.0, snap=False)
    decayed, _ = muon_update(p, x, S, 0.1, 0.5, snap=False)
    agree = x * p >= 0
    assert torch.equal(plain[~agree], decayed[~agree])
    shrink = 0.1 * (7 / 5) ** 0.5 * 0.5
    torch.testing.assert_close(decayed[agree], (plain - shrink * p)[agree])
    assert not torch.equal(plain[agree], decayed[agree])


def number(value, device):
    return torch.tensor(value, dtype=torch.float64, device=device)


@each_backend
@pytest.mark.parametrize("shape", [(6, 13), (13, 6), (8, 16)], ids=str)
def test_matrices_that_lie_apart_are_updated_where_they_are(backend, shape, device):
    """As a stack is, to the bit; with numbers from the device, and a copy in another dtype."""
    ops, copy_dtype = MODULES[backend], torch.bfloat16 if HAS_GPU or backend == "torch" else torch.float16
    G, M, X, P = (torch.randn(3, *shape, device=device) for _ in range(4))
    S = torch.rand(3, *variance_shape(*shape), device=device)
    U, new_M, squares = ops.muon_momentum(G, M, 0.9, dtype=torch.float32)
    new_P, new_S = ops.muon_update(P, X, S, 0.1, 0.3)
    grads, params = [g.clone() for g in G], [p.clone() for p in P]
    copies = [torch.empty(shape, dtype=copy_dtype, device=device) for _ in P]
    u, m, s = ops.muon_momentum(grads, M, number(0.9, device), dtype=torch.float32, in_place=True)
    lr, decay = number(0.1, device), number(0.3, device)
    p, v = ops.muon_update(params, X, S, lr, decay, copies=copies, in_place=True)
    assert m is M
    assert p is params
    assert v is S
    for got, expected in ((u, U), (M, new_M), (s, squares), (torch.stack(params), new_P), (S, new_S)):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(copy, p.to(copy_dtype)) for copy, p in zip(copies, params))


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
def test_what_is_written_in_place_must_be_contiguous(device):
    G, M = torch.randn(2, 6, 8, device=device), torch.randn(2, 8, 6, device=device).mT
    with pytest.raises(ValueError, match="momentum must be contiguous"):
        MODULES["triton"].muon_momentum(G, M, 0.9, in_place=True)
    with pytest.raises(ValueError, match=r"one dtype, got torch.float32 and torch.float64"):
        MODULES["triton"].muon_momentum([G[0], G[1].double()], M.contiguous(), 0.9)
