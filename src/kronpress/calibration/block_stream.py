"""`BlockStream`: the moments of one transformer block after another, from hidden states in a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kronpress.calibration.batches import Batch, checked_batches, count_tokens, divide, to_device
from kronpress.calibration.moments import check_room
from kronpress.calibration.states import StatesFile
from kronpress.calibration.sums import Collector, as_for_use
from kronpress.errors import RequestError, WorkError
from kronpress.families import FAMILIES
from kronpress.matrices.moments import InputMoments
from kronpress.surgery import replaceable_layers


class _AllBlocksSeen(Exception):
    """Ends a forward pass at the last transformer block."""


def block_prefix(model: nn.Module) -> str | None:
    """What the list of the model's transformer blocks is called; None if its family is unknown or it has no such list.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> block_prefix(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=5)))
    'transformer.h'
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in FAMILIES:
        return None
    prefix = FAMILIES[model_type].blocks
    blocks = dict(model.named_modules()).get(prefix)
    return prefix if isinstance(blocks, nn.ModuleList) and len(blocks) > 0 else None


def state_bytes(model: nn.Module, num_tokens: int, keeps_all: bool = False) -> int:
    """What the hidden states of so many tokens take in the file of a `BlockStream`."""
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    num_blocks = len(model.get_submodule(block_prefix(model) or ""))  # type: ignore[arg-type]
    once: int = num_tokens * model.config.hidden_size * dtype.itemsize  # type: ignore[operator, union-attr, assignment]
    return once * (num_blocks + 2 if keeps_all else 1)


class BlockStream:
    """A model's hidden states in a file, taken through its transformer blocks one after another.

    Before block i the file holds what block i reads. `moments(i, names)` measures its layers; `advance(i)` replaces the
    states by the block's outputs. If the caller replaces layers in between, later blocks see what they will really get.
    Only the block that is run needs to be on the compute device.

        with BlockStream(model, batches, folder) as stream:
            for i in range(stream.num_blocks):
                moments = stream.moments(i, names_in_block[i])
                ...  # replace layers of block i
                stream.advance(i)
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        folder: Path,
        *,
        held_out: float = 0.0,
        device: torch.device | str | None = None,
        keeps_all: bool = False,
        messages: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Run what stands before the blocks, where the model is, and keep its outputs in a nameless file in `folder`.

        Args:
            batches: as for `calibrate`.
            held_out: fraction of the sequences that is kept apart, as `calibration.held_out`.
            device: where blocks are run, one at a time; each where it is if None.
            keeps_all: whether what blocks have read is kept when the stream advances, to run them again; a file of as
                many times the size, and room for the gradient by one block's output.
            messages: told the disk space needed.

        Raises:
            RequestError: a model of an unknown family, or batches that `calibrate` would refuse.
            WorkError: there is too little room on the disk.
        """
        prefix = block_prefix(model)
        if prefix is None:
            model_type = getattr(getattr(model, "config", None), "model_type", None)
            raise RequestError(
                f"block by block, a model of type {model_type!r} cannot be run: known types are {', '.join(FAMILIES)}, "
                "each with its head"
            )
        self.prefix = prefix
        self.model = model
        self.blocks: list[nn.Module] = list(model.get_submodule(prefix))  # type: ignore[call-overload]
        self.parts = divide(checked_batches(model, batches), held_out)
        self.device, self.keeps_all = device, keeps_all
        # The block that is next; None when a failed advance has left states of two blocks in the file.
        self._next: int | None = 0
        # Of each part, what each block gets beside the states.
        self._arguments: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []
        self.states = StatesFile(folder)
        try:
            self._check_room(folder, messages)
            self._fill()
        except BaseException:
            self.close()
            raise

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    def close(self) -> None:
        """Give the disk space back."""
        self.states.close()

    def __enter__(self) -> BlockStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def level(self, block_index: int) -> int:
        """Where in `states` what the block reads is kept; that of `num_blocks` is what the last block gives."""
        return block_index if self.keeps_all else 0

    def moments(self, block_index: int, names: Iterable[str]) -> dict[str, InputMoments]:
        """The input moments of the linear layers `names` of the block, without gradients.

        Raises:
            RequestError: the stream stands before another block, or the block has no such layer.
            WorkError: as `calibrate`.
        """
        self._check(block_index)
        return self._run(block_index, self.layers(block_index, names), is_advancing=False)

    def advance(self, block_index: int, names: Iterable[str] = ()) -> dict[str, InputMoments]:
        """Replace the states by the block's outputs; the moments of its layers `names`, measured in the same run.

        Raises:
            RequestError: the stream stands before another block, or the block has no such layer.
            WorkError: as `calibrate`, or the states could not be written; the stream is then of no more use.
        """
        self._check(block_index)
        layers = self.layers(block_index, names)
        self._next = None
        moments = self._run(block_index, layers, is_advancing=True)
        self._next = block_index + 1
        return moments

    def layers(self, block_index: int, names: Iterable[str]) -> dict[str, nn.Module]:
        """The linear layers of the block that have these names in the model; raises RequestError."""
        inside = replaceable_layers(self.blocks[block_index])
        found = {}
        for name in names:
            local = name.removeprefix(f"{self.prefix}.{block_index}.")
            if local == name or local not in inside:
                raise RequestError(f"block {block_index} has no linear layer {name!r}")
            found[name] = inside[local]
        return found

    def _run(self, block_index: int, layers: dict[str, nn.Module], is_advancing: bool) -> dict[str, InputMoments]:
        collector = Collector(layers)
        with self.ready(block_index) as block, collector.hooked():
            for number, part in enumerate(self.parts):
                collector.part = part
                output = self.output(block, block_index, number)
                if is_advancing:
                    self.states.write(self.level(block_index + 1), number, output)
        return collector.moments(with_gradient=False)

    def _check(self, block_index: int) -> None:
        if self._next is None:
            raise WorkError("the block stream broke off inside a block: make a new one")
        if block_index != self._next or block_index == len(self.blocks):
            raise RequestError(
                f"block {block_index}: the stream stands before block {self._next} of {len(self.blocks)}"
            )

    def _check_room(self, folder: Path, messages: Callable[[str], None]) -> None:
        num_tokens = sum(count_tokens(part.arguments) for part in self.parts)
        needed = state_bytes(self.model, num_tokens, self.keeps_all)
        messages(f"the hidden states of {num_tokens} tokens take {needed / 1e6:,.1f} MB in {str(folder)!r}")
        check_room("the hidden states", needed, folder)

    def _fill(self) -> None:
        device = next(self.model.parameters()).device
        with as_for_use(self.model), torch.no_grad():
            for number, part in enumerate(self.parts):
                self.states.write(0, number, self._before_blocks(to_device(part.arguments, device)))

    def _before_blocks(self, arguments: dict[str, Any]) -> Tensor:
        """What the first block reads; what all blocks get beside it is remembered.

        Blocks may get different masks or rotations, so the pass goes on to the last one, with each giving back what
        it reads.
        """
        read: list[Tensor] = []
        beside: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def record(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            read.append(hidden)
            beside.append((args, kwargs))
            if len(beside) == len(self.blocks):
                raise _AllBlocksSeen
            return hidden

        with self._instead_of_blocks(record), suppress(_AllBlocksSeen):
            # A cache would go on growing from one run of a block to the next.
            self.model(**{**arguments, "use_cache": False})
        self._arguments.append(beside)
        return read[0]

    def around(self, number: int, after: Tensor) -> tuple[Tensor, Any]:
        """What the first block reads of a part, and what the model gives if the last block gives `after`.

        The model is run as it stands, in the caller's gradient mode, but no block is.
        """
        read: list[Tensor] = []

        def pass_on(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            read.append(hidden)
            return hidden if len(read) < len(self.blocks) else after.to(hidden.device)

        device = next(self.model.parameters()).device
        with self._instead_of_blocks(pass_on):
            given = self.model(**{**to_device(self.parts[number].arguments, device), "use_cache": False})
        return read[0], given

    @contextmanager
    def _instead_of_blocks(self, forward: Callable[..., Tensor]) -> Iterator[None]:
        before = [vars(block).get("forward") for block in self.blocks]
        try:
            for block in self.blocks:
                block.forward = forward  # type: ignore[method-assign]
            yield
        finally:
            for block, own in zip(self.blocks, before, strict=True):
                del block.forward
                if own is not None:
                    block.forward = own

    @contextmanager
    def ready(self, block_index: int) -> Iterator[nn.Module]:
        """The block on the compute device, to be run there."""
        block = self.blocks[block_index]
        home = next(block.parameters()).device
        with as_for_use(block), torch.no_grad():
            try:
                yield block.to(home if self.device is None else self.device)
            finally:
                block.to(home)

    def output(self, block: nn.Module, block_index: int, number: int, hidden: Tensor | None = None) -> Tensor:
        """What the block, made `ready`, gives for a part of the data on `hidden`, or on what it reads in the stream."""
        device = next(block.parameters()).device
        args, kwargs = to_device(self._arguments[number][block_index], device)
        if hidden is None:
            hidden = self.states.read(self.level(block_index), number)
        return block(hidden.to(device), *args, **kwargs)
