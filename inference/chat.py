"""A chat in the terminal: `python infer.py mode=chat`.

The conversation is kept as token ids, in the form that chat models are trained on:

    <|bos|> <|user_start|> … <|user_end|> <|assistant_start|> … <|assistant_end|> <|user_start|> …

Each turn is a request of its own whose prompt is the conversation so far; the engine finds in its cache what it has
read before. Ctrl-C ends the answer and nothing else: what was said stays said, and the chat goes on.
"""

import dataclasses
import signal
import sys
from collections.abc import Iterator
from contextlib import closing, suppress

from errors import KestrelError
from inference.calculator import calculate
from inference.console import note, show
from inference.engine import Engine
from inference.request import Request
from inference.sampling import SamplingConfig
from inference.stopwatch import Stopwatch

HELP = (
    "/temperature X, /topk K: how freely to answer   /clear: a new chat   /quit (or Ctrl-D): the end   Ctrl-C: enough"
)
NUMBERS = {"/temperature": ("temperature", float), "/topk": ("top_k", int)}


class Chat:
    """A conversation with a model."""

    def __init__(self, engine: Engine, sampling: SamplingConfig, stop: tuple[str, ...] = ()) -> None:
        self.engine, self.sampling, self.stop = engine, sampling, stop
        self.n_turns = 0
        self.clear()

    def clear(self) -> None:
        """Forget what was said."""
        self.ids = [self.engine.tokenizer.bos_id]

    def answer(self, text: str) -> Iterator[list[str]]:
        """Say something → the pieces of the answer, as often as the engine steps. Whoever stops reading cuts it short.

        Refused if it does not fit the context any more; then it was not said.
        """
        encode, special = self.engine.tokenizer.encode, self.engine.tokenizer.encode_special
        ids = [
            *self.ids,
            *encode(text, prepend="<|user_start|>", append="<|user_end|>"),
            special("<|assistant_start|>"),
        ]
        request = Request(ids, self.next_sampling(len(ids)), self.stop, tool=calculate)
        self.engine.limit_of(request)
        return self.read(request)

    def read(self, request: Request) -> Iterator[list[str]]:
        said: list[int] = []
        try:
            with closing(self.engine.follow(request)) as steps:
                for events in steps:
                    said += [event.token for event in events if event.token is not None]
                    yield [event.text for event in events]
        finally:
            self.ids = [*request.prompt_ids, *said, self.engine.tokenizer.encode_special("<|assistant_end|>")]
            self.n_turns += 1

    def next_sampling(self, n_tokens: int) -> SamplingConfig:
        """The settings of this turn: draws of its own, and no more tokens than the context has left."""
        left = self.engine.model.context_len - n_tokens
        if left < 1:
            raise KestrelError(
                f"the chat would have {n_tokens} tokens and this model sees at most {self.engine.model.context_len} "
                "at once: /clear begins a new one"
            )
        limit, seed = self.sampling.max_new_tokens, (self.sampling.seed + self.n_turns) % 2**63
        return dataclasses.replace(self.sampling, max_new_tokens=limit and min(limit, left), seed=seed)

    def command(self, line: str) -> bool:
        """Do what a line that begins with a slash says → whether the chat goes on."""
        word, _, value = line.strip().partition(" ")
        if word == "/quit":
            return False
        if word == "/clear":
            self.clear()
            note("a new chat")
        elif word in NUMBERS:
            key, kind = NUMBERS[word]
            try:
                self.sampling = dataclasses.replace(self.sampling, **{key: kind(value)})
                note(f"{key}: {getattr(self.sampling, key)}")
            except KestrelError as error:
                note(str(error))
            except ValueError:
                note(f"{word} wants a number, got {value.strip()!r}")
        else:
            note(HELP)
        return True


def run_chat(engine: Engine, sampling: SamplingConfig, first: str | None = None, stop: tuple[str, ...] = ()) -> None:
    """Talk until /quit or the end of the input; `first` is said before anything is read, `stop` ends an answer."""
    if sampling.num_samples != 1:
        raise KestrelError(f"mode=chat gives one answer at a time: leave num_samples={sampling.num_samples} out")
    if sys.stdin is None:
        raise KestrelError("mode=chat reads what you type, but standard input is closed")
    with suppress(AttributeError):  # what tests put in its place
        sys.stdin.reconfigure(errors="replace")
    with suppress(ImportError):  # not on Windows: lines are then typed without history
        import readline  # noqa: F401  input() edits lines and remembers them once this is imported
    chat = Chat(engine, sampling, stop)
    note(HELP)
    line = first or next_line()
    while line is not None:
        if line.startswith("/"):
            if not chat.command(line):
                return
        elif line.strip():
            tell_answer(chat, line)
        line = next_line()


def next_line() -> str | None:
    """What the user types; None at the end. Ctrl-C on an unfinished line drops the line."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return None
        except KeyboardInterrupt:
            note("\n(/quit or Ctrl-D leaves the chat)")


def tell_answer(chat: Chat, text: str) -> None:
    """Show an answer as it comes, until it is over or Ctrl-C.

    Ctrl-C sets a flag that is looked at between two steps, so it never interrupts the engine in its bookkeeping.
    """
    interrupted: list[int] = []
    stopwatch = Stopwatch()
    before = signal.signal(signal.SIGINT, lambda number, frame: interrupted.append(number))
    try:
        answer = chat.answer(text)
        for pieces in answer:
            stopwatch.count(len(pieces))
            show("".join(pieces))
            if interrupted:
                answer.close()
        show("\n")
        note(stopwatch.summary() + (", interrupted" if interrupted else ""))
    except KestrelError as error:
        note(str(error))
    finally:
        signal.signal(signal.SIGINT, before)
