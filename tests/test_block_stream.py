"""The block stream measures what `calibrate` does, also behind replaced blocks, and leaves no file behind."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from samples.calibration import Build, assert_same, names_in, no_file_beyond, padded, recipe, tokens
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import kronpress as kp
from kronpress.calibration import BlockStream, calibrate
from kronpress.calibration.states import StatesFile
from kronpress.families import FAMILIES as KNOWN_FAMILIES
from kronpress.matrices.moments import InputMoments
from kronpress.recipe import Recipe
from kronpress.surgery import linear_layers

FAMILIES = ["gpt2", "opt", "llama", "qwen2"]
every_family = pytest.mark.parametrize("family", FAMILIES)


def names_in_block(model: PreTrainedModel, index: int) -> list[str]:
    return [name for name in linear_layers(model) if f".{index}." in name]


def streamed(model: PreTrainedModel, batches: Iterable[Any], folder: Path, **options: Any) -> dict[str, InputMoments]:
    moments: dict[str, InputMoments] = {}
    with BlockStream(model, batches, folder, **options) as stream:
        for index in range(stream.num_blocks):
            moments |= stream.moments(index, names_in_block(model, index))
            stream.advance(index)
    return moments


@every_family
def test_the_block_stream_measures_what_calibrate_does(family: str, tiny_model: Build, tmp_path: Path) -> None:
    model = tiny_model(family)
    batches = [tokens(4), padded([tokens(1, 7)[0], tokens(1, 3)[0]]), {"input_ids": tokens(2), "use_cache": True}]
    moments = streamed(model, iter(batches), tmp_path / "new", held_out=0.4)
    assert_same(moments, calibrate(model, batches, recipe(held_out=0.4)), rtol=1e-6)
    assert names_in(tmp_path / "new") == []
    query, key = names_in_block(model, 0)[:2]
    assert (moments[query].second is moments[key].second) == (family != "gpt2")


@pytest.mark.parametrize("model_type", sorted(set(KNOWN_FAMILIES) - set(FAMILIES)))
def test_every_known_family_can_be_streamed(model_type: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    heads = {"num_key_value_heads": 1, "head_dim": 8}
    config = AutoConfig.for_model(model_type, vocab_size=300, pad_token_id=0, **sizes, **heads)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert_same(streamed(model, [tokens()], tmp_path), calibrate(model, [tokens()], recipe()), rtol=1e-6)


def test_every_block_gets_its_own_mask(tiny_model: Build, tmp_path: Path) -> None:
    model = tiny_model("qwen2", use_sliding_window=True, sliding_window=3, max_window_layers=1)
    assert len(set(model.config.layer_types)) == 2
    expected = calibrate(model, [tokens()], recipe())
    assert_same(streamed(model, [tokens()], tmp_path), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_states_keep_the_models_dtype(dtype: torch.dtype, tiny_model: Build, tmp_path: Path) -> None:
    model, told = tiny_model("llama").to(dtype), []
    moments = streamed(model, [tokens()], tmp_path, messages=told.append)
    assert_same(moments, calibrate(model, [tokens()], recipe()), rtol=1e-12)
    needed = 6 * 9 * 16 * dtype.itemsize
    assert told == [f"the hidden states of 54 tokens take {needed / 1e6:,.1f} MB in {str(tmp_path)!r}"]


@every_family
def test_later_blocks_see_what_the_replaced_ones_give(family: str, tiny_model: Build, tmp_path: Path) -> None:
    def compress_first_block_(model: PreTrainedModel) -> None:
        targets = [name.replace(".", r"\.") for name in names_in_block(model, 0)]
        wanted = Recipe(targets=targets, structure="low_rank", spec={"rank": 3})
        kp.compress_(model, kp.make_plan(model, wanted))

    model, replaced = tiny_model(family), tiny_model(family)
    names = names_in_block(model, 1)
    with BlockStream(model, tokens().split(4), tmp_path) as stream:
        compress_first_block_(model)
        stream.advance(0)
        moments = stream.moments(1, names)
        assert_same(stream.moments(1, names[:1]), {names[0]: moments[names[0]]}, rtol=0)
    compress_first_block_(replaced)
    targets = recipe([name.replace(".", r"\.") for name in names])
    assert_same(moments, calibrate(replaced, [tokens()], targets), rtol=1e-6)
    dense = calibrate(tiny_model(family), [tokens()], targets)
    assert (dense[names[0]].second - moments[names[0]].second).norm() > 0.01 * dense[names[0]].second.norm()


def test_blocks_come_in_order_and_layers_from_their_block(tiny_model: Build, tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    with BlockStream(model, [tokens()], tmp_path) as stream:
        for call in (stream.advance, lambda index: stream.moments(index, [])):
            with pytest.raises(kp.RequestError, match="block 1: the stream stands before block 0 of 2"):
                call(1)
        for name in ("transformer.h.1.mlp.c_fc", "mlp.c_fc", "transformer.h.0.mlp", "transformer.h.0.ln_1"):
            with pytest.raises(kp.RequestError, match=f"block 0 has no linear layer {name!r}"):
                stream.moments(0, [name])
        stream.advance(0)
        stream.advance(1)
        with pytest.raises(kp.RequestError, match="block 2: the stream stands before block 2 of 2"):
            stream.moments(2, [])


def test_a_model_of_an_unknown_family_has_no_stream(tmp_path: Path) -> None:
    with pytest.raises(kp.RequestError, match="a model of type None cannot be run: known types are gpt2"):
        BlockStream(nn.Sequential(nn.Linear(2, 2)), [tokens()], tmp_path)


def test_too_little_disk_space_is_told_before_anything_is_written(
    tiny_model: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 6 * 9 * 16 * 4
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    monkeypatch.setattr(StatesFile, "write", lambda *_: pytest.fail("written"))
    with pytest.raises(kp.WorkError, match=r"the hidden states need 0\.0 MB, and '.*' has 0\.0 MB free"):
        BlockStream(tiny_model("gpt2"), [tokens()], tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=needed))
    BlockStream(tiny_model("gpt2"), [tokens()], tmp_path).close()


def test_a_disk_that_fills_up_is_told_and_ends_the_stream(tiny_model: Build, tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    batches = tokens().split(2)
    with no_file_beyond(1500), pytest.raises(kp.WorkError, match=r"the hidden states could not be kept in '.*': "):
        BlockStream(model, batches, tmp_path)
    with BlockStream(model, batches, tmp_path) as stream:
        with no_file_beyond(1500), pytest.raises(kp.WorkError, match="could not be kept"):
            stream.advance(0)
        with pytest.raises(kp.WorkError, match="broke off inside a block"):
            stream.advance(0)
        with pytest.raises(kp.WorkError, match="broke off inside a block"):
            stream.moments(0, names_in_block(model, 0))
    (tmp_path / "file").touch()
    with pytest.raises(kp.WorkError, match="could not be kept"):
        BlockStream(model, batches, tmp_path / "file")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_block_at_a_time_is_on_the_compute_device(tiny_model: Build, tmp_path: Path) -> None:
    model, devices = tiny_model("llama"), []
    blocks = list(model.model.layers)
    for block in blocks:
        block.register_forward_pre_hook(
            lambda *_: devices.append([next(each.parameters()).device.type for each in blocks])
        )
    moments = streamed(model, [tokens()], tmp_path, device="cuda")
    assert {tuple(each) for each in devices} == {("cuda", "cpu"), ("cpu", "cuda")}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert_same(moments, calibrate(model, [tokens()], recipe()), rtol=1e-3)
