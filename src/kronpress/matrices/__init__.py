"""The structures: one file each, and this registry of them."""

from kronpress.matrices.kronecker import Kronecker
from kronpress.matrices.low_rank import LowRank
from kronpress.matrices.permuted_kronecker import PermutedKronecker
from kronpress.matrices.structured_matrix import Options, Spec, StructuredMatrix

STRUCTURES: dict[str, type[StructuredMatrix]] = {
    "kronecker": Kronecker,
    "low_rank": LowRank,
    "permuted_kronecker": PermutedKronecker,
}

__all__ = ["STRUCTURES", "Kronecker", "LowRank", "Options", "PermutedKronecker", "Spec", "StructuredMatrix"]
