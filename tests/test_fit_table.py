"""The fit's tables: what is compared is of equal size, all that was measured is shown, and goals are judged as set."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, LlamaConfig

import kronpress as kp
from kronpress.calibration.sensitivity import measures_gradients

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import fit_page  # noqa: E402
import fit_speed  # noqa: E402
import fit_table  # noqa: E402

PAGE = ROOT / "docs" / "results" / "fit.md"
GPT2_SIZES = fit_table.sizes(GPT2Config())
ONE_SHOT = fit_table.Job("one-shot", Path("work"))


# ---- the page and the committed results ----


@pytest.mark.parametrize("name", fit_page.SECTIONS)
def test_the_page_has_the_committed_results(name):
    path = fit_table.RESULTS / f"{name}.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    assert fit_page.section(name, results) in PAGE.read_text(encoding="utf-8")
    if results is not None:
        assert results["not_measured"] == []
        # Less is a trial.
        assert results["settings"]["characters"] is None or results["settings"]["characters"] >= 150_000
        assert results["command"].startswith(f"python benchmarks/fit_table.py {results['settings']['command']} ")


def test_the_page_on_the_fits_has_the_figures_of_the_committed_results():
    page = (ROOT / "docs" / "fit.md").read_text(encoding="utf-8")
    results = {
        name: json.loads((fit_table.RESULTS / f"fit_{name}.json").read_text(encoding="utf-8"))
        for name in ("one_shot_pocket", "one_shot_llama", "healed", "ablation")
    }

    def rise(name: str, row: str, text: str = "test books") -> float:
        (found,) = (each for each in results[name]["rows"] if each["name"] == row)
        return found["rise_nats"][text]

    for size in results["one_shot_pocket"]["sizes"]:
        name = size["name"]
        starts = [row["name"] for row in results["one_shot_pocket"]["rows"] if row["name"].startswith(f"{name}: Krony")]
        rises = [min(rise("one_shot_pocket", row) for row in starts)] if starts else []
        methods = ("low-rank", "asvd", "svd-llm", "auto on MLPs", "auto on blocks")
        rises += [rise("one_shot_pocket", f"{name}: {method}") for method in methods]
        cells = ["–"] * (not starts) + [f"{each:.4f}" for each in rises]
        assert f"| {size['kept_of_mlp']:.3f} ({name}) | {' | '.join(cells)} |" in page
    for label, change in [
        ("as it is", "as it is"),
        ("without sequential inputs", "weighting.sequential=false"),
        ("without allocation", "allocation=uniform structure=low_rank"),
        ("without sensitivity", "calibration.sensitivity=false weighting.metric=input"),
        ("with bias correction", "weighting.bias_correction=true"),
        ("with chosen shrinkage", "weighting.shrinkage=held_out"),
        ("plain SVD", "low-rank"),
    ]:
        cells = [
            f"{rise('ablation', f'auto on {each}: {change}', 'validation books'):.4f}" for each in ("MLPs", "blocks")
        ]
        assert f"| {label} | {' | '.join(cells)} |" in page
    words = " ".join(page.split())
    for size, kept in (("krony-96m", "half kept"), ("krony-81m", "a quarter")):
        auto, other = (rise("one_shot_llama", f"{size}: {method}") for method in ("auto on MLPs", "svd-llm"))
        assert f"{auto / other:.2f} ({kept})" in words
    healed = {row["name"].removeprefix("krony-96m: "): row for row in results["healed"]["rows"]}
    krony = [row["rise_after_nats"] for name, row in healed.items() if name.startswith("Krony-PT")]
    for text in ("test books", "wiki.test.raw"):
        methods = ("auto on MLPs", "auto on blocks", "svd-llm", "low-rank")
        after = [healed[method]["rise_after_nats"][text] for method in methods]
        assert all(f"{each:.4f}" in words for each in [*after, min(rises[text] for rises in krony)])
    assert f"`auto` had {rise('healed', 'krony-96m: auto on blocks'):.4f} before it" in words
    assert f"rises by {healed['dense']['rise_after_nats']['test books']:.4f}" in words


def test_the_page_on_the_fits_has_the_costs_of_the_committed_results():
    page = (ROOT / "docs" / "fit.md").read_text(encoding="utf-8")
    results = json.loads((fit_table.RESULTS / "fit_speed.json").read_text(encoding="utf-8"))
    assert (results["geometry"], results["set"]) == ("gpt2", [])
    assert "\n".join(fit_speed.table(results)) in page
    assert f"{results['calibration_tokens']:,} calibration tokens" in page
    auto = results["rows"][-1]
    assert auto["recipe"] == "auto"
    for minutes in (auto["calibration_seconds"] / 60, (auto["plan_seconds"] + auto["fit_seconds"]) / 60):
        assert f"{minutes:.1f} minutes" in page


# ---- which rows there are ----


def test_the_sizes_are_those_of_krony_pt_and_fractions_of_the_mlps():
    published = [67893504, 80400048, 81972576, 92983392, 96128304]
    dense, mlp = 124439808, 12 * 2 * 3072 * 768
    # A quarter and a half are krony-81m and krony-96m.
    assert [size["num_params"] for size in GPT2_SIZES] == [*published, dense - mlp + 3 * mlp // 4]
    for size in GPT2_SIZES:
        assert size["kept_of_mlp"] == pytest.approx(1 - (dense - size["num_params"]) / mlp)


def test_a_size_that_the_shapes_refuse_is_named_with_its_reason_and_has_no_rows():
    llama = LlamaConfig(hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=4)
    sizes = {size["name"]: size for size in fit_table.sizes(llama)}
    refused = {name for name, size in sizes.items() if "error" in size}
    assert refused == {"krony-67m", "krony-80m-2", "krony-92m-4"}
    assert "3 does not divide out_features 352" in sizes["krony-80m-2"]["error"]
    rows = fit_table.one_shot_rows(list(sizes.values()))
    assert {row["size"] for row in rows if "size" in row} == sizes.keys() - refused


@pytest.mark.parametrize("size", GPT2_SIZES, ids=lambda size: size["name"])
def test_what_is_compared_has_the_same_number_of_parameters(size):
    rows = [row for row in fit_table.one_shot_rows(GPT2_SIZES) if row.get("size") == size["name"]]
    assert [row["method"] for row in rows if row["method"].startswith("auto")] == ["auto on MLPs", "auto on blocks"]
    for row in rows:
        if "rival" in row:
            assert row["num_params"] == size["num_params"]
            continue
        recipe = fit_table.recipe_of(row, ONE_SHOT)
        assert recipe.targets == ("blocks" if row["method"] == "auto on blocks" else "mlp")
        assert recipe.calibration.data == recipe.healing.data == "bundled"
        if recipe.has_fixed_sizes:
            assert kp.make_plan(GPT2Config(), recipe).num_params == size["num_params"]
        elif recipe.allocation == "measured":
            assert recipe.budget == kp.Recipe(budget={"params": size["num_params"]}).budget
        elif size["name"] == "krony-67m":
            with pytest.raises(kp.RequestError, match="the smallest low_rank has 3840"):
                kp.make_plan(GPT2Config(), recipe)
        else:
            num_params = kp.make_plan(GPT2Config(), recipe).num_params
            assert size["num_params"] - 24 * 3840 < num_params <= size["num_params"]


@pytest.mark.parametrize(
    "rows",
    [fit_table.one_shot_rows(GPT2_SIZES), fit_table.healed_rows(GPT2_SIZES[4]), fit_table.ablation_rows()],
    ids=["one_shot", "healed", "ablation"],
)
def test_no_two_rows_are_the_same(rows):
    assert rows[0] == {"name": "dense", "rival": "dense"}
    assert len({row["name"] for row in rows}) == len(rows)
    assert len({fit_table._file_of(row, ONE_SHOT) for row in rows}) == len(rows)
    recipes = [fit_table.recipe_of(row, ONE_SHOT).model_dump_json() for row in rows if "recipe" in row]
    assert len(set(recipes)) == len(recipes)


def test_every_start_of_krony_pt_is_healed():
    starts = [row["set"] for row in fit_table.healed_rows(GPT2_SIZES[4]) if row.get("recipe") == "krony-96m"]
    assert starts == [
        ["fit.start=van_loan"],
        ["fit.start=adaptive"],
        ["fit.start=prune", "fit.prune_small_factor=0.1"],
        ["fit.start=prune", "fit.prune_small_factor=0"],
    ]


def test_each_part_of_auto_is_changed_alone_whatever_it_is():
    rows = [row for row in fit_table.ablation_rows() if row.get("recipe") == "auto"]
    for method, targets in fit_table.AUTO.items():
        as_it_is, *others = [row for row in rows if row["size"] == method]
        full = fit_table.recipe_of(as_it_is, ONE_SHOT)
        assert (full.targets, full.budget.kept_of_targets) == (targets, 0.5)
        assert {row["part"] for row in others} == {part for part, _ in fit_table.PARTS}
        for row in others:
            assert row["set"][:2] == as_it_is["set"]
            changed = fit_table.recipe_of(row, ONE_SHOT).model_dump()
            differing = {name for name, value in full.model_dump().items() if value != changed[name]}
            assert differing <= {change.split("=")[0].split(".")[0] for change in row["set"][2:]}


@pytest.mark.parametrize("distil", [False, True])
def test_all_are_healed_alike_but_the_dense_model_by_the_text(distil):
    job = fit_table.Job("healed", Path("work"), steps=120, distil=distil)
    rows = fit_table.healed_rows(GPT2_SIZES[4])
    weights = {}
    for row in rows:
        healing = fit_table._healing(row, job)
        weights[row["name"]] = (healing.language_model_weight, healing.distillation_weight)
        assert healing.model_copy(update={"language_model_weight": 1.0, "distillation_weight": 0.0}) == (
            fit_table._healing(rows[0], job)
        )
    assert weights.pop("dense") == (1, 0)
    assert set(weights.values()) == {(0, 1) if distil else (1, 0)}


# ---- goals ----

# Few, so that many are at a goal, and many below the dense model.
rises = st.sampled_from([-0.5, -0.4, -0.1, 0.0, 0.2, 0.5, 0.6, 1.0, 3.0])


@given(data=st.data(), kept=st.sampled_from([0.1, 0.25, 0.5]), healed=st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_goal_is_met_where_auto_loses_at_most_so_much_of_what_the_best_other_loses(data, kept, healed):
    key = "rise_after_nats" if healed else "rise_nats"
    texts = ("books", "wiki")
    methods = {"van_loan": "krony-96m", "prune": "krony-96m", "svd-llm": "svd-llm", "auto on MLPs": "auto"}
    rise = {method: {text: data.draw(rises) for text in texts} for method in methods}
    others = [
        {"name": name, "size": "s", "method": name, "recipe": recipe, key: rise[name]}
        for name, recipe in methods.items()
    ]
    results = {
        "settings": {"steps": 9} if healed else {},
        "sizes": [{"name": "s", "kept_of_mlp": kept, "num_params": 9}, {"name": "t", "error": "3 does not divide 4"}],
        "rows": [
            {"name": "dense", key: dict.fromkeys(texts, 0.0)},
            {"name": "blocks", "size": "s", "method": "blocks", "rival": "blocks", key: dict.fromkeys(texts, -9.0)},
            *others,
        ],
    }
    compared = fit_page.comparisons(results)
    krony, every = ["van_loan", "prune"], ["van_loan", "prune", "svd-llm"]
    goals = [(0.6, krony)] if healed else [(0.6, every), (0.2, krony)]
    expected = [(text, goal, names) for text in texts for goal, names in goals]
    for found, (text, goal, names) in zip(compared, expected, strict=True):
        least = min(rise[name][text] for name in names)
        auto = rise["auto on MLPs"][text]
        assert (found.text, found.auto_rise_nats, found.rise_nats) == (text, auto, least)
        assert rise[found.against][text] == least
        assert found.goal == (goal if kept >= 0.25 else None)
        assert found.is_met is (kept >= 0.25 and (auto <= goal * least if least > 0 else auto <= least))
        assert (found.ratio is None) is (least <= 0)
        assert found.ratio is None or math.isclose(found.ratio * least, auto, abs_tol=1e-9)
    table = "\n".join(fit_page.goals_table(compared))
    assert table.count(": met |") == sum(each.is_met for each in compared)
    assert table.count("**missed**") == sum(each.goal is not None and not each.is_met for each in compared)


def test_an_auto_that_could_not_be_had_has_missed_its_goal():
    row = {"size": "s", "method": "low-rank", "recipe": "low-rank", "rise_nats": {"books": 0.5}}
    auto = {"size": "s", "method": "auto on MLPs", "recipe": "auto", "error": "the budget leaves 3 parameters"}
    dense = {"name": "dense", "rise_nats": {"books": 0.0}}
    sizes = [{"name": "s", "num_params": 9, "kept_of_mlp": 0.25}]
    (found,) = fit_page.comparisons({"settings": {}, "sizes": sizes, "rows": [dense, row, auto]})
    assert not found.is_met
    assert "| inf | low-rank | 0.5000 | inf | ≤ 0.6: **missed** |" in "\n".join(fit_page.goals_table([found]))


# ---- measuring, on a tiny model ----


@pytest.fixture
def tiny(tiny_model, save_tiny_checkpoint, tmp_path, monkeypatch, tiny_text):
    """Arguments of a command that make it short: a model of 77,184 parameters and a few lines of text."""
    monkeypatch.setattr(fit_table, "workers", lambda processes: ThreadPoolExecutor(1))
    save_tiny_checkpoint(tiny_model("gpt2", n_embd=48, n_head=4), tmp_path / "tiny")
    (tmp_path / "text.txt").write_text(tiny_text, encoding="utf-8")
    changes = ["calibration.windows=8", "calibration.sequence_length=32", "healing.sequence_length=32"]
    changes += [f"{section}.data={tmp_path / 'text.txt'}" for section in ("calibration", "healing")]
    return {"model": str(tmp_path / "tiny"), "changes": changes, "characters": 400, "processes": 1}


def measured(command, tmp_path, **arguments):
    command(tmp_path / "work", tmp_path / "out.json", **arguments)
    return json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))


def test_one_shot_rows_are_what_their_recipes_make(tiny, tmp_path, monkeypatch):
    text = tmp_path / "wiki.txt"
    text.write_text("The sea was calm, and nobody said a word. " * 9, encoding="utf-8")
    results = measured(fit_table.one_shot, tmp_path, **tiny, text=text, only="krony-96m: ")
    rows = {row["name"]: row for row in results["rows"]}
    assert len(rows) == 1 + 4 + 3 + 2 + 1
    assert not rows.keys() & set(results["not_measured"])
    recipes = [kp.load_recipe(row["recipe"], row["set"]) for row in results["rows"] if "recipe" in row]
    calibrations = {
        (recipe.targets, recipe.calibration.held_out, measures_gradients(recipe))
        for recipe in recipes
        if recipe.weighting.metric != "none"
    }
    assert len(list((tmp_path / "work" / "moments").glob("*.safetensors"))) == len(calibrations) < 4

    loaded = kp.load_model(tiny["model"])
    (size,) = (size for size in results["sizes"] if size["name"] == "krony-96m")
    assert rows["dense"]["rise_nats"] == {"test books": 0.0, "wiki.txt": 0.0}
    for start in ("van_loan", "prune"):
        name, changes = "krony-96m: Krony-PT, " + start, [f"fit.start={start}"]
        name += " [1, 0.1]" if start == "prune" else ""
        model = copy.deepcopy(loaded.model)
        kp.compress_(model, kp.make_plan(model, kp.load_recipe("krony-96m", changes)))
        for label, each in [
            ("wiki.txt", text.read_text()),
            ("test books", kp.load_running_text("bundled", "test").text),
        ]:
            nats = kp.evaluate(model, loaded.tokenizer, each[:400]).nll_mean_nats
            assert rows[name]["before"][label]["nll_mean_nats"] == nats
            assert rows[name]["rise_nats"][label] == nats - rows["dense"]["before"][label]["nll_mean_nats"]
    for row in results["rows"]:
        assert row["name"] in ("dense", "krony-96m: blocks") or row["num_params"] <= size["num_params"]
        assert ("fitting_seconds" in row) is ("recipe" in row)

    shown = fit_page.section("fit_one_shot_pocket", results)
    for row in results["rows"]:
        assert shown.count(f"| {row['name']} | {row['num_params']:,} |") == 2  # for two texts
        assert f"{row['before']['wiki.txt']['perplexity']:,.2f}" in shown
    assert all(name in shown for name in results["not_measured"])

    monkeypatch.setattr(fit_table, "measure", lambda row, job: {**row, "error": "none of it"})
    again = measured(fit_table.one_shot, tmp_path, **tiny, text=text, only="krony-96m: ")
    assert again == results
    more = measured(fit_table.one_shot, tmp_path, **tiny, text=text, only="krony-81m: blocks")
    assert len(more["rows"]) == len(results["rows"]) + 1
    assert "| krony-81m: blocks | none of it |" in fit_page.section("fit_one_shot_pocket", more)
    with pytest.raises(kp.RequestError, match=r"keeps rows of other settings, .*take another folder"):
        measured(fit_table.one_shot, tmp_path, **{**tiny, "characters": 401}, text=text)


def test_a_row_that_fails_is_named_and_the_others_are_kept(tiny, tmp_path, monkeypatch):
    def measure(row, job):
        if row["name"] == "0.5 of the MLPs: low-rank":
            raise kp.WorkError("no room")
        return {**row, "before": {"test books": {"nll_mean_nats": 1.0}}}

    monkeypatch.setattr(fit_table, "measure", measure)
    monkeypatch.setattr(fit_table, "NEAR", 0)
    with pytest.raises(kp.WorkError, match=r"1 of 4 rows failed.*0.5 of the MLPs: low-rank \(WorkError: no room\)"):
        measured(fit_table.one_shot, tmp_path, **tiny, only="of the MLPs: low-rank")
    results = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert "0.5 of the MLPs: low-rank" in results["not_measured"]
    assert [row["name"] for row in results["rows"]] == [
        "dense",
        "0.25 of the MLPs: low-rank",
        "0.75 of the MLPs: low-rank",
    ]
    kept = sorted(path.name for path in (tmp_path / "work" / "rows").iterdir())
    assert kept == ["0.25_of_the_mlps_low_rank.json", "0.75_of_the_mlps_low_rank.json", "dense.json"]


def test_a_wrong_recipe_is_refused_before_anything_is_done(tiny, tmp_path):
    with pytest.raises(kp.RequestError, match=r"unknown recipe field 'calibration.window'"):
        measured(fit_table.one_shot, tmp_path, **{**tiny, "changes": ["calibration.window=4"]})
    assert not (tmp_path / "work" / "rows").exists()


def test_healed_rows_are_trained_alike(tiny, tmp_path):
    results = measured(fit_table.healed, tmp_path, **tiny, steps=4, only="low-rank")
    dense, low_rank = results["rows"]
    assert dense["tokens"] == low_rank["tokens"] == 4 * 8 * 32
    for row in (dense, low_rank):
        assert len(row["validation_nats_by_rate"]) == len(fit_table.RATES)
        trials = {float(rate): nats for rate, nats in row["validation_nats_by_rate"].items()}
        assert trials[row["rate"]] == min(trials.values())
        assert row["rise_after_nats"]["test books"] < row["rise_nats"]["test books"]
    shown = fit_page.section("fit_healed", results)
    assert f"| krony-96m: low-rank | {low_rank['num_params']:,} |" in shown
    assert f"{low_rank['after']['test books']['nll_mean_nats']:.4f}" in shown
    assert "4 steps" in shown


def test_the_ablation_says_what_each_change_costs(tiny, tmp_path):
    for only in ("on MLPs: as it is", "weighting.sequential"):
        results = measured(fit_table.ablation, tmp_path, **tiny, only=only)
    rows = {row["name"]: row for row in results["rows"]}
    full, changed = (rows[f"auto on MLPs: {name}"] for name in ("as it is", "weighting.sequential=false"))
    difference = changed["rise_nats"]["validation books"] - full["rise_nats"]["validation books"]
    shown = fit_page.section("fit_ablation", results)
    assert f"| sequential | `weighting.sequential=false` | {changed['rise_nats']['validation books']:.4f} " in shown
    assert f"| {difference:+.4f} |" in shown
    assert "|  | as it is |" in shown


def test_rows_that_the_table_of_krony_pt_has_are_taken_from_it(tmp_path):
    table = json.loads((fit_table.RESULTS / "pocket_table.json").read_text(encoding="utf-8"))
    (tmp_path / "wiki.test.raw").write_text("some words")
    job = fit_table.Job("healed", tmp_path, text=tmp_path / "wiki.test.raw", steps=fit_table.STEPS)
    sizes = {size["name"]: size for size in fit_table.sizes(kp.load_model("pocket").model)}
    rows = fit_table.healed_rows(sizes["krony-96m"])
    fit_table._take_known(rows, job, table)
    theirs = {row["name"]: row for row in table["rows"]}
    taken = {path.name: json.loads(path.read_text()) for path in (tmp_path / "rows").iterdir()}
    for row in rows:
        found = taken.pop(fit_table._file_of(row, job).name, None)
        if row["name"] == "dense":
            assert found["after"] == theirs["dense, dense"]["after"]
        elif "adaptive" in row["name"]:
            assert found["after"] == theirs["krony-96m, adaptive"]["after"]
        elif "auto" in row["name"] or "svd-llm" in row["name"]:
            assert found is None
        else:
            assert found["known"] == "pocket_table.py"
            if row["method"] == "blocks":
                assert found["num_params"] == theirs["blocks, as krony-96m"]["num_params"] != row["num_params"]
            assert found["rate"] in table["settings"]["rates"]
    assert taken == {}
    for changes in ({"steps": 4}, {"distil": True}, {"characters": 9}, {"text": None}):
        with pytest.raises(kp.RequestError, match=r"the table of pocket_table\.py is of"):
            fit_table._take_known(rows, dataclasses.replace(job, **changes), table)
