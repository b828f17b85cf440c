"""AdamW on many tensors at once."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels_torch.checks import check_devices


class AdamWRates(NamedTuple):
    """The numbers of one step: learning rate, number of this step (1, 2, …), decays of the averages, ε and decay.

    on_device    [6] fp64: the same in that order, on the device of the tensors. Given, learning rate and step are read
                 there when the operation runs, so that a captured CUDA graph follows them
    """

    lr: float
    step: int
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    on_device: Tensor | None = None


Tensors = Tensor | Sequence[Tensor]


def adamw_update(
    params: Tensors,
    grads: Tensors,
    exp_avg: Tensors,
    exp_avg_sq: Tensors,
    rates: AdamWRates | Sequence[AdamWRates],
    *,
    copies: Sequence[Tensor | None] | None = None,
    in_place: bool = False,
) -> tuple[Tensors, Tensors, Tensors, Tensor]:
    """p ← p (1 − η λ);   m ← β₁ m + (1 − β₁) g;   v ← β₂ v + (1 − β₂) g²
    p ← p − η / (1 − β₁ᵗ) · m / (√(v / (1 − β₂ᵗ)) + ε)

    params       p: a tensor or several
    grads        g: of the same shapes
    exp_avg      m: of the same shapes, fp32 (fp64 for fp64), as exp_avg_sq v
    rates        of all tensors, or of each
    copies       tensors of another dtype that the new parameters are written to as well, one or None for each
    in_place     p, m and v are written where they were
    → p, m and v, as they came, and the sum of g² of each tensor [number of tensors]
    """
    ps, gs, ms, vs, each = check_adamw_update(params, grads, exp_avg, exp_avg_sq, rates)
    if in_place:
        _update_in_place(ps, gs, ms, vs, each)
    else:
        ps, ms, vs = map(list, zip(*(_adamw(*tensors) for tensors in zip(ps, gs, ms, vs, each))))
    for copy, p in zip(copies or (), ps):
        if copy is not None:
            copy.copy_(p)
    squares = torch.stack([g.to(m.dtype).square().sum() for g, m in zip(gs, ms)])
    if isinstance(params, Tensor):
        return (params if in_place else ps[0]), ms[0], vs[0], squares
    return (params if in_place else ps), ms, vs, squares


def _adamw(p: Tensor, g: Tensor, m: Tensor, v: Tensor, rates: AdamWRates) -> tuple[Tensor, Tensor, Tensor]:
    """The formula on one tensor."""
    lr, step = rates.lr, rates.step
    if rates.on_device is not None:
        lr, step = rates.on_device[0].to(m.dtype), rates.on_device[1].to(m.dtype)
    x, g = p.to(m.dtype), g.to(m.dtype)
    m = m.lerp(g, 1 - rates.beta1)
    v = v * rates.beta2 + (1 - rates.beta2) * g.square()
    root = (v / (1 - rates.beta2**step)).sqrt() + rates.eps
    x = x * (1 - lr * rates.weight_decay) - lr / (1 - rates.beta1**step) * m / root
    return x.to(p.dtype), m, v


def _update_in_place(
    ps: list[Tensor], gs: list[Tensor], ms: list[Tensor], vs: list[Tensor], each: Sequence[AdamWRates]
) -> None:
    """The same by PyTorch's fused kernel, once for all tensors that have the same rates: one pass over memory."""
    targets = [ps, ms, vs]
    own = [[x.detach().to(m.dtype).contiguous() for x, m in zip(tensors, ms)] for tensors in targets]
    gs = [g.to(m.dtype).contiguous() for g, m in zip(gs, ms)]
    for rates in {tuple(rates[:6]): rates for rates in each}.values():
        mine = [i for i, other in enumerate(each) if other[:6] == rates[:6] and ps[i].numel() > 0]
        if not mine:
            continue
        lr, step = rates.lr, torch.full((), float(rates.step), device=ps[0].device)
        if rates.on_device is not None:
            lr, step = rates.on_device[0].float(), rates.on_device[1].float()
        x, g, m, v = ([tensors[i] for i in mine] for tensors in (own[0], gs, own[1], own[2]))
        torch._fused_adamw_(
            x, g, m, v, [], [step] * len(mine), lr=lr, beta1=rates.beta1, beta2=rates.beta2,
            weight_decay=rates.weight_decay, eps=rates.eps, amsgrad=False, maximize=False,
        )  # fmt: skip
    for tensors, news in zip(targets, own):
        for target, new in zip(tensors, news):
            if new.dtype != target.dtype or not target.is_contiguous():
                target.copy_(new)


def check_adamw_update(
    params: Tensors, grads: Tensors, exp_avg: Tensors, exp_avg_sq: Tensors, rates: AdamWRates | Sequence[AdamWRates]
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[AdamWRates]]:
    """Refuse what `adamw_update` cannot mean. → all as equally long lists"""
    ps, gs, ms, vs = ([x] if isinstance(x, Tensor) else list(x) for x in (params, grads, exp_avg, exp_avg_sq))
    each = [rates] * len(ps) if isinstance(rates, AdamWRates) else list(rates)
    if not len(ps) == len(gs) == len(ms) == len(vs) == len(each) > 0:
        raise ValueError(
            f"as many gradients, averages and rates as parameters are needed, got {len(gs)}, {len(ms)}, {len(vs)} and "
            f"{len(each)} for {len(ps)}"
        )
    for p, g, m, v in zip(ps, gs, ms, vs):
        if not p.shape == g.shape == m.shape == v.shape:
            shapes = [tuple(x.shape) for x in (g, m, v)]
            raise ValueError(f"gradient and averages of a parameter {tuple(p.shape)} must have its shape, got {shapes}")
        if m.dtype != v.dtype or m.dtype not in (torch.float32, torch.float64) or not g.is_floating_point():
            raise ValueError(f"averages must be fp32 or fp64 and gradients floating-point, got {m.dtype} and {g.dtype}")
        check_devices(params=p, grads=g, exp_avg=m, exp_avg_sq=v)
    for own in each:
        if own.on_device is not None and own.on_device.device != ps[0].device:
            raise ValueError(f"rates must be on {ps[0].device} like params, got {own.on_device.device}")
    return ps, gs, ms, vs, each
