"""The operations of `kernels_torch` that have a Triton kernel, under the same names and signatures."""

import torch
import triton

from kernels_triton.adamw import adamw_update
from kernels_triton.add_rmsnorm import add_rmsnorm, mix_rmsnorm
from kernels_triton.attention import attention, which_attention
from kernels_triton.attention_decode import attention_decode, attention_decode_paged
from kernels_triton.attention_step import attention_step_paged
from kernels_triton.draw_tokens import draw_tokens
from kernels_triton.embedding import embedding
from kernels_triton.gelu import gelu
from kernels_triton.layer_norm import layer_norm
from kernels_triton.linear_cross_entropy import linear_cross_entropy
from kernels_triton.linear_decode import linear_decode
from kernels_triton.mlp import relu2_mlp, swiglu_mlp
from kernels_triton.muon import muon_momentum, muon_update
from kernels_triton.newton_schulz import newton_schulz
from kernels_triton.qk_norm_rope import qk_norm_rope, qk_norm_rope_append, qk_norm_rope_append_paged
from kernels_triton.rmsnorm import rmsnorm
from kernels_triton.smear import smear
from kernels_triton.softmax import softmax
from kernels_triton.take_tokens import take_tokens
from kernels_triton.top_k import top_k
from kernels_triton.value_embedding import value_embedding


def which_kernels(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Of the ops that have kernels for some GPUs only: which run on this one in that dtype, in words."""
    return {"attention": which_attention(device, dtype)}


if triton.knobs.runtime.interpret:
    from kernels_triton import interpreter

    interpreter.mend()

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
