"""A training that is killed, starved of disk and given damaged checkpoints, beside the same one left in peace.

    python benchmarks/kill_healing.py --out benchmarks/results/kill_healing.json

A tiny GPT-2 with Kronecker sums is distilled from its dense self for a few seconds of one core, a training checkpoint
every third step. A fault counts as survived if the resumed training ends with the same weights and the same rows, bit
for bit, and if what had to be said was said. Every attempt is a process of its own, forked from one that has imported
everything.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, GPT2Config
from transformers.utils import logging

import kronpress as kp
from kronpress.errors import RequestError, Terminated, WorkError
from kronpress.healing import newest_checkpoint, trainer
from kronpress.recipe import Healing

TOKENS = (7 * torch.arange(4096)) % 60 + 3
CONFIG = GPT2Config(vocab_size=300, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.1)
WEIGHTS = ("model.safetensors", "optimizer.pt")
RESULT, TOLD = "result.json", "told.txt"


def train(folder: Path, num_steps: int, resume: bool, each_step: Callable[[int], None] = lambda step: None) -> None:
    """The training, in `folder`; what it ended with goes to RESULT beside the checkpoints, what it said to TOLD."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_config(CONFIG).eval()
    student = AutoModelForCausalLM.from_config(CONFIG)
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
    (folder / RESULT).write_text(json.dumps({"weights": digest.hexdigest(), "rows": rows}))


def _tell(folder: Path, text: str) -> None:
    with (folder / TOLD).open("a") as file:
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
    def told(self) -> str:
        return (self.folder / TOLD).read_text() if (self.folder / TOLD).exists() else ""


# ---- the faults: each tries it on a trial and says whether what happened at once was right ----


def killed_at_random(trial: Trial, chance: random.Random, longest: float, kills: int) -> bool:
    for _ in range(kills):
        child = trial.start()
        time.sleep(chance.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        if ended(child) != -signal.SIGKILL:
            return False  # it was over before
    return not trial.result


def killed_at_a_file_operation(trial: Trial, number: int) -> bool:
    """The process kills itself at its operation `number` on files of the training's folder."""
    counted = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree") and str(
            trial.folder
        ) in str(arguments[0]):
            counted[0] += 1
            if counted[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)

    return trial.run(lambda: sys.addaudithook(hook)) == -signal.SIGKILL


def stopped_by_sigterm(trial: Trial, step: int) -> bool:
    def terminate(at: int) -> None:
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)

    code = trial.run(each_step=terminate)
    newest = newest_checkpoint(trial.folder)
    return code == 143 and newest is not None and newest.name in (f"checkpoint-{step}", f"checkpoint-{step + 1}")


def disk_full(trial: Trial, saves_before: int) -> bool:
    """There is no room to finish the checkpoint after so many others."""

    def fill() -> None:
        whole, calls = trainer.publish, [0]

        def publish(written: Path, checkpoint: Path) -> None:
            calls[0] += 1
            if calls[0] > saves_before:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            whole(written, checkpoint)

        trainer.publish = publish

    code = trial.run(fill)
    newest = newest_checkpoint(trial.folder)
    kept = f"step {3 * saves_before} is kept"
    return code == 3 and (kept in trial.told if saves_before else newest is None)


def file_cut_off(trial: Trial, name: str) -> bool:
    """The system refuses to write more than half of a file of the second checkpoint, as a full disk does."""
    newest = newest_checkpoint(trial.folder.with_name("peace"))
    assert newest is not None
    half = (newest / name).stat().st_size // 2

    def limit(step: int) -> None:
        if step == 4:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (half, resource.RLIM_INFINITY))

    return trial.run(each_step=limit) == 3 and "step 3 is kept" in trial.told


def _interrupted(trial: Trial) -> Path:
    """The newest checkpoint of the trial, which was killed after its second save."""

    def kill(step: int) -> None:
        if step == 8:
            os.kill(os.getpid(), signal.SIGKILL)

    trial.run(each_step=kill)
    newest = newest_checkpoint(trial.folder)
    assert newest is not None
    return newest


def truncated(trial: Trial, name: str) -> bool:
    path = _interrupted(trial) / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return True


def flipped(trial: Trial, name: str) -> bool:
    path = _interrupted(trial) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return True


def deleted(trial: Trial, name: str) -> bool:
    (_interrupted(trial) / name).unlink()
    return True


def second_run(trial: Trial) -> bool:
    """Another process wants the folder while one trains in it; it is refused, and the first goes on."""

    def ask(step: int) -> None:
        if step == 4:
            second = started(lambda: train(trial.folder, trial.num_steps, resume=True))
            assert ended(second) == 3

    return trial.run(each_step=ask) == 0 and "is in use by process" in trial.told


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
    steps: Annotated[int, typer.Option(help="steps of the training")] = 60,
    seed: Annotated[int, typer.Option(help="of the random moments")] = 0,
    few: Annotated[bool, typer.Option("--few", help="of the others only a few faults")] = False,
) -> None:
    chance = random.Random(seed)
    rows: list[dict[str, Any]] = []
    with trials(steps) as trial_called:
        peace = trial_called("peace")
        began = time.monotonic()
        counted = [0]

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree") and str(
                peace.folder
            ) in str(arguments[0]):
                counted[0] += 1
                (peace.folder.parent / "operations").write_text(str(counted[0]))

        assert peace.run(lambda: sys.addaudithook(count)) == 0, peace.told
        seconds = time.monotonic() - began
        num_operations = int((peace.folder.parent / "operations").read_text())
        began = time.monotonic()
        assert peace.run() == 0  # resumed where it ended: what a process takes before its first step
        startup = time.monotonic() - began

        def add(fault: str, attempts: int, tries: Callable[[Trial], bool], said: str = "") -> None:
            trial = trial_called(f"trial-{len(rows)}")
            at_once = tries(trial)
            code = trial.run()
            survived = at_once and code == 0 and trial.result == peace.result and said in trial.told
            rows.append({"fault": fault, "tried": attempts, "survived": attempts if survived else 0, "said": said})
            print(f"{fault:75} {'survived' if survived else 'LOST'}", flush=True)

        longest = startup + seconds / 10
        add(
            f"SIGKILL at random moments of one training, {kills} times",
            kills,
            lambda trial: killed_at_random(trial, chance, longest, kills),
        )
        survived = 0
        for number in sorted(chance.sample(range(1, num_operations + 1), operations)):
            trial = trial_called(f"operation-{number}")
            killed = killed_at_a_file_operation(trial, number)
            survived += killed and trial.run() == 0 and trial.result == peace.result
        rows.append(
            {
                "fault": f"SIGKILL at a random one of {num_operations} file operations, most of them while saving",
                "tried": operations,
                "survived": survived,
                "said": "",
            }
        )
        print(f"{rows[-1]['fault']:75} {survived} of {operations}", flush=True)
        add("SIGTERM", 1, lambda trial: stopped_by_sigterm(trial, 7), "SIGTERM after step")
        for name in WEIGHTS[:1] if few else WEIGHTS:
            cut_off = partial(file_cut_off, name=name)
            add(f"{name} cut off while saving", 1, cut_off, "could not write")
        if not few:
            add("disk full at the first save", 1, partial(disk_full, saves_before=0), "No space left on device")
            add("disk full at the third save", 1, partial(disk_full, saves_before=2), "No space left on device")
            for name in (*WEIGHTS, "trainer_state.json", "progress.json", "checksums.json"):
                for done, spoil in (("truncated", truncated), ("with a bit flipped", flipped), ("deleted", deleted)):
                    add(f"newest checkpoint: {name} {done}", 1, partial(spoil, name=name), "is damaged")
            add("a second run on the folder", 1, second_run, "is in use by process")
    result = {
        "steps": steps,
        "seed": seed,
        "versions": {name: version(name) for name in ("torch", "transformers", "kronpress")},
        "rows": rows,
    }
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if any(row["survived"] != row["tried"] for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
