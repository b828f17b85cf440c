"""Text to token ids and back, the same way for every kind of vocabulary.

Each kind is a list of byte strings and a pattern that cuts text into words; tiktoken's engine does the rest:

    bpe      byte pairs learned from the training text, with GPT-4's split of words
    gpt2     GPT-2's published vocabulary            cl100k   GPT-4's
    char     the characters of the training text     byte     the 256 bytes

All of them hold every single byte, so any text can be written and `decode(encode(text)) == text`. The one exception is
text that UTF-8 cannot write: a lone surrogate becomes U+FFFD, and a surrogate pair the character it stands for.

The nine special tokens follow the ordinary ones. Text never turns into them, whatever a user types: they come in by id
or name only. A tokenizer is kept as JSON with a checksum, never as a pickle; its hash goes into every checkpoint.
"""

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Optional

import numpy as np
import tiktoken

from data.bpe import BYTES, SPLIT_PATTERN, learn_byte_pairs, learn_characters
from data.files import publish
from data.published import published_tokens
from errors import KestrelError

SPECIALS = [
    "<|bos|>",  # begins every document
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # the assistant calls a tool …
    "<|python_end|>",
    "<|output_start|>",  # … and reads what it answered
    "<|output_end|>",
]
MIN_VOCAB = len(BYTES) + len(SPECIALS)
ONE_CHARACTER = r"(?s:.)"
PATTERNS = {
    "bpe": SPLIT_PATTERN,
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": SPLIT_PATTERN.replace("{1,2}", "{1,3}"),
    "char": ONE_CHARACTER,
    "byte": ONE_CHARACTER,
}
FIXED_VOCAB = {"gpt2": 50256 + len(SPECIALS), "cl100k": 100256 + len(SPECIALS), "byte": MIN_VOCAB}
MAX_VOCAB = 1 << 20  # more than anybody uses, and than its file may hold
DEFAULT_VOCAB = 4096

FILE_NAME = "tokenizer.json"
FILE_HEAD = {"format": "kestrel-tokenizer", "version": 1}
MAX_FILE_BYTES = 8_000_000  # cl100k takes 1.7 MB; more than this is not a tokenizer, and would cost memory to find out

# The regex engine gives up on runs of about a million spaces. Such runs are cut into parts of this many.
SPACES_AT_ONCE = 100_000


@dataclass
class TokenizerConfig:
    """Which tokenizer, and what to learn it from.

    vocab_size   counts everything, the nine special tokens too. bpe: how many to have (a small text may give fewer);
                 char: at most so many, rare characters are then written in bytes; None: 4096, or what the kind has
    max_chars    learn from this many characters of the training text
    doc_cap      and at most this many of each document; by default that crops none, for a book may be one document
    """

    name: str = "bpe"
    vocab_size: Optional[int] = None
    max_chars: int = 2_000_000_000
    doc_cap: int = 10_000_000

    def __post_init__(self) -> None:
        if self.name not in PATTERNS:
            raise KestrelError(f"tokenizer.name must be one of {', '.join(PATTERNS)}, got '{self.name}'")
        fixed = FIXED_VOCAB.get(self.name)
        if self.vocab_size is None:
            self.vocab_size = fixed or DEFAULT_VOCAB
        if fixed and self.vocab_size != fixed:
            raise KestrelError(
                f"tokenizer.vocab_size of {self.name} is always {fixed}, got {self.vocab_size}: leave it out"
            )
        if self.vocab_size < MIN_VOCAB:
            raise KestrelError(
                f"tokenizer.vocab_size must be at least {MIN_VOCAB} (256 bytes and {len(SPECIALS)} special tokens), "
                f"got {self.vocab_size}"
            )
        if self.vocab_size > MAX_VOCAB:
            raise KestrelError(f"tokenizer.vocab_size must be at most {MAX_VOCAB}, got {self.vocab_size}")
        for key in ("max_chars", "doc_cap"):
            if getattr(self, key) < 1:
                raise KestrelError(f"tokenizer.{key} must be positive, got {getattr(self, key)}")


class Tokenizer:
    """A vocabulary and the ways into and out of it.

    kind     a key of PATTERNS
    tokens   the bytes of every ordinary token, in the order of their ids; raises KestrelError if they cannot work
    """

    def __init__(self, kind: str, tokens: list[bytes]) -> None:
        if kind not in PATTERNS:
            raise KestrelError(f"the kind must be one of {', '.join(PATTERNS)}, got {kind!r}")
        ranks = {token: rank for rank, token in enumerate(tokens)}
        if len(ranks) != len(tokens) or b"" in ranks:
            raise KestrelError("its tokens must be different from each other and not empty")
        if missing := sum(byte not in ranks for byte in BYTES):
            raise KestrelError(f"{missing} of the 256 single bytes are missing from its tokens")
        if len(ranks) != FIXED_VOCAB.get(kind, len(ranks) + len(SPECIALS)) - len(SPECIALS):
            raise KestrelError(f"{kind} has {FIXED_VOCAB[kind] - len(SPECIALS)} ordinary tokens, not {len(tokens)}")
        self.kind = kind
        self.tokens = tokens
        self.specials = {name: len(tokens) + i for i, name in enumerate(SPECIALS)}
        self.bos_id = self.specials["<|bos|>"]
        self.vocab_size = len(tokens) + len(SPECIALS)
        self.shortfall = 0  # how many tokens fewer than asked for the training text gave
        self._engine = tiktoken.Encoding(
            kind, pat_str=PATTERNS[kind], mergeable_ranks=ranks, special_tokens=self.specials
        )

    def __repr__(self) -> str:
        return f"Tokenizer({self.kind}, {self.vocab_size} tokens, {self.hash[:8]})"

    def encode(self, text: str, *, prepend: int | str | None = None, append: int | str | None = None) -> list[int]:
        """The ids of a text, after and before a special token if wanted (its id or its name)."""
        return self._surround(self._encode(text), prepend, append).tolist()

    def encode_batch(
        self,
        texts: Iterable[str],
        *,
        prepend: int | str | None = None,
        append: int | str | None = None,
        num_threads: int | None = None,
    ) -> list[np.ndarray]:
        """The ids of many texts as uint32 arrays (read-only), in order; num_threads None: one for each core."""
        texts = list(texts)
        num_threads = num_threads or os.cpu_count() or 1

        def encode_part(part: list[str]) -> list[np.ndarray]:
            return [self._surround(self._encode(text), prepend, append) for text in part]

        if num_threads == 1:
            return encode_part(texts)
        # several parts for each thread: documents differ in length, and handing them over one by one costs more
        size = max(1, -(-len(texts) // (8 * num_threads)))
        with ThreadPoolExecutor(num_threads) as pool:
            parts = pool.map(encode_part, [texts[i : i + size] for i in range(0, len(texts), size)])
            return list(chain.from_iterable(parts))

    def encode_special(self, name: str) -> int:
        """The id of a special token."""
        if name not in self.specials:
            raise KestrelError(f"there is no special token '{name}'; there are {' '.join(SPECIALS)}")
        return self.specials[name]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of some ids; bytes that are no UTF-8 (a character cut in two) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes of some ids, special tokens as their names; for streams, where a character may come in parts."""
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        try:
            return self._engine.decode_bytes(ids)
        except (KeyError, OverflowError) as error:
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise KestrelError(f"token ids go from 0 to {self.vocab_size - 1} here, got {wrong}") from error

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """How many bytes of text each id stands for, int32 [V]: 0 for special tokens, so bits per byte ignore them."""
        return np.array([len(token) for token in self.tokens] + [0] * len(SPECIALS), dtype=np.int32)

    @cached_property
    def hash(self) -> str:
        """sha256 of the canonical JSON: equal hashes mean equal ids for every text."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces, tokens in base64."""
        return json.dumps(self._content(), sort_keys=True, separators=(",", ":"))

    def save(self, folder: str | Path) -> Path:
        """Write tokenizer.json into a folder, so that a reader sees the whole file or none."""
        path = Path(folder) / FILE_NAME
        text = json.dumps(self._document(), indent=0) + "\n"
        if len(text) > MAX_FILE_BYTES:
            raise KestrelError(
                f"a vocabulary of {self.vocab_size} tokens makes a file over {MAX_FILE_BYTES} bytes; take fewer"
            )
        temporary = path.with_name(f"{FILE_NAME}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text, encoding="ascii")
            publish(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise KestrelError(f"cannot write {path}: {error.strerror or error}") from error
        return path

    def _content(self) -> dict[str, Any]:
        tokens = [base64.b64encode(token).decode("ascii") for token in self.tokens]
        return FILE_HEAD | {"kind": self.kind, "pattern": PATTERNS[self.kind], "specials": SPECIALS, "tokens": tokens}

    def _document(self) -> dict[str, Any]:
        return self._content() | {"sha256": self.hash}

    def _encode(self, text: str) -> np.ndarray:
        # encode_to_numpy rather than encode_ordinary: no Python integers, and an exception where the other one panics
        try:
            return self._engine.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            return self._encode(without_surrogates(text))
        except ValueError:
            parts = re.split(rf"(\s{{{SPACES_AT_ONCE}}})", text)
            if len(parts) == 1:
                raise
            return np.concatenate([self._encode(part) for part in parts])

    def _surround(self, ids: np.ndarray, prepend: int | str | None, append: int | str | None) -> np.ndarray:
        if prepend is None and append is None:
            return ids
        before, after = ([] if token is None else [self._id(token)] for token in (prepend, append))
        return np.concatenate([np.array(before, np.uint32), ids, np.array(after, np.uint32)])

    def _id(self, token: int | str) -> int:
        if isinstance(token, str):
            return self.encode_special(token)
        if not 0 <= token < self.vocab_size:
            raise KestrelError(f"token ids go from 0 to {self.vocab_size - 1} here, got {token}")
        return token


def train_tokenizer(config: TokenizerConfig, documents: Iterable[str] = ()) -> Tokenizer:
    """The tokenizer of a config; bpe and char learn it from the documents, which should be those of the training split.

    If the text gives fewer tokens than asked for, `shortfall` says how many.
    """
    if config.name == "byte":
        return Tokenizer("byte", BYTES)
    if config.name in ("gpt2", "cl100k"):
        return Tokenizer(config.name, published_tokens(config.name))
    texts = training_texts(documents, config.doc_cap, config.max_chars)
    first = next(texts, None)
    if first is None:
        raise KestrelError(
            f"tokenizer={config.name} learns from the training text, and that is empty: check data.files"
        )
    learn = learn_byte_pairs if config.name == "bpe" else learn_characters
    tokenizer = Tokenizer(config.name, learn(chain([first], texts), config.vocab_size - len(SPECIALS)))
    if config.name == "bpe":
        tokenizer.shortfall = config.vocab_size - tokenizer.vocab_size
    return tokenizer


def training_texts(documents: Iterable[str], doc_cap: int, max_chars: int) -> Iterator[str]:
    """What to learn from: documents cropped to doc_cap characters, max_chars in all, none of them empty."""
    left = max_chars
    for document in documents:
        text = without_surrogates(document[: min(doc_cap, left)])
        if text:
            yield text
        left -= len(text)
        if left <= 0:
            return


def without_surrogates(text: str) -> str:
    """Text that UTF-8 can write: surrogate pairs joined to their character, lone ones replaced by U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def load_tokenizer(path: str | Path, remedy: str = "copy it again or make a new run") -> Tokenizer:
    """The tokenizer that was saved in a folder (or its file); raises KestrelError unless it is exactly that."""
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    try:
        return _from_document(_read_document(path))
    except (ValueError, RecursionError) as error:
        what = error if isinstance(error, KestrelError) else "it is damaged or not JSON"
        raise KestrelError(f"cannot use the tokenizer {path}: {what}; {remedy}") from error


def tokenizer_from_json(text: str) -> Tokenizer:
    """The inverse of `Tokenizer.to_json`; raises KestrelError unless it is exactly that."""
    try:
        document = json.loads(text)
        if isinstance(document, dict):
            document["sha256"] = hashlib.sha256(text.encode()).hexdigest()
        return _from_document(document)
    except (ValueError, RecursionError) as error:
        what = error if isinstance(error, KestrelError) else "it is damaged or not JSON"
        raise KestrelError(f"cannot use this tokenizer: {what}") from error


def _read_document(path: Path) -> Any:
    try:
        if not path.is_file():
            raise KestrelError("there is no such file")
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            raise KestrelError(f"{size} bytes are too many for a tokenizer")
        return json.loads(path.read_bytes().decode("ascii"))
    except OSError as error:
        raise KestrelError(error.strerror or str(error)) from error


def _from_document(document: Any) -> Tokenizer:
    """Check what the file says, then that it is to the letter what save would write, checksum included."""
    if not isinstance(document, dict) or document.get("format") != FILE_HEAD["format"]:
        raise KestrelError(f"it is no {FILE_HEAD['format']} file")
    if document.get("version") != FILE_HEAD["version"]:
        raise KestrelError(f"its version is {document.get('version')!r}, this program reads {FILE_HEAD['version']}")
    tokens = document.get("tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise KestrelError("its tokens are not a list of base64 texts")
    tokenizer = Tokenizer(str(document.get("kind")), [base64.b64decode(token, validate=True) for token in tokens])
    right = tokenizer._document()
    if wrong := sorted(key for key in right.keys() | document.keys() if document.get(key, ...) != right.get(key, ...)):
        raise KestrelError(f"what it says under {', '.join(wrong)} does not fit the rest")
    return tokenizer
