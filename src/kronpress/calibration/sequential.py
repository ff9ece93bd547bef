"""What a layer reads in a model whose earlier layers are replaced, beside what it read in the dense one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kronpress.calibration.block_stream import BlockStream
from kronpress.calibration.sums import CHUNK
from kronpress.errors import RequestError, WorkError


@dataclass(frozen=True)
class PairedMoments:
    """Moments of the inputs x of a layer in the dense model and x̃ in the compressed one, token by token; float64.

    `second` is E[x̃ x̃ᵀ] and `cross` E[x x̃ᵀ], (in_features, in_features); `mean` is E[x̃] and `dense_mean` E[x].
    """

    second: Tensor
    cross: Tensor
    mean: Tensor
    dense_mean: Tensor
    num_tokens: int


class _LayerReached(Exception):
    """Ends a block's forward pass at the layer whose input is wanted."""


class SequentialInputs:
    """Two streams of hidden states, one through the dense blocks and one through those that have taken their place.

    Layers are asked for in the model's order, each after the layers before it were replaced in the model. What stands
    before the blocks, such as the embedding, is replaced before the first layer is asked for, or not at all.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        folder: Path,
        messages: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Run what stands before the blocks of the dense model; raises what `BlockStream` raises."""
        batches = list(batches)
        self.dense = BlockStream(model, batches, folder, messages=messages)
        # It begins with the embedding as it is when the first layer is asked for.
        self._compressed: BlockStream | None = None
        self._begin_compressed = partial(BlockStream, model, batches, folder, messages=messages)
        self._keep_dense(0)

    def __enter__(self) -> SequentialInputs:
        return self

    def __exit__(self, *_: object) -> None:
        self.dense.close()
        if self._compressed is not None:
            self._compressed.close()

    @property
    def compressed(self) -> BlockStream:
        """The stream through what the model is now, which begins when it is first asked for."""
        if self._compressed is None:
            self._compressed = self._begin_compressed()
        return self._compressed

    def moments(self, name: str) -> PairedMoments:
        """The paired moments of the layer `name`.

        Raises:
            RequestError: the layer is in no block, or in one that was passed.
            WorkError: a state could not be read or written, or is not finite.
        """
        index, local = self._place(name)
        if index < self._block:
            raise RequestError(f"{name!r} comes before block {self._block}, where the calibration stands")
        while self._block < index:
            self._arrive(self._block + 1)
        sums: dict[str, Tensor] = {}
        num_tokens = 0
        for number, part in enumerate(self.compressed.parts):
            x, x_now = (part.tokens(self._input(stream, local, number)) for stream in (self.dense, self.compressed))
            for rows, rows_now in zip(*(each.split(max(1, CHUNK // x.shape[-1])) for each in (x, x_now)), strict=True):
                # Products of one chunk in the model's own precision: what they lack is far below SEQUENTIAL_RIDGE.
                single, single_now = (each.float() for each in (rows, rows_now))
                for key, value in {
                    "second": single_now.mT @ single_now,
                    "cross": single.mT @ single_now,
                    "mean": single_now.sum(0),
                    "dense_mean": single.sum(0),
                }.items():
                    sums[key] = value.double() if key not in sums else sums[key].add_(value)
            num_tokens += len(x)
        if not all(value.isfinite().all() for value in sums.values()):
            raise WorkError(f"the input of {name!r} holds NaN or infinity")
        return PairedMoments(**{key: value / num_tokens for key, value in sums.items()}, num_tokens=num_tokens)

    def _arrive(self, index: int) -> None:
        self.compressed.advance(index - 1)
        self.dense.advance(index - 1)
        # The copy of the block that was passed is of no more use.
        self.dense.blocks[index - 1] = self.compressed.blocks[index - 1]
        self._keep_dense(index)

    def _keep_dense(self, index: int) -> None:
        # Layers of this block will be replaced.
        self.dense.blocks[index] = copy.deepcopy(self.dense.blocks[index])
        self._block = index

    def _place(self, name: str) -> tuple[int, str]:
        prefix = f"{self.dense.prefix}."
        number, _, local = name.removeprefix(prefix).partition(".")
        if not name.startswith(prefix) or not number.isdecimal() or int(number) >= self.dense.num_blocks:
            raise RequestError(f"{name!r} is in no transformer block: it cannot be fitted sequentially")
        return int(number), local

    def _input(self, stream: BlockStream, local: str, number: int) -> Tensor:
        """What the layer `local` of the current block reads for the part of that number."""
        read: list[Tensor] = []

        def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            read.append(inputs[0].detach())
            raise _LayerReached

        with stream.ready(self._block) as block:
            hook = block.get_submodule(local).register_forward_pre_hook(stop)
            try:
                stream.output(block, self._block, number)
            except _LayerReached:
                return read[0]
            finally:
                hook.remove()
        raise WorkError(f"targeted layer {local!r} of block {self._block} was never called on a calibration token")
