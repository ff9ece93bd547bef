"""What may happen to a training, really provoked: what is expected, what happened, and whether it ended alike.

    python benchmarks/healing_faults.py run --out benchmarks/results/healing_faults.json
    python benchmarks/healing_faults.py render

The training is that of kill_healing.py. Of every fault the training is then started once more, and has to end with the
weights and the rows of one that was left in peace, bit for bit. `run` is to be root's where it can, so that it may
mount small file systems in memory: they are the full disks. Where it cannot, the system refuses to write large files
instead. `render` makes docs/results/faults.md of the result.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from kill_healing import RESULT, Trial, ended, started, train, trials

from kronpress.healing import checkpoint_step, newest_checkpoint
from kronpress.healing.checkpoints import OLD, PARTIAL, checkpoints, find_damage
from kronpress.processes import leave

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "healing_faults.json"
KILLS = ROOT / "benchmarks" / "results" / "kill_healing.json"
PAGE = ROOT / "docs" / "results" / "faults.md"
NAMES = ("model.safetensors", "optimizer.pt", "trainer_state.json", "progress.json", "checksums.json")
KILLED, CUT, REFUSED, TERMINATED = -signal.SIGKILL, -signal.SIGXFSZ, 3, 143
WORDS = {
    0: "ended",
    KILLED: "died of SIGKILL",
    CUT: "died of SIGXFSZ",
    REFUSED: "ended with an error",
    TERMINATED: "ended by SIGTERM",
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Fault:
    """What happens to a training.

    Attributes:
        provoke: lets it happen to a trial; the exit code of the process that it happened to.
        code, newest, said: what is expected: this code, the newest whole checkpoint thereafter (None if there is
            none), and words in what is told, then or when the training goes on.
    """

    name: str
    how: str
    expected: str
    provoke: Callable[[Trial], int]
    code: int
    newest: int | None
    said: str = ""


# ---- killed while saving ----


def _kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_before(trial: Trial, event: str, name: str, times: int = 1) -> int:
    """Before the operation `event` on `name` in the training's folder happens for the so many-th time."""
    seen = [0]

    def hook(found: str, arguments: tuple[Any, ...]) -> None:
        if found != event or str(trial.folder / name) != str(arguments[1 if found == "os.rename" else 0]):
            return
        seen[0] += 1
        if seen[0] == times:
            _kill_self()

    return trial.run(lambda: sys.addaudithook(hook))


def killed_within(trial: Trial, name: str) -> int:
    """While the file of the second save is written: the system kills the process as the file gets too large."""
    return trial.run(each_step=lambda step: limit_files(trial, name, signal.SIG_DFL) if step == 4 else None)


def limit_files(trial: Trial, name: str, then: signal.Handlers) -> None:
    """From now on no file gets larger than three quarters of this one; `then` is what SIGXFSZ does."""
    size = (checkpoints(trial.folder.with_name("peace"))[0] / name).stat().st_size
    signal.signal(signal.SIGXFSZ, then)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * size // 4, resource.RLIM_INFINITY))


# ---- full disks ----


def disk_full(trial: Trial, num_checkpoints: float) -> int:
    """The training's folder is a file system of its own with room for so many checkpoints, and later for all."""
    newest = checkpoints(trial.folder.with_name("peace"))[0]
    kilobytes = sum(4 * -(-path.stat().st_size // 4096) for path in newest.rglob("*") if path.is_file())
    size = f"size={round(num_checkpoints * kilobytes)}k"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", str(trial.folder)], check=True)
    code = trial.run()
    subprocess.run(["mount", "-o", "remount,size=64m", str(trial.folder)], check=True)
    return code


def file_cut_off(trial: Trial, name: str) -> int:
    """The system refuses to write more than a part of this file in the second save."""
    return trial.run(each_step=lambda step: limit_files(trial, name, signal.SIG_IGN) if step == 4 else None)


# ---- damaged checkpoints ----


def damaged(trial: Trial, name: str, spoil: Callable[[Path], object]) -> int:
    """The training is killed after its second save, and the file of that spoilt."""
    code = trial.run(each_step=lambda step: _kill_self() if step == 8 else None)
    newest = checkpoints(trial.folder)[0]
    assert find_damage(newest) is None
    spoil(newest / name)
    return code


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# ---- others ----


def terminated(trial: Trial) -> int:
    return trial.run(each_step=lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 7 else None)


def second_run(trial: Trial) -> int:
    """Another process wants the folder while one trains in it; the code is the other's, and the first goes on."""
    code = [0]

    def ask(step: int) -> None:
        if step == 4:
            code[0] = ended(started(lambda: train(trial.folder, trial.num_steps, resume=True)))
            assert code[0] == REFUSED

    assert trial.run(each_step=ask) == 0
    return REFUSED


def second_run_after_a_kill(trial: Trial) -> int:
    """The first is killed, and its lock is still there as a file."""
    code = trial.run(each_step=lambda step: _kill_self() if step == 8 else None)
    assert (trial.folder / ".lock").exists()
    return code


def faults(can_mount: bool) -> list[Fault]:
    stays = "the checkpoint before it stays, and the training goes on from it"
    saves_end = "ends with an error that names the step that is kept; with room again " + stays
    passed_over = "the damaged one is passed over, which is said, and the training goes on from the one before"
    found = [
        *(
            Fault(
                f"killed while saving: within {name}",
                "SIGXFSZ at three quarters of the file",
                stays,
                partial(killed_within, name=name),
                CUT,
                3,
            )
            for name in NAMES[:2]
        ),
        Fault(
            "killed while saving: between two files",
            "SIGKILL before trainer_state.json is opened",
            stays,
            partial(killed_before, event="open", name=f"{PARTIAL}/checkpoint-6/trainer_state.json"),
            KILLED,
            3,
        ),
        Fault(
            "killed while saving: all is written but the name",
            "SIGKILL before the rename",
            stays,
            partial(killed_before, event="os.rename", name="checkpoint-6"),
            KILLED,
            3,
        ),
        Fault(
            "killed while the oldest checkpoint is deleted",
            "SIGKILL at its deletion, at the third save",
            "the new one is whole",
            partial(killed_before, event="shutil.rmtree", name=f"{OLD}checkpoint-3", times=2),
            KILLED,
            9,
        ),
    ]
    if can_mount:
        found += [
            Fault(
                f"disk full at the {nth} save",
                f"a file system with room for {room} checkpoints",
                saves_end if newest else "ends with an error; with room again the training begins anew",
                partial(disk_full, num_checkpoints=room),
                REFUSED,
                newest,
                "could not write",
            )
            for nth, room, newest in (("first", 0.5, None), ("second", 1.5, 3), ("third", 2.5, 6))
        ]
    found += [
        Fault(
            f"no room for {name}",
            "the system refuses more than three quarters of it",
            saves_end,
            partial(file_cut_off, name=name),
            REFUSED,
            3,
            "step 3 is kept",
        )
        for name in NAMES[:2]
    ]
    found += [
        Fault(
            f"newest checkpoint: {name} {done}",
            "after a SIGKILL",
            passed_over,
            partial(damaged, name=name, spoil=spoil),
            KILLED,
            3,
            "is damaged and passed over",
        )
        for done, spoil in (("truncated", truncate), ("with a bit flipped", flip_a_bit), ("deleted", Path.unlink))
        for name in NAMES
    ]
    return [
        *found,
        Fault(
            "SIGTERM",
            "sent to itself in step 7",
            "a checkpoint is written first, and the training goes on from it",
            terminated,
            TERMINATED,
            8,
            "SIGTERM after step 8",
        ),
        Fault(
            "a second run on the folder",
            "another process asks while the first is at step 4",
            "the second is refused with the number of the first, which goes on to the end",
            second_run,
            REFUSED,
            12,
            "is in use by process",
        ),
        Fault(
            "a second run after the first was killed",
            "SIGKILL; the lock's file is still there",
            "the lock has died with its process",
            second_run_after_a_kill,
            KILLED,
            6,
        ),
    ]


# ---- two processes ----

WORKER = "a worker killed in a training of two processes"


def worker_killed(folder: Path) -> dict[str, Any]:
    """SIGKILL to the second of two processes of `torchrun` in the midst of its training."""
    peace, killed = folder / "peace", folder / "killed"
    assert two_processes(peace) == 0
    code = two_processes(killed, kill_after_step=7)
    newest = newest_checkpoint(killed)
    went_on = two_processes(killed)
    return {
        "fault": WORKER,
        "provoked_by": "SIGKILL to the second of two processes of torchrun after step 7",
        "expected": "the other ends with an error too and waits for nothing; both go on from the newest checkpoint",
        "exit_code": code,
        "newest_whole_checkpoint": None if newest is None else checkpoint_step(newest),
        "said": "",
        "as_expected": code == 1 and newest is not None and newest.name == "checkpoint-6",
        "weights_and_rows_are_equal": went_on == 0 and result_of(killed) == result_of(peace),
    }


def result_of(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / RESULT).read_text())
    return result


def two_processes(folder: Path, kill_after_step: int = 0) -> int:
    """The exit code of `torchrun` with two processes that train in the folder; it ends within minutes."""
    folder.mkdir(parents=True, exist_ok=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, str(Path(__file__)), "worker", str(folder), f"--kill-after-step={kill_after_step}"]
    return subprocess.run(command, capture_output=True, timeout=400).returncode


@app.command(hidden=True)
def worker(folder: Path, kill_after_step: int = 0) -> None:
    """What each of the two processes does."""
    number = int(os.environ["RANK"])
    own = folder if number == 0 else folder / "second"

    def look(step: int) -> None:
        if number == 0 and step == kill_after_step:
            os.kill(int((folder / "second.pid").read_text()), signal.SIGKILL)

    if number == 1:
        (folder / "second.pid").write_text(str(os.getpid()))
    train(folder, 12, resume=True, each_step=look, result=own)
    leave()


def tried(fault: Fault, trial: Trial, peace: Trial) -> dict[str, Any]:
    """Provoke it, then go on without it."""
    code = fault.provoke(trial)
    newest = trial.newest_step
    went_on = trial.run()
    is_equal = went_on == 0 and trial.result == peace.result
    told = [line for line in trial.told.splitlines() if fault.said and fault.said in line]
    folder = str(trial.folder)
    return {
        "fault": fault.name,
        "provoked_by": fault.how,
        "expected": fault.expected,
        "exit_code": code,
        "newest_whole_checkpoint": newest,
        "said": told[0].replace(folder, "out") if told else "",
        "as_expected": (code, newest) == (fault.code, fault.newest) and bool(told) == bool(fault.said),
        "weights_and_rows_are_equal": is_equal,
    }


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="where the result is written")] = RESULTS,
    only: Annotated[str, typer.Option(help="only faults whose name has this in it")] = "",
    workers: Annotated[bool, typer.Option(help="also the training of two processes")] = True,
) -> None:
    """Try all faults."""
    rows = []
    with trials(12) as trial_called:
        peace = trial_called("peace")
        assert peace.run() == 0, peace.told
        for number, fault in enumerate(faults(can_mount())):
            if only not in fault.name:
                continue
            trial = trial_called(f"trial-{number}")
            try:
                rows.append(tried(fault, trial, peace))
            finally:
                if trial.folder.is_mount():
                    subprocess.run(["umount", str(trial.folder)], check=True)
            row = rows[-1]
            good = row["as_expected"] and row["weights_and_rows_are_equal"]
            print(f"{fault.name:60} {'survived' if good else f'LOST: {row}'}", flush=True)
        if workers and only in WORKER:
            rows.append(worker_killed(trial_called("workers").folder))
    result = {
        "steps": 12,
        "versions": {name: version(name) for name in ("torch", "transformers", "kronpress")},
        "rows": rows,
    }
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if not all(row["as_expected"] and row["weights_and_rows_are_equal"] for row in rows):
        raise typer.Exit(1)


def can_mount() -> bool:
    """Whether this process may mount a file system in memory."""
    with tempfile.TemporaryDirectory() as folder:
        mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder]
        if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
            return False
        subprocess.run(["umount", folder], check=True)
        return True


@app.command()
def render(out: Annotated[Path, typer.Option(help="page to write")] = PAGE) -> None:
    """Write the page."""
    out.write_text(page(), encoding="utf-8")


def page() -> str:
    """The page, of the two results."""
    tried, killed = (json.loads(path.read_text(encoding="utf-8")) for path in (RESULTS, KILLS))
    one, each = killed["one_training"], killed["one_kill_each"]
    reached = ", ".join("none" if step is None else str(step) for step in one["newest_checkpoint_after_each"])
    equal, survived = _yes(one["final_weights_and_rows_are_equal"]), each["final_weights_and_rows_are_equal"]
    lines = [
        "# Faults",
        "",
        "Made by `python benchmarks/healing_faults.py render` of what `python benchmarks/healing_faults.py run` and",
        "`python benchmarks/kill_healing.py` have measured. What is promised is in [healing.md](../healing.md).",
        "",
        "## SIGKILL at random",
        "",
        f"One training of {killed['steps']} steps, a checkpoint every third, was killed {one['kills']} times at random",
        f"moments. Newest checkpoint after each: {reached}.",
        f"Its final weights and rows are those of the same training left in peace, bit for bit: **{equal}**.",
        "",
        f"Of {each['kills']} other trainings each was killed once, before one of the {each['file_operations']}",
        f"operations on its files, most of them part of a save; equal in the end: **{survived} of {each['kills']}**.",
        "",
        "## One fault each",
        "",
        f"A training of {tried['steps']} steps, a checkpoint every third. Equal: after it went on, its final weights",
        "and rows are those of the training left in peace, bit for bit.",
        "",
        "| fault | provoked by | expected | what happened | equal |",
        "|---|---|---|---|---|",
    ]
    for row in tried["rows"]:
        newest = row["newest_whole_checkpoint"]
        happened = WORDS.get(row["exit_code"], f"ended with {row['exit_code']}")
        happened += "; no checkpoint" if newest is None else f"; checkpoint of step {newest} whole"
        happened += f"; said: {row['said']}" if row["said"] else ""
        happened += "" if row["as_expected"] else " **(not as expected)**"
        columns = (row["fault"], row["provoked_by"], row["expected"], happened)
        lines.append(f"| {' | '.join(columns)} | {_yes(row['weights_and_rows_are_equal'])} |")
    return "\n".join([*lines, ""])


def _yes(value: bool) -> str:
    return "yes" if value else "no"


if __name__ == "__main__":
    app()
