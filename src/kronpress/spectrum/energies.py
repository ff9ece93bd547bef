"""The structures that a spectrum compares, and the energy that each captures with 1, 2, ... terms.

Letters: W (m, n), and sums of k terms A_i ⊗ B_i with A_i (m1, n1), B_i (m2, n2), m = m1·m2, n = n1·n2; R(W)
(m1·n1, m2·n2) is Van Loan's rearrangement; C = E[x xᵀ] (n, n) of the layer's inputs x. Low rank is the sum whose B are
rows as wide as W: A (m, 1) ⊗ B (1, n).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt, prod
from typing import Any

import torch
from torch import Tensor

from kronpress.matrices import STRUCTURES, StructuredMatrix
from kronpress.matrices.kronecker_in_metric import rearranged
from kronpress.matrices.metric import Metric, separable, square_root

Shape = tuple[int, int]

# Shapes of B that are looked at where they divide, beside the balanced one.
RIGHT_SHAPES: tuple[Shape, ...] = ((1, 2), (2, 1), (2, 2), (4, 4), (4, 16), (16, 4))
# One term with B 1×2 keeps half of the entries and two more: a structure may exceed the share by this fraction of it.
EXCESS = 0.01
# Relative to the normal equations' mean diagonal. It keeps them solvable where C is singular, and what they give is
# then too low, never too high.
RIDGE = 1e-8


@dataclass(frozen=True)
class Form:
    """A structure for W (m, n) with every size chosen but the number of terms; rank is that of low rank."""

    structure: str
    left_shape: Shape
    right_shape: Shape

    @property
    def matrix_class(self) -> type[StructuredMatrix]:
        return STRUCTURES[self.structure]

    @property
    def shape(self) -> Shape:
        return self.left_shape[0] * self.right_shape[0], self.left_shape[1] * self.right_shape[1]

    @property
    def most_terms(self) -> int:
        """With which every matrix of the shape is represented."""
        return min(prod(self.left_shape), prod(self.right_shape))

    @property
    def params_per_term(self) -> int:
        return prod(self.left_shape) + prod(self.right_shape)

    @property
    def is_closed(self) -> bool:
        """Whether all columns are in one factor: then C acts on that factor alone, and the fit is a closed form."""
        return 1 in (self.left_shape[1], self.right_shape[1])

    def spec(self, num_terms: int) -> Any:
        if self.structure == "low_rank":
            return self.matrix_class.Spec.model_validate({"rank": num_terms})
        sizes = {"left_shape": self.left_shape, "right_shape": self.right_shape, "num_terms": num_terms}
        return self.matrix_class.Spec.model_validate(sizes)

    def terms_at(self, share: float) -> int:
        """The number of terms whose parameters are nearest to `share` of the entries, at most EXCESS above it."""
        goal = share * prod(self.shape)
        terms = round(goal / self.params_per_term)
        if terms * self.params_per_term > (1 + EXCESS) * goal:
            terms -= 1
        return min(terms, self.most_terms)


def forms(out_features: int, in_features: int) -> list[Form]:
    """Low rank, Kronecker sums with each of RIGHT_SHAPES that divides (out_features, in_features), and the balanced.

    >>> [form.right_shape for form in forms(6, 8)]
    [(1, 8), (1, 2), (2, 1), (2, 2), (2, 4)]
    """
    m, n = out_features, in_features
    low_rank = Form("low_rank", (m, 1), (1, n))
    same_as_low_rank_or_dense = [(1, 1), (m, n), (1, n), (m, 1)]
    shapes = [
        (m2, n2)
        for m2, n2 in dict.fromkeys([*RIGHT_SHAPES, balanced_shape(m, n)])
        if m % m2 == 0 and n % n2 == 0 and (m2, n2) not in same_as_low_rank_or_dense
    ]
    return [low_rank, *(Form("kronecker", (m // m2, n // n2), (m2, n2)) for m2, n2 in shapes)]


def balanced_shape(out_features: int, in_features: int) -> Shape:
    """The shape of B with about as many entries as A: its rows from below, its columns from above the square root.

    >>> balanced_shape(3072, 768)
    (48, 32)
    """
    below = [max(d for d in range(1, isqrt(size) + 1) if size % d == 0) for size in (out_features, in_features)]
    return below[0], in_features // below[1]


# ---- energies ----


def captured_energies(weight: Tensor, form: Form) -> Tensor:
    """The fractions of ‖W‖² in the best 1, 2, ..., k terms: cumulated squared singular values of R(W).

    They are the eigenvalues of the Gram matrix of R(W)'s shorter side, so that one spectrum gives the energy for every
    number of terms (Van Loan & Pitsianis 1993; for low rank Eckart & Young 1936).

    Args:
        weight: W (out_features, in_features) in float64.

    Returns:
        (most_terms,), ascending to 1; all 1 for W = 0.
    """
    blocks = rearranged(weight, form.left_shape, form.right_shape)
    gram = blocks.mT @ blocks if blocks.shape[0] > blocks.shape[1] else blocks @ blocks.mT
    captured = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).cumsum(0)
    return captured / captured[-1] if captured[-1] > 0 else torch.ones_like(captured)


def bounded_output_energies(weight: Tensor, form: Form, moment: Tensor, num_terms: int) -> Tensor:
    """The fractions of tr(W C Wᵀ) that sums of 1, 2, ..., `num_terms` terms capture at least.

    The B_i are those of the optimum for the nearest C1 ⊗ C2 to C, and all A_i are the best for these B_i and C itself:
    with H[(i,a),(j,c)] = Σ_bd (B_iᵀ B_j)[b,d] C[a,b;c,d] = L Lᵀ and T[(i,a),p] = Σ_qb R(W C)[(p,a),(q,b)] B_i[q,b], the
    captured energy is ‖L⁻¹ T‖². The factor of the first terms' equations is the leading part of L: one
    factorisation gives all numbers of terms. Fewer terms are some of more, so that the fractions ascend.

    Args:
        weight: W (out_features, in_features) in float64.
        moment: C (in_features, in_features).

    Returns:
        (num_terms,).
    """
    (m1, n1), (m2, n2) = form.left_shape, form.right_shape
    energy = Metric(moment).squared_norm(weight)
    if energy == 0:
        return weight.new_ones(num_terms)
    (root1, _), (root2, inverse2) = map(square_root, separable(moment, n1, n2))
    seen = torch.einsum("mab,ac,bd->mcd", weight.reshape(-1, n1, n2), root1, root2).reshape(weight.shape)
    leading = torch.linalg.svd(rearranged(seen, (m1, n1), (m2, n2)), full_matrices=False).Vh[:num_terms]
    right = leading.reshape(num_terms, m2, n2) @ inverse2

    gram = torch.einsum("iqb,jqd->ijbd", right, right)
    gram = torch.einsum("ijbd,abcd->iajc", gram, moment.reshape(n1, n2, n1, n2)).reshape(num_terms * n1, -1)
    target = rearranged(weight @ moment, (m1, n1), (m2, n2)) @ right.flatten(1).mT  # (p a, i)
    target = target.reshape(m1, n1, num_terms).permute(2, 1, 0).reshape(-1, m1)  # (i a, p)
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    solved = torch.linalg.solve_triangular(torch.linalg.cholesky(gram), target, upper=False)
    return solved.reshape(num_terms, -1).square().sum(1).cumsum(0) / energy


def fitted_output_energy(weight: Tensor, form: Form, num_terms: int, metric: Metric) -> float:
    """The fraction of tr(W C Wᵀ) that the structure's own fit to the inputs captures."""
    fitted = form.matrix_class.expand(form.matrix_class.fit(weight, form.spec(num_terms), metric))
    energy = metric.squared_norm(weight)
    return 1 - metric.squared_norm(weight - fitted) / energy if energy > 0 else 1.0
