"""The yardstick for `pocket`: a Kneser-Ney 5-gram model over pocket's tokens, fitted on pocket's training text.

    python scripts/ngram_baseline.py --work DIR --total-tokens 70200000 > benchmarks/results/pocket_ngram.json

DIR/tokens.bin is written by `python scripts/train_pocket.py tokens`. The model is the interpolated modified
Kneser-Ney model of Chen & Goodman (1999, "An empirical study of smoothing techniques for language modeling"): it
is counted, nothing in it is tuned, and so nothing is chosen by the books it is measured on. They are scored as
`kronpress.evaluate` scores them, except that contexts are not cut at windows.

Legend: h context, w token, k order (a k-gram is h of k − 1 tokens and then w), c count, D discount.
A k-gram is one int64, 12 bits for each token, the oldest on top: sorting puts k-grams of equal h together.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from kronpress.checkpoint import model_path
from kronpress.tokens import load_running_text

ORDER = 5
TOKEN_BITS = 12
# For an order with too few k-grams to estimate its discounts; pocket's text has enough for all.
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)
# The training run of train_pocket.py whose windows `seen_tokens` finds again.
CONTEXT_TOKENS, SEQUENCES_PER_STEP, SEED = 256, 16, 0

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def ngrams(ids: NDArray[np.integer], k: int) -> Ints:
    """The k-grams (len(ids) − k + 1,) of a stream of token ids, in their order; none of a shorter stream."""
    num_grams = max(len(ids) - k + 1, 0)
    grams = np.zeros(num_grams, dtype=np.int64)
    for place in range(k):
        grams <<= TOKEN_BITS
        grams |= ids[place : place + num_grams]
    return grams


def discounts(counts: NDArray[np.integer]) -> tuple[float, ...]:
    """D_1, D_2 and D_3+ as Chen & Goodman estimate them from how many k-grams have the counts 1, 2, 3 and 4."""
    n1, n2, n3, n4 = np.bincount(counts[counts <= 4], minlength=5)[1:].tolist()
    if min(n1, n2, n3, n4) > 0:
        y = n1 / (n1 + 2 * n2)
        estimated = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
        if min(estimated) >= 0:
            return estimated
    return FALLBACK_DISCOUNTS


@dataclass(frozen=True)
class Order:
    """One order of the model: p_k(w | h) = max(c(hw) − D, 0) / c(h) + spare(h) · p_{k−1}(w | h without its first).

    `grams` and `counts` are (num_grams,), sorted by gram; `contexts`, `totals` c(h) and `spare` (num_contexts,).
    """

    discounts: tuple[float, ...]
    grams: Ints
    counts: NDArray[np.integer]
    contexts: Ints
    totals: Ints
    spare: Floats

    @classmethod
    def of(cls, grams: Ints, counts: NDArray[np.integer]) -> Order:
        contexts = grams >> TOKEN_BITS
        firsts = np.flatnonzero(np.diff(contexts, prepend=-1))
        taken = np.array(discounts(counts))[np.minimum(counts, 3) - 1]
        totals = np.add.reduceat(counts, firsts)
        spare = np.add.reduceat(taken, firsts) / totals
        return cls(discounts(counts), grams, counts, contexts[firsts], totals, spare)

    def interpolate(self, grams: Ints, lower: Floats) -> Floats:
        """p_k of each k-gram (num,) from p_{k−1} (num,), which stands where the context was never seen."""
        place, known = _find(grams, self.grams)
        c = np.where(known, self.counts[place], 0)
        kept = np.maximum(c - np.array([0.0, *self.discounts])[np.minimum(c, 3)], 0)
        place, known = _find(grams >> TOKEN_BITS, self.contexts)
        return np.where(known, kept / self.totals[place] + self.spare[place] * lower, lower)


def _find(wanted: Ints, table: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    """Where in the sorted table each value is, and whether it is there at all."""
    place = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
    return place, table[place] == wanted


@dataclass(frozen=True)
class KneserNey:
    """The orders of the model, unigrams first; below them all tokens are equally probable."""

    vocab_size: int
    orders: list[Order]

    @classmethod
    def fit(cls, grams: Ints, vocab_size: int) -> KneserNey:
        """From all 5-grams (num,) of a text. Lower orders count in how many different (k + 1)-grams theirs end."""
        orders = []
        for k in range(ORDER, 0, -1):
            grams, counts = np.unique(grams, return_counts=True)
            orders.append(Order.of(grams, counts.astype(np.int32)))
            grams = grams & ((1 << (k - 1) * TOKEN_BITS) - 1)  # without their first token
        return cls(vocab_size, orders[::-1])

    def probabilities(self, ids: NDArray[np.integer]) -> Floats:
        """p(ids[i] | up to four ids before it) for each i from 1 on: (len(ids) − 1,)."""
        p = np.full(len(ids) - 1, 1 / self.vocab_size)
        for k, order in enumerate(self.orders, start=1):
            grams = ngrams(ids[1:] if k == 1 else ids, k)
            reached = p[len(p) - len(grams) :]  # the first tokens have fewer than k − 1 before them
            reached[:] = order.interpolate(grams, reached)
        return p


def seen_tokens(num_tokens: int, total_tokens: int) -> NDArray[np.bool_]:
    """Which tokens (num_tokens,) of the stream are in a window that `train_pocket.py train` reads."""
    starts = np.random.default_rng(SEED).permutation((num_tokens - 1) // CONTEXT_TOKENS) * CONTEXT_TOKENS
    num_windows = total_tokens // (SEQUENCES_PER_STEP * CONTEXT_TOKENS) * SEQUENCES_PER_STEP
    if not 0 < num_windows <= len(starts):
        raise SystemExit(f"{total_tokens} tokens asked for, {num_tokens} there")
    seen = np.zeros(num_tokens, dtype=bool)
    seen[(starts[:num_windows, None] + np.arange(CONTEXT_TOKENS + 1)).ravel()] = True
    return seen


def seen_ngrams(stream: NDArray[np.integer], seen: NDArray[np.bool_]) -> Ints:
    """The 5-grams of the stream all of whose tokens were seen."""
    inside = np.lib.stride_tricks.sliding_window_view(seen, ORDER).all(axis=1)
    return ngrams(stream, ORDER)[inside]


def measure(model: KneserNey, tokenizer: PreTrainedTokenizerBase, text: str) -> dict[str, float | int]:
    """The figures of `kronpress.evaluate(...).to_json()` that do not depend on a window."""
    ids = np.array([tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]])
    nll_sum_nats = -np.log(model.probabilities(ids)).sum().item()
    num_tokens, num_bytes = len(ids) - 1, len(text.encode())
    return {
        "num_tokens": num_tokens,
        "num_bytes": num_bytes,
        "nll_mean_nats": nll_sum_nats / num_tokens,
        "perplexity": math.exp(nll_sum_nats / num_tokens),
        "bits_per_byte": nll_sum_nats / math.log(2) / num_bytes,
    }


def report(stream: NDArray[np.integer], seen: NDArray[np.bool_], fitted_on: str) -> dict[str, Any]:
    """Fit on the seen tokens of the stream; measure on the bundled validation and test books."""
    tokenizer = AutoTokenizer.from_pretrained(model_path("pocket"))
    model = KneserNey.fit(seen_ngrams(stream, seen), len(tokenizer))
    texts = {split: load_running_text("bundled", split).text for split in ("validation", "test")}
    return {
        "fitted_on": fitted_on,
        "num_tokens": int(seen.sum()),
        "discounts": {k: order.discounts for k, order in enumerate(model.orders, start=1)},
        "num_ngrams": {k: len(order.grams) for k, order in enumerate(model.orders, start=1)},
        **{split: measure(model, tokenizer, text) for split, text in texts.items()},
    }


def main(
    work: Annotated[Path, typer.Option(help="folder of tokens.bin")],
    total_tokens: Annotated[
        int | None, typer.Option(help="fit a second time, on the windows that training with so many tokens reads")
    ] = None,
) -> None:
    """Fit on the whole token stream, print what was measured as one JSON document."""
    stream = np.memmap(work / "tokens.bin", dtype=np.uint16, mode="r")
    command = "python scripts/ngram_baseline.py --work DIR"
    fits = [report(stream, np.ones(len(stream), dtype=bool), "the whole training stream")]
    if total_tokens is not None:
        command += f" --total-tokens {total_tokens}"
        seen = seen_tokens(len(stream), total_tokens)
        fits.append(report(stream, seen, "the windows that pocket was trained on"))
    print(json.dumps({"command": command, "order": ORDER, "fits": fits}, indent=1))


if __name__ == "__main__":
    typer.run(main)
