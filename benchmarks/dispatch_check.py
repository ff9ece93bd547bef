"""Whether a structured layer is ever slower than a dense one: time by shape, tokens, dtype and what dispatch may keep.

    python benchmarks/dispatch_check.py --out benchmarks/results/dispatch_check.json

Layers take turns with `nn.Linear` of the same shape, over so many weights that none stays in a cache, and with a dense
weight that was packed beforehand in the layout that oneDNN likes best (`prepacked`). A ratio is that of two times of
one round, and its median and quartiles are shown. Seconds are those of the processor with one thread, so that other
work on the machine counts little, and those of the clock with more. The way is the one that dispatch chose, by
constants measured on this machine.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import kronpress as kp
from kronpress.benchmark.machine import Machine
from kronpress.dispatch import Dispatch, explain, measured, set_dispatch
from kronpress.matrices import Kronecker, LowRank, StructuredMatrix

SMALL, LARGE = (3072, 768), (11008, 4096)
# B of the goals, and sums that cost more arithmetic than the matrix they stand for.
SMALL_RIGHT = ((1, 2), (2, 1), (2, 2), (4, 2))
NUM_LAYERS = {SMALL: 12, LARGE: 4}
TOKENS = {SMALL: (1, 4, 16, 64, 512), LARGE: (1, 512)}
# A step of training is long, and its weights are far larger than a cache.
NUM_TRAINED = {SMALL: 4, LARGE: 1}


def structures(shape: tuple[int, int]) -> dict[str, tuple[type[StructuredMatrix], Any]]:
    m, n = shape
    found: dict[str, tuple[type[StructuredMatrix], Any]] = {}
    for m2, n2 in SMALL_RIGHT:
        large, small = (m // m2, n // n2), (m2, n2)
        found[f"({m2},{n2})"] = Kronecker, Kronecker.Spec(left_shape=large, right_shape=small)
        found[f"({m2},{n2}) small left"] = Kronecker, Kronecker.Spec(left_shape=small, right_shape=large)
    if shape == SMALL:
        found["4 of (3,3)"] = Kronecker, Kronecker.Spec(left_shape=(1024, 256), right_shape=(3, 3), num_terms=4)
        found["16 of (48,24)"] = Kronecker, Kronecker.Spec(left_shape=(64, 32), right_shape=(48, 24), num_terms=16)
        found["rank 307"] = LowRank, LowRank.Spec(rank=307)
    return found


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def seconds_of(work: Callable[[], None]) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    work()
    return clock() - started


def turns(works: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each in every round; the order is turned round from one to the next."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        seconds_of(work)
    for each in range(rounds):
        for name in list(works) if each % 2 == 0 else reversed(works):
            taken[name].append(seconds_of(works[name]))
    return taken


def over(theirs: list[float], ours: list[float]) -> list[float]:
    """First quartile, median and third quartile of how many times as fast ours are."""
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    return [round(each, 3) for each in statistics.quantiles(ratios, n=4, method="inclusive")]


class Prepacked(nn.Module):
    """A dense layer whose weight is stored in the order in which oneDNN reads it for so many tokens."""

    def __init__(self, layer: nn.Linear, num_tokens: int) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), num_tokens)
        self.bias = layer.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def through(layers: nn.ModuleList, x: Tensor) -> Callable[[], None]:
    @torch.no_grad()
    def run() -> None:
        for layer in layers:
            layer(x)

    return run


def step(layers: nn.ModuleList, x: Tensor, upstream: Tensor) -> Callable[[], None]:
    def run() -> None:
        for layer in layers:
            layer(x.detach().requires_grad_()).backward(upstream)
        layers.zero_grad()

    return run


class KronEachForward(nn.Module):
    """Krony-PT's way: the dense matrix is formed in every forward."""

    def __init__(self, layer: kp.StructuredLinear) -> None:
        super().__init__()
        self.left, self.right = (
            nn.Parameter(layer.get_parameter(name).detach()[:, 0].clone()) for name in ("weight", "right")
        )
        self.bias = nn.Parameter(torch.zeros(layer.out_features, dtype=self.left.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, torch.kron(self.left, self.right), self.bias)


def inference_rows(shape: tuple[int, int], dtype: torch.dtype, rounds: int, constants: Any) -> Iterator[dict[str, Any]]:
    """A row for each structure and number of tokens, and one more where dispatch would keep a dense weight."""
    m, n = shape
    dense = nn.ModuleList(nn.Linear(n, m, dtype=dtype) for _ in range(NUM_LAYERS[shape]))
    for num_tokens in TOKENS[shape]:
        x = torch.randn(num_tokens, n).to(dtype)
        packed = nn.ModuleList(Prepacked(layer, num_tokens) for layer in dense)  # type: ignore[arg-type]
        for name, (structure, spec) in structures(shape).items():
            layers = nn.ModuleList(
                kp.StructuredLinear(structure(m, n, spec, dtype=dtype), torch.zeros(m, dtype=dtype)) for _ in dense
            ).eval()
            for cache in (0.0, math.inf):
                set_dispatch(layers, Dispatch(dense_cache_bytes=cache), constants=constants)
                (explained, *_) = explain(layers, num_tokens)
                if cache and explained.way != "cached dense":
                    continue  # nothing differs
                works = {"dense": dense, "prepacked": packed, "layer": layers}
                times = turns({each: through(some, x) for each, some in works.items()}, rounds)
                yield {
                    "structure": name,
                    "tokens": num_tokens,
                    "cache": bool(cache),
                    "way": explained.way,
                    "over_dense": over(times["dense"], times["layer"]),
                    "over_prepacked": over(times["prepacked"], times["layer"]),
                    "predicted": explained.predicted_gains.get(explained.way),
                }


def training_rows(shape: tuple[int, int], dtype: torch.dtype, rounds: int) -> Iterator[dict[str, Any]]:
    """Forward and backward of 512 tokens, with gradients of inputs and factors."""
    m, n = shape
    dense = nn.ModuleList(nn.Linear(n, m, dtype=dtype) for _ in range(NUM_TRAINED[shape]))
    x, upstream = (torch.randn(512, size).to(dtype) for size in (n, m))
    for name, (structure, spec) in structures(shape).items():
        if structure is Kronecker and spec.num_terms == 1:
            layers = nn.ModuleList(
                kp.StructuredLinear(structure(m, n, spec, dtype=dtype), torch.zeros(m, dtype=dtype)) for _ in dense
            )
            kron = nn.ModuleList(KronEachForward(layer) for layer in layers)  # type: ignore[arg-type]
            works = {"dense": dense, "layer": layers, "kron": kron}
            times = turns({each: step(some, x, upstream) for each, some in works.items()}, rounds)
            yield {
                "structure": name,
                "tokens": 512,
                "training_over_dense": over(times["dense"], times["layer"]),
                "training_over_kron": over(times["kron"], times["layer"]),
            }


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="where the JSON goes")],
    rounds: Annotated[int, typer.Option(help="rounds that count")] = 7,
    threads: Annotated[list[int], typer.Option(help="thread counts")] = [1, 2],  # noqa: B006
    large: Annotated[bool, typer.Option(help="a 7B model's matrix too")] = True,
) -> None:
    rows: list[dict[str, Any]] = []
    for thread_count in threads:
        torch.set_num_threads(thread_count)
        for shape in (SMALL, LARGE) if large else (SMALL,):
            for dtype in (torch.float32, torch.bfloat16):
                common = {"threads": thread_count, "matrix": "×".join(map(str, shape)), "dtype": str(dtype)[6:]}
                constants = {("cpu", dtype.itemsize): measured(torch.device("cpu"), dtype)}
                few = rounds if shape == SMALL else max(3, rounds // 2)
                found = list(inference_rows(shape, dtype, few, constants))
                if thread_count == 1:
                    found += training_rows(shape, dtype, max(3, few // 2))
                rows += [{**common, **row} for row in found]
                typer.echo("\n".join(map(str, rows[-len(found) :])))
    results = {
        "command": f"python benchmarks/dispatch_check.py --rounds {rounds}",
        "machine": Machine.here().model_dump(),
        "versions": {package: version(package) for package in ("kronpress", "torch")},
        "rows": rows,
    }
    out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    app()
