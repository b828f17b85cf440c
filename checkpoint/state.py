"""What a run needs beside its tensors to go on as if it had never stopped: counters, data position, random numbers."""

import base64
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from errors import KestrelError


@dataclass
class TrainState:
    """Where a run stands. Small, and JSON."""

    step: int = 0  # optimizer steps taken
    tokens_seen: int = 0
    elapsed_s: float = 0.0  # training only: no validation, no saving
    best_bpb: float = math.inf
    loss_scale: float = 2.0**16  # fp16 only
    # The step of the last validation, sample and save, so that none is repeated when a run goes on.
    validated_step: int = -1
    sampled_step: int = -1
    saved_step: int = -1
    stream: dict = field(default_factory=dict)  # Batch.state of the last batch; empty: the stream has not begun
    rng: dict = field(default_factory=dict)  # rng_state()

    def to_json(self) -> dict[str, Any]:
        """Plain data for json.dumps, which writes floats so that they read back exactly; inf and nan become strings."""
        values = asdict(self)
        return {key: str(x) if isinstance(x, float) and not math.isfinite(x) else x for key, x in values.items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrainState":
        """The inverse of to_json. Keys that are missing (an older checkpoint) take their defaults."""
        kinds = {f.name: f.type for f in fields(cls)}
        if unknown := sorted(values.keys() - kinds.keys()):
            raise KestrelError(f"the checkpoint's state has keys unknown to this version: {str(unknown)[:200]}")
        return cls(**{key: _typed(key, value, kinds[key]) for key, value in values.items()})


def _typed(key: str, value: Any, kind: type) -> Any:
    """`value` as `kind`, with what JSON does to floats undone: 1 for 1.0, strings for inf and nan."""
    if kind is float and (type(value) is int or value in ("inf", "-inf", "nan")):
        return float(value)
    if type(value) is not kind:
        raise KestrelError(f"the checkpoint's state is damaged: {key} should be {kind.__name__}, got {value!r:.80}")
    return value


def rng_state(device: torch.device | str = "cpu") -> dict[str, str]:
    """PyTorch's global generators as text. (The data stream and sampling have seeds of their own.)"""
    states = {"cpu": torch.get_rng_state()}
    if torch.device(device).type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {kind: base64.b64encode(x.numpy().tobytes()).decode() for kind, x in states.items()}


def restore_rng(states: dict[str, str], device: torch.device | str = "cpu") -> None:
    """Take over what `rng_state` returned; a generator it does not mention is left alone."""
    try:
        decoded = {kind: torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8) for kind, text in states.items()}
        if "cpu" in decoded:
            torch.set_rng_state(decoded["cpu"])
        if "cuda" in decoded and torch.device(device).type == "cuda":
            torch.cuda.set_rng_state(decoded["cuda"], device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise KestrelError(f"the checkpoint's state is damaged: rng does not decode ({str(error)[:200]})") from error
