"""Copies of the weights in the model's dtype: the numbers of casting at every use, without the casts."""

import pytest
import torch

from tests.model.tiny import FORMS, NANOCHAT_2026, awake, llama, nanochat, tokens


def loss_and_gradients(model, row):
    loss = model(row[:, :-1], row[:, 1:])
    return loss, torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("form", FORMS)
def test_copies_give_the_same_bits_as_casts(form):
    plain, copied = (awake(FORMS[form], torch.bfloat16) for _ in range(2))
    copied.keep_copies()
    row = tokens(2, 33)
    (want_loss, want), (loss, got) = loss_and_gradients(plain, row), loss_and_gradients(copied, row)
    assert torch.equal(loss, want_loss)
    for (name, parameter), a, b in zip(plain.named_parameters(), got, want, strict=True):
        assert a.dtype == parameter.dtype == torch.float32
        assert torch.equal(a, b), name
    with torch.no_grad():
        assert torch.equal(copied(row), plain(row))


def test_products_read_the_copies_alone():
    """A master that was changed behind its copy's back changes nothing: no product casts it."""
    model, row = awake(FORMS["llama tied with shared heads"], torch.bfloat16), tokens(2, 33)
    copies = model.keep_copies()
    before = model(row)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in copies and name != "tok.weight":  # the table is looked up in fp32
                parameter.add_(1)
    assert torch.equal(model(row), before)
    model.refresh_copies()
    assert not torch.equal(model(row), before)
    assert all(torch.equal(copy, model.get_parameter(name).bfloat16()) for name, copy in copies.items())


def test_gradients_add_up_in_the_master():
    """In fp32, however many micro-batches there are."""
    model, row = awake(FORMS["plain"], torch.bfloat16), tokens(2, 33)
    model.keep_copies()
    for _ in range(3):
        model(row[:, :-1], row[:, 1:]).backward()
    _, once = loss_and_gradients(model, row)
    for parameter, gradient in zip(model.parameters(), once, strict=True):
        assert torch.equal(parameter.grad, gradient + gradient + gradient)


def test_an_fp32_model_has_none_and_no_checkpoint_holds_one():
    assert awake(FORMS["plain"]).keep_copies() == {}
    model = awake(FORMS["plain"], torch.bfloat16)
    names = model.state_dict().keys()
    assert model.keep_copies().keys() <= names
    assert model.state_dict().keys() == names


@pytest.mark.parametrize("config", [nanochat(**NANOCHAT_2026 | {"depth": 2}), llama(n_layer=1)], ids=["2026", "llama"])
def test_a_compiled_model_reads_copies(config):
    model, row = awake(config, torch.bfloat16), tokens(2, 33)
    copies = model.keep_copies()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    first, _ = loss_and_gradients(compiled, row)
    for copy in copies.values():
        copy.mul_(1.5)  # in place, as an optimizer writes: the compiled code must see it
    (loss, got), (want_loss, want) = loss_and_gradients(compiled, row), loss_and_gradients(model, row)
    assert not torch.equal(first, loss)
    torch.testing.assert_close(loss, want_loss)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
