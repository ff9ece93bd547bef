"""Compiled blocks: as few graphs as promised, no break in them, and the results of the model as it was."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers import DynamicCache, PreTrainedModel, StaticCache

import kronpress as kp
from kronpress.compiled import compile_, uncompile_
from kronpress.dispatch import Constants, Dispatch, set_dispatch

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")

IDS = torch.arange(120).remainder(299).reshape(2, 60)
# The compiler proper is not what is tested: graphs are traced and cached in the same way, and run as they are.
BACKEND = "aot_eager"
ONLY_FLOPS = Constants(
    flops_per_second=1e9,
    batched_flops_per_second=1e9,
    weight_bytes_per_second=1e30,
    bytes_per_second=1e30,
    strided_bytes_per_second=1e30,
    new_bytes_per_second=1e30,
    seconds_per_operation=1e-30,
)


@pytest.fixture(autouse=True)
def fresh_counters() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


def num_graphs() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "qwen2"])
def test_two_graphs_serve_every_length_every_block_and_decoding(
    family: str, tiny_compressed: Callable[..., PreTrainedModel]
) -> None:
    model = tiny_compressed(family, "kronecker")
    reference = copy.deepcopy(model)
    compile_(model, backend=BACKEND)
    with torch.no_grad():
        for length in (5, 9, 17, 33, 60):
            torch.testing.assert_close(model(IDS[:1, :length]).logits, reference(IDS[:1, :length]).logits)
        assert num_graphs() == 1
        lengths = {"max_new_tokens": 12, "do_sample": False}
        generated = model.generate(IDS[:1, :7], **lengths)
        assert generated.tolist() == reference.generate(IDS[:1, :7], **lengths).tolist()
        assert num_graphs() == 2


def test_prompts_in_parts_and_batches_add_a_graph_and_no_more(tiny_compressed: Callable[..., PreTrainedModel]) -> None:
    model = tiny_compressed("llama", "low_rank")
    reference = copy.deepcopy(model)
    compile_(model, backend=BACKEND)
    with torch.no_grad():
        for ids in (IDS[:1], IDS):
            caches = DynamicCache(config=model.config), DynamicCache(config=model.config)
            for start, end in ((0, 20), (20, 27), (27, 40), (40, 41), (41, 42)):
                found, expected = (
                    each(ids[:, start:end], past_key_values=cache).logits
                    for each, cache in zip((model, reference), caches, strict=True)
                )
                torch.testing.assert_close(found, expected)
    assert num_graphs() <= 6  # for each number of sequences, one or several: a prompt, more of it, one token


def test_another_cache_and_training_run_the_blocks_as_they_were(
    tiny_compressed: Callable[..., PreTrainedModel],
) -> None:
    model = tiny_compressed("gpt2", "kronecker")
    reference = copy.deepcopy(model)
    compile_(model, backend=BACKEND)
    with torch.no_grad():
        caches = [StaticCache(config=model.config, max_cache_len=64) for _ in range(2)]
        found, expected = (
            each(IDS[:1], past_key_values=cache).logits for each, cache in zip((model, reference), caches, strict=True)
        )
    torch.testing.assert_close(found, expected)
    for each in (model, reference):
        each(IDS, labels=IDS).loss.backward()
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert num_graphs() == 0


def test_compiled_models_are_saved_copied_and_put_back(
    tiny_compressed: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = tiny_compressed("gpt2", "kronecker")
    keys = set(model.state_dict())
    with torch.no_grad():
        logits = model(IDS).logits
        compile_(model, backend=BACKEND)
        assert set(model.state_dict()) == keys
        model.save_pretrained(tmp_path)
        other = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.zero_()
        torch.testing.assert_close(other(IDS).logits, logits)
        assert model(IDS).logits.abs().max() == 0
        uncompile_(other)
        assert all("forward" not in vars(module) for module in other.modules())
        torch.testing.assert_close(other(IDS).logits, logits, rtol=0, atol=0)
        torch.testing.assert_close(type(model).from_pretrained(tmp_path)(IDS).logits, logits, rtol=0, atol=0)


def test_the_way_of_long_prefills_is_in_the_graph(
    tiny_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("gpt2")
    # More arithmetic than the dense matrices.
    spec = {"right_shape": [2, 2], "num_terms": 4}
    recipe = {"name": "many-terms", "targets": "mlp", "structure": "kronecker", "spec": spec}
    kp.compress_(model, kp.make_plan(model, kp.load_recipe(recipe)))
    reference = copy.deepcopy(model)
    set_dispatch(model, Dispatch(), constants={("cpu", 4): ONLY_FLOPS})
    compile_(model, backend=BACKEND)
    layers = [module for module in model.modules() if isinstance(module, kp.StructuredLinear)]
    assert {layer.ways.for_compiled for layer in layers} == {"transient dense"}
    with torch.no_grad():
        for length in (8, 31):
            torch.testing.assert_close(model(IDS[:, :length]).logits, reference(IDS[:, :length]).logits)
        assert num_graphs() == 1
        generate = {"max_new_tokens": 5, "do_sample": False}
        assert model.generate(IDS[:1], **generate).tolist() == reference.generate(IDS[:1], **generate).tolist()
    assert num_graphs() <= 4  # two sequences and one, decoding


def test_the_real_compiler_gives_the_same_results(tiny_compressed: Callable[..., PreTrainedModel]) -> None:
    model = tiny_compressed("gpt2", "kronecker", n_layer=1)
    reference = copy.deepcopy(model)
    compile_(model)
    with torch.no_grad():
        for length in (6, 11):
            torch.testing.assert_close(model(IDS[:1, :length]).logits, reference(IDS[:1, :length]).logits)
    assert num_graphs() == 1


def test_a_layer_is_exported_with_a_symbolic_number_of_tokens() -> None:
    for spec in (
        kp.matrices.Kronecker.Spec(left_shape=(6, 4), right_shape=(2, 2), num_terms=2),
        kp.matrices.Kronecker.Spec(left_shape=(2, 2), right_shape=(6, 4)),
    ):
        layer = kp.StructuredLinear(kp.matrices.Kronecker(12, 8, spec), torch.randn(12)).eval()
        tokens = torch.export.Dim("tokens", min=2, max=4096)
        exported = torch.export.export(layer, (torch.randn(5, 8),), dynamic_shapes=({0: tokens},)).module()
        for length in (2, 700):
            x = torch.randn(length, 8)
            torch.testing.assert_close(exported(x), layer(x))


def test_models_whose_blocks_are_unknown_are_refused() -> None:
    with pytest.raises(kp.RequestError, match="blocks"):
        compile_(nn.Linear(2, 2))
