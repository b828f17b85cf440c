"""The specification of every operation, in plain PyTorch; also what runs on a CPU and under `kernels=torch`.

A backend is a folder `kernels_<name>` that exports functions under these names with these signatures.
"""

from kernels_torch.adamw import adamw_update
from kernels_torch.add_rmsnorm import add_rmsnorm, mix_rmsnorm
from kernels_torch.attention import attention
from kernels_torch.attention_decode import attention_decode, attention_decode_paged
from kernels_torch.attention_step import attention_step_paged
from kernels_torch.draw_tokens import draw_tokens
from kernels_torch.embedding import embedding
from kernels_torch.gelu import gelu
from kernels_torch.layer_norm import layer_norm
from kernels_torch.linear_cross_entropy import linear_cross_entropy
from kernels_torch.linear_decode import linear_decode
from kernels_torch.mlp import relu2_mlp, swiglu_mlp
from kernels_torch.muon import muon_momentum, muon_update
from kernels_torch.newton_schulz import newton_schulz
from kernels_torch.qk_norm_rope import qk_norm_rope, qk_norm_rope_append, qk_norm_rope_append_paged
from kernels_torch.rmsnorm import rmsnorm
from kernels_torch.smear import smear
from kernels_torch.softmax import softmax
from kernels_torch.take_tokens import take_tokens
from kernels_torch.top_k import top_k
from kernels_torch.value_embedding import value_embedding

__all__ = [
    "adamw_update",
    "add_rmsnorm",
    "attention",
    "attention_decode",
    "attention_decode_paged",
    "attention_step_paged",
    "draw_tokens",
    "embedding",
    "gelu",
    "layer_norm",
    "linear_cross_entropy",
    "linear_decode",
    "mix_rmsnorm",
    "muon_momentum",
    "muon_update",
    "newton_schulz",
    "qk_norm_rope",
    "qk_norm_rope_append",
    "qk_norm_rope_append_paged",
    "relu2_mlp",
    "rmsnorm",
    "smear",
    "softmax",
    "swiglu_mlp",
    "take_tokens",
    "top_k",
    "value_embedding",
]
