"""What every family shares: the vocabulary's padding, the loss, decoding, and how parameters get their first values.

A family (nanochat.py, llama.py) writes its own `trunk`, tokens → hidden states, and three small tables: what each
parameter starts from, which role it has for the optimizer, and its rotary base. Everything here works on top of those.

Models are constructed on the meta device, where nothing has a value. `to_empty(device=...)` gives memory and
`init_weights(seed)` the values; after loading a checkpoint instead, `init_buffers()` fills what is not stored.
"""

import hashlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import KestrelError
from model.config import ModelConfig
from model.layers.attention import Cache
from model.layers.linear import Linear, Master
from model.layers.rope import rotary_tables
from model.ops import Ops, again_in_backward, recomputing

VOCAB_MULTIPLE = 64  # tensor cores want round matrix sizes

# The order in which the optimizer numbers its groups.
ROLES = ("unembedding", "embedding", "value_embedding", "resid_lambda", "x0_lambda", "smear", "matrix", "norm")

Init = Callable[[torch.Size, torch.Generator], Tensor]


def normal(std: float) -> Init:
    """Values from N(0, std²)."""
    return lambda shape, generator: torch.empty(shape, dtype=torch.float32).normal_(0, std, generator=generator)


def uniform(low: float, high: float) -> Init:
    """Values from U(low, high)."""
    return lambda shape, generator: torch.empty(shape, dtype=torch.float32).uniform_(low, high, generator=generator)


def constant(value: float) -> Init:
    """One value everywhere."""
    return lambda shape, generator: torch.full(shape, value, dtype=torch.float32)


def ramp(first: float, last: float) -> Init:
    """Evenly spaced values: one per layer, from the first to the last."""
    return lambda shape, generator: torch.linspace(first, last, shape[0], dtype=torch.float64).float()


def padded_vocab(vocab_size: int) -> int:
    """Rows of the embedding tables for `vocab_size` tokens."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class LanguageModel(nn.Module):
    """The base of all families. `softcap` bounds the logits to ±softcap; None: no bound."""

    softcap: float | None = None

    def __init__(self, config: ModelConfig, vocab_size: int, ops: Ops, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.vocab_size, self.ops, self.dtype = config, vocab_size, ops, dtype
        self.context_len = config.sequence_len
        self.is_stacked = self.has_codes = False

    # What a family says about itself.

    def trunk(
        self,
        tokens: Tensor,
        *,
        doc_ids: Tensor | None = None,
        cache: Cache | None = None,
        new_tokens: Tensor | None = None,
    ) -> Tensor:
        """tokens [B, T] → normalised hidden states [B, T, C] in the model's dtype."""
        raise NotImplementedError

    def step(self, tokens: Tensor, cache: Cache, new_tokens: Tensor | None) -> tuple[Tensor, dict[str, object]]:
        """The same for few tokens a row, by ops made for that; the weights must be stacked.

        → hidden states [B, T, C], and as options of ops.linear_decode the last norm, unless they are normalised
        """
        raise NotImplementedError

    def initial_value(self, name: str) -> Init:
        """How the parameter `name` begins. Must not know a default: a parameter without a rule is a defect."""
        raise NotImplementedError

    def parameter_role(self, name: str) -> str:
        """The role (one of ROLES) of the parameter `name`."""
        raise NotImplementedError

    @property
    def blocks_in_order(self) -> nn.ModuleList:
        """The layers."""
        raise NotImplementedError

    @property
    def head_layer(self) -> Master:
        """Whose weight turns hidden states into logits."""
        raise NotImplementedError

    @property
    def head_weight(self) -> nn.Parameter:
        """That matrix [Vp, C]."""
        return self.head_layer.weight

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """(layers, key-value heads, head width): what a key-value cache must hold per token."""
        raise NotImplementedError

    # Training.

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        token_weights: Tensor | None = None,
        doc_ids: Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """The loss on `targets`, or without targets the logits of every position.

        tokens         [B, T] int64
        targets        [B, T] int64, −1 is ignored
        token_weights  [B, T], a factor on each token's loss
        doc_ids        [B, T], tokens see only their own document
        reduction      "mean", "sum" or "none"
        → a scalar ([B, T] for "none"), or fp32 logits [B, T, vocab_size]
        """
        if tokens.shape[1] > self.context_len:
            raise KestrelError(
                f"a row of {tokens.shape[1]} tokens is longer than model.sequence_len={self.context_len}"
            )
        x = self.trunk(tokens, doc_ids=doc_ids)
        if targets is None:
            return self.logits(x)
        weight, master = self.head_layer.with_master(x.dtype)
        loss = self.ops.linear_cross_entropy(
            x.flatten(0, 1),
            weight,
            targets.flatten(),
            token_weights=None if token_weights is None else token_weights.flatten(),
            vocab_size=self.vocab_size,
            softcap=self.softcap,
            reduction=reduction,
            master=master,
        )
        return loss.view_as(targets) if reduction == "none" else loss

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states [..., C] → logits [..., vocab_size] in fp32 (fp64 for an fp64 model), padding left out."""
        weight = self.head_layer.weight_in(x.dtype)[: self.vocab_size]
        z = F.linear(x, weight).to(torch.promote_types(x.dtype, torch.float32))
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def recompute(self, names: list[str]) -> None:
        """Save memory: what is named is computed again in the backward pass instead of being kept. For training only.

        names   "block": whole blocks, of which the input is kept; or ops, of which all inputs are
        """
        ops = recomputing(self.ops, [name for name in names if name != "block"])
        for module in self.modules():
            if hasattr(module, "ops"):
                module.ops = ops
        if "block" in names:
            for block in self.blocks_in_order:
                block.forward = again_in_backward(block.forward)

    def keep_copies(self) -> dict[str, Tensor]:
        """Have a copy in the model's dtype of every matrix that products read; an fp32 model has none.

        → by name of parameter, for whoever changes the parameters: copies must be kept equal to them
        """
        if self.dtype == torch.float32:
            return {}
        masters = {
            f"{name}.weight": module
            for name, module in self.named_modules()
            if isinstance(module, Linear) or module is self.head_layer
        }
        for module in masters.values():
            module.keep_copy(self.dtype)
        return {name: module.copy for name, module in masters.items()}

    @torch.no_grad()
    def refresh_copies(self) -> None:
        """Bring the copies up to date after the parameters were loaded."""
        masters = [module for module in self.modules() if isinstance(module, Master) and module.copy is not None]
        for module in masters:
            module.copy.copy_(module.weight)

    # Decoding.

    def stack_weights(self) -> None:
        """From now on decode one token a row by `step`, and any number from weights in codes.

        For that, weights that read the same input lie side by side.

        The last thing to do with a model: its weights must be in its dtype and on their device.
        """
        for module in self.modules():
            if hasattr(module, "stack"):
                module.stack()
        self.is_stacked = True
        self.has_codes = any(isinstance(module, Master) and module.codes is not None for module in self.modules())

    @torch.no_grad()
    def decode(
        self, tokens: Tensor, cache: Cache, *, new_tokens: Tensor | list[int] | None = None, every: bool = False
    ) -> Tensor:
        """Continue every row of `cache` by `tokens` [B, T]: a prompt, a piece of one, or one token each.

        Rows may stand at different lengths. Rows that bring fewer than T tokens are padded on the right with any token
        id, and `new_tokens` [B] says how many of each row are real; a row may bring none, then its logits mean nothing.
        → logits [B, vocab_size] after each row's last real token; or [B, T, vocab_size] after `every` token
        """
        cache.reserve(tokens.shape[1])
        if new_tokens is not None:
            new_tokens = torch.as_tensor(new_tokens, device=tokens.device)
        T = tokens.shape[1]
        by_steps = self.is_stacked and (T == 1 or every or self.has_codes)
        if by_steps:
            x, norm = self.step(tokens, cache, new_tokens)
        else:
            x = self.trunk(tokens, cache=cache, new_tokens=new_tokens)
        cache.advance(T if new_tokens is None else new_tokens)
        if not every:
            x = (
                x[:, 0] if T == 1 else last_of_each_row(x, new_tokens)
            )  # of a row that brought no token anything will do
        return self.step_logits(x, norm) if by_steps else self.logits(x)

    def step_logits(self, x: Tensor, norm: dict[str, object]) -> Tensor:
        """Hidden states [..., C] as `step` leaves them → logits [..., vocab_size]."""
        weight, scales = self.head_layer.operands(x.dtype)
        weight, scales = weight[: self.vocab_size], None if scales is None else scales[: self.vocab_size]
        out_dtype = torch.promote_types(x.dtype, torch.float32)
        return self.ops.linear_decode(x, weight, scales, **norm, softcap=self.softcap, out_dtype=out_dtype)

    # Values and roles of parameters.

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Give every parameter and buffer its first value: the same numbers on every device.

        Each parameter draws from a CPU generator of its own, seeded by `seed` and its name, so a variant of the
        architecture starts from the same values wherever it has the same parameters.
        """
        for name, parameter in self.named_parameters():
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little"))
            parameter.copy_(self.initial_value(name)(parameter.shape, generator))
        self.init_buffers()

    def add_rotary_buffers(self, head_dim: int, base: float) -> None:
        """Register cos and sin [sequence_len, D/2]; they follow from the configuration and are not in checkpoints."""
        self.head_dim, self.rope_base = head_dim, base
        for name in ("cos", "sin"):
            table = torch.empty(self.context_len, head_dim // 2, dtype=torch.float32)
            self.register_buffer(name, table, persistent=False)

    @torch.no_grad()
    def init_buffers(self) -> None:
        """Fill the buffers that checkpoints do not hold."""
        cos, sin = rotary_tables(self.context_len, self.head_dim, self.rope_base)
        self.cos.copy_(cos)
        self.sin.copy_(sin)

    def parameter_roles(self) -> dict[str, list[nn.Parameter]]:
        """Every parameter under exactly one role; roles nobody has are left out."""
        roles: dict[str, list[nn.Parameter]] = {role: [] for role in ROLES}
        for name, parameter in self.named_parameters():
            roles[self.parameter_role(name)].append(parameter)
        return {role: parameters for role, parameters in roles.items() if parameters}


def last_of_each_row(x: Tensor, counts: Tensor | None) -> Tensor:
    """x [B, T, C] → [B, C]: the last position of each row that holds `counts` [B] real tokens (None: all of them)."""
    if counts is None:
        return x[:, -1]
    return x[torch.arange(x.shape[0], device=x.device), (counts - 1).clamp(min=0)]
