"""Writing files so that a reader sees a whole one or none, and two writers do not fight: what the caches stand on.

A file or folder is written under a temporary name beside its place, flushed to the disk, and renamed into place. The
lock is the operating system's (flock): it goes away with the process that holds it, even when that is killed.
"""

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no flock: two writers there may both do the work, and the later rename wins
    fcntl = None  # type: ignore[assignment]


def default_cache_dir(configured: str | None = None) -> Path:
    """Where caches live: `configured`, $KESTREL_CACHE, $XDG_CACHE_HOME/kestrel or ~/.cache/kestrel."""
    if configured or os.environ.get("KESTREL_CACHE"):
        return Path(os.path.expanduser(configured or os.environ["KESTREL_CACHE"]))
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "kestrel"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path` (made if need be); wait, and say so, while another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as handle:
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"note: waiting for another process to finish with {path.parent}", file=sys.stderr, flush=True)
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def publish(temporary: Path, final: Path) -> None:
    """Rename a finished file or folder into place, and make the rename itself last through a power cut."""
    sync(temporary)
    os.replace(temporary, final)
    sync(final.parent)


def sync(path: Path) -> None:
    """Flush what was written to a file, or a folder's list of names, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
