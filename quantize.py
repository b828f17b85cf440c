"""Make a smaller checkpoint to read with: `python quantize.py quant=int8 ckpt=runs/d12`.

Its matrices are codes of 8 or 4 bits (model/quantised.py), all else is as it was. infer.py takes it like any other; to
train on, the checkpoint it was made from is needed. conf/quantize.yaml lists every key.
"""

from pathlib import Path

import torch

import checkpoint
from checkpoint import Checkpoint
from config import QuantizeConfig, run_command
from data.tokenizer import tokenizer_from_json
from errors import KestrelError
from model import build, config_from_dict
from model.ops import KernelConfig, load_ops
from model.quantised import Quantisation, quantisation_named, quantise_model, tensors_of
from training.distributed import choose_device

RAW_KEYS = ("ckpt", "out", "runs_dir")  # taken as typed


def main(config: QuantizeConfig) -> None:
    quant = quantisation_named(config.quant, config.quant_group)
    if quant is None:
        raise KestrelError("quant= says what to make of the weights: int8, int4 or fp8")
    saved = checkpoint.read_checkpoint(checkpoint.find_asked(config.ckpt, config.runs_dir))
    out = folder_for(config.out, saved, quant)
    path = write_quantised(saved, quant, out, choose_device(config.device, local_rank=0))
    before, after = (file_bytes(folder) for folder in (saved.path, path))
    print(f"{path}: {quant}, {after / 1e6:,.1f} MB where {saved.path.name} has {before / 1e6:,.1f} MB")
    print(f"read with it: python infer.py ckpt={out}")


def folder_for(out: str | None, saved: Checkpoint, quant: Quantisation) -> Path:
    """Where the new checkpoint goes: beside the run it comes from unless something else is said."""
    run = saved.path.resolve().parent.parent
    folder = run.with_name(f"{run.name}-{quant.form}") if out is None else Path(out).expanduser()
    if out == "":
        raise KestrelError("out= is empty: name a folder, or leave it out")
    if checkpoint.list_checkpoints(folder):
        raise KestrelError(f"{folder} holds checkpoints already: name another folder with out=, or delete it")
    return folder


def write_quantised(saved: Checkpoint, quant: Quantisation, out: Path, device: torch.device) -> Path:
    """Read, quantise and save. → the folder of the new checkpoint"""
    if "quant" in saved.config:
        raise KestrelError(f"{saved.path} is quantised already: give the checkpoint that it was made from")
    vocab_size = tokenizer_from_json(saved.tokenizer_json).vocab_size
    model = build(config_from_dict(saved.config.get("model", {})), vocab_size, load_ops(KernelConfig(), device))
    weights = checkpoint.load_tensors(saved.path, "model", checkpoint.spec_of(dict(model.named_parameters())), device)
    model.load_state_dict(weights, assign=True)
    quantise_model(model, quant)
    return checkpoint.save(
        out,
        saved.step,
        model=tensors_of(model),
        optimizer={},
        state=saved.state,
        config=saved.config | {"quant": quant._asdict()},
        tokenizer_json=saved.tokenizer_json,
    )


def file_bytes(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


if __name__ == "__main__":
    run_command("quantize", main, raw_keys=RAW_KEYS)
