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
