"""Loader speed: `python -m bench.loader` packs made-up documents from shards on disk and counts tokens a second.

Two shapes: TinyStories (documents of about 220 tokens, rows of 2048) and fables (about 150, rows of 256). Each is
measured in parts: planning rows; planning them and copying the tokens, which is what one core can do and is told per
second of its time; and reading batches as a training loop does, from the thread that makes them, per second of the
clock. Everything is in the page cache; a cold disk is another matter. Rows go to bench/results/loader.csv.
"""

import argparse
import csv
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.batches import RowReader, _BatchMaker, pretrain_batches
from data.documents import TokenShards, build_shards

RESULTS = Path(__file__).parent / "results" / "loader.csv"
SHAPES = {"tinystories": (2048, 220, 32), "fables": (256, 150, 64)}  # row, mean document, rows a batch


@dataclass
class Noise:
    """Documents of random tokens, with the API of a source and of its tokenizer at once."""

    mean: int
    documents_wanted: int
    name: str = "noise"
    vocab_size: int = 4096
    bos_id: int = 4087
    hash: str = "noise"

    @property
    def fingerprint(self) -> str:
        return f"{self.mean} {self.documents_wanted}"

    def documents(self, split):
        """Lengths as in stories: few very short, none very long."""
        lengths = np.random.default_rng(0).gamma(6, self.mean / 6, self.documents_wanted)
        return (str(max(4, int(length))) for length in lengths)

    def encode_batch(self, texts):
        """Each text is the number of tokens to make up."""
        return [np.random.default_rng(int(text)).integers(0, 4087, int(text), np.uint16) for text in texts]


def measure(shards: TokenShards, row: int, batch: int, seconds: float) -> dict[str, float]:
    """Million tokens a second of each part."""
    reader = RowReader(shards, row, seed=1)
    make = _BatchMaker(shards, batch, row, doc_ids=False, pinned=False)
    stream = pretrain_batches(shards, batch_size=batch, sequence_len=row, seed=1)
    parts: dict[str, tuple[Callable, Callable]] = {
        "plan": (lambda: reader.take(batch), time.thread_time),
        "plan and copy": (lambda: make(reader.take(batch), reader.state()), time.thread_time),
        "read from the thread": (lambda: next(stream), time.perf_counter),
    }
    try:
        return {name: rate(part, clock, batch * row, seconds) for name, (part, clock) in parts.items()}
    finally:
        stream.close()


def rate(part: Callable, clock: Callable, tokens: int, seconds: float) -> float:
    """Median over five rounds, in million tokens a second."""
    rounds = []
    for _ in range(5):
        count, start = 0, clock()
        while (elapsed := clock() - start) < seconds / 5:
            part()
            count += tokens
        rounds.append(count / elapsed / 1e6)
    return statistics.median(rounds)


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "cpu": cpu,
        "cores": str(os.cpu_count()),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "commit": commit,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="for each part of each shape")
    parser.add_argument("--tokens", type=float, default=2e7, help="in the data set")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    records = []
    with tempfile.TemporaryDirectory() as cache:
        for name, (row, mean, batch) in SHAPES.items():
            noise = Noise(mean, int(arguments.tokens / mean))
            shards = build_shards(noise, noise, "train", cache)
            for part, speed in measure(shards, row, batch, arguments.seconds).items():
                shape = {"shape": name, "row": row, "mean_document": mean, "batch_rows": batch}
                records.append(shape | {"part": part, "million_tokens_per_s": f"{speed:.1f}"} | machine())
                print(f"{name:12} {part:22} {speed:7.1f} million tokens/s")
    RESULTS.parent.mkdir(exist_ok=True)
    with open(RESULTS, "w", newline="") as handle:
        writer = csv.DictWriter(handle, records[0])
        writer.writeheader()
        writer.writerows(records)
    print(f"wrote {RESULTS}")


if __name__ == "__main__":
    main()
