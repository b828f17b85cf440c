"""Guesses change how many steps it takes, and not what is said."""

import dataclasses
import random

import pytest

from errors import KestrelError
from inference.engine import Engine, cast_weights
from inference.request import Request
from inference.sampling import SamplingConfig
from inference.speculation import Lookup, n_right
from tests.inference.scripted import BYTES
from tests.inference.test_serving import assert_same, random_request, run
from tests.model.tiny import FORMS, awake, tokens
from tests.training.recorded_graph import RecordedGraphs


def test_what_followed_the_last_time_is_guessed():
    lookup = Lookup([1, 2, 3, 4, 9, 2, 3])
    assert lookup.guess(3) == [4, 9, 2]
    assert lookup.guess(1) == [4]
    lookup.push(7)
    assert lookup.guess(3) == []
    for token in (5, 2, 3):
        lookup.push(token)
    assert lookup.guess(2) == [7, 5]  # the newest place counts
    assert Lookup([1, 2, 3, 9, 5, 2, 3, 8, 1, 2, 3]).guess(1) == [9]  # but a longer match before it
    assert Lookup([4]).guess(3) == Lookup([]).guess(3) == []


def test_guesses_are_right_up_to_the_first_that_is_not():
    assert n_right([1, 2, 3], [1, 2, 3, 4]) == 3
    assert n_right([1, 2, 3], [1, 5, 3, 4]) == 1
    assert n_right([1], [2, 2]) == 0


def engine_of(form: str, stacked: bool, speculate: int, **options) -> Engine:
    model = awake(FORMS[form], vocab_size=BYTES.vocab_size)
    engine = Engine(cast_weights(model) if stacked else model, BYTES, page=8, speculate=speculate, **options)
    engine.stop_ids = set()
    return engine


@pytest.mark.parametrize("form", ["plain with shared heads", "2026", "llama", "nanofalcon"])
@pytest.mark.parametrize("stacked", [True, False])
def test_the_same_is_said_in_fewer_steps(form, stacked):
    """The prompt holds the answer, so that guesses are right; behind it they are not."""
    prompt = tokens(20).tolist()
    sampling = SamplingConfig(max_new_tokens=50, temperature=0)
    plain = engine_of(form, stacked, 0)
    (events,) = run(plain, [Request(prompt, sampling)]).values()
    told = [event.token for event in events]
    prompt = prompt + told[:30] + prompt
    request, again = (Request(prompt, sampling) for _ in range(2))
    want, engine = run(engine_of(form, stacked, 0), [request])[request], engine_of(form, stacked, 4)
    got = run(engine, [again])[again]
    assert_same(got, want, form)
    assert len(got) == 50
    assert engine.n_decoded <= 49


@pytest.mark.parametrize("form", ["2026", "llama"])
@pytest.mark.parametrize("capture", [None, RecordedGraphs()], ids=["eager", "recorded"])
def test_a_text_that_repeats_itself_takes_few_steps(form, capture):
    """A model whose likeliest next token depends on the last one only ends in a circle."""
    model = awake(FORMS[form], vocab_size=BYTES.vocab_size)
    for block in model.blocks_in_order:
        block.attn.c_proj.weight.data.zero_()
    sampling, told, steps = SamplingConfig(max_new_tokens=100, temperature=0), [], []
    for speculate in (0, 5):
        engine = Engine(model, BYTES, page=8, speculate=speculate, graphs=False)
        engine.cache.reach_for = lambda n_blocks, engine=engine: engine.cache.max_blocks
        engine.capture = engine.prefill.capture = capture
        engine.stop_ids = set()
        told.append([token for (token,) in engine.generate([1, 2, 3], sampling)])
        steps.append(engine.n_decoded)
    assert told[0] == told[1]
    assert steps[0] == 99
    assert steps[1] < 70


def test_rows_among_others_draws_and_ends_are_as_without():
    for seed in range(3):
        dice = random.Random(seed)
        greedy = dict(temperature=0.0, repetition_penalty=1.0, frequency_penalty=0.0, presence_penalty=0.0)
        requests = [random_request(dice, **(greedy if dice.random() < 0.7 else {})) for _ in range(6)]
        requests = [dataclasses.replace(request, logprobs=None) for request in requests]
        again = [dataclasses.replace(request) for request in requests]
        told = []
        for speculate, mine in ((0, requests), (3, again)):
            engine = engine_of("llama", True, speculate, max_rows=4, prefill_chunk=16)
            engine.stop_ids = set(range(0, 265, 16))
            told.append(run(engine, mine, random.Random(seed)))
        for a, b in zip(requests, again):
            for x, y in zip(told[0][a], told[1][b], strict=True):
                assert x[1:] == y[1:]


def test_how_many_are_guessed_is_checked():
    with pytest.raises(KestrelError, match="speculate must be at least 0, got -1"):
        engine_of("plain", False, -1)
