"""The feed-forward half of a block. relu² and SwiGLU are hot and go through ops; plain SiLU is there for NanoFalcon."""

import torch.nn.functional as F
from torch import Tensor, nn

from model.layers.linear import Linear
from model.ops import Ops


class ReluSquaredMLP(nn.Module):
    """relu(x Wᵀ)² Vᵀ: nanochat's."""

    def __init__(self, ops: Ops, n_embd: int, hidden_dim: int) -> None:
        super().__init__()
        self.ops = ops
        self.c_fc = Linear(n_embd, hidden_dim)
        self.c_proj = Linear(hidden_dim, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.relu2_mlp(x, self.c_fc.weight_in(x.dtype), self.c_proj.weight_in(x.dtype))


class SwiGluMLP(nn.Module):
    """(silu(x Gᵀ) · x Uᵀ) Vᵀ: llama's."""

    def __init__(self, ops: Ops, n_embd: int, hidden_dim: int) -> None:
        super().__init__()
        self.ops = ops
        self.c_gate = Linear(n_embd, hidden_dim)
        self.c_up = Linear(n_embd, hidden_dim)
        self.c_proj = Linear(hidden_dim, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (layer.weight_in(x.dtype) for layer in (self.c_gate, self.c_up, self.c_proj))
        return self.ops.swiglu_mlp(x, gate, up, down)


class SiluMLP(nn.Module):
    """silu(x Wᵀ) Vᵀ, ungated: NanoFalcon's."""

    def __init__(self, n_embd: int, hidden_dim: int) -> None:
        super().__init__()
        self.c_fc = Linear(n_embd, hidden_dim)
        self.c_proj = Linear(hidden_dim, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.silu(self.c_fc(x)))
