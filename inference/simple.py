"""Generation in a few lines: the samples of a training run, and the specification the engine is tested against.

`sample_text` reads one prompt after the other into a cache in one piece; a training run wants few samples, and nothing
between its steps but what it asked for. `generate_naive` has no cache at all.
"""

import torch

from data.tokenizer import Tokenizer
from inference.engine import STOPS, Engine, fit
from inference.kv_cache import KVCache
from inference.sampling import SamplingConfig, recent_tokens, sample
from model.language_model import LanguageModel


def sample_text(
    model: LanguageModel, tokenizer: Tokenizer, prompts: list[str], *, max_new_tokens: int = 64, **sampling: float | int
) -> list[str]:
    """How each prompt goes on, for the samples of a training run: greedy unless `sampling` says otherwise.

    A training run must not fail over a sample, so the continuation is as long as the context allows.

    sampling   further fields of SamplingConfig; with num_samples=n every prompt gives n texts
    → the new text only, without the prompt
    """
    settings = SamplingConfig(**{"temperature": 0.0, **sampling})
    texts = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt, prepend=tokenizer.bos_id)[: max(1, model.context_len - 1)]
        n_new = min(max_new_tokens, model.context_len - len(ids))
        texts += [tokenizer.decode(tokens) for tokens in continue_prompt(model, tokenizer, ids, n_new, settings)]
    return texts


def continue_prompt(
    model: LanguageModel, tokenizer: Tokenizer, ids: list[int], n_new: int, sampling: SamplingConfig
) -> list[list[int]]:
    """The new tokens of each sample. A sample that has ended is computed on until all have."""
    device, n = next(model.parameters()).device, sampling.num_samples
    stop_ids = {tokenizer.encode_special(name) for name in STOPS}
    cache = KVCache(model, 1, max_len=len(ids) + n_new)
    logits = model.decode(torch.tensor([ids], device=device), cache).expand(n, -1)
    cache = cache.expand(n)
    history = torch.tensor([recent_tokens(ids, stop_ids)] * n, device=device)
    told, running = [[] for _ in range(n)], [True] * n
    for step in range(n_new):
        drawn = sample(logits, sampling, step=step, history=history)
        column = drawn.tolist()
        running = [run and token not in stop_ids for run, token in zip(running, column)]
        if not any(running):
            break
        for tokens, token, run in zip(told, column, running):
            tokens += [token] if run else []
        if step + 1 < n_new:
            history = torch.cat([history[:, 1:], drawn[:, None]], dim=1)
            logits = model.decode(drawn[:, None], cache)
    return told


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
        history = torch.tensor([recent_tokens(ids, engine.stop_ids)], device=engine.device)
        token = sample(logits, sampling, rows=torch.tensor([row], device=engine.device), step=step, history=history)
        if token.item() in engine.stop_ids:
            break
        ids.append(token.item())
    return ids[len(prompt_ids) :]
