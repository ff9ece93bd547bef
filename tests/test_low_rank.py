"""Low rank: the Eckart-Young error, U V entry by entry, and its closed forms."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from reference.kronecker import discarded_energy

from kronpress import RequestError
from kronpress.matrices import LowRank

laws = settings(max_examples=50, deadline=None)
sides = st.integers(1, 12)


@given(rows=sides, columns=sides, seed=st.integers(0, 2**32), data=st.data())
@laws
def test_squared_error_is_the_sum_of_the_discarded_squared_singular_values(
    rows: int, columns: int, seed: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(rows, columns)), label="rank")
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    factors = LowRank.fit(weight, LowRank.Spec(rank=rank))
    error = (weight - LowRank.expand(factors)).square().sum().item()
    assert error == pytest.approx(discarded_energy(weight.numpy(), rank), rel=1e-9, abs=1e-20 * rows * columns)


def test_expand_is_u_times_v_entry_by_entry() -> None:
    factors = {
        "weight": torch.randn(5, 2, 1, dtype=torch.float64),
        "right": torch.randn(2, 4, dtype=torch.float64),
    }
    w = LowRank.expand(factors)
    for o in range(5):
        for i in range(4):
            expected = sum(factors["weight"][o, r, 0] * factors["right"][r, i] for r in range(2))
            torch.testing.assert_close(w[o, i], expected)


@given(out_features=sides, in_features=sides, data=st.data())
@laws
def test_parameters_and_flops_have_closed_forms(out_features: int, in_features: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(out_features, in_features)), label="rank")
    spec = LowRank.Spec(rank=rank)
    assert LowRank.factor_shapes(out_features, in_features, spec) == {
        "weight": (out_features, rank, 1),
        "right": (rank, in_features),
    }
    assert LowRank.count_params(out_features, in_features, spec) == rank * (out_features + in_features)
    assert LowRank.count_flops(out_features, in_features, spec) == 2 * rank * (out_features + in_features)


def test_full_rank_is_allowed_and_one_more_is_not() -> None:
    for shape in ((5, 3), (3, 5)):
        assert LowRank.factor_shapes(*shape, LowRank.Spec(rank=3))
        with pytest.raises(RequestError, match=r"rank 4.*at most 3"):
            LowRank.factor_shapes(*shape, LowRank.Spec(rank=4))


def test_the_one_candidate_has_the_largest_rank_that_the_budget_holds() -> None:
    for max_params, rank in [(19, None), (20, 1), (39, 1), (40, 2), (160, 8), (10_000, 8)]:
        expected = [] if rank is None else [LowRank.Spec(rank=rank)]
        assert LowRank.candidate_specs(12, 8, max_params) == expected
    assert LowRank.candidate_specs(12, 8, rank=3) == [LowRank.Spec(rank=3)]
    assert LowRank.candidate_specs(12, 8, 59, rank=3) == []
