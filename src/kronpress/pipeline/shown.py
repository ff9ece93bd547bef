"""What a run measures for its report, beside the metrics: losses on a passage, speed, and energy by chance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kronpress.benchmark.sizes import Sizes, decode_bound
from kronpress.benchmark.timing import WARM_UP_ROUNDS, Speedup, Timing, time_rounds, token_ids
from kronpress.errors import RequestError
from kronpress.evaluation import longest_context, num_embeddings
from kronpress.plan import LayerPlan, ReducedLayerPlan
from kronpress.spectrum.energies import Form, captured_energies
from kronpress.spectrum.measure import CHANCE_SEED
from kronpress.tokens import RunningText, join_documents

PASSAGE_TOKENS = 192
# Tokens of running text have at most about so many characters on average.
_CHARACTERS_PER_TOKEN = 8
# Prefill and decode, and how often, for the speed that a report gives: `kronpress bench` measures it at length.
SPEED_PROMPT_TOKENS = 32
SPEED_NEW_TOKENS = 16
SPEED_ROUNDS = 8
# Larger matrices of structures without a closed form would take as long to fit to noise as the model's own.
MOST_ENTRIES_FITTED_TO_NOISE = 2**18


@dataclass(frozen=True)
class Passage:
    """Some test text, cut into what its tokens read: the pieces in order are the text.

    `ids` (num_tokens,) has the tokens of the pieces, after the tokenizer's BOS token if `bos`.
    """

    data: str
    pieces: list[str]
    ids: Tensor
    bos: bool

    def to_json(self) -> dict[str, Any]:
        return {"data": self.data, "bos": self.bos, "tokens": self.pieces}


def choose_passage(text: RunningText, tokenizer: PreTrainedTokenizerBase, context: int | None) -> Passage:
    """The first tokens after the middle of the text, from the beginning of a paragraph on if there is one near."""
    whole = join_documents(text.documents)
    middle = len(whole) // 2
    most = PASSAGE_TOKENS * _CHARACTERS_PER_TOKEN
    paragraph = whole.find("\n\n", middle, middle + most)
    cut = whole[middle if paragraph < 0 else paragraph :].strip()[:most] or whole.strip()[:most]
    bos = tokenizer.bos_token_id is not None
    limit = min(PASSAGE_TOKENS, (context or PASSAGE_TOKENS + 1) - 1)
    if tokenizer.is_fast:
        encoded = tokenizer(cut, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = list(encoded["input_ids"])
        starts = [start for start, _ in encoded["offset_mapping"]]
        starts[:1] = [0]
        # Several tokens may share a character; the first of them shows it.
        ends = [*starts[1:], len(cut)]
        pieces = [cut[start:end] for start, end in zip(starts, ends, strict=True)]
    else:
        ids = list(tokenizer(cut, add_special_tokens=False)["input_ids"])
        pieces = [str(tokenizer.decode([each])) for each in ids]
    ids, pieces = ids[:limit], pieces[:limit]
    return Passage(text.name, pieces, torch.tensor([*([tokenizer.bos_token_id] if bos else []), *ids]), bos)


@torch.no_grad()
def token_nats(model: PreTrainedModel, passage: Passage) -> list[float | None]:
    """The negative log-likelihood of each of the passage's tokens; None for a first one that nothing stands before."""
    if len(passage.ids) < 2:
        return [None] * len(passage.pieces)
    model.eval()
    ids = passage.ids.to(model.device)
    logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0]
    nats: list[float | None] = F.cross_entropy(logits.float(), ids[1:], reduction="none").tolist()
    return nats if passage.bos else [None, *nats]


def decode_speed(model: PreTrainedModel, dense: PreTrainedModel) -> dict[str, Any] | None:
    """How fast `model` decodes beside `dense`, one sequence at a time, measured in turns; None without a cache."""
    limits = [limit for each in (model, dense) if (limit := longest_context(each)) is not None]
    sizes = [size for each in (model, dense) if (size := num_embeddings(each)) is not None]
    context = min([SPEED_PROMPT_TOKENS + SPEED_NEW_TOKENS, *limits])
    prompt_tokens = max(1, context - SPEED_NEW_TOKENS)
    if context < 2 or not sizes:
        return None
    new_tokens = context - prompt_tokens
    ids = token_ids(min(sizes), context)
    try:
        seconds = time_rounds([model.eval(), dense.eval()], ids, prompt_tokens, SPEED_ROUNDS)
    except RequestError:
        return None
    ours, theirs = (Timing.of(1, new_tokens, [taken[index][1] for taken in seconds]) for index in (0, 1))
    bound = decode_bound(Sizes.of(model), Sizes.of(dense))
    return {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "rounds": SPEED_ROUNDS,
        "warm_up_rounds": WARM_UP_ROUNDS,
        "dtype": str(model.dtype).removeprefix("torch."),
        "tokens_per_second": ours.tokens_per_second.model_dump(),
        "dense_tokens_per_second": theirs.tokens_per_second.model_dump(),
        "speedup": Speedup.of(ours, theirs, bound).spread.model_dump(),
        "bound": bound,
    }


def chance_energies(layers: Mapping[str, LayerPlan]) -> dict[str, float | None]:
    """By layer, the fraction of ‖W‖² that its structure captures of one Gaussian matrix W of its shape.

    None where that would take long: a large matrix of a structure that is neither a Kronecker sum nor low rank.
    """
    known: dict[Any, float | None] = {}
    found = {}
    for name, layer in layers.items():
        key = layer.structure, layer.out_features, layer.in_features, layer.spec
        if key not in known:
            known[key] = _chance(layer)
        found[name] = known[key]
    return found


def _chance(layer: LayerPlan) -> float | None:
    m, n = layer.out_features, layer.in_features
    if isinstance(layer, ReducedLayerPlan):  # what stays is as it was, and the rest is gone
        return layer.num_params / layer.num_params_dense
    gaussian = torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(CHANCE_SEED))
    if layer.structure == "kronecker":
        form = Form("kronecker", tuple(layer.spec.left_shape), tuple(layer.spec.right_shape))
        return captured_energies(gaussian, form)[min(layer.spec.num_terms, form.most_terms) - 1].item()
    if layer.structure == "low_rank":
        form = Form("low_rank", (m, 1), (1, n))
        return captured_energies(gaussian, form)[min(layer.spec.rank, form.most_terms) - 1].item()
    if m * n > MOST_ENTRIES_FITTED_TO_NOISE:
        return None
    fitted = layer.matrix_class.expand(layer.matrix_class.fit(gaussian, layer.spec))
    return 1 - ((fitted - gaussian).square().sum() / gaussian.square().sum()).item()
