"""The card of a checkpoint: metadata that the Hub reads, figures that were measured, lines that load the model."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

import kronpress as kp
from kronpress import cli
from kronpress.checkpoint import save_checkpoint
from kronpress.model_card import (
    Base,
    Measured,
    Quality,
    Speed,
    Step,
    Story,
    for_repository,
    model_card,
    plan_fields,
    read_base,
    read_story,
    write_card,
)

DATA = "kronpress.model_card.story"


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def snippet(card: ModelCard) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    return code


@pytest.fixture
def dense(tiny_model, save_tiny_checkpoint, tmp_path) -> Path:
    """A dense checkpoint whose own card names a licence and a language."""
    folder = save_tiny_checkpoint(tiny_model("gpt2"), tmp_path / "parent")
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage:\n- en\n- fr\n---\n# parent\n")
    return folder


@pytest.fixture
def recipe_file(tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: tiny\ndescription: a sum | of products\ntargets: mlp\nstructure: kronecker\n"
        "spec: {right_shape: [2, 4], num_terms: 3}\n"
    )
    return path


@pytest.fixture
def story(tiny_model, tiny_recipe) -> Story:
    plan = kp.make_plan(tiny_model("gpt2"), tiny_recipe("kronecker"))
    return Story(base=Base(name="owner/parent", hub_id="owner/parent", license="mit"), plan=plan_fields(plan))


def quality(perplexity: float, **changes: object) -> Quality:
    return Quality.model_validate(
        {
            "text": "wikitext2",
            "protocol": "protocol window, window 128, stride 128, BOS",
            "num_tokens": 1000,
            "perplexity": perplexity,
            "dataset": "Salesforce/wikitext",
            "config": "wikitext-2-raw-v1",
            "revision": "abc",
            **changes,
        }
    )


def test_metadata_go_through_the_hubs_own_reader_unchanged(story):
    measured = Measured(dense=[quality(30.0)], compressed=[quality(31.25, bits_per_byte=1.5)])
    told = story.model_copy(update={"measured": measured})
    data = ModelCard(str(model_card(told))).data
    assert (data.base_model, data.base_model_relation, data.license) == ("owner/parent", "quantized", "mit")
    assert data.library_name == "transformers"
    assert {"kronpress", "kronecker"} <= set(data.tags)
    results = {each.metric_type: each for each in data.eval_results}
    assert {kind: each.metric_value for kind, each in results.items()} == {"perplexity": 31.25, "bits_per_byte": 1.5}
    for each in results.values():
        assert (each.dataset_type, each.dataset_config, each.dataset_revision, each.dataset_split) == (
            "Salesforce/wikitext",
            "wikitext-2-raw-v1",
            "abc",
            "test",
        )
        assert "protocol window, window 128" in each.metric_name


def test_what_was_not_measured_is_in_no_figure_and_said(story):
    card = model_card(story)
    assert card.data.eval_results is None
    assert card.data.metrics is None
    assert "| perplexity" not in card.text
    assert "Its speed was not measured" in card.text
    measured = Measured(
        dense=[quality(30.0)],
        compressed=[quality(31.25)],
        speed=Speed(tokens_per_second=20.0, dense_tokens_per_second=16.0, speedup=1.25, protocol="in turns"),
        device="a device",
    )
    full = model_card(story.model_copy(update={"measured": measured})).text
    assert "| perplexity, wikitext2 | 30.00 | 31.25 |" in full
    assert "| tokens per second at decoding | 16.0 | 20.0 |" in full
    assert "not measured: fewer FLOPs" not in full


@pytest.mark.parametrize("format", ["dense", "self-contained", "onnx"])
def test_an_export_takes_no_figures_of_what_it_was_made_from_for_its_own(story, format):
    measured = Measured(dense=[quality(30.0)], compressed=[quality(31.25)])
    card = model_card(story.model_copy(update={"measured": measured, "format": format}))
    assert card.data.eval_results is None
    assert "this export of it was not" in card.text
    assert card.data.base_model_relation == ("finetune" if format == "dense" else "quantized")


def test_a_step_makes_what_was_measured_a_thing_of_the_past(story):
    measured = story.model_copy(update={"measured": Measured(dense=[quality(30.0)], compressed=[quality(31.0)])})
    assert measured.after(Step(action="heal")).measured is None
    assert measured.after(Step(action="heal")).base == story.base


@pytest.mark.parametrize(
    ("text", "expected", "remark"),
    [
        ("---\nlicense: mit\nlanguage: en\n---\n", ("mit", "en"), None),
        ("---\nlanguage: en\n---\n", (None, "en"), "names no licence"),
        ("---\nlicense: [a, {b: c}]\n---\n", (None, None), "not as the Hub has them"),
        ("---\nlicense: [unclosed\n---\n", (None, None), "could not be read"),
        (None, (None, None), "no model card"),
    ],
)
def test_the_licence_is_that_of_the_dense_models_card_or_its_lack_is_said(tmp_path, story, text, expected, remark):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    base = read_base(str(tmp_path), tmp_path)
    assert (base.license, base.language) == expected
    assert base.name == tmp_path.name
    card = model_card(story.model_copy(update={"base": base}))
    assert card.data.license == expected[0]
    assert card.data.base_model is None
    if remark is None:
        assert base.remark is None
    else:
        assert remark in base.remark
        if base.license is None:
            assert base.remark in card.text


def test_a_card_on_the_hub_that_cannot_be_had_is_said_and_no_error(monkeypatch):
    def unreachable(*arguments: object, **options: object) -> str:
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr(f"{DATA}.hf_hub_download", unreachable)
    base = read_base("owner/name", None, "abc")
    assert (base.hub_id, base.revision, base.license) == ("owner/name", "abc", None)
    assert base.remark.endswith("could not be had: no network")


def test_the_bundled_model_has_a_card_with_a_licence():
    base = kp.checkpoint.base_of("pocket")
    assert (base.name, base.license, base.language, base.hub_id) == ("pocket", "apache-2.0", "en", None)


def test_commands_leave_cards_whose_lines_load_the_model(dense, recipe_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("The old man sat by its window and nobody asked. " * 60)
    changes = ["--set", f"evaluation.data={text}", "--set", f"healing.data={text}", "--set", "healing.max_steps=1"]
    changes += ["--set", "healing.sequence_length=32", "--set", "evaluation.speed=false"]
    monkeypatch.setattr("sys.argv", ["kronpress", "compress", "as typed"])
    for command in (
        ["compress", dense, "--recipe", recipe_file, "--out", "small"],
        ["heal", "small", "--teacher", dense, "--data", text, "--out", "healed", *changes[4:8]],
        ["export", "healed", "--format", "dense", "--out", "dense"],
        ["export", "healed", "--format", "self-contained", "--out", "own"],
        ["run", recipe_file, "--out", "run", "--set", f"model={dense}", *changes],
    ):
        assert cli.main([str(word) for word in command]) == 0, command
    stories = {name: read_story(Path(name)) for name in ("small", "healed", "dense", "own", "run/model")}
    actions = {name: [step.action for step in story.steps] for name, story in stories.items()}
    assert actions == {
        "small": ["compress"],
        "healed": ["compress", "heal"],
        "dense": ["compress", "heal", "export"],
        "own": ["compress", "heal", "export"],
        "run/model": ["run"],
    }
    for name, story in stories.items():
        card = card_of(Path(name))
        assert story.base.name == "parent"
        assert (card.data.license, card.data.language) == ("mit", ["en", "fr"])
        assert "kronpress compress 'as typed'" in card.text
        assert f"| parameters | {story.plan['num_params_dense']:,} | {story.plan['num_params']:,} |" in card.text
        assert str(tmp_path) not in card.text.partition("<details>")[0]
        with monkeypatch.context() as patch:
            patch.chdir(name)
            names: dict[str, object] = {}
            exec(snippet(card), names)
        assert names["model"].config.model_type == "gpt2"
    trained = stories["healed"].steps[1].training
    assert (trained.num_steps, trained.is_distilled) == (1, True)
    results = json.loads(Path("run/results.json").read_text())
    figures = results["rows"][-1]["metrics"][str(text)]
    told = {each.metric_type: each.metric_value for each in card_of(Path("run/model")).data.eval_results}
    assert told == {name: figures[name] for name in ("perplexity", "bits_per_byte")}
    assert stories["run/model"].measured.speed is None


def test_the_lines_of_an_onnx_export_open_its_graph(
    tiny_compressed, tiny_tokenizer, save_tiny_checkpoint, tmp_path, monkeypatch
):
    pytest.importorskip("onnxruntime")
    folder = save_tiny_checkpoint(tiny_compressed("gpt2", "kronecker"), tmp_path / "small")
    kp.export.export_checkpoint(str(folder), "onnx", tmp_path / "graph", say=lambda _: None)
    card = card_of(tmp_path / "graph")
    monkeypatch.chdir(tmp_path / "graph")
    names: dict[str, object] = {}
    exec(snippet(card), names)
    assert "input_ids" in {each.name for each in names["session"].get_inputs()}
    assert card.data.library_name == "onnx"
    assert 'where = snapshot_download("me/graph")\n' in for_repository(str(card), "me/graph")


def test_a_model_saved_from_python_says_that_nothing_is_recorded(dense, tiny_recipe, tmp_path):
    loaded = kp.load_model(str(dense))
    kp.compress_(loaded.model, kp.make_plan(loaded.model, tiny_recipe("kronecker")))
    kp.save_checkpoint(loaded.model, loaded.tokenizer, tmp_path / "out")
    story = read_story(tmp_path / "out")
    assert ([step.action for step in story.steps], story.base.license) == (["save"], "mit")
    assert "is not recorded" in card_of(tmp_path / "out").text
    again = kp.load_model(str(tmp_path / "out"))
    kp.save_checkpoint(again.model, again.tokenizer, tmp_path / "again")
    assert [step.action for step in read_story(tmp_path / "again").steps] == ["save", "save"]


@pytest.mark.parametrize("failing", ["model_card", "write_whole"])
def test_a_card_that_fails_is_a_warning_and_the_checkpoint_is_there(
    tiny_compressed, tiny_tokenizer, tmp_path, monkeypatch, failing
):
    def fail(*_: object) -> None:
        raise OSError("no room\nfor it")

    monkeypatch.setattr(f"kronpress.model_card.card.{failing}", fail)
    model = tiny_compressed("gpt2", "kronecker")
    with pytest.warns(UserWarning, match="checkpoint is whole, but its card could not be written: OSError: no room$"):
        save_checkpoint(model, tiny_tokenizer, tmp_path / "out")
    assert not (tmp_path / "out" / "README.md").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(8)[None]
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_damaged_story_or_one_of_a_newer_version_is_refused(tmp_path):
    assert read_story(tmp_path) is None
    for text, message in (("{", "is damaged"), ('{"format_version": 99}', "newer than 1")):
        (tmp_path / "kronpress.json").write_text(text)
        with pytest.raises(kp.WorkError, match=message):
            read_story(tmp_path)


def test_writing_a_card_anew_leaves_the_weights_alone(tiny_compressed, tiny_tokenizer, story, tmp_path):
    save_checkpoint(tiny_compressed("gpt2", "kronecker"), tiny_tokenizer, tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    before = weights.read_bytes(), weights.stat().st_mtime_ns
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_card(tmp_path / "out", lambda: story)
    assert (weights.read_bytes(), weights.stat().st_mtime_ns) == before
    assert read_story(tmp_path / "out") == story
    kp.load_model(str(tmp_path / "out"))
