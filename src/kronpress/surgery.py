"""The module tree: find layers, read their dense weight as (out_features, in_features), swap them, keep ties."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kronpress.layers import StructuredEmbedding, StructuredLayer, StructuredLinear
from kronpress.matrices import StructuredMatrix

# Where a transformers model says which parameters are tied to which.
TIES = ("_tied_weights_keys", "all_tied_weights_keys")


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every dense linear layer (`nn.Linear`, and transformers' `Conv1D`) by its name, in the model's order.

    The output projection of `nn.MultiheadAttention` is none: the attention reads its weight without calling it.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not isinstance(module, NonDynamicallyQuantizableLinear)
    }


def embeddings(model: nn.Module) -> dict[str, nn.Embedding]:
    """Every dense embedding by its name, in the model's order.

    Subclasses are none: they do more than look rows up (scale them, or shift the indices).
    """
    return {name: module for name, module in model.named_modules() if type(module) is nn.Embedding}


def structured_layers(model: nn.Module) -> dict[str, StructuredLayer]:
    """Every structured layer by its name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, StructuredLayer)}


def is_embedding(layer: nn.Module) -> TypeGuard[nn.Embedding | StructuredEmbedding]:
    """Whether the layer looks rows up, in a dense or a structured table."""
    return isinstance(layer, nn.Embedding | StructuredEmbedding)


def weight_shape(layer: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a dense or structured layer; of an embedding, of its table as it is stored."""
    if isinstance(layer, StructuredLayer):
        return layer.out_features, layer.in_features
    rows, columns = layer.weight.shape  # type: ignore[misc, operator]
    return (columns, rows) if isinstance(layer, Conv1D) else (rows, columns)


def dense_weight(layer: nn.Module) -> Tensor:
    """W (out_features, in_features) of a dense or structured layer; `Conv1D` stores its transpose."""
    if isinstance(layer, StructuredLayer):
        return layer.to_dense().detach()
    weight = layer.weight.detach()  # type: ignore[operator, union-attr]
    return weight.mT if isinstance(layer, Conv1D) else weight  # type: ignore[return-value]


def stacked_weight(layers: Sequence[nn.Module]) -> Tensor:
    """The weights of layers with as many inputs, one above the other; that of a single one is not copied."""
    weights = [dense_weight(layer) for layer in layers]
    return weights[0] if len(weights) == 1 else torch.cat(weights)


def replaceable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer that a structured one can stand in for, or does already, by its name in the model's order."""
    found = {**linear_layers(model), **embeddings(model), **structured_layers(model)}
    return {name: found[name] for name, _ in model.named_modules() if name in found}


def owners(model: nn.Module, layer: nn.Module) -> list[str]:
    """The names of all places that hold the layer's weight: its own, and others if it is shared or tied."""
    return [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if any(parameter is layer.weight for parameter in module.parameters(recurse=False))
    ]


def tied_heads(model: nn.Module, name: str) -> list[str]:
    """The names of the linear layers that multiply by the table of the embedding called `name`."""
    return [other for other in owners(model, model.get_submodule(name)) if other != name]


def replace_module_(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place called `name`, in the training mode of what stood there."""
    parent, _, child = name.rpartition(".")
    module.train(model.get_submodule(name).training)
    setattr(model.get_submodule(parent), child, module)


def replace_by_matrix_(
    model: nn.Module, name: str, matrix: StructuredMatrix, heads: Sequence[str] = (), shared_with: str | None = None
) -> None:
    """Put a layer that holds `matrix` in the place called `name`, of a dense layer, an embedding or a structured layer.

    The linear layers called `heads` are replaced by layers that hold the same parameters, with their own biases; in a
    transformers model they are tied in its checkpoints too. Any other layer that was tied to an embedding keeps its
    weight, as a parameter of its own. The `shared_factors` of the structured layer called `shared_with` take the place
    of the matrix's own, and are tied in the same way.
    """
    _end_sharing_(model, name)
    layer = model.get_submodule(name)
    is_trained: bool = layer.weight.requires_grad  # type: ignore[assignment, union-attr]
    shared = {} if shared_with is None else {part: f"{shared_with}.{part}" for part in type(matrix).shared_factors}
    for part, source in shared.items():
        setattr(matrix, part, model.get_parameter(source))
    replaced: StructuredLayer
    if is_embedding(layer):
        untie_(model, name, kept=heads)
        replaced = StructuredEmbedding(matrix, layer.padding_idx)
    else:
        replaced = _structured_linear(layer, matrix)
    for factor in matrix.parameters():  # they train as the weight did
        factor.requires_grad_(is_trained)
    replace_module_(model, name, replaced)
    for head in heads:
        same = _structured_linear(model.get_submodule(head), matrix)
        for part, order in list(same.named_buffers()):  # transformers ties parameters alone
            same.register_buffer(part, order.clone())
        replace_module_(model, head, same)
    if heads and isinstance(model, PreTrainedModel):
        _set_ties_(
            model,
            name,
            {f"{head}.{part}": f"{name}.{part}" for head in heads for part in dict(matrix.named_parameters())},
        )
    if shared and isinstance(model, PreTrainedModel):
        for attribute in TIES:
            ties = {f"{name}.{part}": source for part, source in shared.items()}
            setattr(model, attribute, {**(getattr(model, attribute) or {}), **ties})


def _structured_linear(layer: nn.Module, matrix: StructuredMatrix) -> StructuredLinear:
    """The layer that holds `matrix` and the bias of `layer`, and can be turned back into its dense class."""
    structured = StructuredLinear(matrix, layer.bias)  # type: ignore[arg-type]
    structured.dense_class = layer.dense_class if isinstance(layer, StructuredLinear) else type(layer)
    return structured


def untie_(model: nn.Module, embedding: str, kept: Sequence[str] = ()) -> None:
    """Give each linear layer tied to the embedding, but those `kept`, a weight of its own, equal to the table."""
    heads = [head for head in tied_heads(model, embedding) if head not in kept]
    for head in heads:
        layer = model.get_submodule(head)
        if isinstance(layer, StructuredLinear):
            layer = dense_layer(layer)
            replace_module_(model, head, layer)
        else:
            is_trained: bool = layer.weight.requires_grad  # type: ignore[assignment, union-attr]
            layer.weight = nn.Parameter(dense_weight(layer).clone(), requires_grad=is_trained)
    if heads and isinstance(model, PreTrainedModel):
        _set_ties_(model, embedding, {})
        model.config.tie_word_embeddings = False


def _set_ties_(model: PreTrainedModel, embedding: str, ties: dict[str, str]) -> None:
    """Make `ties`, from a parameter to the one that it is tied to, all that transformers knows of this embedding."""
    for attribute in TIES:
        known = getattr(model, attribute) or {}
        others = {key: source for key, source in known.items() if source.rpartition(".")[0] != embedding}
        setattr(model, attribute, {**others, **ties})


def _end_sharing_(model: nn.Module, name: str) -> None:
    """Tie the layers that share factors with the one called `name` to one another, since that will have none."""
    layer = model.get_submodule(name)
    if not (isinstance(layer, StructuredLinear) and layer.structure.shared_factors):
        return
    for attribute in TIES if isinstance(model, PreTrainedModel) else ():
        ties = dict(getattr(model, attribute) or {})
        for key in (f"{name}.{part}" for part in layer.structure.shared_factors):
            ties.pop(key, None)
            followers = [other for other, source in ties.items() if source == key]
            first, *others = sorted(followers, key=lambda other: other.rpartition(".")[0]) or [""]
            ties.pop(first, None)
            ties |= dict.fromkeys(others, first)
        setattr(model, attribute, ties)


def dense_layer(structured: StructuredLayer) -> nn.Module:
    """The dense layer that computes the same, of the class that `structured` replaced."""
    weight = structured.to_dense().detach()
    with torch.device("meta"):
        if isinstance(structured, StructuredEmbedding):
            layer: nn.Module = nn.Embedding(weight.shape[0], weight.shape[1], structured.padding_idx)
        elif issubclass(structured.dense_class, Conv1D):  # type: ignore[arg-type]
            layer = Conv1D(structured.out_features, structured.in_features)
            weight = weight.mT.contiguous()
        else:
            layer = nn.Linear(structured.in_features, structured.out_features)
    layer.weight = nn.Parameter(weight)
    if isinstance(structured, StructuredLinear):
        layer.bias = structured.bias  # type: ignore[assignment]
    return layer


@contextmanager
def healing_parametrizations(model: nn.Module) -> Iterator[None]:
    """Inside the block, layers whose structure asks for it are trained through their `healing_parametrization`."""
    changed = []
    try:
        layers = structured_layers(model).values()
        holders = Counter(id(layer.weight) for layer in layers)
        for layer in layers:
            if holders[id(layer.weight)] > 1:  # a parametrization would end the tie of an embedding and its head
                continue
            parametrization = layer.structure.healing_parametrization(layer.factors, layer.options)
            if parametrization is not None:
                parametrize.register_parametrization(layer, "weight", parametrization)
                changed.append(layer)
        yield
    finally:
        for layer in changed:
            parametrize.remove_parametrizations(layer, "weight")


def to_dense_(model: nn.Module, names: Collection[str] | None = None) -> None:
    """Turn all structured layers, or those called `names`, back into dense ones in place; a tied head is tied again."""
    layers = structured_layers(model)
    chosen = {id(layer.weight) for name, layer in layers.items() if names is None or name in names}
    tables: dict[int, tuple[str, nn.Parameter]] = {}  # by the factor that the places share
    for name, structured in layers.items():
        key = id(structured.weight)
        if key not in chosen:
            continue
        dense = dense_layer(structured)
        _end_sharing_(model, name)
        replace_module_(model, name, dense)
        if key in tables:
            source, dense.weight = tables[key]  # type: ignore[assignment]
            if isinstance(model, PreTrainedModel):
                _set_ties_(model, source, {f"{name}.weight": f"{source}.weight"})
        else:
            tables[key] = name, dense.weight  # type: ignore[assignment]
