"""How long calibrating, planning and fitting take at a real geometry, and how much memory they need: random weights.

    python benchmarks/fit_speed.py --out benchmarks/results/fit_speed.json

Each recipe runs in a process of its own, so that its peak of resident memory is its own; what the process holds with
the model alone is given beside it. Times depend on the machine, and not on what the weights are, apart from how many
candidates `auto` looks at twice. Seconds are those of the wall and those of the processor, summed over threads: on a
busy machine only the latter mean anything.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

import kronpress as kp
from kronpress.calibration import calibrate

RECIPES = ("krony-67m", "krony-80m-2", "krony-81m", "krony-92m-4", "krony-96m", "low-rank", "svd-llm", "auto")

STEPS = ("calibration", "plan", "fit")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def peak_bytes() -> int:
    """The most resident memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def timed(row: dict[str, Any], step: str) -> Iterator[None]:
    """Put the seconds of a step and the peak of memory after it into the row."""
    wall, processor = time.perf_counter(), time.process_time()
    yield
    row[f"{step}_seconds"] = time.perf_counter() - wall
    row[f"{step}_processor_seconds"] = time.process_time() - processor
    row[f"{step}_peak"] = peak_bytes()


def measure(name: str, config_file: Path | None, changes: list[str], windows: int, length: int) -> dict[str, Any]:
    """Seconds of each step of one recipe, and peaks of memory."""
    torch.manual_seed(0)
    config = GPT2Config() if config_file is None else AutoConfig.from_pretrained(config_file)
    model = AutoModelForCausalLM.from_config(config)
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.zeros(1, length, dtype=torch.long))  # what any use of the model takes
    recipe = kp.load_recipe(name, changes)
    batches = list(torch.randint(config.vocab_size, (windows, length)).split(1))
    row: dict[str, Any] = {"recipe": name, "peak_of_model_alone": peak_bytes()}
    messages: list[str] = []
    moments = None
    if recipe.weighting.metric != "none":
        with timed(row, "calibration"):
            moments = calibrate(model, batches, recipe, messages=messages.append)
    with timed(row, "plan"):
        plan = kp.make_plan(model, recipe, moments)
    with timed(row, "fit"):
        kp.compress_(model, plan, moments=moments, batches=batches)
    structures = [layer.structure for layer in plan.layers.values()]
    return {
        **row,
        "messages": messages,
        "layers": {structure: structures.count(structure) for structure in sorted(set(structures))},
    }


def table(results: dict[str, Any]) -> list[str]:
    """Markdown: seconds of each step by the clock, and of the processor, and the peak beyond the model alone."""
    lines = [
        "| recipe | calibration, s | plan, s | fit, s | processor, s | peak beyond the model, GB |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        wall = [row.get(f"{step}_seconds", 0.0) for step in STEPS]
        processor = sum(row.get(f"{step}_processor_seconds", 0.0) for step in STEPS)
        peak = max(row[f"{step}_peak"] for step in STEPS if f"{step}_peak" in row) - row["peak_of_model_alone"]
        cells = " | ".join(f"{seconds:.1f}" for seconds in (*wall, processor))
        lines.append(f"| `{row['recipe']}` | {cells} | {peak / 1e9:.2f} |")
    return lines


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="JSON file to write")],
    config: Annotated[Path | None, typer.Option(help="folder with a config.json; GPT-2 small if unset")] = None,
    recipes: Annotated[list[str], typer.Option(help="recipes to measure")] = list(RECIPES),  # noqa: B006
    changes: Annotated[list[str], typer.Option("--set", help="changes to every recipe")] = [],  # noqa: B006
    windows: Annotated[int, typer.Option(help="calibration sequences")] = 32,
    length: Annotated[int, typer.Option(help="tokens in each")] = 512,
) -> None:
    """Measure recipes one after the other."""
    rows = []
    for name in recipes:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            rows.append(pool.submit(measure, name, config, changes, windows, length).result())
        print(json.dumps(rows[-1]), flush=True)
    results = {
        "geometry": "gpt2" if config is None else config.name,
        "windows": windows,
        "length": length,
        "set": changes,
        "calibration_tokens": windows * length,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("kronpress", "torch", "transformers")},
        "rows": rows,
    }
    out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    app()
