"""TensorGPT: tokens are independent, rows come from cores, padding changes nothing, fits are nearest for two cores."""

from __future__ import annotations

from math import prod
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from samples.matrices import normal
from torch import Tensor
from transformers import GPT2Config

import kronpress as kp
from kronpress.matrices import TensorGPT
from kronpress.matrices.metric import Metric
from kronpress.matrices.tensor_gpt import FITTED_TOKENS, core_sizes, with_tokens, without_tokens

laws = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**32)


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, int, Any]:
    """Tokens, a width, and a spec for it, padded or not."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=2, max_size=4)))
    width = draw(st.integers(max(1, prod(shape) - 3), prod(shape)))
    full = max(min(prod(shape[:k]), prod(shape[k:])) for k in range(len(shape) + 1))
    return draw(st.integers(1, 20)), width, TensorGPT.Spec(shape=shape, rank=draw(st.integers(1, full)))


def slow_row(row: Tensor, spec: Any) -> Tensor:
    """TT-SVD of one row, as a textbook has it (Oseledets 2011, algorithm 1), and the row that it stands for."""
    padded = torch.zeros(prod(spec.shape), dtype=row.dtype)
    padded[: len(row)] = row
    left, rank, made = padded, 1, torch.ones(1, 1, dtype=row.dtype)
    for k, size in enumerate(spec.shape[:-1]):
        u, s, v = torch.linalg.svd(left.reshape(rank * size, -1), full_matrices=False)
        new = min(spec.rank, prod(spec.shape[: k + 1]), prod(spec.shape[k + 1 :]))
        made = (made @ u[:, :new].reshape(rank, size * new)).reshape(-1, new)
        left, rank = torch.diag(s[:new]) @ v[:new], new
    return (made @ left.reshape(rank, -1)).flatten()[: len(row)]


def covariance(seed: int, size: int) -> Tensor:
    x = normal(seed, 3 * size, size) * torch.logspace(0, -1, size, dtype=torch.float64)
    return x.mT @ x


@given(case=cases(), seed=seeds)
@laws
def test_every_row_is_its_own_truncated_tensor_train(case: Any, seed: int) -> None:
    tokens, width, spec = case
    weight = normal(seed, tokens, width)
    fitted = TensorGPT.expand(TensorGPT.fit(weight, spec))
    expected = torch.stack([slow_row(row, spec) for row in weight])
    torch.testing.assert_close(fitted, expected, rtol=1e-8, atol=1e-8)


@given(case=cases(), seed=seeds)
@laws
def test_tokens_come_and_go_without_touching_others(case: Any, seed: int) -> None:
    tokens, width, spec = case
    weight, new = normal(seed, tokens, width), normal(seed + 1, 3, width)
    factors = TensorGPT.fit(weight, spec)
    more = with_tokens(factors, new, spec)
    for name, core in factors.items():
        kept = more[name][:tokens] if core.is_floating_point() else more[name]
        torch.testing.assert_close(kept, core, rtol=0, atol=0)
    together = TensorGPT.expand(TensorGPT.fit(torch.cat([weight, new]), spec))
    torch.testing.assert_close(TensorGPT.expand(more), together, rtol=1e-9, atol=1e-9)
    TensorGPT(tokens + 3, width, spec, dtype=torch.float64).load_state_dict(more, strict=True)
    gone = [0, tokens]
    expected = torch.cat([TensorGPT.expand(factors)[1:], TensorGPT.expand(more)[tokens + 1 :]])
    torch.testing.assert_close(TensorGPT.expand(without_tokens(more, gone)), expected, rtol=0, atol=0)


@given(case=cases(), seed=seeds, vectors=st.integers(1, 20))
@laws
def test_a_head_is_served_from_the_cores_for_few_and_for_many_vectors(case: Any, seed: int, vectors: int) -> None:
    tokens, width, spec = case
    factors = TensorGPT.fit(normal(seed, tokens, width), spec)
    x, bias, dense = normal(seed + 1, vectors, width), normal(seed + 2, tokens), TensorGPT.expand(factors)
    torch.testing.assert_close(TensorGPT.multiply(factors, x, bias), x @ dense.mT + bias)
    indices = torch.arange(tokens).flip(0)[None]
    torch.testing.assert_close(TensorGPT.rows(factors, indices), dense[indices])


@given(case=cases(), seed=seeds)
@laws
def test_real_inputs_never_make_a_row_worse_in_their_metric(case: Any, seed: int) -> None:
    tokens, width, spec = case
    weight, c = normal(seed, tokens, width), covariance(seed + 1, width)
    plain, seen = (weight - TensorGPT.expand(TensorGPT.fit(weight, spec, metric)) for metric in (None, Metric(c)))
    before, after = (((each @ c) * each).sum(1) for each in (plain, seen))
    assert (after <= before * (1 + 1e-9) + 1e-9 * weight.square().sum()).all()


@given(seed=seeds, rank=st.integers(1, 3))
@laws
def test_in_a_separable_metric_two_cores_are_nearest(seed: int, rank: int) -> None:
    """C_1 ⊗ C_2 turns the loss of a row, as a 3 × 4 matrix X, into that of C_1^½ X C_2^½ in Frobenius norm."""
    weight, c1, c2 = normal(seed, 5, 12), covariance(seed + 1, 3), covariance(seed + 2, 4)
    metric = Metric(torch.kron(c1, c2))
    fitted = TensorGPT.expand(TensorGPT.fit(weight, TensorGPT.Spec(shape=(3, 4), rank=rank), metric))
    roots = [torch.linalg.cholesky(each) for each in (c1, c2)]
    singular = torch.linalg.svdvals(roots[0].mT @ weight.view(5, 3, 4) @ roots[1])
    assert metric.squared_norm(weight - fitted) == pytest.approx(singular[:, rank:].square().sum().item(), rel=1e-6)


@given(width=st.integers(1, 2000), num_cores=st.integers(2, 8))
@laws
def test_sizes_of_cores_hold_the_width(width: int, num_cores: int) -> None:
    sizes = core_sizes(width, num_cores)
    assert len(sizes) == num_cores
    assert width <= prod(sizes)
    assert sum(sizes) <= 2 * sum(core_sizes(width, 2))


def test_many_tokens_are_fitted_like_few() -> None:
    weight, spec = normal(0, FITTED_TOKENS + 5, 4), TensorGPT.Spec(shape=(2, 2))
    fitted = TensorGPT.expand(TensorGPT.fit(weight, spec))
    torch.testing.assert_close(fitted[-7:], TensorGPT.expand(TensorGPT.fit(weight[-7:], spec)))


def test_the_recipe_has_the_papers_largest_compression() -> None:
    plan = kp.make_plan(GPT2Config(), kp.load_recipe("tensorgpt"))
    (layer,) = plan.layers.values()
    assert layer.num_params_dense / layer.num_params == pytest.approx(38.4)
    assert layer.heads == ["lm_head"]
