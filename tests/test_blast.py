"""BLAST: which structures are cases of it, that its steps are optima, and what its alternation finds again."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from samples.matrices import normal
from torch import Tensor

import kronpress as kp
from kronpress import RequestError, WorkError
from kronpress.matrices import Blast, LowRank
from kronpress.matrices.blast import DAMPING, alternate, blocks_start, low_rank_start
from kronpress.matrices.metric import Metric, damped

laws = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**32)
SIDES = ("none", "input", "output", "both", "frequencies", "blocks")
every_metric = pytest.mark.parametrize("sides", SIDES)
Parts = tuple[Tensor, Tensor, Tensor]


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, int, Any]:
    """A shape (m, n) and a spec that fits it."""
    k, c, height, width = (draw(st.integers(1, 4)) for _ in range(4))
    rank = draw(st.integers(1, min(k * height, c * width)))
    return k * height, c * width, Blast.Spec(row_blocks=k, column_blocks=c, rank=rank)


def random_factors(seed: int, m: int, n: int, spec: Any) -> dict[str, Tensor]:
    shapes = Blast.factor_shapes(m, n, spec)
    return {name: normal(seed + i, *shape) for i, (name, shape) in enumerate(shapes.items())}


def moment(seed: int, size: int) -> Tensor:
    x = normal(seed, 3 * size, size) * torch.logspace(0, -1, size, dtype=torch.float64)
    mix = torch.linalg.qr(normal(seed + 1, size, size)).Q
    return mix @ (x.mT @ x) @ mix.mT / (3 * size)


def metric_of(sides: str, seed: int, m: int, n: int, spec: Any) -> Metric:
    """None, C, G, both, C with a diagonal G, or both without entries between different blocks."""

    def blocks(seed: int, size: int, count: int) -> Tensor:
        return torch.block_diag(*(moment(seed + i, size // count) for i in range(count)))

    return {
        "none": lambda: Metric(),
        "input": lambda: Metric(moment(seed, n)),
        "output": lambda: Metric(None, moment(seed + 9, m)),
        "both": lambda: Metric(moment(seed, n), moment(seed + 9, m)),
        "frequencies": lambda: Metric(moment(seed, n), normal(seed + 9, m).abs() + 0.1),
        "blocks": lambda: Metric(blocks(seed, n, spec.column_blocks), blocks(seed + 99, m, spec.row_blocks)),
    }[sides]()


def error(weight: Tensor, factors: dict[str, Tensor], metric: Metric) -> float:
    return metric.squared_norm(weight - Blast.expand(factors))


def named(parts: Parts) -> dict[str, Tensor]:
    return dict(zip(("weight", "middle", "right"), parts, strict=True))


# ---- what it is ----


@given(case=cases(), seed=seeds)
@laws
def test_every_block_is_a_product_with_a_diagonal_in_the_middle(case: Any, seed: int) -> None:
    m, n, spec = case
    factors = random_factors(seed, m, n, spec)
    u, s, v = factors["weight"], factors["middle"], factors["right"]
    rows = [
        torch.cat([u[i] @ torch.diag(s[i, j]) @ v[j] for j in range(spec.column_blocks)], 1)
        for i in range(spec.row_blocks)
    ]
    torch.testing.assert_close(Blast.expand(factors), torch.cat(rows))


@given(case=cases())
@laws
def test_parameters_and_flops_have_closed_forms(case: Any) -> None:
    m, n, spec = case
    params = spec.rank * (m + n + spec.row_blocks * spec.column_blocks)
    assert Blast.count_params(m, n, spec) == params
    assert Blast.count_flops(m, n, spec) == 2 * params


@given(case=cases(), seed=seeds)
@laws
def test_rows_are_those_of_the_matrix(case: Any, seed: int) -> None:
    m, n, spec = case
    factors = random_factors(seed, m, n, spec)
    indices = torch.tensor([[0, m - 1], [m // 2, 0]])
    torch.testing.assert_close(Blast.rows(factors, indices), Blast.expand(factors)[indices])


def test_low_rank_is_the_case_of_equal_middles() -> None:
    u, v = normal(0, 12, 3), normal(1, 3, 8)
    for k, c in ((1, 1), (4, 2), (12, 8)):
        parts = u.view(k, 12 // k, 3), torch.ones(k, c, 3, dtype=u.dtype), v.view(3, c, 8 // c).transpose(0, 1)
        torch.testing.assert_close(Blast.expand(named(parts)), u @ v)


def test_a_block_diagonal_matrix_is_the_case_of_one_middle_in_each_row() -> None:
    """V_iᵀ = W_ii and U_i = 1: the rank is the blocks' height, or with Wᵀ their width."""
    blocks = normal(0, 3, 4, 5)
    ones = torch.eye(4, dtype=blocks.dtype).expand(3, 4, 4)
    middle = torch.eye(3, dtype=blocks.dtype)[..., None].expand(3, 3, 4)
    torch.testing.assert_close(Blast.expand(named((ones, middle, blocks))), torch.block_diag(*blocks))


@pytest.mark.parametrize(("k", "c"), [(3, 3), (4, 2), (2, 4)])
def test_blocks_of_rank_b_of_their_own_are_a_case_of_as_many_times_b_as_there_are_blocks_on_the_longer_side(
    k: int, c: int
) -> None:
    b, groups = 2, max(k, c)
    left, right = normal(0, k, c, 4, b), normal(1, k, c, b, 5)
    u, s, v = torch.zeros(k, 4, groups * b), torch.zeros(k, c, groups * b), torch.zeros(c, groups * b, 5)
    u, s, v = u.double(), s.double(), v.double()
    for i, j in product(range(k), range(c)):
        own = slice((i + j) % groups * b, ((i + j) % groups + 1) * b)
        u[i, :, own], s[i, j, own], v[j, own] = left[i, j], 1, right[i, j]
    expected = (left @ right).transpose(1, 2).reshape(k * 4, c * 5)
    torch.testing.assert_close(Blast.expand({"weight": u, "middle": s, "right": v}), expected)
    # And the fit finds such a matrix again.
    spec = Blast.Spec(row_blocks=k, column_blocks=c, rank=groups * b)
    torch.testing.assert_close(Blast.expand(Blast.fit(expected, spec)), expected, rtol=0, atol=1e-10)


# ---- fits ----


@every_metric
@given(case=cases(), seed=seeds)
@laws
def test_the_alternation_never_rises_from_any_start(sides: str, case: Any, seed: int) -> None:
    m, n, spec = case
    weight, metric = normal(seed, m, n), metric_of(sides, seed + 5, m, n, spec)
    start = tuple(random_factors(seed + 1, m, n, spec).values())
    *parts, losses = alternate(weight, *start, metric, tolerance=0)
    assert all(later <= earlier for earlier, later in pairwise(losses))
    assert losses[0] == pytest.approx(error(weight, named(start), metric))
    assert losses[-1] == pytest.approx(error(weight, named(tuple(parts)), metric), abs=1e-9 * losses[0])


@every_metric
@given(case=cases(), seed=seeds)
@laws
def test_it_is_no_worse_than_low_rank_and_than_blocks_alone(sides: str, case: Any, seed: int) -> None:
    m, n, spec = case
    weight, given = normal(seed, m, n), metric_of(sides, seed + 5, m, n, spec)
    found = error(weight, Blast.fit(weight, spec, given), metric := damped(given, DAMPING))
    low_rank = LowRank.expand(LowRank.fit(weight, LowRank.Spec(rank=spec.rank), metric))
    slack = 1e-9 * metric.squared_norm(weight)
    assert found <= metric.squared_norm(weight - low_rank) + slack
    assert found <= error(weight, named(blocks_start(weight, spec, metric)), metric) + slack


@pytest.mark.parametrize("which", ["weight", "right", "middle"])
@every_metric
def test_a_sweep_ends_where_no_middle_and_stays_where_no_factor_could_lower_the_error(sides: str, which: str) -> None:
    """By the gradient of the quadratic forms, which the steps do not use."""
    spec = Blast.Spec(row_blocks=3, column_blocks=2, rank=3)
    weight, metric = normal(0, 12, 10), metric_of(sides, 7, 12, 10, spec)
    parts = low_rank_start(weight, spec, metric)
    *parts, _ = alternate(weight, *parts, metric, max_sweeps=3000, tolerance=1e-13)
    factors = {name: each.clone().requires_grad_() for name, each in named(tuple(parts)).items()}
    input = torch.eye(10, dtype=weight.dtype) if metric.input is None else metric.input
    output = torch.eye(12, dtype=weight.dtype) if metric.output is None else metric.output
    output = torch.diag(output) if output.ndim == 1 else output
    difference = weight - Blast.expand(factors)
    loss = (output @ difference @ input * difference).sum()
    [gradient] = torch.autograd.grad(loss, [factors[which]])
    size = metric.squared_norm(weight)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=2e-4 * size)
    for seed, step in product(range(3), (1e-4, 1e-2, -1e-1)):
        changed = {**factors, which: factors[which] + step * normal(seed, *factors[which].shape)}
        assert error(weight, changed, metric) >= loss.item() - 1e-7 * size


@every_metric
@given(case=cases(), seed=seeds)
@laws
def test_a_middle_alone_is_fitted_at_once(sides: str, case: Any, seed: int) -> None:
    """With U and V as planted, orthonormal, and another s: one sweep would change U first, so all of W is compared."""
    m, n, spec = case
    planted = random_factors(seed, m, n, spec)
    weight, metric = Blast.expand(planted), metric_of(sides, seed + 5, m, n, spec)
    same = tuple(planted.values())
    *parts, losses = alternate(weight, *same, metric)
    torch.testing.assert_close(Blast.expand(named(tuple(parts))), weight)
    assert losses == [0.0] or losses[-1] <= 1e-20 * metric.squared_norm(weight)


@every_metric
@given(case=cases(), seed=seeds)
@laws
def test_a_low_rank_matrix_is_found_exactly(sides: str, case: Any, seed: int) -> None:
    m, n, spec = case
    weight = normal(seed, m, spec.rank) @ normal(seed + 1, spec.rank, n)
    metric = metric_of(sides, seed + 5, m, n, spec)
    assert error(weight, Blast.fit(weight, spec, metric), metric) <= 1e-12 * metric.squared_norm(weight)
    found = Blast.expand(Blast.fit(weight, spec))
    torch.testing.assert_close(found, weight, rtol=0, atol=1e-10 * (1 + weight.norm().item()))


def test_a_block_diagonal_matrix_is_found_exactly() -> None:
    for height, width in ((6, 4), (4, 6)):
        weight = torch.block_diag(*normal(0, 4, height, width))
        spec = Blast.Spec(row_blocks=4, column_blocks=4, rank=4)
        torch.testing.assert_close(Blast.expand(Blast.fit(weight, spec)), weight, rtol=0, atol=1e-10)
        low_rank = LowRank.expand(LowRank.fit(weight, LowRank.Spec(rank=4)))
        assert (weight - low_rank).square().sum() > 0.3 * weight.square().sum()


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_matrix_is_found_exactly_from_near_it(seed: int) -> None:
    spec = Blast.Spec(row_blocks=3, column_blocks=4, rank=3)
    planted = random_factors(10 * seed, 18, 24, spec)
    near = [each + 0.05 * normal(seed + i, *each.shape) for i, each in enumerate(planted.values())]
    weight = Blast.expand(planted)
    *parts, _ = alternate(weight, *near, Metric(), max_sweeps=2000, tolerance=0)
    torch.testing.assert_close(Blast.expand(named(tuple(parts))), weight, rtol=0, atol=1e-10 * weight.norm().item())


@given(case=cases(), seed=seeds)
@laws
def test_from_the_fit_of_a_lower_rank_a_higher_one_is_never_worse(case: Any, seed: int) -> None:
    m, n, spec = case
    weight, metric = normal(seed, m, n), Metric(moment(seed + 1, n))
    lower = Blast.fit(weight, spec, metric)
    widened = [torch.nn.functional.pad(each, (0, 1)) for each in (lower["weight"], lower["middle"])]
    widened.append(torch.nn.functional.pad(lower["right"], (0, 0, 0, 1)))
    losses = alternate(weight, *widened, metric)[-1]
    assert losses[-1] <= error(weight, lower, metric) * (1 + 1e-9)


def test_terms_are_balanced() -> None:
    spec = Blast.Spec(row_blocks=2, column_blocks=3, rank=4)
    factors = Blast.fit(normal(0, 10, 12), spec)
    torch.testing.assert_close(factors["weight"].square().sum((0, 1)), factors["right"].square().sum((0, 2)))
    torch.testing.assert_close(factors["middle"].square().mean((0, 1)), torch.ones(4, dtype=torch.float64))


def test_a_fit_to_inputs_captures_more_of_them_than_one_that_is_not() -> None:
    spec, metric = Blast.Spec(row_blocks=4, column_blocks=3, rank=4), Metric(moment(1, 18), moment(2, 20))
    weight = normal(0, 20, 18)
    plain, seen = (error(weight, Blast.fit(weight, spec, each), metric) for each in (None, metric))
    assert seen < 0.9 * plain


def test_a_metric_of_single_precision_with_eigenvalues_below_zero_gives_a_fit() -> None:
    """Along such a direction the loss falls without end, and an alternation that went there found infinity."""
    spec, weight = Blast.Spec(row_blocks=2, column_blocks=2, rank=2), normal(0, 8, 8)
    x = normal(1, 3, 8)
    second = x.mT @ x
    below = second - 3e-8 * second.diagonal().max() * torch.eye(8, dtype=weight.dtype)
    assert torch.linalg.eigvalsh(below)[0] < 0
    for metric in (Metric(below), Metric(second, below), Metric(None, below)):
        found = Blast.expand(Blast.fit(weight, spec, metric))
        assert metric.squared_norm(weight - found) < 0.8 * metric.squared_norm(weight)
        assert found.norm() < 10 * weight.norm()


def test_directions_that_inputs_hardly_take_stay_small() -> None:
    spec, weight = Blast.Spec(row_blocks=4, column_blocks=4, rank=8), normal(0, 32, 24)
    scales = torch.ones(24, dtype=torch.float64)
    scales[::3] = 1e-6
    x = normal(1, 100, 24) * scales
    metric = Metric(x.mT @ x / 100)
    start = low_rank_start(weight, spec, metric)
    free = Blast.expand(named(alternate(weight, *start, metric)[:3]))
    found = Blast.expand(Blast.fit(weight, spec, metric))
    assert free.norm() > 100 * weight.norm()
    assert found.norm() < 3 * weight.norm()
    # What that costs where inputs are: a third of the columns were free.
    assert metric.squared_norm(weight - found) < 1.1 * metric.squared_norm(weight - free)


def test_a_metric_that_is_none_is_refused() -> None:
    with pytest.raises(WorkError, match="the moments are not positive semi-definite"):
        Blast.fit(normal(0, 8, 8), Blast.Spec(row_blocks=2, column_blocks=2, rank=2), -moment(1, 8))


# ---- choosing ----


def test_sizes_that_do_not_fit_are_refused_with_what_is_allowed() -> None:
    for fields, words in (
        ({"row_blocks": 5, "column_blocks": 2}, "row_blocks 5 does not divide out_features 12.*1, 2, 3, 4, 6, 12"),
        ({"row_blocks": 2, "column_blocks": 3}, "column_blocks 3 does not divide in_features 8.*1, 2, 4, 8"),
    ):
        with pytest.raises(RequestError, match=words):
            Blast.factor_shapes(12, 8, Blast.Spec(**fields))
        with pytest.raises(RequestError, match=words):
            Blast.candidate_specs(12, 8, rank=1, **fields)
    with pytest.raises(RequestError, match="rank 9 for a 12×8 matrix: 8 already represents"):
        Blast.factor_shapes(12, 8, Blast.Spec(row_blocks=2, column_blocks=2, rank=9))


def test_numbers_of_blocks_are_exchanged_for_a_wide_matrix() -> None:
    for shape, blocks in (((12, 8), (4, 2)), ((8, 12), (2, 4)), ((8, 8), (4, 2))):
        [spec] = Blast.candidate_specs(*shape, row_blocks=4, column_blocks=2, rank=1)
        assert (spec.row_blocks, spec.column_blocks) == blocks


def test_one_block_on_a_side_is_no_candidate_unless_asked_for() -> None:
    found = {(spec.row_blocks, spec.column_blocks) for spec in Blast.candidate_specs(12, 8, rank=1)}
    assert found == set(product((2, 3, 4, 6, 12), (2, 4, 8)))
    assert Blast.candidate_specs(12, 8, row_blocks=1, column_blocks=1, rank=1)


def test_what_is_screened_and_estimated_is_below_low_rank_and_about_what_the_fit_leaves() -> None:
    weight, metric = normal(0, 16, 24), Metric(moment(1, 24), moment(2, 16))
    low_rank = {spec.rank: each for spec, each, _ in LowRank.screen(weight, metric)}
    screened = Blast.screen(weight, metric)
    assert {spec.row_blocks for spec, *_ in screened} == {2, 4, 8}
    for spec, estimate, is_exact in screened:
        assert not is_exact and Blast.count_params(16, 24, spec) < weight.numel()
        assert estimate <= low_rank[spec.rank]
        closer = Blast.estimate(weight, spec, metric)
        assert closer <= estimate * (1 + 1e-6) + 1e-9 * metric.squared_norm(weight)


def test_a_measured_allocation_takes_it_where_it_is_best(tiny_model: Any) -> None:
    """Blocks that are products of their own are BLAST exactly, and no low rank or Kronecker sum of that size."""
    model, planted = tiny_model("gpt2"), []
    for name, module in model.named_modules():
        if name.endswith(("mlp.c_fc", "mlp.c_proj")):
            seed, (n, m) = 2 * len(planted), module.weight.shape
            blocks = normal(seed, 4, 4, m // 4, 1) @ normal(seed + 1, 4, 4, 1, n // 4)
            weight = blocks.transpose(1, 2).reshape(m, n)
            module.weight.data = weight.mT.to(module.weight.dtype).contiguous()
            planted.append(name)
    recipe = {
        "structure": "auto",
        "candidates": ["low_rank", "kronecker", "blast"],
        "allocation": "measured",
        "targets": "mlp",
        "weighting": {"metric": "input"},
        "budget": {"kept_of_targets": 0.375},  # 4 · (16 + 64 + 16) of 16 · 64,
    }
    windows = torch.randint(0, model.config.vocab_size, (8, 16), generator=torch.Generator().manual_seed(0))
    loaded = kp.load_recipe(recipe)
    plan = kp.make_plan(model, loaded, kp.calibrate(model, [windows], loaded))
    assert planted == list(plan.layers)
    for layer in plan.layers.values():
        assert (layer.structure, layer.spec) == ("blast", Blast.Spec(row_blocks=4, column_blocks=4, rank=4))
        assert layer.predicted_rise == pytest.approx(0, abs=1e-6)
