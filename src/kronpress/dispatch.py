"""Which way each structured layer of a model goes: what it may do for time, what the device can do, and why.

    kp.set_dispatch(model, kp.Dispatch(dense_cache_bytes=2**30), measure=True)

Nothing is measured without being asked for. The constants of a device are measured in about a second, once for each
device, torch version and number of threads, and kept in the user's cache folder. `ways.py` chooses by them.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, StrictBool, TypeAdapter, ValidationError
from torch import nn

from kronpress.errors import RequestError
from kronpress.layers import NativeLinear, StructuredLinear
from kronpress.ways import LONG_PREFILL, Constants, Way, Ways, fastest

MEASURED_DTYPES = (torch.float32, torch.bfloat16)
# Of each measurement, in each dtype.
SECONDS_PER_MEASUREMENT = 0.07
# More than the C library keeps for the process.
NEW_BYTES = 3 * 2**24

_ConstantsFile = TypeAdapter(dict[str, Constants])


class Dispatch(BaseModel):
    """What the layers of a model may do beside multiplying by their factors.

    `dense_cache_bytes`: dense weights that they may keep, all together, `inf` for as many as pay; those that save most
    time for their bytes come first. `transient_dense`: whether a layer may build its dense weight for one long prefill
    and free it. `native`: whether few tokens on a CPU may take the native routine, through the `nn.Linear` layers that
    were left dense too: of a small model's decode the head is the largest part.

    With an unlimited cache no layer is meant to be slower than a dense one, beyond a few hundredths. Without it, which
    is the default, those are whose factors take more arithmetic than W, at lengths between a few tokens and some
    hundreds: `explain` says which.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dense_cache_bytes: Annotated[float, Field(ge=0)] = 0
    transient_dense: StrictBool = True
    native: StrictBool = True


class Explained(BaseModel):
    """How one layer computes, why, and how many times as fast as a dense layer each way is predicted to be.

    The native way is taken wherever it can be and has no prediction.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    shape: tuple[int, int]
    structure: str
    spec: dict[str, Any]
    way: Way
    reason: str
    predicted_gains: dict[str, float]


def set_dispatch(
    model: nn.Module,
    dispatch: Dispatch | None = None,
    *,
    constants: Mapping[tuple[str, int], Constants] | None = None,
    measure: bool = False,
) -> None:
    """Let the linear layers of `model` compute as `dispatch` allows; dense weights kept so far are given up.

    Which layers may keep one is settled here, for the dtype and the device that the model has now.

    Args:
        dispatch: the default if None.
        constants: of devices, by device type and bytes of a number; if None, those in the user's cache folder,
            and those of the built-in table where there are none.
        measure: measure them first if the cache folder does not have those of this device.

    Raises:
        RequestError: the model has no structured linear layer.
    """
    layers = _layers(model)
    dispatch = dispatch or Dispatch()
    if constants is None:
        device = next(iter(layers.values())).factors["weight"].device
        constants = measured_constants(device, measure=measure and device.type != "meta")
    allowed: set[Way] = {"factors"}
    if dispatch.native:
        allowed.add("native")
    if dispatch.transient_dense:
        allowed.add("transient dense")
    for layer in layers.values():
        layer.ways = Ways(allowed, constants)
    _grant_caches_(layers, dispatch.dense_cache_bytes)
    for module in model.modules():
        if type(module) in (nn.Linear, NativeLinear):
            module.__class__ = NativeLinear if dispatch.native else nn.Linear


def _grant_caches_(layers: Mapping[str, StructuredLinear], num_bytes: float) -> None:
    """Let layers keep their dense weights, those first that save most time for each byte, as far as the bytes go."""
    worth = []
    for layer in layers.values():
        weight = layer.factors["weight"]
        itemsize = weight.element_size()
        seconds = layer.ways.predictions(layer.sizes, LONG_PREFILL, weight.device.type, itemsize)
        size = layer.out_features * layer.in_features * itemsize
        without = fastest(seconds, layer.ways.allowed)
        if fastest(seconds, layer.ways.allowed | {"cached dense"}) == "cached dense":
            worth.append(((seconds[without] - seconds["cached dense"]) / size, size, layer))
    for _, size, layer in sorted(worth, key=lambda each: -each[0]):
        if size <= num_bytes:
            num_bytes -= size
            layer.ways = Ways(layer.ways.allowed | {"cached dense"}, layer.ways.constants)


def drop_dense_caches(model: nn.Module) -> None:
    """Give up the dense weights that layers keep: they are built anew when next needed.

    Needed only after factors were changed through `.data`, which leaves no trace.
    """
    for layer in _layers(model).values():
        layer.ways.cache.clear()


def explain(
    model: nn.Module, num_tokens: int, dtype: torch.dtype | None = None, *, is_training: bool = False
) -> list[Explained]:
    """How each structured linear layer computes with `num_tokens` tokens, and why; nothing is run.

    Args:
        dtype: of weights and inputs; that of each layer if None.
        is_training: gradients are wanted of the factors.

    Raises:
        RequestError: no token, or a model without structured linear layers.
    """
    if num_tokens < 1:
        raise RequestError(f"{num_tokens} tokens: at least one is needed")
    rows = []
    for name, layer in _layers(model).items():
        weight = layer.factors["weight"]
        factor_dtype, device = dtype or weight.dtype, weight.device
        way: Way = "factors"
        reason = "gradients of the factors are wanted"
        seconds = layer.ways.predictions(layer.sizes, num_tokens, device.type, factor_dtype.itemsize)
        if not is_training:
            factors = {
                part: torch.empty((), dtype=factor_dtype, device=device).expand(factor.shape).contiguous()
                if factor.is_floating_point()
                else factor
                for part, factor in layer.factors.items()
            }
            x = torch.empty((), dtype=factor_dtype, device=device).expand(num_tokens, layer.in_features)
            with torch.no_grad():
                way = layer.ways.choose(layer.sizes, factors, x)
            reason = _reason(way, layer.ways, seconds)
        rows.append(
            Explained(
                name=name,
                shape=(layer.out_features, layer.in_features),
                structure=layer.structure.__name__,
                spec=layer.spec.model_dump(mode="json"),
                way=way,
                reason=reason,
                predicted_gains={each: seconds["dense"] / seconds[each] for each in seconds if each != "dense"},
            )
        )
    return rows


def _reason(way: Way, ways: Ways, seconds: Mapping[str, float]) -> str:
    """One clause."""
    gain = {each: f"{seconds['dense'] / seconds[each]:.2f}" for each in seconds}
    match way:
        case "native":
            return "few tokens on a CPU: the factors are streamed from memory once"
        case "cached dense" | "transient dense":
            return f"{gain[way]} of dense by prediction, the factors {gain['factors']}"
        case "factors":
            if seconds["cached dense"] < seconds["factors"] and "cached dense" not in ways.allowed:
                return f"{gain['factors']} of dense by prediction; a dense weight would be faster, and may not be kept"
            return f"{gain['factors']} of dense by prediction"


def _layers(model: nn.Module) -> dict[str, StructuredLinear]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, StructuredLinear)}
    if not layers:
        raise RequestError("the model has no structured linear layer: there is nothing to dispatch")
    return layers


# ---- what a device can do ----


def measured_constants(
    device: torch.device | str, *, measure: bool = False, path: Path | None = None
) -> dict[tuple[str, int], Constants]:
    """Those of this device, by its type and the bytes of a number, from the cache folder; what is missing is left out.

    Args:
        measure: measure what is missing, about half a second for each dtype, and keep it. What fails is left out.
        path: of the file; `constants_path()` if None.
    """
    device, path = torch.device(device), path or constants_path()
    known = _read(path)
    found = {}
    for dtype in MEASURED_DTYPES:
        key = _key(device, dtype)
        if key not in known and measure:
            # Whatever this device cannot do, or a full disk: the table serves.
            with contextlib.suppress(RuntimeError, OSError):
                known = {**_read(path), key: measured(device, dtype)}
                _write(path, known)
        if key in known:
            found[device.type, dtype.itemsize] = known[key]
    return found


def constants_path() -> Path:
    """`kronpress/dispatch.json` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kronpress" / "dispatch.json"


def measured(device: torch.device, dtype: torch.dtype) -> Constants:
    """What the device does in a second, each the best of some repetitions, about half a second in all."""
    size = 1024
    # More than a processor's last cache holds, so that each weight comes from memory.
    weights = [torch.randn(size, size, device=device).to(dtype) for _ in range(24)]
    x = torch.randn(LONG_PREFILL, size, device=device).to(dtype)
    y, one = torch.empty_like(x), torch.zeros(8, device=device)
    # As large as a weight: new memory has its price as well.
    pairs = torch.stack(weights[:4]).reshape(4 * size, size // 2, 2)
    left, right = torch.randn(256, 24, device=device).to(dtype), torch.randn(64, 24, 32, device=device).to(dtype)
    batch = left.expand(64, 256, 24)

    def stream() -> None:
        for weight in weights:
            F.linear(x[:1], weight)

    def new() -> None:
        torch.empty(NEW_BYTES, dtype=torch.uint8, device=device).fill_(1)

    with torch.no_grad():
        return Constants(
            flops_per_second=2 * x.numel() * size / _seconds(lambda: F.linear(x, weights[0]), device),
            batched_flops_per_second=2 * right.numel() * 256 / _seconds(lambda: torch.bmm(batch, right), device),
            weight_bytes_per_second=sum(weight.nbytes for weight in weights) / _seconds(stream, device),
            bytes_per_second=2 * x.nbytes / _seconds(lambda: torch.mul(x, 2, out=y), device),
            strided_bytes_per_second=2 * pairs.nbytes / _seconds(lambda: pairs.mT.contiguous(), device),
            new_bytes_per_second=NEW_BYTES / _seconds(new, device),
            seconds_per_operation=_seconds(lambda: one + one, device),
        )


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Of one `work`, the least of those that fit into the time of one measurement, and of three at least."""
    least, started, repetitions = float("inf"), time.perf_counter(), 0
    while repetitions < 3 or time.perf_counter() - started < SECONDS_PER_MEASUREMENT:
        _wait(device)
        begun = time.perf_counter()
        work()
        _wait(device)
        least = min(least, time.perf_counter() - begun)
        repetitions += 1
    return least


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _key(device: torch.device, dtype: torch.dtype) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"
    return f"{name}, {platform.node()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {dtype}"


def _read(path: Path) -> dict[str, Constants]:
    """What the file holds; nothing if there is none or it is damaged."""
    try:
        return _ConstantsFile.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return {}


def _write(path: Path, known: Mapping[str, Constants]) -> None:
    """The whole file at once, so that another process never reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps({key: value.model_dump() for key, value in known.items()}, indent=1))
    partial.replace(path)
