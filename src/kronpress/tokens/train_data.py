"""What a model is trained on: sets of tokens with weights, and their windows in the order of a training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kronpress.errors import RequestError
from kronpress.recipe import WeightedSet
from kronpress.tokens.cache import DOCUMENTS_AT_ONCE, cached_tokens
from kronpress.tokens.order import Interleaved, ShuffledWindows
from kronpress.tokens.reading import find_source
from kronpress.tokens.streams import Piece, TokenStream, check_length

Data = str | Sequence[str] | Sequence[WeightedSet]


@dataclass(frozen=True)
class TrainData:
    """One stream of tokens, or several with weights; nothing is held in memory but where the tokens are.

    Attributes:
        streams: each is walked through by itself, epoch by epoch.
        weights: how large a part of all windows is of each stream, relative to the others'.
        only_whole: leave out the last tokens of a stream that fill no window. All epochs then have the same
            windows; otherwise these tokens and the first of the next epoch are a window.
    """

    streams: tuple[TokenStream, ...]
    weights: tuple[float, ...] = (1.0,)
    only_whole: bool = False

    @classmethod
    def of(cls, tokens: Tensor) -> TrainData:
        """One stream of token ids (num_tokens,), of which only whole windows are used."""
        return cls((TokenStream.of(tokens),), only_whole=True)

    @property
    def num_tokens(self) -> int:
        """The tokens of all streams."""
        return sum(map(len, self.streams))

    @property
    def is_masked(self) -> bool:
        """Whether there may be tokens that do not count in the loss."""
        return any(stream.is_masked for stream in self.streams)

    def after(self, num_read: int, num_needed: int) -> TrainData:
        """The data without its first `num_read` tokens, of each stream without its share of them.

        A stream that then has less than its share of `num_needed` is left whole.
        """
        parts = [weight / sum(self.weights) for weight in self.weights]
        unread = [stream[round(part * num_read) :] for stream, part in zip(self.streams, parts, strict=True)]
        kept = [
            rest if len(rest) >= round(part * num_needed) else stream
            for stream, rest, part in zip(self.streams, unread, parts, strict=True)
        ]
        return replace(self, streams=tuple(kept))

    def windows(self, length: int, seed: int) -> Windows:
        """The windows of `length` tokens in the order of a training.

        Raises:
            RequestError: a stream has fewer tokens than one window.
        """
        for stream in self.streams:
            check_length(len(stream), length)
        kept = self.whole(length) if self.only_whole else self
        return Windows(kept.streams, self.weights, length, seed)

    def whole(self, length: int) -> TrainData:
        """The data without the last tokens of each stream that fill no window: all epochs have the same windows."""
        return replace(self, streams=tuple(stream[: len(stream) - len(stream) % length] for stream in self.streams))


class Windows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Windows 0, 1, 2, … of a training, without end, each {"input_ids": (length,)}, int64.

    Where there are tokens that do not count in the loss, "counted" (length,) says of each token whether it does.
    The order depends on the data, the length and the seed alone: step t of B windows has the windows t·B to
    t·B + B − 1, of which `share` gives each process its own. So a training is resumed by beginning at another number.
    Several streams take turns by weight, a window at a time, and each gives its windows in the order that it has alone.
    """

    def __init__(self, streams: Sequence[TokenStream], weights: Sequence[float], length: int, seed: int) -> None:
        self.streams, self.length = streams, length
        self.turns = Interleaved(weights, seed)
        # Streams of equal length are not to be shuffled alike.
        self.orders = [
            ShuffledWindows(len(stream), length, seed + 1_000_003 * number) for number, stream in enumerate(streams)
        ]
        self.is_masked = any(stream.is_masked for stream in streams)

    def __len__(self) -> int:
        """The windows of one epoch of each stream."""
        return sum(order.first(1) for order in self.orders)

    def largest(self) -> int:
        """The largest token id in any window; all tokens are read for it."""
        return max(stream.largest() for stream in self.streams)

    def place(self, index: int) -> tuple[int, int]:
        """The stream that window `index` is of, and its number in it: it begins at token number · length."""
        stream, before = self.turns.item(index) if len(self.streams) > 1 else (0, index)
        return stream, self.orders[stream].number(before)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        stream, number = self.place(index)
        ids, counted = self.streams[stream].read(number * self.length, (number + 1) * self.length)
        return {"input_ids": ids, "counted": counted} if self.is_masked else {"input_ids": ids}


def data_names(data: Data) -> str:
    """What people are told of the data.

    >>> data_names("bundled"), data_names([WeightedSet(name="a", weight=3), WeightedSet(name="b.jsonl", weight=1)])
    ('bundled', 'a (75%), b.jsonl (25%)')
    """
    if isinstance(data, str):
        return data
    total = sum(each.weight for each in data if isinstance(each, WeightedSet))
    return ", ".join(each if isinstance(each, str) else f"{each.name} ({each.weight / total:.0%})" for each in data)


def load_train_data(
    tokenizer: PreTrainedTokenizerBase, data: Data, num_tokens: int, length: int, cache: Path | None = None
) -> TrainData:
    """The training splits of the sets in `data`, with enough tokens for `num_tokens` in windows of `length`, or all.

    A name or names are one stream, set after set, and the others are mixed by weight. Rows with a column `text` are
    documents; those without, with a column `messages`, are conversations, of which only the answers count in the
    loss. Tokens are kept in the cache and not made anew. How many of a set are taken depends on what is asked for,
    and not on how many are in the cache.

    Args:
        cache: folder of the cache; the user's own if None.

    Raises:
        RequestError: there is no text in it, no answer in its conversations, or no chat template for them.
        WorkError: a set could not be read.
    """
    sets = [each for each in data if isinstance(each, WeightedSet)]
    if not sets:
        names = [data] if isinstance(data, str) else [each for each in data if isinstance(each, str)]
        return TrainData((_with_answers(_stream(tokenizer, names, num_tokens, cache), names),))
    total = sum(each.weight for each in sets)
    # Interleaved gives a set some windows more than its share, which are to be there as well.
    needed = [
        ceil(each.weight / total * (num_tokens + len(sets) * length)) + length if num_tokens else 0 for each in sets
    ]
    streams = [
        _with_answers(_stream(tokenizer, [each.name], some, cache), [each.name])
        for each, some in zip(sets, needed, strict=True)
    ]
    return TrainData(tuple(streams), tuple(each.weight for each in sets))


def load_train_tokens(
    tokenizer: PreTrainedTokenizerBase, data: str | list[str], num_tokens: int, cache: Path | None = None
) -> Tensor:
    """At least `num_tokens` token ids (num_tokens + some,) of the training splits in `data`, or all there are.

    They are those of `load_train_data`, in memory: whole portions of 1000 documents. Every document is followed by the
    tokenizer's end token, if it has one; blank ones are left out. Several sets follow one another. Of a Hub set only as
    many documents are read as are needed.

    Raises:
        RequestError: there is no text in it.
    """
    stream = _stream(tokenizer, [data] if isinstance(data, str) else data, num_tokens, cache)
    return stream.read(0, len(stream))[0].int()


def _stream(tokenizer: PreTrainedTokenizerBase, names: list[str], num_tokens: int, cache: Path | None) -> TokenStream:
    """The sets one after another, up to the first multiple of 1000 documents that has enough tokens, or their end."""
    pieces: list[Piece] = []
    num_before, documents_before = 0, 0
    for name in names:
        taken = partial(_taken, num_tokens=num_tokens - num_before, num_documents=documents_before)
        known = cached_tokens(tokenizer, find_source(name, "train"), taken, cache)
        kept = taken(known.ends)
        end = int(known.ends[kept - 1]) if kept is not None else len(known.piece.values)
        pieces.append(Piece(known.piece.values[:end], known.piece.masked))
        if kept is not None:
            break
        num_before, documents_before = num_before + end, documents_before + len(known.ends)
    if not any(len(piece.values) for piece in pieces):
        raise RequestError(f"data {', '.join(map(repr, names))} (train): there is no text in it")
    return TokenStream(pieces)


def _taken(ends: np.ndarray[Any, Any], num_tokens: int, num_documents: int) -> int | None:
    """How many documents of a set have `num_tokens` and end a portion that `num_documents` others begin, if any."""
    first = -num_documents % DOCUMENTS_AT_ONCE or DOCUMENTS_AT_ONCE
    possible = range(first, len(ends) + 1, DOCUMENTS_AT_ONCE)
    index = int(np.searchsorted(ends[first - 1 :: DOCUMENTS_AT_ONCE], max(num_tokens, 0)))
    return possible[index] if index < len(possible) else None


def _with_answers(stream: TokenStream, names: list[str]) -> TokenStream:
    if not stream.counts():
        raise RequestError(
            f"data {', '.join(map(repr, names))} (train): there is no answer in its conversations, no message of the "
            "role 'assistant' that the chat template writes as one"
        )
    return stream
