"""A grid of runs: one recipe, several values of some of its fields, each combination in a folder of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from kronpress.errors import RequestError, Terminated, WorkError
from kronpress.healing.checkpoints import write_whole
from kronpress.pipeline.whole_run import SILENT, Messages, run
from kronpress.recipe import Recipe, load_recipe
from kronpress.reporting import Comparison, compare, write_comparison

SWEEP = "sweep.json"


@dataclass(frozen=True)
class GridRun:
    """One combination of values: the folder of its run, what `--set` would say, and the recipe."""

    folder: str
    changes: list[str]
    recipe: Recipe


def sweep(
    source: str,
    over: Sequence[str],
    out: Path,
    *,
    changes: Sequence[str] = (),
    resume: bool = False,
    allow_mixed: bool = False,
    messages: Messages = SILENT,
    command: list[str] | None = None,
) -> Comparison:
    """Run the recipe `source` with every combination of the values in `over`, and compare the runs.

    Each run has a folder in `out`, as `run` writes it, and the comparison is written beside them. A combination that
    fails does not keep the others from being run. With `resume` finished runs are left as they are, an interrupted
    one goes on, and those that are missing or failed are begun: the values may have become more since.

    Args:
        over: `path.to.field=value,value,...`; a list as a value is written in square brackets.
        changes: as of `load_recipe`, for all runs.
        allow_mixed: sweep over what makes runs incomparable, such as the model, and compare them all the same.

    Raises:
        RequestError: a combination is no valid recipe, one comes twice, the runs would not be comparable, or there is
            something in `out` and `resume` was not asked for; all this before any work.
        WorkError: some combinations failed; the others are there.
    """
    grid = grid_runs(source, over, changes)
    if not allow_mixed:
        _check_comparable(grid)
    if not resume and out.is_dir() and any(out.iterdir()):
        raise RequestError(f"{str(out)!r} is not empty: --resume goes on with a sweep, another --out begins one")
    out.mkdir(parents=True, exist_ok=True)
    runs = {each.folder: each.changes for each in grid}
    note = {"recipe": source, "over": list(over), "set": list(changes), "command": command, "runs": runs}
    write_whole(out / SWEEP, json.dumps(note, indent=1, ensure_ascii=False) + "\n")
    failed = {}
    for number, each in enumerate(grid, start=1):
        messages.stage(f"run {number} of {len(grid)}: {each.folder}")
        try:
            run(each.recipe, out / each.folder, resume=True, messages=messages, command=command)
        except Terminated:
            raise
        except (RequestError, WorkError) as error:
            failed[each.folder] = str(error)
            messages.stage(f"{each.folder} failed: {error}")
    done = [out / each.folder for each in grid if each.folder not in failed]
    if done:
        comparison = compare(done, allow_mixed=allow_mixed)
        for path in write_comparison(comparison, out):
            messages.stage(f"comparison: {path}")
    if failed:
        told = "; ".join(f"{folder}: {reason}" for folder, reason in failed.items())
        raise WorkError(f"{len(failed)} of {len(grid)} runs failed, --resume tries them again: {told}")
    return comparison


def grid_runs(source: str, over: Sequence[str], changes: Sequence[str] = ()) -> list[GridRun]:
    """All combinations of the values, the last field varying fastest.

    >>> [each.folder for each in grid_runs("low-rank", ["seed=0,1", "targets=[mlp,attention],mlp"])]
    ['seed=0,targets=mlp-attention', 'seed=0,targets=mlp', 'seed=1,targets=mlp-attention', 'seed=1,targets=mlp']

    Raises:
        RequestError: `over` is empty or not of that form, names a field twice, or a combination is no valid recipe.
    """
    fields = dict(map(_field_and_values, over))
    if not fields:
        raise RequestError("a sweep over nothing was asked for: give --over field=value,value,...")
    if len(fields) < len(over):
        raise RequestError(f"--over names a field twice: {', '.join(over)}")
    grid = []
    for values in product(*fields.values()):
        own = [f"{name}={value}" for name, value in zip(fields, values, strict=True)]
        recipe = load_recipe(source, [*changes, *own])
        grid.append(GridRun(",".join(map(_folder_part, own)), own, recipe))
    folders = [each.folder for each in grid]
    for each in grid:
        if folders.count(each.folder) > 1 or [other.recipe for other in grid].count(each.recipe) > 1:
            raise RequestError(f"--over gives {' '.join(each.changes)!r} twice")
    return grid


def _field_and_values(given: str) -> tuple[str, list[str]]:
    """The field's path, and its values as YAML; commas within brackets do not part them."""
    name, equals, text = given.partition("=")
    # Values are what stands between commas outside of brackets and quotation marks.
    values = [value.strip() for value in re.findall(r"(?:\[[^\]]*\]|\{[^}]*\}|\"[^\"]*\"|'[^']*'|[^,\[{\"'])+", text)]
    if not equals or not name or not values or not all(values):
        raise RequestError(f"--over {given!r}: expected path.to.field=value,value,...")
    return name, values


def _folder_part(change: str) -> str:
    """Of `path.to.field=value`, something that may be part of a folder's name."""
    path, _, value = change.partition("=")
    return f"{path}={re.sub(r'[^0-9A-Za-z._+-]+', '-', value).strip('-') or 'none'}"


def _check_comparable(grid: Sequence[GridRun]) -> None:
    """Raises RequestError where the runs would have different teachers or ways of being measured."""
    first = grid[0].recipe
    for each in grid[1:]:
        for section in ("model", "revision"):
            if getattr(each.recipe, section) != getattr(first, section):
                raise RequestError(
                    f"a sweep over {section} gives runs that are not comparable: --allow-mixed sweeps over it"
                )
        for name, value in each.recipe.evaluation:
            if name != "speed" and value != getattr(first.evaluation, name):
                raise RequestError(
                    f"a sweep over evaluation.{name} gives runs that are not comparable: --allow-mixed sweeps over it"
                )
