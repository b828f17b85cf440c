"""Products of 8-bit numbers: each rounding is one rounding, bounds hold, nothing that is not finite gets lost.

How far results may be off follows from the formats. A value rounded to f bits of fraction errs by up to half of 2^−f
of its power of two; over all fractions that is 2^−f / √24 of the value in the root mean square: 2.6 % in e4m3, 5.1 % in
e5m2. In a product of independent values the errors of both sides add up as squares.
"""

import math
from importlib import import_module

import pytest
import torch
from torch import Tensor

import kernels_torch.fp8 as reference
from kernels_torch.fp8 import E4M3, E5M2, Fp8
from tests.conftest import HAS_GPU
from tests.kernels.test_contract import BACKENDS, every_second, inside_wider, transposed

MODULES = {backend: import_module(f"kernels_{backend}.fp8") for backend in BACKENDS}
# Bits of fraction, and the exponent of the smallest value that has them all.
FORMATS = {E4M3: (3, -6), E5M2: (2, -14)}
ROUNDING = {dtype: 2.0**-bits / math.sqrt(24) for dtype, (bits, _) in FORMATS.items()}
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if HAS_GPU else [])]
# Rows, columns: one tile, several that are not full, more columns than a block that is measured.
SHAPES = [(16, 16), (80, 144), (208, 48), (16, 2064)]


def quantize(backend: str, x: Tensor, dtype: torch.dtype, row_norm: float | None = None) -> Fp8:
    module = MODULES[backend]
    return module.quantize(x if backend == "torch" else [x], dtype, row_norm)


def back(q: Fp8) -> Tensor:
    """What the 8-bit numbers stand for."""
    return q.values.double() * q.facts[0].double()


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def weight_of(backend: str, *matrices: Tensor) -> Fp8:
    weight = MODULES[backend].empty_weight(sum(map(len, matrices)), matrices[0].shape[1], matrices[0].device)
    MODULES[backend].fp8_weights([matrices], [weight])
    return weight


def normed(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, float]:
    """Rows as a norm leaves them, and their norm."""
    x = torch.randn(shape, device=device)
    return (x * x.square().mean(-1, keepdim=True).rsqrt()).to(dtype), math.sqrt(shape[-1])


@pytest.mark.parametrize("row_norm", [None, 1e3])
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_value_is_rounded_once(backend, shape, dtype, source, row_norm, device):
    x = (torch.randn(shape, device=device) * torch.randn(shape, device=device).exp()).to(source)
    q = quantize(backend, x, dtype, row_norm)
    bits, lowest = FORMATS[dtype]
    step = 2.0**-bits * torch.maximum(x.double().abs(), 2.0**lowest * q.facts[0].double())
    assert ((back(q) - x.double()).abs() <= step / 2).all()
    assert same_bits(q.turned, q.values.view(torch.uint8).t())
    assert q.facts[1] >= x.double().norm(dim=1).max() * (1 - 1e-6)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("strided", [lambda x: x, transposed, every_second, inside_wider])
def test_backends_agree_bit_for_bit(shape, dtype, strided, device):
    x = strided(torch.randn(shape, device=device))
    expected = quantize("torch", x, dtype)
    for backend in BACKENDS:
        got = quantize(backend, x, dtype)
        assert same_bits(got.values, expected.values)
        assert same_bits(got.turned, expected.turned)
        torch.testing.assert_close(got.facts, expected.facts)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("largest", [1.0, 1.9999999, 2.0, 448.0, 57344.0, 3e38, 1e-30])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_largest_value_fits_and_uses_the_range(backend, largest, dtype, device):
    x = torch.full((16, 16), largest, device=device)
    x[1, 2], x[0] = -largest, 0
    q = quantize(backend, x, dtype)
    if largest < 3e38:  # there the squares of a row overflow, but not the values
        assert q.facts.isfinite().all()
    assert (back(q) / largest - x.double() / largest).abs().max() <= 2.0 ** -(FORMATS[dtype][0] + 1)
    assert q.values.float().abs().max() > torch.finfo(dtype).max / 4


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_stay_zeros(backend, dtype, device):
    q = quantize(backend, torch.zeros(16, 32, device=device), dtype)
    assert (back(q) == 0).all()
    assert q.facts[0] > 0
    assert q.facts[1] == 0


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_is_not_lost(backend, dtype, bad, device):
    """Measured, it spoils the whole tensor; with a bound given, its own value: either way the loss will be NaN."""
    x = torch.randn(32, 48, device=device)
    x[5, 7] = bad
    assert back(quantize(backend, x, dtype)).isnan().all()
    known = quantize(backend, x, dtype, 100.0)
    assert known.values.float()[5, 7].isnan()
    assert known.turned.float()[7, 5].isnan()
    assert known.values.float().isnan().sum() == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_beyond_a_wrong_bound_values_saturate(backend, device):
    q = quantize(backend, torch.full((16, 16), -300.0, device=device), E4M3, 2.0)
    assert (q.values.float() == -448).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_many_shapes_at_once(backend, device):
    """Several to a group share a unit; each is what it is alone in one tensor."""
    groups = [[(48, 64), (16, 64), (32, 64)], [(256, 64)], [(64, 2064)], [(16, 16)]]
    sources = [
        [torch.randn(shape, device=device) * 10.0 ** (2 * i - 3) for shape in group] for i, group in enumerate(groups)
    ]
    weights = [
        MODULES[backend].empty_weight(sum(r for r, _ in group), group[0][1], device) for group in groups
    ]  # fmt: skip
    assert all(weight.values.float().isnan().all() and weight.turned.float().isnan().all() for weight in weights)
    for _ in range(2):  # again, over what was there
        MODULES[backend].fp8_weights(sources, weights)
        for matrices, weight in zip(sources, weights, strict=True):
            whole = reference.quantize(torch.cat(matrices), E4M3)
            assert same_bits(weight.values, whole.values)
            assert same_bits(weight.turned, whole.turned)
            torch.testing.assert_close(weight.facts[:2], whole.facts)
        sources = [[matrix * 0.1 for matrix in group] for group in sources]


def relative_error(got: Tensor, exact: Tensor) -> float:
    got, exact = got.detach().double(), exact.detach().double()
    return float((got - exact).norm() / exact.norm())


def expect_error(got: Tensor, exact: Tensor, *roundings: float, slack: float = 1.2) -> None:
    """About what so many independent roundings make, neither more nor so little that none took place."""
    expected = math.hypot(*roundings)
    assert expected / 2 < relative_error(got, exact) < slack * expected


def linear(backend: str, x: Tensor, masters: list[Tensor], **options) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and gradients of x and of the masters for random ones of the outputs."""
    x, masters = x.detach().requires_grad_(), [w.detach().requires_grad_() for w in masters]
    weight = weight_of(backend, *[w.detach() for w in masters])
    outs = MODULES[backend].fp8_linear(x, masters, weight, **options)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(y.shape, generator=generator).to(y) for y in outs]
    return list(outs), list(torch.autograd.grad(outs, [x, *masters], upstream))


def exact_linear(x: Tensor, masters: list[Tensor], n_first: int) -> tuple[list[Tensor], list[Tensor]]:
    x, masters = x.detach().double().requires_grad_(), [w.detach().double().requires_grad_() for w in masters]
    outs = [x[..., :n_first], *(x @ w.t() for w in masters)]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(y.shape, generator=generator).to(y) for y in outs]
    return outs, list(torch.autograd.grad(outs, [x, *masters], upstream))


@pytest.mark.parametrize("n_first", [0, 5])
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("sizes", [(48,), (64, 32, 16)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_errs_as_its_formats_do(backend, sizes, known, source, n_first, device):
    x, row_norm = normed(3, 32, 128, device=device, dtype=source)
    masters = [torch.randn(n, 128, device=device) for n in sizes]
    options = dict(row_norm=row_norm if known else None, n_first=n_first)
    outs, (dx, *dws) = linear(backend, x, masters, **options)
    exact_outs, (exact_dx, *exact_dws) = exact_linear(x, masters, n_first)
    assert torch.equal(outs[0], x[..., :n_first])
    for y, exact in zip(outs[1:], exact_outs[1:], strict=True):
        assert y.dtype == source
        expect_error(y, exact, ROUNDING[E4M3], ROUNDING[E4M3])
    expect_error(dx, exact_dx, ROUNDING[E5M2], ROUNDING[E4M3])
    for dw, exact in zip(dws, exact_dws, strict=True):
        assert dw.dtype == torch.float32
        expect_error(dw, exact, ROUNDING[E5M2], ROUNDING[E4M3])


def mlp(backend: str, x: Tensor, w_up: Tensor, w_down: Tensor, dy: Tensor, row_norm: float | None) -> list[Tensor]:
    """y, dx, dw_up, dw_down."""
    leaves = [tensor.detach().requires_grad_() for tensor in (x, w_up, w_down)]
    up, down = weight_of(backend, w_up), weight_of(backend, w_down)
    y = MODULES[backend].fp8_relu2_mlp(*leaves, up, down, row_norm=row_norm)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def exact_mlp(x: Tensor, w_up: Tensor, w_down: Tensor, dy: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().double().requires_grad_() for tensor in (x, w_up, w_down)]
    y = (leaves[0] @ leaves[1].t()).relu().square() @ leaves[2].t()
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.double())]


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_relu2_mlp_errs_as_its_formats_do(backend, known, source, device):
    """Squaring doubles what was rounded before it; the root of the kept square halves the square's own rounding."""
    x, row_norm = normed(3, 48, 64, device=device, dtype=source)
    w_up, w_down = torch.randn(256, 64, device=device), torch.randn(64, 256, device=device)
    dy = torch.randn(x.shape, device=device)
    y, dx, dw_up, dw_down = mlp(backend, x, w_up, w_down, dy, row_norm if known else None)
    exact = exact_mlp(x, w_up, w_down, dy)
    e4, e5 = ROUNDING[E4M3], ROUNDING[E5M2]
    z = math.hypot(e4, e4)
    dh = math.hypot(e5, e4)
    dz = math.hypot(z, e4 / 2, dh, e5)
    expect_error(y, exact[0], 2 * z, e4, e4)
    expect_error(dx, exact[1], dz, e4)
    expect_error(dw_up, exact[2], dz, e4)
    expect_error(dw_down, exact[3], 2 * z, e4, e5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bounds_hold_where_rows_and_weights_are_far_from_alike(backend, device):
    """One loud token and one loud neuron, aligned as only Cauchy and Schwarz allow for: nothing saturates, and what is
    quiet is still there."""
    x, row_norm = normed(64, 128, device=device)
    w_up, w_down = torch.randn(256, 128, device=device) / 12, torch.randn(128, 256, device=device) / 12
    w_up[3] = 5 * x[7] / row_norm
    dy = torch.randn(64, 128, device=device) * 1e-9
    dy[7] *= 1000
    dy[7] = dy[7].norm() * w_down[:, 3] / w_down[:, 3].norm()
    got, exact = mlp(backend, x, w_up, w_down, dy, row_norm), exact_mlp(x, w_up, w_down, dy)
    quiet = torch.arange(64, device=device) != 7
    assert relative_error(got[0], exact[0]) < 0.1
    assert relative_error(got[1], exact[1]) < 0.15
    assert relative_error(got[1][quiet], exact[1][quiet]) < 0.15


@pytest.mark.parametrize("factor", [1e-25, 1e-12, 1e6])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_any_size(backend, factor, device):
    """Units follow them, whatever the learning rate's or the loss's scale; squares of some would be zero in fp32."""
    x, row_norm = normed(32, 64, device=device)
    w_up, w_down = torch.randn(128, 64, device=device), torch.randn(64, 128, device=device)
    dy = torch.randn(32, 64, device=device)
    small = mlp(backend, x, w_up, w_down, dy * factor, row_norm)
    for got, exact in zip(small[1:], exact_mlp(x, w_up, w_down, dy * factor)[1:], strict=True):
        assert relative_error(got, exact) < 0.12


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_comes_of_nothing(backend, device):
    """A projection of zeros, as every block starts with: outputs and gradients are zero and finite."""
    x, row_norm = normed(32, 64, device=device)
    w_up, w_down = torch.randn(128, 64, device=device), torch.zeros(64, 128, device=device)
    dy = torch.randn(32, 64, device=device)
    y, dx, dw_up, dw_down = mlp(backend, x, w_up, w_down, dy, row_norm)
    assert all((value == 0).all() for value in (y, dx, dw_up))
    assert relative_error(dw_down, exact_mlp(x, w_up, w_down, dy)[3]) < 0.1
    assert all((value == 0).all() for value in mlp(backend, x, w_up, w_down, 0 * dy, row_norm)[1:])


@pytest.mark.parametrize("where", ["x", "w_up", "w_down", "dy"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_not_a_number_comes_out_wherever_it_went_in(backend, where, device):
    x, row_norm = normed(32, 64, device=device)
    inputs = dict(x=x, w_up=torch.randn(128, 64, device=device), w_down=torch.randn(64, 128, device=device))
    inputs["dy"] = torch.randn(32, 64, device=device)
    inputs[where][3, 4] = math.nan
    y, dx, *_ = mlp(backend, **inputs, row_norm=row_norm)
    assert (dx if where == "dy" else y).isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_expanded_gradients(backend, device):
    x, row_norm = normed(32, 64, device=device)
    masters = [torch.randn(n, 64, device=device) for n in (32, 16)]
    for change in (
        transposed,
        every_second,
        inside_wider,
        lambda d: torch.full((), 0.5, device=device).expand(d.shape),
    ):
        grads = []
        for strided in (change, lambda d, change=change: change(d).contiguous()):
            leaves = [x.clone().requires_grad_(), *(w.clone().requires_grad_() for w in masters)]
            outs = MODULES[backend].fp8_linear(leaves[0], leaves[1:], weight_of(backend, *masters), row_norm=row_norm)
            generator = torch.Generator().manual_seed(1)
            ups = [strided(torch.randn(y.shape, generator=generator).to(y)) for y in outs[1:]]
            grads.append(torch.autograd.grad(outs[1:], leaves, ups))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_output_that_nothing_uses_and_gradients_nobody_asks_for(backend, device):
    x, row_norm = normed(32, 64, device=device)
    masters = [torch.randn(n, 64, device=device) for n in (32, 16)]
    weight, function = weight_of(backend, *masters), MODULES[backend].fp8_linear
    leaves = [x.clone().requires_grad_(), *(w.clone().requires_grad_() for w in masters)]
    _, first, second = function(leaves[0], leaves[1:], weight, row_norm=row_norm)
    assert (torch.autograd.grad(first.sum(), leaves[2], retain_graph=True)[0] == 0).all()
    whole = torch.autograd.grad((first.sum() + second.sum()), leaves)
    for i, leaf in enumerate(leaves):
        alone = [x, *masters]
        alone[i] = leaf
        outs = function(alone[0], alone[1:], weight, row_norm=row_norm)
        (outs[1].sum() + outs[2].sum()).backward()
        torch.testing.assert_close(leaf.grad, whole[i])
    assert not any(y.requires_grad for y in function(x, masters, weight, row_norm=row_norm))


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_keeps_one_byte_a_value(backend, device):
    """The transpose of x, the hidden layer, and the weights' own, which are there anyway."""
    x, row_norm = normed(32, 64, device=device)
    w_up, w_down = torch.randn(128, 64, device=device), torch.randn(64, 128, device=device)
    up, down = weight_of(backend, w_up), weight_of(backend, w_down)
    ours = {up.turned.data_ptr(), down.turned.data_ptr()}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        MODULES[backend].fp8_relu2_mlp(x, w_up.requires_grad_(), w_down.requires_grad_(), up, down, row_norm=row_norm)
    large = {tuple(t.shape): t.element_size() for t in kept if t.numel() > 4 and t.data_ptr() not in ours}
    assert large == {(64, 32): 1, (128, 32): 1}


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend, device):
    x = torch.zeros(0, 64, device=device).requires_grad_()
    w = torch.randn(32, 64, device=device).requires_grad_()
    _, y = MODULES[backend].fp8_linear(x, [w], weight_of(backend, w.detach()))
    assert y.shape == (0, 32)
    dx, dw = torch.autograd.grad(y.sum(), [x, w])
    assert dx.shape == (0, 64)
    assert (dw == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits(backend, device):
    x, w_up, w_down = (torch.randn(shape, device=device) for shape in ((64, 64), (128, 64), (64, 128)))
    first, second = (mlp(backend, x, w_up, w_down, x, None) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("x", "masters", "weight", "message"),
    [
        ((8, 64), [(32, 64)], (32, 64), "multiples of 16 tokens, got 8"),
        ((16, 56), [(32, 56)], (32, 56), "multiples of 16 columns, got 56"),
        ((16, 64), [(24, 64), (24, 64)], (48, 64), "multiples of 16 rows of weight 0, got 24"),
        ((16, 64), [(32, 48)], (32, 48), r"weights must be \[M, 64\] for x \(16, 64\), got \(32, 48\)"),
        ((16, 64), [(32, 64)], (48, 64), r"the fp8 weight must be \(32, 64\), got \(48, 64\)"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_cannot_be_multiplied_is_refused(backend, x, masters, weight, message, device):
    weight = MODULES[backend].empty_weight(*weight, device)
    with pytest.raises(ValueError, match=message):
        MODULES[backend].fp8_linear(
            torch.zeros(x, device=device), [torch.zeros(shape, device=device) for shape in masters], weight
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp64_is_refused(backend, device):
    with pytest.raises(ValueError, match="fp32, bf16 or fp16, got torch"):
        MODULES[backend].fp8_linear(
            torch.zeros(16, 64, device=device).double(),
            [torch.zeros(16, 64, device=device)],
            MODULES[backend].empty_weight(16, 64, device),
        )


EPILOGUES = [(48, 64, 80), (16, 16, 16), (272, 144, 528)]


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
@pytest.mark.parametrize(("N", "D", "F"), EPILOGUES)
def test_relu2_in_the_epilogue(N, D, F, device):
    """Against cuBLAS's product and a pass: the same but for what is rounded the other way, having never been bf16."""
    if device.type == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("these products are for Hopper")
    ours, matmul = MODULES["triton"], import_module("kernels_triton.fp8_matmul")
    x, row_norm = normed(N, D, device=device, dtype=torch.float16)
    q, up = ours.quantize([x], E4M3, row_norm), weight_of("triton", torch.randn(F, D, device=device))
    down, d = weight_of("triton", torch.randn(D, F, device=device)), ours.quantize([torch.randn_like(x)], E5M2)
    assert not ours.fuses_fp8(q.values, up.values)
    a, passed = Fp8(*matmul.matmul_relu2_fp8(q.values, up.values, q.facts, up.facts)), ours._relu2(q, *up[::2], x.dtype)
    assert torch.equal(a.facts, passed.facts)
    assert relative_error(back(a), back(passed)) < 0.03
    dz = Fp8(*matmul.matmul_relu2_grad_fp8(d.values, down.turned, a.turned, d.facts, down.facts, a.facts))
    passed = ours._relu2_grad(d, down.turned, down.facts, a.turned, a.facts, x.dtype)
    assert torch.equal(dz.facts, passed.facts)
    assert relative_error(back(dz), back(passed)) < 0.03
    for q in (a, dz):
        assert same_bits(q.turned, q.values.view(torch.uint8).t())
        assert same_bits(ours.turn(q.values), q.turned)


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
def test_the_epilogue_keeps_what_is_not_a_number(device):
    matmul, ones = import_module("kernels_triton.fp8_matmul"), torch.ones(16, 16, device=device)
    if device.type == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("these products are for Hopper")
    q, w = quantize("triton", ones, E4M3, 4.0), weight_of("triton", ones)
    bad = torch.ones(16, 16, device=device)
    bad[3, 5] = math.nan
    spoiled = quantize("triton", bad, E4M3, 4.0)
    a = matmul.matmul_relu2_fp8(spoiled.values, w.values, spoiled.facts, w.facts)[0].float()
    assert a[3].isnan().all()
    assert a[[0, 1, 2, *range(4, 16)]].isfinite().all()
    a = Fp8(*matmul.matmul_relu2_fp8(q.values, w.values, q.facts, w.facts))
    d = quantize("triton", bad, E5M2, 4.0)
    dz = matmul.matmul_relu2_grad_fp8(d.values, w.turned, a.turned, d.facts, w.facts, a.facts)[0].float()
    assert dz[3].isnan().all()
    assert dz[:3].isfinite().all()


needs_hopper = pytest.mark.skipif(
    not HAS_GPU or torch.cuda.get_device_capability() < (9, 0), reason="needs a Hopper GPU or a newer one"
)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("backend", BACKENDS)
def test_can_be_compiled_and_captured(backend, device):
    """torch.compile in one graph and a CUDA graph, forward and backward."""
    x, row_norm = normed(512, 256, device=device, dtype=torch.bfloat16)
    w_up, w_down = torch.randn(1024, 256, device=device), torch.randn(256, 1024, device=device)
    up, down, o = weight_of(backend, w_up), weight_of(backend, w_down), weight_of(backend, w_up[:256])
    leaves = [x.requires_grad_(), w_up.requires_grad_(), w_down.requires_grad_()]

    def run(x: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
        y = MODULES[backend].fp8_relu2_mlp(x, w_up, w_down, up, down, row_norm=row_norm)
        return MODULES[backend].fp8_linear(y, [w_up[:256]], o)[1]

    def gradients(function, leaves: list[Tensor] = leaves) -> list[Tensor]:
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    eager = gradients(run)
    torch._dynamo.reset()
    compiled = gradients(torch.compile(run, fullgraph=True))
    fresh = [leaf.detach().clone().requires_grad_() for leaf in leaves]  # whose gradients no other stream has seen
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gradients(run, fresh)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(run, fresh)
    graph.replay()
    for name, a, b, c in zip(("y", "dx", "dw_up", "dw_down"), eager, compiled, captured, strict=True):
        assert torch.equal(a, c), name
        assert relative_error(b, a) < 0.02, name


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes_of_real_models(backend, dtype, device):
    """cuBLAS and the emulation differ by their order of summation and by the digits that fast sums lose."""
    x, row_norm = normed(8192, 768, device=device, dtype=dtype)
    w_up, w_down = torch.randn(3072, 768, device=device) / 28, torch.randn(768, 3072, device=device) / 55
    dy = (torch.randn(8192, 768, device=device) * 1e-6).to(dtype)
    got, exact = mlp(backend, x, w_up, w_down, dy, row_norm), exact_mlp(x, w_up, w_down, dy)
    for value, expected in zip(got, exact, strict=True):
        assert relative_error(value, expected) < 0.12
