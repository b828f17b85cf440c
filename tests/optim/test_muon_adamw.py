"""The optimizer in one process: its two update rules, mixed precision, clipping, skipping, and its saved state."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import kernels_torch
from errors import KestrelError
from optim.groups import AdamWConfig, MuonAdamWConfig, parameter_groups
from optim.muon_adamw import MuonAdamW
from tests.numerics import assert_close
from tests.optim.toy import Toy, random_gradients, set_gradients, snapshot, toy_optimizer

POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


class Matrices(nn.Module):
    """K matrices of one shape."""

    def __init__(self, *values):
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(v.clone()) for v in values)

    def parameter_roles(self):
        return {"matrix": list(self.weights)}


def muon(values, **changes):
    model = Matrices(*values)
    return toy_optimizer(model, MuonAdamWConfig(**changes))


def adamw_of(params, config):
    model = Matrices(*params)
    return model, MuonAdamW(parameter_groups(model, config, n_embd=24), kernels_torch)


def take_step(model, optimizer, gradients, lr_mult=1.0, momentum=0.9, weight_decay_mult=1.0, **options):
    set_gradients(model, gradients)
    return optimizer.step(lr_mult, momentum, weight_decay_mult, **options)


# AdamW


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_equals_torch_over_50_steps(weight_decay):
    start = [torch.randn(40, 30), torch.randn(3, 5)]
    model, ours = adamw_of(start, AdamWConfig(lr=1e-2, weight_decay=weight_decay, grad_clip=0.0))
    params = [nn.Parameter(p.clone()) for p in start]
    theirs = torch.optim.AdamW(params, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay, foreach=False)
    for step in range(50):
        lr_mult = 1 - step / 60
        gradients = [torch.randn_like(p) for p in params]
        take_step(model, ours, gradients, lr_mult=lr_mult)
        for p, g in zip(params, gradients):
            p.grad = g
        theirs.param_groups[0]["lr"] = 1e-2 * lr_mult
        theirs.step()
    for got, expected in zip(model.parameters(), params):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_adamw_is_its_formula_with_eps_outside_the_corrected_root():
    p = exact = torch.randn(4, 6, dtype=torch.float64)
    model, optimizer = adamw_of([p.float()], AdamWConfig(lr=0.1, eps=0.5, weight_decay=0.2))
    m = v = torch.zeros_like(p)
    for t in range(1, 4):
        g = torch.randn(4, 6)
        take_step(model, optimizer, [g], weight_decay_mult=0.0)  # which is Muon's alone
        m, v = 0.9 * m + 0.1 * g.double(), 0.95 * v + 0.05 * g.double() ** 2
        exact = exact * (1 - 0.1 * 0.2)
        exact = exact - 0.1 / (1 - 0.9**t) * m / ((v / (1 - 0.95**t)).sqrt() + 0.5)
    torch.testing.assert_close(model.weights[0].double(), exact, rtol=1e-6, atol=1e-6)


def test_bf16_parameters_keep_moments_that_do_not_stall():
    model = Matrices(torch.zeros(2, 3, dtype=torch.bfloat16))
    config = AdamWConfig(lr=1e-3, beta2=0.995, weight_decay=0.0)
    optimizer = MuonAdamW(parameter_groups(model, config, n_embd=24), kernels_torch)
    for _ in range(1000):  # 1 − 0.995¹⁰⁰⁰ = 0.9933
        take_step(model, optimizer, [torch.ones(2, 3, dtype=torch.bfloat16)])
    state = optimizer.state_tensors()
    assert state["weights.0.exp_avg_sq"].dtype == torch.float32
    assert (state["weights.0.exp_avg_sq"] >= 0.99).all()
    assert model.weights[0].dtype == torch.bfloat16
    assert (model.weights[0] < -0.1).all(), "and the parameter moves"


# Muon


def muon_by_hand(p, gradients, momenta, *, lr, decay, beta2=0.9, equilibrate, snap):
    """The update rule for one matrix, line by line, in p's dtype."""
    r, c = p.shape
    M = torch.zeros_like(p)
    axis = 1 if r >= c else 0
    S = torch.zeros_like(p.mean(axis, keepdim=True))
    for g, mu in zip(gradients, momenta):
        g = g.to(p.dtype)
        M = mu * M + (1 - mu) * g
        X = (1 - mu) * g + mu * M
        if equilibrate:
            X = X * (X.norm() / r**0.5) / X.norm(dim=1, keepdim=True).clamp_min(1e-6)
        X = X / (1.01 * X.norm() + 1e-6)
        for a, b, k in POLAR_EXPRESS:
            A = X @ X.T if r <= c else X.T @ X
            B = b * A + k * A @ A
            X = a * X + (B @ X if r <= c else X @ B)
        if snap:
            X = X * min(r, c) ** 0.5 / X.norm()
        mean_square = (X * X).mean(axis, keepdim=True)
        S = beta2 * S + (1 - beta2) * mean_square
        q = S.clamp_min(1e-10) ** -0.5
        X = X * q * (mean_square.sum() / (mean_square * q * q).sum()).sqrt()
        step = lr * max(1, r / c) ** 0.5
        p = p - step * X - step * decay * p * (X * p >= 0)
    return p


@pytest.mark.parametrize("shape", [(6, 15), (15, 6), (9, 9)], ids=str)
@pytest.mark.parametrize(("equilibrate", "snap"), [(True, True), (False, False)])
def test_muon_is_its_formula(shape, equilibrate, snap):
    start, gradients = torch.randn(3, *shape), torch.randn(4, 3, *shape)
    momenta = [0.85, 0.9, 0.95, 0.97]
    changes = {"matrix_lr": 0.1, "weight_decay": 0.3, "muon_eq": equilibrate, "muon_plus": snap}
    model, optimizer = muon(start, **changes)
    for g, mu in zip(gradients, momenta):
        take_step(model, optimizer, g, lr_mult=0.5, momentum=mu, weight_decay_mult=0.5)
    for k in range(3):
        by_hand = lambda p: muon_by_hand(
            p, gradients[:, k], momenta, lr=0.05, decay=0.15, equilibrate=equilibrate, snap=snap
        )
        # The iteration amplifies rounding, differently for every order of summation: 8 rather than 2 times plain's.
        assert_close(model.weights[k].detach(), by_hand(start[k].double()), by_hand(start[k]), slack=8)


@pytest.mark.parametrize("shape", [(48, 48), (24, 96), (96, 24)], ids=str)
def test_first_update_has_singular_values_in_a_narrow_band(shape):
    U, _, V = torch.linalg.svd(torch.randn(2, *shape), full_matrices=False)
    gradients = U * torch.logspace(0, -1.5, min(shape)) @ V  # singular values over a factor of 30
    model, optimizer = muon(torch.zeros(2, *shape), matrix_lr=1.0)
    take_step(model, optimizer, gradients)
    tall = max(1, shape[0] / shape[1]) ** 0.5
    values = torch.linalg.svdvals(torch.stack(list(model.weights)).detach()) / tall
    assert values.min() > 0.7
    assert values.max() < 1.35


@pytest.mark.parametrize("shape", [(24, 24), (24, 60), (60, 24)], ids=str)
def test_update_norm_is_that_of_an_orthogonal_matrix_and_longer_for_tall_ones(shape):
    model, optimizer = muon(torch.zeros(3, *shape), matrix_lr=1.0)
    take_step(model, optimizer, torch.randn(3, *shape) * 1e-3)
    expected = min(shape) ** 0.5 * max(1, shape[0] / shape[1]) ** 0.5
    for p in model.weights:
        assert p.norm().item() == pytest.approx(expected, rel=1e-5)


def test_zero_gradient_moves_nothing_but_decay():
    start = torch.randn(2, 5, 7)
    model, optimizer = muon(start, matrix_lr=0.1, weight_decay=0.5)
    take_step(model, optimizer, [torch.zeros(5, 7), torch.randn(5, 7)])
    torch.testing.assert_close(model.weights[0].detach(), start[0] * (1 - 0.1 * 0.5))
    assert model.weights[1].isfinite().all()


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_muon_iterates_in_bf16_only_if_the_model_computes_in_it(compute_dtype):
    seen = []

    def spy(g, *, dtype):
        seen.append((g.dtype, dtype))
        return kernels_torch.newton_schulz(g, dtype=dtype)

    model = Matrices(torch.randn(4, 4))
    groups = parameter_groups(model, MuonAdamWConfig(), n_embd=24)
    ops = SimpleNamespace(**vars(kernels_torch) | {"newton_schulz": spy})
    take_step(model, MuonAdamW(groups, ops, compute_dtype=compute_dtype), [torch.randn(4, 4)])
    expected = torch.bfloat16 if compute_dtype == torch.bfloat16 else torch.float32
    assert seen == [(expected, expected)]


# What a step takes and returns


def test_multipliers_act_on_what_they_name():
    def run(**arguments):
        model, optimizer = toy_optimizer()
        for seed in range(2):
            take_step(model, optimizer, random_gradients(model, seed), **arguments)
        return snapshot(model)

    base, no_decay, heavy, slow = run(), run(weight_decay_mult=0.0), run(momentum=0.5), run(lr_mult=0.5)
    for name in base:
        is_muon = name.startswith("matrix")
        assert torch.equal(base[name], no_decay[name]) != is_muon, name
        assert torch.equal(base[name], heavy[name]) != is_muon, name
        assert not torch.equal(base[name], slow[name]), name


def test_parameter_without_gradient_is_named():
    model, optimizer = toy_optimizer()
    set_gradients(model, random_gradients(model, 0))
    model.matrix_3.grad = None
    with pytest.raises(AssertionError, match="matrix_3 has no gradient"):
        optimizer.step(1.0, 0.9, 1.0)


def test_zero_grad_forgets_every_gradient():
    model, optimizer = toy_optimizer()
    set_gradients(model, random_gradients(model, 0))
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("grad_clip", [0.1, 1e6])
def test_clipping_equals_torch(grad_clip):
    (clipped, ours), (reference, theirs) = toy_optimizer(), toy_optimizer()
    for seed in range(3):
        gradients = random_gradients(clipped, seed)
        result = take_step(clipped, ours, gradients, grad_clip=grad_clip)
        set_gradients(reference, gradients)
        norm = nn.utils.clip_grad_norm_(reference.parameters(), grad_clip)
        after = theirs.step(1.0, 0.9, 1.0).grad_norm
        torch.testing.assert_close(result.grad_norm, norm)
        torch.testing.assert_close(after, norm.clamp(max=grad_clip))
    for (name, got), expected in zip(clipped.named_parameters(), reference.parameters()):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, msg=name)


def test_unscaling_by_a_power_of_two_changes_nothing():
    (scaled, ours), (plain, theirs) = toy_optimizer(), toy_optimizer()
    gradients = random_gradients(plain, 0)
    a = take_step(scaled, ours, [g * 1024 for g in gradients], inv_scale=1 / 1024)
    b = take_step(plain, theirs, gradients)
    torch.testing.assert_close(a.grad_norm, b.grad_norm)
    for name, value in snapshot(scaled).items():
        assert torch.equal(value, snapshot(plain)[name]), name


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["matrix_3", "embedding_0", "x0_lambda_0"])
def test_skipped_step_leaves_no_trace(bad, name):
    (model, optimizer), (twin, unharmed) = toy_optimizer(), toy_optimizer()
    for seed in range(3):
        gradients = random_gradients(model, seed)
        assert not take_step(model, optimizer, gradients, inv_scale=1.0).skipped
        take_step(twin, unharmed, gradients)
        set_gradients(model, gradients)
        getattr(model, name).grad.view(-1)[0] = bad
        result = optimizer.step(1.0, 0.9, 1.0, inv_scale=1.0, grad_clip=1.0)
        assert result.skipped
        assert not result.grad_norm.isfinite()
    for key, value in snapshot(model).items():
        assert torch.equal(value, snapshot(twin)[key]), key
    for key, value in optimizer.state_tensors().items():
        assert torch.equal(value, unharmed.state_tensors()[key]), key


# State


def test_state_is_fp32_whole_and_named_after_parameters():
    model, optimizer = toy_optimizer()
    take_step(model, optimizer, random_gradients(model, 0))
    state = optimizer.state_tensors()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    kinds = {name: ("momentum", "second_moment") if "matrix" in name else ("exp_avg", "exp_avg_sq") for name in shapes}
    assert set(state) == {"step"} | {f"{name}.{kind}" for name in shapes for kind in kinds[name]}
    assert state["step"].item() == 1
    for name, shape in shapes.items():
        assert tuple(state[f"{name}.{kinds[name][0]}"].shape) == shape
        assert state[f"{name}.{kinds[name][1]}"].dtype == torch.float32
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == optimizer.state_spec()


@pytest.mark.parametrize("config", [MuonAdamWConfig(), AdamWConfig()], ids=lambda c: c.name)
def test_resumed_optimizer_continues_bitwise(config):
    straight, one = toy_optimizer(config=config)
    resumed, two = toy_optimizer(config=config)
    for seed in range(3):
        take_step(straight, one, random_gradients(straight, seed), momentum=0.85)
        take_step(resumed, two, random_gradients(resumed, seed), momentum=0.85)
    loaded = Toy(seed=1)
    loaded.load_state_dict(resumed.state_dict())
    _, three = toy_optimizer(loaded, config)
    three.load_state_tensors(two.state_tensors())
    for seed in range(3, 6):
        take_step(straight, one, random_gradients(straight, seed))
        take_step(loaded, three, random_gradients(loaded, seed))
    for name, value in snapshot(straight).items():
        assert torch.equal(value, snapshot(loaded)[name]), name
    assert three.steps == 6


def test_saved_state_does_not_change_with_later_steps():
    model, optimizer = toy_optimizer()
    take_step(model, optimizer, random_gradients(model, 0))
    state = optimizer.state_tensors()
    before = {name: tensor.clone() for name, tensor in state.items()}
    take_step(model, optimizer, random_gradients(model, 1))
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_state_of_another_model_is_refused():
    _, optimizer = toy_optimizer()
    good = optimizer.state_tensors()
    name = "matrix_0.momentum"
    cases = {
        "missing.*matrix_0.momentum": {k: v for k, v in good.items() if k != name},
        "unknown.*surplus": good | {"surplus": torch.zeros(1)},
        r"matrix_0.momentum is \(2, 2\)": good | {name: torch.zeros(2, 2)},
        r"float64 but this model needs \(24, 24\) torch.float32": good | {name: good[name].double()},
    }
    for message, state in cases.items():
        with pytest.raises(KestrelError, match=message):
            optimizer.load_state_tensors(state)
    _, other = toy_optimizer(config=AdamWConfig())
    with pytest.raises(KestrelError, match="another model or optimizer"):
        other.load_state_tensors(good)
