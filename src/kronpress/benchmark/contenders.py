"""The models that are measured side by side: what each is, and how it is made, from files or from random numbers."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from kronpress.benchmark.rivals import OF_DENSE, RIVALS
from kronpress.benchmark.sizes import INT8, Sizes
from kronpress.benchmark.timing import Work
from kronpress.checkpoint import cast_parameters_, load_config, load_model
from kronpress.dispatch import Dispatch, set_dispatch
from kronpress.errors import RequestError, WorkError
from kronpress.families import FAMILIES, GEOMETRIES
from kronpress.layers import StructuredLayer, StructuredLinear
from kronpress.plan import Plan, owners_first, reduced_shapes, structured_plans
from kronpress.planning import make_plan
from kronpress.recipe import Recipe
from kronpress.reduction import put_empty_
from kronpress.surgery import replace_by_matrix_, structured_layers, untie_

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Of random dense weights and of the factor `weight`: what GPT-2 starts training with.
RANDOM_STD = 0.02
# Random numbers that are drawn; longer tensors repeat them, which no product notices.
NUM_DRAWN = 2**22


@dataclass(frozen=True)
class Contender:
    """One model in one dtype; a value that another process can make the same model from.

    Args:
        name: MODEL; with random weights also a bare geometry.
        recipe: what a model with random weights becomes, with random factors in place of fitted ones.
        rival: one of RIVALS, to be made of it.
        dense_cache: structured layers may keep dense weights, as many as pay.
    """

    name: str
    dtype: str
    random_weights: bool = False
    recipe: Recipe | None = None
    rival: str | None = None
    dense_cache: bool = False

    @property
    def label(self) -> str:
        parts = [self.name, self.recipe.name if self.recipe else None, self.rival, self.dtype]
        return ", ".join(part for part in parts if part is not None)


@dataclass(frozen=True)
class Built:
    """A model that is ready to be measured; `sizes` are those of the model that a rival was made of, but for int8."""

    model: PreTrainedModel
    sizes: Sizes
    revision: str | None


def shell(contender: Contender) -> PreTrainedModel:
    """The model without its weights, as the configuration and a plan have it, before a rival is made of it.

    Parameters and the orders of structured layers are on the meta device, parameters in the contender's dtype; other
    buffers are where they belong.

    Raises:
        RequestError: the recipe needs weights, or does not fit the model.
    """
    config = load_config(contender.name)
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    plan = _stored_plan(config)
    if contender.recipe is not None:
        parts = contender.recipe.parts
        if any(part.allocation != "uniform" for part in parts):
            raise RequestError(
                f"recipe {contender.recipe.name!r} measures its allocation, and random weights have nothing to "
                "measure: take a recipe of fixed shapes or with a uniform allocation"
            )
        # Of the configuration, which refuses what is compressed already.
        plan = make_plan(config, contender.recipe)
        if any(part.rotation for part in parts):
            untie_(model, FAMILIES[config.model_type].embedding)
    layers = {} if plan is None else plan.layers
    put_empty_(model, reduced_shapes(layers))
    for name, layer in owners_first(structured_plans(layers)).items():
        replace_by_matrix_(model, name, layer.empty_matrix(torch.float32), layer.heads, layer.shared_with)
    cast_parameters_(model, DTYPES[contender.dtype])
    return model.eval()


def _stored_plan(config: Any) -> Plan | None:
    stored = getattr(config, "quantization_config", None)
    fields = stored if isinstance(stored, dict) else {}
    return Plan.model_validate(fields["plan"]) if fields.get("quant_method") == "kronpress" else None


def build(contender: Contender) -> Built:
    """The contender's model in evaluation mode, on the GPU if there is one.

    Raises:
        RequestError: no such model, or a rival that cannot be made of it.
        WorkError: it cannot be loaded.
    """
    original = _load(contender)
    return original if contender.rival is None else _with_rival(original, contender.rival)


def build_together(contenders: Sequence[Contender]) -> list[Built]:
    """All of them, for one process: what multiplies the factors of another contender in its own way shares them."""
    built: list[Built] = []
    for number, contender in enumerate(contenders):
        original = replace(contender, rival=None)
        if contender.rival is not None and contender.rival not in OF_DENSE and original in contenders[:number]:
            model = built[contenders.index(original)].model
            memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
            shared = replace(built[contenders.index(original)], model=copy.deepcopy(model, memo))
            built.append(_with_rival(shared, contender.rival))
        else:
            built.append(build(contender))
    return built


def _with_rival(built: Built, rival: str) -> Built:
    sizes = Sizes.of_int8(built.model) if rival == INT8 else built.sizes
    RIVALS[rival](built.model)
    return replace(built, sizes=sizes)


def _load(contender: Contender) -> Built:
    """The contender before a rival is made of it."""
    if contender.random_weights:
        model = shell(contender)
        fill_(model, "cuda" if torch.cuda.is_available() else "cpu")
        return Built(_dispatched(model, contender), Sizes.of(model), None)
    try:
        loaded = load_model(contender.name)
    except (RequestError, WorkError) as error:
        if contender.name not in GEOMETRIES:
            raise
        raise RequestError(f"{error}; to measure the geometry alone give --random-weights") from error
    cast_parameters_(loaded.model, DTYPES[contender.dtype])
    return Built(_dispatched(loaded.model, contender), Sizes.of(loaded.model), loaded.revision)


def _dispatched(model: PreTrainedModel, contender: Contender) -> PreTrainedModel:
    """The model, with its ways chosen by what this device was measured to do."""
    if any(isinstance(layer, StructuredLinear) for layer in structured_layers(model).values()):
        num_bytes = math.inf if contender.dense_cache else 0
        set_dispatch(model, Dispatch(dense_cache_bytes=num_bytes), measure=True)
    return model


def fill_(model: nn.Module, device: str) -> None:
    """Give every parameter on the meta device random numbers and every order a random permutation; ties are kept.

    Gains of norms become ones, other vectors zeros. Factors are scaled so that the matrix of them is like a dense one.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(NUM_DRAWN, generator=generator)
    filled: dict[int, nn.Parameter] = {}  # by the parameter that several modules may hold
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta and id(parameter) not in filled:
                values = _random(parameter, drawn, _std(module, name, parameter), device)
                if name == "weight" and parameter.ndim < 2:
                    values.fill_(1)
                filled[id(parameter)] = nn.Parameter(values, requires_grad=False)
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                setattr(module, name, filled[id(parameter)])
        for name, order in list(module.named_buffers(recurse=False)):
            if order.is_meta:
                numbers = torch.randperm(order.shape[-1], generator=generator)
                module.register_buffer(name, numbers.expand(order.shape).clone())
    model.to(device)


def _std(module: nn.Module, name: str, parameter: Tensor) -> float:
    """The standard deviation of the numbers; 0 for a vector, which is constant."""
    if parameter.ndim < 2:
        return 0.0
    if isinstance(module, StructuredLayer) and name != "weight":
        return float(module.structure.num_paths(module.spec) ** -0.5)
    return RANDOM_STD


def _random(like: Tensor, drawn: Tensor, std: float, device: str) -> Tensor:
    values = torch.empty_like(like, device=device)
    scaled = (std * drawn[: like.numel()]).to(values)
    for part in values.view(-1).split(len(drawn)):
        part.copy_(scaled[: len(part)])
    return values


def needed_bytes(contenders: Sequence[Contender], works: Sequence[Work]) -> int:
    """About how much memory all of them need together, with the greatest of the works.

    Weights, of rivals that share them once; a dense copy of what is compressed, if it may be kept; the key-value cache
    and logits.
    """
    total, largest = 0, 0
    for contender in contenders:
        model = shell(contender)
        sizes = Sizes.of(model)
        dense = sum(
            layer.out_features * layer.in_features * DTYPES[contender.dtype].itemsize
            for layer in structured_layers(model).values()
        )
        if contender.rival == INT8:
            total += Sizes.of_int8(model).num_bytes
            largest = max(largest, sizes.num_bytes)  # while it is being rounded
        elif contender.rival is None or contender.rival in OF_DENSE:
            total += sizes.num_bytes + (dense if contender.dense_cache else 0)
        largest = max(largest, max(_running_bytes(model, work) for work in works))
    return total + largest


def _running_bytes(model: PreTrainedModel, work: Work) -> int:
    config = model.config.get_text_config()
    positions = work.batch_size * (work.prompt_tokens + work.new_tokens)
    # Logits in the dtype and again in float32; in every layer keys and values of full width.
    logits = work.batch_size * work.prompt_tokens * config.vocab_size * (4 + model.dtype.itemsize)
    cache = 2 * config.num_hidden_layers * config.hidden_size * model.dtype.itemsize * positions
    return logits + cache
