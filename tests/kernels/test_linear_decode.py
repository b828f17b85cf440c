"""The product of few rows beyond the contract: codes as they are saved, rows wherever they lie, chains in a graph."""

import pytest
import torch

import kernels_torch
from kernels_torch.cases import CASES
from kernels_torch.quantised_weight import FORMS, GROUPS, quantise
from tests.conftest import HAS_GPU
from tests.kernels.test_contract import BACKENDS, MODULES
from tests.numerics import assert_close, judge, run

pytestmark = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
OP = "linear_decode"


def linear_decode(*args, **options):
    return MODULES["triton"].linear_decode(*args, **options)


def compare(inputs: dict) -> None:
    """With the reference on the same inputs, whose dtypes stay as they are."""
    exact = kernels_torch.linear_decode(**{name: wide(name, value) for name, value in inputs.items()})
    assert_close(linear_decode(**inputs), exact, kernels_torch.linear_decode(**inputs), OP)


def wide(name: str, value: object) -> object:
    """In fp64; codes stay codes."""
    is_code = name == "weight" and isinstance(value, torch.Tensor) and value.element_size() == 1
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point() and not is_code
    return value.double() if is_float else None if name == "out_dtype" else value


@pytest.mark.parametrize("N", [1, 3, 6])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_codes_as_they_are_saved(N, form, group, dtype, device):
    """Scales of int4 are bf16, in no dtype the contract tests."""
    codes, scales = quantise(torch.randn(19, 200, device=device), form, group)
    compare(dict(x=torch.randn(N, 200, device=device, dtype=dtype), weight=codes, scales=scales, eps=1e-6))


@pytest.mark.parametrize("form", [None, *FORMS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_numbers_of_many_rows(form, dtype, device):
    """Tensor cores have none of fp32; of fp64 Triton refused some tiles, and the process died of it."""
    inputs = CASES[OP].make(dict(N=6, C=130, F=24, norm=True, residual=True), dtype, device)
    if form is not None:
        inputs["weight"], inputs["scales"] = quantise(inputs["weight"], form)
    judge(OP, run(OP, linear_decode, inputs), inputs)


@pytest.mark.parametrize("N", [1, 2, 4, 5, 16, 17, 32, 33, 64, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_any_number_of_rows(N, dtype, device):
    """Around each limit from one kernel to the next."""
    inputs = CASES[OP].make(dict(N=N, C=70, F=23, norm=True, activation="relu2", residual=True), dtype, device)
    judge(OP, run(OP, linear_decode, CASES[OP].cast(inputs, dtype)), inputs)


@pytest.mark.parametrize("N", [5, 9, 20, 40])
@pytest.mark.parametrize(("C", "F"), [(1000, 18), (600, 1100), (1100, 18)])
@pytest.mark.parametrize("activation", [None, "swiglu"])
def test_every_tile_of_many_rows(N, C, F, activation, device):
    """Several blocks of columns, the last of them not full; of gate and up fewer are on their way."""
    inputs = CASES[OP].make(dict(N=N, C=C, F=F, norm=True, activation=activation), torch.float16, device)
    gain = torch.randn(C, device=device, dtype=torch.float16)
    compare(inputs | dict(norm_weight=gain, out_dtype=torch.float32, softcap=2.0))


@pytest.mark.parametrize("N", [1, 3, 7])
def test_parts_of_wider_rows_are_read_where_they_lie(N, device):
    """q is a part of the row that holds q, k and v; more than two dimensions are rows, too."""
    wider = torch.randn(N, 1, 300, device=device)
    weight, residual = torch.randn(40, 96, device=device), torch.randn(N, 1, 90, device=device)[..., 7:47]
    compare(dict(x=wider[..., 100:196], weight=weight, residual=residual))


def test_parts_of_a_weight_are_weights(device):
    """The head without its padding; one of several that were stacked."""
    stacked = torch.randn(48, 64, device=device)
    for rows in (slice(0, 20), slice(20, 41), slice(47, 48)):
        compare(dict(x=torch.randn(2, 64, device=device), weight=stacked[rows], out_dtype=torch.float32))


@pytest.mark.parametrize(("N", "F"), [(2, 24), (7, 24), (30, 1030)])
def test_a_row_has_its_bits_whatever_the_others_hold(N, F, device):
    for form in (None, *FORMS):
        weight, scales = torch.randn(F, 256, device=device, dtype=torch.float16), None
        if form is not None:
            weight, scales = quantise(weight, form)
        x = torch.randn(N, 256, device=device, dtype=torch.float16)
        alone = linear_decode(x, weight, scales, eps=1e-6)
        x[1:] = torch.nan
        assert torch.equal(linear_decode(x, weight, scales, eps=1e-6)[0], alone[0])


# Where there is a GPU: bf16, and the kernels that only it has.


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no GPU")
@pytest.mark.parametrize("form", [None, *FORMS])
@pytest.mark.parametrize("N", [1, 2, 4, 5, 8, 16, 32, 64])
@pytest.mark.parametrize(("C", "F"), [(384, 1152), (768, 2304), (2176, 2176), (8704, 130), (320, 200), (64, 17)])
def test_bf16_is_as_exact_as_plain_pytorch(form, N, C, F, device):
    for options in (
        {"norm": True, "activation": "relu2"},
        {"residual": True},
        {"out_dtype": torch.float32, "softcap": 3.0},
    ):
        inputs = CASES[OP].make(dict(N=N, C=C, F=F, **options), torch.bfloat16, device)
        if form is not None:
            inputs["weight"], inputs["scales"] = quantise(inputs["weight"].float(), form)
        compare(inputs)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no GPU")
@pytest.mark.parametrize("form", [None, "int8", "int4"])
def test_a_chain_in_a_graph_gives_what_it_gives_outside(form, device):
    """Kernels that begin before the one before them has ended must wait for what they read: 60 in a row, often."""
    layers = []
    for i in range(60):
        weight = torch.randn(1536 if i % 2 else 768, 768 if i % 2 else 1536, device=device) / 28
        layers.append((weight.bfloat16(), None) if form is None else quantise(weight, form))
    x = torch.randn(1, 1536, device=device, dtype=torch.bfloat16)

    def chain() -> torch.Tensor:
        y = x
        for weight, scales in layers:
            y = linear_decode(y, weight, scales, eps=1e-6)
        return y

    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain()
    for seed in range(20):
        x.copy_(torch.randn(x.shape, device=device, generator=torch.Generator(device).manual_seed(seed)))
        expected = x
        for weight, scales in layers:
            expected = linear_decode(expected, weight, scales, eps=1e-6)
            torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, expected)
