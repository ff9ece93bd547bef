"""What permutations, stages and structured embeddings are worth: TQCompressor and KnGPT-2 beside `auto` and low rank.

    python benchmarks/structure_table.py one-shot --work DIR1 --text wiki.test.raw --out benchmarks/results/structures_one_shot.json
    python benchmarks/structure_table.py healed   --work DIR2 --text wiki.test.raw --out benchmarks/results/structures_healed.json
    python benchmarks/structure_table.py render > docs/results/structures.md

On `pocket`, at the true counts of `tqcompressor` and `kngpt2` with their tied head computed from the factors, and of
`krony-96m`. `one-shot` trains nothing, and has `auto` with and without the embedding among its targets at the other sizes
of Krony-PT. `healed` distils every row from the dense model on equal tokens, each with the best of three rates;
`tqcompressor` as its stages say, and compressed at once and then healed. DIR keeps calibrations and the rows that are
done, so that what was stopped goes on. Rows, metrics and healing are those of fit_table.py.
"""  # noqa: E501

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import structure_page
import typer
from fit_table import (
    CORES,
    RESULTS,
    Characters,
    Job,
    Only,
    Out,
    Processes,
    Row,
    Steps,
    Text,
    Work,
    grid,
    sizes,
)
from pocket_table import STEPS

import kronpress as kp
from kronpress.recipe import read_recipe

# The lowest rate of fit_table.py is too high for good starts.
RATES = (1e-4, 5e-4, 2e-3)
PUBLISHED = ("tqcompressor", "kngpt2")
# Which trains nothing; with and without the rotation, whose price is a head of its own.
ROTATED = "procrustes"
# Where `auto` is let put units in order too: the search at one size takes as long as all other rows.
FOLDED_AT = "krony-81m"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def without_permutations(name: str) -> str:
    """A change of a staged recipe: every order as it is, all else equal."""
    stages = [dict(stage) for stage in read_recipe(name)["stages"]]
    for stage in stages:
        stage.pop("folding", None)
        if stage.get("structure") == "permuted_kronecker":
            stage["structure"] = "kronecker"
            stage["spec"] = {size: value for size, value in stage["spec"].items() if size not in ("rows", "columns")}
    return f"stages={json.dumps(stages)}"


def count(recipe: str) -> int:
    """Parameters of `pocket` by the recipe, its head computed from the embedding's factors unless it is rotated."""
    changes = [] if recipe == ROTATED else ["head=tied"]
    return kp.make_plan(kp.load_model("pocket").model, kp.load_recipe(recipe, changes, "pocket")).num_params


def _row(size: str, method: str, recipe: str, changes: list[str], **more: Any) -> Row:
    return {"name": f"{size}: {method}", "size": size, "method": method, "recipe": recipe, "set": changes, **more}


def rows_of_published() -> list[Row]:
    """At each published layout's count the layout itself, as it is and with its parts left out, and its rivals."""
    rows: list[Row] = []
    tied = ["head=tied"]
    plain = without_permutations("tqcompressor")
    rows.append(_row("tqcompressor", "in stages", "tqcompressor", tied))
    rows.append(_row("tqcompressor", "in stages, not permuted", "tqcompressor", [*tied, plain]))
    rows.append(_row("tqcompressor", "at once", "tqcompressor", tied, is_healed_at_the_end=True))
    rows.append(
        _row("tqcompressor", "at once, not permuted", "tqcompressor", [*tied, plain], is_healed_at_the_end=True)
    )
    rows.append(_row("kngpt2", "logits distilled", "kngpt2", tied))
    rows.append(_row("kngpt2", "its own objective", "kngpt2", tied, has_own_objective=True))
    rows.append(_row("krony-96m", "van_loan", "krony-96m", []))
    rows.append(_row("krony-96m", "adaptive", "krony-96m", ["fit.start=adaptive"]))
    return [*rows, *(row for size in (*PUBLISHED, "krony-96m") for row in _rivals(size))]


def _rivals(size: str) -> list[Row]:
    """Low rank and `auto` at the recipe's count."""
    budget = f"budget.params={count(size)}"
    rows = [_row(size, "low rank on all", "low-rank", ["targets=all", budget])]
    return rows + [_row(size, f"auto on {each}", "auto", [f"targets={each}", budget]) for each in ("blocks", "all")]


def one_shot_rows() -> list[Row]:
    """`auto` with and without the embedding among its targets at the sizes of Krony-PT; `healed` has krony-96m's.

    And ProcrustesGPT, which trains nothing, with its rivals.
    """
    rows: list[Row] = [{"name": "dense", "rival": "dense"}]
    for size in sizes(kp.load_model("pocket").model):
        if size["name"] != "krony-96m":
            budget = f"budget.params={size['num_params']}"
            rows += [
                _row(size["name"], f"auto on {each}", "auto", [f"targets={each}", budget]) for each in ("blocks", "all")
            ]
            if size["name"] == FOLDED_AT:
                changes = ["targets=blocks", budget, "folding=[mlp, value]"]
                rows.append(_row(size["name"], "auto on blocks, units in order", "auto", changes))
    sums = _row(ROTATED, "not rotated", ROTATED, ["rotation=false", "head=tied"])
    return [*rows, _row(ROTATED, "as it is", ROTATED, []), sums, *_rivals(ROTATED)]


@app.command()
def one_shot(
    work: Work,
    out: Out,
    text: Text = None,
    only: Only = "",
    characters: Characters = None,
    processes: Processes = CORES,
) -> None:
    """Every row without any training."""
    job = Job("one-shot", work, text=text, characters=characters, script=Path(__file__).name)
    grid(job, one_shot_rows(), only, processes, out, {"sizes": []})


@app.command()
def healed(
    work: Work,
    out: Out,
    text: Text = None,
    only: Only = "",
    characters: Characters = None,
    processes: Processes = CORES,
    steps: Steps = STEPS,
) -> None:
    """Every row after equal distillation, and the dense model trained on the text."""
    job = Job("healed", work, "pocket", "test", text, (), characters, steps, True, RATES, Path(__file__).name)
    grid(job, [{"name": "dense", "rival": "dense"}, *rows_of_published()], only, processes, out, {"sizes": []})


@app.command()
def render() -> None:
    """Print the page as Markdown."""
    print(structure_page.page(RESULTS), end="")


if __name__ == "__main__":
    app()
