"""Every message and exit code in docs/errors.md is what its command gives; a failure leaves all files as they were."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers.modeling_utils
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kronpress import cli
from kronpress.export import onnx_graph
from kronpress.healing.trainer import HealingTrainer
from kronpress.tokens import cache
from kronpress.weight_files import ShardFiles

PAGE = (Path(__file__).parents[1] / "docs" / "errors.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"```console\n\$ kronpress (.+)\nkronpress: error: (.+)\n\$ echo \$\?\n(\d)\n```")
SECTIONS = {
    title: BLOCK.findall(body) for title, body in re.findall(r"^### (.+)\n((?:(?!^##).*\n)*)", PAGE, re.MULTILINE)
}
KEPT = (".out.healing", ".out.streaming")
CASES = [(title, *block) for title, blocks in SECTIONS.items() for block in blocks]


# ---- what each section of the page is about: made in the current folder, beside `dense` and `small` ----


def misfit(tools: SimpleNamespace) -> None:
    tools.save(tools.model("gpt2", vocab_size=200), Path("misfit"))


def other_vocabulary(tools: SimpleNamespace) -> None:
    tools.save(tools.model("gpt2", vocab_size=310), Path("other"))


def short_texts(tools: SimpleNamespace) -> None:
    Path("empty.txt").write_text("")
    Path("short.txt").write_text("a")


def data_sets(tools: SimpleNamespace) -> None:
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The old man."}]
    Path("chat.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    Path("bodies.jsonl").write_text('{"body": "The old man."}\n')


def cut_off(tools: SimpleNamespace) -> None:
    Path("cut-off.jsonl").write_text('{"text": "The old man."}\n{"text": "He re')


def full_disk_while_tokenising(tools: SimpleNamespace) -> None:
    def write(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    tools.monkeypatch.setattr(cache, "_write", write)
    tools.monkeypatch.setattr(cache, "_opened", lambda path: None)  # nothing is found


def staged(tools: SimpleNamespace) -> None:
    table = {
        "share": 0,
        "targets": "embedding",
        "structure": "kronecker",
        "spec": {"right_shape": [1, 2], "num_terms": 1},
    }
    recipe = {"targets": "mlp", "structure": "low_rank", "budget": {"kept_of_targets": 0.5}}
    Path("staged.yaml").write_text(json.dumps({"name": "staged", **recipe, "stages": [table, {"share": 1}]}))


def latin_1(tools: SimpleNamespace) -> None:
    Path("latin-1.txt").write_text("café", encoding="latin-1")


def copy_of_small(name: str) -> Path:
    """The weights of a copy of `small`."""
    return Path(shutil.copytree("small", name)) / "model.safetensors"


def truncated(tools: SimpleNamespace) -> None:
    path = copy_of_small("truncated")
    path.write_bytes(path.read_bytes()[:-1])


def altered(tools: SimpleNamespace) -> None:
    def resave(name: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
        path = copy_of_small(name)
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    factor = "transformer.h.1.mlp.c_fc.right"
    resave("without-a-tensor", lambda tensors: tensors.pop(factor))
    resave("without-a-dense-tensor", lambda tensors: tensors.pop("transformer.h.1.attn.c_attn.weight"))
    resave("another-shape", lambda tensors: tensors.update({factor: torch.zeros(2, 1, 1)}))
    for name, place in (("flipped-bit", -1), ("damaged-header", 8)):
        path = copy_of_small(name)
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)


def newer(tools: SimpleNamespace) -> None:
    path = copy_of_small("newer").with_name("config.json")
    config = json.loads(path.read_text())
    config["quantization_config"]["format_version"] = 99
    path.write_text(json.dumps(config))


def not_finite(tools: SimpleNamespace) -> None:
    for name, value in (("with-nan", math.nan), ("with-infinity", -math.inf)):
        model = tools.model("gpt2")
        with torch.no_grad():
            model.transformer.h[1].mlp.c_proj.weight[3, 4] = value
        tools.save(model, Path(name))


def overflowing(tools: SimpleNamespace) -> None:
    model = tools.model("gpt2")
    with torch.no_grad():
        model.transformer.h[0].ln_2.weight[3] = 3e38  # times a normalised input of more than 1: infinity
    tools.save(model, Path("overflowing"))


def nan_from_the_third_step(tools: SimpleNamespace) -> None:
    take_step, calls = HealingTrainer.training_step, itertools.count(1)

    def step_with_nan(self: HealingTrainer, model: torch.nn.Module, *given: object) -> torch.Tensor:
        """From the third step on a weight is NaN while the loss is computed, and then what it was."""
        weight = next(model.parameters()).data
        before = weight.clone()
        if next(calls) >= 3:
            weight.fill_(math.nan)
        loss = take_step(self, model, *given)
        weight.copy_(before)
        return loss

    tools.monkeypatch.setattr(HealingTrainer, "training_step", step_with_nan)


def full_disk(tools: SimpleNamespace) -> None:
    def save_half(tensors: object, path: str, metadata: object) -> None:
        Path(path).write_bytes(b"half of the")
        # What safetensors raises on a full disk.
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    tools.monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", save_half)


def full_disk_while_streaming(tools: SimpleNamespace) -> None:
    def write(self: ShardFiles, tensors: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    tools.monkeypatch.setattr(ShardFiles, "write", write)


def pickled(tools: SimpleNamespace) -> None:
    Path(shutil.copytree("dense", "pickled"), "model.safetensors").rename("pickled/pytorch_model.bin")


def not_for_export(tools: SimpleNamespace) -> None:
    tools.monkeypatch.setattr(onnx_graph, "find_spec", lambda name: None)
    assert call("export", "small", "--format", "self-contained", "--out", "taken-along") == (0, "")


def nothing(tools: SimpleNamespace) -> None:
    pass


MADE = {
    "A budget that cannot be reached": nothing,
    "A shape that does not factor": nothing,
    "An unknown recipe, field or command": nothing,
    "A benchmark that cannot be made": nothing,
    "A tokenizer that does not fit the model": misfit,
    "Teacher and student with different vocabularies": other_vocabulary,
    "Empty text": short_texts,
    "Text that is too short": short_texts,
    "Training data that cannot be used": data_sets,
    "A calibration that cannot be": short_texts,
    "Streaming what needs the whole model": pickled,
    "A change that a stage would not see": staged,
    "Runs that cannot be compared": nothing,
    "An export that cannot be": not_for_export,
    "Text that is not UTF-8": latin_1,
    "A damaged data set": cut_off,
    "A full disk while tokenising": full_disk_while_tokenising,
    "Weights that are cut short": truncated,
    "Weights that were altered": altered,
    "A checkpoint of a newer format": newer,
    "NaN or infinity in a weight": not_finite,
    "NaN or infinity in what a layer reads": overflowing,
    "A loss that becomes NaN in healing": nan_from_the_third_step,
    "A full disk": full_disk,
    "A full disk while streaming": full_disk_while_streaming,
}


# ---- the tests ----


@pytest.fixture(scope="module")
def made_once(tmp_path_factory, tiny_model, save_tiny_checkpoint, tiny_text) -> Path:
    """`dense`, `small`, `text.txt` and `half.yaml`, which are the same for every case."""
    folder = tmp_path_factory.mktemp("errors")
    save_tiny_checkpoint(tiny_model("gpt2"), folder / "dense")
    (folder / "text.txt").write_text(tiny_text, encoding="utf-8")
    recipe = {
        **{"name": "half", "model": "dense", "targets": "mlp", "structure": "kronecker"},
        "spec": {"right_shape": [1, 2], "num_terms": 1},
        "healing": {
            **{"data": "text.txt", "max_steps": 4, "sequence_length": 16},
            **{"save_steps": 1, "max_skipped_steps": 2},
        },
        "evaluation": {"data": "text.txt"},
    }
    (folder / "half.yaml").write_text(json.dumps(recipe))
    names = {name: str(folder / name) for name in ("dense", "half.yaml", "small")}
    code, message = call("compress", names["dense"], "--recipe", names["half.yaml"], "--out", names["small"])
    assert code == 0, message
    return folder


@pytest.fixture
def tools(made_once, tmp_path, monkeypatch, tiny_model, save_tiny_checkpoint) -> SimpleNamespace:
    """What a section's function needs; the current folder is a new one with what was made once."""
    shutil.copytree(made_once, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return SimpleNamespace(model=tiny_model, save=save_tiny_checkpoint, monkeypatch=monkeypatch)


def call(*arguments: str) -> tuple[int, str]:
    """The exit code, and the last line on standard error."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        code = cli.main(list(arguments))
    return code, (errors.getvalue().splitlines() or [""])[-1]


def content() -> dict[str, bytes]:
    """The current folder's files, less training checkpoints and streamed layers, which are meant to stay."""
    files = (path for path in Path().rglob("*") if path.is_file())
    return {str(path): path.read_bytes() for path in files if path.parts[0] not in KEPT}


def pattern(message: str) -> str:
    """The page's message as a regular expression."""
    return ".+".join(map(re.escape, message.replace("DIR", str(Path.cwd().resolve())).split("…")))


def test_every_section_and_block_of_the_page_is_tested():
    assert list(SECTIONS) == list(MADE)
    assert all(SECTIONS.values())
    assert len(CASES) == PAGE.count("```console") == PAGE.count("```") / 2


@pytest.mark.parametrize(("title", "command", "message", "code"), CASES, ids=[command for _, command, *_ in CASES])
def test_the_message_is_that_of_the_page(tools, title, command, message, code):
    MADE[title](tools)
    before = content()
    ended, printed = call(*shlex.split(command))
    assert re.fullmatch(pattern(f"kronpress: error: {message}"), printed), printed
    assert ended == int(code)
    assert content() == before


@pytest.mark.parametrize(
    ("title", "command"), [(title, command) for title, command, *_ in CASES if "--out" in command], ids=lambda x: x
)
def test_what_the_output_folder_held_is_still_there(tools, title, command):
    MADE[title](tools)
    Path("out").mkdir()
    Path("out/notes.txt").write_text("mine")
    before = content()
    assert call(*shlex.split(command), "--overwrite")[0] in (1, 2)
    assert content() == before


def test_sections_stand_under_the_heading_of_their_exit_code():
    wrong, failed = PAGE.split("## The work failed")
    assert {code for *_, code in BLOCK.findall(wrong)} == {"2"}
    assert {code for *_, code in BLOCK.findall(failed)} == {"1"}


@pytest.mark.parametrize("targets", ["mlp", "blocks"])
@pytest.mark.parametrize("recipe", ["low-rank", "half.yaml"])
def test_the_least_possible_budget_is_possible_and_the_least(tools, targets, recipe):
    given = "plan", "dense", "--recipe", recipe, "--set", f"targets={targets}", "--set"
    code, message = call(*given, "budget.params=1")
    assert code == 2
    least_of_targets, least = map(int, re.search(r"least possible is (\d+) .* (\d+) in the model", message).groups())
    dense = sum(parameter.numel() for parameter in tools.model("gpt2").parameters())
    targets_dense = dense - (least - least_of_targets)
    assert call(*given, f"budget.params={least}")[0] == 0
    assert call(*given, f"budget.params={least - 1}")[0] == 2
    assert call(*given, f"budget.kept_of_targets={(least_of_targets + 0.5) / targets_dense}")[0] == 0
    assert call(*given, f"budget.kept_of_targets={(least_of_targets - 0.5) / targets_dense}")[0] == 2


def test_a_healing_stopped_by_nan_goes_on_from_its_last_good_checkpoint(tools):
    with tools.monkeypatch.context() as patch:
        nan_from_the_third_step(SimpleNamespace(monkeypatch=patch))
        assert call("run", "half.yaml", "--out", "out")[0] == 1
    kept = sorted(path.name for path in Path(".out.healing").glob("checkpoint-*"))
    assert kept == ["checkpoint-2", "checkpoint-3"]
    code, message = call("run", "half.yaml", "--out", "out", "--resume")
    assert code == 0, message
    results = json.loads(Path("out/results.json").read_text())
    assert results["resumed_at_steps"] == [3]
    assert results["healing"]["skipped_steps"] == 1  # the third; the fourth was taken after all
    assert not Path(".out.healing").exists()
