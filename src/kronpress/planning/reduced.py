"""How wide each block stays under one budget, and what that makes of its targeted layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import nn

from kronpress.errors import RequestError
from kronpress.matrices.moments import InputMoments
from kronpress.plan import LayerPlan, ReducedLayerPlan, ReducedSpec
from kronpress.planning.measured import NothingMeasured
from kronpress.recipe import REDUCED, Recipe
from kronpress.reduction import Block, Shape, Widths, block_members, blocks_of, dense_shapes, reduced_fractions
from kronpress.surgery import linear_layers


@dataclass(frozen=True)
class _Free:
    """A width of a block all of whose layers are targeted: how many units it has, and what each of them costs."""

    block: Block
    width: str
    size: int
    cost: int
    step: int

    @property
    def num_removable(self) -> int:
        return (self.size - self.step) * self.cost


def reduced_layers(
    model: nn.Module,
    targets: Mapping[str, Shape],
    recipe: Recipe,
    budget_params: int | None,
    moments: Mapping[str, InputMoments] | None,
) -> dict[str, LayerPlan]:
    """Every targeted layer with the widths that the budget leaves its block, in the model's order.

    Of the widths of one block the same fraction is kept, rounded down; what that leaves of the budget goes to those
    that were rounded down most.

    Raises:
        RequestError: no budget or one that is too small; a target whose widths other layers have that are no targets.
        NothingMeasured: the allocation is by similarity, and there are no moments that say it.
    """
    if budget_params is None:
        raise RequestError(f"structure {REDUCED} needs a budget: set one of budget.*")
    blocks = blocks_of(model)
    dense = {name: shape for block in blocks.values() for name, shape in dense_shapes(model, block).items()}
    free = _free_widths(blocks, targets, dense)
    total = sum(map(prod, targets.values()))
    most = sum(each.num_removable for each in free)
    removed = max(0, total - budget_params)
    if removed > most:
        raise RequestError(
            f"the budget leaves {budget_params} parameters in the targeted layers; with one unit of each width they "
            f"have {total - most}"
        )
    fractions = _fractions(free, removed, recipe, moments)
    sizes = [each.size * (1 - fraction) for each, fraction in zip(free, fractions, strict=True)]
    units = [max(1, int(size / each.step + 1e-9)) for each, size in zip(free, sizes, strict=True)]
    _round_up_(units, free, sizes, removed)

    widths = {prefix: block.widths for prefix, block in blocks.items()}
    for each, count in zip(free, units, strict=True):
        prefix = each.block.prefix
        widths[prefix] = replace(widths[prefix], **{each.width: count * each.step})
    shapes: dict[str, Shape] = {}
    for prefix, block in blocks.items():
        shapes |= block.shapes(dense, widths[prefix])
    layers = linear_layers(model)
    return {
        name: ReducedLayerPlan(
            structure=REDUCED,
            out_features=out_features,
            in_features=in_features,
            spec=ReducedSpec(
                shape=shapes[name],
                has_bias=layers[name].bias is not None,
                num_indices=_num_indices(name, blocks, widths) or None,
            ),
        )
        for name, (out_features, in_features) in targets.items()
    }


def _free_widths(blocks: Mapping[str, Block], targets: Mapping[str, Shape], dense: Mapping[str, Shape]) -> list[_Free]:
    found, reached = [], set[str]()
    halves: dict[str, str] = {}  # a target by a layer that would have to be one too
    for block, width, members in block_members(blocks):
        if members <= targets.keys():
            reached |= members
            if width != "query_key" or block.query_key_fault is None:
                cost = block.cost(width, dense)
                found.append(_Free(block, width, getattr(block.widths, width), cost, block.step(width)))
        for name in members & targets.keys():
            halves.setdefault(name, min(members - targets.keys(), default=""))
    for name in targets:
        if name not in reached:
            why = f"without {halves[name]!r}, which has the same width" if name in halves else "in no block"
            raise RequestError(f"target {name!r} of structure {REDUCED} is {why}: its width cannot change")
    if not found:
        raise RequestError(f"structure {REDUCED}: no width of the targeted layers can change")
    return found


def _fractions(
    free: list[_Free], removed: int, recipe: Recipe, moments: Mapping[str, InputMoments] | None
) -> list[float]:
    """The fraction of each width that is removed, at least as far as the budget asks for it."""
    prefixes = list(dict.fromkeys(each.block.prefix for each in free))
    sizes = {prefix: sum(each.size * each.cost for each in free if each.block.prefix == prefix) for prefix in prefixes}
    fraction = removed / sum(sizes.values())
    if recipe.allocation != "similarity":
        return [fraction] * len(free)
    influence = []
    for prefix in prefixes:
        block = next(each.block for each in free if each.block.prefix == prefix)
        found = None if moments is None else next((n for n in block.layers.values() if n in moments), None)
        similarity = None if found is None or moments is None else moments[found].similarity
        if similarity is None:
            raise NothingMeasured(
                "allocation: similarity compares what blocks read and give: calibrate the model by this recipe first"
            )
        influence.append(1 - similarity)
    largest = recipe.similarity.most_removed
    if fraction > largest:
        raise RequestError(
            f"the budget removes {fraction:.3f} of the targeted parameters, and similarity.most_removed is {largest:g}"
        )
    temperature = recipe.similarity.temperature
    by_block = reduced_fractions(
        torch.tensor(influence), torch.tensor([float(size) for size in sizes.values()]), fraction, temperature, largest
    )
    found_fractions = dict(zip(prefixes, by_block.tolist(), strict=True))
    return [found_fractions[each.block.prefix] for each in free]


def _round_up_(units: list[int], free: list[_Free], sizes: list[float], removed: int) -> None:
    """Round to within the budget: first down where a width could not be, then up while there is room, most first."""

    def left() -> int:
        kept = sum(count * each.step * each.cost for count, each in zip(units, free, strict=True))
        return sum(each.size * each.cost for each in free) - removed - kept

    def lost(place: int) -> float:
        each = free[place]
        return (sizes[place] - units[place] * each.step) / each.step

    while left() < 0:  # a width of one unit was not made smaller
        places = [place for place in range(len(free)) if units[place] > 1]
        units[min(places, key=lost)] -= 1
    for place in sorted(range(len(free)), key=lost, reverse=True):
        each = free[place]
        if (units[place] + 1) * each.step <= each.size and each.step * each.cost <= left():
            units[place] += 1


def _num_indices(name: str, blocks: Mapping[str, Block], widths: Mapping[str, Widths]) -> int:
    """How many numbers of rotary pairs stand beside a layer: with that of the keys, where some pairs are left out."""
    for prefix, block in blocks.items():
        if "key" in block.parts.get(name, ()) and block.is_rotary:
            kept = widths[prefix].query_key
            return block.num_key_heads * kept // 2 if kept < block.widths.query_key else 0
    return 0
