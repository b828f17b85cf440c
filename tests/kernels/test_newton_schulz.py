"""The orthogonalisation of Muon: singular values, rotations, zeros, and the published coefficients."""

import pytest
import torch

from kernels_torch import newton_schulz as module_function
from kernels_torch.newton_schulz import POLAR_EXPRESS
from tests.kernels.test_contract import BACKENDS, MODULES

WITH_OP = [backend for backend in BACKENDS if "newton_schulz" in MODULES[backend].__all__]
SHAPES = [(3, 16, 16), (2, 24, 64), (2, 64, 24), (1, 1, 9), (1, 9, 1)]


def on_singular_values(s):
    """What the iteration does to one singular value: the same polynomial on a number."""
    for a, b, c in POLAR_EXPRESS:
        s = a * s + b * s**3 + c * s**5
    return s


@pytest.mark.parametrize("backend", WITH_OP)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_acts_on_singular_values_and_keeps_singular_vectors(backend, shape, device):
    """In fp64: U s Vᵀ becomes U p(s) Vᵀ, with s divided by 1.01 ‖g‖ + 1e-6 first."""
    g = torch.randn(shape, dtype=torch.float64, device=device)
    U, s, Vh = torch.linalg.svd(g, full_matrices=False)
    s = s / (1.01 * s.square().sum(1, keepdim=True).sqrt() + 1e-6)
    expected = U @ torch.diag_embed(on_singular_values(s)) @ Vh
    got = MODULES[backend].newton_schulz(g, dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", WITH_OP)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_end_in_a_band_around_one(backend, dtype, device):
    """Whatever the scale of g: that of a tiny gradient and that of a large one."""
    for scale in (1e-3, 1.0, 1e4):
        g = scale * torch.randn(2, 48, 96, device=device)
        X = MODULES[backend].newton_schulz(g, dtype=dtype)
        s = torch.linalg.svdvals(X.float())
        assert X.dtype == dtype
        assert s.min() > 0.7
        assert s.max() < 1.25


@pytest.mark.parametrize("backend", WITH_OP)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_of_zeros_stays_zero(backend, dtype, device):
    """And does not disturb its neighbours in the stack: an unused expert has no gradient."""
    g = torch.randn(3, 8, 12, device=device)
    g[1] = 0
    X = MODULES[backend].newton_schulz(g, dtype=dtype)
    assert torch.equal(X[1], torch.zeros_like(X[1]))
    assert X.isfinite().all()
    assert (X[[0, 2]].float().square().sum((1, 2)) > 1).all()


@pytest.mark.parametrize("backend", WITH_OP)
def test_tall_is_the_transpose_of_wide(backend, device):
    g = torch.randn(2, 12, 31, dtype=torch.float64, device=device)
    wide = MODULES[backend].newton_schulz(g, dtype=torch.float64)
    tall = MODULES[backend].newton_schulz(g.mT, dtype=torch.float64)
    torch.testing.assert_close(tall.mT, wide, rtol=1e-12, atol=1e-12)


def test_the_default_is_bf16(device):
    assert module_function(torch.randn(1, 4, 4, device=device)).dtype == torch.bfloat16


def test_the_coefficients_are_the_published_ones():
    """A digit lost here would go unnoticed for a long time: the band above is wide."""
    assert len(POLAR_EXPRESS) == 5
    assert POLAR_EXPRESS[0] == (8.156554524902461, -22.48329292557795, 15.878769915207462)
    assert POLAR_EXPRESS[1] == (4.042929935166739, -2.808917465908714, 0.5000178451051316)
    assert POLAR_EXPRESS[2] == (3.8916678022926607, -2.772484153217685, 0.5060648178503393)
    assert POLAR_EXPRESS[3] == (3.285753657755655, -2.3681294933425376, 0.46449024233003106)
    assert POLAR_EXPRESS[4] == (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)
