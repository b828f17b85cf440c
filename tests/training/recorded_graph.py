"""A CUDA graph on a CPU: what a function does to memory is recorded, operation by operation, and done again on demand.

It is as strict as the real one. Capturing runs nothing: what was overwritten meanwhile is put back. Replaying calls no
Python of the function: the recorded operations read and write the same memory with the same plain numbers as when they
were recorded. A value that the host asks for while it captures is an error.
"""

from collections.abc import Callable

import torch
from torch import Tensor
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
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out


def written(func, args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors that an operation writes to, by its schema."""
    values = dict(zip((a.name for a in func._schema.arguments), args)) | kwargs
    names = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [x for name in names for x in tree_flatten(values.get(name))[0] if isinstance(x, Tensor)]


class RecordedGraphs:
    """As model.cuda_graphs.CudaGraphs: function → replay."""

    def __init__(self) -> None:
        self.captured = 0
        self.replayed = 0

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1
        with Recorder() as recorder:
            function()
        for tensor, value in reversed(recorder.before):
            with torch.no_grad():
                tensor.detach().copy_(value)
        calls = [call for call in recorder.calls if not is_view(call[0])]

        def replay() -> None:
            self.replayed += 1
            with torch.no_grad():
                for func, args, kwargs, out in calls:
                    results = func(*args, **kwargs)
                    if not func._schema.is_mutable:
                        for old, new in zip(tree_flatten(out)[0], tree_flatten(results)[0]):
                            if isinstance(old, Tensor):
                                old.detach().copy_(new)

        return replay


def is_view(func) -> bool:
    """Whether its results are the memory of its arguments, to be found where they were."""
    return not func._schema.is_mutable and any(r.alias_info is not None for r in func._schema.returns)
