"""The cached logits are the teacher's, and the cache survives what may happen to it."""

from __future__ import annotations

import errno
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import kronpress as kp
from kronpress.healing.losses import log_distributions
from kronpress.healing.teacher_logits import TeacherLogits, log_distribution, num_bytes, top_logits
from kronpress.tokens import TokenStream, TrainData

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


# ---- the numbers ----


@given(
    vocabulary=st.integers(2, 40),
    part=st.floats(0, 1),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
    seed=st.integers(0, 999),
)
@settings(max_examples=100, deadline=None)
def test_top_logits_are_those_of_sorting_and_leave_the_rest(vocabulary, part, scale, seed):
    k = 1 + int(part * (vocabulary - 2))
    logits = scale * torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(seed))
    top = top_logits(logits, k)
    p, order = logits.double().softmax(-1).sort(descending=True)
    torch.testing.assert_close(top.values.double(), p[:, :k].log(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(top.indices, order[:, :k])
    torch.testing.assert_close(top.log_rest.double(), p[:, k:].sum(-1).log(), rtol=1e-4, atol=1e-4)
    whole = log_distribution(top)
    torch.testing.assert_close(whole, log_distributions(logits, logits, top_k=k)[1], rtol=1e-4, atol=1e-4)
    for temperature in (0.5, 2.0):
        powers = whole.double().exp() ** (1 / temperature)
        softened = log_distribution(top, temperature).double().exp()
        torch.testing.assert_close(softened, powers / powers.sum(-1, keepdim=True), rtol=1e-4, atol=1e-6)


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
    torch.testing.assert_close(log_distribution(found).exp().sum(-1), torch.ones(3, LENGTH - 1))


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
    assert paths[0] == paths[1]
    assert len(set(paths)) == 5


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
    assert len(read) == 3
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


@pytest.mark.parametrize("k", [0, 300, 301])
def test_k_is_less_than_the_vocabulary(teacher, data, tmp_path, k):
    with pytest.raises(kp.RequestError, match=f"teacher cache of {k} tokens at each position: allowed is 1 to 299"):
        TeacherLogits(teacher, data, LENGTH, k, tmp_path)


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
    with pytest.raises(kp.WorkError, match=r"logits of windows \[0\] hold NaN or infinity"):
        cache.fill()
    assert len(cache.missing()) == 5


def test_where_nothing_can_be_written_it_says_so(teacher, data, tmp_path):
    (tmp_path / "a file").write_text("")
    with pytest.raises(kp.WorkError, match=r"could not write the teacher's logits in .*a file.*KRONPRESS_CACHE"):
        TeacherLogits(teacher, data, LENGTH, K, tmp_path / "a file")
