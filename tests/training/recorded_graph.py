"""A CUDA graph on a CPU: what a function does to memory is recorded, operation by operation, and done again on demand.

It is as strict as the real one. Capturing runs nothing: what was overwritten meanwhile is put back. Replaying calls no
Python of the function: the recorded operations read and write the same memory with the same plain numbers as when they
were recorded. A value that the host asks for while it captures is an error.

What ranks exchange is recorded, too, as NCCL's messages are in a CUDA graph: each is done again at its place.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.nonzero.default}


class Recorder(TorchDispatchMode):
    """Notes every operation, its arguments and its results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self.before: list[tuple[Tensor, Tensor]] = []  # what was written to, and what stood there

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in READS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        for tensor in written(func, args, kwargs):
            self.before.append((tensor, tensor.clone()))
        out = run(func, args, kwargs)
        self.calls.append((func, args, kwargs, out))
        return out


def run(func, args: tuple, kwargs: dict):
    """A message is there when this returns: gloo copies some only when it is waited for, which nobody must record."""
    out = func(*args, **kwargs)
    if not is_message(func):
        return out
    dist.Work.unbox(out[-1]).wait()
    arrived = torch.futures.Future()
    arrived.set_result(None)
    return out[0], _create_work_from_future(arrived).boxed()


def written(func, args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors that an operation writes to, by its schema."""
    values = dict(zip((a.name for a in func._schema.arguments), args)) | kwargs
    names = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if is_message(func):  # of which the schema does not say so
        names = [func._schema.arguments[0].name]
    return [x for name in names for x in tree_flatten(values.get(name))[0] if isinstance(x, Tensor)]


class RecordedGraphs:
    """As model.cuda_graphs.CudaGraphs: function → replay."""

    def __init__(self) -> None:
        self.captured = 0
        self.replayed = 0
        self.released = False
        self.operations: list[list[tuple]] = []  # of each graph: (name, shape of its first result)

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1
        with Recorder() as recorder:
            function()
        for tensor, value in reversed(recorder.before):
            with torch.no_grad():
                tensor.detach().copy_(value)
        calls = [call for call in recorder.calls if not is_view(call[0])]
        self.operations.append([(str(func), shape_of(out)) for func, _, _, out in calls])

        def replay() -> None:
            self.replayed += 1
            with torch.no_grad():
                for func, args, kwargs, out in calls:
                    results = run(func, args, kwargs)
                    if not is_message(func) and not func._schema.is_mutable:
                        for old, new in zip(tree_flatten(out)[0], tree_flatten(results)[0]):
                            if isinstance(old, Tensor):
                                old.detach().copy_(new)

        return replay

    def release(self) -> None:
        self.released = True


def shape_of(out: object) -> tuple | None:
    tensors = [x for x in tree_flatten(out)[0] if isinstance(x, Tensor)]
    return tuple(tensors[0].shape) if tensors else None


def is_message(func) -> bool:
    """Whether other ranks take part."""
    return func.namespace == "c10d"


def is_view(func) -> bool:
    """Whether its results are the memory of its arguments, to be found where they were."""
    return not func._schema.is_mutable and any(r.alias_info is not None for r in func._schema.returns)
