"""Value embedding: frequent and rare tokens, gates of any width, every gradient."""

import sys

import pytest
import torch

import kernels_torch
from kernels_torch.cases import CASES
from tests.kernels.test_contract import BACKENDS, MODULES
from tests.kernels.test_embedding import TOKENS
from tests.numerics import judge, run

TRITON = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
CASE = CASES["value_embedding"]


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_frequent_and_rare_tokens(backend, name, device):
    """Every gradient; the gate's come out of the same pass over the sorted tokens."""
    tokens = TOKENS[name].to(device)[None]
    T, V = tokens.shape[1], int(tokens.max()) + 2
    inputs = CASE.make(dict(B=1, T=T, Hkv=3, D=5, V=V), torch.float32, device) | dict(tokens=tokens)
    judge(
        "value_embedding",
        run("value_embedding", MODULES[backend].value_embedding, CASE.cast(inputs, torch.float32)),
        inputs,
    )


@TRITON
def test_a_vocabulary_too_large_for_16_bits_is_sorted_in_32(device, monkeypatch):
    monkeypatch.setattr(sys.modules["kernels_triton.embedding"], "SHORT", 0)
    inputs = CASE.make(CASE.check[-2], torch.float32, device)
    judge(
        "value_embedding",
        run("value_embedding", MODULES["triton"].value_embedding, CASE.cast(inputs, torch.float32)),
        inputs,
    )


@TRITON
def test_the_gradient_of_v_is_the_one_that_came_in(device):
    """Not a copy of it."""
    inputs = CASE.make(dict(B=2, T=7, Hkv=3, D=8, V=11), torch.float32, device)
    y = MODULES["triton"].value_embedding(**inputs | {"v": inputs["v"].requires_grad_()})
    d = torch.randn_like(y)
    assert torch.autograd.grad(y, inputs["v"], d)[0].data_ptr() == d.data_ptr()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shape",
    [
        dict(B=1, T=5, Hkv=2, D=1100, V=3, G=2),
        dict(B=1, T=9, Hkv=19, D=3, V=4, G=40),
        dict(B=1, T=70, Hkv=5, D=96, V=4, G=1, gate_range=0.0),
    ],
    ids=["wide heads", "many heads, many channels", "a gate that is shut"],
)
def test_unusual_heads(backend, shape, device):
    """Several blocks of columns, of heads and of the gate's channels."""
    inputs = CASE.make(shape, torch.float32, device)
    cast = CASE.cast(inputs, torch.float32)
    judge("value_embedding", run("value_embedding", MODULES[backend].value_embedding, cast), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_cast_once_give_the_same_numbers(backend, device):
    """What inference casts when it starts, training rounds as it goes: values and gradients agree to the bit."""
    inputs = CASE.make(CASE.check[0], torch.float16, device)
    masters = {name: torch.randn_like(inputs[name], dtype=torch.float32) for name in ("table", "gate_weight")}
    others = [name for name in CASE.differentiable if name not in masters]

    def results(weights: dict) -> tuple[torch.Tensor, ...]:
        leaves = {name: inputs[name].detach().requires_grad_() for name in others}
        y = MODULES[backend].value_embedding(**inputs | weights | leaves)
        return y, *torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))

    cast = {name: weight.half() for name, weight in masters.items()}
    for from_masters, from_cast in zip(results(masters), results(cast), strict=True):
        assert torch.equal(from_masters, from_cast)


def test_the_gradient_of_the_gate_is_an_exact_sum(device):
    """In fp64 to the last digits, though the terms cancel: nothing is lost between programs."""
    inputs = CASE.make(dict(B=5, T=131, Hkv=2, D=4, V=7, G=3), torch.float64, device)
    cast = CASE.cast
    results = {b: run("value_embedding", MODULES[b].value_embedding, cast(inputs, torch.float64)) for b in BACKENDS}
    exact = results["torch"]["gradient of gate_weight"]
    for backend in BACKENDS:
        torch.testing.assert_close(results[backend]["gradient of gate_weight"], exact, rtol=1e-12, atol=1e-12)


@TRITON
def test_two_runs_over_many_programs_give_the_same_bits(device):
    shape = dict(B=2, T=500, Hkv=2, D=16, V=30, zipf=True)
    inputs = CASE.make(shape, torch.float32, device)
    first, second = (
        run("value_embedding", MODULES["triton"].value_embedding, CASE.cast(inputs, torch.float32)) for _ in range(2)
    )
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    judge("value_embedding", first, inputs)


@TRITON
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sizes_of_real_models_twice_with_the_same_bits(dtype, device):
    """A gate of fp32 must not become a product in tf32 on the way."""
    shape = dict(B=8, T=2048, Hkv=10, D=128, V=8192, zipf=True)
    inputs = CASE.make(shape, dtype, device)
    first, second = (
        run("value_embedding", MODULES["triton"].value_embedding, CASE.cast(inputs, dtype)) for _ in range(2)
    )
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    judge("value_embedding", first, inputs)


def test_the_reference_is_what_its_docstring_says(device):
    """One token and one head at a time, in fp64."""
    case = CASE.make(dict(B=2, T=4, Hkv=3, D=5, V=6, G=2), torch.float64, device)
    y = kernels_torch.value_embedding(**case)
    for b, t, h in [(0, 0, 0), (1, 3, 2), (0, 2, 1)]:
        gate = 3 / (1 + torch.exp(-(case["gate_input"][b, t] * case["gate_weight"][h]).sum()))
        row = case["table"][case["tokens"][b, t], 5 * h : 5 * h + 5]
        torch.testing.assert_close(y[b, t, h], case["v"][b, t, h] + gate * row)
