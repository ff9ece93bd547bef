"""The ways in which a structured layer can compute x Wᵀ + b, and which of them is predicted to be the fastest.

A prediction is a roofline, operation by operation: `multiply` and `dense` are traced on the meta device, each product
of matrices takes the longer of its arithmetic and its traffic, every other operation its traffic, and each a little to
be started. So a structure needs no formula of its own. What the device can do is in `Constants`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any, Literal
from weakref import ref

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, PositiveFloat
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from kronpress.matrices import StructuredMatrix
from kronpress.matrices.structured_matrix import Factors

Way = Literal["factors", "native", "cached dense", "transient dense"]
# Without being asked, no layer holds more than its factors.
DEFAULT_WAYS: frozenset[Way] = frozenset({"factors", "native", "transient dense"})
# No prediction is exact. What the factors win over a kept weight has to be this much, since that is surely as fast as a
# dense layer; a weight that is built for a call has to win as much over the factors.
LEAST_GAIN = 1.15
# The C library gives larger memory back at once, and what is new to a process has to be cleared by the system first.
LARGEST_REUSED_BYTES = 2**25
# The length for which a graph is made that serves all lengths but one token.
LONG_PREFILL = 512


class Constants(BaseModel):
    """What a device does in one second in one dtype, as far as the choice of a way depends on it.

    `batched_flops_per_second`: of a batch of small products, one for each token; `weight_bytes_per_second`: of a dense
    weight by which one token is multiplied; `bytes_per_second` and `strided_bytes_per_second`: read and written by a
    pointwise operation, and by a copy that transposes; `new_bytes_per_second`: of memory that the process has not used
    before; `seconds_per_operation`: to start one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    flops_per_second: PositiveFloat
    batched_flops_per_second: PositiveFloat
    weight_bytes_per_second: PositiveFloat
    bytes_per_second: PositiveFloat
    strided_bytes_per_second: PositiveFloat
    new_bytes_per_second: PositiveFloat
    seconds_per_operation: PositiveFloat


# By device type and bytes of a number, where nothing was measured: one core with AVX-512, and an H200.
TABLE: Mapping[tuple[str, int], Constants] = {
    ("cpu", 4): Constants(
        flops_per_second=8e10,
        batched_flops_per_second=1.5e10,
        weight_bytes_per_second=1e10,
        bytes_per_second=1e10,
        strided_bytes_per_second=4e9,
        new_bytes_per_second=2e9,
        seconds_per_operation=4e-6,
    ),
    ("cpu", 2): Constants(
        flops_per_second=1.8e11,
        batched_flops_per_second=2e10,
        weight_bytes_per_second=7e9,
        bytes_per_second=6e9,
        strided_bytes_per_second=2e9,
        new_bytes_per_second=2e9,
        seconds_per_operation=4e-6,
    ),
    ("cuda", 4): Constants(
        flops_per_second=5e13,
        batched_flops_per_second=1e13,
        weight_bytes_per_second=3.5e12,
        bytes_per_second=3.5e12,
        strided_bytes_per_second=2e12,
        new_bytes_per_second=3.5e12,
        seconds_per_operation=5e-6,
    ),
    ("cuda", 2): Constants(
        flops_per_second=5e14,
        batched_flops_per_second=5e13,
        weight_bytes_per_second=3.5e12,
        bytes_per_second=3.5e12,
        strided_bytes_per_second=2e12,
        new_bytes_per_second=3.5e12,
        seconds_per_operation=5e-6,
    ),
}


def table_constants(device: str, itemsize: int) -> Constants:
    """Those of the table; of a device or a dtype that it does not have, those of the most alike."""
    return TABLE["cpu" if device == "cpu" else "cuda", 2 if itemsize == 2 else 4]


class Operation(BaseModel):
    """One step of a computation: its arithmetic, what it reads, writes and allocates, and of what kind it is."""

    model_config = ConfigDict(frozen=True)

    flops: int
    num_bytes: int
    new_bytes: int = 0
    is_transposing: bool = False
    is_batched: bool = False

    def seconds(self, constants: Constants) -> float:
        rate = constants.strided_bytes_per_second if self.is_transposing else constants.bytes_per_second
        if self.flops:
            rate = constants.weight_bytes_per_second
        flops_rate = constants.batched_flops_per_second if self.is_batched else constants.flops_per_second
        seconds = constants.seconds_per_operation + max(self.flops / flops_rate, self.num_bytes / rate)
        if self.new_bytes > LARGEST_REUSED_BYTES:
            seconds += self.new_bytes / constants.new_bytes_per_second
        return seconds


class _Recorder(TorchDispatchMode):
    """Every operation that makes a new tensor; views cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not func.is_view and func.overloadpacket is not torch.ops.aten._unsafe_view:
            read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            count = flop_registry.get(func.overloadpacket)
            self.operations.append(
                Operation(
                    flops=count(*args, **kwargs, out_val=result) if count else 0,
                    num_bytes=sum(tensor.nbytes for tensor in (*read, *written)),
                    new_bytes=sum(tensor.nbytes for tensor in written),
                    is_transposing=not count and not all(tensor.is_contiguous() for tensor in read),
                    is_batched=func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm),
                )
            )
        return result


Sizes = tuple[type[StructuredMatrix], int, int, Any]


@lru_cache(maxsize=4096)
def operations(sizes: Sizes, num_tokens: int, itemsize: int) -> tuple[Operation, ...]:
    """The steps of `multiply` for (structure, out_features, in_features, spec); of `dense` for no tokens."""
    structure, out_features, in_features, spec = sizes
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[itemsize]
    matrix = structure(out_features, in_features, spec, dtype=dtype, device="meta")
    x = torch.empty(num_tokens, in_features, dtype=dtype, device="meta")
    with torch.no_grad(), _Recorder() as recorder:
        if num_tokens:
            structure.multiply(matrix.factors, x)
        else:
            structure.dense(matrix.factors)
    return tuple(recorder.operations)


def dense_operation(out_features: int, in_features: int, num_tokens: int, itemsize: int) -> Operation:
    """x Wᵀ with W at hand."""
    num_entries = out_features * in_features
    moved = num_entries + num_tokens * (out_features + in_features)
    return Operation(flops=2 * num_tokens * num_entries, num_bytes=moved * itemsize)


@lru_cache(maxsize=4096)
def predictions(sizes: Sizes, num_tokens: int, itemsize: int, constants: Constants) -> dict[str, float]:
    """Seconds of every way but the native one, which is not predicted, and of an ordinary `dense` layer."""
    _, out_features, in_features, _ = sizes
    dense = dense_operation(out_features, in_features, num_tokens, itemsize).seconds(constants)
    factors, building = (
        sum(each.seconds(constants) for each in operations(sizes, tokens, itemsize)) for tokens in (num_tokens, 0)
    )
    return {"factors": factors, "cached dense": dense, "transient dense": dense + building, "dense": dense}


def fastest(seconds: Mapping[str, float], allowed: Collection[Way]) -> Way:
    """The way of least predicted time of those allowed; what is in doubt goes to the kept weight, then to the factors.

    >>> fastest({"factors": 3.0, "cached dense": 1.0, "transient dense": 2.0}, ["factors", "transient dense"])
    'transient dense'
    >>> fastest({"factors": 0.95, "cached dense": 1.0, "transient dense": 2.0}, ["factors", "cached dense"])
    'cached dense'
    """
    if "cached dense" in allowed and seconds["cached dense"] < LEAST_GAIN * seconds["factors"]:
        return "cached dense"
    if "transient dense" in allowed and LEAST_GAIN * seconds["transient dense"] < seconds["factors"]:
        return "transient dense"
    return "factors"


class DenseCache:
    """The dense weight of a layer, kept as long as its factors stay what they are.

    It is no tensor of the layer's: neither saved, nor copied, nor moved with it. A change made through `.data` alone
    leaves no trace in the factors and is not noticed; `clear` is there for it. Where oneDNN multiplies, the weight is
    kept in the order in which it reads it, which a layer that owns its weight as a parameter cannot do.
    """

    def __init__(self) -> None:
        self._made_of: tuple[Any, ...] = ()
        self._dense: Tensor | None = None
        self._num_bytes = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> DenseCache:
        return DenseCache()

    def __reduce__(self) -> tuple[type[DenseCache], tuple[()]]:
        return DenseCache, ()

    @property
    def num_bytes(self) -> int:
        """What is held now."""
        return self._num_bytes

    def clear(self) -> None:
        self.__init__()  # type: ignore[misc]

    def linear(
        self, structure: type[StructuredMatrix], factors: Factors, x: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """x Wᵀ + bias; W is built anew if a factor is another tensor, has other memory, or was written to."""
        known = self._made_of
        if len(known) != len(factors) or not all(
            reference() is factor and state == _state(factor)
            for (reference, state), factor in zip(known, factors.values(), strict=True)
        ):
            self.clear()  # before the new one is built: two would be a peak
            dense = structure.dense({name: factor.detach() for name, factor in factors.items()})
            self._num_bytes = dense.nbytes
            self._dense = _packed(dense) if _can_be_packed(dense) else dense
            self._made_of = tuple((ref(factor), _state(factor)) for factor in factors.values())
        assert self._dense is not None
        if not self._dense.is_mkldnn:
            return F.linear(x, self._dense, bias)
        if torch.is_grad_enabled() and x.requires_grad:  # which products with a packed weight do not have
            return F.linear(x, self._dense.to_dense(), bias)
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), self._dense, bias, "none", [], "")


def _can_be_packed(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _packed(weight: Tensor) -> Tensor:
    """W in the order that is best for long prefills; shorter ones take it as well."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), LONG_PREFILL)


def _state(factor: Tensor) -> tuple[Any, ...]:
    return factor.data_ptr(), factor._version, factor.dtype, factor.device


class Ways:
    """How one layer may compute and what was chosen for it so far; its copies share neither choices nor cache.

    `for_compiled` is the way of graphs for more than one token: it is chosen beforehand, so that the number of tokens
    stays a symbol in them.
    """

    def __init__(
        self,
        allowed: Collection[Way] = DEFAULT_WAYS,
        constants: Mapping[tuple[str, int], Constants] | None = None,
    ) -> None:
        self.allowed = frozenset(allowed)
        self.constants = constants
        self.for_compiled: Way = "factors"
        self.cache = DenseCache()
        self._chosen: dict[tuple[str, int, int], Way] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Ways:
        copied = Ways(self.allowed, self.constants)
        copied.for_compiled = self.for_compiled
        return copied

    def __reduce__(self) -> tuple[type[Ways], tuple[Any, ...]]:
        return Ways, (self.allowed, self.constants)

    def predictions(self, sizes: Sizes, num_tokens: int, device: str, itemsize: int) -> dict[str, float]:
        """Seconds of each way; `constants` are those of the table where nothing was measured."""
        known = self.constants or {}
        constants = known.get((device, itemsize)) or table_constants(device, itemsize)
        return predictions(sizes, num_tokens, itemsize, constants)

    def by_prediction(self, sizes: Sizes, num_tokens: int, device: str, itemsize: int) -> Way:
        """The fastest way that is allowed, of those that are predicted; lengths up to twice as long share it."""
        key = device, itemsize, num_tokens.bit_length()
        if key not in self._chosen:
            length = 1 << (num_tokens.bit_length() - 1)
            self._chosen[key] = fastest(self.predictions(sizes, length, device, itemsize), self.allowed)
        return self._chosen[key]

    def way_of_graph(self, x: Tensor, in_features: int) -> Way:
        """The way in a compiled or exported graph: for all lengths but one token the one that was chosen for it."""
        if self.for_compiled == "factors" or torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            return "factors"
        # One token always has a graph of its own, so that this is a constant and guards nothing.
        return "factors" if x.numel() == in_features else self.for_compiled

    def choose(self, sizes: Sizes, factors: Factors, x: Tensor, bias: Tensor | None = None) -> Way:
        """The way for this call, outside of compiled graphs.

        By the factors alone: what trains, tensors that stand for others (of tracers, say), and mixed dtypes.
        """
        parts = [*factors.values(), *([] if bias is None else [bias])]
        floating = [part for part in parts if part.is_floating_point()]
        if (
            (torch.is_grad_enabled() and any(part.requires_grad for part in floating))
            or type(x) is not Tensor
            or not x.numel()
            or x.is_meta
            or any(part.dtype != x.dtype for part in floating)
            or any(part.device != x.device for part in parts)
            or torch.is_autocast_enabled(x.device.type)
            or torch._C._get_tracing_state() is not None
        ):
            return "factors"
        structure, _, in_features, _ = sizes
        if "native" in self.allowed and structure.takes_native(factors, x, bias):
            return "native"
        way = self.by_prediction(sizes, x.numel() // in_features, x.device.type, x.element_size())
        # Those made in inference mode do not tell when they are written to, and what is computed is new in each call.
        if way == "cached dense" and any(part.is_inference() or not part.is_leaf for part in parts):
            return "factors"
        return way


def compute(
    way: Way, structure: type[StructuredMatrix], factors: Factors, x: Tensor, bias: Tensor | None, cache: DenseCache
) -> Tensor:
    """x Wᵀ + bias in the way given."""
    match way:
        case "native":
            return structure.multiply_native(factors, x, bias)
        case "cached dense":
            return cache.linear(structure, factors, x, bias)
        case "transient dense":
            return F.linear(x, structure.dense(factors), bias)
        case "factors":
            return structure.multiply(factors, x, bias)
