"""AdamW on many tensors at once: what each gets alone, where they are, with numbers of the host or of the device."""

import pytest
import torch

from kernels_torch.adamw import AdamWRates
from tests.conftest import HAS_GPU
from tests.kernels.test_contract import BACKENDS, MODULES

SHAPES = [(3, 5), (9000,), (1,), (0, 4), (33, 7), (1, 24)]
RATES = [AdamWRates(0.1 * (i + 1), i + 1, 0.8 + 0.02 * i, 0.95, 1e-8, 0.1 * i) for i in range(len(SHAPES))]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def tensors(device, dtype=torch.float32, grad_dtype=None):
    make = lambda: [torch.randn(shape, device=device, dtype=torch.float32) for shape in SHAPES]
    p, g, m, v = make(), make(), make(), [x.abs() for x in make()]
    return [x.to(dtype) for x in p], [x.to(grad_dtype or dtype) for x in g], m, v


def formula(p, g, m, v, rates):
    """Line by line, in fp64."""
    p, g, m, v = (x.double() for x in (p, g, m, v))
    m, v = rates.beta1 * m + (1 - rates.beta1) * g, rates.beta2 * v + (1 - rates.beta2) * g**2
    corrected = (v / (1 - rates.beta2**rates.step)).sqrt() + rates.eps
    return p * (1 - rates.lr * rates.weight_decay) - rates.lr / (1 - rates.beta1**rates.step) * m / corrected, m, v


@each_backend
@pytest.mark.parametrize("on_device", [False, True], ids=["from the host", "from the device"])
def test_each_tensor_moves_by_its_own_rates_where_it_is(backend, on_device, device):
    before = tensors(device)
    p, g, m, v = [[x.clone() for x in each] for each in before]
    rates = RATES
    if on_device:
        table = torch.tensor([r[:6] for r in RATES], dtype=torch.float64, device=device)
        rates = [r._replace(on_device=row) for r, row in zip(RATES, table)]
    copy_dtype = torch.bfloat16 if HAS_GPU or backend == "torch" else torch.float16
    copies = [torch.zeros_like(x, dtype=copy_dtype) if x.dim() == 2 else None for x in p]
    got, *_, squares = MODULES[backend].adamw_update(p, g, m, v, rates, copies=copies, in_place=True)
    assert got is p
    torch.testing.assert_close(squares, torch.stack([x.square().sum() for x in g]))
    for i, own in enumerate(RATES):
        exact = formula(*(each[i] for each in before), own)
        for new, x in zip((p[i], m[i], v[i]), exact):
            torch.testing.assert_close(new.double(), x, rtol=1e-6, atol=1e-6)
        assert copies[i] is None or torch.equal(copies[i], p[i].to(copy_dtype))


@each_backend
def test_several_at_once_get_what_each_gets_alone(backend, device):
    p, g, m, v = tensors(device)
    together = MODULES[backend].adamw_update(p, g, m, v, RATES)
    for i, own in enumerate(RATES):
        alone = MODULES[backend].adamw_update(p[i], g[i], m[i], v[i], own)
        for a, b in zip(alone[:3], (x[i] for x in together[:3])):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(alone[3][0], together[3][i])


@each_backend
def test_half_precision_parameters_have_fp32_averages(backend, device):
    before = tensors(device, torch.float16)
    p, g, m, v = [[x.clone() for x in each] for each in before]
    MODULES[backend].adamw_update(p, g, m, v, RATES[1], in_place=True)
    for i in range(len(p)):
        new_p, new_m, new_v = formula(*(each[i] for each in before), RATES[1])
        torch.testing.assert_close(p[i].double(), new_p, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(m[i].double(), new_m, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(v[i].double(), new_v, rtol=1e-5, atol=1e-5)
        assert p[i].dtype == torch.float16


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
def test_what_is_written_in_place_must_be_contiguous(device):
    x = torch.randn(6, 8, device=device)
    with pytest.raises(ValueError, match="params must be contiguous"):
        MODULES["triton"].adamw_update([x.T], [x.T], [x.T], [x.T], RATES[0], in_place=True)


@pytest.mark.gpu
@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
def test_a_captured_graph_follows_the_rates_on_the_device(device):
    """Addresses are written by kernels while a graph is captured."""
    p, g, m, v = tensors(device)
    table = torch.tensor(RATES[0][:6], dtype=torch.float64, device=device)
    rates, adamw_update = RATES[0]._replace(on_device=table), MODULES["triton"].adamw_update
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        adamw_update(p, g, m, v, rates, in_place=True)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=side):
            adamw_update(p, g, m, v, rates, in_place=True)
    torch.cuda.current_stream().wait_stream(side)
    before = [[x.clone() for x in each] for each in (p, g, m, v)]
    own = AdamWRates(0.3, 7, 0.8, 0.95, 1e-8, 0.2)
    table.copy_(torch.tensor(own[:6], dtype=torch.float64))
    graph.replay()
    for i in range(len(p)):
        expected = formula(*(each[i] for each in before), own)
        for got, exact in zip((p[i], m[i], v[i]), expected):
            torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
