"""The whole story of a run, in order: load, plan, compress, heal, evaluate, save, and write results.json."""

from __future__ import annotations

import copy
import json
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from kronpress.checkpoint import (
    LoadedModel,
    atomic_folder,
    cast_parameters_,
    check_writable,
    load_model,
    write_model,
)
from kronpress.compression import LayerReport, compress_
from kronpress.errors import RequestError
from kronpress.evaluation import evaluate, longest_context
from kronpress.healing import HealingLog, HealingRow, checkpoint_step, heal_, newest_checkpoint
from kronpress.planning import Plan, make_plan
from kronpress.recipe import Budget, Evaluation, Recipe, dump_recipe, load_recipe
from kronpress.tokens import load_running_text, load_train_tokens

RESULTS_FORMAT = 1
PROMPT = "It was a cold evening in November, and the old man"
CONTINUATION_TOKENS = 40


@dataclass(frozen=True)
class Messages:
    """Where a run tells what it is doing."""

    stage: Callable[[str], None]
    healing: Callable[[HealingRow], None]


SILENT = Messages(stage=lambda _: None, healing=lambda _: None)


@dataclass(frozen=True)
class Outcome:
    """One recipe carried out: the model, and everything there is to report of it."""

    recipe: Recipe
    plan: Plan
    layers: dict[str, LayerReport]
    model: PreTrainedModel
    rows: list[dict[str, Any]]
    healing: HealingLog

    def to_json(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "plan": self.plan.model_dump(mode="json"),
            "layers": {name: report.model_dump(mode="json") for name, report in self.layers.items()},
            "healing": self.healing.model_dump(mode="json"),
        }


def run(
    recipe: Recipe,
    out: Path,
    *,
    rivals: list[Recipe] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    messages: Messages = SILENT,
    command: list[str] | None = None,
) -> dict[str, Any]:
    """Compress, heal and measure by `recipe`, and write the run directory `out`.

    `out` appears when all is done, with recipe.yaml, plan.json, results.json and model/. Until then a hidden
    folder beside it keeps the training checkpoints (every `healing.save_steps` steps) from which `resume`
    continues.

    Args:
        rivals: recipes to measure beside the main one, on the same model and data and with the same healing,
            each given the main one's parameter count as its budget; their results are kept, their models not.
        command: the command line that asked for the run, kept in results.json.
        resume: continue an interrupted run; start one if there is none; leave a finished one as it is.

    Returns:
        The content of results.json.

    Raises:
        RequestError: the recipe does not fit the model, `out` is not empty, or `resume` with another recipe.
        WorkError: a step failed; training checkpoints are kept.
    """
    started = time.monotonic()
    out = out.resolve()
    work = out.with_name(f".{out.name}.healing")
    if resume and (out / "results.json").is_file() and not work.exists():
        results = json.loads((out / "results.json").read_text(encoding="utf-8"))
        if results["recipe"] != recipe.model_dump(mode="json"):
            raise RequestError(f"{out} is a finished run of another recipe: choose another folder, or --overwrite it")
        messages.stage(f"{out} is a finished run: nothing to do")
        return results
    continues = resume and work.exists()
    if not continues:
        check_writable(out, overwrite)
        if newest_checkpoint(work) is not None and not overwrite:
            raise RequestError(f"{out} was begun and interrupted: --resume goes on with it, --overwrite starts anew")
        shutil.rmtree(work, ignore_errors=True)
    messages.stage(f"loading {recipe.model}")
    teacher = load_model(recipe.model, recipe.revision)
    plan = make_plan(teacher.model, recipe)
    tokens = _train_tokens(teacher.tokenizer, recipe, messages)
    texts = _evaluation_texts(recipe.evaluation)

    messages.stage("measuring the dense model")
    dense_row = {
        "name": "dense",
        "stage": "dense",
        **_sizes(plan.num_params_dense, plan.bytes_dense, plan.flops_per_token_dense),
        **_measure(teacher.model, teacher.tokenizer, texts, recipe.evaluation),
    }
    with _training_folder(work, recipe):
        resumed_at_steps = _note_resumption(work)
        main = _carry_out(recipe, plan, teacher, tokens, texts, messages, work=work, resume=resume)
    others = []
    for rival in rivals or []:
        rival = rival.model_copy(
            update={
                "budget": Budget(params=plan.num_params),
                "healing": recipe.healing,
                "evaluation": recipe.evaluation,
                "seed": recipe.seed,
            }
        )
        rival_plan = make_plan(teacher.model, rival)
        others.append(_carry_out(rival, rival_plan, teacher, tokens, texts, messages))

    packages = ("kronpress", "torch", "transformers", "accelerate", "datasets")
    results = {
        "format_version": RESULTS_FORMAT,
        "command": command,
        "model": {"name": teacher.name, "revision": teacher.revision, "dtype": plan.dtype},
        "data": {name: revision for name, _, revision in texts},
        "versions": {**{name: version(name) for name in packages}, "python": platform.python_version()},
        "device": _device_name(),
        "seed": recipe.seed,
        "prompt": PROMPT,
        "rows": [dense_row, *main.rows, *(row for other in others for row in other.rows)],
        **main.to_json(),
        "rivals": [other.to_json() for other in others],
        "resumed_at_steps": resumed_at_steps,
        "seconds": time.monotonic() - started,
    }
    # An interrupted run that is continued was allowed to replace what is in `out` when it began.
    replaceable = overwrite or (continues and (out / "results.json").is_file())
    with atomic_folder(out, overwrite=replaceable) as partial:
        (partial / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        (partial / "plan.json").write_text(plan.model_dump_json(indent=1) + "\n", encoding="utf-8")
        write_model(main.model, teacher.tokenizer, partial / "model", teacher.dtype)
        (partial / "results.json").write_text(
            json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    shutil.rmtree(work, ignore_errors=True)
    return results


def _carry_out(
    recipe: Recipe,
    plan: Plan,
    teacher: LoadedModel,
    tokens: Tensor,
    texts: list[tuple[str, str, str | None]],
    messages: Messages,
    work: Path | None = None,
    resume: bool = False,
) -> Outcome:
    """Compress a copy of the teacher, measure it, heal it, measure it again."""
    set_seed(recipe.seed)
    model = copy.deepcopy(teacher.model)
    messages.stage(f"compressing by {recipe.name}")
    layers = compress_(model, plan)
    _round_to_(model, teacher.dtype)
    sizes = _sizes(plan.num_params, plan.bytes, plan.flops_per_token)

    def row(name: str, stage: str) -> dict[str, Any]:
        messages.stage(f"measuring {name}")
        measured = _measure(model, teacher.tokenizer, texts, recipe.evaluation)
        return {"name": name, "stage": stage, **sizes, **measured}

    rows = [row(recipe.name, "compressed")]
    messages.stage(f"healing {recipe.name}, {recipe.healing.num_steps} steps")
    healing = heal_(
        model,
        teacher.model,
        tokens,
        recipe.healing,
        seed=recipe.seed,
        work_dir=work,
        resume=resume,
        progress=messages.healing,
    )
    if healing.num_steps:
        _round_to_(model, teacher.dtype)
        rows.append(row(f"{recipe.name}, healed", "healed"))
    return Outcome(recipe, plan, layers, model, rows, healing)


def _round_to_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round the weights to the checkpoint's dtype: what is measured is what will be stored."""
    cast_parameters_(model, dtype)
    cast_parameters_(model, torch.float32)


@contextmanager
def _training_folder(work: Path, recipe: Recipe) -> Iterator[None]:
    """Mark `work` as this recipe's; whatever happens, it stays only if there is a training checkpoint in it."""
    note = work / "recipe.yaml"
    if note.is_file() and load_recipe(note) != recipe:
        raise RequestError(f"{work} holds an interrupted run of another recipe: --overwrite without --resume drops it")
    work.mkdir(parents=True, exist_ok=True)
    note.write_text(dump_recipe(recipe), encoding="utf-8")
    try:
        yield
    finally:
        if not any(work.glob("checkpoint-*")):
            shutil.rmtree(work, ignore_errors=True)


def _note_resumption(work: Path) -> list[int]:
    """The steps at which this run was resumed so far, this time included."""
    note = work / "resumed_at_steps.json"
    steps = json.loads(note.read_text()) if note.is_file() else []
    checkpoint = newest_checkpoint(work)
    if checkpoint is not None:
        steps.append(checkpoint_step(checkpoint))
        note.write_text(json.dumps(steps))
    return steps


def _train_tokens(tokenizer: PreTrainedTokenizerBase, recipe: Recipe, messages: Messages) -> Tensor:
    healing = recipe.healing
    if healing.num_steps == 0:
        return torch.empty(0, dtype=torch.int32)
    messages.stage(f"reading {healing.data}")
    return load_train_tokens(tokenizer, healing.data, healing.num_steps * healing.tokens_per_step)


def _evaluation_texts(evaluation: Evaluation) -> list[tuple[str, str, str | None]]:
    """(name, text, revision) of each test set."""
    names = [evaluation.data] if isinstance(evaluation.data, str) else evaluation.data
    loaded = [load_running_text(name, "test") for name in names]
    return [(text.name, "".join(text.documents), text.revision) for text in loaded]


def _measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[tuple[str, str, str | None]],
    evaluation: Evaluation,
) -> dict[str, Any]:
    metrics = {
        name: evaluate(
            model, tokenizer, text, window=evaluation.window, stride=evaluation.stride, bos=evaluation.bos
        ).to_json()
        for name, text, _ in texts
    }
    return {"metrics": metrics, "continuation": continue_text(model, tokenizer, PROMPT)}


def _sizes(num_params: int, num_bytes: int, flops_per_token: int) -> dict[str, int]:
    return {"num_params": num_params, "bytes": num_bytes, "flops_per_token": flops_per_token}


def continue_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The prompt and what the model makes of it: sampled among the 40 likeliest tokens, always from one seed."""
    model.eval()
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    room = (longest_context(model) or 10**9) - inputs["input_ids"].shape[1]
    if room < 1:
        return prompt
    torch.manual_seed(0)
    ids = model.generate(  # type: ignore[operator]
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=min(CONTINUATION_TOKENS, room),
        do_sample=True,
        top_k=40,
        pad_token_id=tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"
