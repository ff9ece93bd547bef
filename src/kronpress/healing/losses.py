"""The terms of the healing loss: pure functions of what the student gives and what it should give.

Every term is a mean, so that it depends neither on the number of sequences nor on their length. The three that compare
with a teacher are exactly 0 where student and teacher agree, and in half precision they are computed in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def language_model_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of −log p(target) in nats; logits (..., vocab), targets (...) of token ids."""
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten())


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T² · mean over tokens of KL(teacher ‖ student) = Σ_v p_v (log p_v − log q_v), both softened by T.

    The factor T² keeps the gradient's size independent of T (Hinton et al. 2015, section 2). It is exactly 0 when
    the logits are equal, and otherwise positive up to rounding.

    >>> logits = torch.randn(2, 5)
    >>> distillation_loss(logits, logits, temperature=2.0).item()
    0.0

    Args:
        student_logits, teacher_logits: (..., vocab).
    """
    log_p = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    log_q = F.log_softmax(student_logits.float() / temperature, dim=-1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def attention_loss(student_maps: Tensor, teacher_maps: Tensor) -> Tensor:
    """Mean over rows of KL(teacher ‖ student) = Σ_j p_j log(p_j / q_j), in nats.

    The attention term of KnGPT-2 (Edalati et al. 2021, arXiv 2110.08152). A row is what one head gives one token at one
    position, over the keys j that it looks at. Masked keys have p_j = q_j = 0 and add nothing, and a row in which the
    teacher looks at no key at all does not count in the mean.

    >>> maps = torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    >>> attention_loss(maps, maps).item()
    0.0

    Args:
        student_maps, teacher_maps: (..., queries, keys), not negative; the keys of a row add up to 1.
    """
    q, p = student_maps.float(), teacher_maps.float()
    # A probability that has underflowed must cost much, not infinitely much.
    smallest = torch.finfo(torch.float32).tiny
    log_ratio = p.clamp(min=smallest).log() - q.clamp(min=smallest).log()
    # Rounded rows add up to almost 1: with q − p, which is 0 in sum, that is no longer felt to first order.
    rows = (p * log_ratio + (q - p)).sum(-1)
    counts = p.sum(-1) > 0
    return (rows * counts).sum() / counts.sum().clamp(min=1)


def state_loss(student_states: Tensor, teacher_states: Tensor) -> Tensor:
    """Mean over all numbers of (student − teacher)²; both (..., width).

    The terms of the embedding's output and of the hidden states in KnGPT-2 (Edalati et al. 2021, arXiv 2110.08152).

    >>> state_loss(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 5.0])).item()
    4.5
    """
    return F.mse_loss(student_states.float(), teacher_states.float())
