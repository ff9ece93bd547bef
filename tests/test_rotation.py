"""Rotation of the residual stream: logits stay, and moments are those of a new calibration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from samples.matrices import kronecker_fit, normal, orthogonal
from samples.networks import CONFIGS, WIDTH, network, some_tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import kronpress as kp
from kronpress import RequestError
from kronpress.folding import fold_, free_dimensions
from kronpress.matrices.metric import Metric
from kronpress.matrices.moments import InputMoments
from kronpress.recipe import Weighting
from kronpress.rotation import (
    FoldedNorm,
    fold_norm_gains_,
    foldable_norms,
    has_layer_norms,
    rotate_,
    rotated_,
    unscaled_moments,
)
from kronpress.surgery import dense_weight

TOKENS = some_tokens(6, 24)
FINAL = {"gpt2": "transformer.ln_f", "opt": "model.decoder.final_layer_norm"}
families = pytest.mark.parametrize("family", CONFIGS)
laws = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**32)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(TOKENS).logits


def assert_same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


# ---- gains ----


@families
def test_gains_fold_and_the_logits_stay(family: str) -> None:
    model = network(family)
    before, count = logits(model), model.num_parameters()
    is_tied = model.config.tie_word_embeddings
    assert fold_norm_gains_(model, untie=True) == (64 * WIDTH if is_tied else 0) == model.num_parameters() - count
    assert_same(logits(model), before)
    assert not model.config.tie_word_embeddings and "lm_head.weight" not in model.all_tied_weights_keys
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    norms = {name: module for name, module in model.named_modules() if name in foldable_norms(model)}
    assert len(norms) == 5
    for name, norm in norms.items():
        torch.testing.assert_close(norm.weight, torch.full_like(norm.weight, 0 if family == "gemma" else 1))
        if name != FINAL.get(family) and family in FINAL:  # the head has no bias that could take it up
            torch.testing.assert_close(norm.bias, torch.zeros_like(norm.bias))


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "qwen2"])
def test_in_single_precision_the_logits_stay_within_a_hundred_thousandth(
    family: str, tiny_model: Callable[..., Any]
) -> None:
    model = tiny_model(family)
    before = logits(model)
    fold_norm_gains_(model, untie=True)
    assert_same(logits(model), before)
    rotate_(model, orthogonal(1, WIDTH, keeps_ones=has_layer_norms(model)))
    assert_same(logits(model), before)


def test_a_tied_head_stays_tied_unless_asked_and_is_untied_whatever_the_gain() -> None:
    model = network("gpt2")
    before, final = logits(model), model.transformer.ln_f
    gain = final.weight.clone()
    assert fold_norm_gains_(model) == 0
    assert_same(logits(model), before)
    assert model.lm_head.weight is model.transformer.wte.weight and torch.equal(final.weight, gain)
    with pytest.raises(RequestError, match=r"transformer\.ln_f has a gain that is not constant.*untie=True"):
        rotate_(model, torch.eye(WIDTH))
    with torch.no_grad():
        final.weight.fill_(0.7)
    before = logits(model)
    assert fold_norm_gains_(model, untie=True) == 64 * WIDTH
    rotate_(model, orthogonal(0, WIDTH, keeps_ones=True))
    assert model.lm_head.weight is not model.transformer.wte.weight
    assert_same(logits(model), before)


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_stock_transformers_loads_the_folded_and_rotated_model(family: str, tmp_path: Path) -> None:
    model = network(family).float()
    before = logits(model)
    fold_norm_gains_(model, untie=True)
    rotate_(model, orthogonal(3, WIDTH, keeps_ones=family == "gpt2"))
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same(logits(loaded.eval()), before)
    loaded.tie_weights()  # nothing brings the tie back
    assert_same(logits(loaded), before)


def test_gains_of_zero_fold_where_a_reader_takes_the_bias_up() -> None:
    model = network("gpt2")
    with torch.no_grad():
        model.transformer.h[0].ln_1.weight[3] = 0
        model.transformer.ln_f.weight[5] = 0
    untouched = logits(model)
    with pytest.raises(RequestError, match=r"transformer\.ln_f has gain 0 and a bias at coordinate 5, and lm_head no"):
        fold_norm_gains_(model, untie=True)
    assert torch.equal(logits(model), untouched)
    with torch.no_grad():
        model.transformer.ln_f.bias[5] = 0
    before = logits(model)
    fold_norm_gains_(model, untie=True)
    assert_same(logits(model), before)


@pytest.mark.parametrize("without_bias", [["q_proj"], ["q_proj", "k_proj", "v_proj"]])
def test_a_bias_that_a_reader_cannot_take_stays_in_the_norm(without_bias: list[str]) -> None:
    model = network("opt")
    attention = model.model.decoder.layers[1].self_attn
    for name in without_bias:
        getattr(attention, name).bias = None
    before = logits(model)
    fold_norm_gains_(model, untie=True)
    assert model.model.decoder.layers[1].self_attn_layer_norm.bias.all()
    assert_same(logits(model), before)
    rotate_(model, orthogonal(0, WIDTH, keeps_ones=True))
    assert_same(logits(model), before)


# ---- rotate_ ----


@families
@pytest.mark.parametrize("sign", [1, -1])
def test_the_stream_turns_and_the_logits_stay(family: str, sign: int) -> None:
    model = network(family)
    fold_norm_gains_(model, untie=True)
    before = logits(model)
    old = {name: parameter.clone() for name, parameter in model.named_parameters()}
    rotation = sign * orthogonal(0, WIDTH, keeps_ones=has_layer_norms(model))
    rotate_(model, rotation)
    assert_same(logits(model), before)
    for use in free_dimensions(model)["residual"].uses:
        weight = f"{use.module}.weight"
        assert torch.equal(model.get_parameter(weight), old[weight]) == (old[weight].ndim == 1), weight
    table = model.get_input_embeddings().weight
    torch.testing.assert_close(table, old[next(name for name in old if old[name] is not table)] @ rotation)
    rotate_(model, rotation.mT)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, old[name])


@given(seed=seeds)
@settings(max_examples=5, deadline=None)
def test_two_rotations_one_after_the_other_are_their_product(seed: int) -> None:
    twice, once = network("llama"), network("llama")
    first, second = orthogonal(seed, WIDTH), orthogonal(seed + 1, WIDTH)
    for model, rotations in ((twice, [first, second]), (once, [first @ second])):
        fold_norm_gains_(model)
        for rotation in rotations:
            rotate_(model, rotation)
    for name, parameter in once.named_parameters():
        torch.testing.assert_close(twice.get_parameter(name), parameter)


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3"])
def test_the_rotation_by_a_permutation_matrix_is_the_fold_of_the_permutation(family: str) -> None:
    turned, folded = network(family), network(family)
    order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(2))
    for model in (turned, folded):
        fold_norm_gains_(model, untie=True)
    rotate_(turned, torch.eye(WIDTH)[:, order])
    fold_(folded, free_dimensions(folded)["residual"], order)
    for name, parameter in folded.named_parameters():
        torch.testing.assert_close(turned.get_parameter(name), parameter)


def test_what_is_no_rotation_of_the_model_is_refused_and_nothing_moves() -> None:
    model = network("gpt2")
    with pytest.raises(RequestError, match=r"transformer\.h\.0\.ln_1 has a gain that is not constant"):
        rotate_(model, torch.eye(WIDTH))
    fold_norm_gains_(model, untie=True)
    before = logits(model)
    with pytest.raises(RequestError, match=r"the rotation is \(4, 4\), and the residual stream is 16 wide"):
        rotate_(model, torch.eye(4))
    for wrong in (1.001 * torch.eye(WIDTH), torch.full((WIDTH, WIDTH), torch.nan), torch.zeros(WIDTH, WIDTH)):
        with pytest.raises(RequestError, match="the rotation is not orthogonal"):
            rotate_(model, wrong)
    with pytest.raises(RequestError, match="moves the vector of ones, and the gpt2 model has LayerNorms"):
        rotate_(model, orthogonal(0, WIDTH))
    assert torch.equal(logits(model), before)
    behind = network("opt", do_layer_norm_before=False)
    for refused in (lambda: fold_norm_gains_(behind), lambda: rotate_(behind, torch.eye(WIDTH))):
        with pytest.raises(RequestError, match="norms behind the sums"):
            refused()
    model.transformer.wte = nn.EmbeddingBag(64, WIDTH)
    with pytest.raises(RequestError, match=r"transformer\.wte is a EmbeddingBag: only dense layers are rotated"):
        rotate_(model, torch.eye(WIDTH))


def test_compressed_models_are_refused(tiny_compressed: Callable[..., Any]) -> None:
    model = tiny_compressed("llama", "low_rank")
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.ones_(parameter)
    before = logits(model)
    for refused in (lambda: fold_norm_gains_(model), lambda: rotate_(model, torch.eye(WIDTH))):
        with pytest.raises(RequestError, match="StructuredLinear"):
            refused()
    assert torch.equal(logits(model), before)


def test_layer_norms_do_not_pass_a_rotation_that_moves_the_ones() -> None:
    """So that the refusal is needed."""
    x, q = normal(0, 5, WIDTH), orthogonal(0, WIDTH)
    norm = nn.functional.layer_norm
    assert (norm(x @ q, (WIDTH,)) - norm(x, (WIDTH,)) @ q).abs().max() > 0.1


# ---- rotated_ ----


def recipe(metric: str) -> kp.Recipe:
    return kp.load_recipe(
        {
            "name": "tiny",
            "targets": "blocks",
            "structure": "kronecker",
            "spec": {"right_shape": [2, 1], "num_terms": 1},
            "weighting": {"metric": metric},
            "calibration": {"sensitivity": True, "held_out": 0.3},
        }
    )


def fits_of(model: PreTrainedModel, names: Any) -> dict[str, Callable[[Tensor, Metric], Tensor]]:
    found = {}
    for name in names:
        rows, columns = dense_weight(model.get_submodule(name)).shape
        found[name] = kronecker_fit((rows // 2, columns), (2, 1))
    return found


@pytest.mark.parametrize("metric", ["none", "input", "loss"])
@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "qwen2"])
def test_the_model_computes_as_before_and_its_moments_are_those_of_a_new_calibration(family: str, metric: str) -> None:
    model = network(family)
    before = logits(model)
    moments = kp.calibrate(model, [TOKENS], recipe(metric))
    fits = fits_of(model, moments)
    done = rotated_(model, fits, moments, Weighting(metric=metric), untie=True, max_sweeps=3)
    assert_same(logits(model), before)
    assert done.rotation.losses[-1] < done.rotation.losses[0]
    assert (done.rotation.matrix - torch.eye(WIDTH)).abs().max() > 0.01
    assert done.num_params_added == (0 if family == "llama" else 64 * WIDTH)
    anew = kp.calibrate(model, [TOKENS], recipe(metric))
    assert set(done.moments) == set(anew) and len(done.moments) == len(anew)
    for name, wanted in anew.items():
        found = done.moments[name]
        assert found.num_tokens == wanted.num_tokens
        for part in ("second", "mean", "gradient", "held_out"):
            given, expected = getattr(found, part), getattr(wanted, part)
            if expected is None and metric != "loss":  # gradients may be measured for that alone
                assert given is None
                continue
            size = expected.abs().max().item()
            torch.testing.assert_close(
                given, expected, rtol=0, atol=1e-5 * size, msg=lambda text, at=(name, part): f"{at}: {text}"
            )
        # E|x'| does not follow from E|x| where x was turned.
        assert found.magnitude is None or torch.allclose(found.magnitude, wanted.magnitude)
    # The loss that was reported is the one of fits that start from what is now there.
    total = 0.0
    for name, fit in fits.items():
        weight, each = dense_weight(model.get_submodule(name)), anew[name]
        sides = {"none": Metric(), "input": Metric(each.second), "loss": Metric(each.second, each.gradient)}[metric]
        error = sides.squared_norm(weight - fit(weight, sides))
        total += error if metric == "loss" else error / sides.squared_norm(weight)
    assert total == pytest.approx(done.rotation.losses[-1], rel=1e-3)


@given(seed=seeds, size=st.integers(3, 6), has_bias=st.booleans(), stays=st.booleans(), is_level=st.booleans())
@laws
def test_moments_behind_a_gain_are_those_of_the_samples(
    seed: int, size: int, has_bias: bool, stays: bool, is_level: bool
) -> None:
    """Of inputs that add up to 0, as LayerNorm's do. Where biases over gains add up to 0 too, they say nothing more."""
    gain = 0.5 + normal(seed, size).abs()
    bias = normal(seed + 1, size) if has_bias else torch.zeros(size, dtype=torch.float64)
    over = bias / gain
    over = over - over.mean() if is_level else over + 5 * has_bias
    bias = over * gain
    z = normal(seed + 2, 40, size)
    z = z - z.mean(dim=1, keepdim=True)
    (seen, unseen), rest = z.split(20), over if stays else torch.zeros_like(over)

    def measured(x: Tensor, held_out: Tensor) -> InputMoments:
        return InputMoments(x.mT @ x / 20, x.mean(dim=0), 20, None, held_out.mT @ held_out / 20, x.abs().mean(dim=0))

    norm = FoldedNorm(gain, bias, rest, ("reader",))
    found = unscaled_moments(measured(seen * gain + bias, unseen * gain + bias), norm, "reader")
    wanted = measured(seen + rest, unseen + rest)
    torch.testing.assert_close([found.second, found.mean], [wanted.second, wanted.mean])
    assert found.magnitude is None and found.num_tokens == 20
    if has_bias and is_level and not stays:
        assert found.held_out is None
    else:
        torch.testing.assert_close(found.held_out, wanted.held_out)


def test_low_rank_errors_do_not_depend_on_the_basis() -> None:
    model = network("llama")
    low_rank = kp.matrices.STRUCTURES["low_rank"]

    def fit(weight: Tensor, metric: Metric) -> Tensor:
        return low_rank.expand(low_rank.fit(weight, low_rank.Spec(rank=3), None))

    done = rotated_(model, {"model.layers.0.mlp.up_proj": fit}, None, Weighting())
    assert done.rotation.losses[0] == pytest.approx(done.rotation.losses[-1])
    assert len(done.moments) == 0
    table = "model.embed_tokens"
    with pytest.raises(RequestError, match=f"the moments of {table} are not taken past a rotation"):
        replace(done.moments, moments={table: InputMoments(torch.eye(WIDTH), torch.ones(WIDTH), 1)})[table]


def test_behind_a_gain_of_zero_moments_are_taken_anew() -> None:
    model = network("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[4] = 0
    before = logits(model)
    moments = kp.calibrate(model, [TOKENS], recipe("input"))
    fits = fits_of(model, ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"])
    with pytest.raises(RequestError, match=r"q_proj behind .*at coordinate 4 is 0\.0e\+00: call fold_norm_gains_ and"):
        rotated_(model, fits, moments, Weighting(metric="input"))
    assert torch.equal(logits(model), before)
    fold_norm_gains_(model)
    rotated_(model, fits, kp.calibrate(model, [TOKENS], recipe("input")), Weighting(metric="input"), max_sweeps=1)
    assert_same(logits(model), before)


def test_wrong_requests_leave_the_model_as_it_was() -> None:
    model = network("gpt2")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    name = "transformer.h.0.mlp.c_fc"
    fits = fits_of(model, [name])
    for match, names, weighting, untie in (
        (r"transformer\.ln_f has a gain that is not constant", fits, Weighting(), False),
        ("magnitude` is one of single coordinates", fits, Weighting(metric="magnitude"), True),
        ("unknown layer on the residual stream 'c_fc'", {"c_fc": fits[name]}, Weighting(), True),
        (f"needs moments of '{name}': calibrate", fits, Weighting(metric="input"), True),
    ):
        with pytest.raises(RequestError, match=match):
            rotated_(model, names, {}, weighting, untie=untie)
    assert model.config.tie_word_embeddings
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
