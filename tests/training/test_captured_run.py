"""Whole runs of captured steps: `train.py` with recorded graphs on a CPU, with CUDA graphs and Triton on a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import train
from config import compose
from tests.test_train import TINY
from tests.training.recorded_graph import RecordedGraphs
from training import distributed

ROOT = Path(__file__).parent.parent.parent
RUN = [*TINY, "stage.num_iterations=9", "stage.eval_every=3", "hardware.device_batch_size=4", "resume=auto"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run train.py in this process. captured: with recorded graphs → (losses, final tensors)"""
    monkeypatch.setenv("KESTREL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def run(name: str, *overrides: str, captured: bool = True):
        graphs = RecordedGraphs()
        monkeypatch.setattr(distributed, "choose_cuda_graph", lambda *_: captured)
        monkeypatch.setattr(train, "CudaGraphs", lambda: graphs)
        train.main(compose("train", [*RUN, f"run={name}", *overrides]))
        assert (graphs.replayed > 0) == captured
        folder = tmp_path / "runs" / name
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses = {row["step"]: row["train_loss"] for row in rows if "train_loss" in row}
        return losses, load_file(checkpoint.latest(folder) / "model.safetensors")

    return run


@pytest.mark.parametrize(("dtype", "rel"), [("float32", 1e-6), ("bfloat16", 1e-3)])
def test_a_captured_run_learns_what_an_eager_one_does(run, dtype, rel):
    """Two micro-batches a step, validations between, clipping. In bf16 the last bit of a rate turns roundings."""
    (eager, _), (captured, _) = (
        run(f"captured-{c}", "optim.grad_clip=0.5", f"hardware.dtype={dtype}", captured=c) for c in (False, True)
    )
    assert captured.keys() == eager.keys() == set(range(1, 10))
    for step, loss in eager.items():
        assert captured[step] == pytest.approx(loss, rel=rel)


def test_a_captured_run_that_goes_on_equals_one_that_never_stopped(run):
    straight, whole = run("straight", "stage.save_every=3", "stage.keep_last=9")
    resumed, parts = run("resumed", f"resume=runs/straight/checkpoints/step-{3:08d}")
    assert resumed == {step: straight[step] for step in range(4, 10)}
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


PROGRAM = """
import sys
import triton
compiled = []
triton.knobs.compilation.listener = lambda **facts: compiled.append(facts["src"].name)
import train
from config import compose
from training import loop
one_step, at_step = loop.one_step, []
def noting(*args):
    record = one_step(*args)
    at_step.append(len(compiled))
    return record
loop.one_step = noting
train.main(compose("train", sys.argv[1:]))
print("compiled", at_step, compiled[at_step[0]:at_step[-1]])
assert at_step[0] > 0 and at_step[-1] == at_step[0], compiled[at_step[0]:at_step[-1]]
"""


@pytest.mark.gpu
@pytest.mark.parametrize("graph", ["true", "false"])
@pytest.mark.parametrize("arch", ["plain", "nanochat2026"])
def test_nothing_is_compiled_after_the_first_step(arch: str, graph: str, tmp_path: Path):
    """Neither by eager steps nor by capturing nor by the validations between them; a cached kernel counts as well."""
    overrides = [
        "model=d2", "model.sequence_len=256", f"arch={arch}", "data.megabytes=0.5", "tokenizer=byte", "kernels=triton",
        "stage.total_batch_size=4096", "hardware.device_batch_size=8", "stage.eval_tokens=4096", "hardware=gpu",
        "stage.num_iterations=9", "stage.eval_every=3", f"hardware.cuda_graph={graph}", f"runs_dir={tmp_path}",
    ]  # fmt: skip
    command = [sys.executable, "-c", PROGRAM, *overrides]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("arch", ["plain", "nanochat2026"])
def test_cuda_graphs_train_as_eager_steps_do(arch: str, kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two micro-batches a step, validations between, clipping."""
    monkeypatch.chdir(tmp_path)
    losses = {}
    for graph in ("false", "true"):
        overrides = [
            "model=d2", "model.sequence_len=256", f"arch={arch}", "data.megabytes=0.5", "tokenizer=byte",
            f"kernels={kernels}", "stage.total_batch_size=4096", "hardware.device_batch_size=8", "hardware=gpu",
            "stage.eval_tokens=4096", "stage.num_iterations=12", "stage.eval_every=4", "optim.grad_clip=1",
            f"hardware.cuda_graph={graph}", f"run=graph-{graph}", f"runs_dir={tmp_path}",
        ]  # fmt: skip
        train.main(compose("train", overrides))
        rows = [json.loads(line) for line in (tmp_path / f"graph-{graph}" / "metrics.jsonl").read_text().splitlines()]
        losses[graph] = [row["train_loss"] for row in rows if "train_loss" in row]
    assert losses["true"] == pytest.approx(losses["false"], rel=2e-3)
