"""Folded permutations: logits stay, weights move as they should, and what cannot be folded is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from kronpress import RequestError
from kronpress.families import FAMILIES
from kronpress.folding import RESIDUALS, fold_, free_dimensions
from kronpress.matrices.permutation import nearest_permuted_sum
from kronpress.surgery import dense_weight

LIKE_LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32},
    "opt": {
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "ffn_dim": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
    },
    "llama": {**LIKE_LLAMA, "tie_word_embeddings": False},
    "mistral": {**LIKE_LLAMA, "tie_word_embeddings": True},
    "qwen2": {**LIKE_LLAMA, "tie_word_embeddings": True},
    "qwen3": {**LIKE_LLAMA, "tie_word_embeddings": False, "head_dim": 6},
    "gemma": {**LIKE_LLAMA, "head_dim": 6},
    "phi3": {**LIKE_LLAMA, "tie_word_embeddings": False},
}
TOKENS = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))
families = pytest.mark.parametrize("family", CONFIGS)


def tiny(family: str, dtype: torch.dtype = torch.float64, make: Any = AutoModelForCausalLM, **changes: Any) -> Any:
    """A random model of two blocks, without a parameter that is 0 or 1 as it starts."""
    common = {
        "vocab_size": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
        "attn_implementation": "eager",
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make.from_config(AutoConfig.for_model(family, **{**common, **CONFIGS[family], **changes})).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
    return model.to(dtype)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(TOKENS).logits


def random_order(labels: Tensor, seed: int = 0) -> Tensor:
    """A permutation of units inside each label that moves some."""
    generator, order = torch.Generator().manual_seed(seed), torch.arange(len(labels))
    for label in labels.unique():
        members = torch.nonzero(labels == label).flatten()
        order[members] = members[torch.randperm(len(members), generator=generator)]
    return order


def test_every_family_is_covered() -> None:
    assert set(CONFIGS) == set(RESIDUALS) == set(FAMILIES)


@families
def test_the_logits_stay_and_every_use_moves(family: str) -> None:
    model = tiny(family)
    before = logits(model)
    dimensions = free_dimensions(model)
    assert list(dimensions) == ["mlp.0", "value.0", "mlp.1", "value.1", "residual"]
    for name, dimension in dimensions.items():
        old = {
            use.module: [each.clone() for each in model.get_submodule(use.module).parameters()]
            for use in dimension.uses
        }
        fold_(model, dimension, random_order(dimension.labels, len(name)))
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
        fold_(model, dimension, random_order(dimension.labels))
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5 * before.abs().max().item())


@families
def test_the_inverse_order_gives_the_model_back(family: str) -> None:
    model, untouched = tiny(family), tiny(family)
    for dimension in free_dimensions(model).values():
        order = random_order(dimension.labels)
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
    model, old = tiny("gpt2"), tiny("gpt2").transformer.h[1]
    dimensions = free_dimensions(model)
    hidden, value = (random_order(dimensions[name].labels) for name in ("mlp.1", "value.1"))
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
    twice, once = tiny("llama"), tiny("llama")
    dimension = free_dimensions(twice)["residual"]
    first, second = random_order(dimension.labels, seed), random_order(dimension.labels, seed + 1)
    fold_(twice, dimension, first)
    fold_(twice, dimension, second)
    fold_(once, dimension, first[second])
    for name, parameter in once.named_parameters():
        assert torch.equal(twice.get_parameter(name), parameter), name


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_across_heads_and_in_one_use_alone_the_logits_change(family: str) -> None:
    """So that the labels and every use are needed."""
    dimension = free_dimensions(tiny(family))["value.0"]
    across = random_order(torch.zeros_like(dimension.labels))
    uses = [(use,) for use in dimension.uses]
    for wrong in (replace(dimension, labels=torch.zeros_like(across)), *(replace(dimension, uses=use) for use in uses)):
        model = tiny(family)
        before = logits(model)
        fold_(model, wrong, random_order(wrong.labels) if len(wrong.uses) == 1 else across)
        assert (logits(model) - before).abs().max() > 1e-3


def test_a_fit_after_the_fold_is_the_permuted_fit() -> None:
    """What the search finds for the rows of one layer is free at run time."""
    model = tiny("opt")
    before, layer = logits(model), model.model.decoder.layers[0].fc1
    shapes = ((12, 8), (2, 2))
    found = nearest_permuted_sum(layer.weight, *shapes, columns=False)
    assert found.captured[-1] > found.captured[0]
    fold_(model, free_dimensions(model)["mlp.0"], found.row_order)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-9)
    in_order = nearest_permuted_sum(layer.weight, *shapes, rows=False, columns=False)
    assert in_order.captured[-1] == pytest.approx(found.captured[-1], abs=1e-9)


def test_orders_that_are_none_or_cross_a_label_are_refused_and_nothing_moves() -> None:
    model = tiny("llama")
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
        free_dimensions(tiny("gpt2", make=AutoModel))
    with pytest.raises(
        RequestError, match=r"should be a dense linear layer, and it is a StructuredLinear: fold before"
    ):
        free_dimensions(tiny_compressed("llama", "low_rank"))
    with pytest.raises(RequestError, match=r"the opt model has model\.decoder\.project_out, which is not in"):
        free_dimensions(tiny("opt", word_embed_proj_dim=8))
    with_adapter = tiny("llama")
    with_adapter.model.layers[1].mlp.adapter = nn.Linear(16, 16)
    with pytest.raises(RequestError, match=r"the llama model has model\.layers\.1\.mlp\.adapter, which is not in"):
        free_dimensions(with_adapter)
    without_norm = tiny("llama")
    del without_norm.model.layers[0].input_layernorm
    with pytest.raises(RequestError, match=r"the llama model lacks model\.layers\.0\.input_layernorm, which is in"):
        free_dimensions(without_norm)
    model = tiny("llama")
    dimension = free_dimensions(model)["mlp.0"]
    model.model.layers[0].mlp.up_proj = nn.Bilinear(2, 2, 2)
    with pytest.raises(
        RequestError, match=r"mlp\.up_proj is a Bilinear: permutations are folded into dense layers only"
    ):
        fold_(model, dimension, random_order(dimension.labels))


def tiny_of_no_family() -> PreTrainedModel:
    config = AutoConfig.for_model(
        "gpt_neo", vocab_size=64, hidden_size=16, num_layers=1, num_heads=2, attention_types=[[["global"], 1]]
    )
    return AutoModelForCausalLM.from_config(config)
