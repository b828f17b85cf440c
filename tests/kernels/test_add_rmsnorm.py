"""Residual add and mix with the norm that follows: the formulas themselves, wide rows, exact sums, an output unused."""

import pytest
import torch

from kernels_torch.cases import CASES
from tests.conftest import HAS_GPU
from tests.kernels.test_contract import BACKENDS, MODULES, exact_and_plain, judge, run
from tests.numerics import assert_close

HALF = [torch.float16, *([torch.bfloat16] if HAS_GPU else [])]
needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")


def normalised(s, eps):
    return torch.stack([row / torch.sqrt((row * row).sum() / row.numel() + eps) for row in s])


def add_formula(x, branch, weight=None, *, eps=1e-6):
    s = x + branch
    y = normalised(s, eps)
    return y if weight is None else y * weight, s


def mix_formula(x, anchor, x_scale, anchor_scale, branch=None, *, eps=1e-6):
    stream = x if branch is None else x + branch
    s = (1 if x_scale is None else x_scale) * stream + anchor_scale * anchor
    return normalised(s, eps), s, anchor


SHAPES = [
    ("add_rmsnorm", add_formula, dict(M=5, D=33, eps=1e-3)),
    ("add_rmsnorm", add_formula, dict(M=5, D=33, weight=True)),
    *(
        ("mix_rmsnorm", mix_formula, dict(M=5, D=33, eps=1e-3, branch=branch, scaled=scaled))
        for branch in (False, True)
        for scaled in (False, True)
    ),
]


@pytest.mark.parametrize(("op", "formula", "shape"), SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_formula(backend, op, formula, shape, device):
    """Forward and gradients in fp64; so the reference is held to something too."""
    inputs = CASES[op].make(shape, torch.float64, device)
    got = run(op, getattr(MODULES[backend], op), CASES[op].cast(inputs, torch.float64))
    for name, value in run(op, formula, CASES[op].cast(inputs, torch.float64)).items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", ["add_rmsnorm", "mix_rmsnorm"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("D", [1, 2, 3, 31, 127, 2049, 8191, 16384, 16385, 32768])
def test_any_width(backend, D, op, device):
    """One block up to 16384, several kernels beyond; in fp64, where two sums over everything cannot be off by luck."""
    for M in (1, 3):
        inputs = CASES[op].make(dict(M=M, D=D), torch.float64, device)
        got = run(op, getattr(MODULES[backend], op), CASES[op].cast(inputs, torch.float64))
        for name, value in exact_and_plain(op, inputs)[0].items():
            torch.testing.assert_close(got[name], value, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("op", ["add_rmsnorm", "mix_rmsnorm"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("shape", [dict(M=7, D=60), dict(M=2, D=16390)])
def test_an_output_that_nothing_uses(backend, op, used, shape, device):
    """Its gradient is zero; the first is unused before an attention that is switched off, the second after backout."""
    inputs = CASES[op].make(shape, torch.float32, device)

    def one_output(function):
        return lambda **arguments: function(**arguments)[used]

    def results(backend, dtype):
        function = one_output(getattr(MODULES[backend], op))
        return run(op, function, CASES[op].cast(inputs, dtype), (upstream.to(dtype),))

    upstream = torch.randn(inputs["x"].shape, device=device)
    exact, plain = (results("torch", dtype) for dtype in (torch.float64, torch.float32))
    got = results(backend, torch.float32)
    for name, value in got.items():
        if value.numel() > 1:
            assert_close(value, exact[name], plain[name], f"{op} {name}")
        else:
            torch.testing.assert_close(value, exact[name].float(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("D", [33, 16390])
def test_the_anchors_gradient_comes_back_along_a_chain(backend, D, device):
    """Of three mixes, the last of which passes it on to nobody, and of one whose other outputs nothing uses."""

    def chain(backend, dtype):
        x, anchor, branch = (value.to(dtype, copy=True) for value in values)
        anchor.requires_grad_()
        scales, y, passed, loss = torch.linspace(0.5, 2, 6, device=device, dtype=dtype), None, anchor, 0
        for i in range(3):
            y, x, passed = MODULES[backend].mix_rmsnorm(x, passed, scales[i], scales[i + 3], branch)
            loss = loss + (y * branch).sum()
        *_, passed = MODULES[backend].mix_rmsnorm(x.detach(), anchor, None, scales[0])
        return torch.autograd.grad(loss + (passed * branch).sum(), anchor)[0]

    values = torch.randn(3, 5, D, device=device)
    exact, plain = (chain("torch", dtype) for dtype in (torch.float64, torch.float32))
    assert_close(chain(backend, torch.float32), exact, plain)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("M", "D"), [(4099, 7), (130, 257)])
def test_scalar_gradients_are_exact_sums(backend, M, D, device):
    """Over many programs, of integers: not one product may be missing, counted twice or rounded away."""
    x, branch, anchor, ds = (torch.randint(-8, 9, (M, D), device=device).float() for _ in range(4))
    x_scale, anchor_scale = torch.ones(1, device=device), torch.tensor(2.0, device=device)
    leaves = [x_scale.requires_grad_(), anchor_scale.requires_grad_()]
    s = MODULES[backend].mix_rmsnorm(x, anchor, x_scale, anchor_scale, branch)[1]
    dx_scale, danchor_scale = torch.autograd.grad(s, leaves, ds)
    assert torch.equal(s, x + branch + 2 * anchor)
    assert dx_scale.tolist() == [(ds.double() * (x + branch)).sum().item()]
    assert danchor_scale.item() == (ds.double() * anchor).sum().item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("i", range(5))
def test_scales_may_be_elements_of_a_vector_in_any_dtype(backend, i, device):
    """As the layers' are: they begin anywhere, and each gets its gradient in its own shape and dtype."""
    x, anchor = torch.randn(2, 6, 20, device=device)
    scales = torch.rand(2, 5, device=device, dtype=torch.float64).requires_grad_()
    x_scale, anchor_scale = scales[0].float()[i], scales[1, i : i + 1]
    _, s, _ = MODULES[backend].mix_rmsnorm(x, anchor, x_scale, anchor_scale)
    dx_scale, danchor_scale = torch.autograd.grad(s.sum(), [x_scale, anchor_scale], retain_graph=True)
    assert (dx_scale.shape, dx_scale.dtype) == ((), torch.float32)
    assert (danchor_scale.shape, danchor_scale.dtype) == ((1,), torch.float64)
    (gradient,) = torch.autograd.grad(s.sum(), scales)
    expected = torch.zeros_like(scales)
    expected[:, i] = torch.stack([x.sum(), anchor.sum()]).detach()
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALF)
def test_y_is_the_norm_of_the_sum_as_it_is_kept(backend, dtype, device):
    """s is rounded first; y, from the rounded s, is rounded once."""
    x, branch, anchor = torch.randn(3, 9, 65, device=device).to(dtype)
    scales = torch.rand(2, device=device)
    for y, s, *_ in (
        MODULES[backend].add_rmsnorm(x, branch),
        MODULES[backend].mix_rmsnorm(x, anchor, scales[0], scales[1], branch),
    ):
        assert y.dtype == s.dtype == dtype
        exact = normalised(s.double(), 1e-6)
        assert ((y - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() * 1.001).all()
    assert torch.equal(MODULES[backend].add_rmsnorm(x, branch)[1], x + branch)


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["add_rmsnorm", "mix_rmsnorm"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("M", "D"), [(1000, 2176), (65536, 384), (4096, 768), (777, 20000)])
def test_sizes_of_real_models_twice_with_the_same_bits(backend, op, M, D, device):
    inputs = CASES[op].make(dict(M=M, D=D), torch.bfloat16, device)
    first, second = (run(op, getattr(MODULES[backend], op), CASES[op].cast(inputs, torch.bfloat16)) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    judge(op, first, inputs)


@needs_triton
@pytest.mark.parametrize("D", [1, 2, 3, 64, 100, 128, 768, 1000, 1280, 1536, 2176, 4096, 8192, 16384])
def test_tiles_cover_the_row_and_fit_the_hardware(D):
    from kernels_triton import launch

    backward = {size: [launch.mix_rmsnorm_bwd_tile(D, size, needs) for needs in (False, True)] for size in (2, 4, 8)}
    forward = (launch.add_rmsnorm_fwd_tile(D), launch.mix_rmsnorm_fwd_tile(D))
    for tile in (*forward, *backward[2], *backward[4], *backward[8]):
        assert launch.next_power_of_two(D) == tile.BD
        assert 128 * 32 * tile.warps >= tile.BT * tile.BD  # values a thread, threads a warp
        assert tile.warps in (1, 2, 4, 8, 16)
    for itemsize, tiles in backward.items():
        for tile in tiles:
            assert 5 * (tile.stages - 1) * tile.BT * tile.BD * itemsize <= launch.STAGE_BYTES
