"""Recipes, data and small models to calibrate, and how moments are compared."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kronpress.calibration import moments as moments_module
from kronpress.calibration import num_bytes
from kronpress.matrices.moments import InputMoments
from kronpress.planning import find_targets
from kronpress.recipe import Calibration, Recipe

Build = Callable[..., PreTrainedModel]
# All that a calibration may measure.
EVERYTHING = {"sensitivity": True, "held_out": 0.4}


def recipe(targets: Any = "blocks", seed: int = 0, **changes: Any) -> Recipe:
    """Low rank over `targets`, nothing held out and no gradients unless asked for."""
    calibration = Calibration(**{"held_out": 0.0, "sensitivity": False, **changes})
    return Recipe(targets=targets, structure="low_rank", seed=seed, calibration=calibration)


def tokens(sequences: int = 6, length: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(300, (sequences, length), generator=torch.Generator().manual_seed(seed))


def rows_of_three(sequences: int = 2, length: int = 5) -> Tensor:
    return torch.randn(sequences, length, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def padded(sequences: list[Tensor]) -> dict[str, Tensor]:
    """The sequences with random tokens behind them up to one length, and the mask that hides these."""
    length = max(map(len, sequences)) + 2
    ids = tokens(len(sequences), length, seed=9)
    mask = torch.zeros(len(sequences), length, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    return {"input_ids": ids, "attention_mask": mask}


class Reader(nn.Module):
    """Layers a and b of 3 features each, which read what `feed` makes of x; the logits come from both."""

    def __init__(self, feed: Callable[[Reader, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 4).double(), nn.Linear(3, 4).double()
        self.feed = feed

    def forward(self, x: Tensor) -> Any:
        a, b = self.feed(self, x)
        return SimpleNamespace(logits=a + b)


def sizes_of(model: nn.Module, wanted: Recipe) -> dict[str, int]:
    """The most bytes that the moments of each targeted layer take."""
    shapes = find_targets(model, wanted)
    section = wanted.calibration
    return {name: num_bytes([shape], section.sensitivity, section.held_out > 0) for name, shape in shapes.items()}


def assert_same(actual: Mapping[str, InputMoments], expected: Mapping[str, InputMoments], rtol: float = 0.0) -> None:
    """Of the same layers in the same order; each tensor to the fraction `rtol` of its largest number."""
    assert list(actual) == list(expected)
    for name, moments in expected.items():
        for part in fields(InputMoments):
            found, wanted = getattr(actual[name], part.name), getattr(moments, part.name)
            if isinstance(wanted, Tensor):
                torch.testing.assert_close(found, wanted, rtol=rtol, atol=rtol * wanted.abs().max().item())
            else:
                assert found is None if wanted is None else found == wanted, (name, part.name)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def counted_runs(model: nn.Module) -> Iterator[list[None]]:
    """One entry for each time that the model is run."""
    runs: list[None] = []
    handle = model.register_forward_pre_hook(lambda *_: runs.append(None))
    yield runs
    handle.remove()


@contextmanager
def no_file_beyond(num_bytes_allowed: int) -> Iterator[None]:
    """No file may grow larger, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes_allowed, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on no tensor may be read from a file of moments."""
    monkeypatch.setattr(moments_module._StoredTensors, "_read", lambda *_: pytest.fail("a tensor is read"))
