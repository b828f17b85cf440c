"""The published vocabularies of GPT-2 and GPT-4 (cl100k), read from tiktoken's cache or fetched into it.

tiktoken can fetch them itself, but without a network it may try for minutes and ends in a long traceback. Here the
cache is looked at first, a server that does not answer costs a few seconds, and the error says how to bring the file.
"""

import base64
import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from data.bpe import BYTE_OF_LETTER, letters_to_bytes
from data.download import download, file_sha256, is_reachable
from data.files import locked
from errors import KestrelError


@dataclass(frozen=True)
class RankFile:
    """Where a vocabulary is published, and what must be in the file."""

    encoding: str  # tiktoken's name for it
    url: str
    sha256: str

    @property
    def cache_name(self) -> str:
        """What tiktoken calls the file in its cache."""
        return hashlib.sha1(self.url.encode()).hexdigest()


PUBLISHED = {
    "gpt2": RankFile(
        "gpt2",
        "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe",
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    ),
    "cl100k": RankFile(
        "cl100k_base",
        "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken",
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
    ),
}


def published_tokens(name: str) -> list[bytes]:
    """The tokens of "gpt2" or "cl100k" in the order of their ids, without special tokens."""
    content = read_ranks(name, PUBLISHED[name])
    return gpt2_tokens(content) if name == "gpt2" else cl100k_tokens(content)


def gpt2_tokens(content: bytes) -> list[bytes]:
    """GPT-2's file lists the merges, "Ġt he" a line after the first; the single bytes come before them."""
    singles = [bytes([value]) for value in BYTE_OF_LETTER.values()]
    merges = content.decode().split("\n")[1:-1]
    return singles + [letters_to_bytes(merge.replace(" ", "")) for merge in merges]


def cl100k_tokens(content: bytes) -> list[bytes]:
    """GPT-4's file has the token in base64 and its id on each line."""
    rows = [line.split() for line in content.splitlines() if line]
    return [base64.b64decode(token) for token, _ in sorted(rows, key=lambda row: int(row[1]))]


def read_ranks(name: str, file: RankFile) -> bytes:
    """The file's content from the cache or the network; raises KestrelError within seconds if neither has it."""
    path = cache_folder() / file.cache_name
    try:
        if not is_whole(path, file):
            fetch(path, file)
        return path.read_bytes()
    except (OSError, KestrelError) as error:
        raise KestrelError(how_to_bring(name, file, error)) from error


def fetch(path: Path, file: RankFile) -> None:
    """Download the file to where tiktoken would, in the place of a damaged one."""
    if not is_reachable(file.url):
        raise OSError("there is no answer from the network")
    with locked(path.with_name(f"{path.name}.lock")):
        if not is_whole(path, file):  # another process may just have fetched it
            path.unlink(missing_ok=True)
            download(file.url, path, sha256=file.sha256)


def is_whole(path: Path, file: RankFile) -> bool:
    """Whether this is the published file, unchanged."""
    return path.is_file() and file_sha256(path) == file.sha256


def cache_folder() -> Path:
    """Where tiktoken keeps what it has fetched."""
    named = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    return Path(named) if named else Path(tempfile.gettempdir()) / "data-gym-cache"


def how_to_bring(name: str, file: RankFile, error: Exception) -> str:
    """One sentence for somebody without a network: what is missing, where, and how to get it there."""
    path = cache_folder() / file.cache_name
    return (
        f"tokenizer={name} needs {path}, which is {'damaged' if path.exists() else 'not there'} and cannot be fetched "
        f"({error}): where there is a network, run "
        f"`TIKTOKEN_CACHE_DIR=ranks python -c \"import tiktoken; tiktoken.get_encoding('{file.encoding}')\"`, "
        f"copy ranks/{file.cache_name} here and set TIKTOKEN_CACHE_DIR to its folder; or take tokenizer=bpe"
    )
