"""The 5-gram yardstick is the model of its definition, fitted on what it says, and counts as `evaluate` counts."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kronpress as kp

ROOT = Path(__file__).parents[1]
VOCAB_SIZE = 7


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ngram_baseline", ROOT / "scripts" / "ngram_baseline.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


script = load_script()


def corpus(seed: int, num_tokens: int) -> np.ndarray:
    """Tokens of which 0 is frequent, 5 is rare and 6 never comes, so that all kinds of counts occur."""
    return np.random.default_rng(seed).choice(6, num_tokens, p=np.array([32, 16, 8, 4, 2, 1]) / 63).astype(np.uint16)


class Slow:
    """The same model out of dictionaries of tuples."""

    def __init__(self, ids: list[int]) -> None:
        self.tables = {5: Counter(tuple(ids[end - 5 : end]) for end in range(5, len(ids) + 1))}
        for k in (4, 3, 2, 1):
            self.tables[k] = Counter(longer[1:] for longer in self.tables[k + 1])

    def discount(self, k: int, count: int) -> float:
        n = Counter(self.tables[k].values())
        if not all(n[times] for times in (1, 2, 3, 4)):
            return [0.5, 1.0, 1.5][min(count, 3) - 1]
        all_three = [times - (times + 1) * n[1] / (n[1] + 2 * n[2]) * n[times + 1] / n[times] for times in (1, 2, 3)]
        return all_three[min(count, 3) - 1] if min(all_three) >= 0 else [0.5, 1.0, 1.5][min(count, 3) - 1]

    def probability(self, context: tuple[int, ...], token: int) -> float:
        below = self.probability(context[1:], token) if context else 1 / VOCAB_SIZE
        k = len(context) + 1
        followers = {gram[-1]: times for gram, times in self.tables[k].items() if gram[:-1] == context}
        if not followers:
            return below
        taken = {each: min(times, self.discount(k, times)) for each, times in followers.items()}
        kept = followers.get(token, 0) - taken.get(token, 0)
        return (kept + sum(taken.values()) * below) / sum(followers.values())


def fit(ids: np.ndarray) -> script.KneserNey:
    return script.KneserNey.fit(script.ngrams(ids, 5), VOCAB_SIZE)


texts = st.builds(corpus, seed=st.integers(0, 999), num_tokens=st.integers(5, 400))
contexts = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=4)


@settings(deadline=None, max_examples=30)
@given(texts, contexts)
def test_after_any_context_the_tokens_share_a_probability_of_one(ids, context):
    model = fit(ids)
    shares = [model.probabilities(np.array([*context, token]))[-1] for token in range(VOCAB_SIZE)]
    assert min(shares) > 0
    assert sum(shares) == pytest.approx(1, abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(texts, st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=2, max_size=12))
def test_probabilities_are_those_of_the_dictionaries(ids, text):
    slow = Slow(ids.tolist())
    expected = [slow.probability(tuple(text[max(0, place - 4) : place]), text[place]) for place in range(1, len(text))]
    assert fit(ids).probabilities(np.array(text)) == pytest.approx(expected, rel=1e-12)


def test_a_long_text_is_fitted_with_discounts_of_its_own():
    ids = corpus(0, 3000)
    slow = Slow(ids.tolist())
    for k, order in enumerate(fit(ids).orders, start=1):
        assert order.discounts == pytest.approx([slow.discount(k, times) for times in (1, 2, 3)])
        assert (order.discounts == script.FALLBACK_DISCOUNTS) == (k == 1)


def test_discounts_by_hand():
    # n1 = 8, n2 = 4, n3 = 2, n4 = 1, so that Y = 8 / (8 + 2 · 4) = 1/2.
    counts = np.array([1] * 8 + [2] * 4 + [3] * 2 + [4] + [9] * 5)
    assert script.discounts(counts) == (1 - 1 * 4 / 8, 2 - 1.5 * 2 / 4, 3 - 2 * 1 / 2)
    assert script.discounts(counts[:14]) == script.FALLBACK_DISCOUNTS  # n4 = 0
    negative = np.array([1] * 8 + [2] + [3] * 9 + [4])  # D_2 = 2 − 3 · 8/10 · 9/1
    assert script.discounts(negative) == script.FALLBACK_DISCOUNTS


def test_five_grams_of_the_largest_tokens_keep_their_order():
    top = np.array([4095, 0, 4095, 4095, 4095, 4095, 4095], dtype=np.uint16)
    assert script.ngrams(top, 5).tolist() == [
        sum(int(token) * 4096 ** (4 - place) for place, token in enumerate(top[first : first + 5]))
        for first in (0, 1, 2)
    ]


def test_the_windows_are_those_that_the_training_reads():
    source = (ROOT / "scripts" / "train_pocket.py").read_text(encoding="utf-8")
    (starts,) = re.findall(r"^    starts = (np\..*)$", source, re.MULTILINE)
    names = {"np": np, "seed": int(re.findall(r"seed: int = (\d+)", source)[0])}
    names["CONTEXT_TOKENS"] = int(re.findall(r"^CONTEXT_TOKENS = (\d+)", source, re.MULTILINE)[0])
    per_step = int(re.findall(r"sequences_per_step: int = (\d+)", source)[0])
    stream = range(40 * 256 + 200)
    order = eval(starts, {**names, "stream": stream, "len": len})

    two_steps = 2 * per_step * names["CONTEXT_TOKENS"]
    expected = {token for first in order[: 2 * per_step] for token in stream[first : first + 257]}
    for total_tokens in (two_steps, two_steps + 4095):
        seen = script.seen_tokens(len(stream), total_tokens)
        assert set(np.flatnonzero(seen).tolist()) == expected
    for total_tokens in (4095, 41 * 4096):
        with pytest.raises(SystemExit, match=f"{total_tokens} tokens asked for"):
            script.seen_tokens(len(stream), total_tokens)


def test_five_grams_with_an_unseen_token_are_left_out():
    stream = np.arange(20, dtype=np.uint16)
    seen = np.ones(20, dtype=bool)
    seen[[6, 13]] = False
    expected = [*script.ngrams(stream[:6], 5), *script.ngrams(stream[7:13], 5), *script.ngrams(stream[14:], 5)]
    assert script.seen_ngrams(stream, seen).tolist() == expected
    assert len(expected) == 2 + 2 + 2


def test_tokens_and_bytes_are_counted_as_evaluate_counts_them(tiny_model, tiny_tokenizer, tiny_text):
    figures = script.measure(script.KneserNey(300, []), tiny_tokenizer, tiny_text)
    expected = kp.evaluate(tiny_model("gpt2"), tiny_tokenizer, tiny_text).to_json()
    assert {name: figures[name] for name in ("num_tokens", "num_bytes")} == {
        name: expected[name] for name in ("num_tokens", "num_bytes")
    }
    assert figures["perplexity"] == pytest.approx(300)
    assert figures["bits_per_byte"] == pytest.approx(np.log2(300) * figures["num_tokens"] / figures["num_bytes"])


def test_the_script_measures_the_committed_books(tmp_path, capsys):
    corpus(0, 40 * 256 + 1).tofile(tmp_path / "tokens.bin")
    script.main(tmp_path, total_tokens=8192)
    measured = json.loads(capsys.readouterr().out)
    committed = json.loads((ROOT / "benchmarks" / "results" / "pocket_ngram.json").read_text(encoding="utf-8"))
    assert measured["command"] == committed["command"].replace("70200000", "8192")
    assert measured["fits"][0]["num_tokens"] == 40 * 256 + 1
    assert 8192 < measured["fits"][1]["num_tokens"] <= 32 * 257
    for one, other in zip(measured["fits"], committed["fits"], strict=True):
        assert one["fitted_on"] == other["fitted_on"]
        for split in ("validation", "test"):
            assert [one[split][name] for name in ("num_tokens", "num_bytes")] == [
                other[split][name] for name in ("num_tokens", "num_bytes")
            ]
            assert one[split]["perplexity"] > 20 * other[split]["perplexity"]  # six tokens of 4096 were seen


def test_the_committed_figures_are_of_the_text_that_the_demo_measures():
    results = ROOT / "benchmarks" / "results"
    (demo,) = json.loads((results / "demo.json").read_text(encoding="utf-8"))["rows"][0]["metrics"].values()
    for fitted in json.loads((results / "pocket_ngram.json").read_text(encoding="utf-8"))["fits"]:
        figures = fitted["test"]
        assert (figures["num_tokens"], figures["num_bytes"]) == (demo["num_tokens"], demo["num_bytes"])
        assert figures["bits_per_byte"] == pytest.approx(
            np.log2(figures["perplexity"]) * demo["num_tokens"] / demo["num_bytes"]
        )
