"""GELU: x where it is large, nothing where it is small, and in between as much of it as a normal draw lies below it."""

import torch.nn.functional as F
from torch import Tensor

from kernels_torch.checks import check_float


def gelu(x: Tensor) -> Tensor:
    """x · Φ(x), Φ the distribution function of N(0, 1), exactly (by erf, not by its tanh approximation).

    x    [...], any strides
    → the same shape and dtype, computed in fp32 (fp64 for fp64 input)

    Raises ValueError for an x that is not floating point.
    Source: Hendrycks and Gimpel, https://arxiv.org/abs/1606.08415
    """
    check_float("gelu", x)
    return F.gelu(x)
