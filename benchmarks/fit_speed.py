"""How long calibrating, planning and fitting take at a real geometry, and how much memory they need: random weights.

    python benchmarks/fit_speed.py --out benchmarks/results/fit_speed.json
    OMP_NUM_THREADS=1 python benchmarks/fit_speed.py --what shapes --out benchmarks/results/fit_shapes.json
    python benchmarks/fit_speed.py --what stack --out benchmarks/results/fit_stack.json

The first measures recipes from end to end.

`shapes` measures the fits of single matrices against other decompositions of the same ones, in turns, and what share
of the energy that can be captured each of them captures; and the fits of all of GPT-2 small's MLPs. `stack` writes
blocks of a large model to disk, streams them through the fit, and sets the peak of memory beside the largest matrix.

Each recipe runs in a process of its own, so that its peak of resident memory is its own; what the process holds with
the model alone is given beside it. Times depend on the machine, and not on what the weights are, apart from how many
candidates `auto` looks at twice. Seconds are those of the wall and those of the processor, summed over threads: on a
busy machine only the latter mean anything.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

import kronpress as kp
from kronpress.calibration import calibrate
from kronpress.checkpoint import load_config
from kronpress.matrices.kronecker import KroneckerSpec
from kronpress.matrices.kronecker_in_metric import rearranged, van_loan
from kronpress.matrices.svd import balanced_svd, gram
from kronpress.planning import meta_model
from kronpress.weight_files import ShardFiles, TensorType, shards

RECIPES = ("krony-67m", "krony-80m-2", "krony-81m", "krony-92m-4", "krony-96m", "low-rank", "svd-llm", "auto")

STEPS = ("calibration", "plan", "fit")
# B and the terms of the sums for GPT-2 small's 3072×768: tiny ones, then balanced ones.
TINY = {(1, 2): 1, (2, 1): 1, (2, 2): 1, (4, 1): 1, (4, 2): 1, (3, 3): 4}
BALANCED = {(48, 24): 1, (24, 48): 8, (64, 32): 2}
STACK_RECIPE = {
    "name": "stack",
    "targets": "blocks",
    "structure": "kronecker",
    "spec": {"right_shape": [1, 2], "num_terms": 1},
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def peak_bytes() -> int:
    """The most resident memory that this process has had, without what its parent had when it started it."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) * 1024


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


def in_turns(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each way, of the wall and of the processor: the median and the least of so many rounds."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(rounds + 1):  # the first warms up
        for name, way in ways.items():
            wall, processor = time.perf_counter(), time.process_time()
            way()
            seconds = time.perf_counter() - wall, time.process_time() - processor
            if turn:
                taken[name].append(seconds)
    return {
        name: {
            "seconds": statistics.median(wall for wall, _ in each),
            "least_seconds": min(wall for wall, _ in each),
            "processor_seconds": statistics.median(processor for _, processor in each),
        }
        for name, each in taken.items()
    }


def low_rank_by_iteration(blocks: Tensor, terms: int) -> Tensor:
    u, s, v = torch.svd_lowrank(blocks, q=terms, niter=10)
    return (u * s) @ v.mT


def by_full_svd(blocks: Tensor, terms: int) -> Tensor:
    u, s, vh = torch.linalg.svd(blocks, full_matrices=False)
    return (u[:, :terms] * s[:terms]) @ vh[:terms]


def by_gram(blocks: Tensor, terms: int) -> Tensor:
    vectors = torch.linalg.eigh(gram(blocks.double()))[1][:, -terms:]
    return blocks.double() @ vectors @ vectors.mT


def measure_shape(right_shape: tuple[int, int], terms: int, rounds: int) -> dict[str, Any]:
    """The fit of one 3072×768 matrix, stored as it is and as GPT-2 stores it, against three ways of others.

    They are given the rearranged matrix. Energies are fractions of the optimum that the singular values give.
    """
    torch.manual_seed(0)
    weight = torch.randn(3072, 768)
    transposed = weight.mT.contiguous().mT
    left_shape = weight.shape[0] // right_shape[0], weight.shape[1] // right_shape[1]
    blocks = rearranged(weight, left_shape, right_shape).contiguous()
    spec = KroneckerSpec(left_shape=left_shape, right_shape=right_shape, num_terms=terms)
    ways: dict[str, Callable[[], Any]] = {
        "fit": partial(kp.matrices.Kronecker.fit, weight, spec),
        "fit_transposed": partial(kp.matrices.Kronecker.fit, transposed, spec),
        "svd_lowrank": partial(low_rank_by_iteration, blocks, terms),
        "full_svd": partial(by_full_svd, blocks, terms),
        "gram_and_eigh": partial(by_gram, blocks, terms),
    }
    if right_shape in BALANCED:
        ways["lanczos_alone"] = partial(balanced_svd, blocks.double(), terms)
    a, b = van_loan(weight, left_shape, right_shape, terms)
    reached = {"fit": torch.einsum("kpa,kqb->paqb", a, b).reshape(blocks.shape)}
    reached |= {name: way() for name, way in ways.items() if name in ("svd_lowrank", "full_svd")}
    optimum = torch.linalg.svdvals(blocks.double())[:terms].square().sum().item()
    energy = blocks.double().square().sum().item()
    captured = {name: energy - (blocks.double() - each).square().sum().item() for name, each in reached.items()}
    timings = in_turns(ways, rounds)
    return {
        "right_shape": right_shape,
        "num_terms": terms,
        "timings": timings,
        "times_faster_than": {
            name: timings[name]["seconds"] / timings["fit"]["seconds"] for name in timings if not name.startswith("fit")
        },
        "captured_of_optimum": {name: each / optimum for name, each in captured.items()},
    }


def measure_mlps(name: str, rounds: int) -> dict[str, Any]:
    """Seconds of all fits of a recipe for GPT-2 small, which replaces the 24 matrices of its MLPs."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPT2Config())
    plan = kp.make_plan(model, kp.load_recipe(name))
    weights = {each: model.get_submodule(each).weight.detach().mT for each in plan.layers}

    def fit_all() -> None:
        for each, layer in plan.layers.items():
            layer.matrix_class.fit(weights[each], layer.spec, None, layer.options)

    row = {"recipe": name, "matrices": len(weights), **in_turns({"fit": fit_all}, rounds)["fit"]}
    with timed(row, "compress"):
        kp.compress_(model, plan)
    return row


def write_stack(folder: Path, blocks: int) -> None:
    """A checkpoint of llama-2-7b's geometry with few blocks and random weights in bfloat16, a tensor at a time."""
    config = load_config("llama-2-7b")
    config.num_hidden_layers = blocks
    config.dtype = torch.bfloat16
    model = meta_model(config).to(torch.bfloat16)
    types = {key: TensorType(tuple(each.shape), each.dtype) for key, each in model.state_dict().items()}
    folder.mkdir()
    config.save_pretrained(folder)
    files = ShardFiles(folder, shards(types, 10**9))
    for key, (shape, dtype) in types.items():
        files.write({key: 0.02 * torch.randn(shape, dtype=dtype)})
    files.finish()


def measure_stack(source: Path, out: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """Peak of memory and seconds of streaming a checkpoint through the fit."""
    plan = kp.make_plan(load_config(str(source)), kp.load_recipe(recipe))
    row: dict[str, Any] = {"peak_before": peak_bytes()}
    with timed(row, "streaming"):
        kp.compress_streaming(source, plan, out, device="cpu")
    entries = max(layer.num_params_dense for layer in plan.layers.values())
    row |= {
        "layers": len(plan.layers),
        "bytes_on_disk": sum(path.stat().st_size for path in source.glob("*.safetensors")),
        "bytes_written": sum(path.stat().st_size for path in out.glob("*.safetensors")),
        "largest_planned_matrix_bytes": {"stored": 2 * entries, "float32": 4 * entries, "float64": 8 * entries},
    }
    row["peak_over_float32_matrix"] = (row["streaming_peak"] - row["peak_before"]) / (4 * entries)
    return row


def in_a_process(work: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *given).result()


class What(StrEnum):
    recipes = "recipes"
    shapes = "shapes"
    stack = "stack"


def rows_of_shapes(rounds: int) -> Iterator[dict[str, Any]]:
    for right_shape, terms in {**TINY, **BALANCED}.items():
        yield measure_shape(right_shape, terms, rounds)
    for name in ("krony-96m", "krony-81m", "krony-80m-2", "krony-92m-4", "krony-67m"):
        yield measure_mlps(name, rounds)


def rows_of_stack(blocks: int) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        in_a_process(write_stack, Path(folder) / "dense", blocks)
        yield {
            "blocks": blocks,
            **in_a_process(measure_stack, Path(folder) / "dense", Path(folder) / "out", STACK_RECIPE),
        }


def surroundings() -> dict[str, Any]:
    """What times depend on."""
    return {
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("kronpress", "torch", "transformers")},
    }


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="JSON file to write")],
    config: Annotated[Path | None, typer.Option(help="folder with a config.json; GPT-2 small if unset")] = None,
    recipes: Annotated[list[str], typer.Option(help="recipes to measure")] = list(RECIPES),  # noqa: B006
    changes: Annotated[list[str], typer.Option("--set", help="changes to every recipe")] = [],  # noqa: B006
    windows: Annotated[int, typer.Option(help="calibration sequences")] = 32,
    length: Annotated[int, typer.Option(help="tokens in each")] = 512,
    what: Annotated[What, typer.Option(help="what to measure")] = What.recipes,
    rounds: Annotated[int, typer.Option(help="of `shapes`: how often each way is timed")] = 7,
    blocks: Annotated[int, typer.Option(help="of `stack`: at 405 MB each, beside 524 MB of embedding and head")] = 4,
) -> None:
    """Measure recipes one after the other, or shapes, or the streaming of a stack."""
    of_recipes = (in_a_process(measure, name, config, changes, windows, length) for name in recipes)
    made = {What.recipes: of_recipes, What.shapes: rows_of_shapes(rounds), What.stack: rows_of_stack(blocks)}
    rows = []
    for row in made[what]:
        rows.append(row)
        print(json.dumps(row), flush=True)
    if what is not What.recipes:
        out.write_text(json.dumps({"what": what, **surroundings(), "rows": rows}, indent=1) + "\n")
        return
    results = {
        "geometry": "gpt2" if config is None else config.name,
        "windows": windows,
        "length": length,
        "set": changes,
        "calibration_tokens": windows * length,
        **surroundings(),
        "rows": rows,
    }
    out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    app()
