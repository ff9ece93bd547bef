"""A run directory is complete and true: its model is the one that was measured, interrupted or not."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file

import kronpress as kp
from kronpress.pipeline import Messages, compress_stages_, run, whole_run
from kronpress.plan import Plan
from kronpress.recipe import dump_recipe

JobFactory = Callable[..., kp.Recipe]


@pytest.fixture(scope="module")
def job(tmp_path_factory, tiny_model, save_tiny_checkpoint, tiny_recipe, tiny_text) -> JobFactory:
    """family, dtype, recipe changes -> a recipe for a tiny dense checkpoint and text on disk, healed for six steps."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "heal.txt").write_text(tiny_text, encoding="utf-8")
    (folder / "test.txt").write_text(tiny_text[300:700], encoding="utf-8")

    def build(
        family: str = "gpt2", dtype: torch.dtype = torch.float32, structure: str = "kronecker", **changes: Any
    ) -> kp.Recipe:
        dense = folder / f"{family}-{dtype}"
        if not dense.exists():
            save_tiny_checkpoint(tiny_model(family).to(dtype), dense)
        healing = {
            "data": str(folder / "heal.txt"),
            "max_steps": 6,
            "sequences_per_step": 2,
            "sequence_length": 16,
            "learning_rate": 1e-3,
            **changes.pop("healing", {}),
        }
        fields = {"model": str(dense), "healing": healing, "evaluation": {"data": str(folder / "test.txt")}, **changes}
        return tiny_recipe(structure, **fields)

    return build


def content(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time of change and bytes of every file."""
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()
    }


def siblings(out: Path) -> set[str]:
    return {path.name for path in out.parent.iterdir()}


def read_results(out: Path) -> dict[str, Any]:
    def no_json(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON")

    return json.loads((out / "results.json").read_text(encoding="utf-8"), parse_constant=no_json)


def measure(model: torch.nn.Module, tokenizer: Any, recipe: kp.Recipe) -> dict[str, Any]:
    texts = [recipe.evaluation.data] if isinstance(recipe.evaluation.data, str) else recipe.evaluation.data
    return {name: kp.evaluate(model, tokenizer, kp.load_running_text(name, "test").text).to_json() for name in texts}


def assert_same_metrics(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for name, figures in expected.items():
        assert actual[name].keys() == figures.keys()
        for figure, value in figures.items():
            assert actual[name][figure] == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value)


# ---- a finished run ----


@pytest.fixture(
    scope="module", params=[("gpt2", torch.float32), ("gpt2", torch.float16), ("llama", torch.bfloat16)], ids=str
)
def finished(request, job, tmp_path_factory) -> tuple[kp.Recipe, Path, dict[str, Any]]:
    """The recipe, the run directory and what `run` returned; with low rank, one of MLPs only, and dense rivals."""
    folder = tmp_path_factory.mktemp("rivals")
    for name, changes in [("low-rank", {}), ("mlp-only", {"targets": "mlp"})]:
        text = dump_recipe(job(*request.param, structure="low_rank", name=name, **changes))
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    rivals = [*map(str, sorted(folder.iterdir())), "dense", "blocks", "8-bit", "4-bit"]
    recipe = job(*request.param, rivals=rivals)
    out = tmp_path_factory.mktemp("finished") / "run"
    return recipe, out, run(recipe, out)


def test_a_run_directory_holds_everything_and_nothing_hidden_stays(finished):
    _, out, results = finished
    assert {path.name for path in out.iterdir()} >= {"recipe.yaml", "plan.json", "results.json", "model"}
    assert siblings(out) == {"run"}
    assert read_results(out) == results


def test_recipe_and_plan_files_are_what_was_carried_out(finished):
    recipe, out, results = finished
    assert kp.load_recipe(out / "recipe.yaml") == recipe
    assert dump_recipe(kp.load_recipe(out / "recipe.yaml")) == (out / "recipe.yaml").read_text(encoding="utf-8")
    assert kp.Recipe.model_validate(results["recipe"]) == recipe
    plan = Plan.model_validate_json((out / "plan.json").read_text(encoding="utf-8"))
    assert plan == Plan.model_validate(results["plan"]) == kp.attached_plan(kp.load_model(str(out)).model)
    assert plan == kp.make_plan(kp.load_model(recipe.model).model, recipe)


def test_rows_are_dense_then_main_then_rivals(finished):
    _, _, results = finished
    assert [(row["name"], row["stage"]) for row in results["rows"]] == [
        ("dense", "dense"),
        ("tiny-kronecker", "compressed"),
        ("tiny-kronecker, healed", "healed"),
        ("low-rank", "compressed"),
        ("low-rank, healed", "healed"),
        ("mlp-only", "compressed"),
        ("mlp-only, healed", "healed"),
        ("dense, trained further", "healed"),
        ("1 of 2 blocks", "compressed"),
        ("1 of 2 blocks, healed", "healed"),
        ("dense, 8-bit", "compressed"),
        ("dense, 4-bit", "compressed"),
    ]
    assert all(row["continuation"].startswith(results["prompt"]) for row in results["rows"])


def test_the_saved_model_is_the_measured_one(finished):
    recipe, out, results = finished
    loaded = kp.load_model(str(out))
    assert_same_metrics(results["rows"][2]["metrics"], measure(loaded.model, loaded.tokenizer, recipe))
    assert (
        whole_run.continue_text(loaded.model, loaded.tokenizer, results["prompt"])
        == (results["rows"][2]["continuation"])
    )


def test_the_dense_row_is_the_model_that_was_given(finished):
    recipe, _, results = finished
    dense = kp.load_model(recipe.model)
    assert_same_metrics(results["rows"][0]["metrics"], measure(dense.model, dense.tokenizer, recipe))


def test_the_compressed_row_is_what_a_checkpoint_without_healing_would_hold(finished, tmp_path):
    recipe, _, results = finished
    given = kp.load_model(recipe.model)
    reports = kp.compress_(given.model, kp.make_plan(given.model, recipe))
    kp.save_checkpoint(given.model, given.tokenizer, tmp_path / "model", dtype=given.dtype)
    loaded = kp.load_model(str(tmp_path))
    assert_same_metrics(results["rows"][1]["metrics"], measure(loaded.model, loaded.tokenizer, recipe))
    assert results["layers"] == {name: report.model_dump(mode="json") for name, report in reports.items()}


def test_sizes_are_those_of_the_files(finished):
    recipe, out, results = finished
    for folder, row in [(Path(recipe.model), results["rows"][0]), (out / "model", results["rows"][2])]:
        stored = load_file(folder / "model.safetensors").values()
        assert row["num_params"] == sum(tensor.numel() for tensor in stored)
        assert row["bytes"] == sum(tensor.numel() * tensor.itemsize for tensor in stored)
    assert results["rows"][1]["num_params"] == results["rows"][2]["num_params"] == results["plan"]["num_params"]


def test_rivals_have_at_most_the_main_ones_parameters_and_its_training(finished):
    _, _, results = finished
    main = results["plan"]["num_params"]
    for rival, row in zip(results["rivals"][:2], results["rows"][4:8:2], strict=True):
        assert 0.8 * main < rival["plan"]["num_params"] <= main
        assert row["num_params"] == rival["plan"]["num_params"]
        for field in ("healing", "evaluation", "seed", "model"):
            assert rival["recipe"][field] == results["recipe"][field]
        assert rival["healing"]["num_steps"] == results["healing"]["num_steps"] == 6
    assert results["rivals"][1]["recipe"]["targets"] == "mlp"


def test_results_say_how_they_were_made(finished):
    recipe, _, results = finished
    assert results["model"]["name"] == recipe.model
    assert results["model"]["dtype"] == results["plan"]["dtype"] == str(kp.load_model(recipe.model).dtype)[6:]
    assert set(results["versions"]) >= {"kronpress", "torch", "transformers", "python"}
    assert results["device"]
    assert results["seed"] == 0
    assert results["seconds"] > 0
    assert results["resumed_at_steps"] == []
    assert list(results["data"]) == list(results["rows"][0]["metrics"])


def test_resuming_a_finished_run_changes_nothing(finished, monkeypatch):
    recipe, out, results = finished
    before = content(out)
    monkeypatch.setattr(whole_run, "load_model", lambda *_: pytest.fail("nothing needs to be loaded"))
    assert run(recipe, out, resume=True) == results
    assert content(out) == before
    assert siblings(out) == {"run"}


# ---- other ways through ----


def test_a_run_without_healing(job, tmp_path):
    recipe = job(healing={"max_steps": 0})
    results = run(recipe, tmp_path / "run")
    assert [row["stage"] for row in results["rows"]] == ["dense", "compressed"]
    loaded = kp.load_model(str(tmp_path / "run"))
    assert_same_metrics(results["rows"][1]["metrics"], measure(loaded.model, loaded.tokenizer, recipe))


def test_rivals_are_healed_by_distillation_too_but_the_dense_model_by_the_text(job, tmp_path):
    healing = {"max_steps": 2, "distillation_weight": 1.0, "language_model_weight": 0.0}
    results = run(job(healing=healing, rivals=["low-rank", "dense"]), tmp_path / "run")
    stages = ["dense", "compressed", "healed", "compressed", "healed", "healed"]
    assert [row["stage"] for row in results["rows"]] == stages
    low_rank, dense = (rival["healing"]["rows"][-1] for rival in results["rivals"])
    assert low_rank["loss"] == pytest.approx(low_rank["distillation_nats"])
    assert (dense["loss"], dense["distillation_nats"]) == (pytest.approx(dense["language_model_nats"]), None)
    assert results["rows"][-1]["metrics"] != results["rows"][0]["metrics"]


def test_a_rival_of_free_sizes_has_the_same_targets(job, tmp_path):
    recipe = job(healing={"max_steps": 0}, targets="attention", rivals=["low-rank"])
    results = run(recipe, tmp_path / "run")
    assert results["rivals"][0]["plan"]["layers"].keys() == results["plan"]["layers"].keys()


def test_auto_runs_from_text_to_results_and_shares_its_calibration_with_rivals(job, tmp_path):
    calibration = {"data": job().healing.data, "windows": 8, "sequence_length": 16}
    weighting = {"metric": "loss", "bias_correction": True, "sequential": True}
    measured = {"calibration": calibration, "weighting": weighting, "allocation": "measured"}
    low_rank = job(structure="low_rank", rivals=["svd-llm", "asvd"], **measured)
    recipe = kp.load_recipe({**low_rank.model_dump(mode="json"), "structure": "auto"})
    stages: list[str] = []
    out = tmp_path / "run"
    results = run(recipe, out, messages=Messages(stages.append, lambda _: None))
    assert sum(stage.startswith("calibrating for") for stage in stages) == 1
    assert [rival["recipe"]["name"] for rival in results["rivals"]] == ["svd-llm", "asvd"]
    assert all(row["num_params"] <= results["plan"]["num_params"] for row in results["rows"][1:])
    assert results["plan"]["allocation"]["candidates"].keys() == results["layers"].keys() | set(
        results["plan"]["allocation"]["kept_dense"]
    )
    loaded = kp.load_model(str(out))
    healed = [row for row in results["rows"] if row["name"] == f"{recipe.name}, healed"]
    assert_same_metrics(healed[0]["metrics"], measure(loaded.model, loaded.tokenizer, recipe))


@pytest.mark.parametrize(
    ("rival", "message"),
    [("block", "unknown rival 'block': did you mean 'blocks'"), ("krony-67m", "does not divide out_features")],
)
def test_a_rival_that_cannot_be_is_refused_before_any_work(job, tmp_path, rival, message):
    stages: list[str] = []
    with pytest.raises(kp.RequestError, match=message):
        run(job(rivals=[rival]), tmp_path / "run", messages=Messages(stages.append, lambda _: None))
    assert not any("measuring" in stage for stage in stages)
    assert siblings(tmp_path / "run") == set()


def test_several_test_texts_have_a_column_each(job, tmp_path):
    (tmp_path / "other.txt").write_text("He drank his coffee and said nothing.")
    texts = [job().evaluation.data, str(tmp_path / "other.txt")]
    recipe = job(healing={"max_steps": 1}, evaluation={"data": texts, "window": 64, "stride": 32})
    results = run(recipe, tmp_path / "run")
    for row in results["rows"]:
        assert list(row["metrics"]) == texts
        assert {(figures["window"], figures["stride"]) for figures in row["metrics"].values()} == {(64, 32)}


def test_the_same_recipe_gives_the_same_run_and_another_seed_another(in_pieces, tmp_path):
    recipe, whole = in_pieces
    run(recipe, tmp_path / "again")
    assert_same_run(tmp_path / "again", whole)
    other = run(recipe.model_copy(update={"seed": 4}), tmp_path / "other")
    assert other["rows"][:2] == read_results(whole)["rows"][:2]
    assert other["rows"][2] != read_results(whole)["rows"][2]


@pytest.mark.parametrize("existing", [True, False])
def test_resuming_what_never_began_begins(job, tmp_path, existing):
    if existing:
        (tmp_path / "run").mkdir()
    results = run(job(healing={"max_steps": 1}), tmp_path / "run", resume=True)
    assert results["resumed_at_steps"] == []
    assert read_results(tmp_path / "run") == results
    assert siblings(tmp_path / "run") == {"run"}


# ---- interruption ----


class Interrupted(Exception):
    pass


def interrupt_after(step: int) -> Messages:
    def healing(row: Any) -> None:
        if row.step == step:
            raise Interrupted

    return Messages(stage=lambda _: None, healing=healing)


def assert_same_run(out: Path, expected: Path) -> None:
    assert (out / "model/model.safetensors").read_bytes() == (expected / "model/model.safetensors").read_bytes()
    assert read_results(out)["rows"] == read_results(expected)["rows"]
    assert not [name for name in siblings(out) if name.startswith(".")]


@pytest.fixture(scope="module")
def in_pieces(job, tmp_path_factory) -> tuple[kp.Recipe, Path]:
    """A recipe that keeps a training checkpoint every other step, and its uninterrupted run."""
    recipe = job(healing={"max_steps": 7, "save_steps": 2})
    out = tmp_path_factory.mktemp("whole") / "run"
    run(recipe, out)
    return recipe, out


def test_an_interrupted_run_goes_on_to_the_same_end(in_pieces, tmp_path):
    recipe, whole = in_pieces
    out = tmp_path / "run"
    for step in (3, 5):
        with pytest.raises(Interrupted):
            run(recipe, out, resume=True, messages=interrupt_after(step))
        assert not out.exists()
    results = run(recipe, out, resume=True)
    assert results["resumed_at_steps"] == [2, 4]
    assert_same_run(out, whole)


KILLED_AFTER_STEP_5 = """
import os, signal, sys
from pathlib import Path
import kronpress as kp
from kronpress.pipeline import Messages, run

def healing(row):
    if row.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)

run(kp.load_recipe(sys.argv[1]), Path(sys.argv[2]), messages=Messages(stage=lambda _: None, healing=healing))
"""


def test_a_killed_run_goes_on_to_the_same_end(in_pieces, tmp_path, fresh_python):
    recipe, whole = in_pieces
    out, recipe_file = tmp_path / "runs" / "run", tmp_path / "recipe.yaml"
    recipe_file.write_text(dump_recipe(recipe))
    assert fresh_python("-c", KILLED_AFTER_STEP_5, str(recipe_file), str(out)).returncode == -signal.SIGKILL
    assert not out.exists()
    assert run(recipe, out, resume=True)["resumed_at_steps"] == [4]
    assert_same_run(out, whole)


def test_a_run_that_could_not_be_written_need_not_be_trained_again(in_pieces, tmp_path, monkeypatch):
    recipe, whole = in_pieces

    def full_disk(*_: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(whole_run, "write_model", full_disk)
        with pytest.raises(kp.WorkError, match="No space left"):
            run(recipe, out)
    assert not out.exists()
    assert run(recipe, out, resume=True)["resumed_at_steps"] == [7]
    assert_same_run(out, whole)


def test_another_recipe_cannot_go_on_with_this_ones_training(job, in_pieces, tmp_path):
    recipe, whole = in_pieces
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(recipe, out, messages=interrupt_after(5))
    for changes, wanted in (
        (
            {"targets": "attention"},
            "of another kind: targets was blocks and is attention; --overwrite without --resume",
        ),
        ({"healing": {"max_steps": 8, "save_steps": 2}}, r"healing\.max_steps was 7 and is 8"),
        (
            {"healing": {"max_steps": 7, "save_steps": 2, "learning_rate": 1e-4}},
            r"healing\.learning_rate .*--accept-ch",
        ),
    ):
        with pytest.raises(kp.RequestError, match=wanted):
            run(job(**{"healing": {"max_steps": 7, "save_steps": 2}, **changes}), out, resume=True)
    assert not out.exists()
    assert run(recipe, out, resume=True)["resumed_at_steps"] == [4]
    assert_same_run(out, whole)


def test_an_interrupted_run_is_only_thrown_away_on_request(in_pieces, tmp_path):
    recipe, whole = in_pieces
    with pytest.raises(Interrupted):
        run(recipe, tmp_path / "run", messages=interrupt_after(5))
    with pytest.raises(kp.RequestError, match="--resume"):
        run(recipe, tmp_path / "run")
    assert run(recipe, tmp_path / "run", overwrite=True)["resumed_at_steps"] == []
    assert_same_run(tmp_path / "run", whole)


# ---- what was there before ----


def test_a_folder_that_holds_something_is_refused_before_any_work(job, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    monkeypatch.setattr(whole_run, "load_model", lambda *_: pytest.fail("work before the check"))
    with pytest.raises(kp.RequestError, match="not empty"):
        run(job(), tmp_path / "run")
    assert content(tmp_path / "run").keys() == {"notes.txt"}


def test_resume_never_replaces_a_folder_that_is_no_run(job, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    before = content(tmp_path / "run")
    with pytest.raises(kp.RequestError):
        run(job(healing={"max_steps": 1}), tmp_path / "run", resume=True)
    assert content(tmp_path / "run") == before


def test_a_failed_overwrite_keeps_the_earlier_run(in_pieces, tmp_path, monkeypatch):
    recipe, whole = in_pieces
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "notes.txt").write_text("from before")
    before = content(out)

    def fail(*_: Any, **__: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for failing in ("heal_", "compress_loaded_", "write_model"):
        with monkeypatch.context() as patch:
            patch.setattr(whole_run, failing, fail)
            with pytest.raises((OSError, kp.WorkError)):
                run(recipe, out, overwrite=True)
        assert content(out) == before

    run(recipe, out, overwrite=True)
    assert not (out / "notes.txt").exists()
    assert_same_run(out, whole)


def test_where_no_length_is_given_sequences_are_as_long_as_the_model_reads(job, tmp_path):
    """A model of 128 tokens, where what is not said is 1024: it was refused."""
    given = job(weighting={"metric": "input"}, calibration={"data": job().healing.data, "windows": 2})
    healing = given.healing.model_dump(exclude={"sequence_length"})
    recipe = given.model_copy(update={"healing": kp.recipe.Healing(**{**healing, "max_steps": 1})})
    out = tmp_path / "run"
    results = run(recipe, out)
    assert results["recipe"]["calibration"]["sequence_length"] == 128
    assert results["recipe"]["healing"]["sequence_length"] == 128
    assert run(recipe, out, resume=True) == results
    loaded = kp.load_model(recipe.model)
    longer = recipe.calibration.model_copy(update={"sequence_length": 129})
    with pytest.raises(kp.RequestError, match="sequences of 129 tokens: the model reads at most 128"):
        compress_stages_(loaded, recipe.model_copy(update={"calibration": longer}), lambda _: None)
    plan, _ = compress_stages_(loaded, recipe, lambda _: None)
    assert plan.layers


def test_a_wrong_request_leaves_nothing_behind(job, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "short.txt").write_text("Too short.")
    out = tmp_path / "runs" / "run"
    out.parent.mkdir()
    data = job().evaluation.data
    for changes, fragment in [
        ({"healing": {"sequence_length": 129}}, "sequence_length 129"),
        ({"healing": {"data": str(tmp_path / "data" / "short.txt")}}, "less than one sequence"),
        ({"healing": {"data": str(tmp_path / "data" / "none.txt")}}, "no such file"),
        ({"evaluation": {"data": str(tmp_path / "data" / "none.txt")}}, "no such file"),
        ({"evaluation": {"data": data, "window": 500}}, "window 500"),
        ({"targets": ["nothing"]}, "'nothing'"),
        ({"spec": {"right_shape": [5, 5], "num_terms": 1}}, "divisors"),
        ({"model": str(tmp_path / "data")}, "no checkpoint"),
    ]:
        with pytest.raises(kp.RequestError, match=fragment):
            run(job(**changes), out)
        assert not list(out.parent.iterdir()), changes
