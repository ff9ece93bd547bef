"""A recipe: one YAML file that says what is compressed, into what, how it is healed and how it is measured."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

from kronpress.errors import RequestError, unknown_name
from kronpress.matrices import STRUCTURES

POCKET = "pocket"
AUTO = "auto"
RECIPES = resources.files("kronpress") / "recipes"
SHARE = "share"
# What a stage may have of its own.
STAGE_FIELDS = (
    "targets",
    "head",
    "structure",
    "candidates",
    "allocation",
    "flops_not_above_dense",
    "spec",
    "fit",
    "budget",
    "calibration",
    "weighting",
    "folding",
    "rotation",
    "healing",
)

Fraction = Annotated[float, Field(gt=0, le=1)]


class _Section(BaseModel):
    """Every field is checked, and a field that does not exist is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Budget(_Section):
    """How much may remain. At most one field is set; one kept fraction is used for all targeted matrices."""

    params: PositiveInt | None = Field(None, description="floating-point parameters of the whole model, tied once")
    bytes: PositiveInt | None = Field(None, description="bytes of the whole model's parameters in its dtype")
    kept_of_targets: Fraction | None = Field(None, description="fraction of the targeted matrices' parameters")
    kept_of_model: Fraction | None = Field(None, description="fraction of the whole model's parameters")

    @model_validator(mode="after")
    def _one_at_most(self) -> Budget:
        given = [name for name, value in self if value is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are both set: a budget is one number")
        return self


class Calibration(_Section):
    """The text on which the inputs of the targeted layers, and the loss's response to them, are measured."""

    data: str | list[str] = Field("openwebtext", description="built-in set, Hub data set id, or local files")
    windows: PositiveInt = Field(128, description="sequences that are read, chosen by the seed; all if there are fewer")
    sequence_length: PositiveInt = Field(1024, description="tokens in one sequence")
    sensitivity: bool = Field(True, description="measure the gradients that the metric `loss` needs: a backward pass")
    held_out: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.125, description="fraction of the windows that is kept apart, to choose the fit's shrinkage by"
    )


class Weighting(_Section):
    """In which metric the fits are nearest, and what follows from it; all but `none` need a calibration."""

    metric: Literal["none", "magnitude", "input", "loss"] = Field(
        "none",
        description="`none`: the weight's own; `magnitude`: that weighted by the inputs' mean magnitude; `input`: "
        "the output error on real inputs; `loss`: that error as far as the loss responds to it",
    )
    shrinkage: Annotated[float, Field(ge=0, le=1)] | Literal["held_out"] = Field(
        0.0,
        description="how far the inputs' second moment is drawn to its diagonal; `held_out`: what is best for each "
        "layer on the held-out windows",
    )
    bias_correction: bool = Field(
        False, description="let biases take up the mean output error, and fit the rest; layers without one keep none"
    )
    sequential: bool = Field(
        False, description="fit block after block, each layer to the inputs that it will get from the layers before"
    )

    @model_validator(mode="after")
    def _measured(self) -> Weighting:
        if self.metric in ("none", "magnitude") and (self.bias_correction or self.sequential or self.shrinkage):
            raise ValueError("bias_correction, sequential and shrinkage need a metric, input or loss")
        return self


class Phase(_Section):
    """One part of a healing, with its share of all tokens; what is unset is as in the healing itself."""

    share: Fraction = Field(description="fraction of all tokens; the shares of all phases add up to 1")
    sequences_per_step: PositiveInt | None = None
    learning_rate: PositiveFloat | None = None
    final_learning_rate: Annotated[float, Field(ge=0, le=1)] | None = None
    warmup_steps: NonNegativeInt | None = None


class Healing(_Section):
    """Training of the compressed model; it stops at `max_steps` or `tokens`, whichever comes first."""

    data: str | list[str] = Field("openwebtext", description="built-in set, Hub data set id, or local files")
    max_steps: NonNegativeInt | None = Field(
        None, description="optimiser steps, all phases together; 0 leaves the model unhealed"
    )
    tokens: PositiveInt | None = Field(None, description="training tokens, all steps together")
    sequences_per_step: PositiveInt = Field(8, description="sequences in one optimiser step")
    sequences_per_pass: PositiveInt | None = Field(
        None, description="sequences in memory at once, gradients summed over passes; all of a step's if unset"
    )
    sequence_length: PositiveInt = Field(1024, description="tokens in one sequence")
    learning_rate: PositiveFloat = Field(6e-5, description="peak rate of AdamW")
    final_learning_rate: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1, description="rate at the end of the cosine, as a fraction of the peak"
    )
    warmup_steps: NonNegativeInt = Field(
        0, description="steps of linear rise to the peak rate, at most half of all steps"
    )
    phases: list[Phase] = Field(
        [], description="parts with a schedule of their own, each with a warm-up and a cosine; one part if empty"
    )
    weight_decay: NonNegativeFloat = Field(0.0, description="decoupled decay of all matrices")
    language_model_weight: NonNegativeFloat = Field(1.0, description="weight of the next-token cross-entropy")
    distillation_weight: NonNegativeFloat = Field(0.0, description="weight of KL(teacher ‖ student) of the logits")
    temperature: PositiveFloat = Field(1.0, description="temperature of both distributions in the distillation")
    embedding_weight: NonNegativeFloat = Field(
        0.0, description="weight of the mean squared difference from the teacher in what enters the first block"
    )
    attention_weight: NonNegativeFloat = Field(
        0.0, description="weight of KL(teacher ‖ student) of the attention maps, summed over the matched blocks"
    )
    hidden_weight: NonNegativeFloat = Field(
        0.0, description="weight of the mean squared difference after each block, summed over the matched blocks"
    )
    layer_map: list[NonNegativeInt] | None = Field(
        None, description="the teacher's block, from 0, that matches each block of the student; evenly if unset"
    )
    save_steps: PositiveInt | None = Field(None, description="steps between training checkpoints; none if unset")

    @model_validator(mode="after")
    def _consistent(self) -> Healing:
        if not any((self.language_model_weight, *self.teacher_weights.values())):
            names = ", ".join(["language_model_weight", *self.teacher_weights])
            raise ValueError(f"{names} are all 0: nothing to minimise")
        for size in [self.sequences_per_step, *(phase.sequences_per_step for phase in self.phases)]:
            if size is not None and size % (self.sequences_per_pass or 1):
                raise ValueError(f"sequences_per_pass {self.sequences_per_pass} does not divide {size}")
        shares = sum(phase.share for phase in self.phases)
        if self.phases and abs(shares - 1) > 1e-6:
            raise ValueError(f"the shares of the phases add up to {shares:g}, not 1")
        return self

    @property
    def teacher_weights(self) -> dict[str, float]:
        """The weights of the terms that compare with the teacher, by the names of their fields."""
        return {
            "distillation_weight": self.distillation_weight,
            "embedding_weight": self.embedding_weight,
            "attention_weight": self.attention_weight,
            "hidden_weight": self.hidden_weight,
        }

    @property
    def parts(self) -> list[Healing]:
        """The phases as healings of one phase each, whose `max_steps` are their steps.

        Under `max_steps` every phase is shortened by the same factor.

        Raises:
            RequestError: neither `max_steps` nor `tokens` is set.
        """
        phases = self.phases or [Phase(share=1.0)]
        changes = [phase.model_dump(exclude={"share"}, exclude_none=True) for phase in phases]
        parts = [self.model_copy(update={"phases": [], "tokens": None, **change}) for change in changes]
        # Steps of each phase for one token of healing.
        steps = [phase.share / part.tokens_per_step for phase, part in zip(phases, parts, strict=True)]
        limits = [self.max_steps] if self.max_steps is not None else []
        if self.tokens is not None:
            limits.append(max(1, math.floor(self.tokens * sum(steps) + 1e-6)))
        if not limits:
            raise RequestError("healing has no end: set healing.max_steps or healing.tokens")
        ends = [round(min(limits) * sum(steps[: i + 1]) / sum(steps)) for i in range(len(steps))]
        starts = [0, *ends[:-1]]
        return [
            part.model_copy(update={"max_steps": end - start})
            for part, start, end in zip(parts, starts, ends, strict=True)
        ]

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one step outside the phases."""
        return self.sequences_per_step * self.sequence_length

    @property
    def num_steps(self) -> int:
        """Optimiser steps under both limits, all phases together; raises what `parts` raises."""
        return sum(part.max_steps or 0 for part in self.parts)

    @property
    def num_tokens(self) -> int:
        """Tokens read in all steps; raises what `parts` raises."""
        return sum((part.max_steps or 0) * part.tokens_per_step for part in self.parts)


class Evaluation(_Section):
    """What the model is measured on, and how: `evaluate` in evaluation.py describes the protocols."""

    protocol: Literal["window", "krony", "lambada-last-word"] = Field(
        "window", description="how the text is read and the losses averaged"
    )

    data: str | list[str] = Field("wikitext2", description="built-in sets, Hub data set ids, or local files")
    window: PositiveInt | None = Field(
        None, description="tokens of context; if unset 1024 for krony, else the model's own limit, at most 2048"
    )
    stride: PositiveInt | None = Field(None, description="tokens from window to window; the window if unset")
    bos: bool | None = Field(None, description="begin with the tokenizer's BOS token; as the protocol has it if unset")


class Recipe(_Section):
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
        "kronecker", description=f"one of {', '.join(STRUCTURES)}, or `auto`: for each matrix one of `candidates`"
    )
    candidates: list[str] = Field(["low_rank", "kronecker"], description="the structures that `auto` chooses from")
    allocation: Literal["uniform", "measured"] = Field(
        "uniform", description="the same fraction of each matrix, or what costs the least loss by the calibration"
    )
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
    healing: Healing = Field(default_factory=Healing)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    stages: list[dict[str, Any]] = Field(
        [],
        description="compress and heal several times: each stage has its `share` of the healing's tokens, and of the "
        "other fields those that differ from the recipe's; one stage if empty",
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
        if structure not in STRUCTURES:
            raise unknown_name("structure", str(structure), [*STRUCTURES, AUTO])
        sizes = {name: STRUCTURES[structure].Spec.model_fields[name] for name in _sizes(structure)}
        spec = _checked_values("spec", f"size of {structure}", fields.get("spec", {}), sizes)
        options = STRUCTURES[structure].Options
        fit = _checked_values("fit", f"fit option of {structure}", fields.get("fit", {}), options.model_fields)
        try:
            options.model_validate(fit)
        except ValidationError as error:
            raise RequestError(f"recipe field fit: {error.errors()[0]['ctx']['error']}") from error
        return {**fields, "spec": spec, "fit": fit}

    @model_validator(mode="after")
    def _measured(self) -> Recipe:
        for name in self.candidates:
            if name not in STRUCTURES:
                raise unknown_name("structure", name, STRUCTURES)
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
        total = sum(stage[SHARE] for stage in self.stages)
        if self.stages and abs(total - 1) > 1e-6:
            raise ValueError(f"the shares of the stages add up to {total:g}, not 1")
        _ = self.parts
        return self

    @property
    def parts(self) -> list[Recipe]:
        """The stages as recipes of one stage each, in order; the recipe itself if it has none.

        Tokens and steps of the healing are divided by the stages' shares.
        """
        if not self.stages:
            return [self]
        whole = self.model_dump(mode="json", exclude={"stages"})
        parts, share_before = [], 0.0
        for stage in self.stages:
            changes = {name: value for name, value in stage.items() if name != SHARE}
            fields = _merge(whole, changes)
            # One structure's sizes, and one budget, say nothing to another.
            for section in ("spec", "fit", "budget"):
                if section in changes or (
                    section != "budget" and changes.get("structure", self.structure) != self.structure
                ):
                    fields[section] = changes.get(section, {})
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
                raise RequestError(f"stage {len(parts) + 1}: {_explain(error)}") from error
        return parts

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
        if self.structure == AUTO:
            return False
        return {name for name, default in _sizes(self.structure).items() if default is None} <= set(self.spec)


def _checked_values(section: str, kind: str, given: Any, allowed: Mapping[str, FieldInfo]) -> dict[str, Any]:
    """The named values as JSON has them, each checked as the structure itself would."""
    if not isinstance(given, dict):
        raise RequestError(f"recipe field {section}: expected {kind} by name; given {given!r}")
    checked = {}
    for name, value in given.items():
        if not allowed:
            raise RequestError(f"recipe field {section}.{name}: there is no {kind}")
        if name not in allowed:
            raise unknown_name(kind, str(name), allowed)
        field = allowed[name]
        adapter: TypeAdapter[Any] = TypeAdapter(Annotated[field.annotation, field])  # type: ignore[arg-type]
        try:
            checked[name] = adapter.dump_python(adapter.validate_python(value), mode="json")
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise RequestError(f"recipe field {section}.{name}: {reason}; given {value!r}") from error
    return checked


def _sizes(structure: str) -> dict[str, Any]:
    """What a recipe may fix of the structure's spec, and its default; None where the budget has to choose."""
    parameters = inspect.signature(STRUCTURES[structure].candidate_specs).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


# With the bundled model every recipe runs offline, on two cores, in about a minute.
POCKET_DEFAULTS: dict[str, Any] = {
    "calibration": {"data": "bundled", "windows": 128, "sequence_length": 256},
    "healing": {
        "data": "bundled",
        "max_steps": 60,
        "tokens": None,
        "sequences_per_step": 8,
        "sequences_per_pass": None,
        "sequence_length": 256,
        "learning_rate": 1e-3,
        "warmup_steps": 6,
        "phases": [],
    },
    "evaluation": {"protocol": "window", "data": "bundled", "window": None, "stride": None, "bos": None},
}


def recipe_names() -> list[str]:
    """The names of the built-in recipes."""
    return sorted(entry.name.removesuffix(".yaml") for entry in RECIPES.iterdir() if entry.name.endswith(".yaml"))


def read_recipe(source: str | Path | dict[str, Any]) -> dict[str, Any]:
    """The fields that a built-in recipe's name, a YAML file or a dictionary gives, not yet checked."""
    if isinstance(source, dict):
        return source
    if isinstance(source, str) and source in recipe_names():
        text = (RECIPES / f"{source}.yaml").read_text(encoding="utf-8")
    elif Path(source).is_file():
        try:
            text = Path(source).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RequestError(f"recipe {str(source)!r} is not a text file") from error
    elif str(source).endswith((".yaml", ".yml")):
        raise RequestError(f"no recipe file {str(source)!r}")
    else:
        raise unknown_name("recipe", str(source), recipe_names())
    try:
        fields = yaml.load(text, Loader=_NumberLoader)
    except yaml.YAMLError as error:
        raise RequestError(f"recipe {str(source)!r} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(fields, dict):
        raise RequestError(f"recipe {str(source)!r} is not a mapping of fields to values")
    return fields


def load_recipe(
    source: str | Path | dict[str, Any], overrides: list[str] | None = None, model: str | None = None
) -> Recipe:
    """The recipe of that built-in name, path or dictionary, with `overrides` of the form `path.to.field=value`.

    Values are read as YAML. Setting one `budget.*` replaces the recipe's budget. With the model `pocket`, data
    and schedule not set by hand become those of POCKET_DEFAULTS.

    >>> load_recipe("krony-96m", ["healing.max_steps=5"], model="pocket").healing.data
    'bundled'

    Raises:
        RequestError: no such recipe, an unknown field (the nearest valid names are given) or a bad value.
    """
    fields = read_recipe(source)
    changes = _parse_overrides(overrides or [])
    if model is not None:
        changes["model"] = model
    if changes.get("model", fields.get("model")) == POCKET:
        # What a file or dictionary says was set by hand; what a built-in recipe says is meant for GPT-2.
        built_in = isinstance(source, str) and source in recipe_names()
        by_hand = [changes] if built_in else [fields, changes]
        fields = _merge(fields, POCKET_DEFAULTS) if built_in else _merge(POCKET_DEFAULTS, fields)
        if _set_by_hand("tokens", by_hand) and not _set_by_hand("max_steps", by_hand):
            fields["healing"]["max_steps"] = None
    if "budget" in changes:
        fields = {**fields, "budget": {}}
    try:
        return Recipe.model_validate(_merge(fields, changes))
    except ValidationError as error:
        raise _explain(error) from error


def _set_by_hand(name: str, layers: list[dict[str, Any]]) -> bool:
    healing = [layer.get("healing") for layer in layers]
    return any(isinstance(section, dict) and section.get(name) is not None for section in healing)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `load_recipe` of it gives the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        inner = merged.get(key)
        nested = isinstance(inner, dict) and isinstance(value, dict)
        merged[key] = _merge(inner, value) if nested else value  # type: ignore[arg-type]
    return merged


def _parse_overrides(overrides: list[str]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise RequestError(f"--set {override!r}: expected path.to.field=value")
        try:
            value = yaml.load(text, Loader=_NumberLoader)
        except yaml.YAMLError as error:
            raise RequestError(f"--set {override!r}: the value is not YAML") from error
        for key in reversed(path.split(".")):
            value = {key: value}
        changes = _merge(changes, value)
    return changes


class _NumberLoader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as text; here, as in YAML 1.2, it is a number."""


_NumberLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def _explain(error: ValidationError) -> RequestError:
    """One sentence for the first thing that is wrong with a recipe."""
    first = error.errors()[0]
    path = _field_path(first["loc"])
    if first["type"] == "extra_forbidden":
        section: Any = Recipe
        for part in first["loc"][:-1]:
            section = section.model_fields[part].annotation
        return unknown_name("recipe field", path, _paths(section, first["loc"][:-1]))
    where = f"recipe field {path}" if path else "recipe"
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, RequestError):
        return cause
    if isinstance(cause, ValueError):
        return RequestError(f"{where}: {cause}")
    return RequestError(f"{where}: {first['msg']}; given {first['input']!r}"[:600])


def _field_path(location: tuple[int | str, ...]) -> str:
    """The dotted name of a field; pydantic also names the alternatives of a union."""
    section: Any = Recipe
    names = []
    for part in location:
        names.append(str(part))
        field = section.model_fields.get(part)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            break
        section = field.annotation
    return ".".join(names)


def _paths(section: type[BaseModel], prefix: tuple[Any, ...]) -> list[str]:
    return [".".join([*map(str, prefix), name]) for name in section.model_fields]
