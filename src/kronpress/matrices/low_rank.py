"""Low rank, W = U V with U (out_features, rank) and V (rank, in_features)."""

from __future__ import annotations

import torch
from pydantic import PositiveInt
from torch import Tensor

from kronpress.errors import RequestError
from kronpress.matrices.metric import FitMoments, Metric, as_metric, square_root
from kronpress.matrices.structured_matrix import Factors, Options, Spec, StructuredMatrix
from kronpress.matrices.svd import balanced_svd


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
    def multiply(factors: Factors, x: Tensor) -> Tensor:
        return x @ factors["right"].mT @ factors["weight"].squeeze(-1).mT

    @staticmethod
    def expand(factors: Factors) -> Tensor:
        return torch.einsum("ors,ri->oi", factors["weight"], factors["right"])

    @staticmethod
    def fit(
        weight: Tensor, spec: LowRankSpec, moments: FitMoments = None, options: Options | None = None
    ) -> dict[str, Tensor]:
        """The truncated singular value decomposition of `weight` (out_features, in_features) (Eckart & Young 1936).

        With moments, the nearest in their metric tr(G ΔW C ΔWᵀ): the SVD of G^½ W C^½ is U Σ Vᵀ, and Ŵ is
        G^-½ U_r U_rᵀ G^½ W, in which C is not inverted: a singular C does no harm. The error is the sum of the
        discarded squared singular values. Without G this is SVD-LLM's optimum (arXiv 2403.07378).
        """
        out_features, in_features = weight.shape
        LowRank.factor_shapes(out_features, in_features, spec)
        metric = as_metric(moments, weight)
        w = weight.to(torch.float64)
        if metric is None:
            u, v = balanced_svd(w, spec.rank)
        else:
            output_root, output_inverse = (None, None) if metric.output is None else square_root(metric.output)
            if output_root is not None:
                w = output_root @ w
            seen = w if metric.input is None else w @ square_root(metric.input, floor=0)[0]
            scaled_u, _ = balanced_svd(seen, spec.rank)  # U Σ^½
            u = scaled_u / torch.linalg.vector_norm(scaled_u, dim=0).clamp(min=torch.finfo(w.dtype).tiny)
            v = u.mT @ w
            if output_inverse is not None:
                u = output_inverse @ u
            # Each pair shares its size evenly, as in the SVD.
            sizes = torch.linalg.vector_norm(u, dim=0), torch.linalg.vector_norm(v, dim=1)
            ratio = torch.where((sizes[0] > 0) & (sizes[1] > 0), sizes[1] / sizes[0], 1.0).sqrt()
            u, v = u * ratio, v / ratio[:, None]
        return {"weight": u.to(weight.dtype)[..., None].contiguous(), "right": v.to(weight.dtype).contiguous()}

    @classmethod
    def screen(cls, weight: Tensor, metric: Metric) -> list[tuple[LowRankSpec, float, bool]]:
        """Every rank that has fewer parameters than the matrix: all errors from the singular values of G^½ W C^½."""
        seen = weight
        if metric.output is not None:
            seen = square_root(metric.output)[0] @ seen
        if metric.input is not None:
            seen = seen @ square_root(metric.input, floor=0)[0]
        energies = torch.linalg.svdvals(seen).square()
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
