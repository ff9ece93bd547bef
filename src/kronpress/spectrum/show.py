"""The spectrum as tables of at most 80 columns, and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from kronpress.errors import RequestError, WorkError
from kronpress.spectrum.energies import RIGHT_SHAPES, Shape
from kronpress.spectrum.measure import CHANCE_SEED, Spectrum, SpectrumCurve, SpectrumRow, role_of

PLOT_FORMATS = (".png", ".svg", ".pdf")
# Okabe and Ito's colours, which colour-blind readers tell apart, with grey in place of their yellow; and a marker each.
_STYLES: dict[str, tuple[str, str]] = {
    "low rank": ("#000000", "o"),
    "B 1×2": ("#999999", "^"),
    "B 2×1": ("#56B4E9", "v"),
    "B 2×2": ("#0072B2", "s"),
    "B 4×4": ("#009E73", "D"),
    "B 4×16": ("#E69F00", "P"),
    "B 16×4": ("#CC79A7", "X"),
    "balanced B": ("#D55E00", "*"),
}
_CHANCE = "chance"


def spectrum_tables(measured: Spectrum) -> list[Table]:
    """One table for each role: a line for each matrix, a column for each structure.

    The energy of W comes first, then that of the outputs if it was measured.
    """
    groups: dict[tuple[str, int, int], list[SpectrumRow]] = {}
    for row in measured.rows:
        groups.setdefault((role_of(row.name), row.out_features, row.in_features), []).append(row)
    return [
        _role_table(f"{role}, {m}×{n}, at {measured.share:.3f} of the parameters", rows)
        for (role, m, n), rows in groups.items()
    ]


def _role_table(title: str, rows: list[SpectrumRow]) -> Table:
    matrices: dict[str, list[SpectrumRow]] = {}
    for row in rows:
        matrices.setdefault(row.name, []).append(row)
    structures = list(zip(*matrices.values(), strict=True))  # the rows of all matrices, by structure
    first = [of_structure[0] for of_structure in structures]
    # Nothing on the left of a cell: with lower bounds in it a line would be wider than 80 columns.
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, title_justify="left", caption_justify="left")
    table.add_column("")
    for row in first:
        m2, n2 = row.right_shape
        table.add_column("low\nrank" if row.structure == "low_rank" else f"B\n{m2}×{n2}", justify="right")
    table.add_row("terms", *(str(row.num_terms) for row in first))
    table.add_row("kept", *(f"{row.kept_fraction:.3f}" for row in first))
    table.add_section()
    table.add_row("energy of W")
    table.add_row(_CHANCE, *(f"{row.chance:.3f}" for row in first))
    for name, of_matrix in matrices.items():
        table.add_row(_number(name), *(f"{row.captured_energy:.3f}" for row in of_matrix))
    if len(matrices) > 1:
        table.add_row("mean", *(f"{fmean(row.captured_energy for row in each):.3f}" for each in structures))
    if any(row.captured_output_energy is not None for row in rows):
        table.add_section()
        table.add_row("of outputs")
        for name, of_matrix in matrices.items():
            table.add_row(_number(name), *(_output_cell([row]) for row in of_matrix))
        if len(matrices) > 1:
            table.add_row("mean", *map(_output_cell, structures))
    table.caption = "\n".join(_notes(rows))
    return table


def _number(name: str) -> str:
    """The number of the block in a module's name; numbers are joined where there are several."""
    return ".".join(part for part in name.split(".") if part.isdigit()) or "W"


def _output_cell(rows: Sequence[SpectrumRow]) -> str:
    """Their mean; of figures and lower bounds it is a lower bound."""
    values = [row.captured_output_energy for row in rows if row.captured_output_energy is not None]
    if len(values) < len(rows):
        return "–"
    return f"{'≥' if any(row.is_lower_bound for row in rows) else ''}{fmean(values):.3f}"


def _notes(rows: list[SpectrumRow]) -> list[str]:
    notes = [
        "energy of W: the fraction of ‖W‖² that the nearest sum captures",
        f"chance: the same of one Gaussian matrix of that shape, seed {CHANCE_SEED}",
    ]
    if all(row.captured_output_energy is None for row in rows):
        return notes
    notes.append("of outputs: the fraction of E‖Wx‖² that the fit to the inputs captures")
    if any(row.is_lower_bound for row in rows):
        notes.append("≥: at least; the fit itself would take too long here")
    if any(row.captured_output_energy is None for row in rows):
        notes.append("–: unknown; both would take too long here")
    return notes


def check_plot_path(path: Path) -> None:
    """RequestError unless a plot can be written there.

    >>> check_plot_path(Path("spectrum.gif"))
    Traceback (most recent call last):
    kronpress.errors.RequestError: plot file 'spectrum.gif': its name has to end in .png, .svg or .pdf
    """
    if path.suffix.lower() not in PLOT_FORMATS:
        raise RequestError(
            f"plot file {str(path)!r}: its name has to end in {', '.join(PLOT_FORMATS[:-1])} or {PLOT_FORMATS[-1]}"
        )
    if not path.parent.is_dir():
        raise RequestError(f"plot file {str(path)!r}: there is no folder {str(path.parent)!r}")


def plot_spectrum(measured: Spectrum, path: Path) -> None:
    """Draw energies against kept parameters: a line of panels for each role, whose mean the curves are.

    The panels show the captured energy of W with chance dashed, how much of it is above chance, and the captured
    energy of the outputs if it was measured. Points are at the share; those of outputs are of the fit itself where it
    was made, and the curves are then what it captures at least.

    Raises:
        RequestError: the file's name does not end in one of PLOT_FORMATS, or its folder does not exist.
        WorkError: the file could not be written.
    """
    # Imported here because it looks for fonts, and writes a cache of them the first time.
    from matplotlib.figure import Figure

    check_plot_path(path)
    roles: dict[tuple[str, int, int], list[SpectrumCurve]] = {}
    for curve in measured.curves:
        roles.setdefault((curve.role, curve.out_features, curve.in_features), []).append(curve)
    has_outputs = any(curve.captured_output_energy for curve in measured.curves)
    num_columns = 3 if has_outputs else 2
    figure = Figure(figsize=(4.2 * num_columns, 3.5 * len(roles) + 0.7), layout="constrained")
    grid = figure.subplots(len(roles), num_columns, squeeze=False)
    handles: dict[str, Any] = {}
    for line, curves in zip(grid, roles.values(), strict=True):
        for axes in line:
            axes.axvline(measured.share, color="#cccccc", linewidth=1, zorder=0)
            axes.set(xlim=(0, 1), xlabel="fraction of parameters kept")
            axes.grid(alpha=0.25)
        for curve in curves:
            label = _label(curve.structure, curve.right_shape)
            handles[label] = _draw(line, curve, _rows_of(curve, measured.rows), *_STYLES[label])
        role = curves[0]
        mean = f", mean of {role.num_matrices}" if role.num_matrices > 1 else ""
        name = f"{role.role.rpartition('*.')[-1]}, {role.out_features}×{role.in_features}{mean}"
        line[0].set_title(name, fontsize=10, loc="left")
        line[0].set(ylim=(0, 1), ylabel="energy of W captured")
        line[1].set_ylabel("the same, above chance")
        if has_outputs:
            line[2].set(ylim=(0, 1), ylabel="energy of outputs captured")
    (handles[_CHANCE],) = grid[0][0].plot([], [], color="black", linewidth=0.9, linestyle="--")
    labels = [label for label in [*_STYLES, _CHANCE] if label in handles]
    figure.legend([handles[label] for label in labels], labels, loc="outside lower center", ncols=5, fontsize=9)
    try:
        figure.savefig(path, dpi=100)
    except OSError as error:
        raise WorkError(f"could not write {str(path)!r}: {error}") from error


def _draw(line: Any, curve: SpectrumCurve, rows: list[SpectrumRow], colour: str, marker: str) -> Any:
    """Draw one structure into a role's panels; returns what stands for it in the legend."""
    kept = [0.0, *curve.kept_fraction]
    kept_at_share = rows[0].kept_fraction

    def draw(axes: Any, values: list[float], at_share: float) -> Any:
        axes.plot(kept[: len(values) + 1], [0.0, *values], color=colour, linewidth=1.4)
        return axes.plot([kept_at_share], [at_share], color=colour, linewidth=1.4, marker=marker, markersize=7)[0]

    captured = fmean(row.captured_energy for row in rows)
    above = [energy - chance for energy, chance in zip(curve.captured_energy, curve.chance, strict=True)]
    line[0].plot(kept, [0.0, *curve.chance], color=colour, linewidth=0.9, linestyle="--")
    handle = draw(line[0], curve.captured_energy, captured)
    draw(line[1], above, captured - rows[0].chance)
    outputs = [row.captured_output_energy for row in rows if row.captured_output_energy is not None]
    if len(outputs) == len(rows):
        draw(line[2], curve.captured_output_energy, fmean(outputs))
    return handle


def _rows_of(curve: SpectrumCurve, rows: list[SpectrumRow]) -> list[SpectrumRow]:
    """The rows of the matrices that the curve is the mean of."""
    kind = (curve.role, curve.out_features, curve.in_features, curve.structure, curve.right_shape)
    return [
        row
        for row in rows
        if (role_of(row.name), row.out_features, row.in_features, row.structure, row.right_shape) == kind
    ]


def _label(structure: str, right_shape: Shape) -> str:
    if structure == "low_rank":
        return "low rank"
    m2, n2 = right_shape
    return f"B {m2}×{n2}" if right_shape in RIGHT_SHAPES else "balanced B"
