"""A few rows or columns of W as they are, all others 0: what a sum of structures sets apart for its other parts.

Letters: W (m, n); r lines are kept; C (n, n) and G (m, m) of the metric as in metric.py.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from kronpress.errors import RequestError
from kronpress.matrices.metric import FitMoments, Metric, as_metric, square_root
from kronpress.matrices.structured_matrix import Factors, Options, Spec, StructuredMatrix


class SelectedSpec(Spec):
    """`count` r: how many `lines`, rows or columns, are kept."""

    count: PositiveInt
    lines: Literal["rows", "columns"]


class Selected(StructuredMatrix):
    """`weight` (1, r, n) of rows, or (m, r, 1) of columns, and an order of all lines of which the first r are kept.

    `row_order` (m,) or `column_order` (n,), integers. The order of the others says nothing.

    >>> matrix = Selected(4, 3, Selected.Spec(lines="rows", count=1))
    >>> {name: tuple(factor.shape) for name, factor in matrix.factors.items()}
    {'weight': (1, 1, 3), 'row_order': (4,)}
    """

    Spec = SelectedSpec

    @staticmethod
    def factor_shapes(out_features: int, in_features: int, spec: SelectedSpec) -> dict[str, tuple[int, ...]]:
        most = out_features if spec.lines == "rows" else in_features
        if spec.count > most:
            raise RequestError(f"{spec.count} {spec.lines} of a {out_features}×{in_features} matrix: it has {most}")
        return {"weight": (1, spec.count, in_features) if spec.lines == "rows" else (out_features, spec.count, 1)}

    @staticmethod
    def order_sizes(out_features: int, in_features: int, spec: SelectedSpec) -> dict[str, int]:
        return {"row_order": out_features} if spec.lines == "rows" else {"column_order": in_features}

    @staticmethod
    def num_paths(spec: SelectedSpec) -> int:
        return 1

    @classmethod
    def initial_stds(
        cls, out_features: int, in_features: int, spec: SelectedSpec, mean_square: float
    ) -> dict[str, float]:
        of_all = out_features if spec.lines == "rows" else in_features
        return {"weight": (mean_square * of_all / spec.count) ** 0.5}

    @staticmethod
    def multiply(factors: Factors, x: Tensor, bias: Tensor | None = None) -> Tensor:
        w = factors["weight"]
        if "column_order" in factors:
            return F.linear(x.index_select(-1, factors["column_order"][: w.shape[1]]), w.squeeze(-1), bias)
        kept = F.linear(x, w.squeeze(0))
        order = factors["row_order"]
        y = x.new_zeros(*x.shape[:-1], len(order)).index_copy(-1, order[: w.shape[1]], kept)
        return y if bias is None else y + bias

    @staticmethod
    def expand(factors: Factors) -> Tensor:
        w = factors["weight"]
        if "column_order" in factors:
            order = factors["column_order"]
            return F.pad(w.squeeze(-1), (0, len(order) - w.shape[1]))[:, order.argsort()]
        order = factors["row_order"]
        return F.pad(w.squeeze(0), (0, 0, 0, len(order) - w.shape[1]))[order.argsort()]

    @classmethod
    def rows(cls, factors: Factors, indices: Tensor) -> Tensor:
        w = factors["weight"]
        if "column_order" in factors:
            order = factors["column_order"]
            return F.pad(w.squeeze(-1)[indices], (0, len(order) - w.shape[1]))[..., order.argsort()]
        place = factors["row_order"].argsort()[indices]
        found = w.squeeze(0)[place.clamp(max=w.shape[1] - 1)]
        return torch.where((place < w.shape[1])[..., None], found, 0)

    @staticmethod
    def fit(
        weight: Tensor, spec: SelectedSpec, moments: FitMoments = None, options: Options | None = None
    ) -> dict[str, Tensor]:
        """The lines whose loss would cost most, each by itself, and the best entries for them.

        In Frobenius norm that is the nearest. In a metric tr(G ΔW C ΔWᵀ) the entries are the best for the chosen
        lines, which make up for the others where G (of rows) or C (of columns) joins them: W_S + G_SS⁻¹ G_SU W_U. The
        choice is the best of all for rows if G is diagonal or not given, and for columns if C is.
        """
        out_features, in_features = weight.shape
        Selected.factor_shapes(out_features, in_features, spec)
        metric = as_metric(moments, weight)
        seen_by = Metric() if metric is None else metric.where_it_sees
        w, own, other = weight.to(torch.float64), seen_by.output, seen_by.input
        if spec.lines == "columns":
            w, own, other = w.mT, other, own
        # Now rows of w are chosen: `own` joins rows with each other, `other` weights what is in a row.
        across = w if other is None else w * other if other.ndim == 1 else w @ other
        cost = (across * w).sum(1)
        if own is not None:
            cost = cost * (own if own.ndim == 1 else own.diagonal())
        order = cost.argsort(descending=True, stable=True)
        kept, left = order[: spec.count], order[spec.count :]
        entries = w[kept]
        if own is not None and own.ndim == 2:
            inverse = square_root(own[kept][:, kept])[1]
            entries = entries + inverse @ (inverse @ (own[kept][:, left] @ w[left]))
        is_rows = spec.lines == "rows"
        entries = (entries[None] if is_rows else entries.mT[..., None]).to(weight.dtype).contiguous()
        return {"weight": entries, "row_order" if is_rows else "column_order": order}

    @classmethod
    def candidate_specs(  # type: ignore[override]
        cls,
        out_features: int,
        in_features: int,
        max_params: int | None = None,
        *,
        lines: Literal["rows", "columns"] | None = None,
        count: int | None = None,
    ) -> list[SelectedSpec]:
        """Rows and columns, or one of them, with `count` or as many as `max_params` holds."""
        if count is None and max_params is None:
            raise RequestError("selected lines need a count or a budget to choose it by")
        found: list[SelectedSpec] = []
        sides: dict[Literal["rows", "columns"], tuple[int, int]] = {
            "rows": (out_features, in_features),
            "columns": (in_features, out_features),
        }
        for side, (most, length) in sides.items():
            if lines in (None, side):
                affordable = most if max_params is None else min(most, max_params // length)
                chosen = affordable if count is None else count
                if 1 <= chosen <= affordable:
                    found.append(SelectedSpec(lines=side, count=chosen))
        if count is not None and not found and count > max(out_features, in_features):
            raise RequestError(f"{count} lines of a {out_features}×{in_features} matrix")
        return found
