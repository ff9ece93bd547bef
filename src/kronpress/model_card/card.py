"""The card of a checkpoint, README.md: its story in words, with metadata for the Hub, and nothing that is not known."""

from __future__ import annotations

import re
import shlex
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from kronpress.healing.checkpoints import write_whole
from kronpress.model_card.story import CARD, STORY, Base, Format, Measured, Story, first_line

# What the Hub calls the way in which a model comes from another: quantized is its word for compressed ones. A dense
# export has weights of the dense model's own shapes, with other values.
RELATIONS: dict[Format, str] = {
    "kronpress": "quantized",
    "self-contained": "quantized",
    "onnx": "quantized",
    "dense": "finetune",
}
# In the card, the line that says where the model is.
_WHERE = re.compile(r"^where = .*$", re.MULTILINE)


def write_card(folder: Path, make_story: Callable[[], Story]) -> None:
    """Write kronpress.json and README.md into the folder of a finished checkpoint, each as a whole.

    A checkpoint is worth more than its card: whatever goes wrong here is a warning.
    """
    try:
        story = make_story()
        write_whole(folder / STORY, story.model_dump_json(indent=1) + "\n")
        write_whole(folder / CARD, str(model_card(story)))
    except Exception as error:
        warnings.warn(
            f"the checkpoint is whole, but its card could not be written: {type(error).__name__}: {first_line(error)}",
            stacklevel=2,
        )


def model_card(story: Story) -> ModelCard:
    """The card, with metadata for the Hub. The lines that load the model are for one who stands in its folder."""
    parts = [
        f"# {title(story)}",
        _introduction(story),
        "## Sizes and measurements",
        *_figures(story),
        "## How to load it",
        _loading(story),
        "## How it was made",
        *_making(story),
        "## Limits",
        "\n".join(f"* {limit}" for limit in _limits(story)),
    ]
    return ModelCard(f"---\n{card_data(story).to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def title(story: Story) -> str:
    base = "a dense model" if story.base is None else story.base.name.rpartition("/")[2]
    how = {"dense": ", and dense again", "onnx": ", as an ONNX graph", "self-contained": ", with its code"}
    return f"{base}, compressed by kronpress{how.get(story.format, '')}"


def card_data(story: Story) -> ModelCardData:
    """The card's metadata; what is not known is left out."""
    base = story.base or Base(name="")
    tags = ["kronpress", "compression", *sorted(structure.replace("_", "-") for structure in _structures(story))]
    if any(step.training and step.training.is_distilled for step in story.steps):
        tags.append("distillation")
    if story.format == "self-contained":
        tags.append("custom_code")
    relation: dict[str, Any] = {} if base.hub_id is None else {"base_model_relation": RELATIONS[story.format]}
    # What was measured is the checkpoint, and not an export of it.
    results = _eval_results(story.measured) if story.measured and story.format == "kronpress" else None
    return ModelCardData(
        base_model=base.hub_id,
        license=base.license,
        license_name=base.license_name,
        license_link=base.license_link,
        language=base.language,
        library_name="onnx" if story.format == "onnx" else "transformers",
        pipeline_tag="text-generation",
        tags=tags,
        metrics=["perplexity"] if results else None,
        model_name=title(story) if results else None,
        eval_results=results,
        **relation,
    )


def _eval_results(measured: Measured) -> list[EvalResult]:
    results = []
    for quality in measured.compressed:
        figures = {
            "perplexity": quality.perplexity,
            "bits_per_byte": quality.bits_per_byte,
            "accuracy": quality.accuracy,
        }
        results += [
            EvalResult(
                task_type="text-generation",
                dataset_type=quality.dataset or quality.text,
                dataset_name=quality.text,
                dataset_config=quality.config,
                dataset_split="test",
                dataset_revision=quality.revision,
                metric_type=kind,
                metric_value=figure,
                metric_name=f"{kind.replace('_', ' ')} ({quality.protocol})",
            )
            for kind, figure in figures.items()
            if figure is not None
        ]
    return results


def _structures(story: Story) -> Counter[str]:
    """How many layers became what."""
    return Counter(layer["structure"] for layer in (story.plan or {"layers": {}})["layers"].values())


def _introduction(story: Story) -> str:
    base = "A dense model of which nothing is recorded" if story.base is None else _base_in_words(story.base)
    if story.plan is None:
        return f"{base}."
    counts = _structures(story)
    replaced = ", ".join(f"{count} by `{structure}`" for structure, count in counts.most_common())
    text = f"{base}, of which {counts.total()} weight matrices were replaced: {replaced}."
    match story.format:
        case "dense":
            text += (
                " In this folder they are dense matrices again: it is as large as the dense model, and any tool that "
                "reads checkpoints of transformers reads it."
            )
        case "onnx":
            text += " This folder has the compressed model as a graph of standard operators in float32."
        case "self-contained":
            text += " This folder has the factors, and the code that multiplies by them in `kronpress_runtime.py`."
    return text


def _base_in_words(base: Base) -> str:
    if base.hub_id is None:
        return f"`{base.name}`"
    revision = f" at revision `{base.revision}`" if base.revision else ""
    return f"[{base.hub_id}](https://huggingface.co/{base.hub_id}){revision}"


def _figures(story: Story) -> list[str]:
    plan, measured = story.plan, story.measured
    if plan is None:
        return ["Nothing is recorded of its sizes, and nothing was measured."]
    whose = "the compressed checkpoint that this was exported from" if story.format != "kronpress" else "this model"
    dense = "the dense model" if story.base is None else f"`{story.base.name}`"
    rows = [
        [label, f"{plan[f'{field}_dense']:,}", f"{plan[field]:,}"]
        for label, field in (
            ("parameters", "num_params"),
            (f"bytes of weights in {plan['dtype']}", "bytes"),
            ("FLOPs of linear layers per token", "flops_per_token"),
        )
    ]
    notes = []
    if measured is None:
        notes.append(
            "Sizes are counted. Nothing was measured when this was written: neither its perplexity nor its speed is "
            "known here. `kronpress eval` and `kronpress bench` measure them."
        )
    else:
        for before, after in zip(measured.dense, measured.compressed, strict=True):
            rows.append([f"perplexity, {after.text}", f"{before.perplexity:.2f}", f"{after.perplexity:.2f}"])
            for label, attribute in (("bits per byte", "bits_per_byte"), ("accuracy", "accuracy")):
                figures = getattr(before, attribute), getattr(after, attribute)
                if None not in figures:
                    rows.append([f"{label}, {after.text}", *(f"{figure:.4f}" for figure in figures)])
            notes.append(
                f"On {after.text}: {after.protocol}; {after.num_tokens:,} tokens"
                f"{f' of `{after.dataset}`' if after.dataset else ''}"
                f"{f' at revision `{after.revision}`' if after.revision else ''}."
            )
        if measured.speed is not None:
            speed = measured.speed
            rows.append(
                [
                    "tokens per second at decoding",
                    f"{speed.dense_tokens_per_second:.1f}",
                    f"{speed.tokens_per_second:.1f}",
                ]
            )
            notes.append(f"Speed: {speed.protocol}; the ratio is {speed.speedup:.2f}, on {measured.device}.")
        if story.format != "kronpress":
            notes.insert(0, "The compressed checkpoint was measured; this export of it was not.")
    lines = [["", dense, whose], ["---", "---:", "---:"], *rows]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return [table, *(["\n".join(f"* {note}" for note in notes)] if notes else [])]


def for_repository(card: str, repo_id: str) -> str:
    """The card with lines that load the model from this repository; a card that has other lines stays as it is."""
    place = f'snapshot_download("{repo_id}")' if "import snapshot_download" in card else f'"{repo_id}"'
    return _WHERE.sub(f"where = {place}", card)


def _loading(story: Story) -> str:
    tokenizer = "tokenizer = AutoTokenizer.from_pretrained(where)"
    here = 'where = "."  # this folder'
    match story.format:
        case "kronpress":
            lines = [
                "import kronpress  # teaches transformers the format",
                "from transformers import AutoModelForCausalLM, AutoTokenizer",
                "",
                here,
                "model = AutoModelForCausalLM.from_pretrained(where)",
                tokenizer,
            ]
            rest = "Without `import kronpress` loading is an error: it never gives a model with random weights."
        case "dense" | "self-contained":
            trust = ", trust_remote_code=True" if story.format == "self-contained" else ""
            lines = [
                "from transformers import AutoModelForCausalLM, AutoTokenizer",
                "",
                here,
                f"model = AutoModelForCausalLM.from_pretrained(where{trust})",
                tokenizer,
            ]
            rest = "kronpress is not needed."
            if trust:
                rest += " The code that `trust_remote_code=True` runs is in `kronpress_runtime.py`, to be read before."
        case "onnx":
            lines = [
                "from huggingface_hub import snapshot_download",
                "from onnxruntime import InferenceSession",
                "from transformers import AutoTokenizer",
                "",
                here,
                'session = InferenceSession(f"{where}/model.onnx")',
                tokenizer,
            ]
            rest = "Inputs and outputs of the graph, its cache among them, have their names and shapes in it."
    return "\n".join(["```python", *lines, "```", "", rest])


def _making(story: Story) -> list[str]:
    if not story.steps:
        return ["How it was made is not recorded here."]
    parts = []
    for number, step in enumerate(story.steps, start=1):
        text = f"{number}. **{step.action}**"
        if step.action == "save":
            text += " from Python: what was done to it there, by which recipe and on which data, is not recorded"
        if step.recipe is not None:
            text += f" by the recipe `{step.recipe['name']}`"
            if step.recipe.get("description"):
                text += f" ({step.recipe['description']})"
        if step.seed is not None:
            text += f", seed {step.seed}"
        if step.training is not None:
            how = "distilled from the dense model" if step.training.is_distilled else "trained further"
            text += f"; {how} in {step.training.num_steps:,} steps on {step.training.tokens:,} tokens"
            text += f" of {step.training.data}"
        parts.append(f"{text}.")
        if step.command is not None:
            parts.append(_indented(f"```\n{shlex.join(step.command)}\n```"))
        if step.device is not None or step.versions:
            numbers = ", ".join(f"{name} {number}" for name, number in step.versions.items())
            parts.append(
                _indented(f"On {step.device or 'a device that was not recorded'}; {numbers or 'versions unknown'}.")
            )
    recipes = [step.recipe for step in story.steps if step.recipe is not None]
    if recipes:
        text = yaml.safe_dump(recipes[-1] if len(recipes) == 1 else recipes, sort_keys=False, allow_unicode=True)
        parts.append(f"<details><summary>The resolved recipe</summary>\n\n```yaml\n{text}```\n\n</details>")
    return parts


def _indented(text: str) -> str:
    return re.sub(r"^(?=.)", "   ", text, flags=re.MULTILINE)


def _limits(story: Story) -> list[str]:
    measured, base = story.measured, story.base
    limits = []
    if measured is None:
        limits.append("How well it predicts text was not measured.")
    else:
        texts = " and ".join(quality.text for quality in measured.compressed)
        limits.append(
            f"It was measured on {texts} alone, with one seed: how it does on other text and in other languages, at "
            "tasks and at following instructions is not known. Perplexities are comparable only under the same "
            "tokenizer and protocol."
        )
    if measured is None or measured.speed is None:
        limits.append("Its speed was not measured: fewer FLOPs are not always less time.")
    else:
        limits.append(
            f"Speed was measured on {measured.device} alone; elsewhere it may be slower than the dense model."
        )
    if {step.action for step in story.steps} <= {"run", "compress", "export"} and not any(
        step.training for step in story.steps
    ):
        limits.append("It was not trained after its matrices were replaced.")
    limits.append(
        "Whatever biases and faults the dense model has are to be expected here too; whether compression makes some of "
        "them worse was not measured."
    )
    if base is None:
        limits.append("Which dense model it comes from is not recorded, and so its licence is not known.")
    elif base.license is None:
        limits.append(f"The licence of the dense model is not known here ({base.remark}), and so none is named.")
    else:
        named = base.license_name or base.license
        limits.append(f"The licence, {named}, is the one that the dense model's own card names.")
    return limits
