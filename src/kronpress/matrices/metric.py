"""The norm in which a fit is nearest: the error of the layer's output on real inputs, as far as the loss feels it.

Letters: W (m, n); inputs x (n,); C = E[x xᵀ] (n, n); G (m, m) says how the loss responds to the output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kronpress.errors import RequestError, WorkError
from kronpress.matrices.moments import InputMoments
from kronpress.matrices.svd import balanced_svd

# Directions in which a metric is smaller than this fraction of its largest are treated as if it were so large:
# nothing is known of them, and their inverse must stay finite.
FLOOR = 1e-7
# Where half of the inputs are zero, or single precision has left eigenvalues below it: the first of these, times the
# largest entry, that makes a side positive definite.
FLOORS = (1e-12, 1e-10, 1e-8, 1e-6)


@dataclass(frozen=True)
class Metric:
    """‖ΔW‖² = tr(G ΔW C ΔWᵀ) with symmetric positive semi-definite C (`input`) and G (`output`); None is the identity.

    A vector stands for a diagonal matrix, such as that of the vocabulary's frequencies, which could not be stored.

    With C the second moment of the inputs and no G this is the mean squared error of the layer's output, E‖ΔW x‖².
    With G = E[g gᵀ] of the loss's gradients g by the output as well, half of it is what the loss rises by to second
    order, inputs and gradients taken as independent (Martens & Grosse 2015, section 3).
    """

    input: Tensor | None = None
    output: Tensor | None = None

    def squared_norm(self, difference: Tensor) -> float:
        """tr(G ΔW C ΔWᵀ) for ΔW (m, n)."""
        d = difference.to(torch.float64)
        right = d if self.input is None else times(self.input.to(d), d.mT).mT
        left = d if self.output is None else times(self.output.to(d), d)
        return (left * right).sum().item()

    @property
    def where_it_sees(self) -> Metric:
        """The same without a side that is zero, as for constant inputs about their mean: by it all fits are equal."""
        sides = (None if side is None or not side.any() else side for side in (self.input, self.output))
        return Metric(*sides)


def metric_of(moments: InputMoments, *, output: bool, centred: bool) -> Metric:
    """The metric of a layer's inputs, and with `output` of the loss's response to its outputs.

    `centred` takes the covariance C − μμᵀ in place of C, for a layer whose bias is corrected afterwards: with
    b' = b + (W − Ŵ) μ the mean output has no error, and what is left is that of x − μ.

    Raises:
        RequestError: `output` without `moments.gradient`.
    """
    second = moments.second
    if centred:
        second = second - torch.outer(moments.mean, moments.mean)
    if output and moments.gradient is None:
        raise RequestError(
            "the metric `loss` needs the loss's gradients: calibrate a model that predicts tokens, with "
            "calibration.sensitivity=true"
        )
    return Metric(second, moments.gradient if output else None)


# What a fit accepts: see `as_metric`.
FitMoments = InputMoments | Metric | Tensor | None


def as_metric(moments: FitMoments, weight: Tensor) -> Metric | None:
    """The metric that `moments` ask for, in float64 on the weight's device: a tensor is C, InputMoments their `second`.

    Raises:
        RequestError: its sizes are not those of `weight` (m, n).
        WorkError: it holds NaN or infinity.
    """
    if moments is None:
        return None
    if isinstance(moments, InputMoments):
        moments = Metric(moments.second)
    elif isinstance(moments, Tensor):
        moments = Metric(moments)
    sides: list[Tensor | None] = []
    for side, size in ((moments.input, weight.shape[1]), (moments.output, weight.shape[0])):
        if side is not None:
            if side.shape != (size, size) and not (side is moments.output and side.shape == (size,)):
                raise RequestError(
                    f"moments of shape {tuple(side.shape)} for a weight of {tuple(weight.shape)}: "
                    f"expected {(size, size)}"
                )
            if not side.isfinite().all():
                raise WorkError("the moments hold NaN or infinity")
            side = side.to(weight.device, torch.float64)
        sides.append(side)
    return Metric(*sides)


def times(side: Tensor, matrix: Tensor) -> Tensor:
    """M X for X (size, columns), with M (size, size) or the diagonal (size,) of a diagonal one."""
    return side[:, None] * matrix if side.ndim == 1 else side @ matrix


def square_root(matrix: Tensor, floor: float = FLOOR) -> tuple[Tensor, Tensor]:
    """S = M^½ and its inverse, both symmetric, of a positive semi-definite M (size, size), or of a diagonal (size,).

    Eigenvalues below `floor` times the largest are raised to it. With a floor of 0 the root is that of M itself and
    the inverse is of use only if M is regular; a zero matrix has a zero root and inverse.
    """
    values, vectors = (matrix, None) if matrix.ndim == 1 else torch.linalg.eigh(matrix)
    largest = values.max().clamp(min=0)
    if largest == 0:
        return torch.zeros_like(matrix), torch.zeros_like(matrix)
    values = values.clamp(min=floor * largest).sqrt()
    if vectors is None:
        return values, 1 / values
    return (vectors * values) @ vectors.mT, (vectors / values) @ vectors.mT


def damped(metric: Metric, damping: float) -> Metric:
    """The same with both sides positive definite: `damping` of the median of its diagonal added to each side.

    For an alternation in a metric that joins what its steps change. Along a direction that inputs hardly take the
    optimum may be as large as it likes, and after some sweeps it is: thousands of times W, with the same outputs on the
    inputs it was fitted to.

    Raises:
        WorkError: a side has eigenvalues below zero by more than single precision explains.
    """
    return Metric(*(None if side is None else _damped_side(side, damping) for side in (metric.input, metric.output)))


def _damped_side(side: Tensor, damping: float) -> Tensor:
    diagonal = side if side.ndim == 1 else side.diagonal()
    for added in (damping * diagonal.median(), *(floor * diagonal.max() for floor in FLOORS)):
        if side.ndim == 1:
            regular = side + added
            is_regular = bool((regular > 0).all())
        else:
            regular = side + added * torch.eye(len(side), dtype=side.dtype, device=side.device)
            is_regular = not torch.linalg.cholesky_ex(regular).info.any()
        if is_regular:
            return regular
    raise WorkError(f"the moments are not positive semi-definite: an eigenvalue is below -{FLOORS[-1]} of the largest")


def separable(matrix: Tensor, size1: int, size2: int) -> tuple[Tensor, Tensor]:
    """The nearest M1 ⊗ M2 (Van Loan & Pitsianis 1993) to a positive semi-definite M (size1·size2, size1·size2).

    Both factors are positive semi-definite, as is the best pair for such an M. Of a diagonal (size1·size2,) they are
    diagonals too.
    """
    if matrix.ndim == 1:
        left, right = balanced_svd(matrix.reshape(size1, size2), 1)
        return left.flatten().abs(), right.flatten().abs()
    blocks = matrix.reshape(size1, size2, size1, size2).permute(0, 2, 1, 3)
    left, right = balanced_svd(blocks.reshape(size1**2, size2**2), 1)
    first, second = left.reshape(size1, size1), right.reshape(size2, size2)
    sign = torch.sign(first.trace())
    return sign * (first + first.mT) / 2, sign * (second + second.mT) / 2
