"""The engine generates what full recomputation generates, each sample for itself, and shows it as early as it can."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tokenizer import TokenizerConfig, train_tokenizer
from errors import KestrelError
from inference import sampling as sampling_module
from inference import stopwatch as stopwatch_module
from inference.engine import Engine, cast_weights
from inference.sampling import SamplingConfig, recent_tokens
from inference.simple import generate_naive, sample_text
from inference.stopwatch import Stopwatch
from inference.text import TextStream
from tests.inference.scripted import BOS, BYTES, END, Scripted, scripted
from tests.model.tiny import FORMS, awake, tokens

GREEDY = SamplingConfig(max_new_tokens=20, temperature=0)
ANYTHING = SamplingConfig(max_new_tokens=20, temperature=1.0, top_k=0)


def real(form: str, dtype=torch.float32) -> Engine:
    return Engine(awake(FORMS[form], dtype, vocab_size=BYTES.vocab_size), BYTES)


def rows_of(columns) -> list[list[int]]:
    """Columns as they come → the tokens of each sample."""
    return [[token for token in row if token is not None] for row in zip(*columns)]


# The same tokens as without a cache.


@pytest.mark.parametrize("form", ["plain", "plain with shared heads", "2026", "llama", "llama tied with shared heads"])
def test_greedy_tokens_equal_naive_generation(form):
    engine, prompt = real(form), tokens(20).tolist()
    engine.stop_ids = set()
    sampling = SamplingConfig(max_new_tokens=128, temperature=0)
    got = rows_of(engine.generate(prompt, sampling))
    assert got == generate_naive(engine, prompt, sampling)
    assert len(got[0]) == 128
    assert len(set(got[0])) > 5, "a constant answer proves nothing"


@pytest.mark.parametrize("form", ["plain", "2026", "llama"])
def test_every_sample_of_a_batch_equals_that_sample_alone(form, monkeypatch):
    """Naive generation runs samples one by one; a short penalty window shows whether the history moves on."""
    monkeypatch.setattr(sampling_module, "PENALTY_WINDOW", 7)
    engine, prompt = real(form), tokens(9).tolist()
    engine.stop_ids = {*range(0, 265, 8)}  # some samples end early, some do not
    sampling = SamplingConfig(
        max_new_tokens=40, temperature=1.2, top_k=60, top_p=0.95, repetition_penalty=1.5, num_samples=5
    )
    got = rows_of(engine.generate(prompt, sampling))
    assert got == generate_naive(engine, prompt, sampling)
    assert len({tuple(row) for row in got}) == 5
    assert len({len(row) for row in got}) > 1


@pytest.mark.parametrize("form", ["plain", "2026", "llama"])
def test_first_prompt_token_changes_the_answer(form):
    engine, prompt = real(form), tokens(12).tolist()
    answers = [rows_of(engine.generate([first, *prompt], GREEDY)) for first in (1, 2)]
    assert answers[0] != answers[1]


def test_each_token_is_fed_once_and_the_prompt_for_all_samples_together():
    engine = scripted(b"abc", b"abd", b"abe")
    list(engine.generate([BOS, 7, 9], dataclasses.replace(GREEDY, max_new_tokens=3, num_samples=3)))
    assert engine.model.fed == [[[BOS, 7, 9]], [[97]] * 3, [[98]] * 3]


# Samples.


def test_first_tokens_of_samples_are_drawn_independently():
    first = next(scripted(max_rows=200).generate([1], dataclasses.replace(ANYTHING, num_samples=200)))
    assert len(first) == 200
    drawn = {token for token in first if token is not None}
    # 200 of 265 equally likely tokens leave 265 · (1 − 1/265)^200 = 124 ± 5 unseen
    assert 141 - 30 < len(drawn) < 141 + 30


def test_a_sample_does_not_depend_on_how_many_there_are():
    three, eight = (rows_of(scripted().generate([1], dataclasses.replace(ANYTHING, num_samples=n))) for n in (3, 8))
    assert eight[:3] == three


def test_seeds_reproduce_and_differ():
    answers = {}
    for seed in (0, 1, 2):
        sampling = dataclasses.replace(ANYTHING, num_samples=2, seed=seed)
        answers[seed], again = (rows_of(real("2026").generate([3, 4], sampling)) for _ in range(2))
        assert answers[seed] == again
    assert answers[0] != answers[1] != answers[2]


def test_repetition_penalty_makes_greedy_move_on():
    engine = scripted([5, 5, 5, 5])
    engine.model.decode = lambda tokens, cache, new_tokens=None: torch.tensor(
        [[0.0] * 3 + [1.0, 1.5, 2.0] + [0.0] * 259] * len(tokens)
    )
    sampling = SamplingConfig(max_new_tokens=3, temperature=0, repetition_penalty=3.0)
    assert rows_of(engine.generate([1], sampling)) == [[5, 4, 3]]
    assert rows_of(engine.generate([4], sampling)) == [[5, 3, 5]]  # all three are known now: 2/3, 1.5/3, 1/3


def test_only_the_newest_tokens_count_as_repeated_and_no_stop_tokens():
    window = sampling_module.PENALTY_WINDOW
    assert window == 512
    assert recent_tokens([BOS, *range(5), END], {BOS, END}) == [-1] * (window - 7) + [-1, 0, 1, 2, 3, 4, -1]
    assert recent_tokens(list(range(600)), set()) == list(range(88, 600))


# Where it ends.


def test_a_sample_ends_where_a_document_or_an_answer_ends():
    engine = scripted([7, 1, 2, 3, 4], [7, END, 8, 8, 8], [7, 5, BOS, 8, 8])
    columns = list(engine.generate([BOS], dataclasses.replace(GREEDY, max_new_tokens=5, num_samples=3)))
    assert columns == [[7, 7, 7], [1, None, 5], [2, None, None], [3, None, None], [4, None, None]]


def test_nothing_is_computed_once_all_samples_have_ended():
    engine = scripted([7, 1, BOS, 9, 9], [7, END, 9, 9, 9])
    columns = list(engine.generate([BOS], dataclasses.replace(GREEDY, max_new_tokens=5, num_samples=2)))
    assert columns == [[7, 7], [1, None]]
    assert engine.model.calls == 3
    assert list(scripted([BOS]).generate([1], GREEDY)) == []


def test_the_last_token_is_not_fed_back():
    engine = scripted(b"abcdef")
    assert rows_of(engine.generate([1], dataclasses.replace(GREEDY, max_new_tokens=4))) == [[*b"abcd"]]
    assert engine.model.calls == 4


def test_an_empty_prompt_is_the_beginning_of_a_document():
    engine = scripted(b"ab")
    list(engine.generate([], dataclasses.replace(GREEDY, max_new_tokens=2)))
    assert engine.model.fed[0] == [[BOS]]
    assert engine.encode("") == [BOS]
    assert engine.encode("a<|bos|>") == [BOS, *b"a<|bos|>"]  # typed special tokens stay text


def test_prompt_and_answer_must_fit_the_context_before_any_work():
    engine = scripted()
    for prompt, n_new, says in (
        (
            [1] * 81,
            20,
            "81 tokens and max_new_tokens is 20.* at most 100 .*max_new_tokens=19 or fewer.* shorter prompt",
        ),
        ([1] * 100, 1, "100 tokens.* at most 100 .*shorten the prompt to 99 tokens"),
        ([1] * 500, None, "500 tokens.* at most 100 .*shorten the prompt to 99 tokens"),
        ([1, 265], 1, "token 265.* 0 to 264"),
        ([-1], 1, "token -1"),
    ):
        with pytest.raises(KestrelError, match=says):
            engine.generate(prompt, SamplingConfig(max_new_tokens=n_new))
    assert engine.model.calls == 0


def test_the_whole_context_can_be_used():
    for form in ("2026", "llama"):
        engine = real(form)
        engine.stop_ids = set()
        limit = engine.model.context_len
        sampling = SamplingConfig(max_new_tokens=limit - 150, temperature=0)
        got = rows_of(engine.generate(tokens(150).tolist(), sampling))
        assert got == generate_naive(engine, tokens(150).tolist(), sampling)
        assert len(got[0]) == limit - 150


def test_without_a_number_it_tells_what_fits_and_at_most_512():
    unlimited = SamplingConfig(temperature=0)
    engine = scripted([1] * 1000)
    assert len(list(engine.generate([1] * 30, unlimited))) == 70
    model = Scripted([1] * 1000)
    model.context_len = 1000
    engine = Engine(model, BYTES)
    assert len(list(engine.generate([1] * 30, unlimited))) == 512


def test_a_model_with_another_vocabulary_is_refused():
    with pytest.raises(KestrelError, match="75 tokens and the tokenizer 265"):
        Engine(awake(FORMS["plain"]), BYTES)


def test_cache_is_in_the_models_dtype():
    engine = real("plain", torch.bfloat16)
    assert engine.cache.k.dtype == engine.cache.v.dtype == torch.bfloat16


@pytest.mark.parametrize("form", ["2026 with shared heads", "llama tied with shared heads"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_cast_once_give_the_same_logits(form, dtype):
    model, row = awake(FORMS[form], dtype), tokens(2, 30)
    with torch.no_grad():
        before = model(row)
        assert cast_weights(model)(row).equal(before)
    assert {p.dtype for p in model.parameters() if p.dim() == 2} == {dtype}
    assert {p.dtype for p in model.parameters() if p.dim() == 1} <= {torch.float32}


# Text as it comes.


def test_columns_come_before_the_next_is_computed():
    engine = scripted([1] * 20)
    for n, _ in enumerate(engine.generate([1], GREEDY), start=1):
        assert engine.model.calls == n


BPE = train_tokenizer(
    TokenizerConfig(name="bpe", vocab_size=300), ["Zwölf Boxkämpfer jagen Viktor 🦊🦊 quer über den Sylter Deich."] * 3
)


def pieces(ids: list[int], tokenizer) -> list[str]:
    stream = TextStream(tokenizer)
    return [*[stream.push(token) for token in ids], stream.finish()]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 255)) | st.text().map(lambda text: list(text.encode("utf-8", "replace"))))
def test_pieces_together_are_the_full_decode(ids):
    assert "".join(pieces(ids, BYTES)) == BYTES.decode(ids)


@given(st.lists(st.integers(0, BPE.vocab_size - 1)))
def test_pieces_of_any_tokens_together_are_the_full_decode(ids):
    assert "".join(pieces(ids, BPE)) == BPE.decode(ids)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_every_character_comes_with_its_last_byte(text):
    stream, seen = TextStream(BYTES), ""
    for i, character in enumerate(text):
        for byte in character.encode():
            assert seen == text[:i]
            seen += stream.push(byte)
        assert seen == text[: i + 1]
    assert stream.finish() == ""


def test_an_emoji_over_several_tokens_comes_whole_and_a_cut_one_is_marked():
    assert pieces([*"a🦊b".encode()], BYTES) == ["a", "", "", "", "🦊", "b", ""]
    assert pieces([*"a🦊".encode()][:-1], BYTES) == ["a", "", "", "", "�"]
    assert pieces([0xF0, 0x9F, 97], BYTES) == ["", "", "�a", ""]
    assert pieces([97, END, 98], BYTES) == ["a", "<|assistant_end|>", "b", ""]


def test_stopwatch_counts_what_passes(monkeypatch):
    clock = iter([10.0, 12.0, 13.0, 16.0])
    monkeypatch.setattr(stopwatch_module.time, "perf_counter", lambda: next(clock))
    stopwatch = Stopwatch()
    columns = [[1, 2], [3, None], [4, None]]
    assert list(stopwatch.watch(columns)) == columns
    assert (stopwatch.n_tokens, stopwatch.first_token_s, stopwatch.tokens_per_s) == (4, 2.0, 2 / 4.0)


@pytest.mark.parametrize("columns", [[], [[1]]])
def test_stopwatch_of_a_short_story_has_no_rate(columns):
    stopwatch = Stopwatch()
    list(stopwatch.watch(columns))
    assert stopwatch.tokens_per_s == 0
    assert stopwatch.first_token_s >= 0


# Samples of a training run.


def test_sample_text_is_the_greedy_continuation_of_each_prompt():
    model = awake(FORMS["2026"], vocab_size=BYTES.vocab_size)
    texts = sample_text(model, BYTES, ["Once", ""], max_new_tokens=30)
    for prompt, text in zip(["Once", ""], texts):
        engine = Engine(model, BYTES)
        ids = generate_naive(engine, engine.encode(prompt), SamplingConfig(max_new_tokens=30, temperature=0))[0]
        assert text == BYTES.decode(ids)
        assert len(ids) > 3
    assert texts == sample_text(model, BYTES, ["Once", ""], max_new_tokens=30)


def test_sample_text_fits_itself_to_a_short_context():
    model = Scripted(b"x" * 200)
    assert sample_text(model, BYTES, ["a" * 96], max_new_tokens=64) == ["xxx"]
    model = Scripted(b"x" * 200)
    assert len(sample_text(model, BYTES, ["a" * 500])) == 1


def test_sample_text_can_draw_several_samples():
    texts = sample_text(Scripted(), BYTES, ["a", "b"], max_new_tokens=9, num_samples=2, temperature=1.0, seed=3)
    assert len(texts) == 4
    assert texts[0] != texts[1]
    assert texts[:2] == texts[2:]  # the script heeds no prompt, and the draws are those of samples 0 and 1 again
    with pytest.raises(KestrelError, match="temperature"):
        sample_text(Scripted(), BYTES, ["a"], temperature=-1)


def test_generation_leaves_no_gradient_and_the_random_state_alone():
    model, state = awake(FORMS["plain"], vocab_size=BYTES.vocab_size), torch.get_rng_state()
    sample_text(model, BYTES, ["a"], temperature=1.0)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.get_rng_state().equal(state)
