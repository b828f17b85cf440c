"""The feed-forward half of a block. relu² and SwiGLU are hot and go through ops; plain SiLU is there for NanoFalcon.

`forward` is for many tokens; `decode` is the same for one token a row, with the norm before it and the sum after it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers.linear import Linear, Operands, side_by_side, with_masters
from model.layers.norm import RMSNorm
from model.ops import Ops


class ReluSquaredMLP(nn.Module):
    """relu(x Wᵀ)² Vᵀ: nanochat's."""

    def __init__(self, ops: Ops, n_embd: int, hidden_dim: int) -> None:
        super().__init__()
        self.ops = ops
        self.c_fc = Linear(n_embd, hidden_dim)
        self.c_proj = Linear(hidden_dim, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        if self.c_fc.fp8 is not None and torch.is_grad_enabled():
            return self.c_fc.fp8.relu2_mlp(x, self.c_proj.fp8)
        weights, masters = with_masters(x.dtype, self.c_fc, self.c_proj)
        return self.ops.relu2_mlp(x, *weights, masters=masters)

    def decode(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """x + mlp(norm(x)) of few tokens, in two launches."""
        hidden = self.c_fc.decode(self.ops, x, **norm.options, activation="relu2")
        return self.c_proj.decode(self.ops, hidden, residual=x)


class SwiGluMLP(nn.Module):
    """(silu(x Gᵀ) · x Uᵀ) Vᵀ: llama's."""

    def __init__(self, ops: Ops, n_embd: int, hidden_dim: int) -> None:
        super().__init__()
        self.ops = ops
        self.c_gate = Linear(n_embd, hidden_dim)
        self.c_up = Linear(n_embd, hidden_dim)
        self.c_proj = Linear(hidden_dim, n_embd)
        self.gate_up: Operands | None = None

    def stack(self) -> None:
        """For `decode`: both weights that read the input as one."""
        self.gate_up = side_by_side(self.c_gate, self.c_up)

    def forward(self, x: Tensor) -> Tensor:
        weights, masters = with_masters(x.dtype, self.c_gate, self.c_up, self.c_proj)
        return self.ops.swiglu_mlp(x, *weights, masters=masters)

    def decode(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """x + mlp(norm(x)) of few tokens, in two launches."""
        hidden = self.ops.linear_decode(x, *self.gate_up, **norm.options, activation="swiglu")
        return self.c_proj.decode(self.ops, hidden, residual=x)


class SiluMLP(nn.Module):
    """silu(x Wᵀ) Vᵀ, ungated: NanoFalcon's."""

    def __init__(self, ops: Ops, n_embd: int, hidden_dim: int) -> None:
        super().__init__()
        self.ops = ops
        self.c_fc = Linear(n_embd, hidden_dim)
        self.c_proj = Linear(hidden_dim, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.silu(self.c_fc(x)))

    def decode(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """x + mlp(norm(x)) of few tokens, in two launches."""
        hidden = self.c_fc.decode(self.ops, x, **norm.options, activation="silu")
        return self.c_proj.decode(self.ops, hidden, residual=x)
