"""The two MLPs, one hidden unit at a time; what the Triton ones keep and cost, and their products with an epilogue."""

import math
from importlib import import_module
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels_torch.cases import CASES
from tests.conftest import HAS_GPU
from tests.kernels.test_contract import BACKENDS, MODULES, every_second, inside_wider, judge, run, transposed
from tests.numerics import assert_close

SHAPE = {"N": 3, "D": 4, "F": 5}
MLPS = ["relu2_mlp", "swiglu_mlp"]
needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if "relu2_mlp" in MODULES[backend].__all__])
def test_relu2_squares_what_is_positive(backend, device):
    inputs = CASES["relu2_mlp"].make(SHAPE, torch.float64, device)
    x, w_up, w_down = inputs["x"], inputs["w_up"], inputs["w_down"]
    for n in range(SHAPE["N"]):
        hidden = [max(0.0, float(w_up[f] @ x[n])) ** 2 for f in range(SHAPE["F"])]
        expected = sum(h * w_down[:, f] for f, h in enumerate(hidden))
        torch.testing.assert_close(MODULES[backend].relu2_mlp(**inputs)[n], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if "swiglu_mlp" in MODULES[backend].__all__])
def test_swiglu_gates_the_up_projection(backend, device):
    inputs = CASES["swiglu_mlp"].make(SHAPE, torch.float64, device)
    x, w_gate, w_up, w_down = (inputs[name] for name in ("x", "w_gate", "w_up", "w_down"))
    for n in range(SHAPE["N"]):
        gate, up = (w_gate @ x[n]).tolist(), (w_up @ x[n]).tolist()
        hidden = [g / (1 + math.exp(-g)) * u for g, u in zip(gate, up, strict=True)]
        expected = sum(h * w_down[:, f] for f, h in enumerate(hidden))
        torch.testing.assert_close(MODULES[backend].swiglu_mlp(**inputs)[n], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", MLPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_dimensions_are_kept(backend, op, device):
    """Two, none, and one of size zero."""
    function, inputs = getattr(MODULES[backend], op), CASES[op].make({"N": 6, "D": 4, "F": 5}, torch.float64, device)
    flat = function(**inputs)
    deep = function(**inputs | {"x": inputs["x"].view(2, 3, 4)})
    torch.testing.assert_close(deep, flat.view(2, 3, 4), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(function(**inputs | {"x": inputs["x"][1]}), flat[1], rtol=1e-12, atol=1e-12)
    assert function(**inputs | {"x": inputs["x"].new_ones(2, 0, 4)}).shape == (2, 0, 4)


@pytest.mark.parametrize("op", MLPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_a_number_stays_so(backend, op, device):
    """relu of NaN is NaN in PyTorch: a diverged run must not look well."""
    inputs = CASES[op].make(CASES[op].check[0], torch.float32, device)
    inputs["x"][1, 0] = torch.nan
    out = getattr(MODULES[backend], op)(**inputs)
    assert out[1].isnan().all()
    assert out[[0, *range(2, len(out))]].isfinite().all()


class CountProducts(TorchDispatchMode):
    """How many matrix products PyTorch computes."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("scale", [1e-4, 1e-3, 1e-2, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_small_activations_keep_their_gradients_in_fp16(backend, scale, device):
    """relu² of what is below 2e-4 is 0 in fp16, and its root no longer relu."""
    inputs = CASES["relu2_mlp"].make(dict(N=37, D=31, F=53), torch.float16, device)
    inputs["x"] = inputs["x"] * scale
    judge(
        "relu2_mlp",
        run("relu2_mlp", MODULES[backend].relu2_mlp, CASES["relu2_mlp"].cast(inputs, torch.float16)),
        inputs,
    )


@needs_triton
@pytest.mark.parametrize("op", MLPS)
def test_each_gradient_costs_its_products_and_no_more(op, device):
    """dz takes one, and then each input one; SwiGLU's gate and up share theirs, as x, too, gets both of its in one."""
    case, function = CASES[op], getattr(MODULES["triton"], op)
    for needed in product([False, True], repeat=len(case.differentiable)):
        inputs = case.make(case.check[0], torch.float32, device)
        needs = dict(zip(case.differentiable, needed, strict=True))
        leaves = [inputs[name].requires_grad_() for name in needs if needs[name]]
        out = function(**inputs)
        if leaves:
            with CountProducts() as products:
                torch.autograd.grad(out, leaves, torch.ones_like(out))
            up = needs["w_up"] or needs.get("w_gate", False)
            assert products.count == (needs["x"] or up) + needs["x"] + up + needs["w_down"], needs


@needs_triton
@pytest.mark.parametrize(("op", "hidden"), [("relu2_mlp", 1), ("swiglu_mlp", 2)])
def test_hidden_tensors_kept_for_backward(op, hidden, device):
    """relu² itself, or gate and up; nothing where no gradient will be asked for."""
    kept: list[Tensor] = []
    inputs = CASES[op].make({"N": 9, "D": 4, "F": 7}, torch.float32, device)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        plain = getattr(MODULES["triton"], op)(**inputs)
        assert not kept
        inputs["w_up"].requires_grad_()
        out = getattr(MODULES["triton"], op)(**inputs)
        assert sum(tensor.shape == (9, 7) for tensor in kept) == hidden
        with torch.no_grad():
            assert torch.equal(plain, getattr(MODULES["triton"], op)(**inputs))
    assert torch.equal(plain, out)


def epilogues(device: torch.device):
    """The module of products with an epilogue, where it can run: the interpreter runs it on the CPU."""
    matmul = import_module("kernels_triton.matmul")
    if device.type == "cuda" and not matmul.can_use_tma(torch.empty(8, 8, device=device, dtype=torch.bfloat16), 8):
        pytest.skip("these products are for Hopper")
    return matmul


HALVES = [torch.float16, *([torch.bfloat16] if HAS_GPU else [])]
PRODUCTS = [(130, 72, 264), (5, 8, 8), (1, 136, 520), (300, 64, 128)]


@needs_triton
@pytest.mark.parametrize("strided", [lambda x: x, transposed, every_second, inside_wider])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("N", "D", "F"), PRODUCTS)
def test_relu2_in_the_epilogue(N, D, F, dtype, strided, device):
    """Forward, and from its own result backward: tiles that are not full, rows that TMA cannot read in place."""
    matmul, inputs = epilogues(device), CASES["relu2_mlp"].make(dict(N=N, D=D, F=F), dtype, device)
    x, w_up, w_down = inputs.values()
    y = matmul.matmul_relu2(strided(x), strided(w_up))
    exact = (x.double() @ w_up.double().T).relu().square()
    assert_close(y, exact, (x @ w_up.T).relu().square(), "relu2")
    dz = matmul.matmul_relu2_grad(strided(x), strided(w_down), y)
    exact, plain = (x.double() @ w_down.double()) * 2 * y.double().sqrt(), (x @ w_down) * 2 * y.sqrt()
    assert_close(dz, exact, plain, "gradient of relu2")


@needs_triton
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("N", "D", "F"), [(130, 72, 256), (5, 8, 128), (1, 136, 384)])
def test_swiglu_in_the_epilogue(N, D, F, dtype, device):
    matmul, inputs = epilogues(device), CASES["swiglu_mlp"].make(dict(N=N, D=D, F=F), dtype, device)
    x, w_gate, w_up = (inputs[name] for name in ("x", "w_gate", "w_up"))
    g, u, h = matmul.matmul_swiglu(x, w_gate, w_up, keep=True)
    exact_g, exact_u = x.double() @ w_gate.double().T, x.double() @ w_up.double().T
    assert_close(g, exact_g, x @ w_gate.T, "gate")
    assert_close(u, exact_u, x @ w_up.T, "up")
    assert_close(h, silu_times(exact_g, exact_u), silu_times(x @ w_gate.T, x @ w_up.T), "swiglu")
    assert torch.equal(matmul.matmul_swiglu(x, w_gate, w_up, keep=False)[2], h)


def silu_times(g: Tensor, u: Tensor) -> Tensor:
    return F.silu(g) * u


@needs_triton
def test_the_epilogue_keeps_what_is_not_a_number(device):
    x, w = torch.ones(3, 8, device=device, dtype=torch.float16), torch.ones(16, 8, device=device, dtype=torch.float16)
    x[1, 0] = torch.nan
    y = epilogues(device).matmul_relu2(x, w)
    assert y[1].isnan().all()
    assert (y[[0, 2]] == 64).all()


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", MLPS)
@pytest.mark.parametrize(("N", "D", "F"), [(4096, 768, 3072), (8200, 392, 1288), (6001, 256, 2048)])
def test_sizes_of_real_models_twice_with_the_same_bits(N, D, F, op, dtype, fused, device, monkeypatch):
    """In the epilogue, and after cuBLAS where it would be there."""
    mlp, case = import_module("kernels_triton.mlp"), CASES[op]
    inputs = case.make(dict(N=N, D=D, F=F), dtype, device)
    epilogues(device)
    assert mlp.fuses(inputs["x"], F)
    if not fused:
        monkeypatch.setattr(mlp, "fuses", lambda x, F: False)
    first, second = (run(op, getattr(MODULES["triton"], op), case.cast(inputs, dtype)) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    judge(op, first, inputs)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("op", MLPS)
def test_a_hidden_tensor_of_more_elements_than_32_bits_can_count(op, fused, device, monkeypatch):
    """Rows at the beginning and the end of 2.4 billion hidden values, and their gradients, are as exact as alone."""
    mlp, case = import_module("kernels_triton.mlp"), CASES[op]
    if not fused:
        monkeypatch.setattr(mlp, "fuses", lambda x, F: False)
    inputs = case.make(dict(N=1_050_000, D=16, F=2304), torch.bfloat16, device)
    x = inputs.pop("x").requires_grad_()
    out = getattr(mlp, op)(x, **inputs)
    (dx,) = torch.autograd.grad(out, x, out.detach())
    for rows in (slice(0, 130), slice(-130, None)):
        few = case.cast({"x": x[rows].detach(), **inputs}, torch.bfloat16)
        judge_rows(op, {"output 0": out[rows].detach(), "gradient of x": dx[rows]}, few, out[rows].detach())


def judge_rows(op: str, got: dict[str, Tensor], inputs: dict, upstream: Tensor) -> None:
    """As `judge`, for a few of the rows and what belongs to them."""
    reference, case = getattr(import_module("kernels_torch"), op), CASES[op]
    plain = run(op, reference, case.cast(inputs, upstream.dtype), (upstream,))
    exact = run(op, reference, case.cast(inputs, torch.float64), (upstream.double(),))
    for name, value in got.items():
        assert_close(value, exact[name], plain[name], f"{op} {name}")


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("op", MLPS)
def test_the_epilogue_is_traced_and_captured(op, device):
    """torch.compile in one graph and a CUDA graph, forward and backward, at a size that takes the epilogue."""
    case, function = CASES[op], getattr(MODULES["triton"], op)
    inputs = case.make(dict(N=8192, D=256, F=2048), torch.bfloat16, device)
    epilogues(device)
    assert import_module("kernels_triton.mlp").fuses(inputs["x"], 2048)
    eager = run(op, function, case.cast(inputs, torch.bfloat16))
    torch._dynamo.reset()
    compiled = run(op, torch.compile(function, fullgraph=True), case.cast(inputs, torch.bfloat16))
    leaves = case.cast(inputs, torch.bfloat16)
    upstream = (torch.ones_like(inputs["x"]),)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        plain = run(op, function, leaves, upstream)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(op, function, leaves, upstream)
    graph.replay()
    for name, value in eager.items():
        assert torch.equal(compiled[name], value), name
        assert torch.equal(captured[name], plain[name]), name
