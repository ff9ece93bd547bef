"""Joint orders: the energies are those of real fits, none is lost, planted orders found, bad requests refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, permutations
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from reference.kronecker import van_loan_squared_error
from samples.matrices import generator, normal, singular_moment
from torch import Tensor

from kronpress import RequestError, WorkError
from kronpress.matrices import Kronecker
from kronpress.matrices.joint_order import nearest_joint_order
from kronpress.matrices.metric import Metric
from kronpress.matrices.shared_matrix import SharedMatrix

few = settings(max_examples=10, deadline=None)
seeds = st.integers(0, 2**32)
TWELVE = torch.zeros(12, dtype=torch.int64)
METRICS = ("none", "other", "own", "both")


def metric_of(kind: str, seed: int, m: int, n: int) -> Metric:
    other = singular_moment(seed, n) if kind in ("other", "both") else None
    return Metric(other, singular_moment(seed + 7, m) if kind in ("own", "both") else None)


@st.composite
def shared(draw: st.DrawFn, kind: str, units: int = 12) -> list[SharedMatrix]:
    """Matrices of other places, widths, copies, fixed rows and importance, of which some are transposed weights."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        seed, m2, n1, n2 = (
            draw(seeds),
            draw(st.sampled_from([1, 2, 3, 4])),
            draw(st.integers(1, 4)),
            draw(st.integers(1, 3)),
        )
        copies, fixed = draw(st.integers(1, 2)), draw(st.sampled_from([0, 12, 1]))
        if (fixed + copies * units) % m2:
            fixed = 0
        m = fixed + copies * units
        channels = fixed + torch.arange(copies * units).reshape(copies, units)
        k = draw(st.integers(1, min(2, m2 * n2, n1 * (m // m2))))
        matrix = SharedMatrix(
            normal(seed, m, n1 * n2),
            (m // m2, n1),
            (m2, n2),
            k,
            metric_of(kind, seed, m, n1 * n2),
            channels if fixed or copies > 1 or draw(st.booleans()) else None,
            draw(st.sampled_from([1.0, 0.1])),
            draw(st.booleans()),
        )
        found.append(matrix)
    return found


def error(matrix: SharedMatrix, order: Tensor) -> float:
    """tr(G ΔW C ΔWᵀ) of `Kronecker.fit` of the layer's weight, written out."""
    rows = torch.arange(len(matrix.weight))
    for copy in range(1 if matrix.channels is None else len(matrix.channels)):
        for unit, source in enumerate(order.tolist()):
            at = torch.arange(len(order)) if matrix.channels is None else matrix.channels[copy]
            rows[at[unit]] = at[source]
    weight, other, own = matrix.weight[rows], matrix.metric.input, matrix.metric.output
    own = None if own is None else own[rows][:, rows]
    left_shape, right_shape, metric = matrix.left_shape, matrix.right_shape, Metric(other, own)
    if matrix.is_transposed:
        weight, metric = weight.mT, Metric(own, other)
        left_shape, right_shape = left_shape[::-1], right_shape[::-1]
    spec = Kronecker.Spec(left_shape=left_shape, right_shape=right_shape, num_terms=matrix.num_terms)
    difference = weight - Kronecker.expand(Kronecker.fit(weight, spec, metric))
    g = torch.eye(len(difference)).double() if metric.output is None else metric.output
    c = torch.eye(difference.shape[1]).double() if metric.input is None else metric.input
    return (g @ difference @ c @ difference.mT).trace().item()


def joint_error(matrices: list[SharedMatrix], order: Tensor) -> float:
    return sum(matrix.importance * error(matrix, order) for matrix in matrices)


@pytest.mark.parametrize("kind", METRICS)
@given(data=st.data(), num_labels=st.integers(1, 2))
@few
def test_fits_in_the_found_order_are_never_worse_and_units_keep_their_labels(
    kind: str, data: st.DataObject, num_labels: int
) -> None:
    matrices = data.draw(shared(kind))
    labels = torch.arange(12) * num_labels // 12
    found = nearest_joint_order(matrices, labels, ("identity", "matching", 3))
    assert sorted(found.order.tolist()) == list(range(12))
    assert torch.equal(labels[found.order], labels)
    assert all(before <= after for before, after in pairwise(found.captured))
    before, after = (joint_error(matrices, order) for order in (torch.arange(12), found.order))
    energy = sum(matrix.importance * matrix.energy for matrix in matrices)
    assert after <= before + 1e-6 * energy
    assert torch.equal(found.order, torch.arange(12)) or len(found.captured) > 1


@given(data=st.data())
@few
def test_without_a_metric_the_energies_are_those_of_van_loan(data: st.DataObject) -> None:
    """Of the matrices that see an order, by numpy's SVD, before and after."""
    matrices = data.draw(shared("none"))
    found = nearest_joint_order(matrices, TWELVE, ("identity", 1))
    seeing = [matrix for matrix in matrices if matrix.left_shape[0] > 1 and matrix.right_shape[0] > 1]
    energy = sum(matrix.importance * matrix.weight.square().sum().item() for matrix in seeing)
    for order, captured in ((torch.arange(12), found.captured[0]), (found.order, found.captured[-1])):
        lost = sum(
            matrix.importance
            * van_loan_squared_error(
                matrix.weight[matrix.rows(order)], matrix.left_shape, matrix.right_shape, matrix.num_terms
            )
            for matrix in seeing
        )
        assert captured == pytest.approx(1 - lost / energy if seeing else 1.0, abs=1e-9)


@pytest.mark.parametrize("kind", METRICS)
def test_in_small_problems_restarts_come_near_to_the_best_of_all_orders(kind: str) -> None:
    """Six units in pairs and in triples, in the true error of full fits."""
    gains, best_gains = [], []
    for seed in range(4):
        matrices = [
            SharedMatrix(normal(seed, 6, 4), (3, 2), (2, 2), 1, metric_of(kind, seed, 6, 4)),
            SharedMatrix(
                normal(seed + 50, 6, 4), (2, 4), (3, 1), 1, metric_of(kind, seed + 50, 6, 4), is_transposed=True
            ),
        ]
        labels = torch.zeros(6, dtype=torch.int64)
        found = nearest_joint_order(matrices, labels, ("identity", "matching", *range(8)))
        given = joint_error(matrices, torch.arange(6))
        gains.append(given - joint_error(matrices, found.order))
        # A sixth of all orders, for time.
        orders = [torch.tensor(order) for order in permutations(range(6)) if order[0] == 0]
        best_gains.append(given - min(joint_error(matrices, order) for order in orders))
    assert sum(gains) > 0.75 * sum(best_gains), (gains, best_gains)


@pytest.mark.parametrize("n2", [1, 2])
@given(seed=seeds, places=st.integers(2, 4), num_copies=st.integers(1, 2))
@few
def test_a_planted_common_order_is_found(n2: int, seed: int, places: int, num_copies: int) -> None:
    """Products of equally many places, one of them with several copies of each unit."""
    order = torch.randperm(12, generator=generator(seed))
    groups = 12 // places
    plain = torch.kron(normal(seed, groups, 6), normal(seed + 1, places, n2))
    whole = torch.kron(normal(seed + 2, num_copies * groups, 5), normal(seed + 3, places, 3))
    channels = torch.arange(12 * num_copies).reshape(num_copies, 12)
    rows = torch.arange(len(whole))
    rows[channels] = channels[:, order]
    matrices = [
        SharedMatrix(plain[order], (groups, 6), (places, n2)),
        SharedMatrix(whole[rows], (num_copies * groups, 5), (places, 3), channels=channels, importance=2.0),
    ]
    found = nearest_joint_order(matrices, TWELVE, ("matching",))
    assert found.captured[-1] == pytest.approx(1, abs=1e-9)


def test_each_matrix_has_its_say() -> None:
    """Two products with other planted orders: the one that counts more has its order found, whichever it is."""
    planted = [torch.kron(normal(seed, 6, 5), normal(seed + 9, 2, 2)) for seed in (0, 1)]
    shuffled = [weight[torch.randperm(12, generator=generator(seed))] for seed, weight in enumerate(planted)]
    for important in (0, 1):
        matrices = [
            SharedMatrix(weight, (6, 5), (2, 2), importance=1.0 if i == important else 1e-6)
            for i, weight in enumerate(shuffled)
        ]
        order = nearest_joint_order(matrices, TWELVE).order
        assert error(matrices[important], order) < 1e-4
        assert error(matrices[1 - important], order) > 1e-2


def test_what_no_order_changes_takes_no_part() -> None:
    one_place, one_group = (
        SharedMatrix(normal(0, 12, 4), (12, 2), (1, 2)),
        SharedMatrix(normal(1, 12, 4), (1, 4), (12, 1)),
    )
    zero = SharedMatrix(torch.zeros(12, 4), (6, 2), (2, 2))
    unseen = SharedMatrix(normal(2, 12, 4), (6, 2), (2, 2), metric=Metric(torch.zeros(4, 4)))
    for matrices in ([], [one_place, one_group, zero, unseen]):
        found = nearest_joint_order(matrices, TWELVE, (4, "matching"))
        assert (found.order.tolist(), found.captured) == (list(range(12)), (1.0,))
    real = SharedMatrix(normal(3, 12, 4), (6, 2), (2, 2))
    alone, among = (nearest_joint_order(each, TWELVE) for each in ([real], [one_place, real, zero, unseen, one_group]))
    assert torch.equal(alone.order, among.order)
    assert alone.captured == among.captured


@given(seed=seeds)
@few
def test_many_columns_count_by_their_products_alone(seed: int) -> None:
    """An embedding's vocabulary: where B has one column, any weight with equal inner products of rows does as well."""
    weight = normal(seed, 12, 40)
    rotated = weight @ torch.linalg.qr(normal(seed + 1, 40, 40)).Q
    wide, turned = (nearest_joint_order([SharedMatrix(each, (4, 40), (3, 1), 2)], TWELVE) for each in (weight, rotated))
    assert wide.captured == pytest.approx(turned.captured, abs=1e-9)
    lost = van_loan_squared_error(weight[wide.order], (4, 40), (3, 1), 2)
    assert wide.captured[-1] == pytest.approx(1 - lost / weight.square().sum().item(), abs=1e-9)


@given(seed=seeds)
@few
def test_features_of_many_matrices_are_put_together_without_loss(seed: int) -> None:
    """So many that inner products of the features take their place: one matrix may as well be many."""
    weight = normal(seed, 12, 64)
    whole = SharedMatrix(weight, (6, 64), (2, 1))
    found = nearest_joint_order([whole, replace(whole, importance=3.0)], TWELVE, ("identity",))
    alone = nearest_joint_order([whole], TWELVE, ("identity",))
    assert torch.equal(found.order, alone.order)
    assert found.captured == pytest.approx(alone.captured, abs=1e-9)


def test_equal_requests_have_equal_results_and_another_seed_is_another_start() -> None:
    matrices = [
        SharedMatrix(normal(i, 24, 24), (12, 12), (2, 2), metric=Metric(singular_moment(i, 24))) for i in (0, 1)
    ]
    labels = torch.zeros(24, dtype=torch.int64)
    first, again, other = (nearest_joint_order(matrices, labels, (seed,)) for seed in (5, 5, 6))
    assert torch.equal(first.order, again.order)
    assert (first.captured, first.start) == (again.captured, 5)
    assert not torch.equal(first.order, other.order)


RIGHT = SharedMatrix(torch.zeros(12, 8), (6, 4), (2, 2))


@pytest.mark.parametrize(
    ("changes", "labels", "starts", "message"),
    [
        ({"right_shape": (2, 3)}, TWELVE, (0,), "left_shape 6×4 ⊗ right_shape 2×3 is 12×12, not the matrix's 12×8"),
        ({"num_terms": 5}, TWELVE, (0,), "num_terms 5 with factors 6×4 and 2×2: allowed are 1 to 4"),
        ({}, torch.zeros(11, dtype=torch.int64), (0,), r"channels of shape \(1, 12\) for 11 units and .* 12 rows"),
        ({"channels": torch.full((1, 12), 3)}, TWELVE, (0,), "one row for each unit in every copy, and none twice"),
        ({"channels": torch.arange(1, 13)[None]}, TWELVE, (0,), "one row for each unit in every copy"),
        ({"metric": Metric(torch.eye(12))}, TWELVE, (0,), r"a metric of shape \(12, 12\) .*: expected \(8, 8\)"),
        ({"metric": Metric(None, torch.eye(8))}, TWELVE, (0,), r"a metric of shape \(8, 8\) .*: expected \(12, 12\)"),
        ({}, TWELVE.double(), (0,), r"the labels have shape \(12,\) and torch.float64: expected integers"),
        ({}, TWELVE, ("gram",), "start 'gram': allowed are 'identity', 'matching', and integers"),
        ({}, TWELVE, (), "no start: allowed are"),
    ],
)
def test_requests_that_do_not_fit_are_refused(changes: Any, labels: Tensor, starts: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        nearest_joint_order([replace(RIGHT, **changes)], labels, starts)


def test_what_is_not_finite_is_refused() -> None:
    infinite = Metric(torch.full((8, 8), torch.inf))
    for changes in ({"weight": torch.full((12, 8), torch.nan)}, {"metric": infinite}):
        with pytest.raises(WorkError, match="a weight or its metric holds NaN or infinity"):
            nearest_joint_order([replace(RIGHT, **changes)], TWELVE)
