"""Step → learning-rate multiplier, momentum, weight-decay multiplier: pure functions of the step and the run's length.

The trapezoid and both companions are nanochat's. Two things are defined here that its formulas leave to chance. A run
too short for its warm-up gets a shorter warm-up instead of one it never leaves. The momentum's jump is kept: in runs
whose warm-down starts before step 400 momentum falls at once from its ramp to the warm-down line (0.9697 → 0.9646 at
step 400 of 1000), and every published result has that jump in it.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from optim.groups import OptimConfig

MOMENTUM_START, MOMENTUM_PEAK, MOMENTUM_END, MOMENTUM_RAMP_STEPS = 0.85, 0.97, 0.90, 400


class ScheduleValues(NamedTuple):
    lr_mult: float
    momentum: float
    weight_decay_mult: float


def trapezoid(step: int, num_iterations: int, *, warmup_steps: int, warmdown_ratio: float, final_frac: float) -> float:
    """Linear warm-up, plateau at 1, linear warm-down over the last `warmdown_ratio` of the run to `final_frac`.

    A warm-up that would run into the warm-down is cut to the steps before it (at least one step).
    """
    warmdown = round(warmdown_ratio * num_iterations)
    warmup = min(warmup_steps, max(1, num_iterations - warmdown))
    if step < warmup:
        return (step + 1) / warmup
    if step <= num_iterations - warmdown:
        return 1.0
    left = (num_iterations - step) / warmdown
    return left + (1 - left) * final_frac


def warmup_cosine(step: int, num_iterations: int, *, warmup_steps: int, final_frac: float) -> float:
    """Linear warm-up, then half a cosine from 1 to `final_frac`. The warm-up takes at most half of the run."""
    warmup = min(warmup_steps, max(1, num_iterations // 2))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, num_iterations - warmup)
    return final_frac + (1 - final_frac) * 0.5 * (1 + math.cos(math.pi * progress))


def muon_momentum(step: int, num_iterations: int, *, warmdown_ratio: float) -> float:
    """0.85 → 0.97 over 400 steps, 0.97, then 0.97 → 0.90 through the warm-down."""
    warmdown = round(warmdown_ratio * num_iterations)
    warmdown_start = num_iterations - warmdown
    if step < MOMENTUM_RAMP_STEPS:
        return MOMENTUM_START + (MOMENTUM_PEAK - MOMENTUM_START) * step / MOMENTUM_RAMP_STEPS
    if step < warmdown_start or warmdown == 0:
        return MOMENTUM_PEAK
    return MOMENTUM_PEAK + (MOMENTUM_END - MOMENTUM_PEAK) * (step - warmdown_start) / warmdown


def cosine_to_zero(step: int, num_iterations: int) -> float:
    """½ (1 + cos(π step / N)), the multiplier of Muon's weight decay."""
    return 0.5 * (1 + math.cos(math.pi * step / num_iterations))


def make_schedule(optim: OptimConfig, num_iterations: int) -> Callable[[int], ScheduleValues]:
    """The schedule the configuration asks for. Steps 0 … num_iterations are defined; updates happen before the last."""

    def values(step: int) -> ScheduleValues:
        if optim.schedule == "trapezoid":
            lr_mult = trapezoid(
                step,
                num_iterations,
                warmup_steps=optim.warmup_steps,
                warmdown_ratio=optim.warmdown_ratio,
                final_frac=optim.final_lr_frac,
            )
        else:
            lr_mult = warmup_cosine(
                step, num_iterations, warmup_steps=optim.warmup_steps, final_frac=optim.final_lr_frac
            )
        momentum = muon_momentum(step, num_iterations, warmdown_ratio=optim.warmdown_ratio)
        return ScheduleValues(lr_mult, momentum, cosine_to_zero(step, num_iterations))

    return values
