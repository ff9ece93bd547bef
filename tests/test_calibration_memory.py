"""Calibration in bounded memory: passes that measure some layers each, and moments that stay in a file."""

from __future__ import annotations

import hashlib
import resource
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import kronpress as kp
from kronpress.calibration import Moments, calibrate, load_moments, moments_key, num_bytes
from kronpress.calibration import moments as moments_module
from kronpress.calibration import sums as sums_module
from kronpress.calibration import whole_model as whole_model_module
from kronpress.calibration.whole_model import grouped
from kronpress.matrices.moments import InputMoments
from kronpress.planning import find_targets
from kronpress.recipe import Calibration, Recipe

Build = Callable[..., PreTrainedModel]
PARTS = ("second", "mean", "magnitude", "gradient", "held_out")
IDS = torch.randint(300, (6, 7), generator=torch.Generator().manual_seed(0))


def recipe(targets: Any = "blocks", sensitivity: bool = True, held_out: float = 0.4, **changes: Any) -> Recipe:
    calibration = Calibration(sensitivity=sensitivity, held_out=held_out)
    return Recipe(**{"targets": targets, "structure": "low_rank", "calibration": calibration, **changes})


def assert_identical(actual: Mapping[str, InputMoments], expected: Mapping[str, InputMoments]) -> None:
    assert list(actual) == list(expected)
    for name, moments in expected.items():
        found = actual[name]
        assert found.num_tokens == moments.num_tokens
        for part in (*PARTS, "counts"):
            torch.testing.assert_close(getattr(found, part), getattr(moments, part), rtol=0, atol=0)


def sizes_of(model: nn.Module, wanted: Recipe) -> dict[str, int]:
    """The most bytes that the moments of each targeted layer take."""
    shapes = find_targets(model, wanted)
    section = wanted.calibration
    return {name: num_bytes([shape], section.sensitivity, section.held_out > 0) for name, shape in shapes.items()}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def counted_runs(model: nn.Module) -> Iterator[list[None]]:
    runs: list[None] = []
    handle = model.register_forward_pre_hook(lambda *_: runs.append(None))
    yield runs
    handle.remove()


@contextmanager
def no_file_beyond(num_bytes_allowed: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes_allowed, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments_module._StoredTensors, "_read", lambda *_: pytest.fail("a tensor is read"))


# ---- passes ----


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12), most=st.integers(1, 20))
def test_groups_are_consecutive_fit_and_could_not_be_larger(sizes: list[int], most: int) -> None:
    groups = grouped(map(str, range(len(sizes))), lambda name: sizes[int(name)], most)
    assert [name for group in groups for name in group] == [str(number) for number in range(len(sizes))]
    taken = [sum(sizes[int(name)] for name in group) for group in groups]
    assert all(size <= most or len(group) == 1 for size, group in zip(taken, groups, strict=True))
    assert all(taken[i] + sizes[int(groups[i + 1][0])] > most for i in range(len(groups) - 1))


@settings(max_examples=15, deadline=None)
@given(
    family=st.sampled_from(["gpt2", "opt", "llama", "qwen2"]),
    share=st.floats(0, 1),
    rows=st.integers(1, 6),
    sensitivity=st.booleans(),
    held_out=st.sampled_from([0.0, 0.4]),
)
def test_moments_do_not_depend_on_the_passes(
    family: str, share: float, rows: int, sensitivity: bool, held_out: float, tiny_model: Build
) -> None:
    model, wanted = tiny_model(family), recipe(sensitivity=sensitivity, held_out=held_out)
    batches = IDS.split(rows)
    max_bytes = 1 + int(share * sum(sizes_of(model, wanted).values()))
    together, divided = (calibrate(model, batches, wanted, max_bytes=most) for most in (2**40, max_bytes))
    assert divided.key == together.key == moments_key(model, wanted, batches)
    assert_identical(divided, together)


@pytest.fixture
def in_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is one whose blocks are not known."""
    monkeypatch.setattr(whole_model_module, "block_prefix", lambda _: None)


def test_passes_memory_and_disk_are_told_before_the_model_is_run(
    tiny_model: Build, tmp_path: Path, in_passes: None
) -> None:
    model, wanted = tiny_model("gpt2"), recipe()
    sizes = sizes_of(model, wanted)
    for max_bytes in (1, max(sizes.values()), sum(sizes.values()) - 1, sum(sizes.values())):
        groups = grouped(sizes, sizes.__getitem__, max_bytes)
        told: list[str] = []
        handle = model.register_forward_pre_hook(lambda *_, told=told: None if told else pytest.fail("not told"))
        with counted_runs(model) as runs:
            cache = tmp_path / str(max_bytes)
            calibrate(model, IDS.split(3), wanted, cache=cache, max_bytes=max_bytes, messages=told.append)
        handle.remove()
        assert len(runs) == 4 * len(groups)  # two batches, each with something held out
        way = f"in {len(groups)} passes" if len(groups) > 1 else "in one pass"
        largest = max(sum(map(sizes.__getitem__, group)) for group in groups)
        disk = f", the moments {sum(sizes.values()) / 1e6:,.1f} MB of disk in {str(cache)!r}" if len(groups) > 1 else ""
        memory = f"the sums take at most {largest / 1e6:,.1f} MB of memory"
        assert told[0] == f"calibrating {len(sizes)} layers {way}: {memory}{disk}"


@pytest.mark.parametrize("sensitivity", [True, False])
def test_block_by_block_memory_and_disk_are_told_before_the_model_is_run(
    sensitivity: bool, tiny_model: Build, tmp_path: Path
) -> None:
    model, wanted = tiny_model("gpt2"), recipe(sensitivity=sensitivity)
    sizes = sizes_of(model, wanted)
    total, in_block = sum(sizes.values()), sum(sizes.values()) // 2
    # The states before each of two blocks and after the last, and the gradient by one; or those before one alone.
    states = IDS.numel() * 16 * 4 * (4 if sensitivity else 1)
    for max_bytes in (1, in_block, total - 1, total):
        told: list[str] = []
        handle = model.register_forward_pre_hook(lambda *_, told=told: None if told else pytest.fail("not told"))
        cache = tmp_path / str(max_bytes)
        with counted_runs(model) as runs, counted_runs(model.transformer.h[0].mlp) as block_runs:
            calibrate(model, IDS.split(3), wanted, cache=cache, max_bytes=max_bytes, messages=told.append)
        handle.remove()
        num_parts = 4  # two batches, each with something held out
        # Two of them are differentiated by the logits.
        assert len(runs) == num_parts + (2 if sensitivity else 0)
        groups = 4 if max_bytes == 1 else 1
        assert len(block_runs) == num_parts * (groups + (1 if sensitivity else 0))
        memory = max(sizes.values()) if max_bytes == 1 else total if max_bytes == total else in_block
        moments = "" if max_bytes == total else f", the moments {total / 1e6:,.1f} MB of disk in {str(cache)!r}"
        assert told[0] == (
            f"calibrating {len(sizes)} layers block by block: the sums take at most {memory / 1e6:,.1f} MB of memory"
            f"{moments}, the hidden states {states / 1e6:,.1f} MB of disk in {str(cache)!r}"
        )


@settings(max_examples=25, deadline=None)
@given(
    family=st.sampled_from(["gpt2", "opt", "llama", "qwen2"]),
    targets=st.sampled_from(
        ["mlp", "blocks", [r".*\.1\..*(up_proj|fc1|c_fc)"], [r".*(wte|embed_tokens)", r".*\.0\..*"]]
    ),
    share=st.floats(0, 1),
    rows=st.integers(1, 6),
    padding=st.booleans(),
    sensitivity=st.booleans(),
    held_out=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 9),
)
def test_both_ways_measure_the_same(
    family: str,
    targets: Any,
    share: float,
    rows: int,
    padding: bool,
    sensitivity: bool,
    held_out: float,
    seed: int,
    tiny_model: Build,
) -> None:
    model = tiny_model(family)
    wanted = recipe(targets, sensitivity=sensitivity, held_out=held_out, seed=seed)
    batches = list(IDS.split(rows))
    if padding:
        mask = torch.ones_like(batches[0])
        mask[:, 4:] = 0
        batches[0] = {"input_ids": batches[0], "attention_mask": mask}
    max_bytes = 1 + int(share * sum(sizes_of(model, wanted).values()))
    before = torch.get_rng_state()
    by_blocks = calibrate(model, batches, wanted, max_bytes=max_bytes)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole_model_module, "block_prefix", lambda _: None)
        whole = calibrate(model, batches, wanted)
    assert by_blocks.key == whole.key
    assert_near(by_blocks, whole)


def assert_near(actual: Mapping[str, InputMoments], expected: Mapping[str, InputMoments], rtol: float = 1e-6) -> None:
    assert list(actual) == list(expected)
    for name, moments in expected.items():
        found = actual[name]
        assert found.num_tokens == moments.num_tokens
        for part in (*PARTS, "counts"):
            one, other = getattr(found, part), getattr(moments, part)
            assert (one is None) == (other is None), (name, part)
            if other is not None:
                torch.testing.assert_close(one, other, rtol=rtol, atol=rtol * other.abs().max().item())


def test_blocks_below_the_first_layer_are_not_differentiated(tiny_model: Build) -> None:
    model = tiny_model("gpt2", n_layer=3)
    enabled: list[list[bool]] = []
    for block in model.transformer.h:
        block.mlp.register_forward_pre_hook(lambda *_: enabled[-1].append(torch.is_grad_enabled()))
    for targets, expected in {
        r".*\.1\.mlp\.c_fc": [False, False, False, True, True],  # forward, the last block and the middle one
        r".*\.2\.mlp\.c_fc": [False, False, False, True],
        r"transformer\.wte": [False, False, False, True, True, True],
    }.items():
        enabled.append([])
        calibrate(model, [IDS], recipe([targets], held_out=0.0))
        assert enabled[-1] == expected


def test_no_more_sums_stand_in_memory_than_were_allowed(tiny_model: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model, wanted = tiny_model("llama"), recipe()
    sizes = sizes_of(model, wanted)
    max_bytes = max(sizes.values()) + min(sizes.values())
    assert len(grouped(sizes, sizes.__getitem__, max_bytes)) > 2
    alive: list[weakref.ref[Tensor]] = []
    peaks = []
    begin = sums_module._Sums.__init__

    def counted(self: Any, label: str, like: Tensor) -> None:
        begin(self, label, like)
        alive.append(weakref.ref(self.outer))
        peaks.append(sum(tensor.nbytes for ref in alive if (tensor := ref()) is not None))

    monkeypatch.setattr(sums_module._Sums, "__init__", counted)
    moments = calibrate(model, IDS.split(3), wanted, max_bytes=max_bytes)
    assert 0 < max(peaks) <= max_bytes
    assert [ref() for ref in alive if ref() is not None] == []
    assert list(moments) == list(sizes)


def test_a_pass_differentiates_no_further_down_than_its_first_layer(tiny_model: Build, in_passes: None) -> None:
    model, wanted = tiny_model("gpt2"), recipe(held_out=0.0)
    names = list(sizes_of(model, wanted))
    in_graph: list[bool] = []
    handles = [
        model.get_submodule(name).register_forward_hook(lambda *call: in_graph.append(call[-1].requires_grad))
        for name in names
    ]
    calibrate(model, [IDS], wanted, max_bytes=1)
    for handle in handles:
        handle.remove()
    # In pass i: a layer's output as it leaves the layer depends on a leaf if it comes after layer i.
    assert in_graph == [layer > i for i in range(len(names)) for layer in range(len(names))]


class Saved:
    """A tensor that a graph has saved to go back; `num_bytes` are those of all that stand, `peak` the most of them."""

    num_bytes = peak = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        Saved.num_bytes += tensor.nbytes
        Saved.peak = max(Saved.peak, Saved.num_bytes)

    def __del__(self) -> None:
        Saved.num_bytes -= self.tensor.nbytes


def most_saved(model: nn.Module, wanted: Recipe) -> int:
    """The most bytes that graphs have saved at a time while the model is calibrated."""
    Saved.num_bytes = Saved.peak = 0
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        calibrate(model, [IDS], wanted)
    assert Saved.num_bytes == 0
    return Saved.peak


@pytest.mark.parametrize("targets", ["mlp", "blocks", [r".*\.(wte|embed_tokens)", r".*\.0\.mlp.*"]])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_graph_in_memory_is_that_of_one_block(
    family: str, targets: Any, tiny_model: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = "n_layer" if family == "gpt2" else "num_hidden_layers"
    few, many = (tiny_model(family, **{size: count}) for count in (2, 5))
    wanted = recipe(targets)
    assert most_saved(many, wanted) == most_saved(few, wanted) > 0
    monkeypatch.setattr(whole_model_module, "block_prefix", lambda _: None)
    assert most_saved(many, wanted) > 2 * most_saved(few, wanted)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_the_first_layer_that_reads_what_is_not_finite_is_told_though_blocks_are_measured_backwards(
    index: int, tiny_model: Build, tmp_path: Path
) -> None:
    model = tiny_model("gpt2", n_layer=3)
    with torch.no_grad():
        model.transformer.h[index].ln_2.weight[3] = torch.nan
    told = rf"the input of 'transformer\.h\.{index}\.mlp\.c_fc' holds NaN or infinity"
    for max_bytes in (1, 2**40):
        with pytest.raises(kp.WorkError, match=told):
            calibrate(model, [IDS], recipe(), cache=tmp_path, max_bytes=max_bytes)
        assert names_in(tmp_path) == []
    with torch.no_grad():
        model.transformer.h[index].ln_2.weight[3] = 1
        model.transformer.ln_f.weight[3] = torch.nan
    with pytest.raises(kp.WorkError, match=r"the loss's gradient by the output of '.*' holds NaN or infinity"):
        calibrate(model, [IDS], recipe())


def test_a_failure_on_the_way_back_leaves_no_hooks(tiny_model: Build) -> None:
    model = tiny_model("llama")
    before = [len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.modules()]

    def fails_backwards(*_: Any) -> None:
        if torch.is_grad_enabled():
            raise KeyboardInterrupt

    handle = model.model.layers[0].mlp.register_forward_pre_hook(fails_backwards)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, [IDS], recipe(), max_bytes=1)
    handle.remove()
    assert [len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any("forward" in vars(each) for each in model.modules())


@pytest.mark.parametrize("max_bytes", [0, -1])
def test_memory_that_is_none_is_refused(max_bytes: int, tiny_model: Build) -> None:
    with pytest.raises(kp.RequestError, match=f"max_bytes {max_bytes}: the sums need a positive number of bytes"):
        calibrate(tiny_model("gpt2"), [IDS], recipe(), max_bytes=max_bytes)


# ---- moments that stay in a file ----


@pytest.fixture
def stored(tiny_model: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Moments:
    """Moments of a tiny Llama from several passes, in a file without a name in tmp_path / "temporary"."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    return calibrate(tiny_model("llama"), [IDS], recipe(), max_bytes=1)


def test_a_file_without_a_name_lives_as_long_as_its_moments(
    tiny_model: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    begin = tempfile.TemporaryFile
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **where: opened.append(begin(**where)) or opened[-1])
    moments = calibrate(tiny_model("llama"), [IDS], recipe(), max_bytes=1)
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
    assert_identical(loaded, stored)
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
    assert_identical(loaded, stored)


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
    moments = calibrate(tiny_model("llama"), [IDS], recipe(), max_bytes=max_bytes)
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
    assert_identical(load_moments(path, "key"), layers)
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


# ---- the cache, and disks that fill up ----


def test_the_cache_is_one_file_whatever_the_passes(
    tiny_model: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache = tiny_model("opt"), tmp_path / "new" / "cache"
    first = calibrate(model, [IDS], recipe(), cache=cache, max_bytes=1)
    assert names_in(cache) == [f"{first.key}.safetensors"]
    assert_identical(load_moments(cache / f"{first.key}.safetensors", first.key), first)
    with counted_runs(model) as runs:
        told: list[str] = []
        nothing_is_read(monkeypatch)
        again = calibrate(model, IDS.split(2), recipe(), cache=cache, messages=told.append)
        monkeypatch.undo()
    assert runs == []
    assert "read from" in told[0]
    assert "28 calibration tokens are few" in told[1]
    assert_identical(again, first)


def test_a_failure_between_passes_leaves_nothing(tiny_model: Build, tmp_path: Path) -> None:
    model, wanted = tiny_model("gpt2"), recipe()
    before = calibrate(model, [IDS], recipe("mlp"), cache=tmp_path, max_bytes=1)
    kept = names_in(tmp_path)
    largest = max(sizes_of(model, wanted).values())
    with no_file_beyond(2 * largest), pytest.raises(kp.WorkError, match=r"could not write '.*unchanged"):
        calibrate(model, [IDS], wanted, cache=tmp_path, max_bytes=1)
    assert names_in(tmp_path) == kept
    runs: list[None] = []

    def third_fails(*_: Any) -> None:
        runs.append(None)
        if len(runs) == 3:
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(third_fails)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, [IDS], wanted, cache=tmp_path, max_bytes=1)
    handle.remove()
    assert names_in(tmp_path) == kept
    assert_identical(load_moments(tmp_path / kept[0]), before)


def test_a_disk_that_fills_up_without_a_cache_is_told(tiny_model: Build) -> None:
    states = IDS.numel() * 16 * 4 * 4
    with no_file_beyond(states), pytest.raises(kp.WorkError, match="could not write "):
        calibrate(tiny_model("gpt2"), [IDS], recipe(), max_bytes=1)
    with no_file_beyond(states // 2), pytest.raises(kp.WorkError, match="the hidden states could not be kept in"):
        calibrate(tiny_model("gpt2"), [IDS], recipe(), max_bytes=1)


def test_too_little_room_is_told_before_the_model_is_run(
    tiny_model: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, wanted = tiny_model("gpt2"), recipe()
    needed = sum(sizes_of(model, wanted).values()) + IDS.numel() * 16 * 4 * 4
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with (
        counted_runs(model) as runs,
        pytest.raises(kp.WorkError, match=r"the moments and hidden states need .* MB, and '.*' has .* free"),
    ):
        calibrate(model, [IDS], wanted, cache=tmp_path, max_bytes=1)
    assert runs == []
    assert names_in(tmp_path) == []
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=needed))
    calibrate(model, [IDS], wanted, cache=tmp_path, max_bytes=1)


# ---- planning and compressing ----


class OneAtATime(Mapping[str, InputMoments]):
    """Moments that are copied for whoever asks, who must have let go of what was asked for before."""

    def __init__(self, moments: Mapping[str, InputMoments]) -> None:
        self.moments = moments
        self.given: list[tuple[str, str, weakref.ref[Tensor]]] = []
        self.asked: list[str] = []

    def __getitem__(self, name: str) -> InputMoments:
        assert [(layer, part) for layer, part, ref in self.given if ref() is not None] == []
        parts = {part: getattr(self.moments[name], part).clone() for part in PARTS}
        self.given = [(name, part, weakref.ref(tensor)) for part, tensor in parts.items()]
        self.asked.append(name)
        return InputMoments(num_tokens=self.moments[name].num_tokens, **parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.moments)

    def __len__(self) -> int:
        return len(self.moments)


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("shrinkage", ["held_out", 0.0])
def test_planning_and_compressing_hold_one_layers_moments_at_a_time(
    bias_correction: bool, shrinkage: Any, tiny_model: Build
) -> None:
    wanted = recipe(
        structure="auto",
        candidates=["low_rank", "kronecker"],
        allocation="measured",
        budget={"kept_of_targets": 0.5},
        weighting={"metric": "loss", "bias_correction": bias_correction, "shrinkage": shrinkage},
    )
    model = tiny_model("gpt2")
    windows = torch.randint(300, (24, 8), generator=torch.Generator().manual_seed(1))
    measured = calibrate(model, [windows], wanted)
    moments = OneAtATime(measured)
    plan = kp.make_plan(model, wanted, moments)
    assert set(moments.asked) == set(measured)
    assert plan == kp.make_plan(tiny_model("gpt2"), wanted, measured)
    moments.asked.clear()
    kp.compress_(model, plan, moments=moments)
    assert set(moments.asked) == set(plan.layers)
