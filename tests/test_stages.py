"""A recipe of several stages: each is planned, fitted and healed on what the stages before it left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import kronpress as kp
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
    from kronpress import pipeline

    seen = []
    heal_ = pipeline.heal_

    def spy(model: Any, teacher: Any, tokens: torch.Tensor, healing: Any, **more: Any) -> Any:
        seen.append(tokens[: healing.num_tokens])
        return heal_(model, teacher, tokens, healing, **more)

    monkeypatch.setattr(pipeline, "heal_", spy)
    run(job(), tmp_path / "run")
    assert [len(tokens) for tokens in seen] == [64, 128, 64]
    whole = torch.cat(seen)
    monkeypatch.undo()
    recipe = job()
    tokenizer = kp.load_model(recipe.model).tokenizer
    torch.testing.assert_close(whole, kp.load_train_tokens(tokenizer, recipe.healing.data, 256)[:256])


class Interrupted(Exception):
    pass


def interrupt_in(stage: int, step: int) -> Messages:
    begun: list[str] = []

    def healing(row: Any) -> None:
        if len(begun) == stage and row.step == step:
            raise Interrupted

    return Messages(stage=lambda text: begun.append(text) if text.startswith("healing") else None, healing=healing)


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
