"""All moments of a model whose blocks are known, with the graph of one block and the sums of a few layers in memory.

Letters: h is a hidden state before or after a block, for one token, and g the loss's gradient by it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kronpress.calibration.block_stream import BlockStream
from kronpress.calibration.sensitivity import logits_of, loss_gradient, measures_gradients
from kronpress.calibration.sums import Collector, as_for_use, collector_of
from kronpress.matrices.moments import InputMoments
from kronpress.recipe import Recipe

# Of each block by its number, groups of its layers that are measured together; None is what is in no block.
Groups = dict[int | None, list[list[str]]]


def by_block(names: Iterable[str], prefix: str, group: Callable[[list[str]], list[list[str]]]) -> Groups:
    """The names of layers in each block by its number, None for those in no block, as `group` divides them.

    >>> by_block(["head", "h.0.up", "h.0.down", "h.2.up"], "h", lambda names: [names])
    {None: [['head']], 0: [['h.0.up', 'h.0.down']], 2: [['h.2.up']]}
    """
    found: dict[int | None, list[str]] = {}
    for name in names:
        number, _, _ = name.removeprefix(f"{prefix}.").partition(".")
        index = int(number) if name.startswith(f"{prefix}.") else None
        found.setdefault(index, []).append(name)
    return {index: group(members) for index, members in found.items()}


def measured_block_by_block(
    model: nn.Module, groups: Groups, recipe: Recipe, batches: list[dict[str, Any]], folder: Path
) -> Generator[dict[str, InputMoments]]:
    """The moments of each group of layers, with hidden states in `folder`; raises what `calibrate` does.

    Without gradients the blocks are run one after another, once for each group. With them all blocks are run, then the
    logits are differentiated, and from the last block to the first each is run again with its graph, on the h that it
    reads, and hands on the g by that. What is outside the blocks is run last, when the g by the first h is known.
    """
    held_out, has_gradient = recipe.calibration.held_out, measures_gradients(recipe)
    with BlockStream(model, batches, folder, held_out=held_out, keeps_all=has_gradient) as stream:
        if has_gradient:
            for index in range(stream.num_blocks):
                stream.advance(index)
            _check_finite(stream, groups)
            has_gradient = _differentiate_logits(stream, recipe)
            for index in reversed(range(stream.num_blocks)):
                *before, last = groups.get(index, [[]])
                for names in before:
                    yield _through_block(stream, index, names, has_gradient, hands_on=False)
                is_lowest = all(other is not None and other >= index for other in groups)
                yield _through_block(stream, index, last, has_gradient, hands_on=has_gradient and not is_lowest)
        else:
            for index in range(stream.num_blocks):
                *before, last = groups.get(index, [[]])
                for names in before:
                    yield stream.moments(index, names)
                yield stream.advance(index, last)
        for names in groups.get(None, []):
            yield _outside_blocks(stream, names, recipe, has_gradient)


def _check_finite(stream: BlockStream, groups: Groups) -> None:
    """Raises WorkError for the first layer that reads NaN or infinity, if what the last block gives holds any.

    Later layers read it too, and they are measured first.
    """
    last = (stream.states.read(stream.num_blocks, number) for number in range(len(stream.parts)))
    if not all(states.isfinite().all() for states in last):
        for index in range(stream.num_blocks):
            for names in groups.get(index, []):
                _through_block(stream, index, names, has_gradient=False, hands_on=False)


def _differentiate_logits(stream: BlockStream, recipe: Recipe) -> bool:
    """Keep g by what the last block gives; False if the model gives no logits."""
    generator = torch.Generator().manual_seed(recipe.seed)
    with as_for_use(stream.model), torch.enable_grad():
        for number, part in enumerate(stream.parts):
            if part.is_held_out:
                continue
            after = stream.states.read(stream.num_blocks, number).requires_grad_()
            logits = logits_of(stream.around(number, after)[1])
            if logits is None:
                return False
            by_logits = loss_gradient(logits.detach(), part, generator)
            _hand_on(stream, number, *torch.autograd.grad(logits, [after], by_logits))
    return True


def _hand_on(stream: BlockStream, number: int, gradient: Tensor) -> None:
    """Keep g of a part, above the h of all blocks."""
    stream.states.write(stream.num_blocks + 1, number, gradient)


def _handed_on(stream: BlockStream, number: int, like: Tensor) -> Tensor:
    return stream.states.read(stream.num_blocks + 1, number).to(like.device)


def _through_block(
    stream: BlockStream, index: int, names: list[str], has_gradient: bool, hands_on: bool
) -> dict[str, InputMoments]:
    """The moments of layers of a block, with g by its output; `hands_on` replaces that by g by what it reads."""
    if not names and not hands_on:
        return {}
    collector = Collector(stream.layers(index, names))
    with stream.ready(index) as block, collector.hooked():
        for number, part in enumerate(stream.parts):
            collector.part = part
            hidden = stream.states.read(index, number)
            is_differentiated = has_gradient and not part.is_held_out
            with torch.set_grad_enabled(is_differentiated):
                hidden.requires_grad_(is_differentiated and hands_on)
                output = stream.output(block, index, number, hidden.clone())  # which the block may change in place
            if is_differentiated:
                sources = [*([hidden] if hands_on else []), *collector.leaves]
                found = torch.autograd.grad(output, sources, _handed_on(stream, number, output), allow_unused=True)
                if hands_on:
                    _hand_on(stream, number, found[0])
            collector.leaves.clear()
    return collector.moments(has_gradient)


def _outside_blocks(
    stream: BlockStream, names: list[str], recipe: Recipe, has_gradient: bool
) -> dict[str, InputMoments]:
    """The moments of layers before and after the blocks, with the g by what the first block reads."""
    model, generator = stream.model, torch.Generator().manual_seed(recipe.seed)
    collector = collector_of(model, names)
    with as_for_use(model), collector.hooked():
        for number, part in enumerate(stream.parts):
            collector.part = part
            is_differentiated = has_gradient and not part.is_held_out
            with torch.set_grad_enabled(is_differentiated):
                before, given = stream.around(number, stream.states.read(stream.level(stream.num_blocks), number))
            logits = logits_of(given)
            if is_differentiated and logits is not None and logits.requires_grad:
                by_logits = loss_gradient(logits.detach(), part, generator)
                torch.autograd.grad(logits, collector.leaves, by_logits, allow_unused=True)
            if is_differentiated and before.requires_grad:
                torch.autograd.grad(before, collector.leaves, _handed_on(stream, number, before), allow_unused=True)
            collector.leaves.clear()
    return collector.moments(has_gradient)
