"""Smear: documents, what came before a row, gradients of the gate and its scale."""

import sys
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from kernels_torch.cases import CASES
from tests.kernels.test_contract import BACKENDS, MODULES
from tests.numerics import judge, run

TRITON = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
CASE = CASES["smear"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_cast_once_give_the_same_numbers(backend, device):
    """What inference casts when it starts, training rounds as it goes: values and gradients agree to the bit."""
    inputs = CASE.make(CASE.check[0], torch.float16, device)
    masters = {"gate_weight": torch.randn_like(inputs["gate_weight"], dtype=torch.float32)}
    others = [name for name in CASE.differentiable if inputs[name] is not None and name not in masters]

    def results(weights: dict) -> tuple[torch.Tensor, ...]:
        leaves = {name: inputs[name].detach().requires_grad_() for name in others}
        y = MODULES[backend].smear(**inputs | weights | leaves)
        return y, *torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))

    cast = {name: weight.half() for name, weight in masters.items()}
    for from_masters, from_cast in zip(results(masters), results(cast), strict=True):
        assert torch.equal(from_masters, from_cast)


def documents_of(doc_ids: torch.Tensor) -> list[slice]:
    """Where each document of a row begins and ends."""
    edges = [0, *[t for t in range(1, len(doc_ids)) if doc_ids[t] != doc_ids[t - 1]], len(doc_ids)]
    return [slice(begin, end) for begin, end in pairwise(edges)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_end_at_every_place(backend, device):
    """All ways to cut a row of five: values and dx of each document are what it gives alone."""
    smear = MODULES[backend].smear
    doc_ids = torch.tensor([[bits >> t & 1 for t in range(4)] for bits in range(16)], device=device)
    doc_ids = F.pad(doc_ids, (1, 0)).cumsum(1).int()
    case = CASE.make(dict(B=16, T=5, D=9, G=4), torch.float32, device)
    x, weight, scale = case["x"].requires_grad_(), case["gate_weight"], case["scale"]
    d = torch.randn(16, 5, 9, device=device)
    y = smear(x, weight, scale, doc_ids=doc_ids)
    (dx,) = torch.autograd.grad(y, x, d)
    for row in range(16):
        for part in documents_of(doc_ids[row]):
            alone = x[row : row + 1, part].detach().requires_grad_()
            out = smear(alone, weight, scale)
            (alone_dx,) = torch.autograd.grad(out, alone, d[row : row + 1, part])
            torch.testing.assert_close(y[row : row + 1, part], out, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(dx[row : row + 1, part], alone_dx, rtol=1e-6, atol=1e-6)


@TRITON
def test_nan_stays_in_its_document(device):
    """In values and in gradients; the reference multiplies what another document holds by zero."""
    doc_ids = torch.tensor([[0, 0, 1, 1, 1, 2]], device=device)
    inputs = CASE.make(dict(B=1, T=6, D=9, G=4), torch.float32, device) | dict(doc_ids=doc_ids)
    x, d = inputs["x"], torch.randn(1, 6, 9, device=device)
    x[:, 2:5], d[:, 2:5] = torch.nan, torch.nan
    y = MODULES["triton"].smear(**inputs | {"x": x.requires_grad_()})
    (dx,) = torch.autograd.grad(y, x, d)
    for value in (y, dx):
        assert value[:, 2:5].isnan().all()
        assert not value[:, :2].isnan().any()
        assert not value[:, 5:].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_goes_on_from_what_came_before(backend, device):
    """A row in two parts, the second told what came before, is the whole row."""
    inputs = CASE.make(dict(B=3, T=11, D=33), torch.float32, device)
    whole = MODULES[backend].smear(**inputs)
    for t in (1, 4, 10):
        x = inputs["x"]
        first = MODULES[backend].smear(**inputs | {"x": x[:, :t]})
        second = MODULES[backend].smear(**inputs | {"x": x[:, t:], "previous": x[:, t - 1 : t]})
        torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-6, atol=1e-6)


@TRITON
@pytest.mark.parametrize(("D", "G"), [(150, 24), (150, 100), (128, 128)])
def test_rows_wider_than_a_block(D, G, device, monkeypatch):
    """Blocks of 64 columns, or as many as the gate has channels."""
    monkeypatch.setattr(sys.modules["kernels_triton.smear"], "WIDEST_BLOCK", 64)
    inputs = CASE.make(dict(B=2, T=7, D=D, G=G, previous=True), torch.float32, device)
    judge("smear", run("smear", MODULES["triton"].smear, CASE.cast(inputs, torch.float32)), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shape",
    [
        dict(B=2, T=3, D=9000, previous=True),
        dict(B=1, T=9, D=60, G=60),
        dict(B=4, T=300, D=2, G=1),
        dict(B=1, T=40, D=1280, G=33, documents=4),
    ],
    ids=lambda shape: " ".join(f"{key}={value}" for key, value in shape.items()),
)
def test_any_width_and_any_gate(backend, shape, device):
    """Rows wider than one block, whose first block comes last; more tiles than programs."""
    inputs = CASE.make(shape, torch.float32, device)
    judge("smear", run("smear", MODULES[backend].smear, CASE.cast(inputs, torch.float32)), inputs)


def test_the_gradients_of_the_gate_and_of_its_scale_are_exact_sums(device):
    """In fp64 to the last digits, though the terms cancel: nothing is lost between programs."""
    inputs = CASE.make(dict(B=5, T=131, D=8, G=3), torch.float64, device)
    cast = CASE.cast
    results = {b: run("smear", MODULES[b].smear, cast(inputs, torch.float64)) for b in BACKENDS}
    for name in ("gate_weight", "scale"):
        for backend in BACKENDS:
            exact = results["torch"][f"gradient of {name}"]
            torch.testing.assert_close(results[backend][f"gradient of {name}"], exact, rtol=1e-12, atol=1e-12)


@TRITON
def test_two_runs_over_many_programs_give_the_same_bits(device):
    shape = dict(B=2, T=500, D=40)
    inputs = CASE.make(shape, torch.float32, device)
    first, second = (run("smear", MODULES["triton"].smear, CASE.cast(inputs, torch.float32)) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    judge("smear", first, inputs)


@TRITON
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sizes_of_real_models_twice_with_the_same_bits(dtype, device):
    """A gate of fp32 must not become a product in tf32 on the way."""
    shape = dict(B=8, T=2048, D=1280)
    inputs = CASE.make(shape, dtype, device)
    first, second = (run("smear", MODULES["triton"].smear, CASE.cast(inputs, dtype)) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    judge("smear", first, inputs)


@TRITON
@pytest.mark.parametrize("D", [1, 5, 64, 96, 128, 768, 1280, 1536, 2176, 4096, 33000])
def test_tiles_hold_the_gate_and_fit_the_hardware(D):
    module = sys.modules["kernels_triton.smear"]
    for itemsize in (2, 4, 8):
        tile = module.bwd_tile(D, min(24, D), itemsize)
        assert min(24, D) <= tile.BD
        assert tile.warps <= 16
        assert tile.stages >= 1
        assert 4 * (tile.stages - 1) * tile.BT * tile.BD * itemsize <= 2**16
