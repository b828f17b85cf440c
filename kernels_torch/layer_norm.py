"""Layer norm: every row minus its mean, divided by its standard deviation. GPT-2's and the char model's."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels_torch.checks import check_devices


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """y = (x − mean(x)) / sqrt(var(x) + eps) · w + b over the last dimension, in fp32 (fp64 for fp64 input).

    x             [..., D], any strides
    weight, bias  [D] or None, each; may have another dtype than x
    → [..., D] in the dtype of x, rounded once; var is the biased one, Σ (x − mean)² / D

    Raises ValueError for an x that is not floating point or has no last dimension, and for parameters of another shape.
    Source: Ba, Kiros and Hinton, Layer Normalization, https://arxiv.org/abs/1607.06450
    """
    check_layer_norm(x, weight, bias, eps)
    dtype = torch.promote_types(x.dtype, torch.float32)
    gain, shift = (None if p is None else p.to(dtype) for p in (weight, bias))
    return F.layer_norm(x.to(dtype), x.shape[-1:], gain, shift, eps).to(x.dtype)


def check_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    """Refuse what `layer_norm` cannot mean."""
    check_devices(x=x, weight=weight, bias=bias)
    if not x.is_floating_point():
        raise ValueError(f"layer_norm takes floating-point x, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"layer_norm needs at least one value in the last dimension of x, got shape {tuple(x.shape)}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and tuple(parameter.shape) != (x.shape[-1],):
            raise ValueError(f"layer_norm {name} must have shape ({x.shape[-1]},), got {tuple(parameter.shape)}")
    if not eps >= 0:
        raise ValueError(f"layer_norm eps must not be negative, got {eps}")
