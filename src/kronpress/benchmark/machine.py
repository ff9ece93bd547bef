"""Where it is measured: the processor, how much memory it has left, and how many threads torch uses."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from kronpress.benchmark.timing import Frozen

# Of the many flags that a processor has, those on which the speed of matrix products depends.
INSTRUCTION_FLAGS = (
    *("avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx_vnni", "avx512_bf16"),
    *("avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "asimd", "asimddp", "bf16", "i8mm", "sve"),
)


class Machine(Frozen):
    """Where it was measured; `device` is the GPU's name, or `cpu`."""

    device: str
    cpu: str
    cores: int | None
    threads: int
    # What of INSTRUCTION_FLAGS the processor has; empty where the system does not tell.
    instructions: list[str]

    @classmethod
    def here(cls) -> Machine:
        """This machine, with as many threads as torch uses now."""
        return cls(
            device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            cpu=_cpu_field("model name") or platform.machine(),
            cores=os.cpu_count(),
            threads=torch.get_num_threads(),
            instructions=[
                flag
                for flag in INSTRUCTION_FLAGS
                if flag in (_cpu_field("flags") or _cpu_field("Features") or "").split()
            ],
        )


def _cpu_field(name: str) -> str | None:
    """A field of the first processor as Linux tells it; None elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    values = [line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name]
    return values[0] if values else None


@contextmanager
def using_threads(threads: int | None) -> Iterator[None]:
    """Let torch use so many threads for a while; as many as it does now if None."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def available_bytes() -> int | None:
    """Memory that is left on the GPU, or else for this process; None if the system does not tell."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    limits = []
    path = Path("/proc/meminfo")
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.startswith("MemAvailable:"):
            limits.append(1024 * int(line.split()[1]))
    group = Path("/sys/fs/cgroup")  # a container may be given less than the machine has
    with suppress(OSError, ValueError):  # another system, or no limit
        limits.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(limits, default=None)
