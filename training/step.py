"""What the device does in one optimizer step: the gradients of each micro-batch, then one update.

    step.add(batch, first=True);  step.add(batch, first=False);  …;  step.update(values)

Nothing here waits for the device, except that fp16 must know whether a gradient overflowed before it updates.

`CapturedStep` is the same in CUDA graphs, for a host that is slower than the device: with Triton kernels Python takes
20 ms and more to start a step of a d6, whatever the GPU could do (H200). It replays the kernels that `Step` starts,
so both give the same numbers. Each graph is recorded when its turn first comes after some eager steps, in which kernels
are compiled, libraries take the memory they want and ranks learn to reach each other:

    first    the gradients of a step's first micro-batch, which take the place of those of the step before
    more     those of a later micro-batch, added to them in place
    update   the optimizer's part
    last     on several ranks instead of `update`: the last micro-batch and the optimizer's part in one, with all that
             ranks exchange meanwhile on a branch of its own, begun in the middle of the backward pass

A graph remembers addresses and plain numbers. So what changes from step to step lies at fixed addresses: the batch is
copied into one that stays, learning rates and momentum are on the device (`MuonAdamW.set_rates`), gradients remain
where the first graph put them, parameters and optimizer state never move.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from data.batches import Batch
from errors import KestrelError
from model.cuda_graphs import CudaGraphs
from model.layers.linear import adding_in_place
from optim.muon_adamw import MuonAdamW, StepResult
from optim.schedules import ScheduleValues
from training.distributed import any_rank

EAGER_STEPS = 3  # before anything is captured


class Step:
    """One optimizer step after another.

    model         called as model(tokens, targets, …) → mean loss; may be compiled
    accumulation  micro-batches of a step; the last one's gradients leave for other ranks as they are made
    grad_clip     largest norm of all gradients together; 0: no clipping
    prepare       called when a step begins: weights in 8 bits are made there
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: MuonAdamW,
        *,
        accumulation: int,
        device: torch.device,
        grad_clip: float = 0.0,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self.model, self.optimizer, self.prepare = model, optimizer, prepare
        self.accumulation, self.grad_clip = accumulation, grad_clip
        self.loss = torch.zeros((), device=device)  # mean over the micro-batches of this step so far
        self.n_added = 0

    def add(self, batch: Batch, *, first: bool, scale: float = 1.0) -> None:
        """Add the gradients of a micro-batch and its loss; the first of a step finds none before it."""
        self.n_added = 1 if first else self.n_added + 1
        self.add_gradients(batch, first=first, last=self.n_added == self.accumulation, scale=scale)

    def add_gradients(self, batch: Batch, *, first: bool, last: bool, scale: float = 1.0) -> None:
        """last: the gradients are complete then, and leave for other ranks as they are made."""
        if first and self.prepare is not None:
            self.prepare()
        loss = self.model(batch.tokens, batch.targets, token_weights=batch.weights, doc_ids=batch.doc_ids)
        if last:
            self.optimizer.expect_last_gradients()
        with nullcontext() if first else adding_in_place():
            (loss * (scale / self.accumulation)).backward()
        if first:
            self.loss.zero_()
        self.loss += loss.detach().float() / self.accumulation

    def update(self, values: ScheduleValues, *, inv_scale: float | None = None) -> StepResult:
        """Update the parameters with what was added. inv_scale: 1 / the fp16 loss scale, see MuonAdamW.step."""
        result = self.optimizer.step(*values, inv_scale=inv_scale, grad_clip=self.grad_clip)
        self.drop()
        return result

    def drop(self) -> None:
        """Forget what was added."""
        self.optimizer.zero_grad()

    def rehearse(self, batch: Batch, values: ScheduleValues, *, updates: bool) -> None:
        """Go through a step, and a validation, for the sake of the kernels they launch: see kernels_triton.ahead.

        updates   the optimizer's part, too, where nothing but kernels of ours could change a parameter
        """
        try:
            for first in (True, False)[: self.accumulation]:
                Step.add_gradients(self, batch, first=first, last=False)
            with torch.no_grad():
                self.model(batch.tokens, batch.targets, doc_ids=batch.doc_ids, reduction="none")
            if updates:
                self.optimizer.set_rates(*values)
                self.optimizer.update(grad_clip=self.grad_clip)
        finally:
            Step.drop(self)

    def close(self) -> None:
        """Let go of what must not outlive the connection to other ranks."""


class CapturedStep(Step):
    """The same, replayed. A batch must have the shapes of the first one.

    capture    what records a function
    messages   False: what ranks exchange is not captured. It starts when the backward pass is over, from Python
    """

    def __init__(self, *args: object, capture: CudaGraphs, messages: bool = True, **options: object) -> None:
        super().__init__(*args, **options)
        several = self.optimizer.ranks.size > 1
        self.capture, self.messages = capture, messages
        self.update_with_last = several and messages
        self.capture_update = not several
        self.steps = 0
        self.replays: dict[str, Callable[[], None]] = {}
        self.batch: Batch | None = None  # the one that stays
        self.result: StepResult | None = None

    def add_gradients(self, batch: Batch, *, first: bool, last: bool, scale: float = 1.0) -> None:
        add = partial(super().add_gradients, first=first, last=last and self.messages, scale=scale)
        if self.steps < EAGER_STEPS:
            return add(batch)
        self.load(batch)
        if not (last and self.update_with_last):
            self.replay("first" if first else "more", partial(add, self.batch))

    def update(self, values: ScheduleValues, *, inv_scale: float | None = None) -> StepResult:
        self.steps += 1
        if self.steps <= EAGER_STEPS:
            return super().update(values, inv_scale=inv_scale)
        self.optimizer.set_rates(*values)
        if self.update_with_last:
            self.replay("last", self.last_and_update)
        elif self.capture_update and self.steps > EAGER_STEPS + 1:  # by then one has seen the gradients where they stay
            self.replay("update", self.update_parameters)
        else:
            self.update_parameters()
        self.optimizer.steps += 1
        return self.result

    def last_and_update(self) -> None:
        super().add_gradients(self.batch, first=self.accumulation == 1, last=True)
        self.update_parameters()

    def update_parameters(self) -> None:
        self.result = self.optimizer.update(grad_clip=self.grad_clip)

    def drop(self) -> None:
        """What is captured writes its gradients where they are, over the old ones."""
        if not self.replays:
            super().drop()

    def close(self) -> None:
        self.replays.clear()
        self.capture.release()

    def load(self, batch: Batch) -> None:
        """Copy a batch to where the graphs look for it."""
        if self.batch is None:
            self.batch = Batch(*(field.clone() if isinstance(field, Tensor) else field for field in batch))
            return
        for ours, theirs in zip(self.batch[:-1], batch[:-1], strict=True):
            assert (ours is None) == (theirs is None), "every batch has the fields of the first one"
            if ours is not None:
                assert ours.shape == theirs.shape, f"captured for {tuple(ours.shape)}, got {tuple(theirs.shape)}"
                ours.copy_(theirs)

    def replay(self, name: str, function: Callable[[], None]) -> None:
        """Do what `function` does, which is captured at its first time."""
        if name not in self.replays:
            self.replays[name] = self.capture_everywhere(function)
        self.replays[name]()

    def capture_everywhere(self, function: Callable[[], None]) -> Callable[[], None]:
        """A rank that replayed messages alone would wait forever for one that could not capture them."""
        replay = problem = None
        try:
            replay = self.capture(function)
        except (KestrelError, torch.OutOfMemoryError) as error:
            problem = error
        if any_rank(replay is None, self.loss.device):
            raise problem or KestrelError(
                "another rank cannot capture its step as a CUDA graph: take hardware.cuda_graph=false, or local, "
                "which leaves out the messages between ranks"
            )
        return replay


def read_later(values: Tensor) -> Callable[[], list[float]]:
    """Start copying numbers to the host. → what gives them, waiting for this copy only and for nothing queued after it

    `values.tolist()` would wait for all that is queued when it is asked, so for the next step too.
    """
    if values.device.type != "cuda":
        return values.tolist
    on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    on_host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[float]:
        copied.synchronize()
        return on_host.tolist()

    return read
