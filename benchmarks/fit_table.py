"""What the fit to real inputs is worth: `auto` beside every other way to the same size.

    python benchmarks/fit_table.py one-shot --work DIR1 --text wiki.test.raw --out benchmarks/results/fit_one_shot_pocket.json
    python benchmarks/fit_table.py one-shot --work DIR2 --text wiki.test.raw --out benchmarks/results/fit_one_shot_llama.json --model LLAMA
    python benchmarks/fit_table.py healed   --work DIR3 --text wiki.test.raw --out benchmarks/results/fit_healed.json
    python benchmarks/fit_table.py ablation --work DIR4 --out benchmarks/results/fit_ablation.json
    python benchmarks/fit_table.py render > docs/results/fit.md

`one-shot` trains nothing. `healed` trains every model on equal tokens as pocket_table.py does, with `--distil` from the
dense model instead of the text (`--out .../fit_healed_distil.json`). `ablation` leaves out or adds each part of
`auto` in turn, on the validation books, since choices are made there. LLAMA is the folder of the model that
`scripts/train_pocket.py train --architecture llama --width 128 --heads 4 --total-tokens 8000000 --out LLAMA` makes.

All calibrate and heal on the bundled `heal` books alone; `--text` is only evaluated on. DIR keeps calibrations and the
rows that are done, so that what was stopped goes on. `--only` measures the rows whose names contain it, and the dense model.
"""  # noqa: E501

from __future__ import annotations

import copy
import json
import os
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import fit_page
import torch
import typer
from pocket_table import RATES, SIZES, STEPS, VALIDATION_CHARACTERS
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

import kronpress as kp
from kronpress.calibration import calibration_batches, load_moments, moments_key
from kronpress.checkpoint import LoadedModel, cast_parameters_
from kronpress.pipeline import Calibrated, calibration_batch, compress_loaded_
from kronpress.recipe import Healing
from kronpress.rivals import RIVALS, Contender
from kronpress.tokens import Split

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]

KEPT = (0.25, 0.5, 0.75)
NEAR = 0.01
STARTS = {"van_loan": ["fit.start=van_loan"], "adaptive": ["fit.start=adaptive"]}
PRUNE_STARTS = {  # of krony-96m alone
    f"prune [1, {small}]": ["fit.start=prune", f"fit.prune_small_factor={small}"] for small in (0.1, 0)
}
AUTO = {"auto on MLPs": "mlp", "auto on blocks": "blocks"}
# What each part of `auto` could be instead, or is already: that is not measured twice.
PARTS = (
    ("seed", ["seed=1"]),
    ("seed", ["seed=2"]),
    ("bias correction", ["weighting.bias_correction=false"]),
    ("bias correction", ["weighting.bias_correction=true"]),
    ("sequential", ["weighting.sequential=false"]),
    ("sequential", ["weighting.sequential=true"]),
    ("shrinkage", ["weighting.shrinkage=0"]),
    ("shrinkage", ["weighting.shrinkage=held_out"]),
    ("shrinkage", ["weighting.shrinkage=0.1"]),
    ("shrinkage", ["weighting.shrinkage=0.3"]),
    ("allocation", ["allocation=uniform", "structure=low_rank"]),
    ("sensitivity", ["calibration.sensitivity=false", "weighting.metric=input"]),
    # Fits alone: what the metric is worth where it does not allocate.
    (
        "sensitivity and allocation",
        ["calibration.sensitivity=false", "weighting.metric=input", "allocation=uniform", "structure=low_rank"],
    ),
    ("candidates", ["candidates=[low_rank]"]),
    ("candidates", ["candidates=[low_rank, kronecker]"]),
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Work = Annotated[Path, typer.Option(help="folder that keeps calibrations and the rows that are done")]
Out = Annotated[Path, typer.Option(help="JSON file to write")]
Model = Annotated[str, typer.Option(help="`pocket`, or the folder of a model")]
Text = Annotated[Path | None, typer.Option(help="a further text to evaluate on", exists=True, dir_okay=False)]
Only = Annotated[str, typer.Option(help="measure the rows whose names contain this, and the dense model")]
Set = Annotated[list[str] | None, typer.Option("--set", help="a change of every recipe, path.to.field=value")]
Characters = Annotated[int | None, typer.Option(help="read only so much of each text", min=1)]
Processes = Annotated[int, typer.Option(help="rows at once, one thread each", min=1)]
Steps = Annotated[int, typer.Option(help="steps of healing", min=1)]
Distil = Annotated[bool, typer.Option(help="heal by distillation alone; the dense model is still trained on text")]
CORES = os.cpu_count() or 1


@dataclass(frozen=True)
class Job:
    """What all rows of one table have in common. `split` is that of the bundled books which is evaluated on."""

    command: str
    work: Path
    model: str = "pocket"
    split: Split = "test"
    text: Path | None = None
    changes: tuple[str, ...] = ()
    characters: int | None = None
    steps: int = 0
    distil: bool = False
    rates: tuple[float, ...] = RATES
    script: str = "fit_table.py"
    size: str = "krony-96m"

    @property
    def settings(self) -> dict[str, Any]:
        """All that a row's figures depend on; of paths the names, which say enough."""
        healing = {"steps": self.steps, "rates": list(self.rates), "distil": self.distil}
        return {
            "command": self.command,
            "model": Path(self.model).name,
            "split": self.split,
            "text": self.text and self.text.name,
            "set": list(self.changes),
            "characters": self.characters,
            **(healing if self.steps else {}),
            **({} if self.size == "krony-96m" else {"size": self.size}),
        }

    @property
    def command_line(self) -> str:
        """What was typed, with names in place of paths."""
        words = [f"python benchmarks/{self.script}", self.command, "--work DIR"]
        words += [f"--model {Path(self.model).name}"] if self.model != "pocket" else []
        words += [f"--text {self.text.name}"] if self.text is not None else []
        words += [f"--set {change}" for change in self.changes]
        words += [f"--characters {self.characters}"] if self.characters is not None else []
        words += [f"--steps {self.steps}"] if self.steps not in (0, STEPS) else []
        words += ["--distil"] if self.distil and self.script == "fit_table.py" else []
        words += [f"--size {self.size}"] if self.size != "krony-96m" else []
        return " ".join(words)


# ---- which rows there are ----


def sizes(model: nn.Module) -> list[dict[str, Any]]:
    """The sizes at which recipes are compared, in parameters of the whole model and kept fraction of its MLPs.

    First those of Krony-PT, or the reason why the model cannot have them; then those of KEPT that none of them is near.
    """
    found: list[dict[str, Any]] = []
    for name in SIZES:
        try:
            plan = kp.make_plan(model, kp.load_recipe(name))
        except kp.RequestError as error:
            found.append({"name": name, "error": str(error)})
        else:
            found.append({"name": name, "num_params": plan.num_params, "kept_of_mlp": plan.kept_of_targets})
    plan = kp.make_plan(model, kp.load_recipe("low-rank"))
    for kept in KEPT:
        if any(abs(size.get("kept_of_mlp", 0) - kept) < NEAR for size in found):
            continue
        num_params = plan.num_params_dense - plan.num_params_targets_dense + int(kept * plan.num_params_targets_dense)
        found.append({"name": f"{kept:g} of the MLPs", "num_params": num_params, "kept_of_mlp": kept})
    return found


def _row(size: str, method: str, recipe: str, changes: list[str]) -> Row:
    return {"name": f"{size}: {method}", "size": size, "method": method, "recipe": recipe, "set": changes}


def _krony_rows(size: str) -> list[Row]:
    starts = {**STARTS, **(PRUNE_STARTS if size == "krony-96m" else {})}
    return [_row(size, f"Krony-PT, {start}", size, changes) for start, changes in starts.items()]


def _rows_of_any_size(size: dict[str, Any], recipes: tuple[str, ...]) -> list[Row]:
    """The recipes that take any budget, and the model with fewer blocks, at the same number of parameters."""
    name, budget = size["name"], f"budget.params={size['num_params']}"
    others = [_row(name, recipe, recipe, [budget]) for recipe in recipes]
    auto = [_row(name, method, "auto", [f"targets={targets}", budget]) for method, targets in AUTO.items()]
    blocks = {"name": f"{name}: blocks", "size": name, "method": "blocks", "rival": "blocks"}
    return [*others, *auto, {**blocks, "num_params": size["num_params"]}]


def one_shot_rows(sizes: list[dict[str, Any]]) -> list[Row]:
    """Dense, in 16 and in fewer bits; then at every size that the model can have Krony-PT and the others."""
    rows: list[Row] = [{"name": "dense", "rival": "dense"}]
    rows += [{"name": f"dense, {bits}", "rival": bits} for bits in ("8-bit", "4-bit")]
    for size in sizes:
        if "num_params" in size:
            rows += _krony_rows(size["name"]) if size["name"] in SIZES else []
            rows += _rows_of_any_size(size, ("low-rank", "svd-llm", "asvd"))
    return rows


def healed_rows(size: dict[str, Any]) -> list[Row]:
    """At one size of Krony-PT its starts and the others, and the dense model trained further."""
    dense = {"name": "dense", "rival": "dense"}
    return [dense, *_krony_rows(size["name"]), *_rows_of_any_size(size, ("low-rank", "svd-llm"))]


def ablation_rows() -> list[Row]:
    """`auto` as it is and with each of PARTS changed, half of the targets kept; all left out, it is plain SVD.

    Raises:
        RequestError: a recipe's field does not exist, or its value is wrong.
    """
    rows: list[Row] = [{"name": "dense", "rival": "dense"}]
    for method, targets in AUTO.items():
        half = [f"targets={targets}", "budget.kept_of_targets=0.5"]
        rows.append({**_row(method, "as it is", "auto", half), "part": None})
        rows.append({**_row(method, "low-rank", "low-rank", half), "part": "all of it"})
        as_it_is = kp.load_recipe("auto", half)
        rows += [
            {**_row(method, " ".join(changes), "auto", [*half, *changes]), "part": part}
            for part, changes in PARTS
            if kp.load_recipe("auto", [*half, *changes]) != as_it_is
        ]
    return rows


# ---- one row ----


def recipe_of(row: Row, job: Job) -> kp.Recipe:
    """The row's recipe; whatever the model is, with the data and schedule that `pocket` gets."""
    return kp.load_recipe(row["recipe"], [*row["set"], *job.changes], "pocket")


def calibrated(recipe: kp.Recipe, loaded: LoadedModel, folder: Path) -> tuple[Calibrated, float]:
    """The recipe's calibration, measured once for all rows that need the same, and the seconds that took."""
    if recipe.weighting.metric == "none":
        return Calibrated(), 0.0
    batches = calibration_batches(loaded.tokenizer, recipe, calibration_batch(recipe))
    key = moments_key(loaded.model, recipe, batches)
    path, note = folder / f"{key}.safetensors", folder / f"{key}.json"
    if not note.is_file():
        started = time.perf_counter()
        moments = kp.calibrate(loaded.model, batches, recipe)
        seconds = time.perf_counter() - started
        moments.save(path)
        _write(note, {"seconds": seconds})
    return Calibrated(load_moments(path, key), batches), json.loads(note.read_text())["seconds"]


def measure(row: Row, job: Job) -> Row:
    """The row with its sizes, seconds and losses, or with the reason why the model cannot have that size."""
    loaded = kp.load_model(job.model)
    if "rival" in row:
        plan = kp.make_plan(loaded.model, kp.load_recipe("low-rank"))
        plan = plan.model_copy(update={"num_params": row.get("num_params", plan.num_params_dense)})
        start = RIVALS[row["rival"]](loaded.model, plan)
        result = {**row}
    else:
        recipe = recipe_of(row, job)
        torch.manual_seed(recipe.seed)
        try:
            plan, seconds = compressed_(loaded, recipe, job.work / "moments")
        except kp.RequestError as error:
            return {**row, "error": str(error)}
        result = {**row, **seconds}
        _round_to_(loaded.model, loaded.dtype)
        start = Contender(row["name"], loaded.model, plan.num_params, plan.bytes, plan.flops_per_token)
    result |= {"num_params": start.num_params, "bytes": start.bytes, "flops_per_token": start.flops_per_token}

    texts = _texts(job)

    def measured(model: nn.Module) -> dict[str, Any]:
        return {name: kp.evaluate(model, loaded.tokenizer, text).to_json() for name, text in texts.items()}

    result["before"] = measured(start.model)
    if not job.steps or not start.is_trained:
        return result
    healing = _healing(row, job)
    teacher = kp.load_model(job.model)
    tokens = kp.load_train_tokens(loaded.tokenizer, healing.data, 10**9)
    validation = kp.load_running_text("bundled", "validation").text[: job.characters][:VALIDATION_CHARACTERS]

    def healed(rate: float, steps: int) -> nn.Module:
        schedule = healing.model_copy(update={"learning_rate": rate, "max_steps": steps, "warmup_steps": steps // 10})
        stages = [] if "rival" in row or row.get("is_healed_at_the_end") else recipe_of(row, job).stages
        if stages:
            return _healed_in_stages(row, job, teacher, tokens, schedule)
        model = copy.deepcopy(start.model)
        kp.heal_(model, teacher.model, tokens, schedule)
        _round_to_(model, loaded.dtype)
        return model

    trial_steps = -(-job.steps // 5)
    trials = {
        rate: kp.evaluate(healed(rate, trial_steps), loaded.tokenizer, validation).nll_mean_nats for rate in job.rates
    }
    best = min(trials, key=lambda rate: trials[rate])
    return {
        **result,
        "validation_nats_by_rate": {f"{rate:g}": nats for rate, nats in trials.items()},
        "rate": best,
        "tokens": job.steps * healing.tokens_per_step,
        "after": measured(healed(best, job.steps)),
    }


def compressed_(loaded: LoadedModel, recipe: kp.Recipe, folder: Path) -> tuple[kp.Plan, dict[str, float]]:
    """Compress in place by all stages of the recipe, without healing; the last plan, and the seconds of each step."""
    plan = None
    seconds = dict.fromkeys(("calibration_seconds", "planning_seconds", "fitting_seconds"), 0.0)
    for part in recipe.parts:
        data, calibration_seconds = calibrated(part, loaded, folder)
        started = time.perf_counter()
        plan = kp.make_plan(loaded.model, part, data.moments, before=plan)
        planned = time.perf_counter()
        compress_loaded_(loaded, plan, data)
        seconds["calibration_seconds"] += calibration_seconds
        seconds["planning_seconds"] += planned - started
        seconds["fitting_seconds"] += time.perf_counter() - planned
    assert plan is not None
    return plan, seconds


def _healed_in_stages(row: Row, job: Job, dense: LoadedModel, tokens: Tensor, schedule: Healing) -> nn.Module:
    """Compressed and healed stage by stage, each with its share of the steps, on tokens that follow one another."""
    recipe = recipe_of(row, job)
    student = replace(dense, model=copy.deepcopy(dense.model))
    plan, steps_done, share_done = None, 0, 0.0
    for part, stage in zip(recipe.parts, recipe.stages, strict=True):
        data, _ = calibrated(part, student, job.work / "moments")
        plan = kp.make_plan(student.model, part, data.moments, before=plan)
        compress_loaded_(student, plan, data)
        _round_to_(student.model, dense.dtype)
        share_done += stage["share"]
        steps = round((schedule.max_steps or 0) * share_done) - steps_done
        part_of_it = schedule.model_copy(update={"max_steps": steps, "warmup_steps": steps // 10})
        kp.heal_(student.model, dense.model, tokens[steps_done * schedule.tokens_per_step :], part_of_it)
        _round_to_(student.model, dense.dtype)
        steps_done += steps
    return student.model


def _healing(row: Row, job: Job) -> Healing:
    """One schedule for all rows. The dense model cannot be distilled into itself: it is trained on the text.

    A row that says so keeps its recipe's own objective.
    """
    if row.get("has_own_objective"):
        own = recipe_of(row, job).healing
        names = ("language_model_weight", "distillation_weight", "temperature", *own.teacher_weights)
        objective = [f"healing.{name}={getattr(own, name)}" for name in dict.fromkeys(names)]
        return kp.load_recipe("krony-96m", [*objective, *job.changes], "pocket").healing
    distil = job.distil and row.get("rival") != "dense"
    weights = [f"healing.language_model_weight={1 - distil}", f"healing.distillation_weight={int(distil)}"]
    return kp.load_recipe("krony-96m", [*weights, *job.changes], "pocket").healing


def _texts(job: Job) -> dict[str, str]:
    texts = {f"{job.split} books": kp.load_running_text("bundled", job.split).text}
    if job.text is not None:
        texts[job.text.name] = job.text.read_text(encoding="utf-8")
    return {name: text[: job.characters] for name, text in texts.items()}


def _round_to_(model: nn.Module, dtype: torch.dtype) -> None:
    """What is measured is what would be stored in so many bytes."""
    cast_parameters_(model, dtype)
    cast_parameters_(model, torch.float32)


# ---- all rows ----


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".partial-{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def _file_of(row: Row, job: Job) -> Path:
    return job.work / "rows" / f"{re.sub(r'[^a-z0-9.]+', '_', row['name'].lower())}.json"


def _calibrate_row(row: Row, job: Job) -> None:
    calibrated(recipe_of(row, job).parts[0], kp.load_model(job.model), job.work / "moments")


def _measure_row(row: Row, job: Job) -> None:
    _write(_file_of(row, job), measure(row, job))


def workers(processes: int) -> Executor:
    """Processes of one thread each."""
    return ProcessPoolExecutor(processes, get_context("spawn"), initializer=_begin)


def _begin() -> None:
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()


def grid(job: Job, rows: list[Row], only: str, processes: int, out: Path, about: dict[str, Any]) -> None:
    """Measure the rows that are asked for and not done yet, and write all that are done to `out`.

    Raises:
        RequestError: a recipe is wrong, or the folder keeps rows of other settings.
        WorkError: rows failed; the others are kept.
    """
    asked_for = [row for row in rows if only in row["name"] or row["name"] == "dense"]
    recipes = {row["name"]: recipe_of(row, job) for row in asked_for if "recipe" in row}
    note = job.work / "settings.json"
    if note.is_file() and json.loads(note.read_text(encoding="utf-8")) != job.settings:
        there = " ".join(note.read_text(encoding="utf-8").split())
        raise kp.RequestError(f"{str(job.work)!r} keeps rows of other settings, {there}: take another folder")
    _write(note, job.settings)
    missing = [row for row in asked_for if not _file_of(row, job).is_file()]
    # What several rows wait for, each once.
    first: dict[str, Row] = {}
    for row in missing:
        recipe = recipes.get(row["name"])
        if recipe is not None and recipe.weighting.metric != "none":
            first.setdefault(repr((recipe.targets, recipe.calibration, recipe.seed)), row)
    with workers(processes) as executor:
        # A calibration that fails does so again in the rows that need it, and is told there.
        _carry_out(executor, _calibrate_row, "calibrating for", list(first.values()), job)
        failed = _carry_out(executor, _measure_row, "done with", missing, job)
    if "dense" not in failed:
        done = [row for row in rows if _file_of(row, job).is_file()]
        results = {
            "command": job.command_line,
            "settings": job.settings,
            "versions": {name: version(name) for name in ("kronpress", "torch", "transformers")},
            **about,
            "rows": with_rises([json.loads(_file_of(row, job).read_text(encoding="utf-8")) for row in done]),
            "not_measured": [row["name"] for row in rows if row not in done],
        }
        _write(out, results)
    if failed:
        causes = "; ".join(f"{name} ({cause})" for name, cause in failed.items())
        raise kp.WorkError(f"{len(failed)} of {len(missing)} rows failed, the others are kept: {causes}")


def _carry_out(
    executor: Executor, work: Callable[[Row, Job], None], label: str, rows: list[Row], job: Job
) -> dict[str, str]:
    """Work on all rows; the names of those that failed, with the cause."""
    waiting = {executor.submit(work, row, job): row["name"] for row in rows}
    failed = {}
    for done, future in enumerate(as_completed(waiting), 1):
        name, error = waiting[future], future.exception()
        if error is not None:
            failed[name] = f"{type(error).__name__}: {error}"
        told = f"{label} {name}" if error is None else f"failed: {name}, {failed[name]}"
        print(f"{done}/{len(rows)} {told}", file=sys.stderr, flush=True)
    return failed


def with_rises(rows: list[Row]) -> list[Row]:
    """The rows with `rise_nats` and, of those that were healed, `rise_after_nats`: over the dense model as it was."""
    dense = next(row["before"] for row in rows if row["name"] == "dense")

    def rises(metrics: dict[str, Any]) -> dict[str, float]:
        return {text: figures["nll_mean_nats"] - dense[text]["nll_mean_nats"] for text, figures in metrics.items()}

    return [
        {
            **row,
            **({"rise_nats": rises(row["before"])} if "before" in row else {}),
            **({"rise_after_nats": rises(row["after"])} if "after" in row else {}),
        }
        for row in rows
    ]


@app.command()
def one_shot(
    work: Work,
    out: Out,
    model: Model = "pocket",
    text: Text = None,
    only: Only = "",
    changes: Set = None,
    characters: Characters = None,
    processes: Processes = CORES,
) -> None:
    """Every recipe at every size, without any training."""
    job = Job("one-shot", work, model, text=text, changes=tuple(changes or ()), characters=characters)
    found = sizes(kp.load_model(model).model)
    grid(job, one_shot_rows(found), only, processes, out, {"sizes": found})


@app.command()
def healed(
    work: Work,
    out: Out,
    model: Model = "pocket",
    text: Text = None,
    only: Only = "",
    changes: Set = None,
    characters: Characters = None,
    processes: Processes = CORES,
    steps: Steps = STEPS,
    distil: Distil = False,
    at: Annotated[str, typer.Option("--size", help="one of Krony-PT's sizes")] = "krony-96m",
    known: Annotated[
        Path | None, typer.Option(help="results of pocket_table.py: take from it the rows that it has", exists=True)
    ] = None,
) -> None:
    """At one size of Krony-PT, after equal training, each with the best of three rates."""
    job = Job("healed", work, model, "test", text, tuple(changes or ()), characters, steps, distil, size=at)
    found = [each for each in sizes(kp.load_model(model).model) if each["name"] == at]
    if not found:
        raise kp.RequestError(f"--size {at!r}: allowed are {', '.join(SIZES)}")
    size = found[0]
    if "error" in size:
        raise kp.RequestError(f"the model cannot have the size that is healed at: {size['error']}")
    rows = healed_rows(size)
    if known is not None:
        _take_known(rows, job, json.loads(known.read_text(encoding="utf-8")))
    grid(job, rows, only, processes, out, {"sizes": [size]})


def _take_known(rows: list[Row], job: Job, table: dict[str, Any]) -> None:
    """Put the rows that pocket_table.py has measured in the same way where the grid looks for those that are done.

    They differ in one thing: weights were measured there before they were rounded to 16 bits.

    Raises:
        RequestError: the table was made in another way than the job's.
    """
    ours = {"model": job.model, "steps": job.steps, "rates": list(RATES), "texts": list(_texts(job))}
    theirs = {key: table["settings"][key] for key in ("model", "steps", "rates")}
    theirs["texts"] = list(table["rows"][0]["before"])
    if ours != theirs or job.distil or job.changes or job.characters is not None:
        raise kp.RequestError(f"the table of pocket_table.py is of {theirs}; asked for is {job.settings}")
    named = ("name", "size", "set", "rival")
    figures = {row["name"]: {k: v for k, v in row.items() if k not in named} for row in table["rows"]}
    for row in rows:
        method = row.get("method", "")
        name = {
            "dense": "dense, dense",
            f"{row.get('size')}: low-rank": f"low rank, as {row.get('size')}",
            f"{row.get('size')}: blocks": f"blocks, as {row.get('size')}",
        }.get(row["name"], f"{row.get('size')}, {method.removeprefix('Krony-PT, ')}")
        path = _file_of(row, job)
        if name in figures and not path.is_file():
            _write(path, {**row, **figures[name], "known": "pocket_table.py"})


@app.command()
def ablation(
    work: Work,
    out: Out,
    model: Model = "pocket",
    only: Only = "",
    changes: Set = None,
    characters: Characters = None,
    processes: Processes = CORES,
) -> None:
    """`auto` with each of its parts changed in turn, on the validation books."""
    job = Job("ablation", work, model, "validation", changes=tuple(changes or ()), characters=characters)
    grid(job, ablation_rows(), only, processes, out, {})


@app.command()
def render(
    folder: Annotated[Path, typer.Argument(help="where the results are", exists=True, file_okay=False)] = RESULTS,
) -> None:
    """Print the page as Markdown."""
    print(fit_page.page(folder), end="")


if __name__ == "__main__":
    try:
        app()
    except (kp.RequestError, kp.WorkError) as error:
        print(f"fit_table: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, kp.RequestError) else 1)
