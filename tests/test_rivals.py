"""Rivals: fewer blocks is the same network with blocks taken out; rounding is near, small and counted in full."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import kronpress as kp
from kronpress.families import FAMILIES
from kronpress.rivals import QUANTIZATION_GROUP, RIVALS, drop_blocks, nearest_num_blocks, quantize_

IDS = torch.arange(3, 43).view(2, 20)
TINY = ("gpt2", "opt", "llama", "qwen2")


class Passing(nn.Module):
    """A block that changes nothing."""

    def forward(self, hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return hidden_states


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize(("num_blocks", "left_out"), [(1, [1, 2, 3]), (2, [1, 3]), (3, [3]), (4, [])])
def test_fewer_blocks_are_the_network_without_the_others(tiny_model, family, num_blocks, left_out):
    num_layers = "n_layer" if family == "gpt2" else "num_hidden_layers"
    model = tiny_model(family, **{num_layers: 4})
    smaller = drop_blocks(model, num_blocks)
    reference = copy.deepcopy(model)
    blocks = reference.get_submodule(FAMILIES[family].blocks)
    for block in left_out:
        blocks[block] = Passing()
    # transformers gives a block's output as it is, or first in a tuple, by version.
    expected = reference(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(smaller(input_ids=IDS).logits, expected)
    assert smaller.config.num_hidden_layers == num_blocks
    assert model.config.num_hidden_layers == 4

    with_cache, without = (
        smaller.generate(IDS, max_new_tokens=8, do_sample=False, use_cache=use_cache, pad_token_id=0)
        for use_cache in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_fewer_blocks_share_nothing_with_the_model(tiny_model):
    model = tiny_model("gpt2")
    before = model(input_ids=IDS).logits
    smaller = drop_blocks(model, 1)
    with torch.no_grad():
        for parameter in smaller.parameters():
            parameter.zero_()
    torch.testing.assert_close(model(input_ids=IDS).logits, before, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_fewer_blocks_are_an_ordinary_checkpoint(tiny_model, family, tmp_path):
    smaller = drop_blocks(tiny_model(family), 1)
    smaller.save_pretrained(tmp_path)
    loaded = type(smaller).from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(input_ids=IDS).logits, smaller(input_ids=IDS).logits, rtol=0, atol=0)


@pytest.mark.parametrize("num_blocks", [0, 3])
def test_blocks_that_are_not_there(tiny_model, num_blocks):
    with pytest.raises(kp.RequestError, match=f"{num_blocks} blocks: the model has 2"):
        drop_blocks(tiny_model("gpt2"), num_blocks)


def test_a_family_whose_blocks_are_not_known(tiny_model):
    model = tiny_model("gpt2")
    model.config.model_type = "bloom"
    with pytest.raises(kp.RequestError, match="type 'bloom': known types are gpt2"):
        drop_blocks(model, 1)
    with pytest.raises(kp.RequestError, match="type 'bloom': known types are gpt2"):
        nearest_num_blocks(model, 1)


def test_the_nearest_count_of_blocks(tiny_model):
    model = tiny_model("gpt2", n_layer=4)
    sizes = {n: sum(p.numel() for p in drop_blocks(model, n).parameters()) for n in range(1, 5)}
    for count, size in sizes.items():
        assert nearest_num_blocks(model, size) == count
    assert nearest_num_blocks(model, 1) == 1
    assert nearest_num_blocks(model, 10**9) == 4
    assert nearest_num_blocks(model, sizes[2] + (sizes[3] - sizes[2]) // 3) == 2


@given(rows=st.integers(1, 5), width=st.integers(1, 100), bits=st.sampled_from([2, 4, 8]), seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_rounding_by_hand(rows, width, bits, seed):
    torch.manual_seed(seed)
    model = nn.Linear(width, rows)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    num_bytes = quantize_(model, bits)
    groups_per_row = -(-width // QUANTIZATION_GROUP)
    assert num_bytes == (rows * width * bits + 7) // 8 + 2 * rows * groups_per_row + 2 * rows
    torch.testing.assert_close(model.bias, nn.Parameter(bias), rtol=0, atol=0)
    largest = 2 ** (bits - 1) - 1
    for before, after in zip(weight, model.weight.detach(), strict=True):
        for group, rounded in zip(before.split(QUANTIZATION_GROUP), after.split(QUANTIZATION_GROUP), strict=True):
            # No worse than the plain scale, by which the largest number is exact.
            scale = (group.abs().max() / largest).half().float()
            plain = (group / scale).round().clamp(-largest, largest) * scale if scale > 0 else torch.zeros_like(group)
            assert (rounded - group).square().sum() <= (plain - group).square().sum() * (1 + 1e-5)
            assert len(rounded.unique()) <= 2 * largest + 1


def test_a_group_that_the_grid_holds_is_kept_as_it_is():
    model = nn.Linear(32, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.arange(-16, 16).clamp(-7, 7) * 0.25)
    before = model.weight.detach().clone()
    quantize_(model, 4)
    torch.testing.assert_close(model.weight.detach(), before, rtol=0, atol=0)


def test_more_bits_are_nearer_and_ties_stay(tiny_model):
    dense = tiny_model("gpt2")
    logits = dense(input_ids=IDS).logits
    errors = []
    for bits in (8, 4, 2):
        model = tiny_model("gpt2")
        quantize_(model, bits)
        assert model.lm_head.weight is model.transformer.wte.weight
        errors.append((model(input_ids=IDS).logits - logits).norm() / logits.norm())
    assert 0 < errors[0] < 0.02
    assert errors == sorted(errors)


@pytest.mark.parametrize("name", RIVALS)
def test_every_rival_names_its_size(tiny_model, tiny_recipe, name):
    model = tiny_model("llama")
    plan = kp.make_plan(model, tiny_recipe("kronecker"))
    rival = RIVALS[name](model, plan)
    assert rival.num_params == sum(p.numel() for p in rival.model.parameters())
    assert rival.is_trained is (name in ("dense", "blocks"))
    bits = {"8-bit": 8.5, "4-bit": 4.5}.get(name, 32)  # and half-empty groups, the tiny rows being short
    assert rival.bytes == pytest.approx(rival.num_params * bits / 8, rel=0.15)
    assert rival.flops_per_token <= plan.flops_per_token_dense
    assert (rival.flops_per_token < plan.flops_per_token_dense) is (name == "blocks")
