"""A step, eager and captured: the same numbers whatever happens between steps, on a CPU through a recorded graph."""

import copy
import re
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch

from data.batches import Batch
from model.cuda_graphs import CudaGraphs
from optim.groups import AdamWConfig, MuonAdamWConfig, parameter_groups
from optim.muon_adamw import MuonAdamW
from optim.schedules import make_schedule
from tests.model.tiny import FORMS, fresh, tokens, torch_ops, triton_ops
from tests.training.recorded_graph import RecordedGraphs, Recorder
from training.step import EAGER_STEPS, CapturedStep, Step, read_later

ROOT = Path(__file__).parents[2]
STEPS = EAGER_STEPS + 4
OPTIMS = {"muon_adamw": MuonAdamWConfig(), "adamw": AdamWConfig(lr=1e-2, warmup_steps=2)}


def new_step(
    form="2026", *, dtype=torch.float32, optim="muon_adamw", accumulation=1, grad_clip=0.0, capture=None, device="cpu",
    on_device=True, ops=None, reduce_dtype=torch.float32, **options,
):  # fmt: skip
    """A model with its optimizer as training makes them; captured where there is something to capture with."""
    model = fresh(FORMS[form], dtype, device=device, ops=ops)
    groups = parameter_groups(model, OPTIMS[optim], n_embd=model.config.n_embd)
    optimizer = MuonAdamW(
        groups, model.ops, compute_dtype=dtype, copies=model.keep_copies(), rates_on_device=on_device,
        reduce_dtype=reduce_dtype,
    )  # fmt: skip
    kind = Step if capture is None else partial(CapturedStep, capture=capture, **options)
    return kind(model, optimizer, accumulation=accumulation, device=torch.device(device), grad_clip=grad_clip)


def batch_of(number, device="cpu"):
    row = tokens(3, 34, seed=number, device=device)
    targets = row[:, 1:].clone()
    targets[0, number % 30 :] = -1  # as many as differ from batch to batch
    return Batch(row[:, :-1].clone(), targets, None, None, {})


def take(step, numbers, between=None, device="cpu"):
    """Steps of the schedule on batches of their own. → (loss, norm) of each"""
    schedule, seen = make_schedule(OPTIMS["muon_adamw"], 20), []
    for number in numbers:
        for i in range(step.accumulation):
            step.add(batch_of(step.accumulation * number + i, device), first=i == 0)
        result = step.update(schedule(number))
        seen.append(torch.stack([step.loss, result.grad_norm]).tolist())
        if between:
            between(step, number)
    return seen


def state_of(step):
    """Everything that a checkpoint would hold, and the copies."""
    model, optimizer = step.model, step.optimizer
    return dict(model.named_parameters()) | dict(model.named_buffers()) | optimizer.state_tensors()


def assert_same(one, other):
    ours, theirs = state_of(one), state_of(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("grad_clip", [0.0, 0.1], ids=["", "clipped"])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("optim", OPTIMS)
def test_captured_equals_eager(optim, accumulation, grad_clip):
    given = dict(optim=optim, accumulation=accumulation, grad_clip=grad_clip)
    graphs = RecordedGraphs()
    eager, captured = new_step(**given), new_step(**given, capture=graphs)
    assert take(eager, range(STEPS)) == take(captured, range(STEPS))
    assert_same(eager, captured)
    assert graphs.captured == (2 if accumulation == 1 else 3)
    assert graphs.replayed == (STEPS - EAGER_STEPS) * (accumulation + 1) - 1  # the first such update is eager


@pytest.mark.parametrize("form", ["plain", "llama tied with shared heads", "nanofalcon"])
def test_captured_equals_eager_in_bf16_with_copies(form):
    eager, captured = (
        new_step(form, dtype=torch.bfloat16, accumulation=2, capture=c) for c in (None, RecordedGraphs())
    )
    assert take(eager, range(STEPS)) == take(captured, range(STEPS))
    assert_same(eager, captured)


def test_copies_follow_every_step():
    step = new_step(dtype=torch.bfloat16, capture=RecordedGraphs())

    def check(step, number):
        copies = {name: x for name, x in step.model.named_buffers() if name.endswith(".copy")}
        assert len(copies) > 10
        for name, x in copies.items():
            master = step.model.get_parameter(name.removesuffix("copy") + "weight")
            assert torch.equal(x, master.bfloat16()), (number, name)

    take(step, range(STEPS), check)


def test_gradients_are_added_in_place():
    """A later micro-batch makes no second set of them."""
    step = new_step(dtype=torch.bfloat16, accumulation=2)
    step.add(batch_of(0), first=True)
    before = {name: p.grad for name, p in step.model.named_parameters()}
    places = {name: grad.data_ptr() for name, grad in before.items()}
    step.add(batch_of(1), first=False)
    for name, parameter in step.model.named_parameters():
        assert parameter.grad is before[name]
        assert parameter.grad.data_ptr() == places[name]
        assert parameter.grad.dtype == torch.float32


def test_rates_on_the_device_are_those_of_the_host():
    """What a CUDA graph must read from memory is as exact as Python's own numbers, up to the order of roundings."""
    numbers, on_device = (new_step("plain", on_device=where) for where in (False, True))
    got, want = (torch.tensor(take(step, range(STEPS))) for step in (on_device, numbers))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


def test_evaluation_between_steps_changes_nothing():
    """It uses the same parameters and copies, and memory of its own."""

    @torch.no_grad()
    def evaluate(step, number):
        row = tokens(5, 21, seed=number)
        step.model(row[:, :-1], row[:, 1:], reduction="none")

    eager, captured = (new_step(dtype=torch.bfloat16, capture=capture) for capture in (None, RecordedGraphs()))
    assert take(eager, range(STEPS)) == take(captured, range(STEPS), evaluate)
    assert_same(eager, captured)


@pytest.mark.parametrize("stopped", [1, EAGER_STEPS, EAGER_STEPS + 2])
def test_resuming_is_bitwise(stopped):
    """A captured run that is saved and goes on in a new process equals an eager one that never stopped."""
    eager, first, second = new_step(), new_step(capture=RecordedGraphs()), new_step(capture=RecordedGraphs())
    whole = take(eager, range(STEPS + 3))
    begun = take(first, range(stopped))
    second.model.load_state_dict(copy.deepcopy(first.model.state_dict()))
    second.model.refresh_copies()
    second.optimizer.load_state_tensors(first.optimizer.state_tensors())
    assert begun + take(second, range(stopped, STEPS + 3)) == whole
    assert_same(eager, second)


def test_a_dropped_step_leaves_no_trace():
    def begin_and_drop(step, number):
        step.add(batch_of(1000 + number), first=True)
        step.drop()

    undisturbed = new_step(accumulation=2)
    want = take(undisturbed, range(STEPS))
    for capture in (None, RecordedGraphs()):
        step = new_step(accumulation=2, capture=capture)
        assert take(step, range(STEPS), begin_and_drop) == want
        assert_same(step, undisturbed)


def test_an_eager_update_follows_captured_gradients():
    """What several ranks do without messages in graphs: only the micro-batches are captured."""
    graphs = RecordedGraphs()
    eager, captured = new_step(accumulation=2), new_step(accumulation=2, capture=graphs)
    captured.capture_update = False
    assert take(eager, range(STEPS)) == take(captured, range(STEPS))
    assert_same(eager, captured)
    assert graphs.captured == 2


def test_the_recorded_graph_freezes_what_a_real_one_freezes():
    """Else the tests above would show nothing."""
    x, number, calls = torch.zeros(3), [2.0], []

    def function():
        calls.append(1)
        x.add_(number[0])
        return x * 2

    replay = RecordedGraphs()(function)
    assert x.tolist() == [0, 0, 0]  # capturing runs nothing
    number[0] = 100.0
    replay()
    replay()
    assert x.tolist() == [4, 4, 4]
    assert len(calls) == 1
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        RecordedGraphs()(lambda: x.sum().item())


def test_no_step_asks_the_device_for_a_number():
    """Not even an eager one: each would stop the host until the device has caught up."""
    for optim in OPTIMS:
        step = new_step(optim=optim, accumulation=2, grad_clip=1.0)
        take(step, range(2))
        with Recorder():
            for i in range(2):
                step.add(batch_of(i), first=i == 0)
            result = step.update(make_schedule(OPTIMS[optim], 20)(2))
            torch.stack([step.loss, result.grad_norm])


def test_a_batch_of_another_shape_is_a_defect():
    step = new_step(capture=RecordedGraphs())
    take(step, range(STEPS))
    row = tokens(2, 20)
    with pytest.raises(AssertionError, match=r"captured for \(3, 33\), got \(2, 19\)"):
        step.add(Batch(row[:, :-1], row[:, 1:], None, None, {}), first=True)


def test_numbers_are_read_later(device):
    x = torch.tensor([1.5, float("nan")], device=device)
    read = read_later(x)
    first, second = read()
    assert first == 1.5
    assert second != second


# On a GPU


def gpu_step(kernels, device, **given):
    """In bf16, as training on a GPU makes it."""
    ops = {"torch": torch_ops, "triton": triton_ops}[kernels](device)
    return new_step(dtype=torch.bfloat16, device=device, on_device=None, ops=ops, **given)


@pytest.mark.gpu
@pytest.mark.parametrize("grad_clip", [0.0, 0.1], ids=["", "clipped"])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_cuda_graphs_equal_eager(kernels, accumulation, grad_clip, device):
    given = dict(accumulation=accumulation, grad_clip=grad_clip)
    eager, captured = (gpu_step(kernels, device, capture=capture, **given) for capture in (None, CudaGraphs()))

    @torch.no_grad()
    def evaluate(step, number):
        row = tokens(5, 21, seed=number, device=device)
        step.model(row[:, :-1], row[:, 1:], reduction="none").sum().item()

    assert take(eager, range(STEPS), device=device) == take(captured, range(STEPS), evaluate, device=device)
    assert_same(eager, captured)


@pytest.mark.gpu
def test_what_cannot_be_captured_is_refused_in_a_sentence():
    """In a process of its own: PyTorch draws no more random numbers after a capture that failed."""
    program = (
        "import torch; from model.cuda_graphs import CudaGraphs; from errors import KestrelError\n"
        "x = torch.zeros(3, device='cuda')\n"
        "try: CudaGraphs()(lambda: x.sum().item())\n"
        "except KestrelError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert re.search(r"cannot be captured as a CUDA graph .*hardware.cuda_graph=false", run.stdout), run.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_steps_do_not_wait_for_the_gpu(kernels, device):
    step = gpu_step(kernels, device, accumulation=2, grad_clip=1.0)
    take(step, range(2), device=device)
    batches = [batch_of(i, device) for i in range(2)]
    schedule = make_schedule(OPTIMS["muon_adamw"], 20)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i, batch in enumerate(batches):
            step.add(batch, first=i == 0)
        result = step.update(schedule(2))
        read_later(torch.stack([step.loss, result.grad_norm]))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_number_is_read_without_waiting_for_what_comes_after(device):
    """The loss of a step must not cost the wait for the next one."""
    x, a = torch.ones(2, device=device), torch.randn(4096, 4096, device=device)
    a @ a
    torch.cuda.synchronize()
    read = read_later(x)
    for _ in range(200):
        a @ a
    done = torch.cuda.Event()
    done.record()
    assert read() == [1.0, 1.0]
    assert not done.query()


def test_a_rehearsal_leaves_nothing_behind():
    """Without the optimizer's part, whose kernels are not launched where it is asked for."""
    rehearsed, fresh_step = (new_step(accumulation=2, grad_clip=0.1) for _ in range(2))
    rehearsed.rehearse(batch_of(9), make_schedule(OPTIMS["muon_adamw"], 20)(0), updates=False)
    assert_same(rehearsed, fresh_step)
    assert all(p.grad is None for p in rehearsed.model.parameters())
    assert take(rehearsed, range(2)) == take(fresh_step, range(2))
    assert_same(rehearsed, fresh_step)


@pytest.mark.gpu
@pytest.mark.parametrize("grad_clip", [0.0, 0.1], ids=["", "clipped"])
def test_a_rehearsed_step_is_compiled_and_has_changed_nothing(grad_clip, device, monkeypatch, tmp_path):
    triton, ahead = pytest.importorskip("triton"), import_module("kernels_triton.ahead")
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    said = []
    rehearsed, fresh_step = (gpu_step("triton", device, accumulation=2, grad_clip=grad_clip) for _ in range(2))
    values = make_schedule(OPTIMS["muon_adamw"], 20)(0)
    with ahead.compiling_ahead(said.append) as compilers:
        rehearsed.rehearse(batch_of(9, device), values, updates=True)
    assert compilers.failed == 0
    assert said == [] or said[-1].startswith("compiled ")
    assert_same(rehearsed, fresh_step)
    assert take(rehearsed, range(2), device=device) == take(fresh_step, range(2), device=device)
    assert_same(rehearsed, fresh_step)
