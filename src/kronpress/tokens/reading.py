"""Where text is: built-in sets, Hub data sets, and local .txt, .jsonl and .parquet files, row by row."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Literal

from datasets import IterableDataset, load_dataset
from huggingface_hub import HfApi
from pyarrow import ArrowException
from pyarrow.parquet import ParquetFile

from kronpress.errors import RequestError, WorkError

Split = Literal["train", "validation", "test"]

# The line between two documents of a text file.
DOCUMENT_END = "<|endoftext|>"
TEXT_COLUMN, CHAT_COLUMN = "text", "messages"
SUFFIXES = (".txt", ".jsonl", ".parquet")
_ROWS_AT_ONCE = 1000
BUNDLED_PARTS = {"train": "heal", "validation": "validation", "test": "test"}


@dataclass(frozen=True)
class HubSet:
    """A data set on the Hugging Face Hub: where its text is, and at which revision, the newest if None."""

    path: str
    config: str | None = None
    revision: str | None = None
    column: str = TEXT_COLUMN


_WIKITEXT_REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"
BUILT_IN_SETS: dict[str, HubSet] = {
    "wikitext2": HubSet("Salesforce/wikitext", "wikitext-2-raw-v1", _WIKITEXT_REVISION),
    "wikitext103": HubSet("Salesforce/wikitext", "wikitext-103-raw-v1", _WIKITEXT_REVISION),
    # With rare words as <unk>: what Krony-PT measures on.
    "wikitext2-unk": HubSet("Salesforce/wikitext", "wikitext-2-v1", _WIKITEXT_REVISION),
    "wikitext103-unk": HubSet("Salesforce/wikitext", "wikitext-103-v1", _WIKITEXT_REVISION),
    # GPT-2's version, which lm-evaluation-harness has too; the original, in lower case, is `cimec/lambada`.
    "lambada": HubSet("EleutherAI/lambada_openai", "default"),
    # The set itself is a script, which `datasets` no longer runs; this is the Hub's own conversion of it.
    "ptb": HubSet("ptb-text-only/ptb_text_only", revision="refs/convert/parquet", column="sentence"),
    "openwebtext": HubSet("Skylion007/openwebtext", revision="b4325f019c648b1641a1784748667e8b74e5e064"),
}


@dataclass(frozen=True)
class Rows:
    """The rows of one split: what each holds in `column`, from any row on."""

    column: str
    values: Callable[[int], Iterator[object]]

    @property
    def are_chats(self) -> bool:
        """Whether a row is a conversation, a list of messages, and not a text."""
        return self.column == CHAT_COLUMN


@dataclass(frozen=True)
class Source:
    """One split of a set, found but not read.

    `identity` is of its content: equal identities, equal rows; a file is read once for it. `open` takes the columns
    that will do, of which the first that is there is read, and raises what `load_text` does.
    """

    name: str
    revision: str | None
    identity: Callable[[], str]
    open: Callable[[tuple[str, ...]], Rows]


def find_source(name: str, split: Split) -> Source:
    """Where the rows of a built-in set, of a local file or of a Hub data set (`id` or `id@revision`) are.

    A `.txt` file is split into documents at lines that read `<|endoftext|>`; the others have one in each row.

    Raises:
        RequestError: no such file, or a wrong suffix.
        WorkError: the Hub, which says what the newest commit is, could not be reached.
    """
    if name == "bundled":
        path = Path(str(resources.files("kronpress"))) / "pocket" / "text" / f"{BUNDLED_PARTS[split]}.txt"
        return _file_source(name, path)
    if name in BUILT_IN_SETS:
        return _hub_source(name, BUILT_IN_SETS[name], split)
    if name.endswith(SUFFIXES) or Path(name).exists():
        return _file_source(name, Path(name))
    path_on_hub, _, revision = name.partition("@")
    return _hub_source(name, HubSet(path_on_hub, revision=revision or None), split)


@dataclass(frozen=True)
class Text:
    """Documents of one split, to be read once, and where exactly they came from."""

    name: str
    documents: Iterable[str]
    revision: str | None = None


def load_text(name: str, split: Split) -> Text:
    """The documents that `find_source` finds under this name, one in each row of column `text`.

    Raises:
        RequestError: no such file, a wrong suffix, or no column `text`.
        WorkError: the Hub could not be reached; or, as the documents are read, a file is damaged or not UTF-8.
    """
    source = find_source(name, split)
    return Text(name, checked_texts(name, source.open((TEXT_COLUMN,))), source.revision)


def checked_texts(name: str, rows: Rows, first: int = 0) -> Iterator[str]:
    """The rows from number `first` on, of which each has to be a text."""
    for number, value in enumerate(rows.values(first), start=first):
        if not isinstance(value, str):
            raise RequestError(f"data {name!r}: row {number} of column {rows.column!r} is {value!r}, not text")
        yield value


# ---- files ----


def _file_source(name: str, path: Path) -> Source:
    if not path.is_file():
        raise RequestError(f"data {str(path)!r}: no such file")
    if path.suffix not in SUFFIXES:
        raise RequestError(f"data {str(path)!r}: the suffix must be one of {', '.join(SUFFIXES)}")

    def identity() -> str:
        with path.open("rb") as file:
            return f"{path.suffix} {hashlib.file_digest(file, 'sha256').hexdigest()}"

    def open_rows(columns: tuple[str, ...]) -> Rows:
        if path.suffix == ".txt":
            return Rows(TEXT_COLUMN, lambda first: islice(_txt_documents(path), first, None))
        found = _jsonl_columns(path) if path.suffix == ".jsonl" else _parquet_columns(path)
        column = _chosen(columns, found, str(path))
        read = _jsonl_column if path.suffix == ".jsonl" else _parquet_column
        return Rows(column, lambda first: islice(read(path, column), first, None))

    return Source(name, None, identity, open_rows)


def _lines(path: Path) -> Iterator[str]:
    """The text's lines, with any kind of line end: what follows the last one is a line too, if only an empty one."""
    last = ""
    try:
        with path.open(encoding="utf-8") as file:
            for last in file:
                if last.endswith("\n"):
                    yield last[:-1]
    except UnicodeDecodeError:
        place, value = _first_wrong_byte(path)
        raise WorkError(f"data {str(path)!r} is not UTF-8: byte {place} is {value:#04x}") from None
    yield "" if last.endswith("\n") else last


def _first_wrong_byte(path: Path) -> tuple[int, int]:
    """Where the file is not UTF-8, and what stands there: a decoder of pieces counts from where its piece begins."""
    before = 0
    with path.open("rb") as file:
        for line in file:  # the byte of a line's end is part of no other character
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return before + error.start, line[error.start]
            before += len(line)
    raise WorkError(f"data {str(path)!r} changed while it was read")


def _txt_documents(path: Path) -> Iterator[str]:
    document: list[str] = []
    for line in _lines(path):
        if line == DOCUMENT_END:
            yield "\n".join(document)
            document = []
        else:
            document.append(line)
    yield "\n".join(document)


def _jsonl_objects(path: Path) -> Iterator[dict[str, object]]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise WorkError(f"data {str(path)!r} is damaged or no .jsonl file: line {number}: {error}") from error
        if not isinstance(row, dict):
            raise WorkError(f"data {str(path)!r} is damaged or no .jsonl file: line {number} is no object {{...}}")
        yield row


def _jsonl_columns(path: Path) -> list[str]:
    first = next(_jsonl_objects(path), None)
    if first is None:
        raise RequestError(f"data {str(path)!r}: there is no row in it")
    return list(first)


def _jsonl_column(path: Path, column: str) -> Iterator[object]:
    return (row.get(column) for row in _jsonl_objects(path))


@contextmanager
def _parquet(path: Path) -> Iterator[ParquetFile]:
    try:
        with ParquetFile(path) as file:
            yield file
    except (OSError, ArrowException) as error:
        raise WorkError(f"data {str(path)!r} is damaged or no .parquet file: {_first_line(error)}") from error


def _parquet_columns(path: Path) -> list[str]:
    with _parquet(path) as file:
        return list(file.schema_arrow.names)


def _parquet_column(path: Path, column: str) -> Iterator[object]:
    with _parquet(path) as file:
        for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=[column]):
            yield from batch.column(0).to_pylist()


# ---- the Hub ----


def _hub_source(name: str, hub_set: HubSet, split: Split) -> Source:
    revision = hub_set.revision
    # A whole commit needs nobody to say which it is.
    if revision is None or not re.fullmatch("[0-9a-f]{40}", revision):
        with _asking(name, hub_set):
            revision = HfApi().dataset_info(hub_set.path, revision=revision).sha

    def open_rows(columns: tuple[str, ...]) -> Rows:
        with _asking(name, hub_set):
            rows = load_dataset(hub_set.path, hub_set.config, split=split, revision=revision, streaming=True)
            found = list(rows.column_names or next(iter(rows), {}))
        column = _chosen(columns if hub_set.column == TEXT_COLUMN else (hub_set.column,), found, name)
        return Rows(column, lambda first: _hub_column(name, rows, column, first))

    return Source(name, revision, lambda: f"{hub_set.path} {hub_set.config} {revision} {split}", open_rows)


def _hub_column(name: str, rows: IterableDataset, column: str, first: int) -> Iterator[object]:
    number = first
    try:
        for row in rows.skip(first) if first else rows:
            yield row[column]
            number += 1
    except Exception as error:  # the network, the Hub and datasets raise classes of their own
        raise WorkError(f"data {name!r} could be read to row {number}, not further: {_first_line(error)}") from error


@contextmanager
def _asking(name: str, hub_set: HubSet) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the network, the Hub and datasets raise classes of their own
        known = (
            "" if name in BUILT_IN_SETS else f" is no built-in set (bundled, {', '.join(BUILT_IN_SETS)}) or file, and"
        )
        raise WorkError(
            f"data {name!r}{known} could not be had from the Hub as {hub_set.path!r} ('bundled' and .txt, .jsonl and "
            f".parquet files need no Hub): {_first_line(error)}"
        ) from error


def _chosen(columns: tuple[str, ...], found: list[str], name: str) -> str:
    for column in columns:
        if column in found:
            return column
    raise RequestError(f"data {name!r} has no column {' or '.join(map(repr, columns))}; it has {', '.join(found)}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---- what a model is evaluated on ----


@dataclass(frozen=True)
class RunningText:
    """One split, read whole: what a model is evaluated on."""

    name: str
    documents: list[str]
    revision: str | None

    @property
    def text(self) -> str:
        """All documents as one."""
        return join_documents(self.documents)


def load_running_text(name: str, split: Split) -> RunningText:
    """Like `load_text`, with all documents read.

    Raises:
        RequestError: there is no text in it.
    """
    text = load_text(name, split)
    documents = list(text.documents)
    if not any(document.strip() for document in documents):
        raise RequestError(f"data {name!r} ({split}): there is no text in it")
    return RunningText(name, documents, text.revision)


def join_documents(text: str | Sequence[str]) -> str:
    """The documents as one text with two newlines between them, as is usual for WikiText; one text is left as it is.

    >>> join_documents(["= Title =", "A line."])
    '= Title =\\n\\nA line.'
    """
    return text if isinstance(text, str) else "\n\n".join(text)
