"""What the kernels' autograd functions share."""

from collections.abc import Callable
from functools import wraps

import torch
from torch.autograd.function import FunctionCtx


def differentiable_once(backward: Callable) -> Callable:
    """A backward pass that has no derivative of its own, and says so when one is asked for with create_graph=True.

    PyTorch's once_differentiable raises only where a second derivative is taken by .backward(); torch.autograd.grad of a
    loss that has another path to the input would leave it out without a word.
    """

    @wraps(backward)
    def wrapper(ctx: FunctionCtx, *grads: object) -> object:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("Triton kernels have no second derivatives (create_graph=True): take kernels=torch for them")
        with torch.no_grad():
            return backward(ctx, *grads)

    return wrapper
