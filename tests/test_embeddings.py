"""A structured embedding and the head tied to it compute what a dense model with that table would, and stay tied."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from samples.networks import count_numbers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import kronpress as kp
from kronpress.planning import plan_stages
from kronpress.recipe import Healing
from kronpress.surgery import dense_weight, structured_layers

FAMILIES = ("gpt2", "opt", "llama", "qwen2")
SPECS: dict[str, dict[str, Any]] = {
    "blast": {"row_blocks": 4, "column_blocks": 2, "rank": 5},
    "joint_rank": {"rank": 5},
    "kronecker": {"right_shape": [1, 2], "num_terms": 1},
    "low_rank": {"rank": 5},
    "monarch": {"output_blocks": 4, "input_blocks": 2, "rank": 2},
    "permuted_kronecker": {"right_shape": [2, 2], "num_terms": 2},
    "selected": {"lines": "rows", "count": 9},
    "structured_sum": {
        "sizes": [
            {"structure": "kronecker", "spec": {"right_shape": [1, 2], "num_terms": 1}, "share": 0.6},
            {"structure": "low_rank", "spec": {"rank": 2}},
        ]
    },
    "tensor_gpt": {"num_cores": 3, "rank": 1},
    "tensor_train": {"num_cores": 3, "rank": 3},
}
EVERY_CASE = pytest.mark.parametrize(("family", "structure"), list(itertools.product(FAMILIES, SPECS)))
IDS = torch.tensor([[7, 281, 3, 90, 90, 14, 255, 1], [9, 8, 7, 6, 5, 4, 3, 2]])


def recipe(structure: str, **changes: Any) -> kp.Recipe:
    return kp.load_recipe({"targets": "embedding", "structure": structure, "spec": SPECS[structure], **changes})


def compressed(model: PreTrainedModel, structure: str, **changes: Any) -> kp.Plan:
    plan = kp.make_plan(model, recipe(structure, **changes))
    kp.compress_(model, plan)
    return plan


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("structure", SPECS)
def test_every_structure_is_tried_and_its_rows_are_those_of_the_matrix(structure: str) -> None:
    assert set(SPECS) == set(kp.matrices.STRUCTURES)
    matrix_class = kp.matrices.STRUCTURES[structure]
    spec = matrix_class.candidate_specs(24, 16, 24 * 16, **SPECS[structure])[0]
    matrix = matrix_class(24, 16, spec, dtype=torch.float64)
    indices = torch.tensor([[0, 23, 7], [7, 7, 1]])
    layer = kp.StructuredEmbedding(matrix)
    torch.testing.assert_close(layer(indices), matrix.to_dense()[indices])
    assert layer(indices[:0]).shape == (0, 3, 16)
    assert (layer.num_embeddings, layer.embedding_dim) == (24, 16)


@EVERY_CASE
@pytest.mark.parametrize("head", ["tied", "dense"])
def test_the_model_is_the_dense_one_with_the_structured_table(tiny_model, family, structure, head) -> None:
    model = tiny_model(family)
    was_tied, before = model.config.tie_word_embeddings, dense_weight(model.lm_head).clone()
    plan = compressed(model, structure, head=head)
    table = model.get_input_embeddings().to_dense().detach()
    expected = tiny_model(family)
    with torch.no_grad():
        expected.get_input_embeddings().weight = nn.Parameter(table)
        expected.lm_head.weight = nn.Parameter(table if was_tied and head == "tied" else before)
    torch.testing.assert_close(logits_of(model), logits_of(expected), rtol=1e-4, atol=1e-5)
    assert plan.num_params == count_numbers(model)
    assert plan.num_params_untied == (before.numel() if was_tied and head == "dense" else 0)


@EVERY_CASE
@pytest.mark.parametrize("head", ["tied", "dense"])
def test_loading_gives_back_the_same_model_with_its_ties(tiny_model, tmp_path: Path, family, structure, head) -> None:
    model = tiny_model(family)
    plan = compressed(model, structure, head=head)
    for folder, limit in (("once", "50GB"), ("sharded", "4KB")):
        model.save_pretrained(tmp_path / folder, max_shard_size=limit)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert_same(logits_of(loaded), logits_of(model))
        assert count_numbers(loaded) == plan.num_params
    heads = plan.layers[next(iter(plan.layers))].heads
    for name in heads:
        assert loaded.get_submodule(name).weight is loaded.get_input_embeddings().weight
    loaded.save_pretrained(tmp_path / "again")
    assert_same(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits_of(model))
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "once", dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())
    assert logits_of(half).isfinite().all()
    if not any(buffer.dtype == torch.int64 for buffer in model.buffers()):
        placed = AutoModelForCausalLM.from_pretrained(tmp_path / "once", device_map="auto")
        assert_same(logits_of(placed), logits_of(model))


@EVERY_CASE
def test_the_model_generates_with_a_cache_what_it_would_without(tiny_model, family, structure) -> None:
    model = tiny_model(family)
    compressed(model, structure)
    made = [
        model.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=use_cache, pad_token_id=0)
        for use_cache in (True, False)
    ]
    assert_same(*made)


@EVERY_CASE
def test_a_dense_copy_is_tied_again_and_loads_in_stock_transformers(tiny_model, tmp_path, family, structure) -> None:
    model = tiny_model(family)
    was_tied = model.config.tie_word_embeddings
    compressed(model, structure)
    dense = kp.to_dense(model)
    assert not structured_layers(dense)
    assert (dense.lm_head.weight is dense.get_input_embeddings().weight) == was_tied
    torch.testing.assert_close(logits_of(dense), logits_of(model), rtol=1e-4, atol=1e-5)
    dense.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(logits_of(loaded), logits_of(dense))
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == was_tied


@pytest.mark.parametrize("structure", SPECS)
def test_training_moves_the_shared_factors_once_for_both_places(tiny_model, structure) -> None:
    model, teacher = tiny_model("gpt2"), tiny_model("gpt2")
    compressed(model, structure)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    healing = Healing(max_steps=2, sequences_per_step=2, sequence_length=16, learning_rate=1e-2)
    kp.heal_(model, teacher, torch.randint(300, (200,), generator=torch.Generator().manual_seed(0)), healing)
    embedding, head = model.get_input_embeddings(), model.lm_head
    for part, factor in embedding.named_parameters():
        assert getattr(head, part) is factor
        assert not torch.equal(factor, before[f"transformer.wte.{part}"])


def test_the_gradient_of_the_factors_is_that_of_the_dense_table(tiny_model) -> None:
    model = tiny_model("gpt2").double()
    compressed(model, "low_rank")
    factors = model.get_input_embeddings().factors
    model(input_ids=IDS, labels=IDS).loss.backward()
    dense = kp.to_dense(model)
    dense(input_ids=IDS, labels=IDS).loss.backward()
    by_table = dense.get_input_embeddings().weight.grad
    u, v = factors["weight"], factors["right"]
    torch.testing.assert_close(u.grad.squeeze(-1), by_table @ v.detach().mT)
    torch.testing.assert_close(v.grad, u.detach().squeeze(-1).mT @ by_table)


def test_an_embedding_can_be_compressed_again(tiny_model) -> None:
    model = tiny_model("gpt2")
    stages = [
        {"share": 0, "targets": "embedding", "spec": {"right_shape": [1, 2], "num_terms": 1}},
        {"share": 0, "targets": "mlp", "structure": "low_rank", "budget": {"kept_of_targets": 0.5}},
        {"share": 1, "targets": "embedding", "spec": {"right_shape": [1, 4], "num_terms": 1}},
    ]
    plans = plan_stages(model, kp.load_recipe({"stages": stages, "healing": {"max_steps": 0}}))
    expected = model.get_input_embeddings().weight.detach()
    for plan in plans:
        kp.compress_(model, plan)
        assert plan.num_params == count_numbers(model)
    assert [plan.stage for plan in plans] == [1, 2, 3]
    assert [len(plan.new_layers) for plan in plans] == [1, 4, 1]
    assert plans[-1].layers["transformer.wte"].spec.right_shape == (1, 4)
    assert plans[0].num_params > plans[1].num_params > plans[2].num_params
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.get_input_embeddings().to_dense().shape == expected.shape
    with pytest.raises(kp.RequestError, match="stage 3"):
        kp.compress_(tiny_model("gpt2"), plans[-1])


def test_a_dense_head_can_be_let_go_and_both_counts_are_the_published_ones() -> None:
    plan = kp.make_plan(kp.checkpoint.load_config("gpt2"), kp.load_recipe("tqcompressor"))
    assert (plan.num_params, plan.num_params - plan.num_params_untied) == (119_933_764, 81_336_388)
    ours = kp.make_plan(kp.checkpoint.load_config("gpt2"), kp.load_recipe("tqcompressor", ["head=tied"]))
    assert (ours.num_params, ours.num_params_untied) == (81_336_388, 0)
    kngpt2 = kp.make_plan(kp.checkpoint.load_config("gpt2"), kp.load_recipe("kngpt2"))
    assert kngpt2.num_params == 122_504_882


@pytest.mark.parametrize("targets", ["lm_head", ["embedding", "lm_head"]])
def test_a_tied_head_is_no_target_of_its_own(tiny_model, targets) -> None:
    with pytest.raises(kp.RequestError, match=r"'lm_head' shares its weight with 'transformer\.wte'"):
        kp.make_plan(tiny_model("gpt2"), recipe("low_rank", targets=targets))


def test_position_embeddings_can_be_named(tiny_model) -> None:
    model = tiny_model("gpt2")
    plan = compressed(model, "low_rank", targets=r"transformer\.wpe")
    assert isinstance(model.transformer.wpe, kp.StructuredEmbedding)
    assert plan.num_params == count_numbers(model)
    assert plan.flops_per_token == plan.flops_per_token_dense
