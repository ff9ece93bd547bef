"""Putting an order of units into a model, `fold_`, and into what was measured of it, `permuted_moments`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kronpress.errors import RequestError
from kronpress.folding.free_dimensions import FreeDimension, Use, free_dimensions, in_columns, of_kinds
from kronpress.layers import StructuredEmbedding, StructuredLayer
from kronpress.matrices.moments import DerivedMoments, InputMoments
from kronpress.matrices.permuted_kronecker import PermutedKronecker
from kronpress.surgery import tied_heads


def fold_(model: nn.Module, dimension: FreeDimension, order: Tensor) -> None:
    """Renumber the units in place: what was unit order[u] becomes unit u, in every use. A tied weight is moved once.

    A `PermutedKronecker` that stores the order of that side passes the units on: the two orders are composed.

    Args:
        order: (size,), such as the `row_order` of a permuted fit of the module that writes the units.

    Raises:
        RequestError: `order` is no permutation, or moves a unit to another label; a use is neither a dense layer nor
            a structured one that stores the order of that side.
    """
    order = order.cpu()
    if not torch.equal(order.sort().values, torch.arange(len(dimension.labels))):
        raise RequestError(f"the order is no permutation of the dimension's {len(dimension.labels)} units")
    if not torch.equal(dimension.labels[order], dimension.labels):
        raise RequestError("the order moves units to places of another label, as from one head to another")
    axes = [(tensor, axis, use.channels) for use in dimension.uses for tensor, axis in _axes(model, use)]
    moved: set[int] = set()
    with torch.no_grad():
        for tensor, axis, channels in axes:
            if id(tensor) not in moved:
                moved.add(id(tensor))
                if axis is None:  # the numbers of the units themselves
                    source = _source(len(tensor), channels, order).to(tensor.device)
                    tensor.copy_(source.argsort()[tensor])
                else:
                    source = _source(tensor.shape[axis], channels, order).to(tensor.device)
                    tensor.copy_(tensor.index_select(axis, source))


def check_foldable(
    model: nn.Module, names: Iterable[str], planned: Collection[str], made_dense: Collection[str] = ()
) -> None:
    """Refuse what `search_orders` and `fold_` would refuse for the layers `planned`, by the model's modules alone.

    Args:
        made_dense: layers that will be dense by then, whatever they are now, and the heads tied to them.

    Raises:
        RequestError: as `search_orders`.
    """
    if not isinstance(model, PreTrainedModel):
        raise RequestError("folding: the free dimensions of this model are not known; it is no transformers model")
    embeddings = [name for name in made_dense if isinstance(model.get_submodule(name), StructuredEmbedding)]
    dense = {*made_dense, *(head for name in embeddings for head in tied_heads(model, name))}
    for dimension in of_kinds(free_dimensions(model), names).values():
        if any(use.module in planned for use in dimension.uses):
            for use in dimension.uses:
                if use.module not in dense:
                    check_use(model, use)


def check_use(model: nn.Module, use: Use) -> None:
    """RequestError unless `fold_` can renumber the units in this module."""
    list(_axes(model, use))


def _axes(model: nn.Module, use: Use) -> Iterator[tuple[Tensor, int | None]]:
    """The tensors of a use, each with the axis that the units are on, or None if it is made of their numbers."""
    module = model.get_submodule(use.module)
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if isinstance(module, StructuredLayer):
        name = "column_order" if in_columns(module, use) else "row_order"
        if module.structure is not PermutedKronecker or name not in module.factors:
            raise RequestError(
                f"{use.module} is a {type(module).__name__} that stores no {name}: permutations are folded into dense "
                "layers, and into permuted_kronecker ones that permute that side"
            )
        yield module.factors[name], None if name == "column_order" else 0
    else:
        yield weight, _axis(use, module, weight)  # type: ignore[misc]
    if use.side == "out" and isinstance(bias, nn.Parameter):
        yield bias, 0


def _axis(use: Use, module: nn.Module, weight: object) -> int:
    """The axis of a dense layer's weight that the units are on; RequestError if the layer is none."""
    if isinstance(module, Conv1D):
        return 1 if use.side == "out" else 0
    if isinstance(module, nn.Linear):
        return 0 if use.side == "out" else 1
    if isinstance(module, nn.Embedding):
        return 1
    if isinstance(weight, nn.Parameter) and weight.ndim == 1:  # a norm
        return 0
    raise RequestError(f"{use.module} is a {type(module).__name__}: permutations are folded into dense layers only")


def _source(size: int, channels: Tensor, order: Tensor) -> Tensor:
    """(size,): which channel of a module stands where after folding; `channels` (copies, units)."""
    source = torch.arange(size)
    source[channels] = channels[:, order]
    return source


def permuted_moments(
    moments: Mapping[str, InputMoments], dimension: FreeDimension, order: Tensor
) -> Mapping[str, InputMoments]:
    """The moments after `fold_` with this order; each layer's are permuted when they are asked for.

    Of layers that read the units: `second`, `held_out`, `mean` and `magnitude`. Of those that write them: `gradient`.
    Of an embedding, whose columns the units are: all of these.
    """
    return _PermutedMoments(moments, dimension, order.cpu())


@dataclass(frozen=True, eq=False)
class _PermutedMoments(DerivedMoments[InputMoments]):
    dimension: FreeDimension
    order: Tensor

    def __getitem__(self, layer: str) -> InputMoments:
        found = self.moments[layer]
        for use in self.dimension.uses:
            if use.module != layer:
                continue
            if use.side == "in" or found.counts is not None:
                source = _source(len(found.mean), use.channels, self.order).to(found.mean.device)
                found = replace(
                    found,
                    second=found.second[source][:, source],
                    mean=found.mean[source],
                    held_out=None if found.held_out is None else found.held_out[source][:, source],
                    magnitude=None if found.magnitude is None else found.magnitude[source],
                )
            if use.side == "out" and found.gradient is not None:
                source = _source(len(found.gradient), use.channels, self.order).to(found.gradient.device)
                found = replace(found, gradient=found.gradient[source][:, source])
        return found
