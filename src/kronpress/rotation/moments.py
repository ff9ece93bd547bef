"""What calibration measured, taken past folded gains and a rotation, so that nothing has to be measured again.

Letters: x are a layer's inputs before and x' after, C = E[x xᵀ], μ = E[x]; g and β a norm's gain and bias; Q (d, d).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kronpress.errors import RequestError
from kronpress.folding import Side
from kronpress.matrices.moments import DerivedMoments, InputMoments
from kronpress.rotation.stream import FoldedNorm

# A gain below this fraction of its coordinate's bias leaves too little of the coordinate to divide by: what is summed
# up are sums of both, in single precision. To the other coordinates' gains it may be as small as it likes.
SMALLEST_GAIN = 1e-4
# How well a mean has to be known, relative to it, for one that is found in the same way to be believed.
MEAN_TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class TurnedMoments(DerivedMoments[InputMoments]):
    """The moments of a model after its gains were folded and its stream rotated, from those before; made when asked.

    `sides` says how each layer stands to the stream, `norms` what was folded, and `rotation` is Q.
    """

    sides: Mapping[str, Side]
    norms: Mapping[str, FoldedNorm]
    rotation: Tensor | None = None

    def __getitem__(self, layer: str) -> InputMoments:
        if layer not in self.sides:
            raise RequestError(
                f"the moments of {layer} are not taken past a rotation, only those of linear layers on the residual "
                "stream: calibrate after it"
            )
        moments = self.moments[layer]
        for name, norm in self.norms.items():
            if layer in norm.readers:
                moments = unscaled_moments(moments, norm, f"{layer} behind {name}")
        return moments if self.rotation is None else rotated_moments(moments, self.sides[layer], self.rotation)


def unscaled_moments(moments: InputMoments, norm: FoldedNorm, what: str) -> InputMoments:
    """The moments of a layer's inputs after the fold, x' = (x − β) / g + rest, from those of x = g ∘ z + β.

    With t = g ∘ rest − β and D = diag(g): E[x'x'ᵀ] = D⁻¹ (C + μtᵀ + tμᵀ + ttᵀ) D⁻¹ and E[x'] = D⁻¹ (μ + t). E|x'| is
    not known from them and None. Of the held-out inputs only the second moment H is known, and with t ≠ 0 their mean is
    needed: LayerNorm's z adds up to 0, so that xᵀD⁻¹1 = βᵀD⁻¹1 for every token, and the mean is H D⁻¹1 / βᵀD⁻¹1. Where
    this does not give the known mean from C, `held_out` is None.

    Raises:
        RequestError: a gain is 0 or nearly so, and the coordinate's statistics are lost behind it.
    """
    gain, bias = norm.gain, norm.bias
    small = gain.abs() <= SMALLEST_GAIN * bias.abs()
    if small.any():
        raise RequestError(
            f"the moments of {what} cannot be taken past the norm's gain, which at coordinate "
            f"{torch.nonzero(small)[0].item()} is {gain[small][0]:.1e}: call fold_norm_gains_ and calibrate after it"
        )
    gain, bias = gain.to(moments.second), bias.to(moments.second)
    shift = gain * norm.rest.to(gain) - bias

    def moved(second: Tensor, mean: Tensor) -> Tensor:
        cross = torch.outer(mean, shift)
        return (second + cross + cross.mT + torch.outer(shift, shift)) / torch.outer(gain, gain)

    held_out = moments.held_out
    if held_out is not None and shift.any():
        seen_mean, unseen_mean = (each @ (1 / gain) / (bias / gain).sum() for each in (moments.second, held_out))
        error = torch.linalg.vector_norm(seen_mean - moments.mean)
        is_known = error <= MEAN_TOLERANCE * torch.linalg.vector_norm(moments.mean)
        held_out = moved(held_out, unseen_mean) if is_known else None
    elif held_out is not None:
        held_out = moved(held_out, shift)  # about no shift the mean does not matter
    return replace(
        moments,
        second=moved(moments.second, moments.mean),
        mean=(moments.mean + shift) / gain,
        held_out=held_out,
        magnitude=None,
    )


def rotated_moments(moments: InputMoments, side: Side, rotation: Tensor) -> InputMoments:
    """The moments of a layer after `rotate_`: a reader's inputs are Qᵀ x, a writer's gradients Qᵀ g.

    E|Qᵀx| is not known from E|x|, and None.
    """
    q = rotation.to(moments.second)

    def turned(second: Tensor | None) -> Tensor | None:
        return None if second is None else q.mT @ second @ q

    if side == "out":
        return replace(moments, gradient=turned(moments.gradient))
    return replace(
        moments,
        second=q.mT @ moments.second @ q,
        mean=q.mT @ moments.mean,
        held_out=turned(moments.held_out),
        magnitude=None,
    )
