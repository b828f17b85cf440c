"""Refusals that many operations share. What an operation refuses, every backend refuses in the same words."""

import torch
from torch import Tensor


def check_devices(**tensors: Tensor | None) -> None:
    """Refuse tensors that do not all lie on the device of the first."""
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, *others = present
    device = present[first].device
    for name in others:
        if present[name].device != device:
            raise ValueError(f"{name} must be on {device} like {first}, got {present[name].device}")


def check_float(op: str, x: Tensor) -> None:
    """Refuse integers."""
    if not x.is_floating_point():
        raise ValueError(f"{op} takes floating-point x, got {x.dtype}")


def holds_integers(x: Tensor) -> bool:
    """Whether x counts or names things: neither fractions nor truth values."""
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def check_rows(op: str, x: Tensor) -> None:
    """Refuse integers and what has no rows."""
    check_float(op, x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op} needs at least one value in the last dimension of x, got shape {tuple(x.shape)}")
