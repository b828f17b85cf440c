"""`python train.py` as a user runs it, on a tiny model: files, resuming, signals, ranks, sweeps."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import checkpoint
from config import compose
from errors import KestrelError
from tests import warm
from train import main as train_main

ROOT = Path(__file__).parent.parent
# Small enough for two steps a second on a busy core, large enough that every part of a run happens.
TINY = [
    "model=d2", "model.depth=1", "model.head_dim=16", "model.aspect_ratio=32", "model.sequence_len=32",
    "data.megabytes=0.05",
    "tokenizer=byte", "stage.total_batch_size=256", "stage.eval_tokens=1024", "stage.sample_tokens=8",
    "hardware=cpu", "hardware.threads=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def start(
    folder: Path,
    cache: Path,
    *overrides: str,
    ranks: int = 1,
    script: tuple = (str(ROOT / "train.py"),),
    cold: bool = False,
) -> subprocess.Popen:
    """train.py in a folder of its own; under torchrun when there are several ranks. cold: its imports count, too."""
    launcher = python = [sys.executable] if cold else warm.python()
    if ranks > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={port}", "--no-python"]
        launcher = [*python, *torchrun, *python]
    env = os.environ | {"KESTREL_CACHE": str(cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launcher, *script, *TINY, *overrides]
    return subprocess.Popen(command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def train(folder: Path, cache: Path, *overrides: str, status: int = 0, **options: object) -> str:
    """Run to the end. → what it printed"""
    process = start(folder, cache, *overrides, **options)
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, f"status {process.returncode}\n{out[-2000:]}\n{err[-3000:]}"
    return out + err


def losses(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of every training row."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["train_loss"]) for row in rows if "train_loss" in row]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Everything in the newest checkpoint."""
    from safetensors.torch import load_file

    folder = checkpoint.latest(run)
    return {
        f"{kind}.{k}": v
        for kind in ("model", "optimizer")
        for k, v in load_file(folder / f"{kind}.safetensors").items()
    }


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A run of 20 steps without interruption."""
    folder = tmp_path_factory.mktemp("straight")
    out = train(folder, cache, "stage.num_iterations=20", "stage.eval_every=10", "run=a", cold=True)
    (folder / "out.txt").write_text(out)
    return folder / "runs" / "a"


def test_a_run_leaves_everything_behind(straight: Path):
    for name in (
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "metrics.csv",
        "training_curve.png",
        "tokenizer.json",
    ):
        assert (straight / name).stat().st_size > 0, name
    assert (straight / "training_curve.png").read_bytes().startswith(b"\x89PNG")
    assert [step for step, _ in losses(straight)] == list(range(1, 21))
    rows = list(csv.DictReader((straight / "metrics.csv").open()))
    assert len(rows) >= 23  # 20 steps and validations at 0, 10 and 20
    (environment,) = json.loads((straight / "environment.json").read_text())
    assert environment["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_a_run_says_where_things_are_and_what_ran(straight: Path):
    out = (straight.parent.parent / "out.txt").read_text()
    for words in ("all torch", "cpu", "float32", "bits per byte", "training_curve.png", "runs/a"):
        assert words in out, words


def test_loss_and_bits_per_byte_fall(straight: Path):
    rows = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    bpb = [row["val_bpb"] for row in rows if "val_bpb" in row]
    assert len(bpb) == 3
    assert bpb[-1] < 0.8 * bpb[0]


def test_resume_is_bitwise(straight: Path, tmp_path: Path, cache: Path):
    """Interrupted after 7 and after 13 steps: the same losses, parameters and optimizer state as in one go."""
    for steps in (7, 6):  # the second counts from step 7
        script = ("-m", "tests.interrupted_train", str(steps))
        out = train(tmp_path, cache, "stage.num_iterations=20", "stage.eval_every=10", "run=a", script=script)
        assert "saved" in out
    train(tmp_path, cache, "stage.num_iterations=20", "stage.eval_every=10", "run=a")
    resumed = tmp_path / "runs" / "a"
    assert losses(resumed) == losses(straight)
    ours, theirs = tensors(resumed), tensors(straight)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_finishes_the_step_saves_and_exits_0(number: signal.Signals, tmp_path: Path, cache: Path):
    process = start(tmp_path, cache, "stage.num_iterations=100000", "stage.eval_every=-1", "run=a")
    metrics = tmp_path / "runs" / "a" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not metrics.exists() or metrics.read_text().count("train_loss") < 3):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert number.name in out + err
    run = tmp_path / "runs" / "a"
    saved = checkpoint.read_checkpoint(checkpoint.latest(run))
    assert saved.step == losses(run)[-1][0]


def test_a_run_outlives_its_reader(tmp_path: Path, cache: Path):
    process = start(tmp_path, cache, "stage.num_iterations=12", "stage.eval_every=1", "run=a")
    while "val bpb" not in process.stdout.readline():
        assert process.poll() is None
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 0, err
    assert err.count("\n") == 1
    assert "Broken pipe" in err
    assert checkpoint.read_checkpoint(checkpoint.latest(tmp_path / "runs" / "a")).step == 12


def test_ctrl_c_while_it_starts_is_quiet(tmp_path: Path):
    command = [sys.executable, "-X", "importtime", ROOT / "train.py"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while b" csv\n" not in process.stderr.readline():  # the first of the imports, PyTorch is yet to come
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, b"")
    assert b"Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "says", "leaves"),
    [
        ([], r"config\.yaml: Is a directory", {"runs"}),
        (["data.files=none.txt", "run=b"], r"data\.files: there is no file none\.txt", set()),
        (["model.head_dim=1000000", "run=b"], r"layers of width 1000000 take .* GB", set()),
    ],
    ids=["config", "files", "memory"],
)
def test_what_stops_a_run_at_its_start_is_one_sentence(
    overrides, says, leaves, tmp_path: Path, cache: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KESTREL_CACHE", str(cache))
    if leaves:
        (tmp_path / "runs" / "a" / "config.yaml").mkdir(parents=True)
    with pytest.raises(KestrelError, match=says):
        train_main(compose("train", [*TINY, "run=a", *overrides]))
    assert {path.name for path in tmp_path.iterdir()} == leaves


def test_a_finished_run_is_not_trained_again(straight: Path, cache: Path):
    before = (straight / "metrics.jsonl").read_bytes()
    out = train(straight.parent.parent, cache, "stage.num_iterations=20", "run=a")
    assert "complete" in out
    assert (straight / "metrics.jsonl").read_bytes() == before


def test_resume_never_begins_beside(straight: Path, cache: Path):
    before = (straight / "metrics.jsonl").read_bytes()
    train(straight.parent.parent, cache, "stage.num_iterations=2", "run=a", "resume=never")
    assert (straight / "metrics.jsonl").read_bytes() == before
    assert [step for step, _ in losses(straight.with_name("a-2"))] == [1, 2]


def test_resume_from_a_path_begins_where_that_checkpoint_ends(straight: Path, cache: Path):
    folder = straight.parent.parent
    train(folder, cache, "stage.num_iterations=22", "run=b", f"resume={straight}")
    assert [step for step, _ in losses(straight.with_name("b"))] == [21, 22]


def test_going_on_with_another_model_is_refused(straight: Path, cache: Path):
    out = train(straight.parent.parent, cache, "run=a", "model.depth=2", status=2)
    assert "model.depth" in out
    assert "resume=never" in out
    assert "Traceback" not in out


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path, cache: Path):
    out = train(tmp_path, cache, "stage.total_batch_size=100", status=2)
    assert "100" in out
    assert "Traceback" not in out


@pytest.mark.parametrize("optim", [["optim.weight_decay=0"], ["optim=adamw"]], ids=["muon", "adamw"])
def test_two_ranks_equal_one_with_twice_the_accumulation(optim: list[str], tmp_path: Path, cache: Path):
    """Four steps, as each makes the roundings of the last larger: Adam divides a gradient near zero by its size.

    Muon without decay, which acts where update and weight share a sign: one rounding can switch it on or off.
    """
    same = ["stage.num_iterations=4", "hardware.device_batch_size=2", "stage.total_batch_size=256", *optim]
    train(tmp_path, cache, "run=one", *same)
    train(tmp_path, cache, "run=two", *same, ranks=2)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["one", "two"]
    one, two = (tensors(tmp_path / "runs" / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        assert (one[name].double() - two[name].double()).abs().max() <= 1e-5, name
    for (step, a), (other, b) in zip(losses(tmp_path / "runs" / "one"), losses(tmp_path / "runs" / "two"), strict=True):
        assert step == other
        assert abs(a - b) <= 1e-5


def test_a_checkpoint_of_four_ranks_goes_on_with_three_two_and_one(tmp_path: Path, cache: Path):
    """The curve of one rank that never stopped. Twelve rows a step; three ranks share no number of matrices evenly."""
    same = ["stage.total_batch_size=384", "stage.eval_every=-1", "optim.weight_decay=0", "optim.schedule=cosine"]
    whole = [*same, "stage.num_iterations=8", "hardware.device_batch_size=2"]
    train(tmp_path, cache, "run=straight", *whole)
    for ranks, rows, until in ((4, 1, 2), (3, 2, 4), (2, 2, 6), (1, 2, 8)):
        script = ("-m", "tests.interrupted_train", "2" if until < 8 else "9")
        train(tmp_path, cache, "run=a", *whole, f"hardware.device_batch_size={rows}", ranks=ranks, script=script)
    ours, theirs = losses(tmp_path / "runs" / "a"), losses(tmp_path / "runs" / "straight")
    assert [step for step, _ in ours] == list(range(1, 9))
    for (step, a), (_, b) in zip(ours, theirs, strict=True):
        assert abs(a - b) <= 1e-4, step


def test_steps_of_two_ranks_recorded_with_their_messages_train_as_eager_ones(tmp_path: Path, cache: Path):
    """Two micro-batches a step, validations between; stopped by a signal at one rank, and gone on with."""
    same = ["stage.num_iterations=14", "stage.eval_every=3", "hardware.device_batch_size=2", "optim.grad_clip=0.5"]
    train(tmp_path, cache, "run=eager", *same, ranks=2)
    out = train(tmp_path, cache, "run=graph", *same, ranks=2, script=("-m", "tests.captured_train", "7"))
    assert "saved at step 7 of 14" in out
    assert "2 graphs, 8 replays" in out  # four steps, two graphs each
    train(tmp_path, cache, "run=graph", *same, ranks=2, script=("-m", "tests.captured_train", "0"))
    eager, graph = (losses(tmp_path / "runs" / name) for name in ("eager", "graph"))
    assert [step for step, _ in graph] == list(range(1, 15))
    for (_, a), (_, b) in zip(graph, eager, strict=True):
        assert a == pytest.approx(b, rel=1e-5)  # rates on the device have another last bit


def test_two_nodes_meet_and_train(tmp_path: Path, cache: Path):
    """As README.md says for a machine without a GPU: torchrun twice, which find each other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meet = ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{probe.getsockname()[1]}", "--rdzv-id=dry"]
    launcher = ("-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", *meet, str(ROOT / "train.py"))
    options = ("stage.num_iterations=3", "hardware.device_batch_size=2", "run=dry")
    nodes = [start(tmp_path, cache, *options, script=launcher) for _ in range(2)]
    results = [(*node.communicate(timeout=120), node.returncode) for node in nodes]
    assert [status for *_, status in results] == [0, 0], results
    assert "(2 rows × 2 × 2)" in "".join(out for out, *_ in results)
    assert [step for step, _ in losses(tmp_path / "runs" / "dry")] == [1, 2, 3]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path: Path, cache: Path):
    train(tmp_path, cache, "stage.num_iterations=4", "run=a", "optim=adamw")
    saved = checkpoint.latest(tmp_path / "runs" / "a")
    out = train(
        tmp_path,
        cache,
        "stage.num_iterations=40",
        "run=a",
        "optim=adamw",
        "optim.lr=1e30",
        "optim.grad_clip=0",
        status=2,
    )
    assert "step" in out
    assert "lower" in out
    assert "Traceback" not in out
    assert checkpoint.latest(tmp_path / "runs" / "a") == saved


def test_two_processes_do_not_train_in_one_folder(tmp_path: Path, cache: Path):
    first = start(tmp_path, cache, "stage.num_iterations=100000", "run=a")
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (tmp_path / "runs" / "a" / "metrics.jsonl").exists():
            time.sleep(0.1)
        assert "another process" in train(tmp_path, cache, "run=a", status=2)
    finally:
        first.kill()
        first.communicate()


def test_a_sweep_leaves_a_summary(tmp_path: Path, cache: Path):
    train(tmp_path, cache, "-m", "stage.num_iterations=2", "seed=1,2")
    rows = list(csv.DictReader((tmp_path / "runs" / "sweeps" / "summary.csv").open()))
    assert [row["seed"] for row in rows] == ["1", "2"]
    assert all(float(row["bpb"]) > 0 for row in rows)


def test_infer_tells_a_story_of_the_newest_run(straight: Path, cache: Path):
    prompt = 'A "fox", (red): {no}\n[é 日]'
    command = [*warm.python(), str(ROOT / "infer.py"), f"ckpt={straight}", f"prompt={prompt}", "max_new_tokens=2"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=straight.parent.parent)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(prompt)
