"""Which folder a run writes to, and whether it begins or goes on.

    resume=auto    the folder named by `run`; goes on from its newest checkpoint when it has one
    resume=never   begins anew; a folder that already holds checkpoints is left alone and `-2`, `-3`, … is appended
    resume=PATH    begins a new folder (named as above) from the weights, optimizer and data position of that checkpoint

One process trains in a folder at a time (a lock says so), and going on with a different model, tokenizer, data set,
kind of optimizer or seed is refused: it would be another run under the same name.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no flock; there the folder is not guarded
    fcntl = None

import checkpoint
from errors import KestrelError
from training.distributed import print_main

# Changing any of these makes it a different run; hardware, kernels, learning rates, cadences and horizon may change.
IDENTITY = ("model.", "tokenizer.", "data.", "optim.name", "seed")
# Where the same data lies is not what it is; the stream's own fingerprint guards the content.
PLACES = ("data.cache_dir", "data.workers")


@dataclass
class RunDirectory:
    """The folder of a run and the checkpoint it starts from, if any."""

    path: Path
    start: Path | None
    resumed: bool  # going on in the same folder, so its metrics continue


def open_run(runs_dir: Path, name: str, resume: str, settings: dict) -> RunDirectory:
    """Choose the folder and the starting checkpoint; nothing is written yet.

    settings   the resolved config as plain data, compared with the checkpoint's when going on
    """
    path = Path(runs_dir) / name
    existing = checkpoint.latest(path)
    if resume == "auto":
        if wrong := checkpoint.what_is_wrong(path):
            raise KestrelError(
                f"{path} has no checkpoint to go on from, though it had some ({wrong}): copy them again from their "
                "source, start beside them (resume=never), or give this run a name of its own (run=NAME)"
            )
        if existing is not None:
            refuse_other_run(checkpoint.read_checkpoint(existing).config, settings, path)
            if damaged := checkpoint.passed_over(path, existing):
                print_main(f"what was saved after {existing.name} is damaged and passed over ({damaged})")
        return RunDirectory(path, existing, resumed=existing is not None)
    start = None if resume == "never" else checkpoint.find(Path(resume))
    if start is not None:
        refuse_other_run(checkpoint.read_checkpoint(start).config, settings, start)
    return RunDirectory(free_name(path), start, resumed=False)


def free_name(path: Path) -> Path:
    """`path`, or the first of path-2, path-3, … that holds no checkpoint, be it damaged."""
    candidates = [path, *(path.with_name(f"{path.name}-{number}") for number in range(2, 10_000))]
    return next(candidate for candidate in candidates if _is_free(candidate))


def _is_free(path: Path) -> bool:
    return checkpoint.latest(path) is None and checkpoint.what_is_wrong(path) is None


def refuse_other_run(saved: dict, settings: dict, where: Path) -> None:
    """Raise when the saved config differs in what makes a run this run; name the first difference."""
    ours, theirs = (dict(flatten(part)) for part in (settings, saved))
    for key in sorted(ours.keys() | theirs.keys()):
        if key.startswith(IDENTITY) and key not in PLACES and ours.get(key) != theirs.get(key):
            raise KestrelError(
                f"{where} was trained with {key}={theirs.get(key)}, now {key}={ours.get(key)} is asked for: "
                "give this run a name of its own (run=NAME), start beside it (resume=never), or change the key back"
            )


def flatten(tree: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Nested dictionaries as (dotted key, value) pairs."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@contextlib.contextmanager
def lock(path: Path, is_main: bool = True) -> Iterator[None]:
    """Hold the folder for this run; the lock goes with the process, however it ends. Only rank 0 holds it."""
    if not is_main or fcntl is None:
        yield
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = open(path / ".lock", "a")  # noqa: SIM115  (the lock lives as long as the handle)
    except OSError as error:
        raise KestrelError(
            f"cannot write to {path} ({error.strerror}): choose another folder with runs_dir="
        ) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise KestrelError(
                f"another process is training in {path}: wait for it, or name this run with run=NAME"
            ) from error
        yield
