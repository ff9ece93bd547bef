"""What a training step through tensor-train matrices keeps in memory: autograd's way, and the input alone.

    python benchmarks/tensor_train_memory.py --out benchmarks/results/tensor_train_memory.json

Matrices of GPT-2's MLPs one after the other (768 to 3072 and back, the shapes of the recipe `ttm`), forward and back
once. Kept are the bytes that the forward pass holds for the backward pass, counted exactly, without the cores. The peak
is that of resident memory of a process of its own, above what it held before. Seconds are the processor's, on one
thread.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import kronpress as kp
from kronpress.matrices import TensorTrain
from kronpress.matrices.tensor_train import contracted

NUM_TOKENS = 256
NUM_LAYERS = (1, 6)
WAYS: dict[str, Callable[[dict[str, Tensor], Tensor], Tensor]] = {
    "autograd": lambda factors, x: contracted(x, list(factors.values())),
    "input_alone": TensorTrain.multiply,
}


def measure(way: str, num_layers: int, num_tokens: int) -> dict[str, Any]:
    """One step through `num_layers` matrices."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    recipe = kp.load_recipe("ttm")
    layers = []
    for number in range(num_layers):
        shape = (3072, 768) if number % 2 == 0 else (768, 3072)
        max_params = int(recipe.budget.kept_of_targets * 3072 * 768)
        [spec] = TensorTrain.candidate_specs(*shape, max_params, **recipe.spec)
        layers.append(TensorTrain(*shape, spec))

    def forward(x: Tensor) -> Tensor:
        for layer in layers:
            x = WAYS[way](layer.factors, x)
        return x

    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    forward(torch.randn(1, 768)).sum().backward()  # what is set up once
    x = torch.randn(num_tokens, 768, requires_grad=True)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = forward(x)
    y.sum().backward()
    seconds = time.process_time() - started
    peak_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    factors = sum(factor.numel() * factor.itemsize for layer in layers for factor in layer.factors.values())
    return {"kept_bytes": sum(kept.values()) - factors, "peak_bytes": peak_bytes, "processor_seconds": seconds}


def main(
    out: Annotated[Path, typer.Option(help="where the result is written")],
    tokens: Annotated[int, typer.Option(help="tokens in the step")] = NUM_TOKENS,
) -> None:
    rows = []
    for num_layers in NUM_LAYERS:
        row: dict[str, Any] = {"num_layers": num_layers}
        for way in WAYS:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                row[way] = pool.submit(measure, way, num_layers, tokens).result()
        rows.append(row)
    found = {
        "command": "python benchmarks/tensor_train_memory.py --out benchmarks/results/tensor_train_memory.json",
        "recipe": "ttm",
        "num_tokens": tokens,
        "dtype": "float32",
        "torch": version("torch"),
        "rows": rows,
    }
    out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
