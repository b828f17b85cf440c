"""Maths that several kernels repeat, each function beside its derivative. Blocks in, blocks out, nothing of memory."""

import triton
import triton.language as tl


@triton.jit
def upcast(x):
    """What arithmetic is done in: fp32, or fp64 for fp64."""
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def relu2(z):
    """relu(z)², NaN where z is."""
    r = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return r * r


@triton.jit
def relu2_grad(dy, y):
    """dz from y = relu2(z): the root of y is relu(z), so z itself need not be kept."""
    return dy * 2.0 * tl.sqrt(y)


@triton.jit
def silu(z):
    """z · sigmoid(z)"""
    return z * tl.sigmoid(z)


@triton.jit
def silu_grad(dy, z):
    """dz of y = silu(z)"""
    s = tl.sigmoid(z)
    return dy * s * (1.0 + z * (1.0 - s))


@triton.jit
def tanh(u, FAST: tl.constexpr):
    """FAST: the hardware's, off by 2⁻¹¹ of the result: a quarter of what rounding u to bf16 may cost.

    Else u less a continued fraction up to ½, where the quotient of 1 ∓ exp(−2u) would lose digits: right to fp64's last bit.
    """
    if FAST:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1)
    u_2, u_a = u * u, tl.abs(u)
    less = (45045 + u_2 * (2772 + 27 * u_2)) / (135135 + u_2 * (62370 + u_2 * (3150 + 28 * u_2)))
    e = tl.exp(-2 * u_a)
    large = (1 - e) / (1 + e)
    return tl.where(u_a < 0.5, u - u * u_2 * less, tl.where(u < 0, -large, large))


@triton.jit
def tanh_grad(dy, y):
    """du from y = tanh(u)"""
    return dy * (1.0 - y * y)
