"""How a permutation is bettered: rows between groups and places for a free A, and columns in the metric for a held sum.

An order (groups, places) says which row stands where. The features F_q(row), of d numbers, are what a row gives to its
group at place q; the energy of an order is Σ_p ‖Σ_q F_q(order[p, q])‖². See permutation.py for what they are.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

# (place q, rows) -> F_q of these rows, (rows, d).
Features = Callable[[int, Tensor], Tensor]
# A gain below this fraction of the energies that it is a difference of is none.
ROUNDING = 1e-12
# Of single precision, in a sum over all rows and in the gain of one exchange as a fraction of the energy of all.
SINGLE_ROUNDING, SINGLE_ROUNDING_OF_ONE = 1e-6, 3e-9
# Rounds of column exchanges in one step.
EXCHANGE_ROUNDS = 10


def regrouped(features: Features, order: Tensor, kinds: Tensor) -> Tensor:
    """An order of no lower energy than the given one.

    Place by place, the rows there are assigned anew to the groups, exactly: ‖own + rest‖², with `rest` what the other
    places give, is linear in the assignment but for a constant. Then, for each two places, rows of the one are
    exchanged with rows of the other where that gains, the greatest gain first, and each group in one exchange only, so
    that the gains add up.

    Args:
        order, kinds: (groups, places); a row moves only between slots of equal kind.
    """
    order = order.clone()
    places = order.shape[1]
    total = sum_of_places(features, order)
    for q in range(places if places > 2 else 1):  # of two places, assigning one is assigning the other
        own = features(q, order[:, q])
        rest = total - own
        source = assigned(own @ rest.mT, kinds[:, q])
        order[:, q] = order[source, q]
        total = rest + own[source]
    least = (ROUNDING if total.dtype == torch.float64 else SINGLE_ROUNDING_OF_ONE) * total.square().sum().item()
    several_kinds = bool((kinds != kinds[0, 0]).any())
    for q, u in combinations(range(places), 2):
        present = features(q, order[:, q]), features(u, order[:, u])
        exchanged = features(q, order[:, u]), features(u, order[:, q])
        gain = exchange_gains(total, present, exchanged).cpu()
        if several_kinds:
            gain[kinds[:, q, None] != kinds[:, u]] = -torch.inf
        first, second = disjoint_pairs(torch.maximum(gain, gain.mT), least)
        forward = gain[first, second] >= gain[second, first]
        at_q, at_u = torch.where(forward, first, second), torch.where(forward, second, first)
        total[at_q] += exchanged[0][at_u] - present[0][at_q]
        total[at_u] += exchanged[1][at_q] - present[1][at_u]
        order[at_q, q], order[at_u, u] = order[at_u, u], order[at_q, q]
    return order


def sum_of_places(features: Features, order: Tensor) -> Tensor:
    """Σ_q F_q(order[p, q]), (groups, d), of which the energy is the squared norm."""
    total = features(0, order[:, 0]).clone()
    for q in range(1, order.shape[1]):
        total += features(q, order[:, q])
    return total


def assigned(scores: Tensor, kinds: Tensor) -> Tensor:
    """For each slot the row to put there so that Σ scores[row, slot] is greatest; rows keep to slots of their kind.

    Args:
        scores: (size, size); kinds: (size,), of slots and, as they stand, of rows.
    """
    scores = scores.cpu()
    source = torch.arange(len(scores))
    for kind in kinds.unique():
        members = torch.nonzero(kinds == kind).flatten()
        part = scores if len(members) == len(scores) else scores[members][:, members]
        chosen = torch.from_numpy(linear_sum_assignment(part.mT.numpy(), maximize=True)[1])
        kept, taken = part.diagonal(), part[chosen, torch.arange(len(chosen))]
        rounding = ROUNDING if scores.dtype == torch.float64 else SINGLE_ROUNDING
        if (taken - kept).sum() > rounding * (taken.abs() + kept.abs()).sum():
            source[members] = members[chosen]
    return source


def exchange_gains(total: Tensor, present: tuple[Tensor, Tensor], exchanged: tuple[Tensor, Tensor]) -> Tensor:
    """By how much the energy rises if the row at place q of group p and that at place u of group s change places.

    Args:
        total: the sums of all places, (groups, d).
        present: F_q of the rows at place q and F_u of those at place u, (groups, d) each.
        exchanged: F_q of the rows at place u and F_u of those at place q.

    Returns:
        (groups p, groups s); on the diagonal both places are of one group.
    """
    (own_q, own_u), (new_q, new_u) = present, exchanged
    rest_q, rest_u = total - own_q, total - own_u
    norm = _squared_norms(total)
    # ‖rest_q[p] + new_q[s]‖² − ‖total[p]‖² and ‖rest_u[s] + new_u[p]‖² − ‖total[s]‖², in one product.
    of_p = _squared_norms(rest_q) + _squared_norms(new_u) - norm
    of_s = _squared_norms(rest_u) + _squared_norms(new_q) - norm
    one = torch.ones_like(of_p)
    gain = torch.cat([2 * rest_q, 2 * new_u, of_p, one], 1) @ torch.cat([new_q, rest_u, one, of_s], 1).mT
    change = new_q + new_u - own_q - own_u
    gain.diagonal().copy_(((2 * total + change) * change).sum(1))
    return gain


def _squared_norms(vectors: Tensor) -> Tensor:
    """(size, d) to (size, 1)."""
    return vectors.square().sum(1, keepdim=True)


def disjoint_pairs(gain: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """Pairs x ≤ y with gain[x, y] > `least`, no index in two of them: greedily, the greatest gain first.

    A pair that is the best of both its rows is one that a greedy choice takes too, so that many are taken at a time.

    Args:
        gain: (size, size), symmetric.
    """
    index = torch.arange(len(gain))  # of the rows that are left in `gain`
    pairs = [torch.empty(2, 0, dtype=torch.int64)]
    while len(index) > 0:
        value, partner = gain.max(1)  # the first of equal ones, so that one pair at least is mutual
        here = torch.arange(len(index))
        is_useful = value > least
        is_taken = is_useful & (partner[partner] == here)
        once = is_taken & (here <= partner)
        pairs.append(torch.stack([index[once], index[partner[once]]]))
        left = torch.nonzero(is_useful & ~is_taken).flatten()
        gain, index = gain[left[:, None], left], index[left]
    first, second = torch.cat(pairs, 1)
    return first, second


def exchanged_columns(weight: Tensor, moment: Tensor, target: Tensor, order: Tensor, kinds: Tensor) -> Tensor:
    """An order π of columns with tr((W_π − T) C_π (W_π − T)ᵀ) no higher than in the given one.

    With D = C_π, F = TᵀT and S = (W C)ᵀ T the loss is Σ F·D − 2 Σ_x S[π(x), x] but for a constant: a quadratic
    assignment. What each exchange of two columns alone would gain is exact.

    Args:
        weight, moment, target: W (m, n), C (n, n) and the held sum T (m, n).
        order, kinds: (n,); a column moves only between slots of equal kind.
    """
    linear, curvature = (weight @ moment).mT @ target, target.mT @ target

    def loss(order: Tensor) -> float:
        return ((curvature * moment[order][:, order]).sum() - 2 * linear[order].diagonal().sum()).item()

    def gains(order: Tensor) -> Tensor:
        return column_exchange_gains(linear[order], curvature, moment[order][:, order])

    return exchanged(gains, loss, order, kinds)


def exchanged(
    gains: Callable[[Tensor], Tensor],
    loss: Callable[[Tensor], float],
    order: Tensor,
    kinds: Tensor,
    max_rounds: int = EXCHANGE_ROUNDS,
) -> Tensor:
    """An order of no higher loss than the given one, by exchanges of two units each.

    Of exchanges that share no unit as many are made at once, the best first, as still lower the loss together.

    Args:
        gains: order -> by how much the loss falls, or may be expected to, for each exchange alone, (size, size).
        loss: order -> the loss that is to fall.
        order, kinds: (size,); a unit moves only between slots of equal kind.
    """
    present = loss(order)
    for _ in range(max_rounds):
        gain = gains(order).cpu()
        gain[kinds[:, None] != kinds] = -torch.inf
        gain.fill_diagonal_(-torch.inf)
        first, second = disjoint_pairs(gain, ROUNDING * abs(present))
        best_first = gain[first, second].argsort(descending=True, stable=True)
        first, second = first[best_first], second[best_first]
        count = len(first)
        while count > 0:
            trial = order.clone()
            trial[first[:count]], trial[second[:count]] = order[second[:count]], order[first[:count]]
            reached = loss(trial)
            if reached < present:
                order, present = trial, reached
                break
            count //= 2
        if count == 0:
            break
    return order


def column_exchange_gains(linear: Tensor, curvature: Tensor, moment: Tensor) -> Tensor:
    """By how much Σ F·D − 2 Σ_x S[x, x] falls if x and y change places among the rows of S and on both sides of D.

    Args:
        linear, curvature, moment: S, F, D (n, n), the latter two symmetric.

    Returns:
        (n, n), symmetric.
    """
    f, d = curvature.diagonal(), moment.diagonal()
    # Σ_z (F_xz − F_yz)(D_yz − D_xz) over all z, less z = x and z = y, which is left with the diagonals.
    product = curvature @ moment
    p = product.diagonal()
    crossed = product + product.mT - p - p[:, None]
    crossed = crossed - (f[:, None] - curvature) * (moment - d[:, None]) - (curvature - f) * (d - moment)
    return linear_exchange_gains(linear) - 2 * crossed - (f[:, None] - f) * (d - d[:, None])


def linear_exchange_gains(linear: Tensor) -> Tensor:
    """By how much −2 Σ_x S[x, x] falls if x and y change places among the rows of S (n, n); symmetric."""
    s = linear.diagonal()
    return 2 * (linear + linear.mT - s - s[:, None])
