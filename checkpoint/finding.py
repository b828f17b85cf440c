"""Which checkpoint is the newest, the best, or meant by a path. Only complete ones count, whatever else lies around."""

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

from checkpoint.manifest import MANIFEST, REMEDY, read_manifest
from errors import KestrelError

NAME = re.compile(r"step-(\d+)(?:\.(\d+))?")  # step and revision


def list_checkpoints(run_dir: Path) -> list[Path]:
    """All complete checkpoints of a run, in the order of their steps."""
    return list(_complete(run_dir))


def latest(run_dir: Path) -> Path | None:
    """The checkpoint to go on from: the one that `latest` names or, if that is missing, the highest step."""
    complete = _complete(run_dir)
    pointed = _pointed(run_dir, "latest")
    return pointed if pointed in complete else next(reversed(complete), None)


def best(run_dir: Path) -> Path | None:
    """The checkpoint with the best validation figure, if one was saved."""
    improvements = [path for path, manifest in _complete(run_dir).items() if manifest["best"]]
    pointed = _pointed(run_dir, "best")
    return pointed if pointed in improvements else next(reversed(improvements), None)


def is_complete(path: Path) -> bool:
    """Whether the folder holds a manifest and all its files in full size. What they contain is verified on loading."""
    return _complete_manifest(path) is not None


def find_newest_run(runs_dir: Path) -> Path:
    """The run that saved last, of all below `runs_dir` (the runs of a sweep lie deeper than others).

    Quantised copies, which were made from a run and are named when they are meant, count if there is nothing else.
    """
    runs_dir = Path(runs_dir)
    runs = {folder.parent for depth in (1, 2, 3) for folder in runs_dir.glob("*/" * depth + "checkpoints")}
    saved_at = {run: max(m["saved_at"] for m in found.values()) for run in runs if (found := _complete(run))}
    if not saved_at:
        looked = f"{len(runs)} runs in {runs_dir}, none with a checkpoint yet" if runs else f"no run in {runs_dir}"
        raise KestrelError(f"no checkpoint found ({looked}): run `python train.py` first, or give ckpt= or runs_dir=")
    trained = [run for run in saved_at if not _is_quantised(latest(run))]
    return max(trained or saved_at, key=saved_at.__getitem__)


def _is_quantised(path: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return "quant" in json.loads((path / "config.json").read_text())
    return False


def find(path: Path) -> Path:
    """The checkpoint that `path` means: its own folder, a pointer (…/checkpoints/best), or the newest of a run."""
    path = Path(path)
    if os.path.exists(path / MANIFEST):
        return path
    if os.path.isfile(path) and path.name in ("latest", "best"):
        found = (best if path.name == "best" else latest)(path.parent.parent)
    else:
        found = latest(path.parent if path.name == "checkpoints" else path)
    if found is None:
        what = _problem(path) or "leads to no complete checkpoint"
        raise KestrelError(f"{path} {what}: give the folder of a run, or a step-… folder in its checkpoints folder")
    return found


def find_asked(ckpt: str | None, runs_dir: str) -> Path:
    """The checkpoint that the key ckpt= means: that of a path, or without one the newest of the newest run."""
    if ckpt is None:
        return find(find_newest_run(Path(runs_dir)))
    if not ckpt:
        raise KestrelError("ckpt= is empty: give the folder of a run or of a checkpoint, or leave it out")
    return find(Path(ckpt).expanduser())


def _problem(path: Path) -> str | None:
    """Why no checkpoint is found where one was said to be."""
    try:
        os.stat(path)
        if is_folder := os.path.isdir(path):
            os.listdir(path)
    except FileNotFoundError:
        return "does not exist"
    except (OSError, ValueError) as error:
        return f"cannot be read ({getattr(error, 'strerror', None) or error})"
    wrong = what_is_wrong(path.parent if path.name == "checkpoints" else path) if is_folder else None
    return f"leads to no complete checkpoint ({wrong})" if wrong else None


def what_is_wrong(run_dir: Path) -> str | None:
    """Why a run that has checkpoints has no complete one; None if it has one, or has none at all."""
    folder = Path(run_dir) / "checkpoints"
    try:
        os.listdir(folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{folder} cannot be read: {error.strerror or error}"
    if latest(run_dir) is not None:
        return None
    reasons = [f"{path.name}: {_damage(path)}" for path in _named(run_dir)]
    more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
    return "; ".join(reasons[-3:]) + more or None


def passed_over(run_dir: Path, chosen: Path) -> str | None:
    """What was saved after `chosen` and is damaged, with the reasons; None: nothing."""
    complete = _complete(run_dir)
    later = [p for p in _named(run_dir) if order(p) > order(chosen) and p not in complete]
    return "; ".join(f"{path.name}: {_damage(path)}" for path in later) or None


def _damage(path: Path) -> str:
    """What keeps a folder named like a checkpoint from being one."""
    try:
        for name, entry in read_manifest(path)["files"].items():
            if (size := os.stat(path / name).st_size) != entry["bytes"]:
                return f"{name} has {size} bytes and should have {entry['bytes']}"
    except KestrelError as error:
        return str(error).removesuffix(f"; {REMEDY}")
    except OSError as error:
        return f"{os.path.basename(error.filename or name)}: {error.strerror or error}"
    return "it was incomplete a moment ago"


def order(path: Path) -> tuple[int, int]:
    """(step, revision) from a folder's name."""
    step, revision = NAME.fullmatch(path.name).groups()
    return int(step), int(revision or 1)


def _complete(run_dir: Path) -> dict[Path, dict[str, Any]]:
    """Complete checkpoints and their manifests, in the order of their steps."""
    named, before, found = _named(run_dir), None, {}
    while named != before and not found:  # a run that is training may have deleted all that was there: look again
        manifests = {path: _complete_manifest(path) for path in named}
        found = {path: manifest for path, manifest in manifests.items() if manifest is not None}
        named, before = _named(run_dir), named
    return found


def _named(run_dir: Path) -> list[Path]:
    """Everything named like a checkpoint, in the order of steps."""
    with contextlib.suppress(OSError):
        return sorted((p for p in (Path(run_dir) / "checkpoints").iterdir() if NAME.fullmatch(p.name)), key=order)
    return []


def _complete_manifest(path: Path) -> dict[str, Any] | None:
    try:
        manifest = read_manifest(path)
        whole = all((path / name).stat().st_size == entry["bytes"] for name, entry in manifest["files"].items())
        return manifest if whole else None
    except (KestrelError, OSError):
        return None


def _pointed(run_dir: Path, pointer: str) -> Path | None:
    """The folder that a pointer file names, which may not exist."""
    folder = Path(run_dir) / "checkpoints"
    with contextlib.suppress(OSError, ValueError), open(folder / pointer, "rb") as handle:
        name = handle.read(300).decode("ascii").strip()
        return folder / name if NAME.fullmatch(name) else None
    return None
