"""Small stand-ins for the tests of the data stream: sources made of lists, and a tokenizer of bytes."""

import numpy as np


class ListSource:
    """Documents given in the test."""

    def __init__(self, train, val=("the end",), name="toy", fingerprint="toy"):
        self.texts = {"train": train, "val": val}
        self.name, self.fingerprint = name, fingerprint
        self.passes = 0  # how often the documents were asked for

    def documents(self, split):
        self.passes += 1
        return iter(self.texts[split])


class Bytes:
    """UTF-8 as tokens; BOS is 256."""

    vocab_size = 257
    bos_id = 256
    hash = "bytes"

    def encode_batch(self, texts):
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]


class Numbers:
    """A text "3:7" is the tokens 3, 4, 5, 6: every token can tell where it comes from. BOS is the last id."""

    vocab_size = 70_001
    bos_id = 70_000
    hash = "numbers"

    def encode_batch(self, texts):
        return [np.arange(*map(int, text.split(":")), dtype=np.uint32) for text in texts]


def numbered(lengths):
    """Texts for Numbers: documents of the given lengths, no token twice."""
    ends = np.cumsum(lengths).tolist()
    return [f"{end - length}:{end}" for length, end in zip(lengths, ends)]
