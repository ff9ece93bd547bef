"""How well a model predicts a text, under a protocol that every result names."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from kronpress.errors import RequestError, WorkError, unknown_name

PROTOCOLS = ("window",)
# Windows are batched while the logits of one forward pass stay within so many numbers.
_MAX_LOGITS = 2**25
# The default window of models with very long contexts, whose logits would not fit in memory.
LONGEST_DEFAULT_WINDOW = 2048


class EvaluationResult(BaseModel):
    """One model on one text under one protocol.

    Every token is scored exactly once; without a beginning-of-sequence token (`bos` False) the first one has no
    context and is left out. `num_bytes` are the UTF-8 bytes of the scored part of the text.
    """

    model_config = ConfigDict(frozen=True)

    protocol: str
    window: int
    stride: int
    bos: bool
    num_tokens: int
    num_bytes: int
    nll_sum_nats: float

    @property
    def nll_mean_nats(self) -> float:
        """Mean negative log-likelihood of a token, every token weighing the same."""
        return self.nll_sum_nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood; comparable only under one tokenizer and protocol."""
        return math.exp(self.nll_mean_nats)

    @property
    def bits_per_byte(self) -> float:
        """Negative log-likelihood in bits over bytes of text: comparable between tokenizers."""
        return self.nll_sum_nats / math.log(2) / self.num_bytes

    def to_json(self) -> dict[str, float | int | bool | str]:
        """All fields and the three figures derived from them."""
        derived = {
            "nll_mean_nats": self.nll_mean_nats,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
        }
        return {**self.model_dump(), **derived}


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    protocol: str = "window",
    window: int | None = None,
    stride: int | None = None,
    bos: bool | None = None,
) -> EvaluationResult:
    """Negative log-likelihood of `text` under a causal language model.

    Protocol `window`: the model reads `window` tokens at a time, each window `stride` tokens further on, and is
    scored on those tokens that no earlier window was scored on; the mean weighs every token the same.

    Args:
        window: tokens of context; if None, the model's own limit, at most 2048.
        stride: tokens from one window to the next; `window` if None, so that windows do not overlap.
        bos: put the tokenizer's beginning-of-sequence token before the text, so that the first token is scored
            as well; if None, whenever the tokenizer has one.

    Raises:
        RequestError: an unknown protocol, an impossible window or stride, or a text of fewer than two tokens.
        WorkError: the model gives logits that are not finite.
    """
    if protocol not in PROTOCOLS:
        raise unknown_name("protocol", protocol, PROTOCOLS)
    window = _checked_window(model, window)
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise RequestError(f"stride {stride}: must be between 1 and the window, {window}")
    if bos is None:
        bos = tokenizer.bos_token_id is not None
    if bos and tokenizer.bos_token_id is None:
        raise RequestError("bos is asked for, and the tokenizer has no beginning-of-sequence token")

    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    check_vocabulary(model, tokenizer)
    num_bytes = len(text.encode())
    if bos:
        ids = [tokenizer.bos_token_id, *ids]
    elif ids:
        num_bytes -= len(str(tokenizer.decode(ids[:1])).encode())
    if len(ids) < 2:
        raise RequestError(f"the text has {len(ids)} tokens: at least 2 are needed to predict one from another")

    was_training = model.training
    model.eval()
    try:
        nll_sum = _nll_sum(model, torch.tensor(ids), window, stride)
    finally:
        model.train(was_training)
    if not math.isfinite(nll_sum):
        raise WorkError("the model's loss on the text is not finite: its weights or activations hold NaN or infinity")
    return EvaluationResult(
        protocol=protocol,
        window=window,
        stride=stride,
        bos=bos,
        num_tokens=len(ids) - 1,
        num_bytes=num_bytes,
        nll_sum_nats=nll_sum,
    )


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


@torch.no_grad()
def _nll_sum(model: nn.Module, ids: Tensor, window: int, stride: int) -> float:
    device = next(model.parameters()).device
    batch: list[tuple[int, int, int]] = []
    total = torch.zeros((), dtype=torch.float64)
    batch_size = max(1, _MAX_LOGITS // (window * (num_embeddings(model) or 2**16)))

    def score(batch: list[tuple[int, int, int]]) -> Tensor:
        inputs = torch.stack([ids[first:end] for first, end, _ in batch]).to(device)
        targets = torch.stack([ids[first + 1 : end + 1] for first, end, _ in batch]).to(device)
        for row, (_, _, scored) in enumerate(batch):
            targets[row, : targets.shape[1] - scored] = -100  # not counted by cross_entropy
        logits = model(input_ids=inputs, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum").double().cpu()

    for one in scored_windows(len(ids), window, stride):
        # Only the last window can be shorter than the others.
        if batch and (len(batch) == batch_size or one[1] - one[0] != batch[0][1] - batch[0][0]):
            total += score(batch)
            batch = []
        batch.append(one)
    total += score(batch)
    return total.item()
