"""Each op against its peers: `python -m bench.kernels --op rmsnorm` prints a table and writes bench/results/*.csv.

Candidates are our kernel, the plain PyTorch reference, the reference under torch.compile, and what else is installed
(bench/peers.py); `--tune` adds our kernel with other tiles, to choose the numbers in kernels_triton/launch.py. Nothing
of ours is timed before its outputs and gradients have been found as exact as plain PyTorch's. Times are of the forward
pass, of the backward pass, and of both. The roof is a copy of 2 GiB; a copy of just as many bytes as the op must move
stands in the table too, because starting and ending a kernel costs it some microseconds as well. Ops that are bound by
matrix products have those products alone, by cuBLAS, as their floor.
"""

import argparse
import csv
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch
import torch._functorch.config as functorch_config
from torch import Tensor

import kernels_torch
from bench.peers import UNCHUNKED, peers, products_of
from bench.timing import (
    RESULTS,
    Call,
    Timing,
    capture,
    copy_gbps,
    folder_for,
    host_us,
    machine_card,
    time_in_turns,
)
from kernels_torch.cases import CASES, Case, Shape
from model.ops import find_op, load_backend, prove
from tests.numerics import assert_close, exact_and_plain, floating, outputs

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Candidate:
    """One way to compute an op: calls to time its forward pass, its backward pass, and both."""

    def __init__(self, case: Case, function: Callable, inputs: Shape, upstream: tuple[Tensor, ...] | None) -> None:
        self.function, self.inputs = function, inputs
        self.leaves = [inputs[n].requires_grad_() for n in case.differentiable if inputs[n] is not None]
        self.names = [n for n in case.differentiable if inputs[n] is not None]
        self.outs = outputs(function, inputs)
        self.upstream = gradients_for(self.outs) if upstream is None else upstream

    def forward(self) -> tuple[Tensor, ...]:
        return outputs(self.function, self.inputs)

    def backward(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(floating(self.outs), self.leaves, self.upstream, retain_graph=True)

    def both(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(floating(self.forward()), self.leaves, self.upstream)

    def results(self) -> dict[str, Tensor]:
        grads = zip(self.names, self.backward(), strict=True) if self.leaves else []
        outs = {f"output {i}": out.detach() for i, out in enumerate(self.outs)}
        return outs | {f"gradient of {name}": grad for name, grad in grads}


def gradients_for(outs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Random incoming gradients, made where the outputs are."""
    generator = torch.Generator(outs[0].device).manual_seed(1)
    return tuple(
        torch.randn(out.shape, generator=generator, device=out.device, dtype=torch.float32).to(out.dtype)
        for out in floating(outs)
    )


def candidates(op: str, device: torch.device, tune: bool) -> dict[str, Callable]:
    """Name → function. What lacks the op is left out of the table rather than replaced by something else."""
    reference = getattr(kernels_torch, op)
    plain = UNCHUNKED.get(op, reference)
    found = {"torch": reference, "torch.compile": torch.compile(plain, fullgraph=True)}
    if device.type == "cuda":
        found |= peers(op)
    if device.type == "cuda" and op in import_module("kernels_triton").__all__:
        found["triton"] = ours = find_op(load_backend("triton", device), op)
        prove(op, ours, device)
        portable = load_backend("triton_portable", device)
        if op in portable.__all__ and import_module("kernels_triton.launch").is_hopper(device):
            found["triton portable"] = find_op(portable, op)
        if tune and op in TILES:
            found |= {name: with_launch(ours, changes) for name, changes in TILES[op]().items()}
    return found


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
        products = products_of(case.op, inputs)
        rows = []
        for direction in DIRECTIONS if case.differentiable else DIRECTIONS[:1]:
            calls = {name: under_its_launch(functions[name], getattr(run, direction)) for name, run in runs.items()}
            memory = {name: peak_mib(call) for name, call in calls.items()} if stream else {}
            short = {name: call for name, call in calls.items() if is_short(call)} if stream else {}
            graphs = time_graphs(short, device, stream, rounds)
            queued = {name: host_us(call) for name, call in short.items()}
            calls |= {PRODUCTS: products[direction]} if products else {}
            calls[COPY] = copy_of(case, shape, dtype, direction, device)
            timings = time_in_turns(calls, device, rounds=rounds)
            rows += [
                row_of(case, shape, dtype, direction, name, timings[name], graphs.get(name), queued.get(name))
                | {"peak_mib": memory.get(name, "")}
                for name in calls
            ]
    return rows


DIRECTIONS = ("forward", "backward", "both")
COPY = "copy of as many bytes"
PRODUCTS = "its products alone"


def is_short(call: Call) -> bool:
    """Whether the host may be what a call waits for: many milliseconds hide it, and a graph would say no more."""
    call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - begin < 2e-3


def peak_mib(call: Call) -> float:
    """MiB that a call holds at its worst beyond what was there, its results included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def copy_of(case: Case, shape: Shape, dtype: torch.dtype, direction: str, device: torch.device) -> Call:
    """Half of what the op must move is read and half is written."""
    n_bytes = bytes_of(case, shape, dtype, direction) // 2
    source = torch.randint(0, 100, (n_bytes,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def bytes_of(case: Case, shape: Shape, dtype: torch.dtype, direction: str) -> int:
    return int(case.bytes(**shape) * dtype.itemsize * factor(backward_of(case, shape)[1], direction))


def flops_of(case: Case, shape: Shape, direction: str) -> int:
    return int(case.flops(**shape) * factor(backward_of(case, shape)[0], direction))


def backward_of(case: Case, shape: Shape) -> tuple[float, float]:
    """Work of a backward pass, as multiples of the forward pass's flops and bytes."""
    return case.backward(**shape) if callable(case.backward) else case.backward


def factor(backward: float, direction: str) -> float:
    """Work of a direction as a multiple of the forward pass."""
    return {"forward": 1.0, "backward": backward, "both": 1.0 + backward}[direction]


def checked(case: Case, functions: dict[str, Callable], inputs: Shape, dtype: torch.dtype) -> dict[str, Candidate]:
    """No timing of ours on a red test. Peers and tiles that cannot do the shape are left out, and it is said."""
    runs = {"torch": Candidate(case, functions["torch"], case.cast(inputs, dtype), None)}
    upstream = runs["torch"].upstream
    judged = part_of(case, inputs, inputs)
    judged_upstream = tuple(part_of(case, inputs, {"output": up})["output"] for up in upstream)
    exact, plain = exact_and_plain(case.op, case.cast(judged, dtype), judged_upstream)
    for name, function in functions.items():
        ours = name in ("torch", "triton", "triton portable")
        try:
            with launched(function):
                run = Candidate(case, function, case.cast(inputs, dtype), upstream)
                results = run.results()
            for key, value in part_of(case, inputs, results).items():
                if value.is_floating_point():
                    assert_close(value, exact[key], plain[key], f"{case.op} {name} {key} in {dtype}")
            runs[name] = run
        except AssertionError as error:
            if ours or hasattr(function, "changes"):
                raise
            print(f"  {name} is less exact than plain PyTorch, and timed all the same: {error}")
            runs[name] = run
        except Exception as error:
            if ours:
                raise
            print(f"  {name} does not run: {(str(error) or type(error).__name__).splitlines()[0]}")
    return runs


def part_of(case: Case, inputs: Shape, values: Shape) -> Shape:
    """Of every tensor what belongs to the part of the problem that is judged: all of it for most ops."""
    if case.part is None:
        return values
    return {name: case.part(name, x, inputs) if isinstance(x, Tensor) else x for name, x in values.items()}


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
        "flops": 0 if name == COPY else flops_of(case, shape, direction),
    }


def add_rates(rows: list[dict], roof_gbps: float) -> None:
    """GB/s, share of the copy bandwidth, TFLOP/s, and share of the floor's speed.

    The floor is the products alone where an op has them, else its bytes at the copy bandwidth. Eager call and graph
    both bound what the GPU needs from above: one may wait for the host, the other for the graph to be started.
    """
    for row in rows:
        row["gpu_us"] = min(row["median_us"], row["graph_us"] or row["median_us"])
    products = {(row["shape"], row["direction"]): row["gpu_us"] for row in rows if row["candidate"] == PRODUCTS}
    for row in rows:
        row["gbps"] = round(row["bytes"] / row["gpu_us"] / 1e3, 1)
        row["copy_gbps"] = round(roof_gbps, 1)
        row["share_of_copy"] = round(row["gbps"] / roof_gbps, 3)
        row["tflops"] = round(row["flops"] / row["gpu_us"] / 1e6, 2)
        floor_us = products.get((row["shape"], row["direction"]), row["bytes"] / roof_gbps / 1e3)
        row["share_of_floor"] = round(floor_us / row["gpu_us"], 3)


def print_table(rows: list[dict]) -> None:
    """One block per shape: every candidate in every direction."""
    for shape in dict.fromkeys(row["shape"] for row in rows):
        print(f"\n{rows[0]['op']} {shape} {rows[0]['dtype']}")
        heads = ("µs", "graph", "host", "peak MiB", "of copy", "of floor", "TFLOP/s")
        print(f"  {'':34}{'direction':>10}" + "".join(f"{head:>10}" for head in heads))
        for row in (row for row in rows if row["shape"] == shape):
            print(
                f"  {row['candidate']:34}{row['direction']:>10}{row['median_us']:>10.1f}{row['graph_us'] or '–':>10}"
                f"{row['host_us'] or '–':>10}{row['peak_mib'] if row['peak_mib'] != '' else '–':>10}"
                f"{row['share_of_copy']:>10.3f}{row['share_of_floor']:>10.3f}{row['tflops']:>10.1f}"
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
    parser.add_argument("--op", choices=CASES, action="append", help="default: every op that has a Triton kernel")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="the shapes of the tests instead of those of models")
    parser.add_argument("--tune", action="store_true", help="our kernel with other tiles, too")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--out", type=Path, help="folder of the CSV; default: bench/results, on a CPU local/ in it")
    parser.add_argument("--commit", help="what is timed, where git cannot say")
    args = parser.parse_args()
    if args.tune and set(args.op or []) - set(TILES) | (set() if args.op else {"every op"}):
        parser.error(f"--tune knows the tiles of --op {' '.join(TILES)} only")
    if args.device == "cpu":
        print("no GPU, where --small is quicker: ours are not timed, as Triton's interpreter would say nothing of them")
    args.out = args.out or folder_for(RESULTS, args.device, args.small)
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
