"""The terms of the healing loss: pure functions of what the student gives and what it should give.

Every term is a mean, so that it depends neither on the number of sequences nor on their length. All that compare with a
teacher are exactly 0 where student and teacher agree; what is in half precision is computed in float32.

p is the teacher's distribution over the vocabulary at one token, q the student's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def language_model_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of −log p(target) in nats; logits (..., vocab), targets (...) of token ids."""
    return F.cross_entropy(_full(logits).flatten(0, -2), targets.flatten())


def forward_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ_v p_v (log p_v − log q_v): q must not miss what p does. (..., vocab) to (...)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q ‖ p) = Σ_v q_v (log q_v − log p_v): q must not do what p does not (Gu et al. 2023, arXiv 2306.08543)."""
    return forward_kl(log_p, log_q)


def jensen_shannon(log_q: Tensor, log_p: Tensor, teacher_share: float = 0.5) -> Tensor:
    """β KL(p ‖ m) + (1 − β) KL(q ‖ m) with m = β p + (1 − β) q and β = `teacher_share`, between 0 and 1.

    At most log 2, and symmetric for β = ½. Divided by β it tends to KL(p ‖ q) where β goes to 0, and divided by 1 − β
    to KL(q ‖ p) where β goes to 1 (Agarwal et al. 2023, arXiv 2306.13649).
    """
    beta = teacher_share
    gap = log_q - log_p
    # log(m/p) = log(1 + (1 − β)(q/p − 1)) and log(m/q) = log(1 + β (p/q − 1)): exactly 0 at p = q. Of the two the one
    # with a ratio below 1 is computed, and they differ by the gap.
    below = torch.expm1(torch.where(gap <= 0, gap, -gap))
    m_to_p = torch.where(gap <= 0, torch.log1p((1 - beta) * below), torch.log1p(beta * below) + gap)
    return -(beta * log_p.exp() * m_to_p + (1 - beta) * log_q.exp() * (m_to_p - gap)).sum(-1)


Divergence = Callable[[Tensor, Tensor], Tensor]


def log_distributions(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, top_k: int | None = None
) -> tuple[Tensor, Tensor]:
    """log q and log p, both softened by the temperature; (..., vocab) each.

    With `top_k` the teacher's k likeliest tokens stay, in both, and all the others are one event, whose probability is
    theirs together: (..., k + 1), still two distributions. What a divergence says of these is a divergence itself, and
    never more than it says of the whole vocabulary (data processing inequality): it is 0 if and only if the k tokens
    have the same probabilities. With k = vocab or more nothing is put together.

    >>> p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    >>> log_distributions(p.log(), p.log(), top_k=2)[1].exp()
    tensor([0.5000, 0.3000, 0.2000])
    """
    student, teacher = _softened(student_logits, temperature), _softened(teacher_logits, temperature)
    if top_k is None or top_k >= teacher.shape[-1]:
        return F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
    kept = teacher.topk(top_k, dim=-1).indices
    return _with_rest_as_one(student, kept), _with_rest_as_one(teacher, kept)


def _with_rest_as_one(logits: Tensor, kept: Tensor) -> Tensor:
    """The log-probabilities of the tokens `kept` (..., k) of logits (..., vocab), and of all others: (..., k + 1)."""
    # Not as 1 − Σ p: of what is left little would be left of its digits.
    rest = logits.scatter(-1, kept, -math.inf).logsumexp(-1, keepdim=True)
    return F.log_softmax(torch.cat([logits.gather(-1, kept), rest], -1), -1)


class TopLogits(NamedTuple):
    """A teacher's distribution: of each token its k likeliest successors, and all others as one event.

    Three tensors (..., k), (..., k) and (...): log-probabilities, downwards, the token ids that they are of, int64, and
    the log of the probability of all others, −∞ if k is the whole vocabulary. Together they add up to 1. It is
    `log_p` of `log_distributions` for one temperature and `top_k`.
    """

    values: Tensor
    indices: Tensor
    log_rest: Tensor


def top_logits(logits: Tensor, k: int, temperature: float = 1.0) -> TopLogits:
    """Of logits (..., vocab), softened by the temperature, the k likeliest tokens, at most all.

    >>> top = top_logits(torch.tensor([0.5, 0.3, 0.15, 0.05]).log(), 2)
    >>> top.values.exp(), top.indices, top.log_rest.exp()
    (tensor([0.5000, 0.3000]), tensor([0, 1]), tensor(0.2000))
    """
    softened = _softened(logits, temperature)
    kept = softened.topk(k, dim=-1).indices
    log_p = _with_rest_as_one(softened, kept)
    return TopLogits(log_p[..., :-1], kept, log_p[..., -1])


def log_distributions_of_top(
    student_logits: Tensor, teacher: TopLogits, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`log_distributions` of the student and a teacher of whom the top is known, made with the same temperature.

    (..., k + 1) each, or (..., vocab), in the teacher's order, if k is the whole vocabulary.

    >>> logits = torch.randn(3, 5)
    >>> log_q, log_p = log_distributions_of_top(logits, top_logits(logits, 2, 1.5), 1.5)
    >>> torch.equal(log_q, log_p)
    True
    """
    student = _softened(student_logits, temperature)
    if teacher.indices.shape[-1] == student.shape[-1]:
        return F.log_softmax(student, dim=-1).gather(-1, teacher.indices), teacher.values
    return _with_rest_as_one(student, teacher.indices), torch.cat([teacher.values, teacher.log_rest[..., None]], -1)


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    divergence: Divergence = forward_kl,
) -> Tensor:
    """T² · mean over tokens of D(q, p), of what `log_distributions` makes of the logits; D is KL(p ‖ q) if not given.

    The factor T² keeps the gradient's size independent of T (Hinton et al. 2015, section 2). It is exactly 0 when
    the logits are equal, and otherwise positive up to rounding.

    >>> logits = torch.randn(2, 5)
    >>> distillation_loss(logits, logits, temperature=2.0).item()
    0.0

    Args:
        student_logits, teacher_logits: (..., vocab).
    """
    return temperature**2 * divergence(*log_distributions(student_logits, teacher_logits, temperature, top_k)).mean()


def logit_terms(
    student_logits: Tensor,
    teacher: Tensor | TopLogits | None,
    targets: Tensor,
    divergences: Mapping[str, Divergence],
    temperature: float = 1.0,
    top_k: int | None = None,
) -> dict[str, Tensor]:
    """Of each token `language_model_loss`, and `distillation_loss` with each divergence, by its name.

    Args:
        student_logits: (tokens, vocab).
        teacher: its logits (tokens, vocab), or what is kept of them, made with `temperature` and `top_k`; without it
            there is no divergence.
        targets: (tokens,).
    """
    if teacher is None or not divergences:
        return {"language_model_nats": F.cross_entropy(_full(student_logits), targets, reduction="none")}
    if isinstance(teacher, TopLogits):
        distributions = log_distributions_of_top(student_logits, teacher, temperature)
    else:
        distributions = log_distributions(student_logits, teacher, temperature, top_k)
    is_whole = top_k is None or top_k >= student_logits.shape[-1]
    if temperature == 1 and is_whole and not isinstance(teacher, TopLogits):
        nats = -distributions[0].gather(-1, targets[:, None])[:, 0]  # it is there already, in the order of the tokens
    else:
        nats = F.cross_entropy(_full(student_logits), targets, reduction="none")
    return {
        "language_model_nats": nats,
        **{name: temperature**2 * divergence(*distributions) for name, divergence in divergences.items()},
    }


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
    q, p = _full(student_maps), _full(teacher_maps)
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
    return F.mse_loss(_full(student_states), _full(teacher_states))


def _softened(logits: Tensor, temperature: float) -> Tensor:
    return _full(logits) if temperature == 1 else _full(logits) / temperature


def _full(logits: Tensor) -> Tensor:
    """In float32 at least."""
    return logits.float() if logits.element_size() < 4 else logits
