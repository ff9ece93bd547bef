"""One order of units that several matrices share, in which each is near to a sum of Kronecker products of its own.

Letters as in permutation.py. Units stand among the rows of W (m, n); for a layer that reads them W is transposed. The
error of one matrix is tr(G ΔW C ΔWᵀ) with ΔW = P W − Σ_i A_i ⊗ B_i: C, on the other side, stays as it is, and G, on the
side of the units, moves with them.

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
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise, product

import torch
from torch import Tensor

from kronpress.errors import RequestError, WorkError
from kronpress.matrices.kronecker_in_metric import MAX_SWEEPS as MAX_FIT_SWEEPS
from kronpress.matrices.kronecker_in_metric import alternate, columns_times, nearest_sum, rows_times
from kronpress.matrices.metric import Metric, separable, square_root
from kronpress.matrices.permutation import RIDGE, Shape, Start, check_shapes, check_starts, expanded, row_features
from kronpress.matrices.permutation_starts import matched, shuffled
from kronpress.matrices.permutation_steps import (
    ROUNDING,
    Features,
    column_exchange_gains,
    exchanged,
    linear_exchange_gains,
    regrouped,
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
class SharedMatrix:
    """One of the matrices that share an order: W (m, n), m = m1·m2, and the sum that it will be fitted by.

    `metric` has C (n, n) as `input`, and G (m, m), on the side of the units, as `output`. Unit u stands in the rows
    channels[:, u], `channels` (copies, units); None: row u is unit u. Rows that are no units stay where they are.
    Energies are added with `importance` times. `is_transposed` says that W is the transpose of a layer's weight: sums
    are fitted to that weight itself, since `nearest_sum` takes its C as it is and its G for separable.
    """

    weight: Tensor
    left_shape: Shape
    right_shape: Shape
    num_terms: int = 1
    metric: Metric = field(default_factory=Metric)
    channels: Tensor | None = None
    importance: float = 1.0
    is_transposed: bool = False

    @cached_property
    def energy(self) -> float:
        return self.metric.squared_norm(self.weight)

    @property
    def sees_order(self) -> bool:
        """Whether an order of rows can change the error: not with one group, one place, or nothing to capture."""
        return self.left_shape[0] > 1 and self.right_shape[0] > 1 and self.importance * self.energy > 0

    @property
    def copies(self) -> Tensor:
        """`channels`, (copies, units)."""
        return torch.arange(len(self.weight))[None] if self.channels is None else self.channels

    @property
    def has_places(self) -> bool:
        """Whether place u mod m2 of group u div m2 is where unit u stands, in every copy."""
        places, size = self.right_shape[0], self.copies.shape[1]
        if size % places:
            return False
        groups = (self.copies // places).reshape(-1, size // places, places)
        return bool((self.copies % places == torch.arange(size) % places).all() and (groups == groups[..., :1]).all())

    def rows(self, order: Tensor) -> Tensor:
        """(m,): the row of W that stands in each row when unit order[u] stands where u did."""
        rows = torch.arange(len(self.weight))
        rows[self.copies] = self.copies[:, order]
        return rows


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
        _check(matrix, labels)
    given = torch.arange(len(labels))
    seeing = [_in_double(matrix) for matrix in matrices]
    seeing = [_reduced(matrix) for matrix in seeing if matrix.sees_order]
    total = sum(matrix.importance * matrix.energy for matrix in seeing)
    if not seeing:
        return JointOrder(given, (1.0,), starts[0])
    simplified = [[_simplified(matrix) for matrix in seeing]]
    if any(matrix.metric.output is not None for matrix in seeing):
        simplified.append([_simplified(_without_output(matrix)) for matrix in seeing])
    is_simple = all(matrix.metric == Metric() for matrix in seeing)

    unpermuted = _fitted(seeing, given)
    path, won = [unpermuted], starts[0]
    for start, simple in product(starts, simplified):
        climbed = _climb(simple, labels, _fitted(simple, _started(simple, labels, start)))
        if not is_simple:
            climbed = _climb(seeing, labels, _fitted(seeing, climbed[-1].order))
        # Of equally good ones the first, and no permutation for no gain.
        if climbed[-1].captured > path[-1].captured + ROUNDING * total:
            path, won = [unpermuted, *(each for each in climbed if each.captured > unpermuted.captured)], start
    if not is_simple and _in_full(seeing, path[-1].order) <= _in_full(seeing, given):
        path = [unpermuted]
    return JointOrder(path[-1].order, tuple(point.captured / total for point in path), won)


# ---- the matrices ----


def _check(matrix: SharedMatrix, labels: Tensor) -> None:
    check_shapes(matrix.weight, matrix.left_shape, matrix.right_shape, matrix.num_terms)
    m, n = matrix.weight.shape
    if labels.ndim != 1 or labels.is_floating_point():
        raise RequestError(
            f"the labels have shape {tuple(labels.shape)} and {labels.dtype}: expected integers (units,)"
        )
    rows = matrix.copies.flatten()
    if (
        matrix.copies.shape[1] != len(labels)
        or rows.unique().numel() < rows.numel()
        or rows.min() < 0
        or rows.max() >= m
    ):
        raise RequestError(
            f"channels of shape {tuple(matrix.copies.shape)} for {len(labels)} units and a weight of {m} rows: "
            "expected one row for each unit in every copy, and none twice"
        )
    for side, size in ((matrix.metric.input, n), (matrix.metric.output, m)):
        if side is not None and side.shape != (size, size):
            raise RequestError(
                f"a metric of shape {tuple(side.shape)} for a weight of {(m, n)}: expected {(size, size)}"
            )
    for tensor in (matrix.weight, matrix.metric.input, matrix.metric.output):
        if tensor is not None and not tensor.isfinite().all():
            raise WorkError("a weight or its metric holds NaN or infinity")


def _in_double(matrix: SharedMatrix) -> SharedMatrix:
    weight = matrix.weight.detach().to(torch.float64)
    sides = (None if side is None else side.to(weight) for side in (matrix.metric.input, matrix.metric.output))
    return replace(matrix, weight=weight, metric=Metric(*sides))


def _reduced(matrix: SharedMatrix) -> SharedMatrix:
    """The same problem with at most m columns and no C, where B has one column: only W C Wᵀ counts there."""
    (m1, _), (_, n2) = matrix.left_shape, matrix.right_shape
    if n2 > 1:
        return matrix
    weight, moment = matrix.weight, matrix.metric.input
    if moment is not None:
        weight = weight @ ridged_cholesky(moment, RIDGE)[0]
    if weight.shape[1] > len(weight):
        weight = torch.linalg.qr(weight.mT, mode="r").R.mT
    return replace(matrix, weight=weight, left_shape=(m1, weight.shape[1]), metric=Metric(None, matrix.metric.output))


def _simplified(matrix: SharedMatrix) -> SharedMatrix:
    """With C taken for the nearest C1 ⊗ C2 and G for diag(G), which go into the weight and leave a Frobenius norm."""
    weight, (_, n1), (_, n2) = _scaled_rows(matrix), matrix.left_shape, matrix.right_shape
    if matrix.metric.input is not None:
        roots = (square_root(side, floor=0)[0] for side in separable(matrix.metric.input, n1, n2))
        weight = columns_times(weight, *roots)
    return replace(matrix, weight=weight, metric=Metric())


def _without_output(matrix: SharedMatrix) -> SharedMatrix:
    return replace(matrix, metric=Metric(matrix.metric.input))


def _scaled_rows(matrix: SharedMatrix) -> Tensor:
    """diag(G)^½ W."""
    if matrix.metric.output is None:
        return matrix.weight
    return matrix.metric.output.diagonal().clamp(min=0).sqrt()[:, None] * matrix.weight


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


def _fitted(matrices: list[SharedMatrix], order: Tensor, near: _Point | None = None) -> _Point:
    """The best sums in this order; where they take an alternation, a few sweeps of it from those of `near`."""
    sums, captured = [], 0.0
    for index, matrix in enumerate(matrices):
        weight, metric = _permuted(matrix, order)
        left, right = _sum(matrix, weight, metric, None if near is None else near.sums[index])
        error = metric.squared_norm(weight - expanded(left, right))
        sums.append((left, right))
        captured += matrix.importance * (matrix.energy - error)
    return _Point(order, tuple(sums), captured)


def _permuted(matrix: SharedMatrix, order: Tensor) -> tuple[Tensor, Metric]:
    rows = matrix.rows(order)
    output = matrix.metric.output
    return matrix.weight[rows], replace(matrix.metric, output=None if output is None else output[rows][:, rows])


def _sum(
    matrix: SharedMatrix,
    weight: Tensor,
    metric: Metric,
    near: tuple[Tensor, Tensor] | None,
    max_sweeps: int = FIT_SWEEPS,
) -> tuple[Tensor, Tensor]:
    """A (k, m1, n1) and B (k, m2, n2) of the permuted weight, from `near` if an alternation can go on from there."""
    if matrix.is_transposed:
        turned = replace(
            matrix,
            left_shape=matrix.left_shape[::-1],
            right_shape=matrix.right_shape[::-1],
            is_transposed=False,
        )
        near = None if near is None else (near[0].mT, near[1].mT)
        left, right = _sum(turned, weight.mT, Metric(metric.output, metric.input), near, max_sweeps)
        return left.mT, right.mT
    (m1, n1), (m2, n2) = matrix.left_shape, matrix.right_shape
    if near is None or metric.input is None or 1 in (n1, n2):
        return nearest_sum(weight, (m1, n1), (m2, n2), matrix.num_terms, metric, max_sweeps)
    left, right = near
    if metric.output is None:
        return alternate(weight, left, right, metric.input, max_sweeps)[:2]
    (root1, inverse1), (root2, inverse2) = map(square_root, separable(metric.output, m1, m2))
    seen = rows_times(weight, root1, root2)
    left, right, _ = alternate(seen, root1 @ left, root2 @ right, metric.input, max_sweeps)
    return inverse1 @ left, inverse2 @ right


def _in_full(matrices: list[SharedMatrix], order: Tensor) -> float:
    """The energy that the sums capture when they are fitted as a layer will be."""
    captured = 0.0
    for matrix in matrices:
        weight, metric = _permuted(matrix, order)
        fitted = _sum(matrix, weight, metric, None, MAX_FIT_SWEEPS)
        captured += matrix.importance * (matrix.energy - metric.squared_norm(weight - expanded(*fitted)))
    return captured


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
    of_rows = row_features(_scaled_rows(matrix), right, matrix.left_shape[1], matrix.metric.input)
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
