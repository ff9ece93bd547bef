"""`Recipe`: what one run does, checked as a whole, and its stages as recipes of their own."""

from __future__ import annotations

import inspect
from typing import Any, Literal, get_type_hints

from pydantic import Field, NonNegativeInt, ValidationError, model_validator
from pydantic.fields import FieldInfo

from kronpress.errors import RequestError, unknown_name
from kronpress.matrices import STRUCTURES
from kronpress.recipe.fields import checked_values, explain, merge
from kronpress.recipe.sections import (
    Budget,
    Calibration,
    Evaluation,
    Healing,
    Reconstruction,
    Section,
    Similarity,
    Weighting,
)

AUTO = "auto"
REDUCED = "reduced"
SHARE = "share"
# What a stage may have of its own.
STAGE_FIELDS = (
    "targets",
    "head",
    "structure",
    "candidates",
    "allocation",
    "similarity",
    "flops_not_above_dense",
    "spec",
    "fit",
    "budget",
    "calibration",
    "weighting",
    "folding",
    "rotation",
    "reconstruction",
    "healing",
)
# Fields of the healing that stages share.
OF_THE_WHOLE = {"data", "tokens", "max_steps"}


class Recipe(Section):
    """The whole run. Field names are those of the YAML file and of `--set path.to.field=value`."""

    name: str = Field("custom", description="what the recipe is called in results")
    description: str = Field("", description="one line, with the source of the method")
    model: str = Field("gpt2", description="Hub id, local folder, or `pocket`")
    revision: str | None = Field(None, description="revision of a Hub model")
    seed: NonNegativeInt = Field(
        0, description="seed of the choice of calibration windows and labels, and of the order of training sequences"
    )
    targets: str | list[str] = Field(
        "mlp",
        description="`mlp`, `attention`, `blocks`, `embedding`, `all`, or regular expressions over whole module names",
    )
    head: Literal["tied", "dense"] = Field(
        "tied",
        description="of an embedding with a tied head: the head computes with the same factors, or keeps the dense "
        "table as a weight of its own, which is counted",
    )
    structure: str = Field(
        "kronecker",
        description=f"one of {', '.join(STRUCTURES)}; `{AUTO}`: for each matrix one of `candidates`; or `{REDUCED}`: "
        "dense matrices with fewer hidden units, and fewer channels in each head, between them",
    )
    candidates: list[str] = Field(
        ["low_rank", "kronecker"],
        description="the structures that `auto` chooses from; with one more at the end what a measured allocation "
        f"predicts is never worse; `{REDUCED}`: fewer hidden units in an MLP, where all of its layers are targets and "
        "the model's family is known",
    )
    allocation: Literal["uniform", "measured", "similarity"] = Field(
        "uniform",
        description="the same fraction of each matrix; what costs the least loss by the calibration; or, of a "
        f"{REDUCED} structure, most from the blocks whose outputs are most like their inputs",
    )
    similarity: Similarity = Field(default_factory=Similarity)
    flops_not_above_dense: bool = Field(
        False, description="measured allocation: no candidate that needs more FLOPs than the dense matrix"
    )
    spec: dict[str, Any] = Field({}, description="sizes of the structure that are fixed; the budget chooses the rest")
    fit: dict[str, Any] = Field({}, description="options of the structure's fit, such as Kronecker's `start`")
    folding: list[Literal["mlp", "value", "residual"]] = Field(
        [],
        description="units that are put in the order in which Kronecker sums come nearest: hidden units of the MLPs, "
        "value channels of the heads, the residual stream; folded into their neighbours, at no cost",
    )
    rotation: bool = Field(
        False,
        description="rotate the residual stream to where the fits come nearest (ProcrustesGPT), at no cost but that of "
        "a tied head, which needs a weight of its own: with head=dense",
    )
    budget: Budget = Field(default_factory=Budget)
    calibration: Calibration = Field(default_factory=Calibration)
    weighting: Weighting = Field(default_factory=Weighting)
    reconstruction: Reconstruction = Field(default_factory=Reconstruction)
    healing: Healing = Field(default_factory=Healing)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    stages: list[dict[str, Any]] = Field(
        [],
        description="compress and heal several times: each stage has its `share` of the healing's tokens, and of the "
        "other fields those that differ from the recipe's; a budget of the whole model is for what the last one leaves",
    )
    rivals: list[str] = Field(
        [],
        description="what a run measures beside it, on the same tokens: `dense` trained further, fewer `blocks`, "
        "`8-bit`, `4-bit`, or a recipe, which gets the same budget",
    )

    @model_validator(mode="before")
    @classmethod
    def _known_structure_and_sizes(cls, fields: dict[str, Any]) -> dict[str, Any]:
        structure = fields.get("structure", cls.model_fields["structure"].default)
        if structure == AUTO:
            for section in ("spec", "fit"):
                if fields.get(section):
                    raise RequestError(
                        f"recipe field {section}: structure {AUTO} chooses it; given {fields[section]!r}"
                    )
            return fields
        if structure == REDUCED:
            for section in ("spec", "fit"):
                if fields.get(section):
                    raise RequestError(f"recipe field {section}: there is none of structure {REDUCED}")
            return fields
        if structure not in STRUCTURES:
            raise unknown_name("structure", str(structure), [*STRUCTURES, AUTO, REDUCED])
        spec = checked_values("spec", f"size of {structure}", fields.get("spec", {}), _size_fields(structure))
        options = STRUCTURES[structure].Options
        fit = checked_values("fit", f"fit option of {structure}", fields.get("fit", {}), options.model_fields)
        try:
            options.model_validate(fit)
        except ValidationError as error:
            raise RequestError(f"recipe field fit: {error.errors()[0]['ctx']['error']}") from error
        return {**fields, "spec": spec, "fit": fit}

    @model_validator(mode="after")
    def _measured(self) -> Recipe:
        for name in self.candidates:
            if name not in (*STRUCTURES, REDUCED):
                raise unknown_name("structure", name, [*STRUCTURES, REDUCED])
        if self.structure == AUTO and {*self.candidates} <= {REDUCED}:
            raise ValueError(f"candidates: give a structure for single matrices; given {self.candidates}")
        if self.structure == AUTO and self.rotation and REDUCED in self.candidates:
            raise ValueError(f"rotation: the fits of {REDUCED} layers are none that it could search by: leave one out")
        if self.structure == AUTO and len(self.candidates) > 1:
            for name in self.candidates:
                if name != REDUCED and STRUCTURES[name].shared_factors:
                    raise ValueError(
                        f"candidates: {name} is chosen for several matrices at once and the others for one: leave one "
                        f"or the other out; structure {name} with allocation: measured gives each group its own size"
                    )
        if self.rotation and self.weighting.metric == "magnitude":
            raise ValueError("rotation: the metric magnitude is one of single coordinates: use none, input or loss")
        if self.structure == AUTO and self.allocation != "measured":
            raise ValueError(f"structure {AUTO} needs allocation: measured")
        if self.allocation == "measured" and self.weighting.metric in ("none", "magnitude"):
            raise ValueError("allocation: measured needs a weighting.metric, input or loss")
        if self.allocation == "measured" and (self.spec or self.fit):
            raise ValueError("allocation: measured chooses the sizes itself: leave out spec and fit")
        if self.flops_not_above_dense and self.allocation != "measured":
            raise ValueError("flops_not_above_dense needs allocation: measured")
        if self.allocation == "similarity" and self.structure != REDUCED:
            raise ValueError(f"allocation: similarity is one of whole blocks, for structure {REDUCED}")
        return self

    @model_validator(mode="after")
    def _reduced(self) -> Recipe:
        if self.structure != REDUCED:
            return self
        if self.allocation == "measured":
            raise ValueError(f"structure {REDUCED}: its allocation is uniform or similarity")
        if self.weighting.metric != "input":
            raise ValueError(f"structure {REDUCED} is fitted to inputs alone: set weighting.metric: input")
        for field, value in (("folding", self.folding), ("rotation", self.rotation)):
            if value:
                raise ValueError(f"{field}: matrices of structure {REDUCED} gain nothing by it")
        if self.weighting.sequential:
            raise ValueError(f"weighting.sequential: layers of structure {REDUCED} are fitted in pairs, not in turn")
        return self

    @model_validator(mode="after")
    def _stages_are_recipes(self) -> Recipe:
        for number, stage in enumerate(self.stages, start=1):
            for name in stage:
                if name not in (SHARE, *STAGE_FIELDS):
                    raise unknown_name(f"field of stage {number}", str(name), (SHARE, *STAGE_FIELDS))
            share = stage.get(SHARE)
            if not isinstance(share, int | float) or isinstance(share, bool) or not 0 <= share <= 1:
                raise ValueError(
                    f"stage {number} needs a {SHARE} of the healing's tokens, from 0 to 1; given {share!r}"
                )
            for name in sorted(OF_THE_WHOLE & {*(stage.get("healing") or {})}):
                raise ValueError(
                    f"stage {number}: healing.{name} is the whole recipe's, of which a stage has its {SHARE}"
                )
        total = sum(stage[SHARE] for stage in self.stages)
        if self.stages and abs(total - 1) > 1e-6:
            raise ValueError(f"the shares of the stages add up to {total:g}, not 1")
        parts = self.parts
        if self.stages and self.budget.is_of_the_model:
            if "budget" in self.stages[-1]:
                raise ValueError(
                    f"the budget is for the model that the last stage leaves, and stage {len(parts)} has one of its "
                    "own: leave one of them out"
                )
            for number, (stage, part) in enumerate(zip(self.stages[:-1], parts, strict=False), start=1):
                if "budget" not in stage and not part.has_fixed_sizes:
                    raise ValueError(
                        f"the budget is for the model that the last stage leaves, and stage {number} has neither fixed "
                        f"sizes nor a budget of its own: set stages.{number - 1}.budget.kept_of_targets, say"
                    )
        return self

    @property
    def parts(self) -> list[Recipe]:
        """The stages as recipes of one stage each, in order; the recipe itself if it has none.

        Tokens and steps of the healing are divided by the stages' shares. A budget of the whole model is for what the
        last stage leaves, and is the last part's; a fraction of the targets is every part's that has no budget of its
        own.
        """
        if not self.stages:
            return [self]
        whole = self.model_dump(mode="json", exclude={"stages"})
        parts, share_before = [], 0.0
        for number, stage in enumerate(self.stages, start=1):
            changes = {name: value for name, value in stage.items() if name != SHARE}
            fields = merge(whole, changes)
            # One structure's sizes, and one budget, say nothing to another.
            for section in ("spec", "fit", "budget"):
                if section in changes or (
                    section != "budget" and changes.get("structure", self.structure) != self.structure
                ):
                    fields[section] = changes.get(section, {})
            if "budget" not in changes and self.budget.is_of_the_model and number < len(self.stages):
                fields["budget"] = {}
            for limit in ("max_steps", "tokens"):
                given = getattr(self.healing, limit)
                if given is not None:
                    ends = [round(given * min(1.0, part)) for part in (share_before, share_before + stage[SHARE])]
                    fields["healing"][limit] = ends[1] - ends[0]
            if fields["healing"]["tokens"] == 0:
                fields["healing"] |= {"tokens": None, "max_steps": 0}
            share_before += stage[SHARE]
            try:
                parts.append(Recipe.model_validate(fields))
            except ValidationError as error:
                raise RequestError(f"stage {number}: {explain(error, Recipe)}") from error
        return parts

    @property
    def in_one_stage(self) -> Recipe:
        """All that the stages target as the targets of one; its calibration is that of the first stage that has one."""
        if not self.stages:
            return self
        calibrated = next((part for part in self.parts if part.weighting.metric != "none"), self)
        return self.model_copy(
            update={
                "stages": [],
                "targets": self.all_targets,
                "calibration": calibrated.calibration,
                "weighting": calibrated.weighting,
            }
        )

    @property
    def all_targets(self) -> str | list[str]:
        """The targets of all stages."""
        if not self.stages:
            return self.targets
        lists = [[part.targets] if isinstance(part.targets, str) else part.targets for part in self.parts]
        return list(dict.fromkeys(target for targets in lists for target in targets))

    @property
    def has_fixed_sizes(self) -> bool:
        """Whether `spec` leaves nothing for a budget to choose."""
        if self.structure in (AUTO, REDUCED):
            return False
        return STRUCTURES[self.structure].has_fixed_sizes(self.spec)


def _sizes(structure: str) -> dict[str, Any]:
    """What a recipe may fix of the structure's spec, and its default; None where the budget has to choose."""
    parameters = inspect.signature(STRUCTURES[structure].candidate_specs).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def _size_fields(structure: str) -> dict[str, FieldInfo]:
    """How these are checked: as the spec's own fields, or, if one only chooses among specs, by its annotation."""
    matrix_class = STRUCTURES[structure]
    hints = get_type_hints(matrix_class.candidate_specs, include_extras=True)
    fields = matrix_class.Spec.model_fields
    return {name: fields.get(name) or FieldInfo.from_annotation(hints[name]) for name in _sizes(structure)}
