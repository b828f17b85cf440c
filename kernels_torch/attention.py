"""Attention of whole rows: training, evaluation, prefill. PyTorch's fused attention (SDPA), but for the soft-cap.

Plain causal rows use its causal form, which never makes a T × T matrix. A window, document boundaries, or fewer queries
than keys need an explicit mask; SDPA's `is_causal` aligns top-left and would let a last query see only the first key.
A soft-cap stands between the scores and the softmax, where SDPA has no place for it: there the scores are written out.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels_torch.checks import check_devices, check_given, holds_integers

COUNTS = (int, torch.SymInt)  # Python's, and what torch.compile has in their place
NUMBERS = (float, torch.SymFloat, *COUNTS)
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
LARGEST = sys.float_info.max
LEAST_SCALE = 1.2e-38  # smaller ones are zero in fp32
SOFTCAPS = (1e-30, 1e30)  # beyond them scores over or times the bound leave fp32


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    doc_ids: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """out[t] = Σ_s softmax_s(scale · q[t]·k[s]) v[s] over the keys s that query t may see.

    The last query is aligned with the last key (bottom-right): query t sits at p = Tk − Tq + t and sees key s when
    causal, s ≤ p; p − s ≤ window; and both are of one document. A query that sees no key (Tq > Tk) gives zeros.
    Query head h reads key head h // (H / Hkv).

    q         [B, Tq, H, D]
    k, v      [B, Tk, Hkv, D], H a multiple of Hkv, the dtype of q
    causal    False: tokens see later ones, too, with a window |p − s| ≤ window
    window    how many earlier tokens each token sees, so window + 1 keys in all, with causal=False as many later ones;
              at least 1; None: all of them
    doc_ids   [B, T] integers, tokens see only tokens with the same id; needs Tq = Tk
    scale     None: D^−½
    softcap   None, or the bound c of the scores, from 1e-30 to 1e30: c · tanh(scale · q[t]·k[s] / c) takes their place
    → [B, Tq, H, D]

    A value that is inf or NaN at a key may reach queries that do not see it, as 0 · NaN is NaN: keys are taken by the
    tile, or all at once. Other rows of the batch never see it.

    Raises ValueError for shapes that do not fit together, a window below 1, a scale that is not finite, and a softcap
    out of its range.
    Source: https://arxiv.org/abs/1706.03762; grouped heads https://arxiv.org/abs/2305.13245; soft-cap
    https://arxiv.org/abs/2408.00118.
    """
    check_attention(q, k, v, causal, window, doc_ids, scale, softcap)
    Tq, Tk = q.shape[1], k.shape[1]
    blind = blind_queries(Tq, Tk, causal, window)
    if blind > 0:
        seeing = attention(q[:, blind:], k, v, causal=causal, window=window, scale=scale, softcap=softcap)
        return F.pad(seeing, (0, 0, 0, 0, blind, 0))
    if window is not None and window < Tk - Tq:  # the first keys are out of every query's sight
        k, v = k[:, Tk - Tq - window :], v[:, Tk - Tq - window :]
        Tk = k.shape[1]
    if window is not None and window >= max(Tq, Tk) - 1:
        window = None
    if causal and Tq == Tk and window is None and doc_ids is None and softcap is None:
        return fused_attention(q, k, v, None, is_causal=True, scale=scale)
    mask = mask_of(Tq, Tk, causal, window, doc_ids, q.device)
    if softcap is not None:
        return capped_attention(q, k, v, mask, scale=scale, softcap=softcap)
    return fused_attention(q, k, v, mask, is_causal=False, scale=scale)


def blind_queries(Tq: int, Tk: int, causal: bool, window: int | None) -> int:
    """How many of the first queries come so long before the first key that they see none."""
    reach = 0 if causal else Tq if window is None else window
    return Tq if Tk == 0 else max(0, Tq - Tk - reach)


def mask_of(
    Tq: int, Tk: int, causal: bool, window: int | None, doc_ids: Tensor | None, device: torch.device
) -> Tensor | None:
    """True where a query sees a key, [Tq, Tk] or with documents [B, 1, Tq, Tk]; None where all see all."""
    if window is None and doc_ids is None and (not causal or Tq == 1):
        return None
    positions = torch.arange(min(0, Tk - Tq), Tk, device=device)
    mask = visible(positions[len(positions) - Tq :, None], positions[len(positions) - Tk :], window, causal)
    if doc_ids is None:
        return mask
    return (mask & (doc_ids[:, :, None] == doc_ids[:, None, :])).unsqueeze(1)


def visible(p: Tensor, s: Tensor, window: int | None, causal: bool = True) -> Tensor:
    """Whether a query at position p sees the key at position s."""
    near = torch.ones_like(p - s, dtype=torch.bool) if window is None else (p - s).abs() <= window
    return near & (s <= p) if causal else near


def capped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float | None, softcap: float
) -> Tensor:
    """The scores written out, in fp32 (fp64 for fp64), for all heads at once."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.to(dtype).repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scale = max(q.shape[-1], 1) ** -0.5 if scale is None else scale
    scores = softcap * torch.tanh(torch.einsum("bthd,bshd->bhts", q.to(dtype), k) * (scale / softcap))
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("bhts,bshd->bthd", torch.softmax(scores, dim=-1), v).to(q.dtype)


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, is_causal: bool, scale: float | None
) -> Tensor:
    """F.scaled_dot_product_attention for [B, T, H, D] and grouped heads; mask is True where a key is seen."""
    if scale is not None and scale < LEAST_SCALE:  # a masked score of -inf must not be multiplied by 0 or less
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


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    doc_ids: Tensor | None,
    scale: float | None,
    softcap: float | None,
) -> None:
    """Refuse what `attention` cannot mean."""
    check_heads(q, k, v)
    check_devices(q=q, doc_ids=doc_ids)
    if not isinstance(causal, bool):
        raise ValueError(f"causal must be True or False, got {causal!r:.80}")
    check_window(window)
    check_scale(scale)
    if softcap is not None and not (is_number(softcap) and SOFTCAPS[0] <= softcap <= SOFTCAPS[1]):
        raise ValueError(f"softcap must be a number from 1e-30 to 1e30, got {softcap!r:.80} (None: no cap)")
    if doc_ids is not None:
        if q.shape[1] != k.shape[1]:
            raise ValueError(f"doc_ids need as many keys as queries, got {k.shape[1]} and {q.shape[1]}")
        if doc_ids.shape != q.shape[:2]:
            raise ValueError(f"doc_ids must have shape {tuple(q.shape[:2])}, got {tuple(doc_ids.shape)}")
        if not holds_integers(doc_ids):
            raise ValueError(f"doc_ids must be integers, got {doc_ids.dtype}")


def check_window(window: int | None) -> None:
    """How many earlier tokens are seen is counted. 0 and −1 mean all of them elsewhere, so here they mean nothing."""
    if window is not None and not (isinstance(window, COUNTS) and not isinstance(window, bool) and window >= 1):
        raise ValueError(
            f"window must be an int and at least 1, got {window!r:.80} (how many tokens before it each token sees; "
            "None: all)"
        )


def check_scale(scale: float | None, name: str = "scale") -> None:
    """What scores, or queries and keys, are multiplied by."""
    if scale is not None and not (is_number(scale) and abs(scale) <= LARGEST):
        raise ValueError(f"{name} must be a finite number, got {scale!r:.80}" + " (None: D^-0.5)" * (name == "scale"))


def is_number(x: object) -> bool:
    return isinstance(x, NUMBERS) and not isinstance(x, bool)


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q [B, T, H, D], k and v [B, S, Hkv, D] of one floating-point dtype, H a multiple of Hkv."""
    check_given(q=q, k=k, v=v)
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q must be [B, Tq, H, D], k and v [B, Tk, Hkv, D], got {shapes}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"query heads must be a multiple of key heads, got {q.shape[2]} and {k.shape[2]}")
    if not (q.dtype == k.dtype == v.dtype and q.dtype in FLOATS):
        raise ValueError(
            f"q, k and v must all be bfloat16, float16, float32 or float64, got {q.dtype}, {k.dtype} and {v.dtype}"
        )
