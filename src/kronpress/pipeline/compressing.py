"""Calibrating and compressing a loaded model as its recipe asks, all stages in turn; no healing, no files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from kronpress.calibration import Moments, calibrate, calibration_batches, moments_key
from kronpress.checkpoint import LoadedModel, cast_parameters_
from kronpress.compression import LayerReport, compress_
from kronpress.families import FAMILIES
from kronpress.healing import expected_memory
from kronpress.healing.memory import TrainingMemory
from kronpress.plan import Plan, owners_first, reduced_shapes, structured_plans
from kronpress.planning import check_stages, make_plan, meta_model
from kronpress.processes import from_main, num_processes
from kronpress.recipe import Calibration, Healing, Recipe
from kronpress.reduction import put_empty_
from kronpress.surgery import replace_by_matrix_, untie_

# Tokens in memory at once while calibrating: GPT-2's logits of so many, and their gradients, take 0.4 GB.
CALIBRATION_TOKENS = 1024


def calibration_batch(recipe: Recipe) -> int:
    """How many sequences are in memory at once while calibrating."""
    return max(1, CALIBRATION_TOKENS // recipe.calibration.sequence_length)


def within_context(recipe: Recipe, config: PreTrainedConfig) -> Recipe:
    """The recipe for a model that reads fewer tokens than a sequence has where nothing is said: as many as it reads.

    A length that the recipe does give stays; one that is too long is refused by what it is for. What is not calibrated
    stays as it is.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    sections: dict[str, Calibration | Healing] = {"healing": recipe.healing}
    if any(part.weighting.metric != "none" for part in recipe.parts):
        sections["calibration"] = recipe.calibration
    shortened = {
        name: section.model_copy(update={"sequence_length": limit})
        for name, section in sections.items()
        if limit and section.sequence_length > limit and "sequence_length" not in section.model_fields_set
    }
    return recipe.model_copy(update=shortened)


class Calibrated(NamedTuple):
    """What a plan and its fits need of the data: the dense model's moments, and the token ids they are of."""

    moments: Moments | None = None
    batches: Sequence[Tensor] = ()


def calibrated(
    recipe: Recipe, loaded: LoadedModel, message: Callable[[str], None], known: dict[str, Moments] | None = None
) -> Calibrated:
    """The calibration that the recipe needs, if any.

    Args:
        known: calibrations by their keys, to take it from if it is there, and to put it into.
    """
    if recipe.weighting.metric == "none":
        return Calibrated()
    batches = calibration_batches(loaded.tokenizer, recipe, calibration_batch(recipe))
    known = {} if known is None else known
    with_gradients = recipe.weighting.model_copy(update={"metric": "loss"})
    keys = [
        moments_key(loaded.model, recipe.model_copy(update={"weighting": weighting}), batches)
        for weighting in (recipe.weighting, with_gradients)
    ]
    for key in keys:  # moments with gradients serve where none are asked for
        if key in known:
            return Calibrated(known[key], batches)
    message(f"calibrating for {recipe.name} on {recipe.calibration.data}")
    known[keys[0]] = calibrate(loaded.model, batches, recipe, messages=message)
    return Calibrated(known[keys[0]], batches)


def agreed(plan: Plan) -> Plan:
    """The main process's plan: where it follows from what was measured, others may have measured another last digit."""
    return plan if num_processes() == 1 else Plan.model_validate_json(from_main(plan.model_dump_json))


def planned_memory(config: PreTrainedConfig, plan: Plan, recipe: Recipe) -> TrainingMemory | None:
    """What the last healing of the recipe would take on this machine, in float32; None if it has none.

    Args:
        plan: of the recipe's last stage.
    """
    healing = recipe.parts[-1].healing
    if (healing.max_steps is None and healing.tokens is None) or healing.num_steps == 0:
        return None
    student, teacher = meta_model(config), meta_model(config)
    assert isinstance(student, PreTrainedModel)
    assert isinstance(teacher, PreTrainedModel)
    if any(part.rotation for part in recipe.parts):
        untie_(student, FAMILIES[config.model_type].embedding)
    put_empty_(student, reduced_shapes(plan.layers))
    for name, layer in owners_first(structured_plans(plan.layers)).items():
        replace_by_matrix_(student, name, layer.empty_matrix(torch.float32), layer.heads, layer.shared_with)
    for model in (student, teacher):
        cast_parameters_(model, torch.float32)
    return expected_memory(student, teacher, healing)


def compress_loaded_(
    loaded: LoadedModel,
    plan: Plan,
    data: Calibrated,
    progress: Callable[[str, int, int], None] | None = None,
    messages: Callable[[str], None] = lambda _: None,
) -> dict[str, LayerReport]:
    """`compress_` the loaded model in place with all that the plan needs."""
    return compress_(loaded.model, plan, progress, moments=data.moments, batches=data.batches, messages=messages)


def compress_stages_(
    loaded: LoadedModel,
    recipe: Recipe,
    message: Callable[[str], None],
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Plan, dict[str, LayerReport]]:
    """Compress the loaded model in place by all stages of the recipe, with no healing between them.

    Returns:
        The plan of the model as it then is, and the error of each layer in the stage that replaced it last.
    """
    recipe = within_context(recipe, loaded.model.config)
    if recipe.stages:
        check_stages(loaded.model, recipe)
    plan: Plan | None = None
    layers: dict[str, LayerReport] = {}
    for part in recipe.parts:
        data = calibrated(part, loaded, message)
        plan = agreed(make_plan(loaded.model, part, data.moments, before=plan))
        layers |= compress_loaded_(loaded, plan, data, progress, message)
    assert plan is not None
    return plan, layers
