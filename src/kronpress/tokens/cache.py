"""Each set tokenised once: files of token ids in the user's cache, mapped into memory.

A file is named after all that decides what is in it: the set at its commit, or its file's content, the tokenizer's
content, the chat template, and this format. It holds the first documents of its set, as many as anyone has needed so
far. It is never changed: a longer one takes its name in one step, and who still reads the shorter one keeps it. So
correctness depends on no lock; there is one only so that of several processes one tokenises and the others wait for it.

The format is safetensors with `tokens` and `ends`, of each document the number of tokens up to its end.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from kronpress.errors import WorkError
from kronpress.tokens.chat import chat_template, encode_chat
from kronpress.tokens.reading import CHAT_COLUMN, TEXT_COLUMN, Rows, Source, checked_texts
from kronpress.tokens.streams import Piece

# What is stored and how; part of every key.
FORMAT = 1
FOLDER_VARIABLE = "KRONPRESS_CACHE"
DOCUMENTS_AT_ONCE, CHARACTERS_AT_ONCE = 1000, 4_000_000
_METADATA = "kronpress.tokens"
_HEADER_BYTES = 1024
_READ_BYTES = 2**20

# The number of tokens up to the end of each document -> how many documents are enough; None if these are not.
Enough = Callable[[np.ndarray[Any, Any]], int | None]


def cache_folder(kind: str) -> Path:
    """$KRONPRESS_CACHE/kind, else $XDG_CACHE_HOME/kronpress/kind, by default in ~/.cache."""
    if named := os.environ.get(FOLDER_VARIABLE):
        return Path(named).expanduser() / kind
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path("~/.cache").expanduser()) / "kronpress" / kind


@dataclass(frozen=True, eq=False)
class TokenFile:
    """The tokens of a set's first `num_rows` rows, mapped into memory; `ends` (num_documents,) are held.

    Blank documents are rows without an end. `is_complete` says that the set has no further row.
    """

    piece: Piece
    ends: np.ndarray[Any, Any]
    num_rows: int
    is_complete: bool


def cached_tokens(
    tokenizer: PreTrainedTokenizerBase, source: Source, enough: Enough, folder: Path | None = None
) -> TokenFile:
    """The tokens of the set's first documents, from the cache: as many as are `enough`, and perhaps more; or all.

    Every text is followed by the tokenizer's end token, if it has one; blank ones are left out. A conversation is
    exactly what the chat template writes. A damaged file is made anew. Where the cache cannot be written the file has
    no name and lives as long as this process uses it.

    Args:
        folder: that of the cache; `cache_folder("tokens")` if None.

    Raises:
        RequestError: the set has neither text nor conversations, or they cannot be tokenised.
        WorkError: the set could not be read, or the disk is full.
    """
    folder = cache_folder("tokens") if folder is None else folder
    path = folder / f"{_key(tokenizer, source)}.safetensors"

    def suffices(known: TokenFile | None) -> bool:
        return known is not None and (known.is_complete or enough(known.ends) is not None)

    known = _opened(path)
    if not suffices(known):
        with _alone(path) as is_writable:
            if is_writable:
                known = _opened(path)  # another process may have made it meanwhile
            if not suffices(known):
                with _new_file(path if is_writable else None) as file:
                    _write(file, known, tokenizer, source, enough)
                    known = _read(file)
    assert known is not None
    return known


def _key(tokenizer: PreTrainedTokenizerBase, source: Source) -> str:
    facts = [FORMAT, source.identity(), _content(tokenizer), tokenizer.eos_token_id, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _content(tokenizer: PreTrainedTokenizerBase) -> str:
    """All that decides which tokens a text becomes, as text."""
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
        # These two are of the last call and not of the tokenizer.
        return json.dumps({**content, "truncation": None, "padding": None}, sort_keys=True)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return json.dumps({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files})


@contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """While no other process makes this file; False where no file can be made in its folder at all."""
    lock = FileLock(path.with_suffix(".lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError):
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


@contextmanager
def _new_file(path: Path | None) -> Iterator[BinaryIO]:
    """A file to write and then to read, which has its name at the end; one that never has one for None."""
    where = tempfile.gettempdir() if path is None else str(path.parent)
    try:
        if path is None:
            # Closed when nothing is mapped from it any longer.
            yield tempfile.TemporaryFile()  # type: ignore[misc]  # noqa: SIM115
            return
        partial = path.with_name(f".{path.stem}.partial-{os.getpid()}")
        try:
            with partial.open("w+b") as file:
                yield file
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise WorkError(
            f"could not write the token cache in {where!r}: {error}; {FOLDER_VARIABLE} names another folder"
        ) from error


# ---- what is in a file ----


def _write(
    file: BinaryIO, known: TokenFile | None, tokenizer: PreTrainedTokenizerBase, source: Source, enough: Enough
) -> None:
    """The tokens of `known`, and behind them those of the rows that follow, until there are enough."""
    rows = source.open((TEXT_COLUMN, CHAT_COLUMN))
    dtype = _dtype(tokenizer, rows.are_chats)
    digest = hashlib.sha256()
    ends, num_rows, num_tokens = array("Q"), 0, 0
    file.seek(_HEADER_BYTES)

    def put(numbers: np.ndarray[Any, Any]) -> None:
        content = numbers.tobytes()
        file.write(content)
        digest.update(content)

    if known is not None:
        ends, num_rows, num_tokens = array("Q", known.ends.tobytes()), known.num_rows, len(known.piece.values)
        for begin in range(0, num_tokens, _READ_BYTES):
            put(known.piece.values[begin : begin + _READ_BYTES])
    is_complete = True
    for numbers, counts, num_read in _tokenised(tokenizer, source.name, rows, num_rows):
        put(np.asarray(numbers, dtype=dtype))
        for count in counts:
            num_tokens += count
            ends.append(num_tokens)
        num_rows += num_read
        if len(ends) and enough(np.frombuffer(ends, dtype=np.uint64)) is not None:
            is_complete = False
            break
    put(np.array(ends, dtype="<u8"))
    facts = {
        "format": FORMAT,
        "source": source.name,
        "num_rows": num_rows,
        "is_complete": is_complete,
        "masked": rows.are_chats,
    }
    middle = num_tokens * dtype.itemsize
    entries = {
        "tokens": {"dtype": f"U{8 * dtype.itemsize}", "shape": [num_tokens], "data_offsets": [0, middle]},
        "ends": {"dtype": "U64", "shape": [len(ends)], "data_offsets": [middle, middle + 8 * len(ends)]},
    }
    metadata = {_METADATA: json.dumps({**facts, "sha256": _checksum(digest, facts, entries)})}
    header = json.dumps({"__metadata__": metadata, **entries}).encode()
    file.seek(0)
    file.write((_HEADER_BYTES - 8).to_bytes(8, "little") + header.ljust(_HEADER_BYTES - 8))
    file.flush()


def _dtype(tokenizer: PreTrainedTokenizerBase, masked: bool) -> np.dtype[Any]:
    largest = max(tokenizer.get_vocab().values(), default=0)
    return np.dtype("<u2" if (2 * largest + 1 if masked else largest) < 2**16 else "<u4")


def _tokenised(
    tokenizer: PreTrainedTokenizerBase, name: str, rows: Rows, first: int
) -> Iterator[tuple[list[int], list[int], int]]:
    """What is stored of some rows after others from `first` on: numbers, how many of each document, how many rows."""
    if rows.are_chats:
        chat_template(tokenizer, name)
        conversations = enumerate(rows.values(first), start=first)
        while some := list(islice(conversations, DOCUMENTS_AT_ONCE)):
            encoded = [encode_chat(tokenizer, each, f"data {name!r}: row {number}") for number, each in some]
            pairs = [[2 * token + counts for token, counts in zip(*each, strict=True)] for each in encoded]
            yield [number for pair in pairs for number in pair], [len(pair) for pair in pairs], len(some)
        return
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for texts in _portions(checked_texts(name, rows, first)):
        written = [text for text in texts if text.strip()]
        # verbose: the tokenizer's warning about texts longer than the model does not apply to a stream.
        ids = tokenizer(written, add_special_tokens=False, verbose=False)["input_ids"] if written else []
        yield [token for one in ids for token in (*one, *end)], [len(one) + len(end) for one in ids], len(texts)


def _portions(texts: Iterator[str]) -> Iterator[list[str]]:
    """Some texts after others, so that no portion is much longer than CHARACTERS_AT_ONCE or the longest text."""
    some: list[str] = []
    size = 0
    for text in texts:
        some.append(text)
        size += len(text)
        if len(some) == DOCUMENTS_AT_ONCE or size >= CHARACTERS_AT_ONCE:
            yield some
            some, size = [], 0
    if some:
        yield some


def _opened(path: Path) -> TokenFile | None:
    """What is in the file; None if there is none, or it is damaged or of another format."""
    try:
        with path.open("rb") as file:
            return _read(file)
    except (OSError, AttributeError, KeyError, TypeError, ValueError):
        return None


def _read(file: BinaryIO) -> TokenFile:
    file.seek(8)
    entries = json.loads(file.read(_HEADER_BYTES - 8))
    facts = json.loads(entries.pop("__metadata__")[_METADATA])
    checksum = facts.pop("sha256")
    digest = hashlib.sha256()
    while content := file.read(_READ_BYTES):
        digest.update(content)
    if facts["format"] != FORMAT or checksum != _checksum(digest, facts, entries):
        raise ValueError("damaged")
    dtype = np.dtype(f"<u{int(entries['tokens']['dtype'][1:]) // 8}")
    (num_tokens,), (num_documents,) = entries["tokens"]["shape"], entries["ends"]["shape"]
    file.seek(_HEADER_BYTES + entries["ends"]["data_offsets"][0])
    ends = np.frombuffer(file.read(8 * num_documents), dtype="<u8")
    if num_tokens:
        values: np.ndarray[Any, Any] = np.memmap(file, dtype, "r", _HEADER_BYTES, shape=(num_tokens,))
    else:  # nothing cannot be mapped
        values = np.empty(0, dtype)
    return TokenFile(Piece(values, facts["masked"]), ends, facts["num_rows"], facts["is_complete"])


def _checksum(digest: Any, facts: dict[str, Any], entries: dict[str, Any]) -> str:
    """SHA-256 in hex of the numbers, which `digest` has taken in, and of what the header says of them."""
    whole = digest.copy()
    whole.update(json.dumps([facts, entries]).encode())
    return str(whole.hexdigest())
