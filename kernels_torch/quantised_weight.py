"""Matrices in fewer bits: codes and scales, what they stand for, and how they are chosen.

    int8    codes [F, C] int8, scales [F]                          w = code · scale,  scale = max|w| / 127 of each row
    fp8     codes [F, C] float8_e4m3fn, scales [F]                 w = code · scale,  scale = max|w| / 448 of each row
    int4    codes [F, Cp / 8] int32, scales [F, Cp / group]        w = (nibble − 8) · scale of its group of a row

The dtype of the codes says which it is. Rows of int4 are filled up with zeros to Cp, whole groups. A group of `group`
columns takes P = group / 8 words, and nibble j of its word i (bits 4j to 4j + 3) is column j · P + i of the group: so a
thread that reads four words in a row uses four columns in a row of the input for each j, and one scale.

Scales are fp32 for whole rows and bf16 for groups, where they take memory: int4 takes 4 + 16 / group bits a weight.
"""

import torch
from torch import Tensor

FORMS = ("int8", "int4", "fp8")
GROUPS = (64, 128)
GROUP = 128
CODES = {torch.int8: "int8", torch.int32: "int4", torch.float8_e4m3fn: "fp8"}
TRIED_SCALES = 24


def quantise(weight: Tensor, form: str, group: int = GROUP) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix [F, C], in one of FORMS. The same numbers on every device, up to rounding ties.

    group    of int4: columns that share a scale, one of GROUPS

    Raises ValueError for what is no matrix of finite numbers, for a form that does not exist and for another group.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"only matrices of floats are quantised, got {tuple(weight.shape)} {weight.dtype}")
    if form not in FORMS:
        raise ValueError(f"weights are quantised to {', '.join(FORMS)}, got {form!r}")
    if group not in GROUPS:
        raise ValueError(f"a group of int4 has {' or '.join(map(str, GROUPS))} columns, got {group}")
    w = weight.detach().float()
    if not w.isfinite().all():
        raise ValueError("weights that are not finite cannot be quantised")
    if form == "int4":
        return _quantise_int4(w, group)
    most = 127.0 if form == "int8" else torch.finfo(torch.float8_e4m3fn).max
    scales = w.abs().amax(1) / most if w.shape[1] else w.new_zeros(w.shape[0])
    codes = w / _without_zeros(scales)[:, None]
    if form == "int8":
        return codes.round().clamp(-127, 127).to(torch.int8), scales
    return codes.clamp(-most, most).to(torch.float8_e4m3fn), scales


def _quantise_int4(w: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The scale of each group is the one of a few that leaves the least squared error.

    The value furthest from zero becomes code 0 (−8), the one end that has no partner, so all sixteen codes are used.
    """
    F, C = w.shape
    n = -(-C // group)
    w = torch.nn.functional.pad(w, (0, n * group - C)).view(F, n, group)
    furthest = w.gather(2, w.abs().argmax(2, keepdim=True)).squeeze(2) if group * n else w.new_zeros(F, n)  # (F, n)
    best, best_error = torch.zeros_like(furthest), torch.full_like(furthest, torch.inf)
    for i in range(TRIED_SCALES):
        tried = (furthest / -8 * (1.05 - 0.4 * i / TRIED_SCALES)).to(torch.bfloat16).float()
        error = (_nibbles(w, tried).sub_(8).mul_(tried[:, :, None]) - w).square_().sum(2)
        better = error < best_error
        best, best_error = torch.where(better, tried, best), torch.where(better, error, best_error)
    return pack_int4(_nibbles(w, best).to(torch.int32)), best.to(torch.bfloat16)


def _nibbles(w: Tensor, scales: Tensor) -> Tensor:
    return (w / _without_zeros(scales)[:, :, None]).round_().clamp_(-8, 7).add_(8)


def _without_zeros(scales: Tensor) -> Tensor:
    """What to divide by: a row of zeros has the scale zero."""
    return torch.where(scales == 0, 1.0, scales)


def pack_int4(nibbles: Tensor) -> Tensor:
    """[F, n, group] integers of 0 to 15 → words [F, n · group / 8] int32."""
    F, n, group = nibbles.shape
    planes = nibbles.view(F, n, 8, group // 8).to(torch.int64)
    words = sum(planes[:, :, j] << (4 * j) for j in range(8))  # (F, n, P), of 32 bits
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).reshape(F, n * group // 8)


def unpack_int4(words: Tensor, group: int) -> Tensor:
    """The inverse of pack_int4: [F, n · group / 8] → [F, n, group] int32."""
    F, W = words.shape
    planes = words.reshape(F, W * 8 // group, 1, group // 8)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device).view(8, 1)
    return ((planes >> shifts) & 15).flatten(2)


def dequantise(codes: Tensor, scales: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """What codes and scales stand for: [F, width], computed in fp32 (fp64 for fp64) and rounded once to `dtype`."""
    check_codes(codes, scales, width)
    wide = torch.promote_types(dtype, torch.float32)
    if codes.dtype != torch.int32:
        return (codes.to(wide) * scales[:, None].to(wide)).to(dtype)
    group = group_of(codes, scales)
    values = (unpack_int4(codes, group) - 8).to(wide) * scales[:, :, None].to(wide)
    return values.flatten(1)[:, :width].to(dtype)


def group_of(codes: Tensor, scales: Tensor) -> int:
    """Columns of int4 that share a scale."""
    return 8 * codes.shape[1] // scales.shape[1] if scales.shape[1] else GROUP


def shapes_of(F: int, C: int, form: str, group: int) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shape and dtype of the codes of a matrix [F, C], and of its scales."""
    dtype = next(dtype for dtype, name in CODES.items() if name == form)
    if form != "int4":
        return ((F, C), dtype), ((F,), torch.float32)
    n = -(-C // group)
    return ((F, n * group // 8), dtype), ((F, n), torch.bfloat16)


def check_codes(codes: Tensor, scales: Tensor, width: int) -> None:
    """Refuse codes and scales that do not make up a matrix [F, width]."""
    form = CODES.get(codes.dtype)
    if form is None:
        kinds = ", ".join(f"{dtype} ({name})" for dtype, name in CODES.items())
        raise ValueError(f"codes of a weight are {kinds}, got {codes.dtype}")
    if not scales.is_floating_point():
        raise ValueError(f"scales must be floating point, got {scales.dtype}")
    F = codes.shape[0]
    if form != "int4":
        if codes.shape[1] != width or tuple(scales.shape) != (F,):
            raise ValueError(
                f"{form} needs codes [F, {width}] and scales [F], got {tuple(codes.shape)} and {tuple(scales.shape)}"
            )
        return
    fits = any(
        tuple(scales.shape) == (F, -(-width // group)) and codes.shape[1] == -(-width // group) * group // 8
        for group in GROUPS
    )
    if not fits:
        raise ValueError(
            f"int4 needs codes [F, n·group/8] and scales [F, n] for n groups of {' or '.join(map(str, GROUPS))} "
            f"columns that hold {width}, got {tuple(codes.shape)} and {tuple(scales.shape)}"
        )
