"""How fast tokens came."""

import time
from collections.abc import Iterable, Iterator

from inference.engine import Column


class Stopwatch:
    """How fast columns came: time to the first one, and tokens of all samples per second after it."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.first: float | None = None
        self.last = self.started
        self.n_first = self.n_tokens = 0

    def watch(self, columns: Iterable[Column]) -> Iterator[Column]:
        """The same columns, timed as they pass."""
        for column in columns:
            self.count(sum(token is not None for token in column))
            yield column

    def count(self, n_tokens: int) -> None:
        """So many tokens are here now."""
        if n_tokens == 0:
            return
        self.last = time.perf_counter()
        self.n_tokens += n_tokens
        if self.first is None:
            self.first, self.n_first = self.last, self.n_tokens

    @property
    def first_token_s(self) -> float:
        """Seconds from the start to the first column: mostly reading the prompt."""
        return (self.first or self.last) - self.started

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second once the prompt has been read; 0 when there was one column or none."""
        return (self.n_tokens - self.n_first) / self.telling_s if self.telling_s > 0 else 0.0

    @property
    def telling_s(self) -> float:
        """Seconds from the first column to the last."""
        return self.last - (self.first or self.last)

    def summary(self, share: float | None = None) -> str:
        """How much was told, and how fast; share: of the memory's bandwidth, where it is known."""
        of_copy = "" if share is None else f" ({share:.0%} of the memory's copy bandwidth)"
        return (
            f"{self.n_tokens} tokens, {self.tokens_per_s:.1f} tokens/s{of_copy}, "
            f"first token after {1000 * self.first_token_s:.0f} ms"
        )
