"""The structures: one file each, and this registry of them."""

from kronpress.matrices.blast import Blast
from kronpress.matrices.joint_rank import JointRank
from kronpress.matrices.kronecker import Kronecker
from kronpress.matrices.low_rank import LowRank
from kronpress.matrices.monarch import Monarch
from kronpress.matrices.permuted_kronecker import PermutedKronecker
from kronpress.matrices.selected import Selected
from kronpress.matrices.structured_matrix import STRUCTURES, Options, Spec, StructuredMatrix
from kronpress.matrices.structured_sum import StructuredSum
from kronpress.matrices.tensor_gpt import TensorGPT
from kronpress.matrices.tensor_train import TensorTrain

STRUCTURES.update(
    {
        "blast": Blast,
        "joint_rank": JointRank,
        "kronecker": Kronecker,
        "low_rank": LowRank,
        "monarch": Monarch,
        "permuted_kronecker": PermutedKronecker,
        "selected": Selected,
        "structured_sum": StructuredSum,
        "tensor_gpt": TensorGPT,
        "tensor_train": TensorTrain,
    }
)

__all__ = [
    "STRUCTURES",
    "Blast",
    "JointRank",
    "Kronecker",
    "LowRank",
    "Monarch",
    "Options",
    "PermutedKronecker",
    "Selected",
    "Spec",
    "StructuredMatrix",
    "StructuredSum",
    "TensorGPT",
    "TensorTrain",
]
