"""Every known family: its roles name all linear layers of a block, and planned totals are those of the real model."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from kronpress import Recipe, RequestError, compress_, make_plan
from kronpress.families import ATTENTION_ROLES, FAMILIES, GEOMETRIES, MLP_ROLES, TARGETS, target_patterns
from kronpress.planning import meta_model
from kronpress.surgery import embeddings, linear_layers, structured_layers, weight_shape

WIDTH, INNER, VOCAB, NUM_BLOCKS = 24, 40, 60, 2
# Four heads of 6, or of 8 where the head size is free, so that no two roles of attention share a shape by chance.
HEADS, KEY_VALUE_HEADS = 4, 2
QUERY, KEY = HEADS * 8, KEY_VALUE_HEADS * 8

GPT2_SIZES = {"n_embd": WIDTH, "n_inner": INNER, "n_layer": NUM_BLOCKS, "n_head": HEADS, "n_positions": 16}
OPT_SIZES = {"hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "ffn_dim": INNER, "num_hidden_layers": NUM_BLOCKS}
LLAMA_SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "head_dim": 8,
}
COMMON = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", **GPT2_SIZES},
    "opt": {"model_type": "opt", **OPT_SIZES, "num_attention_heads": HEADS, "max_position_embeddings": 16},
    "llama": {"model_type": "llama", **LLAMA_SIZES, "tie_word_embeddings": False},
    "llama-tied": {"model_type": "llama", **LLAMA_SIZES, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", **LLAMA_SIZES},
    "qwen2": {"model_type": "qwen2", **LLAMA_SIZES},
    "qwen3": {"model_type": "qwen3", **LLAMA_SIZES},
    "gemma": {"model_type": "gemma", **LLAMA_SIZES},
    "phi3": {"model_type": "phi3", **LLAMA_SIZES},
}
SEPARATE_ATTENTION = {"query": (QUERY, WIDTH), "key": (KEY, WIDTH), "value": (KEY, WIDTH), "output": (WIDTH, QUERY)}
GATED_MLP = {"gate": (INNER, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER)}
GPT2_SHAPES = {"qkv": (3 * WIDTH, WIDTH), "output": (WIDTH, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER)}
SHAPES = {
    **dict.fromkeys(FAMILIES, SEPARATE_ATTENTION | GATED_MLP),
    "gpt2": GPT2_SHAPES,
    "opt": {
        **dict.fromkeys(("query", "key", "value", "output"), (WIDTH, WIDTH)),
        "up": (INNER, WIDTH),
        "down": (WIDTH, INNER),
    },
    "phi3": {
        "qkv": (QUERY + 2 * KEY, WIDTH),
        "output": (WIDTH, QUERY),
        "gate_up": (2 * INNER, WIDTH),
        "down": (WIDTH, INNER),
    },
}

every_model = pytest.mark.parametrize("name", MODELS)


def tiny_config(name: str) -> PreTrainedConfig:
    fields = dict(MODELS[name])
    return AutoConfig.for_model(fields.pop("model_type"), **COMMON, **fields)


def tiny_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(name)).eval()


def num_params(model: nn.Module) -> int:
    """Counted by storage, so that a tied weight counts once."""
    return sum({p.data_ptr(): p.numel() for p in model.parameters()}.values())


def targeted(name: str, target: str) -> set[str]:
    model = meta_model(tiny_config(name))
    layers = {**linear_layers(model), **embeddings(model)}
    patterns = target_patterns(target, MODELS[name]["model_type"])
    return {layer for layer in layers if any(re.fullmatch(pattern, layer) for pattern in patterns)}


def test_every_family_is_tried() -> None:
    assert {fields["model_type"] for fields in MODELS.values()} == set(FAMILIES)


@every_model
def test_every_role_is_a_linear_layer_of_its_shape_in_every_block(name: str) -> None:
    model_type = MODELS[name]["model_type"]
    family, layers = FAMILIES[model_type], linear_layers(meta_model(tiny_config(name)))
    assert set(family.roles) <= {*ATTENTION_ROLES, *MLP_ROLES}
    for block in range(NUM_BLOCKS):
        found = {role: weight_shape(layers[f"{family.blocks}.{block}.{layer}"]) for role, layer in family.roles.items()}
        assert found == SHAPES[model_type]


@every_model
def test_blocks_are_all_linear_layers_but_the_head_and_attention_and_mlp_divide_them(name: str) -> None:
    everything = set(linear_layers(meta_model(tiny_config(name))))
    attention, mlp = targeted(name, "attention"), targeted(name, "mlp")
    assert targeted(name, "blocks") == everything - {"lm_head"} == attention | mlp
    assert not attention & mlp
    roles = FAMILIES[MODELS[name]["model_type"]].roles
    assert len(mlp) == NUM_BLOCKS * len([role for role in roles if role in MLP_ROLES])
    assert all(("mlp" in layer or "fc" in layer) and "attn" not in layer for layer in mlp)
    assert all("attn" in layer and "mlp" not in layer for layer in attention)


@every_model
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("structure", "spec"),
    [("low_rank", {}), ("kronecker", {"right_shape": [1, 2], "num_terms": 1})],
    ids=["low_rank", "kronecker"],
)
def test_planned_totals_are_the_real_ones(name: str, target: str, structure: str, spec: dict[str, Any]) -> None:
    model = tiny_model(name)
    budget = {} if spec else {"kept_of_targets": 0.5}
    recipe = Recipe(targets=target, structure=structure, spec=spec, budget=budget)
    if not set(embeddings(model)) and target in ("embedding", "all"):
        with pytest.raises(RequestError, match="does more than look up rows"):
            make_plan(model, recipe)
        return
    plan = make_plan(tiny_config(name), recipe)
    assert plan == make_plan(model, recipe)
    assert plan.num_params_dense == num_params(model)
    assert set(plan.layers) == targeted(name, target)
    compress_(model, plan)
    assert plan.num_params == num_params(model)
    heads = {head for layer in plan.layers.values() for head in layer.heads}
    assert set(structured_layers(model)) == set(plan.layers) | heads
    assert heads == ({"lm_head"} if target in ("embedding", "all") and model.config.tie_word_embeddings else set())
    factors = {id(each): each for layer in structured_layers(model).values() for each in layer.factors.values()}
    assert plan.num_params_targets == sum(factor.numel() for factor in factors.values())
    assert model(torch.arange(6)[None]).logits.isfinite().all()


@every_model
def test_down_projections_take_the_mirrored_factors(name: str) -> None:
    family = FAMILIES[MODELS[name]["model_type"]]
    recipe = Recipe(targets="mlp", spec={"right_shape": [4, 2], "num_terms": 1})
    for layer, planned in make_plan(tiny_config(name), recipe).layers.items():
        is_down = layer.endswith(family.roles["down"])
        assert planned.spec.right_shape == ((2, 4) if is_down else (4, 2))


@every_model
def test_a_tied_head_is_refused_and_an_untied_one_compressed(name: str) -> None:
    model = tiny_model(name)
    recipe = Recipe(targets="lm_head", spec={"right_shape": [2, 1], "num_terms": 1})
    if model.lm_head.weight is model.get_input_embeddings().weight:
        for source in (model, tiny_config(name)):
            with pytest.raises(RequestError, match=r"'lm_head' shares its weight"):
                make_plan(source, recipe)
    else:
        plan = make_plan(model, recipe)
        compress_(model, plan)
        assert plan.num_params == num_params(model)


def test_both_kinds_of_head_are_tried() -> None:
    tied = [name for name in MODELS if tiny_config(name).tie_word_embeddings]
    assert {"gpt2", "llama-tied", "gemma"} <= set(tied) < set(MODELS)


def test_a_named_target_of_an_unknown_family_is_refused_with_the_known_ones() -> None:
    with pytest.raises(RequestError, match=r"'mlp' for a model of type 'bert'.*gpt2.*phi3.*regular expressions"):
        target_patterns("mlp", "bert")
    with pytest.raises(RequestError, match=r"'blocks' for a model of type None"):
        make_plan(nn.Sequential(nn.Linear(4, 4)), Recipe(targets="blocks", spec={"num_terms": 1}))


def test_targets_mix_names_and_expressions_and_escape_the_dots_of_names() -> None:
    patterns = target_patterns(["attention", r"lm_\w+"], "gpt2")
    assert patterns[-1] == r"lm_\w+"
    assert len(patterns) == 3

    def matched(layer: str) -> bool:
        return any(re.fullmatch(pattern, layer) for pattern in patterns)

    assert matched("transformer.h.11.attn.c_attn")
    for other in ("transformerxh.0.attn.c_attn", "transformer.h.0.attnxc_attn", "transformer.h.x.attn.c_attn"):
        assert not matched(other)
    with pytest.raises(RequestError, match=r"'\(c_fc' is not a regular expression"):
        target_patterns("(c_fc", "gpt2")


GEOMETRY_TOTALS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "distilgpt2": 81_912_576,
    "opt-125m": 125_239_296,
    "opt-1.3b": 1_315_758_080,
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b": 7_241_732_096,
    "qwen2-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "gemma-2b": 2_506_172_416,
    "phi-3-mini": 3_821_079_552,
}


def test_every_geometry_has_a_known_total_and_family() -> None:
    assert set(GEOMETRIES) == set(GEOMETRY_TOTALS)
    assert {fields["model_type"] for fields in GEOMETRIES.values()} <= set(FAMILIES)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries_have_the_published_number_of_parameters(name: str) -> None:
    fields = dict(GEOMETRIES[name])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    assert sum(parameter.numel() for parameter in meta_model(config).parameters()) == GEOMETRY_TOTALS[name]
