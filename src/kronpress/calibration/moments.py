"""The moments of a model's layers as one value, and as one safetensors file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kronpress.errors import RequestError, WorkError
from kronpress.matrices.moments import InputMoments

# What is measured, and how it is stored; part of every key.
FORMAT = 2
_METADATA = "kronpress.moments"
_TENSORS = ("second", "mean", "gradient", "held_out", "magnitude")


@dataclass(frozen=True, eq=False)
class Moments(Mapping[str, InputMoments]):
    """The moments of each targeted layer by its name, all in float64 on the CPU.

    Layers that read the same tensor (query, key, value; gate, up) have the same tensors `second`, `mean` and
    `held_out`. Equal `key`s mean equal weights, targets and calibration data.
    """

    layers: Mapping[str, InputMoments]
    key: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))

    def __getitem__(self, name: str) -> InputMoments:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def save(self, path: Path) -> None:
        """Write all to one safetensors file, whole or not at all; a tensor that layers share is stored once.

        Raises:
            WorkError: the file could not be written; what was there before is unchanged.
        """
        names: dict[int, str] = {}
        tensors: dict[str, Tensor] = {}
        layers: dict[str, dict[str, Any]] = {}
        for layer, moments in self.items():
            layers[layer] = {"num_tokens": moments.num_tokens}
            for part in _TENSORS:
                tensor = getattr(moments, part)
                if tensor is not None:
                    stored = names.setdefault(id(tensor), f"{layer}.{part}")
                    tensors[stored] = tensor
                    layers[layer][part] = stored
        content = {"format": FORMAT, "key": self.key, "layers": layers}
        metadata = {**content, "sha256": _checksum(content, tensors)}
        partial_path = path.with_name(f".{path.name}.partial-{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial_path, {_METADATA: json.dumps(metadata)})
            partial_path.replace(path)
        except (OSError, SafetensorError) as error:
            raise WorkError(f"could not write {str(path)!r}: {error}; what was there before is unchanged") from error
        finally:
            with suppress(OSError):
                partial_path.unlink()


def load_moments(path: Path, key: str | None = None) -> Moments:
    """What `Moments.save` wrote.

    Args:
        key: what the moments have to be of, from `moments_key`; anything if None.

    Raises:
        RequestError: there is no such file, or it has another key.
        WorkError: the file is damaged, or holds no moments.
    """
    if not path.is_file():
        raise RequestError(f"no moments file {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            content = json.loads(file.metadata()[_METADATA])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        moments = Moments(
            {
                layer: InputMoments(**{part: tensors.get(value, value) for part, value in parts.items()})
                for layer, parts in content["layers"].items()
            },
            content["key"],
        )
        is_whole = content.pop("sha256") == _checksum(content, tensors)
    except (SafetensorError, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise WorkError(f"{str(path)!r} is damaged or holds no moments: {error}; delete it") from error
    if not is_whole:
        raise WorkError(f"{str(path)!r} is damaged: it has another SHA-256 than when it was written; delete it")
    if key is not None and moments.key != key:
        raise RequestError(
            f"moments of another model, other targets or other data: {str(path)!r} has the key {moments.key[:12]}..., "
            f"asked for is {key[:12]}..."
        )
    return moments


def _checksum(content: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    return sha256([*content.items(), *sorted(tensors.items())])


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
