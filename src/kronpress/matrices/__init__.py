"""The structures: one file each, and this registry of them."""

from kronpress.matrices.kronecker import Kronecker
from kronpress.matrices.low_rank import LowRank
from kronpress.matrices.monarch import Monarch
from kronpress.matrices.permuted_kronecker import PermutedKronecker
from kronpress.matrices.structured_matrix import Options, Spec, StructuredMatrix
from kronpress.matrices.tensor_train import TensorTrain

STRUCTURES: dict[str, type[StructuredMatrix]] = {
    "kronecker": Kronecker,
    "low_rank": LowRank,
    "monarch": Monarch,
    "permuted_kronecker": PermutedKronecker,
    "tensor_train": TensorTrain,
}

__all__ = [
    "STRUCTURES",
    "Kronecker",
    "LowRank",
    "Monarch",
    "Options",
    "PermutedKronecker",
    "Spec",
    "StructuredMatrix",
    "TensorTrain",
]
