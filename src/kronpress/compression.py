"""Carry out a plan: fit every targeted layer and put the structured one in its place."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from transformers import PreTrainedModel

from kronpress.calibration import PairedMoments, SequentialInputs
from kronpress.calibration.block_stream import block_prefix
from kronpress.checkpoint import attach_plan_, attached_plan, is_compressed
from kronpress.errors import RequestError, WorkError
from kronpress.folding import Sizes, check_foldable, fold_, free_dimensions, permuted_moments, search_orders
from kronpress.matrices import StructuredMatrix
from kronpress.matrices.kronecker import Kronecker
from kronpress.matrices.kronecker_in_metric import nearest_sum
from kronpress.matrices.metric import Metric, as_metric
from kronpress.matrices.moments import InputMoments
from kronpress.plan import LayerPlan, Plan, kronecker_sums, reduced_shapes
from kronpress.processes import from_process, give_, num_processes, process_number
from kronpress.recipe import Weighting
from kronpress.reduction import Block, UnitsProblem, blocks_of, fit_block, nearest_weights, put_block_, units_problem
from kronpress.rotation import rotated_
from kronpress.surgery import (
    dense_weight,
    replace_by_matrix_,
    replaceable_layers,
    stacked_weight,
    structured_layers,
    to_dense_,
    weight_shape,
)
from kronpress.weighting import WithoutHeads, is_centred, layer_metric, of_group, shrinkage, shrunk, unshrunk_metric

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
    it was. Biases are kept, or corrected by the mean output error if the plan's weighting says so. Where a launcher
    has started several processes all of them call this; each fits its share of the layers, and all get all factors.

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
    if (plan.stage > 1) != is_compressed(model):
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
        give_(model.state_dict().values())
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
    stds_of: dict[str, dict[str, float]] = {}
    for name in chain(*plan.new_groups):
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
        if layer_plan.shared_with is not None:  # whose shared factors have the size that is right for its own
            of_first = stds_of[layer_plan.shared_with]
            matrix.get_parameter("weight").data *= math.prod(
                wanted[part] / of_first[part] for part in matrix.shared_factors
            )
        stds_of[name] = wanted
        replace_by_matrix_(model, name, matrix, layer_plan.heads, layer_plan.shared_with)
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
    reports: dict[str, LayerReport] = {}
    shapes = reduced_shapes({name: plan.layers[name] for name in plan.new_layers})
    if num_processes() > 1 and not plan.weighting.sequential and not shapes:
        if plan.rotation or plan.folding:
            give_(model.state_dict().values())
        return _fitted_together(model, plan, progress, moments)
    with ExitStack() as undo:
        sequential = None
        if plan.weighting.sequential:
            folder = Path(undo.enter_context(tempfile.TemporaryDirectory()))
            sequential = undo.enter_context(SequentialInputs(model, batches, folder))
        blocks = _blocks_by_last_layer(model, shapes)
        for names in plan.new_groups:
            if names[0] in shapes and names[0] not in blocks:
                continue  # with the last of its block
            block, narrow = blocks.get(names[0], (None, {}))
            if progress is not None:
                progress(block.prefix if block else names[0], len(reports), len(plan.new_layers))
            if block is None:
                reports |= replace_layers_(model, names, plan, moments, sequential)
            else:
                reports |= _reduce_block_(model, block, narrow, plan, moments or {}, sequential)
    return {name: reports[name] for name in chain(*plan.new_groups)}


def _blocks_by_last_layer(
    model: nn.Module, shapes: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[Block, dict[str, tuple[int, int]]]]:
    """The blocks with layers that get these shapes, and those, by the last of them: its turn is that of all."""
    found = {}
    for block in blocks_of(model).values() if shapes else ():
        members = block.layers.values()
        if narrow := {name: shape for name, shape in shapes.items() if name in members}:
            found[list(narrow)[-1]] = block, narrow
    return found


def _fitted_together(
    model: nn.Module,
    plan: Plan,
    progress: Callable[[str, int, int], None] | None,
    moments: Mapping[str, InputMoments] | None,
) -> dict[str, LayerReport]:
    """Replace all layers, each fitted by one process, which gives its factors to the others."""
    owners = _owners(plan, num_processes())
    own = [names for names in plan.new_groups if owners[names[0]] == process_number()]
    fitted: dict[str, tuple[StructuredMatrix, LayerReport]] = {}
    failure: Exception | None = None
    try:
        for names in own:
            if progress is not None:
                progress(names[0], len(fitted), sum(map(len, own)))
            fitted |= _fit_layers(model, names, plan, moments)
    except Exception as error:  # the others are told when they come to the layer
        failure = error

    def report_of(name: str) -> Any:
        if name not in fitted:
            assert failure is not None
            raise failure
        return fitted[name][1].model_dump()

    reports = {}
    for name in chain(*plan.new_groups):
        layer, layer_plan = model.get_submodule(name), plan.layers[name]
        reports[name] = LayerReport.model_validate(from_process(owners[name], partial(report_of, name)))
        if name in fitted:
            matrix = fitted.pop(name)[0]
        else:
            weight = dense_weight(layer)
            matrix = layer_plan.empty_matrix(weight.dtype).to_empty(device=weight.device)
        bias = getattr(layer, "bias", None)
        given = [*matrix.state_dict().values(), *([] if bias is None else [bias])]
        give_(given, owners[name])
        replace_by_matrix_(model, name, matrix, layer_plan.heads, layer_plan.shared_with)
    return reports


def _owners(plan: Plan, num_processes: int) -> dict[str, int]:
    """Which process fits each layer: the largest first, each to the process that has the fewest entries so far.

    Those of a group are one.
    """
    entries = [0] * num_processes
    owners: dict[str, int] = {}
    sizes = {tuple(names): sum(plan.layers[name].num_params_dense for name in names) for names in plan.new_groups}
    for names in sorted(sizes, key=lambda names: -sizes[names]):
        owner = entries.index(min(entries))
        owners |= dict.fromkeys(names, owner)
        entries[owner] += sizes[names]
    return owners


def _reduce_block_(
    model: nn.Module,
    block: Block,
    shapes: Mapping[str, tuple[int, int]],
    plan: Plan,
    moments: Mapping[str, InputMoments],
    sequential: SequentialInputs | None = None,
) -> dict[str, LayerReport]:
    """Fit the layers of one block that get smaller shapes, and put them into the model; their errors."""
    widths = block.widths_of(shapes)
    units = None
    if widths.units < block.widths.units:
        units = units_problem(model, block, moments, plan.weighting)
        if sequential is not None:
            name = block.layers["down"]
            layer = model.get_submodule(name)
            dense = _dense_problem([layer], units.target, plan.weighting, [moments[name]])
            now = _sequential_problem(dense, sequential.moments(name))
            assert now.metric is not None
            units = UnitsProblem(now.target, now.metric, now.means)
    reduced = fit_block(model, block, widths, moments, plan.weighting, units)
    nearest = nearest_weights(block, reduced)
    if not all(weight.isfinite().all() for weight in nearest.values()):
        raise WorkError(f"the fit of {block.prefix} holds NaN or infinity")
    reports = {}
    for name in shapes:
        layer = model.get_submodule(name)
        weight = dense_weight(layer)
        metric = _dense_problem([layer], weight, plan.weighting, [moments[name]]).metric
        reports[name] = _report(weight, nearest.get(name, weight), plan.layers[name], metric)
    put_block_(model, block, widths, reduced)
    return reports


def _reduced_in(model: nn.Module, plan: Plan) -> list[str]:
    """The layers that the plan reduces and that have the size which it gives them."""
    layers = replaceable_layers(model)
    shapes = reduced_shapes(plan.layers)
    return [name for name, shape in shapes.items() if name in layers and weight_shape(layers[name]) == shape]


def _attach_what_was_done_(model: nn.Module, plan: Plan) -> None:
    """Attach the plan of those layers that are structured now, to a model on which `plan` was not carried out whole."""
    present, before = {*structured_layers(model), *_reduced_in(model, plan)}, attached_plan(model)
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


def replace_layers_(
    model: nn.Module,
    names: Sequence[str],
    plan: Plan,
    moments: Mapping[str, InputMoments] | None,
    sequential: SequentialInputs | None = None,
) -> dict[str, LayerReport]:
    """Fit one layer, or those of a group as one matrix, and put the structured ones in their places."""
    fitted = _fit_layers(model, names, plan, moments, sequential)
    for name, (matrix, _) in fitted.items():
        replace_by_matrix_(model, name, matrix, plan.layers[name].heads, plan.layers[name].shared_with)
    return {name: report for name, (_, report) in fitted.items()}


def _fit_layers(
    model: nn.Module,
    names: Sequence[str],
    plan: Plan,
    moments: Mapping[str, InputMoments] | None,
    sequential: SequentialInputs | None = None,
) -> dict[str, tuple[StructuredMatrix, LayerReport]]:
    """The matrices that are to replace a layer or a group; biases are corrected in place if the plan says so."""
    layers, weighting, first = [model.get_submodule(name) for name in names], plan.weighting, plan.layers[names[0]]
    weight = stacked_weight(layers)
    dense = problem = _Problem(weight)
    if moments is not None and weighting.metric != "none":
        dense = problem = _dense_problem(layers, weight, weighting, [moments[name] for name in names])
    if sequential is not None and not first.is_embedding:
        problem = _sequential_problem(dense, sequential.moments(names[0]))
    parts = [first.matrix_class.fit(problem.target.to(weight.dtype), first.spec, problem.metric, first.options)]
    if len(names) > 1:
        parts = first.matrix_class.split(parts[0], [plan.layers[name].out_features for name in names])
    fitted = {}
    for name, layer, factors in zip(names, layers, parts, strict=True):
        matrix, own = plan.layers[name].empty_matrix(weight.dtype), dense_weight(layer)
        matrix.load_state_dict(factors, strict=True, assign=True)
        approximation = matrix.to_dense().detach()
        if problem.means is not None:
            _correct_bias_(layer, own, approximation, *problem.means)
        fitted[name] = matrix, _report(own, approximation, plan.layers[name], dense.metric)
    return fitted


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


def _dense_problem(
    layers: Sequence[nn.Module], weight: Tensor, weighting: Weighting, moments_of_each: Sequence[InputMoments]
) -> _Problem:
    """Of the weight itself, that of one layer or of a group, on the inputs of the dense model."""
    layer, moments = of_group(layers, moments_of_each)
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
