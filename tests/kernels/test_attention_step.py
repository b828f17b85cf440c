"""A step of attention beyond the contract: the kernel for large caches and shared key heads, and how it is split."""

import importlib

import pytest
import torch

from kernels_torch.cases import CASES
from tests.kernels.test_contract import BACKENDS, MODULES
from tests.numerics import judge, run

pytestmark = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
OP = "attention_step_paged"
SHAPES = [
    dict(B=3, page=4, n=3, H=2, Hkv=2, D=16),
    dict(B=2, page=8, n=9, H=3, Hkv=3, D=6, window=5, qk_scale=1.2),
    dict(B=4, page=32, n=5, H=1, Hkv=1, D=24, eps=None),
    dict(B=2, page=4, n=2, H=4, Hkv=2, D=8, window=1),
    dict(B=2, page=32, n=40, H=2, Hkv=1, D=64),
    dict(B=1, page=32, n=40, H=1, Hkv=1, D=64, window=200),
    dict(B=3, page=8, n=5, H=2, Hkv=2, D=24, codes="int8"),
    dict(B=2, page=3, n=5, H=6, Hkv=2, D=16, window=4, codes="fp8"),
    dict(B=2, page=4, n=3, H=20, Hkv=1, D=16),
]


@pytest.fixture
def by_products(monkeypatch):
    """No cache is small."""
    monkeypatch.setattr(importlib.import_module("kernels_triton.attention_decode"), "SMALL_CACHE", 0)


def step(**inputs):
    return MODULES["triton"].attention_step_paged(**inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_as_exact_as_plain_pytorch(shape, dtype, device, by_products):
    inputs = CASES[OP].make(shape, dtype, device)
    judge(OP, run(OP, step, CASES[OP].cast(inputs, dtype)), inputs)


def test_rows_by_products_know_nothing_of_each_other(device, by_products):
    """Neither what the others hold nor how long they are changes a bit."""
    inputs = CASES[OP].make(dict(B=3, page=8, n=20, H=4, Hkv=2, D=16), torch.float32, device)
    alone = step(**CASES[OP].cast(inputs, torch.float32))[0]
    others = CASES[OP].cast(inputs, torch.float32)
    for name in "qkv":
        others[name][1:] = torch.nan
    others["lengths"][1:] = 0
    assert torch.equal(step(**others)[0][0], alone[0])


@pytest.mark.parametrize("codes", [None, "int8"])
@pytest.mark.parametrize(("H", "small_cache"), [(2, 2**30), (2, 0), (4, 0), (40, 0)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_without_a_position_is_dropped(backend, H, small_cache, codes, device, monkeypatch):
    """Before the first, behind the pages, behind the tables: nothing is written anywhere, and out is zeros."""
    monkeypatch.setattr(importlib.import_module("kernels_triton.attention_decode"), "SMALL_CACHE", small_cache)
    inputs = CASES[OP].make(dict(B=6, page=4, n=3, H=H, Hkv=2, D=16, codes=codes), torch.float32, device)
    inputs["lengths"] = torch.tensor([5, -1, 12, 10, 9, 2**31 - 1], dtype=torch.int32, device=device)
    kept = torch.tensor([True, False, False, False, True, False], device=device)
    for name in ("cos", "sin"):  # of more rows than these ten
        inputs[name] = torch.cat([inputs[name][:10], torch.full_like(inputs[name], torch.nan)])[:10]
    alone = {name: inputs[name][kept] for name in ("q", "k", "v", "block_table", "lengths")}
    names = [name for name in inputs if name[2:] in ("pages", "scales") and inputs[name] is not None]
    among, beside = ({name: inside_more_pages(inputs[name]) for name in names} for _ in range(2))
    out = MODULES[backend].attention_step_paged(**inputs | {name: x[3:-3] for name, x in among.items()})[0]
    expected = MODULES[backend].attention_step_paged(
        **inputs | alone | {name: x[3:-3] for name, x in beside.items()},
    )[0]
    assert out[~kept].eq(0).all()
    torch.testing.assert_close(out[kept], expected)
    for name in names:
        torch.testing.assert_close(among[name], beside[name], msg=name, equal_nan=True)


def inside_more_pages(pages: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.ones_like(pages[:3]), pages, torch.ones_like(pages[:3])])


@pytest.mark.parametrize("small_cache", [0, 2**30])
@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 63, 64, 65, 158])
def test_every_length_around_blocks_and_splits(small_cache, length, device, monkeypatch):
    monkeypatch.setattr(importlib.import_module("kernels_triton.attention_decode"), "SMALL_CACHE", small_cache)
    inputs = CASES[OP].make(dict(B=1, page=8, n=20, H=2, Hkv=2, D=16), torch.float32, device)
    inputs["lengths"].fill_(length)
    for name in ("k_pages", "v_pages"):  # what lies beyond the length must not be read
        pages = torch.full_like(inputs[name], torch.nan)
        for i in range(length):
            page = inputs["block_table"][0, i // 8].long()
            pages[page, i % 8] = torch.randn(2, 16)
        inputs[name] = pages
    got = step(**CASES[OP].cast(inputs, torch.float32))[0]
    plain = {name: value.nan_to_num(7.0) if "pages" in name else value for name, value in inputs.items()}
    judge(OP, {"output 0": got} | rest(plain), plain)


def rest(inputs: dict) -> dict:
    """The pages, which are other outputs."""
    outs = run(OP, step, CASES[OP].cast(inputs, torch.float32))
    return {name: value for name, value in outs.items() if name != "output 0"}
