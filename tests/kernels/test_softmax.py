"""Softmax of infinities and of rows of any width."""

import math

import pytest
import torch

from kernels_torch.cases import CASES
from tests.conftest import HAS_GPU
from tests.kernels.test_contract import BACKENDS, MODULES
from tests.numerics import judge, run

HALVES = [torch.float16, *([torch.bfloat16] if HAS_GPU else [])]
INF = math.inf
needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("D", [1, 2, 3, 31, 127, 2049, 16384, 16385, 32768, 32769, 70000])
def test_softmax_of_any_width(backend, D, device):
    """Forward in one block up to 32768, backward up to 16384; twice over the row in blocks of columns beyond."""
    inputs = CASES["softmax"].make(dict(M=3, D=D), torch.float32, device)
    judge("softmax", run("softmax", MODULES[backend].softmax, CASES["softmax"].cast(inputs, torch.float32)), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("D", [7, 40000])
def test_softmax_of_infinities(backend, dtype, D, device):
    """−inf gives 0 and gets no gradient; nothing but −inf gives NaN, as +inf does; the lowest number is a number."""
    x = torch.randn(6, D, device=device).to(dtype)
    x[0, ::2] = -INF
    x[1] = -INF
    x[1, 3] = 2
    x[2] = -INF
    x[3, 4] = INF
    x[4] = torch.finfo(dtype).min
    x[5] = torch.finfo(dtype).min
    x[5, 1] = torch.finfo(dtype).max
    x.requires_grad_()
    y = MODULES[backend].softmax(x)
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    torch.testing.assert_close(y, torch.softmax(x.detach().double(), -1).to(dtype), equal_nan=True)
    assert (y[0, ::2] == 0).all()
    assert (dx[0, ::2] == 0).all()
    assert y[1].nonzero().tolist() == [[3]]
    assert y[2:4].isnan().all()
    assert (y[4] == y[4, 0]).all()
    assert y[5].nonzero().tolist() == [[1]]
    assert dx[[0, 1, 4, 5]].isfinite().all()


@needs_triton
@pytest.mark.parametrize("D", [1, 2, 64, 100, 1024, 4096, 16384, 32768])
def test_tiles_cover_the_row_and_fit_the_hardware(D):
    from kernels_triton import launch
    from kernels_triton.softmax import BACKWARD, FORWARD, tile_of

    for itemsize in (2, 4, 8):
        for table in (FORWARD, BACKWARD):
            tile = tile_of(D, itemsize, table)
            if tile is None:
                assert max(table) < D
                continue
            assert launch.next_power_of_two(D) == tile.BD
            assert tile.warps in (1, 2, 4, 8, 16, 32)
            assert (tile.stages - 1) * tile.BT * tile.BD * itemsize <= launch.STAGE_BYTES
