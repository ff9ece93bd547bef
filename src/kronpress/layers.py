"""The layers that stand in for dense ones: a structured matrix and a bias, or a structured matrix that is looked up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from kronpress import native
from kronpress.matrices import StructuredMatrix
from kronpress.ways import Sizes, Ways, compute


class StructuredLayer(nn.Module):
    """A layer with a structured W (out_features, in_features).

    The layer owns the factors itself, so that its checkpoint keys are `<module>.weight`, with three
    dimensions, and its siblings: stock transformers then refuses the checkpoint instead of filling dense
    weights at random.
    """

    def __init__(self, matrix: StructuredMatrix) -> None:
        """Takes over the parameters and the permutations of `matrix`."""
        super().__init__()
        self.structure = type(matrix)
        self.out_features, self.in_features, self.spec = matrix.out_features, matrix.in_features, matrix.spec
        self.options = matrix.options
        self.factor_names = tuple(matrix.factors)
        for name, factor in matrix.named_parameters():
            self.register_parameter(name, factor)
        for name, order in matrix.named_buffers():
            self.register_buffer(name, order)

    @property
    def factors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.factor_names}

    def to_dense(self) -> Tensor:
        """W, (out_features, in_features)."""
        return self.structure.expand(self.factors)

    def extra_repr(self) -> str:
        return f"{self.out_features}, {self.in_features}, {self.structure.__name__}, {self.spec!r}"


class StructuredLinear(StructuredLayer):
    """y = x Wᵀ + b, (..., in_features) to (..., out_features).

    >>> import torch, kronpress as kp
    >>> matrix = kp.matrices.LowRank(6, 4, kp.matrices.LowRank.Spec(rank=2))
    >>> layer = kp.StructuredLinear(matrix, bias=torch.zeros(6))
    >>> sorted(layer.state_dict())
    ['bias', 'right', 'weight']
    """

    bias: Tensor | None

    def __init__(self, matrix: StructuredMatrix, bias: Tensor | None = None) -> None:
        """Takes over the parameters of `matrix`; `bias` has shape (out_features,)."""
        super().__init__(matrix)
        # How it may compute, and the dense weight that it may keep; `dispatch.set_dispatch` sets it.
        self.ways = Ways()
        # The class that this layer replaced, which `surgery.dense_layer` gives back.
        self.dense_class: type[nn.Module] = nn.Linear
        if isinstance(bias, Tensor) and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias)
        self.register_parameter("bias", bias)

    @property
    def sizes(self) -> Sizes:
        return self.structure, self.out_features, self.in_features, self.spec

    def forward(self, x: Tensor) -> Tensor:
        factors, ways = self.factors, self.ways
        if torch.compiler.is_compiling():
            # Nothing is decided here but what a graph is specialised for anyway: whether it is one token.
            way = ways.way_of_graph(x, self.in_features)
        else:
            way = ways.choose(self.sizes, factors, x, self.bias)
        return compute(way, self.structure, factors, x, self.bias, ways.cache)

    def train(self, mode: bool = True) -> Self:
        """As of any module; the dense weight that was kept is given up, since a trained one would be another."""
        if mode:
            self.ways.cache.clear()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.ways.cache.clear()  # the factors go elsewhere, or change their dtype
        return super()._apply(fn, recurse)


class NativeLinear(nn.Linear):
    """A dense layer that takes the native routine for few tokens on a CPU, as structured ones do.

    It has nothing of its own beside the forward pass: a layer is made one, and an ordinary one again, by its class.
    """

    def forward(self, x: Tensor) -> Tensor:
        weights = [self.weight] if self.bias is None else [self.weight, self.bias]
        wants_gradient = torch.is_grad_enabled() and any(part.requires_grad for part in (x, *weights))
        if not wants_gradient and torch._C._get_tracing_state() is None and native.takes(x, *weights):
            return native.linear(self.weight, x, self.bias)
        return super().forward(x)


class StructuredEmbedding(StructuredLayer):
    """The rows of W (num_embeddings, embedding_dim) at integer indices, (...) to (..., embedding_dim).

    A tied head is a StructuredLinear that holds the same parameters.

    >>> import torch, kronpress as kp
    >>> layer = kp.StructuredEmbedding(kp.matrices.LowRank(100, 8, kp.matrices.LowRank.Spec(rank=2)))
    >>> layer(torch.tensor([[3, 99]])).shape
    torch.Size([1, 2, 8])
    """

    def __init__(self, matrix: StructuredMatrix, padding_idx: int | None = None) -> None:
        """Takes over the parameters of `matrix`; `padding_idx` is that of the embedding it replaces, kept for it."""
        super().__init__(matrix)
        self.padding_idx = padding_idx

    @property
    def num_embeddings(self) -> int:
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        return self.in_features

    def forward(self, indices: Tensor) -> Tensor:
        return self.structure.rows(self.factors, indices)
