"""The orthogonalisation of Muon: singular values, rotations, zeros, and the published coefficients."""

import pytest
import torch

from kernels_torch import newton_schulz as module_function
from kernels_torch.newton_schulz import POLAR_EXPRESS
from tests.conftest import HAS_GPU
from tests.kernels.hopper import on_hopper, run_without_interpreter
from tests.kernels.test_contract import BACKENDS, MODULES

needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
WITH_OP = [backend for backend in BACKENDS if "newton_schulz" in MODULES[backend].__all__]
# The interpreter is silently wrong for bf16.
WITH_DTYPE = [
    (backend, dtype)
    for backend in WITH_OP
    for dtype in (torch.float32, torch.bfloat16)
    if HAS_GPU or backend == "torch" or dtype != torch.bfloat16
]
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


@pytest.mark.parametrize(("backend", "dtype"), WITH_DTYPE)
def test_singular_values_end_in_a_band_around_one(backend, dtype, device):
    """Whatever the scale of g: that of a tiny gradient and that of a large one."""
    for scale in (1e-3, 1.0, 1e4):
        g = scale * torch.randn(2, 48, 96, device=device)
        X = MODULES[backend].newton_schulz(g, dtype=dtype)
        s = torch.linalg.svdvals(X.float())
        assert X.dtype == dtype
        assert s.min() > 0.7
        assert s.max() < 1.25


@pytest.mark.parametrize(("backend", "dtype"), WITH_DTYPE)
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


def errors(got, plain, g):
    """RMS errors of both from the reference in fp64."""
    exact = module_function(g.double(), dtype=torch.float64)
    return [(x.double() - exact).square().mean().sqrt().item() for x in (got, plain)]


def spectra(r, c):
    """Gradients as they are: all singular values alike, falling as a power, few large ones, and hardly any at all."""
    n = min(r, c)
    U, V = (torch.linalg.qr(torch.randn(side, n, dtype=torch.float64))[0] for side in (r, c))
    i = torch.arange(1, n + 1)
    values = [i**0.0, i**-1.0, torch.where(i <= 3, 1.0, 1e-2), torch.where(i <= n // 4, 1.0, 0.0)]
    return torch.stack([(U * s) @ V.mT for s in values])


@needs_triton
@pytest.mark.parametrize("shape", [(18, 40), (40, 18), (70, 130)], ids=str)
def test_steps_on_the_gram_matrix_give_what_steps_on_x_give(shape, device):
    """In fp32 they lose a few bits, for every spectrum; without the restart they would lose all."""
    from kernels_triton.newton_schulz import Stack, _newton_schulz_gram, sums_of_squares

    g = spectra(*shape).float().to(device)
    got = _newton_schulz_gram(Stack(g, torch.float32), g, sums_of_squares(g), torch.float32)
    ours, theirs = errors(got, module_function(g, dtype=torch.float32), g)
    assert ours <= 16 * theirs


@needs_triton
@pytest.mark.parametrize("shape", [(2, 12, 31), (1, 70, 66)], ids=str)
def test_a_stack_of_another_dtype_is_divided_before_it_is_rounded(shape, device):
    """1e6 does not fit fp16, and neither does what it is squared."""
    g = 1e6 * torch.randn(shape, device=device)
    got = MODULES["triton"].newton_schulz(g, dtype=torch.float16)
    ours, theirs = errors(got, module_function(g, dtype=torch.float16), g)
    assert got.isfinite().all()
    assert ours <= 2 * theirs


@needs_triton
@pytest.mark.parametrize("n", [20, 70, 150])
def test_symmetric_products_are_symmetric_to_the_last_bit(n, device):
    from kernels_triton.newton_schulz import Stack

    wide = torch.randn(2, n, 2 * n, device=device) / n
    for x, tall in ((wide, False), (wide.mT.contiguous(), True)):
        stack = Stack(x, torch.float32)
        A = stack.symmetric(x, x)
        S = stack.symmetric(A, A, A, 0)
        assert torch.equal(A, A.mT)
        assert torch.equal(S, S.mT)
        torch.testing.assert_close(A, x.mT @ x if tall else x @ x.mT)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize(
    "shape", [(3, 520, 520), (2, 648, 1304), (2, 1304, 648), (1, 768, 3072), (2, 130, 390)], ids=str
)
def test_large_stacks_in_bf16_are_as_exact_as_plain_pytorch(shape, device):
    """Those that Hopper has a kernel for, with tiles at the edge, and one that it has none for."""
    g = torch.randn(shape, device=device).bfloat16()
    newton_schulz = MODULES["triton"].newton_schulz
    got = newton_schulz(g)
    ours, theirs = errors(got, module_function(g), g)
    assert ours <= 1.2 * theirs
    assert torch.equal(got, newton_schulz(g)), "timing changes bits"
    assert torch.equal(got[:1], newton_schulz(g[:1])), "neighbours change bits"


@pytest.mark.gpu
@needs_triton
@on_hopper
@pytest.mark.parametrize(
    "shape", [(3, 256, 256), (40, 384, 384), (2, 648, 1304), (2, 600, 648), (30, 200, 328)], ids=str
)
def test_products_on_hopper(shape, device):
    """Each kind, also with tiles beyond the ends of matrices, and with more tiles than processors: rounded once."""
    from kernels_triton import hopper_symmetric as hopper
    from kernels_triton.newton_schulz import sums_of_squares

    K, n, _ = shape
    x = torch.randn(shape, device=device).bfloat16()
    lines, wide = sums_of_squares(x), x.double()
    s = 1 / (1.01 * wide.square().sum((1, 2), keepdim=True).sqrt() + 1e-6)
    eye = torch.eye(n, device=device, dtype=torch.float64)

    def check(run, like, exact, *, symmetric=False):
        got, again = (torch.full_like(like, torch.nan) for _ in range(2))
        run(got)
        run(again)
        assert torch.equal(got, again)
        assert not symmetric or torch.equal(got, got.mT)
        rounded = exact.to(got.dtype).double()
        assert (got.double() - exact).square().mean() <= 2 * (rounded - exact).square().mean() + 1e-16
        return got

    halves = torch.empty(K, n, n, dtype=torch.float16, device=device)
    gram = wide @ wide.mT * s * s
    tall = x.mT.contiguous()
    A = check(lambda out: hopper.symmetric_product(x, x, out, lines=lines), halves, gram, symmetric=True)
    check(lambda out: hopper.symmetric_product(tall, tall, out, tall=True, lines=lines), halves, gram, symmetric=True)
    gamma, beta, alpha = POLAR_EXPRESS[1]
    exact = gamma * eye + beta * A.double() + alpha * A.double() @ A.double()
    run = lambda out: hopper.symmetric_product(A, A, out, numbers=POLAR_EXPRESS[1])
    S = check(run, halves, exact, symmetric=True)
    check(lambda out: hopper.symmetric_product(S, A, out), halves, S.double() @ A.double())
    left = S.bfloat16()
    exact = left.double() @ wide * s
    check(lambda out: hopper.product(left, x, out, right_is_symmetric=False, lines=lines), x, exact)
    check(lambda out: hopper.product(tall, left, out, right_is_symmetric=True, lines=lines), tall, exact.mT)


@pytest.mark.gpu
@needs_triton
@on_hopper
def test_large_stacks_compiled_and_in_a_cuda_graph(device):
    g = torch.randn(2, 648, 1304, device=device).bfloat16()
    newton_schulz = MODULES["triton"].newton_schulz
    expected = newton_schulz(g)
    assert torch.equal(torch.compile(newton_schulz, fullgraph=True)(g), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = newton_schulz(g)
    g.neg_()
    graph.replay()
    assert torch.equal(captured, -expected)


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from kernels_triton import hopper_symmetric as hopper
from kernels_triton.attention.hopper.api import gl

kind = sys.argv[1]
kernel, BM, BK = hopper._products_kernel, hopper.BM, hopper.BK
block = lambda *rows_and_columns: f"tensordesc<fp16{[1, *rows_and_columns]},{gl.NVMMASharedLayout(128, 16, 3)!r}>"
along = dict(x=kind == "tall", y=kind in ("tall", "product"))
signature = {name: block(BK, BM) if along[name] else block(BM, BK) for name in "xy"} | dict(out=block(BM, BM // 2))
constants = dict(X_IS_KM=along["x"], Y_IS_KN=along["y"], SYMMETRIC=kind != "product", HAS_Z=kind == "with_z")
constants |= dict(ALONG_ROWS=True, BM=BM, BK=BK, STAGES=hopper.STAGES, LINES=hopper.LINES)
constants["REGISTERS"] = hopper.REGISTERS
if kind == "product":
    constants["mirror"] = None
else:
    signature["mirror"] = block(BM // 2, BM)
if kind == "with_z":
    constants["lines"] = None
signature |= dict(lines="*fp32", alpha="fp32", beta="fp32", gamma="fp32")
signature = {name: "constexpr" if name in constants else signature.get(name, "i32") for name in kernel.arg_names}
options = dict(num_warps=4, maxnreg=hopper.AT_START)
source = GluonASTSource(kernel, signature, constants)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
assert compiled.metadata.shared <= 226 * 1024  # and two more programs' 1 KiB
ptx = compiled.asm["ptx"]
print(*(ptx.count(word) for word in ("wgmma.mma_async", "cp.async.bulk.tensor", "setmaxnreg", "griddepcontrol.wait")))
"""


@needs_triton
@pytest.mark.parametrize("kind", ["wide", "tall", "with_z", "product"])
def test_products_for_hopper_compile_without_a_gpu(kind):
    from kernels_triton.newton_schulz import hopper_symmetric

    if hopper_symmetric is None:
        pytest.skip("needs Triton 3.6 or newer")
    assert all(count > 0 for count in run_without_interpreter(COMPILE, kind))


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
