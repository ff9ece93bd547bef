"""What a fast path has to beat: the dense model in 8 bits, and the plain ways to multiply by a Kronecker sum.

They are written to be measured, not to be used. What is rounded is rounded for real: `int8` computes from 8-bit storage
with torch's own kernel, unlike `kronpress.rivals.quantize_`, which asks what rounding costs in quality.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kronpress import native
from kronpress.benchmark.sizes import INT8
from kronpress.errors import RequestError
from kronpress.layers import NativeLinear, StructuredLinear
from kronpress.matrices import Kronecker, PermutedKronecker
from kronpress.surgery import dense_weight, embeddings, linear_layers, replace_module_, structured_layers

NATIVE = "native-dense"
# The largest integer of 8 bits; −128 is left out, so that the integers are symmetric.
LARGEST = 127


class Int8Linear(nn.Module):
    """x Wᵀ + b with W in 8 bits, a scale for each row, x rounded to 8 bits as it comes: torch's dynamic quantisation.

    Of torch's ways on a CPU this is the fastest at one token as at hundreds; `torch._weight_int8pack_mm`, which leaves
    x as it is, is slower than the dense layer in float32.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Packs W (out_features, in_features) and b (out_features,)."""
        super().__init__()
        scales = _scales(weight)
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        with warnings.catch_warnings():  # torch means to drop these tensors, and has no such kernel without them yet
            warnings.simplefilter("ignore")
            quantized = torch.quantize_per_channel(weight.detach().float(), scales.double(), zeros, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(quantized, None if bias is None else bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        # 7 bits of x, as torch itself has it: without them sums of pairs overflow on processors without VNNI.
        y = torch.ops.quantized.linear_dynamic(x.float(), self.packed, reduce_range=True)
        return y.to(x.dtype)


class Int8Embedding(nn.Module):
    """Rows of a table in 8 bits, each with a scale."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        scales = _scales(weight)
        self.dtype = weight.dtype
        self.register_buffer("table", (weight.detach().float() / scales[:, None]).round_().to(torch.int8))
        self.register_buffer("scales", scales)

    def forward(self, indices: Tensor) -> Tensor:
        rows: Tensor = self.table[indices] * self.scales[indices, None]  # type: ignore[index]
        return rows.to(self.dtype)


def _scales(weight: Tensor) -> Tensor:
    """What the integer 1 stands for in each row, so that its largest entry becomes LARGEST; (rows,) in float32."""
    return (weight.detach().float().abs().amax(1) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)


def check_rival(model: nn.Module, rival: str) -> None:
    """Refuse a rival that cannot be made of the model, which may be without weights.

    Raises:
        RequestError: `int8` or `native-dense` of a compressed model, with a GPU, or without the native routines; the
            others of a model without a Kronecker sum.
    """
    if rival in OF_DENSE:
        if structured_layers(model):
            raise RequestError(f"rival {rival} is made of a dense model, and this one is compressed: give a dense one")
        if torch.cuda.is_available():
            raise RequestError(f"rival {rival} computes on a CPU alone, and models are measured on the GPU here")
        if rival == NATIVE and not native.is_available():
            raise RequestError(f"rival {rival} needs the native routines, and there are none: {native.why_not()}")
    elif not _kronecker_layers(model):
        raise RequestError(f"rival {rival} multiplies Kronecker sums in another way, and the model has none")


def _kronecker_layers(model: nn.Module) -> dict[str, StructuredLinear]:
    return {
        name: layer
        for name, layer in structured_layers(model).items()
        if isinstance(layer, StructuredLinear) and layer.structure in (Kronecker, PermutedKronecker)
    }


def quantize_(model: nn.Module) -> None:
    """Put every linear layer and embedding of a dense model into 8 bits, in place.

    A tied head is packed for itself, beside its table.
    """
    for name, layer in linear_layers(model).items():
        bias: Tensor | None = layer.bias  # type: ignore[assignment]
        replace_module_(model, name, Int8Linear(dense_weight(layer), bias))
    for name, table in embeddings(model).items():
        replace_module_(model, name, Int8Embedding(table.weight))


def use_native_(model: nn.Module) -> None:
    """Let every dense linear layer take the native routine for few tokens, in place; a head stays tied."""
    for name, layer in linear_layers(model).items():
        linear = layer
        if not isinstance(layer, nn.Linear):  # stored the other way round
            weight = dense_weight(layer).contiguous()
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None, device="meta")
            linear.weight, linear.bias = nn.Parameter(weight), layer.bias  # type: ignore[assignment]
            replace_module_(model, name, linear)
        linear.__class__ = NativeLinear


class KronEveryTime(nn.Module):
    """Krony-PT's way: W = Σ_i A_i ⊗ B_i by `torch.kron` in every forward pass, and then the dense product."""

    def __init__(self, layer: StructuredLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.layer.factors["weight"], self.layer.factors["right"]
        weight = sum(torch.kron(left[:, i], right[:, i]) for i in range(left.shape[1]))
        return _with_orders(self.layer, x, lambda x: F.linear(x, weight))  # type: ignore[arg-type]


class Einsum(nn.Module):
    """The formula as it stands, left to `torch.einsum`: y[p, q] = Σ_iab A_i[p, a] B_i[q, b] x[a, b]."""

    def __init__(self, layer: StructuredLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.layer.factors["weight"], self.layer.factors["right"]

        def product(x: Tensor) -> Tensor:
            x_tab = x.unflatten(-1, (left.shape[2], right.shape[2]))
            return torch.einsum("...ab,pia,qib->...pq", x_tab, left, right).flatten(-2)

        return _with_orders(self.layer, x, product)


def _with_orders(layer: StructuredLinear, x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
    """The product with the layer's permutations around it, if it has any, and its bias."""
    if "column_order" in layer.factors:
        x = x[..., layer.factors["column_order"]]
    y = product(x)
    if "row_order" in layer.factors:
        y = y[..., layer.factors["row_order"]]
    return y if layer.bias is None else y + layer.bias


def replace_kronecker_(model: nn.Module, way: Callable[[StructuredLinear], nn.Module]) -> None:
    """Let every linear layer that is a Kronecker sum be multiplied in that way, in place."""
    for name, layer in _kronecker_layers(model).items():
        replace_module_(model, name, way(layer))


# By the name that --rivals gives them; each changes the model in place. Those OF_DENSE are made of the dense model, the
# others of the compressed one.
RIVALS: dict[str, Callable[[nn.Module], None]] = {
    INT8: quantize_,
    NATIVE: use_native_,
    "krony-pt": lambda model: replace_kronecker_(model, KronEveryTime),
    "einsum": lambda model: replace_kronecker_(model, Einsum),
}
OF_DENSE = (INT8, NATIVE)
