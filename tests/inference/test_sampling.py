"""Draws follow the distribution the settings describe, and nothing but (seed, sample, step) decides them."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import KestrelError
from inference.sampling import (
    Plan,
    SamplingConfig,
    Settings,
    likely,
    log_probabilities,
    penalise,
    sample,
    settings_of,
)
from kernels_torch.draw_tokens import gumbel, gumbel_noise, keep_best, mix
from tests.model.test_decode import NoHostSync

PLAIN = {"temperature": 1.0, "top_k": 0}


def final_scores(
    logits: torch.Tensor,
    config: SamplingConfig | Settings,
    history: torch.Tensor | None = None,
    plan: Plan | None = None,
) -> torch.Tensor:
    """Scores [B, V] whose softmax is what is drawn from; at temperature 0 the penalised logits."""
    if isinstance(config, SamplingConfig):
        config, plan = settings_of(config, len(logits), logits.device), Plan.of([config])
    scores = logits.float() if history is None else penalise(logits.float(), history, config)
    if not plan.draws:
        return scores
    top_k = likely(scores, config, plan) if plan.nucleus else config["top_k"]
    scores = keep_best(scores, top_k, scores.shape[1])
    temperature = torch.where(config["temperature"] == 0, 1.0, config["temperature"])[:, None]
    return (scores - scores.amax(dim=-1, keepdim=True)) / temperature


def support(logits: list[float], **sampling) -> set[int]:
    """The tokens that can be drawn at all."""
    scores = final_scores(torch.tensor([logits]), SamplingConfig(**{**PLAIN, **sampling}))[0]
    return set(scores.isfinite().nonzero()[:, 0].tolist())


def probabilities(*p: float) -> list[float]:
    return [math.log(x) for x in p]


# Which tokens are left.


def test_greedy_takes_the_first_of_the_highest():
    logits = torch.tensor([[1.0, 3, 2, 3], [0, 0, 0, 0], [-2, -1, -1, -3]])
    assert sample(logits, SamplingConfig(temperature=0)).tolist() == [1, 0, 1]


def test_top_k_keeps_exactly_k_and_among_equals_the_lowest_index():
    assert support([1.0, 5, 3, 3, 3], top_k=3) == {1, 2, 3}
    assert support([0.0] * 7, top_k=4) == {0, 1, 2, 3}
    assert support([0.0, 1, 2], top_k=1) == {2}
    assert support([0.0, 1, 2], top_k=0) == support([0.0, 1, 2], top_k=3) == support([0.0, 1, 2], top_k=99) == {0, 1, 2}


def test_top_p_keeps_the_token_that_crosses_p():
    quarters = [0.0] * 4
    assert support(quarters, top_p=0.25) == {0}  # the first one reaches p already
    assert support(quarters, top_p=0.26) == {0, 1}
    assert support(quarters, top_p=0.75) == {0, 1, 2}
    assert support(quarters, top_p=1.0) == {0, 1, 2, 3}
    shuffled = probabilities(0.15, 0.5, 0.05, 0.3)
    assert support(shuffled, top_p=1e-9) == {1}
    assert support(shuffled, top_p=0.6) == {1, 3}
    assert support(shuffled, top_p=0.9) == {0, 1, 3}


def test_top_p_counts_what_top_k_left_as_everything():
    logits = probabilities(0.4, 0.3, 0.2, 0.1)
    assert support(logits, top_p=0.5) == {0, 1}
    assert support(logits, top_k=2, top_p=0.5) == {0}  # 0.4 of the 0.7 that are left
    assert support(logits, top_k=3, top_p=0.8) == {0, 1, 2}


def test_temperature_comes_before_top_p():
    logits = probabilities(0.4, 0.3, 0.2, 0.1)
    assert support(logits, temperature=0.1, top_p=0.9) == {0}
    assert support(logits, temperature=10, top_p=0.9) == {0, 1, 2, 3}


def kept_by_hand(logits: list[float], top_k: int, top_p: float) -> set[int]:
    """The rules as one would explain them, one token at a time."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: top_k or None]
    total = math.fsum(math.exp(logits[i]) for i in order)
    kept, mass = set(), 0.0
    for i in order:
        if mass / total >= top_p:
            break
        kept.add(i)
        mass += math.exp(logits[i])
    return kept


# Integers over 4 meet often, and no sum of their exponentials comes close to a p of this grid by less than rounding.
@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(-20, 20).map(lambda x: x / 4), min_size=1, max_size=12),
    st.integers(0, 13),
    st.sampled_from([1e-6, 0.1234567, 0.3456789, 0.6180339, 0.9012345, 1.0]),
)
def test_top_k_then_top_p_keep_what_the_rules_say(logits, top_k, top_p):
    assert support(logits, top_k=top_k, top_p=top_p) == kept_by_hand(logits, top_k, top_p)


def test_what_is_kept_keeps_its_proportions():
    logits = torch.tensor([probabilities(0.4, 0.3, 0.2, 0.1)])
    left = final_scores(logits, SamplingConfig(temperature=1, top_k=3)).softmax(-1)
    torch.testing.assert_close(left, torch.tensor([[4 / 9, 3 / 9, 2 / 9, 0]]))


# The repetition penalty.


def test_penalty_never_rewards_a_repeated_token():
    logits = torch.linspace(-3, 3, 13)[None]
    history = torch.tensor([[0, 3, 6, 9, 12, -1, -1]])
    penalised = final_scores(logits, SamplingConfig(temperature=0, repetition_penalty=2.0), history)
    repeated = torch.zeros(13, dtype=torch.bool)
    repeated[history[0, :5]] = True
    expected = torch.where(logits > 0, logits / 2, logits * 2)
    assert penalised[0, repeated].equal(expected[0, repeated])
    assert penalised[0, ~repeated].equal(logits[0, ~repeated])
    assert (penalised <= logits).all()


def test_penalty_counts_a_token_once_and_each_row_for_itself():
    logits = torch.ones(2, 3)
    history = torch.tensor([[1, 1, 1], [-1, -1, 2]])
    config = SamplingConfig(temperature=0, repetition_penalty=4.0)
    assert final_scores(logits, config, history).tolist() == [[1, 0.25, 1], [1, 1, 0.25]]
    assert sample(torch.tensor([[1.0, 2]] * 2), config, history=torch.tensor([[1], [-1]])).tolist() == [0, 1]


def test_penalty_comes_before_temperature_and_top_k():
    logits, history = torch.tensor([[4.0, 3, 0]]), torch.tensor([[0]])
    config = SamplingConfig(temperature=0.5, top_k=1, repetition_penalty=2.0)
    assert final_scores(logits, config, history).tolist() == [[-torch.inf, 0, -torch.inf]]


def test_frequency_counts_every_time_and_presence_once():
    logits, history = torch.tensor([[1.0, -1, 2, 3]] * 2), torch.tensor([[0, 0, 1, -1], [2, 2, 2, 2]])
    config = SamplingConfig(temperature=0, frequency_penalty=0.5, presence_penalty=0.25)
    expected = [[1 - 1.25, -1 - 0.75, 2, 3], [1, -1, 2 - 2.25, 3]]
    assert final_scores(logits, config, history).tolist() == expected
    config = SamplingConfig(temperature=0, repetition_penalty=2, frequency_penalty=0.5, presence_penalty=-0.25)
    assert final_scores(logits, config, history)[0].tolist() == [0.5 - 1 + 0.25, -2 - 0.5 + 0.25, 2, 3]


# Rows with settings of their own.


def test_every_row_keeps_what_its_own_settings_say():
    configs = [
        SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
        for temperature in (0, 0.5, 1)
        for top_k in (0, 1, 3, 99)
        for top_p in (0.4, 0.9, 1)
    ]
    logits, n = torch.randn(1, 12), len(configs)
    parts = [settings_of(config, 1, "cpu") for config in configs]
    together = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    scores = final_scores(logits.expand(n, -1), together, plan=Plan.of(configs))
    drawn = sample(logits.expand(n, -1), together, Plan.of(configs), rows=torch.zeros(n, dtype=torch.int64), step=3)
    for row, config in enumerate(configs):
        assert drawn[row] == sample(logits, config, step=3)[0]
        if config.temperature > 0:
            assert scores[row].equal(final_scores(logits, config)[0])


def test_log_probabilities_are_of_the_logits_as_they_are():
    logits, ids = torch.randn(3, 9), torch.tensor([4, 0, 8])
    log_p, top, top_ids = log_probabilities(logits, ids, 2)
    assert log_p.equal(logits.log_softmax(-1)[torch.arange(3), ids])
    assert top_ids.equal(logits.topk(2).indices)
    assert top.equal(logits.log_softmax(-1).topk(2).values)
    assert log_probabilities(logits, ids)[1].shape == (3, 0)


# The draw.


def chi_square_p(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """How likely counts as uneven as these are; an odd number of cells, so that a closed form exists."""
    half, pairs = ((counts - expected) ** 2 / expected).sum().item() / 2, (len(counts) - 1) // 2
    assert len(counts) % 2 == 1
    return math.exp(-half) * sum(half**i / math.factorial(i) for i in range(pairs))


def by_rows(logits, config, n):
    return sample(logits.expand(n, -1), config)


def by_steps(logits, config, n):
    return sample(logits.expand(n, -1), config, rows=torch.zeros(n, dtype=torch.int64), step=torch.arange(n))


def by_seeds(logits, config, n):
    draws = [sample(logits, SamplingConfig(**{**vars(config), "seed": seed})) for seed in range(n)]
    return torch.cat(draws)


@pytest.mark.parametrize(("draw", "n"), [(by_rows, 50_000), (by_steps, 50_000), (by_seeds, 3_000)])
def test_draws_follow_the_distribution(draw, n):
    logits = torch.tensor([[0.0, 1.5, -1, 0.3, 0.3, 2, -0.5, 0.9, 1.1]])
    config = SamplingConfig(temperature=0.7, top_k=0)
    counts = draw(logits, config, n).bincount(minlength=9).double()
    assert chi_square_p(counts, n * (logits.double() / 0.7).softmax(-1)[0]) > 1e-5


@pytest.mark.parametrize("near", ["step", "row"])
def test_neighbouring_draws_are_independent(near):
    n, config = 40_000, SamplingConfig(**PLAIN)
    zero, count = torch.zeros(n, dtype=torch.int64), torch.arange(n)
    first, second = (
        sample(
            torch.zeros(n, 3), config, **({"rows": zero, "step": count + d} if near == "step" else {"rows": count + d})
        )
        for d in (0, 1)
    )
    pairs = (3 * first[::2] + second[::2]).bincount(minlength=9).double()
    assert chi_square_p(pairs, torch.full((9,), n / 18, dtype=torch.float64)) > 1e-5


def test_a_row_alone_draws_what_it_draws_in_a_batch():
    logits, config = torch.randn(7, 61), SamplingConfig(temperature=1.0, top_k=20, top_p=0.9)
    steps = torch.tensor([0, 5, 5, 9, 100, 3, 2**40])
    together = sample(logits, config, step=steps)
    order = torch.tensor([3, 6, 0, 2, 5, 1, 4])
    assert sample(logits[order], config, rows=order, step=steps[order]).equal(together[order])
    for row in range(7):
        alone = sample(logits[row : row + 1], config, rows=torch.tensor([row]), step=int(steps[row]))
        assert alone.item() == together[row].item()


def test_same_seed_same_draw_and_another_seed_another():
    logits = torch.zeros(1, 1000)
    draws = {seed: by_steps(logits, SamplingConfig(**PLAIN, seed=seed), 50) for seed in (0, 1, 42, 2**63 - 1)}
    assert by_steps(logits, SamplingConfig(**PLAIN, seed=42), 50).equal(draws[42])
    for a in draws:
        for b in draws:
            assert a == b or (draws[a] == draws[b]).sum() <= 3  # of 50 one in 1000 agrees by chance


def test_the_global_generator_is_left_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    sample(torch.zeros(2, 5), SamplingConfig())
    assert torch.get_rng_state().equal(before)


def test_hash_is_splitmix64():
    def by_hand(x: int) -> int:
        mask = 2**64 - 1
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    numbers = [0, 1, -1, 2**62, -(2**63), 123456789, -987654321987654321]
    got = mix(torch.tensor(numbers)).tolist()
    assert [x % 2**64 for x in got] == [by_hand(x % 2**64) for x in numbers]


def test_noise_falls_and_stays_finite_over_all_bits():
    noise = gumbel(torch.tensor([0, 1, 2**31, 2**32 - 2, 2**32 - 1]))
    assert noise.isfinite().all()
    assert noise.equal(noise.sort(descending=True).values)


def test_noise_has_the_mean_and_variance_of_gumbels_distribution():
    noise = gumbel_noise(7, torch.arange(1000), 3, 1000).double()
    n = noise.numel()
    variance = math.pi**2 / 6
    assert abs(noise.mean() - 0.5772156649) < 5 * math.sqrt(variance / n)
    assert abs(noise.var() - variance) < 5 * variance * math.sqrt((5.4 - 1) / n)  # 5.4: its kurtosis


def test_impossible_tokens_are_never_drawn():
    logits = torch.full((4000, 6), -torch.inf)
    logits[:, [1, 4]] = 0.0
    assert set(sample(logits, SamplingConfig(top_k=0)).tolist()) == {1, 4}
    assert set(sample(logits, SamplingConfig(top_k=5, top_p=0.999)).tolist()) == {1, 4}


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-6])
def test_a_tiny_temperature_is_greedy(temperature):
    logits = torch.randn(50, 33)
    assert sample(logits, SamplingConfig(temperature=temperature, top_p=0.9)).equal(logits.argmax(-1))


def test_half_precision_logits_are_judged_in_fp32():
    logits = torch.randn(9, 33).bfloat16()
    assert sample(logits, SamplingConfig()).equal(sample(logits.float(), SamplingConfig()))


EVERYTHING = SamplingConfig(temperature=0.9, top_k=7, top_p=0.8, repetition_penalty=1.3, frequency_penalty=0.1)


def test_sampling_never_waits_for_the_device():
    logits, history = torch.randn(3, 20), torch.tensor([[1, -1]] * 3)
    with NoHostSync():
        sample(logits, EVERYTHING, history=history, step=torch.tensor([1, 2, 3]))
        sample(logits, SamplingConfig(temperature=0))


@pytest.mark.gpu
def test_a_gpu_draws_what_the_cpu_draws_without_waiting(device):
    logits, history = torch.randn(64, 5000), torch.randint(-1, 5000, (64, 512))
    on_gpu = logits.to(device), history.to(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        drawn = [sample(on_gpu[0], EVERYTHING, history=on_gpu[1], step=step) for step in range(50)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    same = [sample(logits, EVERYTHING, history=history, step=step).eq(drawn[step].cpu()) for step in range(50)]
    assert torch.stack(same).float().mean() > 0.999  # exp and log round differently
    ties = torch.zeros(5, 70_000, device=device)
    assert sample(ties, SamplingConfig(temperature=0)).tolist() == [0] * 5
    assert final_scores(ties, SamplingConfig(top_k=3)).isfinite().nonzero()[:, 1].tolist() == [0, 1, 2] * 5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 11.0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_k", 10**20),
        ("top_k", 2.5),
        ("temperature", None),
        ("max_new_tokens", 2.5),
        ("num_samples", 2.5),
        ("seed", 1.5),
        ("repetition_penalty", 1e300),
        ("repetition_penalty", 1e-300),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", math.inf),
        ("frequency_penalty", math.nan),
        ("frequency_penalty", 101.0),
        ("presence_penalty", -101.0),
        ("max_new_tokens", 0),
        ("max_new_tokens", -5),
        ("num_samples", 0),
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_a_bad_setting_is_refused_by_name_and_value(key, value):
    with pytest.raises(KestrelError, match=rf"^{key} must be .*got {re.escape(str(value))}$"):
        SamplingConfig(**{key: value})
