"""The draw of the next token of every row: temperature, top-k and Gumbel noise whose randomness has no state.

Whatever a row draws follows from (seed, which sample it is, how many tokens it has drawn), by hashing those numbers
together with each token's id. So a draw depends neither on the batch nor on the device, and nothing of it is kept.
"""

import torch
from torch import Tensor

from kernels_torch.checks import check_devices, check_rows, holds_integers


def draw_tokens(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    seed: Tensor,
    sample: Tensor,
    step: Tensor,
    *,
    draws: bool = True,
    most: int = 0,
) -> Tensor:
    """argmax of logits + temperature · noise over each row's top_k highest logits, of equals the lowest index.

    An argmax over log p + Gumbel noise is a draw from p, so this one is from the softmax of logits / temperature. At
    temperature 0 it is the first of the highest logits. All in fp32.

    logits       [B, V]; which token a row with NaN draws is not said
    temperature  [B] fp32
    top_k        [B] integers; 0: among all
    seed, sample, step   [B] integers, which together name the draw
    draws        False: no temperature is above 0, and nothing but the logits is read
    most         the largest of top_k
    → [B] int64; not differentiated

    Raises ValueError for shapes and dtypes that do not fit together and for a most that is negative.
    Source: https://arxiv.org/abs/1611.01144 for the noise, SplitMix64 for the hash.
    """
    check_draw_tokens(logits, temperature, top_k, seed, sample, step, most)
    with torch.no_grad():
        scores = logits.float()
        if not draws:
            return scores.argmax(dim=-1)
        if most:
            scores = keep_best(scores, top_k, most)
        noise = gumbel_noise(seed, sample, step, scores.shape[1])
        return (scores + temperature[:, None] * noise).argmax(dim=-1)


def keep_best(scores: Tensor, top_k: Tensor, most: int) -> Tensor:
    """Leave the top_k [B] highest scores of each row (0: all), of equals those with the lowest index; else −inf."""
    V = scores.shape[1]
    K = min(most, V)
    n = torch.where(top_k == 0, V, top_k.clamp(max=V))[:, None]  # how many to keep (B, 1)
    best = scores.topk(K, dim=-1).values
    lowest = best.gather(1, n.clamp(max=K) - 1).masked_fill(n > K, -torch.inf)
    above, equal = scores > lowest, scores == lowest
    room = n - above.sum(dim=-1, keepdim=True)
    kept = above | (equal & (equal.cumsum(dim=-1) <= room))
    return scores.masked_fill(~kept, -torch.inf)


def gumbel_noise(seed: int | Tensor, sample: Tensor, step: int | Tensor, n: int) -> Tensor:
    """Noise [B, n] that makes an argmax a draw: argmax(log p + noise) is distributed as p.

    Preferred to inverting the cumulative distribution: no sum over the vocabulary whose rounding could depend on how a
    device splits it, and what top-k or top-p removed (−inf) can never be drawn.
    """
    keys = mix(mix(sample.long() * signed(0x9E3779B97F4A7C15) + seed) + step)
    tokens = mix(torch.arange(1, n + 1, device=sample.device))
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


def check_draw_tokens(
    logits: Tensor, temperature: Tensor, top_k: Tensor, seed: Tensor, sample: Tensor, step: Tensor, most: int
) -> None:
    """Refuse what `draw_tokens` cannot mean."""
    check_rows("draw_tokens", logits)
    if logits.dim() != 2:
        raise ValueError(f"logits must be [B, V], got {tuple(logits.shape)}")
    B = logits.shape[0]
    of_rows = dict(temperature=temperature, top_k=top_k, seed=seed, sample=sample, step=step)
    check_devices(logits=logits, **of_rows)
    for name, value in of_rows.items():
        fits = value.is_floating_point() if name == "temperature" else holds_integers(value)
        if tuple(value.shape) != (B,) or not fits:
            kind = "floating-point" if name == "temperature" else "integer"
            raise ValueError(f"{name} must be a {kind} tensor [{B}], got {value.dtype} {tuple(value.shape)}")
    if most < 0:
        raise ValueError(f"draw_tokens most must not be negative, got {most}")
