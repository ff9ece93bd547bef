"""Conversations become what their template writes, and nothing but answers counts."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

import kronpress as kp
from kronpress.tokens import load_train_data
from kronpress.tokens.chat import encode_chat

# A conversation as parts of its text, each with whether it is an answer: what each template below writes, in Python.
Parts = list[tuple[str, bool]]
HEADER = "<|im_start|>"
END = "<|im_end|>\n"

CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
MARKED = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}\
{% else %}{{ m.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# The prompt begins a thought, which no stored answer has.
THINKING = CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")
WITHOUT_PROMPT = CHATML[: CHATML.index("{% if add")]
# As in Llama 2: no header before an answer, and nothing between them but a space.
BRACKETS = """{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }} {{ eos_token }}\
{% else %}{{ bos_token }}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"""
# Nothing but letters between two messages, so that tokens have characters of both.
LETTERS = """{% for m in messages %}{{ 'h' if m.role == 'assistant' else 'ot' }}{{ m.content }}{% endfor %}\
{% if add_generation_prompt %}h{% endif %}"""
# What one role says in several messages is one message.
MERGING = """{% for m in messages %}{% if loop.first or m.role != loop.previtem.role %}<|im_start|>{{ m.role }}
{% else %} + {% endif %}{{ m.content }}\
{% if loop.last or m.role != loop.nextitem.role %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def chatml(messages: list[dict[str, str]], end_counts: str = END) -> Parts:
    parts: Parts = []
    for message in messages:
        answers = message["role"] == "assistant"
        parts += [(f"{HEADER}{message['role']}\n", False), (message["content"] + end_counts, answers)]
        parts += [(END.removeprefix(end_counts), False)]
    return parts


def brackets(messages: list[dict[str, str]]) -> Parts:
    return [
        (f" {message['content']} <|endoftext|>", True)
        if message["role"] == "assistant"
        else (f"<|endoftext|>[INST] {message['content']} [/INST]", False)
        for message in messages
    ]


def letters(messages: list[dict[str, str]]) -> Parts:
    parts: Parts = []
    for message in messages:
        answers = message["role"] == "assistant"
        parts += [("h" if answers else "ot", False), (message["content"], answers)]
    return parts


def merging(messages: list[dict[str, str]]) -> Parts:
    parts: Parts = []
    for number, message in enumerate(messages):
        answers = message["role"] == "assistant"
        if number == 0 or messages[number - 1]["role"] != message["role"]:
            parts.append((f"{HEADER}{message['role']}\n", False))
        else:
            parts.append((" + ", answers))
        last = number + 1 == len(messages) or messages[number + 1]["role"] != message["role"]
        parts.append((message["content"] + (END if last else ""), answers))
    return parts


TEMPLATES = {
    "without markers": (CHATML, chatml),
    "with markers": (MARKED, lambda messages: chatml(messages, "<|im_end|>")),
    "with a prompt that begins a thought": (THINKING, chatml),
    "without a prompt": (WITHOUT_PROMPT, chatml),
    "without headers": (BRACKETS, brackets),
}


def with_template(tokenizer: Any, template: str | None) -> Any:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def expected_counts(tokenizer: Any, ids: list[int], parts: Parts) -> list[bool]:
    """Of each token whether all its characters answer; of ASCII text, in which a token is what it decodes to."""
    answers = [is_answer for text, is_answer in parts for _ in text]
    counts, end = [], 0
    for token in ids:
        begin, end = end, end + len(tokenizer.decode([token]))
        counts.append(all(answers[begin:end]))
    assert end == len(answers)
    return counts


# Texts that merge with what stands around them, and none that is blank at an end, which templates often strip.
contents = st.text("ab <|>\n[]", min_size=1, max_size=8).map(lambda text: f"x{text}y") | st.text(
    "ab", min_size=1, max_size=8
)


@st.composite
def conversations(draw: Any, contents: Any = contents, alternating: bool = True) -> list[dict[str, str]]:
    """Messages that end with either role; `alternating` ones begin with a question."""
    if alternating:
        roles = ["user", "assistant"] * draw(st.integers(1, 3))
        roles = draw(st.sampled_from([[], ["system"]])) + roles[: draw(st.integers(1, len(roles)))]
    else:
        roles = ["user", *draw(st.lists(st.sampled_from(["user", "assistant"]), max_size=6))]
    return [{"role": role, "content": draw(contents)} for role in roles]


@pytest.mark.parametrize("name", TEMPLATES)
@given(messages=conversations())
@settings(max_examples=60, deadline=None)
def test_only_answers_count_and_all_of_them(tiny_tokenizer, name, messages):
    template, write = TEMPLATES[name]
    tokenizer = with_template(tiny_tokenizer, template)
    ids, counts = encode_chat(tokenizer, messages, "row 0")
    parts = write(messages)
    assert ids == tokenizer("".join(text for text, _ in parts), add_special_tokens=False)["input_ids"]
    assert counts == expected_counts(tokenizer, ids, parts)
    if any(message["role"] == "assistant" for message in messages):
        assert any(counts)


@given(messages=conversations(st.text("theo", min_size=1, max_size=6)))
@settings(max_examples=100, deadline=None)
def test_a_token_that_is_only_partly_of_an_answer_does_not_count(tiny_tokenizer, messages):
    tokenizer = with_template(tiny_tokenizer, LETTERS)
    ids, counts = encode_chat(tokenizer, messages, "row 0")
    parts = letters(messages)
    assert ids == tokenizer("".join(text for text, _ in parts), add_special_tokens=False)["input_ids"]
    assert counts == expected_counts(tokenizer, ids, parts)


def test_ids_that_with_their_mark_need_four_bytes_are_kept(tiny_tokenizer, tmp_path):
    tokenizer = with_template(tiny_tokenizer, CHATML)
    tokenizer.add_tokens([f"({number})" for number in range(40_000)])
    messages = [{"role": "user", "content": "(39999)"}, {"role": "assistant", "content": "(39998)"}]
    name = write_rows(tmp_path / "chat.jsonl", [{"messages": messages}])
    (stream,) = load_train_data(tokenizer, name, 10**6, 8, cache=tmp_path).streams
    ids, counts = encode_chat(tokenizer, messages, "row 0")
    assert max(ids) >= 2**15
    assert [each.tolist() for each in stream.read(0, len(stream))] == [ids, counts]


@given(messages=conversations(alternating=False), merges=st.booleans())
@settings(max_examples=80, deadline=None)
def test_several_messages_of_one_role_are_answers_each_or_as_one(tiny_tokenizer, messages, merges):
    template, write = (MERGING, merging) if merges else (CHATML, chatml)
    tokenizer = with_template(tiny_tokenizer, template)
    ids, counts = encode_chat(tokenizer, messages, "row 0")
    parts = write(messages)
    assert ids == tokenizer("".join(text for text, _ in parts), add_special_tokens=False)["input_ids"]
    assert counts == expected_counts(tokenizer, ids, parts)


@given(messages=conversations())
@settings(max_examples=40, deadline=None)
def test_markers_give_what_transformers_gives_where_tokens_end_with_answers(tiny_tokenizer, messages):
    # The answer between two special tokens: no token has characters of it and of something else.
    tokenizer = with_template(tiny_tokenizer, MARKED.replace("{% generation %}", "<|im_start|>{% generation %}"))
    ids, counts = encode_chat(tokenizer, messages, "row 0")
    theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert ids == theirs["input_ids"]
    assert counts == [bool(mark) for mark in theirs["assistant_masks"]]


def test_keys_that_only_other_messages_have_are_not_there(tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, "{% for m in messages %}{{ m.name if m.name is defined }}{% endfor %}a")
    messages = [{"role": "user", "content": "x", "name": None}, {"role": "user", "content": "y", "name": "Anna"}]
    assert encode_chat(tokenizer, messages, "row 0")[0] == tokenizer("Annaa", add_special_tokens=False)["input_ids"]


# ---- what is refused ----


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("text", "row 3 is 'text': expected a list of messages"),
        ([], "expected a list of messages"),
        ([{"role": "user"}], "has the message {'role': 'user'}: expected {role, content}"),
        ([{"from": "human", "value": "x" * 99}], r"has the message {'from': 'human'.*\.\.\.: expected {role, content}"),
    ],
)
def test_what_is_no_conversation_is_named(tiny_tokenizer, messages, reason):
    with pytest.raises(kp.RequestError, match=reason):
        encode_chat(with_template(tiny_tokenizer, CHATML), messages, "data 'set': row 3")


def test_a_template_that_writes_earlier_messages_otherwise_is_refused(tiny_tokenizer):
    # Earlier answers lose their thoughts, as in some reasoning models.
    template = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else m.content.split('</think>')[-1] }}")
    messages = [
        {"role": role, "content": text} for role, text in [("user", "a"), ("assistant", "t</think>b"), ("user", "c")]
    ]
    tokenizer = with_template(tiny_tokenizer, template)
    with pytest.raises(kp.RequestError, match=r"row 0: the chat template writes message 1 otherwise .*generation"):
        encode_chat(tokenizer, messages, "row 0")
    assert any(encode_chat(tokenizer, messages[:2], "row 0")[1])


def test_what_the_template_refuses_is_one_sentence(tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(kp.RequestError, match="row 0: the chat template refuses it: roles must alternate"):
        encode_chat(tokenizer, [{"role": "user", "content": "x"}], "row 0")


# ---- from a file to windows ----

CONVERSATIONS = [
    [{"role": "user", "content": "Who drank coffee?"}, {"role": "assistant", "content": "The old man."}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "By the window."},
        {"role": "user", "content": "When?"},
        {"role": "assistant", "content": "In winter."},
    ],
]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        Dataset.from_list(rows).to_parquet(path)
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_file_of_conversations_is_trained_on_its_answers(tiny_tokenizer, tmp_path, suffix):
    tokenizer = with_template(tiny_tokenizer, CHATML)
    name = write_rows(tmp_path / f"chat{suffix}", [{"messages": each, "id": 1} for each in CONVERSATIONS])
    data = load_train_data(tokenizer, name, 10**6, 8, cache=tmp_path)
    (stream,) = data.streams
    ids, counts = stream.read(0, len(stream))
    encoded = [encode_chat(tokenizer, each, "") for each in CONVERSATIONS]
    assert ids.tolist() == [token for each, _ in encoded for token in each]
    assert counts.tolist() == [count for _, each in encoded for count in each]
    assert tokenizer.decode(ids[counts]) == "".join(
        message["content"] + END for each in CONVERSATIONS for message in each if message["role"] == "assistant"
    )
    assert data.is_masked
    window = data.windows(8, 0)[0]
    assert (window["input_ids"].shape, window["counted"].dtype) == ((8,), torch.bool)
    # Where nothing is trained, as in a calibration, all tokens are read.
    torch.testing.assert_close(kp.load_train_tokens(tokenizer, name, 10**6, cache=tmp_path).long(), ids)


def test_text_beside_conversations_counts_as_a_whole(tiny_tokenizer, tmp_path):
    tokenizer = with_template(tiny_tokenizer, CHATML)
    chat = write_rows(tmp_path / "chat.jsonl", [{"messages": each} for each in CONVERSATIONS])
    text = write_rows(tmp_path / "text.jsonl", [{"text": "The old man.", "messages": CONVERSATIONS[0]}])
    (stream,) = load_train_data(tokenizer, [text, chat], 10**6, 8, cache=tmp_path).streams
    num_text = len(tokenizer("The old man.", add_special_tokens=False)["input_ids"]) + 1
    assert stream.read(0, num_text)[1].all()
    assert not stream.read(num_text, len(stream))[1].all()


def test_without_a_template_or_an_answer_it_is_refused(tiny_tokenizer, tmp_path):
    chat = write_rows(tmp_path / "chat.jsonl", [{"messages": each} for each in CONVERSATIONS])
    with pytest.raises(
        kp.RequestError, match=r"chat.jsonl' holds conversations, and the tokenizer has no chat template"
    ):
        load_train_data(tiny_tokenizer, chat, 10, 8, cache=tmp_path)
    asked = write_rows(tmp_path / "asked.jsonl", [{"messages": CONVERSATIONS[0][:1]}])
    with pytest.raises(kp.RequestError, match=r"asked.jsonl' \(train\): there is no answer in its conversations"):
        load_train_data(with_template(tiny_tokenizer, CHATML), asked, 10, 8, cache=tmp_path)


def test_another_template_is_another_tokenisation(tiny_tokenizer, tmp_path):
    chat = write_rows(tmp_path / "chat.jsonl", [{"messages": each} for each in CONVERSATIONS])
    read = []
    for template in (CHATML, BRACKETS, CHATML):
        (stream,) = load_train_data(with_template(tiny_tokenizer, template), chat, 10**6, 8, cache=tmp_path).streams
        read.append(stream.read(0, len(stream))[0].tolist())
    assert read[0] == read[2] != read[1]


def test_a_row_that_is_no_conversation_is_named_by_its_number(tiny_tokenizer, tmp_path):
    rows = [{"messages": CONVERSATIONS[0]}, {"messages": None}]
    name = write_rows(tmp_path / "chat.jsonl", rows)
    with pytest.raises(kp.RequestError, match=r"chat.jsonl': row 1 is None: expected a list of messages"):
        load_train_data(with_template(tiny_tokenizer, CHATML), name, 10**6, 8, cache=tmp_path)


def test_evaluation_reads_no_conversations(tmp_path):
    name = write_rows(tmp_path / "chat.jsonl", [{"messages": CONVERSATIONS[0]}])
    with pytest.raises(kp.RequestError, match="no column 'text'; it has messages"):
        kp.load_running_text(name, "test")
