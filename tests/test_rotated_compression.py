"""compress_ with a rotation: counted as it is stored, exact where fits are, and refused before anything is changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from samples.matrices import generator, orthogonal
from samples.networks import count_numbers, plant_products_
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import kronpress as kp
from kronpress.planning import plan_stages
from kronpress.recipe import Weighting
from kronpress.rotation import fold_norm_gains_, has_layer_norms, rotate_
from kronpress.surgery import linear_layers, structured_layers

FAMILIES = ("gpt2", "opt", "llama", "qwen2")
IDS = torch.randint(300, (8, 24), generator=torch.Generator().manual_seed(5))
TABLE = 300 * 16
INPUT, LOSS = {"metric": "input"}, {"metric": "loss"}
families = pytest.mark.parametrize("family", FAMILIES)


def recipe(**changes: Any) -> kp.Recipe:
    fields = {
        "targets": "mlp",
        "rotation": True,
        "head": "dense",
        "structure": "kronecker",
        "spec": {"right_shape": [2, 2], "num_terms": 1},
        "calibration": {"held_out": 0.0},
    }
    return kp.load_recipe({**fields, **changes})


def unrotated(wanted: kp.Recipe) -> kp.Recipe:
    return wanted.model_copy(update={"rotation": False})


def compressed(model: PreTrainedModel, wanted: kp.Recipe) -> tuple[PreTrainedModel, dict[str, kp.LayerReport]]:
    """A copy, carried out by a plan that was made from the shapes alone."""
    student = copy.deepcopy(model)
    moments = None if wanted.weighting.metric == "none" else kp.calibrate(model, [IDS], wanted)
    return student, kp.compress_(student, kp.make_plan(model, wanted), moments=moments, batches=[IDS])


def turned_away(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """A copy in another basis, which computes the same."""
    turned = copy.deepcopy(model)
    fold_norm_gains_(turned, untie=True)
    rotate_(turned, orthogonal(seed, 16, keeps_ones=has_layer_norms(model)))
    return turned


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def assert_same(found: Tensor, wanted: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * wanted.abs().max().item())


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    assert not structured_layers(model)
    assert kp.attached_plan(model) is None
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# ---- counts ----


@families
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("structure", ["kronecker", "low_rank"])
def test_the_plans_count_is_that_of_the_model_and_of_its_checkpoint(
    tiny_model: Callable[..., Any], tmp_path: Path, family: str, tied: bool, structure: str
) -> None:
    model = tiny_model(family, tie_word_embeddings=tied)
    wanted = recipe() if structure == "kronecker" else recipe(structure=structure, spec={"rank": 3})
    plan, plain = (kp.make_plan(model, each) for each in (wanted, unrotated(wanted)))
    assert plan.num_params_untied == (TABLE if tied else 0)
    assert plan.num_params == plain.num_params + plan.num_params_untied
    assert plan.num_params_dense == count_numbers(model)
    assert plan.flops_per_token == plain.flops_per_token
    kp.compress_(model, plan)
    assert count_numbers(model) == plan.num_params
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert count_numbers(loaded) == plan.num_params
    assert_same(logits_of(loaded), logits_of(model), 0)


def test_a_budget_counts_the_head_that_the_rotation_unties(tiny_model: Callable[..., Any]) -> None:
    model, table = tiny_model("gpt2", vocab_size=40), 40 * 16
    dense = count_numbers(model)
    low_rank = {"structure": "low_rank", "spec": {}}
    for budget in ({"params": dense}, {"kept_of_model": 1.0}):
        plan = kp.make_plan(model, recipe(budget=budget, **low_rank))
        assert plan.num_params <= dense
    with pytest.raises(kp.RequestError, match=f"already hold {dense - 4 * 64 * 16 + table}"):
        kp.make_plan(model, recipe(budget={"params": dense - 4 * 64 * 16 + table}, **low_rank))


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_the_count_holds_where_a_constant_gain_leaves_the_head_tied(
    tiny_model: Callable[..., Any], family: str
) -> None:
    model = tiny_model(family)
    norm = model.transformer.ln_f if family == "gpt2" else model.model.norm
    with torch.no_grad():
        norm.weight.fill_(0.7)
    plan = kp.make_plan(model, recipe())
    kp.compress_(model, plan)
    assert count_numbers(model) == plan.num_params


def test_stages_after_a_rotation_are_planned_with_the_untied_head(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("gpt2")
    first = {key: value for key, value in recipe().model_dump(mode="json").items() if key in ("targets", "rotation")}
    stages = [
        {"share": 0, **first},
        {"share": 1, "targets": "attention", "structure": "low_rank", "spec": {"rank": 2}, "rotation": False},
    ]
    staged = recipe(rotation=False, stages=stages, healing={"max_steps": 0})
    foreseen, plan = plan_stages(model, staged), None
    for expected, part in zip(foreseen, staged.parts, strict=True):
        plan = kp.make_plan(model, part, before=plan)
        kp.compress_(model, plan)
        assert plan.num_params == count_numbers(model)
        assert expected == plan


# ---- exact fits, and nearer ones ----


@families
@pytest.mark.parametrize("weighting", [{}, INPUT, LOSS], ids=["plain", "input", "loss"])
def test_a_rotated_model_with_exact_fits_computes_what_the_dense_one_does(
    tiny_model: Callable[..., Any], family: str, weighting: dict[str, Any]
) -> None:
    model = tiny_model(family).double()
    wanted = recipe(spec={"right_shape": [2, 2], "num_terms": 4}, weighting=weighting)
    student, reports = compressed(model, wanted)
    assert max(report.relative_error for report in reports.values()) < 1e-6
    assert_same(logits_of(student), logits_of(model))


@families
def test_corrected_biases_and_inputs_in_turn_are_those_of_the_rotated_model(
    tiny_model: Callable[..., Any], family: str
) -> None:
    model = tiny_model(family).double()
    sequential = {"metric": "input", "sequential": True, "bias_correction": True}
    wanted = recipe(targets="blocks", spec={"right_shape": [2, 2], "num_terms": 4}, weighting=sequential)
    student, _ = compressed(model, wanted)
    assert_same(logits_of(student), logits_of(model), 1e-5)


@families
@pytest.mark.parametrize("weighting", [{}, INPUT], ids=["plain", "input"])
def test_where_another_basis_has_exact_sums_it_loses_less(
    tiny_model: Callable[..., Any], family: str, weighting: dict[str, Any]
) -> None:
    planted = tiny_model(family).double()
    fold_norm_gains_(planted, untie=True)
    plant_products_(planted, kp.make_plan(planted, unrotated(recipe())), generator(1))
    model = turned_away(planted)
    wanted = recipe(weighting=weighting)
    (_, rotated), (_, plain) = compressed(model, wanted), compressed(model, unrotated(wanted))

    def total(reports: dict[str, kp.LayerReport]) -> float:
        errors = (each.relative_output_error if weighting else each.relative_error for each in reports.values())
        return sum(each**2 for each in errors if each is not None)

    assert 0 < total(rotated) < 0.97 * total(plain)


def test_a_rotation_and_foldings_go_together(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama").double()
    exact = {"right_shape": [2, 2], "num_terms": 4}
    student, _ = compressed(model, recipe(spec=exact, weighting=LOSS, folding=["mlp", "residual"]))
    assert_same(logits_of(student), logits_of(model))
    both, alone = (compressed(model, recipe(folding=folding))[1] for folding in (["mlp", "residual"], []))
    errors = [sum(each.relative_error**2 for each in reports.values()) for reports in (both, alone)]
    assert 0 < errors[0] < errors[1]


def test_a_gain_that_is_small_beside_the_others_is_no_obstacle(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("gpt2").double()
    norm = model.transformer.h[1].ln_2
    with torch.no_grad():
        norm.weight[3], norm.bias[3] = 1e-6, 3e-5
    student, _ = compressed(model, recipe(spec={"right_shape": [2, 2], "num_terms": 4}, weighting=INPUT))
    assert_same(logits_of(student), logits_of(model))


def test_what_is_done_before_the_fits_is_told(tiny_model: Callable[..., Any]) -> None:
    model, said = tiny_model("gpt2"), []
    kp.compress_(model, kp.make_plan(model, recipe(folding=["mlp"])), messages=said.append)
    *rotating, folding = said
    rounds = [int(text.split(": ")[1].split()[0]) for text in rotating]
    assert rounds == [*range(len(rounds))] and len(rounds) > 1
    assert folding == "looking for orders of units to fold: mlp"


# ---- dense again ----


@families
def test_the_dense_export_is_a_stock_model_with_an_untied_head(
    tiny_model: Callable[..., Any], tmp_path: Path, family: str
) -> None:
    model, _ = compressed(tiny_model(family), recipe())
    dense = kp.to_dense(model)
    dense.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not structured_layers(loaded) and not loaded.config.tie_word_embeddings
    assert getattr(loaded.config, "quantization_config", None) is None
    assert linear_layers(loaded).keys() == linear_layers(tiny_model(family)).keys()
    assert_same(logits_of(loaded), logits_of(model), 1e-5)


# ---- what is refused ----


def test_a_head_that_has_to_stay_tied_is_refused_with_the_way_out(tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(kp.RequestError, match="own, which is counted: allow it by head=dense"):
        kp.make_plan(tiny_model("gpt2"), recipe(head="tied"))
    plan = kp.make_plan(tiny_model("llama"), recipe(head="tied"))
    assert plan.num_params_untied == 0


def test_an_embedding_among_the_targets_is_refused(tiny_model: Callable[..., Any]) -> None:
    sizes = {"structure": "low_rank", "spec": {"rank": 3}}
    for targets in ("embedding", "all"):
        with pytest.raises(kp.RequestError, match="rotation: the embedding and all layers outside the targets"):
            kp.make_plan(tiny_model("gpt2"), recipe(targets=targets, **sizes))
    model = tiny_model("gpt2")
    before = snapshot(model)
    with pytest.raises(kp.RequestError, match=r"transformer\.wpe"):
        kp.compress_(model, kp.make_plan(model, recipe(targets=r"transformer\.wpe", **sizes)))
    assert_untouched(model, before)


def test_a_second_stage_is_refused_before_the_first_is_carried_out(tiny_model: Callable[..., Any]) -> None:
    stages = [{"share": 0, "targets": "attention", "rotation": False}, {"share": 1, "targets": "mlp"}]
    staged = recipe(stages=stages, healing={"max_steps": 0})
    with pytest.raises(kp.RequestError, match=r"stage 2 of 'custom': rotation: .* have to be dense"):
        kp.make_plan(tiny_model("gpt2"), staged)


def test_models_whose_stream_is_not_known_are_refused(tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(kp.RequestError, match="rotation: of a model of type None the residual stream is not known"):
        kp.make_plan(nn.Sequential(nn.Linear(8, 8)), recipe(targets="0"))
    sequential = nn.Sequential(nn.Linear(8, 8))
    plan = kp.make_plan(sequential, unrotated(recipe(targets="0"))).model_copy(update={"rotation": True})
    before = snapshot(sequential)
    with pytest.raises(kp.RequestError, match="no transformers model"):
        kp.compress_(sequential, plan)
    assert_untouched(sequential, before)


@pytest.mark.parametrize(
    ("family", "changes", "weighting", "message"),
    [
        ("gpt2", {}, {"metric": "magnitude"}, "`magnitude` is one of single coordinates"),
        ("opt", {"do_layer_norm_before": False}, {}, "norms behind the sums"),
    ],
)
def test_what_no_rotation_passes_is_refused_and_the_model_is_as_it_was(
    tiny_model: Callable[..., Any], family: str, changes: dict[str, Any], weighting: dict[str, Any], message: str
) -> None:
    model = tiny_model(family, **changes)
    # A recipe refuses the metric itself; a plan can still be given it.
    metric = {"weighting": Weighting(**weighting)}
    moments = kp.calibrate(model, [IDS], unrotated(recipe()).model_copy(update=metric)) if weighting else None
    plan = kp.make_plan(model, recipe()).model_copy(update=metric)
    before = snapshot(model)
    with pytest.raises(kp.RequestError, match=message):
        kp.compress_(model, plan, moments=moments)
    assert_untouched(model, before)
    assert model.config.tie_word_embeddings
