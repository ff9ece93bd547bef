"""Sums of Kronecker products, W = Σ_i A_i ⊗ B_i.

Letters: W (m, n); A_i (m1, n1) with row p and column a; B_i (m2, n2) with row q and column b; m = m1·m2,
n = n1·n2; k terms counted by i; t tokens. (A ⊗ B)[p·m2 + q, a·n2 + b] = A[p, a] · B[q, b].
"""

from __future__ import annotations

from itertools import product
from math import prod
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from kronpress.errors import RequestError
from kronpress.matrices.kronecker_in_metric import nearest_sum, rearranged, screened
from kronpress.matrices.metric import FitMoments, Metric, as_metric, separable
from kronpress.matrices.structured_matrix import Factors, Options, Spec, StructuredMatrix
from kronpress.matrices.svd import balanced_svd

# What `screen` looks at; larger B cost much to look at and come out like low rank.
SCREENED_SIDES = (1, 2, 3, 4, 6, 8, 12, 16)
MOST_TERMS = 32
OPTIMISM = 0.7


class KroneckerSpec(Spec):
    """Sizes of Σ_i A_i ⊗ B_i: `left_shape` (m1, n1) of every A_i, `right_shape` (m2, n2) of every B_i."""

    left_shape: tuple[PositiveInt, PositiveInt]
    right_shape: tuple[PositiveInt, PositiveInt]
    num_terms: PositiveInt = 1


class KroneckerOptions(Options):
    """The start of a Kronecker sum: the nearest one, or one of Krony-PT's other two (arXiv 2412.12351).

    `prune_small_factor` is the second entry of B in the start `prune`: 0.1 as in the paper if None.
    """

    start: Literal["van_loan", "adaptive", "prune"] = "van_loan"
    prune_small_factor: Annotated[float, Field(ge=-1, le=1)] | None = None

    @model_validator(mode="after")
    def _small_factor_of_prune(self) -> KroneckerOptions:
        if self.prune_small_factor is not None and self.start != "prune":
            raise ValueError(f"prune_small_factor is set, and start is {self.start}, not prune")
        return self


class Kronecker(StructuredMatrix):
    """A sum of k Kronecker products, with parameters `weight` (m1, k, n1) and `right` (m2, k, n2).

    `weight[p, i, a]` is A_i[p, a] and `right[q, i, b]` is B_i[q, b]: with the terms in the middle, either
    order of contraction reads the larger factor as one matrix, so that all k terms are one GEMM.

    >>> spec = Kronecker.Spec(left_shape=(2, 3), right_shape=(4, 1), num_terms=2)
    >>> matrix = Kronecker(8, 3, spec)
    >>> matrix.matmul(torch.ones(5, 3)).shape
    torch.Size([5, 8])
    >>> Kronecker.count_params(8, 3, spec)  # k (m1 n1 + m2 n2)
    20
    """

    Spec = KroneckerSpec
    Options = KroneckerOptions

    @staticmethod
    def factor_shapes(out_features: int, in_features: int, spec: KroneckerSpec) -> dict[str, tuple[int, ...]]:
        (m1, n1), (m2, n2), k = spec.left_shape, spec.right_shape, spec.num_terms
        if (m1 * m2, n1 * n2) != (out_features, in_features):
            raise RequestError(
                f"left_shape {m1}×{n1} ⊗ right_shape {m2}×{n2} is {m1 * m2}×{n1 * n2}, "
                f"not the matrix's {out_features}×{in_features}"
            )
        if k > min(m1 * n1, m2 * n2):
            raise RequestError(
                f"num_terms {k} with factors {m1}×{n1} and {m2}×{n2}: "
                f"{min(m1 * n1, m2 * n2)} terms already represent every matrix"
            )
        return {"weight": (m1, k, n1), "right": (m2, k, n2)}

    @staticmethod
    def num_paths(spec: KroneckerSpec) -> int:
        return spec.num_terms

    @staticmethod
    def multiply(factors: Factors, x: Tensor) -> Tensor:
        left, right = factors["weight"], factors["right"]
        (m1, k, n1), (m2, _, n2) = left.shape, right.shape
        x_tab = x.reshape(-1, n1, n2)  # (t, a, b)
        if n1 * n2 * m2 + m1 * n1 * m2 <= m1 * n1 * n2 + m1 * n2 * m2:  # multiply-adds per term and token
            # B first: Z[t, q, i, a] = Σ_b B_i[q, b] x[t, a, b], then y[t, p, q] = Σ_ia A_i[p, a] Z[t, q, i, a].
            z = right.reshape(m2 * k, n2) @ x_tab.mT
            y = z.reshape(-1, k * n1) @ left.reshape(m1, k * n1).mT  # (t q, p)
            y = y.reshape(-1, m2, m1).mT
        else:
            # A first: U[t, b, p, i] = Σ_a A_i[p, a] x[t, a, b], then y[t, p, q] = Σ_ib B_i[q, b] U[t, b, p, i].
            u = x_tab.mT.reshape(-1, n1) @ left.reshape(m1 * k, n1).mT  # (t b, p i)
            u = u.reshape(-1, n2, m1, k).permute(0, 2, 3, 1)  # (t, p, i, b)
            y = u.reshape(-1, k * n2) @ right.reshape(m2, k * n2).mT  # (t p, q)
        return y.reshape(*x.shape[:-1], m1 * m2)

    @staticmethod
    def expand(factors: Factors) -> Tensor:
        left, right = factors["weight"], factors["right"]
        (m1, k, n1), (m2, _, n2) = left.shape, right.shape
        w = left.new_zeros(m1, m2, n1, n2)
        for i in range(k):
            w += left[:, None, i, :, None] * right[None, :, i, None, :]
        return w.reshape(m1 * m2, n1 * n2)

    @classmethod
    def rows(cls, factors: Factors, indices: Tensor) -> Tensor:
        left, right = factors["weight"], factors["right"]
        p, q = indices // len(right), indices % len(right)
        return torch.einsum("...ia,...ib->...ab", left[p], right[q]).flatten(-2)

    @staticmethod
    def check_options(spec: KroneckerSpec, options: KroneckerOptions) -> None:
        if options.start == "prune" and (sorted(spec.right_shape) != [1, 2] or spec.num_terms != 1):
            (m2, n2), k = spec.right_shape, spec.num_terms
            raise RequestError(
                f"start prune with right_shape {m2}×{n2} and num_terms {k}: it needs one term with 1×2 or 2×1"
            )

    @staticmethod
    def fit(
        weight: Tensor, spec: KroneckerSpec, moments: FitMoments = None, options: KroneckerOptions | None = None
    ) -> dict[str, Tensor]:
        """The best k-term sum in Frobenius norm or in the metric of `moments`, or another start by `options`.

        `van_loan` (Van Loan & Pitsianis 1993): each m2×n2 block of W becomes one row of R (m1·n1, m2·n2); then
        ‖W − Σ A_i ⊗ B_i‖ = ‖R − Σ vec A_i vec B_iᵀ‖, whose minimum is the truncated SVD of R. Its singular values
        are split evenly over the two factors. The squared error is the sum of the discarded squared singular
        values of R. With moments: kronecker_in_metric.py.

        `adaptive`: the same with every A_i times ‖W‖ / ‖Ŵ‖, so that Ŵ is as large as W; see
        `healing_parametrization`. `prune`: A is every second column of W, B = [1, s], or every second row and
        B = [1, s]ᵀ, with s the `prune_small_factor`. Both are starts for training and take no moments.

        Args:
            weight: W, (out_features, in_features).

        Raises:
            RequestError: `spec` does not fit the shape, `options` do not fit `spec`, or there are moments with a
                start that does not use them, or of another size.
            WorkError: `moments` hold NaN or infinity.
        """
        options = options or KroneckerOptions()
        metric = as_metric(moments, weight)
        if metric is not None and options.start != "van_loan":
            raise RequestError(f"start {options.start} is not fitted to inputs: leave out the moments")
        out_features, in_features = weight.shape
        Kronecker.factor_shapes(out_features, in_features, spec)
        Kronecker.check_options(spec, options)
        (m1, n1), (m2, n2), k = spec.left_shape, spec.right_shape, spec.num_terms
        w = weight.to(torch.float64)
        if options.start == "prune":
            left = weight[::m2, None, ::n2]
            small = 0.1 if options.prune_small_factor is None else options.prune_small_factor
            right = weight.new_tensor([1.0, small]).reshape(m2, 1, n2)
        elif metric is not None:
            a, b = nearest_sum(w, (m1, n1), (m2, n2), k, metric.where_it_sees)
            left, right = a.transpose(0, 1), b.transpose(0, 1)
        else:
            blocks = rearranged(w, (m1, n1), (m2, n2))  # (p a, q b)
            a, b = balanced_svd(blocks, k)  # (p a, i), (i, q b)
            if options.start == "adaptive":
                # The terms are orthogonal, each as large as the square of its half in `a`.
                captured = torch.linalg.vector_norm(a.square().sum(0))
                a = a * (torch.linalg.vector_norm(blocks) / captured if captured > 0 else 1)
            left = a.reshape(m1, n1, k).mT
            right = b.reshape(k, m2, n2).transpose(0, 1)
        return {"weight": left.to(weight.dtype).contiguous(), "right": right.to(weight.dtype).contiguous()}

    @staticmethod
    def healing_parametrization(factors: Factors, options: KroneckerOptions) -> nn.Module | None:
        """For the start `adaptive`, A_i = s_i A'_i with a learnable s_i and ‖A'_i‖ = ‖B_i‖.

        The scalars are read off the factors: in the start itself they are ‖W‖ / ‖Ŵ‖ for every term, and nothing
        has to be stored for them.
        """
        if options.start != "adaptive":
            return None
        left, right = (factors[name].detach().square().sum((0, 2)).sqrt() for name in ("weight", "right"))
        usable = (left > 0) & (right > 0)  # a term of zeros is left as it is
        return _TermScale(torch.where(usable, left / right, 1.0))

    @classmethod
    def screen(cls, weight: Tensor, metric: Metric) -> list[tuple[KroneckerSpec, float, bool]]:
        """Small B of every shape up to 16×16, of up to MOST_TERMS terms.

        The errors are those in the nearest separable metric, scaled to the norm of W in the true one. They are computed
        in single precision, and are mostly too low: a separable metric is easy to be near in.
        """
        out_features, in_features = weight.shape
        energy = metric.squared_norm(weight)
        single = weight.to(torch.float32)
        outputs, inputs = (
            {size: None if side is None else separable(side, len(side) // size, size) for size in sizes}
            for side, sizes in (
                (metric.output, [size for size in SCREENED_SIDES if out_features % size == 0]),
                (metric.input, [size for size in SCREENED_SIDES if in_features % size == 0]),
            )
        )
        found = []
        for (m2, output), (n2, input) in product(outputs.items(), inputs.items()):
            if (m2, n2) == (1, 1):
                continue
            left_shape = out_features // m2, in_features // n2
            discarded, seen_energy = screened(single, left_shape, (m2, n2), output, input)
            scale = energy / seen_energy.item() if seen_energy > 0 else 0.0
            per_term = left_shape[0] * left_shape[1] + m2 * n2
            most = min(MOST_TERMS, *map(prod, (left_shape, (m2, n2))), (weight.numel() - 1) // per_term)
            for k, error in enumerate((scale * discarded[:most]).tolist(), start=1):
                found.append((KroneckerSpec(left_shape=left_shape, right_shape=(m2, n2), num_terms=k), error, False))
        return found

    @classmethod
    def estimate(cls, weight: Tensor, spec: KroneckerSpec, metric: Metric) -> float:
        """The error of the separable start in the true metric, of which the alternation is given OPTIMISM to reach."""
        sizes = spec.left_shape, spec.right_shape, spec.num_terms
        left, right = nearest_sum(weight, *sizes, metric.where_it_sees, max_sweeps=0)
        start = cls.expand({"weight": left.transpose(0, 1), "right": right.transpose(0, 1)})
        return OPTIMISM * metric.squared_norm(weight - start)

    @classmethod
    def candidate_specs(  # type: ignore[override]
        cls,
        out_features: int,
        in_features: int,
        max_params: int | None = None,
        *,
        right_shape: tuple[int, int] | None = None,
        num_terms: int | None = None,
    ) -> list[KroneckerSpec]:
        """One spec for each shape of B, with `num_terms` terms or as many as `max_params` holds.

        A `right_shape` is meant for a matrix at least as tall as wide; a wider one takes its transpose, as
        Krony-PT does for `c_proj`.
        """
        if right_shape is None:
            everything = [(m2, n2) for m2 in divisors(out_features) for n2 in divisors(in_features)]
            shapes = [shape for shape in everything if shape not in ((1, 1), (out_features, in_features))]
        else:
            m2, n2 = right_shape if out_features >= in_features else reversed(right_shape)
            for name, size, part in [("out_features", out_features, m2), ("in_features", in_features, n2)]:
                if size % part:
                    raise RequestError(
                        f"right factor {m2}×{n2}: {part} does not divide {name} {size}; "
                        f"its divisors are {', '.join(map(str, divisors(size)))}"
                    )
            shapes = [(m2, n2)]
        if num_terms is None and max_params is None:
            raise RequestError("a Kronecker sum needs num_terms or a budget to choose it by")
        specs, most_of_all = [], 0
        for m2, n2 in shapes:
            m1, n1 = out_features // m2, in_features // n2
            affordable = most_terms = min(m1 * n1, m2 * n2)
            if max_params is not None:
                affordable = min(most_terms, max_params // (m1 * n1 + m2 * n2))
            k = affordable if num_terms is None else num_terms
            if 1 <= k <= affordable:
                specs.append(KroneckerSpec(left_shape=(m1, n1), right_shape=(m2, n2), num_terms=k))
            most_of_all = max(most_of_all, most_terms)
        if num_terms is not None and num_terms > most_of_all:
            raise RequestError(f"num_terms {num_terms}: {most_of_all} already represent every matrix of this shape")
        return specs


class _TermScale(nn.Module):
    """weight[p, i, a] = s_i · unscaled[p, i, a] with learnable s (k,)."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale)

    def forward(self, unscaled: Tensor) -> Tensor:
        return unscaled * self.scale[:, None]

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / self.scale.detach()[:, None]


def divisors(number: int) -> list[int]:
    """All positive divisors, ascending.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})
