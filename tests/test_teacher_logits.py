"""The cached logits are the teacher's, and the cache survives what may happen to it."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.healing import TOKENS, Interrupted, assert_same_weights, schedule, weights
from safetensors import safe_open
from torch._subclasses.fake_tensor import FakeTensor

import kronpress as kp
from kronpress import cli
from kronpress.healing import teacher_logits
from kronpress.healing.losses import TopLogits, log_distributions, log_distributions_of_top, top_logits
from kronpress.healing.teacher_logits import TeacherLogits, num_bytes
from kronpress.recipe import Healing
from kronpress.tokens import TokenStream, TrainData
from kronpress.tokens.streams import Piece

LENGTH, K = 8, 5


@pytest.fixture
def teacher(tiny_model) -> Any:
    return tiny_model("gpt2")


@pytest.fixture
def data() -> TrainData:
    """Two streams of 3 and 2 whole windows, with some tokens left over."""
    generator = torch.Generator().manual_seed(0)
    sizes = (3 * LENGTH + 5, 2 * LENGTH + 1)
    parts = [torch.randint(300, (size,), generator=generator) for size in sizes]
    return TrainData(tuple(map(TokenStream.of, parts)), (1.0, 1.0))


def windows_of(data: TrainData) -> torch.Tensor:
    parts = [kp.tokens.pack(stream.read(0, len(stream))[0], LENGTH) for stream in data.streams]
    return torch.cat(parts)


def together(top: TopLogits) -> torch.Tensor:
    """The log-probabilities (..., k + 1) of the k tokens and of all others."""
    return torch.cat([top.values, top.log_rest[..., None]], -1)


# ---- the numbers ----


@given(
    vocabulary=st.integers(2, 40),
    part=st.floats(0, 1),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    seed=st.integers(0, 999),
)
@settings(max_examples=100, deadline=None)
def test_top_logits_are_those_of_sorting_and_leave_the_rest(vocabulary, part, scale, temperature, seed):
    k = 1 + int(part * (vocabulary - 1))
    logits = scale * torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(seed))
    top = top_logits(logits, k, temperature)
    p, order = (logits.double() / temperature).softmax(-1).sort(descending=True)
    torch.testing.assert_close(top.values.double(), p[:, :k].log(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(top.indices, order[:, :k])
    torch.testing.assert_close(top.log_rest.double(), p[:, k:].sum(-1).log(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together(top).exp().sum(-1), torch.ones(3))


@given(
    vocabulary=st.integers(2, 40),
    part=st.floats(0, 1),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    seed=st.integers(0, 999),
)
@settings(max_examples=100, deadline=None)
def test_what_is_kept_of_a_teacher_is_what_a_divergence_looks_at(vocabulary, part, temperature, seed):
    k = 1 + int(part * (vocabulary - 1))
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(2, 3, vocabulary, generator=generator) for _ in "st")
    top = top_logits(teacher, k, temperature)
    expected = log_distributions(student, teacher, temperature, k)
    if k == vocabulary:  # in the order of the tokens, not of their probabilities
        expected = tuple(each.gather(-1, top.indices) for each in expected)
    torch.testing.assert_close(log_distributions_of_top(student, top, temperature), expected)


def test_the_cache_gives_the_teachers_own_distribution(teacher, data, tmp_path):
    cache = TeacherLogits(teacher, data, LENGTH, K, tmp_path)
    assert (len(cache), cache.missing()) == (5, [0, 1, 2, 3, 4])
    done: list[tuple[int, int]] = []
    cache.fill(windows_per_pass=2, progress=lambda *given: done.append(given))
    assert (done, cache.missing()) == ([(2, 5), (4, 5), (5, 5)], [])
    with torch.no_grad():
        logits = teacher(windows_of(data)).logits[:, :-1]
    found = cache.read([4, 0, 2])
    expected = top_logits(logits[[4, 0, 2]], K)
    assert found.values.shape == (3, LENGTH - 1, K)
    torch.testing.assert_close(found.indices, expected.indices)
    # Half a unit in the last of 11 bits, of logarithms of at most 6, and what makes the sum 1 again.
    torch.testing.assert_close(found.values, expected.values, rtol=2**-10, atol=2**-9)
    torch.testing.assert_close(found.log_rest, expected.log_rest, rtol=2**-10, atol=2**-9)
    torch.testing.assert_close(together(found).exp().sum(-1), torch.ones(3, LENGTH - 1))


@pytest.mark.parametrize("k", [None, 300, 999])
def test_the_whole_vocabulary_leaves_nothing(teacher, data, tmp_path, k):
    cache = TeacherLogits(teacher, data, LENGTH, k, tmp_path, temperature=2.0)
    assert cache.k == 300
    cache.fill()
    found = cache.read(range(5))
    with torch.no_grad():
        expected = (teacher(windows_of(data)).logits[:, :-1] / 2.0).log_softmax(-1)
    assert (found.log_rest == -torch.inf).all()
    scattered = torch.zeros_like(expected).scatter(-1, found.indices, found.values)
    torch.testing.assert_close(scattered, expected, rtol=2**-10, atol=2**-9)


def test_what_is_next_to_impossible_is_still_finite(teacher, data, tmp_path):
    with torch.no_grad():
        teacher.lm_head.weight.copy_(torch.linspace(-1e6, 1e6, 300)[:, None].expand_as(teacher.lm_head.weight))
    cache = TeacherLogits(teacher, data, LENGTH, None, tmp_path)
    cache.fill()
    found = cache.read(range(5))
    assert found.values.isfinite().all()
    assert found.values.min() < -60_000
    log_q, log_p = log_distributions_of_top(torch.randn(5, LENGTH - 1, 300), found)
    assert kp.healing.forward_kl(log_q, log_p).isfinite().all()


def test_of_the_logits_only_those_of_a_few_positions_are_ever_in_memory(teacher, data, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_logits, "_POSITIONS_AT_ONCE", 3)
    sizes: list[int] = []

    def note(_: Any, given: Any, result: torch.Tensor) -> None:
        if result.shape[-1] == 300:  # else the head was left out
            sizes.append(result.shape[-2])

    teacher.lm_head.register_forward_hook(note)
    cache = TeacherLogits(teacher, data, LENGTH, K, tmp_path / "few")
    cache.fill(windows_per_pass=2)
    assert max(sizes[2:]) == 3  # the first two are how the head is found
    plain = TeacherLogits(teacher, data, LENGTH, K, tmp_path / "whole")
    monkeypatch.setattr(teacher_logits, "find_head", lambda _: "it is not understood")
    plain.fill(windows_per_pass=2)
    torch.testing.assert_close(cache.read(range(5)), plain.read(range(5)), rtol=2**-10, atol=2**-9)


def test_windows_of_a_training_are_found_in_every_epoch(teacher, data, tmp_path):
    cache = TeacherLogits(teacher, data, LENGTH, K, tmp_path)
    expected = windows_of(data)
    windows = TrainData(data.streams, data.weights, only_whole=True).windows(LENGTH, seed=3)
    for index in range(30):
        number = cache.number(*windows.place(index))
        torch.testing.assert_close(windows[index]["input_ids"], expected[number])


# ---- the file ----


@pytest.mark.parametrize(("vocabulary", "index_bytes"), [(300, 2), (70_000, 4)])
def test_the_size_is_told_beforehand(tiny_model, data, tmp_path, vocabulary, index_bytes):
    told = num_bytes(5, LENGTH, K, vocabulary)
    assert told == 1024 + 5 * ((LENGTH - 1) * (K * (2 + index_bytes) + 4) + 4)
    cache = TeacherLogits(tiny_model("gpt2", vocab_size=vocabulary), data, LENGTH, K, tmp_path)
    cache.fill()
    assert cache.num_bytes == told == cache.path.stat().st_size
    with safe_open(cache.path, framework="np") as file:  # safetensors' own reader
        assert file.get_tensor("values").shape == (5, LENGTH - 1, K)
        assert file.get_tensor("indices").dtype.itemsize == index_bytes
        assert file.get_tensor("values").dtype == np.float16


def test_another_teacher_other_tokens_another_k_are_another_file(tiny_model, teacher, data, tmp_path):
    other_tokens = TrainData((*data.streams[:1], TokenStream.of(torch.arange(2 * LENGTH))), data.weights)
    # Neither what stays over, nor weights of the mix, nor how tokens are stored matter.
    same = TrainData(
        tuple(TokenStream.of(stream.read(0, len(stream) - 1)[0].int()) for stream in data.streams), (1.0, 9.0)
    )
    paths = [
        TeacherLogits(*given, tmp_path).path
        for given in (
            (teacher, data, LENGTH, K),
            (teacher, same, LENGTH, K),
            (tiny_model("gpt2", seed=1), data, LENGTH, K),
            (teacher, other_tokens, LENGTH, K),
            (teacher, data, LENGTH, K + 1),
            (teacher, data, LENGTH - 1, K),
        )
    ]
    paths.append(TeacherLogits(teacher, data, LENGTH, K, tmp_path, temperature=2.0).path)
    assert paths[0] == paths[1]
    assert len(set(paths)) == 6


def test_a_cache_that_was_broken_off_goes_on(teacher, data, tmp_path, monkeypatch):
    cache = TeacherLogits(teacher, data, LENGTH, K, tmp_path)

    def stop(done: int, of: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.fill(progress=stop)
    again = TeacherLogits(teacher, data, LENGTH, K, tmp_path)
    assert again.missing() == [2, 3, 4]
    with pytest.raises(kp.WorkError, match=r"window 3 of .* is missing or damaged: fill it again"):
        again.read([0, 3])
    read: list[Any] = []
    handle = teacher.register_forward_hook(lambda *_: read.append(1))
    again.fill()
    again.fill()
    handle.remove()
    assert len(read) == 3 + 2  # of the two calls each tries the head once
    fresh = TeacherLogits(teacher, data, LENGTH, K, tmp_path / "fresh")
    fresh.fill()
    assert again.path.read_bytes() == fresh.path.read_bytes()
    # What one has open is what another writes.
    torch.testing.assert_close(cache.read(range(5)), fresh.read(range(5)), rtol=0, atol=0)


def test_a_flipped_bit_is_a_missing_window_and_is_mended(teacher, data, tmp_path):
    cache = TeacherLogits(teacher, data, LENGTH, K, tmp_path)
    cache.fill()
    whole = cache.path.read_bytes()
    for place in range(1024, len(whole), 37):
        content = bytearray(whole)
        content[place] ^= 16
        cache.path.write_bytes(content)
        damaged = TeacherLogits(teacher, data, LENGTH, K, tmp_path)
        assert len(damaged.missing()) == 1
    damaged.fill()
    assert cache.path.read_bytes() == whole


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"x" + content[1:], lambda _: b""])
def test_a_file_that_is_no_cache_is_made_anew(teacher, data, tmp_path, damage):
    cache = TeacherLogits(teacher, data, LENGTH, K, tmp_path)
    cache.fill()
    whole = cache.path.read_bytes()
    cache.path.unlink()
    cache.path.write_bytes(damage(whole))
    again = TeacherLogits(teacher, data, LENGTH, K, tmp_path)
    assert len(again.missing()) == 5
    again.fill()
    assert again.path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [again.path]


def test_two_processes_fill_one_file(teacher, data, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()

    def fill(numbers: list[int]) -> None:
        barrier.wait(60)
        cache = TeacherLogits(teacher, data, LENGTH, K, tmp_path)
        cache.fill(numbers)
        results.put(True)

    processes = [context.Process(target=fill, args=(numbers,)) for numbers in ([0, 1, 2], [2, 3, 4])]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [True, True]
    for process in processes:
        process.join(60)
    fresh = TeacherLogits(teacher, data, LENGTH, K, tmp_path / "fresh")
    fresh.fill()
    filled = TeacherLogits(teacher, data, LENGTH, K, tmp_path)
    assert filled.missing() == []
    torch.testing.assert_close(filled.read(range(5)), fresh.read(range(5)))


# ---- what is refused ----


@pytest.mark.parametrize("k", [0, -1])
def test_k_is_at_least_one(teacher, data, tmp_path, k):
    with pytest.raises(kp.RequestError, match=f"teacher cache of {k} tokens at each position: allowed is 1 or more"):
        TeacherLogits(teacher, data, LENGTH, k, tmp_path)


def test_no_room_for_what_is_missing_is_told_before_anything_is_computed(teacher, data, tmp_path, monkeypatch):
    cache = TeacherLogits(teacher, data, LENGTH, K, tmp_path)
    cache.fill([0, 1])
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(kp.WorkError, match=r"the teacher's logits need 0.0 MB, and .* has 0.0 MB free"):
        cache.fill()
    assert cache.missing() == [2, 3, 4]
    cache.fill([0, 1])  # nothing is missing of these


def test_no_room_is_told_before_anything_is_computed(teacher, data, tmp_path, monkeypatch):
    def none_free(path: Path) -> Any:
        return type("Usage", (), {"free": 100})

    monkeypatch.setattr("shutil.disk_usage", none_free)
    with pytest.raises(kp.WorkError, match=r"the teacher's logits need 0.0 MB, and .* has 0.0 MB free"):
        TeacherLogits(teacher, data, LENGTH, K, tmp_path)


def test_a_disk_that_fills_up_keeps_what_is_done(teacher, data, tmp_path, monkeypatch):
    cache = TeacherLogits(teacher, data, LENGTH, K, tmp_path)
    write = TeacherLogits._write

    def full(self: Any, file: Any, number: int, top: Any) -> None:
        if number == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, file, number, top)

    monkeypatch.setattr(TeacherLogits, "_write", full)
    with pytest.raises(
        kp.WorkError, match=r"No space left on device; KRONPRESS_CACHE names .*; the windows .* are kept"
    ):
        cache.fill()
    assert cache.missing() == [3, 4]


def test_a_teacher_that_gives_nan_is_refused(teacher, data, tmp_path):
    with torch.no_grad():
        teacher.lm_head.weight[7, 3] = torch.nan
    cache = TeacherLogits(teacher, data, LENGTH, K, tmp_path)
    with pytest.raises(kp.WorkError, match=r"logits of window 0 hold NaN or infinity"):
        cache.fill()
    assert len(cache.missing()) == 5


def test_where_nothing_can_be_written_it_says_so(teacher, data, tmp_path):
    (tmp_path / "a file").write_text("")
    with pytest.raises(kp.WorkError, match=r"could not write the teacher's logits in .*a file.*KRONPRESS_CACHE"):
        TeacherLogits(teacher, data, LENGTH, K, tmp_path / "a file")


# ---- trainings that read it ----


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    """An empty cache; the folder of its file."""
    monkeypatch.setenv("KRONPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "teacher-logits"


def chats() -> TrainData:
    """Two streams by weight, of the first only every third token counts."""
    values = 2 * TOKENS[:1024] + (torch.arange(1024) % 3 == 0)
    masked = TokenStream([Piece(values.numpy().astype("uint16"), masked=True)])
    return TrainData((masked, TokenStream.of(TOKENS[:640] + 100)), (2.0, 1.0))


@pytest.mark.parametrize(
    ("changes", "data"),
    [
        ({"distillation_weight": 1.0}, TOKENS),
        ({"distillation_weight": 1.0, "temperature": 2.0}, TOKENS),
        ({"distillation_weight": 1.0, "temperature": 2.0, "distillation_top_k": 20}, TOKENS),
        ({"reverse_distillation_weight": 1.0, "jensen_shannon_weight": 2.0, "distillation_top_k": 299}, TOKENS),
        ({"distillation_weight": 1.0, "distillation_top_k": 5, "sequences_per_pass": 2, "chunk_tokens": 7}, TOKENS),
        ({"distillation_weight": 1.0, "distillation_top_k": 5, "chunk_tokens": 0}, TOKENS),
        ({"distillation_weight": 1.0, "distillation_top_k": 5, "sequences_per_pass": 1}, chats()),
        ({"schedule": {"distillation_weight": (0.0, 2.0), "language_model_weight": (1.0, 0.0)}}, TOKENS),
    ],
)
def test_a_training_from_the_cache_is_that_with_the_teacher(tiny_model, tiny_compressed, own_cache, changes, data):
    teacher = tiny_model("gpt2")
    students = [tiny_compressed("gpt2", "low_rank") for _ in range(2)]
    data = data if isinstance(data, TrainData) else TrainData.of(data[:333])  # less than an epoch, and some left over
    with_teacher = kp.heal_(
        students[0], teacher, TrainData(data.streams, data.weights, only_whole=True), schedule(**changes)
    )
    runs: list[int] = []
    handle = teacher.register_forward_hook(lambda *_: runs.append(1))
    healing = schedule(teacher_cache=True, **changes)
    from_cache = kp.heal_(students[1], teacher, data, healing)
    columns = {"loss", "language_model_nats", "distillation_nats", "reverse_distillation_nats", "jensen_shannon_nats"}
    for expected, found in zip(with_teacher.rows, from_cache.rows, strict=True):
        torch.testing.assert_close(
            {name: value for name, value in found.model_dump(include=columns).items() if value is not None},
            {name: value for name, value in expected.model_dump(include=columns).items() if value is not None},
            rtol=2e-3,
            atol=2e-4,
        )
    assert len(list(own_cache.iterdir())) == 1
    # A second training does not run the teacher at all.
    runs.clear()
    again = tiny_compressed("gpt2", "low_rank")
    told: list[str] = []
    kp.heal_(again, teacher, data, healing, messages=told.append)
    handle.remove()
    assert_same_weights(again, weights(students[1]))
    assert len(runs) <= 1  # how its head is found
    assert not any("the teacher reads" in each for each in told)


def test_the_size_and_what_is_missing_are_told_before_the_teacher_runs(tiny_model, tiny_compressed, own_cache):
    teacher, told = tiny_model("gpt2"), []

    def run(_: Any, __: Any, states: Any) -> None:
        if not isinstance(states[0], FakeTensor):  # as the estimate of memory has
            told.append("run")

    teacher.transformer.register_forward_hook(run)
    healing = schedule(distillation_weight=1.0, teacher_cache=True, distillation_top_k=K)
    kp.heal_(tiny_compressed("gpt2", "low_rank"), teacher, TOKENS, healing, messages=told.append)
    size = num_bytes(4096 // 16, 16, K, 300)
    (path,) = own_cache.iterdir()
    told = [each for each in told if not each.startswith("healing takes about ")]
    assert told[:2] == [
        f"the teacher's logits of 256 windows, 5 tokens at each position, take {size / 1e6:,.1f} MB: {str(path)!r}",
        "the teacher reads 24 of 24 windows; the cache has the others",  # of 6 steps of 4
    ]
    assert told.count("run") == 1 + 6


def test_a_training_whose_disk_is_too_small_is_refused_and_changes_nothing(
    tiny_model, tiny_compressed, own_cache, monkeypatch
):
    student = tiny_compressed("gpt2", "low_rank")
    before = weights(student)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(kp.WorkError, match=r"the teacher's logits need \d.* MB, and .*teacher-logits' has 0.0 MB free"):
        kp.heal_(student, tiny_model("gpt2"), TOKENS, schedule(distillation_weight=1.0, teacher_cache=True))
    assert_same_weights(student, before)
    assert not list(own_cache.iterdir())


def test_a_training_interrupted_while_the_teacher_reads_goes_on_there(tiny_model, tiny_compressed, own_cache, tmp_path):
    teacher, runs = tiny_model("gpt2"), []

    def run(*_: Any) -> None:
        runs.append(1)
        if len(runs) == 4:
            raise Interrupted

    handle = teacher.transformer.register_forward_pre_hook(run)
    healing = schedule(distillation_weight=1.0, teacher_cache=True, distillation_top_k=K)
    interrupted, whole = (tiny_compressed("gpt2", "low_rank") for _ in range(2))
    with pytest.raises(Interrupted):
        kp.heal_(interrupted, teacher, TOKENS, healing, work_dir=tmp_path / "work")
    told: list[str] = []
    kp.heal_(interrupted, teacher, TOKENS, healing, work_dir=tmp_path / "work", resume=True, messages=told.append)
    assert any(each.startswith("the teacher reads 16 of 24 windows") for each in told)
    assert len(runs) == 4 + 1 + 4
    handle.remove()
    (path,) = own_cache.iterdir()
    path.unlink()
    kp.heal_(whole, teacher, TOKENS, healing)
    assert_same_weights(interrupted, weights(whole))


def test_a_damaged_window_is_read_by_the_teacher_again(tiny_model, tiny_compressed, own_cache):
    teacher = tiny_model("gpt2")
    healing = schedule(distillation_weight=1.0, teacher_cache=True, distillation_top_k=K)
    kp.heal_(tiny_compressed("gpt2", "low_rank"), teacher, TOKENS[:333], healing)
    (path,) = own_cache.iterdir()
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 8]))
    told: list[str] = []
    kp.heal_(tiny_compressed("gpt2", "low_rank"), teacher, TOKENS[:333], healing, messages=told.append)
    assert "the teacher reads 1 of 20 windows; the cache has the others" in told
    assert path.read_bytes() == content


def test_the_teacher_is_where_it_was_and_as_it_was(tiny_model, tiny_compressed, own_cache):
    teacher = tiny_model("gpt2").train()
    before = weights(teacher)
    kp.heal_(
        tiny_compressed("gpt2", "low_rank"),
        teacher,
        TOKENS,
        schedule(distillation_weight=1.0, teacher_cache=True, distillation_top_k=K),
    )
    assert teacher.training
    assert teacher.device.type == "cpu"
    assert_same_weights(teacher, before)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, "teacher_cache is set, and no term compares with the teacher"),
        (
            {"distillation_weight": 1.0, "hidden_weight": 1.0},
            "teacher_cache keeps logits alone, and hidden_weight needs the teacher's inner states",
        ),
        ({"schedule": {"attention_weight": (1.0, 0.0)}}, "attention_weight needs the teacher's inner states"),
    ],
)
def test_what_a_cache_cannot_give_is_refused(changes, wanted):
    with pytest.raises(ValueError, match=wanted):
        Healing(max_steps=1, teacher_cache=True, **changes)


def test_a_run_uses_it(tiny_model, save_tiny_checkpoint, tiny_text, own_cache, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_tiny_checkpoint(tiny_model("gpt2"), tmp_path / "dense")
    Path("text.txt").write_text(tiny_text)
    changes = {
        "targets": "mlp",
        "budget.kept_of_targets": 0.5,
        "rivals": "[dense]",  # which is not distilled, and needs no teacher
        "healing.data": "text.txt",
        "healing.max_steps": 3,
        "healing.sequence_length": 16,
        "healing.distillation_weight": 1,
        "healing.distillation_top_k": 5,
        "healing.teacher_cache": "true",
        "evaluation.data": "text.txt",
    }
    words = [word for name, value in changes.items() for word in ("--set", f"{name}={value}")]
    assert cli.main(["run", "low-rank", "--set", "model=dense", *words, "--out", "out"]) == 0, capsys.readouterr().err
    assert "tokens at each position, take " in capsys.readouterr().err
    results = json.loads(Path("out/results.json").read_text())
    assert results["healing"]["rows"][0]["distillation_nats"] > 0
    assert len(list(own_cache.iterdir())) == 1
