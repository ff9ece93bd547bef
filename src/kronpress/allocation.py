"""Which candidate each matrix gets under one budget: the multiple-choice knapsack, by its Lagrangian."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kronpress.errors import RequestError


@dataclass(frozen=True)
class Allocation:
    """The candidate chosen for each matrix, by its place in the list, and what is known of the choice.

    Where one of a group was chosen, the group stands in `chosen` in the place of its members.

    `error` is the sum of the chosen errors, `lower_bound` what no choice within the budget can be below.
    """

    chosen: dict[str, int]
    num_params: int
    error: float
    lower_bound: float

    @property
    def gap(self) -> float:
        """How far `error` can be above the optimum, as a fraction of it."""
        return max(0.0, (self.error - self.lower_bound) / self.error) if self.error > 0 else 0.0


def allocate(
    num_params: Mapping[str, Sequence[int]],
    errors: Mapping[str, Sequence[float]],
    budget: int,
    known: Mapping[str, int] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> Allocation:
    """One candidate for each matrix, with the least sum of errors among those of at most `budget` parameters in all.

    Some matrices may be in a group that has candidates too: each of these is one choice for all of its members.

    For a price λ of a parameter every matrix takes its cheapest candidate, min error + λ·parameters; the highest total
    of these minima less λ·budget over all λ is a lower bound (weak duality). The choice at the lowest price that the
    budget allows is then bettered, one matrix at a time, with what is left of the budget: the largest gain first. So is
    a choice that is `known`, and the better of both is taken: it is never worse than that.

    >>> allocate({"a": [1, 4], "b": [1, 3]}, {"a": [9.0, 0.0], "b": [5.0, 1.0]}, budget=5).chosen
    {'a': 1, 'b': 0}

    Args:
        num_params, errors: of each matrix's candidates, in the same order, and of each group's, which may have none.
        known: a choice within the budget.
        groups: the members of each; no matrix is in two.

    Raises:
        RequestError: even the smallest candidates have more than `budget` parameters.
    """
    groups = groups or {}
    sizes = {name: np.asarray(each, dtype=np.int64) for name, each in num_params.items()}
    costs = {name: np.asarray(each, dtype=np.float64) for name, each in errors.items()}
    least = least_params(num_params, groups)
    if least > budget:
        raise RequestError(f"the budget leaves {budget} parameters; the smallest candidates have {least} in all")

    def cheapest(price: float) -> dict[str, int]:
        values = {name: costs[name] + price * sizes[name] for name in sizes}
        # Of equally cheap ones the smaller, so that a price of 0 does not take more than it needs.
        places = {name: int(np.lexsort((sizes[name], each))[0]) for name, each in values.items() if len(each)}
        return _by_groups(places, {name: float(values[name][place]) for name, place in places.items()}, groups)

    def total(chosen: dict[str, int], of: Mapping[str, NDArray[np.generic]]) -> float:
        return float(sum(of[name][index] for name, index in chosen.items()))

    def bound(price: float) -> float:
        chosen = cheapest(price)
        return total(chosen, costs) + price * (total(chosen, sizes) - budget)

    low, high = 0.0, 1.0
    while total(cheapest(high), sizes) > budget:
        low, high = high, 2 * high
    for _ in range(200):  # to the last bit of a double, from wherever it began
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if total(cheapest(middle), sizes) > budget else (low, middle)
    lower_bound = max(bound(0.0), bound(low), bound(high))

    chosen = cheapest(0.0) if total(cheapest(0.0), sizes) <= budget else cheapest(high)
    starts = [chosen] if known is None else [chosen, dict(known)]
    for start in starts:
        _better_(start, sizes, costs, groups, budget - int(total(start, sizes)))
    best = min(starts, key=lambda start: total(start, costs))
    return Allocation(best, int(total(best, sizes)), total(best, costs), lower_bound)


def least_params(num_params: Mapping[str, Sequence[int]], groups: Mapping[str, Sequence[str]]) -> int:
    """How many parameters the smallest choice has; `groups` as for `allocate`.

    >>> least_params({"a": [1, 4], "b": [3], "both": [2]}, {"both": ["a", "b"]})
    2
    """
    smallest = {name: min(each) for name, each in num_params.items() if len(each)}
    return sum(smallest[name] for name in _by_groups(smallest, smallest, groups))


def _by_groups(
    places: dict[str, int], values: Mapping[str, float], groups: Mapping[str, Sequence[str]]
) -> dict[str, int]:
    """The places of single matrices and of those groups that are cheaper than their members, and not of these."""
    left_out = set[str]()
    for group, names in groups.items():
        is_cheaper = group in places and values[group] < sum(values[name] for name in names)
        left_out |= {*names} if is_cheaper else {group}
    return {name: place for name, place in places.items() if name not in left_out}


def _better_(
    chosen: dict[str, int],
    sizes: dict[str, NDArray[np.int64]],
    costs: dict[str, NDArray[np.float64]],
    groups: Mapping[str, Sequence[str]],
    left: int,
) -> None:
    """Change one candidate at a time, to where the error falls most within the parameters that are left.

    It is that of a matrix, or of a group; or those of a group's members become one of the group.
    """
    while True:
        best_gain, best = 0.0, None
        joined = {group: names for group, names in groups.items() if group not in chosen and len(sizes[group])}
        for name, instead_of in [*((name, [name]) for name in chosen), *joined.items()]:
            held = int(sum(sizes[each][chosen[each]] for each in instead_of))
            error = float(sum(costs[each][chosen[each]] for each in instead_of))
            gains = np.where(sizes[name] - held <= left, error - costs[name], -np.inf)
            candidate = int(gains.argmax())
            if gains[candidate] > best_gain:
                best_gain, best = float(gains[candidate]), (name, candidate, list(instead_of), held)
        if best is None:
            return
        name, candidate, instead_of, held = best
        left -= int(sizes[name][candidate]) - held
        for each in instead_of:
            del chosen[each]
        chosen[name] = candidate
