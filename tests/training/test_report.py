"""Reports: every number is what it claims; files survive crashes, resumes and full disks; figures show the rows."""

import csv
import json
import math
import platform
import random
import re
import sys
import types
from pathlib import Path

import pytest
import torch

from checkpoint import TrainState
from errors import KestrelError
from training import curves, journal, report
from training.journal import read_rows
from training.machine import CHIPS, describe_machine, find_chip, peak_bandwidth, peak_flops
from training.report import COLUMNS, Console, Reporter, Smoothed, duration

N = 20
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch: pytest.MonkeyPatch):
    """Drawing takes half a second; the tests of it use `figures`."""
    monkeypatch.setattr(report, "draw", lambda run_dir: None)


@pytest.fixture
def figures(no_drawing, monkeypatch: pytest.MonkeyPatch) -> list:
    """The figures drawn while the test runs."""
    drawn, save = [], curves._save
    monkeypatch.setattr(curves, "_save", lambda figure, path: (drawn.append(figure), save(figure, path))[1])
    monkeypatch.setattr(report, "draw", curves.draw)
    return drawn


def log_steps(reporter: Reporter, first: int, last: int, every: int = 5) -> None:
    """What the loop reports when it goes from step `first` to `last`: a validation and a sample on the way."""
    for step in range(first, last + 1):
        if step % every == 0 and step > first:
            log_cadence(reporter, step)
        if step < last:
            chance = random.Random(step)
            reporter.train_step(
                step=step + 1, loss=9 / (step + 1) + chance.random(), lr_mult=0.5 + 0.1 * chance.random(),
                seconds=0.01 + 0.01 * chance.random(), tokens=64, grad_norm=1.0 if step % 2 else None,
            )  # fmt: skip


def log_cadence(reporter: Reporter, step: int) -> None:
    reporter.validation(step, 8 / (step + 1), 4 / (step + 1))
    reporter.sample(step, "Once ", f"upon a time {step}\nthe end")


def whole_run(run: Path, **options) -> None:
    reporter = Reporter(run, num_steps=N, **options)
    log_cadence(reporter, 0)
    log_steps(reporter, 0, N)
    reporter.close()


def state_at(run: Path, step: int, validated: int | None = None) -> TrainState:
    """The state a checkpoint would hold."""
    row = next(row for row in read_rows(run / "metrics.jsonl") if row["step"] == step and "tokens" in row)
    validated = step if validated is None else validated
    return TrainState(step, row["tokens"], row["elapsed_s"], validated_step=validated, sampled_step=validated)


def texts(run: Path) -> dict[str, bytes]:
    names = ("metrics.jsonl", "metrics.csv", "samples.jsonl", "samples.txt")
    return {name: (run / name).read_bytes() for name in names}


# The numbers.


def test_smoothing_forgets_by_beta_and_is_not_biased_to_zero():
    smoothed, values = Smoothed(0.9), [5.0, 3.0, 8.0, 1.0]
    assert smoothed.add(values[0]) == pytest.approx(5.0, rel=1e-12)
    for x in values[1:]:
        smoothed.add(x)
    weights = [0.1 * 0.9 ** (3 - i) for i in range(4)]
    expected = sum(w * x for w, x in zip(weights, values)) / (1 - 0.9**4)
    assert smoothed.value == pytest.approx(expected, rel=1e-12)


def test_rows_hold_every_step_and_every_validation(tmp_path: Path):
    whole_run(tmp_path)
    rows = read_rows(tmp_path / "metrics.jsonl")
    training = [row for row in rows if "train_loss" in row]
    assert [row["step"] for row in training] == list(range(1, N + 1))
    assert [row["step"] for row in rows if "val_bpb" in row] == [0, 5, 10, 15, 20]
    assert [row["tokens"] for row in training] == [64 * step for step in range(1, N + 1)]
    for row in training:
        assert row["tokens_per_s"] == pytest.approx(64 / (row["ms"] / 1000), rel=1e-12)
    assert training[-1]["elapsed_s"] == pytest.approx(sum(row["ms"] for row in training) / 1000, rel=1e-12)


def test_csv_and_jsonl_say_the_same_to_the_last_digit(tmp_path: Path):
    whole_run(tmp_path, flops_per_token=1e6, peak_flops=1e12)
    with open(tmp_path / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert tuple(table[0]) == COLUMNS
    assert [{key: float(x) for key, x in line.items() if x} for line in table] == rows


def test_utilisation_is_flops_over_the_peak_of_all_devices(tmp_path: Path):
    reporter = Reporter(tmp_path, num_steps=N, flops_per_token=6e9, peak_flops=2 * 989e12)
    reporter.train_step(step=1, loss=1.0, lr_mult=1.0, seconds=0.25, tokens=65536)
    reporter.close()
    assert read_rows(tmp_path / "metrics.jsonl")[0]["mfu"] == pytest.approx(6e9 * 65536 / 0.25 / 1978e12, rel=1e-12)


def test_an_unknown_peak_is_left_out_and_not_called_zero(tmp_path: Path, capsys: pytest.CaptureFixture):
    whole_run(tmp_path, flops_per_token=6e9, peak_flops=None)
    assert not any("mfu" in row for row in read_rows(tmp_path / "metrics.jsonl"))
    assert "mfu" not in capsys.readouterr().out


def test_a_figure_that_is_not_finite_leaves_valid_json(tmp_path: Path):
    reporter = Reporter(tmp_path, num_steps=N)
    reporter.validation(0, math.inf, math.nan)
    reporter.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 0, "val_loss": None, "val_bpb": None}


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.words)
def test_no_chip_is_hidden_by_one_before_it(chip):
    assert find_chip(f"Maker {chip.words}") is chip


@pytest.mark.parametrize(
    ("name", "tflops", "terabytes_per_s"),
    [
        ("NVIDIA H100 80GB HBM3", 989, 3.35),
        ("NVIDIA H100 PCIe", 756, 2.0),
        ("NVIDIA H100 NVL", 835, 3.9),
        ("NVIDIA H200", 989, 4.8),
        ("NVIDIA H20", 148, 4.0),
        ("NVIDIA A100-SXM4-40GB", 312, 1.555),
        ("NVIDIA A100-SXM4-80GB", 312, 2.039),
        ("NVIDIA A100 80GB PCIe", 312, 1.935),
        ("NVIDIA A10G", 70, 0.6),
        ("NVIDIA L4", 121, 0.3),
        ("NVIDIA L40S", 362, 0.864),
        ("NVIDIA GeForce RTX 4090", 165.2, 1.008),
        ("NVIDIA GeForce RTX 3090", 71, 0.936),
        ("NVIDIA B200", 2250, 8.0),
        ("AMD Instinct MI300X", 1307.4, 5.3),
    ],
)
def test_devices_are_known_by_their_names(name: str, tflops: float, terabytes_per_s: float):
    assert find_chip(name)[1:] == (tflops, terabytes_per_s)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA RTX A1000",
        "NVIDIA T400",
        "",
        "cpu",
    ],
)
def test_devices_we_do_not_know_have_no_peak(name: str):
    assert find_chip(name) is None


def test_a_cpu_has_no_peak():
    assert peak_flops(torch.device("cpu")) is None
    assert peak_bandwidth(torch.device("cpu")) is None


@pytest.mark.gpu
def test_this_gpu_is_described():
    facts = describe_machine(torch.device("cuda"))
    chip = find_chip(facts["gpu"])
    assert peak_flops(torch.device("cuda")) == (chip.tflops * 1e12 if chip else None)
    assert re.fullmatch(r"[\d.]+", facts["driver"])
    json.dumps(facts)


# Crashes and resumes.


def test_going_on_gives_the_files_of_a_run_that_never_stopped(tmp_path: Path):
    whole_run(tmp_path / "straight")
    run = tmp_path / "stopped"
    reporter = Reporter(run, num_steps=N)
    log_cadence(reporter, 0)
    log_steps(reporter, 0, 13)  # checkpoint at 10, then three steps that will be taken again, then killed
    state = state_at(run, 10)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 14, "train_lo')
    with open(run / "samples.jsonl", "a") as file:
        file.write("\x00\x00\x00")
    reporter = Reporter(run, num_steps=N, start=state, resumed=True)
    log_steps(reporter, 10, N)
    reporter.close()
    assert texts(run) == texts(tmp_path / "straight")


def test_a_validation_the_checkpoint_does_not_know_of_is_not_there_twice(tmp_path: Path):
    """Interrupted and saved at step 10, then started again and killed after the validation that belongs there."""
    run = tmp_path / "run"
    reporter = Reporter(run, num_steps=N)
    log_steps(reporter, 0, 10)
    state = state_at(run, 10, validated=5)
    for _ in range(2):
        reporter = Reporter(run, num_steps=N, start=state, resumed=True)
        log_cadence(reporter, 10)
        reporter.close()
    assert [row["step"] for row in read_rows(run / "metrics.jsonl") if "val_bpb" in row] == [5, 10]
    assert [row["step"] for row in read_rows(run / "samples.jsonl")] == [5, 10]


def test_a_new_run_does_not_inherit_the_rows_of_one_that_saved_nothing(tmp_path: Path):
    whole_run(tmp_path)
    Reporter(tmp_path, num_steps=N, start=TrainState(step=7)).close()
    assert read_rows(tmp_path / "metrics.jsonl") == []
    assert (tmp_path / "metrics.csv").read_text() == ",".join(COLUMNS) + "\n"
    assert (tmp_path / "samples.txt").read_text() == ""


def test_counts_go_on_from_the_checkpoint_of_another_run(tmp_path: Path):
    reporter = Reporter(tmp_path, num_steps=N, start=TrainState(step=7, tokens_seen=700, elapsed_s=3.0))
    reporter.train_step(step=8, loss=2.0, lr_mult=1.0, seconds=0.5, tokens=100)
    reporter.close()
    row = read_rows(tmp_path / "metrics.jsonl")[0]
    assert (row["tokens"], row["elapsed_s"], row["smoothed_loss"]) == (800, 3.5, pytest.approx(2.0, rel=1e-12))


def test_every_row_is_on_disk_before_the_next_step(tmp_path: Path):
    reporter = Reporter(tmp_path, num_steps=N)
    for step in range(1, 4):
        reporter.train_step(step=step, loss=1.0, lr_mult=1.0, seconds=0.1, tokens=1)
        assert len(read_rows(tmp_path / "metrics.jsonl")) == step
        assert len((tmp_path / "metrics.csv").read_text().splitlines()) == step + 1
    reporter.close()


@pytest.mark.parametrize(
    "junk", [b"\xff\xfe\n", b"[1, 2]\n", b'{"step": "3"}\n', b"[" * 100_000 + b"\n", b'{"loss": 1}\n', b"\n"]
)
def test_lines_that_are_no_rows_are_passed_over(tmp_path: Path, junk: bytes):
    (tmp_path / "metrics.jsonl").write_bytes(junk + b'{"step": 1, "train_loss": 2.0, "smoothed_loss": "x"}\n' + junk)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1]
    assert curves.draw(tmp_path).read_bytes().startswith(PNG)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("method", ["train_step", "sample"])
def test_a_full_disk_is_one_clear_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str):
    monkeypatch.setattr(journal, "open_for_lines", lambda path: open("/dev/full", "w"))  # noqa: SIM115
    reporter = Reporter(tmp_path, num_steps=N)
    with pytest.raises(KestrelError, match=r"could not write .*No space left.*free some space"):
        if method == "sample":
            reporter.sample(1, "a", "b")
        else:
            reporter.train_step(step=1, loss=1.0, lr_mult=1.0, seconds=0.1, tokens=1)
    reporter.close()


def test_a_folder_that_cannot_be_made_is_one_clear_sentence(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(KestrelError, match="could not write"):
        Reporter(tmp_path / "file" / "run", num_steps=N)


def test_other_ranks_touch_nothing_and_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture):
    reporter = Reporter(tmp_path / "run", num_steps=N, is_main=False, tensorboard=True)
    reporter.environment({})
    log_cadence(reporter, 0)
    log_steps(reporter, 0, 3)
    reporter.say("hello")
    reporter.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


# The console.

LINE = re.compile(
    r"step (\d+)/20 \((\d+\.\d)%\) \| loss (\d+\.\d{4}) \| lr (\d\.\d{3}) \| ms/step (\d+\.\d) \| tok/s (\d+) "
    r"\| mfu (\d+\.\d)% \| eta ((?:\d+:)?\d+:\d\d)"
)


def test_lines_are_plain_and_can_be_searched(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch):
    monkeypatch.setattr(report, "LINE_EVERY_S", 0.0)
    whole_run(tmp_path, flops_per_token=1e6, peak_flops=1e12)
    out, err = capsys.readouterr()
    assert err == ""
    assert not re.search(r"[\r\x1b]", out)
    lines = [match.groups() for match in map(LINE.fullmatch, out.splitlines()) if match]
    rows = [row for row in read_rows(tmp_path / "metrics.jsonl") if "train_loss" in row]
    assert len(lines) == len(rows) == N
    for line, row in zip(lines, rows):
        assert int(line[0]) == row["step"]
        assert line[2] == f"{row['smoothed_loss']:.4f}"
        assert (line[4], line[5]) == (f"{row['ms']:.1f}", f"{row['tokens_per_s']:.0f}")
        assert line[6] == f"{100 * row['mfu']:.1f}"
    assert lines[-1][-1] == "0:00"
    assert "step 05/20 (25.0%) | val loss 1.3333 | val bpb 0.6667" in out
    assert "--- step 5\nOnce upon a time 5\nthe end\n" in out


def test_a_line_sums_up_the_steps_since_the_last(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    now = iter([0.0, 1.0, 2.5, 2.5])
    monkeypatch.setattr(report.time, "monotonic", lambda: next(now))
    console = Console(20, 0)
    for step, ms in ((1, 10.0), (2, 20.0), (3, 60.0)):
        row = {
            "step": step,
            "smoothed_loss": 1.0,
            "lr_mult": 1.0,
            "ms": ms,
            "tokens_per_s": 64 / ms * 1000,
            "mfu": 8 / ms,
        }
        console.step(row, eta_s=3723)
    first, second = capsys.readouterr().out.splitlines()
    assert LINE.fullmatch(first)[1] == "01"
    assert LINE.fullmatch(second).groups()[4:] == ("40.0", "1600", "20.0", "1:02:03")  # 128 tokens in 80 ms; 16 / 80


def test_estimated_time_leaves_the_first_slow_steps_out(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch):
    monkeypatch.setattr(report, "LINE_EVERY_S", 0.0)
    reporter = Reporter(tmp_path, num_steps=100)
    for step in range(1, 12):
        reporter.train_step(step=step, loss=1.0, lr_mult=1.0, seconds=50.0 if step == 1 else 1.0, tokens=1)
    assert capsys.readouterr().out.splitlines()[-1].endswith("eta 1:29")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (360_000, "100:00:00")]
)
def test_durations(seconds: float, text: str):
    assert duration(seconds) == text


def test_a_terminal_gets_a_bar_that_goes_away(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    whole_run(tmp_path)
    out, err = capsys.readouterr()
    assert "100%" in err
    assert "20/20" in err
    assert "loss" in err
    assert "ms/step" not in out
    assert "val bpb" in out


# TensorBoard, the machine, the figures.


def test_tensorboard_that_is_missing_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(KestrelError, match="pip install tensorboard"):
        Reporter(tmp_path, num_steps=N, tensorboard=True)


def test_tensorboard_gets_every_number_and_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []

    class Writer:
        def __init__(self, *arguments, **options):
            calls.append((arguments, options))

        def __getattr__(self, name):
            return lambda *arguments: calls.append((name, *arguments))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    reporter = Reporter(tmp_path, num_steps=N, start=TrainState(step=3), tensorboard=True)
    reporter.train_step(step=4, loss=2.5, lr_mult=1.0, seconds=0.1, tokens=10)
    reporter.validation(4, 2.0, 1.5)
    reporter.sample(4, "Once ", "upon")
    reporter.close()
    assert calls[0] == ((str(tmp_path / "tensorboard"),), {"purge_step": 4})
    assert {("add_scalar", "train_loss", 2.5, 4), ("add_scalar", "val_bpb", 1.5, 4), ("close",)} < set(calls[1:])
    assert ("add_text", "sample", "Once upon", 4) in calls


def test_environment_keeps_every_start_and_names_nobody(tmp_path: Path):
    facts = describe_machine(torch.device("cpu")) | {"seed": 42}
    for number in range(2):
        Reporter(tmp_path, num_steps=N).environment(facts | {"number": number})
    text = (tmp_path / "environment.json").read_text()
    assert [entry["number"] for entry in json.loads(text)] == [0, 1]
    assert facts["torch"].split("+")[0] == torch.__version__.split("+")[0]  # a package may leave the build out
    assert facts["python"] == platform.python_version()
    assert {"started", "commit", "uncommitted_changes", "command", "cpu", "cores", "triton"} < facts.keys()
    assert facts["commit"] is None or re.fullmatch("[0-9a-f]{40}", facts["commit"])
    assert "host" not in text
    (tmp_path / "environment.json").write_text("damaged")
    Reporter(tmp_path, num_steps=N).environment(facts)
    assert len(json.loads((tmp_path / "environment.json").read_text())) == 1


def test_the_curve_shows_what_was_logged(tmp_path: Path, figures: list):
    whole_run(tmp_path / "my $run_1$")
    assert (tmp_path / "my $run_1$/training_curve.png").read_bytes().startswith(PNG)
    rows = read_rows(tmp_path / "my $run_1$/metrics.jsonl")
    loss, rate, bpb = figures[0].axes
    for line, key in zip([*loss.lines, *rate.lines], ["train_loss", "smoothed_loss", "lr_mult"]):
        assert list(line.get_ydata()) == [row[key] for row in rows if key in row]
        assert list(line.get_xdata()) == list(range(1, N + 1))
    trained, untrained = bpb.lines
    assert list(trained.get_xdata()) == [5, 10, 15, 20]
    assert list(trained.get_ydata()) == [row["val_bpb"] for row in rows if "val_bpb" in row][1:]
    assert set(untrained.get_ydata()) == {4.0}
    assert {text.get_text() for text in bpb.texts} == {"untrained 4.000", f"{4 / 21:.3f}"}
    assert figures[0].get_suptitle() == r"my \$run_1\$"
    assert [path.name for path in (tmp_path / "my $run_1$").iterdir() if "tmp" in path.name] == []


@pytest.mark.parametrize("kinds", ["t", "v", "tv", "vt"])
def test_a_run_that_has_hardly_begun_can_be_drawn(tmp_path: Path, kinds: str):
    reporter = Reporter(tmp_path, num_steps=N)
    for kind in kinds:
        if kind == "t":
            reporter.train_step(step=1, loss=1.0, lr_mult=1.0, seconds=0.1, tokens=1)
        else:
            reporter.validation(0, 2.0, 3.0)
    reporter.close()
    assert curves.draw(tmp_path).read_bytes().startswith(PNG)


@pytest.mark.parametrize("x", ["step", "tokens", "elapsed_s"])
def test_comparing_lays_runs_over_each_other_on_one_axis(tmp_path: Path, figures: list, x: str):
    runs = [tmp_path / "a/run", tmp_path / "b/run"]
    for run in runs:
        whole_run(run)
    figures.clear()
    curves.main([*map(str, runs), "--out", str(tmp_path / "both.png"), "--x", x])
    loss, bpb = figures[0].axes
    assert [line.get_label() for line in loss.lines] == [str(run) for run in runs]  # both are called run
    rows = {row["step"]: row for row in read_rows(runs[0] / "metrics.jsonl") if "train_loss" in row}
    for lines, key, steps in ((loss.lines, "smoothed_loss", range(1, N + 1)), (bpb.lines, None, [5, 10, 15, 20])):
        assert list(lines[1].get_xdata()) == [rows[step][x] for step in steps]
        assert key is None or list(lines[1].get_ydata()) == [rows[step][key] for step in steps]


def test_the_command_draws_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture):
    whole_run(tmp_path / "run")
    capsys.readouterr()
    curves.main([str(tmp_path / "run")])
    assert capsys.readouterr().out == f"{tmp_path}/run/training_curve.png\n"
    assert (tmp_path / "run/training_curve.png").exists()
    with pytest.raises(SystemExit) as exit_status:
        curves.main([str(tmp_path / "nowhere")])
    assert exit_status.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: {tmp_path}/nowhere holds no metrics.jsonl with rows in it: give the folder of a run, such as runs/NAME"
    ]


def test_a_figure_that_cannot_be_drawn_does_not_end_a_run(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(report, "DRAW_EVERY_S", -1.0)
    monkeypatch.setattr(report, "draw", lambda run_dir: 1 / 0)
    whole_run(tmp_path)
    assert "training_curve.png could not be drawn: division by zero" in capsys.readouterr().out
    assert len(read_rows(tmp_path / "metrics.jsonl")) == N + 5


def test_drawing_leaves_the_style_of_others_alone(tmp_path: Path):
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    whole_run(tmp_path)
    curves.draw(tmp_path)
    assert dict(mpl.rcParams) == before
