"""A measured allocation: what each targeted matrix becomes, by its weight and by moments of its inputs."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kronpress.candidates import DENSE, FITTED, Candidate, choose, screen
from kronpress.errors import RequestError
from kronpress.families import FAMILIES
from kronpress.folding import check_foldable, fold_, free_dimensions, permuted_moments, search_orders
from kronpress.matrices.metric import Metric
from kronpress.matrices.moments import InputMoments
from kronpress.plan import AllocationReport, CandidateReport, LayerPlan, ReducedLayerPlan, ReducedSpec, count_flops
from kronpress.planning.sizes import candidate_structures
from kronpress.recipe import AUTO, REDUCED, Recipe
from kronpress.reduction import Block, blocks_of, dense_shapes, ordered_units
from kronpress.surgery import dense_weight, is_embedding, replaceable_layers, stacked_weight
from kronpress.weighting import layer_metric, of_group

# Of B, in the sums for which units are put in order before candidates are compared.
REFERENCE_SIDE = 4
# So many numbers of hidden units are considered for an MLP.
NUMBERS_OF_UNITS = 96


class NothingMeasured(RequestError):
    """A measured allocation has no weights or moments to go by."""


def allocated(
    model: nn.Module,
    groups: Mapping[str, list[str]],
    targets: dict[str, tuple[int, int]],
    recipe: Recipe,
    budget_params: int | None,
    moments: Mapping[str, InputMoments] | None,
) -> tuple[dict[str, LayerPlan], AllocationReport]:
    """The candidates that cost the least loss within the budget; a matrix for which that is itself is left dense.

    Where units will be folded, the candidates are those of the matrices in the order that is best for REFERENCE_SIDE.

    Args:
        groups: the layers that become one matrix, by the first; most are alone.
        targets: the shapes of these matrices.
    """
    layers = replaceable_layers(model)
    if budget_params is None:
        raise RequestError("a measured allocation needs a budget: set one of budget.*")
    if moments is None or not all(name in moments for names in groups.values() for name in names):
        raise NothingMeasured("a measured allocation needs moments of every targeted layer: calibrate the model first")
    if any(layers[name].weight.is_meta for name in targets):  # type: ignore[union-attr]
        raise NothingMeasured("a measured allocation needs the model's weights, not its configuration alone")
    names = candidate_structures(recipe)
    if recipe.folding and set(names) - {"low_rank", "joint_rank"}:  # to which an order is nothing
        share = budget_params / sum(map(prod, targets.values()))
        model, moments = _folded(model, targets, recipe, share, moments)
        layers = replaceable_layers(model)

    def problem(name: str) -> tuple[Tensor, Metric]:
        # Made anew each time: all metrics together may be larger than the model.
        members = [layers[each] for each in groups[name]]
        weight = stacked_weight(members).detach().to(torch.float64)
        layer, together = of_group(members, [moments[each] for each in groups[name]])
        return weight, layer_metric(layer, weight, together, recipe.weighting)

    def is_allowed(shape: tuple[int, int], structure: str, spec: Any) -> bool:
        return not recipe.flops_not_above_dense or count_flops(structure, *shape, spec) <= 2 * prod(shape)

    tables = {name: screen(*problem(name), names, partial(is_allowed, shape)) for name, shape in targets.items()}
    blocks = _blocks_of_units(model, targets) if recipe.structure == AUTO and REDUCED in recipe.candidates else {}
    for name, block in blocks.items():
        cost = block.cost("units", dense_shapes(model, block))
        tables[name] = _numbers_of_units(block.widths.units, cost, *problem(block.layers["down"]))
    members = {name: [each for each in targets if each in block.members("units")] for name, block in blocks.items()}
    choice = choose(tables, problem, budget_params, members, recipe.candidates)
    planned: dict[str, LayerPlan] = {}
    for name, each in choice.chosen.items():
        if name in blocks:
            planned |= _with_fewer_units(model, blocks[name], targets, each)
        elif each.structure != DENSE:
            planned[name] = LayerPlan(
                structure=each.structure,
                out_features=targets[name][0],
                in_features=targets[name][1],
                spec=each.spec,
                predicted_rise=each.rise,
            )
    if not planned:
        raise RequestError(
            f"the budget leaves {budget_params} parameters, enough for every targeted matrix to stay dense"
        )
    report = AllocationReport(
        predicted_rise=choice.allocation.error,
        gap=choice.allocation.gap,
        kept_dense=[name for first, each in choice.chosen.items() if each.structure == DENSE for name in groups[first]],
        candidates={
            name: [
                CandidateReport(
                    structure=each.structure,
                    spec=_told(each.spec),
                    num_params=each.num_params,
                    predicted_rise=each.rise,
                    is_exact=each.evidence == FITTED,
                )
                for each in table
            ]
            for name, table in choice.candidates.items()
        },
    )
    return planned, report


def _told(spec: Any) -> Any:
    if isinstance(spec, int):
        return {"units": spec}
    return None if spec is None else spec.model_dump(mode="json")


def _blocks_of_units(model: nn.Module, targets: Collection[str]) -> dict[str, Block]:
    """The blocks, if known, of whose MLP all layers are targets; by the name of the choice of how many units it has."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    known = blocks_of(model) if isinstance(model, PreTrainedModel) and model_type in FAMILIES else {}
    return {f"{prefix} units": block for prefix, block in known.items() if block.members("units") <= {*targets}}


def _numbers_of_units(num_units: int, cost: int, weight: Tensor, metric: Metric) -> list[Candidate]:
    """Of numbers of units below all, what they cost; their spec is the number.

    The units that stay are as they were, so that the whole error is that of the layer which reads them.

    Args:
        cost: parameters of a unit.
        weight, metric: of the layer that reads them, (out_features, num_units).
    """
    lost = ordered_units(weight, metric)[1]
    step = -(-num_units // NUMBERS_OF_UNITS)
    return [
        Candidate(REDUCED, count, count * cost, lost[count].item() / 2, FITTED)
        for count in range(step, num_units, step)
    ]


def _with_fewer_units(
    model: nn.Module, block: Block, targets: Mapping[str, tuple[int, int]], chosen: Candidate
) -> dict[str, LayerPlan]:
    shapes = block.shapes(dense_shapes(model, block), replace(block.widths, units=chosen.spec))
    return {
        name: ReducedLayerPlan(
            structure=REDUCED,
            out_features=targets[name][0],
            in_features=targets[name][1],
            spec=ReducedSpec(shape=shapes[name], has_bias=model.get_submodule(name).bias is not None),
            predicted_rise=chosen.rise if name == block.layers["down"] else None,
        )
        for name in block.members("units")
    }


def _folded(
    model: nn.Module,
    targets: Mapping[str, tuple[int, int]],
    recipe: Recipe,
    share: float,
    moments: Mapping[str, InputMoments],
) -> tuple[nn.Module, Mapping[str, InputMoments]]:
    """A copy of the model whose units stand in a good order for sums with B of REFERENCE_SIDE, and its moments."""
    check_foldable(model, recipe.folding, targets, targets)
    model = copy.deepcopy(model)
    assert isinstance(model, PreTrainedModel)
    layers = replaceable_layers(model)
    sizes = {}
    for name, (out_features, in_features) in targets.items():
        most = 1 if is_embedding(layers[name]) else REFERENCE_SIDE  # its rows are tokens, in no order
        m2, n2 = (
            max(d for d in range(1, side + 1) if size % d == 0)
            for size, side in ((out_features, most), (in_features, REFERENCE_SIDE))
        )
        left_shape = out_features // m2, in_features // n2
        affordable = int(share * out_features * in_features) // (prod(left_shape) + m2 * n2)
        sizes[name] = (left_shape, (m2, n2), max(1, min(affordable, m2 * n2, prod(left_shape))))

    def metric(name: str) -> Metric:
        return layer_metric(layers[name], dense_weight(layers[name]), given[name], recipe.weighting)

    given = moments
    dimensions = free_dimensions(model)
    found = search_orders(model, recipe.folding, sizes, metric)
    for name, order in found.items():
        fold_(model, dimensions[name], order)
        moments = permuted_moments(moments, dimensions[name], order)
    return model, moments
