"""Keys and values in 8 bits inside kernels (kernels_torch/quantised_cache.py): from numbers to codes, and back.

fp8 is handled as its bits, which every GPU can: not every one has instructions for it. Codes become numbers in registers,
so what comes from memory is half of what bf16 would be, and four bytes for each head of a token.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels_torch.quantised_cache import LEAST, as_bytes
from kernels_triton.linear_decode import _values as numbers_of  # noqa: F401  int8, or e4m3 as bits, to fp32

TOO_SMALL = tl.constexpr(LEAST)


@triton.jit
def scale_and_inverse(b_top, b_nan, kind: tl.constexpr):
    """Of vectors whose largest absolute value is b_top; b_nan is 0, or NaN where a value is not finite."""
    LARGEST: tl.constexpr = 127.0 if kind == tl.int8 else 448.0
    return b_top / LARGEST + b_nan, tl.where(b_top > TOO_SMALL, LARGEST / tl.maximum(b_top, TOO_SMALL), 0.0)


@triton.jit
def codes_of(b_units, kind: tl.constexpr):
    """Numbers in units of their scale, to the nearest code; what is no number becomes 0, since its scale says so."""
    b_units = tl.where(b_units == b_units, b_units, 0.0)
    if kind == tl.int8:
        return tl.floor(b_units + 0.5).to(tl.int8)
    else:  # e4m3: as fp32 whose exponents begin 120 lower, cut to three digits, to the nearest and ties to even
        b_bits = (b_units.to(tl.float32) * 7.52316384526264e-37).to(tl.int32, bitcast=True)
        b_size = b_bits & 0x7FFFFFFF
        b_size = (b_size + 0x7FFFF + ((b_size >> 20) & 1)) >> 20
        return (b_size | ((b_bits >> 24) & 0x80)).to(tl.uint8)


def as_read(pages: Tensor, scales: Tensor | None) -> Tensor:
    """Pages as a kernel takes them."""
    return pages if scales is None else as_bytes(pages)


def scale_arguments(k_scales: Tensor | None, v_scales: Tensor | None) -> dict[str, object]:
    """Scales [P, page, Hkv] and their strides, for a kernel; of pages of numbers there are none."""
    (kp, ks, kh), (vp, vs, vh) = ((0, 0, 0) if scales is None else scales.stride() for scales in (k_scales, v_scales))
    return dict(
        k_scales=k_scales, v_scales=v_scales, stride_ksp=kp, stride_kss=ks, stride_ksh=kh,
        stride_vsp=vp, stride_vss=vs, stride_vsh=vh,
    )
