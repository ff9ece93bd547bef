"""What a compressed model has to beat: the dense model trained further, with fewer blocks, or in fewer bits."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from kronpress.errors import RequestError
from kronpress.families import FAMILIES
from kronpress.plan import Plan
from kronpress.planning import Totals

# Numbers that share one 16-bit scale.
QUANTIZATION_GROUP = 32


@dataclass(frozen=True)
class Contender:
    """A model that stands beside the dense one in a table, and what it would weigh on disk."""

    name: str
    model: PreTrainedModel
    num_params: int
    bytes: int
    flops_per_token: int
    is_trained: bool = True  # on the tokens on which the compressed model is healed


def drop_blocks(model: PreTrainedModel, num_blocks: int) -> PreTrainedModel:
    """A copy of `model` with only `num_blocks` of its transformer blocks, evenly spaced from the first on.

    With half of them this is the start of DistilGPT-2: blocks 0, 2, 4, ... Everything else is copied as it is.

    Raises:
        RequestError: the family's blocks are not known, or there are not so many.
    """
    name_of_blocks = _name_of_blocks(model)
    there = model.config.num_hidden_layers
    if not 1 <= num_blocks <= there:
        raise RequestError(f"{num_blocks} blocks: the model has {there}")
    kept = [i * there // num_blocks for i in range(num_blocks)]

    config = copy.deepcopy(model.config)
    config.num_hidden_layers = num_blocks
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[block] for block in kept]
    with torch.device(model.device):
        smaller = type(model)._from_config(config, dtype=model.dtype)
    key = re.compile(rf"({re.escape(name_of_blocks)}\.)(\d+)(\..*)")
    state = {}
    for name, tensor in model.state_dict().items():
        match = key.fullmatch(name)
        if match is None:
            state[name] = tensor
        elif int(match[2]) in kept:
            state[f"{match[1]}{kept.index(int(match[2]))}{match[3]}"] = tensor
    smaller.load_state_dict(state, strict=True)
    return smaller.train(model.training)


def nearest_num_blocks(model: PreTrainedModel, num_params: int) -> int:
    """How many blocks bring the model nearest to `num_params` parameters; of two equally near the more."""
    there = model.config.num_hidden_layers
    per_block = sum(p.numel() for p in model.get_submodule(_name_of_blocks(model)).parameters()) / there
    rest = _num_params(model) - per_block * there
    return min(range(there, 0, -1), key=lambda count: abs(rest + per_block * count - num_params))


def _name_of_blocks(model: PreTrainedModel) -> str:
    model_type = model.config.model_type
    if model_type not in FAMILIES:
        raise RequestError(f"blocks of a model of type {model_type!r}: known types are {', '.join(FAMILIES)}")
    return FAMILIES[model_type].blocks


@torch.no_grad()
def quantize_(model: nn.Module, bits: int) -> int:
    """Round every matrix of `model`, embeddings included, to `bits` bits in place; returns the bytes it then needs.

    Rows are cut into groups of 32 along the width; a group is stored as integers of at most 2^(bits−1) − 1 in
    size and one 16-bit scale. The scale is the one of 32 between half of the largest number and all of it that
    rounds with the least squared error. Vectors are kept in 16 bits.

    The model computes with the rounded numbers in its own dtype: this measures quality and size, not speed.
    """
    num_bytes = 0
    for parameter in model.parameters():  # a tied one comes once
        if parameter.ndim < 2:
            num_bytes += 2 * parameter.numel()
            continue
        rows = parameter.detach().flatten(0, -2).float()
        num_groups = rows.shape[0] * -(-rows.shape[1] // QUANTIZATION_GROUP)
        num_bytes += (parameter.numel() * bits + 7) // 8 + 2 * num_groups
        parameter.copy_(_rounded(rows, bits).view_as(parameter))
    return num_bytes


def _rounded(rows: Tensor, bits: int) -> Tensor:
    width = rows.shape[1]
    padded = F.pad(rows, (0, -width % QUANTIZATION_GROUP))
    groups = padded.reshape(-1, QUANTIZATION_GROUP)
    largest = 2 ** (bits - 1) - 1
    best, least = torch.zeros_like(groups), torch.full_like(groups[:, :1], torch.inf)
    for factor in torch.linspace(0.5, 1.0, 32).tolist():
        scale = (factor * groups.abs().amax(1, keepdim=True) / largest).half().float()
        rounded = scale * torch.where(scale > 0, groups / scale, 0).round().clamp(-largest, largest)
        error = (rounded - groups).square().sum(1, keepdim=True)
        best, least = torch.where(error < least, rounded, best), torch.minimum(error, least)
    return best.reshape(padded.shape)[:, :width]


def _num_params(model: PreTrainedModel) -> int:
    return sum(p.numel() for p in model.parameters())


def dense_contender(dense: PreTrainedModel, plan: Plan) -> Contender:
    """A copy of the dense model itself."""
    return Contender("dense", copy.deepcopy(dense), plan.num_params_dense, plan.bytes_dense, plan.flops_per_token_dense)


def _fewer_blocks(dense: PreTrainedModel, plan: Plan) -> Contender:
    num_blocks = nearest_num_blocks(dense, plan.num_params)
    model = drop_blocks(dense, num_blocks)
    num_params = _num_params(model)
    name = f"{num_blocks} of {dense.config.num_hidden_layers} blocks"
    num_bytes = num_params * plan.bytes_dense // plan.num_params_dense
    return Contender(name, model, num_params, num_bytes, Totals.of(model).flops_per_token)


def _quantized(dense: PreTrainedModel, plan: Plan, bits: int) -> Contender:
    num_bytes = quantize_(dense, bits)
    name = f"dense, {bits}-bit"
    return Contender(name, dense, plan.num_params_dense, num_bytes, plan.flops_per_token_dense, is_trained=False)


# By the name that a recipe's `rivals` gives them; every other name there is a recipe's. Each may change the model
# that it is given.
RIVALS: dict[str, Callable[[PreTrainedModel, Plan], Contender]] = {
    "dense": dense_contender,
    "blocks": _fewer_blocks,
    "8-bit": partial(_quantized, bits=8),
    "4-bit": partial(_quantized, bits=4),
}
