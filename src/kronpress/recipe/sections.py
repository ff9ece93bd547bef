"""The sections of a recipe, from budget and calibration to healing and evaluation, each a frozen value."""

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
    field_validator,
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
    sequence_length: PositiveInt = Field(
        1024, description="tokens in one sequence; if it is not given and the model reads fewer, as many as it reads"
    )
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


class Similarity(Section):
    """How much is removed from each block: φ ∝ exp(−s / ε), s = 1 − E cos(h, h′) of its input and output (MoDeGPT)."""

    temperature: PositiveFloat = Field(1.0, description="ε: the higher, the more equal are the blocks")
    most_removed: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.8, description="largest fraction of a block's targeted parameters that is removed"
    )


class Reconstruction(Section):
    """Before the healing each block learns alone to give what the teacher's block gives; left out at 0 steps."""

    steps: NonNegativeInt = Field(0, description="optimiser steps of each block; 0 leaves the reconstruction out")
    windows: PositiveInt = Field(
        64, description="the healing's first sequences, this many, whose hidden states are kept, one block at a time"
    )
    held_out: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.125,
        description="least fraction of the windows that is kept apart; a block that is no better on them keeps its "
        "weights",
    )
    sequences_per_step: PositiveInt = Field(4, description="sequences in one optimiser step")
    learning_rate: PositiveFloat = Field(1e-3, description="peak rate of AdamW")
    final_learning_rate: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1, description="rate at the end of the cosine, as a fraction of the peak"
    )
    warmup_steps: NonNegativeInt = Field(
        0, description="steps of linear rise to the peak rate, at most half of all steps"
    )
    student_inputs: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0,
        description="fraction of the steps in which a block reads what the student's blocks before it give, and not "
        "what the teacher's do",
    )
    trains: Literal["all", "factors"] = Field(
        "all", description="`all`: every parameter of the block; `factors`: those of the layers that were replaced"
    )


class Phase(Section):
    """One part of a healing, with its share of all tokens; what is unset is as in the healing itself."""

    share: Fraction = Field(description="fraction of all tokens; the shares of all phases add up to 1")
    sequences_per_step: PositiveInt | None = None
    learning_rate: PositiveFloat | None = None
    final_learning_rate: Annotated[float, Field(ge=0, le=1)] | None = None
    warmup_steps: NonNegativeInt | None = None


class WeightedSet(Section):
    """One of several sets that training text is mixed of."""

    name: str = Field(description="built-in set, Hub data set id, or local file")
    weight: PositiveFloat = Field(description="its part of all training tokens, relative to the other sets' weights")


class Healing(Section):
    """Training of the compressed model; it stops at `max_steps` or `tokens`, whichever comes first."""

    data: str | list[str] | list[WeightedSet] = Field(
        "openwebtext",
        description="built-in set, Hub data set id, or local files, one after another; or sets to be mixed, each as "
        "{name, weight}",
    )
    max_steps: NonNegativeInt | None = Field(
        None, description="optimiser steps, all phases together; 0 leaves the model unhealed"
    )
    tokens: PositiveInt | None = Field(None, description="training tokens, all steps together")
    sequences_per_step: PositiveInt = Field(8, description="sequences in one optimiser step")
    sequences_per_pass: PositiveInt | None = Field(
        None, description="sequences in memory at once, gradients summed over passes; all of a step's if unset"
    )
    sequence_length: PositiveInt = Field(
        1024, description="tokens in one sequence; if it is not given and the model reads fewer, as many as it reads"
    )
    learning_rate: PositiveFloat = Field(6e-5, description="peak rate")
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
    rates: Literal["global", "movement"] = Field(
        "global",
        description="`global`: one rate for every parameter; `movement`: each factor has a rate of its own, fixed at "
        "the start, by which the product moves in a step as a dense weight would, and decays as one",
    )
    optimizer: Literal["adamw", "adamw-bfloat16", "adamw-8bit", "adafactor", "muon"] = Field(
        "adamw",
        description="`adamw`; `adamw-bfloat16` or, with torchao, `adamw-8bit` for moments of so many bits; "
        "`adafactor`, with almost no state; `muon`, which orthogonalises the steps of matrices",
    )
    language_model_weight: NonNegativeFloat = Field(1.0, description="weight of the next-token cross-entropy")
    distillation_weight: NonNegativeFloat = Field(0.0, description="weight of KL(teacher ‖ student) of the logits")
    reverse_distillation_weight: NonNegativeFloat = Field(
        0.0, description="weight of KL(student ‖ teacher) of the logits"
    )
    jensen_shannon_weight: NonNegativeFloat = Field(
        0.0, description="weight of the divergence of both from their mixture, of the logits"
    )
    jensen_shannon_teacher_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="share β of the teacher in this mixture"
    )
    temperature: PositiveFloat = Field(1.0, description="temperature of both distributions in the distillation")
    distillation_top_k: PositiveInt | None = Field(
        None,
        description="compare only the teacher's likeliest tokens, this many, and all others as one event; the whole "
        "vocabulary if unset",
    )
    teacher_cache: bool = Field(
        False,
        description="run the teacher once over the training text and keep on disk what the terms of the logits need of "
        "it, in 16 bits: `distillation_top_k` tokens at each position",
    )
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
    schedule: dict[str, tuple[NonNegativeFloat, NonNegativeFloat]] = Field(
        {}, description="weights that change linearly from the first step to the last, by name: [from, to]"
    )
    chunk_tokens: NonNegativeInt | None = Field(
        None,
        description="tokens whose logits are in memory at once: as many as have 2^23 of them if unset, all of a pass's "
        "if 0",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="of products in the training; weights, gradients and optimiser stay in the dtype of the model. "
        "`auto`: bfloat16 on GPUs that have it, and else float32",
    )
    gradient_checkpointing: bool = Field(
        False, description="keep of each block only what it reads, and compute the block once more in the backward pass"
    )
    compile: bool = Field(False, description="compile the blocks of student and teacher for the training")
    sharded: bool = Field(
        False,
        description="split weights, gradients and optimiser over the processes, block by block (FSDP); with one "
        "process nothing is split",
    )
    save_steps: PositiveInt | None = Field(None, description="steps between training checkpoints; none if unset")
    keep_checkpoints: PositiveInt = Field(
        2, description="newest training checkpoints that are kept, beside the best on the validation text"
    )
    validation_data: str | list[str] | None = Field(
        None,
        description="sets on whose validation split, or local files on which, the model is measured where it is saved "
        "and at the end; none if unset",
    )
    validation_tokens: PositiveInt = Field(16384, description="the first tokens of it that are read")
    end_with: Literal["last", "best"] = Field(
        "last",
        description="`last`: the weights after all steps; `best`: of those saved the best on the validation text",
    )
    spike_factor: Annotated[float, Field(gt=1)] | None = Field(
        3.0, description="a step is skipped if its loss is so many times the median of the last 64; never if null"
    )
    max_skipped_steps: PositiveInt = Field(10, description="skipped steps in a row after which the training stops")
    report_to: list[str] = Field([], description="trackers that transformers knows, such as tensorboard or wandb")

    @field_validator("data", mode="before")
    @classmethod
    def _one_form(cls, data: object) -> object:
        if isinstance(data, list) and any(isinstance(each, dict) for each in data):
            for number, each in enumerate(data):
                try:
                    WeightedSet.model_validate(each)
                except ValueError as error:
                    raise ValueError(
                        f"set {number} is {each!r}: expected {{name, weight}} of every set, the weight above 0"
                    ) from error
        elif data == []:
            raise ValueError("there is no set in it")
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Healing:
        names = ["language_model_weight", *self.teacher_weights]
        for name in self.schedule:
            if name not in names:
                raise ValueError(f"schedule names {name!r}: the weights are {', '.join(names)}")
        for progress in (0, 1):
            if not any(self.weights_at(progress).values()):
                raise ValueError(f"{', '.join(names)} are all 0: nothing to minimise")
        if self.compile and self.teacher_weights["attention_weight"] > 0:
            raise ValueError("attention_weight needs attention maps, and compiled blocks give none: unset compile")
        if self.teacher_cache:
            inside = ("embedding_weight", "attention_weight", "hidden_weight")
            compared = [name for name, weight in self.teacher_weights.items() if weight > 0]
            for name in compared:
                if name in inside:
                    raise ValueError(f"teacher_cache keeps logits alone, and {name} needs the teacher's inner states")
            if not compared:
                raise ValueError("teacher_cache is set, and no term compares with the teacher")
        for size in [self.sequences_per_step, *(phase.sequences_per_step for phase in self.phases)]:
            if size is not None and size % (self.sequences_per_pass or 1):
                raise ValueError(f"sequences_per_pass {self.sequences_per_pass} does not divide {size}")
        if self.end_with == "best" and (self.validation_data is None or self.save_steps is None):
            raise ValueError("end_with: best needs validation_data to tell the best by, and save_steps to keep it")
        shares = sum(phase.share for phase in self.phases)
        if self.phases and abs(shares - 1) > 1e-6:
            raise ValueError(f"the shares of the phases add up to {shares:g}, not 1")
        return self

    @property
    def teacher_weights(self) -> dict[str, float]:
        """The weights of the terms that compare with the teacher, by the names of their fields; their largest ones."""
        weights = {name: max(ends) for name, ends in self._weight_ends.items()}
        return {name: weight for name, weight in weights.items() if name != "language_model_weight"}

    def weights_at(self, progress: float) -> dict[str, float]:
        """The weights of all terms by the names of their fields, after this fraction of the steps."""
        return {name: first + (last - first) * progress for name, (first, last) in self._weight_ends.items()}

    @property
    def _weight_ends(self) -> dict[str, tuple[float, float]]:
        fields = {
            "language_model_weight": self.language_model_weight,
            "distillation_weight": self.distillation_weight,
            "reverse_distillation_weight": self.reverse_distillation_weight,
            "jensen_shannon_weight": self.jensen_shannon_weight,
            "embedding_weight": self.embedding_weight,
            "attention_weight": self.attention_weight,
            "hidden_weight": self.hidden_weight,
        }
        return {name: self.schedule.get(name, (weight, weight)) for name, weight in fields.items()}

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
    speed: bool = Field(True, description="also time each model's decoding for some seconds, beside the dense one")
