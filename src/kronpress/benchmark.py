"""How fast models prefill and decode, taking turns in one process, and how much memory each takes in its own.

Prefill is one forward pass over the prompt, with the logits of every position. Decode is one forward pass for each new
token, with the key-value cache that the prefill left. The tokens are random but fixed: what they say takes no time.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Self

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from kronpress.checkpoint import LoadedModel, cast_parameters_, load_config, load_model
from kronpress.errors import RequestError, WorkError, unknown_name
from kronpress.evaluation import longest_context, num_embeddings
from kronpress.planning import meta_model
from kronpress.surgery import dense_weight, linear_layers, structured_layers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCH_SIZE = 1
SEED = 0
DEFAULT_PROMPT_TOKENS = 128
DEFAULT_NEW_TOKENS = 32
# Even, so that each order is taken equally often.
DEFAULT_ROUNDS = 20
# One in each order.
WARM_UP_ROUNDS = 2


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class Spread(_Frozen):
    """Median and quartiles; half of the measurements lie between the quartiles."""

    median: float
    first_quartile: float
    third_quartile: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Of at least two values; quartiles between two values are interpolated.

        >>> Spread.of([4.0, 1.0, 2.0, 3.0, 5.0])
        Spread(median=3.0, first_quartile=2.0, third_quartile=4.0)
        """
        first, median, third = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median=median, first_quartile=first, third_quartile=third)


class Timing(_Frozen):
    """One kind of work of one model: seconds of every round, and what they come to."""

    num_tokens: int
    seconds: list[float]
    tokens_per_second: Spread

    @classmethod
    def of(cls, num_tokens: int, seconds: list[float]) -> Self:
        speeds = [num_tokens / each for each in seconds]
        return cls(num_tokens=num_tokens, seconds=seconds, tokens_per_second=Spread.of(speeds))


class Speedup(_Frozen):
    """How many times as fast the model is as the one it is compared with, in every round and over all of them.

    `bound` is what it would be if time went into nothing but streaming the weights of linear layers (decode) or
    multiplying by them (prefill); attention, normalisation and the cost of starting an operation are not in it.
    """

    of_rounds: list[float]
    spread: Spread
    bound: float

    @classmethod
    def of(cls, model: Timing, against: Timing, bound: float) -> Self:
        """Each round's ratio is of two measurements made one right after the other."""
        of_rounds = [theirs / ours for ours, theirs in zip(model.seconds, against.seconds, strict=True)]
        return cls(of_rounds=of_rounds, spread=Spread.of(of_rounds), bound=bound)


class Memory(_Frozen):
    """Loading one model and running one prefill and decode, alone in a new process.

    The peak is counted above what the process held before loading. On a CPU it is of resident memory: checkpoint files
    that are mapped count as far as they were read, and so does torch's code that is first used then, some 20 MB
    whatever the model; None where Linux's /proc is missing. On a GPU it is of what torch allocated there.
    `load_seconds` is of model and tokenizer, without the disk: the files were read shortly before.
    """

    peak_bytes: int | None
    load_seconds: float


class Sizes(_Frozen):
    """Sizes of a model in the dtype computed in.

    `streamed_bytes_per_token` are the weights of all linear layers, head included, biases not: what decoding one token
    has to read. `flops_per_token` are counted as in `planning.Plan`.
    """

    num_params: int
    num_bytes: int
    streamed_bytes_per_token: int
    flops_per_token: int

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        dense = [dense_weight(layer) for layer in linear_layers(model).values()]
        structured = structured_layers(model).values()
        streamed = [*dense, *(factor for layer in structured for factor in layer.factors.values())]
        params = list(model.parameters())
        flops = [layer.structure.count_flops(layer.out_features, layer.in_features, layer.spec) for layer in structured]
        return cls(
            num_params=sum(param.numel() for param in params),
            num_bytes=sum(param.nbytes for param in params),
            streamed_bytes_per_token=sum(weight.nbytes for weight in streamed),
            flops_per_token=2 * sum(weight.numel() for weight in dense) + sum(flops),
        )


class ModelBenchmark(_Frozen):
    """Everything measured of one model."""

    name: str
    revision: str | None
    sizes: Sizes
    prefill: Timing
    decode: Timing
    memory: Memory


class Comparison(_Frozen):
    """The second model, and how many times as fast as it the first one is."""

    against: ModelBenchmark
    prefill: Speedup
    decode: Speedup

    @classmethod
    def of(cls, model: ModelBenchmark, against: ModelBenchmark) -> Self:
        ours, theirs = model.sizes, against.sizes
        streamed = theirs.streamed_bytes_per_token / ours.streamed_bytes_per_token
        flops = theirs.flops_per_token / ours.flops_per_token
        return cls(
            against=against,
            prefill=Speedup.of(model.prefill, against.prefill, bound=flops),
            decode=Speedup.of(model.decode, against.decode, bound=streamed),
        )


class Machine(_Frozen):
    """Where it was measured; `device` is the GPU's name, or `cpu`."""

    device: str
    cpu: str
    cores: int | None
    threads: int


class Benchmark(_Frozen):
    """One model, or one beside another, with all that is needed to measure it again."""

    machine: Machine
    versions: dict[str, str]
    dtype: str
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    warm_up_rounds: int
    rounds: int
    seed: int
    model: ModelBenchmark
    comparison: Comparison | None


def benchmark(
    name: str,
    against: str | None = None,
    *,
    prompt_tokens: int | None = None,
    new_tokens: int = DEFAULT_NEW_TOKENS,
    rounds: int = DEFAULT_ROUNDS,
    threads: int | None = None,
    dtype: str = "float32",
    progress: Callable[[str], None] = lambda _: None,
) -> Benchmark:
    """Speed and memory of the model `name`, beside the model `against` if it is given.

    Args:
        prompt_tokens: length of the prefill; if None, 128, or less if a model's context is shorter.
        rounds: how often everything is measured, at least 2; an even number takes each order equally often.
        threads: of torch on the CPU; as many as torch chooses if None.
        dtype: of weights and arithmetic, `float32` or `bfloat16`, whatever the checkpoint is stored in.

    Raises:
        RequestError: an unknown dtype, a count out of range, tokens that exceed a model's context, or a model
            without key-value cache.
        WorkError: a model cannot be loaded, or the process that measures its memory died.
    """
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    counts = {"prompt tokens": (prompt_tokens, 1), "new tokens": (new_tokens, 1), "threads": (threads, 1)}
    for what, (count, least) in {**counts, "rounds": (rounds, 2)}.items():
        if count is not None and count < least:
            raise RequestError(f"{what} {count}: must be at least {least}")

    names = [name] if against is None else [name, against]
    with _threads(threads) as num_threads:
        progress(f"loading {' and '.join(names)}")
        loaded = [_load(each, dtype) for each in names]
        models = [each.model for each in loaded]
        prompt_tokens = checked_prompt_tokens(dict(zip(names, models, strict=True)), prompt_tokens, new_tokens)
        vocab_size = min(size for model in models if (size := num_embeddings(model)))
        progress(f"{rounds} rounds of {prompt_tokens} prompt tokens and {new_tokens} new ones")
        seconds = time_rounds(models, token_ids(vocab_size, prompt_tokens + new_tokens), prompt_tokens, rounds)
        sizes, revisions = [Sizes.of(model) for model in models], [each.revision for each in loaded]
        # The processes that measure memory may need the room.
        del loaded, models
        torch.cuda.empty_cache()
        memory = []
        for each in names:
            progress(f"memory of {each} in a process of its own")
            memory.append(memory_alone(each, dtype, vocab_size, prompt_tokens, new_tokens))
    model, *others = [
        ModelBenchmark(
            name=each,
            revision=revisions[index],
            sizes=sizes[index],
            prefill=Timing.of(prompt_tokens, [taken[index][0] for taken in seconds]),
            decode=Timing.of(new_tokens, [taken[index][1] for taken in seconds]),
            memory=memory[index],
        )
        for index, each in enumerate(names)
    ]
    return Benchmark(
        machine=Machine(device=_device_name(), cpu=_cpu_name(), cores=os.cpu_count(), threads=num_threads),
        versions={package: version(package) for package in ("kronpress", "torch", "transformers")},
        dtype=dtype,
        batch_size=BATCH_SIZE,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        warm_up_rounds=WARM_UP_ROUNDS,
        rounds=rounds,
        seed=SEED,
        model=model,
        comparison=Comparison.of(model, *others) if others else None,
    )


def checked_prompt_tokens(models: dict[str, PreTrainedModel], prompt_tokens: int | None, new_tokens: int) -> int:
    """The length of the prompt: as given, or the default as far as every model's context allows.

    Raises:
        RequestError: prompt and new tokens together are more than a model's context.
    """
    limits = {name: limit for name, model in models.items() if (limit := longest_context(model)) is not None}
    if prompt_tokens is None:
        prompt_tokens = max(1, min([DEFAULT_PROMPT_TOKENS, *(limit - new_tokens for limit in limits.values())]))
    for name, limit in limits.items():
        if prompt_tokens + new_tokens > limit:
            raise RequestError(
                f"{prompt_tokens} prompt tokens and {new_tokens} new tokens: model {name!r} allows {limit} together"
            )
    return prompt_tokens


def token_ids(vocab_size: int, num_tokens: int) -> Tensor:
    """Random token ids below `vocab_size`, (1, num_tokens), always the same."""
    return torch.randint(vocab_size, (BATCH_SIZE, num_tokens), generator=torch.Generator().manual_seed(SEED))


def time_rounds(
    models: Sequence[PreTrainedModel],
    ids: Tensor,
    prompt_tokens: int,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[tuple[float, float]]]:
    """Seconds of prefill and decode, [round][model], warm-up rounds left out.

    The models take turns within a round, so that what else the machine does falls on all of them alike, and the order
    is turned round from one round to the next, so that none always goes first.

    Args:
        models: in evaluation mode.
        ids: (1, prompt and new tokens).
    """
    turns = list(enumerate(models))
    taken = []
    for _ in range(WARM_UP_ROUNDS + rounds):
        seconds = {index: _prefill_and_decode(model, ids, prompt_tokens, clock) for index, model in turns}
        taken.append([seconds[index] for index in range(len(models))])
        turns.reverse()
    return taken[WARM_UP_ROUNDS:]


@torch.inference_mode()
def _prefill_and_decode(
    model: PreTrainedModel, ids: Tensor, prompt_tokens: int, clock: Callable[[], float]
) -> tuple[float, float]:
    """Seconds to read the prompt, and to read the rest of `ids` one by one."""

    def now() -> float:
        if model.device.type == "cuda":
            torch.cuda.synchronize()  # what has been launched is not yet done
        return clock()

    ids = ids.to(model.device)
    started = now()
    cache = model(input_ids=ids[:, :prompt_tokens], use_cache=True).past_key_values
    prefilled = now()
    if cache is None:
        raise RequestError(f"{type(model).__name__} has no key-value cache: decoding token by token needs one")
    for token in ids[:, prompt_tokens:].split(1, dim=1):
        cache = model(input_ids=token, past_key_values=cache, use_cache=True).past_key_values
    return prefilled - started, now() - prefilled


def memory_alone(name: str, dtype: str, vocab_size: int, prompt_tokens: int, new_tokens: int) -> Memory:
    """Peak memory and load time of one model in a new process, with as many threads as this one has.

    Raises:
        WorkError: the process died, of lacking memory for instance.
    """
    # Not a fork: that would begin with this process's memory.
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        future = pool.submit(
            _measure_memory, name, dtype, vocab_size, prompt_tokens, new_tokens, torch.get_num_threads()
        )
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise WorkError(
                f"the process that measured the memory of {name!r} died, of lacking memory perhaps"
            ) from error


def _measure_memory(
    name: str, dtype: str, vocab_size: int, prompt_tokens: int, new_tokens: int, threads: int
) -> Memory:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(threads)
    # Imports the model's code, which transformers would do during loading.
    meta_model(load_config(name))
    baseline = _restart_peak()
    started = time.perf_counter()
    model = _load(name, dtype).model
    load_seconds = time.perf_counter() - started
    _prefill_and_decode(model, token_ids(vocab_size, prompt_tokens + new_tokens), prompt_tokens, time.perf_counter)
    return Memory(peak_bytes=_peak_above(baseline), load_seconds=load_seconds)


def _restart_peak() -> int | None:
    """Let the peak be what is held now, in bytes, and return it; None if the system cannot do that."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _peak_resident_bytes()


def _peak_above(baseline: int | None) -> int | None:
    if baseline is None:
        return None
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _peak_resident_bytes()
    return peak - baseline


def _peak_resident_bytes() -> int:
    # Not getrusage: its peak begins with that of the process that started this one, and cannot be restarted.
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return 1024 * int(line.split()[1])


def _load(name: str, dtype: str) -> LoadedModel:
    """The model with parameters of `dtype`, in evaluation mode, on the GPU if there is one."""
    loaded = load_model(name)
    cast_parameters_(loaded.model, DTYPES[dtype])
    return loaded


@contextmanager
def _threads(threads: int | None) -> Iterator[int]:
    """Let torch use so many threads for a while; yields their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _cpu_name() -> str:
    """As Linux calls it; elsewhere no more than the architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
