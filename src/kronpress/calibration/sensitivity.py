"""The loss's gradient by the logits, with labels drawn from the model's own prediction p."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kronpress.calibration.batches import Part
from kronpress.calibration.sums import CHUNK
from kronpress.recipe import Recipe


def measures_gradients(recipe: Recipe) -> bool:
    """Whether the recipe has a use for the loss's gradients: not in a metric that does not look at them.

    With the metric `none` moments are not fitted by but looked at, and are as `calibration.sensitivity` says.
    """
    return recipe.calibration.sensitivity and recipe.weighting.metric in ("loss", "none")


def logits_of(output: Any) -> Tensor | None:
    """The logits (batch, length, classes) in a model's output, if it has any."""
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) and logits.ndim == 3 else None


def loss_gradient(logits: Tensor, part: Part, generator: torch.Generator) -> Tensor:
    """The gradient by logits (batch, length, classes) of Σ −log p(label), where p = softmax(logits) draws the labels.

    It is p − onehot(label), and 0 at tokens that the mask hides. A label is the first class up to which p adds up to
    u, uniform in (0, 1].
    """
    gradient = torch.zeros_like(logits, memory_format=torch.contiguous_format)
    rows, gradient_rows = logits.flatten(0, 1), gradient.view(-1, logits.shape[-1])
    tokens = part.tokens(torch.arange(len(rows), device=logits.device).view(*logits.shape[:2], 1)).flatten()
    uniform = 1 - torch.rand(len(tokens), 1, dtype=torch.float64, generator=generator).to(logits.device)
    size = max(1, CHUNK // logits.shape[-1])
    for chunk, u in zip(tokens.split(size), uniform.split(size), strict=True):
        p = rows[chunk].double().softmax(dim=-1)
        cumulative = p.cumsum(dim=-1)
        # Times the sum of all, which rounding may leave below 1; of NaN none is found, and its gradient is NaN too.
        labels = torch.searchsorted(cumulative, u * cumulative[:, -1:]).clamp_(max=logits.shape[-1] - 1)
        gradient_rows[chunk] = p.scatter_add(1, labels, -torch.ones_like(u)).to(logits.dtype)
    return gradient
