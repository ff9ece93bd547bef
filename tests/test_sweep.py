"""A sweep runs every combination once, goes on where it was stopped, and ends in a comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import kronpress as kp
from kronpress import cli
from kronpress.errors import RequestError, WorkError
from kronpress.pipeline import Messages, sweep, sweeping
from kronpress.recipe import dump_recipe


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory, tiny_model, save_tiny_checkpoint, tiny_recipe, tiny_text) -> Path:
    """A recipe that takes a second: a tiny model, two steps of healing, a checkpoint of each."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "text.txt").write_text(tiny_text, encoding="utf-8")
    save_tiny_checkpoint(tiny_model("gpt2"), folder / "dense")
    recipe = tiny_recipe(
        "kronecker",
        model=str(folder / "dense"),
        healing={
            "data": str(folder / "text.txt"),
            "max_steps": 2,
            "sequences_per_step": 1,
            "sequence_length": 16,
            "save_steps": 1,
        },
        evaluation={"data": str(folder / "text.txt"), "speed": False},
    )
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    return folder / "recipe.yaml"


class Interrupted(Exception):
    pass


OVER = ["healing.learning_rate=1e-3,1e-2", "seed=0,1"]
FOLDERS = [f"healing.learning_rate={rate},seed={seed}" for rate in ("1e-3", "1e-2") for seed in (0, 1)]


def content(out: Path) -> dict[str, tuple[int, bytes]]:
    files = [path for folder in out.iterdir() if folder.is_dir() for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(out)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_a_sweep_is_interrupted_resumed_and_widened(recipe_file, tmp_path):
    out = tmp_path / "out"

    def stop_in_the_third(row: Any) -> None:
        if (out / FOLDERS[1]).is_dir() and row.step == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        sweep(str(recipe_file), OVER, out, messages=Messages(lambda _: None, stop_in_the_third))
    assert sorted(path.name for path in out.iterdir() if not path.name.startswith(".")) == sorted(
        [*FOLDERS[:2], "sweep.json"]
    )
    before = content(out)
    with pytest.raises(RequestError, match="is not empty: --resume"):
        sweep(str(recipe_file), OVER, out)

    comparison = sweep(str(recipe_file), OVER, out, resume=True)
    after = content(out)
    assert {name: after[name] for name in before if not name.startswith(".")} == {
        name: value for name, value in before.items() if not name.startswith(".")
    }
    assert [len(group.seeds) for group in comparison.groups] == [2, 2]
    results = [json.loads((out / folder / "results.json").read_text(encoding="utf-8")) for folder in FOLDERS]
    assert [each["resumed_at_steps"] for each in results] == [[], [], [1], []]
    for each, (rate, seed) in zip(results, [(1e-3, 0), (1e-3, 1), (1e-2, 0), (1e-2, 1)], strict=True):
        assert (each["recipe"]["healing"]["learning_rate"], each["recipe"]["seed"]) == (rate, seed)
    assert (out / "comparison.html").is_file()
    assert list(json.loads((out / "sweep.json").read_text(encoding="utf-8"))["runs"]) == FOLDERS

    wider = sweep(str(recipe_file), [OVER[0], "seed=0,1,2"], out, resume=True)
    assert [len(group.seeds) for group in wider.groups] == [3, 3]
    assert {name: value for name, value in content(out).items() if name in after} == after


def test_what_fails_does_not_keep_the_others_from_being_run(recipe_file, tmp_path):
    with pytest.raises(WorkError, match=r"1 of 2 runs failed, --resume tries them again: healing.data=missing.txt: "):
        sweep(str(recipe_file), [f"healing.data=missing.txt,{recipe_file.parent / 'text.txt'}"], tmp_path / "out")
    runs = [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
    assert len(runs) == 1 and (runs[0] / "report.html").is_file()
    assert (tmp_path / "out" / "comparison.html").is_file()


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ([], "a sweep over nothing"),
        (["seed"], "expected path.to.field=value,value"),
        (["seed="], "expected path.to.field=value,value"),
        (["seed=0,1", "seed=2"], "names a field twice"),
        (["seed=1,1"], "gives 'seed=1' twice"),
        (["seed=1,1.0"], "gives 'seed=1' twice"),
        (["heeling.max_steps=1"], "heeling"),
        (["healing.max_steps=1,many"], "healing.max_steps"),
        (["evaluation.window=16,32"], "a sweep over evaluation.window gives runs that are not comparable"),
        (["model=pocket,gpt2"], "a sweep over model gives runs that are not comparable"),
    ],
)
def test_a_wrong_grid_is_refused_before_any_work(recipe_file, tmp_path, monkeypatch, over, message):
    monkeypatch.setattr(sweeping, "run", lambda *_, **__: pytest.fail("no work was to be done"))
    with pytest.raises(RequestError, match=message):
        sweep(str(recipe_file), over, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_lists_are_one_value():
    grid = sweeping.grid_runs("krony-96m", ["spec.right_shape=[1,2],[2,2]"], ["healing.max_steps=3"])
    assert [each.recipe.spec["right_shape"] for each in grid] == [[1, 2], [2, 2]]
    assert [each.folder for each in grid] == ["spec.right_shape=1-2", "spec.right_shape=2-2"]
    assert {each.recipe.healing.max_steps for each in grid} == {3}


def test_runs_of_a_sweep_over_the_protocol_are_compared_if_that_is_wanted(recipe_file, tmp_path):
    out = tmp_path / "out"
    given = ["sweep", str(recipe_file), "--over", "evaluation.window=16,32", "--out", str(out), "--allow-mixed"]
    assert cli.main([*given, "--set", "healing.max_steps=0", "--json"]) == 0
    mixed = json.loads((out / "comparison.json").read_text(encoding="utf-8"))["mixed"]
    assert any("window 16" in each and "window 32" in each for each in mixed)
    assert isinstance(kp.load_recipe(out / "evaluation.window=16" / "recipe.yaml"), kp.Recipe)
