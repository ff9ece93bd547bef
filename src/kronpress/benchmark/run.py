"""The benchmark itself: the request is checked, contenders are built and take turns, each one's memory is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version

import torch
from torch import nn

from kronpress import native
from kronpress.benchmark.contenders import DTYPES, Contender, build_together, needed_bytes, shell
from kronpress.benchmark.machine import Machine, available_bytes, using_threads
from kronpress.benchmark.memory import Memory, memory_alone
from kronpress.benchmark.rivals import OF_DENSE, RIVALS, check_rival
from kronpress.benchmark.sizes import Sizes, decode_bound, disk_bytes, prefill_bound
from kronpress.benchmark.timing import (
    DEFAULT_ROUNDS,
    SEED,
    WARM_UP_ROUNDS,
    Frozen,
    Speedup,
    Timing,
    Work,
    time_rounds,
    token_ids,
)
from kronpress.compiled import compile_
from kronpress.dispatch import Explained, explain, measured_constants
from kronpress.errors import RequestError, unknown_name
from kronpress.evaluation import longest_context, num_embeddings
from kronpress.layers import StructuredLinear
from kronpress.recipe import Recipe
from kronpress.surgery import structured_layers
from kronpress.ways import Constants

DEFAULT_BATCH_SIZES = (1,)
DEFAULT_PROMPT_TOKENS = 128
DEFAULT_NEW_TOKENS = 32
DEFAULT_DTYPES = ("float32",)
# What a contender is, beside the names of RIVALS.
MODEL, AGAINST = "model", "against"


class Comparison(Frozen):
    """How many times as fast a model is as the reference of the same dtype, at one work."""

    prefill: Speedup
    decode: Speedup

    @classmethod
    def of(cls, model: ModelBenchmark, against: ModelBenchmark, number: int) -> Comparison:
        """At the work of that number."""
        ours, theirs = model.measured[number], against.measured[number]
        return cls(
            prefill=Speedup.of(ours.prefill, theirs.prefill, prefill_bound(model.sizes, against.sizes)),
            decode=Speedup.of(ours.decode, theirs.decode, decode_bound(model.sizes, against.sizes)),
        )


class Measured(Frozen):
    """One model at one work; `comparison` is None for the reference itself."""

    work: Work
    prefill: Timing
    decode: Timing
    comparison: Comparison | None = None


class Ways(Frozen):
    """Which way each structured layer goes with so many tokens at once, and why."""

    num_tokens: int
    layers: list[Explained]


class ModelBenchmark(Frozen):
    """Everything measured of one model. `kind` is `model`, `against`, or the name of a rival."""

    name: str
    kind: str
    dtype: str
    recipe: str | None
    revision: str | None
    is_compiled: bool
    sizes: Sizes
    disk_bytes: int | None  # of the weight files; None if the weights are random
    memory: Memory | None
    measured: list[Measured]
    ways: list[Ways] | None = None  # None unless asked for, and of a model without structured layers


class Benchmark(Frozen):
    """All models at all works, with what is needed to measure it again.

    `reference` is the kind of the model that the others of its dtype are compared with; None if there is no other.
    `memory_work` is the work at which memory was measured, the one with the most tokens. `native` is the instruction
    set of the routines for few tokens, None where there are none; `constants` are what ways were chosen by, by device
    type and bytes of a number; `dense_cache` says whether layers could keep dense weights.
    """

    machine: Machine
    versions: dict[str, str]
    native: str | None
    constants: dict[str, Constants]
    dense_cache: bool
    random_weights: bool
    works: list[Work]
    memory_work: Work
    warm_up_rounds: int
    rounds: int
    seed: int
    reference: str | None
    models: list[ModelBenchmark]


def benchmark(
    name: str,
    against: str | None = None,
    *,
    batch_sizes: Sequence[int] = DEFAULT_BATCH_SIZES,
    prompt_tokens: Sequence[int] | None = None,
    new_tokens: int = DEFAULT_NEW_TOKENS,
    dtypes: Sequence[str] = DEFAULT_DTYPES,
    rivals: Sequence[str] = (),
    random_weights: bool = False,
    recipe: Recipe | None = None,
    dense_cache: bool = False,
    compiled: bool = False,
    with_ways: bool = False,
    rounds: int = DEFAULT_ROUNDS,
    threads: int | None = None,
    memory: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> Benchmark:
    """Speed and memory of the model `name`, beside the model `against` and `rivals` if they are given.

    Args:
        name: MODEL; with random weights also a bare geometry, or anything that has a configuration.
        batch_sizes, prompt_tokens: every pair of them is measured; if there are no prompt tokens 128, or less if a
            model's context is shorter.
        dtypes: of weights and arithmetic, `float32` or `bfloat16`, whatever the checkpoint is stored in; each model is
            measured in each, and compared with the reference in the same.
        rivals: of RIVALS: `int8` is made of `against`, or else of the model; the others of the model.
        random_weights: build the models from their configurations alone.
        recipe: with random weights: the model becomes what this recipe makes of it, with random factors, and `against`
            is the dense one.
        dense_cache: let structured layers keep dense weights, as many as pay (`Dispatch.dense_cache_bytes`).
        compiled: compile the blocks of all models but the rivals; memory is measured without.
        with_ways: tell which way each structured layer goes, and why.
        rounds: how often everything is measured, at least 2; an even number takes each order equally often.
        threads: of torch on the CPU; as many as torch uses now if None.
        memory: also measure the memory of each in a process of its own, which takes some seconds each.

    Raises:
        RequestError: an unknown dtype or rival, a rival that cannot be made of the models, a count out of range, tokens
            that exceed a model's context, a model without key-value cache, or random weights that memory cannot hold.
        WorkError: a model cannot be loaded, or the process that measures its memory died.
    """
    kinds = _contenders(name, against, dtypes, rivals, random_weights, recipe, dense_cache)
    for what, counts, least in (
        ("batch size", batch_sizes, 1),
        ("prompt tokens", prompt_tokens or (), 1),
        ("new tokens", [new_tokens], 1),
        ("threads", [] if threads is None else [threads], 1),
        ("rounds", [rounds], 2),
    ):
        for count in counts:
            if count < least:
                raise RequestError(f"{what} {count}: must be at least {least}")
    contenders = list(kinds.values())
    shells = {each.name: shell(each) for each in contenders}
    for each in contenders:
        if each.rival is not None:
            check_rival(shell(each), each.rival)
    lengths = checked_prompt_tokens(shells, prompt_tokens, new_tokens)
    works = [
        Work(batch_size=batch_size, prompt_tokens=length, new_tokens=new_tokens)
        for batch_size in batch_sizes
        for length in lengths
    ]
    memory_work = max(works, key=lambda work: work.batch_size * (work.prompt_tokens + work.new_tokens))
    vocab_size = min(size for model in shells.values() if (size := num_embeddings(model)))
    del shells
    if random_weights:
        _check_room(contenders, works, progress)

    with using_threads(threads):
        progress(f"building {'; '.join(each.label for each in contenders)}")
        built = build_together(contenders)
        ways = [_ways(each.model, works) if with_ways else None for each in built]
        is_compiled = [compiled and each.rival is None for each in contenders]
        for index, is_chosen in enumerate(is_compiled):
            if is_chosen:
                compile_(built[index].model)
        seconds = []
        for work in works:
            progress(f"{rounds} rounds: {work}")
            ids = token_ids(vocab_size, work.prompt_tokens + work.new_tokens, work.batch_size)
            seconds.append(time_rounds([each.model for each in built], ids, work.prompt_tokens, rounds))
        sizes, revisions = [each.sizes for each in built], [each.revision for each in built]
        # The processes that measure memory may need the room.
        del built
        torch.cuda.empty_cache()
        memories: list[Memory | None] = []
        for each in contenders:
            if memory:
                progress(f"memory of {each.label} in a process of its own")
            memories.append(memory_alone(each, vocab_size, memory_work) if memory else None)
        machine = Machine.here()
        constants = measured_constants("cuda" if torch.cuda.is_available() else "cpu")

    models = [
        ModelBenchmark(
            name=each.name,
            kind=kind,
            dtype=each.dtype,
            recipe=each.recipe.name if each.recipe else None,
            revision=revisions[index],
            is_compiled=is_compiled[index],
            sizes=sizes[index],
            ways=ways[index],
            disk_bytes=None if random_weights or each.rival is not None else disk_bytes(each.name, revisions[index]),
            memory=memories[index],
            measured=[
                Measured(
                    work=work,
                    prefill=Timing.of(work.batch_size, work.prompt_tokens, [round[index][0] for round in rounds_taken]),
                    decode=Timing.of(work.batch_size, work.new_tokens, [round[index][1] for round in rounds_taken]),
                )
                for work, rounds_taken in zip(works, seconds, strict=True)
            ],
        )
        for index, ((kind, _), each) in enumerate(kinds.items())
    ]
    reference = None if len({model.kind for model in models}) == 1 else _reference(models)
    return Benchmark(
        machine=machine,
        versions={package: version(package) for package in ("kronpress", "torch", "transformers")},
        native=native.instruction_set() if native.is_available() else None,
        constants={f"{device}, {num_bytes} bytes": each for (device, num_bytes), each in constants.items()},
        dense_cache=dense_cache,
        random_weights=random_weights,
        works=works,
        memory_work=memory_work,
        warm_up_rounds=WARM_UP_ROUNDS,
        rounds=rounds,
        seed=SEED,
        reference=reference,
        models=compared(models, reference),
    )


def _contenders(
    name: str,
    against: str | None,
    dtypes: Sequence[str],
    rivals: Sequence[str],
    random_weights: bool,
    recipe: Recipe | None,
    dense_cache: bool,
) -> dict[tuple[str, str], Contender]:
    """The contenders by kind and dtype, in the order in which they take turns."""
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise unknown_name("dtype", dtype, DTYPES)
    for rival in rivals:
        if rival not in RIVALS:
            raise unknown_name("rival", rival, RIVALS)
    if recipe is not None and not random_weights:
        raise RequestError(
            "a recipe makes a model of random factors: ask for random weights (--random-weights) as well"
        )
    if recipe is not None and against is not None:
        raise RequestError(
            f"a recipe is measured against the dense {name!r} itself: leave out the model {against!r} to compare with"
        )
    found = {}
    for dtype in dict.fromkeys(dtypes):
        model = Contender(name, dtype, random_weights, recipe, dense_cache=dense_cache)
        other = replace(model, recipe=None) if recipe is not None else None
        if against is not None:
            other = Contender(against, dtype, random_weights, dense_cache=dense_cache)
        found[MODEL, dtype] = model
        if other is not None:
            found[AGAINST, dtype] = other
        for rival in dict.fromkeys(rivals):
            found[rival, dtype] = replace(other if rival in OF_DENSE and other is not None else model, rival=rival)
    return found


def _ways(model: nn.Module, works: Sequence[Work]) -> list[Ways] | None:
    """With the tokens of every decoding step and every prefill."""
    if not any(isinstance(layer, StructuredLinear) for layer in structured_layers(model).values()):
        return None
    counts = {count for work in works for count in (work.batch_size, work.batch_size * work.prompt_tokens)}
    return [Ways(num_tokens=count, layers=explain(model, count)) for count in sorted(counts)]


def _reference(models: Sequence[ModelBenchmark]) -> str:
    return AGAINST if any(model.kind == AGAINST for model in models) else MODEL


def compared(models: Sequence[ModelBenchmark], reference: str | None) -> list[ModelBenchmark]:
    """The models with their speedups over that of the kind `reference` in the same dtype."""
    references = {model.dtype: model for model in models if model.kind == reference}
    done = []
    for model in models:
        other = references.get(model.dtype)
        if other is not None and other is not model:
            measured = [
                each.model_copy(update={"comparison": Comparison.of(model, other, number)})
                for number, each in enumerate(model.measured)
            ]
            model = model.model_copy(update={"measured": measured})
        done.append(model)
    return done


def checked_prompt_tokens(
    models: Mapping[str, nn.Module], prompt_tokens: Sequence[int] | None, new_tokens: int
) -> list[int]:
    """The lengths of prompts: as given, or the default as far as every model's context allows.

    Raises:
        RequestError: prompt and new tokens together are more than a model's context.
    """
    limits = {name: limit for name, model in models.items() if (limit := longest_context(model)) is not None}
    if not prompt_tokens:
        prompt_tokens = [max(1, min([DEFAULT_PROMPT_TOKENS, *(limit - new_tokens for limit in limits.values())]))]
    for name, limit in limits.items():
        if (longest := max(prompt_tokens)) + new_tokens > limit:
            raise RequestError(
                f"{longest} prompt tokens and {new_tokens} new tokens: model {name!r} allows {limit} together"
            )
    return list(dict.fromkeys(prompt_tokens))


def _check_room(contenders: Sequence[Contender], works: Sequence[Work], progress: Callable[[str], None]) -> None:
    """Say how much memory it will take, and refuse what there is no room for."""
    needed, available = needed_bytes(contenders, works), available_bytes()
    told = f"about {needed / 1e9:.1f} GB of memory needed"
    progress(told if available is None else f"{told}, {available / 1e9:.1f} GB available")
    if available is not None and needed > available:
        raise RequestError(
            f"{', '.join(each.label for each in contenders)}: {told} together, and {available / 1e9:.1f} GB are "
            "available: measure fewer models at once, in bfloat16 only, or a smaller geometry"
        )
