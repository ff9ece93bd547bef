"""What is known of a training while it goes on: its rows, its best checkpoint, and the steps that were not taken."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median
from typing import Any

from pydantic import BaseModel, ConfigDict

from kronpress.errors import RequestError, WorkError
from kronpress.healing.checkpoints import write_whole

METRICS = "metrics.jsonl"
# A spike is one beside the median loss of so many steps, once there are at least so many.
RECENT_STEPS, FEWEST_STEPS = 64, 16
# Losses that are next to nothing may grow to this many times `spike_factor` without being spikes.
SPIKE_FLOOR = 0.01


class HealingRow(BaseModel):
    """The state of the training after `step` steps; losses are means over the steps since the row before.

    A term that compares with the teacher is None if its weight is 0 all along, `validation_nats` (the mean loss of a
    token of the validation text) where it was not measured. Steps that were skipped are in no mean.
    """

    model_config = ConfigDict(frozen=True)

    step: int
    num_steps: int
    tokens: int
    loss: float
    language_model_nats: float
    distillation_nats: float | None
    reverse_distillation_nats: float | None = None
    jensen_shannon_nats: float | None = None
    embedding_mse: float | None = None
    attention_nats: float | None = None
    hidden_mse: float | None = None
    validation_nats: float | None = None
    learning_rate: float
    skipped_steps: int = 0
    tokens_per_second: float
    seconds_left: float


class HealingLog(BaseModel):
    """What `heal_` did, all its runs together if it was resumed; `seconds` and rows are of all of them."""

    num_steps: int
    tokens: int
    seconds: float
    resumed_at_step: int | None
    rows: list[HealingRow]
    skipped_steps: int = 0
    best_step: int | None = None
    best_validation_nats: float | None = None


class Progress(BaseModel):
    """What a training checkpoint keeps of the training beside weights, optimiser, rates and random numbers."""

    settings: dict[str, Any]
    rows: list[HealingRow] = []
    # Of each step since the last row: the loss, as `loss`, and its terms by their columns.
    since_row: list[dict[str, float]] = []
    recent_losses: list[float] = []
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    validation_nats: float | None = None  # measured since the last row
    best_step: int | None = None
    best_validation_nats: float | None = None
    seconds: float = 0.0

    def take(self, terms: dict[str, float]) -> None:
        """Note a step that was taken."""
        self.since_row.append(terms)
        self.recent_losses = [*self.recent_losses, terms["loss"]][-RECENT_STEPS:]
        self.skipped_in_a_row = 0

    def skip(self) -> None:
        """Note a step that was not."""
        self.skipped_steps += 1
        self.skipped_in_a_row += 1

    def validate_at(self, step: int, nats: float) -> None:
        """Note the loss on the validation text after `step` steps."""
        self.validation_nats = nats
        if self.best_validation_nats is None or nats < self.best_validation_nats:
            self.best_step, self.best_validation_nats = step, nats

    def close_row(self, **columns: Any) -> HealingRow | None:
        """The row of all steps since the one before; None if none of them was taken."""
        if not self.since_row:
            return None
        means = {name: fmean(each[name] for each in self.since_row) for name in self.since_row[0]}
        row = HealingRow(
            **{"distillation_nats": None, **means},
            validation_nats=self.validation_nats,
            skipped_steps=self.skipped_steps,
            **columns,
        )
        self.rows.append(row)
        self.since_row, self.validation_nats = [], None
        return row


def why_not_to_step(loss: float, gradient_norm: float, recent_losses: list[float], spike_factor: float | None) -> str:
    """What is wrong with a step, in words that follow "the"; empty if nothing is.

    A loss is a spike if it is more than `spike_factor` times the median of the losses of the RECENT_STEPS steps before.

    >>> why_not_to_step(9.0, 1.0, [2.0] * 64, spike_factor=3.0)
    'loss is 9, more than 3 times 2, the median of 64 steps'
    >>> why_not_to_step(5.0, 1.0, [2.0] * 64, spike_factor=3.0)
    ''
    """
    if not math.isfinite(loss):
        return f"loss is {loss}"
    if not math.isfinite(gradient_norm):
        return f"gradient's norm is {gradient_norm}"
    if spike_factor is not None and len(recent_losses) >= FEWEST_STEPS:
        usual = median(recent_losses)
        if loss > spike_factor * max(usual, SPIKE_FLOOR):
            over = f"more than {spike_factor:g} times {usual:.4g}"
            return f"loss is {loss:.4g}, {over}, the median of {len(recent_losses)} steps"
    return ""


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """What differs between two settings, by name, in words.

    >>> differences({"rate": 0.1, "seed": 1}, {"rate": 0.2, "seed": 1})
    {'rate': 'rate was 0.1 and is 0.2'}
    """
    names = [*before, *(name for name in now if name not in before)]
    return {
        name: f"{name} was {before.get(name)} and is {now.get(name)}"
        for name in names
        if before.get(name) != now.get(name)
    }


# Of the healing: what may differ when a training is resumed, and what may not, whoever accepts it.
ALWAYS_FREE = frozenset(
    {
        *("save_steps", "keep_checkpoints", "max_skipped_steps", "report_to"),
        *("sequences_per_pass", "gradient_checkpointing", "compile", "sharded"),  # how it is computed, not what
    }
)
NEVER_FREE = frozenset(
    {
        *("data", "max_steps", "tokens", "sequences_per_step", "sequence_length", "phases", "validation_data"),
        *("rates", "optimizer"),  # what they keep is of another kind
    }
)


def check_changes(changed: Mapping[str, str], where: str, accepted: bool) -> None:
    """Refuse to go on with other settings than the training began with, unless that is wanted and makes sense.

    Args:
        changed: of `differences`; fields of the healing are called `healing.…`.

    Raises:
        RequestError: something else than weights of terms, rates and the like differs, or is not accepted.
    """
    fields = {name: name.removeprefix("healing.") for name in changed}
    refused = [
        changed[name] for name, field in fields.items() if not name.startswith("healing.") or field in NEVER_FREE
    ]
    if refused:
        raise RequestError(
            f"{where} holds an interrupted training of another kind: {'; '.join(refused)}; --overwrite without "
            "--resume drops it"
        )
    asked = [changed[name] for name, field in fields.items() if field not in ALWAYS_FREE]
    if asked and not accepted:
        raise RequestError(
            f"{where} holds an interrupted training with other settings: {'; '.join(asked)}; --accept-changes goes on "
            "with them as they are now"
        )


class MetricsFile:
    """The rows as JSON lines, one after the other as they come; no step is in it twice."""

    def __init__(self, folder: Path, rows: list[HealingRow]) -> None:
        """Begins with the rows that a resumed training has already; later ones of an earlier attempt go.

        Raises:
            WorkError: the file cannot be written; so does `append`.
        """
        self.path = folder / METRICS
        with self._written():
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, metrics_lines(rows))

    def append(self, row: HealingRow) -> None:
        with self._written(), self.path.open("a", encoding="utf-8") as file:
            file.write(metrics_lines([row]))

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise WorkError(f"could not write {str(self.path)!r}: {error}") from error


def metrics_lines(rows: list[HealingRow]) -> str:
    return "".join(row.model_dump_json(exclude_none=True) + "\n" for row in rows)
