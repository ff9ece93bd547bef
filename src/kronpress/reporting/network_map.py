"""The network as a grid: blocks down, matrices of a block across, and of each matrix what became of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kronpress.reporting.results import digits, sizes

# The page has as many colours for structures; what comes after shares the last.
NUM_COLOURS = 8
DENSE = "dense"
_NUMBERED = re.compile(r"(?P<before>.*?)\.(?P<number>\d+)\.(?P<name>.+)")
_SHORT = {
    "kronecker": "K",
    "permuted_kronecker": "PK",
    "low_rank": "LR",
    "joint_rank": "JR",
    "monarch": "M",
    "tensor_train": "TT",
    "tensor_gpt": "TG",
    "selected": "S",
    "structured_sum": "Σ",
}


@dataclass(frozen=True)
class Cell:
    """One matrix. `values` are fractions from 0 to 1 by mode, by which it is coloured, and `labels` what it reads then.

    `details` are all its figures, in words.
    """

    name: str
    colour: int
    values: dict[str, float]
    labels: dict[str, str]
    details: list[tuple[str, str]]


@dataclass(frozen=True)
class Grid:
    """Cells by row; None where the model has no such matrix, or nobody targeted it."""

    columns: list[str]
    rows: list[tuple[str, list[Cell | None]]]


@dataclass(frozen=True)
class NetworkMap:
    """`modes` are the titles of what it can be coloured by; `structures` the legend, colour and name."""

    modes: dict[str, str]
    grids: list[Grid]
    structures: list[tuple[int, str]]
    num_matrices: int


def network_map(
    plan: Mapping[str, Any], layers: Mapping[str, Mapping[str, Any]], chance: Mapping[str, float | None]
) -> NetworkMap:
    """The map of a plan's layers with their reports; layers that were targeted and left dense are in it too."""
    names = [*plan["layers"], *plan.get("left_dense", [])]
    kinds = {name: _kind(plan["layers"].get(name)) for name in names}
    legend = list(dict.fromkeys(kinds.values()))
    if len(legend) > NUM_COLOURS:  # sizes differ from layer to layer: structures alone
        kinds = {name: kind.partition(" ")[0] for name, kind in kinds.items()}
        legend = list(dict.fromkeys(kinds.values()))
    colours = {kind: min(number, NUM_COLOURS - 1) for number, kind in enumerate(legend)}
    cells = {
        name: _cell(name, plan["layers"].get(name), layers.get(name), chance.get(name), colours[kinds[name]])
        for name in names
    }
    with_outputs = any(report.get("relative_output_error") is not None for report in layers.values())
    modes = {"error": "error of the weight", "size": "parameters kept", "structure": "structure"}
    if with_outputs:
        modes = {"error": modes["error"], "output": "error on real inputs", **modes}
    return NetworkMap(
        modes=modes,
        grids=_grids(cells),
        structures=[(colours[kind], kind) for kind in legend],
        num_matrices=len(names),
    )


def _kind(layer: Mapping[str, Any] | None) -> str:
    return DENSE if layer is None else f"{layer['structure']} {sizes(layer['spec'])}"


def _cell(
    name: str,
    layer: Mapping[str, Any] | None,
    report: Mapping[str, Any] | None,
    chance: float | None,
    colour: int,
) -> Cell:
    values: dict[str, float] = {}
    if layer is None:
        values = dict.fromkeys(("error", "output"), 0.0) | {"size": 1.0}
        labels = dict.fromkeys(("error", "output"), "0") | {"size": "1", "structure": DENSE}
        return Cell(name, colour, values, labels, [("left", "dense, by the measured allocation")])
    details = [
        ("shape", f"{layer['out_features']}×{layer['in_features']}"),
        ("becomes", _kind(layer)),
    ]
    labels = {"structure": _label(layer)}
    if report is not None:
        output = report.get("relative_output_error")
        errors = {"error": report["relative_error"], "output": output, "size": report["kept_fraction"]}
        for mode, figure in errors.items():
            values[mode] = min(1.0, figure or 0.0)
            labels[mode] = "–" if figure is None else f"{figure:.2f}"
        details += [
            ("parameters", f"{report['num_params']:,} of {report['num_params_dense']:,}"),
            ("kept", digits(report["kept_fraction"])),
            ("relative error", digits(report["relative_error"])),
            ("captured energy", digits(report["captured_energy"])),
        ]
        if chance is not None:
            details.append(("by chance", digits(chance)))
        if output is not None:
            details.append(("error on real inputs", digits(output)))
    if layer.get("predicted_rise") is not None:
        details.append(("predicted rise of the loss", f"{digits(layer['predicted_rise'])} nats"))
    return Cell(name, colour, values, labels, details)


def _label(layer: Mapping[str, Any]) -> str:
    """A few letters: the structure's, and the size by which it is told apart."""
    spec, short = layer["spec"], _SHORT.get(layer["structure"], layer["structure"][:3])
    if "right_shape" in spec:
        terms = f"·{spec['num_terms']}" if spec.get("num_terms", 1) > 1 else ""
        return f"{short} {'×'.join(map(str, spec['right_shape']))}{terms}"
    return f"{short} {spec['rank']}" if isinstance(spec.get("rank"), int) else short


def _grids(cells: Mapping[str, Cell]) -> list[Grid]:
    """One grid for each list of blocks, and one for all that is in none."""
    blocks: dict[str, dict[int, dict[str, Cell]]] = {}
    outside: dict[str, Cell] = {}
    for name, cell in cells.items():
        match = _NUMBERED.fullmatch(name)
        if match is None:
            outside[name] = cell
        else:
            blocks.setdefault(match["before"], {}).setdefault(int(match["number"]), {})[match["name"]] = cell
    grids = []
    for numbers in blocks.values():
        columns = list(dict.fromkeys(name for row in numbers.values() for name in row))
        grids.append(Grid(columns, [(str(n), [numbers[n].get(column) for column in columns]) for n in sorted(numbers)]))
    if outside:
        grids.append(Grid(list(outside), [("", list(outside.values()))]))
    return grids
