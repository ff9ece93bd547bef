"""The abstract base of all structures: a matrix W that is stored, multiplied and fitted as a few factors.

A structure is one file with one subclass. It gives a `Spec`, `Options` of its fit where there is a choice, and
five functions; the laws that they obey are checked for every structure by tests/contract. The functions are
static and take the factors as a dictionary of tensors, so that a layer may own the factors as parameters under
its own name.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, ClassVar, Self

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kronpress.matrices.metric import FitMoments, Metric

Factors = Mapping[str, Tensor]


class Spec(BaseModel):
    """The sizes of one structured matrix: frozen, strict, and the same after a round trip through JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Options(BaseModel):
    """How a structure is fitted to a dense weight: frozen and strict like `Spec`. Most structures leave no choice."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class StructuredMatrix(nn.Module):
    """W of shape (out_features, in_features), held as factors instead of entries.

    The parameters are named as in `factor_shapes`, and one of them is called `weight` and has three
    dimensions: a checkpoint of a structured layer then cannot be loaded by mistake into a dense one.
    """

    Spec: ClassVar[type[Spec]]
    Options: ClassVar[type[Options]] = Options
    # The factors that matrices with one and the same input hold in common: they are fitted as one matrix, see `split`.
    shared_factors: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        out_features: int,
        in_features: int,
        spec: Any,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        options: Any = None,
    ) -> None:
        """Factors drawn at random so that Var W_ij = 1 / in_features.

        Args:
            options: how the factors are, or will be, fitted; the structure's default if None.

        Raises:
            RequestError: `spec` does not fit the shape, or `options` do not fit `spec`.
        """
        super().__init__()
        self.out_features, self.in_features, self.spec = out_features, in_features, spec
        self.options = self.Options() if options is None else options
        shapes = self.factor_shapes(out_features, in_features, spec)
        self.check_options(spec, self.options)
        stds = self.initial_stds(out_features, in_features, spec, 1 / in_features)
        for name, shape in shapes.items():
            factor = torch.empty(shape, dtype=dtype, device=device)
            self.register_parameter(name, nn.Parameter(nn.init.normal_(factor, std=stds[name])))
        for name, size in self.order_sizes(out_features, in_features, spec).items():
            self.register_buffer(name, torch.arange(size, device=device))

    # ---- what a structure gives ----

    @staticmethod
    @abstractmethod
    def factor_shapes(out_features: int, in_features: int, spec: Any) -> dict[str, tuple[int, ...]]:
        """The shape of each factor, `weight` first; RequestError if `spec` does not fit the shape."""

    @staticmethod
    @abstractmethod
    def num_paths(spec: Any) -> int:
        """How many products of factor entries are summed in one entry of W."""

    @staticmethod
    @abstractmethod
    def multiply(factors: Factors, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x Wᵀ + bias: (..., in_features) to (..., out_features), never forming W. The fast path.

        `bias` is (out_features,).
        """

    @staticmethod
    @abstractmethod
    def expand(factors: Factors) -> Tensor:
        """W itself, (out_features, in_features). Written differently from `multiply`, whose oracle it is."""

    @staticmethod
    @abstractmethod
    def fit(weight: Tensor, spec: Any, moments: FitMoments = None, options: Any = None) -> dict[str, Tensor]:
        """The factors whose W is nearest to `weight` (out_features, in_features).

        Nearest in Frobenius norm, or in the metric of `moments`: E[x xᵀ] (in_features, in_features) of the layer's
        inputs, InputMoments, or a Metric. Computed in float64, returned in the dtype of `weight`; loads strictly
        into an instance. `options` other than the default may ask for factors that are not the nearest.

        Raises:
            RequestError: `spec` does not fit the shape, `options` do not fit `spec`, or `moments` are of another size.
            WorkError: `moments` hold NaN or infinity.
        """

    @classmethod
    @abstractmethod
    def candidate_specs(
        cls, out_features: int, in_features: int, max_params: int | None = None, **fixed: Any
    ) -> list[Any]:
        """The specs for this shape with the `fixed` fields; a free count (terms, rank) is the most that fits.

        Raises:
            RequestError: a fixed field does not fit the shape, or a free count has no `max_params` to bound it.
        """

    # ---- what a structure may give ----

    @classmethod
    def has_fixed_sizes(cls, fixed: Mapping[str, Any]) -> bool:
        """Whether these fields of `candidate_specs` leave a budget nothing: they are all that is None if not given."""
        parameters = inspect.signature(cls.candidate_specs).parameters.values()
        chosen = {each.name for each in parameters if each.kind is each.KEYWORD_ONLY and each.default is None}
        return chosen <= set(fixed)

    @classmethod
    def initial_stds(cls, out_features: int, in_features: int, spec: Any, mean_square: float) -> dict[str, float]:
        """The standard deviation of each factor, drawn at random, for which the mean of E W_ij² is `mean_square`.

        By default that for which every W_ij is a sum of `num_paths` products of one entry from each factor.
        """
        shapes = cls.factor_shapes(out_features, in_features, spec)
        return dict.fromkeys(shapes, (mean_square / cls.num_paths(spec)) ** (0.5 / len(shapes)))

    @classmethod
    def linear_dims(cls, out_features: int, in_features: int, spec: Any) -> dict[str, tuple[int, int]]:
        """Of each factor, a batch of linear maps, the dimensions of what a map gives and of what it reads.

        By default the last two, or those before a last one of size 1.
        """
        shapes = cls.factor_shapes(out_features, in_features, spec)
        ends = {name: len(shape) - (len(shape) > 2 and shape[-1] == 1) for name, shape in shapes.items()}
        return {name: (end - 2, end - 1) for name, end in ends.items()}

    @staticmethod
    def order_sizes(out_features: int, in_features: int, spec: Any) -> dict[str, int]:
        """The sizes of the permutations that it stores as integers beside its factors, by name."""
        return {}

    @staticmethod
    def part_structures(spec: Any) -> tuple[str, ...]:
        """The names in STRUCTURES of those that its own functions call, if it is composed of others."""
        return ()

    @classmethod
    def dense(cls, factors: Factors) -> Tensor:
        """W itself, (out_features, in_features), contiguous: what `expand` gives, in less time."""
        return cls.expand(factors).contiguous()

    @staticmethod
    def takes_native(factors: Factors, x: Tensor, bias: Tensor | None = None) -> bool:
        """Whether there is a native routine for this product, `multiply_native`, and it is faster: kronpress.native."""
        return False

    @staticmethod
    def multiply_native(factors: Factors, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """What `multiply` gives, by a native routine, without gradients."""
        raise NotImplementedError

    @classmethod
    def rows(cls, factors: Factors, indices: Tensor) -> Tensor:
        """The rows of W at `indices` (...), as (..., in_features): what an embedding looks up."""
        return cls.expand(factors)[indices]

    @classmethod
    def split(cls, factors: Factors, sizes: Sequence[int]) -> list[dict[str, Tensor]]:
        """The factors of each matrix of a group, from those of all of them one above the other.

        For a structure with `shared_factors`, of which each has all; the rest shares no memory.

        Args:
            sizes: out_features of each.
        """
        raise NotImplementedError

    @staticmethod
    def check_options(spec: Any, options: Any) -> None:
        """RequestError if a matrix of these sizes cannot be fitted in that way."""

    @staticmethod
    def healing_parametrization(factors: Factors, options: Any) -> nn.Module | None:
        """What the factor `weight` is computed from while it is healed; None: it is trained as it is.

        The module's `forward` gives `weight`, its `right_inverse` what is trained in its stead
        (`torch.nn.utils.parametrize`).
        """
        return None

    @classmethod
    def screen(cls, weight: Tensor, metric: Metric) -> list[tuple[Any, float, bool]]:
        """Specs of many sizes, each with tr(G ΔW C ΔWᵀ) of its fit or an estimate of it; True if it is no estimate.

        An estimate is meant to be too low rather than too high: what the planner would choose by one it looks at more
        closely by `estimate`, what it would then still choose it fits, and chooses anew. By default the specs at each
        twentieth of the dense matrix's parameters are fitted.

        Args:
            weight: W, (out_features, in_features), in float64.
        """
        found = {}
        out_features, in_features = weight.shape
        for twentieth in range(1, 20):
            for spec in cls.candidate_specs(out_features, in_features, weight.numel() * twentieth // 20):
                if spec not in found:
                    found[spec] = metric.squared_norm(weight - cls.expand(cls.fit(weight, spec, metric)))
        return [(spec, error, True) for spec, error in found.items()]

    @classmethod
    def estimate(cls, weight: Tensor, spec: Any, metric: Metric) -> float:
        """A closer estimate of tr(G ΔW C ΔWᵀ) of a fit, at less than the cost of it; that of the fit by default."""
        return metric.squared_norm(weight - cls.expand(cls.fit(weight, spec, metric)))

    # ---- what every structure has ----

    @classmethod
    def from_dense(cls, weight: Tensor, spec: Any, moments: FitMoments = None, options: Any = None) -> Self:
        """The structured matrix fitted to `weight` (out_features, in_features), in its dtype, on its device."""
        out_features, in_features = weight.shape
        matrix = cls(out_features, in_features, spec, dtype=weight.dtype, device="meta", options=options)
        matrix.load_state_dict(cls.fit(weight, spec, moments, options), strict=True, assign=True)
        return matrix

    @property
    def factors(self) -> dict[str, Tensor]:
        """All that W is made of: parameters, and the integers of permutations."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def matmul(self, x: Tensor) -> Tensor:
        """x Wᵀ: (..., in_features) to (..., out_features)."""
        return self.multiply(self.factors, x)

    forward = matmul

    def to_dense(self) -> Tensor:
        """W, (out_features, in_features)."""
        return self.expand(self.factors)

    def extra_repr(self) -> str:
        return f"{self.out_features}, {self.in_features}, {self.spec!r}"

    @classmethod
    def count_params(cls, out_features: int, in_features: int, spec: Any) -> int:
        """Stored floating-point numbers; the integers of permutations are counted in bytes alone."""
        return sum(map(prod, cls.factor_shapes(out_features, in_features, spec).values()))

    @classmethod
    def count_flops(cls, out_features: int, in_features: int, spec: Any) -> int:
        """Floating-point operations of `multiply` for one token, 2 for each multiply-add, as traced on meta."""
        matrix = cls(out_features, in_features, spec, device="meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            matrix.matmul(torch.empty(1, in_features, device="meta"))
        return counter.get_total_flops()


# What every name stands for; filled by the package's __init__, and by users with structures of their own.
STRUCTURES: dict[str, type[StructuredMatrix]] = {}
