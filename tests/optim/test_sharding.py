"""Two and three processes do what one does with the averaged gradient, for any shape, and share one saved state."""

import pytest
import torch

from optim.sharding import Ranks
from tests import warm
from tests.optim.rank_worker import CLIP, CONFIGS, NO_DECAY, STEPS, averaged_gradients, local_state_numbers, train
from tests.optim.toy import Toy, snapshot, toy_optimizer

WORLD_SIZES = (2, 3)


def alone(world_size, config=None, steps=range(STEPS), **options):
    """One process with the gradient that `world_size` ranks would average to."""
    model, optimizer = toy_optimizer(config=config)
    results = train(model, optimizer, lambda m, step: averaged_gradients(m, world_size, step), steps, **options)
    return model, optimizer, results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """(world size, rank) → what that rank computed."""
    folder = tmp_path_factory.mktemp("ranks")
    for world_size in WORLD_SIZES:
        for name, config in CONFIGS.items():
            model, optimizer, _ = alone(world_size, config)
            saved = {"parameters": snapshot(model), "state": optimizer.state_tensors()}
            torch.save(saved, folder / f"single_{world_size}_{name}.pt")
    warm.run_ranks("tests.optim.rank_worker", 3, str(folder))
    return {(W, r): torch.load(folder / f"ranks_{W}_{r}.pt") for W in WORLD_SIZES for r in range(W)}


each_world = pytest.mark.parametrize("world_size", WORLD_SIZES)
each_config = pytest.mark.parametrize("name", CONFIGS)


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(got[key], expected[key], rtol=1e-5, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


@each_world
@each_config
def test_ranks_equal_one_process_with_the_averaged_gradient(ranks, world_size, name):
    model, _, results = alone(world_size, CONFIGS[name])
    for rank in range(world_size):
        got = ranks[world_size, rank][name]
        assert_same(got["parameters"], snapshot(model))
        torch.testing.assert_close(got["norms"], [r.grad_norm for r in results])


@each_world
@each_config
def test_all_ranks_hold_bitwise_the_same_parameters(ranks, world_size, name):
    first = ranks[world_size, 0][name]["parameters"]
    for rank in range(1, world_size):
        for key, value in ranks[world_size, rank][name]["parameters"].items():
            assert torch.equal(value, first[key]), key


@each_world
@each_config
def test_state_saved_by_ranks_is_the_state_of_one_process(ranks, world_size, name):
    _, optimizer, _ = alone(world_size, CONFIGS[name])
    assert_same(ranks[world_size, 0][name]["state"], optimizer.state_tensors())
    assert all(ranks[world_size, rank][name]["state"] == {} for rank in range(1, world_size))


@each_world
@each_config
def test_state_of_one_process_continues_on_ranks(ranks, world_size, name):
    model, *_ = alone(world_size, CONFIGS[name], steps=range(STEPS + 2))
    assert_same(ranks[world_size, 0][name]["continued"], snapshot(model))


@each_world
@each_config
def test_state_of_ranks_continues_in_one_process(ranks, world_size, name):
    expected, *_ = alone(world_size, CONFIGS[name], steps=range(STEPS + 2))
    saved = ranks[world_size, 0][name]
    model = Toy(seed=5)
    model.load_state_dict(saved["parameters"])
    _, optimizer = toy_optimizer(model, CONFIGS[name])
    optimizer.load_state_tensors(saved["state"])
    train(model, optimizer, lambda m, step: averaged_gradients(m, world_size, step), range(STEPS, STEPS + 2))
    assert_same(snapshot(model), snapshot(expected))


@each_world
def test_gradients_leave_while_the_backward_pass_runs(ranks, world_size):
    """From the second step on, when all ranks know the order; the numbers are those of one process."""
    model, optimizer, _ = alone(world_size, NO_DECAY)
    for rank in range(world_size):
        got = ranks[world_size, rank]["early"]
        assert got["begun"] == [0] + [got["n_buckets"]] * (STEPS - 1)
        assert_same(got["parameters"], snapshot(model))
    assert_same(ranks[world_size, 0]["early"]["state"], optimizer.state_tensors())


@each_world
def test_gradients_may_travel_in_bf16(ranks, world_size):
    """Rounded on the way and nowhere else: after Muon's and Adam's normalisation, steps differ by little."""
    before = snapshot(Toy())
    model, _, _ = alone(world_size, NO_DECAY, range(1))
    for name, exact in snapshot(model).items():
        got = ranks[world_size, 0]["in bf16"]["parameters"][name]
        assert (got - exact).norm() <= 0.1 * (exact - before[name]).norm(), name
        assert torch.equal(got, ranks[world_size, 1]["in bf16"]["parameters"][name])
    moved = (
        torch.equal(ranks[world_size, 0]["in bf16"]["parameters"][name], exact)
        for name, exact in snapshot(model).items()
    )
    assert not all(moved)  # it was rounded


@each_world
@each_config
def test_only_small_parameters_have_their_state_on_every_rank(ranks, world_size, name):
    _, optimizer, _ = alone(world_size, CONFIGS[name], steps=[])
    adamw = [p for group in optimizer.groups if not hasattr(group, "momentum") for p in group.params]
    twice = 2 * sum(p.numel() for p in adamw if p.numel() < 1024)
    parts = [ranks[world_size, rank][name]["local_numbers"] for rank in range(world_size)]
    assert sum(parts) == local_state_numbers(optimizer) + (world_size - 1) * twice


@each_world
def test_clipping_uses_the_norm_over_all_shards(ranks, world_size):
    model, *_ = alone(world_size, NO_DECAY, grad_clip=CLIP)
    reference, optimizer = toy_optimizer(config=NO_DECAY)
    norms = []
    for step in range(STEPS):
        for p, g in zip(reference.parameters(), averaged_gradients(reference, world_size, step)):
            p.grad = g
        norms.append(torch.nn.utils.clip_grad_norm_(reference.parameters(), CLIP))
        optimizer.step(1 - step / 10, 0.85 + step / 100, 1 - step / 20)
    for rank in range(world_size):
        got = ranks[world_size, rank]["clipped"]
        assert_same(got["parameters"], snapshot(model))
        assert_same(got["parameters"], snapshot(reference))
        torch.testing.assert_close(got["norms"], norms)


@each_world
def test_overflow_on_one_rank_skips_the_step_on_all(ranks, world_size):
    model, *_ = alone(world_size, steps=range(3))
    for rank in range(world_size):
        got = ranks[world_size, rank]["skipping"]
        assert got["all_skipped"]
        assert got["unchanged"]
        assert got["then_good"]
        assert got["steps"] == 3
        assert_same(got["parameters"], snapshot(model))


@each_world
def test_any_number_of_rows_is_averaged_and_gathered(ranks, world_size):
    for rank in range(world_size):
        assert all(ranks[world_size, rank]["collectives"])


def test_one_process_communicates_nothing_and_copies_nothing():
    ranks, x = Ranks(), torch.randn(3, 2)
    assert (ranks.rank, ranks.size) == (0, 1)
    assert ranks.average_rows(x)() is x
    assert ranks.gather_rows(x, 3)() is x
    assert ranks.average_all([x])()[0] is x


@pytest.mark.parametrize("n", [1, 2, 5, 12, 13])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_cover_every_row_once(n, size):
    ranks, rows = Ranks(), []
    ranks.size = size
    for rank in range(size):
        ranks.rank = rank
        rows += range(n)[ranks.share(n)]
    assert rows == list(range(n))
