"""The spectrum of matrices and of a model's targets: every matrix with every structure at one share of its parameters.

Letters as in energies.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from statistics import fmean
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from kronpress.errors import RequestError, WorkError
from kronpress.matrices.metric import Metric, as_metric, square_root
from kronpress.matrices.moments import DerivedMoments, InputMoments
from kronpress.planning import find_targets, stored_dtype, target_params
from kronpress.recipe import Recipe
from kronpress.spectrum.energies import (
    Form,
    Shape,
    bounded_output_energies,
    captured_energies,
    fitted_output_energy,
    forms,
)
from kronpress.surgery import dense_weight, replaceable_layers

# Of each matrix's parameters, where the recipe has no budget.
DEFAULT_SHARE = 0.5
# Sizes of the normal equations of a fit to the inputs, terms × columns of a factor. Up to the first one matrix takes
# seconds to fit; up to the second the lower bound takes seconds.
MOST_EQUATIONS_FITTED = 2048
MOST_EQUATIONS_BOUNDED = 8192
CURVE_POINTS = 24
CHANCE_SEED = 0


class SpectrumRow(BaseModel):
    """What one structure of nearly `share` of a matrix's parameters captures of that matrix.

    `right_shape` is that of B, and `num_terms` the rank of low rank. Energies are fractions: `captured_energy` of
    ‖W‖²_F; `chance` that which the same sizes capture of one Gaussian matrix of W's shape; `captured_output_energy` of
    tr(W C Wᵀ) by the fit to the inputs, None without moments or where that fit is too large. With `is_lower_bound` it
    is what the fit captures at least.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    out_features: int
    in_features: int
    structure: str
    right_shape: Shape
    num_terms: int
    num_params: int
    kept_fraction: float
    captured_energy: float
    chance: float
    captured_output_energy: float | None = None
    is_lower_bound: bool = False


class SpectrumCurve(BaseModel):
    """The energies of `SpectrumRow` against the kept fraction, from few terms to all that the matrix has room for.

    The mean over matrices of one role. `captured_output_energy` may end sooner, and is a lower bound unless W's rows
    or columns are whole in one factor.
    """

    model_config = ConfigDict(frozen=True)

    role: str
    num_matrices: int
    out_features: int
    in_features: int
    structure: str
    right_shape: Shape
    kept_fraction: list[float]
    captured_energy: list[float]
    chance: list[float]
    captured_output_energy: list[float]


class Spectrum(BaseModel):
    """Every targeted matrix with every structure at `share` of its parameters, and the curves of each role."""

    model_config = ConfigDict(frozen=True)

    share: float
    rows: list[SpectrumRow]
    curves: list[SpectrumCurve]


def spectrum(
    model: nn.Module,
    recipe: Recipe,
    moments: Mapping[str, InputMoments] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Spectrum:
    """What each structure captures of the matrices that `recipe` targets, at its budget's share of their parameters.

    Every matrix is looked at with the same share; the recipe's own structure and allocation are not. Where it has no
    budget the share is DEFAULT_SHARE.

    Args:
        moments: of the targeted layers' inputs, by layer; without them there are no output energies.
        progress: called with a layer's name, how many are done and how many there are.

    Raises:
        RequestError: the model has no weights, a target matches no linear layer, the budget cannot be met, or moments
            are missing or of another size.
        WorkError: a weight or a moment holds NaN or infinity.
    """
    layers = replaceable_layers(model)
    targets = find_targets(model, recipe)
    if any(layers[name].weight.is_meta for name in targets):  # type: ignore[union-attr]
        raise RequestError("the spectrum needs the model's weights, not its configuration alone")
    seconds = None if moments is None else _Seconds(moments)
    weights = {name: dense_weight(layers[name]) for name in targets}
    return spectrum_of_weights(weights, _share(model, targets, recipe), seconds, progress)


class _Seconds(DerivedMoments[Tensor]):
    """C of each layer."""

    def __getitem__(self, name: str) -> Tensor:
        return self.moments[name].second


def _share(model: nn.Module, targets: Mapping[str, Shape], recipe: Recipe) -> float:
    """The fraction of the targeted matrices' parameters that the budget leaves them."""
    num_params = sum(p.numel() for p in model.parameters() if p.is_floating_point())
    targeted = sum(map(prod, targets.values()))
    left = target_params(recipe.budget, num_params, num_params - targeted, targeted, stored_dtype(model).itemsize)
    return DEFAULT_SHARE if left is None else min(1.0, left / targeted)


def spectrum_of_weights(
    weights: Mapping[str, Tensor],
    share: float = DEFAULT_SHARE,
    seconds: Mapping[str, Tensor] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Spectrum:
    """`spectrum` of matrices W (out_features, in_features) by name, with `seconds` the C of each.

    Raises:
        RequestError: there are no matrices, `share` is not in (0, 1], a C is missing or of another size, or no
            structure is that small.
        WorkError: a weight or a C holds NaN or infinity.
    """
    if not weights:
        raise RequestError("the spectrum of no matrices was asked for")
    if not 0 < share <= 1:
        raise RequestError(f"share {share}: it is a fraction of each matrix's parameters, above 0 and at most 1")
    for name in weights:
        if seconds is not None and name not in seconds:
            raise RequestError(f"there are moments of {len(seconds)} layers, but none of {name!r}: calibrate")
    for name, weight in weights.items():
        _metric(name, weight, seconds)  # to refuse a wrong one before any work; all together may not fit into memory
    rows, curves = [], []
    chances: dict[Form, Tensor] = {}
    for done, (name, weight) in enumerate(weights.items()):
        if progress is not None:
            progress(name, done, len(weights))
        w, metric = weight.to(torch.float64), _metric(name, weight, seconds)
        m, n = w.shape
        usable = [form for form in forms(m, n) if form.terms_at(share) > 0]
        if not usable:
            raise RequestError(f"{name} ({m}×{n}): no structure has as few as {share:g} of its parameters")
        seen = w if metric.input is None else w @ square_root(metric.input, floor=0)[0]
        for form in usable:
            if form not in chances:
                chances[form] = captured_energies(_gaussian(m, n).to(w.device), form)
            terms, energies = form.terms_at(share), captured_energies(w, form)
            output = _output(w, form, terms, metric, seen)
            rows.append(_row(name, form, terms, energies, chances[form], output))
            curves.append(_curve(name, form, terms, energies, chances[form], output))
    return Spectrum(share=share, rows=rows, curves=_means(curves))


def _metric(name: str, weight: Tensor, seconds: Mapping[str, Tensor] | None) -> Metric:
    """That of the inputs of the layer called `name`, or of W alone; both checked."""
    if not weight.isfinite().all():
        raise WorkError(f"the weight of {name!r} holds NaN or infinity")
    try:
        return as_metric(None if seconds is None else seconds[name], weight) or Metric()
    except (RequestError, WorkError) as error:
        raise type(error)(f"{name}: {error}") from error


def _gaussian(out_features: int, in_features: int) -> Tensor:
    generator = torch.Generator().manual_seed(CHANCE_SEED)
    return torch.randn(out_features, in_features, dtype=torch.float64, generator=generator)


@dataclass(frozen=True)
class _Output:
    """Captured fractions of tr(W C Wᵀ): by 1, 2, ... terms as far as they are known, and by the terms at the share."""

    by_terms: Tensor
    at_share: float | None = None
    is_lower_bound: bool = False


def _output(weight: Tensor, form: Form, num_terms: int, metric: Metric, seen: Tensor) -> _Output:
    """From a closed form, the fit or the lower bound, in this order, as the sizes allow; `seen` is W C^½."""
    unknown = _Output(weight.new_empty(0))
    if metric.input is None:
        return unknown
    if form.is_closed:
        by_terms = captured_energies(seen, form)
        return _Output(by_terms, by_terms[num_terms - 1].item())
    (_, n1), (_, n2) = form.left_shape, form.right_shape
    if num_terms * n1 > MOST_EQUATIONS_BOUNDED:
        return unknown
    by_terms = bounded_output_energies(weight, form, metric.input, num_terms)
    if num_terms * max(n1, n2) > MOST_EQUATIONS_FITTED:
        return _Output(by_terms, by_terms[-1].item(), is_lower_bound=True)
    return _Output(by_terms, fitted_output_energy(weight, form, num_terms, metric))


def _row(name: str, form: Form, num_terms: int, energies: Tensor, chance: Tensor, output: _Output) -> SpectrumRow:
    m, n = form.shape
    num_params = form.matrix_class.count_params(m, n, form.spec(num_terms))
    return SpectrumRow(
        name=name,
        out_features=m,
        in_features=n,
        structure=form.structure,
        right_shape=form.right_shape,
        num_terms=num_terms,
        num_params=num_params,
        kept_fraction=num_params / (m * n),
        captured_energy=energies[num_terms - 1].item(),
        chance=chance[num_terms - 1].item(),
        captured_output_energy=output.at_share,
        is_lower_bound=output.is_lower_bound,
    )


def _curve(name: str, form: Form, num_terms: int, energies: Tensor, chance: Tensor, output: _Output) -> SpectrumCurve:
    m, n = form.shape
    last = form.terms_at(1.0)
    points = sorted({num_terms, *(1 + (last - 1) * i // (CURVE_POINTS - 1) for i in range(CURVE_POINTS))})
    return SpectrumCurve(
        role=role_of(name),
        num_matrices=1,
        out_features=m,
        in_features=n,
        structure=form.structure,
        right_shape=form.right_shape,
        kept_fraction=[k * form.params_per_term / (m * n) for k in points],
        captured_energy=[energies[k - 1].item() for k in points],
        chance=[chance[k - 1].item() for k in points],
        captured_output_energy=[output.by_terms[k - 1].item() for k in points if k <= len(output.by_terms)],
    )


def role_of(name: str) -> str:
    """A module's name with * for the numbers of blocks.

    >>> role_of("transformer.h.11.mlp.c_fc")
    'transformer.h.*.mlp.c_fc'
    """
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _means(curves: Iterable[SpectrumCurve]) -> list[SpectrumCurve]:
    """One curve for all matrices of equal role, shape and structure."""
    groups: dict[tuple[Any, ...], list[SpectrumCurve]] = {}
    for curve in curves:
        kind = (curve.role, curve.out_features, curve.in_features, curve.structure, curve.right_shape)
        groups.setdefault(kind, []).append(curve)

    def mean(group: list[SpectrumCurve], field: str) -> list[float]:
        return [fmean(values) for values in zip(*(getattr(curve, field) for curve in group), strict=True)]

    return [
        group[0].model_copy(
            update={
                "num_matrices": len(group),
                **{field: mean(group, field) for field in ("captured_energy", "chance", "captured_output_energy")},
            }
        )
        for group in groups.values()
    ]
