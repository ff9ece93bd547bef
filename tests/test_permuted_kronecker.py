"""Kronecker sums in orders of their own: planted ones are recovered, no fit is worse than a plain one."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from pydantic import ValidationError
from reference.kronecker import kronecker_sum
from samples.matrices import generator, normal
from torch import Tensor

from kronpress import StructuredLinear
from kronpress.matrices import Kronecker, PermutedKronecker
from kronpress.matrices.metric import Metric

few = settings(max_examples=12, deadline=None)
seeds = st.integers(0, 2**32)
sides = pytest.mark.parametrize("side", ["rows", "columns"])


def random_order(seed: int, size: int) -> Tensor:
    return torch.randperm(size, generator=generator(seed))


def moment_of(seed: int, size: int) -> Tensor:
    x = normal(seed, 3 * size, size) @ normal(seed + 1, size, size)
    return x.mT @ x / len(x)


def spec_of(left_shape: tuple[int, int], right_shape: tuple[int, int], k: int = 1, **sides: bool) -> Any:
    return PermutedKronecker.Spec(left_shape=left_shape, right_shape=right_shape, num_terms=k, **sides)


def fit_error(weight: Tensor, structure: Any, spec: Any, metric: Metric | None, options: Any = None) -> float:
    difference = weight - structure.expand(structure.fit(weight, spec, metric, options))
    return (metric or Metric()).squared_norm(difference)


@given(seed=seeds, rows=st.booleans(), columns=st.booleans(), k=st.integers(1, 3))
@few
def test_an_entry_is_that_of_the_sum_where_the_orders_say(seed: int, rows: bool, columns: bool, k: int) -> None:
    spec = spec_of((3, 2), (2, 4), k, rows=rows, columns=columns)
    factors = {"weight": normal(seed, 3, k, 2), "right": normal(seed + 1, 2, k, 4)}
    plain = kronecker_sum(factors)
    row_order, column_order = random_order(seed, 6), random_order(seed + 2, 8)
    sizes = PermutedKronecker.order_sizes(6, 8, spec)
    assert sizes == ({"row_order": 6} if rows else {}) | ({"column_order": 8} if columns else {})
    factors |= {
        name: order for name, order in (("row_order", row_order), ("column_order", column_order)) if name in sizes
    }
    found = PermutedKronecker.expand(factors)
    for i in range(6):
        for j in range(8):
            at = row_order[i] if rows else i, column_order.tolist().index(j) if columns else j
            assert found[i, j] == pytest.approx(plain[at].item(), abs=1e-12)
    indices = torch.tensor([[5, 0, 3], [2, 2, 1]])
    torch.testing.assert_close(PermutedKronecker.rows(factors, indices), found[indices])


@sides
@pytest.mark.parametrize("with_moment", [False, True], ids=["frobenius", "metric"])
@given(m1=st.integers(2, 6), n1=st.integers(3, 6), m2=st.integers(2, 4), n2=st.integers(1, 4), seed=seeds)
@few
def test_a_product_of_which_one_side_was_permuted_is_recovered(
    side: str, with_moment: bool, m1: int, n1: int, m2: int, n2: int, seed: int
) -> None:
    weight = torch.kron(normal(seed, m1, n1), normal(seed + 1, m2, n2))[random_order(seed, m1 * m2)]
    spec = spec_of((m1, n1), (m2, n2), rows=True, columns=False)
    if side == "columns":
        weight, spec = weight.mT, spec_of((n1, m1), (n2, m2), rows=False, columns=True)
    metric = Metric(moment_of(seed, weight.shape[1])) if with_moment else None
    assert fit_error(weight, PermutedKronecker, spec, metric) <= 1e-7 * (metric or Metric()).squared_norm(weight)


@pytest.mark.parametrize("kind", ["none", "input", "output", "both", "frequencies"])
@given(seed=seeds, k=st.integers(1, 2), shape=st.sampled_from([((6, 4), (2, 2)), ((3, 8), (4, 1)), ((2, 2), (6, 4))]))
@few
def test_a_fit_is_never_worse_than_that_of_a_plain_sum(kind: str, seed: int, k: int, shape: Any) -> None:
    weight = normal(seed, 12, 8)
    output = {"output": moment_of(seed + 2, 12), "both": moment_of(seed + 2, 12), "frequencies": normal(seed, 12).exp()}
    metric = Metric(moment_of(seed, 8) if kind in ("input", "both") else None, output.get(kind))
    plain = Kronecker.Spec(left_shape=shape[0], right_shape=shape[1], num_terms=k)
    given = fit_error(weight, Kronecker, plain, metric)
    for rows, columns in ((True, True), (True, False), (False, True), (False, False)):
        found = fit_error(weight, PermutedKronecker, spec_of(*shape, k, rows=rows, columns=columns), metric)
        assert found <= given * (1 + 1e-9)
    assert found == pytest.approx(given, rel=1e-6)  # of no side at all


def test_restarts_are_tried_and_seeded() -> None:
    gains = []
    for seed in range(4):
        weight, spec = normal(seed, 24, 24), spec_of((12, 12), (2, 2))
        errors = [
            fit_error(weight, PermutedKronecker, spec, None, PermutedKronecker.Options(restarts=restarts))
            for restarts in (0, 4, 4)
        ]
        assert errors[1] == errors[2] <= errors[0]
        gains.append(errors[0] - errors[1])
    assert max(gains) > 0


def test_a_plain_sum_stays_in_its_order() -> None:
    weight = torch.kron(normal(0, 6, 4), normal(1, 2, 2))
    found = PermutedKronecker.fit(weight, spec_of((6, 4), (2, 2)))
    assert found["row_order"].tolist() == list(range(12))
    assert found["column_order"].tolist() == list(range(8))


def test_a_layer_owns_the_orders_and_casts_leave_them() -> None:
    weight = normal(0, 12, 8)
    matrix = PermutedKronecker.from_dense(weight, spec_of((6, 4), (2, 2)))
    layer = StructuredLinear(matrix).to(torch.bfloat16)
    assert list(layer.state_dict()) == ["weight", "right", "row_order", "column_order"]
    assert (layer.row_order.dtype, layer.weight.dtype) == (torch.int64, torch.bfloat16)
    assert torch.equal(layer.row_order, matrix.factors["row_order"])
    assert [name for name, _ in layer.named_parameters()] == ["weight", "right"]


def test_sides_on_which_no_order_counts_have_none_in_candidates() -> None:
    for spec in PermutedKronecker.candidate_specs(12, 8, 60):
        (m1, n1), (m2, n2) = spec.left_shape, spec.right_shape
        assert (spec.rows, spec.columns) == (1 not in (m1, m2), 1 not in (n1, n2))
        assert spec.rows or spec.columns
    rows_alone = PermutedKronecker.candidate_specs(12, 8, 60, columns=False)
    assert rows_alone and all(spec.rows and not spec.columns for spec in rows_alone)
    assert PermutedKronecker.candidate_specs(12, 8, 60, rows=False, columns=False) == []
    tall, wide = (PermutedKronecker.candidate_specs(*shape, 60, right_shape=(4, 2)) for shape in ((12, 8), (8, 12)))
    assert [spec.right_shape for spec in (*tall, *wide)] == [(4, 2), (2, 4)]


def test_only_true_and_false_say_which_sides_are_permuted() -> None:
    for wrong in (0, 1, "yes"):
        with pytest.raises(ValidationError):
            spec_of((6, 4), (2, 2), rows=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        PermutedKronecker.Options(restarts=-1)


@pytest.mark.parametrize("kind", ["none", "both"])
def test_what_is_screened_are_kronecker_sums_and_their_errors_lower(kind: str) -> None:
    weight = normal(0, 24, 16)
    metric = Metric(moment_of(1, 16), moment_of(2, 24)) if kind == "both" else Metric()
    plain = {tuple(dict(spec).values()): error for spec, error, _ in Kronecker.screen(weight, metric)}
    screened = PermutedKronecker.screen(weight, metric)
    assert screened and all(not is_exact for _, _, is_exact in screened)
    for spec, error, _ in screened:
        known = plain[spec.left_shape, spec.right_shape, spec.num_terms]
        assert error < known or known == 0
        assert PermutedKronecker.candidate_specs(24, 16, right_shape=(spec.right_shape), num_terms=spec.num_terms) == [
            spec
        ]
    sizes = {name: value for name, value in spec if name not in ("rows", "columns")}
    assert PermutedKronecker.estimate(weight, spec, metric) < Kronecker.estimate(
        weight, Kronecker.Spec(**sizes), metric
    )
