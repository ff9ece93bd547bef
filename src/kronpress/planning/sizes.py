"""What a budget leaves the targeted layers, and what sizes a layer gets of it; numbers and shapes alone."""

from __future__ import annotations

from bisect import bisect_left
from math import prod
from typing import Any

from kronpress.errors import RequestError
from kronpress.matrices import STRUCTURES
from kronpress.plan import LayerPlan, count_flops
from kronpress.recipe import AUTO, REDUCED, Budget, Recipe


class BudgetTooSmall(RequestError):
    """The budget leaves a targeted layer less than the smallest structure needs."""


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
        raise BudgetTooSmall(
            f"budget of {total} parameters: the layers that are not targeted already hold {rest} of {num_params_dense}"
        )
    return total - rest


def least_budget(targets: dict[str, tuple[int, int]], recipe: Recipe, targets_dense: int) -> int:
    """The fewest parameters of all targeted layers together that give each of them what it can be built with."""
    if recipe.has_fixed_sizes:
        return sum(plan_layer(name, shape, recipe, None, targets_dense).num_params for name, shape in targets.items())
    if recipe.allocation == "measured":
        names = candidate_structures(recipe)
        return sum(min(_smallest(shape, name, recipe.spec) for name in names) for shape in targets.values())
    smallest = {shape: _smallest(shape, recipe.structure, recipe.spec) for shape in set(targets.values())}
    return max(-(-least * targets_dense // prod(shape)) for shape, least in smallest.items())


def candidate_structures(recipe: Recipe) -> list[str]:
    """The structures, in their order, that a matrix may get."""
    names = recipe.candidates if recipe.structure == AUTO else [recipe.structure]
    return [name for name in names if name != REDUCED]


def _smallest(shape: tuple[int, int], structure: str, fixed: dict[str, Any]) -> int:
    """How many parameters the structure needs at least for a matrix of this shape."""

    def possible(max_params: int) -> bool:
        return bool(STRUCTURES[structure].candidate_specs(*shape, max_params, **fixed))

    if not possible(prod(shape)):
        raise RequestError(f"no {structure} of this shape has fewer parameters than the dense matrix")
    return bisect_left(range(prod(shape)), 1, key=possible)


def plan_layer(
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
            raise BudgetTooSmall(
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
