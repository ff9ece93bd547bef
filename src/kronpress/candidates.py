"""What each matrix could become, what that would cost in the loss, and the best choice under one budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import getattr_static
from typing import Any

from pydantic import BaseModel
from torch import Tensor

from kronpress.allocation import Allocation, allocate, least_params
from kronpress.matrices import STRUCTURES, StructuredMatrix
from kronpress.matrices.metric import Metric

DENSE = "dense"
# How a candidate's rise is known: by a formula that may be far off, by a closer look, or by its fit.
SCREENED, ESTIMATED, FITTED = "screened", "estimated", "fitted"
# Closer looks at one matrix in one stage: after so many that did not settle it, what was only screened is given up.
# The most promising come first, and at GPT-2's sizes a look takes seconds.
MOST_LOOKS = 4
# What specs call how many there are of their parts; all their other fields are sizes.
COUNTS = ("num_terms", "rank", "count")


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
    """The candidate of every matrix, all the candidates it was chosen from, and how near to the optimum that is.

    A group of which a candidate was chosen stands in the place of its members.
    """

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
    candidates: Mapping[str, list[Candidate]],
    problem: Callable[[str], tuple[Tensor, Metric]],
    budget: int,
    groups: Mapping[str, Sequence[str]] | None = None,
    order: Sequence[str] = (),
) -> Choice:
    """The allocation of `budget` parameters, with every chosen candidate's error measured by its fit.

    Structures are taken in one after the other, in `order`, or else as the tables have them. The choice from those so
    far stands until a better one is found, by fits on both sides: one structure more at the end of the list never makes
    it worse.

    Args:
        candidates: of each matrix, one at least; and of each group, all of them fitted.
        problem: gives a matrix's weight (out_features, in_features) in float64 and its metric, by its name.
        groups: the members of each; a candidate of a group is one choice for all of them.

    Raises:
        RequestError: even the smallest candidates have more parameters.
    """
    groups = groups or {}
    there = dict.fromkeys(each.structure for table in candidates.values() for each in table)
    structures = [*(each for each in there if each not in order), *(each for each in order if each in there)]
    tables: dict[str, list[Candidate]] = {name: [] for name in candidates}
    choice = None
    for structure in structures:
        tables = {
            name: [*tables[name], *(each for each in table if each.structure == structure)]
            for name, table in candidates.items()
        }
        sizes = {name: [each.num_params for each in table] for name, table in tables.items()}
        is_possible = all(sizes[name] or name in groups for name in sizes) and least_params(sizes, groups) <= budget
        if is_possible or structure == structures[-1]:
            choice = _settled(tables, problem, budget, groups, choice)
            tables = choice.candidates
    assert choice is not None
    return choice


def _settled(
    candidates: Mapping[str, list[Candidate]],
    problem: Callable[[str], tuple[Tensor, Metric]],
    budget: int,
    groups: Mapping[str, Sequence[str]],
    known: Choice | None,
) -> Choice:
    """The choice from these tables, never worse than what is `known`, a choice from a part of each.

    What is chosen by the screening is estimated more closely, what is chosen by such an estimate is fitted, and the
    choice is made anew with what was found, until all that is chosen was fitted. After MOST_LOOKS estimates for one
    matrix its other screened candidates are dropped.
    """
    tables = {name: list(each) for name, each in candidates.items()}
    looks = Counter[str]()
    while True:
        allocation = allocate(
            {name: [each.num_params for each in table] for name, table in tables.items()},
            {name: [each.rise for each in table] for name, table in tables.items()},
            budget,
            # All of it was fitted: it stays in the tables as it is.
            None if known is None else {name: tables[name].index(each) for name, each in known.chosen.items()},
            groups,
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
    # What a structure has where it gives no estimate of its own is its fit.
    has_estimate = getattr_static(structure, "estimate") is not getattr_static(StructuredMatrix, "estimate")
    if candidate.evidence == SCREENED and has_estimate:
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


def _kind(candidate: Candidate) -> tuple[str, Any]:
    """The structure and all sizes that are not a mere count: those of a sum's terms, not how many there are."""
    return candidate.structure, _but_counts(candidate.spec)


def _but_counts(size: Any) -> Any:
    if isinstance(size, BaseModel):
        return tuple(_but_counts(value) for name, value in size if name not in COUNTS)
    return tuple(map(_but_counts, size)) if isinstance(size, tuple) else size
