"""Text becomes the documents and token streams it says it becomes, from wherever it comes."""

from __future__ import annotations

import copy
import json
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st

import kronpress as kp
from kronpress.tokens import load_text, pack, reading
from kronpress.tokens.reading import BUILT_IN_SETS, DOCUMENT_END, SUFFIXES

DOCUMENTS = ["One line.", "Two lines,\nand an é.", "The <|end|> is not the end."]
LINES = st.lists(st.text("ab é.", max_size=6), min_size=1, max_size=3).map("\n".join)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write_txt(path: Path, documents: list[str]) -> str:
    path.write_text(f"\n{DOCUMENT_END}\n".join(documents), encoding="utf-8")
    return str(path)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    Dataset.from_list(rows).to_parquet(path)
    return str(path)


def write(folder: Path, suffix: str, documents: list[str]) -> str:
    if suffix == ".txt":
        return write_txt(folder / "data.txt", documents)
    rows = [{"text": document, "number": number} for number, document in enumerate(documents)]
    return (write_jsonl if suffix == ".jsonl" else write_parquet)(folder / f"data{suffix}", rows)


# ---- local files ----


@given(st.lists(LINES, min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_txt_is_split_at_separator_lines_and_nowhere_else(documents):
    with tempfile.TemporaryDirectory() as folder:
        name = write_txt(Path(folder) / "data.txt", documents)
        assert list(load_text(name, "train").documents) == documents


def test_a_separator_within_a_line_separates_nothing(tmp_path):
    text = f"a {DOCUMENT_END}\n{DOCUMENT_END} b\nc{DOCUMENT_END}d"
    (tmp_path / "data.txt").write_text(text)
    assert list(load_text(str(tmp_path / "data.txt"), "train").documents) == [text]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_every_format_gives_the_same_documents(tmp_path, suffix, split):
    name = write(tmp_path, suffix, DOCUMENTS)
    text = load_text(name, split)
    assert (text.name, text.revision) == (name, None)
    assert list(text.documents) == DOCUMENTS
    whole = kp.load_running_text(name, split)
    assert (whole.name, whole.documents, whole.revision) == (name, DOCUMENTS, None)
    assert whole.text == "\n\n".join(DOCUMENTS)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_is_not_there_is_a_wrong_request(tmp_path, suffix):
    name = str(tmp_path / f"none{suffix}")
    with pytest.raises(kp.RequestError, match=f"{re.escape(repr(name))}: no such file"):
        load_text(name, "train")


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    path = tmp_path / "data.txt"
    path.write_bytes(b"caf\xc3\xa9 caf\xe9 caf\xc3\xa9")
    with pytest.raises(kp.WorkError, match=r"data\.txt' is not UTF-8: byte 9 is 0xe9") as failure:
        list(load_text(str(path), "train").documents)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("content", [b"", b" \n\n \t\n"])
def test_a_file_without_text_cannot_be_evaluated_on(tmp_path, content):
    (tmp_path / "data.txt").write_bytes(content)
    with pytest.raises(kp.RequestError, match=r"data\.txt' \(test\): there is no text in it"):
        kp.load_running_text(str(tmp_path / "data.txt"), "test")


@pytest.mark.parametrize(
    "content", [b"", b'{"text": "fine"}\n{"text": \n', b'{"text": "caf\xe9"}\n'], ids=["empty", "cut off", "latin-1"]
)
def test_a_damaged_jsonl_file_is_named_in_one_sentence(tmp_path, content):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises((kp.RequestError, kp.WorkError), match=re.escape(str(path))) as failure:
        list(load_text(str(path), "train").documents)
    assert "\n" not in str(failure.value)


def test_a_damaged_parquet_file_is_named_in_one_sentence(tmp_path):
    path = tmp_path / "data.parquet"
    path.write_bytes(b"PAR1 and then nothing of the kind")
    with pytest.raises((kp.RequestError, kp.WorkError), match=re.escape(str(path))) as failure:
        list(load_text(str(path), "train").documents)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("writer", [write_jsonl, write_parquet])
def test_a_missing_column_names_those_that_are_there(tmp_path, writer):
    name = writer(tmp_path / f"data.{writer.__name__.removeprefix('write_')}", [{"body": "a", "title": "b"}])
    with pytest.raises(kp.RequestError, match="no column 'text'; it has body, title"):
        load_text(name, "train")


def test_another_suffix_is_refused_with_those_allowed(tmp_path):
    (tmp_path / "data.csv").write_text("text\nhello\n")
    with pytest.raises(kp.RequestError, match=r"data\.csv': the suffix must be one of \.txt, \.jsonl, \.parquet"):
        load_text(str(tmp_path / "data.csv"), "train")


# ---- the bundled text ----


def test_bundled_text_is_three_disjoint_parts_of_about_three_megabytes():
    parts = {}
    for split in ("train", "validation", "test"):
        parts[split] = kp.load_running_text("bundled", split).text
    num_bytes = {split: len(text.encode()) for split, text in parts.items()}
    assert 2.5e6 < sum(num_bytes.values()) < 3.5e6
    assert min(num_bytes.values()) > 3e5
    assert max(num_bytes, key=num_bytes.__getitem__) == "train"
    long_lines = {split: {line for line in text.splitlines() if len(line) >= 50} for split, text in parts.items()}
    assert min(map(len, long_lines.values())) > 1000
    for one, other in [("train", "validation"), ("train", "test"), ("validation", "test")]:
        assert not long_lines[one] & long_lines[other]


# ---- token streams ----


@pytest.fixture
def endless(monkeypatch, tmp_path) -> list[str]:
    """Hub sets of 5000 short documents; those read so far. Nothing of them is in the cache."""
    read: list[str] = []

    class Set:
        column_names = ("text",)

        def __init__(self, name: str, first: int = 0) -> None:
            self.name, self.first = name, first

        def skip(self, first: int) -> Any:
            return Set(self.name, first)

        def __iter__(self) -> Any:
            for number in range(self.first, 5000):
                read.append(f"{self.name}/{number}")
                yield {"text": "the old man"}

    monkeypatch.setenv("KRONPRESS_CACHE", str(tmp_path))
    monkeypatch.setattr(reading, "load_dataset", lambda path, *_, split, **__: Set(f"{path}/{split}"))
    monkeypatch.setattr(reading, "HfApi", Hub)
    return read


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("end", [0, None])
def test_every_document_ends_with_the_end_token_if_there_is_one(tmp_path, tiny_tokenizer, end):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.eos_token = None if end is None else "<|endoftext|>"
    names = [write(tmp_path, ".txt", DOCUMENTS), write(tmp_path, ".jsonl", ["The last one."])]
    stream = kp.load_train_tokens(tokenizer, names, 10**6)
    rest = [] if end is None else [end]
    assert stream.tolist() == [t for each in (*DOCUMENTS, "The last one.") for t in (*ids_of(tokenizer, each), *rest)]


def test_only_the_documents_that_are_needed_are_read(endless, tiny_tokenizer, tmp_path):
    per_document = len(ids_of(tiny_tokenizer, "the old man")) + 1
    for num_tokens in (1, 10, 1500 * per_document):
        endless.clear()
        stream = kp.load_train_tokens(tiny_tokenizer, "set", num_tokens, cache=tmp_path / str(num_tokens))
        assert len(stream) >= num_tokens
        assert len(endless) <= num_tokens / per_document + 1000
    assert endless[0] == "set/train/0"


def test_a_set_of_which_more_is_asked_is_read_on_from_there(endless, tiny_tokenizer, tmp_path):
    per_document = len(ids_of(tiny_tokenizer, "the old man")) + 1
    for num_documents in (1, 2500, 1500, 4999):
        stream = kp.load_train_tokens(tiny_tokenizer, "set", num_documents * per_document, tmp_path)
        assert len(stream) == -(-num_documents // 1000) * 1000 * per_document
    assert endless == [f"set/train/{number}" for number in range(5000)]


def test_sets_follow_one_another_and_the_end_is_all_there_is(endless, tiny_tokenizer):
    per_document = len(ids_of(tiny_tokenizer, "the old man")) + 1
    stream = kp.load_train_tokens(tiny_tokenizer, ["one", "two"], 10**9)
    assert len(stream) == 10_000 * per_document
    assert endless == [f"{name}/train/{number}" for name in ("one", "two") for number in range(5000)]


@pytest.mark.parametrize("text", ["", "\n \n", "<|endoftext|>\n\n<|endoftext|>"])
def test_training_on_no_text_is_refused(tiny_tokenizer, tmp_path, text):
    (tmp_path / "empty.txt").write_text(text)
    with pytest.raises(kp.RequestError, match=r"empty.txt' \(train\): there is no text in it"):
        kp.load_train_tokens(tiny_tokenizer, str(tmp_path / "empty.txt"), 10)


def test_blank_documents_leave_no_end_behind(tiny_tokenizer, tmp_path):
    (tmp_path / "with.txt").write_text("One.\n<|endoftext|>\n \n<|endoftext|>\nTwo.")
    (tmp_path / "without.txt").write_text("One.\n<|endoftext|>\nTwo.")
    streams = [kp.load_train_tokens(tiny_tokenizer, str(tmp_path / f"{name}.txt"), 99) for name in ("with", "without")]
    assert streams[0].tolist() == streams[1].tolist()


@given(num_tokens=st.integers(0, 200), length=st.integers(1, 50))
@settings(max_examples=100, deadline=None)
def test_pack_cuts_the_stream_and_loses_only_the_rest(num_tokens, length):
    stream = torch.arange(num_tokens)
    if num_tokens < length:
        with pytest.raises(kp.RequestError, match=f"{num_tokens} tokens .* one sequence of {length}"):
            pack(stream, length)
        return
    sequences = pack(stream, length)
    assert sequences.shape == (num_tokens // length, length)
    torch.testing.assert_close(sequences.flatten(), stream[: num_tokens - num_tokens % length])


# ---- the Hub ----

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Stands for HfApi and load_dataset; notes what is asked of them."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        rows = [{"text": "from the Hub", "sentence": "of it"}, {"text": "again", "sentence": "once more"}]
        self.rows: Any = Dataset.from_list(rows).to_iterable_dataset()

    def dataset_info(self, path: str, revision: str | None = None) -> SimpleNamespace:
        self.asked.append(("info", path, revision))
        return SimpleNamespace(sha=revision if revision and len(revision) == 40 else SHA)

    def load_dataset(self, path: str, config: str | None, *, split: str, revision: str, streaming: bool) -> Any:
        self.asked.append(("load", path, config, split, revision, streaming))
        return self.rows


@pytest.fixture
def hub(monkeypatch) -> Hub:
    stand_in = Hub()
    monkeypatch.setattr(reading, "HfApi", lambda: stand_in)
    monkeypatch.setattr(reading, "load_dataset", stand_in.load_dataset)
    return stand_in


@pytest.mark.parametrize("name", BUILT_IN_SETS)
def test_built_in_sets_are_read_at_one_commit_which_is_pinned_or_recorded(hub, name):
    known = BUILT_IN_SETS[name]
    commit = known.revision if re.fullmatch("[0-9a-f]{40}", known.revision or "") else SHA
    assert (commit == SHA) == (name in ("lambada", "ptb"))
    text = load_text(name, "test")
    assert list(text.documents) == (["of it", "once more"] if name == "ptb" else ["from the Hub", "again"])
    assert (text.name, text.revision) == (name, commit)
    # A whole commit needs no question.
    asked = [("info", known.path, known.revision)] if commit == SHA else []
    assert hub.asked == [*asked, ("load", known.path, known.config, "test", commit, True)]


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("wikitext2", "wikitext-2-raw-v1"),
        ("wikitext2-unk", "wikitext-2-v1"),
        ("wikitext103", "wikitext-103-raw-v1"),
        ("wikitext103-unk", "wikitext-103-v1"),
    ],
)
def test_wikitext_is_raw_unless_it_says_unk(name, config):
    assert (BUILT_IN_SETS[name].path, BUILT_IN_SETS[name].config) == ("Salesforce/wikitext", config)


@pytest.mark.parametrize(
    ("name", "revision", "resolved"), [("someone/set", None, SHA), ("someone/set@v1.0", "v1.0", SHA)]
)
def test_a_hub_set_is_read_at_one_commit_and_reports_it(hub, name, revision, resolved):
    text = load_text(name, "train")
    assert text.revision == resolved
    assert hub.asked == [("info", "someone/set", revision), ("load", "someone/set", None, "train", resolved, True)]
    assert kp.load_running_text(name, "train").revision == resolved


def test_a_hub_set_without_text_is_a_wrong_request(hub):
    hub.rows = Dataset.from_list([{"sentence": "a"}]).to_iterable_dataset()
    with pytest.raises(kp.RequestError, match="'someone/set' has no column 'text'; it has sentence"):
        load_text("someone/set", "train")


def test_a_set_at_a_whole_commit_is_not_asked_for_twice(hub, tiny_tokenizer, tmp_path):
    tokens = [kp.load_train_tokens(tiny_tokenizer, f"someone/set@{SHA}", 99, tmp_path) for _ in range(2)]
    assert tokens[0].tolist() == tokens[1].tolist()
    assert hub.asked == [("load", "someone/set", None, "train", SHA, True)]


def test_a_hub_that_fails_while_it_is_read_says_how_far_it_got(hub, tiny_tokenizer, tmp_path):
    def rows() -> Any:
        yield {"text": "from the Hub"}
        raise ConnectionError("gone,\nsaid at length")

    hub.rows = IterableDataset.from_generator(rows)
    with pytest.raises(kp.WorkError, match=r"'someone/set' could be read to row 1, not further: gone,$"):
        kp.load_train_tokens(tiny_tokenizer, "someone/set", 99, tmp_path)


@pytest.mark.parametrize("failing", ["dataset_info", "load_dataset"])
def test_a_failing_hub_is_one_sentence(hub, monkeypatch, failing):
    def fail(*_: Any, **__: Any) -> Any:
        raise ValueError("no such thing,\nsaid at length")

    monkeypatch.setattr(*((hub, failing) if failing == "dataset_info" else (reading, failing)), fail)
    with pytest.raises(kp.WorkError, match=r"'someone/set'.* no such thing,$") as failure:
        load_text("someone/set", "train")
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("name", ["wikitext2", "someone/set"])
def test_offline_the_hub_is_out_of_reach(name):
    with pytest.raises(kp.WorkError, match=f"data '{name}'.* could not be had from the Hub"):
        load_text(name, "test")
