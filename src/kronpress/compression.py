"""Carry out a plan: fit every targeted layer and put the structured one in its place."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from transformers import PreTrainedModel

from kronpress.calibration import PairedMoments, SequentialInputs
from kronpress.calibration.block_stream import block_prefix
from kronpress.checkpoint import attach_plan_, attached_plan
from kronpress.errors import RequestError, WorkError
from kronpress.folding import Sizes, check_foldable, fold_, free_dimensions, permuted_moments, search_orders
from kronpress.matrices.kronecker import Kronecker
from kronpress.matrices.kronecker_in_metric import nearest_sum
from kronpress.matrices.metric import Metric, as_metric
from kronpress.matrices.moments import InputMoments
from kronpress.plan import LayerPlan, Plan, kronecker_sums
from kronpress.recipe import Weighting
from kronpress.rotation import rotated_
from kronpress.surgery import (
    dense_weight,
    replace_by_matrix_,
    replaceable_layers,
    structured_layers,
    to_dense_,
    weight_shape,
)
from kronpress.weighting import WithoutHeads, is_centred, layer_metric, shrinkage, shrunk, unshrunk_metric

# Relative to the mean second moment of the inputs.
SEQUENTIAL_RIDGE = 1e-2
# Of the search for a rotation: in each every layer is fitted anew. What more turns of an alternation would gain a fit,
# the next rotation gains more cheaply.
ROTATION_SWEEPS = 40
ROTATION_FIT_SWEEPS = 3
# Of a matrix whose error is reported, at once.
REPORTED_NUMEL = 2**18


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
    batches: Iterable[Any] = (),
    messages: Callable[[str], None] = lambda _: None,
) -> dict[str, LayerReport]:
    """Replace the planned layers of `model` in place, each by the fit that is nearest in the plan's metric.

    Factors are computed in float64 and stored in the dtype and on the device of the weight they replace. All
    weights and moments are checked before the first layer is replaced, so that such a failure leaves the model as
    it was. Biases are kept, or corrected by the mean output error if the plan's weighting says so.

    Where a later step fails, or is interrupted, what was replaced stays, nothing being kept of the dense weights. The
    model then has a plan attached that says just this, with true totals, so that it can be saved and loaded or made
    dense again; with no structured layer it is a dense model, rotated and folded as far as the work had come.

    Args:
        progress: called with a layer's name, how many are done and how many there are.
        moments: of the dense model's inputs, by layer; needed for every metric but `none`.
        batches: token ids or dictionaries as for `calibrate`, needed if the plan is sequential: then W x of the dense
            model is approximated by Ŵ x̃ on the inputs x̃ that the layers replaced so far give.
        messages: told what is done before the first layer is fitted, which may take long.

    Returns:
        The error of every replaced layer, by its name.

    Raises:
        RequestError: the plan is of another model, or moments are missing or of another model.
        WorkError: a weight or a moment holds NaN or infinity, or a fit does.
    """
    layers = replaceable_layers(model)
    weighting = plan.weighting
    batches = list(batches)
    if weighting.sequential and not batches:
        raise RequestError("the plan is sequential: compress_ needs the calibration's batches of tokens")
    if (plan.stage > 1) != bool(structured_layers(model)):
        given = "has been compressed already" if plan.stage == 1 else "is dense"
        raise RequestError(f"the plan is stage {plan.stage}, of another model: this one {given}")
    check_shapes(layers, plan)
    for name in plan.new_layers:
        if not dense_weight(layers[name]).isfinite().all():
            raise WorkError(f"the weight of {name!r} holds NaN or infinity")
        check_moments(name, layers[name], weighting, moments or {})

    _check_steps(model, plan)
    moments = without_lost_heads(plan, moments)
    try:
        reports = _carried_out(model, plan, progress, moments, batches, messages)
    except BaseException:  # an interruption too
        _attach_what_was_done_(model, plan)
        raise
    attach_plan_(model, plan)
    return reports


def initialise_(model: nn.Module, plan: Plan) -> None:
    """Replace the planned layers in place by structures with random factors, to be trained from scratch.

    The entries of every W have the mean square of the dense weight that stood there: a model freshly made from its
    configuration keeps the variance of all its outputs. Nothing is fitted; the plan's weighting has no say.

    Raises:
        RequestError: the plan is of another model.
    """
    check_shapes(replaceable_layers(model), plan)
    for name in plan.new_layers:
        weight, layer_plan = dense_weight(model.get_submodule(name)).detach(), plan.layers[name]
        sizes = layer_plan.out_features, layer_plan.in_features, layer_plan.spec
        matrix = layer_plan.matrix_class(*sizes, weight.dtype, weight.device, layer_plan.options)
        drawn, wanted = (
            matrix.initial_stds(*sizes, mean_square)
            for mean_square in (1 / layer_plan.in_features, weight.square().mean().item())
        )
        with torch.no_grad():
            for part, factor in matrix.named_parameters():
                factor.mul_(wanted[part] / drawn[part])
        replace_by_matrix_(model, name, matrix, layer_plan.heads)
    attach_plan_(model, plan)


def _carried_out(
    model: nn.Module,
    plan: Plan,
    progress: Callable[[str, int, int], None] | None,
    moments: Mapping[str, InputMoments] | None,
    batches: list[Any],
    messages: Callable[[str], None],
) -> dict[str, LayerReport]:
    """The plan's steps, in place, once all is checked; the error of every replaced layer."""
    # What is compressed again is dense meanwhile, so that it can be folded too.
    to_dense_(model, plan.new_layers)
    if plan.rotation:
        moments = _rotate_(model, plan, moments, messages)
    if plan.folding:
        messages(f"looking for orders of units to fold: {', '.join(plan.folding)}")
        moments = _fold_(model, plan, moments)
    reports = {}
    with ExitStack() as undo:
        sequential = None
        if plan.weighting.sequential:
            folder = Path(undo.enter_context(tempfile.TemporaryDirectory()))
            sequential = undo.enter_context(SequentialInputs(model, batches, folder))
        for done, name in enumerate(plan.new_layers):
            if progress is not None:
                progress(name, done, len(plan.new_layers))
            reports[name] = replace_layer_(model, name, plan, moments, sequential)
    return reports


def _attach_what_was_done_(model: nn.Module, plan: Plan) -> None:
    """Attach the plan of those layers that are structured now, to a model on which `plan` was not carried out whole."""
    present, before = structured_layers(model), attached_plan(model)
    # Until it has replaced a layer, the model is what the stage before has left, but for what is made dense.
    done = plan if any(name in present for name in plan.new_layers) else before
    if not present and isinstance(model, PreTrainedModel) and before is not None:
        model.dequantize()  # which takes its plan off
    elif present and done is not None:
        # The head loses its tie with the rotation, or when its embedding is replaced.
        is_tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
        untied = 0 if is_tied else done.num_params_untied
        attach_plan_(model, done.without([name for name in done.layers if name not in present], untied))


def _new_sums(plan: Plan) -> dict[str, Sizes]:
    return kronecker_sums({name: plan.layers[name] for name in plan.new_layers})


def without_lost_heads(plan: Plan, moments: Mapping[str, InputMoments] | None) -> Mapping[str, InputMoments] | None:
    """The moments in which an embedding has no heads that the plan leaves dense."""
    alone = [name for name in plan.new_layers if plan.layers[name].is_embedding and not plan.layers[name].heads]
    return None if moments is None else WithoutHeads(moments, alone)


def check_shapes(layers: Mapping[str, nn.Module], plan: Plan) -> None:
    """RequestError if a layer that the plan replaces is not there, or has another shape."""
    for name in plan.new_layers:
        shape = (plan.layers[name].out_features, plan.layers[name].in_features)
        if name not in layers or weight_shape(layers[name]) != shape:
            there = f"is {weight_shape(layers[name])}" if name in layers else "is no linear layer or embedding"
            raise RequestError(f"the plan is of another model: it has {name!r} of shape {shape}, which here {there}")


def _check_steps(model: nn.Module, plan: Plan) -> None:
    """Refuse what the plan's steps would refuse after some layers were replaced."""
    if plan.folding:
        check_foldable(model, plan.folding, _new_sums(plan), plan.new_layers)
    prefix = block_prefix(model)
    for name in plan.new_layers if plan.weighting.sequential and prefix is not None else ():
        if not plan.layers[name].is_embedding and not name.startswith(f"{prefix}."):
            raise RequestError(f"{name!r} is in no transformer block: it cannot be fitted sequentially")


def _rotate_(
    model: nn.Module, plan: Plan, moments: Mapping[str, InputMoments] | None, messages: Callable[[str], None]
) -> Mapping[str, InputMoments] | None:
    """Rotate the residual stream to where the plan's fits come nearest; the moments then. The logits stay."""
    if not isinstance(model, PreTrainedModel):
        raise RequestError("rotation: the residual stream of this model is not known; it is no transformers model")

    def fit(layer_plan: LayerPlan, weight: Tensor, metric: Metric) -> Tensor:
        structure, spec, options = layer_plan.matrix_class, layer_plan.spec, layer_plan.options
        if structure is Kronecker and options == Kronecker.Options():
            sizes = spec.left_shape, spec.right_shape, spec.num_terms
            left, right = nearest_sum(weight, *sizes, metric.where_it_sees, max_sweeps=ROTATION_FIT_SWEEPS)
            return structure.expand({"weight": left.transpose(0, 1), "right": right.transpose(0, 1)})
        return structure.expand(structure.fit(weight, spec, metric, options))

    fits = {name: partial(fit, plan.layers[name]) for name in plan.new_layers}

    def progress(done: int, loss: float) -> None:
        messages(f"rotating the residual stream: {done} of at most {ROTATION_SWEEPS} rounds, error {loss:.4g}")

    rotated = rotated_(model, fits, moments, plan.weighting, untie=True, max_sweeps=ROTATION_SWEEPS, progress=progress)
    return None if moments is None else rotated.moments


def _fold_(
    model: nn.Module, plan: Plan, moments: Mapping[str, InputMoments] | None
) -> Mapping[str, InputMoments] | None:
    """Put the units of the plan's free dimensions into the best order found for its Kronecker sums; the moments then.

    What the model computes stays as it was.
    """
    assert isinstance(model, PreTrainedModel)

    def metric(name: str) -> Metric | None:
        if moments is None or plan.weighting.metric == "none":
            return None
        layer = model.get_submodule(name)
        return layer_metric(layer, dense_weight(layer), moments[name], plan.weighting)

    dimensions = free_dimensions(model)
    for name, order in search_orders(model, plan.folding, _new_sums(plan), metric).items():
        fold_(model, dimensions[name], order)
        moments = None if moments is None else permuted_moments(moments, dimensions[name], order)
    return moments


def replace_layer_(
    model: nn.Module,
    name: str,
    plan: Plan,
    moments: Mapping[str, InputMoments] | None,
    sequential: SequentialInputs | None = None,
) -> LayerReport:
    """Fit one layer, and put the structured one in its place."""
    layer, layer_plan, weighting = model.get_submodule(name), plan.layers[name], plan.weighting
    weight = dense_weight(layer)
    dense = problem = _Problem(weight)
    if moments is not None and weighting.metric != "none":
        dense = problem = _dense_problem(layer, weighting, moments[name])
    if sequential is not None and not layer_plan.is_embedding:
        problem = _sequential_problem(dense, sequential.moments(name))
    matrix = layer_plan.matrix_class.from_dense(
        problem.target.to(weight.dtype), layer_plan.spec, problem.metric, layer_plan.options
    )
    approximation = matrix.to_dense().detach()
    if problem.means is not None:
        _correct_bias_(layer, weight, approximation, *problem.means)
    replace_by_matrix_(model, name, matrix, layer_plan.heads)
    return _report(weight, approximation, layer_plan, dense.metric)


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


def check_moments(name: str, layer: nn.Module, weighting: Weighting, moments: Mapping[str, InputMoments]) -> None:
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
    # A few rows at a time: in float64 a whole matrix would be the largest thing in memory.
    energy = error = 0.0
    step = max(1, REPORTED_NUMEL // weight.shape[1])
    for some, approximated in zip(weight.split(step), approximation.split(step), strict=True):
        in_double = some.to(torch.float64)
        energy += in_double.square().sum().item()
        error += (in_double - approximated).square_().sum().item()
    relative = math.sqrt(error / energy) if energy else 0.0
    output_error = None
    if metric is not None:
        w = weight.to(torch.float64)
        # The output of an embedding's rows is as frequent as they are.
        inputs = metric if layer_plan.is_embedding else Metric(metric.input)
        output_energy = inputs.squared_norm(w)
        output_error = (
            math.sqrt(max(0.0, inputs.squared_norm(w - approximation) / output_energy)) if output_energy else 0.0
        )
    return LayerReport(
        relative_error=relative,
        captured_energy=1 - relative**2,
        relative_output_error=output_error,
        kept_fraction=layer_plan.num_params / layer_plan.num_params_dense,
        num_params=layer_plan.num_params,
        num_params_dense=layer_plan.num_params_dense,
    )
