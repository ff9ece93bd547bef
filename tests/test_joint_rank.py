"""Joint rank-k: matrices that read one input share the right factor of their low rank, wherever the model goes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import kronpress as kp
from kronpress.families import FAMILIES, same_input_groups
from kronpress.matrices import JointRank, LowRank
from kronpress.matrices.metric import Metric
from kronpress.surgery import dense_weight, structured_layers, to_dense_

laws = settings(max_examples=25, deadline=None)
IDS = torch.tensor([[7, 281, 3, 90, 90, 14, 255, 1], [9, 8, 7, 6, 5, 4, 3, 2]])
RECIPE = {"name": "joint", "targets": "blocks", "structure": "joint_rank", "budget": {"kept_of_targets": 0.5}}
# What of a block reads the same input, by family.
GROUPS = {
    "gpt2": [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
    "opt": [["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"], ["self_attn.out_proj"], ["fc1"], ["fc2"]],
    "llama": [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ],
}
GROUPS["qwen2"] = GROUPS["llama"]
every_family = pytest.mark.parametrize("family", GROUPS)
with_groups = pytest.mark.parametrize("family", ["opt", "llama", "qwen2"])


def recipe(**changes: Any) -> kp.Recipe:
    return kp.load_recipe({**RECIPE, **changes})


def num_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def calibrated(model: PreTrainedModel, asked: kp.Recipe) -> Any:
    generator = torch.Generator().manual_seed(5)
    return kp.calibrate(model, [torch.randint(300, (4, 32), generator=generator) for _ in range(3)], asked)


def assert_shared(model: nn.Module, plan: kp.Plan) -> None:
    """The layers of a group have one parameter as their right factor, and no others have it."""
    owners = {name: plan.layers[name].shared_with or name for name in plan.layers}
    held: dict[str, set[int]] = {}
    for name, owner in owners.items():
        held.setdefault(owner, set()).add(id(model.get_submodule(name).right))
    assert all(len(each) == 1 for each in held.values())
    assert len({next(iter(each)) for each in held.values()}) == len(held)


def compressed(model: PreTrainedModel, **changes: Any) -> kp.Plan:
    plan = kp.make_plan(model, recipe(**changes))
    kp.compress_(model, plan)
    return plan


def groups_of(plan: kp.Plan) -> list[list[str]]:
    return [[name for name in plan.layers if (plan.layers[name].shared_with or name) == first] for first in plan.layers]


# ---- the mathematics ----


def draw(data: st.DataObject) -> tuple[list[int], int, int, torch.Generator]:
    """out_features of each matrix of a group, their in_features, a rank, and where numbers come from."""
    heights = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4), label="heights")
    width = data.draw(st.integers(1, 9), label="width")
    rank = data.draw(st.integers(1, min(sum(heights), width)), label="rank")
    return heights, width, rank, torch.Generator().manual_seed(data.draw(st.integers(0, 2**32), label="seed"))


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def draw_metric(generator: torch.Generator, heights: list[int], width: int, *, output: bool) -> Metric:
    roots = [normal(generator, size, size) for size in heights]
    c = normal(generator, width, width + 2)
    return Metric(
        c @ c.mT, torch.block_diag(*(root @ root.mT + torch.eye(len(root)) for root in roots)) if output else None
    )


def fitted(weights: list[Tensor], rank: int, metric: Metric | None = None) -> list[dict[str, Tensor]]:
    stacked = torch.cat(weights)
    factors = JointRank.fit(stacked, JointRank.Spec(rank=rank, rows=len(stacked)), metric)
    return JointRank.split(factors, [len(weight) for weight in weights])


@given(data=st.data())
@laws
def test_a_planted_group_is_recovered_by_one_right_factor(data: st.DataObject) -> None:
    heights, width, rank, generator = draw(data)
    v = normal(generator, rank, width)
    weights = [normal(generator, height, rank) @ v for height in heights]
    metric = (
        draw_metric(generator, heights, width, output=data.draw(st.booleans())) if data.draw(st.booleans()) else None
    )
    found = fitted(weights, rank, metric)
    for weight, factors in zip(weights, found, strict=True):
        assert factors["right"] is found[0]["right"]
        # What the metric hardly sees is found less exactly, by its condition.
        atol = 1e-10 if metric is None else 1e-6
        torch.testing.assert_close(JointRank.expand(factors), weight, rtol=0, atol=atol * (1 + weight.norm().item()))


@given(data=st.data(), output=st.booleans())
@laws
def test_the_fit_is_the_truncated_svd_of_all_matrices_in_the_metric(data: st.DataObject, output: bool) -> None:
    """Against G^½ [W_1; ...; W_g] C^½ cut by `torch.linalg.svd`: Σ of the discarded σ² (Eckart & Young 1936)."""
    heights, width, rank, generator = draw(data)
    weights = [normal(generator, height, width) for height in heights]
    metric = draw_metric(generator, heights, width, output=output)
    w_left = torch.linalg.cholesky(metric.output).mT if output else torch.eye(sum(heights), dtype=torch.float64)
    seen = w_left @ torch.cat(weights) @ torch.linalg.cholesky(metric.input)
    sigmas = torch.linalg.svdvals(seen)
    found = torch.cat([JointRank.expand(factors) for factors in fitted(weights, rank, metric)])
    error = metric.squared_norm(torch.cat(weights) - found)
    torch.testing.assert_close(
        error, sigmas[rank:].square().sum().item(), rtol=1e-6, atol=1e-9 * seen.square().sum().item()
    )


@given(data=st.data())
@laws
def test_no_other_factors_of_a_group_are_nearer(data: st.DataObject) -> None:
    heights, width, rank, generator = draw(data)
    weights = [normal(generator, height, width) for height in heights]
    metric = draw_metric(generator, heights, width, output=True)

    def error(factors: list[dict[str, Tensor]]) -> float:
        return metric.squared_norm(torch.cat(weights) - torch.cat([JointRank.expand(each) for each in factors]))

    found = fitted(weights, rank, metric)
    least, slack = error(found), 1e-10 * metric.squared_norm(torch.cat(weights))
    for step in (1e-3, -1e-1, 1.0):
        moved = found[0]["right"] + step * normal(generator, rank, width)
        assert error([{**each, "right": moved} for each in found]) >= least - slack
        for index, each in enumerate(found):
            changed = {**each, "weight": each["weight"] + step * normal(generator, *each["weight"].shape)}
            assert error([*found[:index], changed, *found[index + 1 :]]) >= least - slack


@given(data=st.data(), weighted=st.booleans())
@laws
def test_a_group_of_one_is_of_low_rank(data: st.DataObject, weighted: bool) -> None:
    _, width, _, generator = draw(data)
    height = data.draw(st.integers(1, 9))
    rank = data.draw(st.integers(1, min(height, width)))
    weight, metric = normal(generator, height, width), draw_metric(generator, [height], width, output=True)
    for spec in (JointRank.Spec(rank=rank), JointRank.Spec(rank=rank, rows=height)):
        found = JointRank.fit(weight, spec, metric if weighted else None)
        expected = LowRank.fit(weight, LowRank.Spec(rank=rank), metric if weighted else None)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)


def test_the_rank_may_be_larger_than_one_matrix_but_not_than_the_group() -> None:
    weight = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    factors = JointRank.fit(weight, JointRank.Spec(rank=5, rows=12))
    assert {name: tuple(each.shape) for name, each in factors.items()} == {"weight": (2, 5, 1), "right": (5, 8)}
    torch.testing.assert_close(JointRank.expand(factors), weight)
    for spec, shape in (({"rank": 9, "rows": 12}, (2, 8)), ({"rank": 5}, (4, 8)), ({"rank": 1, "rows": 3}, (4, 8))):
        with pytest.raises(kp.RequestError, match=f"{shape[1]}"):
            JointRank.factor_shapes(*shape, JointRank.Spec(**spec))


@pytest.mark.parametrize("common", [True, False])
def test_whether_one_right_factor_beats_several_of_equal_size_is_up_to_the_matrices(common: bool) -> None:
    """Three matrices of rank 8 with noise: with one row space sharing is better, with three of their own it is not."""
    generator = torch.Generator().manual_seed(1)
    rows = [normal(generator, 8, 48) for _ in range(3)]
    weights = [normal(generator, 48, 8) @ rows[0 if common else i] + 0.1 * normal(generator, 48, 48) for i in range(3)]
    joint_rank, rank = 12, 8
    assert joint_rank * (3 * 48 + 48) == 3 * rank * (48 + 48)
    joint = fitted(weights, joint_rank)
    together = sum((w - JointRank.expand(each)).square().sum() for w, each in zip(weights, joint, strict=True))
    alone = sum((w - LowRank.expand(LowRank.fit(w, LowRank.Spec(rank=rank)))).square().sum() for w in weights)
    assert (together < 0.95 * alone) if common else (alone < 0.5 * together)


# ---- groups of a model ----


@every_family
def test_the_groups_of_a_family_are_what_reads_the_same_input(family: str, tiny_model: Callable[..., Any]) -> None:
    """By what each layer really reads, as the model runs."""
    model = tiny_model(family)
    plan = kp.make_plan(model, recipe())
    assert [names for names in groups_of(plan) if names] == [
        [f"{FAMILIES[family].blocks}.{number}.{local}" for local in group]
        for number in (0, 1)
        for group in GROUPS[family]
    ]
    read: dict[str, Tensor] = {}
    for name in plan.layers:
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: read.update({name: inputs[0]}))
    logits_of(model)
    for names in groups_of(plan):
        for name in names:
            torch.testing.assert_close(read[name], read[names[0]], rtol=0, atol=0)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_role_of_every_family_is_in_one_group(family: str) -> None:
    names = [
        f"{FAMILIES[family].blocks}.{number}.{local}" for number in (0, 11) for local in FAMILIES[family].roles.values()
    ]
    groups = same_input_groups([*names, "lm_head"], family)
    assert sorted(name for group in groups for name in group) == sorted([*names, "lm_head"])
    assert all(len({name.partition(".self_attn")[0].partition(".mlp")[0] for name in group}) == 1 for group in groups)
    assert same_input_groups(names, None) == [[name] for name in names]


@every_family
def test_a_plan_counts_the_shared_factor_once(family: str, tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_model(family)
    dense = num_params(model)
    plan = compressed(model)
    targeted = kept = 0
    for names in groups_of(plan):
        if names:
            heights = [plan.layers[name].out_features for name in names]
            width, rank = plan.layers[names[0]].in_features, plan.layers[names[0]].spec.rank
            assert sum(plan.layers[name].num_params for name in names) == rank * (sum(heights) + width)
            # No rank more fits into the group's share of the budget.
            assert rank * (sum(heights) + width) <= sum(heights) * width // 2 < (rank + 1) * (sum(heights) + width)
            kept += rank * (sum(heights) + width)
            targeted += sum(heights) * width
    assert (plan.num_params_targets, plan.num_params_targets_dense) == (kept, targeted)
    assert plan.num_params == num_params(model) == dense - targeted + kept
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {key: file.get_tensor(key).numel() for key in file.keys()}  # noqa: SIM118
    assert sum(stored.values()) == plan.num_params
    assert sum(key.endswith(".right") for key in stored) == sum(bool(names) for names in groups_of(plan))


@with_groups
def test_each_matrix_is_its_rows_of_the_best_for_all(family: str, tiny_model: Callable[..., Any]) -> None:
    model, dense = tiny_model(family).double(), tiny_model(family).double()
    plan = compressed(model)
    for names in groups_of(plan):
        if names:
            w = torch.cat([dense_weight(dense.get_submodule(name)) for name in names])
            u, s, v = torch.linalg.svd(w, full_matrices=False)
            rank = plan.layers[names[0]].spec.rank
            best = (u[:, :rank] * s[:rank]) @ v[:rank]
            found = torch.cat([model.get_submodule(name).to_dense() for name in names])
            torch.testing.assert_close(found.detach(), best, rtol=0, atol=1e-10)


@pytest.mark.parametrize("metric", ["none", "input", "loss"])
def test_a_fused_projection_is_of_low_rank(metric: str, tiny_model: Callable[..., Any]) -> None:
    models = []
    for structure in ("joint_rank", "low_rank"):
        model = tiny_model("gpt2")
        asked = recipe(structure=structure, weighting={"metric": metric})
        plan = kp.make_plan(model, asked)
        kp.compress_(model, plan, moments=None if metric == "none" else calibrated(model, asked))
        models.append((model, plan))
    assert models[0][1].num_params == models[1][1].num_params
    torch.testing.assert_close(logits_of(models[0][0]), logits_of(models[1][0]), rtol=0, atol=0)


def test_grouped_keys_have_a_rank_above_their_own_size(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama", num_key_value_heads=1)
    plan = compressed(model, budget={"kept_of_targets": 0.6})
    key = plan.layers["model.layers.0.self_attn.k_proj"]
    assert key.spec.rank > key.out_features == 4
    assert_shared(model, plan)
    assert num_params(model) == plan.num_params


@with_groups
@pytest.mark.parametrize("metric", ["input", "loss"])
def test_the_output_error_of_a_group_is_the_least(family: str, metric: str, tiny_model: Callable[..., Any]) -> None:
    """tr(G ΔW C ΔWᵀ) of all its matrices, written out with the measured moments of each."""
    model, dense = tiny_model(family).double(), tiny_model(family).double()
    asked = recipe(weighting={"metric": metric})
    moments = calibrated(model, asked)
    plan = kp.make_plan(model, asked)
    kp.compress_(model, plan, moments=moments)
    for names in groups_of(plan):
        if len(names) < 2:
            continue
        error, seen = 0.0, []
        for name in names:
            w, c, g = dense_weight(dense.get_submodule(name)), moments[name].second, moments[name].gradient
            torch.testing.assert_close(c, moments[names[0]].second, rtol=0, atol=0)
            values, vectors = torch.linalg.eigh(g if metric == "loss" else torch.eye(len(w), dtype=torch.float64))
            root = (vectors * values.clamp(min=0).sqrt()) @ vectors.mT
            error += (
                (root @ (w - model.get_submodule(name).to_dense().detach()) @ torch.linalg.cholesky(c)).square().sum()
            )
            seen.append(root @ w @ torch.linalg.cholesky(c))
        sigmas = torch.linalg.svdvals(torch.cat(seen)).square()
        rank = plan.layers[names[0]].spec.rank
        torch.testing.assert_close(error, sigmas[rank:].sum(), rtol=1e-4, atol=1e-9 * sigmas.sum().item())


def test_biases_take_up_the_mean_error_of_each_matrix(tiny_model: Callable[..., Any]) -> None:
    model, dense = tiny_model("opt").double(), tiny_model("opt").double()
    asked = recipe(weighting={"metric": "input", "bias_correction": True})
    moments = calibrated(model, asked)
    plan = kp.make_plan(model, asked)
    kp.compress_(model, plan, moments=moments)
    for name in plan.layers:
        layer, before = model.get_submodule(name), dense.get_submodule(name)
        mean = moments[name].mean
        expected = before.weight @ mean + before.bias
        torch.testing.assert_close(layer.to_dense() @ mean + layer.bias, expected)


def test_groups_are_fitted_to_the_inputs_that_they_will_get(tiny_model: Callable[..., Any]) -> None:
    model, plain = tiny_model("llama"), tiny_model("llama")
    batches = [torch.randint(300, (4, 32), generator=torch.Generator().manual_seed(5))]
    asked = recipe(weighting={"metric": "input", "sequential": True})
    plan = kp.make_plan(model, asked)
    kp.compress_(model, plan, moments=kp.calibrate(model, batches, asked), batches=batches)
    asked = recipe(weighting={"metric": "input"})
    kp.compress_(plain, kp.make_plan(plain, asked), moments=kp.calibrate(plain, batches, asked))
    assert_shared(model, plan)
    first, last = "model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj"
    torch.testing.assert_close(
        model.get_submodule(first).to_dense(), plain.get_submodule(first).to_dense(), rtol=1e-3, atol=1e-4
    )
    assert (model.get_submodule(last).to_dense() - plain.get_submodule(last).to_dense()).abs().max() > 1e-3


# ---- sharing, wherever the model goes ----


@with_groups
def test_sharing_survives_saving_copying_casting_and_training(
    family: str, tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny_model(family)
    plan = compressed(model)
    assert_shared(model, plan)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert kp.Plan.model_validate(json.loads(plan.model_dump_json())) == plan
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=0, atol=0)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    tokens = torch.randint(300, (512,), generator=torch.Generator().manual_seed(2))
    healed = copy.deepcopy(model)
    kp.heal_(
        healed,
        tiny_model(family),
        tokens,
        kp.load_recipe(
            {"healing": {"max_steps": 2, "sequences_per_step": 2, "sequence_length": 32, "learning_rate": 1e-2}}
        ).healing,
    )
    for other in (
        loaded,
        AutoModelForCausalLM.from_pretrained(again),
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16),
        copy.deepcopy(model),
        copy.deepcopy(model).to(torch.bfloat16),
        copy.deepcopy(model).half(),
        healed,
    ):
        assert_shared(other, plan)
        assert num_params(other) == plan.num_params
    name = next(name for name, layer in plan.layers.items() if layer.shared_with is not None)
    assert not torch.equal(healed.get_submodule(name).right, model.get_submodule(name).right)
    body = AutoModel.from_pretrained(tmp_path)
    assert num_params(body) == num_params(getattr(model, model.base_model_prefix))


def test_the_gradient_of_the_shared_factor_is_the_sum_over_the_group(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama").double()
    plan = compressed(model)
    names = ["q_proj", "k_proj", "v_proj"]
    apart = copy.deepcopy(model)
    attention = apart.model.layers[0].self_attn
    for name in names:
        layer = getattr(attention, name)
        layer.right = nn.Parameter(layer.right.detach().clone())
    for each in (model, apart):
        each(input_ids=IDS, labels=IDS).loss.backward()
    shared = model.model.layers[0].self_attn.k_proj.right
    torch.testing.assert_close(shared.grad, sum(getattr(attention, name).right.grad for name in names))
    assert all(getattr(attention, name).right.grad.abs().max() > 0 for name in names)
    assert_shared(model, plan)


@with_groups
def test_a_dense_export_is_an_ordinary_model(family: str, tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model, original = tiny_model(family), tiny_model(family)
    compressed(model)
    dense = kp.to_dense(model)
    assert not structured_layers(dense)
    assert dense.all_tied_weights_keys == original.all_tied_weights_keys
    dense.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() <= original.state_dict().keys()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("local", ["q_proj", "k_proj", "v_proj"])
def test_the_others_share_on_when_one_is_made_dense(local: str, tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_model("llama")
    plan = compressed(model)
    expected, name = logits_of(model), f"model.layers.1.self_attn.{local}"
    to_dense_(model, [name])
    left = plan.without([name], 0)
    assert left.num_params == num_params(model)
    assert_shared(model, left)
    for ties in (model._tied_weights_keys, model.all_tied_weights_keys):
        shared = {key: source for key, source in ties.items() if key.endswith(".right")}
        assert len(shared) == 2 * 3 - 1
        assert all(model.get_parameter(key) is model.get_parameter(source) for key, source in shared.items())
    kp.checkpoint.attach_plan_(model, left)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_shared(loaded, left)
    assert num_params(loaded) == left.num_params
    torch.testing.assert_close(logits_of(loaded), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("again", [r".*\.(q_proj)", r".*\.(k|v)_proj", r".*self_attn\..*"])
def test_a_later_stage_may_take_a_part_of_a_group(again: str, tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_model("llama")
    stages = kp.load_recipe(
        {
            "structure": "joint_rank",
            "stages": [
                {"share": 0.5, "targets": "attention", "budget": {"kept_of_targets": 0.7}},
                {"share": 0.5, "targets": [again], "budget": {"kept_of_targets": 0.4}},
            ],
        }
    )
    by_shapes = kp.make_plan(model.config, stages)
    plan = None
    for part in stages.parts:
        plan = kp.make_plan(model, part, before=plan)
        kp.compress_(model, plan)
        assert plan.num_params == num_params(model)
        assert plan.num_params_targets == sum(layer.num_params for layer in plan.layers.values())
        assert_shared(model, plan)
    assert by_shapes == plan
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_shared(loaded, plan)
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=0, atol=0)


def test_a_checkpoint_without_the_shared_factor_is_refused(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_model("llama")
    compressed(model)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.right"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(kp.WorkError, match=r"self_attn\.q_proj\.right is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_streaming_writes_what_compress_does(family: str, tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "dense")
    plan = kp.make_plan(model, recipe())
    reports = kp.compress_streaming(tmp_path / "dense", plan, tmp_path / "out", max_shard_bytes=4000)
    assert kp.compress_(model, plan) == reports
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_shared(loaded, plan)
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=0, atol=0)


def test_random_factors_have_the_variance_of_each_dense_matrix(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama", hidden_size=256, num_hidden_layers=1, intermediate_size=256)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.k_proj.weight *= 5
    stds = {name: getattr(attention, name).weight.std().item() for name in ("q_proj", "k_proj", "v_proj")}
    plan = kp.make_plan(model, recipe())
    kp.compression.initialise_(model, plan)
    assert_shared(model, plan)
    for name, std in stds.items():
        assert getattr(model.model.layers[0].self_attn, name).to_dense().std().item() == pytest.approx(std, rel=0.1)


# ---- the recipe, and a measured allocation ----


@pytest.mark.parametrize("kept", [0.3, 0.5, 0.9])
def test_a_measured_allocation_gives_each_group_its_rank(kept: float, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    asked = recipe(allocation="measured", weighting={"metric": "loss"}, budget={"kept_of_targets": kept})
    moments = calibrated(model, asked)
    plan = kp.make_plan(model, asked, moments)
    uniform = kp.make_plan(model, recipe(weighting={"metric": "loss"}, budget={"kept_of_targets": kept}))
    assert plan.num_params_targets <= kept * plan.num_params_targets_dense

    def rise(of: kp.Plan) -> float:
        student = tiny_model("llama")
        kp.compress_(student, of, moments=moments)
        return sum(
            Metric(moments[name].second, moments[name].gradient).squared_norm(
                dense_weight(model.get_submodule(name)) - dense_weight(student.get_submodule(name))
            )
            for name in uniform.layers
        )

    assert rise(plan) <= rise(uniform) * (1 + 1e-6)
    # What the plan predicts is what the fits then cost.
    assert rise(plan) / 2 == pytest.approx(plan.allocation.predicted_rise, rel=1e-3, abs=1e-9)
    kp.compress_(model, plan, moments=moments)
    assert num_params(model) == plan.num_params
    assert_shared(model, plan)
    dense = [name for name in uniform.layers if name not in plan.layers]
    assert sorted(plan.allocation.kept_dense) == sorted(dense)


def test_the_least_budget_is_told_and_can_be_met(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    with pytest.raises(kp.RequestError, match="the least possible is") as error:
        kp.make_plan(model, recipe(budget={"kept_of_targets": 0.01}))
    least = int(str(error.value).split("the least possible is ")[1].split()[0])
    targets = kp.make_plan(model, recipe()).num_params_targets_dense
    assert kp.make_plan(model, recipe(budget={"kept_of_targets": (least + 0.5) / targets})).num_params_targets <= least


def test_the_recipe_is_the_published_one_and_can_be_weighted() -> None:
    published = kp.load_recipe("joint-rank-k")
    assert (published.structure, published.weighting.metric) == ("joint_rank", "none")
    weighted = kp.load_recipe(
        "joint-rank-k", ["weighting.metric=input", "targets=attention", "budget.kept_of_targets=0.5"]
    )
    assert (weighted.weighting.metric, weighted.targets) == ("input", "attention")


def test_a_choice_between_a_group_and_its_matrices_is_refused() -> None:
    mixed = {**RECIPE, "structure": "auto", "candidates": ["low_rank", "joint_rank"], "allocation": "measured"}
    with pytest.raises(kp.RequestError, match="joint_rank is chosen for several matrices at once"):
        kp.load_recipe({**mixed, "weighting": {"metric": "loss"}})
