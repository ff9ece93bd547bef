"""`calibrate`: the moments of all targeted layers of a model, in as many passes over the data as memory asks for.

Letters: x (in_features,) is a layer's input for one token, g (out_features,) the loss's gradient by its output.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kronpress.calibration.batches import Batch, Part, checked_batches, count_sequences, divide, select, to_device
from kronpress.calibration.moments import FORMAT, Moments, MomentsFile, check_room, load_moments, sha256
from kronpress.calibration.sums import CHUNK, Collector, as_for_use
from kronpress.errors import RequestError
from kronpress.matrices.moments import InputMoments
from kronpress.planning import find_targets
from kronpress.recipe import Recipe
from kronpress.surgery import linear_layers

# Memory for sums (0.75 GiB): half of what calibrating may take beside the model; activations take the rest.
MAX_BYTES = 3 * 2**28
# Settings of a configuration that say nothing about what the model computes.
_NAMES_ONLY = {"architectures", "dtype", "transformers_version"}


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    recipe: Recipe,
    *,
    cache: Path | None = None,
    max_bytes: int = MAX_BYTES,
    messages: Callable[[str], None] = lambda _: None,
) -> Moments:
    """The input moments of the layers that `recipe` targets, summed in float64 over all tokens of `batches`.

    Of n sequences, ⌊n · calibration.held_out⌋ spread evenly are kept apart and give `held_out` alone. Tokens that an
    `attention_mask` (batch, length) hides are left out wherever a layer reads (batch, length, ...) or the same
    flattened to (batch · length, ...).

    With `calibration.sensitivity`, `gradient` is the output side of the Fisher information: for every token a label is
    drawn from the model's own prediction, and g is the gradient of the summed cross-entropy. One generator, seeded by
    `recipe.seed`, draws one number for each token in the order of the sequences, so that the labels do not depend on
    how these are divided into batches, nor on padding. A model whose output has no `logits` of shape (batch, length,
    classes) has no `gradient`.

    Where the sums of all layers take more than `max_bytes`, some layers after others are measured, each time with the
    same labels in a pass of its own over all batches. Every pass ends on disk, and a layer's moments are read from
    there when they are asked for. On the CPU they are the same to the last bit however the layers are divided.

    The model is left as it was found: weights, gradients, `requires_grad` and modes.

    Args:
        batches: token ids (batch, length), or keyword arguments of the model's forward, whose tensors have the
            sequences of the batch in their first dimension. All are held in memory.
        cache: a folder in which moments are looked for by their key, and kept when they were not there. Without it
            what goes to disk goes to a nameless file in the system's temporary folder, as long as it is in use.
        max_bytes: for the sums of one pass; a pass measures at least one layer.
        messages: told the memory, passes and disk space needed, and when there are too few tokens.

    Raises:
        RequestError: the recipe's targets do not fit the model, or the batches are none, empty or of a wrong kind.
        WorkError: a layer read or received a gradient of NaN or infinity, or was never called; or the disk is full.
    """
    if max_bytes <= 0:
        raise RequestError(f"max_bytes {max_bytes}: the sums need a positive number of bytes")
    targets = find_targets(model, linear_layers(model), recipe)
    sequences = checked_batches(model, batches)
    key = _key(model, recipe, sequences)
    path = None if cache is None else cache / f"{key}.safetensors"

    def size(names: Iterable[str]) -> int:
        shapes = [targets[name] for name in names]
        return num_bytes(shapes, recipe.calibration.sensitivity, recipe.calibration.held_out > 0)

    def measured(names: list[str]) -> Moments:
        return Moments.of(_measure(model, names, sequences, recipe), key)

    groups = grouped(targets, lambda name: size([name]), max_bytes)
    if path is not None and path.is_file():
        messages(f"the calibration is read from {str(path)!r}")
        moments = load_moments(path, key)
    elif len(groups) == 1:
        messages(f"calibrating {len(targets)} layers: their moments take at most {size(targets) / 1e6:,.1f} MB")
        moments = measured(groups[0])
        if path is not None:
            moments.save(path)
    else:
        folder = Path(tempfile.gettempdir()) if cache is None else cache
        messages(
            f"calibrating {len(targets)} layers in {len(groups)} passes: the sums of one take at most "
            f"{max(map(size, groups)) / 1e6:,.1f} MB of memory, and all moments {size(targets) / 1e6:,.1f} MB of disk "
            f"in {str(folder)!r}"
        )
        with MomentsFile(path, targets, key) as file:
            check_room("the moments", size(targets), folder)
            for names in groups:
                file.append(measured(names))
            moments = file.finish()
    _tell_shortage(moments, targets, messages)
    return moments


def grouped(names: Iterable[str], size: Callable[[str], int], most: int) -> list[list[str]]:
    """The names in their order, in groups whose sizes add up to at most `most`, or that are a single name.

    >>> grouped("abcd", {"a": 1, "b": 2, "c": 4, "d": 1}.__getitem__, 3)
    [['a', 'b'], ['c'], ['d']]
    """
    groups: list[list[str]] = []
    taken = 0
    for name in names:
        if groups and taken + size(name) <= most:
            groups[-1].append(name)
        else:
            groups.append([name])
            taken = 0
        taken += size(name)
    return groups


def _tell_shortage(moments: Moments, targets: Mapping[str, tuple[int, int]], messages: Callable[[str], None]) -> None:
    short = [name for name, (_, in_features) in targets.items() if moments.num_tokens(name) < in_features]
    if short:
        widest = max(short, key=lambda name: targets[name][1])
        messages(
            f"{moments.num_tokens(widest)} calibration tokens are few: {widest!r} has {targets[widest][1]} "
            "inputs and needs at least as many; with fewer the fit relies on shrinkage"
        )


def moments_key(model: nn.Module, recipe: Recipe, batches: Iterable[Batch]) -> str:
    """SHA-256 in hex of all that `calibrate` looks at: weights, configuration, targets, settings and data.

    How the sequences are divided into batches does not enter, nor does where the model came from.
    """
    return _key(model, recipe, checked_batches(model, batches))


def _key(model: nn.Module, recipe: Recipe, batches: list[dict[str, Any]]) -> str:
    def looked_at() -> Iterator[tuple[str, Any]]:
        settings = recipe.calibration
        yield "settings", (FORMAT, settings.sensitivity, settings.held_out, recipe.seed)
        yield "targets", list(find_targets(model, linear_layers(model), recipe))
        yield "modules", repr(model)
        if hasattr(model, "config"):
            for name, value in sorted(model.config.to_dict().items()):  # type: ignore[operator, union-attr]
                if not name.startswith("_") and name not in _NAMES_ONLY:
                    yield name, value
        yield from model.named_parameters()
        yield from model.named_buffers()
        for arguments in batches:
            for row in range(count_sequences(arguments)):
                yield from sorted(select(arguments, [row]).items())

    return sha256(looked_at())


def num_bytes(shapes: Iterable[tuple[int, int]], sensitivity: bool, held_out: bool) -> int:
    """The most memory that the moments of layers of these shapes (out_features, in_features) take.

    It is less where layers read the same tensor.

    >>> num_bytes([(2, 3)], sensitivity=True, held_out=True)
    224
    """
    numbers = 0
    for out_features, in_features in shapes:
        numbers += in_features**2 * (2 if held_out else 1) + 2 * in_features
        numbers += out_features**2 if sensitivity else 0
    return numbers * torch.float64.itemsize


def _measure(
    model: nn.Module, names: list[str], batches: list[dict[str, Any]], recipe: Recipe
) -> dict[str, InputMoments]:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(recipe.seed)
    sensitivity = recipe.calibration.sensitivity
    collector = Collector({name: model.get_submodule(name) for name in names})
    with as_for_use(model), collector.hooked():
        for part in divide(batches, recipe.calibration.held_out):
            collector.part = part
            with torch.set_grad_enabled(sensitivity and not part.is_held_out):
                logits = getattr(model(**to_device(part.arguments, device)), "logits", None)
            if sensitivity and not part.is_held_out:
                if not isinstance(logits, Tensor) or logits.ndim != 3:
                    sensitivity = False
                elif logits.requires_grad:
                    by_logits = _loss_gradient(logits.detach(), part, generator)
                    torch.autograd.grad(logits, collector.leaves, by_logits, allow_unused=True)
            collector.leaves.clear()
    return collector.moments(sensitivity)


def _loss_gradient(logits: Tensor, part: Part, generator: torch.Generator) -> Tensor:
    """The gradient by logits (batch, length, classes) of Σ −log p(label), where p = softmax(logits) draws the labels.

    It is p − onehot(label), and 0 at tokens that the mask hides. A label is the first class up to which p adds up to
    u, uniform in (0, 1].
    """
    gradient = torch.zeros_like(logits, memory_format=torch.contiguous_format)
    rows, gradient_rows = logits.flatten(0, 1), gradient.view(-1, logits.shape[-1])
    tokens = part.tokens(torch.arange(len(rows), device=logits.device).view(*logits.shape[:2], 1)).flatten()
    uniform = 1 - torch.rand(len(tokens), 1, dtype=torch.float64, generator=generator).to(logits.device)
    size = max(1, CHUNK // logits.shape[-1])
    for chunk, u in zip(tokens.split(size), uniform.split(size), strict=True):
        p = rows[chunk].double().softmax(dim=-1)
        cumulative = p.cumsum(dim=-1)
        # Times the sum of all, which rounding may leave below 1.
        labels = torch.searchsorted(cumulative, u * cumulative[:, -1:])
        gradient_rows[chunk] = p.scatter_add(1, labels, -torch.ones_like(u)).to(logits.dtype)
    return gradient
