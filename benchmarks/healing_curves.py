"""How low healing goes with how many tokens: every objective from two compressed starts, and the default of `auto`.

    python benchmarks/healing_curves.py run --tokens tokens.bin --work DIR --out benchmarks/results/healing_curves.json
    python benchmarks/healing_curves.py render > docs/results/healing.md

`pocket` by `krony-96m` and by `auto` at its number of parameters. Each objective trains the same start on the same
tokens in the same order, at the best of four rates by trials on a fifth of the tokens and the validation books. The
language model alone, as Krony-PT heals, then has five times these tokens, at the best of the four rates on the tokens
themselves, and so has the dense model, trained further; the default and the language model with three seeds, which
decide the order of the text. Since five times the tokens may not be enough for the language model to be done, it has
once as many as UNTIL_FLAT says, and the default a fifth of these. The training text is what
`scripts/train_pocket.py tokens` writes. DIR keeps the starts and the runs that are done, so that what was stopped goes
on.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import healing_page
import numpy as np
import torch
import typer
from fit_table import CORES, RESULTS, Out, Processes, Work, _round_to_, _write, compressed_, workers

import kronpress as kp
from kronpress.checkpoint import write_model
from kronpress.healing import reconstruct_blocks_
from kronpress.recipe import Healing, Reconstruction
from kronpress.tokens import pack

STARTS = {"krony-96m": ("krony-96m", []), "auto": ("auto", ["targets=blocks", "budget.params=2620440"])}
# Per start, since one is far from the dense model and the other near to it.
RATES = {
    "krony-96m": (2.5e-4, 5e-4, 1e-3, 2e-3),
    "auto": (5e-5, 1e-4, 2e-4, 4e-4),
    "dense": (2.5e-5, 5e-5, 1e-4, 2e-4),
}
# Of rates that are those of W, and less for most factors.
OF_MOVEMENT = 2
# How many times the tokens of the short runs the language model has once.
UNTIL_FLAT = {"krony-96m": 80, "auto": 20}
LANGUAGE_MODEL, DEFAULT = "language model", "default"
OBJECTIVES: dict[str, dict[str, float]] = {
    LANGUAGE_MODEL: {"language_model_weight": 1.0},
    "forward KL": {"distillation_weight": 1.0},
    "reverse KL": {"reverse_distillation_weight": 1.0},
    "Jensen-Shannon": {"jensen_shannon_weight": 1.0},
    "language model and forward KL": {"language_model_weight": 0.5, "distillation_weight": 0.5},
    "forward KL and hidden states": {"distillation_weight": 1.0, "hidden_weight": 0.3},
}
# What `auto` asks of a healing beyond its length, batch and rate: the default that is on trial.
OF_THE_DEFAULT = ("language_model_weight", "distillation_weight", "hidden_weight", "rates", "optimizer")
FACTOR = 5
SEEDS = (0, 1, 2)
SEQUENCE, PER_STEP, WARMUP_FRACTION = 256, 2, 0.05
POINTS = 10  # at which a run is measured on the first tokens of the validation books, the last included
TEXT_TOKENS = 20_000_000  # the last of the training text
CURVE_TOKENS, VALIDATION_CHARACTERS = 16_384, 120_000

Run = dict[str, Any]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def rates_of(start: str, name: str) -> list[float]:
    """The rates tried; equally many for every objective."""
    factor = OF_MOVEMENT if objective(name).get("rates") == "movement" else 1
    return [factor * rate for rate in RATES[start]]


def objective(name: str) -> dict[str, Any]:
    """The fields of a healing that make the objective."""
    if name == DEFAULT:
        healing = kp.load_recipe("auto").healing
        return {field: getattr(healing, field) for field in OF_THE_DEFAULT}
    return {"language_model_weight": 0.0, **OBJECTIVES[name]}


def reconstruction(name: str, num_tokens: int) -> Reconstruction | None:
    """The block-wise stage of the default, if `auto` has one; its tokens are taken from the healing's."""
    settings = kp.load_recipe("auto").reconstruction
    if name != DEFAULT or settings.steps == 0:
        return None
    tokens_per_step = settings.sequences_per_step * SEQUENCE
    return settings.model_copy(update={"steps": min(settings.steps, num_tokens // 4 // tokens_per_step)})


def one(start: str, name: str, tokens: int, rate: float, seed: int = 0) -> Run:
    return {"start": start, "objective": name, "tokens": tokens, "rate": rate, "seed": seed}


def trials(start: str, num_tokens: int) -> list[Run]:
    """A fifth of the tokens at every rate."""
    names = [LANGUAGE_MODEL] if start == "dense" else [*OBJECTIVES, DEFAULT]
    return [
        one(start, name, num_tokens // FACTOR, rate) | {"is_trial": True}
        for name in names
        for rate in rates_of(start, name)
    ]


def short_runs(start: str, num_tokens: int, results: list[Run]) -> list[Run]:
    """Each objective at the best rate of its trials; the language model at all, to choose the rate of its long runs."""
    runs = [] if start == "dense" else [one(start, LANGUAGE_MODEL, num_tokens, rate) for rate in RATES[start]]
    best = best_rates(results, start, num_tokens // FACTOR)
    return runs + [one(start, name, num_tokens, rate) for name, rate in best.items() if name != LANGUAGE_MODEL]


def long_runs(start: str, num_tokens: int, results: list[Run]) -> list[Run]:
    """The language model on five times the tokens, and the default, each with all seeds; and both once with far more.

    Of the dense model one run.
    """
    if start == "dense":
        rate = best_rates(results, start, num_tokens // FACTOR)[LANGUAGE_MODEL]
        return [one(start, LANGUAGE_MODEL, FACTOR * num_tokens, rate)]
    rates = best_rates(results, start, num_tokens)
    long = [one(start, LANGUAGE_MODEL, FACTOR * num_tokens, rates[LANGUAGE_MODEL], seed) for seed in SEEDS]
    long += [one(start, DEFAULT, num_tokens, rates[DEFAULT], seed) for seed in SEEDS if seed]
    most = UNTIL_FLAT[start] * num_tokens
    long += [one(start, LANGUAGE_MODEL, most, rates[LANGUAGE_MODEL])]
    return [*long, one(start, DEFAULT, most // FACTOR, rates[DEFAULT])]


def best_rates(results: list[Run], start: str, num_tokens: int) -> dict[str, float]:
    """By objective the rate with the lowest final loss on the validation books, of the runs of so many tokens."""
    of_seed = [run for run in results if run["start"] == start and run["seed"] == 0 and run["tokens"] == num_tokens]
    best: dict[str, Run] = {}
    for run in sorted(of_seed, key=lambda run: run["validation"]["nll_mean_nats"]):
        best.setdefault(run["objective"], run)
    return {name: run["rate"] for name, run in best.items()}


def make_start(name: str, work: Path) -> None:
    """The compressed model, as it is stored, in `work`."""
    folder = work / "starts" / name
    if folder.is_dir():
        return
    loaded = kp.load_model("pocket")
    if name != "dense":
        recipe, changes = STARTS[name]
        plan, _ = compressed_(loaded, kp.load_recipe(recipe, changes, "pocket"), work / "moments")
        _round_to_(loaded.model, loaded.dtype)
        print(f"{name}: {plan.num_params} parameters", file=sys.stderr, flush=True)
    test = kp.load_running_text("bundled", "test").text
    _write(work / "starts" / f"{name}.json", kp.evaluate(loaded.model, loaded.tokenizer, test).to_json())
    partial = folder.with_name(f".{name}")
    write_model(loaded.model, loaded.tokenizer, partial, loaded.dtype)
    partial.rename(folder)


def carry_out(run: Run, work: Path, tokens_file: Path) -> None:
    """Heal by the run's settings, and keep its curve; unless it is a trial, what it is on the test books too."""
    loaded, teacher = kp.load_model(str(work / "starts" / run["start"])), kp.load_model("pocket").model
    model, tokenizer = loaded.model, loaded.tokenizer
    books = {split: kp.load_running_text("bundled", split).text for split in ("validation", "test")}
    ids = tokenizer(books["validation"][:VALIDATION_CHARACTERS], add_special_tokens=False)["input_ids"]
    stream = np.memmap(tokens_file, dtype=np.uint16, mode="r")
    tokens = torch.from_numpy(stream[-TEXT_TOKENS:].astype(np.int64))

    is_trial = run.get("is_trial", False)
    stage = reconstruction(run["objective"], run["tokens"])
    story: dict[str, Any] = {}
    read = 0
    if stage is not None:
        windows = pack(tokens[-stage.windows * SEQUENCE :], SEQUENCE)
        log = reconstruct_blocks_(model, teacher, windows, stage, seed=run["seed"])
        read = log.tokens
        story["reconstruction"] = log.model_dump(mode="json")
    num_steps = (run["tokens"] - read) // (PER_STEP * SEQUENCE)
    healing = Healing(
        max_steps=num_steps,
        sequences_per_step=PER_STEP,
        sequence_length=SEQUENCE,
        learning_rate=run["rate"],
        warmup_steps=int(WARMUP_FRACTION * num_steps),
        save_steps=num_steps if is_trial else max(1, num_steps // POINTS),
        keep_checkpoints=1,
        validation_data="bundled",
        validation_tokens=CURVE_TOKENS,
        **objective(run["objective"]),
    )
    with tempfile.TemporaryDirectory(dir=work) as folder:
        log = kp.heal_(
            model,
            teacher,
            tokens,
            healing,
            seed=run["seed"],
            work_dir=Path(folder),
            validation_tokens=torch.tensor(ids),
        )
    curve = [
        {"tokens": read + row.tokens, "validation_nats": row.validation_nats}
        for row in log.rows
        if row.validation_nats is not None
    ]
    _round_to_(model, loaded.dtype)

    def measured(split: str, characters: int | None = None) -> dict[str, Any]:
        return kp.evaluate(model, tokenizer, books[split][:characters]).to_json()

    _write(
        file_of(run, work),
        {
            **run,
            **story,
            "seconds": log.seconds,
            "curve": curve,
            "validation": measured("validation", VALIDATION_CHARACTERS),
            **({} if is_trial else {"test": measured("test")}),
        },
    )


def file_of(run: Run, work: Path) -> Path:
    name = f"{run['start']} {run['objective']} {run['tokens']} {run['rate']:g} {run['seed']}"
    return work / "runs" / f"{re.sub(r'[^a-z0-9.]+', '_', name.lower())}.json"


def done(runs: list[Run], work: Path) -> list[Run]:
    return [json.loads(file_of(run, work).read_text()) for run in runs if file_of(run, work).is_file()]


def all_of(waiting: list[tuple[Callable[..., None], tuple[Any, ...]]], processes: int) -> None:
    """Carry all out, and raise what the first of those that failed raised, the others done."""
    with workers(processes) as executor:
        futures = [executor.submit(call, *given) for call, given in waiting]
        for number, future in enumerate(as_completed(futures), 1):
            if future.exception() is None:
                print(f"{number}/{len(futures)}", file=sys.stderr, flush=True)
        for future in futures:
            future.result()


@app.command()
def run(
    tokens: Annotated[Path, typer.Option(help="training text, token ids of 16 bits", exists=True, dir_okay=False)],
    work: Work,
    out: Out,
    num_tokens: Annotated[
        int, typer.Option(help="tokens of the short runs; the long ones have 5 and up to 80 times as many")
    ] = (98_304),
    processes: Processes = CORES,
) -> None:
    """All runs: the trials of all rates first, then what is long or has other seeds."""
    starts = [*STARTS, "dense"]
    for start in starts:
        make_start(start, work)
    runs = [each for start in starts for each in trials(start, num_tokens)]
    for more in (None, short_runs, long_runs):
        if more is not None:
            runs += [each for start in starts for each in more(start, num_tokens, done(runs, work))]
        # The longest first: what ends last is short then.
        _all_done(sorted(runs, key=lambda each: -each["tokens"]), work, tokens, processes)
    recipe = kp.load_recipe("auto")
    results = {
        "command": f"python benchmarks/healing_curves.py run --tokens tokens.bin --work DIR --num-tokens {num_tokens}",
        "num_tokens": num_tokens,
        "default": {**objective(DEFAULT), "reconstruction": recipe.reconstruction.model_dump(mode="json")},
        "objectives": OBJECTIVES,
        "sequence_length": SEQUENCE,
        "sequences_per_step": PER_STEP,
        "versions": {name: version(name) for name in ("kronpress", "torch", "transformers")},
        "starts": {start: json.loads((work / "starts" / f"{start}.json").read_text()) for start in starts},
        "runs": done(runs, work),
    }
    _write(out, results)


def _all_done(runs: list[Run], work: Path, tokens: Path, processes: int) -> None:
    missing = [each for each in runs if not file_of(each, work).is_file()]
    all_of([(carry_out, (each, work, tokens)) for each in missing], processes)


@app.command()
def render() -> None:
    """Print the page as Markdown, and draw its figure."""
    print(healing_page.page(RESULTS / "healing_curves.json", healing_page.FIGURE), end="")


if __name__ == "__main__":
    app()
