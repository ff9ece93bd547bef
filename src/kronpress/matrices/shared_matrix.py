"""A matrix that shares the order of its rows with others: its part of their joint error, and its sum in an order.

Letters as in permutation.py. Units stand among the rows of W (m, n); for a layer that reads them W is transposed. The
error is tr(G ΔW C ΔWᵀ) with ΔW = P W − Σ_i A_i ⊗ B_i: C, on the other side, stays as it is, and G, on the side of the
units, moves with them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from kronpress.errors import RequestError, WorkError
from kronpress.matrices.kronecker_in_metric import alternate, columns_times, nearest_sum, rows_times
from kronpress.matrices.metric import Metric, separable, square_root
from kronpress.matrices.permutation import RIDGE, Shape, check_shapes
from kronpress.matrices.svd import ridged_cholesky


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

    @property
    def transposed(self) -> SharedMatrix:
        """The same of Wᵀ, whose units are the columns of W."""
        return replace(
            self,
            weight=self.weight.mT,
            left_shape=self.left_shape[::-1],
            right_shape=self.right_shape[::-1],
            metric=Metric(self.metric.output, self.metric.input),
            channels=None,
            is_transposed=not self.is_transposed,
        )

    def permuted(self, order: Tensor) -> SharedMatrix:
        """P W and P G Pᵀ, when unit order[u] stands where u did."""
        rows, output = self.rows(order), self.metric.output
        moved = None if output is None else output[rows][:, rows]
        return replace(self, weight=self.weight[rows], metric=Metric(self.metric.input, moved))


def check_shared(matrix: SharedMatrix, labels: Tensor) -> None:
    """Refuse what does not fit together: raises what `nearest_joint_order` does."""
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


def in_double(matrix: SharedMatrix) -> SharedMatrix:
    """With all tensors in float64, on the device of W."""
    weight = matrix.weight.detach().to(torch.float64)
    sides = (None if side is None else side.to(weight) for side in (matrix.metric.input, matrix.metric.output))
    return replace(matrix, weight=weight, metric=Metric(*sides))


def reduced(matrix: SharedMatrix) -> SharedMatrix:
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


def simplified(matrix: SharedMatrix) -> SharedMatrix:
    """With C taken for the nearest C1 ⊗ C2 and G for diag(G), which go into the weight and leave a Frobenius norm."""
    weight, (_, n1), (_, n2) = scaled_rows(matrix), matrix.left_shape, matrix.right_shape
    if matrix.metric.input is not None:
        roots = (square_root(side, floor=0)[0] for side in separable(matrix.metric.input, n1, n2))
        weight = columns_times(weight, *roots)
    return replace(matrix, weight=weight, metric=Metric())


def without_output(matrix: SharedMatrix) -> SharedMatrix:
    """With I for G."""
    return replace(matrix, metric=Metric(matrix.metric.input))


def scaled_rows(matrix: SharedMatrix) -> Tensor:
    """diag(G)^½ W."""
    if matrix.metric.output is None:
        return matrix.weight
    return matrix.metric.output.diagonal().clamp(min=0).sqrt()[:, None] * matrix.weight


def fitted_sum(matrix: SharedMatrix, near: tuple[Tensor, Tensor] | None, max_sweeps: int) -> tuple[Tensor, Tensor]:
    """A (k, m1, n1) and B (k, m2, n2) of W as it stands, from `near` if an alternation can go on from there."""
    if matrix.is_transposed:
        near = None if near is None else (near[0].mT, near[1].mT)
        left, right = fitted_sum(matrix.transposed, near, max_sweeps)
        return left.mT, right.mT
    (m1, n1), (m2, n2) = matrix.left_shape, matrix.right_shape
    weight, metric = matrix.weight, matrix.metric
    if near is None or metric.input is None or 1 in (n1, n2):
        return nearest_sum(weight, (m1, n1), (m2, n2), matrix.num_terms, metric, max_sweeps)
    left, right = near
    if metric.output is None:
        return alternate(weight, left, right, metric.input, max_sweeps)[:2]
    (root1, inverse1), (root2, inverse2) = map(square_root, separable(metric.output, m1, m2))
    seen = rows_times(weight, root1, root2)
    left, right, _ = alternate(seen, root1 @ left, root2 @ right, metric.input, max_sweeps)
    return inverse1 @ left, inverse2 @ right
