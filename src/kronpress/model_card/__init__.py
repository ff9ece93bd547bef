"""The model card of a checkpoint: what is known of it, and how the Hub and its readers are told."""

from kronpress.model_card.card import for_repository, model_card, write_card
from kronpress.model_card.story import (
    CARD,
    STORY,
    Base,
    Measured,
    Quality,
    Speed,
    Step,
    Story,
    device_name,
    plan_fields,
    read_base,
    read_story,
    step,
    training,
    versions,
)

__all__ = [
    "CARD",
    "STORY",
    "Base",
    "Measured",
    "Quality",
    "Speed",
    "Step",
    "Story",
    "device_name",
    "for_repository",
    "model_card",
    "plan_fields",
    "read_base",
    "read_story",
    "step",
    "training",
    "versions",
    "write_card",
]
