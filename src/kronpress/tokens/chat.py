"""Conversations to tokens through the tokenizer's chat template, and which of these tokens are answers."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable
from itertools import groupby
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from kronpress.errors import RequestError

Messages = list[dict[str, Any]]
Span = tuple[int, int]  # of characters

ANSWERING = "assistant"
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


def chat_template(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    """The template of the tokenizer that is to write the conversations of data set `name`.

    Raises:
        RequestError: it has none, or cannot say which characters a token is of.
    """
    if tokenizer.chat_template is None:
        raise RequestError(
            f"data {name!r} holds conversations, and the tokenizer has no chat template: take the tokenizer of a "
            "chat model, or set tokenizer.chat_template"
        )
    if not tokenizer.is_fast:
        raise RequestError(
            f"data {name!r} holds conversations, for which a fast tokenizer is needed; this is "
            f"{type(tokenizer).__name__}"
        )
    return tokenizer.get_chat_template()


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: object, where: str) -> tuple[list[int], list[bool]]:
    """The token ids of one conversation, exactly as the template writes it, and which of them count in the loss.

    A token counts if all its characters are those of an answer, a message of the role `assistant` with what the
    template puts at its end. Where the template has generation markers they say what an answer is. Elsewhere it is what
    the text of the conversation up to the answer has more than the text up to the question with the prompt for an
    answer; that both are beginnings of the whole text is checked.

    Args:
        where: the row, for messages.

    Raises:
        RequestError: what is given is no list of messages, the template refuses it, or it writes an earlier part
            of the conversation otherwise when more follows.
    """
    checked = _checked_messages(messages, where)
    template = tokenizer.get_chat_template()
    render = _renderer(tokenizer, template, where)
    if _MARKED.search(template):
        text, spans = render(checked, False)
    else:
        text, spans = render(checked, False)[0], answer_spans(lambda *given: render(*given)[0], checked, where)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return encoded["input_ids"], _within(encoded["offset_mapping"], spans)


def _checked_messages(messages: object, where: str) -> Messages:
    if not isinstance(messages, list) or not messages:
        raise RequestError(f"{where} is {_short(messages)}: expected a list of messages {{role, content}}")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise RequestError(f"{where} has the message {_short(message)}: expected {{role, content}}")
    # Columnar files give every message all keys that any has.
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _short(value: object) -> str:
    return text if len(text := repr(value)) <= 80 else f"{text[:77]}..."


def _renderer(
    tokenizer: PreTrainedTokenizerBase, template: str, where: str
) -> Callable[[Messages, bool], tuple[str, list[Span]]]:
    """messages, whether the prompt for an answer follows -> their text, and where it is marked as generated."""
    marked = _MARKED.search(template) is not None
    special: dict[str, Any] = tokenizer.special_tokens_map

    def render(messages: Messages, prompts: bool) -> tuple[str, list[Span]]:
        try:
            rendered: Any = render_jinja_template(
                conversations=[messages],
                chat_template=template,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=prompts,
                **special,
            )
        except (TemplateError, TypeError, KeyError) as error:
            raise RequestError(f"{where}: the chat template refuses it: {error}") from error
        texts, spans = rendered
        return texts[0], [(int(start), int(end)) for start, end in spans[0]] if marked else []

    return render


def answer_spans(render: Callable[[Messages, bool], str], messages: Messages, where: str) -> list[Span]:
    """Which characters of render(messages, False) answer, by the difference that each answer makes.

    Raises:
        RequestError: the texts of the beginnings of the conversation are not beginnings of its text.
    """
    full = render(messages, False)
    spans: list[Span] = []
    end = 0
    for role, group in groupby(messages, key=lambda message: message["role"]):
        begin, end = end, end + len(list(group))
        if role != ANSWERING:
            continue
        # One by one; or as one, where the template merges what one role says in several messages.
        found = [_answer_span(render, messages, i, i + 1, full) for i in range(begin, end)]
        if None in found:
            found = [_answer_span(render, messages, begin, end, full)]
        if None in found:
            raise RequestError(
                f"{where}: the chat template writes message {begin} otherwise when others follow, so that nothing says "
                "which tokens answer: put {% generation %} and {% endgeneration %} around answers in the template"
            )
        spans += [span for span in found if span is not None]
    return spans


def _answer_span(
    render: Callable[[Messages, bool], str], messages: Messages, begin: int, end: int, full: str
) -> Span | None:
    """The characters of `full` that messages begin..end-1 answer with; None if its beginnings do not agree."""
    asked, prompted = (render(messages[:begin], prompts) if begin else "" for prompts in (False, True))
    answered = render(messages[:end], False)
    if not (full.startswith(answered) and answered.startswith(asked) and prompted.startswith(asked)):
        return None
    # A prompt may begin what the answer need not have, such as a thought.
    shorter = min(len(prompted), len(answered))
    start = next((i for i in range(len(asked), shorter) if prompted[i] != answered[i]), shorter)
    if prompted == asked:
        # No prompt: what stands before the content is a header, unless it is only the space between two words. Where
        # that is, another content shows, which stands nowhere else.
        other = "answer"
        while other in answered:
            other += "-"
        shown = render([*messages[:begin], {**messages[begin], "content": other}], False)
        place = shown.find(other)
        if place < start or shown[:place] != answered[:place]:
            return None
        start = place if answered[start:place].strip() else start
    return start, len(answered)


def _within(offsets: list[Span], spans: list[Span]) -> list[bool]:
    """Of each token with the characters begin..end-1, whether there are any and one of the ordered spans has all."""
    starts = [start for start, _ in spans]
    counts = []
    for begin, end in offsets:
        before = bisect_right(starts, begin)
        counts.append(begin < end and before > 0 and end <= spans[before - 1][1])
    return counts
