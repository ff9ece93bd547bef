"""The residual stream of a dense model: gains of norms folded into the layers behind them, and its rotation.

Letters: d is the width; a norm answers g ∘ z + β; W (out_features, in_features); Q (d, d). The stream x becomes Qᵀ x.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kronpress.errors import RequestError
from kronpress.families import ATTENTION_ROLES, FAMILIES, MLP_ROLES
from kronpress.folding import RESIDUALS, Use, free_dimensions
from kronpress.surgery import dense_weight

# How far the entries of Qᵀ Q may be from those of the identity: what single precision leaves.
ORTHOGONALITY = 1e-5
# A norm whose stored weight is its gain less this.
_GAIN_OFFSETS = {"gemma": 1.0}
_NORM_READERS = (ATTENTION_ROLES, MLP_ROLES)  # of a block's first and second norm
_WRITERS = ("output", "down")


@dataclass(frozen=True)
class FoldedNorm:
    """A norm that answered gain ∘ z + bias and now answers z + rest, both (d,) in float64, and who reads it.

    The bias is in the readers' biases and `rest` is zero; where a reader has no bias, `rest` is bias / gain.
    """

    gain: Tensor
    bias: Tensor
    rest: Tensor
    readers: tuple[str, ...]


def foldable_norms(model: PreTrainedModel, *, untie: bool = False) -> dict[str, FoldedNorm]:
    """What `fold_norm_gains_` would do, by the norm's name; the model is not touched.

    Raises:
        RequestError: as `fold_norm_gains_`.
    """
    residual_uses(model)
    norms = stream_norms(model)
    final = RESIDUALS[model.config.model_type].final_norm
    if _has_tied_head(model) and not untie:
        del norms[final]
    found = {}
    for name, readers in norms.items():
        for reader in readers:
            layer = model.get_submodule(reader)
            if not isinstance(layer, nn.Linear | Conv1D):
                raise RequestError(f"{reader} is a {type(layer).__name__}: gains are folded into dense layers only")
        norm = model.get_submodule(name)
        gain = _gain(model, name)
        if gain is None:
            continue
        bias = _bias(norm)
        rest = torch.zeros_like(bias)
        if any(model.get_submodule(reader).bias is None for reader in readers) and bias.any():
            lost = torch.nonzero((gain == 0) & (bias != 0)).flatten().tolist()
            if lost:
                raise RequestError(
                    f"{name} has gain 0 and a bias at coordinate {lost[0]}, and {readers[0]} no bias to take it up: "
                    "its gain cannot be folded"
                )
            rest = torch.where(gain == 0, 0.0, bias / gain)
        found[name] = FoldedNorm(gain, bias, rest, readers)
    return found


@torch.no_grad()
def fold_norm_gains_(model: PreTrainedModel, *, untie: bool = False) -> int:
    """Put the gain and bias of each norm into the linear layers that read it, in place; the logits stay.

    W (g ∘ z + β) + b = (W diag(g)) z + (W β + b). Afterwards the gains are 1 and the biases 0, and the norms are still
    those of the model's class. The final norm is read by the head: where that is tied to the embedding the norm is left
    as it is, or with `untie`, whatever the gain, the head gets a weight of its own and
    `config.tie_word_embeddings` becomes False. A bias that a reader without one cannot take up stays as β / g in the
    norm, as before an untied head; `rotate_` rotates it there.

    Returns:
        By how many parameters the model has grown: vocabulary × width if the head was untied, otherwise 0.

    Raises:
        RequestError: a model that `free_dimensions` does not know, or whose norms stand behind the sums (OPT with
            `do_layer_norm_before` False); a gain of 0 whose bias no reader can take up.
    """
    norms = foldable_norms(model, untie=untie)
    residual = RESIDUALS[model.config.model_type]
    num_added = 0
    if untie and _has_tied_head(model):
        num_added = _untie_(model, residual.head)
    for name, folded in norms.items():
        for reader in folded.readers:
            layer = model.get_submodule(reader)
            weight, bias = dense_weight(layer), layer.bias
            w = weight.to(torch.float64)
            if not folded.rest.any() and bias is not None:
                bias.copy_(bias + w @ folded.bias)  # type: ignore[operator]
            weight.copy_(w * folded.gain)
        norm = model.get_submodule(name)
        norm.weight.fill_(1 - _GAIN_OFFSETS.get(model.config.model_type, 0.0))  # type: ignore[operator, union-attr]
        if getattr(norm, "bias", None) is not None:
            norm.bias.copy_(folded.rest)  # type: ignore[operator, union-attr]
    return num_added


def _has_tied_head(model: PreTrainedModel) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _untie_(model: PreTrainedModel, head: str) -> int:
    layer = model.get_submodule(head)
    weight: nn.Parameter = layer.weight  # type: ignore[assignment]
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    model.config.tie_word_embeddings = False
    tied = model.all_tied_weights_keys
    model.all_tied_weights_keys = {key: source for key, source in tied.items() if key != f"{head}.weight"}
    return weight.numel()


def stream_norms(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """The layers that read each norm of the residual stream, by the norm's name."""
    family, residual = FAMILIES[model.config.model_type], RESIDUALS[model.config.model_type]
    found = {}
    for number, _ in model.get_submodule(family.blocks).named_children():
        for norm, roles in zip(residual.block_norms, _NORM_READERS, strict=True):
            readers = [name for role, name in family.roles.items() if role in roles and role not in _WRITERS]
            prefix = f"{family.blocks}.{number}"
            found[f"{prefix}.{norm}"] = tuple(f"{prefix}.{reader}" for reader in readers)
    found[residual.final_norm] = (residual.head,)
    return found


def _gain(model: PreTrainedModel, norm: str) -> Tensor | None:
    """(d,) in float64; None if the norm has none."""
    weight = model.get_submodule(norm).weight
    offset = _GAIN_OFFSETS.get(model.config.model_type, 0.0)
    return None if weight is None else weight.detach().to(torch.float64) + offset  # type: ignore[operator, union-attr]


def _bias(norm: nn.Module) -> Tensor:
    """(d,) in float64."""
    weight: Tensor = norm.weight  # type: ignore[assignment]
    bias = getattr(norm, "bias", None)
    return torch.zeros_like(weight, dtype=torch.float64) if bias is None else bias.detach().to(torch.float64, copy=True)


def _is_constant(gain: Tensor | None) -> bool:
    return gain is None or bool((gain == gain[0]).all())


def residual_uses(model: PreTrainedModel) -> tuple[Use, ...]:
    """Who writes and who reads the residual stream."""
    if not getattr(model.config, "do_layer_norm_before", True):
        raise RequestError(
            f"the {model.config.model_type} model has its norms behind the sums (do_layer_norm_before is False): "
            "their gains cannot be folded, and no rotation passes them"
        )
    return free_dimensions(model)["residual"].uses


@torch.no_grad()
def rotate_(model: PreTrainedModel, rotation: Tensor) -> None:
    """Rotate the residual stream in place by an orthogonal Q (d, d): x becomes Qᵀ x everywhere, and the logits stay.

    Embeddings E (tokens, d) become E Q, readers W Q, writers Qᵀ W and Qᵀ b; so do the biases of norms. Any Q passes
    z = x / |x|, since |Qᵀ x| = |x|. LayerNorm also takes off the mean, which is (1ᵀ x / d) 1: only a Q that has the
    vector of ones as an eigenvector passes it.

    Raises:
        RequestError: a model that `free_dimensions` does not know; Q is of another size or not orthogonal; the norms
            are LayerNorms and Q does not keep the vector of ones; a norm's gain is not constant.
    """
    uses = residual_uses(model)
    norms = stream_norms(model)
    size = len(uses[0].channels[0])
    q = rotation.detach().to(torch.float64)
    if q.shape != (size, size):
        raise RequestError(f"the rotation is {tuple(q.shape)}, and the residual stream is {size} wide")
    error = (q.mT @ q - torch.eye(size).to(q)).abs().max().item()
    if not error <= ORTHOGONALITY:
        raise RequestError(f"the rotation is not orthogonal: QᵀQ is off the identity by {error:.1e}")
    ones = torch.full((size,), size**-0.5).to(q)
    image = q @ ones
    if has_layer_norms(model) and not (image - torch.sign(image.sum()) * ones).abs().max() <= ORTHOGONALITY:
        raise RequestError(
            f"the rotation moves the vector of ones, and the {model.config.model_type} model has LayerNorms, "
            "which only rotations with Q 1 = 1 pass"
        )
    check_gains(model, norms)
    parameters = [each for use in uses for each in _axes(model, use, use.module in norms)]
    turned: set[int] = set()
    for parameter, axis in parameters:
        if id(parameter) not in turned:  # a tied weight is turned once
            turned.add(id(parameter))
            rows = torch.atleast_2d(parameter.movedim(axis, -1))
            turn = q.to(parameter.device)
            for some in rows.split(2**13):
                some.copy_(some.to(torch.float64) @ turn)


def has_layer_norms(model: PreTrainedModel) -> bool:
    """Whether a norm of the residual stream takes off the mean, so that a rotation has to keep the vector of ones."""
    return any(isinstance(model.get_submodule(name), nn.LayerNorm) for name in stream_norms(model))


def check_gains(model: PreTrainedModel, norms: Iterable[str]) -> None:
    for name in norms:
        if not _is_constant(_gain(model, name)):
            raise RequestError(
                f"{name} has a gain that is not constant, which no rotation passes: fold_norm_gains_ first; "
                "that of the last norm before a tied head takes untie=True, which gives the head its own weight"
            )


def _axes(model: PreTrainedModel, use: Use, is_norm: bool) -> Iterator[tuple[nn.Parameter, int]]:
    """The parameters that turn with the stream, each with the axis that is in its coordinates."""
    module = model.get_submodule(use.module)
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if isinstance(module, Conv1D):
        yield weight, 1 if use.side == "out" else 0  # type: ignore[misc]
    elif isinstance(module, nn.Linear):
        yield weight, 0 if use.side == "out" else 1  # type: ignore[misc]
    elif isinstance(module, nn.Embedding):
        yield weight, 1  # type: ignore[misc]
    elif not is_norm:
        raise RequestError(f"{use.module} is a {type(module).__name__}: only dense layers are rotated")
    if use.side == "out" and isinstance(bias, nn.Parameter):
        yield bias, 0
