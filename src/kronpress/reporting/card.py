"""results.json as the story that a model card tells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kronpress.model_card import Base, Measured, Quality, Speed, Step, Story, training
from kronpress.recipe import load_recipe
from kronpress.reporting.results import Model, final_model, models, protocol, short_names
from kronpress.tokens.reading import BUILT_IN_SETS


def run_story(results: Mapping[str, Any], base: Base) -> Story:
    """What a run has made and measured.

    Args:
        base: the dense model, which results.json has by name.
    """
    return Story(base=base, steps=[_step(results)], measured=measured(results), plan=dict(results["plan"]))


def measured(results: Mapping[str, Any]) -> Measured:
    """What was saved beside the dense model."""
    found = models(results)
    final = final_model(found)
    return Measured(
        dense=_qualities(found[0], results),
        compressed=_qualities(final, results),
        speed=_speed(final),
        device=results.get("device"),
    )


def _qualities(model: Model, results: Mapping[str, Any]) -> list[Quality]:
    short = short_names(model.metrics)
    return [
        Quality(
            text="the bundled test books" if name == "bundled" else short[name],
            protocol=protocol(figures),
            num_tokens=figures["num_tokens"],
            perplexity=figures["perplexity"],
            bits_per_byte=figures.get("bits_per_byte"),
            accuracy=figures.get("accuracy"),
            **_on_hub(name, results.get("data", {}).get(name)),
        )
        for name, figures in model.metrics.items()
    ]


def _on_hub(name: str, revision: str | None) -> dict[str, str | None]:
    """Where on the Hub a text is; only such have a revision."""
    if revision is None:
        return {}
    if name in BUILT_IN_SETS:
        return {"dataset": BUILT_IN_SETS[name].path, "config": BUILT_IN_SETS[name].config, "revision": revision}
    return {"dataset": name.partition("@")[0], "revision": revision}


def _speed(model: Model) -> Speed | None:
    speed = model.speed
    if speed is None:
        return None
    return Speed(
        tokens_per_second=speed["tokens_per_second"]["median"],
        dense_tokens_per_second=speed["dense_tokens_per_second"]["median"],
        speedup=speed["speedup"]["median"],
        protocol=f"{speed['new_tokens']} tokens one by one after {speed['prompt_tokens']}, one sequence, in "
        f"{speed['dtype']}; medians of {speed['rounds']} rounds in turns with the dense model after "
        f"{speed['warm_up_rounds']} to warm up",
    )


def _step(results: Mapping[str, Any]) -> Step:
    logs = [stage.get("healing") or {} for stage in [*results.get("stages", []), results]]
    num_steps, tokens = (sum(log.get(name, 0) for log in logs) for name in ("num_steps", "tokens"))
    return Step(
        action="run",
        command=results.get("command"),
        recipe=results["recipe"],
        seed=results.get("seed"),
        training=training(load_recipe(results["recipe"]), num_steps, tokens),
        versions=results.get("versions", {}),
        device=results.get("device"),
    )
