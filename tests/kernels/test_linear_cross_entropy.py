"""The fused loss: against logits made whole, and everything that must not count."""

import sys

import pytest
import torch
import torch.nn.functional as F

import kernels_torch
from kernels_torch.cases import CASES
from tests.kernels.test_contract import BACKENDS, MODULES, run

CASE = CASES["linear_cross_entropy"]
WITH_OP = [backend for backend in BACKENDS if "linear_cross_entropy" in MODULES[backend].__all__]
FULL = {"N": 19, "D": 8, "V": 41, "padding": 23, "softcap": 15.0, "weights": True}


def whole(x, weight, targets, *, token_weights, vocab_size, softcap, reduction):
    """All logits at once, through PyTorch's own cross entropy."""
    z = (x @ weight.mT)[:, :vocab_size]
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    nll = F.cross_entropy(z, targets, ignore_index=-1, reduction="none")
    nll = nll if token_weights is None else nll * token_weights
    count = (targets != -1).sum()
    return {"none": nll, "sum": nll.sum(), "mean": nll.sum() / max(int(count), 1)}[reduction]


@pytest.mark.parametrize("backend", WITH_OP)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", CASE.check, ids=str)
def test_equals_the_loss_of_whole_logits(backend, shape, reduction, device):
    """Loss and every gradient, in fp64."""
    inputs = CASE.make(shape | {"reduction": reduction}, torch.float64, device)
    got = run(CASE.op, MODULES[backend].linear_cross_entropy, CASE.cast(inputs, torch.float64))
    expected = run(CASE.op, whole, inputs)
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", WITH_OP)
def test_padded_rows_at_10000_change_nothing(backend, device):
    """Not a bit of the loss or of a gradient; their own gradient is zero."""
    inputs = CASE.make(FULL, torch.float32, device)
    padded = CASE.cast(inputs, torch.float32)
    padded["weight"][41:] = 1e4
    one, other = (run(CASE.op, MODULES[backend].linear_cross_entropy, given) for given in (inputs, padded))
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
    assert torch.equal(other["gradient of weight"][41:], torch.zeros_like(padded["weight"][41:]))


@pytest.mark.parametrize("backend", WITH_OP)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_targets_loss_and_gradients_are_zero(backend, reduction, device):
    """A batch of conversations may supervise nothing: never NaN."""
    inputs = CASE.make(FULL | {"ignored": 1.0, "reduction": reduction}, torch.float32, device)
    for name, value in run(CASE.op, MODULES[backend].linear_cross_entropy, inputs).items():
        assert torch.equal(value, torch.zeros_like(value)), name


@pytest.mark.parametrize("backend", WITH_OP)
def test_ignored_rows_do_not_count_whatever_they_hold(backend, device):
    """Neither in the sum nor in the number it is divided by; their weight may be NaN, their gradient is zero."""
    inputs = CASE.make(FULL, torch.float64, device)
    ignored = inputs["targets"] == -1
    assert 0 < ignored.sum() < len(ignored)
    kept = {name: inputs[name][~ignored] for name in ("x", "targets", "token_weights")}
    expected = MODULES[backend].linear_cross_entropy(**inputs | kept)
    inputs["token_weights"][ignored] = torch.nan
    got = run(CASE.op, MODULES[backend].linear_cross_entropy, inputs)
    torch.testing.assert_close(got["output 0"], expected, rtol=1e-12, atol=1e-12)
    for name in ("gradient of x", "gradient of token_weights"):
        assert torch.equal(got[name][ignored], torch.zeros_like(got[name][ignored])), name


@pytest.mark.parametrize("backend", WITH_OP)
def test_another_ignore_index(backend, device):
    inputs = CASE.make(FULL, torch.float64, device)
    function = MODULES[backend].linear_cross_entropy
    renamed = inputs | {"targets": inputs["targets"].where(inputs["targets"] != -1, -100), "ignore_index": -100}
    assert torch.equal(function(**inputs), function(**renamed))


@pytest.mark.parametrize("backend", WITH_OP)
def test_uniform_logits_cost_log_v(backend, device):
    """The loss of a model that knows nothing: log of the vocabulary without its padding."""
    inputs = CASE.make(FULL | {"weights": False, "ignored": 0.0}, torch.float64, device)
    inputs["weight"].zero_()
    expected = torch.tensor(41.0, dtype=torch.float64, device=device).log()
    torch.testing.assert_close(MODULES[backend].linear_cross_entropy(**inputs), expected)


@pytest.mark.parametrize("backend", WITH_OP)
def test_advantages_as_weights_give_the_policy_gradient(backend, device):
    """Weights may be negative; minus a weight is minus the gradient."""
    inputs = CASE.make(FULL, torch.float64, device)
    negated = CASE.cast(inputs, torch.float64)
    negated["token_weights"].neg_()
    up, down = (run(CASE.op, MODULES[backend].linear_cross_entropy, given) for given in (inputs, negated))
    torch.testing.assert_close(up["gradient of x"], -down["gradient of x"])
    torch.testing.assert_close(up["output 0"], -down["output 0"])


@pytest.mark.parametrize("chunk_logits", [1, 41 * 3, 41 * 19, 10**6])
def test_the_size_of_chunks_changes_nothing_but_memory(chunk_logits, device, monkeypatch):
    """One row at a time, chunks that do not divide the rows, exactly all rows, more than all."""
    inputs = CASE.make(FULL, torch.float64, device)
    expected = run(CASE.op, whole, CASE.cast(inputs, torch.float64))
    module = sys.modules["kernels_torch.linear_cross_entropy"]
    monkeypatch.setattr(module, "CHUNK_LOGITS", {"cpu": chunk_logits, "cuda": chunk_logits})
    for name, value in run(CASE.op, kernels_torch.linear_cross_entropy, inputs).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-11, atol=1e-12)


def test_whole_logits_never_exist(monkeypatch):
    """No tensor of a forward and backward pass is larger than a chunk of logits, the inputs or their gradients."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **kwargs or {})
            tensors = out if isinstance(out, tuple | list) else [out]
            largest = max([largest, *(t.numel() for t in tensors if isinstance(t, torch.Tensor))])
            return out

    module = sys.modules["kernels_torch.linear_cross_entropy"]
    monkeypatch.setattr(module, "CHUNK_LOGITS", {"cpu": 8 * 64})
    inputs = CASE.make({"N": 512, "D": 4, "V": 64}, torch.float32, "cpu")
    with Watch():
        run(CASE.op, kernels_torch.linear_cross_entropy, inputs)
    assert 8 * 64 <= largest <= 512 * 4
