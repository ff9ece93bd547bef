"""The layer that stands in for a dense one: a structured matrix and a bias."""

from __future__ import annotations

from torch import Tensor, nn

from kronpress.matrices import StructuredMatrix


class StructuredLinear(nn.Module):
    """y = x Wᵀ + b with a structured W, (..., in_features) to (..., out_features).

    The layer owns the factors itself, so that its checkpoint keys are `<module>.weight`, with three
    dimensions, and its siblings: stock transformers then refuses the checkpoint instead of filling dense
    weights at random.

    >>> import torch, kronpress as kp
    >>> matrix = kp.matrices.LowRank(6, 4, kp.matrices.LowRank.Spec(rank=2))
    >>> layer = kp.StructuredLinear(matrix, bias=torch.zeros(6))
    >>> sorted(layer.state_dict())
    ['bias', 'right', 'weight']
    """

    bias: Tensor | None

    def __init__(self, matrix: StructuredMatrix, bias: Tensor | None = None) -> None:
        """Takes over the parameters of `matrix`; `bias` has shape (out_features,)."""
        super().__init__()
        self.structure = type(matrix)
        self.out_features, self.in_features, self.spec = matrix.out_features, matrix.in_features, matrix.spec
        self.options = matrix.options
        # The class that this layer replaced, which `surgery.dense_layer` gives back.
        self.dense_class: type[nn.Module] = nn.Linear
        self.factor_names = tuple(matrix.factors)
        for name, factor in matrix.named_parameters():
            self.register_parameter(name, factor)
        if isinstance(bias, Tensor) and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias)
        self.register_parameter("bias", bias)

    @property
    def factors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.factor_names}

    def forward(self, x: Tensor) -> Tensor:
        y = self.structure.multiply(self.factors, x)
        return y if self.bias is None else y + self.bias

    def to_dense(self) -> Tensor:
        """W, (out_features, in_features)."""
        return self.structure.expand(self.factors)

    def extra_repr(self) -> str:
        return f"{self.out_features}, {self.in_features}, {self.structure.__name__}, {self.spec!r}"
