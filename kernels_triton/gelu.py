"""GELU:  y = x · Φ(x) = max(x, 0) − |x| · h(|x|),   dx = dy · (Φ(x) + x · φ(x)),   h(t) = erfc(t / √2) / 2 = 1 − Φ(t),
φ(x) = exp(−x² / 2) / √(2π).

Φ(x) is h(−x) left of 0 and 1 − h(x) right of it. In fp32 h is 2 to the power of a polynomial in t, 3e-8 off at most (what
rounding does) and 4e-4 of itself (up to t = 8). That is 18 instructions a value on sm_90, where the usual erf takes 36,
which in bf16 is about all there is time for; and it is closer in the left tail, where 1 + erf(x) cancels. One more keeps
the product finite, so that y of ∞ is ∞, and of −∞ 0; dx is NaN there, as PyTorch's. Backward reads x again.

Every value has one writer, so nothing depends on timing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kernels_torch.checks import check_float
from kernels_triton.autograd import differentiable_once
from kernels_triton.launch import Tile, ceil_div, check_gpu, launch
from kernels_triton.primitives import upcast
from kernels_triton.rows import count_rows, row_stride, with_rows

# Not measured yet. Compiled for sm_90 neither kernel spills in bf16.
FORWARD = Tile(BT=1, BD=2048, warps=4)   # 16 values a thread, two 16-byte loads on their way
BACKWARD = Tile(BT=1, BD=1024, warps=4)  # 8 of x and 8 of dy


@triton.jit
def _upper_tail(b_t):
    """erfc(t / √2) / 2 for t ≥ 0; the polynomial is log2 of it, fitted by minimax of |error| · h / (h + 1e-5) up to t = 8."""
    if b_t.dtype == tl.float64:
        b_h = 0.5 - 0.5 * tl.erf(b_t * 0.7071067811865476)
    else:
        b_h = b_t * -1.9733183728231502e-08 + 6.644807110885814e-07
        b_h = b_h * b_t - 9.313975038370929e-06
        b_h = b_h * b_t + 6.914012853548646e-05
        b_h = b_h * b_t - 0.0002609260213345585
        b_h = b_h * b_t - 2.9257609154024692e-05
        b_h = b_h * b_t + 0.006975056308093757
        b_h = b_h * b_t - 0.052457217901159134
        b_h = b_h * b_t - 0.4592162270716235
        b_h = b_h * b_t - 1.151104660620094
        b_h = tl.exp2(b_h * b_t - 1.0)
    return b_h


@triton.jit
def _gelu_fwd_kernel(x, y, stride_x, D, N, BD: tl.constexpr):
    i_t, i_d = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_d = i_d * BD + tl.arange(0, BD)
    m = (o_d < D) & (i_t * D + o_d < N)
    b_x = upcast(tl.load(x + i_t * stride_x + o_d, mask=m, other=0.0))                                  # [BD]
    b_t = tl.abs(b_x)
    b_y = tl.maximum(b_x, 0.0) - tl.minimum(b_t, 1e30) * _upper_tail(b_t)  # bounded: ∞ · 0 is NaN      # [BD]
    tl.store(y + i_t * D + o_d, b_y.to(y.dtype.element_ty), mask=m)


@triton.jit
def _gelu_bwd_kernel(x, dy, dx, stride_x, stride_dy, D, N, BD: tl.constexpr):
    i_t, i_d = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_d = i_d * BD + tl.arange(0, BD)
    m = (o_d < D) & (i_t * D + o_d < N)
    b_x = upcast(tl.load(x + i_t * stride_x + o_d, mask=m, other=0.0))                                  # [BD]
    b_dy = upcast(tl.load(dy + i_t * stride_dy + o_d, mask=m, other=0.0))                               # [BD]
    b_h = _upper_tail(tl.abs(b_x))
    b_phi = tl.exp2(b_x * b_x * -0.7213475204444817) * 0.3989422804014327
    b_dx = b_dy * (tl.where(b_x < 0, b_h, 1.0 - b_h) + b_x * b_phi)                                     # [BD]
    tl.store(dx + i_t * D + o_d, b_dx.to(dx.dtype.element_ty), mask=m)


def rows_of(BD: int, *tensors: Tensor) -> tuple[int, int, list[int]]:
    """Number and length of rows, and how far they lie apart in each tensor. All in one piece: rows of BD, the last short."""
    x = tensors[0]
    if all(t.is_contiguous() for t in tensors):
        return ceil_div(x.numel(), BD), BD, [BD for _ in tensors]
    return count_rows(x), x.shape[-1], [row_stride(t) for t in tensors]


def _gelu_fwd(x: Tensor) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() > 0:
        BD = FORWARD.BD
        T, D, (stride_x,) = rows_of(BD, x)
        launch(
            _gelu_fwd_kernel, (T, ceil_div(D, BD)), x=x, y=y, stride_x=stride_x, D=D, N=x.numel(), BD=BD,
            num_warps=FORWARD.warps,
        )
    return y


def _gelu_bwd(x: Tensor, dy: Tensor) -> Tensor:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() > 0:
        BD = BACKWARD.BD
        T, D, (stride_x, stride_dy) = rows_of(BD, x, dy)
        launch(
            _gelu_bwd_kernel, (T, ceil_div(D, BD)), x=x, dy=dy, dx=dx, stride_x=stride_x, stride_dy=stride_dy, D=D,
            N=x.numel(), BD=BD, num_warps=BACKWARD.warps,
        )
    return dx


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        rows = with_rows(x)
        ctx.save_for_backward(rows)
        y = _gelu_fwd(rows)
        return y if rows is x else y.view(x.shape)

    @staticmethod
    @differentiable_once
    def backward(ctx: FunctionCtx, dy: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        dx = _gelu_bwd(rows, with_rows(dy))
        return dx if rows.shape == dy.shape else dx.view(dy.shape)


def gelu(x: Tensor) -> Tensor:
    """kernels_torch.gelu, in one pass. Arguments: see kernels_torch.gelu."""
    check_float("gelu", x)
    check_gpu(x=x)
    return _GELU.apply(x)
