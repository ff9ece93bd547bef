"""From a name, a YAML file or a dictionary, and what `--set` says, to a recipe; and back to YAML."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from kronpress.errors import RequestError, unknown_name
from kronpress.recipe.fields import Fields, explain, leaves, merge
from kronpress.recipe.recipe import STAGE_FIELDS, Recipe

POCKET = "pocket"
RECIPES = resources.files("kronpress") / "recipes"
# Sections that a stage replaces as a whole.
_REPLACED = ("spec", "fit", "budget")

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

    Values are read as YAML. Setting one `budget.*` replaces the recipe's budget. What a stage sets itself is changed
    there, `stages.0.targets=mlp`, counted from 0. With the model `pocket`, data and schedule not set by hand become
    those of POCKET_DEFAULTS.

    >>> load_recipe("krony-96m", ["healing.max_steps=5"], model="pocket").healing.data
    'bundled'

    Raises:
        RequestError: no such recipe, an unknown field (the nearest valid names are given), a bad value, or an override
            that a stage would not see, since it sets the field itself.
    """
    fields = read_recipe(source)
    changes = _parse_overrides(overrides or [])
    if model is not None:
        changes["model"] = model
    if changes.get("model", fields.get("model")) == POCKET:
        # What a file or dictionary says was set by hand; what a built-in recipe says is meant for GPT-2.
        built_in = isinstance(source, str) and source in recipe_names()
        by_hand = [changes] if built_in else [fields, changes]
        fields = merge(fields, POCKET_DEFAULTS) if built_in else merge(POCKET_DEFAULTS, fields)
        if _set_by_hand("tokens", by_hand) and not _set_by_hand("max_steps", by_hand):
            fields["healing"]["max_steps"] = None
    fields = {"stages": [], **fields}
    _check_reach(fields, changes)
    try:
        return Recipe.model_validate(merge(_without_replaced_budgets(fields, changes), changes))
    except ValidationError as error:
        raise explain(error, Recipe) from error


def _check_reach(fields: Fields, changes: Fields) -> None:
    """Refuse changes that a stage would not see, since it sets the same field itself.

    A stage whose own field is changed by hand as well is not meant. A budget of the whole model is the last stage's.
    """
    stages, by_hand = fields.get("stages"), changes.get("stages", {})
    if not isinstance(stages, list) or not isinstance(by_hand, dict):
        return
    for path in leaves({name: value for name, value in changes.items() if name in STAGE_FIELDS}):
        of_the_model = path[0] == "budget" and path[1:] != ("kept_of_targets",)
        deaf = [
            number
            for number, stage in enumerate(stages)
            if _sets(stage, path)
            and not _sets(by_hand.get(str(number)), path)
            and (number == len(stages) - 1 or not of_the_model)
        ]
        if deaf:
            field, name = ".".join(path), fields.get("name", "custom")
            raise RequestError(
                f"--set {field}: stages of recipe {name!r} have {path[0] if path[0] in _REPLACED else field} of their "
                "own and would not see it; change it there: "
                + ", ".join(f"--set stages.{number}.{field}=..." for number in deaf)
            )


def _sets(stage: Any, path: tuple[str, ...]) -> bool:
    """Whether the stage's fields say what is at `path`."""
    for name in path[:1] if path[0] in _REPLACED else path:
        if not isinstance(stage, dict) or name not in stage:
            return False
        stage = stage[name]
    return True


def _without_replaced_budgets(fields: Fields, changes: Fields) -> Fields:
    """The fields without a budget, of the recipe or of a stage, in whose stead the changes have another."""
    if "budget" in changes:
        fields = {**fields, "budget": {}}
    stages, by_hand = fields.get("stages"), changes.get("stages")
    if isinstance(stages, list) and isinstance(by_hand, dict):
        cleared = [
            {**stage, "budget": {}} if _sets(by_hand.get(str(number)), ("budget",)) else stage
            for number, stage in enumerate(stages)
        ]
        fields = {**fields, "stages": cleared}
    return fields


def _set_by_hand(name: str, layers: list[dict[str, Any]]) -> bool:
    healing = [layer.get("healing") for layer in layers]
    return any(isinstance(section, dict) and section.get(name) is not None for section in healing)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `load_recipe` of it gives the same recipe."""
    # Lines end with the word that passes the width.
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=66)


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
        changes = merge(changes, value)
    return changes


class _NumberLoader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as text; here, as in YAML 1.2, it is a number."""


_NumberLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)
