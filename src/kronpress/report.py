"""What people are shown, generated from plans, layer reports and results.json alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from kronpress.benchmark import Benchmark, ModelBenchmark, Speedup, Spread, Timing, Ways
from kronpress.chat import Answer, printable
from kronpress.compression import LayerReport
from kronpress.doctor import Diagnosis
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

# Of a text in the first column of a table; paths may have any length.
LONGEST_LABEL = 24
# A word and what is behind it; a quoted path is one word, whatever is in it.
_WORD = re.compile(r"""(?:(?<!\S)(?:'[^'\n]*/[^'\n]*'|"[^"\n]*/[^"\n]*")\S*|\S+)\s*""")


def wrapped(text: str, width: int) -> str:
    """The text in lines of at most `width` columns where words allow it: none is broken, and a path is one word.

    >>> print(wrapped("  the sums are in '/a folder/with spaces' now", 32))
      the sums are in
        '/a folder/with spaces' now
    """
    lines = []
    for line in text.split("\n"):
        indent = line[: len(line) - len(line.lstrip())]
        words = _WORD.findall(line[len(indent) :]) if cell_len(line) > width else [line[len(indent) :]]
        lines.append(indent)
        for word in words:
            if lines[-1].strip() and cell_len(lines[-1] + word.rstrip()) > width:
                lines.append(f"{indent}  ")
            lines[-1] += word
    return "\n".join(line.rstrip() for line in lines)


def fit_(table: Table, width: int) -> None:
    """Let the table show every figure and name whole, within `width` columns as far as they allow it.

    Rich would cut words where there is no room. Here texts are wrapped between words, then the table's own blanks
    become fewer, and then it is wider.
    """
    least = 1 + len(table.columns)
    for column in table.columns:
        cells = [line for cell in (column.header, *column.cells) for line in str(cell).split("\n")]
        # The blanks that a line begins with stay with its first word.
        pieces = cells if column.no_wrap else [word for line in cells for word in re.findall(r"^\s*\S+|\S+", line)]
        column.min_width = max(map(cell_len, pieces), default=0)
        least += column.min_width
    if least + 2 * len(table.columns) > width:
        table.padding = (0, 1, 0, 0)
    for part in ("title", "caption"):
        if getattr(table, part):
            setattr(table, part, wrapped(str(getattr(table, part)), width))


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
    labels, notes = _short_names(sets)
    for name in sets:
        if len(sets) > 1:
            table.add_section()
            table.add_row(f"on {labels[name]}")
        for row in results["rows"]:
            figures = row["metrics"][name]
            table.add_row(
                row["name"],
                f"{row['num_params']:,}",
                f"{row['bytes'] / 1e6:.2f}",
                *_cells(figures, names),
            )
    protocols_of = [f"{labels[name]}: {_protocol(sets[name])}; {sets[name]['num_tokens']:,} tokens" for name in sets]
    table.caption = "\n".join([*notes, *protocols_of])
    return table


def _short_names(names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """What a table calls each text, and the lines below it that say what long names stand for."""
    labels: dict[str, str] = {}
    notes: list[str] = []
    for name in names:
        labels[name] = name
        if cell_len(name) > LONGEST_LABEL:
            labels[name] = f"({len(notes) + 1})"
            notes.append(f"{labels[name]} {name}")
    return labels, notes


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
    labels, notes = _short_names(metrics)
    for text, figures in metrics.items():
        names = [each for part in _FIGURES[figures["protocol"]] for each in part]
        protocol = _protocol(figures)
        if protocol not in tables:
            tables[protocol] = _titled_table(f"{name}\n{protocol}", ["text", *_titles(names)])
        tables[protocol].add_row(labels[text], *_cells(figures, names))
    for table in tables.values():
        table.caption, table.caption_justify = "\n".join(notes), "left"
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


def doctor_tables(found: Diagnosis) -> list[Table]:
    """What is installed, the machine, what everything needs, and the fast ways: those that are off say what helps."""
    packages = Table(box=SIMPLE_HEAD, padding=(0, 1), title="installed", title_justify="left")
    for column in ("package", "version", "wanted", "for"):
        packages.add_column(column)
    for package in found.packages:
        extra = "" if not package.extra else f"pip install 'kronpress[{package.extra}]'"
        state = "–" if package.installed is None else f"{package.installed}{'' if package.fits else ' (does not fit)'}"
        use = package.purpose or extra or "everything"
        packages.add_row(package.name, state, package.wanted or "any", use)
    machine = _titled_table("machine", ["", ""])
    machine.columns[1].justify = "left"
    memory = [_gigabytes(each) for each in (found.memory_bytes, found.available_bytes)]
    for name, value in (
        ("kronpress", found.kronpress),
        ("system", f"{found.platform}, Python {found.python}"),
        ("processor", found.machine.cpu),
        ("", ", ".join(found.machine.instructions)),
        ("cores", f"{found.machine.cores}, {found.usable_cores} of them usable; torch uses {found.machine.threads}"),
        ("memory", f"{memory[0]}; {memory[1]} left for models on {found.machine.device}"),
        ("accelerator", "none" if found.machine.device == "cpu" else found.machine.device),
    ):
        machine.add_row(name, value)
    checks = Table(box=SIMPLE_HEAD, padding=(0, 1), title="what everything needs, tried", title_justify="left")
    for column in ("", "works", "what came out"):
        checks.add_column(column)
    for check in found.checks:
        checks.add_row(check.name, "yes" if check.works else "NO", check.told)
    paths = Table(box=SIMPLE_HEAD, padding=(0, 1), title="fast paths", title_justify="left")
    for column in ("", "on", "what was seen; what would switch it on"):
        paths.add_column(column)
    for path in found.fast_paths:
        helps = "" if path.switch_on is None else f"\n→ {path.switch_on}"
        paths.add_row(path.name, "yes" if path.is_on else "no", f"{path.told}{helps}")
    return [packages, machine, checks, paths]


def _gigabytes(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else f"{num_bytes / 1e9:.1f} GB"


def answer_columns(labels: Sequence[str], texts: Sequence[str], answers: Sequence[Answer], width: int) -> Table:
    """Texts of answers beside one another, and below each what it took, of those that are complete."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), width=width)
    for label in labels:
        table.add_column(label, ratio=1, overflow="fold")
    table.add_row(*(Text(printable(text)) for text in texts))
    if answers:
        table.add_section()
        table.add_row(*("\n".join(answer_figures(answer)) for answer in answers))
    return table


def answer_figures(answer: Answer) -> list[str]:
    """Speed and memory of one answer, a line each."""
    speed = "–" if answer.tokens_per_second is None else _three_digits(answer.tokens_per_second)
    stopped = {"end": "ended by itself", "length": "as many as asked for", "context": "the context is full"}
    return [
        f"{speed} tokens/s, {answer.new_tokens} new, {stopped[answer.stopped]}",
        f"prefill of {answer.prompt_tokens} tokens {_three_digits(1e3 * answer.prefill_seconds)} ms",
        f"weights {_megabytes(answer.weight_bytes)} MB in {answer.dtype}, peak {_megabytes(answer.peak_bytes)} MB",
    ]
