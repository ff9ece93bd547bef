"""Joint rank-k (arXiv 2402.16319): matrices that read the same input share the right factor of their low rank.

Letters: W_1 (m_1, n), ..., W_g (m_g, n) of one group; M = Σ m_i; W (M, n) is all of them, one above the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from kronpress import native
from kronpress.errors import RequestError
from kronpress.matrices.low_rank import LowRank, nearest_product
from kronpress.matrices.metric import FitMoments, Metric, as_metric
from kronpress.matrices.structured_matrix import Factors, Options, Spec, StructuredMatrix
from kronpress.matrices.svd import balanced_svd


class JointRankSpec(Spec):
    """`rank`: the inner size k of U_i V; `rows`: M, those of all matrices of the group, or None for a matrix alone."""

    rank: PositiveInt
    rows: PositiveInt | None = None


class JointRank(StructuredMatrix):
    """One matrix of a group, W_i = U_i V, with parameters `weight` (m_i, rank, 1), its own, and `right` (rank, n).

    `right` is the same parameter in all matrices of the group, so that the group has rank (M + n) parameters. The group
    is fitted as the one matrix W (M, n), and `split` divides what was found. A matrix that shares its input with
    no other is a group of one, and of low rank. `weight` has a third dimension of one: see the base class.

    The rank may be larger than m_i: of the keys of a grouped attention, say.

    >>> JointRank.count_params(8 + 4 + 4, 3, JointRank.Spec(rank=2, rows=16))
    38
    >>> JointRank.factor_shapes(4, 6, JointRank.Spec(rank=5, rows=16))
    {'weight': (4, 5, 1), 'right': (5, 6)}
    """

    Spec = JointRankSpec
    shared_factors: ClassVar[tuple[str, ...]] = ("right",)

    @staticmethod
    def factor_shapes(out_features: int, in_features: int, spec: JointRankSpec) -> dict[str, tuple[int, ...]]:
        rows = out_features if spec.rows is None else spec.rows
        if rows < out_features:
            raise RequestError(f"a group of {rows} rows cannot hold a matrix of {out_features}×{in_features}")
        if spec.rank > min(rows, in_features):
            raise RequestError(
                f"rank {spec.rank} for a group of {rows}×{in_features} in all: at most {min(rows, in_features)}"
            )
        return {"weight": (out_features, spec.rank, 1), "right": (spec.rank, in_features)}

    @staticmethod
    def num_paths(spec: JointRankSpec) -> int:
        return spec.rank

    @staticmethod
    def multiply(factors: Factors, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(F.linear(x, factors["right"]), factors["weight"].squeeze(-1), bias)

    @staticmethod
    def expand(factors: Factors) -> Tensor:
        return torch.einsum("ors,ri->oi", factors["weight"], factors["right"])

    @staticmethod
    def takes_native(factors: Factors, x: Tensor, bias: Tensor | None = None) -> bool:
        return LowRank.takes_native(factors, x, bias)

    @staticmethod
    def multiply_native(factors: Factors, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return native.low_rank(factors["weight"], factors["right"], x, bias)

    @classmethod
    def rows(cls, factors: Factors, indices: Tensor) -> Tensor:
        return factors["weight"][indices].squeeze(-1) @ factors["right"]

    @staticmethod
    def fit(
        weight: Tensor, spec: JointRankSpec, moments: FitMoments = None, options: Options | None = None
    ) -> dict[str, Tensor]:
        """The factors [U_1; ...; U_g] and V nearest to W, or those of one W_i alone; exact, as those of low rank are.

        Without moments the truncated singular value decomposition of W. With moments the nearest in tr(G ΔW C ΔWᵀ): all
        matrices of the group have the same C, and G (M, M) has the G_i of each on its diagonal. Factors of more rank
        than `weight` can have are filled up with zeros.
        """
        out_features, in_features = weight.shape
        shapes = JointRank.factor_shapes(out_features, in_features, spec)
        metric = as_metric(moments, weight)
        w, rank = weight.to(torch.float64), min(spec.rank, out_features, in_features)
        u, v = balanced_svd(w, rank) if metric is None else nearest_product(w, rank, metric.where_it_sees)
        factors = {name: weight.new_zeros(shape) for name, shape in shapes.items()}
        factors["weight"][:, :rank, 0], factors["right"][:rank] = u, v
        return factors

    @classmethod
    def split(cls, factors: Factors, sizes: Sequence[int]) -> list[dict[str, Tensor]]:
        parts = factors["weight"].split(list(sizes))
        return [{"weight": part.clone(), "right": factors["right"]} for part in parts]

    @classmethod
    def screen(cls, weight: Tensor, metric: Metric) -> list[tuple[JointRankSpec, float, bool]]:
        """Every rank with fewer parameters than the group; `weight` is W (M, n)."""
        found = LowRank.screen(weight, metric)
        return [(JointRankSpec(rank=spec.rank, rows=len(weight)), error, exact) for spec, error, exact in found]

    @classmethod
    def candidate_specs(  # type: ignore[override]
        cls,
        out_features: int,
        in_features: int,
        max_params: int | None = None,
        *,
        rank: int | None = None,
    ) -> list[JointRankSpec]:
        """The one spec with `rank`, or with the largest that `max_params` holds, of a group of this shape in all."""
        if rank is None and max_params is None:
            raise RequestError("joint rank needs a rank or a budget to choose it by")
        found = LowRank.candidate_specs(out_features, in_features, max_params, rank=rank)
        return [JointRankSpec(rank=spec.rank, rows=out_features) for spec in found]
