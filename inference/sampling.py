"""From logits to the next token: the settings a user may turn, and one function that draws.

The steps come in one fixed order: repetition penalty → temperature → top-k → top-p → draw. Nothing in them waits for
the device, so a decoding step can be queued (or captured in a graph) whole.

Randomness has no state. Whatever a row draws follows from (seed, which sample it is, how many tokens it has drawn), by
hashing those numbers together with each token's id on the device. So a sample does not depend on the batch it happens
to be in, on the order of calls, or on the device, and nothing about it must be saved or copied. A generator per row
could do the first two, but lives on the CPU and would cost a copy to the device for every token.
"""

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from errors import KestrelError

PENALTY_WINDOW = 512  # how many of the newest tokens the repetition penalty looks at
MAX_TEMPERATURE = 10.0  # beyond this the answer is noise


@dataclass
class SamplingConfig:
    """How to continue a prompt."""

    max_new_tokens: Optional[int] = None  # None: as many as fit into the model's context, at most 512
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int = 50  # draw among the k likeliest tokens; 0: among all
    top_p: float = 1.0  # then among the likeliest that together reach this probability; 1: among all
    repetition_penalty: float = 1.0  # above 1, tokens seen lately become less likely; 1: off
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
        require(0 <= self.seed < 2**63, f"seed must be between 0 and 2**63 - 1, got {self.seed}")
        require(self.num_samples >= 1, f"num_samples must be at least 1, got {self.num_samples}")


def require(condition: bool, message: str) -> None:
    """Refuse a setting with one sentence unless `condition` holds."""
    if not condition:
        raise KestrelError(message)


def sample(
    logits: Tensor,
    config: SamplingConfig,
    *,
    rows: Tensor | None = None,
    step: int | Tensor = 0,
    history: Tensor | None = None,
) -> Tensor:
    """Choose the next token of every row.

    logits   [B, V]
    rows     [B] int64, which sample each row is; None: 0 … B−1
    step     how many tokens each row has drawn before: one number, or [B] int64
    history  [B, H] int64, the tokens that count as repeated (−1: no token); needed for the penalty only
    → [B] int64; with temperature 0 the first of the highest logits
    """
    scores = final_scores(logits, config, history)
    if config.temperature == 0:
        return scores.argmax(dim=-1)
    rows = torch.arange(len(scores), device=scores.device) if rows is None else rows
    return (scores + gumbel_noise(config.seed, rows, step, scores.shape[1])).argmax(dim=-1)


def final_scores(logits: Tensor, config: SamplingConfig, history: Tensor | None = None) -> Tensor:
    """Everything before the draw: fp32 scores [B, V] whose softmax is what is drawn from."""
    scores = logits.float()
    if config.repetition_penalty != 1.0 and history is not None:
        scores = penalise(scores, history, config.repetition_penalty)
    if config.temperature == 0:
        return scores
    # Relative to the highest, so that a tiny temperature gives −inf at worst, never inf − inf.
    scores = scores - scores.amax(dim=-1, keepdim=True)
    scores = scores / max(config.temperature, torch.finfo(torch.float32).tiny)
    n_left = scores.shape[1]
    if 0 < config.top_k < n_left:
        n_left = config.top_k
        scores = keep_top_k(scores, n_left)
    return keep_top_p(scores, config.top_p, n_left) if config.top_p < 1 else scores


def penalise(scores: Tensor, history: Tensor, penalty: float) -> Tensor:
    """Make tokens of `history` less likely, once each: divide a positive score, multiply a negative one.

    Dividing a negative score too, as the paper has it (https://arxiv.org/abs/1909.05858), would raise it.
    """
    V = scores.shape[1]
    seen = torch.zeros(len(scores), V + 1, dtype=torch.bool, device=scores.device)
    seen.scatter_(1, torch.where(history < 0, V, history), True)  # what is no token marks a column of its own
    return torch.where(seen[:, :V], torch.where(scores > 0, scores / penalty, scores * penalty), scores)


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """Leave exactly the k highest scores of each row, −inf elsewhere."""
    best = scores.topk(k, dim=-1).values
    return keep_best(scores, best[:, -1:], k)


def keep_top_p(scores: Tensor, p: float, n_left: int) -> Tensor:
    """Leave the fewest of the highest scores whose probability reaches p: a token stays if those above it miss p.

    n_left   at most how many scores of a row are not −inf
    """
    best = scores.topk(n_left, dim=-1).values
    mass = best.softmax(dim=-1).cumsum(dim=-1)
    n = 1 + (mass[:, :-1] < p).sum(dim=-1, keepdim=True)  # (B, 1)
    return keep_best(scores, best.gather(1, n - 1), n)


def keep_best(scores: Tensor, lowest: Tensor, n: int | Tensor) -> Tensor:
    """Leave the n highest scores of each row, of which the n-th is `lowest` [B, 1]; among equals the lowest index."""
    above, equal = scores > lowest, scores == lowest
    room = n - above.sum(dim=-1, keepdim=True)
    kept = above | (equal & (equal.cumsum(dim=-1) <= room))
    return scores.masked_fill(~kept, -torch.inf)


def gumbel_noise(seed: int, rows: Tensor, step: int | Tensor, n: int) -> Tensor:
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
