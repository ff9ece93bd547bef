"""The tables of permutations, stages and structured embeddings: equal sizes, one part changed at a time."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import kronpress as kp
from kronpress.matrices.permutation import nearest_permuted_sum

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import fit_table  # noqa: E402
import folding_speed  # noqa: E402
import permutation_recovery  # noqa: E402
import structure_page  # noqa: E402
import structure_table  # noqa: E402

PAGE = ROOT / "docs" / "results" / "structures.md"
HEALED = fit_table.Job("healed", Path("work"), steps=40, distil=True, rates=structure_table.RATES)


@pytest.fixture(scope="module")
def pocket():
    """The bundled model, and nothing of it loaded twice."""
    return kp.load_model("pocket").model


@pytest.fixture(scope="module")
def rows():
    return structure_table.rows_of_published()


@pytest.fixture(scope="module")
def planned(pocket):
    """A row -> its plan, by shapes alone."""

    @cache
    def plan(recipe: str, changes: tuple[str, ...]) -> kp.Plan:
        return kp.make_plan(pocket, kp.load_recipe(recipe, list(changes), "pocket"))

    return lambda row: plan(row["recipe"], tuple(row["set"]))


# ---- the page and the committed results ----


def test_the_page_is_what_render_prints_of_the_committed_results(capsys):
    structure_table.render()
    printed = capsys.readouterr().out
    assert printed == PAGE.read_text(encoding="utf-8")
    assert printed == structure_page.page(fit_table.RESULTS)


@pytest.mark.parametrize("name", structure_page.SECTIONS)
def test_committed_results_are_whole_and_made_as_the_page_says(name):
    path = fit_table.RESULTS / f"{name}.json"
    if not path.is_file():
        assert "Not measured yet" in structure_page.section(name, None)
        return
    results = json.loads(path.read_text(encoding="utf-8"))
    script, command = structure_page.SECTIONS[name][1].split()[:2]
    assert results["command"].startswith(f"python benchmarks/{script} {command}")
    assert results.get("not_measured", []) == []
    settings = results.get("settings", {"characters": None})
    assert settings["characters"] is None or settings["characters"] >= 150_000  # less is a trial
    assert results["rows"]


# ---- which rows there are ----


def test_without_permutations_all_else_is_equal(planned, rows):
    as_it_is, plain = (
        kp.load_recipe("tqcompressor", changes, "pocket")
        for changes in ([], [structure_table.without_permutations("tqcompressor")])
    )
    assert any(part.folding for part in as_it_is.parts)
    for part, other in zip(as_it_is.parts, plain.parts, strict=True):
        assert other.folding == [] and other.structure == "kronecker"
        sizes = {name: value for name, value in part.spec.items() if name not in ("rows", "columns")}
        changed = part.model_copy(update={"folding": [], "structure": "kronecker", "spec": sizes})
        assert other == changed
    by_method = {row["method"]: row for row in rows if row["size"] == "tqcompressor"}
    for when in ("in stages", "at once"):
        permuted, not_permuted = (planned(by_method[f"{when}{more}"]) for more in ("", ", not permuted"))
        assert permuted.num_params == not_permuted.num_params
        assert {layer.structure for layer in not_permuted.layers.values()} == {"kronecker"}
        assert permuted.layers.keys() == not_permuted.layers.keys()


def test_at_each_size_all_rows_have_its_number_of_parameters(planned, rows):
    assert {row["size"] for row in rows} == {*structure_table.PUBLISHED, "krony-96m"}
    for size in (*structure_table.PUBLISHED, "krony-96m"):
        num_params = structure_table.count(size)
        own = [row for row in rows if row["size"] == size]
        assert {row["recipe"] for row in own} == {size, "low-rank", "auto"}
        for row in own:
            recipe = kp.load_recipe(row["recipe"], row["set"], "pocket")
            if row["recipe"] == size:
                plan = planned(row)
                assert (plan.num_params, plan.num_params_untied) == (num_params, 0)
            else:
                assert recipe.budget.params == num_params
            if row["recipe"] == "low-rank":
                assert 0.98 * num_params < planned(row).num_params <= num_params


def test_no_two_rows_are_the_same(rows):
    one_shot = structure_table.one_shot_rows()
    assert one_shot[0] == {"name": "dense", "rival": "dense"}
    for some in (rows, one_shot):
        assert len({row["name"] for row in some}) == len(some)
        assert len({fit_table._file_of(row, HEALED) for row in some}) == len(some)
    recipes = [fit_table.recipe_of(row, HEALED).model_dump_json() for row in one_shot[1:]]
    assert len(set(recipes)) == len(recipes)


def test_procrustes_stands_beside_its_rivals_at_its_own_count(planned):
    rows = [row for row in structure_table.one_shot_rows()[1:] if row["size"] == "procrustes"]
    own, sums, *rivals = rows
    num_params = structure_table.count("procrustes")
    as_it_is, unrotated = (kp.load_recipe(row["recipe"], row["set"], "pocket") for row in (own, sums))
    assert as_it_is == kp.load_recipe("procrustes", [], "pocket")
    assert unrotated == as_it_is.model_copy(update={"rotation": False, "head": "tied"})
    assert planned(own).num_params == num_params == planned(sums).num_params + planned(own).num_params_untied
    assert {row["recipe"] for row in rivals} == {"low-rank", "auto"}
    for row in rivals:
        assert kp.load_recipe(row["recipe"], row["set"], "pocket").budget.params == num_params
        assert row["recipe"] == "auto" or 0.98 * num_params < planned(row).num_params <= num_params


def test_at_the_other_sizes_auto_is_compared_at_equal_budgets(pocket):
    one_shot = [row for row in structure_table.one_shot_rows()[1:] if row["size"] != "procrustes"]
    sizes = {size["name"]: size["num_params"] for size in fit_table.sizes(pocket) if size["name"] != "krony-96m"}
    assert {row["size"] for row in one_shot} == sizes.keys()
    for size, num_params in sizes.items():
        recipes = [fit_table.recipe_of(row, HEALED) for row in one_shot if row["size"] == size]
        assert {recipe.name for recipe in recipes} == {"auto"}
        assert {recipe.budget.params for recipe in recipes} == {num_params}
        assert {str(recipe.targets) for recipe in recipes} == {"blocks", "all"}
        plain = recipes[0].model_dump(exclude={"targets", "folding"})
        assert all(recipe.model_dump(exclude={"targets", "folding"}) == plain for recipe in recipes)


def test_all_are_healed_alike_but_for_what_a_row_says(rows):
    alike = fit_table._healing(rows[0], HEALED)
    assert (alike.language_model_weight, alike.distillation_weight) == (0, 1)
    for row in rows:
        healing = fit_table._healing(row, HEALED)
        if row.get("has_own_objective"):
            own = fit_table.recipe_of(row, HEALED).healing
            assert healing.teacher_weights == own.teacher_weights
            assert healing.hidden_weight > 0 and healing.language_model_weight == own.language_model_weight
            assert healing.model_copy(update=alike.teacher_weights | {"language_model_weight": 0.0}) == alike
        else:
            assert healing == alike


def test_stages_share_the_steps_and_read_on_where_the_one_before_stopped(
    tiny_model, save_tiny_checkpoint, tmp_path, monkeypatch, rows
):
    save_tiny_checkpoint(tiny_model("gpt2", n_layer=2), tmp_path / "tiny")
    job = fit_table.Job("healed", tmp_path / "work", str(tmp_path / "tiny"), steps=40, distil=True)
    schedule = fit_table._healing(rows[0], job).model_copy(update={"max_steps": 13, "warmup_steps": 1})
    tokens = torch.arange(13 * schedule.tokens_per_step)
    healed: list[tuple[int, int, set[str]]] = []

    def heal_(model, teacher, unread, healing):
        assert teacher is dense.model and model is not teacher
        structures = {module.structure.__name__ for module in model.modules() if hasattr(module, "structure")}
        healed.append((int(unread[0]) // schedule.tokens_per_step, healing.max_steps, structures))

    monkeypatch.setattr(fit_table.kp, "heal_", heal_)
    dense = kp.load_model(job.model)
    before = {name: tensor.clone() for name, tensor in dense.model.state_dict().items()}
    student = fit_table._healed_in_stages(rows[0], job, dense, tokens, schedule)
    starts, steps, structures = zip(*healed, strict=True)
    assert sum(steps) == 13 and starts == (0, steps[0], steps[0] + steps[1])
    assert [abs(each - 13 * share) <= 1 for each, share in zip(steps, (0.25, 0.5, 0.25), strict=True)] == [True] * 3
    assert structures == ({"Kronecker"}, {"Kronecker", "PermutedKronecker"}, {"Kronecker", "PermutedKronecker"})
    assert student is not dense.model
    torch.testing.assert_close(dict(dense.model.state_dict()), before, rtol=0, atol=0)


# ---- measuring, on little ----


def test_a_row_is_measured_and_shown(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(fit_table, "workers", lambda processes: ThreadPoolExecutor(1))
    out = tmp_path / "out.json"
    only = "kngpt2: logits distilled"
    dense, row = {"name": "dense", "rival": "dense"}, next(row for row in rows if row["name"] == only)
    monkeypatch.setattr(structure_table, "one_shot_rows", lambda: [dense, row, {**row, "name": "later"}])
    structure_table.one_shot(tmp_path / "work", out, only=only, characters=200, processes=1)
    results = json.loads(out.read_text(encoding="utf-8"))
    dense, row = results["rows"]
    assert (dense["name"], row["name"]) == ("dense", only)
    assert row["num_params"] == structure_table.count("kngpt2") < dense["num_params"]
    assert row["rise_nats"]["test books"] > 0 == dense["rise_nats"]["test books"]
    assert results["not_measured"] == ["later"]
    assert results["command"] == ("python benchmarks/structure_table.py one-shot --work DIR --characters 200")
    (tmp_path / "structures_one_shot.json").write_text(out.read_text(encoding="utf-8"), encoding="utf-8")
    page = structure_page.page(tmp_path)
    assert f"| {only} | {row['num_params']:,} |" in page
    assert f"{row['before']['test books']['nll_mean_nats']:.4f}" in page
    assert page.count("Not measured yet") == len(structure_page.SECTIONS) - 1
    assert "Not measured: later." in page


# ---- planted and real permutations ----


@pytest.mark.parametrize("side", ["rows", "columns"])
@pytest.mark.parametrize("seed", range(3))
def test_one_permuted_side_without_noise_is_always_recovered_by_matching(side: str, seed: int):
    assert permutation_recovery.is_recovered(seed, (6, 4), (2, 2), side, 0.0, "matching")


def test_what_is_not_found_is_not_counted_as_recovered(monkeypatch):
    def search(weight, left_shape, right_shape, *, rows=True, columns=True, **_):
        return nearest_permuted_sum(weight, left_shape, right_shape, rows=False, columns=False)

    monkeypatch.setattr(permutation_recovery, "nearest_permuted_sum", search)
    for side in permutation_recovery.SIDES:
        assert not permutation_recovery.is_recovered(0, (6, 4), (2, 2), side, 0.1, "matching")


def test_rates_of_recovery_are_counted_by_start(tmp_path, monkeypatch):
    monkeypatch.setattr(permutation_recovery, "SHAPES", (((3, 2), (2, 1)), ((3, 3), (2, 2))))
    calls: list[tuple[Any, ...]] = []

    def is_recovered(seed, left_shape, right_shape, side, noise, start):
        calls.append((seed, left_shape, right_shape, side, noise, start))
        return start == "matching" or (start == 0 and seed == 1)

    monkeypatch.setattr(permutation_recovery, "is_recovered", is_recovered)
    threads = torch.get_num_threads()
    try:
        permutation_recovery.recovery(tmp_path / "permutation_recovery.json", seeds=4)
    finally:
        torch.set_num_threads(threads)
    results = json.loads((tmp_path / "permutation_recovery.json").read_text(encoding="utf-8"))
    # Of a single column no order of columns counts.
    kinds = [(row["right_shape"], row["side"], row["noise"]) for row in results["rows"]]
    assert kinds == [
        *(([2, 1], "rows", noise) for noise in (0.0, 0.1)),
        *(([2, 2], side, noise) for side in ("rows", "columns", "both") for noise in (0.0, 0.1)),
    ]
    assert len(set(calls)) == len(calls) == len(kinds) * 3 * 4
    assert all((row["identity"], row["random"], row["matching"]) == (0, 0.25, 1) for row in results["rows"])
    page = structure_page.page(tmp_path)
    assert "Of 4 planted products" in page
    assert page.count("| 0.00 | 0.25 | 1.00 |") == len(kinds)
    assert "| 3×3 | 2×2 | both | 0.1 |" in page


def test_the_control_compares_real_matrices_with_random_ones_of_their_size_and_norms(tmp_path):
    generator = torch.Generator().manual_seed(0)
    planted = torch.kron(torch.randn(6, 4, generator=generator), torch.randn(4, 4, generator=generator))
    hidden = planted[torch.randperm(24, generator=generator)]
    stored = {"h.0.attn.c_attn.weight": hidden.mT.contiguous(), "h.0.attn.c_attn.bias": torch.zeros(24)}
    save_file(stored, tmp_path / "gpt2.safetensors")
    threads = torch.get_num_threads()
    try:
        permutation_recovery.control(
            tmp_path / "gpt2.safetensors", tmp_path / "permutation_control.json", only="weight"
        )
    finally:
        torch.set_num_threads(threads)
    results = json.loads((tmp_path / "permutation_control.json").read_text(encoding="utf-8"))
    assert [tuple(row["right_shape"]) for row in results["rows"]] == list(permutation_recovery.RIGHT_SHAPES)
    for row in results["rows"]:
        assert (row["matrix"], row["shape"]) == ("h.0.attn.c_attn.weight", [24, 16])
        for kind in ("real", "gaussian", "gaussian_with_its_norms"):
            assert 0 < row[kind]["before"] <= row[kind]["after"] <= 1 + 1e-12
        if row["right_shape"] == [4, 4]:
            assert row["real"]["after"] > 1.2 * row["gaussian"]["after"]
            in_order = nearest_permuted_sum(hidden.double(), (6, 4), (4, 4), rows=False, columns=False)
            assert row["real"]["before"] == pytest.approx(in_order.captured[-1])
    assert "| c_attn 24×16 (1) | 4×4 | " in structure_page.page(tmp_path)


def test_a_random_matrix_takes_over_the_norms_of_rows_and_columns():
    weight = torch.randn(12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight *= torch.arange(1, 13)[:, None] * torch.arange(1, 9)
    scaled = permutation_recovery.like(weight, torch.Generator().manual_seed(0), has_norms=True)
    torch.testing.assert_close(scaled.norm(dim=1), weight.norm(dim=1), rtol=1e-6, atol=0)
    torch.testing.assert_close(scaled.norm(dim=0), weight.norm(dim=0), rtol=1e-6, atol=0)
    plain = permutation_recovery.like(weight, torch.Generator().manual_seed(0), has_norms=False)
    assert not torch.allclose(plain.norm(dim=1), weight.norm(dim=1), rtol=0.1)


# ---- what a permutation costs ----


def test_folded_and_stored_orders_leave_sizes_and_the_folded_model_its_logits():
    threads = torch.get_num_threads()
    contenders = folding_speed.models(16, 2, 2)
    assert torch.get_num_threads() == threads
    plain, folded, stored = contenders.values()
    counts = {sum(parameter.numel() for parameter in model.parameters()) for model in contenders.values()}
    assert len(counts) == 1
    kinds = [{type(module) for module in model.modules()} for model in (plain, folded)]
    assert kinds[0] == kinds[1]  # nothing is left of an order at run time
    orders = [name for name, _ in stored.named_buffers() if name.endswith("_order")]
    assert len(orders) == 2 * 2 * 2 and not [name for name, _ in folded.named_buffers() if "_order" in name]
    for name, layer in stored.named_modules():
        if "row_order" in dict(layer.named_buffers(recurse=False)):
            of_plain = plain.get_submodule(name).to_dense()
            moved = of_plain[layer.row_order][:, layer.column_order.argsort()]
            torch.testing.assert_close(layer.to_dense(), moved)
            assert not torch.equal(moved, of_plain)


def test_models_take_turns_and_are_compared_within_a_round(capsys):
    taken: list[tuple[str, int]] = []
    models = {"as it is": "as it is", "folded": "folded", "stored": "stored"}

    def clock(model: str, ids: torch.Tensor) -> float:
        taken.append((model, ids.shape[1]))
        slow = len(taken) // 3 + 1  # a machine that grows slower from round to round
        return slow * {"as it is": 1.0, "folded": 1.0, "stored": 2.0}[model]

    rows = folding_speed.measure(models, 6, clock)
    first, *counted = [taken[i : i + 3] for i in range(0, 21, 3)]
    assert {name for name, _ in first} == models.keys()
    assert [turn[0][0] for turn in counted] == [*models] * 2
    assert [(row["num_tokens"], row["model"]) for row in rows] == [(n, name) for n in (1, 128) for name in models]
    medians = {row["model"]: row["ratio"]["median"] for row in rows if row["num_tokens"] == 1}
    assert medians["as it is"] == 1 and medians["stored"] > 1.5
    assert folding_speed.table({"rows": rows})[2].startswith("| 1 | as it is | ")


def test_the_page_of_permutations_has_the_table_of_the_committed_result():
    path = fit_table.RESULTS / "folding_speed.json"
    page = (ROOT / "docs" / "permutations.md").read_text(encoding="utf-8")
    if not path.is_file():
        assert "`python benchmarks/folding_speed.py --out benchmarks/results/folding_speed.json`" in page
        return
    results = json.loads(path.read_text(encoding="utf-8"))
    assert (results["width"], len({*results["num_params"].values()})) == (768, 1)
    assert results["rounds"] >= 50  # fewer are a trial
    assert "\n".join(folding_speed.table(results)) in page
    assert f"{results['rounds']} rounds" in page


def test_speed_is_measured_of_every_start_alone(tmp_path, monkeypatch):
    searched: list[tuple[Any, ...]] = []

    def search(weight, left_shape, right_shape, *, starts):
        assert tuple(weight.shape) == (left_shape[0] * right_shape[0], left_shape[1] * right_shape[1]) == (3072, 768)
        searched.append((right_shape, *starts))
        return SimpleNamespace(captured=(0.25, 0.5))

    monkeypatch.setattr(permutation_recovery, "nearest_permuted_sum", search)
    permutation_recovery.speed(tmp_path / "permutation_speed.json", threads=1)
    results = json.loads((tmp_path / "permutation_speed.json").read_text(encoding="utf-8"))
    rows = [(tuple(row["right_shape"]), row["start"]) for row in results["rows"]]
    assert (
        rows
        == searched
        == [(shape, start) for shape in permutation_recovery.RIGHT_SHAPES for start in permutation_recovery.STARTS]
    )
    assert {row["captured"] for row in results["rows"]} == {0.5}
    page = structure_page.page(tmp_path)
    assert "1 threads" in page
    assert page.count("| 4×4 | ") == len(permutation_recovery.STARTS)
