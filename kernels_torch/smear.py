"""nanochat's smear: each token takes a little of the one before it, through a gate."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels_torch.checks import check_devices, holds_integers


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
    if doc_ids is not None and (doc_ids.shape != (B, T) or not holds_integers(doc_ids)):
        raise ValueError(f"doc_ids must be integers [{B}, {T}], got {doc_ids.dtype} {tuple(doc_ids.shape)}")
