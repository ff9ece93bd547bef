"""Healing: training of a compressed model, by its own language-model loss and by distillation from the teacher."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_model as load_safetensors
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from kronpress.errors import RequestError, WorkError
from kronpress.evaluation import longest_context, num_embeddings
from kronpress.recipe import Healing
from kronpress.surgery import healing_parametrizations
from kronpress.tokens import pack


class HealingRow(BaseModel):
    """The state of the training after `step` steps; losses are means over the steps since the row before."""

    model_config = ConfigDict(frozen=True)

    step: int
    num_steps: int
    tokens: int
    loss: float
    language_model_nats: float
    distillation_nats: float | None  # None if the teacher was not asked
    learning_rate: float
    tokens_per_second: float
    seconds_left: float


class HealingLog(BaseModel):
    """What `heal_` did."""

    num_steps: int
    tokens: int
    seconds: float
    resumed_at_step: int | None
    rows: list[HealingRow]


def language_model_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of −log p(target) in nats; logits (..., vocab), targets (...) of token ids."""
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten())


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T² · mean over tokens of KL(teacher ‖ student) = Σ_v p_v (log p_v − log q_v), both softened by T.

    The factor T² keeps the gradient's size independent of T (Hinton et al. 2015, section 2). It is exactly 0 when
    the logits are equal, and otherwise positive up to rounding.

    >>> logits = torch.randn(2, 5)
    >>> distillation_loss(logits, logits, temperature=2.0).item()
    0.0

    Args:
        student_logits, teacher_logits: (..., vocab).
    """
    log_p = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    log_q = F.log_softmax(student_logits.float() / temperature, dim=-1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def heal_(
    model: PreTrainedModel,
    teacher: nn.Module | None,
    train_tokens: Tensor,
    healing: Healing,
    *,
    seed: int = 0,
    work_dir: Path | None = None,
    resume: bool = False,
    progress: Callable[[HealingRow], None] | None = None,
) -> HealingLog:
    """Train `model` in place through `transformers.Trainer`; dropout is off.

    loss = language_model_weight · language_model_loss + distillation_weight · distillation_loss

    Args:
        teacher: the dense model; may be None if `healing.distillation_weight` is 0.
        train_tokens: one stream of token ids (num_tokens,), cut into sequences and shuffled by `seed`.
        work_dir: where training checkpoints go every `healing.save_steps` steps.
        resume: continue from the newest training checkpoint in `work_dir`, if there is one.
        progress: called about fifty times in all.

    Raises:
        RequestError: distillation without a teacher, vocabularies that differ, too little text, or a token in it
            that the model does not know.
        WorkError: the loss or a weight to be saved is not finite; training checkpoints stay.
    """
    num_steps = healing.num_steps
    if healing.distillation_weight > 0:
        if teacher is None:
            raise RequestError("distillation_weight is not 0 and there is no teacher")
        sizes = num_embeddings(model), num_embeddings(teacher)
        if sizes[0] != sizes[1]:
            raise RequestError(f"student and teacher have vocabularies of {sizes[0]} and {sizes[1]} tokens")
    limit = longest_context(model)
    if limit is not None and healing.sequence_length > limit:
        raise RequestError(f"healing.sequence_length {healing.sequence_length}: the model reads at most {limit}")
    if num_steps == 0:
        return HealingLog(num_steps=0, tokens=0, seconds=0.0, resumed_at_step=None, rows=[])
    sequences = pack(train_tokens, healing.sequence_length)
    known = num_embeddings(model)
    if known is not None and sequences.max() >= known:
        raise RequestError(f"token {sequences.max().item()} in the text: the model knows {known} tokens")

    with tempfile.TemporaryDirectory() as scratch, healing_parametrizations(model):
        folder = scratch if work_dir is None else str(work_dir)
        checkpoint = newest_checkpoint(Path(folder)) if resume else None
        resumed_at = None if checkpoint is None else checkpoint_step(checkpoint)
        if checkpoint is not None and resumed_at == num_steps:
            # Trainer would train one step more.
            load_safetensors(model, checkpoint / "model.safetensors")
            tokens = healing.num_tokens
            return HealingLog(num_steps=num_steps, tokens=tokens, seconds=0.0, resumed_at_step=resumed_at, rows=[])
        use_cache = model.config.use_cache
        trainer = _HealingTrainer(
            model=model,
            args=_training_arguments(healing, num_steps, seed, folder),
            train_dataset=_Sequences(sequences),
            teacher=teacher,
            healing=healing,
        )
        trainer.remove_callback(PrinterCallback)  # it writes to standard output
        reporter = _Reporter(trainer, progress)
        trainer.add_callback(reporter)
        modes = [(each, each.training) for each in (model, teacher) if each is not None]
        started = time.monotonic()
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except WorkError as error:
            kept = None if work_dir is None else newest_checkpoint(work_dir)
            if kept is None:
                raise
            raise WorkError(f"{error}; the training checkpoint of step {checkpoint_step(kept)} is kept") from error
        finally:
            for each, training in modes:
                each.train(training)
            # Trainer leaves behind mixed precision wrapped around the model's forward, and no cache in generate.
            trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            model.config.use_cache = use_cache
    return HealingLog(
        num_steps=num_steps,
        tokens=healing.num_tokens,
        seconds=time.monotonic() - started,
        resumed_at_step=resumed_at,
        rows=reporter.rows,
    )


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


def newest_checkpoint(folder: Path) -> Path | None:
    """The training checkpoint with the most steps that was written to its end; None if there is none."""
    # Trainer writes its state last.
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=checkpoint_step, default=None)


def checkpoint_step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _training_arguments(healing: Healing, num_steps: int, seed: int, folder: str) -> TrainingArguments:
    on_gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=folder,
        max_steps=num_steps,
        weight_decay=healing.weight_decay,
        bf16=on_gpu and torch.cuda.is_bf16_supported(),
        use_cpu=not on_gpu,
        seed=seed,
        logging_steps=max(1, num_steps // 50),
        logging_nan_inf_filter=False,
        save_strategy="no" if healing.save_steps is None else "steps",
        save_steps=healing.save_steps or num_steps,
        save_total_limit=2,
        remove_unused_columns=False,
        dataloader_pin_memory=on_gpu,
        disable_tqdm=True,
        report_to=[],
    )


class _Sequences(Dataset[dict[str, Tensor]]):
    def __init__(self, sequences: Tensor) -> None:
        self.sequences = sequences

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.sequences[index].long()}


class _Steps(Sampler[list[int]]):
    """The sequences of every step, all phases after one another: one random order after another, none cut short."""

    def __init__(self, num_sequences: int, healing: Healing, seed: int) -> None:
        self.num_sequences, self.seed = num_sequences, seed
        self.parts = healing.parts

    def __len__(self) -> int:
        return sum(part.max_steps or 0 for part in self.parts)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed)
        order: list[int] = []
        for part in self.parts:
            for _ in range(part.max_steps or 0):
                while len(order) < part.sequences_per_step:
                    order += torch.randperm(self.num_sequences, generator=generator).tolist()
                yield order[: part.sequences_per_step]
                del order[: part.sequences_per_step]


class _HealingTrainer(Trainer):
    """A Trainer whose loss is the weighted sum of the healing terms, and whose batch is the whole of a step."""

    def __init__(self, *args: Any, teacher: nn.Module | None, healing: Healing, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.healing = healing
        self.teacher = None if teacher is None else teacher.to(self.args.device)
        self.terms: list[tuple[float, float | None]] = []  # of each pass since the last log line

    def get_train_dataloader(self) -> DataLoader[Any]:
        steps = _Steps(len(self.train_dataset), self.healing, self.args.seed)  # type: ignore[arg-type]
        return self.accelerator.prepare(
            DataLoader(self.train_dataset, batch_sampler=steps, pin_memory=self.args.dataloader_pin_memory)  # type: ignore[arg-type]
        )

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

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        # No dropout: the student is to agree with the teacher, not to be regularised.
        model.eval()
        ids = self._prepare_inputs(inputs)["input_ids"]
        step_loss = torch.zeros((), device=ids.device)
        passes = ids.split(self.healing.sequences_per_pass or len(ids))
        for sequences in passes:
            with self.compute_loss_context_manager():
                loss = self._loss(model, sequences) / len(passes)
            self.accelerator.backward(loss)
            step_loss += loss.detach()
        return step_loss

    def _loss(self, model: nn.Module, ids: Tensor) -> Tensor:
        """The mean loss over the sequences ids (sequences, sequence_length)."""
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        language_model = language_model_loss(logits, ids[:, 1:])
        loss = self.healing.language_model_weight * language_model
        distillation = None
        if self.healing.distillation_weight > 0:
            self.teacher.eval()  # type: ignore[union-attr]
            with torch.no_grad(), self.accelerator.autocast():
                teacher_logits = self.teacher(input_ids=ids, use_cache=False).logits[:, :-1]  # type: ignore[misc]
            distillation = distillation_loss(logits, teacher_logits, self.healing.temperature)
            loss = loss + self.healing.distillation_weight * distillation
        if not math.isfinite(loss.item()):
            raise WorkError(
                f"the healing loss is {loss.item()} at step {self.state.global_step}: start anew with a lower rate"
            )
        self.terms.append((language_model.item(), None if distillation is None else distillation.item()))
        return loss

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # A checkpoint that a step has spoilt would push out the last good one.
        for name, parameter in model.named_parameters():
            if not parameter.isfinite().all():
                raise WorkError(
                    f"{name!r} holds NaN or infinity after step {self.state.global_step}: start anew with a lower rate"
                )
        super()._save_checkpoint(model, trial)


class _Reporter(TrainerCallback):
    """Turns Trainer's log lines into HealingRows."""

    def __init__(self, trainer: _HealingTrainer, progress: Callable[[HealingRow], None] | None) -> None:
        self.trainer, self.progress = trainer, progress
        self.rows: list[HealingRow] = []
        parts = trainer.healing.parts
        per_step = [part.tokens_per_step for part in parts for _ in range(part.max_steps or 0)]
        self.tokens_after = [0, *accumulate(per_step)]

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.first_step, self.started = state.global_step, time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        seconds = time.monotonic() - self.started
        language_model, distillation = zip(*self.trainer.terms, strict=True)
        self.trainer.terms.clear()
        tokens = self.tokens_after[state.global_step]
        row = HealingRow(
            step=state.global_step,
            num_steps=state.max_steps,
            tokens=tokens,
            loss=logs["loss"],
            language_model_nats=fmean(language_model),
            distillation_nats=None if distillation[0] is None else fmean(distillation),
            learning_rate=logs["learning_rate"],
            tokens_per_second=(tokens - self.tokens_after[self.first_step]) / seconds,
            seconds_left=(state.max_steps - state.global_step) * seconds / (state.global_step - self.first_step),
        )
        self.rows.append(row)
        if self.progress is not None:
            self.progress(row)
