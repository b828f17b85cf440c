"""All of attention between the projections, for the newest token of each row: decoding's step."""

import torch
from torch import Tensor

from kernels_torch.attention import FLOATS, check_scale, check_window
from kernels_torch.attention_decode import attention_decode_paged
from kernels_torch.qk_norm_rope import check_qk_norm_rope_append_paged, qk_norm_rope_append_paged


def attention_step_paged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    *,
    eps: float | None = 1e-6,
    qk_scale: float = 1.0,
    window: int | None = None,
    scale: float | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`qk_norm_rope_append_paged` of one token a row, then `attention_decode_paged` of it over all there is with it.

    q                 [B, 1, H, D]
    k, v              [B, 1, Hkv, D], the dtype of q
    k_pages, v_pages  [P, page, Hkv, D] in the dtype of q, or codes, int8 or float8_e4m3fn: written in place. Of the new
                      key and value, too, it is the codes that count
    block_table, cos, sin   as there
    lengths           [B] int32 or int64 on the device: tokens each row held before. A token whose position is none, be
                      it negative, n · page or more, or beyond the tables, is dropped: nothing is written for it, and
                      its out is zeros
    eps, qk_scale     of the norm of q and k
    window, scale     of the attention
    k_scales, v_scales  of codes, [P, page, Hkv] fp32: written in place, too
    → (out [B, 1, H, D], k_pages, v_pages)

    There is no gradient. Raises ValueError for shapes and dtypes that do not fit together.
    """
    places, scales = (block_table, cos, sin, lengths), dict(k_scales=k_scales, v_scales=v_scales)
    check_attention_step_paged(q, k, v, k_pages, v_pages, *places, eps, qk_scale, window, scale, **scales)
    held, seen = held_and_seen(lengths, room_of(k_pages, block_table, cos))
    places = (block_table, cos, sin, held)
    q, k_pages, v_pages = qk_norm_rope_append_paged(
        q, k, v, k_pages, v_pages, *places, eps=eps, scale=qk_scale, **scales
    )
    out = attention_decode_paged(q, k_pages, v_pages, block_table, seen, window=window, scale=scale, **scales)
    return out, k_pages, v_pages


def room_of(k_pages: Tensor, block_table: Tensor, cos: Tensor) -> int:
    """How many positions a row has in its pages and in the rotary tables."""
    return min(block_table.shape[1] * k_pages.shape[1], cos.shape[0])


def held_and_seen(lengths: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """How many tokens rows held before, and with the new one. A row that cannot take it holds all, and sees none."""
    has_room = (lengths >= 0) & (lengths < room)
    return torch.where(has_room, lengths, room), torch.where(has_room, lengths + 1, 0)


def check_attention_step_paged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    eps: float | None,
    qk_scale: float,
    window: int | None,
    scale: float | None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Refuse what `attention_step_paged` cannot mean."""
    check_qk_norm_rope_append_paged(q, k, v, k_pages, v_pages, block_table, cos, sin, lengths, eps, k_scales, v_scales)
    if q.shape[1] != 1:
        raise ValueError(f"a step takes one token a row, got q {tuple(q.shape)}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"query heads must be a multiple of key heads, got {q.shape[2]} and {k.shape[2]}")
    if k_scales is None and not q.dtype == k_pages.dtype == v_pages.dtype:
        raise ValueError(f"pages must be {q.dtype} like q, got {k_pages.dtype} and {v_pages.dtype}")
    if q.dtype not in FLOATS:
        raise ValueError(f"q, k and v must be bfloat16, float16, float32 or float64, got {q.dtype}")
    check_window(window)
    check_scale(qk_scale, "qk_scale")
    check_scale(scale)
