"""Healing: training of a compressed model, by its own language-model loss and by distillation from the teacher."""

from kronpress.healing.blockwise import (
    BlockReport,
    ReconstructionLog,
    first_windows,
    num_tokens_read,
    reconstruct_blocks_,
)
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
from kronpress.healing.training import expected_memory, heal_

__all__ = [
    "BlockReport",
    "HealingLog",
    "HealingRow",
    "ReconstructionLog",
    "attention_loss",
    "checkpoint_step",
    "distillation_loss",
    "expected_memory",
    "first_windows",
    "forward_kl",
    "heal_",
    "jensen_shannon",
    "language_model_loss",
    "learning_rates",
    "match_blocks",
    "newest_checkpoint",
    "num_tokens_read",
    "reconstruct_blocks_",
    "reverse_kl",
    "state_loss",
]
