"""The metric of an embedding's table: what the loss feels of it, each kind by hand, and blocks fitted behind it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples.matrices import normal
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

import kronpress as kp
from kronpress.compression import SEQUENTIAL_RIDGE
from kronpress.matrices import LowRank
from kronpress.matrices.metric import Metric
from kronpress.matrices.moments import InputMoments
from kronpress.pipeline import run
from kronpress.recipe import Weighting
from kronpress.surgery import dense_weight
from kronpress.weighting import layer_metric

IDS = torch.randint(300, (12, 24), generator=torch.Generator().manual_seed(3))
TABLES = {"gpt2": "transformer.wte", "opt": "model.decoder.embed_tokens", "llama": "model.embed_tokens"}
seeds = st.integers(0, 2**31)
laws = settings(max_examples=20, deadline=None)


def recipe(**changes: Any) -> kp.Recipe:
    low_rank = {"structure": "low_rank", "spec": {"rank": 4}}
    return kp.load_recipe({"targets": "embedding", "calibration": {"held_out": 0.0}, **low_rank, **changes})


def weighted(metric: str, **changes: Any) -> kp.Recipe:
    return recipe(weighting={"metric": metric}, **changes)


def metric_of(table: Tensor, moments: InputMoments, metric: str) -> Metric:
    return layer_metric(nn.Embedding(*table.shape), table, moments, Weighting(metric=metric))


def read_by(model: nn.Module, name: str) -> Tensor:
    """The rows (tokens, features) that the layer reads."""
    found: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))
    with torch.no_grad():
        model.eval()(input_ids=IDS)
    hook.remove()
    return found[0].flatten(0, 1).double()


def counts_of(tokens: Tensor, vocabulary: int) -> Tensor:
    return torch.tensor(
        [sum(token == row for token in tokens.flatten().tolist()) for row in range(vocabulary)]
    ).double()


# ---- what the metric is ----


@given(seed=seeds, vocabulary=st.integers(2, 7), width=st.integers(1, 4), num_tokens=st.integers(1, 9))
@laws
def test_it_is_the_mean_over_all_pairs_of_a_looked_up_row_and_a_gradient_or_an_input_of_the_head(
    seed: int, vocabulary: int, width: int, num_tokens: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (num_tokens,), generator=generator)
    g, h, change = (
        normal(seed, num_tokens, width),
        normal(seed + 1, num_tokens, width),
        normal(seed + 2, vocabulary, width),
    )
    moments = InputMoments(
        h.mT @ h / num_tokens,
        h.mean(0),
        num_tokens,
        g.mT @ g / num_tokens,
        magnitude=h.abs().mean(0),
        counts=counts_of(tokens, vocabulary),
    )
    looked_up = [*tokens.tolist(), *range(vocabulary)]  # every row once more

    def mean_square(directions: Tensor) -> float:
        products = [float(change[row] @ direction) ** 2 for row in looked_up for direction in directions]
        return sum(products) / len(products)

    for metric, expected in (
        ("loss", mean_square(g) + mean_square(h)),
        ("input", mean_square(h)),
        ("magnitude", mean_square(h)),
    ):
        found = metric_of(change, moments, metric).squared_norm(change)
        assert found == pytest.approx(expected, rel=1e-9), metric


@given(seed=seeds, vocabulary=st.integers(2, 6), width=st.integers(1, 4))
@laws
def test_half_of_it_is_what_the_loss_rises_by_to_second_order(seed: int, vocabulary: int, width: int) -> None:
    """Of a model that looks a row up and puts it through a head of its own.

    All rows are equal, so that the gradient does not depend on the row: then the metric's independence is exact.
    """
    head, change = normal(seed, 5, width), normal(seed + 1, vocabulary, width)
    table = normal(seed + 2, width).expand(vocabulary, width)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (9,), generator=generator)
    p = (table[0] @ head.mT).softmax(0)
    gradients = p - torch.eye(5, dtype=torch.float64)  # by the logits, for each label
    fisher = sum(p[label] * torch.outer(gradients[label] @ head, gradients[label] @ head) for label in range(5))
    zeros = torch.zeros(width, width, dtype=torch.float64)
    moments = InputMoments(zeros, zeros[0], 9, fisher, counts=counts_of(tokens, vocabulary))
    looked_up = torch.cat([tokens, torch.arange(vocabulary)])

    def rise(step: float) -> float:
        log_p, log_q = ((each[looked_up] @ head.mT).log_softmax(-1) for each in (table, table + step * change))
        return functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean").item()

    step = 1e-3
    second_order = (rise(step) + rise(-step)) / step**2  # less the first order, and half of the second twice
    found = metric_of(table, moments, "loss").squared_norm(change)
    assert second_order == pytest.approx(found, rel=1e-3, abs=1e-6)


@given(seed=seeds)
@laws
def test_without_a_head_rows_count_as_often_as_they_are_seen_and_columns_alike(seed: int) -> None:
    change, counts = normal(seed, 6, 3), torch.tensor([0.0, 4, 1, 0, 9, 2], dtype=torch.float64)
    zeros = torch.zeros(3, 3, dtype=torch.float64)
    moments = InputMoments(zeros, zeros[0], 16, counts=counts)
    expected = sum(float(counts[row] + 1) / 22 * float(change[row] @ change[row]) for row in range(6))
    for metric in ("input", "magnitude"):
        assert metric_of(change, moments, metric).squared_norm(change) == pytest.approx(expected)


def test_the_loss_needs_gradients_of_an_embedding_too(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model, wanted = tiny_model("gpt2"), weighted("loss")
    unfelt = kp.calibrate(model, [IDS], weighted("input", calibration={"sensitivity": False, "held_out": 0.0}))
    with pytest.raises(kp.RequestError, match=r"transformer\.wte: the metric `loss` needs the loss's gradients"):
        kp.compress_(model, kp.make_plan(model, wanted), moments=unfelt)


# ---- fits in it ----


@pytest.mark.parametrize("family", TABLES)
@pytest.mark.parametrize("metric", ["magnitude", "input", "loss"])
def test_the_table_is_the_nearest_in_the_metric_of_its_moments(tiny_model: Any, family: str, metric: str) -> None:
    model, name, wanted = tiny_model(family), TABLES[family], weighted(metric)
    moments = kp.calibrate(model, [IDS], wanted)
    table = dense_weight(model.get_submodule(name)).clone()
    found = moments[name]
    assert found.counts is not None
    torch.testing.assert_close(found.counts, counts_of(IDS, 300))
    frequencies = (found.counts + 1) / (found.counts + 1).sum()
    width = {"loss": lambda: found.gradient + found.second, "input": lambda: found.second}
    inner = width.get(metric, width["input"])()
    inner = inner if inner.any() else torch.eye(16).double()
    root = torch.linalg.cholesky(inner + 1e-12 * inner.trace() * torch.eye(16).double())
    rows = frequencies.sqrt()[:, None]
    u, s, v = torch.linalg.svd(rows * table.double() @ root, full_matrices=False)
    nearest = torch.linalg.solve((root).mT, ((u[:, :4] * s[:4]) @ v[:4] / rows).mT).mT
    plan = kp.make_plan(model, wanted)
    (report,) = kp.compress_(model, plan, moments=moments).values()
    torch.testing.assert_close(model.get_submodule(name).to_dense().detach(), nearest.float(), rtol=1e-3, atol=1e-3)
    error = (rows * (table.double() - nearest) @ root).norm() / (rows * table.double() @ root).norm()
    assert report.relative_output_error == pytest.approx(error.item(), rel=1e-3)


def test_a_head_that_keeps_the_dense_table_does_not_weigh_the_fit(tiny_model: Any) -> None:
    model, wanted = tiny_model("gpt2"), weighted("input", head="dense")
    moments = kp.calibrate(model, [IDS], wanted)
    table = dense_weight(model.transformer.wte).clone()
    plan = kp.make_plan(model, wanted)
    assert plan.layers["transformer.wte"].heads == []
    kp.compress_(model, plan, moments=moments)
    counts = moments["transformer.wte"].counts
    assert counts is not None
    alone = Metric(None, (counts + 1) / (counts + 1).sum())
    nearest = LowRank.expand(LowRank.fit(table, LowRank.Spec(rank=4), alone))
    torch.testing.assert_close(model.transformer.wte.to_dense().detach(), nearest, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", TABLES)
@pytest.mark.parametrize("metric", ["input", "loss"])
def test_blocks_behind_an_embedding_are_fitted_to_what_the_compressed_one_gives(
    tiny_model: Any, family: str, metric: str
) -> None:
    model = tiny_model(family).double()
    weighting = {"metric": metric, "sequential": True}
    first = {
        "gpt2": "transformer.h.0.attn.c_attn",
        "opt": "model.decoder.layers.0.self_attn.q_proj",
        "llama": "model.layers.0.self_attn.q_proj",
    }[family]
    wanted = recipe(targets=["embedding", first.replace(".", r"\.")], weighting=weighting)
    moments = kp.calibrate(model, [IDS], wanted)
    student = copy.deepcopy(model)
    kp.compress_(student, kp.make_plan(model, wanted), moments=moments, batches=[IDS[:5], IDS[5:]])
    # The same with the embedding alone replaced.
    behind = copy.deepcopy(model)
    kp.compress_(behind, kp.make_plan(model, weighted(metric)), moments=moments)
    torch.testing.assert_close(
        student.get_submodule(TABLES[family]).to_dense(), behind.get_submodule(TABLES[family]).to_dense()
    )
    x, x_now = read_by(model, first), read_by(behind, first)
    assert not torch.allclose(x, x_now, rtol=0.01, atol=0.01)
    w = dense_weight(model.get_submodule(first))
    second, cross = x_now.mT @ x_now / len(x), x.mT @ x_now / len(x)
    ridge = SEQUENTIAL_RIDGE * second.trace() / 16 * torch.eye(16, dtype=torch.float64)
    target = w + w @ (cross - second) @ torch.linalg.inv(second + ridge)
    near = Metric(second, moments[first].gradient if metric == "loss" else None)
    fitted = LowRank.expand(LowRank.fit(target, LowRank.Spec(rank=4), near))
    found = student.get_submodule(first).to_dense().detach()
    torch.testing.assert_close(found, fitted, rtol=1e-3, atol=1e-4)
    plain = LowRank.expand(LowRank.fit(w, LowRank.Spec(rank=4), Metric(moments[first].second, near.output)))
    assert not torch.allclose(found, plain, rtol=1e-2, atol=1e-2)


def test_a_head_that_no_block_holds_is_refused_in_turn_before_anything_is_replaced(tiny_model: Any) -> None:
    model = tiny_model("llama")
    wanted = recipe(targets=["mlp", "lm_head"], weighting={"metric": "input", "sequential": True})
    moments = kp.calibrate(model, [IDS], wanted)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(kp.RequestError, match="'lm_head' is in no transformer block"):
        kp.compress_(model, kp.make_plan(model, wanted), moments=moments, batches=[IDS])
    assert model.state_dict().keys() == before.keys()
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


# ---- a whole run ----


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_auto_on_all_plans_compresses_heals_and_saves(
    tiny_model: Any, save_tiny_checkpoint: Any, tiny_text: str, tmp_path: Path, family: str
) -> None:
    save_tiny_checkpoint(tiny_model(family), tmp_path / "dense")
    (tmp_path / "text.txt").write_text(tiny_text, encoding="utf-8")
    data = str(tmp_path / "text.txt")
    changes = ["targets=all", f"model={tmp_path / 'dense'}", "budget.kept_of_targets=0.4", "calibration.windows=8"]
    changes += ["calibration.sequence_length=16", f"calibration.data={data}", f"healing.data={data}"]
    changes += ["healing.max_steps=4", "healing.sequences_per_step=2", "healing.sequences_per_pass=2"]
    changes += ["healing.sequence_length=16", "healing.warmup_steps=0", "healing.learning_rate=1e-3"]
    results = run(kp.load_recipe("auto", [*changes, f"evaluation.data={data}"]), tmp_path / "run")
    plan = kp.Plan.model_validate(results["plan"])
    assert plan.kept_of_targets <= 0.4
    layers = {*plan.layers, *plan.allocation.kept_dense}
    assert TABLES[family] in layers and len(layers) == 1 + 2 * (4 if family == "gpt2" else 7)
    table = plan.layers[TABLES[family]]
    assert table.is_embedding and table.heads == (["lm_head"] if family == "gpt2" else [])
    stages = [row["stage"] for row in results["rows"]]
    assert stages == ["dense", "compressed", "healed"]
    nats = [next(iter(row["metrics"].values()))["nll_mean_nats"] for row in results["rows"]]
    assert nats[2] < nats[1]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert sum({p.data_ptr(): p.numel() for p in loaded.parameters()}.values()) == plan.num_params
    if family == "gpt2":
        assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
