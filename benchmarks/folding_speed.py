"""What a permutation costs at run time: nothing where it is folded, one `index_select` a side where it is stored.

    python benchmarks/folding_speed.py --out benchmarks/results/folding_speed.json

Three models of GPT-2 small's width with few blocks and random weights, their MLPs sums of Kronecker products of equal
sizes: in the order as it is; with random orders of all hidden units and of the residual stream folded into the weights;
and with a random order of rows and of columns stored with every matrix. They run in turns, so that what else the
machine does falls on all of them, and each time is divided by that of the model in the given order in the same round.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import kronpress as kp
from kronpress.benchmark import Spread
from kronpress.folding import fold_, free_dimensions
from kronpress.matrices import STRUCTURES
from kronpress.surgery import replace_by_matrix_, structured_layers

SIZES = {"right_shape": [4, 2], "num_terms": 4}  # TQCompressor's for the MLPs
REFERENCE = "as it is"
TOKENS = {"decode": 1, "prefill": 128}
VOCABULARY = 1024  # a larger one would hide the blocks behind the head


def models(width: int, blocks: int, heads: int) -> dict[str, nn.Module]:
    """The three models, by what is done about the order."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=width, n_layer=blocks, n_head=heads, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0
    )
    dense = GPT2LMHeadModel(config).eval()
    plan = kp.make_plan(dense, kp.load_recipe({"targets": "mlp", "structure": "kronecker", "spec": SIZES}))

    folded = copy.deepcopy(dense)
    for name, dimension in free_dimensions(folded).items():
        if not name.startswith("value"):
            fold_(folded, dimension, torch.randperm(len(dimension.labels)))
    kp.compress_(folded, plan)

    plain = copy.deepcopy(dense)
    kp.compress_(plain, plan)
    stored, permuted = copy.deepcopy(plain), STRUCTURES["permuted_kronecker"]
    for name, layer in structured_layers(plain).items():
        spec = permuted.Spec(**layer.spec.model_dump())
        matrix = permuted(layer.out_features, layer.in_features, spec)
        orders = permuted.order_sizes(layer.out_features, layer.in_features, spec)
        random = {side: torch.randperm(size) for side, size in orders.items()}
        matrix.load_state_dict({**{part: layer.factors[part] for part in ("weight", "right")}, **random})
        replace_by_matrix_(stored, name, matrix)
    return {REFERENCE: plain, "folded": folded, "stored": stored}


@torch.inference_mode()
def seconds(model: nn.Module, ids: torch.Tensor) -> float:
    started = time.perf_counter()
    model(input_ids=ids, use_cache=False)
    return time.perf_counter() - started


def measure(
    contenders: dict[str, nn.Module], rounds: int, clock: Callable[[nn.Module, torch.Tensor], float] = seconds
) -> list[dict[str, Any]]:
    """One row for each work and model: seconds of a forward pass, and the ratio to the reference in the same round."""
    rows = []
    for work, num_tokens in TOKENS.items():
        ids = torch.arange(num_tokens)[None] % VOCABULARY
        times: dict[str, list[float]] = {name: [] for name in contenders}
        names = list(contenders)
        for number in range(-1, rounds):  # the first is not counted
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                taken = clock(contenders[name], ids)
                if number >= 0:
                    times[name].append(taken)
        for name, taken in times.items():
            ratios = [own / reference for own, reference in zip(taken, times[REFERENCE], strict=True)]
            row = {"work": work, "num_tokens": num_tokens, "model": name}
            row |= {"seconds": Spread.of(taken).model_dump(), "ratio": Spread.of(ratios).model_dump()}
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def table(results: dict[str, Any]) -> list[str]:
    """Markdown: milliseconds of a forward pass, and how many times those of the given order, with quartiles."""
    lines = ["| tokens | orders | ms | ratio | quartiles of the ratio |", "|---|---|---|---|---|"]
    for row in results["rows"]:
        ratio = row["ratio"]
        lines.append(
            f"| {row['num_tokens']} | {row['model']} | {1e3 * row['seconds']['median']:.2f} | {ratio['median']:.3f} "
            f"| {ratio['first_quartile']:.3f}–{ratio['third_quartile']:.3f} |"
        )
    return lines


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write")],
    rounds: Annotated[int, typer.Option(help="how often every model is measured", min=2)] = 200,
    threads: Annotated[int, typer.Option(help="threads of torch", min=1)] = 1,
    width: Annotated[int, typer.Option(help="of the residual stream")] = 768,
    blocks: Annotated[int, typer.Option(help="how many")] = 4,
    heads: Annotated[int, typer.Option(help="of the attention")] = 12,
) -> None:
    """Measure the three models in turns, and print the table for docs/permutations.md."""
    torch.set_num_threads(threads)
    contenders = models(width, blocks, heads)
    results = {
        "command": "python benchmarks/folding_speed.py",
        "rounds": rounds,
        "threads": threads,
        "cores": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "width": width,
        "blocks": blocks,
        "sizes": SIZES,
        "num_params": {
            name: sum(parameter.numel() for parameter in model.parameters()) for name, model in contenders.items()
        },
        "versions": {name: version(name) for name in ("kronpress", "torch", "transformers")},
        "rows": measure(contenders, rounds),
    }
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(results)))


if __name__ == "__main__":
    typer.run(main)
