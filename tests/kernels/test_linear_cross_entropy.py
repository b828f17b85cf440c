"""The fused loss: against logits made whole, and everything that must not count."""

import sys

import pytest
import torch
import torch.nn.functional as F

import kernels_torch
from kernels_torch.cases import CASES
from tests.conftest import HAS_GPU
from tests.kernels.test_contract import BACKENDS, MODULES, judge, run

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


def in_chunks_of(backend, logits, monkeypatch):
    """Have the backend work on so many fp64 logits at a time."""
    if backend == "torch":
        monkeypatch.setattr(source(backend), "CHUNK_LOGITS", {"cpu": logits, "cuda": logits})
    else:
        monkeypatch.setattr(source(backend), "CHUNK_BYTES", 8 * logits)


def source(backend):
    return sys.modules[f"kernels_{backend}.linear_cross_entropy"]


@pytest.mark.parametrize("backend", WITH_OP)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("chunk_logits", [1, 64 * 3, 64 * 19, 10**6])
def test_the_size_of_chunks_changes_nothing_but_memory(backend, reduction, chunk_logits, device, monkeypatch):
    """One row at a time, chunks that do not divide the rows, exactly all rows, more than all."""
    inputs = CASE.make(FULL | {"reduction": reduction}, torch.float64, device)
    expected = run(CASE.op, whole, CASE.cast(inputs, torch.float64))
    in_chunks_of(backend, chunk_logits, monkeypatch)
    for name, value in run(CASE.op, MODULES[backend].linear_cross_entropy, inputs).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", WITH_OP)
@pytest.mark.parametrize("softcap", [0.5, 15.0, 40.0, 41.0, 1e6, None])
def test_any_softcap_and_a_vocabulary_of_several_blocks(backend, softcap, device):
    """Soft-caps on both sides of the one up to which a kernel may take exp(z) as it is. Three blocks, or two."""
    V = 9001 if HAS_GPU or softcap in (40.0, None) else 4117
    inputs = CASE.make({"N": 3, "D": 5, "V": V, "padding": 15, "softcap": softcap}, torch.float64, device)
    expected = run(CASE.op, whole, CASE.cast(inputs, torch.float64))
    for name, value in run(CASE.op, MODULES[backend].linear_cross_entropy, inputs).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-11, atol=1e-12)


@pytest.mark.skipif("triton" not in WITH_OP, reason="needs Triton")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "shape",
    [
        FULL,
        {"N": 150, "D": 80, "V": 300, "padding": 20, "softcap": 2.0, "weights": True},
        {"N": 1, "D": 8, "V": 128, "softcap": 40.0, "ignored": 0.0},
        {"N": 129, "D": 64, "V": 4, "padding": 4, "softcap": 0.5},
        {"N": 0, "D": 8, "V": 8, "softcap": 15.0},
    ],
    ids=str,
)
def test_logits_that_are_capped_before_they_are_stored(shape, reduction, device, monkeypatch):
    """What bf16 takes on newer GPUs, in fp32 where it is interpreted: full tiles and others, a tile of padding."""
    dtype = torch.bfloat16 if HAS_GPU else torch.float32
    if not HAS_GPU:
        monkeypatch.setattr(source("triton"), "can_fuse", lambda *_: True)
    inputs = CASE.make(shape | {"reduction": reduction}, dtype, device)
    got = run(CASE.op, MODULES["triton"].linear_cross_entropy, CASE.cast(inputs, dtype))
    judge(CASE.op, got, inputs)
    with torch.no_grad():
        assert torch.equal(MODULES["triton"].linear_cross_entropy(**inputs), got["output 0"])


@pytest.mark.parametrize("backend", WITH_OP)
@pytest.mark.parametrize("softcap", [0.5, 40.0, 41.0, None])
def test_logits_of_any_size(backend, softcap, device):
    """Neither exp nor tanh overflows, for logits from 1e-9 to 1e4, nor is their sum too large."""
    inputs = CASE.make(FULL | {"softcap": softcap}, torch.float32, device)
    inputs["x"] *= torch.logspace(-9, 4, 19, device=device)[:, None]
    judge(CASE.op, run(CASE.op, MODULES[backend].linear_cross_entropy, CASE.cast(inputs, torch.float32)), inputs)


@pytest.mark.parametrize("backend", WITH_OP)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_can_run_twice(backend, reduction, device):
    """With retain_graph: the gradients of the first time are not touched, and those of the second are the same."""
    inputs = CASE.make(FULL | {"reduction": reduction}, torch.float32, device)
    leaves = [inputs[name].requires_grad_() for name in CASE.differentiable]
    loss = MODULES[backend].linear_cross_entropy(**inputs).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [grad.clone() for grad in first]
    for again, grad, copy in zip(torch.autograd.grad(loss, leaves), first, kept, strict=True):
        assert torch.equal(again, grad)
        assert torch.equal(grad, copy)


@pytest.mark.skipif("triton" not in WITH_OP, reason="needs Triton")
def test_a_target_outside_the_vocabulary_is_a_loss_of_nan(device):
    """Also when it points at padding; the other losses stay what they were."""
    inputs = CASE.make(FULL | {"reduction": "none"}, torch.float64, device)
    expected = MODULES["triton"].linear_cross_entropy(**inputs)
    inputs["targets"][2:5] = torch.tensor([41, -2, 10**9])
    got = MODULES["triton"].linear_cross_entropy(**inputs)
    assert got[2:5].isnan().all()
    others = [i for i in range(19) if not 2 <= i < 5]
    assert torch.equal(got[others], expected[others])


@pytest.mark.skipif("triton" not in WITH_OP, reason="needs Triton")
@pytest.mark.parametrize("softcap", [15.0, None])
def test_the_operator_is_what_it_says_it_is(softcap, device):
    """Its schema, and the shapes it promises to torch.compile."""
    inputs = CASE.make(FULL, torch.float32, device)
    x, weight, targets, token_weights = (inputs[name] for name in ("x", "weight", "targets", "token_weights"))
    for needs in ((True, True), (True, False), (False, True), (False, False)):
        operator = source("triton").loss_and_gradients
        torch.library.opcheck(operator, (x, weight, targets, token_weights, 41, softcap, -1, *needs))


@pytest.mark.skipif("triton" not in WITH_OP, reason="needs Triton")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_compiles_around_the_operator(reduction, device):
    """The loop over chunks stays out of the graph, so that it also compiles where Triton is interpreted."""
    torch._dynamo.reset()
    inputs = CASE.make(FULL | {"reduction": reduction}, torch.float32, device)
    function = torch.compile(MODULES["triton"].linear_cross_entropy, fullgraph=True, backend="aot_eager")
    judge(CASE.op, run(CASE.op, function, CASE.cast(inputs, torch.float32)), inputs)


@pytest.mark.skipif("triton" not in WITH_OP, reason="needs Triton")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_evaluation_makes_no_gradients(reduction, device, monkeypatch):
    """Under no_grad, and for "none" before backward asks for them."""
    module, asked = source("triton"), []
    operator = module.loss_and_gradients
    monkeypatch.setattr(module, "loss_and_gradients", lambda *args: asked.append(args[-2:]) or operator(*args))
    inputs = CASE.make(FULL | {"reduction": reduction}, torch.float32, device)
    inputs["x"].requires_grad_()
    with torch.no_grad():
        module.linear_cross_entropy(**inputs)
    loss = module.linear_cross_entropy(**inputs).sum()
    before_backward = [(False, False), (False, False)] if reduction == "none" else [(False, False), (True, False)]
    assert asked == before_backward
    loss.backward()
    assert asked == before_backward + [(True, False)] * (reduction == "none")


@pytest.mark.gpu
@pytest.mark.skipif("triton" not in WITH_OP, reason="needs Triton")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("softcap", [15.0, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_real_vocabulary_over_several_chunks(dtype, softcap, reduction, device):
    """Twice with the same bits. Random weights only where tokens are judged one by one: their sum is near nothing."""
    shape = {"N": 5000, "D": 256, "V": 50257, "padding": 47, "softcap": softcap, "reduction": reduction}
    inputs = CASE.make(shape | {"weights": reduction == "none"}, dtype, device)
    first, second = (run(CASE.op, MODULES["triton"].linear_cross_entropy, CASE.cast(inputs, dtype)) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    judge(CASE.op, first, inputs)


@pytest.mark.gpu
@pytest.mark.skipif("triton" not in WITH_OP, reason="needs Triton")
@pytest.mark.parametrize("shape", CASE.time, ids=str)
def test_memory_beyond_inputs_and_gradients_stays_under_half_a_gibibyte(shape, device):
    inputs = CASE.make(shape, torch.bfloat16, device)
    leaves = [inputs[name].requires_grad_() for name in ("x", "weight")]
    for _ in range(2):  # the first time cuBLAS takes memory for good
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        grads = torch.autograd.grad(MODULES["triton"].linear_cross_entropy(**inputs), leaves)
        extra = torch.cuda.max_memory_allocated() - before - sum(grad.nbytes for grad in grads)
        del grads
    assert extra < 2**29


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
