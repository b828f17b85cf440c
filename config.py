"""From YAML and the command line to one typed object; every mistake is answered in one line, before anything is loaded.

Each part of the project keeps its dataclass beside the code that reads it; this file only gathers them into
`RunConfig` and `InferConfig`, registers them as Hydra schemas (so that an unknown or mistyped key stops here), and runs
a command with the composed result. Hydra and OmegaConf are known to this file and to nothing below it.

Configs that come out of a checkpoint are data: they are read as JSON and never composed or instantiated.
"""

import contextlib
import difflib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, Optional

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.sources import SCHEMAS as DATA_SCHEMAS
from data.sources import DataConfig
from data.tokenizer import TokenizerConfig
from errors import KestrelError
from inference.request import stops_of
from inference.sampling import MAX_SAMPLES, SamplingConfig
from model.config import ModelConfig
from model.llama import LlamaConfig
from model.nanochat import NanochatConfig
from model.ops import KernelConfig
from model.quantised import cache_codes, quantisation_named
from optim.groups import AdamWConfig, MuonAdamWConfig, OptimConfig
from training.distributed import HardwareConfig, read_ranks
from training.horizon import StageConfig

CONF = Path(__file__).parent / "conf"
# Values that are paths or prose, not Hydra syntax: taken as typed, whatever commas, quotes or brackets they hold.
PATH_KEYS = ("data.files", "data.val_files")
MAX_FLOAT = 1e30  # beyond it fp32 arithmetic overflows, and JSON has no infinity: no checkpoint could hold it
MAX_INT = 2**63 - 1
MAX_RUN_NAME = 200  # bytes; file systems take 255, and -2, -3, … may be appended
MAX_JOB_NAME = 255
MAX_GUESSES = 63  # with the last token as many rows as products of few rows take
# What switches a number off, for who writes infinity and means that.
OFF = {
    "optim.grad_clip": "0",
    "optim.max_weight_decay": "1e9",
    "stage.target_flops": "-1",
    "stage.target_param_data_ratio": "-1",
    "repetition_penalty": "1",
    "top_p": "1",
}


@dataclass
class RunConfig:
    """Everything `train.py` needs; one field per folder of conf/."""

    model: ModelConfig = MISSING
    kernels: KernelConfig = MISSING
    data: DataConfig = MISSING
    tokenizer: TokenizerConfig = MISSING
    optim: OptimConfig = MISSING
    stage: StageConfig = MISSING
    hardware: HardwareConfig = MISSING
    run: str = MISSING
    runs_dir: str = "runs"
    seed: int = 42
    resume: str = "auto"
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name, base in (("model", ModelConfig), ("optim", OptimConfig)):
            if type(getattr(self, name)) is base:
                raise KestrelError(
                    f"no {name} is chosen: every group needs one, for example {name}=…; see conf/{name}/"
                )
        if not self.run or self.run.startswith((".", "/", "-")) or not re.fullmatch(r"[\w.,=+-]+", self.run):
            raise KestrelError(
                f"run must be a plain folder name (letters, digits, . , = + -), got '{self.run}': try run=my-first-run"
            )
        if len(self.run.encode()) > MAX_RUN_NAME:
            raise KestrelError(
                f"run is the name of a folder and may have {MAX_RUN_NAME} bytes, got {len(self.run.encode())} "
                f"('{self.run[:20]}…'): give a shorter one with run=NAME"
            )
        if self.seed < 0:
            raise KestrelError(f"seed must not be negative, got {self.seed}")
        if self.resume not in ("auto", "never"):
            refuse_missing_resume(self.resume)


MODES = ("generate", "chat", "batch")


@dataclass
class InferConfig(SamplingConfig):
    """Everything `infer.py` needs beside what the checkpoint says: how to sample, and on what."""

    mode: str = "generate"
    ckpt: Optional[str] = None
    prompt: Optional[str] = None
    stream: bool = True  # show tokens as they come; false: the whole text at the end
    input: Optional[str] = None  # of mode=batch, like the next three
    output: Optional[str] = None
    any_model: bool = False
    max_rows: int = 16
    stop: Optional[str] = None  # a text, or a list of texts in JSON
    speculate: int = 0
    runs_dir: str = "runs"
    quant: Optional[str] = None  # None: the weights as they are saved
    quant_group: int = 128
    quant_cache: Optional[str] = None  # None: keys and values in the dtype of the model
    kernels: KernelConfig = MISSING
    hardware: HardwareConfig = MISSING

    def __post_init__(self) -> None:
        super().__post_init__()
        quantisation_named(self.quant, self.quant_group)
        cache_codes(self.quant_cache)
        stops_of(self.stop)
        if self.mode not in MODES:
            raise KestrelError(f"mode must be one of {', '.join(MODES)}, got '{self.mode}'")
        if not 0 <= self.speculate <= MAX_GUESSES:
            raise KestrelError(f"speculate must be between 0 (off) and {MAX_GUESSES}, got {self.speculate}")
        if self.max_rows < 1:
            raise KestrelError(f"max_rows must be at least 1, got {self.max_rows}")
        if self.num_samples > MAX_SAMPLES:
            raise KestrelError(
                f"num_samples must be at most {MAX_SAMPLES}, got {self.num_samples}: they are told side by side, "
                "so run the command again with another seed for more"
            )

    def sampling(self) -> SamplingConfig:
        """How to sample, and nothing else."""
        return SamplingConfig(**{f.name: getattr(self, f.name) for f in fields(SamplingConfig)})


@dataclass
class QuantizeConfig:
    """Everything `quantize.py` needs."""

    quant: Optional[str] = None
    quant_group: int = 128
    ckpt: Optional[str] = None
    runs_dir: str = "runs"
    out: Optional[str] = None
    device: str = "auto"

    def __post_init__(self) -> None:
        quantisation_named(self.quant, self.quant_group)
        if self.device not in ("auto", "cpu", "cuda"):
            raise KestrelError(f"device must be auto, cpu or cuda, got '{self.device}'")


def refuse_missing_resume(path: str) -> None:
    """Refuse a path to go on from that is empty, is not there or may not be looked at."""
    wanted = "resume must be auto, never or the path of a run or checkpoint"
    if not path:
        raise KestrelError(f"{wanted}, and it is empty: leave it out for auto")
    try:
        os.stat(path)
    except FileNotFoundError:
        raise KestrelError(f"{wanted}, and '{path}' does not exist") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise KestrelError(f"{wanted}, and '{path:.200}' cannot be read: {reason}") from error


def register() -> None:
    """Tell Hydra the type of every group, so that conf/*.yaml can name its schema in `defaults`."""
    store = ConfigStore.instance().store
    store(name="train_schema", node=RunConfig)
    store(name="infer_schema", node=InferConfig)
    store(name="quantize_schema", node=QuantizeConfig)
    schemas: dict[str, dict[str, type]] = {
        "model": {"nanochat_schema": NanochatConfig, "llama_schema": LlamaConfig},
        "kernels": {"kernels_schema": KernelConfig},
        "data": DATA_SCHEMAS,
        "tokenizer": {"tokenizer_schema": TokenizerConfig},
        "optim": {"muon_adamw_schema": MuonAdamWConfig, "adamw_schema": AdamWConfig},
        "stage": {"pretrain_schema": StageConfig},
        "hardware": {"hardware_schema": HardwareConfig},
    }
    for group, nodes in schemas.items():
        for name, node in nodes.items():
            store(group=group, name=name, node=node)


def compose(config_name: str = "train", overrides: list[str] | None = None) -> Any:
    """The typed config a command line would give: for tests, benches and notebooks.

    config_name   "train", "infer" or "quantize"
    overrides     as typed after the command: ["model=d6", "data=tinystories"]
    → RunConfig, InferConfig or QuantizeConfig; raises KestrelError, HydraException or OmegaConfBaseException
    """
    register()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = hydra.compose(config_name, [quote_path(item) for item in overrides or []], return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    return to_typed(cfg, config_name)


def to_typed(cfg: DictConfig, config_name: str) -> Any:
    """Resolve interpolations and build the dataclasses, whose `__post_init__` checks ranges."""
    root = {"train": RunConfig, "infer": InferConfig, "quantize": QuantizeConfig}[config_name]
    names = [f.name for f in fields(root)]
    refuse_additions(cfg, [*names, "hydra"])
    parts = OmegaConf.masked_copy(cfg, names)
    if missing := OmegaConf.missing_keys(parts):
        raise KestrelError(f"no {sorted(missing)[0]} is chosen: every group needs one, for example model=d2")
    refuse_numbers(OmegaConf.to_container(parts, resolve=True))
    typed = OmegaConf.to_object(parts)
    return root(**typed) if isinstance(typed, dict) else typed


def refuse_numbers(values: Any, key: str = "") -> None:
    """Refuse infinity, NaN and numbers too large to compute with, wherever they stand."""
    if isinstance(values, dict):
        for name, value in values.items():
            refuse_numbers(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for value in values:
            refuse_numbers(value, key)
    elif isinstance(values, float) and not -MAX_FLOAT <= values <= MAX_FLOAT:
        remedy = f": write {key}={OFF[key]} to switch it off" if key in OFF else ""
        raise KestrelError(f"{key} must be a finite number, at most {MAX_FLOAT:g}, got {values}{remedy}")
    elif isinstance(values, int) and abs(values) > MAX_INT:
        raise KestrelError(f"{key} must be at most {MAX_INT}, got {hex(values)[:20]}…")


def refuse_additions(cfg: DictConfig, names: list[str], prefix: str = "") -> None:
    """Refuse keys that were added with `+`, which would get past the schema and mean nothing."""
    for key in cfg:
        if key not in names:
            raise KestrelError(
                f"there is no key {prefix}{key}; known keys: {', '.join(sorted(set(names) - {'hydra'}))}"
            )
        if key != "hydra" and not OmegaConf.is_missing(cfg, key) and isinstance(cfg._get_node(key), DictConfig):
            node = cfg[key]
            refuse_additions(node, [f.name for f in fields(OmegaConf.get_type(node))], f"{prefix}{key}.")


def run_command(config_name: str, main: Callable[[Any], None], raw_keys: tuple[str, ...] = ()) -> None:
    """Run `main(config)` with the config composed from sys.argv; `raw_keys` are taken as typed, past Hydra's grammar.

    A KestrelError becomes one line on stderr and exit status 2. Without sweeps the config is composed once before Hydra
    takes over, because Hydra's own messages are long and a mistake should be known before any folder is made.
    """
    try:
        _run_command(config_name, main, raw_keys)
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            print("stopped at once; what was saved before is intact", file=sys.stderr)
        sys.exit(130)


def _run_command(config_name: str, main: Callable[[Any], None], raw_keys: tuple[str, ...]) -> None:
    if sys.stderr is None:  # closed; print would take standard output instead
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    register()
    argv, raw = split_raw(sys.argv[1:], raw_keys)
    # argparse takes overrides in one piece, so `model=d6 -m seed=1,2` needs its flag in front
    sys.argv[1:] = sorted((quote_path(item) for item in argv), key=lambda item: item not in ("-m", "--multirun"))
    try:
        args = get_args_parser().parse_args(sys.argv[1:])
        if not (args.help or args.hydra_help):
            jobs = sweep_jobs(args.overrides) if args.multirun else [args.overrides]
            configs = [compose(config_name, overrides) for overrides in jobs]
            if args.multirun and not any(item.startswith("hydra.") for item in args.overrides):
                make_sweep_folder(configs[0].runs_dir, jobs if config_name == "train" else [])
    except (KestrelError, ValueError, ArithmeticError, HydraException, OmegaConfBaseException) as error:
        stop(one_line(error))

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)
    def entry(cfg: DictConfig) -> Any:
        try:
            config = to_typed(cfg, config_name)
            for key, value in raw.items():
                setattr(config, key, value)
            return main(config)
        except (KestrelError, OmegaConfBaseException) as error:
            stop(one_line(error))

    try:
        entry()
    except (HydraException, OmegaConfBaseException) as error:  # a sweep composes each job again when its turn comes
        stop(one_line(error))


def sweep_jobs(overrides: list[str]) -> list[list[str]]:
    """The overrides of every job of a sweep, so that a mistake in the last is known before the first is trained."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    return BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]


def make_sweep_folder(runs_dir: str, jobs: list[list[str]]) -> None:
    """Make it as Hydra would, and see that its jobs can have folders, which are named after their overrides."""
    longest = max((len(",".join(job).encode()) for job in jobs), default=0)
    if longest > MAX_JOB_NAME:
        raise KestrelError(
            f"a job's folder is named after its overrides, which here take {longest} bytes of {MAX_JOB_NAME}: "
            "give fewer (what all jobs share can go into conf/experiment/), or number the folders with "
            "hydra.sweep.subdir='${hydra:job.num}'"
        )
    folder = Path(runs_dir) / "sweeps"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KestrelError(
            f"cannot make the folder {folder!s:.200} ({error.strerror or error}): choose another with runs_dir="
        ) from error


def split_raw(argv: list[str], raw_keys: tuple[str, ...]) -> tuple[list[str], dict[str, str]]:
    """Take `key=anything at all` out of argv for the given keys; the last one given wins."""
    raw = {key: item[len(key) + 1 :] for item in argv for key in raw_keys if item.startswith(f"{key}=")}
    return [item for item in argv if not item.startswith(tuple(f"{key}=" for key in raw_keys))], raw


def quote_path(item: str) -> str:
    """`data.files=a b(1).txt` as the list Hydra wants: data.files=['a b(1).txt']; commas separate several paths."""
    key, _, value = item.partition("=")
    if key not in PATH_KEYS or value.startswith("[") or value in ("", "null"):
        return item
    quoted = ",".join("'" + path.replace("\\", "\\\\").replace("'", "\\'") + "'" for path in value.split(","))
    return f"{key}=[{quoted}]"


def stop(message: str) -> NoReturn:
    """Print one line and exit with status 2; under torchrun every rank sees the same mistake, so only rank 0 speaks."""
    try:
        is_main = read_ranks(os.environ)[0] == 0
    except KestrelError:
        is_main = True  # nobody else may speak
    if is_main:
        with contextlib.suppress(OSError):  # nobody reads it
            print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def one_line(error: BaseException) -> str:
    """What is wrong and what would be right, without Hydra's search paths and environment hints."""
    if isinstance(error, KestrelError):
        return str(error).replace("\n", " ")
    cause = error.__cause__ if isinstance(error, HydraException) and error.__cause__ is not None else error
    text = str(error).strip()
    if match := re.search(
        r"Could not find '([^']+)'.*?Available options in '([^']+)':\n(.*?)\nConfig search", text, re.S
    ):
        wanted, group, listing = match.groups()
        options = [name for name in listing.split() if not name.endswith("_schema")]
        return f"there is no {group}={wanted.split('/')[-1]}; choose from {', '.join(sorted(options))}"
    if match := re.search(r"In '([^']+)':.*Key '([^']+)' not in '([^']+)'", text, re.S):
        choice, key, owner = match.groups()
        return f"{choice.replace('/', '=')} sets {key}, which {owner} does not have: the two do not go together"
    if (key := getattr(cause, "key", None)) is not None and "not in" in str(cause).lower():
        return unknown_key(cause, str(key))
    if isinstance(cause, OmegaConfBaseException) and getattr(cause, "full_key", None):
        return f"{cause.full_key}: {str(cause).splitlines()[0]}"
    if match := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return f"{match[1]} gives several values: add -m to run one after the other, or name one"
    if match := re.search(r"(?:Error parsing override '|LexerNoViableAltException: )(.*?)'?\n", text, re.S):
        return (
            f"cannot read the override '{match[1]}': write key=value, and quote values that hold brackets, spaces or "
            "letters with accents: \"key='välue'\""
        )
    if match := re.search(r"\n\s*full_key: (\S+)", text):
        return f"{match[1]}: {text.splitlines()[0]}"
    lines = [line.strip() for line in text.splitlines() if line.strip() and "HYDRA_FULL_ERROR" not in line]
    return " ".join(lines)


def unknown_key(cause: BaseException, key: str) -> str:
    """Name the key, where it was looked for, and the nearest key that exists."""
    owner = getattr(cause, "object_type", None)
    full_key = getattr(cause, "full_key", None) or key
    names = [f.name for f in fields(owner)] if owner is not None and is_dataclass(owner) else []
    close = difflib.get_close_matches(key, names, n=1)
    prefix = full_key[: -len(key)]
    known = f"did you mean {prefix}{close[0]}?" if close else f"known keys: {', '.join(prefix + n for n in names)}"
    return f"there is no key {full_key}" + (f" in {owner.__name__}: {known}" if names else "")


def sweep_directory() -> Path | None:
    """In a sweep (`-m`) the folder Hydra gave this job, named after its overrides; else None."""
    hydra_config = HydraConfig.get()
    return Path(hydra_config.runtime.output_dir) if hydra_config.mode == RunMode.MULTIRUN else None


def to_yaml(settings: dict) -> str:
    """Plain settings as YAML text, for people to read."""
    return OmegaConf.to_yaml(OmegaConf.create(settings))
