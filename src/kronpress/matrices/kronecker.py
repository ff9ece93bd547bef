"""Sums of Kronecker products, W = Σ_i A_i ⊗ B_i.

Letters: W (m, n); A_i (m1, n1) with row p and column a; B_i (m2, n2) with row q and column b; m = m1·m2,
n = n1·n2; k terms counted by i; t tokens. (A ⊗ B)[p·m2 + q, a·n2 + b] = A[p, a] · B[q, b].
"""

from __future__ import annotations

from itertools import product
from math import prod
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from kronpress import native
from kronpress.errors import RequestError
from kronpress.matrices.kronecker_in_metric import nearest_sum, screened, van_loan
from kronpress.matrices.metric import FitMoments, Metric, as_metric, separable
from kronpress.matrices.structured_matrix import Factors, Options, Spec, StructuredMatrix

# What `screen` looks at; larger B cost much to look at and come out like low rank.
SCREENED_SIDES = (1, 2, 3, 4, 6, 8, 12, 16)
MOST_TERMS = 32
OPTIMISM = 0.7
# So many products of numbers are still cheaper pointwise than as a product of matrices.
MOST_POINTWISE = 4


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

    @classmethod
    def linear_dims(cls, out_features: int, in_features: int, spec: KroneckerSpec) -> dict[str, tuple[int, int]]:
        return {"weight": (0, 2), "right": (0, 2)}

    @staticmethod
    def multiply(factors: Factors, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x Wᵀ + bias in the order with fewer multiply-adds; the large factor is one GEMM for all terms.

        With a small A the entries that it mixes are far apart in x, and no step copies. With a small B they are
        neighbours: that layout costs a transposing copy where B has more than one row and one column.
        """
        left, right = factors["weight"], factors["right"]
        (m1, _, n1), (m2, _, n2) = left.shape, right.shape
        # Multiply-adds per term and token.
        is_left_first = m1 * n1 * n2 + m1 * n2 * m2 < n1 * n2 * m2 + m1 * n1 * m2
        is_left_small = m1 * n1 <= m2 * n2
        if is_left_small:
            multiplied = _small_left_first if is_left_first else _large_right_first
        else:
            multiplied = _large_left_first if is_left_first else _small_right_first
        y = multiplied(left, right, x.reshape(-1, n1, n2), bias)
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
    def dense(cls, factors: Factors) -> Tensor:
        """The sum over the terms is one product of matrices; its blocks are then put in their places."""
        left, right = factors["weight"], factors["right"]
        (m1, k, n1), (m2, _, n2) = left.shape, right.shape
        blocks = left.mT.reshape(m1 * n1, k) @ right.transpose(0, 1).reshape(k, m2 * n2)  # (p a, q b)
        return blocks.reshape(m1, n1, m2, n2).transpose(1, 2).reshape(m1 * m2, n1 * n2).contiguous()

    @staticmethod
    def takes_native(factors: Factors, x: Tensor, bias: Tensor | None = None) -> bool:
        left, right = factors["weight"], factors["right"]
        return native.takes(x, left, right, *([] if bias is None else [bias])) and native.pays(left, right, x)

    @staticmethod
    def multiply_native(factors: Factors, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return native.kronecker(factors["weight"], factors["right"], x, bias)

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
        if options.start == "prune":
            left = weight[::m2, None, ::n2]
            small = 0.1 if options.prune_small_factor is None else options.prune_small_factor
            right = weight.new_tensor([1.0, small]).reshape(m2, 1, n2)
        else:
            if metric is None:
                is_scaled = options.start == "adaptive"  # before it is rounded
                a, b = van_loan(weight, (m1, n1), (m2, n2), k, torch.float64 if is_scaled else weight.dtype)
            else:
                a, b = nearest_sum(weight.to(torch.float64), (m1, n1), (m2, n2), k, metric.where_it_sees)
            if options.start == "adaptive":
                # The terms are orthogonal, each as large as the square of its half in A.
                captured = torch.linalg.vector_norm(a.square().sum((1, 2)))
                norm = torch.linalg.vector_norm(weight, dtype=torch.float64)
                a = a * (norm / captured if captured > 0 else 1)
            left, right = a.transpose(0, 1), b.transpose(0, 1)
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


def _small_left_first(left: Tensor, right: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """Z[t, p, i, b] = Σ_a A_i[p, a] x[t, a, b], then y[t, p, q] = Σ_ib B_i[q, b] Z[t, p, i, b]: no copies."""
    (m1, k, n1), (m2, _, n2) = left.shape, right.shape
    z = mixed(left.reshape(m1 * k, n1), x).reshape(-1, k * n2)  # (t p, i b)
    if m1 == 1:
        return F.linear(z, right.reshape(m2, k * n2), bias)
    return _plus(F.linear(z, right.reshape(m2, k * n2)).reshape(-1, m1 * m2), bias)


def _large_right_first(left: Tensor, right: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """U[t, a, q, i] = Σ_b B_i[q, b] x[t, a, b], then y[t, p, q] = Σ_ia A_i[p, a] U[t, a, q, i]: copies if k > 1."""
    (m1, k, n1), (m2, _, n2) = left.shape, right.shape
    u = F.linear(x.reshape(-1, n2), right.reshape(m2 * k, n2)).reshape(-1, n1, m2, k)
    u = u.permute(0, 3, 1, 2).reshape(-1, k * n1, m2)
    return mixed(left.reshape(m1, k * n1), u, None if bias is None else bias.reshape(m1, m2))


def _small_right_first(left: Tensor, right: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """Z[t, q, i, a] = Σ_b B_i[q, b] x[t, a, b], then y[t, p, q] = Σ_ia A_i[p, a] Z[t, q, i, a]."""
    (m1, k, n1), (m2, _, n2) = left.shape, right.shape
    if m2 * k == 1:
        z = F.linear(x.reshape(-1, n2), right.reshape(1, n2))
    else:
        z = batched(right.reshape(m2 * k, n2).expand(x.shape[0], m2 * k, n2), x.mT)
    z = z.reshape(-1, k * n1)  # (t q, i a)
    if m2 == 1:
        return F.linear(z, left.reshape(m1, k * n1), bias)
    y = F.linear(z, left.reshape(m1, k * n1)).reshape(-1, m2, m1)
    return _plus(y.mT.reshape(-1, m1 * m2), bias)


def _large_left_first(left: Tensor, right: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """U[t, b, p, i] = Σ_a A_i[p, a] x[t, a, b], then y[t, p, q] = Σ_ib B_i[q, b] U[t, b, p, i]."""
    (m1, k, n1), (m2, _, n2) = left.shape, right.shape
    u = F.linear(x.mT.reshape(-1, n1), left.reshape(m1 * k, n1)).reshape(-1, n2, m1, k)
    if k * n2 == 1 and _is_better_pointwise(u, x.element_size() > 2):
        y = u.reshape(-1, m1, 1) * right.reshape(m2)
    elif k == 1 and (n2 > 1 or torch.is_grad_enabled()):  # a product of one column is slow backward
        bias = None if bias is None else bias.reshape(m1, m2)
        y = batched(u.reshape(-1, n2, m1).mT, right.reshape(m2, n2).mT.expand(x.shape[0], n2, m2), bias)  # (t, p, q)
        return y.reshape(-1, m1 * m2)
    else:
        y = F.linear(u.permute(0, 2, 3, 1).reshape(-1, k * n2), right.reshape(m2, k * n2))  # (t p, q)
    return _plus(y.reshape(-1, m1 * m2), bias)


def mixed(small: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The sum y[t, p] = Σ_a small[p, a] x[t, a] + bias[p] for rows x[t, a] (n,): (t, a, n) to (t, p, n)."""
    if small.shape[1] > MOST_POINTWISE or not _is_better_pointwise(x, x.element_size() == 2):
        return batched(small.expand(x.shape[0], *small.shape), x, bias)
    columns = small.mT[:, :, None].unbind()  # (p, 1) each
    first, *others = [(x[:, None, a], column) for a, column in enumerate(columns)]  # x (t, 1, n)
    y = first[0] * first[1] if bias is None else torch.addcmul(bias, *first)
    for term, column in others:
        y = torch.addcmul(y, term, column)
    return y


def batched(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """left[t] @ right[t] + bias; `torch.matmul` would copy one of them into the layout of a single product."""
    return torch.bmm(left, right) if bias is None else torch.baddbmm(bias, left, right)


def _is_better_pointwise(x: Tensor, on_cpu: bool) -> bool:
    """Whether products with a few numbers are to be pointwise operations rather than a product of matrices.

    They are fused with their neighbours when compiled. On a CPU either may be faster; with gradients matrices are,
    since the gradient of a number is a sum over all tokens. Those on meta are there to be counted.
    """
    if torch.is_grad_enabled() or x.is_meta:
        return False
    return torch.compiler.is_compiling() or x.device.type != "cpu" or on_cpu


def _plus(y: Tensor, bias: Tensor | None) -> Tensor:
    """y + bias, in the place of the new tensor y."""
    return y if bias is None else y.add_(bias)


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


def check_divides(name: str, blocks: int, side: str, size: int) -> None:
    """RequestError if one side of a matrix cannot be cut into so many `blocks`, with the numbers that can be."""
    if size % blocks:
        allowed = ", ".join(map(str, divisors(size)))
        raise RequestError(f"{name} {blocks} does not divide {side} {size}; its divisors are {allowed}")
