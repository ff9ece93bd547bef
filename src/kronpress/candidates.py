"""What each matrix could become, what that would cost in the loss, and the best choice under one budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from kronpress.allocation import Allocation, allocate
from kronpress.matrices import STRUCTURES
from kronpress.matrices.metric import Metric

DENSE = "dense"
# How a candidate's rise is known: by a formula that may be far off, by a closer look, or by its fit.
SCREENED, ESTIMATED, FITTED = "screened", "estimated", "fitted"
# Closer looks at one matrix: after so many that did not settle it, what was only screened is given up. The most
# promising come first, and at GPT-2's sizes a look takes seconds.
MOST_LOOKS = 4


@dataclass(frozen=True)
class Candidate:
    """One structure and spec for one matrix, or the dense matrix itself (`spec` None).

    `rise` is ½ tr(G ΔW C ΔWᵀ): with the metric of the loss the rise in nats that this matrix alone would cost, to
    second order, as far as the `evidence` goes.
    """

    structure: str
    spec: Any
    num_params: int
    rise: float
    evidence: str


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
        weight: (out_features, in_features), in float64.
        is_allowed: whether a structure with a spec may be considered.
    """
    out_features, in_features = weight.shape
    found = [Candidate(DENSE, None, weight.numel(), 0.0, FITTED)]
    for name in structures:
        structure = STRUCTURES[name]
        every = [
            Candidate(
                name,
                spec,
                structure.count_params(out_features, in_features, spec),
                error / 2,
                FITTED if is_exact else SCREENED,
            )
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
    candidates: Mapping[str, list[Candidate]], problem: Callable[[str], tuple[Tensor, Metric]], budget: int
) -> Choice:
    """The allocation of `budget` parameters, with every chosen candidate's error measured by its fit.

    What is chosen by the screening is estimated more closely, what is chosen by such an estimate is fitted, and the
    choice is made anew with what was found, until all that is chosen was fitted. After MOST_LOOKS estimates for one
    matrix its other screened candidates are dropped.

    Args:
        problem: gives a matrix's weight (out_features, in_features) in float64 and its metric, by its name.

    Raises:
        RequestError: even the smallest candidates have more parameters.
    """
    tables = {name: list(each) for name, each in candidates.items()}
    looks = Counter[str]()
    while True:
        allocation = allocate(
            {name: [each.num_params for each in table] for name, table in tables.items()},
            {name: [each.rise for each in table] for name, table in tables.items()},
            budget,
        )
        chosen = {name: tables[name][index] for name, index in allocation.chosen.items()}
        if all(each.evidence == FITTED for each in chosen.values()):
            return Choice(chosen, tables, allocation)
        for name, each in chosen.items():
            if each.evidence != FITTED:
                tables[name] = _looked_at(each, tables[name], *problem(name))
                looks[name] += each.evidence == SCREENED
                if looks[name] == MOST_LOOKS:
                    tables[name] = [other for other in tables[name] if other.evidence != SCREENED]


def _looked_at(candidate: Candidate, table: list[Candidate], weight: Tensor, metric: Metric) -> list[Candidate]:
    """The table with one candidate known better, and others of its kind corrected by what its rise was wrong by."""
    structure = STRUCTURES[candidate.structure]
    if candidate.evidence == SCREENED:
        known = replace(candidate, rise=structure.estimate(weight, candidate.spec, metric) / 2, evidence=ESTIMATED)
    else:
        fitted = structure.expand(structure.fit(weight, candidate.spec, metric))
        known = replace(candidate, rise=metric.squared_norm(weight - fitted) / 2, evidence=FITTED)
    factor = known.rise / candidate.rise if candidate.rise > 0 else 1.0
    return [
        known
        if other is candidate
        else replace(other, rise=factor * other.rise)
        if other.evidence == candidate.evidence and _kind(other) == _kind(candidate)
        else other
        for other in table
    ]


def _kind(candidate: Candidate) -> tuple[str, tuple[Any, ...]]:
    """The structure and all sizes that are not a mere count: those of a sum's terms, not how many there are."""
    shapes = tuple(value for _, value in candidate.spec if isinstance(value, tuple))
    return candidate.structure, shapes
