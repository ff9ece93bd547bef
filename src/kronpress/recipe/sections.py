"""The sections of a recipe: budget, calibration, weighting, healing and evaluation, each a frozen value."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from kronpress.errors import RequestError

Fraction = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """Every field is checked, and a field that does not exist is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Budget(Section):
    """How much may remain. At most one field is set; one kept fraction is used for all targeted matrices."""

    params: PositiveInt | None = Field(None, description="floating-point parameters of the whole model, tied once")
    bytes: PositiveInt | None = Field(None, description="bytes of the whole model's parameters in its dtype")
    kept_of_targets: Fraction | None = Field(None, description="fraction of the targeted matrices' parameters")
    kept_of_model: Fraction | None = Field(None, description="fraction of the whole model's parameters")

    @model_validator(mode="after")
    def _one_at_most(self) -> Budget:
        given = [name for name, value in self if value is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are both set: a budget is one number")
        return self

    @property
    def is_of_the_model(self) -> bool:
        """Whether it is a number for the whole model, and not for what is targeted."""
        return any(each is not None for each in (self.params, self.bytes, self.kept_of_model))


class Calibration(Section):
    """The text on which the inputs of the targeted layers, and the loss's response to them, are measured."""

    data: str | list[str] = Field("openwebtext", description="built-in set, Hub data set id, or local files")
    windows: PositiveInt = Field(128, description="sequences that are read, chosen by the seed; all if there are fewer")
    sequence_length: PositiveInt = Field(1024, description="tokens in one sequence")
    sensitivity: bool = Field(True, description="measure the gradients that the metric `loss` needs: a backward pass")
    held_out: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.125, description="fraction of the windows that is kept apart, to choose the fit's shrinkage by"
    )


class Weighting(Section):
    """In which metric the fits are nearest, and what follows from it; all but `none` need a calibration."""

    metric: Literal["none", "magnitude", "input", "loss"] = Field(
        "none",
        description="`none`: the weight's own; `magnitude`: that weighted by the inputs' mean magnitude; `input`: "
        "the output error on real inputs; `loss`: that error as far as the loss responds to it",
    )
    shrinkage: Annotated[float, Field(ge=0, le=1)] | Literal["held_out"] = Field(
        0.0,
        description="how far the inputs' second moment is drawn to its diagonal; `held_out`: what is best for each "
        "layer on the held-out windows",
    )
    bias_correction: bool = Field(
        False, description="let biases take up the mean output error, and fit the rest; layers without one keep none"
    )
    sequential: bool = Field(
        False, description="fit block after block, each layer to the inputs that it will get from the layers before"
    )

    @model_validator(mode="after")
    def _measured(self) -> Weighting:
        if self.metric in ("none", "magnitude") and (self.bias_correction or self.sequential or self.shrinkage):
            raise ValueError("bias_correction, sequential and shrinkage need a metric, input or loss")
        return self


class Phase(Section):
    """One part of a healing, with its share of all tokens; what is unset is as in the healing itself."""

    share: Fraction = Field(description="fraction of all tokens; the shares of all phases add up to 1")
    sequences_per_step: PositiveInt | None = None
    learning_rate: PositiveFloat | None = None
    final_learning_rate: Annotated[float, Field(ge=0, le=1)] | None = None
    warmup_steps: NonNegativeInt | None = None


class Healing(Section):
    """Training of the compressed model; it stops at `max_steps` or `tokens`, whichever comes first."""

    data: str | list[str] = Field("openwebtext", description="built-in set, Hub data set id, or local files")
    max_steps: NonNegativeInt | None = Field(
        None, description="optimiser steps, all phases together; 0 leaves the model unhealed"
    )
    tokens: PositiveInt | None = Field(None, description="training tokens, all steps together")
    sequences_per_step: PositiveInt = Field(8, description="sequences in one optimiser step")
    sequences_per_pass: PositiveInt | None = Field(
        None, description="sequences in memory at once, gradients summed over passes; all of a step's if unset"
    )
    sequence_length: PositiveInt = Field(1024, description="tokens in one sequence")
    learning_rate: PositiveFloat = Field(6e-5, description="peak rate of AdamW")
    final_learning_rate: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1, description="rate at the end of the cosine, as a fraction of the peak"
    )
    warmup_steps: NonNegativeInt = Field(
        0, description="steps of linear rise to the peak rate, at most half of all steps"
    )
    phases: list[Phase] = Field(
        [], description="parts with a schedule of their own, each with a warm-up and a cosine; one part if empty"
    )
    weight_decay: NonNegativeFloat = Field(0.0, description="decoupled decay of all matrices")
    language_model_weight: NonNegativeFloat = Field(1.0, description="weight of the next-token cross-entropy")
    distillation_weight: NonNegativeFloat = Field(0.0, description="weight of KL(teacher ‖ student) of the logits")
    temperature: PositiveFloat = Field(1.0, description="temperature of both distributions in the distillation")
    embedding_weight: NonNegativeFloat = Field(
        0.0, description="weight of the mean squared difference from the teacher in what enters the first block"
    )
    attention_weight: NonNegativeFloat = Field(
        0.0, description="weight of KL(teacher ‖ student) of the attention maps, summed over the matched blocks"
    )
    hidden_weight: NonNegativeFloat = Field(
        0.0, description="weight of the mean squared difference after each block, summed over the matched blocks"
    )
    layer_map: list[NonNegativeInt] | None = Field(
        None, description="the teacher's block, from 0, that matches each block of the student; evenly if unset"
    )
    save_steps: PositiveInt | None = Field(None, description="steps between training checkpoints; none if unset")

    @model_validator(mode="after")
    def _consistent(self) -> Healing:
        if not any((self.language_model_weight, *self.teacher_weights.values())):
            names = ", ".join(["language_model_weight", *self.teacher_weights])
            raise ValueError(f"{names} are all 0: nothing to minimise")
        for size in [self.sequences_per_step, *(phase.sequences_per_step for phase in self.phases)]:
            if size is not None and size % (self.sequences_per_pass or 1):
                raise ValueError(f"sequences_per_pass {self.sequences_per_pass} does not divide {size}")
        shares = sum(phase.share for phase in self.phases)
        if self.phases and abs(shares - 1) > 1e-6:
            raise ValueError(f"the shares of the phases add up to {shares:g}, not 1")
        return self

    @property
    def teacher_weights(self) -> dict[str, float]:
        """The weights of the terms that compare with the teacher, by the names of their fields."""
        return {
            "distillation_weight": self.distillation_weight,
            "embedding_weight": self.embedding_weight,
            "attention_weight": self.attention_weight,
            "hidden_weight": self.hidden_weight,
        }

    @property
    def parts(self) -> list[Healing]:
        """The phases as healings of one phase each, whose `max_steps` are their steps.

        Under `max_steps` every phase is shortened by the same factor.

        Raises:
            RequestError: neither `max_steps` nor `tokens` is set.
        """
        phases = self.phases or [Phase(share=1.0)]
        changes = [phase.model_dump(exclude={"share"}, exclude_none=True) for phase in phases]
        parts = [self.model_copy(update={"phases": [], "tokens": None, **change}) for change in changes]
        # Steps of each phase for one token of healing.
        steps = [phase.share / part.tokens_per_step for phase, part in zip(phases, parts, strict=True)]
        limits = [self.max_steps] if self.max_steps is not None else []
        if self.tokens is not None:
            limits.append(max(1, math.floor(self.tokens * sum(steps) + 1e-6)))
        if not limits:
            raise RequestError("healing has no end: set healing.max_steps or healing.tokens")
        ends = [round(min(limits) * sum(steps[: i + 1]) / sum(steps)) for i in range(len(steps))]
        starts = [0, *ends[:-1]]
        return [
            part.model_copy(update={"max_steps": end - start})
            for part, start, end in zip(parts, starts, ends, strict=True)
        ]

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one step outside the phases."""
        return self.sequences_per_step * self.sequence_length

    @property
    def num_steps(self) -> int:
        """Optimiser steps under both limits, all phases together; raises what `parts` raises."""
        return sum(part.max_steps or 0 for part in self.parts)

    @property
    def num_tokens(self) -> int:
        """Tokens read in all steps; raises what `parts` raises."""
        return sum((part.max_steps or 0) * part.tokens_per_step for part in self.parts)


class Evaluation(Section):
    """What the model is measured on, and how: `evaluate` in evaluation.py describes the protocols."""

    protocol: Literal["window", "krony", "lambada-last-word"] = Field(
        "window", description="how the text is read and the losses averaged"
    )

    data: str | list[str] = Field("wikitext2", description="built-in sets, Hub data set ids, or local files")
    window: PositiveInt | None = Field(
        None, description="tokens of context; if unset 1024 for krony, else the model's own limit, at most 2048"
    )
    stride: PositiveInt | None = Field(None, description="tokens from window to window; the window if unset")
    bos: bool | None = Field(None, description="begin with the tokenizer's BOS token; as the protocol has it if unset")
