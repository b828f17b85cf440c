"""From token shards to `Batch`: what the training loop eats, made and copied to the device ahead of time.

The stream of rows is one, whatever the number of ranks and the size of batches: micro-batch m of a run with W ranks and
B rows a rank is rows m·W·B to (m + 1)·W·B, of which rank r takes r·B on. Every rank plans all rows, which costs only
arithmetic on lengths, and copies tokens for its own. So `Batch.state` is the number of rows read, together with where
the planning of the current chunk began (`packing.Position`): some kilobytes of JSON, equal on all ranks, from which
any number of ranks goes on with the very next row. It also names what it belongs to, and is refused by anything else.
"""

import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.documents import TokenShards
from data.packing import Position, Rows, hash_of, join_rows, make_epoch, plan_chunk, shuffle_rows
from errors import KestrelError

AHEAD = 2  # batches ready before they are asked for
IGNORED = -1  # a target that counts neither in the loss nor in its average
STATE_VERSION = 1


class Batch(NamedTuple):
    """What a training step needs, however it was made. The tensors are the caller's: nothing writes to them again."""

    tokens: Tensor  # [B, T] int64
    targets: Tensor  # [B, T] int64, -1 is ignored
    weights: Tensor | None  # [B, T] float: None, or the advantage of the rollout
    doc_ids: Tensor | None  # [B, T] int32: None, or which packed document a token belongs to
    state: dict[str, Any]  # where the stream stands after this batch


def pretrain_batches(
    shards: TokenShards,
    *,
    batch_size: int,
    sequence_len: int,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 42,
    state: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
    bos_id: int | None = None,
    with_doc_ids: bool = False,
) -> "Prefetcher":
    """Batches without end, epoch after epoch; `close()` them when done.

    batch_size   rows of each batch, on this rank
    state        of the batch after which to go on; None: from the beginning. KestrelError if it is another stream's
    bos_id       the tokenizer's, only to be checked: the shards know theirs
    """
    if bos_id is not None and bos_id != shards.bos_id:
        raise KestrelError(f"these tokens were made with BOS {shards.bos_id}, but the tokenizer's is {bos_id}")
    make = _BatchMaker(shards, batch_size, sequence_len, with_doc_ids, torch.device(device).type == "cuda")
    reader = RowReader(shards, sequence_len, seed, state)

    def batches() -> Iterator[Batch]:
        while True:
            rows = reader.take(world_size * batch_size)
            yield make(rows.part(rank * batch_size, (rank + 1) * batch_size), reader.state())

    return Prefetcher(batches(), torch.device(device))


def val_batches(
    shards: TokenShards,
    *,
    batch_size: int,
    sequence_len: int,
    rank: int = 0,
    world_size: int = 1,
    max_tokens: int | None = None,
    device: torch.device | str = "cpu",
    with_doc_ids: bool = False,
) -> "Prefetcher":
    """One pass over the validation rows, or over the first `max_tokens` tokens of them (None or -1: all).

    The rows are the same every time, for any batch_size and world_size. Every batch has batch_size rows and every rank
    gets as many batches; where rows run out, the last batches hold BOS with ignored targets instead. The last row of
    the pass is left out if it would need tokens a second time, unless it is the only one.
    """
    limit = None if max_tokens is None or max_tokens < 0 else max(1, max_tokens // sequence_len)
    chunks = _validation_rows(shards, sequence_len, limit)
    make = _BatchMaker(shards, batch_size, sequence_len, with_doc_ids, torch.device(device).type == "cuda")

    def batches() -> Iterator[Batch]:
        read = 0
        for rows in _regroup(chunks, world_size * batch_size):
            read += rows.count
            first, end = (min(r * batch_size, rows.count) for r in (rank, rank + 1))
            yield make(rows.part(first, end), {"row": read})

    return Prefetcher(batches(), torch.device(device))


class RowReader:
    """The endless sequence of training rows of a data set, and a state from which it goes on."""

    def __init__(self, shards: TokenShards, sequence_len: int, seed: int, state: dict[str, Any] | None = None) -> None:
        self.identity = {"data": shards.hash, "sequence_len": sequence_len, "seed": seed}
        self.row, self.used, position = 0, 0, Position()
        if state is not None:
            self.row, self.used, position = _read_state(state, self.identity)
        self.epoch = make_epoch(shards.lengths, sequence_len + 1, position.epoch, seed)
        if position.cursor > len(self.epoch):
            raise _bad_state("its cursor lies beyond the epoch")
        self._plan(position)
        if self.used > self.rows.count:
            raise _bad_state("it is beyond the end of its chunk")

    def _plan(self, position: Position) -> None:
        self.chunk = {"epoch": position.epoch, "cursor": position.cursor, "buffer": list(position.buffer)}
        rows, self.after, self.epoch = plan_chunk(self.epoch, position)
        self.rows = shuffle_rows(rows, hash_of(self.identity["seed"], position.epoch, position.cursor, 2))

    def take(self, count: int) -> Rows:
        """The next `count` rows."""
        parts = []
        self.row += count
        while count:
            if self.used == self.rows.count:
                self._plan(self.after)
                self.used = 0
            end = min(self.used + count, self.rows.count)
            parts.append(self.rows.part(self.used, end))
            count -= end - self.used
            self.used = end
        self.last_epoch = int(parts[-1].epoch[-1])
        return join_rows(parts)

    def state(self) -> dict[str, Any]:
        """Where the reader stands, for JSON: rows read, the epoch of the last one, and the chunk it is in."""
        place = {"row": self.row, "epoch": self.last_epoch, "used": self.used, "chunk": self.chunk}
        return {"version": STATE_VERSION, **self.identity, **place}


def _read_state(state: dict[str, Any], identity: dict[str, Any]) -> tuple[int, int, Position]:
    """What a state says, if it is one of this stream."""
    try:
        for key, value in {"version": STATE_VERSION, **identity}.items():
            if state[key] != value:
                raise _other_stream(key, state[key], value)
        chunk = state["chunk"]
        position = Position(chunk["epoch"], chunk["cursor"], tuple(chunk["buffer"]))
        numbers = [state["row"], state["used"], position.epoch, position.cursor, *position.buffer]
        good = all(type(number) is int and number >= 0 for number in numbers)
    except (KeyError, TypeError) as error:
        raise _bad_state(f"{type(error).__name__}: {error}") from error
    if (
        not good
        or list(position.buffer) != sorted(set(position.buffer))
        or max(position.buffer, default=-1) >= position.cursor
    ):
        raise _bad_state("its numbers do not fit together")
    return state["row"], state["used"], position


def _other_stream(key: str, then: Any, now: Any) -> KestrelError:
    what = f"it read its data with {key}={then}, and now that is {now}"
    if key == "data":
        what = "its training tokens were other ones (other files, or another tokenizer)"
    return KestrelError(f"this run cannot go on where it stopped: {what}; give it what it had, or set resume=never")


def _bad_state(why: str) -> KestrelError:
    return KestrelError(f"the state of the data stream cannot be read ({why}): start anew with resume=never")


def _validation_rows(shards: TokenShards, sequence_len: int, limit: int | None) -> Iterator[Rows]:
    """The rows of one epoch in chunks, at most `limit` of them."""
    epoch, position = make_epoch(shards.lengths, sequence_len + 1, 0, seed=0), Position()
    read = 0
    while position.epoch == 0 and (limit is None or read < limit):
        rows, position, _ = plan_chunk(epoch, position)
        pieces = int(np.searchsorted(rows.epoch, 1))  # of this epoch
        count = int(np.searchsorted(rows.splits, pieces, side="right")) - 1
        count = max(count, 1 if read == 0 else 0)
        count = count if limit is None else min(count, limit - read)
        read += count
        yield rows.part(0, count)


def _regroup(chunks: Iterator[Rows], size: int) -> Iterator[Rows]:
    """The same rows, `size` at a time; the last group may be smaller."""
    waiting: list[Rows] = []
    for chunk in chunks:
        rows = join_rows([*waiting, chunk])
        whole = rows.count // size * size
        yield from (rows.part(first, first + size) for first in range(0, whole, size))
        waiting = [rows.part(whole, rows.count)]
    if waiting and waiting[0].count:
        yield waiting[0]


class _BatchMaker:
    """Copies the tokens of planned rows out of the shards."""

    def __init__(self, shards: TokenShards, batch_size: int, sequence_len: int, doc_ids: bool, pinned: bool) -> None:
        if batch_size < 1 or sequence_len < 1:
            raise KestrelError(f"a batch needs at least one row of one token, got {batch_size} × {sequence_len}")
        self.shards, self.doc_ids, self.pinned = shards, doc_ids, pinned
        self.rows = np.empty((batch_size, sequence_len + 1), shards.shards[0].dtype)

    def __call__(self, rows: Rows, state: dict[str, Any]) -> Batch:
        """A batch on the CPU, its memory pinned if it goes on to a GPU."""
        B, T = self.rows.shape[0], self.rows.shape[1] - 1
        self._fill(rows)
        both = torch.empty((2, B, T), dtype=torch.int64, pin_memory=self.pinned)
        tokens, targets = both.numpy()
        filled = rows.count
        tokens[:filled], targets[:filled] = self.rows[:filled, :-1], self.rows[:filled, 1:]
        tokens[filled:], targets[filled:] = self.shards.bos_id, IGNORED
        return Batch(both[0], both[1], None, self._doc_ids(rows, B, T) if self.doc_ids else None, state)

    def _fill(self, rows: Rows) -> None:
        """Lay the pieces end to end in `self.rows`; every row is full, so a piece begins where the one before ends."""
        flat = self.rows.reshape(-1)
        ends = np.cumsum(rows.take)
        flat[ends - rows.take] = self.shards.bos_id
        begins = self.shards.offsets[rows.document] + rows.begin
        number = np.searchsorted(self.shards.shard_starts, begins, side="right") - 1
        begins -= self.shards.shard_starts[number]
        shards = self.shards.shards
        lists = (column.tolist() for column in (number, begins, ends - rows.take + 1, ends))
        for shard, begin, start, end in zip(*lists):
            flat[start:end] = shards[shard][begin : begin + end - start]

    def _doc_ids(self, rows: Rows, B: int, T: int) -> Tensor:
        """[B, T] the number, within its row, of the piece a token belongs to."""
        ids = torch.zeros((B, T), dtype=torch.int32, pin_memory=self.pinned)
        counts = np.diff(rows.splits)
        numbers = np.arange(len(rows.take)) - np.repeat(rows.splits[:-1], counts)
        ids.numpy()[: rows.count] = np.repeat(numbers, rows.take).reshape(rows.count, T + 1)[:, :-1]
        return ids


class Prefetcher:
    """An iterator over batches that a thread of its own makes, AHEAD of them at a time, already on the device.

    An exception in the thread is raised by `next`. `close()` ends the thread and may be called twice; an iterator that
    nobody holds any more, and the end of the program, do the same.
    """

    def __init__(self, batches: Iterator[Batch], device: torch.device) -> None:
        if device.type == "cuda" and device.index is None:  # which GPU is meant is known to this thread only
            device = torch.device("cuda", torch.cuda.current_device())
        self._device = device
        self._ready: queue.Queue[Any] = queue.Queue(AHEAD)
        stop = threading.Event()
        thread = threading.Thread(target=_work, args=(batches, device, self._ready, stop), daemon=True)
        self._shut = weakref.finalize(self, _shut, thread, self._ready, stop)
        thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self._shut.alive:
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        batch, copied = item
        if copied is not None:
            _take_over(batch, copied, self._device)
        return batch

    def close(self) -> None:
        """End the thread; batches already handed out stay as they are."""
        self._shut()


def _work(batches: Iterator[Batch], device: torch.device, ready: queue.Queue, stop: threading.Event) -> None:
    """Make batches, send them to the device, and queue them, until told to stop."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    try:
        for batch in batches:
            if not _put((_to_device(batch, device, stream)), ready, stop):
                return
        _put(StopIteration(), ready, stop)
    except BaseException as error:  # whatever it is, it belongs to whoever waits for the batch
        _put(error, ready, stop)


def _put(item: Any, ready: queue.Queue, stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            ready.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False


def _shut(thread: threading.Thread, ready: queue.Queue, stop: threading.Event) -> None:
    stop.set()
    while not ready.empty():  # make room for a thread that waits to put
        ready.get_nowait()
    if thread is not threading.current_thread():
        thread.join()


def _to_device(batch: Batch, device: torch.device, stream: "torch.cuda.Stream | None") -> tuple[Batch, Any]:
    """The batch on its device. On a GPU the copy runs in a stream beside the computation; the event tells its end."""
    if stream is None:
        return _moved(batch, lambda tensor: tensor.to(device)), None
    with torch.cuda.stream(stream):
        # the pinned memory is not reused before the copy is done: PyTorch's allocator watches the stream
        moved = _moved(batch, lambda tensor: tensor.to(device, non_blocking=True))
        return moved, stream.record_event()


def _moved(batch: Batch, move: Any) -> Batch:
    return Batch(*(move(field) if isinstance(field, Tensor) else field for field in batch))


def _take_over(batch: Batch, copied: "torch.cuda.Event", device: torch.device) -> None:
    """Let the caller's stream wait for the copy, and the allocator know that this stream uses the tensors too."""
    stream = torch.cuda.current_stream(device)
    stream.wait_event(copied)
    for field in batch:
        if isinstance(field, Tensor):
            field.record_stream(stream)
