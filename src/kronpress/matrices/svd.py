"""The decompositions that fits rest on: truncated singular values, leading eigenvectors, and Cholesky with a ridge."""

from __future__ import annotations

import numpy as np
import torch
from scipy.linalg.blas import dsyrk
from scipy.sparse.linalg import ArpackError, eigsh
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
    v = leading_eigenvectors(gram(matrix), rank)  # (columns, rank)
    scaled_u = matrix @ v  # U S
    root = torch.linalg.vector_norm(scaled_u, dim=0).sqrt()  # S^½
    return scaled_u / root.clamp(min=torch.finfo(matrix.dtype).tiny), root[:, None] * v.mT


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The terms left[i], right[i] of a sum of products, (terms, ...) each, with ‖left[i]‖ = ‖right[i]‖."""
    left_sizes, right_sizes = (torch.linalg.vector_norm(each.flatten(1), dim=1) for each in (left, right))
    ratio = torch.where((left_sizes > 0) & (right_sizes > 0), right_sizes / left_sizes, 1.0).sqrt()
    return left * ratio.view(-1, *[1] * (left.ndim - 1)), right / ratio.view(-1, *[1] * (right.ndim - 1))


def gram(matrix: Tensor) -> Tensor:
    """Mᵀ M (columns, columns); where BLAS has a routine for it, at half the work of a product."""
    if matrix.dtype != torch.float64 or matrix.device.type != "cpu":
        return matrix.mT @ matrix
    upper = torch.from_numpy(dsyrk(1.0, matrix.detach().contiguous().numpy().T))
    return upper + upper.triu(1).mT


def ridged_cholesky(matrix: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """L with L Lᵀ = M + λ I for a positive semi-definite M (size, size), which may be singular, and λ.

    λ is `ridge` times the mean of M's diagonal, or as many times ten of that as rounding asks for.
    """
    added = ridge * matrix.diagonal().mean().clamp(min=torch.finfo(matrix.dtype).tiny)
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    while True:
        factor, failed = torch.linalg.cholesky_ex(matrix + added * identity)
        if not failed:
            return factor, added
        added = 10 * added


def leading_eigenvectors(gram: Tensor, rank: int) -> Tensor:
    """The eigenvectors (size, rank) of the largest eigenvalues of a symmetric (size, size) matrix, largest first."""
    size = len(gram)
    # Lanczos, to machine precision and from a fixed start, where a few vectors of many are wanted: far less
    # work than all of them.
    if size > 256 and rank <= size // 32:
        try:
            _, vectors = eigsh(gram.cpu().numpy(), k=rank, v0=np.ones(size), tol=0, rng=0)
            return torch.from_numpy(vectors).flip(-1).to(gram)
        except ArpackError:  # no convergence, or a zero matrix
            pass
    _, vectors = torch.linalg.eigh(gram)  # ascending
    return vectors[:, -rank:].flip(-1)
