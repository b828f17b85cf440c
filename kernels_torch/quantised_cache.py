"""Keys and values in 8 bits: codes, and a scale for each token and head.

    int8    codes int8             x = code · scale,  scale = max|x| / 127 of each head of a token
    fp8     codes float8_e4m3fn    x = code · scale,  scale = max|x| / 448

Next to a token's codes lies all that they mean, so pages can be shared, copied and given away as those of numbers can.
"""

import torch
from torch import Tensor

FORMS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
LEAST = 1e-30  # a head whose values are all smaller is zero


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Vectors x [..., D] → codes [..., D] of this dtype and scales [...] in fp32 (fp64 for fp64).

    A vector that holds a value that is not finite gets a scale that is not, so that it stays visible.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    top = x.abs().amax(-1)
    units = x * torch.where(top > LEAST, LARGEST[dtype] / top, 0.0)[..., None]
    units = torch.where(units == units, units, 0.0)
    codes = (units + 0.5).floor() if dtype == torch.int8 else units.float().clamp(-LARGEST[dtype], LARGEST[dtype])
    return codes.to(dtype), top / LARGEST[dtype]


def dequantise(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What codes [..., D] and scales [...] stand for, computed in fp32 (fp64 for fp64) and rounded once to `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    return (codes.to(wide) * scales[..., None].to(wide)).to(dtype)


def as_bytes(codes: Tensor) -> Tensor:
    """The same memory in a dtype that every operation knows how to move."""
    return codes.view(torch.uint8) if codes.dtype == torch.float8_e4m3fn else codes


def check_pages(k_pages: Tensor, v_pages: Tensor, k_scales: Tensor | None, v_scales: Tensor | None) -> None:
    """Refuse pages [P, page, Hkv, D] that hold neither numbers nor codes with their scales."""
    got = f"got {k_pages.dtype} and {v_pages.dtype}"
    if k_scales is None and v_scales is None:
        if not all(pages.is_floating_point() and pages.element_size() > 1 for pages in (k_pages, v_pages)):
            raise ValueError(f"pages without scales must be floating point of 16 bits or more, {got}")
        return
    if k_scales is None or v_scales is None:
        raise ValueError("k_scales and v_scales belong together: one of them is missing")
    if k_pages.dtype not in LARGEST or v_pages.dtype != k_pages.dtype:
        raise ValueError(f"pages with scales must be both int8 or both float8_e4m3fn, {got}")
    for name, scales in (("k_scales", k_scales), ("v_scales", v_scales)):
        if scales.shape != k_pages.shape[:3] or not scales.is_floating_point():
            raise ValueError(
                f"{name} must be a floating-point tensor {tuple(k_pages.shape[:3])}, "
                f"got {scales.dtype} {tuple(scales.shape)}"
            )
