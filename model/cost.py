"""What a model costs, counted from its modules: parameters, FLOPs per token, cache bytes per token.

Works on the meta device, so a model too large for this machine can be counted too. FLOPs follow the convention of PaLM:
6 per parameter and token for the matrix products of forward and backward, plus attention as if each token saw its whole
window (causality is not subtracted). Looking up a row of a table costs nothing.
"""

from dataclasses import fields

import torch

from errors import KestrelError
from model.config import ModelConfig
from model.language_model import LanguageModel
from model.layers.attention import Attention
from model.layers.linear import Linear

COUNTED_ROLES = {
    "embedding": "wte",
    "value_embedding": "value_embeds",
    "unembedding": "lm_head",
    "matrix": "transformer_matrices",
}


def parameter_counts(model: LanguageModel) -> dict[str, int]:
    """How many parameters are tables, head, matrices of the blocks, and everything else (scalars); and the total."""
    counts = dict.fromkeys([*COUNTED_ROLES.values(), "scalars"], 0)
    for role, parameters in model.parameter_roles().items():
        counts[COUNTED_ROLES.get(role, "scalars")] += sum(p.numel() for p in parameters)
    return {**counts, "total": sum(counts.values())}


def scaling_parameters(model: LanguageModel) -> int:
    """The parameters that every token multiplies with, which the scaling laws count: blocks and head."""
    return parameter_counts(model)["transformer_matrices"] + model.head_weight.numel()


def flops_per_token(model: LanguageModel) -> int:
    """Training FLOPs (forward and backward) per token of a full row."""
    rows = model.context_len
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    seen = [rows if layer.window is None else min(layer.window, rows) for layer in layers]
    attention = sum(12 * layer.n_head * layer.head_dim * n for layer, n in zip(layers, seen))
    return 6 * scaling_parameters(model) + attention


def kv_bytes_per_token(model: LanguageModel, dtype: torch.dtype | None = None) -> int:
    """Bytes a token occupies in the key-value cache: of codes, in 8 bits, with the scale of each head."""
    n_layer, n_kv_head, head_dim = model.cache_shape
    itemsize = (dtype or model.dtype).itemsize
    return 2 * n_layer * n_kv_head * (head_dim * itemsize + (4 if itemsize == 1 else 0))


def bytes_of_products(model: LanguageModel) -> int:
    """Bytes of the weights that every token is multiplied with: what a step of decoding reads of the model."""
    layers = {id(layer): layer for layer in model.modules() if isinstance(layer, Linear)}
    layers[id(model.head_layer)] = model.head_layer
    held = [[layer.weight] if layer.codes is None else [layer.codes, layer.scales] for layer in layers.values()]
    return sum(x.numel() * x.element_size() for tensors in held for x in tensors)


def require_memory(config: ModelConfig, rows: int, memory_bytes: int | None) -> None:
    """Refuse a model that cannot be trained in this memory, whatever else is done, before anything is allocated.

    rows           of a micro-batch, as configured; -1: one at least
    memory_bytes   of the device; None: unknown, and then nothing is refused

    Both figures are well below the truth: weight and gradient of two matrices of attention and two of the MLP in every
    layer, and 16 bytes per token, layer and unit of width.
    """
    if memory_bytes is None:
        return
    layers, width, tokens = config.n_layer, config.n_embd, config.sequence_len * max(1, rows)
    squares = 2 + 2 * getattr(config, "mlp_dim", 4 * width) / width
    weights, activations = int(8 * layers * squares * width**2), 16 * layers * width * tokens
    sizes = ("depth", "aspect_ratio", "head_dim", "n_layer", "n_embd", "hidden_dim")
    named = [f"model.{f.name}={getattr(config, f.name)}" for f in fields(config) if f.name in sizes]
    remedy = f"and this device has {memory_bytes / 1e9:.0f} GB"
    if weights > memory_bytes:
        raise KestrelError(
            f"{layers} layers of width {width} take {weights / 1e9:,.0f} GB for weights and gradients alone, {remedy}: "
            f"make the model smaller ({', '.join(named)})"
        )
    if activations > memory_bytes:
        batch = f", hardware.device_batch_size={rows}" if rows > 1 else ""
        raise KestrelError(
            f"{tokens} tokens through {layers} layers of width {width} take more than {activations / 1e9:,.0f} GB, "
            f"{remedy}: lower model.sequence_len={config.sequence_len}{batch}"
        )
