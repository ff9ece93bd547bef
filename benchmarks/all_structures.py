"""Every structure and method at half and at a quarter of the MLPs of `pocket`: what each keeps, loses, costs and takes.

    python benchmarks/all_structures.py run --work DIR --text wiki.test.raw --out benchmarks/results/all_structures.json
    python benchmarks/all_structures.py render > docs/results/all_structures.md

One row is one method at one size. A row is compressed once, on the bundled `heal` books where it is fitted to real
inputs, and healed by distillation from the dense model on equal tokens of the same books, with the rate that does best
of RATES on the validation books in a tenth of the steps. Test books and `--text` are only evaluated on. `--steps` heals
longer.

All is computed by one thread and one row at a time, so that times are those of a quiet machine if it is one. DIR keeps
calibrations and the rows that are done: what was stopped goes on, and runs with different `--only` may share it.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib.metadata import version
from math import prod
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any

import torch
import typer
from fit_table import (
    RESULTS,
    Characters,
    Job,
    Row,
    Text,
    Work,
    _file_of,
    _healing,
    _round_to_,
    _texts,
    _write,
    calibrated,
)
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

import kronpress as kp
from kronpress.allocation import allocate, least_params
from kronpress.candidates import DENSE
from kronpress.checkpoint import LoadedModel
from kronpress.compression import LayerReport
from kronpress.layers import StructuredLinear
from kronpress.matrices import STRUCTURES
from kronpress.pipeline import compress_loaded_
from kronpress.plan import CandidateReport, LayerPlan, Plan
from kronpress.recipe import REDUCED, recipe_names
from kronpress.surgery import structured_layers, weight_shape

OUT = RESULTS / "all_structures.json"
KEPT = (0.5, 0.25)
STEPS = 32
RATES = (1e-4, 5e-4, 2e-3)
# Enough of the validation books to tell rates apart, and to tell apart what layers answer.
VALIDATION_CHARACTERS = 40_000
COMPARED_WINDOWS = 16
# How often a layer is timed, by how many tokens it gets.
ROUNDS = {1: 200, 512: 21}
WARM_UP_ROUNDS = 3
SEED = 0

ALL = ("low_rank", "kronecker", "monarch", "blast", "tensor_train", "structured_sum", "selected")
# What `auto` has by itself comes first: one structure more at the end never makes what it predicts worse.
AUTO_AND_ALL = ("low_rank", "kronecker", "reduced", *ALL[2:])
COLUMNS = "spec.sizes=[{structure: selected, spec: {lines: columns}, share: 0.125}, {structure: low_rank}]"
# Method, recipe, what is changed of it, and of B the number of entries where it is so small that the terms are counted.
METHODS: tuple[tuple[str, str, tuple[str, ...], int | None], ...] = (
    ("low rank (SVD)", "low-rank", (), None),
    ("ASVD", "asvd", (), None),
    ("SVD-LLM", "svd-llm", (), None),
    ("joint rank-k", "joint-rank-k", ("targets=mlp",), None),
    ("MoDeGPT", "modegpt", ("targets=mlp",), None),
    ("Kronecker (4, 4)", "low-rank", ("structure=kronecker", "spec.right_shape=[4, 4]"), 16),
    ("Kronecker (4, 4), on inputs", "svd-llm", ("structure=kronecker", "spec.right_shape=[4, 4]"), 16),
    ("permuted Kronecker (4, 4)", "low-rank", ("structure=permuted_kronecker", "spec.right_shape=[4, 4]"), 16),
    (
        "as TQCompressor (4, 2)",
        "low-rank",
        ("structure=permuted_kronecker", "spec={right_shape: [4, 2], rows: false}", "folding=[mlp]"),
        8,
    ),
    ("balanced Kronecker: 2 cores", "ttm", ("spec.num_cores=2",), None),
    ("balanced Kronecker, on inputs", "ttm", ("spec.num_cores=2", "weighting.metric=input"), None),
    ("tensor train, 3 cores", "ttm", (), None),
    ("Monarch 4 × 4", "monarch", ("targets=mlp",), None),
    ("Monarch 4 × 4, on inputs", "monarch", ("targets=mlp", "weighting.metric=input"), None),
    ("BLAST 4 × 4", "blast", ("targets=mlp", "weighting.metric=none"), None),
    ("BLAST 4 × 4, on inputs", "blast", ("targets=mlp",), None),
    ("Kronecker + low rank, on inputs", "kronecker-plus-low-rank", (), None),
    ("columns + low rank, on inputs", "svd-llm", ("structure=structured_sum", COLUMNS), None),
    ("auto of low rank, Kronecker", "auto", ("targets=mlp", "candidates=[low_rank, kronecker]"), None),
    ("auto of all structures", "auto", ("targets=mlp", f"candidates=[{', '.join(ALL)}]"), None),
    ("auto (low rank, Kronecker, fewer units)", "auto", ("targets=mlp",), None),
    ("auto of all", "auto", ("targets=mlp", f"candidates=[{', '.join(AUTO_AND_ALL)}]"), None),
)
# For an embedding: what a method fixes of its sizes; the first says how large the others may be.
EMBEDDINGS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("TensorGPT, 8 cores of rank 1", "tensor_gpt", {"shape": (2,) * 8, "rank": 1}),
    ("low rank", "low_rank", {}),
    ("Kronecker (1, 12)", "kronecker", {"right_shape": (1, 12), "num_terms": 1}),
)
# Recipes of one size, which is one of KEPT.
FIXED: tuple[tuple[float, str, str, tuple[str, ...]], ...] = (
    (0.5, "Krony-PT, Van Loan", "krony-96m", ()),
    (0.5, "Krony-PT, prune", "krony-96m", ("fit.start=prune",)),
    (0.25, "Krony-PT, Van Loan", "krony-81m", ()),
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def all_rows() -> list[Row]:
    """The dense model, and at each size of KEPT every method."""
    rows: list[Row] = [{"name": "dense", "rival": "dense"}]
    for kept in KEPT:
        fixed = [(method, recipe, list(changes)) for at, method, recipe, changes in FIXED if at == kept]
        free = [(method, recipe, [*changes, *_size(kept, entries)]) for method, recipe, changes, entries in METHODS]
        rows += [
            {"name": f"{kept:g}: {method}", "kept": kept, "method": method, "recipe": recipe, "set": changes}
            for method, recipe, changes in (*free[:3], *fixed, *free[3:])
        ]
    return rows


def _size(kept: float, entries: int | None) -> list[str]:
    """The budget; or as many terms as have that size but for the few numbers of their B, which are above it."""
    if entries is None:
        return [f"budget.kept_of_targets={kept:g}"]
    return [f"spec.num_terms={round(kept * entries)}", f"budget.kept_of_targets={1.01 * kept:g}"]


# ---- one row ----


def measure(row: Row, job: Job) -> Row:
    """The row with all that is measured of it, or with the reason why there is no such model.

    Raises:
        WorkError: a fit or the healing failed.
    """
    dense, student = kp.load_model("pocket"), kp.load_model("pocket")
    if "rival" in row:
        result = {**row, "num_params": sum(parameter.numel() for parameter in dense.model.parameters())}
    else:
        recipe = kp.load_recipe(row["recipe"], row["set"], "pocket")
        torch.manual_seed(recipe.seed)
        try:
            data, calibration_seconds = calibrated(recipe, student, job.work / "moments")
            started = time.perf_counter()
            plan = kp.make_plan(student.model, recipe, data.moments)
            planned = time.perf_counter()
            reports = compress_loaded_(student, plan, data)
        except kp.RequestError as error:
            return {**row, "error": str(error)}
        seconds = {
            "calibration_seconds": calibration_seconds,
            "planning_seconds": planned - started,
            "fitting_seconds": time.perf_counter() - planned,
        }
        _round_to_(student.model, student.dtype)
        result = {**row, **seconds, **sizes_and_energies(plan, reports), **differences(dense, student, plan)}
        result["tokens_at_once"] = {
            str(tokens): seconds_of_layers(dense.model, student.model, _targets(plan), tokens) for tokens in ROUNDS
        }
        if plan.allocation is not None:
            result["picked"] = picked(plan)
    texts = _texts(job)

    def measured(model: nn.Module) -> dict[str, Any]:
        return {name: kp.evaluate(model, dense.tokenizer, text).to_json() for name, text in texts.items()}

    result["before"] = measured(student.model)
    return {**result, **healed(row, job, dense, student.model, measured)} if job.steps else result


def _targets(plan: Plan) -> list[str]:
    return [*plan.layers, *plan.left_dense]


def sizes_and_energies(plan: Plan, reports: dict[str, LayerReport]) -> Row:
    """Sizes, FLOPs of the targets over those of the dense ones, and means over the matrices of energy and chance.

    What is left dense captures all of itself.
    """
    layers = list(plan.layers.values())
    left = len(plan.left_dense)
    outside = plan.flops_per_token_dense - 2 * plan.num_params_targets_dense
    return {
        "num_params": plan.num_params,
        "bytes": plan.bytes,
        "kept_of_targets": plan.kept_of_targets,
        "flops_over_dense": (plan.flops_per_token - outside) / (2 * plan.num_params_targets_dense),
        "captured_energy": fmean([report.captured_energy for report in reports.values()] + [1.0] * left),
        "chance": fmean([chance_of(layer) for layer in layers] + [1.0] * left),
    }


def chance_of(layer: LayerPlan) -> float:
    """The fraction of ‖W‖² that the same fit in Frobenius norm captures of a Gaussian matrix of that shape.

    Of a matrix from which rows or columns are taken away it is the fraction that stays.
    """
    if layer.structure not in STRUCTURES:
        return layer.num_params / layer.num_params_dense
    return _captured_of_gaussian(layer.structure, layer.out_features, layer.in_features, layer.spec, layer.options)


@cache
def _captured_of_gaussian(structure: str, out_features: int, in_features: int, spec: Any, options: Any) -> float:
    generator = torch.Generator().manual_seed(SEED)
    weight = torch.randn(out_features, in_features, generator=generator, dtype=torch.float64)
    return _captured(weight, structure, spec, options)


def _captured(weight: Tensor, structure: str, spec: Any, options: Any = None) -> float:
    matrix_class = STRUCTURES[structure]
    error = weight - matrix_class.expand(matrix_class.fit(weight, spec, None, options))
    return 1 - (error.square().sum() / weight.square().sum()).item()


def energies_of_embedding(table: Tensor) -> list[Row]:
    """What the structures of EMBEDDINGS capture of an embedding's table (num_embeddings, embedding_dim), and chance."""
    weight, found, budget = table.detach().to(torch.float64), [], None
    for method, structure, fixed in EMBEDDINGS:
        [spec] = STRUCTURES[structure].candidate_specs(*weight.shape, budget, **fixed)
        num_params = STRUCTURES[structure].count_params(*weight.shape, spec)
        budget = budget or int(1.01 * num_params)
        energies = {
            "captured_energy": _captured(weight, structure, spec),
            "chance": _captured_of_gaussian(structure, *weight.shape, spec, None),
        }
        found.append({"method": method, "kept": num_params / weight.numel(), **energies})
    return found


@torch.inference_mode()
def differences(dense: LoadedModel, student: LoadedModel, plan: Plan) -> Row:
    """E‖y − ŷ‖² / E‖y‖² on what layers read in the dense model on the validation books: means over matrices and MLPs.

    No matrix is compared alone where units were taken away or put into another order.
    """
    text = kp.load_running_text("bundled", "validation").text[:VALIDATION_CHARACTERS]
    window = dense.model.config.n_positions
    tokens = dense.tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    ids = tokens[: COMPARED_WINDOWS * window].reshape(-1, window)
    blocks = list(dict.fromkeys(name.rpartition(".")[0] for name in _targets(plan)))
    inputs = read_by(dense.model, [*_targets(plan), *blocks], ids)

    def error(name: str) -> float:
        y, other = (each.model.get_submodule(name)(inputs[name]) for each in (dense, student))
        return ((y - other).square().sum() / y.square().sum()).item()

    is_other = plan.folding or any(layer.structure not in STRUCTURES for layer in plan.layers.values())
    return {
        "output_error": None if is_other else fmean(map(error, _targets(plan))),
        "mlp_error": fmean(map(error, blocks)),
    }


def read_by(model: nn.Module, names: Sequence[str], ids: Tensor) -> dict[str, Tensor]:
    """What each of these modules reads when the model reads token ids (sequences, tokens)."""
    found: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments, name=name: found.__setitem__(name, arguments[0])
        )
        for name in names
    ]
    try:
        model(input_ids=ids)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.inference_mode()
def seconds_of_layers(dense: nn.Module, student: nn.Module, names: Sequence[str], tokens: int) -> dict[str, float]:
    """Medians of the seconds that all these layers take one after the other, and of the ratio within a round.

    The two models take turns; the first rounds are not counted.
    """
    calls = {}
    for key, model in (("dense", dense), ("student", student)):
        layers = [model.get_submodule(name) for name in names]
        generator = torch.Generator().manual_seed(SEED)
        calls[key] = [(each, torch.randn(tokens, weight_shape(each)[1], generator=generator)) for each in layers]
    seconds: dict[str, list[float]] = {key: [] for key in calls}
    for _ in range(WARM_UP_ROUNDS + ROUNDS[tokens]):
        for key, layers_and_inputs in calls.items():
            started = time.perf_counter()
            for layer, x in layers_and_inputs:
                layer(x)
            seconds[key].append(time.perf_counter() - started)
    counted = {key: each[WARM_UP_ROUNDS:] for key, each in seconds.items()}
    ratios = [student / dense for dense, student in zip(counted["dense"], counted["student"], strict=True)]
    return {
        **{f"{key}_seconds": median(each) for key, each in counted.items()},
        "over_dense": median(ratios),
    }


def picked(plan: Plan) -> Row:
    """What a measured allocation chose for every matrix, and the least rise of each other structure at that size.

    Of an MLP with fewer units that is a choice for all of its matrices, told by the last; another structure is one for
    each of them.
    """
    assert plan.allocation is not None
    tables = plan.allocation.candidates
    reduced = [name for name, layer in plan.layers.items() if layer.structure == REDUCED]
    matrices: dict[str, Row] = {}
    for name in _targets(plan):
        if name not in plan.layers:
            [row] = [row for row in tables[name] if row.spec is None]
            matrices[name] = {"structure": row.structure, "spec": None, "num_params": row.num_params}
            matrices[name] |= {"predicted_rise": 0.0, "others": {}}
            continue
        layer = plan.layers[name]
        mlp = name.rpartition(".")[0]
        together = [each for each in reduced if each.startswith(f"{mlp}.")] if name in reduced else [name]
        size = sum(plan.layers[each].num_params for each in together)
        matrices[name] = {
            "structure": layer.structure,
            "spec": layer.spec.model_dump(mode="json"),
            "num_params": layer.num_params,
            "predicted_rise": layer.predicted_rise,
            "others": {} if layer.predicted_rise is None else best_others(tables, together, layer.structure, size),
        }
    report = plan.allocation
    return {"predicted_rise": report.predicted_rise, "gap": report.gap, "matrices": matrices}


def best_others(tables: dict[str, list[CandidateReport]], names: list[str], chosen: str, size: int) -> Row:
    """Of each other structure the least rise of these matrices, at most of that size together, or dense in part."""
    structures = dict.fromkeys(row.structure for name in names for row in tables[name] if row.spec is not None)
    found = {}
    for structure in structures:
        of_it = {name: [row for row in tables[name] if row.structure in (structure, DENSE)] for name in names}
        sizes = {name: [row.num_params for row in rows] for name, rows in of_it.items()}
        if structure != chosen and least_params(sizes, {}) <= size:
            rises = {name: [row.predicted_rise for row in rows] for name, rows in of_it.items()}
            best = allocate(sizes, rises, size)
            taken = [of_it[name][place] for name, place in best.chosen.items()]
            is_exact = all(row.is_exact for row in taken)
            found[structure] = {"predicted_rise": best.error, "is_exact": is_exact}
    return found


def healed(row: Row, job: Job, dense: LoadedModel, start: nn.Module, measured: Any) -> Row:
    """The rate that does best in a tenth of the steps, and the metrics after all of them."""
    healing = _healing(row, job)
    tokens = kp.load_train_tokens(dense.tokenizer, healing.data, 10**9)
    validation = kp.load_running_text("bundled", "validation").text[: job.characters][:VALIDATION_CHARACTERS]

    def trained(rate: float, steps: int) -> nn.Module:
        schedule = healing.model_copy(update={"learning_rate": rate, "max_steps": steps, "warmup_steps": steps // 10})
        model = copy.deepcopy(start)
        with by_dense_weights(model):
            kp.heal_(model, dense.model, tokens, schedule)
        _round_to_(model, dense.dtype)
        return model

    trial_steps = -(-job.steps // 10)
    trials = {
        rate: kp.evaluate(trained(rate, trial_steps), dense.tokenizer, validation).nll_mean_nats for rate in job.rates
    }
    best = min(trials, key=lambda rate: trials[rate])
    started = time.perf_counter()
    model = trained(best, job.steps)
    return {
        "validation_nats_by_rate": {f"{rate:g}": nats for rate, nats in trials.items()},
        "rate": best,
        "tokens": job.steps * healing.tokens_per_step,
        "healing_seconds": time.perf_counter() - started,
        "after": measured(model),
    }


@contextmanager
def by_dense_weights(model: nn.Module) -> Iterator[None]:
    """Layers that need more multiply-adds than dense ones train through W, which is made of their factors in each pass.

    Values and gradients are the same. By its factors a tensor train of three cores takes ten times as long to heal.
    """
    slow = [
        layer
        for layer in structured_layers(model).values()
        if layer.structure.count_flops(layer.out_features, layer.in_features, layer.spec)
        > 2 * layer.out_features * layer.in_features
    ]
    for layer in slow:
        layer.forward = partial(_through_w, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in slow:
            del layer.forward


def _through_w(layer: StructuredLinear, x: Tensor) -> Tensor:
    return nn.functional.linear(x, layer.structure.dense(layer.factors), layer.bias)


# ---- all rows ----


@app.command()
def run(
    work: Work,
    out: Annotated[Path, typer.Option(help="JSON file to write")] = OUT,
    text: Text = None,
    only: Annotated[str, typer.Option(help="measure the rows whose names contain this, and the dense model")] = "",
    characters: Characters = 50_000,
    steps: Annotated[int, typer.Option(help="steps of healing of 2,048 tokens each; 0 heals nothing", min=0)] = STEPS,
) -> None:
    """Measure the rows that are asked for and not done yet, and write all that are done.

    Raises:
        RequestError: the folder keeps rows of other settings.
        WorkError: rows failed; the others are kept.
    """
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    job = Job("run", work, "pocket", "test", text, (), characters, steps, True, RATES, Path(__file__).name)
    note = work / "settings.json"
    if note.is_file() and json.loads(note.read_text(encoding="utf-8")) != job.settings:
        there = " ".join(note.read_text(encoding="utf-8").split())
        raise kp.RequestError(f"{str(work)!r} keeps rows of other settings, {there}: take another folder")
    _write(note, job.settings)
    rows, failed = all_rows(), {}
    for row in rows:
        path = _file_of(row, job)
        if path.is_file() or not (only in row["name"] or row["name"] == "dense"):
            continue
        if "recipe" in row and row["recipe"] not in recipe_names():
            print(f"skipped {row['name']}: there is no recipe {row['recipe']!r}", file=sys.stderr, flush=True)
            continue
        started = time.perf_counter()
        try:
            _write(path, measure(row, job))
        except Exception as error:  # the other rows go on, and this one is told at the end
            failed[row["name"]] = f"{type(error).__name__}: {error}"
        told = failed.get(row["name"], "done")
        print(f"{row['name']}: {told}, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    done = [row for row in rows if _file_of(row, job).is_file()]
    results = {
        "command": job.command_line,
        "settings": job.settings,
        "versions": {name: version(name) for name in ("kronpress", "torch", "transformers")},
        "rows": [json.loads(_file_of(row, job).read_text(encoding="utf-8")) for row in done],
        "embedding": energies_of_embedding(kp.load_model("pocket").model.get_input_embeddings().weight),
        "not_measured": [row["name"] for row in rows if row not in done],
    }
    _write(out, results)
    if failed:
        causes = "; ".join(f"{name} ({cause})" for name, cause in failed.items())
        raise kp.WorkError(f"{len(failed)} rows failed, the others are kept: {causes}")


@app.command()
def render(
    results: Annotated[Path, typer.Argument(help="what `run` has written", dir_okay=False)] = OUT,
) -> None:
    """Print the page as Markdown."""
    found = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else None
    print(page(found), end="")


# ---- the page ----

INTRODUCTION = """# All structures and methods

What every structure and method keeps and loses of `pocket` at half and at a quarter of the parameters of its MLPs, all
fitted and healed on the same text, the bundled `heal` books. The test books and WikiText-2 are only evaluated on.
"""
LEGEND = """* *energy*: of ‖W‖², captured by the matrices; *chance*: what the same fit captures of Gaussian ones.
* *outputs*, *MLPs*: the mean squared error of what single matrices, and whole MLPs, answer to the dense model's
  inputs on unseen text, relative to the answer; – where units were taken away or renumbered.
* *FLOPs*: of the factored matrices for one token, over those of the dense ones.
* *1*, *512*: time of all twelve matrices with so many tokens at once over that of the dense ones; medians of
  alternating rounds of one thread in float32. They are small, 768×192: with one token what counts is how many
  operations there are.
* *perplexity*: without training → after healing by distillation.
"""


def page(results: dict[str, Any] | None) -> str:
    """The page of the results, or how to get them."""
    if results is None:
        command = "python benchmarks/all_structures.py run --work DIR --text wiki.test.raw"
        return f"{INTRODUCTION}\nNot measured yet: `{command}`.\n"
    rows = results["rows"]
    versions = ", ".join(f"{package} {number}" for package, number in results["versions"].items())
    lines = [INTRODUCTION, f"From `benchmarks/results/all_structures.json` (`{results['command']}`; {versions}).", ""]
    lines += list(healing_note(results))
    lines.append(LEGEND)
    for kept in KEPT:
        lines += table(rows, kept)
    for row in rows:
        if "error" in row:
            lines += [f"{row['name']} cannot be had: {row['error']}.", ""]
    if results["not_measured"]:
        lines += [f"Not measured: {'; '.join(results['not_measured'])}.", ""]
    lines += [*auto_section(rows), *embedding_section(results["embedding"])]
    return "\n".join(lines)


def healing_note(results: dict[str, Any]) -> Iterator[str]:
    healed = [row for row in results["rows"] if "after" in row]
    if healed:
        rates = ", ".join(f"{rate:g}" for rate in results["settings"]["rates"])
        yield (
            f"Healed on {healed[0]['tokens']:,} tokens, the same for all, each with the best of {rates} (†: the "
            "smallest or the largest was best). The dense model cannot be distilled into itself: it is trained on "
            "the text."
        )
        yield ""


def table(rows: list[Row], kept: float) -> Iterator[str]:
    """The dense model and all rows of one size."""
    texts = list(rows[0]["before"])
    yield f"## {kept:g} of the MLPs"
    yield ""
    perplexities = " | ".join(f"perplexity, {text}" for text in texts)
    yield f"| method | kept | energy | chance | outputs | MLPs | FLOPs | 1 | 512 | {perplexities} | rate |"
    yield "|---|---|---|---|---|---|---|---|---|" + "---|" * (len(texts) + 1)
    rates = sorted({float(rate) for row in rows for rate in row.get("validation_nats_by_rate", [])})
    for row in rows:
        if "before" not in row or row.get("kept", kept) != kept:
            continue
        cells = [row.get("method", "dense"), *(_sizes(row) if "recipe" in row else ["1", *["–"] * 7])]
        for text in texts:
            after = f" → {row['after'][text]['perplexity']:,.2f}" if "after" in row else ""
            cells.append(f"{row['before'][text]['perplexity']:,.2f}{after}")
        edge = " †" if row.get("rate") in (rates[:1] + rates[-1:]) else ""
        cells.append(f"{row['rate']:g}{edge}" if "rate" in row else "–")
        yield f"| {' | '.join(cells)} |"
    yield ""


def _sizes(row: Row) -> list[str]:
    output = "–" if row["output_error"] is None else f"{row['output_error']:.4f}"
    return [
        f"{row['kept_of_targets']:.3f}",
        f"{row['captured_energy']:.3f}",
        f"{row['chance']:.3f}",
        output,
        f"{row['mlp_error']:.4f}",
        f"{row['flops_over_dense']:.2f}",
        *(f"{row['tokens_at_once'][str(tokens)]['over_dense']:.2f}" for tokens in ROUNDS),
    ]


def auto_section(rows: list[Row]) -> Iterator[str]:
    """What `auto` picks with few and with all candidates, where, and what else it could have had there."""
    autos = [row for row in rows if "picked" in row]
    if not autos:
        return
    yield "## What `auto` picks"
    yield ""
    yield (
        "`auto` takes structures in one after the other and keeps what it has until a better choice is found, by fits "
        "on both sides: the rise that it predicts is never higher with more candidates. What a model really loses is "
        "measured."
    )
    yield ""
    yield "| size | candidates | picked | predicted rise, nats | gap | rise, nats: one-shot → healed | seconds |"
    yield "|---|---|---|---|---|---|---|"
    dense = next(row for row in rows if row["name"] == "dense")
    [text, *_] = dense["before"]
    for row in autos:
        found = row["picked"]
        counts: dict[str, int] = {}
        for each in found["matrices"].values():
            counts[each["structure"]] = counts.get(each["structure"], 0) + 1
        rises = [
            f"{row[when][text]['nll_mean_nats'] - dense['before'][text]['nll_mean_nats']:.4f}"
            for when in ("before", "after")
            if when in row
        ]
        seconds = " + ".join(f"{row[f'{part}_seconds']:.0f}" for part in ("calibration", "planning", "fitting"))
        names = ", ".join(f"{count} {structure}" for structure, count in counts.items())
        yield (
            f"| {row['kept']:g} | {row['method'].removeprefix('auto of ')} | {names} | {found['predicted_rise']:.5f} "
            f"| {found['gap']:.4f} | {' → '.join(rises)} | {seconds} |"
        )
    yield ""
    yield f"Rises are on the {text}; seconds are those of calibrating, planning and fitting, by one thread."
    yield ""
    for row in autos:
        if row["method"] == METHODS[-1][0]:
            yield from picked_table(row)


def picked_table(row: Row) -> Iterator[str]:
    yield (
        f"{row['kept']:g} of the MLPs, {row['method']}. *Best other*: the least that another structure of at most that "
        "size is predicted to cost there (≈: by an estimate that was not worth a fit)."
    )
    yield ""
    yield "| matrix | picked | parameters kept | predicted rise | best other |"
    yield "|---|---|---|---|---|"
    for name, each in row["picked"]["matrices"].items():
        others = sorted(each["others"].items(), key=lambda item: item[1]["predicted_rise"])
        best = "–"
        if others:
            structure, found = others[0]
            best = f"{structure} {'' if found['is_exact'] else '≈'}{found['predicted_rise']:.5f}"
        size = prod(weight_shape(_dense_pocket().get_submodule(name)))
        rise = "with the next" if each["predicted_rise"] is None else f"{each['predicted_rise']:.5f}"
        yield (
            f"| {name.removeprefix('transformer.')} | {_written(each['structure'], each['spec'])} "
            f"| {each['num_params'] / size:.3f} | {rise} | {best} |"
        )
    yield ""


def embedding_section(rows: list[Row]) -> Iterator[str]:
    yield "## The embedding"
    yield ""
    yield "Energy captured of the table of `pocket`, 4096×192, by what is for embeddings alone and at its size."
    yield ""
    yield "| method | kept | energy | chance |"
    yield "|---|---|---|---|"
    for row in rows:
        yield f"| {row['method']} | {row['kept']:.3f} | {row['captured_energy']:.3f} | {row['chance']:.3f} |"
    yield ""


@cache
def _dense_pocket() -> nn.Module:
    return kp.load_model("pocket").model


def _written(structure: str, spec: dict[str, Any] | None) -> str:
    """A structure and its sizes in a few letters."""
    if spec is None:
        return structure
    if structure == REDUCED:
        return f"fewer units: {spec['shape'][0]}×{spec['shape'][1]}"
    if structure == "structured_sum":
        return " + ".join(_written(part["structure"], part["spec"]) for part in spec["parts"])
    sizes = {
        name: "·".join(str(x) for x in value) if isinstance(value, list) else value for name, value in spec.items()
    }
    return f"{structure} ({', '.join(f'{name} {value}' for name, value in sizes.items())})"


if __name__ == "__main__":
    try:
        app()
    except (kp.RequestError, kp.WorkError) as error:
        print(f"all_structures: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, kp.RequestError) else 1)
