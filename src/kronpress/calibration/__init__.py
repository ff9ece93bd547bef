"""What layers read on real data, and how the loss responds to what they answer.

`calibrate` measures all targeted layers of a model; `BlockStream` takes hidden states through one transformer block
after another, for graphs that fit into memory and for layers that shall see what replaced ones before them give.
"""

from kronpress.calibration.batches import calibration_batches
from kronpress.calibration.block_stream import BlockStream
from kronpress.calibration.moments import Moments, load_moments
from kronpress.calibration.sequential import PairedMoments, SequentialInputs
from kronpress.calibration.whole_model import calibrate, moments_key, num_bytes

__all__ = [
    "BlockStream",
    "Moments",
    "PairedMoments",
    "SequentialInputs",
    "calibrate",
    "calibration_batches",
    "load_moments",
    "moments_key",
    "num_bytes",
]
