"""Verify and read a checkpoint. Nothing is unpickled, instantiated, or allocated on the word of a file."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpoint.manifest import REMEDY, TEXT_FILES, damaged, opened, parse_json, read_manifest, read_text_file
from checkpoint.tensors import Spec, read_tensors, require_finite
from errors import KestrelError

MAX_STEP = 2**63


@dataclass
class Checkpoint:
    """What a checkpoint says, without its tensors."""

    path: Path
    step: int
    config: dict  # the run's resolved configuration, as data
    state: dict  # TrainState.to_json()
    tokenizer_json: str

    @property
    def tokenizer_hash(self) -> str:
        """sha256 of the tokenizer's JSON."""
        return _sha256(self.tokenizer_json)

    def require_tokenizer(self, tokenizer_json: str) -> None:
        """Refuse to go on with another tokenizer: the same numbers would mean other words."""
        theirs, ours = self.tokenizer_hash, _sha256(tokenizer_json)
        if theirs != ours:
            raise KestrelError(
                f"{self.path} was trained with another tokenizer (sha256 {theirs[:12]}…, now {ours[:12]}…): "
                "use the run's own tokenizer.json, or start a new run with run=NAME"
            )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_checkpoint(path: Path) -> Checkpoint:
    """Read and verify everything but the tensors."""
    path = Path(path)
    manifest = read_manifest(path)
    texts = {name: read_text_file(path, name, manifest) for name in TEXT_FILES}
    state, config = (parse_json(texts[name], path / name) for name in ("state.json", "config.json"))
    if type(state.get("step")) is not int or not 0 <= state["step"] == manifest["step"] < MAX_STEP:
        says = f"{state.get('step')!r:.80}, and its manifest {manifest['step']!r:.80}"
        raise damaged(path / "state.json", f"its step is {says}")
    for section in ("model", "hardware"):
        if not isinstance(config.get(section, {}), dict):
            raise damaged(path / "config.json", f"its {section} is no object but {config[section]!r:.80}")
    return Checkpoint(path, manifest["step"], config, state, texts["tokenizer.json"])


def load_tensors(path: Path, which: str, spec: Spec, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read the "model" or "optimizer" tensors of a checkpoint.

    spec   the name, shape and dtype of every tensor expected; nothing is allocated before the file agrees with it
    → name → tensor on `device`; raises KestrelError when a single bit differs from what was saved
    """
    file, entry = Path(path) / f"{which}.safetensors", read_manifest(path)["files"][f"{which}.safetensors"]
    digest = hashlib.sha256()
    with opened(file, entry["bytes"]) as handle:
        tensors = read_tensors(handle, entry["bytes"], spec, digest, device)
    if digest.hexdigest() != entry["sha256"]:
        raise damaged(file, "its contents have changed since they were written (sha256)")
    require_finite(tensors, str(file), REMEDY)
    return tensors


def spec_of(tensors: dict[str, Tensor]) -> Spec:
    """What `load_tensors` should expect, from tensors of any device, meta too."""
    return {name: (tuple(x.shape), x.dtype) for name, x in tensors.items()}
