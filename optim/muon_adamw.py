"""Muon and AdamW as one optimizer, for one process or many, its state shared out among them.

There is no DistributedDataParallel: every rank holds all parameters and the gradients of its own batch, and a step is

    1  average every group's gradients over the ranks, begun bucket  each rank receives only the rows it owns
       by bucket while the backward pass still runs (optim/early.py)
    2  per group: wait, update the owned rows, start collecting      momentum and variance exist only for owned rows
    3  wait for every group's updated rows and copy them back

which is ZeRO-2's memory for the price of an all-reduce. One process is the same code: it owns all rows and what it
would send is returned to it (optim/sharding.py); gradients and parameters stay where they are. Alone on a GPU, what
only moves data, AdamW and Muon before and after Newton-Schulz, runs beside the products of Newton-Schulz. Clipping and
fp16 must know the norm of all gradients before the first parameter moves; only then do all waits come before the first
update.

Arithmetic and state are fp32 whatever a parameter is stored in: in bf16 a moving average with 1 − β₂ = 0.005 stalls at
61% of a constant signal. The state leaves this class as whole tensors named after their parameters, so it can be saved
on two ranks and loaded on one or three.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from errors import KestrelError
from optim.early import EarlyReduction
from optim.sharding import Ranks

# Fewer numbers than this are cheaper to average everywhere than to hand out.
REPLICATED_BELOW = 1024
# Matrices travel together up to this many bytes, or one for each rank: a message of less is mostly waiting.
BUCKET_BYTES = 16 * 2**20

Spec = dict[str, tuple[tuple[int, ...], torch.dtype]]


class UpdateOps(Protocol):
    """The operations a step is made of; `kernels_torch` says what each means."""

    muon_momentum: Callable
    newton_schulz: Callable
    muon_update: Callable
    adamw_update: Callable


@dataclass
class StepResult:
    grad_norm: Tensor  # 0-d, on the device: norm of the averaged, unscaled gradients before clipping
    skipped: bool  # a gradient was not finite (only looked for when inv_scale is given); nothing changed


class MuonAdamW:
    """Updates the groups of `parameter_groups`; every parameter must have a gradient at every step."""

    def __init__(
        self,
        groups: list[dict],
        ops: UpdateOps,
        *,
        compute_dtype: torch.dtype = torch.float32,
        process_group: "torch.distributed.ProcessGroup | None" = None,
        copies: Mapping[str, Tensor] | None = None,
        rates_on_device: bool | None = None,
        reduce_dtype: torch.dtype = torch.float32,
    ) -> None:
        """
        groups          from parameter_groups
        ops             what a step is made of
        compute_dtype   the model's; Muon iterates in bf16 only if it is bf16, else in fp32
        process_group   None: all ranks, if torch.distributed is initialised
        copies          tensors by name of parameter, to be kept equal to it in another dtype
        rates_on_device whether updates read there what changes from step to step, as captured ones must; None: on a GPU
        reduce_dtype    in what large gradients travel between ranks
        """
        self.ranks = Ranks(process_group, reduce_dtype)
        muon_dtype = torch.bfloat16 if compute_dtype == torch.bfloat16 else torch.float32
        adamw = [group for group in groups if group["kind"] == "adamw"]
        muon = [group for group in groups if group["kind"] == "muon"]
        # Alone, one launch updates all; with others, each group's communication hides behind the next one's update.
        adamw = [adamw] if self.ranks.size == 1 and adamw else [[group] for group in adamw]
        copies = copies or {}
        self.groups = [
            *(AdamWGroup(together, self.ranks, ops, copies) for together in adamw),
            *(MuonGroup(group, self.ranks, ops, copies, muon_dtype) for group in muon),
        ]
        device = self.groups[0].device
        on_device = device.type == "cuda" if rates_on_device is None else rates_on_device
        rates = torch.zeros(len(groups), 6, dtype=torch.float64, device=device) if on_device else None
        self.rates = rates
        unused = iter(range(len(groups)))
        for group in self.groups:
            group.place_rates([next(unused) for _ in range(group.n_rates)], rates)
        self.early = EarlyReduction(self.groups, self.ranks) if self.ranks.size > 1 else None
        self.streams = None
        if self.ranks.size == 1 and device.type == "cuda" and muon:
            self.streams = torch.cuda.Stream(device, priority=-1), torch.cuda.Stream(device)
        self.steps = 0

    def expect_last_gradients(self) -> None:
        """The backward pass that comes is a step's last one: what it finishes may be averaged at once."""
        if self.early is not None:
            self.early.arm()

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
        self.set_rates(lr_mult, momentum, weight_decay_mult)
        result = self.update(inv_scale=inv_scale, grad_clip=grad_clip)
        self.steps += not result.skipped
        return result

    def set_rates(self, lr_mult: float, momentum: float, weight_decay_mult: float) -> None:
        """What changes from step to step, for the step after `steps`. On a GPU it lies on the device, where kernels
        read it: a CUDA graph of `update` is replayed after set_rates, and `steps` counted up by hand."""
        rows = [row for g in self.groups for row in g.set_rates(lr_mult, momentum, weight_decay_mult, self.steps + 1)]
        if self.rates is not None:
            self.rates.copy_(torch.tensor(rows, dtype=torch.float64, pin_memory=self.rates.is_cuda), non_blocking=True)

    @torch.no_grad()
    def update(self, *, inv_scale: float | None = None, grad_clip: float = 0.0) -> StepResult:
        """One update at the rates that were set. Without inv_scale the host waits for nothing."""
        if self.early is not None:
            self.early.finish()
        for group in self.groups:
            group.start_reduce()
        grad_norm = None
        if inv_scale is not None or grad_clip > 0:
            grad_norm, factor = self._norm_and_factor(1.0 if inv_scale is None else inv_scale, grad_clip)
            if inv_scale is not None and not grad_norm.isfinite().item():
                return StepResult(grad_norm, skipped=True)
            for group in self.groups:
                group.scale_gradients(factor)
        if self.streams is not None:
            self.update_side_by_side()
        else:
            for group in self.groups:
                group.wait_reduce()
                group.update()
                group.start_gather()
        for group in self.groups:
            group.wait_gather()
        return StepResult(self._grad_norm() if grad_norm is None else grad_norm, skipped=False)

    def update_side_by_side(self) -> None:
        """What `update` does to group after group, on two streams: one group's products beside what moves others' data.

        Products go first where there is room for either. What stages hand on is held until both streams have ended.
        """
        caller, (products, data) = torch.cuda.current_stream(self.groups[0].device), self.streams
        muon = sorted((g for g in self.groups if g.n_stages > 1), key=lambda g: -sum(p.numel() for p in g.params))
        for group in self.groups:
            group.wait_reduce()
        products.wait_stream(caller)
        data.wait_stream(caller)
        begun, multiplied = [], []
        with torch.cuda.stream(data):
            for group in muon:
                group.begin()
                begun.append(data.record_event())
            for group in self.groups:
                if group.n_stages == 1:
                    group.update()
        with torch.cuda.stream(products):
            for group, event in zip(muon, begun):
                products.wait_event(event)
                group.multiply()
                multiplied.append(products.record_event())
        with torch.cuda.stream(data):
            for group, event in zip(muon, multiplied):
                data.wait_event(event)
                group.finish()
        caller.wait_stream(data)
        for group in self.groups:
            group.start_gather()
            group.forget()

    def _norm_and_factor(self, inv_scale: float, grad_clip: float) -> tuple[Tensor, Tensor]:
        """Norm of the unscaled gradients, and what to multiply the scaled ones with: min(1, clip / norm) / scale."""
        for group in self.groups:
            group.wait_reduce()
            group.measure_gradients()
        norm = self._grad_norm() * inv_scale
        clip = (grad_clip / (norm + 1e-6)).clamp(max=1.0) if grad_clip > 0 else torch.ones_like(norm)
        return norm, clip * inv_scale

    def _grad_norm(self) -> Tensor:
        """Norm of the averaged gradients over all groups and ranks; what is clipped is measured before, else the
        updates add up the squares of what they read."""
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
            group.load_state(tensors)


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
    """Parameters of one rule. Subclasses say which rows a rank owns, how they move and what they remember.

    Gradients travel by buckets, lists of parameters by number; `begun` has for each the wait for what arrives.
    """

    n_rates = 1
    n_stages = 1

    def __init__(self, groups: list[dict], ranks: Ranks, ops: UpdateOps, copies: Mapping[str, Tensor]) -> None:
        self.names = [name for group in groups for name in group["names"]]
        self.params = [p for group in groups for p in group["params"]]
        assert len(self.params) == len(self.names) > 0, groups
        self.ranks, self.ops, self.device = ranks, ops, self.params[0].device
        self.copies = [copies.get(name) for name in self.names]
        self.buckets: list[list[int]] = []
        self.begun: dict[int, Callable[[], object]] = {}
        self.grads: list[Tensor] = []  # of the owned rows, averaged
        self.squared_norm = torch.zeros((), device=self.device)  # this rank's part of it

    def local_gradient(self, i: int) -> Tensor:
        grad = self.params[i].grad
        assert grad is not None, f"{self.names[i]} has no gradient: every parameter must take part in the loss"
        return grad

    def reduce(self, bucket: int) -> None:
        """Start averaging a bucket's gradients over the ranks."""
        if bucket not in self.begun:
            self.begun[bucket] = self.average([self.local_gradient(i) for i in self.buckets[bucket]], bucket)

    def start_reduce(self) -> None:
        """Start averaging all that is not on its way yet."""
        for bucket in range(len(self.buckets)):
            self.reduce(bucket)

    def wait_reduce(self) -> None:
        if self.begun:
            arrived = [self.begun[bucket]() for bucket in range(len(self.buckets))]
            self.grads, self.begun = self.owned_gradients(arrived), {}

    def measure_gradients(self) -> None:
        self.squared_norm = squared_norm(self.counted_gradients(), self.device)

    def counted_gradients(self) -> list[Tensor]:
        """The gradients that this rank adds to the norm over all ranks."""
        return self.grads

    def scale_gradients(self, factor: Tensor) -> None:
        self.grads = [g.float() for g in self.grads]
        if self.grads:
            torch._foreach_mul_(self.grads, factor)

    def forget(self) -> None:
        """Let go of what an update no longer needs."""

    def copy_parameters(self) -> None:
        """Bring the copies up to date where no update could write them: it had not all rows."""
        pairs = [(copy, p) for copy, p in zip(self.copies, self.params) if copy is not None]
        if pairs:
            torch._foreach_copy_([copy for copy, _ in pairs], [p.detach() for _, p in pairs])


def squared_norm(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Σ x² over all tensors; a rank that owns no rows has none."""
    tensors = [x.float() for x in tensors if x.numel() > 0]
    return torch.stack(torch._foreach_norm(tensors)).square().sum() if tensors else torch.zeros((), device=device)


class Rates(NamedTuple):
    """What an operation needs to know of one step of AdamW: see kernels_torch.adamw."""

    lr: float
    step: int
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    on_device: Tensor | None = None


class AdamWGroup(Group):
    """AdamW with bias correction on the parameters of some groups: see kernels_torch.adamw.

    Parameters of 1024 numbers and more are shared out by rows; smaller ones are averaged and updated on every rank.
    """

    def __init__(self, groups: list[dict], ranks: Ranks, ops: UpdateOps, copies: Mapping[str, Tensor]) -> None:
        super().__init__(groups, ranks, ops, copies)
        self.parts, self.n_rates = groups, len(groups)
        self.part_of = [i for i, group in enumerate(groups) for _ in group["params"]]
        self.shared = [p.numel() >= REPLICATED_BELOW for p in self.params]
        small = [i for i, shared in enumerate(self.shared) if not shared]
        self.buckets = [[i] for i, shared in enumerate(self.shared) if shared] + ([small] if small else [])
        self.exp_avg = [torch.zeros_like(p, dtype=torch.float32) for p in self.owned_rows()]
        self.exp_avg_sq = [torch.zeros_like(p, dtype=torch.float32) for p in self.owned_rows()]

    def place_rates(self, rows: list[int], rates: Tensor | None) -> None:
        self.on_device = [None if rates is None else rates[row] for row in rows]

    def set_rates(self, lr_mult: float, momentum: float, weight_decay_mult: float, step: int) -> list[tuple]:
        self.rates = [
            Rates(group["lr"] * lr_mult, step, *group["betas"], group["eps"], group["weight_decay"], on_device)
            for group, on_device in zip(self.parts, self.on_device)
        ]
        return [rates[:6] for rates in self.rates]

    def owned_rows(self) -> list[Tensor]:
        """Views of this rank's rows of every parameter."""
        return [
            p.detach()[self.ranks.share(len(p))] if shared else p.detach()
            for p, shared in zip(self.params, self.shared)
        ]

    def average(self, grads: list[Tensor], bucket: int) -> Callable[[], list[Tensor]]:
        if not self.shared[self.buckets[bucket][0]]:
            return self.ranks.average_all(grads)
        wait = self.ranks.average_rows(grads[0])
        return lambda: [wait()]

    def owned_gradients(self, arrived: list[list[Tensor]]) -> list[Tensor]:
        by_number = {i: g for bucket, grads in zip(self.buckets, arrived) for i, g in zip(bucket, grads)}
        return [by_number[i] for i in range(len(self.params))]

    def is_counted(self) -> list[bool]:
        return [shared or self.ranks.rank == 0 for shared in self.shared]

    def counted_gradients(self) -> list[Tensor]:
        return [g for g, counted in zip(self.grads, self.is_counted()) if counted]

    def update(self) -> None:
        *_, squares = self.ops.adamw_update(
            self.owned_rows(), self.grads, self.exp_avg, self.exp_avg_sq, [self.rates[i] for i in self.part_of],
            copies=self.copies if self.ranks.size == 1 and any(c is not None for c in self.copies) else None,
            in_place=True,
        )  # fmt: skip
        counted = self.is_counted()
        if not all(counted):
            mine = [x for x, is_counted in zip(squares, counted) if is_counted]
            squares = torch.stack(mine) if mine else squares.new_zeros(1)
        self.squared_norm = squares.sum()
        self.grads = []

    def start_gather(self) -> None:
        self.gathers = [
            self.ranks.gather_into(p.detach(), rows)
            for p, rows, shared in zip(self.params, self.owned_rows(), self.shared)
            if shared
        ]

    def wait_gather(self) -> None:
        for wait in self.gathers:
            wait()
        self.gathers = []
        if self.ranks.size > 1:
            self.copy_parameters()

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

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        for i, name in enumerate(self.names):
            for kind, tensor in (("exp_avg", self.exp_avg[i]), ("exp_avg_sq", self.exp_avg_sq[i])):
                whole = tensors[f"{name}.{kind}"]
                tensor.copy_(whole[self.ranks.share(len(whole))] if self.shared[i] else whole)


class MuonGroup(Group):
    """Muon on K matrices of one shape [r, c]: see kernels_torch.muon. A rank owns whole matrices, some of each bucket.

    begin:  U, M ← muon_momentum(G, M)      multiply:  X ← newton_schulz(U)      finish:  P, S ← muon_update(P, X, S)
    """

    n_stages = 3

    def __init__(
        self, group: dict, ranks: Ranks, ops: UpdateOps, copies: Mapping[str, Tensor], dtype: torch.dtype
    ) -> None:
        super().__init__([group], ranks, ops, copies)
        self.lr, self.weight_decay, self.beta2 = group["lr"], group["weight_decay"], group["beta2"]
        self.muon_eq, self.muon_plus, self.dtype = group["muon_eq"], group["muon_plus"], dtype
        r, c = self.params[0].shape
        K = len(self.params)
        together = ranks.size * max(1, BUCKET_BYTES // (4 * r * c * ranks.size)) if ranks.size > 1 else K
        self.buckets = [list(range(i, min(i + together, K))) for i in range(0, K, together)]
        self.mine = [i for bucket in self.buckets for i in bucket[ranks.share(len(bucket))]]
        count = len(self.mine)
        self.momentum = torch.zeros(count, r, c, device=self.device)
        self.second_moment = torch.zeros(count, *((r, 1) if r >= c else (1, c)), device=self.device)

    def place_rates(self, rows: list[int], rates: Tensor | None) -> None:
        self.on_device = None if rates is None else rates[rows[0]]

    def set_rates(self, lr_mult: float, momentum: float, weight_decay_mult: float, step: int) -> list[tuple]:
        numbers = (self.lr * lr_mult, momentum, self.weight_decay * weight_decay_mult)
        self.rates = numbers if self.on_device is None else tuple(self.on_device[i] for i in range(3))
        return [(*numbers, 0.0, 0.0, 0.0)]

    def average(self, grads: list[Tensor], bucket: int) -> Callable[[], Sequence[Tensor]]:
        if self.ranks.size == 1:
            return lambda: grads  # they may lie apart
        return self.ranks.average_rows(torch.stack(grads))

    def owned_gradients(self, arrived: list[Sequence[Tensor]]) -> Sequence[Tensor]:
        return [g for rows in arrived for g in rows]

    def whole(self, rows: Tensor) -> Callable[[], list[Tensor]]:
        """Start collecting what every rank has for its own matrices → the same for all of them."""
        mine = [len(bucket[self.ranks.share(len(bucket))]) for bucket in self.buckets]
        waits = [self.ranks.gather_rows(part, len(bucket)) for part, bucket in zip(rows.split(mine), self.buckets)]
        return lambda: [x for wait in waits for x in wait()]

    def update(self) -> None:
        self.begin()
        self.multiply()
        self.finish()
        self.forget()

    def begin(self) -> None:
        self.squared_norm, grads, self.grads = torch.zeros((), device=self.device), self.grads, []
        if self.mine:  # else more ranks than matrices: nothing to do but take part in the gather
            self.u, _, squares = self.ops.muon_momentum(
                grads, self.momentum, self.rates[1], equilibrate=self.muon_eq, dtype=self.dtype, in_place=True
            )
            self.squared_norm = squares.sum()

    def multiply(self) -> None:
        if self.mine:
            self.x = self.ops.newton_schulz(self.u, dtype=self.dtype)

    def finish(self) -> None:
        if self.mine:
            lr, _, weight_decay = self.rates
            copies = self.copies if self.ranks.size == 1 and all(c is not None for c in self.copies) else None
            self.ops.muon_update(
                [self.params[i].detach() for i in self.mine], self.x, self.second_moment, lr, weight_decay,
                beta2=self.beta2, snap=self.muon_plus, copies=copies, in_place=True,
            )  # fmt: skip

    def forget(self) -> None:
        self.u = self.x = None

    def start_gather(self) -> None:
        self.gathered = None
        if self.ranks.size > 1:
            owned = [self.params[i].detach() for i in self.mine]
            rows = torch.stack(owned) if owned else self.params[0].detach().new_empty(0, *self.params[0].shape)
            self.gathered = self.whole(rows)

    def wait_gather(self) -> None:
        if self.gathered is not None:
            torch._foreach_copy_(self.params, self.gathered())
            self.gathered = None
        if self.ranks.size > 1 or any(c is None for c in self.copies):
            self.copy_parameters()

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
            for name, x in zip(self.names, self.whole(tensor)()):
                yield f"{name}.{kind}", x

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        for kind, tensor in self._state():
            for x, i in zip(tensor, self.mine):
                x.copy_(tensors[f"{self.names[i]}.{kind}"])
