"""Publish checkpoints and delete old ones, so that no crash, full disk or power cut costs the last complete one.

A checkpoint is written under a temporary name (`step-….tmp-<pid>`), every file and the folder itself are forced to the
disk, and one rename publishes it. The pointers are written just before that rename: a pointer that names no complete
folder means that nobody got that far, and readers then go by the folders themselves. Published folders never change;
saving the same step again publishes `step-….2` beside it. Old ones are deleted last, after a rename that hides them.
"""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from checkpoint.finding import best as best_checkpoint
from checkpoint.finding import latest, list_checkpoints, order
from checkpoint.manifest import MANIFEST, MAX_BYTES, TENSOR_FILES, VERSION, dump_json, manifest_hash
from checkpoint.tensors import require_finite, safetensors_stream
from errors import KestrelError

LEFTOVER = re.compile(r".+\.(?:tmp|old)-(\d+)")


class Disk:
    """Every change that saving makes to the disk, so that tests can make each of them fail or be the last."""

    def make_folder(self, path: Path) -> None:
        """Make the folder and those above it; it may exist."""
        path.mkdir(parents=True, exist_ok=True)

    def create(self, path: Path) -> BinaryIO:
        """Open a new file for writing."""
        return open(path, "wb")

    def write(self, handle: BinaryIO, data: bytes | memoryview) -> None:
        """Append to an open file."""
        handle.write(data)

    def sync(self, handle: BinaryIO) -> None:
        """Force an open file's contents to the disk."""
        handle.flush()
        os.fsync(handle.fileno())

    def sync_folder(self, path: Path) -> None:
        """Force the names in a folder to the disk."""
        if os.name == "nt":
            return  # Windows cannot open a folder
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def replace(self, source: Path, target: Path) -> None:
        """Rename in one step."""
        os.replace(source, target)

    def remove(self, path: Path) -> None:
        """Delete a file, or a folder with all it holds."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


disk = Disk()


def save(
    run_dir: Path,
    step: int,
    *,
    model: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    state: dict,
    config: dict,
    tokenizer_json: str,
    keep_last: int = 2,
    best: bool = False,
) -> Path:
    """Publish a checkpoint of `step`, then delete all but the newest `keep_last` steps and the best.

    model, optimizer   on any device; refused if a value is not finite, so that the last checkpoint stays a good one
    state, config      plain data for JSON
    best               whether this is the best so far
    → its folder; raises KestrelError when the disk refuses, with all that was there before untouched
    """
    tensors = dict(zip(TENSOR_FILES, (model, optimizer)))
    for file, content in tensors.items():
        require_finite(content, f"step {step} is not saved, {file} is not sound", "the checkpoint before it is kept")
    texts = {
        "state.json": dump_json(state),
        "config.json": dump_json(config),
        "tokenizer.json": tokenizer_json.encode(),
    }
    folder = Path(run_dir) / "checkpoints"
    try:
        path = publish(folder, step, tensors, texts, best)
    except OSError as error:
        raise KestrelError(
            f"could not save step {step} in {folder}: {reason(error)}; earlier checkpoints are intact"
        ) from error
    retire(folder, max(keep_last, 1))
    return path


def publish(
    folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], texts: dict[str, bytes], best: bool
) -> Path:
    """Write the checkpoint aside, point to it, and rename it into place."""
    disk.make_folder(folder)
    for parent in (folder.parent, folder.parent.parent):
        disk.sync_folder(parent)
    remove_leftovers(folder)
    name = free_name(folder, step)
    staging = folder / f"{name}.tmp-{os.getpid()}"
    try:
        write_folder(staging, step, tensors, texts, best)
        for pointer in ("latest", "best") if best else ("latest",):
            point(folder, pointer, name)
        disk.sync_folder(folder)  # the pointer must not be lost while the rename is kept: it would name an older one
        disk.replace(staging, folder / name)
        disk.sync_folder(folder)
    finally:
        remove_quietly(staging)
    return folder / name


def free_name(folder: Path, step: int) -> str:
    """step-00001234, or step-00001234.2 and so on where that exists."""
    name, revision = f"step-{step:08d}", 1
    while os.path.lexists(folder / (name if revision == 1 else f"{name}.{revision}")):
        revision += 1
    return name if revision == 1 else f"{name}.{revision}"


def write_folder(
    path: Path, step: int, tensors: dict[str, dict[str, Tensor]], texts: dict[str, bytes], best: bool
) -> None:
    """Write all files, the manifest last, and force them and the folder to the disk."""
    disk.make_folder(path)
    entries = {name: write_file(path / name, safetensors_stream(content)) for name, content in tensors.items()}
    entries |= {name: write_file(path / name, [content]) for name, content in texts.items()}
    manifest = {"version": VERSION, "step": step, "best": best, "saved_at": time.time(), "files": entries}
    write_file(path / MANIFEST, [dump_json(manifest | {"sha256": manifest_hash(manifest)})])
    disk.sync_folder(path)


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write a file and force it to the disk. → the manifest's entry"""
    digest, size = hashlib.sha256(), 0
    with disk.create(path) as handle:
        for chunk in chunks:
            disk.write(handle, chunk)
            digest.update(chunk)
            size += len(chunk)
        disk.sync(handle)
    assert size <= MAX_BYTES.get(path.name, size), f"{path.name} is too large to be read again: {size} bytes"
    return {"bytes": size, "sha256": digest.hexdigest()}


def point(folder: Path, pointer: str, name: str) -> None:
    """Replace a pointer file in one step."""
    temporary = folder / f"{pointer}.tmp-{os.getpid()}"
    try:
        write_file(temporary, [f"{name}\n".encode()])
        disk.replace(temporary, folder / pointer)
    finally:
        remove_quietly(temporary)


def retire(folder: Path, keep_last: int) -> None:
    """Delete all checkpoints but the newest steps, the latest and the best. Failing at that is a warning.

    Each is renamed first, so that no reader meets half of it; what a failing delete leaves goes at the next save.
    """
    complete = list_checkpoints(folder.parent)
    newest = {order(path)[0]: path for path in complete}  # the last revision of each step
    keep = {*list(newest.values())[-keep_last:], latest(folder.parent), best_checkpoint(folder.parent)}
    for path in (path for path in complete if path not in keep):
        leftover = path.with_name(f"{path.name}.old-{os.getpid()}")
        try:
            disk.replace(path, leftover)
            disk.remove(leftover)
        except OSError as error:
            warnings.warn(f"could not delete the old checkpoint {path}: {reason(error)}", stacklevel=3)


def remove_leftovers(folder: Path) -> None:
    """Delete what saves that were killed left behind, but nothing that another living process may be writing."""
    for path in folder.iterdir():
        match = LEFTOVER.fullmatch(path.name)
        if match and not is_alive_elsewhere(int(match[1])):
            remove_quietly(path)


def is_alive_elsewhere(pid: int) -> bool:
    """Whether another process has this id; where that cannot be asked, we assume so."""
    if pid == os.getpid():
        return False
    if os.name == "nt":
        return True  # asking with os.kill would end it
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def remove_quietly(path: Path) -> None:
    """Delete what may not exist or may refuse."""
    with contextlib.suppress(OSError):
        disk.remove(path)


def reason(error: OSError) -> str:
    """What went wrong and what to do about it."""
    elsewhere = "make the folder writable, or choose another with runs_dir="
    remedies = {
        errno.ENOSPC: "free some space, or choose another disk with runs_dir=",
        errno.EDQUOT: "free some of your quota, or choose another disk with runs_dir=",
        errno.EACCES: elsewhere,
        errno.EPERM: elsewhere,
        errno.EROFS: elsewhere,
    }
    return f"{error.strerror or error} ({remedies.get(error.errno, 'check the disk')})"
