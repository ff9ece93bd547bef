"""`BlockStream`: the moments of one transformer block after another, from hidden states in a file."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kronpress.calibration.batches import Batch, checked_batches, count_tokens, divide, to_device
from kronpress.calibration.moments import check_room, raw_bytes
from kronpress.calibration.sums import Collector, as_for_use
from kronpress.errors import RequestError, WorkError
from kronpress.families import FAMILIES
from kronpress.matrices.moments import InputMoments
from kronpress.surgery import linear_layers


class _AllBlocksSeen(Exception):
    """Ends a forward pass at the last transformer block."""


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

    The states are read and written as bytes and not mapped into memory: a write into a mapping ends the process when
    the disk is full.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        folder: Path,
        *,
        held_out: float = 0.0,
        device: torch.device | str | None = None,
        messages: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Run what stands before the blocks, where the model is, and keep its outputs in a nameless file in `folder`.

        Args:
            batches: as for `calibrate`.
            held_out: fraction of the sequences that is kept apart, as `calibration.held_out`.
            device: where blocks are run, one at a time; each where it is if None.
            messages: told the disk space needed.

        Raises:
            RequestError: a model of an unknown family, or batches that `calibrate` would refuse.
            WorkError: there is too little room on the disk.
        """
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        if model_type not in FAMILIES:
            raise RequestError(
                f"block by block, a model of type {model_type!r} cannot be run: known types are {', '.join(FAMILIES)}"
            )
        self.prefix = FAMILIES[model_type].blocks
        self.model = model
        self.blocks: list[nn.Module] = list(model.get_submodule(self.prefix))  # type: ignore[call-overload]
        self.parts = divide(checked_batches(model, batches), held_out)
        self.folder, self.device = folder, device
        # The block that is next; None when a failed advance has left states of two blocks in the file.
        self._next: int | None = 0
        # Of each part: shape, dtype and place of its states, and what each block gets beside them.
        self._states: list[tuple[torch.Size, torch.dtype, int]] = []
        self._arguments: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []
        with self._disk():
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        try:
            self._fill(messages)
        except BaseException:
            self.close()
            raise

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    def close(self) -> None:
        """Give the disk space back."""
        with suppress(OSError):  # of bytes that a full disk has not taken
            self._file.close()

    def __enter__(self) -> BlockStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def moments(self, block_index: int, names: Iterable[str]) -> dict[str, InputMoments]:
        """The input moments of the dense linear layers `names` of the block, without gradients.

        Raises:
            RequestError: the stream stands before another block, or the block has no such layer.
            WorkError: as `calibrate`.
        """
        self._check(block_index)
        inside = linear_layers(self.blocks[block_index])
        layers = {}
        for name in names:
            local = name.removeprefix(f"{self.prefix}.{block_index}.")
            if local == name or local not in inside:
                raise RequestError(f"block {block_index} has no dense linear layer {name!r}")
            layers[name] = inside[local]
        collector = Collector(layers)
        with self.ready(block_index) as block, collector.hooked():
            for number, part in enumerate(self.parts):
                collector.part = part
                self.output(block, block_index, number)
        return collector.moments(with_gradient=False)

    def advance(self, block_index: int) -> None:
        """Replace the states by the block's outputs.

        Raises:
            RequestError: the stream stands before another block.
            WorkError: the states could not be written; the stream is then of no more use.
        """
        self._check(block_index)
        self._next = None
        with self.ready(block_index) as block:
            for number in range(len(self.parts)):
                self._write(number, self.output(block, block_index, number))
        self._next = block_index + 1

    def _check(self, block_index: int) -> None:
        if self._next is None:
            raise WorkError("the block stream broke off inside a block: make a new one")
        if block_index != self._next or block_index == len(self.blocks):
            raise RequestError(
                f"block {block_index}: the stream stands before block {self._next} of {len(self.blocks)}"
            )

    def _fill(self, messages: Callable[[str], None]) -> None:
        device = next(self.model.parameters()).device
        place = 0
        with as_for_use(self.model), torch.no_grad():
            for number, part in enumerate(self.parts):
                hidden = self._before_blocks(to_device(part.arguments, device))
                if number == 0:
                    self._check_room(hidden, messages)
                self._states.append((hidden.shape, hidden.dtype, place))
                self._write(number, hidden)
                place += hidden.numel() * hidden.dtype.itemsize

    def _check_room(self, hidden: Tensor, messages: Callable[[str], None]) -> None:
        tokens = sum(count_tokens(part.arguments) for part in self.parts)
        needed = tokens * hidden.shape[-1] * hidden.dtype.itemsize
        messages(f"the hidden states of {tokens} tokens take {needed / 1e6:,.1f} MB in {str(self.folder)!r}")
        check_room("the hidden states", needed, self.folder)

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

        before = [vars(block).get("forward") for block in self.blocks]
        try:
            for block in self.blocks:
                block.forward = record  # type: ignore[method-assign]
            with suppress(_AllBlocksSeen):
                # A cache would go on growing from one run of a block to the next.
                self.model(**{**arguments, "use_cache": False})
        finally:
            for block, forward in zip(self.blocks, before, strict=True):
                del block.forward
                if forward is not None:
                    block.forward = forward
        self._arguments.append(beside)
        return read[0]

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

    def output(self, block: nn.Module, block_index: int, number: int) -> Tensor:
        device = next(block.parameters()).device
        args, kwargs = to_device(self._arguments[number][block_index], device)
        return block(self._read(number).to(device), *args, **kwargs)

    def _read(self, number: int) -> Tensor:
        shape, dtype, place = self._states[number]
        content = bytearray(shape.numel() * dtype.itemsize)
        with self._disk():
            self._file.seek(place)
            self._file.readinto(content)
        return torch.frombuffer(content, dtype=dtype).view(shape)

    def _write(self, number: int, hidden: Tensor) -> None:
        _, dtype, place = self._states[number]
        with self._disk():
            self._file.seek(place)
            self._file.write(raw_bytes(hidden.to(dtype)))
            self._file.flush()

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise WorkError(f"the hidden states could not be kept in {str(self.folder)!r}: {error}") from error
