"""Muon and AdamW as one optimizer, for one process or many, its state shared out among them.

There is no DistributedDataParallel: every rank holds all parameters and the gradients of its own batch, and a step is

    1  start averaging every group's gradients over the ranks        each rank receives only the rows it owns
    2  per group: wait, update the owned rows, start collecting      momentum and variance exist only for owned rows
    3  wait for every group's updated rows and copy them back

which is ZeRO-2's memory for the price of an all-reduce. One process is the same code: it owns all rows and what it
would send is returned to it (optim/sharding.py). Clipping and fp16 must know the norm of all gradients before the first
parameter moves; only then do all waits come before the first update.

Arithmetic and state are fp32 whatever a parameter is stored in: in bf16 a moving average with 1 − β₂ = 0.005 stalls at
61% of a constant signal. The state leaves this class as whole tensors named after their parameters, so it can be saved
on two ranks and loaded on one or three.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from errors import KestrelError
from optim import orthogonalise
from optim.sharding import Ranks

# Fewer numbers than this are cheaper to average everywhere than to hand out.
REPLICATED_BELOW = 1024

Spec = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass
class StepResult:
    grad_norm: Tensor  # 0-d, on the device: norm of the averaged, unscaled gradients before clipping
    skipped: bool  # a gradient was not finite (only looked for when inv_scale is given); nothing changed


class MuonAdamW:
    """Updates the groups of `parameter_groups`; every parameter must have a gradient at every step."""

    def __init__(
        self,
        groups: list[dict],
        newton_schulz: Callable[..., Tensor],
        *,
        compute_dtype: torch.dtype = torch.float32,
        process_group: "torch.distributed.ProcessGroup | None" = None,
    ) -> None:
        """
        groups          from parameter_groups
        newton_schulz   the op: (stack [K, r, c], dtype=…) → stack, orthogonalised
        compute_dtype   the model's; Muon iterates in bf16 only if it is bf16, else in fp32
        process_group   None: all ranks, if torch.distributed is initialised
        """
        self.ranks = Ranks(process_group)
        muon_dtype = torch.bfloat16 if compute_dtype == torch.bfloat16 else torch.float32
        self.groups = [
            MuonGroup(group, self.ranks, newton_schulz, muon_dtype)
            if group["kind"] == "muon"
            else AdamWGroup(group, self.ranks)
            for group in groups
        ]
        self.steps = 0

    @torch.no_grad()
    def step(
        self,
        lr_mult: float,
        momentum: float,
        weight_decay_mult: float,
        *,
        inv_scale: float | None = None,
        grad_clip: float = 0.0,
    ) -> StepResult:
        """One update. The gradients are used up: zero_grad before the next backward.

        lr_mult            multiplies every group's learning rate
        momentum           Muon's
        weight_decay_mult  multiplies Muon's decay; AdamW's is constant
        inv_scale          1 / the fp16 loss scale; given, a gradient that is not finite skips the step on all ranks.
                           None: not scaled, not looked at, no wait for the device
        grad_clip          largest norm of all gradients together; 0: no clipping
        """
        for group in self.groups:
            group.start_reduce()
        grad_norm = None
        if inv_scale is not None or grad_clip > 0:
            grad_norm, factor = self._norm_and_factor(1.0 if inv_scale is None else inv_scale, grad_clip)
            if inv_scale is not None and not grad_norm.isfinite().item():
                return StepResult(grad_norm, skipped=True)
            for group in self.groups:
                group.scale_gradients(factor)
        self.steps += 1
        for group in self.groups:
            group.wait_reduce()
            group.update(lr_mult, momentum, weight_decay_mult)
            group.start_gather()
        for group in self.groups:
            group.wait_gather()
        return StepResult(self._grad_norm() if grad_norm is None else grad_norm, skipped=False)

    def _norm_and_factor(self, inv_scale: float, grad_clip: float) -> tuple[Tensor, Tensor]:
        """Norm of the unscaled gradients, and what to multiply the scaled ones with: min(1, clip / norm) / scale."""
        for group in self.groups:
            group.wait_reduce()
        norm = self._grad_norm() * inv_scale
        clip = (grad_clip / (norm + 1e-6)).clamp(max=1.0) if grad_clip > 0 else torch.ones_like(norm)
        return norm, clip * inv_scale

    def _grad_norm(self) -> Tensor:
        """Norm of the averaged gradients over all groups and ranks; the squares were summed when they arrived."""
        return self.ranks.sum(torch.stack([group.squared_norm for group in self.groups]).sum()).sqrt()

    def zero_grad(self) -> None:
        for group in self.groups:
            for p in group.params:
                p.grad = None

    def state_spec(self) -> Spec:
        """Name → (shape, dtype) of everything state_tensors returns, without gathering it."""
        spec = {"step": ((), torch.int64)}
        for group in self.groups:
            spec |= group.state_spec()
        return spec

    @torch.no_grad()
    def state_tensors(self) -> dict[str, Tensor]:
        """The whole state as CPU copies, the same for any number of ranks. All ranks must call; rank 0 gets it.

        The others get an empty dict: only one rank writes checkpoints, and the host may not hold a copy for each.
        """
        tensors = {"step": torch.tensor(self.steps)}
        for group in self.groups:
            for name, tensor in group.gather_state():
                if self.ranks.rank == 0:
                    tensors[name] = tensor.to("cpu", copy=True)
        return tensors if self.ranks.rank == 0 else {}

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take over what state_tensors returned, on any number of ranks. Every rank passes the whole state."""
        check_state(tensors, self.state_spec())
        self.steps = int(tensors["step"])
        for group in self.groups:
            group.load_state(tensors, self.steps)


def check_state(tensors: dict[str, Tensor], spec: Spec) -> None:
    """Refuse a state that was saved from other parameters."""
    missing, unknown = sorted(spec.keys() - tensors.keys()), sorted(tensors.keys() - spec.keys())
    if missing or unknown:
        raise KestrelError(
            f"the saved optimizer state belongs to another model or optimizer: {len(missing)} tensors are missing "
            f"{missing[:3]}, {len(unknown)} are unknown {unknown[:3]}; resume with the run's own model and optim keys"
        )
    for name, (shape, dtype) in spec.items():
        got = tensors[name]
        if tuple(got.shape) != tuple(shape) or got.dtype != dtype:
            raise KestrelError(
                f"optimizer state {name} is {tuple(got.shape)} {got.dtype} but this model needs {shape} {dtype}; "
                "resume with the run's own model and optim keys"
            )


class Group:
    """Parameters of one rule. Subclasses say which rows a rank owns, how they move and what they remember."""

    def __init__(self, group: dict, ranks: Ranks) -> None:
        assert len(group["params"]) == len(group["names"]) > 0, group
        self.names, self.params, self.ranks = group["names"], group["params"], ranks
        self.lr, self.weight_decay = group["lr"], group["weight_decay"]
        self.device = self.params[0].device
        self.arrived: Callable[[], list[Tensor]] | None = None  # waits for the averaged gradients
        self.grads: list[Tensor] = []  # of the owned rows, averaged, fp32
        self.squared_norm = torch.zeros((), device=self.device)  # this rank's part of it

    def local_gradients(self) -> list[Tensor]:
        for name, p in zip(self.names, self.params):
            assert p.grad is not None, f"{name} has no gradient: every parameter must take part in the loss"
        return [p.grad for p in self.params]

    def wait_reduce(self) -> None:
        if self.arrived is not None:
            self.grads = [g.float() for g in self.arrived()]
            self.arrived = None
            self.squared_norm = squared_norm(self.counted_gradients(), self.device)

    def counted_gradients(self) -> list[Tensor]:
        """The gradients that this rank adds to the norm over all ranks."""
        return self.grads

    def scale_gradients(self, factor: Tensor) -> None:
        if self.grads:
            torch._foreach_mul_(self.grads, factor)


def squared_norm(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Σ x² over all tensors; a rank that owns no rows has none."""
    tensors = [x for x in tensors if x.numel() > 0]
    return torch.stack(torch._foreach_norm(tensors)).square().sum() if tensors else torch.zeros((), device=device)


class AdamWGroup(Group):
    """AdamW with bias correction, t = 1, 2, …:

        p ← p (1 − η λ);   m ← β₁ m + (1 − β₁) g;   v ← β₂ v + (1 − β₂) g²
        p ← p − η / (1 − β₁ᵗ) · m / (√(v / (1 − β₂ᵗ)) + ε)

    done by PyTorch's fused kernel in one pass over memory. Parameters of 1024 numbers and more are shared out by rows;
    smaller ones are averaged and updated on every rank.
    """

    def __init__(self, group: dict, ranks: Ranks) -> None:
        super().__init__(group, ranks)
        self.betas, self.eps = group["betas"], group["eps"]
        self.shared = [p.numel() >= REPLICATED_BELOW for p in self.params]
        self.exp_avg = [torch.zeros_like(p, dtype=torch.float32) for p in self.owned_rows()]
        self.exp_avg_sq = [torch.zeros_like(p, dtype=torch.float32) for p in self.owned_rows()]
        self.t = torch.zeros(len(self.params), device=self.device)  # PyTorch's kernel counts per parameter

    def owned_rows(self) -> list[Tensor]:
        """Views of this rank's rows of every parameter."""
        return [
            p.detach()[self.ranks.share(len(p))] if shared else p.detach()
            for p, shared in zip(self.params, self.shared)
        ]

    def start_reduce(self) -> None:
        grads = self.local_gradients()
        small = self.ranks.average_all([g for g, shared in zip(grads, self.shared) if not shared])
        large = [self.ranks.average_rows(g) for g, shared in zip(grads, self.shared) if shared]

        def wait() -> list[Tensor]:
            smalls, larges = iter(small()), iter(large)
            return [next(larges)() if shared else next(smalls) for shared in self.shared]

        self.arrived = wait

    def counted_gradients(self) -> list[Tensor]:
        return [g for g, shared in zip(self.grads, self.shared) if shared or self.ranks.rank == 0]

    def update(self, lr_mult: float, momentum: float, weight_decay_mult: float) -> None:
        rows = self.owned_rows()
        exact = [p.float() for p in rows]  # rows themselves where they are fp32
        mine = [i for i, p in enumerate(rows) if p.numel() > 0]  # with many ranks some parameters have no row here
        pick = lambda tensors: [tensors[i] for i in mine]
        adamw(
            pick(exact), pick(self.grads), pick(self.exp_avg), pick(self.exp_avg_sq), [], pick(self.t.unbind()),
            fused=True, amsgrad=False, maximize=False, lr=self.lr * lr_mult, beta1=self.betas[0], beta2=self.betas[1],
            weight_decay=self.weight_decay, eps=self.eps,
        )  # fmt: skip
        for p, x in zip(rows, exact):
            if x is not p:
                p.copy_(x)
        self.grads = []

    def start_gather(self) -> None:
        self.gathers = [
            (p, rows, self.ranks.gather_rows(rows, len(p)))
            for p, rows, shared in zip(self.params, self.owned_rows(), self.shared)
            if shared
        ]

    def wait_gather(self) -> None:
        for p, rows, wait in self.gathers:
            whole = wait()
            if whole is not rows:  # with one rank the rows are the parameter
                p.copy_(whole)
        self.gathers = []

    def state_spec(self) -> Spec:
        return {
            f"{name}.{kind}": (tuple(p.shape), torch.float32)
            for name, p in zip(self.names, self.params)
            for kind in ("exp_avg", "exp_avg_sq")
        }

    def gather_state(self) -> Iterator[tuple[str, Tensor]]:
        for i, (name, p) in enumerate(zip(self.names, self.params)):
            for kind, tensor in (("exp_avg", self.exp_avg[i]), ("exp_avg_sq", self.exp_avg_sq[i])):
                yield f"{name}.{kind}", self.ranks.gather_rows(tensor, len(p))() if self.shared[i] else tensor

    def load_state(self, tensors: dict[str, Tensor], steps: int) -> None:
        self.t.fill_(steps)
        for i, name in enumerate(self.names):
            for kind, tensor in (("exp_avg", self.exp_avg[i]), ("exp_avg_sq", self.exp_avg_sq[i])):
                whole = tensors[f"{name}.{kind}"]
                tensor.copy_(whole[self.ranks.share(len(whole))] if self.shared[i] else whole)


class MuonGroup(Group):
    """Muon on K matrices of one shape [r, c], stacked; a rank owns whole matrices.

    M ← μ M + (1 − μ) G;   U ← (1 − μ) G + μ M                      momentum, Nesterov
    X ← newton_schulz(equilibrate_rows(U));   X ← reduce_variance(snap_frobenius(X))
    P ← P − η' X − η' λ P ⊙ [X ⊙ P ≥ 0],   η' = η √max(1, r/c)
    """

    def __init__(self, group: dict, ranks: Ranks, newton_schulz: Callable[..., Tensor], dtype: torch.dtype) -> None:
        super().__init__(group, ranks)
        self.newton_schulz, self.dtype, self.beta2 = newton_schulz, dtype, group["beta2"]
        self.muon_eq, self.muon_plus = group["muon_eq"], group["muon_plus"]
        self.rows, self.columns = self.params[0].shape
        self.mine = ranks.share(len(self.params))
        count = self.mine.stop - self.mine.start
        self.momentum = torch.zeros(count, self.rows, self.columns, device=self.device)
        self.second_moment = torch.zeros(
            count, *orthogonalise.variance_shape(self.rows, self.columns), device=self.device
        )

    def start_reduce(self) -> None:
        average = self.ranks.average_rows(torch.stack(self.local_gradients()))
        self.arrived = lambda: [average()]

    def update(self, lr_mult: float, momentum: float, weight_decay_mult: float) -> None:
        owned = self.params[self.mine]
        (grad,), self.grads = self.grads, []
        self.updated = grad.to(self.params[0].dtype)
        if not owned:
            return  # more ranks than matrices: nothing to do but take part in the gather
        x = self.direction(grad, momentum)
        p = torch.stack([p.detach() for p in owned]).float()
        lr = self.lr * lr_mult * orthogonalise.shape_factor(self.rows, self.columns)
        orthogonalise.descend_(p, x, lr, self.weight_decay * weight_decay_mult)
        self.updated = p.to(owned[0].dtype)

    def direction(self, grad: Tensor, momentum: float) -> Tensor:
        """The update X [K, r, c] before learning rate and decay; advances momentum and variance."""
        self.momentum.lerp_(grad, 1 - momentum)
        u = grad.lerp_(self.momentum, momentum)
        if self.muon_eq:
            u = orthogonalise.equilibrate_rows(u)
        x = self.newton_schulz(u, dtype=self.dtype).float()
        if self.muon_plus:
            x = orthogonalise.snap_frobenius(x)
        return orthogonalise.reduce_variance(x, self.second_moment, self.beta2)

    def start_gather(self) -> None:
        self.gathered = self.ranks.gather_rows(self.updated, len(self.params))

    def wait_gather(self) -> None:
        torch._foreach_copy_(self.params, list(self.gathered().unbind()))
        self.gathered = self.updated = None

    def _state(self) -> list[tuple[str, Tensor]]:
        return [("momentum", self.momentum), ("second_moment", self.second_moment)]

    def state_spec(self) -> Spec:
        return {
            f"{name}.{kind}": (tuple(tensor.shape[1:]), torch.float32)
            for name in self.names
            for kind, tensor in self._state()
        }

    def gather_state(self) -> Iterator[tuple[str, Tensor]]:
        for kind, tensor in self._state():
            whole = self.ranks.gather_rows(tensor, len(self.params))()
            for name, x in zip(self.names, whole):
                yield f"{name}.{kind}", x

    def load_state(self, tensors: dict[str, Tensor], steps: int) -> None:
        for kind, tensor in self._state():
            for x, name in zip(tensor, self.names[self.mine]):
                x.copy_(tensors[f"{name}.{kind}"])
