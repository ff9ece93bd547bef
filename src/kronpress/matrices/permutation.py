"""Orders of rows and columns in which a matrix is nearest to a sum of Kronecker products: P W Qᵀ ≈ Σ_i A_i ⊗ B_i.

Letters as in kronecker.py; here A (k, m1, n1) and B (k, m2, n2). The rows of P W Qᵀ stand in m1 groups p of m2 places
q, its columns in n1 groups a of n2 places b; an order (groups, places) says which row or column of W stands where.

The search climbs in turns. For given orders the best sum is a closed form. For given B, of which the terms are
orthonormal, the best A captures Σ_p ‖Σ_q F_q(row at p, q)‖² with F_q(w) = (Σ_b B_i[q, b] w[a, b])_(a, i), and the rows
are bettered in this sum itself, so that A follows every move (permutation_steps.py): exactly between the groups, by an
assignment of m1 rows for each place, and by exchanges between the places. To assign all m rows at once to the rows
of a held sum is exact too, but m2² times as much work, and that sum, fitted to where the rows are, holds them there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Literal

import torch
from torch import Tensor

from kronpress.errors import RequestError, WorkError
from kronpress.matrices.kronecker_in_metric import alternate, nearest_sum, rearranged
from kronpress.matrices.metric import Metric
from kronpress.matrices.permutation_starts import matched, shuffled
from kronpress.matrices.permutation_steps import ROUNDING, Features, exchanged_columns, regrouped
from kronpress.matrices.svd import balanced, leading_eigenvectors, ridged_cholesky

Shape = tuple[int, int]
# What may be permuted: all, nothing, or those of equal label among themselves.
Free = bool | Tensor
Start = Literal["identity", "matching"] | int
MAX_SWEEPS = 30
# Stop when a sweep raises the captured energy by less than this fraction.
TOLERANCE = 1e-3
# Sweeps of the alternation in the metric after each step of the orders.
FIT_SWEEPS = 2
# Added to the normal equations of A, relative to their mean diagonal: a moment may be singular.
RIDGE = 1e-8
# F of all rows at all places is computed once if it is no larger than this many times the weight.
MOST_REMEMBERED = 16
# Rounds of the start `matching` over rows and columns.
MATCHING_ROUNDS = 2


@dataclass(frozen=True)
class PermutedSum:
    """W[row_order][:, column_order] ≈ Σ_i left[i] ⊗ right[i], and how the search came to it.

    `row_order` (m,) and `column_order` (n,) are ascending where no other order gains anything. `left` (k, m1, n1) and
    `right` (k, m2, n2) are in float64. `captured` is the fraction of ‖W‖², or of tr(W C Wᵀ), that is captured in the
    winning start and after each sweep from there; it never falls. `start` is the start that won, a number being the
    seed of a random one.
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
    """The best orders that are found from several starts, and the sum of Kronecker products in them.

    A local optimum of ‖P W Qᵀ − Σ A_i ⊗ B_i‖² over P, Q, A and B (the objective of arXiv 2401.16367, which leaves its
    search unsaid), or of the error tr(ΔW C ΔWᵀ). In the latter rows are bettered as exactly as in the former. A
    permutation of columns moves C with it, which makes it a quadratic assignment: its exchanges are proposed for a
    held sum, or by the search for diag(C) instead of C, and are taken only if the error falls.

    Starts: `identity`; `matching`, which brings together rows, and columns, that are most nearly multiples of each
    other, and recovers a planted single product of which one side was permuted; numbers are seeds of random orders.
    A side on which no order changes anything, because it has one group or one place, keeps its own. So it does in
    `matching` where a group holds several labels.

    >>> planted = torch.einsum("pa,qb->pqab", torch.randn(5, 4), torch.randn(3, 2)).reshape(15, 8)
    >>> found = nearest_permuted_sum(planted[torch.randperm(15)], (5, 4), (3, 2), columns=False)
    >>> round(found.captured[-1], 6)
    1.0

    Args:
        weight: W (m, n); computed with in float64.
        rows, columns: what may be permuted; labels are integers (m,) or (n,).
        moment: C = E[x xᵀ] (n, n) of the inputs; None is the identity.

    Raises:
        RequestError: shapes, number of terms, labels or moment do not fit the weight; an unknown start, or none.
        WorkError: weight or moment hold NaN or infinity.
    """
    check_shapes(weight, left_shape, right_shape, num_terms)
    check_starts(starts)
    _check_tensors(weight, moment)
    (m1, n1), (m2, n2) = left_shape, right_shape
    row_slots, column_slots = torch.arange(m1 * m2).reshape(m1, m2), torch.arange(n1 * n2).reshape(n1, n2)
    row_kinds, column_kinds = _kinds("rows", rows, row_slots), _kinds("columns", columns, column_slots)
    # A is eliminated. Where it is the smaller factor, W is taken for a sum of B ⊗ A, with places for groups.
    is_mirrored = m1 * n1 < m2 * n2
    if is_mirrored:
        row_slots, column_slots = row_slots.mT, column_slots.mT
        row_kinds, column_kinds = (None if kinds is None else kinds.mT for kinds in (row_kinds, column_kinds))
    weight = weight.detach().to(torch.float64)
    moment = None if moment is None else moment.detach().to(weight)
    problem = _Problem(weight, moment, num_terms, row_slots, column_slots, row_kinds, column_kinds)

    unpermuted = _fitted(problem, row_slots, column_slots)
    path = [unpermuted]
    won: Start = "identity"
    for start in starts:
        begin = unpermuted if start == "identity" else _fitted(problem, *_started(problem, start))
        climbed = _climb(problem, begin)
        # Of equally good ones the first, and no permutation for no gain.
        if climbed[-1].captured > path[-1].captured + ROUNDING * problem.energy:
            path, won = climbed, start
    end = path[-1]
    left, right = balanced(end.left, end.right)
    captured = tuple(point.captured / problem.energy if problem.energy > 0 else 1.0 for point in path)
    if is_mirrored:
        return PermutedSum(end.rows.mT.flatten(), end.columns.mT.flatten(), right, left, captured, won)
    return PermutedSum(end.rows.flatten(), end.columns.flatten(), left, right, captured, won)


@dataclass(frozen=True)
class _Problem:
    """W (m, n), C (n, n), the slots in their first order, (m1, m2) and (n1, n2), and the kinds of slots of free sides.

    A row or column stays in slots of the kind of the one it came from.
    """

    weight: Tensor
    moment: Tensor | None
    num_terms: int
    row_slots: Tensor
    column_slots: Tensor
    row_kinds: Tensor | None
    column_kinds: Tensor | None

    @property
    def shapes(self) -> tuple[Shape, Shape]:
        """(m1, n1) and (m2, n2)."""
        (m1, m2), (n1, n2) = self.row_slots.shape, self.column_slots.shape
        return (m1, n1), (m2, n2)

    @cached_property
    def energy(self) -> float:
        return Metric(self.moment).squared_norm(self.weight)

    @property
    def with_diagonal_moment(self) -> _Problem:
        """The problem for diag(C), which a permutation leaves diagonal, so that it goes into the weight."""
        if self.moment is None:
            return self
        return replace(self, weight=self.weight * self.moment.diagonal().clamp(min=0).sqrt(), moment=None)


@dataclass(frozen=True)
class _Point:
    """Orders (m1, m2) and (n1, n2), the sum in them, and the energy that it captures."""

    rows: Tensor
    columns: Tensor
    left: Tensor
    right: Tensor
    captured: float


# ---- the climb ----


def _climb(problem: _Problem, begin: _Point) -> list[_Point]:
    """The points from the given one up, one for each sweep; each step is taken only if more is captured."""
    path = [begin]
    if problem.moment is not None and problem.column_kinds is not None:
        simpler = problem.with_diagonal_moment
        proposed = _climb(simpler, _fitted(simpler, begin.rows, begin.columns))[-1]
        path.append(_better(begin, _fitted(problem, proposed.rows, proposed.columns)))
    for _ in range(MAX_SWEEPS):
        point = path[-1]
        if problem.row_kinds is not None:
            point = _better(point, _with_rows_bettered(problem, point, problem.row_kinds))
        if problem.column_kinds is not None:
            point = _better(point, _with_columns_bettered(problem, point, problem.column_kinds))
        gain = point.captured - path[-1].captured
        if gain > 0:
            path.append(point)
        if gain <= TOLERANCE * point.captured:
            break
    return path


def _better(old: _Point, new: _Point) -> _Point:
    return new if new.captured > old.captured else old


def _fitted(problem: _Problem, rows: Tensor, columns: Tensor, near: _Point | None = None) -> _Point:
    """The best sum in these orders; in the metric, where it takes an alternation, a few sweeps of it from `near`."""
    left_shape, right_shape = problem.shapes
    permuted = problem.weight[rows.flatten()][:, columns.flatten()]
    if problem.moment is None:
        blocks = rearranged(permuted, left_shape, right_shape)
        b = leading_eigenvectors(blocks.mT @ blocks, problem.num_terms)  # (q b, i)
        a = blocks @ b  # (p a, i)
        captured = a.square().sum().item()
        return _Point(rows, columns, a.mT.reshape(-1, *left_shape), b.mT.reshape(-1, *right_shape), captured)
    moment = problem.moment[columns.flatten()][:, columns.flatten()]
    if near is None or 1 in (left_shape[1], right_shape[1]):  # the latter has a closed form
        left, right = nearest_sum(permuted, left_shape, right_shape, problem.num_terms, Metric(moment))
    else:
        left, right, _ = alternate(permuted, near.left, near.right, moment, FIT_SWEEPS)
    error = Metric(moment).squared_norm(permuted - expanded(left, right))
    return _Point(rows, columns, left, right, problem.energy - error)


def expanded(left: Tensor, right: Tensor) -> Tensor:
    """Σ_i A_i ⊗ B_i, (m, n)."""
    (_, m1, n1), (_, m2, n2) = left.shape, right.shape
    return torch.einsum("ipa,iqb->pqab", left, right).reshape(m1 * m2, n1 * n2)


def _with_rows_bettered(problem: _Problem, point: _Point, kinds: Tensor) -> _Point:
    columns = point.columns.flatten()
    weight = problem.weight[:, columns]
    if problem.moment is None:
        features = _single_features(weight, point.right, point.columns.shape[0])
    else:
        moment = problem.moment[columns][:, columns]
        features = row_features(weight, point.right, point.columns.shape[0], moment)
    rows = regrouped(features, point.rows, kinds)
    return _fitted(problem, rows, point.columns, point)


def _with_columns_bettered(problem: _Problem, point: _Point, kinds: Tensor) -> _Point:
    weight = problem.weight[point.rows.flatten()]
    if problem.moment is None:
        features = _single_features(weight.mT, point.right.mT, point.rows.shape[0])
        columns = regrouped(features, point.columns, kinds)
    else:
        held = expanded(point.left, point.right)
        flat = exchanged_columns(weight, problem.moment, held, point.columns.flatten(), kinds.flatten())
        columns = flat.reshape(kinds.shape)
    return _fitted(problem, point.rows, columns, point)


def _single_features(weight: Tensor, right: Tensor, num_groups: int) -> Features:
    """`row_features` in single precision: a step that they propose is judged by its fit in double."""
    return row_features(weight.float(), right.float(), num_groups)


def row_features(weight: Tensor, right: Tensor, num_groups: int, moment: Tensor | None = None) -> Features:
    """F with Σ_p ‖Σ_q F_q(row at p, q)‖² = the energy that Σ_i A_i ⊗ B_i captures of these rows for the best A.

    The best A solves A H = R, with R[p] = Σ_q (Σ_b B_i[q, b] V[row at p, q][a, b])_(a, i), V = W C, and
    H[(a, i), (c, j)] = Σ_bd (B_iᵀ B_j)[b, d] C[a, b; c, d]; it captures tr(R H⁻¹ Rᵀ). Without C, H is the identity.

    Args:
        weight: W (m, n1·n2), in the order of its columns.
        right: B (k, m2, n2); without a moment its terms are orthonormal.
        num_groups: n1.
        moment: C (n, n), in the order of the columns.
    """
    k, m2, n2 = right.shape
    seen, root = weight, None
    if moment is not None:
        seen = weight @ moment
        products = torch.einsum("iqb,jqd->bdij", right, right)
        blocks = moment.reshape(num_groups, n2, num_groups, n2)
        gram = torch.einsum("bdij,abcd->aicj", products, blocks).flatten(2).flatten(0, 1)
        root, _ = ridged_cholesky(gram, RIDGE)
    seen = seen.reshape(-1, num_groups, n2)

    def at(place: int, some: Tensor) -> Tensor:
        plain = (some @ right[:, place].mT).flatten(1)
        return plain if root is None else torch.linalg.solve_triangular(root, plain.mT, upper=False).mT

    if k * m2 > MOST_REMEMBERED * n2:
        return lambda place, rows: at(place, seen[rows])
    of_all = [at(place, seen) for place in range(m2)]
    return lambda place, rows: of_all[place][rows]


# ---- the starts ----


def _started(problem: _Problem, start: Start) -> tuple[Tensor, Tensor]:
    rows, columns = problem.row_slots, problem.column_slots
    row_kinds, column_kinds = problem.row_kinds, problem.column_kinds
    if start != "matching":
        generator = torch.Generator().manual_seed(int(start))
        return shuffled(rows, row_kinds, generator), shuffled(columns, column_kinds, generator)
    weight = problem.weight
    if row_kinds is not None and column_kinds is not None:
        # In any order of the rows, columns of one group are nearly multiples of each other.
        columns = matched(weight.mT[:, :, None], columns, column_kinds)
    for _ in range(MATCHING_ROUNDS):
        before = torch.cat([rows.flatten(), columns.flatten()])
        if row_kinds is not None:
            rows = matched(weight[:, columns.flatten()].reshape(-1, *columns.shape), problem.row_slots, row_kinds)
        if column_kinds is not None:
            blocks = weight[rows.flatten()].mT.reshape(-1, *rows.shape)
            columns = matched(blocks, problem.column_slots, column_kinds)
        if torch.equal(before, torch.cat([rows.flatten(), columns.flatten()])):
            break
    return rows, columns


# ---- the request ----


def check_shapes(weight: Tensor, left_shape: Shape, right_shape: Shape, num_terms: int) -> None:
    """RequestError if Σ_i A_i ⊗ B_i of these shapes is not of the size of `weight` (m, n), or has too many terms."""
    (m1, n1), (m2, n2) = left_shape, right_shape
    if (m1 * m2, n1 * n2) != tuple(weight.shape):
        raise RequestError(
            f"left_shape {m1}×{n1} ⊗ right_shape {m2}×{n2} is {m1 * m2}×{n1 * n2}, "
            f"not the matrix's {'×'.join(map(str, weight.shape))}"
        )
    most = min(prod(left_shape), prod(right_shape))
    if not 1 <= num_terms <= most:
        raise RequestError(f"num_terms {num_terms} with factors {m1}×{n1} and {m2}×{n2}: allowed are 1 to {most}")


def check_starts(starts: Sequence[Start]) -> None:
    """RequestError if there is none, or one is unknown."""
    wrong = [start for start in starts if start not in ("identity", "matching") and not isinstance(start, int)]
    if wrong or not starts:
        given = f"start {wrong[0]!r}" if wrong else "no start"
        raise RequestError(f"{given}: allowed are 'identity', 'matching', and integers, the seeds of random orders")


def _check_tensors(weight: Tensor, moment: Tensor | None) -> None:
    size = weight.shape[1]
    if moment is not None and moment.shape != (size, size):
        raise RequestError(
            f"moment of shape {tuple(moment.shape)} for a weight of {tuple(weight.shape)}: expected {(size, size)}"
        )
    for name, tensor in (("weight", weight), ("moment", moment)):
        if tensor is not None and not tensor.isfinite().all():
            raise WorkError(f"the {name} holds NaN or infinity")


def _kinds(name: str, free: Free, slots: Tensor) -> Tensor | None:
    """The kind of each slot (groups, places); None if nothing there is to be permuted."""
    kinds = torch.zeros_like(slots)
    if isinstance(free, Tensor):
        if free.shape != (slots.numel(),) or free.is_floating_point():
            raise RequestError(
                f"the labels of {name} have shape {tuple(free.shape)} and {free.dtype}: "
                f"expected integers of shape ({slots.numel()},)"
            )
        kinds = free.cpu().reshape(slots.shape)
    return None if free is False or 1 in slots.shape else kinds
