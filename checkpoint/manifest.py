"""The manifest that says what a checkpoint must hold, and how files that nobody vouches for are read.

A damaged or hostile file must cost neither time nor memory: sizes are checked before anything is read, only regular
files are opened, JSON is capped because parsed it takes some twenty times its size, and a manifest can only name the
five files we write, so no name leads out of the folder. Whatever is wrong becomes a KestrelError that names the file.
"""

import contextlib
import hashlib
import io
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from errors import KestrelError

TENSOR_FILES = ("model.safetensors", "optimizer.safetensors")
TEXT_FILES = ("state.json", "config.json", "tokenizer.json")
MANIFEST = "manifest.json"
VERSION = 1
MAX_BYTES = {MANIFEST: 64 << 10, "state.json": 8 << 20, "config.json": 8 << 20, "tokenizer.json": 16 << 20}
REMEDY = "use another checkpoint (delete this folder to go on from the one before it), or copy it again from its source"


def damaged(file: Path, how: str) -> KestrelError:
    """The error for a file that is not what was written."""
    return KestrelError(f"{file} is damaged: {how}; {REMEDY}")


@contextlib.contextmanager
def opened(file: Path, size: int | None = None) -> Iterator[io.FileIO]:
    """Open a regular file of exactly `size` bytes if that is known, and of no more than a file of its name may have."""
    try:
        with open(file, "rb", buffering=0, opener=_open_without_waiting) as handle:
            status = os.fstat(handle.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise damaged(file, "it is not a regular file")
            if size is not None and status.st_size != size:
                raise damaged(file, f"it has {status.st_size} bytes and should have {size}")
            if status.st_size > MAX_BYTES.get(file.name, status.st_size):
                raise damaged(file, f"it has {status.st_size} bytes, which is more than {MAX_BYTES[file.name]}")
            yield handle
    except OSError as error:
        raise KestrelError(f"could not read {file}: {error.strerror or error}; {REMEDY}") from error


def _open_without_waiting(file: str, flags: int) -> int:
    """A named pipe in a file's place would otherwise hold us up for ever."""
    return os.open(file, flags | getattr(os, "O_NONBLOCK", 0))


def read_text_file(path: Path, name: str, manifest: dict[str, Any]) -> str:
    """A small file of the checkpoint at `path`, verified."""
    entry = manifest["files"][name]
    with opened(path / name, entry["bytes"]) as handle:
        content = handle.read()
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise damaged(path / name, "its contents have changed since they were written (sha256)")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise damaged(path / name, "it is not UTF-8 text") from error


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint at `path`, verified: its own hash, and a size and hash for each of our files."""
    where = Path(path) / MANIFEST
    with opened(where) as handle:
        manifest = parse_json(handle.read(), where)
    if manifest.get("version") != VERSION:
        raise damaged(where, f"its version is {manifest.get('version')!r:.80}, and we read version {VERSION}")
    entries = manifest.get("files")
    if not isinstance(entries, dict) or set(entries) != {*TENSOR_FILES, *TEXT_FILES}:
        raise damaged(where, f"it should list exactly {', '.join(TENSOR_FILES + TEXT_FILES)}")
    if not all(_has_types(entry, {"bytes": int, "sha256": str}) for entry in entries.values()):
        raise damaged(where, "a file has no size or no hash")
    if not _has_types(manifest, {"step": int, "best": bool, "saved_at": float}):
        raise damaged(where, "it does not say step, best and saved_at")
    if manifest.get("sha256") != manifest_hash(manifest):
        raise damaged(where, "it has changed since it was written (sha256)")
    return manifest


def manifest_hash(manifest: dict[str, Any]) -> str:
    """sha256 of all that the manifest says but this hash."""
    contents = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def _has_types(values: Any, kinds: dict[str, type]) -> bool:
    return isinstance(values, dict) and all(type(values.get(key)) is kind for key, kind in kinds.items())


def parse_json(text: bytes | bytearray | str, file: Path) -> dict[str, Any]:
    """A JSON object; `file` is where the text came from."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: syntax, encoding, numbers of thousands of digits
        raise damaged(file, f"it does not parse as JSON ({type(error).__name__})") from error
    if not isinstance(value, dict):
        raise damaged(file, "it holds no JSON object")
    return value


def dump_json(value: dict) -> bytes:
    """JSON that every parser reads: ASCII, no NaN, no Infinity."""
    return json.dumps(value, allow_nan=False, indent=1).encode()
