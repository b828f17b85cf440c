"""Rotation, norm and scale of q and k: against complex numbers, and what positions must mean."""

import pytest
import torch

from kernels_torch.cases import CASES
from tests.kernels.test_contract import BACKENDS, MODULES, judge, run, upstream_of

WITH_OP = [backend for backend in BACKENDS if "qk_norm_rope" in MODULES[backend].__all__]
WITH_APPEND = [backend for backend in BACKENDS if "qk_norm_rope_append" in MODULES[backend].__all__]
TRITON = pytest.mark.skipif("triton" not in WITH_OP, reason="needs triton")
SHAPE = {"B": 3, "T": 5, "H": 4, "Hkv": 2, "D": 8}


@pytest.fixture
def inputs(device):
    inputs = CASES["qk_norm_rope"].make(SHAPE, torch.float64, device)
    angles = torch.outer(torch.arange(13, device=device), torch.tensor([1.0, 0.3, 0.1, 0.03], device=device).double())
    return inputs | {"cos": angles.cos(), "sin": angles.sin()}


def rotated(x, cos, sin, position):
    """Each pair (x[i], x[i + D/2]) as a complex number, turned by −θ."""
    a, b = x.chunk(2, dim=-1)
    turned = torch.complex(a, b) * torch.complex(cos[position], -sin[position])
    return torch.cat([turned.real, turned.imag], dim=-1)


@pytest.mark.parametrize("backend", WITH_OP)
@pytest.mark.parametrize("eps", [None, 1e-6, 0.5])
def test_equals_a_complex_rotation_then_norm_then_scale(backend, eps, inputs):
    got = MODULES[backend].qk_norm_rope(**inputs | {"start": 2, "eps": eps, "scale": 1.2})
    for x, y in zip((inputs["q"], inputs["k"]), got, strict=True):
        for t in range(SHAPE["T"]):
            z = rotated(x[:, t], inputs["cos"], inputs["sin"], 2 + t)
            if eps is not None:
                z = z / (z.square().mean(-1, keepdim=True) + eps).sqrt()
            torch.testing.assert_close(y[:, t], 1.2 * z, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", WITH_OP)
def test_every_row_may_start_elsewhere(backend, inputs, device):
    """A tensor of starts gives each row what an int start gives it alone, to the bit."""
    starts = [0, 3, 8]
    for dtype in (torch.int32, torch.int64):
        start = torch.tensor(starts, dtype=dtype, device=device)
        together = MODULES[backend].qk_norm_rope(**inputs | {"start": start})
        for b, position in enumerate(starts):
            row = {"q": inputs["q"][b : b + 1], "k": inputs["k"][b : b + 1], "start": position}
            alone = MODULES[backend].qk_norm_rope(**inputs | row)
            for x, y in zip(together, alone, strict=True):
                assert torch.equal(x[b : b + 1], y)


@pytest.mark.parametrize("backend", WITH_OP)
def test_scores_depend_on_the_distance_only(backend, inputs):
    """The same q and k moved along together keep their product: what makes positions relative."""
    q, k = inputs["q"][:, :1].expand(-1, 5, -1, -1), inputs["k"][:, :1].expand(-1, 5, -1, -1)
    q, k = MODULES[backend].qk_norm_rope(**inputs | {"q": q, "k": k})
    scores = torch.einsum("bthd,bshd->bhts", q[:, :, :2], k)
    for distance in range(1, 5):
        along = scores.diagonal(-distance, dim1=-2, dim2=-1)
        torch.testing.assert_close(along, along[..., :1].expand_as(along), rtol=1e-12, atol=1e-12)
        assert (along[..., 0] - scores[..., 0, 0]).abs().min() > 1e-6


@pytest.mark.parametrize("backend", WITH_OP)
def test_head_vectors_have_the_length_the_scale_says(backend, inputs):
    for y in MODULES[backend].qk_norm_rope(**inputs | {"eps": 0.0, "scale": 1.2}):
        torch.testing.assert_close(y.square().mean(-1), torch.full(y.shape[:-1], 1.44, dtype=y.dtype, device=y.device))


@pytest.mark.parametrize("backend", WITH_OP)
@pytest.mark.parametrize(("T", "H", "Hkv", "D"), [(37, 5, 3, 80), (1, 7, 1, 256), (19, 1, 17, 2), (33, 2, 2, 6)])
def test_any_number_of_heads_of_any_even_width(backend, T, H, Hkv, D, device):
    """More tokens and heads than one program takes at a time, and ends that fill none."""
    inputs = CASES["qk_norm_rope"].make({"B": 2, "T": T, "H": H, "Hkv": Hkv, "D": D}, torch.float32, device)
    got = run("qk_norm_rope", MODULES[backend].qk_norm_rope, CASES["qk_norm_rope"].cast(inputs, torch.float32))
    judge("qk_norm_rope", got, inputs)


@pytest.mark.parametrize("backend", WITH_OP)
@pytest.mark.parametrize("eps", [None, 1e-6])
def test_views_of_one_projection_and_gradients_laid_out_by_head(backend, eps, device):
    """q and k lie between each other in [B, T, 3, H, D]; attention hands back gradients whose heads are outermost."""
    case, shape = CASES["qk_norm_rope"], {"B": 2, "T": 9, "H": 3, "Hkv": 3, "D": 16, "eps": eps}
    inputs = case.make(shape, torch.float32, device)
    fused = torch.stack([inputs["q"], inputs["k"], torch.full_like(inputs["q"], torch.nan)], dim=2)
    views = case.cast(inputs, torch.float32) | {"q": fused[:, :, 0].detach(), "k": fused[:, :, 1].detach()}
    upstream = upstream_of((inputs["q"], inputs["k"]))
    by_head = tuple(up.transpose(1, 2).contiguous().transpose(1, 2) for up in upstream)
    got = run("qk_norm_rope", MODULES[backend].qk_norm_rope, views, by_head)
    judge("qk_norm_rope", got, inputs, upstream)
    for name, value in got.items():
        assert value.is_contiguous(), name


@pytest.mark.parametrize("backend", WITH_OP)
@pytest.mark.parametrize("used", [0, 1])
def test_an_output_that_nobody_uses_costs_its_input_nothing(backend, used, inputs):
    """The other input's gradient is what it is when both are used."""
    leaves = [inputs[name].requires_grad_() for name in ("q", "k")]
    outs = MODULES[backend].qk_norm_rope(**inputs)
    both = torch.autograd.grad(outs, leaves, upstream_of(outs), retain_graph=True)
    alone = torch.autograd.grad(outs[used], leaves, upstream_of(outs)[used], allow_unused=True)
    assert torch.equal(alone[used], both[used])
    assert alone[1 - used] is None or not alone[1 - used].any()


@pytest.mark.parametrize("backend", WITH_OP)
def test_the_last_of_a_million_positions(backend, device):
    """The table's rows are looked up, not computed: as exact there as at the beginning."""
    S, T, D = 2**20, 3, 4
    case = CASES["qk_norm_rope"]
    inputs = case.make({"B": 2, "T": T, "H": 2, "Hkv": 1, "D": D}, torch.float32, device)
    angles = torch.arange(S - T - 1, S, device=device, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.01]).to(
        device
    )
    cos, sin = (torch.full((S, D // 2), torch.nan, device=device) for _ in range(2))
    cos[-T - 1 :], sin[-T - 1 :] = angles.cos(), angles.sin()
    for start in (S - T, torch.tensor([S - T, S - T - 1], dtype=torch.int32, device=device)):
        far = inputs | {"cos": cos, "sin": sin, "start": start}
        judge("qk_norm_rope", run("qk_norm_rope", MODULES[backend].qk_norm_rope, case.cast(far, torch.float32)), far)


@TRITON
def test_a_position_outside_the_table_shows(inputs, device):
    """A start on the device is checked by nobody; the kernel gives NaN instead of what lies beside the table."""
    start = torch.tensor([-1, 8, 9], device=device)
    for z in MODULES["triton"].qk_norm_rope(**inputs | {"start": start}):
        outside = z.isnan().all(-1).all(-1)
        assert outside.tolist() == [[True] + [False] * 4, [False] * 5, [False] * 4 + [True]]
        assert z[~outside].isfinite().all()


APPEND_SHAPE = {"B": 4, "T": 3, "S": 11, "H": 5, "Hkv": 2, "D": 12, "scale": 1.2}


def appended(backend, inputs):
    """Outputs of the op on inputs of its own, as it writes into two of them."""
    fresh = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    return MODULES[backend].qk_norm_rope_append(**fresh)


@pytest.mark.parametrize("backend", WITH_APPEND)
@pytest.mark.parametrize("eps", [None, 1e-6])
def test_append_is_qk_norm_rope_and_a_copy(backend, eps, device):
    """To the bit; nothing but the new tokens' places changes, and tokens without room go nowhere."""
    inputs = CASES["qk_norm_rope_append"].make(APPEND_SHAPE | {"eps": eps}, torch.float32, device)
    lengths = [0, 8, 10, 11]
    inputs["lengths"] = torch.tensor(lengths, dtype=torch.int32, device=device)
    cos, sin = (torch.cat([table, table[-1:].expand(3, -1)]) for table in (inputs["cos"], inputs["sin"]))
    start = {"cos": cos, "sin": sin, "start": inputs["lengths"], "eps": eps, "scale": inputs["scale"]}
    q, k = MODULES[backend].qk_norm_rope(inputs["q"], inputs["k"], **start)
    k_cache, v_cache = inputs["k_cache"].clone(), inputs["v_cache"].clone()
    for b, length in enumerate(lengths):
        room = min(3, 11 - length)
        k_cache[b, length : length + room], v_cache[b, length : length + room] = k[b, :room], inputs["v"][b, :room]
    for got, expected in zip(appended(backend, inputs), (q, k_cache, v_cache), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", WITH_APPEND)
def test_append_writes_into_the_caches_it_is_given(backend, device):
    """A layer of a larger cache, laid out by head and in another dtype; what lies around it keeps its bits."""
    inputs = CASES["qk_norm_rope_append"].make(APPEND_SHAPE, torch.float32, device)
    _, k_plain, v_plain = appended(backend, inputs)
    caches = {}
    for name in ("k_cache", "v_cache"):
        whole = torch.full((3, 4, 2, 12, 11), 7.0, dtype=torch.float64, device=device)  # layer, B, Hkv, D, S
        caches[name] = whole[1].permute(0, 3, 1, 2)
        caches[name].copy_(inputs[name])
    got = MODULES[backend].qk_norm_rope_append(**inputs | caches)
    assert got[1] is caches["k_cache"]
    assert got[2] is caches["v_cache"]
    for name, plain in (("k_cache", k_plain), ("v_cache", v_plain)):
        torch.testing.assert_close(caches[name].float(), plain, rtol=1e-6, atol=1e-6)
        assert (caches[name]._base[[0, 2]] == 7).all()


@pytest.mark.parametrize("backend", WITH_APPEND)
def test_append_records_no_gradient(backend, device):
    inputs = CASES["qk_norm_rope_append"].make(APPEND_SHAPE, torch.float32, device)
    for name in ("q", "k", "v"):
        inputs[name].requires_grad_()
    assert not any(out.requires_grad for out in MODULES[backend].qk_norm_rope_append(**inputs))
