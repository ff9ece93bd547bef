"""The page and the figure of healing_curves.py, from its JSON alone."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "healing_curves.png"
LANGUAGE_MODEL, DEFAULT = "language model", "default"
# What a training gains at most in its last tenth once it is called flat, in nats.
FLAT = 0.005
# The default and the language model alone are compared where this has so many times the tokens.
TIMES = 5
Run = dict[str, Any]
# The rates by start and objective.
Tried = dict[tuple[str, str], set[float]]


def final(run: Run) -> float:
    return run["validation"]["nll_mean_nats"]


def best_trial(runs: list[Run], start: str, objective: str, tokens: int) -> Run:
    """The run of seed 0 whose rate was the best on the validation books."""
    return min(
        (
            run
            for run in runs
            if (run["start"], run["objective"], run["tokens"], run["seed"]) == (start, objective, tokens, 0)
        ),
        key=final,
    )


def of_all_seeds(runs: list[Run], start: str, objective: str, tokens: int) -> list[Run]:
    """The runs at the rate of the best trial, one for each seed."""
    rate = best_trial(runs, start, objective, tokens)["rate"]
    of_rate = [run for run in runs if (run["start"], run["objective"]) == (start, objective) and run["rate"] == rate]
    return sorted((run for run in of_rate if run["tokens"] == tokens), key=lambda run: run["seed"])


def last_tenth(run: Run) -> float:
    """What the validation loss fell by over the last tenth of the tokens or a little more, in nats."""
    curve = run["curve"]
    before = [point for point in curve if point["tokens"] <= 0.9 * curve[-1]["tokens"]]
    return before[-1]["validation_nats"] - curve[-1]["validation_nats"]


def spread(values: list[float], digits: int) -> str:
    """The mean, and the least and the greatest."""
    mean = f"{statistics.fmean(values):,.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):,.{digits}f}–{max(values):,.{digits}f})"


def _row(label: str, runs: list[Run], tried: Tried, dense: float) -> str:
    books = [run["test"] for run in runs]
    test = spread([book["perplexity"] for book in books], 2)
    rises = spread([book["nll_mean_nats"] - dense for book in books], 4)
    gains = spread([last_tenth(run) for run in runs], 4)
    finals = spread([final(run) for run in runs], 4)
    rates = tried[runs[0]["start"], runs[0]["objective"]]
    edge = " †" if runs[0]["rate"] in (min(rates), max(rates)) else ""
    return f"| {label} | {runs[0]['tokens']:,} | {runs[0]['rate']:g}{edge} | {finals} | {gains} | {test} | {rises} |"


def _section(results: dict[str, Any], start: str, dense: float) -> list[str]:
    runs, short = results["runs"], results["num_tokens"]
    mine = [run for run in runs if run["start"] == start]
    objectives = list(dict.fromkeys(run["objective"] for run in mine if run["tokens"] == short))
    before = results["starts"][start]
    lines = [
        f"## From `{start}`" if start != "dense" else "## The dense model, trained further",
        "",
        f"Before: perplexity {before['perplexity']:.2f} on the test books.",
        "",
        "| objective | tokens | rate | validation nats | gain of the last tenth | test perplexity | its rise in nats |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in objectives:
        several = of_all_seeds(runs, start, name, short) if name == DEFAULT else [best_trial(runs, start, name, short)]
        lines.append(_row(name, several, results["tried"], dense))
    longer = _longer(mine, short)
    for many in longer:
        times = many[0]["tokens"] / short
        lines.append(_row(f"{many[0]['objective']}, {times:g} times the tokens", many, results["tried"], dense))
    for theirs in (many for many in longer if start != "dense" and many[0]["objective"] == LANGUAGE_MODEL):
        for tokens in sorted({run["tokens"] for run in mine if run["objective"] == DEFAULT}):
            if theirs[0]["tokens"] == TIMES * tokens:
                lines += ["", _verdict(of_all_seeds(runs, start, DEFAULT, tokens), theirs)]
    return [*lines, ""]


def _longer(mine: list[Run], short: int) -> list[list[Run]]:
    """The runs of more tokens than the short ones, those of equal settings together, the shortest first."""
    found: dict[tuple[int, str], list[Run]] = {}
    for run in sorted(mine, key=lambda run: (run["tokens"], run["objective"], run["seed"])):
        if run["tokens"] > short:
            found.setdefault((run["tokens"], run["objective"]), []).append(run)
    return list(found.values())


def _verdict(default: list[Run], language_model: list[Run]) -> str:
    """Whether the default reached with a fraction of the tokens what the language model alone reached."""
    factor = language_model[0]["tokens"] / default[0]["tokens"]
    ours, theirs = (statistics.fmean(map(final, runs)) for runs in (default, language_model))
    gain = statistics.fmean(map(last_tenth, language_model))
    word = "reaches" if ours <= theirs else "does not reach"
    flat = (
        f"which is flat by the criterion (its last tenth gained {gain:.4f} nats, under {FLAT})"
        if gain < FLAT
        else f"which was still falling (its last tenth gained {gain:.4f} nats, and {FLAT} would be flat)"
    )
    return (
        f"With 1/{factor:g} of the tokens the default {word} the loss of the language model alone, {flat}: "
        f"{ours:.4f} against {theirs:.4f} nats on the validation books; {len(default)} and {len(language_model)} seeds."
    )


def _settings(results: dict[str, Any]) -> str:
    default = {name: value for name, value in results["default"].items() if name != "reconstruction"}
    stage = results["default"]["reconstruction"]
    blockwise = "no block-wise stage"
    if stage["steps"]:
        blockwise = (
            f"before it at most {stage['steps']} block-wise steps of {stage['sequences_per_step']} sequences, at most "
            "a quarter of all tokens, whose tokens are counted"
        )
    return f"The default is `{json.dumps(default)}`, {blockwise}."


def draw(results: dict[str, Any], path: Path) -> None:
    """Validation perplexity against tokens: a panel for each start."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs, short = results["runs"], results["num_tokens"]
    starts = [start for start in dict.fromkeys(run["start"] for run in runs) if start != "dense"]
    figure, axes = plt.subplots(1, len(starts), figsize=(6.2 * len(starts), 6.0), layout="constrained")
    dense = [run for run in runs if run["start"] == "dense"]
    further = max(dense, key=lambda run: run["tokens"])
    for axis, start in zip(axes, starts, strict=True):
        mine = [run for run in runs if run["start"] == start]
        names = sorted({run["objective"] for run in mine if run["tokens"] == short})
        for number, name in enumerate(names):
            is_default = name == DEFAULT
            best = [best_trial(runs, start, name, short)]
            for run in of_all_seeds(runs, start, name, short) if is_default else best:
                _line(
                    axis,
                    run,
                    f"C{number}",
                    2.2 if is_default else 1.2,
                    name if run is best or run["seed"] == 0 else None,
                )
        for many in _longer(mine, short):
            name = many[0]["objective"]
            label = f"{name}, {many[0]['tokens'] / short:g}× the tokens"
            for run in many:
                _line(axis, run, f"C{names.index(name)}", 1.6, label if run is many[0] else None, "--")
        _line(axis, further, "black", 1.2, "dense, trained further", ":")
        axis.set(xscale="log", xlabel="healing tokens", ylabel="perplexity, validation books", title=f"from {start}")
        axis.set_yscale("log")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _line(axis: Any, run: Run, colour: str, width: float, label: str | None, style: str = "-") -> None:
    from math import exp

    axis.plot(
        [point["tokens"] for point in run["curve"]],
        [exp(point["validation_nats"]) for point in run["curve"]],
        style,
        color=colour,
        linewidth=width,
        label=label,
    )


def page(path: Path, figure: Path) -> str:
    """The page as Markdown; the figure is drawn."""
    results = json.loads(path.read_text(encoding="utf-8"))
    results["tried"] = {}
    for run in results["runs"]:
        results["tried"].setdefault((run["start"], run["objective"]), set()).add(run["rate"])
    results["runs"] = [run for run in results["runs"] if "test" in run]
    dense = results["starts"]["dense"]["nll_mean_nats"]
    starts = list(results["starts"])
    draw(results, figure)
    lines = [
        "# Healing: how low with how many tokens",
        "",
        f"From `benchmarks/results/{path.name}`",
        f"(`{results['command']}`).",
        "Every objective trains the same compressed `pocket` on the same tokens,",
        f"{results['sequences_per_step']} sequences of {results['sequence_length']} a step, with the best of four",
        "rates by trials on a fifth of them and the validation books; the test books are only reported. Every run has",
        "its own cosine to a tenth of its rate. †: the lowest or the highest rate was best. Of several seeds the mean",
        "is given, and the least and greatest.",
        "",
        _settings(results),
        "",
        f"![perplexity against healing tokens](../figures/{figure.name})",
        "",
    ]
    for start in starts:
        lines += _section(results, start, dense)
    return "\n".join(lines)
