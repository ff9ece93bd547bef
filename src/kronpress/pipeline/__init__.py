"""A run: load, plan, compress, heal, evaluate and save, as one recipe says; and its steps for other uses."""

from kronpress.pipeline.compressing import (
    Calibrated,
    calibrated,
    calibration_batch,
    compress_loaded_,
    compress_stages_,
)
from kronpress.pipeline.whole_run import Messages, continue_text, run

__all__ = [
    "Calibrated",
    "Messages",
    "calibrated",
    "calibration_batch",
    "compress_loaded_",
    "compress_stages_",
    "continue_text",
    "run",
]
