"""The optimizer on Triton's operations: the same steps as on the reference's, and copies that stay equal."""

import pytest
import torch

from optim.groups import MuonAdamWConfig, parameter_groups
from optim.muon_adamw import MuonAdamW
from tests.conftest import HAS_GPU
from tests.kernels.test_contract import BACKENDS, MODULES
from tests.optim.toy import Toy, random_gradients, set_gradients, toy_optimizer

STEPS = 4
# Muon decays a weight where update and weight share a sign; a sum in another order could turn it.
NO_DECAY = MuonAdamWConfig(weight_decay=0.0)


def train(model, optimizer, **options):
    norms = []
    for step in range(STEPS):
        gradients = random_gradients(model, step)
        set_gradients(model, [g.to(p.device) for g, p in zip(gradients, model.parameters())])
        norms.append(optimizer.step(1 - step / 10, 0.85 + step / 100, 1 - step / 20, **options).grad_norm)
    return norms


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
@pytest.mark.parametrize("options", [{}, {"grad_clip": 0.5}, {"inv_scale": 0.5}], ids=str)
def test_triton_takes_the_steps_of_the_reference(options, device):
    (a, ours), (b, theirs) = (
        toy_optimizer(Toy().to(device), NO_DECAY, MODULES[backend]) for backend in ("triton", "torch")
    )
    for got, expected in zip(train(a, ours, **options), train(b, theirs, **options)):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for (name, got), expected in zip(a.named_parameters(), b.parameters()):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    for name, expected in theirs.state_tensors().items():
        torch.testing.assert_close(ours.state_tensors()[name], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_follow_their_parameters(backend, device):
    """Those of whole groups and of parts; parameters without one do as before."""
    dtype = torch.bfloat16 if HAS_GPU or backend == "torch" else torch.float16
    model = Toy().to(device)
    names = ("unembedding_0", "value_embedding_1", "norm_0", "matrix_0", "matrix_4", "matrix_5")
    copies = {name: torch.zeros_like(getattr(model, name), dtype=dtype) for name in names}
    groups = parameter_groups(model, NO_DECAY, n_embd=24)
    train(model, MuonAdamW(groups, MODULES[backend], copies=copies))
    for name, copy in copies.items():
        assert torch.equal(copy, getattr(model, name).to(dtype)), name


@pytest.mark.gpu
@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
def test_a_captured_step_follows_its_rates(device):
    """Captured once, replayed with other rates and gradients: what eager steps give."""
    (a, graphed), (b, eager) = (toy_optimizer(Toy().to(device), NO_DECAY, MODULES["triton"]) for _ in range(2))
    for optimizer, model in ((graphed, a), (eager, b)):
        set_gradients(model, [g.to(device) for g in random_gradients(model, 0)])
        optimizer.step(1.0, 0.9, 1.0)
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=side):
        graphed.update()
    for step in range(1, STEPS):
        for p, q, g in zip(a.parameters(), b.parameters(), random_gradients(a, step)):
            p.grad.copy_(g)
            q.grad.copy_(g)
        graphed.set_rates(1 - step / 10, 0.85, 1.0)
        graph.replay()
        graphed.steps += 1
        eager.step(1 - step / 10, 0.85, 1.0)
    for (name, got), expected in zip(a.named_parameters(), b.parameters()):
        assert torch.equal(got, expected), name


@pytest.mark.gpu
@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
@pytest.mark.parametrize("options", [{}, {"grad_clip": 0.5}], ids=str)
def test_groups_side_by_side_are_groups_in_turn(options, device):
    """Whatever runs beside what, bit for bit; and memory that one stream is done with is not another's too early."""
    (a, beside), (b, in_turn) = (toy_optimizer(Toy().to(device), None, MODULES["triton"]) for _ in range(2))
    assert beside.streams is not None
    in_turn.streams = None
    for got, expected in zip(train(a, beside, **options), train(b, in_turn, **options)):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    for (name, got), expected in zip(a.named_parameters(), b.parameters()):
        assert torch.equal(got, expected), name
