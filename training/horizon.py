"""How long to train, on how many tokens per step, and what that does to learning rate and weight decay.

The scaling laws of nanochat on one page. S counts the parameters that carry the law (block matrices and head), R is
tokens per such parameter, D = R · S the tokens to train on, and everything is relative to the 12-layer model D_ref on
which the hyperparameters were tuned at B_ref = 2¹⁹ tokens per step:

    B   = 2^round(log2(B_ref · (D / D_ref)^0.383))        the batch that is just not wasteful
    lr *= √(B / B_ref)
    λ   = λ_base · √(B / B_ref) · D_ref / D               so that lr · λ · steps, the total decay, is the same for all
    N   = num_iterations, or target_flops / (FLOPs per token · B), or D // B

Three rules of our own, none of which touches a model of 4 layers or more at its own batch:

- a batch nobody asked for is halved until the run has at least 400 steps: with 100 it learns less from the same tokens;
- it is rounded to whole rows of all ranks (a batch that was asked for is taken as it is, or refused);
- the learning rate keeps at least 0.7 of itself. The square root holds between 2¹⁸ and 2²¹ tokens; at 2048 it would
  leave 1/16, yet 2 layers after 400 such steps on the bytes of TinyStories stand at a validation loss of 1.19 with a
  quarter of the tuned rates, 0.96 with half, 0.82 with all and 0.83 with twice of them. λ is lowered instead, for the
  same total decay.
"""

import math
from dataclasses import dataclass, field

from errors import KestrelError

REFERENCE_BATCH = 2**19  # tokens per step the hyperparameters were tuned at
BATCH_EXPONENT = 0.383
MIN_STEPS = 400
MIN_LR_SCALE = 0.7


def _check(condition: bool, key: str, rule: str, value: object) -> None:
    if not condition:
        raise KestrelError(f"stage.{key} must be {rule}, got {value}")


@dataclass
class StageConfig:
    """The length of a run and its cadences. -1 means: derive it, or for a cadence: only at the end."""

    name: str = "pretrain"
    num_iterations: int = -1  # comes first
    target_flops: float = -1.0  # comes second
    target_param_data_ratio: float = 10.5  # comes third: tokens per scaling parameter (20 is Chinchilla)
    total_batch_size: int = -1  # tokens per step, over all ranks and micro-batches
    eval_every: int = 250
    eval_tokens: int = 1_048_576
    sample_every: int = 2000
    sample_prompts: list[str] = field(default_factory=lambda: ["Once upon a time"])
    sample_tokens: int = 64
    save_every: int = -1
    keep_last: int = 2

    def __post_init__(self) -> None:
        _check(self.name == "pretrain", "name", "pretrain", repr(self.name))
        for key in ("num_iterations", "total_batch_size", "eval_every", "sample_every", "save_every"):
            _check(
                getattr(self, key) == -1 or getattr(self, key) > 0, key, "positive, or -1 (auto)", getattr(self, key)
            )
        for key in ("target_flops", "target_param_data_ratio"):
            _check(getattr(self, key) == -1 or getattr(self, key) > 0, key, "positive, or -1 (off)", getattr(self, key))
        for key in ("eval_tokens", "sample_tokens", "keep_last"):
            _check(getattr(self, key) > 0, key, "positive", getattr(self, key))
        if max(self.num_iterations, self.target_flops, self.target_param_data_ratio) <= 0:
            raise KestrelError(
                "the run has no length: set stage.num_iterations, stage.target_flops or stage.target_param_data_ratio"
            )


@dataclass(frozen=True)
class Horizon:
    num_iterations: int
    total_batch_size: int  # tokens per step
    tokens: int  # seen by the whole run
    lr_scale: float
    weight_decay: float  # as the law gives it; the optimizer's configuration caps it
    device_batch_size: int  # rows per micro-batch and rank
    accumulation: int  # micro-batches per step and rank


def plan(
    stage: StageConfig,
    *,
    scaling_parameters: int,
    reference_parameters: int,
    flops_per_token: float,
    sequence_len: int,
    world_size: int,
    device_batch_size: int = -1,
    max_device_batch_size: int = 32,
    weight_decay: float = 0.28,
) -> Horizon:
    """Everything about the run's length and batch that follows from the model and the machine.

    scaling_parameters     S of the model
    reference_parameters   S of the 12-layer model with the same vocabulary
    device_batch_size      rows per micro-batch; -1: the largest that divides the batch, up to max_device_batch_size
    weight_decay           λ_base
    """
    ratio = stage.target_param_data_ratio
    # With ratio -1 (a run measured in FLOPs) both are negative, and only their quotient counts.
    target_tokens, reference_tokens = int(ratio * scaling_parameters), int(ratio * reference_parameters)
    if target_tokens == 0 or reference_tokens == 0:
        raise KestrelError(
            f"stage.target_param_data_ratio={ratio} is less than one token for {scaling_parameters} parameters: "
            "give a larger one, or -1 with stage.num_iterations"
        )
    row_tokens = sequence_len * world_size * max(1, device_batch_size)
    if stage.total_batch_size == -1:
        batch = auto_batch_size(target_tokens / reference_tokens, _tokens_wanted(stage, target_tokens, flops_per_token))
        batch = max(1, round(batch / row_tokens)) * row_tokens
    else:
        batch = stage.total_batch_size
        _check_divides(batch, sequence_len, world_size, device_batch_size)
    rows = batch // (sequence_len * world_size)
    if device_batch_size == -1:
        device_batch_size = largest_divisor(rows, max_device_batch_size)
    steps = _num_iterations(stage, target_tokens, flops_per_token, batch)
    batch_ratio = batch / REFERENCE_BATCH
    lr_scale = max(batch_ratio**0.5, MIN_LR_SCALE)
    return Horizon(
        num_iterations=steps,
        total_batch_size=batch,
        tokens=steps * batch,
        lr_scale=lr_scale,
        weight_decay=weight_decay * batch_ratio / lr_scale * reference_tokens / target_tokens,
        device_batch_size=device_batch_size,
        accumulation=rows // device_batch_size,
    )


def auto_batch_size(data_ratio: float, tokens: float | None) -> int:
    """The law's batch for D / D_ref, a power of two; halved until `tokens` last for MIN_STEPS steps."""
    batch = 2 ** round(math.log2(REFERENCE_BATCH * data_ratio**BATCH_EXPONENT))
    while tokens is not None and batch > 1 and tokens // batch < MIN_STEPS:
        batch //= 2
    return batch


def _tokens_wanted(stage: StageConfig, target_tokens: int, flops_per_token: float) -> float | None:
    """How many tokens the run will see whatever its batch; None if it is its steps that are given."""
    if stage.num_iterations > 0:
        return None
    return stage.target_flops / flops_per_token if stage.target_flops > 0 else target_tokens


def _num_iterations(stage: StageConfig, target_tokens: int, flops_per_token: float, batch: int) -> int:
    if stage.num_iterations > 0:
        return stage.num_iterations
    if stage.target_flops > 0:
        return max(1, round(stage.target_flops / (flops_per_token * batch)))
    return max(1, target_tokens // batch)


def _check_divides(batch: int, sequence_len: int, world_size: int, device_batch_size: int) -> None:
    """A step must be a whole number of micro-batches: the gradient would otherwise average unequal parts."""
    unit = sequence_len * world_size * max(1, device_batch_size)
    if batch % unit == 0:
        return
    below = batch // unit * unit
    nearest = f"{below} or {below + unit}" if below else f"{unit}"
    rows = f"{device_batch_size} rows" if device_batch_size > 0 else "1 row"
    message = (
        f"stage.total_batch_size={batch} is not a whole number of micro-batches: {rows} × {sequence_len} tokens × "
        f"{world_size} rank{'s' if world_size > 1 else ''} = {unit} tokens; use stage.total_batch_size={nearest}"
    )
    if device_batch_size > 1 and batch % (sequence_len * world_size) == 0:
        divisor = largest_divisor(batch // (sequence_len * world_size), device_batch_size)
        message += f", or hardware.device_batch_size={divisor}"
    raise KestrelError(message)


def largest_divisor(n: int, limit: int) -> int:
    """The largest divisor of n that is at most `limit` (and at least 1)."""
    return next(d for d in range(max(1, min(n, limit)), 0, -1) if n % d == 0)


def largest_device_batch(
    *, sequence_len: int, n_layer: int, n_embd: int, parameters: int, memory_bytes: int | None
) -> int:
    """How many rows a micro-batch may have: as many as help, and as fit. memory_bytes None: a CPU.

    On a CPU 8192 tokens keep the cores busy, on a GPU 65536 (12 layers on an H200: 218k tokens/s at 16384, 228k at
    32768). A GPU holds besides them weights, gradients and two moments in fp32; activations took 44 to 53 bytes per
    token, layer and unit of width (kernels=torch in bf16, 6 and 12 layers). A fifth of the memory stays free.
    """
    if memory_bytes is None:
        tokens = 8192
    else:
        free = 0.8 * memory_bytes - 20 * parameters
        tokens = min(65_536, free / (56 * n_layer * n_embd))
    return max(1, int(tokens) // sequence_len)
