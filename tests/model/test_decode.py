"""Decoding with the cache is the full forward, whatever the pieces, the rows' lengths and the unused memory."""

import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from errors import KestrelError
from inference.kv_cache import KVCache
from tests.model.tiny import FORMS, NANOCHAT_2026, VOCAB, awake, nanochat, tokens
from tests.numerics import assert_close

LENGTH = 180  # past the short window of 128
every_form = pytest.mark.parametrize("form", FORMS)
pieces = pytest.mark.parametrize(
    "sizes", [[1, 3, 17, LENGTH - 21], [LENGTH - 40, *[1] * 40], [1] * LENGTH], ids=["chunks", "then singly", "singly"]
)


@torch.no_grad()
def full_logits(form: str, row: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return awake(FORMS[form], dtype, device=row.device)(row)


def poison(cache: KVCache) -> KVCache:
    cache.k.fill_(torch.nan)
    cache.v.fill_(torch.nan)
    return cache


def pieces_of(row: torch.Tensor, stood: list[int], new: list[int]) -> torch.Tensor:
    """The next new[b] tokens of each row that stands at stood[b], padded on the right with something else."""
    padded = torch.full((len(new), max(new)), VOCAB - 1, device=row.device)
    for b, n in enumerate(new):
        padded[b, :n] = row[b, stood[b] : stood[b] + n]
    return padded


def decode_in_pieces(model, row, sizes) -> torch.Tensor:
    """The logits after each piece [B, pieces, V], from a cache full of NaN."""
    cache = poison(KVCache(model, row.shape[0]))
    return torch.stack([model.decode(piece, cache) for piece in row.split(sizes, dim=1)], dim=1)


@every_form
@pieces
def test_cached_decode_equals_full_forward(form, sizes, device):
    row = tokens(2, LENGTH, device=device)
    ends = torch.tensor(sizes, device=device).cumsum(0) - 1
    got = decode_in_pieces(awake(FORMS[form], device=device), row, sizes)
    exact, plain = (full_logits(form, row, dtype)[:, ends] for dtype in (torch.float64, torch.float32))
    assert_close(got, exact, plain, form)


@every_form
def test_decode_in_fp64_is_the_full_forward_to_the_last_digits(form):
    row = tokens(2, LENGTH)
    got = decode_in_pieces(awake(FORMS[form], torch.float64), row, [1, 3, 17, 100, *[1] * 59])
    ends = torch.tensor([0, 3, 20, *range(120, LENGTH)])
    torch.testing.assert_close(got, full_logits(form, row, torch.float64)[:, ends], rtol=1e-11, atol=1e-11)


@every_form
def test_decode_in_bf16_errs_no_more_than_the_forward_does(form, device):
    row = tokens(2, LENGTH, device=device)
    got = decode_in_pieces(awake(FORMS[form], torch.bfloat16, device=device), row, [1, 3, 17, 119, *[1] * 40])
    ends = torch.tensor([0, 3, 20, *range(139, LENGTH)], device=device)
    exact, plain = (full_logits(form, row, dtype)[:, ends] for dtype in (torch.float64, torch.bfloat16))
    assert_close(got, exact, plain, form)


@every_form
def test_ragged_batch_equals_each_row_alone(form, device):
    """Rows of different lengths, continued by different counts, one of them zero, then all token by token."""
    row, counts = tokens(4, LENGTH, seed=3, device=device), [[1, 7, 40, 130], [9, 0, 13, 2]]
    model = awake(FORMS[form], device=device)
    cache = poison(KVCache(model, 4))
    stood, got, alone = [0, 0, 0, 0], [], []
    for new in [*counts, *[[1] * 4] * 5]:
        logits = model.decode(pieces_of(row, stood, new), cache, new_tokens=new)
        stood = [s + n for s, n in zip(stood, new)]
        assert cache.lengths.tolist() == stood
        for b in range(4):
            if new[b]:
                got.append(logits[b])
                alone.append(row[b : b + 1, : stood[b]])
    exact, plain = (
        torch.stack([full_logits(form, tokens_so_far, dtype)[0, -1] for tokens_so_far in alone])
        for dtype in (torch.float64, torch.float32)
    )
    assert_close(torch.stack(got), exact, plain, form)


def test_any_ragged_schedule_reaches_the_same_end():
    model = awake(FORMS["2026 with shared heads"], torch.float64)
    row = tokens(3, 60)
    want = model(row)[:, -1]
    for seed in range(10):
        dice, cache, stood = random.Random(seed), KVCache(model, 3), [0, 0, 0]
        logits = torch.zeros_like(want)
        while min(stood) < 60:
            new = [min(dice.choice([0, 1, 1, 2, 5, 11]), 60 - s) for s in stood]
            if max(new) == 0:
                continue
            step = model.decode(pieces_of(row, stood, new), cache, new_tokens=torch.tensor(new))
            stood = [s + n for s, n in zip(stood, new)]
            for b in range(3):
                if new[b] and stood[b] == 60:
                    logits[b] = step[b]
        torch.testing.assert_close(logits, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("form", ["plain with shared heads", "2026", "llama tied with shared heads"])
@torch.no_grad()
def test_greedy_tokens_equal_naive_generation(form):
    model, prompt = awake(FORMS[form]), tokens(1, 20)
    naive = prompt
    for _ in range(128):
        naive = torch.cat([naive, model(naive)[:, -1:].argmax(-1)], dim=1)
    cache, new, cached = KVCache(model, 1), prompt, prompt
    for _ in range(128):
        new = model.decode(new, cache).argmax(-1, keepdim=True)
        cached = torch.cat([cached, new], dim=1)
    assert cached.tolist() == naive.tolist()
    assert len(set(naive[0, 20:].tolist())) > 5, "a constant answer proves nothing"


@every_form
def test_every_layer_has_its_own_cache(form):
    model = awake(FORMS[form])
    cache = KVCache(model, 1)
    model.decode(tokens(1, 9), cache)
    layers = cache.k[:, 0, :9].flatten(1)
    assert len(layers) == model.config.n_layer
    for i in range(len(layers)):
        for j in range(i):
            assert (layers[i] - layers[j]).abs().max() > 0.01


@pytest.mark.parametrize("form", ["plain", "2026", "llama"])
def test_first_prompt_token_reaches_the_answer(form):
    model, prompt = awake(FORMS[form]), tokens(1, 12)
    answers = []
    for first in (1, 2):
        prompt[0, 0] = first
        cache = KVCache(model, 1)
        model.decode(prompt, cache)
        answers.append(model.decode(tokens(1, 1), cache))
    assert (answers[0] - answers[1]).abs().max() > 0.01


@every_form
def test_what_lies_beyond_a_rows_length_changes_nothing(form):
    model, row = awake(FORMS[form]), tokens(2, 30)
    answers = []
    for filling in (0.0, torch.nan, torch.inf):
        cache = KVCache(model, 2)
        cache.k.fill_(filling)
        cache.v.fill_(filling)
        answers.append([model.decode(piece, cache) for piece in row.split([11, 1, 18], dim=1)])
    for other in answers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(answers[0], other))


@pytest.mark.parametrize("form", ["plain", "2026 with shared heads"])
def test_expanded_rows_continue_row_zero_each_for_itself(form):
    model, prompt = awake(FORMS[form], torch.float64), tokens(1, 14)
    one = KVCache(model, 1)
    model.decode(prompt, one)
    three = one.expand(3)
    new = torch.tensor([[4], [5], [6]])
    for _ in range(2):
        got = model.decode(new, three)
    want = model(torch.cat([prompt.expand(3, -1), new, new], dim=1))[:, -1]
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    assert one.lengths.tolist() == [14]
    torch.testing.assert_close(
        model.decode(new[:1], one), model(torch.cat([prompt, new[:1]], 1))[:, -1], rtol=1e-11, atol=1e-11
    )


def test_reset_cache_is_as_good_as_new():
    model, row = awake(FORMS["2026"]), tokens(2, 9)
    cache = KVCache(model, 2)
    first = [model.decode(piece, cache) for piece in row.split([4, 5], dim=1)]
    cache.reset()
    second = [model.decode(piece, cache) for piece in row.split([4, 5], dim=1)]
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_context_limit_is_an_error_that_says_the_limit():
    model = awake(nanochat(sequence_len=32))
    with pytest.raises(KestrelError, match=r"at most 32 tokens.*33 needed"):
        KVCache(model, 1, max_len=33)
    cache = KVCache(model, 1, max_len=20)
    model.decode(tokens(1, 19), cache)
    with pytest.raises(KestrelError, match=r"19 tokens are cached and 2 more do not fit into its 20"):
        model.decode(tokens(1, 2), cache)
    model.decode(tokens(1, 1), cache)  # the refused call left everything as it was, and the last place is usable
    assert cache.lengths.tolist() == [20]
    with pytest.raises(KestrelError, match=r"33 tokens is longer than model.sequence_len=32"):
        model(tokens(1, 33))


def test_cache_takes_the_models_dtype():
    cache = KVCache(awake(FORMS["plain with shared heads"], torch.bfloat16), 3, max_len=10)
    assert cache.k.dtype == cache.v.dtype == torch.bfloat16
    assert cache.k.shape == cache.v.shape == (3, 3, 10, 2, 8)
    assert KVCache((5, 2, 8), 1, 7, torch.float16, "cpu").k.shape == (5, 1, 7, 2, 8)


class NoHostSync(TorchDispatchMode):
    """Refuse the operations that make the host wait for the device."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "repeat_interleave.Tensor")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in str(func) for name in self.WAITING), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", ["2026", "llama"])
def test_decode_never_waits_for_the_device(form):
    model = awake(FORMS[form])
    cache = KVCache(model, 2)
    counts = torch.tensor([5, 3])
    with NoHostSync():
        model.decode(tokens(2, 5), cache, new_tokens=counts)
        model.decode(tokens(2, 1), cache)
        with pytest.raises(AssertionError, match="waits"):
            cache.lengths[0].item()


@pytest.mark.gpu
def test_decode_never_synchronises_a_gpu(device):
    model = awake(nanochat(**NANOCHAT_2026), device=device)
    cache, counts = KVCache(model, 2), torch.tensor([5, 3], device=device)
    prompt, new = tokens(2, 5, device=device), tokens(2, 1, device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.decode(prompt, cache, new_tokens=counts)
        model.decode(new, cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")
