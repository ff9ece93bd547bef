"""What people are shown, generated from plans, layer reports and results.json alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from kronpress.benchmark import Benchmark, ModelBenchmark, Spread
from kronpress.compression import LayerReport
from kronpress.errors import RequestError
from kronpress.healing import HealingRow
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
        sizes = ", ".join(
            "×".join(map(str, value)) if isinstance(value, tuple) else f"{field} {value}" for field, value in spec
        )
        layers.add_row(str(len(names)), names[0], f"{out_features}×{in_features}", f"{structure} {sizes}")
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


def benchmark_table(result: Benchmark) -> Table:
    """Speed, sizes and memory of one model, or of two side by side with the ratio of their speeds."""
    comparison = result.comparison
    models = [result.model] if comparison is None else [result.model, comparison.against]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), caption_justify="left")
    table.add_column("")
    for title in ("model", "against", "speedup", "bound")[: 1 if comparison is None else 4]:
        table.add_column(title, justify="right")
    for kind in ("decode", "prefill"):
        spreads, bound = [getattr(model, kind).tokens_per_second for model in models], []
        if comparison is not None:
            ratio = getattr(comparison, kind)
            spreads, bound = [*spreads, ratio.spread], [_three_digits(ratio.bound)]
        table.add_row(f"{kind}, tokens/s", *(_three_digits(spread.median) for spread in spreads), *bound)
        table.add_row("  quartiles", *map(_quartiles, spreads))
    table.add_section()
    for title, figure in _BENCHMARK_ROWS.items():
        table.add_row(title, *map(figure, models))
    table.caption = "\n".join(
        [
            *(f"{title}: {model.name}" for title, model in zip(("model", "against"), models, strict=False)),
            f"{result.prompt_tokens} prompt and {result.new_tokens} new tokens, batch {result.batch_size}, "
            f"{result.dtype}; median of {result.rounds} rounds",
            f"{result.machine.cpu}, {result.machine.threads} threads; device {result.machine.device}",
            ", ".join(f"{package} {number}" for package, number in result.versions.items()),
        ]
    )
    return table


_BENCHMARK_ROWS: dict[str, Callable[[ModelBenchmark], str]] = {
    "parameters": lambda model: f"{model.sizes.num_params:,}",
    "parameters, MB": lambda model: f"{model.sizes.num_bytes / 1e6:,.2f}",
    "peak memory, MB": lambda model: _megabytes(model.memory.peak_bytes),
    "loading, s": lambda model: f"{model.memory.load_seconds:.2f}",
}


def _three_digits(figure: float) -> str:
    """At least three significant digits: 1.23, 12.3, 123 or 12,345."""
    return f"{figure:,.{0 if figure >= 100 else 1 if figure >= 10 else 2}f}"


def _quartiles(spread: Spread) -> str:
    return f"{_three_digits(spread.first_quartile)}–{_three_digits(spread.third_quartile)}"


def _megabytes(num_bytes: int | None) -> str:
    return "–" if num_bytes is None else f"{num_bytes / 1e6:,.2f}"


def healing_line(row: HealingRow) -> str:
    """One line of progress, under 80 columns unless inner layers are distilled."""
    left = f"{int(row.seconds_left) // 60}:{int(row.seconds_left) % 60:02d}"
    terms = f"lm {row.language_model_nats:.3f}"
    others = {
        "kl": row.distillation_nats,
        "emb": row.embedding_mse,
        "attn": row.attention_nats,
        "hid": row.hidden_mse,
    }
    terms += "".join(f", {name} {value:.3f}" for name, value in others.items() if value is not None)
    return (
        f"  step {row.step}/{row.num_steps}  {terms}  rate {row.learning_rate:.1e}  "
        f"{row.tokens_per_second:,.0f} tok/s  {left} left"
    )
