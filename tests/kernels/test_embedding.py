"""Embedding, value embedding and smear: frequent and absent tokens, sums over chunks, documents, scalar gradients."""

import sys
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

import kernels_torch
from kernels_torch.cases import CASES
from tests.conftest import HAS_GPU
from tests.kernels.test_contract import BACKENDS, MODULES, judge, run

TRITON = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
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


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_value_embedding_of_frequent_and_of_rare_tokens(backend, name, device):
    """Every gradient; the gate's come out of the same pass over the sorted tokens."""
    tokens = TOKENS[name].to(device)[None]
    T, V = tokens.shape[1], int(tokens.max()) + 2
    case = CASES["value_embedding"]
    inputs = case.make(dict(B=1, T=T, Hkv=3, D=5, V=V), torch.float32, device) | dict(tokens=tokens)
    judge(
        "value_embedding",
        run("value_embedding", MODULES[backend].value_embedding, case.cast(inputs, torch.float32)),
        inputs,
    )


@TRITON
@pytest.mark.parametrize("op", ["embedding", "value_embedding"])
def test_a_vocabulary_too_large_for_16_bits_is_sorted_in_32(op, device, monkeypatch):
    monkeypatch.setattr(sys.modules["kernels_triton.embedding"], "SHORT", 0)
    inputs = CASES[op].make(CASES[op].check[-2], torch.float32, device)
    judge(op, run(op, getattr(MODULES["triton"], op), CASES[op].cast(inputs, torch.float32)), inputs)


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
def test_the_gradient_of_v_is_the_one_that_came_in(device):
    """Not a copy of it."""
    inputs = CASES["value_embedding"].make(dict(B=2, T=7, Hkv=3, D=8, V=11), torch.float32, device)
    y = MODULES["triton"].value_embedding(**inputs | {"v": inputs["v"].requires_grad_()})
    d = torch.randn_like(y)
    assert torch.autograd.grad(y, inputs["v"], d)[0].data_ptr() == d.data_ptr()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shape",
    [
        dict(B=1, T=5, Hkv=2, D=1100, V=3, G=2),
        dict(B=1, T=9, Hkv=19, D=3, V=4, G=40),
        dict(B=1, T=70, Hkv=5, D=96, V=4, G=1, gate_range=0.0),
    ],
    ids=["wide heads", "many heads, many channels", "a gate that is shut"],
)
def test_value_embedding_of_unusual_heads(backend, shape, device):
    """Several blocks of columns, of heads and of the gate's channels."""
    inputs = CASES["value_embedding"].make(shape, torch.float32, device)
    cast = CASES["value_embedding"].cast(inputs, torch.float32)
    judge("value_embedding", run("value_embedding", MODULES[backend].value_embedding, cast), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["value_embedding", "smear"])
def test_weights_cast_once_give_the_same_numbers(backend, op, device):
    """What inference casts when it starts, training rounds as it goes: values and gradients agree to the bit."""
    inputs = CASES[op].make(CASES[op].check[0], torch.float16, device)
    masters = {
        name: torch.randn_like(inputs[name], dtype=torch.float32) for name in ("table", "gate_weight") if name in inputs
    }
    others = [name for name in CASES[op].differentiable if inputs[name] is not None and name not in masters]

    def results(weights: dict) -> tuple[torch.Tensor, ...]:
        leaves = {name: inputs[name].detach().requires_grad_() for name in others}
        y = getattr(MODULES[backend], op)(**inputs | weights | leaves)
        return y, *torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))

    cast = {name: weight.half() for name, weight in masters.items()}
    for from_masters, from_cast in zip(results(masters), results(cast), strict=True):
        assert torch.equal(from_masters, from_cast)


def documents_of(doc_ids: torch.Tensor) -> list[slice]:
    """Where each document of a row begins and ends."""
    edges = [0, *[t for t in range(1, len(doc_ids)) if doc_ids[t] != doc_ids[t - 1]], len(doc_ids)]
    return [slice(begin, end) for begin, end in pairwise(edges)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_end_at_every_place(backend, device):
    """All ways to cut a row of five: values and dx of each document are what it gives alone."""
    smear = MODULES[backend].smear
    doc_ids = torch.tensor([[bits >> t & 1 for t in range(4)] for bits in range(16)], device=device)
    doc_ids = F.pad(doc_ids, (1, 0)).cumsum(1).int()
    case = CASES["smear"].make(dict(B=16, T=5, D=9, G=4), torch.float32, device)
    x, weight, scale = case["x"].requires_grad_(), case["gate_weight"], case["scale"]
    d = torch.randn(16, 5, 9, device=device)
    y = smear(x, weight, scale, doc_ids=doc_ids)
    (dx,) = torch.autograd.grad(y, x, d)
    for row in range(16):
        for part in documents_of(doc_ids[row]):
            alone = x[row : row + 1, part].detach().requires_grad_()
            out = smear(alone, weight, scale)
            (alone_dx,) = torch.autograd.grad(out, alone, d[row : row + 1, part])
            torch.testing.assert_close(y[row : row + 1, part], out, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(dx[row : row + 1, part], alone_dx, rtol=1e-6, atol=1e-6)


@TRITON
def test_nan_stays_in_its_document(device):
    """In values and in gradients; the reference multiplies what another document holds by zero."""
    doc_ids = torch.tensor([[0, 0, 1, 1, 1, 2]], device=device)
    inputs = CASES["smear"].make(dict(B=1, T=6, D=9, G=4), torch.float32, device) | dict(doc_ids=doc_ids)
    x, d = inputs["x"], torch.randn(1, 6, 9, device=device)
    x[:, 2:5], d[:, 2:5] = torch.nan, torch.nan
    y = MODULES["triton"].smear(**inputs | {"x": x.requires_grad_()})
    (dx,) = torch.autograd.grad(y, x, d)
    for value in (y, dx):
        assert value[:, 2:5].isnan().all()
        assert not value[:, :2].isnan().any()
        assert not value[:, 5:].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_smear_goes_on_from_what_came_before(backend, device):
    """A row in two parts, the second told what came before, is the whole row."""
    inputs = CASES["smear"].make(dict(B=3, T=11, D=33), torch.float32, device)
    whole = MODULES[backend].smear(**inputs)
    for t in (1, 4, 10):
        x = inputs["x"]
        first = MODULES[backend].smear(**inputs | {"x": x[:, :t]})
        second = MODULES[backend].smear(**inputs | {"x": x[:, t:], "previous": x[:, t - 1 : t]})
        torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-6, atol=1e-6)


@TRITON
@pytest.mark.parametrize(("D", "G"), [(150, 24), (150, 100), (128, 128)])
def test_smear_of_rows_wider_than_a_block(D, G, device, monkeypatch):
    """Blocks of 64 columns, or as many as the gate has channels."""
    monkeypatch.setattr(sys.modules["kernels_triton.embedding"], "WIDEST_BLOCK", 64)
    inputs = CASES["smear"].make(dict(B=2, T=7, D=D, G=G, previous=True), torch.float32, device)
    judge("smear", run("smear", MODULES["triton"].smear, CASES["smear"].cast(inputs, torch.float32)), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shape",
    [
        dict(B=2, T=3, D=9000, previous=True),
        dict(B=1, T=9, D=60, G=60),
        dict(B=4, T=300, D=2, G=1),
        dict(B=1, T=40, D=1280, G=33, documents=4),
    ],
    ids=lambda shape: " ".join(f"{key}={value}" for key, value in shape.items()),
)
def test_smear_of_any_width_and_any_gate(backend, shape, device):
    """Rows wider than one block, whose first block comes last; more tiles than programs."""
    inputs = CASES["smear"].make(shape, torch.float32, device)
    judge("smear", run("smear", MODULES[backend].smear, CASES["smear"].cast(inputs, torch.float32)), inputs)


def test_scalar_gradients_are_exact_sums(device):
    """In fp64 to the last digits, though the terms cancel: nothing is lost between programs."""
    for op, names in {"smear": ("gate_weight", "scale"), "value_embedding": ("gate_weight",)}.items():
        shape = dict(B=5, T=131, D=8, G=3) if op == "smear" else dict(B=5, T=131, Hkv=2, D=4, V=7, G=3)
        inputs = CASES[op].make(shape, torch.float64, device)
        results = {b: run(op, getattr(MODULES[b], op), CASES[op].cast(inputs, torch.float64)) for b in BACKENDS}
        for name in names:
            for backend in BACKENDS:
                exact = results["torch"][f"gradient of {name}"]
                torch.testing.assert_close(results[backend][f"gradient of {name}"], exact, rtol=1e-12, atol=1e-12)


@TRITON
@pytest.mark.parametrize("op", ["embedding", "value_embedding", "smear"])
def test_two_runs_over_many_programs_give_the_same_bits(op, device):
    shape = {
        "embedding": dict(N=1000, D=40, V=30, zipf=True),
        "value_embedding": dict(B=2, T=500, Hkv=2, D=16, V=30, zipf=True),
        "smear": dict(B=2, T=500, D=40),
    }[op]
    inputs = CASES[op].make(shape, torch.float32, device)
    first, second = (run(op, getattr(MODULES["triton"], op), CASES[op].cast(inputs, torch.float32)) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    judge(op, first, inputs)


@TRITON
@pytest.mark.gpu
@pytest.mark.parametrize("op", ["embedding", "value_embedding", "smear"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sizes_of_real_models_twice_with_the_same_bits(op, dtype, device):
    """A gate of fp32 must not become a product in tf32 on the way."""
    shape = {
        "embedding": dict(N=16384, D=1280, V=8192, zipf=True),
        "value_embedding": dict(B=8, T=2048, Hkv=10, D=128, V=8192, zipf=True),
        "smear": dict(B=8, T=2048, D=1280),
    }[op]
    inputs = CASES[op].make(shape, dtype, device)
    first, second = (run(op, getattr(MODULES["triton"], op), CASES[op].cast(inputs, dtype)) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    judge(op, first, inputs)


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
@pytest.mark.parametrize("op", ["embedding", "value_embedding", "smear"])
def test_second_derivatives_are_refused(op, device):
    inputs = CASES[op].make(CASES[op].check[0], torch.float32, device)
    leaf = inputs[CASES[op].differentiable[-1 if op == "embedding" else 1]].requires_grad_()
    (grad,) = torch.autograd.grad(getattr(MODULES["triton"], op)(**inputs).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@TRITON
@pytest.mark.parametrize("H", [1, 2, 3, 6, 10, 17])
@pytest.mark.parametrize("D", [1, 5, 64, 96, 128, 768, 1280, 1536, 2176, 4096, 33000])
def test_blocks_cover_heads_and_columns_and_fit_the_hardware(H, D):
    module = sys.modules["kernels_triton.embedding"]
    for tile in (module.VALUES, module.ENTRIES, module.GATED_ENTRIES):
        BH, BD, warps = module.heads_and_columns(H, D, tile)
        assert tile.BD >= BH * BD
        assert BH & (BH - 1) == BD & (BD - 1) == warps & (warps - 1) == 0
        assert warps == 1 or 32 * 32 * warps >= tile.BT * BH * BD  # values a thread, threads a warp
    for itemsize in (2, 4, 8):
        tile = module.smear_bwd_tile(D, min(24, D), itemsize)
        assert min(24, D) <= tile.BD
        assert tile.warps <= 16
        assert tile.stages >= 1
        assert 4 * (tile.stages - 1) * tile.BT * tile.BD * itemsize <= 2**16


def test_the_reference_is_what_its_docstring_says(device):
    """One token and one head at a time, in fp64."""
    case = CASES["value_embedding"].make(dict(B=2, T=4, Hkv=3, D=5, V=6, G=2), torch.float64, device)
    y = kernels_torch.value_embedding(**case)
    for b, t, h in [(0, 0, 0), (1, 3, 2), (0, 2, 1)]:
        gate = 3 / (1 + torch.exp(-(case["gate_input"][b, t] * case["gate_weight"][h]).sum()))
        row = case["table"][case["tokens"][b, t], 5 * h : 5 * h + 5]
        torch.testing.assert_close(y[b, t, h], case["v"][b, t, h] + gate * row)
