"""Where a search for orders begins: at random, or with units that are nearly multiples of each other in one group."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from kronpress.matrices.svd import leading_eigenvectors

# Rounds of ordering the groups of `matched` by a pattern, and the pattern by them.
PATTERN_ROUNDS = 2


def shuffled(slots: Tensor, kinds: Tensor | None, generator: torch.Generator) -> Tensor:
    """The slots in a random order, each among those of its kind; none is free without kinds."""
    order = slots.clone()
    for kind in [] if kinds is None else kinds.unique():
        members = slots[kinds == kind]
        order[kinds == kind] = members[torch.randperm(len(members), generator=generator)]
    return order


def matched(blocks: Tensor, slots: Tensor, kinds: Tensor) -> Tensor:
    """An order (groups, places) in which each row's block is near to a multiple of α_group β_placeᵀ.

    The longer of α and β tells which rows belong together; each group is then ordered by what is left of its blocks.
    Exact where the blocks are such multiples, unless two groups have parallel α or no pattern tells places apart.

    Args:
        blocks: (size, n1, n2), one for each row.
        slots, kinds: (groups, places).
    """
    if blocks.shape[1] < blocks.shape[2]:
        return matched(blocks.mT, slots.mT, kinds.mT).mT
    if (kinds != kinds[:, :1]).any():
        return slots
    directions = _leading_left(blocks)
    order = torch.empty_like(slots)
    for kind in kinds[:, 0].unique():
        groups = torch.nonzero(kinds[:, 0] == kind).flatten()
        members = slots[groups].flatten()
        order[groups] = members[_parallel(directions[members], slots.shape[1])]
    return _in_pattern(blocks, order)


def _parallel(directions: Tensor, size: int) -> Tensor:
    """Groups (groups, size) of nearly parallel unit vectors (groups·size, d), greedily: the tightest first."""
    affinity = (directions @ directions.mT).abs().cpu()
    affinity.fill_diagonal_(-1)
    tightness = affinity.topk(size - 1, dim=1).values.sum(1)
    is_free = torch.ones(len(directions), dtype=torch.bool)
    groups = []
    for seed in tightness.argsort(descending=True, stable=True).tolist():
        if is_free[seed]:
            is_free[seed] = False
            nearest = torch.where(is_free, affinity[seed], -2.0).topk(size - 1).indices
            is_free[nearest] = False
            groups.append(torch.cat([torch.tensor([seed]), nearest]))
    return torch.stack(groups)


def _in_pattern(blocks: Tensor, order: Tensor) -> Tensor:
    """The same groups, each ordered so that what is left of its blocks beside α is near to a multiple of one pattern.

    Args:
        blocks: (size, n1, n2).
        order: (groups, places).
    """
    order = order.clone()
    stacked = blocks[order].movedim(2, 1).flatten(2)  # (group, n1, place n2)
    rests = (_leading_left(stacked)[:, None] @ stacked).reshape(*order.shape, -1).cpu()  # (group, place, n2)
    pattern = rests[rests.square().sum((1, 2)).argmax()]
    for _ in range(PATTERN_ROUNDS):
        scores = (pattern @ rests.mT).numpy()  # (group, place, row)
        for group, score in enumerate(scores):
            # The direction of a group is known but for its sign.
            choices = [linear_sum_assignment(score, maximize=maximize)[1] for maximize in (True, False)]
            best = max(choices, key=lambda choice: abs(score[range(len(choice)), choice].sum()))
            order[group], rests[group] = order[group][best], rests[group][best]
        flat = rests.flatten(1)
        pattern = leading_eigenvectors(flat.mT @ flat, 1).reshape(pattern.shape)
    return order


def _leading_left(matrices: Tensor) -> Tensor:
    """The leading left singular vector (..., rows) of each matrix (..., rows, columns), by the smaller Gram matrix."""
    if matrices.shape[-2] <= matrices.shape[-1]:
        return torch.linalg.eigh(matrices @ matrices.mT).eigenvectors[..., -1]
    right = torch.linalg.eigh(matrices.mT @ matrices).eigenvectors[..., -1:]
    left = (matrices @ right)[..., 0]
    return left / torch.linalg.vector_norm(left, dim=-1, keepdim=True).clamp(min=torch.finfo(left.dtype).tiny)
