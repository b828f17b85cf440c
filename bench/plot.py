"""Draw a bench: `python -m bench.plot rmsnorm` turns bench/results/rmsnorm.csv into bench/figures/rmsnorm.png.

One group of bars per shape, one bar per candidate, the directions above each other: how much of its floor's speed each
candidate reaches, or for attention, whose floor is the arithmetic, TFLOP/s. The floor is every input read once and
every output written once at the machine's copy bandwidth, or for an op bound by matrix products those products alone.
The line is a copy of just as many bytes. Of the loss, whose gradients some make in forward, both directions are drawn
as one. Tiles that lost a search stay in the CSV and out of the picture. Without a name every CSV of an op is drawn.
"""

import argparse
import csv
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.kernels import COPY, PRODUCTS
from bench.timing import FIGURES, RESULTS
from kernels_torch.cases import CASES

BY_ARITHMETIC = {"attention"}
TOGETHER = {"linear_cross_entropy"}
COLOURS = {
    "torch": "#9aa5b1",
    "torch.compile": "#6b7c93",
    "liger": "#e0a458",
    "quack": "#7fa650",
    "cudnn": "#7fa650",
    "flash": "#5b8c85",
    "flex": "#e0a458",
    "triton portable": "#e3a99b",
    "triton": "#c8553d",
}


def draw(rows: list[dict[str, str]], path: Path) -> None:
    directions = ["both"] if rows[0]["op"] in TOGETHER else list(dict.fromkeys(row["direction"] for row in rows))
    figure, axes = plt.subplots(len(directions), 1, figsize=(11, 3.4 * len(directions)), sharex=True, squeeze=False)
    for axis, direction in zip(axes[:, 0], directions, strict=True):
        draw_direction(axis, [row for row in rows if row["direction"] == direction])
        unit = "TFLOP/s" if rows[0]["op"] in BY_ARITHMETIC else "share of floor's speed"
        axis.set_ylabel(f"{direction}: {unit}", fontsize=8)
    axes[0, 0].legend(ncol=7, loc="upper center", bbox_to_anchor=(0.5, 1.18), frameon=False)
    card = rows[0]
    finish_figure(figure, card, path, f"copy {float(card['copy_gbps']) / 1e3:.2f} TB/s, {card['dtype']}")


def finish_figure(figure: Figure, card: dict[str, str], path: Path, *facts: str) -> None:
    """Say below a figure what was timed on, and save it."""
    below = ", ".join(
        [card["device"], *facts, f"torch {card['torch']}, triton {card['triton']}, commit {card['commit']}"]
    )
    figure.text(0.99, 0.005, below, ha="right", fontsize=7)
    figure.tight_layout(rect=(0, 0.015, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_direction(axis: Axes, rows: list[dict[str, str]]) -> None:
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    by_arithmetic = rows[0]["op"] in BY_ARITHMETIC
    key = "tflops" if by_arithmetic else "share_of_floor"
    share = {(row["shape"], row["candidate"]): float(row[key]) for row in rows}
    by_copy = not by_arithmetic and all(row["candidate"] != PRODUCTS for row in rows)
    present = [name for name in COLOURS if any(row["candidate"] == name for row in rows)]
    width = 0.8 / len(present)
    for i, name in enumerate(present):
        colour = COLOURS[name]
        places = [
            (j + (i - (len(present) - 1) / 2) * width, share.get((shape, name))) for j, shape in enumerate(shapes)
        ]
        there = [(x, y) for x, y in places if y is not None]
        axis.bar([x for x, _ in there], [y for _, y in there], width, label=name, color=colour)
    for j, shape in enumerate(shapes):
        if by_copy and (shape, COPY) in share:
            axis.hlines(share[shape, COPY], j - 0.45, j + 0.45, color="black", lw=1, label=COPY if j == 0 else None)
    axis.set_xticks(range(len(shapes)), [in_lines(shape, 150 // len(shapes)) for shape in shapes], fontsize=6)
    if not by_arithmetic:
        axis.set_ylim(0, 1.1)
    axis.grid(axis="y", lw=0.3)


def in_lines(shape: str, width: int) -> str:
    """Dimensions and options, as many to a line as fit under a group of bars."""
    return "\n".join(textwrap.wrap(shape, width))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    measured = [op for op in CASES if (RESULTS / f"{op}.csv").exists()]
    parser.add_argument("op", nargs="*", help=f"measured: {', '.join(measured)}")
    args = parser.parse_args()
    if unknown := [op for op in args.op if op not in measured]:
        parser.error(f"bench/results has no {unknown[0]}.csv: python -m bench.kernels --op {unknown[0]} makes it")
    for op in args.op or measured:
        with (RESULTS / f"{op}.csv").open() as file:
            draw(list(csv.DictReader(file)), FIGURES / f"{op}.png")


if __name__ == "__main__":
    main()
