"""Whether a structured layer is ever slower than a dense one: time by shape, tokens, dtype and what dispatch may keep.

    python benchmarks/dispatch_check.py --out benchmarks/results/dispatch_check.json

Layers take turns with `nn.Linear` of the same shape, over so many weights that none stays in a cache. Seconds are
those of the processor on one thread: other work on the machine then counts little. Ratios are of medians. The way is
the one that dispatch chose, by constants measured on this machine.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import kronpress as kp
from kronpress.dispatch import Dispatch, explain, measured, set_dispatch
from kronpress.matrices import Kronecker, LowRank, StructuredMatrix

SHAPE = (3072, 768)
STRUCTURES: dict[str, tuple[type[StructuredMatrix], Any]] = {
    "(1,2)": (Kronecker, Kronecker.Spec(left_shape=(3072, 384), right_shape=(1, 2))),
    "(2,1)": (Kronecker, Kronecker.Spec(left_shape=(1536, 768), right_shape=(2, 1))),
    "(2,2)": (Kronecker, Kronecker.Spec(left_shape=(1536, 384), right_shape=(2, 2))),
    "(4,2)": (Kronecker, Kronecker.Spec(left_shape=(768, 384), right_shape=(4, 2))),
    "(2,1) small left": (Kronecker, Kronecker.Spec(left_shape=(2, 1), right_shape=(1536, 768))),
    "(2,2) small left": (Kronecker, Kronecker.Spec(left_shape=(2, 2), right_shape=(1536, 384))),
    "(4,2) small left": (Kronecker, Kronecker.Spec(left_shape=(4, 2), right_shape=(768, 384))),
    "4 of (3,3)": (Kronecker, Kronecker.Spec(left_shape=(1024, 256), right_shape=(3, 3), num_terms=4)),
    "16 of (48,24)": (Kronecker, Kronecker.Spec(left_shape=(64, 32), right_shape=(48, 24), num_terms=16)),
    "rank 307": (LowRank, LowRank.Spec(rank=307)),
}
NUM_LAYERS = 12
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def seconds_of(work: Callable[[], None]) -> float:
    started = time.thread_time()
    work()
    return time.thread_time() - started


def turns(works: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        seconds_of(work)
    for each in range(rounds):
        for name in list(works) if each % 2 == 0 else reversed(works):
            taken[name].append(seconds_of(works[name]))
    return {name: statistics.median(values) for name, values in taken.items()}


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


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="where the JSON goes")],
    tokens: Annotated[str, typer.Option(help="numbers of tokens, with commas")] = "1,4,16,64,512",
    rounds: int = 8,
) -> None:
    torch.set_num_threads(1)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        constants = {("cpu", dtype.itemsize): measured(torch.device("cpu"), dtype)}
        dense = nn.ModuleList(nn.Linear(SHAPE[1], SHAPE[0], dtype=dtype) for _ in range(NUM_LAYERS))
        for name, (structure, spec) in STRUCTURES.items():
            layers = nn.ModuleList(
                kp.StructuredLinear(structure(*SHAPE, spec, dtype=dtype), torch.zeros(SHAPE[0], dtype=dtype))
                for _ in range(NUM_LAYERS)
            ).eval()
            for num_tokens in map(int, tokens.split(",")):
                x = torch.randn(num_tokens, SHAPE[1]).to(dtype)
                for cache in (0.0, math.inf):
                    set_dispatch(layers, Dispatch(dense_cache_bytes=cache), constants=constants)
                    way = explain(layers[0], num_tokens)[0].way
                    if cache and way != "cached dense":
                        continue  # nothing differs
                    times = turns({"dense": through(dense, x), "layer": through(layers, x)}, rounds)
                    rows.append(
                        {
                            "structure": name,
                            "dtype": str(dtype).removeprefix("torch."),
                            "tokens": num_tokens,
                            "cache": bool(cache),
                            "way": way,
                            "ratio": times["dense"] / times["layer"],
                            "predicted": explain(layers[0], num_tokens)[0].predicted_gains.get(way),
                        }
                    )
                    typer.echo(rows[-1])
            if structure is Kronecker and spec.num_terms == 1:
                x, upstream = (torch.randn(512, size).to(dtype) for size in reversed(SHAPE))
                kron = nn.ModuleList(KronEachForward(layer) for layer in layers[:4])
                works = {"dense": dense[:4], "layer": layers[:4], "kron": kron}
                times = turns({each: step(some, x, upstream) for each, some in works.items()}, max(2, rounds // 2))
                rows.append(
                    {
                        "structure": name,
                        "dtype": str(dtype).removeprefix("torch."),
                        "tokens": 512,
                        "training_ratio": times["dense"] / times["layer"],
                        "training_over_kron": times["kron"] / times["layer"],
                    }
                )
                typer.echo(rows[-1])
    machine = {"processor": platform.processor() or platform.machine(), "threads": 1}
    versions = {package: version(package) for package in ("kronpress", "torch")}
    out.write_text(json.dumps({"machine": machine, "versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    app()
