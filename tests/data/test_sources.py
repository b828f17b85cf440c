"""Every source, every way a file can be wrong, and a network that fails in every way a test can make it fail."""

import gzip
import hashlib
import json
import os
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import download, sources, text_files
from data.gutenberg import strip_gutenberg
from data.sources import (
    SCHEMAS,
    BookConfig,
    ClimbmixConfig,
    DataConfig,
    FablesConfig,
    HubConfig,
    TextConfig,
    load_config,
    open_source,
    source_folder,
)
from errors import KestrelError

HASH = "0123456789abcdef"
REAL_PROBE_TIMEOUT_S = download.PROBE_TIMEOUT_S  # the tests wait for less


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_parquet(path, texts, column="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.table({column: texts}), path)
    return path


def text_source(*paths, **options):
    return open_source(TextConfig(files=[str(path) for path in paths], **options))


def both(source):
    return list(source.documents("train")), list(source.documents("val"))


# ------------------------------------------------------------------------------------------------------ kinds of files


def test_tinystories_form_is_one_document_a_story(tmp_path):
    path = write(
        tmp_path / "stories.txt", "One day.\n\nThe end.\n<|endoftext|>\nTwo\n<|endoftext|>  \n\n<|endoftext|>\nThree"
    )
    assert list(text_files.read_documents(path, "text")) == ["One day.\n\nThe end.", "Two", "Three"]


def test_separators_count_only_as_whole_lines(tmp_path):
    path = write(tmp_path / "a.txt", "say <|endoftext|>\nor <|endoftext|> again\n<|endoftext|>x\nand\n<|endoftext|>")
    assert list(text_files.read_documents(path, "text")) == [
        "say <|endoftext|>\nor <|endoftext|> again\n<|endoftext|>x\nand"
    ]


def test_a_text_without_separators_is_taken_to_the_letter(tmp_path):
    text = "\n\n  A play\n\nFirst citizen:\n  Speak!\n\n"
    assert list(text_files.read_documents(write(tmp_path / "a.txt", text), "text")) == [text]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stories=st.lists(st.text(st.sampled_from("ab \n<é|"), max_size=30), max_size=5), block=st.integers(1, 40))
def test_blocks_may_end_anywhere(tmp_path, monkeypatch, stories, block):
    """Also inside a character of several bytes, a line end of two, or a separator."""
    monkeypatch.setattr(text_files, "BLOCK", block)
    text = "".join(f"{story}\r\n<|endoftext|>\r\n" for story in stories)
    path = write(tmp_path / "a.txt", text)
    expected = [story.strip("\n") for story in stories if story.strip()]
    assert list(text_files.read_documents(path, "text")) == expected


def test_a_huge_document_comes_in_parts_that_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_DOCUMENT", 100)
    monkeypatch.setattr(text_files, "BLOCK", 64)
    text = "a line of text\n" * 20 + "x" * 250 + "\nend\n"
    parts = list(text_files.read_documents(write(tmp_path / "a.txt", text), "text"))
    assert "".join(parts) == text
    assert max(map(len, parts)) == 100


def test_line_ends_and_byte_order_marks_are_normalised(tmp_path):
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert list(text_files.read_documents(path, "text")) == ["one\ntwo\nthree\n"]


def test_bytes_that_are_no_utf8_are_replaced_counted_and_told_once(tmp_path, capsys):
    path = write(tmp_path / "a.txt", b"caf\xe9 and \xff, but not this one: \xef\xbf\xbd; " + b"plain words " * 20)
    for _ in range(2):
        (text,) = text_files.read_documents(path, "text")
    assert text.startswith("caf\ufffd and \ufffd, but not this one: \ufffd; ")
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "a.txt: 2 bytes" in told


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "json"])
def test_json_lines(tmp_path, ending):
    lines = [{"text": "one\ntwo", "n": 1}, {"text": " "}, {"text": "half a pair: \ud83d"}]
    content = ("\ufeff" + "\r\n\r\n".join(json.dumps(line) for line in lines)).encode()
    path = write(tmp_path / f"a.{ending}", gzip.compress(content) if ending.endswith("gz") else content)
    assert list(text_files.read_documents(path, "text")) == ["one\ntwo", "half a pair: ?"]


def test_gzipped_text(tmp_path):
    path = write(tmp_path / "a.txt.gz", gzip.compress(b"once\n<|endoftext|>\ntwice\n"))
    assert list(text_files.read_documents(path, "text")) == ["once", "twice"]


def test_parquet_rows_of_the_column_asked_for(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["one", None, "", "two"], "story")
    assert list(text_files.read_documents(path, "story")) == ["one", "two"]


WRONG_FILES = {
    "a.jsonl": [
        (b'{"text": "ok"}\n{"tex', "a.jsonl, line 2: not JSON"),
        (b'["text"]', 'expected a JSON object such as {"text": …}, got list'),
        (b'{"a": 1, "b": 2}', 'line 1: there is no field "text" among a, b; set data.column'),
        (b'{"text": 5}', 'the field "text" must be a string, got int'),
    ],
    "a.txt": [
        (b"PK\x03\x04\0\0 binary", "a.txt is not UTF-8 text: it holds NUL bytes"),
        ("text".encode("utf-16"), "UTF-16: save it as UTF-8"),
        (bytes(range(128, 256)) * 4, "is not UTF-8 text: 512 of its first 512 bytes are invalid"),
    ],
    "a.txt.gz": [
        (b"not gzipped", "cannot read .*a.txt.gz: Not a gzipped file"),
        (gzip.compress(b"words " * 1000, mtime=0)[:-20], "cannot read .*a.txt.gz: Compressed file ended"),
    ],
    "a.parquet": [(b"not parquet", "cannot read .*a.parquet as parquet"), (b"", "cannot read .*a.parquet as parquet")],
}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [(name, content, message) for name, cases in WRONG_FILES.items() for content, message in cases],
)
def test_a_file_of_the_wrong_kind_is_one_sentence(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(KestrelError, match=message.replace("{", r"\{").replace("[", r"\[")) as caught:
        list(text_files.read_documents(path, "text"))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parquet_columns_must_exist_and_hold_strings(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [1, 2], "n")
    with pytest.raises(KestrelError, match=r'no column "text" among n; set data.column'):
        list(text_files.read_documents(path, "text"))
    with pytest.raises(KestrelError, match='the column "n" must hold strings, got int64'):
        list(text_files.read_documents(path, "n"))


def test_unreadable_file_is_one_sentence(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "words")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(text_files, "_open", refuse)
    with pytest.raises(KestrelError, match=r"^cannot read .*a.txt: Permission denied$"):
        list(text_files.read_documents(path, "text"))


# ----------------------------------------------------------------------------------------------------- finding files


def test_brackets_thousands_deep_are_not_json(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "fine"}\n' + 100_000 * "[")
    with pytest.raises(KestrelError, match="line 2: not JSON"):
        list(text_files.read_documents(path, "text"))


def test_nul_bytes_are_refused_wherever_they_are(tmp_path):
    path = write(tmp_path / "a.txt", b"a" * (text_files.BLOCK + 10) + b"\0")
    with pytest.raises(KestrelError, match="NUL bytes"):
        list(text_files.read_documents(path, "text"))


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "link").symlink_to("pipe.txt")
    for name in ("pipe.txt", "link"):
        with pytest.raises(KestrelError, match=rf"data\.files: .*{name} is not a regular file.*write it to a file"):
            text_files.find_files([str(tmp_path / name)])


def test_what_may_not_be_read_is_not_called_missing(tmp_path, no_privileges):
    locked = tmp_path / "locked"
    write(locked / "t.txt", "text")
    locked.chmod(0)
    try:
        for pattern in (locked, locked / "t.txt"):
            with pytest.raises(KestrelError, match=r"data\.val_files: .*cannot (be )?read.*: Permission denied"):
                text_files.find_files([str(pattern)], "data.val_files")
    finally:
        locked.chmod(0o700)


def test_folders_globs_and_paths_are_found_sorted_and_once(tmp_path):
    for name in ("b.txt", "a.jsonl", "deep/c.parquet", "notes.md", ".hidden.txt", ".git/d.txt"):
        write(tmp_path / name, "x")
    found = text_files.find_files([str(tmp_path), str(tmp_path / "*.txt"), str(tmp_path / "notes.md")])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["a.jsonl", "b.txt", "deep/c.parquet", "notes.md"]


def test_file_names_with_glob_characters_are_found(tmp_path):
    path = write(tmp_path / "a[1]*.txt", "x")
    assert text_files.find_files([str(path)]) == [path]


def test_what_is_not_there_is_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    for pattern, message in {
        "nothing.txt": "data.files: there is no file .*nothing.txt",
        "*.nothing": r"data.files: nothing matches .*\*.nothing",
        "empty": "data.files: the folder .*empty holds no .txt, .jsonl or .parquet file",
    }.items():
        with pytest.raises(KestrelError, match=message):
            text_source(tmp_path / pattern)
    with pytest.raises(KestrelError, match=r"data.val_files: there is no file"):
        text_source(write(tmp_path / "a.txt", "x"), val_files=["nothing.txt"])


def test_text_without_files_says_what_to_give():
    with pytest.raises(KestrelError, match=r"data=text needs files: give data.files="):
        open_source(TextConfig())


# -------------------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("valid.txt", True), ("val.txt", True), ("TinyStoriesV2-GPT4-valid.txt", True), ("a_val.jsonl", True),
        ("validation-00000-of-00001.parquet", True), ("Valid.TXT", True), ("val2.txt", True),
        ("train.txt", False), ("carnival.txt", False), ("valentine.txt", False), ("invalid.txt", False),
        ("values.txt", False),
    ],
)  # fmt: skip
def test_validation_files_are_known_by_a_word_of_their_name(tmp_path, name, expected):
    assert text_files.has_word(tmp_path / "val" / name, text_files.VALIDATION_WORDS) == expected


def test_a_folder_with_train_and_valid_is_split_by_name(tmp_path):
    write(tmp_path / "train.txt", "a\n<|endoftext|>\nb")
    write(tmp_path / "valid.txt", "c")
    assert both(text_source(tmp_path)) == (["a", "b"], ["c"])


def test_val_files_win_over_names(tmp_path):
    names = ["one.txt", "two.txt", "valid.txt"]
    one, two, valid = (write(tmp_path / name, name) for name in names)
    assert both(text_source(tmp_path, val_files=[str(two)])) == (["one.txt", "valid.txt"], ["two.txt"])
    assert both(text_source(one, two, val_files=[str(valid)])) == (["one.txt", "two.txt"], ["valid.txt"])


def test_test_files_are_left_out_where_splits_have_names(tmp_path, capsys):
    for name in ("train.txt", "valid.txt", "test.txt"):
        write(tmp_path / name, name)
    assert both(text_source(tmp_path)) == (["train.txt"], ["valid.txt"])
    assert "left out as test data: test.txt" in capsys.readouterr().err


def test_only_validation_files_is_an_error(tmp_path):
    with pytest.raises(KestrelError, match=r"nothing is left to train on, valid.txt being for validation"):
        text_source(write(tmp_path / "valid.txt", "x"))


@pytest.mark.parametrize("texts", [["0123456789" * 10], ["a" * 50, "b" * 20, "c" * 30]])
def test_few_documents_are_split_by_position(tmp_path, texts):
    path = write_parquet(tmp_path / "a.parquet", texts)
    train, val = both(text_source(path, val_fraction=0.1))
    assert [a + b for a, b in zip(train, val)] == texts
    assert [len(part) for part in train] == [int(0.9 * len(text)) for text in texts]


def test_a_tiny_file_keeps_its_text_for_training(tmp_path):
    source = text_source(write(tmp_path / "a.txt", "x"))
    assert list(source.documents("train")) == ["x"]
    with pytest.raises(KestrelError, match=r"a.txt\): there is no text in the val split; give data.val_files"):
        list(source.documents("val"))


@pytest.mark.parametrize("content", ["", " \n\n", "<|endoftext|>\n"])
def test_an_empty_file_is_an_error_in_both_splits(tmp_path, content):
    source = text_source(write(tmp_path / "a.txt", content))
    for split in ("train", "val"):
        with pytest.raises(KestrelError, match=f"there is no text in the {split} split"):
            list(source.documents(split))


def test_an_empty_file_among_others_is_passed_over(tmp_path):
    write(tmp_path / "a.txt", "")
    write(tmp_path / "b.txt", "y" * 200)
    train, val = both(text_source(tmp_path))
    assert "".join(train + val) == "y" * 200


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(100, 400), fraction=st.sampled_from([1e-9, 0.01, 0.5, 1 - 1e-9]), start=st.integers(0, 10**6))
def test_many_documents_are_split_by_their_own_hash(tmp_path, count, fraction, start):
    """Disjoint, complete, never empty, and a document stays on its side when others come."""
    texts = [f"story {start + number}" for number in range(count)]
    source = text_source(write_parquet(tmp_path / "a.parquet", texts), val_fraction=fraction)
    train, val = both(source)
    assert sorted(train + val) == sorted(texts)
    assert train
    assert val
    assert abs(len(val) - fraction * count) <= 1 + 5 * (count * fraction * (1 - fraction)) ** 0.5
    more = text_source(
        write_parquet(tmp_path / "b.parquet", [*texts, *(f"new {n}" for n in range(50))]), val_fraction=fraction
    )
    assert len(set(val) - set(more.documents("val"))) <= 1  # the one held out only so that there is one


def test_copies_of_a_document_stay_together(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [f"story {n % 150}" for n in range(600)])
    train, val = both(text_source(path, val_fraction=0.2))
    assert not set(train) & set(val)


def test_documents_all_the_same_cannot_be_split(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["same"] * 200)
    with pytest.raises(KestrelError, match="the documents are all the same"):
        both(text_source(path))


def test_fingerprint_follows_content_and_settings(tmp_path):
    path = write(tmp_path / "a.txt", "once upon a time")
    before = text_source(path).fingerprint
    assert text_source(path).fingerprint == before
    assert text_source(path, val_fraction=0.5).fingerprint != before
    assert text_source(path, column="story").fingerprint != before
    write(path, "once upon a time!")
    assert text_source(path).fingerprint != before


# ------------------------------------------------------------------------------------------------- the sets by name


def test_every_yaml_is_a_config():
    names = sorted(path.stem for path in sources.CONF.glob("*.yaml"))
    assert names == ["climbmix", "fables", "text", "tinyshakespeare", "tinystories", "wizard_of_oz"]
    for name in names:
        config = load_config(name)
        assert config.name == name
        assert type(config) in SCHEMAS.values()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataConfig(val_fraction=0.0), "data.val_fraction must be between 0 and 1, got 0.0"),
        (lambda: DataConfig(val_fraction=1.5), "data.val_fraction"),
        (lambda: DataConfig(vocab_size=0), "data.vocab_size must be positive, got 0"),
        (lambda: DataConfig(val_files=["a"]), "goes with data.files, which is empty"),
        (lambda: DataConfig(column=""), "data.column must not be empty"),
        (lambda: FablesConfig(megabytes=0.0), "data.megabytes must be 0.01 to 10000, got 0"),
        (lambda: FablesConfig(seed=-1), "data.seed must not be negative, got -1"),
        (lambda: HubConfig(repo="a/b"), "data.revision must name a commit of a/b"),
        (lambda: ClimbmixConfig(repo="a/b", revision="c", n_shards=0), "data.n_shards must be 1 to 6542, or -1"),
        (lambda: ClimbmixConfig(repo="a/b", revision="c", workers=0), "data.workers must be 1 to 64, got 0"),
        (lambda: load_config("nonsense"), "there is no data=nonsense; choose from climbmix, fables"),
        (lambda: load_config("text", colum="a"), "there is no key data.colum for data=text"),
    ],
)
def test_a_wrong_value_names_key_value_and_remedy(make, message):
    with pytest.raises(KestrelError, match=message):
        make()


def test_fables_come_in_two_splits_that_share_no_story():
    source = open_source(FablesConfig(megabytes=0.1))
    train, val = both(source)
    assert not set(train) & set(val)
    assert 50_000 < sum(map(len, train)) <= 100_000
    assert 10_000 < sum(map(len, val)) <= 20_000
    assert open_source(FablesConfig(megabytes=0.1)).fingerprint == source.fingerprint
    assert open_source(FablesConfig(megabytes=0.1, seed=2)).fingerprint != source.fingerprint


def test_any_set_can_be_given_local_files(tmp_path):
    write(tmp_path / "train.txt", "a")
    write(tmp_path / "valid.txt", "b")
    for name in ("fables", "tinystories", "tinyshakespeare", "wizard_of_oz", "climbmix"):
        assert both(open_source(load_config(name, files=[str(tmp_path)]))) == (["a"], ["b"])


def test_shakespeare_is_cut_at_nine_tenths_of_its_characters(tmp_path):
    text = "First Citizen:\nSpeak.\n\n" * 43 + "ends\n"
    train, val = both(open_source(load_config("tinyshakespeare", files=[str(write(tmp_path / "input.txt", text))])))
    assert train == [text[: int(0.9 * len(text))]]
    assert val == [text[int(0.9 * len(text)) :]]


def test_climbmix_validates_on_its_last_file(tmp_path):
    for number in (0, 1, 6542):
        write_parquet(tmp_path / f"shard_{number:05d}.parquet", [f"text {number}"])
    config = load_config("climbmix", files=[str(tmp_path)])
    assert both(open_source(config)) == (["text 0", "text 1"], ["text 6542"])
    with pytest.raises(KestrelError, match=r"nothing is left to train on, shard_00000.parquet being for validation"):
        open_source(load_config("climbmix", files=[str(tmp_path / "shard_00000.parquet")]))


BOOK = 'CHAPTER I\n\nDorothy lived. "The Project Gutenberg etext," she said.\n\nTHE END\n'
HEADERS = {
    "none": "",
    "modern": "\ufeffThe Project Gutenberg eBook of Oz\n    \nThis ebook is for anyone.\n\nTitle: Oz\n\n"
    "*** START OF THE PROJECT GUTENBERG EBOOK OZ ***\n\n\nProduced by A. Reader and\nothers at pgdp.net\n\n\n",
    "of 2008": "Title: Oz\n\n*** START OF THIS PROJECT GUTENBERG EBOOK OZ ***\n\nE-text prepared by B.\n\n\n",
    "of 1993": "*********The Project Gutenberg Etext of Oz*******\n\n****START**THE SMALL PRINT!**PUBLIC DOMAIN****\n"
    "lawyers\n*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.08.29.92*END*\n\n\n"
    "        The Project Gutenberg Etext of The Wonderful Wizard of Oz\n\n",
}
FOOTERS = {
    "none": "",
    "modern": "\n\n*** END OF THE PROJECT GUTENBERG EBOOK OZ ***\n\nUpdated editions\nSTART: FULL LICENSE\n"
    + "terms\n" * 3000,
    "of 2008": "\n\nEnd of the Project Gutenberg EBook of Oz, by\n\n*** END OF THIS PROJECT GUTENBERG EBOOK OZ ***\n",
    "of 1993": "\n\n\nEnd of The Project Gutenberg Etext of The Wonderful Wizard of Oz\n\n",
    "possessive": "\n\nEnd of Project Gutenberg's Oz, by L. Frank Baum\n",
    "a line": "\n            End of the Project Gutenberg EBook of Oz, by L. Frank Baum  ***\n",
}


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("footer", FOOTERS)
@pytest.mark.parametrize("size", [1, 2000])
def test_only_the_book_is_left_of_a_gutenberg_file(header, footer, size):
    book = BOOK * size
    assert strip_gutenberg(HEADERS[header].replace("\ufeff", "") + book + FOOTERS[footer]) == book


def test_wizard_of_oz_is_stripped_and_split(tmp_path):
    path = write(tmp_path / "oz.txt", (HEADERS["modern"] + BOOK * 10 + FOOTERS["modern"]).replace("\n", "\r\n"))
    ((train,), (val,)) = both(open_source(load_config("wizard_of_oz", files=[str(path)])))
    assert train + val == BOOK * 10
    assert len(train) == int(0.9 * len(BOOK * 10))


# ------------------------------------------------------------------------------------------------------------ network


@pytest.fixture(autouse=True)
def no_real_network(monkeypatch, tmp_path):
    """No proxies, no choices made outside, no cache but the test's."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_ENDPOINT", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("KESTREL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "PROBE_TIMEOUT_S", 0.4)


@pytest.fixture
def server():
    """A server of `files` on this machine; `moods` say, request by request, how it misbehaves."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.end_headers()

        def do_GET(self):
            mood = self.server.moods.pop(0) if self.server.moods else "fine"
            asked = self.headers.get("Range")
            self.server.requests.append((self.path, asked))
            content = self.server.files.get(self.path)
            if content is None or isinstance(mood, int):
                return self.send_error(404 if content is None else mood)
            first = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and mood != "no ranges" else 0
            if first and first >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(206 if first else 200)
            if first:
                first = 0 if mood == "other range" else first
                self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - first))
            self.end_headers()
            end = first + (len(content) - first) // 2 if mood == "breaks off" else len(content)
            self.wfile.write(content[first:end])

        def log_message(self, *arguments):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.files, running.moods, running.requests = {}, [], []
    running.url = f"http://127.0.0.1:{running.server_port}"
    threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


def fetch(server, path, **options):
    waits = []
    download.download(f"{server.url}/file", path, sleep=waits.append, **options)
    return waits


CONTENT = bytes(range(256)) * 40


def test_download_is_whole_and_leaves_nothing_else(server, tmp_path):
    server.files["/file"] = CONTENT
    told = []
    fetch(server, tmp_path / "deep" / "file", sha256=hashlib.sha256(CONTENT).hexdigest(), progress=told.append)
    assert (tmp_path / "deep" / "file").read_bytes() == CONTENT
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file"]
    assert told[-1] == len(CONTENT)
    fetch(server, tmp_path / "deep" / "file")
    assert len(server.requests) == 1  # what is there is not fetched again


def test_download_goes_on_where_it_stopped(server, tmp_path):
    server.files["/file"] = CONTENT
    server.moods = ["breaks off", "breaks off"]
    assert fetch(server, tmp_path / "file") == [2, 4]
    assert (tmp_path / "file").read_bytes() == CONTENT
    half = len(CONTENT) // 2
    assert [asked for _, asked in server.requests] == [None, f"bytes={half}-", f"bytes={half + half // 2}-"]


def test_download_takes_up_what_an_earlier_process_left(server, tmp_path):
    server.files["/file"] = CONTENT
    write(tmp_path / "file.tmp", CONTENT[:1000])
    fetch(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.requests == [("/file", "bytes=1000-")]


@pytest.mark.parametrize("mood", ["no ranges", "other range"])
def test_download_starts_over_where_ranges_are_not_as_asked(server, tmp_path, mood):
    server.files["/file"] = CONTENT
    server.moods = [mood]
    write(tmp_path / "file.tmp", b"other" * 10)
    fetch(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("left", [CONTENT, CONTENT + b"too much"], ids=["whole", "too long"])
def test_download_settles_a_partial_file_that_has_everything(server, tmp_path, left):
    server.files["/file"] = CONTENT
    write(tmp_path / "file.tmp", left)
    fetch(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_download_backs_off_and_gives_up(server, tmp_path):
    server.files["/file"] = CONTENT
    server.moods = [503] * 10
    waits = []
    with pytest.raises(KestrelError, match=r"cannot download .*/file: HTTP Error 503.*\(attempt 5 of 5\)"):
        download.download(f"{server.url}/file", tmp_path / "file", sleep=waits.append)
    assert waits == [2, 4, 8, 16]
    assert not (tmp_path / "file").exists()


def test_download_does_not_insist_on_what_is_not_there(server, tmp_path):
    with pytest.raises(KestrelError, match="HTTP Error 404"):
        fetch(server, tmp_path / "file")
    assert len(server.requests) == 1


def test_download_refuses_another_file(server, tmp_path):
    server.files["/file"] = b"<html>please log in</html>"
    with pytest.raises(KestrelError, match="is not the expected file: its sha256 is"):
        fetch(server, tmp_path / "file", sha256=hashlib.sha256(CONTENT).hexdigest())
    with pytest.raises(KestrelError, match="is not the expected file"):
        fetch(server, tmp_path / "file", check=sources._is_utf8)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_not_tried_again(server, tmp_path, monkeypatch):
    server.files["/file"] = CONTENT

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download, "_fetch", full)
    with pytest.raises(KestrelError, match=r"No space left on device.*attempt 1 of 5"):
        fetch(server, tmp_path / "file")


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def hang(*arguments, **options):
    time.sleep(2)
    raise OSError("no answer")


@pytest.fixture(params=["refused", "no DNS", "DNS hangs", "never answers", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"])
def dead_network(request, monkeypatch):
    """Networks that do not work, each in its own way."""
    endpoint = closed_port()
    listener = socket.socket()
    if request.param == "no DNS":
        endpoint = "http://nowhere.invalid"
    if request.param == "DNS hangs":
        endpoint = "http://nowhere.invalid"
        monkeypatch.setattr(socket, "getaddrinfo", hang)
    if request.param == "never answers":  # accepts connections and keeps silent
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
    if request.param.startswith("HF"):
        monkeypatch.setenv(request.param, "1")
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    yield endpoint
    listener.close()


@pytest.mark.parametrize("name", ["tinystories", "climbmix", "tinyshakespeare", "wizard_of_oz"])
def test_without_a_network_the_error_comes_soon_and_helps(dead_network, name):
    config = load_config(
        name, **({} if name in ("tinystories", "climbmix") else {"url": f"{dead_network}/a/input.txt"})
    )
    start = time.monotonic()
    with pytest.raises(KestrelError) as caught:
        open_source(config)
    # the probe is all there is to wait for: 5 s with its real time-out
    assert time.monotonic() - start < download.PROBE_TIMEOUT_S + 5 - REAL_PROBE_TIMEOUT_S
    message = str(caught.value)
    assert f"python -m data.sources {name}" in message
    assert str(source_folder(config)) in message
    assert "data.files=" in message
    assert "\n" not in message


def test_a_book_is_fetched_once_and_then_needs_no_network(server, monkeypatch):
    text = BOOK * 5
    server.files["/oz/input.txt"] = (HEADERS["modern"] + text).encode()
    config = BookConfig(name="oz", url=f"{server.url}/oz/input.txt", val_fraction=0.1)
    train, val = both(open_source(config))
    assert "".join(train + val) == text
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert both(open_source(config)) == (train, val)
    assert len(server.requests) == 1


def test_a_cache_that_cannot_be_written_is_one_sentence(server, tmp_path, monkeypatch):
    monkeypatch.setenv("KESTREL_CACHE", str(write(tmp_path / "a_file", "x")))
    with pytest.raises(KestrelError, match=r"^cannot write to .*a_file.*: Not a directory; set data.cache_dir$"):
        open_source(BookConfig(name="oz", url=f"{server.url}/input.txt"))


def test_files_put_into_the_folder_by_hand_do_as_well(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = load_config("tinystories")
    write(source_folder(config) / "valid.txt", "c")
    with pytest.raises(KestrelError, match="HF_HUB_OFFLINE"):  # validation alone is a fetch that was cut short
        open_source(config)
    write(source_folder(config) / "train.txt", "a\n<|endoftext|>\nb")
    assert both(open_source(config)) == (["a", "b"], ["c"])


def shard(number):
    sink = arrow.BufferOutputStream()
    parquet.write_table(arrow.table({"text": [f"shard {number}, row {row}" for row in range(3)]}), sink)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def climbmix(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    for number in (0, 1, 2, 6542):
        server.files[f"/datasets/a/mix/resolve/{HASH}/shard_{number:05d}.parquet"] = shard(number)
    return ClimbmixConfig(name="climbmix", repo="a/mix", revision=HASH, n_shards=2)


def test_climbmix_fetches_its_shards_and_the_last_one(server, climbmix, monkeypatch):
    train, val = both(open_source(climbmix))
    assert train == [f"shard {number}, row {row}" for number in (0, 1) for row in range(3)]
    assert val == [f"shard 6542, row {row}" for row in range(3)]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert both(open_source(climbmix)) == (train, val)


def test_climbmix_fetches_only_what_is_missing(server, climbmix):
    open_source(climbmix)
    before = len(server.requests)
    climbmix.n_shards = 3
    open_source(climbmix)
    assert [path[-19:] for path, _ in server.requests[before:]] == ["shard_00002.parquet"]


def test_climbmix_says_how_much_is_there(climbmix, monkeypatch):
    open_source(climbmix)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    climbmix.n_shards = 5
    with pytest.raises(KestrelError, match=r"climbmix n_shards=5.*holds 3 of 6 shards"):
        open_source(climbmix)


def test_climbmix_shard_that_is_no_parquet_is_refused(server, climbmix):
    server.files[f"/datasets/a/mix/resolve/{HASH}/shard_00001.parquet"] = b"<html>busy</html>"
    with pytest.raises(KestrelError, match=r"shard_00001.parquet is not the expected file"):
        open_source(climbmix)
    assert not (source_folder(climbmix) / "shard_00001.parquet").exists()


def test_a_hub_set_is_read_through_datasets_and_kept(tmp_path, monkeypatch):
    """A local folder stands for the hub: `datasets` reads both the same way."""
    for split, texts in {"train": ["one", "two"], "validation": ["three"]}.items():
        write_parquet(tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet", texts)
    monkeypatch.setattr(download, "is_reachable", lambda url: True)
    config = HubConfig(name="local", repo=str(tmp_path / "set"), revision=HASH)
    assert both(open_source(config)) == (["one", "two"], ["three"])
    assert {path.name for path in source_folder(config).iterdir()} == {"train.parquet", "valid.parquet", ".lock"}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert both(open_source(config)) == (["one", "two"], ["three"])


def test_a_hub_set_that_fails_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "is_reachable", lambda url: True)
    config = HubConfig(name="local", repo=str(tmp_path / "nothing"), revision=HASH)
    with pytest.raises(KestrelError, match=rf"^cannot fetch .*nothing at {HASH[:12]}: ") as caught:
        open_source(config)
    assert "\n" not in str(caught.value)


def test_command_fetches_and_tells_where(server, climbmix, capsys, monkeypatch):
    monkeypatch.setattr(sources, "load_config", lambda name, **changes: climbmix)
    sources.main(["climbmix", "n_shards=2"])
    assert f"data=climbmix: 3 files, 0.0 MB, in {source_folder(climbmix)}" in capsys.readouterr().out
    with pytest.raises(KestrelError, match=r"usage: python -m data.sources NAME"):
        sources.main([])
