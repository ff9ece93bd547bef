"""Exports to ONNX and to self-contained folders compute what the compressed model computes, from the factors."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

import kronpress as kp
from kronpress.cli import main
from kronpress.export import export_checkpoint, onnx_graph, self_contained
from kronpress.export.source import source_of
from kronpress.layers import StructuredEmbedding, StructuredLinear
from kronpress.matrices import STRUCTURES
from kronpress.surgery import structured_layers

HAS_ONNX = all(importlib.util.find_spec(name) for name in onnx_graph.REQUIRED)
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="the extra `onnx` is not installed")
FAMILIES = ("gpt2", "opt", "llama", "qwen2")
IDS = torch.tensor([[5, 17, 250, 3, 99, 4, 1], [8, 8, 120, 0, 44, 260, 31]])
# What the files that belong to any checkpoint are called.
CARRIED = {
    "README.md",
    "kronpress.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="session")
def checkpoint(tiny_model, tiny_recipe, save_tiny_checkpoint, tmp_path_factory) -> Callable[..., Path]:
    """family, structure, targets -> a compressed checkpoint, made once."""

    @functools.cache
    def make(family: str, structure: str, targets: str = "blocks", dtype: torch.dtype = torch.float32) -> Path:
        model = tiny_model(family)
        kp.compress_(model, kp.make_plan(model, tiny_recipe(structure, targets=targets)))
        with torch.no_grad():  # orders that are found in noise may be the given ones
            for name, buffer in model.named_buffers():
                if name.endswith("_order"):
                    buffer.copy_(torch.randperm(len(buffer), generator=torch.Generator().manual_seed(len(buffer))))
        return save_tiny_checkpoint(model.to(dtype), tmp_path_factory.mktemp("compressed"))

    return make


def plain(model: PreTrainedModel) -> PreTrainedModel:
    """The model with each layer computed by its structure's own product, whichever way its `forward` may choose."""

    def linear(layer: StructuredLinear, x: Tensor) -> Tensor:
        return layer.structure.multiply(layer.factors, x, layer.bias)

    def embedding(layer: StructuredEmbedding, indices: Tensor) -> Tensor:
        return layer.structure.rows(layer.factors, indices)

    for layer in structured_layers(model).values():
        layer.forward = functools.partial(linear if isinstance(layer, StructuredLinear) else embedding, layer)
    return model.eval()


def logits_of(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- self-contained ----

# Runs in a fresh interpreter in which kronpress cannot be imported.
WITHOUT_KRONPRESS = """
import json, os, sys
sys.modules["kronpress"] = None
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
torch.set_num_threads(1)
request = json.loads(sys.argv[1])
ids = torch.tensor(request["ids"])
answers, found = {}, {}
def aligned(model):
    for each in model.parameters():
        each.data = each.data.clone()
    return model
for name, path in request["folders"].items():
    try:
        AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
        answers[name] = {"stock": "returned a model"}
    except Exception as error:
        answers[name] = {"stock": "raised"}
    model, info = AutoModelForCausalLM.from_pretrained(
        path, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    again = os.path.join(request["out"], name)
    model.save_pretrained(again)
    resaved = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        # Sums are rounded otherwise where a file happens to put a tensor at another address.
        found[name] = aligned(model)(input_ids=ids).logits
        assert torch.equal(aligned(resaved)(input_ids=ids).logits, found[name]), name
        found[name + " generated"] = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    parameters = {id(p): p.numel() for p in model.parameters()}
    answers[name] |= {
        "loading": sorted(map(str, (*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]))),
        "num_params": sum(parameters.values()),
        "tokens": AutoTokenizer.from_pretrained(path)("the old man")["input_ids"],
    }
save_file({name: tensor.contiguous() for name, tensor in found.items()}, os.path.join(request["out"], "found"))
print(json.dumps(answers))
"""


def test_self_contained_folders_give_equal_logits_without_kronpress(checkpoint, fresh_python, tiny_tokenizer, tmp_path):
    cases = [(family, structure, "blocks") for structure in STRUCTURES for family in ("gpt2", "llama")]
    cases += [(family, "kronecker", "all") for family in FAMILIES]
    cases += [("gpt2", structure, "all") for structure in STRUCTURES if structure != "kronecker"]
    cases += [("opt", "low_rank", "blocks")]
    folders = {}
    for case in cases:
        folders["-".join(case)] = str(tmp_path / "-".join(case))
        export_checkpoint(str(checkpoint(*case)), "self-contained", tmp_path / "-".join(case))
    request = {"ids": IDS.tolist(), "folders": folders, "out": str(tmp_path)}
    ended = fresh_python("-c", WITHOUT_KRONPRESS, json.dumps(request), HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert ended.returncode == 0, ended.stderr
    assert "kronpress" not in ended.stderr.replace("kronpress_", "")
    found, answers = load_file(tmp_path / "found"), json.loads(ended.stdout)
    assert answers.keys() == folders.keys()
    for case in cases:
        name = "-".join(case)
        model = plain(kp.load_model(str(checkpoint(*case))).model)
        for each in model.parameters():
            each.data = each.data.clone()
        torch.testing.assert_close(found[name], logits_of(model), rtol=0, atol=0, msg=name)
        wanted = model.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0)
        torch.testing.assert_close(found[f"{name} generated"], wanted, msg=name)
        assert answers[name] == {
            "stock": "raised",
            "loading": [],
            "num_params": sum(p.numel() for p in model.parameters()),
            "tokens": tiny_tokenizer("the old man")["input_ids"],
        }, name


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_fewer_hidden_units_are_taken_along_without_kronpress(
    family, tiny_model, save_tiny_checkpoint, fresh_python, tmp_path
):
    """What `auto` makes of MLPs; narrower attention needs code that is not taken along, and is refused."""
    model, auto = tiny_model(family), {"structure": "auto", "candidates": ["low_rank", "reduced"]}
    recipe = {**auto, "targets": "blocks", "allocation": "measured", "weighting": {"metric": "loss"}}
    loaded = kp.load_recipe({**recipe, "budget": {"kept_of_targets": 0.5}})
    moments = kp.calibrate(model, [IDS], loaded)
    kp.compress_(model, kp.make_plan(model, loaded, moments), moments=moments)
    plan = kp.checkpoint.attached_plan(model)
    assert {"low_rank", "reduced"} <= {layer.structure for layer in plan.layers.values()}
    save_tiny_checkpoint(model, tmp_path / "small")
    export_checkpoint(str(tmp_path / "small"), "self-contained", tmp_path / "out")
    request = {"ids": IDS.tolist(), "folders": {"out": str(tmp_path / "out")}, "out": str(tmp_path)}
    ended = fresh_python("-c", WITHOUT_KRONPRESS, json.dumps(request), HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert ended.returncode == 0, ended.stderr
    wanted = logits_of(plain(kp.load_model(str(tmp_path / "small")).model))
    torch.testing.assert_close(load_file(tmp_path / "found")["out"], wanted, rtol=0, atol=1e-6)
    assert json.loads(ended.stdout)["out"]["stock"] == "raised"

    weights = load_file(tmp_path / "out" / "model.safetensors")
    narrow = next(name for name, layer in plan.layers.items() if layer.structure == "reduced")
    del weights[f"{narrow}.weight"]
    save_file(weights, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    ended = fresh_python("-c", WITHOUT_KRONPRESS, json.dumps(request), HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert f"the checkpoint is damaged: {narrow}.weight is missing" in ended.stderr


def test_attention_of_reduced_widths_is_not_taken_along(tiny_model, save_tiny_checkpoint, tmp_path):
    model, recipe = tiny_model("gpt2"), kp.load_recipe("modegpt", ["budget.kept_of_targets=0.6"])
    moments = kp.calibrate(model, [IDS], recipe)
    kp.compress_(model, kp.make_plan(model, recipe, moments), moments=moments)
    save_tiny_checkpoint(model, tmp_path / "small")
    with pytest.raises(kp.RequestError, match="attention of reduced widths, which cannot be taken along as code"):
        export_checkpoint(str(tmp_path / "small"), "self-contained", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_self_contained_folder_keeps_weights_and_dtype(checkpoint, tmp_path):
    source = checkpoint("gpt2", "low_rank", "all", torch.bfloat16)
    assert main(["export", str(source), "--format", "self-contained", "--out", str(tmp_path / "out")]) == 0
    files = tree(tmp_path / "out")
    assert files.keys() == CARRIED | {"model.safetensors", "kronpress_runtime.py"}
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        torch.testing.assert_close(after[key], tensor, rtol=0, atol=0)
    config = json.loads(files["config.json"])
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert files["tokenizer.json"] == (source / "tokenizer.json").read_bytes()


MISSING = """
import sys
sys.modules["kronpress"] = None
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        print("returned a model")
    except RuntimeError as error:
        print(error)
"""


def test_a_self_contained_folder_without_a_factor_or_an_order_is_refused(checkpoint, fresh_python, tmp_path):
    lost = ["transformer.h.1.mlp.c_fc.right", "transformer.h.1.mlp.c_fc.row_order", "transformer.wte.weight"]
    folders = []
    for number, key in enumerate(lost):
        folders.append(tmp_path / f"lost-{number}")
        export_checkpoint(str(checkpoint("gpt2", "permuted_kronecker", "all")), "self-contained", folders[-1])
        tensors = load_file(folders[-1] / "model.safetensors")
        del tensors[key]
        save_file(tensors, folders[-1] / "model.safetensors", metadata={"format": "pt"})
    ended = fresh_python("-c", MISSING, *map(str, folders), HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert ended.returncode == 0, ended.stderr
    for line, key in zip(ended.stdout.splitlines(), lost, strict=True):
        assert f"{key} is missing" in line


def test_the_code_has_the_functions_of_the_package_and_no_other():
    text = self_contained.runtime_source(sorted(STRUCTURES), "GPT2LMHeadModel")
    assert "import kronpress" not in text and "from kronpress" not in text
    namespace: dict[str, Any] = {}
    exec(compile(text, "runtime", "exec"), namespace)
    assert namespace["STRUCTURES"].keys() == STRUCTURES.keys()
    for name, taken in namespace["STRUCTURES"].items():
        assert {"multiply", "rows"} <= vars(taken).keys() and taken.__mro__ == (taken, object)
        assert taken is not STRUCTURES[name]
    assert not {"fit", "factor_shapes", "candidate_specs"} & {
        part for taken in namespace["STRUCTURES"].values() for part in vars(taken)
    }


class Odd(kp.matrices.StructuredMatrix):
    table = nn.Identity()

    @staticmethod
    def uses_an_object(x: Tensor) -> Tensor:
        return x * NOT_A_NUMBER

    @classmethod
    def uses_a_field(cls, x: Tensor) -> Tensor:
        return cls.table(x)

    @staticmethod
    def uses_a_number(x: Tensor) -> Tensor:
        return x * NUMBER + math.pi


NUMBER = 3
NOT_A_NUMBER = torch.ones(1)


def test_source_takes_constants_and_imports_along_and_refuses_objects(monkeypatch):
    monkeypatch.setattr("kronpress.export.source.PACKAGE", __name__)
    text = source_of([(Odd, "uses_a_number")])
    namespace: dict[str, Any] = {}
    exec("from __future__ import annotations\n" + text, namespace)
    assert namespace["Odd"].uses_a_number(2) == 6 + math.pi
    for method, name in (("uses_an_object", "NOT_A_NUMBER"), ("uses_a_field", "table")):
        with pytest.raises(TypeError, match=name):
            source_of([(Odd, method)])


def test_a_wrong_self_contained_folder_is_not_kept(checkpoint, tmp_path, monkeypatch):
    written = self_contained.runtime_source

    def without_biases(structures: list[str], base: str) -> str:
        return written(structures, base).replace("multiply(self.factors, x, self.bias)", "multiply(self.factors, x)")

    monkeypatch.setattr(self_contained, "runtime_source", without_biases)
    with pytest.raises(kp.WorkError, match="logits"):
        export_checkpoint(str(checkpoint("gpt2", "permuted_kronecker")), "self-contained", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ---- ONNX ----

ONNX_CASES = [
    ("gpt2", "permuted_kronecker", "all"),
    ("opt", "monarch", "blocks"),
    ("llama", "tensor_train", "blocks"),
]


@pytest.fixture(scope="session")
def onnx_folder(checkpoint, tmp_path_factory) -> Callable[..., Path]:
    """A case -> its ONNX folder, made once."""

    @functools.cache
    def make(*case: str) -> Path:
        out = tmp_path_factory.mktemp("onnx") / "out"
        export_checkpoint(str(checkpoint(*case)), "onnx", out)
        return out

    return make


def session_of(folder: Path) -> Callable[..., list[Tensor]]:
    """The graph as a function of token ids, mask and what it gave before (None: nothing)."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    inputs = {each.name: each for each in session.get_inputs()}

    def run(input_ids: Tensor, attention_mask: Tensor, past: list[Tensor] | None) -> list[Tensor]:
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        feed = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions}
        caches = [name for name in inputs if name.startswith("past_key_values.")]
        if past is None:
            past = [torch.zeros(len(input_ids), inputs[name].shape[1], 0, inputs[name].shape[3]) for name in caches]
        feed |= dict(zip(caches, past, strict=True))
        return [torch.from_numpy(each) for each in session.run(None, {name: feed[name].numpy() for name in inputs})]

    return run


@needs_onnx
@pytest.mark.parametrize("case", ONNX_CASES, ids="-".join)
def test_onnx_continues_as_torch_generates(checkpoint, onnx_folder, case):
    model = kp.load_model(str(checkpoint(*case))).model.eval()
    run = session_of(onnx_folder(*case))
    for batch, padding in ((1, 0), (2, 3)):
        ids, mask = IDS[:batch], torch.ones(batch, IDS.shape[1], dtype=torch.int64)
        mask[0, :padding] = 0
        wanted = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        given, past, new = ids, None, []
        for expected in wanted.logits:
            logits, *past = run(given, mask, past)
            allowed = 1e-4 * max(1.0, expected.abs().max().item())
            torch.testing.assert_close(logits[:, -1], expected, rtol=0, atol=allowed)
            given = logits[:, -1:].clone()
            given[..., 0] = -torch.inf  # the end of the text is kept from being generated
            given = given.argmax(-1)
            mask = torch.cat([mask, torch.ones_like(given)], 1)
            new.append(given)
        assert torch.cat(new, 1).tolist() == wanted.sequences[:, ids.shape[1] :].tolist()


@needs_onnx
@pytest.mark.parametrize("case", ONNX_CASES, ids="-".join)
def test_onnx_holds_each_parameter_once_under_its_name_and_standard_operators_alone(checkpoint, onnx_folder, case):
    import onnx

    folder = onnx_folder(*case)
    assert tree(folder).keys() == CARRIED | {"model.onnx"}
    graph = onnx.load(folder / "model.onnx")
    onnx.checker.check_model(graph)
    assert {node.domain for node in graph.graph.node} == {""} and not graph.functions
    assert {each.domain for each in graph.opset_import} == {""}
    model = kp.load_model(str(checkpoint(*case))).model
    held = {each.name: torch.from_numpy(onnx.numpy_helper.to_array(each).copy()) for each in graph.graph.initializer}
    tensors = model.state_dict()
    owned = {id(p): [] for p in model.parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owned[id(parameter)].append(name)
    for names in owned.values():
        (name,) = [name for name in names if name in held]  # a tied one under one of its names
        torch.testing.assert_close(held[name], tensors[name], rtol=0, atol=0)
    rest = {name: tensor for name, tensor in held.items() if name not in tensors and name.endswith("inv_freq") is False}
    assert max(tensor.numel() for tensor in rest.values()) <= 8
    weights = sum(p.numel() * 4 for p in model.parameters()) + sum(b.numel() * 8 for b in model.buffers())
    assert (folder / "model.onnx").stat().st_size < weights + 120_000  # the graph itself
    assert str(folder.parent).encode() not in (folder / "model.onnx").read_bytes()
    assert b"site-packages" not in (folder / "model.onnx").read_bytes()
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"


@needs_onnx
def test_onnx_of_sliding_windows_and_of_bfloat16_is_float32(tiny_recipe, save_tiny_checkpoint, tmp_path, capsys):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        sliding_window=4,  # less than the check's prompts
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = MistralForCausalLM(config)
    kp.compress_(model, kp.make_plan(model, tiny_recipe("low_rank")))
    source = save_tiny_checkpoint(model.to(torch.bfloat16), tmp_path / "source")
    assert main(["export", str(source), "--format", "onnx", "--out", str(tmp_path / "out")]) == 0
    assert "bfloat16 are written as float32" in capsys.readouterr().err
    ids, mask = torch.arange(20, 30)[None], torch.ones(1, 10, dtype=torch.int64)
    logits, *_ = session_of(tmp_path / "out")(ids, mask, None)
    torch.testing.assert_close(logits, logits_of(kp.load_model(str(source)).model, ids), rtol=0, atol=1e-4)


@needs_onnx
def test_a_graph_that_differs_from_torch_is_refused(checkpoint, onnx_folder):
    case = ONNX_CASES[2]
    model = kp.load_model(str(checkpoint(*case))).model.eval()
    steps = onnx_graph.conversations(model)
    caches = onnx_graph._cache_of(model)
    path = onnx_folder(*case) / "model.onnx"
    onnx_graph.check(path, steps, caches)
    logits = steps[1][3].logits
    assert steps[1][3].attention_mask[0, 0] == 0 and steps[1][3].input_ids.shape == (2, 1)
    logits[1, 0, 7] += 2e-4 * max(1.0, logits.abs().max().item())
    with pytest.raises(kp.WorkError, match="step 3 of 2 sequences"):
        onnx_graph.check(path, steps, caches)


def test_onnx_without_the_extra_is_refused_before_any_work(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graph, "find_spec", lambda name: None if name == "onnxruntime" else object())
    monkeypatch.setattr("kronpress.export.formats.load_model", None)
    with pytest.raises(kp.RequestError, match=r"onnxruntime is not installed: pip install 'kronpress\[onnx\]'"):
        export_checkpoint("anything", "onnx", tmp_path / "out")


# ---- both ----


@pytest.mark.parametrize("format", ["self-contained", pytest.param("onnx", marks=needs_onnx)])
def test_what_cannot_be_exported_is_refused_and_nothing_is_left(
    tiny_model, save_tiny_checkpoint, checkpoint, tmp_path, monkeypatch, format
):
    dense = save_tiny_checkpoint(tiny_model("gpt2"), tmp_path / "dense")
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    good = checkpoint("gpt2", "low_rank")
    before = sorted(tmp_path.rglob("*"))
    for source, out, message in (
        (dense, tmp_path / "out", "dense already"),
        (full, tmp_path / "out", "no checkpoint"),
        (good, full, "not empty"),
    ):
        with pytest.raises(kp.RequestError, match=message):
            export_checkpoint(str(source), format, out)
    monkeypatch.setattr(
        "kronpress.export.formats.cast_parameters_", lambda *given: (_ for _ in ()).throw(OSError("full"))
    )
    monkeypatch.setattr(
        "kronpress.export.formats.write_self_contained", lambda *given: (_ for _ in ()).throw(OSError("full"))
    )
    with pytest.raises(kp.WorkError, match="full"):
        export_checkpoint(str(good), format, full, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before
