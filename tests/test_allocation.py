"""The allocation is within the budget, near the brute-force optimum, and its bound is a bound."""

from __future__ import annotations

from itertools import product

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, given, settings

from kronpress import RequestError
from kronpress.allocation import allocate, least_params


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[str, list[int]], dict[str, list[float]], int]:
    counts = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    sizes = {f"m{i}": draw(st.lists(st.integers(1, 50), min_size=c, max_size=c)) for i, c in enumerate(counts)}
    costs = {
        name: draw(st.lists(st.floats(0, 10), min_size=len(each), max_size=len(each))) for name, each in sizes.items()
    }
    least, most = (sum(map(pick, sizes.values())) for pick in (min, max))
    return sizes, costs, draw(st.integers(least, most))


@given(problem=problems())
@settings(max_examples=300, deadline=None)
def test_against_every_choice(problem):
    sizes, costs, budget = problem
    found = allocate(sizes, costs, budget)
    assert found.num_params == sum(sizes[name][index] for name, index in found.chosen.items()) <= budget
    assert found.error == pytest.approx(sum(costs[name][index] for name, index in found.chosen.items()))
    choices = [
        dict(zip(sizes, places, strict=True)) for places in product(*(range(len(each)) for each in sizes.values()))
    ]
    within = [c for c in choices if sum(sizes[name][index] for name, index in c.items()) <= budget]
    optimum = min(sum(costs[name][index] for name, index in c.items()) for c in within)
    assert found.lower_bound <= optimum + 1e-9
    assert optimum <= found.error + 1e-9
    # What the Lagrangian can miss is less than what one matrix can gain.
    assert found.error - optimum <= max(max(each) - min(each) for each in costs.values()) + 1e-9


@given(seed=st.integers(0, 2**32), count=st.integers(10, 40), fraction=st.floats(0.05, 0.95))
@settings(max_examples=30, deadline=None)
def test_where_every_rank_gains_less_than_the_last_at_most_one_rank_is_missed(seed, count, fraction):
    generator = np.random.default_rng(seed)
    sizes, costs = {}, {}
    for i in range(count):
        energies = np.sort(generator.exponential(size=100))[::-1] * generator.exponential()
        sizes[str(i)] = [20 * rank for rank in range(1, 101)]
        costs[str(i)] = list(energies.sum() - energies.cumsum())
    found = allocate(sizes, costs, int(fraction * count * 2000) + 20 * count)
    # The budget can be short of one more rank, and no rank that is left gains more than the largest of these.
    next_gains = [
        each[at] - each[min(at + 1, 99)] for each, at in ((costs[name], i) for name, i in found.chosen.items())
    ]
    assert -1e-9 <= found.error - found.lower_bound <= max(next_gains) * (1 + 1e-6) + 1e-9
    assert found.gap == pytest.approx(max(0, found.error - found.lower_bound) / found.error)


def test_all_the_budget_that_helps_is_used():
    found = allocate({"a": [1, 2, 9]}, {"a": [3.0, 1.0, 1.0]}, budget=100)
    assert (found.chosen, found.num_params, found.gap) == ({"a": 1}, 2, 0.0)


def test_a_budget_below_the_smallest_is_refused():
    with pytest.raises(RequestError, match="leaves 2 parameters; the smallest candidates have 3"):
        allocate({"a": [1, 5], "b": [2]}, {"a": [0.0, 0.0], "b": [0.0]}, budget=2)


@given(problem=problems(), data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_known_choice_is_never_left_for_a_worse_one(problem, data):
    sizes, costs, budget = problem
    places = {name: data.draw(st.integers(0, len(each) - 1), label=name) for name, each in sizes.items()}
    assume(sum(sizes[name][place] for name, place in places.items()) <= budget)
    before, found = dict(places), allocate(sizes, costs, budget, known=places)
    assert places == before
    assert found.num_params == sum(sizes[name][index] for name, index in found.chosen.items()) <= budget
    assert found.error <= float(sum(costs[name][place] for name, place in places.items()))
    assert found.error <= allocate(sizes, costs, budget).error
    assert found.lower_bound <= found.error + 1e-9


@st.composite
def problems_with_groups(draw: st.DrawFn) -> tuple[dict[str, list[int]], dict[str, list[float]], dict[str, list[str]]]:
    sizes, costs, _ = draw(problems())
    names = draw(st.permutations(list(sizes)))
    cut = draw(st.integers(0, len(names)))
    groups = {f"g{i}": part for i, part in enumerate((names[:cut], names[cut:])) if part}
    for group in groups:
        count = draw(st.integers(0, 4))
        sizes[group] = draw(st.lists(st.integers(1, 80), min_size=count, max_size=count))
        costs[group] = draw(st.lists(st.floats(0, 20), min_size=count, max_size=count))
    return sizes, costs, groups


def every_choice(sizes: dict[str, list[int]], groups: dict[str, list[str]]) -> list[dict[str, int]]:
    """Of each group either one of its candidates or one of each of its members'."""
    in_groups = {name for names in groups.values() for name in names}
    parts = [[[name]] for name in sizes if name not in in_groups and name not in groups]
    parts += [[names, [group]] for group, names in groups.items()]
    return [
        dict(zip(names, places, strict=True))
        for taken in product(*parts)
        for names in [[name for part in taken for name in part]]
        for places in product(*(range(len(sizes[name])) for name in names))
    ]


@given(problem=problems_with_groups(), data=st.data())
@settings(max_examples=300, deadline=None)
def test_groups_against_every_choice(problem, data):
    sizes, costs, groups = problem
    choices = every_choice(sizes, groups)

    def total(choice: dict[str, int], of: dict[str, list[float]] | dict[str, list[int]]) -> float:
        return sum(of[name][place] for name, place in choice.items())

    totals = sorted(int(total(choice, sizes)) for choice in choices)
    assert least_params(sizes, groups) == totals[0]
    budget = data.draw(st.integers(totals[0], totals[-1]), label="budget")
    within = [choice for choice in choices if total(choice, sizes) <= budget]
    known = data.draw(st.sampled_from(within), label="known")
    optimum = min(total(choice, costs) for choice in within)
    for start in (None, known):
        found = allocate(sizes, costs, budget, start, groups)
        assert found.chosen in choices
        assert found.num_params == total(found.chosen, sizes) <= budget
        assert found.error == pytest.approx(total(found.chosen, costs))
        assert found.lower_bound <= optimum + 1e-9 <= found.error + 2e-9
    assert found.error <= total(known, costs)


def test_a_group_takes_the_place_of_its_members():
    sizes, costs = {"a": [4, 1], "b": [4, 1], "both": [3]}, {"a": [0.0, 5.0], "b": [0.0, 5.0], "both": [1.0]}
    groups = {"both": ["a", "b"]}
    assert allocate(sizes, costs, 4, None, groups).chosen == {"both": 0}
    assert allocate(sizes, costs, 8, None, groups).chosen == {"a": 0, "b": 0}
    assert allocate(sizes, costs, 2, None, groups).chosen == {"a": 1, "b": 1}
    # From the members, when the group is found to be within what is left.
    assert allocate(sizes, costs, 4, {"a": 1, "b": 1}, groups).chosen == {"both": 0}


@given(problem=problems(), data=st.data())
@settings(max_examples=100, deadline=None)
def test_more_candidates_are_worse_by_no_more_than_the_gap(problem, data):
    sizes, costs, budget = problem
    kept = {
        name: data.draw(st.sets(st.integers(0, len(each) - 1), min_size=1), label=name) for name, each in sizes.items()
    }
    some_sizes, some_costs = ({n: [each[n][i] for i in sorted(kept[n])] for n in each} for each in (sizes, costs))
    assume(sum(map(min, some_sizes.values())) <= budget)
    fewer, more = allocate(some_sizes, some_costs, budget), allocate(sizes, costs, budget)
    assert more.lower_bound <= fewer.error + 1e-9
    assert more.error * (1 - more.gap) <= fewer.error + 1e-9
    # With the choice from fewer in hand there is nothing to lose.
    known = {name: sorted(kept[name])[index] for name, index in fewer.chosen.items()}
    assert allocate(sizes, costs, budget, known).error <= fewer.error
