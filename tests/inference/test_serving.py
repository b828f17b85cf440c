"""Many requests at once: each gets what it would get alone, bit for bit, and everything is given back in the end.

Bit for bit on the CPU, and but for nanochat's gates (smear, value embeddings): torch.sigmoid rounds the last elements
of a tensor, which are too few for a vector register, differently from the rest, so the shape of a step shows in the
last bit of a gate. Log-probabilities are compared exactly, which holds the logits to it; with gates, to 1e-4.
"""

import dataclasses
import gc
import random

import pytest
import torch

from errors import KestrelError
from inference.engine import Engine
from inference.request import Event, Request
from inference.rows import DecodeStep, Rows
from inference.sampling import Plan, SamplingConfig
from inference.simple import generate_naive
from tests.inference.scripted import BOS, BYTES, END, Scripted, ScriptedEngine, scripted
from tests.inference.test_paged import poison
from tests.model.test_decode import NoHostSync
from tests.model.tiny import FORMS, NANOCHAT_2026, awake, nanochat, tokens, torch_ops


def real(form: str, device="cpu", **options) -> Engine:
    options = {"max_rows": 6, "page": 8, "prefill_chunk": 16, **options}
    engine = Engine(awake(FORMS[form], vocab_size=BYTES.vocab_size, device=device), BYTES, **options)
    poison(engine.cache)
    engine.stop_ids = set(range(0, 265, 16))
    return engine


def random_request(dice: random.Random, **fixed) -> Request:
    prompt = tokens(dice.randrange(1, 60), seed=dice.randrange(4)).tolist()  # some begin alike
    settings = dict(
        max_new_tokens=dice.randrange(1, 30),
        temperature=dice.choice([0.0, 0.7, 1.3]),
        top_k=dice.choice([0, 1, 20, 300]),
        top_p=dice.choice([1.0, 0.9, 0.3]),
        repetition_penalty=dice.choice([1.0, 1.4]),
        frequency_penalty=dice.choice([0.0, 0.5]),
        presence_penalty=dice.choice([0.0, -0.5]),
        seed=dice.randrange(100),
        num_samples=dice.choice([1, 1, 2, 4]),
    )
    return Request(prompt, SamplingConfig(**{**settings, **fixed}), logprobs=3)


def run(engine: Engine, requests: list[Request], dice: random.Random | None = None) -> dict[Request, list[Event]]:
    """All events of each request; with dice, requests come in between steps."""
    waiting, told = list(requests), {request: [] for request in requests}
    while waiting or engine.has_work:
        while waiting and (dice is None or dice.random() < 0.3):
            engine.submit(waiting.pop(0))
        for event in engine.step():
            told[event.request].append(event)
    assert engine.pool.n_held == engine.n_cached == 0
    assert not engine.cache_rows.lengths.any()
    assert not engine.rows.active.any()
    return told


def by_sample(events: list[Event]) -> list[list[tuple]]:
    samples = [[] for _ in range(events[0].request.sampling.num_samples)]
    for event in events:
        samples[event.sample].append(event[1:])
    return samples


def tokens_of(events: list[Event]) -> list[list[int]]:
    """The tokens of each sample."""
    return [[event[1] for event in sample if event[1] is not None] for sample in by_sample(events)]


# Each as if alone.


def assert_same(got: list[Event], want: list[Event], form: str) -> None:
    """The same tokens, texts and ends; and log-probabilities as equal as the form allows."""
    for a, b in zip(by_sample(got), by_sample(want), strict=True):
        assert [event[:5] for event in a] == [event[:5] for event in b]
        if "2026" not in form:
            assert a == b
        for x, y in zip(a, b):
            assert x[5] == pytest.approx(y[5], abs=1e-4)


@pytest.mark.parametrize("form", ["plain with shared heads", "windows", "2026", "llama", "nanofalcon"])
def test_a_request_in_a_crowd_gets_what_it_gets_alone(form):
    dice = random.Random(form)
    requests = [random_request(dice) for _ in range(8)]
    crowd = run(real(form), requests, dice)
    for request in requests:
        alone, engine = dataclasses.replace(request), real(form)
        assert_same(crowd[request], run(engine, [alone])[alone], form)
        assert all(sample[-1][3] in ("stop", "length") for sample in by_sample(crowd[request]))
        assert tokens_of(crowd[request]) == generate_naive(engine, request.prompt_ids, request.sampling)


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("2026", dict(lag=1)),
        ("llama tied with shared heads", dict(page=32, lag=1)),
        ("2026", dict(reuse_prefixes=False)),
        ("residual lambdas", dict(reuse_prefixes=False, prefill_chunk=1000)),
        ("2026", dict(cache_tokens=200)),
    ],
    ids=str,
)
def test_how_the_engine_is_set_up_changes_nothing(form, options):
    requests = [random_request(random.Random(seed)) for seed in range(6)]
    again = [dataclasses.replace(request) for request in requests]
    first, second = run(real(form), requests), run(real(form, **options), again)
    for a, b in zip(requests, again):
        assert_same(second[b], first[a], form)


def test_a_lone_row_needs_no_company_to_compute_with():
    engine = real("2026", max_rows=1)
    request = random_request(random.Random(1), num_samples=2)
    got = tokens_of(run(engine, [request])[request])
    assert got == generate_naive(engine, request.prompt_ids, request.sampling)
    assert {step.slice.stop for step in engine.steps.values()} == {1}


@pytest.mark.parametrize("page", [1, 3, 6, 30])
@pytest.mark.parametrize("max_rows", [1, 3])
def test_pages_of_any_size_have_room_for_padding(page, max_rows):
    for n, chunk in ((1, 5), (6, 1000), (30, 7), (181, 1000)):
        request = Request(tokens(n).tolist(), SamplingConfig(max_new_tokens=9, temperature=0))
        engine = real("2026", max_rows=max_rows, page=page, prefill_chunk=chunk)
        assert tokens_of(run(engine, [request])[request]) == generate_naive(
            engine, request.prompt_ids, request.sampling
        )


def test_greedy_tokens_are_those_of_triton():
    check_triton(
        32, torch.device("cpu"), nanochat(depth=1, aspect_ratio=24, head_dim=24, sequence_len=64, **NANOCHAT_2026)
    )


@pytest.mark.gpu
def test_greedy_tokens_are_those_of_triton_for_long(device):
    check_triton(256, device, nanochat(sequence_len=300, **NANOCHAT_2026))


def check_triton(n_steps: int, device, config):
    from tests.model.tiny import triton_ops

    told = []
    for ops in (torch_ops(device), triton_ops(device)):
        model = awake(config, vocab_size=BYTES.vocab_size, device=device, ops=ops)
        engine = Engine(model, BYTES, max_rows=1, page=16)
        engine.stop_ids = set()
        columns = engine.generate(tokens(21).tolist(), SamplingConfig(max_new_tokens=n_steps, temperature=0))
        told.append([column[0] for column in columns])
    assert told[0] == told[1]
    assert len(told[0]) == n_steps
    assert len(set(told[0])) > 5


# Rows, blocks and queue.


def test_rows_that_ended_cost_nothing_and_others_take_their_place():
    engine = scripted([7, 1, 2, 3, 4, 5, 6, 8, 9, 10, END], *[[7, END]] * 6, max_rows=7)
    request = Request([BOS], SamplingConfig(max_new_tokens=30, temperature=0, num_samples=7))
    (events,) = run(engine, [request]).values()
    assert [event.token for event in events if event.sample == 0] == [7, 1, 2, 3, 4, 5, 6, 8, 9, 10, None]
    assert [len(rows) for rows in engine.model.fed] == [1, 7, *[1] * 9]
    assert sorted(engine.steps) == [4, 8]  # computed rows: eight once, then four


def test_one_prefill_serves_many_samples_and_its_pages_are_shared():
    engine = real("plain", max_rows=4, page=8, reuse_prefixes=False)
    engine.stop_ids = set()
    request = Request(tokens(20).tolist(), SamplingConfig(max_new_tokens=9, num_samples=4))
    engine.submit(request)
    engine.step()
    engine.step()
    rows = engine.running
    assert len(rows) == 4
    # 20 + 9 tokens are 4 pages of 8: two full ones for all, a third that each has a copy of, and one more each
    assert len({tuple(row.blocks[:2]) for row in rows}) == 1
    assert len({row.blocks[2] for row in rows}) == len({row.blocks[3] for row in rows}) == 4
    assert engine.pool.n_held == 2 + 4 * 2


def test_a_prompt_that_was_read_is_not_read_again():
    engine = scripted([1] * 50, page=8)
    again = [*range(40)], [*range(32), 9, 9], [*range(30)], [9, *range(40)]
    for prompt in again:
        run(engine, [Request(prompt, SamplingConfig(max_new_tokens=1, temperature=0))])
    assert engine.model.fed == [[[*range(40)]], [[9, 9]], [[*range(24, 30)]], [[9, *range(40)]]]


def test_long_prompts_do_not_hold_up_those_who_talk():
    engine = scripted([1] * 99, prefill_chunk=10)
    talking = engine.submit(Request([1], SamplingConfig(max_new_tokens=30, temperature=0)))
    engine.step()
    engine.submit(Request([2] * 35, SamplingConfig(max_new_tokens=5, temperature=0)))
    for _ in range(4):
        assert [event.request for event in engine.step()][:1] == [talking]
    assert [len(rows[0]) for rows in engine.model.fed] == [1, 1, 10, 1, 10, 1, 10, 1, 5]


def test_when_the_cache_is_full_requests_wait_in_order():
    engine = scripted([1] * 99, cache_tokens=64, page=8, max_rows=8)
    requests = [Request([n] * 20, SamplingConfig(max_new_tokens=12, temperature=0)) for n in range(5)]  # 4 of 8 blocks
    for request in requests:
        engine.submit(request)
    ended = []
    while engine.has_work:
        assert len(engine.running) <= 2
        ended += [event.request for event in engine.step() if event.finish]
    assert ended == requests
    assert engine.pool.n_held == 0


def test_samples_wait_for_rows_and_blocks_without_blocking_each_other():
    for options in (dict(max_rows=2), dict(cache_tokens=32), dict(cache_tokens=40), dict(max_rows=1)):
        engine = real("llama", **options)
        request = Request(tokens(20).tolist(), SamplingConfig(max_new_tokens=12, num_samples=5, temperature=1.2))
        (events,) = run(engine, [request]).values()
        assert tokens_of(events) == generate_naive(engine, request.prompt_ids, request.sampling)


def test_what_can_never_fit_is_refused_at_once():
    engine = scripted(cache_tokens=64, page=8)
    for prompt, n_new, says in (
        ([1] * 60, 5, "60 tokens and max_new_tokens is 5, but the cache holds at most 64 .*max_new_tokens=4 or fewer"),
        ([1] * 64, None, "64 tokens, but the cache holds at most 64 .*shorten the prompt to 63 tokens"),
        ([], 1, "no token"),
    ):
        with pytest.raises(KestrelError, match=says):
            engine.submit(Request(prompt, SamplingConfig(max_new_tokens=n_new)))
    assert not engine.has_work
    assert len(run(engine, [Request([1] * 60, SamplingConfig(max_new_tokens=4, temperature=0))]).popitem()[1]) == 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(stop="end"), "stop must be a list of texts .*'end'"),
        (dict(stop=("",)), "stop must be a list of texts"),
        (dict(logprobs=21), "logprobs must be between 0 and 20.*got 21"),
        (dict(logprobs=-1), "logprobs .*-1"),
    ],
)
def test_a_bad_request_is_one_sentence(options, says):
    with pytest.raises(KestrelError, match=says):
        Request([1], **options)
    for name in ("max_rows", "page", "prefill_chunk", "cache_tokens"):
        with pytest.raises(KestrelError, match=f"{name} must be at least 1, got 0"):
            scripted(**{name: 0})


@pytest.mark.parametrize("lag", [0, 1])
def test_a_request_can_be_cancelled_wherever_it_is(lag):
    for n_steps in range(6):
        engine = scripted([1] * 99, max_rows=3, prefill_chunk=8, lag=lag)
        doomed = engine.submit(Request([2] * 20, SamplingConfig(max_new_tokens=30, temperature=0, num_samples=5)))
        other = engine.submit(Request([3] * 9, SamplingConfig(max_new_tokens=5, temperature=0)))
        for _ in range(n_steps):
            engine.step()
        assert all(event.finish == "cancelled" for event in engine.cancel(doomed))
        left = []
        while engine.has_work:
            left += engine.step()
        assert {event.request for event in left} == {other}
        assert left[-1].finish == "length"
        assert engine.pool.n_held == 0


def test_a_reader_who_leaves_gives_everything_back():
    engine = real("plain")
    columns = engine.generate([1, 2, 3], SamplingConfig(max_new_tokens=20, num_samples=3))
    next(columns)
    columns.close()
    assert engine.pool.n_held == 0
    assert not engine.running


def test_two_readers_at_once_get_their_own():
    engine = real("2026")
    prompts = [tokens(9).tolist(), tokens(13).tolist()]
    sampling = SamplingConfig(max_new_tokens=12, num_samples=2)
    readers = [engine.generate(prompt, sampling) for prompt in prompts]
    columns = [[], []]
    for _ in range(20):
        for reader, told in zip(readers, columns):
            told += [column for column in [next(reader, None)] if column]
    got = [[[token for token in row if token is not None] for row in zip(*told)] for told in columns]
    assert got == [generate_naive(engine, prompt, sampling) for prompt in prompts]


def test_many_generations_leave_nothing_behind():
    engine = scripted(*[[*b"abcdef"[:n], END] for n in range(7)], max_rows=5, page=4, cache_tokens=120, lag=1)
    dice = random.Random(0)
    sizes = []
    for i in range(300):
        n = dice.randrange(1, 70)
        sampling = SamplingConfig(max_new_tokens=dice.randrange(1, 30), temperature=0, num_samples=dice.choice([1, 3]))
        request = engine.submit(Request([dice.randrange(3)] * n, sampling))
        for _ in range(dice.randrange(4)):
            engine.step()
        if dice.random() < 0.1:
            engine.cancel(request)
        if i % 100 == 99:
            while engine.has_work:
                engine.step()
            gc.collect()
            sizes.append(len([x for x in gc.get_objects() if type(x) is torch.Tensor]))
            engine.model.fed.clear()
    assert engine.pool.n_held == 0
    assert engine.pool.n_available == engine.pool.n_blocks
    assert all(refs == 0 for refs in engine.pool.refs)
    assert len(engine.pool.prefixes) <= engine.pool.n_blocks
    assert sizes[2] <= sizes[1] + 60  # page states of prefixes may come and go


# Text, log-probabilities, waiting.


@pytest.mark.parametrize("lag", [0, 1])
def test_a_stop_string_ends_a_row_wherever_tokens_cut_it(lag):
    engine = scripted([*b"one. End of", *b" it, more"], [*b"only", END], max_rows=4, lag=lag)
    request = Request([BOS], SamplingConfig(max_new_tokens=50, temperature=0, num_samples=2), stop=(" of it", "xyz"))
    (events,) = run(engine, [request]).values()
    texts = ["".join(event.text for event in events if event.sample == i) for i in (0, 1)]
    assert texts == ["one. End", "only"]
    ends = {event.sample: event.finish for event in events if event.finish}
    assert ends == {0: "stop", 1: "stop"}
    assert all(" " not in event.text or event.text == " E" for event in events if event.sample == 0)


def test_held_back_text_comes_at_the_end():
    engine = scripted([*b"abcST"])
    request = Request([BOS], SamplingConfig(max_new_tokens=5, temperature=0), stop=("STOP",))
    (events,) = run(engine, [request]).values()
    assert [event.text for event in events] == ["a", "b", "c", "", "ST"]
    assert events[-1].finish == "length"


def test_half_a_character_is_never_shown():
    engine = scripted([*"né🦊".encode(), 0xF0, 0x9F, END])
    (events,) = run(engine, [Request([BOS], SamplingConfig(max_new_tokens=50, temperature=0))]).values()
    assert [event.text for event in events] == ["n", "", "é", "", "", "", "🦊", "", "", "�"]


def test_logprobs_are_the_models_own():
    engine = real("llama")
    request = random_request(random.Random(3), temperature=1.5, top_k=3, repetition_penalty=2.0, max_new_tokens=12)
    other = Request([5], SamplingConfig(max_new_tokens=12))  # asks for none
    told = run(engine, [request, other])
    ids = list(request.prompt_ids)
    for event in told[request]:
        if event.sample == 0 and event.token is not None:
            with torch.no_grad():
                log_p = engine.model(torch.tensor([ids]))[0, -1].log_softmax(-1)
            assert event.logprob == pytest.approx(log_p[event.token].item(), abs=1e-4)
            assert [token for token, _ in event.top] == log_p.topk(3).indices.tolist()
            ids.append(event.token)
    assert all((event.logprob, event.top) == (None, ()) for event in told[other])


def test_a_step_never_waits_for_the_device():
    engine = real("2026")
    plan = Plan(draws=True, penalises=True, nucleus=True, n_best=50)
    step = DecodeStep(engine.model, engine.rows, engine.cache_rows, 4)
    with NoHostSync():
        step(plan, 3)


def test_a_row_draws_the_same_under_any_plan():
    rows, dice = Rows(6, torch.zeros(50, dtype=torch.bool), torch_ops()), random.Random(0)
    configs = [random_request(dice).sampling for _ in range(6)]
    history = torch.randint(-1, 50, (512,))
    logits = torch.randn(6, 50) * 3
    for i, config in enumerate(configs):
        rows.begin(i, config, i, 99, history)
    together = rows.draw(logits, slice(0, 6), Plan.of(configs)).ids.tolist()
    for i, config in enumerate(configs):
        rows.begin(i, config, i, 99, history)
        assert rows.draw(logits[i : i + 1], slice(i, i + 1), Plan.of([config])).ids.tolist() == together[i : i + 1]


def test_a_frozen_row_changes_nothing():
    """With lag, rows that have ended may be computed once more."""
    engine = ScriptedEngine(Scripted([1, 2, END, 9, 9]), BYTES, lag=1)
    request = Request([BOS], SamplingConfig(max_new_tokens=5, temperature=0))
    (events,) = run(engine, [request]).values()
    assert [event.token for event in events] == [1, 2, None]
    assert engine.model.calls <= 5


@pytest.mark.gpu
def test_a_gpu_step_is_queued_without_waiting(device):
    engine = real("2026", device)
    request = engine.submit(Request(tokens(20).tolist(), SamplingConfig(max_new_tokens=40, num_samples=3)))
    for _ in range(5):
        engine.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.decode()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    engine.cancel(request)
