"""The residual stream and the norm that follows it, together: the one ends a branch, the other begins the next.

Two forms. `add_rmsnorm` is every pre-norm block's: add the branch, normalise the sum. `mix_rmsnorm` is nanochat's of
2026, which also weighs the stream against a fixed anchor (its first embedding; its middle layer at the end).
"""

import torch
from torch import Tensor

from kernels_torch.checks import check_devices
from kernels_torch.rmsnorm import check_rmsnorm, rmsnorm


def add_rmsnorm(x: Tensor, branch: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """s = x + branch;  y = rmsnorm(s) · w

    x, branch  [..., D], one shape and dtype, any strides
    weight     [D] or None
    → y, s, both [..., D] in the dtype of x; s is rounded to it before the norm, so that y is the norm of what is kept

    Raises ValueError for shapes and dtypes that do not fit together.
    Source: rmsnorm, and the pre-norm residual of https://arxiv.org/abs/2002.04745.
    """
    check_add_rmsnorm(x, branch, weight, eps)
    s = x + branch
    return rmsnorm(s, weight, eps=eps), s


def mix_rmsnorm(
    x: Tensor,
    anchor: Tensor,
    x_scale: Tensor | None,
    anchor_scale: Tensor,
    branch: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """s = x_scale · (x + branch) + anchor_scale · anchor;  y = rmsnorm(s)

    x, anchor, branch      [..., D], one shape and dtype; branch None: nothing is added. x + branch is rounded to it
    x_scale, anchor_scale  tensors of one value on the device (fp32 parameters beside bf16 activations); x_scale None: 1
    → y, s, both [..., D] in the dtype of x, computed in fp32 (fp64 for fp64 input) and rounded once; and the anchor,
      for the next mix of a chain: its gradient comes back along the chain, and each link can add its share

    Raises ValueError for shapes and dtypes that do not fit together.
    Source: the residual lambdas and the backout of nanochat, https://github.com/karpathy/nanochat.
    """
    check_mix_rmsnorm(x, anchor, x_scale, anchor_scale, branch, eps)
    dtype = torch.promote_types(x.dtype, torch.float32)
    stream = (x if branch is None else x + branch).to(dtype)
    if x_scale is not None:
        stream = x_scale.reshape(()).to(dtype) * stream
    s = (stream + anchor_scale.reshape(()).to(dtype) * anchor.to(dtype)).to(x.dtype)
    return rmsnorm(s, eps=eps), s, anchor


def check_add_rmsnorm(x: Tensor, branch: Tensor, weight: Tensor | None, eps: float) -> None:
    """Refuse what `add_rmsnorm` cannot mean."""
    check_rmsnorm(x, weight, eps)
    check_same("branch", branch, x)


def check_mix_rmsnorm(
    x: Tensor, anchor: Tensor, x_scale: Tensor | None, anchor_scale: Tensor, branch: Tensor | None, eps: float
) -> None:
    """Refuse what `mix_rmsnorm` cannot mean."""
    check_rmsnorm(x, None, eps)
    check_devices(x=x, x_scale=x_scale, anchor_scale=anchor_scale)
    check_same("anchor", anchor, x)
    if branch is not None:
        check_same("branch", branch, x)
    for name, scale in (("x_scale", x_scale), ("anchor_scale", anchor_scale)):
        if scale is not None and scale.numel() != 1:
            raise ValueError(f"{name} must hold one value, got shape {tuple(scale.shape)}")


def check_same(name: str, other: Tensor, x: Tensor) -> None:
    """Refuse an operand that does not match x element by element."""
    check_devices(**{"x": x, name: other})
    if other.shape != x.shape or other.dtype != x.dtype:
        raise ValueError(f"{name} must be {x.dtype} {tuple(x.shape)} like x, got {other.dtype} {tuple(other.shape)}")
