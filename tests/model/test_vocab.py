"""The rows that pad the vocabulary to a multiple of 64 exist in memory only."""

import pytest
import torch

from errors import KestrelError
from inference.kv_cache import KVCache
from model import build
from model.language_model import padded_vocab
from tests.model.tiny import FORMS, VOCAB, awake, tokens, torch_ops

every_form = pytest.mark.parametrize("form", FORMS)


@pytest.mark.parametrize(("vocab_size", "rows"), [(1, 64), (64, 64), (65, 128), (4105, 4160), (32768, 32768)])
def test_padding_rounds_up_to_64(vocab_size, rows):
    assert padded_vocab(vocab_size) == rows
    model = build(FORMS["2026"], vocab_size, torch_ops())
    assert {model.transformer.wte.weight.shape[0], *(e.weight.shape[0] for e in model.value_embeds.values())} == {rows}


def everything(model, row, targets):
    """Loss, logits, decoded logits and every gradient."""
    model.zero_grad()
    loss = model(row, targets)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return loss.detach(), model(row).detach(), model.decode(row, KVCache(model, len(row))), gradients


@every_form
def test_padded_rows_of_the_head_never_leak(form, device):
    model = awake(FORMS[form], device=device)
    row, targets = tokens(2, 33, device=device), tokens(2, 33, seed=1, device=device)
    *before, gradients = everything(model, row, targets)
    with torch.no_grad():
        model.head_weight[VOCAB:] = 1e4
    *after, poisoned = everything(model, row, targets)
    assert before[1].shape == (2, 33, VOCAB)
    assert before[2].shape == (2, VOCAB)
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert all(torch.equal(gradients[name], poisoned[name]) for name in gradients)
    head = next(p.grad for p in model.parameters() if p is model.head_weight)
    assert (head[VOCAB:] == 0).all()
    assert (head[:VOCAB] != 0).any(dim=1).all()


def test_an_empty_vocabulary_is_refused():
    with pytest.raises(KestrelError, match="at least one token, got 0"):
        build(FORMS["plain"], 0, torch_ops())
