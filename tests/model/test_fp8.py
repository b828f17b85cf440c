"""Models trained with 8-bit products: which layers, when, how near the gradients are, and how near training is."""

import math

import pytest
import torch

import kernels_torch.fp8
import model.layers.fp8 as layers_fp8
from data.batches import Batch
from errors import KestrelError
from model import build
from model.layers.fp8 import Fp8Layers, load_fp8, train_in_fp8
from model.ops import KernelConfig
from optim.groups import MuonAdamWConfig, parameter_groups
from optim.muon_adamw import MuonAdamW
from optim.schedules import make_schedule
from tests.conftest import HAS_GPU
from tests.kernels.test_contract import BACKENDS
from tests.model.tiny import FORMS, NANOCHAT_2026, VOCAB, awake, fresh, llama, nanochat, tokens, torch_ops
from tests.training.recorded_graph import RecordedGraphs
from training.step import CapturedStep, Step

# Two heads of 64: the smallest width that takes part.
WIDE = dict(depth=2, head_dim=64, aspect_ratio=64, sequence_len=64)
FORMS_WIDE = {
    "plain": nanochat(**WIDE),
    "2026": nanochat(**{**NANOCHAT_2026, **WIDE}),
    "nanofalcon": llama(n_embd=128, n_head=2, sequence_len=64, activation="silu"),
    "llama": llama(n_embd=128, n_head=2, sequence_len=64),
}


def in_fp8(model, backend: str = "torch"):
    """The model and its 8-bit side, with weights in 8 bits."""
    fp8 = train_in_fp8(model, load_fp8(KernelConfig(backend=backend), torch.device("cpu")))
    fp8.refresh()
    return model, fp8


def loss_and_gradients(model, row):
    loss = model(row[:, :-1], row[:, 1:])
    return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))


@pytest.fixture(autouse=True)
def all_that_fit(monkeypatch):
    """Take part, whether it pays or not: such small models are nowhere but here."""
    monkeypatch.setattr(layers_fp8, "WORTH_MEASURING", 0)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("plain", "fp8: the products of 12 of 13 matrices while training; not: lm_head"),
        ("2026", "fp8: the products of 12 of 13 matrices while training; not: lm_head"),
        ("nanofalcon", "fp8: the products of 12 of 13 matrices while training; not: head"),
        (
            "llama",
            "fp8: the products of 8 of 15 matrices while training; "
            "not: blocks.*.mlp.c_gate, blocks.*.mlp.c_up, blocks.*.mlp.c_proj, head",
        ),
    ],
)
def test_it_says_which_layers_take_part(form, text):
    _, fp8 = in_fp8(fresh(FORMS_WIDE[form]))
    assert fp8.describe() == text


@pytest.mark.parametrize(("depth", "text"), [(12, "60 of 73"), (18, "90 of 109"), (20, "120 of 121")])
def test_a_projection_alone_takes_part_in_wide_models(depth, text, monkeypatch):
    monkeypatch.undo()
    wide = build(nanochat(depth=depth, head_dim=128, aspect_ratio=64, sequence_len=128), 512, torch_ops())
    description = train_in_fp8(wide, kernels_torch.fp8).describe()
    assert description.startswith(f"fp8: the products of {text} matrices while training; not: ")
    assert ("transformer.h.*.attn.c_proj" in description) == (depth < 20)


def test_narrow_models_have_no_layer_that_does():
    model, fp8 = in_fp8(awake(FORMS["2026"]))
    row = tokens(1, 50)  # any number of tokens, then
    assert fp8.describe().startswith("fp8: the products of 0 of 19 matrices")
    plain = awake(FORMS["2026"])
    assert torch.equal(loss_and_gradients(model, row)[0], loss_and_gradients(plain, row)[0])


@pytest.mark.parametrize("form", FORMS_WIDE)
def test_without_gradients_and_in_checkpoints_nothing_changes(form):
    plain, row = awake(FORMS_WIDE[form]), tokens(2, 50)
    model, _ = in_fp8(awake(FORMS_WIDE[form]))
    with torch.no_grad():
        assert torch.equal(model(row), plain(row))
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert not torch.equal(model(row[:, :48]), plain(row[:, :48]))  # with gradients it does


@pytest.mark.parametrize("backend", BACKENDS if not HAS_GPU else ["torch"])
@pytest.mark.parametrize("form", FORMS_WIDE)
def test_loss_and_gradients_are_near_those_of_fp32(form, backend):
    """The matrices': scalars are sums that cancel. Four layers' roundings of 2.6 % and 5.1 % add up on the way down."""
    row = tokens(2, 65)
    plain, (model, _) = fresh_with_projections(form), in_fp8(fresh_with_projections(form), backend)
    (want_loss, want), (loss, got) = loss_and_gradients(plain, row), loss_and_gradients(model, row)
    assert abs(loss / want_loss - 1) < 0.005
    for (name, parameter), a, b in zip(plain.named_parameters(), got, want, strict=True):
        assert a.dtype == torch.float32
        if parameter.dim() == 2 and "gate" not in name:
            assert torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.98, name
            assert 0.95 < a.norm() / b.norm() < 1.05, name


def fresh_with_projections(form: str):
    """As training starts it, but for the projections, which are zero then."""
    model = fresh(FORMS_WIDE[form])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "c_proj" in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
            if name == "lm_head.weight":
                parameter *= 20
    return model


def test_weights_never_made_are_noticed():
    model = awake(FORMS_WIDE["plain"])
    train_in_fp8(model, kernels_torch.fp8)
    loss, _ = loss_and_gradients(model, tokens(2, 65))
    assert loss.isnan()


def test_weights_are_read_as_they_were_when_the_step_began():
    (model, fp8), row = in_fp8(awake(FORMS_WIDE["plain"])), tokens(2, 65)
    before, _ = loss_and_gradients(model, row)
    with torch.no_grad():
        for layer in fp8.groups[0].layers:
            layer.weight *= 1.5
    assert torch.equal(loss_and_gradients(model, row)[0], before)
    fp8.refresh()
    assert not torch.equal(loss_and_gradients(model, row)[0], before)


def test_copies_are_what_weights_are_made_of():
    model = awake(FORMS_WIDE["plain"], torch.bfloat16)
    copies = model.keep_copies()
    _, fp8 = in_fp8(model)
    assert all(any(source is copy for copy in copies.values()) for group in fp8.groups for source in group.sources())
    loss, gradients = loss_and_gradients(model, tokens(2, 65))
    assert loss.isfinite()
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


@pytest.mark.parametrize("form", ["2026", "nanofalcon"])
def test_what_is_made_again_in_the_backward_pass_is_the_same(form):
    row = tokens(2, 65)
    (kept, _), (again, _) = (in_fp8(awake(FORMS_WIDE[form])) for _ in range(2))
    again.recompute(["block"])
    (want_loss, want), (loss, got) = loss_and_gradients(kept, row), loss_and_gradients(again, row)
    assert torch.equal(loss, want_loss)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("form", ["2026", "nanofalcon"])
def test_a_compiled_model_reads_new_weights(form):
    (model, fp8), row = in_fp8(fresh_with_projections(form)), tokens(2, 65)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        (loss, got), (want_loss, want) = loss_and_gradients(compiled, row), loss_and_gradients(model, row)
        torch.testing.assert_close(loss, want_loss)
        assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(got, want, strict=True))
        with torch.no_grad():
            for group in fp8.groups:
                group.layers[0].weight *= 1.1
        fp8.refresh()
        assert not torch.equal(loss_and_gradients(model, row)[0], loss)


def test_gradients_of_micro_batches_add_up():
    (model, _), row = in_fp8(awake(FORMS_WIDE["2026"])), tokens(2, 65)
    for _ in range(2):
        model(row[:, :-1], row[:, 1:]).backward()
    _, once = loss_and_gradients(model, row)
    for parameter, gradient in zip(model.parameters(), once, strict=True):
        assert torch.equal(parameter.grad, gradient + gradient)


def test_a_wrong_product_is_found_before_training(monkeypatch):
    monkeypatch.setattr(kernels_torch.fp8, "product", lambda a, b, *rest, **options: torch.ones(len(a), len(b)))
    with pytest.raises(KestrelError, match=r"wrong results on cpu: leave hardware\.fp8=false"):
        load_fp8(KernelConfig(), torch.device("cpu"))
    monkeypatch.setattr(kernels_torch.fp8, "product", None)
    with pytest.raises(KestrelError, match="do not run on cpu"):
        load_fp8(KernelConfig(), torch.device("cpu"))


def train(form: str, steps: int, fp8: bool) -> list[float]:
    """Losses on rows of which each is an arithmetic sequence of tokens, to be learned in some tens of steps."""
    model = fresh(FORMS_WIDE[form])
    groups = parameter_groups(model, MuonAdamWConfig(), n_embd=model.config.n_embd)
    optimizer = MuonAdamW(groups, torch_ops())
    refresh = in_fp8(model)[1].refresh if fp8 else lambda: None
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        first, stride = (torch.randint(0, n, (4, 1), generator=generator) for n in (VOCAB, 4))
        row = (first + (stride + 1) * torch.arange(65)) % VOCAB
        refresh()
        loss = model(row[:, :-1], row[:, 1:])
        loss.backward()
        losses.append(loss.item())
        optimizer.step(1.0, 0.9, 1.0)
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("form", ["plain", "2026"])
def test_training_follows_fp32(form):
    plain, ours = train(form, 50, fp8=False), train(form, 50, fp8=True)
    assert plain[-1] < 0.2 * plain[0]
    assert abs(math.fsum(ours[:10]) / math.fsum(plain[:10]) - 1) < 0.01
    assert abs(math.fsum(ours) / math.fsum(plain) - 1) < 0.05


def test_a_group_shares_its_unit():
    _, fp8 = in_fp8(awake(FORMS_WIDE["plain"]))
    qkv: Fp8Layers = fp8.groups[0]
    assert len(qkv.layers) == 3
    assert qkv.row_norm == math.sqrt(128)
    stack = torch.cat(qkv.sources())
    error = qkv.weight.values.float() * qkv.weight.facts[0] - stack
    assert error.abs().max() <= stack.abs().max() / 16


@pytest.mark.parametrize("optimizer_kind", ["eager", "captured"])
def test_every_step_begins_with_new_weights(optimizer_kind):
    """Also one that was recorded: its weights in 8 bits are made where the first micro-batch begins."""
    model = fresh(FORMS_WIDE["plain"])
    groups = parameter_groups(model, MuonAdamWConfig(), n_embd=model.config.n_embd)
    optimizer = MuonAdamW(groups, torch_ops(), rates_on_device=True)
    fp8 = train_in_fp8(model, kernels_torch.fp8)
    options = dict(accumulation=2, device=torch.device("cpu"), prepare=fp8.refresh)
    if optimizer_kind == "eager":
        step = Step(model, optimizer, **options)
    else:
        step = CapturedStep(model, optimizer, capture=RecordedGraphs(), **options)
    row, schedule = tokens(2, 65), make_schedule(MuonAdamWConfig(), 20)
    for number in range(7):
        before = [group.weight.values.clone() for group in fp8.groups]
        for i in range(2):
            step.add(Batch(row[:, :-1], row[:, 1:], None, None, {}), first=i == 0)
        for old, group in zip(before, fp8.groups, strict=True):
            whole = kernels_torch.fp8.quantize(torch.cat(group.sources()), kernels_torch.fp8.E4M3)
            assert torch.equal(group.weight.values.float(), whole.values.float())
            assert not torch.equal(old.float(), whole.values.float())
        step.update(schedule(number))
        assert step.loss.isfinite()
