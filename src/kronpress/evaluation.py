"""How well a model predicts a text, under a protocol that every result names.

A protocol says which token ids are read in one piece (a `Row`), which of them are predicted, and what is averaged.
Figures of different protocols cannot be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from kronpress.errors import RequestError, WorkError, unknown_name
from kronpress.tokens import join_documents

# Rows are batched while the logits of one forward pass stay within so many numbers.
_MAX_LOGITS = 2**25
# The default window of models with very long contexts, whose logits would not fit in memory.
LONGEST_DEFAULT_WINDOW = 2048
KRONY_WINDOW = 1024
_NOT_SCORED = -100  # as a target; cross_entropy leaves it out


class EvaluationResult(BaseModel):
    """One model on one text under one protocol.

    `num_tokens` tokens were scored, and `nll_sum_nats` is their negative log-likelihood. `nll_mean_nats` is the mean
    that the protocol takes: over tokens (`window`), over the windows' own means (`krony`), or over the sums of
    the last words (`lambada-last-word`). What a protocol does not define is None.
    """

    model_config = ConfigDict(frozen=True)

    protocol: str
    window: int
    stride: int | None  # None: one row for each passage
    bos: bool
    num_tokens: int
    num_bytes: int | None  # UTF-8, of the part of the text that is scored; `window` only
    num_words: int | None  # whitespace-separated ones of the text, or the last words
    nll_sum_nats: float
    nll_mean_nats: float
    accuracy: float | None = None  # fraction of the last words that are right; `lambada-last-word` only

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood; comparable only under one tokenizer and protocol."""
        return math.exp(self.nll_mean_nats)

    @property
    def word_perplexity(self) -> float | None:
        """exp of the summed negative log-likelihood over words; None if there are too few words for a finite one."""
        if not self.num_words:
            return None
        try:
            return math.exp(self.nll_sum_nats / self.num_words)
        except OverflowError:  # text without spaces is one long word
            return None

    @property
    def bits_per_byte(self) -> float | None:
        """Negative log-likelihood in bits over bytes of text: comparable between tokenizers."""
        return self.nll_sum_nats / math.log(2) / self.num_bytes if self.num_bytes else None

    def to_json(self) -> dict[str, float | int | bool | str | None]:
        """All fields and the three figures derived from them."""
        derived = {
            "perplexity": self.perplexity,
            "word_perplexity": self.word_perplexity,
            "bits_per_byte": self.bits_per_byte,
        }
        return {**self.model_dump(), **derived}


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[str],
    protocol: str = "window",
    window: int | None = None,
    stride: int | None = None,
    bos: bool | None = None,
) -> EvaluationResult:
    """Negative log-likelihood of `text` under a causal language model, by one of three protocols.

    `window`: the model reads `window` tokens at a time, each window `stride` tokens further on, and is scored on
    those tokens that no earlier window was scored on; the mean weighs every token the same.

    `krony`, that of Krony-PT (arXiv 2412.12351): windows of 1024 tokens that do not overlap, no BOS; each is scored
    on its own tokens but the first, and the perplexity is exp of the mean of the windows' mean losses, a shorter last
    window weighing as much as the others. A last window of one token predicts nothing and is left out.

    `lambada-last-word`, that of lm-evaluation-harness for LAMBADA: of each passage the tokens of the last word, with
    the space before it, are predicted from what comes before. The perplexity is exp of the mean over passages of
    the word's summed negative log-likelihood; the accuracy is the fraction of passages in which each of the
    word's tokens was the likeliest.

    Args:
        text: a text, or documents: `window` and `krony` join them by two newlines, to `lambada-last-word` each one is
            a passage (blank ones are left out).
        window: the most tokens read at a time; if None the model's own limit, at most 1024 for `krony` and 2048
            otherwise. A passage that is longer loses tokens at its beginning.
        stride: `window` only: tokens from one window to the next; `window` if None, so that they do not overlap.
        bos: put the tokenizer's beginning-of-sequence token before the text or passage; if None, with the protocol
            `window` whenever the tokenizer has one, so that the first token is scored as well, and with
            `lambada-last-word` if the tokenizer itself begins texts with it.

    Raises:
        RequestError: an unknown protocol, a window, stride or BOS that it or the model does not allow, or a text with
            nothing to predict.
        WorkError: the model gives logits that are not finite.
    """
    if protocol not in PROTOCOLS:
        raise unknown_name("protocol", protocol, PROTOCOLS)
    check_vocabulary(model, tokenizer)
    was_training = model.training
    model.eval()
    try:
        result = PROTOCOLS[protocol](model, tokenizer, text, window, stride, bos)
    finally:
        model.train(was_training)
    if not math.isfinite(result.nll_sum_nats):
        raise WorkError("the model's loss on the text is not finite: its weights or activations hold NaN or infinity")
    return result


def longest_context(model: nn.Module) -> int | None:
    """Positions that the model's configuration allows; None if it names no limit."""
    return _text_setting(model, "max_position_embeddings")


def num_embeddings(model: nn.Module) -> int | None:
    """Token ids that the model knows; None if it has no configuration."""
    return _text_setting(model, "vocab_size")


def _text_setting(model: nn.Module, name: str) -> int | None:
    config = getattr(model, "config", None)
    if isinstance(config, PreTrainedConfig):
        config = config.get_text_config()  # of a model for text and images, say
    return getattr(config, name, None)


def check_vocabulary(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """RequestError if the tokenizer knows tokens that the model has no embedding for."""
    vocab_size = num_embeddings(model)
    if vocab_size is not None and len(tokenizer) > vocab_size:
        raise RequestError(f"the tokenizer has {len(tokenizer)} tokens and the model {vocab_size}: they do not fit")


def _checked_window(model: nn.Module, window: int | None) -> int:
    limit = longest_context(model)
    if window is None:
        if limit is None:
            raise RequestError("the model's configuration names no longest context: give a window")
        return min(limit, LONGEST_DEFAULT_WINDOW)
    if window < 1 or (limit is not None and window > limit):
        raise RequestError(f"window {window}: must be between 1 and the model's {limit or 'longest context'}")
    return window


def scored_windows(num_ids: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(first input, end of inputs, targets scored) of each window over `num_ids` token ids.

    The window reads ids[first:end] and predicts ids[first + 1:end + 1], of which the last so many are scored.

    >>> list(scored_windows(num_ids=8, window=4, stride=3))
    [(0, 4, 4), (3, 7, 3)]
    """
    scored_until = 0  # the last id that has been scored
    first = 0
    while scored_until < num_ids - 1:
        end = min(first + window, num_ids - 1)
        yield first, end, end - scored_until
        scored_until = end
        first += stride


class Row(NamedTuple):
    """Token ids (length,) read in one piece; the last `num_scored` are predicted, each from all before it."""

    ids: Tensor
    num_scored: int


def rows_at_once(model: nn.Module, length: int) -> int:
    """How many rows of `length` tokens one forward pass may take."""
    return max(1, _MAX_LOGITS // (length * (num_embeddings(model) or 2**16)))


@torch.no_grad()
def _score(model: nn.Module, rows: Iterable[Row], length: int) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood in nats, and whether every scored token was the likeliest; both (num_rows,).

    Rows shorter than their neighbours are padded on the right, where a causal model does not look.

    Args:
        length: that of the longest row.
    """
    device = next(model.parameters()).device
    rows = iter(rows)
    nll, likeliest = [], []
    while batch := list(islice(rows, rows_at_once(model, length))):
        inputs = pad_sequence([row.ids[:-1] for row in batch], batch_first=True)
        targets = torch.full_like(inputs, _NOT_SCORED)  # (rows, inputs of the longest)
        for number, (ids, num_scored) in enumerate(batch):
            targets[number, len(ids) - 1 - num_scored : len(ids) - 1] = ids[len(ids) - num_scored :]
        inputs, targets = inputs.to(device), targets.to(device)
        logits = model(input_ids=inputs, use_cache=False).logits
        token_nll = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        nll.append(token_nll.view_as(targets).cpu().double().sum(dim=1))
        likeliest.append(((logits.argmax(dim=-1) == targets) | (targets == _NOT_SCORED)).all(dim=1).cpu())
    return torch.cat(nll), torch.cat(likeliest)


def _token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose: the tokenizer's warning about texts longer than the model does not apply to windows.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _check_length(ids: list[int]) -> None:
    if len(ids) < 2:
        raise RequestError(f"the text has {len(ids)} tokens: at least 2 are needed to predict one from another")


def _check_bos(tokenizer: PreTrainedTokenizerBase, bos: bool) -> None:
    if bos and tokenizer.bos_token_id is None:
        raise RequestError("bos is asked for, and the tokenizer has no beginning-of-sequence token")


def _window(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[str],
    window: int | None,
    stride: int | None,
    bos: bool | None,
) -> EvaluationResult:
    window = _checked_window(model, window)
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise RequestError(f"stride {stride}: must be between 1 and the window, {window}")
    bos = tokenizer.bos_token_id is not None if bos is None else bos
    _check_bos(tokenizer, bos)
    text = join_documents(text)
    ids = _token_ids(tokenizer, text)
    num_bytes = len(text.encode())
    if bos:
        ids = [tokenizer.bos_token_id, *ids]
    elif ids:
        num_bytes -= len(str(tokenizer.decode(ids[:1])).encode())
    _check_length(ids)
    stream = torch.tensor(ids)
    windows = scored_windows(len(ids), window, stride)
    nll, _ = _score(model, (Row(stream[first : end + 1], scored) for first, end, scored in windows), window)
    num_tokens = len(ids) - 1
    return EvaluationResult(
        protocol="window",
        window=window,
        stride=stride,
        bos=bos,
        num_tokens=num_tokens,
        num_bytes=num_bytes,
        num_words=len(text.split()),
        nll_sum_nats=nll.sum().item(),
        nll_mean_nats=nll.sum().item() / num_tokens,
    )


def _krony(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[str],
    window: int | None,
    stride: int | None,
    bos: bool | None,
) -> EvaluationResult:
    if window is None:
        # The result says so where the model reads less, and no table puts it beside the published 1024.
        window = min(KRONY_WINDOW, longest_context(model) or KRONY_WINDOW)
    window = _checked_window(model, window)
    if window < 2:
        raise RequestError(f"window {window}: in protocol krony at least 2, since a window's first token is not scored")
    if stride not in (None, window):
        raise RequestError(f"stride {stride}: in protocol krony it is the window, {window}")
    if bos:
        raise RequestError("bos is asked for, and protocol krony has none")
    ids = _token_ids(tokenizer, join_documents(text))
    _check_length(ids)
    pieces = [piece for piece in torch.tensor(ids).split(window) if len(piece) > 1]
    nll, _ = _score(model, [Row(piece, len(piece) - 1) for piece in pieces], window)
    scored = torch.tensor([len(piece) - 1 for piece in pieces])
    return EvaluationResult(
        protocol="krony",
        window=window,
        stride=window,
        bos=False,
        num_tokens=int(scored.sum()),
        num_bytes=None,
        num_words=None,
        nll_sum_nats=nll.sum().item(),
        nll_mean_nats=(nll / scored).mean().item(),
    )


def _last_word(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[str],
    window: int | None,
    stride: int | None,
    bos: bool | None,
) -> EvaluationResult:
    if isinstance(text, str):
        raise RequestError("protocol lambada-last-word takes a list of passages, and was given one text")
    if stride is not None:
        raise RequestError(f"stride {stride}: protocol lambada-last-word has none, it reads each passage once")
    window = _checked_window(model, window)
    if bos is None:
        bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    _check_bos(tokenizer, bos)
    start = [tokenizer.bos_token_id] if bos else []
    rows = []
    for passage in text:
        if passage.strip():
            context, word = _context_and_last_word(tokenizer, passage.rstrip())
            if len(word) > window:
                raise RequestError(f"window {window}: the last word of {passage[-40:]!r} has {len(word)} tokens")
            rows.append(Row(torch.tensor([*start, *context, *word])[-(window + 1) :], len(word)))
    if not rows:
        raise RequestError("there is no passage in the text")
    rows.sort(key=lambda row: len(row.ids), reverse=True)  # neighbours of one length need little padding
    nll, likeliest = _score(model, rows, len(rows[0].ids))
    return EvaluationResult(
        protocol="lambada-last-word",
        window=window,
        stride=None,
        bos=bos,
        num_tokens=sum(row.num_scored for row in rows),
        num_bytes=None,
        num_words=len(rows),
        nll_sum_nats=nll.sum().item(),
        nll_mean_nats=nll.mean().item(),
        accuracy=likeliest.double().mean().item(),
    )


def _context_and_last_word(tokenizer: PreTrainedTokenizerBase, passage: str) -> tuple[list[int], list[int]]:
    """Token ids of the passage up to its last space, and those that the whole passage has beyond them."""
    context = passage.rpartition(" ")[0].rstrip()
    if not context:
        raise RequestError(f"passage {passage[:40]!r}: there is nothing before the last word to predict it from")
    context_ids = _token_ids(tokenizer, context)
    word_ids = _token_ids(tokenizer, passage)[len(context_ids) :]
    if not context_ids or not word_ids:
        raise RequestError(
            f"passage ending {passage[-40:]!r}: of the last word the tokenizer makes {len(word_ids)} tokens, of what "
            f"comes before {len(context_ids)}; at least 1 of each is needed"
        )
    return context_ids, word_ids


_Protocol = Callable[
    [nn.Module, PreTrainedTokenizerBase, str | Sequence[str], int | None, int | None, bool | None], EvaluationResult
]
PROTOCOLS: dict[str, _Protocol] = {"window": _window, "krony": _krony, "lambada-last-word": _last_word}
