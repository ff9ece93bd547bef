"""Compression to real inputs: nearer outputs, corrected biases, targets that make up for earlier losses, allocation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import kronpress as kp
from kronpress.calibration import SequentialInputs
from kronpress.candidates import MOST_LOOKS
from kronpress.matrices import STRUCTURES
from kronpress.matrices.metric import Metric, metric_of
from kronpress.surgery import dense_weight, linear_layers

FAMILIES = ("gpt2", "opt", "llama", "qwen2")
WINDOWS = torch.randint(3, 300, (32, 24), generator=torch.Generator().manual_seed(1))
HELD_OUT = torch.randint(3, 300, (16, 24), generator=torch.Generator().manual_seed(2))


def weighted(structure: str = "low_rank", **changes: object) -> kp.Recipe:
    fields = {
        "targets": "blocks",
        "structure": structure,
        "budget": {"kept_of_targets": 0.4},
        "weighting": {"metric": "input"},
        "calibration": {"held_out": 0.0},
    }
    if structure == "kronecker":
        fields["spec"] = {"right_shape": [2, 2]}
    if structure == "tensor_gpt":
        fields["budget"] = {"kept_of_targets": 0.6}  # a row of 16 has 8 numbers at least
    return kp.Recipe(**{**fields, **changes})


def compressed(model: nn.Module, recipe: kp.Recipe) -> tuple[nn.Module, dict]:
    student = copy.deepcopy(model)
    moments = kp.calibrate(model, [WINDOWS], recipe)
    plan = kp.make_plan(model, recipe, moments)
    return student, kp.compress_(student, plan, moments=moments, batches=[WINDOWS])


def output_error(model: nn.Module, student: nn.Module, ids: Tensor) -> float:
    hidden = [each(input_ids=ids, output_hidden_states=True).hidden_states[-1] for each in (model, student)]
    return (hidden[0] - hidden[1]).square().mean().item()


# ---- the metric of inputs ----


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_each_layer_is_nearer_in_its_output_than_the_plain_fit(tiny_model, family, structure):
    model = tiny_model(family)
    recipe = weighted(structure)
    moments = kp.calibrate(model, [WINDOWS], recipe)
    _, report = compressed(model, recipe)
    plain = recipe.model_copy(update={"weighting": kp.Recipe().weighting})
    _, plain_report = compressed(model, plain)
    assert plain_report.keys() == report.keys()
    for name, layer in report.items():
        assert layer.relative_error >= plain_report[name].relative_error - 1e-6
        assert plain_report[name].relative_output_error is None
        weight = dense_weight(linear_layers(model)[name])
        student, _ = compressed(model, plain)
        plain_weight = student.get_submodule(name).to_dense().detach()
        metric = Metric(moments[name].second)
        plain_error = (metric.squared_norm(weight - plain_weight) / metric.squared_norm(weight)) ** 0.5
        assert layer.relative_output_error <= plain_error + 1e-6
        break  # one layer of each model is enough


def test_a_corrected_bias_takes_up_the_mean_error(tiny_model):
    model = tiny_model("gpt2")
    recipe = weighted(weighting={"metric": "input", "bias_correction": True})
    moments = kp.calibrate(model, [WINDOWS], recipe)
    student, report = compressed(model, recipe)
    for name in report:
        layer, dense = student.get_submodule(name), linear_layers(model)[name]
        mean = moments[name].mean.float()
        expected = dense_weight(dense) @ mean + dense.bias
        torch.testing.assert_close(layer.to_dense() @ mean + layer.bias, expected, rtol=1e-4, atol=1e-5)


def test_layers_without_a_bias_get_none(tiny_model):
    recipe = weighted(weighting={"metric": "input", "bias_correction": True})
    student, report = compressed(tiny_model("llama"), recipe)
    assert all(student.get_submodule(name).bias is None for name in report)


def test_moments_that_are_not_there_are_asked_for_before_anything_changes(tiny_model):
    model, recipe = tiny_model("gpt2"), weighted()
    plan = kp.make_plan(model, recipe)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(kp.RequestError, match=r"metric 'input' needs moments of 'transformer.h.0.attn.c_attn'"):
        kp.compress_(model, plan)
    other = kp.calibrate(tiny_model("gpt2", n_embd=48), [WINDOWS], recipe)
    with pytest.raises(kp.RequestError, match=r"h.0.attn.c_attn: moments of shape"):
        kp.compress_(model, plan, moments=other)
    unfelt = kp.calibrate(model, [WINDOWS], weighted(calibration={"sensitivity": False, "held_out": 0.0}))
    by_loss = kp.make_plan(model, weighted(weighting={"metric": "loss"}))
    with pytest.raises(kp.RequestError, match=r"h.0.attn.c_attn: the metric `loss` needs the loss's gradients"):
        kp.compress_(model, by_loss, moments=unfelt)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weighting": {"sequential": True}}, "need a metric, input or loss"),
        ({"weighting": {"bias_correction": True}}, "need a metric, input or loss"),
        ({"allocation": "measured", "weighting": {}}, "needs a weighting.metric"),
        ({"allocation": "measured", "spec": {"rank": 2}}, "chooses the sizes itself"),
        ({"structure": "auto"}, "structure auto needs allocation: measured"),
        ({"structure": "auto", "fit": {"start": "prune"}}, "structure auto chooses it"),
        ({"flops_not_above_dense": True}, "needs allocation: measured"),
        ({"candidates": ["low_rnk"]}, "'low_rank'"),
    ],
)
def test_settings_that_do_not_go_together(changes, message):
    fields = weighted().model_dump(mode="json")
    with pytest.raises(kp.RequestError, match=message):
        kp.load_recipe({**fields, **changes})


# ---- one after the other ----


@pytest.mark.parametrize("family", FAMILIES)
def test_with_nothing_lost_the_paired_inputs_are_those_of_the_model(tiny_model, family, tmp_path):
    model, recipe = tiny_model(family), weighted()
    moments = kp.calibrate(model, [WINDOWS], recipe)
    with SequentialInputs(model, [WINDOWS[:20], WINDOWS[20:]], tmp_path) as inputs:
        for name, layer in moments.items():
            paired = inputs.moments(name)
            torch.testing.assert_close(paired.second, layer.second, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(paired.cross, layer.second, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(paired.mean, layer.mean, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(paired.dense_mean, layer.mean, rtol=1e-4, atol=1e-5)
            assert paired.num_tokens == layer.num_tokens


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_paired_moments_by_hand_where_layers_were_replaced(tiny_model, family, tmp_path):
    dense = tiny_model(family)
    student = copy.deepcopy(dense)
    names = list(kp.calibrate(dense, [WINDOWS], weighted()))
    last = names[-1]
    with SequentialInputs(student, [WINDOWS], tmp_path) as inputs:
        for name in names[:-1]:
            inputs.moments(name)
            with torch.no_grad():
                student.get_submodule(name).weight.mul_(0.7)
        paired = inputs.moments(last)

    def read(model: nn.Module) -> Tensor:
        found: list[Tensor] = []
        hook = model.get_submodule(last).register_forward_pre_hook(lambda _, x: found.append(x[0].detach()))
        with torch.no_grad():
            model(input_ids=WINDOWS)
        hook.remove()
        return found[0].flatten(0, 1).double()

    x, x_now = read(dense), read(student)
    torch.testing.assert_close(paired.cross, x.mT @ x_now / len(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(paired.second, x_now.mT @ x_now / len(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(paired.dense_mean, x.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(paired.mean, x_now.mean(0), rtol=1e-4, atol=1e-5)


def test_layers_are_asked_for_in_order_and_inside_blocks(tiny_model, tmp_path):
    with SequentialInputs(tiny_model("gpt2"), [WINDOWS], tmp_path) as inputs:
        inputs.moments("transformer.h.1.mlp.c_fc")
        with pytest.raises(kp.RequestError, match="comes before block 1"):
            inputs.moments("transformer.h.0.mlp.c_fc")
        for name in ("lm_head", "transformer.h.7.mlp.c_fc"):
            with pytest.raises(kp.RequestError, match="is in no transformer block"):
                inputs.moments(name)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_fits_one_after_the_other_lose_less_in_the_end(tiny_model, family, structure, tmp_path):
    model = tiny_model(family)
    at_once, _ = compressed(model, weighted(structure, weighting={"metric": "input", "bias_correction": True}))
    sequential = {"metric": "input", "bias_correction": True, "sequential": True}
    in_turn, _ = compressed(model, weighted(structure, weighting=sequential))
    assert output_error(model, in_turn, WINDOWS) < output_error(model, at_once, WINDOWS)
    assert not list(tmp_path.iterdir())


def test_a_sequential_plan_needs_its_inputs(tiny_model):
    model, recipe = tiny_model("gpt2"), weighted(weighting={"metric": "input", "sequential": True})
    moments = kp.calibrate(model, [WINDOWS], recipe)
    with pytest.raises(kp.RequestError, match="the plan is sequential"):
        kp.compress_(model, kp.make_plan(model, recipe), moments=moments)


# ---- measured allocation ----


def auto(**changes: object) -> kp.Recipe:
    fields = {"structure": "auto", "allocation": "measured", "weighting": {"metric": "loss"}, "spec": {}}
    return weighted(**{**fields, **changes})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9])
def test_auto_keeps_within_the_budget_and_predicts_less_than_the_uniform_rule(tiny_model, family, kept):
    model = tiny_model(family)
    recipe = auto(budget={"kept_of_targets": kept})
    moments = kp.calibrate(model, [WINDOWS], recipe)
    plan = kp.make_plan(model, recipe, moments)
    assert plan.kept_of_targets <= kept
    assert plan.num_params == sum(p.numel() for p in compressed(model, recipe)[0].parameters())
    assert 0 <= plan.allocation.gap <= 1
    assert plan.allocation.predicted_rise == pytest.approx(
        sum(layer.predicted_rise for layer in plan.layers.values()), abs=1e-12
    )
    assert set(plan.layers) | set(plan.allocation.kept_dense) == set(moments)
    uniform = kp.make_plan(model, weighted(budget={"kept_of_targets": kept}))
    predicted = 0.0
    for name, layer in uniform.layers.items():
        weight = dense_weight(linear_layers(model)[name]).double()
        metric = metric_of(moments[name], output=True, centred=False)
        fitted = layer.matrix_class.expand(layer.matrix_class.fit(weight, layer.spec, metric))
        predicted += metric.squared_norm(weight - fitted) / 2
    assert plan.allocation.predicted_rise <= predicted * (1 + 1e-6)


def test_what_was_chosen_is_in_the_table_and_was_fitted(tiny_model):
    model, recipe = tiny_model("gpt2"), auto()
    moments = kp.calibrate(model, [WINDOWS], recipe)
    plan = kp.make_plan(model, recipe, moments)
    for name, layer in plan.layers.items():
        rows = [
            row
            for row in plan.allocation.candidates[name]
            if (row.structure, row.spec) == (layer.structure, layer.spec.model_dump(mode="json"))
        ]
        assert [(row.predicted_rise, row.is_exact) for row in rows] == [(layer.predicted_rise, True)]
        weight = dense_weight(linear_layers(model)[name]).double()
        metric = metric_of(moments[name], output=True, centred=False)
        fitted = layer.matrix_class.expand(layer.matrix_class.fit(weight, layer.spec, metric))
        assert layer.predicted_rise == pytest.approx(metric.squared_norm(weight - fitted) / 2, rel=1e-6)


def test_a_matrix_gets_a_few_closer_looks_and_no_more(tiny_model, monkeypatch):
    estimated = []

    class Hopeful(STRUCTURES["kronecker"]):
        """Claims that every sum is all but perfect, until it is looked at."""

        @classmethod
        def screen(cls, weight, metric):
            sizes = {spec: cls.count_params(*weight.shape, spec) for spec, *_ in super().screen(weight, metric)}
            return [(spec, 1e-9 / size, False) for spec, size in sizes.items()]

        @classmethod
        def estimate(cls, weight, spec, metric):
            estimated.append(weight)
            return super().estimate(weight, spec, metric)

    model, recipe = tiny_model("gpt2"), auto()
    moments = kp.calibrate(model, [WINDOWS], recipe)
    monkeypatch.setitem(STRUCTURES, "kronecker", Hopeful)
    plan = kp.make_plan(model, recipe, moments)
    looks = [sum(torch.equal(weight, other) for other in estimated) for weight in estimated]
    assert max(looks) == MOST_LOOKS
    for name, layer in plan.layers.items():
        rows = plan.allocation.candidates[name]
        assert sum(row.structure == "kronecker" for row in rows) == MOST_LOOKS
        assert layer.predicted_rise > 1e-9


def test_candidates_and_flops_can_be_limited(tiny_model):
    model = tiny_model("gpt2")
    for changes, holds in [
        ({"candidates": ["kronecker"]}, lambda layer: layer.structure == "kronecker"),
        ({"candidates": ["low_rank"]}, lambda layer: layer.structure == "low_rank"),
        ({"flops_not_above_dense": True}, lambda layer: layer.flops_per_token <= 2 * layer.num_params_dense),
    ]:
        recipe = auto(**changes)
        plan = kp.make_plan(model, recipe, kp.calibrate(model, [WINDOWS], recipe))
        assert plan.layers
        assert all(map(holds, plan.layers.values()))


def test_a_measured_allocation_needs_a_budget_moments_and_weights(tiny_model):
    model, recipe = tiny_model("gpt2"), auto()
    moments = kp.calibrate(model, [WINDOWS], recipe)
    with pytest.raises(kp.RequestError, match="needs moments of every targeted layer"):
        kp.make_plan(model, recipe)
    with pytest.raises(kp.RequestError, match="needs the model's weights"):
        kp.make_plan(model.config, recipe, moments)
    with pytest.raises(kp.RequestError, match="needs a budget"):
        kp.make_plan(model, auto(budget={}), moments)
    with pytest.raises(kp.RequestError, match="enough for every targeted matrix to stay dense"):
        kp.make_plan(model, auto(budget={"kept_of_targets": 1.0}), moments)
    with pytest.raises(kp.RequestError, match="the smallest candidates have"):
        kp.make_plan(model, auto(budget={"kept_of_targets": 0.001}), moments)


def test_an_auto_model_is_saved_without_the_table_and_loads(tiny_model, save_tiny_checkpoint, tmp_path):
    model, recipe = tiny_model("gpt2"), auto()
    student, _ = compressed(model, recipe)
    save_tiny_checkpoint(student, tmp_path)
    loaded = kp.load_model(str(tmp_path)).model
    ids = WINDOWS[:2]
    torch.testing.assert_close(loaded(input_ids=ids).logits, student(input_ids=ids).logits, rtol=0, atol=0)
    assert kp.attached_plan(loaded).allocation.candidates == {}
