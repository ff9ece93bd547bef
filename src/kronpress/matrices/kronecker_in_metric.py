"""The sum of Kronecker products that is nearest in a metric tr(G ΔW C ΔWᵀ): closed forms, and an exact alternation.

Letters as in kronecker.py; here A (k, m1, n1) and B (k, m2, n2), and R(W) (m1·n1, m2·n2) is Van Loan's rearrangement,
in which A ⊗ B is vec(A) vec(B)ᵀ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kronpress.matrices.metric import Metric, separable, square_root
from kronpress.matrices.svd import balanced_svd

Shape = tuple[int, int]
MAX_SWEEPS = 40
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
    weight: Tensor, left_shape: Shape, right_shape: Shape, num_terms: int, metric: Metric
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
        weight = torch.einsum("px,qy,xyn->pqn", root1, root2, weight.reshape(m1, m2, -1)).reshape(weight.shape)
        undo = inverse1, inverse2
    if metric.input is None:
        left, right = _van_loan(weight, left_shape, right_shape, num_terms)
    elif n1 == 1 or n2 == 1:
        left, right = _thin(weight, left_shape, right_shape, num_terms, metric.input)
    else:
        left, right = separable_start(weight, left_shape, right_shape, num_terms, metric.input)
        left, right, _ = alternate(weight, left, right, metric.input)
    if undo is not None:
        left, right = undo[0] @ left, undo[1] @ right
    return balanced(left, right)


def screened(weight: Tensor, left_shape: Shape, right_shape: Shape, metric: Metric) -> tuple[list[float], Tensor]:
    """The discarded energies after 1, 2, ... terms of Van Loan in the nearest separable metric, and ‖W‖² in it.

    One singular value decomposition gives the errors for every number of terms, in a metric that is only near.
    """
    (m1, n1), (m2, n2) = left_shape, right_shape
    seen = weight
    if metric.output is not None:
        root1, root2 = (square_root(side)[0] for side in separable(metric.output, m1, m2))
        seen = torch.einsum("px,qy,xyn->pqn", root1, root2, seen.reshape(m1, m2, -1)).reshape(weight.shape)
    if metric.input is not None:
        root1, root2 = (square_root(side)[0] for side in separable(metric.input, n1, n2))
        seen = torch.einsum("mab,ac,bd->mcd", seen.reshape(-1, n1, n2), root1, root2).reshape(weight.shape)
    blocks = rearranged(seen, left_shape, right_shape)
    gram = blocks.mT @ blocks if blocks.shape[0] > blocks.shape[1] else blocks @ blocks.mT
    energies = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
    return (energies.sum() - energies.cumsum(0)).clamp(min=0).tolist(), energies.sum()


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same terms with ‖A_i‖ = ‖B_i‖."""
    sizes = torch.linalg.vector_norm(left, dim=(1, 2)), torch.linalg.vector_norm(right, dim=(1, 2))
    ratio = torch.where((sizes[0] > 0) & (sizes[1] > 0), sizes[1] / sizes[0], 1.0).sqrt()[:, None, None]
    return left * ratio, right / ratio


def _van_loan(weight: Tensor, left_shape: Shape, right_shape: Shape, num_terms: int) -> tuple[Tensor, Tensor]:
    a, b = balanced_svd(rearranged(weight, left_shape, right_shape), num_terms)
    return a.mT.reshape(num_terms, *left_shape), b.reshape(num_terms, *right_shape)


def _thin(
    weight: Tensor, left_shape: Shape, right_shape: Shape, num_terms: int, moment: Tensor
) -> tuple[Tensor, Tensor]:
    """Where one factor has all the columns: Van Loan on W C^½, whose other factor C does not touch.

    That factor is kept as an orthonormal set, and the one with the columns follows as a projection of W itself, so that
    C need not be inverted.
    """
    a, b = _van_loan(weight @ square_root(moment, floor=0)[0], left_shape, right_shape, num_terms)
    blocks = rearranged(weight, left_shape, right_shape)
    if right_shape[1] == 1:
        b = torch.nn.functional.normalize(b.flatten(1), dim=1)  # (k, m2)
        return (blocks @ b.mT).mT.reshape(num_terms, *left_shape), b.reshape(num_terms, *right_shape)
    a = torch.nn.functional.normalize(a.flatten(1), dim=1)  # (k, m1)
    return a.reshape(num_terms, *left_shape), (a @ blocks).reshape(num_terms, *right_shape)


def separable_start(
    weight: Tensor, left_shape: Shape, right_shape: Shape, num_terms: int, moment: Tensor
) -> tuple[Tensor, Tensor]:
    """The optimum for the nearest C1 ⊗ C2 to C: Van Loan on W (C1^½ ⊗ C2^½), undone; exact if C is separable."""
    (root1, inverse1), (root2, inverse2) = map(square_root, separable(moment, left_shape[1], right_shape[1]))
    seen = torch.einsum("mab,ac,bd->mcd", weight.reshape(-1, left_shape[1], right_shape[1]), root1, root2).reshape(
        weight.shape
    )
    left, right = _van_loan(seen, left_shape, right_shape, num_terms)
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
    num_terms, m1, n1 = left.shape
    _, m2, n2 = right.shape
    moment4 = moment.reshape(n1, n2, n1, n2)
    seen = weight @ moment
    energy = (weight * seen).sum()
    seen_blocks = rearranged(seen, (m1, n1), (m2, n2))

    def solved(gram: Tensor, target: Tensor, old: Tensor) -> tuple[Tensor, float]:
        """The minimiser x (rows, size) of ⟨x gram, x⟩ − 2⟨x, target⟩, drawn to the old one; and the loss it gives."""
        weight_of_old = PROXIMAL * gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
        ridged = gram + weight_of_old * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        factor, failed = torch.linalg.cholesky_ex(ridged)
        goal = target + weight_of_old * old
        new = (
            torch.cholesky_solve(goal.mT, factor).mT if not failed else torch.linalg.lstsq(ridged, goal.mT).solution.mT
        )
        return new, (energy + ((new @ gram - 2 * target) * new).sum()).item()

    def left_step(left: Tensor, right: Tensor) -> tuple[Tensor, float]:
        gram = torch.einsum("iqb,jqd->ijbd", right, right)
        gram = torch.einsum("ijbd,abcd->iajc", gram, moment4).reshape(num_terms * n1, -1)
        target = seen_blocks @ right.flatten(1).mT  # (p a, i)
        target = target.reshape(m1, n1, num_terms).mT.reshape(m1, -1)
        new, loss = solved(gram, target, left.transpose(0, 1).reshape(m1, -1))
        return new.reshape(m1, num_terms, n1).transpose(0, 1), loss

    def right_step(left: Tensor, right: Tensor) -> tuple[Tensor, float]:
        gram = torch.einsum("ipa,jpc->ijac", left, left)
        gram = torch.einsum("ijac,abcd->ibjd", gram, moment4).reshape(num_terms * n2, -1)
        target = left.flatten(1) @ seen_blocks  # (i, q b)
        target = target.reshape(num_terms, m2, n2).transpose(0, 1).reshape(m2, -1)
        new, loss = solved(gram, target, right.transpose(0, 1).reshape(m2, -1))
        return new.reshape(m2, num_terms, n2).transpose(0, 1), loss

    start = torch.einsum("ipa,iqb->pqab", left, right).reshape(weight.shape)
    losses = [Metric(moment).squared_norm(weight - start)]
    for _ in range(max_sweeps):
        new_left, _ = left_step(left, right)
        new_right, loss = right_step(new_left, right)
        if not loss < losses[-1]:  # rounding, or an optimum
            break
        left, right = balanced(new_left, new_right)
        losses.append(loss)
        if losses[-2] - loss <= tolerance * losses[-2]:
            break
    return left, right, losses
