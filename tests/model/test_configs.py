"""Configurations: what cannot work is refused in a sentence, and every field that exists changes something."""

import dataclasses
import re

import pytest
import torch

from errors import KestrelError
from model.llama import LlamaConfig
from model.nanochat import NanochatConfig
from tests.model.tiny import NANOCHAT_2026, awake, llama, nanochat, tokens


@pytest.mark.parametrize(
    ("family", "fields", "sentence"),
    [
        (NanochatConfig, {"depth": -3}, "model.depth must be a positive number, got -3"),
        (NanochatConfig, {"depth": 0}, "model.depth must be a positive number, got 0"),
        (NanochatConfig, {"sequence_len": 0}, "model.sequence_len must be a positive number, got 0"),
        (NanochatConfig, {"head_dim": 15}, "model.head_dim must be even for rotary positions, got 15"),
        (NanochatConfig, {"head_dim": 0}, "model.head_dim must be a positive number, got 0"),
        (NanochatConfig, {"aspect_ratio": 0}, "model.aspect_ratio must be a positive number, got 0"),
        (NanochatConfig, {"n_kv_head": 4}, "model.n_kv_head must divide the number of heads (6), got 4"),
        (NanochatConfig, {"n_kv_head": 0}, "model.n_kv_head must divide the number of heads (6), got 0"),
        (NanochatConfig, {"n_kv_head": -1}, "model.n_kv_head must divide the number of heads (6), got -1"),
        (NanochatConfig, {"window_pattern": "SXL"}, "model.window_pattern must be made of S (short) and L (long)"),
        (NanochatConfig, {"window_pattern": ""}, "model.window_pattern must be made of S (short) and L (long), got ''"),
        (NanochatConfig, {"short_window_divisor": 0}, "model.short_window_divisor must be a positive number, got 0"),
        (NanochatConfig, {"softcap": 0.0}, "model.softcap must be a positive number, got 0.0"),
        (NanochatConfig, {"softcap": float("inf")}, "model.softcap must be a positive number, got inf"),
        (NanochatConfig, {"norm_eps": float("nan")}, "model.norm_eps must be a positive number, got nan"),
        (
            NanochatConfig,
            {"smear": True, "smear_channels": 999},
            "model.smear_channels=999 is more than the model's width of 768",
        ),
        (
            NanochatConfig,
            {"value_embeds": True, "ve_gate_channels": 999},
            "model.ve_gate_channels=999 is more than the model's width of 768",
        ),
        (LlamaConfig, {"n_head": 5}, "model.n_embd must be a multiple of model.n_head, got 512 and 5"),
        (LlamaConfig, {"n_head": 0}, "model.n_head must be a positive number, got 0"),
        (LlamaConfig, {"n_kv_head": 3}, "model.n_kv_head must divide the number of heads (8), got 3"),
        (LlamaConfig, {"n_embd": 24, "n_head": 8}, "the head width must be even for rotary positions, got 24 / 8 = 3"),
        (LlamaConfig, {"n_layer": 0}, "model.n_layer must be a positive number, got 0"),
        (LlamaConfig, {"hidden_dim": 0}, "model.hidden_dim must be positive, got 0"),
        (LlamaConfig, {"activation": "gelu"}, "model.activation must be swiglu or silu, got 'gelu'"),
    ],
)
def test_impossible_models_are_refused_in_a_sentence(family, fields, sentence):
    with pytest.raises(KestrelError, match=re.escape(sentence)):
        family(**fields)


NANOCHAT_CHANGES = {
    "sequence_len": 256,
    "depth": 4,
    "aspect_ratio": 16,
    "head_dim": 4,
    "n_kv_head": 2,
    "rope_base": 500.0,
    "qk_scale": 1.5,
    "softcap": 5.0,
    "norm_eps": 0.1,
    "window_pattern": "LLSL",
    "short_window_divisor": 1,
    "residual_lambdas": False,
    "value_embeds": False,
    "ve_gate_channels": 6,
    "ve_gate_range": 1.0,
    "smear": False,
    "smear_channels": 12,
    "backout": False,
}
LLAMA_CHANGES = {
    "sequence_len": 256,
    "n_layer": 3,
    "n_embd": 48,
    "n_head": 1,
    "n_kv_head": 1,
    "hidden_dim": 40,
    "activation": "silu",
    "rope_base": 500.0,
    "norm_eps": 0.1,
    "tied": True,
}


def fingerprint(config) -> tuple[int, torch.Tensor]:
    """The context limit and the logits far enough into a row that windows matter."""
    model = awake(config)
    with torch.no_grad():
        return model.context_len, model(tokens(1, 190))[0, -40:]


@pytest.mark.parametrize(
    ("make", "changes"),
    [(lambda **c: nanochat(**{**NANOCHAT_2026, **c}), NANOCHAT_CHANGES), (llama, LLAMA_CHANGES)],
    ids=["nanochat", "llama"],
)
def test_every_field_changes_something(make, changes):
    limit, logits = fingerprint(make())
    assert set(changes) == {field.name for field in dataclasses.fields(make())}
    for name, value in changes.items():
        changed_limit, changed = fingerprint(make(**{name: value}))
        assert changed_limit != limit or (changed - logits).abs().max() > 1e-3, name
