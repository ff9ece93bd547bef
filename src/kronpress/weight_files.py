"""Weights files that are read a tensor at a time, and such that have a place for each tensor before there is any.

In safetensors: 8 bytes for the header's length, a JSON header with each tensor's dtype, shape and place, their bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kronpress.calibration.moments import raw_bytes
from kronpress.checkpoint import CHECKSUM, NO_CHECKSUM, fill_checksum_
from kronpress.errors import RequestError, WorkError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Names in headers; wider numbers stand first in a file, so that all are aligned.
DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
READ_BYTES = 2**20
CHECKED_NUMEL = 2**20


class TensorType(NamedTuple):
    """What is known of a tensor before there is one."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class StoredWeights:
    """The tensors of a checkpoint: of each the file that holds it, and its shape and dtype. `name` is for messages."""

    name: str
    folder: Path
    files: Mapping[str, Path]
    types: Mapping[str, TensorType]

    @classmethod
    def of(cls, name: str, folder: Path) -> StoredWeights:
        """Those of `folder`, of which only the headers are read.

        Raises:
            RequestError: it holds no safetensors weights.
            WorkError: a file is damaged or missing.
        """
        index = folder / INDEX
        if index.is_file():
            with _reading(name):
                paths = {folder / file for file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        elif (folder / WEIGHTS).is_file():
            paths = {folder / WEIGHTS}
        else:
            there = "its pytorch_model.bin is a pickle, which is not opened: " if any(folder.glob("*.bin")) else ""
            raise RequestError(
                f"model {name!r} holds neither {WEIGHTS} nor {INDEX}: {there}save it as safetensors first"
            )
        files: dict[str, Path] = {}
        types: dict[str, TensorType] = {}
        names = {dtype_name: dtype for dtype, dtype_name in DTYPES.items()}
        for path in sorted(paths):
            if not path.is_file():
                raise WorkError(f"model {name!r}: its weights are damaged: {path.name} is missing")
            with _reading(name), safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    piece = file.get_slice(key)
                    if piece.get_dtype() not in names:
                        raise RequestError(f"model {name!r}: its weight {key!r} is stored as {piece.get_dtype()}")
                    files[key] = path
                    types[key] = TensorType(tuple(piece.get_shape()), names[piece.get_dtype()])
        return cls(name, folder, files, types)

    def read(self, key: str) -> Tensor:
        """One tensor, on the CPU.

        Raises:
            WorkError: its file is damaged, or it holds NaN or infinity.
        """
        # The file is opened for one tensor: an open one would keep in memory what was read before.
        with _reading(self.name), safe_open(self.files[key], framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
        # In pieces: the answers for a whole tensor would take more room than it does.
        if tensor.is_floating_point() and not all(
            each.isfinite().all() for each in tensor.flatten().split(CHECKED_NUMEL)
        ):
            kind = "NaN" if tensor.isnan().any() else "infinity"
            raise WorkError(f"model {self.name!r}: its weight {key!r} holds {kind}")
        return tensor

    def identity(self) -> dict[str, list[int]]:
        """Of each file its size and when it was last changed: other weights have another one."""
        states = {path: path.stat() for path in sorted(set(self.files.values()))}
        return {path.name: [state.st_size, state.st_mtime_ns] for path, state in states.items()}


@contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise WorkError(f"model {name!r}: its weights are damaged: {error}") from error


class Shard(NamedTuple):
    """One weights file to be: its header, and where each tensor's bytes are."""

    file: str
    header: bytes
    places: Mapping[str, tuple[int, int]]
    num_bytes: int


def shards(types: Mapping[str, TensorType], max_bytes: int) -> list[Shard]:
    """Tensors in their order, in as few files as hold at most `max_bytes` of them each, or a single larger one."""
    groups: list[dict[str, TensorType]] = []
    room = 0
    for key, each in types.items():
        if not groups or each.nbytes > room:
            groups.append({})
            room = max_bytes
        groups[-1][key] = each
        room -= each.nbytes
    many = len(groups)
    names = [WEIGHTS] if many == 1 else [f"model-{i:05}-of-{many:05}.safetensors" for i in range(1, many + 1)]
    return [_shard(name, group) for name, group in zip(names, groups, strict=True)]


def _shard(file: str, types: Mapping[str, TensorType]) -> Shard:
    ordered = sorted(types.items(), key=lambda item: -item[1].dtype.itemsize)
    entries: dict[str, object] = {"__metadata__": {"format": "pt", CHECKSUM: NO_CHECKSUM}}
    end, ends = 0, {}
    for key, each in ordered:
        start, end = end, end + each.nbytes
        ends[key] = start, end
        entries[key] = {"dtype": DTYPES[each.dtype], "shape": list(each.shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    places = {key: (len(header) + start, len(header) + stop) for key, (start, stop) in ends.items()}
    return Shard(file, header, places, len(header) + end)


class ShardFiles:
    """The shards as files of a folder, in which each tensor is written to its place, in any order and also anew."""

    def __init__(self, folder: Path, layout: list[Shard]) -> None:
        self._paths = {key: (folder / shard.file, place) for shard in layout for key, place in shard.places.items()}
        self._all = [folder / shard.file for shard in layout]
        for path, shard in zip(self._all, layout, strict=True):
            with path.open("r+b" if path.exists() else "w+b") as file:
                file.write(shard.header)
                file.truncate(shard.num_bytes)

    def write(self, tensors: Mapping[str, Tensor]) -> str:
        """Put the tensors into their places, safe from a crash; the SHA-256 of their bytes."""
        digest = hashlib.sha256()
        for key, tensor in tensors.items():
            path, (start, end) = self._paths[key]
            content = raw_bytes(tensor)
            assert content.nbytes == end - start
            digest.update(content)
            with path.open("r+b") as file:
                file.seek(start)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        return digest.hexdigest()

    def checksum(self, keys: list[str]) -> str:
        """The SHA-256 of what is in the places of these tensors."""
        digest = hashlib.sha256()
        for key in keys:
            path, (start, end) = self._paths[key]
            with path.open("rb") as file:
                file.seek(start)
                while start < end:
                    content = file.read(min(READ_BYTES, end - start))
                    start += len(content)
                    digest.update(content)
        return digest.hexdigest()

    def finish(self) -> None:
        """Write the checksum of each file into its header, and the index if there are several."""
        for path in self._all:
            fill_checksum_(path)
        if len(self._all) > 1:
            sizes = sum(end - start for _, (start, end) in self._paths.values())
            names = {key: path.name for key, (path, _) in self._paths.items()}
            index = {"metadata": {"total_size": sizes}, "weight_map": names}
            self._all[0].with_name(INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class Journal:
    """What is done, one line of JSON each, in a file of the folder that is worked in.

    The first line says what the work is. A last line that a crash has cut short does not count.
    """

    NAME = "journal.jsonl"

    def __init__(self, folder: Path, request: dict[str, object], overwrite: bool) -> None:
        """Begin, or go on if the folder holds the same work.

        Raises:
            RequestError: it holds other work, and `overwrite` is False.
        """
        self.path = folder / self.NAME
        first = json.dumps(request) + "\n"
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.is_file() else []
        if lines and lines[0].endswith("\n") and lines[0] != first and not overwrite:
            raise RequestError(
                f"{str(folder)!r} holds the unfinished work of another request: remove it, or pass --overwrite"
            )
        known = lines[1:] if lines and lines[0] == first else []
        kept = [line for line in known if line.endswith("\n")]
        if lines[:1] != [first]:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join([first, *kept]), encoding="utf-8")
        self.done = {entry["unit"]: entry for entry in map(json.loads, kept)}

    def add(self, unit: str, **entry: object) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"unit": unit, **entry}) + "\n")
            file.flush()
            os.fsync(file.fileno())
