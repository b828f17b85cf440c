"""From logits to the next token: the settings a user may turn, and one function that draws.

The steps come in one fixed order: penalties (repetition, then frequency and presence) → temperature → top-k → top-p →
Gumbel noise → argmax. Every row may have settings of its own; what a row draws does not depend on the settings of the
others. Nothing in the steps waits for the device, so a decoding step can be queued (or captured in a graph) whole.

All but the penalties and top-p is one op (kernels_torch/draw_tokens.py). Randomness has no state: whatever a row draws
follows from (seed, which sample it is, how many tokens it has drawn), by hashing those numbers together with each
token's id on the device. So a sample does not depend on the batch it happens to be in, on the order of calls, or on the
device, and nothing about it must be saved or copied. A generator per row could do the first two, but lives on the CPU
and would cost a copy to the device for every token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from errors import KestrelError
from model.ops import reference

PENALTY_WINDOW = 512  # how many of the newest tokens the penalties look at
MAX_SAMPLES = 4096  # of one prompt
MAX_TEMPERATURE = 10.0  # beyond this the answer is noise


@dataclass
class SamplingConfig:
    """How to continue a prompt."""

    max_new_tokens: Optional[int] = None  # None: as many as fit into the model's context, at most 512
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int = 50  # draw among the k likeliest tokens; 0: among all
    top_p: float = 1.0  # then among the likeliest that together reach this probability; 1: among all
    repetition_penalty: float = 1.0  # above 1, tokens seen lately become less likely; 1: off
    frequency_penalty: float = 0.0  # taken off a token's logit each time it was seen lately; 0: off
    presence_penalty: float = 0.0  # taken off once if it was seen lately at all; 0: off
    seed: int = 42
    num_samples: int = 1

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k", "seed", "num_samples"):
            value = getattr(self, name)
            whole = type(value) is int or (name == "max_new_tokens" and value is None)
            require(whole, f"{name} must be a whole number, got {value!r:.80}")
        for name in ("temperature", "top_p", "repetition_penalty", "frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            require(type(value) in (int, float), f"{name} must be a number, got {value!r:.80}")
        limit = self.max_new_tokens
        require(limit is None or limit >= 1, f"max_new_tokens must be at least 1, or null (what fits), got {limit}")
        require(
            0 <= self.temperature <= MAX_TEMPERATURE,
            f"temperature must be between 0 (always the likeliest token) and {MAX_TEMPERATURE:g}, "
            f"got {self.temperature}",
        )
        require(0 <= self.top_k < 2**31, f"top_k must be positive, or 0 (off), and below 2**31, got {self.top_k}")
        require(0 < self.top_p <= 1, f"top_p must be above 0 and at most 1 (off), got {self.top_p}")
        require(
            0.01 <= self.repetition_penalty <= 100,
            f"repetition_penalty must be between 0.01 and 100 (1: off), got {self.repetition_penalty}",
        )
        for name in ("frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            require(-100 <= value <= 100, f"{name} must be between -100 and 100 (0: off), got {value}")
        require(0 <= self.seed < 2**63, f"seed must be between 0 and 2**63 - 1, got {self.seed}")
        require(self.num_samples >= 1, f"num_samples must be at least 1, got {self.num_samples}")

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0


def require(condition: bool, message: str) -> None:
    """Refuse a setting with one sentence unless `condition` holds."""
    if not condition:
        raise KestrelError(message)


class Plan(NamedTuple):
    """Which steps some row of a batch needs, known on the host: what none needs is left out, and changes no bit."""

    draws: bool  # some temperature is above 0
    penalises: bool
    nucleus: bool  # some top_p is below 1
    n_best: int  # no top_k is above this power of two; −1: a top_p needs all scores in order; 0: nobody has a top_k

    @classmethod
    def of(cls, configs: list[SamplingConfig]) -> "Plan":
        drawing = [config for config in configs if config.temperature > 0]
        sorts_all = any(config.top_p < 1 and config.top_k == 0 for config in drawing)
        most = max((config.top_k for config in drawing), default=0)
        n_best = -1 if sorts_all else 1 << (most - 1).bit_length() if most else 0
        nucleus = any(config.top_p < 1 for config in drawing)
        return cls(bool(drawing), any(config.penalises for config in configs), nucleus, n_best)


SETTINGS = {  # what the device must know of a SamplingConfig
    "temperature": torch.float32,
    "top_k": torch.int64,
    "top_p": torch.float64,
    "repetition_penalty": torch.float32,
    "frequency_penalty": torch.float32,
    "presence_penalty": torch.float32,
    "seed": torch.int64,
}
Settings = dict[str, Tensor]  # the keys of SETTINGS, each [B]


def settings_of(config: SamplingConfig, n_rows: int, device: torch.device | str) -> Settings:
    """The same settings for every row."""
    return {
        name: torch.full((n_rows,), getattr(config, name), dtype=dtype, device=device)
        for name, dtype in SETTINGS.items()
    }


def sample(
    logits: Tensor,
    config: SamplingConfig | Settings,
    plan: Plan | None = None,
    *,
    rows: Tensor | None = None,
    step: int | Tensor = 0,
    history: Tensor | None = None,
    draw_tokens: Callable | None = None,
) -> Tensor:
    """Choose the next token of every row.

    logits       [B, V]
    config       one for all rows, or settings [B] with the plan that covers them
    rows         [B] int64, which sample of its request each row is; None: 0 … B−1
    step         how many tokens each row has drawn before: one number, or [B] int64
    history      [B, H] int64 in any order, the tokens that count as seen (−1: no token); needed for penalties only
    draw_tokens  the op; None: the reference
    → [B] int64; with temperature 0 the first of the highest logits
    """
    if isinstance(config, SamplingConfig):
        config, plan = settings_of(config, len(logits), logits.device), Plan.of([config])
    rows = torch.arange(len(logits), device=logits.device) if rows is None else rows
    step = step if isinstance(step, Tensor) else torch.full_like(rows, step)
    if plan.penalises and history is not None:
        logits = penalise(logits.float(), history, config)
    top_k = likely(logits, config, plan) if plan.nucleus else config["top_k"]
    most = logits.shape[1] if plan.n_best == -1 else plan.n_best
    draw_tokens = reference("draw_tokens") if draw_tokens is None else draw_tokens
    return draw_tokens(logits, config["temperature"], top_k, config["seed"], rows, step, draws=plan.draws, most=most)


def penalise(scores: Tensor, history: Tensor, settings: Settings) -> Tensor:
    """Make tokens of `history` less likely.

    repetition   once each: divide a positive score, multiply a negative one (dividing that too, as the paper has it,
                 https://arxiv.org/abs/1909.05858, would raise it)
    frequency    then take off this much for every time; presence: this much once
    """
    V = scores.shape[1]
    repetition, frequency, presence = (
        settings[f"{name}_penalty"][:, None] for name in ("repetition", "frequency", "presence")
    )
    counts = torch.zeros(len(scores), V + 1, dtype=torch.float32, device=scores.device)
    slots = torch.where(history < 0, V, history)  # what is no token counts for a column of its own
    counts = counts.scatter_add_(1, slots, torch.ones_like(slots, dtype=torch.float32))[:, :V]
    repeated = torch.where(scores > 0, scores / repetition, scores * repetition)
    return torch.where(counts > 0, repeated - frequency * counts - presence, scores)


def likely(logits: Tensor, settings: Settings, plan: Plan) -> Tensor:
    """How many of each row's highest logits [B] its top_k and top_p leave; 0: all.

    A token stays if those above it miss top_p, a share of what top_k left.
    """
    V = logits.shape[1]
    K = V if plan.n_best == -1 else min(plan.n_best, V)
    best, top_k, p = logits.float().topk(K, dim=-1).values, settings["top_k"], settings["top_p"]
    n = torch.where(top_k == 0, V, top_k.clamp(max=V))
    # Relative to the highest, so that a tiny temperature gives −inf at worst, never inf − inf.
    temperature = settings["temperature"][:, None]
    temperature = torch.where(temperature == 0, 1.0, temperature.clamp(min=torch.finfo(torch.float32).tiny))
    # In fp64: a sum of few or many zeros behind a row's own k changes nothing.
    mass = ((best - best[:, :1]) / temperature).double().exp()
    mass = mass.masked_fill(torch.arange(K, device=logits.device) >= n[:, None], 0.0).cumsum(dim=-1)
    reach = 1 + (mass[:, :-1] < p[:, None] * mass[:, -1:]).sum(dim=-1)
    n = torch.where(p < 1, torch.minimum(n, reach), n)
    return torch.where(n == V, 0, n)


def log_probabilities(logits: Tensor, ids: Tensor, n_top: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """What the model itself thinks of the tokens drawn, before penalties, temperature and the rest.

    → log p of ids [B], and the n_top likeliest tokens: log p [B, n_top] and ids [B, n_top]
    """
    log_p = logits.float().log_softmax(dim=-1)
    top = log_p.topk(min(n_top, logits.shape[1]), dim=-1)
    return log_p.gather(1, ids[:, None])[:, 0], top.values, top.indices


def recent_tokens(ids: list[int], stop_ids: set[int]) -> list[int]:
    """The newest PENALTY_WINDOW tokens, oldest first, for the penalties; −1 where there are none.

    Stop tokens do not count: a text must not become less likely to end because its prompt began with <|bos|>.
    """
    ids = [-1 if token in stop_ids else token for token in ids[-PENALTY_WINDOW:]]
    return [-1] * (PENALTY_WINDOW - len(ids)) + ids
