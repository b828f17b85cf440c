"""The whole training step: `python -m bench.train_step` writes bench/results/train_step.csv and draws it.

Candidates are plain PyTorch, the same under torch.compile, our kernels, our kernels in CUDA graphs, and both of these
with fp8 products where the GPU has them. All of one shape are in memory together and take turns of a few steps, so that
a clock that drifts meets all of them alike; the first step of a turn is not counted. Forward and backward pass and the
optimizer are timed between events on the GPU, so what the host does not keep up with is in them. Tokens per second are
those of whole steps, one after the other. Peak memory is what a candidate adds to what was there. The wait is that of a
process of its own, from its start to the end of the first step: imports, first values, compiling, with the caches on
disk as they are.
"""

import argparse
import csv
import gc
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from bench.plot import COLOURS, finish_figure
from bench.timing import FIGURES, RESULTS, folder_for, machine_card
from config import compose
from data.batches import Batch
from model import LanguageModel, build, cost
from model.cuda_graphs import CudaGraphs
from model.layers.fp8 import load_fp8, train_in_fp8
from model.ops import KernelConfig, compile_ahead, load_ops
from optim.groups import MuonAdamWConfig, parameter_groups
from optim.muon_adamw import MuonAdamW
from optim.schedules import ScheduleValues
from training.machine import peak_flops
from training.step import EAGER_STEPS, CapturedStep, Step

ROOT = Path(__file__).parent.parent
VOCAB = 32_768
VALUES = ScheduleValues(lr_mult=0.1, momentum=0.95, weight_decay_mult=1.0)
STEPS_PER_TURN = 4  # and one before them that does not count


class Kind(NamedTuple):
    """How a candidate runs."""

    kernels: str
    compile: bool = False
    graph: bool = False
    fp8: bool = False


KINDS = {
    "torch": Kind("torch"),
    "torch.compile": Kind("torch", compile=True),
    "triton": Kind("triton"),
    "triton + graph": Kind("triton", graph=True),
    "triton + fp8": Kind("triton", fp8=True),
    "triton + fp8 + graph": Kind("triton", graph=True, fp8=True),
}
COLOUR_OF = COLOURS | {"triton + graph": "#8e2f20", "triton + fp8": "#6a4c93", "triton + fp8 + graph": "#3b2a55"}


class Shape(NamedTuple):
    """A model and the rows of its one micro-batch."""

    model: str
    arch: str
    rows: int
    overrides: tuple[str, ...] = ()
    vocab_size: int = VOCAB

    def config(self) -> object:
        return compose("train", [f"model={self.model}", f"arch={self.arch}", *self.overrides]).model


SMALL = ("model.depth=2", "model.head_dim=16", "model.aspect_ratio=16", "model.sequence_len=64")
ROWS = {"d6": 32, "d12": 32, "d20": 16}
ARCHS = ("plain", "nanochat2026")


def shapes(models: list[str], small: bool) -> list[Shape]:
    if small:
        return [Shape("d2", arch, 2, SMALL, 512) for arch in ARCHS]
    return [Shape(model, arch, ROWS[model]) for model in models for arch in ARCHS]


class Candidate:
    """A model, its optimizer and a batch, ready to take steps; what it needs of memory is noted."""

    def __init__(self, kind: Kind, shape: Shape, device: torch.device, dtype: torch.dtype, seed: int | None) -> None:
        self.device = device
        self.base = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        ops = load_ops(KernelConfig(backend=kind.kernels), device, dtype, generates=False)
        self.model = build(shape.config(), shape.vocab_size, ops, dtype)
        self.model.to_empty(device=device)
        give_values(self.model, seed)
        groups = parameter_groups(self.model, MuonAdamWConfig(), n_embd=self.model.config.n_embd)
        optimizer = MuonAdamW(groups, ops, compute_dtype=dtype, copies=self.model.keep_copies())
        forward = torch.compile(self.model, dynamic=False) if kind.compile else self.model
        fp8 = train_in_fp8(self.model, load_fp8(KernelConfig(backend=kind.kernels), device)) if kind.fp8 else None
        options = dict(accumulation=1, device=device, prepare=fp8 and fp8.refresh)
        if kind.graph:
            self.step = CapturedStep(forward, optimizer, capture=CudaGraphs(), **options)
        else:
            self.step = Step(forward, optimizer, **options)
        self.batch = words(shape, self.model.context_len, device)
        self.tokens = self.batch.tokens.numel()

    def compile_ahead(self, kind: Kind, shape: Shape) -> None:
        """As train.py does."""
        if not kind.compile:
            work = partial(self.step.rehearse, self.batch, VALUES, updates=kind.kernels == "triton")
            compile_ahead((kind, shape), work, KernelConfig(backend=kind.kernels), self.device)

    def take_step(self) -> tuple["Moment", "Moment", "Moment"]:
        """When it began, when the gradients were there, and when it ended."""
        began = Moment(self.device)
        self.step.add(self.batch, first=True)
        between = Moment(self.device)
        self.step.update(VALUES)
        return began, between, Moment(self.device)

    def warm_up(self) -> float | str:
        """Compile and capture what there is. → GiB that it took at most; empty on a CPU"""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        for _ in range(EAGER_STEPS + 3):
            self.take_step()
        if self.device.type != "cuda":
            return ""
        torch.cuda.synchronize(self.device)
        return round((torch.cuda.max_memory_allocated(self.device) - self.base) / 2**30, 2)

    def take_turn(self, steps: int) -> list[tuple[float, float, float]]:
        """Milliseconds of forward and backward pass, of the optimizer, and from one step's end to the next one's."""
        moments = [self.take_step() for _ in range(steps + 1)]
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        ends = [end for _, _, end in moments]
        return [
            (began.until(between), between.until(end), before.until(end))
            for (began, between, end), before in zip(moments[1:], ends)
        ]


class Moment:
    """A point in the GPU's work, or on a CPU in time."""

    def __init__(self, device: torch.device) -> None:
        if device.type == "cuda":
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record()
        else:
            self.event, self.seconds = None, time.perf_counter()

    def until(self, other: "Moment") -> float:
        """Milliseconds."""
        if self.event is None:
            return 1e3 * (other.seconds - self.seconds)
        return self.event.elapsed_time(other.event)


def give_values(model: LanguageModel, seed: int | None) -> None:
    """First values as training gives them; without a seed random ones, made at once where they are."""
    if seed is not None:
        model.init_weights(seed)
        return
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    model.init_buffers()


def words(shape: Shape, length: int, device: torch.device, seed: int = 0) -> Batch:
    """Tokens as frequent as words are, the n-th as often as 1 / (n + 3): the gradient of a table depends on it."""
    generator = torch.Generator().manual_seed(seed)
    frequency = 1 / (torch.arange(shape.vocab_size) + 3.0)
    row = frequency.multinomial(shape.rows * (length + 1), replacement=True, generator=generator)
    row = row.view(shape.rows, length + 1).to(device)
    return Batch(row[:, :-1].contiguous(), row[:, 1:].contiguous(), None, None, {})


def bench_shape(
    shape: Shape, names: list[str], device: torch.device, dtype: torch.dtype, turns: int, wait: bool
) -> list[dict]:
    """A row for each candidate; one that does not fit into memory has no numbers."""
    waits = {name: wait_of(name, shape, device, dtype) if wait else "" for name in names}
    candidates, peaks = {}, {}
    for name in names:
        try:
            candidates[name] = Candidate(KINDS[name], shape, device, dtype, seed=None)
            peaks[name] = candidates[name].warm_up()
        except torch.OutOfMemoryError:
            candidates.pop(name, None)
            print(f"{name} does not fit into memory beside {', '.join(candidates) or 'nothing'}", file=sys.stderr)
    samples: dict[str, list] = {name: [] for name in candidates}
    for _ in range(turns):
        for name, candidate in candidates.items():
            samples[name] += candidate.take_turn(STEPS_PER_TURN)
    rows = []
    for name in names:
        row = {"model": shape.model, "arch": shape.arch, "rows": shape.rows, "candidate": name}
        row |= (
            numbers(candidates[name], samples[name], peaks[name]) if name in candidates else dict.fromkeys(NUMBERS, "")
        )
        rows.append(row | {"wait_s": waits[name]})
    return rows


NUMBERS = (
    "tokens", "fwd_bwd_ms", "fwd_bwd_p20_ms", "fwd_bwd_p80_ms", "optimizer_ms", "step_ms", "tokens_per_s",
    "fwd_bwd_tokens_per_s", "mfu", "peak_gib",
)  # fmt: skip


def numbers(
    candidate: Candidate, samples: list[tuple[float, float, float]], peak_gib: float | str
) -> dict[str, object]:
    """Medians and what follows from them; mfu is that of forward and backward pass."""
    both, optimizer, whole = (sorted(column) for column in zip(*samples))
    both_ms, step_ms = statistics.median(both), statistics.median(whole)
    peak = peak_flops(candidate.device)
    flops = cost.flops_per_token(candidate.model) * candidate.tokens
    values = (
        candidate.tokens, round(both_ms, 3), round(both[len(both) // 5], 3), round(both[len(both) * 4 // 5], 3),
        round(statistics.median(optimizer), 3), round(step_ms, 3), round(1e3 * candidate.tokens / step_ms),
        round(1e3 * candidate.tokens / both_ms), round(flops / (both_ms / 1e3) / peak, 4) if peak else "",
        peak_gib,
    )  # fmt: skip
    return dict(zip(NUMBERS, values, strict=True))


def wait_of(name: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> float | str:
    """Seconds from the start of a process to the end of its first step; empty if it does not get there."""
    command = [sys.executable, "-m", "bench.train_step", "--first-step", name, "--arch", shape.arch]
    command += ["--device", str(device), "--dtype", str(dtype).removeprefix("torch.")]
    command += ["--small"] if shape.overrides else ["--model", shape.model]
    began = time.time()
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode != 0:
        print(f"{name} does not get to its first step: {result.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return ""
    return round(float(result.stdout.split()[-1]) - began, 2)


def print_table(rows: list[dict]) -> None:
    heads = ("fwd+bwd ms", "optimizer", "step ms", "tokens/s", "MFU", "peak GiB", "wait s")
    keys = ("fwd_bwd_ms", "optimizer_ms", "step_ms", "tokens_per_s", "mfu", "peak_gib", "wait_s")
    print(f"\n{rows[0]['model']} {rows[0]['arch']}, {rows[0]['rows']} rows")
    print(f"  {'':16}" + "".join(f"{head:>12}" for head in heads))
    for row in rows:
        print(f"  {row['candidate']:16}" + "".join(f"{row[key] if row[key] != '' else '–':>12}" for key in keys))


def write_csv(rows: list[dict], card: dict[str, str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *card])
        writer.writeheader()
        writer.writerows(row | card for row in rows)


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """One group of bars for each model: speed, memory and wait of every candidate."""
    panels = {"tokens_per_s": "tokens per second", "peak_gib": "peak memory, GiB", "wait_s": "wait for step 1, s"}
    panels = {key: label for key, label in panels.items() if any(row.get(key) for row in rows)}
    groups = list(dict.fromkeys((row["model"], row["arch"]) for row in rows))
    names = [name for name in KINDS if any(row["candidate"] == name for row in rows)]
    figure, axes = plt.subplots(len(panels), 1, figsize=(10, 3 * len(panels)), sharex=True, squeeze=False)
    axes = axes[:, 0]
    width = 0.8 / len(names)
    for axis, (key, label) in zip(axes, panels.items(), strict=True):
        for i, name in enumerate(names):
            mine = {(row["model"], row["arch"]): row[key] for row in rows if row["candidate"] == name}
            bars = [(j, float(mine[group])) for j, group in enumerate(groups) if mine.get(group) not in (None, "")]
            places = [j + (i - (len(names) - 1) / 2) * width for j, _ in bars]
            drawn = axis.bar(places, [value for _, value in bars], width, label=name, color=COLOUR_OF[name])
            axis.bar_label(drawn, [short(value) for _, value in bars], fontsize=7)
        axis.set_ylabel(label)
        axis.grid(axis="y", lw=0.3)
    axes[0].legend(ncol=len(names), frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.2))
    axes[-1].set_xticks(range(len(groups)), [f"{model}\n{arch}" for model, arch in groups])
    finish_figure(figure, rows[0], path)


def short(value: float) -> str:
    """2476470 → 2.48 M"""
    for size, unit in ((1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=ROWS, action="append", help="default: all")
    parser.add_argument("--arch", choices=ARCHS, action="append", help="default: both")
    parser.add_argument("--candidate", choices=KINDS, action="append", help="default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16, on a CPU float32")
    parser.add_argument("--small", action="store_true", help="models of a moment, to see that all of it works")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--no-wait", action="store_true", help="leave out what takes longest, the wait for step 1")
    parser.add_argument("--out", type=Path, help="folder of the CSV; default: bench/results, on a CPU local/ in it")
    parser.add_argument("--figures", type=Path, help="folder of the figure")
    parser.add_argument("--commit", help="what is timed, where git cannot say")
    parser.add_argument("--first-step", choices=KINDS, help=argparse.SUPPRESS)  # the process whose wait is measured
    args = parser.parse_args()
    args.out = args.out or folder_for(RESULTS, args.device, args.small)
    args.figures = args.figures or folder_for(FIGURES, args.device, args.small)
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    chosen = [shape for shape in shapes(args.model or list(ROWS), args.small) if shape.arch in (args.arch or ARCHS)]
    if args.first_step:
        candidate = Candidate(KINDS[args.first_step], chosen[0], device, dtype, seed=42)
        candidate.compile_ahead(KINDS[args.first_step], chosen[0])
        candidate.take_step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        print(time.time())
        return
    has_fp8 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    names = args.candidate or [name for name, kind in KINDS.items() if has_fp8 or not kind.fp8]
    if device.type == "cpu":
        print("no GPU: plain PyTorch alone is timed, as Triton's interpreter would say nothing of our kernels")
        names = ["torch"]
    card, rows = machine_card(device), []
    card["commit"] = args.commit or card["commit"]
    for shape in chosen:
        rows += bench_shape(shape, names, device, dtype, args.turns, not args.no_wait)
        print_table(rows[-len(names) :])
        write_csv(
            rows, card, args.out / "train_step.csv"
        )  # after each shape: a bench that is stopped leaves what it has
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    draw([{key: str(value) for key, value in (row | card).items()} for row in rows], args.figures / "train_step.png")
    print(f"\nwritten to {args.out / 'train_step.csv'}, drawn in {args.figures / 'train_step.png'}")


if __name__ == "__main__":
    main()
