"""Products on Hopper with an epilogue: against fp64 and plain PyTorch, and that they compile where no GPU is."""

from importlib import import_module

import pytest
import torch

from tests.kernels.hopper import on_hopper, run_without_interpreter
from tests.kernels.test_contract import BACKENDS
from tests.numerics import assert_close

try:
    HOPPER = import_module("kernels_triton.hopper_matmul") if "triton" in BACKENDS else None
except (ImportError, AttributeError):  # a Triton whose Gluon has other names
    HOPPER = None
pytestmark = pytest.mark.skipif(HOPPER is None, reason="needs Triton 3.6 or newer")
C = 15.0


def among_nans(rows, columns, std=1.0):
    """Random rows in the midst of a tensor of NaN."""
    around = torch.full((rows + 8, columns), torch.nan, dtype=torch.bfloat16, device="cuda")
    return around, around[4:-4].copy_(torch.randn(rows, columns, device="cuda") * std)


def is_still_nan(around):
    return bool(around[:4].isnan().all() and around[-4:].isnan().all())


def capped_parts(x, w, V, dtype):
    """exp of the capped logits, 0 from V on, and what they are multiplied by."""
    t = torch.tanh((x.to(dtype) @ w.to(dtype).T) / C)
    e = torch.exp(C * t)
    e[:, V:] = 0
    return e, 1 - t * t


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(
    ("N", "D", "Vp", "V"),
    [(1000, 768, 50304, 50257), (130, 1280, 1000, 777), (1, 2176, 2056, 2050), (640, 392, 4096, 4096)],
)
def test_capped_logits(N, D, Vp, V):
    (_, x), (_, w), (around, e) = among_nans(N, D), among_nans(Vp, D, 4 * D**-0.5), among_nans(N, Vp)
    sums = HOPPER.capped_logits(x, w, e, V, C)
    assert is_still_nan(around)
    exact, slope = capped_parts(x, w, V, torch.float64)
    plain, plain_slope = capped_parts(x, w, V, torch.bfloat16)
    assert_close(e, exact * slope, plain * plain_slope, "e")
    BN = HOPPER.CAPPED_LOGITS.BN
    tiles = torch.nn.functional.pad(exact, (0, sums.shape[1] * BN - Vp)).view(N, -1, BN).sum(2)
    assert (sums - tiles).abs().le(0.01 * tiles).all()
    again = torch.empty_like(e)
    assert torch.equal(HOPPER.capped_logits(x, w, again, V, C), sums)
    assert torch.equal(again, e)
    assert torch.equal(HOPPER.capped_logits(x, w, None, V, C), sums)
    assert torch.equal(HOPPER.capped_logits(x[:1], w, None, V, C), sums[:1])


SHAPES = [(1000, 384, 1536), (130, 776, 1000), (65, 2176, 264), (20000, 392, 256), (1, 200, 8), (9000, 1280, 5120)]


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("N", "D", "F"), SHAPES)
def test_relu2_product(N, D, F, dtype):
    (_, x), (_, w) = among_nans(N, D), among_nans(F, D, D**-0.5)
    x, w = x.to(dtype), w.to(dtype)
    y = HOPPER.relu2_product(x, w)
    assert_close(y, (x.double() @ w.double().T).relu().square(), (x @ w.T).relu().square(), "y")
    assert torch.equal(HOPPER.relu2_product(x, w), y)
    assert torch.equal(HOPPER.relu2_product(x[:1], w), y[:1])


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("N", "D", "F"), SHAPES)
def test_relu2_grad_product(N, D, F, dtype):
    (_, dy), (_, w), (_, y) = among_nans(N, D), among_nans(D, F, D**-0.5), among_nans(N, F)
    dy, w, y = dy.to(dtype), w.to(dtype), y.relu().square().to(dtype)
    dz = HOPPER.relu2_grad_product(dy, w, y)
    exact, plain = (dy.double() @ w.double()) * 2 * y.double().sqrt(), (dy @ w) * 2 * y.sqrt()
    assert_close(dz, exact, plain, "dz")
    assert torch.equal(HOPPER.relu2_grad_product(dy, w, y), dz)
    assert torch.equal(HOPPER.relu2_grad_product(dy[:1], w, y[:1]), dz[:1])


@pytest.mark.gpu
@on_hopper
def test_compiled_and_in_a_cuda_graph():
    dy, w, y = (torch.randn(shape, device="cuda").bfloat16() for shape in ((300, 384), (384, 1024), (300, 1024)))
    y = y.relu().square()
    expected, forward = HOPPER.relu2_grad_product(dy, w, y), HOPPER.relu2_product(dy, w.t().contiguous())
    assert torch.equal(torch.compile(HOPPER.relu2_grad_product, fullgraph=True)(dy, w, y), expected)
    assert torch.equal(torch.compile(HOPPER.relu2_product, fullgraph=True)(dy, w.t().contiguous()), forward)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = HOPPER.relu2_grad_product(dy, w, y)
    dy.neg_()
    graph.replay()
    assert torch.equal(captured, -expected)


def test_takes_sums_of_enough_blocks():
    for tile in (HOPPER.CAPPED_LOGITS, HOPPER.RELU2, HOPPER.RELU2_GRAD):
        assert HOPPER.takes(384, tile)
        assert not HOPPER.takes(64, tile)


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from kernels_triton import hopper_matmul as hopper
from kernels_triton.attention.hopper.api import gl

name = sys.argv[1]
kernel, t = getattr(hopper, f"_{name}_kernel"), getattr(hopper, name.upper())
constants = dict(BM=t.BM, BN=t.BN, BK=t.BK, STAGES=t.stages, MASKED=True, REGISTERS=hopper.REGISTERS)
rows, piece = [t.BM, t.BK], [t.BM, t.BN // 2]
blocks = dict(x=rows, dy=rows, w=[t.BN, t.BK], e=piece, y=piece, dz=piece)
if name == "relu2_grad":
    blocks["w"] = [t.BK, t.BN]
signature = {}
for argument, block in blocks.items():
    layout = gl.NVMMASharedLayout(min(128, 2 * block[1]), 16, 2)
    signature[argument] = f"tensordesc<bf16{block},{layout!r}>"
signature |= dict(sums="*fp32", inverse_cap="fp32", cap_in_bits="fp32")
constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
signature = {name: "constexpr" if name in constants else signature.get(name, "i32") for name in kernel.arg_names}
source = GluonASTSource(kernel, signature, constants)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4))
assert compiled.metadata.shared <= 227 * 1024
ptx = compiled.asm["ptx"]
print(ptx.count("wgmma.mma_async"), ptx.count("cp.async.bulk.tensor"), ptx.count("setmaxnreg"))
"""


@pytest.mark.parametrize("name", ["capped_logits", "relu2", "relu2_grad"])
def test_compiles_without_a_gpu(name):
    assert all(count > 0 for count in run_without_interpreter(COMPILE, name))
