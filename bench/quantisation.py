"""What smaller weights and a smaller cache cost: `python -m bench.quantisation --ckpt runs/d6 --data tinystories`.

Bits per byte on the validation text and tokens/s of one row, for the weights as they are, for every form of codes, and
for keys and values in 8 bits: the same rows of text, the same prompt, the same length. With such a cache the text is
read through it, each token by what the codes of those before it say. Prints a table and, with --csv, adds to a file.
"""

import argparse
import csv
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

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
from inference.paged_cache import PagedCache
from inference.sampling import SamplingConfig
from inference.stopwatch import Stopwatch
from kernels_torch.quantised_cache import FORMS as CACHES
from kernels_torch.quantised_weight import FORMS, GROUPS
from model.cost import kv_bytes_per_token
from model.language_model import LanguageModel
from model.ops import load_ops
from model.quantised import Quantisation, quantised_layers
from training import distributed
from training.prepare import encode_split

WEIGHTS = [None, *(Quantisation(form) for form in FORMS if form != "int4"), *(Quantisation("int4", g) for g in GROUPS)]
VARIANTS = [*((quant, None) for quant in WEIGHTS), *((None, cache) for cache in CACHES), (Quantisation("int8"), "int8")]
PAGE, PIECE = 32, 128  # tokens of a page, and of validation text at a time


def bytes_of_matrices(model: LanguageModel) -> int:
    """What a token must read of the layers that are, or may be, codes."""
    parts = [part for layer in quantised_layers(model).values() for part in layer.operands(model.dtype)]
    return sum(part.numel() * part.element_size() for part in parts if part is not None)


def through_cache(model: LanguageModel, form: str) -> Callable[..., Tensor]:
    """The model as evals.bits_per_byte wants it, reading rows in pieces through pages of codes."""

    @torch.no_grad()
    def nats(tokens: Tensor, targets: Tensor, *, doc_ids: None, reduction: str) -> Tensor:
        B, n = len(tokens), -(-tokens.shape[1] // PAGE)
        rows = PagedCache(model, B * n, PAGE, form=form).rows(B)
        for b in range(B):
            rows.begin(b, list(range(1 + b * n, 1 + (b + 1) * n)), 0, {})
        logits = torch.cat([model.decode(piece, rows, every=True) for piece in tokens.split(PIECE, 1)], dim=1)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=reduction)

    return nats


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
    print(
        f"{'weights':>24} {'MB':>9} {'bits':>6} {'cache':>9} {'KB/token':>9} {'bpb':>8} {'change':>8} {'tokens/s':>9}"
    )
    rows, plain_bpb, dtype = [], math.nan, str(device.dtype).removeprefix("torch.")
    for quant, cache in VARIANTS:
        model = infer.load_model(saved, tokenizer.vocab_size, ops, device, quant)
        batches = val_batches(
            shards, batch_size=args.batch, sequence_len=model.context_len, max_tokens=args.eval_tokens,
            device=device.device,
        )  # fmt: skip
        bpb = evaluate(through_cache(model, cache) if cache else model, batches, token_bytes)["bpb"]
        plain_bpb = bpb if (quant, cache) == (None, None) else plain_bpb
        n_bytes = bytes_of_matrices(model)
        values = sum(layer.weight.numel() for layer in quantised_layers(model).values())
        n_new = min(args.new_tokens, model.context_len - 1)
        row = {
            "weights": str(quant or dtype),
            "bytes": n_bytes,
            "bits_per_weight": round(8 * n_bytes / values, 3),
            "cache": cache or dtype,
            "cache_bytes_per_token": kv_bytes_per_token(model, CACHES.get(cache)),
            "bpb": round(bpb, 5),
            "tokens_per_s": round(tokens_per_s(Engine(model, tokenizer, max_rows=1, quant_cache=cache), n_new), 1),
        }
        rows.append(row | machine_card(device.device))
        change = bpb / plain_bpb - 1
        print(
            f"{row['weights']:>24} {n_bytes / 1e6:9.2f} {row['bits_per_weight']:6.2f} {row['cache']:>9} "
            f"{row['cache_bytes_per_token'] / 1e3:9.2f} {bpb:8.4f} {change:+8.2%} {row['tokens_per_s']:9.1f}",
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
