"""The metric of one layer: which moments it is made of, how far it is shrunk, and that ASVD is one of its kind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import kronpress as kp
from kronpress.matrices import STRUCTURES, LowRank
from kronpress.matrices.metric import Metric
from kronpress.matrices.moments import InputMoments
from kronpress.recipe import Weighting
from kronpress.weighting import SHRINKAGE_UNSEEN, SHRINKAGES, layer_metric, shrinkage, shrunk, unshrunk_metric

SEEDS = st.integers(0, 2**31 - 1)


def rows(seed: int, count: int, size: int, mixing: Tensor | None = None) -> Tensor:
    x = torch.randn(count, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x if mixing is None else x @ mixing


def moments_of(x: Tensor, held_out: Tensor | None = None) -> InputMoments:
    return InputMoments(
        x.mT @ x / len(x),
        x.mean(0),
        len(x),
        held_out=None if held_out is None else held_out.mT @ held_out / len(held_out),
        magnitude=x.abs().mean(0),
    )


def linear(out_features: int, in_features: int, bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, bias=bias, dtype=torch.float64)


@given(seed=SEEDS, sizes=st.tuples(st.integers(4, 9), st.integers(4, 9)))
def test_asvd_is_the_svd_of_scaled_columns(seed: int, sizes: tuple[int, int]) -> None:
    layer, x = linear(*sizes), rows(seed, 40, sizes[1])
    weight = layer.weight.detach()
    metric = layer_metric(layer, weight, moments_of(x), Weighting(metric="magnitude"))
    fitted = LowRank.expand(LowRank.fit(weight, LowRank.Spec(rank=2), metric))
    scale = x.abs().mean(0).sqrt()
    u, s, v = torch.linalg.svd(weight * scale, full_matrices=False)
    torch.testing.assert_close(fitted, (u[:, :2] * s[:2]) @ v[:2] / scale)


def test_moments_without_magnitudes_cannot_give_asvd() -> None:
    layer = linear(3, 4)
    moments = replace(moments_of(rows(0, 9, 4)), magnitude=None)
    with pytest.raises(kp.RequestError, match=r"needs E\|x\|"):
        layer_metric(layer, layer.weight.detach(), moments, Weighting(metric="magnitude"))


def test_the_magnitude_is_measured_on_the_calibration_tokens(tiny_model) -> None:
    model, ids = tiny_model("gpt2"), torch.randint(3, 300, (4, 24), generator=torch.Generator().manual_seed(0))
    recipe = kp.Recipe(structure="low_rank", budget={"kept_of_targets": 0.5}, calibration={"held_out": 0.0})
    measured = kp.calibrate(model, [ids[:3], ids[3:]], recipe)
    read: list[Tensor] = []
    name = next(iter(measured))
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, x: read.append(x[0].detach()))
    with torch.no_grad():
        model(input_ids=ids)
    hook.remove()
    torch.testing.assert_close(measured[name].magnitude, read[0].flatten(0, 1).double().abs().mean(0))


@given(seed=SEEDS, amount=st.floats(0, 1), size=st.integers(2, 7))
def test_shrinking_keeps_the_diagonal_and_scales_the_rest(seed: int, amount: float, size: int) -> None:
    c = moments_of(rows(seed, 20, size)).second
    by_hand = torch.tensor([[c[i, j] * (1 if i == j else 1 - amount) for j in range(size)] for i in range(size)])
    torch.testing.assert_close(shrunk(Metric(c), amount).input, by_hand.double())


@given(seed=SEEDS, bias=st.booleans(), count=st.integers(5, 60))
def test_the_chosen_shrinkage_is_the_best_on_what_was_held_out(seed: int, bias: bool, count: int) -> None:
    mixing = rows(seed + 1, 8, 8)
    seen, unseen = rows(seed, count, 8, mixing) + 0.5, rows(seed + 2, 200, 8, mixing) + 0.5
    layer, moments = linear(6, 8, bias), moments_of(seen, unseen)
    weighting = Weighting(metric="input", bias_correction=True, shrinkage="held_out")
    weight = layer.weight.detach()
    metric = unshrunk_metric(layer, weight, moments, weighting)
    chosen = shrinkage(weight, metric, moments, weighting)

    def error(amount: float) -> float:
        c = (1 - amount) * moments.second + amount * torch.diag(moments.second.diagonal())
        difference = weight - LowRank.expand(LowRank.fit(weight, LowRank.Spec(rank=6 * 8 // 2 // 14), c))
        return (unseen @ difference.mT).square().sum(1).mean().item()

    allowed = [amount for amount in SHRINKAGES if amount > 0 or count >= 8]
    assert chosen in allowed
    assert error(chosen) <= min(map(error, allowed)) * (1 + 1e-6)


def test_few_tokens_are_never_taken_at_their_word() -> None:
    layer = linear(6, 8)
    weight = layer.weight.detach()
    for count, held_out, asked, expected in [
        (7, None, 0.0, SHRINKAGE_UNSEEN),
        (7, None, 0.5, 0.5),
        (7, None, "held_out", SHRINKAGE_UNSEEN),
        (8, None, 0.0, 0.0),
        (8, None, 0.25, 0.25),
    ]:
        moments = moments_of(rows(1, count, 8), held_out)
        weighting = Weighting(metric="input", shrinkage=asked)
        metric = unshrunk_metric(layer, weight, moments, weighting)
        assert shrinkage(weight, metric, moments, weighting) == expected


@pytest.mark.parametrize("structure", STRUCTURES)
def test_constant_inputs_about_their_mean_leave_the_plain_fit(structure: str) -> None:
    layer = linear(8, 8, bias=True)
    weight, x = layer.weight.detach(), torch.ones(20, 8, dtype=torch.float64)
    metric = layer_metric(layer, weight, moments_of(x), Weighting(metric="input", bias_correction=True))
    assert metric.squared_norm(weight) == 0
    matrix_class = STRUCTURES[structure]
    spec = matrix_class.candidate_specs(8, 8, 48)[0]
    expand = matrix_class.expand
    torch.testing.assert_close(expand(matrix_class.fit(weight, spec, metric)), expand(matrix_class.fit(weight, spec)))


@pytest.mark.parametrize("field", ["bias_correction", "sequential", "shrinkage"])
@pytest.mark.parametrize("metric", ["none", "magnitude"])
def test_what_follows_from_a_moment_needs_one(metric: str, field: str) -> None:
    with pytest.raises(kp.RequestError, match="need a metric, input or loss"):
        kp.load_recipe("low-rank", [f"weighting.metric={metric}", f"weighting.{field}=1"])


def test_a_shrinkage_outside_its_range_is_refused() -> None:
    for value in ("1.5", "-0.1", "often"):
        with pytest.raises(kp.RequestError, match=r"weighting\.shrinkage"):
            kp.load_recipe("svd-llm", [f"weighting.shrinkage={value}"])
