"""Rates and decays of factors: how far W goes when its factors are what is trained.

Letters: W (m, n), the product of factors θ_1, …, θ_p; J_f = ∂W / ∂θ_f; η the rate and λ the decay of a dense weight.

An optimiser such as Adam moves every number by about its rate, whatever its gradient, so that a dense W goes η √(mn) in
Frobenius norm. A step of a factor takes W as far as the other factors are large: where its signs are independent,
E‖J_f Δθ_f‖² = η² ‖J_f‖_F². The rule `movement` gives it the rate

    η_f = η √(mn) / (√p ‖J_f‖_F),

with which all factors have an equal part in what W goes, and W goes as far as a dense one. The product of factors that
are scaled to and fro (A c, B / c) then moves alike, which under one rate it does not. For W = U V with the standard
deviations of BTT (Qiu et al. 2024, arXiv 2406.06248), r^-½ of U and √r / n of V, it is their rule but for √p: η n / r
of U and η of V.

A decay of λ_f in θ_f ← (1 − η_f λ_f) θ_f shrinks the product by (1 − Σ η_f λ_f). So that it shrinks as a dense W does,
by η λ, each of the p factors has λ_f = λ η / (p η_f).
"""

from __future__ import annotations

from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from kronpress.layers import StructuredLayer
from kronpress.processes import whole
from kronpress.surgery import structured_layers

# Steps of random signs by which ‖J_f‖ is measured.
NUM_PROBES = 4
# What factors of one product, each with its derivative, differ by in single precision, relative to their product.
ROUNDING = 1e-4


class Multipliers(NamedTuple):
    """Of one parameter: its rate and its decay, relative to those of a dense weight."""

    rate: float = 1.0
    decay: float = 1.0


def rate_multipliers(model: nn.Module, rates: str) -> dict[str, Multipliers]:
    """Of each parameter, by its name, that a structured matrix is made of; none under the rates `global`.

    The rule `movement`, at the factors as they are. A factor that several matrices share has the rate with which its
    part in what they all go is right. One without effect, since what it is multiplied by is 0, keeps that of a dense
    weight.
    """
    if rates == "global":
        return {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    squares: dict[str, float] = {}  # ‖J_f‖² and m n / p of each, summed over the matrices that have it
    wanted: dict[str, float] = {}
    shares: dict[str, list[float]] = {}
    for layer in structured_layers(model).values():
        own, distances, of_decay = dict(layer.named_parameters()), movements(layer), decay_shares(layer)
        for each, distance in distances.items():
            name = names[id(own[each])]
            squares[name] = squares.get(name, 0.0) + distance**2
            wanted[name] = wanted.get(name, 0.0) + layer.out_features * layer.in_features / len(distances)
            shares.setdefault(name, []).append(of_decay[each])
    rate = {name: (wanted[name] / square) ** 0.5 if square > 0 else 1.0 for name, square in squares.items()}
    return {name: Multipliers(rate[name], fmean(shares[name]) / rate[name]) for name in rate}


def movements(layer: StructuredLayer) -> dict[str, float]:
    """‖J_f‖_F of each parameter that W depends on: how far W goes if all its numbers go by 1, with random signs.

    Exact where what its numbers do to W is orthogonal, as in every fit by singular vectors, or where there are at most
    NUM_PROBES of them; else a mean over NUM_PROBES draws, which are always the same.
    """
    matrix = _Matrix(layer)
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, factor in matrix.factors.items():
        if factor.numel() <= NUM_PROBES:
            probes = torch.eye(factor.numel()).reshape(-1, *factor.shape)
            squares = [matrix.derivative(name, probe).square().sum().item() for probe in probes]
            found[name] = sum(squares) ** 0.5
        else:
            draws = (torch.randint(0, 2, factor.shape, generator=generator) * 2.0 - 1 for _ in range(NUM_PROBES))
            squares = [matrix.derivative(name, probe).square().sum().item() for probe in draws]
            found[name] = (sum(squares) / NUM_PROBES) ** 0.5
    return found


def decay_shares(layer: StructuredLayer) -> dict[str, float]:
    """δ_f of the least norm for which the decay of each θ_f by δ_f is the decay of W by 1: Σ δ_f J_f θ_f = W.

    1 / p for each of the p factors of one product, and so for each part of a sum.
    """
    matrix = _Matrix(layer)
    decays = torch.stack([matrix.derivative(name, factor).flatten() for name, factor in matrix.factors.items()])
    norms = decays.norm(dim=1, keepdim=True).clamp(min=torch.finfo(decays.dtype).tiny)
    decays /= norms  # so that a small part of a sum is not taken for rounding
    gram, along = decays @ decays.mT, decays @ matrix.dense().flatten()
    shares = torch.linalg.pinv(gram.double(), rtol=ROUNDING, hermitian=True) @ along.double() / norms.flatten().double()
    return dict(zip(matrix.factors, shares.tolist(), strict=True))


class _Matrix(nn.Module):
    """W of a layer as a function of its parameters, whatever they are computed by, in single precision."""

    def __init__(self, layer: StructuredLayer) -> None:
        super().__init__()
        self.layer = layer
        self.factors = {
            name: whole(parameter.detach()).float() for name, parameter in layer.named_parameters() if name != "bias"
        }

    def forward(self) -> Tensor:
        return self.layer.structure.dense(self.layer.factors)

    @torch.no_grad()
    def dense(self, **changed: Tensor) -> Tensor:
        given = {f"layer.{name}": factor for name, factor in {**self.factors, **changed}.items()}
        return functional_call(self, given)  # type: ignore[no-any-return]

    @torch.no_grad()
    def derivative(self, name: str, step: Tensor) -> Tensor:
        """J_f `step`, (m, n)."""
        factor = self.factors[name]
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(factor, step.to(factor.device))
            tangent = forward_ad.unpack_dual(self.dense(**{name: dual})).tangent
        return torch.zeros_like(self.dense()) if tangent is None else tangent
