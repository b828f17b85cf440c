"""Attention on Hopper, forward: against a softmax in fp64 and plain PyTorch, and that it compiles where no GPU is."""

from importlib import import_module
from itertools import product

import pytest
import torch

import kernels_torch
from kernels_torch.attention import visible
from tests.kernels.hopper import on_hopper, run_without_interpreter
from tests.kernels.test_contract import BACKENDS
from tests.numerics import assert_close

try:
    HOPPER = import_module("kernels_triton.attention.hopper.forward") if "triton" in BACKENDS else None
except ImportError:  # Triton before 3.6
    HOPPER = None
pytestmark = pytest.mark.skipif(HOPPER is None, reason="needs Triton 3.6 or newer")
SHAPES = [  # B, Tq, Tk, H, Hkv
    (2, 1, 1, 3, 3), (1, 1, 257, 2, 2), (1, 130, 130, 2, 1), (2, 77, 333, 4, 2), (1, 128, 256, 1, 1),
    (2, 513, 513, 3, 1), (1, 1023, 1024, 2, 2), (3, 1024, 1024, 17, 17), (1, 4224, 4224, 12, 4),
]  # fmt: skip


def inputs_of(B, Tq, Tk, H, Hkv, D, dtype=torch.bfloat16, docs=False):
    """k and v are parts of one tensor, as a model's are."""
    q = torch.randn(B, Tq, H, D, device="cuda").to(dtype)
    k, v = torch.randn(B, Tk, 2, Hkv, D, device="cuda").to(dtype).unbind(2)
    ids = (torch.rand(B, Tk, device="cuda") < 0.01).int().cumsum(1) if docs else None
    return q, k, v, ids


def exact_lse(q, k, window, ids, scale):
    """[B, H, Tq] in units of log 2."""
    Tq, Tk, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    positions = torch.arange(Tk, device=q.device)
    mask = visible(positions[Tk - Tq :, None], positions, window)
    if ids is not None:
        mask = (mask & (ids[:, :, None] == ids[:, None, :])).unsqueeze(1)
    scores = torch.einsum("bthd,bshd->bhts", q.double(), k.double().repeat_interleave(group, 2)) * scale
    return scores.masked_fill(~mask, -torch.inf).logsumexp(-1) / torch.log(torch.tensor(2.0, dtype=torch.float64))


def check(q, k, v, window, ids, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    Tq = q.shape[1]
    out, lse = HOPPER._attention_fwd(q, k, v, window, ids, scale)
    options = dict(window=window, doc_ids=ids, scale=scale)
    exact = kernels_torch.attention(q.double(), k.double(), v.double(), **options)
    assert_close(out, exact, kernels_torch.attention(q, k, v, **options), "out")
    assert lse.shape[2] % 128 == 0
    assert lse.isfinite().all()
    assert (lse[..., :Tq] - exact_lse(q, k, window, ids, scale)).abs().max() < 1e-3 * (1 + lse[..., :Tq].abs().max())
    return out, lse


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_of_every_length_window_and_document(shape, D):
    for window, docs in product((None, 1, 127, 128, 200, 700), (False, True)):
        Tq, Tk = shape[1:3]
        if (docs and Tq != Tk) or (window is not None and window >= Tk - 1):
            continue
        q, k, v, ids = inputs_of(*shape, D, docs=docs)
        check(q, k, v, window, ids)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("D", [8, 16, 32, 80, 96, 104, 128])
def test_of_every_width_and_in_fp16(D):
    q, k, v, _ = inputs_of(2, 300, 300, 4, 2, D, torch.float16)
    check(q, k, v, None, None)
    check(q, k, v, 100, None)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("scale", [0.0, 1e-3, 30.0])
def test_of_every_scale(scale):
    q, k, v, _ = inputs_of(1, 200, 200, 2, 2, 64)
    check(q, k, v, None, None, scale)


@pytest.mark.gpu
@on_hopper
def test_strides_are_as_they_come():
    q, k, v, _ = inputs_of(2, 200, 200, 4, 4, 64)
    expected, _ = HOPPER._attention_fwd(q.contiguous(), k.contiguous(), v.contiguous(), None, None, 0.125)
    by_heads = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    off = [torch.cat([x[..., :1], x], -1)[..., 1:] for x in (q, k, v)]  # no multiple of 16 bytes
    apart = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    for q, k, v in (by_heads, off, apart):
        assert torch.equal(HOPPER._attention_fwd(q, k, v, None, None, 0.125)[0], expected)
    k, v = k[:, :, :1].expand(-1, -1, 4, -1), v[:, :, :1].expand(-1, -1, 4, -1)
    check(q, k, v, None, None)


@pytest.mark.gpu
@on_hopper
def test_a_row_depends_on_no_other():
    q, k, v, ids = inputs_of(3, 700, 700, 4, 2, 128, docs=True)
    out, lse = HOPPER._attention_fwd(q, k, v, 300, ids, 0.1)
    alone = HOPPER._attention_fwd(q[1:2], k[1:2], v[1:2], 300, ids[1:2], 0.1)
    assert torch.equal(out[1:2], alone[0])
    assert torch.equal(lse[1:2], alone[1])
    k[0], v[0] = torch.nan, torch.nan
    assert torch.equal(HOPPER._attention_fwd(q, k, v, 300, ids, 0.1)[0][1:], out[1:])


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("D", [64, 128])
def test_runs_give_the_same_bits(D):
    q, k, v, _ = inputs_of(4, 2048, 2048, 6, 6, D)
    first = HOPPER._attention_fwd(q, k, v, None, None, 0.1)
    for _ in range(100):
        for a, b in zip(first, HOPPER._attention_fwd(q, k, v, None, None, 0.1), strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
@on_hopper
def test_compiled_and_in_a_cuda_graph():
    q, k, v, ids = inputs_of(2, 400, 400, 4, 2, 64, docs=True)
    expected = HOPPER._attention_fwd(q, k, v, 100, ids, 0.125)

    def call(q, k, v, ids):
        out, lse = HOPPER._attention_fwd(q, k, v, 100, ids, 0.125)
        return out, lse

    got = torch.compile(call, fullgraph=True)(q, k, v, ids)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(q, k, v, ids)
    q.mul_(2)
    graph.replay()
    assert torch.equal(captured[0], call(q, k, v, ids)[0])


def test_says_what_it_takes():
    def takes(D, dtype):
        return HOPPER.supports(torch.empty(1, 1, 1, D, dtype=dtype))

    assert takes(64, torch.bfloat16)
    assert takes(128, torch.float16)
    assert takes(80, torch.bfloat16)
    assert not (takes(64, torch.float32))
    assert not (takes(192, torch.bfloat16))
    assert not (takes(100, torch.bfloat16))


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from kernels_triton.attention.hopper import forward
from kernels_triton.attention.hopper.api import gl

D, masked = int(sys.argv[1]), sys.argv[2] == "masked"
kernel, tile = forward._attention_fwd_kernel, forward.tile_for(D)
constants = forward.options_of(tile, D, 2048, 768 if masked else None)
layout = gl.NVMMASharedLayout(min(128, 2 * D), 16, 4)
boxes = dict.fromkeys(("q", "out"), tile.BT // constants["N"]) | dict.fromkeys(("k", "v"), tile.BS)
signature = {name: f"tensordesc<bf16[1,{rows},1,{D}],{layout!r}>" for name, rows in boxes.items()}
signature |= dict(lse="*fp32", doc_ids="*i64", bounds="*i32", C="fp32")
if not masked:
    constants |= dict(doc_ids=None, bounds=None, window=None)
signature = {name: "constexpr" if name in constants else signature.get(name, "i32") for name in kernel.arg_names}
source = GluonASTSource(kernel, signature, constants)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4))
assert compiled.metadata.shared <= 227 * 1024
ptx = compiled.asm["ptx"]
print(ptx.count("wgmma.mma_async"), ptx.count("cp.async.bulk.tensor"), ptx.count("setmaxnreg"))
"""


@pytest.mark.parametrize(("D", "kind"), [(128, "plain"), (64, "masked")])
def test_compiles_without_a_gpu(D, kind):
    assert all(count > 0 for count in run_without_interpreter(COMPILE, str(D), kind))
