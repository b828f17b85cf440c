"""What a run tells: lines or a bar on the console; metrics, samples and a curve in its folder; TensorBoard if wanted.

    metrics.jsonl, metrics.csv     one row per step, one per validation
    samples.jsonl, samples.txt     what the model wrote on the way
    training_curve.png             drawn at the end and now and then before
    environment.json               one entry for each time the run was started

Rank 0 reports; on the others every method does nothing. Numbers arrive as Python floats: the loop reads them from the
device when they are ready, one step late, so that reporting never makes the device wait.
"""

import csv
import io
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from checkpoint import TrainState
from errors import KestrelError
from training.curves import METRICS, draw, main
from training.journal import Journal, Row, naming_the_disk, read_rows, replace_text

COLUMNS = (
    "step", "train_loss", "smoothed_loss", "val_loss", "val_bpb", "lr_mult", "grad_norm", "ms", "tokens_per_s", "mfu",
    "tokens", "elapsed_s",
)  # fmt: skip
LINE_EVERY_S = 2.0
DRAW_EVERY_S = 120.0
WARM_UP_STEPS = 10  # left out of the estimated time: compiling, filling caches


class Smoothed:
    """A running mean that forgets by β per value, corrected for having begun at zero."""

    def __init__(self, beta: float) -> None:
        self.beta, self.sum, self.weight = beta, 0.0, 0.0

    def add(self, x: float) -> float:
        """Take in a value. → the mean so far"""
        self.sum = self.beta * self.sum + (1 - self.beta) * x
        self.weight = self.beta * self.weight + (1 - self.beta)
        return self.value

    @property
    def value(self) -> float:
        """The mean so far."""
        return self.sum / self.weight


class Reporter:
    """Everything a run reports.

    num_steps        how many steps the whole run has
    start            where it starts from; read now, not later
    resumed          whether it goes on in this folder; if not, rows already there are dropped
    flops_per_token  of the model, forward and backward
    peak_flops       per second, of all devices together; None: unknown, and then no MFU is reported
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        num_steps: int,
        start: TrainState | None = None,
        resumed: bool = False,
        flops_per_token: float = 0.0,
        peak_flops: float | None = None,
        is_main: bool = True,
        tensorboard: bool = False,
    ) -> None:
        self.run_dir, self.num_steps, self.is_main = Path(run_dir), num_steps, is_main
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        start = start or TrainState()
        self.tokens, self.elapsed_s, self.steps_here = start.tokens_seen, start.elapsed_s, 0
        self.loss, self.pace = Smoothed(0.9), Smoothed(0.95)
        self.drawn_at = time.monotonic()
        if is_main:
            self._open(start, resumed, tensorboard)

    def _open(self, start: TrainState, resumed: bool, tensorboard: bool) -> None:
        """Open the files and the console; keep the rows that `start` knows of."""
        with naming_the_disk(self.run_dir):
            self.run_dir.mkdir(parents=True, exist_ok=True)
        self.board = open_tensorboard(self.run_dir, start.step) if tensorboard else None

        def keep(row: Row) -> bool:
            return resumed and row["step"] <= (start.step if "train_loss" in row else start.validated_step)

        self.metrics = Journal(
            self.run_dir / METRICS,
            self.run_dir / "metrics.csv",
            heading=",".join(COLUMNS) + "\n",
            render=csv_line,
            keep=keep,
        )
        self.samples = Journal(
            self.run_dir / "samples.jsonl", self.run_dir / "samples.txt", heading="", render=sample_text,
            keep=lambda row: resumed and row["step"] <= start.sampled_step,
        )  # fmt: skip
        for row in read_rows(self.metrics.path):  # the smoothed loss goes on as if it had never stopped
            if row.get("train_loss") is not None:
                self.loss.add(row["train_loss"])
        self.console = Console(self.num_steps, start.step)

    def environment(self, facts: dict[str, Any]) -> None:
        """Add what this start of the run ran on to environment.json."""
        if not self.is_main:
            return
        path = self.run_dir / "environment.json"
        try:
            earlier = json.loads(path.read_text())
        except (OSError, ValueError):
            earlier = []
        replace_text(path, [json.dumps([*earlier, facts], indent=1) + "\n"])

    def train_step(
        self, *, step: int, loss: float, lr_mult: float, seconds: float, tokens: int, grad_norm: float | None = None
    ) -> None:
        """Report an optimizer step.

        step      how many steps have been taken, with this one
        seconds   how long it took
        tokens    how many it learned from, on all ranks
        """
        if not self.is_main:
            return
        self.tokens += tokens
        self.elapsed_s += seconds
        self.steps_here += 1
        if self.steps_here == WARM_UP_STEPS + 1:
            self.pace = Smoothed(self.pace.beta)
        row = {
            "step": step,
            "train_loss": loss,
            "smoothed_loss": self.loss.add(loss),
            "lr_mult": lr_mult,
            "grad_norm": grad_norm,
            "ms": seconds * 1000,
            "tokens_per_s": tokens / seconds,
            "mfu": self.mfu(tokens, seconds),
            "tokens": self.tokens,
            "elapsed_s": self.elapsed_s,
        }
        self._add({key: value for key, value in row.items() if value is not None})
        self.console.step(row, eta_s=(self.num_steps - step) * self.pace.add(seconds))

    def validation(self, step: int, loss: float, bpb: float) -> None:
        """Report a validation after `step` steps."""
        if not self.is_main:
            return
        self._add({"step": step, "val_loss": loss, "val_bpb": bpb})
        self.console.say(f"{self.console.progress(step)} | val loss {loss:.4f} | val bpb {bpb:.4f}")
        if time.monotonic() - self.drawn_at > DRAW_EVERY_S:
            self.draw()

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Report what the model wrote after `step` steps: `text` goes on from `prompt`."""
        if not self.is_main:
            return
        row = {"step": step, "prompt": prompt, "text": text}
        self.samples.add(row)
        self.console.say(sample_text(row).rstrip())
        if self.board:
            self.board.add_text("sample", prompt + text, step)

    def say(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if self.is_main:
            self.console.say(text)

    def mfu(self, tokens: int, seconds: float) -> float | None:
        """The part of the devices' peak that the model's own FLOPs make up; None when that peak is not known."""
        if not self.peak_flops:
            return None
        return self.flops_per_token * tokens / seconds / self.peak_flops

    def draw(self) -> None:
        """Draw the curve. Failing at that is no reason to lose a run."""
        self.drawn_at = time.monotonic()
        try:
            draw(self.run_dir)
        except Exception as error:
            self.console.say(f"training_curve.png could not be drawn: {error}")

    def close(self) -> None:
        """Draw the curve and close everything."""
        if not self.is_main:
            return
        self.console.close()
        if self.steps_here:
            self.draw()
        self.metrics.close()
        self.samples.close()
        if self.board:
            self.board.close()

    def _add(self, row: Row) -> None:
        self.metrics.add(row)
        for key in row.keys() - {"step"} if self.board else ():
            self.board.add_scalar(key, row[key], row["step"])


class Console:
    """A progress bar on a terminal; elsewhere lines of plain text, made for grep, every few seconds."""

    def __init__(self, num_steps: int, start_step: int) -> None:
        self.num_steps, self.start_step = num_steps, start_step
        self.rows: list[Row] = []  # since the last line
        self.printed_at = -math.inf
        self.bar = None
        if sys.stdout.isatty() and sys.stderr.isatty():
            self.bar = tqdm(total=num_steps, initial=start_step, unit="step", dynamic_ncols=True, leave=False)

    def step(self, row: Row, eta_s: float) -> None:
        """Show an optimizer step, or keep it for the next line; the first and the last are always shown."""
        self.rows.append(row)
        if self.bar is not None:
            self.bar.update(1)
        is_end = row["step"] in (self.start_step + 1, self.num_steps)
        if not is_end and time.monotonic() - self.printed_at < LINE_EVERY_S:
            return
        if self.bar is not None:
            self.bar.set_postfix_str(", ".join(self._figures()))
        else:
            print(" | ".join([self.progress(row["step"]), *self._figures(), f"eta {duration(eta_s)}"]), flush=True)
        self.rows, self.printed_at = [], time.monotonic()

    def _figures(self) -> list[str]:
        """Loss and learning rate of the last step, speeds of all steps since the last line."""
        last = self.rows[-1]
        figures = [f"loss {last['smoothed_loss']:.4f}", f"lr {last['lr_mult']:.3f}"]
        seconds = sum(row["ms"] for row in self.rows) / 1000
        tokens = sum(row["ms"] / 1000 * row["tokens_per_s"] for row in self.rows)
        figures += [f"ms/step {1000 * seconds / len(self.rows):.1f}", f"tok/s {tokens / seconds:.0f}"]
        if last["mfu"] is not None:
            figures.append(f"mfu {100 * sum(row['mfu'] * row['ms'] for row in self.rows) / seconds / 1000:.1f}%")
        return figures

    def progress(self, step: int) -> str:
        """step 0012/1000 (1.2%)"""
        return f"step {step:0{len(str(self.num_steps))}d}/{self.num_steps} ({100 * step / self.num_steps:.1f}%)"

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()


def duration(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def csv_line(row: Row) -> str:
    """A row of metrics.csv; what does not apply is left empty."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow([row.get(column, "") for column in COLUMNS])
    return line.getvalue()


def sample_text(row: Row) -> str:
    """A row of samples.txt."""
    return f"--- step {row['step']}\n{row['prompt']}{row['text']}\n\n"


def tensorboard_writer() -> Any:
    """TensorBoard's writer class, or how to get it."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise KestrelError("tensorboard=true needs the package tensorboard: pip install tensorboard") from error
    return SummaryWriter


def open_tensorboard(run_dir: Path, start_step: int) -> Any:
    """A writer of TensorBoard events; those of steps that will be taken again are hidden."""
    return tensorboard_writer()(str(run_dir / "tensorboard"), purge_step=start_step + 1)


if __name__ == "__main__":
    main()
