"""Sums over tokens of what layers read and of the gradients by what they answer, filled by hooks."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kronpress.calibration.batches import Part
from kronpress.errors import WorkError
from kronpress.matrices.moments import InputMoments
from kronpress.surgery import is_embedding, tied_heads, weight_shape

# Numbers that are computed with in float64 at a time (32 MiB), so that no second large activation stands in memory.
CHUNK = 2**22
# Of a symmetric sum the upper triangle is added up, in so many panels of rows: 1/2 + 1/16 of the products.
_PANELS = 8


class _Sums:
    """Σ r rᵀ, Σ r and Σ |r| over rows r (features,), in float64 on their device; `label` says what they are."""

    def __init__(self, label: str, like: Tensor) -> None:
        width = like.shape[-1]
        self.label = label
        self.outer = torch.zeros(width, width, dtype=torch.float64, device=like.device)
        self.total = torch.zeros(width, dtype=torch.float64, device=like.device)
        self.magnitude = torch.zeros_like(self.total)
        self.num_rows = 0

    def add(self, rows: Tensor) -> None:
        for chunk in rows.split(max(1, CHUNK // rows.shape[-1])):
            chunk = chunk.double()
            for begin, end in self._panels():
                self.outer[begin:end, begin:].addmm_(chunk[:, begin:end].mT, chunk[:, begin:])
            self.total += chunk.sum(dim=0)
            self.magnitude += chunk.abs().sum(dim=0)
        self.num_rows += len(rows)
        self._check(self.total)

    def moments(self, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """The sums over `num_rows`, on the CPU; they are used up."""
        self._check(self.outer)
        for begin, end in self._panels():
            self.outer[end:, begin:end] = self.outer[begin:end, end:].mT
        second, mean, magnitude = (each.div_(num_rows).cpu() for each in (self.outer, self.total, self.magnitude))
        return second, mean, magnitude

    def _panels(self) -> Iterator[tuple[int, int]]:
        width = len(self.total)
        size = -(-width // _PANELS)
        for begin in range(0, width, size):
            yield begin, min(begin + size, width)

    def _check(self, sums: Tensor) -> None:
        if not sums.isfinite().all():
            raise WorkError(f"{self.label} holds NaN or infinity")


@dataclass
class Collector:
    """Sums of what layers read, and of the gradients by what they answer, filled by hooks as the model runs.

    Of an embedding lookups are counted, and what it reads is what the linear layers in `tied[name]` do.
    """

    layers: dict[str, nn.Module]
    # Of an embedding by its name, the linear layers that multiply by its table, by theirs.
    tied: dict[str, dict[str, nn.Module]] = field(default_factory=dict)
    part: Part = field(init=False)  # what is being run
    # Of layers that read the same tensor the first is the leader, and the sums are kept under its name.
    leaders: dict[str, str] = field(default_factory=dict)
    num_calls: Counter[str] = field(default_factory=Counter)
    inputs: dict[str, _Sums] = field(default_factory=dict)
    held_out: dict[str, _Sums] = field(default_factory=dict)
    gradients: dict[str, _Sums] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    # What a leader has read last, and its version. A weak reference, since at the address of a tensor that is gone
    # another one may stand.
    last_read: dict[str, tuple[weakref.ref[Tensor], int]] = field(default_factory=dict)
    # Where the graph begins: outputs of layers that depend on no other of the layers.
    leaves: list[Tensor] = field(default_factory=list)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles = []
        try:
            for name, layer in self.layers.items():
                before = self._look_up if is_embedding(layer) else self._read
                handles.append(layer.register_forward_pre_hook(partial(before, name), with_kwargs=True))
                handles.append(layer.register_forward_hook(partial(self._answer, name)))
            for heads in self.tied.values():
                for name, head in heads.items():
                    handles.append(head.register_forward_pre_hook(partial(self._read, name), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _look_up(self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.part.is_held_out:
            return
        indices: Tensor = (*args, *kwargs.values())[0]
        rows = self.part.tokens(indices[..., None]).flatten()
        counts = torch.bincount(rows, minlength=weight_shape(layer)[0]).double()
        self.counts[name] = self.counts[name].add_(counts) if name in self.counts else counts

    def _read(self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = (*args, *kwargs.values())[0]
        if name not in self.leaders:
            self.leaders[name] = next((leader for leader in self.last_read if self._has_read(leader, x)), name)
        leader = self.leaders[name]
        self.num_calls[name] += 1
        if leader == name:
            self.last_read[name] = (weakref.ref(x), x._version)
            self._add(self.held_out if self.part.is_held_out else self.inputs, name, "the input", x)
        elif not self._has_read(leader, x):
            raise self._separated(name)

    def _has_read(self, leader: str, x: Tensor) -> bool:
        tensor, version = self.last_read[leader]
        return tensor() is x and version == x._version

    def _separated(self, name: str) -> WorkError:
        return WorkError(f"{name!r} and {self.leaders[name]!r} read the same tensor in some calls and not in others")

    def _answer(self, name: str, _: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        if not output.requires_grad:
            self.leaves.append(output.detach().requires_grad_())
            output = self.leaves[-1].clone()  # which the model may change in place
        output.register_hook(partial(self._add, self.gradients, name, "the loss's gradient by the output"))
        return output

    def _add(self, sums: dict[str, _Sums], name: str, what: str, rows: Tensor) -> None:
        rows = rows.detach()
        if name not in sums:
            sums[name] = _Sums(f"{what} of {name!r}", rows)
        sums[name].add(self.part.tokens(rows))

    def moments(self, with_gradient: bool) -> dict[str, InputMoments]:
        """The moments of every layer; the sums are used up.

        Raises:
            WorkError: a layer read no token, layers shared their input for a while, or a moment is not finite.
        """
        linear = [name for name, layer in self.layers.items() if not is_embedding(layer)]
        for name in linear:
            sums = self.inputs.get(self.leaders.get(name, name))
            if sums is None or sums.num_rows == 0:
                raise _never_called(name)
            if self.num_calls[name] != self.num_calls[self.leaders[name]]:
                raise self._separated(name)
        num_tokens = {name: sums.num_rows for name, sums in self.inputs.items()}
        moments = {name: sums.moments(sums.num_rows) for name, sums in self.inputs.items() if sums.num_rows}
        held_out = {name: sums.moments(sums.num_rows)[0] for name, sums in self.held_out.items() if sums.num_rows}
        result = {}
        for name in self.layers:
            if name in linear:
                leader = self.leaders[name]
                gradient = self._gradient(name, num_tokens[leader]) if with_gradient else None
                second, mean, magnitude = moments[leader]
                result[name] = InputMoments(second, mean, num_tokens[leader], gradient, held_out.get(leader), magnitude)
            else:
                result[name] = self._of_embedding(name, with_gradient, moments, held_out)
        return result

    def _of_embedding(
        self,
        name: str,
        with_gradient: bool,
        moments: dict[str, tuple[Tensor, Tensor, Tensor]],
        held_out: dict[str, Tensor],
    ) -> InputMoments:
        """The moments of an embedding from those of the layers tied to it, which all read as many tokens."""
        if name not in self.counts or not self.counts[name].any():
            raise _never_called(name)
        num_tokens = int(self.counts[name].sum())
        gradient = self._gradient(name, num_tokens) if with_gradient else None
        leaders = [self.leaders[head] for head in self.tied.get(name, {}) if self.leaders.get(head) in moments]
        # Without such a layer they are zero.
        width = self._width(name)
        sizes = ((width, width), (width,), (width,))
        second, mean, magnitude = (torch.zeros(size, dtype=torch.float64) for size in sizes)
        for leader in leaders:
            for sums, of_head in zip((second, mean, magnitude), moments[leader], strict=True):
                sums += of_head / len(leaders)
        apart = [held_out[leader] for leader in leaders if leader in held_out]
        return InputMoments(
            second,
            mean,
            num_tokens,
            gradient,
            torch.stack(apart).mean(0) if apart else None,
            magnitude,
            self.counts[name].cpu(),
        )

    def _gradient(self, name: str, num_tokens: int) -> Tensor:
        if name in self.gradients:
            return self.gradients[name].moments(num_tokens)[0]
        # The loss does not depend on this layer.
        return torch.zeros(self._width(name), self._width(name), dtype=torch.float64)

    def _width(self, name: str) -> int:
        """How many features the layer's output has."""
        rows, columns = weight_shape(self.layers[name])
        return columns if is_embedding(self.layers[name]) else rows


def _never_called(name: str) -> WorkError:
    return WorkError(f"targeted layer {name!r} was never called on a calibration token")


def collector_of(model: nn.Module, names: list[str]) -> Collector:
    """The collector of the layers and embeddings of these names, with the linear layers tied to an embedding."""
    layers = {name: model.get_submodule(name) for name in names}
    heads = {name: tied_heads(model, name) for name, layer in layers.items() if is_embedding(layer)}
    return Collector(layers, {name: {head: model.get_submodule(head) for head in heads[name]} for name in heads})


@contextmanager
def as_for_use(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no gradients by parameters, inside the block; afterwards all is as it was."""
    modes = [(each, each.training) for each in module.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        module.eval().requires_grad_(False)
        # Inference mode of the caller would forbid gradients and versions of tensors.
        with torch.inference_mode(False):
            yield
    finally:
        for each, training in modes:
            each.training = training
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
