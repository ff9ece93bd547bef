"""Tokens per second of the healing beside a plain transformers Trainer on the same model and the same batches.

    python benchmarks/healing_speed.py --out benchmarks/results/healing_speed.json

Rounds take turns: some steps of a plain `Trainer` by the language-model loss, as many passes of the teacher, forward
only, and the healing by language-model loss alone, by distillation, and by distillation from the teacher's cache. One
thread, no saving, no validation, dropout 0, the default optimiser in all; the first steps of a round do not count.
Compared are the medians of a step's `processor` time, the time that this process was running, which others on the
machine disturb little, and beside it the fastest step of each by the clock.

    without a teacher    plain / healing
    with one             (plain + teacher) / healing: the summed cost of what has to be computed anyway
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

import kronpress as kp
from kronpress.recipe import Healing
from kronpress.tokens import pack

# GPT-2 has 2.2 weights in its blocks for one in its table, and so has the model with its vocabulary; the head of the
# other is as small as the bundled model's.
MODELS = {
    "GPT-2's vocabulary": {"vocab_size": 50257, "n_embd": 256, "n_layer": 36, "n_head": 4},
    "small vocabulary": {"vocab_size": 4096, "n_embd": 256, "n_layer": 6, "n_head": 4},
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
HEALINGS: dict[str, dict[str, Any]] = {
    "healing": {},
    "distillation": {"distillation_weight": 1.0, "language_model_weight": 0.0},
    "distillation from the cache": {
        **{"distillation_weight": 1.0, "language_model_weight": 0.0},
        **{"teacher_cache": True, "distillation_top_k": 64},
    },
}
WARM_UP_STEPS = 2


@dataclass
class Clock:
    """The seconds of each step, from tick to tick, but the first of each round."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    _last: tuple[float, float] | None = None
    _ticks: int = 0

    def tick(self) -> None:
        now = time.perf_counter(), time.process_time()
        if self._last is not None and self._ticks > WARM_UP_STEPS:
            self.wall.append(now[0] - self._last[0])
            self.processor.append(now[1] - self._last[1])
        self._last, self._ticks = now, self._ticks + 1

    def end(self) -> None:
        self._last, self._ticks = None, 0


class Ticks(TrainerCallback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.tick()


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The windows (num_windows, length) as a plain Trainer takes them."""

    def __init__(self, windows: Tensor) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


def plain_round(model: PreTrainedModel, windows: Tensor, steps: int, per_step: int, clock: Clock) -> None:
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=per_step,
            learning_rate=6e-5,
            lr_scheduler_type="cosine",
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            report_to="none",
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=Rows(windows), callbacks=[Ticks(clock)])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    clock.end()


@torch.no_grad()
def teacher_round(teacher: PreTrainedModel, windows: Tensor, steps: int, per_step: int, clock: Clock) -> None:
    for step in range(steps):
        teacher(input_ids=windows[step * per_step : (step + 1) * per_step], use_cache=False)
        clock.tick()
    clock.end()


def healing_round(
    model: PreTrainedModel, teacher: PreTrainedModel, windows: Tensor, healing: Healing, clock: Clock
) -> None:
    kp.heal_(model, teacher, windows.flatten(), healing, progress=lambda _: clock.tick())
    clock.end()


def measure(name: str, rounds: int, steps: int, per_step: int, length: int) -> dict[str, Any]:
    torch.manual_seed(0)
    config = GPT2Config(n_positions=length, bos_token_id=0, eos_token_id=0, **MODELS[name], **NO_DROPOUT)
    teacher = AutoModelForCausalLM.from_config(config).eval()
    windows = pack(torch.randint(config.vocab_size, (steps * per_step * length,)), length)

    def a_healing(changes: dict[str, Any]) -> Healing:
        return Healing(max_steps=steps, sequences_per_step=per_step, sequence_length=length, **changes)

    # By name: one round.
    contenders: dict[str, Callable[[PreTrainedModel, Clock], None]] = {
        "plain": lambda model, clock: plain_round(model, windows, steps, per_step, clock),
        "teacher": lambda _, clock: teacher_round(teacher, windows, steps, per_step, clock),
        **{
            each: lambda model, clock, changes=changes: healing_round(
                model, teacher, windows, a_healing(changes), clock
            )
            for each, changes in HEALINGS.items()
        },
    }
    clocks = {each: Clock() for each in contenders}
    for _ in range(rounds):
        for each, one_round in contenders.items():
            one_round(copy.deepcopy(teacher), clocks[each])
    seconds = {
        "processor": {each: median(clock.processor) for each, clock in clocks.items()},
        "fastest_by_the_clock": {each: min(clock.wall) for each, clock in clocks.items()},
    }
    tokens = per_step * length
    result: dict[str, Any] = {"model": name, **MODELS[name], "num_params": teacher.num_parameters()}
    for kind, of in seconds.items():
        result[kind] = {
            "tokens_per_second": {each: round(tokens / value, 1) for each, value in of.items()},
            "without_a_teacher": round(of["plain"] / of["healing"], 3),
            "with_a_teacher": round((of["plain"] + of["teacher"]) / of["distillation"], 3),
            "with_its_cache": round(of["plain"] / of["distillation from the cache"], 3),
        }
    return result


def main(
    out: Annotated[Path, typer.Option(help="where the result is written")],
    rounds: Annotated[int, typer.Option(help="rounds of each")] = 5,
    steps: Annotated[int, typer.Option(help="steps in a round")] = 8,
    sequences: Annotated[int, typer.Option(help="sequences in a step")] = 4,
    length: Annotated[int, typer.Option(help="tokens in a sequence")] = 128,
    model: Annotated[list[str], typer.Option(help="which models")] = list(MODELS),  # noqa: B006
) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    rows = []
    with TemporaryDirectory() as cache:
        os.environ["KRONPRESS_CACHE"] = cache
        for name in model:
            rows.append(measure(name, rounds, steps, sequences, length))
            print(json.dumps(rows[-1], indent=1), flush=True)
    result = {
        "rounds": rounds,
        "steps": steps,
        "sequences_per_step": sequences,
        "sequence_length": length,
        "threads": 1,
        "versions": {name: version(name) for name in ("torch", "transformers", "kronpress")},
        "rows": rows,
    }
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
