"""From logits to the next token: the settings a user may turn, and one function that draws.

The steps come in one fixed order: penalties (repetition, then frequency and presence) → temperature → top-k → top-p →
Gumbel noise → argmax. Every row may have settings of its own; what a row draws does not depend on the settings of the
others. Nothing in the steps waits for the device, so a decoding step can be queued (or captured in a graph) whole.

Randomness has no state. Whatever a row draws follows from (seed, which sample it is, how many tokens it has drawn), by
hashing those numbers together with each token's id on the device. So a sample does not depend on the batch it happens
to be in, on the order of calls, or on the device, and nothing about it must be saved or copied. A generator per row
could do the first two, but lives on the CPU and would cost a copy to the device for every token.
"""

from dataclasses import dataclass
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from errors import KestrelError

PENALTY_WINDOW = 512  # how many of the newest tokens the penalties look at
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
        limit = self.max_new_tokens
        require(limit is None or limit >= 1, f"max_new_tokens must be at least 1, or null (what fits), got {limit}")
        require(
            0 <= self.temperature <= MAX_TEMPERATURE,
            f"temperature must be between 0 (always the likeliest token) and {MAX_TEMPERATURE:g}, "
            f"got {self.temperature}",
        )
        require(self.top_k >= 0, f"top_k must be positive, or 0 (off), got {self.top_k}")
        require(0 < self.top_p <= 1, f"top_p must be above 0 and at most 1 (off), got {self.top_p}")
        require(
            0 < self.repetition_penalty < float("inf"),
            f"repetition_penalty must be a positive number (1: off), got {self.repetition_penalty}",
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
    n_best: int  # how many of the highest scores must be known in order; −1: all; 0: none

    @classmethod
    def of(cls, configs: list[SamplingConfig]) -> "Plan":
        drawing = [config for config in configs if config.temperature > 0]
        sorts_all = any(config.top_p < 1 and config.top_k == 0 for config in drawing)
        n_best = -1 if sorts_all else max((config.top_k for config in drawing), default=0)
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
) -> Tensor:
    """Choose the next token of every row.

    logits   [B, V]
    config   one for all rows, or settings [B] with the plan that covers them
    rows     [B] int64, which sample of its request each row is; None: 0 … B−1
    step     how many tokens each row has drawn before: one number, or [B] int64
    history  [B, H] int64 in any order, the tokens that count as seen (−1: no token); needed for penalties only
    → [B] int64; with temperature 0 the first of the highest logits
    """
    if isinstance(config, SamplingConfig):
        config, plan = settings_of(config, len(logits), logits.device), Plan.of([config])
    scores = final_scores(logits, config, history, plan)
    if not plan.draws:
        return scores.argmax(dim=-1)
    rows = torch.arange(len(scores), device=scores.device) if rows is None else rows
    noise = gumbel_noise(config["seed"], rows, step, scores.shape[1])
    return (scores + noise.masked_fill(config["temperature"][:, None] == 0, 0.0)).argmax(dim=-1)


def final_scores(
    logits: Tensor, config: SamplingConfig | Settings, history: Tensor | None = None, plan: Plan | None = None
) -> Tensor:
    """Everything before the draw: fp32 scores [B, V] whose softmax is what is drawn from (arguments as in `sample`)."""
    if isinstance(config, SamplingConfig):
        config, plan = settings_of(config, len(logits), logits.device), Plan.of([config])
    scores = logits.float()
    if plan.penalises and history is not None:
        scores = penalise(scores, history, config)
    if not plan.draws:
        return scores
    # Relative to the highest, so that a tiny temperature gives −inf at worst, never inf − inf. The argmax of a row with
    # temperature 0 survives all that follows.
    temperature = config["temperature"][:, None]
    temperature = torch.where(temperature == 0, 1.0, temperature.clamp(min=torch.finfo(torch.float32).tiny))
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / temperature
    return scores if plan.n_best == 0 else keep_likely(scores, config["top_k"], config["top_p"], plan)


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


def keep_likely(scores: Tensor, top_k: Tensor, top_p: Tensor, plan: Plan) -> Tensor:
    """Leave the top_k highest scores of each row, and of those the fewest whose probability reaches top_p.

    A token stays if those above it miss top_p. −inf elsewhere; top_k 0 and top_p 1 leave everything.
    """
    V = scores.shape[1]
    K = V if plan.n_best == -1 else min(plan.n_best, V)
    best = scores.topk(K, dim=-1).values
    n = torch.where(top_k == 0, V, top_k.clamp(max=V))[:, None]  # how many to keep (B, 1)
    if plan.nucleus:
        # In fp64, relative to the highest: a sum of few or many zeros behind a row's own k changes nothing.
        mass = best.double().exp().masked_fill(torch.arange(K, device=scores.device) >= n, 0.0).cumsum(dim=-1)
        p = top_p[:, None]
        reach = 1 + (mass[:, :-1] < p * mass[:, -1:]).sum(dim=-1, keepdim=True)
        n = torch.where(p < 1, torch.minimum(n, reach), n)
    lowest = best.gather(1, n.clamp(max=K) - 1).masked_fill(n > K, -torch.inf)
    return keep_best(scores, lowest, n)


def keep_best(scores: Tensor, lowest: Tensor, n: Tensor) -> Tensor:
    """Leave the n [B, 1] highest scores of each row, the n-th being `lowest` [B, 1]; among equals the lowest index."""
    above, equal = scores > lowest, scores == lowest
    room = n - above.sum(dim=-1, keepdim=True)
    kept = above | (equal & (equal.cumsum(dim=-1) <= room))
    return scores.masked_fill(~kept, -torch.inf)


def gumbel_noise(seed: int | Tensor, rows: Tensor, step: int | Tensor, n: int) -> Tensor:
    """Noise [B, n] that makes an argmax a draw: argmax(log p + noise) is distributed as p.

    Preferred to inverting the cumulative distribution: no sum over the vocabulary whose rounding could depend on how a
    device splits it, and what top-k or top-p removed (−inf) can never be drawn.
    """
    keys = mix(mix(rows * signed(0x9E3779B97F4A7C15) + seed) + step)
    tokens = mix(torch.arange(1, n + 1, device=rows.device))
    return gumbel(shifted(mix(keys[:, None] + tokens), 32))


def gumbel(bits: Tensor) -> Tensor:
    """32 random bits → Gumbel noise, finite for all of them."""
    # In (0, 1): half a step up from 0, and the largest float below 1 instead of 1.
    uniform = ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))


def mix(x: Tensor) -> Tensor:
    """A 64-bit hash of each int64: the finaliser of SplitMix64, in arithmetic that wraps around."""
    x = (x ^ shifted(x, 30)) * signed(0xBF58476D1CE4E5B9)
    x = (x ^ shifted(x, 27)) * signed(0x94D049BB133111EB)
    return x ^ shifted(x, 31)


def shifted(x: Tensor, n: int) -> Tensor:
    """x >> n as if x had no sign."""
    return (x >> n) & ((1 << (64 - n)) - 1)


def signed(x: int) -> int:
    """The int64 with the bits of an unsigned 64-bit x."""
    return x - (1 << 64) if x >= 1 << 63 else x


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
