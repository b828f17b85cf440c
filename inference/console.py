"""A story on the terminal: text on stdout as it is told, everything about it on stderr.

So `python infer.py > story.txt` holds the story alone, and a pipe sees each word when it is there.
"""

import functools
import os
import select
import stat
import sys
from contextlib import closing

from errors import KestrelError
from inference.bandwidth import share_of_bandwidth
from inference.engine import Engine
from inference.request import Request
from inference.sampling import SamplingConfig
from inference.stopwatch import Stopwatch

PATIENCE_S = 1.0  # how long a pipe nobody mentioned may take to say something; some are open and silent for ever


def tell(
    engine: Engine, prompt: str, sampling: SamplingConfig, *, stream: bool = True, stop: tuple[str, ...] = ()
) -> bool:
    """Print the prompt and how it goes on: the first sample live, the others after it. → False if interrupted

    A prompt that does not fit is refused before anything is printed.
    """
    stopwatch = Stopwatch()
    request = Request(engine.encode(prompt), sampling, stop)
    engine.limit_of(request)
    pieces = [[prompt] for _ in range(sampling.num_samples)]
    complete = True
    show(title(0, len(pieces)) + (pieces[0].pop() if stream else ""))
    try:
        with closing(engine.follow(request)) as steps:
            for events in steps:
                stopwatch.count(sum(event.token is not None for event in events))
                for event in events:
                    pieces[event.sample].append(event.text)
                if stream:
                    show("".join(pieces[0]))
                    pieces[0].clear()
    except KeyboardInterrupt:
        complete = False
    for i, told in enumerate(pieces):
        show((title(i, len(pieces)) if i > 0 else "") + "".join(told) + "\n")
    share = share_of_bandwidth(engine, stopwatch.telling_s)
    note(stopwatch.summary(share) + ("" if complete else ", interrupted"))
    return complete


def title(index: int, count: int) -> str:
    """What stands above one of several samples."""
    return f"--- sample {index + 1} of {count} ---\n" if count > 1 else ""


def show(text: str) -> None:
    """To stdout, at once. A character the terminal cannot show becomes a question mark, never an exception."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, errors="replace").decode(encoding))
    sys.stdout.flush()


def note(text: str) -> None:
    """One line about the story rather than of it."""
    print(text, file=sys.stderr, flush=True)


def close_quietly() -> None:
    """After a broken pipe (`| head`): nobody reads on, and Python must not complain about that when it exits."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # a broken pipe, a full disk
            os.dup2(nowhere, stream.fileno())


def read_prompt(prompt: str | None) -> str:
    """The prompt as given; "-" reads standard input; None reads it if something is piped in, else means a new story."""
    if prompt == "-":
        if sys.stdin is None:
            raise KestrelError("prompt=- reads standard input, which is closed: give the text as prompt=...")
        if sys.stdin.isatty():
            note("type the prompt, then Enter and Ctrl-D")
        return read_stdin()
    if prompt is None:
        return read_stdin() if is_piped() else ""
    # An argument that is not UTF-8 arrives with surrogates in place of its bytes.
    return prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


@functools.cache  # in a sweep every job continues the same text
def read_stdin() -> str:
    """All of standard input, but for one newline at its end, which `echo` adds and nobody means."""
    text = sys.stdin.buffer.read().decode("utf-8", "replace")
    return text.removesuffix("\n").removesuffix("\r")


def is_piped() -> bool:
    """Whether a file or a pipe that has something to say is connected to standard input."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # closed, or replaced by something that is no file
        return False
    if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        return stat.S_ISREG(mode)
    if select.select([sys.stdin], [], [], PATIENCE_S)[0]:
        return True
    note("nothing arrives on standard input, so this is a story from its beginning (prompt=- would wait)")
    return False
