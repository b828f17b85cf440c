"""The schedules at the steps nanochat's own code was evaluated at, and at the edges it leaves undefined."""

import pytest

from optim.groups import AdamWConfig, MuonAdamWConfig
from optim.schedules import cosine_to_zero, make_schedule, muon_momentum, trapezoid, warmup_cosine

NANOCHAT = {"warmup_steps": 40, "warmdown_ratio": 0.65, "final_frac": 0.05}


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.025), (39, 1), (40, 1), (350, 1), (351, 0.9985385), (675, 0.525), (1000, 0.05)]
)
def test_trapezoid_golden_values(step, expected):
    assert trapezoid(step, 1000, **NANOCHAT) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 39, 60, 114, 115, 1000])
def test_trapezoid_of_any_length_rises_once_and_falls_once(n):
    values = [trapezoid(step, n, **NANOCHAT) for step in range(n + 1)]
    top = values.index(max(values))
    assert max(values) == 1, "a short run leaves its warm-up too"
    assert values[: top + 1] == sorted(values[: top + 1])
    assert values[top:] == sorted(values[top:], reverse=True)
    assert values[-1] == pytest.approx(0.05)


def test_trapezoid_without_warmup_or_warmdown_is_constant():
    assert {trapezoid(s, 7, warmup_steps=0, warmdown_ratio=0.0, final_frac=0.0) for s in range(8)} == {1.0}


@pytest.mark.parametrize("n", [1, 2, 5, 150, 1000])
def test_cosine_rises_to_one_and_ends_at_final_frac(n):
    values = [warmup_cosine(step, n, warmup_steps=100, final_frac=0.1) for step in range(n + 1)]
    warmup = min(100, max(1, n // 2))
    assert values[warmup - 1] == 1
    assert values[:warmup] == sorted(values[:warmup])
    assert values[warmup:] == sorted(values[warmup:], reverse=True)
    if n > 1:
        assert values[-1] == pytest.approx(0.1)
        assert n == 2 or 0.1 < values[(n + warmup) // 2] < 1


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.85), (200, 0.91), (399, 0.9697), (400, 0.96461538), (675, 0.935), (1000, 0.90)]
)
def test_momentum_golden_values_and_the_jump_at_400(step, expected):
    assert muon_momentum(step, 1000, warmdown_ratio=0.65) == pytest.approx(expected, abs=1e-8)


def test_momentum_rests_at_its_peak_in_long_runs():
    assert muon_momentum(400, 4000, warmdown_ratio=0.65) == 0.97
    assert muon_momentum(1399, 4000, warmdown_ratio=0.65) == 0.97
    assert muon_momentum(1401, 4000, warmdown_ratio=0.65) < 0.97
    assert muon_momentum(500, 500, warmdown_ratio=0.0) == 0.97


def test_weight_decay_follows_half_a_cosine():
    assert [cosine_to_zero(step, 100) for step in (0, 50, 100)] == pytest.approx([1, 0.5, 0])
    assert cosine_to_zero(25, 100) == pytest.approx(0.8535534)


def test_make_schedule_takes_the_configured_shape():
    muon = make_schedule(MuonAdamWConfig(), 1000)
    assert muon(675) == pytest.approx((0.525, 0.935, cosine_to_zero(675, 1000)))
    adamw = make_schedule(AdamWConfig(), 1000)
    assert adamw(50).lr_mult == pytest.approx(0.51)
    assert adamw(1000).lr_mult == pytest.approx(0.1)
    custom = make_schedule(MuonAdamWConfig(warmup_steps=10, warmdown_ratio=0.5, final_lr_frac=0.2), 100)
    assert [custom(s).lr_mult for s in (0, 9, 50, 75, 100)] == pytest.approx([0.1, 1, 1, 0.6, 0.2])
