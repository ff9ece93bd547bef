"""report.html of one run, from the content of its results.json alone."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from kronpress.errors import WorkError
from kronpress.healing.checkpoints import write_whole
from kronpress.reporting.charts import (
    MEASURE,
    energy_chart,
    healing_chart,
    models_table,
    size_chart,
    speed_chart,
)
from kronpress.reporting.network_map import network_map
from kronpress.reporting.pages import page
from kronpress.reporting.results import (
    Model,
    digits,
    final_model,
    megabytes,
    millions,
    models,
    protocol,
    read_results,
    short_names,
)

REPORT = "report.html"
# Nats that have the full colour: of a token's loss, and of the difference between two models.
FULL_LOSS, FULL_DIFFERENCE = 10, 4


@dataclass(frozen=True)
class Card:
    title: str
    now: str
    beside: str


@dataclass(frozen=True)
class Verdict:
    """What came of the run: the sentence, its figures one by one, and the name of the model that they are of."""

    name: str
    sentence: str
    cards: list[Card]


def write_report(directory: Path, out: Path | None = None) -> Path:
    """Write the report of a run directory, or of a results.json, as `out` or report.html beside the results.

    Whatever was there before is there until the new one is whole.

    Raises:
        RequestError: there is no results.json of a run.
        WorkError: it is damaged or of a newer format, or the page cannot be written.
    """
    results = read_results(directory)
    out = out or (directory if directory.is_dir() else directory.parent) / REPORT
    try:
        write_whole(out, run_report(results))
    except OSError as error:
        raise WorkError(f"could not write {str(out)!r}: {error}; results.json is unchanged") from error
    return out


def run_report(results: Mapping[str, Any]) -> str:
    """The HTML document. What results of an older version do not have is left out, and named at its end."""
    found = _labelled(models(results))
    dense, compressed, final = found[0], _compressed(found), final_model(found)
    chance = results.get("chance", {})
    healing = healing_chart(healing_logs(results))
    energy = energy_chart(results["layers"], chance)
    speed = speed_chart(found) if results.get("speeds") else None
    passage = _passage(results, [dense, compressed, final])
    continuations = _continuations(results, [dense, compressed, final])
    sections = [
        ("models", "Models"),
        ("map", "Map"),
        *([("healing", "Healing")] if healing else []),
        *([("energy", "Energy")] if energy else []),
        ("quality", "Size and quality"),
        *([("speed", "Speed")] if speed else []),
        *([("continuations", "Continuations")] if continuations else []),
        *([("passage", "Loss of each token")] if passage else []),
        ("protocol", "How it was made"),
    ]
    return page(
        "run.html.j2",
        recipe_name=results["recipe"]["name"],
        model_name=_label(results["model"]["name"]),
        verdict=verdict(dense, final),
        sections=sections,
        all_models=models_table(found),
        protocols=[
            f"{MEASURE.capitalize()} on {name}: {protocol(figures)}; {figures['num_tokens']:,} tokens."
            for name, figures in dense.metrics.items()
        ],
        map=network_map(results["plan"], results["layers"], chance),
        healing=healing,
        energy=energy,
        size=size_chart(found),
        speed=speed,
        continuations=continuations,
        passage=passage,
        command=shlex.join(results["command"]) if results.get("command") else None,
        facts=_facts(results, final),
        remarks=_remarks(results, healing is not None),
        recipe_text=yaml.safe_dump(results["recipe"], sort_keys=False, allow_unicode=True, width=100),
    )


def _labelled(found: Sequence[Model]) -> list[Model]:
    """With short names of the test texts."""
    short = short_names(found[0].metrics)
    return [
        replace(model, metrics={short[name]: figures for name, figures in model.metrics.items()}) for model in found
    ]


def _label(name: str) -> str:
    return short_names([name])[name]


def _compressed(found: Sequence[Model]) -> Model:
    """What the recipe's last stage made, before it was healed; of a run of the dense model alone that."""
    return next((model for model in found if model.role == "main" and not model.is_trained), found[0])


def verdict(dense: Model, final: Model) -> Verdict:
    """The sentence and the cards: parameters, bytes, perplexity on every text, and speed if it was measured."""
    texts = list(dense.metrics)
    perplexities = {
        name: (digits(final.metrics[name][MEASURE]), digits(dense.metrics[name][MEASURE])) for name in texts
    }
    parts = [
        f"{final.num_params / dense.num_params:.1%} of the parameters",
        f"{final.num_bytes / dense.num_bytes:.1%} of the bytes",
        *(f"perplexity {ours} beside {theirs} on {name}" for name, (ours, theirs) in perplexities.items()),
    ]
    cards = [
        Card("Parameters", millions(final.num_params), f"dense {millions(dense.num_params)}"),
        Card("Bytes", megabytes(final.num_bytes), f"dense {megabytes(dense.num_bytes)}"),
        *(
            Card(f"Perplexity on {name}" if len(texts) > 1 else "Perplexity", ours, f"dense {theirs}, on {name}")
            for name, (ours, theirs) in perplexities.items()
        ),
    ]
    if final.speed is not None:
        speed = final.speed
        parts.append(f"{digits(final.speedup)} times as fast at decoding")
        cards.append(
            Card(
                "Speed of decoding",
                f"{digits(speed['tokens_per_second']['median'])} tokens/s",
                f"dense {digits(speed['dense_tokens_per_second']['median'])}; ratio {digits(final.speedup)}",
            )
        )
    return Verdict(final.name, f"{final.name}: {', '.join(parts)}.", cards)


def healing_logs(results: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows of every training, with steps counted through the stages of the recipe."""
    main: list[dict[str, Any]] = []
    before = 0
    for stage in [*results.get("stages", []), results]:
        log = stage.get("healing") or {"rows": [], "num_steps": 0}
        main += [{**row, "step": before + row["step"]} for row in log["rows"]]
        before += log["num_steps"]
    rows = [model for model in models(results) if model.role == "rival" and model.is_trained]
    trained = [rival for rival in results.get("rivals", []) if _is_trained(rival)]
    logs = {results["recipe"]["name"]: main}
    for model, rival in zip(rows, trained, strict=True):
        logs[model.name if model.base == "dense" else model.base] = rival["healing"]["rows"]
    return logs


def _is_trained(story: Mapping[str, Any]) -> bool:
    """Whether results.json has a row of what the training of this rival made of it."""
    return bool((story.get("healing") or {}).get("num_steps") or story.get("reconstruction"))


def _distinct(chosen: Sequence[Model]) -> list[Model]:
    return list({model.name: model for model in chosen}.values())


def _continuations(results: Mapping[str, Any], chosen: Sequence[Model]) -> list[dict[str, str]]:
    prompt = results.get("prompt", "")
    return [
        {"name": model.name, "prompt": prompt, "rest": model.continuation.removeprefix(prompt)}
        for model in _distinct(chosen)
        if model.continuation is not None
    ]


def _passage(results: Mapping[str, Any], chosen: Sequence[Model]) -> dict[str, Any] | None:
    """What the page colours a passage by: losses of the tokens under each model, and what one lost beside another."""
    passage = results.get("passage")
    chosen = [model for model in _distinct(chosen) if model.passage_nats is not None]
    if passage is None or not chosen:
        return None
    names = [model.name for model in chosen]
    nats = [[None if each is None else round(each, 4) for each in model.passage_nats or []] for model in chosen]
    known = [[each for each in of_model if each is not None] for of_model in nats]
    last = len(chosen) - 1
    differences = [(str(last) + "-0", f"{names[last]} less dense")] if last > 0 else []
    if last > 1:
        differences.append((f"{last}-1", f"{names[last]} less {names[1]}"))
    return {
        "data": _label(passage["data"]),
        "tokens": passage["tokens"],
        "choices": [*((str(index), name) for index, name in enumerate(names)), *differences],
        "loss": FULL_LOSS,
        "difference": FULL_DIFFERENCE,
        "means": "; ".join(
            f"{name} {sum(values) / len(values):.2f}" for name, values in zip(names, known, strict=True) if values
        ),
        "scale": {"models": names, "nats": nats, "loss": FULL_LOSS, "difference": FULL_DIFFERENCE},
    }


def _facts(results: Mapping[str, Any], final: Model) -> list[tuple[str, str]]:
    recipe, model = results["recipe"], results["model"]
    healing = results.get("healing") or {}
    facts = [
        ("Teacher", f"{model['name']}{_at(model.get('revision'))}, stored in {model['dtype']}"),
        ("Recipe", f"{recipe['name']}: {recipe.get('description') or 'no description'}"),
        ("Seed", str(results.get("seed", recipe.get("seed", "–")))),
        ("Test text", ", ".join(f"{name}{_at(revision)}" for name, revision in results.get("data", {}).items())),
        ("Protocol", "; ".join(f"{name}: {protocol(figures)}" for name, figures in final.metrics.items())),
    ]
    if healing.get("num_steps"):
        facts.append(("Healing", f"{healing['num_steps']:,} steps, {healing['tokens']:,} tokens"))
    facts += [
        ("Device", str(results.get("device", "–"))),
        ("Versions", ", ".join(f"{name} {number}" for name, number in results.get("versions", {}).items())),
    ]
    if results.get("resumed_at_steps"):
        facts.append(("Resumed at steps", ", ".join(map(str, results["resumed_at_steps"]))))
    if final.speed is not None:
        speed = final.speed
        facts.append(
            (
                "Speed",
                f"{speed['new_tokens']} tokens one by one after {speed['prompt_tokens']}, in {speed['dtype']}; "
                f"{speed['rounds']} rounds in turns with the dense model after {speed['warm_up_rounds']} to warm up",
            )
        )
    if results.get("seconds") is not None:
        facts.append(("Time of the whole run", f"{results['seconds']:,.0f} s"))
    return facts


def _at(revision: str | None) -> str:
    return f" at {revision}" if revision else ""


def _remarks(results: Mapping[str, Any], is_healed: bool) -> list[str]:
    """What these results do not have."""
    missing = {
        "speeds": "Speed: these results were made without it (evaluation.speed is false, or an older version).",
        "passage": "Loss of each token: these results were made by a version that did not measure it.",
        "chance": "Energy by chance: these results were made by a version that did not compute it.",
    }
    remarks = [remark for key, remark in missing.items() if not results.get(key)]
    if not is_healed:
        remarks.append("Healing curves: nothing was trained.")
    return remarks
