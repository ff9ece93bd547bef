"""Sums of Kronecker products in an order of rows and columns of their own: W = P (Σ_i A_i ⊗ B_i) Q.

For orders that no neighbouring layer can take (`folding` has those that can): each permuted side costs one
`index_select` and as many integers as it is long. Letters as in kronecker.py; K = Σ_i A_i ⊗ B_i.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import NonNegativeInt, StrictBool
from torch import Tensor

from kronpress.matrices.joint_order import nearest_joint_order
from kronpress.matrices.kronecker import Kronecker, KroneckerSpec
from kronpress.matrices.kronecker_in_metric import nearest_sum
from kronpress.matrices.metric import FitMoments, Metric, as_metric, times
from kronpress.matrices.permutation import Start, expanded, nearest_permuted_sum
from kronpress.matrices.shared_matrix import SharedMatrix
from kronpress.matrices.structured_matrix import Factors, Options, StructuredMatrix

# What a search is given to leave of a plain sum's error before it is made.
OPTIMISM = 0.8


class PermutedKroneckerSpec(KroneckerSpec):
    """Sizes of Σ_i A_i ⊗ B_i, and which sides have an order of their own."""

    rows: StrictBool = True
    columns: StrictBool = True


class PermutedKroneckerOptions(Options):
    """How the orders are searched: from the given ones, from a matching, and from `restarts` random ones."""

    restarts: NonNegativeInt = 0


class PermutedKronecker(StructuredMatrix):
    """W[i, column_order[j]] = K[row_order[i], j], with `weight` (m1, k, n1) and `right` (m2, k, n2) as in Kronecker.

    `row_order` (m,) and `column_order` (n,), integers, are there for the sides that the spec permutes.

    >>> spec = PermutedKronecker.Spec(left_shape=(2, 3), right_shape=(4, 2), columns=False)
    >>> matrix = PermutedKronecker(8, 6, spec)
    >>> sorted(matrix.factors)
    ['right', 'row_order', 'weight']
    >>> PermutedKronecker.count_params(8, 6, spec)  # k (m1 n1 + m2 n2)
    14
    """

    Spec = PermutedKroneckerSpec
    Options = PermutedKroneckerOptions

    @staticmethod
    def factor_shapes(out_features: int, in_features: int, spec: PermutedKroneckerSpec) -> dict[str, tuple[int, ...]]:
        return Kronecker.factor_shapes(out_features, in_features, spec)

    @staticmethod
    def order_sizes(out_features: int, in_features: int, spec: PermutedKroneckerSpec) -> dict[str, int]:
        sizes = {"row_order": out_features} if spec.rows else {}
        return {**sizes, "column_order": in_features} if spec.columns else sizes

    @staticmethod
    def num_paths(spec: PermutedKroneckerSpec) -> int:
        return spec.num_terms

    @classmethod
    def linear_dims(
        cls, out_features: int, in_features: int, spec: PermutedKroneckerSpec
    ) -> dict[str, tuple[int, int]]:
        return Kronecker.linear_dims(out_features, in_features, spec)

    @staticmethod
    def multiply(factors: Factors, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return _between_orders(Kronecker.multiply, factors, x, bias)

    @staticmethod
    def takes_native(factors: Factors, x: Tensor, bias: Tensor | None = None) -> bool:
        return Kronecker.takes_native(factors, x, bias)

    @staticmethod
    def multiply_native(factors: Factors, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return _between_orders(Kronecker.multiply_native, factors, x, bias)

    @classmethod
    def dense(cls, factors: Factors) -> Tensor:
        w = Kronecker.dense(factors)
        if "row_order" in factors:
            w = w.index_select(0, factors["row_order"])
        return w.index_select(1, factors["column_order"].argsort()) if "column_order" in factors else w

    @staticmethod
    def expand(factors: Factors) -> Tensor:
        w = Kronecker.expand(factors)
        if "row_order" in factors:
            w = w[factors["row_order"]]
        return w[:, factors["column_order"].argsort()] if "column_order" in factors else w

    @classmethod
    def rows(cls, factors: Factors, indices: Tensor) -> Tensor:
        if "row_order" in factors:
            indices = factors["row_order"][indices]
        found = Kronecker.rows(factors, indices)
        return found[..., factors["column_order"].argsort()] if "column_order" in factors else found

    @staticmethod
    def fit(
        weight: Tensor,
        spec: PermutedKroneckerSpec,
        moments: FitMoments = None,
        options: PermutedKroneckerOptions | None = None,
    ) -> dict[str, Tensor]:
        """The nearest sum in the best orders that are found: a local optimum, never worse than `Kronecker.fit`.

        Exact in the Frobenius norm for a single product of which one side was permuted: see `nearest_permuted_sum`.
        C of the inputs is in the search as it is. G of the outputs is in it as diag(G), which scales the rows; then
        each side in turn is bettered in the metric as it is, and the sum is fitted in it.
        """
        options = options or PermutedKroneckerOptions()
        metric = as_metric(moments, weight)
        out_features, in_features = weight.shape
        Kronecker.factor_shapes(out_features, in_features, spec)
        starts: list[Start] = ["identity", "matching", *range(options.restarts)]
        w = weight.to(torch.float64)
        seen_by = Metric() if metric is None else metric.where_it_sees
        rows, columns = _orders(w, spec, seen_by, starts)
        given = torch.arange(len(rows)), torch.arange(len(columns))
        found = _nearest(w, spec, seen_by, rows, columns)
        if metric is not None and not all(map(torch.equal, (rows, columns), given)):
            # The fits of the search were not made to the end.
            found = min(_nearest(w, spec, seen_by, *given), found, key=lambda each: each[0])
        _, rows, columns, left, right = found
        factors = {"weight": left.transpose(0, 1), "right": right.transpose(0, 1)}
        kept = {name: factor.to(weight.dtype).contiguous() for name, factor in factors.items()}
        # K = W[rows][:, columns], so that row i of W is where `rows` has i.
        orders = {"row_order": rows.argsort(), "column_order": columns}
        sizes = PermutedKronecker.order_sizes(out_features, in_features, spec)
        return {**kept, **{name: orders[name].to(weight.device) for name in sizes}}

    @classmethod
    def screen(cls, weight: Tensor, metric: Metric) -> list[tuple[PermutedKroneckerSpec, float, bool]]:
        """What Kronecker sums leave in the given order, and of it what a search is given to leave."""
        found = []
        for spec, error, _ in Kronecker.screen(weight, metric):
            permuted = _with_orders(spec)
            if permuted.rows or permuted.columns:
                found.append((permuted, OPTIMISM * error, False))
        return found

    @classmethod
    def estimate(cls, weight: Tensor, spec: PermutedKroneckerSpec, metric: Metric) -> float:
        return OPTIMISM * Kronecker.estimate(weight, spec, metric)

    @classmethod
    def candidate_specs(  # type: ignore[override]
        cls,
        out_features: int,
        in_features: int,
        max_params: int | None = None,
        *,
        right_shape: tuple[int, int] | None = None,
        num_terms: int | None = None,
        rows: bool = True,
        columns: bool = True,
    ) -> list[PermutedKroneckerSpec]:
        """Those of Kronecker for which the order of a side that may be permuted changes anything."""
        plain = Kronecker.candidate_specs(
            out_features, in_features, max_params, right_shape=right_shape, num_terms=num_terms
        )
        if out_features < in_features:  # sizes are meant for a tall matrix: a wider one takes their transpose
            rows, columns = columns, rows
        permuted = (_with_orders(spec, rows, columns) for spec in plain)
        return [spec for spec in permuted if spec.rows or spec.columns]


def _between_orders(
    multiply: Callable[[Factors, Tensor, Tensor | None], Tensor], factors: Factors, x: Tensor, bias: Tensor | None
) -> Tensor:
    """x Wᵀ + bias by a function that multiplies by K alone."""
    if "column_order" in factors:
        x = x.index_select(-1, factors["column_order"])
    if "row_order" not in factors:
        return multiply(factors, x, bias)
    y = multiply(factors, x, None).index_select(-1, factors["row_order"])
    return y if bias is None else y.add_(bias)


def _with_orders(spec: KroneckerSpec, rows: bool = True, columns: bool = True) -> PermutedKroneckerSpec:
    """With an order of each side that may have one, unless it has one group or one place: there no order counts."""
    (m1, n1), (m2, n2) = spec.left_shape, spec.right_shape
    sizes: dict[str, Any] = dict(spec)
    return PermutedKroneckerSpec(**sizes, rows=rows and 1 not in (m1, m2), columns=columns and 1 not in (n1, n2))


def _orders(
    weight: Tensor, spec: PermutedKroneckerSpec, metric: Metric, starts: Sequence[Start]
) -> tuple[Tensor, Tensor]:
    """Orders (m,) and (n,) in which W is near to a sum in the metric."""
    sizes = spec.left_shape, spec.right_shape, spec.num_terms
    scaled, output = weight, metric.output
    if output is not None:
        diagonal = output if output.ndim == 1 else output.diagonal()
        scaled = times(diagonal.clamp(min=0).sqrt(), weight)
    found = nearest_permuted_sum(
        scaled, *sizes, rows=spec.rows, columns=spec.columns, moment=metric.input, starts=starts
    )
    rows, columns = found.row_order, found.column_order
    if output is not None and output.ndim == 2:
        for is_column in [False] * spec.rows + [True] * spec.columns:
            permuted, moved = _permuted(weight, metric, rows, columns)
            shared = SharedMatrix(permuted, *sizes, moved)
            shared = shared.transposed if is_column else shared
            labels = torch.zeros(len(shared.weight), dtype=torch.int64)
            order = nearest_joint_order([shared], labels, ("identity",)).order
            rows, columns = (rows, columns[order]) if is_column else (rows[order], columns)
    return rows, columns


def _permuted(weight: Tensor, metric: Metric, rows: Tensor, columns: Tensor) -> tuple[Tensor, Metric]:
    """W and its metric in these orders."""
    output, input = metric.output, metric.input
    if output is not None:
        output = output[rows] if output.ndim == 1 else output[rows][:, rows]
    return weight[rows][:, columns], Metric(None if input is None else input[columns][:, columns], output)


def _nearest(
    weight: Tensor, spec: PermutedKroneckerSpec, metric: Metric, rows: Tensor, columns: Tensor
) -> tuple[float, Tensor, Tensor, Tensor, Tensor]:
    """The error of the nearest sum in these orders, the orders, A (k, m1, n1) and B (k, m2, n2)."""
    permuted, moved = _permuted(weight, metric, rows, columns)
    left, right = nearest_sum(permuted, spec.left_shape, spec.right_shape, spec.num_terms, moved)
    return moved.squared_norm(permuted - expanded(left, right)), rows, columns, left, right
