"""Tasks of lm-evaluation-harness: found by name, file or folder, run on the loaded model, and comparable."""

from __future__ import annotations

import builtins
import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import kronpress as kp
from kronpress import cli
from kronpress.harness import find_tasks, run_tasks

PASSAGES = [
    "The café stood on the corner of the street",
    "He drank coffee and nobody knew  naïveté",
    "In the evening the old man sat by its window",
    "a b",
]


def test_without_lm_eval_one_sentence_says_how_to_install_it(monkeypatch):
    import_module = builtins.__import__

    def without_lm_eval(name: str, *rest: Any) -> Any:
        if name.startswith("lm_eval"):
            raise ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval")
        return import_module(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_lm_eval)
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        assert cli.main(["eval", "pocket", "--tasks", "lambada_openai"]) == 2
    assert "lm_eval is not installed: pip install 'kronpress[eval]'" in errors.getvalue()
    assert errors.getvalue().count("\n") == 1


@pytest.fixture
def lm_eval(monkeypatch, tmp_path) -> Any:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return pytest.importorskip("lm_eval")


@pytest.fixture
def task_file(tmp_path) -> Path:
    """The last word of each passage, as lm_eval's own task lambada_openai asks for it."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = tmp_path / "passages.jsonl"
    data.write_text("".join(json.dumps({"text": passage}) + "\n" for passage in PASSAGES), encoding="utf-8")
    (folder / "last_word.yaml").write_text(
        f"""
task: last_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{text.split(' ')[:-1] | join(' ')}}}}"
doc_to_target: "{{{{' ' + text.split(' ')[-1]}}}}"
metric_list: [{{metric: perplexity}}, {{metric: acc}}]
metadata: {{version: 2.5}}
"""
    )
    return folder / "last_word.yaml"


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
@pytest.mark.parametrize("of", ["file", "folder"])
def test_last_words_have_the_figures_of_the_protocol_of_that_name(
    lm_eval, task_file, tiny_compressed, tiny_tokenizer, family, of
):
    model = tiny_compressed(family, "kronecker").train()
    tasks = find_tasks([str(task_file if of == "file" else task_file.parent)])
    results = run_tasks(model, tiny_tokenizer, tasks)
    expected = kp.evaluate(model, tiny_tokenizer, PASSAGES, "lambada-last-word")
    assert results == {
        "last_word": {
            "protocol": "lm-eval",
            "lm_eval_version": lm_eval.__version__,
            "task_version": 2.5,
            "num_fewshot": 0,
            "num_samples": len(PASSAGES),
            "metrics": {"perplexity": pytest.approx(expected.perplexity, rel=1e-5), "acc": expected.accuracy},
        }
    }
    assert model.training
    assert tiny_tokenizer.pad_token is None


def test_the_command_measures_tasks_beside_data(
    lm_eval, task_file, tiny_compressed, tiny_tokenizer, save_tiny_checkpoint, tmp_path
):
    folder = save_tiny_checkpoint(tiny_compressed("gpt2", "kronecker"), tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("The old man sat by its window.")

    def printed(*arguments: object) -> str:
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            assert cli.main([str(argument) for argument in arguments]) == 0
        return out.getvalue()

    document = json.loads(printed("eval", folder, "--tasks", task_file, "--json"))
    assert document["metrics"] == {}
    loaded = kp.load_model(str(folder))
    assert document["tasks"] == run_tasks(loaded.model, loaded.tokenizer, find_tasks([str(task_file)]))
    both = printed("eval", folder, "--tasks", task_file, "--data", text)
    assert "protocol window" in both
    assert f"protocol lm-eval {lm_eval.__version__}" in both
    assert f"{document['tasks']['last_word']['metrics']['perplexity']:.4f}" in both


def test_what_is_no_task_is_refused(lm_eval, task_file, tmp_path):
    (tmp_path / "empty").mkdir()
    for wanted, message in [
        (tmp_path / "none.yaml", "none.yaml': no such file"),
        (tmp_path / "empty", "empty': there is no task"),
        ("lambada_opnai", "unknown task 'lambada_opnai': did you mean 'lambada_openai'.*lm-eval ls tasks"),
    ]:
        with pytest.raises(kp.RequestError, match=message):
            find_tasks([str(task_file), str(wanted)])


def test_names_and_patterns_stand_for_the_tasks_of_lm_eval(lm_eval, task_file):
    tasks = find_tasks(["lambada_openai", str(task_file), "lambada_stand*"])
    assert tasks.names[0] == str(task_file)
    assert {"lambada_openai", "lambada_standard"} <= set(tasks.names)


def test_a_task_that_fails_is_one_sentence(lm_eval, task_file, tiny_model, tiny_tokenizer):
    task_file.write_text(task_file.read_text().replace("passages.jsonl", "none.jsonl"))
    with pytest.raises(kp.WorkError, match=r"last_word\.yaml: FileNotFoundError: .*none\.jsonl") as failure:
        run_tasks(tiny_model("gpt2"), tiny_tokenizer, find_tasks([str(task_file)]))
    assert "\n" not in str(failure.value)


def test_metrics_that_are_not_finite_are_failed_work(lm_eval, task_file, tiny_model, tiny_tokenizer):
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = math.nan
    with pytest.raises(kp.WorkError, match="'last_word': a metric is not finite"):
        run_tasks(model, tiny_tokenizer, find_tasks([str(task_file)]))
