"""Rotation, norm and scale of q and k: against complex numbers, and what positions must mean."""

import pytest
import torch

from kernels_torch.cases import CASES
from tests.kernels.test_contract import BACKENDS, MODULES

WITH_OP = [backend for backend in BACKENDS if "qk_norm_rope" in MODULES[backend].__all__]
SHAPE = {"B": 3, "T": 5, "H": 4, "Hkv": 2, "D": 8}


@pytest.fixture
def inputs(device):
    inputs = CASES["qk_norm_rope"].make(SHAPE, torch.float64, device)
    angles = torch.outer(torch.arange(13, device=device), torch.tensor([1.0, 0.3, 0.1, 0.03], device=device).double())
    return inputs | {"cos": angles.cos(), "sin": angles.sin()}


def rotated(x, cos, sin, position):
    """Each pair (x[i], x[i + D/2]) as a complex number, turned by −θ."""
    a, b = x.chunk(2, dim=-1)
    turned = torch.complex(a, b) * torch.complex(cos[position], -sin[position])
    return torch.cat([turned.real, turned.imag], dim=-1)


@pytest.mark.parametrize("backend", WITH_OP)
@pytest.mark.parametrize("eps", [None, 1e-6, 0.5])
def test_equals_a_complex_rotation_then_norm_then_scale(backend, eps, inputs):
    got = MODULES[backend].qk_norm_rope(**inputs | {"start": 2, "eps": eps, "scale": 1.2})
    for x, y in zip((inputs["q"], inputs["k"]), got, strict=True):
        for t in range(SHAPE["T"]):
            z = rotated(x[:, t], inputs["cos"], inputs["sin"], 2 + t)
            if eps is not None:
                z = z / (z.square().mean(-1, keepdim=True) + eps).sqrt()
            torch.testing.assert_close(y[:, t], 1.2 * z, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", WITH_OP)
def test_every_row_may_start_elsewhere(backend, inputs, device):
    """A tensor of starts gives each row what an int start gives it alone, to the bit."""
    starts = [0, 3, 8]
    for dtype in (torch.int32, torch.int64):
        start = torch.tensor(starts, dtype=dtype, device=device)
        together = MODULES[backend].qk_norm_rope(**inputs | {"start": start})
        for b, position in enumerate(starts):
            row = {"q": inputs["q"][b : b + 1], "k": inputs["k"][b : b + 1], "start": position}
            alone = MODULES[backend].qk_norm_rope(**inputs | row)
            for x, y in zip(together, alone, strict=True):
                assert torch.equal(x[b : b + 1], y)


@pytest.mark.parametrize("backend", WITH_OP)
def test_scores_depend_on_the_distance_only(backend, inputs):
    """The same q and k moved along together keep their product: what makes positions relative."""
    q, k = inputs["q"][:, :1].expand(-1, 5, -1, -1), inputs["k"][:, :1].expand(-1, 5, -1, -1)
    q, k = MODULES[backend].qk_norm_rope(**inputs | {"q": q, "k": k})
    scores = torch.einsum("bthd,bshd->bhts", q[:, :, :2], k)
    for distance in range(1, 5):
        along = scores.diagonal(-distance, dim1=-2, dim2=-1)
        torch.testing.assert_close(along, along[..., :1].expand_as(along), rtol=1e-12, atol=1e-12)
        assert (along[..., 0] - scores[..., 0, 0]).abs().min() > 1e-6


@pytest.mark.parametrize("backend", WITH_OP)
def test_head_vectors_have_the_length_the_scale_says(backend, inputs):
    for y in MODULES[backend].qk_norm_rope(**inputs | {"eps": 0.0, "scale": 1.2}):
        torch.testing.assert_close(y.square().mean(-1), torch.full(y.shape[:-1], 1.44, dtype=y.dtype, device=y.device))
