"""Model families as data: what the linear layers of a transformer block are called, and known geometries.

Every family here is a Hugging Face `model_type`. A model of another type is compressed by giving regular
expressions over its module names as targets.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kronpress.errors import RequestError

MLP_ROLES = ("gate", "up", "gate_up", "down")
ATTENTION_ROLES = ("query", "key", "value", "qkv", "output")
# Roles whose layers read one and the same input.
SAME_INPUT = (("query", "key", "value"), ("gate", "up"))
EMBEDDING = "embedding"
TARGETS = {
    "mlp": MLP_ROLES,
    "attention": ATTENTION_ROLES,
    "blocks": ATTENTION_ROLES + MLP_ROLES,
    EMBEDDING: (EMBEDDING,),
    "all": (EMBEDDING, *ATTENTION_ROLES, *MLP_ROLES),
}


@dataclass(frozen=True)
class Family:
    """`blocks` holds the transformer blocks by number; `roles` gives each linear layer's name inside a block.

    `embedding` is that of the tokens. With `is_rotary` positions are put into queries and keys, by rotations of their
    channels in pairs (i, i + d/2).
    """

    blocks: str
    roles: dict[str, str]
    embedding: str = "model.embed_tokens"
    is_rotary: bool = False


_LLAMA = Family(
    blocks="model.layers",
    roles={
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "output": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    },
    is_rotary=True,
)

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        blocks="transformer.h",
        roles={"qkv": "attn.c_attn", "output": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"},
        embedding="transformer.wte",
    ),
    "opt": Family(
        blocks="model.decoder.layers",
        roles={
            "query": "self_attn.q_proj",
            "key": "self_attn.k_proj",
            "value": "self_attn.v_proj",
            "output": "self_attn.out_proj",
            "up": "fc1",
            "down": "fc2",
        },
        embedding="model.decoder.embed_tokens",
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "phi3": Family(
        blocks="model.layers",
        roles={
            "qkv": "self_attn.qkv_proj",
            "output": "self_attn.o_proj",
            "gate_up": "mlp.gate_up_proj",
            "down": "mlp.down_proj",
        },
        is_rotary=True,
    ),
}


def target_patterns(targets: str | list[str], model_type: str | None) -> list[str]:
    """One regular expression, to match whole module names, for each role or expression in `targets`.

    >>> target_patterns("mlp", "gpt2")
    ['transformer\\\\.h\\\\.\\\\d+\\\\.mlp\\\\.c_fc', 'transformer\\\\.h\\\\.\\\\d+\\\\.mlp\\\\.c_proj']
    >>> target_patterns([r"encoder\\..*\\.dense"], None)
    ['encoder\\\\..*\\\\.dense']

    Raises:
        RequestError: a named target (one of TARGETS) for an unknown family, or an expression
            that is not valid.
    """
    if not targets:
        raise RequestError(f"targets is empty: give {', '.join(TARGETS)}, or regular expressions over module names")
    patterns = []
    for target in [targets] if isinstance(targets, str) else targets:
        if target in TARGETS:
            if model_type not in FAMILIES:
                raise RequestError(
                    f"target {target!r} for a model of type {model_type!r}: known types are {', '.join(FAMILIES)}; "
                    "for any other model give regular expressions over its module names"
                )
            family = FAMILIES[model_type]
            if EMBEDDING in TARGETS[target]:
                patterns.append(re.escape(family.embedding))
            patterns += [
                rf"{re.escape(family.blocks)}\.\d+\.{re.escape(name)}"
                for role, name in family.roles.items()
                if role in TARGETS[target]
            ]
        else:
            try:
                re.compile(target)
            except re.error as error:
                raise RequestError(f"target {target!r} is not a regular expression: {error}") from error
            patterns.append(target)
    return patterns


def same_input_groups(names: Iterable[str], model_type: str | None) -> list[list[str]]:
    """The layers `names` in groups that read the same input, in order; one of which that is not known is alone.

    >>> attention = "model.layers.0.self_attn."
    >>> same_input_groups([attention + "q_proj", attention + "v_proj", attention + "o_proj"], "llama")
    [['model.layers.0.self_attn.q_proj', 'model.layers.0.self_attn.v_proj'], ['model.layers.0.self_attn.o_proj']]
    """
    family = FAMILIES.get(model_type or "")
    if family is None:
        return [[name] for name in names]
    roles = {local: role for role, local in family.roles.items()}
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        number, _, local = name.removeprefix(f"{family.blocks}.").partition(".")
        together = next((each for each in SAME_INPUT if roles.get(local) in each), None)
        key = (name,) if together is None or not number.isdecimal() else (number, *together)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _gpt2(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {"model_type": "gpt2", "n_embd": width, "n_layer": layers, "n_head": heads}


def _opt(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "hidden_size": width,
        "word_embed_proj_dim": width,
        "ffn_dim": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


def _llama_like(
    model_type: str, width: int, inner: int, layers: int, heads: int, key_value_heads: int, vocab: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "vocab_size": vocab,
        **more,
    }


# Configurations with which `kronpress plan` works with no weights and no network.
GEOMETRIES: dict[str, dict[str, Any]] = {
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "distilgpt2": _gpt2(768, 6, 12),
    "opt-125m": _opt(768, 12, 12),
    "opt-1.3b": _opt(2048, 24, 32),
    "llama-2-7b": _llama_like("llama", 4096, 11008, 32, 32, 32, 32000),
    "llama-3-8b": _llama_like("llama", 4096, 14336, 32, 32, 8, 128256),
    "llama-3.2-1b": _llama_like("llama", 2048, 8192, 16, 32, 8, 128256, tie_word_embeddings=True),
    "mistral-7b": _llama_like("mistral", 4096, 14336, 32, 32, 8, 32000),
    "qwen2-0.5b": _llama_like("qwen2", 896, 4864, 24, 14, 2, 151936, tie_word_embeddings=True),
    "qwen3-0.6b": _llama_like("qwen3", 1024, 3072, 28, 16, 8, 151936, head_dim=128, tie_word_embeddings=True),
    "gemma-2b": _llama_like("gemma", 2048, 16384, 18, 8, 1, 256000, head_dim=256, tie_word_embeddings=True),
    "phi-3-mini": _llama_like("phi3", 3072, 8192, 32, 32, 32, 32064),
}
