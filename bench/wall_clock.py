"""Loss over the seconds since Enter: `python -m bench.wall_clock` trains a d6 three times and draws it.

Plain PyTorch, torch.compile and our kernels take the same steps on the same batches, each as a process of its own,
timed from its start: imports, kernels compiled or found in the cache, reading data and validating are all in it. What
all need alike and only once, the tokenizer and the tokens of the data, is made before. What follows the options goes
to train.py: `python -m bench.wall_clock --steps 2000 data=tinystories data.files=stories/`.
"""

import argparse
import csv
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from bench.plot import COLOURS, finish_figure
from bench.timing import FIGURES, RESULTS, folder_for, machine_card

ROOT = Path(__file__).parent.parent
RUNS = {
    "torch": ["kernels=torch"],
    "torch.compile": ["kernels=torch", "hardware.compile=true"],
    "triton": ["kernels=triton"],
}
VALIDATED = re.compile(r"^step (\d+)/\d+ .*\| val loss ([\d.]+)")


def train(name: str, overrides: list[str], runs_dir: str) -> list[dict]:
    """A run's validations, each with the seconds since its process was started."""
    command = [sys.executable, "-u", "train.py", f"run={name}", f"runs_dir={runs_dir}", *RUNS[name], *overrides]
    began, rows, last = time.time(), [], ""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            last = line.strip() or last
            if found := VALIDATED.match(line):
                step, loss = found.groups()
                rows.append(
                    {"run": name, "step": int(step), "seconds": round(time.time() - began, 2), "val_loss": loss}
                )
    if process.returncode != 0:
        raise SystemExit(f"error: {name} did not train: {last.removeprefix('error: ')}")
    return rows


def draw(rows: list[dict], path: Path) -> None:
    """Validation loss over seconds, one line a run."""
    figure, axis = plt.subplots(figsize=(8, 4.5))
    for name in dict.fromkeys(row["run"] for row in rows):
        mine = [row for row in rows if row["run"] == name]
        seconds, losses = [float(row["seconds"]) for row in mine], [float(row["val_loss"]) for row in mine]
        axis.plot(seconds, losses, marker=".", color=COLOURS[name], label=f"{name}: {seconds[-1]:.0f} s")
    axis.set_xlabel("seconds since the command was typed")
    axis.set_ylabel("validation loss")
    axis.set_xlim(left=0)
    axis.grid(lw=0.3)
    axis.legend(frameon=False)
    finish_figure(figure, rows[0], path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="of every run; plain PyTorch needs about two minutes")
    parser.add_argument("--run", choices=RUNS, action="append", help="default: all three")
    parser.add_argument("--out", type=Path, help="folder of the CSV; default: bench/results, on a CPU local/ in it")
    parser.add_argument("--figures", type=Path, help="folder of the figure")
    parser.add_argument("--commit", help="what is timed, where git cannot say")
    args, rest = parser.parse_known_args()
    if unknown := [word for word in rest if "=" not in word or word.startswith("--")]:
        parser.error(f"{unknown[0]} is neither an option nor a setting of train.py")
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    args.out = args.out or folder_for(RESULTS, kind)
    args.figures = args.figures or folder_for(FIGURES, kind)
    every = max(1, args.steps // 10)
    overrides = ["model=d6", "data=tinystories", "stage.total_batch_size=65536", *rest]
    overrides += [f"stage.num_iterations={args.steps}", f"stage.eval_every={every}"]
    card = machine_card(torch.device(kind))
    card["commit"] = args.commit or card["commit"]
    rows = []
    with tempfile.TemporaryDirectory() as runs_dir:
        train("torch", [*overrides, "stage.num_iterations=1"], f"{runs_dir}/first")  # tokenizer and tokens
        for name in args.run or list(RUNS):
            rows += [row | card for row in train(name, overrides, runs_dir)]
            print(f"{name}: loss {rows[-1]['val_loss']} after {rows[-1]['seconds']} s", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "wall_clock.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, args.figures / "wall_clock.png")
    print(f"written to {args.out / 'wall_clock.csv'}, drawn in {args.figures / 'wall_clock.png'}")


if __name__ == "__main__":
    main()
