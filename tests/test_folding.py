"""Folded permutations: logits stay, weights move as they should, and what cannot be folded is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples.matrices import order_within
from samples.networks import CONFIGS, network, some_tokens
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from kronpress import RequestError
from kronpress.calibration import calibrate
from kronpress.families import FAMILIES
from kronpress.folding import RESIDUALS, FreeDimension, fold_, free_dimensions, permuted_moments, search_orders
from kronpress.layers import StructuredEmbedding, StructuredLinear
from kronpress.matrices import PermutedKronecker
from kronpress.matrices.metric import Metric, metric_of
from kronpress.matrices.moments import InputMoments
from kronpress.matrices.permutation import nearest_permuted_sum
from kronpress.recipe import load_recipe
from kronpress.surgery import dense_weight, replace_module_

TOKENS = some_tokens(2, 12)
families = pytest.mark.parametrize("family", CONFIGS)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(TOKENS).logits


def test_every_family_is_covered() -> None:
    assert set(CONFIGS) == set(RESIDUALS) == set(FAMILIES)


@families
def test_the_logits_stay_and_every_use_moves(family: str) -> None:
    model = network(family)
    before = logits(model)
    dimensions = free_dimensions(model)
    assert list(dimensions) == ["mlp.0", "value.0", "mlp.1", "value.1", "residual"]
    for name, dimension in dimensions.items():
        old = {
            use.module: [each.clone() for each in model.get_submodule(use.module).parameters()]
            for use in dimension.uses
        }
        fold_(model, dimension, order_within(dimension.labels, len(name)))
        for module, parameters in old.items():
            assert not torch.equal(parameters[0], next(model.get_submodule(module).parameters())), (name, module)
        torch.testing.assert_close(
            logits(model), before, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "qwen2"])
def test_in_single_precision_the_logits_stay_within_a_hundred_thousandth(family: str, tiny_model: Any) -> None:
    model = tiny_model(family)
    before = logits(model)
    for dimension in free_dimensions(model).values():
        fold_(model, dimension, order_within(dimension.labels))
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5 * before.abs().max().item())


@families
def test_the_inverse_order_gives_the_model_back(family: str) -> None:
    model, untouched = network(family), network(family)
    for dimension in free_dimensions(model).values():
        order = order_within(dimension.labels)
        fold_(model, dimension, order)
        fold_(model, dimension, order.argsort())
    for name, parameter in untouched.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


def renumbered(order: Tensor, size: int, start: int = 0) -> Tensor:
    """The channels of a layer of which those from `start` on are the units."""
    source = torch.arange(size)
    source[start : start + len(order)] = start + order
    return source


def test_units_move_as_the_order_says() -> None:
    """By the definition, what was order[u] becomes u: in GPT-2's transposed layers, and in c_attn's last third."""
    model, old = network("gpt2"), network("gpt2").transformer.h[1]
    dimensions = free_dimensions(model)
    hidden, value = (order_within(dimensions[name].labels) for name in ("mlp.1", "value.1"))
    fold_(model, dimensions["mlp.1"], hidden)
    fold_(model, dimensions["value.1"], value)
    new = model.transformer.h[1]
    torch.testing.assert_close(dense_weight(new.mlp.c_fc), dense_weight(old.mlp.c_fc)[hidden])
    torch.testing.assert_close(new.mlp.c_fc.bias, old.mlp.c_fc.bias[hidden])
    torch.testing.assert_close(dense_weight(new.mlp.c_proj), dense_weight(old.mlp.c_proj)[:, hidden])
    torch.testing.assert_close(new.mlp.c_proj.bias, old.mlp.c_proj.bias)
    in_qkv = renumbered(value, 48, start=32)
    torch.testing.assert_close(dense_weight(new.attn.c_attn), dense_weight(old.attn.c_attn)[in_qkv])
    torch.testing.assert_close(new.attn.c_attn.bias, old.attn.c_attn.bias[in_qkv])
    torch.testing.assert_close(dense_weight(new.attn.c_proj), dense_weight(old.attn.c_proj)[:, value])


@given(seed=st.integers(0, 2**32))
@settings(max_examples=10, deadline=None)
def test_two_orders_one_after_the_other_are_one(seed: int) -> None:
    twice, once = network("llama"), network("llama")
    dimension = free_dimensions(twice)["residual"]
    first, second = order_within(dimension.labels, seed), order_within(dimension.labels, seed + 1)
    fold_(twice, dimension, first)
    fold_(twice, dimension, second)
    fold_(once, dimension, first[second])
    for name, parameter in once.named_parameters():
        assert torch.equal(twice.get_parameter(name), parameter), name


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_across_heads_and_in_one_use_alone_the_logits_change(family: str) -> None:
    """So that the labels and every use are needed."""
    dimension = free_dimensions(network(family))["value.0"]
    across = order_within(torch.zeros_like(dimension.labels))
    uses = [(use,) for use in dimension.uses]
    for wrong in (replace(dimension, labels=torch.zeros_like(across)), *(replace(dimension, uses=use) for use in uses)):
        model = network(family)
        before = logits(model)
        fold_(model, wrong, order_within(wrong.labels) if len(wrong.uses) == 1 else across)
        assert (logits(model) - before).abs().max() > 1e-3


def test_a_fit_after_the_fold_is_the_permuted_fit() -> None:
    """What the search finds for the rows of one layer is free at run time."""
    model = network("opt")
    before, layer = logits(model), model.model.decoder.layers[0].fc1
    shapes = ((12, 8), (2, 2))
    found = nearest_permuted_sum(layer.weight, *shapes, columns=False)
    assert found.captured[-1] > found.captured[0]
    fold_(model, free_dimensions(model)["mlp.0"], found.row_order)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-9)
    in_order = nearest_permuted_sum(layer.weight, *shapes, rows=False, columns=False)
    assert in_order.captured[-1] == pytest.approx(found.captured[-1], abs=1e-9)


def test_orders_that_are_none_or_cross_a_label_are_refused_and_nothing_moves() -> None:
    model = network("llama")
    value = free_dimensions(model)["value.0"]
    before = logits(model)
    for order in (torch.zeros(8, dtype=torch.int64), torch.arange(7), torch.arange(9)):
        with pytest.raises(RequestError, match="the order is no permutation of the dimension's 8 units"):
            fold_(model, value, order)
    with pytest.raises(RequestError, match="units to places of another label, as from one head to another"):
        fold_(model, value, torch.arange(8).flip(0))
    assert torch.equal(logits(model), before)


def test_models_that_are_not_known_are_refused(tiny_compressed: Any) -> None:
    with pytest.raises(RequestError, match=r"unknown model type 'gpt_neo'.*Allowed: gpt2, opt"):
        free_dimensions(tiny_of_no_family())
    with pytest.raises(RequestError, match=r"the gpt2 model has no module 'transformer\.h': give one with its head"):
        free_dimensions(network("gpt2", make=AutoModel))
    compressed = tiny_compressed("llama", "low_rank")
    with pytest.raises(RequestError, match=r"gate_proj is a StructuredLinear that stores no row_order: permutations"):
        fold_(compressed, free_dimensions(compressed)["mlp.0"], torch.arange(48))
    headless = network("llama")
    headless.model.layers[1].mlp.down_proj = nn.Identity()
    with pytest.raises(RequestError, match=r"mlp\.down_proj should be a linear layer, and it is a Identity"):
        free_dimensions(headless)
    with pytest.raises(RequestError, match=r"the opt model has model\.decoder\.project_out, which is not in"):
        free_dimensions(network("opt", word_embed_proj_dim=8))
    with_adapter = network("llama")
    with_adapter.model.layers[1].mlp.adapter = nn.Linear(16, 16)
    with pytest.raises(RequestError, match=r"the llama model has model\.layers\.1\.mlp\.adapter, which is not in"):
        free_dimensions(with_adapter)
    without_norm = network("llama")
    del without_norm.model.layers[0].input_layernorm
    with pytest.raises(RequestError, match=r"the llama model lacks model\.layers\.0\.input_layernorm, which is in"):
        free_dimensions(without_norm)
    model = network("llama")
    dimension = free_dimensions(model)["mlp.0"]
    model.model.layers[0].mlp.up_proj = nn.Bilinear(2, 2, 2)
    with pytest.raises(
        RequestError, match=r"mlp\.up_proj is a Bilinear: permutations are folded into dense layers only"
    ):
        fold_(model, dimension, order_within(dimension.labels))


def tiny_of_no_family() -> PreTrainedModel:
    config = AutoConfig.for_model(
        "gpt_neo", vocab_size=64, hidden_size=16, num_layers=1, num_heads=2, attention_types=[[["global"], 1]]
    )
    return AutoModelForCausalLM.from_config(config)


# ---- layers that store orders of their own ----


def permuted(layer: nn.Module, rows: bool, columns: bool, seed: int = 0) -> nn.Module:
    """The layer that computes as this one, its weight (out, in) or table as one Kronecker product in random orders."""
    weight = dense_weight(layer)
    m, n = weight.shape
    spec = PermutedKronecker.Spec(left_shape=(m, n), right_shape=(1, 1), rows=rows, columns=columns)
    generator, factors = torch.Generator().manual_seed(seed), {"right": torch.ones(1, 1, 1, dtype=weight.dtype)}
    row_order, column_order = torch.randperm(m, generator=generator), torch.randperm(n, generator=generator)
    if rows:
        factors["row_order"], weight = row_order, weight[row_order.argsort()]
    if columns:
        factors["column_order"], weight = column_order, weight[:, column_order]
    matrix = PermutedKronecker(m, n, spec, dtype=weight.dtype)
    matrix.load_state_dict({"weight": weight[:, None], **factors})
    if isinstance(layer, nn.Embedding):
        return StructuredEmbedding(matrix)
    return StructuredLinear(matrix, layer.bias)


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3"])
def test_stored_orders_pass_a_permutation_on(family: str) -> None:
    """Through all layers of a block and the embedding, of which some permute both sides, with nothing refitted."""
    model = network(family, tie_word_embeddings=False)
    before = logits(model)
    dimensions = free_dimensions(model)
    layers = {use.module for name, each in dimensions.items() if "1" not in name for use in each.uses}
    embeddings = (nn.Embedding,) if family == "llama" else ()
    for seed, name in enumerate(sorted(layers)):
        layer = model.get_submodule(name)
        if getattr(layer, "weight", torch.zeros(1)).ndim == 2 and (".0." in name or isinstance(layer, embeddings)):
            replace_module_(model, name, permuted(layer, not isinstance(layer, embeddings), True, seed))
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    for dimension in free_dimensions(model).values():
        fold_(model, dimension, order_within(dimension.labels))
        torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)


def test_a_stored_order_of_the_other_side_does_not_pass_it_on_and_nothing_moves() -> None:
    model = network("opt")
    replace_module_(model, "model.decoder.layers.0.fc2", permuted(model.model.decoder.layers[0].fc2, True, False))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dimension = free_dimensions(model)["mlp.0"]
    with pytest.raises(RequestError, match=r"fc2 is a StructuredLinear that stores no column_order"):
        fold_(model, dimension, order_within(dimension.labels))
    with pytest.raises(RequestError, match=r"fc2 is a StructuredLinear that stores no column_order"):
        search_orders(model, ["mlp"], {"model.decoder.layers.0.fc1": ((12, 8), (2, 2), 1)})
    for name, tensor in model.state_dict().items():
        assert torch.equal(before[name], tensor), name


# ---- the search ----


def planned_for(model: PreTrainedModel, num_terms: int = 1) -> dict[str, Any]:
    """Blocks of 2×2 for every layer that uses a free dimension with a weight, the embeddings' of 1×2."""
    planned = {}
    for dimension in free_dimensions(model).values():
        for use in dimension.uses:
            layer = model.get_submodule(use.module)
            if isinstance(layer, nn.Embedding):
                planned[use.module] = (layer.weight.shape[0], layer.weight.shape[1] // 2), (1, 2), num_terms
            elif layer.weight.ndim == 2 and use.module != "lm_head":
                m, n = dense_weight(layer).shape
                planned[use.module] = (m // 2, n // 2), (2, 2), num_terms
    return planned


def captured(model: PreTrainedModel, planned: dict[str, Any], dimension: FreeDimension) -> float:
    """The sum over the layers that use it of the fraction of ‖W‖² that the nearest sums capture as the model stands."""
    found = 0.0
    for use in dimension.uses:
        if use.module in planned:
            weight = dense_weight(model.get_submodule(use.module))
            found += nearest_permuted_sum(weight, *planned[use.module], rows=False, columns=False).captured[-1]
    return found


@families
def test_searched_orders_lose_in_no_dimension_and_leave_model_and_logits(family: str) -> None:
    model = network(family)
    before, untouched = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    planned, dimensions = planned_for(model), free_dimensions(model)
    orders = search_orders(model, ["residual", "mlp", "value"], planned)
    for name, tensor in model.state_dict().items():
        assert torch.equal(untouched[name], tensor), name
    assert list(orders) == ["residual", "mlp.0", "mlp.1", "value.0", "value.1"]
    gains = []
    for name, order in orders.items():
        reached = captured(model, planned, dimensions[name])
        fold_(model, dimensions[name], order)
        gains.append(captured(model, planned, dimensions[name]) - reached)
    assert min(gains) >= -1e-9 and max(gains) > 0.1, gains
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    again = search_orders(network(family), ["residual", "mlp", "value"], planned)
    assert all(torch.equal(again[name], order) for name, order in orders.items())


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "phi3"])
def test_a_planted_order_of_units_is_found_again(family: str) -> None:
    """The units of the MLP in both layers, of which the writers are products; in phi3 both copies of each unit."""
    model = network(family)
    dimension = free_dimensions(model)["mlp.0"]
    writers, readers = ([use for use in dimension.uses if use.side == side] for side in ("out", "in"))
    planned = {}
    for seed, use in enumerate(writers):
        layer = model.get_submodule(use.module)
        m, n = dense_weight(layer).shape
        generator = torch.Generator().manual_seed(seed)
        a, b = (torch.randn(shape, generator=generator).double() for shape in ((m // 4, n // 2), (4, 2)))
        dense_weight(layer).copy_(torch.kron(a, b))
        planned[use.module] = (m // 4, n // 2), (4, 2), 1
    fold_(model, dimension, order_within(dimension.labels))
    down = readers[0].module
    m, n = dense_weight(model.get_submodule(down)).shape
    # It has places of its own kind, and barely counts.
    planned[down] = (m // 2, n // 2), (2, 2), 1
    model.get_submodule(down).weight.detach().mul_(1e-3)
    metrics = {use.module: Metric() for use in dimension.uses}
    assert captured(model, planned, replace(dimension, uses=tuple(writers))) < 0.9 * len(writers)
    fold_(model, dimension, search_orders(model, ["mlp"], planned, metrics.get)["mlp.0"])
    assert captured(model, planned, replace(dimension, uses=tuple(writers))) > len(writers) - 1e-4


def test_orders_are_searched_only_where_a_planned_layer_sees_them() -> None:
    model = network("llama")
    assert search_orders(model, ["mlp", "value", "residual"], {}) == {}
    down, every = "model.layers.1.mlp.down_proj", ("mlp", "value", "residual")
    assert list(search_orders(model, every, {down: ((8, 12), (2, 2), 1)})) == ["mlp.1", "residual"]
    # A single place, or a single group, has no order.
    blind = search_orders(model, every, {down: ((16, 24), (1, 1), 1)})
    assert [order.tolist() for order in blind.values()] == [list(range(24)), list(range(16))]


def test_requests_for_orders_that_cannot_be_met_are_refused() -> None:
    model = network("opt")
    with pytest.raises(RequestError, match=r"unknown free dimension 'values': did you mean 'value'"):
        search_orders(model, ["values"], {})
    with pytest.raises(RequestError, match=r"searched for 'fc9', and the model has no layer of that name"):
        search_orders(model, ["mlp"], {"fc9": ((12, 8), (2, 2), 1)})
    with pytest.raises(RequestError, match=r"left_shape 8×12 ⊗ right_shape 2×2 is 16×24, not the matrix's 24×16"):
        search_orders(model, ["mlp"], {"model.decoder.layers.0.fc1": ((8, 12), (2, 2), 1)})


# ---- moments ----


def measured(model: PreTrainedModel) -> Any:
    recipe = load_recipe(
        {
            "name": "tiny",
            "targets": "blocks",
            "structure": "low_rank",
            "budget": {"kept_of_targets": 0.5},
            "weighting": {"metric": "loss"},
            "calibration": {"held_out": 0.5, "sensitivity": True},
        }
    )
    return calibrate(model, [TOKENS, TOKENS.flip(0)], recipe)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "phi3"])
def test_a_calibration_after_the_fold_equals_the_permuted_moments(family: str) -> None:
    model = network(family, initializer_range=0.3) if family != "opt" else network(family, init_std=0.3)
    moments = before = measured(model)
    for dimension in free_dimensions(model).values():
        order = order_within(dimension.labels)
        fold_(model, dimension, order)
        moments = permuted_moments(moments, dimension, order)
    again = measured(model)
    # RMSNorm computes in single precision.
    tolerance = 1e-6 if family in ("gpt2", "opt") else 1e-5
    assert list(moments) == list(again) == list(before) and len(moments) == len(before)
    for name, expected in again.items():
        assert name in moments
        for part in ("second", "mean", "magnitude", "gradient", "held_out"):
            found, wanted = getattr(moments[name], part), getattr(expected, part)
            assert (found is None) == (wanted is None)
            if wanted is not None:
                torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item())
        assert moments[name].num_tokens == expected.num_tokens
        assert not torch.equal(moments[name].second, before[name].second)


def test_moments_of_an_embedding_are_permuted_along_its_width() -> None:
    dimension = free_dimensions(network("llama"))["residual"]
    order = order_within(dimension.labels)
    square = torch.arange(256, dtype=torch.float64).reshape(16, 16)
    counts = torch.arange(64)
    moments = InputMoments(square, square[0], 5, gradient=square + 1, counts=counts)
    found = permuted_moments({"model.embed_tokens": moments}, dimension, order)["model.embed_tokens"]
    assert torch.equal(found.second, square[order][:, order])
    assert torch.equal(found.mean, square[0, order])
    assert found.gradient is not None and torch.equal(found.gradient, square[order][:, order] + 1)
    assert found.counts is counts and found.held_out is None


@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_in_the_metric_of_the_loss_no_dimension_loses(family: str) -> None:
    """By a fit anew with the permuted moments, as the pipeline makes it."""
    model, moments = network(family), measured(network(family))
    dimensions, planned = free_dimensions(model), planned_for(model)
    planned = {name: sizes for name, sizes in planned.items() if name in moments}
    metrics = {name: metric_of(moments[name], output=True, centred=False) for name in moments}

    def error(model: PreTrainedModel, moments: Any) -> float:
        total = 0.0
        for name, (left_shape, right_shape, num_terms) in planned.items():
            spec = PermutedKronecker.Spec(
                left_shape=left_shape, right_shape=right_shape, num_terms=num_terms, rows=False, columns=False
            )
            weight = dense_weight(model.get_submodule(name))
            metric = metric_of(moments[name], output=True, centred=False)
            fitted = PermutedKronecker.fit(weight, spec, metric)
            total += metric.squared_norm(weight - PermutedKronecker.expand(fitted))
        return total

    start = before = error(model, moments)
    for name, order in search_orders(model, ["mlp", "value", "residual"], planned, metrics.get).items():
        fold_(model, dimensions[name], order)
        moments = permuted_moments(moments, dimensions[name], order)
        after = error(model, moments)
        assert after <= before * (1 + 1e-9), name
        before = after
    assert before < 0.95 * start
