"""Calibration in bounded memory: passes that measure some layers each, and graphs of one block."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples.calibration import Build, assert_same, counted_runs, names_in, sizes_of, tokens
from torch import Tensor, nn

import kronpress as kp
from kronpress.calibration import calibrate, moments_key
from kronpress.calibration import sums as sums_module
from kronpress.calibration import whole_model as whole_model_module
from kronpress.calibration.whole_model import grouped
from kronpress.matrices.moments import InputMoments
from kronpress.recipe import Calibration, Recipe

PARTS = ("second", "mean", "magnitude", "gradient", "held_out")
IDS = tokens(6, 7)


def recipe(targets: Any = "blocks", sensitivity: bool = True, held_out: float = 0.4, **changes: Any) -> Recipe:
    calibration = Calibration(sensitivity=sensitivity, held_out=held_out)
    return Recipe(**{"targets": targets, "structure": "low_rank", "calibration": calibration, **changes})


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
    assert_same(divided, together)


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
    assert_same(by_blocks, whole, rtol=1e-6)


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
