"""Shared fixtures: tiny models of four families with fixed weights, a tiny tokenizer, and both on disk."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

import kronpress as kp

# Nothing is left in the cache of who runs the tests, and nothing is found in it.
_CACHE = tempfile.TemporaryDirectory(prefix="kronpress-tests-", ignore_cleanup_errors=True)
os.environ["KRONPRESS_CACHE"] = _CACHE.name
# The same examples in every run; `--hypothesis-profile=explore`, which pytest reads after this, draws new ones.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile("repeatable")
# On matrices of a few thousand entries a second thread only waits, and on a busy machine for long.
torch.set_num_threads(1)
# Trainer collects garbage before each training; looking through everything imported takes longer than the training.
gc.freeze()

TINY_CONTEXT = 128
TINY_TEXT = (
    "The café stood on the corner of the street, and in the evening the old man sat by its window. "
    "He read the paper, he drank his coffee, and he said nothing; naïve people took him for a poet. "
    "Nobody knew where he had come from, nobody asked, and the winter went by like every other winter.\n"
)
TINY_RECIPES: dict[str, dict[str, Any]] = {
    "kronecker": {
        "name": "tiny-kronecker",
        "targets": "blocks",
        "structure": "kronecker",
        "spec": {"right_shape": [2, 4], "num_terms": 3},
    },
    "low_rank": {
        "name": "tiny-low-rank",
        "targets": "blocks",
        "structure": "low_rank",
        "budget": {"kept_of_targets": 0.5},
    },
    "joint_rank": {
        "name": "tiny-joint-rank",
        "targets": "blocks",
        "structure": "joint_rank",
        "budget": {"kept_of_targets": 0.5},
    },
    "permuted_kronecker": {
        "name": "tiny-permuted-kronecker",
        "targets": "blocks",
        "structure": "permuted_kronecker",
        "spec": {"right_shape": [2, 4], "num_terms": 3},
    },
    "monarch": {
        "name": "tiny-monarch",
        "targets": "blocks",
        "structure": "monarch",
        "spec": {"output_blocks": 4, "input_blocks": 2},
        "budget": {"kept_of_targets": 0.5},
    },
    "blast": {
        "name": "tiny-blast",
        "targets": "blocks",
        "structure": "blast",
        "spec": {"row_blocks": 4, "column_blocks": 2},
        "budget": {"kept_of_targets": 0.5},
    },
    "tensor_train": {
        "name": "tiny-tensor-train",
        "targets": "blocks",
        "structure": "tensor_train",
        "spec": {"num_cores": 3},
        "budget": {"kept_of_targets": 0.5},
    },
    "selected": {
        "name": "tiny-selected",
        "targets": "blocks",
        "structure": "selected",
        "spec": {"lines": "columns"},
        "budget": {"kept_of_targets": 0.5},
    },
    "structured_sum": {
        "name": "tiny-sum",
        "targets": "blocks",
        "structure": "structured_sum",
        "spec": {
            "sizes": [
                {"structure": "kronecker", "spec": {"right_shape": [2, 4]}, "share": 0.5},
                {"structure": "low_rank"},
            ]
        },
        "budget": {"kept_of_targets": 0.5},
    },
    "tensor_gpt": {
        "name": "tiny-tensor-gpt",
        "targets": "blocks",
        "structure": "tensor_gpt",
        "spec": {"num_cores": 3},
        "budget": {"kept_of_targets": 0.8},
    },
}


def _tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    common: dict[str, Any] = {
        "vocab_size": 300,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
        "dtype": torch.float32,
    }
    like_llama = {
        "max_position_embeddings": TINY_CONTEXT,
        "hidden_size": 16,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,
    }
    match family:
        case "gpt2":
            sizes = {"n_positions": TINY_CONTEXT, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.1}
            return GPT2Config(**{**common, **sizes, **changes})
        case "opt":
            sizes = {
                "max_position_embeddings": TINY_CONTEXT,
                "hidden_size": 16,
                "word_embed_proj_dim": 16,
                "ffn_dim": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "init_std": 0.1,
            }
            return OPTConfig(**{**common, **sizes, **changes})
        case "llama":
            return LlamaConfig(**{**common, **like_llama, "tie_word_embeddings": False, **changes})
        case "qwen2":
            return Qwen2Config(**{**common, **like_llama, "tie_word_embeddings": True, **changes})
    raise ValueError(family)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """family, configuration changes -> a new dense model in evaluation mode; equal arguments, equal weights."""

    def build(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(_tiny_config(family, **changes)).eval()
            with torch.no_grad():
                # Biases start at 0 and norms at 1: without this, losing one would not show.
                for parameter in model.parameters():
                    parameter += 0.1 * torch.randn_like(parameter)
        return model

    return build


@pytest.fixture(scope="session")
def tiny_recipe() -> Callable[..., kp.Recipe]:
    """structure, changes of recipe fields -> a recipe that fits every tiny model."""

    def build(structure: str, **changes: Any) -> kp.Recipe:
        return kp.load_recipe({**TINY_RECIPES[structure], **changes})

    return build


@pytest.fixture(scope="session")
def tiny_compressed(
    tiny_model: Callable[..., PreTrainedModel], tiny_recipe: Callable[..., kp.Recipe]
) -> Callable[..., PreTrainedModel]:
    """family, structure -> a new compressed model in evaluation mode."""

    def build(family: str, structure: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
        model = tiny_model(family, seed, **changes)
        kp.compress_(model, kp.make_plan(model, tiny_recipe(structure)))
        return model

    return build


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 300 tokens; `<|endoftext|>`, number 0, begins and ends texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([TINY_TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", model_max_length=TINY_CONTEXT
    )


@pytest.fixture(scope="session")
def tiny_text() -> str:
    """About 640 tokens of English, with characters of more than one byte."""
    return TINY_TEXT * 4


@pytest.fixture(scope="session")
def save_tiny_checkpoint(tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[[PreTrainedModel, Path], Path]:
    """model, folder -> the folder, which then holds the model and the tiny tokenizer."""

    def save(model: PreTrainedModel, folder: Path) -> Path:
        model.save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def fresh_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Arguments of a new interpreter -> its exit code and output; the Hub is out of its reach."""

    def start(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    return start
