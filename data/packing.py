"""Which tokens go into which row: best-fit packing of documents into rows that all begin with BOS and hold no padding.

Documents wait in a buffer of at least BUFFER pieces. A row takes the largest piece that fits the room left, again and
again; when none fits, it takes the shortest, crops it to the room exactly, and the rest of that piece is not seen in
this epoch. Ties go to the piece that came first. This is nanochat's loader with three differences:

    long documents      A document longer than a row is cut into row-sized pieces, each beginning with BOS. None of it
                        is lost, a single huge one is used whole, and none can clog the buffer. The cuts move from epoch
                        to epoch, so that a text seen many times is not always cut at the same words.
    epochs              The buffer empties before the next epoch begins, so every piece has its turn in every epoch.
    order               Pieces come in an order shuffled anew each epoch, and rows are shuffled within a chunk, which
                        ends with the epoch at the latest (a small set would otherwise begin with its longest documents
                        every time).

Everything here is arithmetic on document lengths, and a pure function of where it starts: the same `Position` gives the
same rows on every machine and every rank. The shuffle is a Feistel network over the indices, not a library's generator
whose stream may change with its version, and takes no memory, whatever the number of documents.

    Position → plan_chunk → Rows of about CHUNK_PIECES pieces, and the next Position
"""

from bisect import bisect_left
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

BUFFER = 1000  # pieces to choose from, while the epoch has so many left
CHUNK_PIECES = 4096  # rows are planned until so many pieces are placed: some milliseconds of work
ORDER_BITS = 40  # a buffered piece is one integer, length · 2^40 + (2^40 − 1 − place in the epoch's order)
ORDER_MASK = (1 << ORDER_BITS) - 1


class Position(NamedTuple):
    """Where the packing stands between two rows: all there is to know."""

    epoch: int = 0
    cursor: int = 0  # pieces of this epoch that have entered the buffer
    buffer: tuple[int, ...] = ()  # which of them still wait, by their place in the epoch's order


class Rows(NamedTuple):
    """Rows as pieces of documents; row r is pieces splits[r] to splits[r + 1], laid end to end.

    A piece is BOS and then `take − 1` tokens of document `document`, from its token `begin` on.
    """

    splits: np.ndarray  # [N + 1] int64
    document: np.ndarray  # [pieces] int64
    begin: np.ndarray  # [pieces] int64
    take: np.ndarray  # [pieces] int64
    epoch: np.ndarray  # [pieces] int64

    @property
    def count(self) -> int:
        """How many rows these are; `len` would be the number of fields."""
        return len(self.splits) - 1

    def part(self, first: int, end: int) -> "Rows":
        """Rows `first` to `end`."""
        low, high = self.splits[first], self.splits[end]
        return Rows(self.splits[first : end + 1] - low, *(column[low:high] for column in self[1:]))


@dataclass(frozen=True)
class Epoch:
    """One pass over all pieces: how documents are cut into pieces, and in which order those come."""

    lengths: np.ndarray  # [documents], tokens without BOS
    capacity: int
    number: int
    seed: int
    phase: int  # where the first cut of a long document falls; 0: after a whole row
    starts: np.ndarray | None  # [documents + 1] number of the first piece of each; None: every document is one piece

    def __len__(self) -> int:
        return len(self.lengths) if self.starts is None else int(self.starts[-1])

    def following(self) -> "Epoch":
        """The next pass."""
        return make_epoch(self.lengths, self.capacity, self.number + 1, self.seed)

    def pieces(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The pieces at some places of the order: their document, first token, and length with BOS."""
        number = shuffled(places, len(self), hash_of(self.seed, self.number))
        if self.starts is None:
            return number, np.zeros_like(number), self.lengths[number] + 1
        document = np.searchsorted(self.starts, number, side="right") - 1
        text = self.capacity - 1
        begin = np.maximum((number - self.starts[document]) * text - (text - self.phase) * (self.phase > 0), 0)
        begin[self.lengths[document] <= text] = 0
        end = np.where(begin == 0, self.phase or text, begin + text)
        end[self.lengths[document] <= text] = text
        return document, begin, np.minimum(end, self.lengths[document]) - begin + 1


def make_epoch(lengths: np.ndarray, capacity: int, number: int, seed: int) -> Epoch:
    """Cut documents of `lengths` tokens (without BOS, none of them 0) for rows of `capacity` tokens."""
    text = capacity - 1
    longer = lengths > text
    if not longer.any():
        return Epoch(lengths, capacity, number, seed, 0, None)
    phase = hash_of(seed, number, 1) % text if number else 0
    counts = np.ones(len(lengths), np.int64)
    counts[longer] = -(-(lengths[longer] - phase) // text) + (phase > 0)
    return Epoch(lengths, capacity, number, seed, phase, np.concatenate([[0], np.cumsum(counts)]))


def plan_chunk(epoch: Epoch, position: Position, chunk_pieces: int = CHUNK_PIECES) -> tuple[Rows, Position, Epoch]:
    """Fill rows from `position` on, until `chunk_pieces` pieces are placed or the epoch ends, and a row is full.

    epoch   the epoch of `position`
    → the rows, in the order they were filled; the position after them; and its epoch
    """
    capacity, cursor = epoch.capacity, position.cursor
    waiting = _sort_keys(epoch, np.array(position.buffer, np.int64))
    keys: list[int] = []
    takes: list[int] = []
    splits = [0]
    epochs: list[tuple[Epoch, int]] = [(epoch, 0)]  # and how many pieces were placed before it
    while len(keys) < chunk_pieces and epoch.number == position.epoch and (waiting or cursor < len(epoch)):
        room = capacity
        while room:
            if len(waiting) < BUFFER:
                if cursor < len(epoch):
                    entering = np.arange(cursor, min(cursor + BUFFER, len(epoch)))
                    cursor += len(entering)
                    waiting = sorted(waiting + _sort_keys(epoch, entering))  # two sorted runs: a merge
                elif not waiting:
                    epoch, cursor = epoch.following(), 0
                    epochs.append((epoch, len(keys)))
                    continue
            index = bisect_left(waiting, (room + 1) << ORDER_BITS) - 1  # the largest that fits
            take = room
            if index < 0:  # none fits: of the shortest ones, that which came first
                index = bisect_left(waiting, ((waiting[0] >> ORDER_BITS) + 1) << ORDER_BITS) - 1
            else:
                take = waiting[index] >> ORDER_BITS
            keys.append(waiting.pop(index))
            takes.append(take)
            room -= take
        splits.append(len(keys))
    rows = _to_rows(epochs, keys, takes, splits)
    if not waiting and cursor == len(epoch):
        epoch, cursor = epoch.following(), 0
    buffer = sorted(ORDER_MASK - (key & ORDER_MASK) for key in waiting)
    return rows, Position(epoch.number, cursor, tuple(buffer)), epoch


def _sort_keys(epoch: Epoch, places: np.ndarray) -> list[int]:
    """Sorted integers that order pieces by length, and among equals put the one that came first last."""
    _, _, length = epoch.pieces(places)
    return np.sort((length << ORDER_BITS) + (ORDER_MASK - places)).tolist()


def _to_rows(epochs: list[tuple[Epoch, int]], keys: list[int], takes: list[int], splits: list[int]) -> Rows:
    """Look up which document each placed piece belongs to."""
    places = ORDER_MASK - (np.array(keys, np.int64) & ORDER_MASK)
    numbers = np.empty_like(places)
    document, begin = np.empty_like(places), np.empty_like(places)
    ends = [first for _, first in epochs[1:]] + [len(places)]
    for (epoch, first), end in zip(epochs, ends):
        document[first:end], begin[first:end], _ = epoch.pieces(places[first:end])
        numbers[first:end] = epoch.number
    return Rows(np.array(splits, np.int64), document, begin, np.array(takes, np.int64), numbers)


def join_rows(parts: list[Rows]) -> Rows:
    """Several plans as one."""
    if len(parts) == 1:
        return parts[0]
    ends = np.cumsum([0] + [part.splits[-1] for part in parts])
    splits = [part.splits[1:] + end for part, end in zip(parts, ends)]
    return Rows(np.concatenate([[0], *splits]), *(np.concatenate(columns) for columns in list(zip(*parts))[1:]))


def shuffle_rows(rows: Rows, key: int) -> Rows:
    """The same rows in another order, which only `key` decides."""
    order = shuffled(np.arange(rows.count), rows.count, key)
    counts = np.diff(rows.splits)[order]
    splits = np.concatenate([[0], np.cumsum(counts)])
    # piece p of the new order lies as far behind its row's new start as it lay behind the old one
    source = np.arange(splits[-1]) + np.repeat(rows.splits[order] - splits[:-1], counts)
    return Rows(splits, *(column[source] for column in rows[1:]))


def shuffled(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """What stands at the places `index` of range(n) in an order that `key` decides: a bijection, without a table.

    A Feistel network permutes the numbers of 2·half bits, and what falls outside range(n) is permuted again until it
    falls inside (cycle walking; at most 4 n numbers, so less than 4 rounds on average).
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    values = index.astype(np.uint64)
    outside = np.ones(len(values), bool)
    keys = [np.uint64(hash_of(key, turn)) for turn in range(6)]
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right + round_key) & mask)
        values[outside] = (left << half) | right
        outside = values >= np.uint64(n)
    return values.astype(np.int64)


def hash_of(*numbers: int) -> int:
    """62 well mixed bits of some integers."""
    value = np.zeros(1, np.uint64)
    for number in numbers:
        value = _mix(value + np.uint64(number % 2**64) + np.uint64(0x9E3779B97F4A7C15))
    return int(value[0]) >> 2


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: every bit of x reaches every bit of the result. Array arithmetic wraps around."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
