"""The figures of the methods' pages: what the structure is, and what it has lost of a model, both by our own code.

    python scripts/docs_figures.py

Left, the factors of a small matrix of the structure and the matrix that they make, by its own `fit` and `expand`.
Right, where something was measured: every model of the same results, with those of the method in colour. Each figure
holds a digest of what it shows, so that one that is older than the results is found without drawing it.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from docs_tables import DOCS, OURS, Measured, measured, of_method

from kronpress.matrices import STRUCTURES

matplotlib.use("svg")
import matplotlib.pyplot as plt

FOLDER = DOCS / "figures"
MAP = "RdBu_r"
OURS_COLOUR, OTHERS_COLOUR, INK = "#c2410c", "#9ca3af", "#1f2937"
DIGEST = re.compile(r"shows ([0-9a-f]{64})")


@dataclass(frozen=True)
class Example:
    """A small matrix of a structure: (out_features, in_features), its sizes, and what is written of its factors."""

    structure: str
    shape: tuple[int, int]
    spec: dict[str, Any]
    names: tuple[str, ...]
    signs: tuple[str, ...]  # before each factor, and before W


KRONECKER = (("A", "B"), ("", "⊗", "="))
PRODUCT = (("U", "V"), ("", "·", "="))


def _kronecker(left: tuple[int, int], right: tuple[int, int], num_terms: int = 1) -> dict[str, Any]:
    return {"left_shape": left, "right_shape": right, "num_terms": num_terms}


# page: what stands for the method.
EXAMPLES: dict[str, Example] = {
    "krony-pt": Example("kronecker", (16, 8), _kronecker((8, 4), (2, 2)), *KRONECKER),
    "methods/tqcompressor": Example(
        "permuted_kronecker", (16, 8), _kronecker((4, 4), (4, 2)), ("A", "B"), ("Pᵀ", "⊗", "Q =")
    ),
    "methods/kngpt2": Example("kronecker", (16, 8), _kronecker((8, 8), (2, 1)), *KRONECKER),
    "methods/low_rank": Example("low_rank", (16, 8), {"rank": 2}, *PRODUCT),
    "methods/procrustes": Example(
        "kronecker", (16, 8), _kronecker((4, 2), (4, 4), 2), ("A₁, A₂", "B₁, B₂"), ("Σ", "⊗", "=")
    ),
    "methods/monarch": Example(
        "monarch", (16, 8), {"output_blocks": 4, "input_blocks": 2, "rank": 1}, ("L", "R"), ("P", "Pᵀ", "=")
    ),
    "methods/blast": Example(
        "blast", (16, 8), {"row_blocks": 4, "column_blocks": 2, "rank": 2}, ("U", "s", "V"), ("", "·", "·", "=")
    ),
    "methods/tensor_train": Example(
        "tensor_train",
        (16, 8),
        {"core_shapes": ((4, 2), (2, 2), (2, 2)), "rank": 2},
        ("G₁", "G₂", "G₃"),
        ("", "·", "·", "="),
    ),
    "methods/tensorgpt": Example(
        "tensor_gpt", (16, 8), {"shape": (2, 2, 2), "rank": 1}, ("G₁", "G₂", "G₃"), ("", "·", "·", "=")
    ),
    "methods/joint_rank": Example("low_rank", (24, 8), {"rank": 2}, ("U₁, U₂, U₃", "V"), ("", "·", "=")),
    "methods/modegpt": Example("selected", (16, 8), {"lines": "rows", "count": 6}, (), ("W", "→")),
    "methods/sums": Example(
        "structured_sum",
        (16, 8),
        {
            "parts": (
                {"structure": "kronecker", "spec": _kronecker((8, 4), (2, 2))},
                {"structure": "low_rank", "spec": {"rank": 1}},
            )
        },
        ("A", "B", "U", "V"),
        ("", "⊗", "+", "·", "="),
    ),
    "methods/auto": Example("low_rank", (16, 8), {"rank": 3}, *PRODUCT),
}


def file_of(page: str) -> Path:
    return FOLDER / f"method-{page.rpartition('/')[2]}.svg"


def points(page: str) -> list[tuple[float, float, bool, bool]]:
    """Of each model: parameters in millions, rise in nats on the test books, is it of the method, is it healed."""
    own = {(each.source, each.name) for each in of_method(page) if each.source != "fit_one_shot_llama"}
    others = [each for source in dict.fromkeys(source for source, _ in own_sources(page)) for each in measured(source)]

    def coordinates(each: Measured, healed: bool) -> tuple[float, float, bool, bool]:
        rise = round(each.rise(healed=healed), 6)
        return each.num_params / 1e6, rise, (each.source, each.name) in own, healed

    comparable = [each for each in others if own and each.rival not in ("8-bit", "4-bit")]
    return [coordinates(each, False) for each in comparable] + [
        coordinates(each, True) for each in comparable if each.after is not None
    ]


def own_sources(page: str) -> list[tuple[str, str]]:
    return [(source, pattern) for source, pattern in OURS[page] if source != "fit_one_shot_llama"]


def shown(page: str) -> str:
    """A digest of everything that the page's figure shows."""
    example = EXAMPLES[page]
    what = [asdict(example), points(page)]
    return hashlib.sha256(json.dumps(what, default=str, ensure_ascii=False).encode()).hexdigest()


def digest_in(figure: Path) -> str:
    found = DIGEST.search(figure.read_text(encoding="utf-8"))
    return found[1] if found else ""


# ---- drawing ----


def matrices(example: Example) -> list[tuple[str, str, torch.Tensor]]:
    """Each factor as a matrix and what they make, with its name and what stands before it."""
    generator = torch.Generator().manual_seed(1)
    structure = STRUCTURES[example.structure]
    weight = torch.randn(example.shape, generator=generator, dtype=torch.float64)
    factors = structure.fit(weight, structure.Spec(**example.spec))
    made = structure.expand(factors)
    if not example.names:
        return [("", "dense", weight), ("→", "units kept", made)]
    floating = [(name, each) for name, each in factors.items() if each.is_floating_point()]
    panels = [as_matrix(example.structure, name, factor) for name, factor in floating]
    return list(zip(example.signs, (*example.names, "W"), (*panels, made), strict=True))


def as_matrix(structure: str, name: str, factor: torch.Tensor) -> torch.Tensor:
    """A factor of any number of dimensions as rows and columns; terms side by side."""
    if structure == "blast" and name != "middle":
        return factor.flatten(0, 1) if name == "weight" else factor.transpose(0, 1).flatten(1)
    return torch.block_diag(*factor) if structure == "monarch" else factor.flatten(1)


def draw_matrices(axis: Any, panels: list[tuple[str, str, torch.Tensor]]) -> None:
    """All in one scale, so that sizes can be compared."""
    height = max(panel.shape[0] for *_, panel in panels)
    x = 0.0
    for sign, name, panel in panels:
        rows, columns = panel.shape
        if sign:
            axis.text(x + 0.4 + 0.6 * len(sign), height / 2, sign, ha="center", va="center", fontsize=12)
            x += 1.2 + 1.2 * len(sign)
        x = max(x, x + (2.2 - columns) / 2)
        limit = panel.abs().max().item() or 1
        top = (height - rows) / 2
        axis.imshow(panel.numpy(), cmap=MAP, vmin=-limit, vmax=limit, extent=(x, x + columns, top + rows, top))
        axis.add_patch(plt.Rectangle((x, top), columns, rows, fill=False, color=INK, linewidth=0.6))
        axis.text(x + columns / 2, top - 0.5, f"{name}\n{rows}×{columns}", ha="center", va="bottom")
        x = max(x + columns, x + columns + (2.2 - columns) / 2) + 0.6
    axis.set(xlim=(-0.5, x), ylim=(height + 0.5, -4), aspect="equal")
    axis.axis("off")


def draw(page: str) -> None:
    panels, marks = matrices(EXAMPLES[page]), points(page)
    plt.rcParams.update({"svg.hashsalt": page, "svg.fonttype": "path", "font.size": 9, "text.color": INK})
    figure = plt.figure(figsize=(9.2 if marks else 4.6, 2.9), facecolor="white", layout="constrained")
    left, *rest = figure.subplots(1, 2 if marks else 1, squeeze=False)[0]
    draw_matrices(left, panels)
    if rest:
        draw_points(rest[0], marks)
    FOLDER.mkdir(exist_ok=True)
    figure.savefig(file_of(page), metadata={"Date": None, "Creator": None, "Description": f"shows {shown(page)}"})
    plt.close(figure)


def draw_points(axis: Any, marks: list[tuple[float, float, bool, bool]]) -> None:
    for own in (False, True):
        for healed in (False, True):
            chosen = [mark for mark in marks if mark[2:] == (own, healed)]
            if not chosen:
                continue
            axis.scatter(
                [mark[0] for mark in chosen],
                [max(mark[1], 1e-3) for mark in chosen],
                s=26 if own else 14,
                marker="v" if healed else "o",
                color=OURS_COLOUR if own else OTHERS_COLOUR,
                label=f"{'this method' if own else 'others'}{', healed' if healed else ''}",
                zorder=2 + own,
            )
    axis.set(yscale="log", xlabel="parameters of the model, millions", ylabel="rise in nats, test books")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=7, frameon=True, framealpha=0.8, edgecolor="none")


def main() -> None:
    for page in EXAMPLES:
        draw(page)
        print(file_of(page).relative_to(DOCS.parent))


if __name__ == "__main__":
    main()
