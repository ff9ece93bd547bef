"""Calibration data: windows of text, and batches of any kind as keyword arguments of the model's forward."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from kronpress.errors import RequestError
from kronpress.evaluation import longest_context, num_embeddings
from kronpress.recipe import Recipe
from kronpress.tokens import load_train_tokens, pack

Batch = Tensor | Mapping[str, Any]

# Windows of text read for each that is chosen.
_WINDOWS_READ = 8


def calibration_batches(tokenizer: PreTrainedTokenizerBase, recipe: Recipe, batch_size: int) -> list[Tensor]:
    """The recipe's calibration text as token ids, each tensor (at most batch_size, sequence_length).

    `recipe.seed` chooses `calibration.windows` of the first eight times as many windows of the text.

    Raises:
        RequestError: there is no text, or less than one window.
    """
    settings = recipe.calibration
    num_read = _WINDOWS_READ * settings.windows
    tokens = load_train_tokens(tokenizer, settings.data, num_read * settings.sequence_length)
    pool = pack(tokens, settings.sequence_length)[:num_read]
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(recipe.seed))
    return list(pool[order[: settings.windows]].long().split(batch_size))


@dataclass(frozen=True)
class Part:
    """Sequences of one batch that are all measured or all held out, as keyword arguments of the model's forward."""

    arguments: dict[str, Any]
    is_held_out: bool

    def tokens(self, x: Tensor) -> Tensor:
        """The rows (tokens, features) of x (..., features) that an attention mask (batch, length) does not hide."""
        mask = self.arguments.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            mask = mask.to(x.device).bool()
            if x.shape[:2] == mask.shape:
                x = x[mask]
            elif x.ndim == 2 and len(x) == mask.numel():
                x = x[mask.flatten()]  # as OPT's MLP reads it
        return x.reshape(-1, x.shape[-1])


def checked_batches(model: nn.Module, batches: Iterable[Batch]) -> list[dict[str, Any]]:
    """Each batch as keyword arguments of the model's forward."""
    try:
        listed = list(batches)
    except TypeError as error:
        raise RequestError(f"calibration batches are {type(batches).__name__}, not an iterable of batches") from error
    if not listed:
        raise RequestError("there are no calibration batches")
    return [_checked_batch(model, number, batch) for number, batch in enumerate(listed)]


def _checked_batch(model: nn.Module, number: int, batch: Batch) -> dict[str, Any]:
    if isinstance(batch, Tensor) and batch.ndim == 2 and not batch.is_floating_point():
        arguments = {"input_ids": batch, "use_cache": False}
    elif isinstance(batch, Mapping):
        arguments = dict(batch)
    else:
        shape = f" of {tuple(batch.shape)} {batch.dtype}" if isinstance(batch, Tensor) else ""
        raise RequestError(
            f"calibration batch {number} is {type(batch).__name__}{shape}: expected token ids (batch, length), or a "
            "dictionary of keyword arguments of the model's forward"
        )
    if not any(map(_is_batched, arguments.values())) or count_tokens(arguments) == 0:
        raise RequestError(f"calibration batch {number} is empty: it has no token")
    ids, known, limit = arguments.get("input_ids"), num_embeddings(model), longest_context(model)
    if isinstance(ids, Tensor):
        if known is not None and ids.max() >= known:
            raise RequestError(
                f"token {ids.max().item()} in calibration batch {number}: the model knows {known} tokens"
            )
        if limit is not None and ids.shape[-1] > limit:
            raise RequestError(
                f"calibration batch {number} has sequences of {ids.shape[-1]} tokens: the model reads at most {limit}"
            )
    return arguments


def _is_batched(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _first_shape(arguments: dict[str, Any]) -> torch.Size:
    """The shape of the first tensor, which says how many sequences the batch has and how long they are."""
    return next(value.shape for value in arguments.values() if _is_batched(value))


def count_sequences(arguments: dict[str, Any]) -> int:
    """How many sequences the batch has."""
    return _first_shape(arguments)[0]


def count_tokens(arguments: dict[str, Any]) -> int:
    """How many tokens the batch has, padding included."""
    return math.prod(_first_shape(arguments)[:2])


def select(arguments: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """The arguments of some sequences of a batch; what is not divided into sequences stays as it is."""
    size = count_sequences(arguments)
    return {
        name: value[rows] if _is_batched(value) and len(value) == size else value for name, value in arguments.items()
    }


def divide(batches: list[dict[str, Any]], held_out: float) -> list[Part]:
    """The batches, each divided into what is measured and what is held out.

    They are run apart, because a layer may read the sequences of a batch in any shape.
    """
    parts = []
    first = 0  # number of the batch's first sequence among all
    for arguments in batches:
        size = count_sequences(arguments)
        kept_apart = [int((i + 1) * held_out) > int(i * held_out) for i in range(first, first + size)]
        first += size
        for is_held_out in (False, True):
            rows = [row for row in range(size) if kept_apart[row] == is_held_out]
            if rows:
                parts.append(Part(select(arguments, rows), is_held_out))
    return parts


def to_device(value: Any, device: torch.device) -> Any:
    """`value` with all tensors in it on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: to_device(each, device) for name, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(to_device(each, device) for each in value)
    return value
