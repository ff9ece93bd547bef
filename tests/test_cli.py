"""Every command does its work, prints one JSON document when asked, and refuses a wrong request in one sentence."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import kronpress as kp
from kronpress import cli
from kronpress.pipeline import whole_run
from kronpress.recipe import recipe_names
from kronpress.surgery import structured_layers

PUBLISHED_TOTALS = {
    "krony-67m": 67893504,
    "krony-80m-2": 80400048,
    "krony-81m": 81972576,
    "krony-92m-4": 92983392,
    "krony-96m": 96128304,
}
POCKET_WEIGHTS = Path(str(resources.files("kronpress"))) / "pocket" / "model.safetensors"


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


def call(*arguments: object) -> Ended:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(argument) for argument in arguments])
    return Ended(code, out.getvalue(), err.getvalue())


def done(*arguments: object) -> str:
    ended = call(*arguments)
    assert ended.code == 0, ended.err
    return ended.out


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def set_options(**fields: object) -> list[str]:
    return [option for name, value in fields.items() for option in ("--set", f"{name.replace('__', '.')}={value}")]


@dataclass(frozen=True)
class Shop:
    """What the commands work on: a dense and a compressed checkpoint, text, and a recipe file."""

    folder: Path
    dense: Path
    compressed: Path
    text: Path
    recipe: Path
    healing: tuple[str, ...]

    @property
    def data(self) -> list[str]:
        return set_options(healing__data=self.text, evaluation__data=self.text)


@pytest.fixture(scope="module")
def shop(tmp_path_factory, tiny_model, save_tiny_checkpoint, tiny_text) -> Shop:
    folder = tmp_path_factory.mktemp("shop")
    dense = save_tiny_checkpoint(tiny_model("gpt2"), folder / "dense")
    (folder / "text.txt").write_text(tiny_text, encoding="utf-8")
    (folder / "recipe.yaml").write_text(
        "{name: half, structure: kronecker, targets: mlp, spec: {right_shape: [1, 2], num_terms: 1}}"
    )
    done("compress", dense, "--recipe", folder / "recipe.yaml", "--out", folder / "compressed")
    healing = set_options(healing__max_steps=2, healing__sequences_per_step=2, healing__sequence_length=16)
    return Shop(folder, dense, folder / "compressed", folder / "text.txt", folder / "recipe.yaml", tuple(healing))


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(20)[None].to(model.device)).logits


# ---- recipes and plan ----


def test_recipes_lists_every_recipe_and_prints_one():
    listed = re.split(r"^(?=\S)", done("recipes"), flags=re.MULTILINE)[1:]  # a description may take several lines
    assert [each.split()[0] for each in listed] == recipe_names()
    assert set(PUBLISHED_TOTALS) <= set(recipe_names())
    assert all(len(each.split()) > 3 for each in listed)


@pytest.mark.parametrize("name", recipe_names())
def test_a_printed_recipe_is_a_recipe_file(tmp_path, name):
    (tmp_path / "printed.yaml").write_text(done("recipes", name), encoding="utf-8")
    assert kp.load_recipe(tmp_path / "printed.yaml") == kp.load_recipe(name)


def test_plan_prints_the_figures_of_the_plan():
    plan = kp.make_plan(cli.load_config("gpt2"), kp.load_recipe("krony-81m"))
    assert json.loads(done("plan", "gpt2", "--recipe", "krony-81m", "--json")) == plan.model_dump(mode="json")
    printed = done("plan", "gpt2", "--recipe", "krony-81m")
    for figure in (plan.num_params, plan.num_params_dense, plan.flops_per_token, plan.bytes):
        assert f"{figure:,}" in printed
    assert "transformer.h.0.mlp.c_proj" in printed


def test_plan_of_a_checkpoint_takes_changes(shop):
    given = "plan", shop.dense, "--recipe", "low-rank", "--json"
    half, fifth = (json.loads(done(*given, *set_options(budget__kept_of_targets=kept))) for kept in (0.5, 0.2))
    assert fifth["kept_of_targets"] <= 0.2 < half["kept_of_targets"] <= 0.5
    assert half["num_params_dense"] == sum(p.numel() for p in kp.load_model(str(shop.dense)).model.parameters())


WITHOUT_NETWORK = """
import socket

def refuse(*arguments, **options):
    raise AssertionError(f"the network was asked for: {arguments}")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
"""


def test_plan_as_a_program_needs_no_network_and_prints_nothing_but_json(fresh_python, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_NETWORK)
    online = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "PYTHONPATH": str(tmp_path)}
    ended = fresh_python("-m", "kronpress", "plan", "gpt2", "--recipe", "krony-81m", "--json", **online)
    assert (ended.returncode, ended.stderr) == (0, "")
    plan = json.loads(ended.stdout)
    assert (plan["num_params"], plan["num_params_dense"]) == (81972576, 124439808)


@pytest.mark.parametrize(("name", "total"), PUBLISHED_TOTALS.items())
def test_plan_gives_the_published_totals(name, total):
    plan = json.loads(done("plan", "gpt2", "--recipe", name, "--json"))
    assert (plan["num_params"], plan["num_params_dense"]) == (total, 124439808)


# ---- compress, heal, eval, export ----


def test_compress_writes_the_checkpoint_that_the_library_makes(shop, tmp_path):
    printed = done("compress", shop.dense, "--recipe", shop.recipe, "--out", tmp_path / "out")
    assert "transformer.h.1.mlp.c_proj" in printed
    assert str(tmp_path / "out") in printed
    expected = kp.load_model(str(shop.dense)).model
    plan = kp.make_plan(expected, kp.load_recipe(shop.recipe))
    kp.compress_(expected, plan)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits_of(loaded.to(expected.device)), logits_of(expected), rtol=0, atol=0)

    document = json.loads(
        done("compress", shop.dense, "--recipe", shop.recipe, "--out", tmp_path / "again", "--json", *shop.data)
    )
    assert document["out"] == str(tmp_path / "again")
    assert document["plan"] == plan.model_dump(mode="json")
    assert document["layers"].keys() == plan.layers.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "out"]


def test_compress_keeps_the_dtype_of_the_checkpoint(shop, save_tiny_checkpoint, tiny_model, tmp_path):
    dense = save_tiny_checkpoint(tiny_model("llama").to(torch.bfloat16), tmp_path / "dense")
    document = json.loads(
        done(
            "compress", dense, "--recipe", shop.recipe, "--out", tmp_path / "out", "--json", *set_options(targets="mlp")
        )
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert document["plan"]["dtype"] == "bfloat16"


def test_heal_trains_with_the_teacher_and_writes_the_healed_checkpoint(shop, tmp_path):
    given = "heal", shop.compressed, "--teacher", shop.dense, "--data", shop.text, *shop.healing
    ended = call(*given, "--out", tmp_path / "out", "--json")
    document = json.loads(ended.out)
    assert ended.err.startswith("healing takes about ")
    assert len([line for line in ended.err.splitlines() if line.startswith("  step ")]) == 2
    assert document["out"] == str(tmp_path / "out")
    assert document["healing"]["num_steps"] == 2
    assert document["healing"]["rows"][0]["distillation_nats"] > 0
    assert document["healing"]["rows"][0]["loss"] == pytest.approx(
        document["healing"]["rows"][0]["distillation_nats"], rel=1e-4
    )
    before, after = (kp.load_model(str(folder)).model for folder in (shop.compressed, tmp_path / "out"))
    assert kp.attached_plan(after) == kp.attached_plan(before)
    assert not torch.equal(logits_of(after), logits_of(before))

    ended = call(*given, "--out", tmp_path / "printed")
    assert ended.code == 0
    assert "step 1/2" in ended.err
    assert "step 2/2" in ended.err
    assert str(tmp_path / "printed") in ended.out
    written = [kp.load_model(str(tmp_path / name)).model for name in ("printed", "out")]
    torch.testing.assert_close(*map(logits_of, written), rtol=0, atol=0)


def test_eval_measures_as_the_library_does(shop, tmp_path):
    (tmp_path / "other.txt").write_text("He drank his coffee and said nothing.")
    names = str(shop.text), str(tmp_path / "other.txt")
    given = "eval", shop.compressed, "--data", names[0], "--data", names[1], "--window", 32, "--stride", 16
    document = json.loads(done(*given, "--json"))
    loaded = kp.load_model(str(shop.compressed))
    assert list(document["metrics"]) == list(names)
    for name in names:
        text = kp.load_running_text(name, "test").text
        expected = kp.evaluate(loaded.model, loaded.tokenizer, text, window=32, stride=16).to_json()
        assert document["metrics"][name] == {**expected, "data_revision": None}
    printed = done(*given)
    for name in names:
        assert f"{document['metrics'][name]['perplexity']:.2f}" in printed


def test_eval_measures_passages_one_by_one_and_names_the_protocol(shop, tmp_path):
    passages = ["The old man sat by its window", "He said nothing"]
    path = tmp_path / "passages.jsonl"
    path.write_text("".join(json.dumps({"text": passage}) + "\n" for passage in passages))
    given = "eval", shop.compressed, "--data", path, "--protocol", "lambada-last-word"
    document = json.loads(done(*given, "--json"))
    loaded = kp.load_model(str(shop.compressed))
    expected = kp.evaluate(loaded.model, loaded.tokenizer, passages, "lambada-last-word").to_json()
    assert document["metrics"] == {str(path): {**expected, "data_revision": None}}
    assert document["tasks"] == {}
    printed = done(*given)
    assert "protocol lambada-last-word" in printed
    assert f"{expected['accuracy']:.4f}" in printed


def test_export_writes_an_ordinary_checkpoint(shop, tmp_path):
    done("export", shop.compressed, "--format", "dense", "--out", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = logits_of(AutoModelForCausalLM.from_pretrained(shop.compressed))
    assert not structured_layers(exported)
    torch.testing.assert_close(logits_of(exported), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


# ---- run and demo ----


def test_run_tells_the_whole_story(shop, tmp_path):
    given = "run", shop.recipe, *set_options(model=shop.dense), *shop.data, *shop.healing
    ended = call(*given, "--out", tmp_path / "run")
    assert ended.code == 0, ended.err
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    for row in results["rows"]:
        assert row["name"] in ended.out
        assert f"{row['num_params']:,}" in ended.out
        (figures,) = row["metrics"].values()
        assert f"{figures['perplexity']:.2f}" in ended.out
        assert f"{figures['bits_per_byte']:.4f}" in ended.out
        assert "".join(repr(row["continuation"]).split()) in "".join(ended.out.split())
    assert "step 2/2" in ended.err

    lines = re.findall(r"^    (\S.*)$", ended.out.partition("To load it:")[2], flags=re.MULTILINE)
    assert len(lines) == 3
    names: dict[str, Any] = {}
    exec("\n".join(lines), names)
    assert len(structured_layers(names["model"])) == 4

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert json.loads(done(*given, "--out", tmp_path / "run", "--resume", "--json")) == results
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before

    again = json.loads(done(*given, "--out", tmp_path / "run", "--overwrite", "--json"))
    assert again["rows"] == results["rows"]


def test_a_recipe_chooses_the_protocol(shop, tmp_path):
    options = set_options(model=shop.dense, evaluation__protocol="krony", evaluation__window=16)
    ended = call("run", shop.recipe, *options, *shop.data, *shop.healing, "--out", tmp_path / "run")
    assert ended.code == 0, ended.err
    assert "protocol krony, window 16, stride 16" in ended.out
    loaded = kp.load_model(str(shop.dense))
    text = kp.load_running_text(str(shop.text), "test").text
    expected = kp.evaluate(loaded.model, loaded.tokenizer, text, "krony", window=16).to_json()
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert results["rows"][0]["metrics"] == {str(shop.text): expected}
    assert f"{expected['perplexity']:.2f}" in ended.out


def test_commands_take_a_run_directory_for_its_checkpoint(shop, tmp_path):
    shutil.copytree(shop.compressed, tmp_path / "run" / "model")
    for given in (
        ("eval", tmp_path / "run", "--data", shop.text, "--json"),
        ("export", tmp_path / "run", "--out", tmp_path / "dense"),
        (
            "heal",
            tmp_path / "run",
            "--teacher",
            shop.dense,
            "--data",
            shop.text,
            "--out",
            tmp_path / "healed",
            *shop.healing,
        ),
    ):
        done(*given)


@pytest.mark.skipif(not POCKET_WEIGHTS.is_file(), reason="the bundled model is not there")
def test_demo_compares_krony_96m_with_low_rank_of_the_same_size(shop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = set_options(healing__max_steps=1, healing__sequences_per_step=1, healing__sequence_length=32)
    results = json.loads(done("demo", *tiny, *shop.data, "--json"))
    assert tree(tmp_path) >= {"kronpress-demo/results.json", "kronpress-demo/model/config.json"}
    assert [row["name"] for row in results["rows"]] == [
        "dense",
        "krony-96m",
        "krony-96m, healed",
        "low-rank",
        "low-rank, healed",
        "dense, 8-bit",
        "dense, 4-bit",
    ]
    krony, low_rank = (results["rows"][number]["num_params"] for number in (1, 3))
    assert 0.99 * krony < low_rank <= krony < results["rows"][0]["num_params"]
    assert all(row["continuation"].startswith(results["prompt"]) for row in results["rows"])
    assert structured_layers(AutoModelForCausalLM.from_pretrained(tmp_path / "kronpress-demo" / "model"))


# ---- what people are shown ----


def test_square_brackets_are_text(shop, tmp_path, monkeypatch):
    folder = tmp_path / "[" / "a] [red]"
    folder.mkdir(parents=True)
    text = shutil.copy(shop.text, folder / "[bold].txt")
    assert str(folder / "out") in done("compress", shop.dense, "--recipe", shop.recipe, "--out", folder / "out")
    assert "[bold].txt" in done("eval", folder / "out", "--data", text)
    monkeypatch.setattr(whole_run, "continue_text", lambda *_: "He said [/nothing] and [red]wept.")
    options = set_options(model=shop.dense, healing__data=text, evaluation__data=text)
    ended = call("run", shop.recipe, "--out", folder / "run", *options, *shop.healing)
    assert ended.code == 0, ended.err
    assert "He said [/nothing] and [red]wept." in ended.out


@pytest.mark.parametrize("given", [["--help"], []])
def test_help_names_every_command(given):
    printed = done(*given)
    for command in ("recipes", "plan", "compress", "heal", "eval", "export", "run", "demo"):
        assert re.search(rf"^ +{command} ", printed, flags=re.MULTILINE)
        assert "--help" in done(command, "--help")


# ---- wrong requests ----

WRONG_REQUESTS: dict[str, tuple[str, list[str]]] = {
    "unknown recipe": ("compress {dense} --recipe krony96m --out {out}", ["'krony96m'", "krony-96m"]),
    "unknown recipe to run": ("run low-ranc --out {out}", ["'low-ranc'", "low-rank"]),
    "unknown recipe to print": ("recipes krony-81", ["'krony-81'", "krony-81m"]),
    "no recipe file": ("run {folder}/none.yaml --out {out}", ["none.yaml"]),
    "recipe file of something else": ("run {text} --out {out}", ["text.txt"]),
    "unknown field": (
        "compress {dense} --recipe {recipe} --out {out} --set healing.max_step=3",
        ["'healing.max_step'", "healing.max_steps"],
    ),
    "unknown section": ("run {recipe} --out {out} --set heeling.max_steps=3", ["'heeling'", "healing"]),
    "unknown budget": ("run {recipe} --out {out} --set budget.prams=3", ["'budget.prams'", "budget.params"]),
    "unknown size": ("run {recipe} --out {out} --set spec.num_term=3", ["'num_term'", "num_terms"]),
    "unknown structure": ("run {recipe} --out {out} --set structure=kroneker", ["'kroneker'", "kronecker", "low_rank"]),
    "wrong value": ("run {recipe} --out {out} --set healing.max_steps=soon", ["healing.max_steps", "'soon'"]),
    "negative value": ("run {recipe} --out {out} --set healing.max_steps=-1", ["healing.max_steps", "-1"]),
    "no value": ("run {recipe} --out {out} --set healing.max_steps", ["'healing.max_steps'", "path.to.field=value"]),
    "two budgets": (
        "compress {dense} --recipe low-rank --out {out} --set budget.params=9999 --set budget.bytes=9999",
        ["params", "bytes"],
    ),
    "budget too small": ("compress {dense} --recipe low-rank --out {out} --set budget.params=100", ["100", "hold"]),
    "budget too small for fixed sizes": (
        "plan {dense} --recipe {recipe} --set budget.kept_of_targets=0.1",
        ["fixed sizes"],
    ),
    "target that matches nothing": (
        "compress {dense} --recipe {recipe} --out {out} --set targets=mlp.c_fc",
        ["'mlp.c_fc'", "transformer.h.0.mlp.c_fc"],
    ),
    "target that is no expression": (
        "compress {dense} --recipe {recipe} --out {out} --set targets=mlp.(c_fc",
        ["'mlp.(c_fc'", "regular expression"],
    ),
    "shape that does not divide": (
        "compress {dense} --recipe krony-67m --out {out}",
        ["transformer.h.0.mlp.c_fc", "48", "1, 2, 4, 8, 16, 32, 64"],
    ),
    "shape that does not divide, planned": (
        "plan gpt2 --recipe {recipe} --set spec.right_shape=[7,1]",
        ["transformer.h.0.mlp.c_fc", "7", "3072"],
    ),
    "compressing twice": ("compress {compressed} --recipe {recipe} --out {out}", ["already"]),
    "planning twice": ("plan {compressed} --recipe {recipe}", ["already"]),
    "folder that is no checkpoint": (
        "compress {folder} --recipe {recipe} --out {out}",
        ["no checkpoint", "config.json"],
    ),
    "folder that is no checkpoint, planned": ("plan {folder} --recipe {recipe}", ["no checkpoint"]),
    "folder that is no checkpoint, measured": ("eval {folder} --data {text}", ["no checkpoint"]),
    "folder that is no checkpoint, exported": ("export {folder} --out {out}", ["no checkpoint"]),
    "folder that is no checkpoint, healed": (
        "heal {folder} --teacher {dense} --data {text} --out {out} --set healing.max_steps=1",
        ["no checkpoint"],
    ),
    "teacher that is no checkpoint": (
        "heal {compressed} --teacher {folder} --data {text} --out {out} --set healing.max_steps=1",
        ["no checkpoint"],
    ),
    "no such folder": ("eval {folder}/none --data {text}", ["none", "no such folder"]),
    "output not empty, compress": ("compress {dense} --recipe {recipe} --out {full}", ["not empty", "--overwrite"]),
    "output not empty, run": ("run {recipe} --out {full}", ["not empty", "--overwrite"]),
    "output not empty, export": ("export {compressed} --out {full}", ["not empty", "--overwrite"]),
    "output not empty, demo": ("demo --out {full}", ["not empty", "--overwrite"]),
    "output not empty, heal": (
        "heal {compressed} --teacher {dense} --data {text} --out {full} --set healing.max_steps=1",
        ["not empty", "--overwrite"],
    ),
    "output is a file": ("compress {dense} --recipe {recipe} --out {text} --overwrite", ["text.txt", "file"]),
    "missing output": ("compress {dense} --recipe {recipe}", ["--out"]),
    "missing output of run": ("run {recipe}", ["--out"]),
    "missing recipe": ("plan {dense}", ["--recipe"]),
    "missing model": ("plan --recipe {recipe}", ["MODEL"]),
    "unknown option": ("plan {dense} --recipee {recipe}", ["--recipee", "--recipe"]),
    "option of another type": ("eval {compressed} --data {text} --window wide", ["--window", "integer"]),
    "unknown command": ("compres {dense}", ["'compres'", "compress"]),
    "one argument too many": ("recipes krony-81m krony-96m", ["krony-96m"]),
    "unknown format": ("export {compressed} --format onyx --out {out}", ["'onyx'", "dense"]),
    "unknown protocol": ("eval {compressed} --data {text} --protocol windw", ["'windw'", "window"]),
    "window too long for the model": (
        "eval {compressed} --data {text} --protocol krony --window 1024",
        ["1024", "128"],
    ),
    "how to measure no data": ("eval {compressed} --tasks some --window 8", ["--window", "--data"]),
    "window out of range": ("eval {compressed} --data {text} --window 129", ["129", "128"]),
    "stride out of range": ("eval {compressed} --data {text} --window 8 --stride 9", ["9", "8"]),
    "no such text": ("eval {compressed} --data {folder}/none.txt", ["none.txt", "no such file"]),
    "text of another format": ("eval {compressed} --data {recipe}", ["recipe.yaml", ".jsonl"]),
    "exporting what is dense": ("export {dense} --out {out}", ["dense already"]),
    "a setting that heal does not use": (
        "heal {compressed} --teacher {dense} --data {text} --out {out} --set targets=mlp",
        ["targets=mlp", "healing.*"],
    ),
    "output is the current folder": ("compress {dense} --recipe {recipe} --out . --overwrite", ["current folder"]),
    "output inside a file": ("compress {dense} --recipe {recipe} --out {text}/out", ["text.txt", "is a file"]),
    "an embedding that scales": ("plan gemma-2b --recipe low-rank --set targets=embedding", ["Scaled"]),
    "healing on too little text": (
        "heal {compressed} --teacher {dense} --data {recipe}.txt --out {out} --set healing.max_steps=1 "
        "--set healing.sequence_length=128",
        ["one sequence of 128"],
    ),
    "sequences longer than the model": (
        "heal {compressed} --teacher {dense} --data {text} --out {out} --set healing.sequence_length=1024",
        ["1024", "128"],
    ),
}


@pytest.fixture
def places(shop, tmp_path, monkeypatch) -> Callable[[str], list[str]]:
    """Fills in the names in a command; the current folder is an empty one."""
    names = {"out": tmp_path / "work" / "out", "folder": tmp_path / "folder", "full": tmp_path / "full"}
    for folder in ("work", "folder", "full", "here"):
        (tmp_path / folder).mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for name in ("dense", "compressed", "text", "recipe"):
        names[name] = getattr(shop, name)
    (shop.folder / "recipe.yaml.txt").write_text("Short.")
    monkeypatch.chdir(tmp_path / "here")
    return lambda command: [word.format(**names) for word in command.split()]


@pytest.mark.parametrize(("command", "fragments"), WRONG_REQUESTS.values(), ids=WRONG_REQUESTS)
def test_a_wrong_request_is_one_sentence_and_leaves_nothing_behind(shop, places, tmp_path, command, fragments):
    arguments = places(command)
    before = tree(tmp_path), tree(shop.folder)
    ended = call(*arguments)
    assert ended.code == 2, ended.err
    assert ended.out == ""
    assert len(ended.err.splitlines()) == 1, ended.err
    assert ended.err.startswith("kronpress: error: ")
    for fragment in fragments:
        assert fragment in ended.err
    assert (tree(tmp_path), tree(shop.folder)) == before


@pytest.mark.parametrize(
    "options",
    [
        "--set targets=nothing",
        "--set spec.right_shape=[5,1]",
        "--set healing.sequence_length=129",
        "--set evaluation.window=129",
    ],
)
def test_a_run_that_does_not_fit_the_model_leaves_nothing_behind(shop, places, tmp_path, options):
    arguments = [*places("run {recipe} --out {out} --set model={dense}"), *shop.data, *shop.healing, *options.split()]
    before = tree(tmp_path)
    ended = call(*arguments)
    assert ended.code == 2
    assert ended.out == ""
    assert [line for line in ended.err.splitlines() if "error" in line] == [ended.err.splitlines()[-1]]
    assert tree(tmp_path) == before


# ---- failed work ----


@pytest.fixture
def damaged(shop, tmp_path) -> Path:
    folder = shutil.copytree(shop.compressed, tmp_path / "damaged")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return folder


@pytest.mark.parametrize(
    "command",
    [
        "eval {damaged} --data {text}",
        "export {damaged} --out {out}",
        "compress {damaged} --recipe {recipe} --out {out}",
        "heal {damaged} --teacher {dense} --data {text} --out {out} --set healing.max_steps=1",
        "heal {compressed} --teacher {damaged} --data {text} --out {out} --set healing.max_steps=1",
    ],
)
def test_damaged_weights_are_failed_work(shop, damaged, places, tmp_path, command):
    arguments = places(command.replace("{damaged}", str(damaged)))
    before = tree(tmp_path)
    ended = call(*arguments)
    assert (ended.code, ended.out) == (1, "")
    assert len(ended.err.splitlines()) == 1
    assert ended.err.startswith("kronpress: error: ")
    assert "damaged" in ended.err.partition("weights")[2]
    assert tree(tmp_path) == before


def test_weights_that_are_not_numbers_are_failed_work(shop, places, tiny_model, save_tiny_checkpoint, tmp_path):
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = math.nan
    save_tiny_checkpoint(model, tmp_path / "nan")
    ended = call(*places(f"compress {tmp_path / 'nan'} --recipe {{recipe}} --out {{out}}"))
    assert ended.code == 1
    assert "'transformer.h.1.mlp.c_fc.weight' holds NaN" in ended.err
    assert not list((tmp_path / "work").iterdir())


def test_a_full_disk_is_failed_work(shop, places, tmp_path, monkeypatch):
    def full_disk(*_: Any, **__: Any) -> NoReturn:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full_disk)
    ended = call(*places("export {compressed} --out {out}"))
    assert ended.code == 1
    assert "No space left" in ended.err
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize(("command", "code"), [("recipes nothing", 2), ("eval {damaged} --data {text}", 1)])
def test_debug_shows_where_and_changes_nothing_else(shop, damaged, places, command, code):
    arguments = places(command.replace("{damaged}", str(damaged)))
    plain, debugged = call(*arguments), call(*arguments, "--debug")
    assert plain.code == debugged.code == code
    assert "Traceback" not in plain.err
    assert "Traceback" in debugged.err
    assert debugged.err.splitlines()[-1] == plain.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("error", "code", "said"), [(ZeroDivisionError("oh"), 1, "--debug"), (KeyboardInterrupt(), 130, "")]
)
def test_what_nobody_foresaw_is_still_one_line(shop, places, monkeypatch, error, code, said):
    def fail(*_: Any) -> NoReturn:
        raise error

    monkeypatch.setattr(cli, "load_model", fail)
    ended = call(*places("eval {compressed} --data {text}"))
    assert ended.code == code
    assert len(ended.err.split("kronpress: error: ")[1].splitlines()) == 1
    assert said in ended.err
    assert "Traceback" not in ended.err


# ---- as a program ----


def test_as_a_program_it_refuses_in_one_line(shop, places, fresh_python, tmp_path):
    before = tree(tmp_path)
    ended = fresh_python("-m", "kronpress", *places("compress {dense} --recipe krony-67m --out {out}"))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert "transformer.h.0.mlp.c_fc" in ended.stderr
    assert tree(tmp_path) == before
