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
from model.layers.linear import Embedding, Linear, Master
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
    """Attention and MLP, each a branch off the residual stream: x + attention(norm(x)), then x + mlp(norm(x)).

    It is given the norm of the stream and leaves its last branch to be added: the sum and the norm after it are one
    pass over memory, and that norm belongs to whoever comes next.
    """

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
        normed: Tensor,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        tokens: Tensor,
        value_table: Tensor | None = None,
        doc_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """norm(x), x [B, T, C] → the stream after attention, and the MLP's branch that is still to be added to it."""
        branch = self.attn(normed, cos, sin, tokens=tokens, value_table=value_table, doc_ids=doc_ids, cache=cache)
        normed, x = self.norm.of_sum(x, branch)
        return x, self.mlp(normed)

    def decode(
        self,
        x: Tensor,
        normed: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        cache: Cache,
        *,
        tokens: Tensor,
        value_table: Tensor | None = None,
    ) -> Tensor:
        """The stream x [B, T, C] of few tokens a row, and its norm if that is known → the stream after this block."""
        x = self.attn.decode(x, normed, self.norm, cos, sin, cache, tokens=tokens, value_table=value_table)
        return self.mlp.decode(x, self.norm)


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
        self.transformer = nn.ModuleDict({"wte": Embedding(ops, Vp, C), "h": blocks})
        self.lm_head = Linear(C, Vp)
        if config.smear:
            self.smear_gate = Master(1, config.smear_channels)  # the op rounds it
        kv_width = config.kv_heads * config.head_dim
        self.value_embeds = nn.ModuleDict(
            {str(layer): Embedding(ops, Vp, kv_width) for layer in range(L) if config.has_value_embed(layer)}
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
        x0, middle, branch = x, None, None
        for block, value_table, scales in zip(
            self.transformer.h, self.value_tables(), self.residual_scales(), strict=True
        ):
            normed, x, x0 = self.join(x, branch, x0, scales)
            x, branch = block(
                normed, x, self.cos, self.sin, tokens=tokens, value_table=value_table, doc_ids=doc_ids, cache=cache
            )
            if self.config.backout and block is self.transformer.h[self.config.n_layer // 2]:
                middle, branch = x + branch, None
                x = middle
        return self.join(x, branch, middle, (None, -self.backout_lambda) if self.config.backout else None)[0]

    def step(self, tokens: Tensor, cache: Cache, new_tokens: Tensor | None) -> tuple[Tensor, dict[str, object]]:
        x = self.norm(self.transformer.wte(tokens, self.dtype))  # (B, T, C)
        if self.config.smear:
            x = self.smear(x, None, cache, new_tokens)
        x0, middle = x, None
        for block, value_table, scales in zip(
            self.transformer.h, self.value_tables(), self.residual_scales(), strict=True
        ):
            normed, x, x0 = (None, x, x0) if scales is None else self.join(x, None, x0, scales)
            x = block.decode(x, normed, self.cos, self.sin, cache, tokens=tokens, value_table=value_table)
            if self.config.backout and block is self.transformer.h[self.config.n_layer // 2]:
                middle = x
        if self.config.backout:
            return self.join(x, None, middle, (None, -self.backout_lambda))[0], {}
        return x, self.norm.options

    def join(
        self, x: Tensor, branch: Tensor | None, anchor: Tensor | None, scales: tuple[Tensor | None, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add a branch to the stream, mix in the anchor where there are scales, normalise → norm, stream, anchor."""
        if scales is not None:
            return self.ops.mix_rmsnorm(x, anchor, *scales, branch, eps=self.config.norm_eps)
        return *((self.norm(x), x) if branch is None else self.norm.of_sum(x, branch)), anchor

    def residual_scales(self) -> list[tuple[Tensor, Tensor] | None]:
        """For each layer what the stream and the first embedding are weighed with before it."""
        if not self.config.residual_lambdas:
            return [None] * self.config.n_layer
        return list(zip(self.resid_lambdas.unbind(), self.x0_lambdas.unbind(), strict=True))

    def value_tables(self) -> list[Tensor | None]:
        """For each layer the table of what its values get for each token [Vp, Hkv·D]."""
        tables = {int(layer): table.weight for layer, table in self.value_embeds.items()}
        return [tables.get(layer) for layer in range(self.config.n_layer)]

    def smear(self, x: Tensor, doc_ids: Tensor | None, cache: Cache | None, new_tokens: Tensor | None) -> Tensor:
        """x_t + gate(x_t) · x_{t−1}; what came before the first token is the cache's to know."""
        previous = None if cache is None else cache.recall("embedding", like=x[:, :1])
        y = self.ops.smear(x, self.smear_gate.weight, self.smear_lambda, previous=previous, doc_ids=doc_ids)
        if cache is not None:
            cache.remember("embedding", last_real(previous, x, new_tokens), after_each=x)
        return y

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
    def blocks_in_order(self) -> nn.ModuleList:
        return self.transformer.h

    @property
    def head_layer(self) -> Master:
        return self.lm_head

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        return self.config.n_layer, self.config.kv_heads, self.config.head_dim


def last_real(previous: Tensor, x: Tensor, new_tokens: Tensor | None) -> Tensor:
    """The last real embedding of each row [B, 1, C]: the old one where a row brought no token."""
    if new_tokens is None:
        return x[:, -1:]
    stream = torch.cat([previous, x], dim=1)  # (B, 1 + T, C)
    return stream[torch.arange(x.shape[0], device=x.device), new_tokens].unsqueeze(1)
