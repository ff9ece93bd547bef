"""The hidden folder beside a run directory: whose it is, what an interrupted run has left in it, and when it goes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kronpress.errors import RequestError
from kronpress.healing.blockwise import has_blocks
from kronpress.healing.checkpoints import (
    OLD,
    checkpoint_step,
    checkpoints,
    newest_checkpoint,
    only_one,
    retire,
    write_whole,
)
from kronpress.healing.progress import check_changes, differences
from kronpress.recipe import Recipe, dump_recipe, load_recipe

# What the folder has of a stage that is done.
STAGE_NOTE = "stage.json"
RUN_LOCK = ".run.lock"


@contextmanager
def only_run(work: Path) -> Iterator[None]:
    """Inside the block no other process runs with `work`, which stays only if there is something to go on from.

    Raises:
        RequestError: another process does.
    """
    try:
        with only_one(work, RUN_LOCK):
            # What a process that was killed as it tidied up left behind.
            shutil.rmtree(work.with_name(f"{OLD}{work.name}"), ignore_errors=True)
            try:
                yield
            except BaseException:
                if not is_begun(work):
                    clear(work)
                raise
            retire(work)
    finally:
        with suppress(OSError):
            work.rmdir()  # if nothing is in it


@contextmanager
def healing_folder(out: Path, resume: bool, overwrite: bool) -> Iterator[Path]:
    """The hidden folder beside `out` for a training whose result is `out`, which goes when the block has made it.

    Raises:
        RequestError: another process trains there, or a training was interrupted there and is not to be resumed.
    """
    work = out.resolve().with_name(f".{out.resolve().name}.healing")
    with only_run(work):
        if not resume:
            check_not_begun(work, out, overwrite)
        yield work


def check_not_begun(work: Path, out: Path, overwrite: bool) -> None:
    """Refuse to throw an interrupted training away, unless that is asked for; then clear the folder."""
    if is_begun(work) and not overwrite:
        raise RequestError(f"{out} was begun and interrupted: --resume goes on with it, --overwrite starts anew")
    clear(work)


def clear(work: Path) -> None:
    """Delete all that is in `work` but the lock."""
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != RUN_LOCK:
            path.unlink()


def mark(work: Path, recipe: Recipe, accept_changes: bool = False) -> None:
    """Mark `work` as this recipe's.

    Raises:
        RequestError: it is another recipe's; of one that differs only in how it heals if that is not accepted.
    """
    note = work / "recipe.yaml"
    if note.is_file():
        check_changes(differences(_flat(load_recipe(note)), _flat(recipe)), repr(str(work)), accept_changes)
    write_whole(note, dump_recipe(recipe))


def _flat(recipe: Recipe) -> dict[str, Any]:
    """The recipe's fields by their names, `section.field` of those in sections."""
    fields = recipe.model_dump(mode="json")
    return {
        name: value
        for section, content in fields.items()
        for name, value in (
            {f"{section}.{field}": value for field, value in content.items()}
            if isinstance(content, dict)
            else {section: content}
        ).items()
    }


def is_begun(work: Path) -> bool:
    """Whether there is anything in `work` to go on from."""
    folders = [work, *work.glob("stage-*")]
    return any(work.glob(f"stage-*/{STAGE_NOTE}")) or any(map(checkpoints, folders)) or any(map(has_blocks, folders))


def _steps_done(work: Path) -> int | None:
    """The optimiser steps, of all stages, that need not be done again; None if there is nothing to go on from."""
    finished = [json.loads(note.read_text(encoding="utf-8")) for note in work.glob(f"stage-*/{STAGE_NOTE}")]
    current = [newest_checkpoint(folder) for folder in (work, work / f"stage-{len(finished) + 1}")]
    steps = [stage["healing"]["num_steps"] for stage in finished]
    steps += [checkpoint_step(checkpoint) for checkpoint in current if checkpoint is not None]
    # Blocks that were reconstructed are no steps of the healing.
    return sum(steps) if steps or any(map(has_blocks, [work, *work.glob("stage-*")])) else None


def note_resumption(work: Path) -> list[int]:
    """The steps at which this run was resumed so far, this time included."""
    note = work / "resumed_at_steps.json"
    steps = json.loads(note.read_text()) if note.is_file() else []
    done = _steps_done(work)
    if done is not None:
        steps.append(done)
        write_whole(note, json.dumps(steps))
    return steps
