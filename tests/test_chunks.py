"""The loss of the logits made a few tokens at a time is that of all at once, with all its gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    PreTrainedModel,
)

import kronpress as kp
from kronpress.healing import chunks, forward_kl, jensen_shannon, reverse_kl
from kronpress.healing.chunks import Head, chunked_terms, find_head, without_logits
from kronpress.healing.losses import logit_terms
from kronpress.recipe import Healing

DIVERGENCES = {"forward": forward_kl, "reverse": reverse_kl, "between": partial(jensen_shannon, teacher_share=0.3)}
WEIGHTS = {"language_model_nats": 0.7, "forward": 1.3, "reverse": 0.4, "between": 2.1}
IDS = torch.arange(3 * 11).view(3, 11) * 7 % 60
TOKENS = (7 * torch.arange(4096)) % 60 + 3
SMALL = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "head_dim": 8,
}


def terms(top_k: int | None = None) -> Callable[[Tensor, Tensor | None, Tensor], dict[str, Tensor]]:
    return partial(logit_terms, divergences=DIVERGENCES, temperature=1.7, top_k=top_k)


def whole(
    model: nn.Module, teacher: nn.Module, ids: Tensor, top_k: int | None = None
) -> tuple[Tensor, dict[str, float]]:
    """The loss and its terms, of the logits that the models themselves give."""
    student_logits, teacher_logits = (each(input_ids=ids).logits[:, :-1].flatten(0, 1) for each in (model, teacher))
    means = {
        name: term.mean()
        for name, term in terms(top_k)(student_logits, teacher_logits.detach(), ids[:, 1:].flatten()).items()
    }
    loss = sum(WEIGHTS[name] * mean for name, mean in means.items())
    return loss, {name: mean.item() for name, mean in means.items()}


def in_chunks(
    model: PreTrainedModel, teacher: PreTrainedModel, ids: Tensor, chunk_tokens: int | None, top_k: int | None = None
) -> tuple[Tensor, dict[str, float]]:
    read = []
    heads = [find_head(each) for each in (model, teacher)]
    for each, head in zip((model, teacher), heads, strict=True):
        assert isinstance(head, Head), head
        with without_logits(head) as hidden:
            each(input_ids=ids, use_cache=False)
        read.append(hidden[0][:, :-1].flatten(0, 1))
    against = heads[1], read[1].detach()
    loss, means = chunked_terms(heads[0], read[0], against, ids[:, 1:].flatten(), terms(top_k), WEIGHTS, chunk_tokens)
    return loss, {name: mean.item() for name, mean in means.items()}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


# ---- heads of all kinds ----


@pytest.fixture(scope="module")
def model_of(tiny_model, tiny_compressed, tiny_recipe) -> Callable[[str], PreTrainedModel]:
    """kind, seed -> a model with such a head, in float64."""

    def with_structured_head(structure: str, seed: int) -> PreTrainedModel:
        model = tiny_model("llama", seed)
        kp.compress_(model, kp.make_plan(model, tiny_recipe(structure, targets=["lm_head"])))
        return model

    def build(kind: str, seed: int = 0) -> PreTrainedModel:
        torch.manual_seed(seed)
        name, _, structure = kind.partition(" ")
        if structure:
            if name == "head":
                return with_structured_head(structure, seed).double()
            model = tiny_model(name, seed)
            table = {"kronecker": {"right_shape": [1, 2], "num_terms": 2}, "low_rank": {"rank": 5}}[structure]
            kp.compress_(model, kp.make_plan(model, kp.Recipe(targets="embedding", structure=structure, spec=table)))
            return model.double()
        match name:
            case "biased":
                model = tiny_model("llama", seed)
                model.lm_head = nn.Linear(16, 300)
                return model.double()
            case "frozen":
                model = tiny_model("llama", seed)
                model.lm_head.requires_grad_(False)
                return model.double()
            case "adaptive":
                model = tiny_model("llama", seed)
                recipe = kp.Recipe(
                    targets=["lm_head"], spec={"right_shape": (2, 2), "num_terms": 2}, fit={"start": "adaptive"}
                )
                kp.compress_(model, kp.make_plan(model, recipe))
                return model.double()
            case "gemma2":
                config: Any = Gemma2Config(**SMALL, final_logit_softcapping=2.0)
            case "cohere":
                config = CohereConfig(**{**SMALL, "logit_scale": 0.3})
            case "granite":
                config = GraniteConfig(**SMALL, logits_scaling=0.4)
            case _:
                return tiny_model(name, seed).double()
        return AutoModelForCausalLM.from_config(config).double().eval()

    return build


KINDS = [
    "gpt2", "opt", "llama", "qwen2", "biased", "frozen", "adaptive", "gemma2", "cohere", "granite",
    "gpt2 kronecker", "qwen2 low_rank", *(f"head {structure}" for structure in kp.matrices.STRUCTURES),
]  # fmt: skip


@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000, None])
@pytest.mark.parametrize("kind", KINDS)
def test_in_chunks_or_whole_the_loss_and_all_gradients_are_the_same(model_of, kind, chunk_tokens):
    model, teacher = model_of(kind), model_of("llama", seed=1)
    top_k = 20 if chunk_tokens == 7 else None
    with kp.surgery.healing_parametrizations(model):
        if kind == "adaptive":
            assert parametrize.is_parametrized(model.lm_head)
        expected_loss, expected_means = whole(model, teacher, IDS, top_k)
        expected = gradients(model, expected_loss)
        loss, means = in_chunks(model, teacher, IDS, chunk_tokens, top_k)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-9, atol=1e-10)
        assert means == pytest.approx(expected_means, rel=1e-9)
        actual = gradients(model, 3 * loss)  # as if it were part of a sum
        torch.testing.assert_close(
            actual, {name: 3 * each for name, each in expected.items()}, rtol=1e-4, atol=2e-6
        )  # Llama norms in float32
    assert any("lm_head" in name or "wte" in name or "embed_tokens" in name for name in expected)
    assert ("lm_head.weight" in actual) == (
        kind
        not in ("frozen", "gpt2", "opt", "qwen2", "adaptive", "gemma2", "cohere", "gpt2 kronecker", "qwen2 low_rank")
    )


@given(
    st.integers(1, 6), st.integers(1, 8), st.integers(2, 9), st.integers(1, 10), st.integers(0, 2**32), st.booleans()
)
@settings(max_examples=12, deadline=None)
def test_the_gradients_against_finite_differences(tokens, width, vocabulary, chunk_tokens, seed, is_coarse):
    torch.manual_seed(seed)
    linear, known = nn.Linear(width, vocabulary, dtype=torch.float64), torch.randn(tokens, 3, dtype=torch.float64)
    teacher = Head(nn.Linear(3, vocabulary, dtype=torch.float64), vocabulary)
    head = Head(linear, vocabulary, (("final_logit_softcapping", 3.0),))
    hidden = torch.randn(tokens, width, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,))

    def loss() -> Tensor:
        coarse = terms(1 if is_coarse else None)
        return chunked_terms(head, hidden, (teacher, known), targets, coarse, WEIGHTS, chunk_tokens)[0]

    inputs = (hidden, linear.weight, linear.bias)
    (3.0 * loss()).backward()
    step = 1e-6
    for each in inputs:
        expected = torch.zeros_like(each)
        for place in range(each.numel()):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    each.view(-1)[place] += sign * step
                    ends.append(loss().item())
                    each.view(-1)[place] -= sign * step
            expected.view(-1)[place] = 3.0 * (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close(each.grad, expected, rtol=1e-5, atol=1e-7)


def test_half_precision_under_autocast(model_of):
    model, teacher = model_of("gpt2").float(), model_of("llama", seed=1).float()
    with torch.autocast("cpu", torch.bfloat16):
        expected_loss, expected_means = whole(model, teacher, IDS)
        loss, means = in_chunks(model, teacher, IDS, 5)
    assert means == pytest.approx(expected_means, rel=1e-3)
    expected, actual = gradients(model, expected_loss), gradients(model, loss)
    assert actual["transformer.wte.weight"].dtype == torch.float32
    largest = max(each.abs().max() for each in expected.values()).item()
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.02 * largest)


@given(st.integers(1, 9), st.integers(1, 10))
@settings(max_examples=12, deadline=None)
def test_terms_that_weigh_nothing_are_told_and_not_differentiated(tokens, chunk_tokens):
    torch.manual_seed(tokens)
    linear, hidden = nn.Linear(4, 6), torch.randn(tokens, 4, requires_grad=True)
    targets = torch.randint(6, (tokens,))

    def not_to_be_differentiated(logits: Tensor, *_: Any) -> dict[str, Tensor]:
        each = torch.nn.functional.cross_entropy(logits, targets[: len(logits)], reduction="none")
        each.register_hook(lambda _: pytest.fail("it was differentiated"))
        return {"none": each, "some": logits.square().sum(-1)}

    head = Head(linear, 6)
    loss, means = chunked_terms(head, hidden, None, targets, not_to_be_differentiated, {"some": 2.0}, chunk_tokens)
    loss.backward()
    expected_loss = 2.0 * linear(hidden).square().sum(-1).mean()
    expected = torch.autograd.grad(expected_loss, [hidden, linear.weight])
    torch.testing.assert_close([hidden.grad, linear.weight.grad], list(expected))
    assert means["none"] > 0
    # With no weight at all nothing moves.
    loss, means = chunked_terms(head, hidden, None, targets, not_to_be_differentiated, {}, chunk_tokens)
    assert means["some"] > 0
    hidden.grad = None
    loss.backward()
    assert not loss.item()
    assert not hidden.grad.any()


def test_it_is_differentiated_once():
    linear, targets = nn.Linear(4, 6), torch.zeros(3, dtype=torch.int64)
    loss, _ = chunked_terms(Head(linear, 6), torch.randn(3, 4), None, targets, terms(), WEIGHTS, 2)
    loss.backward(retain_graph=True)
    before = linear.weight.grad.clone()
    with pytest.raises(RuntimeError, match="differentiated once"):
        loss.backward()
    torch.testing.assert_close(linear.weight.grad, before)


def test_without_gradients_there_are_none(model_of):
    model, teacher = model_of("gpt2"), model_of("llama", seed=1)
    with torch.no_grad():
        loss, means = in_chunks(model, teacher, IDS, 4)
        assert not loss.requires_grad
        assert means == pytest.approx(whole(model, teacher, IDS)[1], rel=1e-9)


# ---- which heads are understood ----


class Shifted(GPT2LMHeadModel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = super().forward(*args, **kwargs)
        given.logits = given.logits + 1.0
        return given


def test_a_head_that_is_not_understood_is_not_used(tiny_model, model_of):
    model = Shifted(tiny_model("gpt2").config)
    assert find_head(model) == "Shifted does more to its output embedding's result than is known"
    model.lm_head.forward = lambda hidden: nn.functional.linear(hidden, model.lm_head.weight)  # as accelerate wraps it
    assert find_head(model).startswith("Shifted does more")
    model.get_output_embeddings = lambda: None
    assert find_head(model) == "Shifted has no output embedding"
    for mode in (True, False):
        for kind in ("gpt2", "gemma2"):
            model = model_of(kind).train(mode)
            assert isinstance(find_head(model), Head)
            assert model.training is mode
            assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_head_computes_again_after_the_block(model_of, wrapped):
    model = model_of("gpt2")
    if wrapped:
        model.lm_head.forward = partial(nn.Linear.forward, model.lm_head)
    head, expected = find_head(model), model(input_ids=IDS).logits
    with without_logits(head) as read:
        assert model(input_ids=IDS).logits.shape == (3, 11, 1)
    assert [each.shape for each in read] == [(3, 11, 16)]
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=0, atol=0)
    assert ("forward" in vars(model.lm_head)) is wrapped


# ---- within the training ----


def schedule(**changes: Any) -> Healing:
    fields = {"max_steps": 5, "sequences_per_step": 4, "sequence_length": 16, "learning_rate": 3e-3}
    return Healing(**{**fields, **changes})


@pytest.mark.parametrize(
    ("family", "structure", "changes"),
    [
        ("gpt2", "kronecker", {"distillation_weight": 1.0}),
        ("llama", "low_rank", {}),
        ("qwen2", "kronecker", {"reverse_distillation_weight": 1.0, "sequences_per_pass": 2, "distillation_top_k": 9}),
        ("opt", "monarch", {"jensen_shannon_weight": 1.0, "hidden_weight": 1.0, "temperature": 2.0}),
    ],
)
def test_a_healing_in_chunks_is_the_healing(tiny_model, tiny_compressed, family, structure, changes):
    logs, weights = [], []
    for chunk_tokens in (0, 1, 17, None):
        model = tiny_compressed(family, structure)
        logs.append(kp.heal_(model, tiny_model(family), TOKENS, schedule(chunk_tokens=chunk_tokens, **changes)))
        weights.append({name: each.detach() for name, each in model.named_parameters()})
    for log, after in zip(logs[1:], weights[1:], strict=True):
        assert [row.loss for row in log.rows] == pytest.approx([row.loss for row in logs[0].rows], rel=1e-4)
        torch.testing.assert_close(after, weights[0], rtol=0, atol=1e-3)  # Adam's steps are of 3e-3 each


@pytest.mark.parametrize("chunk_tokens", [1, 7, None])
def test_no_more_logits_than_a_chunks_are_ever_in_memory(tiny_model, tiny_compressed, chunk_tokens, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_LOGITS", 5 * 300)
    model, teacher, seen = tiny_compressed("gpt2", "low_rank"), tiny_model("gpt2"), []
    for each in (model, teacher):
        each.lm_head.register_forward_hook(
            lambda _, given, logits: seen.append(logits[..., 0].numel()) if logits.shape[-1] > 1 else None
        )
    kp.heal_(model, teacher, TOKENS, schedule(distillation_weight=1.0, chunk_tokens=chunk_tokens))
    tried, trained = seen[:4], seen[4:]
    assert tried == [4] * 4
    assert max(trained) == (chunk_tokens or 5)
    assert sum(trained) == 2 * 5 * 4 * 15  # every token has logits once, of student and teacher


def test_whoever_has_a_head_that_is_not_understood_is_told(tiny_model):
    model = Shifted(tiny_model("gpt2").config)
    told: list[str] = []
    kp.heal_(model, tiny_model("gpt2"), TOKENS, schedule(distillation_weight=1.0), messages=told.append)
    told = [each for each in told if not each.startswith("healing takes about ")]
    assert told == [
        "the logits of all tokens of a pass are in memory at once: Shifted does more to its output embedding's result "
        "than is known"
    ]
    kp.heal_(model, None, TOKENS, schedule(chunk_tokens=0), messages=told.append)  # as asked for
    assert [each.startswith("healing takes about ") for each in told] == [False, True]
