"""Text to tokens: built-in sets, Hub data sets, and local .txt, .jsonl and .parquet files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from datasets import Dataset, IterableDataset, load_dataset
from huggingface_hub import HfApi
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kronpress.errors import RequestError, WorkError

Split = Literal["train", "validation", "test"]

# The line between two documents of a text file.
DOCUMENT_END = "<|endoftext|>"
TEXT_COLUMN = "text"
SUFFIXES = (".txt", ".jsonl", ".parquet")
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
class Text:
    """Documents of one split, to be read once, and where exactly they came from."""

    name: str
    documents: Iterable[str]
    revision: str | None = None


def load_text(name: str, split: Split) -> Text:
    """The documents of a built-in set, of local files or of a Hub data set (`id` or `id@revision`).

    A `.txt` file is split into documents at lines that read `<|endoftext|>`; the other formats have one
    document in each row's column `text`.

    Raises:
        RequestError: no such file, a wrong suffix, or no column `text`.
        WorkError: the Hub could not be reached or a file is not UTF-8.
    """
    if name == "bundled":
        path = Path(str(resources.files("kronpress"))) / "pocket" / "text" / f"{BUNDLED_PARTS[split]}.txt"
        text = Text(name, _read_txt(path))
    elif name in BUILT_IN_SETS:
        text = _load_hub(name, BUILT_IN_SETS[name], split)
    elif name.endswith(SUFFIXES) or Path(name).exists():
        text = Text(name, _read_file(Path(name)))
    else:
        path_on_hub, _, revision = name.partition("@")
        text = _load_hub(name, HubSet(path_on_hub, revision=revision or None), split)
    return text


def _read_file(path: Path) -> Iterable[str]:
    if not path.is_file():
        raise RequestError(f"data {str(path)!r}: no such file")
    if path.suffix == ".txt":
        return _read_txt(path)
    if path.suffix not in SUFFIXES:
        raise RequestError(f"data {str(path)!r}: the suffix must be one of {', '.join(SUFFIXES)}")
    try:
        rows = Dataset.from_json(str(path)) if path.suffix == ".jsonl" else Dataset.from_parquet(str(path))
        return list(_column(rows, TEXT_COLUMN, str(path)))
    except RequestError:
        raise
    except Exception as error:  # datasets, pyarrow and json raise classes of their own
        raise WorkError(f"data {str(path)!r} is damaged or no {path.suffix} file: {_first_line(error)}") from error


def _read_txt(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise WorkError(
            f"data {str(path)!r} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}"
        ) from error
    documents: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line == DOCUMENT_END:
            documents.append([])
        else:
            documents[-1].append(line)
    return ["\n".join(lines) for lines in documents]


def _load_hub(name: str, hub_set: HubSet, split: Split) -> Text:
    try:
        revision = HfApi().dataset_info(hub_set.path, revision=hub_set.revision).sha
        rows = load_dataset(hub_set.path, hub_set.config, split=split, revision=revision, streaming=True)
    except Exception as error:  # the network, the Hub and datasets raise classes of their own
        known = (
            "" if name in BUILT_IN_SETS else f" is no built-in set (bundled, {', '.join(BUILT_IN_SETS)}) or file, and"
        )
        raise WorkError(
            f"data {name!r}{known} could not be had from the Hub as {hub_set.path!r}: {_first_line(error)}"
        ) from error
    return Text(name, _column(rows, hub_set.column, name), revision)


def _column(rows: Dataset | IterableDataset, column: str, name: str) -> Iterable[str]:
    if column not in (rows.column_names or [column]):
        raise RequestError(f"data {name!r} has no column {column!r}; it has {', '.join(rows.column_names)}")
    return (_checked_text(row[column], number, column, name) for number, row in enumerate(rows))


def _checked_text(value: object, number: int, column: str, name: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"data {name!r}: row {number} of column {column!r} is {value!r}, not text")
    return value


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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


def load_train_tokens(tokenizer: PreTrainedTokenizerBase, data: str | list[str], num_tokens: int) -> Tensor:
    """At least `num_tokens` token ids (num_tokens + some,) of the training splits in `data`, or all there are.

    Every document is followed by the tokenizer's end token, if it has one; blank ones are left out. Several sets
    follow one another. Of a Hub set only as many documents are read as are needed.

    Raises:
        RequestError: there is no text in it.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    names = [data] if isinstance(data, str) else data
    documents = (document for name in names for document in load_text(name, "train").documents if document.strip())
    parts: list[Tensor] = []
    while sum(map(len, parts)) < num_tokens and (some := list(islice(documents, 1000))):
        # verbose: the tokenizer's warning about texts longer than the model does not apply to a stream.
        ids = tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]
        parts.append(torch.tensor([token for one in ids for token in (*one, *end)], dtype=torch.int32))
    if not parts:
        raise RequestError(f"data {', '.join(map(repr, names))} (train): there is no text in it")
    return torch.cat(parts)


def pack(tokens: Tensor, sequence_length: int) -> Tensor:
    """Consecutive windows (num_sequences, sequence_length); a last window that is not full is left out.

    >>> pack(torch.arange(7), 3).tolist()
    [[0, 1, 2], [3, 4, 5]]

    Raises:
        RequestError: there are fewer tokens than one window.
    """
    num_sequences = len(tokens) // sequence_length
    if num_sequences == 0:
        raise RequestError(f"{len(tokens)} tokens of text are less than one sequence of {sequence_length}")
    return tokens[: num_sequences * sequence_length].view(num_sequences, sequence_length)
