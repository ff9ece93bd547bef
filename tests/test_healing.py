"""Healing minimises exactly the loss it names, repeatably, in one piece or in several, and touches only the student."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.healing import (
    TOKENS,
    TWO_PHASES,
    assert_same_weights,
    largest_change,
    next_token_loss,
    reference_distillation,
    schedule,
    weights,
    with_sums_of_two_terms,
)
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.integrations import integration_utils

import kronpress as kp
from kronpress.healing import HealingRow, language_model_loss, learning_rates, training
from kronpress.recipe import Healing
from kronpress.report import healing_line

CASES = tuple(itertools.product(("gpt2", "opt", "llama", "qwen2"), kp.matrices.STRUCTURES))
DROPOUT = {"attn_pdrop": 0.5, "embd_pdrop": 0.5, "resid_pdrop": 0.5}


# ---- what training does ----


@pytest.mark.parametrize(("family", "structure"), CASES)
@pytest.mark.parametrize(("language_model", "distillation"), [(1.0, 0.0), (0.0, 1.0)])
def test_healing_lowers_the_loss(tiny_model, tiny_compressed, family, structure, language_model, distillation):
    model, teacher = tiny_compressed(family, structure), tiny_model(family)
    ids = TOKENS[:320].view(20, 16)
    before, untrained = next_token_loss(model, ids), weights(model)
    log = kp.heal_(
        model,
        teacher,
        TOKENS,
        schedule(max_steps=12, language_model_weight=language_model, distillation_weight=distillation),
    )
    assert log.rows[-1].loss < 0.95 * log.rows[0].loss
    assert log.rows[0].distillation_nats > 0 if distillation else log.rows[0].distillation_nats is None
    if language_model:
        assert next_token_loss(model, ids) < before
    assert all(not torch.equal(tensor, untrained[name]) for name, tensor in weights(model).items())


def test_each_row_is_the_weighted_sum_of_its_terms(tiny_model, tiny_compressed):
    healing = schedule(
        max_steps=8, language_model_weight=0.3, distillation_weight=2.0, temperature=3.0, sequences_per_pass=2
    )
    rows: list[HealingRow] = []
    log = kp.heal_(tiny_compressed("llama", "low_rank"), tiny_model("llama"), TOKENS, healing, progress=rows.append)
    assert log.rows == rows
    assert (log.num_steps, log.tokens, log.resumed_at_step) == (8, 8 * 4 * 16, None)
    assert [row.step for row in rows] == list(range(1, 9))
    for row in rows:
        assert row.loss == pytest.approx(0.3 * row.language_model_nats + 2 * row.distillation_nats, rel=1e-4)
        assert (row.num_steps, row.tokens) == (8, row.step * 4 * 16)
        assert row.tokens_per_second > 0
    assert rows[-1].seconds_left == 0


def test_the_first_row_is_the_loss_of_the_model_as_it_was(tiny_model, tiny_compressed):
    model, teacher = tiny_compressed("qwen2", "kronecker"), tiny_model("qwen2")
    ids = TOKENS[:64].view(4, 16)
    expected = next_token_loss(model, ids)
    with torch.no_grad():
        logits = [each(input_ids=ids).logits[:, :-1] for each in (model, teacher)]
        divergence = reference_distillation(*logits, 2.0).item()
    log = kp.heal_(model, teacher, TOKENS[:64], schedule(max_steps=1, distillation_weight=1.0, temperature=2.0))
    assert log.rows[0].language_model_nats == pytest.approx(expected, rel=1e-5)
    assert log.rows[0].distillation_nats == pytest.approx(divergence, rel=1e-4)


def test_a_long_run_is_reported_about_fifty_times(tiny_compressed):
    log = kp.heal_(tiny_compressed("llama", "low_rank"), None, TOKENS, schedule(max_steps=130, sequences_per_step=1))
    assert 40 <= len(log.rows) <= 70
    assert log.rows[-1].step == 130


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(tiny_model, family):
    model, teacher = tiny_model(family), tiny_model(family)
    before, rate = weights(model), 1e-5
    healing = schedule(learning_rate=rate, language_model_weight=0.0, distillation_weight=1.0, temperature=2.0)
    log = kp.heal_(model, teacher, TOKENS, healing)
    assert log.rows[0].loss == 0.0
    assert log.rows[0].distillation_nats == 0.0
    assert all(abs(row.loss) < 1e-6 for row in log.rows)
    # Adam makes steps of up to the rate out of mere rounding.
    assert largest_change(model, before) <= healing.num_steps * rate


def test_dropout_is_off(tiny_model):
    model, teacher, plain = tiny_model("gpt2", **DROPOUT), tiny_model("gpt2", **DROPOUT), tiny_model("gpt2")
    model.train()
    teacher.train()
    log = kp.heal_(model, teacher, TOKENS, schedule(max_steps=1, language_model_weight=0.0, distillation_weight=1.0))
    assert log.rows[0].distillation_nats == 0.0

    model = tiny_model("gpt2", **DROPOUT).train()
    expected = kp.heal_(plain, None, TOKENS, schedule())
    assert [row.loss for row in kp.heal_(model, None, TOKENS, schedule()).rows] == [row.loss for row in expected.rows]
    assert_same_weights(model, weights(plain))


@pytest.mark.parametrize("training", [True, False])
def test_only_the_student_changes_and_modes_come_back(tiny_model, tiny_compressed, training):
    model = tiny_compressed("gpt2", "low_rank").train(training)
    teacher = tiny_model("gpt2").train(training)
    before = weights(teacher)
    kp.heal_(model, teacher, TOKENS, schedule(max_steps=2, distillation_weight=1.0))
    assert model.training is training
    assert teacher.training is training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in teacher.parameters())
    assert_same_weights(teacher, before)


def test_nothing_is_printed_and_nothing_is_left_behind(tiny_compressed, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    kp.heal_(tiny_compressed("gpt2", "low_rank"), None, TOKENS, schedule(max_steps=2, save_steps=1))
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())


TEACHERS = {
    "distillation_weight": "distillation_nats",
    "reverse_distillation_weight": "reverse_distillation_nats",
    "jensen_shannon_weight": "jensen_shannon_nats",
}


@pytest.mark.parametrize("weight", TEACHERS)
@pytest.mark.parametrize("top_k", [None, 5])
def test_minimising_one_divergence_alone_brings_the_models_nearer_in_it(tiny_model, tiny_compressed, weight, top_k):
    healing = schedule(max_steps=12, language_model_weight=0.0, distillation_top_k=top_k, **{weight: 1.0})
    rows = kp.heal_(tiny_compressed("llama", "kronecker"), tiny_model("llama"), TOKENS, healing).rows
    column = TEACHERS[weight]
    assert getattr(rows[-1], column) < 0.8 * getattr(rows[0], column)
    for row in rows:
        assert {each for each in TEACHERS.values() if getattr(row, each) is not None} == {column}
        assert row.loss == pytest.approx(getattr(row, column), rel=1e-5)


def test_weights_change_linearly_from_the_first_step_to_the_last(tiny_model, tiny_compressed):
    changing = {"distillation_weight": [2.0, 0.0], "jensen_shannon_weight": [0.0, 3.0], "hidden_weight": [1.0, 1.0]}
    healing = schedule(max_steps=5, language_model_weight=0.25, schedule=changing)
    rows = kp.heal_(tiny_compressed("gpt2", "low_rank"), tiny_model("gpt2"), TOKENS, healing).rows
    for step, row in enumerate(rows):
        expected = 0.25 * row.language_model_nats + row.hidden_mse
        expected += (2 - step / 2) * row.distillation_nats + 0.75 * step * row.jensen_shannon_nats
        assert row.loss == pytest.approx(expected, rel=1e-4)
    alone = schedule(max_steps=1, schedule=changing)
    row = kp.heal_(tiny_compressed("gpt2", "low_rank"), tiny_model("gpt2"), TOKENS, alone).rows[0]
    expected = row.language_model_nats + 2 * row.distillation_nats + row.hidden_mse
    assert row.loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"schedule": {"distilation_weight": [0, 1]}}, "'distilation_weight': the weights are language_model_weight"),
        ({"schedule": {"language_model_weight": [1, 0]}}, "are all 0: nothing to minimise"),
        ({"schedule": {"hidden_weight": [1, -1]}}, "greater than or equal to 0"),
        ({"jensen_shannon_teacher_share": 1.0}, "less than 1"),
        ({"distillation_top_k": 0}, "greater than 0"),
    ],
)
def test_objectives_that_make_no_sense_are_refused(changes, wanted):
    with pytest.raises(ValueError, match=wanted):
        schedule(**changes)


# ---- repeatability ----


def test_the_seed_decides_the_order_and_nothing_else_does(tiny_model, tiny_compressed):
    def healed(seed: int, disturbance: int) -> dict[str, Tensor]:
        torch.manual_seed(disturbance)
        model = tiny_compressed("llama", "kronecker")
        kp.heal_(model, tiny_model("llama"), TOKENS, schedule(distillation_weight=1.0), seed=seed)
        return weights(model)

    first = healed(5, disturbance=1)
    torch.testing.assert_close(healed(5, disturbance=2), first, rtol=0, atol=0)
    other = healed(6, disturbance=1)
    assert not all(torch.equal(other[name], tensor) for name, tensor in first.items())


@pytest.mark.parametrize("num_tokens", [4096, 6 * 16], ids=["one epoch", "steps across epochs"])
@pytest.mark.parametrize("per_pass", [1, 2])
@pytest.mark.parametrize("inside", [{}, {"embedding_weight": 1.0, "attention_weight": 1.0, "hidden_weight": 1.0}])
def test_passes_add_up_to_the_step(tiny_model, tiny_compressed, per_pass, num_tokens, inside):
    def healed(per_pass: int | None) -> tuple[list[float], nn.Module]:
        model = tiny_compressed("llama", "low_rank")
        healing = schedule(sequences_per_pass=per_pass, distillation_weight=1.0, **inside)
        return [row.loss for row in kp.heal_(model, tiny_model("llama"), TOKENS[:num_tokens], healing).rows], model

    in_one, in_one_model = healed(None)
    in_several, in_several_model = healed(per_pass)
    assert in_several == pytest.approx(in_one, rel=1e-3)
    ids = TOKENS[:64].view(4, 16)
    assert next_token_loss(in_several_model, ids) == pytest.approx(next_token_loss(in_one_model, ids), rel=1e-3)


# ---- length and learning rate ----


@given(
    max_steps=st.none() | st.integers(0, 50),
    num_tokens=st.none() | st.integers(1, 10_000),
    per_step=st.integers(1, 9),
    length=st.integers(1, 99),
)
@settings(max_examples=100, deadline=None)
def test_steps_and_tokens_whichever_comes_first(max_steps, num_tokens, per_step, length):
    healing = Healing(max_steps=max_steps, tokens=num_tokens, sequences_per_step=per_step, sequence_length=length)
    if max_steps is None and num_tokens is None:
        with pytest.raises(kp.RequestError, match=r"healing\.max_steps or healing\.tokens"):
            _ = healing.num_steps
        return
    if max_steps is not None:
        assert healing.num_steps <= max_steps
    if num_tokens is not None:
        assert healing.num_steps * per_step * length <= max(num_tokens, per_step * length)
    longer_by_tokens = num_tokens is None or (healing.num_steps + 1) * per_step * length > num_tokens
    assert healing.num_steps == max_steps or longer_by_tokens


@pytest.mark.parametrize(("max_steps", "num_tokens", "steps"), [(3, 1000, 3), (9, 4 * 16 * 2 + 5, 2), (None, 1, 1)])
def test_training_stops_at_the_first_limit(tiny_compressed, max_steps, num_tokens, steps):
    log = kp.heal_(tiny_compressed("llama", "low_rank"), None, TOKENS, schedule(max_steps=max_steps, tokens=num_tokens))
    assert log.num_steps == log.rows[-1].step == steps


@pytest.mark.parametrize("num_tokens", [0, 4096])
def test_no_steps_leave_the_model_as_it_was(tiny_model, tiny_compressed, num_tokens):
    model = tiny_compressed("gpt2", "low_rank")
    before = weights(model)
    log = kp.heal_(model, tiny_model("gpt2"), TOKENS[:num_tokens], schedule(max_steps=0, distillation_weight=1.0))
    assert (log.num_steps, log.tokens, log.rows) == (0, 0, [])
    assert_same_weights(model, before)


@pytest.mark.parametrize(("warmup", "final"), [(5, 0.1), (0, 0.0), (3, 1.0)])
def test_the_rate_rises_linearly_and_falls_along_a_cosine(tiny_compressed, warmup, final):
    steps, peak = 20, 2e-4
    healing = schedule(max_steps=steps, learning_rate=peak, warmup_steps=warmup, final_learning_rate=final)
    log = kp.heal_(tiny_compressed("llama", "low_rank"), None, TOKENS, healing)

    def rate(done: int) -> float:
        if done < warmup:
            return peak * done / warmup
        falling = (1 + math.cos(math.pi * (done - warmup) / (steps - warmup))) / 2
        return peak * (final + (1 - final) * falling)

    assert [row.learning_rate for row in log.rows] == pytest.approx([rate(done) for done in range(steps)], abs=1e-12)


@pytest.mark.parametrize("rate", [1e-5, 4e-3])
def test_the_first_step_of_adam_moves_by_the_rate(tiny_compressed, rate):
    model = tiny_compressed("llama", "low_rank")
    before = weights(model)
    kp.heal_(model, None, TOKENS, schedule(max_steps=1, learning_rate=rate))
    assert largest_change(model, before) == pytest.approx(rate, rel=0.02)


def test_weight_decay_shrinks_matrices(tiny_compressed):
    plain, decayed = tiny_compressed("llama", "low_rank"), tiny_compressed("llama", "low_rank")
    kp.heal_(plain, None, TOKENS, schedule(learning_rate=1e-3))
    kp.heal_(decayed, None, TOKENS, schedule(learning_rate=1e-3, weight_decay=50.0))
    name = "model.layers.0.mlp.up_proj.weight"
    assert decayed.get_parameter(name).norm() < 0.9 * plain.get_parameter(name).norm()


# ---- phases ----


@given(
    shares=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    sizes=st.lists(st.integers(1, 40), min_size=4, max_size=4),
    max_steps=st.none() | st.integers(0, 500),
    num_tokens=st.integers(1, 10**7),
)
@settings(max_examples=100, deadline=None)
def test_phases_share_the_tokens_and_max_steps_counts_them_all(shares, sizes, max_steps, num_tokens):
    phases = [
        {"share": share / sum(shares), "sequences_per_step": size} for share, size in zip(shares, sizes, strict=False)
    ]
    healing = schedule(max_steps=max_steps, tokens=num_tokens, phases=phases)
    steps = [part.max_steps for part in healing.parts]
    per_step = [size * 16 for size, _ in zip(sizes, shares, strict=False)]
    assert [part.tokens_per_step for part in healing.parts] == per_step
    assert healing.num_steps == sum(steps) <= (10**9 if max_steps is None else max_steps)
    assert healing.num_tokens == sum(map(math.prod, zip(steps, per_step, strict=True)))
    # A whole step of the largest phase at most is lost to rounding, in each phase.
    total = healing.num_tokens
    for share, count, size in zip(shares, steps, per_step, strict=True):
        assert abs(count * size - share / sum(shares) * total) <= 3 * max(per_step) * len(shares)
    if max_steps is None:
        assert abs(total - num_tokens) <= 2 * max(per_step) * len(shares)


def test_the_rate_of_each_phase_by_hand():
    healing = schedule(
        max_steps=7,
        sequences_per_step=2,
        learning_rate=1e-3,
        warmup_steps=1,
        phases=[
            {"share": 0.4},
            {"share": 0.6, "sequences_per_step": 4, "learning_rate": 1e-4, "final_learning_rate": 1, "warmup_steps": 0},
        ],
    )
    assert [part.max_steps for part in healing.parts] == [4, 3]
    expected = [0.0, *(1e-3 * (0.1 + 0.9 * (1 + math.cos(math.pi * k / 3)) / 2) for k in range(3)), *([1e-4] * 3)]
    assert learning_rates(healing) == pytest.approx(expected)


def test_a_second_phase_has_its_own_steps(tiny_compressed):
    log = kp.heal_(tiny_compressed("llama", "low_rank"), None, TOKENS, schedule(phases=TWO_PHASES))
    assert [row.tokens for row in log.rows] == [64, 128, 192, 256, 384, 512]
    assert log.tokens == schedule(phases=TWO_PHASES).num_tokens == 512
    assert log.rows[-1].learning_rate == 1e-4


def test_phases_alike_are_one_phase(tiny_compressed):
    models = [tiny_compressed("llama", "low_rank") for _ in range(2)]
    for model, phases in zip(models, ([], [{"share": 0.5}, {"share": 0.5}]), strict=True):
        kp.heal_(model, None, TOKENS, schedule(final_learning_rate=1.0, phases=phases))
    assert_same_weights(models[0], weights(models[1]))


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"phases": [{"share": 0.5}, {"share": 0.4}]}, "add up to 0.9, not 1"),
        ({"phases": [{"share": 1.0, "sequences_per_step": 5}], "sequences_per_pass": 2}, "2 does not divide 5"),
    ],
)
def test_phases_that_do_not_fit_are_refused(changes, wanted):
    with pytest.raises(ValueError, match=wanted):
        schedule(**changes)


# ---- the start `adaptive` ----


def test_scalars_learn_beside_their_factors_and_leave_no_trace(tiny_model, tmp_path):
    rate, ids = 1e-3, TOKENS[:64].view(4, 16)
    model = with_sums_of_two_terms(tiny_model("gpt2"), "adaptive")
    before = weights(model)
    language_model_loss(model.eval()(input_ids=ids).logits[:, :-1], ids[:, 1:]).backward()
    name = "transformer.h.0.mlp.c_fc"
    weight, right = model.get_parameter(f"{name}.weight"), model.get_parameter(f"{name}.right")
    # Adam's first step moves every number by the rate against its gradient.
    scale = (weight.norm(dim=(0, 2)) / right.norm(dim=(0, 2))).detach()[:, None]
    unscaled, gradient = weight.detach() / scale, weight.grad
    assert scale.min() > 1
    moved_scale = scale - rate * (gradient * unscaled).sum((0, 2)).sign()[:, None]
    expected = (unscaled - rate * (gradient * scale).sign()) * moved_scale
    model.zero_grad()

    kp.heal_(model, None, ids.flatten(), schedule(max_steps=1, learning_rate=rate))
    healed = model.get_parameter(f"{name}.weight")
    clear = gradient.abs() > 1e-4  # where Adam's epsilon does not show
    assert clear.float().mean() > 0.5
    torch.testing.assert_close(healed.detach()[clear], expected[clear], rtol=0, atol=2e-6)
    assert {key: value.shape for key, value in weights(model).items()} == {k: v.shape for k, v in before.items()}

    model.save_pretrained(tmp_path)
    loaded = kp.load_model(str(tmp_path)).model
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=0)
    assert kp.heal_(loaded, None, TOKENS, schedule(max_steps=1)).num_steps == 1


def test_scalars_are_folded_even_when_the_healing_fails(tiny_model):
    model = with_sums_of_two_terms(tiny_model("gpt2"), "adaptive")
    with torch.no_grad():
        model.transformer.wpe.weight.fill_(math.nan)
    before = {name: value for name, value in weights(model).items() if "mlp" in name}
    with pytest.raises(kp.WorkError, match="loss is nan"):
        kp.heal_(model, None, TOKENS, schedule())
    after = {name: value for name, value in weights(model).items() if "mlp" in name}
    torch.testing.assert_close(after, before)


# ---- refusals ----


def test_requests_that_cannot_be_met_change_nothing(tiny_model, tiny_compressed):
    model, teacher = tiny_compressed("gpt2", "low_rank"), tiny_model("gpt2")
    before = weights(model)
    distilled = schedule(distillation_weight=1.0)
    for wanted, arguments in {
        "no teacher": (None, TOKENS, distilled),
        "vocabularies of 300 and 310": (tiny_model("gpt2", vocab_size=310), TOKENS, distilled),
        "15 tokens of text are less than one sequence of 16": (teacher, TOKENS[:15], distilled),
        "token 300 in the text: the model knows 300 tokens": (teacher, torch.full((64,), 300), distilled),
        "sequence_length 129: the model reads at most 128": (teacher, TOKENS, schedule(sequence_length=129)),
        r"healing\.max_steps or healing\.tokens": (teacher, TOKENS, schedule(max_steps=None)),
    }.items():
        with pytest.raises(kp.RequestError, match=wanted):
            kp.heal_(model, *arguments)
    assert_same_weights(model, before)


def test_language_modelling_needs_no_teacher_and_minds_no_other_vocabulary(tiny_model, tiny_compressed):
    losses = [
        [row.loss for row in kp.heal_(tiny_compressed("llama", "low_rank"), teacher, TOKENS, schedule()).rows]
        for teacher in (None, tiny_model("gpt2", vocab_size=310))
    ]
    assert losses[0] == losses[1]


# ---- what is left as it was ----


def test_healing_leaves_the_configuration_and_forward_as_they_were(tiny_compressed):
    model = tiny_compressed("gpt2", "kronecker")
    before = model.config.use_cache
    kp.heal_(model, None, TOKENS, schedule(max_steps=2))
    assert model.config.use_cache is before is True
    assert "forward" not in vars(model)


def test_every_step_is_whole_however_little_text_there_is(tiny_compressed):
    log = kp.heal_(tiny_compressed("gpt2", "kronecker"), None, TOKENS[: 3 * 16], schedule(max_steps=4))
    assert log.tokens == log.rows[-1].tokens == 4 * 4 * 16


def test_a_healing_that_fails_leaves_them_too(tiny_compressed):
    model = tiny_compressed("gpt2", "kronecker").train()
    with torch.no_grad():
        model.transformer.wpe.weight.fill_(torch.nan)
    with pytest.raises(kp.WorkError, match="loss is nan"):
        kp.heal_(model, None, TOKENS, schedule(max_steps=2))
    assert model.training
    assert model.config.use_cache is True
    assert "forward" not in vars(model)


# ---- trackers ----


class Tracker(TrainerCallback):
    """As one of transformers', which are made without arguments."""

    logged: ClassVar[list[tuple[int, dict[str, float]]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        self.logged.append((state.global_step, dict(logs)))


@pytest.fixture
def tracker(monkeypatch) -> type[Tracker]:
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "ours", Tracker)
    monkeypatch.setattr(training, "get_available_reporting_integrations", lambda: ["ours"])
    monkeypatch.setattr(Tracker, "logged", [])
    return Tracker


def test_a_tracker_that_is_asked_for_gets_every_row(tiny_compressed, tracker):
    log = kp.heal_(tiny_compressed("gpt2", "low_rank"), None, TOKENS, schedule(report_to=["ours"]))
    expected = [(row.step, row.model_dump(exclude_none=True, exclude={"step", "num_steps"})) for row in log.rows]
    found = [
        (step, {name: value for name, value in row.items() if name != "epoch"})
        for step, row in tracker.logged
        if "loss" in row
    ]
    assert found == expected


def test_no_tracker_is_used_unless_it_is_asked_for(tiny_compressed, tracker):
    kp.heal_(tiny_compressed("gpt2", "low_rank"), None, TOKENS, schedule())
    assert not tracker.logged


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("tensorbord", r"unknown tracker in healing.report_to 'tensorbord'.*tensorboard"),
        ("tensorboard", "healing.report_to names 'tensorboard': its package is not installed"),
    ],
)
def test_a_tracker_that_is_not_there_is_refused(tiny_compressed, tracker, name, wanted):
    with pytest.raises(kp.RequestError, match=wanted):
        kp.heal_(tiny_compressed("gpt2", "low_rank"), None, TOKENS, schedule(report_to=[name]))


# ---- the page ----

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "healing.md").read_text(encoding="utf-8")


def result(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
def test_recipes_of_the_page_are_recipes(block):
    assert kp.load_recipe({"targets": "mlp", "structure": "low_rank", **yaml.safe_load(block)}).healing.num_steps


def test_the_example_of_the_page_runs():
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(block, {})


def test_every_weight_of_a_term_is_on_the_page():
    for name in ("language_model_weight", *Healing(max_steps=1).teacher_weights):
        assert f"| `{name}` |" in PAGE


def test_the_line_of_progress_of_the_page_is_one():
    (line,) = re.findall(r"```\n(  step .*)\n```", PAGE)
    row = HealingRow(
        **{"step": 40, "num_steps": 60, "tokens": 1, "loss": 1.0, "language_model_nats": 4.213},
        **{"distillation_nats": 0.731, "validation_nats": math.log(71.2), "learning_rate": 2.1e-4},
        **{"tokens_per_second": 1402.0, "seconds_left": 58.0},
    )
    assert healing_line(row) == line


def test_the_memory_of_the_page_is_that_of_the_committed_result():
    found = result("healing_memory")
    peaks = {(row["objective"], row["logits"]): row["peak_bytes"] / 2**20 for row in found["rows"]}
    for objective in dict.fromkeys(row["objective"] for row in found["rows"]):
        figures = " | ".join(f"{peaks[objective, way]:,.0f}" for way in ("whole", "default", "64 tokens"))
        assert f"| {objective} | {figures} |" in PAGE
        if objective != "language model":  # one tensor of logits is little more than the gradient of the head
            assert peaks[objective, "default"] < peaks[objective, "whole"]
    assert f"vocabulary of {found['vocabulary']}, width {found['width']}" in PAGE


def test_the_speed_of_the_page_is_that_of_the_committed_result():
    rows = result("healing_speed")["rows"]
    for row in rows:
        ratios = row["processor"]
        figures = " | ".join(
            f"{ratios[name]:.2f}" for name in ("without_a_teacher", "with_a_teacher", "with_its_cache")
        )
        assert f"| {row['model']} | {figures} |" in PAGE
