"""Healing: training of a compressed model, by its own language-model loss and by distillation from the teacher."""

from kronpress.healing.inner_states import match_blocks
from kronpress.healing.losses import attention_loss, distillation_loss, language_model_loss, state_loss
from kronpress.healing.training import (
    HealingLog,
    HealingRow,
    checkpoint_step,
    heal_,
    learning_rates,
    newest_checkpoint,
)

__all__ = [
    "HealingLog",
    "HealingRow",
    "attention_loss",
    "checkpoint_step",
    "distillation_loss",
    "heal_",
    "language_model_loss",
    "learning_rates",
    "match_blocks",
    "newest_checkpoint",
    "state_loss",
]
