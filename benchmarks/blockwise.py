"""What block-wise reconstruction before distillation saves on `pocket`, at equal tokens and at equal seconds.

    python benchmarks/blockwise.py --work DIR --out benchmarks/results/blockwise.json

Two starts: `krony-96m`, and `auto` at half of the MLPs. Each is distilled for `--steps` steps, and that with every rate
of `--rates`; the best is the row to beat. Then shares of the steps go to the blocks instead, at every rate of
`--block-rates`, and the rest to distillation at the best rate:

    equal tokens   as many steps in all, of `--sequences` each: a step of every block is one step of the model
    equal seconds  as many steps of distillation as the processor's time allows that the row to beat took

Also measured, without any distillation: which parameters of a block are best trained, and on whose inputs. Losses are
on the bundled validation books; the test books are not read. Seconds are of the processor, in one thread, so that other
work on the machine is not counted. DIR keeps starts and rows that are done, so that what was stopped goes on.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import kronpress as kp
from kronpress.checkpoint import LoadedModel
from kronpress.healing import first_windows, reconstruct_blocks_
from kronpress.pipeline import compress_stages_
from kronpress.recipe import Reconstruction

STARTS = {
    "krony-96m": ("krony-96m", []),
    "auto at half of the MLPs": ("auto", ["targets=mlp", "budget.kept_of_targets=0.5"]),
}
DISTILLED = ["healing.language_model_weight=0", "healing.distillation_weight=1"]
SHARES = (0.25, 0.5)
# Of the reconstruction alone, beside its defaults.
VARIANTS: tuple[dict[str, Any], ...] = (
    {"trains": "all", "student_inputs": 1.0},
    {"trains": "factors", "student_inputs": 1.0},
    {"trains": "all", "student_inputs": 0.5},
    {"trains": "all", "student_inputs": 0.0},
)
Row = dict[str, Any]


def start_of(name: str, dense: LoadedModel, work: Path) -> LoadedModel:
    """The one-shot model, fitted once."""
    folder = work / name.replace(" ", "_")
    if not folder.is_dir():
        recipe, changes = STARTS[name]
        student = replace(dense, model=copy.deepcopy(dense.model))
        compress_stages_(student, kp.load_recipe(recipe, changes, "pocket"), print)
        kp.save_checkpoint(student.model, student.tokenizer, folder, dtype=torch.float32)
    return kp.load_model(str(folder))


def kept(work: Path, name: str, make: Callable[[], Row]) -> Row:
    """The row of that name, made if it is not kept in `work`."""
    path = work / f"{name.replace(' ', '_')}.json"
    if not path.is_file():
        row = {"name": name, **make()}
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
        partial.rename(path)
        print(name, f"{row['nats_after_blocks']:.4f}", f"{row['nats']:.4f}", f"{row['seconds']:.1f} s", flush=True)
    found: Row = json.loads(path.read_text(encoding="utf-8"))
    return found


def measure(
    start: LoadedModel, dense: LoadedModel, text: str, blocks: Reconstruction, healing_steps: int, rate: float
) -> Row:
    """Reconstruct, then distil: losses, tokens and seconds of both."""
    torch.set_num_threads(1)
    steps = max(1, healing_steps)
    sequences = f"healing.sequences_per_step={blocks.sequences_per_step}"
    changes = [*DISTILLED, sequences, f"healing.max_steps={steps}", f"healing.learning_rate={rate}"]
    recipe = kp.load_recipe("krony-96m", [*changes, f"healing.warmup_steps={steps // 10}"], "pocket")
    healing = recipe.healing
    data = kp.load_train_data(dense.tokenizer, healing.data, 10**9, healing.sequence_length)
    windows = first_windows(data, healing.sequence_length, recipe.seed, blocks.windows)
    student = copy.deepcopy(start.model)

    def nats() -> float:
        return kp.evaluate(student, dense.tokenizer, text).nll_mean_nats

    begun = time.process_time()
    log = reconstruct_blocks_(student, dense.model, windows, blocks, seed=recipe.seed) if blocks.steps else None
    block_seconds = time.process_time() - begun
    after_blocks = nats()
    begun = time.process_time()
    if healing_steps:
        kp.heal_(student, dense.model, data, healing, seed=recipe.seed)
    healing_seconds = time.process_time() - begun if healing_steps else 0.0
    return {
        "reconstruction": blocks.model_dump(mode="json"),
        "healing_steps": healing_steps,
        "rate": rate,
        "tokens": (0 if log is None else log.tokens) + healing_steps * healing.tokens_per_step,
        "block_seconds": block_seconds,
        "healing_seconds": healing_seconds,
        "seconds": block_seconds + healing_seconds,
        "nats_after_blocks": after_blocks,
        "nats": nats() if healing_steps else after_blocks,
        "blocks": None if log is None else [report.model_dump(mode="json") for report in log.blocks],
    }


def rows_of(
    name: str,
    start: LoadedModel,
    dense: LoadedModel,
    text: str,
    work: Path,
    steps: int,
    sequences: int,
    **rates: list[float],
) -> list[Row]:
    """All rows of one start; what they are compared with is the first one."""

    def row(label: str, blocks: Reconstruction, healing_steps: int, rate: float) -> Row:
        return kept(work, f"{name}, {label}", lambda: measure(start, dense, text, blocks, healing_steps, rate))

    none = Reconstruction(sequences_per_step=sequences)
    alone = [row(f"{steps} steps at {rate:g}", none, steps, rate) for rate in rates["healing"]]
    best = min(alone, key=lambda each: each["nats"])
    seconds_per_step = best["seconds"] / steps
    found = [best, *(each for each in alone if each is not best)]
    for block_rate in rates["blocks"]:
        for share in SHARES:
            block_steps = round(share * steps)
            blocks = none.model_copy(update={"steps": block_steps, "learning_rate": block_rate})
            label = f"{block_steps} steps of blocks at {block_rate:g}"
            equal = row(f"{label}, equal tokens", blocks, steps - block_steps, best["rate"])
            left = max(0, round((best["seconds"] - equal["block_seconds"]) / seconds_per_step))
            found += [equal, row(f"{label}, equal seconds", blocks, left, best["rate"])]
    fastest = min(found[len(alone) :], key=lambda each: each["nats_after_blocks"])["reconstruction"]["learning_rate"]
    for variant in VARIANTS:
        blocks = none.model_copy(update={"steps": steps // 2, "learning_rate": fastest, **variant})
        label = f"blocks alone, trains {variant['trains']}, student's inputs {variant['student_inputs']:g}"
        found.append(row(label, blocks, 0, best["rate"]))
    return found


def main(
    work: Annotated[Path, typer.Option(help="folder that keeps starts and rows that are done")],
    out: Annotated[Path, typer.Option(help="JSON file to write when all are done")],
    steps: Annotated[int, typer.Option(help="steps of the row to beat", min=4)] = 120,
    sequences: Annotated[int, typer.Option(help="sequences in a step, of both kinds", min=1)] = 4,
    rates: Annotated[str, typer.Option(help="rates of distillation")] = "3e-4,1e-3,3e-3",
    block_rates: Annotated[str, typer.Option(help="rates of the reconstruction")] = "1e-3,3e-3",
    characters: Annotated[int, typer.Option(help="of the validation books, how much is measured on")] = 150_000,
    only: Annotated[str, typer.Option(help="the start whose name contains this")] = "",
) -> None:
    """Measure every row that is not done yet."""
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    settings = {
        "steps": steps,
        "sequences": sequences,
        "rates": rates,
        "block_rates": block_rates,
        "characters": characters,
    }
    note = work / "settings.json"
    if note.is_file() and json.loads(note.read_text()) != settings:
        raise SystemExit(f"{work} has rows of other settings: {note.read_text().strip()}")
    note.write_text(json.dumps(settings) + "\n")
    dense = kp.load_model("pocket")
    text = kp.load_running_text("bundled", "validation").text[:characters]
    parsed = {
        "healing": [float(rate) for rate in rates.split(",")],
        "blocks": [float(rate) for rate in block_rates.split(",")],
    }
    results: dict[str, Any] = {
        "command": "python benchmarks/blockwise.py --work DIR",
        "settings": settings,
        "versions": {name: version(name) for name in ("kronpress", "torch", "transformers")},
        "dense_nats": kp.evaluate(dense.model, dense.tokenizer, text).nll_mean_nats,
        "starts": {},
    }
    for name in STARTS:
        if only in name:
            start = start_of(name, dense, work)
            nats = kp.evaluate(start.model, dense.tokenizer, text).nll_mean_nats
            rows = rows_of(name, start, dense, text, work, steps, sequences, **parsed)
            results["starts"][name] = {"nats": nats, "rows": rows}
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
