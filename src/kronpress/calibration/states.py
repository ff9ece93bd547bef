"""Hidden states of all parts of the data, in a file without a name that no crash leaves behind."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from kronpress.calibration.moments import raw_bytes
from kronpress.errors import WorkError


class StatesFile:
    """Of each part of the data a tensor of its own shape, and that at several levels, such as before each block.

    Level 0 is written first, part after part; at other levels, and afterwards, parts are written in any order. They are
    read and written as bytes and not mapped into memory: a write into a mapping ends the process when the disk is full.
    """

    def __init__(self, folder: Path) -> None:
        """Begin the file in `folder`, which is made if it is not there; raises WorkError where it cannot be written."""
        self._folder = folder
        # Of each part: the shape, dtype and place of its states within a level.
        self._parts: list[tuple[torch.Size, torch.dtype, int]] = []
        self._level_bytes = 0
        with self._disk():
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

    def close(self) -> None:
        """Give the disk space back."""
        with suppress(OSError):  # of bytes that a full disk has not taken
            self._file.close()

    def write(self, level: int, number: int, states: Tensor) -> None:
        """Keep the states of the part `number`, in the dtype that they have at level 0; raises WorkError."""
        if number == len(self._parts):
            self._parts.append((states.shape, states.dtype, self._level_bytes))
            self._level_bytes += states.nbytes
        _, dtype, place = self._parts[number]
        with self._disk():
            self._file.seek(level * self._level_bytes + place)
            self._file.write(raw_bytes(states.to(dtype)))
            self._file.flush()

    def read(self, level: int, number: int) -> Tensor:
        """The states of the part `number`, on the CPU; raises WorkError."""
        shape, dtype, place = self._parts[number]
        content = bytearray(shape.numel() * dtype.itemsize)
        with self._disk():
            self._file.seek(level * self._level_bytes + place)
            self._file.readinto(content)
        return torch.frombuffer(content, dtype=dtype).view(shape)

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise WorkError(f"the hidden states could not be kept in {str(self._folder)!r}: {error}") from error
