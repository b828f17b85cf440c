"""The k largest values of each row: what sampling and routing choose from."""

import torch
from torch import Tensor

from kernels_torch.checks import check_rows


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values of each row and where they stood, largest first; of equals the one with the lowest index.

    x    [..., D], any strides; NaN counts as larger than anything
    k    from 1 to D
    → values [..., k] in the dtype of x, with a gradient; indices [..., k] int32

    Raises ValueError for an x that is not floating point or has no last dimension, and for a k out of range.
    """
    check_top_k(x, k)
    values, indices = torch.sort(x, dim=-1, descending=True, stable=True)
    return values[..., :k], indices[..., :k].int()


def check_top_k(x: Tensor, k: int) -> None:
    """Refuse what `top_k` cannot mean."""
    check_rows("top_k", x)
    if not 0 < k <= x.shape[-1]:
        raise ValueError(f"top_k needs k between 1 and the row's {x.shape[-1]} values, got {k}")
