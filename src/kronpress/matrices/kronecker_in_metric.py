"""The sum of Kronecker products that is nearest in a metric tr(G ΔW C ΔWᵀ): closed forms, and an exact alternation.

Letters as in kronecker.py; here A (k, m1, n1) and B (k, m2, n2), and R(W) (m1·n1, m2·n2) is Van Loan's rearrangement,
in which A ⊗ B is vec(A) vec(B)ᵀ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kronpress.matrices.metric import Metric, separable, square_root, times
from kronpress.matrices.svd import balanced, balanced_svd, leading_eigenvectors, ridged_cholesky, thin_balanced_svd

Shape = tuple[int, int]
Sides = tuple[Tensor, Tensor]
MAX_SWEEPS = 40
# Entries of a factor up to which R(W) has so few rows, or columns, that it is not formed.
TINY = 64
# Stop when a sweep lowers the loss by less than this fraction.
TOLERANCE = 1e-3
# Weight of the old factor in each step, relative to the normal equations' mean diagonal: keeps them solvable where
# C is singular. With it the loss still cannot rise, since the old factor is as good as before.
PROXIMAL = 1e-8


def rearranged(weight: Tensor, left_shape: Shape, right_shape: Shape) -> Tensor:
    """R(W) (m1·n1, m2·n2): one row for each block of W (m, n)."""
    (m1, n1), (m2, n2) = left_shape, right_shape
    return weight.reshape(m1, m2, n1, n2).permute(0, 2, 1, 3).reshape(m1 * n1, m2 * n2)


def nearest_sum(
    weight: Tensor,
    left_shape: Shape,
    right_shape: Shape,
    num_terms: int,
    metric: Metric,
    max_sweeps: int = MAX_SWEEPS,
) -> tuple[Tensor, Tensor]:
    """A (k, m1, n1) and B (k, m2, n2) for which tr(G ΔW C ΔWᵀ) of ΔW = W − Σ A_i ⊗ B_i is least.

    G enters through its nearest G1 ⊗ G2, with which W and the factors are transformed beforehand. If C is the identity
    or B is thin (n1 = 1 or n2 = 1) the rest is a closed form; otherwise the alternation from the separable start.
    Exact for a separable G in the first cases, and a local optimum that is never worse than the start in the last.

    Args:
        weight: W (m, n) in float64.
    """
    (m1, n1), (m2, n2) = left_shape, right_shape
    undo = None
    if metric.output is not None:
        (root1, inverse1), (root2, inverse2) = map(square_root, separable(metric.output, m1, m2))
        weight = rows_times(weight, root1, root2)
        undo = inverse1, inverse2
    if metric.input is None:
        left, right = van_loan(weight, left_shape, right_shape, num_terms)
    elif n1 == 1 or n2 == 1:
        left, right = _thin(weight, left_shape, right_shape, num_terms, metric.input)
    else:
        left, right = separable_start(weight, left_shape, right_shape, num_terms, metric.input)
        left, right, _ = alternate(weight, left, right, metric.input, max_sweeps)
    if undo is not None:
        left, right = (_rows_of_each(*each) for each in zip(undo, (left, right), strict=True))
    return balanced(left, right)


def _rows_of_each(side: Tensor, factors: Tensor) -> Tensor:
    """M X_i for X (k, size, columns), with M (size, size) or the diagonal (size,) of a diagonal one."""
    return side[:, None] * factors if side.ndim == 1 else side @ factors


def screened(
    weight: Tensor, left_shape: Shape, right_shape: Shape, output: Sides | None, input: Sides | None
) -> tuple[Tensor, Tensor]:
    """The discarded energies after 1, 2, ... terms of Van Loan in a separable metric, and ‖W‖² in it.

    In tr((G1 ⊗ G2) ΔW (C1 ⊗ C2) ΔWᵀ) they are sums of the eigenvalues of K2^½ Rᵀ K1 R K2^½ with K1 = G1 ⊗ C1 and
    K2 = G2 ⊗ C2, so that only the small K2 is rooted.

    Args:
        weight: W (m, n).
        output, input: (G1, G2) and (C1, C2), each positive semi-definite; None is the identity.
    """
    small = [torch.eye(size, dtype=weight.dtype, device=weight.device) for size in right_shape]
    seen, small_roots = weight, list(small)
    for i, (sides, multiplied) in enumerate(((output, rows_times), (input, columns_times))):
        if sides is not None:
            seen = multiplied(seen, sides[0].to(seen), small[i])
            small_roots[i] = times(square_root(sides[1], floor=0)[0].to(seen), small[i])
    blocks, seen_blocks = (rearranged(each, left_shape, right_shape) for each in (weight, seen))
    gram = rows_times(columns_times(blocks.mT @ seen_blocks, *small_roots), *small_roots)
    energies = torch.linalg.eigvalsh(gram.to(torch.float64)).flip(0).clamp(min=0)
    return (energies.sum() - energies.cumsum(0)).clamp(min=0), energies.sum()


def rows_times(weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """(M1 ⊗ M2) W, with `first` M1 (m1, m1) and `second` M2 (m2, m2) or their diagonals, W (m1·m2, n)."""
    once = times(first, weight.reshape(len(first), -1)).reshape(len(first), len(second), -1)
    return _rows_of_each(second, once).reshape(weight.shape)


def columns_times(weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """W (M1 ⊗ M2), with `first` M1 (n1, n1) and `second` M2 (n2, n2) symmetric, W (m, n1·n2)."""
    size1, size2 = len(first), len(second)
    once = (weight.reshape(-1, size2) @ second).reshape(-1, size1, size2)
    # One large product: n2 is often so small that a product for each row would be slow.
    twice = once.mT.reshape(-1, size1) @ first
    return twice.reshape(-1, size2, size1).mT.reshape(weight.shape)


def van_loan(
    weight: Tensor, left_shape: Shape, right_shape: Shape, num_terms: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """A (k, m1, n1) and B (k, m2, n2), ‖A_i‖ = ‖B_i‖, with ‖W − Σ A_i ⊗ B_i‖ least; computed in float64.

    The truncated SVD of R(W) (Van Loan & Pitsianis 1993), which is not formed where one factor is tiny.

    Args:
        weight: W (m, n), of any floating-point dtype.
        dtype: of A and B.
    """
    (m1, n1), (m2, n2), k = left_shape, right_shape, num_terms
    places = weight.reshape(m1, m2, n1, n2)
    # In memory as factors are stored, (m1, k, n1) and (m2, k, n2).
    left, right = (
        weight.new_empty(rows, k, columns, dtype=dtype).transpose(0, 1) for rows, columns in ((m1, n1), (m2, n2))
    )
    if m2 * n2 <= min(TINY, m1 * n1):
        right[:] = _thin_side(places.permute(1, 3, 0, 2), left).mT.reshape(k, m2, n2)
    elif m1 * n1 <= TINY:
        left[:] = _thin_side(places.permute(0, 2, 1, 3), right).mT.reshape(k, m1, n1)
    else:
        a, b = balanced_svd(rearranged(weight, left_shape, right_shape).to(torch.float64), k)
        left[:], right[:] = a.mT.reshape(k, m1, n1), b.reshape(k, m2, n2)
    return left, right


def _thin_side(rows: Tensor, out: Tensor) -> Tensor:
    """`thin_balanced_svd` with the columns of M in the order in which memory is read."""
    if rows.stride(2) < rows.stride(3):
        return thin_balanced_svd(rows.mT, out.mT)
    return thin_balanced_svd(rows, out)


def _thin(
    weight: Tensor, left_shape: Shape, right_shape: Shape, num_terms: int, moment: Tensor
) -> tuple[Tensor, Tensor]:
    """Where one factor has all the columns: Van Loan on W C^½, whose other factor C does not touch.

    That factor is an orthonormal set, the leading eigenvectors of R(W C^½) on its side, for which C need not be rooted;
    the one with the columns follows as a projection of W itself, for which it need not be inverted.
    """
    blocks = rearranged(weight, left_shape, right_shape)
    seen_blocks = rearranged(weight @ moment, left_shape, right_shape)
    if right_shape[1] == 1:
        b = leading_eigenvectors(blocks.mT @ seen_blocks, num_terms)  # (m2, k)
        return (blocks @ b).mT.reshape(num_terms, *left_shape), b.mT.reshape(num_terms, *right_shape)
    a = leading_eigenvectors(blocks @ seen_blocks.mT, num_terms)  # (m1, k)
    return a.mT.reshape(num_terms, *left_shape), (a.mT @ blocks).reshape(num_terms, *right_shape)


def separable_start(
    weight: Tensor, left_shape: Shape, right_shape: Shape, num_terms: int, moment: Tensor
) -> tuple[Tensor, Tensor]:
    """The optimum for the nearest C1 ⊗ C2 to C: Van Loan on W (C1^½ ⊗ C2^½), undone; exact if C is separable."""
    (root1, inverse1), (root2, inverse2) = map(square_root, separable(moment, left_shape[1], right_shape[1]))
    left, right = van_loan(columns_times(weight, root1, root2), left_shape, right_shape, num_terms)
    return left @ inverse1, right @ inverse2


def alternate(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    moment: Tensor,
    max_sweeps: int = MAX_SWEEPS,
    tolerance: float = TOLERANCE,
) -> tuple[Tensor, Tensor, list[float]]:
    """Alternating least squares on tr(ΔW C ΔWᵀ): all A at once with B fixed, then all B, each step exact.

    With C[a,b;c,d] (n1, n2, n1, n2) and V = R(W C), all A solve
    Σ_jc A_j[p,c] H[(j,c),(i,a)] = Σ_qb V[(p,a),(q,b)] B_i[q,b], with H[(i,a),(j,c)] = Σ_bd (B_iᵀ B_j)[b,d] C[a,b;c,d],
    and all B the mirrored equations.

    Returns:
        A, B, and the loss at the start and after every sweep, which never rises.
    """
    (_, m1, n1), (_, m2, n2) = left.shape, right.shape
    seen = weight @ moment
    energy = (weight * seen).sum()
    seen_blocks = rearranged(seen, (m1, n1), (m2, n2))
    moment_blocks = moment.reshape(n1, n2, n1, n2).permute(1, 3, 0, 2).reshape(n2 * n2, n1 * n1)  # (b d, a c)

    start = torch.einsum("ipa,iqb->pqab", left, right).reshape(weight.shape)
    losses = [Metric(moment).squared_norm(weight - start)]
    for _ in range(max_sweeps):
        new_left = _solved(*_normal_equations(right, moment_blocks, seen_blocks, left.shape), left)
        gram, target = _normal_equations(new_left, moment_blocks.mT, seen_blocks.mT, right.shape)
        new_right = _solved(gram, target, right)
        flat = _flat(new_right)
        loss = (energy + ((flat @ gram - 2 * target) * flat).sum()).item()
        if not loss < losses[-1]:  # rounding, or an optimum
            break
        left, right = balanced(new_left, new_right)
        losses.append(loss)
        if losses[-2] - loss <= tolerance * losses[-2]:
            break
    return left, right, losses


def _normal_equations(
    other: Tensor, moment_blocks: Tensor, seen_blocks: Tensor, shape: torch.Size
) -> tuple[Tensor, Tensor]:
    """H (k·n1, k·n1) and T (m1, k·n1) of ⟨X H, X⟩ − 2⟨X, T⟩, the loss as a function of all A for given B.

    Args:
        other: B (k, m2, n2).
        moment_blocks: C with rows (b, d) and columns (a, c); transposed to solve for B with A given, as R(W C) is.
        seen_blocks: R(W C) (m1·n1, m2·n2).
        shape: (k, m1, n1).
    """
    k, rows, columns = shape
    products = torch.einsum("iqb,jqd->ijbd", other, other).reshape(k * k, -1)
    gram = (products @ moment_blocks).reshape(k, k, columns, columns).transpose(1, 2).reshape(k * columns, -1)
    target = (seen_blocks @ other.flatten(1).mT).reshape(rows, columns, k).mT.reshape(rows, -1)
    return gram, target


def _flat(factors: Tensor) -> Tensor:
    """(k, rows, columns) as (rows, k·columns)."""
    return factors.transpose(0, 1).flatten(1)


def _solved(gram: Tensor, target: Tensor, old: Tensor) -> Tensor:
    """The minimiser X of ⟨X H, X⟩ − 2⟨X, T⟩, drawn to the old one; both (k, rows, columns)."""
    k, rows, columns = old.shape
    factor, weight_of_old = ridged_cholesky(gram, PROXIMAL)
    new = torch.cholesky_solve((target + weight_of_old * _flat(old)).mT, factor).mT
    return new.reshape(rows, k, columns).transpose(0, 1)
