"""The free dimensions of a transformer: which units may be renumbered, and where each of them is written and read.

A free dimension is a set of units whose numbering is arbitrary: the hidden units of an MLP, the value channels of a
head, the coordinates of the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kronpress.errors import RequestError, unknown_name
from kronpress.families import FAMILIES, Family
from kronpress.layers import StructuredLinear
from kronpress.surgery import is_embedding, weight_shape

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


def of_kinds(dimensions: Mapping[str, FreeDimension], kinds: Iterable[str]) -> dict[str, FreeDimension]:
    """Those whose names begin with one of the kinds `mlp`, `value` and `residual`; kind after kind."""
    return {key: dimensions[key] for kind in kinds for key in dimensions if key.partition(".")[0] == kind}


def in_columns(module: nn.Module, use: Use) -> bool:
    """Whether the units are columns of W (out, in), or (vocab, width)."""
    return use.side == "in" or is_embedding(module)


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
