"""Each op against its peers: `python -m bench.kernels --op rmsnorm` prints a table and writes bench/results/*.csv.

Candidates are our kernel, the plain PyTorch reference, the reference under torch.compile, and what else is installed
(`PEERS`); `--tune` adds our kernel with other tiles, to choose the numbers in kernels_triton/launch.py. A candidate is
timed only after its outputs and gradients have been found as exact as plain PyTorch's. Times are of the forward and of
the backward pass alone. The roof is a copy of 2 GiB; a copy of just as many bytes as the op must move stands in the
table too, because starting and ending a kernel costs it some microseconds as well.
"""

import argparse
import csv
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch
import torch._functorch.config as functorch_config
from torch import Tensor

import kernels_torch
from bench.timing import Call, Timing, capture, copy_gbps, host_us, machine_card, time_in_turns
from kernels_torch.cases import CASES, Case, Shape
from model.ops import OP_NAMES, KernelConfig, load_ops
from tests.numerics import assert_close

RESULTS = Path(__file__).parent / "results"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Candidate:
    """One way to compute an op: calls to time its forward and its backward pass."""

    def __init__(self, case: Case, function: Callable, inputs: Shape, dtype: torch.dtype) -> None:
        self.function, self.inputs = function, case.cast(inputs, dtype)
        self.leaves = {n: self.inputs[n].requires_grad_() for n in case.differentiable if self.inputs[n] is not None}
        self.outs = self.outputs()
        generator = torch.Generator(self.outs[0].device).manual_seed(1)
        self.upstream = [
            torch.randn(out.shape, generator=generator, device=out.device, dtype=torch.float32).to(out.dtype)
            for out in self.outs
        ]

    def outputs(self) -> tuple[Tensor, ...]:
        out = self.function(**self.inputs)
        return out if isinstance(out, tuple) else (out,)

    def forward(self) -> tuple[Tensor, ...]:
        return self.outputs()

    def backward(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.outs, list(self.leaves.values()), self.upstream, retain_graph=True)

    def results(self) -> dict[str, Tensor]:
        grads = zip(self.leaves, self.backward(), strict=True) if self.leaves else []
        return {f"output {i}": out.detach() for i, out in enumerate(self.outs)} | {f"d{n}": g for n, g in grads}


def candidates(op: str, device: torch.device, tune: bool) -> dict[str, Callable]:
    """Name → function. What lacks the op is left out of the table rather than replaced by something else."""
    reference = getattr(kernels_torch, op)
    found = {"torch": reference, "torch.compile": torch.compile(reference, fullgraph=True)}
    if device.type == "cuda" and op in PEERS:
        found |= PEERS[op]()
    if device.type == "cuda" and op in import_module("kernels_triton").__all__:
        config = KernelConfig(**{name: "triton" if name == op else "torch" for name in OP_NAMES})
        ours = getattr(load_ops(config, device), op)
        found["triton"] = ours
        if tune and op in TILES:
            found |= {name: with_launch(ours, changes) for name, changes in TILES[op]().items()}
    return found


def rmsnorm_peers() -> dict[str, Callable]:
    """Liger computes in fp32 throughout, as we do, in the mode it names after Gemma."""
    if not find_spec("liger_kernel"):
        return {}
    liger = import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
    return {"liger": lambda x, weight, eps: liger.apply(x, weight, eps, 0.0, "gemma", False)}


PEERS = {"rmsnorm": rmsnorm_peers}


def rmsnorm_tiles() -> dict[str, dict[str, Callable]]:
    """Values a thread, warps, stages, and programs that stay on a processor."""
    launch = import_module("kernels_triton.launch")
    choices = {f"forward {row}": (row, None) for row in ((16, 4), (32, 2), (32, 4), (32, 8), (32, 16), (64, 4))}
    backward = (
        (16, 4, 1, None), (16, 8, 1, None), (16, 16, 1, None), (16, 2, 1, 8), (16, 4, 1, 6), (16, 4, 2, 4),
        (16, 2, 3, 8), (16, 4, 3, 4), (16, 4, 4, 3), (16, 16, 3, 1), (32, 4, 1, 4), (32, 4, 3, 4), (32, 8, 3, 1),
        (32, 8, 2, 2),
    )  # fmt: skip
    choices |= {f"backward {row}": (None, row) for row in backward}
    return {name: tile_changes(launch, *rows) for name, rows in choices.items()}


def tile_changes(launch: ModuleType, forward: tuple | None, backward: tuple | None) -> dict[str, Callable]:
    if forward:
        return {"rmsnorm_fwd_tile": lambda D: launch.row_tile(D, *forward)}
    return {"rmsnorm_bwd_tile": lambda D, itemsize, needs_dw: launch.row_tile(D, *backward)}


TILES = {"rmsnorm": rmsnorm_tiles}


def with_launch(function: Callable, changes: dict[str, Callable]) -> Callable:
    """`function` with other launch heuristics in its module; its backward pass too, through `launched`."""

    def changed(**inputs: object) -> object:
        with launched(changed):
            return function(**inputs)

    changed.module, changed.changes = sys.modules[function.__module__], changes
    return changed


@contextmanager
def launched(function: Callable) -> Iterator[None]:
    """The launch heuristics of a candidate made by `with_launch`; nothing for any other."""
    with patch.multiple(function.module, **function.changes) if hasattr(function, "changes") else nullcontext():
        yield


def under_its_launch(function: Callable, call: Call) -> Call:
    """The call as a candidate's own: only those with other tiles pay for the detour."""
    if not hasattr(function, "changes"):
        return call

    def wrapped() -> object:
        with launched(function):
            return call()

    return wrapped


def bench_shape(
    case: Case, shape: Shape, dtype: torch.dtype, device: torch.device, functions: dict[str, Callable], rounds: int
) -> list[dict]:
    """Check, then time every candidate on one shape. → one row for each candidate and direction"""
    inputs = case.make(shape, dtype, device)
    stream = torch.cuda.Stream() if device.type == "cuda" else None
    with torch.cuda.stream(stream):  # backward runs where forward ran, and a graph is captured on a stream of its own
        runs = checked(case, functions, inputs, dtype)
        rows = []
        for direction in ("forward", "backward") if case.differentiable else ("forward",):
            calls = {name: under_its_launch(functions[name], getattr(run, direction)) for name, run in runs.items()}
            graphs = time_graphs(calls, device, stream, rounds)
            queued = {name: host_us(call) for name, call in calls.items()} if stream else {}
            calls[COPY] = copy_of(case, shape, dtype, direction, device)
            timings = time_in_turns(calls, device, rounds=rounds)
            rows += [
                row_of(case, shape, dtype, direction, name, timings[name], graphs.get(name), queued.get(name))
                for name in calls
            ]
    return rows


COPY = "copy of as many bytes"


def copy_of(case: Case, shape: Shape, dtype: torch.dtype, direction: str, device: torch.device) -> Call:
    """Half of what the op must move is read and half is written."""
    n_bytes = bytes_of(case, shape, dtype, direction) // 2
    source = torch.randint(0, 100, (n_bytes,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def bytes_of(case: Case, shape: Shape, dtype: torch.dtype, direction: str) -> int:
    return int(case.bytes(**shape) * dtype.itemsize * (case.backward[1] if direction == "backward" else 1))


def checked(case: Case, functions: dict[str, Callable], inputs: Shape, dtype: torch.dtype) -> dict[str, Candidate]:
    """No timing on a red test: each candidate is as exact as plain PyTorch. Tiles that do not fit are left out."""
    runs = {"torch": Candidate(case, functions["torch"], inputs, dtype)}
    exact = Candidate(case, functions["torch"], inputs, torch.float64)
    exact.upstream = [up.double() for up in runs["torch"].upstream]
    truth, plain = exact.results(), runs["torch"].results()
    for name, function in functions.items():
        try:
            with launched(function):
                runs[name] = Candidate(case, function, inputs, dtype)
                results = runs[name].results()
        except Exception as error:
            if not hasattr(function, "changes"):
                raise
            print(f"  {name} does not run: {str(error).splitlines()[0]}")
            runs.pop(name, None)
            continue
        for key, value in results.items():
            assert_close(value, truth[key], plain[key], f"{case.op} {name} {key} in {dtype}")
    return runs


def time_graphs(calls: dict[str, Call], device: torch.device, stream: object, rounds: int) -> dict[str, Timing]:
    """The same calls replayed as CUDA graphs; what cannot be captured is said and left out."""
    if device.type != "cuda":
        return {}
    captured = {}
    for name, call in calls.items():
        try:
            captured[name] = capture(call, stream)
        except RuntimeError as error:
            print(f"  {name} cannot be captured: {str(error).splitlines()[0]}")
    return time_in_turns(captured, device, rounds=rounds)


def row_of(
    case: Case, shape: Shape, dtype: torch.dtype, direction: str, name: str, timing: Timing, graph: Timing | None,
    host: float | None,
) -> dict:  # fmt: skip
    """One line of the CSV, machine aside."""
    return {
        "op": case.op,
        "shape": " ".join(f"{key}={value}" for key, value in shape.items()),
        "dtype": str(dtype).removeprefix("torch."),
        "direction": direction,
        "candidate": name,
        **{key: round(value, 2) for key, value in timing._asdict().items()},
        "graph_us": round(graph.median_us, 2) if graph else "",
        "host_us": round(host, 1) if host else "",
        "bytes": bytes_of(case, shape, dtype, direction),
        "flops": 0 if name == COPY else int(case.flops(**shape) * (case.backward[0] if direction == "backward" else 1)),
    }


def add_rates(rows: list[dict], roof_gbps: float) -> None:
    """GB/s, share of the copy bandwidth and TFLOP/s. Eager call and graph both bound what the GPU needs from above:
    one may wait for the host, the other for the graph to be started."""
    for row in rows:
        us = row["gpu_us"] = min(row["median_us"], row["graph_us"] or row["median_us"])
        row["gbps"] = round(row["bytes"] / us / 1e3, 1)
        row["copy_gbps"] = round(roof_gbps, 1)
        row["share_of_copy"] = round(row["gbps"] / roof_gbps, 3)
        row["tflops"] = round(row["flops"] / us / 1e6, 2)


def print_table(rows: list[dict]) -> None:
    """One block per shape: every candidate forward and backward."""
    for shape in dict.fromkeys(row["shape"] for row in rows):
        print(f"\n{rows[0]['op']} {shape} {rows[0]['dtype']}")
        print(f"  {'':34}{'direction':>10}{'µs':>9}{'graph':>9}{'host':>8}{'of copy':>9}{'TFLOP/s':>9}")
        for row in (row for row in rows if row["shape"] == shape):
            print(
                f"  {row['candidate']:34}{row['direction']:>10}{row['median_us']:>9.1f}{row['graph_us'] or '–':>9}"
                f"{row['host_us'] or '–':>8}{row['share_of_copy']:>9.2f}{row['tflops']:>9.1f}"
            )


def write_csv(rows: list[dict], card: dict[str, str], folder: Path) -> Path:
    """Every row with the machine card; one file per op, and git keeps the older ones."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{rows[0]['op']}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *card])
        writer.writeheader()
        writer.writerows(row | card for row in rows)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=OP_NAMES, action="append", help="default: every op that has a Triton kernel")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="the shapes of the tests instead of those of models")
    parser.add_argument("--tune", action="store_true", help="our kernel with other tiles, too")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV")
    parser.add_argument("--commit", help="what is timed, where git cannot say")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    functorch_config.donated_buffer = False  # backward is repeated on one forward
    roof, card = copy_gbps(device), machine_card(device)
    card["commit"] = args.commit or card["commit"]
    print(f"{card['device']}: a copy moves {roof:.0f} GB/s; torch {card['torch']}, triton {card['triton']}")
    for op in args.op or import_module("kernels_triton").__all__:
        functions = candidates(op, device, args.tune)
        rows = []
        for shape in CASES[op].check[:2] if args.small else CASES[op].time:
            torch._dynamo.reset()
            rows += bench_shape(CASES[op], shape, dtype, device, functions, args.rounds)
        add_rates(rows, roof)
        print_table(rows)
        print(f"\nwritten to {write_csv(rows, card, args.out)}")


if __name__ == "__main__":
    main()
