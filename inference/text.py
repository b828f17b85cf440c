"""From token ids to text while they come: no half characters, and nothing that may yet turn out to be a stop string."""

import codecs

from data.tokenizer import Tokenizer


class TextStream:
    """Token ids in, text out, as early as possible and never half a character.

    A character may be spread over several tokens. It appears with the token that completes it; bytes that can no longer
    become a character appear as U+FFFD. All pieces together are exactly `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The characters that `token` completes."""
        return self.decoder.decode(self.tokenizer.decode_bytes([token]))

    def finish(self) -> str:
        """What is left of a character whose end never came."""
        return self.decoder.decode(b"", final=True)


class StopStrings:
    """Text in pieces in, text out up to the first stop string, wherever the pieces were cut.

    An end that a stop string may begin with is held back until it is known not to be one. Of several stop strings the
    one that is complete first counts, and of those the one that began first.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops = stops
        self.held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What is known to come before any stop string; nothing once one was found."""
        if self.found:
            return ""
        text = self.held + text
        found = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.found, self.held = True, ""
            return text[: min(found)[1]]
        n_held = max((overlap(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - n_held :]
        return text[: len(text) - n_held]

    def finish(self) -> str:
        """What was held back and is no stop string, as the text is over."""
        held, self.held = self.held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` are the beginning of `stop`, short of all of it."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
