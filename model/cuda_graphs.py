"""Functions recorded in CUDA graphs, to be replayed without Python: steps of training and of decoding."""

from collections.abc import Callable

import torch
from torch import Tensor

from errors import KestrelError

Capture = Callable[[Callable[[], None]], Callable[[], None]]  # what a function does, as something to replay


class CudaGraphs:
    """Captures functions as CUDA graphs, all in one pool of memory: what one no longer needs, the next one uses.

    So they must not run at the same time, and what a graph leaves behind lasts until another one runs, unless a tensor
    that lives as long as the program holds it, as parameters hold their gradients.
    """

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs: list[torch.cuda.CUDAGraph] = []

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        self.graphs.append(graph)
        try:
            # thread_local: the thread that makes batches may allocate and copy meanwhile
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                function()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise KestrelError(
                f"this step cannot be captured as a CUDA graph ({reason}): take hardware.cuda_graph=false"
            ) from error
        return graph.replay

    def release(self) -> None:
        """Give up all graphs: NCCL does not leave its group as long as a graph has messages in it."""
        for graph in self.graphs:
            graph.reset()
        self.graphs.clear()


class Unchanged:
    """Puts tensors back to what they were."""

    def __init__(self, *tensors: Tensor) -> None:
        self.before = [(tensor, tensor.clone()) for tensor in tensors]

    def restore(self) -> None:
        for tensor, value in self.before:
            tensor.copy_(value)


def require_alike(replayed: Tensor, eager: Tensor) -> None:
    """Refuse a graph that computes something else than what was recorded, but for rounding; waits for the device."""
    same_nan = bool((replayed.isnan() == eager.isnan()).all())
    off, size = (replayed - eager).nan_to_num().norm(), eager.nan_to_num().norm()
    if not same_nan or not bool(off <= 0.05 * size + 1e-3):
        raise KestrelError(
            "a step recorded as a CUDA graph computes something else than the same step kernel by kernel: "
            "take hardware.cuda_graph=false"
        )
