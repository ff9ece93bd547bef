"""The goals of speed, each with its bound and what was measured, from the results of the scripts that measured them.

    python benchmarks/speed_goals.py run
    python benchmarks/speed_goals.py render

`run` measures everything anew, one script after the other: about an hour of two cores that do nothing else. `render`
makes docs/results/speed_goals.md of the JSON files in benchmarks/results that they write. No figure of the page is
typed by hand.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results" / "speed_goals.md"
# What each result is made by.
COMMANDS = {
    "native_linear": ["native_linear.py", "--rounds", "7"],
    "dispatch_check": ["dispatch_check.py", "--rounds", "7"],
    "fit_shapes": ["fit_speed.py", "--what", "shapes"],
    "end_to_end": ["end_to_end.py", "run"],
    "fit_stack": ["fit_speed.py", "--what", "stack"],
}
# Of B, for a matrix at least as tall as wide: how many times fewer bytes.
GAINS = {"(1,2)": 2, "(2,1)": 2, "(2,2)": 4, "(4,2)": 8}
ONE_TOKEN = {"float32": {2: 1.9, 4: 3.5, 8: 7.0}, "bfloat16": {2: 3.5, 4: 6.0, 8: 10.0}}
PREFILL = {"(1,2)": (1.6, 2), "(2,1)": (1.7, 2), "(2,2)": (1.7, 2), "(4,2)": (2.4, 4)}
TRAINING = {"float32": {2: 1.65, 4: 2.7}, "bfloat16": {2: 1.4, 4: 2.1}}
OVER_KRON = 2.5
NEVER_BELOW = 0.95
DECODE = {"blocks 2×": 1.4, "blocks 4×": 1.8, "blocks 4×, tied head 2×": 2.4}
ALL_MLPS_SECONDS = 1.0
TINY_OVER_LOW_RANK = 10.0

Row = dict[str, Any]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def run(
    only: Annotated[list[str], typer.Option(help="which of " + ", ".join(COMMANDS))] = list(COMMANDS),  # noqa: B006
) -> None:
    """Measure, one script after the other."""
    for name in only:
        command = [sys.executable, str(ROOT / "benchmarks" / COMMANDS[name][0]), *COMMANDS[name][1:]]
        subprocess.run([*command, "--out", str(RESULTS / f"{name}.json")], check=True)


@app.command()
def render(out: Annotated[Path, typer.Option(help="page to write")] = PAGE) -> None:
    """Write the page."""
    out.write_text(page(RESULTS), encoding="utf-8")


def page(folder: Path) -> str:
    """The page of the results in `folder`; what is not measured yet is named."""
    found = {name: json.loads(path.read_text()) for name in COMMANDS if (path := folder / f"{name}.json").is_file()}
    lines = [
        "# Speed: goals, bounds, and what was measured",
        "",
        "A ratio is of two measurements of one round; shown are the median and, in brackets, the quartiles. The bound "
        "is what fewer bytes (one token) or fewer multiplications (many tokens) can bring at most over a perfect dense "
        "routine. Everything is from `benchmarks/results/*.json`, made by `python benchmarks/speed_goals.py run`; the "
        "page by its `render`.",
        "",
    ]
    sections = {
        "native_linear": one_token,
        "dispatch_check": layers,
        "end_to_end": decode,
        "fit_shapes": fitting,
        "fit_stack": stack,
    }
    for name, section in sections.items():
        if name in found:
            lines += [*section(found[name]), ""]
        else:
            lines += [f"`{name}` is not measured yet.", ""]
    return "\n".join(lines)


def spread(quartiles: list[float]) -> str:
    lower, median, upper = quartiles
    return f"{median:.2f} ({lower:.2f}–{upper:.2f})"


def verdict(measured: float, goal: float) -> str:
    return "met" if measured >= goal else "**missed**"


def one_token(results: Row) -> Iterator[str]:
    """The routine for one token, over torch and over a dense routine of our own."""
    machine = results["machine"]
    yield "## One token through one layer"
    yield ""
    yield (
        f"The native routine, by the clock, weights from memory. {machine['cpu']}, {machine['cores']} processors that "
        f"may be two threads of one core, torch {results['versions']['torch']}."
    )
    yield ""
    yield "| matrix | dtype | threads | contender | goal | bound | over torch's linear | over our own dense | |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in results["rows"]:
        if row["tokens"] == 1 and row["contender"].startswith("native"):
            ratios = {
                rival: [row["wall"][f"over_{rival}"][each] for each in ("lower", "median", "upper")]
                for rival in ("torch", "native_dense")
            }
            goal = ONE_TOKEN[row["dtype"]].get(row["bytes_gain"])
            goal_cell, bound, word = ("–", "–", "") if goal is None else (
                f"{goal:g}", str(row["bytes_gain"]), verdict(ratios["torch"][1], goal)
            )  # fmt: skip
            own = "–" if goal is None else spread(ratios["native_dense"])
            yield (
                f"| {row['matrix'].replace('x', '×')} | {row['dtype']} | {row['threads']} | {row['contender']} | "
                f"{goal_cell} | {bound} | {spread(ratios['torch'])} | {own} | {word} |"
            )


def layers(results: Row) -> Iterator[str]:
    """Many tokens, training, and whether anything is slower than dense."""
    rows = results["rows"]
    machine = results["machine"]
    yield "## 512 tokens through one layer, bfloat16"
    yield ""
    yield (
        "Over a dense weight that was packed beforehand. `small left` is the same sum with its units in the other "
        f"order, as `kp.fold_layout_` puts them. {machine['cpu']}; {', '.join(machine['instructions'])}."
    )
    yield ""
    yield "| matrix | threads | B | goal | bound | over prepacked dense | over `nn.Linear` | |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in rows:
        base = row["structure"].removesuffix(" small left")
        if row["tokens"] == 512 and row["dtype"] == "bfloat16" and "over_dense" in row and base in PREFILL:
            goal, bound = PREFILL[base]
            word = verdict(row["over_prepacked"][1], goal)
            yield (
                f"| {row['matrix']} | {row['threads']} | {row['structure']} | {goal} | {bound} | "
                f"{spread(row['over_prepacked'])} | {spread(row['over_dense'])} | {word} |"
            )
    yield ""
    yield "## Never slower than dense"
    yield ""
    yield (
        f"The least median over `nn.Linear` of all shapes and token counts; the goal is {NEVER_BELOW}. A dense weight "
        "may be kept (`dense_cache_bytes`) or not."
    )
    yield ""
    yield "| matrix | dtype | threads | dense weights kept | least | where | |"
    yield "|---|---|---|---|---|---|---|"
    groups = sorted({(row["matrix"], row["dtype"], row["threads"]) for row in rows})
    for group in groups:
        of_group = [row for row in rows if (row["matrix"], row["dtype"], row["threads"]) == group and "way" in row]
        for kept in (True, False):
            # With the cache on, a layer that does not use it goes as without.
            cached = {(row["structure"], row["tokens"]) for row in of_group if row["cache"]}
            seen = [
                row
                for row in of_group
                if row["cache"] == kept or (kept and (row["structure"], row["tokens"]) not in cached)
            ]
            least = min(seen, key=lambda row: row["over_dense"][1])
            yield (
                f"| {' | '.join(map(str, group))} | {'yes' if kept else 'no'} | {spread(least['over_dense'])} | "
                f"{least['structure']}, {least['tokens']} tokens, {least['way']} | "
                f"{verdict(least['over_dense'][1], NEVER_BELOW)} |"
            )
    yield ""
    yield "## Training: forward and backward of 512 tokens"
    yield ""
    yield "Over `nn.Linear`, and over Krony-PT's way, which forms the dense matrix in every forward (goal 2.5)."
    yield ""
    yield "| matrix | dtype | B | goal | bound | over dense | | over `torch.kron` | |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        if "training_over_dense" in row:
            bound = 4 if row["structure"].startswith("(4,2)") else 2
            goal = TRAINING[row["dtype"]][bound]
            yield (
                f"| {row['matrix']} | {row['dtype']} | {row['structure']} | {goal} | {bound} | "
                f"{spread(row['training_over_dense'])} | {verdict(row['training_over_dense'][1], goal)} | "
                f"{spread(row['training_over_kron'])} | {verdict(row['training_over_kron'][1], OVER_KRON)} |"
            )


def decode(results: Row) -> Iterator[str]:
    """GPT-2 small's geometry; the tables are in speed.md."""
    yield "## Decode of GPT-2 small's geometry with a key-value cache, float32"
    yield ""
    yield "All rivals, dtypes, prefill and memory: [speed.md](speed.md)."
    yield ""
    yield "| compressed | threads | goal | bound | over dense | |"
    yield "|---|---|---|---|---|---|"
    for row in results["rows"]:
        if row["variant"] in DECODE:
            (ours,) = [m for m in row["benchmark"]["models"] if (m["kind"], m["dtype"]) == ("model", "float32")]
            speedup = ours["measured"][0]["comparison"]["decode"]
            quartiles = [speedup["spread"][each] for each in ("first_quartile", "median", "third_quartile")]
            goal = DECODE[row["variant"]]
            yield (
                f"| {row['variant']} | {row['threads']} | {goal} | {speedup['bound']:.2f} | {spread(quartiles)} | "
                f"{verdict(quartiles[1], goal)} |"
            )


def fitting(results: Row) -> Iterator[str]:
    """Exact fits of tiny and balanced factors."""
    yield "## Fitting, one core"
    yield ""
    yield "One 3072×768 matrix, exact to rounding; `captured` is the share of the best possible energy."
    yield ""
    yield "| B | terms | our fit, ms | `svd_lowrank`, ms | times as fast | goal | captured by it | by ours | |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in results["rows"]:
        if "right_shape" in row:
            timings, captured = row["timings"], row["captured_of_optimum"]
            ratio = row["times_faster_than"]["svd_lowrank"]
            is_tiny = row["right_shape"][0] * row["right_shape"][1] <= 64
            ours, theirs = (1e3 * timings[way]["seconds"] for way in ("fit", "svd_lowrank"))
            yield (
                f"| {'×'.join(map(str, row['right_shape']))} | {row['num_terms']} | {ours:.1f} | {theirs:.1f} | "
                f"{ratio:.1f} | {TINY_OVER_LOW_RANK if is_tiny else '–'} | "
                f"{captured['svd_lowrank']:.4f} | {captured['fit']:.10f} | "
                f"{verdict(ratio, TINY_OVER_LOW_RANK) if is_tiny else ''} |"
            )
    yield ""
    yield "All 24 matrices of GPT-2 small's MLPs (goal 1 s for a tiny B), and the whole `compress_` around them:"
    yield ""
    yield "| recipe | fits, s | `compress_`, s | |"
    yield "|---|---|---|---|"
    for row in results["rows"]:
        if "recipe" in row:
            word = verdict(-row["seconds"], -ALL_MLPS_SECONDS) if row["recipe"] != "krony-67m" else "not tiny"
            yield f"| `{row['recipe']}` | {row['seconds']:.2f} | {row['compress_seconds']:.2f} | {word} |"


def stack(results: Row) -> Iterator[str]:
    """A model streamed through the fit."""
    yield "## A 7B model's geometry, streamed through the fit"
    yield ""
    yield "| blocks | read, GB | written, GB | peak over the start, GB | matrices in float32 that is | minutes |"
    yield "|---|---|---|---|---|---|"
    for row in results["rows"]:
        yield (
            f"| {row['blocks']} | {row['bytes_on_disk'] / 1e9:.2f} | {row['bytes_written'] / 1e9:.2f} | "
            f"{(row['streaming_peak'] - row['peak_before']) / 1e9:.2f} | {row['peak_over_float32_matrix']:.1f} | "
            f"{row['streaming_seconds'] / 60:.1f} |"
        )


if __name__ == "__main__":
    app()
