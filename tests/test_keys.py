"""Every key changes something that can be seen. A key that does nothing is worse than none: it promises.

The table FLIPS has a row for every field of every dataclass that a command line can reach: another value, the overrides
under which the key matters, and what to look at: what came out, never the config itself. A test holds the rows
against the dataclasses, so that a new key needs a row. What is to be seen without the flip is looked at twice: what
changes by itself shows nothing.

Half of the looks are whole runs: `train.py` with six steps of 33 thousand parameters takes a quarter of a second.
"""

import contextlib
import copy
import hashlib
import inspect
import io
import json
import os
import signal
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

import checkpoint
import config
import infer
import kernels_torch
import model.ops
import train
from config import InferConfig, RunConfig, compose
from data import sources
from errors import KestrelError
from inference import chat, console
from model import build
from model.ops import FORMS, OP_NAMES, describe_ops
from model.quantised import quantised_layers
from tests.model.tiny import VOCAB, tokens, torch_ops
from training import distributed, loop, report
from training.distributed import Device
from training.journal import read_rows
from training.prepare import prepare_data

CPU = Device(torch.device("cpu"), torch.float32)


# ------------------------------------------------------------------------------------------------------------ the table


class Flip(NamedTuple):
    """One key: another value than usual, what to look at, and when."""

    to: str
    look_at: str  # what a Witness can see: "logits", or a part of it: "train.losses"
    given: tuple[str, ...] = ()  # overrides with which the key matters
    refused: bool = False  # the other value is an error that names the key, and that is the difference


DEEP = ("model=nanochat", "model.depth=4", "model.aspect_ratio=8", "model.head_dim=8", "model.sequence_len=512")
WIDE = (
    "model=llama", "model.n_layer=2", "model.n_embd=24", "model.n_head=4", "model.n_kv_head=null",
    "model.sequence_len=512",
)  # fmt: skip
RUN = (
    "run=a", "data.megabytes=0.02", "tokenizer=byte", "hardware=cpu",
    "stage.num_iterations=6", "stage.total_batch_size=64", "stage.eval_tokens=32", "stage.sample_tokens=4",
)  # fmt: skip
TINY = (
    *RUN, "model=nanochat", "model.depth=1", "model.head_dim=16", "model.aspect_ratio=32", "model.sequence_len=32",
)  # fmt: skip
TINY_LLAMA = (
    *RUN, "model=llama", "model.n_layer=1", "model.n_embd=16", "model.n_head=2", "model.n_kv_head=null",
    "model.sequence_len=32",
)  # fmt: skip
TINY_2026 = (
    *TINY,
    "model.residual_lambdas=true",
    "model.smear=true",
    "model.smear_channels=8",
    "model.value_embeds=true",
)
FILES = "data.files=[stories.jsonl,more.jsonl]"
READ = ("tokenizer=byte", "data.cache_dir=cache")
BATCH = ("mode=batch", "prompt=null", "input=prompts.jsonl", "output=answers.jsonl")
TELL = ("runs_dir={runs}", "prompt=abcab", "max_new_tokens=12", "hardware=cpu")

# What goes with every flip of a dataclass's keys.
GIVEN: dict[str, tuple[str, ...]] = {
    "train groups": (),
    "train RunConfig": TINY,
    "train NanochatConfig": DEEP,
    "train LlamaConfig": WIDE,
    "train KernelConfig": (),
    "train FablesConfig": ("data=fables", "data.megabytes=0.02", *READ),
    "train TextConfig": ("data=text", *READ),
    "train BookConfig": ("data=wizard_of_oz", "data.url=file://{here}/book.txt", *READ),
    "train HubConfig": ("data=tinystories", *READ),
    "train ClimbmixConfig": ("data=climbmix", "data.repo=birds/one", "data.revision=r1", "data.n_shards=1", *READ),
    "train TokenizerConfig": ("data=text", FILES, "data.cache_dir=cache", "tokenizer=bpe", "tokenizer.vocab_size=300"),
    "train MuonAdamWConfig": (*TINY, "optim=muon_adamw"),
    "train AdamWConfig": (*TINY, "optim=adamw"),
    "train StageConfig": TINY,
    "train HardwareConfig": TINY,
    "infer InferConfig": TELL,
    "infer KernelConfig": TELL,
    "infer HardwareConfig": TELL,
}

ANY_DATA = {
    "name": Flip("another", "folders", (FILES,)),
    "files": Flip("[stories.jsonl,held.jsonl]", "tokens", (FILES,)),
    "val_files": Flip("[held.jsonl]", "tokens", (FILES,)),
    "val_fraction": Flip("0.5", "tokens", (FILES,)),
    "column": Flip("story", "tokens", (FILES,)),
    "cache_dir": Flip("elsewhere", "folders", (FILES,)),
    "vocab_size": Flip("290", "vocabulary", (FILES, "tokenizer=bpe")),
}
ANY_MODEL = {
    "sequence_len": Flip("64", "logits", refused=True),  # the probe's 300 tokens no longer fit
    "n_kv_head": Flip("2", "logits"),
    "rope_base": Flip("1000", "logits"),
    "norm_eps": Flip("0.01", "logits"),
}
RATIO = ("stage.num_iterations=-1", "stage.target_param_data_ratio=0.02")

FLIPS: dict[str, dict[str, Flip]] = {
    "train groups": {
        "model": Flip("llama", "parameters"),
        "arch": Flip("nanochat2026", "parameters"),
        "kernels": Flip("triton", "kernels"),
        "data": Flip("wizard_of_oz", "tokens", (FILES, *READ)),
        "tokenizer": Flip("char", "vocabulary", (FILES, "data.vocab_size=300", "data.cache_dir=cache")),
        "optim": Flip("adamw", "train.weights", TINY),
        "hardware": Flip("gpu", "device", refused=True),
    },
    "train RunConfig": {
        "run": Flip("b", "train.folder"),
        "runs_dir": Flip("elsewhere", "train.folder"),
        "seed": Flip("1", "train.losses"),
        "resume": Flip("never", "goes_on"),
        "tensorboard": Flip("true", "train.board"),
    },
    "train NanochatConfig": ANY_MODEL | {
        "depth": Flip("3", "logits"),
        "aspect_ratio": Flip("16", "logits"),
        "head_dim": Flip("16", "logits"),
        "qk_scale": Flip("1.2", "logits"),
        "softcap": Flip("5", "logits"),
        "window_pattern": Flip("SL", "logits"),
        "short_window_divisor": Flip("2", "logits", ("model.window_pattern=S",)),
        "residual_lambdas": Flip("true", "logits"),
        "value_embeds": Flip("true", "logits"),
        "ve_gate_channels": Flip("7", "logits", ("model.value_embeds=true",)),
        "ve_gate_range": Flip("2", "logits", ("model.value_embeds=true",)),
        "smear": Flip("true", "logits"),
        "smear_channels": Flip("7", "logits", ("model.smear=true",)),
        "backout": Flip("true", "logits"),
    },
    "train LlamaConfig": ANY_MODEL | {
        "n_layer": Flip("3", "logits"),
        "n_embd": Flip("32", "logits"),
        "n_head": Flip("2", "logits"),
        "hidden_dim": Flip("40", "logits"),
        "activation": Flip("silu", "logits"),
        "tied": Flip("true", "logits"),
    },
    "train KernelConfig": {
        **{key: Flip("fake", "train.ops", TINY) for key in ["backend", *OP_NAMES]},
        "swiglu_mlp": Flip("fake", "train.ops", TINY_LLAMA),
        **{key: Flip("fake", "train.ops", TINY_2026) for key in ["smear", "mix_rmsnorm", "value_embedding"]},
        **{key: Flip("fake", "loaded_ops") for key in ["linear_decode", "draw_tokens"]},  # the engine alone runs them
    },
    "train FablesConfig": ANY_DATA | {
        "seed": Flip("2", "tokens"),
        "megabytes": Flip("0.03", "tokens"),
    },
    "train TextConfig": ANY_DATA,
    "train BookConfig": ANY_DATA | {
        "url": Flip("file://{here}/novel.txt", "tokens"),
        "sha256": Flip("f" * 64, "tokens", refused=True),
    },
    "train HubConfig": ANY_DATA | {
        "repo": Flip("another/repo", "tokens"),
        "revision": Flip("another", "tokens"),
    },
    "train ClimbmixConfig": ANY_DATA | {
        "val_fraction": Flip("0.5", "tokens", refused=True),
        "repo": Flip("birds/two", "tokens"),
        "revision": Flip("r2", "tokens"),
        "n_shards": Flip("2", "tokens"),
        "workers": Flip("2", "workers"),
    },
    "train TokenizerConfig": {
        "name": Flip("char", "vocabulary"),
        "vocab_size": Flip("290", "vocabulary"),
        "max_chars": Flip("500", "vocabulary"),
        "doc_cap": Flip("10", "vocabulary"),
    },
    "train MuonAdamWConfig": {
        "name": Flip("adamw", "goes_on", refused=True),
        "schedule": Flip("cosine", "train.weights"),
        "warmup_steps": Flip("1", "train.weights"),
        "warmdown_ratio": Flip("0.2", "train.weights"),
        "final_lr_frac": Flip("0.9", "train.weights"),
        "grad_clip": Flip("0.01", "train.weights"),
        "weight_decay": Flip("0.001", "train.weights"),
        "max_weight_decay": Flip("0.001", "train.weights"),
        "embedding_lr": Flip("0.1", "train.weights"),
        "unembedding_lr": Flip("0.001", "train.weights"),
        "matrix_lr": Flip("0.01", "train.weights"),
        "scalar_lr": Flip("0.1", "train.weights", ("model.residual_lambdas=true",)),
        "muon_eq": Flip("false", "train.weights"),
        "muon_plus": Flip("false", "train.weights"),
    },
    "train AdamWConfig": {
        "name": Flip("muon_adamw", "goes_on", refused=True),
        "schedule": Flip("trapezoid", "train.weights"),
        "warmup_steps": Flip("1", "train.weights"),
        "warmdown_ratio": Flip("0.2", "train.weights", ("optim.schedule=trapezoid",)),
        "final_lr_frac": Flip("0.9", "train.weights"),
        "grad_clip": Flip("0.01", "train.weights"),
        "weight_decay": Flip("0", "train.weights"),
        "lr": Flip("1e-3", "train.weights"),
        "beta1": Flip("0.5", "train.weights"),
        "beta2": Flip("0.5", "train.weights"),
        "eps": Flip("1e-3", "train.weights"),
    },
    "train StageConfig": {
        "name": Flip("sft", "train.weights", refused=True),
        "num_iterations": Flip("3", "train.losses"),
        "target_flops": Flip("3e7", "train.losses", RATIO),
        "target_param_data_ratio": Flip("0.01", "train.losses", RATIO),
        "total_batch_size": Flip("128", "train.losses"),
        "eval_every": Flip("2", "train.validations"),
        "eval_tokens": Flip("64", "train.validations"),
        "sample_every": Flip("2", "train.samples"),
        "sample_prompts": Flip("[The fox]", "train.samples"),
        "sample_tokens": Flip("8", "train.samples"),
        "save_every": Flip("2", "train.checkpoints"),
        "keep_last": Flip("1", "train.checkpoints", ("stage.save_every=1",)),
    },
    "train HardwareConfig": {
        "device": Flip("cuda", "train.weights", refused=True),  # to the witness there is no GPU
        "dtype": Flip("bfloat16", "train.weights"),
        "device_batch_size": Flip("1", "train.shape"),
        "fp8": Flip("true", "train.weights", refused=True),  # on a CPU
        "compile": Flip("true", "train.compiled"),
        "cuda_graph": Flip("true", "train.weights", refused=True),  # likewise
        "reduce_dtype": Flip("bfloat16", "train.reduced_in"),
        "recompute": Flip("[block]", "train.recomputed"),
        "profile": Flip("true", "train.profiled"),
        "deterministic": Flip("true", "train.deterministic"),
        "threads": Flip("2", "train.threads"),
    },
    "infer InferConfig": {
        "max_new_tokens": Flip("3", "told"),
        "temperature": Flip("0", "told"),
        "top_k": Flip("2", "told"),
        "top_p": Flip("0.1", "told"),
        "repetition_penalty": Flip("4", "told"),
        "frequency_penalty": Flip("4", "told"),
        "presence_penalty": Flip("4", "told"),
        "seed": Flip("1", "told"),
        "num_samples": Flip("2", "told"),
        "mode": Flip("chat", "told"),
        "input": Flip("others.jsonl", "answered", BATCH),
        "output": Flip("elsewhere.jsonl", "answered", BATCH),
        "max_rows": Flip("2", "engine_rows", BATCH),
        "any_model": Flip("true", "answered_after_another", BATCH),
        "stop": Flip("e", "told"),
        "speculate": Flip("3", "engine_guesses"),
        "quant": Flip("int8", "engine_codes"),
        "quant_group": Flip("64", "engine_codes", ("quant=int4",)),
        "quant_cache": Flip("int8", "engine_cache"),
        "ckpt": Flip("{runs}/a", "told"),
        "prompt": Flip("xyz", "told"),
        "stream": Flip("false", "told_in_pieces"),
        "runs_dir": Flip("{other_runs}", "told"),
    },
    "infer KernelConfig": {key: Flip("fake", "engine_ops") for key in ["backend", *OP_NAMES]},
    "infer HardwareConfig": {
        "device": Flip("cuda", "told", refused=True),
        "dtype": Flip("bfloat16", "engine_dtype"),
        "device_batch_size": Flip("2", "told", refused=True),
        "fp8": Flip("true", "told", refused=True),
        "compile": Flip("true", "told", refused=True),
        "cuda_graph": Flip("true", "told", refused=True),
        "reduce_dtype": Flip("bfloat16", "told", refused=True),
        "recompute": Flip("[block]", "told", refused=True),
        "profile": Flip("true", "told", refused=True),
        "deterministic": Flip("true", "engine_is_deterministic"),
        "threads": Flip("2", "engine_threads"),
    },
}  # fmt: skip

# --------------------------------------------------------------------------------------------------- the table is whole


def dataclasses_of_commands() -> dict[str, type]:
    """Every dataclass that a command can be composed of: "train NanochatConfig" → NanochatConfig, …"""
    config.register()
    found = {}
    for command, root in (("train", RunConfig), ("infer", InferConfig)):
        found[f"{command} {root.__name__}"] = root
        for group in groups_of(root):
            schemas = ConfigStore.instance().repo[group].values()
            kinds = [OmegaConf.get_type(schema.node) for schema in schemas]
            found |= {f"{command} {kind.__name__}": kind for kind in kinds}
    return found


def groups_of(root: type) -> list[str]:
    return [f.name for f in fields(root) if is_dataclass(f.type)]


def keys_of(kind: type) -> set[str]:
    """Fields that hold a value rather than another dataclass."""
    return {f.name for f in fields(kind)} - set(groups_of(kind))


def test_the_table_has_every_key_and_no_other():
    kinds = dataclasses_of_commands()
    assert FLIPS.keys() - {"train groups"} == kinds.keys() == GIVEN.keys() - {"train groups"}
    for owner, kind in kinds.items():
        assert FLIPS[owner].keys() == keys_of(kind), f"{owner}: a key without a row, or a row without a key"


def test_the_table_has_every_group_that_leaves_a_choice():
    folders = {path for path in config.CONF.iterdir() if path.is_dir() and path.name != "experiment"}
    assert FLIPS["train groups"].keys() == {path.name for path in folders if len(list(path.glob("*.yaml"))) > 1}


# ---------------------------------------------------------------------------------------------------------- every key


def rows() -> Iterator[Any]:
    for owner, flips in FLIPS.items():
        for key in flips:
            yield pytest.param(owner, key, id=f"{owner} {key}")


@pytest.mark.parametrize(("owner", "key"), list(rows()))
def test_a_key_changes_what_can_be_seen(owner: str, key: str, observatory: "Observatory"):
    flip = FLIPS[owner][key]
    command, given = owner.split()[0], (*GIVEN[owner], *flip.given)
    flipped = path_of(owner, key), flip.to
    what, _, part = flip.look_at.partition(".")
    before = observatory.usual(what, command, given)
    if flip.refused:
        with pytest.raises(KestrelError, match=key):
            observatory.look(what, command, given, flipped)
        return
    after = observatory.look(what, command, given, flipped)
    if part:
        before, after = getattr(before, part), getattr(after, part)
    assert before != after


def path_of(owner: str, key: str) -> str:
    """Where the key of a dataclass stands in the config: model.depth."""
    kind = dataclasses_of_commands().get(owner)
    if kind in (None, RunConfig, InferConfig):
        return key
    repo = ConfigStore.instance().repo
    (group,) = [g for g in groups_of(RunConfig) if any(OmegaConf.get_type(s.node) is kind for s in repo[g].values())]
    return f"{group}.{key}"


# ------------------------------------------------------------------------------------------------------------- looking


class Observatory:
    """Looks at what comes of a config: each time in a fresh folder, and leaves the process as it was."""

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self.folders = folders
        self.cache = folders.mktemp("cache")
        self.places: dict[str, str] = {}
        self.known: dict[tuple, Any] = {}
        self.composed: dict[tuple, DictConfig] = {}
        for name, seeds in (("runs", {"a": 1, "b": 2}), ("other_runs", {"a": 3})):
            self.places[name] = str(folders.mktemp(name))
            for run, seed in seeds.items():
                overrides = (*TINY, f"run={run}", f"runs_dir={self.places[name]}", f"seed={seed}")
                self.look("train", "train", overrides)

    def usual(self, what: str, command: str, given: tuple[str, ...]) -> Any:
        """What is seen without the flip; looked at twice, and remembered."""
        if (what, command, given) not in self.known:
            first, second = (self.look(what, command, given) for _ in range(2))
            assert first == second, "something changes where nothing was changed"
            self.known[what, command, given] = first
        return self.known[what, command, given]

    def look(self, what: str, command: str, given: tuple[str, ...], flip: tuple[str, str] | None = None) -> Any:
        """What a witness sees of a config: of these overrides, and of a key (its path and its value) on top."""
        here = self.folders.mktemp("look")
        write_files(here)
        with pytest.MonkeyPatch.context() as patch, process_as_it_was():
            patch.chdir(here)
            patch.setenv("KESTREL_CACHE", str(self.cache))
            patch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setattr(report, "draw", lambda run_dir: None)
            patch.setattr(loop, "quiet_collector", contextlib.nullcontext)  # takes as long as the training
            places = self.places | {"here": str(here)}
            given, flip = (items and tuple(fill(item, places) for item in items) for items in (given, flip))
            return getattr(Witness(here, patch), what)(self.typed(command, given, flip))

    def typed(self, command: str, given: tuple[str, ...], flip: tuple[str, str] | None) -> Any:
        """The config of a command line. Composing takes 0.1 s, so a key that is no group is set in what is composed."""
        if flip and flip[0] in FLIPS["train groups"]:
            return compose(command, [*given, "=".join(flip)])
        if (command, given) not in self.composed:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(config, "to_typed", lambda cfg, name: cfg)
                cfg = compose(command, list(given))
            OmegaConf.set_struct(cfg, False)
            del cfg["hydra"]
            self.composed[command, given] = cfg
        cfg = copy.deepcopy(self.composed[command, given])
        if flip:
            cfg.merge_with_dotlist(["=".join(flip)])
        return config.to_typed(cfg, command)


def fill(text: str, places: dict[str, str]) -> str:
    """Text with the places that it names: {here}, {runs}, {other_runs}."""
    for name, path in places.items():
        text = text.replace(f"{{{name}}}", path)
    return text


@pytest.fixture(scope="module")
def observatory(tmp_path_factory: pytest.TempPathFactory) -> Observatory:
    return Observatory(tmp_path_factory)


@contextlib.contextmanager
def process_as_it_was() -> Iterator[None]:
    """Put back what a command sets for its whole process."""
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    fill, benchmark = torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    deterministic = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        signal.signal(signal.SIGINT, handler)
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.backends.cudnn.benchmark = benchmark


def write_files(folder: Path) -> None:
    """Small data of every sort. All files have the same age, since that is part of a token cache's key."""
    for name, animal, count in (("stories", "fox", 150), ("more", "owl", 60), ("held", "hen", 30)):
        lines = [{"text": f"The {animal} counts {i * i}.", "story": f"Night {i} of the {animal}"} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, prompt in (("prompts", "ab"), ("others", "ba")):
        (folder / f"{name}.jsonl").write_text(json.dumps({"prompt": prompt}) + "\n")
    (folder / "book.txt").write_text("A road of yellow bricks. " * 40)
    (folder / "novel.txt").write_text("A wood of silver trees. " * 40)
    for path in folder.iterdir():
        os.utime(path, (1, 1))


class Trained(NamedTuple):
    """What a run left behind, and what was seen on the way."""

    folder: str
    losses: list
    validations: list
    samples: list
    checkpoints: list
    weights: str
    shape: list  # of the tokens of each micro-batch
    threads: int
    deterministic: bool
    reduced_in: str
    compiled: int
    recomputed: int  # how often something was left to be made again
    profiled: bool
    ops: set  # which were called in the fake backend
    board: int  # scalars written to TensorBoard


class Witness:
    """What can be seen of a config. `patch` is undone after each look."""

    def __init__(self, here: Path, patch: pytest.MonkeyPatch) -> None:
        self.here, self.patch = here, patch
        self.called: set[str] = set()
        self.add_fake_backend()

    # Models.

    def parameters(self, run: RunConfig) -> list:
        """Names and shapes of a model's parameters."""
        network = build(run.model, VOCAB, torch_ops())
        return [(name, tuple(parameter.shape)) for name, parameter in network.named_parameters()]

    def logits(self, run: RunConfig) -> str:
        """Of 300 tokens, with no parameter at zero; one of the same name and shape is the same in every model."""
        network = build(run.model, VOCAB, torch_ops())
        network.to_empty(device="cpu")
        network.init_weights(0)
        for name, parameter in network.named_parameters():
            generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big"))
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            return digest([network(tokens(1, 300))])

    def kernels(self, run: RunConfig) -> str:
        """Who computes what."""
        return describe_ops(run.kernels)

    def device(self, run: RunConfig) -> Device:
        """Where a run would compute."""
        return distributed.init(run.hardware)

    # Data.

    def prepare(self, run: RunConfig) -> Any:
        """Tokenizer and tokens, with a hub that is a folder and a `datasets` that makes things up."""
        self.patch.delenv("HF_HUB_OFFLINE", raising=False)
        self.patch.delenv("HF_DATASETS_OFFLINE", raising=False)
        self.patch.setattr(sources.download, "is_reachable", lambda address: True)
        self.patch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_made_up_dataset))
        if isinstance(run.data, sources.ClimbmixConfig) and not run.data.files:
            self.patch.setenv("HF_ENDPOINT", f"file://{self.here}/hub")
            write_hub(self.here / "hub")
        return prepare_data(run.data, run.tokenizer, None, CPU)

    def tokens(self, run: RunConfig) -> list[str]:
        """Of both splits, with where documents begin."""
        data = self.prepare(run)
        return [
            digest([torch.tensor(x.astype("int64")) for x in (*s.shards, s.offsets)]) for s in (data.train, data.val)
        ]

    def folders(self, run: RunConfig) -> list[str]:
        """Where the tokens lie."""
        data = self.prepare(run)
        return [str(data.train.folder), str(data.val.folder)]

    def vocabulary(self, run: RunConfig) -> str:
        return self.prepare(run).tokenizer.hash

    def workers(self, run: RunConfig) -> list[int]:
        """How many threads are asked for."""
        asked, usual = [], sources.ThreadPoolExecutor
        self.patch.setattr(sources, "ThreadPoolExecutor", lambda count: asked.append(count) or usual(count))
        self.prepare(run)
        return asked

    # Training.

    def train(self, run: RunConfig) -> Trained:
        """Train as the command does, with an eye on what the loop is given."""
        shapes, notes, compiled, recomputed, board = [], {}, [], [], []
        usual = loop.train

        def watched(*args: Any, **kwargs: Any) -> bool:
            given = inspect.signature(usual).bind(*args, **kwargs)
            step = given.arguments["step"]
            forward = step.model

            def model(tokens: Tensor, *rest: Any, **options: Any) -> Tensor:
                shapes.append(tuple(tokens.shape))
                return forward(tokens, *rest, **options)

            step.model = model
            notes["threads"] = torch.get_num_threads()
            notes["deterministic"] = torch.are_deterministic_algorithms_enabled()
            notes["reduced_in"] = str(step.optimizer.ranks.dtype)
            complete = usual(*given.args, **given.kwargs)
            notes["weights"] = digest(forward.parameters())
            notes["folder"] = str(given.arguments["reporter"].run_dir)
            return complete

        self.patch.setattr(loop, "train", watched)
        self.patch.setattr(torch, "compile", lambda model, **options: compiled.append(model) or model)
        usual_checkpoint = model.ops.checkpoint
        noting = lambda *args, **options: recomputed.append(1) or usual_checkpoint(*args, **options)
        self.patch.setattr(model.ops, "checkpoint", noting)
        self.patch.setitem(sys.modules, "torch.utils.tensorboard", made_up_tensorboard(board))
        train.main(run)
        self.patch.setattr(model.ops, "checkpoint", usual_checkpoint)
        self.patch.setattr(loop, "train", usual)
        rows = read_rows(Path(notes["folder"]) / "metrics.jsonl")
        return Trained(
            losses=[(row["step"], row["train_loss"]) for row in rows if "train_loss" in row],
            validations=[(row["step"], row["val_loss"]) for row in rows if "val_loss" in row],
            samples=read_rows(Path(notes["folder"]) / "samples.jsonl"),
            checkpoints=[path.name for path in checkpoint.list_checkpoints(Path(notes["folder"]))],
            shape=shapes,
            compiled=len(compiled),
            recomputed=len(recomputed),
            profiled=(Path(notes["folder"]) / "profile.txt").exists(),
            ops=self.called,
            board=len(board),
            **notes,
        )

    def goes_on(self, run: RunConfig) -> tuple[str, list]:
        """The same command a second time, after a first of three steps with nothing flipped."""
        name = "adamw" if type(run.optim).__name__ == "AdamWConfig" else "muon_adamw"
        short = replace(run.stage, num_iterations=3)
        train.main(replace(run, stage=short, optim=replace(run.optim, name=name), resume="auto"))
        second = self.train(run)
        return second.folder, second.losses

    def add_fake_backend(self) -> None:
        """kernels=fake: the reference, taking note of what is called."""

        def noting(op: str) -> Callable:
            def fake(*args: Any, **options: Any) -> Any:
                self.called.add(op)
                return getattr(kernels_torch, op)(*args, **options)

            fake.__module__ = "kernels_fake"
            return fake

        module = types.ModuleType("kernels_fake")
        names = [*OP_NAMES, *FORMS]
        module.__dict__.update({op: noting(op) for op in names}, __all__=names)
        self.patch.setitem(sys.modules, "kernels_fake", module)
        for backend in ("torch", "fake"):
            (self.here / f"kernels_{backend}").mkdir()
            (self.here / f"kernels_{backend}" / "__init__.py").touch()
        self.patch.setattr(model.ops, "ROOT", self.here)

    def loaded_ops(self, run: RunConfig) -> dict[str, str]:
        """Where each op of a training run comes from."""
        ops = model.ops.load_ops(run.kernels, "cpu")
        return {op: getattr(ops, op).__module__ for op in OP_NAMES}

    # Inference.

    def told(self, run: InferConfig) -> str:
        """The story."""
        return "".join(self._pieces(run))

    def told_in_pieces(self, run: InferConfig) -> list[str]:
        """The story, as it came."""
        return self._pieces(run)

    def _pieces(self, run: InferConfig) -> list[str]:
        pieces: list[str] = []
        for place in (console, chat):
            self.patch.setattr(place, "show", pieces.append)
        self.patch.setattr(sys, "stdin", io.StringIO())
        infer.main(run)
        return pieces

    def answered(self, run: InferConfig) -> dict[str, str]:
        """The answers to a file of prompts, and where they are."""
        infer.main(run)
        return {path.name: path.read_text() for path in self.here.glob("*.jsonl") if "samples" in path.read_text()}

    def answered_after_another(self, run: InferConfig) -> str:
        """What is said to an output that another model began."""
        infer.main(replace(run, ckpt=f"{run.runs_dir}/a"))
        try:
            infer.main(run)
        except KestrelError as error:
            return str(error).partition("was begun by a step 6")[1]
        return "nothing was said"

    def engine_cache(self, run: InferConfig) -> torch.dtype:
        return infer.load_engine(run).cache.k.dtype

    def engine_rows(self, run: InferConfig) -> int:
        return infer.load_engine(run).max_rows

    def engine_guesses(self, run: InferConfig) -> int:
        return infer.load_engine(run).speculate

    def engine_codes(self, run: InferConfig) -> str:
        model = infer.load_engine(run).model
        return digest(layer.weight_in(torch.float32) for layer in quantised_layers(model).values())

    def engine_ops(self, run: InferConfig) -> dict[str, str]:
        """Where each op of the model comes from."""
        ops = infer.load_engine(run).model.ops
        return {op: getattr(ops, op).__module__ for op in OP_NAMES}

    def engine_dtype(self, run: InferConfig) -> set[torch.dtype]:
        return {parameter.dtype for parameter in infer.load_engine(run).model.parameters()}

    def engine_is_deterministic(self, run: InferConfig) -> bool:
        infer.load_engine(run)
        return torch.are_deterministic_algorithms_enabled()

    def engine_threads(self, run: InferConfig) -> int:
        infer.load_engine(run)
        return torch.get_num_threads()


def digest(tensors: Any) -> str:
    """Equal for equal bits."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(str(tuple(tensor.shape)).encode())
        sha.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()


def write_hub(folder: Path) -> None:
    """The shards of two sets in two revisions."""
    for repo, revision in (("birds/one", "r1"), ("birds/one", "r2"), ("birds/two", "r1")):
        place = folder / "datasets" / repo / "resolve" / revision
        place.mkdir(parents=True)
        for number in (0, 1, sources.CLIMBMIX_LAST_SHARD):
            texts = [f"{repo} in {revision}: bird {number} of row {row}" for row in range(5)]
            path = place / f"shard_{number:05d}.parquet"
            pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)


class MadeUpSplit:
    """As much of a `datasets.Dataset` as is needed."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def select_columns(self, columns: list[str]) -> "MadeUpSplit":
        return self

    def to_parquet(self, path: str) -> None:
        pyarrow.parquet.write_table(pyarrow.table({"text": self.texts}), path)


def load_made_up_dataset(repo: str, *, revision: str, cache_dir: str) -> dict[str, MadeUpSplit]:
    splits = {"train": 8, "validation": 4}
    return {name: MadeUpSplit([f"{repo} {revision} {name} {i}" for i in range(n)]) for name, n in splits.items()}


def made_up_tensorboard(board: list) -> types.ModuleType:
    """A package that is installed, and keeps what it is told."""

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None: ...

        def add_scalar(self, key: str, value: float, step: int) -> None:
            board.append((key, value, step))

        def add_text(self, key: str, text: str, step: int) -> None: ...

        def close(self) -> None: ...

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    return module
