"""What people are shown fits in 80 columns, whole: no line is longer, and no figure is cut or broken in two."""

from __future__ import annotations

import io
import math
import re
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, GPT2Config

import kronpress as kp
from kronpress.checkpoint import load_config
from kronpress.evaluation import PROTOCOLS
from kronpress.healing import HealingRow
from kronpress.recipe import recipe_names
from kronpress.report import (
    evaluation_tables,
    healing_line,
    layers_table,
    plan_tables,
    results_table,
    tasks_table,
)

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
    recipe = kp.load_recipe(request.param)
    if recipe.allocation == "uniform":
        return kp.make_plan(load_config("gpt2"), recipe)
    model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=48, n_layer=2, n_head=2, vocab_size=100))
    moments = kp.calibrate(model, [torch.arange(100).view(4, 25)], recipe)
    return kp.make_plan(model, recipe, moments)


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


def metrics(protocol: str = "window", window: int = 1024, stride: int | None = None) -> dict[str, Any]:
    last_word = protocol == "lambada-last-word"
    defined = protocol == "window"
    return {
        "protocol": protocol,
        "window": window,
        "stride": None if last_word else stride or window,
        "bos": protocol == "window",
        "num_tokens": 283_287,
        "num_bytes": 1_290_590 if defined else None,
        "num_words": {"window": 245_569, "krony": None, "lambada-last-word": 5_153}[protocol],
        "accuracy": 0.4592 if last_word else None,
        "perplexity": 12345.678,
        "word_perplexity": 1234567.891 if defined else None,
        "bits_per_byte": 12.3456 if defined else None,
    }


def results(plan: kp.Plan, data: list[str], window: int = 1024, protocol: str = "window") -> dict[str, Any]:
    dense = {"name": "dense", "num_params": plan.num_params_dense, "bytes": plan.bytes_dense}
    compressed = {"num_params": plan.num_params, "bytes": plan.bytes}
    rows = [
        dense,
        {"name": plan.recipe, **compressed},
        {"name": f"{plan.recipe}, healed", **compressed},
        {"name": "low-rank", **compressed},
        {"name": "low-rank, healed", **compressed},
    ]
    return {"rows": [{**row, "metrics": {name: metrics(protocol, window) for name in data}} for row in rows]}


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
    for layer in plan.layers.values():
        assert f"{layer.out_features}×{layer.in_features}" in text
    if plan.allocation is None and plan.recipe != "modegpt":  # whose blocks differ
        kinds = {name.rpartition(".")[2] for name in plan.layers if ".mlp." in name}
        assert len(re.findall(r"transformer\.h\.\d+\.mlp\.c_", text)) == len(kinds)


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


FIGURES = {
    "window": (["12345.68", "12.3456"], ["1234567.89", "283,287"]),
    "krony": (["12345.68"], ["283,287"]),
    "lambada-last-word": (["0.4592", "12345.68"], ["5,153"]),
}
SETTINGS = {
    "window": "protocol window, window 1024, stride 1024, BOS",
    "krony": "protocol krony, window 1024, stride 1024",
    "lambada-last-word": "protocol lambada-last-word, window 1024",
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_results_of_every_protocol_have_its_figures_and_say_how_they_were_measured(plan, protocol):
    table = results_table(results(plan, ["wikitext2", "wikitext103"], protocol=protocol))
    lines = assert_fits(table, soft_wrap=True).splitlines()
    rows = [line for line in lines if line.split()[:1] == ["dense"]]
    assert [row.split()[3:] for row in rows] == [FIGURES[protocol][0]] * 2
    for name in ("wikitext2", "wikitext103"):
        assert any(line.strip() == f"{name}: {SETTINGS[protocol]}; 283,287 tokens" for line in lines)


@pytest.mark.parametrize(
    "other", [metrics("krony"), metrics(window=512), metrics(stride=512), {**metrics(), "bos": False}]
)
@pytest.mark.parametrize(("row", "name"), [(0, "wikitext103"), (2, "wikitext2")])
def test_results_of_different_protocols_are_refused_in_one_table(plan, other, row, name):
    mixed = results(plan, ["wikitext2", "wikitext103"])
    mixed["rows"][row]["metrics"][name] = other
    with pytest.raises(kp.RequestError, match=r"different protocols .*protocol window, window 1024, stride 1024, BOS"):
        results_table(mixed)


@pytest.mark.parametrize("soft_wrap", [True, False])
def test_evaluations_of_different_protocols_stand_in_tables_of_their_own(soft_wrap):
    measured = {
        "wikitext2": metrics(),
        "wikitext2-unk": metrics("krony"),
        "wikitext103": metrics(),
        "lambada": metrics("lambada-last-word"),
        "bundled": metrics(window=256),
    }
    texts = [assert_fits(table, soft_wrap) for table in evaluation_tables("gpt2", measured)]
    columns = [text.splitlines() for text in texts]
    assert [
        [line.split()[0] for line in lines if line.split()[:1] and line.split()[0] in measured] for lines in columns
    ] == [
        ["wikitext2", "wikitext103"],
        ["wikitext2-unk"],
        ["lambada"],
        ["bundled"],
    ]
    for text, name in zip(texts, ["wikitext2", "wikitext2-unk", "lambada"], strict=False):
        protocol = measured[name]["protocol"]
        assert text.splitlines()[0].strip() == "gpt2"
        assert text.splitlines()[1].strip() == SETTINGS[protocol]
        (line,) = [line for line in text.splitlines() if line.split()[:1] == [name]]
        assert line.split()[1:] == [*FIGURES[protocol][0], *FIGURES[protocol][1]]


def test_a_figure_that_cannot_be_computed_is_a_dash():
    (table,) = evaluation_tables("gpt2", {"no-spaces": {**metrics(), "word_perplexity": None}})
    assert ["no-spaces", "12345.68", "12.3456", "–", "283,287"] in [line.split() for line in render(table).splitlines()]


def test_tasks_stand_with_the_versions_that_make_them_comparable():
    task = {
        "protocol": "lm-eval",
        "lm_eval_version": "0.4.13",
        "task_version": 1.0,
        "num_fewshot": 0,
        "num_samples": 5153,
        "metrics": {"perplexity": 40.0553, "acc": 0.32563},
    }
    group = {**task, "task_version": None, "num_fewshot": None, "num_samples": None, "metrics": {"acc": 0.5}}
    text = assert_fits(tasks_table("gpt2", {"lambada_openai": task, "group": group}), soft_wrap=True)
    assert text.splitlines()[1].strip() == "protocol lm-eval 0.4.13"
    rows = [line.split() for line in text.splitlines()]
    assert ["lambada_openai", "1.0", "0", "5153", "perplexity", "40.0553"] in rows
    assert ["lambada_openai", "1.0", "0", "5153", "acc", "0.3256"] in rows
    assert ["group", "–", "–", "–", "acc", "0.5000"] in rows


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
    assert "validation" not in line
    assert "skipped" not in line


def test_a_line_of_progress_has_every_term_and_what_was_measured():
    terms = {
        **{"language_model_nats": 1.111, "distillation_nats": 2.222, "reverse_distillation_nats": 3.333},
        **{"jensen_shannon_nats": 4.444, "embedding_mse": 5.555, "attention_nats": 6.666, "hidden_mse": 7.777},
    }
    rest = {"step": 1, "num_steps": 2, "tokens": 8, "loss": 1.0, "learning_rate": 1e-3, "tokens_per_second": 5.0}
    row = HealingRow(**terms, **rest, seconds_left=1.0, validation_nats=math.log(12.345), skipped_steps=3)
    line = healing_line(row)
    assert "validation perplexity 12.3" in line
    assert "3 skipped" in line
    for value in terms.values():
        assert f"{value:.3f}" in line
    assert "perplexity 1014232" in healing_line(row.model_copy(update={"validation_nats": 1e6}))  # e^700
