"""Benchmark tasks of lm-evaluation-harness (`lm_eval`, the extra `eval`) on a loaded model."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kronpress.errors import RequestError, WorkError
from kronpress.evaluation import LONGEST_DEFAULT_WINDOW, longest_context, rows_at_once


@dataclass(frozen=True)
class Tasks:
    """Tasks that exist: what lm_eval's `simple_evaluate` takes as `tasks` and `task_manager`."""

    names: list[str]
    manager: Any


def find_tasks(wanted: Sequence[str]) -> Tasks:
    """The tasks that `wanted` asks for.

    Args:
        wanted: names or glob patterns of lm_eval's tasks, groups and tags; YAML files of one task or group; folders,
            of which all tasks are meant. What exists as a file or folder is taken as such.

    Raises:
        RequestError: lm_eval is not installed, or there is no such task, file, or task in a folder.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise RequestError(
            f"tasks need lm-evaluation-harness, and {error.name} is not installed: pip install 'kronpress[eval]'"
        ) from error
    paths = [Path(name) for name in wanted if Path(name).exists() or name.endswith(".yaml")]
    named = [name for name in wanted if Path(name) not in paths]
    # Indexing lm_eval's own tasks, more than ten thousand files, takes seconds.
    folders = [path for path in paths if path.is_dir()]
    manager = TaskManager(include_path=folders, include_defaults=bool(named))
    names = []
    for path in paths:
        if path.is_dir():
            inside = TaskManager(include_path=path, include_defaults=False).all_subtasks
            if not inside:
                raise RequestError(f"tasks {str(path)!r}: there is no task in the folder's .yaml files")
            names += inside
        elif path.is_file():
            names.append(str(path))
        else:
            raise RequestError(f"tasks {str(path)!r}: no such file")
    for name in named:
        matches = manager.match_tasks([name])
        if not matches:
            near = difflib.get_close_matches(name, manager.all_tasks, n=2)
            hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            raise RequestError(
                f"unknown task {name!r}: {hint}Allowed: what `lm-eval ls tasks` lists, and .yaml files and folders"
            )
        names += matches
    return Tasks(names, manager)


def run_tasks(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Tasks) -> dict[str, dict[str, Any]]:
    """The metrics of each task and group by name, with all that is needed to compare them with others.

    Standard errors are left out: lm_eval estimates some of them with as many processes as there are cores.

    Raises:
        WorkError: a task could not be loaded or run, or a metric is not finite.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    length = min(longest_context(model) or LONGEST_DEFAULT_WINDOW, LONGEST_DEFAULT_WINDOW)
    was_training = model.training
    pad_token = tokenizer.pad_token
    try:
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=rows_at_once(model, length))
        found = lm_eval.simple_evaluate(
            harness, tasks=tasks.names, task_manager=tasks.manager, bootstrap_iters=0, log_samples=False
        )
    except Exception as error:  # tasks are code and data of many authors, and raise classes of their own
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise WorkError(f"tasks {', '.join(tasks.names)}: {reason}") from error
    finally:
        model.train(was_training)
        tokenizer.pad_token = pad_token  # HFLM sets one
    results = {}
    for name, figures in found["results"].items():
        metrics = {
            key.removesuffix(",none"): value
            for key, value in figures.items()
            if "," in key and "_stderr," not in key and isinstance(value, int | float)
        }
        if not all(map(math.isfinite, metrics.values())):
            raise WorkError(f"task {name!r}: a metric is not finite: {metrics}")
        results[name] = {
            "protocol": "lm-eval",
            "lm_eval_version": lm_eval.__version__,
            "task_version": found["versions"].get(name),
            "num_fewshot": found["n-shot"].get(name),
            "num_samples": found["n-samples"].get(name, {}).get("effective"),
            "metrics": metrics,
        }
    return results
