"""Tiny networks of every known family, with random weights and without a parameter that is 0 or 1 as it starts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import kronpress as kp
from kronpress.surgery import dense_weight

WIDTH = 16
VOCABULARY = 64
_LIKE_LLAMA = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 32},
    "opt": {
        "hidden_size": WIDTH,
        "word_embed_proj_dim": WIDTH,
        "ffn_dim": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
    },
    "llama": {**_LIKE_LLAMA, "tie_word_embeddings": False},
    "mistral": {**_LIKE_LLAMA, "tie_word_embeddings": True},
    "qwen2": {**_LIKE_LLAMA, "tie_word_embeddings": True},
    "qwen3": {**_LIKE_LLAMA, "tie_word_embeddings": False, "head_dim": 6},
    "gemma": {**_LIKE_LLAMA, "head_dim": 6},
    "phi3": {**_LIKE_LLAMA, "tie_word_embeddings": False},
}


def network(family: str, dtype: torch.dtype = torch.float64, make: Any = AutoModelForCausalLM, **changes: Any) -> Any:
    """A model of two blocks; equal arguments, equal weights. `make` is the class that makes it of a configuration."""
    common = {
        "vocab_size": VOCABULARY,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
        "attn_implementation": "eager",
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make.from_config(AutoConfig.for_model(family, **{**common, **CONFIGS[family], **changes})).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
    return model.to(dtype)


def some_tokens(sequences: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(VOCABULARY, (sequences, length), generator=generator)


def plant_products_(model: nn.Module, plan: kp.Plan, generator: torch.Generator) -> None:
    """Make every planned weight an exact Kronecker product of its planned sizes, as large as it was."""
    for name, layer in plan.layers.items():
        weight = dense_weight(model.get_submodule(name))
        left, right = (
            torch.randn(*shape, generator=generator, dtype=torch.float64)
            for shape in (layer.spec.left_shape, layer.spec.right_shape)
        )
        planted = torch.kron(left, right)
        weight.copy_(planted * weight.norm() / planted.norm())


def count_numbers(model: nn.Module) -> int:
    """Numbers in distinct storage."""
    return sum({parameter.data_ptr(): parameter.numel() for parameter in model.parameters()}.values())
