"""From a recipe to a plan: which modules are targeted, what the budget leaves them, and what each of them becomes.

By shapes alone, or, for a measured allocation, by the weights and by moments of the layers' inputs.
"""

from __future__ import annotations

import copy
import re
from bisect import bisect_left
from collections.abc import Mapping
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from kronpress.candidates import DENSE, FITTED, choose, screen
from kronpress.errors import RequestError
from kronpress.families import FAMILIES, target_patterns
from kronpress.folding import check_foldable, fold_, free_dimensions, permuted_moments, search_orders
from kronpress.layers import StructuredEmbedding, StructuredLayer, StructuredLinear
from kronpress.matrices import STRUCTURES
from kronpress.matrices.kronecker import KroneckerSpec
from kronpress.matrices.metric import Metric
from kronpress.matrices.moments import InputMoments
from kronpress.plan import AllocationReport, CandidateReport, LayerPlan, Plan, count_flops
from kronpress.recipe import AUTO, Budget, Recipe
from kronpress.surgery import (
    dense_weight,
    linear_layers,
    owners,
    replace_by_matrix_,
    replaceable_layers,
    structured_layers,
    tied_heads,
    untie_,
    weight_shape,
)
from kronpress.weighting import WithoutHeads, layer_metric

# Of B, in the sums for which units are put in order before candidates are compared.
REFERENCE_SIDE = 4


class _BudgetTooSmall(RequestError):
    """The budget leaves a targeted layer less than the smallest structure needs."""


def make_plan(
    model_or_config: nn.Module | PreTrainedConfig,
    recipe: Recipe,
    moments: Mapping[str, InputMoments] | None = None,
    before: Plan | None = None,
) -> Plan:
    """What `recipe` makes of a model, from its shapes alone, or with a measured allocation from weights and moments.

    Of a recipe of several stages it is what the last leaves.

    >>> from transformers import GPT2Config
    >>> from kronpress import load_recipe
    >>> make_plan(GPT2Config(), load_recipe("krony-81m")).num_params
    81972576

    Args:
        model_or_config: any module with `nn.Linear`, `Conv1D` or `nn.Embedding` layers, or a causal language model's
            configuration.
        moments: of the targeted layers' inputs, by layer, for `allocation: measured`.
        before: the plan that an earlier stage has carried out on this model.

    Raises:
        RequestError: a target matches no layer, a layer's shape does not divide, a layer is tied to
            another, the budget cannot be met, or a measured allocation has no weights or moments.
    """
    model = model_or_config if isinstance(model_or_config, nn.Module) else meta_model(model_or_config)
    is_compressed = structured_layers(model) and before is None
    if is_compressed or (before is None and getattr(model_or_config, "quantization_config", None) is not None):
        raise RequestError("the model is compressed or quantised already: plan and compress the dense one it came from")
    if recipe.stages:
        return plan_stages(model, recipe)[-1]
    layers = replaceable_layers(model)
    targets = find_targets(model, recipe)
    heads = {name: tied_heads(model, name) if _is_embedding(layers[name]) else [] for name in targets}
    untied = {name: prod(targets[name]) for name, others in heads.items() if others and recipe.head == "dense"}
    heads |= {name: [] for name in untied}
    if moments is not None:
        moments = WithoutHeads(moments, list(untied))
    if recipe.rotation:
        untied |= _untied_by_rotation(model, recipe, targets)

    present = Totals.of(model)
    dense = present if before is None else Totals(before.num_params_dense, before.flops_per_token_dense)
    dtype = stored_dtype(model)
    # What the targets hold now, and what the heads that lose their tie will hold.
    held = sum(_num_params_held(layers[name]) for name in targets)
    rest = present.num_params - held + sum(untied.values())
    targets_dense = sum(map(prod, targets.values()))
    allocation = None
    try:
        budget_params = target_params(recipe.budget, dense.num_params, rest, targets_dense, dtype.itemsize)
        if recipe.allocation == "measured":
            planned, allocation = _allocated(model, targets, recipe, budget_params, moments)
        else:
            planned = {
                name: _plan_layer(name, shape, recipe, budget_params, targets_dense) for name, shape in targets.items()
            }
    except _BudgetTooSmall as error:
        least = _least_budget(targets, recipe, targets_dense)
        raise RequestError(
            f"{error}; the least possible is {least} in the targeted layers, {rest + least} in the model"
        ) from error
    if recipe.folding:
        sums = [name for name, layer in planned.items() if isinstance(layer.spec, KroneckerSpec)]
        if not sums and recipe.allocation != "measured":
            raise RequestError(f"folding {recipe.folding}: orders are for Kronecker sums, and none is planned")
        check_foldable(model, recipe.folding, sums, planned)
    planned = {
        name: layer.model_copy(update={"is_embedding": _is_embedding(layers[name]), "heads": heads[name]})
        for name, layer in planned.items()
    }
    left_dense = sum(prod(shape) for name, shape in targets.items() if name not in planned)
    num_params_targets = left_dense + sum(layer.num_params for layer in planned.values())
    num_params = rest + num_params_targets
    if budget_params is not None and num_params_targets > budget_params:
        raise RequestError(
            f"recipe {recipe.name!r} has fixed sizes that leave {num_params_targets} parameters in the targeted "
            f"layers, {num_params} in the model; the budget allows {budget_params} and {rest + budget_params}"
        )

    flops = _flops(model)
    for name, layer in planned.items():
        flops |= {**dict.fromkeys(layer.heads, 0), name: layer.flops_per_token}
    earlier = {} if before is None else {name: each for name, each in before.layers.items() if name not in targets}
    together = {**earlier, **planned}
    layers_planned = {name: together[name] for name in layers if name in together}
    return Plan(
        recipe=recipe.name,
        layers=layers_planned,
        stage=1 if before is None else before.stage + 1,
        before=list(earlier),
        weighting=recipe.weighting,
        folding=recipe.folding,
        rotation=recipe.rotation,
        allocation=allocation,
        num_params=num_params,
        num_params_dense=dense.num_params,
        num_params_targets=num_params_targets,
        num_params_targets_dense=targets_dense,
        num_params_untied=sum(untied.values()) + (before.num_params_untied if before else 0),
        kept_of_targets=num_params_targets / targets_dense,
        kept_of_model=num_params / dense.num_params,
        flops_per_token=sum(flops.values()),
        flops_per_token_dense=dense.flops_per_token,
        dtype=str(dtype).removeprefix("torch."),
        bytes=num_params * dtype.itemsize
        + 8 * sum(layer.num_indices for layer in [*earlier.values(), *planned.values()]),
        bytes_dense=dense.num_params * dtype.itemsize,
    )


def _untied_by_rotation(model: nn.Module, recipe: Recipe, targets: Mapping[str, Any]) -> dict[str, int]:
    """The numbers of the head's own weight where it was tied: the last norm's gain, folded into it, ends the tie.

    Raises:
        RequestError: the model's residual stream is not known, or the recipe asks for what a rotation does not allow.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in FAMILIES:
        raise RequestError(f"rotation: of a model of type {model_type!r} the residual stream is not known")
    name = FAMILIES[model_type].embedding
    if name in targets or structured_layers(model):
        raise RequestError("rotation: the embedding and all layers outside the targets have to be dense")
    if not tied_heads(model, name):
        return {}
    if recipe.head == "tied":
        raise RequestError("rotation gives the tied head a weight of its own, which is counted: allow it by head=dense")
    return {name: prod(weight_shape(model.get_submodule(name)))}


def plan_stages(model: nn.Module, recipe: Recipe) -> list[Plan]:
    """The plan of each stage, as each finds the model that the stages before it leave; by shapes alone.

    Raises:
        RequestError: as `make_plan`; a stage with a measured allocation cannot be planned before those before it ran.
    """
    shell = meta_model(model.config) if isinstance(model, PreTrainedModel) else copy.deepcopy(model).to("meta")
    plans: list[Plan] = []
    for number, part in enumerate(recipe.parts, start=1):
        try:
            plans.append(make_plan(shell, part, before=plans[-1] if plans else None))
        except RequestError as error:
            raise RequestError(f"stage {number} of {recipe.name!r}: {error}") from error
        if part.rotation:
            untie_(shell, FAMILIES[shell.config.model_type].embedding)  # type: ignore[index, union-attr]
        for name in plans[-1].new_layers:
            layer = plans[-1].layers[name]
            replace_by_matrix_(shell, name, layer.empty_matrix(stored_dtype(shell)), layer.heads)
    return plans


class Totals(NamedTuple):
    """Floating-point parameters of a model as it is, shared ones counted once, and its FLOPs for one token."""

    num_params: int
    flops_per_token: int

    @classmethod
    def of(cls, model: nn.Module) -> Totals:
        return cls(sum(p.numel() for p in model.parameters() if p.is_floating_point()), sum(_flops(model).values()))


def _is_embedding(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Embedding | StructuredEmbedding)


def _num_params_held(layer: nn.Module) -> int:
    """Parameters of the layer's matrix as it is, dense or structured."""
    if isinstance(layer, StructuredLayer):
        return layer.structure.count_params(layer.out_features, layer.in_features, layer.spec)
    return layer.weight.numel()  # type: ignore[operator, union-attr]


def _allocated(
    model: nn.Module,
    targets: dict[str, tuple[int, int]],
    recipe: Recipe,
    budget_params: int | None,
    moments: Mapping[str, InputMoments] | None,
) -> tuple[dict[str, LayerPlan], AllocationReport]:
    """The candidates that cost the least loss within the budget; a matrix for which that is itself is left dense.

    Where units will be folded, the candidates are those of the matrices in the order that is best for REFERENCE_SIDE.
    """
    layers = replaceable_layers(model)
    if budget_params is None:
        raise RequestError("a measured allocation needs a budget: set one of budget.*")
    if moments is None or not moments.keys() >= targets.keys():
        raise RequestError("a measured allocation needs moments of every targeted layer: calibrate the model first")
    if any(layers[name].weight.is_meta for name in targets):  # type: ignore[union-attr]
        raise RequestError("a measured allocation needs the model's weights, not its configuration alone")
    names = _candidate_structures(recipe)
    if recipe.folding and set(names) - {"low_rank"}:  # to which an order is nothing
        share = budget_params / sum(map(prod, targets.values()))
        model, moments = _folded(model, targets, recipe, share, moments)
        layers = replaceable_layers(model)

    def problem(name: str) -> tuple[Tensor, Metric]:
        # Made anew each time: all metrics together may be larger than the model.
        weight = dense_weight(layers[name]).detach().to(torch.float64)
        return weight, layer_metric(layers[name], weight, moments[name], recipe.weighting)

    def is_allowed(shape: tuple[int, int], structure: str, spec: Any) -> bool:
        return not recipe.flops_not_above_dense or count_flops(structure, *shape, spec) <= 2 * prod(shape)

    tables = {name: screen(*problem(name), names, partial(is_allowed, shape)) for name, shape in targets.items()}
    choice = choose(tables, problem, budget_params)
    planned = {
        name: LayerPlan(
            structure=each.structure,
            out_features=targets[name][0],
            in_features=targets[name][1],
            spec=each.spec,
            predicted_rise=each.rise,
        )
        for name, each in choice.chosen.items()
        if each.structure != DENSE
    }
    if not planned:
        raise RequestError(
            f"the budget leaves {budget_params} parameters, enough for every targeted matrix to stay dense"
        )
    report = AllocationReport(
        predicted_rise=choice.allocation.error,
        gap=choice.allocation.gap,
        kept_dense=[name for name, each in choice.chosen.items() if each.structure == DENSE],
        candidates={
            name: [
                CandidateReport(
                    structure=each.structure,
                    spec=None if each.spec is None else each.spec.model_dump(mode="json"),
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
        most = 1 if _is_embedding(layers[name]) else REFERENCE_SIDE  # its rows are tokens, in no order
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


def _flops(model: nn.Module) -> dict[str, int]:
    """FLOPs of each linear layer for one token, dense or structured."""
    dense = {name: 2 * layer.weight.numel() for name, layer in linear_layers(model).items()}  # type: ignore[operator, union-attr]
    structured = {
        name: _count_flops_of(layer) for name, layer in structured_layers(model).items() if not _is_embedding(layer)
    }
    return {**dense, **structured}


def _count_flops_of(layer: StructuredLayer) -> int:
    name = next(name for name, structure in STRUCTURES.items() if structure is layer.structure)
    return count_flops(name, layer.out_features, layer.in_features, layer.spec)


def meta_model(config: PreTrainedConfig) -> nn.Module:
    """The causal language model of `config`, without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def stored_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that the configuration names, or else that of the weights."""
    named = getattr(getattr(model, "config", None), "dtype", None)
    if isinstance(named, torch.dtype):
        return named
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


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
        if others and not (_is_embedding(layers[name]) and all(_is_head(model, other) for other in others)):
            raise RequestError(f"target {name!r} shares its weight with {others[0]!r}, which would be left dense")
    return {name: weight_shape(layer) for name, layer in layers.items() if name in found}


def _is_head(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name), nn.Linear | StructuredLinear)


def target_params(budget: Budget, num_params_dense: int, rest: int, targets_dense: int, itemsize: int) -> int | None:
    """How many parameters the budget leaves for the targeted layers; None without a budget.

    Args:
        num_params_dense: of the dense model.
        rest: parameters that will be outside the targeted layers.
    """
    if budget.kept_of_targets is not None:
        return int(budget.kept_of_targets * targets_dense)
    if budget.params is not None:
        total = budget.params
    elif budget.kept_of_model is not None:
        total = int(budget.kept_of_model * num_params_dense)
    elif budget.bytes is not None:
        total = budget.bytes // itemsize
    else:
        return None
    if total <= rest:
        raise _BudgetTooSmall(
            f"budget of {total} parameters: the layers that are not targeted already hold {rest} of {num_params_dense}"
        )
    return total - rest


def _least_budget(targets: dict[str, tuple[int, int]], recipe: Recipe, targets_dense: int) -> int:
    """The fewest parameters of all targeted layers together that give each of them what it can be built with."""
    if recipe.has_fixed_sizes:
        return sum(_plan_layer(name, shape, recipe, None, targets_dense).num_params for name, shape in targets.items())
    if recipe.allocation == "measured":
        names = _candidate_structures(recipe)
        return sum(min(_smallest(shape, name, recipe.spec) for name in names) for shape in targets.values())
    smallest = {shape: _smallest(shape, recipe.structure, recipe.spec) for shape in set(targets.values())}
    return max(-(-least * targets_dense // prod(shape)) for shape, least in smallest.items())


def _candidate_structures(recipe: Recipe) -> list[str]:
    return recipe.candidates if recipe.structure == AUTO else [recipe.structure]


def _smallest(shape: tuple[int, int], structure: str, fixed: dict[str, Any]) -> int:
    """How many parameters the structure needs at least for a matrix of this shape."""

    def possible(max_params: int) -> bool:
        return bool(STRUCTURES[structure].candidate_specs(*shape, max_params, **fixed))

    if not possible(prod(shape)):
        raise RequestError(f"no {structure} of this shape has fewer parameters than the dense matrix")
    return bisect_left(range(prod(shape)), 1, key=possible)


def _plan_layer(
    name: str, shape: tuple[int, int], recipe: Recipe, budget_params: int | None, targets_dense: int
) -> LayerPlan:
    """The spec with the most parameters within the layer's share of the budget; of equal ones the fewest FLOPs."""
    out_features, in_features = shape
    structure = STRUCTURES[recipe.structure]
    # Fixed sizes are judged by the total of the plan, so that its matrices need not be equally small.
    num_params_dense, max_params = out_features * in_features, None
    if budget_params is not None and not recipe.has_fixed_sizes:
        max_params = min(budget_params * num_params_dense // targets_dense, num_params_dense)

    try:
        specs = structure.candidate_specs(out_features, in_features, max_params, **recipe.spec)
        if not specs:
            least = _smallest(shape, recipe.structure, recipe.spec)
            raise _BudgetTooSmall(
                f"the budget leaves {max_params} parameters, the smallest {recipe.structure} has {least}"
            )
        sizes = {spec: structure.count_params(out_features, in_features, spec) for spec in specs}
        most = max(sizes.values())
        largest = [spec for spec in specs if sizes[spec] == most]
        chosen = min(largest, key=lambda spec: count_flops(recipe.structure, out_features, in_features, spec))
        options = structure.Options.model_validate(recipe.fit)
        structure.check_options(chosen, options)
    except RequestError as error:
        raise type(error)(f"{name} ({out_features}×{in_features}): {error}") from error
    return LayerPlan(
        structure=recipe.structure, out_features=out_features, in_features=in_features, spec=chosen, options=options
    )
