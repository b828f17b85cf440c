"""A model that says what it is told to, and remembers what it was asked."""

import torch
from torch import Tensor, nn

from data.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from inference.engine import Engine
from inference.kv_cache import KVCache

BYTES: Tokenizer = train_tokenizer(TokenizerConfig(name="byte"))
BOS = BYTES.bos_id
END = BYTES.encode_special("<|assistant_end|>")


class Scripted(nn.Module):
    """Row b's likeliest token at step t is script[b][t]; with no script all tokens are equally likely."""

    context_len = 100
    dtype = torch.float32
    vocab_size = BYTES.vocab_size
    cache_shape = (1, 1, 2)

    def __init__(self, *script: list[int] | bytes) -> None:
        super().__init__()
        self.script = [list(row) for row in script]
        self.fed: list[list[list[int]]] = []  # the tokens of every call
        self.anything = nn.Parameter(torch.zeros(1))

    @property
    def calls(self) -> int:
        return len(self.fed)

    def decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        cache.reserve(tokens.shape[1])
        cache.advance(tokens.shape[1])
        step = self.calls
        self.fed.append(tokens.tolist())
        logits = torch.zeros(len(tokens), self.vocab_size)
        for b, row in enumerate(self.script[: len(tokens)]):
            logits[b, row[step]] = 1.0
        return logits


def scripted(*script: list[int] | bytes) -> Engine:
    return Engine(Scripted(*script), BYTES)
