"""nanochat: the plain form (what transformers calls NanoChatForCausalLM) and the additions of 2026, each a switch.

The plain form, for tokens t:

    x = norm(wte[t])
    x = x + attention(norm(x));  x = x + mlp(norm(x))            for every layer
    logits = 15 · tanh(lm_head(norm(x)) / 15)

No biases and no norm gains anywhere; q and k are rotated, then normalised; the MLP is relu²; the head is not tied. The
additions mix information across time, layers and token identity at next to no cost:

    smear             x_t += λ · sigmoid(w · x_t[:24]) · x_{t−1}             on the embedding: a learned bigram
    residual_lambdas  x = r_i · x + s_i · x0                                 before layer i; x0 is the smeared embedding
    value_embeds      v += 3 · sigmoid(W x[:12]) · value_embeds_i[t]         in every other layer, the last one always
    window_pattern    layers marked S see a quarter of the context           the last layer sees all of it
    backout           x = x − λ · (x after layer L//2)                       before the last norm

Parameter names and their order are nanochat's own, so that its checkpoints load.
"""

import math
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor, nn

from model.config import ModelConfig, check_heads, require, require_positive
from model.language_model import Init, LanguageModel, constant, normal, padded_vocab, ramp, uniform
from model.layers.attention import Attention, Cache
from model.layers.linear import Embedding, Linear
from model.layers.mlp import ReluSquaredMLP
from model.layers.norm import RMSNorm
from model.ops import Ops

WINDOW_MULTIPLE = 128  # short windows are whole tiles of an attention kernel


@dataclass
class NanochatConfig(ModelConfig):
    """The dial is `depth`; width and heads follow from it. Defaults: the plain form."""

    depth: int = 12
    aspect_ratio: int = 64  # width per layer, before rounding up to whole heads
    head_dim: int = 128
    n_kv_head: Optional[int] = None  # None: as many as query heads
    rope_base: float = 10000.0
    qk_scale: float = 1.0
    softcap: float = 15.0
    norm_eps: float = 1e-6
    window_pattern: str = "L"  # S short, L long, repeated over the layers; the last layer is always long
    short_window_divisor: int = 4
    residual_lambdas: bool = False
    value_embeds: bool = False
    ve_gate_channels: int = 12
    ve_gate_range: float = 3.0
    smear: bool = False
    smear_channels: int = 24
    backout: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "depth", "aspect_ratio", "head_dim", "rope_base", "qk_scale", "softcap", "norm_eps")
        require_positive(self, "short_window_divisor", "ve_gate_channels", "ve_gate_range", "smear_channels")
        require(self.head_dim % 2 == 0, f"model.head_dim must be even for rotary positions, got {self.head_dim}")
        check_heads(self.n_embd, self.n_head, self.kv_heads)
        self.window_pattern = self.window_pattern.upper()
        require(
            len(self.window_pattern) > 0 and set(self.window_pattern) <= set("SL"),
            f"model.window_pattern must be made of S (short) and L (long), got {self.window_pattern!r}",
        )
        for name, switch in (("ve_gate_channels", self.value_embeds), ("smear_channels", self.smear)):
            value = getattr(self, name)
            fits = not switch or value <= self.n_embd
            require(fits, f"model.{name}={value} is more than the model's width of {self.n_embd}")

    @property
    def n_layer(self) -> int:
        return self.depth

    @property
    def n_embd(self) -> int:
        return self.head_dim * -(-self.depth * self.aspect_ratio // self.head_dim)

    @property
    def n_head(self) -> int:
        return self.n_embd // self.head_dim

    @property
    def kv_heads(self) -> int:
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def windows(self) -> list[int]:
        """How many earlier tokens each layer sees; sequence_len is all of them."""
        quarter = -(-self.sequence_len // self.short_window_divisor)
        short = WINDOW_MULTIPLE * -(-quarter // WINDOW_MULTIPLE)
        lengths = {"S": short, "L": self.sequence_len}
        pattern = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.n_layer)]
        return [lengths[letter] for letter in [*pattern[:-1], "L"]]

    def has_value_embed(self, layer: int) -> bool:
        """Every other layer, counted so that the last one is among them."""
        return self.value_embeds and layer % 2 == (self.n_layer - 1) % 2


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: NanochatConfig, layer: int, ops: Ops) -> None:
        super().__init__()
        window = config.windows[layer]
        self.norm = RMSNorm(ops, eps=config.norm_eps)
        self.attn = Attention(
            ops,
            layer=layer,
            n_embd=config.n_embd,
            n_head=config.n_head,
            n_kv_head=config.kv_heads,
            window=window if window < config.sequence_len else None,
            qk_eps=config.norm_eps,
            qk_scale=config.qk_scale,
            gate_channels=config.ve_gate_channels if config.has_value_embed(layer) else None,
            gate_range=config.ve_gate_range,
        )
        self.mlp = ReluSquaredMLP(ops, config.n_embd, 4 * config.n_embd)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        value_embed: Tensor | None = None,
        doc_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        x = x + self.attn(self.norm(x), cos, sin, value_embed=value_embed, doc_ids=doc_ids, cache=cache)
        return x + self.mlp(self.norm(x))


class Nanochat(LanguageModel):
    """Read `trunk` first: it is the architecture."""

    def __init__(self, config: NanochatConfig, vocab_size: int, ops: Ops, dtype: torch.dtype) -> None:
        super().__init__(config, vocab_size, ops, dtype)
        L, C, Vp = config.n_layer, config.n_embd, padded_vocab(vocab_size)
        self.softcap = config.softcap
        self.norm = RMSNorm(ops, eps=config.norm_eps)
        if config.residual_lambdas:
            self.resid_lambdas = nn.Parameter(torch.empty(L, dtype=torch.float32))
            self.x0_lambdas = nn.Parameter(torch.empty(L, dtype=torch.float32))
        if config.smear:
            self.smear_lambda = nn.Parameter(torch.empty(1, dtype=torch.float32))
        if config.backout:
            self.backout_lambda = nn.Parameter(torch.empty(1, dtype=torch.float32))
        blocks = nn.ModuleList(Block(config, layer, ops) for layer in range(L))
        self.transformer = nn.ModuleDict({"wte": Embedding(Vp, C), "h": blocks})
        self.lm_head = Linear(C, Vp)
        if config.smear:
            self.smear_gate = Linear(config.smear_channels, 1)
        kv_width = config.kv_heads * config.head_dim
        self.value_embeds = nn.ModuleDict(
            {str(layer): Embedding(Vp, kv_width) for layer in range(L) if config.has_value_embed(layer)}
        )
        self.add_rotary_buffers(config.head_dim, config.rope_base)

    def trunk(
        self,
        tokens: Tensor,
        *,
        doc_ids: Tensor | None = None,
        cache: Cache | None = None,
        new_tokens: Tensor | None = None,
    ) -> Tensor:
        x = self.norm(self.transformer.wte(tokens, self.dtype))  # (B, T, C)
        if self.config.smear:
            x = self.smear(x, doc_ids, cache, new_tokens)
        x0 = middle = x
        for layer, block in enumerate(self.transformer.h):
            if self.config.residual_lambdas:
                # Indexed to 0-d: a one-element fp32 tensor would promote a bf16 x to fp32.
                x = self.resid_lambdas[layer] * x + self.x0_lambdas[layer] * x0
            value_embed = self.value_embed(layer, tokens)
            x = block(x, self.cos, self.sin, value_embed=value_embed, doc_ids=doc_ids, cache=cache)
            if layer == self.config.n_layer // 2:
                middle = x
        if self.config.backout:
            x = x - self.backout_lambda[0] * middle
        return self.norm(x)

    def smear(self, x: Tensor, doc_ids: Tensor | None, cache: Cache | None, new_tokens: Tensor | None) -> Tensor:
        """x_t + gate(x_t) · x_{t−1}; the first token of a row or of a document has nothing before it."""
        if cache is None:
            previous = torch.zeros_like(x[:, :1])
        else:
            previous = cache.recall("embedding", like=x[:, :1])
        stream = torch.cat([previous, x], dim=1)  # (B, 1 + T, C): what came before, then the new embeddings
        if cache is not None:
            cache.remember("embedding", self.end_of_stream(stream, new_tokens))
        gate = self.smear_lambda[0] * torch.sigmoid(self.smear_gate(x[..., : self.config.smear_channels]))  # (B, T, 1)
        if doc_ids is not None:
            same = torch.cat([torch.zeros_like(doc_ids[:, :1], dtype=torch.bool), doc_ids[:, 1:] == doc_ids[:, :-1]], 1)
            gate = gate * same.unsqueeze(-1)
        return x + gate * stream[:, :-1]

    def end_of_stream(self, stream: Tensor, new_tokens: Tensor | None) -> Tensor:
        """The last real embedding of each row [B, 1, C]: the old one where a row brought no token."""
        if new_tokens is None:
            return stream[:, -1:]
        return stream[torch.arange(stream.shape[0], device=stream.device), new_tokens].unsqueeze(1)

    def value_embed(self, layer: int, tokens: Tensor) -> Tensor | None:
        """What layer `layer` adds to its values for each token [B, T, Hkv·D]; None: nothing."""
        if not self.config.has_value_embed(layer):
            return None
        return self.value_embeds[str(layer)](tokens, self.dtype)

    def initial_value(self, name: str) -> Init:
        bound = math.sqrt(3 / self.config.n_embd)  # uniform in ±bound has the std of N(0, 1/C), without its outliers
        match name.removesuffix(".weight").split("."):
            case ["transformer", "wte"]:
                return normal(0.8)
            case ["lm_head"]:
                return normal(0.001)
            case [*_, "c_q" | "c_k" | "c_v"] | ["value_embeds", _]:
                return uniform(-bound, bound)
            case [*_, "c_fc"]:
                return uniform(-0.4 * bound, 0.4 * bound)
            case [*_, "c_proj"]:  # every block starts as the identity
                return constant(0.0)
            case [*_, "ve_gate"] | ["smear_gate"]:
                return uniform(0.0, 0.02)
            case ["resid_lambdas"]:
                return ramp(1.15, 1.05)
            case ["x0_lambdas"]:
                return ramp(0.20, 0.05)
            case ["smear_lambda"]:
                return constant(0.0)
            case ["backout_lambda"]:
                return constant(0.2)
        raise AssertionError(f"no initial value for {name}")

    def parameter_role(self, name: str) -> str:
        match name.split("."):
            case ["transformer", "h", *_]:
                return "matrix"
            case ["transformer", "wte", _]:
                return "embedding"
            case ["lm_head", _]:
                return "unembedding"
            case ["value_embeds", *_]:
                return "value_embedding"
            case ["resid_lambdas"]:
                return "resid_lambda"
            case ["x0_lambdas"]:
                return "x0_lambda"
            case ["smear_gate", _] | ["smear_lambda"] | ["backout_lambda"]:
                return "smear"
        raise AssertionError(f"no role for {name}")

    @property
    def head_weight(self) -> nn.Parameter:
        return self.lm_head.weight

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        return self.config.n_layer, self.config.kv_heads, self.config.head_dim
