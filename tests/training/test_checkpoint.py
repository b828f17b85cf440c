"""Checkpoints: what is saved is loaded; nothing that happens to process, disk or file makes one half, or wrong."""

import contextlib
import errno
import hashlib
import json
import math
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import checkpoint
from checkpoint import TrainState, saving
from checkpoint.manifest import MANIFEST, MAX_BYTES, manifest_hash
from errors import KestrelError

OPTIMIZER = {"step": torch.tensor(7), "b.exp_avg": torch.arange(15.0).reshape(3, 5)}
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch):
    """fsync is slow and only matters in a power cut, which `VolatileDisk` plays."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def model_at(step: int) -> dict[str, Tensor]:
    """Tensors that say which step they belong to; every dtype, odd shapes, nothing and one value."""
    x = torch.arange(35.0).reshape(5, 7)
    return {
        "wte.weight": x + step,
        "transposed": (x + step % 1000).half().T,
        "b": torch.randn(3, 5, generator=torch.Generator().manual_seed(step)).bfloat16(),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(step, dtype=torch.float64),
        "flags": torch.tensor([True, False, True]),
        "small": torch.tensor([-3], dtype=torch.int8),
    }


def save(run: Path, step: int, **options) -> Path:
    state = TrainState(step=step, stream={"epoch": 1, "cursor": 10**12 + step}).to_json()
    parts = {"model": model_at(step), "optimizer": OPTIMIZER, "state": state, "config": {"model": {"depth": 2}}}
    return checkpoint.save(run, step, **{**parts, "tokenizer_json": '{"kind": "bÿte"}', **options})


def load(path: Path) -> int:
    """Read everything in a checkpoint, hold it against what was saved. → its step"""
    saved = checkpoint.read_checkpoint(path)
    state = TrainState.from_json(saved.state)
    assert state == TrainState(step=saved.step, stream={"epoch": 1, "cursor": 10**12 + saved.step})
    assert (saved.config, saved.tokenizer_json) == ({"model": {"depth": 2}}, '{"kind": "bÿte"}')
    for which, expected in (("model", model_at(saved.step)), ("optimizer", OPTIMIZER)):
        found = checkpoint.load_tensors(path, which, checkpoint.spec_of(expected))
        assert found.keys() == expected.keys()
        for name, x in expected.items():
            assert found[name].dtype == x.dtype
            assert torch.equal(found[name], x), name
    return saved.step


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# What is saved is loaded.


def test_every_value_comes_back(tmp_path: Path):
    path = save(tmp_path / "run", 5)
    assert path == tmp_path / "run/checkpoints/step-00000005"
    assert load(path) == 5
    assert names(path.parent) == {"step-00000005", "latest"}
    path.rename(tmp_path / "elsewhere")  # self-sufficient, under any name
    assert load(tmp_path / "elsewhere") == 5


def test_the_safetensors_library_reads_our_files_and_we_read_its(tmp_path: Path):
    library = pytest.importorskip("safetensors.torch")
    path, expected = save(tmp_path / "run", 5), {name: x.contiguous() for name, x in model_at(5).items()}
    for name, x in library.load_file(path / "model.safetensors").items():
        assert x.dtype == expected[name].dtype
        assert torch.equal(x, expected[name])
    library.save_file(expected, path / "model.safetensors", metadata={"format": "pt"})
    reseal(path)
    assert load(path) == 5


def test_a_file_larger_than_a_chunk_comes_back(tmp_path: Path):
    big = {"x": torch.randn(700_001), "y": torch.randn(3)}
    path = save(tmp_path, 1, model=big)
    found = checkpoint.load_tensors(path, "model", checkpoint.spec_of(big))
    assert all(torch.equal(found[name], x) for name, x in big.items())


floats = st.floats() | st.just(0.1 + 0.2) | st.integers(-5, 5).map(float)


@given(floats, floats, st.integers(0, 2**63), st.dictionaries(st.text(), st.integers()))
def test_train_state_comes_back_exactly(elapsed_s: float, best_bpb: float, step: int, stream: dict):
    state = TrainState(step=step, elapsed_s=elapsed_s, best_bpb=best_bpb, stream=stream)
    text = json.dumps(state.to_json(), allow_nan=False)
    assert repr(TrainState.from_json(json.loads(text))) == repr(state)  # repr: nan is not equal to itself


def test_older_state_takes_defaults():
    assert TrainState.from_json({"step": 3, "elapsed_s": 2}) == TrainState(step=3, elapsed_s=2.0)


@pytest.mark.parametrize("values", [{"stepp": 3}, {"step": "3"}, {"step": True}, {"best_bpb": "1"}, {"stream": []}])
def test_wrong_state_is_refused_by_name(values: dict):
    with pytest.raises(KestrelError, match=next(iter(values))):
        TrainState.from_json(values)


def test_random_numbers_go_on_where_they_were():
    torch.rand(3)
    saved = json.loads(json.dumps(checkpoint.rng_state()))
    expected = torch.rand(5)
    checkpoint.restore_rng(saved)
    assert torch.equal(torch.rand(5), expected)


@pytest.mark.gpu
def test_random_numbers_of_the_gpu_go_on_where_they_were(tmp_path: Path):
    saved = checkpoint.rng_state("cuda")
    expected = torch.rand(5, device="cuda")
    checkpoint.restore_rng(saved, "cuda")
    assert torch.equal(torch.rand(5, device="cuda"), expected)
    model = {name: x.cuda() for name, x in model_at(3).items()}
    path = save(tmp_path, 3, model=model)
    assert load(path) == 3
    found = checkpoint.load_tensors(path, "model", checkpoint.spec_of(model), "cuda")
    assert all(torch.equal(found[name], x) and found[name].is_cuda for name, x in model.items())


@pytest.mark.parametrize("states", [{"cpu": "AAAA"}, {"cpu": "ä"}, {"cpu": 3}])
def test_damaged_random_state_is_refused(states: dict):
    before = torch.get_rng_state()
    with pytest.raises(KestrelError, match="rng"):
        checkpoint.restore_rng(states)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_tokenizer_is_refused(tmp_path: Path):
    saved = checkpoint.read_checkpoint(save(tmp_path, 1))
    assert saved.tokenizer_hash == hashlib.sha256('{"kind": "bÿte"}'.encode()).hexdigest()
    saved.require_tokenizer('{"kind": "bÿte"}')
    with pytest.raises(KestrelError, match="another tokenizer"):
        saved.require_tokenizer('{"kind": "byte"}')


@pytest.mark.parametrize("which", ["model", "optimizer"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_neither_saved_nor_loaded(tmp_path: Path, which: str, value: float, monkeypatch):
    save(tmp_path, 1)
    bad = {"x": torch.ones(3, 3), "y": torch.tensor([1.0, value, 2.0])}
    with pytest.raises(KestrelError, match=r"step 2 is not saved.*'y'"):
        save(tmp_path, 2, **{which: bad})
    assert load(checkpoint.latest(tmp_path)) == 1
    monkeypatch.setattr(saving, "require_finite", lambda *arguments: None)
    path = save(tmp_path, 2, **{which: bad})
    with pytest.raises(KestrelError, match="'y'"):
        checkpoint.load_tensors(path, which, checkpoint.spec_of(bad))


# Which one is found.


def test_only_complete_checkpoints_are_found(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    assert checkpoint.latest(tmp_path / "nowhere") is None
    assert checkpoint.best(tmp_path) is None
    paths = [save(tmp_path, step, keep_last=9) for step in (3, 99_999_999, 123_456_789)]
    (folder / "step-999999999").mkdir()
    (folder / "step-999999998").write_text("a stray file")
    (folder / "step-x").mkdir()
    (folder / "step-00000004.tmp-99999999").mkdir()
    (folder / "model_x.pt").write_text("")
    save(tmp_path, 200_000_000, keep_last=9).joinpath("optimizer.safetensors").unlink()
    assert checkpoint.list_checkpoints(tmp_path) == paths
    for pointer in ("step-999999999", "step-00000004", "../../step-00000003", "", "\xff", "step-200000000"):
        (folder / "latest").write_bytes(pointer.encode("latin1"))
        assert checkpoint.latest(tmp_path) == paths[-1]  # by number: as text, 99999999 comes last
    (folder / "latest").unlink()
    assert checkpoint.latest(tmp_path) == paths[-1]
    (folder / "latest").mkdir()
    assert checkpoint.latest(tmp_path) == paths[-1]


def test_the_pointer_decides(tmp_path: Path):
    older, _ = save(tmp_path, 1), save(tmp_path, 2)
    (tmp_path / "checkpoints/latest").write_text("step-00000001\n")
    assert checkpoint.latest(tmp_path) == older


def test_newest_steps_and_the_best_are_kept(tmp_path: Path):
    for step in range(1, 8):
        save(tmp_path, step, keep_last=2, best=step in (2, 3))
    assert [path.name[-1] for path in checkpoint.list_checkpoints(tmp_path)] == ["3", "6", "7"]
    assert load(checkpoint.best(tmp_path)) == 3
    assert load(checkpoint.latest(tmp_path)) == 7
    (tmp_path / "checkpoints/best").unlink()
    assert load(checkpoint.best(tmp_path)) == 3
    (tmp_path / "checkpoints/best").write_text("step-00000006")  # exists, but never was the best
    assert load(checkpoint.best(tmp_path)) == 3


def test_saving_a_step_again_publishes_it_beside_the_first(tmp_path: Path):
    save(tmp_path, 4)
    first = save(tmp_path, 5)
    second = save(tmp_path, 5, best=True)
    assert checkpoint.latest(tmp_path) == checkpoint.best(tmp_path) == second
    assert not first.exists()
    assert [load(path) for path in checkpoint.list_checkpoints(tmp_path)] == [4, 5]
    third = save(tmp_path, 5)  # takes the name that became free, and is the newer one all the same
    assert (checkpoint.latest(tmp_path), checkpoint.best(tmp_path)) == (third, second)
    (third / MANIFEST).unlink()
    assert load(save(tmp_path, 5)) == 5  # beside a damaged one


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    save(tmp_path, 1)
    dead = max_pid() + 1
    for pid in (dead, os.getpid(), os.getppid(), 10**30):
        (folder / f"step-00000002.tmp-{pid}").mkdir()
        (folder / f"step-00000002.old-{pid}").mkdir()
        (folder / f"latest.tmp-{pid}").write_text("")
    (folder / "notes.txt").write_text("mine")
    save(tmp_path, 3)
    living = {f"{name}-{os.getppid()}" for name in ("step-00000002.tmp", "step-00000002.old", "latest.tmp")}
    assert names(folder) == {"step-00000001", "step-00000003", "latest", "notes.txt"} | living


def max_pid() -> int:
    limit = Path("/proc/sys/kernel/pid_max")
    return int(limit.read_text()) if limit.exists() else 99_999


def test_a_delete_that_fails_is_a_warning_and_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path, 1)
    for call in ("replace", "remove"):
        monkeypatch.setattr(
            saving, "disk", FailingDisk(lambda name, path, call=call: name == call and "00000001" in str(path))
        )
        with pytest.warns(UserWarning, match="step-00000001"):
            assert load(save(tmp_path, 2, keep_last=1)) == 2
        assert load(checkpoint.latest(tmp_path)) == 2
    monkeypatch.undo()
    save(tmp_path, 3, keep_last=1)
    assert names(tmp_path / "checkpoints") == {"step-00000003", "latest"}


def test_the_newest_run_is_the_one_that_saved_last(tmp_path: Path):
    for run in ("zebra", "sweeps/ant,seed=1", "cat"):
        save(tmp_path / run, 9 if run == "zebra" else 1)
        time.sleep(0.002)
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    assert checkpoint.find_newest_run(tmp_path) == tmp_path / "cat"
    save(tmp_path / "sweeps/ant,seed=1", 2)
    assert checkpoint.find_newest_run(tmp_path) == tmp_path / "sweeps/ant,seed=1"


def test_a_quantised_copy_is_newest_only_if_there_is_nothing_else(tmp_path: Path):
    copy = save(tmp_path / "a-int8", 1)
    (copy / "config.json").write_text('{"quant": {"form": "int8"}}')
    reseal(copy)
    assert checkpoint.find_newest_run(tmp_path) == tmp_path / "a-int8"
    save(tmp_path / "a", 1)
    time.sleep(0.002)
    again = save(tmp_path / "a-int8", 2)
    (again / "config.json").write_text('{"quant": {"form": "int8"}}')
    reseal(again)
    assert checkpoint.find_newest_run(tmp_path) == tmp_path / "a"


def test_nothing_found_says_what_was_looked_for_and_where(tmp_path: Path):
    with pytest.raises(KestrelError, match=rf"no run in {tmp_path}/no.*train\.py.*ckpt="):
        checkpoint.find_newest_run(tmp_path / "no")
    (tmp_path / "a/checkpoints").mkdir(parents=True)
    with pytest.raises(KestrelError, match=rf"1 runs in {tmp_path}, none with a checkpoint"):
        checkpoint.find_newest_run(tmp_path)
    with pytest.raises(KestrelError, match="a leads to no complete checkpoint"):
        checkpoint.find(tmp_path / "a")
    with pytest.raises(KestrelError, match="nowhere does not exist"):
        checkpoint.find(tmp_path / "nowhere")


def test_a_run_its_folder_of_checkpoints_a_pointer_and_a_checkpoint_all_lead_to_it(tmp_path: Path):
    first, second = save(tmp_path, 1, best=True), save(tmp_path, 2)
    assert checkpoint.find(tmp_path) == checkpoint.find(tmp_path / "checkpoints") == checkpoint.find(second) == second
    assert checkpoint.find(tmp_path / "checkpoints/latest") == second
    assert checkpoint.find(tmp_path / "checkpoints/best") == checkpoint.find(str(first)) == first


# Processes that are killed, disks that fill up, power that fails.

CALLS = ("make_folder", "create", "write", "sync", "sync_folder", "replace", "remove")


class WatchedDisk(saving.Disk):
    """A disk that calls `before(name of the call, its path or file)` ahead of every change."""

    def __init__(self, before: Callable[[str, object], object]) -> None:
        for name in CALLS:
            setattr(self, name, self._watched(name, getattr(super(), name), before))

    def _watched(self, name: str, call: Callable, before: Callable) -> Callable:
        def watched(*arguments):
            before(name, *arguments)
            return call(*arguments)

        return watched


class FailingDisk(WatchedDisk):
    """A disk that refuses the calls which `fails(name, path)` picks; of a write it takes half, as a full disk does."""

    def __init__(self, fails: Callable[[str, object], bool], number: int = errno.ENOSPC) -> None:
        super().__init__(lambda name, target, *rest: self._maybe(fails, number, name, target, *rest))

    def _maybe(self, fails: Callable, number: int, name: str, target: object, *rest: object) -> None:
        if fails(name, getattr(target, "name", target) if name in ("write", "sync") else target):
            if name == "write":
                target.write(rest[0][: len(rest[0]) // 2])
                target.flush()
            raise OSError(number, os.strerror(number))


def count_calls(monkeypatch: pytest.MonkeyPatch, run: Path, **options) -> list[str]:
    """The calls of one save, in order."""
    calls: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(saving, "disk", WatchedDisk(lambda name, *rest: calls.append(name)))
        save(run, 2, **options)
    return calls


@pytest.fixture
def saved_once(tmp_path: Path) -> Path:
    """A run with a checkpoint at step 1, which is the best so far."""
    save(tmp_path / "run", 1, best=True)
    return tmp_path / "run"


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from-then-on"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_a_disk_that_refuses_any_call_costs_nothing_that_was_there(
    saved_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, lasting: bool
):
    total = len(count_calls(monkeypatch, tmp_path / "counted", keep_last=1, best=True))
    before = contents(saved_once / "checkpoints/step-00000001")
    messages = []
    for fatal in range(1, total + 1):
        calls = iter(range(1, 10_000))

        def fails(name: str, path: object, calls: Iterator[int] = calls, fatal: int = fatal) -> bool:
            here = next(calls)
            full = number == errno.ENOSPC and name in ("remove", "sync_folder")  # what a full disk can still do
            return (here >= fatal if lasting else here == fatal) and not full

        monkeypatch.setattr(saving, "disk", FailingDisk(fails, number))
        try:
            save(saved_once, 2, keep_last=5, best=True)
        except KestrelError as error:
            messages.append(str(error))
        monkeypatch.undo()
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)
        assert contents(saved_once / "checkpoints/step-00000001") == before
        assert load(checkpoint.latest(saved_once)) in (1, 2)
        if not lasting:  # otherwise not even cleaning up succeeds
            assert not any(".tmp-" in name for name in names(saved_once / "checkpoints"))
        for path in checkpoint.list_checkpoints(saved_once)[1:]:
            saving.disk.remove(path)
    assert len(messages) > 20
    assert all(str(saved_once) in message and os.strerror(number) in message for message in messages)
    save(saved_once, 3)
    assert not any(".tmp-" in name for name in names(saved_once / "checkpoints"))


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.ENOSPC, "free some space"), (errno.EACCES, "writable"), (errno.EIO, "check the disk")]
)
def test_a_refusal_names_the_remedy(saved_once: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str):
    monkeypatch.setattr(saving, "disk", FailingDisk(lambda name, path: name == "write", number))
    with pytest.raises(KestrelError, match=f"step 2 .*{remedy}.*earlier checkpoints are intact"):
        save(saved_once, 2)


def run_and_wait(program: Callable[[], object]) -> int:
    """Run in a forked process. → 0, or the signal that killed it"""
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            program()
            os._exit(0)
        os._exit(99)
    status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status)


def die(name: str, target: object, *rest: object, half: bool = False) -> None:
    """End this process as kill -9 does, after half of a write if asked."""
    if name == "write" and half:
        target.write(rest[0][: len(rest[0]) // 2])
        target.flush()
    os.kill(os.getpid(), signal.SIGKILL)


@needs_fork
def test_a_process_killed_at_any_call_leaves_the_last_complete_checkpoint(
    saved_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls = count_calls(monkeypatch, tmp_path / "counted", best=True, keep_last=1)
    points = [(i, half) for i, name in enumerate(calls) for half in ((False, True) if name == "write" else (False,))]
    assert len(points) >= 50
    published = 0
    for point, half in points:
        counter = iter(range(len(calls) + 10))

        def before(name: str, *rest, counter=counter, point=point, half=half) -> None:
            if next(counter) == point:
                die(name, *rest, half=half)

        def program(before=before) -> None:
            saving.disk = WatchedDisk(before)
            save(saved_once, 2, best=True, keep_last=2)

        assert run_and_wait(program) == -signal.SIGKILL
        step = load(checkpoint.latest(saved_once))
        assert step in (1, 2)
        assert load(checkpoint.best(saved_once)) == step
        published += step == 2
        for path in checkpoint.list_checkpoints(saved_once)[1:]:
            saving.disk.remove(path)
        (saved_once / "checkpoints/latest").write_text("step-00000001\n")
        (saved_once / "checkpoints/best").write_text("step-00000001\n")
    assert 1 <= published < 5  # only the last few calls come after the rename
    save(saved_once, 3)
    assert names(saved_once / "checkpoints") == {"step-00000001", "step-00000003", "latest", "best"}


@needs_fork
def test_a_process_killed_at_a_random_time_leaves_the_last_complete_checkpoint(tmp_path: Path):
    chance = random.Random(0)
    step, kills = 0, 0

    def program() -> None:
        for number in range(step + 1, step + 1000):
            save(tmp_path, number, keep_last=2, best=number % 3 == 0)

    for _ in range(30):
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                program()
            os._exit(99)
        time.sleep(chance.uniform(0.0, 0.08))
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        newest = checkpoint.latest(tmp_path)
        kills += any(".tmp-" in name for name in names(tmp_path / "checkpoints")) if newest else 0
        found = [load(path) for path in checkpoint.list_checkpoints(tmp_path)]
        assert max(found, default=0) >= step
        assert newest is None or load(newest) == max(found)
        assert checkpoint.best(tmp_path) is None or load(checkpoint.best(tmp_path)) % 3 == 0
        step = max(found, default=0)
    assert step > 10  # there was something to lose
    assert kills > 3  # and some were hit in the middle


@needs_fork
def test_a_reader_beside_a_writer_sees_whole_checkpoints(tmp_path: Path):
    save(tmp_path, 1)
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            for step in range(2, 150):
                save(tmp_path, step, keep_last=2)
            os._exit(0)
        os._exit(99)
    seen = []
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        path = checkpoint.latest(tmp_path)
        assert path is not None
        with contextlib.suppress(KestrelError):  # it was deleted while we read: an error, never a mixture
            seen.append(load(path))
    assert seen == sorted(seen)
    assert seen[-1] > 1
    assert load(checkpoint.latest(tmp_path)) == 149


class VolatileDisk(saving.Disk):
    """A disk whose power can fail: what was not synced may be gone.

    Contents of a file that were not synced are cut at a random length. Of the changes to a name in a folder, a random
    number of the newest are undone, whatever happened to other names, but none that a sync_folder came after.
    """

    def __init__(self, root: Path, chance: random.Random, fail_at: int, skipped: str | None = None) -> None:
        self.root, self.chance, self.fail_at, self.skipped = root, chance, fail_at, skipped
        self.calls = 0
        self.unsynced: set[int] = set()  # inodes of files
        # (inode of a folder, name in it but for .tmp-<pid> and the like) → how to undo what was done to that name
        self.changes: dict[tuple[int, str], list[Callable[[Path], None]]] = {}
        self.attic = root.parent / f"attic-{chance.random()}"
        self.attic.mkdir()

    def _tick(self) -> None:
        self.calls += 1
        if self.calls == self.fail_at:
            self.cut()
            saving.disk = DeadDisk()
            raise PowerFailure

    def _changed(self, path: Path, undo: Callable[[Path], None]) -> None:
        self.changes.setdefault((path.parent.stat().st_ino, path.name.split(".")[0]), []).append(undo)

    def _store(self, path: Path) -> Path:
        kept = self.attic / f"{self.calls}-{len(names(self.attic))}-{path.name}"
        os.rename(path, kept)
        return kept

    def make_folder(self, path: Path) -> None:
        self._tick()
        if not path.exists():
            super().make_folder(path)
            self._changed(path, lambda folder: self._store(folder / path.name))

    def create(self, path: Path):
        self._tick()
        handle = super().create(path)
        self.unsynced.add(path.stat().st_ino)
        self._changed(path, lambda folder: self._store(folder / path.name))
        return handle

    def write(self, handle, data) -> None:
        self._tick()
        super().write(handle, data)
        handle.flush()

    def sync(self, handle) -> None:
        self._tick()
        if self.skipped != "sync":
            self.unsynced.discard(os.fstat(handle.fileno()).st_ino)

    def sync_folder(self, path: Path) -> None:
        self._tick()
        if self.skipped != "sync_folder":
            inode = path.stat().st_ino
            self.changes = {key: undos for key, undos in self.changes.items() if key[0] != inode}

    def replace(self, source: Path, target: Path) -> None:
        self._tick()
        kept = self._store(target) if target.exists() else None
        super().replace(source, target)

        def undo(folder: Path) -> None:
            os.rename(folder / target.name, folder / source.name)
            if kept is not None:
                os.rename(kept, folder / target.name)

        self._changed(target, undo)

    def remove(self, path: Path) -> None:
        if os.path.lexists(path):
            self._tick()
            kept = self._store(path)
            self._changed(path, lambda folder: os.rename(kept, folder / path.name))
        else:
            raise FileNotFoundError(path)

    def cut(self) -> None:
        """The power fails: lose what may be lost."""
        for path in [p for top in (self.root, self.attic) for p in top.rglob("*") if p.is_file()]:
            if path.stat().st_ino in self.unsynced:
                os.truncate(path, self.chance.randint(0, path.stat().st_size))
        for (inode, _), undos in self.changes.items():
            kept = self.chance.randint(0, len(undos))
            for undo in reversed(undos[kept:]):
                folder = next(
                    p for top in (self.root, self.attic) for p in [top, *top.rglob("*")] if p.stat().st_ino == inode
                )
                undo(folder)


class PowerFailure(BaseException):
    """Not an Exception: nobody may handle it. The cleaning up that `finally` still does finds a disk that refuses."""


class DeadDisk(WatchedDisk):
    def __init__(self) -> None:
        super().__init__(self._refuse)

    def _refuse(self, *arguments: object) -> None:
        raise OSError(errno.EIO, "the power is off")


def survives_power_cuts(root: Path, monkeypatch: pytest.MonkeyPatch, skipped: str | None, rounds: int) -> bool:
    """Whether step 1 is kept until step 2 is there, and step 2 once save returned, with power failing at any call."""
    for seed in range(rounds):
        run = root / f"{skipped}-{seed}" / "run"
        save(run, 1, best=True)
        fail_at = seed % 50 + 1 if seed % 2 else 35 + seed // 2 % 13  # half of them around the rename
        disk = VolatileDisk(run, random.Random(seed), fail_at, skipped=skipped)
        monkeypatch.setattr(saving, "disk", disk)
        returned = False
        with contextlib.suppress(PowerFailure):
            save(run, 2, best=True, keep_last=1)
            returned = True
            disk.cut()
        monkeypatch.setattr(saving, "disk", saving.Disk())
        try:
            steps = load(checkpoint.latest(run)), load(checkpoint.best(run))
            if steps not in ([(2, 2)] if returned else [(1, 1), (2, 2)]):
                return False
        except (KestrelError, TypeError):
            return False
    return True


def test_a_power_cut_after_the_first_save_of_a_run_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for seed in range(20):
        (tmp_path / f"{seed}/runs").mkdir(parents=True)
        disk = VolatileDisk(tmp_path / f"{seed}/runs", random.Random(seed), fail_at=-1)
        monkeypatch.setattr(saving, "disk", disk)
        disk.make_folder(tmp_path / f"{seed}/runs/mine")
        save(tmp_path / f"{seed}/runs/mine", 1)
        disk.cut()
        assert load(checkpoint.latest(tmp_path / f"{seed}/runs/mine")) == 1


def test_a_power_cut_at_any_call_leaves_the_last_complete_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert survives_power_cuts(tmp_path, monkeypatch, None, rounds=400)


@pytest.mark.parametrize("skipped", ["sync", "sync_folder"])
def test_the_power_cut_test_notices_a_missing_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skipped: str):
    assert not survives_power_cuts(tmp_path, monkeypatch, skipped, rounds=400)


# Files that nobody vouches for.


def reseal(path: Path) -> None:
    """Make the manifest agree with the files, as someone who forges a checkpoint would."""
    manifest = json.loads((path / MANIFEST).read_bytes())
    for name, entry in manifest["files"].items():
        content = (path / name).read_bytes()
        entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / MANIFEST).write_text(json.dumps(manifest | {"sha256": manifest_hash(manifest)}))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("state.json", {}),
        ("state.json", {"step": 10**30}),
        ("state.json", {"step": 4}),
        ("config.json", {"hardware": []}),
        ("config.json", {"model": 5}),
    ],
    ids=str,
)
def test_forged_contents_are_refused_by_file(tmp_path: Path, name: str, content: dict):
    path = save(tmp_path, 5)
    (path / name).write_text(json.dumps(content))
    reseal(path)
    with pytest.raises(KestrelError, match=rf"{name} is damaged: its "):
        checkpoint.read_checkpoint(path)


def test_what_keeps_every_checkpoint_from_being_one_is_said(tmp_path: Path):
    assert checkpoint.what_is_wrong(tmp_path / "none") is None
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    assert checkpoint.what_is_wrong(tmp_path) is None
    (second / "model.safetensors").write_bytes(b"short")
    assert checkpoint.what_is_wrong(tmp_path) is None  # the first is whole
    (first / MANIFEST).write_bytes(b"")
    wrong = checkpoint.what_is_wrong(tmp_path)
    assert "step-00000001: " in wrong
    assert "manifest.json is damaged" in wrong
    assert "step-00000002: model.safetensors has 5 bytes" in wrong
    with pytest.raises(KestrelError, match=r"leads to no complete checkpoint .*model.safetensors has 5 bytes"):
        checkpoint.find(tmp_path)


def test_a_checkpoint_that_may_not_be_read_is_not_called_missing(tmp_path: Path, no_privileges):
    path = save(tmp_path, 1)
    for folder in (path, path.parent, tmp_path):
        folder.chmod(0)
        try:
            with pytest.raises(KestrelError, match=r"cannot be read|could not read|Permission denied"):
                checkpoint.find(tmp_path)
            if folder != tmp_path:
                assert "Permission denied" in checkpoint.what_is_wrong(tmp_path)
        finally:
            folder.chmod(0o700)


def forge_header(path: Path, change: Callable[[dict], object], which: str = "model") -> None:
    """Change the header of a tensor file, and reseal."""
    file = path / f"{which}.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    reseal(path)


def refused_quickly(path: Path) -> str:
    """Loading raises our own error after little work, and without waiting. → its message"""
    started = time.process_time(), time.perf_counter()
    with pytest.raises(KestrelError) as caught:
        load(path)
    assert time.process_time() - started[0] < 3  # what a forged length asks for would take minutes
    assert time.perf_counter() - started[1] < 8  # the machine may be busy
    return str(caught.value)


@contextlib.contextmanager
def at_most_more_memory(more: int) -> Iterator[None]:
    """Allocations that take this process `more` bytes above what it has now fail, where the system can do that."""
    if not Path("/proc/self/statm").exists():
        yield
        return
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_any_flipped_bit_and_any_other_length_is_noticed(tmp_path: Path):
    path = save(tmp_path, 5)
    chance = random.Random(0)
    files = {name: (path / name).read_bytes() for name in names(path)}
    for number in range(420):
        name = chance.choice(sorted(files))
        content, kind = bytearray(files[name]), ("flip", "cut", "grow")[number % 6 // 2]
        if kind == "flip":
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        elif kind == "cut":
            del content[chance.randrange(len(content)) :]
        else:
            content[chance.randrange(len(content) + 1) : 0] = chance.randbytes(chance.choice([1, 8, 1000]))
        (path / name).write_bytes(content)
        with at_most_more_memory(200 << 20):
            assert name in refused_quickly(path)
        (path / name).write_bytes(files[name])
    assert load(path) == 5


def test_forged_files_with_a_fitting_manifest_are_refused(tmp_path: Path):
    """The hashes agree, so parsing meets every sort of damage itself."""
    path = save(tmp_path, 5)
    chance = random.Random(1)
    files = {name: (path / name).read_bytes() for name in names(path) - {MANIFEST}}
    for _ in range(300):
        name = chance.choice(["model.safetensors", "state.json", "config.json"])
        content = bytearray(files[name])
        start = chance.randrange(min(len(content), 700))
        content[start : start + chance.choice([0, 1, 5])] = chance.randbytes(chance.choice([1, 2, 8]))
        (path / name).write_bytes(content)
        reseal(path)
        started = time.process_time()
        with contextlib.suppress(KestrelError, AssertionError), at_most_more_memory(200 << 20):
            load(path)  # AssertionError: sound, but not what was saved
        assert time.process_time() - started < 1
        (path / name).write_bytes(files[name])
    reseal(path)
    assert load(path) == 5


FORGERIES: dict[str, tuple[Callable[[dict], object], str]] = {
    "missing": (lambda h: h.pop("b"), "1 tensors are missing: 'b'"),
    "unexpected": (
        lambda h: h.update({f"x{i}": h["b"] for i in range(9)}),
        "9 tensors are unexpected: 'x0', 'x1', 'x2'$|;",
    ),
    "renamed": (lambda h: h.update(c=h.pop("b")), "missing: 'b'; 1 tensors are unexpected: 'c'"),
    "shape": (lambda h: h["b"].update(shape=[5, 3]), r"'b' is BF16 \[5, 3\]"),
    "dtype": (lambda h: h["b"].update(dtype="F16"), "should be BF16"),
    "unknown dtype": (lambda h: h["b"].update(dtype="Q4"), "should be BF16"),
    "huge shape": (lambda h: h["b"].update(shape=[10**18, 10**18]), "should be BF16"),
    "overlap": (lambda h: h["b"].update(data_offsets=h["wte.weight"]["data_offsets"]), "should be"),
    "negative": (lambda h: h["b"].update(data_offsets=[-30, 0]), "should be"),
    "floats": (lambda h: h["b"].update(data_offsets=[0.0, 30.0]), "no data_offsets"),
    "no offsets": (lambda h: h["b"].pop("data_offsets"), "no data_offsets"),
    "three offsets": (lambda h: h["b"].update(data_offsets=[0, 1, 2]), "no data_offsets"),
    "not an entry": (lambda h: h.update(b=[1, 2]), "no data_offsets"),
    "escape codes": (lambda h: h.update({"\x1b[2J\n": h.pop("b")}), r"'\\x1b\[2J\\n'"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_wrong_header_is_refused_before_anything_is_allocated(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    change, message = FORGERIES[name]
    path = save(tmp_path, 5)
    forge_header(path, change)
    spec = checkpoint.spec_of(model_at(5))
    monkeypatch.setattr(torch, "empty", lambda *arguments, **options: pytest.fail("allocated"))
    with pytest.raises(KestrelError, match=message):
        checkpoint.load_tensors(path, "model", spec)


@pytest.mark.parametrize("length", [0, 1, 10**6, 1 << 20, 10**15, 2**64 - 1])
def test_a_wrong_header_length_is_refused(tmp_path: Path, length: int):
    path = save(tmp_path, 5)
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + content[8:])
    reseal(path)
    assert "model.safetensors" in refused_quickly(path)


@pytest.mark.parametrize("content", [b"", b"1234567", b"12345678", b"\0" * 8, b"\0" * 100])
def test_a_stub_of_a_tensor_file_is_refused(tmp_path: Path, content: bytes):
    path = save(tmp_path, 5)
    (path / "optimizer.safetensors").write_bytes(content)
    reseal(path)
    assert "optimizer.safetensors" in refused_quickly(path)


def test_a_huge_header_costs_neither_time_nor_memory(tmp_path: Path):
    path = save(tmp_path, 5)
    forge_header(path, lambda h: h.update({f"x{i}": {"shape": [[]] * 20} for i in range(10_000)}))
    assert (path / "model.safetensors").stat().st_size > 900_000
    with at_most_more_memory(200 << 20):
        assert "10000 tensors are unexpected" in refused_quickly(path)
    (path / "model.safetensors").write_bytes((100 << 20).to_bytes(8, "little") + bytes(101 << 20))
    reseal(path)
    with at_most_more_memory(50 << 20):
        assert "claims 104857600 bytes" in refused_quickly(path)


@pytest.mark.parametrize("name", ["state.json", "config.json"])
@pytest.mark.parametrize(
    "text",
    [b"[1]", b"", b"[" * 1_000_000, b'{"a":' * 200_000, b'{"a": ' + b"9" * 10_000 + b"}", b'"\xff"', b"\xff\xfe"],
)
def test_hostile_json_is_refused(tmp_path: Path, name: str, text: bytes):
    path = save(tmp_path, 5)
    (path / name).write_bytes(text)
    reseal(path)
    assert name in refused_quickly(path)


@pytest.mark.parametrize("name", ["state.json", "config.json", "tokenizer.json", MANIFEST])
def test_text_files_of_absurd_size_are_not_read(tmp_path: Path, name: str):
    path = save(tmp_path, 5)
    if name != MANIFEST:
        manifest = json.loads((path / MANIFEST).read_bytes())
        manifest["files"][name]["bytes"] = 10**10
        (path / MANIFEST).write_text(json.dumps(manifest | {"sha256": manifest_hash(manifest)}))
    os.truncate(path / name, 10**10)  # sparse: takes no space
    assert f"more than {MAX_BYTES[name]}" in refused_quickly(path)


@pytest.mark.parametrize("name", ["../../secret.json", "/etc/passwd", "a/../../b", "model.safetensors/..", "notes.txt"])
def test_a_manifest_cannot_name_other_files(tmp_path: Path, name: str):
    path = save(tmp_path, 5)
    manifest = json.loads((path / MANIFEST).read_bytes())
    manifest["files"][name] = manifest["files"].pop("config.json")
    (path / MANIFEST).write_text(json.dumps(manifest | {"sha256": manifest_hash(manifest)}))
    assert "list exactly" in refused_quickly(path)
    assert checkpoint.latest(tmp_path) is None


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2}, {"version": None}, {"step": "5"}, {"step": None}, {"best": 1}, {"saved_at": "x"}, {"files": []},
        {"files": None}, {"sha256": 3},
    ],
    ids=str,
)  # fmt: skip
def test_a_manifest_that_says_something_else_is_refused(tmp_path: Path, change: dict):
    path = save(tmp_path, 5)
    manifest = json.loads((path / MANIFEST).read_bytes()) | change
    seal = {} if "sha256" in change else {"sha256": manifest_hash(manifest)}
    (path / MANIFEST).write_text(json.dumps(manifest | seal))
    assert MANIFEST in refused_quickly(path)


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", MANIFEST])
@pytest.mark.parametrize("kind", ["gone", "folder", "pipe", "device", "loop"])
def test_what_is_not_a_file_is_refused_without_waiting(tmp_path: Path, name: str, kind: str):
    path = save(tmp_path, 5)
    (path / name).unlink()
    if kind == "folder":
        (path / name).mkdir()
    elif kind == "pipe":
        os.mkfifo(path / name)
    elif kind == "device":
        (path / name).symlink_to("/dev/zero")
    elif kind == "loop":
        (path / name).symlink_to(path / name)
    assert name in refused_quickly(path)
    assert checkpoint.latest(tmp_path) is None
