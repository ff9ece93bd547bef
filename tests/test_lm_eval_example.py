"""The example task in benchmarks/lm_eval, and what was measured with it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

import kronpress as kp
from kronpress.evaluation import longest_context
from kronpress.harness import find_tasks, run_tasks

ROOT = Path(__file__).parents[1]
TASK = ROOT / "benchmarks" / "lm_eval_tasks"
BOOKS = ["The café stood on the corner of the street.", "Nobody knew him,\nand nobody asked."]


def test_the_harness_gives_the_figures_of_the_protocol_window(monkeypatch, tiny_compressed, tiny_tokenizer, tmp_path):
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "books.txt").write_text("\n<|endoftext|>\n".join(BOOKS), encoding="utf-8")
    shutil.copytree(TASK, tmp_path / "tasks", ignore=shutil.ignore_patterns("__pycache__"))
    task = tmp_path / "tasks" / "bundled_books.yaml"
    task.write_text(task.read_text().replace("src/kronpress/pocket/text/test.txt", str(tmp_path / "books.txt")))
    model = tiny_compressed("gpt2", "kronecker")
    (found,) = run_tasks(model, tiny_tokenizer, find_tasks([str(task)])).values()
    ours = [kp.evaluate(model, tiny_tokenizer, book, "window", bos=True) for book in BOOKS]
    # Within one window there is no last one that the two could read differently.
    assert max(each.num_tokens for each in ours) <= longest_context(model)
    nll = sum(each.nll_sum_nats for each in ours)
    num_bytes = sum(len(book.encode()) for book in BOOKS)
    assert found["num_samples"] == len(BOOKS)
    assert found["metrics"] == {
        "word_perplexity": pytest.approx(math.exp(nll / sum(len(book.split()) for book in BOOKS)), rel=1e-4),
        "byte_perplexity": pytest.approx(math.exp(nll / num_bytes), rel=1e-5),
        "bits_per_byte": pytest.approx(nll / num_bytes / math.log(2), rel=1e-5),
    }


def test_the_committed_figures_differ_only_by_the_context_of_last_windows():
    results = json.loads((ROOT / "benchmarks" / "results" / "lm_eval_pocket.json").read_text(encoding="utf-8"))
    harness = results["lm_eval"]["metrics"]
    for name, figure in harness.items():
        assert results["window_with_context"][name] == pytest.approx(figure, rel=1e-7)
        assert results["window"][name] == pytest.approx(figure, rel=1e-3)
    page = (ROOT / "docs" / "lm-eval.md").read_text(encoding="utf-8")
    for column in (harness, results["window"], results["window_with_context"]):
        assert f"{column['bits_per_byte']:.6f}" in page
        assert f"{column['word_perplexity']:,.1f}" in page
