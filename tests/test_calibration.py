"""Calibration: moments equal slow references however the data are divided; models come back as they were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples.calibration import Build, Reader, assert_same, padded, recipe, rows_of_three, tokens
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertModel, PreTrainedModel, ViTConfig, ViTForImageClassification

import kronpress as kp
from kronpress.calibration import BlockStream, Moments, calibrate, calibration_batches, moments_key, num_bytes
from kronpress.calibration import sensitivity as sensitivity_module
from kronpress.calibration import sums as sums_module
from kronpress.calibration.batches import Part, divide
from kronpress.matrices.moments import InputMoments
from kronpress.recipe import Calibration, Recipe, load_recipe
from kronpress.surgery import linear_layers

FAMILIES = ["gpt2", "opt", "llama", "qwen2"]
every_family = pytest.mark.parametrize("family", FAMILIES)


def all_inputs(model: nn.Module, batches: Iterable[dict[str, Any]], names: Iterable[str]) -> dict[str, list[Tensor]]:
    """What each layer reads, as it stands in each call."""
    read: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: read[name].append(args[0]))
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return read


def reference(
    model: nn.Module, batches: Iterable[dict[str, Any]], names: Iterable[str]
) -> dict[str, tuple[np.ndarray, np.ndarray, int]]:
    """Second moment, mean and number of tokens, from all inputs at once."""
    moments = {}
    for name, inputs in all_inputs(model, batches, names).items():
        x = np.concatenate([each.double().numpy().reshape(-1, each.shape[-1]) for each in inputs])
        moments[name] = (np.einsum("ti,tj->ij", x, x) / len(x), x.mean(axis=0), len(x))
    return moments


def assert_moments(actual: Mapping[str, InputMoments], expected: Mapping[str, Any], rtol: float = 1e-9) -> None:
    assert list(actual) == list(expected)
    for name, (second, mean, num_tokens) in expected.items():
        assert actual[name].second.dtype == actual[name].mean.dtype == torch.float64
        torch.testing.assert_close(actual[name].second, torch.from_numpy(second), rtol=rtol, atol=1e-12)
        torch.testing.assert_close(actual[name].mean, torch.from_numpy(mean), rtol=rtol, atol=1e-12)
        assert actual[name].num_tokens == num_tokens


def outer_mean(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return sum((row[:, None] * row[None] for row in rows), torch.zeros(())) / len(rows)


# ---- second moments and means ----


@every_family
def test_moments_are_those_of_all_inputs_at_once(family: str, tiny_model: Build) -> None:
    model = tiny_model(family)
    batches = [tokens(4), tokens(2, 5, seed=1)]
    moments = calibrate(model, iter(batches), recipe())
    names = [name for name in linear_layers(model) if name != "lm_head"]
    assert_moments(moments, reference(model, [{"input_ids": each} for each in batches], names))
    assert {each.num_tokens for each in moments.values()} == {4 * 9 + 2 * 5}
    assert all(each.gradient is None and each.held_out is None for each in moments.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_inputs_of_any_dtype_are_summed_in_float64(dtype: torch.dtype, tiny_model: Build) -> None:
    model = tiny_model("llama").to(dtype)
    moments = calibrate(model, [tokens()], recipe("mlp"))
    assert_moments(moments, reference(model, [{"input_ids": tokens()}], list(moments)))


def test_large_activations_are_cast_in_chunks(tiny_model: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt2")
    whole = calibrate(model, [tokens()], recipe(sensitivity=True))
    sizes = []
    add = torch.Tensor.addmm_
    monkeypatch.setattr(
        torch.Tensor, "addmm_", lambda self, one, other: (sizes.append(len(other)), add(self, one, other))[1]
    )
    monkeypatch.setattr(sums_module, "CHUNK", 16 * 5)
    monkeypatch.setattr(sensitivity_module, "CHUNK", 300 * 7)
    assert_same(calibrate(model, [tokens()], recipe(sensitivity=True)), whole, rtol=1e-12)
    assert max(sizes) == 5


def test_a_masked_language_model_is_calibrated_by_regular_expressions() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(**sizes, intermediate_size=24, max_position_embeddings=32)
    batch = {"input_ids": tokens(), "token_type_ids": tokens() % 2}
    targets = [r".*\.(query|key|value)", r".*\.intermediate\.dense"]
    model = BertForMaskedLM(config).eval()
    moments = calibrate(model, [batch], recipe(targets, sensitivity=True))
    assert len(moments) == 8
    assert_moments(moments, reference(model, [batch], list(moments)))
    assert all(each.gradient is not None for each in moments.values())
    without_head = calibrate(BertModel(config).eval(), [batch], recipe(targets, sensitivity=True))
    assert all(each.gradient is None for each in without_head.values())


def test_an_image_model_is_calibrated_on_its_patches() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=3)).eval()
    names = [name for name in linear_layers(model) if name != "classifier"]
    images = torch.randn(6, 3, 16, 16)
    targets = [name.replace(".", r"\.") for name in names]
    moments = calibrate(
        model, [{"pixel_values": images[:4]}, {"pixel_values": images[4:]}], recipe(targets, sensitivity=True)
    )
    assert_moments(moments, reference(model, [{"pixel_values": images}], names), rtol=1e-4)
    # 4 patches and the class token; a label for a whole image says nothing of one token.
    assert {each.num_tokens for each in moments.values()} == {6 * 5}
    assert all(each.gradient is None for each in moments.values())


def test_any_module_is_calibrated_by_keyword_arguments() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 2)).double()
    x = rows_of_three()
    moments = calibrate(model, [{"input": x}], recipe(r"\d"))
    assert_moments(moments, reference(model, [{"input": x}], ["0", "2"]))
    torch.testing.assert_close(moments["0"].second, outer_mean(x))


def test_constant_and_zero_inputs_have_finite_moments() -> None:
    model = nn.Sequential(nn.Linear(3, 5)).double()
    moments = calibrate(model, [{"input": torch.tensor([[0.0, 2.0, -1.0]] * 4).double()}], recipe("0"))
    constant = torch.tensor([0.0, 2.0, -1.0]).double()
    torch.testing.assert_close(moments["0"].second, constant[:, None] * constant, rtol=0, atol=0)
    torch.testing.assert_close(moments["0"].mean, constant, rtol=0, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_on_another_device_gives_moments_on_the_cpu(tiny_model: Build) -> None:
    wanted = recipe(sensitivity=True, held_out=0.5)
    moments = calibrate(tiny_model("llama").double().cuda(), [tokens()], wanted)
    assert_same(moments, calibrate(tiny_model("llama").double(), [tokens()], wanted), rtol=1e-8)


# ---- layers that read the same tensor ----


@pytest.mark.parametrize(
    ("family", "shared"),
    [
        ("llama", ["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"]),
        ("opt", ["k_proj v_proj q_proj", "out_proj", "fc1", "fc2"]),
        ("gpt2", ["c_attn", "c_proj", "c_fc", "c_proj"]),
    ],
)
def test_layers_that_read_one_tensor_share_moments_computed_once(
    family: str, shared: list[str], tiny_model: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = []
    add = sums_module._Sums.add
    monkeypatch.setattr(sums_module._Sums, "add", lambda self, rows: (added.append(self.label), add(self, rows))[1])
    moments = calibrate(tiny_model(family), tokens().split(2), recipe(held_out=0.5))
    for part in ("second", "mean", "held_out"):
        groups: dict[int, list[str]] = {}
        for name, layer in moments.items():
            groups.setdefault(id(getattr(layer, part)), []).append(name.rpartition(".")[2])
        assert [" ".join(group) for group in groups.values()] == 2 * shared  # in two blocks
    # Of each group, once for each batch and once for what is held out of it.
    assert len(added) == 2 * len(shared) * 6


def test_a_tensor_that_takes_the_place_of_another_in_memory_is_another() -> None:
    model = Reader(lambda self, x: (self.a(x + 1), self.b(input=x * 2)))
    x = rows_of_three()
    moments = calibrate(model, [{"x": x}], recipe(["a", "b"]))
    torch.testing.assert_close(moments["a"].second, outer_mean(x + 1))
    torch.testing.assert_close(moments["b"].second, outer_mean(x * 2))


def test_a_tensor_that_was_changed_in_place_is_another() -> None:
    def feed(self: Reader, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone()
        return self.a(x), self.b(x.mul_(2))

    x = rows_of_three()
    moments = calibrate(Reader(feed), [{"x": x}], recipe(["a", "b"]))
    torch.testing.assert_close(moments["a"].second, outer_mean(x))
    torch.testing.assert_close(moments["b"].second, outer_mean(x * 2))


@pytest.mark.parametrize(
    "feed",
    [
        lambda self, x: (self.a(x), self.b(x if len(x) == 2 else x + 1)),
        lambda self, x: (self.a(x), self.b(x) if len(x) == 2 else x[..., :1]),
        lambda self, x: (self.a(x), self.b(x) if len(x) == 3 else x[..., :1]),
    ],
    ids=["another tensor later", "none later", "none at first"],
)
def test_layers_that_read_one_tensor_only_for_a_while_are_refused(feed: Any) -> None:
    batches = [{"x": rows_of_three(2)}, {"x": rows_of_three(3)}]
    with pytest.raises(kp.WorkError, match="'b' and 'a' read the same tensor in some calls and not in others"):
        calibrate(Reader(feed), batches, recipe(["a", "b"]))


def test_a_layer_that_is_called_twice_is_measured_on_both_inputs() -> None:
    model = Reader(lambda self, x: (self.a(x), self.b(self.a(x + 1)[..., :3])))
    x = rows_of_three()
    moments = calibrate(model, [{"x": x}], recipe(["a"]))
    torch.testing.assert_close(moments["a"].second, outer_mean(torch.cat([x, x + 1])))
    assert moments["a"].num_tokens == 20


# ---- how the data are divided ----


@settings(max_examples=12, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    held_out=st.sampled_from([0.0, 0.125, 0.4, 0.5]),
    family=st.sampled_from(["gpt2", "llama"]),
)
def test_moments_and_key_do_not_depend_on_the_batches(
    sizes: list[int], held_out: float, family: str, tiny_model: Build
) -> None:
    model = tiny_model(family).double()
    ids = tokens(sum(sizes), 7)
    wanted = recipe("mlp", held_out=held_out, sensitivity=True)
    together = calibrate(model, [ids], wanted)
    divided = calibrate(model, ids.split(sizes), wanted)
    assert_same(divided, together, rtol=1e-9)
    assert divided.key == together.key == moments_key(model, wanted, ids.split(sizes))


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), held_out=st.floats(0, 0.999))
def test_the_fraction_is_held_out_and_spread(sizes: list[int], held_out: float) -> None:
    ids = torch.arange(sum(sizes))[:, None]
    parts = divide([{"input_ids": each, "use_cache": False} for each in ids.split(sizes)], held_out)
    apart = [i for part in parts if part.is_held_out for i in part.arguments["input_ids"].flatten().tolist()]
    measured = [i for part in parts if not part.is_held_out for i in part.arguments["input_ids"].flatten().tolist()]
    assert sorted(apart + measured) == ids.flatten().tolist()
    assert len(apart) == int(sum(sizes) * held_out)
    assert 0 in measured
    assert all(part.arguments["use_cache"] is False for part in parts)
    if held_out <= 0.5:  # never two that follow one another
        assert all(second - first > 1 for first, second in pairwise(apart))


def test_held_out_sequences_are_in_nothing_else(tiny_model: Build) -> None:
    model, ids = tiny_model("llama").double(), tokens(8)
    moments = calibrate(model, ids.split(3), recipe(held_out=0.25, sensitivity=True))
    apart = calibrate(model, [ids[[3, 7]]], recipe())
    rest = calibrate(model, [ids[[0, 1, 2, 4, 5, 6]]], recipe(sensitivity=True))
    for name, layer in moments.items():
        assert layer.held_out is not None
        torch.testing.assert_close(layer.held_out, apart[name].second)
        torch.testing.assert_close(layer.second, rest[name].second)
        torch.testing.assert_close(layer.gradient, rest[name].gradient)


@every_family
def test_padding_counts_nowhere(family: str, tiny_model: Build) -> None:
    model = tiny_model(family).double()
    sequences = [tokens(1, length, seed=length)[0] for length in (9, 4, 7, 5)]
    wanted = recipe(held_out=0.25, sensitivity=True)
    alone = calibrate(model, [sequence[None] for sequence in sequences], wanted)
    assert_same(calibrate(model, [padded(sequences[:2]), padded(sequences[2:])], wanted), alone, rtol=1e-8)


def test_a_mask_of_another_shape_than_the_inputs_is_none() -> None:
    x = rows_of_three(2, 5)
    for mask in (torch.zeros(2, 4), torch.zeros(2, 1, 5, 5), torch.zeros(5, 2)):
        assert len(Part({"x": x, "attention_mask": mask}, False).tokens(x)) == 10
    assert len(Part({"x": x, "attention_mask": torch.zeros(2, 5)}, False).tokens(x)) == 0


# ---- sensitivity ----


def slow_output_gradients(model: PreTrainedModel, ids: Tensor, names: list[str], seed: int) -> dict[str, Tensor]:
    """E[g gᵀ] by one backward pass for each token, its label looked up in the cumulated probabilities."""
    draw = torch.rand(ids.numel(), 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).flatten()
    sums = {}
    for row, sequence in enumerate(ids):
        outputs: dict[str, Tensor] = {}
        handles = [
            model.get_submodule(name).register_forward_hook(
                lambda _, __, output, name=name, outputs=outputs: outputs.__setitem__(name, output)
            )
            for name in names
        ]
        log_p = model(input_ids=sequence[None]).logits[0].log_softmax(-1)  # (length, vocab)
        for handle in handles:
            handle.remove()
        gradients = {name: torch.zeros_like(output) for name, output in outputs.items()}
        for position in range(len(sequence)):
            u = 1 - draw[row * len(sequence) + position].item()
            cumulated = accumulate(log_p[position].exp().tolist())
            label = next(i for i, value in enumerate(cumulated) if value >= u)
            found = torch.autograd.grad(-log_p[position, label], list(outputs.values()), retain_graph=True)
            for name, gradient in zip(outputs, found, strict=True):
                gradients[name] += gradient
        for name, gradient in gradients.items():
            sums[name] = sums.get(name, 0) + outer_mean(gradient) / len(ids)
    return sums


@every_family
def test_gradients_are_those_of_one_backward_pass_for_each_token(family: str, tiny_model: Build) -> None:
    model, ids = tiny_model(family).double(), tokens(3, 5)
    moments = calibrate(model, ids.split(2), recipe(seed=4, sensitivity=True))
    slow = slow_output_gradients(model, ids, list(moments), seed=4)
    for name, layer in moments.items():
        # Norms of Llama and Qwen compute in float32.
        torch.testing.assert_close(layer.gradient, slow[name], rtol=1e-4, atol=1e-6 * slow[name].max().item())
    other_labels = calibrate(model, [ids], recipe(seed=5, sensitivity=True))
    name = next(iter(moments))
    assert (other_labels[name].gradient - moments[name].gradient).norm() > 0.01 * moments[name].gradient.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_in_sixteen_bits_are_near_those_in_sixty_four(dtype: torch.dtype, tiny_model: Build) -> None:
    wanted = recipe(sensitivity=True)
    exact = calibrate(tiny_model("llama").double(), [tokens()], wanted)
    for name, layer in calibrate(tiny_model("llama").to(dtype), [tokens()], wanted).items():
        assert layer.gradient.dtype == torch.float64
        assert (layer.gradient - exact[name].gradient).norm() < 0.25 * exact[name].gradient.norm()


def test_labels_are_drawn_from_the_prediction() -> None:
    p = torch.tensor([0.0, 0.2, 0.5, 0.3, 0.0])
    logits = p.log().expand(2, 10_000, 5)
    gradient = sensitivity_module.loss_gradient(logits, Part({}, False), torch.Generator().manual_seed(0))
    one_hot = (p - gradient).reshape(-1, 5)
    torch.testing.assert_close(one_hot.sum(dim=1), torch.ones(20_000))
    assert set(one_hot.round(decimals=4).unique().tolist()) == {0.0, 1.0}
    # Three standard deviations.
    assert ((one_hot.mean(dim=0) - p).abs() <= 3 * (p * (1 - p) / 20_000).sqrt()).all()


def test_without_sensitivity_nothing_is_differentiated(tiny_model: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model, enabled = tiny_model("gpt2"), []
    model.register_forward_pre_hook(lambda *_: enabled.append(torch.is_grad_enabled()))
    monkeypatch.setattr(torch.autograd, "grad", lambda *_, **__: pytest.fail("a backward pass"))
    calibrate(model, tokens().split(2), recipe())
    assert enabled == [False] * 3


def test_outputs_may_be_changed_in_place() -> None:
    model = Reader(lambda self, x: (self.a(x).mul_(2), self.b(x)))
    moments = calibrate(model, [{"x": rows_of_three()}], recipe(["a", "b"], sensitivity=True))
    # By the chain rule: a counts twice in the logits, b once.
    torch.testing.assert_close(moments["a"].gradient, 4 * moments["b"].gradient)


def test_a_layer_that_the_loss_does_not_depend_on_has_no_sensitivity() -> None:
    model = Reader(lambda self, x: (self.a(x), 0 * self.b(x).detach()))
    moments = calibrate(model, [{"x": rows_of_three()}], recipe(["a", "b"], sensitivity=True))
    torch.testing.assert_close(moments["b"].gradient, torch.zeros(4, 4, dtype=torch.float64), rtol=0, atol=0)
    assert moments["a"].gradient.norm() > 0
    only_b = calibrate(model, [{"x": rows_of_three()}], recipe(["b"], sensitivity=True))
    torch.testing.assert_close(only_b["b"].gradient, moments["b"].gradient, rtol=0, atol=0)


# ---- the model is left alone ----


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    def state() -> dict[str, Any]:
        return {
            "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
            "modes": [module.training for module in model.modules()],
            "flags": [parameter.requires_grad for parameter in model.parameters()],
            "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
            "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
            "forwards": ["forward" in vars(module) for module in model.modules()],
            "random": torch.get_rng_state(),
        }

    before = state()
    yield
    torch.testing.assert_close(state(), before, rtol=0, atol=0, equal_nan=True)


def half_frozen(model: PreTrainedModel) -> PreTrainedModel:
    """In training mode but for one module, every second parameter frozen, one gradient there."""
    model.train()
    model.get_submodule("transformer.h.0").eval()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    return model


@pytest.mark.parametrize("sensitivity", [True, False])
def test_the_model_comes_back_as_it_was(sensitivity: bool, tiny_model: Build, tmp_path: Path) -> None:
    model = half_frozen(tiny_model("gpt2"))
    wanted = recipe(sensitivity=sensitivity)
    with unchanged(model):
        moments = calibrate(model, [tokens()], wanted)
        with BlockStream(model, [tokens()], tmp_path) as stream:
            stream.moments(0, [name for name in moments if ".0." in name])
            stream.advance(0)
    # Without dropout.
    assert_same(moments, calibrate(tiny_model("gpt2"), [tokens()], wanted), rtol=0)


@pytest.mark.parametrize("sensitivity", [True, False])
def test_the_model_comes_back_as_it_was_after_a_failure(sensitivity: bool, tiny_model: Build, tmp_path: Path) -> None:
    model = half_frozen(tiny_model("gpt2"))
    with torch.no_grad():
        model.transformer.h[1].ln_2.weight[3] = torch.nan
    with unchanged(model):
        with pytest.raises(kp.WorkError, match=r"the input of 'transformer\.h\.1\.mlp\.c_fc' holds NaN"):
            calibrate(model, [tokens()], recipe(sensitivity=sensitivity))
        with BlockStream(model, [tokens()], tmp_path) as stream:
            stream.advance(0)
            with pytest.raises(kp.WorkError, match=r"'transformer\.h\.1\.mlp\.c_fc' holds NaN"):
                stream.moments(1, ["transformer.h.1.attn.c_attn", "transformer.h.1.mlp.c_fc"])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_gradient_mode_does_not_matter(mode: Any, tiny_model: Build) -> None:
    model = tiny_model("llama")
    expected = calibrate(model, [tokens()], recipe(sensitivity=True))
    with mode():
        assert_same(calibrate(model, [tokens()], recipe(sensitivity=True)), expected, rtol=0)


# ---- size ----


@pytest.mark.parametrize(("sensitivity", "held_out"), [(True, 0.5), (True, 0.0), (False, 0.5), (False, 0.0)])
def test_the_memory_is_told_before_the_model_is_run(sensitivity: bool, held_out: float, tiny_model: Build) -> None:
    def bytes_of(moments: Moments) -> int:
        parts = [vars(layer).values() for layer in moments.values()]
        tensors = {id(t): t for values in parts for t in values if isinstance(t, Tensor)}
        return sum(tensor.nbytes for tensor in tensors.values())

    told: list[str] = []
    for family in ("gpt2", "llama"):
        model = tiny_model(family)
        told.clear()
        handle = model.register_forward_pre_hook(lambda *_: pytest.fail("not told") if not told else None)
        wanted = recipe(sensitivity=sensitivity, held_out=held_out)
        moments = calibrate(model, [tokens()], wanted, messages=told.append)
        handle.remove()
        shapes = [
            (layer.nf, layer.nx) if family == "gpt2" else (layer.out_features, layer.in_features)
            for layer in map(model.get_submodule, moments)
        ]
        most = num_bytes(shapes, sensitivity, held_out > 0)
        assert f"{len(shapes)} layers" in told[0]
        assert f"at most {most / 1e6:,.1f} MB" in told[0]
        if family == "gpt2":
            assert bytes_of(moments) == most
        else:
            assert most / 3 < bytes_of(moments) < most


def test_too_few_tokens_are_told_and_enough_are_not(tiny_model: Build) -> None:
    told: list[str] = []
    calibrate(tiny_model("opt"), [tokens(2, 10)], recipe(), messages=told.append)
    assert len(told) == 2
    assert told[1].startswith("20 calibration tokens are few: 'model.decoder.layers.0.fc2' has 64 inputs")
    told.clear()
    calibrate(tiny_model("opt"), [tokens(8, 8)], recipe(), messages=told.append)
    assert len(told) == 1


# ---- what is refused ----


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "there are no calibration batches"),
        (iter(()), "there are no calibration batches"),
        (7, "batches are int, not an iterable"),
        ("text", "batch 0 is str"),
        ([tokens(), [1, 2]], "batch 1 is list"),
        ([None], "batch 0 is NoneType"),
        (tokens(), r"batch 0 is Tensor of \(9,\) torch.int64: expected token ids \(batch, length\)"),
        ([torch.randn(2, 3)], r"batch 0 is Tensor of \(2, 3\) torch.float32"),
        ([torch.ones(2, 0).long()], "batch 0 is empty"),
        ([torch.ones(0, 2).long()], "batch 0 is empty"),
        ([{}], "batch 0 is empty"),
        ([{"use_cache": False}], "batch 0 is empty"),
        ([tokens(), torch.full((2, 3), 300)], "token 300 in calibration batch 1: the model knows 300 tokens"),
        ([{"input_ids": torch.full((2, 3), 300)}], "token 300 in calibration batch 0"),
        ([tokens(1, 129)], "batch 0 has sequences of 129 tokens: the model reads at most 128"),
    ],
)
def test_batches_that_cannot_be_read_are_refused(batches: Any, message: str, tiny_model: Build, tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    with pytest.raises(kp.RequestError, match=message):
        calibrate(model, batches, recipe())
    with pytest.raises(kp.RequestError, match=message):
        moments_key(model, recipe(), batches)
    with pytest.raises(kp.RequestError, match=message):
        BlockStream(model, batches, tmp_path)


def test_targets_that_are_not_there_are_refused(tiny_model: Build) -> None:
    with pytest.raises(kp.RequestError, match="'nowhere' matches none"):
        calibrate(tiny_model("gpt2"), [tokens()], recipe("nowhere"))


def test_a_layer_that_is_never_called_is_named() -> None:
    model = Reader(lambda self, x: (self.a(x), x))
    model.a = nn.Linear(3, 3).double()
    with pytest.raises(kp.WorkError, match="targeted layer 'b' was never called"):
        calibrate(model, [{"x": rows_of_three()}], recipe(["a", "b"]))


def test_a_layer_that_sees_only_hidden_or_held_out_tokens_is_named() -> None:
    model = Reader(lambda self, x: (self.a(x), self.b(x + 0) if x[0, 0, 0] > 5 else x[..., :1]))
    x = rows_of_three(4)
    x[3, 0, 0] = 9.0  # the sequence that is held out
    with pytest.raises(kp.WorkError, match="targeted layer 'b' was never called"):
        calibrate(model, [{"x": each[None]} for each in x], recipe(["a", "b"], held_out=0.25))


def test_all_tokens_hidden_is_told(tiny_model: Build) -> None:
    batch = {"input_ids": tokens(), "attention_mask": torch.zeros(6, 9).long()}
    with pytest.raises(kp.WorkError, match=r"'transformer\.h\.0\.attn\.c_attn' was never called on a calibration"):
        calibrate(tiny_model("gpt2"), [batch], recipe())


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_inputs_that_are_not_finite_are_told_by_the_first_layer_that_reads_them(
    value: float, tiny_model: Build
) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight[0] = value
    with pytest.raises(kp.WorkError, match=r"the input of 'model\.layers\.0\.mlp\.gate_proj' holds NaN or infinity"):
        calibrate(model, [tokens()], recipe())


def test_a_moment_that_overflows_is_told() -> None:
    with pytest.raises(kp.WorkError, match="the input of '0' holds NaN or infinity"):
        calibrate(nn.Sequential(nn.Linear(3, 2).double()), [{"input": 1e200 * rows_of_three()}], recipe("0"))


def test_a_gradient_that_is_not_finite_is_told() -> None:
    # The root of 0 has an infinite slope.
    model = Reader(lambda self, x: (self.a(x), (0 * self.b(x)).sqrt()))
    with pytest.raises(kp.WorkError, match="the loss's gradient by the output of 'b' holds NaN or infinity"):
        calibrate(model, [{"x": rows_of_three()}], recipe(["a", "b"], sensitivity=True))


# ---- the recipe's text ----


def test_the_recipes_section_has_its_defaults_and_limits() -> None:
    settings_of_gpt2 = load_recipe("krony-96m").calibration
    assert settings_of_gpt2 == Calibration(
        data="openwebtext", windows=128, sequence_length=1024, sensitivity=True, held_out=0.125
    )
    pocket = load_recipe("krony-96m", ["calibration.windows=7"], model="pocket").calibration
    assert (pocket.data, pocket.windows, pocket.sequence_length) == ("bundled", 7, 256)
    for override in ("calibration.held_out=1", "calibration.held_out=-0.1", "calibration.windows=0"):
        with pytest.raises(kp.RequestError, match=override.partition("=")[0]):
            load_recipe("krony-96m", [override])


def text_recipe(path: Path, seed: int = 0, **changes: Any) -> Recipe:
    changes = {"data": str(path), "windows": 5, "sequence_length": 16, **changes}
    return recipe(seed=seed, **changes)


def test_windows_are_chosen_by_the_seed_and_divided_into_batches(
    tiny_tokenizer: Any, tiny_text: str, tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    path.write_text(tiny_text * 4)
    stream = kp.load_train_tokens(tiny_tokenizer, str(path), 10**6)
    windows = stream[: len(stream) // 16 * 16].view(-1, 16).tolist()
    batches = calibration_batches(tiny_tokenizer, text_recipe(path), 2)
    assert [tuple(batch.shape) for batch in batches] == [(2, 16), (2, 16), (1, 16)]
    chosen = torch.cat(batches).tolist()
    assert all(window in windows[:40] for window in chosen)
    assert torch.cat(calibration_batches(tiny_tokenizer, text_recipe(path), 5)).tolist() == chosen
    assert torch.cat(calibration_batches(tiny_tokenizer, text_recipe(path, seed=1), 5)).tolist() != chosen
    # Of a short text, each window once.
    everything = torch.cat(calibration_batches(tiny_tokenizer, text_recipe(path, windows=10**4), 64)).tolist()
    assert sorted(everything) == sorted(windows)


def test_text_to_moments_of_every_planned_layer(
    tiny_model: Build, tiny_tokenizer: Any, tiny_text: str, tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    path.write_text(tiny_text)
    wanted = text_recipe(path, sensitivity=True, held_out=0.2).model_copy(update={"spec": {"rank": 2}})
    model = tiny_model("qwen2")
    moments = calibrate(model, calibration_batches(tiny_tokenizer, wanted, 2), wanted)
    layers = kp.make_plan(model, wanted).layers
    assert list(moments) == list(layers)
    for name, layer in moments.items():
        assert layer.num_tokens == 4 * 16
        assert layer.second.shape == layer.held_out.shape == (layers[name].in_features,) * 2
        assert layer.gradient.shape == (layers[name].out_features,) * 2
