"""Tensor-train matrices, W[(i_1 … i_d), (j_1 … j_d)] = G_1[i_1, j_1] G_2[i_2, j_2] … G_d[i_d, j_d] (arXiv 2306.02697).

Letters: W (m, n), m = Π m_k, n = Π n_k, the last index fastest; core G_k (r_{k−1}, m_k, n_k, r_k) with r_0 = r_d = 1;
t tokens. s_k = m_k n_k: as a tensor W is (s_1, …, s_d), and its k-th unfolding has s_1 … s_k rows. C (n, n) and
G (m, m) of the metric as in metric.py. Two cores are a sum of r_1 Kronecker products, and are fitted as one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, combinations
from math import prod
from operator import mul
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from kronpress.errors import RequestError
from kronpress.matrices.kronecker import divisors
from kronpress.matrices.kronecker_in_metric import nearest_sum
from kronpress.matrices.metric import FitMoments, Metric, as_metric, separable, square_root
from kronpress.matrices.structured_matrix import Factors, Options, Spec, StructuredMatrix

CoreShape = tuple[PositiveInt, PositiveInt]

MAX_SWEEPS = 20
# Stop when a sweep lowers the loss by less than this fraction.
TOLERANCE = 1e-3
# Where a core's equations count as solved: the residual relative to their right-hand side.
SOLVED = 1e-6
MAX_STEPS = 50
# Numbers of cores that `screen` looks at; two are a Kronecker sum. Of the errors it has lower bounds.
SCREENED_CORES = (3, 4)
MOST_SCREENED_RANKS = 64
# What the alternation is given to leave of the error of its start.
OPTIMISM = 0.8


class TensorTrainSpec(Spec):
    """`core_shapes` (m_k, n_k) of each core; `rank`: every r_k, or the most that its unfolding can have if less."""

    core_shapes: Annotated[tuple[CoreShape, ...], Field(min_length=2)]
    rank: PositiveInt


class TensorTrain(StructuredMatrix):
    """A train of d cores: `weight` is G_1 (m_1, n_1, r_1), `core_2`, … are G_k (r_{k−1}, m_k, n_k, r_k).

    The last core has no fourth dimension.

    >>> spec = TensorTrain.Spec(core_shapes=((2, 3), (4, 1), (1, 2)), rank=2)
    >>> TensorTrain(8, 6, spec).matmul(torch.ones(5, 6)).shape
    torch.Size([5, 8])
    >>> TensorTrain.count_params(8, 6, spec)  # 2·3·2 + 2·4·1·2 + 2·1·2
    32
    """

    Spec = TensorTrainSpec

    @staticmethod
    def factor_shapes(out_features: int, in_features: int, spec: TensorTrainSpec) -> dict[str, tuple[int, ...]]:
        m, n = (prod(sizes) for sizes in zip(*spec.core_shapes, strict=True))
        written = " · ".join(f"{rows}×{columns}" for rows, columns in spec.core_shapes)
        if (m, n) != (out_features, in_features):
            raise RequestError(f"core_shapes {written} make {m}×{n}, not the matrix's {out_features}×{in_features}")
        most = max(_full_ranks(spec.core_shapes))
        if spec.rank > most:
            raise RequestError(f"rank {spec.rank} with core_shapes {written}: {most} already represents every matrix")
        ranks = [1, *_ranks(spec), 1]
        shapes = [(ranks[k], *shape, ranks[k + 1]) for k, shape in enumerate(spec.core_shapes)]
        middle = {f"core_{k}": shape for k, shape in enumerate(shapes[1:-1], start=2)}
        return {"weight": shapes[0][1:], **middle, f"core_{len(shapes)}": shapes[-1][:-1]}

    @staticmethod
    def num_paths(spec: TensorTrainSpec) -> int:
        return prod(_ranks(spec))

    @classmethod
    def linear_dims(cls, out_features: int, in_features: int, spec: TensorTrainSpec) -> dict[str, tuple[int, int]]:
        names = TensorTrain.factor_shapes(out_features, in_features, spec)
        return {name: (0, 1) if name == "weight" else (1, 2) for name in names}

    @staticmethod
    def multiply(factors: Factors, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x Wᵀ + bias, one core after the other in the order that needs the fewest operations: see `contraction`.

        Of what is computed on the way nothing is kept for the backward pass, which computes it again.
        """
        cores, device = _in_order(factors), x.device.type
        if torch.is_grad_enabled() and any(each.requires_grad for each in (x, *cores)):
            if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                # Cast outside, so that the backward pass computes in the same dtype.
                x, *cores = (each.to(torch.get_autocast_dtype(device)) for each in (x, *cores))
            y: Tensor = _KeepingTheInput.apply(x, *cores)
        else:
            y = contracted(x, cores)
        return y if bias is None else y + bias

    @staticmethod
    def expand(factors: Factors) -> Tensor:
        first, *others = _cores(factors)
        w = first.squeeze(0)  # (m_1 … m_k, n_1 … n_k, r_k)
        for core in others:
            w = torch.einsum("mna,apqb->mpnqb", w, core).flatten(2, 3).flatten(0, 1)
        return w.squeeze(-1)

    @classmethod
    def rows(cls, factors: Factors, indices: Tensor) -> Tensor:
        cores = _cores(factors)
        below = list(accumulate((core.shape[1] for core in reversed(cores[1:])), mul, initial=1))
        found = indices.new_ones(*indices.shape, 1, 1, dtype=cores[0].dtype)  # (…, n_1 … n_k, r_k)
        for core, size in zip(cores, reversed(below), strict=True):
            chosen = core.transpose(0, 1)[indices // size % core.shape[1]]  # (…, r_{k−1}, n_k, r_k)
            found = torch.einsum("...na,...aqb->...nqb", found, chosen).flatten(-3, -2)
        return found.squeeze(-1)

    @staticmethod
    def fit(
        weight: Tensor, spec: TensorTrainSpec, moments: FitMoments = None, options: Options | None = None
    ) -> dict[str, Tensor]:
        """The cores whose W is nearest to `weight` (out_features, in_features), or a local optimum of it.

        Two cores: the nearest sum of Kronecker products, in Frobenius norm or in the metric of `moments`, as in
        kronecker.py. More cores: truncated SVDs of the unfoldings one after the other (TT-SVD, Oseledets 2011), whose
        squared error is at most d − 1 times the least, and from there an alternation over the cores, whose error never
        rises. With moments it starts from the optimum for the nearest separable C_1 ⊗ … ⊗ C_d, and G enters through its
        nearest G_1 ⊗ … ⊗ G_d. A matrix that is such a train is found again at once.
        """
        out_features, in_features = weight.shape
        TensorTrain.factor_shapes(out_features, in_features, spec)
        metric = as_metric(moments, weight)
        seen_by = Metric() if metric is None else metric.where_it_sees
        cores = _nearest(weight.to(torch.float64), spec, seen_by, MAX_SWEEPS)
        return _named([core.to(weight.dtype).contiguous() for core in cores])

    @classmethod
    def screen(cls, weight: Tensor, metric: Metric) -> list[tuple[TensorTrainSpec, float, bool]]:
        """Balanced trains of three and four cores: no train is nearer than truncation of its worst unfolding alone.

        The errors are those in the nearest separable metric, scaled to the norm of W in the true one.
        """
        out_features, in_features = weight.shape
        energy, found = metric.squared_norm(weight), {}
        for num_cores in SCREENED_CORES:
            shapes = balanced_shapes(out_features, in_features, num_cores)
            most = _largest_rank(shapes, weight.numel() - 1)
            if (1, 1) in shapes or most == 0:
                continue
            tensor = Whitened.of(weight, shapes, metric.where_it_sees).tensor
            discarded = weight.new_zeros(most)
            for k in range(1, num_cores):
                rows = tensor.reshape(prod(tensor.shape[:k]), -1)
                gram = rows @ rows.mT if len(rows) <= rows.shape[1] else rows.mT @ rows
                energies = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
                left = (energies.sum() - energies.cumsum(0)).clamp(min=0)[:most]
                discarded[: len(left)] = torch.maximum(discarded[: len(left)], left)
            scale = energy / tensor.square().sum().item() if tensor.any() else 0.0
            for rank in range(1, most + 1, 1 + most // MOST_SCREENED_RANKS):
                spec = TensorTrainSpec(core_shapes=shapes, rank=rank)
                found[spec] = scale * discarded[rank - 1].item()
        return [(spec, error, False) for spec, error in found.items()]

    @classmethod
    def estimate(cls, weight: Tensor, spec: TensorTrainSpec, metric: Metric) -> float:
        """The error of the start in the true metric, of which the alternation is given OPTIMISM to reach."""
        start = cls.expand(_named(_nearest(weight, spec, metric.where_it_sees, max_sweeps=0)))
        return OPTIMISM * metric.squared_norm(weight - start)

    @classmethod
    def candidate_specs(  # type: ignore[override]
        cls,
        out_features: int,
        in_features: int,
        max_params: int | None = None,
        *,
        core_shapes: tuple[tuple[int, int], ...] | None = None,
        rank: int | None = None,
        num_cores: Annotated[int, Field(ge=2)] = 2,
    ) -> list[TensorTrainSpec]:
        """One spec with these cores, with `rank` or with the largest that `max_params` holds.

        `core_shapes` are meant for a matrix at least as tall as wide; a wider one takes their transposes. Without them
        there are `num_cores` cores, with sizes as equal as the matrix's allow.
        """
        if rank is None and max_params is None:
            raise RequestError("a tensor train needs a rank or a budget to choose it by")
        if core_shapes is None:
            if num_cores < 2:
                raise RequestError(f"num_cores {num_cores}: a tensor train has at least 2")
            shapes = balanced_shapes(out_features, in_features, num_cores)
        else:
            shapes = tuple((m, n) if out_features >= in_features else (n, m) for m, n in core_shapes)
            cls.factor_shapes(out_features, in_features, TensorTrainSpec(core_shapes=shapes, rank=1))
        most = max(_full_ranks(shapes))
        if rank is not None and rank > most:
            raise RequestError(f"rank {rank}: {most} already represents every matrix with core_shapes {shapes}")
        affordable = most if max_params is None else _largest_rank(shapes, max_params)
        chosen = affordable if rank is None else rank
        return [TensorTrainSpec(core_shapes=shapes, rank=chosen)] if 1 <= chosen <= affordable else []


# ---- sizes ----


def _full_ranks(shapes: Sequence[tuple[int, int]]) -> list[int]:
    """The ranks r_1 … r_{d−1} with which every matrix is represented: the shorter sides of the unfoldings."""
    sizes = [m * n for m, n in shapes]
    return [min(prod(sizes[:k]), prod(sizes[k:])) for k in range(1, len(sizes))]


def _ranks(spec: TensorTrainSpec) -> list[int]:
    return [min(spec.rank, full) for full in _full_ranks(spec.core_shapes)]


def _largest_rank(shapes: tuple[tuple[int, int], ...], max_params: int) -> int:
    """The largest rank that keeps within `max_params`; 0 if none does."""
    full = _full_ranks(shapes)

    def num_params(rank: int) -> int:
        ranks = [1, *(min(rank, each) for each in full), 1]
        return sum(ranks[k] * m * n * ranks[k + 1] for k, (m, n) in enumerate(shapes))

    return bisect_right(range(1, max(full) + 1), max_params, key=num_params)


def balanced_shapes(out_features: int, in_features: int, num_cores: int) -> tuple[tuple[int, int], ...]:
    """Core shapes with both sizes in factors as equal as they can be: the larger rows with the smaller columns.

    >>> balanced_shapes(3072, 768, 3)
    ((12, 12), (16, 8), (16, 8))
    """
    rows, columns = (_equal_factors(size, num_cores) for size in (out_features, in_features))
    return tuple(zip(rows, reversed(columns), strict=True))


@cache
def _equal_factors(number: int, count: int) -> tuple[int, ...]:
    """`count` ascending factors with the product `number` and the least sum."""
    if count == 1:
        return (number,)
    found = []
    for first in divisors(number):
        if first**count > number:
            break
        found.append(tuple(sorted((first, *_equal_factors(number // first, count - 1)))))
    return min(found, key=sum)


def _in_order(factors: Factors) -> list[Tensor]:
    return [factors["weight"], *(factors[f"core_{k}"] for k in range(2, len(factors) + 1))]


def _cores(factors: Factors) -> list[Tensor]:
    """Every core with four dimensions, in order."""
    first, *middle, last = _in_order(factors)
    return [first[None], *middle, last[..., None]]


def _named(cores: Sequence[Tensor]) -> dict[str, Tensor]:
    """The factors that are these cores of four dimensions."""
    middle = {f"core_{k}": core for k, core in enumerate(cores[1:-1], start=2)}
    return {"weight": cores[0].squeeze(0), **middle, f"core_{len(cores)}": cores[-1].squeeze(-1)}


# ---- multiplying ----


class Step(NamedTuple):
    """One core's turn in a contraction: one matrix product.

    `state_order` brings the dimensions that are summed over to the end of what was computed so far, and `core_order`
    to the beginning of the core; there are `num_summed`.
    """

    core: int
    state_order: tuple[int, ...]
    core_order: tuple[int, ...]
    num_summed: int


@cache
def contraction(shapes: tuple[tuple[int, ...], ...]) -> tuple[tuple[Step, ...], tuple[int, ...]]:
    """The steps with the fewest multiply-adds for one token, and the order that makes their result (t, m_1, …, m_d).

    What a step costs depends only on which cores had their turn before. So the cheapest way to have used a set of cores
    follows from those for the sets with one core fewer (as in Held & Karp 1962); there are 2^d sets.

    Args:
        shapes: of the factors, in the order of the cores.
    """
    every = frozenset(range(len(shapes)))
    names = [
        tuple(name for name in (f"r{k}", f"m{k}", f"n{k}", f"r{k + 1}") if name not in ("r0", f"r{len(shapes)}"))
        for k in range(len(shapes))
    ]
    sizes = {name: size for k, shape in enumerate(shapes) for name, size in zip(names[k], shape, strict=True)}

    def turn(state: tuple[str, ...], k: int) -> tuple[list[str], list[str], list[str]]:
        """What stays of the state, what is summed over, and what the core adds."""
        return (
            [name for name in state if name not in names[k]],
            [name for name in state if name in names[k]],
            [name for name in names[k] if name not in state],
        )

    start = tuple(f"n{k}" for k in range(len(shapes)))
    # The cheapest way to each set: what it costs, the cores in their order, and the dimensions then.
    best: dict[frozenset[int], tuple[int, tuple[int, ...], tuple[str, ...]]] = {frozenset(): (0, (), start)}
    for used in (frozenset(each) for count in range(len(shapes)) for each in combinations(every, count)):
        cost, turns, state = best[used]
        for k in sorted(every - used):
            kept, summed, added = turn(state, k)
            total = cost + prod([sizes[name] for name in (*kept, *summed, *added)])
            if used | {k} not in best or total < best[used | {k}][0]:
                best[used | {k}] = total, (*turns, k), (*kept, *added)
    steps, state = [], ("t", *start)
    for k in best[every][1]:
        kept, summed, added = turn(state, k)
        orders = tuple(map(state.index, (*kept, *summed))), tuple(map(names[k].index, (*summed, *added)))
        steps.append(Step(k, *orders, len(summed)))
        state = (*kept, *added)
    return tuple(steps), tuple(state.index(name) for name in ("t", *(f"m{k}" for k in range(len(shapes)))))


def contracted(x: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """x Wᵀ for x (..., n), by plain operations, of which autograd keeps what each step reads.

    Args:
        cores: the factors, in the order of the cores.
    """
    steps, order = contraction(_shapes(cores))
    state = _tabled(x, cores)
    for step in steps:
        state = _stepped(state, cores[step.core], step)
    return state.permute(order).reshape(*x.shape[:-1], prod(_rows_and_columns(cores)[0]))


class _KeepingTheInput(torch.autograd.Function):
    """`contracted`, of which only x and the cores are kept: what is between the steps is computed again.

    It has up to r times as many numbers as x, and of a network autograd keeps that of every layer at once.
    """

    @staticmethod
    def forward(x: Tensor, *cores: Tensor) -> Tensor:
        return contracted(x, cores)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *cores = ctx.saved_tensors
        steps, order = contraction(_shapes(cores))
        states = [_tabled(x, cores)]
        for step in steps[:-1]:
            states.append(_stepped(states[-1], cores[step.core], step))
        grads: list[Tensor | None] = [None] * len(cores)
        grad = grad.reshape(len(states[0]), *_rows_and_columns(cores)[0]).permute(_inverse(order))
        for step in reversed(steps):
            core, ordered = cores[step.core], states[-1].permute(step.state_order).shape
            # Whatever is as large as a state is let go as soon as it has been read.
            state_matrix, core_matrix = _matrices(states.pop(), core, step)
            grad = grad.reshape(len(state_matrix), core_matrix.shape[1])
            if ctx.needs_input_grad[1 + step.core]:
                core_sizes = core.permute(step.core_order).shape
                grads[step.core] = (state_matrix.mT @ grad).view(core_sizes).permute(_inverse(step.core_order))
            del state_matrix
            if states or ctx.needs_input_grad[0]:
                grad = (grad @ core_matrix.mT).view(ordered).permute(_inverse(step.state_order))
        return (grad.reshape(x.shape) if ctx.needs_input_grad[0] else None, *grads)


def _shapes(cores: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    return tuple([tuple(core.shape) for core in cores])


def _rows_and_columns(cores: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """m_1 … m_d and n_1 … n_d of the factors."""
    first, *others = cores
    rows, columns = [first.shape[0]], [first.shape[1]]
    return rows + [core.shape[1] for core in others], columns + [core.shape[2] for core in others]


def _tabled(x: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """x (..., n) as (t, n_1, …, n_d)."""
    return x.reshape(prod(x.shape[:-1]), *_rows_and_columns(cores)[1])


def _matrices(state: Tensor, core: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """The two matrices that a step multiplies."""
    state, core = state.permute(step.state_order), core.permute(step.core_order)
    summed = prod(core.shape[: step.num_summed])
    kept = prod(state.shape[: state.ndim - step.num_summed])
    return state.reshape(kept, summed), core.reshape(summed, prod(core.shape[step.num_summed :]))


def _stepped(state: Tensor, core: Tensor, step: Step) -> Tensor:
    """What is computed after a core had its turn."""
    kept = state.permute(step.state_order).shape[: state.ndim - step.num_summed]
    added = core.permute(step.core_order).shape[step.num_summed :]
    state_matrix, core_matrix = _matrices(state, core, step)
    return (state_matrix @ core_matrix).view(*kept, *added)


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


# ---- fitting ----


@dataclass(frozen=True)
class Whitened:
    """W in the coordinates in which the nearest separable metric is the identity.

    `tensor` is W as (s_1, …, s_d), `shapes` are the (m_k, n_k), and `moment` (n, n) what C is there, None for the
    identity. `undo` brings the rows and the columns of each core back.
    """

    tensor: Tensor
    shapes: tuple[tuple[int, int], ...]
    moment: Tensor | None
    undo: list[tuple[Tensor | None, Tensor | None]]

    @classmethod
    def of(cls, weight: Tensor, shapes: tuple[tuple[int, int], ...], metric: Metric) -> Whitened:
        """Of W (m, n) in float64 and a metric that sees something on each side."""
        rows, columns = zip(*shapes, strict=True)
        row_roots, row_inverses = _roots(metric.output, rows)
        column_roots, column_inverses = _roots(metric.input, columns)
        tensor = _along(weight.reshape(*rows, *columns), [*row_roots, *column_roots])
        moment = metric.input
        if moment is not None:
            moment = _along(moment.reshape(*columns, *columns), [*column_inverses, *column_inverses])
            moment = moment.reshape(weight.shape[1], -1)
        d = len(shapes)
        paired = tensor.permute([place for k in range(d) for place in (k, d + k)])
        tensor = paired.reshape([m * n for m, n in shapes])
        return cls(tensor, shapes, moment, list(zip(row_inverses, column_inverses, strict=True)))

    def seen(self, tensor: Tensor) -> Tensor:
        """E C of E (s_1, …, s_d)."""
        if self.moment is None:
            return tensor
        d, pairs = len(self.shapes), [size for shape in self.shapes for size in shape]
        apart = [*range(0, 2 * d, 2), *range(1, 2 * d, 2)]
        matrix = tensor.reshape(pairs).permute(apart)
        product = matrix.reshape(-1, len(self.moment)) @ self.moment
        return product.reshape(matrix.shape).permute(_inverse(apart)).reshape(tensor.shape)

    def undone(self, cores: Sequence[Tensor]) -> list[Tensor]:
        """Cores (r_{k−1}, s_k, r_k) as cores (r_{k−1}, m_k, n_k, r_k) of W itself."""
        apart = (core.unflatten(1, shape) for core, shape in zip(cores, self.shapes, strict=True))
        return [_along(core, [None, *inverses, None]) for core, inverses in zip(apart, self.undo, strict=True)]


def _roots(side: Tensor | None, sizes: Sequence[int]) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The roots of the factors of the nearest M_1 ⊗ … ⊗ M_d to one side of a metric, and their inverses.

    The nearest product of two, and of the second again: M_1 ⊗ (M_2 ⊗ (…)).
    """
    roots: list[Tensor | None] = [None] * len(sizes)
    inverses = list(roots)
    for k, size in enumerate(sizes):
        if side is None:
            break
        first, side = separable(side, size, prod(sizes[k + 1 :])) if k + 1 < len(sizes) else (side, None)
        roots[k], inverses[k] = square_root(first)
    return roots, inverses


def _along(tensor: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """Each dimension times its symmetric matrix (size, size), or its diagonal (size,); None is the identity."""
    for place, matrix in enumerate(matrices):
        if matrix is not None:
            moved = tensor.movedim(place, -1)
            tensor = (moved * matrix if matrix.ndim == 1 else moved @ matrix).movedim(-1, place)
    return tensor


def _nearest(weight: Tensor, spec: TensorTrainSpec, metric: Metric, max_sweeps: int) -> list[Tensor]:
    """Cores (r_{k−1}, m_k, n_k, r_k) of equal norms; `metric` sees something on each side that it has."""
    if len(spec.core_shapes) == 2:
        (left_shape, right_shape), [rank] = spec.core_shapes, _ranks(spec)
        left, right = nearest_sum(weight, left_shape, right_shape, rank, metric, max_sweeps)
        return [left.permute(1, 2, 0)[None], right[..., None]]
    problem = Whitened.of(weight, spec.core_shapes, metric)
    cores = truncated(problem.tensor, _ranks(spec))
    cores, _ = alternate(problem, cores, max_sweeps)
    shapes = spec.core_shapes
    even = balanced([core.flatten(1, 2) for core in problem.undone(cores)])
    return [core.unflatten(1, shape) for core, shape in zip(even, shapes, strict=True)]


def truncated(tensor: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """Cores (r_{k−1}, s_k, r_k) near to a tensor (s_1, …, s_d): TT-SVD (Oseledets 2011, algorithm 1).

    All but the last are orthonormal: their (r_{k−1} s_k, r_k) has orthonormal columns.
    """
    rest, before = tensor, 1
    cores = []
    for size, rank in zip(tensor.shape, ranks, strict=False):
        u, s, vh = torch.linalg.svd(rest.reshape(before * size, -1), full_matrices=False)
        cores.append(u[:, :rank].reshape(before, size, rank))
        rest, before = s[:rank, None] * vh[:rank], rank
    return [*cores, rest.reshape(before, -1, 1)]


def alternate(
    problem: Whitened,
    cores: Sequence[Tensor],
    max_sweeps: int = MAX_SWEEPS,
    tolerance: float = TOLERANCE,
    solved: float = SOLVED,
) -> tuple[list[Tensor], list[float]]:
    """Alternating least squares on tr(ΔW C ΔWᵀ): each core in turn the best one beside the others as they are.

    With the cores before it made orthonormal from the left, and those after it from the right, Ŵ is L X R with the
    core X (r_{k−1}, s_k, r_k) and orthonormal L and R, and the best X solves Lᵀ (L X R C) Rᵀ = Lᵀ (W C) Rᵀ. Without C
    that says what it is. With C these are r_{k−1} n_k r_k equations for each of its rows, solved by conjugate gradients
    from the old core on. Each of their steps lowers the loss, so that it never rises, solved to the end or not. Few are
    needed, because in these coordinates C is near to the identity.

    Returns:
        The cores, and the loss at the start and after every sweep there and back.
    """
    cores, last = list(cores), len(cores) - 1
    for k in range(last, 0, -1):
        _pass_left(cores, k)
    losses = [_loss(problem, cores)]
    target = problem.seen(problem.tensor)
    for _ in range(max_sweeps):
        old = list(cores)
        for k in range(last):
            cores[k] = _best_core(problem, target, cores, k, solved)
            _pass_right(cores, k)
        for k in range(last, 0, -1):
            cores[k] = _best_core(problem, target, cores, k, solved)
            _pass_left(cores, k)
        loss = _loss(problem, cores)
        if not loss < losses[-1]:  # rounding, or an optimum
            return old, losses
        losses.append(loss)
        if losses[-2] - loss <= tolerance * losses[-2]:
            break
    return cores, losses


def _loss(problem: Whitened, cores: Sequence[Tensor]) -> float:
    error = problem.tensor - _joined(cores).reshape(problem.tensor.shape)
    return (error * problem.seen(error)).sum().item()


def _joined(cores: Sequence[Tensor]) -> Tensor:
    """The train of cores (r, s_k, r') as (r of the first, Π s_k, r' of the last)."""
    first, *others = cores
    for core in others:
        first = torch.einsum("asb,btc->astc", first, core).flatten(1, 2)
    return first


def _best_core(problem: Whitened, target: Tensor, cores: Sequence[Tensor], k: int, solved: float) -> Tensor:
    """X of `alternate`, to the tolerance `solved`; `target` is W C (s_1, …, s_d)."""
    core = cores[k]
    left = _joined(cores[:k])[0] if k > 0 else core.new_ones(1, 1)  # L
    right = _joined(cores[k + 1 :])[..., 0] if k + 1 < len(cores) else core.new_ones(1, 1)  # R

    def projected(tensor: Tensor) -> Tensor:
        return torch.einsum("la,lsg,bg->asb", left, tensor.reshape(len(left), -1, right.shape[1]), right)

    def equations(x: Tensor) -> Tensor:
        widened = torch.einsum("la,asb,bg->lsg", left, x, right)
        return projected(problem.seen(widened.reshape(problem.tensor.shape)))

    wanted = projected(target)
    if problem.moment is None:
        return wanted
    residual = wanted - equations(core)
    direction, size = residual, residual.square().sum()
    goal = solved**2 * wanted.square().sum()
    for _ in range(MAX_STEPS):
        if size <= goal:
            break
        image = equations(direction)
        step = size / (direction * image).sum()
        core, residual = core + step * direction, residual - step * image
        before, size = size, residual.square().sum()
        direction = residual + size / before * direction
    return core


def _pass_right(cores: list[Tensor], k: int) -> None:
    """Make core k orthonormal from the left; the next one takes up the rest."""
    q, r = torch.linalg.qr(cores[k].flatten(0, 1))
    cores[k], cores[k + 1] = q.reshape(*cores[k].shape[:2], -1), torch.einsum("ab,bsc->asc", r, cores[k + 1])


def _pass_left(cores: list[Tensor], k: int) -> None:
    """Make core k orthonormal from the right; the one before takes up the rest."""
    q, r = torch.linalg.qr(cores[k].flatten(1, 2).mT)
    cores[k], cores[k - 1] = q.mT.reshape(-1, *cores[k].shape[1:]), torch.einsum("asb,cb->asc", cores[k - 1], r)


def balanced(cores: Sequence[Tensor]) -> list[Tensor]:
    """The same train with its singular values λ_k at every bond divided evenly, and cores of equal norms.

    With λ_k and orthonormal bases on both sides of each bond (Vidal 2003) core k is λ_{k−1}^-½ (U_k) λ_k^½ for U_k
    orthonormal from the left, whose entries are never large. Two cores become those of a balanced SVD.
    """
    cores, last = list(cores), len(cores) - 1
    for k in range(last, 0, -1):
        _pass_left(cores, k)
    before = cores[0].new_ones(1)  # λ_{k−1}^½
    for k in range(last):
        u, s, vh = torch.linalg.svd(cores[k].flatten(0, 1), full_matrices=False)
        root = s.sqrt()
        cores[k + 1] = torch.einsum("ab,bsc->asc", s[:, None] * vh, cores[k + 1])
        cores[k] = u.reshape(*cores[k].shape[:2], -1) * _inverse_of(before)[:, None, None] * root
        before = root
    cores[last] = cores[last] * _inverse_of(before)[:, None, None]
    norms = torch.stack([torch.linalg.vector_norm(core) for core in cores])
    if not norms.all():
        return [torch.zeros_like(core) for core in cores]
    return [core * (norms.log().mean().exp() / norm) for core, norm in zip(cores, norms, strict=True)]


def _inverse_of(roots: Tensor) -> Tensor:
    """1 / λ^½, and 0 for what is nothing but rounding."""
    is_something = roots > torch.finfo(roots.dtype).eps * roots.max()
    return torch.where(is_something, 1 / roots, 0.0)
