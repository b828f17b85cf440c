"""Where documents come from: sets made here, local files, or sets fetched once from the network into the cache.

    open_source(config).documents("train")      a pass over the training documents, as strings, always in the same order

Every set that comes over the network is fetched whole into `<cache>/sources/<name>/…` as ordinary text or parquet files
and read from there, so there is one reader, a run needs no network, and files put there by hand do as well. The same
command fetches ahead of time where there is a network: `python -m data.sources tinystories`.

The two splits share no document. Validation is, in this order: data.val_files; files whose names have the word val,
valid or validation; the end of the text, by position, for books and where there are fewer than FEW_DOCUMENTS; and
otherwise the documents whose own hash says so, which stays put when files are added, and takes copies along together.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Optional, Protocol

from data import download
from data.files import default_cache_dir, locked, publish
from data.gutenberg import strip_gutenberg
from data.text_files import VALIDATION_WORDS, find_files, has_word, read_documents
from errors import KestrelError

FEW_DOCUMENTS = 100
SAMPLE_DOCUMENTS = 1000  # read ahead to be sure that both splits get a document
CLIMBMIX_LAST_SHARD = 6542
CONF = Path(__file__).parent.parent / "conf" / "data"


@dataclass
class DataConfig:
    """What every data set can be told; `data.files` puts local files in the place of its own origin."""

    name: str = "text"
    files: list[str] = field(default_factory=list)  # paths, folders, globs: .txt, .jsonl, .parquet
    val_files: list[str] = field(default_factory=list)
    val_fraction: float = 0.01  # held out where the set has no validation files of its own
    column: str = "text"  # the field of .jsonl objects, the column of .parquet files
    cache_dir: Optional[str] = None  # downloads and token shards; default ~/.cache/kestrel
    vocab_size: int = 4096  # of a BPE trained on this set

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise KestrelError(f"data.val_fraction must be between 0 and 1, got {self.val_fraction}")
        if self.vocab_size < 1:
            raise KestrelError(f"data.vocab_size must be positive, got {self.vocab_size}")
        if self.val_files and not self.files:
            raise KestrelError(f"data.val_files={self.val_files} goes with data.files, which is empty: give both")
        for key in ("name", "column"):
            if not getattr(self, key):
                raise KestrelError(f"data.{key} must not be empty")


@dataclass
class FablesConfig(DataConfig):
    """Stories made up by data/fables.py."""

    name: str = "fables"
    val_fraction: float = 0.05  # how much validation text for so much training text
    seed: int = 1
    megabytes: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.01 <= self.megabytes <= 10_000:
            raise KestrelError(f"data.megabytes must be 0.01 to 10000, got {self.megabytes}")
        if self.seed < 0:
            raise KestrelError(f"data.seed must not be negative, got {self.seed}")


@dataclass
class TextConfig(DataConfig):
    """Any local files."""


@dataclass
class BookConfig(DataConfig):
    """One text at one address, split by position."""

    url: str = ""
    sha256: Optional[str] = None  # None: the address itself pins the text, as one that names a commit does


@dataclass
class HubConfig(DataConfig):
    """A set of the Hugging Face hub, at one revision, read through `datasets`."""

    repo: str = ""
    revision: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.revision:
            raise KestrelError(f"data.revision must name a commit of {self.repo}, so that the data cannot change")


@dataclass
class ClimbmixConfig(HubConfig):
    """Numbered parquet shards on the hub, of which the last validates."""

    n_shards: int = 8  # for training, counted from the first; -1: all
    workers: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_shards != -1 and not 1 <= self.n_shards <= CLIMBMIX_LAST_SHARD:
            raise KestrelError(f"data.n_shards must be 1 to {CLIMBMIX_LAST_SHARD}, or -1 for all, got {self.n_shards}")
        if self.val_fraction != DataConfig.val_fraction:
            raise KestrelError(
                f"data.val_fraction={self.val_fraction} means nothing for climbmix, whose last shard validates: "
                "leave it out"
            )
        if not 1 <= self.workers <= 64:
            raise KestrelError(f"data.workers must be 1 to 64, got {self.workers}")


# The name by which conf/data/*.yaml asks for each type; registered with Hydra by config.py.
SCHEMAS: dict[str, type[DataConfig]] = {
    "fables_schema": FablesConfig,
    "text_schema": TextConfig,
    "book_schema": BookConfig,
    "hub_schema": HubConfig,
    "climbmix_schema": ClimbmixConfig,
}


class Source(Protocol):
    """Documents in two splits, "train" and "val", that share none."""

    name: str

    @property
    def fingerprint(self) -> str:
        """A hash of what the content depends on, without reading it all: the key of the token cache."""

    def documents(self, split: str) -> Iterator[str]:
        """A pass over the documents of a split, in an order that never changes; KestrelError if there is none."""


def open_source(config: DataConfig) -> Source:
    """The documents that a config describes; fetches what is missing, or says within 5 s that it cannot."""
    if config.files:
        return _from_files(config, find_files(config.files))
    if isinstance(config, FablesConfig):
        return FablesSource(config)
    if isinstance(config, ClimbmixConfig):
        return _climbmix(config)
    if isinstance(config, HubConfig | BookConfig):
        return _from_files(config, _fetched_files(config))
    raise KestrelError(f"data={config.name} needs files: give data.files=notes.txt, a folder or a glob")


# ---------------------------------------------------------------------------------------------------- made on the spot


class FablesSource:
    """Generated stories; the splits are apart because data/fables.py draws them apart."""

    def __init__(self, config: FablesConfig) -> None:
        self.name, self.config = config.name, config
        # made beside the training text and not taken from it; some twenty stories at least
        self.megabytes = {"train": config.megabytes, "val": max(0.02, config.megabytes * config.val_fraction)}

    @cached_property
    def fingerprint(self) -> str:
        """Of the settings and of the first stories, which change when the generator does."""
        first = [list(islice(self.documents(split), 100)) for split in ("train", "val")]
        return _hash(["fables", self.config.seed, self.megabytes, first])

    def documents(self, split: str) -> Iterator[str]:
        from data.fables import corpus

        return _checked(corpus(self.config.seed, split, self.megabytes[split]), f"data={self.name}", split)


# --------------------------------------------------------------------------------------------------------- local files


class _Sample(NamedTuple):
    count: int
    lowest: float
    highest: float


@dataclass
class FilesSource:
    """Documents of local files; without validation files, some are held out as the module's docstring says."""

    name: str
    train_files: list[Path]
    val_files: list[Path]
    val_fraction: float
    column: str
    by_position: bool = False  # hold out the end of each document even where there are many
    clean: Callable[[str], str] | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Of how files are read and of each one's name, size, time of change, beginning and end."""
        reading = [self.column, self.by_position, self.clean.__name__ if self.clean else None]
        splitting = None if self.val_files else self.val_fraction
        return _hash(["files", 1, reading, splitting, [[_file_mark(p) for p in q] for q in self._files.values()]])

    @property
    def _files(self) -> dict[str, list[Path]]:
        return {"train": self.train_files, "val": self.val_files}

    def documents(self, split: str) -> Iterator[str]:
        return _checked(self._split(split), f"data={self.name} ({self._describe(split)})", split)

    def _split(self, split: str) -> Iterator[str]:
        if self.val_files:
            return self._read(self._files[split])
        if self.by_position or self._sample.count < FEW_DOCUMENTS:
            return self._cut(split)
        return (text for text in self._read(self.train_files) if self._is_held_out(text) == (split == "val"))

    def _read(self, files: list[Path]) -> Iterator[str]:
        for path in files:
            for text in read_documents(path, self.column):
                yield self.clean(text) if self.clean else text

    def _cut(self, split: str) -> Iterator[str]:
        """The part of each document before, or from, the point where validation begins."""
        for text in self._read(self.train_files):
            cut = max(1, int(len(text) * (1 - self.val_fraction)))
            if part := text[:cut] if split == "train" else text[cut:]:
                yield part

    def _is_held_out(self, text: str) -> bool:
        # the smallest and the largest mark of the sample are decided beforehand, so that neither split can be empty
        mark = _text_mark(text)
        return mark == self._sample.lowest or (mark < self.val_fraction and mark != self._sample.highest)

    @cached_property
    def _sample(self) -> _Sample:
        """What the first documents tell: all there are, if there are few."""
        marks = [_text_mark(text) for text in islice(self._read(self.train_files), SAMPLE_DOCUMENTS)] or [0.0]
        if len(marks) >= FEW_DOCUMENTS and min(marks) == max(marks):
            raise KestrelError(
                f"data={self.name}: the documents are all the same, so none can be held out; give data.val_files"
            )
        return _Sample(len(marks), min(marks), max(marks))

    def _describe(self, split: str) -> str:
        files = self._files[split] or self.train_files
        return f"{files[0]}" + (f" and {len(files) - 1} more" if len(files) > 1 else "") if files else "no files"


def _checked(documents: Iterator[str], what: str, split: str) -> Iterator[str]:
    """The same documents, and an error instead of none at all: a trainer would wait for the first one forever."""
    empty = True
    for document in documents:
        empty = False
        yield document
    if empty:
        remedy = "give more text" if split == "train" else "give data.val_files, or more text"
        raise KestrelError(f"{what}: there is no text in the {split} split; {remedy}")


def _from_files(config: DataConfig, files: list[Path]) -> FilesSource:
    """Sort files into the splits by data.val_files or by their names."""
    if config.val_files:
        val_files = find_files(config.val_files, "data.val_files")
    else:
        val_files = [file for file in files if has_word(file, VALIDATION_WORDS)]
        if val_files and (tests := [file for file in files if has_word(file, {"test"})]):
            print(f"note: left out as test data: {', '.join(file.name for file in tests)}", file=sys.stderr)
            files = [file for file in files if file not in tests]
    train_files = [file for file in files if file not in val_files]
    if isinstance(config, ClimbmixConfig) and not val_files:
        train_files, val_files = files[:-1], files[-1:]
    if not train_files:
        raise KestrelError(
            f"data.files={','.join(config.files)}: nothing is left to train on, "
            f"{val_files[0].name} being for validation; give at least one more file"
        )
    is_book = isinstance(config, BookConfig)
    clean = strip_gutenberg if is_book else None
    return FilesSource(config.name, train_files, val_files, config.val_fraction, config.column, is_book, clean)


def _text_mark(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=6).digest()
    return int.from_bytes(digest, "little") / 2**48


def _file_mark(path: Path) -> list[Any]:
    try:
        status = path.stat()
        with open(path, "rb") as handle:
            head = handle.read(4096)
            handle.seek(max(0, status.st_size - 4096))
            ends = hashlib.sha256(head + handle.read(4096)).hexdigest()
    except OSError as error:
        raise KestrelError(f"cannot read {path}: {error.strerror or error}") from error
    return [path.name, status.st_size, status.st_mtime_ns, ends]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


# ----------------------------------------------------------------------------------------------------- from the network


def source_folder(config: DataConfig) -> Path:
    """Where a set's files lie, fetched or put there by hand."""
    folder = default_cache_dir(config.cache_dir) / "sources" / config.name
    return folder / config.revision[:12] if isinstance(config, HubConfig) else folder


def _fetched_files(config: HubConfig | BookConfig) -> list[Path]:
    """The files of a set's folder, fetching them first if they are not all there."""
    folder = source_folder(config)
    if not _training_files(folder):
        address = config.url if isinstance(config, BookConfig) else f"{download.hub_endpoint()}/datasets/{config.repo}"
        _require_network(config, address, "nothing")
        with _fetching_into(folder):
            if not _training_files(folder):
                _fetch_book(config, folder) if isinstance(config, BookConfig) else _fetch_hub(config, folder)
    return find_files([str(folder)])


@contextmanager
def _fetching_into(folder: Path) -> Iterator[None]:
    """One process at a time; a disk that refuses is an error like any other."""
    try:
        with locked(folder / ".lock"):
            yield
    except OSError as error:
        raise KestrelError(f"cannot write to {folder}: {error.strerror or error}; set data.cache_dir") from error


def _training_files(folder: Path) -> list[Path]:
    """Validation is fetched first, so a training file means that the set is whole."""
    try:
        return [file for file in find_files([str(folder)]) if not has_word(file, VALIDATION_WORDS)]
    except KestrelError:
        return []


def _require_network(config: DataConfig, address: str, present: str) -> None:
    """An error that helps, within seconds, where there is no network or it is to be left alone."""
    if download.is_offline_by_choice():
        reason = "HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set"
    elif not download.is_reachable(address):
        reason = f"{address.split('/')[2]} does not answer"
    else:
        return
    n_shards = f" n_shards={config.n_shards}" if isinstance(config, ClimbmixConfig) else ""
    raise KestrelError(
        f"data={config.name} needs files that are not here and {reason}: where there is a network run "
        f"`python -m data.sources {config.name}{n_shards}` and copy what it fetched into {source_folder(config)} "
        f"(which holds {present} of it), or give local files with data.files=…"
    )


def _fetch_book(config: BookConfig, folder: Path) -> None:
    name = Path(config.url).name
    download.download(config.url, folder / name, sha256=config.sha256, check=_is_utf8)


def _is_utf8(path: Path) -> bool:
    """Text rather than an error page or an empty answer."""
    content = path.read_bytes()
    return bool(content) and b"\0" not in content and not content.lstrip().lower().startswith((b"<!doctype", b"<html"))


def _fetch_hub(config: HubConfig, folder: Path) -> None:
    """Load the set with `datasets` and keep its text as parquet, validation first; the loader's own copy is dropped."""
    scratch = folder / ".datasets"
    try:
        import datasets

        loaded = datasets.load_dataset(config.repo, revision=config.revision, cache_dir=str(scratch))
        for split, name in _hub_splits(config, list(loaded)):
            temporary = folder / f"{name}.parquet.tmp"
            loaded[split].select_columns([config.column]).to_parquet(str(temporary))
            publish(temporary, folder / f"{name}.parquet")
        del loaded
    except ImportError as error:
        raise KestrelError(f"data={config.name} is fetched with datasets: pip install datasets") from error
    except KestrelError:
        raise
    except Exception as error:  # it raises whatever its many layers raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise KestrelError(f"cannot fetch {config.repo} at {config.revision[:12]}: {reason}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _hub_splits(config: HubConfig, present: list[str]) -> list[tuple[str, str]]:
    """Which splits to keep and under which name."""
    if "train" not in present:
        raise KestrelError(f"{config.repo} has no split named train, only {', '.join(present)}")
    held_out = [name for name in ("validation", "valid", "val", "test") if name in present]
    return [(name, "valid") for name in held_out[:1]] + [("train", "train")]


def climbmix_shards(config: ClimbmixConfig) -> list[str]:
    """File names of the wanted shards: those for training in order, then the one for validation."""
    count = CLIMBMIX_LAST_SHARD if config.n_shards == -1 else config.n_shards
    return [f"shard_{number:05d}.parquet" for number in (*range(count), CLIMBMIX_LAST_SHARD)]


def _climbmix(config: ClimbmixConfig) -> FilesSource:
    folder, names = source_folder(config), climbmix_shards(config)
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        base = f"{download.hub_endpoint()}/datasets/{config.repo}/resolve/{config.revision}"
        _require_network(config, f"{base}/{missing[-1]}", f"{len(names) - len(missing)} of {len(names)} shards")
        with _fetching_into(folder):
            _fetch_shards(config, base, folder, missing)
    files = [folder / name for name in names]
    return FilesSource(config.name, files[:-1], files[-1:], config.val_fraction, config.column)


def _fetch_shards(config: ClimbmixConfig, base: str, folder: Path, names: list[str]) -> None:
    """Fetch shards side by side, the one for validation first; a shard that fails stops the rest."""
    from tqdm import tqdm

    sizes: dict[str, int] = {}
    with tqdm(unit="B", unit_scale=True, desc=f"{config.name}: {len(names)} shards") as bar:

        def fetch(name: str) -> None:
            def progress(size: int) -> None:
                bar.update(size - sizes.get(name, 0))
                sizes[name] = size

            download.download(f"{base}/{name}", folder / name, check=_is_parquet, progress=progress)

        with ThreadPoolExecutor(config.workers) as pool:
            try:
                for done in [pool.submit(fetch, name) for name in (names[-1], *names[:-1])]:
                    done.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def _is_parquet(path: Path) -> bool:
    with open(path, "rb") as handle:
        head = handle.read(4)
        handle.seek(-4, 2)
        return head == handle.read(4) == b"PAR1"


# ------------------------------------------------------------------------------------------------------------- command


def load_config(name: str, **changes: Any) -> DataConfig:
    """The config of conf/data/<name>.yaml, for commands and notebooks that do without Hydra."""
    import yaml

    path = CONF / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in CONF.glob("*.yaml")))
        raise KestrelError(f"there is no data={name}; choose from {known}")
    values = yaml.safe_load(path.read_text())
    schema = SCHEMAS[values.pop("defaults")[0]]
    if unknown := set(changes) - {key.name for key in fields(schema)}:
        raise KestrelError(f"there is no key data.{unknown.pop()} for data={name}")
    return schema(**(values | changes))


def main(arguments: list[str]) -> None:
    """`python -m data.sources NAME [key=value …]`: fetch a set into the cache, ahead of time."""
    import yaml

    if not arguments or "=" in arguments[0] or arguments[0].startswith("-"):
        raise KestrelError("usage: python -m data.sources NAME [key=value …], for example climbmix n_shards=8")
    changes = dict(argument.split("=", 1) for argument in arguments[1:] if "=" in argument)
    config = load_config(arguments[0], **{key: yaml.safe_load(value) for key, value in changes.items()})
    source = open_source(config)
    if isinstance(source, FilesSource):
        files = source.train_files + source.val_files
        total = sum(file.stat().st_size for file in files)
        print(f"data={config.name}: {len(files)} files, {total / 1e6:.1f} MB, in {files[0].parent}")
    else:
        print(f"data={config.name} is generated; there is nothing to fetch")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KestrelError as error:
        sys.exit(f"error: {error}")
