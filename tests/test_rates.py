"""With rates that fit the structure the product moves as a dense weight, however its factors are scaled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference.healing import TOKENS, schedule, with_sums_of_two_terms
from torch import Tensor, nn

import kronpress as kp
from kronpress.healing.optimizers import make_optimizer, parameter_groups
from kronpress.healing.rates import decay_shares, movements, rate_multipliers
from kronpress.layers import StructuredEmbedding, StructuredLayer
from kronpress.matrices import STRUCTURES, Blast, StructuredMatrix, TensorTrain
from kronpress.surgery import healing_parametrizations

SHAPES = ((24, 16), (16, 24), (12, 12), (32, 6))
every_structure = pytest.mark.parametrize("structure", STRUCTURES.values(), ids=list(STRUCTURES))
laws = settings(max_examples=10, deadline=None)
MOVEMENT = schedule(rates="movement", learning_rate=1e-5)


def draw_layer(data: st.DataObject, structure: type[StructuredMatrix], **fixed: Any) -> kp.StructuredLinear:
    """A layer fitted to a random weight, of any size that the structure can have within two thirds of the dense one."""
    m, n = data.draw(st.sampled_from(SHAPES))
    specs = structure.candidate_specs(m, n, 2 * m * n // 3, **fixed)
    assume(specs)
    spec = data.draw(st.sampled_from(specs))
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 2**32))))
    matrix = structure(m, n, spec)
    matrix.load_state_dict(structure.fit(weight, spec))
    return kp.StructuredLinear(matrix, torch.zeros(m))


def draw_gradient(data: st.DataObject, layer: StructuredLayer) -> Tensor:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    return torch.randn(layer.out_features, layer.in_features, generator=generator, dtype=torch.float64)


def jacobian_norms(layer: StructuredLayer) -> dict[str, float]:
    """‖∂W / ∂θ‖ of each factor, number by number."""

    def expanded(name: str, factor: Tensor) -> Tensor:
        return layer.structure.expand({**layer.factors, name: factor})

    return {
        name: torch.autograd.functional.jacobian(lambda f, name=name: expanded(name, f), factor).norm().item()
        for name, factor in layer.named_parameters()
        if name != "bias"
    }


def step_(model: nn.Module, healing: kp.recipe.Healing, gradient: Tensor | None, layer: StructuredLayer) -> Tensor:
    """What one step of AdamW does to W for the loss ⟨gradient, W⟩, or a loss without gradient: W after − W before."""
    before = layer.to_dense().detach()
    optimizer = make_optimizer("adamw", parameter_groups(model, healing, healing.learning_rate))
    loss = (0.0 * layer.to_dense() if gradient is None else gradient * layer.to_dense()).sum()
    loss.backward()
    optimizer.step()
    return (layer.to_dense() - before).detach()


# ---- how far W goes ----


@every_structure
@given(data=st.data())
@laws
def test_movements_of_a_fit_are_the_norms_of_its_jacobians(structure, data):
    layer = draw_layer(data, structure)
    # The terms of an alternation's fit are not orthogonal, and its movements are drawn.
    assert movements(layer) == pytest.approx(jacobian_norms(layer), rel=0.3 if structure is Blast else 1e-3)


@pytest.mark.parametrize("num_cores", [3, 4])
@given(data=st.data())
@laws
def test_movements_of_any_factors_are_about_those_norms(num_cores, data):
    layer = draw_layer(data, TensorTrain, num_cores=num_cores)
    for factor in layer.parameters():
        nn.init.normal_(factor, generator=torch.Generator().manual_seed(factor.numel()))
    assert movements(layer) == pytest.approx(jacobian_norms(layer), rel=0.6)


@every_structure
@given(data=st.data())
@laws
def test_a_step_moves_the_product_as_far_as_a_dense_weight(structure, data):
    layer = draw_layer(data, structure).double()
    num_factors = len(jacobian_norms(layer))
    gradient = draw_gradient(data, layer)
    moved = step_(layer, MOVEMENT, gradient, layer).square().mean().sqrt() / MOVEMENT.learning_rate
    # All factors' parts go down the same loss, and so may help each other: at most √p times.
    assert 0.7 < moved < (1.3 if structure is Blast else 1.05) * num_factors**0.5


@pytest.mark.parametrize("scale", [1e-3, 1e3])
@pytest.mark.parametrize("structure", [kp.matrices.Kronecker, kp.matrices.LowRank, kp.matrices.Monarch])
@given(data=st.data())
@laws
def test_scaling_factors_to_and_fro_changes_nothing(structure, scale, data):
    layer = draw_layer(data, structure).double()
    gradient = 1e6 * draw_gradient(data, layer)  # large enough for AdamW's ε to be nothing beside it
    start = {name: value.clone() for name, value in layer.state_dict().items()}
    steps = []
    for each in (1.0, scale):
        layer.load_state_dict({**start, "weight": each * start["weight"], "right": start["right"] / each})
        layer.zero_grad()
        steps.append([step_(layer, healing, gradient, layer) for healing in (MOVEMENT, schedule(learning_rate=1e-9))])
    (plain, plain_globally), (scaled, scaled_globally) = steps
    torch.testing.assert_close(scaled, plain, rtol=0, atol=1e-2 * plain.abs().max().item())
    assert scaled_globally.norm() > 5 * plain_globally.norm()


def test_at_the_initialisation_of_btt_the_rule_is_theirs():
    m, n, rank = 512, 256, 16
    layer = kp.StructuredLinear(kp.matrices.LowRank(m, n, kp.matrices.LowRank.Spec(rank=rank)))
    nn.init.normal_(layer.weight, std=rank**-0.5)
    nn.init.normal_(layer.right, std=rank**0.5 / n)
    found = rate_multipliers(layer, "movement")
    # d_in of the dense matrix by d_in of the core, and two factors that move at once.
    assert found["weight"].rate == pytest.approx(n / rank / 2**0.5, rel=0.05)
    assert found["right"].rate == pytest.approx(1 / 2**0.5, rel=0.05)


# ---- decay ----


@every_structure
@given(data=st.data())
@laws
def test_the_product_decays_as_a_dense_weight(structure, data):
    layer = draw_layer(data, structure).double()
    before = layer.to_dense().detach()
    change = step_(layer, MOVEMENT.model_copy(update={"weight_decay": 100.0}), None, layer)
    torch.testing.assert_close(change, -1e-3 * before, rtol=0, atol=2e-6 * before.abs().max().item())


def test_each_part_of_a_sum_decays_by_itself():
    parts = [("kronecker", {"left_shape": (12, 8), "right_shape": (2, 2)}), ("selected", {"count": 2, "lines": "rows"})]
    spec = kp.matrices.StructuredSum.Spec(parts=[{"structure": name, "spec": sizes} for name, sizes in parts])
    layer = kp.StructuredLinear(kp.matrices.StructuredSum(24, 16, spec))
    with torch.no_grad():
        layer.weight *= 1e-4  # a part that is small beside the other
    expected = {"weight": 0.5, "part0__kronecker__right": 0.5, "part1__selected__weight": 1.0}
    assert decay_shares(layer) == pytest.approx(expected, abs=1e-3)


def test_a_learnt_scale_is_a_factor(tiny_model):
    model = with_sums_of_two_terms(tiny_model("gpt2"), "adaptive")
    layer = model.transformer.h[0].mlp.c_fc
    with healing_parametrizations(model):
        before = layer.to_dense().detach()
        assert decay_shares(layer) == pytest.approx(dict.fromkeys(movements(layer), 1 / 3), abs=1e-3)
        assert len(movements(layer)) == 3
        change = step_(model, MOVEMENT.model_copy(update={"weight_decay": 100.0}), None, layer)
        torch.testing.assert_close(change, -1e-3 * before, rtol=0, atol=1e-5 * before.abs().max().item())


# ---- of a model ----


def test_one_rate_is_that_of_every_parameter(tiny_compressed):
    model = tiny_compressed("gpt2", "monarch")
    assert rate_multipliers(model, "global") == {}
    matrices, vectors = parameter_groups(model, schedule(weight_decay=0.5), 0.1)
    assert (matrices["lr"], matrices["weight_decay"]) == (0.1, 0.5)
    assert (vectors["lr"], vectors["weight_decay"]) == (0.1, 0.0)
    grouped = [id(each) for group in (matrices, vectors) for each in group["params"]]
    assert sorted(grouped) == sorted(map(id, model.parameters()))
    assert all(each.ndim >= 2 for each in matrices["params"])
    assert all(each.ndim < 2 for each in vectors["params"])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_only_factors_have_rates_of_their_own(tiny_compressed, family):
    model = tiny_compressed(family, "kronecker")
    factors = {
        f"{name}.{factor}" for name, layer in kp.surgery.structured_layers(model).items() for factor in layer.factors
    }
    assert set(rate_multipliers(model, "movement")) == factors
    groups = parameter_groups(model, MOVEMENT, 0.1)
    assert [group["lr"] for group in groups[:2]] == [0.1, 0.1]
    assert len(groups) == 2 + len(factors)


def test_a_tied_head_counts_once():
    matrix = kp.matrices.LowRank(60, 12, kp.matrices.LowRank.Spec(rank=3))
    embedding = StructuredEmbedding(matrix)
    alone = rate_multipliers(nn.ModuleDict({"table": embedding}), "movement")
    tied = rate_multipliers(nn.ModuleDict({"table": embedding, "head": kp.StructuredLinear(matrix)}), "movement")
    assert {name: each.rate for name, each in tied.items()} == pytest.approx(
        {name: each.rate for name, each in alone.items()}
    )


def test_a_shared_factor_has_the_rate_of_all_its_products():
    """Two matrices with one right factor move as the one matrix that they are parts of."""
    stacked = kp.matrices.LowRank(20, 12, kp.matrices.LowRank.Spec(rank=3))
    parts = [kp.matrices.LowRank(10, 12, kp.matrices.LowRank.Spec(rank=3)) for _ in range(2)]
    for part, rows in zip(parts, stacked.weight.detach().split(10), strict=True):
        part.weight, part.right = nn.Parameter(rows), stacked.right
    whole = rate_multipliers(kp.StructuredLinear(stacked), "movement")
    shared = rate_multipliers(nn.ModuleList([kp.StructuredLinear(part) for part in parts]), "movement")
    assert shared["0.right"].rate == pytest.approx(whole["right"].rate, rel=0.2)
    assert "1.right" not in shared
    assert shared["1.weight"].rate == pytest.approx(whole["weight"].rate, rel=0.2)


def test_a_factor_of_no_effect_keeps_the_rate_of_a_dense_weight():
    layer = kp.StructuredLinear(kp.matrices.LowRank(8, 6, kp.matrices.LowRank.Spec(rank=2)))
    nn.init.zeros_(layer.weight)
    found = rate_multipliers(layer, "movement")
    assert found["right"] == (1.0, 0.0)
    assert 0 < found["weight"].rate < 1e3


def test_healing_takes_the_rates(tiny_model, tiny_compressed):
    """After one step each factor has gone by its own rate."""
    model = tiny_compressed("gpt2", "low_rank")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    rates = rate_multipliers(model, "movement")
    kp.heal_(model, None, TOKENS, schedule(max_steps=1, rates="movement", learning_rate=1e-5))
    for name, parameter in model.named_parameters():
        moved = (parameter.detach() - before[name]).abs().max().item()
        assert moved == pytest.approx(1e-5 * rates[name].rate if name in rates else 1e-5, rel=0.05)
