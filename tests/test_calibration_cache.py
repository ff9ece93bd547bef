"""What calibration keeps: keys that know all that it looks at, one file for each, and nothing where it fails."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from samples.calibration import (
    EVERYTHING,
    Build,
    assert_same,
    counted_runs,
    names_in,
    no_file_beyond,
    nothing_is_read,
    padded,
    recipe,
    rows_of_three,
    sizes_of,
    tokens,
)
from torch import nn

import kronpress as kp
from kronpress.calibration import calibrate, load_moments, moments_key
from kronpress.recipe import Recipe

# ---- keys ----


def test_moments_in_the_cache_are_not_computed_again(tiny_model: Build, tmp_path: Path) -> None:
    model, told = tiny_model("llama"), []
    wanted = recipe(sensitivity=True, held_out=0.5)
    first = calibrate(model, tokens().split(2), wanted, cache=tmp_path / "cache")
    assert names_in(tmp_path / "cache") == [f"{first.key}.safetensors"]
    handle = model.register_forward_pre_hook(lambda *_: pytest.fail("the model is run"))
    again = calibrate(model, iter(tokens().split(3)), wanted, cache=tmp_path / "cache", messages=told.append)
    assert again.key == first.key
    assert_same(again, first, rtol=0)
    # Shortage is told all the same.
    assert "read from" in told[0]
    assert "are few" in told[1]
    handle.remove()
    other = calibrate(model, [tokens(seed=1)], wanted, cache=tmp_path / "cache")
    assert len(names_in(tmp_path / "cache")) == 2
    assert (other["model.layers.0.mlp.up_proj"].second - first["model.layers.0.mlp.up_proj"].second).norm() > 0.01
    path = tmp_path / "cache" / f"{first.key}.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(kp.WorkError, match="is damaged"):
        calibrate(model, [tokens()], wanted, cache=tmp_path / "cache")


def test_the_key_changes_with_whatever_changes_the_moments(tiny_model: Build) -> None:
    def key(model: nn.Module, data: Any = None, wanted: Recipe | None = None) -> str:
        return moments_key(model, wanted or recipe(), [tokens()] if data is None else data)

    model = tiny_model("llama")
    with torch.no_grad():
        other_weight = tiny_model("llama")
        other_weight.model.norm.weight[0] += 1e-6
        other_buffer = tiny_model("llama")
        other_buffer.model.rotary_emb.inv_freq[0] += 1e-6
    ids = tokens()
    ids[-1, -1] = (ids[-1, -1] + 1) % 300
    keys = [
        key(model),
        key(other_weight),
        key(other_buffer),
        key(tiny_model("llama", num_key_value_heads=2, rms_norm_eps=0.1)),
        key(tiny_model("llama", head_dim=4, attention_dropout=0.5)),
        key(tiny_model("llama").double()),
        key(model, [ids]),
        key(model, [tokens()[:, :-1]]),
        key(model, [tokens(), tokens()]),
        key(model, [tokens().flip(0)]),
        key(model, [{"input_ids": tokens()}]),
        key(model, [padded(list(tokens()))]),
        key(model, wanted=recipe("mlp")),
        key(model, wanted=recipe(seed=1)),
        key(model, wanted=recipe(held_out=0.5)),
        key(model, wanted=recipe(sensitivity=True)),
        key(nn.Sequential(nn.Linear(3, 3, bias=False), nn.GELU()), [{"input": rows_of_three()}], recipe("0")),
    ]
    assert len(set(keys)) == len(keys)


def test_the_key_knows_modules_without_weights() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(3, 3)
    batches = [{"input": rows_of_three().float()}]
    keys = {moments_key(nn.Sequential(linear, each), recipe("0"), batches) for each in (nn.GELU(), nn.ReLU())}
    assert len(keys) == 2


def test_the_key_does_not_change_where_the_moments_stay(
    tiny_model: Build, save_tiny_checkpoint: Any, tmp_path: Path
) -> None:
    model = tiny_model("qwen2")
    key = moments_key(model, recipe(), [tokens()])
    renamed = recipe().model_copy(update={"name": "x", "budget": kp.recipe.Budget(params=5)})
    assert moments_key(model, renamed, iter(tokens().split(4))) == key
    half_frozen_model = tiny_model("qwen2").train().requires_grad_(False)
    assert moments_key(half_frozen_model, recipe(), [tokens()]) == key
    loaded = kp.load_model(str(save_tiny_checkpoint(model, tmp_path))).model
    assert moments_key(loaded.cpu(), recipe(), [tokens()]) == key


# ---- the cache, and disks that fill up ----


def test_the_cache_is_one_file_whatever_the_passes(
    tiny_model: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache = tiny_model("opt"), tmp_path / "new" / "cache"
    first = calibrate(model, [tokens(6, 7)], recipe(**EVERYTHING), cache=cache, max_bytes=1)
    assert names_in(cache) == [f"{first.key}.safetensors"]
    assert_same(load_moments(cache / f"{first.key}.safetensors", first.key), first)
    with counted_runs(model) as runs:
        told: list[str] = []
        nothing_is_read(monkeypatch)
        again = calibrate(model, tokens(6, 7).split(2), recipe(**EVERYTHING), cache=cache, messages=told.append)
        monkeypatch.undo()
    assert runs == []
    assert "read from" in told[0]
    assert "28 calibration tokens are few" in told[1]
    assert_same(again, first)


def test_a_failure_between_passes_leaves_nothing(tiny_model: Build, tmp_path: Path) -> None:
    model, wanted = tiny_model("gpt2"), recipe(**EVERYTHING)
    before = calibrate(model, [tokens(6, 7)], recipe("mlp", **EVERYTHING), cache=tmp_path, max_bytes=1)
    kept = names_in(tmp_path)
    largest = max(sizes_of(model, wanted).values())
    with no_file_beyond(2 * largest), pytest.raises(kp.WorkError, match=r"could not write '.*unchanged"):
        calibrate(model, [tokens(6, 7)], wanted, cache=tmp_path, max_bytes=1)
    assert names_in(tmp_path) == kept
    runs: list[None] = []

    def third_fails(*_: Any) -> None:
        runs.append(None)
        if len(runs) == 3:
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(third_fails)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, [tokens(6, 7)], wanted, cache=tmp_path, max_bytes=1)
    handle.remove()
    assert names_in(tmp_path) == kept
    assert_same(load_moments(tmp_path / kept[0]), before)


def test_a_disk_that_fills_up_without_a_cache_is_told(tiny_model: Build) -> None:
    states = (6 * 7) * 16 * 4 * 4
    with no_file_beyond(states), pytest.raises(kp.WorkError, match="could not write "):
        calibrate(tiny_model("gpt2"), [tokens(6, 7)], recipe(**EVERYTHING), max_bytes=1)
    with no_file_beyond(states // 2), pytest.raises(kp.WorkError, match="the hidden states could not be kept in"):
        calibrate(tiny_model("gpt2"), [tokens(6, 7)], recipe(**EVERYTHING), max_bytes=1)


def test_too_little_room_is_told_before_the_model_is_run(
    tiny_model: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, wanted = tiny_model("gpt2"), recipe(**EVERYTHING)
    needed = sum(sizes_of(model, wanted).values()) + (6 * 7) * 16 * 4 * 4
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with (
        counted_runs(model) as runs,
        pytest.raises(kp.WorkError, match=r"the moments and hidden states need .* MB, and '.*' has .* free"),
    ):
        calibrate(model, [tokens(6, 7)], wanted, cache=tmp_path, max_bytes=1)
    assert runs == []
    assert names_in(tmp_path) == []
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=needed))
    calibrate(model, [tokens(6, 7)], wanted, cache=tmp_path, max_bytes=1)
