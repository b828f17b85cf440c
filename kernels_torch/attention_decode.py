"""Attention of new tokens against a cache in which every row has its own length: decoding and chunked prefill.

Lengths are read on the device only, so a decoding step never waits for the host and can be captured in a CUDA graph.
The price here: the whole cache is read and masked whatever the lengths are, and copied once to clear what lies beyond
them (0 · NaN is NaN, so masking the weights alone would not do). A kernel can skip it instead.
"""

import torch
from torch import Tensor

from kernels_torch.attention import FLOATS, check_heads, check_scale, check_window, fused_attention, visible
from kernels_torch.checks import check_block_table, check_devices, check_given, check_lengths
from kernels_torch.quantised_cache import as_bytes, check_pages, dequantise


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
    lengths           [B] int32 or int64 on the device: valid keys of each row including the new ones, at most S (not
                      checked: that would wait for the device)
    window            how many earlier tokens each token sees; None: all
    scale             None: D^−½
    → [B, Tn, H, D]

    A value within lengths[b] that is inf or NaN may reach queries of its row that do not see it, as 0 · NaN is NaN.

    Raises ValueError for shapes that do not fit together, lengths that are neither int32 nor int64, a window below 1,
    and a scale that is not finite.
    """
    check_attention_decode(q, k_cache, v_cache, lengths, window, scale)
    with torch.no_grad():
        valid = is_valid(k_cache, lengths)
        k, v = (torch.where(valid, cache, 0) for cache in (k_cache, v_cache))
        return attend(q, k, v, lengths, window, scale)


def is_valid(cache: Tensor, lengths: Tensor) -> Tensor:
    """Which entries of a cache [B, S, Hkv, D] count, [B, S, 1, 1]."""
    return (torch.arange(cache.shape[1], device=cache.device) < lengths[:, None])[:, :, None, None]


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, window: int | None, scale: float | None) -> Tensor:
    """Attention over a cache that holds nothing but numbers."""
    if q.shape[0] == 0:  # SDPA under a mask returns None for no rows in half precision on a GPU
        return torch.empty_like(q)
    Tn, S = q.shape[1], k.shape[1]
    o_s = torch.arange(S, device=q.device)
    positions = (lengths[:, None] - Tn) + torch.arange(Tn, device=q.device)  # [B, Tn]
    exists = (positions >= 0)[:, :, None, None]  # [B, Tn, 1, 1]
    mask = visible(positions[:, :, None], o_s, window).unsqueeze(1)  # [B, 1, Tn, S]
    out = fused_attention(q, k, v, mask, is_causal=False, scale=scale)
    return torch.where(exists, out, 0)


def attention_decode_paged(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """`attention_decode` over pages: position s of row b is entry s % page of page block_table[b, s // page].

    q                 [B, Tn, H, D]
    k_pages, v_pages  [P, page, Hkv, D], the dtype of q, or codes, int8 or float8_e4m3fn (quantised_cache.py); rows may
                      share pages
    block_table       [B, n] integers on the device, the pages of each row in order; what lies behind those of
                      lengths[b] keys may be anything (the others are not checked: that would wait for the device)
    lengths, window, scale   as there; lengths at most n · page
    k_scales, v_scales       of codes, [P, page, Hkv] fp32
    → [B, Tn, H, D]
    """
    check_attention_decode_paged(q, k_pages, v_pages, block_table, lengths, window, scale, k_scales, v_scales)
    with torch.no_grad():
        if k_scales is None:
            k, v = (in_order(pages, block_table) for pages in (k_pages, v_pages))
        else:
            pairs = ((k_pages, k_scales), (v_pages, v_scales))
            k, v = (numbers_in_order(pages, scales, block_table, q.dtype) for pages, scales in pairs)
        valid = is_valid(k, lengths)
        for copy in (k, v):  # in place: a second copy would take as long as all the rest
            copy.masked_fill_(~valid, 0)
        return attend(q, k, v, lengths, window, scale)


def in_order(pages: Tensor, block_table: Tensor) -> Tensor:
    """[P, page, …] and [B, n] → [B, n · page, …]; an entry that is no page is taken as some page."""
    return pages[block_table.long().clamp(0, len(pages) - 1)].flatten(1, 2)


def numbers_in_order(pages: Tensor, scales: Tensor, block_table: Tensor, dtype: torch.dtype) -> Tensor:
    """What the codes [P, page, Hkv, D] of each row stand for [B, n · page, Hkv, D]."""
    codes = in_order(as_bytes(pages), block_table).view(pages.dtype)
    return dequantise(codes, in_order(scales, block_table), dtype)


def check_attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, window: int | None, scale: float | None
) -> None:
    """Refuse what `attention_decode` cannot mean."""
    check_heads(q, k_cache, v_cache)
    check_given(q=q, lengths=lengths)
    if q.shape[1] > k_cache.shape[1]:
        raise ValueError(f"{q.shape[1]} new tokens do not fit a cache of {k_cache.shape[1]}")
    check_lengths(lengths, q)
    check_window(window)
    check_scale(scale)


def check_attention_decode_paged(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    window: int | None,
    scale: float | None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Refuse what `attention_decode_paged` cannot mean, in the words of `attention_decode`."""
    check_given(q=q, k_pages=k_pages, v_pages=v_pages, block_table=block_table, lengths=lengths)
    check_devices(q=q, k_scales=k_scales, v_scales=v_scales)
    if q.dim() != 4 or k_pages.dim() != 4 or k_pages.shape != v_pages.shape or q.shape[3] != k_pages.shape[3]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k_pages, v_pages))
        raise ValueError(f"q must be [B, Tn, H, D], k_pages and v_pages [P, page, Hkv, D], got {shapes}")
    (B, Tn, H, _), (_, page, Hkv, _) = q.shape, k_pages.shape
    if Hkv == 0 or H % Hkv:
        raise ValueError(f"query heads must be a multiple of key heads, got {H} and {Hkv}")
    if not (k_scales is None and v_scales is None):
        check_pages(k_pages, v_pages, k_scales, v_scales)
        if q.dtype not in FLOATS:
            raise ValueError(f"q must be bfloat16, float16, float32 or float64, got {q.dtype}")
    elif not (q.dtype == k_pages.dtype == v_pages.dtype and q.dtype in FLOATS):
        dtypes = f"{q.dtype}, {k_pages.dtype} and {v_pages.dtype}"
        raise ValueError(f"q, k_pages and v_pages must all be bfloat16, float16, float32 or float64, got {dtypes}")
    check_block_table(block_table, k_pages, B)
    if Tn > block_table.shape[1] * page:
        raise ValueError(f"{Tn} new tokens do not fit a cache of {block_table.shape[1] * page}")
    check_lengths(lengths, q)
    check_window(window)
    check_scale(scale)
