"""Attention: against a softmax written out, who sees whom, documents, and decoding against the whole."""

from itertools import pairwise

import pytest
import torch

from kernels_torch.cases import CASES
from tests.kernels.test_contract import BACKENDS, MODULES

WITH_ATTENTION = [backend for backend in BACKENDS if "attention" in MODULES[backend].__all__]
WITH_DECODE = [backend for backend in BACKENDS if "attention_decode" in MODULES[backend].__all__]


def written_out(q, k, v, *, window=None, doc_ids=None, scale=None):
    """One query at a time, as the docstring states it."""
    B, Tq, H, D = q.shape
    Tk, group = k.shape[1], H // k.shape[2]
    out = torch.zeros_like(q)
    for b in range(B):
        for t in range(Tq):
            p = Tk - Tq + t
            seen = [s for s in range(p + 1) if window is None or p - s <= window]
            seen = [s for s in seen if doc_ids is None or doc_ids[b, s] == doc_ids[b, p]]
            for h in range(H):
                scores = k[b, seen, h // group] @ q[b, t, h] * (D**-0.5 if scale is None else scale)
                out[b, t, h] = torch.softmax(scores, 0) @ v[b, seen, h // group]
    return out


@pytest.mark.parametrize("backend", WITH_ATTENTION)
@pytest.mark.parametrize("shape", CASES["attention"].check, ids=str)
def test_equals_the_softmax_written_out(backend, shape, device):
    inputs = CASES["attention"].make(shape, torch.float64, device)
    for scale in (None, 0.3):
        got = MODULES[backend].attention(**inputs, scale=scale)
        torch.testing.assert_close(got, written_out(**inputs, scale=scale), rtol=1e-12, atol=1e-12)


def affected_queries(attention, inputs: dict, key: int) -> list[int]:
    """The queries whose output changes when the key and value at one position do."""
    before = attention(**inputs)
    changed = dict(inputs, k=inputs["k"].clone(), v=inputs["v"].clone())
    changed["k"][:, key] += 1
    changed["v"][:, key] += 1
    return (attention(**changed) != before).any(-1).any(-1)[0].nonzero().flatten().tolist()


@pytest.mark.parametrize("backend", WITH_ATTENTION)
@pytest.mark.parametrize("window", [0, 1, 5, 21, 22, 23, 40, None])
def test_a_window_of_w_sees_exactly_w_earlier_keys(backend, window, device):
    """Key s reaches queries s … s + window and no other: the classic off-by-one."""
    T = 23
    shape = {"B": 1, "T": T, "H": 2, "Hkv": 1, "D": 8, "window": window}
    inputs = CASES["attention"].make(shape, torch.float32, device)
    for key in (0, 7, T - 1):
        last = T - 1 if window is None else min(T - 1, key + window)
        assert affected_queries(MODULES[backend].attention, inputs, key) == list(range(key, last + 1))


@pytest.mark.parametrize("backend", WITH_ATTENTION)
@pytest.mark.parametrize("window", [None, 3])
def test_packed_documents_equal_each_document_alone(backend, window, device):
    """Also when one id comes back: tokens attend by id, wherever the others lie."""
    inputs = CASES["attention"].make({"B": 2, "T": 19, "H": 4, "Hkv": 2, "D": 8}, torch.float64, device)
    q, k, v = (inputs[name] for name in "qkv")
    cuts = [[0, 4, 5, 19], [0, 11, 18, 19]]
    doc_ids = torch.zeros(2, 19, dtype=torch.int64, device=device)
    for row, cut in enumerate(cuts):
        for i, (begin, end) in enumerate(pairwise(cut)):
            doc_ids[row, begin:end] = 7 - i
    packed = MODULES[backend].attention(q, k, v, window=window, doc_ids=doc_ids)
    for row, cut in enumerate(cuts):
        for begin, end in pairwise(cut):
            part = [x[row : row + 1, begin:end] for x in (q, k, v)]
            alone = MODULES[backend].attention(*part, window=window)
            torch.testing.assert_close(packed[row : row + 1, begin:end], alone, rtol=1e-12, atol=1e-12)
    interleaved = torch.tensor([[0, 1] * 9 + [0]] * 2, device=device)
    expected = written_out(q, k, v, window=window, doc_ids=interleaved)
    got = MODULES[backend].attention(q, k, v, window=window, doc_ids=interleaved)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", WITH_ATTENTION)
@pytest.mark.parametrize("window", [None, 0, 4])
def test_the_last_queries_alone_equal_the_whole(backend, window, device):
    """Fewer queries than keys are the last ones: bottom-right alignment."""
    inputs = CASES["attention"].make({"B": 2, "T": 11, "H": 2, "Hkv": 2, "D": 8}, torch.float64, device)
    q, k, v = (inputs[name] for name in "qkv")
    whole = MODULES[backend].attention(q, k, v, window=window)
    for n in (1, 2, 10):
        last = MODULES[backend].attention(q[:, -n:], k, v, window=window)
        torch.testing.assert_close(last, whole[:, -n:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", WITH_DECODE)
@pytest.mark.parametrize("window", [None, 0, 4])
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
def test_plain_causal_attention_never_makes_the_whole_matrix(device):
    """Twice the length costs about twice the memory, forward and backward (heads in groups, too)."""

    def peak_bytes(T: int) -> int:
        inputs = CASES["attention"].make({"B": 1, "T": T, "H": 8, "Hkv": 4, "D": 64}, torch.bfloat16, device)
        for name in "qkv":
            inputs[name].requires_grad_()
        torch.cuda.reset_peak_memory_stats()
        MODULES["torch"].attention(**inputs).float().sum().backward()
        return torch.cuda.max_memory_allocated()

    peak_bytes(256)
    assert peak_bytes(16384) <= 2.2 * peak_bytes(8192)
