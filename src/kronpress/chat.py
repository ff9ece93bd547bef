"""One prompt answered by two models, the dense one and what was made of it, one after the other, each by the clock.

They take turns with whole answers, not with tokens: each has the processor and its caches for itself, as it would
alone. Tokens per second are of new tokens after the first; what the prompt took, up to the first one, is told apart.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from kronpress.benchmark.memory import give_back_free_memory, peak_above, restart_peak
from kronpress.benchmark.sizes import Sizes
from kronpress.benchmark.timing import Frozen
from kronpress.checkpoint import is_compressed, load_model, story_of
from kronpress.dispatch import set_dispatch
from kronpress.errors import RequestError
from kronpress.evaluation import check_vocabulary, longest_context
from kronpress.layers import StructuredLinear
from kronpress.surgery import structured_layers

DEFAULT_NEW_TOKENS = 64
# Of an incomplete character at the end of what there is so far.
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
LARGEST_SEED = 2**63 - 1
RESULTS = "results.json"

Kind = Literal["dense", "compressed"]
Stopped = Literal["end", "length", "context"]


class Settings(Frozen):
    """How to answer; `temperature` 0 takes the likeliest token each time."""

    max_new_tokens: int = DEFAULT_NEW_TOKENS
    temperature: float = 0.0
    seed: int = 0

    def check(self) -> None:
        """RequestError for what no answer can be made with."""
        if self.max_new_tokens < 1:
            raise RequestError(f"new tokens {self.max_new_tokens}: must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise RequestError(f"temperature {self.temperature}: must be 0, for the likeliest token, or a number above")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise RequestError(f"seed {self.seed}: must be between 0 and {LARGEST_SEED}")


@dataclass(frozen=True)
class Speaker:
    """A model that is ready to answer. `num_bytes` are those of its weights as they are computed with."""

    name: str
    kind: Kind
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    num_bytes: int

    @property
    def has_template(self) -> bool:
        return self.tokenizer.chat_template is not None


class Answer(Frozen):
    """What one model said, and what it took.

    `tokens_per_second` is of the new tokens after the first, None if there is no other; `prefill_seconds` is from the
    prompt to the first new token. `new_tokens` has the one that ends the answer too. `peak_bytes` are the weights and
    the most that answering took beside them; None where the system does not tell. `stopped`: by the model itself
    (`end`), at the number of new tokens asked for (`length`), or where the context was full (`context`).
    """

    model: str
    kind: Kind
    text: str
    chat_template: bool
    prompt_tokens: int
    new_tokens: int
    stopped: Stopped
    prefill_seconds: float
    decode_seconds: float
    tokens_per_second: float | None
    weight_bytes: int
    dtype: str
    peak_bytes: int | None


def made_from(name: str) -> str:
    """What the compressed MODEL was made from: as its run directory says, or its checkpoint.

    Raises:
        RequestError: neither says it.
    """
    path = Path(name)
    for results in (path / RESULTS, path.parent / RESULTS):
        if path.is_dir() and results.is_file():
            with suppress(ValueError, KeyError, TypeError):
                return str(json.loads(results.read_text(encoding="utf-8"))["recipe"]["model"])
    story = story_of(name) if path.is_dir() else None
    if story is not None:
        named = [str(step.recipe["model"]) for step in story.steps if step.recipe is not None]
        if named:
            return named[0]
    raise RequestError(f"model {name!r} does not say what it was made from: give --against MODEL2, the dense one")


def speaker(name: str) -> Speaker:
    """MODEL, loaded and warmed up: the first call of anything takes longer than the others.

    Raises:
        RequestError: no such model, or a tokenizer that does not fit it.
        WorkError: it cannot be loaded.
    """
    loaded = load_model(name)
    model = loaded.model.eval()
    check_vocabulary(model, loaded.tokenizer)
    if any(isinstance(layer, StructuredLinear) for layer in structured_layers(model).values()):
        set_dispatch(model)  # as `kronpress bench` measures it
    kind: Kind = "compressed" if is_compressed(model) else "dense"
    found = Speaker(name, kind, model, loaded.tokenizer, Sizes.of(model).num_bytes)
    _generate(found, torch.zeros(1, 1, dtype=torch.long), Settings(max_new_tokens=2), _Clocked(lambda _: None))
    return found


def share_tokens(one: Speaker, other: Speaker) -> bool:
    """Whether a text is the same tokens to both, and so their tokens per second are of the same thing."""
    return one.tokenizer.get_vocab() == other.tokenizer.get_vocab() and (
        one.tokenizer.chat_template == other.tokenizer.chat_template
    )


def header(one: Speaker, other: Speaker) -> list[str]:
    """Which is which, how the prompt is put to them, and what is not alike."""
    lines = [f"{label}: {each.name}" for label, each in zip(labels(one, other), (one, other), strict=True)]
    if one.has_template and other.has_template:
        lines.append("prompts go through the chat template of the tokenizer; each stands alone")
    elif one.has_template or other.has_template:
        with_it, without = (one, other) if one.has_template else (other, one)
        lines.append(f"prompts go through the chat template of {with_it.name}; {without.name} has none and continues")
    else:
        lines.append("there is no chat template: each prompt is continued as plain text, and stands alone")
    if not share_tokens(one, other):
        lines.append("the tokenizers differ: tokens, and tokens/s, are not of the same pieces of text")
    return lines


def labels(one: Speaker, other: Speaker) -> list[str]:
    """What their columns are called.

    Two of a kind are told apart by a number.
    """
    if one.kind != other.kind:
        return [one.kind, other.kind]
    return [f"{one.kind} 1", f"{other.kind} 2"]


def check_prompt(prompt: str) -> None:
    """RequestError if there is nothing to answer."""
    if not prompt.strip():
        raise RequestError("the prompt is empty: give some text")


def prompt_ids(speaker: Speaker, prompt: str) -> Tensor:
    """The tokens (1, num_tokens) of a prompt, by the chat template if there is one.

    Raises:
        RequestError: the prompt is empty, the template refuses it, or no token of an answer has room after it.
    """
    check_prompt(prompt)
    if speaker.has_template:
        try:
            text = speaker.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
            )
        except TemplateError as error:
            raise RequestError(f"the chat template of {speaker.name!r} refuses the prompt: {error}") from error
        ids = speaker.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        ids = speaker.tokenizer(prompt, verbose=False)["input_ids"]
    limit = longest_context(speaker.model)
    if not ids:
        raise RequestError(f"the prompt has no token for {speaker.name!r}: give some text")
    if limit is not None and len(ids) >= limit:
        raise RequestError(
            f"the prompt has {len(ids)} tokens, and {speaker.name!r} allows {limit} with the answer: shorten it"
        )
    return torch.tensor([ids])


def answer(
    speaker: Speaker,
    prompt: str,
    settings: Settings,
    shown: Callable[[str], None] = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Answer:
    """What the model answers.

    Args:
        shown: is given all the text so far, at each token; its time is not counted.

    Raises:
        RequestError: a setting out of range, or as `prompt_ids`.
    """
    settings.check()
    ids = prompt_ids(speaker, prompt)
    num_prompt = ids.shape[1]
    room = (longest_context(speaker.model) or math.inf) - num_prompt
    allowed = settings.model_copy(update={"max_new_tokens": min(settings.max_new_tokens, room)})
    streamer = _Clocked(lambda new: shown(_text(speaker.tokenizer, ids[0].tolist(), new).rstrip(INCOMPLETE)), clock)
    give_back_free_memory()
    baseline = restart_peak()
    ending = _generate(speaker, ids, allowed, streamer)
    above = peak_above(baseline)
    num_new, times = len(streamer.ids), streamer.times
    stopped: Stopped = "length" if settings.max_new_tokens <= room else "context"
    if streamer.ids[-1] in ending:
        stopped = "end"
    decode_seconds = times[-1] - times[1]
    return Answer(
        model=speaker.name,
        kind=speaker.kind,
        text=_text(speaker.tokenizer, ids[0].tolist(), streamer.ids),
        chat_template=speaker.has_template,
        prompt_tokens=num_prompt,
        new_tokens=num_new,
        stopped=stopped,
        prefill_seconds=times[1] - times[0],
        decode_seconds=decode_seconds,
        tokens_per_second=(num_new - 1) / decode_seconds if num_new > 1 else None,
        weight_bytes=speaker.num_bytes,
        dtype=str(speaker.model.dtype).removeprefix("torch."),
        peak_bytes=None if above is None else speaker.num_bytes + max(above, 0),
    )


class _Clocked(BaseStreamer):
    """The new tokens and when each came: first the time at which the prompt was about to be read.

    While they are shown the clock stands.
    """

    def __init__(self, shown: Callable[[list[int]], None], clock: Callable[[], float] = time.perf_counter) -> None:
        self.ids: list[int] = []
        self.times: list[float] = []
        self.shown, self.clock, self.lost = shown, clock, 0.0

    def put(self, value: Tensor) -> None:
        """Called by `generate`, first with the prompt, then with each token; on a GPU after it has come from there."""
        now = self.clock()
        self.times.append(now - self.lost)
        if len(self.times) == 1:
            return
        self.ids.append(int(value.item()))
        self.shown(self.ids)
        self.lost += self.clock() - now

    def end(self) -> None:
        """Nothing is held back."""


def _generate(speaker: Speaker, ids: Tensor, settings: Settings, streamer: _Clocked) -> set[int]:
    """Answer `ids` (1, num_tokens) into the streamer; returns the tokens that end an answer."""
    model: Any = speaker.model
    configured = model.generation_config.eos_token_id
    named = speaker.tokenizer.eos_token_id if configured is None else configured
    ending = [] if named is None else [named] if isinstance(named, int) else list(named)
    # Nothing but the temperature: what the model's own configuration adds would differ between models.
    sampling = {"temperature": settings.temperature, "top_k": 0, "top_p": 1.0} if settings.temperature else {}
    configuration = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=settings.temperature > 0,
        repetition_penalty=1.0,
        eos_token_id=ending or None,
        pad_token_id=ending[0] if ending else 0,
        use_cache=True,
        **sampling,
    )
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(settings.seed)
        model.generate(
            input_ids=ids.to(model.device),
            attention_mask=torch.ones_like(ids).to(model.device),
            generation_config=configuration,
            streamer=streamer,
        )
    return set(ending)


def _text(tokenizer: PreTrainedTokenizerBase, before: list[int], new: list[int]) -> str:
    """What the new tokens add to the text of those before: alone, a tokenizer may leave out the space in front."""

    def decoded(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    start, whole = decoded(before), decoded([*before, *new])
    return whole[len(start) :] if whole.startswith(start) else decoded(new)


def printable(text: str) -> str:
    """The text with control characters as their pictures: a model may say what would command a terminal.

    >>> printable("a\\x1b[31m\\n\\tb\\x9b")
    'a␛[31m\\n\\tb�'
    """

    def shown(character: str) -> str:
        code = ord(character)
        if character in "\n\t" or (code >= 32 and not 127 <= code < 160):
            return character
        return chr(0x2400 + code) if code < 32 else INCOMPLETE

    return "".join(map(shown, text))
