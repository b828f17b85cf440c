"""Bits per byte: bytes of raw text, special and ignored targets in neither sum, the same on any number of ranks."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from evals.bits_per_byte import evaluate

# A little vocabulary: 0 is a special token, the others stand for these texts.
TEXTS = ["", "a", "th", "é", "…", "🦅", " falcon"]
TOKEN_BYTES = torch.tensor([len(text.encode()) for text in TEXTS], dtype=torch.int32)
V = len(TEXTS)


class Rows(NamedTuple):
    tokens: Tensor
    targets: Tensor
    doc_ids: Tensor | None = None


def model_of(logits_of: Callable[[Tensor], Tensor], flat: bool = False) -> Callable[..., Tensor]:
    """A model whose logits depend on the token alone."""

    def model(tokens: Tensor, targets: Tensor, *, doc_ids: Tensor | None, reduction: str) -> Tensor:
        assert reduction == "none"
        nats = F.cross_entropy(logits_of(tokens).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
        return nats if flat else nats.view_as(targets)

    return model


def uniform(tokens: Tensor) -> Tensor:
    return torch.zeros(*tokens.shape, V)


def bigram(tokens: Tensor) -> Tensor:
    """Each token predicts the others with its own fixed logits."""
    return torch.randn(V, V, generator=torch.Generator().manual_seed(3))[tokens]


def rows(targets: list[list[int]]) -> Rows:
    targets = torch.tensor(targets)
    return Rows(tokens=targets.clamp(min=0).roll(1, dims=1), targets=targets)


def test_constant_logits_cost_log2_of_the_vocabulary_per_token():
    """Check 13: exactly log2(V) · tokens / bytes, with bytes counted from the raw text."""
    result = evaluate(model_of(uniform), [rows([[1, 2, 3], [4, 5, 6]])], TOKEN_BYTES)
    text = "".join(TEXTS[1:]).encode()
    assert len(text) == 1 + 2 + 2 + 3 + 4 + 7
    assert result["bpb"] == pytest.approx(math.log2(V) * 6 / len(text), rel=1e-7)
    assert result["loss"] == pytest.approx(math.log(V), rel=1e-7)


def test_special_and_ignored_targets_are_in_neither_sum():
    plain = evaluate(model_of(uniform), [rows([[1, 2, 6]])], TOKEN_BYTES)
    mixed = evaluate(model_of(uniform), [rows([[0, 1, -1, 2], [-1, 0, 6, 0]])], TOKEN_BYTES)
    assert mixed == pytest.approx(plain, rel=1e-12)


def test_loss_counts_special_targets_and_bits_per_byte_does_not():
    batch = rows([[0, 1, 2, -1]])
    result = evaluate(model_of(bigram), [batch], TOKEN_BYTES)
    logp = bigram(batch.tokens)[0].double().log_softmax(-1)
    nats = [-logp[t, target].item() for t, target in enumerate([0, 1, 2])]
    assert result["loss"] == pytest.approx(sum(nats) / 3, rel=1e-6)
    assert result["bpb"] == pytest.approx((nats[1] + nats[2]) / math.log(2) / 3, rel=1e-6)


def test_what_a_special_target_costs_cannot_spoil_the_figure():
    def certain(tokens: Tensor) -> Tensor:
        return uniform(tokens).index_fill(-1, torch.tensor([0]), -math.inf)

    result = evaluate(model_of(certain), [rows([[0, 1, 2]])], TOKEN_BYTES)
    assert result["bpb"] == pytest.approx(2 * math.log2(V - 1) / 3, rel=1e-6)
    assert result["loss"] == math.inf


@given(st.lists(st.lists(st.integers(-1, V - 1), min_size=3, max_size=3), min_size=1, max_size=12), st.booleans())
@settings(max_examples=50, deadline=None)
def test_the_figure_does_not_depend_on_how_rows_are_batched(targets: list[list[int]], flat: bool):
    together = evaluate(model_of(bigram), [rows(targets)], TOKEN_BYTES)
    apart = evaluate(model_of(bigram, flat), [rows([row]) for row in targets], TOKEN_BYTES)
    assert together == pytest.approx(apart, rel=1e-12)


@pytest.mark.parametrize("batches", [[], [[[0, 0]]], [[[-1, -1]]]], ids=["no rows", "only special", "only ignored"])
def test_nothing_to_count_is_infinite(batches: list):
    result = evaluate(model_of(uniform), [rows(batch) for batch in batches], TOKEN_BYTES)
    assert result["bpb"] == math.inf


def test_a_tiny_loss_is_not_lost_among_many():
    """fp32 sums stop counting: adding 1e-9 to 1 changes nothing there."""
    nats = iter([1.0] + [1e-9] * 2000)

    def model(tokens: Tensor, targets: Tensor, **options) -> Tensor:
        return torch.full(targets.shape, next(nats))

    result = evaluate(model, [rows([[1]])] * 2001, TOKEN_BYTES)
    assert result["loss"] * 2001 == pytest.approx(1 + 2e-6, abs=1e-12)


def test_it_needs_no_gradient():
    weight = torch.zeros(V, V, requires_grad=True)
    recorded = []

    def model(tokens: Tensor, targets: Tensor, **options) -> Tensor:
        recorded.append(weight[tokens].sum().requires_grad)
        return model_of(uniform)(tokens, targets, **options)

    evaluate(model, [rows([[1, 2]])], TOKEN_BYTES)
    assert recorded == [False]


TARGETS = [[1, 2, 3], [0, 5, -1], [6, 6, 2], [4, 0, 1], [-1, -1, 3]]


def one_rank(rank: int, store: str, results: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mine = [rows([row]) for row in TARGETS[rank::2]]  # three rows here, two there
    torch.save(evaluate(model_of(bigram), mine, TOKEN_BYTES), f"{results}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32", reason="starts processes with fork")
def test_two_ranks_with_unequal_shares_agree_with_one(tmp_path: Path):
    multiprocessing.start_processes(one_rank, (str(tmp_path / "store"), str(tmp_path)), nprocs=2, start_method="fork")
    alone = evaluate(model_of(bigram), [rows(TARGETS)], TOKEN_BYTES)
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt", weights_only=True) == pytest.approx(alone, rel=1e-12)


@pytest.mark.gpu
def test_a_gpu_agrees_and_is_waited_for_once():
    batch = Rows(*(x.cuda() if x is not None else None for x in rows(TARGETS)))
    table = torch.randn(V, V, generator=torch.Generator().manual_seed(3)).cuda()
    model, token_bytes = model_of(lambda tokens: table[tokens]), TOKEN_BYTES.cuda()
    expected = evaluate(model_of(bigram), [rows(TARGETS)] * 3, TOKEN_BYTES)
    assert evaluate(model, [batch] * 3, token_bytes) == pytest.approx(expected, rel=1e-6)
    waited = []
    tolist = Tensor.tolist
    try:
        torch.cuda.set_sync_debug_mode("error")
        Tensor.tolist = lambda x: (torch.cuda.set_sync_debug_mode("default"), waited.append(1), tolist(x))[2]
        evaluate(model, [batch] * 3, token_bytes)
    finally:
        Tensor.tolist = tolist
        torch.cuda.set_sync_debug_mode("default")
    assert waited == [1]
