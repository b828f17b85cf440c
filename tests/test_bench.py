"""The benches of whole steps run anywhere; their numbers mean something on a GPU only."""

import csv
import subprocess
from pathlib import Path

from bench.train_step import KINDS, draw
from tests import warm

ROOT = Path(__file__).parent.parent


def test_the_training_step_is_timed_and_drawn(tmp_path: Path):
    command = [*warm.python(), "-m", "bench.train_step", "--small", "--device", "cpu", "--turns", "2"]
    command += ["--out", str(tmp_path), "--figures", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    rows = list(csv.DictReader((tmp_path / "train_step.csv").open()))
    assert [(row["arch"], row["candidate"]) for row in rows] == [("plain", "torch"), ("nanochat2026", "torch")]
    for row in rows:
        assert float(row["step_ms"]) >= float(row["fwd_bwd_ms"]) > 0
        assert float(row["optimizer_ms"]) > 0
        assert float(row["tokens_per_s"]) > 0
        assert float(row["wait_s"]) > 0.1
        assert row["torch"]
        assert row["commit"]
    assert (tmp_path / "train_step.png").read_bytes().startswith(b"\x89PNG")


def test_weak_scaling_is_checked_timed_and_drawn(tmp_path: Path):
    command = [*warm.python(), "-m", "bench.weak_scaling", "--small", "--device", "cpu", "--turns", "1"]
    command += ["--checked", "4", "--out", str(tmp_path), "--figures", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    rows = list(csv.DictReader((tmp_path / "weak_scaling.csv").open()))
    names = ("one GPU, eager", "eager", "eager, bf16 messages")
    assert [(row["candidate"], row["rank"]) for row in rows] == [(name, rank) for name in names for rank in "01"]
    assert [row["ranks"] for row in rows] == ["1", "1", "2", "2", "2", "2"]
    for row in rows:
        assert float(row["p20_ms"]) <= float(row["step_ms"]) <= float(row["p80_ms"])
        assert float(row["share"]) > 0
    assert (tmp_path / "weak_scaling.png").read_bytes().startswith(b"\x89PNG")


def test_decoding_is_checked_timed_and_drawn(tmp_path: Path):
    command = [*warm.python(), "-m", "bench.decode", "--small", "--device", "cpu", "--out", str(tmp_path)]
    command += [
        "--figures",
        str(tmp_path),
        "--batch",
        "1",
        "--batch",
        "3",
        "--candidate",
        "torch",
        "--candidate",
        "recipe",
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    rows = list(csv.DictReader((tmp_path / "decode.csv").open()))
    assert [(row["batch"], row["candidate"]) for row in rows] == [
        ("1", "torch"), ("1", "recipe"), ("3", "torch"), ("3", "recipe"),
    ]  # fmt: skip
    for row in rows:
        assert float(row["agreement"]) == 1
        assert float(row["tokens_per_s"]) > 0
        assert 0 < float(row["share_of_copy"]) < 1
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")


def test_decoding_is_timed_over_the_context(tmp_path: Path):
    command = [*warm.python(), "-m", "bench.decode", "--small", "--device", "cpu", "--context"]
    command += ["--out", str(tmp_path), "--figures", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    rows = list(csv.DictReader((tmp_path / "decode_context.csv").open()))
    assert {row["candidate"] for row in rows} == {"cache", "no cache"}
    assert (tmp_path / "decode_context.png").read_bytes().startswith(b"\x89PNG")


def test_other_rows_of_a_bench_of_decoding_stay(tmp_path: Path):
    command = [*warm.python(), "-m", "bench.decode", "--small", "--device", "cpu", "--out", str(tmp_path)]
    command += ["--figures", str(tmp_path)]
    for options in ([], ["--quant", "int8", "--quant-cache", "int8"], []):
        run = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stderr[-2000:]
    rows = list(csv.DictReader((tmp_path / "decode.csv").open()))
    assert sorted((row["quant"], row["quant_cache"]) for row in rows) == [("", ""), ("int8", "int8")]
    assert int(rows[0]["bytes"]) != int(rows[1]["bytes"])


def test_the_first_text_is_timed_from_the_start_of_the_process(tmp_path: Path):
    command = [*warm.python(), "-m", "bench.decode", "--small", "--device", "cpu", "--start", "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    rows = list(csv.DictReader((tmp_path / "decode_start.csv").open()))
    assert [row["candidate"] for row in rows] == ["first", "again 1", "again 2"]
    assert all(0.5 < float(row["first_text_s"]) < 60 for row in rows)


def test_what_did_not_fit_is_left_out_of_the_figure(tmp_path: Path):
    rows = [
        {"model": "d6", "arch": "plain", "candidate": name, "tokens_per_s": "5", "peak_gib": "", "wait_s": "1.5"}
        | dict.fromkeys(("device", "torch", "triton", "commit"), "x")
        for name in KINDS
    ]
    draw(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").exists()


def test_loss_is_drawn_over_the_wall_clock(tmp_path: Path):
    command = [*warm.python(), "-m", "bench.wall_clock", "--steps", "3", "--run", "torch"]
    command += ["--out", str(tmp_path), "--figures", str(tmp_path), "data=fables", "data.megabytes=0.2"]
    command += ["tokenizer=byte", "model=d2", "model.sequence_len=32", "stage.total_batch_size=128"]
    command += ["hardware.device_batch_size=2", "hardware=cpu", "stage.eval_tokens=512"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    rows = list(csv.DictReader((tmp_path / "wall_clock.csv").open()))
    assert [int(row["step"]) for row in rows] == [0, 1, 2, 3]
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0.5, "the process's own start counts"
    assert (tmp_path / "wall_clock.png").read_bytes().startswith(b"\x89PNG")
