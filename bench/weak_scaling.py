"""Weak scaling of the whole step: `python -m bench.weak_scaling` writes bench/results/weak_scaling.csv and draws it.

Every GPU has the same model and rows as if it were alone, one micro-batch a step. Alone it exchanges nothing and
updates everything; with the others it gets the mean of all gradients, updates its share and collects the rest. All
candidates live in the same processes and take turns of a few steps, the GPUs alone all at the same time, so clocks and
warmth are alike; the first step of a turn is not counted. Before anything is timed each candidate takes some steps on
the same batches from the same values, and must come to the losses of one GPU that adds up the batches of all.

A step is what lies between the ends of two of them on the GPU. The host's milliseconds are what Python needs to queue
one: where that is as long as the step, the host binds.

The processes are this program again, under torchrun; `--ranks` says how many. On a CPU they are two, and only show that
all of it works.
"""

import argparse
import csv
import os
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.distributed as dist

from bench.plot import finish_figure
from bench.timing import FIGURES, RESULTS, folder_for, machine_card
from bench.train_step import ARCHS, ROWS, SMALL, VALUES, Moment, Shape, give_values, words
from data.batches import Batch
from errors import KestrelError
from model import build
from model.cuda_graphs import CudaGraphs
from model.ops import KernelConfig, Ops, compile_ahead, load_ops
from optim.groups import MuonAdamWConfig, parameter_groups
from optim.muon_adamw import MuonAdamW
from training import distributed
from training.distributed import HardwareConfig, any_rank, print_main
from training.step import EAGER_STEPS, CapturedStep, Step

STEPS_PER_TURN = 4  # and one before them that does not count
CHECKED = 20  # steps whose losses are compared
TOLERANCE = 1e-2  # of a loss, after CHECKED steps of rounding otherwise


class Kind(NamedTuple):
    """How a candidate runs."""

    graph: str = ""  # "", "whole", or "local": without the messages
    alone: bool = False
    reduce_dtype: torch.dtype = torch.float32


KINDS = {
    "one GPU, eager": Kind(alone=True),
    "one GPU, graph": Kind("whole", alone=True),
    "eager": Kind(),
    "graph": Kind("whole"),
    "graph, messages outside": Kind("local"),
    "graph, bf16 messages": Kind("whole", reduce_dtype=torch.bfloat16),
    "eager, bf16 messages": Kind(reduce_dtype=torch.bfloat16),
}
ON_CPU = ("one GPU, eager", "eager", "eager, bf16 messages")
BASES = ("one GPU, graph", "one GPU, eager")  # the first that is there is what speed is compared with


class Candidate:
    """A model and its optimizer, ready to take steps; the same values in every process and for every candidate."""

    def __init__(
        self, kind: Kind, shape: Shape, ops: Ops, device: distributed.Device, own: dist.ProcessGroup,
        graphs: CudaGraphs | None = None, accumulation: int = 1,
    ) -> None:  # fmt: skip
        model = build(shape.config(), shape.vocab_size, ops, device.dtype)
        model.to_empty(device=device.device)
        torch.manual_seed(0)
        give_values(model, None)
        groups = parameter_groups(model, MuonAdamWConfig(), n_embd=model.config.n_embd)
        optimizer = MuonAdamW(
            groups, ops, compute_dtype=device.dtype, copies=model.keep_copies(), reduce_dtype=kind.reduce_dtype,
            process_group=own if kind.alone else None,
        )  # fmt: skip
        options = dict(accumulation=accumulation, device=device.device)
        if kind.graph:
            self.step = CapturedStep(model, optimizer, capture=graphs, messages=kind.graph == "whole", **options)
        else:
            self.step = Step(model, optimizer, **options)
        self.device, self.losses = device.device, []

    def take_step(self, batches: list[Batch]) -> float:
        """→ milliseconds of the host"""
        began = time.perf_counter()
        for i, batch in enumerate(batches):
            self.step.add(batch, first=i == 0)
        self.step.update(VALUES)
        return 1e3 * (time.perf_counter() - began)

    def take_turn(self, batches: list[Batch]) -> list[tuple[float, float]]:
        """Milliseconds from one step's end to the next one's, and of the host."""
        ends, host = [], []
        for _ in range(STEPS_PER_TURN + 1):
            host.append(self.take_step(batches))
            ends.append(Moment(self.device))
        wait(self.device)
        return [(a.until(b), h) for a, b, h in zip(ends, ends[1:], host[1:])]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    distributed.barrier()


def losses_of(candidate: Candidate, batches: list[list[Batch]], device: distributed.Device) -> list[float]:
    """The mean over all ranks after each step."""
    losses = []
    for step in batches:
        candidate.take_step(step)
        losses.append(distributed.all_reduce_mean(candidate.step.loss.clone()))
    return torch.stack(losses).tolist()


def largest_difference(ours: list[float], theirs: list[float]) -> float:
    """Of two curves, as a part of the loss; a NaN is none."""
    parts = [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
    return max(part if part == part else float("inf") for part in parts)


def bench(
    shape: Shape, names: list[str], device: distributed.Device, graphs: CudaGraphs | None, kernels: KernelConfig,
    turns: int, checked: int,
) -> list[dict]:  # fmt: skip
    """A row for each candidate and rank. One that cannot run says why, and has none."""
    W = device.world_size
    own = dist.new_subgroups(1)[0]  # this rank alone
    length = shape.config().sequence_len
    all_batches = [[words(shape, length, device.device, seed=W * i + r) for r in range(W)] for i in range(checked)]
    mine = [[step[device.rank]] for step in all_batches]

    ops = load_ops(kernels, device.device, device.dtype, generates=False)

    reference = Candidate(Kind(alone=True), shape, ops, device, own, accumulation=W)
    compile_step(reference, shape, all_batches[0][0], kernels, device)
    wanted = losses_of(reference, all_batches, device)
    print_main(f"one GPU that adds up {W} micro-batches: losses {wanted[0]:.5f} … {wanted[-1]:.5f}")
    del reference

    candidates, lines = {}, {}
    for name in names:
        kind, problem = KINDS[name], ""
        try:
            candidates[name] = Candidate(kind, shape, ops, device, own, graphs)
            lines[name] = losses_of(candidates[name], mine, device)
        except (KestrelError, torch.OutOfMemoryError) as error:
            problem = str(error).splitlines()[0]
            print(f"rank {device.rank}: {name} does not run: {problem}", file=sys.stderr, flush=True)
        if any_rank(bool(problem), device.device):
            candidates.pop(name, None)
            continue
        off = "" if kind.alone else f"{largest_difference(lines[name], wanted):.1e} off the losses of one GPU"
        if "eager" in lines and not kind.alone:
            off += f", {largest_difference(lines[name], lines['eager']):.1e} off eager ones"
        print_main(f"{name}: losses {lines[name][0]:.5f} … {lines[name][-1]:.5f} {off}")
        if not kind.alone and largest_difference(lines[name], wanted) > TOLERANCE:
            print_main(f"{name} does not learn what one GPU with all batches does: it is not timed")
            candidates.pop(name)

    samples = {name: [] for name in candidates}
    for _ in range(turns):
        for name, candidate in candidates.items():
            samples[name] += candidate.take_turn(mine[0])
    return gather_rows(samples, shape, device)


def compile_step(
    candidate: Candidate, shape: Shape, batch: Batch, kernels: KernelConfig, device: distributed.Device
) -> None:
    """Side by side, as train.py does."""

    def work() -> None:
        candidate.step.rehearse(batch, VALUES, updates=kernels.backend == "triton")

    compile_ahead(("weak scaling", shape, device.world_size), work, kernels, device.device, print_main)


def gather_rows(samples: dict[str, list], shape: Shape, device: distributed.Device) -> list[dict]:
    """The rows of all ranks, on every rank; share is the speed of a GPU alone, the mean over ranks, that is kept."""
    everyone: list[dict] = [{}] * device.world_size
    dist.all_gather_object(everyone, samples)
    tokens = shape.rows * shape.config().sequence_len
    medians = {name: [statistics.median(ms for ms, _ in ranks[name]) for ranks in everyone] for name in samples}
    base = next((medians[name] for name in BASES if name in medians), None)
    rows = []
    for name in samples:
        for rank, ranks in enumerate(everyone):
            step_ms, host_ms = (sorted(column) for column in zip(*ranks[name]))
            median = statistics.median(step_ms)
            rows.append({
                "model": shape.model, "arch": shape.arch, "rows": shape.rows, "vocab_size": shape.vocab_size,
                "candidate": name, "ranks": 1 if KINDS[name].alone else device.world_size, "rank": rank,
                "step_ms": round(median, 3), "p20_ms": round(step_ms[len(step_ms) // 5], 3),
                "p80_ms": round(step_ms[len(step_ms) * 4 // 5], 3), "host_ms": round(statistics.median(host_ms), 3),
                "tokens_per_s": round(1e3 * tokens / median),
                "share": round(statistics.mean(base) / statistics.mean(medians[name]), 4) if base else "",
            })  # fmt: skip
    return rows


def print_table(rows: list[dict]) -> None:
    print(f"\n{rows[0]['model']} {rows[0]['arch']}, {rows[0]['rows']} rows, vocabulary {rows[0]['vocab_size']}")
    heads = {"rank": "rank", "step_ms": "step ms", "p20_ms": "20 %", "p80_ms": "80 %", "host_ms": "host ms",
             "tokens_per_s": "tokens/s", "share": "share"}  # fmt: skip
    print(f"  {'':26}" + "".join(f"{head:>10}" for head in heads.values()))
    for row in rows:
        print(f"  {row['candidate']:26}" + "".join(f"{row[key]:>10}" for key in heads))


def write_csv(rows: list[dict], card: dict[str, str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *card])
        writer.writeheader()
        writer.writerows(row | card for row in rows)


def draw(rows: list[dict], card: dict[str, str], path: Path) -> None:
    """A bar for each candidate: milliseconds of the slowest rank's step; lines from the 20th percentile to the 80th."""
    names = list(dict.fromkeys(row["candidate"] for row in rows))
    slowest = [max((row for row in rows if row["candidate"] == name), key=lambda row: row["step_ms"]) for name in names]
    figure, axis = plt.subplots(figsize=(10, 1.2 + 0.5 * len(names)))
    places = range(len(names))[::-1]
    colours = ["#9aa5b1" if row["ranks"] == 1 else "#c8553d" for row in slowest]
    medians = [row["step_ms"] for row in slowest]
    spread = [[max(0, m - row["p20_ms"]) for m, row in zip(medians, slowest)],
              [max(0, row["p80_ms"] - m) for m, row in zip(medians, slowest)]]  # fmt: skip
    axis.barh(places, medians, xerr=spread, color=colours, height=0.7)
    for place, row in zip(places, slowest):
        share = f", {row['share']:.1%}" if row["share"] != "" and row["ranks"] > 1 else ""
        axis.text(0, place, f"  {row['step_ms']:.1f} ms{share}; host {row['host_ms']:.1f} ms", va="center", fontsize=8)
    axis.set_yticks(list(places), [f"{row['candidate']} ({row['ranks']})" for row in slowest])
    axis.set_xlabel("milliseconds of a whole step; the share is of the speed of one GPU alone")
    axis.grid(axis="x", lw=0.3)
    first = rows[0]
    finish_figure(figure, card, path, f"{first['model']} {first['arch']}, {first['rows']} rows a GPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, help="processes, each with a GPU; default: one for each, on a CPU 2")
    parser.add_argument("--model", choices=ROWS, default="d12")
    parser.add_argument("--arch", choices=ARCHS, default="nanochat2026")
    parser.add_argument("--candidate", choices=KINDS, action="append", help="default: all")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--small", action="store_true", help="a model of a moment, to see that all of it works")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--checked", type=int, default=CHECKED, help=f"steps compared, more than {EAGER_STEPS}")
    parser.add_argument("--out", type=Path, help="folder of the CSV; default: bench/results, on a CPU local/ in it")
    parser.add_argument("--figures", type=Path, help="folder of the figure")
    parser.add_argument("--commit", help="what is timed, where git cannot say")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        on_gpu = args.device != "cpu" and torch.cuda.is_available()
        ranks = args.ranks or (torch.cuda.device_count() if on_gpu else 2)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        os.execv(sys.executable, [*torchrun, "-m", "bench.weak_scaling", *sys.argv[1:]])
    device = distributed.init(HardwareConfig(device=args.device))
    on_cpu = device.device.type == "cpu"
    shape = Shape(args.model, args.arch, ROWS[args.model])
    if args.small:
        shape = Shape("d2", args.arch, 2, SMALL, 512)
    names = args.candidate or list(KINDS)
    if on_cpu:
        print_main("no GPU: plain PyTorch alone is timed, as Triton's interpreter would say nothing of our kernels")
        names = [name for name in names if name in ON_CPU]
    kernels = KernelConfig(backend="torch" if on_cpu else "triton")
    graphs = None if on_cpu else CudaGraphs()
    try:
        rows = bench(shape, names, device, graphs, kernels, args.turns, args.checked)
    finally:
        if graphs is not None:
            graphs.release()
        distributed.cleanup()
    if device.is_main:
        card = machine_card(device.device)
        card["commit"] = args.commit or card["commit"]
        where = (device.device.type, args.small)
        out, figures = args.out or folder_for(RESULTS, *where), args.figures or folder_for(FIGURES, *where)
        print_table(rows)
        write_csv(rows, card, out / "weak_scaling.csv")
        draw(rows, card, figures / "weak_scaling.png")
        print(f"\nwritten to {out / 'weak_scaling.csv'}, drawn in {figures / 'weak_scaling.png'}")


if __name__ == "__main__":
    main()
