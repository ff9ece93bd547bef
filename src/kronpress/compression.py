"""Carry out a plan: fit every targeted layer and put the structured one in its place."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from kronpress.calibration import PairedMoments, SequentialInputs
from kronpress.checkpoint import attach_plan_
from kronpress.errors import RequestError, WorkError
from kronpress.matrices.metric import Metric, as_metric
from kronpress.matrices.moments import InputMoments
from kronpress.planning import LayerPlan, Plan
from kronpress.recipe import Weighting
from kronpress.surgery import dense_weight, linear_layers, replace_module_, structured_layer, weight_shape
from kronpress.weighting import is_centred, shrinkage, shrunk, unshrunk_metric

# Relative to the mean second moment of the inputs.
SEQUENTIAL_RIDGE = 1e-2


class LayerReport(BaseModel):
    """How near one layer's Ŵ came to W. Energies are fractions of ‖W‖²_F."""

    model_config = ConfigDict(frozen=True)

    relative_error: float  # ‖W − Ŵ‖_F / ‖W‖_F
    captured_energy: float  # 1 − relative_error²
    # (E‖(W − Ŵ) x‖² / E‖W x‖²)^½ on the dense model's calibration inputs, about their mean where the bias is
    # corrected; None without moments.
    relative_output_error: float | None = None
    # Kept parameters over entries: what one Kronecker term captures of a random matrix (METHODS: "chance").
    kept_fraction: float
    num_params: int
    num_params_dense: int


def compress_(
    model: nn.Module,
    plan: Plan,
    progress: Callable[[str, int, int], None] | None = None,
    *,
    moments: Mapping[str, InputMoments] | None = None,
    sequential: SequentialInputs | None = None,
) -> dict[str, LayerReport]:
    """Replace the planned layers of `model` in place, each by the fit that is nearest in the plan's metric.

    Factors are computed in float64 and stored in the dtype and on the device of the weight they replace. All
    weights and moments are checked before the first layer is replaced, so that such a failure leaves the model as
    it was. Biases are kept, or corrected by the mean output error if the plan's weighting says so.

    Args:
        progress: called with a layer's name, how many are done and how many there are.
        moments: of the dense model's inputs, by layer; needed for every metric but `none`.
        sequential: where layers see the inputs they will get, needed if the plan is sequential: then W x of the dense
            model is approximated by Ŵ x̃ on the inputs x̃ that the layers replaced so far give.

    Returns:
        The error of every replaced layer, by its name.

    Raises:
        RequestError: the plan is of another model, or moments are missing or of another model.
        WorkError: a weight or a moment holds NaN or infinity.
    """
    layers = linear_layers(model)
    weighting = plan.weighting
    if weighting.sequential and sequential is None:
        raise RequestError("the plan is sequential: compress_ needs the inputs, SequentialInputs(model, batches, ...)")
    for name, layer_plan in plan.layers.items():
        shape = (layer_plan.out_features, layer_plan.in_features)
        if name not in layers or weight_shape(layers[name]) != shape:
            there = f"is {weight_shape(layers[name])}" if name in layers else "is no linear layer"
            raise RequestError(f"the plan is of another model: it has {name!r} of shape {shape}, which here {there}")
        weight = layers[name].weight
        if not weight.isfinite().all():  # type: ignore[operator, union-attr]
            raise WorkError(f"the weight of {name!r} holds NaN or infinity")
        _check_moments(name, layers[name], weighting, moments or {})

    reports = {}
    for done, (name, layer_plan) in enumerate(plan.layers.items()):
        if progress is not None:
            progress(name, done, len(plan.layers))
        layer = layers[name]
        weight = dense_weight(layer)
        dense = problem = _Problem(weight)
        if moments is not None and weighting.metric != "none":
            dense = problem = _dense_problem(layer, weighting, moments[name])
        if sequential is not None and weighting.sequential:
            problem = _sequential_problem(dense, sequential.moments(name))
        matrix = layer_plan.matrix_class.from_dense(
            problem.target.to(weight.dtype), layer_plan.spec, problem.metric, layer_plan.options
        )
        approximation = matrix.to_dense().detach()
        if problem.means is not None:
            _correct_bias_(layer, weight, approximation, *problem.means)
        reports[name] = _report(weight, approximation, layer_plan, dense.metric)
        replace_module_(model, name, structured_layer(layer, matrix))
    attach_plan_(model, plan)
    return reports


@dataclass(frozen=True)
class _Problem:
    """What one layer is fitted to: `target` (out_features, in_features), in which metric, and whose mean output.

    `means` are E[x] of the dense model and E[x̃] of the inputs that the layer will get; None if its bias is kept.
    `shrinkage` is that of the dense model's second moment.
    """

    target: Tensor
    metric: Metric | None = None
    means: tuple[Tensor, Tensor] | None = None
    shrinkage: float = 0.0


def _check_moments(name: str, layer: nn.Module, weighting: Weighting, moments: Mapping[str, InputMoments]) -> None:
    if weighting.metric == "none":
        return
    if name not in moments:
        raise RequestError(f"the metric {weighting.metric!r} needs moments of {name!r}, and there are none: calibrate")
    try:
        unshrunk_metric(layer, dense_weight(layer), moments[name], weighting)
    except (RequestError, WorkError) as error:
        raise type(error)(f"{name}: {error}") from error


def _dense_problem(layer: nn.Module, weighting: Weighting, moments: InputMoments) -> _Problem:
    """Of the weight itself, on the inputs of the dense model."""
    weight = dense_weight(layer)
    metric = unshrunk_metric(layer, weight, moments, weighting)
    amount = shrinkage(weight, metric, moments, weighting)
    means = (moments.mean, moments.mean) if is_centred(layer, weighting) else None
    return _Problem(weight, shrunk(metric, amount), means, amount)


def _sequential_problem(dense: _Problem, paired: PairedMoments) -> _Problem:
    """min E‖W x − Ŵ x̃‖²: the least-squares target W E[x x̃ᵀ] E[x̃ x̃ᵀ]⁻¹, in the metric of x̃.

    The target is drawn to W by a ridge, since what the layers before have lost is only partly in x̃.
    """
    second, cross = paired.second, paired.cross
    if dense.means is not None:
        second = second - torch.outer(paired.mean, paired.mean)
        cross = cross - torch.outer(paired.dense_mean, paired.mean)
    weight = dense.target.to(torch.float64)
    ridged = second + SEQUENTIAL_RIDGE * second.diagonal().mean() * torch.eye(len(second), dtype=second.dtype)
    moved = torch.linalg.solve(ridged, (cross - second).mT).mT.to(weight)
    means = None if dense.means is None else (paired.dense_mean, paired.mean)
    output = None if dense.metric is None else dense.metric.output
    metric = as_metric(Metric(second, output), weight)
    assert metric is not None
    return _Problem(weight + weight @ moved, shrunk(metric, dense.shrinkage), means)


def _correct_bias_(layer: nn.Module, weight: Tensor, approximation: Tensor, dense_mean: Tensor, mean: Tensor) -> None:
    """b + W E[x] − Ŵ E[x̃] in place of b, so that the mean output is what it was."""
    w, approximated = weight.to(torch.float64), approximation.to(torch.float64)
    bias: Tensor = layer.bias  # type: ignore[assignment]
    bias.data += (w @ dense_mean.to(w) - approximated @ mean.to(w)).to(bias.dtype)


def _report(weight: Tensor, approximation: Tensor, layer_plan: LayerPlan, metric: Metric | None) -> LayerReport:
    w = weight.to(torch.float64)
    norm = torch.linalg.vector_norm(w).item()
    error = torch.linalg.vector_norm(w - approximation).item()
    relative = error / norm if norm else 0.0
    output_error = None
    if metric is not None:
        inputs = Metric(metric.input)
        energy = inputs.squared_norm(w)
        output_error = math.sqrt(max(0.0, inputs.squared_norm(w - approximation) / energy)) if energy else 0.0
    return LayerReport(
        relative_error=relative,
        captured_energy=1 - relative**2,
        relative_output_error=output_error,
        kept_fraction=layer_plan.num_params / layer_plan.num_params_dense,
        num_params=layer_plan.num_params,
        num_params_dense=layer_plan.num_params_dense,
    )
