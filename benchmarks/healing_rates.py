"""One rate for all parameters, rates that fit the structure, and other optimisers: healed on equal tokens, equal grids.

    python benchmarks/healing_rates.py --tokens 1000000 --out benchmarks/results/healing_rates.json

On `pocket`, from the one-shot starts of `krony-96m` and of `auto` with half of the MLPs kept, by distillation alone.
The loss is that of the bundled validation books; the test books are not read. Every way has the same grid of rates,
and its best is the lowest loss on them; a best at the end of the grid says that the grid is too short. FILE is written
after each row, and the rows in it are not measured again. `--tokens-file` has training tokens as 16-bit integers;
without it they are the bundled books'.
"""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn

import kronpress as kp
from kronpress.checkpoint import LoadedModel
from kronpress.healing.optimizers import make_optimizer, parameter_groups, state_bytes
from kronpress.pipeline.compressing import compress_stages_

# The recipe of each start, and what is changed in it.
STARTS = {
    "krony-96m": ("krony-96m", []),
    "auto": ("auto", ["targets=mlp", "budget.kept_of_targets=0.5"]),
}
# What is changed in the healing.
WAYS: dict[str, dict[str, str]] = {
    "global": {},
    "movement": {"rates": "movement"},
    "muon": {"optimizer": "muon"},
    "muon, movement": {"optimizer": "muon", "rates": "movement"},
    "adafactor": {"optimizer": "adafactor"},
    "adafactor, movement": {"optimizer": "adafactor", "rates": "movement"},
    "adamw-bfloat16": {"optimizer": "adamw-bfloat16"},
}
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
Row = dict[str, Any]


def main(
    out: Annotated[Path, typer.Option(metavar="FILE", help="results as JSON")],
    tokens: Annotated[int, typer.Option(help="training tokens of each row")] = 1_000_000,
    starts: Annotated[str, typer.Option(help="names, with semicolons between them")] = ";".join(STARTS),
    ways: Annotated[str, typer.Option(help="names, with semicolons between them")] = ";".join(WAYS),
    rates: Annotated[str, typer.Option(help="peak rates, with semicolons between them")] = ";".join(map(str, RATES)),
    characters: Annotated[int | None, typer.Option(help="of the validation text; all if unset")] = None,
    tokens_file: Annotated[Path | None, typer.Option(exists=True, help="training tokens, 16-bit integers")] = None,
    sequences: Annotated[int, typer.Option(help="in one step")] = 8,
    length: Annotated[int, typer.Option(help="tokens of one sequence")] = 256,
    seed: int = 0,
) -> None:
    """Measure what is not in the file yet."""
    dense = kp.load_model("pocket")
    text = kp.load_running_text("bundled", "validation").text[:characters]
    settings = {
        **{"tokens": tokens, "sequences_per_step": sequences, "sequence_length": length},
        **{"characters": len(text), "seed": seed, "has_tokens_file": tokens_file is not None},
    }
    schedule = {name: settings[name] for name in ("tokens", "sequences_per_step", "sequence_length")}
    schedule["warmup_steps"] = max(1, tokens // (sequences * length) // 20)
    results: dict[str, Any] = {"settings": settings, "dense_nats": None, "starts": {}, "rows": [], "best": []}
    if out.exists():
        results = json.loads(out.read_text(encoding="utf-8"))
        if results["settings"] != settings:
            raise SystemExit(f"{out} was made with {results['settings']}, not {settings}")
    train_tokens = _train_tokens(dense, tokens, tokens_file)
    if results["dense_nats"] is None:
        results["dense_nats"] = _nats(dense.model, dense, text)

    for start in starts.split(";"):
        compressed: nn.Module | None = None
        for way in ways.split(";"):
            for rate in map(float, rates.split(";")):
                row: Row = {"start": start, "way": way, "rate": rate}
                if any(row.items() <= done.items() for done in results["rows"]):
                    continue
                if compressed is None:
                    compressed = _start(start)
                    results["starts"][start] = {
                        "nats": _nats(compressed, dense, text),
                        "num_params": sum(each.numel() for each in compressed.parameters()),
                    }
                results["rows"].append(row | _healed(compressed, dense, train_tokens, row, schedule, text, seed))
                results["best"] = _best(results["rows"])
                out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
                typer.echo(json.dumps(results["rows"][-1]), err=True)


def _train_tokens(dense: LoadedModel, number: int, file: Path | None) -> Tensor:
    if file is None:
        return kp.load_train_tokens(dense.tokenizer, "bundled", number)[:number]
    return torch.from_numpy(np.memmap(file, np.uint16, "r")[:number].astype(np.int64))


def _start(name: str) -> nn.Module:
    recipe, changes = STARTS[name]
    loaded = kp.load_model("pocket")
    compress_stages_(loaded, kp.load_recipe(recipe, changes, "pocket"), lambda message: typer.echo(message, err=True))
    return loaded.model


def _healed(
    start: nn.Module, dense: LoadedModel, train_tokens: Tensor, row: Row, schedule: dict[str, Any], text: str, seed: int
) -> Row:
    student = copy.deepcopy(start)
    healing = kp.recipe.Healing(
        **schedule,
        learning_rate=row["rate"],
        language_model_weight=0.0,
        distillation_weight=1.0,
        **WAYS[row["way"]],
    )
    began = time.monotonic()
    try:
        log = kp.heal_(student, dense.model, train_tokens, healing, seed=seed)  # type: ignore[arg-type]
    except kp.WorkError as error:
        return {"nats": None, "error": str(error)}
    return {
        "nats": _nats(student, dense, text),
        "last_distillation_nats": log.rows[-1].distillation_nats,
        "skipped_steps": log.skipped_steps,
        "state_bytes": _state_bytes(copy.deepcopy(start), healing),
        "seconds": time.monotonic() - began,
    }


def _state_bytes(model: nn.Module, healing: kp.recipe.Healing) -> int:
    """What the optimiser keeps after a step."""
    optimizer = make_optimizer(healing.optimizer, parameter_groups(model, healing, 0.0))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return state_bytes(optimizer)


def _nats(model: nn.Module, dense: LoadedModel, text: str) -> float:
    return kp.evaluate(model, dense.tokenizer, text).nll_mean_nats  # type: ignore[arg-type]


def _best(rows: list[Row]) -> list[Row]:
    """Of each start and way the row of the lowest loss, the best way first."""
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = row["start"], row["way"]
        if row["nats"] is not None and (key not in found or row["nats"] < found[key]["nats"]):
            found[key] = row
    grid: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        grid.setdefault((row["start"], row["way"]), []).append(row["rate"])
    best = [
        {
            **{name: row[name] for name in ("start", "way", "rate", "nats", "state_bytes")},
            "is_inside_the_grid": min(grid[key]) < row["rate"] < max(grid[key]),
        }
        for key, row in found.items()
    ]
    return sorted(best, key=lambda row: (row["start"], row["nats"]))


if __name__ == "__main__":
    typer.run(main)
