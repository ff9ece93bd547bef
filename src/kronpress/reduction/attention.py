"""Attention whose queries and keys have fewer channels than its dense model's, and its values another number.

The module stays what it was, of a subclass of its own class, with its own narrower projections. So all that looks for
it by its class or its attributes (caches, masks, recorded attention maps, the choice of a kernel) finds it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kronpress.reduction.blocks import Block, Widths

# What families call the dropout of the attention's weights: a rate or a module that has one.
_DROPOUTS = ("attention_dropout", "attn_dropout", "dropout")
PAIRS = "kept_pairs"


@dataclass(frozen=True)
class Heads:
    """Sizes of an attention module, and the names of its linear layers in it by their roles."""

    num_heads: int
    num_key_heads: int
    query_key: int
    value: int
    layers: dict[str, str]


class ReducedAttention(nn.Module):
    """Softmax(q kᵀ · scale) v with q, k (..., query_key) and v (..., value); the scale is the dense model's.

    Where positions are rotations and pairs of channels (i, i + d/2) were left out, `kept_pairs` (key heads,
    query_key/2) has the numbers i of those that are kept, which say how fast each turns. Query heads turn as the key
    head that they share.
    """

    heads: Heads
    eager: ClassVar[Callable[..., tuple[Tensor, Tensor | None]]]

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(batch, length, width) to the same, and the attention's weights if the implementation forms them."""
        query, key, value = self._projected(hidden_states)
        if position_embeddings is not None:
            query, key = self._rotated(query, *position_embeddings), self._rotated(key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # type: ignore[operator]
        config: Any = self.config
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, type(self).eager)
        if (window := getattr(self, "sliding_window", None)) is not None:
            kwargs.setdefault("sliding_window", window)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self._dropout() if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        output = self._layer("output")(output.flatten(2))
        if isinstance(dropout := getattr(self, "resid_dropout", None), nn.Module):
            output = dropout(output)
        return output, weights

    def _layer(self, role: str) -> nn.Module:
        return self.get_submodule(self.heads.layers[role])

    def _projected(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, (batch, heads, length, channels)."""
        heads = self.heads
        sizes = [
            (heads.num_heads, heads.query_key),
            (heads.num_key_heads, heads.query_key),
            (heads.num_key_heads, heads.value),
        ]
        if "qkv" in heads.layers:
            projected = self._layer("qkv")(x).split([count * size for count, size in sizes], dim=-1)
        else:
            projected = tuple(self._layer(role)(x) for role in ("query", "key", "value"))
        query, key, value = (each.unflatten(-1, size) for each, size in zip(projected, sizes, strict=True))
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)  # type: ignore[operator]
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def _rotated(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """x (batch, heads, length, query_key) by its positions' cosines and sines (batch, length, head size)."""
        if self.heads.query_key == cosines.shape[-1]:
            cos, sin = (each[:, None].chunk(2, dim=-1)[0] for each in (cosines, sines))
        else:
            pairs: Tensor = getattr(self, PAIRS)
            of_heads = pairs.repeat_interleave(x.shape[1] // len(pairs), dim=0)
            cos, sin = (each[..., of_heads].transpose(1, 2) for each in (cosines, sines))
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def _dropout(self) -> float:
        given = next(getattr(self, name) for name in _DROPOUTS if hasattr(self, name))
        return given.p if isinstance(given, nn.Dropout) else float(given)


@cache
def _reduced_class(dense: type[nn.Module]) -> type[nn.Module]:
    eager = staticmethod(vars(sys.modules[dense.__module__])["eager_attention_forward"])
    return type(f"Reduced{dense.__name__}", (ReducedAttention, dense), {"eager": eager, "__module__": __name__})


def reduce_attention_(module: nn.Module, block: Block, widths: Widths, pairs: Tensor | None) -> None:
    """Make a dense attention module, whose projections are narrower already, one that attends with these widths.

    Args:
        pairs: those that are kept, (key heads, query_key/2), where some of them are not.
    """
    layers = {
        role: name.rpartition(".")[2]
        for role, name in block.layers.items()
        if name.rpartition(".")[0] == block.attention
    }
    module.__class__ = _reduced_class(type(module))  # type: ignore[arg-type]
    module.heads = Heads(block.num_heads, block.num_key_heads, widths.query_key, widths.value, layers)  # type: ignore[assignment]
    if pairs is not None:
        module.register_buffer(PAIRS, pairs)


def restore_attention_(module: nn.Module) -> None:
    """Undo `reduce_attention_`."""
    if isinstance(module, ReducedAttention):
        module.__class__ = type(module).__mro__[2]
        del module.heads
        if hasattr(module, PAIRS):
            delattr(module, PAIRS)
