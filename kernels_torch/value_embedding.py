"""Value embeddings: a second table, mixed into the values of attention through a gate for each head."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels_torch.checks import check_devices
from kernels_torch.embedding import check_embedding


def value_embedding(
    v: Tensor, tokens: Tensor, table: Tensor, gate_input: Tensor, gate_weight: Tensor, *, gate_range: float = 3.0
) -> Tensor:
    """v + g · table[tokens],   g = gate_range · sigmoid(gate_input · gate_weightᵀ), one gate for each head

    v            [B, T, Hkv, D]
    tokens       [B, T] integers below V
    table        [V, Hkv · D], any dtype; rounded to that of v, as every layer rounds its fp32 masters
    gate_input   [B, T, G], the first channels of the block's input, the dtype of v, any strides
    gate_weight  [Hkv, G], any dtype, rounded likewise
    → [B, T, Hkv, D] in the dtype of v, computed from there in fp32 (fp64 for fp64 input) and rounded once

    Raises ValueError for shapes and dtypes that do not fit together.
    Source: value embeddings of modded-nanogpt, https://github.com/KellerJordan/modded-nanogpt, gated as in nanochat.
    """
    check_value_embedding(v, tokens, table, gate_input, gate_weight)
    dtype = torch.promote_types(v.dtype, torch.float32)
    gate_weight = gate_weight.to(v.dtype).to(dtype)
    gate = gate_range * torch.sigmoid(F.linear(gate_input.to(dtype), gate_weight))  # (B, T, Hkv)
    rows = F.embedding(tokens, table).to(v.dtype).to(dtype).view(v.shape)
    return (v.to(dtype) + gate.unsqueeze(-1) * rows).to(v.dtype)


def check_value_embedding(v: Tensor, tokens: Tensor, table: Tensor, gate_input: Tensor, gate_weight: Tensor) -> None:
    """Refuse what `value_embedding` cannot mean."""
    check_devices(v=v, tokens=tokens, table=table, gate_input=gate_input, gate_weight=gate_weight)
    if v.dim() != 4 or not v.is_floating_point():
        raise ValueError(f"v must be floating point [B, T, Hkv, D], got {v.dtype} {tuple(v.shape)}")
    B, T, Hkv, D = v.shape
    check_embedding(tokens, table, v.dtype)
    if tokens.shape != (B, T) or table.shape[1] != Hkv * D:
        raise ValueError(
            f"tokens must be [{B}, {T}] and table [V, {Hkv * D}], got {tuple(tokens.shape)} and {tuple(table.shape)}"
        )
    if gate_input.dim() != 3 or gate_input.shape[:2] != (B, T) or gate_input.dtype != v.dtype:
        raise ValueError(
            f"gate_input must be {v.dtype} [{B}, {T}, G], got {gate_input.dtype} {tuple(gate_input.shape)}"
        )
    if gate_weight.shape != (Hkv, gate_input.shape[2]) or gate_input.shape[2] == 0:
        raise ValueError(f"gate_weight must be [{Hkv}, {gate_input.shape[2]}], got {tuple(gate_weight.shape)}")
