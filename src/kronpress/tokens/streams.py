"""Streams of token ids, in memory or on disk, and windows cut from them."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kronpress.errors import RequestError

_AT_ONCE = 2**20


@dataclass(frozen=True, eq=False)
class Piece:
    """Token ids `values` (num_tokens,); where `masked`, 2·id + 1 of a token that counts in the loss, else 2·id."""

    values: np.ndarray[Any, Any]
    masked: bool = False


class TokenStream:
    """Token ids one after another, and which of them count in the loss: all but the questions of conversations.

    A stream knows where its tokens are and holds none itself. It is sliced without a copy, and read by `read`:

    >>> stream = TokenStream.of(torch.tensor([5, 6, 7]))
    >>> len(stream[1:]), stream.read(1, 5)[0].tolist()
    (2, [6, 7, 5, 6])
    """

    def __init__(self, pieces: list[Piece]) -> None:
        self.pieces = [piece for piece in pieces if len(piece.values)]
        self._ends = list(accumulate(len(piece.values) for piece in self.pieces))

    @classmethod
    def of(cls, tokens: Tensor) -> TokenStream:
        """The stream of the token ids (num_tokens,), which all count."""
        return cls([Piece(tokens.detach().cpu().numpy())])

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, kept: slice) -> TokenStream:
        first, last, _ = kept.indices(len(self))
        starts = [0, *self._ends]
        return TokenStream(
            [
                Piece(piece.values[max(first - start, 0) : max(last - start, 0)], piece.masked)
                for start, piece in zip(starts, self.pieces, strict=False)
            ]
        )

    @property
    def is_masked(self) -> bool:
        """Whether there may be tokens that do not count."""
        return any(piece.masked for piece in self.pieces)

    def counts(self) -> bool:
        """Whether there is any token that counts; of conversations, tokens are read until one is found."""
        return any(not piece.masked or bool((piece.values & 1).any()) for piece in self.pieces)

    def read(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Tokens number `first` to `last` - 1 as (ids, which count), int64 and bool; after the end it begins again."""
        ids, counted = [], []
        while first < last:
            within = first % len(self)
            number = bisect_right(self._ends, within)
            piece, end = self.pieces[number], self._ends[number]
            begin = within - (end - len(piece.values))
            some = np.asarray(piece.values[begin : begin + last - first]).astype(np.int64)
            first += len(some)
            ids.append(some >> 1 if piece.masked else some)
            counted.append(some & 1 == 1 if piece.masked else np.ones(len(some), dtype=bool))
        if not ids:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.bool)
        return torch.from_numpy(np.concatenate(ids)), torch.from_numpy(np.concatenate(counted))

    def largest(self) -> int:
        """The largest token id; all tokens are read for it. An empty stream has -1."""
        return max((int(piece.values.max()) >> piece.masked for piece in self.pieces), default=-1)

    def digest(self) -> str:
        """SHA-256 in hex of the ids, however they are stored."""
        digest = hashlib.sha256()
        for piece in self.pieces:
            for begin in range(0, len(piece.values), _AT_ONCE):
                some = np.asarray(piece.values[begin : begin + _AT_ONCE]).astype("<i8")
                digest.update((some >> 1 if piece.masked else some).tobytes())
        return digest.hexdigest()


def pack(tokens: Tensor, sequence_length: int) -> Tensor:
    """Consecutive windows (num_sequences, sequence_length); a last window that is not full is left out.

    >>> pack(torch.arange(7), 3).tolist()
    [[0, 1, 2], [3, 4, 5]]

    Raises:
        RequestError: there are fewer tokens than one window.
    """
    check_length(len(tokens), sequence_length)
    num_sequences = len(tokens) // sequence_length
    return tokens[: num_sequences * sequence_length].view(num_sequences, sequence_length)


def check_length(num_tokens: int, sequence_length: int) -> None:
    """Raises RequestError where `num_tokens` do not fill one window."""
    if num_tokens < sequence_length:
        raise RequestError(f"{num_tokens} tokens of text are less than one sequence of {sequence_length}")
