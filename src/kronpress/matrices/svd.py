"""The truncated singular value decomposition that every closed-form fit rests on."""

from __future__ import annotations

import torch
from torch import Tensor


def balanced_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """L (rows, rank) and R (rank, columns) with L @ R nearest to `matrix` in Frobenius norm, and Lᵀ L = R Rᵀ.

    With M = U S Vᵀ, L = U_r S_r^½ and R = S_r^½ V_rᵀ, so that ‖M − L R‖² is the sum of the discarded squared
    singular values (Eckart & Young 1936). V comes from the eigenvectors of the Gram matrix of the shorter
    side: the error of an eigenvector enters ‖M − M V Vᵀ‖² only squared, and a tall thin M (millions of rows,
    a few columns) costs one pass over it.

    >>> left, right = balanced_svd(torch.ones(3, 2, dtype=torch.float64), rank=1)
    >>> torch.testing.assert_close(left @ right, torch.ones(3, 2, dtype=torch.float64))
    """
    rows, columns = matrix.shape
    if rows < columns:
        right, left = balanced_svd(matrix.mT, rank)
        return left.mT, right.mT
    _, eigenvectors = torch.linalg.eigh(matrix.mT @ matrix)  # ascending
    v = eigenvectors[:, -rank:].flip(-1)  # (columns, rank)
    scaled_u = matrix @ v  # U S
    root = torch.linalg.vector_norm(scaled_u, dim=0).sqrt()  # S^½
    return scaled_u / root.clamp(min=torch.finfo(matrix.dtype).tiny), root[:, None] * v.mT
