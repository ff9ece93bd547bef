"""Monarch, W = P L Pᵀ R with block-diagonal L and R (Dao et al. 2022, arXiv 2204.00595), of any rectangular shape.

Letters: W (m, n); row (p, k) with p < m/K and k < K output blocks, k the faster; column (r, s) with r < c input blocks
and s < n/c, s the faster; b the rank, counted by β; t tokens. W[(p k), (r s)] = Σ_β L[k; p, (r β)] R[r; (β k), s]: for
every k and r the m/K × n/c entries W[(· k), (r ·)] are a block of rank b, which shares nothing with the other blocks.
C (n, n) and G (m, m) of the metric as in metric.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
from pydantic import PositiveInt
from torch import Tensor

from kronpress.errors import RequestError
from kronpress.matrices.kronecker import check_divides, divisors
from kronpress.matrices.metric import FLOOR, FitMoments, Metric, as_metric, damped, square_root
from kronpress.matrices.structured_matrix import Factors, Options, Spec, StructuredMatrix

MAX_SWEEPS = 40
# Stop when a sweep lowers the loss by less than this fraction.
TOLERANCE = 1e-3
# Of the median of either side's diagonal, see `damped`: on the validation books of `pocket` more costs something.
DAMPING = 1e-3
# Numbers of blocks that `screen` looks at.
SCREENED_BLOCKS = (1, 2, 4, 8, 16)
# What an alternation is given to leave of the error by which each block is fitted alone.
OPTIMISM = 0.7


class MonarchSpec(Spec):
    """`output_blocks` K and `input_blocks` c: how many blocks the rows and the columns are cut into; `rank` b of each.

    The published matrices are square with K = c = √n and b = 1, or have K = c = 4 and as high a rank as L and R with
    min(m, n) rows between them give.
    """

    output_blocks: PositiveInt
    input_blocks: PositiveInt
    rank: PositiveInt = 1


class Monarch(StructuredMatrix):
    """Two block-diagonal matrices, with parameters `weight` (K, m/K, c·b) and `right` (c, b·K, n/c).

    `weight[k]` is the k-th block of L and `right[r]` the r-th of R. With b before K in the rows of R both products are
    one batched GEMM each, and what the first gives is read by the second where it lies.

    >>> spec = Monarch.Spec(output_blocks=2, input_blocks=3, rank=2)
    >>> Monarch(8, 12, spec).matmul(torch.ones(5, 12)).shape
    torch.Size([5, 8])
    >>> Monarch.count_params(8, 12, spec)  # b (K n + c m)
    96
    """

    Spec = MonarchSpec

    @staticmethod
    def factor_shapes(out_features: int, in_features: int, spec: MonarchSpec) -> dict[str, tuple[int, ...]]:
        k, c, b = spec.output_blocks, spec.input_blocks, spec.rank
        check_divides("output_blocks", k, "out_features", out_features)
        check_divides("input_blocks", c, "in_features", in_features)
        height, width = out_features // k, in_features // c
        if b > min(height, width):
            raise RequestError(f"rank {b} with blocks of {height}×{width}: at most {min(height, width)}")
        return {"weight": (k, height, c * b), "right": (c, b * k, width)}

    @staticmethod
    def num_paths(spec: MonarchSpec) -> int:
        return spec.rank

    @staticmethod
    def multiply(factors: Factors, x: Tensor, bias: Tensor | None = None) -> Tensor:
        left, right = factors["weight"], factors["right"]
        (k, height, depth), (c, _, width) = left.shape, right.shape
        x_tab = x.reshape(-1, c, width).transpose(0, 1)  # (r, t, s), a view that GEMM reads as it is
        # The same numbers in the same places; a row times a matrix is the faster of two orders for one token.
        z = torch.bmm(x_tab, right.mT) if x_tab.shape[1] == 1 else torch.bmm(right, x_tab.mT)  # (r, β k, t)
        z = z.view(depth, k, x_tab.shape[1]).permute(1, 2, 0)  # (k, t, r β), again a view
        added = None if bias is None else bias.view(height, 1, k).permute(2, 1, 0)
        y = torch.bmm(z, left.mT) if added is None else torch.baddbmm(added, z, left.mT)  # (k, t, p)
        return y.permute(1, 2, 0).reshape(*x.shape[:-1], height * k)

    @staticmethod
    def expand(factors: Factors) -> Tensor:
        left, right = _blocks(factors)
        (k, height, c, _), width = left.shape, right.shape[3]
        return torch.einsum("kprb,rbks->pkrs", left, right).reshape(height * k, c * width)

    @classmethod
    def rows(cls, factors: Factors, indices: Tensor) -> Tensor:
        left, right = _blocks(factors)
        p, k = indices // len(left), indices % len(left)
        return torch.einsum("...rb,...rbs->...rs", left[k, p], right.permute(2, 0, 1, 3)[k]).flatten(-2)

    @staticmethod
    def fit(
        weight: Tensor, spec: MonarchSpec, moments: FitMoments = None, options: Options | None = None
    ) -> dict[str, Tensor]:
        """The truncated singular value decomposition of every block: the nearest in Frobenius norm (Dao et al. 2022).

        With moments, the nearest in their metric tr(G ΔW C ΔWᵀ). It is a closed form, and exact, where C has no entries
        between different input blocks (any C if there is one) and G none between different output blocks (any G if
        there is one, any diagonal G). Otherwise the blocks are fitted in turn, in the metric `damped`: see `alternate`.
        """
        out_features, in_features = weight.shape
        Monarch.factor_shapes(out_features, in_features, spec)
        k, c = spec.output_blocks, spec.input_blocks
        metric = as_metric(moments, weight)
        order = _row_order(out_features, k, weight.device)
        w = weight.to(torch.float64)[order]  # rows (k p)
        if metric is None:
            left, right = _nearest_products(_cut(w, k, c), spec.rank)
        else:
            seen_by = _permuted(metric.where_it_sees, order)
            seen_by = damped(seen_by, DAMPING) if _Sides.of(seen_by, k, c).couples else seen_by
            left, right, _ = alternate(w, k, c, spec.rank, seen_by)
        # (k, r, p, β) and (k, r, β, s)
        kept = {"weight": left.transpose(1, 2).flatten(2), "right": right.permute(1, 2, 0, 3).flatten(1, 2)}
        return {name: factor.to(weight.dtype).contiguous() for name, factor in kept.items()}

    @classmethod
    def screen(cls, weight: Tensor, metric: Metric) -> list[tuple[MonarchSpec, float, bool]]:
        """A few numbers of blocks with every rank: the errors if C and G had no entries between different blocks.

        They are exact where that is so; elsewhere they are scaled to the norm of W in the true metric, of which the
        alternation is given OPTIMISM. One block on each side is low rank, and left out.
        """
        out_features, in_features = weight.shape
        energy, seen_by = metric.squared_norm(weight), metric.where_it_sees
        rows, columns = (
            [blocks for blocks in SCREENED_BLOCKS if size % blocks == 0 and blocks < size]
            for size in (out_features, in_features)
        )
        outputs = {k: _Side.of(seen_by.output, weight.reshape(-1, k, in_features).transpose(0, 1), 1) for k in rows}
        inputs = {c: _Side.of(seen_by.input, weight.mT.reshape(c, -1, out_features), 0) for c in columns}
        found = []
        for k, c in product(rows, columns):
            if k * c == 1:
                continue
            energies = _energies(outputs[k], inputs[c])
            discarded = (energies.sum() - energies.cumsum(0)).clamp(min=0)
            is_exact = not (outputs[k].couples or inputs[c].couples)
            scale = energy / energies.sum().item() if energies.any() else 0.0
            scale = scale if is_exact else OPTIMISM * scale
            most = min(len(energies), (weight.numel() - 1) // (k * in_features + c * out_features))
            for rank, error in enumerate((scale * discarded[:most]).tolist(), start=1):
                found.append((MonarchSpec(output_blocks=k, input_blocks=c, rank=rank), error, is_exact))
        return found

    @classmethod
    def candidate_specs(  # type: ignore[override]
        cls,
        out_features: int,
        in_features: int,
        max_params: int | None = None,
        *,
        output_blocks: int | None = None,
        input_blocks: int | None = None,
        rank: int | None = None,
    ) -> list[MonarchSpec]:
        """One spec for each number of blocks, with `rank` or with the largest that `max_params` holds.

        Numbers of blocks that are given are meant for a matrix at least as tall as wide; a wider one takes them
        exchanged. One block on each side is low rank, and blocks of one row or column save nothing: neither is listed
        unless it is asked for.
        """
        if rank is None and max_params is None:
            raise RequestError("Monarch needs a rank or a budget to choose it by")
        if out_features < in_features:
            output_blocks, input_blocks = input_blocks, output_blocks
        sides = []
        for name, side, size, given in (
            ("output_blocks", "out_features", out_features, output_blocks),
            ("input_blocks", "in_features", in_features, input_blocks),
        ):
            if given is not None:
                check_divides(name, given, side, size)
            sides.append([d for d in divisors(size) if d < size] if given is None else [given])
        specs, most_of_all = [], 0
        for k, c in product(*sides):
            if k * c == 1 and None in (output_blocks, input_blocks):
                continue
            affordable = full_rank = min(out_features // k, in_features // c)
            if max_params is not None:
                affordable = min(full_rank, max_params // (k * in_features + c * out_features))
            chosen = affordable if rank is None else rank
            if 1 <= chosen <= affordable:
                specs.append(MonarchSpec(output_blocks=k, input_blocks=c, rank=chosen))
            most_of_all = max(most_of_all, full_rank)
        if rank is not None and rank > most_of_all:
            raise RequestError(f"rank {rank}: a block of a matrix of this shape has at most {most_of_all}")
        return specs


def _blocks(factors: Factors) -> tuple[Tensor, Tensor]:
    """L[k, p, r, β] and R[r, β, k, s]."""
    left, right = factors["weight"], factors["right"]
    k, c = len(left), len(right)
    return left.unflatten(2, (c, -1)), right.unflatten(1, (-1, k))


def _row_order(out_features: int, output_blocks: int, device: torch.device) -> Tensor:
    """The rows (m,) with those of one output block together: (k p), each the place of (p k)."""
    return torch.arange(out_features, device=device).reshape(-1, output_blocks).mT.flatten()


def _permuted(metric: Metric, order: Tensor) -> Metric:
    """The metric of a matrix whose rows stand in `order` (m,)."""
    output = metric.output
    if output is not None:
        output = output[order] if output.ndim == 1 else output[order][:, order]
    return Metric(metric.input, output)


def _cut(weight: Tensor, output_blocks: int, input_blocks: int) -> Tensor:
    """W with rows (k p) as its blocks (k, r, p, s)."""
    return weight.reshape(output_blocks, -1, input_blocks, weight.shape[1] // input_blocks).transpose(1, 2)


def alternate(
    weight: Tensor,
    output_blocks: int,
    input_blocks: int,
    rank: int,
    metric: Metric,
    max_sweeps: int = MAX_SWEEPS,
    tolerance: float = TOLERANCE,
) -> tuple[Tensor, Tensor, list[float]]:
    """Each block in turn becomes the best of its rank beside the others as they are, in tr(G ΔW C ΔWᵀ).

    With E = W − Ŵ, a block X of Ŵ adds tr(G_kk δ C_rr δᵀ) − 2 tr(δᵀ (G E C)_kr) to the loss when it changes by δ. So
    its optimum is the product of rank b nearest to X + G_kk⁻¹ (G E C)_kr C_rr⁻¹ in the metric of G_kk and C_rr. These
    are made regular by a little of the identity; the sum is then an upper bound of the loss that touches it at δ = 0,
    and the loss still cannot rise (a majorant, Hunter & Lange 2004). In the first sweep the blocks that were not yet
    visited are those of W itself, so that each makes up for the errors of those before it; where that is no better than
    every block's own SVD, the alternation goes on from the latter.

    Args:
        weight: W (m, n) in float64, rows (k p); `metric` is in the same order.

    Returns:
        L (k, r, p, β), R (k, r, β, s), and the loss after every sweep, which never rises.
    """
    blocks = _cut(weight, output_blocks, input_blocks)
    sides = _Sides.of(metric, output_blocks, input_blocks)
    left, right = _nearest_products(blocks, rank)
    plain_loss = metric.squared_norm(weight - _joined(left @ right))
    new_left, new_right, approximation = _swept(weight, weight, sides, left, right)
    losses = [metric.squared_norm(weight - approximation)]
    if losses[0] <= plain_loss:
        left, right = new_left, new_right
    else:
        approximation, losses = _joined(left @ right), [plain_loss]
    for _ in range(max_sweeps - 1 if sides.couples else 0):
        new_left, new_right, approximation = _swept(weight, approximation, sides, left, right)
        loss = metric.squared_norm(weight - approximation)
        if not loss < losses[-1]:  # rounding, or an optimum
            break
        left, right = new_left, new_right
        losses.append(loss)
        if losses[-2] - loss <= tolerance * losses[-2]:
            break
    return left, right, losses


@dataclass(frozen=True)
class _Sides:
    """The metric in blocks: C (c, s, c, s) and G (K, p, K, p), or g (K, p) of a diagonal one; None is the identity.

    `inputs` (c, s, s) and `outputs` (K, p, p) are their diagonal blocks, made regular.
    """

    input: Tensor | None
    output: Tensor | None
    inputs: Tensor | None
    outputs: Tensor | None

    @classmethod
    def of(cls, metric: Metric, output_blocks: int, input_blocks: int) -> _Sides:
        input, output, inputs, outputs = metric.input, metric.output, None, None
        if input is not None:
            input = input.reshape(input_blocks, len(input) // input_blocks, input_blocks, -1)
            inputs = _regular(torch.einsum("rsrz->rsz", input))
        if output is not None and output.ndim == 1:
            output = output.reshape(output_blocks, -1)
            outputs = _regular(torch.diag_embed(output))
        elif output is not None:
            output = output.reshape(output_blocks, len(output) // output_blocks, output_blocks, -1)
            outputs = _regular(torch.einsum("kpkq->kpq", output))
        return cls(input, output, inputs, outputs)

    @property
    def couples(self) -> bool:
        """Whether the loss has terms between different blocks."""
        return _has_off_diagonal(self.input) or _has_off_diagonal(self.output)

    def seen(self, error: Tensor, r: int) -> Tensor:
        """(E C)[:, r]: (k, p, s) of E (k, p, r, s)."""
        if self.input is None:
            return error[:, :, r].clone()
        return (error.flatten(2) @ self.input[:, :, r].flatten(0, 1)).contiguous()


def _has_off_diagonal(side: Tensor | None) -> bool:
    if side is None or side.ndim == 2:
        return False
    off_diagonal = side.transpose(1, 2).clone()
    off_diagonal.diagonal(dim1=0, dim2=1).zero_()
    return bool(off_diagonal.any())


def _regular(diagonal_blocks: Tensor) -> Tensor:
    """The blocks (..., size, size) of one positive semi-definite matrix plus FLOOR of its largest entry."""
    blocks = diagonal_blocks.contiguous().clone()
    diagonals = blocks.diagonal(dim1=-2, dim2=-1)
    diagonals += FLOOR * diagonals.max()
    return blocks


def _joined(blocks: Tensor) -> Tensor:
    """Blocks (k, r, p, s) as W with rows (k p)."""
    k, c, height, width = blocks.shape
    return blocks.transpose(1, 2).reshape(k * height, c * width)


def _swept(
    weight: Tensor, approximation: Tensor, sides: _Sides, left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Every block once: L and R with the shapes of `left` and `right`, and their product (m, n)."""
    (k, c, height, rank), width = left.shape, right.shape[3]
    now = _cut(approximation, k, c).transpose(1, 2).clone()  # (k, p, r, s)
    error = _cut(weight, k, c).transpose(1, 2) - now
    left, right = left.clone(), right.clone()
    # Output blocks that do not depend on one another are fitted together.
    groups = [slice(i, i + 1) for i in range(k)] if _has_off_diagonal(sides.output) else [slice(0, k)]
    for r in range(c):
        seen = sides.seen(error, r)
        inputs = None if sides.inputs is None else sides.inputs[r]
        for group in groups:
            outputs = None if sides.outputs is None else sides.outputs[group]
            step = seen[group]
            if sides.output is not None and sides.output.ndim == 2:
                step = sides.output[group, :, None] * step
            elif sides.output is not None and len(groups) == 1:
                step = torch.einsum("kpkq,kqs->kps", sides.output, step)
            elif sides.output is not None:
                step = torch.einsum("kpjq,jqs->kps", sides.output[group], seen)
            if outputs is not None:
                step = torch.linalg.solve(outputs, step)
            if inputs is not None:
                step = torch.linalg.solve(inputs, step, left=False)
            old = now[group, :, r]
            left[group, r], right[group, r] = _nearest_products(old + step, rank, outputs, inputs)
            change = left[group, r] @ right[group, r] - old
            now[group, :, r] += change
            error[group, :, r] -= change
            seen[group] -= change if sides.input is None else change @ sides.input[r, :, r]
    return left, right, now.reshape(k * height, c * width)


def _nearest_products(
    blocks: Tensor, rank: int, outputs: Tensor | None = None, inputs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """L (..., p, rank) and R (..., rank, s) nearest to each block X (..., p, s) in tr(G ΔX C ΔXᵀ), of equal norms.

    With G^½ X C^½ = U Σ Vᵀ, L R = X C^½ V_r V_rᵀ C^-½. As in low_rank.py only the shorter side is rooted.

    Args:
        outputs, inputs: regular G (..., p, p) and C (s, s); None is the identity.
    """
    if blocks.shape[-2] < blocks.shape[-1]:
        right, left = _nearest_products(blocks.mT, rank, inputs, outputs)
        return left.mT, right.mT
    seen, inverse = blocks, None
    if inputs is not None:
        root, inverse = _square_roots(inputs)
        seen = blocks @ root
    gram = seen.mT @ (seen if outputs is None else outputs @ seen)
    vectors = torch.linalg.eigh(gram)[1][..., -rank:].flip(-1)
    left = seen @ vectors
    right = vectors.mT if inverse is None else vectors.mT @ inverse
    sizes = [torch.linalg.vector_norm(each, dim=dim) for each, dim in ((left, -2), (right, -1))]
    ratio = torch.where((sizes[0] > 0) & (sizes[1] > 0), sizes[1] / sizes[0], 1.0).sqrt()
    return left * ratio[..., None, :], right / ratio[..., :, None]


@dataclass(frozen=True)
class _Side:
    """The rows of W or of Wᵀ in b parts (b, size, other), and the metric's diagonal blocks for them.

    `blocks` (b, size, size) are regular, those of a diagonal metric (b, size), and None is the identity; `couples` says
    whether the metric has entries outside of them. What follows from them is computed once for all that it is met with.
    """

    parts: Tensor
    blocks: Tensor | None
    couples: bool

    @classmethod
    def of(cls, side: Tensor | None, parts: Tensor, place: int) -> _Side:
        """`place`: where the part's number stands in an index of two digits, 0 before the other and 1 behind it."""
        if side is None:
            return cls(parts, None, False)
        count, size, _ = parts.shape
        digits = (count, size) if place == 0 else (size, count)
        if side.ndim == 1:
            blocks = side.reshape(digits).movedim(place, 0)
            return cls(parts, blocks + FLOOR * side.max(), False)
        blocks = side.reshape(*digits, *digits).diagonal(dim1=place, dim2=2 + place).movedim(-1, 0)
        return cls(parts, _regular(blocks), bool(side.count_nonzero() > blocks.count_nonzero()))

    @cached_property
    def seen(self) -> Tensor:
        """Each part (b, size, other) times its block."""
        if self.blocks is None:
            return self.parts
        return self.blocks[..., None] * self.parts if self.blocks.ndim == 2 else self.blocks @ self.parts

    @cached_property
    def roots(self) -> Tensor | None:
        """The blocks' symmetric roots (b, size, size)."""
        if self.blocks is None:
            return None
        return self.blocks.sqrt().diag_embed() if self.blocks.ndim == 2 else _square_roots(self.blocks)[0]


def _energies(outputs: _Side, inputs: _Side) -> Tensor:
    """The squared singular values of G_kk^½ X C_rr^½, summed over all blocks X (k, r, p, s), largest first.

    They are eigenvalues of products on the blocks' shorter side, so that the metric of that one alone is rooted.
    """
    (k, height, _), (c, width, _) = outputs.parts.shape, inputs.parts.shape
    if height < width:
        x, seen = (each.reshape(c, width, height, k).permute(3, 0, 1, 2) for each in (inputs.parts, inputs.seen))
        roots = None if outputs.roots is None else outputs.roots[:, None]
    else:
        x, seen = (each.reshape(k, height, c, width).transpose(1, 2) for each in (outputs.parts, outputs.seen))
        roots = inputs.roots
    gram = x.mT @ seen  # (k, r, the shorter, the shorter)
    if roots is not None:
        gram = roots @ gram @ roots
    return torch.linalg.eigvalsh(gram).sum((0, 1)).flip(0).clamp(min=0)


def _square_roots(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """`square_root` of each of the regular matrices (..., size, size)."""
    pairs = [square_root(each, floor=0) for each in matrices.reshape(-1, *matrices.shape[-2:])]
    root, inverse = (torch.stack(each).reshape(matrices.shape) for each in zip(*pairs, strict=True))
    return root, inverse
