"""Layers of a compressed language model, for a checkpoint that loads with torch and transformers alone.

W (out_features, in_features) is held as factors; a linear layer computes y = x Wᵀ + b, an embedding the rows of W.
`kronpress_layers` of config.json names the layers, and for each its structure, the shapes of its factors, the lengths
of its permutations, the heads that are tied to it, and the factors that it shares, with the layer that has them.
`kronpress_widths` has the shapes of dense layers that are narrower than the configuration says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

# The structures by name, each with `multiply(factors, x, bias)` and `rows(factors, indices)`.
STRUCTURES: dict[str, Any] = {}


class FactoredLayer(nn.Module):
    """The factors of W, as parameters of the layer, and its permutations, as buffers."""

    def __init__(self, structure: Any, factors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.structure = structure
        self.factor_names = tuple(factors)
        for name, factor in factors.items():
            if isinstance(factor, nn.Parameter):
                self.register_parameter(name, factor)
            else:
                self.register_buffer(name, factor)

    @property
    def factors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.factor_names}


class FactoredLinear(FactoredLayer):
    """y = x Wᵀ + b, (..., in_features) to (..., out_features)."""

    def __init__(self, structure: Any, factors: Mapping[str, Tensor], bias: nn.Parameter | None) -> None:
        super().__init__(structure, factors)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.structure.multiply(self.factors, x, self.bias)
        return y


class FactoredEmbedding(FactoredLayer):
    """The rows of W at integer indices, (...) to (..., in_features)."""

    def __init__(self, structure: Any, factors: Mapping[str, Tensor], padding_idx: int | None) -> None:
        super().__init__(structure, factors)
        self.padding_idx = padding_idx

    def forward(self, indices: Tensor) -> Tensor:
        found: Tensor = self.structure.rows(self.factors, indices)
        return found


class FactoredModel:
    """Makes layers factored: stands before a causal language model of transformers among the bases of a class."""

    def __init__(self, config: Any, *inputs: Any, **options: Any) -> None:
        super().__init__(config, *inputs, **options)  # type: ignore[call-arg]
        for name, shape in config.kronpress_widths.items():
            _narrow_layer_(self, name, *shape)
        for name, described in config.kronpress_layers.items():
            _replace_layer_(self, name, described)

    @classmethod
    def from_pretrained(cls, *inputs: Any, output_loading_info: bool = False, **options: Any) -> Any:
        """As of any model of transformers, but a factor that is missing is an error and not a random matrix."""
        model, info = super().from_pretrained(*inputs, output_loading_info=True, **options)  # type: ignore[misc]
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, FactoredLayer)}
        parts = {f"{name}.{part}" for name, layer in layers.items() for part in layer.factor_names}
        parts |= {f"{name}.weight" for name in model.config.kronpress_widths}
        missing = sorted(parts.intersection(info["missing_keys"]) - set(model.all_tied_weights_keys))
        if missing:
            raise RuntimeError(f"the checkpoint is damaged: {missing[0]} is missing from its weights")
        return (model, info) if output_loading_info else model


def _narrow_layer_(model: Any, name: str, out_features: int, in_features: int) -> None:
    """Give a dense layer another shape, with no numbers in it until they are loaded."""
    layer = model.get_submodule(name)
    options = {"dtype": layer.weight.dtype, "device": layer.weight.device}
    if isinstance(layer, nn.Linear):
        shape = out_features, in_features
        layer.out_features, layer.in_features = shape
    else:  # transformers' Conv1D has W transposed
        shape = in_features, out_features
        layer.nx, layer.nf = shape
    layer.weight = nn.Parameter(torch.full(shape, torch.nan, **options))
    if layer.bias is not None:
        layer.bias = nn.Parameter(torch.full((out_features,), torch.nan, **options))


def _replace_layer_(model: Any, name: str, described: dict[str, Any]) -> None:
    """Put a factored layer in the place called `name`, and layers that hold the same factors in those of its heads."""
    layer = model.get_submodule(name)
    structure = STRUCTURES[described["structure"]]
    dtype, device = layer.weight.dtype, layer.weight.device

    def empty() -> dict[str, Tensor]:
        """Not a number until they are loaded. A head has its own until it is tied: else transformers misses no loss."""
        factors = {
            part: nn.Parameter(torch.full(shape, torch.nan, dtype=dtype, device=device))
            for part, shape in described["factors"].items()
        }
        orders = {part: torch.arange(size, device=device) for part, size in described["orders"].items()}
        return {**factors, **orders}

    heads = described["heads"]
    if isinstance(layer, nn.Embedding):
        _set_(model, name, FactoredEmbedding(structure, empty(), layer.padding_idx))
    else:
        _set_(model, name, FactoredLinear(structure, empty(), layer.bias))
    for head in heads:
        _set_(model, head, FactoredLinear(structure, empty(), model.get_submodule(head).bias))
    ties = {f"{head}.{part}": f"{name}.{part}" for head in heads for part in described["factors"]}
    ties |= {f"{name}.{part}": f"{source}.{part}" for part, source in described["shared"].items()}
    if ties:
        for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
            known = getattr(model, attribute) or {}
            others = {key: source for key, source in known.items() if source != f"{name}.weight"}
            setattr(model, attribute, {**others, **ties})


def _set_(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
