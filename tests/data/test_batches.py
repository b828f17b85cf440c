"""The stream of batches: what rows hold, who gets which, and that it goes on exactly from any of its states."""

import gc
import json
import threading
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import batches, packing
from data.batches import Prefetcher, RowReader, pretrain_batches, val_batches
from data.documents import build_shards
from errors import KestrelError
from tests.data.toy import Bytes, ListSource, Numbers, numbered

CPU = torch.device("cpu")


def number_shards(folder, lengths, **options):
    """Shards in which no token occurs twice."""
    return build_shards(ListSource(numbered(lengths)), Numbers(), "train", folder, **options)


def first(stream, count):
    """The first batches of a stream, and its end."""
    try:
        return [next(stream) for _ in range(count)]
    finally:
        if isinstance(stream, Prefetcher):
            stream.close()


def read(shards, count, **options):
    return first(pretrain_batches(shards, **({"batch_size": 2, "sequence_len": 12, "seed": 5} | options)), count)


def whole_rows(batch):
    """[B, T + 1] the rows a batch was made of."""
    return torch.cat([batch.tokens, batch.targets[:, -1:]], 1)


def same(some, others):
    return len(some) == len(others) and all(
        torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets) and a.state == b.state
        for a, b in zip(some, others)
    )


@pytest.fixture
def shards(tmp_path):
    """31 documents from 1 to 40 tokens in several shard files; rows of 12 cut some of them."""
    return number_shards(tmp_path, np.random.default_rng(0).integers(1, 41, 31).tolist(), shard_tokens=100)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks and buffers so small that a short stream goes through many of them."""
    monkeypatch.setattr(packing, "BUFFER", 4)
    monkeypatch.setattr(packing, "CHUNK_PIECES", 9)
    monkeypatch.setattr(packing.plan_chunk, "__defaults__", (9,))


# ------------------------------------------------------------------------------------------------------ what rows hold


def test_rows_are_bos_and_unbroken_text(shards):
    """Every row begins with BOS, has no padding, and between two BOS holds one stretch of one document."""
    bos, text = shards.bos_id, shards.shards[0].dtype
    assert text == np.uint32
    for batch in read(shards, 60):
        for row in whole_rows(batch).tolist():
            assert row[0] == bos
            for token, following in pairwise(row):
                assert following in (token + 1, bos) or token == bos


def test_pieces_begin_where_documents_or_rows_do(shards):
    """After BOS comes the beginning of a document, or of a piece of one that is longer than a row."""
    starts = set(shards.offsets[:-1].tolist())
    long = shards.lengths > 12
    inside = {t for b, e in zip(shards.offsets[:-1][long], shards.offsets[1:][long]) for t in range(b, e)}
    for batch in read(shards, 40):
        for row in whole_rows(batch).tolist():
            for token, following in pairwise(row):
                assert token != shards.bos_id or following == shards.bos_id or following in starts | inside


def test_targets_are_the_next_tokens(shards):
    for batch in read(shards, 10):
        assert batch.tokens.dtype == batch.targets.dtype == torch.int64
        assert batch.tokens.shape == batch.targets.shape == (2, 12)
        assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
        assert batch.tokens.is_contiguous()
        assert batch.targets.is_contiguous()
        assert batch.weights is None
        assert batch.doc_ids is None


def test_an_epoch_shows_every_token_where_rows_fill_without_a_rest(tmp_path):
    """Rows of 12: documents of 11 tokens fill one, two of 5 do, and one of 44 fills four."""
    shards = number_shards(tmp_path, [11] * 5 + [5] * 6 + [44])
    epoch = torch.cat([whole_rows(batch) for batch in read(shards, 12, batch_size=1, sequence_len=11)])
    assert sorted(epoch[epoch != shards.bos_id].tolist()) == list(range(shards.offsets[-1]))


def test_document_ids_change_at_every_bos(shards):
    for batch in read(shards, 10, with_doc_ids=True):
        expected = (batch.tokens == shards.bos_id).cumsum(1) - 1
        assert batch.doc_ids.dtype == torch.int32
        assert torch.equal(batch.doc_ids.long(), expected)


@pytest.mark.parametrize("lengths", [[1], [3], [11], [500], [1, 1, 1]], ids=str)
def test_data_smaller_than_a_batch_repeats_and_says_so(tmp_path, lengths):
    shards = number_shards(tmp_path, lengths)
    got = read(shards, 30, batch_size=3)
    tokens = torch.cat([whole_rows(batch).flatten() for batch in got]).tolist()
    assert set(tokens) - {shards.bos_id} == set(range(sum(lengths)))
    epochs = [batch.state["epoch"] for batch in got]
    assert epochs == sorted(epochs)
    assert epochs[-1] >= 90 * 13 // (2 * (sum(lengths) + len(lengths))) - 2


def test_seeds_give_different_orders_of_the_same_text(shards):
    one, other = ([whole_rows(b) for b in read(shards, 20, seed=seed)] for seed in (1, 2))
    assert not all(torch.equal(a, b) for a, b in zip(one, other))


def test_how_files_are_cut_into_shards_changes_nothing(tmp_path):
    lengths = list(range(1, 40))
    some = read(number_shards(tmp_path / "a", lengths), 40)
    others = read(number_shards(tmp_path / "b", lengths, shard_tokens=50), 40)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(some, others))


# -------------------------------------------------------------------------------------------------------------- resume


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_state_leads_to_the_very_next_batch(tmp_path_factory, small_chunks, data):
    """Through JSON, at every step, in the middle of documents, chunks, shards and epochs."""
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=25))
    options = {"sequence_len": data.draw(st.integers(1, 16)), "seed": data.draw(st.integers(0, 9))}
    batch_size = data.draw(st.integers(1, 4))
    shards = number_shards(tmp_path_factory.mktemp("shards"), lengths, shard_tokens=64)
    reader = RowReader(shards, **options)
    rows, states = [], []
    for _ in range(12):
        rows.append(reader.take(batch_size))
        states.append(json.dumps(reader.state()))
    for step, state in enumerate(states[:-1]):
        resumed = RowReader(shards, **options, state=json.loads(state))
        for expected, state_after in zip(rows[step + 1 : step + 4], states[step + 1 :]):
            got = resumed.take(batch_size)
            assert all((a == b).all() for a, b in zip(got, expected))
            assert json.dumps(resumed.state()) == state_after


def test_resumed_batches_equal_uninterrupted_ones(shards, small_chunks):
    straight = read(shards, 20)
    for step in (0, 7, 18):
        state = json.loads(json.dumps(straight[step].state))
        assert same(read(shards, 19 - step, state=state), straight[step + 1 :])


def test_state_is_small(tmp_path):
    shards = number_shards(tmp_path, [3] * 20_000)
    (batch,) = read(shards, 1, batch_size=500)
    assert len(json.dumps(batch.state)) < 20_000


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 6), (2, 3), (3, 2), (6, 1)])
def test_ranks_share_the_rows_of_one_stream(shards, small_chunks, world_size, batch_size):
    """Also when the number of ranks changes between saving and going on."""
    straight = torch.cat([whole_rows(batch) for batch in read(shards, 20, batch_size=6)])
    state = None
    together = []
    for _ in range(2):
        ranks = [
            read(shards, 10, batch_size=batch_size, rank=rank, world_size=world_size, state=state)
            for rank in range(world_size)
        ]
        assert all(step[0].state == other.state for step in zip(*ranks) for other in step)
        together += [whole_rows(batch) for step in zip(*ranks) for batch in step]
        state = ranks[0][-1].state
        world_size, batch_size = batch_size, world_size  # still six rows a step
    assert torch.equal(torch.cat(together), straight)


@pytest.mark.parametrize(("key", "change"), [("seed", {"seed": 6}), ("sequence_len", {"sequence_len": 13})])
def test_state_of_another_stream_is_refused(shards, key, change):
    state = read(shards, 3)[-1].state
    with pytest.raises(KestrelError, match=f"{key}=.*, and now that is"):
        read(shards, 1, state=state, **change)


def test_state_of_other_data_is_refused(shards, tmp_path):
    state = read(shards, 3)[-1].state
    with pytest.raises(KestrelError, match="its training tokens were other ones"):
        read(number_shards(tmp_path / "other", [3, 4, 5]), 1, state=state)


@pytest.mark.parametrize(
    "damage",
    [
        {"version": 99}, {"row": -1}, {"used": 10**9}, {"used": None}, {"chunk": None}, {"chunk": {}},
        {"chunk": {"epoch": 0, "cursor": 10**9, "buffer": []}}, {"chunk": {"epoch": 0, "cursor": 5, "buffer": [7]}},
        {"chunk": {"epoch": 0, "cursor": 5, "buffer": [1, 1]}}, {"chunk": {"epoch": -1, "cursor": 0, "buffer": []}},
        {"chunk": {"epoch": 0, "cursor": 5, "buffer": ["1"]}}, {"chunk": {"epoch": 0, "cursor": 2.5, "buffer": []}},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_state_is_our_error(shards, damage):
    state = read(shards, 3)[-1].state | damage
    with pytest.raises(KestrelError, match="resume=never"):
        read(shards, 1, state=state)


def test_another_bos_is_refused(shards):
    with pytest.raises(KestrelError, match="BOS 70000"):
        read(shards, 1, bos_id=5)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"sequence_len": 0}])
def test_batches_need_a_row_and_a_token(shards, wrong):
    with pytest.raises(KestrelError, match="at least one row of one token"):
        read(shards, 1, **wrong)


# ---------------------------------------------------------------------------------------------------------- validation


def validation(shards, **options):
    """(rows that count, all batches) of a validation pass on one rank."""
    got = list(val_batches(shards, **({"batch_size": 2, "sequence_len": 12} | options)))
    rows = [whole_rows(batch)[batch.targets[:, -1] != -1] for batch in got]
    return torch.cat(rows) if rows else None, got


def test_validation_shows_each_token_at_most_once(shards):
    rows, got = validation(shards)
    text = rows[rows != shards.bos_id]
    assert len(text.unique()) == len(text)
    assert len(text) > 0.7 * shards.offsets[-1]
    assert all(batch.tokens.shape == (2, 12) for batch in got)


def test_validation_shows_nothing_twice_wherever_its_chunks_end(tmp_path, small_chunks):
    """Also where the last chunk has no whole row left."""
    generator = np.random.default_rng(1)
    for number in range(40):
        lengths = generator.integers(1, 9, 10 + number).tolist()
        rows, _ = validation(number_shards(tmp_path / str(number), lengths), sequence_len=9)
        text = rows[rows != 70_000]
        assert len(text.unique()) == len(text)


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 1), (1, 7), (3, 4), (2, 64)])
def test_validation_rows_depend_on_neither_ranks_nor_batch(shards, world_size, batch_size):
    expected, _ = validation(shards)
    ranks = [validation(shards, batch_size=batch_size, rank=r, world_size=world_size)[1] for r in range(world_size)]
    assert len({len(of_rank) for of_rank in ranks}) == 1
    steps = [batch for step in zip(*ranks) for batch in step]
    got = torch.cat([whole_rows(batch)[batch.targets[:, -1] != -1] for batch in steps])
    assert torch.equal(got, expected)


def test_filling_counts_nowhere(shards):
    batch = validation(shards, batch_size=1000)[1][0]
    filled = batch.targets[:, 0] == -1
    assert filled.any()
    assert (batch.targets[filled] == -1).all()
    assert (batch.tokens[filled] == shards.bos_id).all()
    assert (batch.targets[~filled] >= 0).all()


@pytest.mark.parametrize(("max_tokens", "rows"), [(1, 1), (12, 1), (36, 3), (40, 3)])
def test_validation_stops_at_max_tokens(shards, max_tokens, rows):
    whole, _ = validation(shards)
    assert torch.equal(validation(shards, max_tokens=max_tokens)[0], whole[:rows])


@pytest.mark.parametrize("max_tokens", [None, -1, 10**9])
def test_validation_of_everything(shards, max_tokens):
    assert torch.equal(validation(shards, max_tokens=max_tokens)[0], validation(shards)[0])


@pytest.mark.parametrize("lengths", [[1], [5, 5], [11]], ids=str)
def test_validation_text_shorter_than_a_row_is_one_row(tmp_path, lengths):
    rows, _ = validation(number_shards(tmp_path, lengths))
    assert rows.shape == (1, 13)


# -------------------------------------------------------------------------------------------------------------- thread


def loader_threads():
    return [thread for thread in threading.enumerate() if getattr(thread, "_target", None) is batches._work]


def wait_for_no_threads():
    deadline = time.monotonic() + 5
    while loader_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    return loader_threads() == []


def test_batches_are_made_ahead_and_not_without_end(shards):
    made = []

    def counted():
        for batch in pretrain_source:
            made.append(1)
            yield batch

    pretrain_source = pretrain_batches(shards, batch_size=1, sequence_len=4)
    stream = Prefetcher(counted(), CPU)
    next(stream)
    deadline = time.monotonic() + 5
    while len(made) < 1 + batches.AHEAD and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert 1 + batches.AHEAD <= len(made) <= 2 + batches.AHEAD  # one more waits for room
    stream.close()
    pretrain_source.close()


def test_close_ends_the_thread_and_the_stream(shards):
    stream = pretrain_batches(shards, batch_size=2, sequence_len=12)
    kept = next(stream).tokens
    copy = kept.clone()
    stream.close()
    stream.close()
    assert loader_threads() == []
    assert list(stream) == []
    assert torch.equal(kept, copy)


def test_a_forgotten_stream_ends_its_thread(shards):
    stream = pretrain_batches(shards, batch_size=2, sequence_len=12)
    next(stream)
    del stream
    gc.collect()
    assert wait_for_no_threads()


def test_a_finished_pass_ends_its_thread(shards):
    assert list(val_batches(shards, batch_size=2, sequence_len=12))
    assert wait_for_no_threads()


def test_an_error_in_the_thread_reaches_the_caller(shards):
    def broken():
        yield from first(pretrain_batches(shards, batch_size=1, sequence_len=4), 2)
        raise RuntimeError("the disk went away")

    stream = Prefetcher(broken(), CPU)
    assert len([next(stream), next(stream)]) == 2
    with pytest.raises(RuntimeError, match="the disk went away"):
        next(stream)
    assert list(stream) == []
    assert wait_for_no_threads()


def test_batches_already_handed_out_never_change(shards):
    stream = pretrain_batches(shards, batch_size=2, sequence_len=12)
    kept = [next(stream) for _ in range(10)]
    again = read(shards, 10, seed=42)
    assert same(kept, again)
    stream.close()


def test_the_stream_leaves_the_global_generators_alone(shards):
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    read(shards, 5)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


@pytest.mark.gpu
def test_batches_on_a_gpu_equal_those_on_the_cpu(shards):
    got = read(shards, 50, device="cuda", with_doc_ids=True)
    torch.cuda.synchronize()
    expected = read(shards, 50, with_doc_ids=True)
    for a, b in zip(got, expected):
        assert a.tokens.is_cuda
        assert torch.equal(a.tokens.cpu(), b.tokens)
        assert torch.equal(a.targets.cpu(), b.targets)
        assert torch.equal(a.doc_ids.cpu(), b.doc_ids)


def test_bytes_of_text_come_back(tmp_path):
    """With a tokenizer of bytes, what a row says is what the documents say."""
    texts = ["once upon a time there was a fox", "the end", "é à ü"]
    shards = build_shards(ListSource(texts), Bytes(), "train", tmp_path)
    everything = "".join(texts).encode()
    for batch in read(shards, 20, sequence_len=40):
        for row in whole_rows(batch).tolist():
            for piece in " ".join(map(str, row)).split(str(shards.bos_id)):
                assert bytes(map(int, piece.split())) in everything
