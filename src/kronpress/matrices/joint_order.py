"""One order of units that several matrices share, in which each is near to a sum of Kronecker products of its own.

Letters as in permutation.py and shared_matrix.py, which has what is of one matrix alone.

What is exact. For given B the best A captures Σ_p ‖Σ_q F_q(row at p, q)‖², with any C and without G; such energies add
over the matrices, and so features stand side by side: for all matrices with equally many places one step of
`regrouped` betters their joint energy. For given A and B what one exchange of two units gains is exact for all
matrices together, with any places, C and G: a sum of quadratic assignments. What is not: G in a step of `regrouped`,
where diag(G) scales the rows; exchanges of several copies of a unit under one G, whose gains are added; and the first
climbs in a metric, which take C for the nearest C1 ⊗ C2 and G for diag(G), or for I. These only propose. An order is
taken only if the energy captured by all matrices together, with C and G as they are, has risen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from torch import Tensor

from kronpress.matrices.kronecker_in_metric import MAX_SWEEPS as MAX_FIT_SWEEPS
from kronpress.matrices.metric import Metric
from kronpress.matrices.permutation import RIDGE, Start, check_starts, expanded, row_features
from kronpress.matrices.permutation_starts import matched, shuffled
from kronpress.matrices.permutation_steps import (
    ROUNDING,
    Features,
    column_exchange_gains,
    exchanged,
    linear_exchange_gains,
    regrouped,
)
from kronpress.matrices.shared_matrix import (
    SharedMatrix,
    check_shared,
    fitted_sum,
    in_double,
    reduced,
    scaled_rows,
    simplified,
    without_output,
)
from kronpress.matrices.svd import ridged_cholesky

MAX_SWEEPS = 30
# Stop when a sweep raises the captured energy by less than this fraction.
TOLERANCE = 1e-3
# Sweeps of the alternation in a metric after each step of the order.
FIT_SWEEPS = 2
# Rounds of exchanges in one sweep; each has products of whole matrices.
EXCHANGE_ROUNDS = 2
# Matrices whose own matching is tried in the start `matching`: those with the greatest energy.
MOST_MATCHED = 4


@dataclass(frozen=True)
class JointOrder:
    """An order (units,), ascending where none gains, and how the search came to it.

    `captured` is the fraction of the energy of all matrices that see an order which their sums capture: in the given
    order, and then after each step of the winning climb that is above it; it never falls. `start` is the one that won.
    """

    order: Tensor
    captured: tuple[float, ...]
    start: Start


def nearest_joint_order(
    matrices: Sequence[SharedMatrix], labels: Tensor, starts: Sequence[Start] = ("identity", "matching")
) -> JointOrder:
    """The best order that is found from several starts: a local optimum of the energy that all matrices capture.

    The climb is first made with C taken for separable and G for diagonal, where all fits are closed forms, and goes on
    from there in the metrics as they are; and once more with G left out, as a sum that is exact in the Frobenius norm
    is so in any metric, and diag(G) would hide it. In the end the sums are fitted in full in the given order and in the
    found one, and the given one is kept if the other is no better.

    Starts as in `nearest_permuted_sum`; `matching` is the best of the matrices' own matchings, so that permuted
    products of equally many places, in the Frobenius norm, have their common order found if it is for one of them,
    and no rows stay where they are.

    >>> order = torch.randperm(12)
    >>> planted = [torch.kron(torch.randn(6, 5), torch.randn(2, n2)) for n2 in (1, 2)]
    >>> shared = [SharedMatrix(w[order], (6, 5), (2, n2)) for w, n2 in zip(planted, (1, 2))]
    >>> found = nearest_joint_order(shared, torch.zeros(12, dtype=torch.int64))
    >>> round(found.captured[-1], 6)
    1.0

    Args:
        labels: integers (units,); a unit moves only to places of units of equal label.

    Raises:
        RequestError: a shape, a number of terms, the labels, channels or a metric do not fit; no or an unknown start.
        WorkError: a weight or a metric holds NaN or infinity.
    """
    labels = labels.cpu()
    check_starts(starts)
    for matrix in matrices:
        check_shared(matrix, labels)
    given = torch.arange(len(labels))
    seeing = [in_double(matrix) for matrix in matrices]
    seeing = [reduced(matrix) for matrix in seeing if matrix.sees_order]
    total = sum(matrix.importance * matrix.energy for matrix in seeing)
    if not seeing:
        return JointOrder(given, (1.0,), starts[0])
    simpler = [[simplified(matrix) for matrix in seeing]]
    if any(matrix.metric.output is not None for matrix in seeing):
        simpler.append([simplified(without_output(matrix)) for matrix in seeing])
    is_simple = all(matrix.metric == Metric() for matrix in seeing)

    unpermuted = _fitted(seeing, given)
    path, won = [unpermuted], starts[0]
    for start, simple in product(starts, simpler):
        climbed = _climb(simple, labels, _fitted(simple, _started(simple, labels, start)))
        if not is_simple:
            climbed = _climb(seeing, labels, _fitted(seeing, climbed[-1].order))
        # Of equally good ones the first, and no permutation for no gain.
        if climbed[-1].captured > path[-1].captured + ROUNDING * total:
            path, won = [unpermuted, *(each for each in climbed if each.captured > unpermuted.captured)], start
    if not is_simple and len(path) > 1:
        ended, begun = (_fitted(seeing, order, max_sweeps=MAX_FIT_SWEEPS) for order in (path[-1].order, given))
        if ended.captured <= begun.captured:
            path, won = [unpermuted], starts[0]
    return JointOrder(path[-1].order, tuple(point.captured / total for point in path), won)


# ---- the climb ----


@dataclass(frozen=True)
class _Point:
    """An order, each matrix's A and B in it, and the energy that they capture together."""

    order: Tensor
    sums: tuple[tuple[Tensor, Tensor], ...]
    captured: float


def _better(old: _Point, new: _Point) -> _Point:
    return new if new.captured > old.captured else old


def _climb(matrices: list[SharedMatrix], labels: Tensor, begin: _Point) -> list[_Point]:
    """The points from the given one up; each step is taken only if all matrices together capture more."""
    path = [begin]
    alike = _of_equal_places(matrices)
    needs_exchanges = len(alike) != 1 or any(
        matrix.metric.output is not None or not matrix.has_places for matrix in matrices
    )
    for _ in range(MAX_SWEEPS):
        before = path[-1]
        for places, some in alike.items():
            path.append(_better(path[-1], _regrouped(matrices, labels, path[-1], places, some)))
        if needs_exchanges:
            path.append(_better(path[-1], _exchanged(matrices, labels, path[-1])))
        if path[-1].captured - before.captured <= TOLERANCE * path[-1].captured:
            break
    return [path[0], *(new for old, new in pairwise(path) if new is not old)]


def _of_equal_places(matrices: list[SharedMatrix]) -> dict[int, list[int]]:
    """Number of places -> which matrices have so many, of those whose groups are of units alone."""
    alike: dict[int, list[int]] = {}
    for index, matrix in enumerate(matrices):
        if matrix.has_places:
            alike.setdefault(matrix.right_shape[0], []).append(index)
    return dict(sorted(alike.items()))


def _fitted(
    matrices: list[SharedMatrix], order: Tensor, near: _Point | None = None, max_sweeps: int = FIT_SWEEPS
) -> _Point:
    """The best sums in this order; where they take an alternation, so many sweeps of it, from those of `near`."""
    sums, captured = [], 0.0
    for index, matrix in enumerate(matrices):
        permuted = matrix.permuted(order)
        left, right = fitted_sum(permuted, None if near is None else near.sums[index], max_sweeps)
        error = permuted.metric.squared_norm(permuted.weight - expanded(left, right))
        sums.append((left, right))
        captured += matrix.importance * (matrix.energy - error)
    return _Point(order, tuple(sums), captured)


# ---- the steps ----


def _regrouped(matrices: list[SharedMatrix], labels: Tensor, point: _Point, places: int, some: list[int]) -> _Point:
    """Where `regrouped` leads for the matrices `some`, which all have so many places."""
    of_each = [_unit_features(matrices[index], point.sums[index][1]) for index in some]
    widths = [matrices[i].num_terms * matrices[i].left_shape[1] * len(matrices[i].copies) for i in some]
    features = _side_by_side(of_each, widths, places, len(labels))
    # Labels of slots: the order keeps them.
    slots, kinds = point.order.reshape(-1, places), labels.reshape(-1, places)
    return _fitted(matrices, regrouped(features, slots, kinds).flatten(), point)


def _unit_features(matrix: SharedMatrix, right: Tensor) -> Features:
    """F of the units, with all copies side by side, for the given B (k, m2, n2)."""
    if matrix.metric.input is None:
        # Only the span of the terms counts.
        right = torch.linalg.qr(right.flatten(1).mT).Q.mT.reshape(right.shape)
    of_rows = row_features(scaled_rows(matrix), right, matrix.left_shape[1], matrix.metric.input)
    scale = matrix.importance**0.5
    return lambda place, units: scale * torch.cat([of_rows(place, copy[units]) for copy in matrix.copies], 1)


def _side_by_side(of_each: list[Features], widths: list[int], places: int, num_units: int) -> Features:
    """All features (units, Σ widths), or as many numbers as have the same inner products, if these are fewer.

    Energies depend on inner products alone. The ridge under their root adds the same to each order's energy.
    """
    size = places * num_units
    if sum(widths) <= size:
        return lambda place, units: torch.cat([features(place, units) for features in of_each], 1)
    units = torch.arange(num_units)
    products: Tensor | None = None
    for features in of_each:
        at_all = torch.cat([features(place, units) for place in range(places)])
        products = at_all @ at_all.mT if products is None else products.addmm_(at_all, at_all.mT)
    assert products is not None
    of_all = ridged_cholesky(products, RIDGE)[0].reshape(places, num_units, size)
    return lambda place, units: of_all[place, units]


def _exchanged(matrices: list[SharedMatrix], labels: Tensor, point: _Point) -> _Point:
    """Where exchanges lead that lower the error of all matrices together for their sums as they are.

    The error of one is Σ F·G_π − 2 Σ_x S[π(x), x] but for a constant, with F = T C Tᵀ, S = G W C Tᵀ and the held sum T.
    """
    held: list[tuple[SharedMatrix, Tensor, Tensor | None, Tensor | None]] = []
    for matrix, (left, right) in zip(matrices, point.sums, strict=True):
        seen = expanded(left, right)
        if matrix.metric.input is not None:
            seen = seen @ matrix.metric.input
        linear, output = matrix.weight @ seen.mT, matrix.metric.output
        if output is None:
            held.append((matrix, linear, None, None))
        else:
            held.append((matrix, output @ linear, seen @ expanded(left, right).mT, output))

    def loss(order: Tensor) -> float:
        total = 0.0
        for matrix, linear, curvature, output in held:
            rows = matrix.rows(order)
            value = -2 * linear[rows, torch.arange(len(rows))].sum()
            if curvature is not None and output is not None:
                value = value + (curvature * output[rows][:, rows]).sum()
            total += matrix.importance * value.item()
        return total

    def gains(order: Tensor) -> Tensor:
        total = torch.zeros(len(order), len(order), dtype=torch.float64)
        for matrix, linear, curvature, output in held:
            rows = matrix.rows(order)
            if curvature is None or output is None:
                gain = linear_exchange_gains(linear[rows])
            else:
                gain = column_exchange_gains(linear[rows], curvature, output[rows][:, rows])
            for copy in matrix.copies:
                total += matrix.importance * gain[copy][:, copy].cpu()
        return total

    order = exchanged(gains, loss, point.order, labels, EXCHANGE_ROUNDS)
    return point if torch.equal(order, point.order) else _fitted(matrices, order, point)


# ---- the starts ----


def _started(matrices: list[SharedMatrix], labels: Tensor, start: Start) -> Tensor:
    """An order to climb from; `matrices` are in the Frobenius norm."""
    given = torch.arange(len(labels))
    if start == "identity":
        return given
    if start != "matching":
        return shuffled(given, labels, torch.Generator().manual_seed(int(start)))
    orders = [given]
    with_places = [matrix for matrix in matrices if matrix.has_places]
    for matrix in sorted(with_places, key=lambda matrix: -matrix.importance * matrix.energy)[:MOST_MATCHED]:
        places, n1, n2 = matrix.right_shape[0], matrix.left_shape[1], matrix.right_shape[1]
        blocks = matrix.weight[matrix.copies[0]].reshape(-1, n1, n2)
        orders.append(matched(blocks, given.reshape(-1, places), labels.reshape(-1, places)).flatten())
    return max(orders, key=lambda order: _fitted(matrices, order).captured)
