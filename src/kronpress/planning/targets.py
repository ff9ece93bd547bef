"""Which layers a recipe targets, and what a model holds: shapes, parameters and FLOPs."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from kronpress.errors import RequestError
from kronpress.families import same_input_groups, target_patterns
from kronpress.layers import StructuredLayer, StructuredLinear
from kronpress.matrices import STRUCTURES
from kronpress.plan import count_flops
from kronpress.recipe import Recipe
from kronpress.surgery import is_embedding, linear_layers, owners, replaceable_layers, structured_layers, weight_shape


def find_targets(model: nn.Module, recipe: Recipe) -> dict[str, tuple[int, int]]:
    """Shapes (out_features, in_features) of the targeted layers, in the model's order; an embedding's is its table's.

    Raises:
        RequestError: a target matches no layer, or one that is tied to a layer that is not replaced with it.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    layers = replaceable_layers(model)
    found: set[str] = set()
    for pattern in target_patterns(recipe.targets, model_type):
        matches = [name for name in layers if re.fullmatch(pattern, name)]
        others = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
        special = [name for name in others if name not in layers and re.fullmatch(pattern, name)]
        if special:
            kind = type(model.get_submodule(special[0])).__name__
            raise RequestError(f"target {special[0]!r} is a {kind}, which does more than look up rows: it stays dense")
        if not matches:
            raise RequestError(
                f"target {pattern!r} matches none of the model's {len(layers)} linear layers and embeddings: "
                f"{', '.join(list(layers)[:6])}{', ...' if len(layers) > 6 else ''}"
            )
        found.update(matches)
    for name in found:
        others = [other for other in owners(model, layers[name]) if other != name]
        if others and not (is_embedding(layers[name]) and all(_is_head(model, other) for other in others)):
            raise RequestError(f"target {name!r} shares its weight with {others[0]!r}, which would be left dense")
    return {name: weight_shape(layer) for name, layer in layers.items() if name in found}


def planned_groups(model: nn.Module, targets: Iterable[str], structures: Collection[str]) -> dict[str, list[str]]:
    """The targets that are planned as one matrix, by the first; each is alone if no structure shares factors."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    is_shared = any(STRUCTURES[name].shared_factors for name in structures)
    groups = same_input_groups(targets, model_type) if is_shared else [[name] for name in targets]
    return {names[0]: names for names in groups}


def _is_head(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name), nn.Linear | StructuredLinear)


class Totals(NamedTuple):
    """Floating-point parameters of a model as it is, shared ones counted once, and its FLOPs for one token."""

    num_params: int
    flops_per_token: int

    @classmethod
    def of(cls, model: nn.Module) -> Totals:
        num_params = sum(p.numel() for p in model.parameters() if p.is_floating_point())
        return cls(num_params, sum(flops_by_layer(model).values()))


def flops_by_layer(model: nn.Module) -> dict[str, int]:
    """FLOPs of each linear layer for one token, dense or structured."""
    dense = {name: 2 * layer.weight.numel() for name, layer in linear_layers(model).items()}  # type: ignore[operator, union-attr]
    structured = {
        name: _count_flops_of(layer) for name, layer in structured_layers(model).items() if not is_embedding(layer)
    }
    return {**dense, **structured}


def _count_flops_of(layer: StructuredLayer) -> int:
    name = next(name for name, structure in STRUCTURES.items() if structure is layer.structure)
    return count_flops(name, layer.out_features, layer.in_features, layer.spec)


def meta_model(config: PreTrainedConfig, model_class: type[PreTrainedModel] | None = None) -> nn.Module:
    """The model of `config`, without weights: of `model_class`, or else the causal language model.

    Raises:
        RequestError: there is no causal language model of this type.
    """
    with torch.device("meta"):
        if model_class is not None:
            return model_class(copy.deepcopy(config))
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise RequestError(
                f"{type(config).__name__} is not the configuration of a causal language model: give the model itself"
            )
        return AutoModelForCausalLM.from_config(config)


def stored_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that the configuration names, or else that of the weights."""
    named = getattr(getattr(model, "config", None), "dtype", None)
    if isinstance(named, torch.dtype):
        return named
    return next(p.dtype for p in model.parameters() if p.is_floating_point())
