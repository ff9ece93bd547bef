"""`heal_`: the training itself, a `transformers.Trainer` whose batch is a whole optimiser step."""

from __future__ import annotations

import copy
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model as load_safetensors
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.trainer_callback import PrinterCallback

from kronpress.errors import RequestError, Terminated, WorkError, unknown_name
from kronpress.evaluation import longest_context, num_embeddings
from kronpress.families import FAMILIES
from kronpress.healing.blocks import checkpointed, compiled, copy_weights_, shard_
from kronpress.healing.checkpoints import (
    checkpoint_step,
    checkpoints,
    find_damage,
    newest_checkpoint,
    only_one,
    retire,
    sweep,
)
from kronpress.healing.chunks import Head, find_head
from kronpress.healing.inner_states import eager_attention, matched_places
from kronpress.healing.memory import TrainingMemory, training_memory
from kronpress.healing.progress import (
    HealingLog,
    HealingRow,
    MetricsFile,
    Progress,
    check_changes,
    differences,
)
from kronpress.healing.teacher_logits import TeacherLogits, WithTeacher
from kronpress.healing.trainer import PROGRESS, HealingTrainer, divergences
from kronpress.processes import (
    any_of,
    from_main,
    give_,
    in_main,
    is_main,
    is_to_shard,
    join,
    num_processes,
    only_main,
    process_number,
    wait_for_all,
)
from kronpress.recipe import Healing
from kronpress.surgery import healing_parametrizations
from kronpress.tokens import TrainData, Windows, pack


def heal_(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    train_tokens: Tensor | TrainData,
    healing: Healing,
    *,
    seed: int = 0,
    work_dir: Path | None = None,
    resume: bool = False,
    accept_changes: bool = False,
    validation_tokens: Tensor | None = None,
    progress: Callable[[HealingRow], None] | None = None,
    messages: Callable[[str], None] = lambda _: None,
) -> HealingLog:
    """Train `model` in place through `transformers.Trainer`; dropout is off.

    loss = language_model_weight · language_model_loss
        + distillation_weight · distillation_loss with forward_kl
        + reverse_distillation_weight · distillation_loss with reverse_kl
        + jensen_shannon_weight · distillation_loss with jensen_shannon
        + embedding_weight · state_loss of what enters the first block
        + attention_weight · Σ_i attention_loss of the attention maps of block i and of the teacher's block matching it
        + hidden_weight · Σ_i state_loss of the hidden states after these blocks

    The first four are means over all tokens but the last of each sequence, the others over all tokens, and the sums go
    over the student's blocks i; `match_blocks` says which block of the teacher matches. With attention_weight both
    models attend by the implementation `eager` while the student trains. Where a weight is 0 its term costs nothing,
    but for the language model's. `healing.schedule` gives weights that change from step to step. The logits are never
    all in memory at once if the heads of the models are understood; `messages` is told if not.

    Where a launcher has started several processes, all of them call this with the same arguments. Each takes its share
    of the sequences of every step, and all end with the same weights; the main one alone writes files and calls
    `progress` and `messages`.

    Args:
        teacher: the dense model; may be None if only `healing.language_model_weight` is not 0.
        train_tokens: one stream of token ids (num_tokens,), cut into sequences and shuffled by `seed`; or data with
            weights and conversations. Where some tokens do not count, the terms of the logits are means over the
            others of a step.
        work_dir: where training checkpoints go every `healing.save_steps` steps, and the rows as they come, in
            metrics.jsonl. No other process may train there meanwhile. On SIGTERM a checkpoint is written and the
            training stops. Without `resume`, checkpoints that are there are deleted.
        resume: continue from the newest training checkpoint in `work_dir` that is whole, if there is one.
        accept_changes: continue even if rates, weights of terms and the like are not those it began with.
        validation_tokens: token ids (num_tokens,) whose first `healing.validation_tokens` the model is measured on
            where it is saved, and at the end.
        progress: called about fifty times in all, and where the model is measured.
        messages: told what is done otherwise than one would expect, and why.

    Raises:
        RequestError: no teacher where one is needed, vocabularies that differ, what `matched_places` refuses, too
            little text, a token in it that the model does not know, an unknown tracker, a folder in use, or a training
            to be resumed that began with other settings.
        WorkError: too many steps in a row could not be taken, a weight to be saved is not finite, or a file could not
            be written; training checkpoints stay.
        Terminated: SIGTERM came; the checkpoint was written.
    """
    join()
    progress = None if progress is None else only_main(progress)
    messages = only_main(messages)
    num_steps = healing.num_steps
    _check_processes(healing)
    asked = [name for name, weight in healing.teacher_weights.items() if weight > 0]
    if asked:
        if teacher is None:
            raise RequestError(f"{asked[0]} is not 0 and there is no teacher")
        sizes = num_embeddings(model), num_embeddings(teacher)
        if sizes[0] != sizes[1]:
            raise RequestError(f"student and teacher have vocabularies of {sizes[0]} and {sizes[1]} tokens")
        matched_places(model, teacher, healing)
    limit = longest_context(model)
    if limit is not None and healing.sequence_length > limit:
        raise RequestError(f"healing.sequence_length {healing.sequence_length}: the model reads at most {limit}")
    if num_steps == 0:
        return HealingLog(num_steps=0, tokens=0, seconds=0.0, resumed_at_step=None, rows=[])
    check_trackers(healing.report_to)
    data = train_tokens if isinstance(train_tokens, TrainData) else TrainData.of(train_tokens)
    cache = None
    if asked and healing.teacher_cache:
        assert teacher is not None
        data = data.whole(healing.sequence_length)  # in every epoch the windows that the cache has
        cache = _teacher_cache(teacher, data, healing, messages)
    windows = data.windows(healing.sequence_length, seed)
    validation = None
    if validation_tokens is not None:
        validation = pack(validation_tokens[: healing.validation_tokens], healing.sequence_length)
    elif healing.end_with == "best":
        raise RequestError("healing.end_with is best and there are no validation tokens to tell the best by")
    known, largest = num_embeddings(model), windows.largest()
    if validation is not None:
        largest = max(largest, int(validation.max()))
    if known is not None and largest >= known:
        raise RequestError(f"token {largest} in the text: the model knows {known} tokens")

    expected = expected_memory(model, teacher if asked else None, healing)
    if expected is not None:
        messages(f"healing takes about {expected}")
    switched = [each for each in (model, teacher) if each is not None and "attention_weight" in asked]
    with ExitStack() as during:
        if work_dir is None:
            made = during.enter_context(tempfile.TemporaryDirectory()) if is_main() else ""
            folder = Path(from_main(lambda: made))
        else:
            folder = work_dir
            during.enter_context(in_main(lambda: only_one(folder)))
            from_main(lambda: sweep(folder))
        during.enter_context(healing_parametrizations(model))
        during.enter_context(eager_attention(switched))
        checkpoint = _checkpoint_to_resume(folder, resume, messages)
        settings = {} if work_dir is None else _settings(healing, windows, seed)
        state = Progress(settings=settings)
        if checkpoint is not None:
            state = Progress.model_validate_json((checkpoint / PROGRESS).read_text(encoding="utf-8"))
            check_changes(differences(state.settings, settings), repr(str(folder)), accept_changes)
            state.settings = settings
        metrics = None if work_dir is None or not is_main() else MetricsFile(folder, state.rows)
        resumed_at = None if checkpoint is None else checkpoint_step(checkpoint)
        if checkpoint is not None and resumed_at == num_steps:
            # Trainer would train one step more.
            load_safetensors(model, checkpoint / "model.safetensors")
        else:
            live_teacher = teacher if asked and cache is None else None
            student = model
            if _is_to_shard(healing):
                if checkpoint is not None:
                    load_safetensors(model, checkpoint / "model.safetensors")
                student = copy.deepcopy(model)
            places = matched_places(student, teacher, healing) if asked and teacher is not None else ({}, {})
            heads, whole_logits = _heads(student, live_teacher, healing)
            if whole_logits is not None:
                messages(f"the logits of all tokens of a pass are in memory at once: {whole_logits}")
            use_cache = model.config.use_cache
            arguments = _training_arguments(model, healing, num_steps, seed, str(folder))
            trained = during.enter_context(_blocks_changed(student, live_teacher, healing))
            if trained is not model:
                shard_(trained, arguments.device)
            trainer = HealingTrainer(
                model=trained,
                original=model,
                args=arguments,
                train_dataset=windows if cache is None else WithTeacher(windows, cache),
                teacher=live_teacher,
                healing=healing,
                places=places,
                heads=heads,
                progress=state,
                validation=validation,
                metrics=metrics,
                report=progress,
                messages=messages,
            )
            trainer.remove_callback(PrinterCallback)  # it writes to standard output
            modes = [(each, each.training) for each in (model, teacher) if each is not None]
            try:
                if cache is not None:
                    _fill(cache, windows, trainer, messages)
                with trainer.loss_as_forward():
                    _train(trainer, checkpoint, is_kept=work_dir is not None)
                if trained is not model:
                    copy_weights_(model, trained)
            except WorkError as error:
                kept = None if work_dir is None else newest_checkpoint(work_dir)
                if kept is None or isinstance(error, Terminated):
                    raise
                raise WorkError(f"{error}; the training checkpoint of step {checkpoint_step(kept)} is kept") from error
            finally:
                for each, training in modes:
                    each.train(training)
                model.config.use_cache = use_cache  # Trainer leaves behind none in generate
            state.seconds += trainer.seconds
        if healing.end_with == "best":
            if is_main():
                _load_best(model, folder, state, messages)
            give_(model.parameters())
        wait_for_all()
    return HealingLog(
        num_steps=num_steps,
        tokens=healing.num_tokens,
        seconds=state.seconds,
        resumed_at_step=resumed_at,
        rows=state.rows,
        skipped_steps=state.skipped_steps,
        best_step=state.best_step,
        best_validation_nats=state.best_validation_nats,
    )


def expected_memory(
    student: PreTrainedModel, teacher: PreTrainedModel | None, healing: Healing
) -> TrainingMemory | None:
    """What `heal_` with these arguments will take, from shapes alone: models on the meta device will do.

    None of models that cannot be run without numbers.
    """
    is_compared = any(healing.teacher_weights.values()) and not healing.teacher_cache
    try:
        return training_memory(
            student,
            teacher if is_compared else None,
            healing,
            divergences(healing),
            num_processes=num_processes(),
            is_sharded=_is_to_shard(healing),
            in_bfloat16=_in_bfloat16(healing),
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
    except RequestError:
        raise
    except Exception:  # whatever a model's own code does with numbers that are not there; training does without this
        return None


def check_trackers(names: list[str]) -> None:
    """Refuse trackers that transformers does not know, or whose package is not installed."""
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise unknown_name("tracker in healing.report_to", name, INTEGRATION_TO_CALLBACK)
        if name not in get_available_reporting_integrations():
            raise RequestError(f"healing.report_to names {name!r}: its package is not installed")


def _checkpoint_to_resume(folder: Path, resume: bool, messages: Callable[[str], None]) -> Path | None:
    """The newest whole training checkpoint, if the training is to be resumed; those that would be in the way go."""

    def chosen() -> str | None:
        checkpoint = newest_checkpoint(folder, messages) if resume else None
        for other in checkpoints(folder):
            if checkpoint is None or checkpoint_step(other) > checkpoint_step(checkpoint):
                retire(other)
        return None if checkpoint is None else checkpoint.name

    name = from_main(chosen)
    if name is None:
        return None
    if not (folder / name).is_dir():
        raise WorkError(
            f"process {process_number()} does not see {str(folder / name)!r}: to go on from there, all machines need "
            "one file system"
        )
    return folder / name


def _settings(healing: Healing, windows: Windows, seed: int) -> dict[str, Any]:
    """All that decides how a training goes, but the models."""
    return {
        "seed": seed,
        "training text": [stream.digest() for stream in windows.streams],
        **{f"healing.{name}": value for name, value in healing.model_dump(mode="json").items()},
    }


def _teacher_cache(
    teacher: PreTrainedModel, data: TrainData, healing: Healing, messages: Callable[[str], None]
) -> TeacherLogits:
    """The cache of what the terms of the logits need of the teacher, with or without windows; its size is told."""
    cache = TeacherLogits(
        teacher, data, healing.sequence_length, healing.distillation_top_k, temperature=healing.temperature
    )
    messages(
        f"the teacher's logits of {len(cache)} windows, {cache.k} tokens at each position, take "
        f"{cache.num_bytes / 1e6:,.1f} MB: {str(cache.path)!r}"
    )
    return cache


def _fill(cache: TeacherLogits, windows: Windows, trainer: HealingTrainer, messages: Callable[[str], None]) -> None:
    """Let the teacher read those windows of the training that the cache has not, each process its share."""
    healing = trainer.healing
    used = sorted({cache.number(*windows.place(i)) for i in range(healing.num_tokens // healing.sequence_length)})
    missing = cache.missing(used)
    if missing:
        messages(f"the teacher reads {len(missing)} of {len(used)} windows; the cache has the others")
    per_pass = healing.sequences_per_pass or healing.sequences_per_step
    wait_for_all()  # before any of them is written
    with cache.teacher_on(trainer.args.device), trainer.accelerator.autocast():
        cache.fill(missing[process_number() :: num_processes()], per_pass)
    wait_for_all()


def _train(trainer: HealingTrainer, checkpoint: Path | None, is_kept: bool) -> None:
    """Train to the end, or until SIGTERM if there is a folder that keeps checkpoints."""

    def stop() -> None:
        trainer.is_to_stop = True

    with ExitStack() as during:
        during.enter_context(warnings.catch_warnings())
        for told in ("Grad strides do not match", "`broadcast_buffers` is deprecated"):  # by DDP, of what is meant
            warnings.filterwarnings("ignore", message=told)
        if is_kept:
            during.enter_context(_on_sigterm(stop))
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if not any_of(trainer.is_to_stop):
            return
        step, folder = trainer.state.global_step, Path(str(trainer.args.output_dir))
        if not from_main(lambda: (folder / f"checkpoint-{step}").exists()):  # it came with the last step
            trainer._save_checkpoint(trainer.model_wrapped, None)
    raise Terminated(
        f"SIGTERM after step {step} of {trainer.state.max_steps}: its training checkpoint is kept in {str(folder)!r}, "
        "and --resume goes on from it"
    )


@contextmanager
def _on_sigterm(call: Callable[[], None]) -> Iterator[None]:
    """Inside the block the first SIGTERM calls `call`, and a second one does what it did before."""
    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or before is None:  # not ours to change
        yield
        return

    def handle(*_: Any) -> None:
        signal.signal(signal.SIGTERM, before)
        call()

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _load_best(model: PreTrainedModel, folder: Path, state: Progress, messages: Callable[[str], None]) -> None:
    """Give the model the weights that were best on the validation text."""
    best = folder / f"checkpoint-{state.best_step}"
    damage = find_damage(best)
    if damage is None:
        load_safetensors(model, best / "model.safetensors")
    else:
        messages(f"the best training checkpoint {str(best)!r} is damaged, and the last weights are used: {damage}")


def _heads(
    model: PreTrainedModel, teacher: PreTrainedModel | None, healing: Healing
) -> tuple[tuple[Head | None, Head | None], str | None]:
    """Of student and teacher the heads, both or neither, and why they are not used unless that was asked for."""
    if healing.chunk_tokens == 0:
        return (None, None), None
    student_head, teacher_head = find_head(model), None if teacher is None else find_head(teacher)
    for found in (student_head, teacher_head):
        if isinstance(found, str):
            return (None, None), found
    return (student_head, teacher_head), None  # type: ignore[return-value]


def _check_processes(healing: Healing) -> None:
    """Refuse steps that the processes cannot share evenly."""
    for size in dict.fromkeys(part.sequences_per_step for part in healing.parts):
        if size % num_processes():
            raise RequestError(
                f"healing.sequences_per_step {size}: {num_processes()} processes cannot share the sequences of a step "
                f"evenly; a multiple of {num_processes()} is needed"
            )


def _is_to_shard(healing: Healing) -> bool:
    """Whether the recipe asks for it, or the configuration of `accelerate launch`; of one process nothing is split."""
    return num_processes() > 1 and (healing.sharded or is_to_shard())


@contextmanager
def _blocks_changed(
    student: PreTrainedModel, teacher: PreTrainedModel | None, healing: Healing
) -> Iterator[PreTrainedModel]:
    """Inside the block the student's blocks are recomputed, and those of both compiled, as far as it is asked for."""
    with ExitStack() as during:
        if healing.compile:
            during.enter_context(compiled([student] if teacher is None else [student, teacher]))
        if healing.gradient_checkpointing:
            during.enter_context(checkpointed(student))
        yield student


def _in_bfloat16(healing: Healing) -> bool:
    on_gpu = torch.cuda.is_available()
    if healing.precision == "bfloat16" and on_gpu and not torch.cuda.is_bf16_supported():
        raise RequestError(f"healing.precision is bfloat16: {torch.cuda.get_device_name()} has none")
    return healing.precision == "bfloat16" or (
        healing.precision == "auto" and on_gpu and torch.cuda.is_bf16_supported()
    )


def _training_arguments(
    model: PreTrainedModel, healing: Healing, num_steps: int, seed: int, folder: str
) -> TrainingArguments:
    on_gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=num_steps,
        weight_decay=healing.weight_decay,
        bf16=_in_bfloat16(healing),
        use_cpu=not on_gpu,
        # Of a model with experts, say, a pass may not reach every weight.
        ddp_find_unused_parameters=model.config.model_type not in FAMILIES,
        ddp_broadcast_buffers=False,  # nothing changes them
        seed=seed,
        logging_steps=max(1, num_steps // 50),
        logging_nan_inf_filter=False,
        save_strategy="no" if healing.save_steps is None else "steps",
        save_steps=healing.save_steps or num_steps,
        remove_unused_columns=False,
        dataloader_pin_memory=on_gpu,
        disable_tqdm=True,
        report_to=healing.report_to or "none",
    )
    assert arguments.device is not None  # it is looked for first, and with it the number that follows
    arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs are for several processes
    return arguments
