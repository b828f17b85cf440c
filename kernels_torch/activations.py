"""Small functions of one tensor: GELU, softmax, and the k largest values of each row."""

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu(x: Tensor) -> Tensor:
    """x · Φ(x), Φ the distribution function of N(0, 1), exactly (by erf, not by its tanh approximation).

    x    [...], any strides
    → the same shape and dtype, computed in fp32 (fp64 for fp64 input)

    Raises ValueError for an x that is not floating point.
    Source: Hendrycks and Gimpel, https://arxiv.org/abs/1606.08415
    """
    check_float("gelu", x)
    return F.gelu(x)


def softmax(x: Tensor) -> Tensor:
    """exp(x − max) / Σ exp(x − max) over the last dimension, in fp32 (fp64 for fp64 input).

    x    [..., D], any strides; −inf gives 0, a row of nothing but −inf gives NaN
    → the same shape and dtype

    Raises ValueError for an x that is not floating point or has no last dimension.
    """
    check_rows("softmax", x)
    return torch.softmax(x, dim=-1)


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values of each row and where they stood, largest first; of equals the one with the lowest index.

    x    [..., D], any strides; NaN counts as larger than anything
    k    from 1 to D
    → values [..., k] in the dtype of x, with a gradient; indices [..., k] int32

    Raises ValueError for an x that is not floating point or has no last dimension, and for a k out of range.
    """
    check_rows("top_k", x)
    if not 0 < k <= x.shape[-1]:
        raise ValueError(f"top_k needs k between 1 and the row's {x.shape[-1]} values, got {k}")
    values, indices = torch.sort(x, dim=-1, descending=True, stable=True)
    return values[..., :k], indices[..., :k].int()


def check_float(op: str, x: Tensor) -> None:
    """Refuse integers."""
    if not x.is_floating_point():
        raise ValueError(f"{op} takes floating-point x, got {x.dtype}")


def check_rows(op: str, x: Tensor) -> None:
    """Refuse integers and what has no rows."""
    check_float(op, x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op} needs at least one value in the last dimension of x, got shape {tuple(x.shape)}")
