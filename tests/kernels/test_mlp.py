"""The two MLPs, one hidden unit at a time."""

import math

import pytest
import torch

from kernels_torch.cases import CASES
from tests.kernels.test_contract import BACKENDS, MODULES

SHAPE = {"N": 3, "D": 4, "F": 5}


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


@pytest.mark.parametrize("op", ["relu2_mlp", "swiglu_mlp"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_dimensions_are_kept(backend, op, device):
    if op not in MODULES[backend].__all__:
        pytest.skip(f"kernels_{backend} has no {op}")
    inputs = CASES[op].make({"N": 6, "D": 4, "F": 5}, torch.float64, device)
    flat = getattr(MODULES[backend], op)(**inputs)
    deep = getattr(MODULES[backend], op)(**inputs | {"x": inputs["x"].view(2, 3, 4)})
    torch.testing.assert_close(deep, flat.view(2, 3, 4), rtol=1e-12, atol=1e-12)
