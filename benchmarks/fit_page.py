"""The page of fit_table.py: its results as Markdown, and whether the goals that were set are met."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# At most so many times the other's rise in loss; asked for where so much of the targets is kept.
GOAL_BEST, GOAL_KRONY, GOAL_HEALED = 0.6, 0.2, 0.6
GOAL_KEPT = 0.25


@dataclass(frozen=True)
class Comparison:
    """`auto`'s rise in loss on one text over that of what it has to beat; `goal` is None where none was set."""

    text: str
    size: str
    kept_of_mlp: float
    auto: str
    against: str
    auto_rise_nats: float
    rise_nats: float
    goal: float | None

    @property
    def ratio(self) -> float | None:
        """None where the other loses nothing."""
        return self.auto_rise_nats / self.rise_nats if self.rise_nats > 0 else None

    @property
    def is_met(self) -> bool:
        """Where the other loses nothing, `auto` may not be worse."""
        if self.goal is None:
            return False
        return self.auto_rise_nats <= (self.goal if self.rise_nats > 0 else 1) * self.rise_nats


def comparisons(results: dict[str, Any]) -> list[Comparison]:
    """`auto` against the best of the other recipes and, where there is one, against Krony-PT's best start.

    Unhealed results are compared with both at each size, healed ones with Krony-PT after the healing. The rivals that
    are no recipes, fewer blocks or bits, are in the table only. An `auto` that could not be had rises by inf.
    """
    healed = results["settings"].get("steps", 0) > 0
    rise = "rise_after_nats" if healed else "rise_nats"
    found = []
    for size in (size for size in results["sizes"] if "num_params" in size):
        rows = [row for row in results["rows"] if row.get("size") == size["name"] and "recipe" in row]
        autos = [row for row in rows if row["recipe"] == "auto"]
        others = [row for row in rows if row["recipe"] != "auto" and rise in row]
        krony = [row for row in others if row["recipe"].startswith("krony-")]
        goals = [(krony, GOAL_HEALED)] if healed else [(others, GOAL_BEST), (krony, GOAL_KRONY)]
        has_goal = size["kept_of_mlp"] >= GOAL_KEPT
        for text, auto, (rivals, goal) in product(results["rows"][0][rise], autos, goals):
            if rivals:
                best = min(rivals, key=lambda row: row[rise][text])
                found.append(
                    Comparison(
                        text=text,
                        size=size["name"],
                        kept_of_mlp=size["kept_of_mlp"],
                        auto=auto["method"],
                        against=best["method"],
                        auto_rise_nats=auto.get(rise, {}).get(text, math.inf),
                        rise_nats=best[rise][text],
                        goal=goal if has_goal else None,
                    )
                )
    return found


SECONDS = (
    "Seconds are those of calibrating, planning and fitting by the clock, on one thread of a machine that did other "
    "work: `fit_speed.py` measures speed."
)


def goals_table(compared: list[Comparison]) -> Iterator[str]:
    """Every comparison with its goal, and of each goal how often it is met; nothing where nothing is compared."""
    if not compared:
        return
    yield "| text | size | MLPs kept | `auto` | rise, nats | against | rise, nats | ratio | goal |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for each in compared:
        ratio = "–" if each.ratio is None else f"{each.ratio:.2f}"
        verdict = "none" if each.goal is None else f"≤ {each.goal:g}: {'met' if each.is_met else '**missed**'}"
        yield (
            f"| {each.text} | {each.size} | {each.kept_of_mlp:.3f} | {each.auto.removeprefix('auto ')} "
            f"| {each.auto_rise_nats:.4f} | {each.against} | {each.rise_nats:.4f} | {ratio} | {verdict} |"
        )
    yield ""
    for goal in sorted({each.goal for each in compared if each.goal is not None}):
        with_goal = [each for each in compared if each.goal == goal]
        num_met = sum(each.is_met for each in with_goal)
        yield f"Goal of a ratio of at most {goal:g}: met in {num_met} of {len(with_goal)}."
        yield ""


def _protocol(text: str, figures: dict[str, Any]) -> str:
    bos = "BOS first" if figures["bos"] else "no BOS"
    windows = f"window {figures['window']} and stride {figures['stride']} tokens, {bos}"
    return f"On {text} (protocol {figures['protocol']}, {windows}; {figures['num_tokens']:,} tokens):"


def _size(row: Row) -> str:
    return f"{row['num_params']:,} | {row['bytes'] / 1e6:.2f} | {row['flops_per_token'] / 1e6:.2f}M"


def _seconds(row: Row) -> str:
    if "fitting_seconds" not in row:
        return "–"
    return " + ".join(f"{row[f'{part}_seconds']:.0f}" for part in ("calibration", "planning", "fitting"))


def _figures(figures: dict[str, Any], rise_nats: float) -> str:
    return (
        f"{figures['nll_mean_nats']:.4f} | {figures['perplexity']:,.2f} | {figures['bits_per_byte']:.4f} "
        f"| {rise_nats:+.4f}"
    )


def one_shot_section(results: dict[str, Any]) -> Iterator[str]:
    for text, figures in results["rows"][0]["before"].items():
        yield _protocol(text, figures)
        yield ""
        yield "| model | parameters | MB | FLOPs/token | nats/token | perplexity | bits/byte | rise, nats | seconds |"
        yield "|---|---|---|---|---|---|---|---|---|"
        for row in results["rows"]:
            if "error" in row:
                yield f"| {row['name']} | {row['error']} | | | | | | | |"
            else:
                figures = _figures(row["before"][text], row["rise_nats"][text])
                yield f"| {row['name']} | {_size(row)} | {figures} | {_seconds(row)} |"
        yield ""
    yield SECONDS
    yield ""
    for size in results["sizes"]:
        if "error" in size:
            yield f"`{size['name']}` cannot be had: {size['error']}."
            yield ""
    yield from goals_table(comparisons(results))


def healed_section(results: dict[str, Any]) -> Iterator[str]:
    settings = results["settings"]
    objective = "distillation from the dense model" if settings["distil"] else "the loss on the text"
    rates = ", ".join(f"{rate:g}" for rate in settings["rates"])
    yield (
        f"Healed by {objective}, {settings['steps']} steps. The rate is chosen among {rates} on the validation books, "
        "in a fifth of the steps (†: the smallest or the largest was best). The dense model is trained on the text."
    )
    yield ""
    for text, figures in results["rows"][0]["before"].items():
        yield _protocol(text, figures)
        yield ""
        yield (
            "| model | parameters | MB | FLOPs/token | rise before "
            "| nats/token after | perplexity | bits/byte | rise after | rate |"
        )
        yield "|---|---|---|---|---|---|---|---|---|---|"
        for row in results["rows"]:
            name = "dense, trained further" if row["name"] == "dense" else row["name"]
            name += " ‡" if "known" in row else ""
            if "error" in row:
                yield f"| {name} | {row['error']} | | | | | | | | |"
            else:
                after = _figures(row["after"][text], row["rise_after_nats"][text])
                edge = " †" if row["rate"] in (min(settings["rates"]), max(settings["rates"])) else ""
                before = f"{row['rise_nats'][text]:+.4f}"
                yield f"| {name} | {_size(row)} | {before} | {after} | {row['rate']:g}{edge} |"
        yield ""
    yield "A rise is that over the dense model before its further training."
    if any("known" in row for row in results["rows"]):
        yield (
            "‡ is taken from the table of `pocket_table.py`, which heals alike; "
            "weights were measured there before they were rounded to 16 bits."
        )
    yield ""
    yield from goals_table(comparisons(results))


def ablation_section(results: dict[str, Any]) -> Iterator[str]:
    (figures,) = results["rows"][0]["before"].values()
    yield _protocol("the validation books", figures)
    yield ""
    for method in dict.fromkeys(row["size"] for row in results["rows"] if "size" in row):
        rows = [row for row in results["rows"] if row.get("size") == method]
        yield f"`auto` {method.removeprefix('auto ')}, half of their parameters kept:"
        yield ""
        yield "| part | change | rise, nats | against `auto` as it is | seconds |"
        yield "|---|---|---|---|---|"
        full = next((row for row in rows if row["part"] is None and "rise_nats" in row), None)
        for row in rows:
            change = f"`{row['method']}`" if row["part"] else row["method"]
            if "error" in row:
                yield f"| {row['part'] or ''} | {change} | {row['error']} | | |"
                continue
            (rise,) = row["rise_nats"].values()
            difference = "–" if full is None or row is full else f"{rise - next(iter(full['rise_nats'].values())):+.4f}"
            yield f"| {row['part'] or ''} | {change} | {rise:.4f} | {difference} | {_seconds(row)} |"
        yield ""
    yield "Other seeds choose other windows and labels to calibrate on: they say how large a difference is by chance."
    yield SECONDS
    yield ""


# By the name of the results: heading, what makes them, and what is shown.
SECTIONS: dict[str, tuple[str, str, Callable[[dict[str, Any]], Iterator[str]]]] = {
    "fit_one_shot_pocket": ("Without healing, `pocket`", "one-shot --work DIR --text wiki.test.raw", one_shot_section),
    "fit_one_shot_llama": (
        "Without healing, a Llama of 1.6 million parameters",
        "one-shot --work DIR --model LLAMA --text wiki.test.raw",
        one_shot_section,
    ),
    "fit_healed": ("After equal healing", "healed --work DIR --text wiki.test.raw", healed_section),
    "fit_healed_distil": (
        "After equal distillation",
        "healed --work DIR --text wiki.test.raw --distil",
        healed_section,
    ),
    "fit_ablation": ("Each part left out in turn", "ablation --work DIR", ablation_section),
}


def section(name: str, results: dict[str, Any] | None) -> str:
    """One section of the page: the results of that name as tables, or how to get them."""
    title, arguments, body = SECTIONS[name]
    if results is None:
        command = f"python benchmarks/fit_table.py {arguments} --out benchmarks/results/{name}.json"
        return f"## {title}\n\nNot measured yet: `{command}`.\n"
    versions = ", ".join(f"{package} {number}" for package, number in results["versions"].items())
    made = f"From `benchmarks/results/{name}.json` (`{results['command']}`; {versions})."
    missing = [f"Not measured: {'; '.join(results['not_measured'])}.", ""] if results["not_measured"] else []
    return "\n".join([f"## {title}", "", made, "", *body(results), *missing])


def results_in(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Those of the named results that there are in `folder`."""
    files = {name: folder / f"{name}.json" for name in names}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in files.items() if path.is_file()}


def page(folder: Path) -> str:
    """The page from all results that there are in `folder`."""
    found = results_in(folder, SECTIONS)
    introduction = (
        "# The fit to real inputs\n\n"
        "What `auto` loses of a model, beside every other way to the same number of parameters. Calibration and "
        "healing read the bundled `heal` books alone; the test books and WikiText-2 are only evaluated on.\n"
    )
    return "\n".join([introduction, *(section(name, found.get(name)) for name in SECTIONS)])
