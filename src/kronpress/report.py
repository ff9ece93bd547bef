"""What people are shown, generated from plans, layer reports and results.json alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from kronpress.benchmark import Benchmark, ModelBenchmark, Speedup, Spread, Timing, Ways
from kronpress.compression import LayerReport
from kronpress.errors import RequestError
from kronpress.healing import BlockReport, HealingRow
from kronpress.plan import Plan

# What is shown of an evaluation, by protocol: the figures that compare models, and what a single model has besides.
_FIGURES: dict[str, tuple[list[str], list[str]]] = {
    "window": (["perplexity", "bits_per_byte"], ["word_perplexity", "num_tokens"]),
    "krony": (["perplexity"], ["num_tokens"]),
    "lambada-last-word": (["accuracy", "perplexity"], ["num_words"]),
}
_TITLES_AND_FORMATS = {
    "perplexity": ("perplexity", ".2f"),
    "word_perplexity": ("word\nperplexity", ".2f"),
    "bits_per_byte": ("bits/byte", ".4f"),
    "accuracy": ("accuracy", ".4f"),
    "num_tokens": ("tokens", ","),
    "num_words": ("words", ","),
}


def results_table(results: dict[str, Any]) -> Table:
    """One row for each measured model, dense first; one section for each test text.

    Raises:
        RequestError: the rows were measured under different protocols, whose figures no column may mix.
    """
    sets = results["rows"][0]["metrics"]
    protocols = {_protocol(figures): figures for row in results["rows"] for figures in row["metrics"].values()}
    if len(protocols) > 1:
        raise RequestError(f"figures of different protocols do not go into one table: {'; '.join(protocols)}")
    names = [name for figures in protocols.values() for name in _FIGURES[figures["protocol"]][0]]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), caption_justify="left")
    table.add_column("model")
    for title in ("parameters", "MB", *_titles(names)):
        table.add_column(title, justify="right")
    for name in sets:
        if len(sets) > 1:
            table.add_section()
            table.add_row(f"on {name}")
        for row in results["rows"]:
            figures = row["metrics"][name]
            table.add_row(
                row["name"],
                f"{row['num_params']:,}",
                f"{row['bytes'] / 1e6:.2f}",
                *_cells(figures, names),
            )
    table.caption = "\n".join(
        f"{name}: {_protocol(figures)}; {figures['num_tokens']:,} tokens" for name, figures in sets.items()
    )
    return table


def _titles(names: list[str]) -> list[str]:
    return [_TITLES_AND_FORMATS[name][0] for name in names]


def _cells(figures: dict[str, Any], names: list[str]) -> list[str]:
    return ["–" if figures[name] is None else f"{figures[name]:{_TITLES_AND_FORMATS[name][1]}}" for name in names]


def _protocol(figures: dict[str, Any]) -> str:
    stride = "" if figures["stride"] is None else f", stride {figures['stride']}"
    bos = ", BOS" if figures["bos"] else ""
    return f"protocol {figures['protocol']}, window {figures['window']}{stride}{bos}"


def plan_tables(plan: Plan) -> list[Table]:
    """The totals, then the replaced layers, equal ones in one row."""
    totals = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for title in ("", "dense", "compressed", "kept"):
        totals.add_column(title, justify="left" if not title else "right")
    lines = [
        ("parameters", plan.num_params_dense, plan.num_params),
        ("  of the targets", plan.num_params_targets_dense, plan.num_params_targets),
        (f"bytes ({plan.dtype})", plan.bytes_dense, plan.bytes),
        ("FLOPs per token", plan.flops_per_token_dense, plan.flops_per_token),
    ]
    if plan.num_params_untied:
        without = plan.num_params - plan.num_params_untied
        lines.insert(1, ("  without the untied head", plan.num_params_dense, without))
    for title, dense, compressed in lines:
        totals.add_row(title, f"{dense:,}", f"{compressed:,}", f"{compressed / dense:.4f}")

    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, layer in plan.layers.items():
        groups.setdefault((layer.out_features, layer.in_features, layer.structure, layer.spec), []).append(name)
    layers = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for title, justify in [("layers", "right"), ("first", "left"), ("shape", "right"), ("becomes", "left")]:
        layers.add_column(title, justify=justify, no_wrap=title == "first")  # type: ignore[arg-type]
    for (out_features, in_features, structure, spec), names in groups.items():
        shape = f"{out_features}×{in_features}"
        layers.add_row(str(len(names)), names[0], shape, f"{structure} {_sizes(spec)}")
    return [totals, layers]


def layers_table(layers: dict[str, LayerReport]) -> Table:
    """How near each fitted layer came to the dense one."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("layer")
    for title in ("relative\nerror", "captured\nenergy", "kept\nfraction", "parameters"):
        table.add_column(title, justify="right")
    for name, report in layers.items():
        figures = (report.relative_error, report.captured_energy, report.kept_fraction)
        table.add_row(name, *(f"{figure:.4f}" for figure in figures), f"{report.num_params:,}")
    return table


def evaluation_tables(name: str, metrics: dict[str, dict[str, Any]]) -> list[Table]:
    """One model on several texts: a table for each protocol, and for each window, stride and BOS of it."""
    tables: dict[str, Table] = {}
    for text, figures in metrics.items():
        names = [each for part in _FIGURES[figures["protocol"]] for each in part]
        protocol = _protocol(figures)
        if protocol not in tables:
            tables[protocol] = _titled_table(f"{name}\n{protocol}", ["text", *_titles(names)])
        tables[protocol].add_row(text, *_cells(figures, names))
    return list(tables.values())


def tasks_table(name: str, tasks: dict[str, dict[str, Any]]) -> Table:
    """The metrics of lm-evaluation-harness for one model."""
    (release,) = {figures["lm_eval_version"] for figures in tasks.values()}
    titles = ["task", "version", "shots", "samples", "metric", "value"]
    table = _titled_table(f"{name}\nprotocol lm-eval {release}", titles)
    for task, figures in tasks.items():
        settings = [figures[key] for key in ("task_version", "num_fewshot", "num_samples")]  # None for a group
        for metric, value in figures["metrics"].items():
            table.add_row(task, *("–" if each is None else str(each) for each in settings), metric, f"{value:.4f}")
    return table


def _titled_table(title: str, columns: list[str]) -> Table:
    """With texts on the left of the first column and figures on the right of the others."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def benchmark_tables(result: Benchmark) -> list[Table]:
    """Speeds at each work, one row for each model with the ratio to the reference; then sizes and memory."""
    tables = [_speed_table(result, number) for number in range(len(result.works))]
    sizes = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left")
    sizes.add_column("MB, but for the\nfirst and the last", no_wrap=True)
    for title in ("parameters", "computed\nwith", "on\ndisk", "peak", "peak,\nrunning", "load-\ning, s"):
        sizes.add_column(title, justify="right")
    for model in result.models:
        memory = model.memory
        sizes.add_row(
            _contender(result, model),
            f"{model.sizes.num_params:,}",
            _megabytes(model.sizes.num_bytes),
            _megabytes(model.disk_bytes),
            _megabytes(memory.peak_bytes if memory else None),
            _megabytes(memory.running_peak_bytes if memory else None),
            "–" if memory is None or memory.load_seconds is None else f"{memory.load_seconds:.2f}",
        )
    names = {model.kind: (model.name, model.recipe) for model in result.models}
    dtypes = " and ".join(dict.fromkeys(model.dtype for model in result.models))
    sizes.caption = "\n".join(
        [
            *(f"{kind}: {name}{f', {recipe}' if recipe else ''}" for kind, (name, recipe) in names.items()),
            *(["random weights"] if result.random_weights else []),
            *(["blocks compiled, those of rivals not"] if any(model.is_compiled for model in result.models) else []),
            *(["dense weights may be kept"] if result.dense_cache else []),
            f"{dtypes}; median and quartiles of {result.rounds} rounds",
            f"memory: {result.memory_work}",
            f"{result.machine.cpu}, {result.machine.threads} threads; device {result.machine.device}",
            ", ".join(f"{package} {number}" for package, number in result.versions.items()),
        ]
    )
    ways = [
        _ways_table(f"{_contender(result, model)}: ways of {each.num_tokens} tokens at once", each)
        for model in result.models
        for each in model.ways or ()
    ]
    return [*ways, *tables, sizes]


def _ways_table(title: str, ways: Ways) -> Table:
    """One row for all layers that are alike."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for layer in ways.layers:
        sizes = f"{layer.shape[0]}×{layer.shape[1]} {layer.structure} {_sizes(layer.spec.items())}"
        groups.setdefault((sizes, layer.way, layer.reason), []).append(layer.name)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), title=title, title_justify="left")
    for column, justify in [("layers", "right"), ("first, and what it is", "left"), ("way, and why", "left")]:
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for (sizes, way, reason), names in groups.items():
        table.add_row(str(len(names)), f"{names[0]}\n{sizes}", f"{way}\n{reason}")
    return table


def _sizes(spec: Iterable[tuple[str, Any]]) -> str:
    """The sizes of a structure, those of a sum part after part."""
    return ", ".join(
        _parts(value) if field == "parts" else _size(field, value)
        for field, value in spec
        if value is not None and not isinstance(value, bool)
    )


def _size(field: str, value: Any) -> str:
    return "×".join(map(str, value)) if isinstance(value, tuple | list) else f"{field} {value}"


def _parts(parts: Iterable[Any]) -> str:
    told = (dict(part) for part in parts)
    return " + ".join(f"{part['structure']} {_sizes(dict(part['spec']).items())}" for part in told)


def _speed_table(result: Benchmark, number: int) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), title=str(result.works[number]), title_justify="left")
    table.add_column("")
    compared = [] if result.reference is None else ["speedup", "bound"]
    for column in ("tokens/s", "ms/token", *compared):
        table.add_column(column, justify="right")
    for kind in ("decode", "prefill"):
        table.add_section()
        table.add_row(kind)
        for model in result.models:
            measured = model.measured[number]
            timing: Timing = getattr(measured, kind)
            spreads = [timing.tokens_per_second, _in_milliseconds(timing.seconds_per_token)]
            bounds = []
            if measured.comparison is not None:
                speedup: Speedup = getattr(measured.comparison, kind)
                spreads.append(speedup.spread)
                bounds.append("–" if speedup.bound is None else _three_digits(speedup.bound))
            medians = [_three_digits(spread.median) for spread in spreads]
            table.add_row(f"  {_contender(result, model)}", *medians, *bounds)
            table.add_row("", *map(_quartiles, spreads))
    return table


def _contender(result: Benchmark, model: ModelBenchmark) -> str:
    """What a row is called: its kind, and its dtype where there are several."""
    return model.kind if len({each.dtype for each in result.models}) == 1 else f"{model.kind} {model.dtype}"


def _in_milliseconds(seconds: Spread) -> Spread:
    return Spread(**{name: 1e3 * value for name, value in seconds.model_dump().items()})


def _three_digits(figure: float) -> str:
    """At least three significant digits: 1.23, 12.3, 123 or 12,345."""
    return f"{figure:,.{0 if figure >= 100 else 1 if figure >= 10 else 2}f}"


def _quartiles(spread: Spread) -> str:
    return f"{_three_digits(spread.first_quartile)}–{_three_digits(spread.third_quartile)}"


def _megabytes(num_bytes: int | None) -> str:
    return "–" if num_bytes is None else _three_digits(num_bytes / 1e6)


def block_line(report: BlockReport) -> str:
    """One line of progress of a reconstruction."""
    errors = f"{report.relative_error_before:.4f} to {report.relative_error_after:.4f}"
    return f"  block {report.block}  relative error {errors}  {report.seconds:.1f} s"


def healing_line(row: HealingRow) -> str:
    """One line of progress: the terms, the validation perplexity where it was measured, the speed and the time left.

    Under 80 columns for two terms between measurements.
    """
    left = f"{int(row.seconds_left) // 60}:{int(row.seconds_left) % 60:02d}"
    terms = f"lm {row.language_model_nats:.3f}"
    others = {
        "kl": row.distillation_nats,
        "reverse kl": row.reverse_distillation_nats,
        "js": row.jensen_shannon_nats,
        "emb": row.embedding_mse,
        "attn": row.attention_nats,
        "hid": row.hidden_mse,
    }
    terms += "".join(f", {name} {value:.3f}" for name, value in others.items() if value is not None)
    if row.validation_nats is not None:
        terms += f"  validation perplexity {math.exp(min(row.validation_nats, 700.0)):.2f}"
    if row.skipped_steps:
        terms += f"  {row.skipped_steps} skipped"
    return (
        f"  step {row.step}/{row.num_steps}  {terms}  rate {row.learning_rate:.1e}  "
        f"{row.tokens_per_second:,.0f} tok/s  {left} left"
    )
