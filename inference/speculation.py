"""Guessing what comes next from what was said before: the words that followed the last time.

A text that repeats itself (code, a table, an answer that quotes its question) can be read ahead: if the last words
stood somewhere before, what followed there is guessed to follow here, and one step of the model says how much of the
guess is what it would have said itself. Reading several tokens costs little more than reading one, as the weights are
read once. So it says the same, greedily and up to rounding, in fewer steps. Prompt lookup, https://arxiv.org/abs/2304.04487.
"""

LONGEST, SHORTEST = 4, 2  # how many words must have stood there before, the more the better


class Lookup:
    """The tokens of one row, and where each few of them stood last."""

    def __init__(self, ids: list[int]) -> None:
        self.ids: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}  # some tokens → where the one after them stands
        for token in ids:
            self.push(token)

    def push(self, token: int) -> None:
        for n in range(SHORTEST, LONGEST + 1):
            if len(self.ids) >= n:  # what stands behind the newest tokens is known only now
                self.after[tuple(self.ids[-n:])] = len(self.ids)
        self.ids.append(token)

    def guess(self, most: int) -> list[int]:
        """Up to `most` tokens that may come next; none if the last ones are new."""
        for n in range(LONGEST, SHORTEST - 1, -1):
            at = self.after.get(tuple(self.ids[-n:])) if len(self.ids) >= n else None
            if at is not None:
                return self.ids[at : at + most]
        return []


def n_right(guessed: list[int], said: list[int]) -> int:
    """How many guesses are what the model says, up to the first that is not."""
    for i, (a, b) in enumerate(zip(guessed, said)):
        if a != b:
            return i
    return len(guessed)
