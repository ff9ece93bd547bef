"""`make_plan`: from a recipe to a plan, by shapes alone or by what was measured; and the plans of all its stages."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Mapping
from math import prod
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from kronpress.errors import RequestError
from kronpress.families import FAMILIES
from kronpress.folding import RESIDUALS, check_foldable
from kronpress.layers import StructuredLayer
from kronpress.matrices.moments import InputMoments
from kronpress.plan import LayerPlan, Plan, kronecker_sums, owners_first, reduced_shapes, regrouped, structured_plans
from kronpress.planning.measured import NothingMeasured, allocated
from kronpress.planning.reduced import reduced_layers
from kronpress.planning.sizes import BudgetTooSmall, candidate_structures, least_budget, plan_layer, target_params
from kronpress.planning.targets import (
    Totals,
    find_targets,
    flops_by_layer,
    meta_model,
    planned_groups,
    stored_dtype,
)
from kronpress.recipe import REDUCED, Recipe
from kronpress.reduction import put_empty_
from kronpress.surgery import (
    is_embedding,
    replace_by_matrix_,
    replaceable_layers,
    structured_layers,
    tied_heads,
    untie_,
    weight_shape,
)
from kronpress.weighting import WithoutHeads


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
    config = getattr(model_or_config, "config", model_or_config)
    if before is None and _is_compressed(model, config, isinstance(model_or_config, nn.Module)):
        raise RequestError("the model is compressed or quantised already: plan and compress the dense one it came from")
    if recipe.stages:
        return plan_stages(model, recipe)[-1]
    layers = replaceable_layers(model)
    targets = find_targets(model, recipe)
    heads = {name: tied_heads(model, name) if is_embedding(layers[name]) else [] for name in targets}
    untied = {name: prod(targets[name]) for name, others in heads.items() if others and recipe.head == "dense"}
    heads |= {name: [] for name in untied}
    if moments is not None:
        moments = WithoutHeads(moments, list(untied))
    if recipe.rotation:
        untied |= _untied_by_rotation(model, recipe, targets)
    if recipe.folding:
        _check_type_folds(model, recipe)
    if narrow := [name for name in targets if before is not None and name in reduced_shapes(before.layers)]:
        raise RequestError(f"target {narrow[0]!r} was reduced by a stage before this one, and is no layer of full size")

    present = Totals.of(model)
    dense = present if before is None else Totals(before.num_params_dense, before.flops_per_token_dense)
    dtype = stored_dtype(model)
    # What the targets hold now, and what the heads that lose their tie will hold.
    held = _num_params_held(layers, targets)
    rest = present.num_params - held + sum(untied.values())
    targets_dense = sum(map(prod, targets.values()))
    groups = planned_groups(model, targets, candidate_structures(recipe))
    shapes = {first: (sum(targets[name][0] for name in names), targets[first][1]) for first, names in groups.items()}
    allocation = None
    try:
        budget_params = target_params(recipe.budget, dense.num_params, rest, targets_dense, dtype.itemsize)
        if recipe.allocation == "measured":
            planned, allocation = allocated(model, groups, shapes, recipe, budget_params, moments)
        elif recipe.structure == REDUCED:
            planned = reduced_layers(model, targets, recipe, budget_params, moments)
        else:
            planned = {
                name: plan_layer(name, shape, recipe, budget_params, targets_dense) for name, shape in shapes.items()
            }
    except BudgetTooSmall as error:
        least = least_budget(shapes, recipe, targets_dense)
        raise RequestError(
            f"{error}; the least possible is {least} in the targeted layers, {rest + least} in the model"
        ) from error
    if recipe.folding:
        sums = kronecker_sums(planned)
        if not sums and recipe.allocation != "measured":
            raise RequestError(f"folding {recipe.folding}: orders are for Kronecker sums, and none is planned")
        check_foldable(model, recipe.folding, sums, planned)
    planned = _each_of_its_group(planned, groups, targets)
    planned = {
        name: layer.model_copy(update={"is_embedding": is_embedding(layers[name]), "heads": heads[name]})
        for name, layer in planned.items()
    }
    left = sum(planned[name].num_params if name in planned else prod(shape) for name, shape in targets.items())
    num_params = rest + left - sum(layer.num_biases_lost for layer in planned.values())
    if budget_params is not None and left > budget_params:
        raise RequestError(
            f"recipe {recipe.name!r} has fixed sizes that leave {left} parameters in the targeted "
            f"layers, {num_params} in the model; the budget allows {budget_params} and {rest + budget_params}"
        )

    flops = flops_by_layer(model)
    for name, layer in planned.items():
        flops |= {**dict.fromkeys(layer.heads, 0), name: layer.flops_per_token}
    # Of a group that is targeted in part the others share on.
    left_alone = {} if before is None else {name: each for name, each in before.layers.items() if name not in targets}
    earlier = regrouped(left_alone)
    together = {**earlier, **planned}
    layers_planned = {name: together[name] for name in layers if name in together}
    targeted_before = {*before.layers, *before.left_dense} if before is not None else set()
    all_targets = {
        name: together[name].num_params_dense if name in together else prod(weight_shape(layers[name]))
        for name in layers
        if name in {*targets, *targeted_before}
    }
    num_params_targets = sum(
        together[name].num_params if name in together else all_targets[name] for name in all_targets
    )
    num_params_targets_dense = sum(all_targets.values())
    return Plan(
        recipe=recipe.name,
        layers=layers_planned,
        stage=1 if before is None else before.stage + 1,
        before=list(earlier),
        left_dense=[name for name in all_targets if name not in together],
        weighting=recipe.weighting,
        folding=recipe.folding,
        rotation=recipe.rotation,
        allocation=allocation,
        num_params=num_params,
        num_params_dense=dense.num_params,
        num_params_targets=num_params_targets,
        num_params_targets_dense=num_params_targets_dense,
        num_params_untied=sum(untied.values()) + (before.num_params_untied if before else 0),
        kept_of_targets=num_params_targets / num_params_targets_dense,
        kept_of_model=num_params / dense.num_params,
        flops_per_token=sum(flops.values()),
        flops_per_token_dense=dense.flops_per_token,
        dtype=str(dtype).removeprefix("torch."),
        bytes=num_params * dtype.itemsize
        + 8 * sum(layer.num_indices for layer in [*earlier.values(), *planned.values()]),
        bytes_dense=dense.num_params * dtype.itemsize,
    )


def _is_compressed(model: nn.Module, config: Any, is_module: bool) -> bool:
    """Whether there is nothing dense to begin with.

    A configuration says so itself. One that a model shares with another that was compressed says nothing of this one:
    what counts there are its layers, structured or narrower than the plan in the configuration found them.
    """
    stored = getattr(config, "quantization_config", None)
    if not is_module or stored is None:
        return bool(structured_layers(model)) or stored is not None
    plan = getattr(stored, "plan", None)
    if plan is None:  # of another method
        return True
    layers = dict(model.named_modules())
    narrow = reduced_shapes(Plan.model_validate(plan).layers)
    return bool(structured_layers(model)) or any(
        sorted(layers[name].weight.shape) == sorted(shape) for name, shape in narrow.items()
    )


def _each_of_its_group(
    planned: Mapping[str, LayerPlan], groups: Mapping[str, list[str]], targets: Mapping[str, tuple[int, int]]
) -> dict[str, LayerPlan]:
    """What each layer becomes, by what the groups become as one matrix; in the targets' order."""
    found = {
        name: planned[first].model_copy(
            update={"out_features": targets[name][0]}
            | ({} if name == first else {"shared_with": first, "predicted_rise": None})
        )
        for first, names in groups.items()
        if first in planned
        for name in names
    }
    return {name: found[name] for name in targets if name in found}


def _num_params_held(layers: Mapping[str, nn.Module], names: Collection[str]) -> int:
    """Parameters of the matrices `names` as they are, dense or structured, that no other layer shares."""
    held = 0
    shared: dict[int, list[str]] = {}  # the names of all that hold a factor, tied heads aside
    structured = {name: layer for name, layer in layers.items() if isinstance(layer, StructuredLayer)}
    for name in {id(layer.weight): name for name, layer in reversed(structured.items())}.values():
        for part in structured[name].structure.shared_factors:
            shared.setdefault(id(getattr(structured[name], part)), []).append(name)
    for name in names:
        layer = layers[name]
        if not isinstance(layer, StructuredLayer):
            held += layer.weight.numel()  # type: ignore[operator, union-attr]
            continue
        shapes = layer.structure.factor_shapes(layer.out_features, layer.in_features, layer.spec)
        for part, shape in shapes.items():
            holders = shared.get(id(getattr(layer, part)), [name])
            if name == holders[0] and all(each in names for each in holders):
                held += prod(shape)
    return held


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


def _check_type_folds(model: nn.Module, recipe: Recipe) -> None:
    """RequestError if it is not known which units of a model of this type may be renumbered."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if isinstance(model, PreTrainedModel) and model_type not in RESIDUALS:
        raise RequestError(
            f"folding {recipe.folding}: of a model of type {model_type!r} the free dimensions are not known; known "
            f"types are {', '.join(RESIDUALS)}; for any other model leave folding out, or let structure "
            "permuted_kronecker store its orders"
        )


def plan_stages(model: nn.Module, recipe: Recipe) -> list[Plan]:
    """The plan of each stage, as each finds the model that the stages before it leave; by shapes alone.

    Raises:
        RequestError: as `make_plan`; a stage with a measured allocation cannot be planned before those before it ran.
    """
    if isinstance(model, PreTrainedModel):
        shell = meta_model(model.config, type(model))
    else:
        shell = copy.deepcopy(model).to("meta")
    plans: list[Plan] = []
    for number, part in enumerate(recipe.parts, start=1):
        try:
            plans.append(make_plan(shell, part, before=plans[-1] if plans else None))
        except RequestError as error:
            raise type(error)(f"stage {number} of {recipe.name!r}: {error}") from error
        if part.rotation:
            untie_(shell, FAMILIES[shell.config.model_type].embedding)  # type: ignore[index, union-attr]
        new = {name: plans[-1].layers[name] for name in plans[-1].new_layers}
        put_empty_(shell, reduced_shapes(new))
        for name, layer in owners_first(structured_plans(new)).items():
            replace_by_matrix_(shell, name, layer.empty_matrix(stored_dtype(shell)), layer.heads, layer.shared_with)
    return plans


def check_stages(model: nn.Module, recipe: Recipe) -> None:
    """Refuse what a later stage would refuse, as far as shapes tell: up to the first one with a measured allocation.

    Raises:
        RequestError: as `make_plan`.
    """
    with contextlib.suppress(NothingMeasured):  # it has to wait for its turn
        plan_stages(model, recipe)
