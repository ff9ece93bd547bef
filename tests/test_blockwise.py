"""Blocks are trained one after another on what they will read, never end worse, and go on after an interruption."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

import kronpress as kp
from kronpress.cli import main
from kronpress.errors import RequestError
from kronpress.families import FAMILIES
from kronpress.healing import BlockReport, ReconstructionLog, first_windows, num_tokens_read, reconstruct_blocks_
from kronpress.healing.blockwise import FOLDER, has_blocks
from kronpress.healing.trainer import learning_rates
from kronpress.pipeline import Messages, run
from kronpress.recipe import Healing, Reconstruction, dump_recipe
from kronpress.surgery import structured_layers
from kronpress.tokens import TrainData

Build = Callable[..., PreTrainedModel]
WINDOWS, LENGTH = 10, 12
SHORT = Reconstruction(steps=5, windows=WINDOWS, held_out=0.2, sequences_per_step=4, learning_rate=3e-3)
every_family = pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "qwen2"])


def tokens(seed: int = 0, num_windows: int = WINDOWS) -> Tensor:
    return torch.randint(300, (num_windows, LENGTH), generator=torch.Generator().manual_seed(seed))


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    return list(model.get_submodule(FAMILIES[model.config.model_type].blocks))  # type: ignore[call-overload]


def changed(before: PreTrainedModel, after: PreTrainedModel) -> set[str]:
    others = dict(after.state_dict())
    assert set(before.state_dict()) == set(others)
    return {name for name, value in before.state_dict().items() if not torch.equal(value, others[name])}


@contextmanager
def given_by_blocks(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """What each block gave in the model's last pass, in order."""
    found: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, given: found.append(given)) for block in blocks_of(model)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def after_blocks(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    with given_by_blocks(model) as found, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return found


def reconstructed(model: PreTrainedModel, teacher: PreTrainedModel, **options: Any) -> ReconstructionLog:
    options = {"tokens": tokens(), "settings": SHORT, **options}
    return reconstruct_blocks_(model, teacher, options.pop("tokens"), options.pop("settings"), **options)


def without_seconds(reports: list[BlockReport]) -> list[dict[str, Any]]:
    return [report.model_dump(exclude={"seconds"}) for report in reports]


# ---- what is trained ----


@every_family
@pytest.mark.parametrize("trains", ["all", "factors"])
def test_blocks_become_what_a_plain_training_through_the_whole_model_makes_of_them(
    family: str, trains: str, tiny_model: Build, tiny_compressed: Build
) -> None:
    teacher, student = tiny_model(family), tiny_compressed(family, "kronecker")
    ids, chosen = tokens(), SHORT.model_copy(update={"trains": trains})
    expected = copy.deepcopy(student)
    wanted = after_blocks(teacher, ids)
    rates = learning_rates(Healing(max_steps=5, learning_rate=3e-3))
    for index, block in enumerate(blocks_of(expected)):
        # Only the order of the steps is taken from the implementation.
        generator = torch.Generator().manual_seed(1_000_003 * index)
        order: list[int] = []
        while len(order) < 5:
            for number in torch.randperm(2, generator=generator).tolist():
                order.append(number)
                torch.rand((), generator=generator)
        parts = [block] if trains == "all" else list(structured_layers(block).values())
        optimizer = torch.optim.AdamW([each for part in parts for each in part.parameters()], weight_decay=0.0)
        scale = None
        for rate, number in zip(rates, order, strict=False):
            rows = slice(4 * number, 4 * number + 4)
            optimizer.param_groups[0]["lr"] = rate
            expected.zero_grad()
            with given_by_blocks(expected) as found:
                expected(input_ids=ids[rows], use_cache=False)
            loss = (found[index] - wanted[index][rows]).square().mean()
            scale = loss.item() if scale is None else scale
            (loss / scale).backward()
            optimizer.step()
    log = reconstructed(student, teacher, settings=chosen)
    assert all(report.is_better for report in log.blocks)
    # Not the weights: the gradient by a key's bias is rounding alone, which Adam makes as large as any other.
    torch.testing.assert_close(after_blocks(student, ids), after_blocks(expected, ids), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(after_blocks(student, ids)[0], wanted[0], rtol=1e-3, atol=1e-2)


@every_family
def test_errors_are_those_of_the_whole_models_on_the_held_out_windows(
    family: str, tiny_model: Build, tiny_compressed: Build
) -> None:
    teacher, student = tiny_model(family), tiny_compressed(family, "kronecker")
    held_out = tokens()[8:]
    wanted, start = after_blocks(teacher, held_out), after_blocks(student, held_out)
    log = reconstructed(student, teacher)
    end = after_blocks(student, held_out)

    def error(given: Tensor, index: int) -> float:
        return ((given - wanted[index]).norm() / wanted[index].norm()).item()

    assert log.blocks[0].relative_error_before == pytest.approx(error(start[0], 0), rel=1e-4)
    # Later blocks are judged behind the reconstructed ones.
    for index, report in enumerate(log.blocks):
        assert (report.block, report.teacher_block) == (index, index)
        assert report.relative_error_after == pytest.approx(error(end[index], index), rel=1e-4)
        assert report.relative_error_after < report.relative_error_before
    assert (log.steps, log.tokens) == (5, 5 * 4 * LENGTH)
    assert (log.num_windows, log.num_held_out, log.state_bytes) == (10, 2, 2 * 10 * LENGTH * 16 * 4)


def test_only_blocks_are_trained_and_the_model_is_as_it_was_otherwise(
    tiny_model: Build, tiny_compressed: Build
) -> None:
    teacher, student = tiny_model("llama"), tiny_compressed("llama", "kronecker")
    frozen = blocks_of(student)[1].input_layernorm.weight.requires_grad_(False)  # type: ignore[union-attr, operator]
    student.train()
    flags = {name: each.requires_grad for name, each in student.named_parameters()}
    before, teacher_before = copy.deepcopy(student), copy.deepcopy(teacher)
    reconstructed(student, teacher)
    others = {name for name in student.state_dict() if name.startswith("model.layers.")}
    others -= {name for name, each in student.named_parameters() if each is frozen}
    assert changed(before, student) == others
    assert changed(teacher_before, teacher) == set()
    assert {name: each.requires_grad for name, each in student.named_parameters()} == flags
    assert all(module.training for module in student.modules())
    assert all(each.grad is None for each in student.parameters())


def test_factors_alone_leave_norms_alone(tiny_model: Build, tiny_compressed: Build) -> None:
    teacher, student = tiny_model("gpt2"), tiny_compressed("gpt2", "kronecker")
    before = copy.deepcopy(student)
    reconstructed(student, teacher, settings=SHORT.model_copy(update={"trains": "factors"}))
    names = {f"{name}.{part}" for name, layer in structured_layers(student).items() for part in layer.state_dict()}
    assert changed(before, student) == names


def test_an_adaptive_start_is_trained_with_its_scalars_and_keeps_its_form(tiny_model: Build, tiny_recipe) -> None:
    teacher, recipe = tiny_model("gpt2"), tiny_recipe("kronecker", fit={"start": "adaptive"})
    ends = []
    for start in ("adaptive", "van_loan"):
        student = copy.deepcopy(teacher)
        kp.compress_(student, kp.make_plan(student, recipe))
        if start == "van_loan":  # the same factors, not through scalars
            for layer in structured_layers(student).values():
                layer.options = layer.options.model_copy(update={"start": "van_loan"})
        keys = set(student.state_dict())
        assert all(report.is_better for report in reconstructed(student, teacher).blocks)
        assert set(student.state_dict()) == keys
        ends.append(student)
    assert changed(*ends)


def test_inputs_of_the_teacher_give_other_weights_and_mixed_ones_others_again(
    tiny_model: Build, tiny_compressed: Build
) -> None:
    teacher, start = tiny_model("gpt2"), tiny_compressed("gpt2", "kronecker")
    ends = []
    for share in (1.0, 0.5, 0.0):
        student = copy.deepcopy(start)
        log = reconstructed(student, teacher, settings=SHORT.model_copy(update={"student_inputs": share}))
        assert log.state_bytes == (2 if share == 1 else 3) * 10 * LENGTH * 16 * 4
        ends.append(student)
    first = {f"transformer.h.0.{name}" for name in blocks_of(start)[0].state_dict()}
    for one, other in [(0, 1), (1, 2), (0, 2)]:
        # What the first block reads is the same in both models.
        assert changed(ends[one], ends[other]).isdisjoint(first)
        assert changed(ends[one], ends[other])


def test_what_is_held_out_is_not_trained_on(tiny_model: Build, tiny_compressed: Build) -> None:
    teacher, start = tiny_model("opt"), tiny_compressed("opt", "kronecker")
    ends = []
    for seed in (1, 2):
        student = copy.deepcopy(start)
        ids = torch.cat([tokens(0, 8), tokens(seed, 2)])
        assert all(report.is_better for report in reconstructed(student, teacher, tokens=ids).blocks)
        ends.append(student)
    assert changed(*ends) == set()
    student = copy.deepcopy(start)
    reconstructed(student, teacher, tokens=torch.cat([tokens(3, 8), tokens(1, 2)]))
    assert changed(ends[0], student) == changed(start, student) != set()


# ---- never worse ----


@settings(max_examples=12, deadline=None)
@given(rate=st.floats(-4, 6).map(lambda power: 10**power), steps=st.integers(0, 4), seed=st.integers(0, 3))
def test_no_block_gets_worse_whatever_the_rate(
    rate: float, steps: int, seed: int, tiny_model: Build, tiny_compressed: Build
) -> None:
    teacher, student = tiny_model("gpt2"), tiny_compressed("gpt2", "kronecker")
    before = copy.deepcopy(student)
    chosen = SHORT.model_copy(update={"learning_rate": rate, "steps": steps})
    told: list[str] = []
    log = reconstructed(student, teacher, settings=chosen, seed=seed, messages=told.append)
    for report, block, old in zip(log.blocks, blocks_of(student), blocks_of(before), strict=True):
        kept = f"block {report.block} is no better on held-out windows, and keeps its weights"
        assert (kept in told) == (not report.is_better)
        assert math.isfinite(report.relative_error_after)
        if report.is_better:
            assert report.relative_error_after < report.relative_error_before
        else:
            assert report.relative_error_after == report.relative_error_before
            torch.testing.assert_close(block.state_dict(), old.state_dict(), rtol=0, atol=0)


@every_family
def test_a_block_that_agrees_with_the_teacher_stays_as_it_is(family: str, tiny_model: Build) -> None:
    teacher, student = tiny_model(family), tiny_model(family)
    log = reconstructed(student, teacher)
    assert [report.relative_error_after for report in log.blocks] == [0.0, 0.0]
    assert not any(report.is_better for report in log.blocks)
    assert changed(teacher, student) == set()


# ---- models of other depth, and what is refused ----


def test_a_shallower_student_learns_the_blocks_that_its_own_stand_for(tiny_model: Build) -> None:
    teacher, student = tiny_model("gpt2", n_layer=3), tiny_model("gpt2", 1, n_layer=2)
    chosen = SHORT.model_copy(update={"student_inputs": 0.5})
    log = reconstructed(student, teacher, settings=chosen)
    assert [report.teacher_block for report in log.blocks] == [1, 2]
    wanted, given_ = after_blocks(teacher, tokens()[8:]), after_blocks(student, tokens()[8:])
    for report, each in zip(log.blocks, given_, strict=True):
        target = wanted[report.teacher_block]
        error = ((each - target).norm() / target.norm()).item()
        assert report.relative_error_after == pytest.approx(error, rel=1e-4)


def test_what_cannot_be_is_refused_before_any_weight_changes(tiny_model: Build, tiny_compressed: Build) -> None:
    teacher, student = tiny_model("gpt2"), tiny_compressed("gpt2", "kronecker")
    before = copy.deepcopy(student)
    for options, message in [
        ({"teacher": tiny_model("gpt2", n_layer=1)}, "student has 2 blocks and the teacher 1"),
        ({"teacher": tiny_model("gpt2", n_embd=32)}, "hidden_size is 16 in the student and 32 in the teacher"),
        ({"tokens": tokens(0, 4)}, "4 windows, of which 1 are held out, leave no step of 4 sequences"),
        ({"tokens": tokens() + 1}, "token 300 in the text: the model knows 300 tokens"),
        ({"tokens": torch.zeros(10, 129, dtype=torch.int64)}, "sequences of 129 tokens: the model reads at most 128"),
    ]:
        options = {"teacher": teacher, **options}
        with pytest.raises(RequestError, match=message):
            reconstructed(student, options.pop("teacher"), **options)
    teacher.config.model_type = "none-of-these"
    with pytest.raises(RequestError, match="blocks of a model of type 'none-of-these' are not known"):
        reconstructed(student, teacher)
    assert changed(before, student) == set()


def test_windows_are_the_first_of_the_healing_and_none_is_there_twice() -> None:
    data = TrainData.of(torch.arange(70))
    windows = data.windows(10, seed=3)
    found = first_windows(data, 10, 3, 5)
    assert found.tolist() == [windows[i]["input_ids"].tolist() for i in range(5)]
    assert first_windows(data, 10, 3, 100).flatten().sort().values.tolist() == list(range(70))


def test_text_is_read_for_whichever_needs_more() -> None:
    healing = Healing(max_steps=3, sequences_per_step=2, sequence_length=16)
    assert num_tokens_read(healing, Reconstruction(steps=0, windows=64)) == 3 * 2 * 16
    assert num_tokens_read(healing, Reconstruction(steps=1, windows=64)) == 64 * 16
    assert num_tokens_read(healing, Reconstruction(steps=1, windows=2)) == 3 * 2 * 16


# ---- interruption ----


class Interrupted(Exception):
    pass


def interrupt_at(block: int) -> Callable[[BlockReport], None]:
    def progress(report: BlockReport) -> None:
        if report.block == block:
            raise Interrupted

    return progress


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_it_goes_on_after_the_last_finished_block_bit_for_bit(
    share: float, tiny_model: Build, tiny_compressed: Build, tmp_path: Path
) -> None:
    teacher = tiny_model("llama", num_hidden_layers=3)
    start = tiny_compressed("llama", "kronecker", num_hidden_layers=3)
    chosen = SHORT.model_copy(update={"student_inputs": share})
    whole = copy.deepcopy(start)
    expected = reconstructed(whole, teacher, settings=chosen)
    assert expected.resumed_at_block is None
    for block in (0, 1):
        assert has_blocks(tmp_path) == (block > 0)
        with pytest.raises(Interrupted):
            reconstructed(
                copy.deepcopy(start),
                teacher,
                settings=chosen,
                work_dir=tmp_path,
                resume=True,
                progress=interrupt_at(block),
            )
    # What a process that was killed as it wrote leaves behind.
    (tmp_path / FOLDER / ".partial").mkdir()
    (tmp_path / FOLDER / ".partial" / "block.safetensors").write_bytes(b"half")
    for resumed_at in (2, 3):  # and once more when all is done
        student = copy.deepcopy(start)
        log = reconstructed(student, teacher, settings=chosen, work_dir=tmp_path, resume=True)
        assert log.resumed_at_block == resumed_at
        assert without_seconds(log.blocks) == without_seconds(expected.blocks)
        assert changed(whole, student) == set()
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == [
        *(f"block-{i}" for i in range(3)),
        "settings.json",
    ]


def test_a_damaged_block_is_made_again_with_all_after_it(
    tiny_model: Build, tiny_compressed: Build, tmp_path: Path
) -> None:
    teacher, start = tiny_model("gpt2", n_layer=3), tiny_compressed("gpt2", "kronecker", n_layer=3)
    whole = copy.deepcopy(start)
    reconstructed(whole, teacher, work_dir=tmp_path)
    weights = tmp_path / FOLDER / "block-1/block.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    student, told = copy.deepcopy(start), []
    assert reconstructed(student, teacher, work_dir=tmp_path, resume=True, messages=told.append).resumed_at_block == 1
    assert changed(whole, student) == set()
    assert sum("block-1' is damaged" in each for each in told) == 1


def test_blocks_of_another_reconstruction_are_refused_or_dropped(
    tiny_model: Build, tiny_compressed: Build, tmp_path: Path
) -> None:
    teacher, start = tiny_model("gpt2"), tiny_compressed("gpt2", "kronecker")
    reconstructed(copy.deepcopy(start), teacher, work_dir=tmp_path)
    for options, what in [
        ({"settings": SHORT.model_copy(update={"steps": 4})}, "reconstruction.steps was 5 and is 4"),
        ({"tokens": tokens(1)}, "windows was"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"teacher": tiny_model("gpt2", 1)}, "teacher was"),
    ]:
        with pytest.raises(RequestError, match=f"blocks of another reconstruction: {what}"):
            options = {"teacher": teacher, **options}
            reconstructed(copy.deepcopy(start), options.pop("teacher"), work_dir=tmp_path, resume=True, **options)
    with pytest.raises(RequestError, match="student was"):
        reconstructed(tiny_compressed("gpt2", "low_rank"), teacher, work_dir=tmp_path, resume=True)
    assert reconstructed(copy.deepcopy(start), teacher, work_dir=tmp_path, seed=1).resumed_at_block is None


# ---- in a run, and by `heal` ----


@pytest.fixture(scope="module")
def job(tmp_path_factory, tiny_model, save_tiny_checkpoint, tiny_recipe, tiny_text) -> Callable[..., kp.Recipe]:
    """Recipe changes -> a recipe for a tiny dense checkpoint and text on disk, reconstructed and healed."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "heal.txt").write_text(tiny_text, encoding="utf-8")
    (folder / "test.txt").write_text(tiny_text[300:700], encoding="utf-8")
    save_tiny_checkpoint(tiny_model("gpt2").to(torch.float16), folder / "dense")

    def build(max_steps: int = 4, **changes: Any) -> kp.Recipe:
        healing = {
            "data": str(folder / "heal.txt"),
            "max_steps": max_steps,
            "sequences_per_step": 2,
            "sequence_length": 16,
            "learning_rate": 1e-3,
        }
        fields = {
            "model": str(folder / "dense"),
            "healing": healing,
            "reconstruction": SHORT.model_dump(),
            "evaluation": {"data": str(folder / "test.txt")},
        }
        return tiny_recipe("kronecker", **{**fields, **changes})

    return build


def stop_after(text: str) -> Messages:
    def stage(message: str) -> None:
        if message.strip().startswith(text):
            raise Interrupted

    return Messages(stage=stage, healing=lambda _: None)


def test_a_run_reconstructs_heals_and_counts_the_tokens_of_both(job, tmp_path: Path) -> None:
    results = run(job(rivals=["blocks", "dense"]), tmp_path / "run")
    found = results["reconstruction"]
    assert found["tokens"] == 5 * 4 * 16
    assert results["healing"]["tokens"] == 5 * 4 * 16 + 4 * 2 * 16
    assert [report["block"] for report in found["blocks"]] == [0, 1]
    assert list(found["metrics"]) == list(results["rows"][0]["metrics"])
    # Between the rows before and after there are others' weights.
    for row in results["rows"]:
        assert row["metrics"] != found["metrics"]
    rivals = {rival["rival"]: rival for rival in results["rivals"]}
    assert rivals["dense"]["reconstruction"] is None
    assert [report["teacher_block"] for report in rivals["blocks"]["reconstruction"]["blocks"]] == [1]
    off = run(job(reconstruction={}), tmp_path / "off")
    assert off["reconstruction"] is None
    assert off["healing"]["tokens"] == 4 * 2 * 16
    assert off["rows"][:2] == results["rows"][:2]
    assert off["rows"][2] != results["rows"][2]


def test_a_run_may_reconstruct_alone(job, tmp_path: Path) -> None:
    results = run(job(max_steps=0), tmp_path / "run")
    assert [row["stage"] for row in results["rows"]] == ["dense", "compressed", "reconstructed"]
    assert results["rows"][2]["name"] == "tiny-kronecker, healed"
    assert results["rows"][2]["metrics"] == results["reconstruction"]["metrics"]
    saved = kp.load_model(str(tmp_path / "run/model"))
    text = kp.load_running_text(results["recipe"]["evaluation"]["data"], "test").text
    measured = kp.evaluate(saved.model, saved.tokenizer, text).nll_mean_nats
    [figures] = results["rows"][2]["metrics"].values()
    assert measured == pytest.approx(figures["nll_mean_nats"], rel=1e-6)


@pytest.mark.parametrize("where", ["block 0 ", "block 1 ", "healing"])
def test_an_interrupted_run_goes_on_behind_its_last_block_to_the_same_end(where: str, job, tmp_path: Path) -> None:
    recipe = job()
    expected = run(recipe, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(recipe, tmp_path / "run", messages=stop_after(where))
    with pytest.raises(RequestError, match="was begun and interrupted"):
        run(recipe, tmp_path / "run")
    with pytest.raises(RequestError, match=r"reconstruction\.steps was 5 and is 6"):
        run(job(reconstruction={**SHORT.model_dump(), "steps": 6}), tmp_path / "run", resume=True, accept_changes=True)
    results = run(recipe, tmp_path / "run", resume=True)
    assert results["resumed_at_steps"] == [0]
    assert results["reconstruction"]["resumed_at_block"] == (1 if where == "block 0 " else 2)
    assert results["rows"] == expected["rows"]
    weights = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("run", "whole")]
    assert weights[0] == weights[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "whole"]


def test_heal_reconstructs_first_if_asked(job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = job()
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    small = str(tmp_path / "small")
    assert main(["compress", recipe.model, "--recipe", str(tmp_path / "recipe.yaml"), "--out", small]) == 0
    arguments = ["heal", small, "--teacher", recipe.model, "--data", str(recipe.healing.data), "--json"]
    lengths = ["healing.max_steps=2", "healing.sequence_length=16", "healing.sequences_per_step=2"]
    sizes = ["reconstruction.steps=3", "reconstruction.windows=10", "reconstruction.sequences_per_step=4"]
    for name, changes in [("plain", lengths), ("both", [*lengths, *sizes])]:
        capsys.readouterr()
        options = [option for change in changes for option in ("--set", change)]
        assert main([*arguments, "--out", str(tmp_path / name), *options]) == 0
        document = json.loads(capsys.readouterr().out)
        tokens_by_blocks = 3 * 4 * 16 if name == "both" else 0
        assert document["healing"]["tokens"] == 2 * 2 * 16 + tokens_by_blocks
        assert (document["reconstruction"] is None) == (name == "plain")
    assert changed(kp.load_model(str(tmp_path / "plain")).model, kp.load_model(str(tmp_path / "both")).model)
