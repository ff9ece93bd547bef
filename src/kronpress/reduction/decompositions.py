"""MoDeGPT's three decompositions (Lin et al., arXiv 2408.09632), each of two matrices with a width between them.

Beside them an order of the hidden units of our own, in which each is the one that the loss would miss most.

Letters: C (h, h) and M, N (d, d) are second moments, G (m, m) is of the loss's gradients; h hidden units, d channels of
a head, of which k or r are kept; H query heads, of which g share each of K key heads. Everything is in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kronpress.matrices.metric import Metric, square_root, times

# λ of the leverage scores, relative to the mean second moment of a unit; this value is ours.
RIDGE = 1.0
# Eigenvalues below this fraction of the largest are treated as 0: what is left of them in float64 is rounding.
RANK_TOLERANCE = 1e-12
# Of all units, those that are put in order before what is left of the others is computed anew.
UNITS_AT_ONCE = 1 / 256
# A unit of which those put in order just before it leave less than this waits for the next round.
STILL_NEW = 0.5


def leverage_scores(second: Tensor, ridge: float = RIDGE) -> Tensor:
    """diag(C (C + λ I)⁻¹), (h,): how far each unit is not what a ridge regression on the others makes of it.

    λ is `ridge` times the mean of C's diagonal. Where C is zero so are the scores.

    >>> leverage_scores(torch.diag(torch.tensor([3.0, 1.0]))).tolist()
    [0.6, 0.3333333333333333]
    """
    c = second.to(torch.float64)
    values, vectors = torch.linalg.eigh(c)
    values = values.clamp(min=0)
    shrunk = values / (values + ridge * values.mean()) if values.any() else values
    return vectors.square() @ shrunk


def most(scores: Tensor, count: int) -> Tensor:
    """The `count` highest scores' places along the last dimension, in ascending order; of equal ones the first."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order[..., :count].sort(dim=-1).values


def ordered_units(weight: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
    """An order of the units, (h,), and of its first k for every k what is lost with the rest, (h + 1,).

    What is lost is the least tr(G ΔW C ΔWᵀ) of all W′ in place of W_:S, that of `nystrom`. It is the sum of
    ‖G^½ W c‖² over the columns c of C's Cholesky factor, in the order of the units, that belong to the rest: one
    factorisation with pivots has it for every k. The pivot is the unit with the largest such term, so that each unit
    is the one whose loss would cost the most, those before it being kept: greedy column subset selection, in the
    metric.

    >>> from kronpress.matrices.metric import Metric
    >>> order, lost = ordered_units(torch.tensor([[1.0, 3.0, 2.0]]), Metric(torch.eye(3)))
    >>> order.tolist(), lost.tolist()
    ([1, 2, 0], [14.0, 5.0, 1.0, 0.0])

    Args:
        weight: W, (m, h), of the layer that reads the units.
        metric: with C; a G of None is the identity.
    """
    w, num_units = weight.to(torch.float64), weight.shape[1]
    c = torch.eye(num_units).to(w) if metric.input is None else metric.input.to(w)
    left = w if metric.output is None else times(square_root(metric.output.to(w), floor=0)[0], w)
    left = left @ c  # G^½ W (C − L Lᵀ)
    variances = c.diagonal().clone()  # of C − L Lᵀ
    factor = torch.zeros_like(c)  # L, a column for each unit in order
    least = RANK_TOLERANCE * variances.max()
    is_free = variances > least
    order: list[int] = []
    gains: list[float] = []
    while is_free.any():
        terms = torch.where(is_free, left.square().sum(0) / variances, -1.0)
        begin, before, outputs = len(order), variances.clone(), list[Tensor]()
        for unit in terms.argsort(descending=True, stable=True)[: max(1, int(UNITS_AT_ONCE * num_units))].tolist():
            if not is_free[unit] or variances[unit] < max(STILL_NEW * before[unit], least):
                continue
            scale = variances[unit].sqrt()
            column = (c[:, unit] - factor @ factor[unit]) / scale
            here = left[:, unit] - sum(o * factor[unit, begin + at] for at, o in enumerate(outputs))
            outputs.append(here / scale)
            factor[:, len(order)] = column
            order.append(unit)
            gains.append(outputs[-1].square().sum().item())
            variances = (variances - column.square()).clamp(min=0)
            variances[unit] = 0
        left -= torch.stack(outputs, 1) @ factor[:, begin : len(order)].mT
        is_free &= variances > least
    rest = sorted({*range(num_units)} - {*order})  # of which the others know all
    lost = torch.tensor([*gains, *([0.0] * (len(rest) + 1))], dtype=torch.float64)
    return torch.tensor([*order, *rest]), lost.flip(0).cumsum(0).flip(0)


def nystrom(weight: Tensor, second: Tensor, kept: Tensor) -> Tensor:
    """W C_:S (C_SS)⁺, (m, k): what the kept units S have to be multiplied by to make up for all of them.

    It is the least-squares solution: E‖W s − W′ s_S‖² is least for it, C = E[s sᵀ].

    Args:
        weight: W, (m, h), of the layer that reads the units.
        kept: S, (k,).
    """
    w, c = weight.to(torch.float64), second.to(torch.float64)
    among = torch.linalg.pinv(c[kept][:, kept], hermitian=True, rtol=RANK_TOLERANCE)
    return w @ c[:, kept] @ among


def channel_scores(query_energy: Tensor, key_energy: Tensor, pairs: bool) -> Tensor:
    """‖C_q^½ e_i‖ ‖C_k^½ e_i‖ of each channel i of a key head, (K, d), or of each rotary pair (i, i + d/2), (K, d/2).

    What is dropped of a product q · k is at most so large, on average. Of the query heads that share a key head the
    energies are added. A rotary embedding turns the two channels of a pair into one another, so that only their sum is
    the same at all positions.

    Args:
        query_energy: E[q_i²], (H, d).
        key_energy: E[k_i²], (K, d).
    """
    num_keys, size = key_energy.shape
    queries = query_energy.reshape(num_keys, -1, size).sum(1)
    both = torch.stack([queries, key_energy])
    if pairs:
        both = both.reshape(2, num_keys, 2, size // 2).sum(2)
    return both.prod(0).clamp(min=0).sqrt()


def subspace(second: Tensor, readers: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (r, d) and B (d, r) for which O v and O B A v are nearest: least E‖O (v − B A v)‖² of all of this rank.

    The paper's pair of singular value decompositions, of C^½ W_v = U Σ Vᵀ and of Σ Vᵀ W_o = U′ Σ′ V′ᵀ, needs of the
    values v = W_v x only M = E[v vᵀ] and of all that read them only N = Σ Oᵀ O; no root of C is formed, and none
    inverted. With M = U Σ² Uᵀ and the leading eigenvectors V′ of Σ Uᵀ N U Σ, A = V′ᵀ Σ⁻¹ Uᵀ and B = U Σ V′. The rows
    of A are scaled so that v′ = A v carries in each channel as much as the readers O B make of it.

    Args:
        second: M, (d, d).
        readers: N, (d, d).
        rank: r, at most d.
    """
    m, n = second.to(torch.float64), readers.to(torch.float64)
    values, u = torch.linalg.eigh(m)
    is_seen = values > RANK_TOLERANCE * values.max()
    sigma = values.clamp(min=0).sqrt()
    inverse = torch.where(is_seen, 1 / sigma.clamp(min=torch.finfo(sigma.dtype).tiny), 0.0)
    sigma = torch.where(is_seen, sigma, 0.0)
    inner = (u * sigma).mT @ n @ (u * sigma)
    energies, directions = torch.linalg.eigh((inner + inner.mT) / 2)
    leading = directions.flip(1)[:, :rank]
    # A v has unit energy in each channel; its readers have that of the eigenvalue.
    scale = energies.flip(0)[:rank].clamp(min=0).sqrt().sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    down = leading.mT @ (inverse[:, None] * u.mT)
    up = (u * sigma) @ leading
    return scale[:, None] * down, up / scale


def reduced_fractions(influence: Tensor, sizes: Tensor, removed: float, temperature: float, largest: float) -> Tensor:
    """φ, (L,): the fraction of each block that is removed, by MoDeGPT's φ ∝ softmax(−s / ε), none above `largest`.

    Σ φ_l p_l = `removed` Σ p_l. Without the limit, and with blocks of equal size, this is the paper's φ = L φ_avg
    softmax(−s / ε), which may exceed 1; what the limit cuts off goes to the other blocks in the same proportions.

    >>> reduced_fractions(torch.tensor([0.0, 0.0]), torch.tensor([10.0, 10.0]), 0.3, 0.1, 0.8).tolist()
    [0.3, 0.3]

    Args:
        influence: s, (L,): 1 less the cosine of a block's input and output.
        sizes: p, (L,): parameters of each block that can be removed.
        removed: at most `largest`.
        temperature: ε; the higher, the more equal.
    """
    s, p = influence.to(torch.float64), sizes.to(torch.float64)
    fractions = torch.full_like(s, largest)
    is_free = torch.ones_like(s, dtype=torch.bool)
    while is_free.any():
        proportions = torch.softmax(-s[is_free] / temperature, 0)
        left = removed * p.sum() - largest * p[~is_free].sum()
        share = left / (proportions * p[is_free]).sum() * proportions
        fractions[is_free] = share.clamp(max=largest)
        if not (share > largest).any():
            break
        is_free &= fractions < largest
    return fractions
