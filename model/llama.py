"""The llama family: learned RMS-norm gains, rotary positions without QK norm, SwiGLU; NanoFalcon is a point of it.

    x = tok[t]
    x = x + attention(norm1(x));  x = x + mlp(norm2(x))          for every layer
    logits = head(norm(x))

NanoFalcon (conf/model/nanofalcon.yaml) has an ungated SiLU MLP instead, and here a rotation that is one: tables laid
out for halves, applied to halves.

Initial values: N(0, 0.02²) as in GPT-2, the projections back into the residual stream divided by √(2·layers) so that
its variance does not grow with depth; gains are 1.
"""

import math
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor, nn

from model.config import ModelConfig, check_heads, require, require_positive
from model.language_model import Init, LanguageModel, constant, normal, padded_vocab
from model.layers.attention import Attention, Cache
from model.layers.linear import Embedding, Linear, Master
from model.layers.mlp import SiluMLP, SwiGluMLP
from model.layers.norm import RMSNorm
from model.ops import Ops

ACTIVATIONS = ("swiglu", "silu")


@dataclass
class LlamaConfig(ModelConfig):
    """Every size by itself, as such models are published."""

    n_layer: int = 8
    n_embd: int = 512
    n_head: int = 8
    n_kv_head: Optional[int] = None  # None: as many as query heads
    hidden_dim: Optional[int] = None  # None: 4 · n_embd, or two thirds of it for the three matrices of SwiGLU
    activation: str = "swiglu"
    rope_base: float = 10000.0
    norm_eps: float = 1e-6
    tied: bool = False  # the head is the embedding table

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "n_layer", "n_embd", "n_head", "rope_base", "norm_eps")
        check_heads(self.n_embd, self.n_head, self.kv_heads)
        require(self.activation in ACTIVATIONS, f"model.activation must be swiglu or silu, got {self.activation!r}")
        require(self.mlp_dim > 0, f"model.hidden_dim must be positive, got {self.hidden_dim}")

    @property
    def kv_heads(self) -> int:
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def mlp_dim(self) -> int:
        if self.hidden_dim is not None:
            return self.hidden_dim
        if self.activation == "silu":
            return 4 * self.n_embd
        return 64 * math.ceil(8 * self.n_embd / 3 / 64)


class Block(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)); the MLP's branch is left to be added with the norm after it."""

    def __init__(self, config: LlamaConfig, layer: int, ops: Ops) -> None:
        super().__init__()
        n_embd, eps = config.n_embd, config.norm_eps
        self.norm1 = RMSNorm(ops, eps=eps, width=n_embd)
        self.attn = Attention(ops, layer=layer, n_embd=n_embd, n_head=config.n_head, n_kv_head=config.kv_heads)
        self.norm2 = RMSNorm(ops, eps=eps, width=n_embd)
        gated = config.activation == "swiglu"
        self.mlp = SwiGluMLP(ops, n_embd, config.mlp_dim) if gated else SiluMLP(ops, n_embd, config.mlp_dim)

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        *,
        doc_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The stream x [B, T, C] and the branch to be added to it (None: nothing yet) → both after this block."""
        normed, x = (self.norm1(x), x) if branch is None else self.norm1.of_sum(x, branch)
        normed, x = self.norm2.of_sum(x, self.attn(normed, cos, sin, doc_ids=doc_ids, cache=cache))
        return x, self.mlp(normed)

    def decode(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache) -> Tensor:
        """The stream x [B, T, C] of few tokens a row → the stream after this block."""
        return self.mlp.decode(self.attn.decode(x, None, self.norm1, cos, sin, cache), self.norm2)


class Llama(LanguageModel):
    """Embedding, blocks, norm, head."""

    def __init__(self, config: LlamaConfig, vocab_size: int, ops: Ops, dtype: torch.dtype) -> None:
        super().__init__(config, vocab_size, ops, dtype)
        Vp = padded_vocab(vocab_size)
        self.tok = Embedding(ops, Vp, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer, ops) for layer in range(config.n_layer))
        self.norm = RMSNorm(ops, eps=config.norm_eps, width=config.n_embd)
        self.head = None if config.tied else Linear(config.n_embd, Vp)
        self.add_rotary_buffers(config.head_dim, config.rope_base)

    def trunk(
        self,
        tokens: Tensor,
        *,
        doc_ids: Tensor | None = None,
        cache: Cache | None = None,
        new_tokens: Tensor | None = None,
    ) -> Tensor:
        x = self.tok(tokens, self.dtype)  # (B, T, C)
        branch = None
        for block in self.blocks:
            x, branch = block(x, branch, self.cos, self.sin, doc_ids=doc_ids, cache=cache)
        return self.norm.of_sum(x, branch)[0]

    def step(self, tokens: Tensor, cache: Cache, new_tokens: Tensor | None) -> tuple[Tensor, dict[str, object]]:
        x = self.tok(tokens, self.dtype)  # (B, T, C)
        for block in self.blocks:
            x = block.decode(x, self.cos, self.sin, cache)
        return x, self.norm.options

    def initial_value(self, name: str) -> Init:
        match name.removesuffix(".weight").split("."):
            case [*_, "norm" | "norm1" | "norm2"]:
                return constant(1.0)
            case [*_, "c_proj"]:
                return normal(0.02 / math.sqrt(2 * self.config.n_layer))
            case ["tok"] | ["head"] | [*_, "c_q" | "c_k" | "c_v" | "c_fc" | "c_gate" | "c_up"]:
                return normal(0.02)
        raise AssertionError(f"no initial value for {name}")

    def parameter_role(self, name: str) -> str:
        match name.removesuffix(".weight").split("."):
            case ["tok"]:
                return "embedding"
            case ["head"]:
                return "unembedding"
            case [*_, "norm" | "norm1" | "norm2"]:
                return "norm"
            case ["blocks", *_]:
                return "matrix"
        raise AssertionError(f"no role for {name}")

    @property
    def blocks_in_order(self) -> nn.ModuleList:
        return self.blocks

    @property
    def head_layer(self) -> Master:
        return self.tok if self.head is None else self.head

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        return self.config.n_layer, self.config.kv_heads, self.config.head_dim
