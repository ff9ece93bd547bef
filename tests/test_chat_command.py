"""Two models answer one prompt: what they say is what generate gives, and the clock counts what it says it counts."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

import kronpress as kp
from kronpress import chat, cli
from kronpress.errors import RequestError

TEMPLATE = "{% for message in messages %}Q: {{ message.content }}\nA:{% endfor %}"
PROMPT = "The old man sat by the window"


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tiny_model, tiny_compressed, save_tiny_checkpoint) -> tuple[chat.Speaker, chat.Speaker]:
    folder = tmp_path_factory.mktemp("chat")
    save_tiny_checkpoint(tiny_model("gpt2"), folder / "dense")
    save_tiny_checkpoint(tiny_compressed("gpt2", "kronecker"), folder / "small")
    return chat.speaker(str(folder / "dense")), chat.speaker(str(folder / "small"))


def other_tokenizer(speaker: chat.Speaker, folder: Path, **changes: object) -> str:
    """The speaker's folder with another tokenizer."""
    shutil.copytree(speaker.name, folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_an_answer_is_what_generate_gives(pair, temperature):
    for speaker in pair:
        shown: list[str] = []
        settings = chat.Settings(max_new_tokens=12, temperature=temperature, seed=5)
        answer = chat.answer(speaker, PROMPT, settings, shown.append)
        ids = torch.tensor([speaker.tokenizer(PROMPT)["input_ids"]])
        torch.manual_seed(5)
        sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        expected = speaker.model.generate(
            ids.to(speaker.model.device), max_new_tokens=12, do_sample=temperature > 0, pad_token_id=0, **sampling
        )[0]
        whole, before = (speaker.tokenizer.decode(each, skip_special_tokens=True) for each in (expected, ids[0]))
        assert before + answer.text == whole
        assert (answer.prompt_tokens, answer.new_tokens) == (ids.shape[1], len(expected) - ids.shape[1])
        assert len(shown) == answer.new_tokens
        assert shown[-1] == answer.text.rstrip(chat.INCOMPLETE)
        assert answer.weight_bytes == sum(each.nbytes for each in speaker.model.parameters())
        assert answer.peak_bytes is None or answer.peak_bytes >= answer.weight_bytes
    assert [speaker.kind for speaker in pair] == ["dense", "compressed"]


def test_the_same_seed_draws_the_same_and_the_generator_is_left_as_it_was(pair):
    settings = chat.Settings(max_new_tokens=12, temperature=1.0, seed=1)
    state = torch.random.get_rng_state()
    texts = [chat.answer(pair[0], PROMPT, settings).text for _ in range(2)]
    other = chat.answer(pair[0], PROMPT, settings.model_copy(update={"seed": 2})).text
    assert texts[0] == texts[1] != other
    torch.testing.assert_close(torch.random.get_rng_state(), state, rtol=0, atol=0)


def test_tokens_per_second_are_of_new_tokens_after_the_first_and_showing_takes_no_time(pair):
    """With a clock of one second for each look at it: one for each token, and those while it is shown left out."""
    ticks = itertools.count()

    def shown(_: str) -> None:
        for _ in range(1000):
            next(ticks)

    answer = chat.answer(pair[0], PROMPT, chat.Settings(max_new_tokens=9), shown, lambda: float(next(ticks)))
    assert answer.new_tokens == 9
    assert (answer.prefill_seconds, answer.decode_seconds, answer.tokens_per_second) == (1.0, 8.0, 1.0)
    single = chat.answer(pair[0], PROMPT, chat.Settings(max_new_tokens=1))
    assert (single.new_tokens, single.tokens_per_second, single.decode_seconds) == (1, None, 0.0)


def test_an_answer_ends_with_the_model_the_length_or_the_context(pair, monkeypatch):
    dense = pair[0]
    assert chat.answer(dense, PROMPT, chat.Settings(max_new_tokens=3)).stopped == "length"
    full = chat.answer(dense, PROMPT, chat.Settings(max_new_tokens=10_000))
    assert full.stopped == "context"
    assert full.prompt_tokens + full.new_tokens == dense.model.config.max_position_embeddings
    with torch.no_grad():
        first = dense.model(chat.prompt_ids(dense, PROMPT).to(dense.model.device)).logits[0, -1].argmax().item()
    monkeypatch.setattr(dense.model.generation_config, "eos_token_id", [first])
    ended = chat.answer(dense, PROMPT, chat.Settings(max_new_tokens=10_000))
    assert (ended.stopped, ended.new_tokens) == ("end", 1)


def test_a_template_is_used_where_there_is_one_and_the_header_says_so(pair, tmp_path):
    dense, small = pair
    templated = chat.speaker(other_tokenizer(small, tmp_path / "templated", chat_template=TEMPLATE))
    expected = small.tokenizer(f"Q: {PROMPT}\nA:")["input_ids"]
    assert chat.prompt_ids(templated, PROMPT).tolist() == [expected]
    assert chat.prompt_ids(small, PROMPT).tolist() == [small.tokenizer(PROMPT)["input_ids"]]
    assert any("plain text" in line for line in chat.header(dense, small))
    assert any("chat template" in line and "has none" in line for line in chat.header(dense, templated))
    assert not any("has none" in line or "plain" in line for line in chat.header(templated, templated))
    refusing = chat.speaker(other_tokenizer(small, tmp_path / "r", chat_template="{{ raise_exception('not this') }}"))
    with pytest.raises(RequestError, match="not this"):
        chat.prompt_ids(refusing, PROMPT)


def test_tokenizers_that_differ_are_said(pair, tmp_path):
    dense, small = pair
    assert not any("differ" in line for line in chat.header(dense, small))
    templated = chat.speaker(other_tokenizer(small, tmp_path / "templated", chat_template=TEMPLATE))
    assert any("the tokenizers differ" in line for line in chat.header(dense, templated))


def test_a_run_and_a_checkpoint_know_what_they_were_made_from(pair, tmp_path):
    small = tmp_path / "run" / "model"
    shutil.copytree(pair[1].name, small)
    with pytest.raises(RequestError, match="--against"):
        chat.made_from(str(small))
    (tmp_path / "run" / "results.json").write_text(json.dumps({"recipe": {"model": "some/model"}}))
    assert chat.made_from(str(small)) == chat.made_from(str(tmp_path / "run")) == "some/model"
    recipe = kp.load_recipe({"targets": "mlp", "structure": "low_rank", "budget": {"kept_of_targets": 0.5}})
    (tmp_path / "half.yaml").write_text(json.dumps({**recipe.model_dump(mode="json"), "model": None}))
    out = tmp_path / "made"
    assert cli.main(["compress", pair[0].name, "--recipe", "low-rank", "--out", str(out)]) == 0
    assert chat.made_from(str(out)) == pair[0].name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "  \n"], "the prompt is empty"),
        (["--json"], "give --prompt"),
        (["--prompt", "He", "--max-new-tokens", "0"], "at least 1"),
        (["--prompt", "He", "--max-new-tokens", "-3"], "-3"),
        (["--prompt", "He", "--temperature", "-0.5"], "temperature -0.5"),
        (["--prompt", "He", "--temperature", "nan"], "temperature nan"),
        (["--prompt", "He", "--temperature", "inf"], "temperature inf"),
        (["--prompt", "He", "--seed", "-1"], "seed -1"),
        (["--prompt", "He " * 300], "allows 128"),
        (["--prompt", "He", "--against", "./nowhere"], "no such folder"),
    ],
)
def test_a_wrong_request_is_one_sentence(pair, capsys, options, said):
    names = [] if "--against" in options else ["--against", pair[0].name]
    assert cli.main(["chat", pair[1].name, *names, *options]) == 2
    ended = capsys.readouterr()
    assert said in ended.err.splitlines()[-1]
    assert "error" in (json.loads(ended.out) if "--json" in options else {"error": ""})


def test_prompts_are_asked_for_until_an_empty_line_or_the_end(pair, monkeypatch, capsys):
    dense, small = pair

    def talk(*lines: str | BaseException) -> str:
        given_lines = iter(lines)

        def asked_for() -> str:
            line = next(given_lines)
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr(cli, "_asked_for", asked_for)
        assert cli.main(["chat", small.name, "--against", dense.name, "--max-new-tokens", "4"]) == 0
        return capsys.readouterr().out

    settings = chat.Settings(max_new_tokens=4)
    first = chat.answer(dense, "He said", settings).text.split()
    for ending in ("", EOFError(), KeyboardInterrupt()):
        said = talk("He said", "He " * 300, "He said", ending)
        assert said.count("4 new") == 4
        assert first[0] in chat.printable(said)
    assert "tokens/s" not in talk("")


@given(st.text())
def test_what_is_printed_commands_no_terminal(text):
    shown = chat.printable(text)
    assert len(shown) == len(text)
    assert not any((ord(each) < 32 and each not in "\n\t") or 127 <= ord(each) < 160 for each in shown)
    assert chat.printable(shown) == shown
