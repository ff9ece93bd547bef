"""The terms of the healing loss obey their equations, are least where student and teacher agree, and say so exactly."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.healing import reference_distillation
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from kronpress.healing import (
    attention_loss,
    distillation_loss,
    forward_kl,
    jensen_shannon,
    language_model_loss,
    reverse_kl,
    state_loss,
)
from kronpress.healing.losses import log_distributions, logit_terms, top_logits

MASKED = torch.finfo(torch.float32).min


@st.composite
def score_pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Causal scores (sequences, heads, tokens, tokens) before the softmax, of a student and a teacher."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    sequences, heads, tokens = (draw(st.integers(1, largest)) for largest in (3, 3, 7))
    ahead = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    student, teacher = (
        (draw(st.sampled_from([0.1, 1.0, 6.0])) * torch.randn(sequences, heads, tokens, tokens, generator=generator))
        for _ in "st"
    )
    return student.masked_fill(ahead, MASKED), teacher.masked_fill(ahead, MASKED)


def reference_attention(student_maps: Tensor, teacher_maps: Tensor) -> float:
    """Row by row and key by key in Python's own numbers."""
    rows = zip(student_maps.flatten(0, -2).tolist(), teacher_maps.flatten(0, -2).tolist(), strict=True)
    divergences = [
        sum(p * math.log(p / q) for q, p in zip(student, teacher, strict=True) if p > 0)
        for student, teacher in rows
        if any(teacher)
    ]
    return sum(divergences) / len(divergences)


# ---- logits ----


@st.composite
def logit_pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor, float]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(2, 40)))
    student, teacher = (draw(st.sampled_from([0.1, 1.0, 8.0])) * torch.randn(shape, generator=generator) for _ in "st")
    return student, teacher, draw(st.sampled_from([0.5, 1.0, 2.0, 7.3]))


@given(logit_pairs())
@settings(max_examples=60, deadline=None)
def test_distillation_equals_the_definition_in_float64(pair):
    student, teacher, temperature = pair
    loss = distillation_loss(student, teacher, temperature)
    expected = reference_distillation(student, teacher, temperature)
    # The factor T² multiplies the rounding of float32 as well.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5 * max(1.0, temperature**2 / 4))
    assert loss >= -1e-6


@given(logit_pairs())
@settings(max_examples=60, deadline=None)
def test_distillation_is_exactly_zero_where_the_logits_agree(pair):
    logits, _, temperature = pair
    assert distillation_loss(logits, logits.clone(), temperature).item() == 0.0
    assert distillation_loss(logits.bfloat16(), logits.bfloat16(), temperature).item() == 0.0


@given(logit_pairs())
@settings(max_examples=40, deadline=None)
def test_the_gradient_of_distillation(pair):
    student, teacher, temperature = pair
    student.requires_grad_()
    distillation_loss(student, teacher, temperature).backward()
    # d/ds of T² KL(softmax(t/T) ‖ softmax(s/T)), by hand.
    q, p = ((logits.detach().double() / temperature).softmax(-1) for logits in (student, teacher))
    by_hand = temperature * (q - p) / q[..., 0].numel()
    torch.testing.assert_close(student.grad.double(), by_hand, rtol=1e-4, atol=1e-6)

    direction, step = torch.randn(student.shape, dtype=torch.float64), 1e-5
    ahead, behind = (
        reference_distillation(student.detach() + sign * step * direction, teacher, temperature) for sign in (1, -1)
    )
    slope = (student.grad * direction).sum()
    torch.testing.assert_close((ahead - behind) / (2 * step), slope, rtol=1e-3, atol=1e-4)


def test_the_gradient_of_distillation_keeps_its_size_at_high_temperature():
    torch.manual_seed(0)
    teacher = torch.randn(4, 10)
    norms = []
    for temperature in (50.0, 500.0):
        student = torch.zeros(4, 10, requires_grad=True)
        distillation_loss(student, teacher, temperature).backward()
        norms.append(student.grad.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


def test_distillation_is_forward_divergence_with_temperature_one_unless_told_otherwise():
    teacher, student = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert distillation_loss(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_language_model_loss_by_hand():
    logits = torch.tensor([[[math.log(3), 0.0], [0.0, 0.0]], [[0.0, math.log(7)], [0.0, 0.0]]])
    targets = torch.tensor([[0, 1], [0, 1]])
    expected = -(math.log(3 / 4) + math.log(1 / 2) + math.log(1 / 8) + math.log(1 / 2)) / 4
    assert language_model_loss(logits, targets).item() == pytest.approx(expected, rel=1e-6)
    rounded = logits.bfloat16()
    assert language_model_loss(rounded, targets).item() == language_model_loss(rounded.float(), targets).item()


# ---- other divergences, and the likeliest tokens alone ----

DIVERGENCES = {
    "forward": forward_kl,
    "reverse": reverse_kl,
    "between": jensen_shannon,
    "near the teacher": partial(jensen_shannon, teacher_share=0.9),
}


def by_definition(name: str, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p, q = (Categorical(logits=logits.double() / temperature) for logits in (teacher, student))
    share = {"between": 0.5, "near the teacher": 0.9}.get(name, 0.0)
    mixture = Categorical(probs=share * p.probs + (1 - share) * q.probs)
    divergence = {"forward": lambda: kl_divergence(p, q), "reverse": lambda: kl_divergence(q, p)}.get(
        name, lambda: share * kl_divergence(p, mixture) + (1 - share) * kl_divergence(q, mixture)
    )()
    return temperature**2 * divergence.mean()


@pytest.mark.parametrize("name", DIVERGENCES)
@given(logit_pairs())
@settings(max_examples=30, deadline=None)
def test_every_divergence_equals_its_definition(name, pair):
    student, teacher, temperature = pair
    loss = distillation_loss(student.double(), teacher.double(), temperature, divergence=DIVERGENCES[name])
    torch.testing.assert_close(loss, by_definition(name, student, teacher, temperature), rtol=1e-8, atol=1e-12)
    assert loss >= -1e-12


@pytest.mark.parametrize("name", DIVERGENCES)
@given(logit_pairs(), st.none() | st.integers(1, 50), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
@settings(max_examples=30, deadline=None)
def test_every_divergence_is_exactly_zero_and_flat_where_the_logits_agree(name, pair, top_k, dtype):
    logits, _, temperature = pair
    student = logits.to(dtype).requires_grad_()
    loss = distillation_loss(student, logits.to(dtype), temperature, top_k, DIVERGENCES[name])
    assert loss.item() == 0.0
    loss.backward()
    assert student.grad.abs().max() <= 1e-6 * temperature


@pytest.mark.parametrize("name", DIVERGENCES)
@given(logit_pairs(), st.none() | st.integers(1, 50))
@settings(max_examples=10, deadline=None)
def test_the_gradient_of_every_divergence_against_finite_differences(name, pair, top_k):
    student, teacher, temperature = pair

    def loss(logits: Tensor) -> Tensor:
        return distillation_loss(logits, teacher.double(), temperature, top_k, DIVERGENCES[name])

    student = student[:1, :2].double()
    teacher = teacher[:1, :2]
    assert torch.autograd.gradcheck(loss, (student.requires_grad_(),), atol=1e-5 * max(1.0, temperature**2))
    # Also where some logits agree exactly, which is where a divergence is put together from two branches.
    partly = torch.where(torch.arange(student.shape[-1]) % 2 == 0, student.detach(), teacher.double())
    assert torch.autograd.gradcheck(loss, (partly.requires_grad_(),), atol=1e-5 * max(1.0, temperature**2))


@given(logit_pairs(), st.floats(0.01, 0.99))
@settings(max_examples=40, deadline=None)
def test_the_divergence_from_the_mixture_is_bounded_and_lies_between_the_two(pair, share):
    log_q, log_p = (logits.double().log_softmax(-1) for logits in pair[:2])
    between = jensen_shannon(log_q, log_p, share)
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert between.max() <= entropy + 1e-9
    torch.testing.assert_close(between, jensen_shannon(log_p, log_q, 1 - share))
    # β has to be small beside the smallest probability.
    log_q, log_p = ((logits.double() / 5).log_softmax(-1) for logits in pair[:2])
    small, slack = 1e-9, {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(jensen_shannon(log_q, log_p, small) / small, forward_kl(log_q, log_p), **slack)
    # β of almost 1, as the other way round: 1 − β would be rounded.
    torch.testing.assert_close(jensen_shannon(log_p, log_q, small) / small, reverse_kl(log_q, log_p), **slack)


@pytest.mark.parametrize("name", DIVERGENCES)
@given(logit_pairs(), st.integers(1, 45))
@settings(max_examples=30, deadline=None)
def test_fewer_tokens_tell_less_and_all_tokens_tell_all(name, pair, top_k):
    student, teacher, temperature = pair
    divergence, vocabulary = DIVERGENCES[name], student.shape[-1]
    whole, less, more = (
        distillation_loss(student.double(), teacher.double(), temperature, k, divergence)
        for k in (None, top_k, top_k + 1)
    )
    slack = 1e-9 * max(1.0, whole.item())
    assert less <= more + slack
    assert more <= whole + slack
    if top_k >= vocabulary - 1:  # what is left is one token at most
        torch.testing.assert_close(less, whole, rtol=1e-9, atol=1e-12)


@given(logit_pairs(), st.integers(1, 39))
@settings(max_examples=40, deadline=None)
def test_the_teachers_likeliest_tokens_stay_and_the_rest_is_one(pair, top_k):
    student, teacher, temperature = pair
    log_q, log_p = log_distributions(student.double(), teacher.double(), temperature, top_k)
    for row, (student_row, teacher_row) in enumerate(
        zip(student.flatten(0, -2).double(), teacher.flatten(0, -2).double(), strict=True)
    ):
        q, p = ((each / temperature).softmax(-1).tolist() for each in (student_row, teacher_row))
        kept = sorted(range(len(p)), key=lambda v: -p[v])[:top_k]
        for given_log, probabilities in ((log_q, q), (log_p, p)):
            expected = [probabilities[v] for v in kept]
            if len(p) > top_k:
                expected.append(sum(x for v, x in enumerate(probabilities) if v not in kept))
            actual = given_log.flatten(0, -2)[row].exp().tolist()
            # All tokens stay in their own order.
            assert sorted(actual) == pytest.approx(sorted(expected), abs=1e-9)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("top_k", [None, 2])
def test_probabilities_that_have_underflowed_give_finite_losses_and_gradients(name, top_k):
    for scale in (1e2, 1e4):
        student = (scale * torch.tensor([[1.0, 0.0, -1.0, 0.5]])).requires_grad_()
        loss = distillation_loss(student, -student.detach(), top_k=top_k, divergence=DIVERGENCES[name])
        loss.backward()
        assert loss.isfinite()
        assert loss > 0.3
        assert student.grad.isfinite().all()


@given(logit_pairs(), st.none() | st.integers(1, 20), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_terms_of_each_token_are_in_the_mean_the_losses(pair, top_k, is_soft, all_but_one):
    student, teacher, temperature = (pair[0].flatten(0, 1), pair[1].flatten(0, 1), pair[2] if is_soft else 1.0)
    if all_but_one:  # these and the rest are as many as the vocabulary
        top_k = student.shape[-1] - 1
    targets = student.argmin(-1)
    known = top_logits(teacher, min(top_k or 40, student.shape[-1]), temperature)
    for given_teacher in (teacher, known):
        terms = logit_terms(student, given_teacher, targets, DIVERGENCES, temperature, top_k)
        assert list(terms) == ["language_model_nats", *DIVERGENCES]
        assert all(term.shape == targets.shape for term in terms.values())
        torch.testing.assert_close(terms["language_model_nats"].mean(), language_model_loss(student, targets))
        for name, divergence in DIVERGENCES.items():
            expected = distillation_loss(student, teacher, temperature, top_k, divergence)
            torch.testing.assert_close(terms[name].mean(), expected, rtol=1e-4, atol=1e-6)
    assert list(logit_terms(student, None, targets, DIVERGENCES)) == ["language_model_nats"]


# ---- attention maps ----


@given(score_pairs())
@settings(max_examples=60, deadline=None)
def test_attention_loss_equals_the_definition(scores):
    student, teacher = (each.double().softmax(-1) for each in scores)
    loss = attention_loss(student.float(), teacher.float())
    expected = torch.tensor(reference_attention(student, teacher))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)


def test_attention_loss_is_forward_divergence_by_hand():
    student, teacher = torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([[0.75, 0.25], [1.0, 0.0]])
    expected = (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)) / 2
    assert attention_loss(student, teacher).item() == pytest.approx(expected, rel=1e-6)


@given(score_pairs(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
@settings(max_examples=60, deadline=None)
def test_attention_loss_is_exactly_zero_where_maps_agree_and_else_not_below(scores, dtype):
    student, teacher = (each.softmax(-1).to(dtype) for each in scores)
    assert attention_loss(teacher, teacher.clone()).item() == 0.0
    # Also where rounding has kept the rows from adding up to 1.
    assert attention_loss(student, teacher).item() >= -1e-6
    nearly = (teacher.float() * (1 + 0.01 * student.float())).to(dtype)
    assert attention_loss(nearly, teacher).item() >= -1e-7


@given(score_pairs())
@settings(max_examples=40, deadline=None)
def test_the_gradient_of_attention_loss_by_the_scores(scores):
    student, teacher = scores
    student.requires_grad_()
    attention_loss(student.softmax(-1), teacher.softmax(-1)).backward()
    q, p = (each.detach().double().softmax(-1) for each in scores)
    torch.testing.assert_close(student.grad.double(), (q - p) / q[..., 0].numel(), rtol=1e-4, atol=1e-6)


@given(score_pairs(), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_attention_loss_minds_no_order_no_copies_and_no_masked_keys(scores, random):
    student, teacher = (each.softmax(-1) for each in scores)
    loss = attention_loss(student, teacher)
    for dim in range(4):
        order = list(range(student.shape[dim]))
        random.shuffle(order)
        mixed = (each.index_select(dim, torch.tensor(order)) for each in (student, teacher))
        torch.testing.assert_close(attention_loss(*mixed), loss, rtol=1e-5, atol=1e-6)
    doubled = (each.repeat(2, 3, 1, 1) for each in (student, teacher))
    torch.testing.assert_close(attention_loss(*doubled), loss, rtol=1e-5, atol=1e-6)
    wider = (torch.nn.functional.pad(each, (0, 3)) for each in (student, teacher))
    torch.testing.assert_close(attention_loss(*wider), loss, rtol=1e-5, atol=1e-6)


@given(score_pairs())
@settings(max_examples=40, deadline=None)
def test_rows_that_look_nowhere_do_not_count(scores):
    student, teacher = (each.softmax(-1) for each in scores)
    # The student's rows there may hold anything: there is nothing to be like.
    longer = attention_loss(
        torch.nn.functional.pad(student, (0, 0, 2, 1), value=0.3), torch.nn.functional.pad(teacher, (0, 0, 2, 1))
    )
    torch.testing.assert_close(longer, attention_loss(student, teacher), rtol=1e-5, atol=1e-6)
    assert attention_loss(student, torch.zeros_like(teacher)).item() == 0.0


def test_a_probability_that_has_underflowed_costs_much_but_not_infinitely_much():
    scores = torch.tensor([[-300.0, 0.0]], requires_grad=True)
    student, teacher = scores.softmax(-1), torch.tensor([[1.0, 0.0]])
    assert student[0, 0] == 0
    loss = attention_loss(student, teacher)
    loss.backward()
    assert 50 < loss.item() < 300
    assert scores.grad.isfinite().all()


# ---- states ----


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(0, 2**32), st.sampled_from([1e-3, 1.0, 1e3]))
@settings(max_examples=40, deadline=None)
def test_state_loss_equals_the_definition(shape, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(shape, generator=generator) for _ in "st")
    squares = [(a - b) ** 2 for a, b in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)]
    expected = torch.tensor(sum(squares) / len(squares))
    torch.testing.assert_close(state_loss(student, teacher), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(state_loss(teacher, student), expected, rtol=1e-5, atol=0)
    assert state_loss(teacher, teacher.clone()).item() == 0.0
    rounded = student.bfloat16(), teacher.bfloat16()
    assert state_loss(*rounded).item() == state_loss(*(each.float() for each in rounded)).item()
