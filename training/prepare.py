"""Tokenizer and token shards, made once by rank 0 and read by all.

A tokenizer learned from a data set is kept in the cache beside the shards it encoded, so a second run on the same data
starts at once. A run that goes on uses the tokenizer of its checkpoint.
"""

import hashlib
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import checkpoint
from data.documents import TokenShards, build_shards, open_shards
from data.files import default_cache_dir
from data.sources import DataConfig, Source, TextConfig, open_source
from data.text_files import find_files
from data.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer, tokenizer_from_json, train_tokenizer
from errors import KestrelError
from training.distributed import Device, on_main, print_main


class Data(NamedTuple):
    """What a run learns from and is judged by."""

    tokenizer: Tokenizer
    train: TokenShards
    val: TokenShards


def prepare_data(data: DataConfig, tokenizer: TokenizerConfig, start: Path | None, device: Device) -> Data:
    """Everything between a data set's name and its tokens.

    start   the checkpoint to go on from, or None
    """
    cache = default_cache_dir(data.cache_dir)

    def prepare() -> tuple[str, Path, Path]:
        source = open_source(data)
        chosen = find_tokenizer(tokenizer, source, start, cache)
        folders = [encode_split(source, chosen, split, cache) for split in ("train", "val")]
        return chosen.to_json(), *folders

    text, train, val = on_main(prepare, device)
    return Data(tokenizer_from_json(text), open_shards(train), open_shards(val))


def require_files(data: DataConfig) -> None:
    """Refuse local files that are not there or cannot be read, before a folder is made for the run."""
    if data.files:
        find_files(data.files)
        find_files(data.val_files, "data.val_files")
    elif type(data) is TextConfig:
        open_source(data)  # says what is missing


def encode_split(source: Source, tokenizer: Tokenizer, split: str, cache: Path) -> Path:
    """Encode a split unless the cache has it, with a bar on a terminal. → its folder"""
    with tqdm(desc=f"encoding {split}", unit="B", unit_scale=True, disable=None, leave=False) as bar:
        shards = build_shards(source, tokenizer, split, cache, progress=bar.update)
    print_main(
        f"data: {source.name} {split}, {shards.n_documents:,} documents, {shards.n_tokens:,} tokens, "
        f"{shards.n_bytes / shards.n_tokens:.2f} bytes per token"
    )
    return shards.folder


def find_tokenizer(config: TokenizerConfig, source: Source, start: Path | None, cache: Path) -> Tokenizer:
    """The checkpoint's tokenizer; without one the cached tokenizer of this text; else a new one."""
    if start is not None:
        return tokenizer_from_json(checkpoint.read_checkpoint(start).tokenizer_json)
    key = hashlib.sha256(json.dumps([source.fingerprint, asdict(config)]).encode()).hexdigest()[:20]
    folder = cache / "tokenizers" / key
    if os.path.exists(folder / "tokenizer.json"):
        return load_tokenizer(folder, remedy=f"delete the folder {folder} and it will be made again")
    started = time.perf_counter()
    require_writable(folder, cache)
    tokenizer = train_tokenizer(config, source.documents("train"))
    tokenizer.save(folder)
    short = f", {tokenizer.shortfall} fewer than asked for" if tokenizer.shortfall else ""
    print_main(
        f"tokenizer: {config.name}, {tokenizer.vocab_size} tokens{short} ({time.perf_counter() - started:.1f} s)"
    )
    return tokenizer


def require_writable(folder: Path, cache: Path) -> None:
    """Make a folder of the cache, or say which cache cannot be written, before anything is learned to be kept there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(0, "it is read-only")
    except OSError as error:
        raise KestrelError(
            f"cannot write to the cache {cache}: {error.strerror or error}; choose another folder with "
            "data.cache_dir= or the environment variable KESTREL_CACHE"
        ) from error
