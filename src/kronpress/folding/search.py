"""The search for orders of units in which the layers that share them are nearer to sums of Kronecker products."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kronpress.errors import RequestError, unknown_name
from kronpress.folding.free_dimensions import Use, free_dimensions, in_columns, of_kinds
from kronpress.folding.renumbering import check_use
from kronpress.matrices.joint_order import nearest_joint_order
from kronpress.matrices.metric import Metric
from kronpress.matrices.permutation import Shape, Start
from kronpress.matrices.shared_matrix import SharedMatrix
from kronpress.surgery import dense_weight

# What a recipe's `folding` may name.
DIMENSIONS = ("mlp", "value", "residual")
# left_shape, right_shape and num_terms of a sum of Kronecker products.
Sizes = tuple[Shape, Shape, int]


def search_orders(
    model: PreTrainedModel,
    names: Iterable[str],
    planned: Mapping[str, Sizes],
    metrics: Callable[[str], Metric | None] = lambda name: None,
    starts: Sequence[Start] = ("identity", "matching"),
) -> dict[str, Tensor]:
    """An order for each free dimension in which the planned layers are nearer to their sums of Kronecker products.

    The orders belong together: each is searched with those before it folded, so fold all of them, as they come. Every
    planned layer that uses a dimension takes part, by its error in the metric, or, without one, by its relative error
    in the Frobenius norm; as these are added, give all layers a metric, or none. Where no order gains anything the
    given one stays. A dimension that no planned layer sees is left out. Nothing in the model is changed.

    Args:
        names: which dimensions, of `mlp`, `value` and `residual`; searched in this order.
        planned: by layer the left_shape, right_shape and num_terms of its W (out, in), of an embedding (vocab, width).
        metrics: gives a layer's metric by its name. A side may be a vector, the diagonal, as that of the rows of
            an embedding, which is then put into W: exact where B has one row.
        starts: as in `nearest_joint_order`.

    Returns:
        By the name of the dimension in `free_dimensions`, its order (size,).

    Raises:
        RequestError: an unknown name, model type or layer; sizes that do not fit; a dimension that cannot be folded.
        WorkError: a weight or a metric holds NaN or infinity.
    """
    names = list(names)
    for name in names:
        if name not in DIMENSIONS:
            raise unknown_name("free dimension", name, DIMENSIONS)
    modules = dict(model.named_modules())
    for name in planned:
        if name not in modules:
            raise RequestError(f"the orders are searched for {name!r}, and the model has no layer of that name")
    # Of each layer: what stands where in the rows (0) and columns (1) of its weight after the foldings so far.
    stands: dict[tuple[str, int], Tensor] = {}
    found = {}
    for key, dimension in of_kinds(free_dimensions(model), names).items():
        uses = [use for use in dimension.uses if use.module in planned]
        if not uses:
            continue
        for use in dimension.uses:
            check_use(model, use)  # before the search takes its time
        matrices = [_shared(modules[use.module], use, planned, metrics, stands) for use in uses]
        found[key] = nearest_joint_order(matrices, dimension.labels, starts).order
        for use, matrix in zip(uses, matrices, strict=True):
            place = use.module, int(in_columns(modules[use.module], use))
            rows = matrix.rows(found[key])
            stands[place] = stands.get(place, torch.arange(len(rows)))[rows]
    return found


def _shared(
    module: nn.Module,
    use: Use,
    planned: Mapping[str, Sizes],
    metrics: Callable[[str], Metric | None],
    stands: Mapping[tuple[str, int], Tensor],
) -> SharedMatrix:
    """A planned layer as one of the matrices that share an order, with the units in its rows."""
    (left_shape, right_shape, num_terms), metric = planned[use.module], metrics(use.module)
    weight = dense_weight(module).to(torch.float64)
    importance = 1.0
    if metric is None:
        metric, energy = Metric(), weight.square().sum().item()
        importance = 1 / energy if energy > 0 else 0.0
    # Of W as it is stored: rows and columns, by what was folded before.
    sides = [metric.output, metric.input]
    for axis, side in enumerate(sides):
        order = stands.get((use.module, axis))
        if side is not None:
            side = side.to(weight)
        if order is not None:
            weight = weight.index_select(axis, order.to(weight.device))
            if side is not None:
                side = side[order] if side.ndim == 1 else side[order][:, order]
        sides[axis] = side
    transposed = in_columns(module, use)
    own, other = reversed(sides) if transposed else sides
    if transposed:
        weight = weight.mT
        left_shape, right_shape = left_shape[::-1], right_shape[::-1]
    if other is not None and other.ndim == 1:
        weight, other = weight * other.clamp(min=0).sqrt(), None
    if own is not None and own.ndim == 1:
        own = torch.diag(own)
    return SharedMatrix(
        weight, left_shape, right_shape, num_terms, Metric(other, own), use.channels, importance, transposed
    )
