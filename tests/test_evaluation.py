"""The figures of an evaluation are those of its protocol's definition, in any batching."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import kronpress as kp
from kronpress import evaluation
from kronpress.evaluation import PROTOCOLS, scored_windows
from kronpress.recipe import Evaluation

TEXT = "The café stood on the corner, and in the evening the old man sat by its window."
# The last words take from one to several tokens; the lengths differ, so that neighbours in a batch are padded.
PASSAGES = [
    "The café stood on the corner of the street",
    "He drank coffee, and\nnobody knew  naïveté",
    "a b",
    TEXT + " " + TEXT,
    "In the evening the old man sat by its window.\n",
]
# Of each protocol: something to measure and options that the tiny models allow.
EXAMPLES: dict[str, dict[str, Any]] = {
    "window": {"text": TEXT},
    "krony": {"text": TEXT, "window": 16},
    "lambada-last-word": {"text": PASSAGES},
}


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


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("protocol", "options"),
    [
        ("window", {"window": 16, "stride": 16}),
        ("window", {"window": 16, "stride": 5}),
        ("window", {"window": 1}),
        ("krony", {"window": 16}),
        ("lambada-last-word", {}),
        ("lambada-last-word", {"window": 16, "bos": True}),
    ],
)
def test_batching_and_padding_do_not_change_the_result(
    tiny_model, tiny_tokenizer, monkeypatch, family, protocol, options
):
    model = tiny_model(family)
    batches = []
    model.register_forward_pre_hook(lambda _, __, inputs: batches.append(len(inputs["input_ids"])), with_kwargs=True)
    given = {**EXAMPLES[protocol], **options}
    together = kp.evaluate(model, tiny_tokenizer, protocol=protocol, **given).model_dump()
    assert max(batches) > 1
    batches.clear()
    monkeypatch.setattr(evaluation, "_MAX_LOGITS", 1)
    one_by_one = kp.evaluate(model, tiny_tokenizer, protocol=protocol, **given).model_dump()
    assert set(batches) == {1}
    for name in ("nll_sum_nats", "nll_mean_nats"):
        assert together.pop(name) == pytest.approx(one_by_one.pop(name), rel=1e-6)
    assert together == one_by_one


# ---- krony ----


@torch.no_grad()
@pytest.mark.parametrize("window", [2, 3, 16, 19, 20, 128])
def test_krony_is_the_mean_of_the_losses_that_the_model_itself_gives_of_each_window(tiny_compressed, window):
    model = tiny_compressed("gpt2", "kronecker")
    tokenizer = OneTokenAWord(39)  # 39 = 2·19 + 1: the last window of 19 has one token, of 20 nineteen
    pieces = [piece for piece in torch.arange(39)[None].split(window, dim=1) if piece.shape[1] > 1]
    losses = [model(input_ids=piece, labels=piece).loss.item() for piece in pieces]
    result = kp.evaluate(model, tokenizer, tokenizer.text, "krony", window=window)
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert result.num_tokens == sum(piece.shape[1] - 1 for piece in pieces)
    sums = [loss * (piece.shape[1] - 1) for loss, piece in zip(losses, pieces, strict=True)]
    assert result.nll_sum_nats == pytest.approx(sum(sums), rel=1e-5)
    assert (result.protocol, result.window, result.stride, result.bos) == ("krony", window, window, False)
    assert (result.num_bytes, result.num_words, result.accuracy) == (None, None, None)
    assert (result.bits_per_byte, result.word_perplexity) == (None, None)


class OneTokenAWord:
    """Stands for a tokenizer: the words of its text are the numbers 0, 1, 2, …"""

    bos_token_id = 0

    def __init__(self, num_words: int) -> None:
        self.text = " ".join(map(str, range(num_words)))

    def __len__(self) -> int:
        return 300

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


def test_krony_by_hand_weighs_a_short_last_window_as_much_as_a_full_one(byte_tokenizer):
    model = Successor(len(byte_tokenizer))
    # abc | da: two tokens of one bit, then one that costs as much as a wrong one.
    result = kp.evaluate(model, byte_tokenizer, "abcda", "krony", window=3)
    wrong = math.log(2 * 257)
    assert result.nll_mean_nats == pytest.approx((math.log(2) + wrong) / 2, rel=1e-6)
    assert result.nll_sum_nats == pytest.approx(2 * math.log(2) + wrong, rel=1e-6)
    assert result.num_tokens == 3


def test_krony_has_windows_of_1024_tokens_without_bos(tiny_model, tiny_tokenizer, tiny_text):
    model = tiny_model("gpt2", n_positions=1500)
    text = tiny_text * 3
    result = kp.evaluate(model, tiny_tokenizer, text, "krony")
    assert (result.window, result.stride, result.bos) == (1024, 1024, False)
    assert result == kp.evaluate(model, tiny_tokenizer, text, "krony", window=1024, stride=1024, bos=False)
    num_ids = len(tiny_tokenizer(text)["input_ids"])
    assert num_ids > 1024
    assert result.num_tokens == num_ids - math.ceil(num_ids / 1024)


def test_krony_on_a_model_that_reads_less_says_so(tiny_model, tiny_tokenizer):
    result = kp.evaluate(tiny_model("gpt2"), tiny_tokenizer, TEXT, "krony")
    assert result == kp.evaluate(tiny_model("gpt2"), tiny_tokenizer, TEXT, "krony", window=128)
    assert (result.protocol, result.window) == ("krony", 128)


@pytest.mark.parametrize("protocol", ["window", "krony"])
def test_documents_are_joined_by_two_newlines(tiny_model, tiny_tokenizer, protocol):
    measured = [
        kp.evaluate(tiny_model("gpt2"), tiny_tokenizer, text, protocol, window=16)
        for text in (["The old man.", "", " He sat. "], "The old man.\n\n\n\n He sat. ")
    ]
    assert measured[0] == measured[1]


# ---- the last word ----


@torch.no_grad()
def slow_last_word(model: nn.Module, tokenizer: Any, passage: str, window: int, bos: bool) -> tuple[float, bool]:
    """Of one passage: negative log-likelihood of the last word in nats, and whether greedy decoding gives it."""
    passage = passage.rstrip()
    before = passage[: passage.rindex(" ")].rstrip()
    context, word = tokenizer(before)["input_ids"], tokenizer(passage[len(before) :])["input_ids"]
    assert context + word == tokenizer(passage)["input_ids"]
    read = [tokenizer.bos_token_id] * bos + context
    nll, greedy = 0.0, True
    for position, token in enumerate(word):
        read_now = (read + word[:position])[-(window - len(word) + 1 + position) :]
        logits = model(input_ids=torch.tensor([read_now])).logits[0, -1]
        nll -= torch.log_softmax(logits.double(), dim=-1)[token].item()
        greedy = greedy and logits.argmax().item() == token
    return nll, greedy


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(("window", "bos"), [(None, None), (128, True), (16, False), (16, True)])
def test_last_words_equal_those_of_one_passage_at_a_time(tiny_compressed, tiny_tokenizer, family, window, bos):
    model = tiny_compressed(family, "kronecker")
    result = kp.evaluate(model, tiny_tokenizer, [*PASSAGES, "", " \n"], "lambada-last-word", window=window, bos=bos)
    slow = [slow_last_word(model, tiny_tokenizer, passage, window or 128, bool(bos)) for passage in PASSAGES]
    assert (result.protocol, result.window, result.stride, result.bos) == (
        "lambada-last-word",
        window or 128,
        None,
        bool(bos),
    )
    total = sum(nll for nll, _ in slow)
    assert result.nll_sum_nats == pytest.approx(total, rel=1e-5)
    assert result.perplexity == result.word_perplexity == pytest.approx(math.exp(total / len(PASSAGES)), rel=1e-5)
    assert result.accuracy == sum(greedy for _, greedy in slow) / len(PASSAGES)
    assert result.num_words == len(PASSAGES)
    assert result.num_tokens > len(PASSAGES)
    assert (result.num_bytes, result.bits_per_byte) == (None, None)


def test_a_last_word_is_right_if_each_of_its_tokens_is_the_likeliest(byte_tokenizer):
    model = Successor(len(byte_tokenizer))
    x, space, a = (byte_tokenizer(letter)["input_ids"][0] for letter in "x a")
    with torch.no_grad():  # x is followed by a space and a space by a; as before, a by b and b by c
        model.logits[x] = model.logits[space - 1]
        model.logits[space] = model.logits[a - 1]
    result = kp.evaluate(model, byte_tokenizer, ["x abc", "x abd", "y abc", "y\nx a"], "lambada-last-word")
    assert result.accuracy == 2 / 4
    assert (result.num_tokens, result.num_words) == (4 + 4 + 4 + 2, 4)
    assert result.nll_sum_nats == pytest.approx(12 * math.log(2) + 2 * math.log(2 * 257), rel=1e-6)


@pytest.mark.parametrize("bos", [None, True, False])
def test_last_words_are_read_after_bos_if_the_tokenizer_itself_puts_it_first(tiny_model, tiny_tokenizer, bos):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    result = kp.evaluate(tiny_model("gpt2"), tokenizer, PASSAGES, "lambada-last-word", bos=bos)
    assert result.bos is (bos is not False)
    assert result == kp.evaluate(tiny_model("gpt2"), tiny_tokenizer, PASSAGES, "lambada-last-word", bos=result.bos)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("He sat by the sea", {}, "takes a list of passages"),
        (["He sat", "alone"], {}, "'alone'.* nothing before the last word"),
        (["He sat", " alone"], {}, "' alone'.* nothing before the last word"),
        ([" \n", ""], {}, "no passage"),
        ([], {}, "no passage"),
        (["He sat by the corner"], {"window": 2}, "window 2: the last word of .*corner' has [3-9] tokens"),
        (["He sat"], {"stride": 4}, "stride 4: protocol lambada-last-word has none"),
        (["He sat"], {"window": 129}, "window 129: must be between 1 and the model's 128"),
    ],
)
def test_passages_without_a_last_word_to_predict_are_refused(tiny_model, byte_tokenizer, text, options, message):
    with pytest.raises(kp.RequestError, match=message):
        kp.evaluate(tiny_model("gpt2"), byte_tokenizer, text, "lambada-last-word", **options)


# ---- the figures ----


def test_a_recipe_can_name_every_protocol():
    assert set(get_args(Evaluation.model_fields["protocol"].annotation)) == set(PROTOCOLS) == set(EXAMPLES)


@pytest.mark.parametrize(("protocol", "bos"), [("window", True), ("window", False), ("krony", None)])
def test_a_uniform_model_has_the_vocabulary_size_as_perplexity(tiny_model, tiny_tokenizer, tiny_text, protocol, bos):
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    result = kp.evaluate(model, tiny_tokenizer, tiny_text, protocol, window=100, bos=bos)
    assert result.perplexity == pytest.approx(300, rel=1e-5)
    assert result.nll_mean_nats == pytest.approx(math.log(300), rel=1e-6)
    assert result.nll_sum_nats == pytest.approx(result.num_tokens * math.log(300), rel=1e-6)


def test_a_uniform_model_has_the_vocabulary_size_as_last_word_perplexity_for_each_token_of_the_word(
    tiny_model, tiny_tokenizer
):
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    for passages in (["The old man read the", "In the evening he", "He took a"], PASSAGES):
        result = kp.evaluate(model, tiny_tokenizer, passages, "lambada-last-word")
        tokens_of_a_word = result.num_tokens / len(passages)
        assert result.perplexity == pytest.approx(300**tokens_of_a_word, rel=1e-5)
        assert (tokens_of_a_word == 1) == (passages is not PASSAGES)


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


def test_word_perplexity_by_hand(byte_tokenizer):
    model = Successor(len(byte_tokenizer))
    # Three words, eight tokens without the first; two times a space follows a letter and a letter a space.
    result = kp.evaluate(model, byte_tokenizer, "abc\nef gh", bos=False)
    assert result.num_words == 3
    assert result.word_perplexity == pytest.approx((2**4 * (2 * 257) ** 4) ** (1 / 3), rel=1e-5)


def test_word_perplexity_beyond_the_largest_float_is_none(tiny_model, byte_tokenizer):
    model = tiny_model("gpt2")
    assert kp.evaluate(model, byte_tokenizer, "x" * 300).word_perplexity is None
    assert kp.evaluate(model, byte_tokenizer, "  \n").word_perplexity is None
    assert kp.evaluate(model, byte_tokenizer, "x " * 150).word_perplexity < math.inf


@given(
    nll=st.floats(0, 1e6), num_tokens=st.integers(1, 10**6), num_bytes=st.integers(1, 10**6), share=st.floats(0.1, 1)
)
@settings(max_examples=50, deadline=None)
def test_all_figures_are_views_of_one_sum(nll, num_tokens, num_bytes, share):
    nll = min(nll, 50 * num_tokens)  # exp of more is no number
    num_words = math.ceil(share * num_tokens)
    result = kp.EvaluationResult(
        protocol="window",
        window=8,
        stride=8,
        bos=True,
        num_tokens=num_tokens,
        num_bytes=num_bytes,
        num_words=num_words,
        nll_sum_nats=nll,
        nll_mean_nats=nll / num_tokens,
    )
    assert math.log(result.perplexity) * num_tokens == pytest.approx(nll, rel=1e-6, abs=1e-6)
    assert math.log(result.word_perplexity) * num_words == pytest.approx(nll, rel=1e-6, abs=1e-6)
    assert result.bits_per_byte * num_bytes * math.log(2) == pytest.approx(nll, rel=1e-9)
    fields = result.to_json()
    for derived in ("perplexity", "word_perplexity", "bits_per_byte"):
        assert fields[derived] == getattr(result, derived)
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
        ({"protocol": "krony", "window": 129}, ["window 129", "128"]),
        ({"protocol": "krony", "window": 1}, ["window 1", "at least 2"]),
        ({"protocol": "krony", "window": 16, "stride": 8}, ["stride 8", "16"]),
        ({"protocol": "krony", "window": 16, "bos": True}, ["bos", "krony has none"]),
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
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_weights_that_are_not_finite_are_failed_work(tiny_compressed, tiny_tokenizer, protocol, value, training):
    model = tiny_compressed("gpt2", "low_rank").train(training)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.right[0, 0] = value
    with pytest.raises(kp.WorkError, match="not finite"):
        kp.evaluate(model, tiny_tokenizer, protocol=protocol, **EXAMPLES[protocol])
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
