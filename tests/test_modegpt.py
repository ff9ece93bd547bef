"""Reduced widths by MoDeGPT: its decompositions against slow references, and models that stay what they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, PreTrainedModel

import kronpress as kp
from kronpress import RequestError, WorkError
from kronpress.calibration.batches import checked_batches, divide
from kronpress.calibration.similarity import block_similarities
from kronpress.checkpoint import attached_plan, load_model, save_checkpoint
from kronpress.matrices.metric import Metric
from kronpress.plan import ReducedLayerPlan
from kronpress.planning import Totals
from kronpress.reduction import blocks_of, reduced_fractions
from kronpress.reduction.attention import ReducedAttention
from kronpress.reduction.decompositions import (
    RIDGE,
    channel_scores,
    leverage_scores,
    most,
    nystrom,
    ordered_units,
    subspace,
)

FAMILIES = ["gpt2", "opt", "llama", "qwen2"]
every_family = pytest.mark.parametrize("family", FAMILIES)
TOKENS = torch.randint(0, 300, (8, 64), generator=torch.Generator().manual_seed(0))


def recipe(kept: float = 0.5, **changes: Any) -> kp.Recipe:
    fields = {
        "name": "tiny-reduced",
        "targets": "blocks",
        "structure": "reduced",
        "weighting": {"metric": "input"},
        "calibration": {"sensitivity": False, "held_out": 0},
        "budget": {"kept_of_targets": kept},
    }
    return kp.load_recipe({**fields, **changes})


def reduced(model: PreTrainedModel, given: kp.Recipe) -> tuple[PreTrainedModel, kp.Plan]:
    """A copy of the model by the recipe, calibrated on TOKENS."""
    model = copy.deepcopy(model)
    moments = kp.calibrate(model, [TOKENS], given)
    plan = kp.make_plan(model, given, moments)
    kp.compress_(model, plan, moments=moments)
    return model, plan


@torch.no_grad()
def logits(model: PreTrainedModel, **more: Any) -> Tensor:
    return model.eval()(input_ids=TOKENS, **more).logits


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


# ---- the decompositions ----


@st.composite
def samples(draw: st.DrawFn, most_units: int = 12) -> Tensor:
    """(tokens, units) with more tokens than units, of units that depend on one another."""
    units = draw(st.integers(2, most_units))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    mix = torch.randn(units, units, generator=generator, dtype=torch.float64)
    return torch.randn(4 * units, units, generator=generator, dtype=torch.float64) @ mix + 0.3


@given(samples(), st.data())
@settings(max_examples=25, deadline=None)
def test_the_nystrom_weights_are_the_least_squares_solution(s: Tensor, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, s.shape[1]))
    kept = torch.tensor(sorted(data.draw(st.permutations(range(s.shape[1])))[:count]))
    weight = torch.randn(3, s.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(count))
    wanted = torch.linalg.lstsq(s[:, kept], s @ weight.mT).solution.mT
    torch.testing.assert_close(nystrom(weight, s.mT @ s / len(s), kept), wanted, rtol=1e-6, atol=1e-6)


@given(samples())
@settings(max_examples=25, deadline=None)
def test_leverage_scores_are_the_diagonal_of_a_ridge_regression(s: Tensor) -> None:
    c = s.mT @ s / len(s)
    ridged = c + RIDGE * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype)
    wanted = (c @ torch.linalg.inv(ridged)).diagonal()
    torch.testing.assert_close(leverage_scores(c), wanted, rtol=1e-8, atol=1e-10)
    assert leverage_scores(torch.zeros(3, 3)).tolist() == [0, 0, 0]


@st.composite
def units_with_a_metric(draw: st.DrawFn) -> tuple[Tensor, Metric]:
    """W (m, h) and a metric, some units of which are linear in others or never active."""
    s = draw(samples())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    if draw(st.booleans()):
        s[:, 0] = s[:, -1] * 2 if draw(st.booleans()) else 0
    outputs = draw(st.integers(1, 6))
    weight = torch.randn(outputs, s.shape[1], generator=generator, dtype=torch.float64)
    gradients = torch.randn(outputs + 2, outputs, generator=generator, dtype=torch.float64)
    kinds = {"none": None, "full": gradients.mT @ gradients, "diagonal": gradients.square().sum(0)}
    return weight, Metric(s.mT @ s / len(s), kinds[draw(st.sampled_from(list(kinds)))])


def lost_without(weight: Tensor, metric: Metric, kept: Tensor) -> float:
    """By the least-squares solution itself."""
    assert metric.input is not None
    nearest = torch.zeros_like(weight).index_copy(1, kept, nystrom(weight, metric.input, kept))
    return metric.squared_norm(weight - nearest)


@given(units_with_a_metric())
@settings(max_examples=50, deadline=None)
def test_units_are_in_the_order_of_greedy_selection_and_what_is_lost_is_known_for_every_number(problem) -> None:
    weight, metric = problem
    order, lost = ordered_units(weight, metric)
    size = weight.shape[1]
    assert sorted(order.tolist()) == list(range(size))
    whole = lost[0].item()
    for count in range(size + 1):
        assert lost[count].item() == pytest.approx(lost_without(weight, metric, order[:count]), abs=1e-9 * whole)
        if count < size:  # no other unit would have left less
            least = min(
                lost_without(weight, metric, torch.cat([order[:count], torch.tensor([unit])]))
                for unit in order[count:].tolist()
            )
            assert lost[count + 1].item() <= least + 1e-9 * whole


def test_of_many_units_several_are_put_in_order_at_once_and_the_loss_is_nearly_that_of_one_by_one(monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(900, 96, generator=generator, dtype=torch.float64)
    s = (hidden @ torch.randn(96, 300, generator=generator, dtype=torch.float64)).relu()
    s[:, 100] = s[:, 7]
    weight, metric = torch.randn(20, 300, generator=generator, dtype=torch.float64), Metric(s.mT @ s / 900)
    one_by_one = ordered_units(weight, metric)[1]
    monkeypatch.setattr("kronpress.reduction.decompositions.UNITS_AT_ONCE", 8 / 300)
    order, lost = ordered_units(weight, metric)
    for count in (30, 100, 200):
        assert lost[count].item() == pytest.approx(lost_without(weight, metric, order[:count]), rel=1e-6)
        assert one_by_one[count] <= lost[count] <= 1.05 * one_by_one[count]
    assert {7, 100} - {*order[:200].tolist()}  # of the same unit twice one is enough


def test_the_most_are_in_ascending_places() -> None:
    assert most(torch.tensor([[1.0, 3.0, 2.0, 3.0], [4.0, 0.0, 0.0, 5.0]]), 2).tolist() == [[1, 3], [0, 3]]


@given(samples(8), st.integers(1, 3), st.data())
@settings(max_examples=25, deadline=None)
def test_the_subspace_of_the_values_is_the_best_of_its_rank(x: Tensor, sharing: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(sharing)
    size = data.draw(st.integers(1, x.shape[1]))
    rank = data.draw(st.integers(1, size))
    value = torch.randn(size, x.shape[1], generator=generator, dtype=torch.float64)
    readers = torch.randn(sharing * 5, size, generator=generator, dtype=torch.float64)
    second = x.mT @ x / len(x)
    down, up = subspace(value @ second @ value.mT, readers.mT @ readers, rank)
    found = readers @ value - (readers @ up) @ (down @ value)
    # Of x̂ = C^½ e with orthonormal e, the best product of rank r is the truncated singular value decomposition.
    values, vectors = torch.linalg.eigh(second)
    root = vectors * values.clamp(min=0).sqrt()
    wanted = torch.linalg.svdvals(readers @ value @ root)[rank:].square().sum()
    error = (found @ root).square().sum()
    torch.testing.assert_close(error, wanted, rtol=1e-6, atol=1e-8 * (readers @ value @ root).square().sum().item())
    torch.testing.assert_close(down @ up, torch.eye(rank, dtype=down.dtype), rtol=0, atol=1e-6)


@pytest.mark.parametrize("sharing", [1, 2])
@pytest.mark.parametrize("pairs", [False, True])
def test_channel_scores_by_their_definition(sharing: int, pairs: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(50, 2 * sharing, 4, generator=generator, dtype=torch.float64)
    k = torch.randn(50, 2, 4, generator=generator, dtype=torch.float64)
    found = channel_scores(q.square().mean(0), k.square().mean(0), pairs)
    for head in range(2):
        for channel in range(2 if pairs else 4):
            both = [channel, channel + 2] if pairs else [channel]
            queries = q[:, head * sharing : (head + 1) * sharing][..., both].square().sum() / 50
            keys = k[:, head][:, both].square().sum() / 50
            assert found[head, channel].item() == pytest.approx((queries * keys).sqrt().item())


@given(
    st.lists(st.tuples(st.floats(0, 2), st.integers(1, 100)), min_size=1, max_size=8),
    st.floats(0, 0.79),
    st.floats(0.01, 2),
)
@settings(deadline=None)
def test_the_fractions_remove_what_is_asked_and_never_more_than_allowed(
    blocks: list[tuple[float, int]], removed: float, temperature: float
) -> None:
    s, p = torch.tensor([each[0] for each in blocks]), torch.tensor([float(each[1]) for each in blocks])
    fractions = reduced_fractions(s, p, removed, temperature, 0.8)
    assert (fractions * p).sum().item() == pytest.approx(removed * p.sum().item(), abs=1e-6)
    assert fractions.min() >= 0
    assert fractions.max() <= 0.8
    order = s.argsort()
    assert (fractions[order].diff() <= 1e-9).all()


def test_without_the_limit_the_fractions_are_the_papers() -> None:
    s = torch.tensor([0.5, 0.1, 0.3], dtype=torch.float64)
    wanted = 3 * 0.2 * torch.softmax(-s / 0.4, 0)
    close(reduced_fractions(s, torch.full((3,), 7.0), 0.2, 0.4, 0.9), wanted)


# ---- models ----


@every_family
def test_a_model_that_keeps_all_is_the_same(
    family: str, tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    dense = tiny_model(family)
    model, plan = reduced(dense, recipe(1.0))
    assert torch.equal(logits(model), logits(dense))
    assert plan.num_params == plan.num_params_dense
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(dense))


def plant_(model: PreTrainedModel, blocks_kept: float) -> None:
    """Leave a fraction of all widths of use, spread over the places: the others are zero or of no rank."""
    generator = torch.Generator().manual_seed(1)
    for block in blocks_of(model).values():
        parts = {}
        for name, roles in block.parts.items():
            layer = model.get_submodule(name)
            weight = layer.weight.mT if type(layer).__name__ == "Conv1D" else layer.weight
            begin = 0
            for role in roles:
                size = block.num_features(role, block.widths) if len(roles) > 1 else len(weight)
                bias = None if layer.bias is None else layer.bias[begin : begin + size]
                parts[role] = (weight[begin : begin + size], bias)
                begin += size
        with torch.no_grad():
            units = block.widths.units
            dead = torch.randperm(units, generator=generator)[int(blocks_kept * units) :]
            for role in {"gate", "up"} & parts.keys():
                for each in parts[role]:
                    if each is not None:
                        each[dead] = 0  # every activation gives 0 for 0
            size, heads = block.widths.query_key, block.num_key_heads
            step = block.step("query_key")
            for head in range(heads):
                some = torch.randperm(size // step, generator=generator)[int(blocks_kept * size) // step :]
                channels = torch.cat([some, some + size // 2]) if step == 2 else some
                for each in parts["key"]:
                    if each is not None:
                        each[head * size + channels] = 0
                rows = slice(head * size, (head + 1) * size)
                weight, bias = parts["value"]
                basis = torch.randn(size, int(blocks_kept * size), generator=generator).to(weight)
                projector = basis @ torch.linalg.pinv(basis)
                weight[rows] = projector @ weight[rows]
                if bias is not None:
                    bias[rows] = projector @ bias[rows]


@every_family
@pytest.mark.parametrize("bias_correction", [False, True])
def test_what_is_of_no_use_is_left_out_at_no_loss(
    family: str, bias_correction: bool, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    dense = tiny_model(family).double()
    plant_(dense, 0.5)
    model, plan = reduced(dense, recipe(weighting={"metric": "input", "bias_correction": bias_correction}))
    assert plan.kept_of_targets == 0.5
    close(logits(model), logits(dense))


@every_family
def test_counts_are_those_of_the_shapes_in_closed_form(family: str, tiny_model: Callable[..., PreTrainedModel]) -> None:
    dense = tiny_model(family)
    model, plan = reduced(dense, recipe(0.6))
    blocks, targets, biases, indices = blocks_of(dense), 0, 0, 0
    width = dense.config.hidden_size
    for prefix, block in blocks.items():
        shapes = {name: layer.spec.shape for name, layer in plan.layers.items() if name.startswith(f"{prefix}.")}
        widths = block.widths_of(shapes)
        inner = 3 if "gate" in block.layers else 2
        per_head = block.num_heads + block.num_key_heads
        targets += width * (inner * widths.units + per_head * (widths.query_key + widths.value))
        lost = per_head * (block.widths.query_key - widths.query_key)
        lost += block.num_key_heads * (block.widths.value - widths.value)
        if family != "llama":
            biases += lost
        if family in ("gpt2", "opt"):
            biases += block.widths.units - widths.units
        if block.is_rotary and widths.query_key < block.widths.query_key:
            indices += block.num_key_heads * widths.query_key // 2
    assert plan.num_params_targets == targets <= 0.6 * plan.num_params_targets_dense
    assert plan.num_params == plan.num_params_dense - plan.num_params_targets_dense + targets - biases
    assert plan.bytes == 4 * plan.num_params + 8 * indices
    assert Totals.of(model) == (plan.num_params, plan.flops_per_token)
    assert plan.flops_per_token_dense - plan.flops_per_token == 2 * (plan.num_params_targets_dense - targets)
    assert kp.Plan.model_validate_json(plan.model_dump_json()) == plan


@every_family
@pytest.mark.parametrize("shards", ["10GB", "20KB"])
def test_a_saved_model_is_loaded_with_the_same_bits(
    family: str, shards: str, tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model, _ = reduced(tiny_model(family), recipe(0.6))
    model.save_pretrained(tmp_path, max_shard_size=shards)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {name: tensor.tolist() for name, tensor in loaded.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in model.state_dict().items()
    }
    assert torch.equal(logits(loaded), logits(model))
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert logits(half).isfinite().all()
    base = AutoModel.from_pretrained(tmp_path).eval()
    states = model.base_model(input_ids=TOKENS).last_hidden_state
    assert torch.equal(base(input_ids=TOKENS).last_hidden_state, states)


@every_family
def test_the_dense_export_is_a_stock_model(
    family: str, tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    given = tiny_model(family).double()
    model, _ = reduced(given, recipe(0.6))
    dense = kp.to_dense(model)
    assert not any(isinstance(module, ReducedAttention) for module in dense.modules())
    assert {name: p.shape for name, p in dense.named_parameters()} == {
        name: p.shape for name, p in given.named_parameters()
    }
    assert dense.state_dict().keys() == given.state_dict().keys()
    close(logits(dense), logits(model))
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text(encoding="utf-8")
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)), logits(model))


@every_family
def test_generation_is_the_same_with_a_cache_without_one_and_with_padding(
    family: str, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model, _ = reduced(tiny_model(family).double(), recipe(0.6))
    prompt = TOKENS[:2, :7]
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = model.generate(prompt, use_cache=False, **settings)
    assert torch.equal(model.generate(prompt, **settings), wanted)
    assert torch.equal(model.generate(prompt, cache_implementation="static", **settings), wanted)
    mask = torch.cat([torch.zeros(2, 3), torch.ones(2, 7)], dim=1).long()
    padded = torch.cat([torch.full((2, 3), 5), prompt], dim=1)
    assert torch.equal(model.generate(padded, attention_mask=mask, **settings)[:, 3:], wanted)


@every_family
def test_all_implementations_of_attention_agree_and_eager_gives_its_weights(
    family: str, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model, _ = reduced(tiny_model(family).double(), recipe(0.6))
    fast = logits(model)
    model.set_attn_implementation("eager")
    output = model(input_ids=TOKENS, output_attentions=True)
    # Stock eager attention takes its softmax in float32.
    torch.testing.assert_close(output.logits.detach(), fast, rtol=1e-5, atol=1e-5)
    assert len(output.attentions) == 2
    assert all(each.shape == (8, model.config.num_attention_heads, 64, 64) for each in output.attentions)
    sums = output.attentions[0].detach().sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_corrected_bias_keeps_the_mean_output_of_the_mlp(
    family: str, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    dense = tiny_model(family).double()
    means = []
    weighting = {"metric": "input", "bias_correction": True}
    for model in (dense, reduced(dense, recipe(0.4, targets="mlp", weighting=weighting))[0]):
        block = next(iter(blocks_of(dense).values()))
        found: list[Tensor] = []
        hook = model.get_submodule(block.layers["down"]).register_forward_hook(
            lambda _, __, output, found=found: found.append(output.detach())
        )
        logits(model)
        hook.remove()
        means.append(found[0].flatten(0, -2).mean(0))
    close(means[1], means[0])


def test_heads_norms_keep_their_channels(tiny_model: Callable[..., PreTrainedModel]) -> None:
    from_llama = {**tiny_model("llama").config.to_dict(), "model_type": "qwen3", "head_dim": 4}
    for name in ("architectures", "rope_parameters", "quantization_config"):
        from_llama.pop(name, None)
    config = kp.checkpoint.AutoConfig.for_model(**from_llama)
    dense = AutoModelForCausalLM.from_config(config).double().eval()
    model, plan = reduced(dense, recipe(0.7))
    assert plan.layers["model.layers.0.self_attn.q_proj"].num_params == 256
    assert plan.layers["model.layers.0.self_attn.v_proj"].num_params < 128
    close(logits(kp.to_dense(model)), logits(model))


# ---- similarity of blocks ----


@every_family
def test_similarities_are_cosines_of_hidden_states(family: str, tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model(family)
    mask = torch.ones_like(TOKENS)
    mask[0, 40:] = 0
    batches = [{"input_ids": TOKENS[:3], "attention_mask": mask[:3]}, {"input_ids": TOKENS[3:]}]
    found = block_similarities(model, divide(checked_batches(model, batches), 0))
    rows: list[Tensor] = []
    for batch in batches:
        states = model(**batch, output_hidden_states=True).hidden_states
        cosines = torch.cosine_similarity(states[0].double(), states[1].double(), dim=-1)
        rows.append(cosines[batch["attention_mask"].bool()] if "attention_mask" in batch else cosines.flatten())
    assert len(found) == 2
    assert next(iter(found.values())) == pytest.approx(torch.cat(rows).mean().item(), abs=1e-6)


def test_more_is_removed_where_a_block_changes_less(tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    dense = tiny_model("gpt2")
    with torch.no_grad():  # block 1 adds next to nothing
        for name in ("attn.c_proj", "mlp.c_proj"):
            for parameter in dense.get_submodule(f"transformer.h.1.{name}").parameters():
                parameter *= 1e-3
    given = recipe(0.6, allocation="similarity", similarity={"temperature": 0.5})
    moments = kp.calibrate(dense, [TOKENS], given, cache=tmp_path)
    again = kp.calibrate(dense, [TOKENS], given, cache=tmp_path)
    on_disk = kp.calibrate(dense, [TOKENS], given, max_bytes=1)
    plan = kp.make_plan(dense, given, moments)
    assert plan == kp.make_plan(dense, given, again) == kp.make_plan(dense, given, on_disk)
    kept = [sum(layer.num_params for name, layer in plan.layers.items() if f"h.{block}." in name) for block in (0, 1)]
    assert kept[1] < kept[0]
    assert plan.kept_of_targets <= 0.6
    with pytest.raises(RequestError, match=r"allocation: similarity .* calibrate the model"):
        kp.make_plan(dense, given, kp.calibrate(dense, [TOKENS], recipe()))
    with pytest.raises(RequestError, match=r"removes 0\.9.* and similarity\.most_removed is 0\.8"):
        kp.make_plan(dense, recipe(0.1, allocation="similarity"), moments)


# ---- on the way ----


def test_what_an_interruption_leaves_can_be_saved(tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    model = tiny_model("llama")
    given = recipe(0.6)
    moments = kp.calibrate(model, [TOKENS], given)

    def stop(name: str, _: int, __: int) -> None:
        if name.endswith(".1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kp.compress_(model, kp.make_plan(model, given, moments), stop, moments=moments)
    plan = attached_plan(model)
    assert plan is not None
    assert {name.split(".")[2] for name in plan.layers} == {"0"}
    assert all(isinstance(layer, ReducedLayerPlan) for layer in plan.layers.values())
    assert Totals.of(model) == (plan.num_params, plan.flops_per_token)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_a_stage_behind_may_compress_what_is_left(tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    staged = kp.load_recipe(
        {
            **recipe(0.7).model_dump(mode="json", exclude={"stages", "healing"}),
            "stages": [
                {"share": 0},
                {
                    "share": 1,
                    "targets": "embedding",
                    "structure": "low_rank",
                    "weighting": {"metric": "none"},
                    "budget": {"kept_of_targets": 0.5},
                },
            ],
            "healing": {"max_steps": 1},
        }
    )
    planned = kp.make_plan(model.config, staged)
    plan = None
    for part in staged.parts:
        moments = kp.calibrate(model, [TOKENS], part) if part.weighting.metric != "none" else None
        plan = kp.make_plan(model, part, moments, before=plan)
        kp.compress_(model, plan, moments=moments)
    assert plan == planned
    assert Totals.of(model) == (plan.num_params, plan.flops_per_token)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    torch.testing.assert_close(logits(kp.to_dense(model)), logits(model))
    with pytest.raises(RequestError, match="was reduced by a stage before"):
        kp.make_plan(model, recipe(0.5), before=plan)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_it_is_healed_like_any_other(
    family: str,
    tiny_model: Callable[..., PreTrainedModel],
    save_tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    dense = tiny_model(family)
    model, _ = reduced(dense, recipe(0.4))
    loaded = load_model(str(save_tiny_checkpoint(model, tmp_path / "reduced"))).model
    healing = kp.load_recipe(
        {"healing": {"max_steps": 12, "sequences_per_step": 8, "sequence_length": 64, "learning_rate": 3e-3}}
        | {"structure": "low_rank", "budget": {"kept_of_targets": 0.5}}
    ).healing.model_copy(update={"distillation_weight": 1.0, "language_model_weight": 0.0})

    def divergence(student: PreTrainedModel) -> float:
        log_p, log_q = (logits(each).log_softmax(-1) for each in (dense, student))
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()

    before = divergence(loaded)
    kp.heal_(loaded, dense, TOKENS.flatten(), healing)
    assert divergence(loaded) < 0.8 * before
    save_checkpoint(loaded, None, tmp_path / "healed")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "healed")), logits(loaded))


def test_stock_transformers_refuses_it(
    tiny_model: Callable[..., PreTrainedModel], fresh_python: Callable[..., Any], tmp_path: Path
) -> None:
    model, _ = reduced(tiny_model("gpt2"), recipe(0.6))
    model.save_pretrained(tmp_path)
    load = "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    assert fresh_python("-c", load, str(tmp_path)).returncode != 0
    assert fresh_python("-c", f"import kronpress; {load}", str(tmp_path)).returncode == 0


@pytest.mark.parametrize("damage", ["missing", "misshapen", "pairs"])
def test_a_damaged_checkpoint_is_refused(
    damage: str, tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model, _ = reduced(tiny_model("llama"), recipe(0.6))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1." + ("self_attn.kept_pairs" if damage == "pairs" else "mlp.up_proj.weight")
    tensor = tensors.pop(name)
    if damage == "misshapen":
        tensors[name] = tensor[:-1].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(WorkError, match="damaged"):
        load_model(str(tmp_path))


# ---- what is refused ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weighting": {"metric": "none"}}, "set weighting.metric: input"),
        ({"allocation": "measured"}, "uniform or similarity"),
        ({"spec": {"rank": 3}}, "recipe field spec: there is none of structure reduced"),
        ({"rotation": True}, "rotation: "),
        ({"folding": ["mlp"]}, "folding: "),
        ({"weighting": {"metric": "input", "sequential": True}}, "weighting.sequential"),
        ({"structure": "low_rank", "allocation": "similarity"}, "for structure reduced"),
    ],
)
def test_recipes_that_contradict_themselves(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        recipe(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": {}}, "structure reduced needs a budget"),
        ({"budget": {"kept_of_targets": 0.001}}, "with one unit of each width they have"),
        ({"targets": [r".*\.c_fc"]}, r"h\.0\.mlp\.c_fc' .* without 'transformer\.h\.0\.mlp\.c_proj'"),
        ({"targets": "all"}, r"'transformer\.wte' of structure reduced is in no block"),
    ],
)
def test_plans_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        kp.make_plan(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50), recipe(**changes))


def test_some_blocks_and_some_widths_alone(tiny_model: Callable[..., PreTrainedModel]) -> None:
    dense = tiny_model("opt").double()
    model, plan = reduced(dense, recipe(0.5, targets=[r".*layers\.1\.self_attn\.(q|k)_proj", r".*layers\.0\.fc[12]"]))
    assert len(plan.layers) == 4
    assert [type(block.self_attn).__name__ for block in model.model.decoder.layers] == [
        "OPTAttention",
        "ReducedOPTAttention",
    ]
    close(logits(kp.to_dense(model)), logits(model))


def test_networks_of_no_known_family() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4))
    with pytest.raises(RequestError, match="reduced widths of a model of type None"):
        kp.make_plan(network, recipe(targets=["0", "1"]))


def test_the_recipe_plans_gpt2_by_measuring_it() -> None:
    named = kp.load_recipe("modegpt")
    assert (named.structure, named.allocation, named.targets) == ("reduced", "similarity", "blocks")
    with pytest.raises(RequestError, match="calibrate the model by this recipe first"):
        kp.make_plan(GPT2Config(), named)
    plan = kp.make_plan(GPT2Config(), kp.load_recipe("modegpt", ["allocation=uniform"]))
    assert 0.699 < plan.kept_of_targets <= 0.7


# ---- as one of the candidates of `auto` ----


def automatic(kept: float, candidates: list[str], **changes: Any) -> kp.Recipe:
    """`auto` with these candidates."""
    return kp.load_recipe(
        {
            "name": "tiny-auto",
            "targets": "blocks",
            "structure": "auto",
            "candidates": candidates,
            "allocation": "measured",
            "weighting": {"metric": "loss"},
            "calibration": {"held_out": 0},
            "budget": {"kept_of_targets": kept},
            **changes,
        }
    )


def by(given: kp.Recipe, dense: PreTrainedModel) -> tuple[PreTrainedModel, kp.Plan, dict[str, Any]]:
    model = copy.deepcopy(dense)
    moments = kp.calibrate(model, [TOKENS], given)
    plan = kp.make_plan(model, given, moments)
    return model, plan, kp.compress_(model, plan, moments=moments, batches=[TOKENS])


@every_family
@pytest.mark.parametrize("sequential", [False, True])
def test_auto_leaves_units_out_where_that_costs_the_least(
    family: str, sequential: bool, tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    dense = tiny_model(family)
    weighting = {"metric": "loss", "sequential": sequential}
    without = kp.make_plan(
        dense,
        automatic(0.4, ["low_rank"], weighting=weighting),
        kp.calibrate(dense, [TOKENS], automatic(0.4, ["low_rank"])),
    )
    model, plan, reports = by(automatic(0.4, ["low_rank", "reduced"], weighting=weighting), dense)
    assert plan.allocation is not None and without.allocation is not None
    assert plan.allocation.predicted_rise <= without.allocation.predicted_rise
    assert {layer.structure for layer in plan.layers.values()} == {"low_rank", "reduced"}
    assert list(reports) == list(plan.layers)
    for block in blocks_of(dense).values():
        kinds = {plan.layers[name].structure for name in block.members("units") if name in plan.layers}
        assert kinds == {"reduced"} or "reduced" not in kinds
    assert plan.kept_of_targets <= 0.4
    assert Totals.of(model) == (plan.num_params, plan.flops_per_token)
    assert kp.Plan.model_validate_json(plan.model_dump_json()) == plan
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    torch.testing.assert_close(logits(kp.to_dense(model)), logits(model), rtol=1e-4, atol=1e-4)


def test_the_predicted_rise_of_fewer_units_is_that_of_their_fit(tiny_model: Callable[..., PreTrainedModel]) -> None:
    dense = tiny_model("gpt2").double()
    given = automatic(0.5, ["low_rank", "reduced"], targets="mlp")
    moments = kp.calibrate(dense, [TOKENS], given)
    model, plan, _ = by(given, dense)
    fewer = [name for name, layer in plan.layers.items() if layer.structure == "reduced" and name.endswith("c_proj")]
    assert fewer
    for name in fewer:
        assert plan.allocation is not None
        seen, weight = moments[name], dense.get_submodule(name).weight.mT
        up = name.replace("c_proj", "c_fc")
        # The units that stay, by their own weights, and what the layer makes of them.
        rows, full = model.get_submodule(up).weight.mT, dense.get_submodule(up).weight.mT
        kept = torch.tensor([int((full == row).all(1).nonzero()[0]) for row in rows])
        nearest = torch.zeros_like(weight).index_copy(1, kept, model.get_submodule(name).weight.mT)
        rise = Metric(seen.second, seen.gradient).squared_norm(weight - nearest) / 2
        assert plan.layers[name].predicted_rise == pytest.approx(rise, rel=1e-3)


def test_in_turn_the_units_make_up_for_what_the_layers_before_have_lost(
    tiny_model: Callable[..., PreTrainedModel],
) -> None:
    dense = tiny_model("gpt2", n_layer=3)
    lost = {}
    for sequential in (False, True):
        given = automatic(0.3, ["low_rank", "reduced"], weighting={"metric": "loss", "sequential": sequential})
        model, plan, _ = by(given, dense)
        assert any(layer.structure == "reduced" for layer in plan.layers.values())
        lost[sequential] = (model.transformer(TOKENS)[0] - dense.transformer(TOKENS)[0]).square().mean().item()
    assert lost[True] < lost[False]


def test_where_the_blocks_are_not_known_auto_does_without(tiny_model: Callable[..., PreTrainedModel]) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16))
    given = automatic(0.5, ["low_rank", "reduced"], targets=["0", "2"], weighting={"metric": "input"})
    batches = [{"input": torch.randn(64, 16, generator=torch.Generator().manual_seed(0))}]
    plan = kp.make_plan(network, given, kp.calibrate(network, batches, given))
    assert {layer.structure for layer in plan.layers.values()} == {"low_rank"}
    # Half of an MLP is none whose units could be left out.
    half = automatic(0.5, ["low_rank", "reduced"], targets=[r".*mlp\.c_fc"])
    model = tiny_model("gpt2")
    plan = kp.make_plan(model, half, kp.calibrate(model, [TOKENS], half))
    assert {layer.structure for layer in plan.layers.values()} == {"low_rank"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": ["reduced"]}, "give a structure for single matrices"),
        ({"candidates": ["low_rank", "redced"]}, "unknown structure 'redced'"),
        ({"candidates": ["low_rank", "reduced"], "rotation": True, "head": "dense"}, "rotation: the fits of reduced"),
    ],
)
def test_candidates_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        automatic(0.5, **changes)
