"""Token shards: what goes in comes out, damage is noticed, and a builder that dies leaves nothing that looks whole."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import documents
from data.documents import MANIFEST, build_shards, open_shards, shards_folder
from errors import KestrelError
from tests.data.toy import Bytes, ListSource, Numbers

ROOT = Path(__file__).parent.parent.parent
TEXTS = ["once upon a time", "é", "the end\n", "x" * 999, "a b"]


def texts_of(shards):
    """Every document, decoded from the shards' bytes."""
    begins = shards.offsets[:-1]
    numbers = np.searchsorted(shards.shard_starts, begins, side="right") - 1
    found = []
    for number, begin, length in zip(numbers, begins - shards.shard_starts[numbers], shards.lengths):
        found.append(shards.shards[number][begin : begin + length].astype(np.uint8).tobytes().decode())
    return found


def build(tmp_path, texts=TEXTS, **options):
    return build_shards(ListSource(texts), Bytes(), "train", tmp_path, **options)


@pytest.mark.parametrize("shard_tokens", [1, 20, 1000, 1 << 27])
def test_documents_come_back_whatever_the_size_of_shards(tmp_path, shard_tokens):
    shards = build(tmp_path, shard_tokens=shard_tokens)
    assert texts_of(shards) == TEXTS
    assert all(len(shard) <= max(shard_tokens, 999) for shard in shards.shards)
    assert shards.n_bytes == sum(len(text.encode()) for text in TEXTS)
    assert shards.n_tokens == shards.n_bytes + len(TEXTS)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.sampled_from("a \n"), max_size=60))
def test_segments_of_a_long_document_join_to_it(monkeypatch, text):
    monkeypatch.setattr(documents, "SEGMENT_CHARS", 7)
    parts = documents._segments(text)
    assert "".join(parts) == text
    assert all(len(part) <= 7 for part in parts)
    # a part that ends inside a line had no line end to stop at
    assert all(part.endswith("\n") or "\n" not in part for part in parts[:-1])


def test_a_long_document_is_one_document(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "SEGMENT_CHARS", 100)
    text = "one line of it\n" * 50
    assert texts_of(build(tmp_path, [text, "short"])) == [text, "short"]


def test_documents_without_tokens_are_left_out(tmp_path):
    assert texts_of(build(tmp_path, ["a", "", "b"])) == ["a", "b"]


def test_large_vocabularies_take_four_bytes(tmp_path):
    shards = build_shards(ListSource(["66000:66010"]), Numbers(), "train", tmp_path)
    assert shards.shards[0].dtype == np.uint32
    assert shards.shards[0].tolist() == list(range(66000, 66010))
    assert build(tmp_path).shards[0].dtype == np.uint16


@pytest.mark.parametrize("texts", [[], [""]])
def test_a_split_without_text_is_an_error_and_leaves_nothing(tmp_path, texts):
    with pytest.raises(KestrelError, match="train split has no tokens"):
        build(tmp_path, texts)
    assert [path.suffix for path in (tmp_path / "tokens").iterdir()] == [".lock"]


def test_second_build_only_opens(tmp_path):
    source = ListSource(TEXTS)
    first, second = (build_shards(source, Bytes(), "train", tmp_path) for _ in range(2))
    assert source.passes == 1
    assert first.hash == second.hash


def test_another_source_split_or_tokenizer_is_another_folder(tmp_path):
    other = Bytes()
    other.hash = "other"
    folders = [
        shards_folder(ListSource(TEXTS), Bytes(), "train", tmp_path),
        shards_folder(ListSource(TEXTS), Bytes(), "val", tmp_path),
        shards_folder(ListSource(TEXTS, fingerprint="changed"), Bytes(), "train", tmp_path),
        shards_folder(ListSource(TEXTS), other, "train", tmp_path),
    ]
    assert len(set(folders)) == 4


def test_hash_tells_tokens_apart_and_nothing_else(tmp_path):
    same = build_shards(ListSource(TEXTS, name="copy", fingerprint="elsewhere"), Bytes(), "train", tmp_path / "b")
    assert build(tmp_path / "a").hash == same.hash
    assert build(tmp_path / "c", [*TEXTS[:-1], "a c"]).hash != same.hash
    # the same tokens end to end, in other documents
    assert build(tmp_path / "d", ["ab", "c"]).hash != build(tmp_path / "e", ["a", "bc"]).hash


def test_progress_counts_bytes_of_text(tmp_path):
    told = []
    shards = build(tmp_path, progress=told.append)
    assert sum(told) == shards.n_bytes


def test_of_many_builders_one_encodes(tmp_path):
    source = ListSource(TEXTS)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(build_shards(source, Bytes(), "train", tmp_path).hash))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert source.passes == 1
    assert len(found) == 8
    assert len(set(found)) == 1


def test_full_disk_is_an_error_that_leaves_nothing(tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(documents, "sync", full)
    with pytest.raises(KestrelError, match="No space left on device; set data"):
        build(tmp_path)
    assert [path.suffix for path in (tmp_path / "tokens").iterdir()] == [".lock"]


# ------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("name", ["tokens_00000.bin", "documents.bin"])
@pytest.mark.parametrize("change", ["missing", "shorter", "longer"])
def test_wrong_sizes_are_noticed_on_opening(tmp_path, name, change):
    folder = build(tmp_path).folder
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if change != "missing":
        (folder / name).write_bytes(content[:-1] if change == "shorter" else content + b"\0")
    with pytest.raises(KestrelError, match=f"{folder} are damaged.*{name}.*delete that folder"):
        build(tmp_path)


@pytest.mark.parametrize("name", ["tokens_00000.bin", "documents.bin"])
def test_a_flipped_bit_is_noticed_when_verifying(tmp_path, name):
    folder = build(tmp_path).folder
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(KestrelError, match=f"{name} does not have its sha256"):
        open_shards(folder, verify=True)


def test_a_whole_folder_verifies(tmp_path):
    assert texts_of(open_shards(build(tmp_path, shard_tokens=20).folder, verify=True)) == TEXTS


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mangled_manifest_gives_our_error_or_the_same_tokens(tmp_path_factory, data):
    folder = build(tmp_path_factory.mktemp("shards"), shard_tokens=20).folder
    text = (folder / MANIFEST).read_text()
    if data.draw(st.booleans()):  # one value becomes something else
        manifest = json.loads(text)
        key = data.draw(st.sampled_from(sorted(manifest)))
        manifest[key] = data.draw(st.sampled_from([None, -1, 0, 2**70, "", "../../etc/passwd", [], {}, {"x": {}}, 1.5]))
        text = json.dumps(manifest)
    else:
        cut = data.draw(st.integers(0, len(text)))
        text = text[:cut] + data.draw(st.text(max_size=3)) + text[cut + data.draw(st.integers(0, 3)) :]
    (folder / MANIFEST).write_text(text)
    try:
        shards = open_shards(folder, verify=True)
    except KestrelError:
        return
    assert texts_of(shards) == TEXTS


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "tokens_00000.bin/../../x", "other.bin"])
def test_a_manifest_cannot_point_elsewhere(tmp_path, name):
    folder = build(tmp_path).folder
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = manifest["files"].pop("tokens_00000.bin")
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(KestrelError, match="damaged"):
        open_shards(folder)


# ------------------------------------------------------------------------------------------------------------- kill -9

# Builds shards, and kills itself with signal 9 when a write, a flush or a rename happens for the n-th time.
DYING = """
import os, signal, sys
from pathlib import Path
from data import documents, files
from tests.data.toy import Bytes, ListSource

calls, fatal = 0, int(sys.argv[1])

def counted(function):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call

documents._Writer._write = counted(documents._Writer._write)
documents._Writer._close = counted(documents._Writer._close)
documents.json.dump = counted(documents.json.dump)
os.fsync, os.replace = counted(os.fsync), counted(os.replace)
documents.build_shards(ListSource(["once upon", "a time", "there was"]), Bytes(), "train", sys.argv[2], shard_tokens=12)
print(calls)
"""


def build_and_die(tmp_path, fatal):
    command = [sys.executable, "-c", DYING, str(fatal), str(tmp_path)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": "."}, capture_output=True, text=True)


def test_a_killed_builder_leaves_all_or_nothing(tmp_path):
    survivor = build_and_die(tmp_path / "survivor", 0)
    assert survivor.returncode == 0, survivor.stderr
    texts, n_calls = ["once upon", "a time", "there was"], int(survivor.stdout)
    assert n_calls > 12
    outcomes = set()
    for fatal in {*range(1, n_calls + 1, 3), n_calls - 2, n_calls - 1, n_calls}:
        cache = tmp_path / str(fatal)
        assert build_and_die(cache, fatal).returncode == -signal.SIGKILL
        folder = shards_folder(ListSource(texts), Bytes(), "train", cache)
        outcomes.add(folder.exists())
        if folder.exists():
            assert texts_of(open_shards(folder, verify=True)) == texts
        # whoever comes next gets it whole, and finds nothing of the dead one afterwards
        assert texts_of(build_shards(ListSource(texts), Bytes(), "train", cache, shard_tokens=12)) == texts
        assert {path.name for path in folder.parent.iterdir()} == {folder.name, f"{folder.name}.lock"}
    assert outcomes == {True, False}  # killed before the rename, and after it
