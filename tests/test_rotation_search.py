"""The search for a rotation: its loss and gradient are those of the definition, and it only ever gains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from samples.matrices import complement_of_ones, kronecker_fit, normal, orthogonal
from torch import Tensor

from kronpress import RequestError, WorkError
from kronpress.matrices.metric import Metric
from kronpress.rotation import Target, nearest_orthogonal, procrustes_rotation
from kronpress.rotation.search import HeldFits, best_rotation, held_fits

laws = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**32)


def moment(seed: int, size: int) -> Tensor:
    x = normal(seed, size + 2, size) * torch.arange(1, size + 1)
    return x.mT @ x / len(x)


@given(seed=seeds, size=st.integers(2, 7), keeps_ones=st.booleans(), rank=st.integers(0, 7))
@laws
def test_the_nearest_orthogonal_matrix_has_the_largest_trace(seed: int, size: int, keeps_ones: bool, rank: int) -> None:
    """Of rank-deficient M too; against the same problem written in a basis of the complement of the ones."""
    matrix = normal(seed, size, rank) @ normal(seed + 1, rank, size)
    q = nearest_orthogonal(matrix, keeps_ones)
    identity, ones = torch.eye(size, dtype=torch.float64), torch.ones(size, dtype=torch.float64)
    torch.testing.assert_close(q.mT @ q, identity)
    if keeps_ones:
        torch.testing.assert_close(q @ ones, ones)
        basis = complement_of_ones(size)
        best = matrix.sum() / size + torch.linalg.svdvals(basis.mT @ matrix @ basis).sum()
    else:
        best = torch.linalg.svdvals(matrix).sum()
    torch.testing.assert_close((q * matrix).sum(), best)
    assert (orthogonal(seed + 2, size, keeps_ones) * matrix).sum() <= best + 1e-9


def targets(seed: int, size: int, near: bool, far: bool, fit: Callable[[int], Any]) -> list[Target]:
    """Readers and writers in turn, of other sizes, with and without a metric on the stream's and the other side."""
    found = []
    for i in range(4):
        side, other = ("in", "out")[i % 2], 2 + i
        shape = (other, size) if side == "in" else (size, other)
        stream, beyond = moment(seed + i, size) if near else None, moment(seed + i, other) if far else None
        metric = Metric(stream, beyond) if side == "in" else Metric(beyond, stream)
        found.append(Target(normal(seed + i, *shape), side, metric, fit(i), importance=1.0 + i))
    return found


def error_by_definition(q: Tensor, target: Target, fitted: Tensor) -> Tensor:
    """tr(G ΔW C ΔWᵀ) in the turned basis, with both sides of the metric written out."""
    w, metric = target.weight, target.metric
    inner = torch.eye(w.shape[1], dtype=w.dtype) if metric.input is None else metric.input
    outer = torch.eye(w.shape[0], dtype=w.dtype) if metric.output is None else metric.output
    if target.side == "in":
        w, inner = w @ q, q.mT @ inner @ q
    else:
        w, outer = q.mT @ w, q.mT @ outer @ q
    return target.importance * (outer @ (w - fitted) @ inner @ (w - fitted).mT).trace()


@given(seed=seeds, size=st.integers(2, 6), near=st.booleans(), far=st.booleans())
@laws
def test_the_held_loss_and_its_gradient_are_those_of_the_definition(
    seed: int, size: int, near: bool, far: bool
) -> None:
    start, q = orthogonal(seed, size), orthogonal(seed + 1, size).requires_grad_()
    held = [normal(seed + 7 + i, *((2 + i, size) if i % 2 == 0 else (size, 2 + i))) for i in range(4)]
    all_targets = targets(seed, size, near, far, lambda i: lambda w, metric: held[i])
    terms = held_fits(start, range(4), all_targets.__getitem__)
    loss = sum(error_by_definition(q, *each) for each in zip(all_targets, held, strict=True))
    at_start = sum(error_by_definition(start, *each) for each in zip(all_targets, held, strict=True))
    assert terms.loss == pytest.approx(at_start.item())
    product = terms.times(q.detach())
    assert terms.value(q.detach(), product) == pytest.approx(loss.item())
    (gradient,) = torch.autograd.grad(loss, q)
    # Without a metric on the stream, tr(A Qᵀ Q) is a constant on rotations: only what is along them is compared.
    difference = gradient - 2 * (product - terms.linear)
    along = q.detach().mT @ difference
    torch.testing.assert_close(
        along - along.mT, torch.zeros_like(along), atol=1e-7 * gradient.abs().max().item(), rtol=0
    )


@given(seed=seeds, size=st.integers(2, 6), near=st.booleans(), far=st.booleans(), keeps_ones=st.booleans())
@laws
def test_the_best_rotation_never_raises_the_loss(seed: int, size: int, near: bool, far: bool, keeps_ones: bool) -> None:
    start = orthogonal(seed, size, keeps_ones)
    held = [normal(seed + 7 + i, *((2 + i, size) if i % 2 == 0 else (size, 2 + i))) for i in range(4)]
    terms = held_fits(start, range(4), targets(seed, size, near, far, lambda i: lambda w, _: held[i]).__getitem__)

    def value(q: Tensor) -> float:
        return terms.value(q, terms.times(q))

    found = best_rotation(start, terms, keeps_ones)
    torch.testing.assert_close(found.mT @ found, torch.eye(size, dtype=torch.float64))
    assert value(found) <= terms.loss * (1 + 1e-9)
    if keeps_ones:
        torch.testing.assert_close(found.sum(dim=1), torch.ones(size, dtype=torch.float64))
    if not near:  # then it is the best there is
        assert value(found) <= value(orthogonal(seed + 1, size, keeps_ones)) + 1e-9 * terms.loss
    # Many steps end where no small turn helps.
    ended = best_rotation(start, terms, keeps_ones, max_steps=3000)
    assert value(ended) <= value(found) * (1 + 1e-9) + 1e-9


def test_a_step_follows_a_steep_quadratic_down() -> None:
    """Where the linearised problem overshoots, shorter steps are taken until the loss falls."""
    k, a = torch.diag(torch.tensor([100.0, 1.0]).double()), torch.diag(torch.tensor([1.0, 100.0]).double())
    angle = torch.tensor(0.3).double()
    q = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    terms = HeldFits(torch.zeros(2, 2).double(), [(k, a)], 0.0, 0.0)
    found = best_rotation(q, terms, keeps_ones=False, max_steps=500)
    assert terms.value(q, terms.times(q)) > 800
    assert terms.value(found, terms.times(found)) == pytest.approx(200, rel=1e-2)  # of aligned axes


def planted(seed: int, angle: float, keeps_ones: bool, with_metric: bool) -> list[Target]:
    """Eight Kronecker products in a basis that is turned by at most `angle`."""
    size = 12
    skew = normal(seed, size, size)
    if keeps_ones:
        skew = skew - skew.mean(dim=0)
        skew = skew - skew.mean(dim=1, keepdim=True)
    skew = skew - skew.mT
    q = torch.linalg.matrix_exp(angle * skew / torch.linalg.matrix_norm(skew, 2))
    found = []
    for i in range(8):
        left, right = ((6, 12), (2, 1)) if i % 2 else ((12, 6), (1, 2))
        weight = torch.kron(normal(seed + i, *left), normal(seed - i, *right))
        metric = Metric(moment(seed + i, 12)) if with_metric else Metric()
        side, turned = ("out", q @ weight) if i % 2 else ("in", weight @ q.mT)
        found.append(Target(turned, side, metric, kronecker_fit(left, right)))
    return found


@pytest.mark.parametrize("with_metric", [False, True], ids=["frobenius", "metric"])
@pytest.mark.parametrize("keeps_ones", [False, True], ids=["any", "keeps ones"])
def test_a_planted_small_rotation_is_recovered_and_the_losses_fall(keeps_ones: bool, with_metric: bool) -> None:
    all_targets = planted(100, 0.2, keeps_ones, with_metric)
    rounds: list[tuple[int, float]] = []
    found = procrustes_rotation(
        range(8),
        all_targets.__getitem__,
        keeps_ones=keeps_ones,
        max_sweeps=150,
        progress=lambda *each: rounds.append(each),
    )
    assert found.losses[-1] < 1e-3 * found.losses[0]
    assert all(later < earlier for earlier, later in zip(found.losses, found.losses[1:], strict=False))
    assert [loss for _, loss in rounds][: len(found.losses)] == list(found.losses)
    q, loss = found.matrix, torch.tensor(0.0).double()
    for target in all_targets:
        turned = held_fits(q, ["it"], lambda _, target=target: target)
        loss += turned.loss
    assert loss.item() == pytest.approx(found.losses[-1])
    if keeps_ones:
        torch.testing.assert_close(q.sum(dim=1), torch.ones(12, dtype=torch.float64))


def test_where_nothing_is_to_be_gained_it_ends_where_it_began() -> None:
    """The weights are their own fits, or a fit that is always zero is as bad in every basis."""
    for fit in (lambda w, _: w, lambda w, _: torch.zeros_like(w)):
        all_targets = [replace(each, fit=fit) for each in planted(0, 1.0, False, False)]
        found = procrustes_rotation(range(8), all_targets.__getitem__, keeps_ones=False)
        assert found.losses[0] == pytest.approx(found.losses[-1])
        if found.losses[0] == 0:
            torch.testing.assert_close(found.matrix, torch.eye(12, dtype=torch.float64))


def test_targets_that_do_not_fit_together_are_refused() -> None:
    all_targets = planted(0, 0.1, False, False)
    with pytest.raises(RequestError, match="at least one weight"):
        procrustes_rotation([], all_targets.__getitem__, keeps_ones=False)
    narrow = replace(all_targets[1], weight=normal(0, 6, 12))
    with pytest.raises(RequestError, match="second has 6 channels on its side of the stream, others have 12"):
        procrustes_rotation(
            ["first", "second"], {"first": all_targets[0], "second": narrow}.__getitem__, keeps_ones=False
        )
    broken = replace(all_targets[0], fit=lambda w, _: w * torch.nan)
    with pytest.raises(WorkError, match="the fit of it holds NaN or infinity"):
        procrustes_rotation(["it"], lambda _: broken, keeps_ones=False)
