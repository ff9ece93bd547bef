"""Permutations that a transformer lets pass: units renumbered in every layer that writes or reads them, at no cost.

A free dimension is a set of units whose numbering is arbitrary: the hidden units of an MLP, the value channels of a
head, the coordinates of the residual stream. Renumbering it in all layers at once leaves what the model computes as it
was, and gives each of their weights an order of rows or columns in which a structured matrix may fit it better.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kronpress.errors import RequestError, unknown_name
from kronpress.families import FAMILIES, Family
from kronpress.surgery import weight_shape

Side = Literal["out", "in"]


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

    Args:
        order: (size,), such as the `row_order` of a permuted fit of the module that writes the units.

    Raises:
        RequestError: `order` is no permutation, or moves a unit to another label; a use is not a dense layer.
    """
    order = order.cpu()
    if not torch.equal(order.sort().values, torch.arange(len(dimension.labels))):
        raise RequestError(f"the order is no permutation of the dimension's {len(dimension.labels)} units")
    if not torch.equal(dimension.labels[order], dimension.labels):
        raise RequestError("the order moves units to places of another label, as from one head to another")
    axes = [(parameter, axis, use.channels) for use in dimension.uses for parameter, axis in _axes(model, use)]
    moved: set[int] = set()
    with torch.no_grad():
        for parameter, axis, channels in axes:
            if id(parameter) not in moved:
                moved.add(id(parameter))
                source = torch.arange(parameter.shape[axis])
                source[channels] = channels[:, order]
                parameter.copy_(parameter.index_select(axis, source.to(parameter.device)))


def _axes(model: nn.Module, use: Use) -> Iterator[tuple[nn.Parameter, int]]:
    """The parameters of a use, each with the axis that the units are on."""
    module = model.get_submodule(use.module)
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if isinstance(module, Conv1D):
        axis = 1 if use.side == "out" else 0
    elif isinstance(module, nn.Linear):
        axis = 0 if use.side == "out" else 1
    elif isinstance(module, nn.Embedding):
        axis = 1
    elif isinstance(weight, nn.Parameter) and weight.ndim == 1:  # a norm
        axis = 0
    else:
        raise RequestError(f"{use.module} is a {type(module).__name__}: permutations are folded into dense layers only")
    assert isinstance(weight, nn.Parameter)
    yield weight, axis
    if use.side == "out" and isinstance(bias, nn.Parameter):
        yield bias, 0


def _dense_shape(modules: dict[str, nn.Module], name: str) -> tuple[int, int]:
    """(out_features, in_features) of a dense linear layer; RequestError if there is none of that name."""
    module = modules.get(name)
    if not isinstance(module, nn.Linear | Conv1D):
        given = "there is none" if module is None else f"it is a {type(module).__name__}"
        raise RequestError(f"{name} should be a dense linear layer, and {given}: fold before compressing")
    return weight_shape(module)


def _hidden_units(modules: dict[str, nn.Module], family: Family, prefix: str) -> FreeDimension:
    names = {role: f"{prefix}.{name}" for role, name in family.roles.items()}
    size = _dense_shape(modules, names["down"])[1]
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
    head_size = _dense_shape(modules, names["output"])[1] // num_heads
    channels = torch.arange(num_value_heads * head_size)
    if "value" in names:
        writer = Use(names["value"], "out", channels[None])
    else:  # query, key and value in this order
        start = _dense_shape(modules, names["qkv"])[0] - len(channels)
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
    size = _dense_shape(modules, f"{prefixes[0]}.{family.roles['down']}")[0]
    units = torch.arange(size)
    uses = [Use(name, "out", units[None]) for name in writes] + [Use(name, "in", units[None]) for name in reads]
    return FreeDimension(torch.zeros(size, dtype=torch.int64), tuple(uses))
