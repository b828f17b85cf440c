"""What smaller weights cost and gain: `python -m bench.quantisation --ckpt runs/d6 --data tinystories`.

Bits per byte on the validation text and tokens/s of one row, for the weights as they are and for every form of codes:
the same rows of text, the same prompt, the same length. Prints a table and, with --csv, adds to a file.
"""

import argparse
import csv
import math
from pathlib import Path

import torch

import checkpoint
import infer
from bench.timing import machine_card
from config import compose
from data.batches import val_batches
from data.documents import open_shards
from data.files import default_cache_dir
from data.sources import open_source
from data.tokenizer import tokenizer_from_json
from evals.bits_per_byte import evaluate
from inference.engine import Engine
from inference.sampling import SamplingConfig
from inference.stopwatch import Stopwatch
from kernels_torch.quantised_weight import FORMS, GROUPS
from model.language_model import LanguageModel
from model.ops import load_ops
from model.quantised import Quantisation, quantised_layers
from training import distributed
from training.prepare import encode_split

VARIANTS = [None, *(Quantisation(form) for form in FORMS if form != "int4"), *(Quantisation("int4", g) for g in GROUPS)]


def bytes_of_matrices(model: LanguageModel) -> int:
    """What a token must read of the layers that are, or may be, codes."""
    parts = [part for layer in quantised_layers(model).values() for part in layer.operands(model.dtype)]
    return sum(part.numel() * part.element_size() for part in parts if part is not None)


def tokens_per_s(engine: Engine, n_tokens: int) -> float:
    """Of one row, greedy, from a new document on; nothing ends it before its length."""
    engine.stop_ids = set()
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=n_tokens)
    for _ in range(2):  # the first time, kernels are made
        stopwatch = Stopwatch()
        for _ in stopwatch.watch(engine.generate([engine.tokenizer.bos_id], sampling)):
            pass
    return stopwatch.tokens_per_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", help="a run or a checkpoint; without it the newest run below runs/")
    parser.add_argument("--data", default="fables", help="a name of conf/data, whose validation text is read")
    parser.add_argument("--kernels", default="torch", help="a name of conf/kernels")
    parser.add_argument("--dtype", default="auto", help="as hardware.dtype")
    parser.add_argument("--eval-tokens", type=int, default=2**20)
    parser.add_argument("--batch", type=int, default=8, help="rows of validation text at a time")
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--csv", type=Path, help="a file to add the rows to")
    args = parser.parse_args()

    config = compose("infer", [f"kernels={args.kernels}", f"hardware.dtype={args.dtype}"])
    saved = checkpoint.read_checkpoint(checkpoint.find_asked(args.ckpt, config.runs_dir))
    device = distributed.init(infer.with_dtype_of(saved, config.hardware))
    ops = load_ops(config.kernels, device.device, device.dtype)
    tokenizer = tokenizer_from_json(saved.tokenizer_json)
    source = open_source(compose("train", [f"data={args.data}"]).data)
    shards = open_shards(encode_split(source, tokenizer, "val", default_cache_dir(None)))
    token_bytes = torch.from_numpy(tokenizer.token_bytes).to(device.device)

    print(f"{saved.path}, {args.data}, {device.device} {device.dtype}")
    print(f"{'weights':>24} {'MB':>9} {'bits':>6} {'bpb':>8} {'change':>8} {'tokens/s':>9}")
    rows, plain_bpb = [], math.nan
    for quant in VARIANTS:
        model = infer.load_model(saved, tokenizer.vocab_size, ops, device, quant)
        batches = val_batches(
            shards, batch_size=args.batch, sequence_len=model.context_len, max_tokens=args.eval_tokens,
            device=device.device,
        )  # fmt: skip
        bpb = evaluate(model, batches, token_bytes)["bpb"]
        plain_bpb = bpb if quant is None else plain_bpb
        n_bytes = bytes_of_matrices(model)
        values = sum(layer.weight.numel() for layer in quantised_layers(model).values())
        n_new = min(args.new_tokens, model.context_len - 1)
        row = {
            "weights": str(quant or str(device.dtype).removeprefix("torch.")),
            "bytes": n_bytes,
            "bits_per_weight": round(8 * n_bytes / values, 3),
            "bpb": round(bpb, 5),
            "tokens_per_s": round(tokens_per_s(Engine(model, tokenizer, max_rows=1), n_new), 1),
        }
        rows.append(row | machine_card(device.device))
        print(
            f"{row['weights']:>24} {n_bytes / 1e6:9.2f} {row['bits_per_weight']:6.2f} {bpb:8.4f} "
            f"{bpb / plain_bpb - 1:+8.2%} {row['tokens_per_s']:9.1f}",
            flush=True,
        )
    if args.csv:
        is_new = not args.csv.exists()
        with args.csv.open("a", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            if is_new:
                writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
