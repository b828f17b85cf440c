"""What the device does in one optimizer step: the gradients of each micro-batch, then one update.

    step.add(batch, first=True);  step.add(batch, first=False);  …;  step.update(values)

Nothing here waits for the device, except that fp16 must know whether a gradient overflowed before it updates.

`CapturedStep` is the same in CUDA graphs, for a host that is slower than the device: with Triton kernels Python takes
20 ms and more to start a step of a d6, whatever the GPU could do (H200). It replays the kernels that `Step` starts,
so both give the same numbers. Three graphs are recorded, each when its turn first comes after some eager steps, in
which kernels are compiled and libraries take the memory they want:

    first    the gradients of a step's first micro-batch, which take the place of those of the step before
    more     those of a later micro-batch, added to them in place
    update   the optimizer's part

A graph remembers addresses and plain numbers. So what changes from step to step lies at fixed addresses: the batch is
copied into one that stays, learning rates and momentum are on the device (`MuonAdamW.set_rates`), gradients remain
where the first graph put them, parameters and optimizer state never move.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from data.batches import Batch
from model.cuda_graphs import Capture
from optim.muon_adamw import MuonAdamW, StepResult
from optim.schedules import ScheduleValues

EAGER_STEPS = 3  # before anything is captured


class Step:
    """One optimizer step after another.

    model         called as model(tokens, targets, …) → mean loss; may be compiled
    accumulation  micro-batches of a step; the last one's gradients leave for other ranks as they are made
    grad_clip     largest norm of all gradients together; 0: no clipping
    prepare       called when a step begins: weights in 8 bits are made there
    """

    communicates_early = True

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
        if first and self.prepare is not None:
            self.prepare()
        loss = self.model(batch.tokens, batch.targets, token_weights=batch.weights, doc_ids=batch.doc_ids)
        if self.communicates_early and self.n_added == self.accumulation:
            self.optimizer.expect_last_gradients()
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
        early, self.communicates_early = self.communicates_early, False
        try:
            for first in (True, False)[: self.accumulation]:
                Step.add(self, batch, first=first)
            with torch.no_grad():
                self.model(batch.tokens, batch.targets, doc_ids=batch.doc_ids, reduction="none")
            if updates:
                self.optimizer.set_rates(*values)
                self.optimizer.update(grad_clip=self.grad_clip)
        finally:
            self.communicates_early = early
            Step.drop(self)


class CapturedStep(Step):
    """The same, replayed. A batch must have the shapes of the first one.

    capture         model.cuda_graphs.CudaGraphs()
    capture_update  False: the update stays eager, for the sake of its communication with other ranks
    """

    communicates_early = False  # what is recorded is this rank's own work

    def __init__(self, *args: object, capture: Capture, capture_update: bool = True, **options: object) -> None:
        super().__init__(*args, **options)
        self.capture, self.capture_update = capture, capture_update
        self.steps = 0
        self.replays: dict[str, Callable[[], None]] = {}
        self.batch: Batch | None = None  # the one that stays
        self.result: StepResult | None = None

    def add(self, batch: Batch, *, first: bool, scale: float = 1.0) -> None:
        if self.steps < EAGER_STEPS:
            return super().add(batch, first=first, scale=scale)
        self.load(batch)
        add = super().add
        self.replay("first" if first else "more", lambda: add(self.batch, first=first, scale=scale))

    def update(self, values: ScheduleValues, *, inv_scale: float | None = None) -> StepResult:
        self.steps += 1
        if self.steps <= EAGER_STEPS:
            return super().update(values, inv_scale=inv_scale)
        self.optimizer.set_rates(*values)
        if self.capture_update and self.steps > EAGER_STEPS + 1:  # by then one has seen the gradients where they stay
            self.replay("update", self.update_parameters)
        else:
            self.update_parameters()
        self.optimizer.steps += 1
        return self.result

    def update_parameters(self) -> None:
        self.result = self.optimizer.update(grad_clip=self.grad_clip)

    def drop(self) -> None:
        """The first graph writes its gradients where they are, over the old ones."""
        if "first" not in self.replays:
            super().drop()

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
            self.replays[name] = self.capture(function)
        self.replays[name]()


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
