"""The module tree: find linear layers, read their dense weight as (out_features, in_features), swap them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from kronpress.layers import StructuredLinear
from kronpress.matrices import StructuredMatrix


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every dense linear layer (`nn.Linear`, and transformers' `Conv1D`) by its name, in the model's order.

    The output projection of `nn.MultiheadAttention` is none: the attention reads its weight without calling it.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not isinstance(module, NonDynamicallyQuantizableLinear)
    }


def structured_layers(model: nn.Module) -> dict[str, StructuredLinear]:
    """Every structured layer by its name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, StructuredLinear)}


def weight_shape(layer: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a dense linear layer."""
    rows, columns = layer.weight.shape  # type: ignore[misc, operator]
    return (columns, rows) if isinstance(layer, Conv1D) else (rows, columns)


def dense_weight(layer: nn.Module) -> Tensor:
    """W (out_features, in_features) of a dense linear layer; `Conv1D` stores its transpose."""
    weight = layer.weight.detach()  # type: ignore[operator, union-attr]
    return weight.mT if isinstance(layer, Conv1D) else weight  # type: ignore[return-value]


def is_shared(model: nn.Module, layer: nn.Module) -> bool:
    """Whether the layer stands in two places, or another module owns its weight (an embedding that of a tied head)."""
    owners = [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if any(parameter is layer.weight for parameter in module.parameters(recurse=False))
    ]
    return len(owners) > 1


def replace_module_(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place called `name`, in the training mode of what stood there."""
    parent, _, child = name.rpartition(".")
    module.train(model.get_submodule(name).training)
    setattr(model.get_submodule(parent), child, module)


def structured_layer(layer: nn.Module, matrix: StructuredMatrix) -> StructuredLinear:
    """The layer that holds `matrix` and the bias of the dense `layer`, and can be turned back into its class."""
    structured = StructuredLinear(matrix, layer.bias)  # type: ignore[arg-type]
    structured.dense_class = type(layer)
    # The factors train as the weight did.
    for factor in structured.factors.values():
        factor.requires_grad_(layer.weight.requires_grad)  # type: ignore[arg-type, union-attr]
    return structured


def dense_layer(structured: StructuredLinear) -> nn.Module:
    """The dense layer that computes the same, of the class that `structured` replaced."""
    weight, bias = structured.to_dense().detach(), structured.bias
    with torch.device("meta"):
        if issubclass(structured.dense_class, Conv1D):
            layer: nn.Module = Conv1D(structured.out_features, structured.in_features)
            weight = weight.mT.contiguous()
        else:
            layer = nn.Linear(structured.in_features, structured.out_features)
    layer.weight = nn.Parameter(weight)
    layer.bias = bias  # type: ignore[assignment]
    return layer


@contextmanager
def healing_parametrizations(model: nn.Module) -> Iterator[None]:
    """Inside the block, layers whose structure asks for it are trained through their `healing_parametrization`."""
    changed = []
    try:
        for layer in structured_layers(model).values():
            parametrization = layer.structure.healing_parametrization(layer.factors, layer.options)
            if parametrization is not None:
                parametrize.register_parametrization(layer, "weight", parametrization)
                changed.append(layer)
        yield
    finally:
        for layer in changed:
            parametrize.remove_parametrizations(layer, "weight")


def to_dense_(model: nn.Module) -> None:
    """Turn every structured layer back into a dense one, in place."""
    for name, structured in structured_layers(model).items():
        replace_module_(model, name, dense_layer(structured))
