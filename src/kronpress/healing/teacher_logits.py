"""The teacher's likeliest tokens at every position of the training windows, computed once and kept on disk.

Of each position, k log-probabilities of the likeliest tokens in 16 bits, these tokens, and the log of what is left for
all others together in 32. They are softened by the temperature of the distillation before the others are put together:
exactly what `losses.log_distributions` computes of the teacher's logits, but for the rounding.

The file has a place for every window from the start, and a CRC-32 of each that is there. So a window is either whole or
missing, whatever interrupts: a cache that was broken off goes on where it was, several processes may fill one, and a
window that was damaged is missing again. It is safetensors, and named after all that decides what is in it: the
teacher's weights and configuration, the tokens, the length of the windows, k and the temperature.
"""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kronpress.calibration.moments import check_room, sha256
from kronpress.errors import RequestError, WorkError
from kronpress.evaluation import num_embeddings
from kronpress.healing.chunks import Head, find_head, without_logits
from kronpress.healing.losses import TopLogits, top_logits
from kronpress.tokens import TrainData, Windows
from kronpress.tokens.cache import FOLDER_VARIABLE, cache_folder

# What is stored and how; part of every key.
FORMAT = 1
_METADATA = "kronpress.teacher_logits"
_HEADER_BYTES = 1024
# Positions whose logits are in float32 at once.
_POSITIONS_AT_ONCE = 256
# Of a configuration, what says where a model came from and not what it is.
_NAMES_ONLY = {"name_or_path", "transformers_version", "architectures"}
# What the keys of a batch begin with that are of the teacher.
_KEY = "teacher_"
# Logarithms below what 16 bits can hold.
_LEAST = -65504.0


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
        self,
        teacher: PreTrainedModel,
        data: TrainData,
        length: int,
        k: int | None = None,
        folder: Path | None = None,
        *,
        temperature: float = 1.0,
    ) -> None:
        """Open the file, or make it, with no window yet.

        Args:
            k: tokens at each position; the whole vocabulary if None, or if there are no more.
            folder: that of the cache; `cache_folder("teacher-logits")` if None.

        Raises:
            RequestError: k is less than 1, or there is less than one window.
            WorkError: the file cannot be written, or the disk has no room for it.
        """
        vocabulary = num_embeddings(teacher)
        assert vocabulary is not None  # of a language model
        k = vocabulary if k is None else min(k, vocabulary)
        if k < 1:
            raise RequestError(f"teacher cache of {k} tokens at each position: allowed is 1 or more")
        self._teacher, self.length, self.k, self.temperature = teacher, length, k, temperature
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

    def missing(self, numbers: Iterable[int] | None = None) -> list[int]:
        """Which of these windows, of all if None, are not there; the others are read, to see that they are whole."""
        return [number for number in (range(len(self)) if numbers is None else numbers) if not self.has(number)]

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

    @contextmanager
    def teacher_on(self, device: torch.device) -> Iterator[None]:
        """Inside the block the teacher is on the device."""
        before = self._teacher.device
        self._teacher.to(device)  # type: ignore[arg-type]
        try:
            yield
        finally:
            self._teacher.to(before)  # type: ignore[arg-type]

    @torch.no_grad()
    def fill(
        self,
        numbers: Iterable[int] | None = None,
        windows_per_pass: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Let the teacher read what is missing of these windows, of all if None; `progress` gets how many are done.

        Each window is kept as soon as it is computed: what interrupts costs one pass. Of the logits no more than those
        of a few positions are in memory at once, if the teacher's head is understood.

        Raises:
            WorkError: a logit is not finite, or the disk is full; the windows that are done are kept.
        """
        wanted = self.missing(numbers)
        was_training = self._teacher.training
        self._teacher.eval()
        found = find_head(self._teacher)
        head = None if isinstance(found, str) else found
        try:
            check_room("the teacher's logits", len(wanted) * (self.num_bytes // len(self)), self.path.parent)
            with self.path.open("r+b") as file:
                for begin in range(0, len(wanted), windows_per_pass):
                    some = wanted[begin : begin + windows_per_pass]
                    ids = torch.stack([self._ids(number) for number in some]).to(self._teacher.device)
                    for number, given in zip(some, self._given(head, ids), strict=True):
                        pieces = [self._top(head, piece, number) for piece in given[:-1].split(_POSITIONS_AT_ONCE)]
                        self._write(file, number, TopLogits(*map(torch.cat, zip(*pieces, strict=True))))
                    if progress is not None:
                        progress(begin + len(some), len(wanted))
                os.fsync(file.fileno())
        except OSError as error:
            raise WorkError(f"{_unwritable(self.path.parent, error)}; the windows that are done are kept") from error
        finally:
            self._teacher.train(was_training)

    def _given(self, head: Head | None, ids: Tensor) -> Tensor:
        """What the teacher's head reads at ids (windows, length), or, where it is not understood, the logits."""
        if head is None:
            logits: Tensor = self._teacher(input_ids=ids, use_cache=False).logits
            return logits
        with without_logits(head) as read:
            self._teacher(input_ids=ids, use_cache=False)
        return read[0]

    def _top(self, head: Head | None, given: Tensor, number: int) -> TopLogits:
        logits = given if head is None else head.logits(given)
        if not logits.isfinite().all():
            raise WorkError(f"the teacher's logits of window {number} hold NaN or infinity")
        return top_logits(logits, self.k, self.temperature)

    def _ids(self, number: int) -> Tensor:
        stream = max(i for i, start in enumerate(self._starts) if start <= number)
        first = (number - self._starts[stream]) * self.length
        return self.windows.streams[stream].read(first, first + self.length)[0]

    # ---- the file ----

    def _stored(self, number: int) -> tuple[np.ndarray[Any, Any], ...]:
        return tuple(self._arrays[name][number] for name in ("log_rest", "indices", "values"))

    def _write(self, file: Any, number: int, top: TopLogits) -> None:
        """The numbers of a window, and when they are in the file its CRC-32."""
        top = top._replace(values=top.values.clamp(min=_LEAST))
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
            yield "settings", (FORMAT, self.length, self.k, self.temperature)
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


class WithTeacher(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The windows of a training, each with what the cache has of the teacher there; `top_of` finds it in a batch."""

    def __init__(self, windows: Windows, cache: TeacherLogits) -> None:
        self.windows, self.cache = windows, cache

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        top = self.cache.read([self.cache.number(*self.windows.place(index))])
        return {**self.windows[index], **{_KEY + name: each[0] for name, each in top._asdict().items()}}


def top_of(batch: Mapping[str, Tensor]) -> TopLogits | None:
    """What a batch has of the teacher, (windows, length − 1, k) and (windows, length − 1), if it has anything."""
    if _KEY + "values" not in batch:
        return None
    return TopLogits(*(batch[_KEY + name] for name in TopLogits._fields))


def _check(stored: tuple[np.ndarray[Any, Any], ...]) -> int:
    """CRC-32 of the numbers, never 0, which stands for a window that is missing."""
    check = 0
    for each in stored:
        check = zlib.crc32(np.ascontiguousarray(each).tobytes(), check)
    return check or 1


def _unwritable(folder: Path, error: OSError) -> str:
    return f"could not write the teacher's logits in {str(folder)!r}: {error}; {FOLDER_VARIABLE} names another folder"
