"""From a configuration to a model: the type of the configuration names the family."""

from dataclasses import asdict, fields

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


FAMILY_NAMES = {"nanochat": NanochatConfig, "llama": LlamaConfig}


def config_to_dict(config: ModelConfig) -> dict:
    """A model's configuration as plain data, with the name of its family, for checkpoints."""
    family = next(name for name, kind in FAMILY_NAMES.items() if kind is type(config))
    return {"family": family, **asdict(config)}


def config_from_dict(values: dict) -> ModelConfig:
    """The inverse of config_to_dict, for data out of a checkpoint: an unknown family, key or type is refused."""
    values = dict(values)
    family = values.pop("family", None)
    if family not in FAMILY_NAMES:
        raise KestrelError(
            f"the checkpoint's model family is {family!r:.80}; this Kestrel knows {', '.join(FAMILY_NAMES)}"
        )
    kind = FAMILY_NAMES[family]
    known = {f.name: f for f in fields(kind)}
    if unknown := sorted(set(values) - set(known)):
        raise KestrelError(f"the checkpoint's model has keys unknown here: {', '.join(map(str, unknown))[:200]}")
    for key, value in values.items():
        default = known[key].default
        fits = value is None or isinstance(value, int) if default is None else is_like(value, default)
        if not fits:
            raise KestrelError(f"the checkpoint's model.{key} should be a {type(default).__name__}, got {value!r:.80}")
    return kind(**values)


def is_like(value: object, default: object) -> bool:
    """Whether a JSON value may stand where `default` does: same type, or a whole number for a float."""
    return type(value) is type(default) or (type(default) is float and type(value) is int)
