"""TensorGPT: each row of W, an embedding's token, is a tensor train of its own (Xu et al. 2023, arXiv 2307.00526).

Letters: W (v, d), a row for each token; a row with zeros behind it is a tensor of shape (n_1, ..., n_N), with
d ≤ d' = Π n_k; its entry (j_1 ... j_N), j_N the fastest, is G_1[j_1] G_2[:, j_2] ... G_N[:, j_N] with cores
G_k (r_(k-1), n_k, r_k), r_0 = r_N = 1; t vectors are multiplied. No token's cores depend on another's: tokens come and
go by themselves (`with_tokens`, `without_tokens`). C (d, d) of the metric as in metric.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, prod
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor

from kronpress.errors import RequestError
from kronpress.matrices.kronecker import divisors
from kronpress.matrices.metric import FitMoments, as_metric, separable, square_root
from kronpress.matrices.structured_matrix import Factors, Options, Spec, StructuredMatrix

# A product goes through the tokens in so many pieces, so that nothing in it is as large as W.
PIECES = 8
# For more vectors than this, rows are made anew for each product: that is less work than to contract every vector.
FEW_VECTORS = 8
# Tokens that are fitted at once.
FITTED_TOKENS = 4096
# An exact factorisation of the width is taken if its core sizes add up to at most this much more than padded ones.
EXACT_SUM = 1.5


class TensorGPTSpec(Spec):
    """`rank` r, or the most that an unfolding can have where that is less; `shape` (n_1, ..., n_N) of a row."""

    rank: PositiveInt = 1
    shape: Annotated[tuple[PositiveInt, ...], Field(min_length=2)]


class TensorGPT(StructuredMatrix):
    """One core of all tokens after the other: `weight` (v, n_1, r_1), `core2` (v, r_1, n_2, r_2), ...

    Where d' > d there is `coordinate_order` (d,), integers: the place of each coordinate among the d' numbers of a row.

    >>> spec = TensorGPT.Spec(shape=(2,) * 10)
    >>> TensorGPT.count_params(50257, 768, spec) * 38.4 == 50257 * 768  # the paper's largest compression
    True
    """

    Spec = TensorGPTSpec

    @staticmethod
    def factor_shapes(out_features: int, in_features: int, spec: TensorGPTSpec) -> dict[str, tuple[int, ...]]:
        if prod(spec.shape) < in_features:
            raise RequestError(f"shape {spec.shape} holds {prod(spec.shape)} numbers: a row has {in_features}")
        most = max(_full_ranks(spec.shape))
        if spec.rank > most:
            raise RequestError(f"rank {spec.rank}: a row of shape {spec.shape} has at most {most}")
        ranks = _ranks(spec)
        shapes: dict[str, tuple[int, ...]] = {"weight": (out_features, spec.shape[0], ranks[1])}
        for k in range(1, len(spec.shape)):
            shapes[f"core{k + 1}"] = (out_features, ranks[k], spec.shape[k], ranks[k + 1])
        return shapes

    @staticmethod
    def order_sizes(out_features: int, in_features: int, spec: TensorGPTSpec) -> dict[str, int]:
        return {"coordinate_order": in_features} if prod(spec.shape) > in_features else {}

    @staticmethod
    def num_paths(spec: TensorGPTSpec) -> int:
        return prod(_ranks(spec))

    @classmethod
    def rows(cls, factors: Factors, indices: Tensor) -> Tensor:
        """By the cores of these tokens alone."""
        found = factors["weight"][indices].flatten(0, -3)  # (tokens, n_1, r_1)
        for core in _other_cores(factors):
            own = core[indices].flatten(0, -4)  # (tokens, r, n, r')
            found = torch.bmm(found, own.flatten(2)).unflatten(2, own.shape[2:]).flatten(1, 2)
        found = found.squeeze(-1).unflatten(0, indices.shape)
        return found.index_select(-1, factors["coordinate_order"]) if "coordinate_order" in factors else found

    @classmethod
    def dense(cls, factors: Factors) -> Tensor:
        return cls.rows(factors, torch.arange(len(factors["weight"]), device=factors["weight"].device)).contiguous()

    @staticmethod
    def expand(factors: Factors) -> Tensor:
        w = factors["weight"]
        for core in _other_cores(factors):
            w = torch.einsum("var,vrbs->vabs", w, core).flatten(1, 2)
        w = w.squeeze(-1)
        return w[:, factors["coordinate_order"]] if "coordinate_order" in factors else w

    @staticmethod
    def multiply(factors: Factors, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """A tied head: a few vectors are contracted with the cores; for many, rows are made a piece at a time."""
        flat = x.reshape(-1, x.shape[-1])
        if "coordinate_order" in factors:
            size = prod([core.shape[-2] for core in (*_other_cores(factors), factors["weight"])])
            padded = flat.new_zeros(len(flat), size)
            flat = padded.index_copy(1, factors["coordinate_order"], flat)
        step = -(-len(factors["weight"]) // PIECES)
        pieces = zip(*(core.split(step) for core in (factors["weight"], *_other_cores(factors))), strict=True)
        multiplied = _by_rows if len(flat) > FEW_VECTORS else _by_contraction
        y = torch.cat([multiplied(first, rest, flat) for first, *rest in pieces], dim=1)
        y = y.reshape(*x.shape[:-1], len(factors["weight"]))
        return y if bias is None else y + bias

    @staticmethod
    def fit(
        weight: Tensor, spec: TensorGPTSpec, moments: FitMoments = None, options: Options | None = None
    ) -> dict[str, Tensor]:
        """TT-SVD of every row by itself (Oseledets 2011), all rows at once: the nearest for two cores.

        For more the squared error is at most N − 1 times the least. To real inputs, in tr(G ΔW C ΔWᵀ), it is that of
        the nearest separable C_1 ⊗ ... ⊗ C_N, for the rows that come nearer by it in C itself; a diagonal G weighs
        rows, of which each has its own cores, and says nothing. Any other is not looked at.
        """
        out_features, in_features = weight.shape
        shapes = TensorGPT.factor_shapes(out_features, in_features, spec)
        metric = as_metric(moments, weight)
        second = None if metric is None else metric.where_it_sees.input
        padding = prod(spec.shape) - in_features
        roots = None if second is None else _separable_roots(_padded_metric(second, padding), spec.shape)
        pieces = []
        for some in weight.split(FITTED_TOKENS):
            rows = F.pad(some.to(torch.float64), (0, padding)).unflatten(1, spec.shape)
            cores = _tensor_trains(rows, spec)
            if roots is not None:
                seen = _by_mode(rows, [root for root, _ in roots])
                others = [
                    torch.einsum("vrjs,ij->vris", core, inverse)
                    for core, (_, inverse) in zip(_tensor_trains(seen, spec), roots, strict=True)
                ]
                error, other_error = (_row_errors(some, found, in_features, second) for found in (cores, others))
                is_better = (other_error < error)[:, None, None, None]
                cores = [torch.where(is_better, other, core) for core, other in zip(cores, others, strict=True)]
            pieces.append(cores)
        joined = [torch.cat(each).to(weight.dtype).contiguous() for each in zip(*pieces, strict=True)]
        factors = dict(zip(shapes, [joined[0].squeeze(1), *joined[1:]], strict=True))
        sizes = TensorGPT.order_sizes(out_features, in_features, spec)
        return {**factors, **{name: torch.arange(size, device=weight.device) for name, size in sizes.items()}}

    @classmethod
    def candidate_specs(  # type: ignore[override]
        cls,
        out_features: int,
        in_features: int,
        max_params: int | None = None,
        *,
        shape: tuple[int, ...] | None = None,
        num_cores: int = 2,
        rank: int | None = None,
    ) -> list[TensorGPTSpec]:
        """The one spec with `shape` or `num_cores` about equal sizes, and `rank` or the largest that fits."""
        if rank is None and max_params is None:
            raise RequestError("TensorGPT needs a rank or a budget to choose it by")
        if num_cores < 2:
            raise RequestError(f"num_cores {num_cores}: a tensor train has at least 2")
        chosen = core_sizes(in_features, num_cores) if shape is None else tuple(shape)
        full = max(_full_ranks(chosen))
        if rank is not None and rank > full:
            raise RequestError(f"rank {rank}: a row of shape {chosen} has at most {full}")
        found = None
        for each in range(1, full + 1) if rank is None else [rank]:
            spec = TensorGPTSpec(shape=chosen, rank=each)
            if max_params is not None and cls.count_params(out_features, in_features, spec) > max_params:
                break
            found = spec
        return [] if found is None else [found]


def core_sizes(width: int, num_cores: int) -> tuple[int, ...]:
    """Sizes (n_1, ..., n_N) whose product is at least `width`, as equal as they can be; exactly it where that is near.

    >>> core_sizes(768, 2), core_sizes(769, 2), core_sizes(768, 10)
    ((24, 32), (28, 28), (1, 2, 2, 2, 2, 2, 2, 2, 2, 3))
    """
    padded, rest = [], width
    for left in range(num_cores, 0, -1):
        size = ceil(round(rest ** (1 / left), 9))
        padded.append(size)
        rest = ceil(rest / size)
    exact, rest = [], width
    for left in range(num_cores, 0, -1):
        size = min(divisors(rest), key=lambda each: abs(each - rest ** (1 / left))) if left > 1 else rest
        exact.append(size)
        rest //= size
    return tuple(sorted(exact if sum(exact) <= EXACT_SUM * sum(padded) else padded))


def with_tokens(factors: Factors, rows: Tensor, spec: TensorGPTSpec) -> dict[str, Tensor]:
    """The factors of W with `rows` (new, d) below it, fitted by themselves; those of the tokens there are the same."""
    new = TensorGPT.fit(rows, spec)
    return {
        name: torch.cat([core, new[name].to(core)]) if core.is_floating_point() else core
        for name, core in factors.items()
    }


def without_tokens(factors: Factors, tokens: Sequence[int]) -> dict[str, Tensor]:
    """The factors of W without the rows `tokens`; those that stay are the same, and move up."""
    kept = [token for token in range(len(factors["weight"])) if token not in set(tokens)]
    return {name: core[kept] if core.is_floating_point() else core for name, core in factors.items()}


def _full_ranks(shape: Sequence[int]) -> list[int]:
    """The most that each r_k can be, k from 0 to N."""
    return [min(prod(shape[:k]), prod(shape[k:])) for k in range(len(shape) + 1)]


def _ranks(spec: TensorGPTSpec) -> list[int]:
    return [min(spec.rank, most) for most in _full_ranks(spec.shape)]


def _other_cores(factors: Factors) -> list[Tensor]:
    """G_2 to G_N, (v, r, n, r') each."""
    return [factors[f"core{k}"] for k in range(2, len(factors) + 2) if f"core{k}" in factors]


def _by_contraction(first: Tensor, rest: Sequence[Tensor], x: Tensor) -> Tensor:
    """x (t, d') times the rows of a few tokens: (t, tokens), one core after the other from the first."""
    vectors, tokens, left = len(x), len(first), x.shape[1] // first.shape[1]
    # The states are (tokens, t, what is left of x, r); each core takes its j from the front and r from the back.
    by_first = x.view(vectors, first.shape[1], left).mT.reshape(-1, first.shape[1])
    states = by_first @ first  # (tokens, t · rest, r_1)
    for core in rest:
        rank, size = core.shape[1:3]
        left //= size
        by_core = states.view(tokens, vectors, size, left, rank).permute(0, 1, 3, 4, 2)
        states = torch.bmm(by_core.reshape(tokens, vectors * left, rank * size), core.reshape(tokens, rank * size, -1))
    return states.view(tokens, vectors).mT


def _by_rows(first: Tensor, rest: Sequence[Tensor], x: Tensor) -> Tensor:
    """The same by the rows themselves."""
    rows = first
    for core in rest:
        rows = torch.bmm(rows, core.flatten(2)).unflatten(2, core.shape[2:]).flatten(1, 2)
    return x @ rows.squeeze(-1).mT


def _tensor_trains(rows: Tensor, spec: TensorGPTSpec) -> list[Tensor]:
    """Cores (v, r_(k-1), n_k, r_k) of each of the tensors (v, n_1, ..., n_N), in float64."""
    ranks, left = _ranks(spec), rows.flatten(1)
    cores = []
    for k, size in enumerate(spec.shape[:-1]):
        unfolded = left.reshape(len(rows), ranks[k] * size, -1)
        u, s, v = torch.linalg.svd(unfolded, full_matrices=False)
        rank = ranks[k + 1]
        cores.append(u[..., :rank].unflatten(1, (ranks[k], size)))
        left = s[:, :rank, None] * v[:, :rank]
    cores.append(left.reshape(len(rows), ranks[-2], spec.shape[-1], 1))
    # All cores of a row equally large, as training likes it.
    norms = [core.flatten(1).norm(dim=1).clamp(min=1e-300) for core in cores]
    mean = torch.stack(norms).log().mean(0).exp() * (left.flatten(1).norm(dim=1) > 0)
    return [core * (mean / norm)[:, None, None, None] for core, norm in zip(cores, norms, strict=True)]


def _by_mode(rows: Tensor, sides: Sequence[Tensor]) -> Tensor:
    """(v, n_1, ..., n_N) with each S_k (n_k, n_k), symmetric, applied along its dimension."""
    for k, side in enumerate(sides, start=1):
        rows = (rows.movedim(k, -1) @ side).movedim(-1, k)
    return rows


def _padded_metric(second: Tensor, padding: int) -> Tensor:
    """C with coordinates that are always 0 behind it: they count like the mean of the others, and stay near 0."""
    behind = second.diagonal().mean() * torch.eye(padding, dtype=second.dtype, device=second.device)
    return torch.block_diag(second, behind) if padding else second


def _separable_roots(second: Tensor, shape: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """(C_k^½, C_k^-½) of C_1 ⊗ ... ⊗ C_N near C (d', d')."""
    if len(shape) == 1:
        return [square_root(second)]
    first, rest = separable(second, shape[0], prod(shape[1:]))
    return [square_root(first), *_separable_roots(rest, shape[1:])]


def _row_errors(weight: Tensor, cores: Sequence[Tensor], width: int, second: Tensor | None) -> Tensor:
    """ΔW_i C ΔW_iᵀ of every row (v,)."""
    rows = cores[0].squeeze(1)
    for core in cores[1:]:
        rows = torch.bmm(rows, core.flatten(2)).unflatten(2, core.shape[2:]).flatten(1, 2)
    difference = weight.to(torch.float64) - rows.squeeze(-1)[:, :width]
    return ((difference if second is None else difference @ second) * difference).sum(1)
