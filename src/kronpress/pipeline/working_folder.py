"""The hidden folder beside a run directory: whose it is, what an interrupted run has left in it, and when it goes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kronpress.errors import RequestError
from kronpress.healing import checkpoint_step, newest_checkpoint
from kronpress.recipe import Recipe, dump_recipe, load_recipe

# What the folder has of a stage that is done.
STAGE_NOTE = "stage.json"


@contextmanager
def training_folder(work: Path, recipe: Recipe) -> Iterator[None]:
    """Mark `work` as this recipe's; whatever happens, it stays only if there is a training checkpoint in it."""
    note = work / "recipe.yaml"
    if note.is_file() and load_recipe(note) != recipe:
        raise RequestError(f"{work} holds an interrupted run of another recipe: --overwrite without --resume drops it")
    work.mkdir(parents=True, exist_ok=True)
    note.write_text(dump_recipe(recipe), encoding="utf-8")
    try:
        yield
    finally:
        if not is_begun(work):
            shutil.rmtree(work, ignore_errors=True)


def is_begun(work: Path) -> bool:
    """Whether there is anything in `work` to go on from."""
    return _steps_done(work) is not None


def _steps_done(work: Path) -> int | None:
    """The optimiser steps, of all stages, that need not be done again; None if there is nothing to go on from."""
    finished = [json.loads(note.read_text(encoding="utf-8")) for note in work.glob(f"stage-*/{STAGE_NOTE}")]
    current = [newest_checkpoint(folder) for folder in (work, work / f"stage-{len(finished) + 1}")]
    steps = [stage["healing"]["num_steps"] for stage in finished]
    steps += [checkpoint_step(checkpoint) for checkpoint in current if checkpoint is not None]
    return sum(steps) if steps else None


def note_resumption(work: Path) -> list[int]:
    """The steps at which this run was resumed so far, this time included."""
    note = work / "resumed_at_steps.json"
    steps = json.loads(note.read_text()) if note.is_file() else []
    done = _steps_done(work)
    if done is not None:
        steps.append(done)
        note.write_text(json.dumps(steps))
    return steps
