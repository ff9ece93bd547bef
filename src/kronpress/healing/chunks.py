"""The terms of the logits, from the hidden states that a model's head reads: the logits of a few tokens at a time.

Full logits (tokens, vocab) are the largest tensors of the training: for GPT-2, 65 times what the head reads, and a
divergence holds several of their size. Here the loss of each chunk of tokens is differentiated as soon as it is
computed, and only the gradients by the hidden states and by the head's parameters are kept until the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from kronpress.healing.losses import TopLogits

# At most as many tokens make a chunk as have so many logits: 32 MiB in float32. What is larger, glibc gives back to the
# system each time, and to get it anew takes as long as the arithmetic of a small head.
CHUNK_LOGITS = 2**23
# What models do to their head's output, by the name of the number in their configuration.
FINISHES: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "final_logit_softcapping": lambda logits, cap: cap * torch.tanh(logits / cap),  # Gemma 2
    "logit_scale": lambda logits, scale: scale * logits,  # Cohere
    "logits_scaling": lambda logits, scale: logits / scale,  # Granite
}

# Of the logits (tokens, vocab) of the student, those of the teacher or what is kept of them, and the targets (tokens,):
# each term's value at each token.
Terms = Callable[[Tensor, Tensor | TopLogits | None, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Head:
    """The last layer of a language model, and what the model makes of its output: (..., width) to (..., vocab)."""

    module: nn.Module
    vocabulary: int
    finishes: tuple[tuple[str, float], ...] = ()

    @property
    def parameters(self) -> dict[str, Tensor]:
        return dict(self.module.named_parameters())

    def logits(self, hidden: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """With other parameters than the module's own, if they are given."""
        given = self.module(hidden) if parameters is None else functional_call(self.module, dict(parameters), (hidden,))
        for name, number in self.finishes:
            given = FINISHES[name](given, number)
        return given


@torch.no_grad()
def find_head(model: PreTrainedModel) -> Head | str:
    """The model's head, or in words why its logits cannot be had from the hidden states alone.

    It is tried: on a few tokens the head and what follows it have to give the model's own logits.
    """
    module = model.get_output_embeddings()
    if not isinstance(module, nn.Module):
        return f"{type(model).__name__} has no output embedding"
    config = model.config.get_text_config()
    numbers = [(name, getattr(config, name, None)) for name in FINISHES]
    finishes = tuple((name, float(number)) for name, number in numbers if number is not None)
    was_training = model.training
    model.eval()
    read: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    try:
        ids = torch.arange(min(4, config.vocab_size), device=model.device)[None]
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
        model.train(was_training)
    if len(read) != 1:
        return f"{type(model).__name__} runs its output embedding {len(read)} times in a pass"
    head = Head(module, logits.shape[-1], finishes)
    again = head.logits(read[0])
    if again.shape != logits.shape or not torch.allclose(again.float(), logits.float(), rtol=1e-3, atol=1e-3):
        return f"{type(model).__name__} does more to its output embedding's result than is known"
    return head


@contextmanager
def without_logits(head: Head) -> Iterator[list[Tensor]]:
    """Inside the block the model does not compute its head: each pass appends to the list what the head would read.

    The model's own result then has one meaningless logit for each token.
    """
    read: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        read.append(hidden)
        return hidden[..., :1]

    own = vars(head.module).get("forward")  # a wrapper's, which accelerate sets on the instance
    head.module.forward = keep  # type: ignore[method-assign]
    try:
        yield read
    finally:
        del head.module.forward
        if own is not None:
            head.module.forward = own  # type: ignore[method-assign]


def chunked_terms(
    head: Head,
    hidden: Tensor,
    teacher: tuple[Head, Tensor] | TopLogits | None,
    targets: Tensor,
    terms: Terms,
    weights: Mapping[str, float],
    chunk_tokens: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Σ weight · mean over tokens of each term, and these means; differentiable once, by `hidden` and the head.

    Args:
        hidden: (tokens, width), what the student's head reads.
        teacher: its head, and what that reads (tokens, its width), which is not differentiated; or what is kept of its
            logits at these tokens.
        targets: (tokens,).
        weights: of each term that `terms` gives; one that is not named weighs nothing.
        chunk_tokens: how many tokens at most have logits at a time; as many as have CHUNK_LOGITS of them if None.
    """
    means: dict[str, Tensor] = {}
    parameters = head.parameters

    def loss_of(first: int, chunk: Tensor, values: Sequence[Tensor]) -> Tensor:
        """The chunk's part of the loss; `values` are the head's parameters."""
        tokens = slice(first, first + len(chunk))
        compared_with: Tensor | TopLogits | None = None
        if isinstance(teacher, TopLogits):
            compared_with = TopLogits(*(each[tokens] for each in teacher))
        elif teacher is not None:
            with torch.no_grad():
                compared_with = teacher[0].logits(teacher[1][tokens])
        logits = head.logits(chunk, dict(zip(parameters, values, strict=True)))
        found = {name: each.sum() / len(hidden) for name, each in terms(logits, compared_with, targets[tokens]).items()}
        for name, part in found.items():
            means[name] = part.detach() + means.get(name, 0.0)
        # What weighs nothing is not differentiated.
        weighed = [weights[name] * part for name, part in found.items() if weights.get(name)]
        return torch.stack(weighed).sum() if weighed else hidden.new_zeros(())

    if chunk_tokens is None:
        chunk_tokens = max(1, CHUNK_LOGITS // head.vocabulary)
    num_chunks = -(-len(hidden) // chunk_tokens)
    chunk_tokens = -(-len(hidden) // max(1, num_chunks))  # of equal size: the head is slow on few tokens
    inputs = (hidden, *parameters.values())
    if not torch.is_grad_enabled():
        inputs = tuple(each.detach() for each in inputs)
    loss = _SumOverChunks.apply(loss_of, chunk_tokens, *inputs)  # type: ignore[no-untyped-call]
    return loss, means


class _SumOverChunks(torch.autograd.Function):
    """Σ over chunks of loss_of(first, chunk, parameters), with gradients that are made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        loss_of: Callable[[int, Tensor, Sequence[Tensor]], Tensor],
        chunk_tokens: int,
        hidden: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[2:]
        # Leaves of their own: nothing is differentiated beyond the head.
        values = [each.detach().requires_grad_(need) for each, need in zip(parameters, wanted[1:], strict=True)]
        gradients: list[Tensor | None] = [torch.zeros_like(hidden) if wanted[0] else None, *([None] * len(values))]
        total = hidden.new_zeros((), dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)
        for first in range(0, len(hidden), chunk_tokens):
            chunk = hidden[first : first + chunk_tokens].detach().requires_grad_(wanted[0])
            with torch.set_grad_enabled(any(wanted)):
                loss = loss_of(first, chunk, values)
            total += loss.detach()
            if not loss.requires_grad:
                continue
            sought = [each for each in (chunk, *values) if each.requires_grad]
            found = iter(torch.autograd.grad(loss, sought))
            if gradients[0] is not None:
                gradients[0][first : first + chunk_tokens] = next(found)
            for number, value in enumerate(values, start=1):
                if value.requires_grad:
                    before, more = gradients[number], next(found)
                    gradients[number] = more if before is None else before.add_(more)
        ctx.gradients = gradients
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        # In place, since that of a head is as large as the head; so there is no second time.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the loss in chunks is differentiated once")
        return None, None, *(None if each is None else each.mul_(outer[0]) for each in gradients)
