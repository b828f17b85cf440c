"""Documents as tokens on disk: encoded once, read through memory maps ever after.

    <cache>/tokens/<set>-<split>-<key>/
        manifest.json               sizes and sha256 of the files below, counts, hashes of tokenizer and source
        tokens_00000.bin …          token ids end to end, uint16 where the vocabulary allows, else uint32
        documents.bin               where each document begins, int64, and the end of the last

The key hashes the source's fingerprint, the split and the tokenizer, so a change of any of them makes a new folder and
never a stale one. BOS is not stored: it would stand before every document, and packing puts it before every piece.

A folder is written under a temporary name, flushed and renamed, with a lock held, so that whoever opens one under its
own name sees all of it: of two builders the second waits and then opens, and what a killed one leaves is swept away by
the next. Opening checks that the sizes are right; `verify=True` also reads everything and compares the sha256. A folder
that is damaged all the same has met a failing disk or a meddling hand, and is reported rather than silently rebuilt.
"""

import hashlib
import json
import os
import re
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from data.files import default_cache_dir, file_sha256, locked, publish, sync
from data.sources import Source
from errors import KestrelError

VERSION = 1
SHARD_TOKENS = 1 << 27  # 256 MB of uint16: large enough to be few, small enough to copy and check one by one
BATCH_CHARS = 1 << 22  # encoded at once: memory stays bounded, and every thread has work
SEGMENT_CHARS = 1 << 20  # longer documents are encoded in segments of this size
MANIFEST = "manifest.json"
DOCUMENTS = "documents.bin"


class Encoder(Protocol):
    """What is needed of a tokenizer (data/tokenizer.py)."""

    vocab_size: int
    bos_id: int
    hash: str

    def encode_batch(self, texts: Iterable[str]) -> list[np.ndarray]: ...


@dataclass(frozen=True)
class TokenShards:
    """The tokens of one split, as memory maps.

    folder     where they lie
    manifest   its manifest.json, checked
    shards     token ids without BOS; a document lies within one shard
    offsets    [documents + 1] where documents begin, counted over all shards
    """

    folder: Path
    manifest: dict[str, Any]
    shards: list[np.ndarray]
    offsets: np.ndarray

    @property
    def bos_id(self) -> int:
        return self.manifest["bos_id"]

    @property
    def n_documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def n_tokens(self) -> int:
        """Tokens of an epoch, with a BOS for every document."""
        return int(self.offsets[-1]) + self.n_documents

    @property
    def n_bytes(self) -> int:
        """Bytes of text, as UTF-8."""
        return self.manifest["text_bytes"]

    @cached_property
    def lengths(self) -> np.ndarray:
        """[documents] tokens of each document, without BOS."""
        return np.diff(self.offsets)

    @cached_property
    def hash(self) -> str:
        """Of the tokens themselves: equal hashes mean equal documents in equal order, wherever they were encoded."""
        files = {name: entry["sha256"] for name, entry in self.manifest["files"].items()}
        return hashlib.sha256(json.dumps([self.bos_id, files], sort_keys=True).encode()).hexdigest()

    @cached_property
    def shard_starts(self) -> np.ndarray:
        """[shards + 1] where shards begin, on the scale of `offsets`."""
        return np.concatenate([[0], np.cumsum([len(shard) for shard in self.shards], dtype=np.int64)])


def build_shards(
    source: Source,
    tokenizer: Encoder,
    split: str,
    cache_dir: str | Path | None = None,
    *,
    progress: Callable[[int], object] = lambda text_bytes: None,
    shard_tokens: int = SHARD_TOKENS,
) -> TokenShards:
    """The tokens of a split, from the cache or encoded now.

    progress   told how many bytes of text were encoded, after each batch (tqdm's `update` will do)
    """
    folder = shards_folder(source, tokenizer, split, cache_dir)
    if folder.exists():
        return open_shards(folder)
    try:
        with locked(folder.with_name(folder.name + ".lock")):
            if not folder.exists():
                for left_behind in folder.parent.glob(f"{folder.name}.tmp-*"):
                    shutil.rmtree(left_behind, ignore_errors=True)
                _build(source, tokenizer, split, folder, progress, shard_tokens)
    except OSError as error:
        raise KestrelError(f"cannot write token shards to {folder}: {error.strerror}; set data.cache_dir") from error
    return open_shards(folder)


def shards_folder(source: Source, tokenizer: Encoder, split: str, cache_dir: str | Path | None = None) -> Path:
    """Where the tokens of a split lie, built or not."""
    key = hashlib.sha256(json.dumps([VERSION, source.fingerprint, split, tokenizer.hash]).encode()).hexdigest()
    cache = default_cache_dir(str(cache_dir) if cache_dir else None)
    return cache / "tokens" / f"{source.name}-{split}-{key[:16]}"


def _build(
    source: Source,
    tokenizer: Encoder,
    split: str,
    folder: Path,
    progress: Callable[[int], object],
    shard_tokens: int,
) -> None:
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        writer = _Writer(temporary, "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4", shard_tokens)
        text_bytes = 0
        for texts in _batches(source.documents(split)):
            writer.add(_encode(tokenizer, texts))
            size = sum(len(text.encode("utf-8", "replace")) for text in texts)
            text_bytes += size
            progress(size)
        files = writer.finish()
        if not writer.lengths:
            raise KestrelError(f"data={source.name}: the {split} split has no tokens; give more text")
        manifest = {
            "version": VERSION,
            "source": source.name,
            "split": split,
            "fingerprint": source.fingerprint,
            "tokenizer": tokenizer.hash,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "dtype": writer.dtype,
            "documents": len(writer.lengths),
            "tokens": sum(writer.lengths),
            "text_bytes": text_bytes,
            "files": files,
        }
        with open(temporary / MANIFEST, "w") as handle:
            json.dump(manifest, handle, indent=1)
            handle.flush()
            os.fsync(handle.fileno())
        publish(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Documents in batches of about BATCH_CHARS characters; a long one makes a batch of its own."""
    batch: list[str] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += len(document)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Encoder, texts: list[str]) -> list[np.ndarray]:
    """The tokens of each text; long ones in segments, which the tokenizer can take in parallel and in little memory."""
    segments = [_segments(text) for text in texts]
    encoded = iter(tokenizer.encode_batch([segment for parts in segments for segment in parts]))
    arrays = []
    for parts in segments:
        ids = [np.asarray(next(encoded)) for _ in parts]
        arrays.append(ids[0] if len(ids) == 1 else np.concatenate(ids))
    return arrays


def _segments(text: str) -> list[str]:
    """Parts of at most SEGMENT_CHARS that end after a line, else before a space, else anywhere."""
    parts = []
    start = 0
    while len(text) - start > SEGMENT_CHARS:
        limit = start + SEGMENT_CHARS
        cut = text.rfind("\n", start, limit) + 1 or text.rfind(" ", start + 1, limit)
        cut = cut if cut > start else limit
        parts.append(text[start:cut])
        start = cut
    return [*parts, text[start:]]


class _Writer:
    """Appends documents to shard files, hashing what it writes."""

    def __init__(self, folder: Path, dtype: str, shard_tokens: int) -> None:
        self.folder, self.dtype, self.shard_tokens = folder, dtype, shard_tokens
        self.lengths = array("q")
        self.files: dict[str, dict[str, Any]] = {}
        self.handle: BinaryIO | None = None
        self.room = 0

    def add(self, documents: list[np.ndarray]) -> None:
        """Append some documents; those without tokens are left out."""
        for ids in documents:
            if len(ids):
                self._append(ids)
                self.lengths.append(len(ids))

    def _append(self, ids: np.ndarray) -> None:
        if self.handle is None or (len(ids) > self.room and self.room < self.shard_tokens):
            self._close()
            self._open(f"tokens_{len(self.files):05d}.bin")
        self.room -= len(ids)
        self._write(ids.astype(self.dtype).tobytes())

    def finish(self) -> dict[str, dict[str, Any]]:
        """Write where documents begin; returns size and sha256 of every file."""
        self._close()
        self._open(DOCUMENTS)
        offsets = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)]).astype("<i8")
        self._write(offsets.tobytes())
        self._close()
        return self.files

    def _open(self, name: str) -> None:
        self.name, self.digest, self.room = name, hashlib.sha256(), self.shard_tokens
        self.handle = (self.folder / name).open("wb")

    def _write(self, content: bytes) -> None:
        assert self.handle is not None
        self.handle.write(content)
        self.digest.update(content)

    def _close(self) -> None:
        if self.handle is None:
            return
        size = self.handle.tell()
        self.handle.close()
        self.handle = None
        sync(self.folder / self.name)
        self.files[self.name] = {"bytes": size, "sha256": self.digest.hexdigest()}


def open_shards(folder: str | Path, *, verify: bool = False) -> TokenShards:
    """Map the tokens in `folder`; KestrelError, naming the folder to delete, if they are not what the manifest says.

    verify   also read every file and compare its sha256, about a second for a gigabyte that is in memory
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise _damaged(folder, f"{name} is missing or not {entry['bytes']} bytes long")
        if verify and file_sha256(path) != entry["sha256"]:
            raise _damaged(folder, f"{name} does not have its sha256")
    names = sorted(name for name in manifest["files"] if name != DOCUMENTS)
    shards = [_map(folder / name, manifest["dtype"]) for name in names]
    offsets = _map(folder / DOCUMENTS, "<i8")
    if [offsets[0], offsets[-1], len(offsets) - 1] != [0, sum(map(len, shards)), manifest["documents"]]:
        raise _damaged(folder, f"{DOCUMENTS} does not fit the tokens")
    return TokenShards(folder, manifest, shards, offsets)


def _read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json, taken as data that may be anything: only plain names in this folder, only what is needed."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        good = (
            manifest["version"] == VERSION
            and manifest["dtype"] in ("<u2", "<u4")
            and DOCUMENTS in manifest["files"]
            and len(manifest["files"]) > 1
            and all(re.fullmatch(r"tokens_\d{5}\.bin|documents\.bin", name) for name in manifest["files"])
            and all(entry["bytes"] > 0 and len(entry["sha256"]) == 64 for entry in manifest["files"].values())
            and all(isinstance(manifest[key], int) for key in ("bos_id", "vocab_size", "documents", "text_bytes"))
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder, f"{MANIFEST} cannot be read") from error
    if not good:
        raise _damaged(folder, f"{MANIFEST} is not one of version {VERSION}")
    return manifest


def _damaged(folder: Path, what: str) -> KestrelError:
    return KestrelError(
        f"the token shards in {folder} are damaged: {what}; delete that folder and they will be rebuilt"
    )


def _map(path: Path, dtype: str) -> np.ndarray:
    # a plain array over the map: slicing an np.memmap itself costs microseconds each time
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))
