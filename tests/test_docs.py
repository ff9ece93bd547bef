"""Figures in the README come from committed results, and its commands and snippet work as written."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest

from kronpress import cli
from kronpress.checkpoint import load_config
from kronpress.planning import make_plan
from kronpress.recipe import load_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_demo_table_is_that_of_the_committed_result():
    results = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text(encoding="utf-8"))
    assert results["command"] == ["kronpress", "demo", "--json"]
    for row in results["rows"]:
        (figures,) = row["metrics"].values()
        assert (
            f"| {row['name']} | {row['num_params']:,} | {row['bytes'] / 1e6:.2f} "
            f"| {figures['perplexity']:.2f} | {figures['bits_per_byte']:.4f} |"
        ) in README
        assert f"({figures['num_tokens']:,} tokens" in README


@pytest.mark.parametrize(
    ("name", "total"), re.findall(r"^\| `(krony-[\w-]+)` \|.*\| ([\d,]+) \|$", README, re.MULTILINE)
)
def test_totals_are_those_of_the_plan(name, total):
    assert f"{make_plan(load_config('gpt2'), load_recipe(name)).num_params:,}" == total


def test_the_objectives_of_the_demo_are_those_of_the_committed_result():
    results = json.loads((ROOT / "benchmarks" / "results" / "demo_objective.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for figure in ("dense", "start", "language_model", "distillation"):
        assert f"{results[f'{figure}_nats']:.3f}" in page
    assert f"{results['steps']} steps" in page


def test_flops_of_krony_92m_4_are_as_said():
    plan = make_plan(load_config("gpt2"), load_recipe("krony-92m-4"))
    assert f"needs {plan.flops_per_token / plan.flops_per_token_dense:.2f} times as many" in README


def test_commands_of_the_readme_work_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("The old man looked at the sea and said nothing. " * 200)
    commands = [re.split(r"  +", line)[0] for line in README.splitlines() if line.startswith("kronpress ")]
    assert len(commands) == 7
    for command in commands:
        words = [word.replace("MODEL", "pocket") for word in shlex.split(command)[1:]]
        if words[0] == "heal":
            words += ["--set", "healing.max_steps=1"]
        if words[0] == "run":
            words += ["--set", "healing.max_steps=1", "--set", "evaluation.data=text.txt"]
        assert cli.main(words) == 0, (command, capsys.readouterr().err)


def test_the_python_snippet_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (snippet,) = [code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "kp." in code]
    names: dict[str, object] = {}
    exec(snippet, names)
    assert (tmp_path / "small" / "model.safetensors").is_file()
    assert not hasattr(names["dense"], "hf_quantizer")


KRONY_PT = (ROOT / "docs" / "krony-pt.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("line", re.findall(r"^\| `(kronpress run .*?)` \| ([\d,]+) \|", KRONY_PT, re.MULTILINE))
def test_commands_of_the_published_rows_plan_what_the_page_says(line):
    command, total = line
    words = shlex.split(command)
    changes = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    recipe = load_recipe(words[2], changes)
    assert f"{make_plan(load_config(recipe.model), recipe).num_params:,}" == total
    assert recipe.evaluation.protocol == "krony"
    assert recipe.healing.tokens == 36_000_000_000
    phases = [(part.sequences_per_step, part.learning_rate, part.final_learning_rate) for part in recipe.healing.parts]
    assert phases == [(120, 6e-5, 0.1), (320, 6e-6, 1.0)]
    assert [part.warmup_steps for part in recipe.healing.parts] == [500, 0]


@pytest.mark.parametrize("command", re.findall(r"`(kronpress run .*?)`", KRONY_PT)[::3])
def test_commands_of_the_published_rows_run_at_a_small_scale(
    command, tiny_model, save_tiny_checkpoint, tmp_path, monkeypatch, capsys
):
    """All of the command but what has to come from the network, and the length."""
    monkeypatch.chdir(tmp_path)
    save_tiny_checkpoint(tiny_model("gpt2", n_embd=48, n_head=4), tmp_path / "gpt2")
    Path("text.txt").write_text("The old man looked at the sea and said nothing. " * 200)
    small = ["healing.data=text.txt", "evaluation.data=text.txt", "healing.max_steps=9", "healing.sequence_length=16"]
    assert cli.main([*shlex.split(command)[1:], *(word for change in small for word in ("--set", change))]) == 0, (
        capsys.readouterr().err
    )
    out = Path(shlex.split(command)[-1])
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert [row["stage"] for row in results["rows"]] == ["dense", "compressed", "healed"]
    assert results["healing"]["tokens"] == 16 * (8 * 120 + 1 * 320)
    assert {figures["protocol"] for row in results["rows"] for figures in row["metrics"].values()} == {"krony"}


def test_the_figures_of_pocket_are_those_of_the_committed_results():
    page = (ROOT / "docs" / "pocket.md").read_text(encoding="utf-8")
    quality, ngram = (
        json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("pocket_quality", "pocket_ngram")
    )
    for name, of in [
        ("`pocket` | 70.2 million tokens", quality["dense"]),
        ("5-gram, modified Kneser-Ney | the same windows of text", ngram["fits"][1]),
        ("5-gram, modified Kneser-Ney | all 110.9 million tokens there are", ngram["fits"][0]),
    ]:
        bits = [f"{of[split]['bits_per_byte']:.4f}" for split in ("validation", "test")]
        assert f"| {name} | {bits[0]} | {bits[1]} | {of['test']['perplexity']:.2f} |" in page
    assert quality["dense"]["test"]["bits_per_byte"] < min(fit["test"]["bits_per_byte"] for fit in ngram["fits"])
    assert f"**{quality['svd_rise_nats']:.2f} nats**" in page
    assert quality["svd_rise_nats"] > 0.2
    log = (ROOT / "src" / "kronpress" / "pocket" / "training.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in log]
    assert rows[-1]["tokens"] >= 20 * quality["num_params"]
    assert rows[-1]["validation_nats"] == min(row["validation_nats"] for row in rows)
    assert len(re.findall("^> ", page, re.MULTILINE)) == len(quality["continuations"]) == 3


def test_the_page_of_krony_pt_has_the_figures_of_the_committed_table():
    results = json.loads((ROOT / "benchmarks" / "results" / "pocket_table.json").read_text(encoding="utf-8"))
    module = runpy.run_path(str(ROOT / "benchmarks" / "pocket_table.py"))
    assert (ROOT / "docs" / "results" / "krony.md").read_text(encoding="utf-8") == module["render"](results)
    assert [row["name"] for row in results["rows"]] == [row["name"] for row in module["all_rows"]()]
    rows = {row["name"]: row for row in results["rows"]}

    def perplexity(name: str, stage: str) -> str:
        return f"{rows[name][stage]['test books']['perplexity']:,.2f}"

    page = (ROOT / "docs" / "krony-pt.md").read_text(encoding="utf-8")
    for size in module["SIZES"]:
        names = [f"{size}, van_loan", f"{size}, adaptive", f"low rank, as {size}", f"blocks, as {size}"]
        cells = [
            f"{perplexity(name, 'before')} → {perplexity(name, 'after')}" if name in rows else "–" for name in names
        ]
        assert f"| {size} | {' | '.join(cells)} |" in page
    words = " ".join(page.split())
    for name, stage in [
        ("dense, dense", "before"),
        ("dense, dense", "after"),
        ("dense, 4-bit", "before"),
        ("krony-96m, prune [1, 0.1]", "after"),
        ("krony-96m, prune [1, 0]", "after"),
    ]:
        assert perplexity(name, stage) in words
    assert f"{rows['krony-96m, van_loan']['tokens']:,} tokens" in words
