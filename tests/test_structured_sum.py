"""Sums of structures and selected lines: planted sums are found, the loss never rises, no part alone is better."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from samples.matrices import normal
from torch import Tensor
from transformers import GPT2Config

import kronpress as kp
from kronpress import RequestError
from kronpress.matrices import STRUCTURES, Selected, StructuredSum
from kronpress.matrices.metric import Metric
from kronpress.matrices.structured_sum import divided, fitted_parts

laws = settings(max_examples=8, deadline=None)
seeds = st.integers(0, 2**32)
SHAPE = 12, 8
PARTS: dict[str, dict[str, Any]] = {
    "kronecker": {"left_shape": (6, 2), "right_shape": (2, 4)},
    "low_rank": {"rank": 1},
    "monarch": {"output_blocks": 2, "input_blocks": 2, "rank": 1},
    "rows": {"lines": "rows", "count": 2},
    "columns": {"lines": "columns", "count": 1},
    "permuted_kronecker": {"left_shape": (6, 2), "right_shape": (2, 4)},
}
some_parts = st.lists(st.sampled_from(sorted(PARTS)), min_size=2, max_size=3, unique=True)


def sum_of(*names: str) -> Any:
    structures = {"rows": "selected", "columns": "selected"}
    return StructuredSum.Spec(parts=[{"structure": structures.get(name, name), "spec": PARTS[name]} for name in names])


def moment(seed: int, size: int) -> Tensor:
    x = normal(seed, 3 * size, size) * torch.logspace(0, -1, size, dtype=torch.float64)
    return x.mT @ x / (3 * size)


def metric_of(seed: int, kind: str) -> Metric | None:
    m, n = SHAPE
    return {
        "none": None,
        "input": Metric(moment(seed, n)),
        "loss": Metric(moment(seed, n), moment(seed + 1, m)),
    }[kind]


def error(difference: Tensor, metric: Metric | None) -> float:
    return (metric or Metric()).squared_norm(difference)


every_metric = pytest.mark.parametrize("kind", ["none", "input", "loss"])


@every_metric
@given(names=some_parts, seed=seeds)
@laws
def test_the_loss_never_rises_and_no_part_alone_is_better(kind: str, names: list[str], seed: int) -> None:
    weight, spec, metric = normal(seed, *SHAPE), sum_of(*names), metric_of(seed + 5, kind)
    parts, losses = fitted_parts(weight, spec, metric, max_sweeps=3, tolerance=0)
    slack = 1e-9 * error(weight, metric)
    assert all(later <= earlier + slack for earlier, later in pairwise(losses))
    fitted = sum(STRUCTURES[part.structure].expand(own) for part, own in zip(spec.parts, parts, strict=True))
    assert error(weight - fitted, metric) == pytest.approx(losses[-1], rel=1e-6, abs=slack)
    for part in spec.parts:
        structure = STRUCTURES[part.structure]
        alone = error(weight - structure.expand(structure.fit(weight, part.spec, metric)), metric)
        assert losses[-1] <= alone + slack
    whole = StructuredSum.expand(StructuredSum.fit(weight, spec, metric))
    assert error(weight - whole, metric) <= losses[0] + slack


@pytest.mark.parametrize(
    "names", [("kronecker", "low_rank"), ("low_rank", "rows"), ("kronecker", "columns"), ("monarch", "rows")]
)
@pytest.mark.parametrize("seed", range(3))
def test_a_planted_sum_is_recovered(names: tuple[str, str], seed: int) -> None:
    """Of a first part that is 20 times the second: its own fit then begins near the truth."""
    weight = torch.zeros(48, 32, dtype=torch.float64)
    parts = []
    for number, name in enumerate(names):
        sizes = {"kronecker": {"left_shape": (12, 8), "right_shape": (4, 4)}}.get(name, PARTS[name])
        structure = STRUCTURES["selected" if name in ("rows", "columns") else name]
        spec = structure.Spec(**sizes)
        shapes = structure.factor_shapes(48, 32, spec)
        factors = {key: normal(seed + 10 * number + i, *shape) for i, (key, shape) in enumerate(shapes.items())}
        orders = {key: torch.arange(size) for key, size in structure.order_sizes(48, 32, spec).items()}
        part = structure.expand({**factors, **orders})
        weight += part / part.norm() * (1 if number else 20)
        parts.append({"structure": "selected" if name in ("rows", "columns") else name, "spec": spec})
    spec = StructuredSum.Spec(parts=parts)
    _, losses = fitted_parts(weight, spec, None, max_sweeps=2000, tolerance=1e-12)
    assert losses[-1] <= 1e-16 * weight.square().sum().item()


@every_metric
@pytest.mark.parametrize(
    "names", [("kronecker", "low_rank"), ("low_rank", "rows"), ("kronecker", "low_rank", "columns")]
)
def test_at_the_fixed_point_no_factor_can_be_changed_for_the_better(kind: str, names: tuple[str, ...]) -> None:
    weight, spec, metric = normal(0, *SHAPE), sum_of(*names), metric_of(3, kind)
    parts, losses = fitted_parts(weight, spec, metric, max_sweeps=3000, tolerance=1e-15)
    dense = [STRUCTURES[part.structure].expand(own) for part, own in zip(spec.parts, parts, strict=True)]
    # A Kronecker sum's own fit in a metric is a local optimum, of which the alternation keeps what it cannot better.
    slack = 1e-7 if metric is None else 2e-2
    for number, (part, own) in enumerate(zip(spec.parts, parts, strict=True)):
        rest = sum(each for other, each in enumerate(dense) if other != number)
        for seed, (name, factor) in enumerate(own.items()):
            if factor.is_floating_point():
                direction = normal(seed, *factor.shape)
                for step in (1e-2, -1e-2, 1e-1, -1e-1):
                    changed = STRUCTURES[part.structure].expand({**own, name: factor + step * direction})
                    assert error(weight - rest - changed, metric) >= losses[-1] * (1 - slack)


@given(names=some_parts, seed=seeds)
@laws
def test_names_say_which_part_a_factor_belongs_to(names: list[str], seed: int) -> None:
    spec, weight = sum_of(*names), normal(seed, *SHAPE)
    factors = StructuredSum.fit(weight, spec)
    assert [structure for structure, _ in divided(factors)] == [part.structure for part in spec.parts]
    shuffled = dict(sorted(factors.items(), reverse=True))
    for (_, own), part in zip(divided(shuffled), spec.parts, strict=True):
        structure = STRUCTURES[part.structure]
        assert set(own) == {*structure.factor_shapes(*SHAPE, part.spec), *structure.order_sizes(*SHAPE, part.spec)}
    x = normal(seed + 1, 3, SHAPE[1])
    torch.testing.assert_close(StructuredSum.multiply(factors, x), x @ StructuredSum.expand(factors).mT)


def test_the_budget_is_split_as_said_and_what_a_part_leaves_goes_to_the_next() -> None:
    sizes = [
        {"structure": "kronecker", "spec": {"right_shape": (4, 4)}, "share": 0.25},
        {"structure": "selected", "spec": {"lines": "columns", "count": 1}, "share": 0.25},
        {"structure": "low_rank"},
    ]
    (spec,) = StructuredSum.candidate_specs(96, 48, 2000, sizes=sizes)
    kronecker, selected, low_rank = (each.spec for each in spec.parts)
    assert kronecker.num_terms == 500 // (24 * 12 + 16)
    assert selected.count == 1
    assert low_rank.rank == (2000 - 304 - 96) // 144
    assert StructuredSum.count_params(96, 48, spec) <= 2000


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ([{"structure": "low_rank"}], "two parts or more"),
        ([{"structure": "low_rank"}, {"structure": "nothing"}], "unknown structure 'nothing'"),
        ([{"structure": "low_rank"}, {"structure": "structured_sum"}], "no part of a sum"),
        ([{"structure": "low_rank", "share": 0.7}, {"structure": "kronecker", "share": 0.6}], r"add up to 1\.3"),
    ],
)
def test_wrong_parts_are_refused(sizes: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        StructuredSum.candidate_specs(12, 8, 90, sizes=sizes)


def test_the_recipe_plans_gpt2_within_its_budget() -> None:
    plan = kp.make_plan(GPT2Config(), kp.load_recipe("kronecker-plus-low-rank"))
    assert 0.49 < plan.kept_of_targets <= 0.5
    assert {layer.spec.parts[0].structure for layer in plan.layers.values()} == {"kronecker"}


# ---- selected lines ----


@every_metric
@given(lines=st.sampled_from(["rows", "columns"]), count=st.integers(1, 6), seed=seeds)
@laws
def test_entries_of_chosen_lines_are_the_best(kind: str, lines: Any, count: int, seed: int) -> None:
    weight, metric = normal(seed, *SHAPE), metric_of(seed + 1, kind)
    factors = Selected.fit(weight, Selected.Spec(lines=lines, count=count), metric)
    entries = factors["weight"].requires_grad_()
    difference = weight - Selected.expand({**factors, "weight": entries})
    c, g = (None, None) if metric is None else (metric.input, metric.output)
    right = difference if c is None else difference @ c
    loss = ((difference if g is None else g @ difference) * right).sum()
    (gradient,) = torch.autograd.grad(loss, entries)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6 * error(weight, metric))


@given(count=st.integers(1, 3), seed=seeds)
@laws
def test_chosen_rows_are_the_best_of_all_in_the_metric_of_inputs(count: int, seed: int) -> None:
    weight, metric = normal(seed, 5, 8), Metric(moment(seed + 1, 8))
    fitted = Selected.expand(Selected.fit(weight, Selected.Spec(lines="rows", count=count), metric))
    best = min(
        metric.squared_norm(weight * (1 - torch.isin(torch.arange(5), rows).double())[:, None])
        for rows in torch.combinations(torch.arange(5), count)
    )
    assert metric.squared_norm(weight - fitted) == pytest.approx(best, rel=1e-9)
