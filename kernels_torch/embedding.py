"""What tokens look up and how it is mixed in: the embedding table, value embeddings and nanochat's smear."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels_torch.checks import check_devices


def embedding(tokens: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """Row table[t] for every token t, cast to `dtype`.

    tokens    [...] integers below V
    table     [V, D]; fp32 as a rule: a table in bf16 would lose its small updates
    → [..., D] in `dtype`; the gradient of the table is summed in fp32 (fp64 for fp64)

    Raises ValueError for shapes and dtypes that do not fit together. A token outside the table is PyTorch's own index
    error: checking it here would wait for the device.
    """
    check_embedding(tokens, table, dtype)
    return F.embedding(tokens, table).to(dtype)


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


def smear(
    x: Tensor,
    gate_weight: Tensor,
    scale: Tensor,
    *,
    previous: Tensor | None = None,
    doc_ids: Tensor | None = None,
) -> Tensor:
    """x_t + g_t · x_{t−1},   g_t = scale · sigmoid(w · x_t[:G]): a learned bigram

    x            [B, T, D]
    gate_weight  [1, G], G ≤ D, any dtype; rounded to that of x, as every layer rounds its fp32 masters
    scale        a tensor of one value on the device, any dtype
    previous     [B, 1, D]: x_{−1}, what came before the first token; None: nothing
    doc_ids      [B, T]: the first token of a document has nothing before it, nor has the first of a row
    → [B, T, D] in the dtype of x, computed in fp32 (fp64 for fp64 input) and rounded once

    Raises ValueError for shapes that do not fit together.
    Source: nanochat, https://github.com/karpathy/nanochat, after the token smear of modded-nanogpt.
    """
    check_smear(x, gate_weight, scale, previous, doc_ids)
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(dtype)
    logit = F.linear(wide[..., : gate_weight.shape[1]], gate_weight.to(x.dtype).to(dtype))  # (B, T, 1)
    gate = scale.reshape(()).to(dtype) * torch.sigmoid(logit)
    if doc_ids is not None:
        same = F.pad(doc_ids[:, 1:] == doc_ids[:, :-1], (1, 0))  # the first of a row continues nothing
        gate = gate * same.unsqueeze(-1)
    before = torch.zeros_like(wide[:, :1]) if previous is None else previous.to(dtype)
    return (wide + gate * torch.cat([before, wide[:, :-1]], dim=1)).to(x.dtype)


def check_embedding(tokens: Tensor, table: Tensor, dtype: torch.dtype) -> None:
    """Refuse what `embedding` cannot mean."""
    check_devices(tokens=tokens, table=table)
    if tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ValueError(f"tokens must be integers, got {tokens.dtype}")
    if table.dim() != 2 or not table.is_floating_point():
        raise ValueError(f"table must be floating point [V, D], got {table.dtype} {tuple(table.shape)}")
    if not dtype.is_floating_point:
        raise ValueError(f"embedding gives floating-point values, not {dtype}")


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


def check_smear(x: Tensor, gate_weight: Tensor, scale: Tensor, previous: Tensor | None, doc_ids: Tensor | None) -> None:
    """Refuse what `smear` cannot mean."""
    check_devices(x=x, gate_weight=gate_weight, scale=scale, previous=previous, doc_ids=doc_ids)
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"x must be floating point [B, T, D], got {x.dtype} {tuple(x.shape)}")
    B, T, D = x.shape
    if gate_weight.dim() != 2 or gate_weight.shape[0] != 1 or not 0 < gate_weight.shape[1] <= D:
        raise ValueError(f"gate_weight must be [1, G] with G from 1 to {D}, got {tuple(gate_weight.shape)}")
    if scale.numel() != 1:
        raise ValueError(f"scale must hold one value, got shape {tuple(scale.shape)}")
    if previous is not None and (previous.shape != (B, 1, D) or previous.dtype != x.dtype):
        raise ValueError(f"previous must be {x.dtype} ({B}, 1, {D}), got {previous.dtype} {tuple(previous.shape)}")
    if doc_ids is not None and doc_ids.shape != (B, T):
        raise ValueError(f"doc_ids must be [{B}, {T}], got {tuple(doc_ids.shape)}")
