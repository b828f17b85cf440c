"""The published vocabularies of GPT-2 and GPT-4 (cl100k), read from tiktoken's cache or fetched into it.

tiktoken can fetch them itself, but without a network it may try for minutes and ends in a long traceback. Here the cache
is looked at first, a server that does not answer costs a few seconds, and the error says how to bring the file by hand.
"""

import base64
import contextlib
import hashlib
import os
import queue
import tempfile
import threading
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from data.bpe import BYTE_OF_LETTER, letters_to_bytes
from errors import KestrelError

ANSWER_S = 3.0  # how long a server may take to answer at all; once it has, the download may take its time


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
    merges = content.decode().split("\n")[1:-1]
    return [bytes([value]) for value in BYTE_OF_LETTER.values()] + [
        letters_to_bytes(m.replace(" ", "")) for m in merges
    ]


def cl100k_tokens(content: bytes) -> list[bytes]:
    """GPT-4's file has the token in base64 and its id on each line."""
    rows = [line.split() for line in content.splitlines() if line]
    return [base64.b64decode(token) for token, _ in sorted(rows, key=lambda row: int(row[1]))]


def read_ranks(name: str, file: RankFile) -> bytes:
    """The file's content from the cache or the network; raises KestrelError within seconds if neither has it."""
    path = cache_folder() / file.cache_name
    if path.is_file() and is_right(content := path.read_bytes(), file):
        return content
    try:
        content = download(file.url)
        if not is_right(content, file):
            raise OSError("the server sent something else")
    except (OSError, HTTPException) as error:
        raise KestrelError(how_to_bring(name, file, error)) from error
    with contextlib.suppress(OSError):  # the run keeps its own copy: without a cache the next run downloads again
        write_whole(path, content)
    return content


def cache_folder() -> Path:
    """Where tiktoken keeps what it has fetched."""
    named = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    return Path(named) if named else Path(tempfile.gettempdir()) / "data-gym-cache"


def is_right(content: bytes, file: RankFile) -> bool:
    """Whether this is the published file, whole and unchanged."""
    return hashlib.sha256(content).hexdigest() == file.sha256


def write_whole(path: Path, content: bytes) -> None:
    """Write beside the file, then rename over it; OSError leaves the old file as it was, and no other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # before the rename, or a power cut could leave an empty file under the final name
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def download(url: str) -> bytes:
    """The body behind a URL, or OSError if the server has not begun to answer after a few seconds.

    The request runs in a thread because looking up a host name has no time limit of its own.
    """
    answers: queue.SimpleQueue[HTTPResponse | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(urllib.request.urlopen(url, timeout=ANSWER_S))
        except Exception as error:  # handed to the caller, who waits for it
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=ANSWER_S)
    except queue.Empty:
        raise TimeoutError(f"no answer within {ANSWER_S:g} s") from None
    if isinstance(answer, Exception):
        raise answer
    with answer:
        return answer.read()


def how_to_bring(name: str, file: RankFile, error: Exception) -> str:
    """One sentence for somebody without a network: what is missing, where, and how to get it there."""
    path = cache_folder() / file.cache_name
    state = "is damaged" if path.exists() else "is not there"
    return (
        f"tokenizer={name} needs {path}, which {state} and cannot be downloaded ({error}): where there is a network, run "
        f"`TIKTOKEN_CACHE_DIR=ranks python -c \"import tiktoken; tiktoken.get_encoding('{file.encoding}')\"`, copy "
        f"ranks/{file.cache_name} here and set TIKTOKEN_CACHE_DIR to the folder it lies in; or take tokenizer=bpe"
    )
