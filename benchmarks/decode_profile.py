"""Where the time of one token goes: native products of factors, of dense layers, attention and the rest.

    python benchmarks/decode_profile.py --out benchmarks/results/decode_profile.json

GPT-2 small's geometry with random weights after 512 tokens, float32, one thread, for each variant of end_to_end.py.
Seconds are those of the processor. What is neither a linear layer nor attention is norms, activations, the cache,
and Python between them: it does not shrink with the weights.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import end_to_end
import torch
import typer
from torch import nn

import kronpress as kp
from kronpress.benchmark.contenders import Contender, build
from kronpress.benchmark.machine import Machine

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def timed(module: nn.Module, kind: str, spent: dict[str, float]) -> None:
    """Add the time of every forward pass of the module to `spent`, without that of timed modules inside it."""
    forward: Callable[..., Any] = module.forward

    def measured(*args: Any, **kwargs: Any) -> Any:
        before, started = sum(spent.values()), time.thread_time()
        result = forward(*args, **kwargs)
        spent[kind] += time.thread_time() - started - (sum(spent.values()) - before)
        return result

    module.forward = measured  # type: ignore[method-assign]


def profile(variant: str | None, rounds: int) -> dict[str, Any]:
    """Median milliseconds of a token, and of its parts."""
    recipe = None if variant is None else kp.load_recipe({"name": variant, **end_to_end.VARIANTS[variant]})
    model = build(Contender("gpt2", "float32", random_weights=True, recipe=recipe)).model.eval()
    spent = dict.fromkeys(("factored layers", "head", "dense layers", "attention without its layers"), 0.0)
    for name, module in model.named_modules():
        if module is model.get_output_embeddings():
            timed(module, "head", spent)
        elif isinstance(module, kp.StructuredLinear):
            timed(module, "factored layers", spent)
        elif type(module).__name__ in ("Conv1D", "Linear", "NativeLinear"):
            timed(module, "dense layers", spent)
        elif name.endswith(".attn"):
            timed(module, "attention without its layers", spent)
    rows = []
    with torch.inference_mode():
        prompt = model(torch.randint(50257, (1, 512)), use_cache=True)
        cache, token = prompt.past_key_values, torch.tensor([[11]])
        for _ in range(rounds + 2):
            for kind in spent:
                spent[kind] = 0.0
            started = time.thread_time()
            model(token, past_key_values=cache, use_cache=True)
            total = time.thread_time() - started
            rows.append({"total": total, **spent, "everything else": total - sum(spent.values())})
    found = {kind: round(1e3 * statistics.median(row[kind] for row in rows[2:]), 3) for kind in rows[0]}
    return {"variant": variant or "dense", "milliseconds": found}


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="JSON file to write")],
    rounds: Annotated[int, typer.Option(help="tokens that count")] = 30,
) -> None:
    torch.set_num_threads(1)
    rows = [profile(variant, rounds) for variant in (None, "blocks 2×", "blocks 4×", "blocks 4×, tied head 2×")]
    results = {
        "command": "python benchmarks/decode_profile.py",
        "machine": Machine.here().model_dump(),
        "versions": {name: version(name) for name in ("kronpress", "torch", "transformers")},
        "rows": rows,
    }
    out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(rows, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    app()
