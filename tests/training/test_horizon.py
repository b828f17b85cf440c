"""The scaling laws against nanochat's own numbers, the precedence of the three lengths, and batches that divide."""

import pytest

from errors import KestrelError
from training.horizon import StageConfig, auto_batch_size, largest_device_batch, largest_divisor, plan

D12 = 110_100_912  # scaling parameters of the 12-layer reference at a vocabulary of 32768

# depth, S, D tokens, log2 B, lr scale, λ, N, FLOPs per token, as nanochat's code computes them at T = 2048, R = 10.5
GOLDEN = [
    (4, 11_534_384, 121_111_032, 18, 0.7071, 1.8899, 462, 8.0216e7),
    (6, 23_199_852, 243_598_446, 18, 0.7071, 0.93961, 929, 1.6751e8),
    (8, 41_943_232, 440_403_936, 18, 0.7071, 0.51972, 1680, 2.9570e8),
    (10, 70_123_820, 736_300_110, 19, 1, 0.43963, 1404, 4.9545e8),
    (12, 110_100_912, 1_156_059_576, 19, 1, 0.28, 2205, 7.5970e8),
    (16, 234_881_792, 2_466_258_816, 19, 1, 0.13125, 4704, 1.5855e9),
    (20, 435_160_240, 4_569_182_520, 20, 1.4142, 0.10019, 4357, 2.8862e9),
    (24, 729_810_624, 7_663_011_552, 20, 1.4142, 0.05974, 7308, 4.7752e9),
    (26, 918_423_532, 9_643_447_086, 20, 1.4142, 0.04747, 9196, 5.9911e9),
    (32, 1_677_724_672, 17_616_109_056, 21, 2, 0.03675, 8400, 1.0771e10),
]


def make_plan(stage=None, **changes):
    defaults = {
        "scaling_parameters": D12,
        "reference_parameters": D12,
        "flops_per_token": 7.597e8,
        "sequence_len": 2048,
        "world_size": 1,
    }
    return plan(stage or StageConfig(), **(defaults | changes))


def test_a_run_of_less_than_one_token_is_refused_by_name():
    with pytest.raises(KestrelError, match=r"stage\.target_param_data_ratio=1e-12 is less than one token"):
        make_plan(StageConfig(target_param_data_ratio=1e-12))


@pytest.mark.parametrize("world_size", [1, 8])
@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: f"d{row[0]}")
def test_golden_table(row, world_size):
    _, S, D, log2_B, lr_scale, decay, N, flops = row
    got = make_plan(scaling_parameters=S, flops_per_token=flops, world_size=world_size)
    assert int(10.5 * S) == D
    assert got.total_batch_size == 2**log2_B
    assert got.num_iterations == N
    assert got.tokens == N * 2**log2_B
    assert got.lr_scale == pytest.approx(lr_scale, abs=5e-5)
    assert got.weight_decay == pytest.approx(decay, abs=5e-5)
    assert got.accumulation * got.device_batch_size * 2048 * world_size == got.total_batch_size


def test_iterations_come_before_flops_before_ratio():
    B = 2**19
    assert make_plan(StageConfig(num_iterations=7, target_flops=1e18)).num_iterations == 7
    flops = make_plan(StageConfig(target_flops=1e18))
    assert flops.num_iterations == round(1e18 / (7.597e8 * B)) == 2511
    assert make_plan().num_iterations == 1_156_059_576 // B


def test_flops_run_with_the_ratio_off_keeps_batch_and_decay():
    ratio = make_plan(StageConfig(target_flops=1e18), scaling_parameters=2 * D12)
    off = make_plan(StageConfig(target_flops=1e18, target_param_data_ratio=-1), scaling_parameters=2 * D12)
    assert (off.total_batch_size, off.num_iterations) == (ratio.total_batch_size, ratio.num_iterations)
    assert off.weight_decay == pytest.approx(ratio.weight_decay)


def test_auto_batch_leaves_at_least_400_steps():
    small = make_plan(scaling_parameters=1_000_000, sequence_len=256)
    assert small.num_iterations >= 400
    assert make_plan(scaling_parameters=1_000_000, sequence_len=256).total_batch_size == 2**14
    assert auto_batch_size(1_000_000 / D12, None) == 2**16, "without the rule the law gives four times as much"


@pytest.mark.parametrize("log2_batch", [11, 15, 17, 18, 19, 21])
def test_small_batches_keep_most_of_the_learning_rate_and_all_of_the_total_decay(log2_batch):
    got = make_plan(StageConfig(total_batch_size=2**log2_batch), scaling_parameters=D12 // 8)
    assert got.lr_scale == max(0.7, 2 ** ((log2_batch - 19) / 2))
    steps = int(10.5 * (D12 // 8)) / 2**log2_batch
    assert got.lr_scale * got.weight_decay * steps == pytest.approx(0.28 * int(10.5 * D12) / 2**19)


def test_given_steps_do_not_shrink_the_batch():
    assert make_plan(StageConfig(num_iterations=20)).total_batch_size == 2**19


def test_auto_batch_is_rounded_to_whole_rows_of_all_ranks():
    got = make_plan(world_size=3, device_batch_size=4)
    assert got.total_batch_size % (3 * 4 * 2048) == 0
    assert abs(got.total_batch_size - 2**19) <= 3 * 4 * 2048 / 2
    assert got.device_batch_size == 4
    assert make_plan(sequence_len=255).total_batch_size % 255 == 0
    assert make_plan(scaling_parameters=1000, device_batch_size=64).total_batch_size == 64 * 2048


def test_given_batch_must_divide_and_the_error_says_what_would():
    stage = StageConfig(total_batch_size=10_000, num_iterations=5)
    with pytest.raises(KestrelError, match=r"10000.*8 rows × 64 tokens × 2 ranks = 1024 tokens.*=9216 or 10240"):
        make_plan(stage, sequence_len=64, world_size=2, device_batch_size=8)
    with pytest.raises(KestrelError, match=r"use stage.total_batch_size=16384$"):
        make_plan(StageConfig(total_batch_size=100), sequence_len=2048, device_batch_size=8)
    with pytest.raises(KestrelError, match=r"or hardware.device_batch_size=6$"):
        make_plan(StageConfig(total_batch_size=12 * 64), sequence_len=64, device_batch_size=8)
    with pytest.raises(KestrelError, match=r"1 row × 64 tokens × 1 rank = 64 tokens"):
        make_plan(StageConfig(total_batch_size=100), sequence_len=64)


def test_every_nearest_value_the_error_names_works():
    for batch in (9216, 10240):
        got = make_plan(StageConfig(total_batch_size=batch), sequence_len=64, world_size=2, device_batch_size=8)
        assert got.total_batch_size == batch
        assert got.accumulation == batch // 1024


@pytest.mark.parametrize("rows", [1, 7, 12, 96, 97, 128])
@pytest.mark.parametrize("limit", [1, 5, 32, 1000])
def test_device_batch_divides_the_rows(rows, limit):
    d = largest_divisor(rows, limit)
    assert rows % d == 0
    assert d <= limit
    assert not any(rows % e == 0 for e in range(d + 1, min(rows, limit) + 1))


def test_device_batch_shrinks_with_the_model_and_with_memory():
    size = {"sequence_len": 2048, "n_layer": 12, "n_embd": 768, "parameters": 286_000_000}
    assert largest_device_batch(**size, memory_bytes=None) == 4
    assert largest_device_batch(**size | {"sequence_len": 20_000}, memory_bytes=None) == 1
    small, large = (largest_device_batch(**size, memory_bytes=gb * 10**9) for gb in (24, 80))
    assert 1 <= small < large == 32
    assert largest_device_batch(**size | {"n_layer": 48}, memory_bytes=8 * 10**9) == 1, "too small is the user's news"


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"name": "sft"}, "stage.name"),
        ({"num_iterations": 0}, "stage.num_iterations"),
        ({"total_batch_size": -5}, "stage.total_batch_size"),
        ({"target_flops": 0.0}, "stage.target_flops"),
        ({"target_param_data_ratio": -2.0}, "stage.target_param_data_ratio"),
        ({"eval_every": 0}, "stage.eval_every"),
        ({"sample_every": -3}, "stage.sample_every"),
        ({"save_every": 0}, "stage.save_every"),
        ({"eval_tokens": 0}, "stage.eval_tokens"),
        ({"keep_last": 0}, "stage.keep_last"),
        ({"sample_tokens": -1}, "stage.sample_tokens"),
        ({"target_param_data_ratio": -1.0}, "no length"),
    ],
)
def test_bad_stage_is_refused_by_name(changes, key):
    with pytest.raises(KestrelError, match=key):
        StageConfig(**changes)
