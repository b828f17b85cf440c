"""The operations of `kernels_torch` that have a Triton kernel, under the same names and signatures."""

import triton

from kernels_triton.linear_cross_entropy import linear_cross_entropy
from kernels_triton.mlp import relu2_mlp, swiglu_mlp
from kernels_triton.rmsnorm import rmsnorm

if triton.knobs.runtime.interpret:
    from kernels_triton import interpreter

    interpreter.mend()

__all__ = ["linear_cross_entropy", "relu2_mlp", "rmsnorm", "swiglu_mlp"]
