"""Benchmarks count tokens and bytes rightly, take turns, pair what was measured together; no time is asserted."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

import kronpress as kp
from kronpress import cli
from kronpress.benchmark import (
    WARM_UP_ROUNDS,
    Benchmark,
    Comparison,
    Contender,
    Machine,
    Measured,
    Memory,
    ModelBenchmark,
    Sizes,
    Speedup,
    Spread,
    Timing,
    Work,
    benchmark,
    checked_prompt_tokens,
    memory_alone,
    time_rounds,
    token_ids,
)
from kronpress.benchmark import contenders as contenders_module
from kronpress.benchmark import memory as memory_module
from kronpress.benchmark import rivals as rivals_module
from kronpress.benchmark import run as run_module
from kronpress.benchmark.contenders import build, build_together, fill_, needed_bytes
from kronpress.benchmark.rivals import RIVALS, Int8Embedding, Int8Linear, check_rival, quantize_
from kronpress.benchmark.run import compared
from kronpress.benchmark.sizes import decode_bound, prefill_bound
from kronpress.dispatch import Dispatch, explain, measured_constants, set_dispatch
from kronpress.families import GEOMETRIES
from kronpress.layers import NativeLinear, StructuredLinear
from kronpress.report import benchmark_tables
from kronpress.surgery import dense_weight, embeddings, linear_layers, structured_layers

MEMORY = Memory(peak_bytes=3_000_000, running_peak_bytes=2_000_000, load_seconds=0.5)


@pytest.fixture(autouse=True, scope="module")
def cache_folder(tmp_path_factory):
    """What the device can do is measured once, and not kept among the user's files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


# ---- arithmetic on given numbers ----


def test_quartiles_are_interpolated_between_measurements():
    assert Spread.of([1.0, 2.0]) == Spread(median=1.5, first_quartile=1.25, third_quartile=1.75)
    assert Spread.of([9.0, 1.0, 4.0, 7.0]) == Spread(median=5.5, first_quartile=3.25, third_quartile=7.5)


def test_a_timing_counts_all_sequences_in_its_speed_and_one_in_its_waiting():
    timing = Timing.of(3, 32, [4.0, 1.0, 2.0])
    assert timing.seconds == [4.0, 1.0, 2.0]
    assert timing.tokens_per_second == Spread.of([24.0, 96.0, 48.0])
    assert timing.seconds_per_token == Spread.of([4 / 32, 1 / 32, 2 / 32])


def test_a_speedup_pairs_what_was_measured_in_one_round():
    model, against = Timing.of(1, 8, [1.0, 10.0, 4.0]), Timing.of(1, 8, [3.0, 20.0, 4.0])
    speedup = Speedup.of(model, against, bound=4.0)
    assert speedup == Speedup(of_rounds=[3.0, 2.0, 1.0], spread=Spread.of([1.0, 2.0, 3.0]), bound=4.0)
    assert speedup.spread.median != 4.0 / 4.0  # the ratio of the medians


WORK = Work(batch_size=1, prompt_tokens=1000, new_tokens=10)


def sizes_of(num_bytes: int, flops: int, arithmetic: str = "float32") -> Sizes:
    return Sizes(
        num_params=10**9,
        num_bytes=4 * 10**9,
        streamed_bytes_per_token=num_bytes,
        flops_per_token=2 * flops,
        least_flops_per_token=flops,
        arithmetic=arithmetic,
    )


def model_benchmark(
    kind: str,
    sizes: Sizes,
    seconds: list[float],
    name: str = "a",
    dtype: str = "float32",
    works: tuple[Work, ...] = (WORK,),
) -> ModelBenchmark:
    """Decode takes twice the seconds of prefill, and each work ten times those of the one before."""
    measured = [
        Measured(
            work=work,
            prefill=Timing.of(work.batch_size, work.prompt_tokens, [10**number * each for each in seconds]),
            decode=Timing.of(work.batch_size, work.new_tokens, [2 * 10**number * each for each in seconds]),
        )
        for number, work in enumerate(works)
    ]
    return ModelBenchmark(
        name=name,
        kind=kind,
        dtype=dtype,
        recipe=None,
        revision=None,
        sizes=sizes,
        disk_bytes=None,
        memory=MEMORY,
        measured=measured,
        is_compiled=False,
    )


def test_bytes_bound_decode_and_the_least_flops_bound_prefill():
    ours, theirs = sizes_of(100, 500), sizes_of(300, 1000)
    assert (decode_bound(ours, theirs), prefill_bound(ours, theirs)) == (3.0, 2.0)


def test_operations_on_integers_and_on_floats_are_not_compared():
    integers, floats = sizes_of(100, 500, "int8"), sizes_of(400, 500)
    assert (decode_bound(integers, floats), prefill_bound(integers, floats)) == (4.0, None)


def test_every_model_is_compared_with_the_reference_of_its_dtype_at_the_same_work():
    works = (WORK, Work(batch_size=2, prompt_tokens=10, new_tokens=5))
    models = [
        model_benchmark("model", sizes_of(100, 500), [1.0, 2.0], works=works),
        model_benchmark("against", sizes_of(300, 1000), [4.0, 4.0], works=works),
        model_benchmark("model", sizes_of(50, 500), [1.0, 1.0], dtype="bfloat16", works=works),
        model_benchmark("against", sizes_of(350, 1000), [5.0, 6.0], dtype="bfloat16", works=works),
        model_benchmark("int8", sizes_of(100, 1000, "int8"), [1.0, 3.0], dtype="bfloat16", works=works),
    ]
    done = compared(models, "against")
    ratios = [[each.comparison and each.comparison.prefill.of_rounds for each in model.measured] for model in done]
    assert ratios == [[[4.0, 2.0]] * 2, [None] * 2, [[5.0, 6.0]] * 2, [None] * 2, [[5.0, 2.0]] * 2]
    bounds = [model.measured[1].comparison and model.measured[1].comparison.decode.bound for model in done]
    assert bounds == [3.0, None, 7.0, None, 3.5]
    assert [model.model_copy(update={"measured": []}) for model in done] == [
        model.model_copy(update={"measured": []}) for model in models
    ]


# ---- what is timed ----


class Watched:
    """Forward passes of some models, in order, on a clock of its own that goes on by what each pass is said to cost."""

    def __init__(self, models, cost) -> None:
        self.passes: list[dict[str, Any]] = []
        self.now = 100.0
        for number, model in enumerate(models):
            model.register_forward_pre_hook(self._before(number), with_kwargs=True)
            model.register_forward_hook(self._after(number, cost))

    def _before(self, number):
        def hook(model, args, kwargs) -> None:
            cache = kwargs.get("past_key_values")
            cached = 0 if cache is None else cache.get_seq_length()
            self.passes.append({"model": number, "ids": kwargs["input_ids"].tolist(), "cached": cached})

        return hook

    def _after(self, number, cost):
        def hook(model, args, output) -> None:
            self.passes[-1]["logits"] = output.logits
            self.now += cost(number, self.passes[-1]["logits"].shape[1])

        return hook

    def clock(self) -> float:
        return self.now


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "qwen2"])
def test_decode_reads_one_token_at_a_time_with_the_cache(tiny_model, family):
    model, ids = tiny_model(family), token_ids(300, 12)
    watched = Watched([model], lambda number, num_tokens: num_tokens)
    time_rounds([model], ids, prompt_tokens=8, rounds=1)
    prefill, *decode = watched.passes[-5:]
    assert (prefill["ids"], prefill["cached"]) == (ids[:, :8].tolist(), 0)
    assert [(one["ids"], one["cached"]) for one in decode] == [([[ids[0, at].item()]], at) for at in range(8, 12)]
    assert all(one["logits"].is_inference() for one in watched.passes)
    with torch.no_grad():
        whole = model(input_ids=ids).logits
    cached = torch.cat([one["logits"] for one in (prefill, *decode)], dim=1)
    torch.testing.assert_close(cached.clone(), whole)


def test_prefill_and_decode_of_every_round_and_model_are_told_apart(tiny_model):
    models = [tiny_model("gpt2"), tiny_model("llama")]
    # A pass costs 100 for being made, 1 for a token, and ten times that with the second model.
    watched = Watched(models, lambda number, num_tokens: (100 + num_tokens) * 10**number)
    taken = time_rounds(models, token_ids(300, 11), prompt_tokens=8, rounds=4, clock=watched.clock)
    assert taken == [[(108, 303), (1080, 3030)]] * 4


def test_models_take_turns_and_the_order_turns_round(tiny_model):
    models = [tiny_model("gpt2"), tiny_model("gpt2", seed=1)]
    watched = Watched(models, lambda number, num_tokens: 0)
    time_rounds(models, token_ids(300, 6), prompt_tokens=4, rounds=3)
    prefills = [one["model"] for one in watched.passes if one["cached"] == 0]
    assert prefills == [0, 1, 1, 0, 0, 1, 1, 0, 0, 1]
    assert len(prefills) == 2 * (WARM_UP_ROUNDS + 3)
    assert [one["model"] for one in watched.passes] == [number for number in prefills for _ in range(3)]


def test_warm_up_rounds_are_not_counted(tiny_model):
    model = tiny_model("gpt2")
    watched = Watched([model], lambda number, num_tokens: len(watched.passes))
    taken = time_rounds([model], token_ids(300, 5), prompt_tokens=4, rounds=2, clock=watched.clock)
    assert taken == [
        [(2 * WARM_UP_ROUNDS + 1, 2 * WARM_UP_ROUNDS + 2)],
        [(2 * WARM_UP_ROUNDS + 3, 2 * WARM_UP_ROUNDS + 4)],
    ]


def test_a_model_without_cache_is_refused(tiny_model):
    model = tiny_model("gpt2")

    def without_cache(model, args, output):
        output.past_key_values = None

    model.register_forward_hook(without_cache)
    with pytest.raises(kp.RequestError, match="GPT2LMHeadModel has no key-value cache"):
        time_rounds([model], token_ids(300, 6), prompt_tokens=4, rounds=2)


def test_all_sequences_of_a_batch_are_read_at_once(tiny_model):
    model, ids = tiny_model("gpt2"), token_ids(300, 6, batch_size=3)
    watched = Watched([model], lambda number, num_tokens: num_tokens)
    time_rounds([model], ids, prompt_tokens=4, rounds=1)
    assert [one["ids"] for one in watched.passes[-3:]] == [part.tolist() for part in ids.split([4, 1, 1], dim=1)]


def test_token_ids_are_in_the_vocabulary_and_always_the_same():
    ids = token_ids(7, 500)
    assert ids.shape == (1, 500)
    assert set(ids.flatten().tolist()) == set(range(7))
    assert torch.equal(ids, token_ids(7, 500))


def test_the_prompt_is_as_long_as_every_context_allows(tiny_model):
    short, long = tiny_model("gpt2"), tiny_model("gpt2", n_positions=200)
    assert checked_prompt_tokens({"long": long}, None, new_tokens=32) == [128]
    assert checked_prompt_tokens({"long": long, "short": short}, None, new_tokens=32) == [96]
    assert checked_prompt_tokens({"long": long, "short": short}, [100, 5, 100], new_tokens=28) == [100, 5]
    with pytest.raises(kp.RequestError, match="101 prompt tokens and 28 new tokens: model 'short' allows 128 together"):
        checked_prompt_tokens({"long": long, "short": short}, [8, 101, 9], new_tokens=28)
    with pytest.raises(kp.RequestError, match="model 'short' allows 128 together"):
        checked_prompt_tokens({"long": long, "short": short}, None, new_tokens=128)


# ---- sizes ----


@pytest.mark.parametrize("structure", ["kronecker", "low_rank"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_sizes_are_those_of_the_plan(tiny_model, tiny_recipe, family, structure):
    model = tiny_model(family)
    plan = kp.make_plan(model, tiny_recipe(structure))
    dense = Sizes.of(model)
    kp.compress_(model, plan)
    compressed = Sizes.of(model)
    for sizes, num_params, flops in (
        (dense, plan.num_params_dense, plan.flops_per_token_dense),
        (compressed, plan.num_params, plan.flops_per_token),
    ):
        assert (sizes.num_params, sizes.num_bytes, sizes.flops_per_token) == (num_params, 4 * num_params, flops)
    saved = plan.num_params_targets_dense - plan.num_params_targets
    assert dense.streamed_bytes_per_token - compressed.streamed_bytes_per_token == 4 * saved


def test_decoding_streams_the_weights_of_blocks_and_tied_head(tiny_model):
    blocks, head = 2 * 12 * 16 * 16, 300 * 16
    model = tiny_model("gpt2")
    assert Sizes.of(model).streamed_bytes_per_token == 4 * (blocks + head)
    assert Sizes.of(model.to(torch.bfloat16)).streamed_bytes_per_token == 2 * (blocks + head)


@given(right=st.sampled_from([(1, 2), (2, 2), (4, 4), (16, 8)]), terms=st.integers(1, 8))
def test_a_layer_that_costs_more_as_factors_counts_as_a_dense_one_in_the_bound(right, terms):
    m2, n2 = right
    terms = min(terms, m2 * n2)
    spec = kp.matrices.Kronecker.Spec(left_shape=(64 // m2, 16 // n2), right_shape=right, num_terms=terms)
    layer = kp.StructuredLinear(kp.matrices.Kronecker(64, 16, spec))
    sizes = Sizes.of(nn.Sequential(layer, nn.Linear(64, 8)))
    # Multiply-adds of both orders, B first k D (1/n2 + 1/m1) and A first k D (1/m2 + 1/n1).
    least = min(16 * m2 + 64 * 16 // n2, 64 * 16 // m2 + 64 * n2) * terms
    assert sizes.flops_per_token == 2 * (least + 64 * 8)
    assert sizes.least_flops_per_token == 2 * (min(least, 64 * 16) + 64 * 8)


def test_an_embedding_is_not_streamed_and_its_tied_head_once(tiny_model, tiny_recipe):
    model = tiny_model("gpt2")
    dense = Sizes.of(model)
    plan = kp.make_plan(
        model, tiny_recipe("kronecker", targets="embedding", spec={"right_shape": [1, 2], "num_terms": 1})
    )
    kp.compress_(model, plan)
    sizes = Sizes.of(model)
    factors = 300 * 8 + 2
    assert dense.streamed_bytes_per_token - sizes.streamed_bytes_per_token == 4 * (300 * 16 - factors)
    assert (sizes.num_params, sizes.flops_per_token) == (plan.num_params, plan.flops_per_token)


# ---- rivals ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(out_features=st.integers(1, 40), in_features=st.integers(1, 40), seed=st.integers(0, 99))
def test_eight_bits_are_near_the_dense_product(dtype, out_features, in_features, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator)
    bias = torch.randn(out_features, generator=generator)
    x = torch.randn(3, in_features, generator=generator).to(dtype)
    y = Int8Linear(weight, bias)(x)
    assert y.dtype == dtype
    # Half a step of W for every entry, half a step of the 7 bits of x, and what bfloat16 loses of y.
    step_w, step_x = weight.abs().amax(1) / 127, (x.max().clamp(min=0) - x.min().clamp(max=0)).float() / 127
    exact = x.double() @ weight.double().mT + bias.double()
    allowed = (
        0.51 * step_w * x.double().abs().sum(1, keepdim=True)
        + 0.51 * step_x * weight.double().abs().sum(1)
        + in_features * step_w * step_x
        + (2**-8 * exact.abs() if dtype is torch.bfloat16 else 1e-5)
    )
    assert ((y.double() - exact).abs() <= allowed).all()


def test_rows_in_eight_bits_are_within_half_a_step(tiny_model):
    table = tiny_model("gpt2").transformer.wte.weight
    rows = Int8Embedding(table)(torch.tensor([[3, 299], [0, 3]]))
    steps = table.abs().amax(1, keepdim=True) / 127
    wanted = torch.tensor([[3, 299], [0, 3]])
    assert ((rows - table[wanted]).abs() <= 0.501 * steps[wanted]).all()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_in_eight_bits_computes_nearly_the_same_from_nothing_else(tiny_model, family):
    model, ids = tiny_model(family), token_ids(300, 12)
    exact = model(input_ids=ids).logits
    sizes = Sizes.of_int8(model)
    quantize_(model)
    assert not linear_layers(model)
    assert not embeddings(model)
    logits = model(input_ids=ids).logits
    assert (logits - exact).norm() < 0.1 * exact.norm()
    left = sum(parameter.nbytes for parameter in model.parameters())
    tables = sum(buffer.nbytes for name, buffer in model.named_buffers() if name.endswith(("table", "scales")))
    assert sizes.arithmetic == "int8"
    packed = [module.packed for module in model.modules() if isinstance(module, Int8Linear)]
    streamed = sum(part.unpack()[0].numel() + 4 * part.unpack()[0].shape[0] for part in packed)
    biases = sum(4 * part.unpack()[1].numel() for part in packed if part.unpack()[1] is not None)
    assert sizes.streamed_bytes_per_token == streamed
    # A tied head has no bytes of its own.
    head = 300 * 16 + 4 * 300 if family == "gpt2" else 0
    assert sizes.num_bytes == left + tables + streamed + biases - head


@pytest.mark.parametrize("rival", ["krony-pt", "einsum"])
@pytest.mark.parametrize("structure", ["kronecker", "permuted_kronecker"])
def test_the_plain_ways_compute_the_same_from_the_same_factors(tiny_compressed, structure, rival):
    model, ids = tiny_compressed("gpt2", structure), token_ids(300, 12)
    exact = model(input_ids=ids).logits
    parameters = list(model.parameters())
    RIVALS[rival](model)
    assert not any(name.endswith(("c_fc", "c_proj", "c_attn")) for name in structured_layers(model))
    torch.testing.assert_close(model(input_ids=ids).logits, exact)
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))


@pytest.mark.skipif(not kp.native.is_available(), reason="no native routines here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_the_own_dense_routine_computes_the_same_from_the_same_weights(tiny_model, family, dtype, monkeypatch):
    model, ids = tiny_model(family).to(dtype), token_ids(300, 12)
    taken: list[int] = []
    native_linear = kp.native.linear
    monkeypatch.setattr(kp.native, "linear", lambda *given: taken.append(0) or native_linear(*given))
    with torch.inference_mode():
        exact, one = model(input_ids=ids).logits, model(input_ids=ids[:, :1]).logits
        num_params, num_layers = sum(map(torch.numel, model.parameters())), len(linear_layers(model))
        RIVALS["native-dense"](model)
        assert sum(map(torch.numel, model.parameters())) == num_params
        assert {type(layer) for layer in linear_layers(model).values()} == {NativeLinear}
        torch.testing.assert_close(model(input_ids=ids).logits, exact)
        assert not taken
        tolerances = {"rtol": 0.05, "atol": 0.05} if dtype is torch.bfloat16 else {}
        torch.testing.assert_close(model(input_ids=ids[:, :1]).logits, one, **tolerances)
        assert len(taken) == num_layers


def test_a_rival_that_cannot_be_made_is_refused(tiny_model, tiny_compressed, monkeypatch):
    for rival in ("int8", "native-dense"):
        with pytest.raises(kp.RequestError, match=f"{rival} is made of a dense model, and this one is compressed"):
            check_rival(tiny_compressed("gpt2", "kronecker"), rival)
    monkeypatch.setattr(rivals_module.native, "is_available", lambda: False)
    monkeypatch.setattr(rivals_module.native, "why_not", lambda: "no compiler")
    with pytest.raises(
        kp.RequestError, match="native-dense needs the native routines, and there are none: no compiler"
    ):
        check_rival(tiny_model("gpt2"), "native-dense")
    for model in (tiny_model("gpt2"), tiny_compressed("gpt2", "low_rank")):
        with pytest.raises(kp.RequestError, match="rival einsum multiplies Kronecker sums"):
            check_rival(model, "einsum")


# ---- models of random numbers ----


@pytest.fixture
def geometry(monkeypatch) -> str:
    monkeypatch.setitem(
        GEOMETRIES, "small", {"model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 2, "vocab_size": 300}
    )
    return "small"


STAGES = {
    "stages": [
        {"share": 0, "targets": "embedding", "spec": {"right_shape": [1, 2], "num_terms": 1}},
        {"share": 1, "targets": "blocks", "spec": {"right_shape": [2, 2], "num_terms": 1}},
    ]
}
RANDOM_RECIPES = {
    "kronecker": {"targets": "blocks", "structure": "kronecker", "spec": {"right_shape": [2, 4], "num_terms": 3}},
    "permuted": {"targets": "mlp", "structure": "permuted_kronecker", "spec": {"right_shape": [2, 4], "num_terms": 3}},
    "low rank": {"targets": "all", "structure": "low_rank", "budget": {"kept_of_targets": 0.5}},
    "stages": {"structure": "kronecker", **STAGES},
    "stages, dense head": {"structure": "kronecker", "head": "dense", **STAGES},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", RANDOM_RECIPES)
def test_a_model_of_random_factors_has_the_sizes_of_its_plan(geometry, name, dtype):
    recipe = kp.load_recipe({"name": "r", **RANDOM_RECIPES[name]})
    contender = Contender(geometry, dtype, random_weights=True, recipe=recipe)
    plan = kp.make_plan(contenders_module.load_config(geometry), recipe)
    built = build(contender)
    assert built.sizes.num_params == plan.num_params
    assert built.sizes.flops_per_token == plan.flops_per_token
    itemsize = 4 if dtype == "float32" else 2
    assert built.sizes.num_bytes == plan.bytes * itemsize // 4 if name != "permuted" else plan.bytes
    assert (
        list(structured_layers(built.model))
        == [each for each in kp.surgery.replaceable_layers(built.model) if each in plan.layers or each == "lm_head"][
            : len(structured_layers(built.model))
        ]
    )
    assert all(str(parameter.dtype) == f"torch.{dtype}" for parameter in built.model.parameters())
    assert not any(tensor.is_meta for tensor in (*built.model.parameters(), *built.model.buffers()))
    logits = built.model(input_ids=token_ids(300, 8)).logits
    assert logits.isfinite().all()
    assert logits.float().std() > 0


def test_random_factors_make_matrices_like_dense_random_ones(geometry):
    dense = build(Contender(geometry, "float32", random_weights=True)).model
    for name in ("kronecker", "permuted", "low rank"):
        recipe = kp.load_recipe({"name": "r", **RANDOM_RECIPES[name]})
        model = build(Contender(geometry, "float32", random_weights=True, recipe=recipe)).model
        for layer_name, layer in structured_layers(model).items():
            ratio = (
                dense_weight(layer).std() / dense_weight(dense.get_submodule(layer_name)).std()
                if isinstance(layer, StructuredLinear)
                else 1
            )
            assert 0.5 < ratio < 2


def test_ties_and_rotary_frequencies_survive_random_weights(tiny_model, save_tiny_checkpoint, tmp_path):
    real = tiny_model("qwen2")
    save_tiny_checkpoint(real, tmp_path)
    model = build(Contender(str(tmp_path), "float32", random_weights=True)).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, real.model.rotary_emb.inv_freq)
    assert not torch.equal(model.lm_head.weight, real.lm_head.weight)
    assert all((layer.input_layernorm.weight == 1).all() for layer in model.model.layers)
    assert all((layer.self_attn.q_proj.bias == 0).all() for layer in model.model.layers)


def test_long_tensors_repeat_what_was_drawn(monkeypatch):
    monkeypatch.setattr(contenders_module, "NUM_DRAWN", 10)
    with torch.device("meta"):
        layer = nn.Linear(5, 7)
    fill_(layer, "cpu")
    flat = layer.weight.detach().flatten()
    assert len(set(flat[:10].tolist())) == 10
    torch.testing.assert_close(flat[10:20], flat[:10])
    torch.testing.assert_close(flat[30:], flat[:5])


def test_a_compressed_checkpoint_keeps_its_plan_with_random_weights(folder):
    contender = Contender(str(folder / "compressed"), "float32")
    loaded, random = build(contender), build(replace(contender, random_weights=True))
    assert loaded.sizes == random.sizes
    assert list(structured_layers(loaded.model)) == list(structured_layers(random.model))
    assert loaded.model.get_submodule(next(iter(structured_layers(loaded.model)))).weight.ndim == 3


def test_rivals_of_one_model_share_its_factors_and_leave_it_alone(geometry):
    recipe = kp.load_recipe({"name": "r", **RANDOM_RECIPES["kronecker"]})
    contender = Contender(geometry, "float32", random_weights=True, recipe=recipe)
    model, rival, dense = (
        each.model
        for each in build_together([contender, replace(contender, rival="einsum"), replace(contender, recipe=None)])
    )
    assert len(structured_layers(model)) == 8
    assert {id(parameter) for parameter in rival.parameters()} == {id(parameter) for parameter in model.parameters()}
    assert not {id(parameter) for parameter in dense.parameters()} & {id(parameter) for parameter in model.parameters()}
    ids = token_ids(300, 8)
    torch.testing.assert_close(rival(input_ids=ids).logits, model(input_ids=ids).logits)


def test_what_is_needed_is_no_less_than_the_weights_and_grows_with_the_work(geometry):
    recipe = kp.load_recipe({"name": "r", **RANDOM_RECIPES["kronecker"]})
    model = Contender(geometry, "float32", random_weights=True, recipe=recipe)
    contenders = [model, replace(model, recipe=None), replace(model, recipe=None, rival="int8")]
    weights = sum(each.sizes.num_bytes for each in build_together(contenders))
    needed = needed_bytes(contenders, [WORK])
    assert needed > weights
    longer = WORK.model_copy(update={"batch_size": 2})
    logits = 4 * WORK.prompt_tokens * 300
    assert needed_bytes(contenders, [WORK, longer]) >= needed + logits
    # A rival of the same factors needs no weights more.
    assert needed_bytes([*contenders, replace(model, rival="einsum")], [WORK]) == needed


# ---- memory ----


def test_peak_memory_alone_holds_the_weights_and_little_more(tiny_model, save_tiny_checkpoint, tmp_path):
    model = tiny_model("gpt2", n_embd=512, n_layer=8, n_head=8)
    num_bytes = Sizes.of(model).num_bytes
    assert num_bytes > 100_000_000
    save_tiny_checkpoint(model, tmp_path)
    memory = memory_alone(Contender(str(tmp_path), "float32"), 300, SMALL_WORK)
    assert num_bytes <= memory.running_peak_bytes <= memory.peak_bytes < 1.5 * num_bytes
    assert memory.load_seconds > 0


def test_eight_bits_take_a_quarter_of_the_memory_once_they_are_made(tiny_model, save_tiny_checkpoint, tmp_path):
    model = tiny_model("gpt2", n_embd=512, n_layer=8, n_head=8)
    num_bytes = Sizes.of(model).num_bytes
    save_tiny_checkpoint(model, tmp_path)
    memory = memory_alone(Contender(str(tmp_path), "float32", random_weights=True, rival="int8"), 300, SMALL_WORK)
    assert num_bytes <= memory.peak_bytes
    assert num_bytes // 4 <= memory.running_peak_bytes < num_bytes // 4 + 40_000_000
    assert memory.load_seconds is None


SMALL_WORK = Work(batch_size=1, prompt_tokens=8, new_tokens=2)


def die(*_: object) -> NoReturn:
    os._exit(1)


def test_a_measuring_process_that_dies_is_failed_work(monkeypatch):
    monkeypatch.setattr(memory_module, "_measure_memory", die)
    with pytest.raises(kp.WorkError, match="memory of 'small, float32' died"):
        memory_alone(Contender("small", "float32"), 300, SMALL_WORK)


def test_an_error_in_the_measuring_process_comes_back(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(kp.RequestError, match="empty' is no checkpoint"):
        memory_alone(Contender(str(tmp_path / "empty"), "float32"), 300, SMALL_WORK)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU torch knows the peak")
def test_memory_that_the_system_does_not_tell_is_none(monkeypatch, tiny_model, save_tiny_checkpoint, tmp_path):
    def refuse(*_: object, **__: object) -> NoReturn:
        raise FileNotFoundError("/proc")

    save_tiny_checkpoint(tiny_model("gpt2"), tmp_path)
    monkeypatch.setattr(Path, "write_text", refuse)
    memory = memory_module._measure_memory(Contender(str(tmp_path), "float32"), 300, SMALL_WORK, threads=1)
    assert (memory.peak_bytes, memory.running_peak_bytes) == (None, None)


# ---- the whole, and the command ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model, tiny_compressed, save_tiny_checkpoint) -> Path:
    """Holds the checkpoints `dense`, `compressed`, and `other` with a smaller vocabulary, stored in 16 bits."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny_checkpoint(tiny_model("gpt2"), folder / "dense")
    save_tiny_checkpoint(tiny_compressed("gpt2", "kronecker"), folder / "compressed")
    save_tiny_checkpoint(tiny_model("llama", vocab_size=200).to(torch.bfloat16), folder / "other")
    return folder


def call(*arguments: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


def test_bench_prints_every_measurement_as_json(folder):
    options = (
        "--batch-size",
        "1,2",
        "--prompt-tokens",
        "8,4",
        "--new-tokens",
        3,
        "--rounds",
        2,
        "--threads",
        2,
        "--json",
    )
    code, out, err = call("bench", folder / "compressed", "--against", folder / "dense", *options)
    assert code == 0, err
    document = json.loads(out)
    result = Benchmark.model_validate(document)
    assert result.model_dump(mode="json") == document
    assert document["machine"]["threads"] == 2
    assert torch.get_num_threads() == 1
    assert document["machine"].keys() == {"device", "cpu", "cores", "threads", "instructions"}
    assert document["versions"].keys() == {"kronpress", "torch", "transformers"}
    works = [(work.batch_size, work.prompt_tokens, work.new_tokens) for work in result.works]
    assert works == [(1, 8, 3), (1, 4, 3), (2, 8, 3), (2, 4, 3)]
    assert result.memory_work == result.works[2]
    assert (result.rounds, result.reference, result.random_weights) == (2, "against", False)
    assert [(model.kind, model.dtype) for model in result.models] == [("model", "float32"), ("against", "float32")]
    for model, name in zip(result.models, ("compressed", "dense"), strict=True):
        assert model.name == str(folder / name)
        assert model.sizes == Sizes.of(kp.load_model(str(folder / name)).model)
        assert [each.work for each in model.measured] == result.works
        for each in model.measured:
            work = each.work
            assert (each.prefill.batch_size, each.prefill.num_tokens) == (work.batch_size, work.prompt_tokens)
            assert (each.decode.batch_size, each.decode.num_tokens) == (work.batch_size, work.new_tokens)
            assert len(each.prefill.seconds) == len(each.decode.seconds) == 2
        assert model.memory.peak_bytes > 0
        (weights,) = (folder / name).glob("*.safetensors")
        assert model.disk_bytes == weights.stat().st_size
    model, against = result.models
    assert [each.comparison for each in model.measured] == [Comparison.of(model, against, at) for at in range(4)]
    assert all(each.comparison.decode.bound > 1 for each in model.measured)
    assert all(each.comparison is None for each in against.measured)


def test_bench_of_random_factors_needs_no_file(geometry):
    options = "--random-weights", "--recipe", "krony-96m", "--set", "targets=blocks", "--set", "spec.right_shape=[2,1]"
    more = "--rivals", "int8,krony-pt,einsum", "--dtype", "float32,bfloat16", "--no-memory", "--json"
    small = "--prompt-tokens", 6, "--new-tokens", 2, "--rounds", 2
    code, out, err = call("bench", geometry, *options, *more, *small)
    assert code == 0, err
    result = Benchmark.model_validate_json(out)
    kinds = ["model", "against", "int8", "krony-pt", "einsum"]
    assert [(model.kind, model.dtype) for model in result.models] == [
        (kind, dtype) for dtype in ("float32", "bfloat16") for kind in kinds
    ]
    assert result.random_weights
    recipes = {model.kind: model.recipe for model in result.models}
    assert recipes == {
        "model": "krony-96m",
        "against": None,
        "int8": None,
        "krony-pt": "krony-96m",
        "einsum": "krony-96m",
    }
    for model in result.models:
        assert (model.memory, model.disk_bytes, model.revision) == (None, None, None)
        assert (model.measured[0].comparison is None) == (model.kind == "against")
        assert model.sizes.arithmetic == ("int8" if model.kind == "int8" else model.dtype)
    assert "GB of memory needed" in err


@pytest.fixture
def memory_calls(monkeypatch) -> list[tuple[Any, ...]]:
    """What memory was asked for; it is not measured, which takes seconds."""
    calls: list[tuple[Any, ...]] = []

    def memory_alone(*arguments: Any) -> Memory:
        calls.append((*arguments, torch.get_num_threads()))
        return MEMORY

    monkeypatch.setattr(run_module, "memory_alone", memory_alone)
    return calls


def test_one_model_alone_is_compared_with_none(folder, memory_calls):
    result = benchmark(str(folder / "dense"), new_tokens=100, rounds=2)
    assert result.reference is None
    (model,) = result.models
    assert [each.comparison for each in model.measured] == [None]
    work = Work(batch_size=1, prompt_tokens=28, new_tokens=100)
    assert (result.works, model.measured[0].prefill.num_tokens) == ([work], 28)
    assert memory_calls == [(Contender(str(folder / "dense"), "float32"), 300, work, 1)]


def test_rivals_without_another_model_are_compared_with_the_model(folder, memory_calls):
    result = benchmark(str(folder / "compressed"), rivals=["einsum"], prompt_tokens=[4], new_tokens=2, rounds=2)
    assert result.reference == "model"
    assert [model.measured[0].comparison is None for model in result.models] == [True, False]
    assert result.models[1].measured[0].comparison.decode.bound == 1.0


@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2)])
def test_models_of_other_vocabulary_and_stored_dtype_are_computed_alike(folder, memory_calls, dtype, itemsize):
    names = str(folder / "dense"), str(folder / "other")
    result = benchmark(*names, prompt_tokens=[4], new_tokens=2, rounds=2, dtypes=[dtype], threads=2)
    for model in result.models:
        assert model.dtype == dtype
        assert model.sizes.num_bytes == itemsize * model.sizes.num_params
    work = Work(batch_size=1, prompt_tokens=4, new_tokens=2)
    assert memory_calls == [(Contender(name, dtype), 200, work, 2) for name in names]


@pytest.mark.parametrize("dense_cache", ["on", "off"])
def test_the_ways_of_layers_are_those_of_dispatch(folder, dense_cache):
    model = folder / "compressed"
    options = "--explain", "--dense-cache", dense_cache, "--batch-size", "1,2", "--prompt-tokens", 8, "--no-memory"
    code, out, err = call("bench", model, "--against", folder / "dense", *options, "--rounds", 2, "--json")
    assert code == 0, err
    result = Benchmark.model_validate_json(out)
    compressed, dense = result.models
    assert dense.ways is None
    assert [ways.num_tokens for ways in compressed.ways] == [1, 2, 8, 16]
    assert result.dense_cache == (dense_cache == "on")
    loaded = kp.load_model(str(model)).model
    num_bytes = math.inf if dense_cache == "on" else 0
    set_dispatch(loaded, Dispatch(dense_cache_bytes=num_bytes), measure=True)
    for ways in compressed.ways:
        assert ways.layers == explain(loaded, ways.num_tokens)
        assert [layer.name for layer in ways.layers] == list(structured_layers(loaded))
    found = measured_constants("cuda" if torch.cuda.is_available() else "cpu")
    assert list(result.constants.values()) == list(found.values())


def test_every_layer_is_counted_once_in_the_table_of_ways(folder):
    result = benchmark(
        str(folder / "compressed"), prompt_tokens=[8], new_tokens=2, rounds=2, memory=False, with_ways=True
    )
    text = shown(result)
    assert max(map(len, text.splitlines())) <= 80, text
    assert "…" not in text
    assert len(result.models[0].ways) == 2
    for ways in result.models[0].ways:
        start = text.index(f"model: ways of {ways.num_tokens} tokens at once")
        lines = text[start:].split("tokens at once")[1].splitlines()
        counts = [int(line[:10]) for line in lines[4:] if line[:10].strip().isdigit()]
        assert sum(counts) == len(ways.layers) == 8, text
        for layer in ways.layers:
            assert layer.way.split()[0] in "".join(lines)


def test_compiled_blocks_are_those_of_models_and_not_of_rivals(folder, monkeypatch):
    compiled: list[nn.Module] = []
    monkeypatch.setattr(run_module, "compile_", compiled.append)
    given = {"prompt_tokens": [4], "new_tokens": 2, "rounds": 2, "memory": False, "rivals": ["einsum"]}
    result = benchmark(str(folder / "compressed"), str(folder / "dense"), compiled=True, **given)
    assert [model.is_compiled for model in result.models] == [True, True, False]
    assert [bool(structured_layers(model)) for model in compiled] == [True, False]
    assert not any(model.is_compiled for model in benchmark(str(folder / "compressed"), **given).models)
    assert len(compiled) == 2


def test_random_weights_without_room_are_refused_before_they_are_made(geometry, monkeypatch):
    monkeypatch.setattr(run_module, "available_bytes", lambda: 200_000)
    monkeypatch.setattr(run_module, "build_together", die)
    told: list[str] = []
    with pytest.raises(
        kp.RequestError, match=r"small, float32: about 0\.0 GB of memory needed .* 0\.0 GB are available"
    ):
        benchmark(geometry, random_weights=True, progress=told.append)
    assert len(told) == 1


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ("--dtype float16", ["'float16'", "float32", "bfloat16"]),
        ("--rounds 1", ["rounds 1", "at least 2"]),
        ("--prompt-tokens 0", ["prompt tokens 0", "at least 1"]),
        ("--new-tokens 0", ["new tokens 0", "at least 1"]),
        ("--threads 0", ["threads 0", "at least 1"]),
        ("--prompt-tokens 8,97", ["97 prompt", "32 new", "dense", "128"]),
        ("--prompt-tokens 8,x", ["--prompt-tokens '8,x'", "whole numbers"]),
        ("--batch-size 4,0", ["batch size 0", "at least 1"]),
        ("--batch-size 1;2", ["--batch-size '1;2'", "whole numbers"]),
        ("--dtype float32,int8", ["unknown dtype 'int8'", "float32"]),
        ("--rivals int4", ["unknown rival 'int4'", "int8, native-dense, krony-pt, einsum"]),
        ("--dense-cache yes", ["unknown --dense-cache 'yes'", "on, off"]),
        ("--rivals einsum", ["rival einsum", "the model has none"]),
        ("--recipe krony-96m", ["--random-weights"]),
        ("--set targets=mlp", ["--set 'targets=mlp'", "--recipe"]),
        ("--random-weights --recipe auto", ["'auto'", "measures its allocation"]),
        ("--random-weights --recipe low-rank --against pocket", ["dense", "'pocket'"]),
        ("--against nowhere/at/all", ["'nowhere/at/all'"]),
    ],
)
def test_a_wrong_request_is_one_sentence(folder, arguments, fragments):
    code, out, err = call("bench", folder / "dense", *arguments.split())
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("kronpress: error: ")
    for fragment in fragments:
        assert fragment in err.splitlines()[-1]


# ---- the table ----


def result_of(names: tuple[str, str], seconds: list[float], memory: Memory = MEMORY, alone: bool = False) -> Benchmark:
    dtypes = ["float32"] if alone else ["float32", "bfloat16"]
    models = [
        model_benchmark(kind, sizes, taken, name, dtype)
        for dtype in dtypes
        for kind, name, sizes, taken in (
            ("model", names[0], sizes_of(100, 500), seconds),
            ("against", names[1], sizes_of(325, 1234), [seconds[0], 1.5 * seconds[1]]),
            ("krony-pt", names[0], sizes_of(100, 500, "other"), seconds),
        )[: 1 if alone else 3]
    ]
    models[0] = models[0].model_copy(update={"memory": memory, "disk_bytes": 30_100_000_000})
    reference = None if alone else "against"
    return Benchmark(
        machine=Machine(
            device="NVIDIA H200", cpu="Intel(R) Xeon(R) Platinum 8488C", cores=16, threads=16, instructions=["avx2"]
        ),
        versions={"kronpress": "0.1.0", "torch": "2.13.0+cu130", "transformers": "5.23.0"},
        native="avx512",
        constants={},
        dense_cache=False,
        random_weights=False,
        works=[WORK],
        memory_work=WORK,
        warm_up_rounds=2,
        rounds=2,
        seed=0,
        reference=reference,
        models=compared(models, reference),
    )


def shown(result: Benchmark) -> str:
    console = Console(width=80, file=io.StringIO(), highlight=False, soft_wrap=True)
    for table in benchmark_tables(result):
        console.print(table)
    return console.file.getvalue()


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("seconds", [[0.001_01, 0.001_02], [1.0, 2.0], [900.0, 901.0]])
def test_the_tables_fit(seconds, alone):
    large = Memory(peak_bytes=123_456_000_000, running_peak_bytes=123_456_000_000, load_seconds=123.45)
    text = shown(result_of(("runs/krony-96m-healed/model", "gpt2"), seconds, large, alone=alone))
    assert max(map(len, text.splitlines())) <= 80, text
    assert "…" not in text
    for part in ("runs/krony-96m-healed/model", "1000 prompt", "10 new", "float32", "2 rounds", "16 threads", "H200"):
        assert part in text
    assert ("gpt2" in text) is not alone
    assert ("krony-pt bfloat16" in text) is not alone


def test_the_tables_show_medians_quartiles_ratios_and_bounds():
    unknown = Memory(peak_bytes=None, running_peak_bytes=None, load_seconds=None)
    lines = [" ".join(line.split()) for line in shown(result_of(("small", "gpt2"), [1.0, 2.0], unknown)).splitlines()]
    decode, prefill = lines.index("decode"), lines.index("prefill")
    assert lines[decode + 1 : decode + 7] == [
        *("model float32 3.75 300 1.25 3.25", "3.12–4.38 250–350 1.12–1.38"),
        *("against float32 3.33 400", "2.50–4.17 300–500"),
        *("krony-pt float32 3.75 300 1.25 3.25", "3.12–4.38 250–350 1.12–1.38"),
    ]
    assert lines[prefill + 1 : prefill + 6] == [
        *("model float32 750 1.50 1.25 2.47", "625–875 1.25–1.75 1.12–1.38"),
        *("against float32 667 2.00", "500–833 1.50–2.50"),
        "krony-pt float32 750 1.50 1.25 –",
    ]
    assert "model float32 1,000,000,000 4,000 30,100 – – –" in lines
    assert "against float32 1,000,000,000 4,000 – 3.00 2.00 0.50" in lines


# ---- the script of the committed figures ----

ROOT = Path(__file__).parents[1]
SCRIPT = runpy.run_path(str(ROOT / "benchmarks" / "end_to_end.py"))


def test_the_page_of_speed_is_that_of_the_committed_results():
    page = (ROOT / "docs" / "results" / "speed.md").read_text(encoding="utf-8")
    assert page == SCRIPT["page"](ROOT / "benchmarks" / "results" / "end_to_end.json")


def test_the_variants_keep_what_their_names_say():
    config = contenders_module.load_config("gpt2")
    plans = {
        name: kp.make_plan(config, kp.load_recipe({"name": name, **fields}))
        for name, fields in SCRIPT["VARIANTS"].items()
    }
    for name, kept in [("blocks 2×", 0.5), ("blocks 2×, low rank", 0.5), ("blocks 4×", 0.25)]:
        assert kept - 0.001 < plans[name].kept_of_targets < kept + 0.001
        assert len(plans[name].layers) == 48
    both = plans["blocks 4×, tied head 2×"]
    saved = plans["blocks 4×"].num_params - both.num_params
    assert saved == 50257 * 768 // 2 - 2
    assert both.layers["transformer.wte"].heads == ["lm_head"]
    assert {variant for variant, *_ in SCRIPT["ROWS"]} == set(plans)
    assert {(variant, 1) for variant in SCRIPT["GOALS"]} <= {
        (variant, threads) for variant, threads, _ in SCRIPT["ROWS"]
    }


def test_a_run_goes_on_with_the_rows_that_are_missing(tmp_path, monkeypatch):
    calls: list[tuple[str, int]] = []

    def measure(variant: str, threads: int, rivals: object, settings: object) -> Benchmark:
        calls.append((variant, threads))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return result_of(("gpt2", "gpt2"), [1.0, 2.0])

    run = SCRIPT["run"]
    monkeypatch.setitem(run.__globals__, "measure", measure)
    out = tmp_path / "results.json"
    rows = [(variant, threads) for variant, threads, _ in SCRIPT["ROWS"]]
    given = {"out": out, "layers": 12, "prompt_tokens": 512, "new_tokens": 16, "rounds": 6, "compiled": False}
    with pytest.raises(KeyboardInterrupt):
        run(**given)
    assert len(json.loads(out.read_text(encoding="utf-8"))["rows"]) == 2
    run(**given)
    assert calls == [*rows[:3], *rows[2:]]
    with pytest.raises(Exception, match="was measured with"):
        run(**{**given, "rounds": 4})
    page = SCRIPT["page"](out)
    # The float32 rows of result_of: 1.25 times as fast, which 3.25 bounds; short of every goal.
    assert "| blocks 4× | 1.8 | 3.25 | 1.25 (1.12–1.38) | missed |" in page
    assert page.count("## ") == len(rows)
    assert "| compressed | float32 | 3.8 | 300.00 | 1.25 (1.12–1.38) | 3.25 | 1.25 |" in page
    assert "| dense | bfloat16 | 1,000,000,000 | 4,000 | 2 | 3 |" in page
