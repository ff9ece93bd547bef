"""The rotation in which weights are nearest to their structured fits: fits and orthogonal Procrustes problems in turn.

Letters: d is the width; Q (d, d); W (m, n) a weight, S its structured approximation; C (n, n) and G (m, m) the metric
tr(G ΔW C ΔWᵀ). The stream x becomes Qᵀ x: a layer that reads it gets W Q, one that writes it Qᵀ W and Qᵀ b. Of a
reader's metric C becomes Qᵀ C Q, of a writer's G becomes Qᵀ G Q; their other sides stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from kronpress.errors import RequestError, WorkError
from kronpress.folding import Side
from kronpress.matrices.metric import Metric

# The nearest structured approximation of a weight (m, n) in a metric.
Fit = Callable[[Tensor, Metric], Tensor]

MAX_SWEEPS = 20
# Steps of Q for one round of fits, each with one singular value decomposition and two products for each metric.
MAX_STEPS = 30
# Stop when a sweep, or a step, lowers the loss by less than this fraction.
TOLERANCE = 1e-3
STEP_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Target:
    """A weight (m, n) in float64 that is to be approximated, on which `side` it has the stream, its metric and fit.

    Its squared error counts `importance` times.
    """

    weight: Tensor
    side: Side
    metric: Metric
    fit: Fit
    importance: float = 1.0


@dataclass(frozen=True)
class Rotation:
    """Q (d, d), and the loss of all fits after each round: `losses[0]` at the identity, `losses[-1]` at Q."""

    matrix: Tensor
    losses: tuple[float, ...]


def procrustes_rotation(
    names: Iterable[str],
    target: Callable[[str], Target],
    *,
    keeps_ones: bool,
    max_sweeps: int = MAX_SWEEPS,
    progress: Callable[[int, float], None] = lambda _, __: None,
) -> Rotation:
    """The rotation found from the identity by fits for a held Q and the best Q for held fits in turn.

    The loss is the sum of the rotated weights' squared distances from their fits, each in its metric and times its
    importance. With S held it is, for a writer, tr(G (W − Q S) C (W − Q S)ᵀ), a quadratic in Q:

        f(Q) = Σ_l tr(A_l Qᵀ G_l Q) − 2 tr(Qᵀ M) + constant,   A = S C Sᵀ,   M = Σ_l G W C Sᵀ.

    A reader is a writer of Wᵀ whose C and G have changed places. Without a metric on the side of the stream
    tr(A Qᵀ Q) is constant, and the best Q is the orthogonal factor of M = Σ_writers W Sᵀ + Σ_readers Wᵀ S
    (orthogonal Procrustes, Schönemann 1966). Otherwise see `best_rotation`. A Q is kept only if fits made anew for it
    have a lower loss, so that the losses fall, and where nothing is gained it is the identity.

    Memory: two (d, d) for each target with a metric on the side of the stream; targets are asked for one by one, once
    in every sweep.

    Args:
        target: by name; all are of one width d.
        keeps_ones: allow only Q 1 = 1, as LayerNorm does.
        progress: called after each round of fits with its number and its loss.

    Raises:
        RequestError: there are no targets, or they differ in width.
        WorkError: a fit is not finite.
    """
    names = list(names)
    if not names:
        raise RequestError("a rotation needs at least one weight to be fitted, and got none")
    first = target(names[0])
    q = torch.eye(len(_stream_first(first)[0])).to(first.weight)
    terms = held_fits(q, names, target)
    losses = [terms.loss]
    progress(0, terms.loss)
    for sweep in range(max_sweeps):
        proposed = best_rotation(q, terms, keeps_ones)
        terms = held_fits(proposed, names, target)
        progress(sweep + 1, terms.loss)
        if not terms.loss < losses[-1]:
            break
        q = proposed
        losses.append(terms.loss)
        if losses[-2] - losses[-1] <= TOLERANCE * losses[-2]:
            break
    return Rotation(q, tuple(losses))


@dataclass(frozen=True)
class HeldFits:
    """f(Q) = Σ tr(A Qᵀ K Q) − 2 tr(Qᵀ M) + `constant` for held fits: `quadratic` the pairs (K, A), `linear` M.

    `loss` is f at the Q that the fits were made for.
    """

    linear: Tensor
    quadratic: list[tuple[Tensor, Tensor]]
    constant: float
    loss: float

    def times(self, q: Tensor) -> Tensor:
        """Σ K Q A, half the gradient of the quadratic part."""
        total = torch.zeros_like(q)
        for k, a in self.quadratic:
            total.addmm_(k @ q, a)
        return total

    def value(self, q: Tensor, product: Tensor) -> float:
        """f(Q), `product` being `times(q)`."""
        return self.constant + (q * (product - 2 * self.linear)).sum().item()


def _stream_first(target: Target) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """W as a writer's (d, n), and its metrics on the side of the stream and on the other."""
    metric = target.metric
    if target.side == "out":
        return target.weight, metric.output, metric.input
    return target.weight.mT, metric.input, metric.output


def held_fits(q: Tensor, names: Iterable[str], target: Callable[[str], Target]) -> HeldFits:
    """The fits of all targets in the basis of Q (d, d), as a function of Q with the fits held.

    Raises:
        RequestError: a target is not as wide as Q.
        WorkError: a fit is not finite.
    """
    linear, quadratic, constant, loss = torch.zeros_like(q), [], 0.0, 0.0
    for name in names:
        each = target(name)
        weight, near, far = _stream_first(each)
        if len(weight) != len(q):
            raise RequestError(f"{name} has {len(weight)} channels on its side of the stream, others have {len(q)}")
        weight = weight.to(q)
        turned = q.mT @ weight
        turned_near = None if near is None else q.mT @ near @ q
        if each.side == "out":
            s = each.fit(turned, Metric(far, turned_near)).to(q)
        else:
            s = each.fit(turned.mT, Metric(turned_near, far)).to(q).mT
        s_seen = s if far is None else s @ far  # S C
        seen = weight if near is None else near @ weight  # G W
        energy = each.importance * (seen * (weight if far is None else weight @ far)).sum().item()
        a, m = each.importance * s_seen @ s.mT, each.importance * seen @ s_seen.mT
        linear += m
        if near is None:
            energy += a.trace().item()
        else:
            quadratic.append((near, a))
        constant += energy
        loss += each.importance * Metric(far, turned_near).squared_norm(turned - s)
        if not torch.isfinite(m).all():
            raise WorkError(f"the fit of {name} holds NaN or infinity")
    return HeldFits(linear, quadratic, constant, loss)


def best_rotation(q: Tensor, terms: HeldFits, keeps_ones: bool, max_steps: int = MAX_STEPS) -> Tensor:
    """A Q with f(Q) no larger than at the given one, from orthogonal Procrustes problems one after the other.

    With H(Q) = Σ K Q A and any λ no smaller than its largest eigenvalue, λ ‖Q − P‖² ≥ ⟨Q − P, H(Q − P)⟩, so that
    f(Q) ≤ f(P) + 2⟨Q − P, H(P) − M⟩ + λ ‖Q − P‖² with equality at P. Since ‖Q‖² is d, the right side is least at the
    orthogonal factor of λ P + M − H(P). Smaller λ make longer steps and are tried first; one is taken only if f falls.
    """
    # Of K ⊗ A the largest eigenvalue is the product of theirs, and no larger than that of the Frobenius norms.
    bound = sum((torch.linalg.vector_norm(k) * torch.linalg.vector_norm(a)).item() for k, a in terms.quadratic)
    product = terms.times(q)
    value = terms.value(q, product)
    drawn = 0.0
    for _ in range(max_steps):
        proposed = nearest_orthogonal(drawn * q + terms.linear - product, keeps_ones)
        new_product = terms.times(proposed)
        new_value = terms.value(proposed, new_product)
        if new_value < value:
            gain = value - new_value
            q, product, value = proposed, new_product, new_value
            drawn /= 2
            if gain <= STEP_TOLERANCE * value:
                break
        elif drawn < bound:
            drawn = min(bound, max(4 * drawn, 1e-4 * bound))
        else:  # rounding, or an optimum
            break
    return q


def nearest_orthogonal(matrix: Tensor, keeps_ones: bool = False) -> Tensor:
    """The orthogonal Q that maximises tr(Qᵀ M), M (d, d): U Vᵀ of M = U Σ Vᵀ (Schönemann 1966).

    With `keeps_ones` the best of those with Q 1 = 1. These are 11ᵀ/d + R, where R is orthogonal on the complement of
    the ones and 0 on them; with P = I − 11ᵀ/d, tr(Qᵀ M) = 1ᵀM1/d + tr(Rᵀ P M P), so R is the orthogonal factor of
    P M P there. Adding a multiple c > 0 of 11ᵀ/d gives that factor the singular pair (1, 1) on the ones.

    >>> q = nearest_orthogonal(torch.randn(4, 4, dtype=torch.float64), keeps_ones=True)
    >>> torch.testing.assert_close(q.sum(dim=1), torch.ones(4, dtype=torch.float64))
    """
    if keeps_ones:
        centred = matrix - matrix.mean(dim=0)
        centred = centred - centred.mean(dim=1, keepdim=True)
        size = torch.linalg.vector_norm(centred)
        matrix = centred + torch.where(size > 0, size, 1) / len(matrix)
    u, _, vt = torch.linalg.svd(matrix)
    return u @ vt
