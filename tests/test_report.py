"""What people are shown fits in 80 columns, whole: no line is longer, and no figure is cut or broken in two."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

import kronpress as kp
from kronpress.checkpoint import load_config
from kronpress.healing import HealingRow
from kronpress.recipe import recipe_names
from kronpress.report import evaluation_table, healing_line, layers_table, plan_tables, results_table

WIDTH = 80


def render(table: Table, width: int = WIDTH, soft_wrap: bool = False) -> str:
    """As rich prints it by itself, or as the command line does (`soft_wrap`)."""
    console = Console(width=width, file=io.StringIO(), highlight=False, soft_wrap=soft_wrap)
    console.print(table)
    return console.file.getvalue()


def assert_fits(table: Table, soft_wrap: bool) -> str:
    text = render(table, soft_wrap=soft_wrap)
    assert "…" not in text, f"cut off:\n{text}"
    assert max(map(len, text.splitlines())) <= WIDTH, f"too wide:\n{text}"
    words = text.split()
    for word in render(table, width=1000).split():
        if any(letter.isalnum() for letter in word):
            assert word in words, f"{word!r} is broken in two:\n{text}"
    return text


@pytest.fixture(scope="module", params=recipe_names())
def plan(request) -> kp.Plan:
    return kp.make_plan(load_config("gpt2"), kp.load_recipe(request.param))


def layer_reports(plan: kp.Plan) -> dict[str, kp.LayerReport]:
    return {
        name: kp.LayerReport(
            relative_error=1.2345,
            captured_energy=-0.5240,
            kept_fraction=layer.num_params / layer.num_params_dense,
            num_params=layer.num_params,
            num_params_dense=layer.num_params_dense,
        )
        for name, layer in plan.layers.items()
    }


def metrics(window: int = 1024) -> dict[str, Any]:
    return {
        "protocol": "window",
        "window": window,
        "stride": window,
        "bos": True,
        "num_tokens": 283_287,
        "perplexity": 12345.678,
        "bits_per_byte": 12.3456,
    }


def results(plan: kp.Plan, data: list[str], window: int = 1024) -> dict[str, Any]:
    dense = {"name": "dense", "num_params": plan.num_params_dense, "bytes": plan.bytes_dense}
    compressed = {"num_params": plan.num_params, "bytes": plan.bytes}
    rows = [
        dense,
        {"name": plan.recipe, **compressed},
        {"name": f"{plan.recipe}, healed", **compressed},
        {"name": "low-rank", **compressed},
        {"name": "low-rank, healed", **compressed},
    ]
    return {"rows": [{**row, "metrics": {name: metrics(window) for name in data}} for row in rows]}


@pytest.mark.parametrize("soft_wrap", [True, False])
def test_plan_tables_fit(plan, soft_wrap):
    totals, layers = plan_tables(plan)
    text = assert_fits(totals, soft_wrap)
    for figure in (
        plan.num_params,
        plan.num_params_dense,
        plan.num_params_targets,
        plan.num_params_targets_dense,
        plan.bytes,
        plan.bytes_dense,
        plan.flops_per_token,
        plan.flops_per_token_dense,
    ):
        assert f"{figure:,}" in text
    assert f"{plan.kept_of_model:.4f}" in text
    assert f"{plan.kept_of_targets:.4f}" in text
    text = assert_fits(layers, soft_wrap)
    assert text.count("transformer.h.0.mlp") == 2
    assert "3072×768" in text
    assert "768×3072" in text


@pytest.mark.parametrize("soft_wrap", [True, False])
def test_layers_table_fits(plan, soft_wrap):
    text = assert_fits(layers_table(layer_reports(plan)), soft_wrap)
    for name, layer in plan.layers.items():
        (line,) = [line for line in text.splitlines() if name in line.split()]
        assert line.split()[-1] == f"{layer.num_params:,}"


@pytest.mark.parametrize("soft_wrap", [True, False])
def test_results_table_fits_for_every_test_set_of_the_recipe(plan, soft_wrap):
    data = kp.load_recipe(plan.recipe).evaluation.data
    data = [data] if isinstance(data, str) else data
    text = assert_fits(results_table(results(plan, data)), soft_wrap)
    for figure in (f"{plan.num_params:,}", f"{plan.num_params_dense:,}", "12345.68", "12.3456", "283,287"):
        assert figure in text


@pytest.mark.parametrize("soft_wrap", [True, False])
def test_results_table_of_the_demo_fits(soft_wrap):
    plan = kp.make_plan(load_config("pocket"), kp.load_recipe("krony-96m", model="pocket"))
    text = assert_fits(results_table(results(plan, ["bundled"], window=256)), soft_wrap)
    for name in ("dense", "krony-96m", "krony-96m, healed", "low-rank", "low-rank, healed"):
        assert any(line.strip().startswith(f"{name}  ") for line in text.splitlines())


@pytest.mark.parametrize("soft_wrap", [True, False])
def test_evaluation_table_fits(soft_wrap):
    measured = {name: metrics() for name in ("wikitext2", "wikitext103", "bundled")}
    text = assert_fits(evaluation_table("gpt2", measured), soft_wrap)
    for name in measured:
        (line,) = [line for line in text.splitlines() if line.split()[:1] == [name]]
        assert "12345.678" in line
        assert "1024/1024, BOS" in line


@pytest.mark.parametrize("num_steps", [1, 100, 9_999])
def test_a_line_of_progress_fits_and_says_where_it_stands(num_steps):
    row = HealingRow(
        step=num_steps,
        num_steps=num_steps,
        tokens=num_steps * 1024,
        loss=12.3456,
        language_model_nats=12.3456,
        distillation_nats=10.9876,
        learning_rate=6e-5,
        tokens_per_second=98_765.4,
        seconds_left=3725.0,
    )
    line = healing_line(row)
    assert len(line) < WIDTH
    for part in (f"{num_steps}/{num_steps}", "12.346", "10.988", "6.0e-05", "98,765 tok/s", "62:05"):
        assert part in line
