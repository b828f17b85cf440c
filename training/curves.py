"""Figures of training runs, drawn from their metrics.jsonl.

python -m training.report runs/d6-tinystories                     draws training_curve.png into the run
python -m training.report runs/a runs/b --out compare.png         lays several runs over each other
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from errors import KestrelError
from training.journal import Row, naming_the_disk, read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRICS = "metrics.jsonl"
CURVE = "training_curve.png"
X_LABELS = {"step": "step", "tokens": "tokens", "elapsed_s": "seconds of training"}
BLUE, ORANGE, GREY = "#2b5c8a", "#d9772b", "#8a8f98"
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "grid.color": "#e6e8eb",
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "xtick.color": "#4a4f57",
    "ytick.color": "#4a4f57",
}


def draw(run_dir: Path) -> Path:
    """Draw loss, learning rate and validation of one run into its folder. → the picture"""
    rows = read_metrics(run_dir)
    with _styled_figure() as figure:
        loss, rate, bpb = _three_panels(figure)
        loss.plot(*xy(rows, "train_loss"), color=BLUE, alpha=0.25, linewidth=0.8, label="each step")
        loss.plot(*xy(rows, "smoothed_loss"), color=BLUE, linewidth=1.6, label="smoothed")
        loss.set_title("training loss (nats per token)")
        loss.legend(loc="upper right")
        rate.plot(*xy(rows, "lr_mult"), color=GREY, linewidth=1.4)
        rate.set_title("learning rate, part of its peak")
        rate.set(xlabel="step", xlim=(0, None), ylim=(0, 1.08))
        _draw_validation(bpb, with_key(rows, "val_bpb"))
        figure.suptitle(as_text(Path(run_dir).resolve().name), x=0.022, ha="left", fontweight="bold")
        return _save(figure, Path(run_dir) / CURVE)


def compare(run_dirs: Sequence[Path], out: Path, x: str = "step") -> Path:
    """Lay the smoothed losses and the validation figures of several runs over each other. → the picture

    x   what the horizontal axis counts: step, tokens or elapsed_s
    """
    with _styled_figure() as figure:
        loss, bpb = figure.subplots(1, 2)
        for run_dir, name in zip(run_dirs, distinct_names(run_dirs)):
            rows = read_metrics(run_dir)
            loss.plot(*xy(rows, "smoothed_loss", x), linewidth=1.5, label=name)
            bpb.plot(*xy(_placed(rows, x), "val_bpb", x), marker="o", markersize=3.5, linewidth=1.2, label=name)
        loss.set(title="training loss, smoothed (nats per token)", xlabel=X_LABELS[x])
        bpb.set(title="validation, bits per byte", xlabel=X_LABELS[x])
        loss.legend(loc="upper right")
        return _save(figure, Path(out))


def read_metrics(run_dir: Path) -> list[Row]:
    """The rows a run has logged."""
    rows = read_rows(Path(run_dir) / METRICS)
    if not rows:
        raise KestrelError(f"{run_dir} holds no {METRICS} with rows in it: give the folder of a run, such as runs/NAME")
    return rows


def with_key(rows: list[Row], key: str) -> list[Row]:
    """The rows that have a number under `key`."""
    return [row for row in rows if type(row.get(key)) in (int, float)]


def xy(rows: list[Row], key: str, x: str = "step") -> tuple[list[float], list[float]]:
    """Two lists to plot."""
    rows = with_key(with_key(rows, key), x)
    return [row[x] for row in rows], [row[key] for row in rows]


def distinct_names(run_dirs: Sequence[Path]) -> list[str]:
    """The runs' folder names; whole paths where two are called the same."""
    names = [Path(run_dir).resolve().name for run_dir in run_dirs]
    return [as_text(name) for name in (names if len(set(names)) == len(names) else map(str, run_dirs))]


def as_text(name: str) -> str:
    """A folder's name for matplotlib, to which dollars begin a formula."""
    return name.replace("$", r"\$")


def _placed(rows: list[Row], x: str) -> list[Row]:
    """The validation rows of trained models with their place on the axis `x`, which is that of the step before them.

    The untrained model's figure is left out: it would squeeze the others together.
    """
    place = {row["step"]: row.get(x) for row in with_key(rows, "smoothed_loss")}
    return [row | {x: place[row["step"]]} for row in with_key(rows, "val_bpb") if row["step"] in place]


def _draw_validation(axes: "Axes", validation: list[Row]) -> None:
    """Bits per byte, its last value written out, and the untrained model's as a line to come down from."""
    axes.set_title("validation, bits per byte")
    axes.set_xlabel("step")
    trained = [row for row in validation if row["step"] > 0]
    untrained = next((row["val_bpb"] for row in validation if row["step"] == 0), None)
    axes.plot(*xy(trained, "val_bpb"), color=ORANGE, marker="o", markersize=4, linewidth=1.6)
    if trained:
        last = trained[-1]
        axes.annotate(
            f"{last['val_bpb']:.3f}", (last["step"], last["val_bpb"]), xytext=(0, 8), textcoords="offset points",
            ha="right", color=ORANGE, fontweight="bold",
        )  # fmt: skip
    if untrained is not None:
        axes.axhline(untrained, color=GREY, linestyle="--", linewidth=1.2)
        axes.annotate(
            f"untrained {untrained:.3f}", (0.01, untrained), xycoords=("axes fraction", "data"), xytext=(0, -12),
            textcoords="offset points", color=GREY,
        )  # fmt: skip
    if not validation:
        axes.text(0.5, 0.5, "none yet", transform=axes.transAxes, ha="center", color=GREY)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)


def _three_panels(figure: "Figure") -> tuple["Axes", "Axes", "Axes"]:
    """Loss above learning rate on the left, validation on the right."""
    grid = figure.add_gridspec(2, 2, height_ratios=(4, 1), width_ratios=(3, 2))
    loss = figure.add_subplot(grid[0, 0])
    rate = figure.add_subplot(grid[1, 0], sharex=loss)
    loss.tick_params(labelbottom=False)
    return loss, rate, figure.add_subplot(grid[:, 1])


@contextlib.contextmanager
def _styled_figure() -> Iterator["Figure"]:
    """An empty figure, and our style while it is drawn. Without pyplot, so nothing looks for a screen."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise KestrelError("drawing needs matplotlib: pip install matplotlib") from error
    with mpl.rc_context(STYLE):
        yield Figure(figsize=(10, 4.6), layout="constrained", dpi=130)


def _save(figure: "Figure", path: Path) -> Path:
    """Write the picture so that a viewer never meets half of it."""
    temporary = path.with_name(f".{path.stem}.tmp-{os.getpid()}{path.suffix}")
    with naming_the_disk(path):
        try:
            figure.savefig(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def main(arguments: list[str] | None = None) -> None:
    """The command `python -m training.report`."""
    parser = argparse.ArgumentParser(prog="python -m training.report", description="Draw the curves of training runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="the folder of a run; several to compare")
    parser.add_argument(
        "--out", type=Path, help=f"the picture (default: {CURVE} in the run, or in the working directory)"
    )
    parser.add_argument("--x", choices=X_LABELS, default="step", help="what the horizontal axis of a comparison counts")
    options = parser.parse_args(arguments)
    try:
        single = len(options.runs) == 1 and options.out is None and options.x == "step"
        print(draw(options.runs[0]) if single else compare(options.runs, options.out or Path(CURVE), options.x))
    except KestrelError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
