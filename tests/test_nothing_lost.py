"""Whatever happens to a training, nothing that was saved is lost, and it goes on to the same weights bit for bit."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.healing import (
    TOKENS,
    TWO_PHASES,
    Interrupted,
    assert_same_weights,
    next_token_loss,
    schedule,
    weights,
    with_sums_of_two_terms,
)
from torch import nn

import kronpress as kp
from kronpress.errors import Terminated
from kronpress.healing import HealingRow, newest_checkpoint, trainer
from kronpress.healing.checkpoints import (
    CHECKSUMS,
    OLD,
    PARTIAL,
    checkpoint_step,
    checkpoints,
    find_damage,
    keep_only,
    only_one,
    publish,
    write_whole,
)
from kronpress.healing.progress import METRICS, why_not_to_step

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "progress.json")


def lasting(rows: list[HealingRow]) -> list[dict[str, Any]]:
    """The rows without what depends on how fast the machine is."""
    return [row.model_dump(exclude={"tokens_per_second", "seconds_left"}) for row in rows]


def interrupt_after(step: int) -> Callable[[HealingRow], None]:
    def progress(row: HealingRow) -> None:
        if row.step == step:
            raise Interrupted

    return progress


def steps_in(folder: Path) -> list[int]:
    return [checkpoint_step(each) for each in checkpoints(folder)]


@pytest.fixture
def student(tiny_compressed) -> Callable[[], nn.Module]:
    return lambda: tiny_compressed("gpt2", "low_rank")


# ---- resuming ----


@pytest.mark.parametrize(
    ("start", "changes"),
    [
        ("van_loan", {}),
        ("van_loan", {"sequences_per_pass": 1}),
        ("adaptive", {}),
        ("van_loan", {"phases": TWO_PHASES}),
        ("adaptive", {"phases": TWO_PHASES, "attention_weight": 1.0, "hidden_weight": 1.0}),
    ],
    ids=["plain", "passes", "adaptive", "phases", "inside"],
)
def test_an_interrupted_training_goes_on_to_the_same_weights(tiny_model, tmp_path, start, changes):
    healing = schedule(max_steps=8, save_steps=2, distillation_weight=1.0, **changes)
    teacher = tiny_model("gpt2")
    whole = with_sums_of_two_terms(tiny_model("gpt2"), start)
    expected = kp.heal_(whole, teacher, TOKENS, healing, seed=3, work_dir=tmp_path / "whole")

    for step in (4, 7):
        with pytest.raises(Interrupted):
            kp.heal_(
                with_sums_of_two_terms(tiny_model("gpt2"), start),
                teacher,
                TOKENS,
                healing,
                seed=3,
                work_dir=tmp_path / "parts",
                resume=True,
                progress=interrupt_after(step),
            )
    resumed = with_sums_of_two_terms(tiny_model("gpt2"), start)
    log = kp.heal_(resumed, teacher, TOKENS, healing, seed=3, work_dir=tmp_path / "parts", resume=True)
    assert (expected.resumed_at_step, log.resumed_at_step) == (None, 6)
    assert lasting(log.rows) == lasting(expected.rows)
    assert_same_weights(resumed, weights(whole))


def test_resuming_what_never_began_begins(tiny_compressed, tmp_path):
    plain, resumed = tiny_compressed("gpt2", "low_rank"), tiny_compressed("gpt2", "low_rank")
    kp.heal_(plain, None, TOKENS, schedule())
    for folder in (tmp_path / "missing", tmp_path):
        log = kp.heal_(resumed, None, TOKENS, schedule(), work_dir=folder, resume=True)
        assert log.resumed_at_step is None
        assert_same_weights(resumed, weights(plain))
        resumed = tiny_compressed("gpt2", "low_rank")


def test_resuming_what_had_ended_gives_its_result(tiny_compressed, tmp_path):
    healing = schedule(save_steps=2)
    whole, resumed = tiny_compressed("gpt2", "low_rank"), tiny_compressed("gpt2", "low_rank")
    kp.heal_(whole, None, TOKENS, healing, work_dir=tmp_path)
    assert kp.heal_(resumed, None, TOKENS, healing, work_dir=tmp_path, resume=True).resumed_at_step == 6
    assert_same_weights(resumed, weights(whole))


def test_weights_that_a_step_has_spoilt_push_no_good_checkpoint_out(tiny_compressed, tmp_path):
    model = tiny_compressed("gpt2", "low_rank")

    def spoil(row: HealingRow) -> None:
        if row.step == 3:
            with torch.no_grad():
                model.transformer.wpe.weight[0, 0] = math.inf

    with pytest.raises(kp.WorkError, match=r"wpe.weight' holds NaN or infinity after step 3.*of step 2 is kept"):
        kp.heal_(model, None, TOKENS, schedule(save_steps=1), work_dir=tmp_path, progress=spoil)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_without_resume_training_starts_anew(tiny_compressed, tmp_path):
    first, second = tiny_compressed("gpt2", "low_rank"), tiny_compressed("gpt2", "low_rank")
    for model in (first, second):
        log = kp.heal_(model, None, TOKENS, schedule(save_steps=2), work_dir=tmp_path)
        assert log.resumed_at_step is None
    assert_same_weights(second, weights(first))


def test_a_row_between_two_checkpoints_is_the_mean_over_all_its_steps(student, tmp_path):
    healing = schedule(max_steps=150, sequences_per_step=1, save_steps=40)  # a row every third step
    whole = kp.heal_(student(), None, TOKENS, healing, work_dir=tmp_path / "whole")
    assert [row.step for row in whole.rows] == list(range(3, 151, 3))
    folder = tmp_path / "parts"
    with pytest.raises(Interrupted):
        kp.heal_(student(), None, TOKENS, healing, work_dir=folder, progress=interrupt_after(48))
    log = kp.heal_(student(), None, TOKENS, healing, work_dir=folder, resume=True)
    assert log.resumed_at_step == 40
    assert lasting(log.rows) == lasting(whole.rows)
    assert log.seconds > 0


def test_the_rows_are_in_a_file_as_they_come_and_none_is_in_it_twice(student, tmp_path):
    def rows_in_file() -> list[HealingRow]:
        return [HealingRow.model_validate_json(line) for line in (tmp_path / METRICS).read_text().splitlines()]

    told: list[HealingRow] = []

    def look(row: HealingRow) -> None:
        told.append(row)
        assert rows_in_file() == told
        if row.step == 5:
            raise Interrupted

    healing = schedule(save_steps=3, distillation_weight=0.5, validation_data="x")
    given = (student(), student(), TOKENS, healing)
    with pytest.raises(Interrupted):
        kp.heal_(*given, work_dir=tmp_path, progress=look, validation_tokens=TOKENS[:32])
    assert len(rows_in_file()) == 5
    log = kp.heal_(*given, work_dir=tmp_path, resume=True, validation_tokens=TOKENS[:32])
    assert log.resumed_at_step == 3
    assert rows_in_file() == log.rows
    assert [row.step for row in log.rows] == [1, 2, 3, 4, 5, 6]
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert ["validation_nats" in line for line in lines] == [False, False, True] * 2
    assert all(line["distillation_nats"] >= 0 and "hidden_mse" not in line for line in lines)


# ---- checkpoints on disk ----


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def incidents(told: list[str]) -> list[str]:
    """What healing told, beyond the memory that it tells of as it begins."""
    assert told[0].startswith("healing takes about ")
    return told[1:]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("spoil", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", [*FILES, CHECKSUMS])
def test_a_damaged_checkpoint_is_passed_over_and_said_so(student, tmp_path, name, spoil):
    healing, whole, resumed = schedule(save_steps=2), student(), student()
    expected = kp.heal_(whole, None, TOKENS, healing, work_dir=tmp_path)
    assert steps_in(tmp_path) == [6, 4]
    spoil(tmp_path / "checkpoint-6" / name)
    told: list[str] = []
    log = kp.heal_(resumed, None, TOKENS, healing, work_dir=tmp_path, resume=True, messages=told.append)
    (damage,) = incidents(told)
    assert damage.startswith(f"the training checkpoint {str(tmp_path / 'checkpoint-6')!r} is damaged and passed over: ")
    assert name in damage or name == CHECKSUMS  # a wrong checksum accuses another file
    assert log.resumed_at_step == 4
    assert lasting(log.rows) == lasting(expected.rows)
    assert_same_weights(resumed, weights(whole))
    assert steps_in(tmp_path) == [6, 4]
    assert find_damage(tmp_path / "checkpoint-6") is None


def test_where_all_checkpoints_are_damaged_the_training_begins_anew(student, tmp_path):
    healing, whole, resumed = schedule(save_steps=3), student(), student()
    kp.heal_(whole, None, TOKENS, healing, work_dir=tmp_path)
    for checkpoint in checkpoints(tmp_path):
        truncate(checkpoint / "model.safetensors")
    told: list[str] = []
    log = kp.heal_(resumed, None, TOKENS, healing, work_dir=tmp_path, resume=True, messages=told.append)
    assert len(incidents(told)) == 2
    assert log.resumed_at_step is None
    assert_same_weights(resumed, weights(whole))


def a_checkpoint(folder: Path, content: bytes = b"weights") -> Path:
    partial = folder / PARTIAL / "some"
    (partial / "deeper").mkdir(parents=True)
    (partial / "a").write_bytes(content)
    (partial / "deeper" / "b").write_bytes(content[::-1])
    return partial


@given(st.integers(0, 1), st.integers(0, 6), st.integers(0, 7))
@settings(max_examples=25, deadline=None)
def test_every_flipped_bit_is_found(tmp_path_factory, which, place, bit):
    folder = tmp_path_factory.mktemp("bits")
    publish(a_checkpoint(folder), folder / "checkpoint-1")
    assert find_damage(folder / "checkpoint-1") is None
    name = ("a", "deeper/b")[which]
    content = bytearray((folder / "checkpoint-1" / name).read_bytes())
    content[place] ^= 1 << bit
    (folder / "checkpoint-1" / name).write_bytes(content)
    assert find_damage(folder / "checkpoint-1") == f"{name} has another SHA-256 than when it was written"
    assert newest_checkpoint(folder) is None


def test_a_checkpoint_takes_its_name_in_one_step_and_its_predecessors_place(tmp_path):
    for content in (b"first", b"second"):
        publish(a_checkpoint(tmp_path, content), tmp_path / "checkpoint-7")
        assert find_damage(tmp_path / "checkpoint-7") is None
        assert (tmp_path / "checkpoint-7" / "a").read_bytes() == content
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-7", PARTIAL}


@pytest.mark.parametrize("operation", ["fsync", "rename"])
def test_what_fails_before_the_name_is_taken_leaves_the_one_before(tmp_path, monkeypatch, operation):
    publish(a_checkpoint(tmp_path), tmp_path / "checkpoint-1")

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, operation, fail)
    with pytest.raises(OSError, match="broken"):
        publish(a_checkpoint(tmp_path), tmp_path / "checkpoint-2")
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert not (tmp_path / "checkpoint-2").exists()


@given(st.lists(st.integers(1, 99), unique=True), st.integers(1, 5), st.sets(st.integers(1, 99)))
@settings(max_examples=30, deadline=None)
def test_the_newest_and_the_best_are_kept(tmp_path_factory, steps, num_newest, others):
    folder = tmp_path_factory.mktemp("kept")
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir()
    (folder / "checkpoint-none").mkdir()
    keep_only(folder, num_newest, others)
    expected = {*sorted(steps)[-num_newest:], *others.intersection(steps)}
    assert {path.name for path in folder.iterdir()} == {"checkpoint-none", *(f"checkpoint-{step}" for step in expected)}


def test_what_a_killed_process_left_behind_goes(student, tmp_path):
    for name in (PARTIAL, f"{OLD}checkpoint-3"):
        (tmp_path / name / "checkpoint-9").mkdir(parents=True)
    kp.heal_(student(), None, TOKENS, schedule(save_steps=3), work_dir=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-3", "checkpoint-6", "metrics.jsonl"}


def test_a_text_file_is_as_it_was_or_as_it_is_to_be(tmp_path, monkeypatch):
    path = tmp_path / "note"
    write_whole(path, "before")
    monkeypatch.setattr(os, "fsync", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_whole(path, "after")
    assert path.read_text() == "before"


def test_how_many_are_kept_is_as_asked(student, tmp_path):
    kp.heal_(student(), None, TOKENS, schedule(save_steps=1, keep_checkpoints=3), work_dir=tmp_path)
    assert steps_in(tmp_path) == [6, 5, 4]
    shutil.rmtree(tmp_path)
    kp.heal_(student(), None, TOKENS, schedule(), work_dir=tmp_path)
    assert steps_in(tmp_path) == []


# ---- the best on the validation text ----

# Other tokens: the more is learnt of TOKENS, the less likely are they.
OTHERWISE = TOKENS[:160] + 150


def test_the_validation_loss_is_that_of_the_first_tokens(student):
    model = student()
    told = kp.heal_(
        model,
        None,
        TOKENS,
        schedule(max_steps=5, validation_data="x", validation_tokens=70, sequences_per_pass=2),
        validation_tokens=TOKENS[100:],
    ).rows
    assert [row.validation_nats is not None for row in told] == [False] * 4 + [True]
    expected = next_token_loss(model, TOKENS[100:164].view(4, 16))
    assert told[-1].validation_nats == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("end_with", ["last", "best"])
def test_the_best_is_kept_though_it_is_old_and_given_if_asked_for(student, tmp_path, end_with):
    # A rate that is far too high: it gets worse and worse.
    healing = schedule(save_steps=1, learning_rate=3e-2, keep_checkpoints=1, end_with=end_with, validation_data="x")
    model = student()
    log = kp.heal_(model, None, TOKENS, healing, work_dir=tmp_path, validation_tokens=OTHERWISE)
    measured = [row.validation_nats for row in log.rows]
    best = measured.index(min(measured)) + 1
    assert best < 6
    assert (log.best_step, log.best_validation_nats) == (best, min(measured))
    assert steps_in(tmp_path) == [6, best]
    expected = min(measured) if end_with == "best" else measured[-1]
    assert next_token_loss(model, OTHERWISE.view(10, 16)) == pytest.approx(expected, rel=1e-5)


def test_the_best_that_is_damaged_is_not_used(student, tmp_path):
    healing = schedule(save_steps=1, learning_rate=3e-2, end_with="best", validation_data="x")
    kp.heal_(student(), None, TOKENS, healing, work_dir=tmp_path, validation_tokens=OTHERWISE)
    truncate(checkpoints(tmp_path)[-1] / "model.safetensors")
    model, told = student(), []
    log = kp.heal_(
        model,
        None,
        TOKENS,
        healing,
        work_dir=tmp_path,
        validation_tokens=OTHERWISE,
        resume=True,
        messages=told.append,
    )
    assert "is damaged, and the last weights are used" in incidents(told)[0]
    last = log.rows[-1].validation_nats
    assert next_token_loss(model, OTHERWISE.view(10, 16)) == pytest.approx(last, rel=1e-5)


def test_a_best_that_cannot_be_known_is_refused(student):
    for changes in ({"save_steps": 2}, {"validation_data": "x"}):
        with pytest.raises(ValueError, match="end_with: best needs validation_data"):
            schedule(end_with="best", **changes)
    healing = schedule(end_with="best", validation_data="x", save_steps=2)
    with pytest.raises(kp.RequestError, match="no validation tokens"):
        kp.heal_(student(), None, TOKENS, healing)


# ---- killed, stopped, starved and doubled ----


def test_killed_again_and_again_it_ends_alike(tmp_path):
    """A few of the kills that the script tries."""
    path = tmp_path / "result.json"
    ended = subprocess.run(
        [
            sys.executable,
            str(BENCHMARKS / "kill_healing.py"),
            "--kills=3",
            "--operations=2",
            "--steps=24",
            f"--out={path}",
        ],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    result = json.loads(path.read_text())
    assert result["one_training"]["final_weights_and_rows_are_equal"] is True
    assert len(result["one_training"]["newest_checkpoint_after_each"]) == 3
    assert result["one_kill_each"]["final_weights_and_rows_are_equal"] == 2


@pytest.mark.parametrize("only", ["all is written but the name", "disk full at the second", "optimizer.pt deleted"])
def test_what_else_may_happen_is_survived_and_said(tmp_path, only):
    path = tmp_path / "result.json"
    command = [sys.executable, str(BENCHMARKS / "healing_faults.py"), "run", f"--only={only}", f"--out={path}"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = json.loads(path.read_text())["rows"]
    assert all(row["as_expected"] and row["weights_and_rows_are_equal"] for row in rows)


def test_the_page_of_faults_is_that_of_the_committed_results(tmp_path):
    out = tmp_path / "faults.md"
    subprocess.run([sys.executable, str(BENCHMARKS / "healing_faults.py"), "render", f"--out={out}"], check=True)
    page = BENCHMARKS.parent / "docs" / "results" / "faults.md"
    assert page.read_text(encoding="utf-8") == out.read_text(encoding="utf-8")
    assert "not as expected" not in page.read_text(encoding="utf-8")
    assert "| no |" not in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("step", [1, 4, 6])
def test_sigterm_saves_first_and_then_ends(student, tmp_path, step):
    healing, whole, stopped, resumed = schedule(save_steps=4), student(), student(), student()
    expected = kp.heal_(whole, None, TOKENS, healing, work_dir=tmp_path / "whole")

    def terminate(row: HealingRow) -> None:
        if row.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    folder = tmp_path / "stopped"
    with pytest.raises(Terminated, match=r"SIGTERM after step \d of 6: its training checkpoint is kept in .*--resume"):
        kp.heal_(stopped, None, TOKENS, healing, work_dir=folder, progress=terminate)
    assert signal.getsignal(signal.SIGTERM) == before
    saved = steps_in(folder)[0]
    assert step <= saved <= step + 1
    log = kp.heal_(resumed, None, TOKENS, healing, work_dir=folder, resume=True)
    assert log.resumed_at_step == saved
    assert lasting(log.rows) == lasting(expected.rows)
    assert_same_weights(resumed, weights(whole))


def test_sigterm_is_left_alone_where_nothing_can_be_saved(student, tmp_path):
    seen = []
    before = signal.getsignal(signal.SIGTERM)

    def look(_: HealingRow) -> None:
        seen.append(signal.getsignal(signal.SIGTERM))

    kp.heal_(student(), None, TOKENS, schedule(max_steps=1), progress=look)
    thread = threading.Thread(
        target=lambda: kp.heal_(student(), None, TOKENS, schedule(max_steps=1), work_dir=tmp_path, progress=look)
    )
    thread.start()
    thread.join()
    assert seen == [before, before]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("file write failed")])
def test_a_full_disk_stops_the_training_and_says_what_is_kept(student, tmp_path, monkeypatch, error):
    healing, whole, resumed = schedule(save_steps=2), student(), student()
    kp.heal_(whole, None, TOKENS, healing, work_dir=tmp_path / "whole")
    save, calls = trainer.Trainer._save_optimizer_and_scheduler, []

    def fill(self: Any, folder: str) -> None:
        calls.append(folder)
        if len(calls) == 2:
            raise error
        save(self, folder)

    folder = tmp_path / "full"
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_save_optimizer_and_scheduler", fill)
        wanted = r"could not write the training checkpoint-4 in .*(No space left|write failed).*step 2 is kept"
        with pytest.raises(kp.WorkError, match=wanted):
            kp.heal_(student(), None, TOKENS, healing, work_dir=folder)
    assert {path.name for path in folder.iterdir()} == {"checkpoint-2", "metrics.jsonl"}
    log = kp.heal_(resumed, None, TOKENS, healing, work_dir=folder, resume=True)
    assert log.resumed_at_step == 2
    assert_same_weights(resumed, weights(whole))


@pytest.mark.parametrize("nth", [1, 4])
def test_rows_that_cannot_be_written_are_work_that_failed(student, tmp_path, monkeypatch, nth):
    opened, calls = Path.open, []

    def fill(self: Path, mode: str = "r", **more: Any) -> Any:
        if METRICS in self.name and mode in "wa":
            calls.append(self)
            if len(calls) == nth:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(self, mode, **more)

    monkeypatch.setattr(Path, "open", fill)
    monkeypatch.setattr(Path, "write_text", lambda self, text, **_: fill(self, "w").write(text))
    with pytest.raises(kp.WorkError, match=r"could not write '.*metrics.jsonl': .*No space left on device"):
        kp.heal_(student(), None, TOKENS, schedule(), work_dir=tmp_path)


def test_a_folder_that_cannot_be_is_work_that_failed(student, tmp_path):
    (tmp_path / "a file").write_text("")
    with pytest.raises(kp.WorkError, match=r"could not write '.*a file.\.lock'"):
        kp.heal_(student(), None, TOKENS, schedule(), work_dir=tmp_path / "a file")


def test_a_lock_holds_on_a_full_disk(tmp_path, monkeypatch):
    def write(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with (
            only_one(tmp_path),
            pytest.raises(kp.RequestError, match=r"in use by process \(just starting\)"),
            only_one(tmp_path),
        ):
            pass
    assert not list(tmp_path.iterdir())


def test_a_second_training_in_the_folder_is_refused(student, tmp_path):
    refused = []

    def again(row: HealingRow) -> None:
        if row.step == 2:
            with pytest.raises(kp.RequestError, match=rf"is in use by process {os.getpid()}: wait"):
                kp.heal_(student(), None, TOKENS, schedule(), work_dir=tmp_path, resume=True)
            refused.append(row.step)

    log = kp.heal_(student(), None, TOKENS, schedule(save_steps=1), work_dir=tmp_path, progress=again)
    assert refused == [2]
    assert log.rows[-1].step == 6
    kp.heal_(student(), None, TOKENS, schedule(), work_dir=tmp_path)  # the first is over


def test_a_lock_dies_with_its_process(tmp_path):
    ready, say = os.pipe()
    child = os.fork()
    if not child:
        with only_one(tmp_path):
            os.write(say, b"in")
            time.sleep(60)
        os._exit(1)
    assert os.read(ready, 2) == b"in"
    with pytest.raises(kp.RequestError, match=f"in use by process {child}: "), only_one(tmp_path):
        pass
    with only_one(tmp_path, ".another"):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / ".lock").read_text() == str(child)
    with only_one(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
    assert not list(tmp_path.iterdir())


# ---- steps that are not taken ----


def spoil_losses(monkeypatch: pytest.MonkeyPatch, factors: dict[int, float]) -> None:
    """Multiply the loss of these steps, from 0."""
    loss = trainer.HealingTrainer._loss

    def spoilt(self: Any, *given: Any) -> Any:
        value, means = loss(self, *given)
        return value * factors.get(self.state.global_step, 1.0), means

    monkeypatch.setattr(trainer.HealingTrainer, "_loss", spoilt)


@pytest.mark.parametrize("factor", [math.nan, math.inf, 100.0])
def test_a_bad_step_is_skipped_and_counted(student, monkeypatch, factor):
    healing = schedule(max_steps=24, final_learning_rate=1.0)
    spoil_losses(monkeypatch, {20: factor})
    told: list[str] = []
    log = kp.heal_(student(), None, TOKENS, healing, messages=told.append)
    assert len(incidents(told)) == 1
    assert incidents(told)[0].startswith("step 21 is skipped: the loss is ")
    assert log.skipped_steps == 1
    assert [row.step for row in log.rows] == [*range(1, 21), 22, 23, 24]
    assert [row.skipped_steps for row in log.rows] == [0] * 20 + [1] * 3
    assert all(math.isfinite(row.loss) for row in log.rows)


def test_a_skipped_step_changes_neither_weights_nor_optimiser(student, tmp_path, monkeypatch):
    healing = schedule(max_steps=4, save_steps=1, keep_checkpoints=9)
    spoil_losses(monkeypatch, {2: math.nan})
    kp.heal_(student(), None, TOKENS, healing, work_dir=tmp_path)
    states = [
        torch.load(tmp_path / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)["state"] for step in (2, 3, 4)
    ]
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)
    assert {float(each["step"]) for each in states[2].values()} == {3.0}
    bytes_of = [(tmp_path / f"checkpoint-{step}" / "model.safetensors").read_bytes() for step in (2, 3, 4)]
    assert bytes_of[0] == bytes_of[1] != bytes_of[2]


def test_a_gradient_that_is_not_finite_is_a_bad_step(student, monkeypatch):
    backward, calls = trainer.Trainer._clip_grad_norm, []

    def spoilt(self: Any, model: nn.Module) -> Any:
        calls.append(1)
        if len(calls) == 3:
            next(model.parameters()).grad[0, 0] = math.inf
        return backward(self, model)

    monkeypatch.setattr(trainer.Trainer, "_clip_grad_norm", spoilt)
    model, told = student(), []
    log = kp.heal_(model, None, TOKENS, schedule(), messages=told.append)
    assert incidents(told) == ["step 3 is skipped: the gradient's norm is inf"]
    assert log.skipped_steps == 1
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_too_many_bad_steps_in_a_row_end_the_training(student, tmp_path, monkeypatch):
    healing = schedule(max_steps=30, save_steps=2, max_skipped_steps=3)
    spoil_losses(monkeypatch, dict.fromkeys([5, 6, *range(20, 30)], math.nan))  # two in a row are not too many
    told: list[str] = []
    with pytest.raises(
        kp.WorkError,
        match="3 steps in a row could not be taken, at the last, step 23, the loss is nan: try a lower rate; the "
        "training checkpoint of step 22 is kept",
    ):
        kp.heal_(student(), None, TOKENS, healing, work_dir=tmp_path, messages=told.append)
    assert len(incidents(told)) == 5
    # A training of few steps does not end as if nothing were wrong.
    spoil_losses(monkeypatch, dict.fromkeys(range(30), math.nan))
    with pytest.raises(kp.WorkError, match="2 steps in a row could not be taken"):
        kp.heal_(student(), None, TOKENS, schedule(max_steps=2))


def test_counts_of_bad_steps_are_resumed_too(student, tmp_path, monkeypatch):
    healing = schedule(max_steps=8, save_steps=1, max_skipped_steps=4)
    spoil_losses(monkeypatch, dict.fromkeys([3, 4, 5, 6], math.nan))

    def interrupt(text: str) -> None:
        if "step 6" in text:
            raise Interrupted

    with pytest.raises(Interrupted):
        kp.heal_(student(), None, TOKENS, healing, work_dir=tmp_path, messages=interrupt)
    with pytest.raises(kp.WorkError, match="4 steps in a row could not be taken, at the last, step 7"):
        kp.heal_(student(), None, TOKENS, healing, work_dir=tmp_path, resume=True)


@given(
    losses=st.lists(st.floats(1e-6, 10), min_size=16, max_size=64),
    factor=st.floats(1.1, 10),
    times=st.floats(0.01, 100),
)
@settings(max_examples=60, deadline=None)
def test_a_spike_is_measured_by_the_median(losses, factor, times):
    usual = sorted(losses)[len(losses) // 2] if len(losses) % 2 else sum(sorted(losses)[len(losses) // 2 - 1 :][:2]) / 2
    loss = times * usual
    is_spike = loss > factor * max(usual, 0.01)
    assert bool(why_not_to_step(loss, 1.0, losses, factor)) is is_spike
    assert not why_not_to_step(loss, 1.0, losses, None)
    assert not why_not_to_step(1e9, 1.0, losses[:15], factor)


# ---- changes between the runs ----


def test_a_changed_rate_is_told_and_taken_if_accepted(student, tmp_path):
    before, now = (
        schedule(max_steps=8, save_steps=3),
        schedule(max_steps=8, save_steps=3, learning_rate=1e-3, weight_decay=0.5),
    )
    folder = tmp_path / "parts"
    with pytest.raises(Interrupted):
        kp.heal_(student(), None, TOKENS, before, work_dir=folder, progress=interrupt_after(5))
    wanted = (
        r"healing\.learning_rate was 0\.003 and is 0\.001; healing\.weight_decay was 0\.0 and is 0\.5; "
        "--accept-changes goes on"
    )
    with pytest.raises(kp.RequestError, match=wanted):
        kp.heal_(student(), None, TOKENS, now, work_dir=folder, resume=True)
    model = student()
    log = kp.heal_(model, None, TOKENS, now, work_dir=folder, resume=True, accept_changes=True)
    rates = [row.learning_rate for row in log.rows]
    assert rates == pytest.approx([*kp.healing.learning_rates(before)[:3], *kp.healing.learning_rates(now)[3:]])
    plain = student()
    kp.heal_(plain, None, TOKENS, before)
    assert sum(each.norm() for each in model.parameters()) < sum(each.norm() for each in plain.parameters())


@pytest.mark.parametrize(
    ("changes", "seed", "tokens", "wanted"),
    [
        ({"sequences_per_step": 2}, 0, TOKENS, r"of another kind: healing\.sequences_per_step was 4 and is 2"),
        ({"max_steps": 9}, 0, TOKENS, r"of another kind: healing\.max_steps was 6 and is 9"),
        ({}, 1, TOKENS, "of another kind: seed was 0 and is 1"),
        ({}, 0, TOKENS + 1, "of another kind: training text was"),
    ],
)
def test_another_training_is_not_resumed(student, tmp_path, changes, seed, tokens, wanted):
    with pytest.raises(Interrupted):
        kp.heal_(student(), None, TOKENS, schedule(save_steps=2), work_dir=tmp_path, progress=interrupt_after(5))
    with pytest.raises(kp.RequestError, match=wanted):
        kp.heal_(
            student(), None, tokens, schedule(save_steps=2, **changes), seed=seed, work_dir=tmp_path, resume=True,
            accept_changes=True,
        )  # fmt: skip
    assert steps_in(tmp_path) == [4, 2]


def test_what_does_not_change_the_training_may_change(student, tmp_path):
    with pytest.raises(Interrupted):
        kp.heal_(student(), None, TOKENS, schedule(save_steps=2), work_dir=tmp_path, progress=interrupt_after(5))
    free = schedule(save_steps=1, keep_checkpoints=5, max_skipped_steps=2)
    assert kp.heal_(student(), None, TOKENS, free, work_dir=tmp_path, resume=True).resumed_at_step == 4
    assert steps_in(tmp_path) == [6, 5, 4, 2]
