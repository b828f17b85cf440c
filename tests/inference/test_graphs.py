"""Recorded steps say what eager ones say, whatever happens to the rows between two replays."""

import random
from collections import deque

import pytest
import torch

from errors import KestrelError
from inference import prefill as prefill_module
from inference import rows as rows_module
from inference.engine import Engine
from inference.request import Request
from inference.sampling import SamplingConfig
from model.cuda_graphs import CudaGraphs
from tests.inference.scripted import BYTES
from tests.inference.test_paged import poison
from tests.inference.test_serving import assert_same, random_request, run
from tests.model.tiny import FORMS, awake, tokens, torch_ops, triton_ops
from tests.training.recorded_graph import RecordedGraphs


def engine_of(form: str, capture=None, ops=None, device="cpu", **options) -> Engine:
    model = awake(FORMS[form], vocab_size=BYTES.vocab_size, device=device, ops=ops)
    engine = Engine(model, BYTES, **{"max_rows": 5, "page": 8, "prefill_chunk": 16, "graphs": False, **options})
    engine.cache.reach_for = lambda n_blocks: engine.cache.max_blocks  # a graph reads all of a table, as on a GPU
    poison(engine.cache)
    engine.stop_ids = set(range(0, 265, 16))
    engine.capture = engine.prefill.capture = capture
    return engine


def requests_of(seed: int, n: int = 10, **fixed) -> list[Request]:
    dice = random.Random(seed)
    return [random_request(dice, **fixed) for _ in range(n)]


def compare(form: str, capture, **options) -> Engine:
    """Ten requests that come and go as they like, eagerly and recorded.

    The same tokens, texts and ends; on a CPU the same bits, too. On a GPU a prompt that is padded to a recorded length
    is read by other products than one that is not, so there log-probabilities may differ by rounding.
    """
    first, second = requests_of(0), requests_of(0)
    want = run(engine_of(form, **options), first, random.Random(1))
    engine = engine_of(form, capture, **options)
    got = run(engine, second, random.Random(1))
    exact = form if engine.device.type == "cpu" else "2026"  # whose gates round differently anyhow
    for a, b in zip(first, second):
        assert_same(got[b], want[a], exact)
    return engine


@pytest.mark.parametrize("form", ["plain with shared heads", "2026", "llama tied with shared heads"])
@pytest.mark.parametrize("lag", [0, 1])
def test_recorded_steps_equal_eager_ones(form, lag, monkeypatch):
    monkeypatch.setattr(prefill_module, "LENGTHS", (2, 8, 16))
    capture = RecordedGraphs()
    engine = compare(form, capture, lag=lag)
    assert capture.replayed > capture.captured > 1
    n_readers = sum(reader.replay is not None for reader in engine.prefill.readers.values())
    assert capture.captured == sum(len(step.graphs) for step in engine.steps.values()) + n_readers
    assert n_readers >= 2
    stats = engine.stats()
    assert sum(stats["graphs_of_steps"].values()) + len(stats["graphs_of_prompts"]) == capture.captured
    assert stats["blocks_held"] == stats["rows_at_work"] == stats["requests_waiting"] == 0


def test_what_comes_once_is_not_recorded_and_graphs_are_few(monkeypatch):
    monkeypatch.setattr(rows_module, "MOST_GRAPHS", 2)
    capture = RecordedGraphs()
    engine = engine_of("plain", capture, max_rows=1)
    engine.prefill.capture = None
    engine.stop_ids = set()
    for n_new, expected in ((2, 0), (3, 1), (9, 1)):  # the first token comes with the prompt
        run(engine, [Request([1, 2], SamplingConfig(max_new_tokens=n_new, temperature=0))])
        assert capture.captured == expected
    for top_k in (1, 2, 3, 4, 30, 200):
        run(engine, [Request([1, 2], SamplingConfig(max_new_tokens=5, temperature=1, top_k=top_k))])
    assert capture.captured == 2


def test_plans_differ_by_powers_of_two_only():
    capture = RecordedGraphs()
    engine = engine_of("plain", capture, max_rows=1)
    engine.prefill.capture = None
    engine.stop_ids = set()
    for top_k in (33, 64, 50, 40):
        run(
            engine,
            [Request([1, 2], SamplingConfig(max_new_tokens=5, temperature=1, top_k=top_k), logprobs=top_k // 10)],
        )
    assert capture.captured == 1


class Forcing:
    """As a tool that wants these words said."""

    def __init__(self, *ids: int) -> None:
        self.left = deque(ids)

    @property
    def next_forced(self) -> int | None:
        return self.left[0] if self.left else None

    def push(self, token: int) -> bool:
        return bool(self.left) and self.left.popleft() == token


def told_with_forced(engine: Engine) -> list[int | None]:
    request = engine.submit(Request([1, 2, 3], SamplingConfig(max_new_tokens=12, temperature=0)))
    told = []
    while engine.has_work:
        told += [event.token for event in engine.step()]
        if len(told) == 4 and engine.running:
            engine.running[0].tools = Forcing(7, 8, 9)
    assert request.sampling.max_new_tokens == len(told)
    return told


def test_forced_tokens_reach_recorded_steps():
    told = []
    for capture in (None, RecordedGraphs()):
        engine = engine_of("2026", capture, max_rows=1, lag=0)
        engine.stop_ids = set()
        told.append(told_with_forced(engine))
    assert told[0] == told[1]
    assert told[0][4:7] == [7, 8, 9]


@pytest.mark.parametrize("what", ["steps", "prompts"])
@pytest.mark.parametrize("value", [0.0, torch.nan])
def test_a_graph_that_computes_something_else_is_refused(what, value):
    recorded = RecordedGraphs()
    engine = engine_of("2026", max_rows=1)
    engine.stop_ids = set()

    def broken(function):
        replay = recorded(function)

        def replay_wrongly() -> None:
            replay()
            for one in [*engine.steps.values(), *engine.prefill.readers.values()]:
                one.logits.fill_(value)

        return replay_wrongly

    if what == "steps":
        engine.capture = broken
    else:
        engine.prefill.capture = broken
    with pytest.raises(KestrelError, match=r"something else than the same step kernel by kernel.*cuda_graph=false"):
        for _ in range(2):
            run(engine, [Request([1, 2, 3], SamplingConfig(max_new_tokens=5, temperature=0))])


def test_padding_to_a_recorded_length_changes_no_token(monkeypatch):
    """As on a GPU: read in its own length without graphs, and padded with them."""
    for form in ("plain", "llama"):
        told = []
        for pad_to, capture in ((1, None), (4, RecordedGraphs())):
            monkeypatch.setattr(prefill_module, "PAD_TO", pad_to)
            requests = requests_of(3)
            events = run(engine_of(form, capture), requests, random.Random(1))
            told.append([[event[1:6] for event in events[request]] for request in requests])
        assert told[0] == told[1]


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", [torch_ops, triton_ops])
@pytest.mark.parametrize("form", ["plain with shared heads", "2026", "llama", "nanofalcon"])
def test_cuda_graphs_equal_eager_steps(form, kernels, device):
    engine = compare(form, CudaGraphs(), ops=kernels(device), device=device)
    assert sum(len(step.graphs) for step in engine.steps.values()) > 1


@pytest.mark.gpu
def test_many_generations_on_a_gpu_leave_nothing_behind(device):
    """10,000 of random lengths, some cancelled: memory stays where it was and every block comes back."""
    engine = engine_of("2026", CudaGraphs(), ops=triton_ops(device), device=device, max_rows=64, cache_tokens=6000)
    dice, after, n = random.Random(0), [], 0
    while n < 10_000:
        n_samples, limit = dice.choice([1, 1, 4]), dice.randrange(1, 12)
        sampling = SamplingConfig(max_new_tokens=limit, temperature=dice.choice([0.0, 1.0]), num_samples=n_samples)
        request = engine.submit(Request(tokens(dice.randrange(1, 60), seed=dice.randrange(9)).tolist(), sampling))
        n += n_samples
        if len(engine.queue) > 40:
            for _ in range(dice.randrange(30)):
                engine.step()
        if dice.random() < 0.02:
            engine.cancel(request)
        if n // 2000 > len(after):
            while engine.has_work:
                engine.step()
            torch.cuda.synchronize()
            after.append(torch.cuda.memory_allocated())
    while engine.has_work:
        engine.step()
    assert engine.pool.n_held == 0
    assert engine.pool.n_available == engine.pool.n_blocks
    assert max(after[1:]) - min(after[1:]) < 2**20, after  # states of prefixes may come and go
