"""Keys and values in 8 bits: nearly the same logits, and else all that is true of a cache of numbers, bit for bit."""

import dataclasses
import random

import pytest
import torch

import infer
from config import compose
from errors import KestrelError
from inference.engine import Engine
from inference.paged_cache import PagedCache
from inference.request import Request
from inference.sampling import SamplingConfig
from kernels_torch.quantised_cache import FORMS as CODES
from model.cost import kv_bytes_per_token
from model.cuda_graphs import CudaGraphs
from tests.inference.scripted import BYTES
from tests.inference.test_graphs import compare, requests_of
from tests.inference.test_graphs import engine_of as graphs_engine
from tests.inference.test_infer import config_for, save_run
from tests.inference.test_paged import PAGE, SIZES, new_rows
from tests.inference.test_serving import assert_same, random_request, real, run, tokens_of
from tests.inference.test_speculation import engine_of
from tests.model.tiny import FORMS, NANOCHAT_2026, awake, nanochat, tokens, torch_ops, triton_ops
from tests.training.recorded_graph import RecordedGraphs

EVERY_CODE = pytest.mark.parametrize("code", CODES)
SOME_FORMS = pytest.mark.parametrize("form", ["plain with shared heads", "2026", "llama"])
LENGTH = 150


@EVERY_CODE
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_however_a_text_is_read_its_codes_are_the_same(form, code):
    """So whole, in pieces and token by token it is read to the same logits; and these are near those of numbers."""
    model, row, found = awake(FORMS[form], torch.float64), tokens(2, LENGTH), []
    for sizes in SIZES.values():
        cache = new_rows(model, 2, quant_cache=code)
        found.append([model.decode(piece, cache) for piece in row.split(sizes, dim=1)][-1])
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[2], found[0], rtol=1e-6, atol=1e-6)
    want = model(row)[:, -1]
    assert (found[0] - want).norm() < (0.02 if code == "int8" else 0.1) * want.norm()


@EVERY_CODE
@SOME_FORMS
def test_where_pages_lie_and_what_is_unused_change_nothing(form, code):
    model, row, answers = awake(FORMS[form]), tokens(2, 40), []
    for fill, seed in ((0.0, 0), (torch.nan, 1), (torch.inf, 2)):
        cache = new_rows(model, 2, fill, seed, code)
        answers.append([model.decode(piece, cache) for piece in row.split([11, 1, 28], dim=1)])
    for other in answers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(answers[0], other))


@EVERY_CODE
@SOME_FORMS
def test_a_request_in_a_crowd_gets_what_it_gets_alone(form, code):
    """Rows come and go between steps, begin with what others have read, and share pages that are copied."""
    dice = random.Random(form)
    requests = [random_request(dice) for _ in range(8)]
    crowd = run(real(form, quant_cache=code), requests, dice)
    for request in requests:
        alone, engine = dataclasses.replace(request), real(form, quant_cache=code, reuse_prefixes=False)
        assert_same(crowd[request], run(engine, [alone])[alone], form)


@EVERY_CODE
@SOME_FORMS
def test_recorded_steps_equal_eager_ones(form, code):
    assert compare(form, RecordedGraphs(), lag=1, quant_cache=code).stats()["blocks_held"] == 0


@EVERY_CODE
@SOME_FORMS
def test_guesses_change_nothing_that_is_said(form, code):
    prompt, sampling = tokens(20).tolist(), SamplingConfig(max_new_tokens=40, temperature=0)
    said = tokens_of(run(engine_of(form, True, 0, quant_cache=code), [Request(prompt, sampling)]).popitem()[1])[0]
    prompt += said[:25] + prompt
    plain, guessing = (engine_of(form, True, n, quant_cache=code) for n in (0, 4))
    told = [tokens_of(run(engine, [Request(prompt, sampling)]).popitem()[1]) for engine in (plain, guessing)]
    assert told[0] == told[1]
    assert guessing.reader is not None, "nothing was guessed"


@EVERY_CODE
def test_greedy_tokens_are_those_of_triton(code):
    config, told = nanochat(depth=1, aspect_ratio=24, head_dim=24, sequence_len=64, **NANOCHAT_2026), []
    for ops in (torch_ops(), triton_ops()):
        model = awake(config, vocab_size=BYTES.vocab_size, ops=ops)
        engine = Engine(model, BYTES, max_rows=1, page=16, prefill_chunk=9, quant_cache=code)
        engine.stop_ids = set()
        columns = engine.generate(tokens(21).tolist(), SamplingConfig(max_new_tokens=32, temperature=0))
        told.append([column[0] for column in columns])
    assert told[0] == told[1]
    assert len(set(told[0])) > 5


@pytest.mark.gpu
@EVERY_CODE
def test_steps_over_codes_are_recorded_on_a_gpu(code, device):
    """Each graph is proven against the step kernel by kernel when it is recorded."""
    engine = graphs_engine("2026", CudaGraphs(), ops=triton_ops(device), device=device, quant_cache=code)
    run(engine, requests_of(0), random.Random(1))
    assert sum(len(step.graphs) for step in engine.steps.values()) > 1


@EVERY_CODE
def test_it_takes_half_the_memory_of_16_bits(code):
    model = awake(nanochat(head_dim=128, depth=2, aspect_ratio=128), torch.bfloat16)
    cache = PagedCache(model, 7, PAGE, form=code)
    held = sum(pages.nbytes for pages in (cache.k, cache.v, *cache.scales.values()))
    assert held == 8 * PAGE * kv_bytes_per_token(model, CODES[code])
    assert kv_bytes_per_token(model, CODES[code]) < 0.52 * kv_bytes_per_token(model)


def test_the_command_takes_it_and_says_so(tmp_path, capsys):
    save_run(tmp_path / "run", nanochat(**NANOCHAT_2026))
    engine = infer.load_engine(config_for("quant_cache=int8", "quant=int8", ckpt=tmp_path / "run"))
    assert "int8 weights, int8 cache, cpu" in capsys.readouterr().err
    assert engine.cache.k.dtype == torch.int8
    assert len(list(engine.generate([1, 2], SamplingConfig(max_new_tokens=5)))) == 5


def test_what_is_no_form_of_codes_is_refused():
    with pytest.raises(KestrelError, match=r"^quant_cache must be one of int8, fp8, got 'int4'$"):
        compose("infer", ["quant_cache=int4"])
    with pytest.raises(KestrelError, match="quant_cache must be one of int8, fp8, got 'bf16'"):
        Engine(awake(FORMS["plain"], vocab_size=BYTES.vocab_size), BYTES, quant_cache="bf16")
