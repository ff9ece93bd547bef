"""`heal_`: the training itself, a `transformers.Trainer` whose batch is a whole optimiser step."""

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
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_model as load_safetensors
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from kronpress.errors import RequestError, WorkError
from kronpress.evaluation import longest_context, num_embeddings
from kronpress.healing.inner_states import TERMS, Places, captured, compared, eager_attention, matched_places
from kronpress.healing.losses import distillation_loss, language_model_loss
from kronpress.recipe import Healing
from kronpress.surgery import healing_parametrizations
from kronpress.tokens import pack


class HealingRow(BaseModel):
    """The state of the training after `step` steps; losses are means over the steps since the row before.

    A term that compares with the teacher is None if its weight is 0.
    """

    model_config = ConfigDict(frozen=True)

    step: int
    num_steps: int
    tokens: int
    loss: float
    language_model_nats: float
    distillation_nats: float | None
    embedding_mse: float | None = None
    attention_nats: float | None = None
    hidden_mse: float | None = None
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


def heal_(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
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
        + embedding_weight · state_loss of what enters the first block
        + attention_weight · Σ_i attention_loss of the attention maps of block i and of the teacher's block matching it
        + hidden_weight · Σ_i state_loss of the hidden states after these blocks

    The first two are means over all tokens but the last of each sequence, the others over all tokens, and the sums go
    over the student's blocks i; `match_blocks` says which block of the teacher matches. With attention_weight both
    models attend by the implementation `eager` while the student trains. Where a weight is 0 its term costs nothing,
    but for the language model's.

    Args:
        teacher: the dense model; may be None if only `healing.language_model_weight` is not 0.
        train_tokens: one stream of token ids (num_tokens,), cut into sequences and shuffled by `seed`.
        work_dir: where training checkpoints go every `healing.save_steps` steps.
        resume: continue from the newest training checkpoint in `work_dir`, if there is one.
        progress: called about fifty times in all.

    Raises:
        RequestError: no teacher where one is needed, vocabularies that differ, what `matched_places` refuses, too
            little text, or a token in it that the model does not know.
        WorkError: the loss or a weight to be saved is not finite; training checkpoints stay.
    """
    num_steps = healing.num_steps
    asked = [name for name, weight in healing.teacher_weights.items() if weight > 0]
    places: tuple[Places, Places] = ({}, {})
    if asked:
        if teacher is None:
            raise RequestError(f"{asked[0]} is not 0 and there is no teacher")
        sizes = num_embeddings(model), num_embeddings(teacher)
        if sizes[0] != sizes[1]:
            raise RequestError(f"student and teacher have vocabularies of {sizes[0]} and {sizes[1]} tokens")
        places = matched_places(model, teacher, healing)
    limit = longest_context(model)
    if limit is not None and healing.sequence_length > limit:
        raise RequestError(f"healing.sequence_length {healing.sequence_length}: the model reads at most {limit}")
    if num_steps == 0:
        return HealingLog(num_steps=0, tokens=0, seconds=0.0, resumed_at_step=None, rows=[])
    sequences = pack(train_tokens, healing.sequence_length)
    known = num_embeddings(model)
    if known is not None and sequences.max() >= known:
        raise RequestError(f"token {sequences.max().item()} in the text: the model knows {known} tokens")

    switched = [each for each in (model, teacher) if each is not None and "attention_weight" in asked]
    with tempfile.TemporaryDirectory() as scratch, healing_parametrizations(model), eager_attention(switched):
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
            teacher=teacher if asked else None,
            healing=healing,
            places=places,
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

    def __init__(
        self,
        *args: Any,
        teacher: PreTrainedModel | None,
        healing: Healing,
        places: tuple[Places, Places],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.healing = healing
        self.teacher = None if teacher is None else teacher.to(self.args.device)  # type: ignore[arg-type]
        self.places, self.teacher_places = places
        self.terms: list[dict[str, float]] = []  # columns of HealingRow, of each pass since the last log line

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
        healing = self.healing
        with captured(self.places) as states:
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        # Weight and value, by column of HealingRow.
        terms = {"language_model_nats": (healing.language_model_weight, language_model_loss(logits, ids[:, 1:]))}
        if self.teacher is not None:
            self.teacher.eval()
            with torch.no_grad(), self.accelerator.autocast(), captured(self.teacher_places) as teacher_states:
                teacher_logits = self.teacher(input_ids=ids, use_cache=False).logits[:, :-1]
            if healing.distillation_weight > 0:
                distillation = distillation_loss(logits, teacher_logits, healing.temperature)
                terms["distillation_nats"] = healing.distillation_weight, distillation
            for name in states:
                terms[TERMS[name].column] = healing.teacher_weights[name], compared(name, states, teacher_states)
        loss = torch.stack([weight * term for weight, term in terms.values()]).sum()
        if not math.isfinite(loss.item()):
            raise WorkError(
                f"the healing loss is {loss.item()} at step {self.state.global_step}: start anew with a lower rate"
            )
        self.terms.append({column: term.item() for column, (_, term) in terms.items()})
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
        terms = {column: fmean(each[column] for each in self.trainer.terms) for column in self.trainer.terms[0]}
        self.trainer.terms.clear()
        tokens = self.tokens_after[state.global_step]
        row = HealingRow(
            step=state.global_step,
            num_steps=state.max_steps,
            tokens=tokens,
            loss=logs["loss"],
            **{"distillation_nats": None, **terms},
            learning_rate=logs["learning_rate"],
            tokens_per_second=(tokens - self.tokens_after[self.first_step]) / seconds,
            seconds_left=(state.max_steps - state.global_step) * seconds / (state.global_step - self.first_step),
        )
        self.rows.append(row)
        if self.progress is not None:
            self.progress(row)
