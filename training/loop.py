"""The training loop: accumulate, step, report; validate, sample and save on a cadence; stop cleanly.

    step k:   [validate] [sample] [save]  →  accumulate micro-batches  →  optimizer step  →  k+1

The loop runs its cadence once more after the last step, so a run ends with a validation figure, a sample and a
checkpoint. Nothing here waits for the device inside a step: the loss of step k (averaged over micro-batches and ranks,
with every rank's wish to stop in the same small reduction) travels to the host behind step k and is read while step k+1
is already queued; what step k+2 will learn from is on the device by then (data/batches.py). A loss that is not
finite is therefore noticed one step late, and never saved: what is pending is read before a checkpoint is written.
"""

import contextlib
import gc
import math
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from checkpoint import TrainState
from data.batches import Batch
from errors import KestrelError
from optim.schedules import ScheduleValues
from training import distributed
from training.cadence import Cadence
from training.horizon import Horizon, StageConfig
from training.profile import StepProfile
from training.report import Reporter
from training.step import Step, read_later


class TrainingDiverged(KestrelError):
    """The loss is NaN or infinite; the last good checkpoint is untouched."""


class StepRecord(NamedTuple):
    """One optimizer step whose loss has not been read yet."""

    step: int
    numbers: Callable[[], list[float]]  # loss, number of ranks that want to stop, norm of the gradients
    position: dict
    schedule: ScheduleValues


class LossScale:
    """Dynamic loss scale for fp16: halve on overflow, double after `growth_interval` good steps (Micikevicius 2018).

    Written out because torch's GradScaler reaches into an optimizer's private state to make ranks agree; ours already
    agrees inside `MuonAdamW.step`.
    """

    def __init__(self, enabled: bool, scale: float = 2.0**16, growth_interval: int = 2000) -> None:
        self.enabled, self.growth_interval = enabled, growth_interval
        self.scale = scale if enabled else 1.0
        self.good_steps = 0

    def update(self, skipped: bool) -> None:
        """Read whether the last step overflowed and adjust."""
        if not self.enabled:
            return
        self.good_steps = 0 if skipped else self.good_steps + 1
        if skipped:
            self.scale = max(self.scale / 2, 1.0)
        elif self.good_steps % self.growth_interval == 0:
            self.scale *= 2


class StopRequest:
    """SIGINT, SIGTERM or SIGHUP (no terminal), remembered until the step is over; a second SIGINT interrupts."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        with contextlib.suppress(ValueError):  # only the main thread may set handlers; elsewhere nobody signals us
            numbers = [signal.SIGINT, signal.SIGTERM]
            if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
                numbers.append(signal.SIGHUP)
            for number in numbers:
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: object) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        name = signal.Signals(number).name
        print(f"\n{name}: finishing this step, then saving (press Ctrl-C again to stop at once)", file=sys.stderr)


@contextlib.contextmanager
def quiet_collector() -> Iterator[None]:
    """Keep the garbage collector from pausing steps: what lives now lives to the end of the run."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def train(
    step: Step,
    schedule: Callable[[int], ScheduleValues],
    batches: Iterator[Batch],
    horizon: Horizon,
    state: TrainState,
    stage: StageConfig,
    cadence: Cadence,
    reporter: Reporter,
    device: distributed.Device,
    profile: StepProfile,
) -> bool:
    """Train until `horizon.num_iterations` or until asked to stop.

    step       what the device does in a step
    state      where to start; advanced in place, one step at a time
    profile    which step to profile, if any
    → True when the run is complete, False when it was interrupted (and saved)
    """
    scale = LossScale(device.dtype == torch.float16, state.loss_scale)
    pending: deque[StepRecord] = deque()
    clock = Clock()
    late = 1 if device.device.type == "cuda" else 0  # a GPU is still at the last step; a CPU is done when it is asked
    with StopRequest() as stop, quiet_collector():
        while True:
            complete = state.step >= horizon.num_iterations
            stopping = False
            if complete or any(
                is_due(state.step, every) for every in (stage.eval_every, stage.sample_every, stage.save_every)
            ):
                stopping |= read(pending, 0, state, reporter, clock, horizon)
                run_cadence(state, stage, cadence, complete)
                clock.restart()
            if complete:
                return True

            with profile.of(state.step):
                record = one_step(step, schedule, batches, horizon, state, device, scale, stop)
            pending += [record] if record else []
            stopping |= record is None or read(pending, late, state, reporter, clock, horizon)
            state.loss_scale = scale.scale
            if stopping and state.step < horizon.num_iterations:
                read(pending, 0, state, reporter, clock, horizon)
                state.saved_step = state.step
                cadence.save(False)
                return False


def one_step(
    step: Step,
    schedule: Callable[[int], ScheduleValues],
    batches: Iterator[Batch],
    horizon: Horizon,
    state: TrainState,
    device: distributed.Device,
    scale: LossScale,
    stop: StopRequest,
) -> StepRecord | None:
    """Accumulate the gradients of one batch, update the parameters, advance `state`.

    → None if one process was asked to stop between two micro-batches of a long step: the step is dropped, `state` is as
    it was. Several ranks finish their step, since they only agree at its end.
    """
    for micro_batch in range(horizon.accumulation):
        if micro_batch > 0 and device.world_size == 1 and stop.signal is not None:
            step.drop()
            return None
        batch = next(batches)
        step.add(batch, first=micro_batch == 0, scale=scale.scale)
    values = schedule(state.step)
    result = step.update(values, inv_scale=1.0 / scale.scale if scale.enabled else None)
    scale.update(result.skipped)
    wants_stop = torch.full_like(step.loss, float(stop.signal is not None))
    numbers = torch.stack([step.loss / device.world_size, wants_stop, result.grad_norm])
    distributed.all_reduce_sum(numbers[:2])  # the norm is known to all already
    record = StepRecord(state.step, read_later(numbers), batch.state, values)
    state.step += 1
    state.tokens_seen += horizon.total_batch_size
    state.stream = batch.state
    return record


def read(
    pending: deque[StepRecord], leave: int, state: TrainState, reporter: Reporter, clock: "Clock", horizon: Horizon
) -> bool:
    """Read all pending losses but the newest `leave`; report them. → does any rank want to stop?"""
    stopping = False
    while len(pending) > leave:
        record = pending.popleft()
        loss, wants_stop, grad_norm = record.numbers()
        if not math.isfinite(loss):
            raise TrainingDiverged(
                f"the loss is {loss} at step {record.step} (data at {position_text(record.position)}): training stops "
                "and the last checkpoint is kept; try a lower learning rate (optim.matrix_lr or optim.lr), "
                "optim.grad_clip=1.0, or hardware.dtype=float32"
            )
        seconds = clock.lap()
        state.elapsed_s += seconds
        reporter.train_step(
            step=record.step + 1,
            loss=loss,
            lr_mult=record.schedule.lr_mult,
            seconds=seconds,
            tokens=horizon.total_batch_size,
            grad_norm=grad_norm,
        )
        stopping |= wants_stop > 0
    return stopping


def run_cadence(state: TrainState, stage: StageConfig, cadence: Cadence, complete: bool) -> None:
    """Validate, sample and save where step and settings say so, each at most once per step even across a resume."""
    improved = False
    if (complete or is_due(state.step, stage.eval_every)) and state.validated_step != state.step:
        bpb = cadence.validate()
        state.validated_step = state.step
        improved = bpb < state.best_bpb
        state.best_bpb = min(bpb, state.best_bpb)
    if (complete or (is_due(state.step, stage.sample_every) and state.step > 0)) and state.sampled_step != state.step:
        state.sampled_step = state.step
        cadence.sample()
    improved &= state.step > 0  # an untrained model is not worth keeping
    due = (complete or is_due(state.step, stage.save_every)) and state.step > 0 and state.saved_step != state.step
    if improved or due:
        state.saved_step = state.step
        cadence.save(improved)


def is_due(step: int, every: int) -> bool:
    """Whether a cadence of `every` steps falls on `step`; -1 or 0 switch it off."""
    return every > 0 and step % every == 0


def position_text(position: dict) -> str:
    """The stream's position as words: `epoch 1, cursor 1234`."""
    return ", ".join(f"{key} {value}" for key, value in position.items() if isinstance(value, int | float))


class Clock:
    """Seconds between steps, without what happened between them."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget the time since the last lap: validation and saving are not training."""
        self.started = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap or restart."""
        now = time.perf_counter()
        seconds, self.started = now - self.started, now
        return seconds
