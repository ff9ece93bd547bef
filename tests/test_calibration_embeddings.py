"""Calibration of embeddings, of models that are compressed in part, and of gradients only where they are of use."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples.calibration import Build, assert_same, tokens
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

import kronpress as kp
from kronpress.calibration import SequentialInputs, calibrate, load_moments, moments_key
from kronpress.calibration import whole_model as whole_model_module
from kronpress.matrices import STRUCTURES
from kronpress.recipe import Calibration, Recipe, Weighting
from kronpress.surgery import replace_by_matrix_, tied_heads, to_dense_

TABLES = {
    "gpt2": "transformer.wte",
    "opt": "model.decoder.embed_tokens",
    "llama": "model.embed_tokens",
    "qwen2": "model.embed_tokens",
}
every_family = pytest.mark.parametrize("family", TABLES)
IDS = tokens(6, 7)


def recipe(targets: Any, sensitivity: bool = True, held_out: float = 0.0, seed: int = 0, **changes: Any) -> Recipe:
    calibration = Calibration(sensitivity=sensitivity, held_out=held_out)
    return Recipe(targets=targets, structure="low_rank", seed=seed, calibration=calibration, **changes)


def table_of(family: str, **changes: Any) -> Recipe:
    return recipe([TABLES[family].replace(".", r"\.")], **changes)


# ---- embeddings ----


def read_by(model: nn.Module, layer: nn.Module, **batch: Tensor) -> Tensor:
    """The rows (tokens, features) that the layer reads."""
    found: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    return found[0].flatten(0, -2)


def gradients_by_embedded(model: PreTrainedModel, ids: Tensor, seed: int) -> Tensor:
    """The loss's gradient by what is looked up, (tokens, width), with what is looked up as the model's input."""
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    log_p = model(inputs_embeds=embedded).logits.flatten(0, 1).log_softmax(-1)
    uniform = 1 - torch.rand(len(log_p), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    labels = [next(i for i, c in enumerate(p.exp().cumsum(0)) if c >= u) for p, u in zip(log_p, uniform, strict=True)]
    functional.nll_loss(log_p, torch.tensor(labels), reduction="sum").backward()
    assert embedded.grad is not None
    return embedded.grad.flatten(0, 1)


@every_family
@pytest.mark.parametrize("knows_blocks", [True, False])
def test_an_embeddings_moments_are_those_of_all_tokens_at_once(
    family: str, knows_blocks: bool, tiny_model: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not knows_blocks:
        monkeypatch.setattr(whole_model_module, "block_prefix", lambda _: None)
    model = tiny_model(family).double()
    name = TABLES[family]
    moments = calibrate(model, IDS.split(4), table_of(family, seed=3, held_out=0.2))[name]
    apart, rest = IDS[[4]], IDS[[0, 1, 2, 3, 5]]
    assert moments.num_tokens == rest.numel()
    expected = torch.zeros(300, dtype=torch.float64)
    for token in rest.flatten().tolist():
        expected[token] += 1
    torch.testing.assert_close(moments.counts, expected, rtol=0, atol=0)
    g = gradients_by_embedded(model, rest, seed=3)
    # Norms of Llama and Qwen compute in float32.
    torch.testing.assert_close(moments.gradient, g.mT @ g / len(g), rtol=1e-4, atol=1e-6 * (g.mT @ g).max().item())
    heads = tied_heads(model, name)
    assert heads == ([] if family == "llama" else ["lm_head"])
    if heads:
        h, h_apart = (read_by(model, model.lm_head, input_ids=ids) for ids in (rest, apart))
        torch.testing.assert_close(moments.second, h.mT @ h / len(h))
        torch.testing.assert_close(moments.mean, h.mean(0))
        torch.testing.assert_close(moments.magnitude, h.abs().mean(0))
        torch.testing.assert_close(moments.held_out, h_apart.mT @ h_apart / len(h_apart))
    else:
        assert moments.held_out is None
        for part, size in (("second", (16, 16)), ("mean", (16,)), ("magnitude", (16,))):
            torch.testing.assert_close(getattr(moments, part), torch.zeros(size, dtype=torch.float64), rtol=0, atol=0)


@settings(max_examples=12, deadline=None)
@given(
    family=st.sampled_from(list(TABLES)),
    lengths=st.lists(st.integers(2, 7), min_size=1, max_size=4),
    knows_blocks=st.booleans(),
    sensitivity=st.booleans(),
)
def test_hidden_tokens_are_not_counted(
    family: str, lengths: list[int], knows_blocks: bool, sensitivity: bool, tiny_model: Build
) -> None:
    model, wanted = tiny_model(family).double(), table_of(family, sensitivity=sensitivity)
    mask = torch.tensor([[i < length for i in range(7)] for length in lengths]).long()
    padded = {"input_ids": IDS[: len(lengths)], "attention_mask": mask}
    alone = [ids[None, :length] for ids, length in zip(IDS, lengths, strict=False)]
    with pytest.MonkeyPatch.context() as patch:
        if not knows_blocks:
            patch.setattr(whole_model_module, "block_prefix", lambda _: None)
        found, expected = (calibrate(model, batches, wanted)[TABLES[family]] for batches in ([padded], alone))
    assert_same({"table": found}, {"table": expected}, rtol=1e-8)
    assert found.counts.sum() == found.num_tokens == sum(lengths)


def test_an_embedding_beside_the_blocks_changes_nothing_of_theirs(tiny_model: Build, tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    blocks = r"transformer\.h\.\d+\..*"
    alone = calibrate(model, [IDS], recipe([blocks], held_out=0.4))
    together = calibrate(model, [IDS], recipe([blocks, r"transformer\.wte"], held_out=0.4), cache=tmp_path, max_bytes=1)
    assert list(together) == ["transformer.wte", *alone]
    assert_same({name: together[name] for name in alone}, alone, rtol=0)
    assert together.num_tokens("transformer.wte") == together["transformer.wte"].num_tokens == 4 * 7
    assert_same(load_moments(tmp_path / f"{together.key}.safetensors", together.key), together, rtol=0)


def test_an_embedding_that_is_never_looked_up_is_named(tiny_model: Build) -> None:
    batch = {"inputs_embeds": torch.randn(2, 5, 16), "use_cache": False}
    with pytest.raises(kp.WorkError, match=r"targeted layer 'transformer\.wte' was never called"):
        calibrate(tiny_model("gpt2"), [batch], table_of("gpt2"))


# ---- models that are compressed in part ----


def low_rank(out_features: int, in_features: int) -> Any:
    torch.manual_seed(out_features)
    matrix = STRUCTURES["low_rank"](out_features, in_features, STRUCTURES["low_rank"].Spec(rank=3))
    for factor in matrix.parameters():
        nn.init.normal_(factor, std=0.2)
    return matrix


@every_family
@pytest.mark.parametrize("targets", ["blocks", "mlp", "table"])
def test_a_compressed_model_is_measured_as_the_dense_one_that_computes_the_same(
    family: str, targets: str, tiny_model: Build, tiny_recipe: Callable[..., Recipe]
) -> None:
    model = tiny_model(family)
    kp.compress_(model, kp.make_plan(model, tiny_recipe("kronecker", targets="attention")))
    replace_by_matrix_(model, TABLES[family], low_rank(300, 16), tied_heads(model, TABLES[family]))
    dense = copy.deepcopy(model)
    to_dense_(dense)
    wanted = recipe(targets, held_out=0.4) if targets != "table" else table_of(family, held_out=0.4)
    assert_same(calibrate(model, [IDS], wanted), calibrate(dense, [IDS], wanted), rtol=1e-5)


def test_the_compressed_stream_begins_with_the_embedding_as_it_is(tiny_model: Build, tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    dense, name = copy.deepcopy(model), "transformer.h.1.mlp.c_fc"
    with SequentialInputs(model, IDS.split(4), tmp_path) as inputs:
        replace_by_matrix_(model, "transformer.wte", low_rank(300, 16), ["lm_head"])
        with torch.no_grad():
            model.transformer.h[0].mlp.c_proj.weight.mul_(0.7)
        paired = inputs.moments(name)
    x, x_now = (read_by(each, each.get_submodule(name), input_ids=IDS).double() for each in (dense, model))
    assert (x - x_now).norm() > 0.1 * x.norm()
    torch.testing.assert_close(paired.cross, x.mT @ x_now / len(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(paired.second, x_now.mT @ x_now / len(x), rtol=1e-4, atol=1e-5)
    assert list(tmp_path.iterdir()) == []


# ---- gradients only where they are of use ----


@pytest.mark.parametrize(
    ("metric", "is_of_use"), [("none", True), ("loss", True), ("input", False), ("magnitude", False)]
)
def test_gradients_are_measured_for_the_metrics_that_look_at_them(
    metric: str, is_of_use: bool, tiny_model: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    without, wanted = (
        recipe("mlp", sensitivity=sensitivity, weighting=Weighting(metric=metric)) for sensitivity in (False, True)
    )
    assert (moments_key(model, wanted, [IDS]) == moments_key(model, without, [IDS])) == (not is_of_use)
    expected = calibrate(model, [IDS], without)
    if not is_of_use:
        monkeypatch.setattr(torch.autograd, "grad", lambda *_, **__: pytest.fail("a backward pass"))
    found = calibrate(model, [IDS], wanted)
    assert found.key == moments_key(model, wanted, [IDS])
    assert all((moments.gradient is not None) == is_of_use for moments in found.values())
    assert_same({name: replace(moments, gradient=None) for name, moments in found.items()}, expected, rtol=1e-6)
