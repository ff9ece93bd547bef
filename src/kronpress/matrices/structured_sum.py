"""W = W_1 + ... + W_p, a sum of matrices of other structures, fitted together: Kronecker plus low rank, say.

Letters: W (m, n); p parts W_i; C (n, n) and G (m, m) of the metric as in metric.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from kronpress.errors import RequestError, unknown_name
from kronpress.matrices.metric import FitMoments, Metric, as_metric
from kronpress.matrices.structured_matrix import STRUCTURES, Factors, Options, Spec, StructuredMatrix

MAX_SWEEPS = 40
# Stop when a sweep lowers the loss by less than this fraction.
TOLERANCE = 1e-3
# Fractions of the budget that the first of two parts gets where nothing is said.
SPLITS = (0.25, 0.5, 0.75)
# What is summed where nothing is said: sums of A ⊗ B with B of at most so many rows and columns, and low rank.
DEFAULT_SIZES = ((1, 2), (2, 1), (2, 2), (4, 4), (8, 8))
# What a sum is given to leave, as a fraction of what its parts would leave if each took its share of the rest.
OPTIMISM = 0.8
# Budgets at which `screen` looks at each part, in fractions of the dense matrix.
SCREENED = tuple(sixteenth / 16 for sixteenth in (1, 2, 3, 4, 6, 8, 10, 12))


class PartSpec(BaseModel):
    """One part: a name in STRUCTURES and the sizes of that structure."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    structure: str
    spec: Any

    @model_validator(mode="before")
    @classmethod
    def _known_structure(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or not {"structure", "spec"} <= set(fields):
            return fields  # a part already, or refused as incomplete
        return {**fields, "spec": _named(fields["structure"]).Spec.model_validate(fields["spec"])}


class PartSizes(BaseModel):
    """What a recipe says of one part: the sizes in `spec` that are fixed, and its `share` of the budget.

    Parts without a share divide what the others leave equally. What a part does not use goes to those after it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    structure: str
    spec: dict[str, Any] = {}
    share: float | None = Field(None, gt=0, lt=1)


class StructuredSumSpec(Spec):
    """`parts`: two or more matrices that are summed."""

    parts: tuple[PartSpec, ...] = Field(min_length=2)


class StructuredSum(StructuredMatrix):
    """A sum. The `weight` is the first part's; every other factor's name begins with its part's number and structure.

    >>> spec = StructuredSum.Spec(
    ...     parts=[
    ...         {"structure": "kronecker", "spec": {"left_shape": (2, 3), "right_shape": (4, 2)}},
    ...         {"structure": "low_rank", "spec": {"rank": 1}},
    ...     ]
    ... )
    >>> for name, shape in StructuredSum.factor_shapes(8, 6, spec).items():
    ...     print(name, shape)
    weight (2, 1, 3)
    part0__kronecker__right (4, 1, 2)
    part1__low_rank__weight (8, 1, 1)
    part1__low_rank__right (1, 6)
    """

    Spec = StructuredSumSpec

    @staticmethod
    def factor_shapes(out_features: int, in_features: int, spec: StructuredSumSpec) -> dict[str, tuple[int, ...]]:
        return {
            _full_name(number, part, name): shape
            for number, part in enumerate(spec.parts)
            for name, shape in _class(part).factor_shapes(out_features, in_features, part.spec).items()
        }

    @staticmethod
    def order_sizes(out_features: int, in_features: int, spec: StructuredSumSpec) -> dict[str, int]:
        _check_first(out_features, in_features, spec)
        return {
            _full_name(number, part, name): size
            for number, part in enumerate(spec.parts)
            for name, size in _class(part).order_sizes(out_features, in_features, part.spec).items()
        }

    @staticmethod
    def num_paths(spec: StructuredSumSpec) -> int:
        return sum(_class(part).num_paths(part.spec) for part in spec.parts)

    @classmethod
    def linear_dims(cls, out_features: int, in_features: int, spec: StructuredSumSpec) -> dict[str, tuple[int, int]]:
        return {
            _full_name(number, part, name): dims
            for number, part in enumerate(spec.parts)
            for name, dims in _class(part).linear_dims(out_features, in_features, part.spec).items()
        }

    @staticmethod
    def part_structures(spec: StructuredSumSpec) -> tuple[str, ...]:
        return tuple(part.structure for part in spec.parts)

    @classmethod
    def initial_stds(
        cls, out_features: int, in_features: int, spec: StructuredSumSpec, mean_square: float
    ) -> dict[str, float]:
        """Every part has an equal share of the mean square."""
        return {
            _full_name(number, part, name): std
            for number, part in enumerate(spec.parts)
            for name, std in _class(part)
            .initial_stds(out_features, in_features, part.spec, mean_square / len(spec.parts))
            .items()
        }

    @staticmethod
    def multiply(factors: Factors, x: Tensor, bias: Tensor | None = None) -> Tensor:
        (first, of_first), *others = divided(factors)
        y: Tensor = STRUCTURES[first].multiply(of_first, x, bias)
        for name, own in others:
            y = y + STRUCTURES[name].multiply(own, x, None)
        return y

    @staticmethod
    def takes_native(factors: Factors, x: Tensor, bias: Tensor | None = None) -> bool:
        return all(STRUCTURES[name].takes_native(own, x, bias) for name, own in divided(factors))

    @staticmethod
    def multiply_native(factors: Factors, x: Tensor, bias: Tensor | None = None) -> Tensor:
        (first, of_first), *others = divided(factors)
        y = STRUCTURES[first].multiply_native(of_first, x, bias)
        for name, own in others:
            y += STRUCTURES[name].multiply_native(own, x, None)
        return y

    @classmethod
    def rows(cls, factors: Factors, indices: Tensor) -> Tensor:
        (first, of_first), *others = divided(factors)
        found: Tensor = STRUCTURES[first].rows(of_first, indices)
        for name, own in others:
            found = found + STRUCTURES[name].rows(own, indices)
        return found

    @staticmethod
    def expand(factors: Factors) -> Tensor:
        first, *others = [STRUCTURES[name].expand(own) for name, own in divided(factors)]
        return sum(others, first)

    @classmethod
    def dense(cls, factors: Factors) -> Tensor:
        (first, of_first), *others = divided(factors)
        w = STRUCTURES[first].dense(of_first)
        for name, own in others:
            w = w + STRUCTURES[name].dense(own)
        return w

    @staticmethod
    def fit(
        weight: Tensor, spec: StructuredSumSpec, moments: FitMoments = None, options: Options | None = None
    ) -> dict[str, Tensor]:
        """Each part in turn is fitted to what the others leave: a local optimum, never worse than any part alone."""
        out_features, in_features = weight.shape
        shape = out_features, in_features
        names = [*StructuredSum.factor_shapes(*shape, spec), *StructuredSum.order_sizes(*shape, spec)]
        parts, _ = fitted_parts(weight.to(torch.float64), spec, as_metric(moments, weight))
        named = {
            _full_name(number, part, name): tensor.to(weight.dtype) if tensor.is_floating_point() else tensor
            for number, (part, own) in enumerate(zip(spec.parts, parts, strict=True))
            for name, tensor in own.items()
        }
        return {name: named[name] for name in names}

    @classmethod
    def screen(cls, weight: Tensor, metric: Metric) -> list[tuple[StructuredSumSpec, float, bool]]:
        """Sums of one Kronecker sum and one low rank, of a few sizes each; what they leave is a guess.

        If each took the same fraction of what the other leaves as it takes of W itself, a / |W|² and b / |W|² would
        leave a b / |W|².
        """
        energy = max(metric.squared_norm(weight), 1e-300)
        tables = [_best_by_budget(STRUCTURES[name], weight, metric) for name in ("kronecker", "low_rank")]
        found = []
        for (first, of_first, left), (second, of_second, right) in product(*tables):
            if of_first + of_second < weight.numel():
                parts = ({"structure": "kronecker", "spec": first}, {"structure": "low_rank", "spec": second})
                found.append((StructuredSumSpec(parts=parts), OPTIMISM * left * right / energy, False))
        return found

    @classmethod
    def has_fixed_sizes(cls, fixed: Mapping[str, Any]) -> bool:
        sizes = [PartSizes.model_validate(each) for each in fixed.get("sizes") or ()]
        return bool(sizes) and all(_named(each.structure).has_fixed_sizes(each.spec) for each in sizes)

    @classmethod
    def candidate_specs(  # type: ignore[override]
        cls,
        out_features: int,
        in_features: int,
        max_params: int | None = None,
        *,
        sizes: list[PartSizes] | None = None,
    ) -> list[StructuredSumSpec]:
        """Those of the parts in `sizes`; a Kronecker sum and a low rank if None, by several splits of the budget."""
        if sizes is not None:
            given = [PartSizes.model_validate(each) for each in sizes]
            if len(given) < 2:
                raise RequestError(f"a sum needs two parts or more; given {len(given)}")
            return _of_sizes(out_features, in_features, given, max_params)
        if max_params is None:
            raise RequestError("a sum needs its parts' sizes or a budget to choose them by")
        found: dict[StructuredSumSpec, None] = {}
        for share, right_shape in product(SPLITS, DEFAULT_SIZES):
            if out_features % right_shape[0] == in_features % right_shape[1] == 0:
                shape = _mirrored(right_shape, out_features, in_features)
                pair = [
                    PartSizes(structure="kronecker", spec={"right_shape": shape}, share=share),
                    PartSizes(structure="low_rank"),
                ]
                found |= dict.fromkeys(_of_sizes(out_features, in_features, pair, max_params))
        return list(found)


def _mirrored(right_shape: tuple[int, int], out_features: int, in_features: int) -> tuple[int, int]:
    """As a recipe would give it: a wider matrix gets the transpose of it."""
    return right_shape if out_features >= in_features else (right_shape[1], right_shape[0])


def _named(structure: Any) -> type[StructuredMatrix]:
    if structure not in STRUCTURES:
        raise unknown_name("structure", str(structure), STRUCTURES)
    if STRUCTURES[structure] is StructuredSum:
        raise RequestError("a sum is no part of a sum: list its parts")
    return STRUCTURES[structure]


def _class(part: PartSpec) -> type[StructuredMatrix]:
    return STRUCTURES[part.structure]


def _full_name(number: int, part: PartSpec, name: str) -> str:
    return "weight" if number == 0 and name == "weight" else f"part{number}__{part.structure}__{name}"


def _check_first(out_features: int, in_features: int, spec: StructuredSumSpec) -> None:
    """The first part's structure is read off the names of its factors beside `weight`."""
    first = _class(spec.parts[0])
    sizes = out_features, in_features, spec.parts[0].spec
    if len(first.factor_shapes(*sizes)) + len(first.order_sizes(*sizes)) < 2:
        raise RequestError(
            f"{spec.parts[0].structure} has one factor: another structure has to be the sum's first part"
        )


def divided(factors: Factors) -> list[tuple[str, dict[str, Tensor]]]:
    """The structure and the factors of each part, under the names that they have in it."""
    parts: dict[str, tuple[str, dict[str, Tensor]]] = {}
    for name, tensor in factors.items():
        if name != "weight":
            part, structure, own = name.split("__", 2)
            parts.setdefault(part, (structure, {}))[1][own] = tensor
    first, of_first = parts["part0"]
    ordered = {**parts, "part0": (first, {"weight": factors["weight"], **of_first})}
    return [ordered[f"part{number}"] for number in range(len(ordered))]


def fitted_parts(
    weight: Tensor,
    spec: StructuredSumSpec,
    metric: Metric | None,
    max_sweeps: int = MAX_SWEEPS,
    tolerance: float = TOLERANCE,
) -> tuple[list[dict[str, Tensor]], list[float]]:
    """The factors of each part, and the loss tr(G ΔW C ΔWᵀ) after each sweep.

    The first sweep is made once from every part, in the order that begins with it; the best is gone on with. A part
    that fits worse than the one before, as a local optimum may, is not taken: the loss never rises.

    Args:
        weight: W (m, n), in float64.
    """
    seen_by = Metric() if metric is None else metric.where_it_sees
    count = len(spec.parts)
    starts = []
    for start in range(count):
        parts: list[dict[str, Tensor]] = [{}] * count
        dense = [weight.new_zeros(weight.shape) for _ in range(count)]
        order = [(start + i) % count for i in range(count)]
        loss = _sweep(weight, spec, metric, seen_by, order, parts, dense, seen_by.squared_norm(weight))
        starts.append((loss, order, parts, dense))
    loss, order, parts, dense = min(starts, key=lambda each: each[0])
    losses = [loss]
    while len(losses) < max_sweeps:
        losses.append(_sweep(weight, spec, metric, seen_by, order, parts, dense, losses[-1]))
        if losses[-2] - losses[-1] <= tolerance * losses[-2]:
            break
    return parts, losses


def _sweep(
    weight: Tensor,
    spec: StructuredSumSpec,
    metric: Metric | None,
    seen_by: Metric,
    order: Sequence[int],
    parts: list[dict[str, Tensor]],
    dense: list[Tensor],
    loss: float,
) -> float:
    """Fit each part once to what the others leave, in place; the loss then."""
    for number in order:
        structure = _class(spec.parts[number])
        target = weight - sum(each for other, each in enumerate(dense) if other != number)
        factors = structure.fit(target, spec.parts[number].spec, metric)
        fitted = structure.expand(factors)
        found = seen_by.squared_norm(target - fitted)
        if found <= loss or not parts[number]:
            parts[number], dense[number], loss = factors, fitted, found
    return loss


def _of_sizes(
    out_features: int, in_features: int, sizes: Sequence[PartSizes], max_params: int | None
) -> list[StructuredSumSpec]:
    """Every combination of the parts' candidates within their shares, and what those before them have not used."""
    given = sum(each.share for each in sizes if each.share is not None)
    unsaid = sum(each.share is None for each in sizes)
    if given > 1 or (unsaid and given >= 1):
        raise RequestError(f"the shares of a sum's parts add up to {given:g}: at most 1, less if a part has none")
    chosen: list[tuple[tuple[PartSpec, ...], int]] = [((), 0)]
    ends = 0.0
    for number, each in enumerate(sizes):
        structure = _named(each.structure)
        ends += (1 - given) / unsaid if each.share is None else each.share
        if number == len(sizes) - 1:
            ends = 1.0
        longer = []
        for before, used in chosen:
            most = None if max_params is None else int(ends * max_params) - used
            if most is None or most > 0:
                for spec in structure.candidate_specs(out_features, in_features, most, **each.spec):
                    size = structure.count_params(out_features, in_features, spec)
                    longer.append(((*before, PartSpec(structure=each.structure, spec=spec)), used + size))
        chosen = longer
    found = [StructuredSumSpec(parts=parts) for parts, _ in chosen]
    for spec in found:
        _check_first(out_features, in_features, spec)
    return found


def _best_by_budget(structure: type[StructuredMatrix], weight: Tensor, metric: Metric) -> list[tuple[Any, int, float]]:
    """Of what a structure screens, (spec, parameters, error) of the least error at each of a few budgets."""
    out_features, in_features = weight.shape
    screened = [
        (spec, structure.count_params(out_features, in_features, spec), error)
        for spec, error, _ in structure.screen(weight, metric)
    ]
    best: dict[Any, tuple[Any, int, float]] = {}
    smallest = min((size for _, size, _ in screened), default=0)
    for budget in {smallest, *(int(fraction * weight.numel()) for fraction in SCREENED)}:
        within = [each for each in screened if each[1] <= budget]
        if within:
            found = min(within, key=lambda each: each[2])
            best[found[0]] = found
    return list(best.values())
