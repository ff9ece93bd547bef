"""What low rank and Kronecker sums capture of real GPT-2 attention matrices, beside what they capture of random ones.

    python benchmarks/gpt2_attention_spectrum.py run attention_layers_0_5_11.safetensors
    python benchmarks/gpt2_attention_spectrum.py table

The file holds `c_attn` and `c_proj` of blocks 0, 5 and 11 of GPT-2 124M under their names in transformers, (in, out) as
`Conv1D` stores them. No inputs of these layers are known, so it is the energy of the weights alone. A second control
beside the random matrix is the matrix itself with its rows and columns shuffled: what a structure captures of that as
well does not lie in their order. `table` prints what docs/spectrum.md shows.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from kronpress.spectrum import Spectrum, SpectrumRow, plot_spectrum, spectrum_of_weights

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpt2_attention_spectrum.json"
FIGURE = ROOT / "docs" / "figures" / "gpt2_attention_spectrum.png"
SHARE = 0.5
DIGITS = 6

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def run(
    weights: Annotated[Path, typer.Argument(exists=True, help="safetensors file of GPT-2's attention")],
    out: Annotated[Path, typer.Option(help="JSON file to write")] = RESULTS,
    plot: Annotated[Path, typer.Option(help="figure to write")] = FIGURE,
) -> None:
    """Measure every matrix, and write the figures and the plot."""
    stored = {name: tensor for name, tensor in load_file(weights).items() if name.endswith(".weight")}
    names = sorted(stored, key=lambda name: (int(name.split(".")[2]), name))
    matrices = {name.removesuffix(".weight"): stored[name].mT for name in names}
    measured = spectrum_of_weights(matrices, SHARE)
    shuffled = spectrum_of_weights({name: shuffle(weight) for name, weight in matrices.items()}, SHARE)
    results = {
        "command": f"python benchmarks/gpt2_attention_spectrum.py run {weights.name}",
        "spectrum": _rounded(measured.model_dump(mode="json")),
        "shuffled": _rounded([row.captured_energy for row in shuffled.rows]),  # in the order of the spectrum's rows
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    plot.parent.mkdir(parents=True, exist_ok=True)
    plot_spectrum(measured, plot)
    # A palette is enough for lines, and a third of the size.
    Image.open(plot).convert("RGB").quantize(255).save(plot, optimize=True)


def shuffle(weight: Tensor) -> Tensor:
    """The matrix with rows and columns in an order drawn with seed 0."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randperm(size, generator=generator) for size in weight.shape)
    return weight[rows][:, columns]


@app.command()
def table(results: Annotated[Path, typer.Argument(exists=True)] = RESULTS) -> None:
    """Print the tables as Markdown."""
    print(render(json.loads(results.read_text(encoding="utf-8"))), end="")


def render(results: dict[str, Any]) -> str:
    """A table for each role and shape: a line for each structure, a column for each block."""
    rows = list(zip(Spectrum.model_validate(results["spectrum"]).rows, results["shuffled"], strict=True))
    parts = []
    for role in dict.fromkeys(row.name.rpartition(".")[-1] for row, _ in rows):
        of_role = [(row, shuffled) for row, shuffled in rows if row.name.rpartition(".")[-1] == role]
        blocks = list(dict.fromkeys(row.name.split(".")[2] for row, _ in of_role))
        lines = [
            f"`attn.{role}`, {of_role[0][0].out_features}×{of_role[0][0].in_features}:",
            "",
            f"| structure | kept | block {' | block '.join(blocks)} | mean | mean, shuffled | chance |",
            f"|{'---|' * (len(blocks) + 5)}",
        ]
        for kind in dict.fromkeys((row.structure, row.right_shape) for row, _ in of_role):
            of_kind = [(row, shuffled) for row, shuffled in of_role if (row.structure, row.right_shape) == kind]
            first, energies = of_kind[0][0], [row.captured_energy for row, _ in of_kind]
            figures = [*energies, fmean(energies), fmean(shuffled for _, shuffled in of_kind), first.chance]
            cells = " | ".join(f"{figure:.3f}" for figure in figures)
            lines.append(f"| {_sizes(first)} | {first.kept_fraction:.3f} | {cells} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _sizes(row: SpectrumRow) -> str:
    m2, n2 = row.right_shape
    if row.structure == "low_rank":
        return f"rank {row.num_terms}"
    return f"{row.num_terms} term{'s' if row.num_terms > 1 else ''} with B {m2}×{n2}"


def _rounded(value: Any) -> Any:
    """With every number at DIGITS digits after the point."""
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return round(value, DIGITS) if isinstance(value, float) else value


if __name__ == "__main__":
    app()
