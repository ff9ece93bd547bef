"""Recipes: the built-in ones, what may be set and how, and that a wrong field is refused with the right names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from transformers import GPT2Config

from kronpress import Recipe, RequestError, load_recipe, make_plan
from kronpress.errors import unknown_name
from kronpress.matrices import STRUCTURES
from kronpress.recipe import POCKET_DEFAULTS, RECIPES, Budget, Healing, dump_recipe, read_recipe, recipe_names

every_recipe = pytest.mark.parametrize("name", recipe_names())


def write(folder: Path, fields: Any) -> Path:
    path = folder / "mine.yaml"
    path.write_text(fields if isinstance(fields, str) else yaml.safe_dump(fields), encoding="utf-8")
    return path


# ---- loading ----


def test_the_published_recipes_are_built_in() -> None:
    assert {"krony-67m", "krony-80m-2", "krony-81m", "krony-92m-4", "krony-96m", "low-rank"} <= set(recipe_names())


@every_recipe
def test_built_in_recipes_load_under_their_own_name_and_plan_gpt2(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert recipe.structure in (*STRUCTURES, "auto", "reduced")
    if recipe.allocation != "uniform":
        return  # planned from weights
    assert len((RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()) < 40
    plan = make_plan(GPT2Config(), recipe)
    assert plan.recipe == name
    assert plan.num_params < plan.num_params_dense


@every_recipe
@pytest.mark.parametrize("model", ["gpt2", "pocket"])
def test_dump_and_load_go_round(name: str, model: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, ["budget.kept_of_targets=0.7", "healing.learning_rate=3e-4"], model)
    text = dump_recipe(recipe)
    assert load_recipe(yaml.safe_load(text)) == recipe
    assert load_recipe(write(tmp_path, text)) == recipe
    assert load_recipe(str(write(tmp_path, text))) == recipe


def test_a_recipe_made_in_python_goes_round() -> None:
    recipe = Recipe(spec={"right_shape": (1, 2), "num_terms": 1}, targets=["mlp"], budget=Budget(bytes=10))
    assert load_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe


def test_loading_leaves_the_given_dictionary_and_the_pocket_defaults_alone() -> None:
    fields = {"model": "pocket", "budget": {"params": 5}, "healing": {"max_steps": 7}}
    before, defaults = yaml.safe_dump(fields), yaml.safe_dump(POCKET_DEFAULTS)
    load_recipe(fields, ["budget.bytes=3", "healing.max_steps=9", "evaluation.window=4"])
    assert yaml.safe_dump(fields) == before
    assert yaml.safe_dump(POCKET_DEFAULTS) == defaults


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("krony96m", r"unknown recipe 'krony96m': did you mean 'krony-96m'.*Allowed: .*low-rank"),
        ("nowhere/mine.yaml", r"no recipe file 'nowhere/mine.yaml'"),
        ("mine.yml", r"no recipe file 'mine.yml'"),
    ],
)
def test_a_recipe_that_does_not_exist_is_refused(source: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_recipe(source)


@pytest.mark.parametrize(
    ("text", "message"), [("a: [1", "not YAML"), ("- a\n- b", "not a mapping"), ("", "not a mapping")]
)
def test_a_file_that_is_no_recipe_is_refused_by_its_path(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=rf"mine\.yaml.*{message}"):
        load_recipe(write(tmp_path, text))


# ---- overrides ----


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("healing.learning_rate=1e-3", ("healing", "learning_rate"), 1e-3),
        ("healing.learning_rate=1E-3", ("healing", "learning_rate"), 1e-3),
        ("healing.learning_rate=2.5e-4", ("healing", "learning_rate"), 2.5e-4),
        ("healing.learning_rate=1.e-3", ("healing", "learning_rate"), 1e-3),
        ("healing.learning_rate=0.01", ("healing", "learning_rate"), 0.01),
        ("healing.tokens=1e6", ("healing", "tokens"), 1_000_000),
        ("healing.tokens=280_000_000", ("healing", "tokens"), 280_000_000),
        ("healing.max_steps=null", ("healing", "max_steps"), None),
        ("healing.data=a.txt", ("healing", "data"), "a.txt"),
        ("healing.data=[a.txt, b=c.txt]", ("healing", "data"), ["a.txt", "b=c.txt"]),
        ("evaluation.data=hub/set@main", ("evaluation", "data"), "hub/set@main"),
        ("budget.kept_of_model=1", ("budget", "kept_of_model"), 1.0),
        ("seed=3", ("seed",), 3),
        ("name=1e-3-run", ("name",), "1e-3-run"),
    ],
)
def test_overrides_are_read_as_yaml_with_numbers_as_people_write_them(
    override: str, path: tuple[str, ...], value: Any
) -> None:
    found: Any = load_recipe("krony-96m", [override])
    for part in path:
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_overrides_change_nothing_else_and_the_last_one_counts() -> None:
    recipe = load_recipe("krony-96m", ["healing.max_steps=5", "spec.num_terms=2", "healing.max_steps=6"])
    expected = load_recipe("krony-96m").model_dump()
    expected["healing"]["max_steps"] = 6
    expected["spec"]["num_terms"] = 2
    assert recipe.model_dump() == expected


@pytest.mark.parametrize("override", ["seed", "=3", "healing.max_steps", ""])
def test_an_override_without_path_or_value_is_refused(override: str) -> None:
    with pytest.raises(RequestError, match=r"expected path\.to\.field=value"):
        load_recipe("low-rank", [override])


def test_an_override_that_is_no_yaml_is_refused() -> None:
    with pytest.raises(RequestError, match=r"'healing\.data=\[a'.*not YAML"):
        load_recipe("low-rank", ["healing.data=[a"])


def test_a_budget_that_is_set_replaces_the_one_of_the_recipe() -> None:
    assert load_recipe("low-rank").budget == Budget(kept_of_targets=0.5)
    assert load_recipe("low-rank", ["budget.params=1000"]).budget == Budget(params=1000)
    assert load_recipe({"budget": {"bytes": 7}}, ["budget.kept_of_model=0.5"]).budget == Budget(kept_of_model=0.5)
    assert load_recipe("low-rank", ["seed=1"]).budget == Budget(kept_of_targets=0.5)
    with pytest.raises(RequestError, match="params and bytes are both set"):
        load_recipe("low-rank", ["budget.params=1000", "budget.bytes=1000"])


# ---- the bundled model ----


@pytest.mark.parametrize("by", ["argument", "override"])
def test_with_pocket_a_built_in_recipe_takes_the_bundled_data_and_schedule(by: str) -> None:
    overrides = ["model=pocket"] if by == "override" else []
    recipe = load_recipe("krony-96m", overrides, "pocket" if by == "argument" else None)
    assert recipe.model == "pocket"
    assert (recipe.healing.data, recipe.evaluation.data) == ("bundled", "bundled")
    for field, value in POCKET_DEFAULTS["healing"].items():
        assert getattr(recipe.healing, field) == value
    elsewhere = load_recipe("krony-96m", model="gpt2-medium")
    assert (elsewhere.model, elsewhere.healing.data) == ("gpt2-medium", "openwebtext")
    assert recipe.spec == elsewhere.spec


def test_with_pocket_what_a_file_says_stays_and_overrides_are_on_top(tmp_path: Path) -> None:
    fields = {"model": "pocket", "structure": "low_rank", "healing": {"max_steps": 7, "data": "mine.txt"}}
    for source in (fields, write(tmp_path, fields)):
        healing = load_recipe(source, ["healing.sequence_length=64"]).healing
        assert (healing.max_steps, healing.data, healing.sequence_length) == (7, "mine.txt", 64)
        assert healing.learning_rate == POCKET_DEFAULTS["healing"]["learning_rate"]
        assert load_recipe(source, ["healing.data=other.txt"]).healing.data == "other.txt"
    assert load_recipe("krony-96m", ["healing.max_steps=3"], "pocket").healing.max_steps == 3
    assert load_recipe("krony-96m", ["evaluation.data=a.txt"], "pocket").evaluation.data == "a.txt"


def test_the_model_argument_counts_more_than_the_recipe_and_its_overrides() -> None:
    assert load_recipe({"model": "pocket"}, model="gpt2").healing.data == Healing().data
    assert load_recipe("krony-96m", ["model=gpt2"], "pocket").model == "pocket"


# ---- what is refused ----


@pytest.mark.parametrize(
    ("fields", "near", "allowed"),
    [
        ({"budgets": {}}, "'budget'", "structure"),
        ({"healing": {"max_step": 3}}, "'healing.max_steps'", "healing.learning_rate"),
        ({"budget": {"param": 3}}, "'budget.params'", "budget.kept_of_targets"),
        ({"evaluation": {"strides": 3}}, "'evaluation.stride'", "evaluation.window"),
        ({"spec": {"num_term": 3}}, "'num_terms'", "right_shape"),
        ({"structure": "kroneker"}, "'kronecker'", "low_rank"),
    ],
    ids=str,
)
def test_an_unknown_name_is_refused_with_the_nearest_and_all_allowed(
    fields: dict[str, Any], near: str, allowed: str
) -> None:
    with pytest.raises(RequestError) as caught:
        load_recipe(fields)
    hint, _, rest = str(caught.value).partition("Allowed: ")
    assert f"did you mean {near}" in hint
    assert {near.strip("'"), allowed} <= set(rest.split(", "))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"seed": -1}, "seed"),
        ({"targets": 3}, "targets"),
        ({"healing": 3}, "healing"),
        ({"healing": {"max_steps": "many"}}, "healing.max_steps"),
        ({"healing": {"tokens": 0}}, "healing.tokens"),
        ({"healing": {"learning_rate": 0}}, "healing.learning_rate"),
        ({"budget": {"kept_of_model": 1.5}}, "budget.kept_of_model"),
        ({"budget": {"kept_of_targets": 0}}, "budget.kept_of_targets"),
        ({"budget": {"params": 1.5}}, "budget.params"),
        ({"budget": 0.5}, "budget"),
        ({"budget": {"params": 1, "bytes": 1}}, "params and bytes are both set"),
        ({"budget": {"kept_of_model": 0.5, "kept_of_targets": 0.5}}, "kept_of_targets and kept_of_model are both set"),
        ({"healing": {"language_model_weight": 0}}, "nothing to minimise"),
        ({"healing": {"sequences_per_step": 8, "sequences_per_pass": 3}}, "3 does not divide 8"),
    ],
    ids=str,
)
def test_a_value_that_cannot_be_is_refused_with_its_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        load_recipe(fields)
    assert field in str(caught.value)
    assert "\n" not in str(caught.value)


def test_recipes_are_frozen_and_every_field_is_described() -> None:
    recipe = load_recipe("krony-96m")
    with pytest.raises(ValidationError):
        recipe.seed = 1
    with pytest.raises(ValidationError):
        recipe.healing.max_steps = 1
    sections = [Recipe, *(type(value) for _, value in recipe if hasattr(value, "model_fields_set"))]
    for section in sections:
        described = {name for name, field in section.model_fields.items() if field.description}
        nested = {name for name, value in recipe if hasattr(value, "model_fields_set")}
        assert described == set(section.model_fields) - (nested if section is Recipe else set())


# ---- derived values ----


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({"max_steps": 7}, 7),
        ({"max_steps": 0}, 0),
        ({"tokens": 10 * 4 * 16}, 10),
        ({"tokens": 10 * 4 * 16 - 1}, 9),
        ({"tokens": 1}, 1),
        ({"max_steps": 7, "tokens": 10 * 4 * 16}, 7),
        ({"max_steps": 12, "tokens": 10 * 4 * 16}, 10),
        ({"max_steps": 0, "tokens": 10 * 4 * 16}, 0),
    ],
    ids=str,
)
def test_healing_stops_at_steps_or_tokens_whichever_comes_first(fields: dict[str, int], steps: int) -> None:
    assert Healing(sequences_per_step=4, sequence_length=16, **fields).num_steps == steps


def test_healing_without_end_is_refused() -> None:
    with pytest.raises(RequestError, match=r"healing\.max_steps or healing\.tokens"):
        _ = Healing().num_steps


def test_sizes_are_fixed_when_none_is_left_for_a_budget() -> None:
    assert Recipe(spec={"right_shape": [1, 2], "num_terms": 1}).has_fixed_sizes
    assert Recipe(structure="low_rank", spec={"rank": 1}).has_fixed_sizes
    assert not Recipe(spec={"right_shape": [1, 2]}).has_fixed_sizes
    assert not Recipe(spec={"num_terms": 1}).has_fixed_sizes
    assert not Recipe(structure="low_rank").has_fixed_sizes


def test_unknown_names_far_from_all_others_get_the_list_alone() -> None:
    assert str(unknown_name("recipe", "zzz", ["a", "b"])) == "unknown recipe 'zzz': Allowed: a, b"
    assert str(unknown_name("x", "ab", iter(["abc", "q"]))) == "unknown x 'ab': did you mean 'abc'? Allowed: abc, q"


def test_tokens_set_by_hand_replace_the_pocket_steps() -> None:
    for source, changes in [("low-rank", ["healing.tokens=1e6"]), ({"healing": {"tokens": 10**6}}, [])]:
        assert load_recipe(source, changes, "pocket").healing.num_steps == 10**6 // (8 * 256)
    both = load_recipe("low-rank", ["healing.tokens=1e6", "healing.max_steps=3"], "pocket")
    assert both.healing.num_steps == 3


def test_a_field_of_several_types_is_named_without_the_type() -> None:
    with pytest.raises(RequestError, match=r"^recipe field targets: "):
        load_recipe("low-rank", ["targets=5"])


@pytest.mark.parametrize("name", recipe_names())
def test_no_recipe_puts_a_whole_step_in_memory_at_once(name: str) -> None:
    healing = load_recipe(name).healing
    assert (healing.sequences_per_pass or healing.sequences_per_step) * healing.sequence_length <= 8192
