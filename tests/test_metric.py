"""Fits in the metric of real inputs: closed forms are optimal, the alternation never rises and ends where it should."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from samples.matrices import normal
from torch import Tensor

from kronpress import RequestError, WorkError
from kronpress.matrices import STRUCTURES, Kronecker, LowRank
from kronpress.matrices.kronecker_in_metric import alternate, rearranged, separable_start
from kronpress.matrices.metric import Metric, as_metric, separable, square_root
from kronpress.matrices.moments import InputMoments

laws = settings(max_examples=40, deadline=None)
small = st.integers(1, 5)
seeds = st.integers(0, 2**32)


def moment(seed: int, size: int, rank: int | None = None) -> Tensor:
    """A second moment with eigenvalues over three orders of magnitude, of `rank` dimensions."""
    x = normal(seed, 4 * size, size) * torch.logspace(0, -1.5, size, dtype=torch.float64)
    mix = torch.linalg.qr(normal(seed + 1, size, size)).Q
    if rank is not None:
        x[:, rank:] = 0
    return mix @ (x.mT @ x) @ mix.mT / (4 * size)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[tuple[int, int], tuple[int, int], int]:
    m1, n1, m2, n2 = (draw(small) for _ in range(4))
    return (m1, n1), (m2, n2), draw(st.integers(1, min(m1 * n1, m2 * n2)))


def kron(left: Tensor, right: Tensor) -> Tensor:
    return sum(torch.kron(a.contiguous(), b.contiguous()) for a, b in zip(left, right, strict=True))


# ---- the metric ----


@given(m=small, n=small, seed=seeds)
@laws
def test_the_squared_norm_is_the_mean_squared_output_seen_by_the_gradients(m: int, n: int, seed: int) -> None:
    difference, x, g = normal(seed, m, n), normal(seed + 1, 50, n), normal(seed + 2, 70, m)
    metric = Metric(x.mT @ x / 50, g.mT @ g / 70)
    by_hand = sum((row_g @ difference @ row_x) ** 2 for row_g in g for row_x in x) / (50 * 70)
    assert metric.squared_norm(difference) == pytest.approx(by_hand.item(), rel=1e-9)
    assert Metric(metric.input).squared_norm(difference) == pytest.approx(
        (x @ difference.mT).square().sum(1).mean().item(), rel=1e-9
    )
    assert Metric().squared_norm(difference) == pytest.approx(difference.square().sum().item(), rel=1e-12)


@given(size=st.integers(1, 8), seed=seeds)
@laws
def test_roots_and_their_inverses(size: int, seed: int) -> None:
    matrix = moment(seed, size)
    root, inverse = square_root(matrix)
    torch.testing.assert_close(root @ root, matrix)
    torch.testing.assert_close(root @ inverse, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-9)
    singular, _ = square_root(moment(seed, size, rank=size // 2), floor=0)
    torch.testing.assert_close(singular @ singular, moment(seed, size, rank=size // 2))


def test_a_zero_moment_has_zero_roots() -> None:
    assert [each.abs().max().item() for each in square_root(torch.zeros(3, 3, dtype=torch.float64))] == [0, 0]


@given(size1=small, size2=small, seed=seeds)
@laws
def test_the_nearest_separable_moment(size1: int, size2: int, seed: int) -> None:
    planted = torch.kron(moment(seed, size1), moment(seed + 9, size2))
    first, second = separable(planted, size1, size2)
    torch.testing.assert_close(torch.kron(first, second), planted)
    first, second = separable(moment(seed, size1 * size2), size1, size2)
    for factor in (first, second):
        torch.testing.assert_close(factor, factor.mT)
        assert torch.linalg.eigvalsh(factor).min() >= -1e-9 * factor.norm()


def test_moments_of_another_size_or_not_finite_are_refused() -> None:
    weight = torch.zeros(3, 2)
    for moments in (torch.eye(3), Metric(output=torch.eye(2)), InputMoments(torch.eye(3), torch.zeros(3), 1)):
        with pytest.raises(RequestError, match=r"moments of shape \(\d, \d\) for a weight of \(3, 2\): expected"):
            as_metric(moments, weight)
    with pytest.raises(WorkError, match="hold NaN or infinity"):
        as_metric(torch.full((2, 2), torch.nan), weight)
    assert as_metric(None, weight) is None


# ---- every structure ----

CASES = [
    (LowRank, LowRank.Spec(rank=3)),
    (Kronecker, Kronecker.Spec(left_shape=(4, 3), right_shape=(2, 2), num_terms=2)),
    (Kronecker, Kronecker.Spec(left_shape=(8, 3), right_shape=(1, 2))),
    (Kronecker, Kronecker.Spec(left_shape=(4, 6), right_shape=(2, 1))),
    (Kronecker, Kronecker.Spec(left_shape=(4, 1), right_shape=(2, 6), num_terms=2)),
    (Kronecker, Kronecker.Spec(left_shape=(1, 3), right_shape=(8, 2), num_terms=2)),
    (Kronecker, Kronecker.Spec(left_shape=(2, 2), right_shape=(4, 3), num_terms=3)),
]
every_case = pytest.mark.parametrize(("structure", "spec"), CASES, ids=str)


def error(structure: Any, weight: Tensor, spec: Any, metric: Metric, moments: Any) -> float:
    return metric.squared_norm(weight - structure.expand(structure.fit(weight, spec, moments)))


@every_case
@given(seed=seeds)
@settings(max_examples=10, deadline=None)
def test_in_the_metric_of_white_inputs_the_fit_is_that_without(structure: Any, spec: Any, seed: int) -> None:
    weight = normal(seed, 8, 6)
    white = 3.0 * torch.eye(6, dtype=torch.float64)
    plain = structure.expand(structure.fit(weight, spec))
    torch.testing.assert_close(structure.expand(structure.fit(weight, spec, white)), plain, rtol=0, atol=1e-6)
    both = Metric(white, 2.0 * torch.eye(8, dtype=torch.float64))
    torch.testing.assert_close(structure.expand(structure.fit(weight, spec, both)), plain, rtol=0, atol=1e-6)


@every_case
@pytest.mark.parametrize("rank", [6, 4])
@given(seed=seeds)
@settings(max_examples=10, deadline=None)
def test_in_its_own_metric_no_fit_is_better(structure: Any, spec: Any, seed: int, rank: int) -> None:
    weight, metric = normal(seed, 8, 6), Metric(moment(seed, 6, rank), moment(seed + 5, 8))
    unweighted = error(structure, weight, spec, Metric(metric.input), None)
    weighted = error(structure, weight, spec, Metric(metric.input), metric.input)
    assert weighted <= unweighted * (1 + 1e-9)
    factors = structure.fit(weight, spec, metric.input)
    assert all(factor.isfinite().all() for factor in factors.values())


@every_case
@given(seed=seeds)
@settings(max_examples=10, deadline=None)
def test_a_matrix_of_its_own_kind_is_recovered_in_any_metric(structure: Any, spec: Any, seed: int) -> None:
    planted = structure.expand(
        {name: normal(seed + i, *s) for i, (name, s) in enumerate(structure.factor_shapes(8, 6, spec).items())}
    )
    for moments in (moment(seed, 6), Metric(moment(seed, 6), moment(seed + 5, 8)), Metric(output=moment(seed + 5, 8))):
        metric = as_metric(moments, planted)
        assert error(structure, planted, spec, metric, moments) <= 1e-9 * metric.squared_norm(planted)


@every_case
def test_the_factors_share_their_size_and_keep_the_dtype(structure: Any, spec: Any) -> None:
    factors = structure.fit(normal(0, 8, 6).float(), spec, Metric(moment(1, 6), moment(2, 8)))
    assert {factor.dtype for factor in factors.values()} == {torch.float32}
    structure(8, 6, spec).load_state_dict(factors, strict=True)
    left, right = factors.values()
    dims = ((0, 2), (1,)) if structure is LowRank else ((0, 2), (0, 2))
    torch.testing.assert_close(left.square().sum(dims[0]), right.square().sum(dims[1]), rtol=1e-4, atol=1e-6)


@every_case
def test_moments_may_be_a_tensor_input_moments_or_a_metric(structure: Any, spec: Any) -> None:
    weight, second = normal(0, 8, 6), moment(1, 6)
    expected = structure.fit(weight, spec, second)
    for moments in (InputMoments(second, normal(2, 6), 9), Metric(second), second.float()):
        torch.testing.assert_close(structure.fit(weight, spec, moments), expected, rtol=1e-3, atol=1e-4)


# ---- low rank: the optimum ----


@given(m=st.integers(1, 9), n=st.integers(1, 9), seed=seeds, data=st.data())
@laws
def test_weighted_low_rank_error_is_the_discarded_energy(m: int, n: int, seed: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(m, n)), label="rank")
    weight, metric = normal(seed, m, n), Metric(moment(seed, n), moment(seed + 5, m))
    seen = square_root(metric.output)[0] @ weight @ square_root(metric.input)[0]
    expected = torch.linalg.svdvals(seen)[rank:].square().sum().item()
    found = error(LowRank, weight, LowRank.Spec(rank=rank), metric, metric)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-12 * metric.squared_norm(weight))


# ---- Kronecker sums ----


@given(case=shapes(), seed=seeds)
@laws
def test_with_a_separable_moment_the_start_is_the_optimum(case: Any, seed: int) -> None:
    (m1, n1), (m2, n2), k = case
    weight, roots = normal(seed, m1 * m2, n1 * n2), (moment(seed, n1), moment(seed + 7, n2))
    c = torch.kron(*roots)
    seen = weight @ torch.kron(*(square_root(root)[0] for root in roots))
    least = torch.linalg.svdvals(rearranged(seen, (m1, n1), (m2, n2)))[k:].square().sum().item()
    left, right = separable_start(weight, (m1, n1), (m2, n2), k, c)
    slack = 1e-8 * Metric(c).squared_norm(weight)
    assert Metric(c).squared_norm(weight - kron(left, right)) == pytest.approx(least, rel=1e-6, abs=slack)
    losses = alternate(weight, left, right, c, tolerance=0.0)[2]
    assert losses[-1] == pytest.approx(least, rel=1e-5, abs=slack)


@given(case=shapes(), seed=seeds, rank=st.integers(1, 25))
@laws
def test_the_alternation_never_rises_and_its_losses_are_true(case: Any, seed: int, rank: int) -> None:
    (m1, n1), (m2, n2), k = case
    weight, c = normal(seed, m1 * m2, n1 * n2), moment(seed, n1 * n2, min(rank, n1 * n2))
    start = normal(seed + 1, k, m1, n1), normal(seed + 2, k, m2, n2)
    left, right, losses = alternate(weight, *start, c)
    assert all(later <= earlier for earlier, later in pairwise(losses))
    slack = 1e-9 * Metric(c).squared_norm(weight)
    assert losses[-1] == pytest.approx(Metric(c).squared_norm(weight - kron(left, right)), rel=1e-6, abs=slack)


@given(case=shapes(), seed=seeds)
@settings(max_examples=20, deadline=None)
def test_at_the_end_no_factor_alone_can_be_bettered(case: Any, seed: int) -> None:
    (m1, n1), (m2, n2), k = case
    weight, c = normal(seed, m1 * m2, n1 * n2), moment(seed, n1 * n2)
    start = separable_start(weight, (m1, n1), (m2, n2), k, c)
    left, right, _ = alternate(weight, *start, c, max_sweeps=3000, tolerance=1e-12)
    factors = [left.requires_grad_(), right.requires_grad_()]
    difference = weight - kron(*factors)
    loss = ((difference @ c) * difference).sum()
    for factor, gradient in zip(factors, torch.autograd.grad(loss, factors), strict=True):
        # What a step along the gradient could gain at most, the loss being quadratic in each factor.
        assert gradient.norm() * factor.norm() <= 1e-3 * Metric(c).squared_norm(weight)


@given(sizes=st.tuples(small, small, small), seed=seeds, side=st.sampled_from(["left", "right"]))
@settings(max_examples=25, deadline=None)
def test_from_a_random_start_thin_splits_reach_their_closed_form(sizes: Any, seed: int, side: str) -> None:
    m1, m2, n = sizes
    left_shape, right_shape = ((m1, n), (m2, 1)) if side == "left" else ((m1, 1), (m2, n))
    weight, c = normal(seed, m1 * m2, n), moment(seed, n)
    spec = Kronecker.Spec(left_shape=left_shape, right_shape=right_shape)
    closed = error(Kronecker, weight, spec, Metric(c), c)
    start = normal(seed + 1, 1, *left_shape), normal(seed + 2, 1, *right_shape)
    losses = alternate(weight, *start, c, max_sweeps=5000, tolerance=1e-13)[2]
    assert losses[-1] == pytest.approx(closed, rel=1e-3, abs=1e-9)
    assert losses[-1] >= closed * (1 - 1e-9) - 1e-12


def test_starts_for_training_take_no_moments() -> None:
    spec = Kronecker.Spec(left_shape=(8, 3), right_shape=(1, 2))
    for start in ("adaptive", "prune"):
        with pytest.raises(RequestError, match=f"start {start} is not fitted to inputs"):
            Kronecker.fit(normal(0, 8, 6), spec, moment(1, 6), Kronecker.Options(start=start))


@pytest.mark.parametrize("structure", STRUCTURES.values())
@pytest.mark.parametrize("shape", [(3, 6), (4, 4), (6, 3), (8, 24)])
def test_what_is_screened_has_fewer_parameters_than_the_matrix(structure: Any, shape: tuple[int, int]) -> None:
    # (3, 6), (6, 3): rank 2 has as many as the matrix itself.
    screened = structure.screen(normal(0, *shape), Metric(moment(1, shape[1]), moment(2, shape[0])))
    # Of small matrices some structures have none.
    assert bool(screened) == bool(structure.candidate_specs(*shape, shape[0] * shape[1] - 1))
    assert len({spec for spec, *_ in screened}) == len(screened)
    for spec, error, _ in screened:
        assert structure.count_params(*shape, spec) < shape[0] * shape[1]
        assert error >= 0


# ---- a diagonal, as a vector ----


@given(sizes=shapes(), seed=seeds)
@laws
def test_a_vector_stands_for_a_diagonal_metric_of_the_outputs(sizes: Any, seed: int) -> None:
    (m1, n1), (m2, n2), k = sizes
    w, c = normal(seed, m1 * m2, n1 * n2), moment(seed + 1, n1 * n2)
    frequencies = normal(seed + 2, m1 * m2).abs() + 1e-3
    short, long = Metric(c, frequencies), Metric(c, torch.diag(frequencies))
    assert short.squared_norm(w) == pytest.approx(long.squared_norm(w), rel=1e-9)
    spec = Kronecker.Spec(left_shape=(m1, n1), right_shape=(m2, n2), num_terms=k)
    rank = LowRank.Spec(rank=min(k, *w.shape))
    for structure, chosen in ((Kronecker, spec), (LowRank, rank)):
        errors = [long.squared_norm(w - structure.expand(structure.fit(w, chosen, metric))) for metric in (short, long)]
        assert errors[0] == pytest.approx(errors[1], rel=1e-6, abs=1e-9 * long.squared_norm(w))
    screens = [
        [error for _, error, _ in structure.screen(w, metric)]
        for structure in (Kronecker, LowRank)
        for metric in (short, long)
    ]
    for one, other in (screens[:2], screens[2:]):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4 * long.squared_norm(w))


@given(seed=seeds)
@laws
def test_one_row_blocks_are_fitted_exactly_under_frequencies(seed: int) -> None:
    """With m2 = 1 every row of A is free: weighting rows is fitting the weighted table."""
    w, frequencies = normal(seed, 7, 6), normal(seed + 1, 7).abs() + 1e-3
    spec = Kronecker.Spec(left_shape=(7, 3), right_shape=(1, 2))
    fitted = Kronecker.expand(Kronecker.fit(w, spec, Metric(None, frequencies)))
    scaled = frequencies.sqrt()[:, None]
    by_hand = Kronecker.expand(Kronecker.fit(scaled * w, spec)) / scaled
    torch.testing.assert_close(fitted, by_hand, rtol=1e-6, atol=1e-6)


def test_a_vector_of_inputs_is_refused() -> None:
    with pytest.raises(RequestError, match="expected"):
        as_metric(Metric(torch.ones(4)), torch.ones(3, 4))
