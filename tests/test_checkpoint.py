"""A compressed model comes back from disk as it was saved, or fails loudly; a save happens whole or not at all."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import kronpress as kp
from kronpress.checkpoint import CHECKSUM, FORMAT_VERSION, load_config, record_checksum_
from kronpress.cli import main
from kronpress.surgery import structured_layers

FAMILIES = ("gpt2", "opt", "llama", "qwen2")
CASES = tuple(itertools.product(FAMILIES, kp.matrices.STRUCTURES))
EVERY_CASE = pytest.mark.parametrize(("family", "structure"), CASES)
IDS = torch.tensor([[7, 281, 3, 90, 90, 14, 255, 1], [9, 8, 7, 6, 5, 4, 3, 2]])


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS.to(next(model.parameters()).device)).logits


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def edit_config(folder: Path, edit: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    edit(config["quantization_config"])
    path.write_text(json.dumps(config), encoding="utf-8")


def edit_weights(folder: Path, edit: Any) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@EVERY_CASE
@pytest.mark.parametrize("options", [{}, {"device_map": "auto"}], ids=["plain", "device_map"])
def test_loading_gives_bit_identical_logits(tiny_compressed, tmp_path, family, structure, options):
    model = tiny_compressed(family, structure)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    assert type(loaded) is type(model)
    assert list(structured_layers(loaded)) == list(structured_layers(model))
    assert_same(logits_of(loaded), logits_of(model.to(loaded.device)))


@EVERY_CASE
def test_loaded_model_knows_its_plan_and_keeps_its_ties(tiny_compressed, tmp_path, family, structure):
    model = tiny_compressed(family, structure)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert kp.attached_plan(loaded) == kp.attached_plan(model)
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == loaded.config.tie_word_embeddings
    assert sum(p.numel() for p in loaded.parameters()) == kp.attached_plan(model).num_params


@EVERY_CASE
def test_saving_again_and_in_shards_changes_nothing(tiny_compressed, tmp_path, family, structure):
    model = tiny_compressed(family, structure)
    model.save_pretrained(tmp_path / "first")
    AutoModelForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert content(tmp_path / "second") == content(tmp_path / "first")

    AutoModelForCausalLM.from_pretrained(tmp_path / "second").save_pretrained(
        tmp_path / "shards", max_shard_size="12KB"
    )
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert_same(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "shards")), logits_of(model))


@EVERY_CASE
def test_dtypes(tiny_compressed, tmp_path, family, structure):
    model = tiny_compressed(family, structure)
    expected = logits_of(model)
    model.save_pretrained(tmp_path / "float32")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16)
    rounded = logits_of(model.to(torch.bfloat16))
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert_same(logits_of(loaded), rounded)

    model.save_pretrained(tmp_path / "bfloat16")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "bfloat16", dtype="auto")
    assert again.dtype is torch.bfloat16
    assert_same(logits_of(again), rounded)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "float32")
    assert loaded.half().dtype is torch.float16
    assert loaded.float().dtype is torch.float32
    torch.testing.assert_close(logits_of(loaded), expected, rtol=0.05, atol=0.05)
    assert loaded.to("cpu", torch.float64).dtype is torch.float64


@EVERY_CASE
def test_generation_with_a_cache_equals_generation_without(tiny_compressed, tmp_path, family, structure):
    tiny_compressed(family, structure).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    options = {"do_sample": False, "min_new_tokens": 16, "max_new_tokens": 16, "pad_token_id": 0}
    mask = torch.ones_like(IDS)
    with_cache, without = (
        loaded.generate(IDS, attention_mask=mask, use_cache=use_cache, **options) for use_cache in (True, False)
    )
    assert with_cache.shape == (2, IDS.shape[1] + 16)
    assert_same(with_cache, without)


@EVERY_CASE
@torch.no_grad()
def test_the_base_model_loads_and_saves_too(tiny_compressed, tmp_path, family, structure):
    model = tiny_compressed(family, structure)
    model.save_pretrained(tmp_path / "with-head")
    base = AutoModel.from_pretrained(tmp_path / "with-head").eval()
    assert len(structured_layers(base)) == len(structured_layers(model))
    expected = model.base_model(input_ids=IDS).last_hidden_state
    assert_same(base(input_ids=IDS).last_hidden_state, expected)

    base.save_pretrained(tmp_path / "base")
    again = AutoModel.from_pretrained(tmp_path / "base").eval()
    assert_same(again(input_ids=IDS).last_hidden_state, expected)


# ---- stock transformers, in a process that never imports kronpress ----

STOCK = """
import json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM

request = json.loads(sys.argv[1])
ids = torch.tensor(request["ids"])
with torch.no_grad():
    save_file(
        {name: AutoModelForCausalLM.from_pretrained(path)(input_ids=ids).logits.contiguous()
         for name, path in request["dense"].items()},
        request["out"],
    )
outcomes = {}
for name, path in request["compressed"].items():
    for kind in (AutoModelForCausalLM, AutoModel):
        try:
            kind.from_pretrained(path)
            outcomes[f"{name} {kind.__name__}"] = "returned a model"
        except Exception as error:
            outcomes[f"{name} {kind.__name__}"] = "raised"
assert "kronpress" not in sys.modules
print(json.dumps(outcomes))
"""


def test_stock_transformers_loads_dense_exports_and_refuses_compressed_checkpoints(
    tiny_compressed, save_tiny_checkpoint, fresh_python, tmp_path
):
    expected: dict[str, Tensor] = {}
    compressed: dict[str, str] = {}
    dense: dict[str, str] = {}
    for family, structure in CASES:
        model = tiny_compressed(family, structure)
        name = f"{family}-{structure}"
        compressed[name] = str(save_tiny_checkpoint(model, tmp_path / name))
        dense[name] = str(tmp_path / f"{name}-dense")
        kp.to_dense(model).save_pretrained(dense[name])
        expected[name] = logits_of(model)
    for name in ("gpt2-kronecker", "llama-low_rank"):
        dense[f"{name}-cli"] = str(tmp_path / f"{name}-cli")
        assert main(["export", compressed[name], "--format", "dense", "--out", dense[f"{name}-cli"]]) == 0
        expected[f"{name}-cli"] = expected[name]

    request = {"ids": IDS.tolist(), "compressed": compressed, "dense": dense, "out": str(tmp_path / "logits")}
    ended = fresh_python("-c", STOCK, json.dumps(request))
    assert ended.returncode == 0, ended.stderr
    outcomes = json.loads(ended.stdout)
    assert len(outcomes) == 2 * len(CASES)
    assert set(outcomes.values()) == {"raised"}, outcomes
    logits = load_file(tmp_path / "logits")
    assert logits.keys() == expected.keys()
    for name, wanted in expected.items():
        torch.testing.assert_close(logits[name], wanted, rtol=0, atol=1e-5 * wanted.abs().max().item(), msg=name)


@EVERY_CASE
def test_to_dense_gives_an_ordinary_copy(tiny_model, tiny_compressed, family, structure):
    original, model = tiny_model(family), tiny_compressed(family, structure)
    expected = logits_of(model)
    dense = kp.to_dense(model)
    assert [(name, type(module)) for name, module in dense.named_modules()] == [
        (name, type(module)) for name, module in original.named_modules()
    ]
    assert {name: p.shape for name, p in dense.named_parameters()} == {
        name: p.shape for name, p in original.named_parameters()
    }
    target = dense.get_submodule(next(iter(structured_layers(model))))
    assert type(target) is (Conv1D if family == "gpt2" else nn.Linear)
    assert getattr(dense.config, "quantization_config", None) is None
    torch.testing.assert_close(logits_of(dense), expected, rtol=0, atol=1e-5 * expected.abs().max().item())

    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.zero_()
    assert kp.attached_plan(model) is not None
    assert_same(logits_of(model), expected)


def test_to_dense_refuses_a_dense_model(tiny_model):
    with pytest.raises(kp.RequestError, match="dense already"):
        kp.to_dense(tiny_model("gpt2"))


def test_to_dense_of_a_plain_module(tiny_recipe):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8, bias=False))
    kp.compress_(model, kp.make_plan(model, tiny_recipe("kronecker", targets=[r"\d+"])))
    x = torch.randn(3, 8)
    dense = kp.to_dense(model)
    assert [type(layer) for layer in dense] == [nn.Linear, nn.ReLU, nn.Linear]
    torch.testing.assert_close(dense(x), model(x))


def test_a_dense_model_has_no_plan(tiny_model):
    assert kp.attached_plan(tiny_model("gpt2")) is None
    assert kp.attached_plan(nn.Linear(2, 2)) is None


# ---- atomic writes ----


@pytest.fixture
def finished(tiny_compressed, tiny_tokenizer, tmp_path) -> tuple[Path, dict[str, bytes]]:
    """A folder saved earlier, alone in its parent, and its content."""
    out = tmp_path / "parent" / "model"
    kp.save_checkpoint(tiny_compressed("gpt2", "low_rank"), tiny_tokenizer, out)
    return out, content(out)


def full_disk_after_weights(self: PreTrainedModel, folder: Path, **_: Any) -> None:
    Path(folder).mkdir(exist_ok=True)
    (Path(folder) / "model.safetensors").write_bytes(b"half of the")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("existing", [True, False])
def test_a_full_disk_leaves_what_was_there(finished, tiny_compressed, tiny_tokenizer, monkeypatch, existing):
    out, before = finished
    target = out if existing else out.with_name("new")
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full_disk_after_weights)
    with pytest.raises(kp.WorkError, match="No space left"):
        kp.save_checkpoint(tiny_compressed("gpt2", "kronecker"), tiny_tokenizer, target, overwrite=True)
    assert content(out) == before
    assert [path.name for path in out.parent.iterdir()] == ["model"]


def test_an_interrupt_leaves_what_was_there(finished, tiny_compressed, tiny_tokenizer, monkeypatch):
    out, before = finished

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(tiny_tokenizer), "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kp.save_checkpoint(tiny_compressed("gpt2", "kronecker"), tiny_tokenizer, out, overwrite=True)
    assert content(out) == before
    assert [path.name for path in out.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("failing_call", [1, 2])
def test_a_failed_rename_leaves_what_was_there(finished, tiny_compressed, tiny_tokenizer, monkeypatch, failing_call):
    out, before = finished
    rename, calls = Path.rename, itertools.count(1)

    def failing(self: Path, target: Path) -> Path:
        if next(calls) == failing_call:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(kp.WorkError, match="Input/output error"):
        kp.save_checkpoint(tiny_compressed("gpt2", "kronecker"), tiny_tokenizer, out, overwrite=True)
    assert content(out) == before
    assert [path.name for path in out.parent.iterdir()] == ["model"]


KILLED_WHILE_SAVING = """
import os, signal, sys
from pathlib import Path
from transformers import PreTrainedTokenizerBase
import kronpress as kp

loaded = kp.load_model(sys.argv[1])
PreTrainedTokenizerBase.save_pretrained = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
for parameter in loaded.model.parameters():
    parameter.data.zero_()
for out in sys.argv[2:]:
    kp.save_checkpoint(loaded.model, loaded.tokenizer, Path(out), overwrite=True)
"""


def test_a_killed_save_leaves_what_was_there(finished, fresh_python, tiny_compressed, tiny_tokenizer):
    out, before = finished
    assert fresh_python("-c", KILLED_WHILE_SAVING, str(out), str(out)).returncode == -signal.SIGKILL
    assert content(out) == before
    assert [path.name for path in out.parent.iterdir() if not path.name.startswith(".")] == ["model"]
    assert_same(logits_of(kp.load_model(str(out)).model), logits_of(tiny_compressed("gpt2", "low_rank")))

    other = tiny_compressed("gpt2", "kronecker")
    kp.save_checkpoint(other, tiny_tokenizer, out, overwrite=True)
    assert_same(logits_of(kp.load_model(str(out)).model), logits_of(other))


def test_an_output_folder_that_holds_something_is_kept_unless_told_otherwise(
    finished, tiny_compressed, tiny_tokenizer, tmp_path
):
    out, before = finished
    model = tiny_compressed("gpt2", "kronecker")
    with pytest.raises(kp.RequestError, match=r"model' is not empty.*--overwrite"):
        kp.save_checkpoint(model, tiny_tokenizer, out)
    assert content(out) == before

    (out / "left-over.txt").write_text("from before")
    kp.save_checkpoint(model, tiny_tokenizer, out, overwrite=True)
    assert not (out / "left-over.txt").exists()
    assert_same(logits_of(kp.load_model(str(out)).model), logits_of(model))

    file = tmp_path / "file"
    file.write_text("a file")
    with pytest.raises(kp.RequestError, match="is a file"):
        kp.save_checkpoint(model, tiny_tokenizer, file, overwrite=True)
    assert file.read_text() == "a file"


def test_missing_parents_are_made_and_an_empty_folder_is_used(tiny_compressed, tmp_path):
    model = tiny_compressed("gpt2", "low_rank")
    for out in (tmp_path / "not" / "there" / "yet", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        kp.save_checkpoint(model, None, out)
        assert (out / "model.safetensors").is_file()


@pytest.mark.parametrize("out", [".", "..", "../../here"])
def test_the_current_folder_and_what_holds_it_are_never_replaced(tiny_compressed, tmp_path, monkeypatch, out):
    here = tmp_path / "here" / "here"
    here.mkdir(parents=True)
    (tmp_path / "here" / "notes.txt").write_text("mine")
    monkeypatch.chdir(here)
    with pytest.raises(kp.RequestError, match="current folder"):
        kp.save_checkpoint(tiny_compressed("gpt2", "low_rank"), None, Path(out), overwrite=True)
    assert (tmp_path / "here" / "notes.txt").read_text() == "mine"


# ---- checkpoints that cannot be loaded ----


@pytest.fixture
def checkpoint(tiny_compressed, save_tiny_checkpoint, tmp_path) -> Path:
    return save_tiny_checkpoint(tiny_compressed("gpt2", "kronecker"), tmp_path / "checkpoint")


def assert_refused(folder: Path, *fragments: str) -> None:
    """Neither way to load returns a model, and kronpress's own says why in one sentence."""
    with pytest.raises(Exception):  # noqa: B017  # what transformers raises is its own affair
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(kp.WorkError) as refusal:
        kp.load_model(str(folder))
    message = str(refusal.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


def test_a_newer_format_version_is_refused(checkpoint):
    edit_config(checkpoint, lambda config: config.update(format_version=FORMAT_VERSION + 1))
    assert_refused(checkpoint, f"format version {FORMAT_VERSION + 1}", f"newer than {FORMAT_VERSION}", "upgrade")


@pytest.mark.parametrize("part", ["weight", "right", "bias"])
def test_a_missing_tensor_of_a_structured_layer_is_named(checkpoint, part):
    key = f"transformer.h.1.mlp.c_fc.{part}"
    edit_weights(checkpoint, lambda tensors: tensors.pop(key))
    assert_refused(checkpoint, key, "missing")


def test_a_factor_of_another_shape_is_named(checkpoint):
    key = "transformer.h.1.mlp.c_fc.right"
    edit_weights(checkpoint, lambda tensors: tensors.update({key: torch.zeros(2, 2, 2)}))
    assert_refused(checkpoint, key)


def test_truncated_weights_are_refused(checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert_refused(checkpoint, str(checkpoint), "damaged")


def test_a_plan_for_a_module_that_the_model_lacks_is_refused(checkpoint):
    def rename(config: dict[str, Any]) -> None:
        layers = config["plan"]["layers"]
        layers["transformer.h.7.mlp.c_fc"] = layers.pop("transformer.h.1.mlp.c_fc")

    edit_config(checkpoint, rename)
    assert_refused(checkpoint, "transformer.h.7.mlp.c_fc", "GPT2LMHeadModel")


def test_a_plan_with_an_unknown_structure_is_refused_by_name(checkpoint):
    edit_config(
        checkpoint, lambda config: config["plan"]["layers"]["transformer.h.1.mlp.c_fc"].update(structure="spam")
    )
    assert_refused(checkpoint, "spam")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_is_not_there_or_not_readable_is_refused(checkpoint, name):
    (checkpoint / name).write_text("{ this is neither JSON nor weights")
    assert_refused(checkpoint, str(checkpoint))


# ---- checksums ----


def flip_bit(path: Path, place: int) -> None:
    changed = bytearray(path.read_bytes())
    changed[place] ^= 1
    path.write_bytes(changed)


@pytest.mark.parametrize("part", [b"transformer.wte", b"data", b'kronpress.sha256": "', b"the last byte"])
def test_a_bit_that_flips_after_saving_is_seen(finished, part):
    weights = finished[0] / "model.safetensors"
    places = {b"data": weights.stat().st_size // 2, b"the last byte": -1}
    place = places[part] if part in places else weights.read_bytes().index(part) + len(part)
    if part == b"transformer.wte":
        place -= 1  # into a name, not a quotation mark
    flip_bit(weights, place)
    assert_refused(finished[0], "model.safetensors has another SHA-256")


def test_a_bit_that_flips_in_one_of_several_files_is_seen(tiny_compressed, tmp_path):
    model = tiny_compressed("gpt2", "kronecker")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    for path in shards:
        record_checksum_(path)
    assert_same(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), logits_of(model))
    flip_bit(shards[-1], -1)
    with pytest.raises(kp.WorkError, match=rf"{shards[-1].name} has another SHA-256"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_weights_that_a_user_writes_over_ours_are_not_accused(finished):
    loaded = kp.load_model(str(finished[0])).model
    with torch.no_grad():
        loaded.transformer.wte.weight += 1
    loaded.save_pretrained(finished[0])
    assert_same(logits_of(kp.load_model(str(finished[0])).model), logits_of(loaded))


def test_a_checksum_leaves_the_tensors_and_their_place_as_they_were(finished, tiny_compressed, tmp_path):
    tiny_compressed("gpt2", "low_rank").save_pretrained(tmp_path / "plain")
    plain, ours = (load_file(folder / "model.safetensors") for folder in (tmp_path / "plain", finished[0]))
    assert list(ours) == list(plain)
    for name, tensor in plain.items():
        assert_same(ours[name], tensor)
    content = (finished[0] / "model.safetensors").read_bytes()
    assert int.from_bytes(content[:8], "little") % 8 == 0  # tensors start where processors like to read them
    with safe_open(finished[0] / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"
        assert re.fullmatch("[0-9a-f]{64}", file.metadata()[CHECKSUM])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["transformer.wte.weight", "transformer.h.1.mlp.c_fc.right"])
def test_weights_that_are_not_finite_are_refused_by_name(tiny_compressed, save_tiny_checkpoint, tmp_path, name, value):
    model = tiny_compressed("gpt2", "kronecker")
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] = value
    with pytest.raises(kp.WorkError, match=f"'{name}' holds {'NaN' if value != value else 'infinity'}"):
        kp.load_model(str(save_tiny_checkpoint(model, tmp_path)))


# ---- load_model and load_config ----


def test_load_model_gives_float32_and_remembers_what_is_stored(tiny_compressed, save_tiny_checkpoint, tmp_path):
    model = tiny_compressed("llama", "low_rank").half()
    loaded = kp.load_model(str(save_tiny_checkpoint(model, tmp_path / "run" / "model")))
    assert (loaded.dtype, loaded.model.dtype, loaded.revision) == (torch.float16, torch.float32, None)
    assert len(loaded.tokenizer) == 300
    for name, parameter in model.named_parameters():
        assert_same(loaded.model.get_parameter(name).cpu(), parameter.float())
    assert_same(logits_of(kp.load_model(str(tmp_path / "run")).model), logits_of(loaded.model))


def test_what_is_no_checkpoint_is_a_wrong_request(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.txt").write_text("text")
    for name, fragment in {
        str(tmp_path / "folder"): "no checkpoint",
        str(tmp_path / "file.txt"): "no checkpoint",
        str(tmp_path / "nowhere"): "no such folder",
        "./nowhere": "no such folder",
        "not a valid id!": "Hub",
    }.items():
        for load in (kp.load_model, load_config):
            with pytest.raises(kp.RequestError) as refusal:
                load(name)
            assert name in str(refusal.value)
            assert fragment in str(refusal.value)
            assert "\n" not in str(refusal.value)


def test_a_hub_out_of_reach_is_failed_work():
    with pytest.raises(kp.WorkError, match=r"'some-organisation/some-model' is neither .* Hub") as failure:
        kp.load_model("some-organisation/some-model")
    assert "\n" not in str(failure.value)


def test_a_bare_geometry_gives_way_to_a_folder_of_that_name(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("gpt2").n_embd == 768
    tiny_model("gpt2").save_pretrained("gpt2")
    assert load_config("gpt2").n_embd == 16


def test_a_compressed_checkpoint_cannot_be_planned_again(checkpoint, tiny_recipe):
    with pytest.raises(kp.RequestError, match=r"compressed.*already"):
        kp.make_plan(load_config(str(checkpoint)), tiny_recipe("low_rank"))


def test_a_missing_dense_tensor_is_refused_too(tiny_model, save_tiny_checkpoint, tmp_path):
    folder = save_tiny_checkpoint(tiny_model("gpt2"), tmp_path / "dense")
    edit_weights(folder, lambda tensors: tensors.pop("transformer.h.0.attn.c_attn.weight"))
    with pytest.raises(kp.WorkError, match=r"transformer\.h\.0\.attn\.c_attn\.weight"):
        kp.load_model(str(folder))


def test_weights_of_nothing_are_refused(checkpoint):
    edit_weights(checkpoint, lambda tensors: tensors.clear())
    assert_refused(checkpoint, "missing")
