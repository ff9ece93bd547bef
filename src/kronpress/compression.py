"""Carry out a plan: fit every targeted layer and put the structured one in its place."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from kronpress.checkpoint import attach_plan_
from kronpress.errors import RequestError, WorkError
from kronpress.planning import LayerPlan, Plan
from kronpress.surgery import dense_weight, linear_layers, replace_module_, structured_layer, weight_shape


class LayerReport(BaseModel):
    """How near one layer's Ŵ came to W. Energies are fractions of ‖W‖²_F."""

    model_config = ConfigDict(frozen=True)

    relative_error: float  # ‖W − Ŵ‖_F / ‖W‖_F
    captured_energy: float  # 1 − relative_error²
    # Kept parameters over entries: what one Kronecker term captures of a random matrix (METHODS: "chance").
    kept_fraction: float
    num_params: int
    num_params_dense: int


def compress_(
    model: nn.Module, plan: Plan, progress: Callable[[str, int, int], None] | None = None
) -> dict[str, LayerReport]:
    """Replace the planned layers of `model` in place; biases are kept as they are.

    Factors are computed in float64 and stored in the dtype and on the device of the weight they replace. All
    weights are checked before the first layer is replaced, so that a failed call leaves the model as it was.

    Args:
        progress: called with a layer's name, how many are done and how many there are.

    Returns:
        The error of every replaced layer, by its name.

    Raises:
        RequestError: the plan is of another model.
        WorkError: a weight holds NaN or infinity.
    """
    layers = linear_layers(model)
    for name, layer_plan in plan.layers.items():
        shape = (layer_plan.out_features, layer_plan.in_features)
        if name not in layers or weight_shape(layers[name]) != shape:
            there = f"is {weight_shape(layers[name])}" if name in layers else "is no linear layer"
            raise RequestError(f"the plan is of another model: it has {name!r} of shape {shape}, which here {there}")
        weight = layers[name].weight
        if not weight.isfinite().all():  # type: ignore[operator, union-attr]
            raise WorkError(f"the weight of {name!r} holds NaN or infinity")

    reports = {}
    for done, (name, layer_plan) in enumerate(plan.layers.items()):
        if progress is not None:
            progress(name, done, len(plan.layers))
        weight = dense_weight(layers[name])
        matrix = layer_plan.matrix_class.from_dense(weight, layer_plan.spec, options=layer_plan.options)
        reports[name] = _report(weight, matrix.to_dense().detach(), layer_plan)
        replace_module_(model, name, structured_layer(layers[name], matrix))
    attach_plan_(model, plan)
    return reports


def _report(weight: Tensor, approximation: Tensor, layer_plan: LayerPlan) -> LayerReport:
    w = weight.to(torch.float64)
    norm = torch.linalg.vector_norm(w).item()
    error = torch.linalg.vector_norm(w - approximation).item()
    relative = error / norm if norm else 0.0
    return LayerReport(
        relative_error=relative,
        captured_energy=1 - relative**2,
        kept_fraction=layer_plan.num_params / layer_plan.num_params_dense,
        num_params=layer_plan.num_params,
        num_params_dense=layer_plan.num_params_dense,
    )
