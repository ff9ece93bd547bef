"""The Trainer whose batch is a whole optimiser step: its loss, which steps are taken, and what it keeps of itself."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from kronpress.errors import WorkError
from kronpress.healing.blocks import copy_weights_, is_sharded, split_state, whole_state
from kronpress.healing.checkpoints import PARTIAL, keep_only, publish
from kronpress.healing.chunks import Head, chunked_terms, without_logits
from kronpress.healing.inner_states import TERMS, Places, States, captured, compared
from kronpress.healing.losses import Divergence, TopLogits, forward_kl, jensen_shannon, logit_terms, reverse_kl
from kronpress.healing.optimizers import make_optimizer, parameter_groups
from kronpress.healing.progress import HealingRow, MetricsFile, Progress, why_not_to_step
from kronpress.healing.teacher_logits import top_of
from kronpress.processes import (
    any_of,
    is_main,
    not_finite,
    num_processes,
    process_number,
    summed,
    wait_for_all,
    whole,
)
from kronpress.recipe import Healing
from kronpress.tokens.order import share

# What a training checkpoint has beside what Trainer writes.
PROGRESS = "progress.json"
# The column of HealingRow that has each term, by the recipe's name of its weight.
COLUMNS = {
    "language_model_weight": "language_model_nats",
    "distillation_weight": "distillation_nats",
    "reverse_distillation_weight": "reverse_distillation_nats",
    "jensen_shannon_weight": "jensen_shannon_nats",
    **{name: term.column for name, term in TERMS.items()},
}


def divergences(healing: Healing) -> dict[str, Divergence]:
    """Those of the logits that have a weight, by their columns of HealingRow."""
    known: dict[str, Divergence] = {
        "distillation_weight": forward_kl,
        "reverse_distillation_weight": reverse_kl,
        "jensen_shannon_weight": partial(jensen_shannon, teacher_share=healing.jensen_shannon_teacher_share),
    }
    return {COLUMNS[name]: each for name, each in known.items() if healing.teacher_weights[name] > 0}


def learning_rates(healing: Healing) -> list[float]:
    """The rate of every step: in each phase a linear rise from 0 to its peak, then a cosine to its final rate."""
    rates = []
    for part in healing.parts:
        num_steps = part.max_steps or 0
        warmup = min(part.warmup_steps, num_steps // 2)
        for step in range(num_steps):
            if step < warmup:
                rate = step / warmup
            else:
                falling = (1 + math.cos(math.pi * (step - warmup) / (num_steps - warmup))) / 2
                rate = part.final_learning_rate + (1 - part.final_learning_rate) * falling
            rates.append(part.learning_rate * rate)
    return rates


class _Steps(Sampler[list[int]]):
    """The numbers of this process's windows of every step, all phases after one another."""

    def __init__(self, healing: Healing) -> None:
        self.parts = healing.parts

    def __len__(self) -> int:
        return sum(part.max_steps or 0 for part in self.parts)

    def __iter__(self) -> Iterator[list[int]]:
        first = 0
        for part in self.parts:
            for _ in range(part.max_steps or 0):
                windows = range(first, first + part.sequences_per_step)
                yield list(share(windows, process_number(), num_processes()))
                first += part.sequences_per_step


class _Counted(NamedTuple):
    """Which tokens of a pass count, of all but the first of each sequence, and how much their mean does.

    A mean over the step is the mean over all processes' passes of `share` times the mean over the pass.
    """

    tokens: Tensor  # (tokens,)
    share: float


def _counted(counted: Tensor | None, sequences_per_pass: int, num_passes: int) -> list[_Counted | None]:
    """Of each pass, from which tokens count (sequences, sequence_length); None where all do."""
    if counted is None:
        return [None] * num_passes
    passes = [each.flatten() for each in counted[:, 1:].split(sequences_per_pass)]
    numbers = [int(each.sum()) for each in passes]
    for each, number in zip(passes, numbers, strict=True):
        each[0] |= number == 0  # a mean of nothing has no value, one of a single token that weighs 0 has
    usual = max(1.0, summed([sum(numbers)])[0]) / num_processes() / counted[:, 1:].numel()
    return [_Counted(each, number / len(each) / usual) for each, number in zip(passes, numbers, strict=True)]


def _split(top: TopLogits | None, sequences_per_pass: int, num_passes: int) -> list[TopLogits | None]:
    """What is kept of the teacher (sequences, sequence_length − 1, …) as that of each pass, (tokens, …)."""
    if top is None:
        return [None] * num_passes
    return [
        TopLogits(*parts)
        for parts in zip(
            *([part.flatten(0, 1) for part in each.split(sequences_per_pass)] for each in top), strict=True
        )
    ]


class _Pass(NamedTuple):
    """What a pass through a model leaves: of all tokens but the last of each sequence, what its head reads or gives."""

    given: Tensor  # (tokens, width), or (tokens, vocab)
    states: States


class HealingTrainer(Trainer):
    """A Trainer whose loss is the weighted sum of the healing terms, and whose batch is the whole of a step.

    A step whose loss or gradient is not finite, or whose loss is a spike, is not taken: neither weights nor optimiser
    change, and the rate goes on as if it had been. Checkpoints are those of `checkpoints.py`.
    """

    def __init__(
        self,
        *args: Any,
        original: PreTrainedModel,
        teacher: PreTrainedModel | None,
        healing: Healing,
        places: tuple[Places, Places],
        heads: tuple[Head | None, Head | None],
        progress: Progress,
        validation: Tensor | None,
        metrics: MetricsFile | None,
        report: Callable[[HealingRow], None] | None,
        messages: Callable[[str], None],
        **kwargs: Any,
    ) -> None:
        """Args not of Trainer:

        original: the model, or where that is split over the processes the one that it is a copy of.
        progress: what is known so far, which grows.
        validation: the sequences (sequences, sequence_length) on which the model is measured where it is saved, if any.
        metrics, report: who gets each row.
        """
        super().__init__(*args, **kwargs)
        self.healing = healing
        self.teacher = None if teacher is None else teacher.to(self.args.device)  # type: ignore[arg-type]
        self.places, self.teacher_places = places
        self.head, self.teacher_head = heads
        self.divergences = divergences(healing)
        self.progress, self.validation = progress, validation
        self.metrics, self.report, self.messages = metrics, report, messages
        self.is_to_stop = False  # as soon as this step is done and saved
        self.first_step, self.started = 0, time.monotonic()
        assert self.model is not None
        self.original, self.student = original, self.model
        self._student_forward = self.student.forward
        self._step_terms: dict[str, float] = {}
        self._partial: Path | None = None
        per_step = [part.tokens_per_step for part in healing.parts for _ in range(part.max_steps or 0)]
        self._tokens_after = [0, *accumulate(per_step)]
        self.add_callback(_Flow(self))

    def get_train_dataloader(self) -> DataLoader[Any]:
        # Not prepared by accelerate, which would give each process whole steps of its own.
        steps = _Steps(self.healing)
        return DataLoader(self.train_dataset, batch_sampler=steps, pin_memory=self.args.dataloader_pin_memory)  # type: ignore[arg-type]

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        # The optimiser was made with args.learning_rate, which LambdaLR multiplies.
        rates = [rate / self.args.learning_rate for rate in learning_rates(self.healing)]
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer,  # type: ignore[arg-type]
            lambda step: rates[min(step, num_training_steps - 1)],
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            groups = parameter_groups(model, self.healing, self.args.learning_rate)
            _, of_adamw = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = make_optimizer(self.healing.optimizer, groups, **of_adamw)
        return self.optimizer

    # ---- a step ----

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        # No dropout: the student is to agree with the teacher, not to be regularised.
        model.eval()
        inputs = self._prepare_inputs(inputs)
        ids = inputs["input_ids"]
        per_pass = self.healing.sequences_per_pass or len(ids)
        passes = ids.split(per_pass)
        all_counted = _counted(inputs.get("counted"), per_pass, len(passes))
        tops = _split(top_of(inputs), per_pass, len(passes))
        sums: dict[str, Tensor] = {}
        for number, (sequences, counted, top) in enumerate(zip(passes, all_counted, tops, strict=True), start=1):
            # Gradients go from process to process once a step.
            with nullcontext() if number == len(passes) else self._without_exchange(model):
                loss, means = model(sequences, counted, top)
                smaller = len(ids) / len(sequences)
                self.accelerator.backward(loss / smaller)
            for column, value in {"loss": loss, **means}.items():
                sums[column] = sums.get(column, 0.0) + value.detach().float() / smaller
        # One transfer from the device for all terms; all processes judge the step by the same numbers.
        values = self.accelerator.reduce(torch.stack(list(sums.values())), "mean").tolist()
        self._step_terms = dict(zip(sums, values, strict=True))
        return torch.zeros((), device=ids.device)  # what Trainer itself would log

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = whole(super()._clip_grad_norm(model))
        wrong = why_not_to_step(
            self._step_terms["loss"], float(norm), self.progress.recent_losses, self.healing.spike_factor
        )
        if not wrong:
            self.progress.take(self._step_terms)
            return norm
        model.zero_grad(set_to_none=True)  # an optimiser passes over what has no gradient
        self.progress.skip()
        step, in_a_row = self.state.global_step, self.progress.skipped_in_a_row
        self.messages(f"step {step + 1} is skipped: the {wrong}")
        if in_a_row >= min(self.healing.max_skipped_steps, self.state.max_steps):
            raise WorkError(
                f"{in_a_row} steps in a row could not be taken, at the last, step {step + 1}, the {wrong}: "
                "try a lower rate"
            )
        return torch.zeros_like(norm)

    @contextmanager
    def loss_as_forward(self) -> Iterator[None]:
        """Inside the block a call of the student is one of `_loss`.

        What wraps the student for several processes gathers weights before such a call and exchanges gradients after
        its backward pass, and so has to see every use of a weight, the head's on chunks of tokens too.
        """

        def forward(*args: Any, **kwargs: Any) -> Any:  # a method would be taken for the student's own
            with self.accelerator.autocast():
                return self._loss(*args, **kwargs)

        own = vars(self.student).get("forward")
        self.student.forward = forward
        if is_sharded(self.student):
            vars(self.student)["_is_accelerate_prepared"] = True  # which wraps nothing around it then
        try:
            yield
        finally:
            # Trainer leaves behind mixed precision wrapped around it.
            for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
                vars(self.student).pop(name, None)
            if own is not None:
                self.student.forward = own

    @contextmanager
    def _without_exchange(self, model: nn.Module) -> Iterator[None]:
        """Inside the block gradients are added up in this process alone."""
        if not is_sharded(model):
            with self.accelerator.no_sync(model):
                yield
            return
        model.set_requires_gradient_sync(False)  # type: ignore[operator]
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)  # type: ignore[operator]

    def _loss(
        self,
        ids: Tensor,
        counted: _Counted | None = None,
        top: TopLogits | None = None,
        validates: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss over the sequences ids (sequences, sequence_length), and its terms by their columns.

        Args:
            top: what is kept of the teacher at these sequences, instead of the teacher.
            validates: of the language model alone.
        """
        if validates:
            student = self._pass(self._student_forward, self.head, {}, ids)
            return self._logits_loss(student, None, ids[:, 1:].flatten(), dict.fromkeys(COLUMNS.values(), 0.0))
        by_name = self.healing.weights_at(self.state.global_step / max(1, self.state.max_steps - 1))
        weights = {column: by_name[name] for name, column in COLUMNS.items()}
        student = self._pass(self._student_forward, self.head, self.places, ids)
        teacher = None
        if self.teacher is not None:
            self.teacher.eval()
            with torch.no_grad():
                teacher = self._pass(self.teacher, self.teacher_head, self.teacher_places, ids)
        targets = ids[:, 1:].flatten()
        if counted is not None:
            targets = targets[counted.tokens]
            student = student._replace(given=student.given[counted.tokens])
            teacher = None if teacher is None else teacher._replace(given=teacher.given[counted.tokens])
            top = None if top is None else TopLogits(*(each[counted.tokens] for each in top))
        loss, means = self._logits_loss(student, teacher if top is None else top, targets, weights)
        if counted is not None:
            loss, means = counted.share * loss, {name: counted.share * mean for name, mean in means.items()}
        for name in student.states:
            assert teacher is not None
            means[TERMS[name].column] = compared(name, student.states, teacher.states)
            loss = loss + weights[TERMS[name].column] * means[TERMS[name].column]
        return loss, {name: mean.detach() for name, mean in means.items()}

    def _pass(self, model: Callable[..., Any], head: Head | None, places: Places, ids: Tensor) -> _Pass:
        """Through the model, up to its head if that is known, and through the head if it is not."""
        with captured(places) as states:
            if head is None:
                given = model(input_ids=ids, use_cache=False).logits
            else:
                with without_logits(head) as read:
                    model(input_ids=ids, use_cache=False)
                given = read[0]
        return _Pass(given[:, :-1].flatten(0, 1), states)

    def _logits_loss(
        self, student: _Pass, teacher: _Pass | TopLogits | None, targets: Tensor, weights: dict[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the terms of the logits, and these terms."""
        compared_with: tuple[Head, Tensor] | TopLogits | None = None
        if self.head is not None:
            if isinstance(teacher, TopLogits):
                compared_with = teacher
            elif teacher is not None and self.divergences:
                assert self.teacher_head is not None
                compared_with = self.teacher_head, teacher.given
            return chunked_terms(
                self.head, student.given, compared_with, targets, self._terms, weights, self.healing.chunk_tokens
            )
        terms = self._terms(student.given, teacher.given if isinstance(teacher, _Pass) else teacher, targets)
        means = {name: term.mean() for name, term in terms.items()}
        return torch.stack([weights[name] * mean for name, mean in means.items()]).sum(), means

    def _terms(self, student: Tensor, teacher: Tensor | TopLogits | None, targets: Tensor) -> dict[str, Tensor]:
        healing = self.healing
        return logit_terms(student, teacher, targets, self.divergences, healing.temperature, healing.distillation_top_k)

    @torch.no_grad()
    def validate(self) -> float:
        """The mean loss of a token of the validation text, of which each process measures its share."""
        assert self.validation is not None
        model = self.model_wrapped
        model.eval()
        total, num_sequences = 0.0, 0.0
        per_pass = self.healing.sequences_per_pass or self.healing.sequences_per_step // num_processes()
        for each in self.validation.split(per_pass * num_processes()):
            mine = share(range(len(each)), process_number(), num_processes())
            # Every process makes as many passes as the others, since they may have to put weights together for it.
            ids = each[list(mine)] if len(mine) else each[:1]
            _, means = model(ids.to(self.args.device, torch.int64), validates=True)
            total += means["language_model_nats"].item() * len(mine)
            num_sequences += len(mine)
        total, num_sequences = summed([total, num_sequences])
        return total / num_sequences

    # ---- what is told ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" not in logs:  # Trainer's own summary, of a loss that it does not know
            return
        step, seconds = self.state.global_step, self.seconds
        tokens, first = self._tokens_after[step], self.first_step
        row = self.progress.close_row(
            step=step,
            num_steps=self.state.max_steps,
            tokens=tokens,
            learning_rate=logs["learning_rate"],
            tokens_per_second=(tokens - self._tokens_after[first]) / seconds,
            seconds_left=(self.state.max_steps - step) * seconds / (step - first),
        )
        if row is None:
            return
        if self.metrics is not None:
            self.metrics.append(row)
        super().log(row.model_dump(exclude_none=True, exclude={"step", "num_steps"}), start_time)
        if self.report is not None:
            self.report(row)

    @property
    def seconds(self) -> float:
        """Since this process began to train."""
        return time.monotonic() - self.started

    # ---- what is kept ----

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._partial is None else str(self._partial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # A checkpoint that a step has spoilt would push out the last good one.
        spoilt = not_finite(self.student)
        if spoilt is not None:
            raise WorkError(
                f"{spoilt!r} holds NaN or infinity after step {self.state.global_step}: start anew with a lower rate"
            )
        folder, name = Path(str(self.args.output_dir)), f"checkpoint-{self.state.global_step}"
        self._partial = folder / PARTIAL
        try:
            super()._save_checkpoint(model, trial)
            wait_for_all()
            if is_main():
                kept = self.progress.model_copy(update={"seconds": self.progress.seconds + self.seconds})
                (self._partial / name / PROGRESS).write_text(kept.model_dump_json(), encoding="utf-8")
                publish(self._partial / name, folder / name)
                best = self.progress.best_step
                keep_only(folder, self.healing.keep_checkpoints, [] if best is None else [best])
            wait_for_all()
        except (OSError, SafetensorError, RuntimeError) as error:  # torch raises the last on a full disk
            free = shutil.disk_usage(folder).free / 1e6  # torch does not say that there is no room
            raise WorkError(
                f"could not write the training {name} in {str(folder)!r}, where {free:,.1f} MB are free: {error}"
            ) from error
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not is_sharded(self.student):
            return super().save_model(output_dir, _internal_call)
        copy_weights_(self.original, self.student)
        if is_main():
            assert output_dir is not None
            self.original.save_pretrained(output_dir)
        return None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharded(self.student):
            return super()._save_optimizer_and_scheduler(output_dir)
        # As one process would write them, so that any number of processes can go on from there.
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        state = whole_state(self.optimizer.state_dict())
        if is_main():
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)
        return None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not is_sharded(self.student):  # it has the checkpoint's weights since before it was split
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        assert self.optimizer is not None
        if is_sharded(self.student):
            inner = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate puts one of its own around it
            inner.register_load_state_dict_pre_hook(split_state)
        assert self.lr_scheduler is not None
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        # Rate and decay of the next step are those asked for now, which may have changed since the checkpoint.
        rates = self.lr_scheduler.get_last_lr()
        for number, group in enumerate(self.optimizer.param_groups):
            factor = self.lr_scheduler.lr_lambdas[number](self.lr_scheduler.last_epoch)
            rates[number] = group["lr"] = self.lr_scheduler.base_lrs[number] * factor
            group["weight_decay"] = self.healing.weight_decay * group["decay_multiplier"]


class _Flow(TrainerCallback):
    """After each step: whether the model is measured, a row is due, and the training is to stop."""

    def __init__(self, trainer: HealingTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.first_step, self.trainer.started = state.global_step, time.monotonic()
        # A resumed training has those of its checkpoint.
        state.save_steps, state.logging_steps = args.save_steps, args.logging_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer, is_last = self.trainer, state.global_step >= state.max_steps
        if is_last:
            control.should_log = True
        if trainer.validation is not None and (control.should_save or is_last):
            trainer.progress.validate_at(state.global_step, trainer.validate())
            control.should_log = True
        if any_of(trainer.is_to_stop):
            # Neither measured nor logged: the rows are to be those of a training that was not stopped.
            control.should_save = control.should_training_stop = True
