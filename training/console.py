"""A console that may go away: a run outlives its terminal, a `| head` and a full disk under `> log.txt`.

What a run says is for whoever looks on, and lies in its folder as well. So where standard output or standard error can
no longer be written, training goes on without it, and says so once where somebody may still read it.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class LastingStream:
    """A text stream whose writes never fail: from the first that would, everything is dropped."""

    def __init__(self, stream: TextIO | None, name: str) -> None:
        self._stream, self._name = stream, name
        if stream is None:
            self._lose("it is closed")

    def write(self, text: str) -> int:
        """Write what can be written; a character that the stream cannot encode becomes a question mark."""
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            return self._stream.write(text.encode(encoding, "replace").decode(encoding))
        except OSError as error:
            self._lose(error.strerror or str(error))
            return len(text)

    def flush(self) -> None:
        """Hand on what was written."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error.strerror or str(error))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _lose(self, why: str) -> None:
        """Go on without the stream; what it still holds goes nowhere, too, or Python would complain when it exits."""
        nowhere = open(os.devnull, "w")  # noqa: SIM115  (lives as long as the process)
        if self._stream is not None:
            with contextlib.suppress(OSError, ValueError):
                os.dup2(nowhere.fileno(), self._stream.fileno())
        self._stream = nowhere
        if self._name == "standard output":
            print(
                f"note: standard output cannot be written ({why}): training goes on without it, and its metrics are in "
                "the run's folder",
                file=sys.stderr,
                flush=True,
            )


@contextlib.contextmanager
def lasting_console() -> Iterator[None]:
    """Keep whatever happens to the console from ending the run."""
    before = sys.stdout, sys.stderr
    sys.stderr = LastingStream(sys.stderr, "standard error")
    sys.stdout = LastingStream(sys.stdout, "standard output")
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
