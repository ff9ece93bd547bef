"""Krony-PT's recipes and starts on `pocket`, beside the rivals, all healed on the same tokens.

    python benchmarks/pocket_table.py run --work DIR --text wiki.test.raw --out benchmarks/results/pocket_table.json
    python benchmarks/pocket_table.py table benchmarks/results/pocket_table.json > docs/results/krony.md

Every model is healed with each of RATES for a fifth of the tokens; the rate with the lowest loss on the bundled
validation books is kept, and the model is healed anew with it on all tokens. Test texts are read by that last model and
by the start alone. Each rate's schedule is the recipe's: a short warm-up and a cosine to a tenth. DIR keeps the rows
that are done, so that a run that was stopped goes on. `--text` adds a file that is only evaluated on.
"""

from __future__ import annotations

import copy
import json
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import kronpress as kp
from kronpress.rivals import RIVALS, Contender

STEPS = 120
RATES = (5e-4, 2e-3, 8e-3)
# Of the validation books, enough to tell rates apart.
VALIDATION_CHARACTERS = 150_000
SIZES = ("krony-67m", "krony-80m-2", "krony-81m", "krony-92m-4", "krony-96m")
SETTINGS = {"steps": STEPS, "rates": RATES, "validation_characters": VALIDATION_CHARACTERS, "model": "pocket"}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def all_rows() -> list[dict[str, Any]]:
    """What is measured: each row's name, the recipe that gives its size, and what is set or which rival it is."""
    krony = [
        {"name": f"{size}, {start}", "size": size, "set": [f"fit.start={start}"]}
        for size in SIZES
        for start in ("van_loan", "adaptive")
    ]
    prune = [
        {
            "name": f"krony-96m, prune [1, {small}]",
            "size": "krony-96m",
            "set": ["fit.start=prune", f"fit.prune_small_factor={small}"],
        }
        for small in (0.1, 0)
    ]
    low_rank = [{"name": f"low rank, as {size}", "size": size, "rival": "low-rank"} for size in SIZES]
    # Other sizes have the same number of blocks as one of these.
    blocks = [
        {"name": f"blocks, as {size}", "size": size, "rival": "blocks"}
        for size in ("krony-67m", "krony-81m", "krony-96m")
    ]
    dense = [{"name": f"dense, {rival}", "size": "krony-96m", "rival": rival} for rival in ("dense", "8-bit", "4-bit")]
    return [*dense, *krony, *prune, *low_rank, *blocks]


def make(row: dict[str, Any], teacher: Any) -> Contender:
    """The start of that row, from a copy of the dense model."""
    model = copy.deepcopy(teacher)
    recipe = kp.load_recipe(row["size"], row.get("set"), "pocket")
    plan = kp.make_plan(model, recipe)
    if row.get("rival") in RIVALS:
        return RIVALS[row["rival"]](model, plan)
    if row.get("rival") == "low-rank":
        plan = kp.make_plan(model, kp.load_recipe("low-rank", [f"budget.params={plan.num_params}"], "pocket"))
    kp.compress_(model, plan)
    return Contender(row["name"], model, plan.num_params, plan.bytes, plan.flops_per_token)


def measure_row(row: dict[str, Any], text: Path | None) -> dict[str, Any]:
    """One row of the table; runs in a process of one thread."""
    torch.set_num_threads(1)
    loaded = kp.load_model("pocket")
    recipe = kp.load_recipe(row["size"], [f"healing.max_steps={STEPS}"], "pocket")
    tokens = kp.load_train_tokens(loaded.tokenizer, recipe.healing.data, 10**9)
    validation = kp.load_running_text("bundled", "validation").text[:VALIDATION_CHARACTERS]
    texts = {"test books": kp.load_running_text("bundled", "test").text}
    if text is not None:
        texts[text.name] = text.read_text(encoding="utf-8")
    start = make(row, loaded.model)

    def measured(model: Any) -> dict[str, Any]:
        return {name: kp.evaluate(model, loaded.tokenizer, each).to_json() for name, each in texts.items()}

    def healed(rate: float, steps: int) -> Any:
        model = copy.deepcopy(start.model)
        changes = {"learning_rate": rate, "max_steps": steps, "warmup_steps": steps // 10}
        kp.heal_(model, None, tokens, recipe.healing.model_copy(update=changes), seed=recipe.seed)
        return model

    result = {
        **row,
        "num_params": start.num_params,
        "bytes": start.bytes,
        "flops_per_token": start.flops_per_token,
        "before": measured(start.model),
    }
    if not start.is_trained:
        return result
    trials = {rate: kp.evaluate(healed(rate, STEPS // 5), loaded.tokenizer, validation).nll_mean_nats for rate in RATES}
    best = min(trials, key=lambda rate: trials[rate])
    return {
        **result,
        "validation_nats_by_rate": {f"{rate:g}": nats for rate, nats in trials.items()},
        "rate": best,
        "tokens": recipe.healing.num_tokens,
        "after": measured(healed(best, STEPS)),
    }


@app.command()
def run(
    work: Annotated[Path, typer.Option(help="folder that keeps the rows that are done")],
    out: Annotated[Path, typer.Option(help="JSON file to write when all are done")],
    text: Annotated[Path | None, typer.Option(help="a further text to evaluate on", exists=True)] = None,
    processes: Annotated[int, typer.Option(help="rows at once, one thread each")] = os.cpu_count() or 1,
) -> None:
    """Measure every row that is not done yet."""
    work.mkdir(parents=True, exist_ok=True)
    rows = all_rows()
    files = [work / f"{row['name'].replace(' ', '_')}.json" for row in rows]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        waiting = {
            pool.submit(measure_row, row, text): path
            for row, path in zip(rows, files, strict=True)
            if not path.exists()
        }
        for future in as_completed(waiting):
            path = waiting[future]
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(future.result(), indent=1) + "\n")
            partial.rename(path)
            print(path.stem, flush=True)
    results = {
        "command": "python benchmarks/pocket_table.py run --work DIR --text wiki.test.raw",
        "settings": SETTINGS,
        "versions": {name: version(name) for name in ("kronpress", "torch", "transformers")},
        "rows": [json.loads(path.read_text()) for path in files],
    }
    out.write_text(json.dumps(results, indent=1) + "\n")


@app.command()
def table(results: Annotated[Path, typer.Argument(exists=True)]) -> None:
    """Print the table as Markdown."""
    print(render(json.loads(results.read_text())), end="")


def render(results: dict[str, Any]) -> str:
    """One table for each text: all rows in order, sizes, and perplexity before and after healing."""
    settings, healed = results["settings"], [row for row in results["rows"] if "after" in row]
    lines = [
        "# Krony-PT on `pocket`, beside its rivals",
        "",
        f"    {results['command']} --out benchmarks/results/pocket_table.json",
        "    python benchmarks/pocket_table.py table benchmarks/results/pocket_table.json > docs/results/krony.md",
        "",
        f"Every row but those of the dense model's bytes was healed for {settings['steps']} steps on the same "
        f"{healed[0]['tokens']:,} tokens by plain language-model loss, with the rate that did best of "
        f"{', '.join(f'{rate:g}' for rate in settings['rates'])} in a fifth of the steps; that was judged on the "
        "validation books; no figure below is on them. *dense, dense* is the dense model trained further on the same "
        "tokens, *blocks* a model with every second block dropped until it is as small. One seed. What the figures say "
        "is in [Krony-PT](../krony-pt.md).",
        "",
    ]
    for name, figures in results["rows"][0]["before"].items():
        lines += [
            f"On {name} (protocol {figures['protocol']}, window and stride {figures['window']} tokens, BOS first; "
            f"{figures['num_tokens']:,} tokens):",
            "",
            "| model | parameters | MB | FLOPs/token | perplexity before | after healing | rate |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in results["rows"]:
            after = f"{row['after'][name]['perplexity']:,.2f} | {row['rate']:g}" if "after" in row else "– | –"
            sizes = f"{row['num_params']:,} | {row['bytes'] / 1e6:.2f} | {row['flops_per_token'] / 1e6:.2f}M"
            lines.append(f"| {row['name']} | {sizes} | {row['before'][name]['perplexity']:,.2f} | {after} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    app()
