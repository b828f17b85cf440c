"""What a reader sees: text while it is told, whole characters only, and the prompt whatever it was made of."""

import os
import sys

import pytest

from errors import KestrelError
from inference import console
from inference.console import is_piped, read_prompt, tell
from inference.engine import Engine
from inference.sampling import SamplingConfig
from tests.inference.scripted import BYTES, END, Scripted, scripted

GREEDY = SamplingConfig(max_new_tokens=30, temperature=0)


class Watched:
    """stdout that remembers how far the model was when each piece of text arrived."""

    encoding = "utf-8"

    def __init__(self, model: Scripted) -> None:
        self.model, self.arrived, self.flushed = model, [], ""

    def write(self, text: str) -> None:
        self.arrived.append((self.model.calls, text))

    def flush(self) -> None:
        self.flushed = self.text

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.arrived)


def told(engine: Engine, prompt: str, sampling: SamplingConfig, monkeypatch, **options) -> Watched:
    out = Watched(engine.model)
    monkeypatch.setattr(sys, "stdout", out)
    tell(engine, prompt, sampling, **options)
    return out


def test_text_arrives_while_it_is_told(monkeypatch):
    out = told(scripted([*b"once there was", END]), "And ", GREEDY, monkeypatch)
    assert out.arrived[0] == (0, "And ")  # the prompt is there before anything is computed
    assert out.arrived[1:5] == [(1, "o"), (2, "n"), (3, "c"), (4, "e")]
    assert out.flushed == out.text


def test_a_stream_is_the_full_decode_byte_for_byte_and_never_half_a_character(monkeypatch):
    story = "Füchse 🦊🦊 und あ.".encode() + "🦊".encode()[:3]
    out = told(scripted([*story, END]), "«é»", GREEDY, monkeypatch)
    assert out.text == "«é»" + story.decode(errors="replace") + "\n"
    shown = [text for _, text in out.arrived]
    assert shown.count("🦊") == 2
    assert "".join(shown).count("�") == 1  # the fox that never came whole
    assert shown[-2:] == ["�", "\n"]


def test_without_streaming_the_text_comes_at_the_end(monkeypatch):
    engine = scripted([*b"abc", END])
    out = told(engine, "> ", GREEDY, monkeypatch, stream=False)
    assert out.text == "> abc\n"
    assert {calls for calls, text in out.arrived if text} == {4}


def test_several_samples_have_titles_and_the_first_is_live(monkeypatch):
    engine = scripted([97, 98, END, 1], [97, 99, 100, END])
    sampling = SamplingConfig(max_new_tokens=30, temperature=0, num_samples=2)
    out = told(engine, "x", sampling, monkeypatch)
    assert out.text == "--- sample 1 of 2 ---\nxab\n--- sample 2 of 2 ---\nxacd\n"
    assert (2, "b") in out.arrived


def test_ctrl_c_ends_the_line_and_shows_what_was_told(monkeypatch, capsys):
    engine = scripted(b"abcdefgh", b"axxxxxxx")
    decode = engine.model.decode

    def interrupted(tokens, cache, **options):
        if engine.model.calls == 3:
            raise KeyboardInterrupt
        return decode(tokens, cache, **options)

    monkeypatch.setattr(engine.model, "decode", interrupted)
    assert not tell(engine, ">", SamplingConfig(max_new_tokens=8, temperature=0, num_samples=2))
    out, err = capsys.readouterr()
    assert out == "--- sample 1 of 2 ---\n>abc\n--- sample 2 of 2 ---\n>axx\n"
    assert err.startswith("6 tokens")
    assert err.endswith("interrupted\n")


def test_a_stop_text_ends_each_sample_for_itself_and_is_not_shown(monkeypatch):
    """Whatever tokens it lies in; what only began like one is shown."""
    engine = scripted([*b"ab, the e", *b"nd of it", END], [*b"athe eel", END])
    sampling = SamplingConfig(max_new_tokens=30, temperature=0, num_samples=2)
    out = told(engine, "x", sampling, monkeypatch, stop=("zz", "the end"))
    assert out.text == "--- sample 1 of 2 ---\nxab, \n--- sample 2 of 2 ---\nxathe eel\n"
    assert engine.pool.n_held == 0


def test_a_prompt_that_does_not_fit_prints_nothing(capsys):
    with pytest.raises(KestrelError, match="at most 100"):
        tell(scripted(), "long " * 30, GREEDY)
    assert capsys.readouterr() == ("", "")


def test_what_a_terminal_cannot_show_is_a_question_mark(monkeypatch):
    engine = scripted([*"né🦊".encode(), END])
    out = Watched(engine.model)
    out.encoding = "latin-1"
    monkeypatch.setattr(sys, "stdout", out)
    tell(engine, "あ", GREEDY)
    assert out.text == "?né?\n"


# Where the prompt comes from.


@pytest.fixture
def stdin(monkeypatch):
    """A pipe in place of standard input; returns its other end."""
    console.read_stdin.cache_clear()
    reading, writing = os.pipe()
    with os.fdopen(reading) as replaced, os.fdopen(writing, "wb") as other_end:
        monkeypatch.setattr(sys, "stdin", replaced)
        yield other_end
    console.read_stdin.cache_clear()


@pytest.mark.parametrize(
    ("piped", "prompt"),
    [(b"a b\n", "a b"), (b" a\n\n", " a\n"), (b"a\r\n", "a"), (b"", ""), ("é🦊".encode(), "é🦊"), (b"\xff", "�")],
)
def test_what_is_piped_in_is_the_prompt(stdin, piped, prompt):
    stdin.write(piped)
    stdin.close()
    assert read_prompt(None) == prompt
    assert read_prompt(None) == prompt  # again, for the next job of a sweep
    assert read_prompt("-") == prompt


def test_a_given_prompt_leaves_standard_input_alone(stdin):
    stdin.write(b"next line")
    stdin.close()
    assert read_prompt("mine") == "mine"
    assert sys.stdin.read() == "next line"


def test_a_pipe_that_stays_silent_is_not_waited_for(stdin, monkeypatch, capsys):
    monkeypatch.setattr(console, "PATIENCE_S", 0.01)
    assert read_prompt(None) == ""
    assert "prompt=- would wait" in capsys.readouterr().err


def test_no_standard_input_is_no_prompt(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert not is_piped()
    assert read_prompt(None) == ""
    with pytest.raises(KestrelError, match="closed"):
        read_prompt("-")
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        assert not is_piped()


def test_a_file_is_a_prompt(tmp_path, monkeypatch):
    console.read_stdin.cache_clear()
    (tmp_path / "prompt.txt").write_text("from a file\n")
    with open(tmp_path / "prompt.txt") as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert read_prompt(None) == "from a file"
    console.read_stdin.cache_clear()


def test_an_argument_that_is_not_utf8_is_marked():
    assert read_prompt(b"caf\xe9".decode("utf-8", "surrogateescape")) == "caf�"
    assert BYTES.encode(read_prompt(b"caf\xe9".decode("utf-8", "surrogateescape")))[:3] == [*b"caf"]
