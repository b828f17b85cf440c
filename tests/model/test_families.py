"""Every family and form: trains, feels every parameter, keeps documents apart, compiles, and computes in its dtype."""

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

import kernels_torch
from config import compose
from tests.model.tiny import FORMS, VOCAB, awake, fresh, llama, tokens, triton_ops
from tests.numerics import assert_close

every_form = pytest.mark.parametrize("form", FORMS)


@every_form
def test_loss_falls_in_twenty_steps(form, device):
    model = fresh(FORMS[form], device=device)
    row = tokens(4, 33, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(21):
        loss = model(row[:, :-1], row[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(torch.tensor(VOCAB).log().item(), rel=0.02), "a fresh model knows nothing"
    assert losses[-1] < 0.9 * losses[0]


def silent_parameters(model, row) -> set[str]:
    """The parameters whose gradient is exactly zero everywhere."""
    model.zero_grad()
    model(row[:, :-1], row[:, 1:]).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    return {name for name, p in model.named_parameters() if not p.grad.any()}


@every_form
def test_every_parameter_feels_the_loss(form, device):
    """At the start those behind a zero projection or a zero gate are silent, exactly those; then none is."""
    row = tokens(2, 170, device=device)
    fresh_model = fresh(FORMS[form], device=device)
    behind_zero = ("c_q", "c_k", "c_v", "ve_gate", "c_fc", "value_embeds", "smear_gate")
    is_nanochat = hasattr(fresh_model, "lm_head")
    expected = {
        name for name, _ in fresh_model.named_parameters() if is_nanochat and any(part in name for part in behind_zero)
    }
    assert silent_parameters(fresh_model, row) == expected
    assert silent_parameters(awake(FORMS[form], device=device), row) == set()


@every_form
def test_packed_documents_are_as_if_each_were_alone(form):
    model = awake(FORMS[form], torch.float64)
    row, lengths = tokens(1, 100), [1, 37, 62]
    doc_ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None].int()
    alone = torch.cat([model(document) for document in row.split(lengths, dim=1)], dim=1)
    # Positions go on counting across documents; only their differences matter, up to the fp32 of the rotary tables.
    torch.testing.assert_close(model(row, doc_ids=doc_ids), alone, rtol=1e-5, atol=1e-5)
    assert (model(row) - alone).abs().max() > 0.01, "without doc_ids the documents do see each other"


@every_form
def test_future_tokens_change_nothing(form):
    model, row = awake(FORMS[form]), tokens(1, 60)
    before = model(row)
    row[0, 40] = (row[0, 40] + 1) % VOCAB
    after = model(row)
    assert torch.equal(before[:, :40], after[:, :40])
    assert (before[:, 40] - after[:, 40]).abs().max() > 1e-3


@every_form
def test_loss_is_the_cross_entropy_of_the_logits(form, device):
    row, targets = tokens(2, 50, device=device), tokens(2, 50, seed=1, device=device)
    targets[0, :7] = -1
    weights = torch.rand(2, 50, device=device)
    model, exact = awake(FORMS[form], device=device), awake(FORMS[form], torch.float64, device=device)

    def by_hand(logits):
        return F.cross_entropy(logits.mT, targets, ignore_index=-1, reduction="none")

    each = model(row, targets, reduction="none")
    assert_close(each, by_hand(exact(row)), by_hand(model(row)), "none")
    rounding = {"rtol": each.numel() * torch.finfo(torch.float32).eps, "atol": 0.0}  # of a sum in any order
    torch.testing.assert_close(model(row, targets, reduction="sum"), each.sum(), **rounding)
    torch.testing.assert_close(model(row, targets), each.sum() / 93, **rounding)
    torch.testing.assert_close(model(row, targets, token_weights=weights), (each * weights).sum() / 93, **rounding)


@every_form
def test_fp64_and_bf16_models_differ_only_by_rounding(form):
    row = tokens(2, 50)
    exact, single, half = (awake(FORMS[form], dtype)(row) for dtype in (torch.float64, torch.float32, torch.bfloat16))
    assert exact.dtype == torch.float64
    assert single.dtype == half.dtype == torch.float32, "logits are never in half precision"
    scale = exact.std()
    assert 0 < (single - exact).std() < 1e-4 * scale
    assert (single - exact).std() < 0.01 * (half - exact).std() < 0.01 * 0.3 * scale


@every_form
def test_activations_stay_in_the_models_dtype(form):
    model = awake(FORMS[form], torch.bfloat16)
    seen = {}

    def note(name):
        def hook(module, args, out):
            seen[name] = {part.dtype for part in (out if isinstance(out, tuple) else (out,))}

        return hook

    for name, module in model.named_modules():
        if "." in name:
            module.register_forward_hook(note(name))
    model(tokens(1, 9), tokens(1, 9)).backward()
    assert len(seen) > 8
    assert all(dtypes == {torch.bfloat16} for dtypes in seen.values()), seen
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


@every_form
def test_triton_kernels_agree_with_torch(form, device):
    """Every op that has a Triton kernel, in the whole model: logits, and the gradient of every parameter."""
    pytest.importorskip("triton", reason="triton is not installed")
    row, targets = tokens(2, 21, device=device), tokens(2, 21, seed=1, device=device)

    assert_agreement(
        lambda dtype, ops=None: awake(FORMS[form], dtype, device=device, ops=ops), row, targets, torch.float32
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("arch", ["plain", "nanochat2026"])
def test_a_d4_has_the_gradients_of_fp64(arch, dtype, device):
    """A model as one trains it: heads of 128, rows of several tiles."""
    row, targets = (torch.randint(4000, (2, 600), generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    config = compose("train", ["model=d4", f"arch={arch}"]).model

    def model(dtype, ops=None):
        made = fresh(config, dtype, vocab_size=4000, device=device, ops=ops)
        with torch.no_grad():
            for parameter in made.parameters():  # none is zero
                parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)).to(device)
        return made

    assert_agreement(model, row.to(device), targets.to(device), dtype)


def assert_agreement(new_model, row, targets, dtype):
    """Our kernels against fp64, as close as plain PyTorch in the same dtype: logits and all gradients."""

    def logits_and_gradients(dtype, ops=None):
        model = new_model(dtype, ops)
        model(row, targets).backward()
        return model(row).detach(), [p.grad.double() for p in model.parameters()]

    exact, exact_gradients = logits_and_gradients(torch.float64)
    plain, plain_gradients = logits_and_gradients(dtype)
    got, gradients = logits_and_gradients(dtype, triton_ops(row.device))
    assert_close(got, exact, plain, "logits")
    scales = [g.square().mean().sqrt() for g in exact_gradients]  # so that every parameter counts the same
    got, exact, plain = (
        torch.cat([(g / scale).flatten() for g, scale in zip(each, scales)])
        for each in (gradients, exact_gradients, plain_gradients)
    )
    assert_close(got.float(), exact, plain.float(), "gradients")


# What plain PyTorch would do our kernels' work with. Attention, matrix products and NanoFalcon's ungated SiLU stay.
FORBIDDEN = {
    F: ["rms_norm", "layer_norm", "cross_entropy", "nll_loss", "log_softmax", "softmax", "relu", "gelu", "embedding"],
    torch: [
        "rms_norm",
        "relu",
        "sigmoid",
        "tanh",
        "softmax",
        "log_softmax",
        "logsumexp",
        "square",
        "rsqrt",
        "embedding",
    ],
    torch.Tensor: ["relu", "sigmoid", "tanh", "softmax", "log_softmax", "logsumexp", "rsqrt", "gather"],
}


@pytest.mark.parametrize("form", ["plain", "2026", "llama"])
def test_no_torch_kernel_does_the_work_of_ours(form, device, monkeypatch):
    """A training step runs with everything that could stand in for a kernel of ours raising instead."""
    pytest.importorskip("triton", reason="triton is not installed")
    row, targets = tokens(2, 21, device=device), tokens(2, 21, seed=1, device=device)
    model = awake(FORMS[form], device=device, ops=triton_ops(device))
    want = torch.autograd.grad(model(row, targets), list(model.parameters()))

    def forbid(name):
        def raising(*args, **options):
            raise AssertionError(f"a training step called {name}")

        return raising

    with monkeypatch.context() as patch:
        for module, names in FORBIDDEN.items():
            for name in names:
                patch.setattr(module, name, forbid(f"{module.__name__}.{name}"))
        for op in import_module("kernels_triton").__all__:
            patch.setattr(kernels_torch, op, forbid(f"kernels_torch.{op}"))
        with pytest.raises(AssertionError, match="rms_norm"):
            F.rms_norm(torch.ones(2), (2,))
        got = torch.autograd.grad(model(row, targets), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("form", ["2026"])
def test_compiled_loss_equals_eager(form):
    """One graph, traced whole with its backward; the code generator behind it is not ours to test, and slow."""
    model, row = awake(FORMS[form]), tokens(2, 33)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    eager_loss, loss = model(row[:, :-1], row[:, 1:]), compiled(row[:, :-1], row[:, 1:])
    torch.testing.assert_close(loss, eager_loss)
    want = torch.autograd.grad(eager_loss, list(model.parameters()))
    got = torch.autograd.grad(loss, list(model.parameters()))
    for (name, _), a, b in zip(model.named_parameters(), got, want):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("n_kv_head", [None, 1])
def test_llama_equals_transformers_once_the_halves_of_each_head_trade_places(n_kv_head):
    """We rotate by −θ, Llama by +θ: the same function of q and k with the halves swapped."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: no second opinion")
    config = llama(n_kv_head=n_kv_head)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=config.n_embd,
            intermediate_size=config.mlp_dim,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.sequence_len,
            rms_norm_eps=config.norm_eps,
            attn_implementation="eager",
        )
    ).eval()
    words = {"tok.": "model.embed_tokens.", "blocks.": "model.layers.", "head.": "lm_head.", "c_proj": "o_proj"}
    words |= {"norm1": "input_layernorm", "norm2": "post_attention_layernorm", "attn.": "self_attn."}
    words |= {f"c_{x}.": f"{x}_proj." for x in "qkv"} | {"c_gate": "gate_proj", "c_up": "up_proj"}
    model, exact, row = awake(config), awake(config, torch.float64), tokens(2, 170)
    weights = {}
    for name, value in model.state_dict().items():
        if name.endswith(("c_q.weight", "c_k.weight")):
            value = value.view(-1, 2, config.head_dim // 2, config.n_embd).flip(1).reshape(value.shape)
        for ours, other in words.items():
            name = name.replace(ours, other)
        name = name.replace("mlp.o_proj", "mlp.down_proj")
        weights["model.norm.weight" if name == "norm.weight" else name] = (
            value[:VOCAB] if name in ("model.embed_tokens.weight", "lm_head.weight") else value
        )
    theirs.load_state_dict(weights, strict=True)
    with torch.no_grad():
        assert_close(model(row), exact(row), theirs(row).logits, "logits")
