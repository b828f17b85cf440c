"""Every parameter gets nanochat's learning rate, betas and decay for its role; bad settings are refused by name."""

import pytest
import torch

from errors import KestrelError
from optim.groups import AdamWConfig, MuonAdamWConfig, OptimConfig, parameter_groups
from tests.optim.toy import SHAPES, Toy

WIDTH, BATCH = 0.5, 2**0.5  # width 3072 and 2²⁰ tokens per step

# name of the first parameter → lr, betas, weight decay
TABLE = {
    "unembedding_0": (0.008 * WIDTH * BATCH, (0.8, 0.96), 0.01),
    "embedding_0": (0.3 * WIDTH * BATCH, (0.8, 0.995), 0.001),
    "value_embedding_0": (0.15 * WIDTH * BATCH, (0.8, 0.995), 0.01),
    "resid_lambda_0": (0.005 * BATCH, (0.8, 0.95), 0.05),
    "x0_lambda_0": (0.5 * BATCH, (0.96, 0.95), 0.0),
    "smear_0": (0.2, (0.8, 0.95), 0.0),
    "norm_0": (0.005 * BATCH, (0.8, 0.95), 0.0),
}


def groups_of(config, **changes):
    return parameter_groups(Toy(), config, **({"n_embd": 3072, "lr_scale": BATCH} | changes))


def test_adamw_groups_are_the_table_in_its_order():
    groups = [g for g in groups_of(MuonAdamWConfig()) if g["kind"] == "adamw"]
    assert [g["names"][0] for g in groups] == list(TABLE)
    for group, (lr, betas, decay) in zip(groups, TABLE.values()):
        assert group["lr"] == pytest.approx(lr)
        assert (group["betas"], group["weight_decay"], group["eps"]) == (betas, decay, 1e-10)


def test_muon_has_one_group_per_shape_in_sorted_order():
    groups = [g for g in groups_of(MuonAdamWConfig(), weight_decay=0.1) if g["kind"] == "muon"]
    assert [tuple(g["params"][0].shape) for g in groups] == sorted(set(SHAPES["matrix"]))
    assert all(p.shape == g["params"][0].shape for g in groups for p in g["params"])
    assert [g["lr"] for g in groups] == pytest.approx([0.02 * BATCH] * len(groups))
    assert {(g["beta2"], g["weight_decay"]) for g in groups} == {(0.9, 0.1)}


@pytest.mark.parametrize("config", [MuonAdamWConfig(), AdamWConfig()], ids=lambda c: c.name)
def test_every_parameter_is_in_exactly_one_group_under_its_name(config):
    model = Toy()
    groups = parameter_groups(model, config, n_embd=24)
    members = [(name, p) for g in groups for name, p in zip(g["names"], g["params"], strict=True)]
    assert sorted(name for name, _ in members) == sorted(name for name, _ in model.named_parameters())
    assert all(dict(model.named_parameters())[name] is p for name, p in members)


def test_parameter_without_a_role_is_a_defect():
    model = Toy()
    model.forgotten = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(AssertionError, match="forgotten"):
        parameter_groups(model, MuonAdamWConfig(), n_embd=24)


def test_weight_decay_of_the_horizon_is_capped():
    decay = lambda config, given: groups_of(config, weight_decay=given)[-1]["weight_decay"]
    assert decay(MuonAdamWConfig(), None) == 0.28
    assert decay(MuonAdamWConfig(), 0.93961) == 0.93961, "six layers are below the cap"
    assert decay(MuonAdamWConfig(), 1.89) == 1.0
    assert decay(MuonAdamWConfig(max_weight_decay=0.5), 1.89) == 0.5


def test_adamw_takes_its_learning_rate_as_written_and_decays_matrices_only():
    groups = groups_of(AdamWConfig(lr=1e-3, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.2), weight_decay=0.7)
    assert {g["kind"] for g in groups} == {"adamw"}
    for group in groups:
        assert (group["lr"], group["betas"], group["eps"]) == (1e-3, (0.8, 0.9), 1e-6)
        assert all(group["weight_decay"] == (0.2 if p.dim() >= 2 else 0.0) for p in group["params"])


def test_muon_options_reach_the_groups():
    group = groups_of(MuonAdamWConfig(muon_eq=False, muon_plus=False, matrix_lr=0.1), lr_scale=1.0)[-1]
    assert (group["muon_eq"], group["muon_plus"], group["lr"]) == (False, False, 0.1)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (OptimConfig, {"name": "sgd"}),
        (OptimConfig, {"schedule": "linear"}),
        (OptimConfig, {"warmup_steps": -1}),
        (OptimConfig, {"warmdown_ratio": 1.5}),
        (OptimConfig, {"final_lr_frac": -0.1}),
        (OptimConfig, {"grad_clip": -1.0}),
        (OptimConfig, {"weight_decay": -0.1}),
        (MuonAdamWConfig, {"embedding_lr": 0.0}),
        (MuonAdamWConfig, {"matrix_lr": -0.02}),
        (MuonAdamWConfig, {"max_weight_decay": -1.0}),
        (MuonAdamWConfig, {"scalar_lr": float("nan")}),
        (AdamWConfig, {"lr": 0.0}),
        (AdamWConfig, {"beta1": 1.0}),
        (AdamWConfig, {"beta2": -0.5}),
        (AdamWConfig, {"eps": 0.0}),
    ],
)
def test_bad_setting_is_refused_by_name_and_value(kind, changes):
    ((key, value),) = changes.items()
    with pytest.raises(KestrelError, match=rf"optim\.{key} must be .*{value}"):
        kind(**changes)
