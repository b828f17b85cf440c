"""Attention: against a softmax written out, who sees whom, documents, soft-caps, and decoding against the whole.

And what is particular to going tile by tile: odd lengths, tiles nobody sees, large scores, what is kept for backward.
"""

from importlib import import_module
from itertools import cycle, pairwise, product

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import kernels_torch
from kernels_torch.cases import CASES
from tests.conftest import HAS_GPU
from tests.kernels.hopper import IS_HOPPER
from tests.kernels.test_contract import BACKENDS, MODULES, dtypes, every_second, transposed
from tests.numerics import judge, outputs, run, upstream_of

ATTENTION = {"torch": kernels_torch.attention}
if "triton" in BACKENDS:
    TRITON = import_module("kernels_triton.attention")
    TILES = import_module("kernels_triton.attention.tiles")
    ATTENTION["triton"] = TRITON.attention
    if IS_HOPPER:  # where the other has kernels of its own
        ATTENTION["triton_portable"] = TRITON.attention_portable
needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
WITH_ATTENTION = list(ATTENTION)
OURS = pytest.mark.parametrize("ours", WITH_ATTENTION[1:])
WITH_DECODE = [backend for backend in BACKENDS if "attention_decode" in MODULES[backend].__all__]


def written_out(q, k, v, *, causal=True, window=None, doc_ids=None, scale=None, softcap=None):
    """One query at a time, as the docstring states it."""
    B, Tq, H, D = q.shape
    Tk, group = k.shape[1], H // k.shape[2]
    out = torch.zeros_like(q)
    for b in range(B):
        for t in range(Tq):
            p = Tk - Tq + t
            seen = [s for s in range(Tk) if (s <= p or not causal) and (window is None or abs(p - s) <= window)]
            seen = [s for s in seen if doc_ids is None or doc_ids[b, s] == doc_ids[b, p]]
            for h in range(H if seen else 0):
                scores = k[b, seen, h // group] @ q[b, t, h] * (D**-0.5 if scale is None else scale)
                scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                out[b, t, h] = torch.softmax(scores, 0) @ v[b, seen, h // group]
    return out


@pytest.mark.parametrize("backend", WITH_ATTENTION)
@pytest.mark.parametrize("shape", CASES["attention"].check, ids=str)
def test_equals_the_softmax_written_out(backend, shape, device):
    inputs = CASES["attention"].make(shape, torch.float64, device)
    for scale in (None, 0.3):
        got = ATTENTION[backend](**inputs, scale=scale)
        torch.testing.assert_close(got, written_out(**inputs, scale=scale), rtol=1e-12, atol=1e-12)


def affected_queries(attention, inputs: dict, key: int) -> list[int]:
    """The queries whose output changes when the key and value at one position do."""
    before = attention(**inputs)
    changed = dict(inputs, k=inputs["k"].clone(), v=inputs["v"].clone())
    changed["k"][:, key] += 1
    changed["v"][:, key] += 1
    return (attention(**changed) != before).any(-1).any(-1)[0].nonzero().flatten().tolist()


@pytest.mark.parametrize("backend", WITH_ATTENTION)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 5, 21, 22, 23, 40, None])
def test_a_window_of_w_sees_exactly_w_earlier_keys(backend, window, causal, device):
    """Key s reaches queries s … s + window and no other, without causality also from s − window on: the classic
    off-by-one."""
    T = 23
    shape = {"B": 1, "T": T, "H": 2, "Hkv": 1, "D": 8, "window": window, "causal": causal}
    inputs = CASES["attention"].make(shape, torch.float32, device)
    reach = T if window is None else window
    for key in (0, 7, T - 1):
        first, last = key if causal else max(0, key - reach), min(T - 1, key + reach)
        assert affected_queries(ATTENTION[backend], inputs, key) == list(range(first, last + 1))


@pytest.mark.parametrize("backend", WITH_ATTENTION)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_packed_documents_equal_each_document_alone(backend, causal, window, device):
    """Also when one id comes back: tokens attend by id, wherever the others lie."""
    inputs = CASES["attention"].make({"B": 2, "T": 19, "H": 4, "Hkv": 2, "D": 8}, torch.float64, device)
    q, k, v = (inputs[name] for name in "qkv")
    cuts = [[0, 4, 5, 19], [0, 11, 18, 19]]
    doc_ids = torch.zeros(2, 19, dtype=torch.int64, device=device)
    for row, cut in enumerate(cuts):
        for i, (begin, end) in enumerate(pairwise(cut)):
            doc_ids[row, begin:end] = 7 - i
    packed = ATTENTION[backend](q, k, v, causal=causal, window=window, doc_ids=doc_ids)
    for row, cut in enumerate(cuts):
        for begin, end in pairwise(cut):
            part = [x[row : row + 1, begin:end] for x in (q, k, v)]
            alone = ATTENTION[backend](*part, causal=causal, window=window)
            torch.testing.assert_close(packed[row : row + 1, begin:end], alone, rtol=1e-12, atol=1e-12)
    interleaved = torch.tensor([[0, 1] * 9 + [0]] * 2, device=device)
    expected = written_out(q, k, v, causal=causal, window=window, doc_ids=interleaved)
    got = ATTENTION[backend](q, k, v, causal=causal, window=window, doc_ids=interleaved)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", WITH_ATTENTION)
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_the_last_queries_alone_equal_the_whole(backend, causal, window, device):
    """Fewer queries than keys are the last ones: bottom-right alignment."""
    inputs = CASES["attention"].make({"B": 2, "T": 11, "H": 2, "Hkv": 2, "D": 8}, torch.float64, device)
    q, k, v = (inputs[name] for name in "qkv")
    whole = ATTENTION[backend](q, k, v, causal=causal, window=window)
    for n in (1, 2, 10):
        last = ATTENTION[backend](q[:, -n:], k, v, causal=causal, window=window)
        torch.testing.assert_close(last, whole[:, -n:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", WITH_ATTENTION)
@pytest.mark.parametrize(
    ("causal", "window", "blind"), [(True, None, 6), (True, 2, 6), (False, 2, 4), (False, None, 0)]
)
def test_a_query_that_sees_no_key_gives_zeros(backend, causal, window, blind, device):
    """More queries than keys: the first come before all keys. Their gradients are zero, too, though they be NaN."""
    shape = dict(B=1, T=11, Tk=5, H=2, Hkv=1, D=8, causal=causal, window=window)
    inputs = CASES["attention"].make(shape, torch.float32, device)
    inputs["q"][:, :blind] = torch.nan
    results = run("attention", ATTENTION[backend], inputs)
    assert all((results[name][:, :blind] == 0).all() for name in ("output 0", "gradient of q"))
    assert (results["output 0"][:, blind:] != 0).all()
    assert all(value.isfinite().all() for value in results.values())
    empty = dict(inputs, k=inputs["k"][:, :0].detach(), v=inputs["v"][:, :0].detach())
    assert (run("attention", ATTENTION[backend], empty)["output 0"] == 0).all()


@pytest.mark.parametrize("backend", WITH_ATTENTION)
def test_a_soft_cap_bounds_the_scores(backend, device):
    """A low one makes all keys nearly alike, a high one changes nothing."""
    inputs = CASES["attention"].make({"B": 1, "T": 9, "H": 2, "Hkv": 1, "D": 8}, torch.float64, device)
    inputs |= {"q": 100 * inputs["q"], "causal": False}
    mean = inputs["v"].mean(1, keepdim=True).expand(-1, 9, 2, -1)
    low = ATTENTION[backend](**inputs | {"softcap": 1e-9})
    torch.testing.assert_close(low, mean, rtol=1e-8, atol=1e-8)
    high = ATTENTION[backend](**inputs | {"softcap": 1e9})
    torch.testing.assert_close(high, ATTENTION[backend](**inputs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", WITH_DECODE)
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("Tn", [1, 3])
def test_decode_of_ragged_rows_equals_each_row_attended_alone(backend, Tn, window, device):
    """With NaN beyond every row's length, in a cache that is a view of a larger one."""
    B, S, H, Hkv, D = 4, 13, 4, 2, 8
    lengths = [Tn, 5, 9, S]
    q = torch.randn(B, Tn, H, D, device=device, dtype=torch.float64)
    k_cache, v_cache = torch.full((2, 3, B, S, Hkv, D), torch.nan, device=device, dtype=torch.float64)[:, 1]
    for b, n in enumerate(lengths):
        k_cache[b, :n], v_cache[b, :n] = torch.randn(2, n, Hkv, D, device=device, dtype=torch.float64)
    counts = torch.tensor(lengths, dtype=torch.int32, device=device)
    got = MODULES[backend].attention_decode(q, k_cache, v_cache, counts, window=window)
    for b, n in enumerate(lengths):
        alone = written_out(q[b : b + 1], k_cache[b : b + 1, :n], v_cache[b : b + 1, :n], window=window)
        torch.testing.assert_close(got[b : b + 1], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", WITH_DECODE)
def test_a_query_before_the_first_position_gives_zeros(backend, device):
    """A row shorter than the new tokens: its first queries exist for no token."""
    q = torch.randn(2, 3, 2, 4, device=device)
    k, v = torch.randn(2, 2, 5, 1, 4, device=device)
    out = MODULES[backend].attention_decode(q, k, v, torch.tensor([0, 2], dtype=torch.int32, device=device))
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert torch.equal(out[1, 0], torch.zeros_like(out[1, 0]))
    assert (out[1, 1:] != 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", WITH_ATTENTION)
def test_plain_causal_attention_never_makes_the_whole_matrix(backend, device):
    """Twice the length costs about twice the memory, forward and backward (heads in groups, too)."""

    def peak_bytes(T: int) -> int:
        inputs = CASES["attention"].make({"B": 1, "T": T, "H": 8, "Hkv": 4, "D": 64}, torch.bfloat16, device)
        for name in "qkv":
            inputs[name].requires_grad_()
        torch.cuda.reset_peak_memory_stats()
        ATTENTION[backend](**inputs).float().sum().backward()
        return torch.cuda.max_memory_allocated()

    peak_bytes(256)
    assert peak_bytes(16384) <= 2.2 * peak_bytes(8192)


def odd_lengths() -> list:
    """FlashAttention's odd lengths, with all kinds of heads, causal, full and with a window, widths and dtypes in turn.

    In the interpreter the long ones take one kind of heads. NumPy adds up products over a head's whole width in a row,
    PyTorch in parts, so beyond 128 fp32 would be held against something that fp32 on a GPU does not do either.
    """
    lengths = [(1, 1), (1, 239), (239, 1), (3, 799), (799, 3), (113, 203), (108, 256), (239, 239), (1023, 1024)]
    lengths += [(1024, 1023), (4224, 4224)] if HAS_GPU else [(1024, 1023)]
    heads, widths = [(2, 2), (4, 2), (3, 1)], [64, 16, 128, 80, 32, 256, 96, 192, 5]
    kinds = cycle(dtypes("triton") if HAS_GPU else [torch.float32, torch.float16])
    params = []
    for i, (T, Tk) in enumerate(lengths):
        for j, ((H, Hkv), mask) in enumerate(product(heads, ("causal", "full", "window", "both sides"))):
            D, dtype = widths[(i + j) % len(widths)], next(kinds)
            if not HAS_GPU and max(T, Tk) > 700 and ((H, Hkv) != (2, 2) or mask == "both sides"):
                continue
            if not HAS_GPU and D > 128:
                dtype = torch.float16
            if dtype == torch.float64 and T > 1000:  # what is exact is in fp64, too, and no closer to the truth
                dtype = torch.float32
            window = max(1, Tk // 3) if mask in ("window", "both sides") else None
            shape = dict(B=1, T=T, Tk=Tk, H=H, Hkv=Hkv, D=D, causal=mask in ("causal", "window"), window=window)
            name = "-".join(str(part) for part in (T, Tk, H, Hkv, D, mask, str(dtype).removeprefix("torch.")))
            params.append(pytest.param(shape, dtype, id=name))
    return params


def use_tiles(monkeypatch: pytest.MonkeyPatch, forward: tuple, dq: tuple, dk_dv: tuple) -> None:
    """Queries × keys at a time of each kernel in the interpreter; a GPU keeps to its table."""
    if not HAS_GPU:
        for kernel, tile in (("forward", forward), ("dq", dq), ("dk_dv", dk_dv)):
            monkeypatch.setitem(TILES.IN_INTERPRETER, kernel, {256: TILES.Tile(*tile, 4, 1)})


def assert_as_exact_as_plain_pytorch(ours: str, inputs: dict, dtype: torch.dtype, cancels: bool = False) -> None:
    got = run("attention", ATTENTION[ours], CASES["attention"].cast(inputs, dtype))
    judge("attention", got, inputs, cancels=cancels)


@OURS
@pytest.mark.parametrize(("shape", "dtype"), odd_lengths())
def test_odd_lengths_are_as_exact_as_plain_pytorch(ours, shape, dtype, device, monkeypatch):
    use_tiles(monkeypatch, (128, 64), (64, 128), (128, 64))
    few = min(shape["T"], shape["Tk"]) < 4  # scores of a query that sees one key have gradients of mere rounding
    assert_as_exact_as_plain_pytorch(ours, CASES["attention"].make(shape, dtype, device), dtype, cancels=few)


@pytest.mark.parametrize("ours", WITH_ATTENTION[2:])
def test_what_the_contract_asks_of_the_others(ours, device):
    for shape, dtype in product(CASES["attention"].check, dtypes("triton")):
        assert_as_exact_as_plain_pytorch(ours, CASES["attention"].make(shape, dtype, device), dtype)


@OURS
@pytest.mark.parametrize("dtype", dtypes("triton"), ids=str)
@pytest.mark.parametrize(("softcap", "scores"), [(50.0, 1.0), (5.0, 4.0), (0.5, 0.1)])
def test_soft_capped_scores_are_as_exact_as_plain_pytorch(ours, softcap, scores, dtype, device):
    """Scores far below the cap, beyond it, and in between: tanh where it is a line, 1, and neither."""
    shape = dict(B=1, T=83, Tk=110, H=2, Hkv=1, D=64, window=70, softcap=softcap)
    inputs = CASES["attention"].make(shape, torch.float32, device)
    inputs = CASES["attention"].cast({**inputs, "q": scores * inputs["q"]}, dtype)
    assert_as_exact_as_plain_pytorch(ours, inputs, dtype)


SMALL_TILES = [
    ((16, 16), (16, 16), (16, 16)),
    ((64, 16), (32, 64), (16, 64)),
    ((32, 64), (16, 32), (32, 16)),
]


@needs_triton
@pytest.mark.parametrize("window", [1, 15, 16, 17, 63, 64, 65, 107, 108, None])
@pytest.mark.parametrize(
    ("causal", "tiles", "Tk"),
    [(True, SMALL_TILES[i], Tk) for i, Tk in enumerate((109, 109, 150))]
    + [(False, SMALL_TILES[i], Tk) for i, Tk in enumerate((80, 109, 150))],
    ids=str,
)
def test_windows_that_end_on_and_beside_the_edges_of_tiles(window, causal, tiles, Tk, device, monkeypatch):
    use_tiles(monkeypatch, *tiles)
    shape = dict(B=1, T=109, Tk=Tk, H=1, Hkv=1, D=16, causal=causal, window=window)
    assert_as_exact_as_plain_pytorch("triton", CASES["attention"].make(shape, torch.float32, device), torch.float32)


DOCUMENTS = {
    "packed": lambda B, T: torch.randint(0, 4, (B, T)).sort(dim=1).values,
    "falling": lambda B, T: torch.randint(0, 4, (B, T)).sort(dim=1, descending=True).values,
    "coming_back": lambda B, T: torch.arange(T).div(19, rounding_mode="floor").remainder(3).expand(B, T),
    "shuffled": lambda B, T: torch.randint(-2, 3, (B, T)),
    "one": lambda B, T: torch.full((B, T), 7),
    "each_its_own": lambda B, T: torch.arange(T).expand(B, T) - 2**40,
    "one_stranger": lambda B, T: (torch.arange(T) == 70).long().expand(B, T),
}


@needs_triton
@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 33), (False, None), (False, 33)])
@pytest.mark.parametrize("tiles", SMALL_TILES[:2], ids=str)
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_documents_in_any_order(documents, tiles, causal, window, device, monkeypatch):
    """As many as there may be in a tile, or one tile after another, and ids that 32 bits do not hold."""
    use_tiles(monkeypatch, *tiles)
    B, T = 1, 101
    shape = dict(B=B, T=T, H=1, Hkv=1, D=16, causal=causal, window=window)
    inputs = CASES["attention"].make(shape, torch.float32, device)
    inputs["doc_ids"] = DOCUMENTS[documents](B, T).to(device)
    if documents == "each_its_own":  # gradients of scores are 0, and nobody's rounding can be held against that
        got = TRITON.attention(**inputs)
        torch.testing.assert_close(got, inputs["v"], rtol=1e-6, atol=0)
    else:
        assert_as_exact_as_plain_pytorch("triton", inputs, torch.float32)


@OURS
@pytest.mark.parametrize("dtype", [torch.float32, *([torch.float16] if HAS_GPU else [])], ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("documents", [False, True])
def test_tiles_that_nobody_sees_are_not_read(ours, documents, causal, dtype, device, monkeypatch):
    """NaN in them stays where it is: were they masked only, 0 · NaN would be everywhere."""
    use_tiles(monkeypatch, (128, 64), (64, 64), (64, 128))
    T, far = 1024, slice(0, 256)
    inputs = CASES["attention"].make(dict(B=1, T=T, H=2, Hkv=1, D=16, causal=causal), dtype, device)
    if documents:
        begin = 300 if causal else 384  # there between tiles: keys see what later queries of a tile with NaN made
        inputs["doc_ids"] = (torch.arange(T, device=device)[None] >= begin).int()
    else:
        inputs["window"] = 40
    inputs["k"][:, far], inputs["v"][:, far], inputs["q"][:, far] = torch.nan, torch.nan, torch.nan
    results = run("attention", ATTENTION[ours], inputs)
    first = 512  # a tile or more away from what sees NaN
    for name in ("output 0", "gradient of q", "gradient of k", "gradient of v"):
        assert results[name][:, far].isnan().all()
        assert results[name][:, first:].isfinite().all(), name


@OURS
@pytest.mark.parametrize("dtype", dtypes("triton")[1:], ids=str)  # what fp64 would be held against is extrapolated
@pytest.mark.parametrize("window", [None, 30])
def test_large_scores_do_not_overflow(ours, dtype, window, device):
    """In hundreds, of both signs: exp of them is more than fp32 holds, and most rows see one key only."""
    shape = dict(B=1, T=83, H=2, Hkv=1, D=64, window=window)
    inputs = CASES["attention"].make(shape, torch.float32, device)
    inputs = CASES["attention"].cast({**inputs, "q": 5 * inputs["q"], "k": 15 * inputs["k"]}, dtype)
    assert_as_exact_as_plain_pytorch(ours, inputs, dtype)


@OURS
@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("scale", [0.0, -0.7, 3])
def test_any_scale(ours, scale, softcap, device):
    shape = dict(B=1, T=37, H=2, Hkv=2, D=8, window=20, softcap=softcap)
    inputs = CASES["attention"].make(shape, torch.float32, device)
    inputs["scale"] = scale
    assert_as_exact_as_plain_pytorch(ours, inputs, torch.float32)


@pytest.mark.parametrize("backend", WITH_ATTENTION)
@pytest.mark.parametrize("scale", [1e-46, 1e-320, -1e-46])
def test_a_scale_too_small_for_fp32_sees_all_keys_alike(backend, scale, device):
    inputs = CASES["attention"].make(dict(B=1, T=9, H=2, Hkv=2, D=8), torch.float32, device)
    judge("attention", run("attention", ATTENTION[backend], inputs | {"scale": scale}), inputs | {"scale": 0.0})


@pytest.mark.parametrize("backend", WITH_ATTENTION)
@pytest.mark.parametrize("softcap", [1e-30, 1e30])
def test_the_least_and_the_largest_soft_cap(backend, softcap, device):
    inputs = CASES["attention"].make(dict(B=1, T=19, H=2, Hkv=2, D=8, softcap=softcap), torch.float32, device)
    judge("attention", run("attention", ATTENTION[backend], inputs), inputs)


@pytest.mark.parametrize("backend", WITH_ATTENTION)
def test_scores_that_only_fp64_holds(backend, device):
    """All far below what fp32 can count to: weights are about their differences."""
    q = torch.full((1, 2, 1, 1), 1e20, dtype=torch.float64, device=device)
    v = torch.tensor([2.0, 4.0], dtype=torch.float64, device=device).view(1, 2, 1, 1)
    got = ATTENTION[backend](q, -q, v, scale=1.0)
    torch.testing.assert_close(got.flatten(), v.new_tensor([2.0, 3.0]), rtol=1e-12, atol=0.0)


HEADS_FIRST = lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)
EXPANDED = lambda x: x[:1, :1].expand(x.shape)


@needs_triton
@pytest.mark.parametrize("strided", [HEADS_FIRST, EXPANDED, transposed, every_second], ids=range(4))
def test_incoming_gradients_and_inputs_of_any_strides(strided, device):
    inputs = CASES["attention"].make(dict(B=2, T=45, H=4, Hkv=2, D=16, window=20), torch.float32, device)
    upstream = tuple(strided(up) for up in upstream_of(outputs(TRITON.attention, inputs)))
    packed = torch.cat([inputs[name] for name in "qkv"], dim=2)  # one projection's output, cut into three
    views = dict(zip("qkv", (x.detach() for x in packed.split([4, 2, 2], dim=2)), strict=True))
    plain = tuple(up.contiguous() for up in upstream)
    judge("attention", run("attention", TRITON.attention, {**inputs, **views}, upstream), inputs, plain)


@needs_triton
def test_backward_keeps_the_inputs_the_output_and_one_number_a_query(device):
    shape = dict(B=2, T=130, H=4, Hkv=2, D=16)
    inputs = CASES["attention"].make(shape, torch.float16, device)
    kept = {}
    for name in "qkv":
        inputs[name].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.update({x.data_ptr(): x}) or x, lambda x: x):
        out = TRITON.attention(**inputs)
    for x in (*inputs.values(), out):
        if isinstance(x, torch.Tensor):
            assert kept.pop(x.data_ptr()) is not None
    (lse,) = kept.values()
    assert lse.dtype == torch.float32
    assert lse.numel() <= 2 * 4 * 256  # up to whole tiles


@needs_triton
def test_the_window_that_sees_everything_and_none_are_one(device):
    inputs = CASES["attention"].make(dict(B=1, T=40, H=2, Hkv=1, D=8), torch.float32, device)
    assert torch.equal(TRITON.attention(**inputs | {"window": 39}), TRITON.attention(**inputs))


@needs_triton
def test_heads_too_wide_are_refused_by_name(device):
    q = torch.zeros(1, 1, 1, 257, device=device)
    with pytest.raises(ValueError, match="at most 256 wide, got 257"):
        TRITON.attention(q, q, q)


@needs_triton
def test_lse_has_whole_tiles_of_every_kernel():
    for table in (TILES.LARGE, TILES.SMALL, TILES.FP32, TILES.FP64, TILES.IN_INTERPRETER):
        assert all(TILES.LSE % tile.BT == 0 for rows in table.values() for tile in rows.values())
    assert TILES.LSE % TILES.DELTA.BT == 0


@pytest.mark.usefixtures("much_memory")
@pytest.mark.gpu
@OURS
@pytest.mark.parametrize(("D", "Hkv"), [(64, 2), (128, 2), (128, 8)])
def test_many_runs_under_memory_pressure_give_the_same_bits(ours, D, Hkv, device):
    inputs = CASES["attention"].make(dict(B=8, T=1023, H=8, Hkv=Hkv, D=D), torch.bfloat16, device)
    ballast = torch.empty(int(0.8 * torch.cuda.mem_get_info()[0]), dtype=torch.uint8, device=device)
    first = run("attention", ATTENTION[ours], inputs)
    for _ in range(250):
        for name, value in run("attention", ATTENTION[ours], inputs).items():
            assert torch.equal(value, first[name]), name
    del ballast


@pytest.mark.gpu
@OURS
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"softcap": 5.0}, {"window": 200}], ids=str)
def test_compiled_checkpointed_and_in_a_cuda_graph_gives_the_same(ours, options, device):
    """In half precision, in which Hopper GPUs have kernels of their own."""
    case, function = CASES["attention"], ATTENTION[ours]
    inputs = case.make(dict(B=2, T=300, H=4, Hkv=2, D=64, **options), torch.bfloat16, device)
    expected = run("attention", function, inputs)
    torch._dynamo.reset()
    again = lambda **given: checkpoint(function, use_reentrant=False, **given)
    for other in (torch.compile(function, fullgraph=True), again, torch.compile(again, fullgraph=True)):
        for name, value in run("attention", other, inputs).items():
            assert torch.equal(value, expected[name]), name
    upstream, graph = upstream_of(outputs(function, inputs)), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run("attention", function, inputs, upstream)
    with torch.no_grad():
        inputs["q"].mul_(2)
    graph.replay()
    for name, value in run("attention", function, inputs, upstream).items():
        assert torch.equal(captured[name], value), name


@pytest.mark.gpu
@OURS
def test_a_window_saves_the_time_of_what_it_hides(ours, device):
    """The fastest of some runs, forward and backward: at T 8192 a window of 512 has an eighth of the pairs."""

    def microseconds(window: int | None) -> float:
        shape = dict(B=2, T=8192, H=16, Hkv=16, D=128, window=window)
        inputs = CASES["attention"].make(shape, torch.bfloat16, device)
        times = []
        for _ in range(8):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run("attention", ATTENTION[ours], inputs, upstream)
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        return min(times)

    upstream = (torch.randn(2, 8192, 16, 128, device=device).bfloat16(),)
    assert microseconds(512) < 0.4 * microseconds(None)


@needs_triton
def test_the_kernels_for_hopper_take_what_they_know_and_nothing_else(monkeypatch):
    """Decided by the GPU and the kind of inputs; a Triton without them is no reason to take others in silence."""
    q = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16)
    assert not TRITON.takes_hopper(q, True, None)
    monkeypatch.setattr(TRITON, "INTERPRETED", False)
    monkeypatch.setattr(TRITON, "is_hopper", lambda device: True)
    if TRITON.supports is None:
        monkeypatch.setattr(TRITON, "supports", lambda q: q.dtype == torch.bfloat16)
    assert TRITON.takes_hopper(q, True, None)
    assert not TRITON.takes_hopper(q, False, None)
    assert not TRITON.takes_hopper(q, True, 30.0)
    assert not TRITON.takes_hopper(q.float(), True, None)
    monkeypatch.setattr(TRITON, "supports", None)
    monkeypatch.setattr(TRITON, "NO_GLUON", "no module named gluon", raising=False)
    with pytest.raises(ValueError, match=r"no module named gluon\): take kernels\.attention=triton_portable"):
        TRITON.takes_hopper(q, True, None)
