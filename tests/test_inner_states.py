"""The terms inside the network are those of transformers' own hidden states and attention maps; blocks are matched."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.healing import TOKENS, Interrupted, assert_same_weights, schedule, weights
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributions import Categorical, kl_divergence

import kronpress as kp
from kronpress.healing import HealingRow, match_blocks

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
    # The estimate of memory runs on tensors without values.
    teacher.register_forward_pre_hook(
        lambda _, __, given: None if isinstance(given["input_ids"], FakeTensor) else runs.append(1), with_kwargs=True
    )
    kp.heal_(tiny_compressed("gpt2", "low_rank"), teacher, TOKENS, schedule(sequences_per_pass=2, **terms))
    assert len(runs) == (6 * 2 + 1) * per_pass  # and once beforehand, to find its head


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


# ---- matching of blocks ----


@given(num_student=st.integers(1, 40), num_teacher=st.integers(1, 40))
def test_each_block_meets_the_one_in_which_its_share_of_the_depth_ends(num_student, num_teacher):
    matched = match_blocks(num_student, num_teacher)
    assert len(matched) == num_student
    for i, block in enumerate(matched):
        end = Fraction(i + 1, num_student)
        assert Fraction(block, num_teacher) < end <= Fraction(block + 1, num_teacher)
    assert matched[-1] == num_teacher - 1
    assert match_blocks(num_teacher, num_teacher) == list(range(num_teacher))


@given(st.lists(st.integers(0, 8), min_size=1, max_size=5))
def test_a_map_is_taken_as_it_is(layer_map):
    assert match_blocks(len(layer_map), 9, layer_map) == layer_map
    with pytest.raises(kp.RequestError, match=rf"names {len(layer_map)} blocks: the student has {len(layer_map) + 1}"):
        match_blocks(len(layer_map) + 1, 9, layer_map)
    with pytest.raises(kp.RequestError, match=rf"block {max(layer_map)}: the teacher has 0 to {max(layer_map) - 1}"):
        match_blocks(len(layer_map), max(layer_map), layer_map)
