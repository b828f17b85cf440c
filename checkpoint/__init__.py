"""Checkpoints: folders that are there whole or not at all, and a loader that trusts nothing it finds in one.

    <run>/checkpoints/
        step-00001234/      model.safetensors  optimizer.safetensors  state.json  config.json  tokenizer.json
                            manifest.json: the size and sha256 of each
        latest, best        files that hold the name of such a folder

The config and the tokenizer lie inside, so a checkpoint can be moved elsewhere and still be loaded. `saving.py`
publishes and deletes, `finding.py` finds the newest or best, `loading.py` verifies and reads, `manifest.py` says what a
folder must hold, `tensors.py` is the file format of the tensors, `state.py` what a run needs beside them.
"""

from checkpoint.finding import (
    best,
    find,
    find_asked,
    find_newest_run,
    is_complete,
    latest,
    list_checkpoints,
    passed_over,
    what_is_wrong,
)
from checkpoint.loading import Checkpoint, load_tensors, read_checkpoint, spec_of
from checkpoint.saving import save
from checkpoint.state import TrainState, restore_rng, rng_state

__all__ = [
    "Checkpoint",
    "TrainState",
    "best",
    "find",
    "find_asked",
    "find_newest_run",
    "is_complete",
    "latest",
    "list_checkpoints",
    "load_tensors",
    "passed_over",
    "read_checkpoint",
    "restore_rng",
    "rng_state",
    "save",
    "spec_of",
    "what_is_wrong",
]
