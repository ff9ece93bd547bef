"""The inner widths of a transformer block and the layers that have them: what can be made narrower by itself.

A block has three: the hidden units of its MLP, the channels in which a head compares queries and keys, and those of
the values that it passes on. Some layers write a width with their outputs, in parts where several are fused into one
layer, and one layer reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

from torch import nn
from transformers import PreTrainedModel

from kronpress.errors import RequestError
from kronpress.families import FAMILIES
from kronpress.surgery import weight_shape

Shape = tuple[int, int]  # (out_features, in_features)

# The roles of the layers that are several in one, in the order of their outputs.
_FUSED = {"qkv": ("query", "key", "value"), "gate_up": ("gate", "up")}
_ROLES_OF = {
    "units": ("gate", "up", "down"),
    "query_key": ("query", "key"),
    "value": ("value", "output"),
}
# The roles of the layers that have a width among their inputs; all others write one.
READERS = ("down", "output")
# What stands between the projections of queries and keys and their rotation, in some families.
HEAD_NORMS = ("q_norm", "k_norm")


@dataclass(frozen=True)
class Widths:
    """`units` of the MLP; channels of each head in which queries and keys are compared, and of its values."""

    units: int
    query_key: int
    value: int


@dataclass(frozen=True)
class Block:
    """One block of a dense model: `layers` gives the name of the module of each role, as its family does.

    `query_key_fault` says why the channels of queries and keys have to stay as they are, if they have to.
    """

    prefix: str
    attention: str
    layers: dict[str, str]
    widths: Widths
    num_heads: int
    num_key_heads: int
    is_rotary: bool
    query_key_fault: str | None = None

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """The roles of each layer by its name; a fused one has their outputs one after another."""
        return {name: _FUSED.get(role, (role,)) for role, name in self.layers.items()}

    def num_features(self, role: str, widths: Widths) -> int:
        """How many outputs a role has, or how many inputs the layer of a reading role."""
        match role:
            case "query":
                return self.num_heads * widths.query_key
            case "key":
                return self.num_key_heads * widths.query_key
            case "value":
                return self.num_key_heads * widths.value
            case "output":
                return self.num_heads * widths.value
            case _:
                return widths.units

    def shapes(self, dense: Mapping[str, Shape], widths: Widths) -> dict[str, Shape]:
        """The shape of every layer of the block with these widths.

        Args:
            dense: the layers' shapes as they are in the dense model.
        """
        found = {}
        for name, roles in self.parts.items():
            size = sum(self.num_features(role, widths) for role in roles)
            found[name] = (dense[name][0], size) if roles[0] in READERS else (size, dense[name][1])
        return found

    def members(self, width: str) -> set[str]:
        """The names of the layers that have a width, a field of Widths."""
        return {name for name, roles in self.parts.items() if {*roles} & {*_ROLES_OF[width]}}

    def cost(self, width: str, dense: Mapping[str, Shape]) -> int:
        """By how many parameters of its matrices the block grows with each unit of a width."""
        more = replace(self.widths, **{width: getattr(self.widths, width) + 1})
        grown = sum(map(prod, self.shapes(dense, more).values()))
        return grown - sum(map(prod, self.shapes(dense, self.widths).values()))

    def step(self, width: str) -> int:
        """By how many units a width changes: rotary channels of queries and keys come in pairs."""
        return 2 if width == "query_key" and self.is_rotary else 1

    def widths_of(self, shapes: Mapping[str, Shape]) -> Widths:
        """The widths with which `shapes` gives these shapes; of layers that it does not name, the dense ones."""
        widths = self.widths
        if (name := self.layers["down"]) in shapes:
            widths = replace(widths, units=shapes[name][1])
        if (name := self.layers["output"]) in shapes:
            widths = replace(widths, value=shapes[name][1] // self.num_heads)
        for name, roles in self.parts.items():
            if "key" in roles and name in shapes:
                values = self.num_features("value", widths) if "value" in roles else 0
                heads = self.num_key_heads + (self.num_heads if "query" in roles else 0)
                widths = replace(widths, query_key=(shapes[name][0] - values) // heads)
        return widths


def blocks_of(model: nn.Module, dense: Mapping[str, Shape] | None = None) -> dict[str, Block]:
    """Every block of a dense model by its name, from its modules and its configuration.

    Args:
        dense: shapes of layers in the dense model, where they are not those in this one.

    Raises:
        RequestError: no transformers model of a known family, or one whose blocks are not as its family says.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if not isinstance(model, PreTrainedModel) or model_type not in FAMILIES:
        raise RequestError(
            f"reduced widths of a model of type {model_type!r}: known types are {', '.join(FAMILIES)}; its layers can "
            "be compressed one by one"
        )
    family, config, modules = FAMILIES[model_type], model.config, dict(model.named_modules())
    # A base model names its modules without the prefix that the head's model gives them.
    local = family.blocks if family.blocks in modules else family.blocks.removeprefix(f"{model.base_model_prefix}.")
    if local not in modules:
        raise RequestError(f"the {model_type} model has no module {family.blocks!r}")
    if getattr(config, "add_cross_attention", False):
        raise RequestError("reduced widths: the blocks of this model have cross-attention, which is not supported")
    num_heads = config.num_attention_heads
    num_key_heads = getattr(config, "num_key_value_heads", None) or num_heads
    found = {}
    for number, _ in modules[local].named_children():
        prefix = f"{local}.{number}"
        layers = {role: f"{prefix}.{name}" for role, name in family.roles.items()}
        if absent := [name for name in layers.values() if name not in modules]:
            raise RequestError(f"the {model_type} model has no layer {absent[0]!r}")
        shapes = {name: (dense or {}).get(name) or weight_shape(modules[name]) for name in layers.values()}
        head_size = shapes[layers["output"]][1] // num_heads
        attention = layers["output"].rpartition(".")[0]
        found[prefix] = Block(
            prefix,
            attention,
            layers,
            Widths(shapes[layers["down"]][1], head_size, head_size),
            num_heads,
            num_key_heads,
            family.is_rotary,
            _fault(modules[attention], attention, layers, config) if family.is_rotary else None,
        )
    return found


def _fault(module: nn.Module, attention: str, layers: Mapping[str, str], config: object) -> str | None:
    """Why channels of queries and keys cannot be left out one by one."""
    for name, child in module.named_children():
        if f"{attention}.{name}" not in layers.values() and any(True for _ in child.parameters()):
            if name not in HEAD_NORMS:
                raise RequestError(f"reduced widths: {attention}.{name} is not known to the model's family")
            return f"{attention}.{name} looks at all channels of a head"
    settings = getattr(config, "rope_parameters", None) or {}
    factor = settings.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    return None if factor == 1.0 else f"only {factor:g} of their channels are rotary"


def dense_shapes(model: nn.Module, block: Block) -> dict[str, Shape]:
    """The shapes of the block's layers as they are in the model, a dense one."""
    return {name: weight_shape(model.get_submodule(name)) for name in block.layers.values()}


def block_members(blocks: Mapping[str, Block]) -> Iterator[tuple[Block, str, set[str]]]:
    """Every width of every block, with the names of the layers that have it."""
    for block in blocks.values():
        for width in vars(block.widths):
            yield block, width, block.members(width)
