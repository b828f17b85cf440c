"""Models whose matrices are codes: which of them, how they come to be, and what a checkpoint of such a model holds.

Every `Linear` is quantised, the head among them unless it is the embedding table as well. Tables, gates and gains stay
as they are: they take little memory, or are read a row at a time. Such a model reads; it cannot be trained.

A checkpoint holds NAME.codes and NAME.scales in the place of NAME.weight; "quant" in its config says what they are.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from errors import KestrelError
from kernels_torch.quantised_cache import FORMS as CACHE_FORMS
from kernels_torch.quantised_weight import FORMS, GROUP, GROUPS, quantise, shapes_of
from model.language_model import LanguageModel
from model.layers.linear import Linear

Spec = dict[str, tuple[tuple[int, ...], torch.dtype]]


class Quantisation(NamedTuple):
    """form: one of FORMS; group: of int4, how many columns share a scale."""

    form: str
    group: int = GROUP

    def __str__(self) -> str:
        return f"{self.form} in groups of {self.group}" if self.form == "int4" else self.form


def cache_codes(form: str | None) -> torch.dtype | None:
    """The dtype of keys and values in the form that quant_cache= names; None: the model's own."""
    if form is not None and form not in CACHE_FORMS:
        raise KestrelError(f"quant_cache must be one of {', '.join(CACHE_FORMS)}, got '{form}'")
    return CACHE_FORMS.get(form)


def quantisation_named(form: str | None, group: int = GROUP) -> Quantisation | None:
    """What the keys quant= and group= ask for; KestrelError for what does not exist."""
    if form is None:
        return None
    if form not in FORMS:
        raise KestrelError(f"quant must be one of {', '.join(FORMS)}, got '{form}'")
    if group not in GROUPS:
        raise KestrelError(f"quant_group must be {' or '.join(map(str, GROUPS))}, got {group}")
    return Quantisation(form, group)


def quantisation_of(config: dict[str, Any]) -> Quantisation | None:
    """What a checkpoint's config says its matrices are; None: as they were trained."""
    said = config.get("quant")
    if said is None:
        return None
    form, group = (said.get("form"), said.get("group")) if isinstance(said, dict) else (said, None)
    if form not in FORMS or type(group) is not int or group not in GROUPS:
        raise KestrelError(f"the checkpoint's config is damaged, or newer than this version: quant is {said!r:.80}")
    return Quantisation(form, group)


def quantised_layers(model: LanguageModel) -> dict[str, Linear]:
    """The layers that are, or would be, codes."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}


@torch.no_grad()
def quantise_model(model: LanguageModel, quant: Quantisation) -> LanguageModel:
    """Replace every matrix by codes."""
    for name, layer in quantised_layers(model).items():
        try:
            layer.take_codes(*quantise(layer.weight, *quant))
        except ValueError as error:
            raise KestrelError(f"{name} cannot be quantised: {error}") from error
    return model


def tensors_of(model: LanguageModel) -> dict[str, Tensor]:
    """What a checkpoint of a quantised model holds."""
    tensors = {name: value for name, value in model.named_parameters() if not value.is_meta}
    for name, layer in quantised_layers(model).items():
        tensors |= {f"{name}.codes": layer.codes, f"{name}.scales": layer.scales}
    return tensors


def spec_of_quantised(model: LanguageModel, quant: Quantisation) -> Spec:
    """The name, shape and dtype of all that belongs into such a checkpoint."""
    layers = quantised_layers(model)
    codes = {f"{name}.weight" for name in layers}
    spec = {name: (tuple(x.shape), x.dtype) for name, x in model.named_parameters() if name not in codes}
    for name, layer in layers.items():
        spec[f"{name}.codes"], spec[f"{name}.scales"] = shapes_of(*layer.weight.shape, *quant)
    return spec


@torch.no_grad()
def load_quantised(model: LanguageModel, tensors: dict[str, Tensor], device: torch.device) -> LanguageModel:
    """Give a model on the meta device what `load_tensors` read: nothing is allocated for the matrices."""
    layers = quantised_layers(model)
    for name, layer in layers.items():
        layer.take_codes(tensors[f"{name}.codes"], tensors[f"{name}.scales"])
    own = {f"{name}.{part}" for name in layers for part in ("codes", "scales")}
    model.load_state_dict({name: x for name, x in tensors.items() if name not in own}, strict=False, assign=True)
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, torch.empty_like(buffer, device=device))
    return model
