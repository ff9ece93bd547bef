"""The figures of an evaluation are those of its definition: every token once, every byte once, in any batching."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import kronpress as kp
from kronpress import evaluation
from kronpress.evaluation import scored_windows

TEXT = "The café stood on the corner, and in the evening the old man sat by its window."


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, but one for the two bytes of é; `<s>` before the text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    e_acute = "Ã", "©"  # bytes c3 and a9 as GPT-2's byte-level alphabet writes them
    vocabulary = {symbol: number for number, symbol in enumerate(["<s>", *alphabet, "".join(e_acute)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[e_acute]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


class Successor(nn.Module):
    """Expects, with probability one half, that every token is followed by the next number."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size, max_position_embeddings=64)
        rest = 0.5 / (vocab_size - 1)
        chances = torch.full((vocab_size, vocab_size), rest).fill_diagonal_(0.5).roll(1, dims=1)
        self.logits = nn.Parameter(chances.log())

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.logits[input_ids])


def without_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = None
    return tokenizer


# ---- which token is scored where ----


@st.composite
def window_sizes(draw: st.DrawFn) -> tuple[int, int, int]:
    window = draw(st.integers(1, 40))
    return draw(st.integers(2, 200)), window, draw(st.integers(1, window))


@given(window_sizes())
@settings(max_examples=300, deadline=None)
def test_every_target_is_scored_once_with_at_least_the_promised_context(sizes):
    num_ids, window, stride = sizes
    targets = []
    for number, (first, end, scored) in enumerate(scored_windows(num_ids, window, stride)):
        assert first == number * stride
        assert 1 <= end - first <= window
        for target in range(end + 1 - scored, end + 1):
            assert min(target, window - stride + 1) <= target - first <= window
            targets.append(target)
    assert targets == list(range(1, num_ids))


@torch.no_grad()
def slow_nll_sum(model: nn.Module, ids: list[int], window: int, stride: int) -> float:
    """Token by token: the context of target t begins at the first multiple of the stride that leaves t in reach."""
    total = 0.0
    for target in range(1, len(ids)):
        first = stride * math.ceil(max(0, target - window) / stride)
        logits = model(input_ids=torch.tensor([ids[first:target]])).logits[0, -1]
        total -= torch.log_softmax(logits.double(), dim=-1)[ids[target]].item()
    return total


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(("window", "stride"), [(128, 128), (16, 16), (16, 5), (7, 1), (1, 1), (9, None), (None, None)])
@pytest.mark.parametrize("bos", [True, False])
def test_equals_scoring_token_by_token(tiny_compressed, tiny_tokenizer, family, window, stride, bos):
    model = tiny_compressed(family, "kronecker")
    ids = tiny_tokenizer(TEXT)["input_ids"]
    result = kp.evaluate(model, tiny_tokenizer, TEXT, window=window, stride=stride, bos=bos)
    window = window or model.config.max_position_embeddings
    stride = stride or window
    assert (result.protocol, result.window, result.stride, result.bos) == ("window", window, stride, bos)
    assert result.num_tokens == len(ids) - 1 + bos
    expected = slow_nll_sum(model, [0, *ids] if bos else ids, window, stride)
    assert result.nll_sum_nats == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 5), (1, 1)])
def test_batching_does_not_change_the_result(tiny_model, tiny_tokenizer, monkeypatch, window, stride):
    model = tiny_model("gpt2")
    batches = []
    model.register_forward_pre_hook(lambda _, __, inputs: batches.append(len(inputs["input_ids"])), with_kwargs=True)
    together = kp.evaluate(model, tiny_tokenizer, TEXT, window=window, stride=stride)
    assert max(batches) > 1
    batches.clear()
    monkeypatch.setattr(evaluation, "_MAX_LOGITS", 1)
    one_by_one = kp.evaluate(model, tiny_tokenizer, TEXT, window=window, stride=stride)
    assert set(batches) == {1}
    assert together.nll_sum_nats == pytest.approx(one_by_one.nll_sum_nats, rel=1e-6)
    assert together.model_dump(exclude={"nll_sum_nats"}) == one_by_one.model_dump(exclude={"nll_sum_nats"})


# ---- the figures ----


@pytest.mark.parametrize("bos", [True, False])
def test_a_uniform_model_has_the_vocabulary_size_as_perplexity(tiny_model, tiny_tokenizer, tiny_text, bos):
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    result = kp.evaluate(model, tiny_tokenizer, tiny_text, bos=bos)
    assert result.perplexity == pytest.approx(300, rel=1e-5)
    assert result.nll_mean_nats == pytest.approx(math.log(300), rel=1e-6)


def test_bits_per_byte_by_hand_on_ten_bytes(byte_tokenizer):
    model = Successor(len(byte_tokenizer))
    with_bos = kp.evaluate(model, byte_tokenizer, "abcdefghij")
    surprise_at_a = math.log2(2 * 257)  # `a` is not the number after `<s>`
    assert (with_bos.num_tokens, with_bos.num_bytes) == (10, 10)
    assert with_bos.bits_per_byte == pytest.approx((9 * 1 + surprise_at_a) / 10, rel=1e-6)

    without = kp.evaluate(model, byte_tokenizer, "abcdefghij", bos=False)
    assert (without.num_tokens, without.num_bytes) == (9, 9)
    assert without.bits_per_byte == pytest.approx(1, rel=1e-6)
    assert without.perplexity == pytest.approx(2, rel=1e-6)


@given(nll=st.floats(0, 1e6), num_tokens=st.integers(1, 10**6), num_bytes=st.integers(1, 10**6))
@settings(max_examples=50, deadline=None)
def test_bits_per_byte_and_perplexity_are_two_views_of_one_sum(nll, num_tokens, num_bytes):
    nll = min(nll, 500 * num_tokens)  # exp of more is no number
    result = kp.EvaluationResult(
        protocol="window",
        window=8,
        stride=8,
        bos=True,
        num_tokens=num_tokens,
        num_bytes=num_bytes,
        nll_sum_nats=nll,
    )
    assert math.log(result.perplexity) * num_tokens == pytest.approx(nll, rel=1e-6, abs=1e-6)
    assert result.bits_per_byte * num_bytes * math.log(2) == pytest.approx(nll, rel=1e-9)
    fields = result.to_json()
    assert fields["perplexity"] == result.perplexity
    assert fields["bits_per_byte"] == result.bits_per_byte
    assert fields["nll_mean_nats"] == result.nll_mean_nats
    assert kp.EvaluationResult(**{name: fields[name] for name in result.model_dump()}) == result


# ---- the first token ----


def test_bos_is_used_whenever_the_tokenizer_has_one(tiny_model, tiny_tokenizer):
    model = tiny_model("gpt2")
    assert kp.evaluate(model, tiny_tokenizer, TEXT) == kp.evaluate(model, tiny_tokenizer, TEXT, bos=True)
    bare = without_bos(tiny_tokenizer)
    assert kp.evaluate(model, bare, TEXT) == kp.evaluate(model, tiny_tokenizer, TEXT, bos=False)
    with pytest.raises(kp.RequestError, match="no beginning-of-sequence token"):
        kp.evaluate(model, bare, TEXT, bos=True)


@pytest.mark.parametrize(("text", "unscored"), [("abc", "a"), ("éa", "é"), ("éé", "é"), ("\na", "\n")])
def test_without_bos_the_bytes_of_the_first_token_do_not_count(byte_tokenizer, text, unscored):
    model = Successor(len(byte_tokenizer))
    with_bos, without = (kp.evaluate(model, byte_tokenizer, text, bos=bos) for bos in (True, False))
    assert with_bos.num_bytes == len(text.encode())
    assert without.num_bytes == len(text.encode()) - len(unscored.encode())
    assert with_bos.num_tokens == without.num_tokens + 1 == len(text)


def test_a_first_token_of_several_letters_and_a_space(tiny_model, tiny_tokenizer):
    text = " old men"
    first = tiny_tokenizer.decode(tiny_tokenizer(text)["input_ids"][:1])
    assert len(first) > 1
    assert kp.evaluate(tiny_model("gpt2"), tiny_tokenizer, text, bos=False).num_bytes == len(text) - len(first)


# ---- refusals ----


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"window": 0}, ["window 0", "128"]),
        ({"window": 129}, ["window 129", "128"]),
        ({"window": -1}, ["window -1"]),
        ({"window": 16, "stride": 0}, ["stride 0", "16"]),
        ({"window": 16, "stride": 17}, ["stride 17", "16"]),
        ({"protocol": "windw"}, ["'windw'", "did you mean 'window'"]),
    ],
)
def test_an_impossible_protocol_is_refused_with_what_is_allowed(tiny_model, tiny_tokenizer, options, fragments):
    with pytest.raises(kp.RequestError) as refusal:
        kp.evaluate(tiny_model("gpt2"), tiny_tokenizer, TEXT, **options)
    for fragment in fragments:
        assert fragment in str(refusal.value)


def test_a_model_that_names_no_limit_needs_a_window(byte_tokenizer):
    model = Successor(len(byte_tokenizer))
    model.config.max_position_embeddings = None
    with pytest.raises(kp.RequestError, match="give a window"):
        kp.evaluate(model, byte_tokenizer, "abc")
    assert kp.evaluate(model, byte_tokenizer, "abc", window=1000).num_tokens == 3


@pytest.mark.parametrize(("text", "bos", "num_ids"), [("", True, 1), ("", False, 0), ("a", False, 1)])
def test_a_text_too_short_to_predict_anything_is_refused(byte_tokenizer, text, bos, num_ids):
    with pytest.raises(kp.RequestError, match=f"{num_ids} tokens: at least 2"):
        kp.evaluate(Successor(len(byte_tokenizer)), byte_tokenizer, text, bos=bos)


def test_a_tokenizer_that_knows_more_tokens_than_the_model_is_refused(tiny_model, tiny_tokenizer):
    with pytest.raises(kp.RequestError, match="300 tokens and the model 299"):
        kp.evaluate(tiny_model("gpt2", vocab_size=299), tiny_tokenizer, TEXT)
    assert kp.evaluate(tiny_model("gpt2", vocab_size=304), tiny_tokenizer, TEXT).num_tokens > 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("training", [True, False])
def test_weights_that_are_not_finite_are_failed_work(tiny_compressed, tiny_tokenizer, value, training):
    model = tiny_compressed("gpt2", "low_rank").train(training)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.right[0, 0] = value
    with pytest.raises(kp.WorkError, match="not finite"):
        kp.evaluate(model, tiny_tokenizer, TEXT)
    assert model.training is training


# ---- side effects ----


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_comes_back(tiny_model, tiny_tokenizer, training):
    dropout = {"attn_pdrop": 0.5, "embd_pdrop": 0.5, "resid_pdrop": 0.5}
    model = tiny_model("gpt2", **dropout).train(training)
    expected = kp.evaluate(tiny_model("gpt2"), tiny_tokenizer, TEXT)
    assert kp.evaluate(model, tiny_tokenizer, TEXT) == expected
    assert {module.training for module in model.modules()} == {training}


def test_the_mode_comes_back_after_a_failure_in_the_model(tiny_model, tiny_tokenizer, monkeypatch):
    model = tiny_model("gpt2").train()

    def out_of_memory(**_: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "forward", out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        kp.evaluate(model, tiny_tokenizer, TEXT)
    assert model.training
