"""Costs counted from modules agree with the numbers published for nanochat, and with a profiler where one can count."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from errors import KestrelError
from inference.kv_cache import KVCache
from model import build
from model.cost import flops_per_token, kv_bytes_per_token, parameter_counts, require_memory, scaling_parameters
from model.llama import LlamaConfig
from model.nanochat import NanochatConfig
from tests.model.tiny import FORMS, NANOCHAT_2026, VOCAB, fresh, llama, tokens, torch_ops

# The depth dial at V=32768, T=2048: depth, width, heads, parameters, scaling parameters, FLOPs per token.
GOLDEN = [
    (4, 256, 2, 36_700_242, 11_534_384, 80_216_352),
    (6, 384, 3, 73_531_538, 23_199_852, 167_510_664),
    (8, 512, 4, 125_829_354, 41_943_232, 295_699_584),
    (10, 640, 5, 195_952_986, 70_123_820, 495_453_960),
    (12, 768, 6, 286_261_730, 110_100_912, 759_695_904),
    (16, 1024, 8, 536_871_738, 234_881_792, 1_585_451_520),
    (20, 1280, 10, 896_533_746, 435_160_240, 2_886_212_640),
    (24, 1536, 12, 1_384_122_122, 729_810_624, 4_775_225_472),
    (26, 1664, 13, 1_681_786_938, 918_423_532, 5_991_051_144),
    (32, 2048, 16, 2_818_575_450, 1_677_724_672, 10_770_991_104),
]


@pytest.mark.parametrize(("depth", "width", "heads", "total", "scaling", "flops"), GOLDEN)
def test_depth_dial_is_nanochats(depth, width, heads, total, scaling, flops):
    model = build(NanochatConfig(depth=depth, **NANOCHAT_2026), 32768, torch_ops())
    assert (model.config.n_embd, model.config.n_head) == (width, heads)
    assert parameter_counts(model)["total"] == total
    assert scaling_parameters(model) == scaling
    assert flops_per_token(model) == flops


def test_d12_in_parts():
    counts = parameter_counts(build(NanochatConfig(depth=12, **NANOCHAT_2026), 32768, torch_ops()))
    assert counts == {
        "wte": 25_165_824,
        "value_embeds": 150_994_944,
        "lm_head": 25_165_824,
        "transformer_matrices": 84_935_088,
        "scalars": 50,
        "total": 286_261_730,
    }


def test_classic_d34_has_two_billion_parameters():
    model = build(NanochatConfig(depth=34), 65536, torch_ops())
    assert parameter_counts(model)["total"] == 2_217_082_880
    assert kv_bytes_per_token(model, torch.bfloat16) == 34 * 2 * 17 * 128 * 2


@pytest.mark.parametrize("form", FORMS)
def test_parts_add_up_to_the_parameters(form):
    model = fresh(FORMS[form])
    counts = parameter_counts(model)
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    assert counts["total"] == sum(n for name, n in counts.items() if name != "total")


def test_a_tied_head_is_stored_once_and_computed_all_the_same():
    tied, untied = (build(llama(tied=tied), VOCAB, torch_ops()) for tied in (True, False))
    assert flops_per_token(tied) == flops_per_token(untied)
    assert scaling_parameters(tied) == scaling_parameters(untied)
    table = parameter_counts(untied)["lm_head"]
    assert parameter_counts(tied)["total"] == parameter_counts(untied)["total"] - table


def attention_the_counter_sees(q, k, v, **_):
    """Attention as two matrix products: the profiler does not know the fused one of a CPU."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return (q @ k.mT @ v).transpose(1, 2)


@pytest.mark.parametrize(
    "form", ["plain", "plain with shared heads", "llama", "llama tied with shared heads", "nanofalcon"]
)
def test_flops_equal_what_a_profiler_counts(form):
    """Training costs three times the forward. 128 words need no padding, which is counted but not computed."""
    config = FORMS[form]
    model = build(config, 128, replace(torch_ops(), attention=attention_the_counter_sees))
    model.to_empty(device="cpu")
    model.init_weights(0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens(1, config.sequence_len))
    assert 3 * counter.get_total_flops() == flops_per_token(model) * config.sequence_len


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_bytes_are_those_of_a_cache(dtype):
    model = fresh(FORMS["2026 with shared heads"], dtype)
    cache = KVCache(model, 3, max_len=11)
    assert cache.k.nbytes + cache.v.nbytes == 3 * 11 * kv_bytes_per_token(model)


def test_a_large_llama_is_counted_without_memory():
    model = build(LlamaConfig(n_layer=32, n_embd=4096, n_head=32, hidden_dim=11008), 32000, torch_ops())
    assert parameter_counts(model)["total"] == 6_738_415_616  # Llama-2-7B


@pytest.mark.parametrize(
    ("config", "rows", "says"),
    [
        (
            NanochatConfig(depth=2, head_dim=1_000_000),
            -1,
            "160,000 GB .* has 32 GB.*model.depth=2, .*model.head_dim=1000000",
        ),
        (LlamaConfig(n_layer=900, n_embd=64_000), -1, "model.n_layer=900, model.n_embd=64000"),
        (NanochatConfig(depth=2, sequence_len=2**24), -1, "lower model.sequence_len=16777216$"),
        (NanochatConfig(depth=2), 10**12, "lower model.sequence_len=2048, hardware.device_batch_size=1000000000000$"),
    ],
    ids=["width", "layers", "row", "rows"],
)
def test_what_no_memory_can_hold_is_refused_before_it_is_built(config, rows, says):
    with pytest.raises(KestrelError, match=says):
        require_memory(config, rows, 32 * 10**9)
    require_memory(config, rows, None)


@pytest.mark.parametrize("config", [NanochatConfig(**NANOCHAT_2026), LlamaConfig()])
def test_the_memory_asked_for_is_never_more_than_weights_and_gradients_take(config):
    total = parameter_counts(build(config, VOCAB, torch_ops()))["total"]
    require_memory(config, 1, 8 * total)
