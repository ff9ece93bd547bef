"""What each matrix could become, what that would cost in the loss, and the best choice under one budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kronpress.allocation import Allocation, allocate
from kronpress.matrices import STRUCTURES
from kronpress.matrices.metric import Metric

DENSE = "dense"


@dataclass(frozen=True)
class Candidate:
    """One structure and spec for one matrix, or the dense matrix itself (`spec` None).

    `rise` is ½ tr(G ΔW C ΔWᵀ): with the metric of the loss the rise in nats that this matrix alone would cost, to
    second order. `is_exact` is False while it is an estimate.
    """

    structure: str
    spec: Any
    num_params: int
    rise: float
    is_exact: bool


@dataclass(frozen=True)
class Choice:
    """The candidate of every matrix, all the candidates it was chosen from, and how near to the optimum that is."""

    chosen: dict[str, Candidate]
    candidates: dict[str, list[Candidate]]
    allocation: Allocation


def screen(
    weight: Tensor, metric: Metric, structures: Sequence[str], is_allowed: Callable[[str, Any], bool]
) -> list[Candidate]:
    """The dense matrix, and of each structure what no other candidate of it beats in both size and error.

    Args:
        weight: (out_features, in_features).
        is_allowed: whether a structure with a spec may be considered.
    """
    weight = weight.to(torch.float64)
    out_features, in_features = weight.shape
    found = [Candidate(DENSE, None, weight.numel(), 0.0, True)]
    for name in structures:
        structure = STRUCTURES[name]
        every = [
            Candidate(name, spec, structure.count_params(out_features, in_features, spec), error / 2, is_exact)
            for spec, error, is_exact in structure.screen(weight, metric)
            if is_allowed(name, spec)
        ]
        found += _undominated(every)
    return found


def _undominated(candidates: list[Candidate]) -> list[Candidate]:
    best: list[Candidate] = []
    for each in sorted(candidates, key=lambda candidate: (candidate.num_params, candidate.rise)):
        if not best or each.rise < best[-1].rise:
            best.append(each)
    return best


def choose(
    weights: Mapping[str, Tensor],
    metrics: Mapping[str, Metric],
    candidates: Mapping[str, list[Candidate]],
    budget: int,
) -> Choice:
    """The allocation of `budget` parameters, with every chosen candidate's error measured by its fit.

    What is chosen by an estimate is fitted, its error put in the estimate's place, and the choice made anew, until
    nothing chosen is an estimate.

    Raises:
        RequestError: even the smallest candidates have more parameters.
    """
    tables = {name: list(each) for name, each in candidates.items()}
    while True:
        allocation = allocate(
            {name: [each.num_params for each in table] for name, table in tables.items()},
            {name: [each.rise for each in table] for name, table in tables.items()},
            budget,
        )
        chosen = {name: tables[name][index] for name, index in allocation.chosen.items()}
        estimates = {name: each for name, each in chosen.items() if not each.is_exact}
        if not estimates:
            return Choice(chosen, tables, allocation)
        for name, each in estimates.items():
            index = allocation.chosen[name]
            weight, structure = weights[name].to(torch.float64), STRUCTURES[each.structure]
            fitted = structure.expand(structure.fit(weight, each.spec, metrics[name]))
            rise = metrics[name].squared_norm(weight - fitted) / 2
            # Estimates of one kind err alike: what this one was wrong by corrects the others of its matrix.
            factor = rise / each.rise if each.rise > 0 else 1.0
            tables[name] = [
                replace(other, rise=factor * other.rise)
                if not other.is_exact and _kind(other) == _kind(each)
                else other
                for other in tables[name]
            ]
            tables[name][index] = replace(each, rise=rise, is_exact=True)


def _kind(candidate: Candidate) -> tuple[str, tuple[Any, ...]]:
    """The structure and all sizes that are not a mere count: those of a sum's terms, not how many there are."""
    shapes = tuple(value for _, value in candidate.spec if isinstance(value, tuple))
    return candidate.structure, shapes
