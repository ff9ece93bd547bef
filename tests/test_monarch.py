"""Monarch: the discrete Fourier transform is one, and its fits are nearest, in Frobenius norm and to real inputs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from samples.matrices import normal
from torch import Tensor

from kronpress import RequestError
from kronpress.matrices import LowRank, Monarch
from kronpress.matrices.metric import Metric
from kronpress.matrices.monarch import alternate

laws = settings(max_examples=30, deadline=None)
small = st.integers(1, 4)
seeds = st.integers(0, 2**32)


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, int, Any]:
    """A shape (m, n) and a spec that fits it."""
    k, c, height, width = (draw(small) for _ in range(4))
    spec = Monarch.Spec(output_blocks=k, input_blocks=c, rank=draw(st.integers(1, min(height, width))))
    return k * height, c * width, spec


def random_factors(seed: int, m: int, n: int, spec: Any) -> dict[str, Tensor]:
    shapes = Monarch.factor_shapes(m, n, spec)
    return {name: normal(seed + i, *shape) for i, (name, shape) in enumerate(shapes.items())}


def moment(seed: int, size: int) -> Tensor:
    x = normal(seed, 3 * size, size) * torch.logspace(0, -1.5, size, dtype=torch.float64)
    mix = torch.linalg.qr(normal(seed + 1, size, size)).Q
    return mix @ (x.mT @ x) @ mix.mT / (3 * size)


def block_diagonal(seed: int, blocks: int, size: int) -> Tensor:
    return torch.block_diag(*(moment(seed + i, size) for i in range(blocks)))


def together(blocks: int, size: int) -> Tensor:
    """Where row (p, k) of a matrix with `size` rows in each of its output blocks goes in the order (k, p)."""
    return torch.arange(blocks * size).reshape(size, blocks).mT.flatten()


def error(weight: Tensor, spec: Any, metric: Metric, moments: Metric | None) -> float:
    return metric.squared_norm(weight - Monarch.expand(Monarch.fit(weight, spec, moments)))


# ---- what it is ----


@given(case=cases(), seed=seeds)
@laws
def test_it_is_the_product_of_block_diagonal_matrices_and_two_transpositions(case: Any, seed: int) -> None:
    m, n, spec = case
    k, c, b = spec.output_blocks, spec.input_blocks, spec.rank
    factors = random_factors(seed, m, n, spec)
    right = torch.block_diag(*factors["right"])  # rows (r, β, k)
    left = torch.block_diag(*factors["weight"])  # rows (k, p), columns (k, r, β)
    inner = torch.arange(c * b * k).reshape(c * b, k).mT.flatten()
    outer = together(k, m // k).argsort()
    torch.testing.assert_close(Monarch.expand(factors), (left @ right[inner])[outer])


@pytest.mark.parametrize("p", [2, 3, 5, 8])
def test_a_discrete_fourier_transform_is_represented_exactly(p: int) -> None:
    """F[i, j] = ω^(i j) with n = p²: with its columns in the order of their last digit, every block is one product.

    For i = p i_1 + i_2 and j = j_1 + p j_2 it is ω^(p i_1 j_1) ω^(i_2 j_1) ω^(p i_2 j_2); p² i_1 j_2 are whole turns.
    As one complex matrix its blocks have rank 1; its real and its imaginary part have rank 2.
    """
    n = p * p
    turns = torch.outer(torch.arange(n), torch.arange(n)) % n
    digits = torch.arange(n).reshape(p, p).mT.flatten()  # columns (j_1, j_2)
    spec = Monarch.Spec(output_blocks=p, input_blocks=p, rank=min(2, p))
    for wave in (torch.cos, torch.sin):
        part = wave(2 * torch.pi * turns.to(torch.float64) / n)[:, digits]
        factors = Monarch.fit(part, spec)
        torch.testing.assert_close(Monarch.expand(factors), part, rtol=0, atol=1e-12 * n)
    fourier = torch.fft.fft(torch.eye(n, dtype=torch.complex128))[:, digits]
    for i in range(p):
        for j in range(p):
            values = torch.linalg.svdvals(fourier[i::p, j * p : (j + 1) * p])
            assert values[1:].max() <= 1e-12 * n
    # Through both products: a transform of real signals.
    x = normal(0, 4, n)
    expected = torch.fft.fft(x)
    parts = [wave(2 * torch.pi * turns.to(torch.float64) / n)[:, digits] for wave in (torch.cos, torch.sin)]
    found = [Monarch.multiply(Monarch.fit(part, spec), x[:, digits]) for part in parts]
    torch.testing.assert_close(torch.complex(found[0], -found[1]), expected, rtol=0, atol=1e-11 * n)


@given(case=cases(), seed=seeds)
@laws
def test_rows_are_those_of_the_matrix(case: Any, seed: int) -> None:
    m, n, spec = case
    factors = random_factors(seed, m, n, spec)
    indices = torch.tensor([[0, m - 1], [m // 2, 0]])
    torch.testing.assert_close(Monarch.rows(factors, indices), Monarch.expand(factors)[indices])


@given(case=cases())
@laws
def test_parameters_and_flops_have_closed_forms(case: Any) -> None:
    m, n, spec = case
    params = spec.rank * (spec.output_blocks * n + spec.input_blocks * m)
    assert Monarch.count_params(m, n, spec) == params
    assert Monarch.count_flops(m, n, spec) == 2 * params


def test_between_the_products_nothing_is_copied() -> None:
    x = torch.randn(5, 12)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        Monarch.multiply(random_factors_32(), x)
    names = [event.key for event in profile.key_averages()]
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::bmm"] == 2
    assert counts.get("aten::clone", 0) == 1, names  # the result's


def random_factors_32() -> dict[str, Tensor]:
    spec = Monarch.Spec(output_blocks=4, input_blocks=3, rank=2)
    return {name: factor.float() for name, factor in random_factors(0, 8, 12, spec).items()}


# ---- fits ----


@given(case=cases(), seed=seeds)
@laws
def test_the_error_is_what_every_block_discards(case: Any, seed: int) -> None:
    m, n, spec = case
    weight, k, width = normal(seed, m, n), spec.output_blocks, n // spec.input_blocks
    expected = sum(
        torch.linalg.svdvals(weight[i::k, j : j + width])[spec.rank :].square().sum().item()
        for i in range(k)
        for j in range(0, n, width)
    )
    assert error(weight, spec, Metric(), None) == pytest.approx(expected, rel=1e-9, abs=1e-18)


def test_one_block_on_each_side_is_low_rank() -> None:
    weight, metric = normal(0, 10, 7), Metric(moment(1, 7), moment(2, 10))
    spec = Monarch.Spec(output_blocks=1, input_blocks=1, rank=3)
    for each in (None, metric):
        low_rank = LowRank.expand(LowRank.fit(weight, LowRank.Spec(rank=3), each))
        torch.testing.assert_close(Monarch.expand(Monarch.fit(weight, spec, each)), low_rank, rtol=0, atol=1e-5)


@given(case=cases(), seed=seeds, coupled=st.booleans())
@laws
def test_without_coupling_between_blocks_the_fit_is_each_blocks_own_optimum(
    case: Any, seed: int, coupled: bool
) -> None:
    m, n, spec = case
    k, c, height, width = spec.output_blocks, spec.input_blocks, m // spec.output_blocks, n // spec.input_blocks
    weight = normal(seed, m, n)
    inputs, outputs = block_diagonal(seed + 1, c, width), block_diagonal(seed + 99, k, height)
    apart = together(k, height).argsort()
    metric = Metric(inputs, None if coupled else outputs[apart][:, apart])
    expected = 0.0
    for i in range(k):
        for j in range(c):
            columns = slice(j * width, (j + 1) * width)
            rows = slice(i * height, (i + 1) * height)
            local = Metric(inputs[columns, columns], None if coupled else outputs[rows, rows])
            block = weight[i::k, columns]
            best = LowRank.expand(LowRank.fit(block, LowRank.Spec(rank=spec.rank), local))
            expected += local.squared_norm(block - best)
    found = error(weight, spec, metric, metric)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6 * metric.squared_norm(weight))


@given(case=cases(), seed=seeds, sides=st.sampled_from(["input", "output", "both", "frequencies"]))
@laws
def test_the_alternation_never_rises_and_is_no_worse_than_the_plain_fit(case: Any, seed: int, sides: str) -> None:
    m, n, spec = case
    metric = {
        "input": Metric(moment(seed + 1, n)),
        "output": Metric(None, moment(seed + 2, m)),
        "both": Metric(moment(seed + 1, n), moment(seed + 2, m)),
        "frequencies": Metric(moment(seed + 1, n), normal(seed + 2, m).abs() + 1e-3),
    }[sides]
    weight = normal(seed, m, n)
    order = together(spec.output_blocks, m // spec.output_blocks)
    output = metric.output
    if output is not None:
        output = output[order] if output.ndim == 1 else output[order][:, order]
    sizes = spec.output_blocks, spec.input_blocks, spec.rank
    losses = alternate(weight[order], *sizes, Metric(metric.input, output), tolerance=0)[2]
    assert all(later <= earlier for earlier, later in pairwise(losses))
    slack = 1e-9 * metric.squared_norm(weight)
    assert error(weight, spec, metric, metric) <= error(weight, spec, metric, None) + slack


@given(case=cases(), seed=seeds, which=st.sampled_from(["weight", "right"]))
@settings(max_examples=8, deadline=None)
def test_changing_a_factor_of_a_fit_to_inputs_never_lowers_the_error(case: Any, seed: int, which: str) -> None:
    m, n, spec = case
    weight, metric = normal(seed, m, n), Metric(moment(seed + 1, n))
    sizes = spec.output_blocks, spec.input_blocks, spec.rank
    order = together(spec.output_blocks, m // spec.output_blocks)
    left, right, _ = alternate(weight[order], *sizes, metric, max_sweeps=500, tolerance=1e-9)
    factors = {"weight": left.transpose(1, 2).flatten(2), "right": right.permute(1, 2, 0, 3).flatten(1, 2)}
    least = metric.squared_norm(weight - Monarch.expand(factors))
    direction = normal(seed + 2, *factors[which].shape)
    for step in (1e-3, -1e-2, 1e-1):
        changed = {**factors, which: factors[which] + step * direction}
        assert metric.squared_norm(weight - Monarch.expand(changed)) >= least - 1e-6 * metric.squared_norm(weight)


@given(case=cases(), seed=seeds, rank=st.integers(1, 3))
@laws
def test_a_planted_matrix_is_found_in_any_metric_even_a_singular_one(case: Any, seed: int, rank: int) -> None:
    m, n, spec = case
    planted = Monarch.expand(random_factors(seed, m, n, spec))
    singular = normal(seed + 5, n, min(rank, n))
    for metric in (Metric(moment(seed + 1, n), moment(seed + 2, m)), Metric(singular @ singular.mT)):
        assert error(planted, spec, metric, metric) <= 1e-10 * metric.squared_norm(planted)
    torch.testing.assert_close(
        Monarch.expand(Monarch.fit(planted, spec)), planted, rtol=0, atol=1e-10 * (1 + planted.norm().item())
    )


def test_blocks_that_depend_on_one_another_are_fitted_together() -> None:
    """Two input blocks that always read the same: one makes up for what the other cannot represent."""
    half = normal(0, 50, 6)
    x = torch.cat([half, half], dim=1)
    weight, metric = normal(1, 8, 12), Metric(x.mT @ x / 50)
    spec = Monarch.Spec(output_blocks=2, input_blocks=2, rank=2)
    # What is read is W_1 + W_2, of rank 4 in each of the output blocks of four rows: nothing is left.
    order = together(2, 4)
    *_, losses = alternate(weight[order], 2, 2, 2, metric)
    assert losses[-1] <= 1e-6 * metric.squared_norm(weight)
    # A fit is damped by a thousandth, and leaves something of that.
    assert error(weight, spec, metric, metric) <= 1e-5 * metric.squared_norm(weight)
    assert error(weight, spec, metric, None) >= 0.05 * metric.squared_norm(weight)


def test_directions_that_inputs_hardly_take_stay_small() -> None:
    """Halves of the inputs that are all but equal: only their sum counts, and both halves went far out and back."""
    x = normal(1, 400, 24)
    scales = torch.logspace(0, -6, 12, dtype=torch.float64)
    x = torch.cat([x[:, :12] * scales, x[:, :12] + 1e-6 * x[:, 12:]], dim=1)
    spec, weight, metric = Monarch.Spec(output_blocks=2, input_blocks=4, rank=3), normal(0, 32, 24), Metric(x.mT @ x)
    left, right, _ = alternate(weight[together(2, 16)], 2, 4, 3, metric)
    found = Monarch.expand(Monarch.fit(weight, spec, metric))
    assert (left @ right).norm() > 50 * weight.norm()
    assert found.norm() < 5 * weight.norm()
    assert metric.squared_norm(weight - found) < 0.5 * error(weight, spec, metric, None)


# ---- choosing ----


def test_blocks_that_do_not_divide_are_refused_with_the_divisors() -> None:
    for fields, words in (
        ({"output_blocks": 5, "input_blocks": 2}, "output_blocks 5 does not divide out_features 12.*1, 2, 3, 4, 6, 12"),
        ({"output_blocks": 2, "input_blocks": 3}, "input_blocks 3 does not divide in_features 8.*1, 2, 4, 8"),
    ):
        with pytest.raises(RequestError, match=words):
            Monarch.factor_shapes(12, 8, Monarch.Spec(**fields))
        with pytest.raises(RequestError, match=words):
            Monarch.candidate_specs(12, 8, rank=1, **fields)
    with pytest.raises(RequestError, match=r"rank 4 with blocks of 3×4: at most 3"):
        Monarch.factor_shapes(12, 8, Monarch.Spec(output_blocks=4, input_blocks=2, rank=4))


def test_numbers_of_blocks_are_exchanged_for_a_wide_matrix() -> None:
    for shape, blocks in (((12, 8), (4, 2)), ((8, 12), (2, 4)), ((8, 8), (4, 2))):
        [spec] = Monarch.candidate_specs(*shape, output_blocks=4, input_blocks=2, rank=1)
        assert (spec.output_blocks, spec.input_blocks) == blocks


def test_low_rank_and_blocks_of_one_row_are_no_candidates_unless_asked_for() -> None:
    found = {(spec.output_blocks, spec.input_blocks) for spec in Monarch.candidate_specs(12, 8, rank=1)}
    assert found == {(k, c) for k in (1, 2, 3, 4, 6) for c in (1, 2, 4)} - {(1, 1)}
    assert Monarch.candidate_specs(12, 8, output_blocks=1, input_blocks=1, rank=1)
    assert Monarch.candidate_specs(12, 8, output_blocks=12, input_blocks=1, rank=1)


@pytest.mark.parametrize("inputs", [False, True])
def test_what_is_screened_as_exact_is_the_error_of_the_fit(inputs: bool) -> None:
    weight, metric = normal(0, 8, 12), Metric(moment(1, 12) if inputs else None, normal(2, 8).abs() + 0.1)
    screened = Monarch.screen(weight, metric)
    # Of the inputs only the correlations between different input blocks are in the way.
    assert {spec.input_blocks for spec, _, is_exact in screened if is_exact} == ({1} if inputs else {1, 2, 4})
    for spec, estimate, is_exact in screened:
        if is_exact:
            found = error(weight, spec, metric, metric)
            assert estimate == pytest.approx(found, rel=1e-4, abs=1e-6 * metric.squared_norm(weight))
