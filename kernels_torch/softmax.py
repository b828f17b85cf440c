"""Softmax: a row of numbers made positive, in their order, with the sum one."""

import torch
from torch import Tensor

from kernels_torch.checks import check_rows


def softmax(x: Tensor) -> Tensor:
    """exp(x − max) / Σ exp(x − max) over the last dimension, in fp32 (fp64 for fp64 input).

    x    [..., D], any strides; −inf gives 0, a row of nothing but −inf gives NaN
    → the same shape and dtype

    Raises ValueError for an x that is not floating point or has no last dimension.
    """
    check_rows("softmax", x)
    return torch.softmax(x, dim=-1)
