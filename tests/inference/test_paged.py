"""Reading in pages is the full forward: whole, in pieces or token by token, whatever the pages and what is unused."""

import random

import pytest
import torch

from inference.block_pool import BlockPool
from inference.paged_cache import CacheRows, PagedCache
from inference.prefill import Prefill
from inference.request import Request
from inference.sampling import SamplingConfig
from tests.model.test_decode import NoHostSync
from tests.model.tiny import FORMS, awake, tokens
from tests.numerics import assert_close

LENGTH = 150  # past the short window of 128
PAGE = 16
every_form = pytest.mark.parametrize("form", FORMS)
SIZES = {"whole": [LENGTH], "chunks": [1, 3, 17, LENGTH - 21], "then singly": [LENGTH - 20, *[1] * 20]}


def poison(cache: PagedCache, fill: float = torch.nan) -> None:
    """What nobody has written to would show; codes are the largest there are, or NaN."""
    for pages in (cache.k, cache.v):
        if cache.scales:
            pages.view(torch.uint8).fill_(127)
        else:
            pages.fill_(fill)
    for scales in cache.scales.values():
        scales.fill_(fill)


def new_rows(model, n: int, fill: float = torch.nan, seed: int = 0, quant_cache: str | None = None) -> CacheRows:
    """Rows whose pages lie in any order, in a cache full of `fill`."""
    per_row = -(-model.context_len // PAGE)
    cache = PagedCache(model, n * per_row, PAGE, form=quant_cache)
    poison(cache, fill)
    rows, blocks = cache.rows(n), list(range(1, n * per_row + 1))
    random.Random(seed).shuffle(blocks)
    for b in range(n):
        rows.begin(b, blocks[b * per_row : (b + 1) * per_row], 0, {})
    return rows


@torch.no_grad()
def full_logits(form, row, dtype):
    return awake(FORMS[form], dtype, device=row.device)(row)


@every_form
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_paged_decode_equals_full_forward(form, sizes, device):
    row, model = tokens(2, LENGTH, device=device), awake(FORMS[form], device=device)
    cache = new_rows(model, 2)
    got = torch.stack([model.decode(piece, cache) for piece in row.split(sizes, dim=1)], dim=1)
    ends = torch.tensor(sizes).cumsum(0) - 1
    exact, plain = (full_logits(form, row, dtype)[:, ends] for dtype in (torch.float64, torch.float32))
    assert_close(got, exact, plain, form)


@pytest.mark.parametrize("form", ["plain with shared heads", "2026", "llama"])
def test_ragged_rows_equal_each_row_alone(form, device):
    """Rows of different lengths, continued by different counts, some of them zero."""
    model, row = awake(FORMS[form], torch.float64, device=device), tokens(3, 60, device=device)
    cache, dice, stood = new_rows(model, 3), random.Random(1), [0, 0, 0]
    want = model(row)
    while min(stood) < 60:
        new = [min(dice.choice([0, 1, 1, 2, 5, 11]), 60 - s) for s in stood]
        if max(new) == 0:
            continue
        piece = torch.zeros(3, max(new), dtype=torch.int64, device=device)
        for b, n in enumerate(new):
            piece[b, :n] = row[b, stood[b] : stood[b] + n]
        logits = model.decode(piece, cache, new_tokens=new)
        stood = [s + n for s, n in zip(stood, new)]
        assert cache.lengths.tolist() == stood
        for b in range(3):
            if new[b]:
                torch.testing.assert_close(logits[b], want[b, stood[b] - 1], rtol=1e-11, atol=1e-11)


@every_form
def test_where_pages_lie_and_what_is_unused_change_nothing(form):
    model, row = awake(FORMS[form]), tokens(2, 40)
    answers = []
    for fill, seed in ((0.0, 0), (torch.nan, 1), (torch.inf, 2)):
        cache = new_rows(model, 2, fill, seed)
        answers.append([model.decode(piece, cache) for piece in row.split([11, 1, 28], dim=1)])
    for other in answers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(answers[0], other))


@pytest.mark.parametrize("form", ["2026", "llama"])
def test_rows_move_and_narrow_in_the_same_memory(form):
    model, row = awake(FORMS[form]), tokens(3, 30)
    cache = new_rows(model, 3)
    model.decode(row[:, :20], cache)
    straight = model.decode(row[:, 20:21], cache)
    cache = new_rows(model, 3)
    model.decode(row[:, :20], cache)
    cache.move(2, 0)
    cache.clear(2)
    moved = model.decode(row[[2, 1], 20:21], cache.narrow(0, 2))
    torch.testing.assert_close(moved, straight[[2, 1]])
    assert cache.lengths.tolist() == [21, 21, 0]


@pytest.mark.parametrize(
    ("form", "chunk"), [("plain", 5), ("windows", 1000), ("backout", 16), ("2026", 5), ("smear", 1000), ("llama", 5)]
)
def test_a_known_prefix_gives_what_reading_it_gives(form, chunk):
    """Bit for bit but for gates, whose sigmoid rounds as the shape of its tensor wants (test_serving.py)."""
    has_gates = getattr(FORMS[form], "smear", False) or getattr(FORMS[form], "value_embeds", False)
    model, ids = awake(FORMS[form]), tokens(100).tolist()
    found = []
    for known in (0, 40, 99):  # how many tokens a prompt before had in common with this one
        pool = BlockPool(40, PAGE)
        cache = PagedCache(model, 40, PAGE)
        prefill = Prefill(model, cache, pool, reuse=True)
        for prompt_ids in (ids[:known] + [1, 2, 3] * 9, ids):
            prompt = prefill.begin(Request(prompt_ids, SamplingConfig()), 10)
            while prompt.logits is None:
                prefill.read(prompt, min(chunk, len(prompt_ids) - prompt.n_read))
        assert prompt.n_reused == known // PAGE * PAGE
        found.append((prompt.logits, prefill.states()))
    torch.testing.assert_close(found[0][0][0], full_logits(form, torch.tensor([ids]), torch.float32)[0, -1])
    for logits, states in found[1:]:
        torch.testing.assert_close(logits, found[0][0], **(dict() if has_gates else dict(rtol=0, atol=0)))
        assert all(states[name].equal(found[0][1][name]) for name in states)


@pytest.mark.parametrize("form", ["2026", "llama"])
def test_paged_decode_never_waits_for_the_device(form):
    model = awake(FORMS[form])
    cache, counts = new_rows(model, 2), torch.tensor([5, 3])
    with NoHostSync():
        model.decode(tokens(2, 5), cache, new_tokens=counts)
        model.decode(tokens(2, 1), cache)
