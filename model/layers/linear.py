"""The matrix product every layer uses: an fp32 master weight, rounded to whatever the activations are.

This replaces autocast. The optimizer always sees fp32; the product runs in the dtype of its input; nothing decides in
between. Without more, a weight is cast wherever it is used. While a model is trained in bf16 each has a copy in that
dtype beside it (`LanguageModel.keep_copies`), which the optimizer writes together with the master: same numbers, no
cast. Gradients are made in fp32, for the master (kernels_torch/masters.py). There are no biases anywhere in this
project.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from kernels_torch.masters import adding_in_place as adding_in_place  # for whoever calls backward
from kernels_torch.masters import of_masters, values_and_owners, weight_gradient
from kernels_torch.quantised_weight import CODES, dequantise
from model.ops import Ops

if TYPE_CHECKING:
    from model.layers.fp8 import Fp8Layers


class Master(nn.Module):
    """A module with one fp32 weight, and perhaps a copy of it in the dtype that the model computes in.

    A model that only reads may have codes instead (kernels_torch/quantised_weight.py): then the weight is nothing but a
    shape.
    """

    def __init__(self, n_rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_rows, width, dtype=torch.float32))
        self.register_buffer("copy", None, persistent=False)  # follows from the weight: not in checkpoints
        for name in ("codes", "scales"):
            self.register_buffer(name, None, persistent=False)

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`: the copy where there is one in it, else cast, or made of the codes, here and now."""
        if self.codes is None and (self.copy is None or self.copy.dtype != dtype):
            return self.weight.to(dtype)
        value, master = self.with_master(dtype)
        return of_masters([value], [master])[0] if torch.is_grad_enabled() else value

    def with_master(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The weight in `dtype`, without a way back, and what its gradient belongs to."""
        if self.codes is not None:
            value = dequantise(self.codes, self.scales, self.weight.shape[1], dtype)
            return value, value
        if self.copy is None or self.copy.dtype != dtype:
            return self.weight.detach().to(dtype), self.weight
        return self.copy, self.weight

    def keep_copy(self, dtype: torch.dtype) -> None:
        """From now on have a copy; whoever changes the weight must change it, too."""
        self.copy = self.weight.detach().to(dtype)

    def take_codes(self, codes: Tensor, scales: Tensor) -> None:
        """Have codes in the place of the weight, which is given up."""
        self.codes, self.scales, self.copy = codes, scales, None
        self.weight = nn.Parameter(self.weight.detach().to("meta"), requires_grad=False)

    def operands(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """What `linear_decode` takes: the weight in `dtype` and None, or codes and scales."""
        return (self.weight_in(dtype), None) if self.codes is None else (self.codes, self.scales)

    def extra_repr(self) -> str:
        form = "" if self.codes is None else f", {CODES[self.codes.dtype]}"
        return f"{self.weight.shape[0]} × {self.weight.shape[1]}{form}"


class Linear(Master):
    """y = x Wᵀ, with W [n_out, n_in] in the dtype of x.

    fp8   those it shares its input with, in a model that is trained with 8-bit products (model/layers/fp8.py)
    """

    fp8: "Fp8Layers | None" = None

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_out, n_in)

    def forward(self, x: Tensor) -> Tensor:
        return products(x, self)[1]

    def decode(self, ops: Ops, x: Tensor, **options: object) -> Tensor:
        """The product of few rows, with what ops.linear_decode can do before and after it."""
        return ops.linear_decode(x, *self.operands(x.dtype), **options)


def with_masters(dtype: torch.dtype, *layers: Master) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The weights of all layers in `dtype`, and what their gradients belong to."""
    weights, masters = zip(*(layer.with_master(dtype) for layer in layers))
    return weights, masters


class _Products(torch.autograd.Function):
    """Several products of one input: its gradient is their sum, added up where the products end.

    Left to itself autograd makes each share whole and adds them in passes of their own, and for the first channels,
    which go elsewhere as well, it fills an input's worth of zeros.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, n_first: int, *both: Tensor) -> tuple[Tensor | None, ...]:
        """both: the weights, and then the owners of their gradients"""
        weights, ctx.owners = both[: len(both) // 2], both[len(both) // 2 :]
        ctx.save_for_backward(x, *weights)
        ctx.set_materialize_grads(False)
        first = x[..., :n_first].contiguous() if n_first > 0 else None
        return first, *(F.linear(x, weight) for weight in weights)

    @staticmethod
    def backward(ctx: FunctionCtx, d_first: Tensor | None, *ds: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        needs_dx, needs_dw = ctx.needs_input_grad[0], ctx.needs_input_grad[2 + len(weights) :]
        twice = torch.is_grad_enabled()  # this is differentiated again, so nothing in place
        rows, dx, dws = x.flatten(0, -2), None, []
        for d, weight, owner, needed in zip(ds, weights, ctx.owners, needs_dw, strict=True):
            d = None if d is None else d.flatten(0, -2)
            if needed and d is not None:
                dws.append(d.t() @ rows if twice else weight_gradient(d, rows, owner))
            else:
                dws.append(None)
            if needs_dx and d is not None:
                dx = d @ weight if dx is None else dx.addmm(d, weight) if twice else dx.addmm_(d, weight)
        if needs_dx and d_first is not None:
            first = d_first.flatten(0, -2)
            n = first.shape[1]
            if dx is None or twice:
                dx = F.pad(first, (0, rows.shape[1] - n)) + (0 if dx is None else dx)
            else:
                dx[:, :n] += first
        return None if dx is None else dx.view_as(x), None, *(None for _ in weights), *dws


def products(x: Tensor, *layers: "Linear", n_first: int = 0) -> list[Tensor | None]:
    """What each layer makes of x, and before them the first channels of x if some are wanted."""
    fp8 = layers[0].fp8
    if fp8 is not None and torch.is_grad_enabled():
        return list(fp8.products(x, n_first))
    weights, masters = with_masters(x.dtype, *layers)
    if torch.is_grad_enabled():
        return list(_Products.apply(x, n_first, *values_and_owners(weights, masters)))
    return [x[..., :n_first] if n_first > 0 else None, *(F.linear(x, weight) for weight in weights)]


Operands = tuple[Tensor, Tensor | None]  # of ops.linear_decode: a weight, or its codes and their scales


def side_by_side(*layers: "Linear") -> Operands:
    """One weight of which those of the layers are parts from now on: a single product of few rows reads all of it."""
    names = ("codes", "scales") if layers[0].codes is not None else ("weight",)
    wholes = []
    for name in names:
        parts = [getattr(layer, name).data for layer in layers]
        wholes.append(torch.cat(parts))
        for layer, part in zip(layers, wholes[-1].split([len(part) for part in parts]), strict=True):
            getattr(layer, name).data = part
    return wholes[0], wholes[1] if len(wholes) == 2 else None


class Embedding(Master):
    """Rows of an fp32 table, looked up exactly and then cast: a table in bf16 would lose its small updates.

    Only a table that is the head as well has a copy, for that use.
    """

    def __init__(self, ops: Ops, n_rows: int, width: int) -> None:
        super().__init__(n_rows, width)
        self.ops = ops

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        return self.ops.embedding(tokens, self.weight, dtype)
