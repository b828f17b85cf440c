"""RMS norm: every row divided by its root mean square. LayerNorm without the mean and without the bias."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels_torch.checks import check_devices


def rmsnorm(x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """y = x · r · w with r = 1 / sqrt(mean(x²) + eps) over the last dimension, computed in fp32 (fp64 for fp64 input).

    x         [..., D], any strides
    weight    [D] or None; may have another dtype than x (an fp32 gain beside bf16 activations)
    eps       keeps a row of zeros at zero
    → [..., D] in the dtype of x, rounded once

    Raises ValueError for an x that is not floating point or has no last dimension, and for a weight of another shape.
    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, https://arxiv.org/abs/1910.07467
    """
    check_rmsnorm(x, weight, eps)
    dtype = x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)
    gain = None if weight is None else weight.to(dtype)
    return F.rms_norm(x.to(dtype), x.shape[-1:], gain, eps).to(x.dtype)


def check_rmsnorm(x: Tensor, weight: Tensor | None, eps: float) -> None:
    """Refuse what `rmsnorm` cannot mean."""
    check_devices(x=x, weight=weight)
    if not x.is_floating_point():
        raise ValueError(f"rmsnorm takes floating-point x, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"rmsnorm needs at least one value in the last dimension of x, got shape {tuple(x.shape)}")
    if weight is not None and tuple(weight.shape) != (x.shape[-1],):
        raise ValueError(f"rmsnorm weight must have shape ({x.shape[-1]},), got {tuple(weight.shape)}")
    if not eps >= 0:
        raise ValueError(f"rmsnorm eps must not be negative, got {eps}")
