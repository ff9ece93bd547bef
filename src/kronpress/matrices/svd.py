"""The decompositions that fits rest on: truncated singular values, leading eigenvectors, and Cholesky with a ridge."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from scipy.linalg.blas import dsyrk
from torch import Tensor

# Of fewer directions all are computed.
MANY = 256
# The most directions that are worth a Lanczos by products with the matrix; its Gram matrix is better for more.
FEW = 8
# The fraction of all dimensions at which that Lanczos gives up.
LANCZOS_MOST = 1 / 2
# What a fit may lose to it, as a fraction of the energy that is discarded anyway.
ENERGY_TOLERANCE = 1e-11
# Of residuals, in units in the last place of the largest eigenvalue.
ROUNDING = 50
# Of the largest energy: of less than that, what a Gram matrix says is rounding at the tenth digit.
UNCERTAIN = 1e-6
# Numbers that are rearranged at once: they stay in a core's cache while they are used.
CHUNK_NUMEL = 2**18


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
    v = _leading_by_products(matrix, rank)
    if v is None:
        v = leading_eigenvectors(gram(matrix), rank)  # (columns, rank)
    scaled_u = matrix @ v  # U S
    root = torch.linalg.vector_norm(scaled_u, dim=0).sqrt()  # S^½
    return scaled_u / root.clamp(min=torch.finfo(matrix.dtype).tiny), root[:, None] * v.mT


def thin_balanced_svd(rows: Tensor, out: Tensor) -> Tensor:
    """L of `balanced_svd` of a wide M given as a strided view; R is written to `out`. No copy makes a matrix of M.

    Its rows and its columns have two dimensions each. The Gram matrix of the few rows, and then R, are made of pieces
    of columns that are rearranged and cast to float64 within the cache.

    Args:
        rows: M (r1, r2, c1, c2), of any strides and floating-point dtype, with few rows r1·r2.
        out: (rank, c1, c2), of any strides and floating-point dtype.

    Returns:
        L (r1·r2, rank) in float64.
    """
    size = rows.shape[0] * rows.shape[1]
    gram = rows.new_zeros(size, size, dtype=torch.float64)
    for _, piece in _pieces(rows):
        gram.addmm_(piece, piece.mT)
    u = leading_eigenvectors(gram, len(out))
    energies = (u * (gram @ u)).sum(0)  # S²
    if energies.min() < UNCERTAIN * energies.max():
        energies = torch.stack([(u.mT @ piece).square().sum(1) for _, piece in _pieces(rows)]).sum(0)
    to_right = torch.where(energies > 0, energies**-0.25, 0.0)[:, None] * u.mT  # S^-½ Uᵀ
    for place, piece in _pieces(rows):
        out[:, place] = (to_right @ piece).view(len(out), -1, out.shape[2])
    return u * energies**0.25


def _pieces(rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """M (r1, r2, c1, c2) in pieces along c1: where each is, and its columns (r1·r2, …) in float64, until the next."""
    r1, r2, c1, c2 = rows.shape
    step = min(c1, max(1, CHUNK_NUMEL // (r1 * r2 * c2)))
    buffer = rows.new_empty(r1 * r2 * step * c2, dtype=torch.float64)
    for start in range(0, c1, step):
        part = rows[:, :, start : start + step]
        piece = buffer[: part.numel()].view(part.shape)
        yield slice(start, start + step), piece.copy_(part).view(r1 * r2, -1)


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
    """The eigenvectors (size, rank) of the largest eigenvalues of a symmetric (size, size) matrix, largest first.

    A few of many are found by Lanczos, at far less work than all of them; for them it has to be positive semi-definite.
    """
    size = len(gram)
    if size > MANY and rank <= size // 64:
        found = lanczos(lambda x: x @ gram, gram.trace().item(), _start(gram, rank), rank)
        if found is not None:
            return found[:rank].mT
    _, vectors = torch.linalg.eigh(gram)  # ascending
    return vectors[:, -rank:].flip(-1)


def _start(like: Tensor, rank: int) -> Tensor:
    """The same random rows (rank + 2, columns) every time: two more, so that the last is not told from the next."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rank + 2, like.shape[1], generator=generator, dtype=torch.float64).to(like)


def _leading_by_products(matrix: Tensor, rank: int) -> Tensor | None:
    """The leading right singular vectors (columns, rank) of a tall matrix, where Lanczos finds them at less work.

    The Gram matrix, which costs more than all products, is not formed. First in single precision and up to its
    rounding, at half the traffic; from there in the matrix's own, which certifies them.
    """
    if matrix.shape[1] <= MANY or rank > FEW:
        return None
    size = torch.linalg.vector_norm(matrix)
    single = (matrix / size.clamp(min=torch.finfo(matrix.dtype).tiny)).to(torch.float32)
    rough = lanczos(lambda x: (x @ single.mT) @ single, 1.0, _start(single, rank), rank)
    if rough is None:
        return None
    found = lanczos(lambda x: (x @ matrix.mT) @ matrix, size.square().item(), rough.to(matrix), rank)
    return None if found is None else found[:rank].mT


def lanczos(product: Callable[[Tensor], Tensor], energy: float, start: Tensor, rank: int) -> Tensor | None:
    """The leading eigenvectors (block, size) of a positive semi-definite G; None if the first `rank` do not converge.

    Block Lanczos with full reorthogonalisation and Rayleigh-Ritz (Golub & Van Loan, Matrix Computations, section 10.3).
    With residuals r_i, Ritz values θ_i, and no further eigenvalue above μ, the `rank` largest eigenvalues are together
    at most Σ ‖r_i‖ larger than Σ θ_i, and at most Σ ‖r_i‖² / (θ_rank − μ). It ends when either is within
    ENERGY_TOLERANCE of the energy that is left anyway, or is rounding.

    Args:
        product: X (block, size) to X G.
        energy: the trace of G.
        start: (block, size) with block > rank, in general position: all but sure to miss no leading direction, also
            where up to `block` of them have one eigenvalue.
    """
    block, size = start.shape
    most = int(LANCZOS_MOST * size) // block * block
    unit = ROUNDING * torch.finfo(start.dtype).eps
    basis = start.new_empty(most, size)
    projected = start.new_zeros(most, most)  # G on the basis, below the diagonal
    rows, _ = _orthonormal(start)
    next_check = 0
    for done in range(0, most, block):
        end = done + block
        basis[done:end] = rows
        known = basis[:end]
        image = product(rows)
        parts = image @ known.mT
        rows, coupling = _orthonormal(image - parts @ known)
        # Again: what is left of the image may be little more than rounding, which is not orthogonal to what is known.
        again = rows @ known.mT
        rows, rest = _orthonormal(rows - again @ known)
        projected[done:end, :end] = parts + coupling @ again
        if end >= next_check:
            next_check = end + end // 8
            values, vectors = torch.linalg.eigh(projected[:end, :end].to(torch.float64))  # ascending
            values, vectors = values.flip(0), vectors.flip(1)
            residuals = torch.linalg.vector_norm((coupling @ rest).mT.to(vectors) @ vectors[-block:], dim=0)
            left = ENERGY_TOLERANCE * max(0.0, energy - values[:rank].sum().item())
            gap = (values[rank - 1] - values[rank] - residuals[rank]).item()
            rounding = unit * values[0].item()
            error, squared_error = (residuals[:rank].pow(power).sum().item() for power in (1, 2))
            if error <= left + rounding or squared_error <= gap * left + rounding**2:
                return vectors[:, :block].mT.to(start) @ known
    return None


def _orthonormal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal Q (rows, size) and C (rows, rows) with C Q equal to `rows`, which may be dependent."""
    q, r = torch.linalg.qr(rows.mT)
    return q.mT, r.mT
