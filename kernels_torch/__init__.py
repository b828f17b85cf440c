"""The specification of every operation, in plain PyTorch; also what runs on a CPU and under `kernels=torch`.

A backend is a folder `kernels_<name>` that exports functions under these names with these signatures.
"""

from kernels_torch.attention import attention
from kernels_torch.attention_decode import attention_decode
from kernels_torch.linear_cross_entropy import linear_cross_entropy
from kernels_torch.mlp import relu2_mlp, swiglu_mlp
from kernels_torch.newton_schulz import newton_schulz
from kernels_torch.qk_norm_rope import qk_norm_rope
from kernels_torch.rmsnorm import rmsnorm

__all__ = [
    "attention",
    "attention_decode",
    "linear_cross_entropy",
    "newton_schulz",
    "qk_norm_rope",
    "relu2_mlp",
    "rmsnorm",
    "swiglu_mlp",
]
