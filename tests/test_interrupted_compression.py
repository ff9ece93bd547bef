"""compress_ that is interrupted or fails on its way: what it leaves is a dense model, or has a true plan and loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import kronpress as kp
from kronpress import compression
from kronpress.planning import Totals
from kronpress.surgery import structured_layers

IDS = torch.randint(300, (4, 24), generator=torch.Generator().manual_seed(5))
SUMS = {"structure": "kronecker", "spec": {"right_shape": [2, 2], "num_terms": 1}}
TABLE = {"structure": "kronecker", "spec": {"right_shape": [1, 2], "num_terms": 1}}
RECIPES: dict[str, dict[str, Any]] = {
    "mlp": {"targets": "mlp", **SUMS},
    "all, tied": {"targets": "all", **TABLE},
    "all, untied": {"targets": "all", "head": "dense", **TABLE},
    "folded": {"targets": "mlp", "folding": ["mlp", "residual"], **SUMS},
    "permuted": {"targets": "mlp", **SUMS, "structure": "permuted_kronecker"},
    "rotated": {"targets": "mlp", "rotation": True, "head": "dense", **SUMS},
    "sequential": {
        "targets": "mlp",
        "structure": "low_rank",
        "spec": {"rank": 2},
        "weighting": {"metric": "input", "sequential": True},
        "calibration": {"held_out": 0.0},
    },
}
FIRST: dict[str, dict[str, Any]] = {
    "table": {"targets": "embedding", **TABLE},
    "table, untied": {"targets": "embedding", "head": "dense", **TABLE},
    "mlp": {"targets": "mlp", "structure": "low_rank", "spec": {"rank": 3}},
}
AGAIN = {
    "table": {"targets": "embedding", "structure": "low_rank", "spec": {"rank": 3}},
    "table, untied": {"targets": "all", "head": "dense", "structure": "low_rank", "spec": {"rank": 3}},
    "mlp": {"targets": "all", "structure": "low_rank", "spec": {"rank": 2}},
}


def interrupt_at(number: int) -> Callable[[str, int, int], None]:
    def progress(name: str, done: int, total: int) -> None:
        if done == number:
            raise KeyboardInterrupt

    return progress


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def count(model: nn.Module) -> int:
    return sum({parameter.data_ptr(): parameter.numel() for parameter in model.parameters()}.values())


def num_bytes(model: nn.Module) -> int:
    orders = [buffer for _, buffer in model.named_buffers() if buffer.dtype == torch.int64]
    return 4 * count(model) + 8 * sum(order.numel() for order in orders)


def interrupted(model: PreTrainedModel, wanted: kp.Recipe, number: int, before: kp.Plan | None = None) -> kp.Plan:
    """The plan that was to be carried out when the layer of this number was about to be replaced."""
    moments = None if wanted.weighting.metric == "none" else kp.calibrate(model, [IDS], wanted)
    plan = kp.make_plan(model, wanted, moments, before=before)
    with pytest.raises(KeyboardInterrupt):
        kp.compress_(model, plan, interrupt_at(number), moments=moments, batches=[IDS])
    return plan


def assert_true_and_loadable(model: PreTrainedModel, folder: Path) -> None:
    """What the model's plan says of it is so, its checkpoint is that very model, and it can be made dense."""
    plan = kp.attached_plan(model)
    assert plan is not None
    places = {name for name, layer in plan.layers.items() for name in (name, *layer.heads)}
    assert places == structured_layers(model).keys()
    assert {*plan.new_layers, *plan.before} == plan.layers.keys()
    totals = Totals.of(model)
    assert (plan.num_params, plan.flops_per_token) == (count(model), totals.flops_per_token)
    assert totals.num_params == plan.num_params
    assert plan.bytes == num_bytes(model)
    targeted = [layer.num_params for layer in plan.layers.values()]
    targeted += [model.get_submodule(name).weight.numel() for name in plan.left_dense]
    assert plan.num_params_targets == sum(targeted)
    model.save_pretrained(folder)
    torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(folder)), logits_of(model))
    torch.testing.assert_close(logits_of(kp.to_dense(model)), logits_of(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("name", RECIPES)
def test_what_was_replaced_is_what_the_plan_says_and_what_loads(
    tiny_model: Callable[..., Any], tmp_path: Path, name: str, number: int
) -> None:
    model = tiny_model("gpt2")
    plan = interrupted(model, kp.load_recipe(RECIPES[name]), number)
    assert_true_and_loadable(model, tmp_path)
    partial = kp.attached_plan(model)
    assert partial is not None
    assert partial.new_layers == plan.new_layers[:number]
    assert partial.left_dense == plan.new_layers[number:]
    assert {name: plan.layers[name] for name in partial.layers} == partial.layers


@pytest.mark.parametrize("name", RECIPES)
def test_before_the_first_layer_it_is_a_dense_model_that_computes_what_it_did(
    tiny_model: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    model = tiny_model("gpt2")
    before = logits_of(model)
    interrupted(model, kp.load_recipe(RECIPES[name]), 0)
    assert kp.attached_plan(model) is None and not structured_layers(model)
    torch.testing.assert_close(logits_of(model), before, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text(encoding="utf-8")
    torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), logits_of(model))


@pytest.mark.parametrize(
    ("name", "number"), [("table", 0), *((name, number) for name in ("table, untied", "mlp") for number in (0, 1, 2))]
)
def test_a_later_stage_leaves_what_the_one_before_left_and_what_it_has_done(
    tiny_model: Callable[..., Any], tmp_path: Path, name: str, number: int
) -> None:
    model = tiny_model("gpt2")
    first = kp.make_plan(model, kp.load_recipe(FIRST[name]))
    kp.compress_(model, first)
    before = logits_of(model)
    plan = interrupted(model, kp.load_recipe(AGAIN[name]), number, before=first)
    if not number:
        # Nothing of this stage is there, and what it was to replace is dense.
        torch.testing.assert_close(logits_of(model), before, rtol=1e-4, atol=1e-4)
    if structured_layers(model):
        assert_true_and_loadable(model, tmp_path)
    else:
        assert kp.attached_plan(model) is None
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), logits_of(model))
    assert {*structured_layers(model)} >= {*plan.new_layers[:number]}


def test_a_fit_that_fails_is_told_and_the_layers_before_it_stay(
    tiny_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    plan = kp.make_plan(model, kp.load_recipe(RECIPES["mlp"]))
    replaced: list[str] = []
    replace_layers_ = compression.replace_layers_

    def fail_at_the_third(model: nn.Module, names: list[str], *more: Any) -> Any:
        if len(replaced) == 2:
            raise kp.WorkError(f"{names[0]}: no luck")
        replaced.extend(names)
        return replace_layers_(model, names, *more)

    monkeypatch.setattr(compression, "replace_layers_", fail_at_the_third)
    with pytest.raises(kp.WorkError, match="no luck"):
        kp.compress_(model, plan)
    assert [*structured_layers(model)] == replaced == plan.new_layers[:2]
    assert_true_and_loadable(model, tmp_path)


def test_the_search_for_a_rotation_may_be_interrupted(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    before = logits_of(model)
    said: list[str] = []

    def interrupt(text: str) -> NoReturn:
        said.append(text)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kp.compress_(model, kp.make_plan(model, kp.load_recipe(RECIPES["rotated"])), messages=interrupt)
    assert said[0].startswith("rotating the residual stream: 0 of at most")
    assert kp.attached_plan(model) is None and not structured_layers(model)
    torch.testing.assert_close(logits_of(model), before, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), logits_of(model))


def test_other_modules_keep_the_layers_that_were_replaced() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8))
    plan = kp.make_plan(model, kp.load_recipe({**SUMS, "targets": ["0", "1"]}))
    with pytest.raises(KeyboardInterrupt):
        kp.compress_(model, plan, interrupt_at(1))
    assert [*structured_layers(model)] == ["0"]
    assert kp.to_dense(model)(torch.randn(2, 8)).shape == (2, 8)
