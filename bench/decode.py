"""Decoding: `python -m bench.decode` writes bench/results/decode.csv, or --context decode_context.csv, and draws it.

For each model (random weights, or a checkpoint by --ckpt) and number of rows: tokens per second of all rows together at
a context of about 1,100 tokens, greedy, and what share of the machine's copy bandwidth that is, if each weight that a
step multiplies with is read once, and each row's keys and values. The engine is timed as a user runs it, host and all;
`replay_us` is what the device needs for a step by itself: a CUDA graph, replayed without Python. Time to first token is
that of a new prompt of 1,024 tokens. Candidates:

    torch            the engine, plain PyTorch, kernel by kernel
    triton           the engine, our kernels, kernel by kernel
    triton + graph   the engine, our kernels in CUDA graphs
    recipe           what gpt-fast does: one compiled step (torch.compile, CUDA graphs) over a cache of fixed size

What is timed is checked first: with the same words said before, each backend's likeliest next token is compared with
plain PyTorch's, at 64 places (`agreement`, of steps that are not recorded); and what the engine says from recorded
steps with what it says without them (`as_eager`). With --quant both read the same codes, with --quant-cache, too.

Rows of a CSV that are not measured again stay. With --start it is the time from the start of `python infer.py` to the
first text of a checkpoint on disk that is timed instead (decode_start.csv), a few times over: the first may compile.
"""

import argparse
import csv
import gc
import itertools
import os
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor

import checkpoint
from bench.plot import COLOURS, finish_figure
from bench.timing import FIGURES, RESULTS, copy_gbps, folder_for, machine_card
from checkpoint import TrainState
from config import compose
from data.tokenizer import BYTES, SPECIALS, Tokenizer, tokenizer_from_json
from inference.engine import Engine, cast_weights
from inference.paged_cache import PagedCache
from inference.request import Request
from inference.sampling import SamplingConfig
from kernels_torch import quantised_cache, quantised_weight
from model import LanguageModel, build, config_from_dict, config_to_dict
from model.cost import bytes_of_products, kv_bytes_per_token
from model.ops import KernelConfig, load_ops
from model.quantised import Quantisation, quantise_model

CHECKED = 64  # places at which the likeliest token is compared


class Kind(NamedTuple):
    """How a candidate runs."""

    kernels: str
    graphs: bool = False


KINDS = {
    "torch": Kind("torch"),
    "triton": Kind("triton"),
    "triton + graph": Kind("triton", graphs=True),
    "recipe": Kind("torch"),
}
COLOUR_OF = COLOURS | {"triton": "#e08a76", "triton + graph": "#c8553d", "recipe": "#6b7c93"}


class Shape(NamedTuple):
    """A model, the rows that are decoded together, and their words before and while they are timed."""

    model: str
    batch: int
    vocab_size: int
    prompt: int = 1024
    new_tokens: int = 160
    overrides: tuple[str, ...] = ()
    arch: str = "plain"
    quant: str | None = None  # form of the weights' codes
    cache: str | None = None  # of the keys' and values'

    def config(self) -> object:
        return compose("train", [f"model={self.model}", f"arch={self.arch}", *self.overrides]).model


SMALL = ("model.depth=2", "model.head_dim=16", "model.aspect_ratio=16", "model.sequence_len=128")
VOCAB = {"d6": 32_768, "d12": 32_768, "d20": 65_536, "d34": 65_536}


def shapes(models: list[str], batches: list[int], small: bool, **options: str | None) -> list[Shape]:
    if small:
        return [Shape("d2", batch, 300, 64, 24, SMALL, **options) for batch in batches]
    return [Shape(model, batch, VOCAB[model], **options) for model in models for batch in batches]


def random_model(shape: Shape, kernels: str, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    """The same weights for every backend, made where they are, none of them zero."""
    model = build(shape.config(), shape.vocab_size, load_ops(KernelConfig(backend=kernels), device, dtype), dtype)
    model.to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
            else:
                parameter.fill_(1.0)
    model.init_buffers()
    return ready(model, shape.quant)


def ready(model: LanguageModel, quant: str | None) -> LanguageModel:
    """To decode, quantised if that is wanted."""
    return cast_weights(model if quant is None else quantise_model(model, Quantisation(quant)))


def saved_model(path: Path, kernels: str, device: torch.device, dtype: torch.dtype, quant: str | None) -> LanguageModel:
    """That of a checkpoint."""
    saved = checkpoint.read_checkpoint(checkpoint.find(path))
    vocab_size = tokenizer_from_json(saved.tokenizer_json).vocab_size
    ops = load_ops(KernelConfig(backend=kernels), device, dtype)
    model = build(config_from_dict(saved.config["model"]), vocab_size, ops, dtype)
    tensors = checkpoint.load_tensors(saved.path, "model", checkpoint.spec_of(dict(model.named_parameters())), device)
    model.to_empty(device=device)
    model.load_state_dict(tensors)
    model.init_buffers()
    return ready(model, quant)


class Words:
    """As much of a tokenizer as an engine needs that nobody reads."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.bos_id = vocab_size, 0

    def encode_special(self, name: str) -> int:
        return 0

    def decode_bytes(self, ids: list[int]) -> bytes:
        return b"a" * len(ids)


def prompts(shape: Shape, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, shape.vocab_size, (shape.batch, shape.prompt), generator=generator).tolist()


# What is compared, and what is timed.


@torch.no_grad()
def likeliest(model: LanguageModel, shape: Shape) -> Tensor:
    """The likeliest next token [CHECKED] of one row that is told what to say."""
    cache = PagedCache(model, -(-model.context_len // 32), 32, form=shape.cache)
    rows = cache.rows(1)
    rows.begin(0, list(range(cache.max_blocks, 0, -1)), 0, {})
    words = torch.tensor(prompts(shape, seed=1)[:1], device=next(model.parameters()).device)
    checked = min(CHECKED if shape.quant is None else CHECKED // 4, shape.prompt // 2)  # plain codes are slow to read
    model.decode(words[:, :-checked], rows)
    told = [model.decode(word, rows).argmax(-1) for word in words[:, -checked:].split(1, dim=1)]
    return torch.cat(told)


def said_as_eager(model: LanguageModel, shape: Shape, kind: Kind) -> float:
    """Of what one row says greedily from recorded steps, the share that is what it says from eager ones."""
    one, said = shape._replace(batch=1), []
    sampling = SamplingConfig(max_new_tokens=min(CHECKED, shape.new_tokens), temperature=0)
    for graphs in (False, True):
        engine = new_engine(model, one, kind._replace(graphs=graphs))
        for _ in range(2):  # the second time all is recorded
            told = [token for (token,) in engine.generate(prompts(one, seed=1)[0], sampling)]
        said.append(told)
    return sum(a == b for a, b in zip(*said)) / len(said[0])


def new_engine(model: LanguageModel, shape: Shape, kind: Kind) -> Engine:
    room = shape.batch * -(-(shape.prompt + shape.new_tokens) // 32) * 32
    engine = Engine(
        model, Words(shape.vocab_size), max_rows=shape.batch, cache_tokens=room, reuse_prefixes=False,
        graphs=kind.graphs and next(model.parameters()).is_cuda, quant_cache=shape.cache,
    )  # fmt: skip
    engine.stop_ids = set()
    return engine


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def finish(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def time_engine(engine: Engine, shape: Shape) -> dict[str, float]:
    """Seconds a step while all rows are at work, seconds to the first token, and of the device alone."""
    sampling = SamplingConfig(max_new_tokens=shape.new_tokens, temperature=0)
    for _ in range(2):  # a second time with all compiled and captured
        for prompt in prompts(shape):
            engine.submit(Request(prompt, sampling))
        while len(engine.running) < shape.batch:
            engine.step()
        for _ in range(8):
            engine.step()
        n = shape.new_tokens - max(row.n_launched for row in engine.running) - 2
        synchronize(engine.device)
        began = time.perf_counter()
        for _ in range(n):
            engine.step()
        synchronize(engine.device)
        step_s = (time.perf_counter() - began) / n
        finish(engine)
    return {"step_s": step_s, "first_token_s": time_to_first(engine, shape), "replay_s": replay_time(engine)}


def time_to_first(engine: Engine, shape: Shape) -> float:
    """Of a lone new prompt."""
    samples = []
    for seed in range(5):
        request = Request(
            prompts(shape._replace(batch=1), seed + 2)[0], SamplingConfig(max_new_tokens=4, temperature=0)
        )
        synchronize(engine.device)
        began = time.perf_counter()
        engine.submit(request)
        while not engine.step():
            pass
        samples.append(time.perf_counter() - began)
        finish(engine)
    return statistics.median(samples[1:])


def replay_time(engine: Engine) -> float:
    """Seconds of the widest recorded step, one after the other, with rows half way through; 0: none is recorded."""
    step = engine.steps[max(engine.steps)]
    if not step.graphs:
        return 0.0
    replay, _ = next(iter(step.graphs.values()))
    tables, lengths = engine.cache_rows.all_tables, engine.cache_rows.all_lengths
    n = engine.pool.n_blocks // len(tables)
    tables[:, :n] = torch.arange(1, 1 + n * len(tables), dtype=torch.int32, device=engine.device).view(len(tables), n)
    lengths.fill_(n * engine.pool.page * 15 // 16)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(2):
        begin.record()
        for _ in range(50):
            replay()
        end.record()
    torch.cuda.synchronize()
    tables.zero_()
    lengths.zero_()
    return begin.elapsed_time(end) / 50 / 1e3


# gpt-fast's recipe.


class FixedCache:
    """Keys and values [layers, 2, B, H, S, D], for one compiled step of the plain form."""

    def __init__(self, model: LanguageModel, batch: int, length: int) -> None:
        n_layer, n_kv_head, head_dim = model.cache_shape
        device = next(model.parameters()).device
        self.kv = torch.zeros(n_layer, 2, batch, n_kv_head, length, head_dim, dtype=model.dtype, device=device)


def recipe_step(model: LanguageModel, kv: Tensor, token: Tensor, position: Tensor) -> Tensor:
    """One token [B, 1] at `position` [1] → the next [B, 1]; written as one writes it for a compiler."""
    B, D = token.shape[0], model.config.head_dim
    x = norm(F.embedding(token, model.transformer.wte.weight))
    cos, sin = (table[position].to(x.dtype) for table in (model.cos, model.sin))
    mask = (torch.arange(kv.shape[4], device=x.device) <= position)[None, None, None]
    for i, block in enumerate(model.transformer.h):
        q, k, v = F.linear(norm(x), block.attn.qkv[0]).view(B, -1, D).tensor_split(3, dim=1)  # (B, H, D)
        q, k = (norm(rotate(y, cos, sin)) for y in (q, k))
        kv[i, 0].index_copy_(2, position, k.unsqueeze(2))
        kv[i, 1].index_copy_(2, position, v.unsqueeze(2))
        y = F.scaled_dot_product_attention(q.unsqueeze(2), kv[i, 0], kv[i, 1], attn_mask=mask)
        x = x + F.linear(y.reshape(B, 1, -1), block.attn.c_proj.weight)
        x = x + F.linear(F.relu(F.linear(norm(x), block.mlp.c_fc.weight)).square(), block.mlp.c_proj.weight)
    return F.linear(norm(x), model.lm_head.weight[: model.vocab_size]).argmax(-1)


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], None, 1e-6)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)


@torch.no_grad()
def time_recipe(model: LanguageModel, shape: Shape) -> tuple[dict[str, float], Tensor]:
    """As time_engine, and the likeliest tokens; the prompt is read by the engine's model and copied."""
    device = next(model.parameters()).device
    length = shape.prompt + shape.new_tokens
    cache = FixedCache(model, shape.batch, length)
    step = torch.compile(recipe_step, mode="reduce-overhead", fullgraph=True) if device.type == "cuda" else recipe_step
    words = torch.tensor(prompts(shape, seed=1)[:1], device=device).expand(shape.batch, -1)
    checked, told = min(CHECKED, shape.prompt // 2), []
    for i in range(shape.prompt):
        position = torch.tensor([i], device=device)
        token = step(model, cache.kv, words[:, i : i + 1].contiguous(), position).clone()
        if i >= shape.prompt - checked:
            told.append(token[0])
    synchronize(device)
    began = time.perf_counter()
    n = shape.new_tokens - 2
    for _ in range(n):
        position += 1
        token = step(model, cache.kv, token, position).clone()
    synchronize(device)
    return {"step_s": (time.perf_counter() - began) / n, "first_token_s": 0.0, "replay_s": 0.0}, torch.cat(told)


# Tables.


def bytes_of_step(model: LanguageModel, shape: Shape) -> int:
    """What a step must read: the weights of all products, and keys and values of all rows."""
    context = shape.prompt + shape.new_tokens // 2
    of_token = kv_bytes_per_token(model, quantised_cache.FORMS.get(shape.cache))
    return bytes_of_products(model) + shape.batch * context * of_token


def bench_shape(
    shape: Shape,
    names: list[str],
    device: torch.device,
    dtype: torch.dtype,
    make: Callable[[str], LanguageModel],
    gbps: float,
) -> list[dict]:
    """A row for each candidate."""
    rows, expected, models = [], None, {}
    for name in names:
        kind = KINDS[name]
        model = models.get(kind.kernels) or make(kind.kernels)
        models[kind.kernels] = model
        if expected is None:
            reference = models.get("torch") or make("torch")
            expected = likeliest(reference, shape)
        if name == "recipe":
            times, told = time_recipe(model, shape)
        else:
            told = likeliest(model, shape)
            engine = new_engine(model, shape, kind)
            times = time_engine(engine, shape)
            del engine
        n_bytes = bytes_of_step(model, shape)
        rows.append(
            {
                "model": shape.model,
                "arch": shape.arch,
                "quant": shape.quant or "",
                "quant_cache": shape.cache or "",
                "vocab_size": shape.vocab_size,
                "batch": shape.batch,
                "prompt": shape.prompt,
                "new_tokens": shape.new_tokens,
                "candidate": name,
                "tokens_per_s": round(shape.batch / times["step_s"], 1),
                "step_us": round(1e6 * times["step_s"], 1),
                "replay_us": round(1e6 * times["replay_s"], 1) or "",
                "first_token_ms": round(1e3 * times["first_token_s"], 2) or "",
                "bytes": n_bytes,
                "share_of_copy": round(n_bytes / times["step_s"] / 1e9 / gbps, 3),
                "agreement": round((told == expected).double().mean().item(), 3),
                "as_eager": round(said_as_eager(model, shape, kind), 3) if kind.graphs else "",
                "copy_gbps": round(gbps),
                "dtype": str(dtype).removeprefix("torch."),
            }
        )
        gc.collect()
    return rows


@torch.no_grad()
def bench_context(
    shape: Shape, device: torch.device, dtype: torch.dtype, make: Callable[[str], LanguageModel]
) -> list[dict]:
    """Tokens per second of one row after so many tokens, with a cache and by reading everything again."""
    rows = []
    kernels = "triton" if device.type == "cuda" else "torch"
    model = make(kernels)
    longest = min(model.context_len, 2048)
    engine = new_engine(model, shape._replace(prompt=longest - 40, new_tokens=32, batch=1), KINDS["triton + graph"])
    for context in [n for n in (16, 64, 256, 512, 1024, 2000) if n <= longest - 40]:
        mine = shape._replace(prompt=context, new_tokens=32, batch=1)
        cached = time_engine(engine, mine)["step_s"]
        words = torch.tensor(prompts(mine), device=device)
        for _ in range(3):
            model.logits(model.trunk(words)[:, -1])
        synchronize(device)
        began = time.perf_counter()
        for _ in range(10):
            model.logits(model.trunk(words)[:, -1]).argmax(-1).tolist()
        again = (time.perf_counter() - began) / 10
        for name, seconds in (("cache", cached), ("no cache", again)):
            rows.append(
                {"model": shape.model, "arch": shape.arch, "quant": shape.quant or ""}
                | {"kernels": kernels, "context": context, "candidate": name}
                | {"tokens_per_s": round(1 / seconds, 1), "step_us": round(1e6 * seconds, 1)}
            )
    return rows


def print_table(rows: list[dict]) -> None:
    heads = ("tokens/s", "step µs", "replay µs", "first ms", "of copy", "agree", "as eager")
    keys = ("tokens_per_s", "step_us", "replay_us", "first_token_ms", "share_of_copy", "agreement", "as_eager")
    print(f"\n{' '.join(filter(None, named(rows[0])))}, V {rows[0]['vocab_size']}, {rows[0]['batch']} rows")
    print(f"  {'':16}" + "".join(f"{head:>11}" for head in heads))
    for row in rows:
        print(
            f"  {row['candidate']:16}" + "".join(f"{row[key] if row[key] != '' else '–':>11}" for key in keys),
            flush=True,
        )


def named(row: dict) -> tuple[str, ...]:
    """Model, form, codes of the weights and of the cache; older files do not say all of them."""
    cache = row.get("quant_cache")
    return row["model"], row["arch"], row.get("quant") or "", f"{cache} cache" if cache else ""


def group_of(row: dict) -> tuple[str, ...]:
    """What is drawn side by side."""
    words = [word for word in named(row) if word not in ("", "plain")]
    return *words, f"{row['batch']} rows"


KEYS = ("model", "arch", "quant", "quant_cache", "batch", "candidate", "context", "kernels")


def write_with_others(rows: list[dict], card: dict[str, str], path: Path) -> list[dict[str, str]]:
    """Write rows to a CSV in which other rows stay → all of it, those of one model together."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = [{key: str(value) for key, value in (row | card).items()} for row in rows]
    measured = {key_of(row) for row in new}
    old = []
    if path.exists():
        with path.open(newline="") as file:
            old = [row for row in csv.DictReader(file) if key_of(row) not in measured]
    columns = list(dict.fromkeys(key for row in [*new, *old] for key in row))
    models = list(VOCAB)
    together = sorted([*old, *new], key=lambda row: models.index(row["model"]) if row["model"] in models else -1)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(together)
    return together


def key_of(row: dict[str, str]) -> tuple[str, ...]:
    """What no two rows of a CSV share."""
    return tuple(row.get(key) or "" for key in KEYS)


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """One group of bars for each model, its codes and number of rows: tokens per second, and share of copy."""
    groups = list(dict.fromkeys(group_of(row) for row in rows))
    names = [name for name in KINDS if any(row["candidate"] == name for row in rows)]
    figure, axes = plt.subplots(2, 1, figsize=(10, 7), sharex=True)
    width = 0.8 / len(names)
    for axis, (key, label) in zip(axes, (("tokens_per_s", "tokens per second"), ("share_of_copy", "share of copy"))):
        for i, name in enumerate(names):
            mine = {group_of(row): float(row[key]) for row in rows if row["candidate"] == name}
            places = [(j + (i - (len(names) - 1) / 2) * width, mine[g]) for j, g in enumerate(groups) if g in mine]
            axis.bar([x for x, _ in places], [y for _, y in places], width, label=name, color=COLOUR_OF[name])
        axis.set_ylabel(label)
        axis.grid(axis="y", lw=0.3)
    axes[0].set_yscale("log")
    axes[1].set_ylim(0, 1)
    axes[0].legend(ncol=len(names), frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.15))
    axes[-1].set_xticks(range(len(groups)), ["\n".join(group) for group in groups], fontsize=7)
    finish_figure(figure, rows[0], path)


def draw_context(rows: list[dict[str, str]], path: Path) -> None:
    """Tokens per second over context, with and without a cache."""
    figure, axis = plt.subplots(figsize=(8, 4.5))
    for model in dict.fromkeys(named(row) for row in rows):
        for name, style in (("cache", "-o"), ("no cache", "--o")):
            mine = [row for row in rows if (named(row), row["candidate"]) == (model, name)]
            mine.sort(key=lambda row: int(row["context"]))
            places = [float(row["context"]) for row in mine], [float(row["tokens_per_s"]) for row in mine]
            axis.plot(*places, style, label=f"{' '.join(filter(None, model))}, {name}", ms=3)
    axis.set_xlabel("tokens of context")
    axis.set_ylabel("tokens per second, one row")
    axis.set_yscale("log")
    axis.set_xscale("log", base=2)
    axis.grid(lw=0.3)
    axis.legend(frameon=False)
    finish_figure(figure, rows[0], path)


# From the start of a process.


def random_checkpoint(shape: Shape, folder: Path, dtype: torch.dtype) -> Path:
    """A run with random weights, and a tokenizer of so many texts that each can be shown as it comes."""
    n_texts = shape.vocab_size - len(BYTES) - len(SPECIALS)
    texts = map("".join, itertools.product(string.ascii_letters + string.digits, repeat=3))
    tokens = [*BYTES, *(text.encode() for text in itertools.islice(texts, max(0, n_texts)))]
    tokenizer = Tokenizer("bpe", tokens)
    model = random_model(shape._replace(vocab_size=tokenizer.vocab_size), "torch", torch.device("cpu"), torch.float32)
    settings = {
        "model": config_to_dict(shape.config()),
        "hardware": {"dtype": str(dtype).removeprefix("torch.")},
    }
    run = folder / shape.model
    checkpoint.save(
        run, 0, model=dict(model.named_parameters()), optimizer={}, state=TrainState().to_json(), config=settings,
        tokenizer_json=tokenizer.to_json(),
    )  # fmt: skip
    return run


def bench_start(shape: Shape, run: Path, device: torch.device, times: int = 3) -> list[dict]:
    """Seconds from the start of infer.py until it shows what it was not told."""
    kernels = "triton" if device.type == "cuda" else "torch"
    prompt, rows = "Once", []
    command = [sys.executable, "infer.py", f"ckpt={run}", f"prompt={prompt}", f"kernels={kernels}", "temperature=0"]
    command += ["max_new_tokens=16", f"hardware={'gpu' if device.type == 'cuda' else 'cpu'}"]
    command += [f"{key}={form}" for key, form in (("quant", shape.quant), ("quant_cache", shape.cache)) if form]
    for i in range(times):
        began = time.perf_counter()
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).parent.parent
        ) as process:
            shown = b""
            while not shown.strip() or prompt.encode().startswith(shown.strip()):
                if not (more := os.read(process.stdout.fileno(), 4096)):
                    raise RuntimeError(process.stderr.read().decode()[-2000:])
                shown += more
            seconds = time.perf_counter() - began
            process.communicate()
        row = {"model": shape.model, "arch": shape.arch, "quant": shape.quant or "", "kernels": kernels}
        rows.append(row | {"candidate": f"again {i}" if i else "first", "first_text_s": round(seconds, 2)})
        print(f"{shape.model}: first text {seconds:.2f} s after the start", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=VOCAB, action="append", help="default: all")
    parser.add_argument("--batch", type=int, action="append", help="rows; default: 1")
    parser.add_argument("--arch", choices=("plain", "nanochat2026"), default="plain")
    parser.add_argument("--ckpt", type=Path, help="a run or checkpoint instead of random weights")
    parser.add_argument("--quant", choices=quantised_weight.FORMS, help="quantise the weights")
    parser.add_argument("--quant-cache", choices=list(quantised_cache.FORMS), help="keep keys and values in 8 bits")
    parser.add_argument("--candidate", choices=KINDS, action="append", help="default: torch, triton, triton + graph")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16, on a CPU float32")
    parser.add_argument("--small", action="store_true", help="models of a moment, to see that all of it works")
    parser.add_argument("--context", action="store_true", help="over the length of the context instead")
    parser.add_argument("--start", action="store_true", help="from the start of infer.py to its first text instead")
    parser.add_argument("--out", type=Path, help="folder of the CSV; default: bench/results, on a CPU local/ in it")
    parser.add_argument("--figures", type=Path, help="folder of the figure")
    parser.add_argument("--commit", help="what is timed, where git cannot say")
    args = parser.parse_args()
    args.out = args.out or folder_for(RESULTS, args.device, args.small)
    args.figures = args.figures or folder_for(FIGURES, args.device, args.small)
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    names = args.candidate or ["torch", "triton", "triton + graph"]
    if (args.quant or args.quant_cache) and "recipe" in names:
        parser.error("the recipe has no codes: leave --quant and --quant-cache out")
    if device.type == "cpu":
        print("no GPU: plain PyTorch alone is timed, as Triton's interpreter would say nothing of our kernels")
        names = [name for name in args.candidate or ["torch"] if KINDS[name].kernels == "torch"]
    card, rows, gbps = machine_card(device), [], 0.0 if args.start else copy_gbps(device)
    card["commit"] = args.commit or card["commit"]
    name = "decode_start" if args.start else "decode_context" if args.context else "decode"
    options = dict(arch=args.arch, quant=args.quant, cache=args.quant_cache)
    for shape in shapes(args.model or list(VOCAB), args.batch or [1], args.small, **options):

        def make(kernels: str, shape: Shape = shape) -> LanguageModel:
            if args.ckpt is not None:
                return saved_model(args.ckpt, kernels, device, dtype, shape.quant)
            return random_model(shape, kernels, device, dtype)

        if args.start:
            with tempfile.TemporaryDirectory() as folder:
                run = args.ckpt.resolve() if args.ckpt else random_checkpoint(shape, Path(folder), dtype)
                rows += bench_start(shape, run, device)
        elif args.context:
            rows += bench_context(shape, device, dtype, make)
            print("\n".join(f"{r['model']} {r['context']:5} {r['candidate']:9} {r['tokens_per_s']:10}" for r in rows))
        else:
            rows += bench_shape(shape, names, device, dtype, make, gbps)
            print_table(rows[-len(names) :])
        # After each: a bench that is stopped leaves what it has.
        everything = write_with_others(rows, card, args.out / f"{name}.csv")
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(f"\nwritten to {args.out / name}.csv")
    if not args.start:
        (draw_context if args.context else draw)(everything, args.figures / f"{name}.png")
        print(f"drawn in {args.figures / name}.png")


if __name__ == "__main__":
    main()
