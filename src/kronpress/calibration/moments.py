"""The moments of a model's layers as one value, whose tensors are in memory or in one safetensors file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from kronpress.errors import RequestError, WorkError
from kronpress.matrices.moments import InputMoments

# What is measured, and how it is stored; part of every key.
FORMAT = 4
_METADATA = "kronpress.moments"
_PARTS = ("second", "mean", "gradient", "held_out", "magnitude", "counts")
# No size, offset or number of tokens in a file's header is larger.
_LARGEST = 10**15
# The limit of the format (100 MB): what another file begins with may be any number.
_MAX_HEADER_BYTES = 10**8


@dataclass(frozen=True, eq=False)
class Moments(Mapping[str, InputMoments]):
    """The moments of each targeted layer by its name, all in float64 on the CPU.

    Layers that read the same tensor (query, key, value; gate, up) have the same tensors `second`, `mean` and
    `held_out`. Equal `key`s mean equal weights, targets and calibration data. Where the tensors are in a file they are
    read each time that a layer is asked for, and nothing is kept.

    `table` has of each layer its `num_tokens`, its `similarity` if that was measured, and of each part that was
    measured the name of its tensor.
    """

    table: Mapping[str, Mapping[str, Any]]
    tensors: Mapping[str, Tensor]
    key: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "table", MappingProxyType(dict(self.table)))
        object.__setattr__(self, "tensors", MappingProxyType(self.tensors))

    @classmethod
    def of(cls, layers: Mapping[str, InputMoments], key: str) -> Moments:
        """Moments in memory; a tensor that layers share has one name."""
        names: dict[int, str] = {}
        tensors: dict[str, Tensor] = {}
        table: dict[str, dict[str, Any]] = {}
        for layer, moments in layers.items():
            table[layer] = {"num_tokens": moments.num_tokens}
            if moments.similarity is not None:
                table[layer]["similarity"] = moments.similarity
            for part in _PARTS:
                tensor = getattr(moments, part)
                if tensor is not None:
                    name = names.setdefault(id(tensor), f"{layer}.{part}")
                    tensors[name] = tensor
                    table[layer][part] = name
        return cls(table, tensors, key)

    def __getitem__(self, layer: str) -> InputMoments:
        named = self.table[layer]
        parts = {part: self.tensors[named[part]] for part in _PARTS if part in named}
        return InputMoments(num_tokens=named["num_tokens"], similarity=named.get("similarity"), **parts)

    def __contains__(self, layer: object) -> bool:
        return layer in self.table  # without reading its tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)

    def num_tokens(self, layer: str) -> int:
        """On how many tokens the layer was measured; no tensor is read."""
        return self.table[layer]["num_tokens"]

    def save(self, path: Path) -> None:
        """Write all to one safetensors file, whole or not at all; a tensor that layers share is stored once.

        Raises:
            WorkError: the file could not be written; what was there before is unchanged.
        """
        with MomentsFile(path, self, self.key) as file:
            file.append(self)
            file.finish()


class MomentsFile:
    """A safetensors file of moments that is written some layers after others, and there when all are.

        with MomentsFile(path, names, key) as file:
            for some in ...:
                file.append(some)
            moments = file.finish()

    The header comes first but is known last: room for the longest one is left. The checksum is that of the tensors as
    they stand in the file and then of what the header says of them.
    """

    def __init__(self, path: Path | None, layers: Iterable[str], key: str) -> None:
        """Begin the file of `layers`; without a path it has no name, and lives as long as the moments in it.

        Raises:
            WorkError: it cannot be written there.
        """
        self._path, self._key = path, key
        self._layers = list(layers)
        self._table: dict[str, Mapping[str, Any]] = {}
        self._entries: dict[str, dict[str, Any]] = {}
        self._end = 0  # of the tensors written so far
        self._digest = hashlib.sha256()
        self._header_bytes = _most_header_bytes(self._layers, key)
        self._undo = ExitStack()
        with self._writing():
            if path is None:
                self._file: BinaryIO = tempfile.TemporaryFile()  # type: ignore[assignment]  # noqa: SIM115
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
                self._file = self._partial.open("w+b")
                self._undo.callback(self._partial.unlink)
            self._undo.callback(self._file.close)
            self._file.seek(8 + self._header_bytes)

    def __enter__(self) -> MomentsFile:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # of bytes that a full disk has not taken
            self._undo.close()

    def append(self, some: Moments) -> None:
        """Write the tensors of some more layers, in any order, one at a time.

        Raises:
            WorkError: the disk is full, or failed.
        """
        for name, tensor in some.tensors.items():
            end = self._end + tensor.nbytes
            self._entries[name] = _entry(list(tensor.shape), self._end, end)
            self._end = end
            self._digest.update(raw_bytes(tensor))
            with self._writing():
                self._file.write(raw_bytes(tensor))
        self._table |= some.table

    def finish(self) -> Moments:
        """The moments of all layers, which are read from the file, in the order in which it was begun.

        Raises:
            WorkError: the disk is full, or failed; what was there before is unchanged.
        """
        table = {layer: self._table[layer] for layer in self._layers}
        content = _content(table, self._key)
        header = _header(content, self._entries, _checksum(self._digest, content, self._entries))
        assert len(header) <= self._header_bytes
        with self._writing():
            self._file.seek(0)
            self._file.write(self._header_bytes.to_bytes(8, "little") + header.ljust(self._header_bytes))
            self._file.flush()
            if self._path is not None:
                self._partial.replace(self._path)
        self._undo.pop_all()
        return Moments(table, _StoredTensors(self._file, 8 + self._header_bytes, self._entries), self._key)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = str(self._path or tempfile.gettempdir())
            raise WorkError(f"could not write {where!r}: {error}; what was there before is unchanged") from error


class _StoredTensors(Mapping[str, Tensor]):
    """Tensors of an open file by name, each read when it is asked for and not kept.

    One that is still in use is given out again, so that layers that share it go on sharing it. The file is read as
    bytes and not mapped into memory: pages of a mapping count as the process's own as long as it stands.
    """

    def __init__(self, file: BinaryIO, start: int, entries: Mapping[str, dict[str, Any]]) -> None:
        self._file, self._start, self._entries = file, start, entries
        self._in_use: weakref.WeakValueDictionary[str, Tensor] = weakref.WeakValueDictionary()
        self._lock = Lock()  # the file has one position
        weakref.finalize(self, file.close)

    def __getitem__(self, name: str) -> Tensor:
        with self._lock:
            tensor = self._in_use.get(name)
            if tensor is None:
                tensor = self._in_use[name] = self._read(name)
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def _read(self, name: str) -> Tensor:
        tensor = torch.empty(self._entries[name]["shape"], dtype=torch.float64, device="cpu")
        try:
            self._file.seek(self._start + self._entries[name]["data_offsets"][0])
            num_read = self._file.readinto(raw_bytes(tensor))  # type: ignore[attr-defined]
        except OSError as error:
            raise WorkError(f"the moments {name!r} could not be read from their file: {error}") from error
        if num_read < tensor.nbytes:
            raise WorkError(f"the moments {name!r} are no longer in their file: it was cut short after it was opened")
        return tensor


def load_moments(path: Path, key: str | None = None) -> Moments:
    """What `Moments.save` wrote; the file is checked as a whole, then tensors are read from it as they are asked for.

    Args:
        key: what the moments have to be of, from `moments_key`; anything if None.

    Raises:
        RequestError: there is no such file, or it has another key or another format.
        WorkError: the file is damaged, or holds no moments.
    """
    if not path.is_file():
        raise RequestError(f"no moments file {str(path)!r}")
    with ExitStack() as undo:
        try:
            file = undo.enter_context(path.open("rb"))
            header_bytes = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(min(header_bytes, _MAX_HEADER_BYTES)))
            content = json.loads(entries.pop("__metadata__")[_METADATA])
            checksum, written_as = content.pop("sha256"), content["format"]
            data = hashlib.file_digest(file, "sha256")
        except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise WorkError(f"{str(path)!r} is damaged or holds no moments: {error}; delete it") from error
        if written_as != FORMAT:
            raise RequestError(
                f"{str(path)!r} holds moments of format {written_as}, and this version reads format {FORMAT}: delete it"
            )
        if checksum != _checksum(data, content, entries):
            raise WorkError(f"{str(path)!r} is damaged: it has another SHA-256 than when it was written; delete it")
        if key is not None and content["key"] != key:
            raise RequestError(
                f"moments of another model, other targets or other data: {str(path)!r} has the key "
                f"{content['key'][:12]}..., asked for is {key[:12]}..."
            )
        undo.pop_all()
    return Moments(content["layers"], _StoredTensors(file, 8 + header_bytes, entries), content["key"])


def _content(table: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, Any]:
    return {"format": FORMAT, "key": key, "layers": table}


def _entry(shape: list[int], begin: int, end: int) -> dict[str, Any]:
    """What a safetensors header says of a tensor; begin and end are counted in bytes from the end of the header."""
    return {"dtype": "F64", "shape": shape, "data_offsets": [begin, end]}


def _header(content: dict[str, Any], entries: dict[str, dict[str, Any]], checksum: str) -> bytes:
    metadata = {_METADATA: json.dumps({**content, "sha256": checksum})}
    return json.dumps({"__metadata__": metadata, **entries}).encode()


def _checksum(data: Any, content: dict[str, Any], entries: dict[str, dict[str, Any]]) -> str:
    """SHA-256 in hex of the tensors, which `data` has taken in already, and of what the header says."""
    digest = data.copy()
    digest.update(json.dumps([content, entries]).encode())
    return digest.hexdigest()


def _most_header_bytes(layers: list[str], key: str) -> int:
    """How long the header gets at most, whatever the layers share; a multiple of 8, which aligns the tensors."""
    longest = max(layers, key=lambda layer: len(json.dumps(json.dumps(layer))), default="")
    named = {
        "num_tokens": _LARGEST,
        "similarity": -sys.float_info.min,
        **{part: f"{longest}.{part}" for part in _PARTS},
    }
    entries = {f"{layer}.{part}": _entry([_LARGEST] * 2, _LARGEST, _LARGEST) for layer in layers for part in _PARTS}
    header = _header(_content(dict.fromkeys(layers, named), key), entries, hashlib.sha256().hexdigest())
    return -(-len(header) // 8) * 8


def check_room(what: str, needed: int, folder: Path) -> None:
    """Raises WorkError unless the existing folder has room for `needed` bytes of `what`."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise WorkError(f"{what} need {needed / 1e6:,.1f} MB, and {str(folder)!r} has {free / 1e6:,.1f} MB free")


def raw_bytes(tensor: Tensor) -> Any:
    """The bytes of a tensor as a flat array."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def sha256(values: Iterable[tuple[str, Any]]) -> str:
    """Of names and values in this order, in hex; of a tensor its dtype, shape and bytes."""
    digest = hashlib.sha256()
    for name, value in values:
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(raw_bytes(value))
        else:
            digest.update(f"{name} {value!r}\n".encode())
    return digest.hexdigest()
