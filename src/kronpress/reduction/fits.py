"""One block's matrices with smaller widths, each pair of them fitted together; and putting them into the model.

Letters as in decompositions.py; W (out_features, in_features) and b of a layer, x what the attention reads.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kronpress.matrices.metric import Metric
from kronpress.matrices.moments import InputMoments
from kronpress.recipe import Weighting
from kronpress.reduction.attention import PAIRS, reduce_attention_, restore_attention_
from kronpress.reduction.blocks import READERS, Block, Shape, Widths, blocks_of
from kronpress.reduction.decompositions import channel_scores, leverage_scores, most, nystrom, ordered_units, subspace
from kronpress.surgery import dense_weight, replace_module_, weight_shape
from kronpress.weighting import is_centred, layer_metric


@dataclass(frozen=True)
class Matrix:
    """W (out_features, in_features) and b (out_features,) of one role; in float64."""

    weight: Tensor
    bias: Tensor | None


@dataclass
class ReducedBlock:
    """What takes the place of a block's matrices, by role, and `nearest`: the W of full size that does the same.

    Of values and output projection, whose inner basis is another one, it is what the pair makes of either. `pairs` are
    the kept rotary pairs (key heads, query_key/2) if not all are.
    """

    matrices: dict[str, Matrix] = field(default_factory=dict)
    nearest: dict[str, Tensor] = field(default_factory=dict)
    pairs: Tensor | None = None


class UnitsProblem(NamedTuple):
    """What the hidden units that stay are fitted to: the reading layer's weight (m, h), in which metric, whose mean.

    `means` are E[s] of the dense model's units and of those that there will be; None if the bias is kept.
    """

    target: Tensor
    metric: Metric
    means: tuple[Tensor, Tensor] | None


def units_problem(
    model: nn.Module, block: Block, moments: Mapping[str, InputMoments], weighting: Weighting
) -> UnitsProblem:
    """That of the layer itself, on the inputs of the dense model."""
    name = block.layers["down"]
    layer, seen = model.get_submodule(name), moments[name]
    weight = dense_weight(layer).to(torch.float64)
    means = (seen.mean, seen.mean) if is_centred(layer, weighting) else None
    return UnitsProblem(weight, layer_metric(layer, weight, seen, weighting), means)


def read_matrices(model: nn.Module, block: Block, names: Collection[str]) -> dict[str, Matrix]:
    """The matrices of these layers of a block by role, in float64: those of a fused layer each by itself."""
    found = {}
    for name, roles in block.parts.items():
        if name not in names:
            continue
        layer = model.get_submodule(name)
        weight = dense_weight(layer).to(torch.float64)
        bias: Tensor | None = layer.bias  # type: ignore[assignment]
        bias = None if bias is None else bias.detach().to(torch.float64)
        sizes = [block.num_features(role, block.widths) for role in roles] if len(roles) > 1 else [len(weight)]
        biases = [None] * len(roles) if bias is None else bias.split(sizes)
        found.update({r: Matrix(w, b) for r, w, b in zip(roles, weight.split(sizes), biases, strict=True)})
    return found


def fit_block(
    model: nn.Module,
    block: Block,
    widths: Widths,
    moments: Mapping[str, InputMoments],
    weighting: Weighting,
    units: UnitsProblem | None = None,
) -> ReducedBlock:
    """The matrices of a dense block for these widths, by MoDeGPT; only those of layers that have a width that changes.

    Args:
        units: what the units that stay are fitted to, if not to the dense model alone.
    """
    changed = {width for width, size in vars(widths).items() if size < getattr(block.widths, width)}
    matrices = read_matrices(model, block, {name for width in changed for name in block.members(width)})
    reduced = ReducedBlock(matrices, {role: each.weight for role, each in matrices.items()})
    if "units" in changed:
        _fit_units_(reduced, widths, units or units_problem(model, block, moments, weighting))
    if "query_key" in changed:
        _fit_queries_and_keys_(reduced, block, widths, moments, weighting)
    if "value" in changed:
        _fit_values_(reduced, model, block, widths, moments, weighting)
    return reduced


def _fit_units_(reduced: ReducedBlock, widths: Widths, problem: UnitsProblem) -> None:
    """Keep the best units with their own biases; the layer behind them makes up for the others.

    With the metric of the loss these are the first of `ordered_units`; otherwise, as published, those with the highest
    leverage scores.
    """
    second, down = problem.metric.input, reduced.matrices["down"]
    assert second is not None
    if problem.metric.output is not None:
        kept = ordered_units(problem.target, problem.metric)[0][: widths.units].sort().values
    else:
        kept = most(leverage_scores(second), widths.units)
    weight, bias = nystrom(problem.target, second, kept), down.bias
    if problem.means is not None:
        assert bias is not None
        dense_mean, mean = (each.to(weight) for each in problem.means)
        bias = bias + down.weight @ dense_mean - weight @ mean[kept]
    reduced.matrices["down"] = Matrix(weight, bias)
    reduced.nearest["down"] = torch.zeros_like(down.weight).index_copy(1, kept, weight)
    for role in {"gate", "up"} & reduced.matrices.keys():
        _select_(reduced, role, kept)


def _select_(reduced: ReducedBlock, role: str, kept: Tensor) -> None:
    """Keep these outputs of a role and drop the others."""
    old = reduced.matrices[role]
    reduced.matrices[role] = Matrix(old.weight[kept], None if old.bias is None else old.bias[kept])
    reduced.nearest[role] = torch.zeros_like(old.weight).index_copy(0, kept, old.weight[kept])


def _fit_queries_and_keys_(
    reduced: ReducedBlock, block: Block, widths: Widths, moments: Mapping[str, InputMoments], weighting: Weighting
) -> None:
    """Keep the channels with the highest scores of each key head, in its query heads too.

    Where no rotation is between them, a constant in a key adds the same to all scores of a query, which softmax does
    not see: with the bias correction keys count by their variance.
    """
    heads = (block.num_heads, block.num_key_heads)
    energies = []
    for role, count in zip(("query", "key"), heads, strict=True):
        seen = moments[_layer_of(block, role)]
        energy, mean = _energy_and_mean(reduced.matrices[role], seen)
        if role == "key" and weighting.bias_correction and not block.is_rotary:
            energy = energy - mean.square()
        energies.append(energy.reshape(count, -1))
    scores = channel_scores(energies[0], energies[1], pairs=block.is_rotary)
    kept = most(scores, widths.query_key // block.step("query_key"))
    if block.is_rotary:
        reduced.pairs = kept
    for role, count in zip(("query", "key"), heads, strict=True):
        _select_(reduced, role, channel_places(block, kept, count))


def channel_places(block: Block, kept: Tensor, num_heads: int) -> Tensor:
    """The outputs of queries (or keys) that are kept where `kept` (key heads, channels or rotary pairs) are."""
    size = block.widths.query_key
    channels = torch.cat([kept, kept + size // 2], dim=1) if block.is_rotary else kept
    of_heads = channels.repeat_interleave(num_heads // len(kept), dim=0)
    return (of_heads + size * torch.arange(num_heads, device=kept.device)[:, None]).flatten()


def _fit_values_(
    reduced: ReducedBlock,
    model: nn.Module,
    block: Block,
    widths: Widths,
    moments: Mapping[str, InputMoments],
    weighting: Weighting,
) -> None:
    """Keep of each head's values the subspace that counts most for all that read it.

    The weights of the attention add up to 1, so that a constant in the values adds a constant to the output: where the
    output projection has a bias, that takes up the values' biases, and with the bias correction also the mean of what
    is lost. Elsewhere the values' biases go through the same subspace as the values.
    """
    value, output = reduced.matrices["value"], reduced.matrices["output"]
    layer = model.get_submodule(block.layers["output"])
    seen, size = moments[_layer_of(block, "value")], block.widths.value
    folds = output.bias is not None
    moment = layer_metric(layer, value.weight, seen, weighting).input
    assert moment is not None
    mean = value.weight @ seen.mean.to(value.weight)
    second = value.weight @ moment @ value.weight.mT
    bias = torch.zeros_like(mean) if value.bias is None else value.bias
    if not folds:
        cross = torch.outer(bias, mean)
        second = second + cross + cross.mT + torch.outer(bias, bias)
    sharing = block.num_heads // block.num_key_heads
    downs, biases, ups, values, outputs = [], [], [], [], []
    constant = torch.zeros(len(output.weight)).to(output.weight)
    for head in range(block.num_key_heads):
        rows = slice(head * size, (head + 1) * size)
        readers = output.weight.split(size, dim=1)[head * sharing : (head + 1) * sharing]
        together = torch.cat(readers)
        down, up = subspace(second[rows, rows], together.mT @ together, widths.value)
        downs.append(down @ value.weight[rows])
        biases.append(down @ bias[rows])
        values.append(up @ downs[-1])
        for reader in readers:
            ups.append(reader @ up)
            outputs.append(ups[-1] @ down)
            constant += reader @ bias[rows]
            if is_centred(layer, weighting):
                constant += reader @ (mean[rows] - up @ (down @ mean[rows]))
    new_bias = None
    if value.bias is not None:
        new_bias = torch.zeros_like(torch.cat(biases)) if folds else torch.cat(biases)
    reduced.matrices["value"] = Matrix(torch.cat(downs), new_bias)
    new_constant = None if output.bias is None else output.bias + constant
    reduced.matrices["output"] = Matrix(torch.cat(ups, dim=1), new_constant)
    reduced.nearest |= {"value": torch.cat(values), "output": torch.cat(outputs, dim=1)}


def _layer_of(block: Block, role: str) -> str:
    return next(name for name, roles in block.parts.items() if role in roles)


def _energy_and_mean(matrix: Matrix, moments: InputMoments) -> tuple[Tensor, Tensor]:
    """E[y_i²] and E[y_i] of y = W x + b, (out_features,)."""
    w, second = matrix.weight, moments.second.to(matrix.weight)
    bias = torch.zeros(len(w)).to(w) if matrix.bias is None else matrix.bias
    mean = w @ moments.mean.to(w)
    return (w @ second * w).sum(1) + 2 * bias * mean + bias.square(), mean + bias


def nearest_weights(block: Block, reduced: ReducedBlock) -> dict[str, Tensor]:
    """By layer that was fitted, what stands for its W: see ReducedBlock."""
    return {
        name: torch.cat([reduced.nearest[role] for role in roles])
        for name, roles in block.parts.items()
        if reduced.nearest.keys() >= {*roles}
    }


def put_block_(model: nn.Module, block: Block, widths: Widths, reduced: ReducedBlock | None = None) -> None:
    """Put layers of these widths into a dense block, in place, and let its attention go by them.

    Without `reduced` they have no values yet, as on the meta device. A layer that keeps its shape stays what it is.
    """
    dense = {name: weight_shape(model.get_submodule(name)) for name in block.layers.values()}
    for name, shape in block.shapes(dense, widths).items():
        if shape == dense[name]:
            continue
        layer = model.get_submodule(name)
        like: Tensor = layer.weight  # type: ignore[assignment]
        if reduced is None:
            weight, bias = like.new_empty(shape), like.new_empty(shape[0])
        else:
            parts = [reduced.matrices[role] for role in block.parts[name]]
            weight = torch.cat([part.weight for part in parts]).to(like.dtype)
            bias = torch.cat([part.bias for part in parts if part.bias is not None] or [weight[:0, 0]]).to(like.dtype)
        replace_module_(model, name, _like(layer, weight, bias))
    if replace(widths, units=block.widths.units) != block.widths:
        pairs = None if reduced is None else reduced.pairs
        if pairs is None and block.is_rotary and widths.query_key < block.widths.query_key:
            size = (block.num_key_heads, widths.query_key // 2)
            device = model.get_submodule(block.layers["output"]).weight.device  # type: ignore[union-attr]
            pairs = torch.empty(size, dtype=torch.int64, device=device)  # type: ignore[arg-type]
        reduce_attention_(model.get_submodule(block.attention), block, widths, pairs)


def widen_block_(model: nn.Module, block: Block, widths: Widths) -> None:
    """Undo the widths of a block in place: dense layers of full size, with zeros in what was left out.

    The logits stay: zeros in queries and keys add nothing to a score, and units and values that nothing reads nothing
    to an output.

    Args:
        block: that of the dense model.
        widths: those that it has.
    """
    attention = model.get_submodule(block.attention)
    pairs: Tensor | None = getattr(attention, PAIRS, None)
    for name, members in block.parts.items():
        layer = model.get_submodule(name)
        weight, bias = dense_weight(layer), layer.bias
        is_reader = members[0] in READERS
        full = [block.num_features(role, block.widths) for role in members]
        places = []
        for role, begin in zip(members, [0, *itertools.accumulate(full)][:-1], strict=True):
            places.append(begin + _places(block, role, widths, pairs).to(weight.device))
        at = torch.cat(places)
        axis = 1 if is_reader else 0
        size = (len(weight), sum(full)) if is_reader else (sum(full), weight.shape[1])
        widened = weight.new_zeros(size).index_copy(axis, at, weight)
        new_bias: Tensor = bias.detach() if bias is not None else weight[:0, 0]  # type: ignore[operator, union-attr]
        if bias is not None and not is_reader:
            new_bias = new_bias.new_zeros(sum(full)).index_copy(0, at, new_bias)
        replace_module_(model, name, _like(layer, widened, new_bias))
    restore_attention_(attention)


def _places(block: Block, role: str, widths: Widths, pairs: Tensor | None) -> Tensor:
    """Where the features of a role stand among those of full width."""
    count = block.num_features(role, widths)
    if role in ("query", "key") and pairs is not None:
        return channel_places(block, pairs, block.num_heads if role == "query" else block.num_key_heads)
    full = block.num_features(role, block.widths)
    if role in ("gate", "up", "down"):
        return torch.arange(count)
    num_heads = block.num_heads if role in ("query", "output") else block.num_key_heads
    head, channel = torch.arange(num_heads), torch.arange(count // num_heads)
    return (head[:, None] * (full // num_heads) + channel).flatten()


def _like(layer: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    """A layer of the same class with W (out_features, in_features), and with b if the layer has one."""
    out_features, in_features = weight.shape
    has_bias = layer.bias is not None
    with torch.device("meta"):
        if isinstance(layer, Conv1D):
            new: nn.Module = Conv1D(out_features, in_features)
            weight = weight.mT
        else:
            new = nn.Linear(in_features, out_features, bias=has_bias)
    is_trained: bool = layer.weight.requires_grad  # type: ignore[assignment, union-attr]
    new.weight = nn.Parameter(weight.contiguous(), requires_grad=is_trained)
    if has_bias:
        new.bias = nn.Parameter(bias.contiguous(), requires_grad=layer.bias.requires_grad)  # type: ignore[arg-type, union-attr]
    return new


def put_empty_(model: nn.Module, shapes: Mapping[str, Shape]) -> None:
    """Put layers of these shapes (out_features, in_features), without values, into a dense model; see `put_block_`.

    Raises:
        RequestError: the model's blocks are not known.
    """
    for block in blocks_of(model).values() if shapes else ():
        named = {name: shapes[name] for name in block.layers.values() if name in shapes}
        if named:
            put_block_(model, block, block.widths_of(named))


def widen_(model: nn.Module, dense: Mapping[str, Shape]) -> None:
    """Make every reduced block of a model a dense one of full size, in place; see `widen_block_`.

    Args:
        dense: the shapes of the reduced layers in the dense model.
    """
    shapes = {name: weight_shape(model.get_submodule(name)) for name in dense}
    for block in blocks_of(model, dense).values() if dense else ():
        named = {name: shapes[name] for name in block.layers.values() if name in shapes}
        if named:
            widen_block_(model, block, block.widths_of(named))
