"""What is asked of the engine, what it answers, and what the host remembers of a row in between."""

import json
from dataclasses import dataclass, field
from typing import NamedTuple

from data.tokenizer import Tokenizer
from errors import KestrelError
from inference.sampling import SamplingConfig
from inference.speculation import Lookup
from inference.text import StopStrings, TextStream
from inference.tools import Tool, ToolUse

MAX_LOGPROBS = 20
MAX_STOPS, MAX_STOP_LENGTH = 64, 1000  # every piece of text is compared with all of them


@dataclass(eq=False)
class Request:
    """A prompt to be continued `sampling.num_samples` times.

    stop      texts that end an answer; they are not part of it
    logprobs  None: none; n: with each token its log-probability, and those of the n likeliest
    tool      answers what the model asks for between <|python_start|> and <|python_end|>
    """

    prompt_ids: list[int]
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    tool: Tool | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str) or not all(isinstance(stop, str) and stop for stop in self.stop):
            raise KestrelError(f"stop must be a list of texts that are not empty, got {self.stop!r:.80}")
        longest = max(map(len, self.stop), default=0)
        if len(self.stop) > MAX_STOPS or longest > MAX_STOP_LENGTH:
            raise KestrelError(
                f"stop must be at most {MAX_STOPS} texts of at most {MAX_STOP_LENGTH} characters, "
                f"got {len(self.stop)}, the longest of {longest}"
            )
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise KestrelError(f"logprobs must be between 0 and {MAX_LOGPROBS}, or null (none), got {self.logprobs}")


def stops_of(text: str | None) -> tuple[str, ...]:
    """What the key stop= means: one text as typed, or several as a list in JSON, where \\n is a new line."""
    if text is None:
        return ()
    stops = [text]
    if text.startswith("["):
        try:
            stops = json.loads(text)
        except ValueError as error:
            raise KestrelError(
                f'stop={text:.80} begins like a list and is none in JSON ({error}): write stop=\'["one", "another"]\''
            ) from error
    return Request([], stop=tuple(stops)).stop


class Event(NamedTuple):
    """One token of one sample, or its end, or both.

    token   None: the sample ended with a stop token, which is not part of it, or was cancelled
    text    characters that are complete now and cannot be part of a stop string
    finish  None: it goes on; "stop" (stop token or stop string), "length" (max_new_tokens), "cancelled"
    forced  the tool's word, not the model's
    top     the likeliest tokens and their log-probabilities, as far as asked for
    """

    request: Request
    sample: int
    token: int | None
    text: str = ""
    finish: str | None = None
    forced: bool = False
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Row:
    """One sample on its way, as the host knows it."""

    def __init__(self, request: Request, sample: int, blocks: list[int], limit: int, tokenizer: Tokenizer) -> None:
        self.request, self.sample, self.blocks, self.limit = request, sample, blocks, limit
        self.slot = -1  # where it stands among the rows on the device
        self.n_launched = 0  # tokens that were or are being drawn
        self.n_tokens = 0  # tokens that have arrived here
        self.stream, self.stops = TextStream(tokenizer), StopStrings(tuple(request.stop))
        self.tools = None if request.tool is None else ToolUse(tokenizer, request.tool)
        self.finished = False
        self.lookup: Lookup | None = None  # its tokens, if what follows is to be guessed

    def take(self, token: int, is_stop: bool, logprob: float | None, top: tuple) -> Event:
        """What an arrived token means: text, and perhaps the end."""
        self.n_tokens += 1
        forced = self.tools is not None and self.tools.push(token)
        if is_stop and not forced:
            return self.end("stop")
        text = self.stops.push(self.stream.push(token))
        finish = "stop" if self.stops.found else "length" if self.n_tokens == self.limit else None
        if finish == "length":
            rest = self.end("length")
            text, finish = text + rest.text, rest.finish
        self.finished = finish is not None
        return Event(self.request, self.sample, token, text, finish, forced, logprob, top)

    def end(self, finish: str) -> Event:
        """The end without a further token: what was held back comes now."""
        self.finished = True
        text = self.stops.push(self.stream.finish()) + self.stops.finish()
        return Event(self.request, self.sample, None, text, "stop" if self.stops.found else finish)
