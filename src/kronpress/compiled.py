"""`torch.compile` of a model's blocks: one graph for prefills of every length, and one for decoding.

A single structured layer gains nothing from a compiler. In a whole block the small steps between products of matrices
are fused with norms, activations and biases. The key-value cache itself stays outside of the graphs: it counts its
layers and whether it was used, and a graph would be made anew for each. A graph takes the keys and values of its own
layer, if there are any, and gives back the longer ones.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from kronpress.errors import RequestError
from kronpress.families import FAMILIES
from kronpress.layers import StructuredLinear
from kronpress.ways import LONG_PREFILL, fastest

CACHE_ARGUMENT = "past_key_values"


def compile_(model: nn.Module, **options: Any) -> None:
    """Compile every transformer block of `model`, in place; `generate`, saving and loading work as before.

    The graphs hold no choice by length. Where by prediction the factors are slower on long prefills than building
    their dense weight for the time of the call, and `set_dispatch` allows it, all graphs but that for one token do so.
    Call `set_dispatch` before. Where gradients are wanted, or with another cache than a `DynamicCache` of plain layers,
    a block runs as it was.

    Args:
        options: of `torch.compile`.

    Raises:
        RequestError: a model whose family's blocks are not known.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in FAMILIES:
        raise RequestError(f"model type {model_type!r} has no blocks known: {', '.join(sorted(FAMILIES))}")
    shared: dict[Any, Callable[..., Any]] = {}
    for index, block in enumerate(model.get_submodule(FAMILIES[model_type].blocks).children()):
        for layer in _structured(block).values():
            _settle_(layer)
        # Blocks of equal kind share their graphs; torch makes only a few of any one function.
        kind = (
            type(block),
            *((name, layer.sizes, layer.ways.for_compiled) for name, layer in _structured(block).items()),
        )
        if kind not in shared:
            shared[kind] = torch.compile(_own(_through_block), dynamic=True, fullgraph=True, **options)
        block.forward = _Forward(block, index, shared[kind])  # type: ignore[assignment]


def uncompile_(model: nn.Module) -> None:
    """Undo `compile_`; blocks that were not compiled are left as they are."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), _Forward):
            del module.forward


def _structured(block: nn.Module) -> dict[str, StructuredLinear]:
    return {name: module for name, module in block.named_modules() if isinstance(module, StructuredLinear)}


def _settle_(layer: StructuredLinear) -> None:
    """Choose the way of the graph for many tokens once and for all."""
    weight, ways = layer.factors["weight"], layer.ways
    seconds = ways.predictions(layer.sizes, LONG_PREFILL, weight.device.type, weight.element_size())
    ways.for_compiled = fastest(seconds, ways.allowed - {"cached dense"})


def _own(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with code of its own, for which torch counts graphs apart."""
    return types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)  # type: ignore[attr-defined]


class _OneLayer:
    """What a block sees of the cache in a graph: its own keys and values (batch, heads, tokens, width)."""

    def __init__(self, keys: Tensor | None, values: Tensor | None) -> None:
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat([self.keys, keys], dim=-2), torch.cat([self.values, values], dim=-2)
        # Of one layout, whatever the attention made them from: another would be another graph.
        self.keys, self.values = keys.contiguous(), values.contiguous()
        return self.keys, self.values


def _through_block(
    block: nn.Module,
    hidden: Tensor,
    keys: Tensor | None,
    values: Tensor | None,
    cache_position: int | None,
    has_cache: bool,
    arguments: tuple[Any, ...],
    named: dict[str, Any],
) -> tuple[Any, Tensor | None, Tensor | None]:
    """What the block gives, and the keys and values that its layer of the cache then has.

    `cache_position` is the place of the cache among the positional arguments; None if it has a name.
    """
    if not has_cache:
        return type(block).forward(block, hidden, *arguments, **named), None, None
    cache = _OneLayer(keys, values)
    if cache_position is None:
        result = type(block).forward(block, hidden, *arguments, **{**named, CACHE_ARGUMENT: cache})
    else:
        before, after = arguments[:cache_position], arguments[cache_position + 1 :]
        result = type(block).forward(block, hidden, *before, cache, *after, **named)
    return result, cache.keys, cache.values


class _Forward:
    """The forward of one block: takes its layer out of the cache, runs the graph, and puts it back."""

    def __init__(self, block: nn.Module, index: int, graph: Callable[..., Any]) -> None:
        self.block, self.index, self.graph = block, index, graph

    def __call__(self, hidden: Tensor, *arguments: Any, **named: Any) -> Any:
        # GPT-2 gives its cache as the second positional argument.
        by_position = [place for place, each in enumerate(arguments) if isinstance(each, Cache)]
        cache = arguments[by_position[0]] if by_position else named.get(CACHE_ARGUMENT)
        layer = None if cache is None else _plain_layer(cache, self.index)
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or (cache is not None and layer is None):
            return type(self.block).forward(self.block, hidden, *arguments, **named)
        rest = tuple(None if place in by_position else each for place, each in enumerate(arguments))
        rest_named = {**named, CACHE_ARGUMENT: None} if CACHE_ARGUMENT in named else named
        keys, values = (None, None) if layer is None or not layer.get_seq_length() else (layer.keys, layer.values)
        result, keys, values = self.graph(
            self.block,
            hidden,
            keys,
            values,
            by_position[0] if by_position else None,
            layer is not None,
            rest,
            rest_named,
        )
        if layer is not None:
            if not layer.is_initialized:
                layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        return result


def _plain_layer(cache: Any, index: int) -> DynamicLayer | None:
    """The layer of the cache that only grows; None if it is of another kind, or the cache does more."""
    if type(cache) is not DynamicCache or len(cache.layers) <= index or getattr(cache, "offloading", False):
        return None
    layer = cache.layers[index]
    return layer if type(layer) is DynamicLayer else None
