"""`calibrate`: the moments of all targeted layers of a model, of as many at a time as memory allows.

Letters: x (in_features,) is a layer's input for one token, g (out_features,) the loss's gradient by its output.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kronpress.calibration.batches import (
    Batch,
    Part,
    checked_batches,
    count_sequences,
    count_tokens,
    divide,
    select,
    to_device,
)
from kronpress.calibration.block_by_block import by_block, measured_block_by_block
from kronpress.calibration.block_stream import block_prefix, state_bytes
from kronpress.calibration.moments import FORMAT, Moments, MomentsFile, check_room, load_moments, sha256
from kronpress.calibration.sensitivity import logits_of, loss_gradient, measures_gradients
from kronpress.calibration.similarity import block_similarities
from kronpress.calibration.sums import as_for_use, collector_of
from kronpress.errors import RequestError
from kronpress.matrices.moments import InputMoments
from kronpress.planning import find_targets
from kronpress.recipe import Recipe
from kronpress.surgery import is_embedding

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
    flattened to (batch · length, ...). Targeted embeddings are measured too, with the layers tied to them, and layers
    that are structured already as dense ones are.

    With `calibration.sensitivity`, `gradient` is the output side of the Fisher information: for every token a label is
    drawn from the model's own prediction, and g is the gradient of the summed cross-entropy. One generator, seeded by
    `recipe.seed`, draws one number for each token in the order of the sequences, so that the labels do not depend on
    how these are divided into batches, nor on padding. A model whose output has no `logits` of shape (batch, length,
    classes) has no `gradient`, and a recipe has none whose `weighting.metric`, `input` or `magnitude`, does not look at
    it.

    A model of a known family is run block by block. What each block reads is kept in a nameless file, the logits are
    differentiated, and from the last block to the first each is run again and differentiated by itself, so that no
    graph is larger than that of one block; without gradients the blocks are run once. Where the sums of a block's
    layers take more than `max_bytes`, the block is run again for each group of them that does not. Any other model is
    run as a whole, on all batches for each such group of all its layers, with the same labels. Where all moments take
    more than `max_bytes`, those of each group end on disk, and a layer's are read from there when they are asked for.
    On the CPU they are the same to the last bit however the layers are divided into groups.

    With `allocation: similarity` the model is run once more, for the `similarity` of the block of each layer.

    The model is left as it was found: weights, gradients, `requires_grad` and modes.

    Args:
        batches: token ids (batch, length), or keyword arguments of the model's forward, whose tensors have the
            sequences of the batch in their first dimension. All are held in memory.
        cache: a folder in which moments are looked for by their key, and kept when they were not there. Without it
            what goes to disk goes to nameless files in the system's temporary folder, moments as long as they are in
            use.
        max_bytes: for the sums at one time; those of one layer are always allowed.
        messages: told the memory and disk space needed, and when there are too few tokens.

    Raises:
        RequestError: the recipe's targets do not fit the model, or the batches are none, empty or of a wrong kind.
        WorkError: a layer read or received a gradient of NaN or infinity, or was never called; or the disk is full.
    """
    if max_bytes <= 0:
        raise RequestError(f"max_bytes {max_bytes}: the sums need a positive number of bytes")
    targets = find_targets(model, recipe)
    sequences = checked_batches(model, batches)
    key = _key(model, recipe, sequences)
    path = None if cache is None else cache / f"{key}.safetensors"
    if path is not None and path.is_file():
        messages(f"the calibration is read from {str(path)!r}")
        moments = load_moments(path, key)
        _tell_shortage(moments, targets, messages)
        return moments

    def size(names: Iterable[str]) -> int:
        return sum(_layer_bytes(model.get_submodule(name), targets[name], recipe) for name in names)

    def group(names: Iterable[str]) -> list[list[str]]:
        return grouped(names, lambda name: size([name]), max_bytes)

    folder = Path(tempfile.gettempdir()) if cache is None else cache
    on_disk = {} if len(group(targets)) == 1 else {"moments": size(targets)}
    prefix = block_prefix(model)
    if prefix is None:
        groups = group(targets)
        way = "in one pass" if len(groups) == 1 else f"in {len(groups)} passes"
        some_by_some = _measured_in_passes(model, groups, recipe, sequences)
    else:
        in_blocks = by_block(targets, prefix, group)
        groups = [names for each in in_blocks.values() for names in each]
        way = "block by block"
        num_tokens = sum(map(count_tokens, sequences))
        on_disk["hidden states"] = state_bytes(model, num_tokens, keeps_all=measures_gradients(recipe))
        some_by_some = measured_block_by_block(model, in_blocks, recipe, sequences, folder)

    most = max(map(size, groups)) if "moments" in on_disk else size(targets)
    told = [f"the sums take at most {most / 1e6:,.1f} MB of memory"]
    told += [f"the {what} {needed / 1e6:,.1f} MB of disk in {str(folder)!r}" for what, needed in on_disk.items()]
    messages(f"calibrating {len(targets)} layers {way}: {', '.join(told)}")
    similarities = {}
    if recipe.allocation == "similarity":
        similarities = block_similarities(model, divide(sequences, recipe.calibration.held_out))
    with closing(some_by_some):  # with its files, if anything fails
        if "moments" in on_disk:
            with MomentsFile(path, targets, key) as file:
                check_room(f"the {' and '.join(on_disk)}", sum(on_disk.values()), folder)
                for some in some_by_some:
                    file.append(Moments.of(_with_similarities(some, similarities), key))
                    del some  # before the next sums begin
                moments = file.finish()
        else:
            found = {name: each for some in some_by_some for name, each in some.items()}
            found = _with_similarities(found, similarities)
            moments = Moments.of({name: found[name] for name in targets}, key)
            if path is not None:
                moments.save(path)
    _tell_shortage(moments, targets, messages)
    return moments


def _with_similarities(
    moments: Mapping[str, InputMoments], similarities: Mapping[str, float]
) -> dict[str, InputMoments]:
    """The moments of layers, each with that of the block it is in, if it is in one and that was measured."""
    blocks = {name: next((block for block in similarities if name.startswith(f"{block}.")), "") for name in moments}
    return {name: replace(each, similarity=similarities.get(blocks[name])) for name, each in moments.items()}


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
        yield "settings", (FORMAT, measures_gradients(recipe), recipe.calibration.held_out, recipe.seed)
        yield "targets", list(find_targets(model, recipe))
        if recipe.allocation == "similarity":
            yield "similarity", True
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


def _layer_bytes(layer: nn.Module, shape: tuple[int, int], recipe: Recipe) -> int:
    rows, columns = shape
    wanted = measures_gradients(recipe), recipe.calibration.held_out > 0
    if is_embedding(layer):
        return num_bytes([(columns, columns)], *wanted) + rows * torch.float64.itemsize
    return num_bytes([shape], *wanted)


def _measured_in_passes(
    model: nn.Module, groups: list[list[str]], recipe: Recipe, batches: list[dict[str, Any]]
) -> Generator[dict[str, InputMoments]]:
    """The moments of each group of layers, for which the whole model is run on all batches."""
    parts = divide(batches, recipe.calibration.held_out)
    for names in groups:
        yield _measured_in_pass(model, names, recipe, parts)


def _measured_in_pass(model: nn.Module, names: list[str], recipe: Recipe, parts: list[Part]) -> dict[str, InputMoments]:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(recipe.seed)
    has_gradient = measures_gradients(recipe)
    collector = collector_of(model, names)
    with as_for_use(model), collector.hooked():
        for part in parts:
            collector.part = part
            is_differentiated = has_gradient and not part.is_held_out
            with torch.set_grad_enabled(is_differentiated):
                logits = logits_of(model(**to_device(part.arguments, device)))
            if is_differentiated and logits is None:
                has_gradient = False
            elif is_differentiated and logits is not None and logits.requires_grad:
                by_logits = loss_gradient(logits.detach(), part, generator)
                torch.autograd.grad(logits, collector.leaves, by_logits, allow_unused=True)
            collector.leaves.clear()
    return collector.moments(has_gradient)
