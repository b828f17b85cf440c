"""The embedding: frequent and absent tokens, dtypes, sums over chunks."""

import sys

import pytest
import torch
import torch.nn.functional as F

from kernels_torch.cases import CASES
from tests.conftest import HAS_GPU
from tests.kernels.test_contract import BACKENDS, MODULES
from tests.numerics import judge, run

TRITON = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
CASE = CASES["embedding"]
CHUNK = 32  # of kernels_triton/embedding.py: sorted tokens that are summed ahead when they are all alike


def counted(*counts: int, seed: int = 0) -> torch.Tensor:
    """Token i as often as counts[i] says, in random order."""
    tokens = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))]


TOKENS = {
    "one token everywhere": torch.full((333,), 3),
    "one token, whole chunks": torch.full((4 * CHUNK,), 3),
    "all different": torch.randperm(97, generator=torch.Generator().manual_seed(0)),
    "every length about a chunk's": counted(0, 1, 31, 32, 33, 0, 63, 64, 65, 2, 96, 97, 30, 1, 0),
    "ends inside a chunk": counted(40, 40, 40, 5),
}


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_sums_all_of_its_tokens_wherever_they_lie(backend, name, device):
    """Its neighbours' not at all; rows that no token names are zero, which the poisoned memory would show."""
    tokens = TOKENS[name].to(device)
    V = int(tokens.max()) + 3
    table = torch.randn(V, 7, device=device)
    inputs = dict(tokens=tokens, table=table, dtype=torch.float32)
    judge("embedding", run("embedding", MODULES[backend].embedding, {**inputs, "table": table.clone()}), inputs)
    absent = torch.bincount(tokens.cpu(), minlength=V) == 0
    (dtable,) = torch.autograd.grad(
        MODULES[backend].embedding(tokens, table.requires_grad_(), torch.float32).sum(), table
    )
    assert torch.equal(dtable.cpu(), torch.bincount(tokens.cpu(), minlength=V).float()[:, None].expand(-1, 7))
    assert absent.any()


@TRITON
def test_a_vocabulary_too_large_for_16_bits_is_sorted_in_32(device, monkeypatch):
    monkeypatch.setattr(sys.modules["kernels_triton.embedding"], "SHORT", 0)
    inputs = CASE.make(CASE.check[-2], torch.float32, device)
    judge(
        "embedding",
        run("embedding", MODULES["triton"].embedding, CASE.cast(inputs, torch.float32)),
        inputs,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("V", [40_000, 65_536, 65_537, 131_072])
def test_tokens_beyond_the_half_of_16_bits(backend, V, device):
    tokens = torch.tensor([0, V - 1, 32_767, 32_768, V - 1, V - 2, 0, 5], device=device)
    table = torch.randn(V, 3, device=device, requires_grad=True)
    (dtable,) = torch.autograd.grad(MODULES[backend].embedding(tokens, table, torch.float32).sum(), table)
    assert torch.equal(dtable[:, 0], torch.bincount(tokens, minlength=V).float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_of_any_shape_and_stride(backend, device):
    table = torch.randn(11, 6, device=device)
    tokens = torch.randint(0, 11, (2, 3, 10), device=device)
    embedding = MODULES[backend].embedding
    for ids in (
        tokens,
        tokens.int(),
        tokens[..., ::2],
        tokens.mT,
        tokens[0, 0, 0],
        tokens[:, :0],
        tokens[..., :1].expand(2, 3, 4),
    ):
        assert torch.equal(embedding(ids, table, torch.float32), table[ids.long()])
    wide = torch.randn(11, 14, device=device)[:, 3:9]
    assert torch.equal(embedding(tokens, wide, torch.float32), wide[tokens])
    assert torch.equal(embedding(tokens, table.T.contiguous().T, torch.float32), table[tokens])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, *([torch.bfloat16] if HAS_GPU else [])])
@pytest.mark.parametrize("table_dtype", [torch.float16, torch.float32, torch.float64])
def test_table_and_values_each_have_their_dtype(backend, dtype, table_dtype, device):
    """The gradient has that of the table."""
    table = torch.randn(9, 5, device=device, dtype=table_dtype, requires_grad=True)
    tokens = torch.randint(0, 9, (70,), device=device)
    y = MODULES[backend].embedding(tokens, table, dtype)
    assert torch.equal(y, F.embedding(tokens, table).to(dtype))
    d = torch.randn(70, 5, device=device).to(dtype)
    (dtable,) = torch.autograd.grad(y, table, d)
    exact = torch.zeros(9, 5, device=device, dtype=torch.float64).index_add_(0, tokens, d.to(table_dtype).double())
    assert dtable.dtype == table_dtype
    rounding = torch.finfo(table_dtype).eps if table_dtype != torch.float64 else torch.finfo(torch.float64).eps
    torch.testing.assert_close(dtable.double(), exact, rtol=2 * rounding, atol=40 * rounding)


@TRITON
def test_a_half_precision_table_is_summed_in_fp32(device):
    """In fp16, 2048 + 1 is 2048."""
    table = torch.zeros(2, 3, device=device, dtype=torch.float16, requires_grad=True)
    tokens = torch.zeros(4000, dtype=torch.long, device=device)
    MODULES["triton"].embedding(tokens, table, torch.float16).backward(
        torch.ones(4000, 3, device=device, dtype=torch.float16)
    )
    assert table.grad.tolist() == [[4000.0] * 3, [0.0] * 3]


@pytest.mark.skipif(HAS_GPU, reason="a GPU would have to be waited for")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("token", [-1, 11])
def test_a_token_outside_the_table_is_an_index_error(backend, token):
    inputs = CASES["value_embedding"].make(dict(B=2, T=7, Hkv=3, D=8, V=11), torch.float32, "cpu")
    inputs["tokens"][1, 2] = token
    with pytest.raises(IndexError):
        MODULES[backend].value_embedding(**inputs)
    with pytest.raises(IndexError):
        MODULES[backend].embedding(inputs["tokens"], inputs["table"], torch.float32)


@TRITON
@pytest.mark.gpu
@pytest.mark.parametrize("token", [-1, 11, 2**33])
def test_on_a_gpu_a_token_outside_the_table_gives_nan(token, device):
    """Only where it stands: its neighbours are what they were."""
    inputs = CASES["value_embedding"].make(dict(B=2, T=7, Hkv=3, D=8, V=11), torch.float32, device)
    inputs["tokens"][1, 2] = token
    y = MODULES["triton"].value_embedding(**inputs)
    values = MODULES["triton"].embedding(inputs["tokens"], inputs["table"], torch.float32)
    outside = torch.zeros(2, 7, dtype=torch.bool, device=device)
    outside[1, 2] = True
    for nan in (y.flatten(2).isnan(), values.isnan()):
        assert torch.equal(nan.all(-1), outside)
        assert torch.equal(nan.any(-1), outside)


@TRITON
def test_two_runs_over_many_programs_give_the_same_bits(device):
    shape = dict(N=1000, D=40, V=30, zipf=True)
    inputs = CASE.make(shape, torch.float32, device)
    first, second = (run("embedding", MODULES["triton"].embedding, CASE.cast(inputs, torch.float32)) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    judge("embedding", first, inputs)


@TRITON
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sizes_of_real_models_twice_with_the_same_bits(dtype, device):
    """A gate of fp32 must not become a product in tf32 on the way."""
    shape = dict(N=16384, D=1280, V=8192, zipf=True)
    inputs = CASE.make(shape, dtype, device)
    first, second = (run("embedding", MODULES["triton"].embedding, CASE.cast(inputs, dtype)) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    judge("embedding", first, inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_embedding_of_more_elements_than_32_bits_can_count(backend, device):
    """2.4 billion values and as many gradients: every row of the table is named as often as counted."""
    N, D, V = 600_000, 4096, 1000
    tokens = torch.randint(0, V, (N,), device=device)
    table = torch.randn(V, D, device=device, requires_grad=True)
    y = MODULES[backend].embedding(tokens, table, torch.bfloat16)
    assert torch.equal(y[-8:], table[tokens[-8:]].bfloat16())
    (dtable,) = torch.autograd.grad(y, table, torch.ones_like(y))
    assert torch.equal(dtable, torch.bincount(tokens, minlength=V).float()[:, None].expand(-1, D))


@TRITON
@pytest.mark.parametrize("H", [1, 2, 3, 6, 10, 17])
@pytest.mark.parametrize("D", [1, 5, 64, 96, 128, 768, 1280, 1536, 2176, 4096, 33000])
def test_blocks_cover_heads_and_columns_and_fit_the_hardware(H, D):
    module = sys.modules["kernels_triton.embedding"]
    for tile in (module.ENTRIES, module.GATED_ENTRIES, sys.modules["kernels_triton.value_embedding"].VALUES):
        BH, BD, warps = module.heads_and_columns(H, D, tile)
        assert tile.BD >= BH * BD
        assert BH & (BH - 1) == BD & (BD - 1) == warps & (warps - 1) == 0
        assert warps == 1 or 32 * 32 * warps >= tile.BT * BH * BD  # values a thread, threads a warp
