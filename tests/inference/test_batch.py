"""A file of prompts becomes a file of answers, once each, however often it is stopped."""

import fcntl
import json
from pathlib import Path

import pytest

from errors import KestrelError
from inference.batch import run_batch
from inference.engine import Engine
from inference.sampling import SamplingConfig
from tests.inference.scripted import BYTES, END, scripted
from tests.model.tiny import FORMS, awake

DRAWN = SamplingConfig(max_new_tokens=12, temperature=1.0)


def real() -> Engine:
    return Engine(awake(FORMS["llama"], vocab_size=BYTES.vocab_size), BYTES, max_rows=3)


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": f"number {i}", "id": f"n{i}", "max_new_tokens": i + 1} for i in range(12)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(path: Path) -> dict[int, dict]:
    answers = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    assert len({answer["line"] for answer in answers}) == len(answers)
    return {answer["line"]: answer for answer in answers}


def test_every_line_is_answered(source, tmp_path, capsys):
    target = tmp_path / "answers.jsonl"
    assert run_batch(real(), DRAWN, source, target)
    answers = read(target)
    assert sorted(answers) == list(range(1, 13))
    for number, answer in answers.items():
        (sample,) = answer["samples"]
        assert (answer["id"], answer["prompt"]) == (f"n{number - 1}", f"number {number - 1}")
        assert sample["finish"] in ("stop", "length")
        assert sample["n_tokens"] == number or sample["finish"] == "stop"
    assert len({answer["samples"][0]["text"][:3] for answer in answers.values()}) > 3  # draws of their own
    assert "tokens/s, first token after" in capsys.readouterr().err


def test_it_goes_on_where_it_stopped_and_nothing_shows(source, tmp_path, monkeypatch, capsys):
    whole, target = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    run_batch(real(), DRAWN, source, whole)
    for n_steps in (9, 3, 14):
        engine = real()
        step, left = engine.step, [n_steps]

        def interrupted():
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return step()

        monkeypatch.setattr(engine, "step", interrupted)
        assert not run_batch(engine, DRAWN, source, target)
        assert "the same command goes on" in capsys.readouterr().err
        with target.open("ab") as file:  # torn in the middle of a character
            file.write(b'{"line": 12, "prompt": "n\xc3')
    assert run_batch(real(), DRAWN, source, target)
    assert read(target) == read(whole)
    before = target.read_bytes()
    assert run_batch(scripted(), DRAWN, source, target)  # nothing left to do
    assert target.read_bytes() == before


def test_a_line_may_want_something_else(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    wants = [
        {"prompt": "a", "temperature": 0, "num_samples": 2},
        {"prompt": "b", "temperature": 0, "stop": ["cd"]},
        {"prompt": "c", "temperature": 0, "logprobs": 2, "max_new_tokens": 2},
        {"prompt": "d" * 200},
        {"prompt": "line\u2028break é", "temperature": 0},
    ]
    source.write_text("\n\n".join(json.dumps(want, ensure_ascii=False) for want in wants), encoding="utf-8")
    run_batch(scripted([*b"abcdef", END], max_rows=1), SamplingConfig(), source, target)
    answers = read(target)
    assert sorted(answers) == [1, 3, 5, 7, 9]
    assert [sample["text"] for sample in answers[1]["samples"]] == ["abcdef"] * 2
    assert answers[3]["samples"] == [{"text": "ab", "finish": "stop", "n_tokens": 4}]
    (sample,) = answers[5]["samples"]
    assert sample["tokens"] == [*b"ab"]
    assert [len(top) for top in sample["top_logprobs"]] == [2, 2]
    assert sample["top_logprobs"][0][0] == [97, sample["logprobs"][0]]
    assert "201 tokens, but this model sees at most 100" in answers[7]["error"]
    assert answers[9]["prompt"] == "line\u2028break é"


def test_stop_texts_are_for_lines_that_name_none(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    wants = [{"prompt": "a"}, {"prompt": "b", "stop": ["e"]}, {"prompt": "c", "stop": []}]
    source.write_text("".join(json.dumps(want) + "\n" for want in wants))
    run_batch(scripted([*b"abcdef", END], max_rows=1), SamplingConfig(temperature=0), source, target, stop=("cd",))
    assert [answer["samples"][0]["text"] for answer in read(target).values()] == ["ab", "abcd", "abcdef"]


def test_every_answer_names_its_model_and_none_goes_on_with_anothers(source, tmp_path):
    target = tmp_path / "answers.jsonl"
    run_batch(real(), DRAWN, source, target, model="fox step 5")
    whole = target.read_text().splitlines(keepends=True)
    assert {json.loads(line)["model"] for line in whole} == {"fox step 5"}
    target.write_text("".join(whole[:5]))
    with pytest.raises(
        KestrelError, match=r"begun by fox step 5, and this is owl step 5: name another output=, .*any_mo"
    ):
        run_batch(scripted(), DRAWN, source, target, model="owl step 5")
    assert target.read_text() == "".join(whole[:5])
    run_batch(real(), DRAWN, source, target, model="owl step 5", any_model=True)
    assert [json.loads(line)["model"][:3] for line in target.read_text().splitlines()] == ["fox"] * 5 + ["owl"] * 7


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 must be an object with a text as"),
        ('{"text": "a"}', "line 2 must be an object with a text as"),
        ('{"prompt": "a", "temprature": 1}', "line 2 has the key 'temprature'; known keys: .*temperature"),
        ('{"prompt": "a", "temperature": -1}', "line 2: temperature must be .*got -1"),
        ('{"prompt": "a", "temperature": "hot"}', "line 2: temperature must be a number, got 'hot'"),
        ('{"prompt": "a", "top_k": 1.5}', "line 2: top_k must be a number, got 1.5"),
        ('{"prompt": "a", "stop": "x"}', "line 2: stop must be a list"),
        ('{"prompt": "a", "stop": [""]}', "line 2: stop must be a list of texts that are not empty"),
        ('{"prompt": "a", "logprobs": 99}', "line 2: logprobs must be between 0 and 20"),
    ],
)
def test_a_line_that_cannot_be_meant_is_refused_before_anything_is_done(line, says, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(f'{{"prompt": "fine"}}\n{line}\n')
    engine = scripted()
    with pytest.raises(KestrelError, match=says):
        run_batch(engine, SamplingConfig(), source, target)
    assert not target.exists()
    assert engine.model.calls == 0


def test_an_output_that_answers_something_else_is_left_alone(source, tmp_path):
    with pytest.raises(KestrelError, match=r"cannot read .*No such file"):
        run_batch(scripted(), SamplingConfig(), tmp_path / "nothing", tmp_path / "out")
    for text in ('{"line": 1, "prompt": "other"}\n', "not JSON\n", '{"line": 99, "prompt": "a"}\n', "[]\n"):
        target = tmp_path / "out.jsonl"
        target.write_text(text)
        with pytest.raises(KestrelError, match="something else than answers to this input: name another output="):
            run_batch(scripted(), SamplingConfig(), source, target)
        assert target.read_text() == text


@pytest.mark.parametrize("content", ["my only notes", "one\ntwo", '{"prompt": "a"}', '{"line": 1}\nrest'])
def test_a_file_that_is_no_output_is_left_as_it_is(source, tmp_path, content):
    target = tmp_path / "notes.txt"
    target.write_text(content)
    with pytest.raises(KestrelError, match=r"notes\.txt .*name another output="):
        run_batch(real(), DRAWN, source, target)
    assert target.read_text() == content


def test_the_input_is_no_output(tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text('{"prompt": "a"}')
    with pytest.raises(KestrelError, match=r"one\.jsonl is the input as well"):
        run_batch(real(), DRAWN, path, path)
    assert path.read_text() == '{"prompt": "a"}'


def test_two_commands_do_not_write_to_one_file(source, tmp_path):
    target = tmp_path / "answers.jsonl"
    with target.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(KestrelError, match=r"answers\.jsonl is being written by another process"):
            run_batch(real(), DRAWN, source, target)
    assert run_batch(real(), DRAWN, source, target)


def test_half_a_letter_is_written_as_it_came(tmp_path):
    source, target = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    source.write_text('{"prompt": "x", "id": "\\ud800", "max_new_tokens": 2, "logprobs": null}\n')
    assert run_batch(real(), DRAWN, source, target)
    assert json.loads(target.read_text())["id"] == "\ud800"
    assert run_batch(real(), DRAWN, source, target), "and read again"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "x", "id": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 1 is not JSON"),
        ('{"prompt": "x", "num_samples": 20000}', "num_samples must be at most 4096, got 20000"),
        ('{"prompt": "x", "top_k": 100000000000000000000}', "top_k must be .*got 1000"),
        ('{"prompt": "x", "repetition_penalty": 1e300}', "repetition_penalty must be between 0.01 and 100"),
    ],
    ids=["deep", "num_samples", "top_k", "penalty"],
)
def test_a_line_beyond_all_bounds_is_refused(line, says, tmp_path):
    source = tmp_path / "prompts.jsonl"
    source.write_text(line)
    with pytest.raises(KestrelError, match=says):
        run_batch(real(), DRAWN, source, tmp_path / "answers.jsonl")
