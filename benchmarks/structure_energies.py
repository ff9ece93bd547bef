r"""What Monarch and tensor trains capture of real GPT-2 attention matrices at half of the parameters, beside chance.

    python benchmarks/structure_energies.py --weights attention.safetensors \
        --out benchmarks/results/structure_energies.json

The energy is 1 − ‖W − Ŵ‖² / ‖W‖² of each structure's own fit in Frobenius norm; chance is that of a Gaussian matrix of
the same shape. The weights are those of the layers 0, 5 and 11 of GPT-2 (124M), as (in, out).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file
from torch import Tensor

from kronpress.matrices import STRUCTURES

# A name, the structure, and what is fixed of its sizes; the budget chooses the rest.
FORMS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("low rank", "low_rank", {}),
    ("Monarch 4 × 4", "monarch", {"output_blocks": 4, "input_blocks": 4}),
    ("Monarch 12 × 4", "monarch", {"output_blocks": 12, "input_blocks": 4}),
    ("Monarch 16 × 16", "monarch", {"output_blocks": 16, "input_blocks": 16}),
    ("two cores", "tensor_train", {"num_cores": 2}),
    ("three cores", "tensor_train", {"num_cores": 3}),
    ("four cores", "tensor_train", {"num_cores": 4}),
)


def energy(weight: Tensor, structure: str, fixed: dict[str, Any]) -> float:
    """The fraction of ‖W‖² that the structure captures with at most half of the parameters."""
    matrix_class = STRUCTURES[structure]
    [spec] = matrix_class.candidate_specs(*weight.shape, weight.numel() // 2, **fixed)
    fitted = matrix_class.expand(matrix_class.fit(weight, spec))
    return 1 - ((weight - fitted).square().sum() / weight.square().sum()).item()


def main(
    weights: Annotated[Path, typer.Option(help="attention matrices as (in, out)")],
    out: Annotated[Path, typer.Option(help="where the result is written")],
) -> None:
    torch.manual_seed(0)
    stored = {name: weight for name, weight in load_file(weights).items() if name.endswith(".weight")}
    matrices = {name: weight.double().mT.contiguous() for name, weight in sorted(stored.items())}
    shapes = sorted({tuple(weight.shape) for weight in matrices.values()})
    matrices |= {f"chance {m}×{n}": torch.randn(m, n, dtype=torch.float64) for m, n in shapes}
    rows = [
        {"matrix": name, **{form: energy(weight, structure, fixed) for form, structure, fixed in FORMS}}
        for name, weight in matrices.items()
    ]
    found = {
        "command": "python benchmarks/structure_energies.py --weights attention.safetensors "
        "--out benchmarks/results/structure_energies.json",
        "kept": 0.5,
        "rows": rows,
    }
    out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
