"""Train a model: `python train.py model=d6 data=tinystories`, under torchrun on several GPUs. A run, top to bottom."""

import os

# OpenMP threads that find nothing to do spin by default; on a machine with other work, small models then train at a
# hundredth of their speed (197 tokens/s instead of 4,796 on two busy cores). Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # while the imports take their seconds, as in infer.py

import csv
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import checkpoint
from checkpoint import TrainState
from config import RunConfig, run_command, sweep_directory, to_yaml
from data.batches import Batch, pretrain_batches
from data.documents import TokenShards
from data.tokenizer import Tokenizer
from errors import KestrelError
from model import LanguageModel, build, config_to_dict, cost
from model.cuda_graphs import CudaGraphs
from model.layers.fp8 import MULTIPLE, load_fp8, train_in_fp8
from model.ops import OPTIMIZER, Ops, chosen_backends, compile_ahead, describe_ops, is_triton, load_ops
from optim.groups import parameter_groups
from optim.muon_adamw import MuonAdamW
from optim.schedules import ScheduleValues, make_schedule
from training import distributed, loop, run_directory
from training.cadence import Cadence
from training.console import lasting_console
from training.distributed import Device, print_main
from training.horizon import Horizon, largest_device_batch, plan
from training.journal import read_rows, replace_text
from training.machine import describe_machine, memory_bytes, peak_flops
from training.prepare import prepare_data, require_files
from training.profile import PROFILED, StepProfile, no_profile
from training.report import Reporter, tensorboard_writer
from training.run_directory import RunDirectory, flatten
from training.step import CapturedStep, Step

MANY_PASSES = 20  # over the training text, from which on a run says so
REFERENCE_DEPTH = 12  # the scaling laws are anchored at the 12-layer model of the same vocabulary


def main(run: RunConfig) -> None:
    """Join the other ranks, train, and leave them whatever happened."""
    with lasting_console():
        join_and_train(run)


def join_and_train(run: RunConfig) -> None:
    if run.tensorboard:
        tensorboard_writer()  # missing, it is missed now rather than when the data is ready
    device = distributed.init(run.hardware)
    try:
        distributed.require_same(dict(flatten(settings(run))), device)
        ops = load_ops(run.kernels, device.device, device.dtype, generates=False)
        cost.require_memory(run.model, run.hardware.device_batch_size, memory_bytes(device.device))
        directory = choose_directory(run, device)
        with run_directory.lock(directory.path, device.is_main):
            train(run, directory, ops, device)
    except torch.OutOfMemoryError as error:
        raise KestrelError(
            "the GPU's memory is full: lower hardware.device_batch_size (rows at a time; the step stays the same), "
            "model.sequence_len or the model's depth, or keep less with hardware.recompute=[block]"
        ) from error
    finally:
        distributed.cleanup()


def train(run: RunConfig, directory: RunDirectory, ops: Ops, device: Device) -> None:
    """The table of contents of a run."""
    kernels = describe_ops(run.kernels, device.device, device.dtype)
    print_main(f"run: {directory.path} on {device.describe()}; kernels: {kernels}")
    tokenizer, train_shards, val_shards = prepare_data(run.data, run.tokenizer, directory.start, device)
    model = new_model(run, tokenizer, ops, device)
    horizon = plan_horizon(run, model, device)
    optimizer = new_optimizer(run, model, horizon, ops, device)
    state = restore(directory.start, model, optimizer, device)
    schedule = make_schedule(run.optim, horizon.num_iterations)
    say_passes(horizon, train_shards)
    batches = training_batches(run, train_shards, tokenizer, horizon, state, device)
    reporter = new_reporter(run, directory, tokenizer, model, horizon, state, device)
    cadence = Cadence(
        directory.path, run.stage, settings(run), model, optimizer, tokenizer, val_shards, horizon, state, reporter,
        device,
    )  # fmt: skip
    step = new_step(run, model, optimizer, horizon, device, prepare=use_fp8(run, model, horizon, device))
    compile_step(run, step, schedule, tokenizer, horizon, device)
    profile = new_profile(run, directory, horizon, state, reporter, device)
    try:
        trained = state.step < horizon.num_iterations
        complete = loop.train(
            step, schedule, batches, horizon, state, run.stage, cadence, reporter, device, profile
        )  # fmt: skip
    finally:
        step.close()
        batches.close()
        reporter.close()
    if device.is_main:
        if not trained:
            print_main("this run was complete already and nothing was trained: run=NAME or resume=never begins another")
        say_goodbye(directory.path, horizon, state, complete)
        note_in_summary(run, directory.path, state)


def settings(run: RunConfig) -> dict[str, Any]:
    """The resolved config as plain data: what a checkpoint keeps, and what a run is compared with when it goes on."""
    return dataclasses.asdict(run) | {"model": config_to_dict(run.model)}


def choose_directory(run: RunConfig, device: Device) -> RunDirectory:
    """Rank 0 chooses, all agree."""

    def choose() -> RunDirectory:
        require_files(run.data)
        return run_directory.open_run(parent, name, run.resume, settings(run))

    sweep = sweep_directory()
    parent, name = (sweep.parent, sweep.name) if sweep else (Path(run.runs_dir), run.run)
    return distributed.on_main(choose, device)


def new_model(run: RunConfig, tokenizer: Tokenizer, ops: Ops, device: Device) -> LanguageModel:
    """A model with its first values, the same on every rank."""
    model = build(run.model, tokenizer.vocab_size, ops, device.dtype)
    model.to_empty(device=device.device)
    model.init_weights(run.seed)
    model.recompute(run.hardware.recompute)
    return model


def plan_horizon(run: RunConfig, model: LanguageModel, device: Device) -> Horizon:
    """Length, batch and scales of the run, from the counts of this model and of the reference model."""
    counts = cost.parameter_counts(model)
    config = run.model
    return plan(
        run.stage,
        scaling_parameters=cost.scaling_parameters(model),
        reference_parameters=cost.scaling_parameters(reference_model(model)),
        flops_per_token=cost.flops_per_token(model),
        sequence_len=config.sequence_len,
        world_size=device.world_size,
        device_batch_size=run.hardware.device_batch_size,
        max_device_batch_size=largest_device_batch(
            sequence_len=config.sequence_len,
            n_layer=config.n_layer,
            n_embd=config.n_embd,
            parameters=counts["total"],
            memory_bytes=device.memory_bytes,
        ),
        weight_decay=run.optim.weight_decay,
    )


def say_passes(horizon: Horizon, shards: TokenShards) -> None:
    """Warn of a text that will be known by heart."""
    passes = horizon.num_iterations * horizon.total_batch_size / max(1, shards.n_tokens)
    if passes > MANY_PASSES:
        print_main(
            f"{shards.n_tokens:,} tokens will be read {passes:,.0f} times: a model soon has so short a text by heart; "
            f"stage.num_iterations={max(1, round(horizon.num_iterations / passes))} reads it once"
        )


def reference_model(model: LanguageModel) -> LanguageModel:
    """The same family at REFERENCE_DEPTH, on the meta device; a family without a dial is its own reference."""
    config = model.config
    if not hasattr(config, "depth"):
        return model
    return build(dataclasses.replace(config, depth=REFERENCE_DEPTH), model.vocab_size, model.ops)


def new_optimizer(run: RunConfig, model: LanguageModel, horizon: Horizon, ops: Ops, device: Device) -> MuonAdamW:
    """The configured update rules on the model's parameters."""
    groups = parameter_groups(
        model,
        run.optim,
        n_embd=run.model.n_embd,
        lr_scale=horizon.lr_scale,
        weight_decay=horizon.weight_decay,
    )
    return MuonAdamW(
        groups,
        ops,
        compute_dtype=device.dtype,
        copies=model.keep_copies(),
        rates_on_device=device.cuda_graph,
        reduce_dtype=distributed.DTYPES[run.hardware.reduce_dtype],
    )


def restore(start: Path | None, model: LanguageModel, optimizer: MuonAdamW, device: Device) -> TrainState:
    """Weights, optimizer, random state and position of the checkpoint to go on from; a fresh state without one."""
    if start is None:
        return TrainState()
    saved = checkpoint.read_checkpoint(start)
    if "quant" in saved.config:
        raise KestrelError(f"{start} is quantised, to be read only: go on from the checkpoint that it was made from")
    weights = dict(model.named_parameters())
    tensors = checkpoint.load_tensors(start, "model", checkpoint.spec_of(weights), device.device)
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter.copy_(tensors[name])
    model.refresh_copies()
    optimizer.load_state_tensors(checkpoint.load_tensors(start, "optimizer", optimizer.state_spec()))
    state = TrainState.from_json(saved.state)
    checkpoint.restore_rng(state.rng, device.device)
    print_main(f"going on from {start} (step {state.step})")
    return state


def training_batches(
    run: RunConfig, shards: TokenShards, tokenizer: Tokenizer, horizon: Horizon, state: TrainState, device: Device
) -> Iterator[Batch]:
    """This rank's micro-batches from where `state` stands."""
    return pretrain_batches(
        shards,
        batch_size=horizon.device_batch_size,
        sequence_len=run.model.sequence_len,
        rank=device.rank,
        world_size=device.world_size,
        seed=run.seed,
        state=state.stream or None,
        device=device.device,
        bos_id=tokenizer.bos_id,
    )


def use_fp8(run: RunConfig, model: LanguageModel, horizon: Horizon, device: Device) -> Callable[[], None] | None:
    """From now on train with 8-bit products, if that is wanted. → what every step begins with"""
    if not run.hardware.fp8:
        return None
    rows, length = horizon.device_batch_size, run.model.sequence_len
    if rows * length % MULTIPLE != 0:
        raise KestrelError(
            f"hardware.fp8=true needs a multiple of {MULTIPLE} tokens at a time, got {rows} rows of {length}: "
            "change hardware.device_batch_size or model.sequence_len"
        )
    fp8 = train_in_fp8(model, load_fp8(run.kernels, device.device))
    print_main(fp8.describe())
    return fp8.refresh


def new_step(
    run: RunConfig,
    model: LanguageModel,
    optimizer: MuonAdamW,
    horizon: Horizon,
    device: Device,
    prepare: Callable[[], None] | None = None,
) -> Step:
    """What the device does in a step: started kernel by kernel, or captured in CUDA graphs."""
    forward = torch.compile(model, dynamic=False) if run.hardware.compile else model
    options = dict(
        accumulation=horizon.accumulation, device=device.device, grad_clip=run.optim.grad_clip, prepare=prepare
    )
    if not device.cuda_graph:
        return Step(forward, optimizer, **options)
    return CapturedStep(forward, optimizer, capture=CudaGraphs(), messages=not device.local_graphs, **options)


def compile_step(
    run: RunConfig,
    step: Step,
    schedule: Callable[[int], ScheduleValues],
    tokenizer: Tokenizer,
    horizon: Horizon,
    device: Device,
) -> None:
    """Have the kernels of the first step compiled side by side; what torch.compile makes it compiles itself."""
    if run.hardware.compile:
        return
    shape = (horizon.device_batch_size, run.model.sequence_len)
    tokens = torch.zeros(shape, dtype=torch.int64, device=device.device)
    backends = chosen_backends(run.kernels)
    updates = device.world_size == 1 and all(is_triton(backends[op]) for op in OPTIMIZER)
    what = (run.model, tokenizer.vocab_size, shape, step.accumulation > 1, step.grad_clip > 0, run.hardware, backends)
    what = (*what, run.optim, device.dtype, device.world_size)
    work = partial(step.rehearse, Batch(tokens, tokens, None, None, {}), schedule(0), updates=updates)
    compile_ahead(what, work, run.kernels, device.device, print_main)


def new_profile(
    run: RunConfig, directory: RunDirectory, horizon: Horizon, state: TrainState, reporter: Reporter, device: Device
) -> StepProfile:
    """Rank 0 profiles a step of its own, the last one if the run is over before that."""
    if not run.hardware.profile or not device.is_main:
        return no_profile()
    at_step = min(state.step + PROFILED, horizon.num_iterations - 1)
    return StepProfile(directory.path, device.device, at_step, reporter.say)


def new_reporter(
    run: RunConfig,
    directory: RunDirectory,
    tokenizer: Tokenizer,
    model: LanguageModel,
    horizon: Horizon,
    state: TrainState,
    device: Device,
) -> Reporter:
    """Open the run's folder: config, tokenizer, environment, metrics."""
    peak = peak_flops(device.device)
    reporter = Reporter(
        directory.path,
        num_steps=horizon.num_iterations,
        start=state,
        resumed=directory.resumed,
        flops_per_token=cost.flops_per_token(model),
        peak_flops=peak * device.world_size if peak else None,
        is_main=device.is_main,
        tensorboard=run.tensorboard,
    )
    if device.is_main:
        replace_text(directory.path / "config.yaml", [to_yaml(settings(run))])
        tokenizer.save(directory.path)
    reporter.environment(
        describe_machine(device.device)
        | {
            "dtype": str(device.dtype),
            "ranks": device.world_size,
            "cuda_graph": device.cuda_graph,
            "fp8": run.hardware.fp8,
            "seed": run.seed,
            "kernels": chosen_backends(run.kernels),
        }
    )
    counts = cost.parameter_counts(model)
    reporter.say(
        f"model: {counts['total']:,} parameters, {cost.flops_per_token(model):,} FLOPs per token; "
        f"{horizon.num_iterations} steps of {horizon.total_batch_size:,} tokens "
        f"({horizon.device_batch_size} rows × {horizon.accumulation} × {device.world_size})"
    )
    return reporter


def say_goodbye(path: Path, horizon: Horizon, state: TrainState, complete: bool) -> None:
    """What came out, where everything is, and how to go on."""
    if not complete:
        print_main(f"saved at step {state.step} of {horizon.num_iterations}; the same command goes on from there")
        return
    scores = {row["step"]: row["val_bpb"] for row in read_rows(path / "metrics.jsonl") if "val_bpb" in row}
    untrained = f", untrained {scores[0]:.4f}" if 0 in scores else ""
    print_main(
        f"complete: {state.step} steps, {state.tokens_seen:,} tokens, {state.elapsed_s:.0f} s of training; validation "
        f"{scores[max(scores)]:.4f} bits per byte (best {state.best_bpb:.4f}{untrained})"
    )
    print_main(
        f"everything is in {path}: " + ", ".join(sorted(file.name for file in path.iterdir() if file.name[0] != "."))
    )
    print_main(f"tell a story with it: python infer.py ckpt={path}")


def note_in_summary(run: RunConfig, path: Path, state: TrainState) -> None:
    """In a sweep: this job's row of summary.csv, beside the folders of all jobs; a job run again replaces its row."""
    if sweep_directory() is None:
        return
    summary = path.parent / "summary.csv"
    rows = list(csv.DictReader(summary.open())) if summary.exists() else []
    overrides = dict(item.split("=", 1) for item in path.name.split(",") if "=" in item)
    rows = [row for row in rows if row["job"] != path.name]
    rows.append({"job": path.name, **overrides, "steps": state.step, "bpb": state.best_bpb, "seconds": state.elapsed_s})
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with summary.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, columns)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run_command("train", main)
