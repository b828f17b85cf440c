"""Refusals that many operations share. What an operation refuses, every backend refuses in the same words."""

from torch import Tensor


def check_devices(**tensors: Tensor | None) -> None:
    """Refuse tensors that do not all lie on the device of the first."""
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, *others = present
    device = present[first].device
    for name in others:
        if present[name].device != device:
            raise ValueError(f"{name} must be on {device} like {first}, got {present[name].device}")
