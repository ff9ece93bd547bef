"""What the permutation search finds: planted Kronecker products, and structure in real matrices beside random ones.

    python benchmarks/permutation_recovery.py recovery --out benchmarks/results/permutation_recovery.json
    python benchmarks/permutation_recovery.py control FILE --out benchmarks/results/permutation_control.json
    python benchmarks/permutation_recovery.py speed --out benchmarks/results/permutation_speed.json

`recovery`: A ⊗ B with Gaussian factors, plus noise of a tenth of its norm or none, with its rows, its columns or both
permuted at random. It is recovered if the search captures as much as the planted order does. `control`: the energy
captured before and after the search on each matrix of a safetensors file (GPT-2's attention), on a Gaussian matrix of
its size, and on one that has also its norms of rows and columns: what the search gains on the latter is no structure of
directions. `speed`: seconds a start on 3072×768, the size of GPT-2's MLP matrices.
"""

from __future__ import annotations

import json
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file
from torch import Tensor

from kronpress.matrices.permutation import Start, nearest_permuted_sum

SHAPES = (((16, 16), (2, 1)), ((16, 16), (2, 2)), ((12, 12), (4, 4)))
LARGE_SHAPES = (((16, 16), (3, 3)), ((8, 8), (6, 6)), ((32, 32), (2, 8)), ((48, 48), (4, 4)), ((96, 48), (4, 4)))
STARTS: tuple[Start, ...] = ("identity", 0, "matching")
NOISES = (0.0, 0.1)
SIDES = ("rows", "columns", "both")
RIGHT_SHAPES = ((1, 2), (2, 1), (2, 2), (4, 4))
CORES = os.cpu_count() or 1

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Out = Annotated[Path, typer.Option(help="JSON file to write")]


def write(out: Path, content: dict[str, Any]) -> None:
    versions = {name: version(name) for name in ("kronpress", "torch", "scipy")}
    out.write_text(json.dumps({"versions": versions, **content}, indent=1) + "\n", encoding="utf-8")


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def is_recovered(
    seed: int, left_shape: tuple[int, int], right_shape: tuple[int, int], side: str, noise: float, start: Start
) -> bool:
    generator = torch.Generator().manual_seed(seed)
    planted = torch.kron(normal(generator, *left_shape), normal(generator, *right_shape))
    error = normal(generator, *planted.shape)
    planted += noise * error * planted.norm() / error.norm()
    rows, columns = (torch.randperm(size, generator=generator) for size in planted.shape)
    permuted = planted if side == "columns" else planted[rows]
    permuted = permuted if side == "rows" else permuted[:, columns]
    in_order = nearest_permuted_sum(planted, left_shape, right_shape, rows=False, columns=False)
    found = nearest_permuted_sum(
        permuted, left_shape, right_shape, rows=side != "columns", columns=side != "rows", starts=(start,)
    )
    return found.captured[-1] >= in_order.captured[-1] - 1e-9


@app.command()
def recovery(
    out: Out,
    seeds: Annotated[int, typer.Option(help="planted matrices of each kind")] = 100,
    large: Annotated[bool, typer.Option(help="larger shapes, about ten times as long")] = False,
) -> None:
    """The rate at which planted products are recovered, for each shape, permuted side, noise and start."""
    torch.set_num_threads(1)
    rows = []
    for left_shape, right_shape in LARGE_SHAPES if large else SHAPES:
        for side in SIDES:
            if side != "rows" and right_shape[1] == 1:  # a permutation of columns changes nothing
                continue
            for noise in NOISES:
                rates = {
                    "random" if isinstance(start, int) else start: sum(
                        is_recovered(seed, left_shape, right_shape, side, noise, start) for seed in range(seeds)
                    )
                    / seeds
                    for start in STARTS
                }
                row = {"left_shape": left_shape, "right_shape": right_shape, "side": side, "noise": noise, **rates}
                rows.append(row)
                typer.echo(json.dumps(row), err=True)
        write(out, {"command": "python benchmarks/permutation_recovery.py recovery", "seeds": seeds, "rows": rows})


def like(weight: Tensor, generator: torch.Generator, *, has_norms: bool) -> Tensor:
    """A Gaussian matrix of the size of `weight`; with `has_norms` scaled to its norms of rows and of columns."""
    random = normal(generator, *weight.shape)
    for _ in range(50 if has_norms else 0):
        random *= weight.norm(dim=1, keepdim=True) / random.norm(dim=1, keepdim=True)
        random *= weight.norm(dim=0) / random.norm(dim=0)
    return random


@app.command()
def control(
    weights: Annotated[Path, typer.Argument(help="a safetensors file in GPT-2's layout, (in, out)")],
    out: Out,
    only: Annotated[str, typer.Option(help="matrices whose name has this in it")] = "weight",
) -> None:
    """Energy captured by one term before and after the search, of real matrices and of random ones."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name, stored in sorted(load_file(weights).items()):
        if stored.ndim != 2 or only not in name:
            continue
        real, generator = stored.double().mT, torch.Generator().manual_seed(0)
        contenders = {
            "real": real,
            "gaussian": like(real, generator, has_norms=False),
            "gaussian_with_its_norms": like(real, generator, has_norms=True),
        }
        for m2, n2 in RIGHT_SHAPES:
            row: dict[str, Any] = {"matrix": name, "shape": list(real.shape), "right_shape": [m2, n2]}
            for kind, weight in contenders.items():
                found = nearest_permuted_sum(weight, (real.shape[0] // m2, real.shape[1] // n2), (m2, n2))
                in_order = nearest_permuted_sum(
                    weight, (real.shape[0] // m2, real.shape[1] // n2), (m2, n2), rows=False, columns=False
                )
                row[kind] = {"before": in_order.captured[-1], "after": found.captured[-1], "start": found.start}
            rows.append(row)
            typer.echo(json.dumps(row), err=True)
        command = f"python benchmarks/permutation_recovery.py control {weights.name} --only {only}"
        write(out, {"command": command, "num_terms": 1, "rows": rows})


@app.command()
def speed(out: Out, threads: Annotated[int, typer.Option(help="threads of torch")] = CORES) -> None:
    """Seconds, and seconds of processor time, of one start on a random 3072×768 matrix."""
    torch.set_num_threads(threads)
    weight = normal(torch.Generator().manual_seed(0), 3072, 768)
    rows: list[dict[str, Any]] = []
    for m2, n2 in RIGHT_SHAPES:
        for start in STARTS:
            began, began_cpu = time.perf_counter(), time.process_time()
            found = nearest_permuted_sum(weight, (3072 // m2, 768 // n2), (m2, n2), starts=(start,))
            row = {
                "right_shape": [m2, n2],
                "start": start,
                "seconds": time.perf_counter() - began,
                "cpu_seconds": time.process_time() - began_cpu,
                "captured": found.captured[-1],
            }
            rows.append(row)
            typer.echo(json.dumps(row), err=True)
    write(out, {"command": "python benchmarks/permutation_recovery.py speed", "threads": threads, "rows": rows})


if __name__ == "__main__":
    app()
