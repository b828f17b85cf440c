"""Gradients that go to fp32 masters and are added where they are made: as exact as autograd's, in the same memory."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kernels_torch
from kernels_torch.cases import CASES
from kernels_torch.masters import adding_in_place
from model.layers.linear import Linear, products
from model.ops import again_in_backward
from tests.conftest import HAS_GPU
from tests.kernels.test_contract import BACKENDS, MODULES, dtypes
from tests.model.tiny import FORMS, awake, tokens, triton_ops
from tests.numerics import assert_close

# Op → its parameters, and whether it is told of masters beside them; a table is its own.
PARAMETERS = {
    "relu2_mlp": (["w_up", "w_down"], "masters"),
    "swiglu_mlp": (["w_gate", "w_up", "w_down"], "masters"),
    "linear_cross_entropy": (["weight"], "master"),
    "embedding": (["table"], None),
    "value_embedding": (["table"], None),
}
OPS = [pytest.param(backend, op, id=f"{backend}-{op}") for backend in BACKENDS for op in PARAMETERS]
DTYPES = [
    pytest.param(*param.values, dtype, id=f"{param.id}-{str(dtype).removeprefix('torch.')}")
    for param in OPS
    for dtype in dtypes(param.values[0])
    if dtype != torch.float64
]
MICRO_BATCHES = 5


class Accumulation:
    """The gradients of several micro-batches, whose weights are parameters in fp32."""

    def __init__(self, op: str, function, dtype: torch.dtype, device: torch.device, exact: bool = False) -> None:
        case, (self.names, self.option) = CASES[op], PARAMETERS[op]
        self.function = function
        self.batches = [case.make(case.check[0], dtype, device, seed=seed) for seed in range(MICRO_BATCHES)]
        if exact:
            self.batches = [case.cast(batch, torch.float64) for batch in self.batches]
        wide = torch.promote_types(torch.float32, torch.float64 if exact else torch.float32)
        self.masters = [self.batches[0][name].to(wide, copy=True).requires_grad_() for name in self.names]

    def loss(self, batch: dict, *, give_masters: bool) -> Tensor:
        weights = dict(zip(self.names, self.masters))
        if self.option is not None:
            dtype = batch[self.names[0]].dtype
            if give_masters:
                weights = {name: master.detach().to(dtype) for name, master in weights.items()}
                weights[self.option] = self.masters[0] if self.option == "master" else self.masters
            else:
                weights = {name: master.to(dtype) for name, master in weights.items()}
        out = self.function(**{**batch, **weights})
        return (out * torch.arange(out.numel(), device=out.device).cos().view(out.shape).to(out.dtype)).sum()

    def by_autograd(self) -> list[Tensor]:
        for batch in self.batches:
            self.loss(batch, give_masters=False).backward()
        return [master.grad for master in self.masters]

    def in_place(self) -> list[Tensor]:
        self.loss(self.batches[0], give_masters=True).backward()
        for batch in self.batches[1:]:
            with adding_in_place():
                self.loss(batch, give_masters=True).backward()
        return [master.grad for master in self.masters]


@pytest.mark.parametrize(("backend", "op", "dtype"), DTYPES)
def test_sums_over_micro_batches_are_as_exact_as_autograds(backend, op, dtype, device):
    reference = getattr(kernels_torch, op)
    got = Accumulation(op, getattr(MODULES[backend], op), dtype, device).in_place()
    plain = Accumulation(op, reference, dtype, device).by_autograd()
    exact = Accumulation(op, reference, dtype, device, exact=True).by_autograd()
    for name, ours, theirs, true in zip(PARAMETERS[op][0], got, plain, exact, strict=True):
        assert ours.dtype == torch.float32
        assert_close(ours, true, theirs, f"{op} {name}")


class Passes(TorchDispatchMode):
    """What is added element by element: the shapes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.added: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.add_.Tensor, torch.ops.aten.add.Tensor):
            self.added.append(tuple(args[0].shape))
        return func(*args, **kwargs or {})


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
@pytest.mark.parametrize("op", PARAMETERS)
def test_nothing_is_added_in_a_pass_of_its_own(op, device):
    steps = Accumulation(op, getattr(MODULES["triton"], op), torch.float32, device)
    steps.loss(steps.batches[0], give_masters=True).backward()
    before = [master.grad for master in steps.masters]
    places = [grad.data_ptr() for grad in before]
    loss = steps.loss(steps.batches[1], give_masters=True)
    with adding_in_place(), Passes() as passes:
        loss.backward()
    assert not {tuple(master.shape) for master in steps.masters} & set(passes.added)
    for master, grad, place in zip(steps.masters, before, places, strict=True):
        assert master.grad is grad
        assert master.grad.data_ptr() == place


def linear() -> tuple[Linear, Tensor]:
    generator = torch.Generator().manual_seed(0)
    layer = Linear(6, 4)
    layer.weight.data = torch.randn(4, 6, generator=generator)
    return layer, torch.randn(5, 6, generator=generator)


def test_hooks_see_the_whole_gradient_once():
    layer, x = linear()
    seen = []
    layer.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    layer(x).sum().backward()
    with adding_in_place():
        layer(x).square().sum().backward()
    assert len(seen) == 2
    assert torch.equal(seen[1], layer.weight.grad)
    torch.testing.assert_close(seen[1], torch.ones(5, 4).t() @ x + (2 * layer(x)).detach().t() @ x)


def test_a_share_alone_is_still_to_be_had():
    """Outside of adding_in_place nothing is touched: torch.autograd.grad gives what one pass adds."""
    layer, x = linear()
    layer(x).sum().backward()
    whole = layer.weight.grad
    (share,) = torch.autograd.grad(layer(x).sum(), layer.weight)
    assert torch.equal(share, whole)
    assert layer.weight.grad is whole


def test_a_weight_with_two_uses_keeps_its_place():
    """As a table that is the head as well: autograd adds the second share, where it likes."""
    layer, x = linear()

    def loss():
        return layer(x).sum() + (layer.weight * 3).sum() + products(2 * x, layer, layer)[2].sum()

    loss().backward()
    grad, once = layer.weight.grad, layer.weight.grad.clone()
    for n in (2, 3):
        with adding_in_place():
            loss().backward()
        assert layer.weight.grad is grad
        torch.testing.assert_close(grad, n * once)


def test_a_pass_that_fails_leaves_gradients_in_place():
    layer, x = linear()
    layer(x).sum().backward()
    grad = layer.weight.grad
    x.requires_grad_().register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError), adding_in_place():
        layer(x).sum().backward()
    assert layer.weight.grad is grad
    with adding_in_place():  # and the next one may begin
        layer(x.detach()).sum().backward()


def test_what_is_recomputed_adds_in_place_too():
    layer, x = linear()
    forward = again_in_backward(layer.forward)
    forward(x.requires_grad_()).sum().backward()
    grad, once = layer.weight.grad, layer.weight.grad.clone()
    with adding_in_place(), Passes() as passes:
        forward(x.detach().requires_grad_()).sum().backward()
    assert layer.weight.grad is grad
    torch.testing.assert_close(grad, 2 * once)
    assert (4, 6) not in passes.added


def test_what_is_compiled_adds_by_autograd():
    layer, x = linear()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    once = layer.weight.grad.clone()
    with adding_in_place():
        compiled(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, 2 * once)


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("form", ["2026", "llama tied with shared heads", "nanofalcon"])
def test_a_whole_model_gathers_what_autograd_adds_up(form, kernels, device):
    dtype = torch.bfloat16 if HAS_GPU or kernels == "torch" else torch.float32
    ops = triton_ops(device) if kernels == "triton" else None
    ours, theirs = (awake(FORMS[form], dtype, device=device, ops=ops) for _ in range(2))
    interpreted = kernels == "triton" and not HAS_GPU
    for seed in range(2 if interpreted else 3):
        row = tokens(2, 18 if interpreted else 33, seed=seed, device=device)
        theirs(row[:, :-1], row[:, 1:]).backward()
        loss = ours(row[:, :-1], row[:, 1:])
        if seed == 0:
            loss.backward()
            continue
        with adding_in_place():
            loss.backward()
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_real_sizes_on_a_gpu(dtype, device):
    """By cuBLAS in fp32: closer to fp64 than what is rounded to half precision for each micro-batch."""
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, device=device).to(dtype)
    layer = Linear(768, 1024).to(device)
    layer.weight.data.normal_(generator=generator)
    parts = [(draw(4096, 768), draw(4096, 1024)) for _ in range(4)]
    for i, (x, d) in enumerate(parts):
        y = layer(x)
        if i == 0:
            y.backward(d)
        else:
            with adding_in_place():
                y.backward(d)
    exact = sum(d.double().t() @ x.double() for x, d in parts)
    rounded = sum((d.t() @ x).float() for x, d in parts)
    assert_close(layer.weight.grad, exact, rounded, slack=1.0)
    assert (layer.weight.grad - exact).norm() < 0.1 * (rounded - exact).norm()
