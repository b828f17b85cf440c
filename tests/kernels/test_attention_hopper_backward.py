"""Attention on Hopper, backward: against autograd in fp64 and plain PyTorch, and the same bits every time."""

from importlib import import_module
from itertools import product

import pytest
import torch

import kernels_torch
from tests.kernels.hopper import on_hopper, run_without_interpreter
from tests.kernels.test_contract import BACKENDS
from tests.numerics import assert_close

try:
    HOPPER = import_module("kernels_triton.attention.hopper.backward") if "triton" in BACKENDS else None
    FORWARD = import_module("kernels_triton.attention.forward") if "triton" in BACKENDS else None
except ImportError:  # Triton before 3.6
    HOPPER = None
pytestmark = pytest.mark.skipif(HOPPER is None, reason="needs Triton 3.6 or newer")
SHAPES = [  # B, Tq, Tk, H, Hkv
    (1, 2, 2, 3, 3), (1, 1, 257, 2, 2), (1, 239, 239, 2, 1), (2, 113, 203, 4, 2), (1, 108, 256, 1, 1),
    (2, 513, 513, 3, 1), (1, 1023, 1024, 2, 2), (3, 1024, 1024, 17, 17), (1, 4224, 4224, 4, 4),
]  # fmt: skip


def inputs_of(B, Tq, Tk, H, Hkv, D, dtype=torch.bfloat16, docs=False):
    """q, k, v, dout and ids; k and v are parts of one tensor, as a model's are."""
    q, dout = torch.randn(2, B, Tq, H, D, device="cuda").to(dtype)
    k, v = torch.randn(B, Tk, 2, Hkv, D, device="cuda").to(dtype).unbind(2)
    ids = (torch.rand(B, Tk, device="cuda") < 0.01).int().cumsum(1) if docs else None
    return q, k, v, dout, ids


def gradients(q, k, v, dout, window, ids, scale=None, needs=(True, True, True)):
    """What the Hopper kernel makes of the portable forward's out and lse."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = FORWARD._attention_fwd(q, k, v, window, ids, scale)
    return HOPPER._attention_bwd(q, k, v, out, lse, dout, window, ids, scale, *needs)


def by_autograd(q, k, v, dout, window, ids, scale):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = kernels_torch.attention(*leaves, window=window, doc_ids=ids, scale=scale)
    return torch.autograd.grad(out, leaves, dout)


def check(q, k, v, dout, window, ids, scale=None):
    got = gradients(q, k, v, dout, window, ids, scale)
    exact = by_autograd(*(x.double() for x in (q, k, v, dout)), window, ids, scale)
    plain = by_autograd(q, k, v, dout, window, ids, scale)
    for name, g, e, p in zip(("dq", "dk", "dv"), got, exact, plain, strict=True):
        assert_close(g, e, p, name)
    return got


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_of_every_length_window_and_document(shape, D):
    for window, docs in product((None, 1, 63, 127, 200, 700), (False, True)):
        Tq, Tk = shape[1:3]
        if (docs and Tq != Tk) or (window is not None and window >= Tk - 1):
            continue
        q, k, v, dout, ids = inputs_of(*shape, D, docs=docs)
        check(q, k, v, dout, window, ids)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("up", [0, 1, 5, 6])
def test_in_every_order_of_programs(monkeypatch, up, staged):
    """Heads go down from their last keys or up from their first; the copy engine adds to dq or the warps do."""
    monkeypatch.setattr(HOPPER, "heads_going_up", lambda *shape: up)
    monkeypatch.setattr(HOPPER, "by_copy_engine", lambda BD: staged)
    for (Tq, Tk), window, D in product(((1500, 1500), (700, 1130)), (None, 300), (64, 128)):
        q, k, v, dout, _ = inputs_of(3, Tq, Tk, 4, 2, D)
        check(q, k, v, dout, window, None)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("D", [8, 32, 80, 96, 104, 128])
def test_of_every_width_and_in_fp16(D):
    q, k, v, dout, _ = inputs_of(2, 300, 300, 4, 2, D, torch.float16)
    check(q, k, v, dout, None, None)
    check(q, k, v, dout, 100, None)


@pytest.mark.gpu
@on_hopper
def test_ids_in_any_order():
    """Documents that come back: not the rows the kernel is made for, but right."""
    q, k, v, dout, _ = inputs_of(2, 900, 900, 2, 2, 64)
    check(q, k, v, dout, None, torch.randint(0, 3, (2, 900), device="cuda"))
    ids = torch.zeros(2, 900, dtype=torch.int64, device="cuda")
    ids[:, 300:700] = 1
    check(q, k, v, dout, None, ids)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("scale", [0.0, 1e-3, 3.0])
def test_of_every_scale(scale):
    q, k, v, dout, _ = inputs_of(1, 200, 200, 2, 2, 64)
    check(q, k, v, dout, None, None, scale)


@pytest.mark.gpu
@on_hopper
def test_gradients_of_any_stride():
    q, k, v, dout, _ = inputs_of(2, 300, 300, 4, 2, 64)
    expected = gradients(q, k, v, dout, 100, None)
    transposed = dout.transpose(1, 3).contiguous().transpose(1, 3)
    heads_first = dout.transpose(1, 2).contiguous().transpose(1, 2)
    for other in (transposed, heads_first):
        for a, b in zip(expected, gradients(q, k, v, other, 100, None), strict=True):
            assert torch.equal(a, b)
    one = torch.ones((), device="cuda", dtype=dout.dtype).expand(dout.shape)
    for a, b in zip(gradients(q, k, v, one, None, None), gradients(q, k, v, one.contiguous(), None, None), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@on_hopper
def test_only_what_is_needed():
    q, k, v, dout, _ = inputs_of(1, 200, 200, 2, 2, 64)
    for needs in product((False, True), repeat=3):
        got = gradients(q, k, v, dout, None, None, needs=needs)
        assert tuple(x is not None for x in got) == needs


@pytest.mark.gpu
@on_hopper
def test_a_row_depends_on_no_other():
    q, k, v, dout, ids = inputs_of(3, 700, 700, 4, 4, 128, docs=True)
    whole = gradients(q, k, v, dout, 300, ids)
    alone = gradients(q[1:2], k[1:2], v[1:2], dout[1:2], 300, ids[1:2])
    for a, b in zip(whole, alone, strict=True):
        assert torch.equal(a[1:2], b)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(("D", "window", "Hkv"), [(128, None, 6), (128, 300, 6), (64, None, 6), (128, None, 2)])
def test_runs_give_the_same_bits(D, window, Hkv):
    """While another stream keeps the memory busy, so that programs are late in other places each time."""
    q, k, v, dout, _ = inputs_of(24, 2048, 2048, 6, Hkv, D)
    scale = D**-0.5
    out, lse = FORWARD._attention_fwd(q, k, v, window, None, scale)
    call = lambda: HOPPER._attention_bwd(q, k, v, out, lse, dout, window, None, scale, True, True, True)
    first, beside = call(), torch.cuda.Stream()
    source = torch.empty(2**26, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    torch.cuda.synchronize()
    same = torch.ones((), dtype=torch.bool, device="cuda")
    for i in range(250):
        with torch.cuda.stream(beside):
            target[: 2 ** (16 + i % 11)].copy_(source[: 2 ** (16 + i % 11)])
        for a, b in zip(first, call(), strict=True):
            same &= (a == b).all()
    torch.cuda.synchronize()
    assert same


@pytest.mark.gpu
@on_hopper
def test_compiled_and_in_a_cuda_graph():
    q, k, v, dout, ids = inputs_of(2, 400, 400, 4, 2, 64, docs=True)
    out, lse = FORWARD._attention_fwd(q, k, v, 100, ids, 0.125)

    def call(q, k, v, out, lse, dout, ids):
        return HOPPER._attention_bwd(q, k, v, out, lse, dout, 100, ids, 0.125, True, True, True)

    expected = call(q, k, v, out, lse, dout, ids)
    got = torch.compile(call, fullgraph=True)(q, k, v, out, lse, dout, ids)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(q, k, v, out, lse, dout, ids)
    dout.mul_(2)
    for _ in range(3):
        graph.replay()
    for a, b in zip(captured, call(q, k, v, out, lse, dout, ids), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@on_hopper
def test_memory_grows_with_the_length():
    def peak_bytes(T):
        q, k, v, dout, _ = inputs_of(1, T, T, 8, 4, 64)
        out, lse = FORWARD._attention_fwd(q, k, v, None, None, 0.125)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        HOPPER._attention_bwd(q, k, v, out, lse, dout, None, None, 0.125, True, True, True)
        return torch.cuda.max_memory_allocated() - before

    assert peak_bytes(8192) < 2.2 * peak_bytes(4096)


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from kernels_triton.attention.hopper import backward
from kernels_triton.attention.hopper.api import gl

BT, BS, D, staged, masked = backward.BT, backward.BS, int(sys.argv[1]), sys.argv[2] == "staged", sys.argv[3] == "masked"
kernel = backward._attention_bwd_kernel
constants = dict(
    BT=BT, BS=BS, BD=D, STAGES=2 if staged and D == 128 else 3, STAGED=staged, REGISTERS=backward.REGISTERS
)
layout, rows = gl.NVMMASharedLayout(min(128, 2 * D), 16, 4), gl.NVMMASharedLayout(0, 32, rank=2)
boxes = dict.fromkeys(("q", "dout"), BT) | dict.fromkeys(("k", "v", "dk", "dv"), BS)
signature = {name: f"tensordesc<bf16[1,{n},1,{D}],{layout!r}>" for name, n in boxes.items()}
signature |= dict(rows=f"tensordesc<fp32[1,{2 * BT}],{rows!r}>", turns="*i32", doc_ids="*i64", bounds="*i32")
signature |= dict(dq=f"tensordesc<fp32[{BT * D // 256},256],{rows!r}>" if staged else "*fp32", C="fp32", scale="fp32")
if not masked:
    constants |= dict(doc_ids=None, bounds=None, window=None)
signature = {name: "constexpr" if name in constants else signature.get(name, "i32") for name in kernel.arg_names}
source = GluonASTSource(kernel, signature, constants)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=8))
assert compiled.metadata.shared <= 227 * 1024
ptx = compiled.asm["ptx"]
print(ptx.count("wgmma.mma_async"), ptx.count("cp.async.bulk.tensor"), ptx.count("setmaxnreg"), ptx.count("red"))
"""


@pytest.mark.parametrize(
    ("D", "staged", "kind"), [(128, "staged", "plain"), (128, "not", "masked"), (64, "not", "plain")]
)
def test_compiles_without_a_gpu(D, staged, kind):
    assert all(count > 0 for count in run_without_interpreter(COMPILE, str(D), staged, kind))
