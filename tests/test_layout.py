"""The folded layout: logits and sizes stay, what can change does, and what cannot says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from samples.networks import CONFIGS, count_numbers, network, some_tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import kronpress as kp
from kronpress.matrices import Kronecker, LowRank, Monarch, PermutedKronecker
from kronpress.recipe import Healing
from kronpress.surgery import dense_weight, replace_by_matrix_, structured_layers

TOKENS = some_tokens(2, 12)
families = pytest.mark.parametrize("family", CONFIGS)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(TOKENS).logits


def compressed(
    family: str, right_shape: list[int], targets: str = "mlp", num_terms: int = 1, **changes: Any
) -> PreTrainedModel:
    """Compressed with random factors, so that no unit is like another; `right_shape` as in a recipe."""
    model = network(family, **changes)
    recipe = {
        "name": "test",
        "targets": targets,
        "structure": "kronecker",
        "spec": {"right_shape": right_shape, "num_terms": num_terms},
    }
    kp.compress_(model, kp.make_plan(model, kp.load_recipe(recipe)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in structured_layers(model).values():
            for factor in layer.parameters():
                factor += 0.1 * torch.randn(factor.shape, generator=generator, dtype=torch.float64)
    return model


def shapes(model: nn.Module) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
    return {name: (layer.spec.left_shape, layer.spec.right_shape) for name, layer in structured_layers(model).items()}


def assert_all_changed(model: PreTrainedModel, before: dict[str, Any]) -> None:
    assert shapes(model) == {name: (right, left) for name, (left, right) in before.items()}


@families
@pytest.mark.parametrize("num_terms", [1, 2])
@pytest.mark.parametrize("right_shape", [[1, 2], [1, 4], [2, 1], [2, 2], [4, 2]])
def test_an_mlp_changes_and_the_logits_stay(family: str, right_shape: list[int], num_terms: int) -> None:
    model = compressed(family, right_shape, num_terms=min(num_terms, right_shape[0] * right_shape[1]))
    before, expected, size = shapes(model), logits(model), count_numbers(model)
    plan = kp.attached_plan(model)
    report = kp.fold_layout_(model)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    assert count_numbers(model) == size
    m2, n2 = right_shape
    if family == "phi3" and m2 > 1:  # its gates and its other units are rows of one matrix
        assert report.dimensions == {}
        assert "sizes differ" in report.stayed["mlp.0"]
        assert shapes(model) == before
        return
    assert_all_changed(model, before)
    assert report.layers == list(before)
    assert report.stayed == {}
    assert set(report.dimensions) == {*(["mlp.0", "mlp.1"] if m2 > 1 else []), *(["residual"] if n2 > 1 else [])}
    after = kp.attached_plan(model)
    assert plan is not None
    assert after is not None
    assert shapes(model) == {
        name: (layer.spec.left_shape, layer.spec.right_shape) for name, layer in after.layers.items()
    }
    assert after.model_dump(exclude={"layers"}) == plan.model_dump(exclude={"layers"})
    for field in ("num_params", "flops_per_token"):
        assert [getattr(layer, field) for layer in after.layers.values()] == [
            getattr(layer, field) for layer in plan.layers.values()
        ]


@families
def test_the_second_time_nothing_changes(family: str) -> None:
    model = compressed(family, [2, 1])
    kp.fold_layout_(model)
    before, plan = {name: each.clone() for name, each in model.state_dict().items()}, kp.attached_plan(model)
    report = kp.fold_layout_(model)
    assert (report.dimensions, report.layers) == ({}, [])
    assert kp.attached_plan(model) == plan
    for name, each in model.state_dict().items():
        torch.testing.assert_close(each, before[name], rtol=0, atol=0)


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_it_is_the_folded_model(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = compressed(family, [1, 2])
    before = shapes(model)
    kp.fold_layout_(model.to(dtype))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, attn_implementation="eager").eval()
    assert_all_changed(loaded, before)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(loaded.get_parameter(name), parameter, rtol=0, atol=0)
    if dtype == torch.float32:  # of other dtypes a rotation's frequencies, which are not stored, differ
        torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=0)
    dense = kp.to_dense(loaded.float())
    torch.testing.assert_close(logits(dense), logits(loaded), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_it_generates_what_it_generated(family: str) -> None:
    model = compressed(family, [2, 2])
    arguments = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(TOKENS, **arguments)
    assert kp.fold_layout_(model).layers
    torch.testing.assert_close(model.generate(TOKENS, **arguments), expected)


def test_the_small_factor_comes_first() -> None:
    model = compressed("gpt2", [2, 1])
    kp.fold_layout_(model)
    layer = model.get_submodule("transformer.h.0.mlp.c_fc")
    assert layer.spec.left_shape == (2, 1)
    assert layer.weight.shape == (2, 1, 1)
    assert layer.right.shape == (32, 1, 16)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mlp", [None, [2, 1], [2, 2]])
def test_an_embedding_changes_with_its_head(tied: bool, mlp: list[int] | None, tmp_path: Path) -> None:
    """Its rows are tokens, which nothing may renumber: B has one row."""
    model = network("gpt2", tie_word_embeddings=tied)
    rules = [{"targets": "embedding", "structure": "kronecker", "spec": {"right_shape": [1, 2], "num_terms": 1}}]
    recipe = {"name": "test", **rules[0]}
    kp.compress_(model, kp.make_plan(model, kp.load_recipe(recipe)))
    if mlp is not None:
        add_mlp_(model, mlp)
    before, expected = shapes(model), logits(model)
    report = kp.fold_layout_(model)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    assert_all_changed(model, before)
    assert report.dimensions["residual"] == (8, 2)
    if tied:
        assert model.lm_head.weight is model.transformer.wte.weight
        assert model.lm_head.right is model.transformer.wte.right
    if mlp is None:
        model = model.float()
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
        torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)


def add_mlp_(model: PreTrainedModel, right_shape: list[int]) -> None:
    """The MLPs as structured layers too, without a plan."""
    for name in mlp_names(model):
        layer = model.get_submodule(name)
        weight = dense_weight(layer)
        m2, n2 = right_shape if weight.shape[0] > weight.shape[1] else reversed(right_shape)
        spec = Kronecker.Spec(left_shape=(weight.shape[0] // m2, weight.shape[1] // n2), right_shape=(m2, n2))
        replace_by_matrix_(model, name, Kronecker.from_dense(weight, spec))


def mlp_names(model: PreTrainedModel) -> list[str]:
    return [name for name, _ in model.named_modules() if name.endswith(("c_fc", "mlp.c_proj"))]


def test_what_cannot_be_renumbered_stays_and_says_why() -> None:
    """Queries and keys belong to no free dimension: with them in two parts the residual stream stays, and all else."""
    model = compressed("llama", [2, 2], "blocks")
    before, expected = shapes(model), {name: each.clone() for name, each in model.state_dict().items()}
    report = kp.fold_layout_(model)
    assert (report.dimensions, report.layers) == ({}, [])
    assert shapes(model) == before
    for name, each in model.state_dict().items():
        torch.testing.assert_close(each, expected[name], rtol=0, atol=0)
    assert report.stayed["model.layers.0.self_attn.q_proj"] == "its rows belong to no free dimension"
    assert report.stayed["residual"] == "model.layers.0.self_attn.q_proj stays"
    assert report.stayed["model.layers.0.mlp.up_proj"] == "its columns are units of residual, which stays"


def test_one_block_of_another_size_holds_the_residual_stream_but_no_hidden_units() -> None:
    model = network("gpt2")
    names = mlp_names(model)
    for name, shape in zip(names, [(2, 2), (2, 2), (2, 4), (4, 2)], strict=True):
        weight = dense_weight(model.get_submodule(name))
        spec = Kronecker.Spec(left_shape=(weight.shape[0] // shape[0], weight.shape[1] // shape[1]), right_shape=shape)
        replace_by_matrix_(model, name, Kronecker.from_dense(weight, spec))
    report = kp.fold_layout_(model)
    assert report.layers == []
    assert report.stayed["residual"].startswith("the sizes differ: 8⊗2 in transformer.h.0")


@pytest.mark.parametrize("other", ["low_rank", "permuted_kronecker", "monarch"])
def test_neighbours_of_other_structures(other: str) -> None:
    """Those that can take an order do; a Monarch matrix cannot, and the units that it sees stay."""
    model = network("gpt2")
    for name in mlp_names(model):
        weight = dense_weight(model.get_submodule(name))
        out_features, in_features = weight.shape
        matrix: Any
        if name.endswith("c_fc"):
            spec = Kronecker.Spec(left_shape=(out_features // 2, in_features), right_shape=(2, 1))
            matrix = Kronecker.from_dense(weight, spec)
        elif other == "low_rank":
            matrix = LowRank.from_dense(weight, LowRank.Spec(rank=5))
        elif other == "permuted_kronecker":
            spec = PermutedKronecker.Spec(left_shape=(4, 16), right_shape=(4, 4), num_terms=2, rows=False, columns=True)
            matrix = PermutedKronecker.from_dense(weight, spec)
        else:
            matrix = Monarch.from_dense(weight, Monarch.Spec(output_blocks=4, input_blocks=4, rank=1))
        replace_by_matrix_(model, name, matrix)
    expected = logits(model)
    report = kp.fold_layout_(model)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    if other == "monarch":
        assert report.layers == []
        assert "transformer.h.0.mlp.c_proj" in report.stayed["mlp.0"]
    else:
        assert report.layers == ["transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc"]


def test_a_side_in_one_factor_follows_its_dimension() -> None:
    """c_fc has its residual side in A alone, and c_proj of the same blocks has the stream in two parts."""
    model = network("gpt2")
    for name in mlp_names(model):
        weight = dense_weight(model.get_submodule(name))
        out_features, in_features = weight.shape
        spec = Kronecker.Spec(left_shape=(out_features // 2, in_features), right_shape=(2, 1))
        replace_by_matrix_(model, name, Kronecker.from_dense(weight, spec))
    expected, before = logits(model), shapes(model)
    report = kp.fold_layout_(model)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    # The hidden units are in A alone in c_proj, as those of the stream in c_fc.
    assert set(report.dimensions) == {"mlp.0", "mlp.1", "residual"}
    assert_all_changed(model, before)


@pytest.mark.parametrize("start", ["adaptive", "prune"])
def test_starts_that_are_about_the_left_factor_are_forgotten(start: str, tmp_path: Path) -> None:
    model = network("gpt2", torch.float32)
    recipe = kp.load_recipe(
        {
            "name": "test",
            "targets": "mlp",
            "structure": "kronecker",
            "spec": {"right_shape": [1, 2], "num_terms": 1},
            "fit": {"start": start},
        }
    )
    kp.compress_(model, kp.make_plan(model, recipe))
    expected = logits(model)
    assert kp.fold_layout_(model).layers
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-4)


def test_gradients_are_those_of_the_other_layout() -> None:
    """What healing sees: every parameter is trained as before, and that of a factor is the factor's."""
    models = [compressed("llama", [2, 1]) for _ in range(2)]
    kp.fold_layout_(models[1])
    for model in models:
        model.get_submodule("model.layers.0.mlp.gate_proj").weight.requires_grad_(True)
        model(TOKENS, labels=TOKENS).loss.backward()
    plain, folded = (model.get_submodule("model.layers.0.mlp.gate_proj") for model in models)
    torch.testing.assert_close(folded.right.grad, plain.weight.grad, rtol=0, atol=1e-5)
    torch.testing.assert_close(folded.weight.grad, plain.right.grad, rtol=0, atol=1e-5)


def test_it_is_healed_as_any_compressed_model() -> None:
    """From the same start and by plain gradient steps both layouts stay one function."""
    models = [compressed("gpt2", [2, 2], dtype=torch.float64) for _ in range(2)]
    assert kp.fold_layout_(models[1]).layers
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            model(TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
    torch.testing.assert_close(logits(models[1]), logits(models[0]), rtol=0, atol=1e-5)


def test_heal_trains_the_folded_layers() -> None:
    model, teacher = compressed("llama", [2, 1], dtype=torch.float32), network("llama", torch.float32)
    assert kp.fold_layout_(model).layers
    before = {name: factor.detach().clone() for name, factor in structured_parameters(model).items()}
    healing = Healing(max_steps=2, sequence_length=8, sequences_per_step=4, learning_rate=1e-3)
    kp.heal_(model, teacher, some_tokens(1, 256).flatten(), healing)
    for name, factor in structured_parameters(model).items():
        assert not torch.equal(factor, before[name]), name
    again = kp.fold_layout_(model)
    assert again.layers == []


def structured_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{part}": factor
        for name, layer in structured_layers(model).items()
        for part, factor in layer.factors.items()
    }


def test_refusals() -> None:
    with pytest.raises(kp.RequestError, match="no transformers model"):
        kp.fold_layout_(nn.Linear(2, 2))
    with pytest.raises(kp.RequestError, match="no structured layer"):
        kp.fold_layout_(network("gpt2"))
