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
) -> Allocation:
    """One candidate for each matrix, with the least sum of errors among those of at most `budget` parameters in all.

    For a price λ of a parameter every matrix takes its cheapest candidate, min error + λ·parameters; the highest total
    of these minima less λ·budget over all λ is a lower bound (weak duality). The choice at the lowest price that the
    budget allows is then bettered, one matrix at a time, with what is left of the budget: the largest gain first. So is
    a choice that is `known`, and the better of both is taken: it is never worse than that.

    >>> allocate({"a": [1, 4], "b": [1, 3]}, {"a": [9.0, 0.0], "b": [5.0, 1.0]}, budget=5).chosen
    {'a': 1, 'b': 0}

    Args:
        num_params, errors: of each matrix's candidates, in the same order.
        known: a choice within the budget.

    Raises:
        RequestError: even the smallest candidates have more than `budget` parameters.
    """
    sizes = {name: np.asarray(each, dtype=np.int64) for name, each in num_params.items()}
    costs = {name: np.asarray(each, dtype=np.float64) for name, each in errors.items()}
    least = sum(int(each.min()) for each in sizes.values())
    if least > budget:
        raise RequestError(f"the budget leaves {budget} parameters; the smallest candidates have {least} in all")

    def cheapest(price: float) -> dict[str, int]:
        # Of equally cheap ones the smaller, so that a price of 0 does not take more than it needs.
        return {name: int(np.lexsort((sizes[name], costs[name] + price * sizes[name]))[0]) for name in sizes}

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
    starts = [chosen] if known is None else [chosen, {name: known[name] for name in sizes}]
    for start in starts:
        _better_(start, sizes, costs, budget - int(total(start, sizes)))
    best = min(starts, key=lambda start: total(start, costs))
    return Allocation(best, int(total(best, sizes)), total(best, costs), lower_bound)


def _better_(
    chosen: dict[str, int], sizes: dict[str, NDArray[np.int64]], costs: dict[str, NDArray[np.float64]], left: int
) -> None:
    """Change one matrix's candidate at a time, to where the error falls most within the parameters that are left."""
    while True:
        best_gain, best = 0.0, None
        for name, index in chosen.items():
            gains = np.where(sizes[name] - sizes[name][index] <= left, costs[name][index] - costs[name], -np.inf)
            candidate = int(gains.argmax())
            if gains[candidate] > best_gain:
                best_gain, best = float(gains[candidate]), (name, candidate)
        if best is None:
            return
        name, candidate = best
        left -= int(sizes[name][candidate] - sizes[name][chosen[name]])
        chosen[name] = candidate
