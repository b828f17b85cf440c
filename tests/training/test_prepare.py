"""What the cache and the data can do to a run before it begins."""

from pathlib import Path

import pytest
import torch

from data.sources import FablesConfig, TextConfig
from data.tokenizer import TokenizerConfig
from errors import KestrelError
from training.distributed import Device
from training.prepare import prepare_data, require_files

CPU = Device(torch.device("cpu"), torch.float32)


def prepare(folder: Path, cache: Path) -> None:
    text = folder / "t.txt"
    if not text.exists():
        text.write_text("Once upon a time. " * 100)
    prepare_data(TextConfig(files=[str(text)], cache_dir=str(cache)), TokenizerConfig(name="byte"), None, CPU)


def test_a_cache_that_is_no_folder_is_one_sentence(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(KestrelError, match=r"cannot write to the cache .*file: Not a directory; .*data\.cache_dir="):
        prepare(tmp_path, tmp_path / "file")


def test_a_cache_that_may_not_be_written_is_one_sentence(tmp_path: Path, no_privileges):
    (tmp_path / "cache").mkdir(mode=0o500)
    with pytest.raises(KestrelError, match=r"cannot write to the cache .*cache: Permission denied; .*KESTREL_CACHE"):
        prepare(tmp_path, tmp_path / "cache")


def test_a_whole_cache_need_not_be_written(tmp_path: Path, no_privileges):
    prepare(tmp_path, tmp_path / "cache")
    folders = [path for path in [tmp_path / "cache", *(tmp_path / "cache").rglob("*")] if path.is_dir()]
    for folder in folders:
        folder.chmod(0o500)
    try:
        prepare_data(
            TextConfig(files=[str(tmp_path / "t.txt")], cache_dir=str(tmp_path / "cache")),
            TokenizerConfig(name="byte"),
            None,
            CPU,
        )
    finally:
        for folder in folders:
            folder.chmod(0o700)


def test_a_damaged_tokenizer_of_the_cache_names_the_folder_to_delete(tmp_path: Path):
    prepare(tmp_path, tmp_path / "cache")
    (file,) = (tmp_path / "cache" / "tokenizers").glob("*/tokenizer.json")
    file.write_text(file.read_text()[:-100])
    with pytest.raises(KestrelError, match=f"cannot use the tokenizer .*; delete the folder {file.parent} and it will"):
        prepare(tmp_path, tmp_path / "cache")


def test_missing_files_are_known_without_preparing_anything(tmp_path: Path):
    (tmp_path / "t.txt").write_text("text")
    with pytest.raises(KestrelError, match=r"data\.files: there is no file"):
        require_files(TextConfig(files=[str(tmp_path / "none.txt")]))
    with pytest.raises(KestrelError, match=r"data\.val_files: there is no file"):
        require_files(TextConfig(files=[str(tmp_path / "t.txt")], val_files=[str(tmp_path / "none.txt")]))
    with pytest.raises(KestrelError, match="needs files"):
        require_files(TextConfig())
    require_files(TextConfig(files=[str(tmp_path / "t.txt")]))
    require_files(FablesConfig())
