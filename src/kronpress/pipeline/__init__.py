"""A run: load, plan, compress, heal, evaluate and save, as one recipe says; and its steps for other uses."""

from kronpress.pipeline.compressing import (
    Calibrated,
    calibrated,
    calibration_batch,
    compress_loaded_,
    compress_stages_,
    planned_memory,
    within_context,
)
from kronpress.pipeline.sweeping import sweep
from kronpress.pipeline.whole_run import Messages, continue_text, run, validation_tokens
from kronpress.pipeline.working_folder import healing_folder

__all__ = [
    "Calibrated",
    "Messages",
    "calibrated",
    "calibration_batch",
    "compress_loaded_",
    "compress_stages_",
    "continue_text",
    "healing_folder",
    "planned_memory",
    "run",
    "sweep",
    "validation_tokens",
    "within_context",
]
