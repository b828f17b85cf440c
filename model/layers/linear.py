"""The matrix product every layer uses: an fp32 master weight, cast to whatever the activations are.

This replaces autocast. The optimizer always sees fp32; the product runs in the dtype of its input; nothing decides in
between. There are no biases anywhere in this project.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.ops import Ops


class Linear(nn.Module):
    """y = x Wᵀ, with W [n_out, n_in] cast to the dtype of x."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} → {self.weight.shape[0]}"


class Embedding(nn.Module):
    """Rows of an fp32 table, looked up exactly and then cast: a table in bf16 would lose its small updates."""

    def __init__(self, ops: Ops, n_rows: int, width: int) -> None:
        super().__init__()
        self.ops = ops
        self.weight = nn.Parameter(torch.empty(n_rows, width, dtype=torch.float32))

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        return self.ops.embedding(tokens, self.weight, dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]} rows of {self.weight.shape[1]}"
