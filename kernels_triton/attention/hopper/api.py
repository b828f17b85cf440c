"""What the Hopper kernels take from Gluon, Triton's language for the hardware itself.

It is experimental and its names move between releases; whatever differs among Triton 3.6 … 3.9 is settled here, and kernels
import Gluon from nowhere else.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin, ir
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from triton.experimental.gluon.language.nvidia.hopper import (  # isort: skip
    fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait,
)

__all__ = [
    "TensorDescriptor", "as_box", "fence_async_shared", "gdc_launch_dependents", "gdc_wait", "gl", "gluon", "mbarrier",
    "new_barriers", "threads_meet", "tma_add", "tma_load", "tma_store", "tma_store_wait", "warpgroup_mma", "warpgroup_mma_wait",
]

tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # removed in 3.9
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
tma_store_wait = tma.store_wait
threads_meet = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # of the partition that calls it


@gluon.jit
def new_barriers(n: gl.constexpr, arrivals: gl.constexpr):
    """n barriers in shared memory, of `arrivals` arrivals each; before other warps see them, threads_meet()."""
    barriers = gl.allocate_shared_memory(gl.int64, [n, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(n):
        mbarrier.init(barriers.index(i), count=arrivals)
    return barriers


if hasattr(gl.shared_memory_descriptor, "reinterpret"):  # 3.9

    @gluon.jit
    def as_box(s, x):
        """A tile in shared memory [rows, D] as the copy engine knows it: a box of the descriptor x, such as [1, rows, 1, D]."""
        return s.reinterpret(x.dtype, x.block_shape, x.layout)

else:

    @gluon.jit
    def as_box(s, x):
        """A tile in shared memory [rows, D] as the copy engine knows it: a box of the descriptor x, such as [1, rows, 1, D]."""
        return s._reinterpret(x.dtype, x.block_shape, x.layout)


if hasattr(tma, "async_atomic_add"):  # 3.9
    tma_add = tma.async_atomic_add
else:

    @builtin
    def tma_add(tensor_desc, coord, src, _semantic=None):
        """Have the copy engine add a tile in shared memory to the one at coord: 3.6 can, but has no name for it."""
        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle)
