"""The cache gives what tokenising anew would give, whoever asks, for however much, and after any damage."""

from __future__ import annotations

import copy
import errno
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from transformers import ByT5Tokenizer

import kronpress as kp
from kronpress.tokens import cache
from kronpress.tokens.cache import TokenFile, cached_tokens
from kronpress.tokens.reading import TEXT_COLUMN, Rows, Source, find_source

TEXTS = ["One line.", "", "Two lines,\nand an é.", " \n ", "The café stood on the corner."]
texts = st.lists(st.text("ab é.\n", max_size=12), max_size=12)


def source_of(documents: list[str], read: list[int] | None = None) -> Source:
    """A set of these documents, which notes in `read` the number of each that is asked for."""

    def values(first: int) -> Any:
        for number, document in enumerate(documents[first:], start=first):
            if read is not None:
                read.append(number)
            yield document

    return Source("made up", None, lambda: json.dumps(documents), lambda _: Rows(TEXT_COLUMN, values))


def direct(tokenizer: Any, documents: list[str]) -> list[int]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    written = [document for document in documents if document.strip()]
    return [t for document in written for t in (*tokenizer(document, add_special_tokens=False)["input_ids"], *end)]


def at_least(num_documents: int) -> Callable[[Any], int | None]:
    return lambda ends: num_documents if len(ends) >= num_documents else None


def nothing_is_enough(ends: Any) -> None:
    return None


def numbers(file: TokenFile) -> list[int]:
    return np.asarray(file.piece.values).tolist()


def the_file(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


@given(documents=texts, with_end=st.booleans())
@settings(max_examples=50, deadline=None)
def test_the_cache_equals_tokenising_directly(tiny_tokenizer, documents, with_end):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    if not with_end:
        tokenizer.eos_token = None
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):  # made, then found
            found = cached_tokens(tokenizer, source_of(documents), nothing_is_enough, Path(folder))
            assert numbers(found) == direct(tokenizer, documents)
            assert (found.is_complete, found.num_rows, found.piece.masked) == (True, len(documents), False)
            parts = np.split(np.asarray(found.piece.values), found.ends.astype(np.int64))[:-1]
            assert [part.tolist() for part in parts] == [direct(tokenizer, [d]) for d in documents if d.strip()]
        tensors = load_file(the_file(Path(folder)))  # safetensors' own reader
        assert tensors["tokens"].dtype == np.uint16
        assert (tensors["tokens"].tolist(), tensors["ends"].tolist()) == (numbers(found), found.ends.tolist())


@given(documents=texts, wanted=st.lists(st.integers(1, 12), min_size=1, max_size=5), portion=st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_a_cache_that_grows_reads_each_document_once_and_equals_one_made_at_once(
    tiny_tokenizer, documents, wanted, portion
):
    read: list[int] = []
    source = source_of(documents, read)
    written = [document for document in documents if document.strip()]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "DOCUMENTS_AT_ONCE", portion)
        for num_documents in wanted:
            found = cached_tokens(tiny_tokenizer, source, at_least(num_documents), Path(folder))
            assert found.is_complete or len(found.ends) >= num_documents
            assert numbers(found) == direct(tiny_tokenizer, written[: len(found.ends)])
        assert read == list(range(len(read)))  # in order, none twice
        # It stops within a portion of what is enough, but for blank ones.
        assert len(found.ends) < max(wanted) + portion
        assert len(list(Path(folder).glob("*.safetensors"))) == 1


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_damaged_file_is_made_anew(tiny_tokenizer, data):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = cached_tokens(tiny_tokenizer, source_of(TEXTS), nothing_is_enough, folder)
        path = the_file(folder)
        content = bytearray(path.read_bytes())
        if data.draw(st.booleans(), "cut off"):
            content = content[: data.draw(st.integers(0, len(content) - 1), "bytes left")]
        else:
            # The first 8 bytes, the header's length, are not used.
            place = data.draw(st.integers(8, len(content) - 1), "place")
            content[place] ^= 1 << data.draw(st.integers(0, 7), "bit")
        path.unlink()  # what is mapped stays as it was
        path.write_bytes(content)
        again = cached_tokens(tiny_tokenizer, source_of(TEXTS), nothing_is_enough, folder)
        assert numbers(again) == numbers(whole) == direct(tiny_tokenizer, TEXTS)
        assert (again.ends.tolist(), again.num_rows, again.is_complete) == (whole.ends.tolist(), 5, True)


def test_other_content_is_another_file(tiny_tokenizer, tmp_path):
    path = tmp_path / "data.txt"
    without_end, with_prefix = copy.deepcopy(tiny_tokenizer), copy.deepcopy(tiny_tokenizer)
    without_end.eos_token = None
    with_prefix.add_tokens(["One"])
    for number, text in enumerate(["One.", "Two.", "One, two."]):
        path.write_text(text)
        for tokenizer in (tiny_tokenizer, without_end, with_prefix):
            found = cached_tokens(tokenizer, find_source(str(path), "train"), nothing_is_enough, tmp_path / "cache")
            assert numbers(found) == direct(tokenizer, [text])
        assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 3 * (number + 1)


def test_what_a_tokenizer_was_asked_last_and_where_a_file_lies_do_not_matter(tiny_tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    for name in ("one.txt", "other.txt"):
        (tmp_path / name).write_text("The same.")
        cached_tokens(tokenizer, find_source(str(tmp_path / name), "train"), nothing_is_enough, tmp_path / "cache")
        tokenizer("the old man", truncation=True, max_length=2)
    the_file(tmp_path / "cache")


def test_a_tokenizer_in_python_has_a_key_as_well(tmp_path):
    for tokenizer, num_files in ((ByT5Tokenizer(), 1), (ByT5Tokenizer(), 1), (ByT5Tokenizer(extra_ids=7), 2)):
        found = cached_tokens(tokenizer, source_of(TEXTS), nothing_is_enough, tmp_path)
        assert numbers(found) == direct(tokenizer, TEXTS)
        assert len(list(tmp_path.glob("*.safetensors"))) == num_files


def test_large_ids_take_four_bytes(tiny_tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens([f"<{number}>" for number in range(2**16)])
    text = f"<{2**16 - 1}> and <0>"
    found = cached_tokens(tokenizer, source_of([text]), nothing_is_enough, tmp_path)
    assert numbers(found) == direct(tokenizer, [text])
    assert max(numbers(found)) >= 2**16
    assert load_file(the_file(tmp_path))["tokens"].dtype == np.uint32


@pytest.mark.parametrize("with_lock", [True, False])
def test_processes_that_build_at_once_all_have_the_whole(tiny_tokenizer, tmp_path, monkeypatch, with_lock):
    documents = [f"The old man number {number}." for number in range(300)]
    note, tokenised = tmp_path / "note", cache._tokenised

    def noting(*given: Any) -> Any:
        with note.open("a") as file:
            file.write("tokenised\n")
        return tokenised(*given)

    monkeypatch.setattr(cache, "_tokenised", noting)
    if not with_lock:
        monkeypatch.setattr(cache, "_alone", lambda path: nullcontext(path.parent.mkdir(exist_ok=True) is None))
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()

    def build() -> None:
        barrier.wait(60)
        found = cached_tokens(tiny_tokenizer, source_of(documents), nothing_is_enough, tmp_path / "cache")
        results.put(numbers(found))

    processes = [context.Process(target=build) for _ in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert found == [direct(tiny_tokenizer, documents)] * 3
    assert [path.suffix for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"] == [".safetensors"]
    if with_lock:
        assert note.read_text() == "tokenised\n"


def test_who_reads_keeps_the_shorter_file_when_it_grows(tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "DOCUMENTS_AT_ONCE", 1)
    documents = [f"The old man number {number}." for number in range(50)]
    short = cached_tokens(tiny_tokenizer, source_of(documents), at_least(3), tmp_path)
    long = cached_tokens(tiny_tokenizer, source_of(documents), at_least(40), tmp_path)
    assert numbers(short) == direct(tiny_tokenizer, documents[:3])
    assert numbers(long) == direct(tiny_tokenizer, documents[:40])


def test_an_interrupted_build_leaves_nothing(tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "DOCUMENTS_AT_ONCE", 1)
    source = source_of(TEXTS)

    def breaks_off(first: int) -> Any:
        yield from ["One.", "Two."]
        raise KeyboardInterrupt

    broken = Source(source.name, None, source.identity, lambda _: Rows(TEXT_COLUMN, breaks_off))
    with pytest.raises(KeyboardInterrupt):
        cached_tokens(tiny_tokenizer, broken, nothing_is_enough, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] in ([".lock"], [])
    found = cached_tokens(tiny_tokenizer, source, nothing_is_enough, tmp_path)
    assert numbers(found) == direct(tiny_tokenizer, TEXTS)


def test_without_a_folder_to_write_to_it_works_and_keeps_nothing(tiny_tokenizer, tmp_path):
    (tmp_path / "a file").write_text("")
    found = cached_tokens(tiny_tokenizer, source_of(TEXTS), nothing_is_enough, tmp_path / "a file" / "cache")
    assert numbers(found) == direct(tiny_tokenizer, TEXTS)
    assert [path.name for path in tmp_path.iterdir()] == ["a file"]


def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "DOCUMENTS_AT_ONCE", 1)
    cached_tokens(tiny_tokenizer, source_of(TEXTS), at_least(1), tmp_path)
    before = the_file(tmp_path).read_bytes()

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield

    monkeypatch.setattr(cache, "_tokenised", full)
    with pytest.raises(kp.WorkError, match=r"token cache in .* No space left on device; KRONPRESS_CACHE names"):
        cached_tokens(tiny_tokenizer, source_of(TEXTS), nothing_is_enough, tmp_path)
    assert the_file(tmp_path).read_bytes() == before


@given(lengths=st.lists(st.integers(0, 40), max_size=60), most=st.integers(1, 9), characters=st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_a_portion_of_texts_is_bounded_by_the_longest(lengths, most, characters):
    given_texts = ["x" * length for length in lengths]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "DOCUMENTS_AT_ONCE", most)
        patch.setattr(cache, "CHARACTERS_AT_ONCE", characters)
        portions = list(cache._portions(iter(given_texts)))
    assert [text for portion in portions for text in portion] == given_texts
    assert all(0 < len(portion) <= most for portion in portions)
    assert all(sum(map(len, portion[:-1])) < characters for portion in portions)


def test_the_folder_is_named_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("KRONPRESS_CACHE", str(tmp_path / "own"))
    assert cache.cache_folder("tokens") == tmp_path / "own" / "tokens"
    monkeypatch.delenv("KRONPRESS_CACHE")
    assert cache.cache_folder("tokens") == tmp_path / "xdg" / "kronpress" / "tokens"
    for useless in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", useless)
        assert cache.cache_folder("tokens") == Path("~/.cache/kronpress/tokens").expanduser()
