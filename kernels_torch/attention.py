"""Causal attention of whole rows: training, evaluation, prefill. Everything runs in PyTorch's fused attention (SDPA).

Plain causal rows use its causal form, which never makes a T × T matrix. A window, document boundaries, or fewer queries
than keys need an explicit mask; SDPA's `is_causal` aligns top-left and would let a last query see only the first key.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels_torch.checks import check_devices, holds_integers


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    doc_ids: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """out[t] = Σ_s softmax_s(scale · q[t]·k[s]) v[s] over the keys s that query t may see.

    The queries are the last Tq of Tk positions (bottom-right alignment): query t sits at p = Tk − Tq + t and sees key s
    when s ≤ p, p − s ≤ window, and both are of one document. Query head h reads key head h // (H / Hkv).

    q         [B, Tq, H, D]
    k, v      [B, Tk, Hkv, D], Tk ≥ Tq, H a multiple of Hkv, the dtype of q
    window    how many earlier tokens each token sees, so window + 1 keys in all; None: all of them
    doc_ids   [B, T] integers, tokens see only tokens with the same id; needs Tq = Tk
    scale     None: D^−½
    → [B, Tq, H, D]

    Raises ValueError for shapes that do not fit together and for a negative window.
    Source: https://arxiv.org/abs/1706.03762; grouped heads https://arxiv.org/abs/2305.13245.
    """
    check_attention(q, k, v, window, doc_ids)
    Tq, Tk = q.shape[1], k.shape[1]
    if window is not None and window < Tk - Tq:  # the first keys are out of every query's sight
        k, v = k[:, Tk - Tq - window :], v[:, Tk - Tq - window :]
        Tk = k.shape[1]
    if window is not None and window >= Tk - 1:
        window = None
    if doc_ids is None and window is None and (Tq == Tk or Tq == 1):
        return fused_attention(q, k, v, None, is_causal=Tq == Tk, scale=scale)
    positions = torch.arange(Tk, device=q.device)
    mask = visible(positions[Tk - Tq :, None], positions, window)  # [Tq, Tk]
    if doc_ids is not None:
        mask = (mask & (doc_ids[:, :, None] == doc_ids[:, None, :])).unsqueeze(1)  # [B, 1, Tq, Tk]
    return fused_attention(q, k, v, mask, is_causal=False, scale=scale)


def visible(p: Tensor, s: Tensor, window: int | None) -> Tensor:
    """Whether a query at position p sees the key at position s."""
    return s <= p if window is None else (s <= p) & (p - s <= window)


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, is_causal: bool, scale: float | None
) -> Tensor:
    """F.scaled_dot_product_attention for [B, T, H, D] and grouped heads; mask is True where a key is seen."""
    if scale is not None and scale <= 0:  # which a masked score of -inf must not be multiplied by
        q, scale = q * scale, 1.0
    q, k, v = (in_whole_words(x).transpose(1, 2) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    if group > 1 and (mask is not None or q.dtype.itemsize > 2):
        # On a GPU only the half-precision kernel without a mask knows groups; else T × T scores would come to memory.
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        group = 1
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=group > 1
    )
    return out.transpose(1, 2)


def in_whole_words(x: Tensor) -> Tensor:
    """SDPA's GPU kernels read 16 bytes at a time and refuse rows that start in between; such a view is copied."""
    odd = x.stride(-1) != 1 or any(stride * x.itemsize % 16 for stride in x.stride()[:-1])
    return x.contiguous() if odd and x.is_cuda else x


def check_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None, doc_ids: Tensor | None) -> None:
    """Refuse what `attention` cannot mean."""
    check_heads(q, k, v)
    check_devices(q=q, doc_ids=doc_ids)
    if q.shape[1] > k.shape[1]:
        raise ValueError(f"there must be at least as many keys as queries, got {k.shape[1]} and {q.shape[1]}")
    check_window(window)
    if doc_ids is not None:
        if q.shape[1] != k.shape[1]:
            raise ValueError(f"doc_ids need as many keys as queries, got {k.shape[1]} and {q.shape[1]}")
        if doc_ids.shape != q.shape[:2]:
            raise ValueError(f"doc_ids must have shape {tuple(q.shape[:2])}, got {tuple(doc_ids.shape)}")
        if not holds_integers(doc_ids):
            raise ValueError(f"doc_ids must be integers, got {doc_ids.dtype}")


def check_window(window: int | None) -> None:
    """How many earlier tokens are seen is counted."""
    if window is not None and (not isinstance(window, int | torch.SymInt) or window < 0):
        raise ValueError(
            f"window must be a whole number and not negative, got {window} (0: each token sees itself; "
            "None: all before it)"
        )


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q [B, T, H, D], k and v [B, S, Hkv, D] of one floating-point dtype, H a multiple of Hkv."""
    check_devices(q=q, k=k, v=v)
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q must be [B, Tq, H, D], k and v [B, Tk, Hkv, D], got {shapes}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"query heads must be a multiple of key heads, got {q.shape[2]} and {k.shape[2]}")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(f"q, k and v must have one floating-point dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
