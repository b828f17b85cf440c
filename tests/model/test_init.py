"""First values: every one of them set, from the table, by a generator of its own."""

import math

import pytest
import torch

from model import build
from model.language_model import ROLES
from tests.model.tiny import FORMS, NANOCHAT_2026, VOCAB, fresh, llama, nanochat, torch_ops

every_form = pytest.mark.parametrize("form", FORMS)
C = 128
BOUND = math.sqrt(3 / C)

# name ending → (low, high) of a uniform, a standard deviation, or exact values
NANOCHAT_TABLE = {
    "wte.weight": 0.8,
    "lm_head.weight": 0.001,
    "c_q.weight": (-BOUND, BOUND),
    "c_k.weight": (-BOUND, BOUND),
    "c_v.weight": (-BOUND, BOUND),
    "attn.c_proj.weight": [0.0],
    "mlp.c_fc.weight": (-0.4 * BOUND, 0.4 * BOUND),
    "mlp.c_proj.weight": [0.0],
    "ve_gate.weight": (0.0, 0.02),
    "smear_gate.weight": (0.0, 0.02),
    "smear_lambda": [0.0],
    "backout_lambda": [0.2],
    "resid_lambdas": [1.15, 1.15 - 0.1 / 3, 1.15 - 0.2 / 3, 1.05],
    "x0_lambdas": [0.2, 0.15, 0.10, 0.05],
    "value_embeds.1.weight": (-BOUND, BOUND),
    "value_embeds.3.weight": (-BOUND, BOUND),
}
LLAMA_TABLE = {
    **{f"{name}.weight": 0.02 for name in ("tok", "head", "c_q", "c_k", "c_v", "c_gate", "c_up")},
    "c_proj.weight": 0.02 / math.sqrt(2 * 4),
    **{f"{name}.weight": [1.0] for name in ("norm", "norm1", "norm2")},
}


def assert_drawn_from(values: torch.Tensor, rule, name: str) -> None:
    """Within the five standard errors that the number of values allows, and within the bounds of a uniform."""
    values, n = values.double().flatten(), values.numel()
    if isinstance(rule, list):
        expected = torch.tensor(rule, dtype=torch.float64).expand(n) if len(rule) == 1 else torch.tensor(rule).double()
        assert torch.equal(values, expected.float().double()), name
        return
    low, high = rule if isinstance(rule, tuple) else (-math.inf, math.inf)
    mean = (low + high) / 2 if isinstance(rule, tuple) else 0.0
    std = (high - low) / math.sqrt(12) if isinstance(rule, tuple) else rule
    assert values.min() >= low, name
    assert values.max() <= high, name
    assert abs(values.mean() - mean) <= 5 * std / math.sqrt(n), name
    assert abs(values.std() / std - 1) <= 5 / math.sqrt(2 * (n - 1)), name


@pytest.mark.parametrize(
    ("config", "table"),
    [
        (nanochat(depth=4, aspect_ratio=32, head_dim=32, **NANOCHAT_2026), NANOCHAT_TABLE),
        (llama(n_layer=4, n_embd=C, n_head=4), LLAMA_TABLE),
    ],
    ids=["nanochat", "llama"],
)
def test_initial_values_follow_the_table(config, table):
    for name, parameter in fresh(config, vocab_size=500).named_parameters():
        rule = next(rule for ending, rule in table.items() if ("." + name).endswith("." + ending))
        assert_drawn_from(parameter.detach(), rule, name)


@every_form
def test_nothing_is_left_uninitialised(form):
    model = build(FORMS[form], VOCAB, torch_ops())
    assert all(p.is_meta for p in [*model.parameters(), *model.buffers()])
    model.to_empty(device="cpu")
    for values in [*model.parameters(), *model.buffers()]:
        values.data.fill_(torch.nan)
    model.init_weights(7)
    for name, values in [*model.named_parameters(), *model.named_buffers()]:
        assert values.isfinite().all(), name


@every_form
def test_masters_are_fp32_whatever_the_compute_dtype(form):
    model = fresh(FORMS[form], torch.bfloat16)
    assert {p.dtype for p in [*model.parameters(), *model.buffers()]} == {torch.float32}


def test_seed_decides_and_global_generators_do_not():
    config = FORMS["2026"]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = fresh(config, seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    same, other = fresh(config, seed=5).state_dict(), fresh(config, seed=6).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if one[name].unique().numel() > 10)


def test_forms_share_the_values_of_the_parameters_they_share():
    plain, modern = fresh(FORMS["plain"]).state_dict(), fresh(FORMS["2026"]).state_dict()
    assert all(torch.equal(plain[name], modern[name]) for name in plain)


def test_no_two_parameters_hold_the_same_draw():
    values = [p.detach().flatten()[:24] for p in fresh(FORMS["2026"]).parameters() if p.unique().numel() > 10]
    assert len({tuple((v / v.abs().max()).tolist()) for v in values}) == len(values)


@pytest.mark.gpu
def test_values_are_the_same_on_every_device(device):
    here, there = fresh(FORMS["2026"]).state_dict(), fresh(FORMS["2026"], device=device).state_dict()
    assert all(torch.equal(here[name], there[name].cpu()) for name in here)


@every_form
def test_loading_weights_into_an_empty_model_needs_only_the_buffers(form):
    source = fresh(FORMS[form])
    target = build(FORMS[form], VOCAB, torch_ops())
    target.to_empty(device="cpu")
    target.load_state_dict(source.state_dict())
    target.init_buffers()
    row = torch.arange(50)[None]
    assert torch.equal(source(row), target(row))


@every_form
def test_every_parameter_has_exactly_one_role(form):
    model = fresh(FORMS[form])
    roles = model.parameter_roles()
    held = [id(p) for parameters in roles.values() for p in parameters]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert set(roles) <= set(ROLES)
    assert all(p.ndim == 2 for p in roles["matrix"])
    assert all(p.ndim == 1 for role in ("norm", "resid_lambda", "x0_lambda") for p in roles.get(role, []))


def test_roles_of_the_2026_form():
    model = fresh(FORMS["2026"])
    names = {id(p): name for name, p in model.named_parameters()}
    roles = {role: [names[id(p)] for p in parameters] for role, parameters in model.parameter_roles().items()}
    matrices = roles.pop("matrix")
    assert all(name.startswith("transformer.h.") for name in matrices)
    assert "transformer.h.0.attn.ve_gate.weight" in matrices
    assert roles == {
        "unembedding": ["lm_head.weight"],
        "embedding": ["transformer.wte.weight"],
        "value_embedding": ["value_embeds.0.weight", "value_embeds.2.weight"],
        "resid_lambda": ["resid_lambdas"],
        "x0_lambda": ["x0_lambdas"],
        "smear": ["smear_lambda", "backout_lambda", "smear_gate.weight"],
    }
