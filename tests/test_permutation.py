"""The permutation search: each step is what it says by brute force, energy never falls, planted products are found."""

from __future__ import annotations

from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from reference.kronecker import kronecker_sum, van_loan_squared_error
from safetensors.torch import load_file
from samples.matrices import generator, normal, singular_moment
from torch import Tensor

from kronpress import RequestError, WorkError
from kronpress.matrices.permutation import PermutedSum, nearest_permuted_sum, row_features
from kronpress.matrices.permutation_steps import (
    assigned,
    column_exchange_gains,
    disjoint_pairs,
    exchange_gains,
    exchanged_columns,
    regrouped,
    sum_of_places,
)

WEIGHTS = Path(__file__).parents[2] / "shared" / "data" / "gpt2_124m_attention" / "attention_layers_0_5_11.safetensors"

laws = settings(max_examples=30, deadline=None)
few = settings(max_examples=12, deadline=None)
small = st.integers(1, 4)
seeds = st.integers(0, 2**32)
sides = pytest.mark.parametrize("side", ["rows", "columns", "both"])
moments = pytest.mark.parametrize("with_moment", [False, True], ids=["frobenius", "metric"])


def random_order(seed: int, size: int) -> Tensor:
    return torch.randperm(size, generator=generator(seed))


def planted(seed: int, left_shape: tuple[int, int], right_shape: tuple[int, int]) -> Tensor:
    return torch.kron(normal(seed, *left_shape), normal(seed + 1, *right_shape))


def free(side: str) -> dict[str, bool]:
    return {"rows": side != "columns", "columns": side != "rows"}


def squared_error(weight: Tensor, found: PermutedSum, moment: Tensor | None) -> float:
    """tr(ΔW C ΔWᵀ) with the permuted weight, and C permuted with its columns."""
    approximation = kronecker_sum({"weight": found.left.transpose(0, 1), "right": found.right.transpose(0, 1)})
    difference = weight.double()[found.row_order][:, found.column_order] - approximation
    if moment is None:
        return difference.square().sum().item()
    moved = moment[found.column_order][:, found.column_order]
    return torch.einsum("ij,jk,ik->", difference, moved, difference).item()


def energy(weight: Tensor, moment: Tensor | None) -> float:
    return (weight.square().sum() if moment is None else ((weight @ moment) * weight).sum()).item()


@st.composite
def shapes(draw: st.DrawFn) -> tuple[tuple[int, int], tuple[int, int], int]:
    m1, n1, m2, n2 = (draw(small) for _ in range(4))
    return (m1, n1), (m2, n2), draw(st.integers(1, min(m1 * n1, m2 * n2)))


# ---- the steps ----


def grouping(seed: int, groups: int, places: int, num_kinds: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features (places, rows, d), an order (groups, places), and kinds, which the order keeps."""
    features, order = normal(seed, places, groups * places, 3), random_order(seed + 1, groups * places)
    kinds = torch.randint(num_kinds, (groups, places), generator=generator(seed + 2))
    return features, order.reshape(groups, places), kinds


def grouped_energy(features: Tensor, order: Tensor) -> float:
    return sum(sum(features[q, row] for q, row in enumerate(group)).square().sum() for group in order.tolist()).item()


@given(seed=seeds, groups=small, places=small, num_kinds=st.integers(1, 3))
@laws
def test_regrouping_keeps_rows_and_kinds_and_never_loses_energy(
    seed: int, groups: int, places: int, num_kinds: int
) -> None:
    features, order, kinds = grouping(seed, groups, places, num_kinds)
    before = order.clone()
    after = regrouped(lambda place, rows: features[place, rows], order, kinds)
    assert torch.equal(order, before)
    assert sorted(after.flatten().tolist()) == list(range(groups * places))
    kind_of_row = torch.empty(groups * places, dtype=torch.int64)
    kind_of_row[order.flatten()] = kinds.flatten()
    assert torch.equal(kind_of_row[after], kinds)
    assert grouped_energy(features, after) >= grouped_energy(features, order) * (1 - 1e-12)


@given(seed=seeds, groups=st.integers(2, 4), places=st.integers(2, 3))
@laws
def test_where_regrouping_ends_no_assignment_within_a_place_and_no_exchange_gains(
    seed: int, groups: int, places: int
) -> None:
    features, order, kinds = grouping(seed, groups, places, 1)
    reached = grouped_energy(features, order)
    while True:
        order = regrouped(lambda place, rows: features[place, rows], order, kinds)
        if grouped_energy(features, order) <= reached * (1 + 1e-12):
            break
        reached = grouped_energy(features, order)
    for place in range(places):
        for chosen in permutations(range(groups)):
            other = order.clone()
            other[:, place] = order[list(chosen), place]
            assert grouped_energy(features, other) <= reached * (1 + 1e-9)
    for x in range(groups * places):
        for y in range(x):
            other = order.flatten().clone()
            other[x], other[y] = order.flatten()[y], order.flatten()[x]
            assert grouped_energy(features, other.reshape(order.shape)) <= reached * (1 + 1e-9)


@given(seed=seeds, size=st.integers(1, 5), num_kinds=st.integers(1, 2))
@laws
def test_the_assignment_is_the_best_of_all(seed: int, size: int, num_kinds: int) -> None:
    scores, kinds = normal(seed, size, size), torch.randint(num_kinds, (size,), generator=generator(seed))
    allowed = [list(p) for p in permutations(range(size)) if torch.equal(kinds[list(p)], kinds)]
    source = assigned(scores, kinds).tolist()
    assert source in allowed
    best = max(scores[p, range(size)].sum().item() for p in allowed)
    assert scores[source, range(size)].sum().item() == pytest.approx(best, abs=1e-9)


def test_an_assignment_without_gain_leaves_all_in_place() -> None:
    assert assigned(torch.ones(5, 5, dtype=torch.float64), torch.zeros(5)).tolist() == [0, 1, 2, 3, 4]


@given(seed=seeds, groups=small, places=st.integers(2, 4))
@laws
def test_the_gain_of_an_exchange_is_the_difference_of_energies(seed: int, groups: int, places: int) -> None:
    features, order, _ = grouping(seed, groups, places, 1)
    q, u = sorted(random_order(seed, places)[:2].tolist())
    total = sum_of_places(lambda place, rows: features[place, rows], order)
    assert total.square().sum().item() == pytest.approx(grouped_energy(features, order))
    at_q, at_u = order[:, q], order[:, u]
    gain = exchange_gains(total, (features[q, at_q], features[u, at_u]), (features[q, at_u], features[u, at_q]))
    for p in range(groups):
        for s in range(groups):
            other = order.clone()
            other[p, q], other[s, u] = order[s, u], order[p, q]
            difference = grouped_energy(features, other) - grouped_energy(features, order)
            assert gain[p, s].item() == pytest.approx(difference, abs=1e-9)


@given(seed=seeds, size=st.integers(1, 9), distinct=st.integers(1, 40))
@laws
def test_disjoint_pairs_are_those_of_the_greedy_choice(seed: int, size: int, distinct: int) -> None:
    # Small integers, so that many gains are equal.
    half = torch.randint(-distinct, distinct + 1, (size, size), generator=generator(seed)).double()
    gain = torch.maximum(half, half.mT)
    first, second = disjoint_pairs(gain, 0.0)
    used = [*first.tolist(), *(y for x, y in zip(first.tolist(), second.tolist(), strict=True) if x != y)]
    assert len(used) == len(set(used))
    assert all(first <= second) and all(gain[first, second] > 0)
    unused = [x for x in range(size) if x not in used]
    assert not (gain[unused][:, unused] > 0).any()
    if len(set(gain[gain > 0].tolist())) == len(torch.triu(gain).gt(0).nonzero()):  # no ties: the greedy choice is one
        remaining, expected = set(range(size)), set()
        upper = [(gain[x, y].item(), x, y) for x in range(size) for y in range(x, size)]
        for value, p, s in sorted(upper, reverse=True):
            if value > 0 and {p, s} <= remaining:
                expected.add((p, s))
                remaining -= {p, s}
        assert set(zip(first.tolist(), second.tolist(), strict=True)) == expected


@moments
@given(shapes=shapes(), seed=seeds)
@laws
def test_the_energy_of_an_order_is_what_the_best_left_factor_captures(
    with_moment: bool, shapes: Any, seed: int
) -> None:
    """By least squares over all entries of A, in the root of C."""
    (m1, n1), (m2, n2), k = shapes
    weight, order = normal(seed, m1 * m2, n1 * n2), random_order(seed, m1 * m2).reshape(m1, m2)
    right = torch.linalg.qr(normal(seed + 1, m2 * n2, k)).Q.mT.reshape(k, m2, n2)
    moment = singular_moment(seed, n1 * n2) + 0.1 * torch.eye(n1 * n2) if with_moment else None
    root = torch.eye(n1 * n2, dtype=torch.float64) if moment is None else torch.linalg.cholesky(moment)
    if with_moment:
        right = 3 * right
    target = weight[order.flatten()] @ root
    basis = [
        torch.kron(entry.reshape(m1, n1), right[i].contiguous()) @ root
        for i in range(k)
        for entry in torch.eye(m1 * n1, dtype=torch.float64)
    ]
    design = torch.stack([each.flatten() for each in basis], 1)
    residual = target.flatten() - design @ torch.linalg.lstsq(design, target.flatten(), driver="gelsd").solution
    captured = target.square().sum() - residual.square().sum()
    features = row_features(weight, right, n1, moment)
    assert sum_of_places(features, order).square().sum().item() == pytest.approx(captured.item(), rel=1e-6, abs=1e-9)


def held_loss(weight: Tensor, moment: Tensor, target: Tensor, order: Tensor) -> float:
    difference = weight[:, order] - target
    return torch.einsum("ij,jk,ik->", difference, moment[order][:, order], difference).item()


@given(seed=seeds, m=small, n=st.integers(2, 6))
@laws
def test_the_gain_of_a_column_exchange_is_the_fall_of_the_loss(seed: int, m: int, n: int) -> None:
    weight, target, moment = normal(seed, m, n), normal(seed + 1, m, n), singular_moment(seed + 2, n)
    order = random_order(seed, n)
    linear = (weight @ moment)[:, order].mT @ target
    gain = column_exchange_gains(linear, target.mT @ target, moment[order][:, order])
    for x in range(n):
        for y in range(n):
            other = order.clone()
            other[x], other[y] = order[y], order[x]
            fall = held_loss(weight, moment, target, order) - held_loss(weight, moment, target, other)
            assert gain[x, y].item() == pytest.approx(fall, abs=1e-7, rel=1e-7)


@given(seed=seeds, m=small, n=st.integers(2, 7), num_kinds=st.integers(1, 2))
@laws
def test_exchanged_columns_keep_their_kinds_and_never_raise_the_loss(seed: int, m: int, n: int, num_kinds: int) -> None:
    weight, target, moment = normal(seed, m, n), normal(seed + 1, m, n), singular_moment(seed + 2, n)
    order, kinds = random_order(seed, n), torch.randint(num_kinds, (n,), generator=generator(seed))
    kind_of_column = torch.empty(n, dtype=torch.int64)
    kind_of_column[order] = kinds
    after = exchanged_columns(weight, moment, target, order, kinds)
    assert sorted(after.tolist()) == list(range(n))
    assert torch.equal(kind_of_column[after], kinds)
    before_loss = held_loss(weight, moment, target, order)
    assert held_loss(weight, moment, target, after) <= before_loss * (1 + 1e-9)


# ---- the search ----


@moments
@sides
@given(shapes=shapes(), seed=seeds)
@few
def test_orders_are_permutations_and_the_energies_are_true_and_never_fall(
    with_moment: bool, side: str, shapes: Any, seed: int
) -> None:
    left_shape, right_shape, k = shapes
    m, n = left_shape[0] * right_shape[0], left_shape[1] * right_shape[1]
    weight, moment = normal(seed, m, n), singular_moment(seed, n) if with_moment else None
    found = nearest_permuted_sum(
        weight, left_shape, right_shape, k, **free(side), moment=moment, starts=("identity", "matching", 0)
    )
    for order, size, is_free in ((found.row_order, m, side != "columns"), (found.column_order, n, side != "rows")):
        assert sorted(order.tolist()) == list(range(size))
        assert is_free or order.tolist() == list(range(size))
    assert found.left.shape == (k, *left_shape)
    assert found.right.shape == (k, *right_shape)
    assert all(before <= after for before, after in pairwise(found.captured))
    error = squared_error(weight, found, moment)
    assert 1 - error / energy(weight, moment) == pytest.approx(found.captured[-1], abs=1e-7)
    if moment is None:
        in_order = 1 - van_loan_squared_error(weight, left_shape, right_shape, k) / energy(weight, None)
        assert found.captured[-1] >= in_order - 1e-9
        permuted = weight[found.row_order][:, found.column_order]
        assert error == pytest.approx(van_loan_squared_error(permuted, left_shape, right_shape, k), abs=1e-9)


@moments
@pytest.mark.parametrize("side", ["rows", "columns"])
@given(m1=st.integers(2, 6), n1=st.integers(3, 6), m2=small, n2=small, seed=seeds)
@few
def test_a_product_of_which_one_side_is_permuted_is_recovered(
    with_moment: bool, side: str, m1: int, n1: int, m2: int, n2: int, seed: int
) -> None:
    left_shape, right_shape = (m1, n1), (m2, n2)
    weight = planted(seed, left_shape, right_shape)
    if side == "columns":
        weight, left_shape, right_shape = weight.mT, (n1, m1), (n2, m2)
    permuted = weight[random_order(seed, len(weight))] if side == "rows" else weight[:, random_order(seed, m1 * m2)]
    moment = singular_moment(seed, weight.shape[1]) if with_moment else None
    found = nearest_permuted_sum(permuted, left_shape, right_shape, **free(side), moment=moment, starts=("matching",))
    assert found.captured[-1] == pytest.approx(1, abs=1e-7)


def test_most_products_permuted_on_both_sides_are_recovered() -> None:
    """Two-sided recovery is no law: the rate over fixed seeds."""
    recovered = 0
    for seed in range(20):
        weight = planted(seed, (24, 20), (2, 2))
        permuted = weight[random_order(seed, 48)][:, random_order(seed + 1, 40)]
        found = nearest_permuted_sum(permuted, (24, 20), (2, 2), starts=("matching", 0))
        recovered += found.captured[-1] > 1 - 1e-9
    assert recovered >= 16, recovered


@moments
@given(shapes=shapes(), seed=seeds)
@few
def test_what_is_a_sum_already_stays_in_its_order(with_moment: bool, shapes: Any, seed: int) -> None:
    left_shape, right_shape, k = shapes
    weight = sum(planted(seed + 2 * i, left_shape, right_shape) for i in range(k))
    moment = singular_moment(seed, weight.shape[1]) if with_moment else None
    found = nearest_permuted_sum(weight, left_shape, right_shape, k, moment=moment, starts=("matching", 3, "identity"))
    if not with_moment:  # in the metric the alternation may leave something to gain
        assert found.row_order.tolist() == list(range(weight.shape[0]))
        assert found.column_order.tolist() == list(range(weight.shape[1]))
        assert found.start == "identity"
    assert found.captured[-1] == pytest.approx(1, abs=1e-3 if with_moment else 1e-9)


@pytest.mark.parametrize("left_shape", [(6, 1), (1, 8), (6, 8), (1, 1)])
def test_where_no_order_changes_anything_none_is_taken(left_shape: tuple[int, int]) -> None:
    right_shape = 6 // left_shape[0], 8 // left_shape[1]
    found = nearest_permuted_sum(normal(0, 6, 8), left_shape, right_shape, columns=False, starts=("matching", 5))
    if 1 in (left_shape[0], right_shape[0]):
        assert found.row_order.tolist() == list(range(6))
        assert len(found.captured) == 1


def test_zeros_are_captured_in_their_order() -> None:
    for moment in (None, torch.eye(4), torch.zeros(4, 4)):
        found = nearest_permuted_sum(
            torch.zeros(6, 4), (3, 2), (2, 2), moment=moment, starts=("identity", "matching", 1)
        )
        assert (found.row_order.tolist(), found.captured) == (list(range(6)), (1.0,))
        assert found.left.isfinite().all() and found.right.isfinite().all()


@moments
@pytest.mark.parametrize("shapes", [((6, 4), (2, 2)), ((2, 2), (6, 4)), ((3, 8), (4, 1))], ids=str)
@given(seed=seeds, num_labels=st.integers(1, 5))
@settings(max_examples=6, deadline=None)
def test_rows_and_columns_stay_among_those_of_their_label(
    with_moment: bool, shapes: Any, seed: int, num_labels: int
) -> None:
    labels = [torch.randint(num_labels, (size,), generator=generator(seed + size)) for size in (12, 8)]
    weight, moment = normal(seed, 12, 8), singular_moment(seed, 8) if with_moment else None
    found = nearest_permuted_sum(
        weight, *shapes, rows=labels[0], columns=labels[1], moment=moment, starts=("matching", 1)
    )
    assert torch.equal(labels[0][found.row_order], labels[0])
    assert torch.equal(labels[1][found.column_order], labels[1])
    apart = nearest_permuted_sum(weight, *shapes, rows=torch.arange(12), columns=torch.arange(8), moment=moment)
    assert (apart.row_order.tolist(), apart.column_order.tolist()) == (list(range(12)), list(range(8)))


@given(seed=seeds)
@few
def test_a_product_permuted_inside_heads_is_recovered(seed: int) -> None:
    """Heads of eight rows, four groups of two each, as with value channels."""
    weight, heads = planted(seed, (12, 6), (2, 2)), torch.arange(24) // 8
    order = torch.cat([8 * head + random_order(seed + head, 8) for head in range(3)])
    found = nearest_permuted_sum(weight[order], (12, 6), (2, 2), rows=heads, columns=False)
    assert found.captured[-1] == pytest.approx(1, abs=1e-9)
    assert torch.equal(heads[found.row_order], heads)


@given(seed=seeds)
@few
def test_equal_requests_have_equal_results_and_one_start_more_is_never_worse(seed: int) -> None:
    weight = normal(seed, 12, 8)
    starts = ("identity", "matching", 7)
    once, again = (nearest_permuted_sum(weight, (6, 4), (2, 2), 2, starts=starts) for _ in range(2))
    assert torch.equal(once.row_order, again.row_order) and torch.equal(once.column_order, again.column_order)
    assert (once.captured, once.start) == (again.captured, again.start)
    alone = [nearest_permuted_sum(weight, (6, 4), (2, 2), 2, starts=(start,)) for start in starts]
    assert once.captured[-1] == max(each.captured[-1] for each in alone)
    assert once.start in starts


def test_another_seed_is_another_start() -> None:
    weight = normal(0, 24, 24)
    first, second = (nearest_permuted_sum(weight, (12, 12), (2, 2), starts=(seed,)) for seed in (0, 1))
    assert (first.start, second.start) == (0, 1)
    assert first.captured[0] != second.captured[0]


@given(seed=seeds, k=st.integers(1, 3))
@few
def test_the_larger_factor_may_stand_on_either_side(seed: int, k: int) -> None:
    """A ⊗ B is B ⊗ A in another order of rows and columns."""
    weight = normal(seed, 12, 8)
    rows, columns = torch.arange(12).reshape(6, 2).mT.flatten(), torch.arange(8).reshape(4, 2).mT.flatten()
    large_left = nearest_permuted_sum(weight, (6, 4), (2, 2), k)
    large_right = nearest_permuted_sum(weight[rows][:, columns], (2, 2), (6, 4), k)
    assert large_left.captured == pytest.approx(large_right.captured, abs=1e-9)
    torch.testing.assert_close(large_right.right, large_left.left)
    assert torch.equal(rows[large_right.row_order].reshape(2, 6).mT.flatten(), large_left.row_order)


@given(seed=seeds)
@few
def test_for_white_inputs_rows_are_found_as_without_inputs(seed: int) -> None:
    """Where B has one column, so that both fits are closed forms."""
    weight, shapes = normal(seed, 12, 5), ((4, 5), (3, 1), 2)
    plain = nearest_permuted_sum(weight, *shapes, starts=("identity",))
    white = nearest_permuted_sum(weight, *shapes, moment=5 * torch.eye(5), starts=("identity",))
    assert white.captured == pytest.approx(plain.captured, abs=1e-6)
    assert torch.equal(white.row_order, plain.row_order)


@given(seed=seeds)
@few
def test_inputs_that_are_never_seen_do_not_count(seed: int) -> None:
    """Half of the inputs are always zero: the rows of the other half alone are permuted, and are recovered."""
    weight, moment = planted(seed, (6, 4), (2, 2)), torch.zeros(8, 8, dtype=torch.float64)
    moment[:4, :4] = singular_moment(seed, 4) + torch.eye(4)
    weight[:, 4:] = 100 * normal(seed + 2, 12, 4)
    shuffled = weight[random_order(seed, 12)]
    found = nearest_permuted_sum(shuffled, (6, 4), (2, 2), columns=False, moment=moment, starts=(0, 1, 2, 3, 4, 5))
    blind = nearest_permuted_sum(shuffled, (6, 4), (2, 2), columns=False, starts=(0, 1, 2, 3, 4, 5))
    assert squared_error(shuffled, found, moment) < squared_error(shuffled, blind, moment)


def test_half_precision_weights_are_computed_in_double() -> None:
    found = nearest_permuted_sum(normal(0, 12, 8).half(), (6, 4), (2, 2), moment=torch.eye(8))
    assert found.left.dtype == found.right.dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        (((3, 4), (2, 3)), {}, "left_shape 3×4 ⊗ right_shape 2×3 is 6×12, not the matrix's 6×8"),
        (((3, 4), (2, 2), 5), {}, "num_terms 5 with factors 3×4 and 2×2: allowed are 1 to 4"),
        (((3, 4), (2, 2), 0), {}, "num_terms 0 with factors 3×4 and 2×2: allowed are 1 to 4"),
        (((3, 4), (2, 2)), {"moment": torch.eye(6)}, r"moment of shape \(6, 6\) .*: expected \(8, 8\)"),
        (((3, 4), (2, 2)), {"starts": ("gram",)}, "start 'gram': allowed are 'identity', 'matching', and integers"),
        (((3, 4), (2, 2)), {"starts": ()}, "no start: allowed are"),
        (((3, 4), (2, 2)), {"rows": torch.arange(8)}, r"labels of rows have shape \(8,\) .*: expected .* \(6,\)"),
        (((3, 4), (2, 2)), {"columns": torch.ones(8)}, r"labels of columns have shape \(8,\) and torch.float32"),
    ],
)
def test_requests_that_do_not_fit_are_refused(arguments: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        nearest_permuted_sum(torch.zeros(6, 8), *arguments, **changes)


def test_weights_and_moments_that_are_not_finite_are_refused() -> None:
    with pytest.raises(WorkError, match="the weight holds NaN or infinity"):
        nearest_permuted_sum(torch.full((6, 8), torch.nan), (3, 4), (2, 2))
    with pytest.raises(WorkError, match="the moment holds NaN or infinity"):
        nearest_permuted_sum(torch.zeros(6, 8), (3, 4), (2, 2), moment=torch.full((8, 8), torch.inf))


@pytest.mark.skipif(not WEIGHTS.exists(), reason="the real GPT-2 attention weights (../shared/data) are not here")
def test_a_real_matrix_gains_more_than_a_random_one_of_its_size() -> None:
    real = load_file(WEIGHTS)["transformer.h.11.attn.c_proj.weight"].double().mT
    gains = []
    for weight in (real, normal(0, *real.shape)):
        captured = nearest_permuted_sum(weight, (384, 384), (2, 2), starts=("identity",)).captured
        gains.append(captured[-1] - captured[0])
    assert gains[0] > 3 * gains[1] > 0.1
