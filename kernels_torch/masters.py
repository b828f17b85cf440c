"""Gradients of weights: they belong to the fp32 masters, and are added up where they are made.

Products read a weight in the dtype of the activations, and that is a rounding of a parameter, its master. Who has both
at hand makes the gradient for the master at once: the product dᵀ x sums in fp32 anyway, and to store it in fp32 is
cheaper than to round it and to cast it back. An op is given the master beside the weight for that; without one the
weight itself gets the gradient, in its own dtype.

A step of several micro-batches adds their gradients. Autograd does so in a pass of its own: it reads both and writes
the sum. Inside of `adding_in_place` a product adds to what the parameter has instead, in fp32 and where the sum is in
registers. It takes that gradient away from the parameter for the time being and returns it to autograd, which finds
none and takes it over as it is: hooks fire as ever, and memory stays where it was.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kernels_torch.checks import check_devices

# Parameters with the gradients that were taken for adding; None: nobody may. Autograd's threads must see it.
_taken: list[tuple[Tensor, Tensor]] | None = None


@contextmanager
def adding_in_place() -> Iterator[None]:
    """A backward pass that adds to gradients: for `.backward()` alone, because torch.autograd.grad asks for shares."""
    global _taken
    assert _taken is None, "one backward pass at a time"
    _taken = []
    try:
        yield
    finally:
        taken, _taken = _taken, None
        for parameter, total in taken:
            moved = parameter.grad is not None and parameter.grad.data_ptr() != total.data_ptr()
            if moved:  # autograd added another share, of a weight with two uses, in memory of its own
                total.copy_(parameter.grad)
            parameter.grad = total


def adds_in_place() -> bool:
    """Whether a backward pass may add to gradients; what torch.compile makes never does."""
    return not torch.compiler.is_compiling() and _taken is not None


def take_gradient(owner: Tensor) -> Tensor | None:
    """What a parameter has gathered, to be added to and returned from a backward pass; None: make a new one."""
    if not adds_in_place() or not owner.is_leaf or owner.grad is None:
        return None
    total = owner.grad
    if total.dtype != owner.dtype or not total.is_contiguous():
        return None
    owner.grad = None
    _taken.append((owner, total))
    return total.detach()  # a tensor that nobody else holds, or autograd would make a copy


def weight_gradient(d: Tensor, x: Tensor, owner: Tensor) -> Tensor:
    """dᵀ x for d [N, M] and x [N, K] → [M, K] in the dtype of its owner, perhaps with what that one had before."""
    total = take_gradient(owner)
    return product(d, x, owner.dtype) if total is None else add_product(total, d, x)


def weight_gradients(d: Tensor, x: Tensor, owners: Sequence[Tensor]) -> list[Tensor]:
    """The same for weights one above the other, [ΣM, K] → [M, K] of each; in one product if they have nothing yet."""
    sizes = [len(owner) for owner in owners]
    if not adds_in_place():
        return list(product(d, x, owners[0].dtype).split(sizes))
    return [weight_gradient(part, x, owner) for part, owner in zip(d.split(sizes, dim=1), owners, strict=True)]


def product(d: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dᵀ x, summed and stored in `dtype`."""
    if d.dtype == dtype:
        return torch.mm(d.t(), x)
    if d.device.type == "cuda" and dtype == torch.float32:
        return torch.mm(d.t(), x, out_dtype=dtype)
    return torch.mm(d.t().to(dtype), x.to(dtype))  # CPUs have no product of one dtype summed in another


def add_product(total: Tensor, d: Tensor, x: Tensor, *, beta: float = 1) -> Tensor:
    """total = beta · total + dᵀ x, summed in the dtype of `total`."""
    if d.dtype == total.dtype:
        return torch.addmm(total, d.t(), x, beta=beta, out=total)
    if d.device.type == "cuda" and total.dtype == torch.float32:
        return torch.addmm(total, d.t(), x, out_dtype=total.dtype, beta=beta, out=total)
    return torch.addmm(total, d.t().to(total.dtype), x.to(total.dtype), beta=beta, out=total)


class _OfMaster(torch.autograd.Function):
    """A rounded weight in its master's place: what the weight's gradient is, is the master's."""

    @staticmethod
    def forward(ctx: FunctionCtx, master: Tensor, weight: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: FunctionCtx, d: Tensor) -> tuple[Tensor, None]:
        return d, None  # autograd casts it to the master's dtype, as it does behind a cast


def of_masters(weights: Sequence[Tensor], masters: Sequence[Tensor] | None) -> list[Tensor]:
    """The weights, for autograd made of their masters."""
    if masters is None:
        return list(weights)
    return [_OfMaster.apply(master, weight.detach()) for master, weight in zip(masters, weights, strict=True)]


def values_and_owners(weights: Sequence[Tensor], masters: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
    """All weights without a way back, and behind them those that get the gradients."""
    return *(weight.detach() for weight in weights), *(weights if masters is None else masters)


def check_masters(weights: Sequence[Tensor], masters: Sequence[Tensor] | None) -> None:
    """Refuse what cannot be the masters of these weights."""
    if masters is None:
        return
    shapes, theirs = ([tuple(tensor.shape) for tensor in tensors] for tensors in (weights, masters))
    if shapes != theirs or not all(master.is_floating_point() for master in masters):
        found = ", ".join(f"{master.dtype} {shape}" for master, shape in zip(masters, theirs))
        raise ValueError(f"masters must be floating point {', '.join(map(str, shapes))}, got {found}")
    check_devices(weight=weights[0], **{f"master {i}": master for i, master in enumerate(masters)})
