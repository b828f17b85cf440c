"""From a configuration to a model: the type of the configuration names the family."""

import torch

from errors import KestrelError
from model.config import ModelConfig
from model.language_model import LanguageModel
from model.llama import Llama, LlamaConfig
from model.nanochat import Nanochat, NanochatConfig
from model.ops import Ops

FAMILIES: dict[type[ModelConfig], type[LanguageModel]] = {NanochatConfig: Nanochat, LlamaConfig: Llama}


def build(config: ModelConfig, vocab_size: int, ops: Ops, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A model without values, on the meta device; parameters are fp32, activations `dtype`.

    Follow with `model.to_empty(device=...)` and `model.init_weights(seed)`.
    """
    if vocab_size < 1:
        raise KestrelError(f"the vocabulary must have at least one token, got {vocab_size}")
    with torch.device("meta"):
        return FAMILIES[type(config)](config, vocab_size, ops, dtype)
