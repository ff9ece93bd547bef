"""Several processes that do one piece of work together, as `torchrun` and `accelerate launch` start them.

All of them run the same program. What must be the same everywhere is decided by the main process, number 0, and told to
the others; files are written by it alone. Where there is one process nothing is sent, and no process group is made.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kronpress.errors import RequestError, WorkError

# How long processes wait while one of them measures a model or writes a large file. One that dies ends the waiting.
PATIENCE = timedelta(days=7)
# What `accelerate launch` sets for a configuration with FSDP, and where that is kept.
ACCELERATE_FSDP, SHARDED = "ACCELERATE_USE_FSDP", "KRONPRESS_SHARDED"
_ERRORS = {"RequestError": RequestError, "WorkError": WorkError}


def join() -> None:
    """Make the process group, if a launcher has started several processes and none is there.

    It is that of NCCL on GPUs, each process with the one of its local number, and of gloo on CPUs.
    """
    if os.environ.pop(ACCELERATE_FSDP, "false").lower() == "true":
        # accelerate and transformers would split the model in ways of their own.
        os.environ[SHARDED] = "true"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        PartialState(cpu=not torch.cuda.is_available())


def is_to_shard() -> bool:
    """Whether `accelerate launch` has a configuration with FSDP."""
    return os.environ.get(SHARDED) == "true"


def leave() -> None:
    """End the process group, if there is one, when all work is done."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_number() -> int:
    """This process's, from 0."""
    return dist.get_rank() if num_processes() > 1 else 0


def is_main() -> bool:
    return process_number() == 0


def only_main(tell: Callable[[Any], None]) -> Callable[[Any], None]:
    """`tell`, or in all processes but the main one a function that does nothing."""
    return tell if is_main() else lambda _: None


def wait_for_all() -> None:
    """Return when every process has come here."""
    if num_processes() > 1:
        dist.barrier(group=_patient(dist.group.WORLD))


def from_main(make: Callable[[], Any]) -> Any:
    """What `make` gives in the main process, which alone calls it: something that goes through JSON unchanged.

    Raises:
        what `make` raises, in every process; an error that is none of kronpress's is a WorkError in the others.
    """
    return from_process(0, make)


def from_process(number: int, make: Callable[[], Any]) -> Any:
    """As `from_main`, with the process of this number instead."""
    if num_processes() == 1:
        return make()
    if process_number() != number:
        story = json.loads(_sent(number, None))
        if "error" in story:
            _raise_again(**story)
        return story["made"]
    try:
        made = make()
    except BaseException as error:  # an interruption too: nobody is to wait for what will not come
        _sent(number, json.dumps({"error": type(error).__name__, "message": str(error), "number": number}))
        raise
    _sent(number, json.dumps({"made": made}))
    return made


@contextmanager
def in_main(make: Callable[[], AbstractContextManager[Path | None]]) -> Iterator[Path | None]:
    """The block runs in every process, in the main one inside the context that `make` gives; what entering it raises is
    raised in all. The main process leaves it when all have come to the end of the block.

    Yields:
        the path that the context gives, if it gives one.
    """
    if num_processes() == 1:
        with make() as path:
            yield path
        return
    context = make() if is_main() else None

    def entered() -> str | None:
        assert context is not None
        path = context.__enter__()
        return None if path is None else str(path)

    name = from_main(entered)
    try:
        yield None if name is None else Path(name)
        wait_for_all()
    except BaseException as error:
        if context is None or not context.__exit__(type(error), error, error.__traceback__):
            raise
    else:
        if context is not None:
            context.__exit__(None, None, None)


def any_of(flag: bool) -> bool:
    """Whether it is true in any process; each has to ask."""
    return bool(summed([float(flag)])[0])


def summed(numbers: list[float]) -> list[float]:
    """The sums over all processes, the same bits in each; float64."""
    if num_processes() == 1:
        return numbers
    values = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(values, group=_patient(dist.group.WORLD))
    return values.tolist()


@torch.no_grad()
def give_(tensors: Iterable[Tensor], source: int = 0) -> None:
    """Overwrite the tensors in every process by those of the process `source`."""
    if num_processes() == 1:
        return
    for tensor in tensors:
        sent = tensor.detach().to(_device()).contiguous()
        dist.broadcast(sent.view(-1).view(torch.uint8), source)  # gloo does not know every dtype
        if process_number() != source:
            tensor.copy_(sent)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or of one that is split over the processes all of it; then each process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def not_finite(model: nn.Module) -> str | None:
    """The name of a parameter that holds NaN or infinity in some process, if there is one; the same in each."""
    parameters = dict(model.named_parameters())
    own = [
        float(not (each.to_local() if isinstance(each, DTensor) else each).isfinite().all())
        for each in parameters.values()
    ]
    return next((name for name, number in zip(parameters, summed(own), strict=True) if number), None)


def _device() -> torch.device:
    """Where tensors have to be that go from process to process."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


@cache
def _patient(_: Any) -> Any:
    """A group of all processes for texts and for waiting; of one process group, which is the argument."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def _sent(source: int, text: str | None) -> str:
    """The text of the process `source`, in all."""
    group = _patient(dist.group.WORLD)
    content = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text is not None else torch.empty(0)
    length = torch.tensor([len(content)])
    dist.broadcast(length, source, group=group)
    if text is None:
        content = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(content, source, group=group)
    return content.numpy().tobytes().decode()


def _raise_again(error: str, message: str, number: int) -> NoReturn:
    if error in _ERRORS:
        raise _ERRORS[error](message)
    raise WorkError(f"process {number} failed: {error}: {message}")
