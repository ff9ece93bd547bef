"""Captured energies are those of the fits and of the textbook; chance is chance; tables, plot and command show them."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from PIL import Image, ImageColor
from reference.kronecker import discarded_energy, rearranged
from rich.console import Console
from samples.matrices import normal
from torch import Tensor

import kronpress as kp
from kronpress import cli
from kronpress.matrices.metric import Metric
from kronpress.planning import meta_model
from kronpress.spectrum import Spectrum, plot_spectrum, spectrum, spectrum_of_weights, spectrum_tables
from kronpress.spectrum import measure as measure_module
from kronpress.spectrum.energies import (
    EXCESS,
    Form,
    bounded_output_energies,
    captured_energies,
    fitted_output_energy,
    forms,
)
from kronpress.spectrum.show import _STYLES

laws = settings(max_examples=30, deadline=None)
small = st.integers(1, 4)
seeds = st.integers(0, 2**32)
WINDOWS = torch.randint(3, 300, (16, 24), generator=torch.Generator().manual_seed(1))


def moment(seed: int, size: int) -> Tensor:
    """A regular second moment with eigenvalues over two orders of magnitude."""
    x = normal(seed, 4 * size, size) * torch.logspace(0, -1, size, dtype=torch.float64)
    mix = torch.linalg.qr(normal(seed + 1, size, size)).Q
    return mix @ (x.mT @ x) @ mix.mT / (4 * size)


@st.composite
def any_form(draw: st.DrawFn) -> Form:
    m1, n1, m2, n2 = (draw(small) for _ in range(4))
    if draw(st.booleans()):
        return Form("low_rank", (m1 * m2, 1), (1, n1 * n2))
    return Form("kronecker", (m1, n1), (m2, n2))


def captured_by_fit(weight: Tensor, form: Form, num_terms: int, metric: Metric | None = None) -> float:
    norm = metric or Metric()
    fitted = form.matrix_class.expand(form.matrix_class.fit(weight, form.spec(num_terms), metric))
    return 1 - norm.squared_norm(weight - fitted) / norm.squared_norm(weight)


# ---- the energy of W ----


@given(any_form(), seeds)
@laws
def test_energies_ascend_to_one_and_are_those_of_the_textbook_and_of_the_fit(form: Form, seed: int) -> None:
    weight = normal(seed, *form.shape)
    energies = captured_energies(weight, form)
    assert energies.shape == (form.most_terms,)
    assert (energies.diff() >= 0).all()
    assert energies[-1].item() == pytest.approx(1)
    for k, energy in enumerate(energies.tolist(), start=1):
        discarded = discarded_energy(rearranged(weight, form.left_shape, form.right_shape), k)
        assert energy == pytest.approx(1 - discarded / weight.square().sum().item(), abs=1e-9)
        assert energy == pytest.approx(captured_by_fit(weight, form, k), abs=1e-9)
        # The best k of most_terms directions hold at least their share.
        assert energy >= k / form.most_terms - 1e-12


@given(any_form(), seeds)
@laws
def test_a_planted_sum_is_captured_whole_by_as_many_terms(form: Form, seed: int) -> None:
    num_terms = 1 + seed % form.most_terms
    planted = form.matrix_class(*form.shape, form.spec(num_terms), dtype=torch.float64).to_dense().detach()
    energies = captured_energies(planted, form)
    assert energies[num_terms - 1].item() == pytest.approx(1)
    if num_terms > 1:
        assert energies[num_terms - 2].item() < 1 - 1e-9


def test_another_structure_does_not_capture_a_planted_product_whole() -> None:
    planted = torch.kron(normal(0, 6, 4), normal(1, 2, 4))
    (row,) = [row for row in spectrum_of_weights({"W": planted}).rows if row.right_shape == (2, 2)]
    assert row.captured_energy < 0.9
    assert captured_energies(planted, Form("kronecker", (6, 4), (2, 4)))[0].item() == pytest.approx(1)


def test_a_zero_matrix_has_nothing_that_is_not_captured() -> None:
    measured = spectrum_of_weights({"W": torch.zeros(8, 8)}, seconds={"W": torch.eye(8)})
    for row in measured.rows:
        assert (row.captured_energy, row.captured_output_energy) == (1, 1)
        assert row.chance < 1


# ---- chance ----


@pytest.mark.parametrize("right_shape", [(1, 2), (2, 1)])
def test_one_thin_term_captures_half_of_a_random_matrix(right_shape: tuple[int, int]) -> None:
    (row,) = [row for row in spectrum_of_weights({"W": normal(5, 160, 120)}).rows if row.right_shape == right_shape]
    assert row.num_terms == 1
    # The larger of two nearly equal eigenvalues: above one half by about 1 / √entries.
    assert 0.5 < row.chance < 0.5 + 4 / (160 * 120) ** 0.5
    assert row.captured_energy == pytest.approx(row.chance, abs=4 / (160 * 120) ** 0.5)


def test_a_random_matrix_is_captured_by_chance_alone_whatever_its_scale() -> None:
    for row in spectrum_of_weights({"W": 1e-3 * normal(7, 192, 96).float()}).rows:
        assert row.captured_energy == pytest.approx(row.chance, abs=0.015)


# ---- the energy of outputs ----


@given(any_form(), seeds)
@laws
def test_with_uncorrelated_inputs_outputs_are_captured_as_the_weight_is(form: Form, seed: int) -> None:
    weight, identity = normal(seed, *form.shape), torch.eye(form.shape[1], dtype=torch.float64)
    energies = captured_energies(weight, form)
    bounded = bounded_output_energies(weight, form, 3 * identity, form.most_terms)
    torch.testing.assert_close(bounded, energies, rtol=0, atol=1e-6)


@pytest.mark.parametrize("share", [0.3, 0.5, 1.0])
def test_rows_of_uncorrelated_inputs_have_one_energy_twice(share: float) -> None:
    for row in spectrum_of_weights({"W": normal(0, 24, 16)}, share, {"W": 3 * torch.eye(16)}).rows:
        assert row.captured_output_energy == pytest.approx(row.captured_energy, abs=1e-6)
        assert not row.is_lower_bound


@given(any_form(), seeds)
@laws
def test_lower_bounds_ascend_to_one_and_are_below_the_fit(form: Form, seed: int) -> None:
    weight, second = normal(seed, *form.shape), moment(seed + 1, form.shape[1])
    bounded = bounded_output_energies(weight, form, second, form.most_terms)
    assert (bounded.diff() >= 0).all()
    assert bounded[-1].item() == pytest.approx(1, abs=1e-4)
    for k, bound in enumerate(bounded.tolist(), start=1):
        fewer = bounded_output_energies(weight, form, second, k)[-1].item()
        assert fewer == pytest.approx(bound, abs=1e-6)
        assert bound <= captured_by_fit(weight, form, k, Metric(second)) + 1e-5


@given(any_form(), seeds)
@laws
def test_lower_bounds_are_exact_where_the_second_moment_is_separable(form: Form, seed: int) -> None:
    (_, n1), (_, n2) = form.left_shape, form.right_shape
    root = torch.kron(moment(seed + 1, n1), moment(seed + 2, n2))
    weight = normal(seed, *form.shape)
    bounded = bounded_output_energies(weight, form, root @ root, form.most_terms)
    torch.testing.assert_close(bounded, captured_energies(weight @ root, form), rtol=0, atol=1e-4)


@pytest.mark.parametrize("singular", [False, True])
def test_output_energies_are_those_of_the_fit(singular: bool) -> None:
    weight, second = normal(0, 32, 32), moment(1, 32)
    if singular:
        keep = torch.linalg.qr(normal(2, 32, 32)).Q[:, :20]
        second = keep @ keep.mT @ second @ keep @ keep.mT
    measured = spectrum_of_weights({"W": weight}, 0.5, {"W": second})
    assert len(measured.rows) == 8
    for row in measured.rows:
        m2, n2 = row.right_shape
        left_shape = (32, 1) if row.structure == "low_rank" else (32 // m2, 32 // n2)
        form = Form(row.structure, left_shape, row.right_shape)
        expected = captured_by_fit(weight, form, row.num_terms, Metric(second))
        assert row.captured_output_energy == pytest.approx(expected, abs=1e-6), row
        assert not row.is_lower_bound
        assert fitted_output_energy(weight, form, row.num_terms, Metric(second)) == pytest.approx(expected)


def test_fits_that_are_too_large_become_lower_bounds_and_then_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"W": normal(0, 32, 32)}, 0.5, {"W": moment(1, 32)}
    fitted = spectrum_of_weights(*given)
    monkeypatch.setattr(measure_module, "MOST_EQUATIONS_FITTED", 1)
    bounded = spectrum_of_weights(*given)
    monkeypatch.setattr(measure_module, "MOST_EQUATIONS_BOUNDED", 1)
    unknown = spectrum_of_weights(*given)
    kinds = set()
    for row, lower, none in zip(fitted.rows, bounded.rows, unknown.rows, strict=True):
        closed = row.structure == "low_rank" or row.right_shape == (2, 1)
        kinds.add(closed)
        assert (row.is_lower_bound, lower.is_lower_bound, none.is_lower_bound) == (False, not closed, False)
        assert lower.captured_energy == none.captured_energy == row.captured_energy
        if closed:
            assert row.captured_output_energy == lower.captured_output_energy == none.captured_output_energy
        else:
            assert none.captured_output_energy is None
            assert lower.captured_output_energy <= row.captured_output_energy + 1e-6
    assert kinds == {True, False}


# ---- sizes ----


@given(st.integers(1, 60), st.integers(1, 60), st.floats(0.01, 1))
@laws
def test_every_structure_is_taken_at_the_number_of_terms_nearest_to_the_share(m: int, n: int, share: float) -> None:
    found = forms(m, n)
    assert len({(form.structure, form.right_shape) for form in found}) == len(found)
    for form in found:
        assert form.shape == (m, n)
        k = form.terms_at(share)
        if k == 0:
            assert form.params_per_term > share * m * n
            continue
        num_params = form.matrix_class.count_params(m, n, form.spec(k))
        assert num_params == k * form.params_per_term
        assert num_params <= (1 + EXCESS) * share * m * n
        if k < form.most_terms:
            more = num_params + form.params_per_term
            too_many = more > (1 + EXCESS) * share * m * n
            assert too_many or more - share * m * n >= share * m * n - num_params


def test_gpt2_has_all_structures_at_half() -> None:
    assert [(form.right_shape, form.terms_at(0.5)) for form in forms(3072, 768)] == [
        ((1, 768), 307),
        ((1, 2), 1),
        ((2, 1), 1),
        ((2, 2), 2),
        ((4, 4), 8),
        ((4, 16), 32),
        ((16, 4), 32),
        ((48, 32), 384),
    ]


# ---- models ----


def test_a_spectrum_is_of_the_targets_at_the_budgets_share(tiny_model) -> None:
    model = tiny_model("gpt2")
    recipe = kp.load_recipe("low-rank", ["targets=mlp"])
    measured = spectrum(model, recipe)
    assert measured.share == 0.5
    names = [f"transformer.h.{block}.mlp.{role}" for block in (0, 1) for role in ("c_fc", "c_proj")]
    assert list(dict.fromkeys(row.name for row in measured.rows)) == names
    for row in measured.rows:
        weight = model.get_submodule(row.name).weight.detach().double().mT
        assert (row.out_features, row.in_features) == weight.shape
        assert row.kept_fraction == pytest.approx(row.num_params / weight.numel())
        assert row.captured_output_energy is None
        if row.structure == "low_rank":
            values = torch.linalg.svdvals(weight).square()
            assert row.captured_energy == pytest.approx((values[: row.num_terms].sum() / values.sum()).item())

    quarter = spectrum(model, kp.load_recipe("low-rank", ["budget.kept_of_targets=0.25"]))
    assert quarter.share == pytest.approx(0.25)
    plan = kp.make_plan(model, recipe)
    left = plan.num_params_dense - plan.num_params_targets_dense // 4
    by_count = spectrum(model, kp.load_recipe("low-rank", [f"budget.params={left}"]))
    assert by_count.share == pytest.approx(0.75)
    assert spectrum(model, kp.load_recipe("krony-81m")).share == 0.5


def test_curves_are_means_over_blocks_and_go_through_the_rows(tiny_model) -> None:
    model, recipe = tiny_model("llama"), kp.load_recipe("svd-llm")
    moments = kp.calibrate(model, [WINDOWS], recipe)
    measured = spectrum(model, recipe, moments)
    assert {curve.role for curve in measured.curves} == {
        f"model.layers.*.mlp.{part}_proj" for part in ("gate", "up", "down")
    }
    for curve in measured.curves:
        assert curve.num_matrices == 2
        rows = [
            row
            for row in measured.rows
            if re.sub(r"\.\d\.", ".*.", row.name) == curve.role
            and (row.structure, row.right_shape) == (curve.structure, curve.right_shape)
        ]
        at = curve.kept_fraction.index(pytest.approx(rows[0].kept_fraction))
        assert curve.captured_energy[at] == pytest.approx(sum(row.captured_energy for row in rows) / 2)
        assert curve.chance[at] == pytest.approx(rows[0].chance)
        output = sum(row.captured_output_energy for row in rows) / 2
        assert curve.captured_output_energy[at] <= output + 1e-6
        for values in (curve.kept_fraction, curve.captured_energy, curve.chance, curve.captured_output_energy):
            assert values == sorted(values)
        assert curve.kept_fraction[-1] <= 1 + EXCESS


def test_a_spectrum_is_the_same_after_json(tiny_model) -> None:
    measured = spectrum(tiny_model("gpt2"), kp.load_recipe("low-rank"))
    assert Spectrum.model_validate(json.loads(json.dumps(measured.model_dump(mode="json")))) == measured


def test_what_is_refused(tiny_model) -> None:
    model, recipe = tiny_model("gpt2"), kp.load_recipe("svd-llm")
    with pytest.raises(kp.RequestError, match="needs the model's weights, not its configuration alone"):
        spectrum(meta_model(model.config), recipe)
    with pytest.raises(kp.RequestError, match="matches none of the model's"):
        spectrum(model, kp.load_recipe("low-rank", ["targets=[nothing]"]))
    with pytest.raises(kp.RequestError, match="layers that are not targeted already hold"):
        spectrum(model, kp.load_recipe("low-rank", ["budget.params=10"]))
    with pytest.raises(kp.RequestError, match=r"c_fc \(64×16\): no structure has as few as 0.0009"):
        spectrum(model, kp.load_recipe("low-rank", ["budget.kept_of_targets=0.001"]))
    moments = kp.calibrate(model, [WINDOWS], recipe)
    fewer = {name: moments[name] for name in list(moments)[1:]}
    with pytest.raises(kp.RequestError, match=r"moments of 3 layers, but none of 'transformer.h.0.mlp.c_fc'"):
        spectrum(model, recipe, fewer)
    with pytest.raises(kp.RequestError, match=r"W: moments of shape \(3, 3\)"):
        spectrum_of_weights({"W": torch.ones(8, 8)}, seconds={"W": torch.eye(3)})
    with pytest.raises(kp.WorkError, match="W: the moments hold NaN"):
        spectrum_of_weights({"W": torch.ones(8, 8)}, seconds={"W": torch.full((8, 8), torch.nan)})
    with pytest.raises(kp.WorkError, match="the weight of 'W' holds NaN or infinity"):
        spectrum_of_weights({"W": torch.full((8, 8), torch.inf)})
    with pytest.raises(kp.RequestError, match="no matrices"):
        spectrum_of_weights({})
    for share in (0.0, -1.0, 1.1, float("nan")):
        with pytest.raises(kp.RequestError, match="above 0 and at most 1"):
            spectrum_of_weights({"W": torch.ones(8, 8)}, share)


# ---- what people are shown ----


def large(is_lower_bound: bool) -> Spectrum:
    """The widest that a table becomes: sizes of a large Llama, with a lower bound wherever there can be one."""
    rows, wide = [], {(4, 4), (4, 16), (16, 4), (1, 2), (2, 2), (96, 128)}
    for block in (0, 79):
        for form in forms(8192, 28672):
            rows.append(
                measure_module.SpectrumRow(
                    name=f"model.layers.{block}.mlp.down_proj",
                    out_features=8192,
                    in_features=28672,
                    structure=form.structure,
                    right_shape=form.right_shape,
                    num_terms=form.terms_at(0.5),
                    num_params=1,
                    kept_fraction=0.5,
                    captured_energy=0.987,
                    chance=0.612,
                    captured_output_energy=0.734 if is_lower_bound or block else None,
                    is_lower_bound=is_lower_bound and form.right_shape in wide,
                )
            )
    return Spectrum(share=0.5, rows=rows, curves=[])


@pytest.mark.parametrize("is_lower_bound", [True, False])
@pytest.mark.parametrize("soft_wrap", [True, False])
def test_tables_fit_in_80_columns_whole(is_lower_bound: bool, soft_wrap: bool) -> None:
    measured = large(is_lower_bound)
    (table,) = spectrum_tables(measured)
    console = Console(width=80, file=io.StringIO(), highlight=False, soft_wrap=soft_wrap)
    console.print(table)
    text = console.file.getvalue()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80, text
    assert text.splitlines()[0].strip() == "model.layers.*.mlp.down_proj, 8192×28672, at 0.500 of the parameters"
    lines = [line.split() for line in text.splitlines()]
    number_of = len(forms(8192, 28672))
    assert ["79", *["0.987"] * number_of] in lines
    assert ["chance", *["0.612"] * number_of] in lines
    assert ["terms", *(str(row.num_terms) for row in measured.rows[:number_of])] in lines
    assert ("≥: at least" in text, text.count("≥0.734") > 0) == (is_lower_bound, is_lower_bound)
    assert ["0", *["–"] * number_of] in lines or is_lower_bound


def test_tables_say_what_the_rows_say(tiny_model) -> None:
    model, recipe = tiny_model("gpt2"), kp.load_recipe("svd-llm")
    measured = spectrum(model, recipe, kp.calibrate(model, [WINDOWS], recipe))
    tables = spectrum_tables(measured)
    assert len(tables) == 2
    for table, role in zip(tables, ("c_fc", "c_proj"), strict=True):
        console = Console(width=80, file=io.StringIO(), highlight=False)
        console.print(table)
        lines = [line.split() for line in console.file.getvalue().splitlines()]
        for block in ("0", "1"):
            rows = [row for row in measured.rows if row.name == f"transformer.h.{block}.mlp.{role}"]
            assert [block, *(f"{row.captured_energy:.3f}" for row in rows)] in lines
            assert [block, *(f"{row.captured_output_energy:.3f}" for row in rows)] in lines


def test_the_plot_has_every_structure_in_its_colour(tmp_path) -> None:
    weights = {f"h.{block}.mlp.c_fc": normal(block, 64, 32) for block in (0, 1)}
    measured = spectrum_of_weights(weights, 0.5, {name: moment(3, 32) for name in weights})
    plot_spectrum(measured, tmp_path / "plot.png")
    colours = {colour[:3] for _, colour in Image.open(tmp_path / "plot.png").getcolors(1 << 24)}
    drawn = {"low rank", "balanced B", *(f"B {m2}×{n2}" for _, (m2, n2) in _kinds(measured))} & set(_STYLES)
    assert len(drawn) == len(forms(64, 32)) == 8
    for label in drawn:
        assert ImageColor.getrgb(_STYLES[label][0]) in colours, label
    plot_spectrum(measured, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text(encoding="utf-8").startswith("<?xml")
    with pytest.raises(kp.RequestError, match="has to end in"):
        plot_spectrum(measured, tmp_path / "plot.jpeg2")
    with pytest.raises(kp.RequestError, match="there is no folder"):
        plot_spectrum(measured, tmp_path / "none" / "plot.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(kp.WorkError, match="could not write"):
        plot_spectrum(measured, tmp_path / "folder.png")


def _kinds(measured: Spectrum) -> set[tuple[str, Any]]:
    return {(curve.structure, curve.right_shape) for curve in measured.curves}


# ---- the command ----


def call(*arguments: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def dense(tmp_path_factory, tiny_model, save_tiny_checkpoint) -> Path:
    return save_tiny_checkpoint(tiny_model("gpt2"), tmp_path_factory.mktemp("dense"))


def test_plan_with_a_spectrum_shows_the_weights_and_says_what_is_not_there(dense: Path, tmp_path) -> None:
    given = "plan", dense, "--recipe", "low-rank", "--spectrum"
    code, out, err = call(*given, "--plot", tmp_path / "plot.svg")
    assert code == 0, err
    measured = spectrum(kp.load_model(str(dense)).model, kp.load_recipe("low-rank"))
    for row in measured.rows:
        assert f"{row.captured_energy:.3f}" in out
        assert row.name in err
    assert not re.search(r"^ *of outputs *$", out, re.MULTILINE)
    said = "recipe 'low-rank' is not calibrated: --set weighting.metric=input adds the energy of outputs"
    assert said in " ".join(out.split())
    assert "\x1b" not in out
    assert (tmp_path / "plot.svg").is_file()

    code, out, _ = call(*given, "--json")
    document = json.loads(out)
    assert code == 0
    assert Spectrum.model_validate(document.pop("spectrum")) == measured
    assert document == json.loads(call("plan", dense, "--recipe", "low-rank", "--json")[1])


def test_plan_with_a_spectrum_of_a_calibrated_recipe_shows_outputs(dense: Path, tmp_path, tiny_text) -> None:
    (tmp_path / "text.txt").write_text(tiny_text, encoding="utf-8")
    calibration = f"calibration={{data: {tmp_path / 'text.txt'}, windows: 8, sequence_length: 24, held_out: 0}}"
    given = "plan", dense, "--recipe", "svd-llm", "--set", calibration, "--spectrum"
    code, out, err = call(*given)
    assert code == 0, err
    assert re.search(r"^ *of outputs *$", out, re.MULTILINE)
    assert "not calibrated" not in out
    rows = json.loads(call(*given, "--json")[1])["spectrum"]["rows"]
    assert len(rows) == 4 * len(forms(64, 16))
    for row in rows:
        assert f"{row['captured_output_energy']:.3f}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpt2", "--spectrum"], "--spectrum needs weights.*'gpt2' by name alone has no weights"),
        (["DENSE", "--plot", "plot.png"], "--plot 'plot.png' draws the spectrum: give --spectrum as well"),
        (["DENSE", "--spectrum", "--plot", "plot.gif"], "plot file 'plot.gif': its name has to end in"),
        (["DENSE", "--spectrum", "--plot", "none/plot.png"], "there is no folder 'none'"),
    ],
)
def test_wrong_requests_end_with_one_sentence(dense: Path, arguments: list[str], message: str) -> None:
    code, out, err = call("plan", *(dense if each == "DENSE" else each for each in arguments), "--recipe", "low-rank")
    assert (code, out, len(err.splitlines())) == (2, "", 1), err
    assert re.search(message, err)
