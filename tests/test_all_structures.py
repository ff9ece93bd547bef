"""The choice from several structures: one more never makes it worse, and all are compared in one metric.

And the table over all of them: which rows it has, and what is measured of each.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import kronpress as kp
from kronpress import RequestError
from kronpress.candidates import DENSE, FITTED, Choice, choose, screen
from kronpress.layers import StructuredLinear
from kronpress.matrices import STRUCTURES
from kronpress.matrices.metric import Metric
from kronpress.plan import LayerPlan

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import all_structures  # noqa: E402
import fit_table  # noqa: E402

# All that a matrix can become; orders are searched too slowly to be candidates, and an embedding's rows are no matrix.
CANDIDATES = ("low_rank", "kronecker", "monarch", "blast", "tensor_train", "structured_sum", "selected")
few = settings(max_examples=12, deadline=None)


class Problem:
    """Matrices of random shapes and spectra, each with a metric of its own."""

    def __init__(self, seed: int, shapes: list[tuple[int, int]], sides: str) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.matrices: dict[str, tuple[Tensor, Metric]] = {}
        for number, (m, n) in enumerate(shapes):
            weight = self._normal(m, n) * torch.linspace(1, 0.1, n, dtype=torch.float64) @ self._normal(n, n)
            metric = Metric(
                self._moment(n) if "input" in sides else None, self._moment(m) if "output" in sides else None
            )
            self.matrices[f"matrix {number}"] = weight, metric

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def _moment(self, size: int) -> Tensor:
        x = self._normal(size, 2 * size) * torch.linspace(2, 0.2, size, dtype=torch.float64)[:, None]
        return x @ x.mT / size

    def budget(self, kept: float) -> int:
        return int(kept * sum(weight.numel() for weight, _ in self.matrices.values()))

    def choice(self, structures: tuple[str, ...], kept: float) -> Choice:
        tables = {
            name: screen(weight, metric, structures, lambda *_: True)
            for name, (weight, metric) in self.matrices.items()
        }
        return choose(tables, self.matrices.__getitem__, self.budget(kept))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    shapes = draw(st.lists(st.sampled_from([(8, 6), (6, 8), (12, 4), (8, 8)]), min_size=1, max_size=3))
    return Problem(draw(st.integers(0, 2**32)), shapes, draw(st.sampled_from(["", "input", "output", "input output"])))


def prefixes(structures: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    return (structures[: count + 1] for count in range(len(structures)))


@given(
    problem=problems(),
    structures=st.lists(st.sampled_from(CANDIDATES), min_size=2, max_size=4, unique=True).map(tuple),
    kept=st.floats(0.3, 0.9),
)
@few
def test_one_structure_more_never_makes_the_choice_worse(problem, structures, kept):
    rises = []
    for some in prefixes(structures):
        try:
            rises.append(problem.choice(some, kept).allocation.error)
        except RequestError:  # none of these are so small
            rises.append(math.inf)
    assert rises == sorted(rises, reverse=True)


@given(problem=problems(), kept=st.floats(0.3, 0.9))
@few
def test_every_fitted_candidate_has_the_error_of_its_fit_in_the_one_metric_of_its_matrix(problem, kept):
    choice = problem.choice(CANDIDATES, kept)
    assert choice.allocation.num_params <= problem.budget(kept)
    assert choice.allocation.error == sum(each.rise for each in choice.chosen.values())
    for name, table in choice.candidates.items():
        weight, metric = problem.matrices[name]
        assert choice.chosen[name] in table and choice.chosen[name].evidence == FITTED
        for each in table:
            structure = STRUCTURES.get(each.structure)
            if structure is None:
                assert (each.structure, each.num_params, each.rise) == (DENSE, weight.numel(), 0)
            elif each.evidence == FITTED:
                error = weight - structure.expand(structure.fit(weight, each.spec, metric))
                found = Metric(metric.input, metric.output).squared_norm(error) / 2
                assert each.rise == pytest.approx(found, rel=1e-4, abs=1e-9 * metric.squared_norm(weight))
                assert each.num_params == structure.count_params(*weight.shape, each.spec)


# Those of the others that have no more than a local optimum may miss one that was planted.
@pytest.mark.parametrize("planted", ["low_rank", "kronecker", "monarch", "selected"])
def test_a_matrix_of_one_kind_is_given_that_kind(planted):
    problem = Problem(0, [(16, 8)], "input output")
    structure = STRUCTURES[planted]
    [weight, metric] = problem.matrices["matrix 0"]
    spec = min(structure.candidate_specs(16, 8, 50), key=lambda spec: structure.count_params(16, 8, spec))
    random = structure(16, 8, spec, dtype=torch.float64).to_dense().detach()
    problem.matrices["matrix 0"] = random, metric
    kept = structure.count_params(16, 8, spec) / weight.numel()
    choice = problem.choice(CANDIDATES, kept)
    assert choice.allocation.error <= 1e-9 * metric.squared_norm(random)


def test_a_structure_that_the_budget_is_too_small_for_alone_is_taken_with_the_next():
    problem = Problem(1, [(8, 6), (6, 8)], "input")
    kept = 27 / 96  # rank 1 has 14 parameters, one column of the first or row of the second 6
    with pytest.raises(RequestError, match="leaves 27 parameters; the smallest candidates have 28"):
        problem.choice(("low_rank",), kept)
    choice = problem.choice(("low_rank", "selected"), kept)
    assert {each.structure for each in choice.chosen.values()} & {"selected"}


# ---- the table: which rows there are ----


@pytest.fixture(scope="module")
def pocket() -> kp.checkpoint.LoadedModel:
    return kp.load_model("pocket")


def planned(row: dict[str, Any], model: nn.Module) -> kp.Plan:
    return kp.make_plan(model, kp.load_recipe(row["recipe"], row["set"], "pocket"))


def test_no_two_rows_are_the_same_and_every_structure_of_a_matrix_has_one():
    rows = all_structures.all_rows()
    assert rows[0] == {"name": "dense", "rival": "dense"}
    job = fit_table.Job("run", Path("work"))
    assert len({fit_table._file_of(row, job) for row in rows}) == len(rows)
    recipes = [kp.load_recipe(row["recipe"], row["set"], "pocket") for row in rows[1:]]
    assert len({recipe.model_dump_json() for recipe in recipes}) == len(recipes)
    assert {str(recipe.targets) for recipe in recipes} == {"mlp"}
    named = {recipe.structure for recipe in recipes}
    assert named >= set(STRUCTURES) - {"selected", "tensor_gpt"}  # a part of a sum, and one for embeddings alone
    few, structures, default, everything = dict.fromkeys(
        tuple(recipe.candidates) for recipe in recipes if recipe.name == "auto"
    )
    assert structures == CANDIDATES == all_structures.ALL
    assert default == (*few, "reduced") == tuple(kp.load_recipe("auto").candidates)
    assert everything[: len(default)] == default and {*everything} == {*structures, "reduced"}


def test_rows_of_one_size_have_it(pocket):
    rows = [row for row in all_structures.all_rows()[1:] if row["recipe"] not in ("auto", "modegpt")]
    for row in rows:
        plan = planned(row, pocket.model)
        assert row["kept"] * 0.93 < plan.kept_of_targets <= row["kept"] * 1.005, row["name"]
        assert len(plan.layers) == 12 and not plan.left_dense


# ---- what is measured of a row ----


def layer_plan(structure: str, spec: dict[str, Any], shape: tuple[int, int] = (24, 16)) -> LayerPlan:
    return LayerPlan(structure=structure, out_features=shape[0], in_features=shape[1], spec=spec)


def test_chance_is_what_the_fit_captures_of_a_gaussian_matrix():
    one_term = layer_plan("kronecker", {"left_shape": (240, 60), "right_shape": (2, 2), "num_terms": 1}, (480, 120))
    assert all_structures.chance_of(one_term) == pytest.approx(1 / 4, abs=0.02)  # METHODS: k (m1 n1 + m2 n2) / (m n)
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for rank in (1, 5):
        energies = torch.linalg.svdvals(weight).square()
        expected = (energies[:rank].sum() / energies.sum()).item()
        assert all_structures.chance_of(layer_plan("low_rank", {"rank": rank})) == pytest.approx(expected)
    pruned = one_term.model_copy(
        update={
            "out_features": 480,
            "in_features": 120,
            "spec": STRUCTURES["kronecker"].Spec(left_shape=(480, 60), right_shape=(1, 2)),
            "options": STRUCTURES["kronecker"].Options(start="prune"),
        }
    )
    # ½ of the energy is kept, and of the rest what a tenth of an independent neighbour adds is lost.
    assert all_structures.chance_of(pruned) == pytest.approx(0.5 - 0.005, abs=0.02)


def test_layers_are_compared_on_what_the_dense_model_reads(pocket):
    row = next(row for row in all_structures.all_rows() if row.get("method") == "low rank (SVD)")
    plan = planned(row, pocket.model)
    student = kp.load_model("pocket")
    same = all_structures.differences(pocket, student, plan)
    assert same == {"output_error": 0.0, "mlp_error": 0.0}
    kp.compress_(student.model, plan)
    found = all_structures.differences(pocket, student, plan)
    name = "transformer.h.3.mlp.c_fc"
    ids = torch.arange(40)[None] + 7
    read = all_structures.read_by(pocket.model, [name, "transformer.h.3.mlp"], ids)
    with torch.no_grad():
        embedded = pocket.model.transformer(input_ids=ids, output_hidden_states=True).hidden_states[3]
        block = pocket.model.transformer.h[3]
        torch.testing.assert_close(
            read[name], block.ln_2(embedded + block.attn(block.ln_1(embedded))[0]), rtol=1e-4, atol=1e-4
        )
    torch.testing.assert_close(read[name], read["transformer.h.3.mlp"], rtol=0, atol=0)
    assert 0 < found["output_error"] < 1 and found["mlp_error"] > 0
    folded = all_structures.differences(pocket, student, plan.model_copy(update={"folding": ["mlp"]}))
    assert folded == {"output_error": None, "mlp_error": found["mlp_error"]}


def test_models_take_turns_and_the_first_rounds_do_not_count(monkeypatch):
    called: list[str] = []

    class Slow(nn.Linear):
        def __init__(self, label: str) -> None:
            super().__init__(3, 2)
            self.label = label

        def forward(self, x: Tensor) -> Tensor:
            called.append(self.label)
            clock[0] += (100.0 if len(called) <= 2 * 3 else 1.0) * {"dense": 1, "student": 3}[self.label]
            return super().forward(x)

    clock = [0.0]
    monkeypatch.setattr(all_structures.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(all_structures, "ROUNDS", {5: 4})
    dense, student = (nn.ModuleDict({"layer": Slow(label)}) for label in ("dense", "student"))
    found = all_structures.seconds_of_layers(dense, student, ["layer"], 5)
    assert called == ["dense", "student"] * 7
    assert found == {"dense_seconds": 1.0, "student_seconds": 3.0, "over_dense": 3.0}


@pytest.mark.parametrize("more", [[], ["reduced"]])
def test_what_was_picked_stands_beside_the_best_of_every_other_structure_of_its_size(tiny_model, more):
    recipe = kp.load_recipe(
        {
            "structure": "auto",
            "candidates": ["low_rank", "kronecker", "monarch", *more],
            "allocation": "measured",
            "weighting": {"metric": "loss"},
            "budget": {"kept_of_targets": 0.5},
        }
    )
    model = tiny_model("gpt2")
    windows = torch.randint(0, model.config.vocab_size, (4, 16), generator=torch.Generator().manual_seed(0))
    plan = kp.make_plan(model, recipe, kp.calibrate(model, [windows], recipe))
    found = all_structures.picked(plan)
    assert found["predicted_rise"] == plan.allocation.predicted_rise
    assert list(found["matrices"]) == [*plan.layers, *plan.left_dense]
    rises = [each["predicted_rise"] for each in found["matrices"].values()]
    assert sum(rise for rise in rises if rise is not None) == pytest.approx(found["predicted_rise"])
    assert ("reduced" in {each["structure"] for each in found["matrices"].values()}) == bool(more)
    for name, each in found["matrices"].items():
        assert each["structure"] not in each["others"]
        if each["structure"] == "reduced":  # beside both matrices by another
            assert (each["predicted_rise"] is None) == name.endswith("c_fc") == (not each["others"])
            assert all(other["predicted_rise"] >= each["predicted_rise"] for other in each["others"].values())
            continue
        for structure, other in each["others"].items():
            rises = [
                row.predicted_rise
                for row in plan.allocation.candidates[name]
                if row.structure == structure and row.num_params <= each["num_params"]
            ]
            assert other["predicted_rise"] == min(rises)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_one_candidate_more_never_makes_a_plan_worse_wherever_fewer_units_stand(tiny_model, family):
    model = tiny_model(family)
    windows = torch.randint(0, model.config.vocab_size, (4, 16), generator=torch.Generator().manual_seed(0))
    recipe = {"structure": "auto", "allocation": "measured", "targets": "mlp", "weighting": {"metric": "loss"}}
    moments = kp.calibrate(model, [windows], kp.load_recipe({**recipe, "budget": {"kept_of_targets": 0.5}}))
    candidates = ["low_rank", "reduced", "kronecker", "monarch"]
    assert all_structures.AUTO_AND_ALL[:3] == tuple(kp.load_recipe("auto").candidates)
    for kept in (0.2, 0.4, 0.6):
        rises = []
        for count in range(1, 1 + len(candidates)):
            given = {**recipe, "candidates": candidates[:count], "budget": {"kept_of_targets": kept}}
            plan = kp.make_plan(model, kp.load_recipe(given), moments)
            rises.append(plan.allocation.predicted_rise)
        assert rises == sorted(rises, reverse=True) and rises[1] < rises[0]


@pytest.mark.parametrize("num_cores", [2, 3])
def test_what_is_slow_by_its_factors_trains_the_same_through_its_weight(tiny_model, num_cores):
    model = tiny_model("gpt2")
    changes = ["structure=tensor_train", f"spec.num_cores={num_cores}", "budget.kept_of_targets=0.8"]
    kp.compress_(model, kp.make_plan(model, kp.load_recipe("low-rank", changes)))
    ids = torch.arange(24).reshape(2, 12) % model.config.vocab_size
    parameters = list(model.parameters())

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(model(input_ids=ids, labels=ids).loss, parameters)

    expected, names = gradients(), set(model.state_dict())
    with all_structures.by_dense_weights(model):
        layers = [layer for layer in model.modules() if isinstance(layer, StructuredLinear)]
        assert layers and all("forward" in vars(layer) for layer in layers)
        for found, wanted in zip(gradients(), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert set(model.state_dict()) == names
    assert not any("forward" in vars(layer) for layer in layers)


# ---- running and showing ----


def little(*methods: str) -> list[dict[str, Any]]:
    return [
        row
        for row in all_structures.all_rows()
        if row["name"] == "dense" or (row["kept"] == 0.5 and row["method"] in methods)
    ]


def test_what_is_done_is_not_measured_again_and_the_page_shows_it(tmp_path, monkeypatch, capsys):
    threads = torch.get_num_threads()
    rows = little("low rank (SVD)", "Krony-PT, Van Loan")
    missing = {**rows[1], "name": "0.5: later", "recipe": "no-such-recipe"}
    refused = {**rows[1], "name": "0.5: refused", "set": ["budget.kept_of_targets=0.0001"]}
    monkeypatch.setattr(all_structures, "all_rows", lambda: [*rows, missing, refused])
    monkeypatch.setattr(all_structures, "ROUNDS", {1: 2, 512: 2})
    out, options = tmp_path / "out.json", {"characters": 400, "steps": 0}
    try:
        all_structures.run(tmp_path / "work", out, only="low rank", **options)
        first = json.loads(out.read_text(encoding="utf-8"))
        assert [row["name"] for row in first["rows"]] == ["dense", "0.5: low rank (SVD)"]
        assert first["not_measured"] == ["0.5: Krony-PT, Van Loan", "0.5: later", "0.5: refused"]
        measured: list[str] = []
        measure = all_structures.measure
        monkeypatch.setattr(
            all_structures, "measure", lambda row, job: measured.append(row["name"]) or measure(row, job)
        )
        all_structures.run(tmp_path / "work", out, **options)
        with pytest.raises(RequestError, match="keeps rows of other settings"):
            all_structures.run(tmp_path / "work", out, characters=500, steps=0)
    finally:
        torch.set_num_threads(threads)
    assert measured == ["0.5: Krony-PT, Van Loan", "0.5: refused"]
    assert "skipped 0.5: later: there is no recipe 'no-such-recipe'" in capsys.readouterr().err
    results = json.loads(out.read_text(encoding="utf-8"))
    assert results["rows"][:2] == first["rows"] and results["not_measured"] == ["0.5: later"]
    dense, low_rank, krony, _ = results["rows"]
    assert krony["flops_over_dense"] == pytest.approx(0.5, rel=0.01)
    assert krony["captured_energy"] == pytest.approx(krony["chance"], abs=0.03)  # as Krony-PT's starts do
    assert low_rank["captured_energy"] > low_rank["chance"] + 0.1
    assert low_rank["before"]["test books"]["nll_mean_nats"] > dense["before"]["test books"]["nll_mean_nats"]
    page = all_structures.page(results)
    assert f"| low rank (SVD) | {low_rank['kept_of_targets']:.3f} | {low_rank['captured_energy']:.3f} |" in page
    assert "Not measured: 0.5: later." in page and "0.5: refused cannot be had: " in page
    assert "## 0.5 of the MLPs" in page and "What `auto` picks" not in page
    assert [round(row["kept"], 2) for row in results["embedding"]] == [0.08, 0.08, 0.08]
    for row in results["embedding"]:
        assert 0 < row["chance"] < row["captured_energy"] < 1
        assert f"| {row['method']} | {row['kept']:.3f} | {row['captured_energy']:.3f} | {row['chance']:.3f} |" in page


def test_a_row_that_fails_is_told_and_the_others_are_kept(tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    rows = little("low rank (SVD)")
    monkeypatch.setattr(all_structures, "all_rows", lambda: rows)

    def measure(row, job):
        if row["name"] != "dense":
            raise ValueError("no luck")
        return row

    monkeypatch.setattr(all_structures, "measure", measure)
    try:
        with pytest.raises(kp.WorkError, match=r"1 rows failed.*low rank \(SVD\) \(ValueError: no luck\)"):
            all_structures.run(tmp_path / "work", tmp_path / "out.json", characters=400, steps=0)
    finally:
        torch.set_num_threads(threads)
    assert [row["name"] for row in json.loads((tmp_path / "out.json").read_text())["rows"]] == ["dense"]


def test_every_row_is_healed_on_the_same_tokens_with_the_best_of_its_rates(tmp_path, monkeypatch, pocket):
    job = fit_table.Job("run", tmp_path, steps=20, distil=True, rates=all_structures.RATES, characters=400)
    row = little("low rank (SVD)")[1]
    calls: list[tuple[float, int, int]] = []

    def heal_(model, teacher, tokens, healing):
        assert teacher is pocket.model and model is not pocket.model
        assert (healing.language_model_weight, healing.distillation_weight) == (0, 1)
        calls.append((healing.learning_rate, healing.max_steps, len(tokens)))
        with torch.no_grad():  # the second rate does best
            model.transformer.wte.weight.mul_(1 + abs(healing.learning_rate - all_structures.RATES[1]) * 100)

    monkeypatch.setattr(all_structures.kp, "heal_", heal_)
    found = all_structures.healed(row, job, pocket, pocket.model, lambda model: "measured")
    rates, steps, tokens = zip(*calls, strict=True)
    assert (rates, steps) == ((*all_structures.RATES, all_structures.RATES[1]), (2, 2, 2, 20))
    assert len(set(tokens)) == 1
    assert (found["rate"], found["after"], found["tokens"]) == (all_structures.RATES[1], "measured", 20 * 8 * 256)


def test_the_page_is_that_of_the_committed_result():
    path = all_structures.OUT
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    page = (ROOT / "docs" / "results" / "all_structures.md").read_text(encoding="utf-8")
    assert page == all_structures.page(results)
    if results is None:
        assert "Not measured yet: `python benchmarks/all_structures.py run" in page
        return
    autos = {
        (row["kept"], row["method"]): row["picked"]["predicted_rise"] for row in results["rows"] if "picked" in row
    }
    for kept in all_structures.KEPT:
        few, structures, default, every = (autos[kept, method] for method, *_ in all_structures.METHODS[-4:])
        assert max(structures, default) <= few
        assert every <= structures
