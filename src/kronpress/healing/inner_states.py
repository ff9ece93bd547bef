"""What the terms inside the network compare: states of the student, and those of the teacher at the matching places."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kronpress.errors import RequestError
from kronpress.families import FAMILIES
from kronpress.healing.losses import attention_loss, state_loss
from kronpress.recipe import Healing


@dataclass(frozen=True)
class Term:
    """A term that is summed over pairs of places; `read` takes the state from a module's arguments and its output."""

    column: str  # of HealingRow
    read: Callable[[tuple[Any, ...], Any], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    same: str  # the number in both configurations that has to agree


# By the recipe's name of the term's weight.
TERMS = {
    # What enters the first block (sequences, tokens, width): tokens, positions and, in Gemma, their scale.
    "embedding_weight": Term("embedding_mse", lambda read, _: read[0], state_loss, "hidden_size"),
    # What an attention layer gives beside its output (sequences, heads, tokens, tokens).
    "attention_weight": Term("attention_nats", lambda _, given: given[1], attention_loss, "num_attention_heads"),
    # What leaves a block (sequences, tokens, width): after the MLP, before any last norm.
    "hidden_weight": Term(
        "hidden_mse", lambda _, given: given if isinstance(given, Tensor) else given[0], state_loss, "hidden_size"
    ),
}
# For each term the modules that are compared, in the order of the student's blocks; and what was read at each number.
Places = dict[str, list[nn.Module]]
States = dict[str, dict[int, Tensor]]


def match_blocks(num_student: int, num_teacher: int, layer_map: Sequence[int] | None = None) -> list[int]:
    """The teacher's block that each of the student's blocks is compared with.

    Without a map the teacher's depth is shared out evenly, and each student block meets the block in which its share
    ends: ⌈(i + 1) · T / S⌉ − 1. The last meets the last, and models of equal depth meet block by block.

    >>> match_blocks(3, 12), match_blocks(2, 3), match_blocks(2, 2), match_blocks(2, 12, [0, 7])
    ([3, 7, 11], [1, 2], [0, 1], [0, 7])

    Raises:
        RequestError: a map that does not name one block of the teacher for each block of the student.
    """
    if layer_map is None:
        return [((i + 1) * num_teacher + num_student - 1) // num_student - 1 for i in range(num_student)]
    if len(layer_map) != num_student:
        raise RequestError(f"healing.layer_map names {len(layer_map)} blocks: the student has {num_student}")
    for block in layer_map:
        if not 0 <= block < num_teacher:
            raise RequestError(f"healing.layer_map names block {block}: the teacher has 0 to {num_teacher - 1}")
    return list(layer_map)


def matched_places(student: PreTrainedModel, teacher: PreTrainedModel, healing: Healing) -> tuple[Places, Places]:
    """Where the terms whose weight is not 0 read the student, and where the teacher.

    Raises:
        RequestError: a model of an unknown family, widths or numbers of heads that differ, or a `layer_map` that does
            not fit; only if there is such a term.
    """
    names = [name for name in TERMS if healing.teacher_weights[name] > 0]
    if not names:
        return {}, {}
    for name in names:
        sizes = [_size(model, TERMS[name].same, name) for model in (student, teacher)]
        if sizes[0] != sizes[1]:
            raise RequestError(
                f"healing.{name}: {TERMS[name].same} is {sizes[0]} in the student and {sizes[1]} in the teacher; "
                "the term needs them equal"
            )
    counts = [len(_blocks(model)) for model in (student, teacher)]
    teacher_blocks = match_blocks(counts[0], counts[1], healing.layer_map)
    return _places(student, names, range(counts[0])), _places(teacher, names, teacher_blocks)


@contextmanager
def captured(places: Places) -> Iterator[States]:
    """Inside the block every forward pass of the model leaves its states in the dictionary; no places, no cost."""
    states: States = {}
    with ExitStack() as hooks:
        for name, modules in places.items():
            states[name] = {}
            for number, module in enumerate(modules):
                handle = module.register_forward_hook(_keep(TERMS[name].read, states[name], number))
                hooks.callback(handle.remove)
        yield states


def compared(name: str, student: States, teacher: States) -> Tensor:
    """The term `name`: the sum of its loss over all pairs of places."""
    return torch.stack([TERMS[name].loss(states, teacher[name][i]) for i, states in student[name].items()]).sum()


@contextmanager
def eager_attention(models: Sequence[PreTrainedModel]) -> Iterator[None]:
    """Inside the block the models form their attention maps, which faster kernels never do.

    Raises:
        RequestError: a model whose attention cannot be switched.
    """
    with ExitStack() as undo:
        for model in models:
            before = model.config._attn_implementation
            undo.callback(model.set_attn_implementation, before)
            model.set_attn_implementation("eager")
            if model.config._attn_implementation != "eager":
                raise RequestError(
                    f"healing.attention_weight: {type(model).__name__} has attention of the kind {before!r}, which "
                    "gives no maps, and cannot be switched to 'eager'"
                )
        yield


def _keep(
    read: Callable[[tuple[Any, ...], Any], Tensor], states: dict[int, Tensor], number: int
) -> Callable[..., None]:
    def keep(_: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        states[number] = read(arguments, output)

    return keep


def _places(model: PreTrainedModel, names: list[str], chosen: Sequence[int]) -> Places:
    blocks = _blocks(model)
    # The layer that the output projection is part of.
    attention = FAMILIES[model.config.model_type].roles["output"].rpartition(".")[0]
    places = {
        "embedding_weight": blocks[:1],
        "attention_weight": [blocks[i].get_submodule(attention) for i in chosen],
        "hidden_weight": [blocks[i] for i in chosen],
    }
    return {name: places[name] for name in names}


def _blocks(model: PreTrainedModel) -> list[nn.Module]:
    return list(model.get_submodule(FAMILIES[model.config.model_type].blocks))  # type: ignore[call-overload]


def _size(model: PreTrainedModel, size: str, name: str) -> int:
    if model.config.model_type not in FAMILIES:
        raise RequestError(
            f"healing.{name}: the blocks of a model of type {model.config.model_type!r} are not known; known types are "
            f"{', '.join(FAMILIES)}"
        )
    return getattr(model.config, size)
