"""The estimate of what a training takes: what it grows with, and that a real training needs as much."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.healing import schedule
from samples.networks import CONFIGS, VOCABULARY, network
from torch import Tensor

from kronpress.healing.memory import TrainingMemory, kept_for_backward, training_memory
from kronpress.healing.trainer import divergences
from kronpress.planning import meta_model

# The estimate is to be between these times what was measured.
LEAST, MOST = 0.8, 2.0

MEASURE = """
import sys, torch
from transformers import GPT2Config, GPT2LMHeadModel
import kronpress as kp
from kronpress.healing import expected_memory
from kronpress.recipe import Healing
torch.set_num_threads(1)
checkpointing = sys.argv[1] == "checkpointing"

def model(width):
    return GPT2LMHeadModel(GPT2Config(vocab_size=2048, n_embd=width, n_layer=4, n_head=4, n_positions=128)).eval()

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

def healing(sequences, length):
    return Healing(max_steps=2, sequences_per_step=sequences, sequence_length=length, distillation_weight=1.0,
                   gradient_checkpointing=checkpointing)

tokens = torch.arange(8192) % 2000
kp.heal_(model(16), model(16), tokens, healing(1, 8))  # what is loaded only once
before = status("VmRSS")
student, teacher = model(192), model(192)
expected = expected_memory(student, teacher, healing(16, 128))
open("/proc/self/clear_refs", "w").write("5")
kp.heal_(student, teacher, tokens, healing(16, 128))
print(expected.total, status("VmHWM") - before)
"""


def estimate(family: str = "llama", teacher: bool = True, meta: bool = False, **changes: object) -> TrainingMemory:
    models = [network(family, torch.float32) for _ in range(2)]
    if meta:
        models = [meta_model(model.config).float() for model in models]
    options = {key: changes.pop(key) for key in ("num_processes", "is_sharded", "in_bfloat16") if key in changes}
    healing = schedule(distillation_weight=float(teacher), **changes)
    return training_memory(models[0], models[1] if teacher else None, healing, divergences(healing), **options)


@pytest.mark.parametrize("family", CONFIGS)
def test_shapes_are_enough(family):
    assert estimate(family, meta=True) == estimate(family)


def test_weights_gradients_and_states_are_counted():
    model = network("gpt2", torch.float32)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    memory = estimate("gpt2", chunk_tokens=0)
    assert memory.weights >= 4 * numbers
    assert (memory.gradients, memory.optimiser) == (4 * numbers, 8 * numbers)
    assert memory.teacher >= 4 * numbers
    assert estimate("gpt2", teacher=False).teacher == 0
    assert memory.total == sum(dict(memory).values())


@pytest.mark.parametrize("family", CONFIGS)
def test_what_is_kept_is_what_autograd_holds(family):
    """Against a real pass: every tensor that is packed and is no parameter, each memory once."""
    model = network(family, torch.float32)
    ids = torch.randint(VOCABULARY, (3, 10))
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), ids)}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    outside, blocks = kept_for_backward(model, (3, 10))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.model.decoder(ids) if family == "opt" else model.base_model(input_ids=ids, use_cache=False)
    assert hidden is not None
    expected = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert outside + sum(size for _, size in blocks) == pytest.approx(expected, rel=0.05)
    assert all(read == 3 * 10 * 16 * 4 for read, _ in blocks)


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from(["llama", "gpt2"]))
def test_activations_grow_with_the_tokens_of_a_pass(passes, per_pass, family):
    whole = estimate(family, sequences_per_step=passes * per_pass)
    parts = estimate(family, sequences_per_step=passes * per_pass, sequences_per_pass=per_pass)
    assert parts == estimate(family, sequences_per_step=per_pass)
    assert whole.activations == pytest.approx(passes * parts.activations, rel=0.1)


def test_each_saving_saves():
    plain = estimate(sequences_per_step=8)
    assert estimate(sequences_per_step=8, gradient_checkpointing=True).activations < plain.activations
    assert estimate(sequences_per_step=8, in_bfloat16=True).activations < plain.activations
    assert estimate(sequences_per_step=8, chunk_tokens=4).logits < plain.logits
    assert estimate(sequences_per_step=8, optimizer="adamw-bfloat16").optimiser < plain.optimiser
    halved = estimate(sequences_per_step=8, num_processes=2)
    assert halved.activations == estimate(sequences_per_step=4).activations
    sharded = estimate(sequences_per_step=8, num_processes=8, is_sharded=True)
    assert sharded.optimiser == plain.optimiser // 8
    assert sharded.gradients < halved.gradients


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
@pytest.mark.parametrize("how", ["plain", "checkpointing"])
def test_a_training_takes_about_as_much(how):
    # So that what is freed goes back at once, and the peak is of what is held.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, how], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected, measured = map(int, done.stdout.split())
    assert LEAST < expected / measured < MOST, f"expected {expected / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB"
