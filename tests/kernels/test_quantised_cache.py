"""Keys and values in 8 bits: how near codes come, and that kernels write and read what the reference does."""

import pytest
import torch

import kernels_torch
from kernels_torch.cases import CASES
from kernels_torch.quantised_cache import FORMS, as_bytes, dequantise, quantise
from tests.numerics import assert_close

kernels_triton = pytest.importorskip("kernels_triton")

EVERY_FORM = pytest.mark.parametrize("form", FORMS)
STEP = dict(B=3, page=8, n=4, H=2, Hkv=2, D=32)


@EVERY_FORM
def test_codes_are_the_nearest(form):
    """Half a step of 127 at most; fp8 has three binary digits behind the first."""
    x = torch.randn(50, 7, 64, dtype=torch.float64) * torch.logspace(-20, 20, 50, dtype=torch.float64)[:, None, None]
    codes, scales = quantise(x, FORMS[form])
    assert (codes.dtype, scales.shape) == (FORMS[form], (50, 7))
    error = (dequantise(codes, scales, torch.float64) - x).abs()
    top = x.abs().amax(-1, keepdim=True)
    allowed = top / 254 if form == "int8" else (x.abs() / 16).maximum(top / 448 / 2**10)
    assert (error <= 1.0001 * allowed).all()
    assert (error > 0.9 * allowed).any()


@EVERY_FORM
def test_zeros_stay_and_what_is_not_finite_shows(form):
    x = torch.zeros(4, 8)
    x[1, 3], x[2, 5], x[3, 0] = torch.nan, -torch.inf, 1e-38
    codes, scales = quantise(x, FORMS[form])
    values = dequantise(codes, scales, torch.float32)
    assert torch.equal(values[[0, 3]], torch.zeros(2, 8))
    assert not values[1].isfinite().any()
    assert not values[2, 5].isfinite()


def numbers(given: dict, x: str) -> torch.Tensor:
    return dequantise(given[f"{x}_pages"], given[f"{x}_scales"], torch.float64)


@EVERY_FORM
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("op", ["qk_norm_rope_append_paged", "attention_step_paged"])
def test_what_is_appended_is_what_the_reference_appends(op, dtype, form, device):
    """In its page, with its scale, as near to the numbers as codes can be; and nothing else is touched."""
    shape = STEP if op == "attention_step_paged" else dict(STEP, T=3)
    coded = CASES[op].make(dict(shape, codes=form), dtype, device)
    before, plain = (CASES[op].cast(coded, dtype) for _ in range(2))
    getattr(kernels_triton, op)(**coded)
    getattr(kernels_torch, op)(**plain)
    exact = CASES[op].make(shape, torch.float64, device)
    exact |= {x: coded[x].double() for x in "qkv"}
    getattr(kernels_torch, op)(**exact)
    n_written = shape.get("T", 1) * shape["B"] * shape["Hkv"]
    for x in "kv":
        assert_close(coded[f"{x}_scales"], plain[f"{x}_scales"].double(), plain[f"{x}_scales"])
        assert ((numbers(coded, x) - numbers(plain, x)).abs() > 1e-6).float().mean() < 1e-3
        changed = coded[f"{x}_scales"] != before[f"{x}_scales"]
        assert changed.sum() == n_written
        same = (as_bytes(coded[f"{x}_pages"]) == as_bytes(before[f"{x}_pages"])).all(-1)
        assert same[~changed].all()
        error = (numbers(coded, x)[changed] - exact[f"{x}_pages"][changed]).norm()
        assert error < (0.01 if form == "int8" else 0.04) * exact[f"{x}_pages"][changed].norm()


@EVERY_FORM
def test_a_key_that_is_not_finite_is_not_hidden(form, device):
    given = CASES["attention_step_paged"].make(dict(STEP, codes=form), torch.float32, device)
    given["v"][0, 0, 1, 3] = torch.nan
    given["k"][1, 0, 0, 0] = torch.inf
    for module in (kernels_torch, kernels_triton):
        copy = CASES["attention_step_paged"].cast(given, torch.float32)
        out = module.attention_step_paged(**copy)[0]
        assert not out[0, 0, 1].isfinite().any()
        assert not out[1, 0, 0].isfinite().any()
        assert out[[0, 1], 0, [0, 1]].isfinite().all()
        again = dict(copy, lengths=copy["lengths"] + 1)  # from the pages, too
        out = module.attention_step_paged(**again | {x: torch.zeros_like(again[x]) for x in "kv"})[0]
        assert not out[0, 0, 1].isfinite().any()
        assert out[2].isfinite().all()


@pytest.mark.gpu
@EVERY_FORM
@pytest.mark.parametrize(("H", "Hkv", "Tn"), [(2, 2, 1), (8, 2, 1), (8, 2, 200), (4, 4, 33)])
def test_codes_are_read_right_in_bf16(H, Hkv, Tn, form, device):
    shape = dict(B=3, Tn=Tn, page=32, n=20, H=H, Hkv=Hkv, D=128, codes=form)
    given = CASES["attention_decode_paged"].make(shape, torch.bfloat16, device)
    exact, plain = (
        kernels_torch.attention_decode_paged(**CASES["attention_decode_paged"].cast(given, dtype))
        for dtype in (torch.float64, torch.bfloat16)
    )
    assert_close(kernels_triton.attention_decode_paged(**given), exact, plain)
