"""Charts as data: what is drawn, what each point says, and the same figures as a table.

Nothing here knows the library that draws: a page turns series into its traces, in the colours of its theme.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kronpress.reporting.results import Model, digits, megabytes

# A page stays small, and a line has no more points than a screen has columns.
MOST_POINTS = 800
MOST_TABLE_ROWS = 60
# Every protocol has it.
MEASURE = "perplexity"


@dataclass(frozen=True)
class Table:
    """Column titles, and rows of cells as they are read; `sort_keys` has what each cell is sorted by."""

    columns: list[str]
    rows: list[list[str]]
    sort_keys: list[list[float | str | None]] = field(default_factory=list)
    note: str = ""


@dataclass(frozen=True)
class Series:
    """Points of one colour. `texts` is what each says; `filled` tells which markers are full, all if empty.

    `colour` is a number: series of one number have one colour. `low` and `high` end a bar through each point, where
    they are not None. `is_line` draws no markers.
    """

    name: str
    colour: int
    x: list[float]
    y: list[float]
    texts: list[str]
    filled: list[bool] = field(default_factory=list)
    low: list[float | None] = field(default_factory=list)
    high: list[float | None] = field(default_factory=list)
    is_line: bool = False
    is_dashed: bool = False
    with_line: bool = True


@dataclass(frozen=True)
class View:
    """One picture of a chart."""

    x_title: str
    y_title: str
    series: list[Series]
    x_is_log: bool = False
    y_is_log: bool = False
    y_range: tuple[float, float] | None = None
    x_categories: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Chart:
    """Pictures of one kind, and the controls by which one is chosen.

    `controls` has the choices of each control by its name; `views` the picture for each combination of choices,
    joined by `|` in the controls' order; of a chart without controls the one under the empty string.
    """

    name: str
    title: str
    remark: str
    controls: dict[str, list[str]]
    views: dict[str, View]
    table: Table

    def drawn(self) -> dict[str, Any]:
        """What the page needs in order to draw it."""
        return {"controls": list(self.controls), "views": {key: asdict(view) for key, view in self.views.items()}}


def thinned(length: int, most: int) -> list[int]:
    """At most `most` of the indices below `length`, evenly spaced, the first and the last among them.

    >>> thinned(5, 3), thinned(2, 3)
    ([0, 2, 4], [0, 1])
    """
    if length <= most:
        return list(range(length))
    return [index * (length - 1) // (most - 1) for index in range(most)]


# ---- healing ----

_TERMS = {
    "language_model_nats": "cross-entropy, nats per token",
    "distillation_nats": "KL(teacher ‖ student), nats",
    "reverse_distillation_nats": "KL(student ‖ teacher), nats",
    "jensen_shannon_nats": "Jensen-Shannon, nats",
    "embedding_mse": "embedding, mean squared difference",
    "attention_nats": "attention maps, nats",
    "hidden_mse": "hidden states, mean squared difference",
    "validation_nats": "validation text, nats per token",
    "learning_rate": "learning rate",
}


def healing_chart(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Chart | None:
    """Each term of the loss against the steps, a line for each model; None if nothing was trained.

    Args:
        logs: rows of the healing log by model, `step` counted through all stages.
    """
    logs = {name: rows for name, rows in logs.items() if rows}
    if not logs:
        return None
    views = {}
    for term, title in _TERMS.items():
        series = []
        for colour, (name, rows) in enumerate(logs.items(), start=1):
            known = [row for row in rows if row.get(term) is not None]
            kept = [known[index] for index in thinned(len(known), MOST_POINTS)]
            if kept:
                series.append(
                    Series(
                        name=name,
                        colour=colour,
                        x=[row["step"] for row in kept],
                        y=[row[term] for row in kept],
                        texts=[f"{name}, step {row['step']}: {digits(row[term], 4)}" for row in kept],
                        is_line=len(kept) > 24,
                    )
                )
        if series:
            is_small = term != "learning_rate" and all(value > 0 for each in series for value in each.y)
            views[title] = View("optimiser step", title, series, y_is_log=is_small)
    terms = {title: term for term, title in _TERMS.items() if title in views}
    cells: list[list[str]] = []
    keys: list[list[float | str | None]] = []
    for name, log in logs.items():
        for index in thinned(len(log), MOST_TABLE_ROWS):
            values = [log[index].get(term) for term in terms.values()]
            cells.append([name, str(log[index]["step"]), *(digits(value, 4) for value in values)])
            keys.append([name, log[index]["step"], *values])
    note = "" if all(len(log) <= MOST_TABLE_ROWS for log in logs.values()) else "Some of the rows, evenly spaced."
    return Chart(
        name="healing",
        title="Healing",
        remark="Means over the steps between two points of the log.",
        controls={"Show": list(views)},
        views=views,
        table=Table(["model", "step", *terms], cells, keys, note),
    )


# ---- energy ----


def energy_chart(layers: Mapping[str, Mapping[str, Any]], chance: Mapping[str, float | None]) -> Chart | None:
    """The energy that each matrix's structure captured beside chance; None without figures of chance."""
    known = [name for name in layers if chance.get(name) is not None]
    if not known:
        return None
    captured = [layers[name]["captured_energy"] for name in known]
    by_chance = [float(chance[name] or 0.0) for name in known]
    positions: list[float] = list(range(1, len(known) + 1))
    texts = [
        f"{name}: captured {digits(value)}, chance {digits(other)}"
        for name, value, other in zip(known, captured, by_chance, strict=True)
    ]
    series = [
        Series("captured", 1, positions, captured, texts, with_line=False),
        Series("chance", 0, positions, by_chance, texts, [False] * len(known), with_line=False),
    ]
    titles = "matrix, in the model's order", "fraction of ‖W‖²"
    left_out = len(layers) - len(known)
    remark = (
        "The fraction of ‖W‖² that the structure captured, beside what the same structure and sizes capture of one "
        "Gaussian matrix. A fit to real inputs may capture less of W and still lose less."
    )
    if left_out:
        remark += f" Of {left_out} matrices chance is not known: their structures are slow to fit to a Gaussian matrix."
    return Chart(
        name="energy",
        title="Captured energy against chance",
        remark=remark,
        controls={"Axis": ["from 0 to 1", "close up"]},
        views={
            "from 0 to 1": View(*titles, series, x_categories=known, y_range=(0, 1.02)),
            "close up": View(*titles, series, x_categories=known),
        },
        table=Table(
            ["matrix", "captured", "chance", "difference"],
            [[n, digits(c), digits(b), digits(c - b)] for n, c, b in zip(known, captured, by_chance, strict=True)],
            [[n, c, b, c - b] for n, c, b in zip(known, captured, by_chance, strict=True)],
        ),
    )


# ---- quality ----


def size_chart(found: Sequence[Model]) -> Chart:
    """Perplexity against parameters, bytes or FLOPs per token, one series for each model before and after training."""
    across: dict[str, Callable[[Model], float]] = {
        "parameters": lambda model: model.num_params,
        "megabytes": lambda model: model.num_bytes / 1e6,
        "FLOPs per token": lambda model: model.flops_per_token,
    }
    views = {
        f"{name}|{data}": _quality_view(name, values, found, data)
        for name, values in across.items()
        for data in found[0].metrics
    }
    return Chart(
        name="size",
        title="Size and quality",
        remark="Down and to the left is better. Open markers: before healing.",
        controls={"Size": list(across), "Text": list(found[0].metrics)},
        views=views,
        table=models_table(found),
    )


def speed_chart(found: Sequence[Model]) -> Chart | None:
    """Perplexity against the speed of decoding, of those models whose speed was measured; None if none was."""
    known = [model for model in found if model.speedup is not None]
    if all(model.base == "dense" for model in known):
        return None
    views = {
        data: _quality_view("speed of decoding, dense = 1", lambda model: model.speedup or 0.0, known, data)
        for data in found[0].metrics
    }
    unknown = sorted({model.base for model in found if model.speedup is None and model.role != "stage"})
    remark = (
        "Down and to the right is better. Tokens per second of one sequence, as a ratio to the dense model measured in "
        "turns with it; the median of a few short rounds: kronpress bench measures at length."
    )
    if unknown:
        remark += f" Without a speed of their own: {'; '.join(unknown)}."
    rows, keys = [], []
    for model in known:
        speed = model.speed
        ours = speed["tokens_per_second"]["median"] if speed else None
        theirs = speed["dense_tokens_per_second"]["median"] if speed else None
        quartiles = (
            f"{digits(speed['speedup']['first_quartile'])} to {digits(speed['speedup']['third_quartile'])}"
            if speed
            else "–"
        )
        bound = speed["bound"] if speed else None
        rows.append([model.name, digits(model.speedup), quartiles, digits(bound), digits(ours), digits(theirs)])
        keys.append([model.name, model.speedup, model.speedup, bound, ours, theirs])
    columns = ["model", "times as fast", "quartiles", "bound by bytes read", "tokens/s", "dense in its turns, tokens/s"]
    return Chart(
        name="speed",
        title="Speed and quality",
        remark=remark,
        controls={"Text": list(found[0].metrics)},
        views=views,
        table=Table(columns, rows, keys),
    )


def _quality_view(x_title: str, values: Callable[[Model], float], found: Sequence[Model], data: str) -> View:
    series = []
    bases = list(dict.fromkeys(model.base for model in found))
    for colour, base in enumerate(bases):
        own = [model for model in found if model.base == base]
        series.append(
            Series(
                name=base,
                colour=colour,
                x=[values(model) for model in own],
                y=[model.metrics[data][MEASURE] for model in own],
                texts=[
                    f"{model.name}: {digits(values(model))} {x_title}, {MEASURE} {digits(model.metrics[data][MEASURE])}"
                    for model in own
                ],
                filled=[model.is_trained or model.role == "dense" or len(own) == 1 for model in own],
            )
        )
    return View(x_title, f"{MEASURE} on {data}", series, y_is_log=True)


def models_table(found: Sequence[Model]) -> Table:
    """Sizes and quality of all models; speeds where they are known."""
    dense = found[0]
    data = list(dense.metrics)
    with_speed = any(model.speed is not None for model in found)
    columns = ["model", "parameters", "of dense", "size", "FLOPs/token", *(f"{MEASURE}, {name}" for name in data)]
    rows, keys = [], []
    for model in found:
        values: list[float | None] = [model.metrics[name][MEASURE] for name in data]
        row = [
            model.name,
            f"{model.num_params:,}",
            digits(model.num_params / dense.num_params),
            megabytes(model.num_bytes),
            digits(model.flops_per_token),
            *(digits(value) for value in values),
        ]
        key = [
            model.name,
            model.num_params,
            model.num_params / dense.num_params,
            model.num_bytes,
            model.flops_per_token,
            *values,
        ]
        if with_speed:
            row.append(digits(model.speedup))
            key.append(model.speedup)
        rows.append(row)
        keys.append(key)
    return Table([*columns, "times as fast"] if with_speed else columns, rows, keys)
