"""One to four tokens through one layer: the native routines against nn.Linear and against a dense routine of our own.

    python benchmarks/native_linear.py --out benchmarks/results/native_linear.json

Run it on a quiet machine, where it takes a few minutes and 6 GB; `--matrices 3072x768 --rounds 5` is a short run. Every
contender goes through copies of its weights that together are more than four times the last cache, at least twelve of
them, so that every weight comes from memory. In each round all contenders run once, in an order drawn anew; a ratio is
that of two times of one round. `wall` is the clock. With one thread there is also `processor`, the time the thread was
running: it leaves out what other programs took of the core, though not what they took of its memory bandwidth.

The bound over a perfect dense routine is the ratio of bytes. What is beyond it over nn.Linear is the rate at which
nn.Linear reads memory; `gigabytes_per_second` has the rate of each. `torch (…)⊗(…)` is the same factors by torch alone.
"""

from __future__ import annotations

import json
import math
import os
import platform
import random
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from kronpress import native
from kronpress.matrices import STRUCTURES

MATRICES = {"3072x768": (3072, 768), "768x3072": (768, 3072), "4096x4096": (4096, 4096), "11008x4096": (11008, 4096)}
# B for a matrix at least as tall as wide; a wider one has the transpose.
RIGHT_SHAPES = ((1, 2), (2, 1), (2, 2), (4, 2))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GOALS = {"float32": {2: 1.9, 4: 3.5, 8: 7.0}, "bfloat16": {2: 3.5, 4: 6.0, 8: 10.0}}
FEWEST_COPIES = 12
CACHES = 4  # how many times the last cache the copies fill

Call = Callable[[Tensor], Tensor]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def last_cache_bytes() -> int:
    """The largest cache of the first core."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(size.read_text().strip().removesuffix("K")) * 1024 for size in sizes), default=32 << 20)


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def copies(weight: Tensor, cache_bytes: int) -> list[Tensor]:
    number = max(FEWEST_COPIES, math.ceil(CACHES * cache_bytes / weight.nbytes))
    return [weight.clone() for _ in range(number)]


def contenders(m: int, n: int, dtype: torch.dtype, cache_bytes: int) -> Iterator[tuple[str, int, list[Tensor], Any]]:
    """Name, how many times fewer bytes, the weights, and a function of x that makes the function of a weight."""
    bias = torch.randn(m).to(dtype)
    dense = copies(torch.randn(m, n).to(dtype), cache_bytes)
    yield "torch", 1, dense, lambda x: lambda w: torch.nn.functional.linear(x, w, bias)
    yield "native dense", 1, dense, lambda x: lambda w: native.linear(w, x, bias)
    multiply = STRUCTURES["kronecker"].multiply
    for shape in RIGHT_SHAPES:
        m2, n2 = shape if m >= n else shape[::-1]
        right = torch.randn(m2, 1, n2).to(dtype)
        left = copies(torch.randn(m // m2, 1, n // n2).to(dtype), cache_bytes)
        name = f"({m // m2},{n // n2})⊗({m2},{n2})"

        def of_native(x: Tensor, right: Tensor = right) -> Call:
            return lambda w: native.kronecker(w, right, x, bias)

        def of_torch(x: Tensor, right: Tensor = right) -> Call:
            return lambda w: multiply({"weight": w, "right": right}, x) + bias

        yield f"native {name}", m2 * n2, left, of_native
        yield f"torch {name}", m2 * n2, left, of_torch


def quartiles(numbers: list[float]) -> dict[str, float]:
    ordered = sorted(numbers)

    def at(share: float) -> float:
        low = int(share * (len(ordered) - 1))
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (share * (len(ordered) - 1) - low) * (ordered[high] - ordered[low])

    return {"lower": round(at(0.25), 3), "median": round(at(0.5), 3), "upper": round(at(0.75), 3)}


@torch.inference_mode()
def times(calls: dict[str, tuple[Call, list[Tensor]]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds a call of every contender in every round, by both clocks."""
    found: dict[str, dict[str, list[float]]] = {name: {"wall": [], "processor": []} for name in calls}
    for round_number in range(rounds + 1):
        for name, (call, weights) in random.sample(list(calls.items()), len(calls)):
            wall, processor = time.perf_counter(), time.thread_time()
            for weight in weights:
                call(weight)
            spent = {"wall": time.perf_counter() - wall, "processor": time.thread_time() - processor}
            if round_number:  # the first is for waking up
                for clock, seconds in spent.items():
                    found[name][clock].append(seconds / len(weights))
    return found


def rows(matrix: str, dtype: str, tokens: list[int], threads: list[int], rounds: int) -> Iterator[dict[str, Any]]:
    m, n = MATRICES[matrix]
    entries = list(contenders(m, n, DTYPES[dtype], last_cache_bytes()))
    for thread_count in threads:
        torch.set_num_threads(thread_count)
        for token_count in tokens:
            x = torch.randn(token_count, n).to(DTYPES[dtype])
            found = times({name: (make(x), weights) for name, _, weights, make in entries}, rounds)
            for name, gain, weights, _ in entries:
                row = {"matrix": matrix, "dtype": dtype, "threads": thread_count, "tokens": token_count}
                row |= {"contender": name, "bytes_gain": gain, "copies": len(weights)}
                for clock in ("wall", "processor") if thread_count == 1 else ("wall",):
                    seconds = found[name][clock]
                    median = quartiles([1e9 * each for each in seconds])["median"] / 1e9
                    ratios = {
                        f"over_{rival.replace(' ', '_')}": quartiles(
                            [a / b for a, b in zip(found[rival][clock], seconds, strict=True)]
                        )
                        for rival in ("torch", "native dense")
                    }
                    row[clock] = {
                        "microseconds": round(1e6 * median, 1),
                        "gigabytes_per_second": round(weights[0].nbytes / median / 1e9, 2),
                        **ratios,
                    }
                yield row


def table(results: dict[str, Any]) -> list[str]:
    """Markdown: what the native routine gains over nn.Linear and over our own dense one, medians."""
    lines = [
        "| matrix | dtype | threads | tokens | contender | bytes | goal | over torch | over own dense | µs | GB/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        clock = row[results["table_clock"]] if results["table_clock"] in row else row["wall"]
        goal = GOALS[row["dtype"]].get(row["bytes_gain"], "") if row["tokens"] == 1 else ""
        ratio, dense_ratio = clock["over_torch"], clock["over_native_dense"]
        lines.append(
            f"| {row['matrix']} | {row['dtype']} | {row['threads']} | {row['tokens']} | {row['contender']} "
            f"| {row['bytes_gain']} | {goal} | {ratio['median']:.2f} ({ratio['lower']:.2f}–{ratio['upper']:.2f}) "
            f"| {dense_ratio['median']:.2f} | {clock['microseconds']:.0f} | {clock['gigabytes_per_second']:.1f} |"
        )
    return lines


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="JSON file to write")],
    matrices: Annotated[list[str], typer.Option(help="which of " + ", ".join(MATRICES))] = list(MATRICES),  # noqa: B006
    dtypes: Annotated[list[str], typer.Option(help="float32, bfloat16")] = list(DTYPES),  # noqa: B006
    tokens: Annotated[list[int], typer.Option(help="token counts")] = [1, 2, 4],  # noqa: B006
    threads: Annotated[list[int], typer.Option(help="thread counts")] = [1, 2],  # noqa: B006
    rounds: Annotated[int, typer.Option(help="rounds that count")] = 11,
    clock: Annotated[
        str, typer.Option(help="the printed table's clock: wall, or processor for a busy machine")
    ] = "wall",
) -> None:
    """Measure, print a table, write the JSON."""
    if not native.is_available():
        raise SystemExit(f"no native routines: {native.why_not()}")
    torch.manual_seed(0)
    results: dict[str, Any] = {
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "last_cache_bytes": last_cache_bytes(),
            "load_before": round(os.getloadavg()[0], 2),
        },
        "instruction_set": native.instruction_set(),
        "versions": {name: version(name) for name in ("kronpress", "torch")},
        "rounds": rounds,
        "table_clock": clock,
        "goals": GOALS,
        "rows": [row for m in matrices for d in dtypes for row in rows(m, d, tokens, threads, rounds)],
    }
    results["machine"]["load_after"] = round(os.getloadavg()[0], 2)
    print("\n".join(table(results)))
    # A row a line: there are hundreds.
    made = results.pop("rows")
    head = json.dumps({**results, "rows": []}, indent=1).removesuffix("[]\n}")
    out.write_text(head + "[\n" + ",\n".join(map(json.dumps, made)) + "\n]\n}\n", encoding="utf-8")


if __name__ == "__main__":
    app()
