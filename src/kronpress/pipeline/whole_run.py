"""The whole story of a run, in order: load, plan, compress, heal, evaluate, save, and write results.json."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from kronpress.calibration import Moments
from kronpress.checkpoint import (
    LoadedModel,
    atomic_folder,
    base_of,
    cast_parameters_,
    check_writable,
    load_config,
    load_model,
    write_model,
)
from kronpress.errors import RequestError, unknown_name
from kronpress.evaluation import evaluate, longest_context
from kronpress.healing import (
    HealingLog,
    HealingRow,
    ReconstructionLog,
    first_windows,
    heal_,
    num_tokens_read,
    reconstruct_blocks_,
)
from kronpress.healing.checkpoints import write_whole
from kronpress.healing.progress import METRICS, metrics_lines
from kronpress.model_card import device_name, versions
from kronpress.pipeline.compressing import Calibrated, agreed, calibrated, compress_loaded_, within_context
from kronpress.pipeline.shown import Passage, chance_energies, choose_passage, decode_speed, token_nats
from kronpress.pipeline.working_folder import (
    STAGE_NOTE,
    check_not_begun,
    mark,
    note_resumption,
    only_run,
)
from kronpress.plan import Plan
from kronpress.planning import check_stages, make_plan, plan_stages
from kronpress.processes import from_main, in_main, is_main, join, wait_for_all
from kronpress.recipe import Budget, Healing, Recipe, Reconstruction, dump_recipe, load_recipe, recipe_names
from kronpress.report import block_line
from kronpress.reporting import run_story, write_report
from kronpress.rivals import RIVALS, Contender, dense_contender
from kronpress.tokens import RunningText, TrainData, data_names, join_documents, load_running_text, load_train_data

RESULTS_FORMAT = 1
PROMPT = "It was a cold evening in November, and the old man"
CONTINUATION_TOKENS = 40
# Where transformers' tensorboard tracker writes, in the folder of the training.
TRACKED = "runs"
# No tokenizer makes less than a token of so many characters of running text.
CHARACTERS_PER_TOKEN = 16


@dataclass(frozen=True)
class Messages:
    """Where a run tells what it is doing."""

    stage: Callable[[str], None]
    healing: Callable[[HealingRow], None]


SILENT = Messages(stage=lambda _: None, healing=lambda _: None)


def run(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    accept_changes: bool = False,
    overwrite: bool = False,
    messages: Messages = SILENT,
    command: list[str] | None = None,
) -> dict[str, Any]:
    """Compress, heal and measure by `recipe`, its rivals too, and write the run directory `out`.

    `out` appears when all is done, with recipe.yaml, plan.json, results.json and model/. Until then a hidden
    folder beside it keeps the training checkpoints (every `healing.save_steps` steps) from which `resume`
    continues, and the rows of the training as they come. No other process may run with the same `out` meanwhile, but
    for those that a launcher started together with this one: they share the fits and the training, and the main one
    alone measures and writes.

    Args:
        command: the command line that asked for the run, kept in results.json.
        resume: continue an interrupted run; start one if there is none; leave a finished one as it is.
        accept_changes: continue even if rates, weights of terms and the like are not those that it began with.

    Returns:
        The content of results.json.

    Raises:
        RequestError: the recipe does not fit the model, `out` is not empty or in use, or `resume` with another recipe.
        WorkError: a step failed; training checkpoints are kept.
    """
    join()
    recipe = within_context(recipe, load_config(recipe.model, recipe.revision))
    out = out.resolve()
    work = out.with_name(f".{out.name}.healing")
    if from_main(lambda: resume and (out / "results.json").is_file() and not work.exists()):
        results: dict[str, Any] = from_main(lambda: json.loads((out / "results.json").read_text(encoding="utf-8")))
        if results["recipe"] != recipe.model_dump(mode="json"):
            raise RequestError(f"{out} is a finished run of another recipe: choose another folder, or --overwrite it")
        messages.stage(f"{out} is a finished run: nothing to do")
        return results
    continues: bool = from_main(lambda: resume and work.exists())
    if not continues:
        from_main(lambda: check_writable(out, overwrite))
    with in_main(lambda: only_run(work)):
        if not continues:
            from_main(lambda: check_not_begun(work, out, overwrite))
        return _run(recipe, out, work, resume, continues, accept_changes, overwrite, messages, command)


def _run(
    recipe: Recipe,
    out: Path,
    work: Path,
    resume: bool,
    continues: bool,
    accept_changes: bool,
    overwrite: bool,
    messages: Messages,
    command: list[str] | None,
) -> dict[str, Any]:
    """`run` where something is to be done and `work` is no other process's; it continues what is in `work` or not."""
    started = time.monotonic()
    rival_recipes = {name: _rival_recipe(name, recipe) for name in recipe.rivals if name not in RIVALS}
    messages.stage(f"loading {recipe.model}")
    teacher = load_model(recipe.model, recipe.revision)
    if recipe.stages:
        check_stages(teacher.model, recipe)
    known: dict[str, Moments] = {}
    data = calibrated(recipe.parts[0], teacher, messages.stage, known)
    plan = agreed(make_plan(teacher.model, recipe.parts[0], data.moments))
    # All plans before any work: a budget that a rival cannot meet is a wrong request.
    final = plan if len(recipe.parts) == 1 else _last_plan(recipe, teacher, plan)
    budget = Budget(params=final.num_params)
    rival_recipes = {name: rival.model_copy(update={"budget": budget}) for name, rival in rival_recipes.items()}
    rival_data = {name: calibrated(rival, teacher, messages.stage, known) for name, rival in rival_recipes.items()}
    rival_plans = {
        name: agreed(make_plan(teacher.model, rival, rival_data[name].moments)) for name, rival in rival_recipes.items()
    }
    texts = _texts(recipe)
    arena = _Arena(
        recipe,
        teacher,
        _train_tokens(teacher.tokenizer, recipe, messages),
        texts,
        choose_passage(texts[0], teacher.tokenizer, longest_context(teacher.model)),
        validation_tokens(teacher.tokenizer, recipe.healing),
        messages,
    )

    rows = [_measure(arena, dense_contender(teacher.model, plan), "dense")]
    from_main(lambda: mark(work, recipe, accept_changes))
    resumed_at_steps = from_main(lambda: note_resumption(work))
    main, stages = _compressed_and_healed(arena, plan, data, known, work, resume, accept_changes)
    rows += [row for stage in stages for row in stage["rows"]]
    final = Plan.model_validate(stages[-1]["plan"])
    rivals: list[dict[str, Any]] = []
    for name in recipe.rivals:
        if name in RIVALS:
            messages.stage(f"making the rival {name}")
            rival = RIVALS[name](copy.deepcopy(teacher.model), final)
            rival_story: dict[str, Any] = {}
        else:
            copied = replace(teacher, model=copy.deepcopy(teacher.model))
            rival_story = {"recipe": rival_recipes[name].model_dump(mode="json")}
            rival_story |= _compress_(arena, copied, rival_recipes[name], rival_plans[name], rival_data[name])
            rival = _contender(rival_recipes[name].name, copied, rival_plans[name])
        if rival.name != "dense":  # measured above
            rows.append(_measure(arena, rival, "compressed"))
        if rival.is_trained:
            # The dense model's own blocks have nothing to reconstruct.
            reconstruction = Reconstruction() if rival.name == "dense" else recipe.reconstruction
            healed, more = _heal(arena, rival, _rival_healing(name, recipe.healing), reconstruction)
            rival_story |= healed
            rows += more
        rivals.append({"rival": name, **rival_story})

    results = {
        "format_version": RESULTS_FORMAT,
        "command": command,
        "model": {"name": teacher.name, "revision": teacher.revision, "dtype": plan.dtype},
        "data": {text.name: text.revision for text in arena.texts},
        "versions": versions(),
        "device": device_name(),
        "seed": recipe.seed,
        "prompt": PROMPT,
        "passage": arena.passage.to_json(),
        "rows": rows,
        "speeds": arena.speeds,
        "recipe": recipe.model_dump(mode="json"),
        "plan": stages[-1]["plan"],
        "layers": {name: report for stage in stages for name, report in stage["layers"].items()},
        "chance": chance_energies(final.layers),
        "reconstruction": stages[-1]["reconstruction"],
        "healing": stages[-1]["healing"],
        "stages": [
            {key: stage[key] for key in ("plan", "layers", "reconstruction", "healing")} for stage in stages[:-1]
        ],
        "rivals": rivals,
        "resumed_at_steps": resumed_at_steps,
        "seconds": time.monotonic() - started,
    }
    if not is_main():
        return results
    # An interrupted run that is continued was allowed to replace what is in `out` when it began.
    replaceable = overwrite or (continues and (out / "results.json").is_file())
    with atomic_folder(out, overwrite=replaceable) as partial:
        (partial / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        (partial / "plan.json").write_text(final.model_dump_json(indent=1) + "\n", encoding="utf-8")
        write_model(
            main.model,
            teacher.tokenizer,
            partial / "model",
            teacher.dtype,
            lambda: run_story(results, base_of(recipe.model, teacher.revision)),
        )
        for number, stage in enumerate(stages, start=1):
            name = METRICS if len(stages) == 1 else f"stage-{number}-{METRICS}"
            rows_of = HealingLog.model_validate(stage["healing"]).rows
            (partial / name).write_text(metrics_lines(rows_of), encoding="utf-8")
        if (work / TRACKED).is_dir():
            shutil.copytree(work / TRACKED, partial / TRACKED)
        (partial / "results.json").write_text(
            json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    # After the run is safe: what the page says can be made again from results.json.
    messages.stage(f"report: {write_report(out)}")
    return results


@dataclass(frozen=True)
class _Arena:
    """What all models of one run have in common: the dense model, the text, and how they are measured."""

    recipe: Recipe
    teacher: LoadedModel
    tokens: TrainData | None
    texts: list[RunningText]
    passage: Passage
    validation: Tensor | None
    messages: Messages
    # Of each model but the dense one, by its name before it was healed, which changes no speed.
    speeds: dict[str, Any] = field(default_factory=dict)


def _last_plan(recipe: Recipe, teacher: LoadedModel, first: Plan) -> Plan:
    """What the last stage will leave, as far as it can be known before the stages before it have run."""
    if not recipe.rivals:
        return first
    if any(part.allocation != "uniform" for part in recipe.parts):
        raise RequestError(
            f"rivals of {recipe.name!r} are to have its size, which is known only when its stages have run, since one "
            "of them measures its allocation: give the rivals runs of their own"
        )
    return plan_stages(teacher.model, recipe)[-1]


def _compressed_and_healed(
    arena: _Arena,
    plan: Plan,
    data: Calibrated,
    known: dict[str, Moments],
    work: Path,
    resume: bool,
    accept_changes: bool,
) -> tuple[Contender, list[dict[str, Any]]]:
    """The teacher's copy after all stages, and of each stage rows, plan, layers' errors and healing as JSON has them.

    Stages that an interrupted run has finished are taken from `work`.

    Args:
        plan, data: those of the first stage.
    """
    recipe, parts = arena.recipe, arena.recipe.parts
    student = replace(arena.teacher, model=copy.deepcopy(arena.teacher.model))
    stages: list[dict[str, Any]] = []
    for number, part in enumerate(parts, start=1):
        folder = work if len(parts) == 1 else work / f"stage-{number}"
        if from_main(lambda folder=folder: (folder / STAGE_NOTE).is_file() and resume):  # type: ignore[misc]
            stages.append(json.loads((folder / STAGE_NOTE).read_text(encoding="utf-8")))
            plan = Plan.model_validate(stages[-1]["plan"])
            student = replace(student, model=load_model(str(folder / "model")).model)
            student.model.config.dtype = arena.teacher.dtype
            continue
        if number > 1:
            data = calibrated(part, student, arena.messages.stage, known)
            plan = agreed(make_plan(student.model, part, data.moments, before=plan))
        name = recipe.name if number == len(parts) else f"{recipe.name}, stage {number} of {len(parts)}"
        story = _compress_(arena, student, part, plan, data, f", stage {number}" if recipe.stages else "")
        contender = _contender(name, student, plan)
        rows = [_measure(arena, contender, "compressed")]
        read = sum(earlier.healing.num_tokens for earlier in parts[: number - 1])
        healed, more = _heal(
            arena,
            contender,
            part.healing,
            part.reconstruction,
            work=folder,
            resume=resume,
            accept_changes=accept_changes,
            read=read,
        )
        stages.append({"rows": rows + more, **story, **healed})
        if number < len(parts) and part.healing.save_steps is not None:
            if is_main():
                write_model(student.model, student.tokenizer, folder / "model", None)
                write_whole(folder / STAGE_NOTE, json.dumps(stages[-1]))
            wait_for_all()
            student.model.config.dtype = arena.teacher.dtype  # that of the working precision was written there
    return contender, stages


def _contender(name: str, loaded: LoadedModel, plan: Plan) -> Contender:
    return Contender(name, loaded.model, plan.num_params, plan.bytes, plan.flops_per_token)


def _compress_(
    arena: _Arena, loaded: LoadedModel, recipe: Recipe, plan: Plan, data: Calibrated, stage: str = ""
) -> dict[str, Any]:
    """Compress in place, rounded as it will be stored; what results.json says of it.

    Args:
        stage: what is told of the stage after the recipe's name.
    """
    set_seed(recipe.seed)
    arena.messages.stage(f"compressing by {recipe.name}{stage}")
    layers = compress_loaded_(loaded, plan, data, messages=arena.messages.stage)
    _round_to_(loaded.model, arena.teacher.dtype)
    return {
        "plan": plan.model_dump(mode="json"),
        "layers": {name: report.model_dump(mode="json") for name, report in layers.items()},
    }


def _heal(
    arena: _Arena,
    contender: Contender,
    healing: Healing,
    reconstruction: Reconstruction,
    work: Path | None = None,
    resume: bool = False,
    accept_changes: bool = False,
    read: int = 0,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train the contender in place, block by block if that is asked for and then as a whole.

    Returns:
        What results.json says of both, with the tokens of both in the healing's, and the row of what the contender
        became if there was any training.

    Args:
        read: how many of the tokens it was trained on before; it is trained on the next, or on all if they are too few.
    """
    needed = num_tokens_read(healing, reconstruction)
    data = TrainData.of(torch.empty(0)) if arena.tokens is None else arena.tokens.after(read, needed)
    reconstructed = _reconstruct_(arena, contender, data, healing, reconstruction, work, resume)
    arena.messages.stage(f"healing {contender.name}, {healing.num_steps} steps")
    log = heal_(
        contender.model,
        arena.teacher.model,
        data,
        healing,
        seed=arena.recipe.seed,
        work_dir=work,
        resume=resume,
        accept_changes=accept_changes,
        validation_tokens=arena.validation,
        progress=arena.messages.healing,
        messages=arena.messages.stage,
    )
    story: dict[str, Any] = {"reconstruction": None, "healing": log.model_dump(mode="json")}
    if reconstructed is not None:
        by_blocks, row = reconstructed
        story["reconstruction"] = {**by_blocks.model_dump(mode="json"), "metrics": row["metrics"]}
        story["healing"]["tokens"] += by_blocks.tokens
    if log.num_steps == 0:
        return story, [] if reconstructed is None else [row]
    _round_to_(contender.model, arena.teacher.dtype)
    return story, [_measure(arena, contender, "healed")]


def _reconstruct_(
    arena: _Arena,
    contender: Contender,
    data: TrainData,
    healing: Healing,
    settings: Reconstruction,
    work: Path | None,
    resume: bool,
) -> tuple[ReconstructionLog, dict[str, Any]] | None:
    """Reconstruct the contender's blocks in place, on the first windows of its healing, if that is asked for.

    Returns:
        The log, and the row of what the contender became.
    """
    if settings.steps == 0:
        return None
    arena.messages.stage(f"reconstructing the blocks of {contender.name}, {settings.steps} steps each")
    log = reconstruct_blocks_(
        contender.model,
        arena.teacher.model,
        first_windows(data, healing.sequence_length, arena.recipe.seed, settings.windows),
        settings,
        seed=arena.recipe.seed,
        work_dir=work,
        resume=resume,
        progress=lambda report: arena.messages.stage(block_line(report)),
        messages=arena.messages.stage,
    )
    arena.messages.stage(f"reconstructed on {log.tokens:,} tokens, which count as healing's, in {log.seconds:.0f} s")
    _round_to_(contender.model, arena.teacher.dtype)
    return log, _measure(arena, contender, "reconstructed")


def _rival_recipe(name: str, recipe: Recipe) -> Recipe:
    """The recipe `name` on the model of `recipe`, to be healed and measured as `recipe` says."""
    if name not in recipe_names() and not Path(name).is_file():
        raise unknown_name("rival", name, [*RIVALS, *recipe_names()])
    rival = load_recipe(name)
    if rival.stages:
        raise RequestError(f"rival {name!r} has stages: give it a run of its own")
    kept = ("model", "revision", "seed", "calibration", "reconstruction", "healing", "evaluation")
    changes = {key: getattr(recipe, key) for key in kept}
    if name in recipe_names() and not rival.has_fixed_sizes:  # any targets will do for it
        changes["targets"] = recipe.all_targets
    return rival.model_copy(update=changes)


def _rival_healing(name: str, healing: Healing) -> Healing:
    """The dense model is trained on the text, not distilled into itself; a map is for as many blocks as there are."""
    healing = healing.model_copy(update={"layer_map": None}) if name == "blocks" else healing
    if name != "dense":
        return healing
    no_teacher = dict.fromkeys(healing.teacher_weights, 0.0)
    return healing.model_copy(update={"language_model_weight": 1.0, **no_teacher, "schedule": {}})


def _round_to_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round the weights to the checkpoint's dtype: what is measured is what will be stored."""
    cast_parameters_(model, dtype)
    cast_parameters_(model, torch.float32)


def _train_tokens(tokenizer: PreTrainedTokenizerBase, recipe: Recipe, messages: Messages) -> TrainData | None:
    """What the recipe heals on; None if it does not heal."""
    healing = recipe.healing
    needed = max(num_tokens_read(healing, part.reconstruction) for part in recipe.parts)
    if needed == 0:
        return None
    messages.stage(f"reading {data_names(healing.data)}")
    return load_train_data(tokenizer, healing.data, needed, healing.sequence_length)


def validation_tokens(tokenizer: PreTrainedTokenizerBase, healing: Healing) -> Tensor | None:
    """The first tokens (num_tokens,) of the validation text that the recipe names, if it names one."""
    if healing.validation_data is None or healing.num_steps == 0:
        return None
    names = [healing.validation_data] if isinstance(healing.validation_data, str) else healing.validation_data
    documents = [document for name in names for document in load_running_text(name, "validation").documents]
    text = join_documents(documents)[: CHARACTERS_PER_TOKEN * healing.validation_tokens]
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])[: healing.validation_tokens]


def _texts(recipe: Recipe) -> list[RunningText]:
    data = recipe.evaluation.data
    return [load_running_text(name, "test") for name in ([data] if isinstance(data, str) else data)]


def _measure(arena: _Arena, contender: Contender, stage: str) -> dict[str, Any]:
    """One row of the table, measured by the main process; `stage` is dense, compressed, reconstructed or healed."""
    row: dict[str, Any] = from_main(lambda: _measured(arena, contender, stage))
    return row


def _measured(arena: _Arena, contender: Contender, stage: str) -> dict[str, Any]:
    trained = "trained further" if contender.name == "dense" else "healed"
    name = f"{contender.name}, {trained}" if stage in ("healed", "reconstructed") else contender.name
    arena.messages.stage(f"measuring {name}")
    evaluation, tokenizer = arena.recipe.evaluation, arena.teacher.tokenizer
    metrics = {
        text.name: evaluate(
            contender.model,
            tokenizer,
            text.documents,
            evaluation.protocol,
            evaluation.window,
            evaluation.stride,
            evaluation.bos,
        ).to_json()
        for text in arena.texts
    }
    # Healing changes no speed, and numbers that are merely rounded have none of their own.
    if evaluation.speed and stage == "compressed" and contender.is_trained:
        arena.messages.stage(f"timing {name}")
        arena.speeds[name] = decode_speed(contender.model, arena.teacher.model)
    return {
        "name": name,
        "stage": stage,
        "num_params": contender.num_params,
        "bytes": contender.bytes,
        "flops_per_token": contender.flops_per_token,
        "metrics": metrics,
        "continuation": continue_text(contender.model, tokenizer, PROMPT),
        "passage_nats": token_nats(contender.model, arena.passage),
    }


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
