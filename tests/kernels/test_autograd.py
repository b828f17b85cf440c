"""Second derivatives, which kernels do not have: asked for, they are refused and never taken for zero."""

import pytest
import torch

from kernels_torch.cases import CASES
from tests.kernels.test_contract import BACKENDS, MODULES
from tests.numerics import floating, leaves_of, outputs

pytestmark = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
DIFFERENTIABLE = [op for op in MODULES.get("triton", MODULES["torch"]).__all__ if CASES[op].differentiable]


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_second_derivatives_are_refused(op, device):
    """Even where the loss has another path to the input, on which PyTorch would go and leave this one out."""
    inputs = CASES[op].make(CASES[op].check[0], torch.float32, device)
    leaves = list(leaves_of(op, inputs).values())
    loss = sum(out.square().sum() for out in floating(outputs(getattr(MODULES["triton"], op), inputs)))
    with pytest.raises(RuntimeError, match=r"no second derivatives .* take kernels=torch"):
        torch.autograd.grad(loss, leaves, create_graph=True)
