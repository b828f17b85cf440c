"""The decoding kernel: any lengths, windows, groups, widths, strides and pages, split into any number of runs."""

import inspect
import sys

import pytest
import torch
from torch import Tensor

import kernels_torch
from kernels_torch.cases import CASES
from tests.conftest import HAS_GPU
from tests.numerics import assert_close, judge, run

pytest.importorskip("triton")

from kernels_triton.attention_decode import Tile, attention_decode, attention_decode_paged

kernel = sys.modules[attention_decode.__module__]  # kernels_triton.attention_decode may name the function
OP = "attention_decode"
CASE = CASES[OP]
DTYPES = [torch.float64, torch.float32, torch.float16, *([torch.bfloat16] if HAS_GPU else [])]
HALF = torch.bfloat16 if HAS_GPU else torch.float16
SMALL = Tile(BM=16, BS=16, warps=4, stages=2, fill=2, least=1)  # blocks that even a short row has several of
SMALL_ONE = SMALL._replace(BM=1, warps=1)
HEADS = [
    dict(Tn=2, H=4, Hkv=2),
    dict(Tn=1, H=2, Hkv=2),
]  # several queries to a key head, and one


def made(shape: dict, dtype: torch.dtype, device: torch.device, lengths: list[int] | None = None, **changes) -> dict:
    """Inputs of a shape; with lengths given, NaN lies behind those."""
    inputs = CASE.make(dict(shape, full=True), dtype, device) | changes
    if lengths is not None:
        inputs["lengths"] = torch.tensor(lengths, dtype=torch.int32, device=device)
        poison_tails(inputs, torch.nan)
    return inputs


def poison_tails(inputs: dict, value: float) -> None:
    S = inputs["k_cache"].shape[1]
    beyond = torch.arange(S, device=inputs["lengths"].device) >= inputs["lengths"][:, None]
    for name in ("k_cache", "v_cache"):
        inputs[name].masked_fill_(beyond[:, :, None, None], value)


def check(inputs: dict) -> Tensor:
    got = run(OP, attention_decode, inputs)
    judge(OP, got, inputs)
    return got["output 0"]


def shuffled_pages(inputs: dict, page: int, spare: int = 3) -> dict:
    """The same cache cut into pages in random order, among some of NaN that are nobody's."""
    B, S, Hkv, D = inputs["k_cache"].shape
    n = -(-S // page)
    device = inputs["q"].device
    order = torch.randperm(B * n + spare, generator=torch.Generator().manual_seed(2)).to(device)
    block_table = order[: B * n].view(B, n).to(torch.int32)
    pages = {}
    for name in ("k", "v"):
        cache = torch.nn.functional.pad(inputs[f"{name}_cache"], (0, 0, 0, 0, 0, n * page - S), value=torch.nan)
        pool = torch.full((B * n + spare, page, Hkv, D), torch.nan, dtype=cache.dtype, device=device)
        pool[order[: B * n]] = cache.reshape(B * n, page, Hkv, D)
        pages[f"{name}_pages"] = pool
    rest = {name: inputs[name] for name in ("q", "lengths", "window")}
    return rest | pages | {"block_table": block_table}


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(kernel, "tile_for", lambda M, *_: SMALL_ONE if M == 1 else SMALL)


def test_signatures_are_the_reference_ones():
    for reference, function in (
        (kernels_torch.attention_decode, attention_decode),
        (kernels_torch.attention_decode_paged, attention_decode_paged),
    ):
        parameters = inspect.signature(function).parameters.values()
        expected = inspect.signature(reference).parameters.values()
        assert [(p.name, p.kind, p.default) for p in parameters] == [(p.name, p.kind, p.default) for p in expected]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CASE.check, ids=str)
def test_is_as_exact_as_plain_pytorch(shape, dtype, device):
    inputs = CASE.make(shape, dtype, device)
    judge(OP, run(OP, attention_decode, CASE.cast(inputs, dtype)), inputs)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("D", [1, 16, 64, 80, 96, 128, 192, 256])
def test_any_width_of_heads(heads, D, dtype, device):
    check(made(dict(B=3, S=150, D=D, **heads), dtype, device, [150, 2, 77]))


@pytest.mark.parametrize("dtype", [torch.float64, HALF], ids=str)
@pytest.mark.parametrize(("H", "Hkv", "Tn"), [(16, 1, 1), (16, 1, 9), (17, 1, 1), (6, 2, 3), (5, 5, 16), (3, 1, 33)])
def test_any_number_of_heads_and_new_tokens_to_a_key_head(H, Hkv, Tn, dtype, device):
    """From less than a tile of queries to several, none of which they fill."""
    check(made(dict(B=2, Tn=Tn, S=90, H=H, Hkv=Hkv, D=16), dtype, device, [90, 41]))


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("window", [1, 15, 16, 17, 40, 97, 98, 99, 100, 10**12, None])
def test_windows_of_every_size(heads, window, device, small_tiles):
    check(made(dict(B=4, S=99, D=16, **heads), torch.float32, device, [99, 3, 64, 18], window=window))


@pytest.mark.parametrize("window", [1, 16, 30, 38, 39, None])
def test_a_window_of_w_sees_exactly_w_earlier_keys(window, device, small_tiles):
    """A key reaches the queries at its own position and at `window` later ones, and no other."""
    Tn, length = 5, 40
    inputs = made(dict(B=1, Tn=Tn, S=48, H=2, Hkv=1, D=16), torch.float32, device, [length], window=window)
    before = attention_decode(**inputs)
    for key in (0, 15, 16, 36, 39):
        changed = dict(inputs, k_cache=inputs["k_cache"].clone(), v_cache=inputs["v_cache"].clone())
        changed["k_cache"][:, key] += 1
        changed["v_cache"][:, key] += 1
        reached = (attention_decode(**changed) != before).any(-1).any(-1)[0].tolist()
        positions = range(length - Tn, length)
        assert reached == [key <= p and (window is None or p - key <= window) for p in positions], key


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("window", [None, 4])
def test_rows_shorter_than_the_new_tokens_give_zeros_for_those_missing(window, dtype, device, small_tiles):
    lengths = [0, 1, 4, 5, 6, 50]
    inputs = made(dict(B=6, Tn=5, S=50, H=4, Hkv=2, D=16), dtype, device, lengths, window=window)
    out = check(inputs)
    for b, length in enumerate(lengths):
        missing = max(5 - length, 0)
        assert (out[b, :missing] == 0).all()
        assert (out[b, missing:] != 0).all()


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("page", [None, 16, 24])
def test_what_lies_beyond_the_lengths_changes_nothing(heads, page, device, small_tiles):
    """Not one bit, whatever it is."""
    inputs = made(dict(B=3, S=48, D=16, **heads), torch.float32, device, [48, 17, 0])
    outs = []
    for garbage in (0.0, torch.nan, torch.inf, -1e30):
        poison_tails(inputs, garbage)
        given = inputs if page is None else shuffled_pages(inputs, page)
        outs.append((attention_decode if page is None else attention_decode_paged)(**given))
    assert outs[0].isfinite().all()
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("lengths", [[-3, 200], [60, 2**31 - 1]])
def test_lengths_that_cannot_be_reach_for_nothing(heads, lengths, device, small_tiles):
    """Nobody checked them. Below zero there are no keys, and there are no more than the cache has room for."""
    inputs = made(dict(B=2, S=60, D=16, **heads), torch.float32, device)
    clamped = inputs | {"lengths": torch.tensor(lengths, device=device).clamp(0, 60)}
    inputs["lengths"] = torch.tensor(lengths, device=device, dtype=torch.int32)
    assert torch.equal(attention_decode(**inputs), attention_decode(**clamped))


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("splits", [1, 2, 3, 7, 16])
def test_any_number_of_splits_gives_the_same(heads, splits, window, device, monkeypatch, small_tiles):
    """More than a row has blocks, too; and in fp64 they differ by rounding only."""
    shape = dict(B=4, S=210, D=16, **heads, window=window)
    monkeypatch.setattr(kernel, "n_splits", lambda *_: splits)
    for dtype in (torch.float64, HALF):
        check(made(shape, dtype, device, [210, 1, 0, 130]))


@pytest.mark.parametrize(("splits", "window"), [(2, None), (5, None), (5, 30)])
def test_each_tile_of_queries_is_split_by_what_it_sees(splits, window, device, monkeypatch, small_tiles):
    """The first of them see fewer keys than the last, and are joined from fewer parts."""
    monkeypatch.setattr(kernel, "n_splits", lambda *_: splits)
    check(made(dict(B=2, Tn=40, S=130, H=4, Hkv=1, D=16, window=window), HALF, device, [130, 55]))


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("page", [None, 32])
def test_a_row_does_not_depend_on_the_others(heads, page, device, small_tiles):
    """Neither on what they hold nor on how long they are: its bits stay."""
    shape = dict(B=4, S=96, D=16, **heads)
    outs = []
    for others in ([96, 3, 50], [0, 96, 96], [17, 1, 2]):
        inputs = made(shape, torch.float32, device, [70, *others])
        inputs["q"][1:] *= others[0]
        given = inputs if page is None else shuffled_pages(inputs, page)
        outs.append((attention_decode if page is None else attention_decode_paged)(**given)[0])
    assert all(torch.equal(out, outs[0]) for out in outs)


def in_layers(x: Tensor) -> Tensor:
    """[B, S, Hkv, D] as a layer of [L, B, S, Hkv, D], with NaN in the others."""
    layers = torch.full((3, *x.shape), torch.nan, dtype=x.dtype, device=x.device)
    layers[1] = x
    return layers[1]


def heads_first(x: Tensor) -> Tensor:
    """As kept in [B, Hkv, S, D]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def rows_inside(x: Tensor) -> Tensor:
    """As kept in [S, B, Hkv, D]."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def values_apart(x: Tensor) -> Tensor:
    """The values of a head far from each other."""
    return x.mT.contiguous().mT


def every_second(x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1).flatten(-2)[..., ::2]


VIEWS = [in_layers, heads_first, rows_inside, values_apart, every_second]


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
def test_strides_change_nothing(heads, view, device, small_tiles):
    """Not one bit: caches are read where they lie. (Threads share out values that are not neighbours in another way,
    and a GPU adds them up in another order.)"""
    inputs = made(dict(B=3, S=45, D=24, **heads), torch.float32, device, [45, 2, 30])
    expected = attention_decode(**inputs)

    def same(got: Tensor, expected: Tensor) -> bool:
        if view in (values_apart, every_second) and device.type == "cuda":
            return torch.allclose(got, expected, rtol=1e-5, atol=1e-6)
        return torch.equal(got, expected)

    assert same(attention_decode(**inputs | {"k_cache": view(inputs["k_cache"])}), expected)
    assert same(attention_decode(**inputs | {"v_cache": view(inputs["v_cache"])}), expected)
    assert same(attention_decode(**inputs | {"q": view(inputs["q"])}), expected)
    spread = torch.stack([inputs["lengths"], torch.full_like(inputs["lengths"], 9)], dim=1)[:, 0]
    assert torch.equal(attention_decode(**inputs | {"lengths": spread}), expected)
    pages = shuffled_pages(inputs, 15)
    expected = attention_decode_paged(**pages)
    views = {name: view(pages[name]) for name in ("k_pages", "v_pages")} | {"block_table": pages["block_table"].t()}
    views["block_table"] = views["block_table"].contiguous().t()
    assert same(attention_decode_paged(**pages | views), expected)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("page", [1, 5, 16, 24, 32, 48, 96])
def test_pages_in_any_order_equal_a_cache_in_one_piece(heads, page, window, integer, device, small_tiles):
    """Bit for bit, where both have the same room."""
    inputs = made(dict(B=3, S=96, D=16, **heads, window=window), torch.float32, device, [96, 1, 53])
    pages = shuffled_pages(inputs, page)
    pages["block_table"] = pages["block_table"].to(integer)
    got = attention_decode_paged(**pages)
    if 96 % page == 0:
        assert torch.equal(got, attention_decode(**inputs))
    judge(OP, {"output 0": got}, inputs)
    exact, plain = (
        kernels_torch.attention_decode_paged(**cast_pages(pages, d)) for d in (torch.float64, torch.float32)
    )
    assert_close(got, exact, plain)


def cast_pages(pages: dict, dtype: torch.dtype) -> dict:
    return pages | {name: pages[name].to(dtype) for name in ("q", "k_pages", "v_pages")}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page", [16, 64, 128])
def test_pages_with_the_tiles_used(page, dtype, device):
    inputs = made(dict(B=2, Tn=1, S=250, H=4, Hkv=1, D=64), dtype, device, [250, 99])
    judge(OP, {"output 0": attention_decode_paged(**shuffled_pages(inputs, page))}, inputs)


@pytest.mark.parametrize("page", [16, 5])
def test_a_table_is_not_read_behind_a_row(page, device, small_tiles):
    """Entries there are whatever they are; and rows may share the pages of a prompt."""
    inputs = made(dict(B=2, Tn=1, S=80, H=2, Hkv=1, D=16), torch.float32, device, [80, 80])
    pages = shuffled_pages(inputs, page)
    pages["block_table"][1] = pages["block_table"][0]
    pages["lengths"][1] = 33
    pages["q"][1] = pages["q"][0]
    expected = attention_decode_paged(**pages)
    used = -(-33 // page)
    for garbage in (-1, 2**30):
        pages["block_table"][1, used:] = garbage
        assert torch.equal(attention_decode_paged(**pages), expected)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize(("Tn", "window"), [(64, None), (150, None), (150, 60), (301, 33)])
def test_chunked_prefill(Tn, window, dtype, device):
    """Many tiles of queries, each with its own causal edge."""
    shape = dict(B=2, Tn=Tn, S=310, H=2, Hkv=1, D=32, window=window)
    check(made(shape, dtype, device, [310, Tn - 20]))


@pytest.mark.parametrize("window", [None, 20])
def test_a_prompt_in_chunks_equals_attention_over_all_of_it(window, device):
    T = 71
    inputs = CASES["attention"].make(dict(B=2, T=T, H=4, Hkv=2, D=16, window=window), torch.float32, device)
    k_cache, v_cache = (torch.full((2, 80, 2, 16), torch.nan, device=device) for _ in range(2))
    chunks, start = [], 0
    for n in (1, 3, 17, T - 21):
        k_cache[:, start : start + n] = inputs["k"][:, start : start + n]
        v_cache[:, start : start + n] = inputs["v"][:, start : start + n]
        lengths = torch.full((2,), start + n, dtype=torch.int32, device=device)
        chunk = inputs["q"][:, start : start + n]
        chunks.append(attention_decode(chunk, k_cache, v_cache, lengths, window=window))
        start += n
    judge("attention", {"output 0": torch.cat(chunks, 1)} | gradients_of_attention(inputs), inputs)


def gradients_of_attention(inputs: dict) -> dict[str, Tensor]:
    """The reference's own, so that only outputs are judged."""
    results = run("attention", kernels_torch.attention, CASES["attention"].cast(inputs, torch.float32))
    return {name: value for name, value in results.items() if name != "output 0"}


def test_large_scores_do_not_overflow(device, small_tiles):
    """One key takes all: its value is the result, though the exponential of its score is beyond every number."""
    inputs = made(dict(B=2, Tn=1, S=70, H=2, Hkv=2, D=16), torch.float32, device, [70, 51])
    inputs["q"].fill_(300.0)
    inputs["k_cache"].mul_(0.1)
    inputs["k_cache"][:, 37] = 300.0
    out = attention_decode(**inputs)
    assert torch.equal(out[:, 0], inputs["v_cache"][:, 37])
    assert attention_decode(**inputs, scale=-1.0).isfinite().all()


@pytest.mark.parametrize(("name", "value"), [("k_cache", torch.nan), ("v_cache", torch.nan), ("v_cache", torch.inf)])
def test_what_is_not_finite_among_the_keys_seen_is_not_hidden(name, value, device, small_tiles):
    """From the heads and the row that have it, and it reaches no other."""
    inputs = made(dict(B=2, Tn=1, S=70, H=4, Hkv=2, D=16), torch.float32, device, [70, 51])
    inputs[name][0, 20, 1, 3] = value
    out = attention_decode(**inputs)
    assert not out[0, 0, 2:, 3].isfinite().any()
    assert out[0, 0, :2].isfinite().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("scale", [1.0, 0.3, 0, 2])
def test_scale(scale, device):
    inputs = made(dict(B=1, Tn=2, S=40, H=2, Hkv=1, D=16), torch.float64, device, [33])
    expected = kernels_torch.attention_decode(**inputs, scale=scale)
    torch.testing.assert_close(attention_decode(**inputs, scale=scale), expected, rtol=1e-12, atol=1e-12)


def test_nothing_is_recorded_for_a_backward_pass(device):
    inputs = made(dict(B=1, Tn=1, S=20, H=2, Hkv=1, D=16), torch.float32, device, [20])
    pages = shuffled_pages(inputs, 5)
    for function, given in ((attention_decode, inputs), (attention_decode_paged, pages)):
        leaves = {name: value.requires_grad_() for name, value in given.items() if name[0] in "qkv"}
        assert not function(**given | leaves).requires_grad


def test_no_rows_and_no_heads(device):
    for B, H in ((0, 2), (2, 0)):
        inputs = made(dict(B=B, Tn=1, S=6, H=H, Hkv=1, D=8), torch.float32, device)
        assert attention_decode(**inputs).shape == (B, 1, H, 8)


REFUSED = {
    "k_pages": (lambda given: given["k_pages"][..., :8], "k_pages and v_pages"),
    "v_pages": (lambda given: given["v_pages"].half(), "float16"),
    "q": (lambda given: given["q"].repeat(1, 41, 1, 1), "41 new tokens do not fit a cache of 40"),
    "block_table": (lambda given: given["block_table"][:1], r"integer tensor \[2, n\], got torch.int32 \(1, 5\)"),
    "lengths": (lambda given: given["lengths"].float(), "float32"),
    "window": (lambda given: -1, "-1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_pages_that_make_no_sense_are_refused_by_name(name, device):
    inputs = made(dict(B=2, Tn=1, S=40, H=4, Hkv=2, D=16), torch.float32, device)
    pages = shuffled_pages(inputs, 8)
    change, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        attention_decode_paged(**pages | {name: change(pages)})


def test_more_page_refusals(device):
    inputs = made(dict(B=2, Tn=1, S=40, H=4, Hkv=2, D=16), torch.float32, device)
    pages = shuffled_pages(inputs, 8)
    for change, message in (
        ({"q": pages["q"][:, :, :3]}, "multiple of key heads, got 3 and 2"),
        ({"block_table": pages["block_table"].float()}, "block_table must be an integer tensor"),
        ({"lengths": pages["lengths"][:1]}, r"\(1,\)"),
        ({name: pages[name].int() for name in ("q", "k_pages", "v_pages")}, "int32"),
        ({"block_table": pages["block_table"].to("meta")}, "block_table must be on .* like q, got meta"),
    ):
        with pytest.raises(ValueError, match=message):
            attention_decode_paged(**pages | change)


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("D", [1, 16, 64, 80, 96, 128, 192, 256])
def test_tiles_are_such_as_tensor_cores_take(D, itemsize):
    for M in (1, 2, 15, 16, 17, 48, 64, 65, 128, 4096):
        tile = kernel.tile_for(M, D, itemsize, 2**30)
        for size in (tile.BM, tile.BS):
            assert 16 <= size <= 128
            assert size & (size - 1) == 0
        assert tile.warps in (4, 8)
        assert 2 * tile.BS * max(16, D) * itemsize <= 64 * 1024  # keys and values of one stage


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("D", [1, 16, 64, 80, 96, 128, 192, 256])
def test_lanes_share_a_block_of_keys_evenly(D, itemsize):
    tile = kernel.tile_for(1, D, itemsize, 2**20)
    row_bytes = max(16, kernel.next_power_of_two(D)) * itemsize
    assert tile.BM == 1
    assert tile.BS % kernel.lanes(tile, row_bytes) == 0
    assert tile.BS * row_bytes <= 8192  # as many again of values: what threads hold in registers


def test_splits_fill_the_gpu_and_are_worth_a_program_each():
    tile = kernel.tile_for(1, 128, 2, 2**30)

    def splits(B: int, Hkv: int, S: int, n_tiles: int = 1) -> int:
        return kernel.n_splits(B * Hkv * n_tiles, -(-S // tile.BS), tile, 132, n_tiles)

    assert splits(1, 6, 32) == splits(1, 6, 128) == 1  # too short to be split
    assert splits(1, 6, 1024) == 8  # two blocks each
    assert splits(1, 6, 131072) == 66  # three programs a processor
    assert splits(1, 1, 131072) == kernel.MOST_SPLITS
    assert splits(64, 6, 2048) == 1
    assert splits(64, 16, 131072) == 16  # one long row among short ones must not keep one program busy
    assert splits(64, 16, 131072, n_tiles=16) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("page", [None, 64])
def test_one_cuda_graph_holds_for_all_lengths(page, device):
    inputs = made(dict(B=3, Tn=1, S=3000, H=8, Hkv=2, D=128, window=None), torch.bfloat16, device)
    function = attention_decode if page is None else attention_decode_paged
    given = inputs if page is None else shuffled_pages(inputs, page)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function(**given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = function(**given)
    for lengths in ([3000, 3000, 3000], [1, 0, 2999], [64, 65, 1500], [2048, 7, 129]):
        given["lengths"].copy_(torch.tensor(lengths))
        graph.replay()
        assert torch.equal(captured, function(**given))
        judge(OP, {"output 0": captured.clone()}, inputs | {"lengths": given["lengths"]})


@pytest.mark.gpu
@pytest.mark.parametrize("page", [None, 64])
def test_compiles_to_one_graph(page, device):
    torch._dynamo.reset()
    inputs = made(dict(B=2, Tn=1, S=2000, H=8, Hkv=2, D=128), torch.bfloat16, device, [2000, 700])
    function = attention_decode if page is None else attention_decode_paged
    given = inputs if page is None else shuffled_pages(inputs, page)
    got = torch.compile(function, fullgraph=True)(**given)
    judge(OP, {"output 0": got}, inputs)


@pytest.mark.parametrize("function", [kernels_torch.attention_decode, attention_decode])
def test_is_not_differentiated(function, device):
    inputs = made(dict(B=1, Tn=2, S=9, H=2, Hkv=2, D=8), torch.float32, device)
    assert not function(**inputs | {"q": inputs["q"].clone().requires_grad_()}).requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("Tn", [1, 4, 300])
def test_250_runs_give_the_same_bits(Tn, device):
    inputs = made(dict(B=5, Tn=Tn, S=4000, H=8, Hkv=2, D=128), torch.bfloat16, device, [4000, Tn, 1000, 3999, 2048])
    first = check(inputs)
    assert all(torch.equal(attention_decode(**inputs), first) for _ in range(250))


@pytest.mark.gpu
def test_a_cache_of_more_elements_than_32_bits_can_count(device):
    """The last row, whose keys begin behind 2³¹ values, is what it is alone."""
    B, S = 9, 131072 + 64
    inputs = dict(
        q=torch.randn(B, 1, 16, 128, device=device, dtype=torch.bfloat16),
        k_cache=torch.randn(B, S, 16, 128, device=device, dtype=torch.bfloat16),
        v_cache=torch.randn(B, S, 16, 128, device=device, dtype=torch.bfloat16),
        lengths=torch.full((B,), S, dtype=torch.int32, device=device),
    )
    assert inputs["k_cache"].numel() > 2**31
    last = {name: value[-1:].clone() for name, value in inputs.items()}
    plain, exact = (
        kernels_torch.attention_decode(**CASE.cast(last, dtype)) for dtype in (torch.bfloat16, torch.float64)
    )
    assert_close(attention_decode(**inputs)[-1:], exact, plain)
    pool = {f"{name}_pages": inputs[f"{name}_cache"].view(-1, 64, 16, 128) for name in "kv"}
    table = torch.arange(B * S // 64, device=device, dtype=torch.int32).view(B, -1)
    paged = attention_decode_paged(inputs["q"], **pool, block_table=table, lengths=inputs["lengths"])
    assert torch.equal(paged, attention_decode(**inputs))
