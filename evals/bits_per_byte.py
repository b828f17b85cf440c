"""Bits per byte: how many bits a model needs for each byte of text, comparable across tokenizers.

    bpb = Σ nats over targets that stand for text / (ln 2 · Σ bytes of those targets)

Special tokens stand for no bytes and are left out of both sums, ignored targets (negative) too. The figure compares
models on the same validation text only, and on rows that were cut the same way: a row that starts with its document is
easier to predict than one that starts in the middle.
"""

import math
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Batch(Protocol):
    """What `evaluate` needs of a batch."""

    tokens: Tensor
    targets: Tensor
    doc_ids: Tensor | None


@torch.no_grad()
def evaluate(model: Callable[..., Tensor], batches: Iterable[Batch], token_bytes: Tensor) -> dict[str, float]:
    """Loss and bits per byte over all batches, of all ranks when torch.distributed runs.

    model         model(tokens, targets, doc_ids=…, reduction="none") → nats of every target, [B, T] or [B·T]
    token_bytes   [V] integers on the model's device: how many bytes of text each token stands for, 0 for special ones
    → {"loss": mean nats of targets that are not ignored, "bpb": bits per byte}; inf where there was nothing to count
    """
    # nats of text, bytes of text, nats of all targets, number of targets; whole numbers in fp64 are exact to 2⁵³
    sums = torch.zeros(4, dtype=torch.float64, device=token_bytes.device)
    for batch in batches:
        nats = model(batch.tokens, batch.targets, doc_ids=batch.doc_ids, reduction="none")
        sums += count(nats.flatten(), batch.targets.flatten(), token_bytes)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
    text_nats, text_bytes, all_nats, targets = sums.tolist()  # the only time the device is waited for
    return {
        "loss": all_nats / targets if targets else math.inf,
        "bpb": text_nats / (math.log(2) * text_bytes) if text_bytes else math.inf,
    }


def count(nats: Tensor, targets: Tensor, token_bytes: Tensor) -> Tensor:
    """nats [N], targets [N] → the four sums [4] of one batch."""
    valid = targets >= 0
    lengths = torch.where(valid, token_bytes[targets.clamp(min=0)], 0)
    nats = nats.double()
    return torch.stack(
        [
            torch.where(lengths > 0, nats, 0.0).sum(),
            lengths.sum().double(),
            torch.where(valid, nats, 0.0).sum(),
            valid.sum().double(),
        ]
    )
