"""BLAST, W_ij = U_i diag(s_ij) V_jᵀ: blocks share bases along rows and columns (Lee et al. 2024, arXiv 2410.21262).

Letters: W (m, n) in blocks W_ij (p, q), p = m/K and q = n/c, i < K row blocks, j < c column blocks; r the rank, counted
by a; U_i (p, r), V_j (q, r), s_ij (r,); t tokens. C (n, n) and G (m, m) of the metric as in metric.py, in blocks C_jj'
and G_ii'; E = W − Ŵ.
"""

from __future__ import annotations

from itertools import product

import torch
from pydantic import PositiveInt
from torch import Tensor

from kronpress.errors import RequestError
from kronpress.matrices.kronecker import check_divides, divisors
from kronpress.matrices.low_rank import LowRank, nearest_product
from kronpress.matrices.metric import FitMoments, Metric, as_metric, damped, times
from kronpress.matrices.structured_matrix import Factors, Options, Spec, StructuredMatrix

MAX_SWEEPS = 40
# Stop when a sweep lowers the loss by less than this fraction: the first ones do little, see `alternate`.
TOLERANCE = 1e-4
# Added to every normal matrix once its diagonal is one: enough that it has a Cholesky factor, whatever its rank.
RIDGE = 1e-10
# Added before, times its largest entry: what is smaller is rounding.
LEAST_ENTRY = 1e-14
# Of the median of either side's diagonal, see `damped`: on the validation books of `pocket` no less is as good.
DAMPING = 1e-2
# Of the energy: what is left below this fraction is rounding.
ROUNDING = 1e-24
# Numbers of blocks on both sides that `screen` looks at, or the next on a side that they do not divide, and the most
# ranks of each.
SCREENED_BLOCKS = (2, 4, 8)
MOST_SCREENED_RANKS = 64
# What the alternation is given to leave of the error of its start.
OPTIMISM = 0.6


class BlastSpec(Spec):
    """`row_blocks` K and `column_blocks` c: how many blocks W is cut into along its rows and columns; `rank` r.

    The published matrices are cut into equal numbers on both sides.
    """

    row_blocks: PositiveInt
    column_blocks: PositiveInt
    rank: PositiveInt = 1


class Blast(StructuredMatrix):
    """Blocks with shared bases: `weight` is U (K, p, r), `middle` is s (K, c, r), `right` is Vᵀ (c, r, q).

    >>> spec = Blast.Spec(row_blocks=2, column_blocks=3, rank=2)
    >>> Blast(8, 12, spec).matmul(torch.ones(5, 12)).shape
    torch.Size([5, 8])
    >>> Blast.count_params(8, 12, spec)  # r (m + n + K c)
    52
    """

    Spec = BlastSpec

    @staticmethod
    def factor_shapes(out_features: int, in_features: int, spec: BlastSpec) -> dict[str, tuple[int, ...]]:
        k, c, r = spec.row_blocks, spec.column_blocks, spec.rank
        check_divides("row_blocks", k, "out_features", out_features)
        check_divides("column_blocks", c, "in_features", in_features)
        if r > min(out_features, in_features):
            raise RequestError(
                f"rank {r} for a {out_features}×{in_features} matrix: {min(out_features, in_features)} already "
                "represents every such matrix"
            )
        return {"weight": (k, out_features // k, r), "middle": (k, c, r), "right": (c, r, in_features // c)}

    @staticmethod
    def num_paths(spec: BlastSpec) -> int:
        return spec.rank

    @classmethod
    def linear_dims(cls, out_features: int, in_features: int, spec: BlastSpec) -> dict[str, tuple[int, int]]:
        # For each a, s maps column blocks to row blocks.
        return {"weight": (1, 2), "middle": (0, 1), "right": (1, 2)}

    @classmethod
    def count_flops(cls, out_features: int, in_features: int, spec: BlastSpec) -> int:
        """2 for each parameter, those of s included: products number by number are not in what torch counts."""
        return 2 * cls.count_params(out_features, in_features, spec)

    @staticmethod
    def multiply(factors: Factors, x: Tensor, bias: Tensor | None = None) -> Tensor:
        left, middle, right = factors["weight"], factors["middle"], factors["right"]
        (k, height, _), (c, _, width) = left.shape, right.shape
        x_tab = x.reshape(-1, c, width).transpose(0, 1)  # (j, t, s)
        read = torch.bmm(x_tab, right.mT)  # (j, t, a)
        # Number by number: as a batched product, with a as the batch, it takes longer than both others together.
        z = middle[:, 0, None] * read[0]  # (i, t, a)
        for j in range(1, c):
            z = torch.addcmul(z, middle[:, j, None], read[j])
        added = None if bias is None else bias.view(k, 1, height)
        y = torch.bmm(z, left.mT) if added is None else torch.baddbmm(added, z, left.mT)  # (i, t, p)
        return y.transpose(0, 1).reshape(*x.shape[:-1], k * height)

    @staticmethod
    def expand(factors: Factors) -> Tensor:
        left, middle, right = factors["weight"], factors["middle"], factors["right"]
        return torch.einsum("kpa,kca,caq->kpcq", left, middle, right).flatten(2).flatten(0, 1)

    @classmethod
    def rows(cls, factors: Factors, indices: Tensor) -> Tensor:
        left, middle, right = factors["weight"], factors["middle"], factors["right"]
        i, place = indices // left.shape[1], indices % left.shape[1]
        scaled = left[i, place][..., None, :] * middle[i]  # (…, j, a)
        return torch.einsum("...ja,jaq->...jq", scaled, right).flatten(-2)

    @staticmethod
    def fit(
        weight: Tensor, spec: BlastSpec, moments: FitMoments = None, options: Options | None = None
    ) -> dict[str, Tensor]:
        """A local optimum, in Frobenius norm or in tr(G ΔW C ΔWᵀ): no closed form is known. See `alternate`.

        It starts from the nearest matrix of rank r, than which it is never worse, or from `blocks_start`, which finds
        matrices again whose blocks have bases of their own. The metric is `damped`. Deterministic.
        """
        out_features, in_features = weight.shape
        Blast.factor_shapes(out_features, in_features, spec)
        metric = as_metric(moments, weight)
        seen_by = Metric() if metric is None else damped(metric.where_it_sees, DAMPING)
        w = weight.to(torch.float64)
        left, middle, right, _ = alternate(w, *_nearer_start(w, spec, seen_by), seen_by)
        named = {"weight": left, "middle": middle, "right": right}
        return {name: factor.to(weight.dtype).contiguous() for name, factor in named.items()}

    @classmethod
    def screen(cls, weight: Tensor, metric: Metric) -> list[tuple[BlastSpec, float, bool]]:
        """As many blocks on one side as on the other, with ranks of all sizes: OPTIMISM of the nearer start's error.

        That of low rank is exact; that of blocks alone is what they discard in their own G_ii and C_jj, scaled to the
        norm of W in the true metric.
        """
        out_features, in_features = weight.shape
        energy, seen_by = metric.squared_norm(weight), metric.where_it_sees
        low_rank = LowRank.screen(weight, metric)
        found = []
        for least in SCREENED_BLOCKS:
            sides = [[d for d in divisors(size) if least <= d < 2 * least] for size in weight.shape]
            if not all(sides):
                continue
            k, c = sides[0][0], sides[1][0]
            energies = _fitted_alone(weight, k, c, seen_by)[1].flatten().sort(descending=True).values
            scale = energy / energies.sum().item() if energies.any() else 0.0
            discarded = scale * (energies.sum() - energies.cumsum(0)).clamp(min=0)
            most = min(len(low_rank), (weight.numel() - 1) // (out_features + in_features + k * c))
            for low, error, _ in low_rank[: most : 1 + most // MOST_SCREENED_RANKS]:
                spec = BlastSpec(row_blocks=k, column_blocks=c, rank=low.rank)
                found.append((spec, OPTIMISM * min(error, discarded[low.rank - 1].item()), False))
        return found

    @classmethod
    def estimate(cls, weight: Tensor, spec: BlastSpec, metric: Metric) -> float:
        """The error of the start, of which the alternation is given OPTIMISM to reach."""
        start = _nearer_start(weight, spec, metric.where_it_sees)
        return OPTIMISM * metric.squared_norm(weight - _joined(*start))

    @classmethod
    def candidate_specs(  # type: ignore[override]
        cls,
        out_features: int,
        in_features: int,
        max_params: int | None = None,
        *,
        row_blocks: int | None = None,
        column_blocks: int | None = None,
        rank: int | None = None,
    ) -> list[BlastSpec]:
        """One spec for each number of blocks, with `rank` or with the largest that `max_params` holds.

        Numbers of blocks that are given are meant for a matrix at least as tall as wide; a wider one takes them
        exchanged. One block on either side is low rank with more parameters, and not listed unless it is asked for.
        """
        if rank is None and max_params is None:
            raise RequestError("BLAST needs a rank or a budget to choose it by")
        full_rank = min(out_features, in_features)
        if rank is not None and rank > full_rank:
            raise RequestError(f"rank {rank}: {full_rank} already represents every matrix of this shape")
        if out_features < in_features:
            row_blocks, column_blocks = column_blocks, row_blocks
        sides = []
        for name, side, size, given in (
            ("row_blocks", "out_features", out_features, row_blocks),
            ("column_blocks", "in_features", in_features, column_blocks),
        ):
            if given is not None:
                check_divides(name, given, side, size)
            sides.append([d for d in divisors(size) if d > 1] if given is None else [given])
        specs = []
        for k, c in product(*sides):
            affordable = full_rank
            if max_params is not None:
                affordable = min(full_rank, max_params // (out_features + in_features + k * c))
            chosen = affordable if rank is None else rank
            if 1 <= chosen <= affordable:
                specs.append(BlastSpec(row_blocks=k, column_blocks=c, rank=chosen))
        return specs


# ---- starts ----


def low_rank_start(weight: Tensor, spec: BlastSpec, metric: Metric) -> tuple[Tensor, Tensor, Tensor]:
    """U (K, p, r), s (K, c, r) of ones and Vᵀ (c, r, q): the nearest matrix of rank r, cut into blocks."""
    u, v = nearest_product(weight, spec.rank, metric)
    middle = weight.new_ones(spec.row_blocks, spec.column_blocks, spec.rank)
    return u.unflatten(0, (spec.row_blocks, -1)), middle, v.unflatten(1, (spec.column_blocks, -1)).transpose(0, 1)


def blocks_start(weight: Tensor, spec: BlastSpec, metric: Metric) -> tuple[Tensor, Tensor, Tensor]:
    """U (K, p, r), s (K, c, r) and Vᵀ (c, r, q): every block by itself, as low rank in its own G_ii and C_jj.

    Blocks (i, j) with one value of (j − i) mod max(K, c), a diagonal, lie in different rows and columns and can share
    the terms: s_ij is one in those of its diagonal and zero in all others. Each diagonal gets as many of the r terms as
    its singular values are among the largest. With equally many that is a rank of r / max(K, c) for every block, and
    a block-diagonal matrix has all terms on one diagonal.
    """
    k, c, r = spec.row_blocks, spec.column_blocks, spec.rank
    products, energies = _fitted_alone(weight, k, c, metric)
    places = energies.flatten().topk(r).indices // energies.shape[1]
    ends = places.bincount(minlength=len(energies)).cumsum(0).tolist()
    left, middle = weight.new_zeros(k, len(weight) // k, r), weight.new_zeros(k, c, r)
    right = weight.new_zeros(c, r, weight.shape[1] // c)
    for (i, j), (u, v) in products.items():
        diagonal = (j - i) % len(energies)
        start, end = ends[diagonal - 1] if diagonal else 0, ends[diagonal]
        left[i, :, start:end], middle[i, j, start:end], right[j, start:end] = u[:, : end - start], 1, v[: end - start]
    return left, middle, right


def _fitted_alone(
    weight: Tensor, row_blocks: int, column_blocks: int, metric: Metric
) -> tuple[dict[tuple[int, int], tuple[Tensor, Tensor]], Tensor]:
    """Of each block the terms (p, b) and (b, q) that make all of it, largest first, and their energies by diagonals."""
    blocks = weight.unflatten(0, (row_blocks, -1)).unflatten(2, (column_blocks, -1)).transpose(1, 2)  # (i, j, p, s)
    outputs, inputs = _own_blocks(metric.output, row_blocks), _own_blocks(metric.input, column_blocks)
    energies, products = weight.new_zeros(max(blocks.shape[:2]), min(blocks.shape[2:])), {}
    for i, j in product(range(row_blocks), range(column_blocks)):
        own = Metric(None if inputs is None else inputs[j], None if outputs is None else outputs[i])
        u, v = nearest_product(blocks[i, j], energies.shape[1], own)
        seen_u = u if own.output is None else times(own.output, u)
        seen_v = v.mT if own.input is None else times(own.input, v.mT)
        energies[(j - i) % len(energies)] += (u * seen_u).sum(0) * (v.mT * seen_v).sum(0)
        products[i, j] = u, v
    return products, energies


def _nearer_start(weight: Tensor, spec: BlastSpec, metric: Metric) -> tuple[Tensor, Tensor, Tensor]:
    found = [low_rank_start(weight, spec, metric), blocks_start(weight, spec, metric)]
    return min(found, key=lambda start: metric.squared_norm(weight - _joined(*start)))


# ---- alternation ----


def alternate(
    weight: Tensor,
    left: Tensor,
    middle: Tensor,
    right: Tensor,
    metric: Metric,
    max_sweeps: int = MAX_SWEEPS,
    tolerance: float = TOLERANCE,
) -> tuple[Tensor, Tensor, Tensor, list[float]]:
    """Every U_i, then every V_j, then every s_ij becomes its optimum beside the others, in tr(G ΔW C ΔWᵀ).

    Each is a linear least-squares problem. With R_i = [diag(s_i1) V_1ᵀ … diag(s_ic) V_cᵀ], (r, n), a change δ of U_i
    has the optimum G_ii δ (R_i C R_iᵀ) = (G E C)_i R_iᵀ; V_j is the same of Wᵀ, with C and G exchanged; and for s_ij
    it is (U_iᵀ G_ii U_i ∘ V_jᵀ C_jj V_j) δ = diag(U_iᵀ (G E C)_ij V_j). All are exact, with C and with G; where the
    metric joins no two blocks, they do not depend on one another and are solved together. RIDGE makes the solution that
    of an upper bound which touches the loss at δ = 0, so that no step raises it (Hunter & Lange 2004).

    Near low rank, where all s_ij are equal, sweeps lower the loss but slowly. So each starts from where the factors
    would be if they went on as in the sweep before, by (k − 1) / (k + 2) of it in the k-th, and anew from the last
    factors where that raised the loss (Nesterov's acceleration of an alternation, with restarts: Mitchell, Ye & De
    Sterck 2020).

    Args:
        weight: W (m, n) in float64.

    Returns:
        U (K, p, r), s (K, c, r), Vᵀ (c, r, q), and the loss at the start and after each sweep that lowered it.
    """
    now = before = left, middle, right
    energy, losses = metric.squared_norm(weight), [metric.squared_norm(weight - _joined(*now))]
    k = 0
    for _ in range(max_sweeps):
        if losses[-1] <= ROUNDING * energy:
            break
        ahead = max(0, k - 1) / (k + 2)
        u, s, v = (each + ahead * (each - old) for each, old in zip(now, before, strict=True))
        found = _swept(weight, u, s, v, metric)
        loss = metric.squared_norm(weight - _joined(*found))
        if loss < losses[-1]:
            now, before, k = found, now, k + 1
            losses.append(loss)
            if losses[-2] - loss <= tolerance * losses[-2]:
                break
        elif ahead:
            k = 0
        else:  # rounding, or an optimum
            break
    return *now, losses


def _swept(
    weight: Tensor, left: Tensor, middle: Tensor, right: Tensor, metric: Metric
) -> tuple[Tensor, Tensor, Tensor]:
    left, error = _with_left(weight - _joined(left, middle, right), left, middle, right, metric)
    exchanged = Metric(metric.output, metric.input)
    right, error = (each.mT for each in _with_left(error.mT, right.mT, middle.transpose(0, 1), left.mT, exchanged))
    return _balanced(left, _with_middle(error, left, middle, right, metric), right)


def _with_left(error: Tensor, left: Tensor, middle: Tensor, right: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
    """U with every U_i in turn optimal, and E then."""
    k, height, _ = left.shape
    left, error = left.clone(), error.clone()
    for i in _together(metric.output, k):
        rows = _rows(middle[i], right)
        seen = rows if metric.input is None else times(metric.input, rows.mT).mT
        normal = seen @ rows.mT
        if i.stop - i.start == k:  # with G_ii on both sides of the equation
            change = _solved(normal, error.unflatten(0, (k, height)) @ seen.mT, left=False)
        else:
            assert metric.output is not None
            own = slice(i.start * height, i.stop * height)
            wanted = metric.output[own] @ (error @ seen[0].mT)
            change = _solved(metric.output[own, own], _solved(normal[0], wanted, left=False))[None]
        left[i] += change
        error.unflatten(0, (k, height))[i] -= change @ rows
    return left, error


def _with_middle(error: Tensor, left: Tensor, middle: Tensor, right: Tensor, metric: Metric) -> Tensor:
    """s with every s_ij in turn optimal."""
    (k, height, _), (c, _, width) = left.shape, right.shape
    middle, error = middle.clone(), error.clone()
    outputs, inputs = _own_blocks(metric.output, k), _own_blocks(metric.input, c)
    left_seen = left if outputs is None else _times_blocks(outputs, left)  # G_ii U_i
    right_seen = right.mT if inputs is None else _times_blocks(inputs, right.mT)  # C_jj V_j
    left_grams, right_grams = left.mT @ left_seen, right @ right_seen
    couples = _couples(metric.input, c)
    for j in range(c):
        columns = slice(j * width, (j + 1) * width)
        for i in _together(metric.output, k):
            if couples:
                assert metric.input is not None
                read = error @ (metric.input[:, columns] @ right[j].mT)  # (E C V)_j (m, r)
            else:
                read = error[:, columns] @ right_seen[j]
            if i.stop - i.start == k:
                wanted = (left_seen * read.unflatten(0, (k, height))).sum(1)  # (i, a)
            else:
                assert metric.output is not None
                rows = metric.output[i.start * height : i.stop * height]
                wanted = (left[i] * (rows @ read)).sum(1)
            change = _solved(left_grams[i] * right_grams[j], wanted[..., None])[..., 0]
            middle[i, j] += change
            error.unflatten(0, (k, height))[i, :, columns] -= (left[i] * change[:, None]) @ right[j]
    return middle


def _together(side: Tensor | None, blocks: int) -> list[slice]:
    """The blocks that can be solved for together: all of them, or one by one where the metric joins them."""
    return [slice(i, i + 1) for i in range(blocks)] if _couples(side, blocks) else [slice(0, blocks)]


def _couples(side: Tensor | None, blocks: int) -> bool:
    """Whether a side of the metric (size, size) has entries between two of so many blocks."""
    if side is None or side.ndim == 1 or blocks == 1:
        return False
    own = _own_blocks(side, blocks)
    return own is not None and bool(side.count_nonzero() > own.count_nonzero())


def _own_blocks(side: Tensor | None, blocks: int) -> Tensor | None:
    """The diagonal blocks (blocks, size, size) of a side of the metric, or (blocks, size) of a diagonal one."""
    if side is None or side.ndim == 1:
        return None if side is None else side.reshape(blocks, -1)
    size = len(side) // blocks
    return side.reshape(blocks, size, blocks, size).diagonal(dim1=0, dim2=2).movedim(-1, 0)


def _times_blocks(own: Tensor, factors: Tensor) -> Tensor:
    return own[..., None] * factors if own.ndim == 2 else own @ factors


def _solved(normal: Tensor, wanted: Tensor, left: bool = True) -> Tensor:
    """N⁻¹ X, or else X N⁻¹, for positive semi-definite N (…, size, size), with LEAST_ENTRY and RIDGE added."""
    if not left:
        return _solved(normal, wanted.mT).mT
    diagonal = normal.diagonal(dim1=-2, dim2=-1)
    least = LEAST_ENTRY * diagonal.amax(-1, keepdim=True)
    scale = torch.where(least > 0, diagonal + least, 1.0).rsqrt()[..., None]
    ridged = scale * normal * scale.mT
    ridged.diagonal(dim1=-2, dim2=-1).fill_(1 + RIDGE)
    return scale * torch.cholesky_solve(scale * wanted, torch.linalg.cholesky(ridged))


def _balanced(left: Tensor, middle: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same terms, each with ‖U_·a‖ = ‖V_·a‖ and a root mean square of one in s_··a; what is zero stays."""
    sizes = [
        torch.linalg.vector_norm(left, dim=(0, 1)),
        middle.square().mean((0, 1)).sqrt(),
        torch.linalg.vector_norm(right, dim=(0, 2)),
    ]
    alive = (sizes[0] > 0) & (sizes[1] > 0) & (sizes[2] > 0)
    u, s, v = (torch.where(alive, each, 1.0) for each in sizes)
    root = (u * s * v).sqrt()
    return left * (root / u), middle / s, right * (root / v)[:, None]


def _rows(middle: Tensor, right: Tensor) -> Tensor:
    """R_i (i, r, n) for some rows of s (i, c, r) and Vᵀ (c, r, q)."""
    return (middle[..., None] * right).transpose(1, 2).flatten(2)


def _joined(left: Tensor, middle: Tensor, right: Tensor) -> Tensor:
    """W (m, n), whose row blocks are U_i R_i."""
    return (left @ _rows(middle, right)).flatten(0, 1)
