"""The kernels of kernels_triton that every GPU runs, of ops that have others for Hopper, under the names of their ops.

`kernels=triton kernels.attention=triton_portable` takes attention's.
"""

from kernels_triton.attention import attention_portable as attention

__all__ = ["attention"]
