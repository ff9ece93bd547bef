"""Kronecker sums by the textbook: explicit block loops, numpy's SVD and torch.kron."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Shape = tuple[int, int]


def kronecker_sum(factors: Mapping[str, Tensor]) -> Tensor:
    """Σ_i A_i ⊗ B_i of factors `weight` (m1, k, n1) and `right` (m2, k, n2)."""
    # torch.kron refuses some strides of sides of size one, which only a copy makes regular.
    left, right = (
        factors[name].movedim(1, 0).clone(memory_format=torch.contiguous_format) for name in ("weight", "right")
    )
    return torch.stack([torch.kron(a, b) for a, b in zip(left, right, strict=True)]).sum(0)


def rearranged(weight: Tensor, left_shape: Shape, right_shape: Shape) -> NDArray[np.float64]:
    """Van Loan's R (m1·n1, m2·n2): block (p, a) of `weight`, of size m2×n2, flattened, is row p·n1 + a."""
    (m1, n1), (m2, n2) = left_shape, right_shape
    w = weight.double().numpy()
    rows = []
    for p in range(m1):
        for a in range(n1):
            block = w[p * m2 : (p + 1) * m2, a * n2 : (a + 1) * n2]
            rows.append([block[q, b] for q in range(m2) for b in range(n2)])
    return np.array(rows)


def discarded_energy(matrix: NDArray[np.float64], rank: int) -> float:
    """The sum of the squared singular values after the first `rank`."""
    return float((np.linalg.svd(matrix, compute_uv=False)[rank:] ** 2).sum())


def van_loan_squared_error(weight: Tensor, left_shape: Shape, right_shape: Shape, num_terms: int) -> float:
    """min ‖W − Σ A_i ⊗ B_i‖² over all sums of `num_terms` terms of these shapes."""
    return discarded_energy(rearranged(weight, left_shape, right_shape), num_terms)


def multiply_adds(left_shape: Shape, right_shape: Shape, num_terms: int) -> tuple[int, int]:
    """Multiply-adds for one token with B contracted first, and with A first."""
    (m1, n1), (m2, n2) = left_shape, right_shape
    right_first = n1 * (m2 * n2) + m2 * (m1 * n1)
    left_first = n2 * (m1 * n1) + m1 * (m2 * n2)
    return num_terms * right_first, num_terms * left_first
