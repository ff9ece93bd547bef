"""The page of structure_table.py and permutation_recovery.py: their results as Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fit_page import healed_section, one_shot_section

Results = dict[str, Any]

INTRODUCTION = """# Permutations, stages and structured embeddings

What TQCompressor and KnGPT-2 lose of `pocket` at their own counts, with the head computed from the embedding's factors,
beside `auto` and low rank at the same counts; and what the search for permutations finds. Calibration and healing read
the bundled `heal` books alone; the test books and WikiText-2 are only evaluated on.
"""


def recovery_section(results: Results) -> Iterator[str]:
    """Rates of recovery by start."""
    yield f"Of {results['seeds']} planted products of each kind the search finds again, from each start alone:"
    yield ""
    yield "| A | B | permuted | noise | as they are | random order | matching |"
    yield "|---|---|---|---|---|---|---|"
    for row in results["rows"]:
        shapes = " | ".join("×".join(map(str, row[key])) for key in ("left_shape", "right_shape"))
        rates = " | ".join(f"{row[start]:.2f}" for start in ("identity", "random", "matching"))
        yield f"| {shapes} | {row['side']} | {row['noise']:g} | {rates} |"
    yield ""


def control_section(results: Results) -> Iterator[str]:
    """Energy before and after the search, means over the matrices of one kind, beside random matrices of their size."""
    yield (
        "Energy captured by one term before → after the search over both sides, the mean over the matrices of a kind. "
        "The Gaussian matrices have the same size; the last have the real one's norms of rows and columns too."
    )
    yield ""
    yield "| matrix | B | real | Gaussian | Gaussian with its norms |"
    yield "|---|---|---|---|---|"
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        kind = ("×".join(map(str, row["shape"])), row["matrix"].split(".")[-2], "×".join(map(str, row["right_shape"])))
        groups.setdefault(kind, []).append(row)
    for (shape, name, right), rows in groups.items():
        cells = []
        for kind in ("real", "gaussian", "gaussian_with_its_norms"):
            before, after = (sum(row[kind][when] for row in rows) / len(rows) for when in ("before", "after"))
            cells.append(f"{before:.4f} → {after:.4f}")
        yield f"| {name} {shape} ({len(rows)}) | {right} | {' | '.join(cells)} |"
    yield ""


def speed_section(results: Results) -> Iterator[str]:
    """Seconds of one start."""
    yield f"One start on a Gaussian 3072×768 matrix, both sides, {results['threads']} threads:"
    yield ""
    yield "| B | start | seconds | processor seconds |"
    yield "|---|---|---|---|"
    for row in results["rows"]:
        right = "×".join(map(str, row["right_shape"]))
        yield f"| {right} | {row['start']} | {row['seconds']:.2f} | {row['cpu_seconds']:.2f} |"
    yield ""


# By the name of the results: heading, what makes them, and what is shown.
SECTIONS: dict[str, tuple[str, str, Callable[[Results], Iterator[str]]]] = {
    "structures_one_shot": (
        "Without healing",
        "structure_table.py one-shot --work DIR --text wiki.test.raw",
        one_shot_section,
    ),
    "structures_healed": (
        "After equal distillation",
        "structure_table.py healed --work DIR --text wiki.test.raw",
        healed_section,
    ),
    "permutation_recovery": ("Planted permutations", "permutation_recovery.py recovery", recovery_section),
    "permutation_control": (
        "Real matrices beside random ones",
        "permutation_recovery.py control FILE",
        control_section,
    ),
    "permutation_speed": ("How long a search takes", "permutation_recovery.py speed", speed_section),
}


def section(name: str, results: Results | None) -> str:
    """One section of the page, or how to get its results."""
    title, arguments, body = SECTIONS[name]
    command = f"python benchmarks/{arguments} --out benchmarks/results/{name}.json"
    if results is None:
        return f"## {title}\n\nNot measured yet: `{command}`.\n"
    made = f"From `benchmarks/results/{name}.json` (`{results.get('command', command)}`)."
    missing = [f"Not measured: {'; '.join(results['not_measured'])}.", ""] if results.get("not_measured") else []
    return "\n".join([f"## {title}", "", made, "", *body(results), *missing])


def page(folder: Path) -> str:
    """The page from all results that there are in `folder`."""
    files = {name: folder / f"{name}.json" for name in SECTIONS}
    found = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in files.items() if path.is_file()}
    return "\n".join([INTRODUCTION, *(section(name, found.get(name)) for name in SECTIONS)])
