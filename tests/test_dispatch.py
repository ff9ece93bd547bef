"""Ways of computing give equal results, are chosen by what is allowed and predicted, and leave no trace in a model."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from transformers import PreTrainedModel

import kronpress as kp
from kronpress import native
from kronpress.dispatch import Constants, Dispatch, drop_dense_caches, explain, measured_constants, set_dispatch
from kronpress.matrices import Kronecker, LowRank, PermutedKronecker, StructuredMatrix
from kronpress.ways import DEFAULT_WAYS, Way, Ways, fastest, operations, predictions, table_constants

# Arithmetic costs nothing but time in proportion: only FLOPs count.
ONLY_FLOPS = Constants(
    flops_per_second=1e9,
    batched_flops_per_second=1e9,
    weight_bytes_per_second=1e30,
    bytes_per_second=1e30,
    strided_bytes_per_second=1e30,
    new_bytes_per_second=1e30,
    seconds_per_operation=1e-30,
)
BY_FLOPS = {("cpu", 4): ONLY_FLOPS, ("cpu", 2): ONLY_FLOPS}
# 12×8 with 1.5 times the arithmetic of a dense matrix, and with a third of it.
MANY_TERMS = Kronecker.Spec(left_shape=(6, 4), right_shape=(2, 2), num_terms=4)
ONE_TERM = Kronecker.Spec(left_shape=(6, 2), right_shape=(2, 4))


def layer_of(spec: Any, dtype: torch.dtype = torch.float32) -> kp.StructuredLinear:
    torch.manual_seed(0)
    return kp.StructuredLinear(Kronecker(12, 8, spec, dtype=dtype), torch.randn(12, dtype=dtype)).eval()


def allow(layer: kp.StructuredLinear, *ways: Way) -> None:
    layer.ways = Ways(ways, BY_FLOPS)


def built(monkeypatch: pytest.MonkeyPatch) -> list[type[StructuredMatrix]]:
    """Every build of a dense weight from now on."""
    calls = []
    original = Kronecker.dense

    def counted(factors: Any) -> Tensor:
        calls.append(Kronecker)
        return original(factors)

    monkeypatch.setattr(Kronecker, "dense", counted)
    return calls


def expected(layer: kp.StructuredLinear, x: Tensor) -> Tensor:
    return x @ layer.to_dense().detach().mT + layer.bias


# ---- predicting and choosing ----


@given(tokens=st.integers(1, 600), itemsize=st.sampled_from([2, 4, 8]), spec=st.sampled_from([MANY_TERMS, ONE_TERM]))
@settings(max_examples=30, deadline=None)
def test_traced_operations_have_the_flops_that_the_structure_counts(tokens: int, itemsize: int, spec: Any) -> None:
    steps = operations((Kronecker, 12, 8, spec), tokens, itemsize)
    assert sum(step.flops for step in steps) == tokens * Kronecker.count_flops(12, 8, spec)


def test_the_traffic_of_one_token_is_at_least_that_of_the_factors() -> None:
    for itemsize in (2, 4):
        steps = operations((LowRank, 64, 32, LowRank.Spec(rank=8)), 1, itemsize)
        # Weights, x, what lies between, y: low rank is two products and no copies.
        assert sum(step.num_bytes for step in steps) == itemsize * (8 * (64 + 32) + 32 + 8 + 8 + 64)


def test_a_layout_with_a_small_left_factor_transposes_nothing() -> None:
    small_left = Kronecker.Spec(left_shape=(2, 2), right_shape=(96, 64))
    small_right = Kronecker.Spec(left_shape=(96, 64), right_shape=(2, 2))
    copies = [
        sum(step.num_bytes for step in operations((Kronecker, 192, 128, spec), 16, 4) if not step.flops)
        for spec in (small_left, small_right)
    ]
    assert copies[0] == 0 < copies[1]


def test_more_of_what_is_scarce_never_takes_longer() -> None:
    # It looks its inputs up (a pointwise pass), multiplies a token at a time and all at once, and transposes.
    spec = PermutedKronecker.Spec(left_shape=(64, 16), right_shape=(16, 32), num_terms=16)
    sizes = (PermutedKronecker, 1024, 512, spec)
    lengths = (1, 4096)
    by_length = [(tokens, predictions(sizes, tokens, 4, table_constants("cpu", 4))) for tokens in lengths]
    for field in Constants.model_fields:
        factor = 0.5 if field == "seconds_per_operation" else 2.0
        known = dict(table_constants("cpu", 4))
        better = Constants(**{**known, field: known[field] * factor})
        pairs = [
            (before[way], predictions(sizes, tokens, 4, better)[way]) for tokens, before in by_length for way in before
        ]
        assert all(after <= before for before, after in pairs), field
        assert any(after < before for before, after in pairs), field


def test_only_allowed_ways_are_chosen_and_what_is_in_doubt_is_as_fast_as_dense() -> None:
    seconds = {"factors": 4.0, "cached dense": 1.0, "transient dense": 2.0, "dense": 1.0}
    assert fastest(seconds, {"factors", "native"}) == "factors"
    assert fastest(seconds, {"factors", "transient dense"}) == "transient dense"
    assert fastest(seconds, {"factors", "cached dense", "transient dense"}) == "cached dense"
    equal = dict.fromkeys(seconds, 1.0)
    assert fastest(equal, {"factors", "cached dense", "transient dense"}) == "cached dense"
    assert fastest(equal, {"factors", "transient dense"}) == "factors"
    assert fastest({**equal, "factors": 0.8}, {"factors", "cached dense"}) == "factors"


def test_by_default_nothing_is_kept() -> None:
    assert "cached dense" not in DEFAULT_WAYS
    layer = layer_of(MANY_TERMS)
    with torch.no_grad():
        layer(torch.randn(600, 8))
    assert layer.ways.cache.num_bytes == 0


def test_factors_with_more_arithmetic_than_the_matrix_go_dense_and_others_do_not() -> None:
    x = torch.randn(600, 8)
    with torch.no_grad():
        for spec, way in ((MANY_TERMS, "cached dense"), (ONE_TERM, "factors")):
            layer = layer_of(spec)
            allow(layer, "factors", "cached dense")
            assert layer.ways.choose(layer.sizes, layer.factors, x, layer.bias) == way
            torch.testing.assert_close(layer(x), expected(layer, x))


# ---- the cached weight ----


def test_the_dense_weight_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(MANY_TERMS)
    allow(layer, "factors", "cached dense")
    calls = built(monkeypatch)
    with torch.no_grad():
        for tokens in (5, 600, 7):
            x = torch.randn(tokens, 8)
            torch.testing.assert_close(layer(x), expected(layer, x))
    assert len(calls) == 1
    assert layer.ways.cache.num_bytes == 12 * 8 * 4


def assign_new(layer: kp.StructuredLinear) -> None:
    layer.right = nn.Parameter(torch.randn_like(layer.right))


def assign_data(layer: kp.StructuredLinear) -> None:
    layer.right.data = torch.randn_like(layer.right)


def load(layer: kp.StructuredLinear) -> None:
    layer.load_state_dict({name: torch.randn_like(part) for name, part in layer.state_dict().items()})


def step(layer: kp.StructuredLinear) -> None:
    optimiser = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(torch.randn(3, 8)).square().sum().backward()
    optimiser.step()


def write(layer: kp.StructuredLinear) -> None:
    with torch.no_grad():
        layer.weight.mul_(-3)


def write_data(layer: kp.StructuredLinear) -> None:
    layer.weight.data.mul_(-3)
    drop_dense_caches(layer)


@pytest.mark.parametrize("change", [assign_new, assign_data, load, step, write, write_data])
def test_a_changed_factor_is_noticed(change: Callable[[kp.StructuredLinear], None]) -> None:
    layer, x = layer_of(MANY_TERMS), torch.randn(600, 8)
    allow(layer, "factors", "cached dense")
    with torch.no_grad():
        before = layer(x)
    change(layer)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected(layer, x))
        assert (layer(x) - before).abs().max() > 0.01


def test_training_mode_and_casts_give_the_kept_weight_up() -> None:
    for change in (lambda layer: layer.train(), lambda layer: layer.double(), lambda layer: layer.to(torch.bfloat16)):
        layer = layer_of(MANY_TERMS)
        allow(layer, "factors", "cached dense")
        with torch.no_grad():
            layer(torch.randn(600, 8))
        assert layer.ways.cache.num_bytes > 0
        change(layer)
        assert layer.ways.cache.num_bytes == 0


def test_a_layer_that_trains_goes_by_its_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = built(monkeypatch)
    for ways in (("factors", "cached dense"), ("factors", "transient dense")):
        layer, x = layer_of(MANY_TERMS), torch.randn(600, 8)
        allow(layer, *ways)
        torch.testing.assert_close(layer(x), expected(layer, x))
        layer.requires_grad_(False)
        y = layer(x.requires_grad_())
        (found,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(found, layer.to_dense().sum(0).expand_as(x))
    assert len(calls) == 2  # only when nothing but x had a gradient


def test_state_and_copies_do_not_hold_the_kept_weight() -> None:
    layer, x = layer_of(MANY_TERMS), torch.randn(600, 8)
    allow(layer, "factors", "cached dense")
    names = set(layer.state_dict())
    with torch.no_grad():
        y = layer(x)
        assert set(layer.state_dict()) == names
        assert sum(part.numel() for part in layer.buffers()) == 0
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert other.ways.cache.num_bytes == 0
            assert other.ways.allowed == layer.ways.allowed
            other.bias.zero_()
            other.weight.zero_()
            torch.testing.assert_close(other(x), torch.zeros_like(y), rtol=0, atol=0)
        torch.testing.assert_close(layer(x), y, rtol=0, atol=0)


def test_a_parametrized_factor_is_not_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of(MANY_TERMS), torch.randn(600, 8)
    allow(layer, "factors", "cached dense")
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Softplus(), unsafe=True)
    calls = built(monkeypatch)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), expected(layer, x))
    assert calls == []


# ---- few tokens ----


def test_without_native_routines_the_results_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of(ONE_TERM), torch.randn(1, 8)
    with torch.no_grad():
        taken = layer.ways.choose(layer.sizes, layer.factors, x, layer.bias)
        assert (taken == "native") == native.is_available()
        with_it = layer(x)
        monkeypatch.setattr(native, "takes", lambda *_: False)
        assert layer.ways.choose(layer.sizes, layer.factors, x, layer.bias) == "factors"
        torch.testing.assert_close(layer(x), with_it)


# ---- whole models ----


def test_the_cache_goes_to_what_saves_most_for_its_bytes() -> None:
    def model() -> nn.ModuleDict:
        return nn.ModuleDict({"many": layer_of(MANY_TERMS), "other": layer_of(MANY_TERMS), "one": layer_of(ONE_TERM)})

    one_weight = 12 * 8 * 4
    for num_bytes, granted in ((0, 0), (one_weight - 1, 0), (one_weight, 1), (2 * one_weight, 2), (math.inf, 2)):
        layers = model()
        set_dispatch(layers, Dispatch(dense_cache_bytes=num_bytes, transient_dense=False), constants=BY_FLOPS)
        assert sum("cached dense" in layer.ways.allowed for layer in layers.values()) == granted
        assert "cached dense" not in layers["one"].ways.allowed
        with torch.no_grad():
            for layer in layers.values():
                layer(torch.randn(600, 8))
        assert sum(layer.ways.cache.num_bytes for layer in layers.values()) == granted * one_weight


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
@pytest.mark.parametrize(
    "dispatch", [Dispatch(), Dispatch(dense_cache_bytes=math.inf), Dispatch(native=False)], ids=str
)
def test_a_model_gives_the_same_logits_and_checkpoint_whatever_is_allowed(
    family: str, dispatch: Dispatch, tiny_compressed: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = tiny_compressed(family, "kronecker")
    ids = torch.arange(40).reshape(2, 20)
    logits = model(ids).logits  # with gradients: by the factors
    keys = set(model.state_dict())
    set_dispatch(model, dispatch, constants=BY_FLOPS)
    with torch.no_grad():
        for length in (1, 20):
            torch.testing.assert_close(model(ids[:, :length]).logits, logits[:, :length].detach(), atol=1e-5, rtol=1e-4)
    assert set(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, logits, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kept_weight_takes_any_input(dtype: torch.dtype) -> None:
    layer = layer_of(MANY_TERMS, dtype)
    allow(layer, "factors", "cached dense")
    wide = torch.randn(40, 3, 16).to(dtype)
    with torch.no_grad():
        for x in (wide[..., ::2], wide[..., :8], wide[:, 0, :8], wide.mT[:, :8].mT[..., :8]):
            wanted = x.double() @ layer.to_dense().double().mT + layer.bias.double()
            torch.testing.assert_close(
                layer(x), wanted.to(dtype), atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=1e-2
            )


def test_a_head_that_stayed_dense_takes_the_native_routine(
    tiny_compressed: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native.is_available():
        pytest.skip(f"no native routines: {native.why_not()}")
    model = tiny_compressed("llama", "kronecker")
    head, ids = model.get_output_embeddings(), torch.tensor([[7]])
    calls, original = [], native.linear
    monkeypatch.setattr(native, "linear", lambda *given: calls.append(given[0]) or original(*given))
    with torch.no_grad():
        logits = model(ids).logits
        assert not calls
        set_dispatch(model, constants=BY_FLOPS)
        torch.testing.assert_close(model(ids).logits, logits, atol=1e-5, rtol=1e-4)
        assert any(weight is head.weight for weight in calls)
        assert model.get_output_embeddings() is head
        assert isinstance(head, nn.Linear)
        set_dispatch(model, Dispatch(native=False), constants=BY_FLOPS)
        calls.clear()
        torch.testing.assert_close(model(ids).logits, logits, atol=1e-5, rtol=1e-4)
        assert type(head) is nn.Linear
        assert not calls
    set_dispatch(model, constants=BY_FLOPS)
    model(ids).logits.sum().backward()  # by torch: the routine has no gradients
    assert head.weight.grad is not None


def test_explanations_say_what_is_then_done() -> None:
    layers = nn.ModuleDict({"many": layer_of(MANY_TERMS), "one": layer_of(ONE_TERM)})
    set_dispatch(layers, Dispatch(dense_cache_bytes=math.inf, native=False), constants=BY_FLOPS)
    rows = {row.name: row for row in explain(layers, 600)}
    assert (rows["many"].way, rows["one"].way) == ("cached dense", "factors")
    assert rows["one"].predicted_gains["factors"] == pytest.approx(2 * 12 * 8 / Kronecker.count_flops(12, 8, ONE_TERM))
    assert rows["many"].shape == (12, 8)
    assert rows["many"].spec == MANY_TERMS.model_dump(mode="json")
    set_dispatch(layers, Dispatch(native=False, transient_dense=False), constants=BY_FLOPS)
    assert "may not be kept" in explain(layers, 600)[0].reason
    assert {row.way for row in explain(layers, 600, torch.bfloat16, is_training=True)} == {"factors"}
    if native.is_available():
        set_dispatch(layers, Dispatch(), constants=BY_FLOPS)
        assert "native" in {row.way for row in explain(layers, 1, torch.bfloat16)}


def test_wrong_requests_are_refused() -> None:
    for call in (set_dispatch, lambda model: explain(model, 1), drop_dense_caches):
        with pytest.raises(kp.RequestError, match="no structured"):
            call(nn.Linear(2, 2))
    with pytest.raises(kp.RequestError, match="0 tokens"):
        explain(layer_of(ONE_TERM), 0)
    with pytest.raises(ValueError, match="dense_cache_bytes"):
        Dispatch(dense_cache_bytes=-1)


# ---- constants of a device ----


def test_constants_are_measured_once_and_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, measurements = tmp_path / "kronpress" / "dispatch.json", []

    def measured(device: torch.device, dtype: torch.dtype) -> Constants:
        measurements.append(dtype)
        return ONLY_FLOPS

    monkeypatch.setattr("kronpress.dispatch.measured", measured)
    assert measured_constants("cpu", path=path) == {}
    assert not path.exists()
    for _ in range(2):
        assert measured_constants("cpu", measure=True, path=path) == BY_FLOPS
    assert measurements == [torch.float32, torch.bfloat16]
    assert measured_constants("cpu", path=path) == BY_FLOPS
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert measured_constants("cpu", path=path) == {}  # another number of threads is another device
    finally:
        torch.set_num_threads(threads)
    path.write_text("{ damaged")
    assert measured_constants("cpu", path=path) == {}
    assert measured_constants("cpu", measure=True, path=path) == BY_FLOPS


def test_where_measuring_fails_the_table_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> Constants:
        raise RuntimeError("no such product on this device")

    monkeypatch.setattr("kronpress.dispatch.measured", refused)
    assert measured_constants("cpu", measure=True, path=tmp_path / "dispatch.json") == {}
    layer = layer_of(ONE_TERM)
    assert Ways().predictions(layer.sizes, 7, "cpu", 4) == predictions(layer.sizes, 7, 4, table_constants("cpu", 4))


def test_a_real_measurement_is_of_this_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kronpress.dispatch.SECONDS_PER_MEASUREMENT", 0.0)
    monkeypatch.setattr("kronpress.dispatch.MEASURED_DTYPES", (torch.float32,))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    layer = layer_of(ONE_TERM)
    set_dispatch(layer, measure=True)
    assert (tmp_path / "kronpress" / "dispatch.json").is_file()
    assert layer.ways.constants == measured_constants("cpu")
    # No machine has a thousandth of a GFLOP/s, or a PFLOP/s.
    assert 1e6 < layer.ways.constants["cpu", 4].flops_per_second < 1e15
