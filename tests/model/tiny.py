"""Tiny models of every form, small enough to compare position by position, and awake: no projection is zero."""

from functools import cache
from importlib import import_module

import torch

from model import build
from model.config import ModelConfig
from model.language_model import LanguageModel
from model.llama import LlamaConfig
from model.nanochat import NanochatConfig
from model.ops import OP_NAMES, KernelConfig, Ops, load_ops

VOCAB = 75  # padded to 128
NANOCHAT_2026 = {
    "rope_base": 1e5,
    "qk_scale": 1.2,
    "norm_eps": 1.1920929e-7,
    "window_pattern": "SSSL",
    "residual_lambdas": True,
    "value_embeds": True,
    "smear": True,
    "backout": True,
}


def nanochat(**changes) -> NanochatConfig:
    """Three layers, four heads of eight, and a context in which a short window (128) hides something."""
    return NanochatConfig(**{"depth": 3, "aspect_ratio": 10, "head_dim": 8, "sequence_len": 192, **changes})


def llama(**changes) -> LlamaConfig:
    return LlamaConfig(**{"n_layer": 2, "n_embd": 24, "n_head": 3, "sequence_len": 192, **changes})


FORMS: dict[str, ModelConfig] = {
    "plain": nanochat(),
    "plain with shared heads": nanochat(n_kv_head=2),
    "windows": nanochat(window_pattern="SL"),
    "residual lambdas": nanochat(residual_lambdas=True),
    "value embeddings": nanochat(value_embeds=True),
    "smear": nanochat(smear=True),
    "backout": nanochat(backout=True),
    "2026": nanochat(**NANOCHAT_2026),
    "2026 with shared heads": nanochat(n_kv_head=1, **NANOCHAT_2026),
    "llama": llama(),
    "llama tied with shared heads": llama(n_kv_head=1, tied=True),
    "nanofalcon": llama(activation="silu"),
}


def torch_ops(device: torch.device | str = "cpu") -> Ops:
    return load_ops(KernelConfig(), torch.device(device))


@cache
def triton_ops(device: torch.device | str = "cpu") -> Ops:
    """Every op that has a Triton kernel, and plain PyTorch for the rest."""
    kernels = set(import_module("kernels_triton").__all__) & set(OP_NAMES)
    return load_ops(KernelConfig(**dict.fromkeys(kernels, "triton")), torch.device(device))


def fresh(
    config: ModelConfig, dtype=torch.float32, *, vocab_size=VOCAB, device="cpu", seed=0, ops=None
) -> LanguageModel:
    """A model as training starts it."""
    model = build(config, vocab_size, ops or torch_ops(device), dtype)
    model.to_empty(device=device)
    model.init_weights(seed)
    return model


def awake(config: ModelConfig, dtype=torch.float32, *, seed=0, **options) -> LanguageModel:
    """A model in which every parameter matters: nothing is zero, nothing is symmetric."""
    model = fresh(config, dtype, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.device)
    return model


def tokens(*shape: int, device="cpu", seed=0) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed)).to(device)
