"""Every text survives the way to ids and back, no typed text becomes a special token, no broken file is loaded."""

import base64
import contextlib
import hashlib
import http.server
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as Trainer

from data.bpe import BYTE_OF_LETTER, BYTES, SPLIT_PATTERN, learn_byte_pairs
from data.published import PUBLISHED, RankFile, cache_folder, published_tokens
from data.tokenizer import (
    FIXED_VOCAB,
    PATTERNS,
    SPECIALS,
    Tokenizer,
    TokenizerConfig,
    load_tokenizer,
    tokenizer_from_json,
    train_tokenizer,
)
from errors import KestrelError

STORY = "Once upon a time there was a little falcon. The falcon wasn't big, but she'd fly; she flew 1234 miles!\n\n"
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
TRICKY = [
    "",
    " ",
    "  \n \t\r\n\r\n   x   ",
    "I'm they'RE we'll 'tis o'clock don''t 'S'ſ",
    "1 22 333 4444 55555, ²³½Ⅷ ٣٤٥ 3.14",
    "naïve café, Ünï¢ødé; e\u0301 combining, ﬁ ligature",
    "漢字かな交じり文と한국어와ไทย",
    "👩‍👩‍👧‍👦🏳️‍🌈🇺🇳 emoji☕️!!!???…",
    "\x00\x01\x7f\x80\x85\u200b\u2028\ufeff\uffff\U0010ffff",
    "def f(x):\n    return {'a': [1, 2]}  # %$^&*\n\n\n\tend",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" * 9 + "!" * 70 + " " * 200 + "\n" * 30,
]
any_text = st.text(st.characters(exclude_categories=["Cs"])) | st.text(" \n\t'a1é漢😀<|>bos", max_size=60)
kinds = pytest.mark.parametrize("kind", PATTERNS)


def is_cached(name: str) -> bool:
    return (cache_folder() / PUBLISHED[name].cache_name).is_file()


@pytest.fixture(scope="module")
def documents() -> list[str]:
    """Text whose words repeat as words do, with every tricky text among them."""
    rng = random.Random(1)
    words = ["the", "of", "and", "falcon", "'ll", "1234", "café", "漢字", "😀", "\n\n", "-", "...", *STORY.split(" ")]
    return [STORY, *(" ".join(rng.choices(words, k=80)) for _ in range(60)), *TRICKY * 3]


@pytest.fixture(scope="module")
def tokenizers(documents) -> dict[str, Tokenizer]:
    names = [name for name in PATTERNS if name not in PUBLISHED or is_cached(name)]
    sizes = {"bpe": 700}
    return {name: train_tokenizer(TokenizerConfig(name, sizes.get(name)), documents) for name in names}


@pytest.fixture
def tokenizer(tokenizers, kind) -> Tokenizer:
    if kind not in tokenizers:
        pytest.skip(f"the ranks of {kind} are not in tiktoken's cache, {cache_folder()}")
    return tokenizers[kind]


# ---- there and back -----------------------------------------------------------------------------------------------


@kinds
@settings(deadline=None, max_examples=150)
@given(text=any_text)
def test_any_text_survives_encoding_and_bytes_add_up(tokenizers, kind, text):
    if kind not in tokenizers:
        pytest.skip(f"the ranks of {kind} are not in tiktoken's cache")
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert all(type(i) is int and 0 <= i < tokenizer.bos_id for i in ids)


@kinds
@pytest.mark.parametrize("text", TRICKY, ids=range(len(TRICKY)))
def test_tricky_text_survives_encoding(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@kinds
@pytest.mark.parametrize("unit", [" ", "\t ", "\n", "a", "\u3000x"], ids=ascii)
def test_runs_beyond_the_limit_of_the_regex_engine_survive_encoding(tokenizer, unit):
    text = unit * 1_100_000 + "x"
    ids = tokenizer.encode_batch([text], num_threads=1)[0]
    assert tokenizer.decode(ids) == text


surrogates = st.text(st.sampled_from("a\ud800\udbff\udc00\udfff\ufeff😀"), max_size=8)


@settings(deadline=None)
@given(text=surrogates)
def test_surrogate_pairs_become_their_character_and_lone_ones_the_replacement(text):
    expected, left = "", text
    while left:
        is_pair = "\ud800" <= left[0] <= "\udbff" and "\udc00" <= left[1:2] <= "\udfff"
        if is_pair:
            expected += chr(0x10000 + (ord(left[0]) - 0xD800) * 0x400 + ord(left[1]) - 0xDC00)
        else:
            expected += "\ufffd" if "\ud800" <= left[0] <= "\udfff" else left[0]
        left = left[2 if is_pair else 1 :]
    tokenizer = Tokenizer("byte", BYTES)
    assert tokenizer.decode(tokenizer.encode(text)) == expected
    assert tokenizer.decode(tokenizer.encode_batch([text], num_threads=1)[0]) == expected
    assert learn_from([text + "x"], "char").encode(text) == learn_from([expected + "x"], "char").encode(expected)


@kinds
def test_a_character_cut_in_two_decodes_to_the_replacement(tokenizer):
    whole = "a😀".encode()
    ids = [tokenizer.tokens.index(bytes([value])) for value in whole]
    assert tokenizer.decode(ids) == "a😀"
    assert tokenizer.decode(ids[:-1]) == "a\ufffd"
    assert tokenizer.decode_bytes(ids[:-1]) == whole[:-1]


@kinds
def test_batches_equal_single_texts_for_any_number_of_threads(tokenizer, documents):
    single = [tokenizer.encode(text) for text in documents]
    for num_threads in (1, 3, 100, None):
        batch = tokenizer.encode_batch(iter(documents), num_threads=num_threads)
        assert all(ids.dtype == np.uint32 for ids in batch)
        assert [ids.tolist() for ids in batch] == single
    assert tokenizer.encode_batch([]) == []


def test_ids_may_come_as_list_array_or_tensor():
    torch = pytest.importorskip("torch")
    tokenizer = Tokenizer("byte", BYTES)
    for ids in ([104, 105], np.array([104, 105]), torch.tensor([104, 105]), iter([104, 105])):
        assert tokenizer.decode(ids) == "hi"


# ---- special tokens -----------------------------------------------------------------------------------------------


@kinds
def test_specials_are_the_nine_last_ids_in_order(tokenizer):
    n = len(tokenizer.tokens)
    assert len(SPECIALS) == 9
    assert [tokenizer.encode_special(name) for name in SPECIALS] == list(range(n, n + 9))
    assert (tokenizer.bos_id, tokenizer.vocab_size) == (n, n + 9)
    assert tokenizer.token_bytes.tolist() == [len(token) for token in tokenizer.tokens] + [0] * 9
    assert tokenizer.token_bytes.dtype == np.int32


@kinds
@settings(deadline=None, max_examples=60)
@given(text=st.lists(st.sampled_from([*SPECIALS, "<|endoftext|>", "<|", "|>", " ", "bos"])).map("".join))
def test_special_names_in_text_never_become_special_tokens(tokenizers, kind, text):
    if kind not in tokenizers:
        pytest.skip(f"the ranks of {kind} are not in tiktoken's cache")
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)
    assert max(ids, default=0) < tokenizer.bos_id
    assert tokenizer.decode(ids) == text
    assert max(tokenizer.encode_batch([text] * 3, num_threads=2)[0], default=0) < tokenizer.bos_id


@kinds
def test_tokens_are_put_before_and_after_by_id_or_name(tokenizer):
    ids, bos, end = tokenizer.encode("hello"), tokenizer.bos_id, tokenizer.encode_special("<|user_end|>")
    assert tokenizer.encode("hello", prepend="<|bos|>", append=end) == [bos, *ids, end]
    assert tokenizer.encode("", prepend=bos) == [bos]
    assert tokenizer.encode_batch(["hello"], append="<|user_end|>")[0].tolist() == [*ids, end]
    assert tokenizer.decode([bos, *ids]) == "<|bos|>hello"
    with pytest.raises(KestrelError, match=r"<\|boss\|>.*<\|bos\|>"):
        tokenizer.encode("hello", prepend="<|boss|>")
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(KestrelError, match=f"0 to {tokenizer.vocab_size - 1} here, got {wrong}"):
            tokenizer.encode("hello", append=wrong)
        with pytest.raises(KestrelError, match=f"0 to {tokenizer.vocab_size - 1} here, got {wrong}"):
            tokenizer.decode([0, wrong])


# ---- learning -----------------------------------------------------------------------------------------------------


def learn_from(documents: list[str], name: str = "bpe", **options) -> Tokenizer:
    return train_tokenizer(TokenizerConfig(name, **options), documents)


@settings(deadline=None, max_examples=25)
@given(
    corpus=st.lists(st.text("ab \n'1é漢", min_size=1, max_size=40), min_size=1, max_size=30),
    texts=st.lists(st.text("ab \n'1é漢", max_size=60), max_size=30),
)
def test_encoding_equals_that_of_the_trainer(corpus, texts):
    assert_trainer_agrees(learn_byte_pairs(corpus, 500), [*corpus, *texts])


def test_encoding_of_tricky_text_equals_that_of_the_trainer(documents):
    assert_trainer_agrees(learn_byte_pairs(documents, 2000), [*TRICKY, *documents])


def assert_trainer_agrees(tokens: list[bytes], texts: list[str]):
    """The same tokens run by Hugging Face's own BPE, which applies listed merges and knows nothing of ranks."""
    letter = {value: char for char, value in BYTE_OF_LETTER.items()}
    words = ["".join(letter[value] for value in token) for token in tokens]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges = []
    for token, word in list(zip(tokens, words))[256:]:
        # each token was made of two that came before it: the engine finds which if it may not use the token itself
        earlier = tiktoken.Encoding(
            "earlier",
            pat_str="(?s).*",
            mergeable_ranks={other: rank for other, rank in ranks.items() if rank < ranks[token]},
            special_tokens={},
        )
        left, right = (words[i] for i in earlier._encode_single_piece(token))
        assert left + right == word
        merges.append((left, right))
    trainer = Trainer(models.BPE(vocab={word: rank for rank, word in enumerate(words)}, merges=merges))
    trainer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer = Tokenizer("bpe", tokens)
    for text in texts:
        assert tokenizer.encode(text) == trainer.encode(text).ids


def test_ranks_depend_on_neither_threads_nor_the_order_of_documents(documents):
    code = (
        "import json, sys; from data.tokenizer import *; documents = json.load(sys.stdin);"
        "print(train_tokenizer(TokenizerConfig(vocab_size=700), documents).hash)"
    )
    shuffled = random.Random(2).sample(documents, len(documents))
    hashes = {learn_from(documents, vocab_size=700).hash}
    for threads, order in (("1", documents), ("7", shuffled)):
        env = os.environ | {"RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"}
        run = subprocess.run(
            [sys.executable, "-c", code], input=json.dumps(order), env=env, capture_output=True, text=True, check=True
        )
        hashes.add(run.stdout.strip())
    assert len(hashes) == 1


def test_same_text_gives_the_same_tokenizer_today_and_in_a_year():
    golden = {
        "bpe": "fe968add2cd4bc327182ce7e3c79de3c34e7cdf4f93bb69bba3041a404112a6d",
        "char": "38c5f74c59a060b319a86effd44810964e6f94b814fed8cd390c069212ccacdd",
        "byte": "805a4bda45681f4bb4938a5b547afd244393d778fe701f641a3422e583cbe03e",
    }
    text = [STORY * 3, "café 漢字 😀"] * 2
    assert {name: learn_from(text, name).hash for name in golden} == golden


def test_frequent_pairs_are_merged_first():
    tokenizer = learn_from(["abab" * 50 + " cd" * 20], vocab_size=256 + 9 + 3)
    assert tokenizer.tokens[256:258] == [b"ab", b"abab"]
    assert tokenizer.tokens[:256] == BYTES


@pytest.mark.parametrize("vocab_size", [265, 266, 300, 512])
def test_vocabulary_is_as_large_as_asked_and_counts_the_specials(documents, vocab_size):
    tokenizer = learn_from(documents * 2, vocab_size=vocab_size)
    assert (tokenizer.vocab_size, tokenizer.shortfall) == (vocab_size, 0)


def test_a_small_text_gives_a_smaller_vocabulary_and_says_so():
    tokenizer = learn_from(["hello hello"], vocab_size=4096)
    assert 265 < tokenizer.vocab_size < 275
    assert tokenizer.shortfall == 4096 - tokenizer.vocab_size


@pytest.mark.parametrize("name", ["bpe", "char"])
def test_only_the_first_characters_of_each_document_and_of_all_are_learned_from(name):
    short = learn_from(["éàü" * 4, "ßßßß"], name)
    assert short.hash == learn_from(["éàü" * 4 + "ñ" * 90, "ßßßß" * 40], name, doc_cap=12, max_chars=16).hash
    assert short.hash != learn_from(["éàü" * 4 + "ñ" * 90, "ßßßß"], name).hash


def test_documents_are_read_no_further_than_needed():
    def documents():
        yield "abc" * 10
        yield "def" * 10
        raise AssertionError("read too far")

    assert learn_from(documents(), "char", max_chars=60).vocab_size == 265


@pytest.mark.parametrize("name", ["bpe", "char"])
@pytest.mark.parametrize("documents", [[], ["", ""], [""]])
def test_no_text_is_an_error(name, documents):
    with pytest.raises(KestrelError, match=f"tokenizer={name}.*empty.*data.files"):
        learn_from(documents, name)


def test_errors_of_the_source_come_through():
    def documents():
        yield STORY
        raise KestrelError("the file is gone")

    with pytest.raises(KestrelError, match="the file is gone"):
        learn_from(documents())


def test_one_endless_word_is_learned_from_in_time():
    word = "".join(random.Random(0).choices("ACGT", k=300_000))
    began = time.perf_counter()
    tokenizer = learn_from([word, " " * 300_000], vocab_size=1024)
    assert time.perf_counter() - began < 9
    assert len(tokenizer.encode(word)) < len(word) / 3


def test_characters_come_in_order_and_the_rarest_give_way():
    tokenizer = learn_from(["ééé àà ü ba"], "char", vocab_size=256 + 9 + 2)
    assert b"".join(tokenizer.tokens[:5]).decode() == " abàé"
    assert tokenizer.vocab_size == 267
    assert len(tokenizer.encode("ééé àà")) == 6
    assert len(tokenizer.encode("ü漢q")) == 2 + 3 + 1


def test_bytes_are_their_own_ids():
    assert learn_from([], "byte").encode("hé") == list("hé".encode())


# ---- configuration ------------------------------------------------------------------------------------------------


def test_sizes_follow_from_the_kind():
    assert TokenizerConfig().vocab_size == TokenizerConfig("char").vocab_size == 4096
    for name, size in FIXED_VOCAB.items():
        assert TokenizerConfig(name).vocab_size == size
        assert TokenizerConfig(name, size).vocab_size == size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "gpt3"}, "tokenizer.name must be one of bpe, gpt2, cl100k, char, byte, got 'gpt3'"),
        ({"vocab_size": 264}, "tokenizer.vocab_size must be at least 265 .* got 264"),
        ({"name": "char", "vocab_size": -1}, "tokenizer.vocab_size must be at least 265 .* got -1"),
        ({"name": "byte", "vocab_size": 4096}, "tokenizer.vocab_size of byte is always 265, got 4096"),
        ({"max_chars": 0}, "tokenizer.max_chars must be positive, got 0"),
        ({"doc_cap": -5}, "tokenizer.doc_cap must be positive, got -5"),
    ],
)
def test_wrong_configuration_is_refused(options, message):
    with pytest.raises(KestrelError, match=message):
        TokenizerConfig(**options)


# ---- files --------------------------------------------------------------------------------------------------------


@kinds
def test_a_saved_tokenizer_is_the_same_when_loaded(tokenizer, tmp_path, documents):
    path = tokenizer.save(tmp_path / "run")
    for place in (path, path.parent, str(path.parent)):
        loaded = load_tokenizer(place)
        assert loaded.hash == tokenizer.hash == hashlib.sha256(tokenizer.to_json().encode()).hexdigest()
        assert loaded.to_json() == tokenizer.to_json()
        assert loaded.token_bytes.tolist() == tokenizer.token_bytes.tolist()
    assert all(loaded.encode(text) == tokenizer.encode(text) for text in documents)
    assert [entry.name for entry in path.parent.iterdir()] == ["tokenizer.json"]


@kinds
def test_a_tokenizer_is_the_same_when_read_from_its_json(tokenizer):
    assert tokenizer_from_json(tokenizer.to_json()).hash == tokenizer.hash


def test_changed_json_is_refused_or_gives_exactly_what_it_says():
    """The JSON carries no checksum of its own: what holds it checks it. But nothing in it may be ignored."""
    text, rng = learn_from([STORY * 3], vocab_size=300).to_json(), random.Random(0)
    for position in rng.sample(range(len(text)), 300):
        changed = text[:position] + chr(ord(text[position]) ^ 1 << rng.randrange(7)) + text[position + 1 :]
        with contextlib.suppress(KestrelError):
            assert tokenizer_from_json(changed).to_json() == changed
        with pytest.raises(KestrelError, match="cannot use this tokenizer"):
            tokenizer_from_json(text[:position])


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    old, new = learn_from([STORY]), learn_from([STORY * 3])
    old.save(tmp_path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KestrelError, match=r"tokenizer\.json: No space left"):
        new.save(tmp_path)
    assert load_tokenizer(tmp_path).hash == old.hash
    assert len(list(tmp_path.iterdir())) == 1


@pytest.fixture
def saved(tmp_path) -> Path:
    return learn_from([STORY * 3], vocab_size=300).save(tmp_path)


def refused(path: Path, content: bytes) -> str:
    """The error that loading this content gives, which names the file, stays on one line and comes at once."""
    path.write_bytes(content)
    began = time.perf_counter()
    with pytest.raises(KestrelError) as caught:
        load_tokenizer(path)
    assert time.perf_counter() - began < 1
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_any_flipped_bit_is_noticed(saved):
    content, rng = saved.read_bytes(), random.Random(0)
    for position in rng.sample(range(len(content) - 1), 300):
        changed = bytearray(content)
        changed[position] ^= 1 << rng.randrange(8)
        refused(saved, bytes(changed))


def test_any_truncated_or_garbled_file_is_noticed(saved):
    content, rng = saved.read_bytes(), random.Random(0)
    for cut in [0, 1, *rng.sample(range(len(content) - 2), 60)]:
        refused(saved, content[:cut])
        refused(saved, content[:cut] + rng.randbytes(20) + content[cut + 20 :])
    for junk in (b"null", b"[]", b"1", b"{}", b"\x80\x04K\x01.", b"[" * 200_000, b"9" * 5000, b"\xff\xfe", b"NaN"):
        refused(saved, junk)


def with_right_checksum(document: dict) -> bytes:
    """What somebody would write who knows how the checksum is made."""
    content = {key: value for key, value in document.items() if key != "sha256"}
    checksum = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return json.dumps(content | {"sha256": checksum}).encode()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "no kestrel-tokenizer file"),
        ({"version": 2}, "version is 2"),
        ({"kind": "gpt5"}, "gpt5"),
        ({"kind": None}, "None"),
        ({"kind": ["bpe"]}, "bpe"),
        ({"extra": None}, "under extra"),
        ({"kind": "gpt2", "pattern": PATTERNS["gpt2"]}, "gpt2 has 50256 ordinary tokens"),
        ({"pattern": ""}, "under pattern"),
        ({"pattern": "(a+)+$"}, "under pattern"),
        ({"specials": SPECIALS[::-1]}, "under sha256, specials"),
        ({"specials": None}, "under sha256, specials"),
        ({"extra": 1}, "under extra"),
        ({"tokens": "YQ=="}, "list"),
        ({"tokens": {}}, "list"),
        ({"tokens": [1, 2]}, "list"),
        ({"tokens": ["!"]}, "damaged"),
        ({"tokens": ["é"]}, "damaged"),
        ({"tokens": []}, "256 of the 256 single bytes"),
        ({"tokens": [base64.b64encode(byte).decode() for byte in BYTES[1:]]}, "1 of the 256 single bytes"),
        ({"tokens": [base64.b64encode(byte).decode() for byte in [*BYTES, b"a"]]}, "different"),
        ({"tokens": [base64.b64encode(byte).decode() for byte in [*BYTES, b""]]}, "not empty"),
    ],
    ids=str,
)
def test_wrong_content_is_refused_even_with_a_right_checksum(saved, change, message):
    assert message in refused(saved, with_right_checksum(json.loads(saved.read_text()) | change))


def test_a_file_of_the_right_form_with_other_tokens_is_refused(saved):
    document = json.loads(saved.read_text())
    document["tokens"][-1], document["tokens"][-2] = document["tokens"][-2:]
    assert "under sha256" in refused(saved, json.dumps(document).encode())


def test_what_is_no_tokenizer_file_is_refused(tmp_path):
    (tmp_path / "folder" / "tokenizer.json").mkdir(parents=True)
    (tmp_path / "tokenizer.json").write_bytes(b" " * 9_000_000)
    for path, message in (
        (tmp_path / "nowhere", "no such file"),
        (tmp_path / "folder", "no such file"),
        (tmp_path, "9000000 bytes"),
    ):
        with pytest.raises(KestrelError, match=message):
            load_tokenizer(path)


# ---- published vocabularies ---------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[tuple[str, dict[str, bytes]]]:
    """A web server on this machine: its address, and the files it has (change them as you like)."""
    files: dict[str, bytes] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = files.get(self.path)
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body or b"")

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}", files
        httpd.shutdown()


def test_ranks_are_fetched_once_and_checked(server, empty_cache, monkeypatch):
    for proxy in PROXIES:
        monkeypatch.delenv(proxy, raising=False)
    address, files = server
    content = "#version: 0.2\nĠ t\nĠt he\n".encode()
    file = RankFile("gpt2", f"{address}/vocab.bpe", hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(PUBLISHED, "gpt2", file)
    cached = empty_cache / file.cache_name
    files["/vocab.bpe"] = b"<html>please log in</html>"
    assert "sha256" in offline_error("gpt2")
    assert not cached.exists()
    del files["/vocab.bpe"]
    assert "404" in offline_error("gpt2")
    files["/vocab.bpe"] = content
    for state in (None, b"damaged", content):
        if state is not None:
            cached.write_bytes(state)
        assert published_tokens("gpt2")[255:] == [b"\xad", b" t", b" the"]
        assert cached.read_bytes() == content
    files.clear()
    assert len(published_tokens("gpt2")) == 258


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_vocabularies_equal_those_of_tiktoken(tokenizer, kind, documents):
    theirs = tiktoken.get_encoding(PUBLISHED[kind].encoding)
    assert tokenizer.vocab_size == FIXED_VOCAB[kind]
    for text in [*TRICKY, *documents]:
        assert tokenizer.encode(text) == theirs.encode_ordinary(text)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "ranks"))
    return tmp_path / "ranks"


def offline_error(name: str) -> str:
    began = time.perf_counter()
    with pytest.raises(KestrelError) as caught:
        train_tokenizer(TokenizerConfig(name))
    assert time.perf_counter() - began < 5
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "network"),
    [("gpt2", "refused"), ("cl100k", "no such host"), ("gpt2", "silent"), ("cl100k", "name server hangs")],
)
def test_offline_error_comes_soon_and_says_what_to_do(name, network, empty_cache, monkeypatch):
    def look_up(*args, **options):
        if network == "no such host":
            raise socket.gaierror(-2, "Name or service not known")
        if network == "name server hangs":
            time.sleep(20)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 9))]

    def connect(connection, address):
        if network == "refused":
            raise ConnectionRefusedError(111, "Connection refused")
        time.sleep(20)

    for proxy in PROXIES:
        monkeypatch.delenv(proxy, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket.socket, "connect", connect)
    message = offline_error(name)
    file = PUBLISHED[name]
    for needed in (
        str(empty_cache),
        file.cache_name,
        "TIKTOKEN_CACHE_DIR",
        f"tiktoken.get_encoding('{file.encoding}')",
    ):
        assert needed in message
    assert "\n" not in message


def test_a_damaged_cache_offline_is_told_and_kept(empty_cache, monkeypatch):
    monkeypatch.setattr("data.published.is_reachable", lambda url: False)
    cached = empty_cache / PUBLISHED["cl100k"].cache_name
    cached.parent.mkdir()
    cached.write_bytes(b"IQ== 0\n")
    assert "which is damaged" in offline_error("cl100k")
    assert cached.read_bytes() == b"IQ== 0\n"


def test_file_names_are_those_tiktoken_looks_for():
    assert PUBLISHED["gpt2"].cache_name == "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"
    assert PUBLISHED["cl100k"].cache_name == "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"
