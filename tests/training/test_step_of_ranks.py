"""A step of several ranks: captured with its messages, captured without them and eager, the same numbers.

On a CPU through recorded graphs and gloo; on GPUs through CUDA graphs and NCCL.
"""

import pytest
import torch

from tests import warm
from tests.training.rank_step import CASES, cases_of
from tests.training.test_step import STEPS
from training.step import EAGER_STEPS

WORLD_SIZES = (3, 2)  # three share no number of matrices evenly


def run_ranks(folder, world_sizes, kernels=None):
    warm.run_ranks("tests.training.rank_step", max(world_sizes), str(folder), world_sizes, kernels)
    return {(W, r): torch.load(folder / f"steps_{W}_{r}.pt") for W in world_sizes for r in range(W)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """(world size, rank) → what that rank computed."""
    return run_ranks(tmp_path_factory.mktemp("steps"), WORLD_SIZES)


each_world = pytest.mark.parametrize("world_size", WORLD_SIZES)
each_world_and_case = pytest.mark.parametrize(
    ("world_size", "case"), [(W, case) for W in WORLD_SIZES for case in cases_of(W)]
)


def assert_same(ours: dict, theirs: dict) -> None:
    assert ours["seen"] == theirs["seen"]
    assert ours["state"].keys() == theirs["state"].keys()
    for name, value in ours["state"].items():
        assert torch.equal(value, theirs["state"][name]), name


@pytest.mark.parametrize("kind", ["captured", "local"])
@each_world_and_case
def test_captured_equals_eager(ranks, world_size, case, kind):
    """With a validation and a checkpoint's state gathered among eager steps and among captured ones."""
    for rank in range(world_size):
        mine = ranks[world_size, rank]
        assert_same(mine[case, kind], mine[case, "eager"])
        assert mine[case, kind]["released"]


@each_world_and_case
def test_all_ranks_hold_bitwise_the_same_parameters(ranks, world_size, case):
    first = ranks[world_size, 0][case, "captured"]["state"]
    for rank in range(1, world_size):
        for name, value in ranks[world_size, rank][case, "captured"]["state"].items():
            assert torch.equal(value, first[name]), name


def messages(operations):
    return [operation for operation in operations if operation[0].startswith("c10d")]


@each_world_and_case
def test_every_rank_records_the_same_messages_in_the_same_order(ranks, world_size, case):
    recorded = [ranks[world_size, rank][case, "captured"]["operations"] for rank in range(world_size)]
    for graphs in zip(*recorded, strict=True):
        assert all(messages(graph) == messages(graphs[0]) for graph in graphs)
    *others, last = recorded[0]
    assert len(recorded[0]) == {1: 1, 2: 2, 3: 3}[CASES[case].get("accumulation", 1)]
    assert not any(messages(graph) for graph in others)
    assert len(messages(last)) > ranks[world_size, 0][case, "captured"]["n_buckets"]
    assert not any(messages(g) for r in range(world_size) for g in ranks[world_size, r][case, "local"]["operations"])


@each_world_and_case
def test_captured_gradients_leave_while_the_backward_pass_runs(ranks, world_size, case):
    """Between two operations that make gradients: all but the last of the table's are begun before it is made."""
    names = [name for name, _ in ranks[world_size, 0][case, "captured"]["operations"][-1]]
    backward_ends = len(names) - 1 - names[::-1].index("aten.embedding_dense_backward.default")
    first_gather = names.index("c10d._allgather_base_.default")
    reduced = [i for i in range(first_gather) if names[i] == "c10d._reduce_scatter_base_.default"]
    assert sum(i < backward_ends for i in reduced) >= 0.8 * len(reduced)


@each_world
def test_eager_gradients_leave_while_the_backward_pass_runs(ranks, world_size):
    got = ranks[world_size, 0]["muon", "captured"]
    n = got["n_buckets"]
    assert got["begun"] == [0] + [n] * (EAGER_STEPS - 1) + [0] * (STEPS - EAGER_STEPS)
    assert ranks[world_size, 0]["muon", "local"]["begun"] == [0] * STEPS


@each_world
def test_no_rank_waits_for_one_that_cannot_capture(ranks, world_size):
    for rank in range(world_size - 1):
        assert ranks[world_size, rank]["failing"].startswith("another rank cannot capture its step as a CUDA graph")
    assert ranks[world_size, world_size - 1]["failing"] == "no graph here"


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_cuda_graphs_with_messages_equal_eager_steps(kernels, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    ranks = run_ranks(tmp_path, (2,), kernels)
    for case in CASES:
        for kind in ("captured", "local"):
            for rank in range(2):
                assert_same(ranks[2, rank][case, kind], ranks[2, rank][case, "eager"])
