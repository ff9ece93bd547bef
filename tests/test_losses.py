"""The terms that compare the inside of two networks obey their equations, and blocks are matched as is said."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kronpress as kp
from kronpress.healing import attention_loss, match_blocks, state_loss

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


# ---- matching of blocks ----


@given(num_student=st.integers(1, 40), num_teacher=st.integers(1, 40))
def test_each_block_meets_the_one_in_which_its_share_of_the_depth_ends(num_student, num_teacher):
    matched = match_blocks(num_student, num_teacher)
    assert len(matched) == num_student
    for i, block in enumerate(matched):
        end = Fraction(i + 1, num_student)
        assert Fraction(block, num_teacher) < end <= Fraction(block + 1, num_teacher)
    assert matched[-1] == num_teacher - 1
    assert match_blocks(num_teacher, num_teacher) == list(range(num_teacher))


@given(st.lists(st.integers(0, 8), min_size=1, max_size=5))
def test_a_map_is_taken_as_it_is(layer_map):
    assert match_blocks(len(layer_map), 9, layer_map) == layer_map
    with pytest.raises(kp.RequestError, match=rf"names {len(layer_map)} blocks: the student has {len(layer_map) + 1}"):
        match_blocks(len(layer_map) + 1, 9, layer_map)
    with pytest.raises(kp.RequestError, match=rf"block {max(layer_map)}: the teacher has 0 to {max(layer_map) - 1}"):
        match_blocks(len(layer_map), max(layer_map), layer_map)
