"""Learning the pieces of a vocabulary from text: byte pairs that occur together, or whole characters.

The training itself is done by Hugging Face `tokenizers`, which is fast, parallel and well kept; what leaves this file
is only a list of byte strings in the order they were learned. That order is the whole tokenizer: `data/tokenizer.py`
encodes by joining, again and again, the neighbours whose union stands earliest in the list, and gets what the trainer
would.

The result depends on the text alone, not on the order of documents nor on the number of threads: ties between equally
frequent pairs go to the smaller token ids.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator

# GPT-4's split of text into words, but with numbers cut every two digits instead of three: small vocabularies cannot
# spend a thousand ids on three-digit numbers. Merges never cross these borders.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
BYTES = [bytes([value]) for value in range(256)]
# A token seen only once in the whole text teaches a model nothing.
MIN_COUNT = 2
# The trainer's time is quadratic in the length of a "word", and text without spaces (DNA, base64) is one long word.
MAX_WORD_CHARS = 256
# Its regex engine gives up on runs of millions of spaces, so it is fed long documents in slices.
SLICE_CHARS = 100_000


def learn_byte_pairs(texts: Iterable[str], n_tokens: int) -> list[bytes]:
    """The 256 bytes, then up to n_tokens - 256 merges in the order they were learned; fewer if the text has no more."""
    # set before the trainer's threads start, or it warns about every process that is forked later
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers  # slow to import, and only needed here

    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(MAX_WORD_CHARS), as_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=n_tokens,
        min_frequency=MIN_COUNT,
        initial_alphabet=list(byte_letters()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(slices(texts), trainer)
    vocabulary = tokenizer.get_vocab()
    learned = [letters_to_bytes(word) for word in sorted(vocabulary, key=vocabulary.__getitem__)]
    return BYTES + [token for token in learned if len(token) > 1]


def learn_characters(texts: Iterable[str], n_tokens: int) -> list[bytes]:
    """The characters of the text in code point order, then those single bytes that are not among them.

    Every byte is there, so every text can be written; a character outside the list takes as many tokens as it has
    bytes. If there are more characters than n_tokens allows, the rarest beyond ASCII are left to their bytes.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    ascii_only = {char for char in counts if char.isascii()}
    by_count = sorted(counts.keys() - ascii_only, key=lambda char: (-counts[char], char))
    kept = [char.encode() for char in sorted(ascii_only | set(by_count[: n_tokens - 256]))]
    return kept + [byte for byte in BYTES if byte not in set(kept)]


def slices(texts: Iterable[str]) -> Iterator[str]:
    """The same texts, the long ones in several parts."""
    for text in texts:
        for start in range(0, len(text), SLICE_CHARS):
            yield text[start : start + SLICE_CHARS]


def byte_letters() -> dict[str, int]:
    """GPT-2's alphabet, in which BPE files are written: one visible letter for each byte.

    Printable bytes stand for themselves, the others for the characters from U+0100 on, in order.
    """
    visible = [value for value in range(256) if chr(value).isprintable() and chr(value) != " "]
    hidden = [value for value in range(256) if value not in visible]
    return {chr(value): value for value in visible} | {chr(256 + i): value for i, value in enumerate(hidden)}


BYTE_OF_LETTER = byte_letters()


def letters_to_bytes(word: str) -> bytes:
    """A token as BPE files write it ("Ġthe") to the bytes it stands for (b" the")."""
    return bytes(BYTE_OF_LETTER[letter] for letter in word)
