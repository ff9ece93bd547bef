"""From sets to what a model is trained on: how much of each, in which order, and what counts in the loss."""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

import kronpress as kp
from kronpress.errors import RequestError
from kronpress.recipe import Healing, WeightedSet
from kronpress.tokens import TokenStream, TrainData, cache, load_train_data, train_data
from kronpress.tokens.streams import Piece

LENGTH = 8
TEXTS = st.lists(st.text("ab é", max_size=8), min_size=1, max_size=7)


def write_set(folder: str, number: int, documents: list[str]) -> str:
    path = Path(folder) / f"{number}.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return str(path)


def former_tokens(tokenizer: Any, sets: list[list[str]], num_tokens: int, portion: int) -> list[int]:
    """What training was on before there was a cache: portions of the documents of all sets until there are enough."""
    documents: Iterator[str] = (document for each in sets for document in each if document.strip())
    tokens: list[int] = []
    while len(tokens) < num_tokens and (some := list(islice(documents, portion))):
        ids = tokenizer(some, add_special_tokens=False)["input_ids"]
        tokens += [token for one in ids for token in (*one, tokenizer.eos_token_id)]
    return tokens


@given(
    sets=st.lists(TEXTS, min_size=1, max_size=3),
    asked=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    portion=st.integers(1, 5),
)
@settings(max_examples=60, deadline=None)
def test_what_is_read_depends_on_what_is_asked_and_not_on_the_cache(tiny_tokenizer, sets, asked, portion):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for module in (cache, train_data):
            patch.setattr(module, "DOCUMENTS_AT_ONCE", portion)
        names = [write_set(folder, number, documents) for number, documents in enumerate(sets)]
        for num_tokens in asked:
            expected = former_tokens(tiny_tokenizer, sets, num_tokens, portion)
            if not expected:
                with pytest.raises(RequestError, match=r"\(train\): there is no text in it"):
                    kp.load_train_tokens(tiny_tokenizer, names, num_tokens, Path(folder))
                continue
            found = kp.load_train_tokens(tiny_tokenizer, names, num_tokens, Path(folder))
            assert (found.tolist(), found.dtype) == (expected, torch.int32)
            (stream,) = load_train_data(tiny_tokenizer, names, num_tokens, LENGTH, Path(folder)).streams
            assert stream.read(0, len(stream))[0].tolist() == expected


@given(
    weights=st.lists(st.floats(0.05, 20), min_size=1, max_size=4),
    num_windows=st.integers(1, 60),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_of_each_set_enough_is_read_that_nothing_is_used_twice(tiny_tokenizer, weights, num_windows, seed):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for module in (cache, train_data):
            patch.setattr(module, "DOCUMENTS_AT_ONCE", 1)  # not a token more than is asked for, but for one document
        names = [write_set(folder, number, ["a b"] * 1500) for number in range(len(weights))]
        sets = [WeightedSet(name=name, weight=weight) for name, weight in zip(names, weights, strict=True)]
        data = load_train_data(tiny_tokenizer, sets, num_windows * LENGTH, LENGTH, Path(folder))
        windows = data.windows(LENGTH, seed)
        places = [windows.place(index) for index in range(num_windows)]
        assert len(set(places)) == num_windows
        for stream, number in places:
            assert number < windows.orders[stream].first(1)


def test_a_mix_has_each_set_by_itself(tiny_tokenizer, tmp_path):
    names = [write_set(str(tmp_path), number, ["the old man " * 9 * (number + 1)]) for number in range(2)]
    sets = [WeightedSet(name=name, weight=weight) for name, weight in zip(names, (3, 1), strict=True)]
    data = load_train_data(tiny_tokenizer, sets, 10**6, LENGTH, tmp_path)
    assert data.weights == (3, 1)
    for name, stream in zip(names, data.streams, strict=True):
        alone = kp.load_train_tokens(tiny_tokenizer, name, 10**6, tmp_path)
        torch.testing.assert_close(stream.read(0, len(stream))[0].int(), alone)


# ---- recipes ----


def test_a_recipe_mixes_sets_by_weight():
    recipe = kp.load_recipe("low-rank", ["healing.data=[{name: a.txt, weight: 3}, {name: hub/set@main, weight: 0.5}]"])
    assert recipe.healing.data == [WeightedSet(name="a.txt", weight=3), WeightedSet(name="hub/set@main", weight=0.5)]
    assert kp.load_recipe(recipe.model_dump(mode="json")) == recipe
    changed = kp.load_recipe(recipe.model_dump(mode="json"), ["healing.data.1.weight=2"])
    assert changed.healing.data[1] == WeightedSet(name="hub/set@main", weight=2)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("[{name: a, weight: 0}]", r"set 0 is {'name': 'a', 'weight': 0}: expected {name, weight}.*above 0"),
        ("[{name: a, weight: 1}, {name: b}]", "set 1 is {'name': 'b'}: expected"),
        ("[a, {name: b, weight: 1}]", "set 0 is 'a': expected {name, weight} of every set"),
        ("[{name: a, wieght: 1}]", "set 0 is"),
        ("[]", "there is no set in it"),
    ],
)
def test_another_form_of_data_is_refused_in_one_sentence(data, reason):
    with pytest.raises(RequestError, match=rf"recipe field healing\.data: {reason}") as failure:
        kp.load_recipe("low-rank", [f"healing.data={data}"])
    assert "\n" not in str(failure.value)


# ---- healing ----


def healing(**changes: Any) -> Healing:
    settings = {"max_steps": 3, "sequences_per_step": 4, "sequence_length": LENGTH, "learning_rate": 1e-2}
    return Healing(**{**settings, **changes})


def read_in(model: Any, data: Any, settings: Healing, **more: Any) -> Tensor:
    """The sequences that the model reads while it is healed on its own text, pass after pass."""
    seen: list[Tensor] = []

    def read(_: Any, given: tuple[Tensor, ...]) -> None:
        if given[0].shape[1] == LENGTH and not isinstance(given[0], FakeTensor):  # as the estimate of memory has
            seen.append(given[0])

    handle = model.get_input_embeddings().register_forward_pre_hook(read)
    kp.heal_(model, None, data, settings, **more)
    handle.remove()
    return torch.cat(seen)


def test_plain_tokens_are_healed_in_the_order_of_committed_results(tiny_model):
    tokens = torch.randint(300, (11 * LENGTH + 3,), generator=torch.Generator().manual_seed(0))
    phases = [{"share": 0.5, "sequences_per_step": 6}, {"share": 0.5, "sequences_per_step": 2}]
    settings = healing(max_steps=12, phases=phases)
    num_read = settings.num_tokens // LENGTH
    assert num_read > 2 * 11
    # Written as it was: one random order of all whole windows after another, none cut short.
    generator = torch.Generator().manual_seed(7)
    order: list[int] = []
    while len(order) < num_read:
        order += torch.randperm(11, generator=generator).tolist()
    read = read_in(tiny_model("gpt2"), tokens, settings, seed=7)
    torch.testing.assert_close(read, tokens[: 11 * LENGTH].view(11, LENGTH)[order[:num_read]])


def chat_like(seed: int = 0) -> TrainData:
    """Tokens of which few count, and a whole stretch not at all; in their midst some that all do."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(300, (90,), generator=generator)
    counts = torch.rand(90, generator=generator) < 0.3
    counts[16:48] = False
    masked = Piece((2 * ids + counts).numpy(), masked=True)
    return TrainData((TokenStream([masked, Piece(torch.randint(300, (13,), generator=generator).numpy())]),))


@pytest.mark.parametrize("chunk_tokens", [None, 0])
@pytest.mark.parametrize("distils", [False, True])
def test_only_tokens_that_count_are_in_the_loss_however_a_step_is_divided(tiny_model, chunk_tokens, distils):
    data, teacher = chat_like(), tiny_model("gpt2", seed=1)
    weights = {"language_model_weight": 0.0, "distillation_weight": 1.0} if distils else {}
    settings = healing(max_steps=1, sequences_per_step=8, chunk_tokens=chunk_tokens, **weights)
    # Written differently: all logits of the step, the mean over what counts.
    model = tiny_model("gpt2")
    windows = [data.windows(LENGTH, 3)[index] for index in range(8)]
    ids = torch.stack([window["input_ids"] for window in windows])
    counted = torch.stack([window["counted"] for window in windows])[:, 1:]
    assert 0 < counted.sum() < counted.numel() and not counted.any(1).all()
    logits, teachers = (each(ids).logits[:, :-1].log_softmax(-1) for each in (model, teacher))
    if distils:
        values = F.kl_div(logits, teachers, log_target=True, reduction="none").sum(-1)
    else:
        values = -logits.gather(-1, ids[:, 1:, None])[..., 0]
    (values[counted].mean()).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    for per_pass in (None, 1, 4):
        healed, gradients = tiny_model("gpt2"), {}
        # The gradients as the optimiser meets them, before they are clipped.
        for name, parameter in healed.named_parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda each, name=name, gradients=gradients: gradients.update({name: each.grad.clone()})
            )
        log = kp.heal_(healed, teacher, data, settings.model_copy(update={"sequences_per_pass": per_pass}), seed=3)
        column = "distillation_nats" if distils else "language_model_nats"
        assert getattr(log.rows[0], column) == pytest.approx(values[counted].mean().item(), rel=1e-4)
        torch.testing.assert_close(gradients, {name: expected[name] for name in gradients}, rtol=1e-3, atol=1e-6)
        assert len(gradients) == len(expected)


def test_a_mix_goes_on_where_it_was_interrupted(tiny_model, tmp_path):
    parts = [torch.randint(300, (size,), generator=torch.Generator().manual_seed(size)) for size in (61, 43)]
    data = TrainData(tuple(map(TokenStream.of, parts)), (2.0, 1.0))
    settings = healing(max_steps=6, save_steps=2)
    whole = tiny_model("gpt2")
    read = read_in(whole, data, settings)
    model = tiny_model("gpt2")

    class Interrupted(Exception):
        pass

    def stop(row: Any) -> None:
        if row.step == 5:
            raise Interrupted

    with pytest.raises(Interrupted):
        kp.heal_(model, None, data, settings, work_dir=tmp_path, progress=stop)
    again = tiny_model("gpt2", seed=5)
    rest = read_in(again, data, settings, work_dir=tmp_path, resume=True)
    torch.testing.assert_close(rest, read[4 * 4 :])
    torch.testing.assert_close(again.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_a_token_that_the_model_does_not_know_is_refused(tiny_model):
    data = TrainData((TokenStream([Piece((2 * torch.arange(290, 310)).numpy(), masked=True)]),))
    with pytest.raises(RequestError, match="token 309 in the text: the model knows 300 tokens"):
        kp.heal_(copy.deepcopy(tiny_model("gpt2")), None, data, healing())


# ---- the page ----

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
def test_recipes_of_the_page_are_recipes(block):
    assert kp.load_recipe({"targets": "mlp", "structure": "low_rank", **yaml.safe_load(block)}).healing.data


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
def test_examples_of_the_page_run(block):
    exec(block, {})
