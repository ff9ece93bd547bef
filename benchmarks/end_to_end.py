"""GPT-2 small's geometry from prompt to last token, with random weights: dense, compressed, and the plain ways.

    python benchmarks/end_to_end.py run
    python benchmarks/end_to_end.py render

`run` measures every row with `kronpress.benchmark.benchmark`, all models of a row in turns in one process, and writes
benchmarks/results/end_to_end.json after each; started again it goes on with the rows that are missing. `render` makes
docs/results/speed.md of it. A quarter of an hour on two cores that do nothing else.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import GPT2Config

from kronpress.benchmark import Benchmark, ModelBenchmark, Spread, benchmark
from kronpress.recipe import load_recipe

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "end_to_end.json"
PAGE = ROOT / "docs" / "results" / "speed.md"
PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 512, 16, 4
DTYPES = ("float32", "bfloat16")

_BLOCKS_QUARTER = {"targets": "blocks", "spec": {"right_shape": [2, 2], "num_terms": 1}}
# What the model becomes. A right factor is given for a matrix at least as tall as wide; a wide one takes its transpose.
VARIANTS: dict[str, dict[str, Any]] = {
    "blocks 2×": {"structure": "kronecker", "targets": "blocks", "spec": {"right_shape": [2, 1], "num_terms": 1}},
    "blocks 2×, low rank": {"structure": "low_rank", "targets": "blocks", "budget": {"kept_of_targets": 0.5}},
    "blocks 4×": {"structure": "kronecker", **_BLOCKS_QUARTER},
    "blocks 4×, tied head 2×": {
        "structure": "kronecker",
        "stages": [
            {"share": 0, "targets": "embedding", "spec": {"right_shape": [1, 2], "num_terms": 1}},
            {"share": 1, **_BLOCKS_QUARTER},
        ],
    },
}
DENSE_RIVALS = ("int8", "native-dense")
PLAIN_WAYS = (*DENSE_RIVALS, "krony-pt", "einsum")
# Variant, threads and rivals. The plain ways are slow, and shown where they say most.
ROWS: list[tuple[str, int, tuple[str, ...]]] = [
    ("blocks 2×", 1, PLAIN_WAYS),
    ("blocks 4×", 1, PLAIN_WAYS),
    ("blocks 4×, tied head 2×", 1, DENSE_RIVALS),
    ("blocks 2×, low rank", 1, DENSE_RIVALS),
    ("blocks 2×", 2, DENSE_RIVALS),
    ("blocks 4×", 2, DENSE_RIVALS),
    ("blocks 4×, tied head 2×", 2, DENSE_RIVALS),
]
# Decode in float32 over the dense model on one thread: what is to be reached.
GOALS = {"blocks 2×": 1.4, "blocks 4×": 1.8, "blocks 4×, tied head 2×": 2.4}

NAMES = {
    "model": "compressed",
    "against": "dense",
    "int8": "dense, 8-bit",
    "native-dense": "dense, our own routine for one token",
    "krony-pt": "compressed, `torch.kron` in each forward",
    "einsum": "compressed, one `einsum` a layer",
}

Results = dict[str, Any]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def measure(variant: str, threads: int, rivals: tuple[str, ...], settings: dict[str, Any]) -> Benchmark:
    """One row; memory, which does not depend on threads, only with one."""
    with tempfile.TemporaryDirectory() as folder:
        geometry = "gpt2"
        if settings["layers"] != GPT2Config().n_layer:  # for a trial
            GPT2Config(n_layer=settings["layers"]).save_pretrained(folder)
            geometry = folder
        measured = benchmark(
            geometry,
            random_weights=True,
            recipe=load_recipe({"name": variant, **VARIANTS[variant]}),
            rivals=rivals,
            dtypes=DTYPES,
            prompt_tokens=[settings["prompt_tokens"]],
            new_tokens=settings["new_tokens"],
            rounds=settings["rounds"],
            compiled=settings["compiled"],
            threads=threads,
            memory=threads == 1,
            progress=lambda text: print(f"  {text}", flush=True),
        )
    return measured


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="JSON file to write, and to go on with")] = RESULTS,
    layers: Annotated[int, typer.Option(help="transformer blocks; fewer for a trial")] = GPT2Config().n_layer,
    prompt_tokens: Annotated[int, typer.Option(help="tokens of the prefill")] = PROMPT_TOKENS,
    new_tokens: Annotated[int, typer.Option(help="tokens to decode")] = NEW_TOKENS,
    rounds: Annotated[int, typer.Option(help="how often everything is measured")] = ROUNDS,
    compiled: Annotated[bool, typer.Option("--compile", help="compile the blocks, dense and compressed")] = False,
) -> None:
    """Measure the rows that are not there yet."""
    lengths = {"layers": layers, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    settings = {**lengths, "rounds": rounds, "compiled": compiled}
    results: Results = {"settings": settings, "rows": []}
    if out.is_file():
        results = json.loads(out.read_text(encoding="utf-8"))
        if results["settings"] != settings:
            raise typer.BadParameter(f"{out} was measured with {results['settings']}: choose another --out")
    there = [(row["variant"], row["threads"]) for row in results["rows"]]
    for variant, threads, rivals in ROWS:
        if (variant, threads) in there:
            continue
        print(f"{variant}, {threads} threads", flush=True)
        measured = measure(variant, threads, rivals, settings)
        row = {"variant": variant, "threads": threads, "benchmark": measured.model_dump(mode="json")}
        results["rows"].append(row)
        out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@app.command()
def render(
    results: Annotated[Path, typer.Option(help="JSON file of `run`")] = RESULTS,
    out: Annotated[Path, typer.Option(help="page to write")] = PAGE,
) -> None:
    """Write the page."""
    out.write_text(page(results), encoding="utf-8")


def page(path: Path) -> str:
    """The page of the results in the file, or how to get them."""
    lines = ["# Speed, end to end", ""]
    if not path.is_file():
        lines.append("Not measured yet: `python benchmarks/end_to_end.py run`.")
    else:
        lines += _page(json.loads(path.read_text(encoding="utf-8")))
    return "\n".join(lines) + "\n"


def _page(results: Results) -> Iterator[str]:
    settings = results["settings"]
    rows = [(row["variant"], row["threads"], Benchmark.model_validate(row["benchmark"])) for row in results["rows"]]
    machines = {each.machine.cpu for *_, each in rows}
    versions = {", ".join(f"{name} {number}" for name, number in each.versions.items()) for *_, each in rows}
    yield (
        f"GPT-2 small's geometry with {settings['layers']} blocks and random weights; {settings['prompt_tokens']} "
        f"prompt tokens and {settings['new_tokens']} new ones with a key-value cache, batch 1. All models of a table "
        f"took turns in one process, {settings['rounds']} rounds after {rows[0][2].warm_up_rounds} that do not count; "
        f"{'dense and compressed blocks are compiled; ' if settings['compiled'] else ''}"
        "a ratio is of two measurements of one round, shown as median (quartiles). The bound of decode counts bytes "
        "of weights that are read, that of prefill multiplications by them; 8-bit ones are others, so that prefill "
        f"has none there. {', '.join(sorted(machines))}; {', '.join(sorted(versions))}. From "
        "`benchmarks/results/end_to_end.json`, made by `python benchmarks/end_to_end.py run`; the page by its `render`."
    )
    yield ""
    yield "Decode over the dense model, float32, one thread:"
    yield ""
    yield "| compressed | goal | bound | measured | |"
    yield "|---|---|---|---|---|"
    for variant, threads, measured in rows:
        if variant not in GOALS or threads != 1:
            continue
        (ours,) = [model for model in measured.models if (model.kind, model.dtype) == ("model", "float32")]
        comparison = ours.measured[0].comparison
        assert comparison is not None
        speedup = comparison.decode
        verdict = "met" if speedup.spread.median >= GOALS[variant] else "missed"
        yield f"| {variant} | {GOALS[variant]:g} | {speedup.bound:.2f} | {_spread(speedup.spread)} | {verdict} |"
    yield ""
    for variant, threads, measured in rows:
        yield from _section(variant, threads, measured)


def _section(variant: str, threads: int, measured: Benchmark) -> Iterator[str]:
    yield f"## {variant}, {threads} thread{'s' if threads > 1 else ''}"
    yield ""
    for kind in ("decode", "prefill"):
        yield f"| {kind} | dtype | tokens/s | ms/token | over dense, same dtype | bound | over dense float32 |"
        yield "|---|---|---|---|---|---|---|"
        (base,) = [model for model in measured.models if (model.kind, model.dtype) == ("against", "float32")]
        for model in measured.models:
            timing, comparison = getattr(model.measured[0], kind), model.measured[0].comparison
            ratio, bound = "", ""
            if comparison is not None:
                speedup = getattr(comparison, kind)
                ratio, bound = _spread(speedup.spread), "–" if speedup.bound is None else f"{speedup.bound:.2f}"
            pairs = zip(getattr(base.measured[0], kind).seconds, timing.seconds, strict=True)
            over = Spread.of([dense / ours for dense, ours in pairs])
            yield (
                f"| {NAMES[model.kind]} | {model.dtype} | {timing.tokens_per_second.median:,.1f} | "
                f"{1e3 * timing.seconds_per_token.median:.2f} | {ratio} | {bound} | {over.median:.2f} |"
            )
        yield ""
    if any(model.memory is not None for model in measured.models):
        yield "| memory | dtype | parameters | weights, MB | peak while running, MB | peak while made, MB |"
        yield "|---|---|---|---|---|---|"
        for model in measured.models:
            yield _memory_row(model)
        yield ""


def _memory_row(model: ModelBenchmark) -> str:
    memory = model.memory
    peaks = [None, None] if memory is None else [memory.running_peak_bytes, memory.peak_bytes]
    cells = " | ".join("–" if peak is None else f"{peak / 1e6:,.0f}" for peak in peaks)
    sizes = model.sizes
    return f"| {NAMES[model.kind]} | {model.dtype} | {sizes.num_params:,} | {sizes.num_bytes / 1e6:,.0f} | {cells} |"


def _spread(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.first_quartile:.2f}–{spread.third_quartile:.2f})"


if __name__ == "__main__":
    torch.set_num_threads(1)
    app()
