"""RMS norm as a module: with a learned gain (llama) or without any parameter (nanochat)."""

import torch
from torch import Tensor, nn

from model.ops import Ops


class RMSNorm(nn.Module):
    """x / rms(x), times a gain [width] when a width is given."""

    def __init__(self, ops: Ops, *, eps: float, width: int | None = None) -> None:
        super().__init__()
        self.ops = ops
        self.eps = eps
        self.weight = None if width is None else nn.Parameter(torch.empty(width, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rmsnorm(x, self.weight, eps=self.eps)

    @property
    def options(self) -> dict[str, object]:
        """What ops.linear_decode must know to normalise its input."""
        return dict(norm_weight=self.weight, eps=self.eps)

    def of_sum(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + branch, and the sum: where one branch of the residual stream ends and the next begins."""
        return self.ops.add_rmsnorm(x, branch, self.weight, eps=self.eps)
