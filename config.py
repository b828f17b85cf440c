"""From YAML and the command line to one typed object; every mistake is answered in one line, before anything is loaded.

Each part of the project keeps its dataclass beside the code that reads it; this file only gathers them into
`RunConfig` and `InferConfig`, registers them as Hydra schemas (so that an unknown or mistyped key stops here), and runs
a command with the composed result. Hydra and OmegaConf are known to this file and to nothing below it.

Configs that come out of a checkpoint are data: they are read as JSON and never composed or instantiated.
"""

import difflib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, Optional

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.sources import SCHEMAS as DATA_SCHEMAS
from data.sources import DataConfig
from data.tokenizer import TokenizerConfig
from errors import KestrelError
from inference.sampling import SamplingConfig
from model.config import ModelConfig
from model.llama import LlamaConfig
from model.nanochat import NanochatConfig
from model.ops import KernelConfig
from optim.groups import AdamWConfig, MuonAdamWConfig, OptimConfig
from training.distributed import HardwareConfig
from training.horizon import StageConfig

CONF = Path(__file__).parent / "conf"
# Values that are paths or prose, not Hydra syntax: taken as typed, whatever commas, quotes or brackets they hold.
PATH_KEYS = ("data.files", "data.val_files")


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
        if self.seed < 0:
            raise KestrelError(f"seed must not be negative, got {self.seed}")
        if self.resume not in ("auto", "never") and not Path(self.resume).exists():
            raise KestrelError(
                f"resume must be auto, never or the path of a run or checkpoint, and '{self.resume}' does not exist"
            )


MODES = ("generate", "chat", "batch")


@dataclass
class InferConfig(SamplingConfig):
    """Everything `infer.py` needs beside what the checkpoint says: how to sample, and on what."""

    mode: str = "generate"
    ckpt: Optional[str] = None
    prompt: Optional[str] = None
    stream: bool = True  # show tokens as they come; false: the whole text at the end
    input: Optional[str] = None  # of mode=batch, like the next two
    output: Optional[str] = None
    max_rows: int = 16
    runs_dir: str = "runs"
    kernels: KernelConfig = MISSING
    hardware: HardwareConfig = MISSING

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in MODES:
            raise KestrelError(f"mode must be one of {', '.join(MODES)}, got '{self.mode}'")
        if self.max_rows < 1:
            raise KestrelError(f"max_rows must be at least 1, got {self.max_rows}")

    def sampling(self) -> SamplingConfig:
        """How to sample, and nothing else."""
        return SamplingConfig(**{f.name: getattr(self, f.name) for f in fields(SamplingConfig)})


def register() -> None:
    """Tell Hydra the type of every group, so that conf/*.yaml can name its schema in `defaults`."""
    store = ConfigStore.instance().store
    store(name="train_schema", node=RunConfig)
    store(name="infer_schema", node=InferConfig)
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

    config_name   "train" or "infer"
    overrides     as typed after the command: ["model=d6", "data=tinystories"]
    → RunConfig or InferConfig; raises KestrelError, HydraException or OmegaConfBaseException
    """
    register()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = hydra.compose(config_name, [quote_path(item) for item in overrides or []], return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    return to_typed(cfg, config_name)


def to_typed(cfg: DictConfig, config_name: str) -> Any:
    """Resolve interpolations and build the dataclasses, whose `__post_init__` checks ranges."""
    root = {"train": RunConfig, "infer": InferConfig}[config_name]
    names = [f.name for f in fields(root)]
    refuse_additions(cfg, [*names, "hydra"])
    parts = OmegaConf.masked_copy(cfg, names)
    if missing := OmegaConf.missing_keys(parts):
        raise KestrelError(f"no {sorted(missing)[0]} is chosen: every group needs one, for example model=d2")
    typed = OmegaConf.to_object(parts)
    return root(**typed) if isinstance(typed, dict) else typed


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
    register()
    argv, raw = split_raw(sys.argv[1:], raw_keys)
    # argparse takes overrides in one piece, so `model=d6 -m seed=1,2` needs its flag in front
    sys.argv[1:] = sorted((quote_path(item) for item in argv), key=lambda item: item not in ("-m", "--multirun"))
    try:
        args = get_args_parser().parse_args(sys.argv[1:])
        if not (args.multirun or args.help or args.hydra_help):
            compose(config_name, args.overrides)
    except (KestrelError, ValueError, HydraException, OmegaConfBaseException) as error:
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
    except KeyboardInterrupt:
        print("stopped at once; what was saved before is intact", file=sys.stderr)
        sys.exit(130)
    except (HydraException, OmegaConfBaseException) as error:  # a sweep composes each job only when its turn comes
        stop(one_line(error))


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
    if os.environ.get("RANK", "0") == "0":
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
    if match := re.search(r"Error parsing override '(.*?)'\n", text, re.S):
        return f"cannot read the override {match[1]!r}: write key=value, and quote values that hold brackets or spaces"
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
