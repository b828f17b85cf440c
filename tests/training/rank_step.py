"""What one rank of tests/training/test_step_of_ranks.py does: eager steps and captured ones on batches of its own."""

from pathlib import Path

import torch
import torch.distributed as dist

from errors import KestrelError
from model.cuda_graphs import CudaGraphs
from optim import muon_adamw
from optim.schedules import make_schedule
from tests.model.tiny import tokens, torch_ops, triton_ops
from tests.training.recorded_graph import RecordedGraphs
from tests.training.test_step import OPTIMS, STEPS, batch_of, new_step, state_of
from training.step import EAGER_STEPS

CASES = {
    "muon": dict(optim="muon_adamw"),
    "muon, three micro-batches, clipped": dict(optim="muon_adamw", accumulation=3, grad_clip=0.1),
    "muon, two micro-batches in bf16": dict(optim="muon_adamw", accumulation=2, dtype=torch.bfloat16),
    "muon, gradients travel in bf16": dict(optim="muon_adamw", dtype=torch.bfloat16, reduce_dtype=torch.bfloat16),
    "adamw, two micro-batches": dict(optim="adamw", accumulation=2),
}
KINDS = ("eager", "captured", "local")


def cases_of(world_size: int, kernels: str | None = None) -> list[str]:
    """On a CPU all on three ranks, which share nothing evenly, and each optimizer on two: messages take long there."""
    return list(CASES) if world_size == 3 or kernels else ["muon", "adamw, two micro-batches"]


def main(rank: int, folder: str, world_sizes: tuple[int, ...], kernels: str | None = None) -> None:
    """Be rank `rank` of each world; kernels: on a GPU of its own."""
    torch.set_num_threads(1)
    muon_adamw.BUCKET_BYTES = 16 * 2**10  # so that there are some
    for world_size in world_sizes:
        if rank < world_size:
            rendezvous = f"file://{folder}/rendezvous{world_size}"
            backend, device = ("gloo", torch.device("cpu")) if kernels is None else ("nccl", torch.device("cuda", rank))
            if kernels is not None:
                torch.cuda.set_device(device)
            dist.init_process_group(
                backend, init_method=rendezvous, rank=rank, world_size=world_size,
                device_id=device if kernels else None,
            )  # fmt: skip
            be_rank(rank, world_size, Path(folder), device, kernels)
            dist.destroy_process_group()


def be_rank(rank: int, world_size: int, folder: Path, device: torch.device, kernels: str | None) -> None:
    out = {}
    for name in cases_of(world_size, kernels):
        for kind in KINDS:
            graphs = {"eager": None}.get(kind, RecordedGraphs() if kernels is None else CudaGraphs())
            out[name, kind] = train(a_step(CASES[name], kind, graphs, device, kernels), rank, world_size)
            if graphs is not None and kernels is None:
                out[name, kind] |= {"operations": graphs.operations, "released": graphs.released}
    if kernels is None:
        out["failing"] = one_rank_fails(rank)
    torch.save(out, folder / f"steps_{world_size}_{rank}.pt")


def a_step(case: dict, kind: str, graphs: object, device: torch.device, kernels: str | None) -> object:
    ops = {None: torch_ops, "torch": torch_ops, "triton": triton_ops}[kernels](device)
    options = dict(messages=kind == "captured") if graphs is not None else {}
    given = dict(dtype=torch.float32 if kernels is None else torch.bfloat16) | case
    return new_step(**given, capture=graphs, device=device, ops=ops, **options)


def train(step: object, rank: int, world_size: int) -> dict:
    """Steps with a validation and a gathering of the state between them. → what came out"""
    schedule, seen, begun = make_schedule(OPTIMS["muon_adamw"], 20), [], []
    for number in range(STEPS):
        for i in range(step.accumulation):
            at = (step.accumulation * number + i) * world_size + rank
            step.add(batch_of(at, step.loss.device), first=i == 0)
        begun.append(sum(len(group.begun) for group in step.optimizer.groups))
        result = step.update(schedule(number))
        seen.append(torch.stack([step.loss, result.grad_norm]).tolist())
        if number in (1, EAGER_STEPS + 1):
            validate(step, rank)
            state_of(step)
    state = {name: x.detach().cpu().clone() for name, x in state_of(step).items()}
    step.close()
    n_buckets = sum(len(group.buckets) for group in step.optimizer.groups)
    return {"seen": seen, "state": state, "begun": begun, "n_buckets": n_buckets}


@torch.no_grad()
def validate(step: object, rank: int) -> None:
    row = tokens(5, 21, seed=rank, device=step.loss.device)
    total = step.model(row[:, :-1], row[:, 1:], reduction="none").sum()
    dist.all_reduce(total)


def one_rank_fails(rank: int) -> str:
    """The last one cannot capture: what each rank says."""

    class Failing(RecordedGraphs):
        """Others record without running, as a GPU does: gloo would send messages meanwhile."""

        def __call__(self, function):
            if rank == dist.get_world_size() - 1:
                raise KestrelError("no graph here")
            return function

    step = new_step(capture=Failing())
    try:
        train(step, rank, dist.get_world_size())
    except KestrelError as error:
        return str(error)
    return "trained"
