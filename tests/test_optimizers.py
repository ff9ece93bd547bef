"""Every optimiser steps as its definition says, keeps as few bytes as it promises, and goes on bit for bit."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.healing import (
    TOKENS,
    Interrupted,
    assert_same_weights,
    next_token_loss,
    schedule,
    weights,
    with_sums_of_two_terms,
)
from torch import Tensor, nn

import kronpress as kp
from kronpress.healing.optimizers import (
    ByRule,
    make_optimizer,
    matrix_dims,
    orthogonalised,
    parameter_groups,
    rounded_at_random,
    state_bytes,
)

# Those that need no further package.
OPTIMIZERS = ("adamw", "adamw-bfloat16", "adafactor", "muon")
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def steps_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, num_steps: int = 6) -> list[Tensor]:
    """Where the parameter is after each of some steps along random gradients, always the same."""
    places = []
    for step in range(num_steps):
        parameter.grad = normal(*parameter.shape, seed=step) * 10.0 ** -(step % 3)
        optimizer.step()
        places.append(parameter.detach().clone())
    return places


def by_rule(parameter: nn.Parameter, rule: str, dims: tuple[int, int] | None = None, **more: float) -> ByRule:
    return ByRule([{"params": [parameter], "rule": rule, "dims": dims, **more}])


# ---- directions ----


def test_adamw_is_that_of_torch():
    start = normal(5, 4)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    found = steps_of(by_rule(ours, "adamw", lr=0.1, weight_decay=0.3), ours)
    torch.testing.assert_close(found, steps_of(torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.3), theirs))


def test_moments_of_16_bits_step_about_as_those_of_32():
    start = normal(64, 64)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    found = steps_of(by_rule(ours, "adamw-bfloat16", lr=0.1, weight_decay=0.3), ours, 30)
    expected = steps_of(torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.3), theirs, 30)
    torch.testing.assert_close(found[0], expected[0])  # the first step is taken before anything is rounded
    assert (found[-1] - expected[-1]).norm() < 0.02 * (expected[-1] - start).norm()


@given(size=st.floats(1, 2, width=32), scale=st.sampled_from([1e-20, -1.0, 1e20]), seed=st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_random_rounding_goes_to_a_neighbour_and_keeps_the_mean(size, scale, seed):
    values = torch.full((40_000,), scale * size)
    rounded = rounded_at_random(values, torch.Generator().manual_seed(seed)).float()
    bits = values[:1].view(torch.int32) & -(1 << 16)
    ends = torch.cat([bits, bits + (1 << 16)]).view(torch.float32)
    assert torch.isin(rounded, ends).all()
    gap = (ends[1] - ends[0]).abs().item()
    assert rounded.double().mean().item() == pytest.approx(values[0].item(), abs=gap / 50)


def test_a_second_moment_of_16_bits_falls_when_gradients_do():
    parameter = nn.Parameter(torch.zeros(1000))
    optimizer = by_rule(parameter, "adamw-bfloat16", lr=0.0)
    for gradient in (1.0, *[0.0] * 400):
        parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
    square = optimizer.state[parameter]["square"].float().mean().item()
    assert square == pytest.approx(0.001 * 0.999**400, rel=0.02)


def test_adafactor_goes_where_that_of_torch_goes():
    start = normal(6, 4)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    found = steps_of(by_rule(ours, "adafactor", (0, 1), lr=1.0), ours)
    expected = steps_of(torch.optim.Adafactor([theirs], lr=1.0, weight_decay=0.0), theirs)
    for before, here, other_before, there in zip([start, *found], found, [start, *expected], expected, strict=False):
        # Its steps are relative to the size of the parameter and fall with time; ours have the rate that is given.
        towards, expected_towards = here - before, there - other_before
        torch.testing.assert_close(
            towards / towards.norm(), expected_towards / expected_towards.norm(), rtol=1e-4, atol=1e-5
        )
        assert towards.square().mean().sqrt() <= 1 + 1e-5


@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_orthogonalised_matrices_keep_their_directions(data):
    rows, columns = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    matrices = data.draw(st.sampled_from([1e-4, 1.0, 1e3])) * normal(
        3, rows, columns, seed=data.draw(st.integers(0, 99))
    )
    x, sizes, y = torch.linalg.svd(matrices.double(), full_matrices=False)
    between = x.mT @ orthogonalised(matrices).double() @ y.mT
    torch.testing.assert_close(between, torch.diag_embed(between.diagonal(dim1=-2, dim2=-1)), rtol=0, atol=1e-3)
    # What is far below the largest is not brought up in five iterations.
    large = sizes > 0.02 * sizes.norm(dim=-1, keepdim=True)
    found = between.diagonal(dim1=-2, dim2=-1)[large]
    assert found.min() > 0.6
    assert found.max() < 1.3


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
def test_muon_is_about_that_of_torch(shape):
    start = normal(*shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    found = steps_of(by_rule(ours, "muon", (0, 1), lr=0.01, weight_decay=0.3), ours)
    expected = steps_of(torch.optim.Muon([theirs], lr=0.01, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"), theirs)
    for here, there in zip(found, expected, strict=True):  # torch's is computed in bfloat16
        assert (here - there).norm() < 0.05 * (there - start).norm()


@pytest.mark.parametrize("rule", ["muon", "adafactor"])
@pytest.mark.parametrize("dims", [(0, 2), (2, 0), (1, 2)])
def test_a_batch_of_matrices_is_stepped_as_each_by_itself(rule, dims):
    batch = ({0, 1, 2} - set(dims)).pop()
    together = nn.Parameter(normal(4, 4, 4))
    alone = [nn.Parameter(each.clone()) for each in together.detach().movedim(dims, (-2, -1))]
    optimizer, others = by_rule(together, rule, dims, lr=0.1), [by_rule(each, rule, (0, 1), lr=0.1) for each in alone]
    for step in range(4):
        together.grad = normal(4, 4, 4, seed=step)
        optimizer.step()
        for number, (each, other) in enumerate(zip(alone, others, strict=True)):
            each.grad = together.grad.movedim(dims, (-2, -1))[number].clone()
            other.step()
    found = together.detach().movedim(dims, (-2, -1))
    assert found.shape[0] == together.shape[batch]
    # Adafactor bounds the RMS over all numbers of a parameter, which nearly never differs here.
    torch.testing.assert_close(
        found, torch.stack([each.detach() for each in alone]), rtol=0, atol=1e-5 + 0.05 * (rule == "adafactor")
    )


# ---- which parameters ----


@pytest.mark.parametrize("structure", kp.matrices.STRUCTURES.values(), ids=list(kp.matrices.STRUCTURES))
def test_every_factor_is_a_batch_of_matrices(structure):
    specs = structure.candidate_specs(24, 16, 250)
    assert specs
    for spec in specs:
        layer = kp.StructuredLinear(structure(24, 16, spec), torch.zeros(24))
        shapes = {name: factor.shape for name, factor in layer.named_parameters() if name != "bias"}
        dims = matrix_dims(layer)
        assert dims.keys() == shapes.keys()
        for name, (rows, columns) in dims.items():
            assert {rows, columns} < set(range(len(shapes[name]))) or len(shapes[name]) == 2
            assert rows != columns


def test_only_vectors_are_no_matrices(tiny_compressed):
    model = tiny_compressed("gpt2", "kronecker")
    others = {name for name, _ in model.named_parameters()} - matrix_dims(model).keys()
    assert others == {name for name, parameter in model.named_parameters() if parameter.ndim < 2}


def test_terms_of_a_kronecker_sum_are_matrices():
    spec = kp.matrices.Kronecker.Spec(left_shape=(6, 4), right_shape=(2, 4), num_terms=3)
    layer = kp.StructuredLinear(kp.matrices.Kronecker(12, 16, spec))
    assert matrix_dims(layer) == {"weight": (0, 2), "right": (0, 2)}
    low_rank = kp.StructuredLinear(kp.matrices.LowRank(6, 4, kp.matrices.LowRank.Spec(rank=2)))
    assert matrix_dims(low_rank) == {"weight": (0, 1), "right": (0, 1)}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_muon_leaves_tables_and_vectors_to_adamw(tiny_compressed, family):
    model = tiny_compressed(family, "kronecker")
    by_rules: dict[str, set[str]] = {"adamw": set(), "muon": set()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in parameter_groups(model, schedule(optimizer="muon"), 0.1):
        by_rules[group["rule"]] |= {names[id(each)] for each in group["params"]}
    assert by_rules["adamw"] | by_rules["muon"] == set(names.values())
    tables = ("wte", "wpe", "lm_head", "embed_tokens")
    expected = {
        name for name, each in model.named_parameters() if each.ndim >= 2 and not any(part in name for part in tables)
    }
    assert by_rules["muon"] == expected


def test_frozen_parameters_are_in_no_group(tiny_compressed):
    model = tiny_compressed("gpt2", "low_rank")
    model.transformer.wte.weight.requires_grad_(False)
    grouped = [each for group in parameter_groups(model, schedule(), 0.1) for each in group["params"]]
    assert len(grouped) == sum(1 for each in model.parameters()) - 1
    assert all(each.requires_grad for each in grouped)


# ---- bytes ----


@every_optimizer
def test_bytes_of_state_are_those_promised(tiny_compressed, name):
    model = tiny_compressed("gpt2", "low_rank")
    optimizer = make_optimizer(name, parameter_groups(model, schedule(optimizer=name), 1e-3))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    expected = 0
    for parameter_name, parameter in model.named_parameters():
        m, n = (*parameter.shape, 1)[:2]  # low rank's factors have no others but of size 1
        size, is_table = parameter.numel(), "wte" in parameter_name or "wpe" in parameter_name
        if parameter.ndim < 2:
            expected += {"adafactor": 4}.get(name, 8) * size
        elif name == "adafactor":
            expected += 4 * (m + n)
        else:
            expected += {"adamw": 8, "adamw-bfloat16": 4, "muon": 8 if is_table else 4}[name] * size
    # torch's AdamW has its count of steps in a tensor.
    assert state_bytes(optimizer) == expected + 4 * len(list(model.parameters())) * (name == "adamw")


# ---- healing ----


@every_optimizer
@pytest.mark.parametrize("rates", ["global", "movement"])
def test_healing_with_it_lowers_the_loss(tiny_compressed, name, rates):
    model = tiny_compressed("llama", "kronecker")
    ids = TOKENS[:320].view(20, 16)
    before = next_token_loss(model, ids)
    kp.heal_(model, None, TOKENS, schedule(max_steps=12, optimizer=name, rates=rates))
    assert next_token_loss(model, ids) < before - 0.1


@every_optimizer
@pytest.mark.parametrize(("rates", "start"), [("global", "van_loan"), ("movement", "adaptive")])
def test_an_interrupted_healing_goes_on_bit_for_bit(tiny_model, tmp_path, name, rates, start):
    def student() -> nn.Module:
        return with_sums_of_two_terms(tiny_model("gpt2"), start)

    def interrupt(row: kp.healing.HealingRow) -> None:
        if row.step == 4:
            raise Interrupted

    healing = schedule(max_steps=7, save_steps=3, optimizer=name, rates=rates, weight_decay=0.1)
    whole, resumed = student(), student()
    kp.heal_(whole, None, TOKENS, healing)
    with pytest.raises(Interrupted):
        kp.heal_(student(), None, TOKENS, healing, work_dir=tmp_path, progress=interrupt)
    with torch.no_grad():
        for parameter in resumed.parameters():  # whose rates would be others
            parameter *= 1.5
    log = kp.heal_(resumed, None, TOKENS, healing, work_dir=tmp_path, resume=True)
    assert log.resumed_at_step == 3
    assert_same_weights(resumed, weights(whole))


def test_state_keeps_its_dtype_when_it_is_loaded():
    parameter = nn.Parameter(normal(4, 4).bfloat16())
    optimizer = by_rule(parameter, "adafactor", (0, 1), lr=0.1)
    parameter.grad = normal(4, 4).bfloat16()
    optimizer.step()
    other = by_rule(parameter, "adafactor", (0, 1), lr=0.1)
    other.load_state_dict(optimizer.state_dict())
    for name in ("rows", "columns"):
        found, expected = other.state[parameter][name], optimizer.state[parameter][name]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert found.data_ptr() != expected.data_ptr()


@pytest.mark.parametrize(("field", "value"), [("optimizer", "muon"), ("rates", "movement")])
def test_a_training_is_not_resumed_with_another_kind(tiny_compressed, tmp_path, field, value):
    healing = schedule(max_steps=4, save_steps=2)
    kp.heal_(tiny_compressed("gpt2", "low_rank"), None, TOKENS, healing, work_dir=tmp_path)
    other = schedule(max_steps=4, save_steps=2, **{field: value})
    with pytest.raises(kp.RequestError, match=rf"healing\.{field} was \w+ and is {value}"):
        kp.heal_(
            tiny_compressed("gpt2", "low_rank"),
            None,
            TOKENS,
            other,
            work_dir=tmp_path,
            resume=True,
            accept_changes=True,
        )


def test_8_bits_without_torchao_are_refused(tiny_compressed, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(kp.RequestError, match=r"adamw-8bit.*torchao.*adamw-bfloat16"):
        kp.heal_(tiny_compressed("gpt2", "low_rank"), None, TOKENS, schedule(optimizer="adamw-8bit"))
