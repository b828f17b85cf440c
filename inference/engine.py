"""Generation: read the prompt once, then one token for every sample per step, against the key-value cache.

The engine speaks token ids; `TextStream` turns them into text as they come, `Stopwatch` says how fast that went, and
`sample_text` does all of it for the samples of a training run. `generate_naive` computes the same tokens the long way
and is what the tests hold the engine to.

Left out on purpose: finished samples stay in the batch until all are done (taking them out would move the cache of the
others), and the sampled ids are read back at every step, because somebody is waiting to read them.
"""

import codecs
import time
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from data.tokenizer import Tokenizer
from errors import KestrelError
from inference.kv_cache import KVCache
from inference.sampling import PENALTY_WINDOW, SamplingConfig, sample
from model.language_model import LanguageModel
from model.layers.linear import Master

DEFAULT_NEW_TOKENS = 512
STOPS = ("<|bos|>", "<|assistant_end|>")  # a new document begins; the answer of a chat is over

Column = list[int | None]  # one token per sample; None: this sample has ended


class Engine:
    """A model and its tokenizer, ready to continue prompts."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer) -> None:
        if model.vocab_size != tokenizer.vocab_size:
            raise KestrelError(
                f"the model knows {model.vocab_size} tokens and the tokenizer {tokenizer.vocab_size}: "
                "they are not from the same run"
            )
        self.model, self.tokenizer = model, tokenizer
        self.device = next(model.parameters()).device
        self.stop_ids = {tokenizer.encode_special(name) for name in STOPS}

    def encode(self, text: str) -> list[int]:
        """A text as the beginning of a document."""
        return self.tokenizer.encode(text, prepend=self.tokenizer.bos_id)

    def generate(self, prompt_ids: list[int], sampling: SamplingConfig) -> Iterator[Column]:
        """Continue a prompt `sampling.num_samples` times; a prompt that does not fit is refused here and now.

        prompt_ids   taken as they are; empty: only <|bos|>
        → columns of one id per sample, as they are computed. A sample that drew a stop token shows None from there on.
        """
        prompt_ids = list(prompt_ids) or [self.tokenizer.bos_id]
        n_new = fit(self.model, prompt_ids, sampling)
        return self.columns(prompt_ids, n_new, sampling)

    def columns(self, prompt_ids: list[int], n_new: int, sampling: SamplingConfig) -> Iterator[Column]:
        """What `generate` returns, for a prompt that is known to fit."""
        B = sampling.num_samples
        logits, cache = self.prefill(prompt_ids, n_new, B)
        rows = torch.arange(B, device=self.device)
        history = recent_tokens(prompt_ids, self.stop_ids, self.device).expand(B, -1)
        running = [True] * B
        for step in range(n_new):
            ids = sample(logits, sampling, rows=rows, step=step, history=history)  # (B,)
            column = ids.tolist()
            running = [run and token not in self.stop_ids for run, token in zip(running, column)]
            if not any(running):
                return
            yield [token if run else None for run, token in zip(running, column)]
            if step + 1 < n_new:
                history = torch.cat([history[:, 1:], ids[:, None]], dim=1)
                logits = self.model.decode(ids[:, None], cache)

    def prefill(self, prompt_ids: list[int], n_new: int, num_samples: int) -> tuple[Tensor, KVCache]:
        """Read the prompt once, for all samples: the logits after it [num_samples, V], and room for what follows."""
        cache = KVCache(self.model, 1, max_len=len(prompt_ids) + n_new)
        logits = self.model.decode(torch.tensor([prompt_ids], device=self.device), cache)
        if num_samples > 1:
            cache = cache.expand(num_samples)
        return logits.expand(num_samples, -1), cache


@torch.no_grad()
def generate_naive(engine: Engine, prompt_ids: list[int], sampling: SamplingConfig) -> list[list[int]]:
    """The specification of `Engine.generate`: every sample by itself, every token from a forward pass over all before.

    → the new tokens of each sample
    """
    prompt_ids = list(prompt_ids) or [engine.tokenizer.bos_id]
    n_new = fit(engine.model, prompt_ids, sampling)
    return [_sample_naive(engine, prompt_ids, n_new, sampling, row) for row in range(sampling.num_samples)]


def _sample_naive(engine: Engine, prompt_ids: list[int], n_new: int, sampling: SamplingConfig, row: int) -> list[int]:
    ids = list(prompt_ids)
    for step in range(n_new):
        logits = engine.model(torch.tensor([ids], device=engine.device))[:, -1]
        history = recent_tokens(ids, engine.stop_ids, engine.device)
        token = sample(logits, sampling, rows=torch.tensor([row], device=engine.device), step=step, history=history)
        if token.item() in engine.stop_ids:
            break
        ids.append(token.item())
    return ids[len(prompt_ids) :]


def fit(model: LanguageModel, prompt_ids: list[int], sampling: SamplingConfig) -> int:
    """How many new tokens to generate; KestrelError if prompt and answer are longer than the model's context."""
    limit, used = model.context_len, len(prompt_ids)
    bad = [token for token in prompt_ids if not 0 <= token < model.vocab_size]
    if bad:
        raise KestrelError(f"the prompt holds token {bad[0]}, but this model's tokens are 0 to {model.vocab_size - 1}")
    if used >= limit:
        raise KestrelError(
            f"the prompt has {used} tokens, but this model sees at most {limit} at once, prompt and answer together: "
            f"shorten the prompt to {limit - 1} tokens or fewer"
        )
    if sampling.max_new_tokens is None:
        return min(DEFAULT_NEW_TOKENS, limit - used)
    if used + sampling.max_new_tokens > limit:
        raise KestrelError(
            f"the prompt has {used} tokens and max_new_tokens is {sampling.max_new_tokens}, but this model sees at "
            f"most {limit} at once: use max_new_tokens={limit - used} or fewer, or a shorter prompt"
        )
    return sampling.max_new_tokens


def recent_tokens(ids: list[int], stop_ids: set[int], device: torch.device) -> Tensor:
    """The newest tokens [1, PENALTY_WINDOW] for the repetition penalty, −1 where there are none.

    Stop tokens do not count: a text must not become less likely to end because its prompt began with <|bos|>.
    """
    ids = [-1 if token in stop_ids else token for token in ids[-PENALTY_WINDOW:]]
    return torch.tensor([[-1] * (PENALTY_WINDOW - len(ids)) + ids], device=device)


def cast_weights(model: LanguageModel) -> LanguageModel:
    """Keep matrices and tables in the model's dtype, as every use casts them anyway: same numbers, less to read.

    For a model that will not be trained: its fp32 masters are gone.
    """
    for module in model.modules():
        if isinstance(module, Master):
            module.weight.data = module.weight.data.to(model.dtype)
    return model.requires_grad_(False)


class TextStream:
    """Token ids in, text out, as early as possible and never half a character.

    A character may be spread over several tokens. It appears with the token that completes it; bytes that can no longer
    become a character appear as U+FFFD. All pieces together are exactly `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The characters that `token` completes."""
        return self.decoder.decode(self.tokenizer.decode_bytes([token]))

    def finish(self) -> str:
        """What is left of a character whose end never came."""
        return self.decoder.decode(b"", final=True)


class Stopwatch:
    """How fast columns came: time to the first one, and tokens of all samples per second after it."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.first: float | None = None
        self.last = self.started
        self.n_first = self.n_tokens = 0

    def watch(self, columns: Iterable[Column]) -> Iterator[Column]:
        """The same columns, timed as they pass."""
        for column in columns:
            self.last = time.perf_counter()
            self.n_tokens += sum(token is not None for token in column)
            if self.first is None:
                self.first, self.n_first = self.last, self.n_tokens
            yield column

    @property
    def first_token_s(self) -> float:
        """Seconds from the start to the first column: mostly reading the prompt."""
        return (self.first or self.last) - self.started

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second once the prompt has been read; 0 when there was one column or none."""
        seconds = self.last - (self.first or self.last)
        return (self.n_tokens - self.n_first) / seconds if seconds > 0 else 0.0


def sample_text(
    model: LanguageModel, tokenizer: Tokenizer, prompts: list[str], *, max_new_tokens: int = 64, **sampling: float | int
) -> list[str]:
    """How each prompt goes on, for the samples of a training run: greedy unless `sampling` says otherwise.

    A training run must not fail over a sample, so the continuation is as long as the context allows.

    sampling   further fields of SamplingConfig; with num_samples=n every prompt gives n texts
    → the new text only, without the prompt
    """
    engine = Engine(model, tokenizer)
    settings = SamplingConfig(**{"temperature": 0.0, **sampling})
    texts = []
    for prompt in prompts:
        ids = engine.encode(prompt)[: max(1, model.context_len - 1)]
        n_new = min(max_new_tokens, model.context_len - len(ids))
        samples = [[] for _ in range(settings.num_samples)]
        for column in engine.columns(ids, n_new, settings):
            for tokens, token in zip(samples, column):
                tokens += [] if token is None else [token]
        texts += [tokenizer.decode(tokens) for tokens in samples]
    return texts
