"""A model that says what it is told to, and remembers what it was asked."""

import torch
from torch import Tensor, nn

from data.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from inference.engine import Engine
from inference.paged_cache import CacheRows
from tests.model.tiny import torch_ops

BYTES: Tokenizer = train_tokenizer(TokenizerConfig(name="byte"))
BOS = BYTES.bos_id
END = BYTES.encode_special("<|assistant_end|>")


class Scripted(nn.Module):
    """A row's t-th likeliest token is script[who][t]; with no script all tokens are equally likely.

    Who a row is and how far it is stand in the states of the cache: [who, t]. A prompt is read by nobody (script 0).
    """

    context_len = 100
    dtype = torch.float32
    vocab_size = BYTES.vocab_size
    cache_shape = (1, 1, 2)
    ops = torch_ops()

    def __init__(self, *script: list[int] | bytes) -> None:
        super().__init__()
        self.script = [list(row) for row in script]
        self.fed: list[list[list[int]]] = []  # the real tokens of every call, and of rows at work only
        self.anything = nn.Parameter(torch.zeros(1))

    @property
    def calls(self) -> int:
        return len(self.fed)

    def decode(self, tokens: Tensor, cache: CacheRows, *, new_tokens: Tensor | None = None) -> Tensor:
        cache.reserve(tokens.shape[1])
        counts = [tokens.shape[1]] * len(tokens) if new_tokens is None else new_tokens.tolist()
        self.fed.append([row[:n] for row, n in zip(tokens.tolist(), counts) if n])
        cache.advance(tokens.shape[1] if new_tokens is None else new_tokens)
        script = cache.recall("script", like=torch.zeros(len(tokens), 1, 2))
        logits = torch.zeros(len(tokens), self.vocab_size)
        for b, (who, t) in enumerate(script[:, 0].long().tolist()):
            if self.script and counts[b]:
                logits[b, (self.script[who % len(self.script)] + [0] * 999)[t]] = 1.0
        if tokens.shape[1] == 1:
            script[:, 0, 1] += torch.tensor(counts)
        return logits


class ScriptedEngine(Engine):
    """An engine that tells its rows who they are: sample i of the n-th request says script n + i."""

    n_requests = -1

    def begin_samples(self, prompt):
        if prompt.n_begun == 0:
            self.n_requests += 1
        first = prompt.n_begun
        done = super().begin_samples(prompt)
        for slot, row in enumerate(self.running):
            if row.request is prompt.request and row.sample >= first:
                self.cache_rows.state("script", torch.zeros(1, 1, 2))[slot, 0] = torch.tensor(
                    [self.n_requests + row.sample, 1.0]
                )
        return done


def scripted(*script: list[int] | bytes, **options) -> Engine:
    return ScriptedEngine(Scripted(*script), BYTES, **options)
