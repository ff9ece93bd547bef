"""Rotations that a transformer lets pass: another basis of the residual stream, in which structured fits are nearer.

An orthogonal Q (width, width) goes into every layer that writes or reads the stream and leaves the logits as they were
(SliceGPT, arXiv 2401.15024); ProcrustesGPT (arXiv 2506.02818) looks for the Q in which structured matrices fit best.
It passes a norm whose gain is constant, so gains are folded into the layers behind the norm first.
"""

from kronpress.rotation.moments import TurnedMoments, rotated_moments, unscaled_moments
from kronpress.rotation.search import Rotation, Target, nearest_orthogonal, procrustes_rotation
from kronpress.rotation.stream import FoldedNorm, fold_norm_gains_, foldable_norms, has_layer_norms, rotate_
from kronpress.rotation.whole_model import Rotated, rotated_

__all__ = [
    "FoldedNorm",
    "Rotated",
    "Rotation",
    "Target",
    "TurnedMoments",
    "fold_norm_gains_",
    "foldable_norms",
    "has_layer_norms",
    "nearest_orthogonal",
    "procrustes_rotation",
    "rotate_",
    "rotated_",
    "rotated_moments",
    "unscaled_moments",
]
