"""How fast a tokenizer is learned and how fast it encodes: python -m bench.tokenizer --megabytes 100

What decides both is how many different words the text has, so a small text repeated would flatter. The text is made up
instead: words drawn by a Zipf law of two regimes, 1/rank for the common words and rank^(-1/β) for the endless rare
ones, so that the number of different words grows as Heaps' law says, as n^β. Novels and children's stories (7 MB) have
β = 0.47 and 31 thousand words in 1.3 million; the default here, β = 0.55 and 2500 common words, gives 47 thousand in
1.1 million, which makes it harder, as names and typos do on the web. Words are made of syllables, common ones short.

`--text FILE …` measures on those files too, as they are.
"""

import argparse
import csv
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import time
from pathlib import Path

import numpy as np

from data.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer

RESULTS = Path(__file__).parent / "results" / "tokenizer.csv"
HEAPS_BETA, COMMON_WORDS, ALL_WORDS = 0.55, 2500, 10_000_000
VOWELS, CONSONANTS = list("aaaeeeeiiiooouuyéü"), list("bcdfghjklmnprstvwyz")
ONSETS = [*CONSONANTS, "", "", "", "", "th", "sh", "ch", "st", "tr", "pl", "br", "gr"]
NUCLEI = [*VOWELS, "ai", "ea", "ee", "ou", "oo"]
CODAS = [*CONSONANTS, "ng", "nd", "st", "ck", *[""] * 20]
SEPARATORS = [" ", ", ", ". ", "'s ", "\n\n", "-", "; ", "! ", ' "', '." ', " 12 ", " (", ") ", " 1987, "]
SEPARATOR_SHARES = [0.83, 0.05, 0.05, 0.01, 0.01, 0.008, 0.003, 0.004, 0.006, 0.006, 0.008, 0.005, 0.005, 0.005]
WORDS_PER_DOCUMENT = 600


def made_up_documents(megabytes: float, beta: float, seed: int = 0) -> list[str]:
    """Documents of about 3 kB, `megabytes` in all, whose words follow the laws of Heaps and Zipf."""
    rng = np.random.default_rng(seed)
    ids = draw_words(int(megabytes * 1e6 / 5), beta, rng)
    words = made_up_words(int(ids.max()) + 1, rng)
    documents, left = [], megabytes * 1e6
    for start in range(0, len(ids), WORDS_PER_DOCUMENT):
        documents.append(document([words[i] for i in ids[start : start + WORDS_PER_DOCUMENT].tolist()], rng))
        left -= len(documents[-1].encode())
        if left <= 0:
            break
    return documents


def draw_words(n: int, beta: float, rng: np.random.Generator) -> np.ndarray:
    """n word ids, the commonest word 0, every id below the largest drawn at least once."""
    rank = np.arange(1, ALL_WORDS + 1)
    share = np.where(rank < COMMON_WORDS, 1 / rank, (rank / COMMON_WORDS) ** (-1 / beta) / COMMON_WORDS)
    cumulative = np.cumsum(share)
    drawn = np.searchsorted(cumulative, rng.random(n) * cumulative[-1])
    return np.unique(drawn, return_inverse=True)[1]


def made_up_words(n: int, rng: np.random.Generator) -> list[str]:
    """n different words of one to five syllables, the first (commonest) ones short."""
    tries = 3 * n
    syllables = np.minimum(1 + rng.poisson(np.log10(np.arange(tries) + 1) / 4), 5)
    parts = np.stack([rng.choice(choices, (tries, 5)) for choices in (ONSETS, NUCLEI, CODAS)], axis=2)
    words = list(dict.fromkeys("".join(part[:k].flat) for part, k in zip(parts, syllables)))
    assert len(words) >= n
    return words[:n]


def document(words: list[str], rng: np.random.Generator) -> str:
    """Words with punctuation and a few numbers between them, capitals after a full stop."""
    between = rng.choice(len(SEPARATORS), len(words), p=SEPARATOR_SHARES)
    text = "".join([part for word, i in zip(words, between.tolist()) for part in (word, SEPARATORS[i])])
    return re.sub(r"(^|[.!]\"? |\n)(\w)", lambda match: match[1] + match[2].upper(), text)


def timed(function, *args, **options):
    """What a call returns, its wall seconds and its CPU seconds (the honest ones on a machine shared with others)."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function(*args, **options)
    return result, time.perf_counter() - wall, time.process_time() - cpu


def measure(name: str, documents: list[str], vocab_size: int, rounds: int = 3) -> list[dict]:
    """Learn a vocabulary once, then encode with it `rounds` times for each number of threads; medians."""
    megabytes = sum(len(text.encode()) for text in documents) / 1e6
    distinct = len({word for text in documents for word in re.findall(r"\w+", text)})
    shared = {"text": name, "megabytes": round(megabytes, 1), "distinct_words": distinct}
    config = TokenizerConfig(vocab_size=vocab_size)
    tokenizer, wall, cpu = timed(train_tokenizer, config, documents)
    rows = [shared | speed("learn", tokenizer, os.cpu_count(), wall, cpu, megabytes)]
    for kind in (tokenizer, train_tokenizer(TokenizerConfig("char"), documents)):
        for threads in sorted({1, os.cpu_count()}):
            runs = [timed(kind.encode_batch, documents, num_threads=threads) for _ in range(rounds)]
            n_tokens = sum(len(ids) for ids in runs[0][0])
            wall, cpu = (statistics.median(run[i] for run in runs) for i in (1, 2))
            row = speed("encode", kind, threads, wall, cpu, megabytes)
            rows.append(shared | row | {"bytes_per_token": round(megabytes * 1e6 / n_tokens, 3)})
    return rows


def speed(what: str, tokenizer: Tokenizer, threads: int, wall: float, cpu: float, megabytes: float) -> dict:
    """One row of the table: MB per second of wall time, and per second of CPU time, which is one core's speed."""
    return {
        "what": what,
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "threads": threads,
        "seconds": round(wall, 2),
        "cpu_seconds": round(cpu, 2),
        "mb_per_s": round(megabytes / wall, 1),
        "mb_per_cpu_s": round(megabytes / cpu, 1),
    }


def machine() -> dict:
    """What the numbers depend on besides our code."""
    cpu = (
        re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    versions = {name: importlib.metadata.version(name) for name in ("tokenizers", "tiktoken", "numpy")}
    return {
        "cpu": cpu[1] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **versions,
        "commit": commit,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--beta", type=float, default=HEAPS_BETA, help="exponent of Heaps' law")
    parser.add_argument("--text", nargs="*", type=Path, default=[], help="files to measure on besides")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    texts = {f"made up, beta {args.beta:g}": made_up_documents(args.megabytes, args.beta)}
    if args.text:
        contents = [path.read_text(encoding="utf-8", errors="replace") for path in args.text]
        texts["files"] = [text[i : i + 3000] for text in contents for i in range(0, len(text), 3000)]
    rows = [row | machine() for name, documents in texts.items() for row in measure(name, documents, args.vocab_size)]
    for row in rows:
        print("  ".join(f"{key}={row[key]}" for key in list(row) if key not in machine()))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
