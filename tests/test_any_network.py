"""Encoders and image models, from a configuration: calibrated on dictionaries, compressed, saved and loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    PreTrainedModel,
    ViTConfig,
)

import kronpress as kp
from kronpress.planning import plan_stages

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_labels": 5,
    "initializer_range": 0.3,
}
BERT = BertConfig(vocab_size=64, max_position_embeddings=16, **SIZES)
VIT = ViTConfig(image_size=8, patch_size=4, **SIZES)
NETWORKS: dict[str, tuple[Any, Any]] = {
    "BERT that fills gaps": (AutoModelForMaskedLM, BERT),
    "BERT that classifies": (AutoModelForSequenceClassification, BERT),
    "BERT without a head": (AutoModel, BERT),
    "ViT that classifies": (AutoModelForImageClassification, VIT),
    "ViT without a head": (AutoModel, VIT),
}
BLOCKS = r".*layers?\.\d+\..*"
TABLE = r".*word_embeddings"
SPECS: dict[str, dict[str, Any]] = {
    "low_rank": {"budget": {"kept_of_targets": 0.5}},
    "kronecker": {"spec": {"right_shape": [2, 4], "num_terms": 3}},
    "permuted_kronecker": {"spec": {"right_shape": [2, 4], "num_terms": 3}},
}
every_network = pytest.mark.parametrize("network", NETWORKS)


@pytest.fixture
def build() -> Callable[[str], PreTrainedModel]:
    """Name of a network -> a new one in evaluation mode; equal names, equal weights."""

    def make(network: str) -> PreTrainedModel:
        auto, config = NETWORKS[network]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = auto.from_config(copy.deepcopy(config)).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.1 * torch.randn_like(parameter)
        return model

    return make


def batches_for(model: PreTrainedModel, size: int = 6, number: int = 3) -> list[dict[str, Tensor]]:
    """What the model's own preparation gives: pictures, or token ids and a mask, each batch with padding."""
    generator = torch.Generator().manual_seed(1)
    if model.config.model_type == "vit":
        return [{"pixel_values": torch.randn(size, 3, 8, 8, generator=generator)} for _ in range(number)]
    mask = torch.ones(size, 12, dtype=torch.long)
    mask[0, 7:] = 0
    return [
        {
            "input_ids": torch.randint(64, (size, 12), generator=generator),
            "attention_mask": mask,
            "token_type_ids": torch.zeros(size, 12, dtype=torch.long),
        }
        for _ in range(number)
    ]


def outputs(model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    with torch.no_grad():
        return [model(**batch)[0] for batch in batches]


@every_network
@pytest.mark.parametrize("structure", SPECS)
def test_it_is_calibrated_compressed_saved_and_loaded(
    build: Callable[[str], PreTrainedModel], network: str, structure: str, tmp_path: Path
) -> None:
    model, auto = build(network), NETWORKS[network][0]
    batches = batches_for(model)
    recipe = kp.load_recipe(
        {
            "targets": [BLOCKS],
            "structure": structure,
            "weighting": {"metric": "input", "bias_correction": True},
            **SPECS[structure],
        }
    )
    moments = kp.calibrate(model, batches, recipe)
    plan = kp.make_plan(model, recipe, moments=moments)
    assert len(plan.layers) == 12
    report = kp.compress_(model, plan, moments=moments)
    assert set(report) == set(plan.layers)
    assert all(0 < layer.relative_output_error < 1 for layer in report.values())
    assert sum(parameter.numel() for parameter in model.parameters()) == plan.num_params
    expected = outputs(model, batches)

    model.save_pretrained(tmp_path / "small")
    loaded = auto.from_pretrained(tmp_path / "small").eval()
    for found, wanted in zip(outputs(loaded, batches), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)

    kp.to_dense(loaded).save_pretrained(tmp_path / "dense")
    dense = auto.from_pretrained(tmp_path / "dense").eval()
    for found, wanted in zip(outputs(dense, batches), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("network", [name for name in NETWORKS if name.startswith("BERT")])
def test_its_table_of_tokens_is_compressed_with_the_head_that_is_tied_to_it(
    build: Callable[[str], PreTrainedModel], network: str, tmp_path: Path
) -> None:
    model, auto = build(network), NETWORKS[network][0]
    batches = batches_for(model)
    recipe = kp.load_recipe(
        {
            "targets": [TABLE],
            "structure": "low_rank",
            "budget": {"kept_of_targets": 0.5},
            "weighting": {"metric": "input"},
        }
    )
    plan = kp.make_plan(model, recipe)
    (layer,) = plan.layers.values()
    assert len(layer.heads) == (network == "BERT that fills gaps")
    kp.compress_(model, plan, moments=kp.calibrate(model, batches, recipe))
    expected = outputs(model, batches)
    model.save_pretrained(tmp_path)
    for found, wanted in zip(outputs(auto.from_pretrained(tmp_path).eval(), batches), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_what_a_mask_hides_is_not_measured(build: Callable[[str], PreTrainedModel]) -> None:
    model = build("BERT that classifies")
    recipe = kp.load_recipe({"targets": [BLOCKS], "calibration": {"held_out": 0}, "weighting": {"metric": "input"}})
    (padded,) = batches_for(model, size=1, number=1)
    alone = {name: value[:, :7] for name, value in padded.items()}
    found, wanted = kp.calibrate(model, [padded], recipe), kp.calibrate(model, [alone], recipe)
    for name in wanted:
        torch.testing.assert_close(found[name].second, wanted[name].second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("network", "metric"),
    [("BERT that fills gaps", "loss"), ("BERT that classifies", "input"), ("ViT that classifies", "input")],
)
def test_an_allocation_is_measured(build: Callable[[str], PreTrainedModel], network: str, metric: str) -> None:
    model = build(network)
    recipe = kp.load_recipe(
        {
            "targets": [BLOCKS],
            "structure": "auto",
            "allocation": "measured",
            "budget": {"kept_of_targets": 0.5},
            "weighting": {"metric": metric},
        }
    )
    batches = batches_for(model)
    moments = kp.calibrate(model, batches, recipe)
    plan = kp.make_plan(model, recipe, moments=moments)
    assert plan.num_params_targets <= plan.num_params_targets_dense / 2
    assert plan.allocation is not None
    assert plan.allocation.predicted_rise > 0
    kp.compress_(model, plan, moments=moments)
    assert all(output.isfinite().all() for output in outputs(model, batches))


@pytest.mark.parametrize("network", ["ViT that classifies", "ViT without a head"])
def test_a_loss_that_is_not_of_tokens_is_refused(network: str, build: Callable[[str], PreTrainedModel]) -> None:
    model = build(network)
    fields = {"targets": [BLOCKS], "structure": "low_rank", "budget": {"kept_of_targets": 0.5}}
    recipe = kp.load_recipe({**fields, "weighting": {"metric": "loss"}})
    moments = kp.calibrate(model, batches_for(model), recipe)
    with pytest.raises(kp.RequestError, match="calibrate a model that predicts tokens"):
        kp.compress_(model, kp.make_plan(model, recipe), moments=moments)


@every_network
def test_stages_are_planned_on_a_model_of_its_own_class(build: Callable[[str], PreTrainedModel], network: str) -> None:
    model = build(network)
    recipe = kp.load_recipe(
        {
            "structure": "low_rank",
            "budget": {"kept_of_targets": 0.5},
            "stages": [
                {"share": 0.5, "targets": [r".*layers?\.0\..*"]},
                {"share": 0.5, "targets": [r".*layers?\.1\..*"]},
            ],
        }
    )
    first, second = plan_stages(model, recipe)
    assert [len(plan.layers) for plan in (first, second)] == [6, 12]
    assert set(second.layers) <= {name for name, _ in model.named_modules()}


def test_a_configuration_without_a_causal_language_model_is_refused() -> None:
    with pytest.raises(kp.RequestError, match="ViTConfig is not the configuration of a causal language model"):
        kp.make_plan(VIT, kp.load_recipe("low-rank"))
