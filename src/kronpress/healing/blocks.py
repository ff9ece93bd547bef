"""What is done to transformer blocks for the time of a training: recomputed, compiled, split over processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from kronpress.errors import RequestError
from kronpress.families import FAMILIES
from kronpress.processes import num_processes, whole


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks: those of the model's family, or what transformers marks as such."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in FAMILIES:
        return list(model.get_submodule(FAMILIES[model_type].blocks).children())
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Inside the block a pass keeps of each transformer block only what it reads, and runs it again to differentiate.

    The gradients are the same numbers (Chen et al. 2016, arXiv 1604.06174, with a segment for each block). The
    checkpointing of transformers works only in training mode, in which there is dropout.

    Raises:
        RequestError: no blocks are known in the model.
    """

    def again(forward: Callable[..., Any]) -> Callable[..., Any]:
        # There is no dropout, so that no state of a random generator is to be kept.
        return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)

    with _other_forwards([model], again, "healing.gradient_checkpointing"):
        yield


@contextmanager
def compiled(models: Sequence[nn.Module], **options: Any) -> Iterator[None]:
    """Inside the block the transformer blocks of the models go through `torch.compile`, each by itself.

    Args:
        options: of `torch.compile`.

    Raises:
        RequestError: no blocks are known in a model.
    """
    with _other_forwards(models, partial(torch.compile, **options), "healing.compile"):
        yield


@contextmanager
def _other_forwards(
    models: Sequence[nn.Module], change: Callable[[Callable[..., Any]], Callable[..., Any]], field: str
) -> Iterator[None]:
    changed: list[tuple[nn.Module, Any]] = []
    try:
        for model in models:
            blocks = blocks_of(model)
            if not blocks:
                raise RequestError(f"{field}: no transformer blocks are known in a {type(model).__name__}")
            for block in blocks:
                changed.append((block, vars(block).get("forward")))
                block.forward = change(block.forward)  # type: ignore[method-assign]
        yield
    finally:
        for block, own in reversed(changed):
            del block.forward
            if own is not None:
                block.forward = own  # type: ignore[method-assign]


def shard_(model: nn.Module, device: torch.device) -> None:
    """Split all parameters over the processes along their first dimension, in place, and move them to the device.

    A block's are put together where it is run, and split again behind it; those outside of all blocks stay together
    from the first use in a pass to the last. Gradients are means over the processes and split alike (Zhao et al. 2023,
    arXiv 2304.11277, by torch's `fully_shard`).
    """
    mesh = init_device_mesh(device.type, (num_processes(),))
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


@torch.no_grad()
def copy_weights_(model: nn.Module, sharded: nn.Module) -> None:
    """Give `model` the parameters of a copy of it that is split over the processes, all of which have to call this."""
    for (_, parameter), (_, other) in zip(model.named_parameters(), sharded.named_parameters(), strict=True):
        parameter.copy_(whole(other))


def whole_state(state: Any) -> Any:
    """The state of an optimiser with all tensors put together; in all processes, each of which has to call this."""
    if isinstance(state, dict):
        return {name: whole_state(each) for name, each in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map(whole_state, state))
    return whole(state).cpu() if isinstance(state, DTensor) else state


def split_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The reverse of `whole_state` for what `optimizer.load_state_dict` is to get."""
    parameters = [each for group in optimizer.param_groups for each in group["params"]]

    def split(number: int, each: Any) -> Any:
        parameter = parameters[number]
        if not isinstance(parameter, DTensor) or not isinstance(each, Tensor) or each.shape != parameter.shape:
            return each
        return distribute_tensor(each.to(parameter.device), parameter.device_mesh, parameter.placements)

    kept = {
        number: {name: split(number, each) for name, each in of_one.items()}
        for number, of_one in state["state"].items()
    }
    return {**state, "state": kept}


def is_sharded(model: nn.Module | PreTrainedModel) -> bool:
    return any(isinstance(each, DTensor) for each in model.parameters())
