"""A training that is killed again and again, beside the same one left in peace.

    python benchmarks/kill_healing.py --out benchmarks/results/kill_healing.json

A tiny GPT-2 with Kronecker sums is distilled from its dense self for a few seconds of one core, a training checkpoint
every third step. It is killed at random moments, and each time goes on; and other trainings of the same are killed
once each, before one of their operations on files, most of which are part of a save. All must end with the weights and
the rows of the one in peace, bit for bit. Every attempt is a process of its own, forked from one that has imported
everything. What else may happen to it is tried by healing_faults.py.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, GPT2Config
from transformers.utils import logging

import kronpress as kp
from kronpress.errors import RequestError, Terminated, WorkError
from kronpress.healing import checkpoint_step, newest_checkpoint
from kronpress.healing.trainer import PROGRESS
from kronpress.recipe import Healing

TOKENS = (7 * torch.arange(4096)) % 60 + 3
CONFIG = GPT2Config(vocab_size=300, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.1)
RESULT = "result.json"
MOST_ROWS = 50  # of a training


def train(
    folder: Path,
    num_steps: int,
    resume: bool,
    each_step: Callable[[int], None] = lambda step: None,
    result: Path | None = None,
) -> None:
    """The training, in `folder`; how it ends goes to RESULT there, or in `result`, and what it says to `told_file`."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    torch.manual_seed(0)
    # Each with a configuration of its own, which compressing changes.
    teacher, student = (AutoModelForCausalLM.from_config(copy.deepcopy(CONFIG)).eval() for _ in range(2))
    student.load_state_dict(teacher.state_dict())
    recipe = kp.Recipe(spec={"right_shape": (2, 2), "num_terms": 2}, fit={"start": "adaptive"})
    kp.compress_(student, kp.make_plan(student, recipe))
    healing = Healing(
        max_steps=num_steps,
        sequences_per_step=2,
        sequence_length=32,
        learning_rate=3e-3,
        distillation_weight=1.0,
        save_steps=3,
    )
    log = kp.heal_(
        student,
        teacher,
        TOKENS,
        healing,
        work_dir=folder,
        resume=resume,
        validation_tokens=TOKENS[:128],
        progress=lambda row: each_step(row.step),
        messages=lambda text: _tell(folder, text),
    )
    digest = hashlib.sha256()
    for name, tensor in sorted(student.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    rows = [row.model_dump(exclude={"tokens_per_second", "seconds_left"}) for row in log.rows]
    result = folder if result is None else result
    result.mkdir(exist_ok=True)
    (result / RESULT).write_text(json.dumps({"weights": digest.hexdigest(), "rows": rows}))


def told_file(folder: Path) -> Path:
    """Not in the folder, whose disk may be full."""
    return folder.with_name(f"{folder.name}.told")


def _tell(folder: Path, text: str) -> None:
    with told_file(folder).open("a") as file:
        file.write(text + "\n")


def started(work: Callable[[], None]) -> int:
    """The number of a new process that does `work` and ends with 0, with 3 after an error of ours, or with 4."""
    child = os.fork()
    if child:
        return child
    code = 4
    try:
        with Path(os.devnull).open("w") as sys.stderr:
            work()
        code = 0
    except (RequestError, WorkError) as error:
        _tell(Path(os.environ["KRONPRESS_FAULT_FOLDER"]), str(error))
        code = 143 if isinstance(error, Terminated) else 3
    finally:
        os._exit(code)


def ended(child: int) -> int:
    """The process's exit code; minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Trial:
    """One training in a folder of its own, in as many attempts as it takes."""

    def __init__(self, folder: Path, num_steps: int) -> None:
        self.folder, self.num_steps = folder, num_steps
        folder.mkdir(parents=True)

    def start(self, before: Callable[[], None] = lambda: None, **options: Any) -> int:
        os.environ["KRONPRESS_FAULT_FOLDER"] = str(self.folder)

        def work() -> None:
            before()
            train(self.folder, self.num_steps, resume=True, **options)

        return started(work)

    def run(self, before: Callable[[], None] = lambda: None, **options: Any) -> int:
        return ended(self.start(before, **options))

    @property
    def result(self) -> dict[str, Any]:
        return json.loads((self.folder / RESULT).read_text()) if (self.folder / RESULT).exists() else {}

    @property
    def newest_step(self) -> int | None:
        """That of the newest checkpoint that is whole."""
        newest = newest_checkpoint(self.folder)
        return None if newest is None else checkpoint_step(newest)

    @property
    def told(self) -> str:
        path = told_file(self.folder)
        return path.read_text() if path.exists() else ""


# ---- SIGKILL ----


def killed_at_random(
    trial: Trial, chance: random.Random, startup: float, seconds: float, kills: int
) -> list[int | None]:
    """Kill the training so many times; the step of its newest checkpoint after each, as far as it was still going.

    Every fifth time on average within `startup` seconds of the process's start, else within `seconds` of one of its
    first rows, so that it gets about half through.
    """
    reached: list[int | None] = []
    for _ in range(kills):
        in_training, moment = chance.random() > 0.2, chance.random()
        rows_left = chance.randint(1, 2 * min(trial.num_steps, MOST_ROWS) // (3 * kills) + 2)

        def die_within(seconds: float, moment: float = moment) -> None:
            timer = threading.Timer(moment * seconds, lambda: os.kill(os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()

        def each_row(_: int) -> None:
            nonlocal rows_left
            rows_left -= 1
            if rows_left == 0:
                die_within(seconds)

        code = trial.run(each_step=each_row) if in_training else trial.run(lambda: die_within(startup))
        if code != -signal.SIGKILL or trial.result:
            break  # it was over before
        reached.append(trial.newest_step)
    return reached


class FileOperations:
    """An audit hook that counts this process's operations on files of a folder and calls `each` before each."""

    EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")

    def __init__(self, folder: Path, each: Callable[[int], object]) -> None:
        self.folder, self.each, self.number = str(folder), each, 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in self.EVENTS and self.folder in str(arguments[0]):
            self.number += 1
            self.each(self.number)


def killed_at_a_file_operation(trial: Trial, number: int) -> bool:
    """The process kills itself before its operation `number` on files of the training's folder."""

    def kill(reached: int) -> None:
        if reached == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return trial.run(lambda: sys.addaudithook(FileOperations(trial.folder, kill))) == -signal.SIGKILL


@contextmanager
def trials(num_steps: int) -> Iterator[Callable[[str], Trial]]:
    root = Path(tempfile.mkdtemp())
    try:
        yield lambda name: Trial(root / name, num_steps)
    finally:
        shutil.rmtree(root)


def main(
    out: Annotated[Path, typer.Option(help="where the result is written")],
    kills: Annotated[int, typer.Option(help="SIGKILLs at random moments of one training")] = 20,
    operations: Annotated[int, typer.Option(help="SIGKILLs at file operations, each in a training of its own")] = 20,
    steps: Annotated[int, typer.Option(help="steps of the training")] = 150,
    seed: Annotated[int, typer.Option(help="of the random moments")] = 0,
) -> None:
    chance = random.Random(seed)
    with trials(steps) as trial_called:
        peace = trial_called("peace")
        counted = peace.folder.with_name("operations")
        operations_hook = FileOperations(peace.folder, each=lambda number: counted.write_text(str(number)))
        assert peace.run(lambda: sys.addaudithook(operations_hook)) == 0, peace.told
        num_operations = int(counted.read_text())
        newest = newest_checkpoint(peace.folder)
        assert newest is not None
        seconds = json.loads((newest / PROGRESS).read_text())["seconds"]
        began = time.monotonic()
        assert peace.run() == 0  # resumed where it had ended: what a process takes before its first step
        startup = time.monotonic() - began

        trial = trial_called("moments")
        reached = killed_at_random(trial, chance, startup, 2 * seconds / min(steps, MOST_ROWS), kills)
        one = len(reached) == kills and trial.run() == 0 and trial.result == peace.result
        print(f"{kills} SIGKILLs at random moments of one training: {'survived' if one else 'LOST'}", flush=True)
        survived = []
        for number in sorted(chance.sample(range(1, num_operations + 1), operations)):
            trial = trial_called(f"operation-{number}")
            killed = killed_at_a_file_operation(trial, number)
            survived.append(killed and trial.run() == 0 and trial.result == peace.result)
        print(f"{operations} SIGKILLs at file operations: {sum(survived)} survived", flush=True)
    result = {
        "steps": steps,
        "seed": seed,
        "seconds_of_the_training_in_peace": round(seconds, 2),
        "versions": {name: version(name) for name in ("torch", "transformers", "kronpress")},
        "one_training": {
            "kills": kills,
            "newest_checkpoint_after_each": reached,
            "final_weights_and_rows_are_equal": one,
        },
        "one_kill_each": {
            "file_operations": num_operations,
            "kills": operations,
            "final_weights_and_rows_are_equal": sum(survived),
        },
    }
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if not (one and all(survived)):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
