"""The matrix product every layer uses: an fp32 master weight, rounded to whatever the activations are.

This replaces autocast. The optimizer always sees fp32; the product runs in the dtype of its input; nothing decides in
between. Without more, a weight is cast wherever it is used. While a model is trained in bf16 each has a copy in that
dtype beside it (`LanguageModel.keep_copies`), which the optimizer writes together with the master: same numbers, no
cast. There are no biases anywhere in this project.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from model.ops import Ops


class _Copy(torch.autograd.Function):
    """A rounded copy in its master's place: what the copy's gradient is, is the master's."""

    @staticmethod
    def forward(ctx: FunctionCtx, master: Tensor, copy: Tensor) -> Tensor:
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: FunctionCtx, d: Tensor) -> tuple[Tensor, None]:
        return d, None  # autograd casts it to the master's dtype, as it does behind a cast


class Master(nn.Module):
    """A module with one fp32 weight, and perhaps a copy of it in the dtype that the model computes in."""

    def __init__(self, n_rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_rows, width, dtype=torch.float32))
        self.register_buffer("copy", None, persistent=False)  # follows from the weight: not in checkpoints

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`: the copy where there is one in it, else cast here and now."""
        if self.copy is None or self.copy.dtype != dtype:
            return self.weight.to(dtype)
        return _Copy.apply(self.weight, self.copy) if torch.is_grad_enabled() else self.copy

    def keep_copy(self, dtype: torch.dtype) -> None:
        """From now on have a copy; whoever changes the weight must change it, too."""
        self.copy = self.weight.detach().to(dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]} × {self.weight.shape[1]}"


class Linear(Master):
    """y = x Wᵀ, with W [n_out, n_in] in the dtype of x."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_out, n_in)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_in(x.dtype))


class Embedding(Master):
    """Rows of an fp32 table, looked up exactly and then cast: a table in bf16 would lose its small updates.

    Only a table that is the head as well has a copy, for that use.
    """

    def __init__(self, ops: Ops, n_rows: int, width: int) -> None:
        super().__init__(n_rows, width)
        self.ops = ops

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        return self.ops.embedding(tokens, self.weight, dtype)
