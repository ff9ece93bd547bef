"""What people are shown, generated from plans, layer reports and results.json alone."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from kronpress.compression import LayerReport
from kronpress.healing import HealingRow
from kronpress.planning import Plan


def results_table(results: dict[str, Any]) -> Table:
    """One row for each measured model, dense first; one section for each test text."""
    sets = results["rows"][0]["metrics"]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), caption_justify="left")
    table.add_column("model")
    for title in ("parameters", "MB", "perplexity", "bits/byte"):
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
                f"{figures['perplexity']:.2f}",
                f"{figures['bits_per_byte']:.4f}",
            )
    table.caption = "\n".join(f"{name}: {_protocol(figures)}" for name, figures in sets.items())
    return table


def _protocol(figures: dict[str, Any]) -> str:
    bos = ", BOS" if figures["bos"] else ""
    return (
        f"protocol {figures['protocol']}, window {figures['window']}, stride {figures['stride']}{bos}; "
        f"{figures['num_tokens']:,} tokens"
    )


def plan_tables(plan: Plan) -> list[Table]:
    """The totals, then the replaced layers, equal ones in one row."""
    totals = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for title in ("", "dense", "compressed", "kept"):
        totals.add_column(title, justify="left" if not title else "right")
    for title, dense, compressed in [
        ("parameters", plan.num_params_dense, plan.num_params),
        ("  of the targets", plan.num_params_targets_dense, plan.num_params_targets),
        (f"bytes ({plan.dtype})", plan.bytes_dense, plan.bytes),
        ("FLOPs per token", plan.flops_per_token_dense, plan.flops_per_token),
    ]:
        totals.add_row(title, f"{dense:,}", f"{compressed:,}", f"{compressed / dense:.4f}")

    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, layer in plan.layers.items():
        groups.setdefault((layer.out_features, layer.in_features, layer.structure, layer.spec), []).append(name)
    layers = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for title, justify in [("layers", "right"), ("first", "left"), ("shape", "right"), ("becomes", "left")]:
        layers.add_column(title, justify=justify)  # type: ignore[arg-type]
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


def evaluation_table(name: str, metrics: dict[str, dict[str, Any]]) -> Table:
    """One model on several texts."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), title=name, title_justify="left")
    table.add_column("text")
    for title in ("perplexity", "bits/byte", "tokens", "protocol"):
        table.add_column(title, justify="right")
    for text, figures in metrics.items():
        protocol = f"{figures['protocol']} {figures['window']}/{figures['stride']}{', BOS' if figures['bos'] else ''}"
        table.add_row(
            text,
            f"{figures['perplexity']:.3f}",
            f"{figures['bits_per_byte']:.4f}",
            f"{figures['num_tokens']:,}",
            protocol,
        )
    return table


def healing_line(row: HealingRow) -> str:
    """One line of progress, under 80 columns."""
    left = f"{int(row.seconds_left) // 60}:{int(row.seconds_left) % 60:02d}"
    terms = f"lm {row.language_model_nats:.3f}"
    if row.distillation_nats is not None:
        terms += f", kl {row.distillation_nats:.3f}"
    return (
        f"  step {row.step}/{row.num_steps}  {terms}  rate {row.learning_rate:.1e}  "
        f"{row.tokens_per_second:,.0f} tok/s  {left} left"
    )
