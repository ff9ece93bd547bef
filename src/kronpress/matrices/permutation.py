"""Orders of rows and columns in which a matrix is nearest to a sum of Kronecker products: P W Qᵀ ≈ Σ_i A_i ⊗ B_i.

Letters as in kronecker.py; A (k, m1, n1) and B (k, m2, n2). The rows of P W Qᵀ stand in m1 groups p of m2 places q,
its columns in n1 groups a of n2 places b; an order (groups, places) gives the row or column of W at each place.

The search climbs in turns: the sum for given orders is Van Loan's closed form, and for given B one side's order is
bettered with A refitted all the while. For the best A the captured energy is ‖Π P W Qᵀ‖² with a projection Π, and a
group's share of it is ‖Σ_q F_q(row at place q)‖², in which F_q(w) = (Σ_b B_i[q, b] w[a, b])_(a, i) and B is orthonormal.
In this form rows change groups within one place by an exact linear assignment of only m1 rows, and places by exchanges
whose gain is known exactly. With A held as well, the assignment of all m rows at once holds each row to where it is,
because the A it is compared with contains it, and costs m2³ times as much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from math import prod
from typing import Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from kronpress.errors import RequestError, WorkError
from kronpress.matrices.kronecker_in_metric import alternate, nearest_sum, rearranged
from kronpress.matrices.metric import Metric
from kronpress.matrices.svd import leading_eigenvectors

Shape = tuple[int, int]
# Which rows (columns) may change places: all, none, or, by a label for each, those of equal label among themselves.
Free = bool | Tensor
Start = Literal["identity", "matching"] | int
# (place, rows) -> F_place of these rows, (rows, d).
Features = Callable[[int, Tensor], Tensor]
MAX_SWEEPS = 30
# Stop when a sweep raises the captured energy by less than this fraction.
TOLERANCE = 1e-3
# Fractions of the energies concerned that are not a gain but rounding.
ROUNDING = 1e-12
# Sweeps of the alternation in the metric between two steps of the orders, and rounds of column exchanges in one step.
SWEEPS_OF_FIT = 2
EXCHANGE_ROUNDS = 10
# Added to the normal equations of A, relative to their mean diagonal: a moment may be singular.
RIDGE = 1e-8


@dataclass(frozen=True)
class PermutedSum:
    """W[row_order][:, column_order] ≈ Σ_i left[i] ⊗ right[i], and how the search came to it.

    `row_order` (m,) and `column_order` (n,) are those in which W stands where nothing is gained by another. `left`
    (k, m1, n1) and `right` (k, m2, n2) are in float64. `captured` holds the captured fraction of ‖W‖², or of
    tr(W C Wᵀ), at the winning start and after each sweep from there; it never falls. `start` is the start that won: a
    number is the seed of a random one.
    """

    row_order: Tensor
    column_order: Tensor
    left: Tensor
    right: Tensor
    captured: tuple[float, ...]
    start: Start


def nearest_permuted_sum(
    weight: Tensor,
    left_shape: Shape,
    right_shape: Shape,
    num_terms: int = 1,
    *,
    rows: Free = True,
    columns: Free = True,
    moment: Tensor | None = None,
    starts: Sequence[Start] = ("identity", "matching"),
) -> PermutedSum:
    """The best orders found from several starts, and the sum of Kronecker products that goes with them.

    A local optimum of min ‖P W Qᵀ − Σ A_i ⊗ B_i‖² over P, Q, A, B (arXiv 2401.16367, which does not say how it
    searches), or of tr(ΔW C ΔWᵀ). In the latter rows are searched as exactly as without; a column permutation moves C
    too, so that its exchanges are proposed for a fixed sum and taken only if the loss then falls.

    Starts: `identity`; `matching`, which puts together rows, and columns, that are most nearly multiples of each other
    and recovers a single planted product of which one side is permuted; a number is the seed of random orders. A side
    on which no order changes anything (one group, or groups of one) keeps its own, as does one whose groups hold rows
    of several labels in the start `matching`.

    >>> planted = torch.einsum("pa,qb->pqab", torch.randn(5, 4), torch.randn(3, 2)).reshape(15, 8)
    >>> found = nearest_permuted_sum(planted[torch.randperm(15)], (5, 4), (3, 2), columns=False)
    >>> round(found.captured[-1], 6)
    1.0

    Args:
        weight: W (m, n); computed with in float64.
        rows, columns: what may be permuted; labels are a tensor of integers (m,) or (n,).
        moment: C = E[x xᵀ] (n, n) of the inputs; None is the identity.

    Raises:
        RequestError: shapes, number of terms, labels or moment that do not fit the weight, or no start.
        WorkError: the weight or the moment holds NaN or infinity.
    """
    _check(weight, left_shape, right_shape, num_terms, moment, starts)
    if prod(left_shape) < prod(right_shape):  # A is eliminated, which pays most for the larger factor
        row_shuffle, column_shuffle = (
            torch.arange(first * second).reshape(first, second).mT.flatten()
            for first, second in zip(left_shape, right_shape, strict=True)
        )
        mirrored = nearest_permuted_sum(
            weight[row_shuffle][:, column_shuffle],
            right_shape,
            left_shape,
            num_terms,
            rows=rows if isinstance(rows, bool) else rows[row_shuffle],
            columns=columns if isinstance(columns, bool) else columns[column_shuffle],
            moment=None if moment is None else moment[column_shuffle][:, column_shuffle],
            starts=starts,
        )
        return replace(
            mirrored,
            row_order=row_shuffle[mirrored.row_order].reshape(right_shape[0], -1).mT.flatten(),
            column_order=column_shuffle[mirrored.column_order].reshape(right_shape[1], -1).mT.flatten(),
            left=mirrored.right,
            right=mirrored.left,
        )

    (m1, n1), (m2, n2) = left_shape, right_shape
    problem = _Problem(
        weight.to(torch.float64),
        None if moment is None else moment.to(weight.device, torch.float64),
        num_terms,
        _kinds("rows", rows, (m1, m2)),
        _kinds("columns", columns, (n1, n2)),
        torch.arange(m1 * m2).reshape(m1, m2),
        torch.arange(n1 * n2).reshape(n1, n2),
    )
    unpermuted = _fitted(problem, problem.row_places, problem.column_places)
    best: tuple[_Point, list[float], Start] = unpermuted, [unpermuted.captured], starts[0]
    for start in starts:
        point = unpermuted if start == "identity" else _fitted(problem, *_started(problem, start))
        history = _climb(problem, point)
        # Of equally good ones the first, and no permutation at all for no gain.
        if history[-1].captured > best[0].captured * (1 + ROUNDING):
            best = history[-1], [each.captured for each in history], start
    point, captured, won = best
    energy = Metric(problem.moment).squared_norm(problem.weight)
    return PermutedSum(
        point.rows.flatten(),
        point.columns.flatten(),
        point.left,
        point.right,
        tuple(each / energy if energy > 0 else 1.0 for each in captured),
        won,
    )
