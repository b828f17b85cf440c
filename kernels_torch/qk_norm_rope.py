"""Rotary positions, RMS norm and scale of queries and keys together: all that happens to them before attention."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels_torch.checks import check_block_table, check_devices, check_given, check_lengths, holds_integers
from kernels_torch.quantised_cache import as_bytes, check_pages, quantise


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    start: int | Tensor = 0,
    eps: float | None = 1e-6,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Rotate each head by its position, normalise it, scale it; in fp32 (fp64 for fp64 input).

    With a head split into halves [x1; x2] and θ = position · frequency, the rotation is by −θ:

        y1 = x1 · cos θ + x2 · sin θ          z = scale · y / sqrt(mean(y²) + eps)
        y2 = x2 · cos θ − x1 · sin θ

    q         [B, T, H, D]
    k         [B, T, Hkv, D], the dtype of q
    cos, sin  [S, D/2] fp32: row p belongs to position p
    start     position of the first token: an int for all rows, or an integer tensor [B] on the device, one per row;
              start + T must not pass S (checked for an int; a tensor is never read on the host)
    eps       None: rotate and scale only (llama has no QK norm)
    → (q, k) in their own shapes and dtype

    Raises ValueError for shapes that do not fit together and for an int start outside the table.
    Source: RoFormer, https://arxiv.org/abs/2104.09864, in the half-split layout of GPT-NeoX with the sign of nanochat;
    QK norm, https://arxiv.org/abs/2010.04245. A rotation keeps the norm, so a kernel may take it before rotating.
    """
    check_qk_norm_rope(q, k, cos, sin, start, eps)
    cos, sin = (table_rows(table, start, q.shape[1]).to(compute_dtype(q)) for table in (cos, sin))
    return rotate_and_norm(q, cos, sin, eps, scale), rotate_and_norm(k, cos, sin, eps, scale)


def qk_norm_rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    *,
    eps: float | None = 1e-6,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """qk_norm_rope of new tokens, with k and v written straight to where a key-value cache keeps them.

    Token t of row b stands at position lengths[b] + t, in the rotary table and in the cache alike.

    q                 [B, T, H, D]
    k, v              [B, T, Hkv, D], the dtype of q
    k_cache, v_cache  [B, S, Hkv, D], any strides and any floating-point dtype: written in place
    cos, sin          [at least S, D/2] fp32
    lengths           [B] int32 or int64 on the device: tokens each row holds already; what has no room in S is dropped
    eps, scale        as in qk_norm_rope
    → (q, k_cache, v_cache): q rotated and normalised, and the caches themselves

    For decoding: there is no gradient. Raises ValueError for shapes and dtypes that do not fit together.
    """
    check_qk_norm_rope_append(q, k, v, k_cache, v_cache, cos, sin, lengths, eps)
    with torch.no_grad():
        S = k_cache.shape[1]
        positions = positions_with_room(lengths, q.shape[1], S)  # [B, T]
        angles = angles_at(positions, cos, sin, q)
        q, k = (rotate_and_norm(x, *angles, eps, scale) for x in (q, k))
        rows = torch.arange(q.shape[0], device=q.device)[:, None]
        for cache, new in ((k_cache, k), (v_cache, v)):
            write(cache, (rows, positions), new, lengths, S)
    return q, k_cache, v_cache


def qk_norm_rope_append_paged(
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
    scale: float = 1.0,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`qk_norm_rope_append` to pages: position s of row b is entry s % page of page block_table[b, s // page].

    q                 [B, T, H, D]
    k, v              [B, T, Hkv, D], the dtype of q
    k_pages, v_pages  [P, page, Hkv, D], any strides and any floating-point dtype: written in place; or codes, int8 or
                      float8_e4m3fn, of what k and v are in their dtype (quantised_cache.py)
    block_table       [B, n] integers on the device: the pages of each row in order; those that are written to must be
                      pages, and no two rows' (neither is checked: that would wait for the device)
    cos, sin          [S, D/2] fp32
    lengths           [B] int32 or int64 on the device: tokens each row holds already; what has no room in n · page, or
                      no row in the tables, is dropped
    eps, scale        as in qk_norm_rope
    k_scales, v_scales  of codes, [P, page, Hkv] fp32: written in place, too
    → (q, k_pages, v_pages): q rotated and normalised, and the pages themselves

    There is no gradient. Raises ValueError for shapes and dtypes that do not fit together.
    """
    check_qk_norm_rope_append_paged(q, k, v, k_pages, v_pages, block_table, cos, sin, lengths, eps, k_scales, v_scales)
    with torch.no_grad():
        page = k_pages.shape[1]
        S = min(block_table.shape[1] * page, cos.shape[0])
        positions = positions_with_room(lengths, q.shape[1], S)  # [B, T]
        angles = angles_at(positions, cos, sin, q)
        q, k = (rotate_and_norm(x, *angles, eps, scale) for x in (q, k))
        places = (block_table.gather(1, positions // page).long(), positions % page)
        for pages, scales, new in ((k_pages, k_scales, k), (v_pages, v_scales, v)):
            if scales is None:
                write(pages, places, new, lengths, S)
            else:
                codes, new_scales = quantise(new, pages.dtype)
                write(as_bytes(pages), places, as_bytes(codes), lengths, S)
                write(scales[..., None], places, new_scales[..., None], lengths, S)
    return q, k_pages, v_pages


def positions_with_room(lengths: Tensor, T: int, S: int) -> Tensor:
    """Where T new tokens of each row stand [B, T] int64; those that have no room in S, at the last place that is."""
    return (lengths.long()[:, None] + torch.arange(T, device=lengths.device)).clamp(max=S - 1)


def angles_at(positions: Tensor, cos: Tensor, sin: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """Rows [B, T, 1, D/2] of both tables, in what x is computed in."""
    return tuple(table[positions].unsqueeze(2).to(compute_dtype(x)) for table in (cos, sin))


def write(cache: Tensor, places: tuple[Tensor, Tensor], new: Tensor, lengths: Tensor, S: int) -> None:
    """cache[places] = new, where those without room write the last place once more, with what belongs there: their
    row's own token or its old value."""
    B, T = new.shape[:2]
    old, new = cache[places], new.to(cache.dtype)
    if T == 1:
        cache[places] = torch.where((lengths < S)[:, None, None, None], new, old)
        return
    tokens = torch.minimum(torch.arange(T, device=new.device), S - 1 - lengths[:, None])  # [B, T]
    rows = torch.arange(B, device=new.device)[:, None]
    cache[places] = torch.where((tokens < 0)[:, :, None, None], old, new[rows, tokens.clamp(min=0)])


def compute_dtype(x: Tensor) -> torch.dtype:
    """fp32, unless the input is fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def table_rows(table: Tensor, start: int | Tensor, T: int) -> Tensor:
    """Rows start … start + T − 1 of [S, D/2], as [1 or B, T, 1, D/2]."""
    if isinstance(start, Tensor):
        return table[start[:, None] + torch.arange(T, device=table.device)].unsqueeze(2)
    return table[start : start + T].view(1, T, 1, -1)


def rotate_and_norm(x: Tensor, cos: Tensor, sin: Tensor, eps: float | None, scale: float) -> Tensor:
    x1, x2 = x.to(cos.dtype).chunk(2, dim=-1)
    y = torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)
    if eps is not None:
        y = F.rms_norm(y, y.shape[-1:], None, eps)
    return (y if scale == 1.0 else y * scale).to(x.dtype)


def check_qk_norm_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, start: int | Tensor, eps: float | None) -> None:
    """Refuse what `qk_norm_rope` cannot mean."""
    check_rotation(q, k, cos, sin, eps)
    B, T = q.shape[:2]
    if isinstance(start, Tensor):
        check_given(q=q, start=start)
        if tuple(start.shape) != (B,) or not holds_integers(start):
            raise ValueError(f"start must be an int or an integer tensor [{B}], got {start.dtype} {tuple(start.shape)}")
    elif start < 0 or start + T > cos.shape[0]:
        raise ValueError(f"positions {start} to {start + T - 1} are outside the rotary table of {cos.shape[0]} rows")


def check_rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, eps: float | None) -> None:
    """Refuse what cannot be rotated and normalised, wherever it stands."""
    check_given(q=q, k=k, cos=cos, sin=sin)
    if q.dim() != 4 or k.dim() != 4 or (*q.shape[:2], q.shape[3]) != (*k.shape[:2], k.shape[3]):
        raise ValueError(f"q must be [B, T, H, D] and k [B, T, Hkv, D], got {tuple(q.shape)} and {tuple(k.shape)}")
    if q.dtype != k.dtype or not q.is_floating_point():
        raise ValueError(f"q and k must have one floating-point dtype, got {q.dtype} and {k.dtype}")
    D = q.shape[3]
    if D % 2 or D == 0:
        raise ValueError(f"the head width must be even to be rotated, got D={D}")
    if cos.dim() != 2 or cos.shape != sin.shape or cos.shape[1] != D // 2:
        raise ValueError(f"cos and sin must be [S, {D // 2}], got {tuple(cos.shape)} and {tuple(sin.shape)}")
    if eps is not None and not eps >= 0:
        raise ValueError(f"qk_norm_rope eps must not be negative, got {eps}")


def check_new_tokens(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor, eps: float | None
) -> None:
    """Refuse what no cache can take, in pages or in one piece."""
    check_lengths(lengths, q)
    check_rotation(q, k, cos, sin, eps)
    if v.shape != k.shape or v.dtype != k.dtype:
        raise ValueError(f"v must be {k.dtype} {tuple(k.shape)} like k, got {v.dtype} {tuple(v.shape)}")


def check_qk_norm_rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    eps: float | None,
) -> None:
    """Refuse what `qk_norm_rope_append` cannot mean."""
    check_given(q=q, v=v, k_cache=k_cache, v_cache=v_cache, lengths=lengths)
    check_new_tokens(q, k, v, cos, sin, lengths, eps)
    B, _, Hkv, D = k.shape
    if k_cache.dim() != 4 or (k_cache.shape[0], *k_cache.shape[2:]) != (B, Hkv, D) or v_cache.shape != k_cache.shape:
        raise ValueError(
            f"the caches must be [{B}, S, {Hkv}, {D}], got {tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
        )
    if not (k_cache.is_floating_point() and v_cache.is_floating_point()):
        raise ValueError(f"the caches must be floating point, got {k_cache.dtype} and {v_cache.dtype}")
    if cos.shape[0] < k_cache.shape[1]:
        raise ValueError(f"a cache of {k_cache.shape[1]} tokens needs as many rotary rows, got {cos.shape[0]}")


def check_qk_norm_rope_append_paged(
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
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Refuse what `qk_norm_rope_append_paged` cannot mean."""
    check_given(q=q, v=v, k_pages=k_pages, v_pages=v_pages, block_table=block_table, lengths=lengths)
    check_devices(q=q, k_scales=k_scales, v_scales=v_scales)
    check_new_tokens(q, k, v, cos, sin, lengths, eps)
    B, _, Hkv, D = k.shape
    if k_pages.dim() != 4 or tuple(k_pages.shape[2:]) != (Hkv, D) or v_pages.shape != k_pages.shape:
        raise ValueError(f"pages must be [P, page, {Hkv}, {D}], got {tuple(k_pages.shape)} and {tuple(v_pages.shape)}")
    check_pages(k_pages, v_pages, k_scales, v_scales)
    check_block_table(block_table, k_pages, B)
    if B and block_table.shape[1] * k_pages.shape[1] == 0:
        raise ValueError(f"{B} rows have no page to write to")
    if B and len(cos) == 0:
        raise ValueError(f"{B} rows have no rotary row: cos and sin are {tuple(cos.shape)}")
