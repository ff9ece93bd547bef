"""The metric in which one layer is fitted: from what calibration measured, as a recipe's `weighting` says."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kronpress.errors import RequestError
from kronpress.matrices.low_rank import nearest_product
from kronpress.matrices.metric import Metric, as_metric, metric_of
from kronpress.matrices.moments import DerivedMoments, InputMoments
from kronpress.recipe import Weighting

# What is tried where the shrinkage is chosen.
SHRINKAGES = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
# At least this where there are fewer tokens than inputs, and nothing was held out to choose it by.
SHRINKAGE_UNSEEN = 0.1


def is_centred(layer: nn.Module, weighting: Weighting) -> bool:
    """Whether the layer's bias takes up the mean output error, so that the rest is fitted about the mean."""
    return weighting.bias_correction and getattr(layer, "bias", None) is not None


def of_group(layers: Sequence[nn.Module], moments: Sequence[InputMoments]) -> tuple[nn.Module, InputMoments]:
    """By which layer and moments layers that read the same input are fitted as one matrix, one above the other.

    They have the same C. G has those of all on its diagonal: what the loss's gradients by outputs of different layers
    have to do with one another is not measured. About the mean they are fitted only if each has a bias to take it up.
    """
    if len(layers) == 1:
        return layers[0], moments[0]
    layer = next((each for each in layers if getattr(each, "bias", None) is None), layers[0])
    gradients = [each.gradient for each in moments]
    known = [each for each in gradients if each is not None]
    gradient = torch.block_diag(*known) if len(known) == len(gradients) else None
    return layer, replace(moments[0], gradient=gradient)


def layer_metric(layer: nn.Module, weight: Tensor, moments: InputMoments, weighting: Weighting) -> Metric:
    """`unshrunk_metric` with its inputs' second moment shrunk as the weighting says."""
    metric = unshrunk_metric(layer, weight, moments, weighting)
    return shrunk(metric, shrinkage(weight, metric, moments, weighting))


def unshrunk_metric(layer: nn.Module, weight: Tensor, moments: InputMoments, weighting: Weighting) -> Metric:
    """The metric for `weight` (m, n), the weight of `layer`, by its moments; in float64 on the weight's device.

    `input` and `loss` are `metric_of` without and with the loss's gradients. `magnitude` is C = diag(E|x|): ASVD's
    W·diag(s^α) with s = E|x| and α = ½ (arXiv 2312.05821).

    Raises:
        RequestError: the moments are of another size, or without what the metric needs.
        WorkError: they hold NaN or infinity.
    """
    if moments.counts is not None:
        metric = _embedding_metric(moments, weighting)
    elif weighting.metric == "magnitude":
        if moments.magnitude is None:
            raise RequestError("the metric `magnitude` needs E|x|, which these moments do not have: calibrate anew")
        metric = Metric(torch.diag(moments.magnitude))
    else:
        metric = metric_of(moments, output=weighting.metric == "loss", centred=is_centred(layer, weighting))
    checked = as_metric(metric, weight)
    assert checked is not None
    return checked


def _embedding_metric(moments: InputMoments, weighting: Weighting) -> Metric:
    """tr(D ΔW M ΔWᵀ) for an embedding's table W (vocab, width), D the diagonal of how often each row is looked up.

    A row v that was looked up moves the loss by ½ ΔW_v G ΔW_vᵀ to second order, with G = E[g gᵀ] of the gradient by
    the embedding's output. A head tied to it moves it by ½ E[Var_p(ΔW h)] with p its prediction, at most
    ½ Σ_v E[p_v] ΔW_v H ΔW_vᵀ with H = E[h hᵀ] of what it reads; and the mean prediction E[p] is about D. So with the
    metric `loss` M = G + H. Otherwise M = H, or the identity without a head.

    Rows that were not seen count as if seen once, the weight of rare rows being uncertain anyway.
    """
    assert moments.counts is not None
    frequencies = (moments.counts + 1) / (moments.counts + 1).sum()
    has_heads = bool(moments.second.any())
    if weighting.metric == "loss":
        if moments.gradient is None:
            raise RequestError(
                "the metric `loss` needs the loss's gradients: calibrate a model that predicts tokens, with "
                "calibration.sensitivity=true"
            )
        return Metric(moments.gradient + moments.second, frequencies)
    return Metric(moments.second if has_heads else None, frequencies)


@dataclass(frozen=True, eq=False)
class WithoutHeads(DerivedMoments[InputMoments]):
    """Moments in which the embeddings `names` have no tied heads: theirs keep the dense table, whatever replaces it."""

    names: Collection[str]

    def __getitem__(self, layer: str) -> InputMoments:
        found = self.moments[layer]
        if layer not in self.names:
            return found
        nothing = torch.zeros_like(found.mean)
        return replace(found, second=torch.diag(nothing), mean=nothing, magnitude=nothing, held_out=None)


def shrunk(metric: Metric, amount: float) -> Metric:
    """The metric with (1 − ρ) C + ρ diag(C) in place of C, ρ being the `amount`."""
    if amount == 0 or metric.input is None:
        return metric
    return replace(metric, input=(1 - amount) * metric.input + amount * torch.diag(metric.input.diagonal()))


def shrinkage(weight: Tensor, metric: Metric, moments: InputMoments, weighting: Weighting) -> float:
    """ρ of `shrunk`: the recipe's, or that with the least output error on the inputs that were held out.

    It is chosen for low rank at half of the parameters of `weight` (m, n), whatever will be fitted. Where there are
    fewer tokens than inputs C is singular for want of data alone: there it is never 0.
    """
    asked = weighting.shrinkage if isinstance(weighting.shrinkage, float) else None  # None: held_out
    is_short = moments.num_tokens < len(moments.mean)
    if metric.input is None or weighting.metric == "magnitude" or moments.counts is not None:
        return 0.0
    if asked is not None and not is_short:
        return asked
    if moments.held_out is None:
        return max(SHRINKAGE_UNSEEN, asked or 0.0)
    # Of the inputs themselves, not about their mean: that of the held-out ones is not known.
    seen, unseen = (replace(metric, input=each.to(metric.input)) for each in (moments.second, moments.held_out))
    rank = max(1, weight.numel() // (2 * sum(weight.shape)))
    w = weight.to(torch.float64)

    def error(amount: float) -> float:
        u, v = nearest_product(w, rank, shrunk(seen, amount).where_it_sees)
        return unseen.squared_norm(w - u @ v)

    return min(SHRINKAGES[1 if is_short else 0 :], key=error)
