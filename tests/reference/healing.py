"""What tests of healing share: a schedule of seconds, a text with something to learn, and terms computed slowly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence

import kronpress as kp
from kronpress.recipe import Healing

# A stream with something to learn: each token follows from the one before.
TOKENS = (7 * torch.arange(4096)) % 60 + 3
TWO_PHASES = [
    {"share": 0.5},
    {"share": 0.5, "sequences_per_step": 8, "learning_rate": 1e-4, "final_learning_rate": 1.0},
]


class Interrupted(Exception):
    """What a test's own callback stops a training by."""


def schedule(**changes: Any) -> Healing:
    fields = {"max_steps": 6, "sequences_per_step": 4, "sequence_length": 16, "learning_rate": 3e-3}
    return Healing(**{**fields, **changes})


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_weights(actual: nn.Module, expected: dict[str, Tensor], **tolerance: float) -> None:
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    torch.testing.assert_close(weights(actual), expected, **tolerance)


def largest_change(model: nn.Module, before: dict[str, Tensor]) -> float:
    return max((parameter - before[name]).abs().max().item() for name, parameter in weights(model).items())


@torch.no_grad()
def next_token_loss(model: nn.Module, ids: Tensor) -> float:
    device = next(model.parameters()).device
    logits = model.eval()(input_ids=ids.to(device)).logits[:, :-1].double().log_softmax(-1)
    return -logits.gather(-1, ids[:, 1:, None].to(device)).mean().item()


def reference_distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    softened = [Categorical(logits=logits.double() / temperature) for logits in (teacher, student)]
    return temperature**2 * kl_divergence(*softened).mean()


def with_sums_of_two_terms(model: nn.Module, start: str) -> nn.Module:
    """The model, a GPT-2, with Kronecker sums of two terms in its MLPs that have the start asked for."""
    recipe = kp.Recipe(spec={"right_shape": (2, 2), "num_terms": 2}, fit={"start": start})
    kp.compress_(model, kp.make_plan(model, recipe))
    return model
