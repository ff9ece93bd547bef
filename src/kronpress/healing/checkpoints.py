"""Training checkpoints on disk: there whole or not at all, checked before they are used, and of one process at a time.

A checkpoint is the folder `checkpoint-N` of N optimiser steps. It is written under a hidden name, its files and their
SHA-256 are forced to the disk, and then it takes its name. One that goes loses its name first. So a folder of that name
was whole once, whenever the process is killed, and its checksums tell whether it still is.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kronpress.errors import RequestError, WorkError

CHECKSUMS = "checksums.json"
LOCK = ".lock"
# Inside the folder of the checkpoints: what is being written, and what is being deleted.
PARTIAL, OLD = ".partial", ".old-"
_READ_BYTES = 2**22


def checkpoint_step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def checkpoints(folder: Path) -> list[Path]:
    """Those in the folder, whole or damaged, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=checkpoint_step, reverse=True)


def newest_checkpoint(folder: Path, messages: Callable[[str], None] = lambda _: None) -> Path | None:
    """The training checkpoint with the most steps that is as it was written; None if there is none.

    Args:
        messages: told of newer ones that are damaged.
    """
    for checkpoint in checkpoints(folder):
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint
        messages(f"the training checkpoint {str(checkpoint)!r} is damaged and passed over: {damage}")
    return None


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with the checkpoint's files; None if they are what was written."""
    try:
        checksums = json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8"))["files"]
        for name, checksum in checksums.items():
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            if _sha256(checkpoint / name) != checksum:
                return f"{name} has another SHA-256 than when it was written"
    except FileNotFoundError:
        return f"{CHECKSUMS} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{CHECKSUMS} cannot be read: {type(error).__name__}"
    return None


def publish(partial: Path, checkpoint: Path) -> None:
    """Give the finished folder `partial` the name `checkpoint`, in place of any that has it."""
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    checksums = {str(path.relative_to(partial)): _sha256(path) for path in files}
    (partial / CHECKSUMS).write_text(json.dumps({"files": checksums}, indent=1), encoding="utf-8")
    for path in (*files, partial / CHECKSUMS, *(path for path in partial.rglob("*") if path.is_dir()), partial):
        _force(path)
    if checkpoint.exists():
        retire(checkpoint)
    partial.rename(checkpoint)
    _force(checkpoint.parent)


def keep_only(folder: Path, num_newest: int, others: Collection[int] = ()) -> None:
    """Delete all checkpoints but the newest ones and those of the steps `others`."""
    for checkpoint in checkpoints(folder)[num_newest:]:
        if checkpoint_step(checkpoint) not in others:
            retire(checkpoint)


def retire(folder: Path) -> None:
    """Delete a folder that nobody is to take for whole while it goes."""
    old = folder.with_name(f"{OLD}{folder.name}")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    shutil.rmtree(old, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Delete what a process that was killed left half written or half deleted in the folder."""
    for path in (*folder.glob(PARTIAL), *folder.glob(f"{OLD}*")):
        shutil.rmtree(path, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file that is there as it was before, or as it is to be, whenever the process is killed."""
    partial = path.with_name(f"{PARTIAL}-{path.name}")
    partial.write_text(text, encoding="utf-8")
    _force(partial)
    partial.replace(path)


@contextmanager
def only_one(folder: Path, lock: str = LOCK) -> Iterator[None]:
    """Inside the block no other process can be inside one of this folder and lock; the lock dies with its process.

    Raises:
        RequestError: another process is; its number is named.
        WorkError: there can be no file in the folder.
    """
    path = folder / lock
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            opened = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise WorkError(f"could not write {str(path)!r}: {error}") from error
        with opened as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise RequestError(
                    f"{str(folder)!r} is in use by process {file.read().strip() or '(just starting)'}: wait for its "
                    "end, or choose another folder"
                ) from error
            # Whoever had it may have deleted the file between its opening and its locking here.
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                continue
            file.truncate(0)
            with suppress(OSError):  # on a full disk the lock holds all the same
                os.write(file.fileno(), str(os.getpid()).encode())
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _sha256(path: Path) -> str:
    checksum = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            checksum.update(piece)
    return checksum.hexdigest()


def _force(path: Path) -> None:
    """Onto the disk: the content of a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
