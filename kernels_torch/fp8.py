"""Linear layers whose three products are of 8-bit floating-point numbers, for training on GPUs that have such products.

    y = x Wᵀ        dx = dy W        dW = dyᵀ x             x and W in e4m3 (3 bits of fraction), dy in e5m2 (2 bits)

One number a tensor, its unit, says what its values are multiples of, x ≈ values · unit: tensorwise scaling,
https://arxiv.org/abs/2209.05433. Here it is a power of two, so that dividing by it loses nothing, and the largest value
lands in the upper half of the format's range. Floating-point formats have range to spare, and that saves passes over
memory: a unit may come from a bound of the values as well, if it is no more than some powers of two above the largest.

    weights             by the largest value, once for each step
    x after a norm      ‖row‖ ≤ √D bounds its values, so nothing is measured. At D = 768 a typical value is 8 units of
                        at most 448, and only below a five-hundredth of that digits are lost to the lower end
    z = x Wᵀ            |z| ≤ ‖row of x‖ · ‖row of W‖ (Cauchy-Schwarz), and the largest row of W is known since the
                        step began. 3 to 4 times what z reaches: relu(z)² loses 4 of its format's 18 powers of two
    dy                  by the largest value, for which it is read once more; so are the norms of its rows
    dz = 2 relu(z) dh   |dh| ≤ ‖row of dy‖ · √D · max |W_down| and the bound of z. 2¹⁷ above a typical value, of the
                        2³² that e5m2 has

So nothing saturates, nothing is remembered from step to step, and a number that is not finite makes a unit NaN, and all
that is computed with it. Hopper's tensor cores read both operands along the dimension they sum over. For dW that is
the tokens', so transposes are needed as well: whoever makes 8-bit numbers writes them both ways. Backward keeps the
transposes only, one byte a value instead of two.

Products go to cuBLAS (torch._scaled_mm) on a GPU. On a CPU they are computed in fp32 from the rounded numbers: to test
the arithmetic. Of the sums those over tokens, the longest, ask for the slower accumulation that keeps every digit.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kernels_torch.checks import check_devices

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TOP = {E4M3: 7, E5M2: 14}  # the largest value has 2^TOP to 2^(TOP + 1) units; both formats end 1.75 times higher
MULTIPLE = 16  # what cuBLAS asks of every dimension


class Fp8(NamedTuple):
    """A matrix [N, D] ≈ values · facts[0]."""

    values: Tensor  # [N, D] e4m3 or e5m2
    turned: Tensor | None  # [D, N], the transpose in one piece
    facts: Tensor  # fp32: the unit, what no row's norm is above, and of weights two more for whoever measures them


def empty_weight(rows: int, columns: int, device: torch.device) -> Fp8:
    """Memory for one weight [rows, columns], or for several one above the other; NaN until it is filled."""
    values, turned = (
        torch.empty(shape, dtype=torch.uint8, device=device).fill_(0x7F).view(E4M3)
        for shape in ((rows, columns), (columns, rows))
    )
    return Fp8(values, turned, torch.full((4,), math.nan, device=device))


def fp8_weights(sources: Sequence[Sequence[Tensor]], weights: Sequence[Fp8]) -> None:
    """Fill each weight with the matrices [M, K] of a group, one above the other, in a unit that they share."""
    for matrices, weight in zip(sources, weights, strict=True):
        stack = torch.cat([matrix.detach().float() for matrix in matrices])
        whole = quantize(stack, E4M3)
        weight.values.copy_(whole.values)
        weight.turned.copy_(whole.turned)
        weight.facts[:2].copy_(whole.facts)


def fp8_linear(
    x: Tensor, masters: Sequence[Tensor], weight: Fp8, *, row_norm: float | None = None, n_first: int = 0
) -> tuple[Tensor, ...]:
    """x Wᵀ for several W at once, which share x forward and its gradient backward.

    x         [..., K], as many rows as a multiple of 16
    masters   the parameters W [M, K], fp32: they get the gradients
    weight    what fp8_weights made of them
    row_norm  what no row's norm is above, if that is known
    n_first   so many channels of x are wanted as they are
    → these channels [..., n_first], and [..., M] for each W, in the dtype of x
    """
    check_linear(x, masters, weight)
    return _Linear.apply(x, row_norm, n_first, *weight, *masters)


def fp8_relu2_mlp(
    x: Tensor, w_up: Tensor, w_down: Tensor, up: Fp8, down: Fp8, *, row_norm: float | None = None
) -> Tensor:
    """relu(x W_upᵀ)² W_downᵀ

    x             [..., D], as many rows as a multiple of 16
    w_up, w_down  the parameters [F, D] and [D, F], fp32: they get the gradients
    up, down      what fp8_weights made of them
    row_norm      what no row's norm is above, if that is known
    → [..., D]
    """
    check_linear(x, (w_up,), up)
    check_linear(x.new_empty(0, w_down.shape[1]), (w_down,), down)
    return _Relu2MLP.apply(x, row_norm, *up, *down, w_up, w_down)


def check_linear(x: Tensor, masters: Sequence[Tensor], weight: Fp8) -> None:
    """Refuse what cannot be multiplied in 8 bits."""
    check_devices(x=x, weight=weight.values, **{f"master {i}": master for i, master in enumerate(masters)})
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"fp8 products take x in fp32, bf16 or fp16, got {x.dtype}")
    rows, columns = sum(len(master) for master in masters), x.shape[-1]
    if any(master.dim() != 2 or master.shape[1] != columns for master in masters):
        shapes = ", ".join(str(tuple(master.shape)) for master in masters)
        raise ValueError(f"weights must be [M, {columns}] for x {tuple(x.shape)}, got {shapes}")
    if tuple(weight.values.shape) != (rows, columns):
        raise ValueError(f"the fp8 weight must be {(rows, columns)}, got {tuple(weight.values.shape)}")
    sizes = {"tokens": x.numel() // max(columns, 1), "columns": columns} | {
        f"rows of weight {i}": len(master) for i, master in enumerate(masters)
    }
    for name, size in sizes.items():
        if size % MULTIPLE != 0:
            raise ValueError(f"fp8 products need multiples of {MULTIPLE} {name}, got {size}")


def unit_of(bound: Tensor, dtype: torch.dtype) -> Tensor:
    """A bound [1] of absolute values, fp32 → the unit: 2^(e − TOP) for 2^e ≤ bound < 2^(e + 1), NaN if not finite."""
    exponent = (bound.view(torch.int32) >> 23) - 127
    unit = (((exponent - TOP[dtype]).clamp(-126, 126) + 127) << 23).view(torch.float32)
    return torch.where(bound.isfinite(), unit, math.nan)


def measure(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest absolute value of x [N, D] and the largest norm of a row, [1] fp32; NaN where x is."""
    if x.numel() == 0:
        return torch.zeros(1, device=x.device), torch.zeros(1, device=x.device)
    x = x.detach().float()
    return x.abs().amax().view(1), x.norm(dim=1, dtype=torch.float64).amax().float().view(1)  # tiny squares count, too


def encode(x: Tensor, unit: Tensor, norm: Tensor, dtype: torch.dtype) -> Fp8:
    """x [N, D] in units. What is not finite becomes NaN, though the formats could hold the largest value instead."""
    largest = torch.finfo(dtype).max
    scaled = torch.where(x.isfinite(), x.float() / unit, math.nan).clamp(-largest, largest)
    values = scaled.to(dtype).contiguous()
    return Fp8(values, turn(values), torch.cat([unit, norm]))


def turn(values: Tensor) -> Tensor:
    """The transpose in one piece; bytes, because not every operation knows 8-bit floating point."""
    return values.view(torch.uint8).t().contiguous().view(values.dtype)


def quantize(x: Tensor, dtype: torch.dtype, row_norm: float | None = None) -> Fp8:
    """x [N, D] by its own largest value, or by a bound of its rows' norms, which is one of its values as well."""
    if row_norm is None:
        largest, norm = measure(x)
    else:
        largest = norm = torch.full((1,), row_norm, device=x.device)
    return encode(x, unit_of(largest, dtype), norm, dtype)


def product(a: Tensor, b: Tensor, facts_a: Tensor, facts_b: Tensor, dtype: torch.dtype, *, fast: bool) -> Tensor:
    """a bᵀ, for a [N, K] and b [M, K] in units → [N, M] in `dtype`. fast: sums may lose some digits on the way."""
    if 0 in (*a.shape, *b.shape):
        return torch.zeros((len(a), len(b)), dtype=dtype, device=a.device)
    if a.device.type == "cuda":
        return torch._scaled_mm(
            a, b.t(), scale_a=facts_a[:1], scale_b=facts_b[:1], out_dtype=dtype, use_fast_accum=fast
        )
    return (torch.mm(a.float(), b.float().t()) * (facts_a[0] * facts_b[0])).to(dtype)


def as_rows(x: Tensor) -> Tensor:
    """[..., D] → [N, D]"""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def hidden_bound(x_norm: Tensor, up_norm: Tensor) -> Tensor:
    """What |z| = |x Wᵀ| is not above; rounding x and W to e4m3 adds an eighth, for which a unit leaves room."""
    return x_norm * up_norm


def hidden_gradient_bound(z_bound: Tensor, dy_norm: Tensor, down_unit: Tensor, width: int) -> Tensor:
    """What |dz| = |2 relu(z) · (dy W_down)| is not above: no value of W_down is more than 2^(TOP + 1) units."""
    return 2 * z_bound * (dy_norm * math.sqrt(width)) * (down_unit * 2.0 ** (TOP[E4M3] + 1))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, row_norm: float | None, n_first: int,
        w: Tensor, w_turned: Tensor, w_facts: Tensor, *masters: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        q = quantize(as_rows(x), E4M3, row_norm)
        ctx.save_for_backward(q.turned, q.facts, w_turned, w_facts)
        ctx.sizes = [len(master) for master in masters]
        y = product(q.values, w, q.facts, w_facts, x.dtype, fast=True)
        parts = (part.contiguous().view(*x.shape[:-1], part.shape[1]) for part in y.split(ctx.sizes, dim=1))
        return x[..., :n_first].contiguous(), *parts

    @staticmethod
    def backward(ctx: FunctionCtx, d_first: Tensor, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x_turned, x_facts, w_turned, w_facts = ctx.saved_tensors
        d = quantize(torch.cat([as_rows(dy) for dy in dys], dim=1), E5M2)
        dx = product(d.values, w_turned, d.facts, w_facts, dys[0].dtype, fast=False)
        dw = product(d.turned, x_turned, d.facts, x_facts, torch.float32, fast=False)
        dx = dx.view(*dys[0].shape[:-1], dx.shape[1])
        dx[..., : d_first.shape[-1]] += d_first
        return dx, None, None, None, None, None, *dw.split(ctx.sizes)


class _Relu2MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, row_norm: float | None, up: Tensor, up_turned: Tensor, up_facts: Tensor,
        down: Tensor, down_turned: Tensor, down_facts: Tensor, w_up: Tensor, w_down: Tensor,
    ) -> Tensor:  # fmt: skip
        q = quantize(as_rows(x), E4M3, row_norm)
        z_bound = hidden_bound(q.facts[1:2], up_facts[1:2])
        z = product(q.values, up, q.facts, up_facts, x.dtype, fast=True)
        a = encode(F.relu(z.float()).square(), unit_of(z_bound.square(), E4M3), z_bound, E4M3)
        ctx.save_for_backward(q.turned, q.facts, a.turned, a.facts, up_turned, up_facts, down_turned, down_facts)
        return product(a.values, down, a.facts, down_facts, x.dtype, fast=True).view(x.shape)

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_turned, x_facts, a_turned, a_facts, up_turned, up_facts, down_turned, down_facts = ctx.saved_tensors
        d = quantize(as_rows(dy), E5M2)
        dh = product(d.values, down_turned, d.facts, down_facts, dy.dtype, fast=False)
        dz = 2 * (a_turned.float().t() * a_facts[0]).sqrt() * dh.float()
        bound = hidden_gradient_bound(a_facts[1:2], d.facts[1:2], down_facts[:1], dy.shape[-1])
        g = encode(dz, unit_of(bound, E5M2), bound, E5M2)
        dx = product(g.values, up_turned, g.facts, up_facts, dy.dtype, fast=False).view(dy.shape)
        dw_up = product(g.turned, x_turned, g.facts, x_facts, torch.float32, fast=False)
        dw_down = product(d.turned, a_turned, d.facts, a_facts, torch.float32, fast=False)
        return dx, *[None] * 7, dw_up, dw_down
