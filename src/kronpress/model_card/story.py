"""`Story`: what is known of a checkpoint, the dense model, the steps that led to it, and what was measured.

It stands in the folder as kronpress.json, so that the next command goes on with it.
"""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from huggingface_hub import ModelCard, hf_hub_download
from pydantic import BaseModel, ConfigDict, ValidationError

from kronpress.errors import WorkError
from kronpress.plan import Plan
from kronpress.recipe import Recipe
from kronpress.tokens import data_names

CARD, STORY = "README.md", "kronpress.json"
STORY_FORMAT = 1
PACKAGES = ("kronpress", "torch", "transformers", "accelerate", "datasets")
Format = Literal["kronpress", "dense", "self-contained", "onnx"]
Action = Literal["run", "compress", "heal", "export", "save"]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True)


class Base(_Value):
    """The dense model, and what its own card says; what is not known is None, and `remark` says why.

    `hub_id` is None for a model that is on the Hub under no name that is known here.
    """

    name: str
    hub_id: str | None = None
    revision: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: str | list[str] | None = None
    remark: str | None = None


class Training(_Value):
    """How much, on what (names of data), and whether the dense model was the teacher."""

    num_steps: int
    tokens: int
    data: str
    is_distilled: bool


class Step(_Value):
    """One command that led to the checkpoint, or `save`: it was written from Python, after whatever was done there.

    `recipe` is the resolved one; `training` is None where nothing was trained.
    """

    action: Action
    command: list[str] | None = None
    recipe: dict[str, Any] | None = None
    seed: int | None = None
    training: Training | None = None
    versions: dict[str, str] = {}
    device: str | None = None


class Quality(_Value):
    """One model on one text. `dataset`, `config` and `revision` are the Hub's; None for other texts."""

    text: str
    protocol: str
    num_tokens: int
    perplexity: float
    bits_per_byte: float | None = None
    accuracy: float | None = None
    dataset: str | None = None
    config: str | None = None
    revision: str | None = None


class Speed(_Value):
    """Tokens per second at decoding, medians; `protocol` says how they were measured."""

    tokens_per_second: float
    dense_tokens_per_second: float
    speedup: float
    protocol: str


class Measured(_Value):
    """What was measured of the checkpoint beside the dense model, on `device`: the same texts in the same order."""

    dense: list[Quality]
    compressed: list[Quality]
    speed: Speed | None = None
    device: str | None = None


class Story(_Value):
    """All that is known of a checkpoint when it is written. `plan` has the fields of its Plan."""

    format_version: int = STORY_FORMAT
    base: Base | None = None
    format: Format = "kronpress"
    steps: list[Step] = []
    measured: Measured | None = None
    plan: dict[str, Any] | None = None

    def after(self, step: Step) -> Story:
        """The story of what the step made: whatever was measured is of what was there before."""
        return self.model_copy(update={"steps": [*self.steps, step], "measured": None})


def plan_fields(plan: Plan) -> dict[str, Any]:
    """The plan as a checkpoint keeps it: what was not chosen is of no use there, and there is much of it."""
    return plan.model_dump(mode="json", exclude={"allocation": {"candidates"}})


def step(action: Action, command: list[str] | None = None, **facts: Any) -> Step:
    """A step taken here and now."""
    return Step(action=action, command=command, versions=versions(), device=device_name(), **facts)


def training(recipe: Recipe, num_steps: int, tokens: int) -> Training | None:
    """What the recipe's healing came to, of all stages together."""
    if tokens == 0:
        return None
    weights = [weight for part in recipe.parts for weight in part.healing.teacher_weights.values()]
    given = recipe.healing.data
    data: list[Any] = [
        _short(each) if isinstance(each, str) else each.model_copy(update={"name": _short(each.name)})
        for each in ([given] if isinstance(given, str) else given)
    ]
    return Training(num_steps=num_steps, tokens=tokens, data=data_names(data), is_distilled=max(weights) > 0)


def _short(name: str) -> str:
    """A set's name, or a file's without the folders of whoever trained.

    >>> _short("owner/set"), _short("/books/one.txt")
    ('owner/set', 'one.txt')
    """
    return Path(name).name if Path(name).suffix or name.startswith(("/", ".", "~")) else name


def versions() -> dict[str, str]:
    """Of the packages that decide what comes out."""
    return {**{name: version(name) for name in PACKAGES}, "python": platform.python_version()}


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


# ---- what the dense model's own card says ----


def read_base(name: str, folder: Path | None, revision: str | None = None) -> Base:
    """The dense model called `name`, with licence and language as its own card has them.

    Args:
        folder: where it is; None for one that was had from the Hub, whose card is then asked for there.
    """
    if folder is not None:
        known = Base(name=Path(name).resolve().name)
        if not (folder / CARD).is_file():
            return known.model_copy(update={"remark": "its folder has no model card"})
        path = folder / CARD
    else:
        known = Base(name=name, hub_id=name, revision=revision)
        try:
            path = Path(hf_hub_download(name, CARD, revision=revision))
        except Exception as error:  # the Hub's, the network's, and those of names that can be on no Hub
            return known.model_copy(update={"remark": f"its model card could not be had: {first_line(error)}"})
    try:
        data = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError) as error:
        return known.model_copy(update={"remark": f"its model card could not be read: {first_line(error)}"})
    found = {key: data.get(key) for key in ("license", "license_name", "license_link", "language")}
    if found["license"] is None:
        found["remark"] = "its model card names no licence"
    try:
        return Base.model_validate({**known.model_dump(), **found})
    except ValidationError:
        return known.model_copy(update={"remark": "licence and language of its model card are not as the Hub has them"})


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---- in the folder ----


def read_story(folder: Path) -> Story | None:
    """What the folder's kronpress.json says; None if there is none.

    Raises:
        WorkError: it is damaged, or of a newer version.
    """
    path = folder / STORY
    if not path.is_file():
        return None
    try:
        story = Story.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WorkError(f"{str(path)!r} is damaged: {first_line(error)}") from error
    if story.format_version > STORY_FORMAT:
        raise WorkError(
            f"{str(path)!r} has format version {story.format_version}, newer than {STORY_FORMAT}, the newest that this "
            "version of kronpress reads: upgrade kronpress"
        )
    return story
