"""Attention of new tokens against a cache in which every row has its own length: decoding and chunked prefill.

Lengths are read on the device only, so a decoding step never waits for the host and can be captured in a CUDA graph.
The price here: the whole cache is read and masked whatever the lengths are, and copied once to clear what lies beyond
them (0 · NaN is NaN, so masking the weights alone would not do). A kernel can skip it instead.
"""

import torch
from torch import Tensor

from kernels_torch.attention import check_heads, fused_attention, visible
from kernels_torch.checks import check_devices


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """`attention` of each row's newest Tn tokens over its first lengths[b] keys; not differentiated.

    Query t of row b sits at p = lengths[b] − Tn + t and sees key s when s ≤ p and p − s ≤ window. A query before
    position 0 (a row shorter than Tn) gives zeros. What the cache holds at or beyond lengths[b] changes nothing,
    be it NaN.

    q                 [B, Tn, H, D]
    k_cache, v_cache  [B, S, Hkv, D], the new tokens' keys and values already in place, the dtype of q
    lengths           [B] int32 on the device: valid keys of each row including the new ones, at most S (not checked:
                      that would wait for the device)
    window            how many earlier tokens each token sees; None: all
    scale             None: D^−½
    → [B, Tn, H, D]

    Raises ValueError for shapes that do not fit together, lengths that are not integers, and a negative window.
    """
    check_attention_decode(q, k_cache, v_cache, lengths, window)
    if q.shape[0] == 0:  # SDPA under a mask returns None for no rows in half precision on a GPU
        return torch.empty_like(q)
    Tn, S = q.shape[1], k_cache.shape[1]
    o_s = torch.arange(S, device=q.device)
    positions = (lengths[:, None] - Tn) + torch.arange(Tn, device=q.device)  # [B, Tn]
    valid = (o_s < lengths[:, None])[:, :, None, None]  # [B, S, 1, 1]
    k, v = (torch.where(valid, cache, 0) for cache in (k_cache, v_cache))
    exists = (positions >= 0)[:, :, None, None]  # [B, Tn, 1, 1]
    mask = visible(positions[:, :, None], o_s, window).unsqueeze(1)  # [B, 1, Tn, S]
    out = fused_attention(q, k, v, mask, is_causal=False, scale=scale)
    return torch.where(exists, out, 0)


def check_attention_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, window: int | None) -> None:
    """Refuse what `attention_decode` cannot mean."""
    check_heads(q, k_cache, v_cache)
    check_devices(q=q, lengths=lengths)
    if q.shape[1] > k_cache.shape[1]:
        raise ValueError(f"{q.shape[1]} new tokens do not fit a cache of {k_cache.shape[1]}")
    if tuple(lengths.shape) != (q.shape[0],) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(
            f"lengths must be an integer tensor [{q.shape[0]}], got {lengths.dtype} {tuple(lengths.shape)}"
        )
    if window is not None and window < 0:
        raise ValueError(f"window must not be negative, got {window} (0: each token sees itself; None: all before it)")
