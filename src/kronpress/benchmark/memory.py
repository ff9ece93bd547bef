"""How much memory one model takes, alone in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.context import BaseContext
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from kronpress.benchmark.contenders import Contender, build, shell
from kronpress.benchmark.timing import Frozen, Work, prefill_and_decode, token_ids
from kronpress.errors import WorkError


class Memory(Frozen):
    """Making one model and running one prefill and decode, alone in a new process.

    Peaks are counted above what the process held before. `peak_bytes` is that of all, of reading the files (and of
    rounding, for int8) too; `running_peak_bytes` that of prefill and decode alone, weights included. On a CPU it is of
    resident memory: checkpoint files that are mapped count as far as they were read, and so does torch's code that is
    first used then, some 20 MB whatever the model; None where Linux's /proc is missing. On a GPU it is of what torch
    allocated there. `load_seconds` is of model and tokenizer, without the disk: the files were read shortly before;
    None if the weights are random.
    """

    peak_bytes: int | None
    running_peak_bytes: int | None
    load_seconds: float | None


def memory_alone(contender: Contender, vocab_size: int, work: Work) -> Memory:
    """Peak memory and load time of one model in a new process, with as many threads as this one has.

    Raises:
        WorkError: the process died, of lacking memory for instance.
    """
    with ProcessPoolExecutor(max_workers=1, mp_context=_context()) as pool:
        future = pool.submit(_measure_memory, contender, vocab_size, work, torch.get_num_threads())
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise WorkError(
                f"the process that measured the memory of {contender.label!r} died, of lacking memory perhaps"
            ) from error


def _context() -> BaseContext:
    """How the process is started: not as a fork of this one, which would begin with its memory.

    Where there is a fork server it is one of that, which has imported everything once and done nothing.
    """
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _measure_memory(contender: Contender, vocab_size: int, work: Work, threads: int) -> Memory:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(threads)
    # Imports the model's code, which transformers would do during loading.
    shell(contender)
    baseline = restart_peak()
    started = time.perf_counter()
    model = build(contender).model
    load_seconds = None if contender.random_weights else time.perf_counter() - started
    made = peak_above(baseline)
    give_back_free_memory()
    restart_peak()
    ids = token_ids(vocab_size, work.prompt_tokens + work.new_tokens, work.batch_size)
    prefill_and_decode(model, ids, work.prompt_tokens)
    running = peak_above(baseline)
    peak = None if made is None or running is None else max(made, running)
    return Memory(peak_bytes=peak, running_peak_bytes=running, load_seconds=load_seconds)


def restart_peak() -> int | None:
    """Let the peak be what is held now, in bytes, and return it; None if the system cannot do that."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _peak_resident_bytes()


def peak_above(baseline: int | None) -> int | None:
    if baseline is None:
        return None
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _peak_resident_bytes()
    return peak - baseline


def _peak_resident_bytes() -> int:
    # Not getrusage: its peak begins with that of the process that started this one, and cannot be restarted.
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return 1024 * int(line.split()[1])


def give_back_free_memory() -> None:
    """Let what was freed count as freed: the C library keeps some of it."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
