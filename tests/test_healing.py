"""Healing minimises exactly the loss it names, repeatably, in one piece or in several, and touches only the student."""

from __future__ import annotations

import copy
import itertools
import math
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence

import kronpress as kp
from kronpress.healing import HealingRow, distillation_loss, language_model_loss, learning_rates
from kronpress.recipe import Healing

CASES = tuple(itertools.product(("gpt2", "opt", "llama", "qwen2"), kp.matrices.STRUCTURES))
DROPOUT = {"attn_pdrop": 0.5, "embd_pdrop": 0.5, "resid_pdrop": 0.5}
# A stream with something to learn: each token follows from the one before.
TOKENS = (7 * torch.arange(4096)) % 60 + 3
TWO_PHASES = [
    {"share": 0.5},
    {"share": 0.5, "sequences_per_step": 8, "learning_rate": 1e-4, "final_learning_rate": 1.0},
]


def schedule(**changes: Any) -> Healing:
    fields = {"max_steps": 6, "sequences_per_step": 4, "sequence_length": 16, "learning_rate": 3e-3}
    return Healing(**{**fields, **changes})


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_weights(actual: nn.Module, expected: dict[str, Tensor], **tolerance: float) -> None:
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    torch.testing.assert_close(weights(actual), expected, **tolerance)


def largest_change(model: nn.Module, before: dict[str, Tensor]) -> float:
    return max((parameter - before[name]).abs().max().item() for name, parameter in weights(model).items())


@torch.no_grad()
def next_token_loss(model: nn.Module, ids: Tensor) -> float:
    device = next(model.parameters()).device
    logits = model.eval()(input_ids=ids.to(device)).logits[:, :-1].double().log_softmax(-1)
    return -logits.gather(-1, ids[:, 1:, None].to(device)).mean().item()


# ---- the two losses ----


@st.composite
def logit_pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor, float]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(2, 40)))
    student, teacher = (draw(st.sampled_from([0.1, 1.0, 8.0])) * torch.randn(shape, generator=generator) for _ in "st")
    return student, teacher, draw(st.sampled_from([0.5, 1.0, 2.0, 7.3]))


def reference_distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    softened = [Categorical(logits=logits.double() / temperature) for logits in (teacher, student)]
    return temperature**2 * kl_divergence(*softened).mean()


@given(logit_pairs())
@settings(max_examples=60, deadline=None)
def test_distillation_equals_the_definition_in_float64(pair):
    student, teacher, temperature = pair
    loss = distillation_loss(student, teacher, temperature)
    expected = reference_distillation(student, teacher, temperature)
    # The factor T² multiplies the rounding of float32 as well.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5 * max(1.0, temperature**2 / 4))
    assert loss >= -1e-6


@given(logit_pairs())
@settings(max_examples=60, deadline=None)
def test_distillation_is_exactly_zero_where_the_logits_agree(pair):
    logits, _, temperature = pair
    assert distillation_loss(logits, logits.clone(), temperature).item() == 0.0
    assert distillation_loss(logits.bfloat16(), logits.bfloat16(), temperature).item() == 0.0


@given(logit_pairs())
@settings(max_examples=40, deadline=None)
def test_the_gradient_of_distillation(pair):
    student, teacher, temperature = pair
    student.requires_grad_()
    distillation_loss(student, teacher, temperature).backward()
    # d/ds of T² KL(softmax(t/T) ‖ softmax(s/T)), by hand.
    q, p = ((logits.detach().double() / temperature).softmax(-1) for logits in (student, teacher))
    by_hand = temperature * (q - p) / q[..., 0].numel()
    torch.testing.assert_close(student.grad.double(), by_hand, rtol=1e-4, atol=1e-6)

    direction, step = torch.randn(student.shape, dtype=torch.float64), 1e-5
    ahead, behind = (
        reference_distillation(student.detach() + sign * step * direction, teacher, temperature) for sign in (1, -1)
    )
    slope = (student.grad * direction).sum()
    torch.testing.assert_close((ahead - behind) / (2 * step), slope, rtol=1e-3, atol=1e-4)


def test_the_gradient_of_distillation_keeps_its_size_at_high_temperature():
    torch.manual_seed(0)
    teacher = torch.randn(4, 10)
    norms = []
    for temperature in (50.0, 500.0):
        student = torch.zeros(4, 10, requires_grad=True)
        distillation_loss(student, teacher, temperature).backward()
        norms.append(student.grad.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


def test_distillation_is_forward_divergence_with_temperature_one_unless_told_otherwise():
    teacher, student = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert distillation_loss(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_language_model_loss_by_hand():
    logits = torch.tensor([[[math.log(3), 0.0], [0.0, 0.0]], [[0.0, math.log(7)], [0.0, 0.0]]])
    targets = torch.tensor([[0, 1], [0, 1]])
    expected = -(math.log(3 / 4) + math.log(1 / 2) + math.log(1 / 8) + math.log(1 / 2)) / 4
    assert language_model_loss(logits, targets).item() == pytest.approx(expected, rel=1e-6)
    rounded = logits.bfloat16()
    assert language_model_loss(rounded, targets).item() == language_model_loss(rounded.float(), targets).item()


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


# ---- terms inside the network ----

# Every family's last norm, and what its configuration calls the depth.
LAST_NORM = {
    "gpt2": "transformer.ln_f",
    "opt": "model.decoder.final_layer_norm",
    "llama": "model.norm",
    "qwen2": "model.norm",
}
DEPTH = {"gpt2": "n_layer", "opt": "num_hidden_layers", "llama": "num_hidden_layers", "qwen2": "num_hidden_layers"}
INSIDE = {"embedding_weight": 0.5, "attention_weight": 3.0, "hidden_weight": 0.2}
COLUMNS = {"embedding_weight": "embedding_mse", "attention_weight": "attention_nats", "hidden_weight": "hidden_mse"}


@torch.no_grad()
def inside(family: str, model: nn.Module, ids: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """What transformers itself gives in float64: the embedding's output, the attention maps, the blocks' outputs."""
    model = copy.deepcopy(model).double().eval()
    model.set_attn_implementation("eager")
    # Transformers gives the last block's output only through the last norm.
    parent, _, name = LAST_NORM[family].rpartition(".")
    setattr(model.get_submodule(parent), name, nn.Identity())
    given = model(input_ids=ids, output_hidden_states=True, output_attentions=True, use_cache=False)
    return given.hidden_states[0], list(given.attentions), list(given.hidden_states[1:])


def reference_terms(
    family: str, student: nn.Module, teacher: nn.Module, ids: Tensor, matched: list[int]
) -> dict[str, float]:
    (embedding, maps, states), (teacher_embedding, teacher_maps, teacher_states) = (
        inside(family, model, ids) for model in (student, teacher)
    )
    attention = hidden = 0.0
    for i, block in enumerate(matched):
        # Categorical makes a probability of exactly 0 a tiny one, in both.
        attention += kl_divergence(Categorical(teacher_maps[block]), Categorical(maps[i])).mean().item()
        hidden += (states[i] - teacher_states[block]).pow(2).mean().item()
    return {
        "embedding_mse": (embedding - teacher_embedding).pow(2).mean().item(),
        "attention_nats": attention,
        "hidden_mse": hidden,
    }


@pytest.mark.parametrize("family", DEPTH)
@pytest.mark.parametrize(("layer_map", "matched"), [(None, [2, 4]), ([3, 0], [3, 0]), ([1, 1], [1, 1])], ids=str)
def test_the_terms_inside_equal_their_definition(tiny_model, tiny_compressed, family, layer_map, matched):
    student, teacher = tiny_compressed(family, "kronecker"), tiny_model(family, seed=1, **{DEPTH[family]: 5})
    ids = TOKENS[:64].view(4, 16)
    expected = reference_terms(family, student, teacher, ids, matched)
    healing = schedule(
        max_steps=1,
        distillation_weight=2.0,
        language_model_weight=0.1,
        layer_map=layer_map,
        sequences_per_pass=2,
        **INSIDE,
    )
    row = kp.heal_(student, teacher, TOKENS[:64], healing).rows[0]
    assert {column: getattr(row, column) for column in expected} == pytest.approx(expected, rel=1e-4)
    assert min(expected.values()) > 0
    weighted = 0.1 * row.language_model_nats + 2 * row.distillation_nats
    weighted += sum(INSIDE[weight] * expected[column] for weight, column in COLUMNS.items())
    assert row.loss == pytest.approx(weighted, rel=1e-4)


@pytest.mark.parametrize("family", DEPTH)
def test_the_terms_inside_are_exactly_zero_for_a_student_that_is_its_teacher(tiny_model, family):
    healing = schedule(max_steps=1, language_model_weight=0.0, **INSIDE)
    row = kp.heal_(tiny_model(family), tiny_model(family), TOKENS, healing).rows[0]
    assert (row.loss, row.embedding_mse, row.attention_nats, row.hidden_mse) == (0.0, 0.0, 0.0, 0.0)
    assert row.distillation_nats is None


@pytest.mark.parametrize("family", DEPTH)
@pytest.mark.parametrize("weight", INSIDE)
def test_minimising_one_term_alone_brings_the_models_nearer_in_it(tiny_model, tiny_compressed, family, weight):
    student, teacher = tiny_compressed(family, "kronecker", seed=1), tiny_model(family)
    before, ids = weights(teacher), TOKENS[:320].view(20, 16)
    apart = reference_terms(family, student, teacher, ids, [0, 1])[COLUMNS[weight]]
    log = kp.heal_(student, teacher, TOKENS, schedule(max_steps=12, language_model_weight=0.0, **{weight: 1.0}))
    assert reference_terms(family, student, teacher, ids, [0, 1])[COLUMNS[weight]] < 0.9 * apart
    for row in log.rows:
        assert {column for column in COLUMNS.values() if getattr(row, column) is not None} == {COLUMNS[weight]}
        assert row.loss == pytest.approx(getattr(row, COLUMNS[weight]), rel=1e-5)
    assert_same_weights(teacher, before)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("ends", [True, False], ids=["ends", "fails"])
@pytest.mark.parametrize("attention_weight", [0.0, 1.0])
def test_attention_is_switched_only_for_its_maps_and_everything_is_given_back(
    tiny_model, tiny_compressed, ends, attention_weight
):
    models = student, teacher = tiny_compressed("gpt2", "low_rank"), tiny_model("gpt2")
    teacher.set_attn_implementation("eager")
    seen = []

    def look(row: HealingRow) -> None:
        seen.append([model.config._attn_implementation for model in models])
        if not ends:
            raise Interrupted

    healing = schedule(max_steps=2, hidden_weight=1.0, attention_weight=attention_weight)
    with nullcontext() if ends else pytest.raises(Interrupted):
        kp.heal_(student, teacher, TOKENS, healing, progress=look)
    assert seen == [["eager" if attention_weight else "sdpa", "eager"]] * (2 if ends else 1)
    assert [model.config._attn_implementation for model in models] == ["sdpa", "eager"]
    assert not any(module._forward_hooks for model in models for module in model.modules())


def test_two_models_of_one_configuration_get_their_attention_back(tiny_model, tiny_compressed):
    student, teacher = tiny_compressed("llama", "low_rank"), tiny_model("llama")
    teacher.config = student.config
    kp.heal_(student, teacher, TOKENS, schedule(max_steps=1, attention_weight=1.0))
    assert student.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("terms", "per_pass"),
    [
        ({}, 0),
        ({"distillation_weight": 1.0}, 1),
        ({"hidden_weight": 1.0}, 1),
        ({"distillation_weight": 1.0, **INSIDE}, 1),
    ],
    ids=str,
)
def test_the_teacher_is_run_once_in_a_pass_or_never(tiny_model, tiny_compressed, terms, per_pass):
    teacher = tiny_model("gpt2")
    runs = []
    teacher.register_forward_pre_hook(lambda *_: runs.append(1))
    kp.heal_(tiny_compressed("gpt2", "low_rank"), teacher, TOKENS, schedule(sequences_per_pass=2, **terms))
    assert len(runs) == 6 * 2 * per_pass


def test_no_state_is_kept_that_no_term_asks_for(tiny_model, tiny_compressed):
    student, hooks = tiny_compressed("gpt2", "low_rank"), []

    def count(*_: Any) -> None:
        blocks = [module for name, module in student.named_modules() if name.startswith("transformer.h")]
        hooks.append(sum(len(module._forward_hooks) for module in blocks))

    student.transformer.wte.register_forward_hook(count)
    for terms, expected in [({"distillation_weight": 1.0}, 0), ({"embedding_weight": 1.0}, 1), ({**INSIDE}, 5)]:
        kp.heal_(student, tiny_model("gpt2"), TOKENS, schedule(max_steps=1, **terms))
        assert hooks.pop() == expected


def test_terms_inside_need_models_that_can_be_compared(tiny_model, tiny_compressed):
    model, teacher = tiny_compressed("gpt2", "low_rank"), tiny_model("gpt2")
    strange = copy.deepcopy(teacher)
    strange.config.model_type = "strange"
    before = weights(model)
    for wanted, other, changes in [
        ("embedding_weight is not 0 and there is no teacher", None, {"embedding_weight": 1.0}),
        ("vocabularies of 300 and 310", tiny_model("gpt2", vocab_size=310), {"hidden_weight": 1.0}),
        (
            r"healing\.attention_weight: num_attention_heads is 2 in the student and 4 in the teacher",
            tiny_model("gpt2", n_head=4),
            {"attention_weight": 1.0},
        ),
        (
            r"healing\.hidden_weight: hidden_size is 16 in the student and 32 in the teacher",
            tiny_model("gpt2", n_embd=32),
            {"hidden_weight": 1.0},
        ),
        (r"healing\.embedding_weight: hidden_size", tiny_model("gpt2", n_embd=32), {"embedding_weight": 1.0}),
        ("type 'strange'.*known types are gpt2", strange, {"hidden_weight": 1.0}),
        ("layer_map names 3 blocks: the student has 2", teacher, {"hidden_weight": 1.0, "layer_map": [0, 1, 1]}),
        ("block 2: the teacher has 0 to 1", teacher, {"attention_weight": 1.0, "layer_map": [0, 2]}),
    ]:
        with pytest.raises(kp.RequestError, match=wanted):
            kp.heal_(model, other, TOKENS, schedule(**changes))
    assert_same_weights(model, before)
    # Other widths do not matter to the attention maps, nor other heads to the states.
    wider = tiny_model("gpt2", n_embd=32)
    assert kp.heal_(model, wider, TOKENS, schedule(max_steps=1, attention_weight=1.0)).rows[0].attention_nats > 0
    more_heads = tiny_model("gpt2", n_head=4)
    assert kp.heal_(model, more_heads, TOKENS, schedule(max_steps=1, hidden_weight=1.0)).rows[0].hidden_mse > 0


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"language_model_weight": 0.0}, "attention_weight, hidden_weight are all 0: nothing to minimise"),
        ({"hidden_weight": -1.0}, "hidden_weight"),
        ({"layer_map": [-1, 0]}, "layer_map"),
    ],
)
def test_weights_and_maps_that_make_no_sense_are_refused(changes, wanted):
    with pytest.raises(ValueError, match=wanted):
        schedule(**changes)


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


@pytest.fixture
def adaptive_model(tiny_model):
    """A compressed GPT-2 whose Kronecker sums of two terms have the start that is asked for."""

    def build(start: str) -> nn.Module:
        model = tiny_model("gpt2")
        recipe = kp.Recipe(spec={"right_shape": (2, 2), "num_terms": 2}, fit={"start": start})
        kp.compress_(model, kp.make_plan(model, recipe))
        return model

    return build


def test_scalars_learn_beside_their_factors_and_leave_no_trace(adaptive_model, tmp_path):
    rate, ids = 1e-3, TOKENS[:64].view(4, 16)
    model, before = adaptive_model("adaptive"), weights(adaptive_model("adaptive"))
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


def test_scalars_are_folded_even_when_the_healing_fails(adaptive_model):
    model = adaptive_model("adaptive")
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


def test_a_loss_that_is_not_finite_stops_the_training(tiny_compressed):
    model = tiny_compressed("gpt2", "low_rank")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = math.nan
    with pytest.raises(kp.WorkError, match=r"loss is nan at step 0.*lower rate"):
        kp.heal_(model, None, TOKENS, schedule())


# ---- resuming ----


class Interrupted(Exception):
    pass


def interrupt_after(step: int) -> Any:
    def progress(row: HealingRow) -> None:
        if row.step == step:
            raise Interrupted

    return progress


@pytest.mark.parametrize(
    ("start", "changes"),
    [
        ("van_loan", {}),
        ("van_loan", {"sequences_per_pass": 1}),
        ("adaptive", {}),
        ("van_loan", {"phases": TWO_PHASES}),
        ("adaptive", {"phases": TWO_PHASES, "attention_weight": 1.0, "hidden_weight": 1.0}),
    ],
    ids=["plain", "passes", "adaptive", "phases", "inside"],
)
def test_an_interrupted_training_goes_on_to_the_same_weights(tiny_model, adaptive_model, tmp_path, start, changes):
    healing = schedule(max_steps=8, save_steps=2, distillation_weight=1.0, **changes)
    teacher = tiny_model("gpt2")
    whole = adaptive_model(start)
    expected = kp.heal_(whole, teacher, TOKENS, healing, seed=3, work_dir=tmp_path / "whole")

    for step in (4, 7):
        with pytest.raises(Interrupted):
            kp.heal_(
                adaptive_model(start),
                teacher,
                TOKENS,
                healing,
                seed=3,
                work_dir=tmp_path / "parts",
                resume=True,
                progress=interrupt_after(step),
            )
    resumed = adaptive_model(start)
    log = kp.heal_(resumed, teacher, TOKENS, healing, seed=3, work_dir=tmp_path / "parts", resume=True)
    assert (expected.resumed_at_step, log.resumed_at_step) == (None, 6)
    assert [row.loss for row in log.rows] == [row.loss for row in expected.rows[6:]]
    assert_same_weights(resumed, weights(whole))


def test_resuming_what_never_began_begins(tiny_compressed, tmp_path):
    plain, resumed = tiny_compressed("gpt2", "low_rank"), tiny_compressed("gpt2", "low_rank")
    kp.heal_(plain, None, TOKENS, schedule())
    for folder in (tmp_path / "missing", tmp_path):
        log = kp.heal_(resumed, None, TOKENS, schedule(), work_dir=folder, resume=True)
        assert log.resumed_at_step is None
        assert_same_weights(resumed, weights(plain))
        resumed = tiny_compressed("gpt2", "low_rank")


def test_resuming_what_had_ended_gives_its_result(tiny_compressed, tmp_path):
    healing = schedule(save_steps=2)
    whole, resumed = tiny_compressed("gpt2", "low_rank"), tiny_compressed("gpt2", "low_rank")
    kp.heal_(whole, None, TOKENS, healing, work_dir=tmp_path)
    assert kp.heal_(resumed, None, TOKENS, healing, work_dir=tmp_path, resume=True).resumed_at_step == 6
    assert_same_weights(resumed, weights(whole))


def test_weights_that_a_step_has_spoilt_push_no_good_checkpoint_out(tiny_compressed, tmp_path):
    model = tiny_compressed("gpt2", "low_rank")

    def spoil(row: HealingRow) -> None:
        if row.step == 3:
            with torch.no_grad():
                model.transformer.wpe.weight[0, 0] = math.inf

    with pytest.raises(kp.WorkError, match=r"wpe.weight' holds NaN or infinity after step 3.*of step 2 is kept"):
        kp.heal_(model, None, TOKENS, schedule(save_steps=1), work_dir=tmp_path, progress=spoil)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_without_resume_training_starts_anew(tiny_compressed, tmp_path):
    first, second = tiny_compressed("gpt2", "low_rank"), tiny_compressed("gpt2", "low_rank")
    for model in (first, second):
        log = kp.heal_(model, None, TOKENS, schedule(save_steps=2), work_dir=tmp_path)
        assert log.resumed_at_step is None
    assert_same_weights(second, weights(first))


def test_a_training_checkpoint_cut_off_while_written_is_passed_over(tiny_compressed, tmp_path):
    healing = schedule(save_steps=2)
    whole, resumed = tiny_compressed("gpt2", "low_rank"), tiny_compressed("gpt2", "low_rank")
    kp.heal_(whole, None, TOKENS, healing, work_dir=tmp_path)
    cut_off: Path = tmp_path / "checkpoint-6"
    for path in cut_off.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()
    (cut_off / "model.safetensors").write_bytes((cut_off / "model.safetensors").read_bytes()[:100])
    log = kp.heal_(resumed, None, TOKENS, healing, work_dir=tmp_path, resume=True)
    assert log.resumed_at_step == 4
    assert_same_weights(resumed, weights(whole))


def test_training_checkpoints_do_not_pile_up(tiny_compressed, tmp_path):
    kp.heal_(tiny_compressed("gpt2", "low_rank"), None, TOKENS, schedule(save_steps=1), work_dir=tmp_path)
    assert 1 <= len(list(tmp_path.glob("checkpoint-*"))) <= 2
    shutil.rmtree(tmp_path)
    kp.heal_(tiny_compressed("gpt2", "low_rank"), None, TOKENS, schedule(), work_dir=tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))


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
