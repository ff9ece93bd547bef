"""Healing: training of a compressed model, by its own language-model loss and by distillation from the teacher."""

from kronpress.healing.checkpoints import checkpoint_step, newest_checkpoint
from kronpress.healing.inner_states import match_blocks
from kronpress.healing.losses import (
    attention_loss,
    distillation_loss,
    forward_kl,
    jensen_shannon,
    language_model_loss,
    reverse_kl,
    state_loss,
)
from kronpress.healing.progress import HealingLog, HealingRow
from kronpress.healing.trainer import learning_rates
from kronpress.healing.training import heal_

__all__ = [
    "HealingLog",
    "HealingRow",
    "attention_loss",
    "checkpoint_step",
    "distillation_loss",
    "forward_kl",
    "heal_",
    "jensen_shannon",
    "language_model_loss",
    "learning_rates",
    "match_blocks",
    "newest_checkpoint",
    "reverse_kl",
    "state_loss",
]
