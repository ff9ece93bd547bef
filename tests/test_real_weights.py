"""Captured energy on real GPT-2 attention matrices, against figures measured beforehand with other code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kronpress.matrices import STRUCTURES

WEIGHTS = Path(__file__).parents[2] / "shared" / "data" / "gpt2_124m_attention" / "attention_layers_0_5_11.safetensors"

pytestmark = pytest.mark.skipif(
    not WEIGHTS.exists(), reason="the real GPT-2 attention weights (../shared/data) are not here"
)


def captured_energy(weight: torch.Tensor, structure: str, sizes: dict[str, object]) -> float:
    matrix_class = STRUCTURES[structure]
    # A term with a factor of (1, 2) keeps half of the entries and two more.
    (spec,) = matrix_class.candidate_specs(*weight.shape, weight.numel() // 2 + 2, **sizes)
    matrix = matrix_class.from_dense(weight, spec)
    return 1 - ((weight - matrix.to_dense()).square().sum() / weight.square().sum()).item()


# At half the parameters (a quarter for 2×2): a thin term captures what it would of a random matrix, many balanced
# terms more, truncated SVD most. The balanced terms were measured on the square matrices.
@pytest.mark.parametrize(
    ("structure", "sizes", "names", "low", "high"),
    [
        ("kronecker", {"right_shape": (1, 2), "num_terms": 1}, "weight", 0.50, 0.52),
        ("kronecker", {"right_shape": (2, 1), "num_terms": 1}, "weight", 0.50, 0.52),
        ("kronecker", {"right_shape": (2, 2), "num_terms": 1}, "weight", 0.25, 0.27),
        ("kronecker", {"right_shape": (32, 32), "num_terms": 184}, "c_proj.weight", 0.64, 0.73),
        ("low_rank", {}, "weight", 0.72, 0.94),
    ],
)
def test_captured_energy_is_that_measured_beforehand(
    structure: str, sizes: dict[str, object], names: str, low: float, high: float
) -> None:
    stored = {name: tensor for name, tensor in load_file(WEIGHTS).items() if name.endswith(names)}
    assert len(stored) == (3 if "c_proj" in names else 6)
    energies = {name: captured_energy(tensor.double().mT, structure, sizes) for name, tensor in stored.items()}
    assert low <= round(min(energies.values()), 2), energies
    assert round(max(energies.values()), 2) <= high, energies
