"""Streaming: the same files as loading, compressing and saving; the same after a kill; clear errors, nothing lost."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import kronpress as kp
from kronpress import cli
from kronpress.checkpoint import check_checksum, load_config
from kronpress.weight_files import INDEX, WEIGHTS, ShardFiles, StoredWeights, TensorType, shards

EVERYTHING = {"targets": "all", "name": "everything"}


@pytest.fixture
def dense(
    tmp_path: Path,
    tiny_model: Callable[..., PreTrainedModel],
    save_tiny_checkpoint: Callable[[PreTrainedModel, Path], Path],
) -> Callable[..., Path]:
    """family, dtype, changes of the configuration -> a folder with the model."""

    def build(family: str = "gpt2", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
        return save_tiny_checkpoint(tiny_model(family, **changes).to(dtype), tmp_path / "dense")

    return build


def in_memory(source: Path, recipe: kp.Recipe, out: Path) -> dict[str, kp.LayerReport]:
    """What the command `compress` does."""
    loaded = kp.load_model(str(source))
    reports = kp.compress_(loaded.model, kp.make_plan(loaded.model, recipe))
    kp.save_checkpoint(loaded.model, loaded.tokenizer, out, dtype=loaded.dtype)
    return reports


def streamed(source: Path, recipe: kp.Recipe, out: Path, **options: Any) -> dict[str, kp.LayerReport]:
    return kp.compress_streaming(source, kp.make_plan(load_config(str(source)), recipe), out, **options)


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {key: each for path in sorted(folder.glob("*.safetensors")) for key, each in load_file(path).items()}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def hidden(out: Path) -> Path:
    return out.with_name(f".{out.name}.streaming")


# ---- the same as in memory ----


@pytest.mark.parametrize("max_shard_bytes", [10**9, 4000], ids=["one file", "many files"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("family", "structure", "changes"),
    [
        ("gpt2", "kronecker", {}),
        ("gpt2", "kronecker", EVERYTHING),
        ("gpt2", "kronecker", {**EVERYTHING, "head": "dense"}),
        ("qwen2", "low_rank", {}),
        ("llama", "kronecker", EVERYTHING),
        ("opt", "permuted_kronecker", {}),
    ],
    ids=["gpt2", "tied head", "head left dense", "qwen2", "llama", "opt"],
)
def test_the_checkpoint_is_the_one_that_compressing_in_memory_gives(
    family: str,
    structure: str,
    changes: dict[str, Any],
    dtype: torch.dtype,
    max_shard_bytes: int,
    dense: Callable[..., Path],
    tiny_recipe: Callable[..., kp.Recipe],
    tmp_path: Path,
) -> None:
    source, recipe = dense(family, dtype), tiny_recipe(structure, **changes)
    expected = in_memory(source, recipe, tmp_path / "in_memory")
    assert streamed(source, recipe, tmp_path / "out", max_shard_bytes=max_shard_bytes) == expected
    torch.testing.assert_close(tensors_in(tmp_path / "out"), tensors_in(tmp_path / "in_memory"), rtol=0, atol=0)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "in_memory")]
    assert configs[0] == configs[1]
    assert not hidden(tmp_path / "out").exists()

    for path in (tmp_path / "out").glob("*.safetensors"):
        check_checksum(path)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("out", "in_memory")]
    ids = torch.arange(20)[None]
    torch.testing.assert_close(models[0](ids).logits, models[1](ids).logits, rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the café") == AutoTokenizer.from_pretrained(source)(
        "the café"
    )


def test_shards_hold_no_more_than_asked_and_say_so_in_the_index(
    dense: Callable[..., Path], tiny_recipe: Callable[..., kp.Recipe], tmp_path: Path
) -> None:
    source, most = dense(), 4000
    streamed(source, tiny_recipe("kronecker"), tmp_path / "out", max_shard_bytes=most)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    total = 0
    for path in sorted((tmp_path / "out").glob("*.safetensors")):
        tensors = load_file(path)
        sizes = [each.nbytes for each in tensors.values()]
        assert sum(sizes) <= most or len(sizes) == 1
        assert {index["weight_map"][key] for key in tensors} == {path.name}
        total += sum(sizes)
    assert index["metadata"]["total_size"] == total


def test_sources_in_several_files_and_without_the_models_prefix_are_read(
    dense: Callable[..., Path], tiny_recipe: Callable[..., kp.Recipe], tmp_path: Path
) -> None:
    source, recipe = dense(), tiny_recipe("kronecker")
    streamed(source, recipe, tmp_path / "expected")
    weights = {key.removeprefix("transformer."): each for key, each in load_file(source / WEIGHTS).items()}
    (source / WEIGHTS).unlink()
    halves = [dict(list(weights.items())[i::2]) for i in range(2)]
    for i, half in enumerate(halves):
        save_file(half, source / f"part-{i}.safetensors", metadata={"format": "pt"})
    weight_map = {key: f"part-{i}.safetensors" for i, half in enumerate(halves) for key in half}
    (source / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    streamed(source, recipe, tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "expected" / WEIGHTS).read_bytes()


def test_moments_are_used_as_in_memory(
    dense: Callable[..., Path], tiny_recipe: Callable[..., kp.Recipe], tmp_path: Path
) -> None:
    source = dense()
    recipe = tiny_recipe("low_rank", weighting={"metric": "input", "bias_correction": True})
    loaded = kp.load_model(str(source))
    batches = list(torch.randint(300, (8, 64), generator=torch.Generator().manual_seed(0)).split(2))
    moments = kp.calibrate(loaded.model, batches, recipe)
    plan = kp.make_plan(loaded.model, recipe, moments)
    reports = kp.compress_streaming(source, plan, tmp_path / "out", moments=moments)
    assert kp.compress_(loaded.model, plan, moments=moments) == reports
    torch.testing.assert_close(
        tensors_in(tmp_path / "out"),
        {key: each for key, each in loaded.model.state_dict().items() if key != "lm_head.weight"},
        rtol=0,
        atol=0,
    )


def test_the_command_streams_and_reports_as_without(
    dense: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(dense("gpt2"))
    documents = []
    for name, options in (("plain", []), ("streamed", ["--streaming"])):
        out = str(tmp_path / name)
        assert cli.main(["compress", source, "--recipe", "krony-96m", "--out", out, "--json", *options]) == 0
        documents.append({**json.loads(capsys.readouterr().out), "out": None})
    assert documents[0] == documents[1]
    torch.testing.assert_close(tensors_in(tmp_path / "plain"), tensors_in(tmp_path / "streamed"), rtol=0, atol=0)


# ---- after an interruption ----

CHILD = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import kronpress as kp
from kronpress.checkpoint import load_config
source, recipe, out = sys.argv[1:]
plan = kp.make_plan(load_config(source), kp.load_recipe(recipe))
def wait(name, done, total):
    print(done, flush=True)
    if done == 3:
        import time
        time.sleep(600)
kp.compress_streaming(source, plan, out, progress=wait, max_shard_bytes=4000)
"""


def test_after_a_kill_the_same_request_goes_on_and_gives_the_same_files(
    dense: Callable[..., Path], tmp_path: Path, tiny_recipe: Callable[..., kp.Recipe]
) -> None:
    source, recipe = dense(), tiny_recipe("kronecker")
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe.model_dump(mode="json", exclude_unset=True)))
    recipe = kp.load_recipe(str(tmp_path / "recipe.yaml"))
    out, whole = tmp_path / "out", tmp_path / "whole"
    reports = streamed(source, recipe, whole, max_shard_bytes=4000)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(source), str(tmp_path / "recipe.yaml"), str(out)],
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert child.stdout is not None
    for line in child.stdout:
        if line.strip() == b"3":
            break
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not out.exists()
    first_state = (hidden(out) / "journal.jsonl").read_bytes()
    assert len(first_state.splitlines()) == 1 + 3

    fitted: list[str] = []
    fit = kp.matrices.Kronecker.fit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            kp.matrices.Kronecker, "fit", staticmethod(lambda *a, **k: (fitted.append("layer"), fit(*a, **k))[1])
        )
        assert streamed(source, recipe, out, max_shard_bytes=4000) == reports
    assert len(fitted) == len(reports) - 3
    assert content(out) == content(whole)


class Stop(Exception):
    pass


def interrupted(source: Path, recipe: kp.Recipe, out: Path, after: int, **options: Any) -> None:
    def stop(name: str, done: int, total: int) -> None:
        if done == after:
            raise Stop

    with pytest.raises(Stop):
        streamed(source, recipe, out, progress=stop, **options)


@pytest.mark.parametrize("damage", ["a torn line", "a flipped bit", "a missing file"])
def test_what_an_interruption_left_damaged_is_made_anew(
    damage: str, dense: Callable[..., Path], tiny_recipe: Callable[..., kp.Recipe], tmp_path: Path
) -> None:
    source, recipe = dense(), tiny_recipe("kronecker")
    streamed(source, recipe, tmp_path / "whole")
    out = tmp_path / "out"
    interrupted(source, recipe, out, after=3)
    match damage:
        case "a torn line":
            journal = hidden(out) / "journal.jsonl"
            journal.write_bytes(journal.read_bytes()[:-10])
        case "a flipped bit":
            weights = bytearray((hidden(out) / WEIGHTS).read_bytes())
            place = weights.find(tensors_in(tmp_path / "whole")["transformer.h.0.mlp.c_fc.right"].numpy().tobytes())
            assert place > 0
            weights[place] ^= 1
            (hidden(out) / WEIGHTS).write_bytes(weights)
        case "a missing file":
            (hidden(out) / WEIGHTS).unlink()
    streamed(source, recipe, out)
    assert content(out) == content(tmp_path / "whole")


def test_unfinished_work_of_another_request_is_neither_used_nor_lost(
    dense: Callable[..., Path], tiny_recipe: Callable[..., kp.Recipe], tmp_path: Path
) -> None:
    source, recipe = dense(), tiny_recipe("kronecker")
    other = tiny_recipe("kronecker", spec={"right_shape": [4, 2], "num_terms": 3})
    out = tmp_path / "out"
    interrupted(source, recipe, out, after=3, max_shard_bytes=4000)
    before = content(hidden(out))
    with pytest.raises(kp.RequestError, match="holds the unfinished work of another request"):
        streamed(source, other, out)
    assert content(hidden(out)) == before
    streamed(source, other, out, overwrite=True)
    streamed(source, other, tmp_path / "whole")
    assert content(out) == content(tmp_path / "whole")


def test_changed_weights_are_another_request(
    dense: Callable[..., Path], tiny_recipe: Callable[..., kp.Recipe], tmp_path: Path
) -> None:
    source, recipe = dense(), tiny_recipe("kronecker")
    interrupted(source, recipe, tmp_path / "out", after=3)
    time.sleep(0.01)
    save_file({key: -each for key, each in load_file(source / WEIGHTS).items()}, source / WEIGHTS, {"format": "pt"})
    with pytest.raises(kp.RequestError, match="another request"):
        streamed(source, recipe, tmp_path / "out")


# ---- errors ----


def test_a_full_disk_is_one_sentence_and_what_is_done_is_kept(
    dense: Callable[..., Path],
    tiny_recipe: Callable[..., kp.Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, recipe, out = dense(), tiny_recipe("kronecker"), tmp_path / "out"
    streamed(source, recipe, tmp_path / "whole")
    write, writes = ShardFiles.write, []

    def full(self: ShardFiles, tensors: Any) -> str:
        writes.append(tensors)
        if len(writes) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(ShardFiles, "write", full)
        with pytest.raises(kp.WorkError, match="No space left on device; the layers that are done are kept in") as info:
            streamed(source, recipe, out)
    assert str(hidden(out)) in str(info.value)
    assert not out.exists()
    assert len((hidden(out) / "journal.jsonl").read_text().splitlines()) == 1 + 3
    streamed(source, recipe, out)
    assert content(out) == content(tmp_path / "whole")


def edited(source: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(source / WEIGHTS)
    edit(tensors)
    save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})


LAYER = "transformer.h.1.mlp.c_fc.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop(LAYER), f"1 tensors are missing, such as {LAYER}"),
        (lambda tensors: tensors.update({LAYER: torch.zeros(3, 3)}), rf"{LAYER} has shape \(3, 3\), its configuration"),
        (lambda tensors: tensors[LAYER].view(-1)[5:6].fill_(torch.nan), f"'{LAYER}' holds NaN"),
        (lambda tensors: tensors["transformer.ln_f.bias"].fill_(torch.inf), "'transformer.ln_f.bias' holds infinity"),
    ],
    ids=["missing", "another shape", "NaN", "infinity"],
)
def test_wrong_weights_are_named_and_nothing_takes_the_output_name(
    edit: Callable[[dict[str, torch.Tensor]], object],
    message: str,
    dense: Callable[..., Path],
    tiny_recipe: Callable[..., kp.Recipe],
    tmp_path: Path,
) -> None:
    source = dense()
    edited(source, edit)
    with pytest.raises(kp.WorkError, match=message):
        streamed(source, tiny_recipe("kronecker"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["cut short", "no header", "missing", "no JSON"])
def test_damaged_files_are_named(
    damage: str, dense: Callable[..., Path], tiny_recipe: Callable[..., kp.Recipe], tmp_path: Path
) -> None:
    source = dense()
    plan = kp.make_plan(load_config(str(source)), tiny_recipe("kronecker"))
    path = source / WEIGHTS
    match damage:
        case "cut short":
            path.write_bytes(path.read_bytes()[:-1])
        case "no header":
            path.write_bytes(b"\x10" + path.read_bytes())
        case "missing":
            path.rename(source / "elsewhere")
            (source / INDEX).write_text(json.dumps({"weight_map": {LAYER: "part.safetensors"}}))
        case "no JSON":
            path.rename(source / "elsewhere")
            (source / INDEX).write_text("{")
    with pytest.raises(kp.WorkError, match=f"model '{source}': its weights are damaged"):
        kp.compress_streaming(source, plan, tmp_path / "out")


def test_weights_that_the_configuration_ties_and_that_differ_are_refused(
    dense: Callable[..., Path], tiny_recipe: Callable[..., kp.Recipe], tmp_path: Path
) -> None:
    source = dense()
    edited(source, lambda tensors: tensors.update({"lm_head.weight": 2 * tensors["transformer.wte.weight"]}))
    with pytest.raises(
        kp.RequestError, match=r"ties 'transformer.wte.weight' and 'lm_head.weight', and the weights di"
    ):
        streamed(source, tiny_recipe("kronecker"), tmp_path / "out")


@pytest.mark.parametrize(
    ("structure", "changes", "reason"),
    [
        ("kronecker", {"folding": ["mlp"]}, "has folding, which needs the whole model in memory"),
        ("low_rank", {"weighting": {"metric": "input", "sequential": True}}, "has weighting.sequential"),
        ("low_rank", {"weighting": {"metric": "input"}}, "the metric 'input' needs moments of"),
    ],
)
def test_recipes_that_need_the_whole_model_are_refused(
    structure: str,
    changes: dict[str, Any],
    reason: str,
    dense: Callable[..., Path],
    tiny_recipe: Callable[..., kp.Recipe],
    tmp_path: Path,
) -> None:
    with pytest.raises(kp.RequestError, match=reason):
        streamed(dense(), tiny_recipe(structure, **changes), tmp_path / "out")


def test_pickled_weights_hub_ids_and_compressed_models_are_refused(
    dense: Callable[..., Path], tiny_recipe: Callable[..., kp.Recipe], tmp_path: Path
) -> None:
    source, recipe = dense(), tiny_recipe("kronecker")
    plan = kp.make_plan(load_config(str(source)), recipe)
    streamed(source, recipe, tmp_path / "small")
    with pytest.raises(kp.RequestError, match="compressed or quantised already"):
        kp.compress_streaming(tmp_path / "small", plan, tmp_path / "out")
    with pytest.raises(kp.RequestError, match="'someone/model' is no local folder"):
        kp.compress_streaming("someone/model", plan, tmp_path / "out")
    (source / WEIGHTS).rename(source / "pytorch_model.bin")
    with pytest.raises(kp.RequestError, match=r"pytorch_model.bin is a pickle, which is not opened"):
        kp.compress_streaming(source, plan, tmp_path / "out")


# ---- the files ----


def test_every_dtype_comes_back_from_its_place(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool]
    tensors = {
        f"{kind}-{i}": torch.randint(0, 2, (3, i), generator=generator).to(kind)
        for i, kind in enumerate(reversed(kinds), start=1)
    }
    layout = shards({key: TensorType(tuple(each.shape), each.dtype) for key, each in tensors.items()}, 10**6)
    files = ShardFiles(tmp_path, layout)
    keys = sorted(tensors)
    written = files.write({key: tensors[key] for key in keys})
    assert files.checksum(keys) == written
    files.finish()
    torch.testing.assert_close(load_file(tmp_path / WEIGHTS), tensors, rtol=0, atol=0)
    stored = StoredWeights.of("it", tmp_path)
    for key, each in tensors.items():
        torch.testing.assert_close(stored.read(key), each, rtol=0, atol=0)
    check_checksum(tmp_path / WEIGHTS)
