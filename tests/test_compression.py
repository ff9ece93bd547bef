"""compress_: honest reports, what is kept of the dense layers, and that a refused call changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from reference.kronecker import discarded_energy, van_loan_squared_error
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kronpress import LayerPlan, Plan, Recipe, RequestError, StructuredLinear, WorkError, compress_, make_plan
from kronpress.matrices import STRUCTURES
from kronpress.surgery import dense_weight, linear_layers, structured_layers, to_dense_, weight_shape

LOW_RANK = {"structure": "low_rank", "spec": {"rank": 2}}
KRONECKER = {"structure": "kronecker", "spec": {"right_shape": [4, 2], "num_terms": 3}}
both = pytest.mark.parametrize("sizes", [LOW_RANK, KRONECKER], ids=["low_rank", "kronecker"])


def gpt2(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = GPT2Config(n_embd=12, n_layer=2, n_head=2, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def sequential(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Sequential:
    """A wide, a tall and a Conv1D layer of 8 and 12 features."""
    torch.manual_seed(0)
    conv = Conv1D(12, 8)
    nn.init.normal_(conv.bias)
    return nn.Sequential(nn.Linear(8, 12, bias=bias), nn.GELU(), nn.Linear(12, 8, bias=bias), conv).to(dtype)


def plan_for(model: nn.Module, sizes: dict[str, Any], targets: str = "blocks") -> Plan:
    return make_plan(model, Recipe(targets=targets, **sizes))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    assert not structured_layers(model)
    assert getattr(getattr(model, "config", None), "quantization_config", None) is None
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0, equal_nan=True)


# ---- what comes out ----


@both
def test_reports_are_those_of_an_independent_computation(sizes: dict[str, Any]) -> None:
    model = gpt2()
    weights = {
        name: layer.weight.detach().double().numpy().T
        for name, layer in model.named_modules()
        if isinstance(layer, Conv1D)
    }
    plan = plan_for(model, sizes)
    reports = compress_(model, plan)
    assert list(reports) == list(plan.layers)
    for name, report in reports.items():
        w, spec = weights[name], plan.layers[name].spec
        if sizes is LOW_RANK:
            squared_error = discarded_energy(w, spec.rank)
        else:
            squared_error = van_loan_squared_error(
                torch.from_numpy(w.copy()), spec.left_shape, spec.right_shape, spec.num_terms
            )
        energy = float((w**2).sum())
        assert report.relative_error == pytest.approx((squared_error / energy) ** 0.5, rel=1e-5)
        assert report.captured_energy == pytest.approx(1 - squared_error / energy, abs=1e-6)
        factors = structured_layers(model)[name].factors
        assert report.num_params == sum(factor.numel() for factor in factors.values())
        assert report.num_params_dense == w.size
        assert report.kept_fraction == report.num_params / report.num_params_dense
        stored = structured_layers(model)[name].to_dense().detach().double().numpy()
        assert np.linalg.norm(w - stored) / np.linalg.norm(w) == pytest.approx(report.relative_error, rel=1e-5)


@pytest.mark.parametrize("structure", ["low_rank", "kronecker"])
@pytest.mark.parametrize("make", [gpt2, sequential])
def test_an_exact_structure_computes_what_the_dense_model_does(structure: str, make: Any) -> None:
    model = make()
    x = torch.randn(3, 8) if make is sequential else torch.arange(10)[None]
    with torch.no_grad():
        before = model(x)[0]
    exact = {}
    for name, layer in linear_layers(model).items():
        if name == "lm_head":
            continue
        shape = weight_shape(layer)
        spec = STRUCTURES[structure].candidate_specs(*shape, 10**6)[0]
        exact[name] = LayerPlan(structure=structure, out_features=shape[0], in_features=shape[1], spec=spec)
    targets = "blocks" if make is gpt2 else ".*"
    plan = plan_for(model, LOW_RANK, targets).model_copy(update={"layers": exact})
    reports = compress_(model, plan)
    assert max(report.relative_error for report in reports.values()) < 1e-5
    with torch.no_grad():
        torch.testing.assert_close(model(x)[0], before, rtol=1e-4, atol=1e-4)


@both
def test_the_compressed_model_is_the_dense_one_with_the_approximated_weights(sizes: dict[str, Any]) -> None:
    dense, compressed = gpt2(), gpt2()
    compress_(compressed, plan_for(compressed, sizes))
    with torch.no_grad():
        for name, layer in structured_layers(compressed).items():
            dense.get_submodule(name).weight.copy_(layer.to_dense().mT)
        ids = torch.arange(12)[None]
        torch.testing.assert_close(compressed(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)


@both
def test_biases_are_kept_as_they_are_and_nothing_else_changes(sizes: dict[str, Any]) -> None:
    model = gpt2()
    before, biases = snapshot(model), {name: layer.bias for name, layer in linear_layers(model).items()}
    plan = plan_for(model, sizes, "mlp")
    compress_(model, plan)
    for name, layer in structured_layers(model).items():
        assert layer.bias is biases[name]
    assert set(structured_layers(model)) == set(plan.layers)
    rest = {name: tensor for name, tensor in before.items() if name.rpartition(".")[0] not in plan.layers}
    after = model.state_dict()
    torch.testing.assert_close({name: after[name] for name in rest}, rest, rtol=0, atol=0)
    assert {name for name in after if name.endswith(".bias")} == {name for name in before if name.endswith(".bias")}


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_module_of_linear_layers_is_compressed_in_its_own_dtype(sizes: dict[str, Any], dtype: torch.dtype) -> None:
    model = sequential(dtype)
    weights = {name: dense_weight(layer).double() for name, layer in linear_layers(model).items()}
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == {"0": (12, 8), "2": (8, 12), "3": (12, 8)}
    plan = plan_for(model, sizes, r"\d")
    reports = compress_(model, plan)
    assert set(reports) == {"0", "2", "3"}
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert plan.num_params == sum(parameter.numel() for parameter in model.parameters())
    assert model(torch.randn(3, 8, dtype=dtype)).dtype == dtype
    for name, layer in structured_layers(model).items():
        # Factors fitted in float64 and rounded once are nearly as good as unrounded ones.
        unrounded = layer.structure.expand(layer.structure.fit(weights[name], layer.spec))
        best_error = ((weights[name] - unrounded).norm() / weights[name].norm()).item()
        assert reports[name].relative_error == pytest.approx(best_error, rel=0.02)


def test_layers_without_bias_stay_without() -> None:
    model = sequential(bias=False)
    compress_(model, plan_for(model, LOW_RANK, "[02]"))
    assert model[0].bias is None
    assert isinstance(model[3], Conv1D)
    assert "0.bias" not in model.state_dict()


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_trainability_and_mode_are_carried_over(requires_grad: bool, training: bool) -> None:
    model = sequential().train(training).requires_grad_(False)
    model[0].weight.requires_grad_(requires_grad)
    model[2].bias.requires_grad_(True)
    compress_(model, plan_for(model, KRONECKER, "[02]"))
    assert {factor.requires_grad for factor in model[0].factors.values()} == {requires_grad}
    assert {factor.requires_grad for factor in model[2].factors.values()} == {False}
    assert (model[0].bias.requires_grad, model[2].bias.requires_grad) == (False, True)
    assert {module.training for module in model.modules()} == {training}


def test_a_zero_weight_has_no_error() -> None:
    model = sequential()
    nn.init.zeros_(model[0].weight)
    report = compress_(model, plan_for(model, KRONECKER, "0"))["0"]
    assert (report.relative_error, report.captured_energy) == (0.0, 1.0)
    assert all(factor.isfinite().all() for factor in model[0].factors.values())


def test_progress_names_every_layer_before_it_is_done() -> None:
    model, seen = sequential(), []
    plan = plan_for(model, LOW_RANK, r"\d")
    compress_(model, plan, progress=lambda *told: seen.append((*told, len(structured_layers(model)))))
    assert seen == [("0", 0, 3, 0), ("2", 1, 3, 1), ("3", 2, 3, 2)]


# ---- and back ----


@both
def test_dense_layers_come_back_in_their_class_with_the_approximated_weight(sizes: dict[str, Any]) -> None:
    model = sequential()
    classes = [type(layer) for layer in model]
    compress_(model, plan_for(model, sizes, r"\d"))
    weights = {name: layer.to_dense().detach() for name, layer in structured_layers(model).items()}
    biases = {name: layer.bias for name, layer in structured_layers(model).items()}
    x = torch.randn(3, 8)
    with torch.no_grad():
        expected = model(x)
    to_dense_(model)
    assert [type(layer) for layer in model] == classes
    for name, layer in linear_layers(model).items():
        assert weight_shape(layer) == tuple(weights[name].shape)
        assert layer.bias is biases[name]
        assert layer.weight.is_contiguous()
        torch.testing.assert_close(dense_weight(layer), weights[name], rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)


# ---- what is refused ----


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_before_anything_is_replaced(value: float) -> None:
    model = gpt2()
    plan = plan_for(model, KRONECKER)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[3, 2] = value
    before = snapshot(model)
    with pytest.raises(WorkError, match=r"'transformer\.h\.1\.mlp\.c_proj'"):
        compress_(model, plan)
    assert_untouched(model, before)


def test_nan_outside_the_targets_is_nobodys_business() -> None:
    model = gpt2()
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[0, 0] = float("nan")
    assert len(compress_(model, plan_for(model, LOW_RANK, "mlp"))) == 4


def test_a_plan_of_another_model_is_refused_with_what_is_there_instead() -> None:
    plan = plan_for(gpt2(), LOW_RANK)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=0)
    wider = AutoModelForCausalLM.from_config(config)
    before = snapshot(wider)
    with pytest.raises(
        RequestError, match=r"another model.*'transformer\.h\.0\.attn\.c_attn' of shape \(36, 12\).*\(48, 16\)"
    ):
        compress_(wider, plan)
    assert_untouched(wider, before)

    shorter = gpt2()
    del shorter.transformer.h[1]
    before = snapshot(shorter)
    with pytest.raises(RequestError, match=r"'transformer\.h\.1\.attn\.c_attn'.*is no linear layer"):
        compress_(shorter, plan)
    assert_untouched(shorter, before)


def test_a_plan_for_the_transposed_shape_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 12))
    plan = plan_for(nn.Sequential(nn.Linear(12, 8)), LOW_RANK, "0")
    with pytest.raises(RequestError, match=r"\(8, 12\).*\(12, 8\)"):
        compress_(model, plan)


def test_a_compressed_model_is_not_compressed_again() -> None:
    model = sequential()
    plan = plan_for(model, LOW_RANK, "0")
    compress_(model, plan)
    with pytest.raises(RequestError, match="stage 1, of another model: this one has been compressed already"):
        compress_(model, plan)
    assert isinstance(model[0], StructuredLinear)


def test_sizes_that_do_not_fit_are_refused_before_anything_is_replaced() -> None:
    model = sequential()
    plan, before = plan_for(model, LOW_RANK, r"\d"), snapshot(model)
    with pytest.raises(ValueError):
        misfit = LayerPlan(structure="low_rank", out_features=8, in_features=12, spec={"rank": 9})
        compress_(model, plan.model_copy(update={"layers": {**plan.layers, "2": misfit}}))
    assert_untouched(model, before)
