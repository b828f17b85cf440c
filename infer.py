"""Continue a text with a trained model, talk with it, or answer a file: `python infer.py prompt="Once upon a time"`.

The newest run answers, or the one that `ckpt=` names. What the model is comes from its checkpoint, which is read as
data and verified. conf/infer.yaml lists every key.

    python infer.py                                     a story from its beginning
    python infer.py prompt="No, (not) me: said the fox" temperature=0.5 num_samples=3
    echo "The old mill" | python infer.py max_new_tokens=100 > story.txt
    python infer.py mode=chat
    python infer.py mode=batch input=prompts.jsonl output=answers.jsonl
"""

import os
import signal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train.py

if __name__ == "__main__":  # before the imports, which take seconds: until there is a story Ctrl-C needs no answer
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import dataclasses
import sys
from pathlib import Path

import torch

import checkpoint
from checkpoint import Checkpoint
from checkpoint.manifest import read_manifest
from config import InferConfig, run_command
from data.tokenizer import tokenizer_from_json
from errors import KestrelError
from inference.batch import run_batch
from inference.chat import run_chat
from inference.console import close_quietly, note, read_prompt, tell
from inference.engine import Engine, cast_weights
from inference.request import stops_of
from kernels_torch.quantised_weight import CODES
from model import LanguageModel, build, config_from_dict
from model.ops import Ops, describe_ops, load_ops
from model.quantised import (
    Quantisation,
    load_quantised,
    quantisation_named,
    quantisation_of,
    quantise_model,
    quantised_layers,
    spec_of_quantised,
)
from training import distributed
from training.distributed import Device, HardwareConfig

RAW_KEYS = (
    "prompt",
    "ckpt",
    "runs_dir",
    "input",
    "output",
    "stop",
)  # taken as typed, whatever quotes, commas or brackets they hold

# A second CPU thread does not make a token of such a model faster: d2 takes 1.6 ms with one and with two. But threads
# wait for each other at every product, and on a busy machine with two cores that made one token in ten take 280 ms.
SMALL_MODEL = 10_000_000  # parameters


def main(config: InferConfig) -> None:
    """Find the checkpoint, load it, do what the mode says; 130 is the exit status of a program stopped by Ctrl-C."""
    if sys.stdout is None and config.mode != "batch":
        raise KestrelError("standard output is closed, so a story has nowhere to go: write it to a file (> story.txt)")
    try:
        complete = {"generate": generate, "chat": chat, "batch": batch}[config.mode](config)
    except BrokenPipeError:
        close_quietly()
        return
    except OSError as error:
        target = error.filename or (config.output if config.mode == "batch" else "standard output")
        if sys.stdout is not None:
            close_quietly()
        raise KestrelError(f"cannot write to {target}: {error.strerror or error}") from error
    except KeyboardInterrupt:
        complete = False
    if not complete:
        sys.exit(130)


def generate(config: InferConfig) -> bool:
    """Continue one prompt. → False if interrupted, like those below"""
    refuse(config, "input", "output")
    stop, engine = stops_of(config.stop), load_engine(config)
    prompt = read_prompt(config.prompt)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return tell(engine, prompt, config, stream=config.stream, stop=stop)


def chat(config: InferConfig) -> bool:
    """Talk, beginning with the prompt if there is one."""
    refuse(config, "input", "output")
    stop, engine = stops_of(config.stop), load_engine(config)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run_chat(engine, config.sampling(), config.prompt, stop)
    return True


def batch(config: InferConfig) -> bool:
    """Answer the lines of a file."""
    refuse(config, "prompt")
    for key in ("input", "output"):
        if not getattr(config, key):
            raise KestrelError(f"mode=batch needs {key}=: input= has a prompt on every line, output= gets the answers")
        path = os.path.expanduser(getattr(config, key))
        if os.path.exists(path) and not os.path.isfile(path):
            raise KestrelError(f"{key}={path} is not a regular file: both are read before the first answer")
    stop, engine = stops_of(config.stop), load_engine(config)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    files = (Path(path).expanduser() for path in (config.input, config.output))
    options = dict(stop=stop, model=engine.name, any_model=config.any_model)
    return run_batch(engine, config.sampling(), *files, **options)


def refuse(config: InferConfig, *keys: str) -> None:
    """Refuse keys that would mean nothing in this mode."""
    for key in keys:
        if getattr(config, key) is not None:
            raise KestrelError(f"{key}= means nothing with mode={config.mode}: leave it out")


def load_engine(config: InferConfig) -> Engine:
    """The model and tokenizer of the checkpoint that `config` means, on the device it asks for."""
    check_hardware(config.hardware)
    saved = checkpoint.read_checkpoint(checkpoint.find_asked(config.ckpt, config.runs_dir))
    device = distributed.init(with_dtype_of(saved, config.hardware))
    ops = load_ops(config.kernels, device.device, device.dtype, trains=False)
    tokenizer = tokenizer_from_json(saved.tokenizer_json)
    model = load_model(saved, tokenizer.vocab_size, ops, device, quantisation_named(config.quant, config.quant_group))
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    if config.hardware.threads is None and n_parameters < SMALL_MODEL:
        torch.set_num_threads(1)
    note(
        f"{saved.path}: step {saved.step}, {saved.config['model']['family']} with {n_parameters:,} parameters, "
        f"{weights_of(model)}{f'{config.quant_cache} cache, ' if config.quant_cache else ''}"
        f"{device.device}, {str(device.dtype).removeprefix('torch.')}, "
        f"kernels: {describe_ops(config.kernels, device.device, device.dtype)}"
        + (", steps in CUDA graphs" if device.cuda_graph else "")
    )
    max_rows = {"generate": config.num_samples, "chat": 1, "batch": config.max_rows}[config.mode]
    return Engine(
        model,
        tokenizer,
        max_rows=max_rows,
        graphs=device.cuda_graph,
        speculate=config.speculate,
        quant_cache=config.quant_cache,
        name=name_of(saved, config.quant),
    )


def name_of(saved: Checkpoint, quant: str | None) -> str:
    """Run, step and the first digits of the manifest's hash: the same wherever the folder lies, and for no other."""
    run = saved.path.parent.parent if saved.path.parent.name == "checkpoints" else saved.path
    words = [run.resolve().name, f"step {saved.step}", read_manifest(saved.path)["sha256"][:8], quant]
    return " ".join(word for word in words if word)


def check_hardware(hardware: HardwareConfig) -> None:
    """Refuse what would change nothing here."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise KestrelError("infer.py runs as one process: start it with python instead of torchrun")
    if hardware.compile:
        raise KestrelError("hardware.compile=true is for training: infer.py runs the model as it is, leave it out")
    usuals = dict(fp8=False, reduce_dtype="float32", recompute=[], profile=False)
    for key, usual in usuals.items():
        if (value := getattr(hardware, key)) != usual:
            raise KestrelError(f"hardware.{key} is for training: infer.py has no use for {value}, leave it out")
    if hardware.device_batch_size != -1:
        raise KestrelError("hardware.device_batch_size is for training: infer.py takes num_samples instead")


def with_dtype_of(saved: Checkpoint, hardware: HardwareConfig) -> HardwareConfig:
    """The dtype of the training run unless another is asked for; what a CPU cannot compute in, it does in its own."""
    if hardware.dtype != "auto":
        return hardware
    dtype = str(saved.config.get("hardware", {}).get("dtype", "auto"))
    is_cuda = distributed.choose_device(hardware.device, local_rank=0).type == "cuda"
    return dataclasses.replace(hardware, dtype="auto" if dtype == "float16" and not is_cuda else dtype)


def load_model(
    saved: Checkpoint, vocab_size: int, ops: Ops, device: Device, quant: Quantisation | None = None
) -> LanguageModel:
    """The checkpoint's model with its weights, ready to read; `quant`: to be quantised now."""
    model = build(config_from_dict(saved.config.get("model", {})), vocab_size, ops, device.dtype)
    held = quantisation_of(saved.config)
    if held and quant:
        raise KestrelError(
            f"{saved.path} is quantised already ({held}): leave quant= out, or give with ckpt= what it was made from"
        )
    spec = spec_of_quantised(model, held) if held else checkpoint.spec_of(dict(model.named_parameters()))
    tensors = checkpoint.load_tensors(saved.path, "model", spec, device.device)
    if held:
        load_quantised(model, tensors, device.device)
    else:
        model.to_empty(device=device.device)
        model.load_state_dict(tensors)
    model.init_buffers()
    return cast_weights(quantise_model(model, quant) if quant else model)


def weights_of(model: LanguageModel) -> str:
    """What the matrices are, where they are codes."""
    forms = {CODES[layer.codes.dtype] for layer in quantised_layers(model).values() if layer.codes is not None}
    return "".join(f"{form} weights, " for form in sorted(forms))


if __name__ == "__main__":
    run_command("infer", main, raw_keys=RAW_KEYS)
