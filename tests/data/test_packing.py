"""Best-fit packing against its definition, written the slow way; and what the shuffle must be."""

from collections import Counter
from itertools import islice
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import packing
from data.packing import Position, join_rows, make_epoch, plan_chunk, shuffle_rows, shuffled

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)
CAPACITY = st.integers(2, 25)
SEED = st.integers(0, 2**31)


def small_buffer(size=5):
    """A buffer that small data sets fill and empty many times."""
    return mock.patch.object(packing, "BUFFER", size)


def plan(lengths, capacity, seed, n_pieces, chunk_pieces=30):
    """Rows from the beginning, of at least `n_pieces` pieces, in the order they are filled."""
    epoch, position = make_epoch(np.array(lengths), capacity, 0, seed), Position()
    parts = []
    while sum(len(part.take) for part in parts) < n_pieces:
        rows, position, epoch = plan_chunk(epoch, position, chunk_pieces)
        parts.append(rows)
    return join_rows(parts)


def pieces_of(epoch):
    """(document, begin, length) of every piece of an epoch, in the epoch's order."""
    return list(zip(*(column.tolist() for column in epoch.pieces(np.arange(len(epoch))))))


def best_fit_the_slow_way(lengths, capacity, seed):
    """Nanochat's rules, piece by piece: yields (epoch, document, begin, take)."""
    number, entering, buffer, room = 0, None, [], capacity
    while True:
        if entering is None:
            entering = iter(pieces_of(make_epoch(np.array(lengths), capacity, number, seed)))
        if len(buffer) < packing.BUFFER:
            buffer += islice(entering, packing.BUFFER)
        if not buffer:
            number, entering = number + 1, None
            continue
        # max and min return the first of equals, which is the one that came first
        fitting = [piece for piece in buffer if piece[2] <= room]
        piece = max(fitting, key=lambda p: p[2]) if fitting else min(buffer, key=lambda p: p[2])
        buffer.remove(piece)
        take = min(piece[2], room)
        yield number, piece[0], piece[1], take
        room = room - take or capacity


@settings(max_examples=40, deadline=None)
@given(LENGTHS, CAPACITY, SEED)
def test_plan_is_best_fit(lengths, capacity, seed):
    with small_buffer():
        rows = plan(lengths, capacity, seed, 150)
        slow = list(islice(best_fit_the_slow_way(lengths, capacity, seed), len(rows.take)))
    planned = zip(*(column.tolist() for column in (rows.epoch, rows.document, rows.begin, rows.take)))
    assert list(planned) == slow


@settings(max_examples=40, deadline=None)
@given(LENGTHS, CAPACITY, SEED)
def test_every_row_is_full(lengths, capacity, seed):
    with small_buffer():
        rows = plan(lengths, capacity, seed, 100)
    assert (rows.take > 0).all()
    assert (np.add.reduceat(rows.take, rows.splits[:-1]) == capacity).all()


@settings(max_examples=40, deadline=None)
@given(LENGTHS, CAPACITY, SEED)
def test_every_piece_has_its_turn_once_in_every_epoch(lengths, capacity, seed):
    with small_buffer():
        rows = plan(lengths, capacity, seed, 150)
    for number in range(rows.epoch[-1]):  # the last one may be unfinished
        turn = rows.epoch == number
        taken = Counter(zip(rows.document[turn].tolist(), rows.begin[turn].tolist()))
        assert taken == Counter((d, b) for d, b, _ in pieces_of(make_epoch(np.array(lengths), capacity, number, seed)))


@settings(max_examples=100, deadline=None)
@given(LENGTHS, CAPACITY, SEED, st.integers(0, 5))
def test_pieces_cover_every_document_exactly(lengths, capacity, seed, number):
    covered = [np.zeros(length, int) for length in lengths]
    for document, begin, length in pieces_of(make_epoch(np.array(lengths), capacity, number, seed)):
        assert 2 <= length <= capacity  # BOS and at least one token
        assert begin + length - 1 <= lengths[document]
        covered[document][begin : begin + length - 1] += 1
    assert all((counts == 1).all() for counts in covered)


def test_short_documents_are_never_cut_into_pieces():
    epoch = make_epoch(np.array([3, 9, 24, 500]), 25, 3, seed=1)
    assert epoch.phase > 0
    whole = [piece for piece in pieces_of(epoch) if piece[0] < 3]
    assert sorted(whole) == [(0, 0, 4), (1, 0, 10), (2, 0, 25)]


def test_one_huge_document_is_used_whole_and_cut_elsewhere_in_the_next_epoch():
    rows = plan([100_000], 129, seed=3, n_pieces=4 * 783)
    cuts = []
    for number in (0, 1, 2):
        turn = rows.epoch == number
        # all but the last piece of an epoch and the first, which the phase makes short, fill a row of their own
        assert rows.take[turn].sum() - turn.sum() >= 100_000 - 2 * 129
        cuts.append(set((rows.begin[turn] % 128).tolist()))
    assert cuts[0] == {0}
    assert cuts[1] != cuts[2]


@settings(max_examples=40, deadline=None)
@given(LENGTHS, CAPACITY, SEED, st.integers(1, 60))
def test_the_size_of_chunks_does_not_change_the_rows(lengths, capacity, seed, chunk_pieces):
    with small_buffer():
        one, other = (plan(lengths, capacity, seed, 80, size) for size in (chunk_pieces, 7))
    pieces = min(len(one.take), len(other.take))
    for mine, theirs in zip(one[1:], other[1:]):
        assert (mine[:pieces] == theirs[:pieces]).all()


@settings(max_examples=40, deadline=None)
@given(LENGTHS, CAPACITY, SEED)
def test_shuffling_rows_moves_whole_rows(lengths, capacity, seed):
    rows = plan(lengths, capacity, seed, 80)
    moved = shuffle_rows(rows, seed)

    def listed(these):
        return [tuple(map(tuple, (c.tolist() for c in these.part(r, r + 1)[1:]))) for r in range(these.count)]

    assert Counter(listed(moved)) == Counter(listed(rows))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 63, 64, 65, 1000, 4097])
@pytest.mark.parametrize("key", [0, 7])
def test_shuffle_is_a_bijection(n, key):
    assert sorted(shuffled(np.arange(n), n, key).tolist()) == list(range(n))


def test_shuffle_looks_up_any_part_alone():
    whole = shuffled(np.arange(1000), 1000, 5)
    part = np.array([999, 0, 17, 17])
    assert (shuffled(part, 1000, 5) == whole[part]).all()


def test_shuffle_leaves_no_order():
    """Neighbours end up unrelated, and another key gives another order: each statistic within 5 standard deviations."""
    n = 20_000
    one, other = shuffled(np.arange(n), n, 1), shuffled(np.arange(n), n, 2)
    for values in (np.arange(n), np.roll(one, 1), np.roll(one, 2), other):
        assert abs(np.corrcoef(one, values)[0, 1]) < 5 / np.sqrt(n)
    fixed = (one == np.arange(n)).sum()  # Poisson with mean 1
    assert fixed <= 8


def test_shuffle_is_the_same_on_every_machine():
    """A resumed run depends on these numbers for ever."""
    assert shuffled(np.arange(8), 10, 42).tolist() == [3, 1, 6, 0, 4, 2, 9, 7]
    assert shuffled(np.arange(4), 1_000_003, 42).tolist() == [311949, 393417, 501197, 659913]


def test_buffer_offers_at_least_a_thousand_pieces():
    """Choosing among 1000 gives the fit that D7 measured; among 10 it would crop several times as much."""
    lengths = np.random.default_rng(0).integers(20, 400, 20_000)

    def kept(size):
        with small_buffer(size):
            rows = plan(lengths, 513, 0, 8_000, 4096)
        return rows.take.sum() / (lengths[rows.document] + 1).sum()

    assert packing.BUFFER >= 1000
    assert kept(packing.BUFFER) > kept(10)
    assert kept(packing.BUFFER) > 0.97
