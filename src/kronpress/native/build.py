"""kernels.c compiled by the machine's own compiler, kept in the user's cache, and loaded.

A library in the cache is named after all that decides what is in it (the source, the compiler, the flags) and after
its own content, so that a damaged one is seen and built again. It comes there under its name in one step: two processes
that build at once both find a whole one. Where the cache cannot be written, or others could write there too, the
library is built in a temporary folder, for this process alone.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from kronpress.errors import WorkError

SOURCE = Path(__file__).with_name("kernels.c")
COMMON_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-ffp-contract=fast")
# From the widest to what every machine has; which a machine has, torch says.
FLAGS = {
    "avx512": ("-DLANES=16", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
    "avx2": ("-DLANES=8", "-mavx2", "-mfma"),
    "portable": ("-DLANES=4",),
}
COMPILERS = ("cc", "gcc", "clang")
LONGEST_BUILD_SECONDS = 120


def instruction_sets() -> list[str]:
    """Those of FLAGS that this machine has, the widest first.

    torch's own choice is followed, and so is the variable that limits it, ATEN_CPU_CAPABILITY.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    if capability.startswith("AVX512"):
        return ["avx512", "avx2", "portable"]
    return ["avx2", "portable"] if capability == "AVX2" else ["portable"]


def load(instruction_set: str) -> ctypes.CDLL:
    """The library for one of `instruction_sets()`, built if it is not in the cache.

    Raises:
        WorkError: it cannot be built here, in one sentence that says why.
    """
    if sys.platform != "linux" or sys.byteorder != "little":
        raise WorkError(f"native routines are built on little-endian Linux only, not on {sys.platform}")
    command = [*compiler(), *COMMON_FLAGS, *FLAGS[instruction_set]]
    key = "-".join((instruction_set, digest(SOURCE.read_bytes(), identity(command).encode())))
    folder = cache_folder()
    for kept in sorted(folder.glob(f"{key}-*.so")) if is_private(folder) else []:
        with suppress(OSError):
            if kept.stem == f"{key}-{digest(kept.read_bytes())}":
                return ctypes.CDLL(str(kept))
    with built(command) as library:
        content = library.read_bytes()
        kept = folder / f"{key}-{digest(content)}.so"
        with suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if is_private(folder):
                put(kept, content)
                return ctypes.CDLL(str(kept))
        try:
            return ctypes.CDLL(str(library))
        except OSError as error:
            raise WorkError(f"the native routines were built but do not load: {error}") from None


def compiler() -> list[str]:
    """The command of the C compiler: $CC, or the first of COMPILERS that there is."""
    if os.environ.get("CC"):
        command = shlex.split(os.environ["CC"])
        if not command or not shutil.which(command[0]):
            raise WorkError(f"the C compiler that CC names is not there: {os.environ['CC']!r}")
        return command
    for name in COMPILERS:
        if shutil.which(name):
            return [name]
    raise WorkError(f"no C compiler: none of {', '.join(COMPILERS)} is on PATH, and CC names none")


def identity(command: list[str]) -> str:
    """The whole command, the compiler's version and the machine's architecture."""
    try:
        run = subprocess.run(
            [command[0], "--version"], capture_output=True, text=True, timeout=LONGEST_BUILD_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise WorkError(f"the C compiler {command[0]} does not run: {error}") from None
    return "\n".join((shlex.join(command), run.stdout, platform.machine()))


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/kronpress/native, by default in ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(cache) if Path(cache).is_absolute() else Path("~/.cache").expanduser()) / "kronpress" / "native"


def is_private(folder: Path) -> bool:
    """Whether only this user can have written what is in the folder: what is loaded from there is run."""
    try:
        status = folder.stat()
    except OSError:
        return False
    return status.st_uid == os.getuid() and not status.st_mode & 0o022


@contextmanager
def built(command: list[str]) -> Iterator[Path]:
    """The library in a temporary folder that is gone afterwards; what is loaded by then stays loaded."""
    try:
        scratch = tempfile.TemporaryDirectory(prefix="kronpress-native-", ignore_cleanup_errors=True)
    except OSError as error:
        raise WorkError(f"no folder to build the native routines in: {error}") from None
    with scratch as folder:
        library = Path(folder) / "kernels.so"
        try:
            run = subprocess.run(
                [*command, "-o", str(library), str(SOURCE)],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=LONGEST_BUILD_SECONDS,
                check=False,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise WorkError(f"the C compiler {command[0]} does not run: {error}") from None
        if run.returncode or not library.exists():
            said = (run.stderr.strip() or f"exit code {run.returncode}").splitlines()
            first = next((line for line in said if "error" in line), said[0])
            raise WorkError(f"{command[0]} cannot build the native routines: {first}")
        yield library


def put(target: Path, content: bytes) -> None:
    """Write a file so that nobody sees half of it."""
    number, name = tempfile.mkstemp(dir=target.parent, prefix=".building-")
    try:
        with os.fdopen(number, "wb") as file:
            file.write(content)
        Path(name).replace(target)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]
