"""A recipe of several stages: each is planned, fitted and healed on what the stages before it left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from transformers import AutoModelForCausalLM

import kronpress as kp
from kronpress import cli
from kronpress.pipeline import Messages, run
from kronpress.plan import Plan

STAGES: list[dict[str, Any]] = [
    {"share": 0.25, "targets": "embedding", "spec": {"right_shape": [1, 2], "num_terms": 1}},
    {"share": 0.5, "targets": "mlp", "structure": "low_rank", "budget": {"kept_of_targets": 0.5}},
    {"share": 0.25, "targets": "embedding", "spec": {"right_shape": [1, 4], "num_terms": 1}},
]


@pytest.fixture(scope="module")
def job(tmp_path_factory, tiny_model, save_tiny_checkpoint, tiny_text):
    """Recipe changes -> a staged recipe for a tiny checkpoint and text on disk, healed for eight steps."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "heal.txt").write_text(tiny_text, encoding="utf-8")
    (folder / "test.txt").write_text(tiny_text[300:700], encoding="utf-8")
    save_tiny_checkpoint(tiny_model("gpt2"), folder / "dense")

    def build(**changes: Any) -> kp.Recipe:
        healing = {
            "data": str(folder / "heal.txt"),
            "max_steps": 8,
            "sequences_per_step": 2,
            "sequence_length": 16,
            "learning_rate": 1e-3,
            **changes.pop("healing", {}),
        }
        fields = {"model": str(folder / "dense"), "name": "staged", "stages": STAGES, "healing": healing}
        return kp.load_recipe({**fields, "evaluation": {"data": str(folder / "test.txt")}, **changes})

    return build


def names_of(results: dict[str, Any]) -> list[str]:
    return [row["name"] for row in results["rows"]]


def test_the_parts_have_their_share_of_the_healing_and_their_own_fields(job) -> None:
    parts = job(healing={"tokens": 1000, "distillation_weight": 1.0}).parts
    assert [part.healing.max_steps for part in parts] == [2, 4, 2]
    assert [part.healing.tokens for part in parts] == [250, 500, 250]
    assert [part.targets for part in parts] == ["embedding", "mlp", "embedding"]
    assert [part.structure for part in parts] == ["kronecker", "low_rank", "kronecker"]
    assert parts[1].spec == {}
    assert parts[1].budget.kept_of_targets == 0.5
    assert parts[0].budget.kept_of_targets is None
    assert all(part.healing.distillation_weight == 1.0 and not part.stages for part in parts)
    assert job(stages=[]).parts == [job(stages=[])]


def test_a_run_measures_every_stage_and_saves_the_last(job, tmp_path: Path) -> None:
    results = run(job(), tmp_path / "run")
    assert names_of(results) == [
        "dense",
        *(f"staged, stage {n} of 3{after}" for n in (1, 2) for after in ("", ", healed")),
        "staged",
        "staged, healed",
    ]
    plan = Plan.model_validate(results["plan"])
    assert (plan.stage, len(plan.layers)) == (3, 5)
    assert set(results["layers"]) == set(plan.layers)
    assert [stage["healing"]["num_steps"] for stage in results["stages"]] == [2, 4]
    assert results["healing"]["num_steps"] == 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert sum({p.data_ptr(): p.numel() for p in loaded.parameters()}.values()) == plan.num_params
    assert results["rows"][-1]["num_params"] == plan.num_params
    assert json.loads((tmp_path / "run" / "plan.json").read_text()) == results["plan"]
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["dtype"] == "float32"


def test_stages_are_healed_on_tokens_that_follow_one_another(job, tmp_path: Path, monkeypatch) -> None:
    from kronpress.pipeline import whole_run

    seen = []
    heal_ = whole_run.heal_

    def spy(model: Any, teacher: Any, tokens: kp.TrainData, healing: Any, **more: Any) -> Any:
        seen.append(tokens.streams[0].read(0, healing.num_tokens)[0])
        return heal_(model, teacher, tokens, healing, **more)

    monkeypatch.setattr(whole_run, "heal_", spy)
    run(job(), tmp_path / "run")
    assert [len(tokens) for tokens in seen] == [64, 128, 64]
    whole = torch.cat(seen)
    monkeypatch.undo()
    recipe = job()
    tokenizer = kp.load_model(recipe.model).tokenizer
    torch.testing.assert_close(whole.int(), kp.load_train_tokens(tokenizer, recipe.healing.data, 256)[:256])


class Interrupted(Exception):
    pass


def interrupt_in(stage: int, step: int) -> Messages:
    begun: list[str] = []

    def healing(row: Any) -> None:
        if len(begun) == stage and row.step == step:
            raise Interrupted

    return Messages(
        stage=lambda text: begun.append(text) if text.startswith("healing ") and " takes " not in text else None,
        healing=healing,
    )


def test_an_interrupted_run_goes_on_in_the_stage_it_was_in(job, tmp_path: Path) -> None:
    recipe = job(healing={"save_steps": 1})
    run(recipe, tmp_path / "whole")
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(recipe, out, resume=True, messages=interrupt_in(stage=2, step=3))
    with pytest.raises(kp.RequestError, match="--resume goes on"):
        run(recipe, out)
    said: list[str] = []
    results = run(recipe, out, resume=True, messages=Messages(said.append, lambda _: None))
    assert results["resumed_at_steps"] == [2 + 2]
    assert [text for text in said if text.startswith("compressing")] == [
        "compressing by staged, stage 2",
        "compressing by staged, stage 3",
    ]
    expected = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert results["rows"] == expected["rows"]
    assert (out / "model/model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model/model.safetensors"
    ).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "run"}


def test_rivals_have_the_size_of_the_last_stage(job, tmp_path: Path) -> None:
    results = run(job(rivals=["low-rank", "blocks"], healing={"max_steps": 4}), tmp_path / "run")
    plan = results["plan"]
    rival = next(row for row in results["rows"] if row["name"] == "low-rank")
    assert 0.9 * plan["num_params"] < rival["num_params"] <= plan["num_params"]


def test_a_measured_stage_is_planned_when_its_turn_comes(job, tmp_path: Path) -> None:
    stages = [
        STAGES[0],
        {
            "share": 0.75,
            "targets": "mlp",
            "structure": "auto",
            "candidates": ["low_rank"],
            "allocation": "measured",
            "weighting": {"metric": "loss", "sequential": True},
            "calibration": {"data": job().healing.data, "windows": 8, "sequence_length": 16},
            "budget": {"kept_of_targets": 0.5},
        },
    ]
    results = run(job(stages=stages), tmp_path / "run")
    plan = Plan.model_validate(results["plan"])
    assert plan.allocation is not None
    assert "transformer.wte" in plan.layers
    with pytest.raises(kp.RequestError, match="stage 2 of 'staged': a measured allocation needs moments"):
        kp.make_plan(kp.load_model(job().model).model, job(stages=stages))
    with pytest.raises(kp.RequestError, match="rivals of 'staged' are to have its size"):
        run(job(stages=stages, rivals=["low-rank"]), tmp_path / "with-rivals")


def test_a_measured_stage_without_room_is_refused_before_the_first_is_begun(job, tmp_path: Path) -> None:
    measured = {
        "share": 0.75,
        "targets": "mlp",
        "structure": "auto",
        "allocation": "measured",
        "weighting": {"metric": "loss"},
        "budget": {"params": 100},
    }
    said: list[str] = []
    with pytest.raises(kp.RequestError, match="stage 2 of 'staged': budget of 100 parameters"):
        run(job(stages=[STAGES[0], measured]), tmp_path / "run", messages=Messages(said.append, lambda _: None))
    assert not [text for text in said if text.startswith(("compressing", "healing"))]


# ---- budgets ----


@given(kept=st.floats(0.3, 0.95), of=st.sampled_from(["params", "kept_of_model", "bytes"]))
@settings(max_examples=15, deadline=None)
def test_a_budget_of_the_model_is_what_the_last_stage_leaves_at_most(job, tiny_model, kept: float, of: str) -> None:
    model = tiny_model("gpt2")
    dense = sum(p.numel() for p in model.parameters())
    budget = {of: {"params": int(kept * dense), "kept_of_model": kept, "bytes": int(4 * kept * dense)}[of]}
    stages = [STAGES[0], {"share": 0.75, "targets": "blocks", "structure": "low_rank", "spec": {}}]
    recipe = job(stages=stages, budget=budget)
    first, last = recipe.parts
    assert (first.budget, last.budget) == (kp.recipe.Budget(), recipe.budget)
    try:
        plan = kp.make_plan(model, recipe)
    except kp.RequestError as error:
        assert "stage 2" in str(error) and "the least possible is" in str(error)
        assert int(str(error).split()[-4]) > kept * dense
    else:
        assert plan.num_params <= kept * dense
        # It is used: one more rank of each targeted matrix would not fit.
        assert kept * dense - plan.num_params < 2 * (64 * 4 + 64 + 3 * 16 + 2 * 16 + 16)


def test_a_fraction_of_the_targets_is_that_of_each_stage(job, tiny_model) -> None:
    stages = [
        {"share": 0.5, "targets": "attention", "structure": "low_rank", "spec": {}},
        {"share": 0.5, "targets": "mlp", "structure": "low_rank", "spec": {}, "budget": {"kept_of_targets": 0.25}},
    ]
    recipe = job(stages=stages, budget={"kept_of_targets": 0.5})
    assert [part.budget.kept_of_targets for part in recipe.parts] == [0.5, 0.25]


def test_sizes_that_no_budget_can_change_have_to_meet_it(job, tiny_model) -> None:
    model, fixed = tiny_model("gpt2"), [STAGES[0], {**STAGES[2], "share": 0.75}]
    size = kp.make_plan(model, job(stages=fixed)).num_params
    assert kp.make_plan(model, job(stages=fixed, budget={"params": size})).num_params == size
    with pytest.raises(kp.RequestError, match=f"stage 2 .*fixed sizes that leave .* {size} in the model"):
        kp.make_plan(model, job(stages=fixed, budget={"params": size - 1}))


@pytest.mark.parametrize(
    ("first", "last", "message"),
    [
        ({"structure": "low_rank"}, {}, r"stage 1 has neither fixed sizes nor a budget.*stages\.0\.budget\.kept_of"),
        ({}, {"budget": {"kept_of_targets": 0.5}}, "last stage leaves, and stage 2 has one of its own"),
    ],
)
def test_a_budget_of_the_model_that_says_nothing_to_a_stage_is_refused(
    job, first: dict[str, Any], last: dict[str, Any], message: str
) -> None:
    sizes = {} if first else {"spec": {"right_shape": [1, 2], "num_terms": 1}}
    stages = [{"share": 0.5, **first, **sizes}, {"share": 0.5, "structure": "low_rank", **last}]
    with pytest.raises(kp.RequestError, match=message):
        job(stages=stages, budget={"params": 10_000})


@pytest.mark.parametrize("field", ["data", "tokens", "max_steps"])
def test_what_stages_share_is_not_a_stages_own(job, field: str) -> None:
    with pytest.raises(kp.RequestError, match=rf"stage 2: healing\.{field} is the whole recipe's"):
        job(stages=[STAGES[0], {"share": 0.75, "healing": {field: 5}}])


# ---- --set ----


@pytest.mark.parametrize(
    ("change", "deaf"),
    [
        ("targets=attention", [0, 1, 2]),
        ("spec.num_terms=2", [0, 2]),
        ("structure=low_rank", [1]),
        ("budget.kept_of_targets=0.4", [1]),
        ("weighting.metric=loss", [0]),
        ("healing.learning_rate=1e-3", [2]),
    ],
)
def test_a_change_that_a_stage_would_not_see_is_refused_with_where_to_make_it(
    job, change: str, deaf: list[int]
) -> None:
    stages = [
        {**STAGES[0], "weighting": {"metric": "input"}},
        STAGES[1],
        {**STAGES[2], "healing": {"learning_rate": 1}},
    ]
    fields = job(stages=stages).model_dump(mode="json", exclude_unset=True)
    path, value = change.split("=")
    with pytest.raises(kp.RequestError) as caught:
        kp.load_recipe(fields, [change])
    assert f"--set {path}: stages of recipe 'staged' have {path.split('.num')[0].split('.kept')[0]} of" in str(
        caught.value
    )
    there = [f"stages.{number}.{path}=" for number in deaf]
    assert str(caught.value).count("--set stages.") == len(deaf)
    assert all(f"--set {place}" in str(caught.value) for place in there)
    # What the message says works, and then the recipe's own may be changed as well.
    for more in ([], [change] if path not in ("targets", "structure") else []):
        changed = kp.load_recipe(fields, [*(f"{place}{value}" for place in there), *more])
        for number in deaf:
            found: Any = changed.parts[number]
            for name in path.split("."):
                found = found[name] if isinstance(found, dict) else getattr(found, name)
            assert str(found) == str(json.loads(value) if value[0].isdigit() else value)


def test_a_change_that_all_stages_see_is_made(job) -> None:
    fields = job().model_dump(mode="json", exclude_unset=True)
    for number, part in enumerate(kp.load_recipe(fields, ["head=dense", "calibration.windows=3", "seed=5"]).parts):
        assert (part.head, part.calibration.windows, part.seed) == ("dense", 3, 5), number
    last = kp.load_recipe(fields, ["stages.2.spec.right_shape=[1, 8]", "stages.2.targets=mlp"]).parts[2]
    assert (last.targets, last.spec) == ("mlp", {"right_shape": [1, 8], "num_terms": 1})


def test_a_budget_of_the_model_does_not_need_to_reach_the_stages_before_the_last(job, tiny_model) -> None:
    fields = job().model_dump(mode="json", exclude_unset=True)
    size = kp.make_plan(tiny_model("gpt2"), job()).num_params
    assert kp.make_plan(tiny_model("gpt2"), kp.load_recipe(fields, [f"budget.params={size}"])).num_params == size
    with pytest.raises(kp.RequestError, match="stage 3 of 'staged'"):
        kp.make_plan(tiny_model("gpt2"), kp.load_recipe(fields, [f"budget.params={size - 1}"]))
    replaced = kp.load_recipe(fields, ["stages.1.budget.params=9000"])
    assert replaced.stages[1]["budget"] == {"params": 9000}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stages.3.targets=mlp", r"recipe field stages\.3: stages are numbered from 0 to 2"),
        ("stages.0.target=mlp", "field of stage 1 'target'.*targets"),
        ("stages.first.targets=mlp", "recipe field stages: "),
        ("healing.phases.0.share=1", r"recipe field healing\.phases"),
    ],
)
def test_a_change_of_a_stage_that_cannot_be_is_refused(job, change: str, message: str) -> None:
    with pytest.raises(kp.RequestError, match=message):
        kp.load_recipe(job().model_dump(mode="json", exclude_unset=True), [change])
    with pytest.raises(kp.RequestError, match=r"recipe field stages\.0: the recipe has no stages"):
        kp.load_recipe("low-rank", ["stages.0.share=1"])


# ---- what is told ----


def test_the_plan_counts_the_targets_of_all_stages(job, tiny_model) -> None:
    plan = kp.make_plan(tiny_model("gpt2"), job())
    assert plan.num_params_targets == sum(layer.num_params for layer in plan.layers.values())
    assert plan.num_params_targets_dense == sum(layer.num_params_dense for layer in plan.layers.values())
    assert plan.kept_of_targets == plan.num_params_targets / plan.num_params_targets_dense


def test_a_rival_of_one_stage_is_announced_without_a_stage(job, tmp_path: Path) -> None:
    said: list[str] = []
    run(
        job(rivals=["low-rank"], healing={"max_steps": 4}),
        tmp_path / "run",
        messages=Messages(said.append, lambda _: None),
    )
    compressing = [text for text in said if text.startswith("compressing")]
    assert compressing == [*(f"compressing by staged, stage {n}" for n in (1, 2, 3)), "compressing by low-rank"]


def test_a_rival_of_stages_is_refused_before_any_work(job, tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(kp.RequestError, match="rival 'tqcompressor' has stages"):
        run(job(rivals=["tqcompressor"]), tmp_path / "run", messages=Messages(said.append, lambda _: None))
    assert said == []


def test_the_spectrum_is_of_what_all_stages_target(job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "staged.yaml").write_text(kp.recipe.dump_recipe(job()), encoding="utf-8")
    words = ["plan", job().model, "--recipe", str(tmp_path / "staged.yaml"), "--spectrum", "--json"]
    assert cli.main(words) == 0
    document = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in document["spectrum"]["rows"]} == document["layers"].keys()


def test_at_once_it_is_calibrated_as_the_first_stage_that_is(job) -> None:
    stages = [STAGES[0], {**STAGES[1], "weighting": {"metric": "input"}, "calibration": {"windows": 3}}, STAGES[2]]
    at_once = job(stages=stages).in_one_stage
    assert at_once.stages == [] and at_once.targets == ["embedding", "mlp"]
    assert (at_once.weighting.metric, at_once.calibration.windows) == ("input", 3)
    assert job(stages=[]).in_one_stage == job(stages=[])


def test_compress_does_all_stages_without_healing(job, tmp_path: Path) -> None:
    from kronpress.checkpoint import load_model
    from kronpress.pipeline import compress_stages_

    loaded = load_model(job().model)
    plan, layers = compress_stages_(loaded, job(), lambda _: None)
    assert plan == kp.make_plan(load_model(job().model).model, job())
    assert set(layers) == set(plan.layers)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"share": 1, "target": "mlp"}], "field of stage 1 'target'.*targets"),
        ([{"share": 0.5}, {"share": 0.4}], "add up to 0.9, not 1"),
        ([{"targets": "mlp"}], "stage 1 needs a share"),
        ([{"share": 2}], "stage 1 needs a share"),
        ([{"share": 1, "spec": {"rank": 2}}], "rank"),
        ([{"share": 1, "structure": "kronecke"}], "kronecke"),
    ],
)
def test_wrong_stages_are_refused(job, stages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(kp.RequestError, match=message):
        job(stages=stages)


def test_a_later_stage_that_cannot_be_is_refused_before_the_first_is_begun(job, tmp_path: Path) -> None:
    spec = {"right_shape": [2, 2], "num_terms": 1}
    rotated = {"share": 0.5, "targets": "mlp", "spec": spec, "head": "dense", "rotation": True}
    recipe = job(stages=[rotated, rotated])
    said: list[str] = []
    with pytest.raises(kp.RequestError, match="stage 2 of 'staged': rotation"):
        run(recipe, tmp_path / "run", messages=Messages(said.append, lambda _: None))
    assert not [text for text in said if text.startswith(("compressing", "healing"))]
    from kronpress.pipeline import compress_stages_

    with pytest.raises(kp.RequestError, match="stage 2 of 'staged': rotation"):
        compress_stages_(kp.load_model(recipe.model), recipe, lambda _: None)


def test_a_folding_that_no_sum_sees_and_a_rotation_of_coordinates_are_refused(job) -> None:
    model = kp.load_model(job().model).model
    low_rank = {"stages": [], "structure": "low_rank", "budget": {"kept_of_targets": 0.5}}
    with pytest.raises(kp.RequestError, match=r"folding \['mlp'\].*none is planned"):
        kp.make_plan(model, job(**low_rank, folding=["mlp"]))
    with pytest.raises(kp.RequestError, match=r"^recipe: rotation: the metric magnitude"):
        job(**low_rank, rotation=True, weighting={"metric": "magnitude"})
