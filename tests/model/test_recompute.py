"""What is made again in the backward pass: the same loss and gradients, with less kept in between."""

import pytest
import torch

from errors import KestrelError
from model.ops import RECOMPUTABLE
from tests.model.tiny import FORMS, awake, nanochat, tokens
from training.distributed import HardwareConfig


def loss_gradients_and_kept_bytes(model, row):
    """Bytes of all that autograd keeps for the backward pass, each memory counted once; parameters do not count."""
    kept = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model(row[:, :-1], row[:, 1:])
    return loss, torch.autograd.grad(loss, list(model.parameters())), sum(kept.values())


@pytest.mark.parametrize("names", [["block"], ["relu2_mlp", "swiglu_mlp"], ["attention"], RECOMPUTABLE], ids=str)
@pytest.mark.parametrize("form", ["2026", "plain", "llama"])
def test_recomputing_gives_the_same_bits_and_keeps_less(form, names):
    plain, saving = awake(FORMS[form]), awake(FORMS[form])
    saving.recompute(names)
    row = tokens(2, 65)
    want_loss, want, all_bytes = loss_gradients_and_kept_bytes(plain, row)
    loss, got, kept_bytes = loss_gradients_and_kept_bytes(saving, row)
    assert torch.equal(loss, want_loss)
    for (name, _), a, b in zip(plain.named_parameters(), got, want, strict=True):
        assert torch.equal(a, b), name
    assert kept_bytes < all_bytes


def test_every_op_can_be_named_alone():
    plain, row = awake(FORMS["2026"]), tokens(2, 33)
    want, _, _ = loss_gradients_and_kept_bytes(plain, row)
    for name in RECOMPUTABLE:
        model = awake(FORMS["2026"])
        model.recompute([name])
        assert torch.equal(loss_gradients_and_kept_bytes(model, row)[0], want), name


def test_a_block_keeps_less_than_its_ops():
    kept = {}
    for names in ((), ("relu2_mlp",), ("block",)):
        model = awake(FORMS["plain"])
        model.recompute(list(names))
        kept[names] = loss_gradients_and_kept_bytes(model, tokens(2, 65))[2]
    assert kept["block",] < kept["relu2_mlp",] < kept[()]


def test_evaluation_computes_once():
    model, calls = awake(FORMS["plain"]), []
    attend = model.ops.attention
    for module in model.modules():
        if hasattr(module, "ops"):
            module.ops = model.ops.__class__(
                **{**vars(model.ops), "attention": lambda *a, **k: calls.append(1) or attend(*a, **k)}
            )
    model.recompute(["attention"])
    row = tokens(2, 33)
    with torch.no_grad():
        model(row[:, :-1], row[:, 1:])
    assert len(calls) == 3  # layers
    model(row[:, :-1], row[:, 1:]).backward()
    assert len(calls) == 3 + 6


def test_copies_and_recomputing_go_together():
    plain, saving = (awake(FORMS["2026"], torch.bfloat16) for _ in range(2))
    saving.recompute(["block", "relu2_mlp"])
    saving.keep_copies()
    row = tokens(2, 33)
    want_loss, want, _ = loss_gradients_and_kept_bytes(plain, row)
    loss, got, _ = loss_gradients_and_kept_bytes(saving, row)
    assert torch.equal(loss, want_loss)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_compiled_model_recomputes():
    model, row = awake(nanochat(depth=1)), tokens(2, 33)
    eager = model(row[:, :-1], row[:, 1:])
    model.recompute(["relu2_mlp"])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(row[:, :-1], row[:, 1:]), eager)


def test_what_is_no_op_of_training_is_refused_by_name():
    for name in ("mlp_of_mine", "attention_decode", "newton_schulz"):
        with pytest.raises(KestrelError, match=f"hardware.recompute knows no '{name}'; choose from block, embedding"):
            HardwareConfig(recompute=[name])
