"""Prefill and decode by the clock: models take turns, and what was measured together is compared.

Prefill is one forward pass over the prompts of a batch, with the logits of every position. Decode is one forward pass
for each new token, with the key-value cache that the prefill left. The tokens are random but fixed: what they say takes
no time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Self

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from transformers import PreTrainedModel

from kronpress.errors import RequestError

SEED = 0
# Even, so that each order is taken equally often.
DEFAULT_ROUNDS = 20
# One in each order.
WARM_UP_ROUNDS = 2


class Frozen(BaseModel):
    """A value that goes through JSON unchanged."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Work(Frozen):
    """So many sequences at once, each with a prompt and new tokens of these lengths."""

    batch_size: int
    prompt_tokens: int
    new_tokens: int

    def __str__(self) -> str:
        return f"batch {self.batch_size}, {self.prompt_tokens} prompt and {self.new_tokens} new tokens"


class Spread(Frozen):
    """Median and quartiles; half of the measurements lie between the quartiles."""

    median: float
    first_quartile: float
    third_quartile: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Of at least two values; quartiles between two values are interpolated.

        >>> Spread.of([4.0, 1.0, 2.0, 3.0, 5.0])
        Spread(median=3.0, first_quartile=2.0, third_quartile=4.0)
        """
        first, median, third = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median=median, first_quartile=first, third_quartile=third)


class Timing(Frozen):
    """One kind of work of one model: seconds of every round, and what they come to.

    `tokens_per_second` counts those of all sequences, `seconds_per_token` those of one: the time that its reader waits.
    """

    batch_size: int
    num_tokens: int  # of one sequence
    seconds: list[float]
    tokens_per_second: Spread
    seconds_per_token: Spread

    @classmethod
    def of(cls, batch_size: int, num_tokens: int, seconds: list[float]) -> Self:
        return cls(
            batch_size=batch_size,
            num_tokens=num_tokens,
            seconds=seconds,
            tokens_per_second=Spread.of([batch_size * num_tokens / each for each in seconds]),
            seconds_per_token=Spread.of([each / num_tokens for each in seconds]),
        )


class Speedup(Frozen):
    """How many times as fast the model is as the one it is compared with, in every round and over all of them.

    `bound` is what it would be if time went into nothing but streaming the weights of linear layers (decode) or
    multiplying by them (prefill); attention, normalisation and the cost of starting an operation are not in it. It is
    None where the two count different things: multiplications of integers against those of floats.
    """

    of_rounds: list[float]
    spread: Spread
    bound: float | None

    @classmethod
    def of(cls, model: Timing, against: Timing, bound: float | None) -> Self:
        """Each round's ratio is of two measurements made in the same turn."""
        of_rounds = [theirs / ours for ours, theirs in zip(model.seconds, against.seconds, strict=True)]
        return cls(of_rounds=of_rounds, spread=Spread.of(of_rounds), bound=bound)


def token_ids(vocab_size: int, num_tokens: int, batch_size: int = 1) -> Tensor:
    """Random token ids below `vocab_size`, (batch_size, num_tokens), always the same."""
    return torch.randint(vocab_size, (batch_size, num_tokens), generator=torch.Generator().manual_seed(SEED))


def time_rounds(
    models: Sequence[PreTrainedModel],
    ids: Tensor,
    prompt_tokens: int,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[tuple[float, float]]]:
    """Seconds of prefill and decode, [round][model], warm-up rounds left out.

    The models take turns within a round, so that what else the machine does falls on all of them alike, and the order
    is turned round from one round to the next, so that none always goes first.

    Args:
        models: in evaluation mode.
        ids: (sequences, prompt and new tokens).
    """
    turns = list(enumerate(models))
    taken = []
    for _ in range(WARM_UP_ROUNDS + rounds):
        seconds = {index: prefill_and_decode(model, ids, prompt_tokens, clock) for index, model in turns}
        taken.append([seconds[index] for index in range(len(models))])
        turns.reverse()
    return taken[WARM_UP_ROUNDS:]


@torch.inference_mode()
def prefill_and_decode(
    model: PreTrainedModel, ids: Tensor, prompt_tokens: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float]:
    """Seconds to read the prompts, and to read the rest of `ids` (sequences, tokens) one token after the other.

    Raises:
        RequestError: the model has no key-value cache.
    """

    def now() -> float:
        if model.device.type == "cuda":
            torch.cuda.synchronize()  # what has been launched is not yet done
        return clock()

    ids = ids.to(model.device)
    started = now()
    cache = model(input_ids=ids[:, :prompt_tokens], use_cache=True).past_key_values
    prefilled = now()
    if cache is None:
        raise RequestError(f"{type(model).__name__} has no key-value cache: decoding token by token needs one")
    for token in ids[:, prompt_tokens:].split(1, dim=1):
        cache = model(input_ids=token, past_key_values=cache, use_cache=True).past_key_values
    return prefilled - started, now() - prefilled
