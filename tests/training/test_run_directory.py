"""A run never begins over another: what is there and cannot be gone on from is left as it is."""

from pathlib import Path

import pytest

import checkpoint
from checkpoint.manifest import MANIFEST
from errors import KestrelError
from training.run_directory import open_run


def save(run: Path, step: int = 3) -> Path:
    state = checkpoint.TrainState(step=step).to_json()
    return checkpoint.save(run, step, model={}, optimizer={}, state=state, config={}, tokenizer_json="{}")


def truncate(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"")


def empty_manifest(path: Path) -> None:
    (path / MANIFEST).write_bytes(b"")


def file_for_folder(path: Path) -> None:
    path.parent.rename(path.parent.with_name("elsewhere"))
    path.parent.write_text("a file")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncate, "step-00000003: model.safetensors has 0 bytes"),
        (empty_manifest, "step-00000003: .*manifest.json is damaged"),
        (file_for_folder, "checkpoints cannot be read: Not a directory"),
    ],
)
def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(tmp_path: Path, damage, says: str):
    damage(save(tmp_path / "a"))
    with pytest.raises(KestrelError, match=rf"a has no checkpoint to go on from, .*{says}.*resume=never.*run=NAME"):
        open_run(tmp_path, "a", "auto", {})
    directory = open_run(tmp_path, "a", "never", {})
    assert (directory.path, directory.start) == (tmp_path / "a-2", None)
    good = save(tmp_path / "good")
    assert open_run(tmp_path, "a", str(good), {}).path == tmp_path / "a-2"


def test_a_damaged_newest_checkpoint_is_passed_over_aloud(tmp_path: Path, capsys: pytest.CaptureFixture):
    whole = save(tmp_path / "a")
    assert open_run(tmp_path, "a", "auto", {}).start == whole
    assert capsys.readouterr().out == ""
    truncate(save(tmp_path / "a", 6))
    assert open_run(tmp_path, "a", "auto", {}).start == whole
    said = capsys.readouterr().out
    assert "saved after step-00000003 is damaged and passed over (step-00000006: model.safetensors has 0 bytes" in said


def test_checkpoints_that_may_not_be_read_stop_a_run(tmp_path: Path, no_privileges):
    folder = save(tmp_path / "a").parent
    folder.chmod(0)
    try:
        with pytest.raises(KestrelError, match="checkpoints cannot be read: Permission denied"):
            open_run(tmp_path, "a", "auto", {})
    finally:
        folder.chmod(0o700)


def test_a_folder_without_checkpoints_is_begun_in(tmp_path: Path):
    (tmp_path / "a" / "checkpoints").mkdir(parents=True)
    (tmp_path / "a" / "checkpoints" / "step-00000003.tmp-1").mkdir()  # of a first save that was killed
    assert open_run(tmp_path, "a", "auto", {}).path == tmp_path / "a"
