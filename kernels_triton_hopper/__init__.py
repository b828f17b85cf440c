"""The kernels of kernels_triton that only Hopper GPUs run, under the names of their ops.

`kernels=triton kernels.attention=triton_hopper` takes attention's. `kernels=triton` alone does not choose them before
the tests have run on them as they are now.
"""

from kernels_triton.attention import attention_hopper as attention

__all__ = ["attention"]
