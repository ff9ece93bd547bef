"""The teacher's likeliest tokens at every position of the training windows, computed once and kept on disk.

Of each position, k log-probabilities log p_v of the likeliest tokens v in 16 bits, these tokens, and the log of what is
left for all others together, log Σ p_v over the rest, in 32. They are the teacher's own, without any temperature, which
`log_distribution` brings in: a softer or harder distribution over the k tokens and the rest as one event.

The file has a place for every window from the start, and a CRC-32 of each that is there. So a window is either whole or
missing, whatever interrupts: a cache that was broken off goes on where it was, several processes may fill one, and a
window that was damaged is missing again. It is safetensors, and named after all that decides what is in it: the
teacher's weights and configuration, the tokens, the length of the windows, and k.
"""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kronpress.calibration.moments import check_room, sha256
from kronpress.errors import RequestError, WorkError
from kronpress.evaluation import num_embeddings
from kronpress.tokens import TrainData
from kronpress.tokens.cache import FOLDER_VARIABLE, cache_folder

# What is stored and how; part of every key.
FORMAT = 1
_METADATA = "kronpress.teacher_logits"
_HEADER_BYTES = 1024
# Positions whose logits are in float32 at once.
_POSITIONS_AT_ONCE = 256
# Of a configuration, what says where a model came from and not what it is.
_NAMES_ONLY = {"name_or_path", "transformers_version", "architectures"}


class TopLogits(NamedTuple):
    """Of each position the k likeliest tokens: three tensors (..., k), (..., k) and (...), float32, int64, float32.

    `values` are log-probabilities, downwards, `indices` their tokens, `log_rest` the log of the probability of all
    others. All probabilities of a position add up to 1.
    """

    values: Tensor
    indices: Tensor
    log_rest: Tensor


def top_logits(logits: Tensor, k: int) -> TopLogits:
    """Of logits (..., vocab) the k likeliest tokens, k less than vocab; (..., k) and the rest (...).

    >>> top = top_logits(torch.tensor([0.5, 0.3, 0.15, 0.05]).log(), 2)
    >>> top.values.exp(), top.indices, top.log_rest.exp()
    (tensor([0.5000, 0.3000]), tensor([0, 1]), tensor(0.2000))
    """
    log_p = torch.log_softmax(logits.float(), dim=-1)
    values, indices = log_p.topk(k, dim=-1)
    # Not as 1 − Σ p: of what is left little would be left of its digits.
    log_rest = log_p.scatter(-1, indices, -torch.inf).logsumexp(-1)
    return TopLogits(values, indices, log_rest)


def log_distribution(top: TopLogits, temperature: float = 1.0) -> Tensor:
    """log of p_i^(1/T) / Σ_j p_j^(1/T) over the k tokens and, last, the rest as one event; (..., k + 1).

    With T = 1 it is what `losses.log_distributions` makes of the logits with top_k. With another T that softens all
    tokens before it puts the rest together, which needs all of them.
    """
    return torch.log_softmax(torch.cat([top.values, top.log_rest[..., None]], -1) / temperature, dim=-1)


def num_bytes(num_windows: int, length: int, k: int, vocabulary: int) -> int:
    """The size of the file of all windows: (length − 1)·(k·(2 + b) + 4) + 4 bytes each, and the header.

    b is 2 where the vocabulary has at most 65536 tokens, else 4. The last position predicts nothing in its window.

    >>> num_bytes(1000, 1024, 64, 50257)
    265985024
    """
    types = _types(num_windows, length, k, vocabulary)
    return _HEADER_BYTES + sum(prod(shape) * dtype.itemsize for dtype, shape in types.values())


def _types(num_windows: int, length: int, k: int, vocabulary: int) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """The tensors of the file, wider numbers first, so that all are aligned."""
    index = np.dtype("<u2" if vocabulary <= 2**16 else "<u4")
    several = (num_windows, length - 1, k)
    types = {
        "log_rest": (np.dtype("<f4"), (num_windows, length - 1)),
        "checks": (np.dtype("<u4"), (num_windows,)),
        "indices": (index, several),
        "values": (np.dtype("<f2"), several),
    }
    return types


class TeacherLogits:
    """`top_logits` of the windows of `data`, mapped into memory; windows are numbered from stream to stream.

    Of each stream only whole windows are used, so that all epochs have the same.
    """

    def __init__(
        self, teacher: PreTrainedModel, data: TrainData, length: int, k: int, folder: Path | None = None
    ) -> None:
        """Open the file, or make it, with no window yet.

        Args:
            folder: that of the cache; `cache_folder("teacher-logits")` if None.

        Raises:
            RequestError: k is not between 1 and one less than the vocabulary, or there is less than one window.
            WorkError: the file cannot be written, or the disk has no room for it.
        """
        vocabulary = num_embeddings(teacher)
        if vocabulary is None or not 0 < k < vocabulary:
            raise RequestError(f"teacher cache of {k} tokens at each position: allowed is 1 to {(vocabulary or 1) - 1}")
        self._teacher, self.length, self.k = teacher, length, k
        self.windows = data.whole(length).windows(length, seed=0)
        starts = np.cumsum([0, *(len(stream) // length for stream in self.windows.streams)])
        self._starts, self.num_windows = starts[:-1].tolist(), int(starts[-1])
        self.num_bytes = num_bytes(self.num_windows, length, k, vocabulary)
        self._types = _types(self.num_windows, length, k, vocabulary)
        folder = cache_folder("teacher-logits") if folder is None else folder
        self.path = folder / f"{self._key()}.safetensors"
        try:
            if not self.path.exists() or not self._is_ours():
                self._make()
            self._arrays = self._mapped()
        except OSError as error:
            raise WorkError(_unwritable(folder, error)) from error

    def __len__(self) -> int:
        return self.num_windows

    def number(self, stream: int, window: int) -> int:
        """The number here of a window that is number `window` of a stream, in any epoch."""
        return self._starts[stream] + window % (len(self.windows.streams[stream]) // self.length)

    def has(self, number: int) -> bool:
        """Whether the window is there, whole and as it was written."""
        expected = int(self._arrays["checks"][number])
        return expected != 0 and expected == _check(self._stored(number))

    def missing(self) -> list[int]:
        """The windows that are not there; all others are read, to see that they are as they were written."""
        return [number for number in range(len(self)) if not self.has(number)]

    def read(self, numbers: Iterable[int]) -> TopLogits:
        """Of these windows, (windows, length − 1, k) and (windows, length − 1): at t, what follows the tokens up to t.

        Raises:
            WorkError: one of them is missing or damaged.
        """
        found = []
        for number in numbers:
            if not self.has(number):
                raise WorkError(f"window {number} of {str(self.path)!r} is missing or damaged: fill it again")
            found.append(self._stored(number))
        rests, tokens, logs = (torch.from_numpy(np.stack(each)) for each in zip(*found, strict=True))
        # Rounding to 16 bits has moved the sum of the probabilities away from 1.
        log_p = torch.cat([logs.float(), rests[..., None]], -1).log_softmax(-1)
        return TopLogits(log_p[..., :-1], tokens.long(), log_p[..., -1])

    @torch.no_grad()
    def fill(
        self,
        numbers: Iterable[int] | None = None,
        windows_per_pass: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Let the teacher read what is missing of these windows, of all if None; `progress` gets how many are done.

        Each window is kept as soon as it is computed: what interrupts costs one pass.

        Raises:
            WorkError: a logit is not finite, or the disk is full; the windows that are done are kept.
        """
        wanted = self.missing() if numbers is None else [number for number in numbers if not self.has(number)]
        was_training = self._teacher.training
        self._teacher.eval()
        try:
            with self.path.open("r+b") as file:
                for begin in range(0, len(wanted), windows_per_pass):
                    some = wanted[begin : begin + windows_per_pass]
                    ids = torch.stack([self._ids(number) for number in some]).to(self._teacher.device)
                    logits = self._teacher(input_ids=ids, use_cache=False).logits[:, :-1]
                    if not logits.isfinite().all():
                        raise WorkError(f"the teacher's logits of windows {some} hold NaN or infinity")
                    for number, each in zip(some, logits, strict=True):
                        pieces = [top_logits(piece, self.k) for piece in each.split(_POSITIONS_AT_ONCE)]
                        self._write(file, number, TopLogits(*map(torch.cat, zip(*pieces, strict=True))))
                    if progress is not None:
                        progress(begin + len(some), len(wanted))
                os.fsync(file.fileno())
        except OSError as error:
            raise WorkError(f"{_unwritable(self.path.parent, error)}; the windows that are done are kept") from error
        finally:
            self._teacher.train(was_training)

    def _ids(self, number: int) -> Tensor:
        stream = max(i for i, start in enumerate(self._starts) if start <= number)
        first = (number - self._starts[stream]) * self.length
        return self.windows.streams[stream].read(first, first + self.length)[0]

    # ---- the file ----

    def _stored(self, number: int) -> tuple[np.ndarray[Any, Any], ...]:
        return tuple(self._arrays[name][number] for name in ("log_rest", "indices", "values"))

    def _write(self, file: Any, number: int, top: TopLogits) -> None:
        """The numbers of a window, and when they are in the file its CRC-32."""
        stored = tuple(
            getattr(top, name).cpu().numpy().astype(self._types[name][0]) for name in ("log_rest", "indices", "values")
        )
        check = np.array(_check(stored), dtype="<u4")
        for name, each in zip(("log_rest", "indices", "values", "checks"), (*stored, check), strict=True):
            file.seek(self._place(name) + number * each.nbytes)
            file.write(each.tobytes())
        file.flush()

    def _place(self, name: str) -> int:
        begin: int = self._entries()[name]["data_offsets"][0]
        return _HEADER_BYTES + begin

    def _entries(self) -> dict[str, Any]:
        kinds = {"f": "F", "u": "U"}
        entries, end = {}, 0
        for name, (dtype, shape) in self._types.items():
            begin, end = end, end + prod(shape) * dtype.itemsize
            tag = f"{kinds[dtype.kind]}{8 * dtype.itemsize}"
            entries[name] = {"dtype": tag, "shape": list(shape), "data_offsets": [begin, end]}
        return entries

    def _header(self) -> bytes:
        entries = {"__metadata__": {_METADATA: str(FORMAT)}, **self._entries()}
        return (_HEADER_BYTES - 8).to_bytes(8, "little") + json.dumps(entries).encode().ljust(_HEADER_BYTES - 8)

    def _is_ours(self) -> bool:
        with self.path.open("rb") as file:
            return file.read(_HEADER_BYTES) == self._header() and self.path.stat().st_size == self.num_bytes

    def _make(self) -> None:
        """The file with its header and no window, under its name in one step, unless another process was faster."""
        folder = self.path.parent
        folder.mkdir(parents=True, exist_ok=True)
        check_room("the teacher's logits", self.num_bytes, folder)
        if self.path.exists():  # damaged
            self.path.unlink()
        number, name = tempfile.mkstemp(dir=folder, prefix=".new-")
        try:
            with os.fdopen(number, "wb") as file:
                file.write(self._header())
                file.truncate(self.num_bytes)
            with suppress(FileExistsError):
                os.link(name, self.path)
        finally:
            Path(name).unlink()

    def _mapped(self) -> dict[str, np.ndarray[Any, Any]]:
        # Read as the file is now, also what this and other processes write later.
        return {
            name: np.memmap(self.path, dtype, "r", self._place(name), shape)
            for name, (dtype, shape) in self._types.items()
        }

    def _key(self) -> str:
        def looked_at() -> Iterator[tuple[str, Any]]:
            yield "settings", (FORMAT, self.length, self.k)
            config = self._teacher.config.to_dict()
            yield (
                "configuration",
                json.dumps(
                    {
                        name: value
                        for name, value in config.items()
                        if not name.startswith("_") and name not in _NAMES_ONLY
                    },
                    sort_keys=True,
                    default=str,
                ),
            )
            yield from self._teacher.named_parameters()
            yield from self._teacher.named_buffers()
            for stream in self.windows.streams:
                yield "tokens", stream.digest()

        return sha256(looked_at())


def _check(stored: tuple[np.ndarray[Any, Any], ...]) -> int:
    """CRC-32 of the numbers, never 0, which stands for a window that is missing."""
    check = 0
    for each in stored:
        check = zlib.crc32(np.ascontiguousarray(each).tobytes(), check)
    return check or 1


def _unwritable(folder: Path, error: OSError) -> str:
    return f"could not write the teacher's logits in {str(folder)!r}: {error}; {FOLDER_VARIABLE} names another folder"
