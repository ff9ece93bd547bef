"""Moments in a file: they go round, are read when they are asked for, and no damage goes unnoticed."""

from __future__ import annotations

import hashlib
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from samples.calibration import (
    EVERYTHING,
    Build,
    assert_same,
    names_in,
    no_file_beyond,
    nothing_is_read,
    recipe,
    rows_of_three,
    tokens,
)
from torch import Tensor, nn

import kronpress as kp
from kronpress.calibration import Moments, calibrate, load_moments
from kronpress.matrices.moments import InputMoments

PARTS = ("second", "mean", "magnitude", "gradient", "held_out")


# ---- there and back ----


def same_file_content(moments: Moments, path: Path) -> None:
    loaded = load_moments(path, moments.key)
    assert loaded.key == moments.key
    assert_same(loaded, moments, rtol=0)
    for name, other in [(name, other) for name in moments for other in moments]:
        for part in ("second", "mean", "gradient", "held_out"):
            together = getattr(moments[name], part) is getattr(moments[other], part)
            assert (getattr(loaded[name], part) is getattr(loaded[other], part)) == together


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("changes", [{}, {"sensitivity": True, "held_out": 0.5}])
def test_moments_go_round_through_a_file(
    family: str, changes: dict[str, Any], tiny_model: Build, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "moments.safetensors"
    moments = calibrate(tiny_model(family), [tokens()], recipe(**changes))
    moments.save(path)
    same_file_content(moments, path)
    stored = {id(t): t.nbytes for layer in moments.values() for t in vars(layer).values() if isinstance(t, Tensor)}
    header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == 8 + header_bytes + sum(stored.values())
    assert header_bytes < 1500 * len(moments)
    assert names_in(path.parent) == ["moments.safetensors"]


def test_moments_cannot_be_changed(tiny_model: Build) -> None:
    moments = calibrate(tiny_model("gpt2"), [tokens()], recipe())
    with pytest.raises(TypeError):
        moments["x"] = next(iter(moments.values()))  # type: ignore[index]
    with pytest.raises(TypeError):
        moments.table["x"] = {}  # type: ignore[index]
    with pytest.raises(TypeError):
        moments.tensors["x"] = torch.zeros(1)  # type: ignore[index]
    with pytest.raises(AttributeError):
        moments.key = "x"  # type: ignore[misc]


def small_moments() -> Moments:
    model = nn.Sequential(nn.Linear(3, 5)).double()
    return calibrate(model, [{"input": rows_of_three()}], recipe("0"))


def test_a_file_of_another_key_is_refused(tmp_path: Path) -> None:
    small_moments().save(tmp_path / "a")
    with pytest.raises(kp.RequestError, match=r"moments of another model, other targets or other data: '.*a' has"):
        load_moments(tmp_path / "a", "0123456789abcdef")
    assert list(load_moments(tmp_path / "a")) == ["0"]


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(kp.RequestError, match=r"no moments file '.*nothing'"):
        load_moments(tmp_path / "nothing")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip_a_bit,
        lambda path: path.write_text("no such thing"),
        lambda path: path.write_bytes(b""),
        lambda path: save_file({"x": torch.zeros(2)}, path),
        lambda path: save_file({"x": torch.zeros(2)}, path, {"kronpress.moments": "[]"}),
    ],
    ids=["truncated", "a bit", "text", "empty", "another file", "no layers"],
)
def test_a_damaged_file_is_told(damage: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "moments.safetensors"
    small_moments().save(path)
    damage(path)
    with pytest.raises(kp.WorkError, match=r"moments\.safetensors' is damaged.*delete it"):
        load_moments(path)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "moments.safetensors"
    old = small_moments()
    old.save(path)

    with no_file_beyond(path.stat().st_size - 1), pytest.raises(kp.WorkError, match=r"could not write '.*too large"):
        old.save(path)
    assert names_in(tmp_path) == ["moments.safetensors"]
    same_file_content(old, path)
    with pytest.raises(kp.WorkError, match="could not write"):
        old.save(path / "below a file")


# ---- moments that stay in a file ----


@pytest.fixture
def stored(tiny_model: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Moments:
    """Moments of a tiny Llama from several passes, in a file without a name in tmp_path / "temporary"."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    return calibrate(tiny_model("llama"), [tokens(6, 7)], recipe(**EVERYTHING), max_bytes=1)


def test_a_file_without_a_name_lives_as_long_as_its_moments(
    tiny_model: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    begin = tempfile.TemporaryFile
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **where: opened.append(begin(**where)) or opened[-1])
    moments = calibrate(tiny_model("llama"), [tokens(6, 7)], recipe(**EVERYTHING), max_bytes=1)
    assert names_in(tmp_path) == []
    assert [file.closed for file in opened] == [False, True]  # the hidden states are of no more use
    layer = moments["model.layers.1.mlp.up_proj"]
    del moments
    assert all(file.closed for file in opened)
    assert layer.second.isfinite().all()


def test_a_layer_is_read_when_asked_for_and_not_kept(stored: Moments, tiny_model: Build) -> None:
    name = "model.layers.0.self_attn.q_proj"
    first = stored[name]
    seen = [weakref.ref(getattr(first, part)) for part in PARTS]
    # What is still in use is given out again, also to a layer that has it too.
    assert all(getattr(stored[name], part) is getattr(first, part) for part in PARTS)
    copies = {part: getattr(first, part).clone() for part in PARTS}
    del first
    assert [ref() for ref in seen] == [None] * len(PARTS)
    again = stored[name]
    for part in PARTS:
        torch.testing.assert_close(getattr(again, part), copies[part], rtol=0, atol=0)


def test_what_is_not_a_moment_is_known_without_reading(stored: Moments, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing_is_read(monkeypatch)
    names = list(stored)
    assert len(names) == len(stored) == 14
    assert names[3] in stored
    assert "no such layer" not in stored
    assert {stored.num_tokens(name) for name in names} == {4 * 7}
    assert stored.keys() >= set(names)
    with pytest.raises(KeyError, match="no such layer"):
        stored["no such layer"]


def test_saving_what_is_in_a_file_gives_another_file(stored: Moments, tmp_path: Path) -> None:
    stored.save(tmp_path / "new" / "moments.safetensors")
    loaded = load_moments(tmp_path / "new" / "moments.safetensors", stored.key)
    assert_same(loaded, stored)
    assert loaded.key == stored.key
    assert names_in(tmp_path / "new") == ["moments.safetensors"]


def test_a_file_is_checked_once_and_without_its_tensors_in_memory(
    stored: Moments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "moments.safetensors"
    stored.save(path)
    with monkeypatch.context() as patch:
        nothing_is_read(patch)
        loaded = load_moments(path)
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("checked again"))
    path.unlink()  # the open file stays
    assert_same(loaded, stored)


def test_a_file_that_is_cut_short_after_it_was_opened_is_told(stored: Moments, tmp_path: Path) -> None:
    path = tmp_path / "moments.safetensors"
    stored.save(path)
    loaded = load_moments(path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(kp.WorkError, match=r"the moments '.*layers\.0.*' are no longer in their file"):
        list(loaded.values())


@pytest.mark.parametrize("max_bytes", [1, 2**40])
def test_the_file_is_one_of_safetensors(max_bytes: int, tiny_model: Build, tmp_path: Path) -> None:
    moments = calibrate(tiny_model("llama"), [tokens(6, 7)], recipe(**EVERYTHING), max_bytes=max_bytes)
    moments.save(tmp_path / "moments")
    tensors = load_file(tmp_path / "moments")
    assert set(tensors) == set(moments.tensors)
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, moments.tensors[name], rtol=0, atol=0)


@settings(max_examples=30, deadline=None)
@given(names=st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=4, unique=True), data=st.data())
def test_layers_of_any_name_and_size_go_round(
    names: list[str], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any_name"
    layers = {}
    for name in names:
        width, height = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
        layers[name] = InputMoments(
            torch.randn(width, width).double(),
            torch.randn(width).double(),
            data.draw(st.integers(1, 10**15)),
            gradient=data.draw(st.sampled_from([None, torch.randn(height, height).double()])),
            magnitude=torch.randn(width).double(),
        )
    shared = data.draw(st.sampled_from(names))
    layers["another"] = layers[shared]
    Moments.of(layers, "key").save(path)
    assert_same(load_moments(path, "key"), layers)
    assert load_moments(path)["another"].second.data_ptr() != layers[shared].second.data_ptr()


def small_file(path: Path) -> Path:
    second = torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double()
    Moments.of({"a": InputMoments(second, second[0], 5, held_out=2 * second)}, "0123456789abcdef").save(path)
    return path


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_damage_to_a_file_is_told(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = small_file(tmp_path_factory.getbasetemp() / "damaged")
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        content = content[:place]
    path.write_bytes(content)
    # Of the number of the format a changed bit makes another one.
    with pytest.raises((kp.WorkError, kp.RequestError), match=r"is damaged.*delete it|of format \d, and this version"):
        load_moments(path)


def test_another_format_is_told(tmp_path: Path) -> None:
    path = small_file(tmp_path / "moments")
    content = path.read_bytes().replace(b'\\"format\\": 4', b'\\"format\\": 9')
    path.write_bytes(content)
    with pytest.raises(kp.RequestError, match=r"moments' holds moments of format 9, and this version reads format 4"):
        load_moments(path)
