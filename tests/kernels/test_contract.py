"""What every op of every backend must do, on the inputs of kernels_torch/cases.py.

A kernel is right when it is as close to the fp64 reference as the plain reference is in the same dtype. A new kernel is
tested here as soon as its backend exports it.
"""

import inspect
from importlib import import_module
from importlib.util import find_spec
from itertools import combinations

import pytest
import torch
from torch import Tensor

import kernels_torch
from kernels_torch.cases import CASES
from model.ops import OP_NAMES
from tests.conftest import HAS_GPU
from tests.numerics import assert_close, exact_and_plain, floating, judge, leaves_of, outputs, run, upstream_of

BACKENDS = ["torch", "triton"] if find_spec("triton") else ["torch"]
MODULES = {backend: import_module(f"kernels_{backend}") for backend in BACKENDS}
# Each op of each backend, and with each shape to check.
OPS = [pytest.param(backend, op, id=f"{backend}-{op}") for backend in BACKENDS for op in MODULES[backend].__all__]
SHAPES = [
    pytest.param(*param.values, shape, id=f"{param.id}-" + "-".join(f"{key}={value}" for key, value in shape.items()))
    for param in OPS
    for shape in CASES[param.values[1]].check
]
FILLED = [param for param in SHAPES if 0 not in list(param.values[2].values())[:2]]  # those with at least one row
DIFFERENTIABLE = [param for param in OPS if CASES[param.values[1]].differentiable]
FILLED_DIFFERENTIABLE = [param for param in FILLED if CASES[param.values[1]].differentiable]


def dtypes(backend: str) -> list[torch.dtype]:
    """The interpreter is silently wrong for bf16, so without a GPU only plain PyTorch is tested in it."""
    all_dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    return all_dtypes if HAS_GPU or backend == "torch" else all_dtypes[:3]


SHAPES_AND_DTYPES = [
    pytest.param(*param.values, dtype, id=f"{param.id}-{str(dtype).removeprefix('torch.')}")
    for param in SHAPES
    for dtype in dtypes(param.values[0])
]


@pytest.mark.parametrize(("backend", "op"), OPS)
def test_signature_is_the_reference_one(backend, op):
    """Names, kinds and defaults of all arguments."""
    reference = inspect.signature(getattr(kernels_torch, op)).parameters.values()
    parameters = inspect.signature(getattr(MODULES[backend], op)).parameters.values()
    assert [(p.name, p.kind, p.default) for p in parameters] == [(p.name, p.kind, p.default) for p in reference]


def test_every_op_has_a_reference_and_a_case():
    assert sorted(kernels_torch.__all__) == sorted(CASES)
    assert set(OP_NAMES) <= set(CASES)


def test_fresh_memory_is_poisoned(device):
    """The other tests rely on it: an element nobody wrote must not be zero by luck."""
    assert torch.empty(5, device=device).isnan().all()


@pytest.mark.parametrize(("backend", "op", "shape", "dtype"), SHAPES_AND_DTYPES)
def test_forward_and_gradients_are_as_exact_as_plain_pytorch(backend, op, shape, dtype, device):
    inputs = CASES[op].make(shape, dtype, device)
    judge(op, run(op, getattr(MODULES[backend], op), CASES[op].cast(inputs, dtype)), inputs)


def transposed(x: Tensor) -> Tensor:
    """The same values with the last two dimensions swapped in memory."""
    return x.mT.contiguous().mT if x.dim() > 1 else every_second(x)


def every_second(x: Tensor) -> Tensor:
    """The same values with a gap behind each."""
    return torch.stack([x, torch.zeros_like(x)], dim=-1).flatten(-2)[..., ::2] if x.dim() else x


def inside_wider(x: Tensor) -> Tensor:
    """The same values as a slice of a wider tensor: rows that do not start where the last one ended."""
    return torch.nn.functional.pad(x, (3, 2))[..., 3:-2] if x.dim() else x


@pytest.mark.parametrize("strided", [transposed, every_second, inside_wider])
@pytest.mark.parametrize(("backend", "op", "shape"), FILLED)
def test_strides_change_nothing(backend, op, shape, strided, device):
    """Of inputs, and of the gradients that come in."""
    inputs = CASES[op].make(shape, torch.float32, device)
    views = {
        name: strided(value).detach() if isinstance(value, Tensor) else value
        for name, value in CASES[op].cast(inputs, torch.float32).items()
    }
    plain_upstream = upstream_of(outputs(getattr(kernels_torch, op), CASES[op].cast(inputs, torch.float32)))
    upstream = tuple(strided(up) for up in plain_upstream)
    judge(op, run(op, getattr(MODULES[backend], op), views, upstream), inputs, plain_upstream)


@pytest.mark.parametrize(("backend", "op", "shape"), FILLED)
def test_an_expanded_incoming_gradient_is_read_right(backend, op, shape, device):
    """The gradient of a sum is one number seen through strides of zero."""
    inputs = CASES[op].make(shape, torch.float32, device)
    outs = outputs(getattr(kernels_torch, op), inputs)
    upstream = tuple(torch.full((), 0.5, device=device).expand(out.shape) for out in floating(outs))
    got = run(op, getattr(MODULES[backend], op), CASES[op].cast(inputs, torch.float32), upstream)
    judge(op, got, inputs, upstream, cancels=op == "softmax")  # adding a number to all of a row changes nothing


@pytest.mark.parametrize(("backend", "op"), OPS)
def test_two_runs_give_the_same_bits(backend, op, device):
    function, inputs = getattr(MODULES[backend], op), CASES[op].make(CASES[op].check[0], torch.float32, device)
    first, second = (run(op, function, inputs) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize(("backend", "op"), OPS)
def test_an_entry_does_not_depend_on_the_others_of_its_batch(backend, op, device):
    """Not even on their being NaN: outputs and gradients of the first entry keep their bits."""
    case, function = CASES[op], getattr(MODULES[backend], op)
    inputs = case.make(case.check[0], torch.float32, device)
    if op == "linear_cross_entropy":
        inputs["reduction"] = "none"
    others = case.cast(inputs, torch.float32)
    for name in case.batched:
        if others[name] is not None:
            others[name][1:] = torch.nan
    alone, among = run(op, function, inputs), run(op, function, others)
    names = [name for name in alone if name.startswith("output") or name.removeprefix("gradient of ") in case.batched]
    assert len(names) >= 1
    for name in names:
        assert torch.equal(alone[name][0], among[name][0]), name


@pytest.mark.parametrize(("backend", "op"), DIFFERENTIABLE)
def test_only_the_gradients_asked_for_are_computed(backend, op, device):
    """One at a time each is right and no other appears; with none asked for, nothing is recorded.

    Not bit for bit what they are together: without dx a kernel is compiled anew, and may add the rows in another order.
    """
    case, function = CASES[op], getattr(MODULES[backend], op)
    shape = max(case.check, key=lambda shape: len(leaves_of(op, case.make(shape, torch.float32, device))))
    inputs = case.make(shape, torch.float32, device)
    upstream = upstream_of(outputs(function, inputs))
    exact, plain = exact_and_plain(op, inputs, upstream)
    for name in leaves_of(op, case.cast(inputs, torch.float32)):
        one = case.cast(inputs, torch.float32)
        one[name].requires_grad_()
        outs = outputs(function, one)
        sum((out * up).sum() for out, up in zip(floating(outs), upstream, strict=True)).backward()
        assert_close(one[name].grad, exact[f"gradient of {name}"], plain[f"gradient of {name}"], f"{op} d{name} alone")
        assert all(value.grad is None for key, value in one.items() if isinstance(value, Tensor) and key != name)
    assert not any(out.requires_grad for out in outputs(function, case.cast(inputs, torch.float32)))


@pytest.mark.parametrize(("backend", "op"), DIFFERENTIABLE)
def test_two_calls_on_the_same_inputs_add_their_gradients(backend, op, device):
    function, inputs = getattr(MODULES[backend], op), CASES[op].make(CASES[op].check[0], torch.float32, device)
    leaves = leaves_of(op, inputs)
    first, second = outputs(function, inputs), outputs(function, inputs)
    grads = torch.autograd.grad(floating(first + second), list(leaves.values()), upstream_of(first) * 2)
    got = {f"output {i}": out.detach() for i, out in enumerate(second)}
    judge(op, got | {f"gradient of {name}": grad / 2 for name, grad in zip(leaves, grads, strict=True)}, inputs)


def gradient_of_shared(op: str, op_function, inputs: dict, first: str, second: str) -> Tensor:
    """The gradient of one tensor that is given as two inputs."""
    shared = inputs[first].requires_grad_()
    outs = outputs(op_function, {**inputs, second: shared})
    pairs = [(out, up) for out, up in zip(floating(outs), upstream_of(outs), strict=True) if out.requires_grad]
    outs, upstream = zip(*pairs, strict=True)  # without what is passed on as it came
    return torch.autograd.grad(outs, shared, upstream)[0]


@pytest.mark.parametrize(("backend", "op"), DIFFERENTIABLE)
def test_a_tensor_given_as_two_inputs_gets_both_gradients(backend, op, device):
    case, reference = CASES[op], getattr(kernels_torch, op)
    shape = next((shape for shape in case.check if shape.get("H", 0) == shape.get("Hkv")), case.check[0])
    inputs = case.make(shape, torch.float32, device)
    for first, second in combinations(leaves_of(op, inputs), 2):
        if inputs[first].shape == inputs[second].shape:
            arguments = (first, second)
            got = gradient_of_shared(op, getattr(MODULES[backend], op), case.cast(inputs, torch.float32), *arguments)
            plain = gradient_of_shared(op, reference, case.cast(inputs, torch.float32), *arguments)
            exact = gradient_of_shared(op, reference, case.cast(inputs, torch.float64), *arguments)
            assert_close(got, exact, plain, f"{op} gradient of {first} as {second}")


@pytest.mark.parametrize(("backend", "op", "shape"), FILLED_DIFFERENTIABLE)
def test_gradients_agree_with_finite_differences(backend, op, shape, device):
    inputs = CASES[op].make(shape, torch.float64, device)
    leaves = leaves_of(op, inputs)

    def of_leaves(*values: Tensor) -> tuple[Tensor, ...]:
        return floating(outputs(getattr(MODULES[backend], op), {**inputs, **dict(zip(leaves, values, strict=True))}))

    assert torch.autograd.gradcheck(of_leaves, tuple(leaves.values()), fast_mode=True, atol=1e-4)


# Triton kernels compile for GPUs only; on a CPU it is enough to know that PyTorch's path is captured whole.
COMPILED = OPS if HAS_GPU else [param for param in OPS if param.values[0] == "torch"]


@pytest.mark.parametrize(("backend", "op"), COMPILED)
def test_compiles_to_one_graph(backend, op, device):
    torch._dynamo.reset()
    compiler = "inductor" if HAS_GPU else "aot_eager"
    function = torch.compile(getattr(MODULES[backend], op), fullgraph=True, backend=compiler)
    inputs = CASES[op].make(CASES[op].check[1], torch.float32, device)
    judge(op, run(op, function, CASES[op].cast(inputs, torch.float32)), inputs)


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "op"), OPS)
def test_can_be_captured_in_a_cuda_graph(backend, op, device):
    """Forward and backward once in a graph; replayed on new inputs it gives what a fresh call gives."""
    case, function = CASES[op], getattr(MODULES[backend], op)
    inputs = case.make(case.check[0], torch.float32, device)
    fresh = case.make(case.check[0], torch.float32, device, seed=1)
    upstream = upstream_of(outputs(function, inputs))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(op, function, inputs, upstream)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(op, function, inputs, upstream)
    with torch.no_grad():
        for name, value in fresh.items():
            if isinstance(value, Tensor):
                inputs[name].copy_(value)
    graph.replay()
    for name, value in run(op, function, fresh, upstream).items():
        assert torch.equal(captured[name], value), name


@pytest.mark.gpu
@pytest.mark.usefixtures("much_memory")
@pytest.mark.parametrize(("backend", "op"), [param for param in OPS if CASES[param.values[1]].huge])
def test_more_elements_than_32_bits_can_count(backend, op, device):
    """The first and the last entries of a tensor of over 2³¹ values, and their gradients, are what they are alone."""
    case, function = CASES[op], getattr(MODULES[backend], op)
    inputs = case.make(case.huge, torch.bfloat16, device)
    assert max(value.numel() for value in inputs.values() if isinstance(value, Tensor)) > 2**31
    whole = run_batched(op, function, inputs)
    entries = inputs[case.batched[0]].shape[0]
    for few in (slice(0, 2), slice(entries - 2, entries)):
        part = {name: value[few].clone() if name in case.batched and value is not None else value
                for name, value in inputs.items()}  # fmt: skip
        for name, value in run_batched(op, function, part).items():
            if backend == "torch":  # cuBLAS may take another kernel for fewer rows
                torch.testing.assert_close(whole[name][few], value)
            else:
                assert torch.equal(whole[name][few], value), name


def run_batched(op: str, op_function, inputs: dict) -> dict[str, Tensor]:
    """Outputs and the gradients of batched inputs, for an upstream that needs no other memory: the output itself."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in CASES[op].batched if inputs[name] is not None}
    outs = outputs(op_function, {**inputs, **leaves})
    grads = torch.autograd.grad(floating(outs), list(leaves.values()), [out.detach() for out in floating(outs)])
    results = {f"output {i}": out.detach() for i, out in enumerate(outs)}
    return results | {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}


def half(name: str):
    """Cut an input's last dimension to half, so that it fits nothing."""
    return lambda inputs: {name: inputs[name][..., : inputs[name].shape[-1] // 2]}


def as_int(name: str):
    return lambda inputs: {name: inputs[name].int()}


def with_scales(dtype: torch.dtype | None = torch.int8, n_heads: int | None = None, **changes):
    """Pages as codes of this dtype, or as they are, and scales of so many heads."""

    def changed(inputs: dict) -> dict[str, Tensor]:
        pages = {name: inputs[name] for name in ("k_pages", "v_pages")}
        scales = {f"{name[0]}_scales": x[..., 0].float()[..., :n_heads] for name, x in pages.items()}
        return {name: x.to(dtype or x.dtype) for name, x in pages.items()} | scales | changes

    return changed


def no_pages(inputs: dict) -> dict[str, Tensor]:
    return {name: inputs[name][:0] for name in ("k_pages", "v_pages")}


LENGTHS_REFUSED = [
    (lambda inputs: {"lengths": inputs["lengths"].float()}, "lengths must be an int32 or int64 .*float32"),
    (lambda inputs: {"lengths": inputs["lengths"].to(torch.uint8)}, "lengths must be an int32 or int64 .*uint8"),
    (lambda inputs: {"lengths": inputs["lengths"].tolist()}, r"lengths must be a tensor, got \["),
]
CODES_REFUSED = [
    (lambda inputs: {name: inputs[name].to(torch.int8) for name in ("k_pages", "v_pages")}, "int8"),
    (with_scales(v_scales=None), "k_scales and v_scales belong together"),
    (with_scales(dtype=None), "both int8 or both float8_e4m3fn, got torch.float32"),
    (with_scales(dtype=torch.float8_e5m2), "both float8_e4m3fn, got torch.float8_e5m2"),
    (with_scales(n_heads=1), r"k_scales must be a floating-point tensor .*1\)$"),
]
REFUSED = {
    "rmsnorm": [(half("weight"), r"\(60,\), got \(30,\)"), (as_int("x"), "int32"), (lambda _: {"eps": -1.0}, "-1.0")],
    "qk_norm_rope": [
        (half("k"), "Hkv, D"),
        (half("cos"), "cos and sin"),
        (as_int("k"), "int32"),
        (lambda _: {"start": 9}, "positions 9 to 15 are outside the rotary table of 15"),
        (lambda _: {"start": -1}, "positions -1"),
        (lambda inputs: {"start": inputs["q"].new_zeros(5, dtype=torch.int32)}, r"\(5,\)"),
        (lambda _: {"eps": -1.0}, "-1.0"),
    ],
    "attention": [
        (half("k"), "Hkv, D"),
        (lambda inputs: {"q": inputs["q"][:, :, :3]}, "3 and 2"),
        (lambda _: {"window": 0}, "at least 1, got 0"),
        (lambda _: {"window": -2}, "-2"),
        (lambda _: {"window": True}, "got True"),
        (lambda _: {"window": "3"}, "at least 1, got '3'"),
        (lambda _: {"window": torch.tensor(3)}, r"at least 1, got tensor\(3\)"),
        (lambda _: {"causal": "no"}, "causal must be True or False, got 'no'"),
        (lambda _: {"v": None}, "v must be a tensor, got None"),
        (lambda inputs: {"doc_ids": [[0] * 17] * 2}, r"doc_ids must be a tensor, got \[\[0"),
        (lambda _: {"scale": torch.tensor(0.5)}, r"scale must be a finite number, got tensor\(0.5"),
        (lambda _: {"scale": "a"}, "scale must be a finite number, got 'a'"),
        (lambda _: {"scale": 10**400}, "scale must be a finite number, got 1000"),
        (lambda _: {"softcap": "3"}, "from 1e-30 to 1e30, got '3'"),
        (lambda _: {"softcap": True}, "from 1e-30 to 1e30, got True"),
        (lambda _: {"softcap": 1e-40}, "from 1e-30 to 1e30, got 1e-40"),
        (lambda _: {"softcap": 1e39}, r"from 1e-30 to 1e30, got 1e\+39"),
        (lambda inputs: {name: inputs[name].to(torch.float8_e5m2) for name in "qkv"}, "got torch.float8_e5m2"),
        (lambda _: {"scale": float("nan")}, "scale must be a finite number, got nan"),
        (lambda _: {"softcap": 0.0}, "from 1e-30 to 1e30, got 0.0"),
        (lambda _: {"softcap": float("inf")}, "got inf"),
        (lambda _: {"softcap": float("nan")}, "got nan"),
        (as_int("v"), "int32"),
        (lambda _: {"window": 1.5}, "1.5"),
        (
            lambda inputs: {
                "k": inputs["k"][:, :9],
                "v": inputs["v"][:, :9],
                "doc_ids": inputs["q"].new_zeros(2, 17, dtype=torch.int32),
            },
            "doc_ids need as many keys as queries, got 9 and 17",
        ),
        (lambda inputs: {"doc_ids": inputs["q"].new_zeros(3, 17, dtype=torch.int32)}, r"\(3, 17\)"),
        (lambda inputs: {"doc_ids": inputs["q"].new_zeros(2, 17)}, "integers, got .*float32"),
    ],
    "attention_decode": [
        (half("v_cache"), "Hkv, D"),
        *LENGTHS_REFUSED,
        (lambda _: {"scale": float("inf")}, "scale must be a finite number, got inf"),
        (lambda inputs: {"lengths": inputs["lengths"][:2]}, r"\(2,\)"),
        (lambda _: {"window": 0}, "at least 1, got 0"),
        (lambda _: {"window": -2}, "-2"),
        (lambda inputs: {"q": inputs["q"].repeat(1, 18, 1, 1)}, "18 new tokens do not fit a cache of 17"),
    ],
    "attention_decode_paged": [
        *CODES_REFUSED,
        *LENGTHS_REFUSED,
        (no_pages, r"names pages, but there are none: \(0,"),
        (lambda _: {"scale": float("nan")}, "scale must be a finite number, got nan"),
        (
            lambda inputs: {x: inputs[x].to(torch.float8_e4m3fn) for x in ("q", "k_pages", "v_pages")},
            "must all be bfloat16, .* got torch.float8_e4m3fn",
        ),
        (
            lambda inputs: with_scales()(inputs) | {"q": inputs["q"].to(torch.float8_e4m3fn)},
            "q must be bfloat16, .* got torch.float8_e4m3fn",
        ),
        (half("v_pages"), "page, Hkv, D"),
        (lambda inputs: {"block_table": inputs["block_table"].float()}, "block_table .*float32"),
        (lambda inputs: {"block_table": inputs["block_table"][:2]}, r"\(2, 3\)"),
        (lambda inputs: {"q": inputs["q"][:, :, :3]}, "3 and 2"),
        (lambda _: {"window": -2}, "-2"),
        (lambda inputs: {"q": inputs["q"].repeat(1, 25, 1, 1)}, "25 new tokens do not fit a cache of 24"),
    ],
    "relu2_mlp": [
        (half("w_up"), r"\(20, 6\)"),
        (half("x"), "w_down"),
        (as_int("w_down"), "int32"),
        (lambda inputs: {"masters": [inputs["w_up"]]}, r"masters must be .*, got torch.float32 \("),
    ],
    "swiglu_mlp": [
        (half("w_gate"), r"\(20, 6\)"),
        (half("x"), "w_down"),
        (as_int("w_up"), "int32"),
        (lambda inputs: {"masters": [inputs[name].int() for name in ("w_gate", "w_up", "w_down")]}, "got torch.int32"),
    ],
    "linear_cross_entropy": [
        (lambda inputs: {"master": inputs["x"]}, "masters must be floating point"),
        (half("x"), r"\(7, 6\)"),
        (half("targets"), r"\(3,\)"),
        (lambda inputs: {"token_weights": inputs["x"][:2, 0]}, r"\(2,\)"),
        (lambda _: {"vocab_size": 34}, "33 rows of weight, got 34"),
        (lambda _: {"softcap": 0.0}, "0.0"),
        (lambda _: {"reduction": "average"}, "average"),
        (lambda inputs: {"x": inputs["x"].double()}, "float64"),
    ],
    "add_rmsnorm": [
        (half("weight"), r"\(60,\), got \(30,\)"),
        (half("branch"), r"branch .* \(7, 30\)"),
        (lambda inputs: {"branch": inputs["branch"].double()}, "branch .*float64"),
        (as_int("x"), "int32"),
        (lambda _: {"eps": -1.0}, "-1.0"),
    ],
    "mix_rmsnorm": [
        (half("anchor"), r"anchor .* \(7, 30\)"),
        (half("branch"), r"branch .* \(7, 30\)"),
        (lambda inputs: {"anchor": inputs["anchor"].double()}, "anchor .*float64"),
        (lambda inputs: {"x_scale": inputs["x"][0]}, r"x_scale .*\(60,\)"),
        (lambda inputs: {"anchor_scale": inputs["x"][0]}, r"anchor_scale .*\(60,\)"),
        (lambda _: {"eps": -1.0}, "-1.0"),
    ],
    "layer_norm": [
        (half("weight"), r"weight .*\(60,\), got \(30,\)"),
        (half("bias"), r"bias .*\(60,\), got \(30,\)"),
        (as_int("x"), "int32"),
        (lambda _: {"eps": -1.0}, "-1.0"),
    ],
    "gelu": [(as_int("x"), "int32")],
    "softmax": [(as_int("x"), "int32"), (lambda inputs: {"x": inputs["x"][:, :0]}, r"\(7, 0\)")],
    "top_k": [(as_int("x"), "int32"), (lambda _: {"k": 61}, "60 values, got 61"), (lambda _: {"k": 0}, "got 0")],
    "embedding": [
        (lambda inputs: {"tokens": inputs["tokens"].float()}, "float32"),
        (lambda inputs: {"table": inputs["table"][0]}, r"\(12,\)"),
        (lambda _: {"dtype": torch.int32}, "int32"),
    ],
    "value_embedding": [
        (half("table"), r"\[V, 24\], got .*\(11, 12\)"),
        (half("tokens"), r"\(2, 3\)"),
        (half("gate_weight"), r"\(3, 6\)"),
        (lambda inputs: {"gate_input": inputs["gate_input"].double()}, "float64"),
        (lambda inputs: {"v": inputs["v"][0]}, r"\(7, 3, 8\)"),
    ],
    "smear": [
        (lambda inputs: {"x": inputs["x"][0]}, r"\(7, 60\)"),
        (lambda inputs: {"gate_weight": inputs["gate_weight"][0]}, r"\(24,\)"),
        (lambda inputs: {"scale": inputs["x"][0, 0]}, r"\(60,\)"),
        (lambda inputs: {"previous": inputs["x"][:, :2]}, r"\(2, 2, 60\)"),
        (lambda inputs: {"doc_ids": inputs["x"][0, :, 0].int()}, r"\(7,\)"),
    ],
    "qk_norm_rope_append": [
        (half("v"), "v must be"),
        (half("k_cache"), "caches must be"),
        (half("cos"), "cos and sin"),
        (as_int("v_cache"), "int32"),
        *LENGTHS_REFUSED,
        (
            lambda inputs: {"cos": inputs["cos"][:5], "sin": inputs["sin"][:5]},
            "9 tokens needs as many rotary rows, got 5",
        ),
    ],
    "qk_norm_rope_append_paged": [
        *CODES_REFUSED,
        (half("v"), "v must be"),
        (half("k_pages"), "pages must be"),
        (half("cos"), "cos and sin"),
        (as_int("v_pages"), "int32"),
        *LENGTHS_REFUSED,
        (no_pages, r"names pages, but there are none: \(0,"),
        (lambda inputs: {x: inputs[x][:0] for x in ("cos", "sin")}, "no rotary row"),
        (lambda inputs: {"block_table": inputs["block_table"].float()}, "block_table .*float32"),
        (lambda inputs: {"block_table": inputs["block_table"][:2]}, r"\(2, 3\)"),
        (lambda inputs: {"block_table": inputs["block_table"][:, :0]}, "no page"),
    ],
    "linear_decode": [
        (half("weight"), r"\[F, 60\] .*got \(33, 30\)"),
        (as_int("x"), "int32"),
        (as_int("weight"), "codes with scales, .*int32"),
        (lambda inputs: {"weight": inputs["weight"].to(torch.int8)}, "codes with scales, .*int8"),
        (lambda inputs: {"scales": inputs["weight"][:, 0]}, "codes of a weight .*float32"),
        (
            lambda inputs: {"weight": inputs["weight"].to(torch.int8), "scales": inputs["weight"][:9, 0]},
            r"scales \[F\], got \(33, 60\) and \(9,\)",
        ),
        (
            lambda inputs: {"weight": inputs["weight"].to(torch.int32), "scales": inputs["weight"][:, :1]},
            r"64 or 128 columns that hold 60, got \(33, 60\) and \(33, 1\)",
        ),
        (lambda _: {"activation": "gelu"}, "gelu"),
        (lambda _: {"activation": "swiglu"}, "even number of rows, got 33"),
        (lambda inputs: {"norm_weight": inputs["x"][0]}, "needs eps"),
        (lambda inputs: {"norm_weight": inputs["x"][0, :7], "eps": 1e-6}, r"\(60,\), got \(7,\)"),
        (lambda _: {"eps": -1.0}, "-1.0"),
        (lambda inputs: {"residual": inputs["x"]}, r"residual must be \(3, 33\) .*\(3, 60\)"),
        (lambda _: {"softcap": 0.0}, "0.0"),
        (lambda _: {"out_dtype": torch.int8}, "int8"),
    ],
    "draw_tokens": [
        (lambda inputs: {"logits": inputs["logits"][0]}, r"\[B, V\], got \(75,\)"),
        (as_int("logits"), "int32"),
        (half("top_k"), r"top_k .*\[3\], got .*\(1,\)"),
        (lambda inputs: {"seed": inputs["seed"].float()}, "seed .*float32"),
        (as_int("temperature"), "temperature .*int32"),
        (lambda _: {"most": -1}, "-1"),
    ],
    "take_tokens": [
        (half("limit"), r"limit .*\[3\], got .*\(1,\)"),
        (lambda inputs: {"ids": inputs["history"]}, r"ids .*\(3, 5\)"),
        (lambda inputs: {"step": inputs["step"].float()}, "step .*float32"),
        (lambda inputs: {"history": inputs["history"][:2]}, r"\(2, 5\)"),
        (lambda inputs: {"is_stop": inputs["ids"]}, "bool tensor"),
    ],
    "attention_step_paged": [
        *CODES_REFUSED,
        (half("v"), "v must be"),
        (half("v_pages"), "pages must be"),
        *LENGTHS_REFUSED,
        (no_pages, r"names pages, but there are none: \(0,"),
        (lambda _: {"scale": float("nan")}, "scale must be a finite number, got nan"),
        (lambda _: {"qk_scale": float("inf")}, "qk_scale must be a finite number, got inf"),
        (
            lambda inputs: with_scales()(inputs) | {x: inputs[x].to(torch.float8_e4m3fn) for x in "qkv"},
            "q, k and v must be bfloat16, .* got torch.float8_e4m3fn",
        ),
        (lambda inputs: {"block_table": inputs["block_table"][:2]}, r"\(2, 3\)"),
        (lambda inputs: {name: inputs[name].repeat(1, 2, 1, 1) for name in "qkv"}, "one token a row, got q .*2, 2, 16"),
        (lambda inputs: {"q": inputs["q"].repeat(1, 1, 2, 1)[:, :, :3]}, "3 and 2"),
        (lambda inputs: {"k_pages": inputs["k_pages"].double()}, "float64"),
        (lambda _: {"window": 0}, "at least 1, got 0"),
    ],
    "muon_momentum": [
        (half("momentum"), r"\(2, 7, 31\), got \(2, 7, 15\)"),
        (as_int("grads"), "int32"),
        (lambda inputs: {"grads": inputs["grads"][0]}, r"\(7, 31\)"),
    ],
    "muon_update": [
        (half("x"), r"\(2, 7, 31\), got \(2, 7, 15\)"),
        (half("second_moment"), r"\(2, 1, 31\) .*got \(2, 1, 15\)"),
        (as_int("x"), "int32"),
    ],
    "adamw_update": [
        (half("grads"), r"\(7, 31\) must have its shape, got .*\(7, 15\)"),
        (as_int("grads"), "int32"),
        (lambda inputs: {"grads": [inputs["grads"]] * 2}, "got 2, 1, 1 and 1 for 1"),
    ],
    "newton_schulz": [(lambda inputs: {"g": inputs["g"][0]}, r"\(12, 12\)"), (as_int("g"), "int32")],
}


@pytest.mark.parametrize(
    ("backend", "op", "change", "message"),
    [pytest.param(*param.values, *bad, id=f"{param.id}-{bad[1]}") for param in OPS for bad in REFUSED[param.values[1]]],
)
def test_arguments_that_make_no_sense_are_refused_by_name(backend, op, change, message, device):
    inputs = CASES[op].make(CASES[op].check[0], torch.float32, device)
    with pytest.raises(ValueError, match=message):
        getattr(MODULES[backend], op)(**inputs | change(inputs))


@pytest.mark.parametrize(("backend", "op"), OPS)
def test_an_input_on_another_device_is_refused_by_name(backend, op, device):
    """Each tensor in turn on the meta device: one sentence, before any kernel runs."""
    case = CASES[op]
    shape = max(case.check, key=lambda shape: sum(isinstance(v, Tensor) for v in case.inputs(**shape).values()))
    inputs = case.make(shape, torch.float32, device)
    tensors = [name for name, value in inputs.items() if isinstance(value, Tensor)]
    for name in tensors if len(tensors) > 1 else []:
        with pytest.raises(ValueError, match=r"must be on (meta|cpu|cuda:0) like .*, got (meta|cpu|cuda:0)"):
            getattr(MODULES[backend], op)(**inputs | {name: inputs[name].to("meta")})
