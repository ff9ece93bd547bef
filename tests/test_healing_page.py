"""The page of the healing curves is that of the committed result, and says no more than that result does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import healing_page  # noqa: E402

RESULTS = json.loads((ROOT / "benchmarks" / "results" / "healing_curves.json").read_text(encoding="utf-8"))


def run(objective: str, tokens: int, *losses: float, seed: int = 0, rate: float = 1e-3) -> dict[str, Any]:
    """A run measured after equal parts of its tokens."""
    points = [
        {"tokens": tokens * number // len(losses), "validation_nats": loss} for number, loss in enumerate(losses, 1)
    ]
    book = {"nll_mean_nats": losses[-1], "perplexity": 2.0}
    fields = {"start": "s", "objective": objective, "tokens": tokens, "rate": rate, "seed": seed, "curve": points}
    return {**fields, "validation": book, "test": book}


def test_the_page_is_that_of_the_committed_result(tmp_path):
    pytest.importorskip("matplotlib")
    page = healing_page.page(
        ROOT / "benchmarks" / "results" / "healing_curves.json", tmp_path / healing_page.FIGURE.name
    )
    assert page == (ROOT / "docs" / "results" / "healing.md").read_text(encoding="utf-8")
    assert healing_page.FIGURE.is_file() and (tmp_path / healing_page.FIGURE.name).is_file()


def test_what_was_run_is_what_the_goal_is_judged_by():
    """Equally many rates for every objective, equal tokens, and three seeds for both of the final pair."""
    runs, short = RESULTS["runs"], RESULTS["num_tokens"]
    tried: dict[tuple[str, str], set[float]] = {}
    for each in runs:
        if each.get("is_trial"):
            tried.setdefault((each["start"], each["objective"]), set()).add(each["rate"])
    assert {len(rates) for rates in tried.values()} == {4}
    for start in ("krony-96m", "auto"):
        assert {objective for of, objective in tried if of == start} == {*RESULTS["objectives"], "default"}
        for objective, tokens in (("default", short), ("language model", 5 * short)):
            assert len(healing_page.of_all_seeds(runs, start, objective, tokens)) == 3


def test_the_last_tenth_is_no_less_than_a_tenth():
    assert healing_page.last_tenth(run("default", 1000, *[3.0] * 8, 2.5, 2.0)) == 0.5
    # A last part of a twentieth of the tokens would flatter.
    uneven = run("default", 1000, 4.0, 3.0)
    uneven["curve"] = [{"tokens": t, "validation_nats": v} for t, v in ((800, 3.0), (950, 2.1), (1000, 2.0))]
    assert healing_page.last_tenth(uneven) == 1.0


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        ((3.0, 2.0), (2.5, 2.001, 2.0), ["reaches", "is flat by the criterion"]),
        ((3.0, 2.1), (2.5, 2.001, 2.0), ["does not reach", "is flat by the criterion"]),
        ((3.0, 2.0), (3.0, 2.5, 2.0), ["reaches", "was still falling"]),
    ],
)
def test_the_verdict_is_that_of_the_numbers(ours, theirs, words):
    said = healing_page._verdict([run("default", 100, *ours)], [run("language model", 500, *theirs)])
    assert all(word in said for word in words)
    assert said.startswith("With 1/5 of the tokens")
