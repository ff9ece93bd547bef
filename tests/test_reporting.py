"""A report says what results.json says, and nothing else: as a document, and in a browser where there is one."""

from __future__ import annotations

import base64
import copy
import gzip
import importlib.util
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kronpress as kp
from kronpress import cli
from kronpress.errors import RequestError, WorkError
from kronpress.pipeline import run, shown
from kronpress.plan import Plan
from kronpress.reporting import run_report, write_report
from kronpress.reporting.charts import energy_chart, healing_chart, size_chart, speed_chart, thinned
from kronpress.reporting.network_map import network_map
from kronpress.reporting.pages import chart_library
from kronpress.reporting.results import digits, models
from kronpress.tokens import RunningText

ROOT = Path(__file__).parents[1]
COMMITTED = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text(encoding="utf-8"))


class Document(HTMLParser):
    """The elements of a page, and its text outside of scripts and styles."""

    VOID = frozenset({"meta", "link", "input", "br", "hr", "img"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.text += data


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model, save_tiny_checkpoint, tiny_recipe, tiny_text) -> tuple[Path, dict[str, Any]]:
    """A run directory with all that a report shows, and its results: two texts, rivals, a healing."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "heal.txt").write_text(tiny_text, encoding="utf-8")
    for name in ("one", "two"):
        (folder / f"{name}.txt").write_text(tiny_text[: 600 + 90 * len(name)], encoding="utf-8")
    save_tiny_checkpoint(tiny_model("gpt2"), folder / "dense")
    recipe = tiny_recipe(
        "kronecker",
        model=str(folder / "dense"),
        healing={"data": str(folder / "heal.txt"), "max_steps": 3, "sequences_per_step": 2, "sequence_length": 16},
        evaluation={"data": [str(folder / "one.txt"), str(folder / "two.txt")]},
        rivals=["low-rank", "dense", "8-bit"],
    )
    return folder / "run", run(recipe, folder / "run", command=["kronpress", "run", "a b.yaml", "--set", "seed=0"])


# ---- what a run measures for its report ----


def test_losses_of_the_tokens_are_those_of_the_logits(made, tiny_model):
    _, results = made
    loaded = kp.load_model(results["model"]["name"])
    tokenizer = loaded.tokenizer
    pieces = results["passage"]["tokens"]
    ids = [tokenizer.bos_token_id, *tokenizer("".join(pieces), add_special_tokens=False)["input_ids"]]
    expected = torch.log_softmax(loaded.model(torch.tensor([ids])).logits[0].double(), -1)
    nats = [-expected[position, token].item() for position, token in enumerate(ids[1:])]
    assert results["passage"]["bos"] and len(nats) == len(pieces) > 20
    torch.testing.assert_close(
        torch.tensor(results["rows"][0]["passage_nats"]), torch.tensor(nats), rtol=1e-4, atol=1e-5
    )
    assert all(len(row["passage_nats"]) == len(pieces) for row in results["rows"])


@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=80))
def test_the_pieces_of_a_passage_are_a_part_of_the_text(tiny_tokenizer, text):
    passage = shown.choose_passage(RunningText("x", [text], None), tiny_tokenizer, context=12)
    assert "".join(passage.pieces) in text
    assert len(passage.pieces) <= 11
    assert len(passage.ids) == len(passage.pieces) + 1


def test_a_passage_without_bos_has_no_loss_of_its_first_token(tiny_model, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.bos_token = None
    passage = shown.choose_passage(RunningText("x", ["He said nothing at all."], None), tokenizer, 64)
    nats = shown.token_nats(tiny_model("gpt2"), passage)
    assert not passage.bos and nats[0] is None and len(nats) == len(passage.pieces)
    assert all(each is not None and each > 0 for each in nats[1:])


def test_chance_is_what_a_fit_to_noise_captures(tiny_model, tiny_recipe):
    for structure in ("kronecker", "low_rank", "monarch"):
        plan = kp.make_plan(tiny_model("gpt2"), tiny_recipe(structure))
        chance = shown.chance_energies(plan.layers)
        assert chance.keys() == plan.layers.keys()
        name, layer = next(iter(plan.layers.items()))
        noise = torch.randn(
            layer.out_features, layer.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )
        fitted = layer.matrix_class.expand(layer.matrix_class.fit(noise, layer.spec))
        error = (fitted - noise).square().sum() / noise.square().sum()
        assert chance[name] == pytest.approx(1 - error.item(), abs=1e-9)


def test_speed_is_measured_of_what_computes_in_its_own_way(made):
    _, results = made
    assert results["speeds"].keys() == {"tiny-kronecker", "low-rank"}  # neither dense nor merely rounded numbers
    for speed in results["speeds"].values():
        spread = speed["speedup"]
        assert 0 < spread["first_quartile"] <= spread["median"] <= spread["third_quartile"]
        assert speed["prompt_tokens"] + speed["new_tokens"] <= 128
        assert speed["bound"] > 0


def test_speed_is_left_out_if_that_is_asked_for(made, tmp_path):
    _, results = made
    recipe = kp.load_recipe({**results["recipe"], "rivals": []}, ["evaluation.speed=false", "healing.max_steps=0"])
    again = run(recipe, tmp_path / "run")
    assert again["speeds"] == {}
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "chart-speed" not in page and "evaluation.speed is false" in page
    assert "chart-healing" not in page and "nothing was trained" in page


# ---- the document ----


def test_a_run_writes_its_report_and_the_command_the_same_again(made, capsys):
    directory, results = made
    first = (directory / "report.html").read_bytes().decode()
    assert first == run_report(results)
    (directory / "report.html").unlink()
    assert cli.main(["report", str(directory)]) == 0
    assert (directory / "report.html").read_bytes().decode() == first
    assert "report.html" in capsys.readouterr().out
    assert not list(directory.glob(".*"))


def test_the_page_is_well_formed_and_asks_for_nothing(made):
    _, results = made
    page = Document(run_report(results))
    assert page.open == []
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    policy = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy[0]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for tag, a in page.elements if tag == "a"} <= set(ids)


def test_the_library_in_the_page_is_the_one_of_the_package():
    from plotly.offline import get_plotlyjs

    assert gzip.decompress(base64.b64decode(chart_library())).decode() == get_plotlyjs()


def test_every_figure_of_the_results_is_in_the_page(made):
    _, results = made
    text = Document(run_report(results)).text
    for row in results["rows"]:
        assert row["name"] in text
        assert f"{row['num_params']:,}" in text
        for figures in row["metrics"].values():
            assert digits(figures["perplexity"]) in text
    for name, report in results["layers"].items():
        assert name in text
        assert digits(report["captured_energy"]) in text
    for version in results["versions"].values():
        assert version in text
    assert "kronpress run 'a b.yaml' --set seed=0" in text
    assert "protocol window, window 128, stride 128, BOS" in text
    assert results["device"] in text
    for piece in results["passage"]["tokens"]:
        assert piece in text


def test_names_and_texts_are_text_and_no_markup(made):
    _, results = made
    evil = "<script>alert(1)</script>&</script><!--"
    changed = json.loads(json.dumps(results).replace("tiny-kronecker", json.dumps(evil)[1:-1]))
    changed["prompt"] = ""
    changed["rows"][0]["continuation"] = evil
    changed["passage"]["tokens"][0] = evil
    html = run_report(changed)
    page = Document(html)
    assert page.open == []
    assert "<script>alert" not in html
    assert page.text.count("alert(1)") > 3
    assert [tag for tag, _ in page.elements].count("script") == [
        tag for tag, _ in Document(run_report(results)).elements
    ].count("script")


def test_what_old_results_do_not_have_is_left_out_and_named():
    page = Document(run_report(COMMITTED))
    for words in ("made without it", "did not measure it", "did not compute it"):
        assert words in page.text
    ids = {attributes.get("id") for _, attributes in page.elements}
    assert {"chart-healing", "chart-size"} <= ids
    assert not {"chart-speed", "chart-energy", "passage"} & ids


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, RequestError, "has no results.json"),
        ("{", WorkError, "is damaged"),
        ("{}", RequestError, "is not the results.json of a run: it needs format_version"),
        (json.dumps({**COMMITTED, "format_version": 99}), WorkError, "newer than 1.*upgrade kronpress"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, content, error, message):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(error, match=message):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


# ---- its parts ----


def test_models_know_their_parts(made):
    _, results = made
    assert [(model.role, model.base, model.is_trained) for model in models(results)] == [
        ("dense", "dense", False),
        ("main", "tiny-kronecker", False),
        ("main", "tiny-kronecker", True),
        ("rival", "low-rank", False),
        ("rival", "low-rank", True),
        ("rival", "dense", True),
        ("rival", "dense, 8-bit", False),
    ]
    speedups = {model.base: model.speedup for model in models(results)}
    assert speedups["dense"] == 1.0 and speedups["dense, 8-bit"] is None
    assert speedups["low-rank"] == results["speeds"]["low-rank"]["speedup"]["median"]


def test_charts_have_a_picture_for_every_choice_and_all_figures_in_their_table(made):
    _, results = made
    found = models(results)
    for chart in (size_chart(found), speed_chart(found)):
        choices = [""]
        for options in chart.controls.values():
            choices = [f"{choice}|{option}".removeprefix("|") for choice in choices for option in options]
        assert chart.views.keys() == set(choices)
        for view in chart.views.values():
            names = [series.name for series in view.series]
            assert len(names) == len(set(names))
            assert all(len(each.x) == len(each.y) == len(each.texts) for each in view.series)
        assert len(chart.table.rows) == len([m for m in found if chart.name == "size" or m.speedup is not None])
        assert {len(row) for row in chart.table.rows} == {len(chart.table.columns)}


def test_steps_are_counted_through_the_stages():
    row = {"step": 2, "language_model_nats": 3.0, "distillation_nats": None, "learning_rate": 0.1}
    from kronpress.reporting.run_report import healing_logs

    staged = {
        **COMMITTED,
        "rows": COMMITTED["rows"][:3],
        "rivals": [],
        "stages": [{"healing": {"num_steps": 5, "rows": [row]}}],
        "healing": {"num_steps": 4, "rows": [row]},
    }
    (log,) = healing_logs(staged).values()
    assert [each["step"] for each in log] == [2, 7]
    chart = healing_chart({"x": log})
    assert list(chart.controls["Show"]) == ["cross-entropy, nats per token", "learning rate"]


@given(length=st.integers(1, 5000), most=st.integers(2, 900))
def test_thinning_keeps_both_ends_and_order(length, most):
    kept = thinned(length, most)
    assert kept == sorted(set(kept))
    assert len(kept) == min(length, most)
    assert (kept[0], kept[-1]) == (0, length - 1)


def test_energy_without_chance_is_no_chart(made):
    _, results = made
    assert energy_chart(results["layers"], {}) is None
    chart = energy_chart(results["layers"], results["chance"])
    assert {tuple(row[:1]) for row in chart.table.rows} == {(name,) for name in results["layers"]}
    some = {**results["chance"], next(iter(results["chance"])): None}
    assert "Of 1 matrices chance is not known" in energy_chart(results["layers"], some).remark


@pytest.mark.parametrize("structure", ["kronecker", "low_rank", "structured_sum", "tensor_gpt"])
def test_the_map_has_every_matrix_once(tiny_model, tiny_recipe, structure):
    plan = kp.make_plan(tiny_model("gpt2"), tiny_recipe(structure))
    layers = {name: _layer_report(layer) for name, layer in plan.layers.items()}
    drawn = network_map(plan.model_dump(mode="json"), layers, {})
    cells = [cell for grid in drawn.grids for _, row in grid.rows for cell in row if cell is not None]
    assert sorted(cell.name for cell in cells) == sorted(plan.layers)
    for cell in cells:
        assert all(0 <= value <= 1 for value in cell.values.values())
        assert cell.labels.keys() == {"error", "output", "size", "structure"}
        assert f"{plan.layers[cell.name].num_params:,} of" in dict(cell.details)["parameters"]
    assert len({colour for colour, _ in drawn.structures}) <= 8


def test_what_an_allocation_left_dense_is_in_the_map_as_such(tiny_model, tiny_recipe):
    plan: Plan = kp.make_plan(tiny_model("gpt2"), tiny_recipe("kronecker"))
    name, *others = plan.layers
    left = plan.without([name], 0)
    drawn = network_map(left.model_dump(mode="json"), {}, {})
    cells = {cell.name: cell for grid in drawn.grids for _, row in grid.rows for cell in row if cell is not None}
    assert cells.keys() == {name, *others}
    assert cells[name].labels["structure"] == "dense"


def _layer_report(layer: Any) -> dict[str, Any]:
    return kp.LayerReport(
        relative_error=1.25,
        captured_energy=-0.56,
        relative_output_error=0.5,
        kept_fraction=layer.num_params / layer.num_params_dense,
        num_params=layer.num_params,
        num_params_dense=layer.num_params_dense,
    ).model_dump()


# ---- in a browser ----


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("look_at_report", ROOT / "scripts" / "look_at_report.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


script = load_script()


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("playwright", reason="the extra `browser` is not installed")
    pytest.importorskip("axe_playwright_python", reason="the extra `browser` is not installed")
    if script.find_chromium() is None:
        pytest.skip("there is no Chromium on the PATH")
    with script.chromium() as opened:
        yield opened


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", ["wide", "narrow"])
def test_chromium_and_axe_find_nothing(made, browser, size, theme):
    with script.opened(browser, made[0] / "report.html", size, theme) as watched:
        assert watched.findings() == []
        assert watched.overflow() <= 0
        assert watched.page.locator(".plot .main-svg").count() > 0
    assert (watched.said, watched.asked_for) == ([], [])


def test_every_control_does_what_it_says(made, browser):
    directory, results = made
    with script.opened(browser, directory / "report.html") as watched:
        page = watched.page

        # The theme.
        back = "getComputedStyle(document.body).backgroundColor"
        light = page.evaluate(back)
        page.get_by_label("Dark").check(force=True)
        assert page.evaluate(back) != light
        page.get_by_label("Light").check(force=True)
        assert page.evaluate(back) == light

        # The map: by the pointer, by the keyboard, and what it is coloured by.
        name, report = next(iter(results["layers"].items()))
        cell = page.locator(f'td[data-figures^="{name}\\a "]')
        cell.hover()
        figures = page.locator(".map .figures")
        assert name in figures.inner_text() and digits(report["relative_error"]) in figures.inner_text()
        cell.focus()
        page.keyboard.press("ArrowDown")
        assert page.evaluate("document.activeElement.dataset.figures").startswith(name.replace(".0.", ".1."))
        assert page.evaluate("document.activeElement.dataset.figures") == figures.text_content()
        assert cell.inner_text() == f"{report['relative_error']:.2f}"
        page.get_by_label("parameters kept").check(force=True)
        assert cell.inner_text() == f"{report['kept_fraction']:.2f}"

        # A table that sorts, up and down.
        table = page.locator("table.sorts").first
        table.get_by_role("button", name="parameters").click()
        order = [int(text.replace(",", "")) for text in table.locator("tbody td:nth-child(2)").all_inner_texts()]
        assert order == sorted(order)
        table.get_by_role("button", name="parameters").click()
        order = [int(text.replace(",", "")) for text in table.locator("tbody td:nth-child(2)").all_inner_texts()]
        assert order == sorted(order, reverse=True)

        # A chart: its choices, what is shown of it, and its points one by one.
        chart = page.locator("#chart-size")
        drawn = "document.querySelector('#chart-size .plot').data"
        chart.locator("select").first.select_option("megabytes")
        dense = results["rows"][0]
        assert page.evaluate(f"{drawn}[0].x[0]") == pytest.approx(dense["bytes"] / 1e6)
        count = page.evaluate(f"{drawn}.length")
        chart.locator(".keys button").first.click()
        assert page.evaluate(f"{drawn}.length") == count - 1
        assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "false"
        page.keyboard.press("Enter")
        assert page.evaluate(f"{drawn}.length") == count
        chart.locator(".plot").focus()
        page.keyboard.press("ArrowRight")
        assert chart.locator(".said").inner_text().startswith("dense: ")
        assert chart.locator(".hovertext").count() == 1
        page.keyboard.press("ArrowDown")
        assert chart.locator(".said").inner_text().startswith("tiny-kronecker: ")

        # The passage.
        token = page.locator(".tokens span").nth(1)
        token.focus()
        nats = results["rows"][0]["passage_nats"][1]
        assert f"dense {nats:.2f}" in page.locator(".passage .figures").inner_text()
        page.keyboard.press("End")
        assert page.evaluate("document.activeElement === [...document.querySelectorAll('.tokens span')].at(-1)")
        before = page.locator(".tokens").evaluate("e => [...e.children].map(s => getComputedStyle(s).backgroundColor)")
        page.get_by_label(re.compile("healed less dense")).check(force=True)
        after = page.locator(".tokens").evaluate("e => [...e.children].map(s => getComputedStyle(s).backgroundColor)")
        assert before != after
    assert (watched.said, watched.asked_for) == ([], [])


def test_the_page_can_be_printed_and_read_without_scripts(made, browser):
    directory, results = made
    with script.opened(browser, directory / "report.html", theme="dark") as watched:
        assert watched.page.pdf()[:4] == b"%PDF"
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((directory / "report.html").as_uri())
    assert results["rows"][0]["name"] in page.locator("main").inner_text()
    page.locator("#chart-size summary").click()
    assert page.locator("#chart-size table").is_visible()
    context.close()
