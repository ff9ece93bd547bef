"""Plans: the published totals, every kind of budget, what is refused and with which words, and FLOPs by hand."""

from __future__ import annotations

import json
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings
from pydantic import ValidationError
from torch import nn
from transformers import GPT2Config

from kronpress import LayerPlan, Plan, Recipe, RequestError, compress_, load_recipe, make_plan
from kronpress.matrices import Kronecker, LowRank
from kronpress.planning import meta_model

WIDTH, VOCAB, POSITIONS, NUM_BLOCKS = 12, 50, 16, 2
TINY = GPT2Config(
    n_embd=WIDTH, n_layer=NUM_BLOCKS, n_head=2, vocab_size=VOCAB, n_positions=POSITIONS, bos_token_id=0, eos_token_id=0
)
MLP_DENSE = NUM_BLOCKS * 2 * 4 * WIDTH * WIDTH
# Embeddings; per block two norms, the attention's and the MLP's four biases, the attention's matrices; the last norm.
OTHERS = (
    (VOCAB + POSITIONS) * WIDTH
    + NUM_BLOCKS * (2 * 2 * WIDTH + (3 + 1 + 4 + 1) * WIDTH + (3 + 1) * WIDTH * WIDTH)
    + 2 * WIDTH
)
TOTAL = OTHERS + MLP_DENSE


def low_rank(**budget: Any) -> Recipe:
    return Recipe(structure="low_rank", budget=budget)


# ---- totals ----


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("krony-67m", 67_893_504),
        ("krony-80m-2", 80_400_048),
        ("krony-81m", 81_972_576),
        ("krony-92m-4", 92_983_392),
        ("krony-96m", 96_128_304),
    ],
)
def test_the_published_totals_of_krony_pt(name: str, total: int) -> None:
    plan = make_plan(GPT2Config(), load_recipe(name))
    assert plan.num_params == total
    assert plan.num_params_dense == 124_439_808
    assert len(plan.layers) == 24
    left, right = plan.layers["transformer.h.0.mlp.c_fc"].spec, plan.layers["transformer.h.0.mlp.c_proj"].spec
    assert right.left_shape == left.left_shape[::-1]
    assert right.right_shape == left.right_shape[::-1]


def test_totals_by_hand() -> None:
    plan = make_plan(TINY, load_recipe({"spec": {"right_shape": [4, 1], "num_terms": 1}}))
    targets = NUM_BLOCKS * 2 * (WIDTH * WIDTH + 4)
    assert plan.num_params_dense == TOTAL
    assert plan.num_params_targets_dense == MLP_DENSE
    assert plan.num_params_targets == targets
    assert plan.num_params == OTHERS + targets
    assert plan.kept_of_targets == pytest.approx(targets / MLP_DENSE)
    assert plan.kept_of_model == pytest.approx((OTHERS + targets) / TOTAL)
    assert (plan.bytes_dense, plan.bytes, plan.dtype) == (4 * TOTAL, 4 * (OTHERS + targets), "float32")


def test_flops_by_hand() -> None:
    plan = make_plan(TINY, load_recipe({"spec": {"right_shape": [4, 1], "num_terms": 1}}))
    attention_and_head = NUM_BLOCKS * 4 * WIDTH**2 + VOCAB * WIDTH
    assert plan.flops_per_token_dense == 2 * (attention_and_head + MLP_DENSE)
    # c_fc is A (12, 12) ⊗ B (4, 1): A first, then four multiples of each output. c_proj is A (12, 12) ⊗ B (1, 4):
    # B first, one of four inputs summed each, then A.
    one = WIDTH * WIDTH + 4 * WIDTH
    assert {layer.flops_per_token for layer in plan.layers.values()} == {2 * one}
    assert plan.flops_per_token == 2 * (attention_and_head + NUM_BLOCKS * 2 * one)

    plan = make_plan(TINY, Recipe(structure="low_rank", spec={"rank": 3}))
    assert plan.flops_per_token == 2 * (attention_and_head + NUM_BLOCKS * 2 * 3 * 5 * WIDTH)


@pytest.mark.parametrize(("dtype", "itemsize"), [(torch.float16, 2), (torch.bfloat16, 2), (torch.float64, 8)])
def test_bytes_are_counted_in_the_dtype_of_the_configuration_or_else_of_the_weights(
    dtype: torch.dtype, itemsize: int
) -> None:
    recipe = Recipe(spec={"right_shape": [1, 2], "num_terms": 1})
    config = GPT2Config(**{**TINY.to_dict(), "dtype": dtype})
    worked_on = meta_model(config).to(torch.float32)
    linear = nn.Sequential(nn.Linear(8, 8, dtype=dtype))
    for model, targets in ((config, "mlp"), (worked_on, "mlp"), (linear, "0")):
        plan = make_plan(model, recipe.model_copy(update={"targets": targets}))
        assert plan.dtype == str(dtype).removeprefix("torch.")
        assert (plan.bytes, plan.bytes_dense) == (itemsize * plan.num_params, itemsize * plan.num_params_dense)


# ---- budgets ----

FRACTIONS = st.floats(0.2, 1.0)
laws = settings(max_examples=12, deadline=None)


def assert_respected_and_used(plan: Plan, allowed_in_targets: float) -> None:
    """One more rank in every matrix would be too much."""
    one_more = sum(layer.out_features + layer.in_features for layer in plan.layers.values())
    full = all(layer.spec.rank == WIDTH for layer in plan.layers.values())
    assert plan.num_params_targets <= allowed_in_targets
    assert full or allowed_in_targets - plan.num_params_targets < one_more


@given(fraction=FRACTIONS)
@laws
def test_kept_of_targets(fraction: float) -> None:
    plan = make_plan(TINY, low_rank(kept_of_targets=fraction))
    assert plan.kept_of_targets <= fraction
    assert_respected_and_used(plan, fraction * MLP_DENSE)


@given(fraction=FRACTIONS)
@laws
def test_params_of_the_model(fraction: float) -> None:
    budget = OTHERS + int(fraction * MLP_DENSE)
    plan = make_plan(TINY, low_rank(params=budget))
    assert plan.num_params <= budget
    assert_respected_and_used(plan, budget - OTHERS)


@given(fraction=FRACTIONS)
@laws
def test_kept_of_model(fraction: float) -> None:
    kept = (OTHERS + fraction * MLP_DENSE) / TOTAL
    plan = make_plan(TINY, low_rank(kept_of_model=kept))
    assert plan.kept_of_model <= kept
    assert_respected_and_used(plan, kept * TOTAL - OTHERS)


@given(fraction=FRACTIONS, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@laws
def test_bytes_of_the_model(fraction: float, dtype: torch.dtype) -> None:
    config = GPT2Config(**{**TINY.to_dict(), "dtype": dtype})
    budget = int((OTHERS + fraction * MLP_DENSE) * dtype.itemsize)
    plan = make_plan(config, low_rank(bytes=budget))
    assert plan.bytes <= budget
    assert_respected_and_used(plan, budget / dtype.itemsize - OTHERS)


@given(fraction=st.floats(0.3, 1.0))
@laws
def test_a_budget_chooses_the_number_of_terms(fraction: float) -> None:
    plan = make_plan(TINY, Recipe(spec={"right_shape": [2, 2]}, budget={"kept_of_targets": fraction}))
    one_more = len(plan.layers) * (WIDTH * WIDTH + 4)
    assert plan.kept_of_targets <= fraction
    assert fraction * MLP_DENSE - plan.num_params_targets < one_more or {
        layer.spec.num_terms for layer in plan.layers.values()
    } == {4}


@given(fraction=FRACTIONS)
@settings(max_examples=5, deadline=None)
def test_free_shapes_use_the_budget_best_and_of_equal_sizes_the_fastest(fraction: float) -> None:
    layer = nn.Sequential(nn.Linear(8, 16, bias=False))
    plan = make_plan(layer, Recipe(targets="0", budget={"kept_of_targets": fraction}))
    chosen = plan.layers["0"]
    sizes = {
        spec: Kronecker.count_params(16, 8, spec) for spec in Kronecker.candidate_specs(16, 8, int(fraction * 16 * 8))
    }
    assert chosen.num_params == max(sizes.values()) <= fraction * 16 * 8
    equal = [spec for spec, size in sizes.items() if size == chosen.num_params]
    assert chosen.flops_per_token == min(Kronecker.count_flops(16, 8, spec) for spec in equal)


def test_a_budget_above_the_dense_model_keeps_at_most_as_much_as_the_dense_model() -> None:
    for budget in ({"params": 10 * TOTAL}, {"bytes": 40 * TOTAL}, {"kept_of_model": 1.0}, {"kept_of_targets": 1.0}):
        plan = make_plan(TINY, low_rank(**budget))
        assert_respected_and_used(plan, MLP_DENSE)


@st.composite
def low_rank_sizes(draw: st.DrawFn) -> tuple[int, int, int]:
    """out_features, in_features and a rank that is no larger than the dense matrix."""
    out_features, in_features = draw(st.integers(2, 120)), draw(st.integers(2, 120))
    return out_features, in_features, draw(st.integers(1, out_features * in_features // (out_features + in_features)))


@given(sizes=low_rank_sizes())
@example(sizes=(100, 7, 5))  # 535 / 700 · 700 is less than 535 in floating point
@settings(max_examples=100, deadline=None)
def test_a_size_that_one_matrix_can_have_exactly_is_had_exactly(sizes: tuple[int, int, int]) -> None:
    out_features, in_features, rank = sizes
    model = nn.Sequential(nn.Linear(in_features, out_features, bias=False, device="meta"))
    budget = {"params": rank * (out_features + in_features)}
    plan = make_plan(model, Recipe(targets="0", structure="low_rank", budget=budget))
    assert plan.layers["0"].spec.rank == rank
    assert plan.num_params == budget["params"]


@pytest.mark.parametrize(
    "budget", [{"params": OTHERS}, {"bytes": 4 * OTHERS}, {"kept_of_model": OTHERS / TOTAL}, {"params": 1}], ids=str
)
def test_a_budget_that_the_untargeted_layers_already_use_is_refused(budget: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=f"not targeted already hold {OTHERS} of {TOTAL}"):
        make_plan(TINY, low_rank(**budget))


def test_a_budget_below_the_smallest_structure_names_the_layer_and_the_smallest_size() -> None:
    # Rank one of a 48×12 matrix is 60 of its 576 parameters; a little more than that makes up for rounding.
    with pytest.raises(RequestError, match=r"transformer\.h\.0\.mlp\.c_fc \(48×12\).*leaves 57 .*low_rank has 60"):
        make_plan(TINY, low_rank(kept_of_targets=0.1))
    assert make_plan(TINY, low_rank(kept_of_targets=60.5 / 576)).num_params_targets == 4 * 60
    with pytest.raises(RequestError, match=r"smallest kronecker has 48"):
        make_plan(TINY, Recipe(budget={"kept_of_targets": 0.08}))
    assert make_plan(TINY, Recipe(budget={"kept_of_targets": 48.5 / 576})).num_params_targets == 4 * 48


def test_fixed_sizes_under_a_budget_that_they_meet_and_one_that_they_miss_by_one() -> None:
    spec = {"right_shape": [1, 2], "num_terms": 1}
    total = make_plan(TINY, Recipe(spec=spec)).num_params
    for budget in ({"params": total}, {"bytes": 4 * total}, {"kept_of_model": (total + 0.5) / TOTAL}):
        assert make_plan(TINY, Recipe(spec=spec, budget=budget)).num_params == total
    for budget in ({"params": total - 1}, {"bytes": 4 * total - 1}, {"kept_of_targets": 0.5}):
        with pytest.raises(RequestError, match=f"'fixed' has fixed sizes that leave .* {total} in the model"):
            make_plan(TINY, Recipe(name="fixed", spec=spec, budget=budget))


def test_fixed_sizes_are_judged_by_the_total_and_not_matrix_by_matrix() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(40, 40, bias=False))
    recipe = Recipe(targets=".*", structure="low_rank", spec={"rank": 2}, budget={"kept_of_targets": 0.12})
    assert make_plan(model, recipe).num_params == 2 * 8 + 2 * 80


def test_fixed_sizes_larger_than_dense_meet_a_budget_that_holds_them() -> None:
    spec = {"right_shape": [2, 2], "num_terms": 4}
    unbounded = make_plan(TINY, Recipe(spec=spec))
    assert unbounded.num_params > TOTAL
    assert make_plan(TINY, Recipe(spec=spec, budget={"params": unbounded.num_params})) == unbounded


# ---- targets ----


def names(model: Any, targets: str | list[str]) -> list[str]:
    return list(make_plan(model, Recipe(targets=targets, structure="low_rank", spec={"rank": 1})).layers)


def test_expressions_match_whole_names_in_the_order_of_the_model_and_once() -> None:
    assert names(TINY, r".*\.h\.1\..*") == [
        f"transformer.h.1.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert names(TINY, [r".*\.1\.mlp\.c_fc", r".*\.0\.mlp\.c_fc", r".*c_fc"]) == [
        "transformer.h.0.mlp.c_fc",
        "transformer.h.1.mlp.c_fc",
    ]
    assert names(TINY, ["mlp", r".*0\.attn\.c_proj"])[:2] == ["transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_fc"]


@pytest.mark.parametrize("targets", ["c_fc", [r".*c_fc", r".*c_fd"], r"transformer\.ln_f", "transformer.h.0.mlp"])
def test_a_target_that_matches_no_linear_layer_is_refused_and_shown(targets: str | list[str]) -> None:
    missing = targets if isinstance(targets, str) else targets[-1]
    with pytest.raises(RequestError) as caught:
        names(TINY, targets)
    assert repr(missing) in str(caught.value)
    assert "transformer.h.0.attn.c_attn" in str(caught.value)


def test_no_target_at_all_is_refused() -> None:
    with pytest.raises(RequestError, match="target"):
        names(TINY, [])


def test_a_matrix_that_has_no_kronecker_factors_is_refused_without_naming_a_smallest_one() -> None:
    with pytest.raises(RequestError, match=r"0 \(1×5\)") as caught:
        make_plan(nn.Sequential(nn.Linear(5, 1)), Recipe(targets="0", budget={"kept_of_targets": 1.0}))
    assert "smallest" not in str(caught.value)


def test_shapes_that_do_not_divide_name_the_module_and_the_divisors() -> None:
    with pytest.raises(
        RequestError,
        match=r"transformer\.h\.0\.mlp\.c_fc \(48×12\).*5 does not divide in_features 12.*1, 2, 3, 4, 6, 12",
    ):
        make_plan(TINY, Recipe(spec={"right_shape": [4, 5], "num_terms": 1}))


def test_a_weight_shared_between_linear_layers_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    for target in ("0", "1"):
        with pytest.raises(RequestError, match=f"'{target}' shares its weight"):
            names(model, target)


def test_a_layer_used_under_two_names_is_refused() -> None:
    shared = nn.Linear(4, 4)
    with pytest.raises(RequestError, match="0"):
        names(nn.Sequential(shared, nn.ReLU(), shared), "0")


def test_a_compressed_model_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    recipe = Recipe(targets="0", structure="low_rank", spec={"rank": 1})
    compress_(model, make_plan(model, recipe))
    with pytest.raises(RequestError, match="compressed"):
        make_plan(model, recipe)


# ---- sizes in a recipe ----


@pytest.mark.parametrize(
    ("structure", "spec", "said"),
    [
        ("kronecker", {"right_shape": [1, 2], "num_terms": 5}, "5"),
        ("kronecker", {"right_shape": [1, 2], "num_terms": 0}, "num_terms"),
        ("kronecker", {"right_shape": [1, 2], "num_terms": "two"}, "num_terms"),
        ("kronecker", {"right_shape": [1, 2], "num_terms": 1.5}, "num_terms"),
        ("kronecker", {"right_shape": [0, 2], "num_terms": 1}, "right_shape"),
        ("kronecker", {"right_shape": [-1, 2], "num_terms": 1}, "right_shape"),
        ("kronecker", {"right_shape": [2], "num_terms": 1}, "right_shape"),
        ("kronecker", {"right_shape": 2, "num_terms": 1}, "right_shape"),
        ("kronecker", {"num_terms": 99}, "99"),
        ("low_rank", {"rank": 13}, "13"),
        ("low_rank", {"rank": 0}, "rank"),
        ("low_rank", {"rank": "high"}, "rank"),
    ],
    ids=str,
)
def test_impossible_sizes_are_refused_by_name_and_without_talk_of_a_budget(
    structure: str, spec: dict[str, Any], said: str
) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        make_plan(TINY, load_recipe({"structure": structure, "spec": spec}))
    assert "budget leaves None" not in str(caught.value)


def test_sizes_left_free_need_a_budget() -> None:
    for recipe in (Recipe(), Recipe(spec={"right_shape": [1, 2]}), Recipe(structure="low_rank")):
        with pytest.raises(RequestError, match="budget"):
            make_plan(TINY, recipe)


# ---- the plan as a value ----


@pytest.mark.parametrize(
    "recipe", [Recipe(targets="blocks", spec={"right_shape": [4, 2], "num_terms": 2}), low_rank(kept_of_targets=0.5)]
)
def test_a_plan_survives_json(recipe: Recipe) -> None:
    plan = make_plan(TINY, recipe)
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
    again = Plan.model_validate(json.loads(json.dumps(plan.model_dump(mode="json"))))
    assert again == plan
    assert list(again.layers) == list(plan.layers)
    assert all(type(layer.spec) is layer.matrix_class.Spec for layer in again.layers.values())


def test_a_plan_is_frozen_strict_and_not_empty() -> None:
    plan = make_plan(TINY, low_rank(kept_of_targets=0.5))
    with pytest.raises(ValidationError):
        plan.num_params = 1
    with pytest.raises(ValidationError):
        next(iter(plan.layers.values())).spec = LowRank.Spec(rank=1)
    fields = plan.model_dump(mode="json")
    for wrong in ({**fields, "extra": 1}, {**fields, "layers": {}}):
        with pytest.raises(ValidationError):
            Plan.model_validate(wrong)


LAYER = {"structure": "low_rank", "out_features": 8, "in_features": 4, "spec": {"rank": 2}}


@pytest.mark.parametrize(
    "changes",
    [
        {"structure": "low_rnk"},
        {"spec": {"rank": 2, "num_terms": 1}},
        {"spec": {"num_terms": 1}},
        {"spec": {"rank": 0}},
        {"spec": {"rank": 5}},
        {"spec": Kronecker.Spec(left_shape=(4, 2), right_shape=(2, 2))},
        {"out_features": "wide"},
        {"bias": True},
    ],
    ids=str,
)
def test_a_layer_plan_that_cannot_be_carried_out_is_refused(changes: dict[str, Any]) -> None:
    assert LayerPlan(**LAYER).num_params == 2 * 12
    with pytest.raises(ValueError):
        LayerPlan(**{**LAYER, **changes})


@pytest.mark.parametrize("field", LAYER)
def test_a_layer_plan_without_one_of_its_fields_is_refused(field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        LayerPlan(**{name: value for name, value in LAYER.items() if name != field})


def test_a_plan_reads_no_weight() -> None:
    model = meta_model(TINY)
    assert all(parameter.is_meta for parameter in model.parameters())
    recipe = low_rank(kept_of_targets=0.5)
    assert make_plan(model, recipe) == make_plan(TINY, recipe)
