"""Permutations that a transformer lets pass: units renumbered in every layer that writes or reads them, at no cost.

A free dimension is a set of units whose numbering is arbitrary: the hidden units of an MLP, the value channels of a
head, the coordinates of the residual stream. Renumbering it in all layers at once leaves what the model computes as it
was, and gives each of their weights an order of rows or columns in which a structured matrix may fit it better.
`search_orders` looks for such orders, `fold_` puts one into the model, and `permuted_moments` into what was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kronpress.errors import RequestError, unknown_name
from kronpress.families import FAMILIES, Family
from kronpress.layers import StructuredEmbedding, StructuredLayer, StructuredLinear
from kronpress.matrices.joint_order import SharedMatrix, nearest_joint_order
from kronpress.matrices.metric import Metric
from kronpress.matrices.moments import InputMoments
from kronpress.matrices.permutation import Shape, Start
from kronpress.matrices.permuted_kronecker import PermutedKronecker
from kronpress.surgery import dense_weight, tied_heads, weight_shape

Side = Literal["out", "in"]
# What a recipe's `folding` may name.
DIMENSIONS = ("mlp", "value", "residual")
# left_shape, right_shape and num_terms of a sum of Kronecker products.
Sizes = tuple[Shape, Shape, int]


@dataclass(frozen=True)
class Residual:
    """What the residual stream passes besides the linear layers of the blocks.

    `inside` are the names, within a block, of modules that neither read nor write it.
    """

    embeddings: tuple[str, ...]
    block_norms: tuple[str, ...]
    final_norm: str
    head: str = "lm_head"
    inside: tuple[str, ...] = ()


_LLAMA = Residual(("model.embed_tokens",), ("input_layernorm", "post_attention_layernorm"), "model.norm")

RESIDUALS: dict[str, Residual] = {
    "gpt2": Residual(("transformer.wte", "transformer.wpe"), ("ln_1", "ln_2"), "transformer.ln_f"),
    "opt": Residual(
        ("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        ("self_attn_layer_norm", "final_layer_norm"),
        "model.decoder.final_layer_norm",
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": Residual(
        _LLAMA.embeddings, _LLAMA.block_norms, _LLAMA.final_norm, inside=("self_attn.q_norm", "self_attn.k_norm")
    ),
    "gemma": _LLAMA,
    "phi3": _LLAMA,
}


@dataclass(frozen=True)
class Use:
    """A module that writes (`out`) or reads (`in`) the units of a dimension: unit u at channels[:, u].

    `channels` (copies, size): a module may hold several copies of a unit, as an output projection has a value
    channel once for each query head that shares the head.
    """

    module: str
    side: Side
    channels: Tensor


@dataclass(frozen=True)
class FreeDimension:
    """Units that may be renumbered among those of equal label, `labels` (size,), in all their uses at once."""

    labels: Tensor
    uses: tuple[Use, ...]


def free_dimensions(model: PreTrainedModel) -> dict[str, FreeDimension]:
    """All free dimensions by name: `mlp.N` and `value.N` of each block N, and `residual`.

    Raises:
        RequestError: the model's type is unknown, or it has modules that its family does not account for.
    """
    model_type = model.config.model_type
    if model_type not in RESIDUALS:
        raise unknown_name("model type", model_type, RESIDUALS)
    family, residual = FAMILIES[model_type], RESIDUALS[model_type]
    modules = dict(model.named_modules())
    if family.blocks not in modules:
        raise RequestError(f"the {model_type} model has no module {family.blocks!r}: give one with its head")
    prefixes = [f"{family.blocks}.{name}" for name, _ in modules[family.blocks].named_children()]
    found: dict[str, FreeDimension] = {}
    for number, prefix in enumerate(prefixes):
        found[f"mlp.{number}"] = _hidden_units(modules, family, prefix)
        found[f"value.{number}"] = _value_channels(modules, family, prefix, model)
    found["residual"] = _residual_stream(modules, family, residual, prefixes, model)
    return found


def fold_(model: nn.Module, dimension: FreeDimension, order: Tensor) -> None:
    """Renumber the units in place: what was unit order[u] becomes unit u, in every use. A tied weight is moved once.

    A `PermutedKronecker` that stores the order of that side passes the units on: the two orders are composed.

    Args:
        order: (size,), such as the `row_order` of a permuted fit of the module that writes the units.

    Raises:
        RequestError: `order` is no permutation, or moves a unit to another label; a use is neither a dense layer nor
            a structured one that stores the order of that side.
    """
    order = order.cpu()
    if not torch.equal(order.sort().values, torch.arange(len(dimension.labels))):
        raise RequestError(f"the order is no permutation of the dimension's {len(dimension.labels)} units")
    if not torch.equal(dimension.labels[order], dimension.labels):
        raise RequestError("the order moves units to places of another label, as from one head to another")
    axes = [(tensor, axis, use.channels) for use in dimension.uses for tensor, axis in _axes(model, use)]
    moved: set[int] = set()
    with torch.no_grad():
        for tensor, axis, channels in axes:
            if id(tensor) not in moved:
                moved.add(id(tensor))
                if axis is None:  # the numbers of the units themselves
                    source = _source(len(tensor), channels, order).to(tensor.device)
                    tensor.copy_(source.argsort()[tensor])
                else:
                    source = _source(tensor.shape[axis], channels, order).to(tensor.device)
                    tensor.copy_(tensor.index_select(axis, source))


def check_foldable(
    model: nn.Module, names: Iterable[str], planned: Collection[str], made_dense: Collection[str] = ()
) -> None:
    """Refuse what `search_orders` and `fold_` would refuse for the layers `planned`, by the model's modules alone.

    Args:
        made_dense: layers that will be dense by then, whatever they are now, and the heads tied to them.

    Raises:
        RequestError: as `search_orders`.
    """
    if not isinstance(model, PreTrainedModel):
        raise RequestError("folding: the free dimensions of this model are not known; it is no transformers model")
    dimensions = free_dimensions(model)
    embeddings = [name for name in made_dense if isinstance(model.get_submodule(name), StructuredEmbedding)]
    dense = {*made_dense, *(head for name in embeddings for head in tied_heads(model, name))}
    for dimension in (dimensions[key] for name in names for key in dimensions if key.partition(".")[0] == name):
        if any(use.module in planned for use in dimension.uses):
            for use in dimension.uses:
                if use.module not in dense:
                    list(_axes(model, use))


def search_orders(
    model: PreTrainedModel,
    names: Iterable[str],
    planned: Mapping[str, Sizes],
    metrics: Callable[[str], Metric | None] = lambda name: None,
    starts: Sequence[Start] = ("identity", "matching"),
) -> dict[str, Tensor]:
    """An order for each free dimension in which the planned layers are nearer to their sums of Kronecker products.

    The orders belong together: each is searched with those before it folded, so fold all of them, as they come. Every
    planned layer that uses a dimension takes part, by its error in the metric, or, without one, by its relative error
    in the Frobenius norm; as these are added, give all layers a metric, or none. Where no order gains anything the
    given one stays. A dimension that no planned layer sees is left out. Nothing in the model is changed.

    Args:
        names: which dimensions, of `mlp`, `value` and `residual`; searched in this order.
        planned: by layer the left_shape, right_shape and num_terms of its W (out, in), of an embedding (vocab, width).
        metrics: gives a layer's metric by its name. A side may be a vector, the diagonal, as that of the rows of
            an embedding, which is then put into W: exact where B has one row.
        starts: as in `nearest_joint_order`.

    Returns:
        By the name of the dimension in `free_dimensions`, its order (size,).

    Raises:
        RequestError: an unknown name, model type or layer; sizes that do not fit; a dimension that cannot be folded.
        WorkError: a weight or a metric holds NaN or infinity.
    """
    names = list(names)
    for name in names:
        if name not in DIMENSIONS:
            raise unknown_name("free dimension", name, DIMENSIONS)
    dimensions = free_dimensions(model)
    modules = dict(model.named_modules())
    for name in planned:
        if name not in modules:
            raise RequestError(f"the orders are searched for {name!r}, and the model has no layer of that name")
    # Of each layer: what stands where in the rows and columns of its weight after the foldings so far.
    stands: dict[tuple[str, bool], Tensor] = {}
    found = {}
    for key in (key for name in names for key in dimensions if key.partition(".")[0] == name):
        dimension = dimensions[key]
        uses = [use for use in dimension.uses if use.module in planned]
        if not uses:
            continue
        for use in dimension.uses:
            list(_axes(model, use))  # refuses what cannot be folded before the search
        matrices = [_shared(modules[use.module], use, planned, metrics, stands) for use in uses]
        found[key] = nearest_joint_order(matrices, dimension.labels, starts).order
        for use, matrix in zip(uses, matrices, strict=True):
            place = use.module, _is_column(modules[use.module], use)
            rows = matrix.rows(found[key])
            stands[place] = stands.get(place, torch.arange(len(rows)))[rows]
    return found


def permuted_moments(
    moments: Mapping[str, InputMoments], dimension: FreeDimension, order: Tensor
) -> Mapping[str, InputMoments]:
    """The moments after `fold_` with this order; each layer's are permuted when they are asked for.

    Of layers that read the units: `second`, `held_out`, `mean` and `magnitude`. Of those that write them: `gradient`.
    Of an embedding, whose columns the units are: all of these.
    """
    return _PermutedMoments(moments, dimension, order.cpu())


@dataclass(frozen=True, eq=False)
class _PermutedMoments(Mapping[str, InputMoments]):
    moments: Mapping[str, InputMoments]
    dimension: FreeDimension
    order: Tensor

    def __getitem__(self, layer: str) -> InputMoments:
        found = self.moments[layer]
        for use in self.dimension.uses:
            if use.module != layer:
                continue
            if use.side == "in" or found.counts is not None:
                source = _source(len(found.mean), use.channels, self.order).to(found.mean.device)
                found = replace(
                    found,
                    second=found.second[source][:, source],
                    mean=found.mean[source],
                    held_out=None if found.held_out is None else found.held_out[source][:, source],
                    magnitude=None if found.magnitude is None else found.magnitude[source],
                )
            if use.side == "out" and found.gradient is not None:
                source = _source(len(found.gradient), use.channels, self.order).to(found.gradient.device)
                found = replace(found, gradient=found.gradient[source][:, source])
        return found

    def __contains__(self, layer: object) -> bool:
        return layer in self.moments  # without reading its tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.moments)

    def __len__(self) -> int:
        return len(self.moments)


def _source(size: int, channels: Tensor, order: Tensor) -> Tensor:
    """(size,): which channel of a module stands where after folding; `channels` (copies, units)."""
    source = torch.arange(size)
    source[channels] = channels[:, order]
    return source


def _is_column(module: nn.Module, use: Use) -> bool:
    """Whether the units are columns of W (out, in), or (vocab, width)."""
    return use.side == "in" or isinstance(module, nn.Embedding | StructuredEmbedding)


def _shared(
    module: nn.Module,
    use: Use,
    planned: Mapping[str, Sizes],
    metrics: Callable[[str], Metric | None],
    stands: Mapping[tuple[str, bool], Tensor],
) -> SharedMatrix:
    """A planned layer as one of the matrices that share an order, with the units in its rows."""
    (left_shape, right_shape, num_terms), metric = planned[use.module], metrics(use.module)
    weight = dense_weight(module).to(torch.float64)
    importance = 1.0
    if metric is None:
        metric, energy = Metric(), weight.square().sum().item()
        importance = 1 / energy if energy > 0 else 0.0
    # Of W as it is stored: rows and columns, by what was folded before.
    sides = [metric.output, metric.input]
    for axis, is_column in ((0, False), (1, True)):
        order, side = stands.get((use.module, is_column)), sides[axis]
        if side is not None:
            side = side.to(weight)
        if order is not None:
            weight = weight.index_select(axis, order.to(weight.device))
            if side is not None:
                side = side[order] if side.ndim == 1 else side[order][:, order]
        sides[axis] = side
    transposed = _is_column(module, use)
    own, other = reversed(sides) if transposed else sides
    if transposed:
        weight = weight.mT
        left_shape, right_shape = left_shape[::-1], right_shape[::-1]
    if other is not None and other.ndim == 1:
        weight, other = weight * other.clamp(min=0).sqrt(), None
    if own is not None and own.ndim == 1:
        own = torch.diag(own)
    return SharedMatrix(
        weight, left_shape, right_shape, num_terms, Metric(other, own), use.channels, importance, transposed
    )


def _axes(model: nn.Module, use: Use) -> Iterator[tuple[Tensor, int | None]]:
    """The tensors of a use, each with the axis that the units are on, or None if it is made of their numbers."""
    module = model.get_submodule(use.module)
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if isinstance(module, StructuredLayer):
        name = "column_order" if _is_column(module, use) else "row_order"
        if module.structure is not PermutedKronecker or name not in module.factors:
            raise RequestError(
                f"{use.module} is a {type(module).__name__} that stores no {name}: permutations are folded into dense "
                "layers, and into permuted_kronecker ones that permute that side"
            )
        yield module.factors[name], None if name == "column_order" else 0
    else:
        yield weight, _axis(use, module, weight)  # type: ignore[misc]
    if use.side == "out" and isinstance(bias, nn.Parameter):
        yield bias, 0


def _axis(use: Use, module: nn.Module, weight: object) -> int:
    """The axis of a dense layer's weight that the units are on; RequestError if the layer is none."""
    if isinstance(module, Conv1D):
        return 1 if use.side == "out" else 0
    if isinstance(module, nn.Linear):
        return 0 if use.side == "out" else 1
    if isinstance(module, nn.Embedding):
        return 1
    if isinstance(weight, nn.Parameter) and weight.ndim == 1:  # a norm
        return 0
    raise RequestError(f"{use.module} is a {type(module).__name__}: permutations are folded into dense layers only")


def _shape(modules: dict[str, nn.Module], name: str) -> tuple[int, int]:
    """(out_features, in_features) of a linear layer; RequestError if there is none of that name."""
    module = modules.get(name)
    if not isinstance(module, nn.Linear | Conv1D | StructuredLinear):
        given = "there is none" if module is None else f"it is a {type(module).__name__}"
        raise RequestError(f"{name} should be a linear layer, and {given}")
    return weight_shape(module)


def _hidden_units(modules: dict[str, nn.Module], family: Family, prefix: str) -> FreeDimension:
    names = {role: f"{prefix}.{name}" for role, name in family.roles.items()}
    size = _shape(modules, names["down"])[1]
    units = torch.arange(size)
    uses = [Use(names[role], "out", units[None]) for role in ("gate", "up") if role in names]
    if "gate_up" in names:  # the gates, and then the others
        uses.append(Use(names["gate_up"], "out", torch.stack([units, size + units])))
    return FreeDimension(torch.zeros(size, dtype=torch.int64), (*uses, Use(names["down"], "in", units[None])))


def _value_channels(
    modules: dict[str, nn.Module], family: Family, prefix: str, model: PreTrainedModel
) -> FreeDimension:
    names = {role: f"{prefix}.{name}" for role, name in family.roles.items()}
    config = model.config
    num_heads = config.num_attention_heads
    num_value_heads = getattr(config, "num_key_value_heads", None) or num_heads
    head_size = _shape(modules, names["output"])[1] // num_heads
    channels = torch.arange(num_value_heads * head_size)
    if "value" in names:
        writer = Use(names["value"], "out", channels[None])
    else:  # query, key and value in this order
        start = _shape(modules, names["qkv"])[0] - len(channels)
        writer = Use(names["qkv"], "out", start + channels[None])
    # Query heads that share one key and value head stand together.
    sharing = num_heads // num_value_heads
    head, channel = channels // head_size, channels % head_size
    read = (head * sharing + torch.arange(sharing)[:, None]) * head_size + channel
    return FreeDimension(head, (writer, Use(names["output"], "in", read)))


def _residual_stream(
    modules: dict[str, nn.Module], family: Family, residual: Residual, prefixes: list[str], model: PreTrainedModel
) -> FreeDimension:
    writes = [*residual.embeddings, residual.final_norm]
    reads = [residual.head]
    for prefix in prefixes:
        writes += [f"{prefix}.{name}" for name in residual.block_norms]
        for role, name in family.roles.items():
            (writes if role in ("output", "down") else reads).append(f"{prefix}.{name}")
    # One module left out would make the folded model a wrong one.
    known = {*writes, *reads, *(f"{prefix}.{name}" for prefix in prefixes for name in residual.inside)}
    strange = [name for name, module in modules.items() if name not in known and [*module.parameters(recurse=False)]]
    absent = [name for name in (*writes, *reads) if name not in modules]
    if strange or absent:
        fault = f"has {strange[0]}, which is not" if strange else f"lacks {absent[0]}, which is"
        raise RequestError(f"the {model.config.model_type} model {fault} in its family's plan of the residual stream")
    size = _shape(modules, f"{prefixes[0]}.{family.roles['down']}")[0]
    units = torch.arange(size)
    uses = [Use(name, "out", units[None]) for name in writes] + [Use(name, "in", units[None]) for name in reads]
    return FreeDimension(torch.zeros(size, dtype=torch.int64), tuple(uses))
