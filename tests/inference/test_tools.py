"""A scripted model asks the calculator, is told the answer, and only the row that asked."""

import threading

import pytest

from inference.calculator import calculate
from inference.request import Event, Request
from inference.sampling import SamplingConfig
from inference.tools import ToolUse
from tests.inference.scripted import BYTES, END, scripted

START, STOP, OUT, DONE = (
    BYTES.encode_special(f"<|{name}|>") for name in ("python_start", "python_end", "output_start", "output_end")
)
IGNORED = ord("?")  # what the script says while the tool speaks


def call(expression: str) -> list[int]:
    return [START, *expression.encode(), STOP]


def answer(text: str) -> list[int]:
    return [OUT, *text.encode(), DONE]


def run(*scripts: list[int], limit: int = 60, n: int = 1, tool=calculate, **options) -> list[list[Event]]:
    """The events of each sample."""
    engine = scripted(*scripts, **options)
    request = Request([1, 2], SamplingConfig(max_new_tokens=limit, temperature=0, num_samples=n), tool=tool)
    told: list[list[Event]] = [[] for _ in range(n)]
    for events in engine.follow(request):
        for event in events:
            told[event.sample].append(event)
    assert engine.pool.n_held == 0
    return told


def tokens(events: list[Event]) -> list[int]:
    return [event.token for event in events if event.token is not None]


@pytest.mark.parametrize("lag", [0, 1])
def test_a_call_is_answered_with_forced_tokens(lag):
    script = [*b"ab", *call("2+3*4"), *[IGNORED] * 4, *b"c", END]
    (events,) = run(script, lag=lag)
    assert tokens(events) == [*b"ab", *call("2+3*4"), *answer("14"), *b"c"]
    assert [event.token for event in events if event.forced] == answer("14")
    assert events[-1].finish == "stop"


@pytest.mark.parametrize("lag", [0, 1])
def test_each_row_is_forced_for_itself(lag):
    a = [120, *call("1+1"), *[IGNORED] * 3, *b"aa", END]
    b = [120, *b"bbbbbbbbbb", *call("20*3"), *[IGNORED] * 4, END]
    c = [120, *b"c", END]
    told = run(a, b, c, n=3, lag=lag)
    assert tokens(told[0]) == [120, *call("1+1"), *answer("2"), *b"aa"]
    assert tokens(told[1]) == [120, *b"bbbbbbbbbb", *call("20*3"), *answer("60")]
    assert tokens(told[2]) == [120, *b"c"]


def test_it_works_in_a_thread():
    told = []
    script = [*call("6*7"), *[IGNORED] * 4, END]
    thread = threading.Thread(target=lambda: told.extend(run(script)))
    thread.start()
    thread.join()
    assert tokens(told[0]) == [*call("6*7"), *answer("42")]


def test_a_call_without_an_answer_changes_nothing():
    for expression in ("", "what?", "1/0"):
        script = [*call(expression), *b"ok", END]
        assert tokens(run(script)[0]) == script[:-1]


def test_without_a_tool_nothing_is_forced():
    script = [*call("1+1"), *b"abc", END]
    assert tokens(run(script, tool=None)[0]) == script[:-1]


def test_the_limit_counts_forced_tokens_and_may_fall_among_them():
    script = [*call("1+1"), *[IGNORED] * 9]
    (events,) = run(script, limit=7)
    assert tokens(events) == [*call("1+1"), OUT, ord("2")]
    assert (events[-1].finish, events[-1].forced) == ("length", True)


def test_the_state_machine():
    machine = ToolUse(BYTES, calculate)
    assert [machine.push(token) for token in (STOP, *b"1+1", STOP)] == [False] * 5
    assert machine.next_forced is None  # nothing was begun
    for token in (START, *b"junk", START, *b"1+1", STOP):  # a second start begins anew
        machine.push(token)
    assert list(machine.forced) == answer("2")
    assert [machine.push(token) for token in answer("2")] == [True] * 3
    assert machine.next_forced is None
    assert machine.push(START) is False


def test_a_word_of_the_tool_never_ends_a_row():
    engine = scripted([*call("1+1"), *[IGNORED] * 3, *b"a", END])
    engine.stop_ids = {END, ord("2")}
    request = Request([1, 9], SamplingConfig(max_new_tokens=20, temperature=0), tool=calculate)
    events = [event for events in engine.follow(request) for event in events]
    assert tokens(events) == [*call("1+1"), *answer("2"), *b"a"]
