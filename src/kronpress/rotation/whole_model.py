"""`rotated_`: a dense model in the basis in which its layers are fitted best, with moments to go on with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kronpress.errors import RequestError, unknown_name
from kronpress.matrices.metric import Metric
from kronpress.matrices.moments import InputMoments
from kronpress.recipe import Weighting
from kronpress.rotation.moments import TurnedMoments
from kronpress.rotation.search import MAX_SWEEPS, Fit, Rotation, Target, procrustes_rotation
from kronpress.rotation.stream import (
    check_gains,
    fold_norm_gains_,
    foldable_norms,
    has_layer_norms,
    residual_uses,
    rotate_,
    stream_norms,
)
from kronpress.surgery import dense_weight
from kronpress.weighting import unshrunk_metric


@dataclass(frozen=True)
class Rotated:
    """What `rotated_` did: the rotation with its losses, the moments that hold now, and by how much the model grew."""

    rotation: Rotation
    moments: Mapping[str, InputMoments]
    num_params_added: int


def rotated_(
    model: PreTrainedModel,
    fits: Mapping[str, Fit],
    moments: Mapping[str, InputMoments] | None,
    weighting: Weighting,
    *,
    untie: bool = False,
    max_sweeps: int = MAX_SWEEPS,
    progress: Callable[[int, float], None] = lambda _, __: None,
) -> Rotated:
    """Fold the gains of a dense model and rotate its residual stream, in place, to where the layers are fitted best.

    The logits stay as they were, and fits can go on with the moments that are returned. The metrics are those of the
    weighting without its shrinkage: what draws C to its diagonal is another thing in another basis. With `loss` the sum
    of the squared errors is what the loss rises by. With `none` and `input` each error is taken relative to its weight
    in the metric: between layers their units differ.

    Fits are made anew in every sweep, and the search is as slow as they are: they may be rougher than the last ones.

    Args:
        fits: of the layers that are to be compressed, by name.
        moments: of the model as it is, by layer; not needed for the metric `none`.
        untie: allow a tied head to get its own weight, as `fold_norm_gains_` says.

    Raises:
        RequestError: a model or gains that cannot be rotated, a name in `fits` that is no layer on the stream, missing
            moments, or the metric `magnitude`. The model is then as it was.
        WorkError: a fit is not finite. The gains are folded then, and nothing is rotated.
    """
    uses = residual_uses(model)
    norms = foldable_norms(model, untie=untie)
    check_gains(model, stream_norms(model).keys() - norms.keys())
    if weighting.metric == "magnitude":
        raise RequestError("the metric `magnitude` is one of single coordinates and does not rotate: use input or loss")
    sides = {use.module: use.side for use in uses if isinstance(model.get_submodule(use.module), nn.Linear | Conv1D)}
    folded = TurnedMoments(moments or {}, sides, norms)
    for name in fits:
        if name not in sides:
            raise unknown_name("layer on the residual stream", name, sides)
        if weighting.metric != "none":
            if name not in folded:
                raise RequestError(f"the metric {weighting.metric!r} needs moments of {name!r}: calibrate")
            layer = model.get_submodule(name)
            unshrunk_metric(layer, dense_weight(layer), folded[name], weighting)

    def target(name: str) -> Target:
        layer = model.get_submodule(name)
        weight = dense_weight(layer).to(torch.float64)
        metric = Metric()
        if weighting.metric != "none":
            metric = unshrunk_metric(layer, weight, folded[name], weighting)
        size = 1.0 if weighting.metric == "loss" else metric.squared_norm(weight)
        return Target(weight, sides[name], metric, fits[name], 1 / size if size > 0 else 0.0)

    num_added = fold_norm_gains_(model, untie=untie)
    rotation = procrustes_rotation(
        fits, target, keeps_ones=has_layer_norms(model), max_sweeps=max_sweeps, progress=progress
    )
    rotate_(model, rotation.matrix)
    return Rotated(rotation, replace(folded, rotation=rotation.matrix), num_added)
