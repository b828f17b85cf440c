"""Refusals that many operations share. What an operation refuses, every backend refuses in the same words."""

import torch
from torch import Tensor

LENGTHS = (torch.int32, torch.int64)


def check_given(**tensors: Tensor) -> None:
    """Refuse what is no tensor, and tensors that do not all lie on the device of the first."""
    first = device = None
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, got {tensor!r:.80}")
        if device is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            raise ValueError(f"{name} must be on {device} like {first}, got {tensor.device}")


def check_devices(**tensors: Tensor | None) -> None:
    """As check_given, of tensors that may be left out."""
    check_given(**{name: tensor for name, tensor in tensors.items() if tensor is not None})


def check_lengths(lengths: Tensor, q: Tensor) -> None:
    """Refuse what does not say how many tokens each row of q holds. Narrower integers could not count one more."""
    if lengths.shape != q.shape[:1] or lengths.dtype not in LENGTHS:
        wanted, got = tuple(q.shape[:1]), tuple(lengths.shape)
        raise ValueError(f"lengths must be an int32 or int64 tensor {wanted}, got {lengths.dtype} {got}")


def check_block_table(block_table: Tensor, pages: Tensor, B: int) -> None:
    """Refuse what does not name the pages of B rows."""
    if block_table.dim() != 2 or block_table.shape[0] != B or not holds_integers(block_table):
        raise ValueError(
            f"block_table must be an integer tensor [{B}, n], got {block_table.dtype} {tuple(block_table.shape)}"
        )
    if len(pages) == 0 and block_table.numel() > 0:
        raise ValueError(
            f"block_table {tuple(block_table.shape)} names pages, but there are none: {tuple(pages.shape)}"
        )


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
