"""B ⊗ A in place of A ⊗ B with a small B, so that no product with it copies; neighbours take the shuffle between them.

In A ⊗ B unit (p, q) of a side is number p·m2 + q, and what B mixes are neighbours: a product with it has to transpose,
or to read apart. In B ⊗ A the unit is number q·m1 + p, and everything is done in whole pieces of memory. Between the
two numberings lies the perfect shuffle, a permutation. Where the units of a side may be renumbered (`folding/`) in all
layers that write or read them, the shuffle costs nothing: the two factors of each sum change their places, and dense
layers, norms and embeddings are renumbered once. Where B has but one row or column that side needs no shuffle.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kronpress.checkpoint import attach_plan_, attached_plan
from kronpress.errors import RequestError
from kronpress.folding import FreeDimension, Use, fold_, free_dimensions
from kronpress.folding.free_dimensions import in_columns
from kronpress.folding.renumbering import check_use
from kronpress.layers import StructuredLayer, StructuredLinear
from kronpress.matrices import Kronecker, LowRank
from kronpress.matrices.kronecker import KroneckerOptions, KroneckerSpec
from kronpress.plan import LayerPlan
from kronpress.surgery import structured_layers


@dataclass(frozen=True)
class FoldedLayout:
    """What `fold_layout_` has done.

    `dimensions`: the free dimensions that were renumbered, each with its sizes in A and B as they were. `layers`: those
    whose factors have changed places. `stayed`: dimensions and layers that might have gained, and why they are as they
    were.
    """

    dimensions: dict[str, tuple[int, int]]
    layers: list[str]
    stayed: dict[str, str]


def fold_layout_(model: nn.Module) -> FoldedLayout:
    """Turn each Σ A_i ⊗ B_i with the smaller B into Σ B_i ⊗ A_i, in place, where that leaves the model's function.

    Logits change by rounding alone. The plan goes with the layers, so that saving and loading give this model back.
    A sum changes only if the units of both its sides can be renumbered, or are in one factor alone; one that has
    changed already is left alone. For a model that is healed, and before `set_dispatch` and `compile_`, whose choices
    are those for the sizes that they saw. The start `adaptive` of a changed layer is forgotten: it is healed by its
    plain factors from then on.

    Raises:
        RequestError: the model has no structured layer, or its free dimensions are not known.
    """
    if not isinstance(model, PreTrainedModel):
        raise RequestError("fold_layout_: the free dimensions of this model are not known; it is no transformers model")
    layers = structured_layers(model)
    if not layers:
        raise RequestError("fold_layout_: the model has no structured layer")
    dimensions = free_dimensions(model)
    changing, folded, stayed = _settled(model, layers, dimensions)
    with torch.no_grad():
        for name, (outer, inner) in folded.items():
            dimension = dimensions[name]
            order = perfect_shuffle(outer, inner)
            own = [use for use in dimension.uses if use.module in layers and _is_own(layers[use.module])]
            others = tuple(use for use in dimension.uses if use not in own)
            moved: set[int] = set()
            for use in own:
                for tensor, axis in _alone_in(layers[use.module], use):
                    if id(tensor) not in moved:
                        moved.add(id(tensor))
                        source = _source(tensor.shape[axis], use, order).to(tensor.device)
                        tensor.copy_(tensor.index_select(axis, source))
            fold_(model, FreeDimension(dimension.labels, others), order)
    for name in changing:
        _change_places_(layers[name])
    plan = attached_plan(model)
    if plan is not None and changing:
        changed = {
            name: LayerPlan.model_validate({**dict(layer), "spec": layers[name].spec, "options": layers[name].options})
            if name in changing
            else layer
            for name, layer in plan.layers.items()
        }
        attach_plan_(model, plan.model_copy(update={"layers": changed}))
    return FoldedLayout(folded, changing, stayed)


def perfect_shuffle(outer: int, inner: int) -> Tensor:
    """(outer · inner,): at place q · outer + p the number p · inner + q.

    >>> perfect_shuffle(3, 2)
    tensor([0, 2, 4, 1, 3, 5])
    """
    return torch.arange(outer * inner).reshape(outer, inner).mT.flatten()


def _settled(
    model: nn.Module, layers: Mapping[str, StructuredLayer], dimensions: Mapping[str, FreeDimension]
) -> tuple[list[str], dict[str, tuple[int, int]], dict[str, str]]:
    """The largest set of layers and dimensions that need no others: layers, dimensions with their sizes, and the rest.

    Nothing is taken out but what cannot be in any such set, so that the order of taking out does not matter.
    """
    places = {
        (use.module, int(in_columns(model.get_submodule(use.module), use))): name
        for name, dimension in dimensions.items()
        for use in dimension.uses
    }
    changing = [name for name, layer in layers.items() if _would_gain(layer)]
    seen = {places.get((name, axis)) for name in changing for axis in (0, 1) if _is_split(layers[name], axis)}
    folded = [name for name in dimensions if name in seen]
    stayed: dict[str, str] = {}
    while True:
        out = {name: _why_not_folded(model, dimensions[name], layers, changing) for name in folded}
        out |= {name: _why_not_changed(layers[name], name, places, folded) for name in changing}
        reasons = {name: reason for name, reason in out.items() if reason is not None}
        if not reasons:
            break
        stayed |= reasons
        changing = [name for name in changing if name not in stayed]
        folded = [name for name in folded if name not in stayed]
    sizes = {
        places[name, axis]: _sizes(layers[name], axis)
        for name in changing
        for axis in (0, 1)
        if _is_split(layers[name], axis)
    }
    return changing, {name: sizes[name] for name in folded}, stayed


def _why_not_changed(
    layer: StructuredLayer, name: str, places: Mapping[tuple[str, int], str], folded: Collection[str]
) -> str | None:
    for axis, units in enumerate(("rows", "columns")):
        if _is_split(layer, axis):
            dimension = places.get((name, axis))
            if dimension is None:
                return f"its {units} belong to no free dimension"
            if dimension not in folded:
                return f"its {units} are units of {dimension}, which stays"
    return None


def _why_not_folded(
    model: nn.Module, dimension: FreeDimension, layers: Mapping[str, StructuredLayer], changing: Collection[str]
) -> str | None:
    split = [
        (use, _sizes(layers[use.module], axis))
        for use in dimension.uses
        if use.module in layers and _is_split(layers[use.module], axis := int(in_columns(layers[use.module], use)))
    ]
    wanted = {sizes: use.module for use, sizes in split if use.module in changing}
    if not wanted:
        return "none of the layers that it would serve can change"
    if len(wanted) > 1:
        return "the sizes differ: " + ", ".join(f"{outer}⊗{inner} in {name}" for (outer, inner), name in wanted.items())
    ((outer, inner),) = wanted
    for use, _ in split:
        if use.module not in changing:
            return f"{use.module} stays"
        # A matrix may hold other units as well, or several copies of these.
        if not torch.equal(use.channels, torch.arange(outer * inner)[None]):
            return f"{use.module} holds the units in a part of that side alone, or more than once"
    order = perfect_shuffle(outer, inner)
    if not torch.equal(dimension.labels[order], dimension.labels):
        return "units would move from one head to another"
    for use in dimension.uses:
        if use.module not in layers or not _is_own(layers[use.module]):
            try:
                check_use(model, use)
            except RequestError as error:
                return str(error)
    return None


def _sizes(layer: StructuredLayer, axis: int) -> tuple[int, int]:
    """Of a side of Σ A_i ⊗ B_i, rows (0) or columns (1): its size in A and that in B."""
    return layer.spec.left_shape[axis], layer.spec.right_shape[axis]


def _is_split(layer: StructuredLayer, axis: int) -> bool:
    """Whether both factors of a sum have a part of this side, so that A ⊗ B and B ⊗ A number it differently."""
    return layer.structure is Kronecker and 1 not in _sizes(layer, axis)


def _would_gain(layer: StructuredLayer) -> bool:
    """Whether it is a sum with the smaller factor last, of which some side is split."""
    return (_is_split(layer, 0) or _is_split(layer, 1)) and layer.factors["weight"].numel() > layer.factors[
        "right"
    ].numel()


def _is_own(layer: StructuredLayer) -> bool:
    """Whether this module renumbers the layer's units, and not `fold_`."""
    return layer.structure in (Kronecker, LowRank)


def _alone_in(layer: StructuredLayer, use: Use) -> Iterator[tuple[Tensor, int]]:
    """The tensors in which the units of a use have an axis of their own: a factor, unless the side is split; a bias."""
    axis, factors = int(in_columns(layer, use)), layer.factors
    if layer.structure is LowRank:
        yield (factors["right"], 1) if axis else (factors["weight"], 0)
    elif not _is_split(layer, axis):
        outer, _ = _sizes(layer, axis)
        yield factors["right" if outer == 1 else "weight"], 2 * axis
    if use.side == "out" and isinstance(layer, StructuredLinear) and layer.bias is not None:
        yield layer.bias, 0


def _source(size: int, use: Use, order: Tensor) -> Tensor:
    """(size,): which channel of a tensor stands where afterwards; it may have channels that the units do not have."""
    source = torch.arange(size)
    source[use.channels] = use.channels[:, order]
    return source


def _change_places_(layer: StructuredLayer) -> None:
    """Σ A_i ⊗ B_i to Σ B_i ⊗ A_i; both factors are stored alike, (rows, terms, columns)."""
    layer.weight, layer.right = layer.right, layer.weight
    spec = layer.spec
    layer.spec = KroneckerSpec(left_shape=spec.right_shape, right_shape=spec.left_shape, num_terms=spec.num_terms)
    layer.options = KroneckerOptions()  # they say how A is started and trained
    if isinstance(layer, StructuredLinear):
        layer.ways = copy.deepcopy(layer.ways)  # without what was chosen and kept for the other order
