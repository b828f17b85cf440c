"""A chat keeps what was said, in the form chat models know, and survives commands, Ctrl-C and its own length."""

import io
import os
import signal
import sys

import pytest

from errors import KestrelError
from inference.chat import Chat, run_chat
from inference.sampling import SamplingConfig
from tests.inference.scripted import BOS, BYTES, END, scripted

USER, USER_END, ASSISTANT = (
    BYTES.encode_special(f"<|{name}|>") for name in ("user_start", "user_end", "assistant_start")
)
GREEDY = SamplingConfig(temperature=0)


def turn(said: bytes, answer: bytes) -> list[int]:
    return [USER, *said, USER_END, ASSISTANT, *answer, END]


def talk(engine, lines: str, capsys, monkeypatch, sampling=GREEDY, first=None) -> tuple[str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    run_chat(engine, sampling, first)
    return capsys.readouterr()


def say(chat: Chat, text: str) -> str:
    return "".join(piece for pieces in chat.answer(text) for piece in pieces)


def test_a_conversation_grows_in_the_form_chat_models_know():
    engine = scripted([*b"hi", END])
    chat = Chat(engine, GREEDY)
    assert say(chat, "yo") == "hi"
    assert chat.ids == [BOS, *turn(b"yo", b"hi")]
    assert say(chat, "and?<|bos|>") == "hi"  # typed special tokens stay text
    assert chat.ids == [BOS, *turn(b"yo", b"hi"), *turn(b"and?<|bos|>", b"hi")]
    chat.clear()
    assert chat.ids == [BOS]
    assert engine.pool.n_held == 0


def test_a_stop_text_ends_an_answer():
    chat = Chat(scripted([*b"one. two.", END]), GREEDY, stop=(". ",))
    assert say(chat, "count") == "one"
    assert chat.ids[-5:] == [*b"ne. ", END]  # what was said stays said


def test_what_was_read_before_is_not_read_again():
    engine = scripted([*b"yes", END], page=4)
    chat = Chat(engine, GREEDY)
    say(chat, "once upon a time")
    say(chat, "go on")
    prompts = [rows[0] for rows in engine.model.fed if len(rows[0]) > 1]
    assert prompts[0] == [BOS, USER, *b"once upon a time", USER_END, ASSISTANT]  # 20 tokens are 5 pages
    assert prompts[1] == [*b"yes", END, USER, *b"go on", USER_END, ASSISTANT]


def test_the_calculator_answers_in_a_chat():
    call = [BYTES.encode_special("<|python_start|>"), *b"6*7", BYTES.encode_special("<|python_end|>")]
    chat = Chat(scripted([*call, *b"????", *b" 42!", END]), GREEDY)
    assert say(chat, "6*7?").endswith("<|output_start|>42<|output_end|> 42!")


def test_turns_draw_anew_but_reproducibly():
    told = []
    for _ in range(2):
        chat = Chat(scripted(), SamplingConfig(max_new_tokens=5, temperature=1, seed=3))
        told.append([say(chat, "a"), say(chat, "a")])
    assert told[0] == told[1]
    assert told[0][0] != told[0][1]


def test_commands(capsys, monkeypatch):
    lines = "one\n/temperature 0.5\n/topk 7\n/temperature hot\n/topk -1\n/nonsense\n\n/clear\ntwo\n/quit\nnever"
    engine = scripted([*b"A", END])
    out, err = talk(engine, lines, capsys, monkeypatch)
    assert out == "A\nA\n"
    prompts = [rows[0] for rows in engine.model.fed if len(rows[0]) > 1]
    assert prompts == [[BOS, USER, *b"one", USER_END, ASSISTANT], [BOS, USER, *b"two", USER_END, ASSISTANT]]
    for says in (
        "temperature: 0.5",
        "top_k: 7",
        "wants a number, got 'hot'",
        "top_k must be positive",
        "/clear: a new",
    ):
        assert says in err
    assert err.count("tokens/s, first token after") == 2


def test_the_prompt_is_said_first_and_the_end_of_the_input_is_the_end(capsys, monkeypatch):
    out, _ = talk(scripted([*b"A", END]), "two\n", capsys, monkeypatch, first="one")
    assert out == "A\nA\n"
    assert talk(scripted(), "", capsys, monkeypatch)[0] == ""


def test_ctrl_c_ends_the_answer_and_keeps_the_chat(capsys, monkeypatch):
    engine = scripted(b"abcdefgh" * 9, reuse_prefixes=False)
    decode = engine.model.decode

    def interrupted(tokens, cache, **options):
        if engine.model.calls == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return decode(tokens, cache, **options)

    monkeypatch.setattr(engine.model, "decode", interrupted)
    sampling = SamplingConfig(temperature=0, max_new_tokens=20)
    before = signal.getsignal(signal.SIGINT)
    out, err = talk(engine, "one\ntwo\n", capsys, monkeypatch, sampling)
    first, second = out.splitlines()
    assert first == "abcde"
    assert len(second) == 20
    assert "interrupted" in err
    assert signal.getsignal(signal.SIGINT) is before
    prompts = [rows[0] for rows in engine.model.fed if len(rows[0]) > 1]
    assert prompts[1] == [BOS, *turn(b"one", b"abcde"), USER, *b"two", USER_END, ASSISTANT]
    assert engine.pool.n_held == 0


def test_a_chat_that_is_too_long_says_so_and_can_be_cleared(capsys, monkeypatch):
    out, err = talk(scripted([*b"A", END]), f"{'x' * 96}\nb\n", capsys, monkeypatch)
    assert out == "A\n"
    assert "the chat would have 100 tokens and this model sees at most 100 at once: /clear begins a new one" in err


def test_several_samples_make_no_chat():
    with pytest.raises(KestrelError, match="num_samples=3"):
        run_chat(scripted(), SamplingConfig(num_samples=3))
