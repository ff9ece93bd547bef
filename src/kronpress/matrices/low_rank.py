"""Low rank, W = U V with U (out_features, rank) and V (rank, in_features)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from kronpress import native
from kronpress.errors import RequestError
from kronpress.matrices.metric import FitMoments, Metric, as_metric, square_root, times
from kronpress.matrices.structured_matrix import Factors, Options, Spec, StructuredMatrix
from kronpress.matrices.svd import balanced, balanced_svd, leading_eigenvectors


class LowRankSpec(Spec):
    """`rank`: the inner size of U V."""

    rank: PositiveInt


class LowRank(StructuredMatrix):
    """A product of two thin matrices, with parameters `weight` (out_features, rank, 1) and `right` (rank, in_features).

    `weight` is U with a third dimension of one: see the base class for why it has three.

    >>> LowRank.count_params(8, 3, LowRank.Spec(rank=2))  # rank (m + n)
    22
    """

    Spec = LowRankSpec

    @staticmethod
    def factor_shapes(out_features: int, in_features: int, spec: LowRankSpec) -> dict[str, tuple[int, ...]]:
        if spec.rank > min(out_features, in_features):
            raise RequestError(
                f"rank {spec.rank} for a {out_features}×{in_features} matrix: at most {min(out_features, in_features)}"
            )
        return {"weight": (out_features, spec.rank, 1), "right": (spec.rank, in_features)}

    @staticmethod
    def num_paths(spec: LowRankSpec) -> int:
        return spec.rank

    @staticmethod
    def multiply(factors: Factors, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(F.linear(x, factors["right"]), factors["weight"].squeeze(-1), bias)

    @staticmethod
    def expand(factors: Factors) -> Tensor:
        return torch.einsum("ors,ri->oi", factors["weight"], factors["right"])

    @staticmethod
    def takes_native(factors: Factors, x: Tensor, bias: Tensor | None = None) -> bool:
        left, right = factors["weight"], factors["right"]
        return native.takes(x, left, right, *([] if bias is None else [bias]))

    @staticmethod
    def multiply_native(factors: Factors, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return native.low_rank(factors["weight"], factors["right"], x, bias)

    @classmethod
    def rows(cls, factors: Factors, indices: Tensor) -> Tensor:
        return factors["weight"][indices].squeeze(-1) @ factors["right"]

    @staticmethod
    def fit(
        weight: Tensor, spec: LowRankSpec, moments: FitMoments = None, options: Options | None = None
    ) -> dict[str, Tensor]:
        """The truncated singular value decomposition of `weight` (out_features, in_features) (Eckart & Young 1936).

        With moments, the nearest in their metric tr(G ΔW C ΔWᵀ): see `nearest_product`. Without G this is SVD-LLM's
        optimum (arXiv 2403.07378).
        """
        out_features, in_features = weight.shape
        LowRank.factor_shapes(out_features, in_features, spec)
        metric = as_metric(moments, weight)
        w = weight.to(torch.float64)
        u, v = balanced_svd(w, spec.rank) if metric is None else nearest_product(w, spec.rank, metric.where_it_sees)
        return {"weight": u.to(weight.dtype)[..., None].contiguous(), "right": v.to(weight.dtype).contiguous()}

    @classmethod
    def screen(cls, weight: Tensor, metric: Metric) -> list[tuple[LowRankSpec, float, bool]]:
        """Every rank that has fewer parameters than the matrix: all errors from the singular values of G^½ W C^½."""
        energies = torch.linalg.eigvalsh(_rows_seen(*_wide(weight, metric))[2]).flip(0).clamp(min=0)
        discarded = (energies.sum() - energies.cumsum(0)).clamp(min=0).tolist()
        largest = (weight.numel() - 1) // sum(weight.shape)
        return [(LowRankSpec(rank=rank), discarded[rank - 1], True) for rank in range(1, largest + 1)]

    @classmethod
    def candidate_specs(  # type: ignore[override]
        cls,
        out_features: int,
        in_features: int,
        max_params: int | None = None,
        *,
        rank: int | None = None,
    ) -> list[LowRankSpec]:
        """The one spec with `rank`, or with the largest rank that `max_params` holds."""
        if rank is None and max_params is None:
            raise RequestError("low rank needs a rank or a budget to choose it by")
        affordable = full_rank = min(out_features, in_features)
        if rank is not None and rank > full_rank:
            raise RequestError(f"rank {rank}: a matrix of this shape has at most {full_rank}")
        if max_params is not None:
            affordable = min(full_rank, max_params // (out_features + in_features))
        chosen = affordable if rank is None else rank
        return [LowRankSpec(rank=chosen)] if 1 <= chosen <= affordable else []


def nearest_product(weight: Tensor, rank: int, metric: Metric) -> tuple[Tensor, Tensor]:
    """U (m, rank) and V (rank, n) for which tr(G ΔW C ΔWᵀ) of ΔW = W − U V is least, W (m, n) in float64.

    With G^½ W C^½ = X Σ Yᵀ, U V is G^-½ X_r X_rᵀ G^½ W, which is also W C^½ Y_r Y_rᵀ C^-½. Either needs the vectors of
    one side alone: those of the shorter one, so that only its metric is rooted and inverted.
    """
    weight_wide, metric_wide = _wide(weight, metric)
    seen, inverse, gram = _rows_seen(weight_wide, metric_wide)
    vectors = leading_eigenvectors(gram, rank)  # X_r
    left, right = balanced((vectors if inverse is None else times(inverse, vectors)).mT, vectors.mT @ seen)
    return (left.mT, right) if weight_wide is weight else (right.mT, left)


def _wide(weight: Tensor, metric: Metric) -> tuple[Tensor, Metric]:
    """W, or else its transpose, with at least as many columns as rows."""
    return (weight, metric) if weight.shape[0] <= weight.shape[1] else (weight.mT, Metric(metric.output, metric.input))


def _rows_seen(weight: Tensor, metric: Metric) -> tuple[Tensor, Tensor | None, Tensor]:
    """G^½ W (m, n), G^-½ (None if there is no G) and G^½ W C Wᵀ G^½ (m, m), whose eigenvalues are the Σ²."""
    seen, inverse = weight, None
    if metric.output is not None:
        root, inverse = square_root(metric.output)
        seen = times(root, weight)
    return seen, inverse, (seen if metric.input is None else times(metric.input, seen.mT).mT) @ seen.mT
