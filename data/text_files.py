"""Local text files as documents: .txt, .jsonl and .parquet, each also gzipped where that is usual.

    .txt      one document a file, or several, ended by lines that hold only <|endoftext|> (the form of TinyStories)
    .jsonl    one document a line: the string under `column` of each JSON object
    .parquet  one document a row: the string in `column`

Text is UTF-8, with or without a byte order mark; line ends become "\\n". Bytes that are not UTF-8 become U+FFFD and are
counted and reported once a file; a file full of them, or with NUL bytes, is refused as not being text. A text file is
read in blocks, and a document longer than MAX_DOCUMENT characters is handed on in parts, so memory stays bounded.
Documents of nothing but white space are dropped. Any other file name is read as .txt.
"""

import codecs
import glob
import gzip
import io
import json
import os
import re
import stat
import sys
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from errors import KestrelError

SEPARATOR = "<|endoftext|>"
SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
MAX_DOCUMENT = 1 << 24  # characters
BLOCK = 1 << 20  # bytes
VALIDATION_WORDS = {"val", "valid", "validation"}  # in the names of files that are held out

_reported: set[tuple[Path, int]] = set()  # files whose bad bytes have been told of; they are read more than once


def find_files(patterns: list[str], key: str = "data.files") -> list[Path]:
    """The files that paths, folders and globs name, sorted within each, none twice; KestrelError if one names none."""
    found = [path for pattern in patterns for path in _matches(pattern, key)]
    return list(dict.fromkeys(found))


def _matches(pattern: str, key: str) -> list[Path]:
    path = Path(os.path.expanduser(pattern))
    mode = _mode(path, key)
    if mode is not None and stat.S_ISDIR(mode):
        _check_may_be_listed(path, key)
        inside = sorted(
            file for file in path.rglob("*") if file.name.lower().endswith(SUFFIXES) and _is_visible(file, path)
        )
        if not inside:
            raise KestrelError(f"{key}: the folder {path} holds no .txt, .jsonl or .parquet file")
        return inside
    if mode is not None:
        if not stat.S_ISREG(mode):
            raise KestrelError(
                f"{key}: {path} is not a regular file but a pipe or a device, which cannot be read more than once: "
                "write it to a file first"
            )
        return [path]
    if not glob.has_magic(pattern):
        raise KestrelError(f"{key}: there is no file {pattern} (looked in {Path.cwd()})")
    matches = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    if files := [match for match in matches if match.is_file()]:
        return files
    raise KestrelError(f"{key}: nothing matches {pattern} (looked in {Path.cwd()})")


def _mode(path: Path, key: str) -> int | None:
    """What kind of thing a path is (st_mode); None if there is none, KestrelError if that may not be known."""
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte
        raise KestrelError(f"{key}: cannot read {path!s:.300}: {getattr(error, 'strerror', None) or error}") from error


def _check_may_be_listed(folder: Path, key: str) -> None:
    try:
        os.scandir(folder).close()
    except OSError as error:
        raise KestrelError(f"{key}: the folder {folder} cannot be read: {error.strerror or error}") from error


def _is_visible(file: Path, folder: Path) -> bool:
    return file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)


def has_word(path: Path, words: set[str]) -> bool:
    """Whether a file's name has one of the words: `stories_valid.txt` has "valid", `invalid.txt` does not."""
    return not words.isdisjoint(re.split(r"[^a-z]+", path.name.lower()))


def read_documents(path: Path, column: str) -> Iterator[str]:
    """The documents of one file in their order; KestrelError, naming it, for a file that cannot be read as its kind."""
    try:
        yield from (document for document in _raw_documents(path, column) if not _is_blank(document))
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise KestrelError(f"cannot read {path}: {reason}") from error


def _raw_documents(path: Path, column: str) -> Iterator[str]:
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        return _parquet_rows(path, column)
    if kind in ("jsonl", "json"):
        return _json_lines(path, column)
    return _split_documents(_text_blocks(path))


def _is_blank(text: str) -> bool:
    return not text or text.isspace()


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb")  # type: ignore[return-value]


def _text_blocks(path: Path) -> Iterator[str]:
    """Decoded blocks of a text file, with "\\n" for every line end and without a byte order mark."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")("replace"), translate=True)
    invalid = 0
    with _open(path) as handle:
        for number, raw in enumerate(_blocks(handle)):
            text = decoder.decode(raw, final=not raw)
            if "\ufffd" in text:
                invalid += max(0, text.count("\ufffd") - raw.count("\ufffd".encode()))
            _check_is_text(path, raw, invalid if number == 0 else 0)
            yield text
    _report_invalid(path, invalid)


def _blocks(handle: BinaryIO) -> Iterator[bytes]:
    """Blocks of a file, and an empty one at its end."""
    while raw := handle.read(BLOCK):
        yield raw
    yield b""


def _check_is_text(path: Path, raw: bytes, invalid: int) -> None:
    if b"\0" in raw:
        raise KestrelError(f"{path} is not UTF-8 text: it holds NUL bytes (a binary file, or UTF-16: save it as UTF-8)")
    if invalid > 0.1 * len(raw):
        raise KestrelError(
            f"{path} is not UTF-8 text: {invalid} of its first {len(raw)} bytes are invalid (save it as UTF-8)"
        )


def _report_invalid(path: Path, invalid: int) -> None:
    if invalid and (path, invalid) not in _reported:
        _reported.add((path, invalid))
        print(f"note: {path}: {invalid} bytes or sequences were not UTF-8 and became U+FFFD", file=sys.stderr)


def _split_documents(blocks: Iterator[str]) -> Iterator[str]:
    """Cut after lines that begin with SEPARATOR and hold nothing else, and where a document reaches MAX_DOCUMENT.

    Empty lines beside a separator belong to neither document; a text without separators is handed on to the letter.
    """
    line = re.compile(rf"{re.escape(SEPARATOR)}[ \t]*\n")
    pending, edges = "", ""  # pending always begins where a line does
    for block in chain(blocks, "\n"):  # one line end more, for a separator that ends the file without
        pending += block
        start = 0
        for match in line.finditer(pending) if SEPARATOR in pending else ():
            if match.start() == 0 or pending[match.start() - 1] == "\n":
                yield pending[start : match.start()].strip("\n")
                start, edges = match.end(), "\n"
        pending = pending[start:]
        while len(pending) > MAX_DOCUMENT:
            cut = pending.rfind("\n", 0, MAX_DOCUMENT) + 1 or MAX_DOCUMENT
            yield pending[:cut]
            pending = pending[cut:]
    yield pending.strip(edges) if edges else pending.removesuffix("\n")


def _json_lines(path: Path, column: str) -> Iterator[str]:
    invalid = 0
    with _open(path) as handle:
        for number, raw in enumerate(handle, start=1):
            line = raw.decode("utf-8-sig", "replace")
            invalid += line.count("\ufffd") - raw.count("\ufffd".encode())
            if not line.isspace():
                yield _json_text(line, column, f"{path}, line {number}")
    _report_invalid(path, invalid)


def _json_text(line: str, column: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # RecursionError: brackets within brackets, thousands deep
        raise KestrelError(f"{where}: not JSON ({error}); a .jsonl file holds one object a line") from error
    if not isinstance(record, dict):
        raise KestrelError(f'{where}: expected a JSON object such as {{"{column}": …}}, got {type(record).__name__}')
    if column not in record:
        raise KestrelError(f'{where}: there is no field "{column}" among {_listing(list(record))}; set data.column')
    if not isinstance(record[column], str):
        raise KestrelError(f'{where}: the field "{column}" must be a string, got {type(record[column]).__name__}')
    return record[column].encode("utf-8", "replace").decode()  # half a surrogate pair has no UTF-8


def _parquet_rows(path: Path, column: str) -> Iterator[str]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise KestrelError(f"reading {path} needs pyarrow: pip install pyarrow") from error
    try:
        with parquet.ParquetFile(path) as file:
            _check_column(path, file.schema_arrow, column)
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                yield from (text for text in batch.column(0).to_pylist() if text)
    except arrow.ArrowException as error:
        raise KestrelError(f"cannot read {path} as parquet: {str(error).splitlines()[0]}") from error


def _check_column(path: Path, schema: "pyarrow.Schema", column: str) -> None:  # noqa: F821
    if column not in schema.names:
        raise KestrelError(f'{path}: there is no column "{column}" among {_listing(schema.names)}; set data.column')
    kind = schema.field(column).type
    if str(kind) not in ("string", "large_string", "string_view"):
        raise KestrelError(f'{path}: the column "{column}" must hold strings, got {kind}; set data.column')


def _listing(names: list[str]) -> str:
    return ", ".join(names[:10]) + (", …" if len(names) > 10 else "") if names else "none"
