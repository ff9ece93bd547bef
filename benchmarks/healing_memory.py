"""The peak memory of a distillation at GPT-2's vocabulary, with the logits of all tokens at once and in chunks.

    python benchmarks/healing_memory.py --out benchmarks/results/healing_memory.json

Student and teacher have GPT-2's vocabulary of 50257 and two narrow blocks, so that the logits decide. Each row is one
`heal_` of two steps in a process of its own; `peak_bytes` is the high-water mark of its resident memory (VmHWM) above
what it held when the models were loaded. `logits_bytes` is one full tensor of logits in float32, `head_bytes` the tied
table. Seconds are the processor's, on one thread.
"""

from __future__ import annotations

import json
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, GPT2Config

import kronpress as kp
from kronpress.healing.chunks import CHUNK_LOGITS
from kronpress.recipe import Healing

VOCABULARY = 50257
OBJECTIVES: dict[str, dict[str, Any]] = {
    "language model": {},
    "forward KL": {"distillation_weight": 1.0, "language_model_weight": 0.0},
    "Jensen-Shannon": {"jensen_shannon_weight": 1.0, "language_model_weight": 0.0},
    "forward KL, top 64": {"distillation_weight": 1.0, "language_model_weight": 0.0, "distillation_top_k": 64},
}
WAYS = {"whole": 0, "default": None, "64 tokens": 64}


def measure(objective: str, way: str, sequences: int, length: int, width: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=length, n_embd=width, n_layer=2, n_head=2)
    student, teacher = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    healing = Healing(
        max_steps=2,
        sequences_per_step=sequences,
        sequence_length=length,
        chunk_tokens=WAYS[way],
        **OBJECTIVES[objective],
    )
    tokens = torch.randint(VOCABULARY, (4 * sequences * length,))
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    kp.heal_(student, teacher, tokens, healing)
    return {
        "objective": objective,
        "logits": way,
        "peak_bytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024,
        "processor_seconds": round(time.process_time() - started, 2),
    }


def main(
    out: Annotated[Path, typer.Option(help="where the result is written")],
    sequences: Annotated[int, typer.Option(help="sequences in one step")] = 4,
    length: Annotated[int, typer.Option(help="tokens in one sequence")] = 256,
    width: Annotated[int, typer.Option(help="width of the models")] = 64,
) -> None:
    rows = []
    for objective in OBJECTIVES:
        for way in WAYS:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                rows.append(process.submit(measure, objective, way, sequences, length, width).result())
            print(f"{objective:20} {way:10} {rows[-1]['peak_bytes'] / 2**20:8.0f} MiB", flush=True)
    result = {
        "sequences": sequences,
        "sequence_length": length,
        "width": width,
        "vocabulary": VOCABULARY,
        "logits_bytes": sequences * (length - 1) * VOCABULARY * 4,
        "head_bytes": VOCABULARY * width * 4,
        "chunk_logits": CHUNK_LOGITS,
        "versions": {name: version(name) for name in ("torch", "transformers", "kronpress")},
        "rows": rows,
    }
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
