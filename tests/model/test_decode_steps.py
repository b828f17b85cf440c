"""Decoding one token a row by the ops made for it is the full forward, in every form a model can have."""

import pytest
import torch

from inference.engine import Engine, cast_weights
from inference.kv_cache import KVCache
from inference.sampling import SamplingConfig
from inference.simple import generate_naive
from tests.inference.scripted import BYTES
from tests.inference.test_paged import new_rows
from tests.model.tiny import FORMS, awake, tokens, triton_ops
from tests.numerics import assert_close

LENGTH = 150  # past the short window of 128
every_form = pytest.mark.parametrize("form", FORMS)


def step_logits(model, row, n_steps: int, cache) -> torch.Tensor:
    """The logits after each of the last n_steps tokens of row, read one by one."""
    model.decode(row[:, : LENGTH - n_steps], cache)
    return torch.stack([model.decode(piece, cache) for piece in row[:, LENGTH - n_steps :].split(1, dim=1)], dim=1)


def stacked(form: str, dtype=torch.float32, **options):
    return cast_weights(awake(FORMS[form], dtype, **options))


@every_form
@pytest.mark.parametrize("paged", [True, False])
@torch.no_grad()
def test_steps_equal_the_full_forward(form, paged, device):
    row = tokens(2, LENGTH, device=device)
    model = stacked(form, device=device)
    got = step_logits(model, row, 20, new_rows(model, 2) if paged else KVCache(model, 2))
    exact, plain = (awake(FORMS[form], d, device=device)(row)[:, -20:] for d in (torch.float64, torch.float32))
    assert_close(got, exact, plain, form)


@every_form
@torch.no_grad()
def test_steps_in_fp64_are_the_full_forward_to_the_last_digits(form):
    row, model = tokens(2, LENGTH), stacked(form, torch.float64)
    got = step_logits(model, row, 9, new_rows(model, 2))
    want = awake(FORMS[form], torch.float64)(row)[:, -9:]
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@every_form
@torch.no_grad()
def test_steps_in_bf16_err_no_more_than_the_forward_does(form, device):
    row, model = tokens(2, LENGTH, device=device), stacked(form, torch.bfloat16, device=device)
    got = step_logits(model, row, 40, new_rows(model, 2))
    exact, plain = (awake(FORMS[form], d, device=device)(row)[:, -40:] for d in (torch.float64, torch.bfloat16))
    assert_close(got, exact, plain, form)


@pytest.mark.parametrize("form", ["2026", "llama", "nanofalcon"])
@torch.no_grad()
def test_steps_by_kernels_equal_the_full_forward(form, device):
    if device.type == "cpu":
        assert triton_ops(device).linear_decode.__module__.startswith("kernels_")
    row, model = tokens(2, LENGTH, device=device), stacked(form, ops=triton_ops(device), device=device)
    cache = new_rows(model, 2)
    reader = stacked(form, device=device)  # a prompt takes the interpreter too long
    reader.decode(row[:, : LENGTH - 2], cache)
    got = torch.stack([model.decode(piece, cache) for piece in row[:, LENGTH - 2 :].split(1, dim=1)], dim=1)
    exact, plain = (awake(FORMS[form], d, device=device)(row)[:, -2:] for d in (torch.float64, torch.float32))
    assert_close(got, exact, plain, form)


@pytest.mark.parametrize("form", ["plain with shared heads", "2026", "llama tied with shared heads", "nanofalcon"])
def test_a_stacked_engine_says_what_naive_generation_says(form):
    model = stacked(form, vocab_size=BYTES.vocab_size)
    engine = Engine(model, BYTES)
    engine.stop_ids = set()
    sampling = SamplingConfig(max_new_tokens=64, temperature=0)
    prompt = tokens(20).tolist()
    told = [[token for (token,) in engine.generate(prompt, sampling)]]
    assert told == generate_naive(engine, prompt, sampling)
    assert len(set(told[0])) > 5


@every_form
def test_stacking_changes_no_weight_and_copies_none(form):
    before, model = awake(FORMS[form]).state_dict(), stacked(form)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    n_bytes = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == n_bytes
    attention = next(module for module in model.modules() if hasattr(module, "qkv"))
    assert attention.qkv[0].data_ptr() == attention.c_q.weight.data_ptr()
