"""Files that only grow, by whole lines: one JSON object per line, and the same rows beside it in a form for people.

A process that dies leaves at most half a line. When a run goes on, that half line is dropped, and so is every row of a
step that will be taken again: curves drawn from the file have no doubles.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from errors import KestrelError

Row = dict[str, Any]  # has a "step"


class Journal:
    """A .jsonl file and its readable twin.

    render   one row as text for the twin, which begins with `heading`
    keep     which of the rows already there stay
    """

    def __init__(
        self, path: Path, twin: Path, *, heading: str, render: Callable[[Row], str], keep: Callable[[Row], bool]
    ) -> None:
        self.path, self.render = path, render
        kept = [row for row in read_rows(path) if keep(row)]
        replace_text(path, (to_line(row) for row in kept))
        replace_text(twin, (heading, *(render(row) for row in kept)))
        self._files = [open_for_lines(path), open_for_lines(twin)]

    def add(self, row: Row) -> None:
        """Append a row to both files; numbers that are not finite become null, so that the JSON stays JSON."""
        row = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in row.items()}
        for file, text in zip(self._files, (to_line(row), self.render(row))):
            with naming_the_disk(Path(file.name)):
                file.write(text)
                file.flush()

    def close(self) -> None:
        """Close both files."""
        for file in self._files:
            with contextlib.suppress(OSError):  # every line was flushed when it was written
                file.close()


def read_rows(path: Path) -> list[Row]:
    """All whole rows of a .jsonl file; an empty list when there is no such file."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            rows = [_row_or_none(line) for line in file]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise KestrelError(f"could not read {path}: {error.strerror or error}") from error
    return [row for row in rows if row is not None]


def _row_or_none(line: str) -> Row | None:
    with contextlib.suppress(ValueError, RecursionError):
        row = json.loads(line)
        if isinstance(row, dict) and type(row.get("step")) is int:
            return row
    return None


def to_line(row: Row) -> str:
    """A row as one line of JSON."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def replace_text(path: Path, parts: Iterable[str]) -> None:
    """Write a text file so that a reader sees the old one or the new one."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with naming_the_disk(path):
        try:
            with open(temporary, "w", encoding="utf-8", errors="replace") as file:
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def open_for_lines(path: Path) -> TextIO:
    """Open for appending. A lone surrogate in a sample's text must not stop a run: it is replaced."""
    with naming_the_disk(path):
        return open(path, "a", encoding="utf-8", errors="replace")


@contextlib.contextmanager
def naming_the_disk(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into one sentence."""
    try:
        yield
    except OSError as error:
        raise KestrelError(
            f"could not write {path}: {error.strerror or error}; free some space or make it writable, "
            "then start again: the run goes on from its last checkpoint"
        ) from error
