"""What every model family's configuration has in common, and how a bad value is refused.

A family's dataclass lives in the family's file, beside the code that reads it. It inherits from `ModelConfig` and
checks itself in `__post_init__`: a model that cannot exist is refused in one sentence before anything is built.
"""

import math
from dataclasses import dataclass

from errors import KestrelError


def require(condition: bool, message: str) -> None:
    """Refuse a configuration with one sentence unless `condition` holds."""
    if not condition:
        raise KestrelError(message)


def require_positive(config: "ModelConfig", *names: str) -> None:
    """Refuse the first of the named fields that is not a positive number."""
    for name in names:
        value = getattr(config, name)
        require(0 < value < math.inf, f"model.{name} must be a positive number, got {value}")


# Beyond any model there is. A checkpoint may claim what it likes, and counting so many layers would take hours.
MOST = {
    "sequence_len": 2**24, "depth": 1000, "n_layer": 1000, "aspect_ratio": 2**16, "head_dim": 2**20, "n_embd": 2**20,
    "hidden_dim": 2**24,
}  # fmt: skip


@dataclass
class ModelConfig:
    """A language model over at most `sequence_len` tokens: its training rows and its decoding limit."""

    sequence_len: int = 2048

    def __post_init__(self) -> None:
        require_positive(self, "sequence_len")
        for name, value in vars(self).items():
            most = MOST.get(name)
            require(most is None or value is None or value <= most, f"model.{name} must be at most {most}, got {value}")


def check_heads(n_embd: int, n_head: int, n_kv_head: int) -> None:
    """Heads must tile the width, share key-value heads evenly, and be even wide for the two halves of the rotation."""
    require(n_embd % n_head == 0, f"model.n_embd must be a multiple of model.n_head, got {n_embd} and {n_head}")
    require(
        n_kv_head > 0 and n_head % n_kv_head == 0,
        f"model.n_kv_head must divide the number of heads ({n_head}), got {n_kv_head}",
    )
    head_dim = n_embd // n_head
    require(
        head_dim % 2 == 0, f"the head width must be even for rotary positions, got {n_embd} / {n_head} = {head_dim}"
    )
