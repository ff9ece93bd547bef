"""Benchmarks count tokens and bytes rightly, take turns, and pair what was measured together; no time is asserted."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from rich.console import Console

import kronpress as kp
from kronpress import benchmark as benchmarks
from kronpress import cli
from kronpress.benchmark import (
    WARM_UP_ROUNDS,
    Benchmark,
    Comparison,
    Machine,
    Memory,
    ModelBenchmark,
    Sizes,
    Speedup,
    Spread,
    Timing,
    benchmark,
    checked_prompt_tokens,
    memory_alone,
    time_rounds,
    token_ids,
)
from kronpress.report import benchmark_table

MEMORY = Memory(peak_bytes=3_000_000, load_seconds=0.5)


# ---- arithmetic on given numbers ----


def test_quartiles_are_interpolated_between_measurements():
    assert Spread.of([1.0, 2.0]) == Spread(median=1.5, first_quartile=1.25, third_quartile=1.75)
    assert Spread.of([9.0, 1.0, 4.0, 7.0]) == Spread(median=5.5, first_quartile=3.25, third_quartile=7.5)


def test_a_timing_is_tokens_over_seconds():
    timing = Timing.of(32, [4.0, 1.0, 2.0])
    assert timing.seconds == [4.0, 1.0, 2.0]
    assert timing.tokens_per_second == Spread.of([8.0, 32.0, 16.0])


def test_a_speedup_pairs_what_was_measured_in_one_round():
    model, against = Timing.of(8, [1.0, 10.0, 4.0]), Timing.of(8, [3.0, 20.0, 4.0])
    speedup = Speedup.of(model, against, bound=4.0)
    assert speedup == Speedup(of_rounds=[3.0, 2.0, 1.0], spread=Spread.of([1.0, 2.0, 3.0]), bound=4.0)
    assert speedup.spread.median != 4.0 / 4.0  # the ratio of the medians


def model_benchmark(name: str, num_bytes: int, flops: int, seconds: list[float]) -> ModelBenchmark:
    sizes = Sizes(num_params=10**9, num_bytes=4 * 10**9, streamed_bytes_per_token=num_bytes, flops_per_token=flops)
    prefill, decode = Timing.of(1000, seconds), Timing.of(10, [2 * each for each in seconds])
    return ModelBenchmark(name=name, revision=None, sizes=sizes, prefill=prefill, decode=decode, memory=MEMORY)


def test_bytes_bound_decode_and_flops_bound_prefill():
    model, against = model_benchmark("a", 100, 500, [1.0, 2.0]), model_benchmark("b", 300, 1000, [4.0, 4.0])
    compared = Comparison.of(model, against)
    assert (compared.decode.bound, compared.prefill.bound) == (3.0, 2.0)
    assert compared.against is against
    assert compared.decode.of_rounds == compared.prefill.of_rounds == [4.0, 2.0]


# ---- what is timed ----


class Watched:
    """Forward passes of some models, in order, on a clock of its own that goes on by what each pass is said to cost."""

    def __init__(self, models, cost) -> None:
        self.passes: list[dict[str, Any]] = []
        self.now = 100.0
        for number, model in enumerate(models):
            model.register_forward_pre_hook(self._before(number), with_kwargs=True)
            model.register_forward_hook(self._after(number, cost))

    def _before(self, number):
        def hook(model, args, kwargs) -> None:
            cache = kwargs.get("past_key_values")
            cached = 0 if cache is None else cache.get_seq_length()
            self.passes.append({"model": number, "ids": kwargs["input_ids"].tolist(), "cached": cached})

        return hook

    def _after(self, number, cost):
        def hook(model, args, output) -> None:
            self.passes[-1]["logits"] = output.logits
            self.now += cost(number, self.passes[-1]["logits"].shape[1])

        return hook

    def clock(self) -> float:
        return self.now


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "qwen2"])
def test_decode_reads_one_token_at_a_time_with_the_cache(tiny_model, family):
    model, ids = tiny_model(family), token_ids(300, 12)
    watched = Watched([model], lambda number, num_tokens: num_tokens)
    time_rounds([model], ids, prompt_tokens=8, rounds=1)
    prefill, *decode = watched.passes[-5:]
    assert (prefill["ids"], prefill["cached"]) == (ids[:, :8].tolist(), 0)
    assert [(one["ids"], one["cached"]) for one in decode] == [([[ids[0, at].item()]], at) for at in range(8, 12)]
    assert all(one["logits"].is_inference() for one in watched.passes)
    with torch.no_grad():
        whole = model(input_ids=ids).logits
    cached = torch.cat([one["logits"] for one in (prefill, *decode)], dim=1)
    torch.testing.assert_close(cached.clone(), whole)


def test_prefill_and_decode_of_every_round_and_model_are_told_apart(tiny_model):
    models = [tiny_model("gpt2"), tiny_model("llama")]
    # A pass costs 100 for being made, 1 for a token, and ten times that with the second model.
    watched = Watched(models, lambda number, num_tokens: (100 + num_tokens) * 10**number)
    taken = time_rounds(models, token_ids(300, 11), prompt_tokens=8, rounds=4, clock=watched.clock)
    assert taken == [[(108, 303), (1080, 3030)]] * 4


def test_models_take_turns_and_the_order_turns_round(tiny_model):
    models = [tiny_model("gpt2"), tiny_model("gpt2", seed=1)]
    watched = Watched(models, lambda number, num_tokens: 0)
    time_rounds(models, token_ids(300, 6), prompt_tokens=4, rounds=3)
    prefills = [one["model"] for one in watched.passes if one["cached"] == 0]
    assert prefills == [0, 1, 1, 0, 0, 1, 1, 0, 0, 1]
    assert len(prefills) == 2 * (WARM_UP_ROUNDS + 3)
    assert [one["model"] for one in watched.passes] == [number for number in prefills for _ in range(3)]


def test_warm_up_rounds_are_not_counted(tiny_model):
    model = tiny_model("gpt2")
    watched = Watched([model], lambda number, num_tokens: len(watched.passes))
    taken = time_rounds([model], token_ids(300, 5), prompt_tokens=4, rounds=2, clock=watched.clock)
    assert taken == [
        [(2 * WARM_UP_ROUNDS + 1, 2 * WARM_UP_ROUNDS + 2)],
        [(2 * WARM_UP_ROUNDS + 3, 2 * WARM_UP_ROUNDS + 4)],
    ]


def test_a_model_without_cache_is_refused(tiny_model):
    model = tiny_model("gpt2")

    def without_cache(model, args, output):
        output.past_key_values = None

    model.register_forward_hook(without_cache)
    with pytest.raises(kp.RequestError, match="GPT2LMHeadModel has no key-value cache"):
        time_rounds([model], token_ids(300, 6), prompt_tokens=4, rounds=2)


def test_token_ids_are_in_the_vocabulary_and_always_the_same():
    ids = token_ids(7, 500)
    assert ids.shape == (1, 500)
    assert set(ids.flatten().tolist()) == set(range(7))
    assert torch.equal(ids, token_ids(7, 500))


def test_the_prompt_is_as_long_as_every_context_allows(tiny_model):
    short, long = tiny_model("gpt2"), tiny_model("gpt2", n_positions=200)
    assert checked_prompt_tokens({"long": long}, None, new_tokens=32) == 128
    assert checked_prompt_tokens({"long": long, "short": short}, None, new_tokens=32) == 96
    assert checked_prompt_tokens({"long": long, "short": short}, 100, new_tokens=28) == 100
    with pytest.raises(kp.RequestError, match="101 prompt tokens and 28 new tokens: model 'short' allows 128 together"):
        checked_prompt_tokens({"long": long, "short": short}, 101, new_tokens=28)
    with pytest.raises(kp.RequestError, match="model 'short' allows 128 together"):
        checked_prompt_tokens({"long": long, "short": short}, None, new_tokens=128)


# ---- sizes ----


@pytest.mark.parametrize("structure", ["kronecker", "low_rank"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_sizes_are_those_of_the_plan(tiny_model, tiny_recipe, family, structure):
    model = tiny_model(family)
    plan = kp.make_plan(model, tiny_recipe(structure))
    dense = Sizes.of(model)
    kp.compress_(model, plan)
    compressed = Sizes.of(model)
    for sizes, num_params, flops in (
        (dense, plan.num_params_dense, plan.flops_per_token_dense),
        (compressed, plan.num_params, plan.flops_per_token),
    ):
        assert (sizes.num_params, sizes.num_bytes, sizes.flops_per_token) == (num_params, 4 * num_params, flops)
    saved = plan.num_params_targets_dense - plan.num_params_targets
    assert dense.streamed_bytes_per_token - compressed.streamed_bytes_per_token == 4 * saved


def test_decoding_streams_the_weights_of_blocks_and_tied_head(tiny_model):
    blocks, head = 2 * 12 * 16 * 16, 300 * 16
    model = tiny_model("gpt2")
    assert Sizes.of(model).streamed_bytes_per_token == 4 * (blocks + head)
    assert Sizes.of(model.to(torch.bfloat16)).streamed_bytes_per_token == 2 * (blocks + head)


# ---- memory ----


def test_peak_memory_alone_holds_the_weights_and_little_more(tiny_model, save_tiny_checkpoint, tmp_path):
    model = tiny_model("gpt2", n_embd=512, n_layer=8, n_head=8)
    num_bytes = Sizes.of(model).num_bytes
    assert num_bytes > 100_000_000
    save_tiny_checkpoint(model, tmp_path)
    memory = memory_alone(str(tmp_path), "float32", vocab_size=300, prompt_tokens=8, new_tokens=2)
    assert num_bytes <= memory.peak_bytes < 1.5 * num_bytes
    assert memory.load_seconds > 0


def die(*_: object) -> NoReturn:
    os._exit(1)


def test_a_measuring_process_that_dies_is_failed_work(monkeypatch):
    monkeypatch.setattr(benchmarks, "_measure_memory", die)
    with pytest.raises(kp.WorkError, match="memory of 'small' died"):
        memory_alone("small", "float32", vocab_size=300, prompt_tokens=8, new_tokens=2)


def test_an_error_in_the_measuring_process_comes_back(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(kp.RequestError, match="empty' is no checkpoint"):
        memory_alone(str(tmp_path / "empty"), "float32", vocab_size=300, prompt_tokens=8, new_tokens=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU torch knows the peak")
def test_memory_that_the_system_does_not_tell_is_none(monkeypatch, tiny_model, save_tiny_checkpoint, tmp_path):
    def refuse(*_: object, **__: object) -> NoReturn:
        raise FileNotFoundError("/proc")

    save_tiny_checkpoint(tiny_model("gpt2"), tmp_path)
    monkeypatch.setattr(Path, "write_text", refuse)
    assert benchmarks._measure_memory(str(tmp_path), "float32", 300, 8, 2, threads=1).peak_bytes is None


# ---- the whole, and the command ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model, tiny_compressed, save_tiny_checkpoint) -> Path:
    """Holds the checkpoints `dense`, `compressed`, and `other` with a smaller vocabulary, stored in 16 bits."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny_checkpoint(tiny_model("gpt2"), folder / "dense")
    save_tiny_checkpoint(tiny_compressed("gpt2", "kronecker"), folder / "compressed")
    save_tiny_checkpoint(tiny_model("llama", vocab_size=200).to(torch.bfloat16), folder / "other")
    return folder


def call(*arguments: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


def test_bench_prints_every_measurement_as_json(folder):
    options = "--prompt-tokens", 8, "--new-tokens", 3, "--rounds", 2, "--threads", 2, "--json"
    code, out, err = call("bench", folder / "compressed", "--against", folder / "dense", *options)
    assert code == 0, err
    document = json.loads(out)
    result = Benchmark.model_validate(document)
    assert result.model_dump(mode="json") == document
    assert document["machine"]["threads"] == 2
    assert torch.get_num_threads() == 1
    assert document["machine"].keys() == {"device", "cpu", "cores", "threads"}
    assert document["versions"].keys() == {"kronpress", "torch", "transformers"}
    given = {"dtype": "float32", "batch_size": 1, "prompt_tokens": 8, "new_tokens": 3, "rounds": 2}
    assert {name: document[name] for name in given} == given
    models = result.model, result.comparison.against
    for model, name in zip(models, ("compressed", "dense"), strict=True):
        assert model.name == str(folder / name)
        assert model.sizes == Sizes.of(kp.load_model(str(folder / name)).model)
        assert (model.prefill.num_tokens, model.decode.num_tokens) == (8, 3)
        assert len(model.prefill.seconds) == len(model.decode.seconds) == 2
        assert model.memory.peak_bytes > 0
    assert result.comparison == Comparison.of(*models)
    assert result.comparison.decode.bound > 1


@pytest.fixture
def memory_calls(monkeypatch) -> list[tuple[Any, ...]]:
    """What memory was asked for; it is not measured, which takes seconds."""
    calls: list[tuple[Any, ...]] = []

    def memory_alone(*arguments: Any) -> Memory:
        calls.append((*arguments, torch.get_num_threads()))
        return MEMORY

    monkeypatch.setattr(benchmarks, "memory_alone", memory_alone)
    return calls


def test_one_model_alone_is_compared_with_none(folder, memory_calls):
    result = benchmark(str(folder / "dense"), new_tokens=100, rounds=2)
    assert result.comparison is None
    assert (result.prompt_tokens, result.model.prefill.num_tokens) == (28, 28)
    assert memory_calls == [(str(folder / "dense"), "float32", 300, 28, 100, 1)]


@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2)])
def test_models_of_other_vocabulary_and_stored_dtype_are_computed_alike(folder, memory_calls, dtype, itemsize):
    names = str(folder / "dense"), str(folder / "other")
    result = benchmark(*names, prompt_tokens=4, new_tokens=2, rounds=2, dtype=dtype, threads=2)
    assert result.dtype == dtype
    for model in (result.model, result.comparison.against):
        assert model.sizes.num_bytes == itemsize * model.sizes.num_params
    assert memory_calls == [(name, dtype, 200, 4, 2, 2) for name in names]


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ("--dtype float16", ["'float16'", "float32", "bfloat16"]),
        ("--rounds 1", ["rounds 1", "at least 2"]),
        ("--prompt-tokens 0", ["prompt tokens 0", "at least 1"]),
        ("--new-tokens 0", ["new tokens 0", "at least 1"]),
        ("--threads 0", ["threads 0", "at least 1"]),
        ("--prompt-tokens 97", ["97 prompt", "32 new", "dense", "128"]),
        ("--against nowhere/at/all", ["'nowhere/at/all'"]),
    ],
)
def test_a_wrong_request_is_one_sentence(folder, arguments, fragments):
    code, out, err = call("bench", folder / "dense", *arguments.split())
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("kronpress: error: ")
    for fragment in fragments:
        assert fragment in err.splitlines()[-1]


# ---- the table ----


def result_of(name: str, seconds: list[float], memory: Memory = MEMORY, alone: bool = False) -> Benchmark:
    model = model_benchmark(name, 100, 500, seconds).model_copy(update={"memory": memory})
    return Benchmark(
        machine=Machine(device="NVIDIA H200", cpu="Intel(R) Xeon(R) Platinum 8488C", cores=16, threads=16),
        versions={"kronpress": "0.1.0", "torch": "2.13.0+cu130", "transformers": "5.23.0"},
        dtype="bfloat16",
        batch_size=1,
        prompt_tokens=1000,
        new_tokens=10,
        warm_up_rounds=2,
        rounds=2,
        seed=0,
        model=model,
        comparison=None
        if alone
        else Comparison.of(model, model_benchmark("gpt2", 325, 1234, [seconds[0], 1.5 * seconds[1]])),
    )


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("seconds", [[0.001_01, 0.001_02], [1.0, 2.0], [900.0, 901.0]])
def test_the_table_fits(seconds, alone):
    result = result_of("runs/krony-96m-healed/model", seconds, alone=alone)
    console = Console(width=80, file=io.StringIO(), highlight=False, soft_wrap=True)
    console.print(benchmark_table(result))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80, text
    assert "…" not in text
    for part in ("runs/krony-96m-healed/model", "1000 prompt", "10 new", "bfloat16", "2 rounds", "16 threads", "H200"):
        assert part in text
    assert ("gpt2" in text) is not alone


def test_the_table_shows_medians_quartiles_ratios_and_bounds():
    console = Console(width=80, file=io.StringIO(), highlight=False)
    unknown = Memory(peak_bytes=None, load_seconds=1.25)
    console.print(benchmark_table(result_of("small", [1.0, 2.0], unknown)))
    lines = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]
    start = lines.index("decode, tokens/s 3.75 3.33 1.25 3.25")
    assert lines[start + 1] == "quartiles 3.12–4.38 2.50–4.17 1.12–1.38"
    assert lines[start + 2] == "prefill, tokens/s 750 667 1.25 2.47"
    assert lines[start + 3] == "quartiles 625–875 500–833 1.12–1.38"
    assert "parameters 1,000,000,000 1,000,000,000" in lines
    assert "parameters, MB 4,000.00 4,000.00" in lines
    assert "peak memory, MB – 3.00" in lines
    assert "loading, s 1.25 0.50" in lines
