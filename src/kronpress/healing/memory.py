"""How much memory a training takes, from the shapes of its models alone: no weight is read and nothing is computed.

A process holds, in bytes,

    weights     all parameters and buffers of the student, and the copy that bfloat16 products make of its weights
    gradients   as many as there are trained parameters; once more for the buffers from which several processes
                exchange them; and once more those of the head, which are added up over chunks of logits
    optimiser   for each trained parameter what its optimiser keeps: 8 bytes of `adamw`, and less of the others
    activations what the passes of one step's largest pass keep for the backward pass. With checkpointing: what each
                block reads, and all that one block keeps
    working     gradients by the activations of one block, which come and go
    logits      what the terms of one chunk of tokens keep, and the gradients by them
    teacher     its parameters and buffers, and what one of its blocks works on, or no teacher

and all that together at most. Where the model is split over W processes, weights, gradients and optimiser are 1/W of
these, and the weights and gradients of what lies outside of the blocks and of one block are there as a whole. What is
kept for the backward pass is seen by running the models on tensors that have shapes and no numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from transformers import PreTrainedModel

from kronpress.evaluation import num_embeddings
from kronpress.healing.blocks import blocks_of
from kronpress.healing.chunks import CHUNK_LOGITS, Head, without_logits
from kronpress.healing.losses import Divergence, logit_terms
from kronpress.recipe import Healing

_FLOAT = 4
# Of each optimiser for each number of a matrix; `adafactor` keeps 4 bytes for each row and column.
STATE_BYTES = {"adamw": 8.0, "adamw-bfloat16": 4.0, "adamw-8bit": 2.03, "muon": 4.0}


class TrainingMemory(BaseModel):
    """Bytes of one process, by what they are for."""

    model_config = ConfigDict(frozen=True)

    weights: int
    gradients: int
    optimiser: int
    activations: int
    working: int
    logits: int
    teacher: int

    @property
    def total(self) -> int:
        return sum(dict(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in self if size)
        return f"{self.total / 1e9:.2f} GB in each process ({parts})"


def training_memory(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    healing: Healing,
    divergences: dict[str, Divergence],
    *,
    num_processes: int = 1,
    is_sharded: bool = False,
    in_bfloat16: bool = False,
    device: str = "cpu",
) -> TrainingMemory:
    """What healing takes in each of so many processes; models on the meta device will do.

    Args:
        divergences: terms of the logits, by name.
        device: on which it would run, which decides by which kernels.
    """
    sequences = max(part.sequences_per_step for part in healing.parts) // num_processes
    sequences = min(sequences, healing.sequences_per_pass or sequences)
    shape = sequences, healing.sequence_length
    blocks = [id(parameter) for block in blocks_of(student) for parameter in block.parameters()]
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    held, learnt = _bytes(student), sum(map(_nbytes, trained))
    if is_sharded:
        largest = max((_bytes(block) for block in blocks_of(student)), default=0)
        outside = sum(_nbytes(each) for each in trained if id(each) not in blocks)
        weights = held // num_processes + largest + outside
        gradients = learnt // num_processes + largest + outside
    else:
        weights, gradients = held, learnt * (2 if num_processes > 1 else 1)
    if in_bfloat16:
        weights += sum(_nbytes(each) for each in trained if each.ndim > 1) // 2
    if healing.chunk_tokens != 0:
        head = student.get_output_embeddings()
        gradients += sum(_nbytes(each) for each in head.parameters()) if isinstance(head, nn.Module) else 0
    outside_of_blocks, of_blocks = kept_for_backward(student, shape, device, in_bfloat16)
    largest_block = max((kept for _, kept in of_blocks), default=0)
    if healing.gradient_checkpointing:
        activations = outside_of_blocks + sum(read for read, _ in of_blocks) + largest_block
    else:
        activations = outside_of_blocks + sum(kept for _, kept in of_blocks)
    vocabulary = num_embeddings(student) or student.config.get_text_config().vocab_size
    tokens = sequences * (healing.sequence_length - 1)
    chunk = tokens
    if healing.chunk_tokens != 0:
        chunk = min(tokens, healing.chunk_tokens or max(1, CHUNK_LOGITS // vocabulary))
    return TrainingMemory(
        weights=weights,
        gradients=gradients,
        optimiser=sum(_state_bytes(healing.optimizer, each) for each in trained)
        // (num_processes if is_sharded else 1),
        activations=activations,
        working=largest_block,
        logits=_logits(chunk, vocabulary, teacher is not None, healing, divergences),
        teacher=0 if teacher is None else _bytes(teacher) + _largest_block(teacher, shape, device, in_bfloat16),
    )


def kept_for_backward(
    model: PreTrainedModel, shape: tuple[int, int], device: str = "cpu", in_bfloat16: bool = False
) -> tuple[int, list[tuple[int, int]]]:
    """The bytes that a pass over token ids of this shape keeps, but for parameters and the logits.

    Returns:
        what is kept outside of all blocks, and of each block what it reads and what it keeps, beside what was kept
        before it.
    """
    kept: dict[int, Tensor] = {}
    sizes = [0] * (len(blocks_of(model)) + 1)
    reads = [0] * len(blocks_of(model))
    current = len(reads)

    def pack(own: set[int], tensor: Tensor) -> Tensor:
        key = _memory(tensor)
        if key not in own and key not in kept:
            kept[key] = tensor
            sizes[current] += tensor.untyped_storage().nbytes()
        return tensor

    def entering(number: int) -> Callable[..., None]:
        def enter(_: nn.Module, given: tuple[Any, ...]) -> None:
            nonlocal current
            current, reads[number] = number, _nbytes(given[0])

        return enter

    def leave(*_: Any) -> None:
        nonlocal current
        current = len(reads)

    with ExitStack() as during:
        tensors = during.enter_context(_without_numbers(model, device))
        for number, block in enumerate(blocks_of(model)):
            during.callback(block.register_forward_pre_hook(entering(number)).remove)
            during.callback(block.register_forward_hook(leave).remove)
        head = model.get_output_embeddings()
        if isinstance(head, nn.Module):
            during.enter_context(without_logits(Head(head, 0)))
        autocast = torch.autocast(device, torch.bfloat16) if in_bfloat16 else nullcontext()
        own = {_memory(each) for each in tensors.values()}
        with autocast, saved_tensors_hooks(partial(pack, own), lambda tensor: tensor):
            ids = torch.zeros(shape, dtype=torch.int64, device=device)
            functional_call(model, tensors, kwargs={"input_ids": ids, "use_cache": False})
    return sizes[-1], list(zip(reads, sizes[:-1], strict=True))


@contextmanager
def _without_numbers(model: nn.Module, device: str) -> Iterator[dict[str, Tensor]]:
    """Inside the block tensors have shapes and no numbers; those that stand for the model's own, by their names."""
    was_training = model.training
    model.eval()
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    try:
        with FakeTensorMode():
            yield {
                name: torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device=device).requires_grad_(
                    each.requires_grad
                )
                for name, each in own.items()
            }
    finally:
        model.train(was_training)


def _largest_block(model: PreTrainedModel, shape: tuple[int, int], device: str, in_bfloat16: bool) -> int:
    _, of_blocks = kept_for_backward(model, shape, device, in_bfloat16)
    return max((kept for _, kept in of_blocks), default=0)


def _logits(
    tokens: int, vocabulary: int, has_teacher: bool, healing: Healing, divergences: dict[str, Divergence]
) -> int:
    """What the terms keep of so many tokens' logits, and gradients by these: two tensors of their size at once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[_memory(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with FakeTensorMode():
        logits = torch.empty(tokens, vocabulary, requires_grad=True)
        compared_with = torch.empty(tokens, vocabulary) if has_teacher else None
        targets = torch.zeros(tokens, dtype=torch.int64)
        own = {_memory(each): each.untyped_storage().nbytes() for each in (logits, compared_with) if each is not None}
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            terms = logit_terms(
                logits,
                compared_with,
                targets,
                divergences if has_teacher else {},
                healing.temperature,
                healing.distillation_top_k,
            )
        assert terms
    return sum((kept | own).values()) + 2 * _FLOAT * tokens * vocabulary


def _state_bytes(optimizer: str, parameter: Tensor) -> int:
    if parameter.ndim < 2:
        return 8 * parameter.numel()
    if optimizer == "adafactor":
        return _FLOAT * sum(parameter.shape)
    return int(STATE_BYTES[optimizer] * parameter.numel())


def _memory(tensor: Tensor) -> int:
    """The same number for tensors that share their memory."""
    return tensor.untyped_storage()._cdata


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bytes(module: nn.Module) -> int:
    return sum(map(_nbytes, (*module.parameters(), *module.buffers())))
