"""lm-evaluation-harness and `kronpress.evaluate` on the same books and the same compressed model, beside each other.

    python benchmarks/lm_eval_pocket.py > benchmarks/results/lm_eval_pocket.json

From the root of the repository, with the extra `eval`. Both score every token once, after a BOS token, in windows of
the model's context that do not overlap. The last window of a book is shorter: there lm-evaluation-harness gives the
model the tokens before it again, as many as fit, and the protocol `window` does not. `window_with_context` is `window`
with that context given.
"""

from __future__ import annotations

import json
import math
import sys
from importlib.metadata import version
from typing import Any

import torch

import kronpress as kp
from kronpress.checkpoint import LoadedModel
from kronpress.evaluation import longest_context, scored_windows
from kronpress.harness import find_tasks, run_tasks

RECIPE = "krony-96m"
TASK = "benchmarks/lm_eval_tasks/bundled_books.yaml"


def main() -> None:
    loaded = kp.load_model("pocket")
    recipe = kp.load_recipe(RECIPE, model="pocket")
    kp.compress_(loaded.model, kp.make_plan(loaded.model, recipe))
    (harness,) = run_tasks(loaded.model, loaded.tokenizer, find_tasks([TASK])).values()
    books = [book.strip() for book in kp.load_running_text("bundled", "test").documents]
    results = {
        "command": "python benchmarks/lm_eval_pocket.py > benchmarks/results/lm_eval_pocket.json",
        "model": "pocket",
        "recipe": RECIPE,
        "task": TASK,
        "versions": {name: version(name) for name in ("kronpress", "torch", "transformers", "lm_eval")},
        "lm_eval": harness,
        "window": pooled(loaded, books, with_context=False),
        "window_with_context": pooled(loaded, books, with_context=True),
    }
    json.dump(results, sys.stdout, indent=1)
    print()


def pooled(loaded: LoadedModel, books: list[str], with_context: bool) -> dict[str, Any]:
    """Perplexities of all books together, each begun with BOS; figures that the harness has too, by its names.

    Args:
        with_context: the last window of a book reads as many tokens as the others.
    """
    nll, num_tokens, num_words, num_bytes = 0.0, 0, 0, 0
    for book in books:
        found = kp.evaluate(loaded.model, loaded.tokenizer, book, "window", bos=True)
        book_nll = found.nll_sum_nats
        if with_context:
            book_nll += last_window(loaded, book, full=True) - last_window(loaded, book, full=False)
        nll += book_nll
        num_tokens += found.num_tokens
        num_words += found.num_words or 0
        num_bytes += found.num_bytes or 0
    return {
        "num_tokens": num_tokens,
        "num_words": num_words,
        "num_bytes": num_bytes,
        "word_perplexity": math.exp(nll / num_words),
        "byte_perplexity": math.exp(nll / num_bytes),
        "bits_per_byte": nll / num_bytes / math.log(2),
    }


def last_window(loaded: LoadedModel, book: str, full: bool) -> float:
    """Summed negative log-likelihood in nats of a book's last window, with its own context or a full one."""
    tokenizer, window = loaded.tokenizer, longest_context(loaded.model)
    assert window is not None
    ids = [tokenizer.bos_token_id, *tokenizer(book, add_special_tokens=False, verbose=False)["input_ids"]]
    first, end, scored = list(scored_windows(len(ids), window, window))[-1]
    first = max(0, end - window) if full else first
    with torch.no_grad():
        logits = loaded.model(input_ids=torch.tensor([ids[first:end]])).logits[0, -scored:]
    targets = torch.tensor(ids[end - scored + 1 : end + 1])
    return float(torch.nn.functional.cross_entropy(logits.double(), targets, reduction="sum"))


if __name__ == "__main__":
    main()
