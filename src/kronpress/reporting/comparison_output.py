"""A comparison as a page, as Markdown, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable

from kronpress.errors import WorkError
from kronpress.healing.checkpoints import write_whole
from kronpress.reporting.charts import MEASURE, Chart, Series, Table, View
from kronpress.reporting.comparing import CONFIDENCE, COSTS, Comparison, Estimate, Group
from kronpress.reporting.pages import page
from kronpress.reporting.results import digits, megabytes

COMPARISON_FORMAT = 1
STEM = "comparison"
NOWHERE = "–"


def write_comparison(comparison: Comparison, out: Path) -> list[Path]:
    """Write comparison.html, .md, .csv and .json into the folder `out`; each is there whole or as it was.

    Raises:
        WorkError: they cannot be written.
    """
    documents = {
        "html": comparison_page(comparison),
        "md": comparison_markdown(comparison),
        "csv": comparison_csv(comparison),
        "json": json.dumps(comparison_json(comparison), indent=1, ensure_ascii=False) + "\n",
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for kind, text in documents.items():
            write_whole(out / f"{STEM}.{kind}", text)
    except OSError as error:
        raise WorkError(f"could not write the comparison into {str(out)!r}: {error}") from error
    return [out / f"{STEM}.{kind}" for kind in documents]


# ---- the ranked table, in every form ----


def ranking(comparison: Comparison) -> Table:
    """One line for each group, the best first, and the dense models above."""
    columns = ["recipe", "rank", "seeds", "parameters", "size", "time per token"]
    columns += [f"{MEASURE}, {text}" for text in comparison.texts]
    columns += [f"front, {text}" for text in comparison.texts]
    rows: list[list[str]] = []
    keys: list[list[float | str | None]] = []
    for rank, group in [*((None, dense) for dense in comparison.dense), *enumerate(comparison.groups, start=1)]:
        estimates = [group.perplexity.get(text) for text in comparison.texts]
        fronts = [_fronts(comparison, group, text) for text in comparison.texts]
        is_dense = rank is None
        rows.append(
            [
                group.name,
                "–" if rank is None else str(rank),
                "–" if is_dense else ", ".join(map(str, group.seeds)),
                f"{group.num_params:,.0f}",
                megabytes(round(group.num_bytes)),
                with_interval(group.time),
                *map(with_interval, estimates),
                *fronts,
            ]
        )
        keys.append(
            [
                group.name,
                rank or 0,
                len(group.seeds),
                group.num_params,
                group.num_bytes,
                None if group.time is None else group.time.mean,
                *(None if each is None else each.mean for each in estimates),
                *(each.count(" ") if each != NOWHERE else -1 for each in fronts),
            ]
        )
    return Table(columns, rows, keys, _note(comparison))


def _fronts(comparison: Comparison, group: Group, text: str) -> str:
    """The first letters of the costs on whose front the group is."""
    return " ".join(cost[0] for cost in COSTS if group.name in comparison.fronts[cost, text]) or NOWHERE


def with_interval(estimate: Estimate | None) -> str:
    """
    >>> with_interval(Estimate(61.24, 60.1, 62.4)), with_interval(Estimate(61.24, None, None)), with_interval(None)
    ('61.2 [60.1, 62.4]', '61.2', '–')
    """
    if estimate is None or estimate.low is None:
        return digits(None if estimate is None else estimate.mean)
    return f"{digits(estimate.mean)} [{digits(estimate.low)}, {digits(estimate.high)}]"


def _note(comparison: Comparison) -> str:
    notes = [f"Ranked by the {MEASURE} on {comparison.texts[0]}; lower is better."]
    if any(len(group.seeds) > 1 for group in comparison.groups):
        notes.append(
            f"In brackets {CONFIDENCE:.0%} intervals of the mean over seeds (Student's t of the logarithms); a figure "
            "without one is of a single seed."
        )
    else:
        notes.append("Every figure is of a single seed: how much another seed would change it is not known.")
    notes.append(
        "Time per token is of decoding, the dense model's being 1. On the Pareto front of parameters (p), bytes (b) "
        "or time (t) no other group is better in both."
    )
    return " ".join(notes)


def differences_table(comparison: Comparison) -> Table:
    """The fields in which the recipes differ, one column for each group."""
    rows = [[name, *values] for name, values in comparison.differences.items()]
    return Table(["field", *(group.name for group in comparison.groups)], rows)


def runs_table(comparison: Comparison) -> Table:
    """Which runs stand behind each group."""
    return Table(
        ["recipe", "runs", "teacher"],
        [[group.name, ", ".join(group.runs), group.teacher] for group in comparison.groups],
    )


def comparison_terminal(comparison: Comparison) -> list[RichTable]:
    """For a terminal: a table for each text, and what differs."""
    tables = []
    for text in comparison.texts:
        table = RichTable(
            box=SIMPLE_HEAD, padding=(0, 1), title=f"on {text}", title_justify="left", caption_justify="left"
        )
        table.add_column("recipe", overflow="fold", min_width=15)
        for column in ("seeds", "parameters", "MB", "time", MEASURE, "front"):
            table.add_column(column, justify="right", no_wrap=True)
        for group in [*comparison.dense, *comparison.groups]:
            table.add_row(
                group.name,
                str(len(group.seeds)) if group.fields else "–",
                f"{group.num_params:,.0f}",
                f"{group.num_bytes / 1e6:.2f}",
                digits(None if group.time is None else group.time.mean),
                with_interval(group.perplexity.get(text)),
                _fronts(comparison, group, text),
            )
        table.caption = (
            "time: of decoding a token, dense = 1\nfront: the Pareto front of parameters (p), bytes (b), time (t)"
        )
        tables.append(table)
    return tables


# ---- the page ----


def comparison_page(comparison: Comparison) -> str:
    best = comparison.groups[0]
    return page(
        "comparison.html.j2",
        num_runs=sum(len(group.runs) for group in comparison.groups),
        num_groups=len(comparison.groups),
        verdict=_sentence(comparison),
        best=best.name,
        mixed=comparison.mixed,
        remarks=comparison.remarks,
        chart=front_chart(comparison),
        ranking=ranking(comparison),
        differences=differences_table(comparison),
        runs=runs_table(comparison),
    )


def _sentence(comparison: Comparison) -> str:
    best, text = comparison.groups[0], comparison.texts[0]
    if text not in best.perplexity:
        return f"No run was measured on {text}."
    dense = next((each for each in comparison.dense if each.teacher == best.teacher and text in each.perplexity), None)
    beside = "" if dense is None else f", the dense model {digits(dense.perplexity[text].mean)}"
    return (
        f"Best on {text}: {best.name}, {MEASURE} {with_interval(best.perplexity[text])} with {best.num_params:,.0f} "
        f"parameters{beside}."
    )


def front_chart(comparison: Comparison) -> Chart:
    """Perplexity against each cost: all groups, dense models and the Pareto front."""
    views = {f"{cost}|{text}": _view(comparison, cost, text) for cost in COSTS for text in comparison.texts}
    return Chart(
        name="front",
        title="Pareto front",
        remark="Down and to the left is better. The dotted line is the front: no other group is better in both.",
        controls={"Cost": list(COSTS), "Text": comparison.texts},
        views=views,
        table=Table(
            ["cost", "text", "on the front, cheapest first"],
            [[cost, text, "; ".join(names) or "–"] for (cost, text), names in comparison.fronts.items()],
        ),
    )


def _view(comparison: Comparison, cost: str, text: str) -> View:
    def point(group: Group, colour: int) -> Series:
        price, estimate = group.cost(cost) or 0.0, group.perplexity[text]
        return Series(
            name=group.name,
            colour=colour,
            x=[_scaled(price, cost)],
            y=[estimate.mean],
            texts=[f"{group.name}: {_priced(price, cost)}, {MEASURE} {with_interval(estimate)}"],
            low=[estimate.low],
            high=[estimate.high],
        )

    known = {
        group.name: group for group in comparison.groups if group.cost(cost) is not None and text in group.perplexity
    }
    dense = [group for group in comparison.dense if group.cost(cost) is not None and text in group.perplexity]
    series = [point(group, 0) for group in dense]
    series += [point(group, 1 + number % 7) for number, group in enumerate(known.values())]
    front = [known[name] for name in comparison.fronts[cost, text]]
    if len(front) > 1:
        series.append(
            Series(
                name="front",
                colour=0,
                x=[_scaled(group.cost(cost) or 0.0, cost) for group in front],
                y=[group.perplexity[text].mean for group in front],
                texts=[f"on the front: {group.name}" for group in front],
                is_line=True,
                is_dashed=True,
            )
        )
    title = {"parameters": "parameters", "bytes": "megabytes", "time per token": "time per token, dense = 1"}[cost]
    return View(title, f"{MEASURE} on {text}", series, y_is_log=True)


def _scaled(price: float, cost: str) -> float:
    return price / 1e6 if cost == "bytes" else price


def _priced(price: float, cost: str) -> str:
    if cost == "time per token":
        return f"{digits(price)} of the dense model's time per token"
    return megabytes(round(price)) if cost == "bytes" else f"{price:,.0f} parameters"


# ---- for other programs ----


def comparison_markdown(comparison: Comparison) -> str:
    parts = ["# Comparison", _sentence(comparison)]
    if comparison.mixed:
        parts.append("**Mixed, and not comparable without care:** " + "; ".join(comparison.mixed))
    parts += [_markdown(ranking(comparison)), ranking(comparison).note]
    if comparison.differences:
        parts += ["## What differs between the recipes", _markdown(differences_table(comparison))]
    parts += ["## Runs", _markdown(runs_table(comparison))]
    if comparison.remarks:
        parts.append("\n".join(f"* {remark}" for remark in comparison.remarks))
    return "\n\n".join(parts) + "\n"


def _markdown(table: Table) -> str:
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def comparison_csv(comparison: Comparison) -> str:
    """One line for each group and the dense models, numbers unrounded."""
    file = io.StringIO()
    columns = ["rank", "recipe", "teacher", "runs", "seeds", "parameters", "bytes"]
    columns += _estimate_columns("time_per_token")
    columns += [column for text in comparison.texts for column in _estimate_columns(f"{MEASURE} {text}")]
    columns += [f"front {cost} {text}" for cost in COSTS for text in comparison.texts]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    for rank, group in [*(("", dense) for dense in comparison.dense), *enumerate(comparison.groups, start=1)]:
        estimates = [group.time, *(group.perplexity.get(text) for text in comparison.texts)]
        writer.writerow(
            [
                rank,
                group.name,
                group.teacher,
                " ".join(group.runs),
                " ".join(map(str, group.seeds)),
                group.num_params,
                group.num_bytes,
                *(figure for each in estimates for figure in (asdict(each).values() if each else ("", "", ""))),
                *(int(group.name in comparison.fronts[cost, text]) for cost in COSTS for text in comparison.texts),
            ]
        )
    return file.getvalue()


def _estimate_columns(name: str) -> list[str]:
    return [name, f"{name} low", f"{name} high"]


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    return {
        "format_version": COMPARISON_FORMAT,
        "confidence": CONFIDENCE,
        "measure": MEASURE,
        "texts": comparison.texts,
        "mixed": comparison.mixed,
        "remarks": comparison.remarks,
        "dense": [_group_json(group) for group in comparison.dense],
        "groups": [_group_json(group) for group in comparison.groups],
        "fronts": [{"cost": cost, "text": text, "groups": names} for (cost, text), names in comparison.fronts.items()],
        "differences": {name: list(values) for name, values in comparison.differences.items()},
    }


def _group_json(group: Group) -> dict[str, Any]:
    fields = asdict(group)
    del fields["fields"]
    return fields
